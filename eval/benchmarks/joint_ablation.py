"""Joint training (ETEGRec) against the same item tokenizer frozen, and without each of its parts, over several seeds.

    python eval/benchmarks/joint_ablation.py --quick                           # some minutes; says nothing of quality
    python eval/benchmarks/joint_ablation.py --output joint_ablation.json       # hours on two cores

Every run starts from one item tokenizer, fitted once, and has the same model, epochs and budget of the recommender;
seeds change the model's weights, the order of samples and what is drawn. Runs stay under the output folder: what is
done is read again, what was interrupted goes on, and two of these commands with other arms share the work (the first
of them fits the item tokenizer).

What is compared is item by item: Recall and NDCG at 10 on the test items, items of the history left out and kept. The
significance is that of a paired t-test over users, of the means over seeds; the deviation is that over seeds.
"""

import argparse
import logging
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from generation import machine, versions
from scipy import stats

from llmrec.data.loading import load_dataset_from
from llmrec.evaluation.evaluator import EvaluationResult, load_results
from llmrec.evaluation.metrics import per_example
from llmrec.item_tokenizers.fitting import DIAGNOSTICS_FILE, FitSettings, fit_from_settings
from llmrec.training.finetune import RESULTS_FILE
from llmrec.training.joint_report import read_history
from llmrec.training.joint_run import HISTORY_FILE, parse, train_jointly

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "recipes" / "beauty" / "etegrec_ablation.yaml"
REFERENCE = "frozen"
ARMS: dict[str, dict[str, Any]] = {
    "joint": {},
    "frozen": {"train_tokenizer": "false"},
    "no_sia": {"sia_weight": 0.0},
    "no_psa": {"psa_weight": 0.0},
    "no_alternation": {"alternate": "false"},
    "released_sia": {"sia_distance_sign": "positive", "sia_recursion": "straight_through"},
}
METRICS = ("recall@10", "ndcg@10")
QUICK = {"num_train_epochs": 2, "final_epochs": 1, "validation_recommendations": 50, "alignment_warmup_epochs": 1}


def fit_once(config: Path, folder: Path) -> tuple[Path, str]:
    """The folder of the item tokenizer that all runs start from, and its settings file."""
    arguments, _, _ = parse(["--config", str(config)])
    fitted = folder / "item_tokenizer"
    settings_file = str(arguments.item_tokenizer)
    if not (fitted / DIAGNOSTICS_FILE).is_file():
        dataset = load_dataset_from(arguments.dataset)
        if arguments.k_core:
            dataset = dataset.k_core(arguments.k_core)
        fit_from_settings(FitSettings.from_yaml(settings_file), fitted, dataset=dataset, resume=True)
    return fitted, settings_file


def run(arm: str, seed: int, config: Path, folder: Path, quick: bool) -> list[EvaluationResult]:
    """Results of one run; read where it is done."""
    output = folder / f"{arm}_{seed}"
    if not (output / RESULTS_FILE).is_file():
        fitted, settings_file = fit_once(config, folder)
        settings: dict[str, Any] = {"item_tokenizer": fitted, "embeddings_from": settings_file, "output_dir": output}
        settings |= {"seed": seed, "resume_from_checkpoint": "latest", **ARMS[arm], **(QUICK if quick else {})}
        line = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        train_jointly(*parse(["--config", str(config), *line]))
    return load_results(output / RESULTS_FILE)


def per_user(results: list[list[EvaluationResult]], metric: str, *, exclude_seen: bool) -> np.ndarray:
    """The metric of each user in each run: float [seeds, users]."""
    chosen = [
        next(result for result in of_run if result.name == "llmrec" and result.exclude_seen == exclude_seen)
        for of_run in results
    ]
    return np.stack([per_example(result.ranks, metric) for result in chosen])


def rows_of(results: dict[str, list[list[EvaluationResult]]]) -> list[dict[str, Any]]:
    """A row for each arm, protocol and metric; the reference is the frozen item tokenizer."""
    rows = []
    for exclude_seen in (True, False):
        for metric in METRICS:
            reference = per_user(results[REFERENCE], metric, exclude_seen=exclude_seen)
            for arm, of_arm in results.items():
                values = per_user(of_arm, metric, exclude_seen=exclude_seen)
                shared = min(len(values), len(reference))
                differences = values[:shared].mean(axis=0) - reference[:shared].mean(axis=0)
                same = bool((differences == differences[0]).all())
                of_seeds = values.mean(axis=1).tolist()
                rows.append(
                    {
                        "name": f"{arm}_{metric}_{'seen_left_out' if exclude_seen else 'seen_kept'}",
                        "arm": arm,
                        "metric": metric,
                        "exclude_seen": exclude_seen,
                        "value": statistics.mean(of_seeds),
                        "unit": metric,
                        "deviation": statistics.stdev(of_seeds) if len(of_seeds) > 1 else None,
                        "seeds": len(of_seeds),
                        "reference": float(reference.mean()),
                        "ratio": statistics.mean(of_seeds) / float(reference.mean()),
                        "p_value": 1.0 if same else float(stats.ttest_1samp(differences, 0.0).pvalue),
                    }
                )
    return rows


def table(rows: list[dict[str, Any]], changes: dict[str, str]) -> str:
    """The rows in Markdown: one line an arm, items of the history left out."""
    lines = [
        "| run | Recall@10 | against frozen | NDCG@10 | against frozen | codes changed, first to last cycle |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells = [arm.replace("_", " ")]
        for metric in METRICS:
            row = next(row for row in rows if row["arm"] == arm and row["metric"] == metric and row["exclude_seen"])
            spread = "" if row["deviation"] is None else f" ± {row['deviation']:.4f}"
            cells.append(f"{row['value']:.4f}{spread}")
            cells.append("" if arm == REFERENCE else f"{row['ratio'] - 1:+.1%} (p = {row['p_value']:.2g})")
        cells.append(changes.get(arm, ""))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def changes_of(folder: Path, arm: str, seeds: list[int]) -> str:
    """Share of items whose codes changed in the first and in the last cycle that measured it, means over seeds."""
    found = []
    for seed in seeds:
        path = folder / f"{arm}_{seed}" / HISTORY_FILE
        records = read_history(path) if path.is_file() else []
        shares = [record["share_changed"] for record in records if "share_changed" in record]
        if shares:
            found.append((shares[0], shares[-1]))
    if not found:
        return ""
    return " to ".join(f"{statistics.mean(shares):.0%}" for shares in zip(*found, strict=True))


def main(command_line: list[str] | None = None) -> int:
    """Parses the command line, runs what isn't done, prints; 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--config", type=Path, default=CONFIG, help="default: %(default)s")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--folder", type=Path, default=None, help="of the runs (default: runs/joint_ablation)")
    given = parser.parse_args(command_line)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    os.chdir(ROOT)
    folder = given.folder or Path("runs") / ("joint_ablation_quick" if given.quick else "joint_ablation")
    seeds = given.seeds[:1] if given.quick else given.seeds
    results: dict[str, list[list[EvaluationResult]]] = {}
    for seed in seeds:
        for arm in given.arms:
            results.setdefault(arm, []).append(run(arm, seed, given.config, folder, given.quick))
    if REFERENCE not in results:
        print(f"runs of {', '.join(results)} are done; the table needs {REFERENCE!r} among --arms")
        return 0
    rows = rows_of(results)
    print(table(rows, {arm: changes_of(folder, arm, seeds) for arm in results}))
    if given.output is not None:
        from llmrec.files import write_json

        content = {"benchmark": "joint_ablation", "same_answer": None, "quick": given.quick, "machine": machine(0)}
        write_json(given.output, {**content, "versions": versions(), "config": str(given.config), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
