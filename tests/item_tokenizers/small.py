"""Small item tokenizers and embeddings for the tests here; loaded by path, since tests are no package."""

import numpy as np

from llmrec.embeddings.base import ItemEmbeddings
from llmrec.item_tokenizers.letter import LetterConfig, LetterTokenizer
from llmrec.item_tokenizers.rq_kmeans import RQKMeansConfig, RQKMeansTokenizer
from llmrec.item_tokenizers.rq_kmeans_plus import RQKMeansPlusConfig, RQKMeansPlusTokenizer
from llmrec.item_tokenizers.rq_vae import RQVAEConfig, RQVAETokenizer
from llmrec.item_tokenizers.simcit import SimCITConfig, SimCITTokenizer

SMALL = {"num_codebooks": 3, "codebook_size": 16, "codebook_dim": 4, "hidden_sizes": (16,), "epochs": 6,
         "batch_size": 64, "evaluate_every": 2}  # fmt: skip
PLUS = {
    name: value for name, value in SMALL.items() if name != "codebook_dim"
}  # its code vectors are as wide as inputs


def rq_kmeans(epochs=None, **more):  # it has no epochs
    return RQKMeansTokenizer(RQKMeansConfig(num_codebooks=3, codebook_size=16, **more))


MAKE = {
    "LetterTokenizer": lambda **more: LetterTokenizer(LetterConfig(**SMALL | {"num_clusters": 4} | more)),
    "RQKMeansPlusTokenizer": lambda **more: RQKMeansPlusTokenizer(RQKMeansPlusConfig(**PLUS | more)),
    "RQKMeansTokenizer": rq_kmeans,
    "RQVAETokenizer": lambda **more: RQVAETokenizer(RQVAEConfig(**SMALL | more)),
    "SimCITTokenizer": lambda **more: SimCITTokenizer(SimCITConfig(**SMALL | more)),
}
# What makes every batch-level term large enough to be seen where processes are compared.
TOGETHER = {"LetterTokenizer": {"collaborative_weight": 1.0, "diversity_weight": 1.0}}


def embeddings(count=150, seed=0, width=12, gaps=False):
    draws = np.random.default_rng(seed)
    ids = tuple(f"item-{row}" for row in range(count))
    text = draws.normal(size=(count, width))
    present = draws.random(count) < 0.8 if gaps else None
    return {
        "text": ItemEmbeddings(ids, text / np.linalg.norm(text, axis=1, keepdims=True)),
        "collaborative": ItemEmbeddings(ids, draws.normal(size=(count, 4)), present=present),
    }
