"""Where the rows of the code tokens start: at the mean of the base rows, at titles, or at codebook vectors.

Adapters with new tokens learn nothing useful unless their rows are trained (`llmrec.vocabulary` sees to that); how
they should start was asked in MiniOneRec's tracker (#51) and not answered. Three answers:

- "mean": the mean of the base rows with noise of their deviation. `add_code_rows` does it; nothing to do here.
- "titles": the row of a code is the mean, over the items that carry the code, of what their titles' tokens have in the
  base matrix. A code starts where the words of its items are.
- "codebook": a ridge regression from the code vectors of an item to the same title means. Code vectors that lie close
  start as rows that lie close, and codes that no titled item carries get a row that fits the others.

The functions take a matrix and arrays and know no model; `initialize_rows` and `set_rows` put their results into one.
Embedding and head are treated alike, each by its own matrix where they aren't tied.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llmrec.errors import SettingsError
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.vocabulary import CodeVocabulary, find_code_head

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrec.item_tokenizers.base import ItemTokenizer

logger = logging.getLogger(__name__)

CODE_INITS = ("mean", "titles", "codebook")
NOISE = 0.1
"""Noise of "titles" and "codebook", as a part of that of "mean": it tells apart codes of the same items, and stays
below what their titles say (a mean over many titles deviates from the mean of all rows by far less than one row)."""
REGRESSION_ITEMS = 65_536
PENALTIES = tuple(10.0**power for power in range(-4, 4))
_TITLE_BLOCK = 4096


def check_code_init(
    method: str,
    codes: SemanticIds,
    *,
    titles: Sequence[str | None] | None = None,
    item_tokenizer: "ItemTokenizer | None" = None,
) -> None:
    """Refuses a start that lacks what it is made from, before a model is loaded.

    Raises:
        SettingsError: No such method; no titles; an item tokenizer without codebooks, or none at all.
    """
    if method not in CODE_INITS:
        raise SettingsError(f"code_init is {method!r}; choose one of {CODE_INITS}")
    if method == "mean":
        return
    if titles is None or not any(titles):
        raise SettingsError(f"code_init {method!r} starts from titles, and no item has one: set code_init to 'mean'")
    if len(titles) != codes.num_items:
        raise SettingsError(f"{len(titles)} titles were given for {codes.num_items} items: they must be in one order")
    if method == "codebook" and (item_tokenizer is None or not item_tokenizer.code_vectors()):
        what = "no item tokenizer is known" if item_tokenizer is None else f"{type(item_tokenizer).__name__} has none"
        raise SettingsError(
            f"code_init 'codebook' starts from codebook vectors, and {what}: codes read from an index file come"
            " without them. Set code_init to 'titles' or 'mean', or fit the item tokenizer here"
        )


def initialize_rows(
    model: Any,
    method: str,
    *,
    vocabulary: CodeVocabulary,
    codes: np.ndarray,
    text_tokenizer: "PreTrainedTokenizerBase",
    titles: Sequence[str | None] | None = None,
    item_tokenizer: "ItemTokenizer | None" = None,
    init_scale: float = 1.0,
    seed: int = 0,
) -> None:
    """Overwrites the rows of a model with those of "titles" or "codebook"; "mean" leaves them.

    A code that the method says nothing about (of no titled item; of a level that only counts equal codes) keeps the
    row it has.

    Args:
        model: After `add_code_rows`.
        method: One of `CODE_INITS`.
        vocabulary: Where the codes are among the token IDs.
        codes: int [N, L] of all items.
        text_tokenizer: Of the base model.
        titles: N titles, None or "" where an item has none.
        item_tokenizer: What made the codes, with codebooks; for "codebook".
        init_scale: Noise is `NOISE` times this times the standard deviation of the base rows, per component. At 0
            codes of the same items start alike, and stay alike for as long as they get the same gradients.
        seed: Of the noise.
    """
    if method == "mean":
        return
    token_ids = title_token_ids(text_tokenizer, titles or [None] * len(codes))
    embedding, head = model.get_input_embeddings(), find_code_head(model)
    found = []
    for number, module in enumerate([embedding] if head.weight is embedding.weight else [embedding, head]):
        base = module.weight.detach()[: vocabulary.first_token_id]
        means, has_title = item_title_means(base, token_ids)
        if method == "titles":
            rows, known = title_rows(means, has_title, codes, vocabulary)
        else:
            vectors = item_tokenizer.code_vectors() if item_tokenizer is not None else ()
            rows, known = codebook_rows(means, has_title, codes, vocabulary, vectors, seed=seed)
        rows = rows + init_scale * NOISE * _noise(base, len(rows), seed=seed, stream=number)
        found.append(torch.where(known.unsqueeze(1), rows, module.new_rows.detach().float().cpu()))
        logger.info("code_init %s: %d of %d rows of matrix %d", method, int(known.sum()), len(rows), number + 1)
    set_rows(model, *found)


def set_rows(model: Any, embedding_rows: Tensor, head_rows: Tensor | None = None) -> None:
    """Overwrites the rows of the code tokens.

    Args:
        model: After `add_code_rows`.
        embedding_rows: float [n, D].
        head_rows: float [n, D], of a head that isn't tied to the embedding; None where it is.

    Raises:
        SettingsError: Rows of another shape; head rows for a tied head, or none for another.
    """
    embedding, head = model.get_input_embeddings(), find_code_head(model)
    tied = head.new_rows is embedding.new_rows
    if tied is not (head_rows is None):
        state, wanted = ("tied to its embedding", "none") if tied else ("a matrix of its own", "rows for it")
        raise SettingsError(f"the model's head is {state}: give {wanted}")
    with torch.no_grad():
        for module, rows in ((embedding, embedding_rows), (head, head_rows)):
            if rows is None:
                continue
            if rows.shape != module.new_rows.shape:
                raise SettingsError(
                    f"rows of shape {list(rows.shape)} were given, the model's have {list(module.new_rows.shape)}"
                )
            module.new_rows.copy_(rows)


def title_token_ids(text_tokenizer: "PreTrainedTokenizerBase", titles: Sequence[str | None]) -> list[list[int]]:
    """Token IDs of each title, without start and end tokens; empty where there is no title."""
    texts = [(title or "").strip() for title in titles]
    found: list[list[int]] = []
    for start in range(0, len(texts), _TITLE_BLOCK):
        block = texts[start : start + _TITLE_BLOCK]
        found += text_tokenizer(block, add_special_tokens=False)["input_ids"]
    return found


def item_title_means(base: Tensor, token_ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Mean of the base rows of each title's tokens.

    Args:
        base: float [V, D], rows of the text tokens.
        token_ids: Of each of N titles; token IDs below V, empty where there is no title.

    Returns:
        float32 [N, D] on the CPU, 0 where there is no title, and bool [N], where there is one.
    """
    lengths = torch.tensor([len(ids) for ids in token_ids])
    flat = torch.tensor([token for ids in token_ids for token in ids], dtype=torch.int64)
    offsets = lengths.cumsum(0) - lengths
    used, places = flat.unique(return_inverse=True)  # the whole matrix in float32 would be some gigabytes
    rows = base[used.to(base.device)].float().cpu()
    return torch.nn.functional.embedding_bag(places, rows, offsets, mode="mean"), lengths > 0  # an empty bag is 0


def title_rows(
    means: Tensor, has_title: Tensor, codes: np.ndarray, vocabulary: CodeVocabulary
) -> tuple[Tensor, Tensor]:
    """Row of a code: mean, over the titled items that carry it, of their title means. Each item counts once.

    Args:
        means: float32 [N, D] of `item_title_means`.
        has_title: bool [N].
        codes: int [N, L].
        vocabulary: Of the codes.

    Returns:
        float32 [n, D], and bool [n]: codes of one titled item or more; the other rows are 0.
    """
    places = torch.from_numpy(np.asarray(codes, dtype=np.int64) + vocabulary.level_offsets)[has_title]  # [M, L]
    sums = torch.zeros(vocabulary.num_tokens, means.shape[1], dtype=torch.float64)
    for level in range(vocabulary.num_levels):
        sums.index_add_(0, places[:, level], means[has_title].double())
    counts = torch.bincount(places.flatten(), minlength=vocabulary.num_tokens)
    return (sums / counts.clamp(min=1).unsqueeze(1)).float(), counts > 0


def codebook_rows(
    means: Tensor,
    has_title: Tensor,
    codes: np.ndarray,
    vocabulary: CodeVocabulary,
    code_vectors: Sequence[np.ndarray],
    *,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Rows of codes from their codebook vectors, by a ridge regression fitted to the titles.

    An item is quantised to the sum of its L code vectors, so title mean t and code vectors e_1, ..., e_L of the items
    with a title give t ≈ b + W (e_1 + ... + e_L), with the penalty on W that leaves titles out best (of eight, by
    generalised cross-validation). The row of a code is b + L W e: the mean of an item's L rows is then what the
    regression says about its title, and its first codes, whose vectors are longest, tell most of it.

    Args:
        means: float32 [N, D] of `item_title_means`.
        has_title: bool [N]; of more than 65,536 titled items as many are drawn.
        codes: int [N, L], or one level more: the last then counts items with equal codes, and has no vectors.
        vocabulary: Of the codes.
        code_vectors: Of each level float32 [K_l, d].
        seed: Of that draw.

    Returns:
        float32 [n, D], and bool [n]: which codes have a vector; the other rows are 0.

    Raises:
        SettingsError: The codebooks have other sizes than the codes.
    """
    from sklearn.linear_model import RidgeCV

    levels = len(code_vectors)
    sizes = tuple(len(vectors) for vectors in code_vectors)
    if sizes != vocabulary.codebook_sizes[:levels]:
        raise SettingsError(f"the codebooks have {sizes} vectors, the codes {vocabulary.codebook_sizes}: fit again")
    items = np.flatnonzero(has_title.numpy())
    if len(items) > REGRESSION_ITEMS:
        items = np.sort(np.random.default_rng(seed).choice(items, REGRESSION_ITEMS, replace=False))
    sums = np.zeros((len(items), code_vectors[0].shape[1]))
    for level, vectors in enumerate(code_vectors):
        sums += vectors[codes[items, level]]
    scale = float(sums.std(axis=0).mean()) or 1.0  # the penalties are in units of the spread of the vectors
    # Penalties grow with the number of items, as the sums of squares that they stand beside do.
    ridge = RidgeCV(alphas=[len(items) * penalty for penalty in PENALTIES])
    ridge.fit(sums / scale, means.numpy()[items])
    slopes = np.atleast_2d(ridge.coef_)  # [D, d]
    rows = torch.zeros(vocabulary.num_tokens, means.shape[1])
    known = torch.zeros(vocabulary.num_tokens, dtype=torch.bool)
    for level, vectors in enumerate(code_vectors):
        first = int(vocabulary.level_offsets[level])
        values = ridge.intercept_ + levels * (vectors / scale) @ slopes.T
        rows[first : first + len(vectors)] = torch.from_numpy(np.asarray(values, dtype=np.float32))
        known[first : first + len(vectors)] = True
    logger.info("codebook regression on %d items, penalty %g", len(items), ridge.alpha_ / len(items))
    return rows, known


def _noise(base: Tensor, count: int, *, seed: int, stream: int) -> Tensor:
    """Standard normal draws times the deviation of the base rows, float32 [count, D]; each stream has its own."""
    draw = int(np.random.default_rng([seed, stream]).integers(2**62))
    noise = torch.randn(count, base.shape[1], generator=torch.Generator().manual_seed(draw))
    return noise * base.float().cpu().std(dim=0)
