"""LETTER's ranking-guided generation loss, as pure functions on logits.

Wang et al., "Learnable Item Tokenization for Generative Recommendation", CIKM 2024 (LETTER): cross-entropy of the
target identifier's tokens with logits divided by a temperature tau. A tau below 1 gives wrong tokens of high score
more weight; at tau = 1 it is ordinary cross-entropy. The paper normalises over the whole vocabulary, at every token of
the target; the authors' released script runs it at tau = 1.

Here a loss is computed at target positions only (logits of other positions never exist), and the set it is normalised
over, its *scope*, has a name:

* `vocabulary`: all tokens of the model, as in the paper;
* `codes`: all codes of the target's level;
* `trie`: the codes that some item of the catalogue has there, given the target's codes before. It is what constrained
  decoding chooses among, so no probability is spent on codes that can't be generated. Ours, not the paper's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from llmrec.generation.trie import ItemTrie
from llmrec.tasks.base import IGNORED


def target_positions(labels: Tensor, *, encoder_decoder: bool = False) -> Tensor:
    """Positions whose output predicts a target.

    Args:
        labels: int64 [B, T], not shifted, -100 where nothing is learned.
        encoder_decoder: Whether the decoder reads the targets one place later, so that position t predicts label t. In
            a decoder-only model it predicts label t + 1.

    Returns:
        bool [B, T]; the last position of a row of a decoder-only model predicts nothing and is False.
    """
    if encoder_decoder:
        return labels != IGNORED
    positions = torch.zeros_like(labels, dtype=torch.bool)
    positions[:, :-1] = labels[:, 1:] != IGNORED
    return positions


def target_tokens(labels: Tensor, *, encoder_decoder: bool = False) -> Tensor:
    """Tokens to be predicted at `target_positions(labels)`, row by row: int64 [number of targets]."""
    shifted = labels if encoder_decoder else labels[:, 1:]
    return shifted[shifted != IGNORED]


def ranking_guided_loss(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, allowed: Tensor | None = None
) -> Tensor:
    """LETTER's ranking-guided loss of each target token (methods 2.6: -log P_tau(y_t | y_<t, x)).

    At temperature 1 and without `allowed` it equals `cross_entropy(logits, targets, reduction="none")`.

    Args:
        logits: [M, V], any floating type; the softmax is computed in float32.
        targets: int64 [M], columns of `logits`.
        temperature: tau > 0. LETTER sweeps 0.7 to 1.2 (Instruments, T5); its scripts use 1.
        allowed: bool [M, V], the columns of each row's softmax; the target must be among them. All by default.

    Returns:
        float32 [M], in nats.
    """
    scaled = logits.float() if temperature == 1.0 else logits.float() / temperature
    if allowed is not None:
        scaled = scaled.masked_fill(~allowed, float("-inf"))
    return F.cross_entropy(scaled, targets, reduction="none")


def code_losses(
    logits: Sequence[Tensor], codes: Tensor, *, temperature: float = 1.0, trie: ItemTrie | None = None
) -> Tensor:
    """The ranking-guided loss of whole items in the scopes `codes` and `trie`.

    Args:
        logits: Of each of the L levels, [items, K of that level].
        codes: int64 [items, L], the targets.
        temperature: tau > 0.
        trie: The items, on the device of the logits, for the scope `trie`; None for the scope `codes`.

    Returns:
        float32 [items, L], in nats.
    """
    nodes = torch.zeros(len(codes), dtype=torch.int64, device=codes.device)
    losses = []
    for level, (of_level, targets) in enumerate(zip(logits, codes.unbind(dim=1), strict=True)):
        allowed = None if trie is None else trie.allowed_codes(level, nodes)
        losses.append(ranking_guided_loss(of_level, targets, temperature=temperature, allowed=allowed))
        if trie is not None:
            nodes, _ = trie.child(level, nodes, targets)
    return torch.stack(losses, dim=1)
