"""llmrec turns an LLM into a generative recommender.

A learned item tokenizer gives every item a tuple of codes, the codes become tokens of the LLM, the LLM is fine-tuned
to write the codes of the next item, and generation is held to codes of real items.

Names are loaded when they are first used, so `import llmrec` costs nothing by itself.
"""

import importlib
from typing import TYPE_CHECKING, Any

from llmrec._version import __version__

if TYPE_CHECKING:
    from llmrec.data.interactions import InteractionDataset
    from llmrec.data.loading import load_dataset_from
    from llmrec.data.recommendation import Recommendation
    from llmrec.data.splits import DatasetSplits, EvaluationSet, leave_one_out, split_by_time
    from llmrec.data.synthetic import synthetic_dataset
    from llmrec.embeddings.base import ItemEmbeddings
    from llmrec.embeddings.collaborative import SASRec, SASRecConfig
    from llmrec.embeddings.image import embed_images
    from llmrec.embeddings.lightgcn import LightGCN, LightGCNConfig
    from llmrec.embeddings.text import embed_text
    from llmrec.errors import LlmrecError
    from llmrec.evaluation.baselines import PopularityRecommender
    from llmrec.evaluation.evaluator import evaluate
    from llmrec.generation.logits_process import TrieLogitsProcessor
    from llmrec.generation.trie import ItemTrie
    from llmrec.item_tokenizers.base import ItemTokenizer
    from llmrec.item_tokenizers.code_agreement import compare_codes
    from llmrec.item_tokenizers.diagnostics import CodeDiagnostics, diagnose
    from llmrec.item_tokenizers.given_codes import GivenCodesTokenizer
    from llmrec.item_tokenizers.letter import LetterConfig, LetterTokenizer
    from llmrec.item_tokenizers.rq_kmeans import RQKMeansConfig, RQKMeansTokenizer
    from llmrec.item_tokenizers.rq_kmeans_plus import RQKMeansPlusConfig, RQKMeansPlusTokenizer
    from llmrec.item_tokenizers.rq_vae import RQVAEConfig, RQVAETokenizer
    from llmrec.item_tokenizers.semantic_ids import SemanticIds
    from llmrec.item_tokenizers.simcit import SimCITConfig, SimCITTokenizer
    from llmrec.processes import Processes
    from llmrec.recommendation.batch import BatchSummary, recommend_file
    from llmrec.recommender import Recommender
    from llmrec.tasks.mixture import TaskMixture
    from llmrec.tasks.next_item import NextItemTask
    from llmrec.tasks.registry import build_samples
    from llmrec.tasks.source import TextColumns
    from llmrec.training.config import RecFinetuneConfig
    from llmrec.training.joint import JointTrainer
    from llmrec.training.joint_schedule import JointSchedule
    from llmrec.training.tokenizer_training import AlignmentSettings, JointTokenizer, TokenizerTraining
    from llmrec.training.trainer import RankingTrainer
    from llmrec.vocabulary import CodeVocabulary, add_code_rows

_MODULES = {
    "AlignmentSettings": "llmrec.training.tokenizer_training",
    "BatchSummary": "llmrec.recommendation.batch",
    "CodeDiagnostics": "llmrec.item_tokenizers.diagnostics",
    "CodeVocabulary": "llmrec.vocabulary",
    "DatasetSplits": "llmrec.data.splits",
    "EvaluationSet": "llmrec.data.splits",
    "GivenCodesTokenizer": "llmrec.item_tokenizers.given_codes",
    "InteractionDataset": "llmrec.data.interactions",
    "ItemEmbeddings": "llmrec.embeddings.base",
    "ItemTokenizer": "llmrec.item_tokenizers.base",
    "ItemTrie": "llmrec.generation.trie",
    "JointSchedule": "llmrec.training.joint_schedule",
    "JointTokenizer": "llmrec.training.tokenizer_training",
    "JointTrainer": "llmrec.training.joint",
    "LetterConfig": "llmrec.item_tokenizers.letter",
    "LetterTokenizer": "llmrec.item_tokenizers.letter",
    "LightGCN": "llmrec.embeddings.lightgcn",
    "LightGCNConfig": "llmrec.embeddings.lightgcn",
    "LlmrecError": "llmrec.errors",
    "NextItemTask": "llmrec.tasks.next_item",
    "PopularityRecommender": "llmrec.evaluation.baselines",
    "Processes": "llmrec.processes",
    "RQKMeansConfig": "llmrec.item_tokenizers.rq_kmeans",
    "RQKMeansPlusConfig": "llmrec.item_tokenizers.rq_kmeans_plus",
    "RQKMeansPlusTokenizer": "llmrec.item_tokenizers.rq_kmeans_plus",
    "RQKMeansTokenizer": "llmrec.item_tokenizers.rq_kmeans",
    "RQVAEConfig": "llmrec.item_tokenizers.rq_vae",
    "RQVAETokenizer": "llmrec.item_tokenizers.rq_vae",
    "RankingTrainer": "llmrec.training.trainer",
    "RecFinetuneConfig": "llmrec.training.config",
    "Recommendation": "llmrec.data.recommendation",
    "Recommender": "llmrec.recommender",
    "SASRec": "llmrec.embeddings.collaborative",
    "SASRecConfig": "llmrec.embeddings.collaborative",
    "SemanticIds": "llmrec.item_tokenizers.semantic_ids",
    "SimCITConfig": "llmrec.item_tokenizers.simcit",
    "SimCITTokenizer": "llmrec.item_tokenizers.simcit",
    "TaskMixture": "llmrec.tasks.mixture",
    "TextColumns": "llmrec.tasks.source",
    "TokenizerTraining": "llmrec.training.tokenizer_training",
    "TrieLogitsProcessor": "llmrec.generation.logits_process",
    "add_code_rows": "llmrec.vocabulary",
    "build_samples": "llmrec.tasks.registry",
    "compare_codes": "llmrec.item_tokenizers.code_agreement",
    "diagnose": "llmrec.item_tokenizers.diagnostics",
    "embed_images": "llmrec.embeddings.image",
    "embed_text": "llmrec.embeddings.text",
    "evaluate": "llmrec.evaluation.evaluator",
    "leave_one_out": "llmrec.data.splits",
    "load_dataset_from": "llmrec.data.loading",
    "recommend_file": "llmrec.recommendation.batch",
    "split_by_time": "llmrec.data.splits",
    "synthetic_dataset": "llmrec.data.synthetic",
}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'llmrec' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
