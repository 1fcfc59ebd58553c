"""Evaluates a recommender on a data set, beside baselines, with seen items kept and left out.

The data set is split leave-one-out, as in fine-tuning. The baselines know its training part only.
"""

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.commands.options import DATASET_HELP, add_items_argument, add_k_core_argument, add_recommender_arguments
from llmrec.errors import MissingPartError, SettingsError
from llmrec.settings import read_settings, settings_from

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llmrec.data.splits import DatasetSplits
    from llmrec.evaluation.evaluator import EvaluationResult

logger = logging.getLogger(__name__)

HELP = "measure Recall, NDCG and MRR beside baselines"
EXAMPLES = """examples:
  llmrec evaluate runs/synthetic/recommender --dataset synthetic
  llmrec evaluate runs/beauty_smollm2_letter/recommender --dataset ../shared/data/beauty --examples 1000 \\
      --baselines popularity,runs/beauty_sasrec --output results.json

On several devices: accelerate launch eval/run_eval.py --config eval/beauty/leave_one_out.yaml"""

POPULARITY = "popularity"
SPLITS = ("validation", "test")
FORMAT_VERSION = 1


@dataclass(frozen=True)
class EvaluationSettings:
    """What a settings file of `eval/` holds.

    Attributes:
        dataset: As `load_dataset_from` takes it; paths from the folder the command is started in.
        recommenders: Recommender folders, or names on the Hub.
        items: File of the items, where `dataset` is a file.
        k_core: Keep users and items with at least so many interactions, as in the recommender's training; 0 keeps all.
        split: "validation" or "test" of leave-one-out.
        ks: Lengths of the recommended list that are measured.
        examples: Measure on a random part of so many examples; None: on all.
        seed: Of that part.
        baselines: "popularity", and folders of a saved SASRec.
        batch_size: Histories a recommender is asked for at once.
        base_model: Where an adapter's base model is, if not where its config says.
        output: JSON file of the results; None: only the table.

    Raises:
        SettingsError: A value can't work.
    """

    dataset: str
    recommenders: list[str] = field(default_factory=list)
    items: str | None = None
    k_core: int = 0
    split: str = "test"
    ks: list[int] = field(default_factory=lambda: [5, 10])
    examples: int | None = None
    seed: int = 0
    baselines: list[str] = field(default_factory=lambda: [POPULARITY])
    batch_size: int = 256
    base_model: str | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        for name in ("recommenders", "baselines"):
            if not isinstance(getattr(self, name), list):
                raise SettingsError(f"{name} is {getattr(self, name)!r}: write a list")
        if not self.recommenders and not self.baselines:
            raise SettingsError("there is nothing to evaluate: set recommenders or baselines")
        if self.split not in SPLITS:
            raise SettingsError(f"split is {self.split!r}; choose one of {SPLITS}")
        if not isinstance(self.ks, list) or not self.ks or any(not _is_positive(k) for k in self.ks):
            raise SettingsError(f"ks is {self.ks!r}: write a list of integers of at least 1, such as [5, 10]")
        for name in ("examples", "batch_size"):
            value = getattr(self, name)
            if not (_is_positive(value) or (name == "examples" and value is None)):
                raise SettingsError(f"{name} is {value!r}: it must be an integer of at least 1")

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> "EvaluationSettings":
        """Reads a settings file; `overrides` that are not None replace what it says.

        Raises:
            MissingPartError: No such file.
            SettingsError: Not a mapping, or a setting that doesn't exist.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        return settings_from(cls, read_settings(path) | given, str(path))


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_recommender_arguments(parser)
    parser.add_argument("--dataset", required=True, metavar="DATASET", help=DATASET_HELP)
    add_items_argument(parser)
    add_k_core_argument(parser)
    parser.add_argument("--split", choices=SPLITS, default="test", help="the examples (default: %(default)s)")
    parser.add_argument("--ks", type=int, nargs="+", default=[5, 10], metavar="K", help="list lengths (default: 5 10)")
    parser.add_argument("--examples", type=int, metavar="N", help="measure on a random part of N examples")
    parser.add_argument("--seed", type=int, default=0, help="of that part (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=256, help="histories asked at once (default: %(default)s)")
    parser.add_argument(
        "--baselines",
        default=POPULARITY,
        metavar="NAME,...",
        help="'popularity' (default) and folders of a saved SASRec, with commas between; '' for none",
    )
    parser.add_argument("--output", metavar="FILE", help="write the results here, as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Evaluates, prints the table, writes the results."""
    settings = EvaluationSettings(
        dataset=arguments.dataset,
        recommenders=[arguments.folder],
        items=arguments.items,
        k_core=arguments.k_core,
        split=arguments.split,
        ks=arguments.ks,
        examples=arguments.examples,
        seed=arguments.seed,
        baselines=[name for name in arguments.baselines.split(",") if name],
        batch_size=arguments.batch_size,
        base_model=arguments.base_model,
        output=arguments.output,
    )
    report(settings, run_evaluation(settings, device=arguments.device))


def run_evaluation(
    settings: EvaluationSettings, *, accelerator: "Accelerator | None" = None, device: Any = None
) -> "list[EvaluationResult]":
    """Evaluates baselines and recommenders on the same examples, each with seen items kept and left out.

    Everything is loaded before the first is evaluated, so a folder that isn't there is found out at once.

    Args:
        settings: See `EvaluationSettings`.
        accelerator: Shares the examples out to its processes; each gets all results.
        device: Where models go: by default the accelerator's, else the first GPU or the CPU.
    """
    from llmrec.commands.options import read_dataset
    from llmrec.data.splits import leave_one_out
    from llmrec.evaluation.evaluator import evaluate_both

    splits = leave_one_out(read_dataset(settings.dataset, k_core=settings.k_core, items=settings.items))
    examples = splits.examples(settings.split)
    if settings.examples is not None:
        examples = examples.sample(settings.examples, settings.seed)
    if device is None and accelerator is not None:
        device = accelerator.device
    return [
        result
        for name, model in _load_all(settings, splits, device).items()
        for result in evaluate_both(
            model,
            splits.dataset,
            examples,
            ks=tuple(settings.ks),
            batch_size=settings.batch_size,
            name=name,
            accelerator=accelerator,
        )
    ]


def report(settings: EvaluationSettings, results: "Sequence[EvaluationResult]") -> None:
    """Prints the table, and writes settings and results where the settings say (`load_results` reads the file)."""
    from llmrec.evaluation.report import results_table
    from llmrec.files import write_json

    print(results_table(results))
    if settings.output is not None:
        content = {"settings": dataclasses.asdict(settings), "results": [result.to_json() for result in results]}
        write_json(settings.output, {"format_version": FORMAT_VERSION, **content})
        print(f"saved in {settings.output}")


def _load_all(settings: EvaluationSettings, splits: "DatasetSplits", device: Any) -> dict[str, Any]:
    """Name in the table -> whatever recommends."""
    from llmrec.commands.options import load_recommender
    from llmrec.evaluation.baselines import PopularityRecommender

    models: dict[str, Any] = {}
    sasrecs = [name for name in settings.baselines if name != POPULARITY]
    if POPULARITY in settings.baselines:
        models[POPULARITY] = PopularityRecommender(splits.train)
    for folder in sasrecs:
        name = "SASRec" if len(sasrecs) == 1 else f"SASRec {folder}"
        models[name] = _load_sasrec(folder, splits, device)
    for folder in settings.recommenders:
        name = "llmrec" if len(settings.recommenders) == 1 else folder
        models[name] = load_recommender(folder, base_model=settings.base_model, device=device)
    return models


def _load_sasrec(folder: str, splits: "DatasetSplits", device: Any) -> Any:
    from llmrec.embeddings.collaborative import SASRec

    if not Path(folder).is_dir():
        raise MissingPartError(
            f"there is no baseline {folder!r}: give {POPULARITY!r}, or the folder of a saved SASRec"
            " (llmrec embed --collaborative)"
        )
    model = SASRec.from_pretrained(folder, device=device)
    if model.training_facts.get("dataset_fingerprint") != splits.train.fingerprint:
        logger.warning(
            "the SASRec in %s was trained on other data than this training part: it may have seen the test items;"
            " train one by `llmrec embed --collaborative`",
            folder,
        )
    return model
