"""From a data set to a saved recommender whose codes were learned with it: what `recipes/train_joint.py` runs.

Pre-trained item tokenizer, joint phase (`joint`), last phase with the codes of the best epoch for good, evaluation,
folder. Data, models, evaluation and saving are those of fine-tuning (`finetune`), and so is the recommender that comes
out.
"""

import copy
import dataclasses
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmrec.data.interactions import InteractionDataset
from llmrec.data.splits import DatasetSplits
from llmrec.embeddings.base import ItemEmbeddings
from llmrec.embeddings.sources import COLLABORATIVE
from llmrec.errors import SettingsError
from llmrec.evaluation.evaluator import EvaluationResult
from llmrec.files import atomic_file
from llmrec.item_tokenizers.base import QuantizedItems
from llmrec.item_tokenizers.fitting import FitSettings, embeddings_of
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.item_tokenizers.trainable import trainable_tokenizer
from llmrec.item_tokenizers.trained import TrainedTokenizer
from llmrec.processes import Processes, gathered
from llmrec.recommender import Recommender
from llmrec.tasks.next_item import training_samples
from llmrec.training.arguments import ModelArguments
from llmrec.training.checkpoints import LATEST
from llmrec.training.checks import check_settings
from llmrec.training.config import RecFinetuneConfig
from llmrec.training.finetune import (
    early_stopping,
    finish,
    item_codes_folder,
    prepare_base_model,
    run_reported,
    take_push,
    train,
    untrained_recommender,
    validation_of,
)
from llmrec.training.finetune import parse as parse_with
from llmrec.training.gathering import loaded_whole, trained_parameters
from llmrec.training.joint import JointTrainer
from llmrec.training.joint_arguments import JointArguments
from llmrec.training.joint_report import write_history, write_joint_report
from llmrec.training.joint_schedule import JointSchedule
from llmrec.training.preparation import ItemCodes, prepare_data, prepare_item_codes
from llmrec.training.tokenizer_training import AlignmentSettings, JointTokenizer, TokenizerTraining
from llmrec.training.trainer import RankingTrainer

logger = logging.getLogger(__name__)

HISTORY_FILE = "joint_history.json"
REPORT_FILE = "joint_report.html"
FINAL_FOLDER = "final"
JOINT_WEIGHTS_FILE = "joint_weights.safetensors"


def train_jointly(
    arguments: JointArguments, training: RecFinetuneConfig, model_arguments: ModelArguments
) -> tuple[Recommender, DatasetSplits, list[EvaluationResult]]:
    """Runs all stages and saves the recommender under `output_dir`/recommender.

    Beside it stand `joint_history.json` and its plot `joint_report.html`. `resume_from_checkpoint: latest` goes on
    wherever the run was killed, in either phase.

    Returns:
        The recommender, the split data, and the results; see `finetune`.

    Raises:
        SettingsError: Settings that don't go together.
    """
    from accelerate import PartialState

    check_settings(arguments, training, model_arguments)
    state: PartialState = PartialState()
    push = take_push(arguments, training, model_arguments)
    settings, model_name = _embedding_settings(arguments), model_arguments.model_name_or_path
    with state.main_process_first(), loaded_whole():
        splits = prepare_data(arguments)
        fitted = prepare_item_codes(arguments, splits.dataset, item_codes_folder(training))
        embeddings = _embeddings(settings, splits.dataset, arguments, item_codes_folder(training))
        model_arguments = prepare_base_model(training, model_arguments, splits)
    item_tokenizer = _item_tokenizer(fitted, embeddings, arguments, training)
    _check_embeddings(item_tokenizer, fitted)
    codes = ItemCodes(make_unique(item_tokenizer.quantize(), arguments), item_tokenizer.tokenizer, fitted.source)
    recommender = untrained_recommender(arguments, training, model_arguments, splits, codes)
    trainer = joint_trainer(recommender, item_tokenizer, splits, arguments, training)
    resumed, final_resumed = _resumed_from(training)
    trainer.train(resume_from_checkpoint=resumed)
    recommender.model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    item_tokenizer.module.cpu().eval()
    output_folder = Path(str(training.output_dir))
    if trainer.records and state.is_main_process:
        best = trainer.best_record
        write_joint_report(
            output_folder / REPORT_FILE,
            trainer.records,
            title=f"Joint training of {type(item_tokenizer.tokenizer).__name__} and {model_name}",
            best_epoch=None if best is None else best["epoch"],
        )
    codes = ItemCodes(recommender.semantic_ids, item_tokenizer.tokenizer, fitted.source)
    last: RankingTrainer = trainer
    if arguments.final_epochs > 0:
        last = _train_final(recommender, trainer, splits, codes, arguments, model_arguments, resumed=final_resumed)
    described = _described(trainer, arguments)
    return finish(
        recommender, last, splits, codes, arguments, training, model_arguments, push=push, described=described
    )


def _resumed_from(training: RecFinetuneConfig) -> tuple[str | None, str | None]:
    """What the joint phase and the last one resume from.

    A checkpoint that is named is one of either phase. The joint phase is over where it is of the last one; the last
    one begins anew where it is of the joint phase.
    """
    wanted = training.resume_from_checkpoint
    if wanted is None or wanted == LATEST:
        return wanted, wanted
    final = Path(str(training.output_dir)) / FINAL_FOLDER
    return (LATEST, wanted) if Path(wanted).resolve().parent == final.resolve() else (wanted, None)


def make_unique(quantized: QuantizedItems, arguments: JointArguments) -> SemanticIds:
    """Codes of its own for every item, always of the same codebook sizes."""
    counter_size = arguments.counter_size if arguments.uniqueness == "extra_level" else None
    return quantized.make_unique(arguments.uniqueness, counter_size=counter_size)


def joint_trainer(
    recommender: Recommender,
    item_tokenizer: JointTokenizer,
    splits: DatasetSplits,
    arguments: JointArguments,
    training: RecFinetuneConfig,
) -> JointTrainer:
    """The trainer of the joint phase; its monitoring goes to `joint_history.json`."""
    eval_samples, item_metrics = validation_of(recommender, splits, arguments)
    samples = training_samples(recommender.task, splits.train, form=arguments.sample_form, seed=training.seed)
    history_file = Path(str(training.output_dir)) / HISTORY_FILE
    return JointTrainer(
        recommender,
        training,
        item_tokenizer=item_tokenizer,
        make_unique=lambda quantized: make_unique(quantized, arguments),
        schedule=_schedule(arguments),
        train_dataset=samples,
        eval_dataset=eval_samples,
        item_metrics=item_metrics,
        on_cycle=lambda records: write_history(history_file, records),
        callbacks=early_stopping(arguments),
    )


def _schedule(arguments: JointArguments) -> JointSchedule:
    return JointSchedule(
        cycle=arguments.cycle,
        warmup_epochs=arguments.alignment_warmup_epochs,
        alternate=arguments.alternate,
        train_tokenizer=arguments.train_tokenizer,
    )


def _item_tokenizer(
    fitted: ItemCodes, embeddings: dict[str, ItemEmbeddings], arguments: JointArguments, training: RecFinetuneConfig
) -> JointTokenizer:
    if fitted.tokenizer is None:
        raise SettingsError(
            f"item_tokenizer is {arguments.item_tokenizer!r}: codes alone can't be trained on; name a settings file of"
            " tokenizers/, or the folder of a fitted item tokenizer"
        )
    tokenizer: TrainedTokenizer = trainable_tokenizer(fitted.tokenizer)
    return JointTokenizer(
        tokenizer,
        embeddings,
        TokenizerTraining(
            learning_rate=arguments.tokenizer_learning_rate,
            weight_decay=arguments.tokenizer_weight_decay,
            batch_size=arguments.tokenizer_batch_size,
            passes=arguments.tokenizer_passes,
            max_grad_norm=float(training.max_grad_norm or 0.0),
            seed=training.seed,
        ),
        AlignmentSettings(
            sia_weight=arguments.sia_weight,
            psa_weight=arguments.psa_weight,
            psa_temperature=arguments.psa_temperature,
            recursion=arguments.sia_recursion,
            distance_sign=arguments.sia_distance_sign,
        ),
        Processes.launched(),
    )


def _embedding_settings(arguments: JointArguments) -> FitSettings:
    """The settings file that says where the item tokenizer's embeddings come from."""
    source = arguments.embeddings_from or str(arguments.item_tokenizer)
    if Path(source).suffix not in (".yaml", ".yml"):
        raise SettingsError(
            f"item_tokenizer is {arguments.item_tokenizer!r}, which doesn't say what embeddings it reads: name its"
            " settings file as embeddings_from (such as tokenizers/beauty/etegrec_rq_vae.yaml)"
        )
    return FitSettings.from_yaml(source)


def _embeddings(
    settings: FitSettings, dataset: InteractionDataset, arguments: JointArguments, folder: Path
) -> dict[str, ItemEmbeddings]:
    """What the item tokenizer reads; a collaborative model beside a fitted one is used, and not trained again."""
    fitted = Path(str(arguments.item_tokenizer))
    for name in COLLABORATIVE:
        if (fitted / name).is_dir() and not (folder / name).exists():
            shutil.copytree(fitted / name, folder / name)
    return embeddings_of(settings, dataset, folder)


def _check_embeddings(item_tokenizer: JointTokenizer, fitted: ItemCodes) -> None:
    """Refuses embeddings on which the item tokenizer gives other codes than it once gave.

    The last level isn't compared: uniqueness policies change it.
    """
    now, before = item_tokenizer.quantize().semantic_ids.codes, fitted.semantic_ids.codes
    levels = max(now.shape[1] - 1, 1)
    share = float((now[:, :levels] == before[:, :levels]).all(axis=1).mean())
    if share < 0.5:
        raise SettingsError(
            f"on these embeddings the item tokenizer gives {share:.0%} of the items the codes that it was fitted with:"
            " they are not those that it was fitted on; name its own settings file as embeddings_from"
        )


def _train_final(
    recommender: Recommender,
    joint: JointTrainer,
    splits: DatasetSplits,
    codes: ItemCodes,
    arguments: JointArguments,
    model_arguments: ModelArguments,
    *,
    resumed: str | None,
) -> RankingTrainer:
    """Trains the recommender on with the codes of the best epoch: L_REC alone, its own learning rate, no warm-up.

    DeepSpeed and FSDP can't be begun a second time on one model: there, the weights go on in a new one.
    """
    sharded = joint.is_deepspeed_enabled or joint.is_fsdp_enabled
    file = Path(str(joint.args.output_dir)) / JOINT_WEIGHTS_FILE
    if sharded:
        weights = trained_parameters(joint.model_wrapped, joint.accelerator)
        if joint.accelerator.is_main_process:
            with atomic_file(file) as temporary:
                save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary)
        joint.accelerator.wait_for_everyone()
        _let_go(joint)
    # Settings are made, not copied: accelerate takes one engine a process, and what it knows of it begins anew with
    # them; so do the settings of DeepSpeed, into which the first training has written its own.
    final = dataclasses.replace(
        joint.args,
        output_dir=str(Path(str(joint.args.output_dir)) / FINAL_FOLDER),
        num_train_epochs=arguments.final_epochs,
        learning_rate=arguments.final_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0,
        resume_from_checkpoint=resumed,
    )
    of_final = copy.copy(arguments)
    of_final.early_stopping_patience = arguments.final_patience if final.metric_for_best_model else 0
    if sharded:
        recommender.model = untrained_recommender(arguments, final, model_arguments, splits, codes).model
        _overwrite(recommender.model, load_file(file))
    last = train(recommender, splits, final, of_final)
    recommender.model = last.accelerator.unwrap_model(last.model, keep_torch_compile=False)
    return last


def _overwrite(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts weights into a model that no engine has yet; ZeRO-3 may share it out already. All processes call it."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            with gathered([parameters[name]], modify=True):
                parameters[name].copy_(tensor)


def _let_go(trainer: JointTrainer) -> None:
    """Frees the engine of a training that is over, with the model that is in it."""
    trainer.accelerator.free_memory()
    parts = ("model", "model_wrapped", "optimizer", "lr_scheduler")
    for holder in (trainer, trainer.callback_handler):
        for name in parts:
            if hasattr(holder, name):
                setattr(holder, name, None)


def _described(trainer: JointTrainer, arguments: JointArguments) -> dict[str, Any]:
    described: dict[str, Any] = {
        "joint_epochs": round(float(trainer.state.epoch or 0), 2),
        "joint_learning_rate": trainer.args.learning_rate,
    }
    if arguments.train_tokenizer:
        described |= {"sia_weight": arguments.sia_weight, "psa_weight": arguments.psa_weight}
        described |= {"cycle": arguments.cycle} if arguments.alternate else {"alternate": False}
    return described


def parse(command_line: list[str]) -> tuple[JointArguments, RecFinetuneConfig, ModelArguments]:
    """Settings from a command line and its `--config` file; see `finetune.parse`."""
    return parse_with(command_line, arguments_class=JointArguments, program="train_joint")


def run(command_line: list[str]) -> None:
    """Parses a command line, runs `train_jointly`, prints results and recommendations; see `finetune.run`."""
    run_reported(train_jointly, lambda: parse(command_line))


if __name__ == "__main__":
    import sys

    run(sys.argv[1:])
