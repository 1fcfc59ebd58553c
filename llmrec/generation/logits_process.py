"""The trie as a logits processor of transformers' `generate`.

For any decoding mode of `generate`; llmrec's own search (`beam_search.py`) doesn't need it. The processor keeps no
state between steps: it reads the prefix out of `input_ids`, so reordered beams, a second call or steps after a row has
finished can't confuse it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from llmrec.errors import SettingsError
from llmrec.generation.trie import ItemTrie
from llmrec.vocabulary import CodeVocabulary


class TrieLogitsProcessor(LogitsProcessor):
    """Allows only tokens that lead to an item: all others get -inf.

    At step t the codes that may follow the row's t codes keep their scores. After all L codes only end-of-sequence is
    allowed, and after that end-of-sequence or padding. Padding on the left of the prompt is never looked at, so it may
    be the same token as end-of-sequence. A row that no item is left for (all are denied; a dead beam that `generate`
    filled with arbitrary tokens) may only end, at once. Beams that `generate` has to fill although there are too few
    items carry scores of -1e9 or -inf, and are for the caller to drop.

    Args:
        trie: On the device of the logits.
        vocabulary: Token IDs of the codes; of the same codebook sizes.
        prompt_length: Number of tokens of `input_ids` before the first code, padding included (for an encoder-decoder
            model those of the decoder, usually 1).
        eos_token_id: The token, or tokens, that end a sequence.
        pad_token_id: What `generate` writes after the end, if something else.
        denied: Leaves that may not be generated, int64 [B, D] from `ItemTrie.denied_leaves`; rows of `input_ids` are
            then B requests times an equal number of beams, the beams of a request side by side.

    Raises:
        SettingsError: Trie and vocabulary have different codebook sizes, or there is no end-of-sequence token.
    """

    def __init__(
        self,
        trie: ItemTrie,
        vocabulary: CodeVocabulary,
        prompt_length: int,
        *,
        eos_token_id: int | Sequence[int],
        pad_token_id: int | None = None,
        denied: Tensor | None = None,
    ):
        check_same_codes(trie, vocabulary)
        self.trie = trie
        self.vocabulary = vocabulary
        self.prompt_length = prompt_length
        self.eos_token_ids = (
            [eos_token_id] if isinstance(eos_token_id, int) else [int(token) for token in eos_token_id]
        )
        if not self.eos_token_ids:
            raise SettingsError("the processor needs an end-of-sequence token: rows without a possible item end by it")
        self.end_token_ids = self.eos_token_ids + ([] if pad_token_id is None else [pad_token_id])
        self.denied = denied

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Masks one step.

        Args:
            input_ids: int64 [R, T], prompt and what was generated.
            scores: [R, V], logits or log-probabilities of the next token.

        Returns:
            [R, V] of the type of `scores`.

        Raises:
            SettingsError: The rows are shorter than the prompt, no multiple of the number of requests, or V is too
                small for the codes.
        """
        trie, vocabulary = self.trie, self.vocabulary
        step = input_ids.shape[1] - self.prompt_length
        if step < 0:
            raise SettingsError(
                f"rows of {input_ids.shape[1]} tokens are shorter than the prompt ({self.prompt_length})"
            )
        if self.denied is not None and len(input_ids) % len(self.denied):
            raise SettingsError(f"{len(input_ids)} rows can't be divided among {len(self.denied)} requests")
        masked = torch.full_like(scores, -torch.inf)
        if step >= trie.num_levels:
            ends = self.eos_token_ids if step == trie.num_levels else self.end_token_ids
            masked[:, ends] = scores[:, ends]
            return masked

        size = trie.codebook_sizes[step]
        first = vocabulary.first_token_id + int(vocabulary.level_offsets[step])
        if first + size > scores.shape[1]:
            raise SettingsError(
                f"the model has {scores.shape[1]} logits, the codes reach up to token {first + size - 1}"
            )
        offsets = torch.from_numpy(vocabulary.level_offsets[:step] + vocabulary.first_token_id).to(input_ids.device)
        nodes, exists = trie.walk(input_ids[:, self.prompt_length :] - offsets)
        children = trie.children(step, nodes)
        valid = children.valid & exists.unsqueeze(1)
        if self.denied is not None:
            valid = valid & trie.has_items_left(step, nodes, self.denied)
        allowed = torch.zeros(len(scores), size + 1, dtype=torch.bool, device=scores.device)
        allowed.scatter_(1, children.codes.masked_fill(~valid, size), True)  # column `size` takes what isn't valid
        masked[:, first : first + size] = scores[:, first : first + size].masked_fill(~allowed[:, :size], -torch.inf)
        dead = ~valid.any(dim=1, keepdim=True)
        masked[:, self.eos_token_ids] = torch.where(dead, scores[:, self.eos_token_ids], -torch.inf)
        return masked


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
