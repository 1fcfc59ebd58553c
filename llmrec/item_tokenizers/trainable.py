"""Which fitted item tokenizers can be trained on with a recommender, and what those that can't become.

Joint training (ETEGRec, arXiv 2409.05546) sends gradients into an item tokenizer. Knows the classes of item
tokenizers; how they are trained on is elsewhere.
"""

import torch

from llmrec.errors import SettingsError
from llmrec.item_tokenizers.base import ItemTokenizer, NotFittedError
from llmrec.item_tokenizers.rq_kmeans import RQKMeansTokenizer
from llmrec.item_tokenizers.rq_kmeans_plus import RQKMeansPlusConfig, RQKMeansPlusTokenizer
from llmrec.item_tokenizers.trained import TrainedTokenizer


def trainable_tokenizer(tokenizer: ItemTokenizer) -> TrainedTokenizer:
    """A fitted item tokenizer as a network that gradients can move.

    RQ-VAE, LETTER, SimCIT and RQ-KMeans+ are networks, and are returned as they are: training on changes the object
    that was passed. RQ-KMeans becomes an RQ-KMeans+ that hasn't been trained yet: its encoder is the identity, its
    codebooks are copies of the centres, and nearest codes are the same to the bit. Two things differ. Where centres
    were learned by balanced k-means, `RQKMeansTokenizer.quantize_catalogue` spreads a catalogue over them, which
    RQ-KMeans+ doesn't: it gives all items their nearest codes, and more of them collide. And its decoder has random
    weights, which mean nothing before it has been trained for some epochs.

    Args:
        tokenizer: Fitted or loaded.

    Raises:
        NotFittedError: It is neither.
        SettingsError: Its codes don't come from vectors, as given ones, so that there is nothing to train.
    """
    trains = isinstance(tokenizer, TrainedTokenizer | RQKMeansTokenizer)
    if trains and not tokenizer.is_fitted:
        raise NotFittedError(
            f"this {type(tokenizer).__name__} is not fitted: call fit() or load one by from_pretrained() before it is"
            " trained on"
        )
    if isinstance(tokenizer, TrainedTokenizer):
        return tokenizer
    if isinstance(tokenizer, RQKMeansTokenizer):
        return _rq_kmeans_plus(tokenizer)
    raise SettingsError(
        f"a {type(tokenizer).__name__} has no code vectors, so it can't be trained with a recommender: fit an RQ-VAE,"
        " LETTER, SimCIT, RQ-KMeans or RQ-KMeans+ on the items (tokenizers/fit.py), or fine-tune on its codes as they"
        " are (recipes/finetune.py)"
    )


@torch.no_grad()
def _rq_kmeans_plus(start: RQKMeansTokenizer) -> RQKMeansPlusTokenizer:
    of = start.config
    config = RQKMeansPlusConfig(
        num_codebooks=of.num_codebooks, codebook_size=of.codebook_size, balance=of.balance, size_slack=of.size_slack,
        kmeans_iterations=of.iterations, balanced_items=of.balanced_items, seed=of.seed,
    )  # fmt: skip
    tokenizer = RQKMeansPlusTokenizer(config)
    module = tokenizer.new_module(start.widths)
    for codebook, centres in zip(module.quantizer.codebooks, start.codebooks, strict=True):
        codebook.copy_(centres)
    module.quantizer.initialised.fill_(True)
    tokenizer.module = module.eval()
    tokenizer.widths, tokenizer.fit_report = dict(start.widths), dict(start.fit_report)
    return tokenizer
