"""From a data set to a saved recommender: the stages that `recipes/finetune.py` and `llmrec finetune` run.

Data and item codes (`preparation`), model (`model`), tasks, training, evaluation, folder. Every stage is a function of
its own. Under several processes the stages that aren't distributed run on the main one first; the others read its
files.
"""

import copy
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback

from llmrec.data.splits import DatasetSplits
from llmrec.embeddings.collaborative import SASRec
from llmrec.errors import SettingsError
from llmrec.evaluation.baselines import PopularityRecommender
from llmrec.evaluation.evaluator import EvaluationResult, evaluate_both, save_results
from llmrec.generation.trie import ItemTrie
from llmrec.pretrained import resolve_pretrained
from llmrec.processes import is_sharded
from llmrec.recommender import Recommender
from llmrec.recommender_folder import RecommenderConfig
from llmrec.tasks.base import TaskSamples
from llmrec.tasks.item_search import DEFAULT_HISTORY_SEARCH_TEMPLATE, DEFAULT_SEARCH_TEMPLATE
from llmrec.tasks.item_search import NAME as SEARCH
from llmrec.tasks.next_item import TEMPLATES, NextItemSamples, NextItemTask, evaluation_samples
from llmrec.tasks.registry import build_samples, check_columns, read_tasks
from llmrec.tasks.source import TextColumns
from llmrec.tiny_model import build, is_built_in
from llmrec.training.arguments import FinetuneArguments, ModelArguments
from llmrec.training.checks import check_settings
from llmrec.training.config import RecFinetuneConfig
from llmrec.training.gathering import loaded_whole, rebuilt_whole
from llmrec.training.item_metrics import ItemMetrics
from llmrec.training.model import prepare_model
from llmrec.training.preparation import ItemCodes, prepare_data, prepare_item_codes
from llmrec.training.trainer import RankingTrainer
from llmrec.vocabulary import CodeVocabulary

logger = logging.getLogger(__name__)

ITEM_TOKENIZER_STAGE = "item_codes"
RECOMMENDER_FOLDER = "recommender"
RESULTS_FILE = "results.json"


def finetune(
    arguments: FinetuneArguments, training: RecFinetuneConfig, model_arguments: ModelArguments
) -> tuple[Recommender, DatasetSplits, list[EvaluationResult]]:
    """Runs all stages and saves the recommender under `output_dir`/recommender.

    `push_to_hub` (with `hub_model_id`, `hub_private_repo`, `hub_token`) pushes the recommender, once, at the end.

    Returns:
        The recommender (where processes share a model out, whole on the main one and around their share on the
        others), the split data, and the results.

    Raises:
        SettingsError: Settings that don't go together; an adapter is to be pushed whose base model only this machine
            has.
    """
    from accelerate import PartialState

    check_settings(arguments, training, model_arguments)
    state: PartialState = PartialState()
    push = take_push(arguments, training, model_arguments)
    with state.main_process_first(), loaded_whole():
        splits = prepare_data(arguments)
        check_columns(arguments.tasks, splits.dataset, _columns(arguments))
        codes = prepare_item_codes(arguments, splits.dataset, item_codes_folder(training))
        model_arguments = prepare_base_model(training, model_arguments, splits)
    recommender = untrained_recommender(arguments, training, model_arguments, splits, codes)
    trainer = train(recommender, splits, training, arguments)
    return finish(recommender, trainer, splits, codes, arguments, training, model_arguments, push=push)


def take_push(arguments: FinetuneArguments, training: RecFinetuneConfig, model_arguments: ModelArguments) -> bool:
    """Whether the result is to be pushed; the Trainer, which would push checkpoints, is told that it isn't.

    Raises:
        SettingsError: An adapter would be pushed whose base model only this machine has.
    """
    push, training.push_to_hub = bool(training.push_to_hub), False
    base = str(model_arguments.model_name_or_path)
    if (
        push
        and not arguments.merge
        and model_arguments.trained != "full"
        and (is_built_in(base) or Path(base).is_dir())
    ):
        raise SettingsError(f"push_to_hub of an adapter on {base!r}, which nobody else has: set merge as well")
    return push


def item_codes_folder(training: RecFinetuneConfig) -> Path:
    """Where the item tokenizer of a run is kept."""
    return Path(str(training.output_dir)) / ITEM_TOKENIZER_STAGE


def prepare_base_model(
    training: RecFinetuneConfig, model_arguments: ModelArguments, splits: DatasetSplits
) -> ModelArguments:
    """Builds a built-in base model under the output folder, on the main process; the settings then name its folder."""
    from accelerate import PartialState

    state: PartialState = PartialState()
    base = str(model_arguments.model_name_or_path)
    if not is_built_in(base):
        return model_arguments
    folder = Path(str(training.output_dir)) / "base_model"
    if state.is_main_process:  # always anew: of another data set or seed it would be another model
        build(base, splits.dataset.titles, folder, seed=training.seed)
    return dataclasses.replace(model_arguments, model_name_or_path=str(folder))


def finish(
    recommender: Recommender,
    trainer: RankingTrainer,
    splits: DatasetSplits,
    codes: ItemCodes,
    arguments: FinetuneArguments,
    training: RecFinetuneConfig,
    model_arguments: ModelArguments,
    *,
    push: bool,
    described: dict[str, Any] | None = None,
) -> tuple[Recommender, DatasetSplits, list[EvaluationResult]]:
    """Evaluates what was trained, saves it, and pushes it where that is wanted. All processes call it.

    Args:
        recommender: With the trainer's model.
        trainer: After the training.
        splits: Its data.
        codes: Of the recommender, and what made them.
        arguments: Of data and evaluation.
        training: Of the run; its output folder gets results and recommender.
        model_arguments: Of the model.
        push: Whether to push.
        described: Further settings for the model card.

    Returns:
        As `finetune`.
    """
    from accelerate import PartialState

    state: PartialState = PartialState()
    output_folder = Path(str(training.output_dir))
    recommender.model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    settings = {**_describe_training(trainer, codes, arguments, model_arguments), **(described or {})}
    recommender.config = dataclasses.replace(recommender.config, training=settings)
    trained_sasrec = output_folder / ITEM_TOKENIZER_STAGE / "sasrec"
    sasrec = arguments.sasrec or (trained_sasrec if trained_sasrec.is_dir() else None)
    results = evaluate_all(recommender, splits, arguments, sasrec=sasrec, accelerator=trainer.accelerator)
    metrics = [_metrics_row(result, training) for result in results]
    recommender.config = dataclasses.replace(recommender.config, metrics=metrics)
    whole = recommender
    if is_sharded(recommender.model):
        model = rebuilt_whole(
            trainer.model_wrapped,
            trainer.accelerator,
            lambda: untrained_recommender(arguments, training, model_arguments, splits, codes).model,
        )
        whole = copy.copy(recommender)
        whole.model = model
    if state.is_main_process:
        save_results(output_folder / RESULTS_FILE, results)
        saved = whole.merge() if arguments.merge else whole
        saved.save_pretrained(output_folder / RECOMMENDER_FOLDER)
        if push:
            name = training.hub_model_id or output_folder.name
            url = saved.push_to_hub(name, private=bool(training.hub_private_repo), token=training.hub_token)
            logger.info("pushed to %s", url)
    state.wait_for_everyone()
    return (whole if state.is_main_process else recommender), splits, results


def untrained_recommender(
    arguments: FinetuneArguments,
    training: RecFinetuneConfig,
    model_arguments: ModelArguments,
    splits: DatasetSplits,
    codes: ItemCodes,
) -> Recommender:
    """The recommender that is about to be trained: its model has new rows, and LoRA where it is wanted."""
    model, text_tokenizer, vocabulary = prepare_model(
        model_arguments,
        training,
        codes.semantic_ids,
        titles=splits.dataset.titles,
        item_tokenizer=codes.tokenizer,
    )
    task = NextItemTask(
        text_tokenizer,
        vocabulary,
        codes.semantic_ids,
        template=arguments.template,
        templates=TEMPLATES if arguments.vary_template else (),
        max_history=arguments.max_history,
        chat=arguments.chat,
        encoder_decoder=bool(model.config.is_encoder_decoder),
    )
    config = _config(arguments, training, model_arguments, splits, codes, vocabulary)
    return Recommender(
        model, text_tokenizer, codes.semantic_ids, vocabulary, splits.dataset.items, task, config, codes.tokenizer
    )


def _config(
    arguments: FinetuneArguments,
    training: RecFinetuneConfig,
    model_arguments: ModelArguments,
    splits: DatasetSplits,
    codes: ItemCodes,
    vocabulary: CodeVocabulary,
) -> RecommenderConfig:
    base = str(model_arguments.model_name_or_path)
    search: dict[str, Any] = {}
    if SEARCH in read_tasks(arguments.tasks):
        search = {
            "search_template": DEFAULT_SEARCH_TEMPLATE,
            "search_history_template": DEFAULT_HISTORY_SEARCH_TEMPLATE,
            "max_query_tokens": arguments.max_text_tokens,
        }
    return RecommenderConfig(
        base_model=base,
        base_revision=model_arguments.model_revision if resolve_pretrained(base).is_hub_id else None,
        template=arguments.template,
        chat=arguments.chat,
        max_history=arguments.max_history,
        codebook_sizes=codes.semantic_ids.codebook_sizes,
        first_token_id=vocabulary.first_token_id,
        scope=training.loss_scope,
        dataset=_describe_data(splits),
        **search,
    )


def training_tasks(
    task: NextItemTask, splits: DatasetSplits, arguments: FinetuneArguments, *, seed: int
) -> TaskSamples:
    """The samples of all tasks of a run, of the training part alone."""
    return build_samples(
        arguments.tasks,
        task,
        splits.train,
        form=arguments.sample_form,
        columns=_columns(arguments),
        max_text_tokens=arguments.max_text_tokens,
        seed=seed,
    )


def _columns(arguments: FinetuneArguments) -> TextColumns:
    return TextColumns(
        title=arguments.title_column,
        description=arguments.description_column,
        queries=arguments.queries_column,
        preferences=arguments.preferences_column,
    )


def train(
    recommender: Recommender, splits: DatasetSplits, training: RecFinetuneConfig, arguments: FinetuneArguments
) -> RankingTrainer:
    """Trains a recommender's model, from the beginning or from a checkpoint.

    `resume_from_checkpoint` is a folder, or "latest": the newest whole checkpoint under the output folder, if there is
    one. Each evaluation computes the validation loss, and item metrics where `validation_recommendations` asks for
    them.
    """
    task = recommender.task
    eval_samples, item_metrics = validation_of(recommender, splits, arguments)
    trainer = RankingTrainer(
        recommender.model,
        training,
        vocabulary=recommender.vocabulary,
        text_tokenizer=recommender.text_tokenizer,
        train_dataset=training_tasks(task, splits, arguments, seed=training.seed),
        eval_dataset=eval_samples,
        trie=ItemTrie.from_semantic_ids(recommender.semantic_ids),
        item_metrics=item_metrics,
        callbacks=early_stopping(arguments),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    return trainer


def validation_of(
    recommender: Recommender, splits: DatasetSplits, arguments: FinetuneArguments
) -> tuple[NextItemSamples, ItemMetrics | None]:
    """What each evaluation during training reads: samples for the loss, and item metrics where they are wanted."""
    validation = splits.validation
    if arguments.validation_examples is not None:
        validation = validation.sample(arguments.validation_examples)
    item_metrics = None
    if arguments.validation_recommendations:
        examples = splits.validation.sample(arguments.validation_recommendations)
        item_metrics = ItemMetrics(recommender, examples, splits.dataset)
    return evaluation_samples(recommender.task, validation), item_metrics


def early_stopping(arguments: FinetuneArguments) -> list[TrainerCallback]:
    """The callback that stops a run, where there is to be one."""
    patience = arguments.early_stopping_patience
    return [EarlyStoppingCallback(patience)] if patience else []


def evaluate_all(
    recommender: Recommender,
    splits: DatasetSplits,
    arguments: FinetuneArguments,
    *,
    sasrec: str | Path | None = None,
    accelerator: Any = None,
) -> list[EvaluationResult]:
    """The recommender and its baselines on the same examples, seen items kept and left out."""
    examples = splits.examples(arguments.evaluation_split)
    if arguments.evaluation_examples is not None:
        examples = examples.sample(arguments.evaluation_examples)
    recommenders: dict[str, Any] = {"popularity": PopularityRecommender(splits.train)}
    if sasrec is not None:
        recommenders["SASRec"] = SASRec.from_pretrained(sasrec)
    recommenders["llmrec"] = recommender
    return [
        result
        for name, model in recommenders.items()
        for result in evaluate_both(model, splits.dataset, examples, name=name, accelerator=accelerator)
    ]


def _describe_data(splits: DatasetSplits) -> dict[str, Any]:
    dataset = splits.dataset
    return {
        "name": dataset.name,
        "items": dataset.num_items,
        "users": dataset.num_users,
        "interactions": dataset.num_interactions,
        "split": splits.method,
    }


def _describe_training(
    trainer: RankingTrainer, codes: ItemCodes, arguments: FinetuneArguments, model_arguments: ModelArguments
) -> dict[str, Any]:
    settings = trainer.args
    described = {
        "item_tokenizer": codes.source,
        "tasks": arguments.tasks,
        "sample_form": arguments.sample_form,
        "loss_scope": settings.loss_scope,
        "ranking_temperature": settings.ranking_temperature,
        "learning_rate": settings.learning_rate,
        "code_learning_rate_factor": settings.code_learning_rate_factor,
        "rows_per_step": settings.train_batch_size * settings.gradient_accumulation_steps * settings.world_size,
        "row_length": trainer.plan.row_length if settings.packing and trainer.plan else None,
        "steps": trainer.state.global_step,
        "epochs": round(float(trainer.state.epoch or 0), 2),
        "trained": model_arguments.trained,
        "code_init": model_arguments.code_init,
        "base_bits": 4 if model_arguments.load_in_4bit else 8 if model_arguments.load_in_8bit else None,
        "lora_r": model_arguments.lora_r if model_arguments.trained == "lora" else None,
        "seed": settings.seed,
    }
    return {name: value for name, value in described.items() if value is not None}


def _metrics_row(result: EvaluationResult, training: RecFinetuneConfig) -> dict[str, Any]:
    protocol = "seen items left out" if result.exclude_seen else "seen items kept"
    return {
        "model": result.name,
        "metrics": result.metrics,
        "protocol": protocol,
        "num_examples": result.num_examples,
        "seed": training.seed,
    }


def run(command_line: list[str]) -> None:
    """Parses a command line (and the YAML file of `--config`), runs `finetune`, prints results and recommendations.

    A setting that doesn't exist, and anything else that llmrec refuses, ends with one line on standard error and exit
    status 2.
    """
    run_reported(finetune, lambda: parse(command_line))


def run_reported(
    train: Callable[[Any, RecFinetuneConfig, ModelArguments], Any],
    settings: Callable[[], tuple[Any, RecFinetuneConfig, ModelArguments]],
) -> None:
    """Runs a training as `run` does.

    Args:
        train: `finetune`, or a training with the same arguments and results.
        settings: Gives its arguments.
    """
    import sys

    from llmrec.errors import LlmrecError

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for chatty in ("httpx", "datasets", "deepspeed", "DeepSpeed", "accelerate"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        arguments, training, model_arguments = settings()
        recommender, splits, results = train(arguments, training, model_arguments)
    except LlmrecError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if training.process_index == 0:
        report(recommender, splits, results, arguments, Path(str(training.output_dir)))


def parse(
    command_line: list[str], *, arguments_class: type = FinetuneArguments, program: str = "finetune"
) -> tuple[Any, RecFinetuneConfig, ModelArguments]:
    """Settings from a command line and its `--config` file.

    Args:
        command_line: Without the program's name.
        arguments_class: `FinetuneArguments` or one that extends it.
        program: Its name, for messages.

    Raises:
        SettingsError: A setting of the file doesn't exist, or the file can't be read.
    """
    from trl import TrlParser

    classes: Any = [arguments_class, RecFinetuneConfig, ModelArguments]
    parser = TrlParser(classes, prog=program)
    try:
        return parser.parse_args_and_config(command_line)  # type: ignore[return-value]
    except OSError as error:
        raise SettingsError(f"can't read the settings file: {error}") from error
    except ValueError as error:
        raise SettingsError(str(error)) from error


def report(
    recommender: Recommender,
    splits: DatasetSplits,
    results: list[EvaluationResult],
    arguments: FinetuneArguments,
    output_folder: Path,
) -> None:
    """Prints the results table, and what the first example's user would be recommended."""
    from llmrec.evaluation.report import results_table

    print(results_table(results, metrics=("recall@5", "ndcg@5", "recall@10", "ndcg@10")))
    examples = splits.examples(arguments.evaluation_split)
    if arguments.num_printed and len(examples):
        dataset, rows = splits.dataset, examples.history(0)
        print(f"\nUser {examples.user_ids[0]} last took:")
        for row in rows[-5:]:
            print(f"   {dataset.item_ids[row]}  {dataset.titles[row]}")
        print("Recommended next:")
        history = [dataset.item_ids[row] for row in rows]
        for rank, item in enumerate(recommender.recommend(history, k=arguments.num_printed), start=1):
            print(f"{rank:2d} {item.item_id}  {item.title}  ({item.score:.2f})")
    print(f"\nSaved in {output_folder / RECOMMENDER_FOLDER}")


if __name__ == "__main__":
    import sys

    run(sys.argv[1:])
