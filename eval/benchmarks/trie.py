"""What the trie of real items costs: building it, a step of masking, a request's own items, adding and removing items.

    python eval/benchmarks/trie.py            # 10,000 to 10,000,000 items, some minutes
    python eval/benchmarks/trie.py --quick --output trie.json

Random 4-tuples of 256 codes each. Every size runs in a process of its own, so that its peak of memory is its own (the
codes, which the caller holds, aren't counted). The steps are those of 8 requests with 20 beams: 160 rows, at nodes
that prefixes of random items lead to, other nodes in each repeat, so that no cache holds what a step needs. What sets
of items cost is a whole search of all levels, preparing the sets included. Checked each time: the allowed codes, with
and without sets, are those that a comparison with all items finds; adding and removing items gives the trie that
building anew gives; what was saved is loaded again.

The reference is what transformers offers: `prefix_allowed_tokens_fn` with a trie of nested dictionaries, at sizes
that such a trie can be built for in seconds. Both sides are logits processors, get the same tokens and scores, and
must give the same scores.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from llmrec.generation.item_sets import LeafSubset
    from llmrec.generation.trie import ItemTrie

MOST_LOAD_PER_CPU = 1.5
SIZES = (256, 256, 256, 256)
REQUESTS, BEAMS = 8, 20
DRAWS = 50  # of the nodes of a step
SHARES = {"one_item": 0.0, "1%": 0.01, "50%": 0.5, "99%": 0.99}
TEXT_TOKENS = 49_152  # the vocabulary of SmolLM2
LARGEST_REFERENCE = 100_000

# Asked for.
LARGEST = 10_000_000
MOST_BUILD_SECONDS = 15.0
MOST_BUILD_BYTES = 2e9
MOST_BYTES_PER_ITEM = 25.0
MOST_STEP_MS = 0.06
MOST_STEP_SPREAD = 0.15
SUBSET_ITEMS = 1_000_000
MOST_SUBSET_MS = 60.0  # 5 % of the 1.3 s that a 135M LLaMA takes for 8 requests with 20 beams on two cores


def random_codes(num_items: int) -> "np.ndarray":
    """Codes int32 [N, 4]."""
    import numpy as np

    return np.random.default_rng(0).integers(0, SIZES[0], (num_items, len(SIZES)), dtype=np.int32)


def seconds_of(run: Callable[[Any], object], inputs: Iterable[Any]) -> list[float]:
    """The seconds of each run, one an input."""
    seconds = []
    for one in inputs:
        start = time.perf_counter()
        run(one)
        seconds.append(time.perf_counter() - start)
    return seconds


def measure_build(codes: "np.ndarray", repeats: int) -> "tuple[ItemTrie, dict[str, list[float]], dict[str, float]]":
    """The trie, the seconds of each build, and its memory."""
    import psutil

    from llmrec.generation.trie import ItemTrie

    before = psutil.Process().memory_info().rss
    seconds = []
    for _ in range(repeats):
        trie = None  # the one before doesn't count
        start = time.perf_counter()
        trie = ItemTrie.from_codes(codes, SIZES)
        seconds.append(time.perf_counter() - start)
    sizes = {"peak_bytes": _peak_bytes() - before, "bytes_per_item": trie.num_bytes / len(codes)}
    return trie, {"build": seconds}, sizes


def _peak_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def nodes_of_draws(trie: "ItemTrie", codes: "np.ndarray", level: int) -> "list[Tensor]":
    """Draws of int64 [160] nodes of a depth, each on the path of a random item."""
    import numpy as np
    import torch

    draws = np.random.default_rng(level)
    rows = draws.integers(0, len(codes), (DRAWS, REQUESTS * BEAMS))
    return [trie.walk(torch.from_numpy(codes[some, :level].astype(np.int64)))[0] for some in rows]


def measure_steps(trie: "ItemTrie", nodes: "list[list[Tensor]]", repeats: int) -> dict[str, list[float]]:
    """Seconds of masking and of children, at each level."""
    seconds = {}
    for level, draws in enumerate(nodes):
        seconds_of(lambda some, level=level: trie.allowed_codes(level, some), draws[:5])  # the first calls are slower
        found = seconds_of(lambda some, level=level: trie.allowed_codes(level, some), draws * repeats)
        seconds[f"mask_level_{level}"] = found
        found = seconds_of(lambda some, level=level: trie.children(level, some), draws * repeats)
        seconds[f"children_level_{level}"] = found
    return seconds


def measure_subsets(trie: "ItemTrie", nodes: "list[list[Tensor]]", repeats: int) -> dict[str, list[float]]:
    """Seconds that sets of items add to one search of all requests, making them included."""
    import numpy as np

    draws = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {}

    def search(subset: "LeafSubset | None", number: int) -> None:
        if subset is not None:
            for level, of_level in enumerate(nodes):
                trie.has_items_left(level, of_level[number], subset)

    for name, share in SHARES.items():
        masks = [draws.random(trie.num_items) < share for _ in range(REQUESTS)]
        for mask in masks:
            mask[draws.integers(trie.num_items)] = True
        rows = [np.flatnonzero(mask) for mask in masks]
        seconds[f"allow_{name}"] = seconds_of(
            lambda number, mask=masks[0]: search(trie.subset(allow=trie.item_set(mask)), number), range(repeats)
        )
        prepared = [trie.item_set(mask) for mask in masks]
        seconds[f"allow_{name}_each_its_own"] = seconds_of(
            lambda number, sets=prepared: search(trie.subset(allow=sets), number), range(repeats)
        )
        seconds[f"deny_{name}"] = seconds_of(
            lambda number, rows=rows: search(trie.subset(deny=rows), number), range(repeats)
        )
    return seconds


def measure_changes(trie: "ItemTrie", codes: "np.ndarray", repeats: int) -> "tuple[dict[str, list[float]], bool]":
    """Seconds of saving, loading, adding and removing items; whether the tries are those expected."""
    import numpy as np

    from llmrec.generation.trie import ItemTrie

    changed = min(10_000, len(codes) // 2)
    with tempfile.TemporaryDirectory(prefix="trie_") as folder:
        path = Path(folder) / "trie.safetensors"
        seconds = {"save": seconds_of(trie.save, [path] * repeats)}
        seconds["load"] = seconds_of(ItemTrie.load, [path] * repeats)
        loaded = ItemTrie.load(path)
        same = [loaded.fingerprint == trie.fingerprint, loaded.num_bytes == trie.num_bytes]
        same.append(bool((loaded.items == trie.items).all()))
    without = trie.remove(np.arange(len(codes) - changed, len(codes)))
    same.append(without.fingerprint == ItemTrie.from_codes(codes[:-changed], SIZES).fingerprint)
    same.append(without.insert(codes[-changed:]).fingerprint == trie.fingerprint)
    seconds[f"insert_{changed}"] = seconds_of(without.insert, [codes[-changed:]] * repeats)
    seconds[f"remove_{changed}"] = seconds_of(trie.remove, [np.arange(changed)] * repeats)
    return seconds, all(same)


def finds_what_a_comparison_finds(trie: "ItemTrie", codes: "np.ndarray") -> bool:
    """Whether some rows' allowed codes are those of all items with the prefix: all items, allowed, and denied ones."""
    import numpy as np
    import torch

    draws = np.random.default_rng(2)
    mask = draws.random(len(codes)) < 0.5
    denied = np.flatnonzero(~mask)
    everything = np.ones(len(codes), dtype=bool)
    cases = [(everything, None), (mask, trie.subset(allow=trie.item_set(mask)))]
    cases.append((mask, trie.subset(deny=[denied, denied])))
    few = draws.integers(0, len(codes), 50)
    left = mask.copy()
    left[few] = False
    cases.append((left, trie.subset(allow=trie.item_set(mask), deny=[few, few])))
    same = []
    for level, size in enumerate(SIZES):
        prefixes = codes[np.append(few[:3], draws.integers(len(codes))), :level]
        nodes, _ = trie.walk(torch.from_numpy(prefixes.astype(np.int64)))
        rows = [np.flatnonzero((codes[:, :level] == prefix).all(axis=1)) for prefix in prefixes]
        for items, subset in cases:
            expected = np.zeros((len(prefixes), size), dtype=bool)
            for place, of_prefix in enumerate(rows):
                expected[place, codes[of_prefix[items[of_prefix]], level]] = True
            same.append(np.array_equal(trie.allowed_codes(level, nodes, subset).numpy(), expected))
    return all(same)


def against_dictionaries(trie: "ItemTrie", codes: "np.ndarray", repeats: int) -> dict[str, Any]:
    """Both logits processors on the same tokens and scores: seconds a step, and whether the scores are the same."""
    import numpy as np
    import torch
    from transformers import PrefixConstrainedLogitsProcessor

    from llmrec.generation.logits_process import TrieLogitsProcessor
    from llmrec.vocabulary import CodeVocabulary

    vocabulary = CodeVocabulary(SIZES, TEXT_TOKENS)
    tokens = codes + np.cumsum([0, *SIZES[:-1]]) + TEXT_TOKENS
    start = time.perf_counter()
    nested: dict = {}
    for row in tokens.tolist():
        node = nested
        for token in row:
            node = node.setdefault(token, {})
    built = time.perf_counter() - start

    def allowed(batch: int, ids: "Tensor") -> list[int]:
        node = nested
        for token in ids[1:].tolist():
            node = node[token]
        return list(node)

    theirs, ours = (
        PrefixConstrainedLogitsProcessor(allowed, BEAMS),
        TrieLogitsProcessor(trie, vocabulary, 1, eos_token_id=0),
    )
    generator = torch.Generator().manual_seed(0)
    draws = np.random.default_rng(3)
    found: dict[str, Any] = {"build": [built], "same": True, "reference": [], "seconds": []}
    for _ in range(repeats):
        for level in range(len(SIZES)):
            rows = draws.integers(0, len(codes), REQUESTS * BEAMS)
            ids = np.column_stack([np.zeros(len(rows), dtype=np.int64), tokens[rows, :level]])
            given = (
                torch.from_numpy(ids.astype(np.int64)),
                torch.randn(len(rows), TEXT_TOKENS + sum(SIZES), generator=generator),
            )
            expected, answer = theirs(*given), ours(*given)
            found["same"] &= torch.equal(expected, answer)
            found["reference"] += seconds_of(lambda given: theirs(*given), [given])
            found["seconds"] += seconds_of(lambda given: ours(*given), [given])
    return found


def run_size(num_items: int, repeats: int, threads: int) -> dict[str, Any]:
    """One size in this process."""
    import torch

    torch.set_num_threads(threads)
    codes = random_codes(num_items)
    with torch.inference_mode():
        trie, seconds, sizes = measure_build(codes, repeats)
        nodes = [nodes_of_draws(trie, codes, level) for level in range(len(SIZES))]
        seconds |= measure_steps(trie, nodes, repeats)
        seconds |= measure_subsets(trie, nodes, repeats)
        same = [finds_what_a_comparison_finds(trie, codes)]
        found: dict[str, Any] = {"sizes": sizes}
        if num_items <= LARGEST_REFERENCE:
            found["reference"] = against_dictionaries(trie, codes, repeats)
            same.append(found["reference"].pop("same"))
        changes, same_tries = measure_changes(trie, codes, repeats)
    return found | {"seconds": seconds | changes, "same": all(same) and same_tries}


def rows_of(num_items: int, found: dict[str, Any], quiet: bool) -> list[dict[str, Any]]:
    """A size's result as rows of the report."""
    seconds = found["seconds"]
    levels = [seconds[f"mask_level_{level}"] for level in range(len(SIZES))]
    seconds["mask_mean"] = [statistics.mean(statistics.median(level) for level in levels)]
    rows = []
    for name, each in seconds.items():
        scale, unit = (1.0, "s") if name == "build" else (1e3, "ms")
        rows.append(_row(name, num_items, unit, [scale * one for one in each]))
    rows[0] |= found["sizes"]
    if "reference" in found:
        both = found["reference"]
        row = _row("logits_processor_vs_prefix_allowed_tokens_fn", num_items, "ms", [1e3 * x for x in both["seconds"]])
        row["reference"] = 1e3 * statistics.median(both["reference"])
        row["ratio"] = row["reference"] / row["value"] if quiet else None
        rows.append(row)
        rows[0]["reference"] = both["build"][0]
        rows[0]["ratio"] = both["build"][0] / rows[0]["value"] if quiet else None
    return rows


def _row(name: str, num_items: int, unit: str, values: list[float]) -> dict[str, Any]:
    spread = [min(values), max(values)]
    if len(values) >= 20:
        spread = [statistics.quantiles(values, n=20)[place] for place in (0, -1)]
    return {
        "name": name,
        "items": num_items,
        "value": statistics.median(values),
        "unit": unit,
        "reference": None,
        "ratio": None,
        "range": spread,
    }


def missed_targets(rows: list[dict[str, Any]]) -> list[str]:
    """What was asked for and not reached, at the sizes that were run."""
    by_name = {(row["name"], row["items"]): row for row in rows}
    missed = []
    build = by_name.get(("build", LARGEST))
    if build is not None:
        if build["value"] > MOST_BUILD_SECONDS or build["peak_bytes"] > MOST_BUILD_BYTES:
            missed.append(f"build: {build['value']:.1f} s, {build['peak_bytes'] / 1e9:.2f} GB")
        if build["bytes_per_item"] > MOST_BYTES_PER_ITEM:
            missed.append(f"{build['bytes_per_item']:.1f} bytes an item")
    means = [row["value"] for row in rows if row["name"] == "mask_mean"]
    steps = [row for row in rows if row["name"].startswith("mask_")]
    missed += [f"{row['name']}: {row['value']:.3f} ms" for row in steps if row["value"] > MOST_STEP_MS]
    if spread_of(means) > MOST_STEP_SPREAD:
        missed.append(f"the mean step differs by ± {spread_of(means):.0%} between sizes")
    missed += [
        f"{row['name']}: {row['value']:.0f} ms"
        for row in rows
        if row["name"].startswith(("allow_", "deny_"))
        and row["items"] == SUBSET_ITEMS
        and row["value"] > MOST_SUBSET_MS
    ]
    return missed


def spread_of(values: list[float]) -> float:
    """How far values lie from the middle of the smallest and the largest, as a share of it."""
    return (max(values) - min(values)) / (max(values) + min(values))


def measure(sizes: list[int], repeats: int, threads: int) -> dict[str, Any]:
    """Runs all sizes and puts the result in the form of all benchmarks."""
    import numpy as np
    import torch
    import transformers

    rows, same, loads, cpus = [], [], [], os.cpu_count() or 1
    for size in sizes:
        command = [sys.executable, __file__, "--case", str(size), "--repeats", str(repeats), "--threads", str(threads)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        loads.append(os.getloadavg()[0])
        rows += rows_of(size, found, loads[-1] <= MOST_LOAD_PER_CPU * cpus)
        same.append(found["same"])
    versions = {"numpy": np.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "benchmark": "trie",
        "same_answer": all(same),
        "machine": {
            "cpu": platform.machine(),
            "cpus": cpus,
            "threads": threads,
            "load_average": max(loads),
            "repeats": repeats,
        },
        "versions": {"python": platform.python_version(), **versions},
        "rows": rows,
    }


def main() -> int:
    """Parses the command line, measures, prints; 1 where an answer is wrong or a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: up to 1,000,000 items")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--num_items", type=int, nargs="+", help="catalogue sizes, in place of these")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each case (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of PyTorch (default: %(default)s)")
    parser.add_argument("--case", type=int, help="run this size alone and print JSON")
    given = parser.parse_args()
    if given.case:
        print(json.dumps(run_size(given.case, given.repeats, given.threads)))
        return 0
    sizes = given.num_items or [10_000, 100_000, 1_000_000] + ([] if given.quick else [LARGEST])
    result = measure(sizes, given.repeats, given.threads)
    machine = result["machine"]
    print(f"the same answers as the references: {result['same_answer']}")
    print(
        f"cpus {machine['cpus']}, threads {machine['threads']}, load average up to {machine['load_average']:.1f},"
        f" repeats {machine['repeats']}; ranges of 20 and more values: 5 to 95 %"
    )
    print(f"{'case':46} {'items':>11} {'median':>10} {'range':>19}  {'reference':>10} {'ratio':>7}")
    for row in result["rows"]:
        low, high = row["range"]
        line = f"{row['name']:46} {row['items']:11,} {row['value']:8.3f} {row['unit']:2} {low:8.3f} - {high:<8.3f}"
        if row["reference"] is not None:
            ratio = "busy" if row["ratio"] is None else f"{row['ratio']:.1f}"
            line += f"  {row['reference']:10.3f} {ratio:>7}"
        if "peak_bytes" in row:
            line += f"  peak {row['peak_bytes'] / 1e6:.0f} MB, {row['bytes_per_item']:.1f} bytes an item"
        print(line)
    means = [row["value"] for row in result["rows"] if row["name"] == "mask_mean"]
    print(f"a step of masking, mean of the levels: the same at all sizes within ± {spread_of(means):.0%}")
    missed = missed_targets(result["rows"])
    if missed:
        print(f"not reached: {'; '.join(missed)}")
    if given.output:
        from llmrec.files import write_json

        write_json(given.output, result)
    return 0 if result["same_answer"] and not missed else 1


if __name__ == "__main__":
    sys.exit(main())
