"""The head of a language model during a search: only the hidden states and only the code columns that are asked for.

What the search needs of a decode step are the log-probabilities of one level's codes. In the scopes "codes" and
"trie" the rest of the vocabulary doesn't matter, and its part of the head is not computed. In the scope "vocabulary"
the whole product is needed for its log-sum-exp; it is made some rows at a time, and only the codes' columns are kept.

Both are modes of the head's own forward, so that engines which gather sharded weights around a module's forward
(ZeRO-3, FSDP2) see them. This module knows heads and columns. It knows nothing of items.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmrec.vocabulary import CodeHead, CodeVocabulary, find_code_head, has_code_rows

# Elements of the logits that are held at once where the whole vocabulary is needed: 8 MB of float32 on a CPU.
_CHUNK = {"cpu": 2**21}
_ACCELERATOR_CHUNK = 2**26


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
            size = max(1, _CHUNK.get(input.device.type, _ACCELERATOR_CHUNK) // cast(Any, self).out_features)
            chunks = [_level_log_probabilities(self, chunk, start, end) for chunk in flat.split(size)]
            return torch.cat(chunks).view(*input.shape[:-1], end - start)
        if isinstance(self, CodeHead):
            first = self.first_token_id
            return F.linear(input, self.new_rows[start - first : end - first].to(input.dtype))
        if isinstance(self, nn.Linear) and type(self).__mro__[2] is nn.Linear:
            return F.linear(input, self.weight[start:end], None if self.bias is None else self.bias[start:end])
        return self._all_logits(input)[..., start:end]  # a head with LoRA, a quantised one

    def _all_logits(self, input: Tensor) -> Tensor:
        return cast(Tensor, super().forward(input))  # type: ignore[misc]


def _level_log_probabilities(head: SearchHead, input: Tensor, start: int, end: int) -> Tensor:
    """Log-probabilities float32 [R, K] of one level's codes over the whole vocabulary."""
    if not isinstance(head, CodeHead):
        logits = head._all_logits(input).float()
        return logits[:, start:end].clone() - _logsumexp_in_place(logits)
    first, end_of_codes = head.first_token_id, head.first_token_id + head.new_rows.shape[0]
    codes = F.linear(input, head.new_rows.to(input.dtype))
    logits = nn.Linear.forward(cast(nn.Linear, head), input)
    logits[:, first:end_of_codes] = -torch.inf  # base rows that the codes stand in the place of (Qwen)
    of_level = codes[:, start - first : end - first].float()
    return of_level - torch.logaddexp(_logsumexp_in_place(logits.float()), codes.float().logsumexp(1, keepdim=True))


def _logsumexp_in_place(logits: Tensor) -> Tensor:
    """[R, 1]; `logits` is used up, so that no second matrix of its size is needed."""
    highest = logits.amax(dim=1, keepdim=True)
    return logits.sub_(highest).exp_().sum(dim=1, keepdim=True).log_().add_(highest)


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
