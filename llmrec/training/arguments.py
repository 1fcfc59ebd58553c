"""What a fine-tuning run can be told besides the Trainer's settings: data, codes, prompt, evaluation, model."""

from dataclasses import dataclass, field

from trl import ModelConfig

from llmrec.errors import SettingsError
from llmrec.tasks.next_item import DEFAULT_TEMPLATE, FORMS
from llmrec.tasks.registry import NEXT_ITEM, TASKS, read_tasks
from llmrec.tasks.source import DEFAULT_MAX_TEXT_TOKENS
from llmrec.tiny_model import TINY_LLAMA
from llmrec.training.row_initialization import CODE_INITS

SPLITS = ("validation", "test")
SPLIT_METHODS = ("leave_one_out", "by_time")
TRAINED = ("lora", "rows", "full")


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
    users: str | None = field(
        default=None, metadata={"help": "File with columns of the users (user_id, preferences), if there are any."}
    )
    k_core: int = field(
        default=0, metadata={"help": "Keep users and items with at least so many interactions; 0 keeps all."}
    )
    split: str = field(
        default="leave_one_out",
        metadata={
            "help": "'leave_one_out': each user's last two items are validation and test; 'by_time': what comes after"
            " two moments that hold for all users.",
            "choices": list(SPLIT_METHODS),
        },
    )
    split_fractions: list[float] = field(
        default_factory=lambda: [0.8, 0.1, 0.1],
        metadata={"help": "Shares of the interactions for training, validation and test, in the split 'by_time'."},
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
    vary_template: bool = field(
        default=False,
        metadata={
            "help": "Training samples of the next item draw one of many templates, anew each epoch; recommending uses"
            " `template`."
        },
    )
    chat: bool = field(
        default=False,
        metadata={"help": "Prompts are the user's turn of the model's chat template; needs sample_form: prefix."},
    )
    tasks: list[str] = field(
        default_factory=lambda: [NEXT_ITEM],
        metadata={
            "help": f"What is trained, of {', '.join(TASKS)}; with a weight after a colon, such as item_to_codes:0.5."
        },
    )
    title_column: str = field(default="title", metadata={"help": "Column of the items with their titles."})
    description_column: str = field(default="description", metadata={"help": "Column of the items: descriptions."})
    queries_column: str = field(
        default="queries", metadata={"help": "Column of the items: a text or texts that somebody would search it by."}
    )
    preferences_column: str = field(
        default="preferences",
        metadata={"help": "Column of the users: texts of what they like, from training interactions alone."},
    )
    max_text_tokens: int = field(
        default=DEFAULT_MAX_TEXT_TOKENS, metadata={"help": "Titles, descriptions, ... are cut there."}
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
    validation_recommendations: int = field(
        default=0,
        metadata={
            "help": "Each evaluation during training also recommends for so many validation examples and reports"
            " NDCG@10 and Recall@10, for metric_for_best_model: ndcg@10. 0: the loss alone."
        },
    )
    early_stopping_patience: int = field(
        default=0,
        metadata={"help": "Stop after so many evaluations without a better metric_for_best_model; 0: never."},
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
        choices_of = (("sample_form", FORMS), ("evaluation_split", SPLITS), ("split", SPLIT_METHODS))
        for name, choices in choices_of:
            if getattr(self, name) not in choices:
                raise SettingsError(f"{name} is {getattr(self, name)!r}; choose one of {choices}")
        read_tasks(self.tasks)
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
        metadata={
            "help": "A Hub ID, a folder, 'package:<Python package>', or a model built on the spot from random weights:"
            " 'tiny-llama', 'letter-tiger' and 'etegrec', the T5s of LETTER-TIGER and ETEGRec."
        },
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Type of the base's weights. By default that of the computation (bf16, fp16) for weights that are"
            " frozen, float32 for weights that are trained.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    trained: str = field(
        default="lora",
        metadata={
            "help": "What learns: 'lora' (LoRA layers and the rows of the code tokens), 'rows' (these rows alone) or"
            " 'full' (every weight).",
            "choices": list(TRAINED),
        },
    )
    code_init: str = field(
        default="mean",
        metadata={
            "help": "Where the rows of the code tokens start: 'mean' (of the base rows, with noise), 'titles' (of the"
            " items that carry the code) or 'codebook' (the code's vector, mapped by a fitted projection).",
            "choices": list(CODE_INITS),
        },
    )
    use_peft: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "TRL's name for `trained: lora`; left out, or in agreement with it."}
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of LoRA (LC-Rec and LETTER: 8)."})
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Modules that get LoRA; the head never does."}
    )

    def __post_init__(self) -> None:
        """Checks combinations before the model is loaded."""
        for name, choices in (("trained", TRAINED), ("code_init", CODE_INITS)):
            if getattr(self, name) not in choices:
                raise SettingsError(f"{name} is {getattr(self, name)!r}; choose one of {choices}")
        if self.use_peft is not None and self.use_peft is not (self.trained == "lora"):
            raise SettingsError(
                f"use_peft is {self.use_peft} but trained is {self.trained!r}: leave use_peft out, and set trained to"
                f" one of {TRAINED}"
            )
        self.use_peft = self.trained == "lora"
        if self.load_in_4bit and self.load_in_8bit:
            raise SettingsError("load_in_4bit and load_in_8bit are both set: choose one")
        super().__post_init__()
        if (self.load_in_4bit or self.load_in_8bit) and self.trained == "full":
            raise SettingsError("a base of 4 or 8 bits can't be trained whole: set trained to 'lora' or 'rows'")
        if self.lora_modules_to_save:
            raise SettingsError("lora_modules_to_save must stay empty: the code rows are trained as they are")
