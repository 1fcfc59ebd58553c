"""The head of a language model during a search: only the hidden states and only the code columns that are asked for.

What the search needs of a decode step are the log-probabilities of one level's codes. In the scopes "codes" and
"trie" the rest of the vocabulary doesn't matter, and its part of the head is not computed. In the scope "vocabulary"
the whole product is needed for its log-sum-exp; it is made for some tokens of the vocabulary at a time, and only the
codes' columns are kept.

Both are modes of the head's own forward, so that engines which gather sharded weights around a module's forward
(ZeRO-3, FSDP2) see them. This module knows heads and columns. It knows nothing of items.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmrec.vocabulary import CodeHead, CodeVocabulary, find_code_head, has_code_rows

# Where the whole vocabulary is needed, the logits of some of its tokens are held at a time: so many elements (1 MB of
# float32 on a CPU), but no fewer tokens than make a matrix product efficient.
_ELEMENTS = {"cpu": 2**18}
_ACCELERATOR_ELEMENTS = 2**26
_FEWEST_TOKENS = 2048


class SearchHead:
    """What the class of a head becomes within `search_head`: a subclass of this and of what it was.

    Attributes:
        tokens_wanted: Index tensors into the first axes of the hidden states; None: all of them.
        level_columns: Token IDs `[start, end)` of one level's codes; None: the head writes what it always does.
        over_vocabulary: Whether these columns are log-probabilities over the whole vocabulary, and not logits.
        last_output: The whole logits that were written last.
    """

    tokens_wanted: tuple[Tensor, Tensor] | None
    level_columns: tuple[int, int] | None
    over_vocabulary: bool
    last_output: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Of hidden states [..., D]: logits [..., V], or logits or log-probabilities [..., K] of a level's codes."""
        if self.tokens_wanted is not None:
            input = input[self.tokens_wanted]
        if self.level_columns is None:
            self.last_output = self._all_logits(input)
            return self.last_output
        start, end = self.level_columns
        if self.over_vocabulary:
            flat = input.reshape(-1, input.shape[-1])
            return _level_log_probabilities(self, flat, start, end).view(*input.shape[:-1], end - start)
        if isinstance(self, CodeHead):
            first = self.first_token_id
            return F.linear(input, self.new_rows[start - first : end - first].to(input.dtype))
        if isinstance(self, nn.Linear) and type(self).__mro__[2] is nn.Linear:
            return F.linear(input, self.weight[start:end], None if self.bias is None else self.bias[start:end])
        return self._all_logits(input)[..., start:end]  # a head with LoRA, a quantised one

    def _all_logits(self, input: Tensor) -> Tensor:
        return cast(Tensor, super().forward(input))  # type: ignore[misc]


def _level_log_probabilities(head: SearchHead, input: Tensor, start: int, end: int) -> Tensor:
    """Log-probabilities float32 [R, K] of one level's codes over the whole vocabulary, of hidden states [R, D]."""
    if isinstance(head, CodeHead):
        first = head.first_token_id
        codes = F.linear(input, head.new_rows.to(input.dtype)).float()
        # Base rows that the codes stand in the place of (Qwen) are no tokens.
        parts = [(0, first), (first + len(head.new_rows), len(head.weight))]
        total = torch.logaddexp(codes.logsumexp(dim=1, keepdim=True), _total(head, input, parts))
        return codes[:, start - first : end - first] - total
    if type(head).__mro__[2] is nn.Linear:
        linear = cast(nn.Linear, head)
        bias = None if linear.bias is None else linear.bias[start:end]
        of_level = F.linear(input, linear.weight[start:end], bias).float()
        return of_level - _total(linear, input, [(0, len(linear.weight))])
    logits = head._all_logits(input).float()
    return logits[:, start:end] - logits.logsumexp(dim=1, keepdim=True)


def _total(head: nn.Linear, input: Tensor, parts: Sequence[tuple[int, int]]) -> Tensor:
    """Log-sum-exp float32 [R, 1] of the logits of tokens in parts [start, end) of the vocabulary."""
    size = max(_ELEMENTS.get(input.device.type, _ACCELERATOR_ELEMENTS) // len(input), _FEWEST_TOKENS)
    total = torch.full((len(input), 1), -torch.inf, device=input.device)
    for part_start, part_end in parts:
        for start in range(part_start, part_end, size):
            chunk = slice(start, min(start + size, part_end))
            logits = F.linear(input, head.weight[chunk], None if head.bias is None else head.bias[chunk]).float()
            highest = logits.amax(
                dim=1, keepdim=True
            )  # in place from here: a second matrix costs as much as the first
            total = torch.logaddexp(total, logits.sub_(highest).exp_().sum(dim=1, keepdim=True).log_().add_(highest))
    return total


@contextmanager
def search_head(model: nn.Module) -> Iterator[SearchHead]:
    """Within the block the model's head is a `SearchHead`, which writes what it always does until it is told more."""
    head: Any = find_code_head(model) if has_code_rows(model) else cast(Any, model).get_output_embeddings()
    before = type(head)
    head.__class__ = _search_class(before)
    head.tokens_wanted, head.level_columns, head.over_vocabulary = None, None, False
    try:
        yield head
    finally:
        head.__class__ = before
        for name in ("tokens_wanted", "level_columns", "over_vocabulary", "last_output"):
            head.__dict__.pop(name, None)


_classes: dict[type, type] = {}


def _search_class(base: type) -> type:
    if base not in _classes:  # one class each, so that compiled code recognises it
        _classes[base] = type(f"Search{base.__name__}", (SearchHead, base), {})
    return _classes[base]


def level_columns(vocabulary: CodeVocabulary, level: int) -> tuple[int, int]:
    """Token IDs `[start, end)` of a level's codes."""
    start = vocabulary.first_token_id + int(vocabulary.level_offsets[level])
    return start, start + vocabulary.codebook_sizes[level]
