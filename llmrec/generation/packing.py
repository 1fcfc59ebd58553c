"""Prompts of different lengths, laid side by side into rows so that no forward is spent on padding.

Several prompts stand in one row, each seeing itself alone; what all of them begin with (the instruction) stands once
at the start of the row, and is seen by all. This module knows token IDs. It knows nothing of models, codes or items.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor

SHARED = -1  # owner of a token that all prompts of its row begin with
PADDING = -2


@dataclass(frozen=True)
class PackedPrompts:
    """B prompts in R rows of W tokens, and where each token of each prompt stands.

    P is the length of the longest prompt. All tensors are int64.

    Attributes:
        input_ids: [R, W], 0 at padding.
        positions: [R, W], the place of each token in its own prompt, from 0.
        owners: [R, W], the request a token belongs to, `SHARED`, or `PADDING`.
        rows: [B, P], the row of each token of each prompt; beyond a prompt's end, that of its last token.
        columns: [B, P], the same for the column.
        lengths: [B], tokens of each prompt.
        is_plain: Row i is prompt i, all are of one length: ordinary causal attention is all it needs.
    """

    input_ids: Tensor
    positions: Tensor
    owners: Tensor
    rows: Tensor
    columns: Tensor
    lengths: Tensor
    is_plain: bool

    @property
    def num_requests(self) -> int:
        """B."""
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """P."""
        return self.rows.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.input_ids.device

    def to(self, device: torch.device | str) -> "PackedPrompts":
        """The same prompts on another device."""
        if torch.device(device) == self.device:
            return self
        tensors = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "is_plain"}
        return PackedPrompts(**{name: tensor.to(device) for name, tensor in tensors.items()}, is_plain=self.is_plain)

    def present(self) -> Tensor:
        """Which of the P places of each prompt hold a token: bool [B, P]."""
        return torch.arange(self.longest, device=self.device) < self.lengths.unsqueeze(1)

    def last(self) -> tuple[Tensor, Tensor]:
        """Row and column of each prompt's last token, both [B]."""
        return self.rows[:, -1], self.columns[:, -1]

    def visible(self, window: int | None = None) -> Tensor:
        """Which tokens of its row each token sees: bool [R, W, W], the second axis sees the third.

        Args:
            window: How many tokens, itself included, a token sees at most; None: all before it.
        """
        seer, seen = self.owners.unsqueeze(2), self.owners.unsqueeze(1)
        distance = self.positions.unsqueeze(2) - self.positions.unsqueeze(1)
        # A token of the shared part comes before everybody's own ones, so it sees none of them.
        visible = ((seer == seen) | (seen == SHARED)) & (distance >= 0)
        return visible if window is None else visible & (distance < window)


def pack_prompts(prompts: Sequence[Sequence[int]], *, attention_scale: int) -> PackedPrompts:
    """Lays prompts into rows, on the CPU.

    Longer rows share more and pad less, but every token is compared with all of its row: a row of W tokens costs
    about W (1 + W / `attention_scale`). The cheapest of several widths is taken, one prompt a row among them.

    Args:
        prompts: B lists of token IDs, none of them empty.
        attention_scale: Length of a row at which attention costs as much as all the rest of the model.
    """
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    shared = _common_start(prompts) if len(prompts) > 1 else 0
    best, best_shared, best_width = [[request] for request in range(len(prompts))], 0, longest
    best_cost = len(prompts) * longest * (1 + longest / attention_scale)
    num_rows = len(prompts)
    while num_rows > 1:
        num_rows = -(-num_rows // 2)
        rows, width = _fill(lengths, shared, num_rows)
        cost = num_rows * width * (1 + width / attention_scale)
        if cost < 0.97 * best_cost:  # explicit masks and the way back have a price of their own
            best, best_shared, best_width, best_cost = rows, shared, width, cost
    return _lay_out(prompts, best, best_shared, best_width, longest)


def pad_prompts(prompts: Sequence[Sequence[int]], length: int) -> PackedPrompts:
    """One prompt a row, padded at the end to a given length, on the CPU: shapes don't depend on the prompts."""
    return _lay_out(prompts, [[request] for request in range(len(prompts))], 0, length, length)


def _common_start(prompts: Sequence[Sequence[int]]) -> int:
    """Number of tokens that all prompts begin with; at least one token of each is left out."""
    same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
    return min(sum(1 for _ in same), min(map(len, prompts)) - 1)


def _fill(lengths: Sequence[int], shared: int, num_rows: int) -> tuple[list[list[int]], int]:
    """Requests of each row, longest first, each put into the shortest row so far; and the length of the longest."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    used = [(shared, row) for row in range(num_rows)]
    for request in sorted(range(len(lengths)), key=lambda request: -lengths[request]):
        length, row = heapq.heappop(used)
        rows[row].append(request)
        heapq.heappush(used, (length + lengths[request] - shared, row))
    return rows, max(length for length, _ in used)


def _lay_out(
    prompts: Sequence[Sequence[int]], bins: list[list[int]], shared: int, width: int, longest: int
) -> PackedPrompts:
    input_ids, positions = np.zeros((2, len(bins), width), dtype=np.int64)
    owners = np.full((len(bins), width), PADDING, dtype=np.int64)
    rows, columns = np.empty((2, len(prompts), longest), dtype=np.int64)
    for row, requests in enumerate(bins):
        input_ids[row, :shared] = prompts[requests[0]][:shared]
        positions[row, :shared] = np.arange(shared)
        owners[row, :shared] = SHARED
        end = shared
        for request in requests:
            own = np.asarray(prompts[request][shared:], dtype=np.int64)
            start, end = end, end + len(own)
            input_ids[row, start:end] = own
            positions[row, start:end] = np.arange(shared, shared + len(own))
            owners[row, start:end] = request
            rows[request] = row
            columns[request, :shared] = np.arange(shared)
            columns[request, shared : shared + len(own)] = np.arange(start, end)
            columns[request, shared + len(own) :] = end - 1  # something finite: masked, but multiplied
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    names = ("input_ids", "positions", "owners", "rows", "columns", "lengths")
    arrays = (input_ids, positions, owners, rows, columns, lengths)
    tensors = {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}
    is_plain = shared == 0 and len(bins) == len(prompts) and bool((lengths == width).all())
    return PackedPrompts(**tensors, is_plain=is_plain)
