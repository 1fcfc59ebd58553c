"""What joint training of item tokenizer and recommender can be told, besides the settings of fine-tuning."""

from dataclasses import dataclass, field

from llmrec.errors import SettingsError
from llmrec.tasks.registry import NEXT_ITEM, read_tasks
from llmrec.training.alignment import DISTANCE_SIGNS, RECURSIONS
from llmrec.training.arguments import FinetuneArguments

UNIQUENESS = ("extra_level", "min_cost")


@dataclass
class JointArguments(FinetuneArguments):
    """Settings of `recipes/train_joint.py`; the names in brackets are those of the paper (arXiv 2409.05546).

    `num_train_epochs` counts the recommender's epochs; those of the item tokenizer come on top of them.
    """

    embeddings_from: str | None = field(
        default=None,
        metadata={
            "help": "Settings file of tokenizers/ whose embeddings the item tokenizer reads. Needed where"
            " `item_tokenizer` is a folder; by default that file."
        },
    )
    train_tokenizer: bool = field(
        default=True,
        metadata={"help": "False: the item tokenizer stays as it is, and nothing is aligned; to compare with."},
    )
    alternate: bool = field(
        default=True,
        metadata={
            "help": "Item tokenizer and recommender learn in turns. False: both in every step; to compare with."
        },
    )
    cycle: int = field(
        default=2,
        metadata={"help": "Epochs of a cycle (C): one of the item tokenizer, then C - 1 of the recommender."},
    )
    sia_weight: float = field(
        default=3e-4, metadata={"help": "Weight of sequence-item alignment (mu). The paper's best are 3e-4 and 1e-3."}
    )
    psa_weight: float = field(
        default=1e-4, metadata={"help": "Weight of preference-semantic alignment (lambda). The paper's best is 1e-4."}
    )
    psa_temperature: float = field(default=0.07, metadata={"help": "Temperature of preference-semantic alignment."})
    sia_distance_sign: str = field(
        default="negative",
        metadata={
            "help": "Codes are likely that are near ('negative' distances, the paper's equation 6), or that are far"
            " ('positive' ones, the released code).",
            "choices": list(DISTANCE_SIGNS),
        },
    )
    sia_recursion: str = field(
        default="codebook",
        metadata={
            "help": "What is left for the next level in sequence-item alignment: 'codebook' (the paper; all levels"
            " teach) or 'straight_through' (the released code; only the first level reaches the networks).",
            "choices": list(RECURSIONS),
        },
    )
    alignment_warmup_epochs: int = field(
        default=10, metadata={"help": "Epochs, of both kinds, before anything is aligned (10 in the released code)."}
    )
    uniqueness: str = field(
        default="extra_level",
        metadata={
            "help": "How items get codes of their own each time: 'extra_level', a counter token (the paper), or"
            " 'min_cost', the nearest free last code.",
            "choices": list(UNIQUENESS),
        },
    )
    counter_size: int = field(default=256, metadata={"help": "Codes of the counter; most items that share the rest."})
    tokenizer_learning_rate: float = field(
        default=1e-4, metadata={"help": "Of the item tokenizer's AdamW; falls to 0 as a cosine."}
    )
    tokenizer_weight_decay: float = field(default=0.05, metadata={"help": "Of the item tokenizer's AdamW."})
    tokenizer_batch_size: int = field(default=512, metadata={"help": "Items of a step, over all processes."})
    tokenizer_passes: int = field(
        default=1, metadata={"help": "Passes over the catalogue in an epoch of the item tokenizer."}
    )
    final_epochs: float = field(
        default=100.0,
        metadata={"help": "Most epochs of the last phase, in which the best codes stay; 0 leaves it out."},
    )
    final_learning_rate: float = field(default=5e-4, metadata={"help": "Of the last phase; cosine without warm-up."})
    final_patience: int = field(
        default=10, metadata={"help": "The last phase stops after so many evaluations without a better result."}
    )

    def __post_init__(self) -> None:
        """Refuses what can't work before anything is loaded."""
        super().__post_init__()
        choices_of = (
            ("sia_distance_sign", DISTANCE_SIGNS),
            ("sia_recursion", RECURSIONS),
            ("uniqueness", UNIQUENESS),
        )
        for name, choices in choices_of:
            if getattr(self, name) not in choices:
                raise SettingsError(f"{name} is {getattr(self, name)!r}; choose one of {choices}")
        if self.cycle < 2:
            raise SettingsError(
                f"cycle is {self.cycle}: a cycle has one epoch of the item tokenizer and at least one of the"
                " recommender, so 2 or more; train_tokenizer: false leaves the item tokenizer as it is"
            )
        positive = (
            *("psa_temperature", "counter_size", "tokenizer_learning_rate", "tokenizer_batch_size"),
            *("tokenizer_passes", "final_learning_rate"),
        )
        at_least_0 = (
            *("sia_weight", "psa_weight", "alignment_warmup_epochs", "tokenizer_weight_decay"),
            *("final_epochs", "final_patience"),
        )
        for name in positive:
            if getattr(self, name) <= 0:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in at_least_0:
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must not be negative")
        tasks = list(read_tasks(self.tasks))
        if tasks != [NEXT_ITEM]:
            raise SettingsError(
                f"tasks are {tasks}: while codes change only {NEXT_ITEM!r} is trained. Fine-tune the result on the"
                " others with recipes/finetune.py"
            )
        if self.chat:
            raise SettingsError("chat is true: joint training takes plain prompts, so leave it out")
