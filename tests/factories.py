"""Tiny text tokenizers, models, catalogues and trainers. Used by fixtures, and by scripts that tests start."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from llmrec.data.interactions import InteractionDataset
from llmrec.item_tokenizers.semantic_ids import SemanticIds

WORDS = ("Items", "chosen", "by", "one", "person", ",", "oldest", "first", ":", "Next", "a")
NUM_TEXT_TOKENS = 16  # of `make_text_tokenizer`
NUM_ITEMS = 12
SIZES = (3, 4, 3)


def make_text_tokenizer(*, start_token: bool = False) -> PreTrainedTokenizerFast:
    """Whole words only; 16 tokens."""
    special = ("<unk>", "<s>", "</s>", "<pad>")
    words = {word: number for number, word in enumerate([*special, *WORDS, "filler"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if not start_token:
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def make_tiny_model(
    family: str = "llama", *, tied: bool = True, vocab_size: int = NUM_TEXT_TOKENS, seed: int = 0, **settings: Any
) -> PreTrainedModel:
    """A random model of two layers and width 32 whose logits differ a lot between tokens."""
    common = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    if family in ("qwen3", "gemma", "gemma2", "gemma3_text"):
        common["head_dim"] = 8
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**common, **settings})).eval()


def make_dataset(
    lengths: tuple[int, ...] = (5, 3, 9, 2, 4, 6, 2, 7, 3, 5, 8, 2, 4, 3, 6, 5), *, num_items: int = NUM_ITEMS, seed=0
) -> InteractionDataset:
    """Random histories of the lengths given."""
    generator = np.random.default_rng(seed)
    items = datasets.Dataset.from_dict({"item_id": [f"item-{row}" for row in range(num_items)]})
    histories = [generator.integers(0, num_items, length).tolist() for length in lengths]
    users = {"user_id": [f"user-{user}" for user in range(len(lengths))], "items": histories}
    return InteractionDataset(items, datasets.Dataset.from_dict(users), name="small")


def make_semantic_ids(*, num_items: int = NUM_ITEMS, sizes: tuple[int, ...] = SIZES, seed: int = 0) -> SemanticIds:
    """Distinct random codes: nodes of the trie have unequal numbers of children."""
    keys = np.random.default_rng(seed).choice(int(np.prod(sizes)), num_items, replace=False)
    codes = np.stack(np.unravel_index(keys, sizes), axis=1)
    return SemanticIds(tuple(f"item-{row}" for row in range(num_items)), codes, sizes)


def make_trainer(
    output_dir: Path | str,
    *,
    family: str = "llama",
    tied: bool = True,
    lora: bool = True,
    lora_dropout: float = 0.0,
    form: str = "history",
    evaluation: bool = False,
    attn_implementation: str | None = None,
    samples: Any = None,
    callbacks: list[Any] | None = None,
    **settings: Any,
) -> Any:
    """A RankingTrainer on the small catalogue: 16 samples in the history form, plain SGD, a log line a step.

    `samples` makes other samples of these. With `evaluation` each user's last item is kept for the validation loss,
    and not trained on.
    """
    from peft import LoraConfig

    from llmrec.adapter import add_lora
    from llmrec.data.splits import leave_one_out
    from llmrec.generation.trie import ItemTrie
    from llmrec.tasks.next_item import NextItemTask, evaluation_samples, training_samples
    from llmrec.training.config import RecFinetuneConfig
    from llmrec.training.trainer import RankingTrainer
    from llmrec.vocabulary import CodeVocabulary, add_code_rows

    defaults = {
        "loss_scope": "vocabulary",
        "code_learning_rate_factor": 1.0,
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 1e9,  # never clips, and the norm is still logged
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "packing": False,
        "seed": 1,
    }
    # Processes must be known before a model is made: TrainingArguments starts them.
    args = RecFinetuneConfig(output_dir=str(output_dir), **{**defaults, **settings})
    tokenizer, semantic_ids, dataset = make_text_tokenizer(), make_semantic_ids(), make_dataset()
    vocabulary = CodeVocabulary.add_to(tokenizer, semantic_ids.codebook_sizes)
    model: Any = make_tiny_model(family, tied=tied, attn_implementation=attn_implementation)
    add_code_rows(model, vocabulary, seed=2)
    if lora:
        config = LoraConfig(r=4, lora_dropout=lora_dropout, target_modules="all-linear", init_lora_weights=False)
        model = add_lora(model, config, seed=3)
    task = NextItemTask(tokenizer, vocabulary, semantic_ids, template="Items chosen : {history}", max_history=8)
    splits = leave_one_out(dataset) if evaluation else None
    train_samples = training_samples(task, splits.train if splits else dataset, form=form)
    return RankingTrainer(
        model,
        args,
        vocabulary=vocabulary,
        text_tokenizer=tokenizer,
        train_dataset=train_samples if samples is None else samples(train_samples),
        eval_dataset=evaluation_samples(task, splits.test) if splits else None,
        trie=ItemTrie.from_semantic_ids(semantic_ids),
        callbacks=callbacks,
    )


def step_log(trainer: Any) -> list[dict[str, float]]:
    """Loss and gradient norm of every step."""
    return [
        {"loss": line["loss"], "grad_norm": line["grad_norm"]} for line in trainer.state.log_history if "loss" in line
    ]


def trained_tensors(trainer: Any) -> dict[str, torch.Tensor]:
    """Copies of all parameters that are trained, by name."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {
        name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def make_item_embeddings(*, num_items: int = NUM_ITEMS, width: int = 12, seed: int = 4) -> dict[str, Any]:
    """Random vectors of the small catalogue, as the modality "text"."""
    from llmrec.embeddings.base import ItemEmbeddings

    vectors = np.random.default_rng(seed).normal(size=(num_items, width))
    return {"text": ItemEmbeddings(tuple(f"item-{row}" for row in range(num_items)), vectors)}


def make_item_tokenizer(**config: Any) -> Any:
    """A small RQ-VAE of two levels of four codes of width 8, fitted for a few epochs on `make_item_embeddings`."""
    from llmrec.item_tokenizers.rq_vae import RQVAEConfig, RQVAETokenizer

    settings = {"num_codebooks": 2, "codebook_size": 4, "codebook_dim": 8, "hidden_sizes": (10,), "epochs": 5}
    return RQVAETokenizer(RQVAEConfig(**settings | config)).fit(make_item_embeddings(), progress=False)


def make_joint_trainer(
    output_dir: Path | str,
    *,
    family: str = "llama",
    lora: bool = False,
    lora_dropout: float = 0.0,
    form: str | None = None,
    policy: str = "extra_level",
    counter_size: int = 12,
    schedule: dict[str, Any] | None = None,
    alignment: dict[str, Any] | None = None,
    tokenizer_training: dict[str, Any] | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    evaluation: bool = False,
    item_metrics: Any = None,
    on_cycle: Any = None,
    callbacks: list[Any] | None = None,
    **settings: Any,
) -> Any:
    """A JointTrainer on the small catalogue, of a LLaMA (16 samples, history form) or a "t5" (58, prefix form).

    Cycles of two epochs without warm-up, of plain SGD; the weights of the alignments and the item tokenizer's learning
    rate are so large that everything moves in a few steps. With `evaluation` each user's last item is kept for the
    validation loss, and not trained on.
    """
    import tiny_t5
    from peft import LoraConfig

    from llmrec.adapter import add_lora
    from llmrec.data.splits import leave_one_out
    from llmrec.processes import Processes
    from llmrec.recommender import Recommender
    from llmrec.recommender_folder import RecommenderConfig
    from llmrec.tasks.next_item import NextItemTask, evaluation_samples, training_samples
    from llmrec.training.config import RecFinetuneConfig
    from llmrec.training.joint import JointTrainer
    from llmrec.training.joint_schedule import JointSchedule
    from llmrec.training.tokenizer_training import AlignmentSettings, JointTokenizer, TokenizerTraining
    from llmrec.vocabulary import CodeVocabulary, add_code_rows

    defaults = {
        "loss_scope": "vocabulary",
        "code_learning_rate_factor": 1.0,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 1e9,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "packing": False,
        "seed": 1,
    }
    args = RecFinetuneConfig(output_dir=str(output_dir), **{**defaults, **settings})
    encoder_decoder = family == "t5"
    half = {"learning_rate": 0.02, "batch_size": 5, "seed": 1}
    weights = {"sia_weight": 0.5, "psa_weight": 0.3, "psa_temperature": 0.5}
    item_tokenizer = JointTokenizer(
        make_item_tokenizer(**(tokenizer_config or {})),
        make_item_embeddings(),
        TokenizerTraining(**half | (tokenizer_training or {})),
        AlignmentSettings(**weights | (alignment or {})),
        Processes.alone("cpu"),
    )

    def make_unique(quantized: Any) -> SemanticIds:
        return quantized.make_unique(policy, counter_size=counter_size if policy == "extra_level" else None)

    tokenizer, semantic_ids, dataset = make_text_tokenizer(), make_unique(item_tokenizer.quantize()), make_dataset()
    vocabulary = CodeVocabulary.add_to(tokenizer, semantic_ids.codebook_sizes)
    model: Any = tiny_t5.make_t5() if encoder_decoder else make_tiny_model(family)
    add_code_rows(model, vocabulary, seed=2)
    if lora:
        config = LoraConfig(r=4, lora_dropout=lora_dropout, target_modules="all-linear", init_lora_weights=False)
        model = add_lora(model, config, seed=3)
    template = "Items chosen : {history}"
    task = NextItemTask(
        *(tokenizer, vocabulary, semantic_ids), template=template, max_history=8, encoder_decoder=encoder_decoder
    )
    item_ids = list(semantic_ids.item_ids)
    recommender = Recommender(
        *(model, tokenizer, semantic_ids, vocabulary, datasets.Dataset.from_dict({"item_id": item_ids}), task),
        RecommenderConfig(
            base_model="none",
            template=template,
            max_history=8,
            codebook_sizes=vocabulary.codebook_sizes,
            first_token_id=vocabulary.first_token_id,
        ),
        item_tokenizer=item_tokenizer.tokenizer,
    )
    splits = leave_one_out(dataset) if evaluation else None
    samples = training_samples(
        recommender.task,
        splits.train if splits else dataset,
        form=form or ("prefix" if encoder_decoder else "history"),
    )
    return JointTrainer(
        recommender,
        args,
        item_tokenizer=item_tokenizer,
        make_unique=make_unique,
        schedule=JointSchedule(**{"cycle": 2, "warmup_epochs": 0} | (schedule or {})),
        train_dataset=samples,
        eval_dataset=evaluation_samples(recommender.task, splits.validation) if splits else None,
        item_metrics=item_metrics,
        on_cycle=on_cycle,
        callbacks=callbacks,
    )
