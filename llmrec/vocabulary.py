"""Code tokens in an LLM's vocabulary, and the embedding and head rows they need.

The codes of the items become tokens of the text tokenizer: a contiguous run of IDs that starts at `len(tokenizer)`.
Their rows are parameters of their own. The base embedding matrix is not resized, not copied at each forward, not
trained and not saved: the class of the model's embedding (and of its head) is swapped for a subclass of the same type
that adds one parameter, `new_rows`, and leaves the names of all others alone. Where embedding and head are tied, so
are the new rows, through transformers' own list of tied weights, because `tie_weights()` is called again by loading,
resizing and sharding code. So are those of an encoder-decoder model of the T5 family, which holds one matrix in three
embeddings (`shared`, the encoder's, the decoder's) and, where it is tied, in the head.

In Qwen the embedding matrix is longer than its tokenizer, so the code IDs lie *inside* the base matrix. The row of a
token is therefore its ID minus the first code ID, and nothing here compares IDs with the number of base rows.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmrec.errors import SettingsError
from llmrec.item_tokenizers.semantic_ids import code_token
from llmrec.processes import gathered


@dataclass(frozen=True)
class CodeVocabulary:
    """Where the codes of each level stand among the token IDs.

    Attributes:
        codebook_sizes: K of each of the L levels.
        first_token_id: Token ID of code 0 of level 0; the others follow, level after level.
    """

    codebook_sizes: tuple[int, ...]
    first_token_id: int

    @property
    def num_levels(self) -> int:
        """L."""
        return len(self.codebook_sizes)

    @property
    def num_tokens(self) -> int:
        """Number of code tokens: the sum of all codebook sizes."""
        return sum(self.codebook_sizes)

    @cached_property
    def level_offsets(self) -> np.ndarray:
        """int64 [L]: row of each level's code 0 among the code tokens."""
        return np.concatenate([[0], np.cumsum(self.codebook_sizes[:-1])]).astype(np.int64)

    @cached_property
    def tokens(self) -> list[str]:
        """Texts of all code tokens, in the order of their IDs: `<a_0>`, `<a_1>`, ..., `<b_0>`, ..."""
        return [code_token(level, code) for level, size in enumerate(self.codebook_sizes) for code in range(size)]

    def token_ids(self, codes: np.ndarray) -> np.ndarray:
        """Token IDs, int64 [..., L], of codes [..., L]."""
        return np.asarray(codes, dtype=np.int64) + (self.first_token_id + self.level_offsets)

    def codes(self, token_ids: np.ndarray) -> np.ndarray:
        """Codes, int64 [..., L], of token IDs [..., L]; the inverse of `token_ids`."""
        return np.asarray(token_ids, dtype=np.int64) - (self.first_token_id + self.level_offsets)

    @classmethod
    def add_to(cls, text_tokenizer: PreTrainedTokenizerBase, codebook_sizes: Sequence[int]) -> "CodeVocabulary":
        """Adds all codes of all levels to a text tokenizer, which changes.

        Raises:
            SettingsError: The tokenizer knows some of the code tokens already, or puts them elsewhere.
        """
        vocabulary = cls(tuple(int(size) for size in codebook_sizes), len(text_tokenizer))
        known = text_tokenizer.get_vocab()
        present = [token for token in vocabulary.tokens if token in known]
        if present:
            raise SettingsError(
                f"the text tokenizer already holds {len(present)} of the {vocabulary.num_tokens} code tokens (first"
                f" {present[0]}); start from the tokenizer of the base model"
            )
        text_tokenizer.add_tokens(vocabulary.tokens)
        vocabulary._check(text_tokenizer)
        return vocabulary

    @classmethod
    def from_tokenizer(
        cls, text_tokenizer: PreTrainedTokenizerBase, codebook_sizes: Sequence[int]
    ) -> "CodeVocabulary":
        """Finds the codes in a text tokenizer that `add_to` once extended.

        Raises:
            SettingsError: They aren't there, or not as one run of IDs.
        """
        first = text_tokenizer.get_vocab().get(code_token(0, 0))
        if first is None:
            raise SettingsError(f"the text tokenizer holds no code token {code_token(0, 0)}")
        vocabulary = cls(tuple(int(size) for size in codebook_sizes), first)
        vocabulary._check(text_tokenizer)
        return vocabulary

    def _check(self, text_tokenizer: PreTrainedTokenizerBase) -> None:
        found = np.asarray(text_tokenizer.convert_tokens_to_ids(self.tokens))
        expected = self.first_token_id + np.arange(self.num_tokens)
        if not np.array_equal(found, expected):
            row = int(np.flatnonzero(found != expected)[0])
            raise SettingsError(
                f"code token {self.tokens[row]} has ID {found[row]} in the text tokenizer, expected {expected[row]}:"
                f" the tokenizer doesn't belong to codes of sizes {self.codebook_sizes}"
            )


class CodeRows:
    """What the swapped classes share: `new_rows` and where its tokens start.

    Attributes:
        new_rows: Parameter float32 [n, D], row i belongs to token `first_token_id + i`. Empty outside of forwards
            where ZeRO-3 has shared it out.
        first_token_id: Token ID of the first code.
        num_codes: n.
    """

    new_rows: nn.Parameter
    first_token_id: int
    num_codes: int


class CodeEmbedding(CodeRows, nn.Embedding):
    """An embedding whose code tokens are looked up in `new_rows`."""

    def forward(self, input: Tensor) -> Tensor:
        """Vectors [..., D] of token IDs [...]."""
        rows = input - self.first_token_id
        is_code = (rows >= 0) & (rows < self.num_codes)
        base = super().forward(input.masked_fill(is_code, 0))
        code = F.embedding(rows.clamp(0, self.num_codes - 1), self.new_rows)
        scale = getattr(self, "embed_scale", None)  # Gemma multiplies inside its embedding class
        if scale is not None:
            code = code * scale.to(code.dtype)
        return torch.where(is_code.unsqueeze(-1), code.to(base.dtype), base)


class CodeHead(CodeRows, nn.Linear):
    """A language-model head whose code columns come from `new_rows`.

    Its modes are set by `head_mode`, and are part of its own forward, so that engines which gather sharded weights
    around a module's forward (ZeRO-3, FSDP2) see them.
    """

    positions: Tensor | None
    codes_only: bool
    compute: "Callable[[CodeHead, Tensor], Tensor] | None"

    def forward(self, input: Tensor) -> Tensor:
        """Logits of hidden states [..., D].

        Returns:
            [..., V], V = max(base rows, first code ID + n), or [..., n] where only codes are asked for. With
            `positions` set, only the hidden states it marks are read: [number of them, V or n]. With `compute` set,
            whatever it makes of these hidden states.
        """
        if self.positions is not None:
            input = input[self.positions]
        if self.compute is not None:
            return self.compute(self, input)
        code = F.linear(input, self.new_rows.to(input.dtype))
        if self.codes_only:
            return code
        base = super().forward(input)
        code = code.to(base.dtype)
        end = self.first_token_id + self.num_codes
        return torch.cat([base[..., : self.first_token_id], code, base[..., end:]], dim=-1)


@contextmanager
def head_mode(
    model: nn.Module,
    *,
    positions: Tensor | None = None,
    codes_only: bool = False,
    compute: Callable[[CodeHead, Tensor], Tensor] | None = None,
) -> Iterator[None]:
    """Within the block, the model's head reads only some positions, or writes something else than all logits.

    Args:
        model: A model after `add_code_rows`, plain or wrapped by PEFT, DDP, DeepSpeed or FSDP2.
        positions: bool [B, T], the positions whose logits are wanted; the logits are then [number of them, V]. Of an
            encoder-decoder model, T are the decoder's positions.
        codes_only: Leave out the base vocabulary's columns: the last axis has the n code tokens only.
        compute: Called with the head and the hidden states [..., D] in place of computing logits; what it returns
            stands where the logits would. Not for models that change their logits after the head (a softcap).
    """
    head = find_code_head(model)
    before = (head.positions, head.codes_only, head.compute)
    head.positions, head.codes_only, head.compute = positions, codes_only, compute
    try:
        yield
    finally:
        head.positions, head.codes_only, head.compute = before


def find_code_head(model: nn.Module) -> CodeHead:
    """The model's head, through any wrapper.

    Raises:
        SettingsError: The model has no code rows.
    """
    for module in model.modules():
        if isinstance(module, CodeHead):
            return module
    raise SettingsError("the model has no code rows: call add_code_rows(model, vocabulary) first")


def has_code_rows(model: nn.Module) -> bool:
    """Whether `add_code_rows` was called on the model and its rows weren't merged since."""
    return any(isinstance(module, CodeHead) for module in model.modules())


def add_code_rows(
    model: PreTrainedModel, vocabulary: CodeVocabulary, *, init_scale: float = 1.0, seed: int = 0
) -> None:
    """Gives a language model rows for the code tokens. The model changes in place.

    Each row is drawn from a normal distribution with the mean and the standard deviation of the base rows, taken for
    each of the D components: a code token starts as an average token, and no two codes start alike. Rows that start
    equal get equal gradients wherever two codes stand in like places.

    Args:
        model: A model with an embedding and a linear head, tied or not, in full precision or with 4- or 8-bit layers:
            a decoder alone, or an encoder and a decoder that share their embedding (T5, mT5, UMT5, LongT5).
        vocabulary: Where the codes are among the token IDs.
        init_scale: Factor on the standard deviation, 0 for the plain mean.
        seed: Seeds the draw.

    Raises:
        SettingsError: The model has code rows already, or an embedding or head of a kind that can't take them, as BART
            and its kin have.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if has_code_rows(model):
        raise SettingsError("the model has code rows already")
    _check_modules(model, embedding, head, vocabulary)
    embedding, head = cast(nn.Embedding, embedding), cast(nn.Linear, head)
    tied = head.weight is embedding.weight

    generator = torch.Generator().manual_seed(seed)
    rows = _initial_rows(embedding.weight, vocabulary, init_scale, generator)
    embeddings = _embeddings_of(model, embedding.weight)
    for module in embeddings:
        _swap_class(module, CodeEmbedding, vocabulary)
        module.register_parameter("new_rows", rows)
    _swap_class(head, CodeHead, vocabulary)
    code_head = cast(CodeHead, head)
    code_head.positions, code_head.codes_only, code_head.compute = None, False, None
    if not tied:
        _keep_untied(model, head)
        rows = _initial_rows(head.weight, vocabulary, init_scale, generator)
    head.register_parameter("new_rows", rows)
    _tie_rows(model, embedding, [*embeddings, head] if tied else embeddings)
    model.config.get_text_config().vocab_size = output_width(model)


def _check_modules(model: PreTrainedModel, embedding: Any, head: Any, vocabulary: CodeVocabulary) -> None:
    name = type(model).__name__
    if not isinstance(embedding, nn.Embedding) or type(embedding).__name__ not in _EMBEDDING_CLASSES:
        raise SettingsError(f"{name} has an embedding of class {type(embedding).__name__}, which can't take code rows")
    if type(head) is not nn.Linear:
        raise SettingsError(f"{name} has a head of class {type(head).__name__}; code rows need a plain linear head")
    if vocabulary.first_token_id > embedding.num_embeddings:
        raise SettingsError(
            f"the first code token has ID {vocabulary.first_token_id}, but {name} has only {embedding.num_embeddings}"
            " rows: the text tokenizer belongs to another model"
        )
    if model.config.is_encoder_decoder:
        _check_encoder_decoder(model, embedding, name)


def _check_encoder_decoder(model: Any, embedding: nn.Embedding, name: str) -> None:
    if hasattr(model, "final_logits_bias"):
        raise SettingsError(
            f"{name} adds a bias to its logits outside the head, which has no place for codes: take a model of the T5"
            " family or a decoder alone"
        )
    if model.config.decoder_start_token_id is None:
        raise SettingsError(
            f"{name} has no token that starts its decoder: set config.decoder_start_token_id (T5's is its padding"
            " token)"
        )
    parts = (model.get_encoder(), model.get_decoder())
    if any(part.get_input_embeddings().weight is not embedding.weight for part in parts):
        raise SettingsError(
            f"encoder and decoder of {name} have embeddings of their own; code rows need one that both share, as T5's"
        )


def _embeddings_of(model: nn.Module, weight: Tensor) -> list[nn.Embedding]:
    """All embeddings that hold this matrix: one, or three in a T5 whose embedding was never resized."""
    return [module for module in model.modules() if isinstance(module, nn.Embedding) and module.weight is weight]


def _tie_rows(model: PreTrainedModel, source: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Puts the rows of `modules` into the model's lists of tied weights, as ties to those of `source`."""
    names = {module: name for name, module in model.named_modules()}
    keys = {f"{names[module]}.new_rows": f"{names[source]}.new_rows" for module in modules if module is not source}
    if keys:
        model._tied_weights_keys = {**(model._tied_weights_keys or {}), **keys}
        model.all_tied_weights_keys = {**model.all_tied_weights_keys, **keys}


def _keep_untied(model: PreTrainedModel, head: nn.Module) -> None:
    """Takes a head with weights of its own out of the model's list of ties.

    A T5 always says that it ties its head. Where a checkpoint holds other weights for it (T5 1.1, mT5, FLAN), loading
    leaves it untied (seen in transformers 5.17 to 5.23), but the next `tie_weights()` would not.
    """
    if model.config.is_encoder_decoder and model._tied_weights_keys:
        key = next(f"{name}.weight" for name, module in model.named_modules() if module is head)
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            kept = {target: source for target, source in getattr(model, attribute).items() if target != key}
            setattr(model, attribute, kept)


# Embedding classes whose forward is a lookup, times `embed_scale` where they have one.
_EMBEDDING_CLASSES = {"Embedding", "GemmaTextScaledWordEmbedding", "Gemma2TextScaledWordEmbedding"} | {
    "Gemma3TextScaledWordEmbedding"
}


def _swap_class(module: nn.Module, mixin: type[CodeRows], vocabulary: CodeVocabulary) -> None:
    base = type(module)
    module.__class__ = mixin if base in mixin.__mro__ else type(f"Code{base.__name__}", (mixin, base), {})
    rows = cast(CodeRows, module)
    rows.first_token_id, rows.num_codes = vocabulary.first_token_id, vocabulary.num_tokens


def _initial_rows(
    weight: Tensor, vocabulary: CodeVocabulary, scale: float, generator: torch.Generator
) -> nn.Parameter:
    """Rows float32 [n, D] on the device of `weight`: as trained weights they keep full precision, as LoRA's do."""
    with gathered([cast(nn.Parameter, weight)]):
        base = weight.detach()[: vocabulary.first_token_id].float().cpu()
        mean, deviation = base.mean(dim=0), base.std(dim=0)
    noise = torch.randn(vocabulary.num_tokens, len(mean), generator=generator)
    rows = mean + scale * deviation * noise
    return nn.Parameter(rows.to(weight.device))


def output_width(model: PreTrainedModel) -> int:
    """V: the number of logits of a model with code rows, max(base rows, first code ID + n)."""
    embedding = cast(CodeEmbedding, model.get_input_embeddings())
    return max(embedding.num_embeddings, embedding.first_token_id + embedding.num_codes)


def code_row_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters `new_rows` of embedding and head: one where they are tied, else two."""
    found = {id(module.new_rows): module.new_rows for module in model.modules() if isinstance(module, CodeRows)}
    return list(found.values())


def merge_code_rows(model: PreTrainedModel) -> None:
    """Writes the new rows into the base matrices, which makes the model a plain transformers model again.

    The matrices grow to V rows, and never shrink: a Qwen matrix keeps its 151,936 rows if the codes fit inside.
    Works on a model without LoRA layers: merge those first.

    Raises:
        SettingsError: The model has no code rows.
    """
    head, width = cast(Any, find_code_head(model)), output_width(model)
    first, end = head.first_token_id, head.first_token_id + head.num_codes
    grown: dict[int, nn.Parameter] = {}  # by the matrix that each stands for: modules that shared one share the other
    for module in [cast(Any, module) for module in model.modules() if isinstance(module, CodeRows)]:
        matrix = id(module.weight)
        if matrix not in grown:
            grown[matrix] = _grown(module.weight, module.new_rows, first, width)
        module.weight = grown[matrix]
        setattr(module, "out_features" if module is head else "num_embeddings", width)
        del module._parameters["new_rows"]
        del module.first_token_id, module.num_codes
        module.__class__ = next(base for base in type(module).__mro__ if not issubclass(base, CodeRows))
    if head.bias is not None:
        bias = F.pad(head.bias.detach(), (0, width - head.bias.shape[0]))
        bias[first:end] = 0  # code columns have none
        head.bias = nn.Parameter(bias, requires_grad=head.bias.requires_grad)
    del head.positions, head.codes_only, head.compute
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        keys = getattr(model, attribute, None) or {}
        setattr(model, attribute, {key: value for key, value in keys.items() if not key.endswith(".new_rows")})
    model.config.get_text_config().vocab_size = width


def _grown(weight: nn.Parameter, new_rows: Tensor, first: int, width: int) -> nn.Parameter:
    """The base matrix with V rows, those of the codes in their places."""
    grown = weight.new_zeros(width, weight.shape[1])
    grown[: weight.shape[0]] = weight.detach()
    grown[first : first + new_rows.shape[0]] = new_rows.detach().to(weight.dtype)
    return nn.Parameter(grown, requires_grad=weight.requires_grad)
