"""Both sides of the training benchmarks: llmrec's trainer, and training as LC-Rec's code and its kin do it.

The reference is what one writes with transformers and PEFT alone: the code tokens are added to the text tokenizer, the
matrices resized, LoRA put on all linear layers with `modules_to_save=["embed_tokens", "lm_head"]`, one sample made for
every target, batches padded on the right, and the loss is the model's own, from the logits of every position. Both
sides read the same token IDs (LC-Rec's own prompts are longer: a preamble, separators between the codes and an
end-of-sequence token), learn the same targets, and have the same LoRA, without dropout. LC-Rec's default also learns
the prompt; here the labels of the reference are the targets alone, so that the losses can be compared. That takes
nothing away from it: the logits of all positions are computed either way.
"""

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer

from llmrec.data.interactions import InteractionDataset
from llmrec.generation.trie import ItemTrie
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.tasks.base import TaskSamples
from llmrec.tasks.next_item import NextItemTask, training_samples
from llmrec.vocabulary import CodeVocabulary, add_code_rows

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "target_modules": LINEAR_LAYERS,
    "task_type": "CAUSAL_LM",
}
TRAINED_WHOLE = ["embed_tokens", "lm_head"]
LEARNING_RATE = 1e-4  # LC-Rec's with LoRA, of LETTER's script


@dataclass(frozen=True)
class Setup:
    """What both sides train.

    Attributes:
        make_base: Gives the base model, which a side changes: a copy for each.
        text_tokenizer: With the code tokens.
        task: Makes prompts and samples.
        train: The training part.
        trie: The items.
    """

    make_base: Callable[[], Any]
    text_tokenizer: Any
    task: NextItemTask
    train: InteractionDataset
    trie: ItemTrie

    @property
    def vocabulary(self) -> CodeVocabulary:
        """Token IDs of the codes."""
        return self.task.vocabulary

    def samples(self, form: str) -> TaskSamples:
        """The samples of an epoch."""
        return training_samples(self.task, self.train, form=form)


def make_setup(
    base: Any, text_tokenizer: Any, semantic_ids: SemanticIds, train: InteractionDataset, **task: Any
) -> Setup:
    """Adds the codes to the text tokenizer; `task` are settings of NextItemTask. Each side gets a copy of the base."""
    vocabulary = CodeVocabulary.add_to(text_tokenizer, semantic_ids.codebook_sizes)
    made = NextItemTask(text_tokenizer, vocabulary, semantic_ids, **task)
    trie = ItemTrie.from_semantic_ids(semantic_ids)
    return Setup(lambda: copy.deepcopy(base), text_tokenizer, made, train, trie)


def load_setup(model_name: str, beauty: Path, *, dtype: torch.dtype = torch.bfloat16) -> Setup:
    """A published model, Amazon Beauty's training part (leave-one-out) and LETTER's published codes."""
    from llmrec.data.loading import load_dataset_from
    from llmrec.data.splits import leave_one_out
    from llmrec.pretrained import load_base_model, load_text_tokenizer

    dataset = load_dataset_from(beauty)
    index = beauty / "Beauty.letter-index.json"
    semantic_ids = SemanticIds.from_index_json(index, dataset.item_ids, item_keys=dataset.item_keys)
    base = load_base_model(model_name, dtype=dtype)
    return make_setup(base, load_text_tokenizer(model_name), semantic_ids, leave_one_out(dataset).train)


@dataclass
class Side:
    """A trainer that is driven step by step.

    Attributes:
        trainer: With its model on its device and its optimiser made.
        model: As the trainer prepared it.
        loader: The trainer's own.
        batches: What the loader reads for each step of the first epoch.
        num_tokens: int64 [steps], tokens of each batch, padding included.
        real_token_share: Tokens of samples among them, over the epoch.
        num_levels: L, code tokens of a target.
    """

    trainer: Any
    model: Any
    loader: Any
    batches: list[list[Any]]
    num_tokens: np.ndarray
    real_token_share: float
    num_levels: int

    def batch(self, step: int) -> dict[str, Tensor]:
        """The tensors of a step."""
        return self.loader.collate_fn([self.loader.dataset[place] for place in self.batches[step]])

    def num_targets(self, batch: dict[str, Tensor]) -> int:
        """Items that a batch teaches."""
        return int((batch["labels"][:, 1:] != -100).sum()) // self.num_levels

    def forward_backward(self, batch: dict[str, Tensor]) -> Tensor:
        """The Trainer's own: the loss, divided by the targets, and its gradients."""
        (batch,), num_items = self.trainer.get_batch_samples(iter([dict(batch)]), 1, self.trainer.args.device)
        return self.trainer.training_step(self.model, batch, num_items)

    def step(self, batch: dict[str, Tensor]) -> float:
        """Forward, backward, clipping and optimiser, in the order of the Trainer's loop; the seconds it took."""
        trainer = self.trainer
        start = time.perf_counter()
        self.forward_backward(batch)
        trainer.accelerator.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        self.model.zero_grad()
        return time.perf_counter() - start


def ready(trainer: Any, num_levels: int) -> Side:
    """What `Trainer.train` does before its first step, for a trainer of either side."""
    loader = trainer.get_train_dataloader()
    batches = [list(batch) for batch in loader.batch_sampler]
    num_tokens, real = _tokens_of(loader.dataset, batches)
    trainer.create_optimizer_and_scheduler(num_training_steps=len(batches))
    model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = 1
    return Side(trainer, model, loader, batches, num_tokens, real / int(num_tokens.sum()), num_levels)


def _tokens_of(dataset: Any, batches: list[list[Any]]) -> tuple[np.ndarray, int]:
    """Tokens of each batch with padding, and tokens of all samples."""
    plan = getattr(dataset, "plan", None)
    if plan is None:  # one sample a row
        of_row = dataset.lengths()
        places = batches
    else:
        of_row = np.array([plan.samples.lengths(0)[row].sum() for row in plan.rows(0)])
        places = [[row for _, row in batch] for batch in batches]
    padded = [len(rows) * max(1, int(of_row[rows].max())) for rows in places]
    return np.asarray(padded, dtype=np.int64), int(of_row.sum())


def settings(**given: Any) -> dict[str, Any]:
    """Settings of the Trainer that both sides have."""
    common = {
        "output_dir": tempfile.gettempdir(),  # nothing is saved
        "learning_rate": LEARNING_RATE,
        "weight_decay": 0.01,
        "lr_scheduler_type": "cosine",
        "num_train_epochs": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": 0,
    }
    return common | given


def reference_model(setup: Setup, *, seed: int = 0) -> Any:
    """The base with resized matrices, both trained whole, and LoRA."""
    from peft import LoraConfig, get_peft_model

    model = setup.make_base()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rows = max(len(setup.text_tokenizer), model.get_input_embeddings().weight.shape[0])
        model.resize_token_embeddings(rows, mean_resizing=False)
        return get_peft_model(model, LoraConfig(**LORA, modules_to_save=TRAINED_WHOLE))


def reference_side(setup: Setup, strategy: str, *, batch_size: int = 16, bf16: bool = True) -> Side:
    """The Trainer of transformers on one sample for every target.

    Args:
        setup: What is trained.
        strategy: `train_sampling_strategy`: "random" or "group_by_length".
        batch_size: Samples of a step.
        bf16: Autocast, as LC-Rec's and LETTER's scripts set it.
    """
    from transformers import DataCollatorForSeq2Seq, TrainingArguments

    tokenizer = setup.text_tokenizer
    tokenizer.padding_side = "right"
    trainer = Trainer(
        model=reference_model(setup),
        args=TrainingArguments(
            **settings(
                per_device_train_batch_size=batch_size,
                train_sampling_strategy=strategy,
                remove_unused_columns=False,
                bf16=bf16,
            )
        ),
        train_dataset=setup.samples("prefix"),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    )
    return ready(trainer, setup.vocabulary.num_levels)


def llmrec_model(setup: Setup, *, seed: int = 0) -> Any:
    """The base with code rows and LoRA."""
    from peft import LoraConfig

    from llmrec.adapter import add_lora

    model = setup.make_base()
    add_code_rows(model, setup.vocabulary, seed=seed)
    return add_lora(model, LoraConfig(**LORA), seed=seed)


def llmrec_side(
    setup: Setup,
    form: str,
    *,
    scope: str = "vocabulary",
    batch_size: int = 1,
    row_length: int | None = None,
    bf16: bool = True,
    model: Any = None,
    plain_step: bool = False,
    **more: Any,
) -> Side:
    """The trainer of llmrec on packed rows.

    Args:
        setup: What is trained.
        form: "history" or "prefix".
        scope: `loss_scope`; "vocabulary" is the reference's.
        batch_size: Rows of a step.
        row_length: Most tokens of a row.
        bf16: Autocast.
        model: What is trained, by default `llmrec_model(setup)`.
        plain_step: Take transformers' `training_step` in place of ours.
        more: Settings of the trainer.
    """
    from llmrec.training.config import RecFinetuneConfig
    from llmrec.training.trainer import RankingTrainer

    more |= {"packing": True, "row_length": row_length, "loss_scope": scope}
    trainer = RankingTrainer(
        llmrec_model(setup) if model is None else model,
        RecFinetuneConfig(**settings(per_device_train_batch_size=batch_size, bf16=bf16, **more)),
        vocabulary=setup.vocabulary,
        text_tokenizer=setup.text_tokenizer,
        train_dataset=setup.samples(form),
        trie=setup.trie,
    )
    if plain_step:
        trainer.training_step = MethodType(Trainer.training_step, trainer)
    return ready(trainer, setup.vocabulary.num_levels)


@dataclass(frozen=True)
class Agreement:
    """How far the two sides are apart on the same samples, in float32.

    Attributes:
        loss: Of both sides, nats a token.
        loss_difference: Between them.
        gradient_difference: Norm of the difference of all gradients of LoRA and code rows, over the norm of the
            reference's.
    """

    loss: float
    loss_difference: float
    gradient_difference: float

    def same(self, *, loss_tolerance: float = 1e-5, gradient_tolerance: float = 1e-4) -> bool:
        """Whether both are within rounding of float32."""
        return self.loss_difference <= loss_tolerance and self.gradient_difference <= gradient_tolerance


def compare_sides(setup: Setup, *, num_samples: int = 8, seed: int = 0) -> Agreement:
    """Loss and gradients of both sides, at the same weights, on the same samples of the `prefix` form.

    The reference reads them padded, one a row, llmrec packed in one row. LoRA's B, zero at the start, is drawn, so
    that A has gradients too. Where embedding and head are tied, llmrec's rows are in both, and their gradient is the
    sum of those of the reference's two copies.
    """
    in_half = setup.make_base
    setup = replace(setup, make_base=lambda: in_half().float())
    samples = setup.samples("prefix")
    chosen = np.random.default_rng(seed).choice(len(samples), num_samples, replace=False).tolist()
    row_length = max(64, int(samples.lengths()[chosen].sum()), int(samples.lengths().max()))
    reference = reference_side(setup, "random", batch_size=num_samples, bf16=False)
    ours = llmrec_side(setup, "prefix", row_length=row_length, bf16=False)
    _same_weights(ours, reference, setup.vocabulary, torch.Generator().manual_seed(seed))
    sides: dict[str, tuple[Side, list[Any]]] = {
        "reference": (reference, [samples[index] for index in chosen]),
        "llmrec": (ours, [[samples[index] for index in chosen]]),
    }
    losses, gradients = {}, {}
    for name, (side, rows) in sides.items():
        batch = side.trainer.data_collator(rows)
        losses[name] = float(side.forward_backward(batch))
        gradients[name] = _gradients(side, setup.vocabulary)
    difference = torch.linalg.vector_norm(gradients["llmrec"] - gradients["reference"])
    return Agreement(
        losses["reference"],
        abs(losses["llmrec"] - losses["reference"]),
        float(difference / torch.linalg.vector_norm(gradients["reference"])),
    )


def _lora(model: Any) -> dict[str, Any]:
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


def _copies(model: Any) -> list[Any]:
    """The reference's trained copies of embedding and head."""
    return [parameter for name, parameter in model.named_parameters() if ".modules_to_save." in name]


@torch.no_grad()
def _same_weights(ours: Side, reference: Side, vocabulary: CodeVocabulary, generator: torch.Generator) -> None:
    from llmrec.vocabulary import code_row_parameters

    theirs = _lora(reference.model)
    for name, parameter in _lora(ours.model).items():
        if ".lora_B." in name:
            parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
        theirs[name].copy_(parameter)
    rows = code_row_parameters(ours.model)  # one where tied, else that of the embedding and that of the head
    first = vocabulary.first_token_id
    for place, copied in enumerate(_copies(reference.model)):
        copied[first : first + vocabulary.num_tokens] = rows[min(place, len(rows) - 1)]


def _gradients(side: Side, vocabulary: CodeVocabulary) -> Tensor:
    """All gradients of LoRA and of the code rows, one after the other."""
    from llmrec.vocabulary import code_row_parameters

    lora, copies, first = _lora(side.model), _copies(side.model), vocabulary.first_token_id
    rows: list[Any]
    if copies:
        rows = [copied.grad[first : first + vocabulary.num_tokens] for copied in copies]
        tied = side.trainer.model.get_base_model().config.tie_word_embeddings
        rows = [sum(rows)] if tied else rows
    else:
        rows = [parameter.grad for parameter in code_row_parameters(side.model)]
    return torch.cat([gradient.flatten() for gradient in [*(lora[name].grad for name in sorted(lora)), *rows]])


def spread_steps(num_tokens: np.ndarray, rounds: int, per_round: int) -> np.ndarray:
    """Steps to measure, so that few stand for all: those at even distances in the order of their tokens.

    Args:
        num_tokens: int64 [steps].
        rounds: Each gets steps of all sizes, none that another has while there are enough.
        per_round: Steps of a round.

    Returns:
        int64 [rounds, per_round].
    """
    order = np.argsort(num_tokens, kind="stable")
    # The least-to-most order of the rounds' places is mixed, so that no round has the larger of all pairs.
    shift = (np.arange(per_round)[None, :] * (rounds // 2 + 1) + np.arange(rounds)[:, None]) % rounds
    places = (np.arange(per_round)[None, :] + (shift + 0.5) / rounds) / per_round
    return order[(places * len(order)).astype(np.int64)]
