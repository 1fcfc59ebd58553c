"""Which codes of a catalogue recommend best, without a language model: the yardstick for item tokenizers.

    python eval/benchmarks/codes.py --quick                                      # made-up catalogue, seconds
    python eval/benchmarks/codes.py --dataset ../shared/data/beauty --seeds 0 1 2 --output codes.json --codes
        published=../shared/data/beauty/Beauty.letter-index.json ours=runs/beauty_letter random shuffled:published

The same small recommender (`code_recommender.py` beside this file: its settings and their reasons) is trained from
scratch on each code set, once a seed, and asked for the next item of every test user: full ranking, items of the
history kept in it. A code set is NAME=PATH with PATH a semantic_ids.safetensors, a folder that holds one, or a
published index (.json). Two are built in, drawn anew for every seed: `random`, distinct random codes, and
`shuffled:NAME`, the codes of that set dealt to random items. They tell what codes are worth that know nothing.

How to read it: the deviation is over seeds (weights, order, dropout). The difference from the first set is paired over
users, each user's NDCG averaged over the seeds that both sets have; its standard error and p-value hold the chance of
users and not that of training, so a gap below .005 of Recall needs three seeds. Codes are taken as they are: where
items share theirs, the place within the group is drawn by lot, once a seed, so that a collision earns what a guess
would; see `target_ranks`. The figures compare code sets with each other. They are no figures of a language model.

Each result is written into the output file as soon as it is there, under a fingerprint of codes, settings, data and
seed; a second run with the same file computes only what is missing.
"""

import argparse
import hashlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from code_recommender import RecommenderSettings
    from rich.table import Table

    from llmrec.data.splits import DatasetSplits, EvaluationSet
    from llmrec.item_tokenizers.semantic_ids import SemanticIds

CodeSet = Callable[[int], "SemanticIds"]  # the codes of a seed

METRICS = ("recall@10", "ndcg@10")
PAIRED_METRIC = "ndcg@10"
QUICK_EXAMPLES = 2000


def random_codes(item_ids: Sequence[str], sizes: Sequence[int], seed: int) -> "SemanticIds":
    """Distinct random codes.

    Args:
        item_ids: N items.
        sizes: K of each level.
        seed: Of the draw.

    Raises:
        SettingsError: Fewer code tuples than items, or more than a 64-bit number counts.
    """
    import math

    import numpy as np

    from llmrec.errors import SettingsError
    from llmrec.item_tokenizers.semantic_ids import SemanticIds

    tuples = math.prod(sizes)
    if not len(item_ids) <= tuples <= np.iinfo(np.int64).max:
        raise SettingsError(
            f"random_sizes {list(sizes)} allow {tuples:.3g} code tuples for {len(item_ids)} items: there must be at"
            " least as many tuples as items, and at most 2^63"
        )
    drawn = np.random.default_rng([seed, 1]).choice(tuples, len(item_ids), replace=False)
    return SemanticIds(tuple(item_ids), np.stack(np.unravel_index(drawn, tuple(sizes)), axis=1), tuple(sizes))


def shuffled_codes(semantic_ids: "SemanticIds", seed: int) -> "SemanticIds":
    """The same code tuples, dealt to the items at random."""
    import numpy as np

    order = np.random.default_rng([seed, 2]).permutation(len(semantic_ids))
    return replace(semantic_ids, codes=semantic_ids.codes[order], report=None)


def read_codes(path: str, item_ids: Sequence[str], item_keys: Sequence[str] | None = None) -> "SemanticIds":
    """Reads semantic_ids.safetensors, a folder that holds it, or an index .json; checks the items."""
    from llmrec.item_tokenizers.semantic_ids import SemanticIds

    if path.endswith(".json"):
        return SemanticIds.from_index_json(path, item_ids, item_keys=item_keys)
    file = Path(path)
    return SemanticIds.load(file / "semantic_ids.safetensors" if file.is_dir() else file, item_ids=item_ids)


def code_sets(
    words: Sequence[str],
    item_ids: Sequence[str],
    random_sizes: Sequence[int],
    item_keys: Sequence[str] | None = None,
) -> dict[str, CodeSet]:
    """What the words of the command line stand for, in their order.

    Raises:
        SettingsError: A word that is none of the forms, a name that comes twice or that nothing has.
    """
    from llmrec.errors import SettingsError

    sets: dict[str, CodeSet] = {}
    for word in words:
        name, separator, path = word.partition("=")
        if name in sets:
            raise SettingsError(f"two code sets are called {name!r}: give each a name of its own")
        if separator and name and path:
            given = read_codes(path, item_ids, item_keys)
            sets[name] = partial(_same, given)
        elif word == "random":
            sets[name] = partial(random_codes, item_ids, random_sizes)
        elif word.startswith("shuffled:") and (source := sets.get(word.removeprefix("shuffled:"))):
            sets[name] = partial(_shuffled, source)
        else:
            raise SettingsError(
                f"{word!r} is no code set: give NAME=PATH, 'random', or 'shuffled:NAME' after the set NAME (so far:"
                f" {', '.join(sets) or 'none'})"
            )
    return sets


def _same(semantic_ids: "SemanticIds", seed: int) -> "SemanticIds":
    return semantic_ids


def _shuffled(source: CodeSet, seed: int) -> "SemanticIds":
    return shuffled_codes(source(seed), seed)


def run_key(
    semantic_ids: "SemanticIds",
    settings: "RecommenderSettings",
    splits: "DatasetSplits",
    examples: "EvaluationSet",
    seed: int,
) -> str:
    """Fingerprint of a result: equal where codes, settings, data, examples and seed are."""
    from code_recommender import VERSION

    sizes = list(semantic_ids.codebook_sizes)
    facts = [VERSION, seed, asdict(settings), sizes, splits.train.fingerprint, examples.fingerprint]
    digest = hashlib.sha256(json.dumps(facts).encode())
    digest.update(semantic_ids.codes.tobytes())
    return digest.hexdigest()[:32]


def measure(
    name: str,
    semantic_ids: "SemanticIds",
    splits: "DatasetSplits",
    examples: "EvaluationSet",
    settings: "RecommenderSettings",
    seed: int,
    device: str,
) -> dict[str, Any]:
    """Trains and evaluates once; the result as it stands in the output file."""
    from code_recommender import target_ranks, train_recommender

    from llmrec.evaluation.metrics import all_metrics
    from llmrec.generation.trie import ItemTrie

    begun, worked = time.perf_counter(), time.process_time()
    model = train_recommender(
        splits.train,
        semantic_ids.codes,
        semantic_ids.codebook_sizes,
        settings=settings,
        seed=seed,
        device=device,
        description=f"{name}, seed {seed}",
    )
    trained = time.perf_counter()
    ranks = target_ranks(model, ItemTrie.from_semantic_ids(semantic_ids).to(device), examples, seed=seed)
    found = ranks.nonzero()[0]
    return {
        "code_set": name,
        "seed": seed,
        "metrics": {metric: value for metric, value in all_metrics(ranks, [10]).items() if metric in METRICS},
        "training_seconds": trained - begun,
        "evaluation_seconds": time.perf_counter() - trained,
        "processor_seconds": time.process_time() - worked,  # the same on a busy machine, if not quite
        "load_average": os.getloadavg()[0],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_examples": len(ranks),
        # Ranks of the targets that were found, as example:rank; all others were not.
        "found": " ".join(f"{example}:{ranks[example]}" for example in found),
    }


def ranks_of(run: dict[str, Any]) -> "np.ndarray":
    """Ranks of a result's examples, int64 [E], 0 where the target was not found."""
    import numpy as np

    ranks = np.zeros(run["num_examples"], np.int64)
    pairs = np.array([pair.split(":") for pair in run["found"].split()], np.int64).reshape(-1, 2)
    ranks[pairs[:, 0]] = pairs[:, 1]
    return ranks


def compare(first: list[dict[str, Any]], second: list[dict[str, Any]], metric: str) -> dict[str, float] | None:
    """Second minus first, paired over users: difference, standard error and p-value of a two-sided t-test.

    Args:
        first: Results of one code set, one a seed.
        second: Of another, on the same examples.
        metric: Such as "ndcg@10"; averaged over the seeds that both have before users are compared.

    Returns:
        None where no seed is common to both.
    """
    import numpy as np
    from scipy import stats

    from llmrec.evaluation.metrics import per_example

    seeds = sorted({run["seed"] for run in first} & {run["seed"] for run in second})
    if not seeds:
        return None
    means = [
        np.mean([per_example(ranks_of(run), metric) for run in runs if run["seed"] in seeds], axis=0)
        for runs in (first, second)
    ]
    differences = means[1] - means[0]
    error = float(differences.std(ddof=1) / len(differences) ** 0.5) if len(differences) > 1 else 0.0
    p_value = float(stats.ttest_1samp(differences, 0.0).pvalue) if error > 0 else 1.0
    return {"difference": float(differences.mean()), "standard_error": error, "p_value": p_value}


def rows_of(results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row a code set and metric; the reference is the first set."""
    rows = []
    reference = next(iter(results.values()))
    for name, runs in results.items():
        for metric in METRICS:
            values = [run["metrics"][metric] for run in runs]
            base = statistics.fmean(run["metrics"][metric] for run in reference)
            mean = statistics.fmean(values)
            row = {
                "name": f"{name} {metric}",
                "code_set": name,
                "metric": metric,
                "value": mean,
                "unit": "share" if metric.startswith("recall") else "NDCG",
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
                "seeds": [run["seed"] for run in runs],
                "values": values,
                "reference": base,
                "ratio": mean / base if base > 0 else None,
            }
            rows.append(row | ((compare(reference, runs, metric) or {}) if runs is not reference else {}))
    return rows


def intrinsic(semantic_ids: "SemanticIds") -> dict[str, Any]:
    """Collisions and code usage of a set, for the output file."""
    from llmrec.item_tokenizers.diagnostics import diagnose

    found = diagnose(semantic_ids)
    return {
        "num_items": found.num_items,
        "num_distinct": found.num_distinct,
        "collision_rate": found.collision_rate,
        "items_in_collision": found.items_in_collision,
        "largest_group": max(found.group_sizes, default=0),
        "policy": found.policy,
        "codebook_sizes": [level.codebook_size for level in found.levels],
        "used": [level.used for level in found.levels],
        "perplexity": [level.perplexity for level in found.levels],
    }


def results_table(report: dict[str, Any]) -> "Table":
    """What the recommenders reached, a row a code set."""
    from rich.table import Table

    title = (
        f"{report['dataset']}, {report['num_examples']:,} {report['split']} examples, full ranking, seen items kept"
    )
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(
        ("codes", "seeds", "Recall@10", "NDCG@10", "NDCG - first", "p", "s a seed", "CPU s")
    ):
        table.add_column(heading, justify="left" if number == 0 else "right", no_wrap=number > 0)
    by_set: dict[str, dict[str, Any]] = {}
    for row in report["rows"]:
        by_set.setdefault(row["code_set"], {})[row["metric"]] = row
    for name, rows in by_set.items():
        figures = [
            f"{row['value']:.4f}" + (f" ± {row['deviation']:.4f}" if row["deviation"] is not None else "")
            for row in (rows[metric] for metric in METRICS)
        ]
        paired = rows[PAIRED_METRIC]
        difference, p_value = "", ""
        if "difference" in paired:
            difference = f"{paired['difference']:+.4f} ± {paired['standard_error']:.4f}"
            p_value = f"{paired['p_value']:.1g}"
        runs = [run for run in report["runs"].values() if run["key"] in report["shown"][name]]
        seconds = statistics.fmean(run["training_seconds"] + run["evaluation_seconds"] for run in runs)
        worked = statistics.fmean(run["processor_seconds"] for run in runs)
        row = (name, str(len(paired["values"])), *figures, difference, p_value, f"{seconds:.0f}", f"{worked:.0f}")
        table.add_row(*row)
    return table


def intrinsic_table(sets: dict[str, dict[str, Any]]) -> "Table":
    """What the codes look like, a row a code set."""
    from rich.table import Table

    table = Table(title="The codes themselves", title_justify="left")
    headings = ("codes", "collision rate", "largest group", "used codes a level", "perplexity a level")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number in (0, 3, 4) else "right")
    for name, found in sets.items():
        levels = zip(found["used"], found["codebook_sizes"], strict=True)
        table.add_row(
            name,
            f"{found['collision_rate']:.2%}",
            str(found["largest_group"]),
            " ".join(f"{used}/{size}" for used, size in levels),
            " ".join(f"{value:.0f}" for value in found["perplexity"]),
        )
    return table


def earlier_runs(output: Path | None) -> dict[str, dict[str, Any]]:
    """The results that the output file holds already.

    Raises:
        DataError: The file is something else.
    """
    from llmrec.errors import DataError
    from llmrec.files import read_json

    if output is None or not output.exists():
        return {}
    content = read_json(output)
    if not isinstance(content, dict) or content.get("benchmark") != "codes":
        raise DataError(f"{output} was not written by this benchmark: choose another name for --output")
    return dict(content["runs"])


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Measures every code set with every seed, writing the output file after each."""
    import torch
    from code_recommender import RecommenderSettings

    from llmrec.data.loading import load_dataset_from
    from llmrec.data.splits import leave_one_out
    from llmrec.errors import SettingsError
    from llmrec.files import write_json
    from llmrec.recommender_folder import installed_versions

    if len(set(given.seeds)) < len(given.seeds) or min(given.seeds) < 0:
        raise SettingsError(f"seeds are {given.seeds}: give different numbers of at least 0")
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dataset = load_dataset_from(given.dataset)
    splits = leave_one_out(dataset)
    examples, settings, seeds = splits.examples(given.split), RecommenderSettings(), given.seeds
    if given.quick:
        examples, settings, seeds = examples.sample(QUICK_EXAMPLES), replace(settings, epochs=1), seeds[:1]
    sets = code_sets(given.codes, dataset.item_ids, given.random_sizes, dataset.item_keys)
    runs = earlier_runs(given.output)
    report: dict[str, Any] = {
        "benchmark": "codes",
        "same_answer": None,  # nothing is computed in two ways here
        "quick": given.quick,
        "dataset": dataset.name,
        "split": given.split,
        "num_examples": len(examples),
        "settings": asdict(settings),
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_average": os.getloadavg()[0],
            "device": device,
        },
        "versions": installed_versions() | {"python": platform.python_version()},
        "rows": [],
        "code_sets": {name: intrinsic(make(seeds[0])) for name, make in sets.items()},
        "shown": {},
        "runs": runs,
    }
    for seed in seeds:  # every set gets its first seed before any gets its second
        for name, make in sets.items():
            codes = make(seed)
            key = run_key(codes, settings, splits, examples, seed)
            if key not in runs:
                runs[key] = {"key": key, **measure(name, codes, splits, examples, settings, seed, device)}
            report["shown"].setdefault(name, []).append(key)
            report["rows"] = rows_of({one: [runs[key] for key in keys] for one, keys in report["shown"].items()})
            if given.output is not None:
                write_json(given.output, report)
    return report


def main(command_line: list[str] | None = None) -> int:
    """Parses the command line, measures, prints; 2 and one line on standard error where that can't work."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--dataset", default="synthetic", help="path or name of a data set (default: %(default)s)")
    parser.add_argument(
        "--codes", nargs="+", default=["random"], metavar="SET", help="NAME=PATH, 'random' or 'shuffled:NAME'"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="a training each (default: 0 1 2)")
    parser.add_argument("--split", choices=["validation", "test"], default="test", help="(default: %(default)s)")
    parser.add_argument(
        "--random_sizes", nargs="+", type=int, default=[256] * 4, metavar="K", help="of 'random' (default: 256 x 4)"
    )
    parser.add_argument("--device", help="such as cpu or cuda (default: the first GPU, else the CPU)")
    parser.add_argument("--output", type=Path, help="JSON file to write, and to go on from")
    parser.add_argument(
        "--quick", action="store_true", help="one epoch, one seed, 2,000 examples: to try it, not to compare by"
    )
    given = parser.parse_args(command_line)

    from rich.console import Console

    from llmrec.errors import LlmrecError

    try:
        report = run(given)
    except LlmrecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(intrinsic_table(report["code_sets"]))
    console.print(results_table(report))
    machine = report["machine"]
    print(
        f"{machine['device']}, {machine['threads']} thread(s), load average {machine['load_average']:.1f} at the start"
    )
    if given.quick:
        print("quick: one epoch on one seed; these figures are not to be compared with any")
    return 0


if __name__ == "__main__":
    sys.exit(main())
