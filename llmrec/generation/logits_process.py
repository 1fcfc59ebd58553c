"""The trie as a logits processor of transformers' `generate`.

For any decoding mode of `generate`; llmrec's own search (`beam_search.py`) doesn't need it. The processor keeps no
state between steps: it reads the prefix out of `input_ids`, so reordered beams, rejected drafts of assisted
generation, a second call or steps after a row has finished can't confuse it. A step is gathers and comparisons on the
device of the logits: no Python loop over rows, nothing read back, nothing copied there, and it compiles as one graph.

This module knows tokens and nodes of the trie. It knows nothing of prompts' texts, item IDs or models.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from llmrec.errors import SettingsError
from llmrec.generation.item_sets import LeafSubset
from llmrec.generation.trie import ItemTrie
from llmrec.vocabulary import CodeVocabulary


class TrieLogitsProcessor(LogitsProcessor):
    """Allows only tokens that lead to an item: all others get -inf.

    At step t the codes that may follow the row's t codes keep their scores. After all L codes only end-of-sequence is
    allowed, and after that end-of-sequence or padding. Padding on the left of the prompt is never looked at, so it may
    be the same token as end-of-sequence. A row that no item is left for (all are left out by the subset; a dead beam
    that `generate` filled with arbitrary tokens; all codes forbidden by processors before this one) may only end, at
    once, and always may: the end keeps a finite score even where another processor (`min_new_tokens`) forbids it.
    Beams that `generate` has to fill although there are too few items carry scores of -1e9 or less, and are for the
    caller to drop.

    Assisted generation (`assistant_model`, `prompt_lookup_num_tokens`) is safe: transformers calls the processor at
    every drafted position with the whole prefix before it, and keeps a draft only as far as the model itself chooses
    it. Greedily it gives the item that generation without assistance gives, sampled it gives items of the same
    distribution. An assistant of another text tokenizer has no code tokens to draft: an error where its vocabulary
    ends before theirs, else its drafts are merely rejected. With `assistant_ensemble_weight` transformers mixes the
    assistant's probabilities in: still items, but no longer chosen by the model alone. transformers 5.17 (not 5.23)
    writes nothing at all where a prompt, or the start of a decoder as BART's, is itself the end token and nothing is
    drafted.

    Args:
        trie: On the device of the logits.
        vocabulary: Token IDs of the codes; of the same codebook sizes.
        prompt_length: Number of tokens of `input_ids` before the first code, padding included (for an encoder-decoder
            model those of the decoder, usually 1).
        eos_token_id: The token, or tokens, that end a sequence.
        pad_token_id: What `generate` writes after the end, if something else.
        subset: Which leaves each request may be answered with, from `ItemTrie.subset`; rows of `input_ids` are then
            its B requests times an equal number of beams, the beams of a request side by side.

    Raises:
        SettingsError: Trie and vocabulary have different codebook sizes, a negative prompt length, no end-of-sequence
            token, or an end or padding token that is the token of a code.
    """

    def __init__(
        self,
        trie: ItemTrie,
        vocabulary: CodeVocabulary,
        prompt_length: int,
        *,
        eos_token_id: int | Sequence[int],
        pad_token_id: int | None = None,
        subset: LeafSubset | None = None,
    ):
        check_same_codes(trie, vocabulary)
        if prompt_length < 0:
            raise SettingsError(f"prompt_length is {prompt_length}; it is a number of tokens")
        eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
        if not eos:
            raise SettingsError("the processor needs an end-of-sequence token: rows without a possible item end by it")
        ends = list(dict.fromkeys(eos if pad_token_id is None else [*eos, pad_token_id]))
        codes = range(vocabulary.first_token_id, vocabulary.first_token_id + vocabulary.num_tokens)
        if any(token in codes for token in ends):
            raise SettingsError(
                f"the tokens {ends} end or pad a sequence, but {codes.start} to {codes.stop - 1} are the codes"
            )
        self.trie = trie
        self.prompt_length = prompt_length
        self.subset = subset
        self._level_starts = [vocabulary.first_token_id + int(offset) for offset in vocabulary.level_offsets]
        self._width_needed = max(codes.stop, *(token + 1 for token in ends))
        # Made once: a tensor made from Python numbers in each step would be a copy to the device.
        self._first_tokens = torch.tensor(self._level_starts, device=trie.device)
        self._eos_tokens = torch.tensor(eos, device=trie.device)
        self._end_tokens = torch.tensor(ends, device=trie.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Masks one step.

        Args:
            input_ids: int64 [R, T], prompt and what was generated.
            scores: [R, V], logits or log-probabilities of the next token.

        Returns:
            [R, V] of the type of `scores`, which stay as they are.

        Raises:
            SettingsError: The rows are shorter than the prompt, no multiple of the number of requests, on another
                device than the trie, or V is too small for the codes and the end tokens.
        """
        self._check(input_ids, scores)
        step = input_ids.shape[1] - self.prompt_length
        masked = torch.full_like(scores, -torch.inf)
        if step >= self.trie.num_levels:
            ends = self._eos_tokens if step == self.trie.num_levels else self._end_tokens
            return masked.index_copy_(1, ends, _finite(scores.index_select(1, ends)))

        first, size = self._level_starts[step], self.trie.codebook_sizes[step]
        nodes, exists = self.trie.walk(input_ids[:, self.prompt_length :] - self._first_tokens[:step])
        allowed = self.trie.allowed_codes(step, nodes, self.subset) & exists.unsqueeze(1)  # [R, K]
        of_level = scores[:, first : first + size].masked_fill(~allowed, -torch.inf)
        masked[:, first : first + size] = of_level
        has_item = ~of_level.isneginf().all(dim=1, keepdim=True)
        end = _finite(scores.index_select(1, self._eos_tokens)).masked_fill(has_item, -torch.inf)
        return masked.index_copy_(1, self._eos_tokens, end)

    def _check(self, input_ids: Tensor, scores: Tensor) -> None:
        """All of shapes and devices: nothing is read from the tensors."""
        if scores.device != self.trie.device:
            raise SettingsError(
                f"the logits are on {scores.device}, the trie of the processor on {self.trie.device}; make the"
                " processor with trie.to(device) (and subset.to(device))"
            )
        if input_ids.shape[1] < self.prompt_length:
            raise SettingsError(
                f"rows of {input_ids.shape[1]} tokens are shorter than the prompt ({self.prompt_length}); it counts"
                " the padding, and an assistant model must share the text tokenizer"
            )
        requests = None if self.subset is None else self.subset.num_requests
        if requests is not None and len(input_ids) % requests:
            raise SettingsError(f"{len(input_ids)} rows can't be divided among the {requests} requests of the subset")
        if scores.shape[1] < self._width_needed:
            raise SettingsError(
                f"the model has {scores.shape[1]} logits, codes and end tokens reach up to token"
                f" {self._width_needed - 1}; model, and assistant model if there is one, need the code tokens"
            )


def _finite(scores: Tensor) -> Tensor:
    """Scores of end tokens, at least the type's smallest number: a row that may only end must have a way to go."""
    return scores.clamp(min=torch.finfo(scores.dtype).min)


def check_same_codes(trie: ItemTrie, vocabulary: CodeVocabulary) -> None:
    """Refuses a trie and a vocabulary of different codes.

    Raises:
        SettingsError: Their codebook sizes differ.
    """
    if trie.codebook_sizes != vocabulary.codebook_sizes:
        raise SettingsError(
            f"the trie has codebooks of sizes {trie.codebook_sizes}, the vocabulary {vocabulary.codebook_sizes}: they"
            " belong to different semantic IDs"
        )
