"""What a fine-tuning run can be told besides the Trainer's settings: data, codes, prompt, evaluation, model."""

from dataclasses import dataclass, field

from trl import ModelConfig

from llmrec.errors import SettingsError
from llmrec.tasks.next_item import DEFAULT_TEMPLATE, FORMS
from llmrec.tiny_model import TINY_LLAMA

SPLITS = ("validation", "test")


@dataclass
class FinetuneArguments:
    """Settings of a fine-tuning run that are neither the model's nor the Trainer's."""

    dataset: str = field(
        default="synthetic",
        metadata={
            "help": "'synthetic', a .csv, .tsv, .jsonl or .parquet file, a folder in the LETTER layout, a data set"
            " that `llmrec data` saved, or 'hub:<name>'."
        },
    )
    items: str | None = field(default=None, metadata={"help": "File of the items, where `dataset` is a file."})
    k_core: int = field(
        default=0, metadata={"help": "Keep users and items with at least so many interactions; 0 keeps all."}
    )
    item_tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "A settings file of tokenizers/ (fitted here), a folder that tokenizers/fit.py wrote, or a"
            " published X.index.json with the codes of the items."
        },
    )
    template: str = field(
        default=DEFAULT_TEMPLATE, metadata={"help": "The prompt, with {history} where the items' codes belong."}
    )
    max_history: int = field(default=20, metadata={"help": "The latest items of a history that a prompt shows."})
    sample_form: str = field(
        default="history",
        metadata={
            "help": "'history' reads a sequence once and learns all its items; 'prefix' makes one sample an item.",
            "choices": list(FORMS),
        },
    )
    evaluation_split: str = field(
        default="test", metadata={"help": "The examples that are reported.", "choices": list(SPLITS)}
    )
    evaluation_examples: int | None = field(
        default=None, metadata={"help": "Report on a random part of so many examples; all by default."}
    )
    validation_examples: int | None = field(
        default=None,
        metadata={"help": "The validation loss is that of a random part of so many examples; all by default."},
    )
    sasrec: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a saved SASRec to compare with. By default the one that the item tokenizer's settings"
            " had trained, if they had."
        },
    )
    num_printed: int = field(default=5, metadata={"help": "Recommendations printed at the end, for one user."})
    merge: bool = field(
        default=False,
        metadata={"help": "Save the whole model, LoRA and rows merged into it, in place of an adapter."},
    )

    def __post_init__(self) -> None:
        """Refuses what can't work before anything is loaded."""
        for name, choices in (("sample_form", FORMS), ("evaluation_split", SPLITS)):
            if getattr(self, name) not in choices:
                raise SettingsError(f"{name} is {getattr(self, name)!r}; choose one of {choices}")
        if self.item_tokenizer is None:
            raise SettingsError(
                "item_tokenizer is not set: name a settings file (tokenizers/synthetic/letter.yaml), a folder that"
                " tokenizers/fit.py wrote, or an index file"
            )


@dataclass
class ModelArguments(ModelConfig):
    """TRL's model settings; LoRA on all linear layers is the default, and the model a tiny one built on the spot."""

    model_name_or_path: str | None = field(
        default=TINY_LLAMA,
        metadata={"help": "A Hub ID, a folder, 'package:<Python package>', or 'tiny-llama', built on the spot."},
    )
    use_peft: bool = field(default=True, metadata={"help": "Train LoRA and the code rows; else the whole model."})
    lora_r: int = field(default=8, metadata={"help": "Rank of LoRA (LC-Rec and LETTER: 8)."})
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Modules that get LoRA; the head never does."}
    )

    def __post_init__(self) -> None:
        """Checks combinations before the model is loaded."""
        super().__post_init__()
        if (self.load_in_4bit or self.load_in_8bit) and not self.use_peft:
            raise SettingsError("a base of 4 or 8 bits can't be trained whole: set use_peft")
        if self.lora_modules_to_save:
            raise SettingsError("lora_modules_to_save must stay empty: the code rows are trained as they are")
