"""Settings that don't go together, refused before anything is loaded.

Every entry would fail late (after the model and the data were loaded), be ignored without a word, or train something
other than what was asked for. What a single setting may be is checked where it is defined; transformers' own
`TrainingArguments` refuses some combinations itself. What only the model can say (whether it takes packed rows) is
checked where the model is loaded.
"""

import importlib.util
import os
from collections.abc import Iterator
from typing import Any, cast

import torch
from transformers import Trainer, get_scheduler
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from llmrec.errors import SettingsError
from llmrec.pretrained import auto_model_class, resolve_pretrained
from llmrec.tiny_model import ETEGREC, LETTER_TIGER, is_built_in
from llmrec.training.arguments import FinetuneArguments, ModelArguments
from llmrec.training.checkpoint_files import check_whole
from llmrec.training.checkpoints import LATEST
from llmrec.training.config import RecFinetuneConfig

LOSS_METRICS = ("loss", "perplexity")
ITEM_METRICS = ("ndcg@10", "recall@10")
# Tracker -> the package that it is installed by.
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"} | {
    "clearml": "clearml",
    "codecarbon": "codecarbon",
    "comet_ml": "comet-ml",
    "dvclive": "dvclive",
    "swanlab": "swanlab",
}


def check_settings(arguments: FinetuneArguments, training: RecFinetuneConfig, model_arguments: ModelArguments) -> None:
    """Refuses settings that don't go together.

    Args:
        arguments: Of data, tasks and evaluation.
        training: Of the trainer.
        model_arguments: Of the model.

    Raises:
        SettingsError: The message has one line for each of them: what is set, why it can't work, what to do.
        MissingPartError: `resume_from_checkpoint` names a folder that is not a whole checkpoint.
    """
    problems = [
        *_wrong_precision(training, model_arguments),
        *_wrong_engine(training, model_arguments),
        *_wrong_batches(arguments, training),
        *_wrong_schedule(training),
        *_wrong_evaluation(arguments, training),
        *_wrong_trackers(training),
    ]
    if problems:
        raise SettingsError("\n".join(problems))
    checkpoint = training.resume_from_checkpoint
    if isinstance(checkpoint, str) and checkpoint != LATEST:
        check_whole(checkpoint)


def is_item_metric(name: str | None) -> bool:
    """Whether a metric to choose the best model by comes from decoding ("ndcg@10"), with or without "eval_"."""
    return name is not None and name.removeprefix("eval_") in ITEM_METRICS


def _wrong_precision(training: RecFinetuneConfig, model_arguments: ModelArguments) -> Iterator[str]:
    bits = "load_in_4bit" if model_arguments.load_in_4bit else "load_in_8bit" if model_arguments.load_in_8bit else None
    if bits is not None and importlib.util.find_spec("bitsandbytes") is None:
        yield f"{bits} is set, but bitsandbytes is not installed: pip install 'llmrec[quantization]', or leave it out"
    if training.fp16 and training.use_cpu:
        yield "fp16 is true and use_cpu is true: CPUs don't train in float16; set bf16: true instead of fp16"
    if training.fp16_full_eval or training.bf16_full_eval:
        name = "fp16_full_eval" if training.fp16_full_eval else "bf16_full_eval"
        yield (
            f"{name} is true, but an evaluation is computed as the training is, so that its loss can be compared; set"
            f" it to false, and {name[:4]}: true for both"
        )
    if training.bf16 and model_arguments.dtype == "float16":
        yield (
            "bf16 is true and dtype is 'float16': the base would be rounded to one type and computed in another; set"
            " dtype to 'bfloat16', or leave it out"
        )
    if training.fp16 and model_arguments.dtype == "bfloat16":
        yield (
            "fp16 is true and dtype is 'bfloat16': the base would be rounded to one type and computed in another; set"
            " bf16: true instead of fp16"
        )


def _wrong_engine(training: RecFinetuneConfig, model_arguments: ModelArguments) -> Iterator[str]:
    if training.deepspeed and importlib.util.find_spec("deepspeed") is None:
        yield "deepspeed is set, but the package is not installed: pip install 'llmrec[deepspeed]', or leave it out"
    if training.n_gpu > 1:
        yield (
            f"this one process sees {training.n_gpu} GPUs, which transformers would join by DataParallel: the head"
            " can't be told there which positions to read; start with `accelerate launch --config_file"
            " accelerate_configs/ddp.yaml`, or set CUDA_VISIBLE_DEVICES to one of them"
        )
    sharded = _sharded_by(training)
    if sharded is None:
        return
    if model_arguments.load_in_8bit:
        yield (
            f"load_in_8bit is true under {sharded}: weights of 8 bits are integers with scales beside them, and can't"
            " be shared out; set load_in_4bit with bnb_4bit_quant_storage: bfloat16, or launch with"
            " accelerate_configs/ddp.yaml"
        )
    storage = str(model_arguments.bnb_4bit_quant_storage or "uint8").removeprefix("torch.")
    if model_arguments.load_in_4bit and storage not in ("bfloat16", "float16", "float32"):
        yield (
            f"load_in_4bit is true under {sharded} and bnb_4bit_quant_storage is {storage}: only weights that are"
            " stored as floating-point numbers can be shared out; set bnb_4bit_quant_storage: bfloat16"
        )
    if sharded == "FSDP" and _is_encoder_decoder(model_arguments):
        yield (
            f"model_name_or_path is {model_arguments.model_name_or_path!r}, an encoder-decoder, and the engine is"
            " FSDP: encoder and decoder read one embedding, which FSDP can't share out; launch with"
            " accelerate_configs/ddp.yaml or deepspeed_zero3.yaml"
        )
    if training.save_on_each_node:
        yield (
            f"save_on_each_node is true under {sharded}: what is trained is gathered on one process only; set it to"
            " false, and let output_dir be on a disk that all machines share"
        )


def _is_encoder_decoder(model_arguments: ModelArguments) -> bool:
    from transformers import AutoModelForSeq2SeqLM

    name = str(model_arguments.model_name_or_path)
    if is_built_in(name):
        return name in (ETEGREC, LETTER_TIGER)
    source = resolve_pretrained(name)
    if source.gguf_file is not None:
        return False
    place = {"revision": model_arguments.model_revision} if source.is_hub_id else {}
    return auto_model_class(source.path, **place) is AutoModelForSeq2SeqLM


def _sharded_by(training: RecFinetuneConfig) -> str | None:
    """The engine that shares the weights out over processes, if one does."""
    plugin = training.deepspeed_plugin
    if plugin is not None and int(plugin.zero_stage) == 3:
        return "ZeRO-3"
    by_launcher = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes", "y", "on", "t")
    return "FSDP" if by_launcher or training.fsdp_plugin_args is not None else None


def _wrong_batches(arguments: FinetuneArguments, training: RecFinetuneConfig) -> Iterator[str]:
    if training.auto_find_batch_size:
        yield (
            "auto_find_batch_size is true, but the rows of every step are planned for per_device_train_batch_size;"
            " set it to false, halve per_device_train_batch_size and double gradient_accumulation_steps: the steps"
            " stay the same"
        )
    if training.dataloader_drop_last:
        yield (
            "dataloader_drop_last is true: the planned steps are full without it, and an evaluation would lose its"
            " last examples; set it to false"
        )
    if training.ignore_data_skip:
        yield (
            "ignore_data_skip is true: a run that is resumed would train on the first rows of its epoch again; set it"
            " to false (skipping reads nothing but the plan)"
        )
    loading = training.accelerator_config
    for name in ("split_batches", "dispatch_batches"):
        if getattr(loading, name, None):
            yield (
                f"accelerator_config has {name}: true, but the rows of every process are planned already; leave it out"
            )
    if arguments.sample_form != "history" or "next_item" not in [name.partition(":")[0] for name in arguments.tasks]:
        return
    if arguments.chat:
        yield (
            "sample_form is 'history' and chat is true: the assistant's turn stands between a history and its next"
            " item, and can't stand inside a sequence that is read once; set sample_form: prefix"
        )
    if not arguments.template.endswith("{history}"):
        yield (
            f"sample_form is 'history' and template is {arguments.template!r}: the text after {{history}} can't stand"
            " inside a sequence that is read once; let the template end with {history}, or set sample_form: prefix"
        )


def _wrong_schedule(training: RecFinetuneConfig) -> Iterator[str]:
    """Tries the schedule and the optimizer on one weight; the Trainer makes them when all else is loaded."""
    try:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
        get_scheduler(
            training.lr_scheduler_type,
            optimizer,
            num_warmup_steps=training.get_warmup_steps(100),
            num_training_steps=100,
            scheduler_specific_kwargs=dict(cast(dict[str, Any], training.lr_scheduler_kwargs or {})),
        )
    except (TypeError, ValueError, KeyError) as error:
        yield (
            f"lr_scheduler_type is {_name(training.lr_scheduler_type)!r} and lr_scheduler_kwargs is"
            f" {training.lr_scheduler_kwargs}, which don't fit: {error}; set what it needs in lr_scheduler_kwargs, or"
            " choose another schedule"
        )
    name = _name(training.optim)
    if name.startswith(("galore", "apollo", "lomo", "adalomo")):  # these are made of the model
        return
    try:
        Trainer.get_optimizer_cls_and_kwargs(training)
    except (ImportError, ValueError) as error:
        yield f"optim is {name!r}, which can't be made: {error}; install what it needs, or set optim: adamw_torch"


def _name(choice: Any) -> str:
    """Of one of transformers' choices, as a settings file writes it."""
    return str(getattr(choice, "value", choice))


def _wrong_evaluation(arguments: FinetuneArguments, training: RecFinetuneConfig) -> Iterator[str]:
    evaluates = training.eval_strategy != IntervalStrategy.NO
    best_by, chooses = training.metric_for_best_model, training.load_best_model_at_end
    if arguments.validation_recommendations < 0 or arguments.early_stopping_patience < 0:
        yield (
            f"validation_recommendations is {arguments.validation_recommendations} and early_stopping_patience is"
            f" {arguments.early_stopping_patience}; neither can be below 0"
        )
    if arguments.early_stopping_patience and not (evaluates and chooses):
        yield (
            f"early_stopping_patience is {arguments.early_stopping_patience}, with eval_strategy"
            f" {_name(training.eval_strategy)!r} and load_best_model_at_end {chooses}: without evaluations there is"
            " nothing to be patient about, and without the second the model returned would be the last, not the best;"
            " set eval_strategy, save_strategy (both 'steps' or 'epoch') and load_best_model_at_end: true"
        )
    if chooses and training.save_strategy == SaveStrategy.STEPS and training.save_steps != training.eval_steps:
        yield (
            f"load_best_model_at_end is true with eval_steps {training.eval_steps} and save_steps"
            f" {training.save_steps}: the best step may be one that was not saved; set them equal, or save_strategy:"
            " best"
        )
    if best_by is None:
        return
    name = best_by.removeprefix("eval_")
    if name not in (*LOSS_METRICS, *ITEM_METRICS):
        yield (
            f"metric_for_best_model is {best_by!r}, which no evaluation gives; choose one of"
            f" {', '.join((*LOSS_METRICS, *ITEM_METRICS))}"
        )
        return
    if is_item_metric(best_by) and not arguments.validation_recommendations:
        yield (
            f"metric_for_best_model is {best_by!r} and validation_recommendations is 0, so nothing is recommended in"
            " an evaluation; set validation_recommendations to a number of examples (1000), or metric_for_best_model:"
            " loss"
        )
    if training.greater_is_better is not None and training.greater_is_better is not is_item_metric(best_by):
        better = "greater" if is_item_metric(best_by) else "smaller"
        yield (
            f"metric_for_best_model is {best_by!r} and greater_is_better is {training.greater_is_better}, but a"
            f" {better} {name} is better; leave greater_is_better out"
        )


def _wrong_trackers(training: RecFinetuneConfig) -> Iterator[str]:
    for tracker in training.report_to or ():
        if tracker not in TRACKERS:
            yield f"report_to is {tracker!r}, which is no tracker; choose among {', '.join(sorted(TRACKERS))}, or none"
        elif importlib.util.find_spec(tracker) is None:
            yield (
                f"report_to is {tracker!r}, which is not installed: pip install {TRACKERS[tracker]}, or set report_to:"
                " none"
            )
