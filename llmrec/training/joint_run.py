"""From a data set to a saved recommender whose codes were learned with it: what `recipes/train_joint.py` runs.

Pre-trained item tokenizer, joint phase (`joint`), last phase with the codes of the best epoch for good, evaluation,
folder. Data, models, evaluation and saving are those of fine-tuning (`finetune`), and so is the recommender that comes
out.
"""

import copy
import logging
import math
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from llmrec.data.interactions import InteractionDataset
from llmrec.data.splits import DatasetSplits
from llmrec.embeddings.base import ItemEmbeddings
from llmrec.errors import SettingsError
from llmrec.evaluation.evaluator import EvaluationResult
from llmrec.files import atomic_file
from llmrec.item_tokenizers.base import QuantizedItems
from llmrec.item_tokenizers.fitting import FitSettings, embeddings_of
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.item_tokenizers.trainable import trainable_tokenizer
from llmrec.item_tokenizers.trained import TrainedTokenizer
from llmrec.processes import Processes
from llmrec.recommender import Recommender
from llmrec.tasks.next_item import training_samples
from llmrec.training.arguments import ModelArguments
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
from llmrec.training.joint import JointSchedule, JointTrainer
from llmrec.training.joint_arguments import JointArguments
from llmrec.training.joint_report import write_history, write_joint_report
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
    settings = _embedding_settings(arguments)
    with state.main_process_first(), loaded_whole():
        splits = prepare_data(arguments)
        fitted = prepare_item_codes(arguments, splits.dataset, item_codes_folder(training))
        embeddings = _embeddings(settings, splits.dataset, item_codes_folder(training))
        model_arguments = prepare_base_model(training, model_arguments, splits)
    item_tokenizer = _item_tokenizer(fitted, embeddings, arguments, training)
    codes = ItemCodes(make_unique(item_tokenizer.quantize(), arguments), item_tokenizer.tokenizer, fitted.source)
    recommender = untrained_recommender(arguments, training, model_arguments, splits, codes)
    trainer = joint_trainer(recommender, item_tokenizer, splits, arguments, training)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    recommender.model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    item_tokenizer.module.cpu().eval()
    output_folder = Path(str(training.output_dir))
    if trainer.records and state.is_main_process:
        best = trainer.best_record
        write_joint_report(
            output_folder / REPORT_FILE,
            trainer.records,
            title=f"Joint training of {type(item_tokenizer.tokenizer).__name__} and {fitted.source}",
            best_epoch=None if best is None else best["epoch"],
        )
    codes = ItemCodes(recommender.semantic_ids, item_tokenizer.tokenizer, fitted.source)
    last: RankingTrainer = trainer
    if arguments.final_epochs > 0:
        last = _train_final(recommender, trainer, splits, codes, arguments, model_arguments)
    described = _described(trainer, arguments)
    return finish(
        recommender, last, splits, codes, arguments, training, model_arguments, push=push, described=described
    )


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
    epochs = math.ceil(training.num_train_epochs)
    return JointTokenizer(
        tokenizer,
        embeddings,
        TokenizerTraining(
            learning_rate=arguments.tokenizer_learning_rate,
            weight_decay=arguments.tokenizer_weight_decay,
            batch_size=arguments.tokenizer_batch_size,
            passes=arguments.tokenizer_passes,
            num_epochs=_schedule(arguments).num_tokenizer_epochs(epochs),
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


def _embeddings(settings: FitSettings, dataset: InteractionDataset, folder: Path) -> dict[str, ItemEmbeddings]:
    return embeddings_of(settings, dataset, folder)


def _train_final(
    recommender: Recommender,
    joint: JointTrainer,
    splits: DatasetSplits,
    codes: ItemCodes,
    arguments: JointArguments,
    model_arguments: ModelArguments,
) -> RankingTrainer:
    """Trains the recommender on with the codes of the best epoch: L_REC alone, its own learning rate, no warm-up.

    DeepSpeed and FSDP can't be begun a second time on one model: there, the weights go on in a new one.
    """
    final = copy.copy(joint.args)
    final.output_dir = str(Path(str(joint.args.output_dir)) / FINAL_FOLDER)
    final.num_train_epochs = arguments.final_epochs
    final.learning_rate, final.lr_scheduler_type, final.warmup_steps = arguments.final_learning_rate, "cosine", 0
    of_final = copy.copy(arguments)
    of_final.early_stopping_patience = arguments.final_patience if final.metric_for_best_model else 0
    file = None
    if joint.is_deepspeed_enabled or joint.is_fsdp_enabled:
        file = Path(str(joint.args.output_dir)) / JOINT_WEIGHTS_FILE
        weights = trained_parameters(joint.model_wrapped, joint.accelerator)
        if joint.accelerator.is_main_process:
            with atomic_file(file) as temporary:
                save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary)
        joint.accelerator.wait_for_everyone()
        _let_go(joint)
        recommender.model = untrained_recommender(arguments, final, model_arguments, splits, codes).model
    last = train(recommender, splits, final, of_final, start_from=file)
    recommender.model = last.accelerator.unwrap_model(last.model, keep_torch_compile=False)
    return last


def _let_go(trainer: JointTrainer) -> None:
    """Frees the engine of a training that is over, and the hooks that it has in modules."""
    engine: Any = trainer.model_wrapped
    if trainer.is_deepspeed_enabled:
        engine.destroy()
    trainer.accelerator.free_memory()


def _described(trainer: JointTrainer, arguments: JointArguments) -> dict[str, Any]:
    described: dict[str, Any] = {"joint_epochs": round(float(trainer.state.epoch or 0), 2)}
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
