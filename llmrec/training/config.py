"""Settings of fine-tuning."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from llmrec.errors import SettingsError
from llmrec.tasks.batch_plan import ORDERS

SCOPES = ("vocabulary", "codes", "trie")


@dataclass
class RecFinetuneConfig(TrainingArguments):
    """`transformers.TrainingArguments`, with what the ranking-guided loss and the code rows add.

    Where a default differs from TrainingArguments' own: `use_cpu` is true where there is no CUDA device, which is
    right for one process, DDP and DeepSpeed alike; samples are packed into full rows; logging goes to no tracker
    unless one is named; the predictions of an evaluation are never gathered, only their losses.

    The scope `trie` and 25 times the learning rate for the rows of the codes are the defaults because they came out
    best with SmolLM2-135M and LoRA on Amazon Beauty. Recall@10 / NDCG@10 of 1,000 validation users after 130 steps
    (0.14 of an epoch, one seed), each model decoded in its own scope: trie x 25 .036 / .0170; x 10 .029 / .0133; x 4
    .024 / .0100; x 1 .011 / .0055; vocabulary x 4 .017 / .0071; codes x 4 .012 / .0054. The commands are in
    recipes/README.md.
    """

    output_dir: str = field(default="runs/default", metadata={"help": "Folder of checkpoints and of the result."})
    ranking_temperature: float = field(
        default=1.0,
        metadata={
            "help": "LETTER's tau: logits are divided by it in training. 1 is cross-entropy, as in LETTER's scripts."
        },
    )
    loss_scope: str = field(
        default="trie",
        metadata={
            "help": "What the loss is normalised over: the whole 'vocabulary' (LETTER), the 'codes' of the level, or"
            " the codes valid in the 'trie' of items. Decoding uses the same.",
            "choices": list(SCOPES),
        },
    )
    code_learning_rate_factor: float = field(
        default=25.0,
        metadata={"help": "The rows of the code tokens learn with learning_rate times this factor."},
    )
    code_init_scale: float = field(
        default=1.0,
        metadata={"help": "New rows start at the mean of the base rows plus noise of their deviation times this."},
    )
    packing: bool = field(
        default=True,
        metadata={
            "help": "A row of a batch is several samples one after the other, which don't see each other; without, it"
            " is one sample and padding."
        },
    )
    row_length: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens of a packed row; 512 by default, or the longest sample where that is longer. The"
            " batch sizes count rows, so a step reads rows times this many tokens."
        },
    )
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "Order of training samples. 'group_by_length' wastes least on padding; packed rows are full in"
            " any order.",
            "choices": list(ORDERS),
        },
    )
    use_cpu: bool = field(
        default=not torch.cuda.is_available(),  # a factory is ignored by HfArgumentParser, for booleans
        metadata={"help": "Train on the CPU. True where there is no CUDA device."},
    )
    prediction_loss_only: bool = field(default=True, metadata={"help": "Evaluation gathers losses, never logits."})
    dataloader_pin_memory: bool = field(
        default=torch.cuda.is_available(), metadata={"help": "Pin memory. True where there is a CUDA device."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Samples hold no columns to remove."})
    report_to: None | str | list[str] = field(  # noqa: RUF036 (transformers reads the order of this union)
        default="none", metadata={"help": "Trackers: tensorboard, wandb, trackio, ... or none."}
    )

    def __post_init__(self) -> None:
        """Checks settings and their combinations before anything is loaded."""
        if self.ranking_temperature <= 0:
            raise SettingsError(f"ranking_temperature is {self.ranking_temperature}; logits are divided by it, so > 0")
        if self.loss_scope not in SCOPES:
            raise SettingsError(f"loss_scope is {self.loss_scope!r}; choose one of {SCOPES}")
        if self.code_learning_rate_factor <= 0:
            raise SettingsError(f"code_learning_rate_factor is {self.code_learning_rate_factor}; it must be above 0")
        if self.row_length is not None and self.row_length < 1:
            raise SettingsError(f"row_length is {self.row_length}; a row holds at least one token")
        if self.train_sampling_strategy not in ORDERS:
            raise SettingsError(f"train_sampling_strategy is {self.train_sampling_strategy!r}; choose one of {ORDERS}")
        if self.code_init_scale < 0:
            raise SettingsError(f"code_init_scale is {self.code_init_scale}; it must not be negative")
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            # transformers takes everything but a "loss" for better when it is greater, the perplexity as well
            self.greater_is_better = "@" in self.metric_for_best_model
        super().__post_init__()
        if self.label_smoothing_factor:
            raise SettingsError(
                f"label_smoothing_factor is {self.label_smoothing_factor}, but the ranking-guided loss replaces the"
                " Trainer's own, which is the one that smooths; set it to 0"
            )
        if not self.average_tokens_across_devices:
            raise SettingsError(
                "average_tokens_across_devices is false: several processes would weigh their targets differently from"
                " one process with the same batch; leave it true"
            )
