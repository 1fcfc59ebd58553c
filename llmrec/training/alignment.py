"""ETEGRec's two alignments of item tokenizer and recommender, as pure functions on vectors.

Liu et al., "Generative Recommender with End-to-End Learnable Item Tokenization" (ETEGRec, arXiv 2409.05546):

* sequence-item alignment (SIA, equations 6 to 8): the codes that the tokenizer reads out of the recommender's summary
  of a history are those of the item that came next;
* preference-semantic alignment (PSA, equation 9): the state from which the recommender writes the next item is like
  the tokenizer's reconstruction of that item, and unlike those of the other items of the batch.

Where the authors' released code departs from the paper, the paper's form is the default and the code's an option:

* the code feeds *positive* squared distances to the softmax of SIA, so that far codes are likely. The paper's
  equation 6 has the minus (`distance_sign`). In front of the sum of divergences the paper prints a minus that the code
  doesn't have; minimising needs it to be absent, as it is here;
* the code takes the straight-through value off the residual, with which the gradient of every level but the first is
  exactly 0 in both networks. The paper's recursion takes the code vector off, so that all levels teach (`recursion`).

One thing follows the code: the divergence is a mean over levels, where the paper writes a sum. The published weights
were tuned with that mean.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmrec.item_tokenizers.quantizers import squared_distances

DISTANCE_SIGNS = ("negative", "positive")
RECURSIONS = ("codebook", "straight_through")


class Projections(nn.Module):
    """From states of the recommender to where the item tokenizer's vectors lie: one linear layer each.

    They belong to the recommender: they learn in its epochs, and are frozen in the tokenizer's, as in the released
    code (the paper doesn't say).

    Args:
        state_width: Width of the recommender's states.
        code_width: d, width of latents and code vectors.
        item_width: D, width of reconstructions.
        seed: Seeds the weights: normal with variance 1 / state_width, biases 0.

    Attributes:
        to_codes: Summary of a history to the space of the codes.
        to_items: State before the first code to the space of the items.
    """

    def __init__(self, state_width: int, code_width: int, item_width: int, *, seed: int = 0):
        super().__init__()
        self.to_codes = nn.Linear(state_width, code_width)
        self.to_items = nn.Linear(state_width, item_width)
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.to_codes, self.to_items):
            nn.init.normal_(layer.weight, std=state_width**-0.5, generator=generator)
            nn.init.zeros_(layer.bias)


def code_log_probabilities(
    vectors: Tensor, codebooks: Sequence[Tensor], *, recursion: str = "codebook", distance_sign: str = "negative"
) -> list[Tensor]:
    """Natural log-probability of every code of every level: log softmax_k(-||v_l - e_k||^2).

    v_1 is the vector, v_{l+1} what its nearest code vector of level l leaves of v_l.

    Args:
        vectors: [n, d], any floating type; computed in float32.
        codebooks: Of each level [K_l, d].
        recursion: "codebook" (the paper): v_{l+1} = v_l - e, every level gives a gradient to the vectors, and later
            levels to earlier codebooks. "straight_through" (the released code): v_{l+1} = v_l - (v_l + sg[e - v_l]),
            whose gradient is 0: levels after the first move nothing but their own codebook.
        distance_sign: "negative" (the paper): near codes are likely; "positive" (the released code): far ones.

    Returns:
        Of each level float32 [n, K_l].
    """
    residual = vectors.float()
    levels = []
    for level, codebook in enumerate(codebooks):
        codebook = codebook.float()
        distances = squared_distances(residual, codebook)
        logits = distances if distance_sign == "positive" else -distances
        levels.append(F.log_softmax(logits, dim=1))
        if level + 1 < len(codebooks):
            nearest = F.embedding(distances.argmin(dim=1), codebook)
            if recursion == "straight_through":
                nearest = residual + (nearest - residual).detach()
            residual = residual - nearest
    return levels


def sequence_item_losses(
    of_sequences: Tensor,
    of_items: Tensor,
    codebooks: Sequence[Tensor],
    *,
    recursion: str = "codebook",
    distance_sign: str = "negative",
) -> Tensor:
    """SIA of each pair: KL(P_item || P_sequence) + KL(P_sequence || P_item), a mean over levels.

    Args:
        of_sequences: [n, d], projected summaries of histories.
        of_items: [n, d], latents of the items that came next.
        codebooks: Of each level [K_l, d].
        recursion: See `code_log_probabilities`.
        distance_sign: Likewise.

    Returns:
        float32 [n], in nats.
    """
    sequences = code_log_probabilities(of_sequences, codebooks, recursion=recursion, distance_sign=distance_sign)
    items = code_log_probabilities(of_items, codebooks, recursion=recursion, distance_sign=distance_sign)
    # KL(p || q) + KL(q || p) = sum_k (p_k - q_k) (log p_k - log q_k)
    levels = [((p.exp() - q.exp()) * (p - q)).sum(dim=1) for p, q in zip(items, sequences, strict=True)]
    return torch.stack(levels).mean(dim=0)


def preference_semantic_losses(
    states: Tensor, items: Tensor, *, temperature: float = 0.07, rows: slice = slice(None)
) -> Tensor:
    """PSA of each pair: -log softmax_j(cos(state_i, item_j) / t)[i] - log softmax_j(cos(item_i, state_j) / t)[i].

    Args:
        states: [n, D], projected states before the first code.
        items: [n, D], reconstructions of the items that came next, all different items: every other one is a
            negative.
        temperature: t > 0.
        rows: The pairs whose losses are wanted: one process's part of all.

    Returns:
        float32 [rows], in nats; 0 where there is one pair.
    """
    states, items = F.normalize(states.float(), dim=1), F.normalize(items.float(), dim=1)
    own = torch.arange(len(states), device=states.device)[rows]
    of_states = F.cross_entropy(states[rows] @ items.T / temperature, own, reduction="none")
    return of_states + F.cross_entropy(items[rows] @ states.T / temperature, own, reduction="none")


def first_of_each(items: Tensor) -> Tensor:
    """Where each different item stands first: int64 [different items], ascending places in `items` [n]."""
    different, inverse = torch.unique(items, return_inverse=True)
    places = torch.arange(len(items), device=items.device)
    first = torch.full((len(different),), len(items), dtype=torch.int64, device=items.device)
    return first.scatter_reduce(0, inverse, places, "amin").sort().values
