"""From a data set to a saved recommender: the stages that `recipes/finetune.py` and `llmrec finetune` run.

Data, item tokenizer, model, training, evaluation, folder. Every stage is a function of its own; what takes long and
doesn't depend on the model (embeddings, item tokenizer) is kept under the output folder and reused by the next run
with the same data and settings.
"""

import dataclasses
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import get_last_checkpoint

from llmrec.adapter import add_lora
from llmrec.data.interactions import InteractionDataset
from llmrec.data.loading import load_dataset_from
from llmrec.data.splits import DatasetSplits, leave_one_out
from llmrec.embeddings.collaborative import SASRec
from llmrec.errors import SettingsError
from llmrec.evaluation.baselines import PopularityRecommender
from llmrec.evaluation.evaluator import EvaluationResult, evaluate_both, save_results
from llmrec.files import read_json, write_json
from llmrec.generation.trie import ItemTrie
from llmrec.item_tokenizers.base import ItemTokenizer
from llmrec.item_tokenizers.fitting import FitSettings, fit_from_settings
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.pretrained import load_base_model, load_text_tokenizer, resolve_pretrained
from llmrec.recommender import Recommender
from llmrec.recommender_folder import RecommenderConfig
from llmrec.tasks.next_item import NextItemTask, evaluation_samples, training_samples
from llmrec.tiny_model import TINY_LLAMA, build_tiny_llama
from llmrec.training.arguments import FinetuneArguments, ModelArguments
from llmrec.training.config import RecFinetuneConfig
from llmrec.training.trainer import RankingTrainer
from llmrec.vocabulary import CodeVocabulary, add_code_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ITEM_TOKENIZER_STAGE = "item_codes"
RECOMMENDER_FOLDER = "recommender"
RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class ItemCodes:
    """What the item-tokenizer stage gives: the codes, and what made them where it is known."""

    semantic_ids: SemanticIds
    tokenizer: ItemTokenizer | None
    source: str


def prepare_data(arguments: FinetuneArguments) -> DatasetSplits:
    """Reads, filters and splits the data set (leave-one-out)."""
    options = {"items": arguments.items} if arguments.items else {}
    dataset = load_dataset_from(arguments.dataset, **options)
    if arguments.k_core:
        dataset = dataset.k_core(arguments.k_core)
    logger.info("%s", dataset.summary())
    return leave_one_out(dataset)


def prepare_item_codes(arguments: FinetuneArguments, dataset: InteractionDataset, folder: Path) -> ItemCodes:
    """Fits the item tokenizer, or loads what was fitted.

    Args:
        arguments: `item_tokenizer` says what.
        dataset: The catalogue. A settings file that names another data set is refused.
        folder: A fitted item tokenizer is kept here, and reused where data and settings are the same.
    """
    source = Path(str(arguments.item_tokenizer))
    if source.name.endswith(".json"):
        codes = SemanticIds.from_index_json(source, dataset.item_ids, item_keys=dataset.item_keys)
        return ItemCodes(codes.make_unique(), None, source.name)
    if source.is_dir():
        return _load_item_codes(source, dataset)
    settings = FitSettings.from_yaml(source)
    if settings.dataset != arguments.dataset:
        raise SettingsError(
            f"{source} is for the data set {settings.dataset!r}, the run is on {arguments.dataset!r}; name the same"
        )
    identity = _identity(dataset.fingerprint, dataclasses.asdict(settings))
    stamp = folder / "fitted_from.json"
    if stamp.is_file() and read_json(stamp).get("identity") == identity:
        logger.info("the item tokenizer in %s was fitted with the same data and settings: reused", folder)
        return _load_item_codes(folder, dataset)
    fitted = fit_from_settings(settings, folder, dataset=dataset)
    write_json(stamp, {"identity": identity, "settings": dataclasses.asdict(settings)})
    logger.info("%s", fitted.after)
    return _load_item_codes(folder, dataset)


def _load_item_codes(folder: Path, dataset: InteractionDataset) -> ItemCodes:
    codes = SemanticIds.load(folder / "semantic_ids.safetensors", item_ids=dataset.item_ids)
    tokenizer = ItemTokenizer.from_pretrained(folder / "item_tokenizer")
    return ItemCodes(codes, tokenizer, type(tokenizer).__name__)


def _identity(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def prepare_model(
    arguments: ModelArguments, training: RecFinetuneConfig, codes: SemanticIds
) -> tuple[Any, "PreTrainedTokenizerBase", CodeVocabulary]:
    """Loads the base model, adds the codes to its vocabulary, and LoRA where it is wanted."""
    name, revision = str(arguments.model_name_or_path), arguments.model_revision
    text_tokenizer = load_text_tokenizer(name, revision=revision)
    vocabulary = CodeVocabulary.add_to(text_tokenizer, codes.codebook_sizes)
    options = {"dtype": arguments.dtype, "attn_implementation": arguments.attn_implementation}
    options |= {"quantization_config": _quantization(arguments)}
    model = load_base_model(name, revision=revision, **{key: value for key, value in options.items() if value})
    if arguments.load_in_4bit or arguments.load_in_8bit:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, training.gradient_checkpointing)
    add_code_rows(model, vocabulary, init_scale=training.code_init_scale, seed=training.seed)
    if arguments.use_peft:
        model = add_lora(model, _lora(arguments), seed=training.seed)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logger.info("%s: %d of %d parameters are trained", name, trained, model.num_parameters())
    return model, text_tokenizer, vocabulary


def _lora(arguments: ModelArguments) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=arguments.lora_target_modules,
        use_rslora=arguments.use_rslora,
        use_dora=arguments.use_dora,
        task_type="CAUSAL_LM",
    )


def _quantization(arguments: ModelArguments) -> Any:
    if not (arguments.load_in_4bit or arguments.load_in_8bit):
        return None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=arguments.load_in_4bit,
        load_in_8bit=arguments.load_in_8bit,
        bnb_4bit_quant_type=arguments.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=arguments.use_bnb_nested_quant,
    )


def train(
    model: Any,
    task: NextItemTask,
    splits: DatasetSplits,
    training: RecFinetuneConfig,
    *,
    text_tokenizer: "PreTrainedTokenizerBase",
    trie: ItemTrie,
    sample_form: str,
    validation_examples: int | None = None,
) -> RankingTrainer:
    """Trains, from the beginning or from a checkpoint.

    `resume_from_checkpoint` is a folder, or "latest": the last checkpoint under the output folder, if there is one.
    """
    samples = training_samples(task, splits.train, form=sample_form)
    logger.info("%d samples with %d targets an epoch", len(samples), samples.num_targets)
    validation = splits.validation
    if validation_examples is not None:
        validation = validation.sample(validation_examples)
    trainer = RankingTrainer(
        model,
        training,
        vocabulary=task.vocabulary,
        text_tokenizer=text_tokenizer,
        train_dataset=samples,
        eval_dataset=evaluation_samples(task, validation),
        trie=trie,
    )
    checkpoint = training.resume_from_checkpoint
    if checkpoint == "latest":
        output_folder = Path(str(training.output_dir))
        checkpoint = get_last_checkpoint(str(output_folder)) if output_folder.is_dir() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


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


def finetune(
    arguments: FinetuneArguments, training: RecFinetuneConfig, model_arguments: ModelArguments
) -> tuple[Recommender, DatasetSplits, list[EvaluationResult]]:
    """Runs all stages and saves the recommender under `output_dir`/recommender.

    Under several processes the stages that aren't distributed run on the main one first; the others read its files.
    `push_to_hub` (with `hub_model_id`, `hub_private_repo`, `hub_token`) pushes the recommender, once, at the end.

    Raises:
        SettingsError: An adapter is to be pushed whose base model only this machine has.
    """
    from accelerate import PartialState

    state: PartialState = PartialState()
    push, training.push_to_hub = training.push_to_hub, False  # the Trainer would push checkpoints
    base = str(model_arguments.model_name_or_path)
    if push and not arguments.merge and (base == TINY_LLAMA or Path(base).is_dir()):
        raise SettingsError(f"push_to_hub of an adapter on {base!r}, which nobody else has: set merge as well")
    output_folder = Path(str(training.output_dir))
    with state.main_process_first():
        splits = prepare_data(arguments)
        codes = prepare_item_codes(arguments, splits.dataset, output_folder / ITEM_TOKENIZER_STAGE)
        if model_arguments.model_name_or_path == TINY_LLAMA:
            folder = output_folder / "base_model"
            if state.is_main_process:  # always anew: of another data set or seed it would be another model
                build_tiny_llama(splits.dataset.titles, folder, seed=training.seed)
            model_arguments = dataclasses.replace(model_arguments, model_name_or_path=str(folder))
    model, text_tokenizer, vocabulary = prepare_model(model_arguments, training, codes.semantic_ids)
    task = NextItemTask(
        text_tokenizer,
        vocabulary,
        codes.semantic_ids,
        template=arguments.template,
        max_history=arguments.max_history,
    )
    trie = ItemTrie.from_semantic_ids(codes.semantic_ids)
    trainer = train(
        model,
        task,
        splits,
        training,
        text_tokenizer=text_tokenizer,
        trie=trie,
        sample_form=arguments.sample_form,
        validation_examples=arguments.validation_examples,
    )
    base = str(model_arguments.model_name_or_path)
    config = RecommenderConfig(
        base_model=base,
        base_revision=model_arguments.model_revision if resolve_pretrained(base).is_hub_id else None,
        template=arguments.template,
        max_history=arguments.max_history,
        codebook_sizes=codes.semantic_ids.codebook_sizes,
        first_token_id=vocabulary.first_token_id,
        scope=training.loss_scope,
        dataset=_describe_data(splits),
        training=_describe_training(trainer, codes, arguments, model_arguments),
    )
    trained = trainer.accelerator.unwrap_model(trainer.model)
    recommender = Recommender(
        trained, text_tokenizer, codes.semantic_ids, vocabulary, splits.dataset.items, task, config, codes.tokenizer
    )
    trained_sasrec = output_folder / ITEM_TOKENIZER_STAGE / "sasrec"
    sasrec = arguments.sasrec or (trained_sasrec if trained_sasrec.is_dir() else None)
    results = evaluate_all(recommender, splits, arguments, sasrec=sasrec, accelerator=trainer.accelerator)
    recommender.config = dataclasses.replace(config, metrics=[_metrics_row(result, training) for result in results])
    if state.is_main_process:
        save_results(output_folder / RESULTS_FILE, results)
        saved = recommender.merge() if arguments.merge else recommender
        saved.save_pretrained(output_folder / RECOMMENDER_FOLDER)
        if push:
            name = training.hub_model_id or output_folder.name
            url = saved.push_to_hub(name, private=bool(training.hub_private_repo), token=training.hub_token)
            logger.info("pushed to %s", url)
    state.wait_for_everyone()
    return recommender, splits, results


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
    return {
        "item_tokenizer": codes.source,
        "sample_form": arguments.sample_form,
        "loss_scope": settings.loss_scope,
        "ranking_temperature": settings.ranking_temperature,
        "learning_rate": settings.learning_rate,
        "code_learning_rate_factor": settings.code_learning_rate_factor,
        "samples_per_step": settings.train_batch_size * settings.gradient_accumulation_steps * settings.world_size,
        "steps": trainer.state.global_step,
        "epochs": round(float(trainer.state.epoch or 0), 2),
        "lora_r": model_arguments.lora_r if model_arguments.use_peft else None,
        "seed": settings.seed,
    }


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
    import sys

    from llmrec.errors import LlmrecError

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for chatty in ("httpx", "datasets", "deepspeed", "DeepSpeed", "accelerate"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        arguments, training, model_arguments = parse(command_line)
        recommender, splits, results = finetune(arguments, training, model_arguments)
    except LlmrecError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if training.process_index == 0:
        report(recommender, splits, results, arguments, Path(str(training.output_dir)))


def parse(command_line: list[str]) -> tuple[FinetuneArguments, RecFinetuneConfig, ModelArguments]:
    """Settings from a command line and its `--config` file.

    Raises:
        SettingsError: A setting of the file doesn't exist, or the file can't be read.
    """
    from trl import TrlParser

    parser = TrlParser([FinetuneArguments, RecFinetuneConfig, ModelArguments], prog="finetune")  # type: ignore[list-item]
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
