"""Texts of items and users as token IDs: read from a column, tidied, tokenised once, kept in one array.

A text can hold anything, also "<a_12>" or "</s>". Tokenised alone these would be a code and a special token; here such
token IDs are taken out, so that no text of an item or a query says anything but words.
"""

import logging
import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from llmrec.errors import DataError
from llmrec.vocabulary import CodeVocabulary

logger = logging.getLogger(__name__)

_AT_ONCE = 4_096  # texts that are tokenised in one call
_TRAILING = " .,;:!?-|/~_\u2013\u2014\u2026"  # what a title loses at its end; the last three: dashes and an ellipsis


@dataclass(frozen=True, eq=False)
class RowTexts:
    """None, one or several texts of each of R rows, as token IDs.

    Attributes:
        tokens: int32, all texts one after the other.
        text_offsets: int64 [texts + 1], where each text begins in `tokens`.
        row_offsets: int64 [R + 1]: row `r` has the texts from `row_offsets[r]` to before `row_offsets[r + 1]`.
    """

    tokens: np.ndarray
    text_offsets: np.ndarray
    row_offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    @cached_property
    def counts(self) -> np.ndarray:
        """int64 [R]: how many texts each row has."""
        return np.diff(self.row_offsets)

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [texts]: tokens of each text."""
        return np.diff(self.text_offsets)

    def text(self, number: int) -> list[int]:
        """Token IDs of one text."""
        return self.tokens[self.text_offsets[number] : self.text_offsets[number + 1]].tolist()


def read_texts(column: Iterable[Any], what: str, *, one_a_row: bool = False) -> list[list[str]]:
    """The texts of each row of a column: none where a cell is missing or blank, several where it holds a list.

    Args:
        column: Text, numbers, and lists of these. White space of any kind becomes single spaces.
        what: The column, for messages.
        one_a_row: The entries of a list are parts of one text.

    Raises:
        DataError: A cell holds something else.
    """
    texts = [list(_entries(value, what, row)) for row, value in enumerate(column)]
    return [[" ".join(row)] if row else [] for row in texts] if one_a_row else texts


def _entries(value: Any, what: str, row: int) -> Iterable[str]:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return
    if isinstance(value, list | tuple | np.ndarray):
        for entry in value:
            yield from _entries(entry, what, row)
        return
    if isinstance(value, bool) or not isinstance(value, str | numbers.Number):
        raise DataError(
            f"the column {what!r} holds a {type(value).__name__} in row {row} ({str(value)[:60]!r}): it must be text"
            " or a list of texts"
        )
    text = " ".join(str(value).split())
    if text:
        yield text


def without_trailing_punctuation(texts: Sequence[Sequence[str]]) -> list[list[str]]:
    """Titles without the dots, commas and dashes at their ends; those of nothing else are left out."""
    stripped = [[text.rstrip(_TRAILING) for text in row] for row in texts]
    return [[text for text in row if text] for row in stripped]


def tokenize_texts(
    texts: Sequence[Sequence[str]],
    text_tokenizer: PreTrainedTokenizerBase,
    vocabulary: CodeVocabulary,
    *,
    max_tokens: int,
    what: str,
) -> RowTexts:
    """Tokenises the texts of all rows.

    Args:
        texts: Of each row, from `read_texts`.
        text_tokenizer: With the code tokens in it. Its start and end tokens are not added.
        vocabulary: Where the code tokens are.
        max_tokens: Longer texts are cut there; the log counts them.
        what: The column, for the log.
    """
    flat = [text for row in texts for text in row]
    forbidden = _special_ids(text_tokenizer)
    kept: list[np.ndarray] = []
    num_cut = 0
    for start in range(0, len(flat), _AT_ONCE):
        batch = text_tokenizer(flat[start : start + _AT_ONCE], add_special_tokens=False, verbose=False).input_ids
        for token_ids in batch:
            ids = np.asarray(token_ids, dtype=np.int32)
            is_code = (ids >= vocabulary.first_token_id) & (ids < vocabulary.first_token_id + vocabulary.num_tokens)
            ids = ids[~is_code & ~np.isin(ids, forbidden)]
            num_cut += len(ids) > max_tokens
            kept.append(ids[:max_tokens])
    if num_cut:
        logger.info("%s: %s of %s texts are cut at %d tokens", what, f"{num_cut:,}", f"{len(flat):,}", max_tokens)
    return _without_empty(kept, [len(row) for row in texts])


def _special_ids(text_tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Token IDs that no text may hold: all special ones but that of unknown words, where it is nothing else."""
    ids = set(text_tokenizer.all_special_ids)
    others = (text_tokenizer.bos_token_id, text_tokenizer.eos_token_id, text_tokenizer.pad_token_id)
    if text_tokenizer.unk_token_id not in others:
        ids.discard(text_tokenizer.unk_token_id)
    return np.array(sorted(ids), dtype=np.int32)


def _without_empty(texts: list[np.ndarray], counts: list[int]) -> RowTexts:
    """Joins the texts; one of which no token is left is none."""
    lengths = np.array([len(ids) for ids in texts], dtype=np.int64)
    rows = np.repeat(np.arange(len(counts)), counts)[lengths > 0]
    left = lengths[lengths > 0]
    return RowTexts(
        tokens=np.concatenate(texts) if texts else np.empty(0, dtype=np.int32),
        text_offsets=np.concatenate([[0], np.cumsum(left)]).astype(np.int64),
        row_offsets=np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(counts)))]).astype(np.int64),
    )
