"""How long it takes to give every item of a large catalogue codes of its own, and in how much memory.

    python eval/benchmarks/unique_codes.py            # 10,000,000 items, some minutes
    python eval/benchmarks/unique_codes.py --quick --output unique_codes.json

Random 4-tuples of 256 codes each, and a crowded catalogue where one item in ten has the codes of another. Every case
runs in a process of its own, so that its peak of memory is its own; the time is that of `SemanticIds.make_unique`, its
report included. Checked each time: no two items are equal, items that didn't collide and the first three codes of all
are as before, all codes are in range. The reference is what one writes first, a dictionary of tuples: the same answer
item by item, timed on a part of the items with ours on the same part. With vectors, a loop over a dictionary of
prefixes must come to the same sum of distances.
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
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from llmrec.item_tokenizers.semantic_ids import SemanticIds
    from llmrec.item_tokenizers.uniqueness import CodeGeometry

MOST_LOAD_PER_CPU = 1.5
SIZES = (256, 256, 256, 256)
WIDTH = 8  # of the vectors
MOST_SECONDS = 30.0  # asked of 10,000,000 random tuples
CASES = {
    "random": ("min_cost", False, 0.0),
    "random_memory_mapped_vectors": ("min_cost", True, 0.0),
    "random_extra_level": ("extra_level", False, 0.0),
    "crowded": ("min_cost", False, 0.1),
    "crowded_memory_mapped_vectors": ("min_cost", True, 0.1),
}
"""Name to policy, whether there are vectors, and the share of items that have the codes of another."""


def random_codes(num_items: int, share_of_copies: float) -> "np.ndarray":
    """Codes int32 [N, 4]."""
    import numpy as np

    draws = np.random.default_rng(0)
    codes = draws.integers(0, SIZES[0], (num_items, len(SIZES)), dtype=np.int32)
    copies = draws.random(num_items, dtype=np.float32) < share_of_copies
    codes[copies] = codes[draws.integers(0, num_items, int(copies.sum()))]
    return codes


def mapped_geometry(num_items: int, folder: Path) -> "CodeGeometry":
    """Random vectors on disk, and random codebooks."""
    import numpy as np

    from llmrec.item_tokenizers.uniqueness import CodeGeometry

    draws = np.random.default_rng(1)
    latents = np.lib.format.open_memmap(folder / "latents.npy", mode="w+", dtype=np.float32, shape=(num_items, WIDTH))
    for start in range(0, num_items, 2**20):
        block = latents[start : start + 2**20]
        block[:] = draws.standard_normal(block.shape, dtype=np.float32)
    latents.flush()
    del latents, block
    codebooks = tuple(draws.standard_normal((size, WIDTH), dtype=np.float32) for size in SIZES)
    return CodeGeometry(np.load(folder / "latents.npy", mmap_mode="r"), codebooks)


def valid(before: "SemanticIds", after: "SemanticIds") -> bool:
    """Whether all are unique and in range, and nobody outside a colliding group, nor any prefix, changed."""
    import numpy as np

    counter = after.num_levels > before.num_levels
    kept = before.num_levels if counter else before.num_levels - 1
    _, inverse, counts = np.unique(before.keys(), return_inverse=True, return_counts=True)
    alone = counts[inverse] == 1
    same = after.codes[alone, : before.num_levels] == before.codes[alone]
    in_range = all(
        level.min() >= 0 and level.max() < size
        for level, size in zip(after.codes.T, after.codebook_sizes, strict=True)
    )
    return bool(
        len(np.unique(after.keys())) == len(after)
        and in_range
        and same.all()
        and np.array_equal(before.codes[:, :kept], after.codes[:, :kept])
    )


def run_case(name: str, num_items: int, repeats: int) -> dict:
    """One case in this process: seconds of each repeat, memory beyond the input, the report."""
    import psutil

    from llmrec.item_tokenizers.semantic_ids import SemanticIds

    policy, with_vectors, share = CASES[name]
    process, seconds = psutil.Process(), []
    with tempfile.TemporaryDirectory(prefix="unique_codes_") as folder:
        geometry = mapped_geometry(num_items, Path(folder)) if with_vectors else None
        before = SemanticIds(tuple(map(str, range(num_items))), random_codes(num_items, share), SIZES)
        input_bytes = process.memory_info().rss
        for _ in range(repeats):
            start = time.perf_counter()
            after = before.make_unique(policy, geometry=geometry)
            seconds.append(time.perf_counter() - start)
        peak_bytes = _peak_bytes() - input_bytes
        result = {"valid": valid(before, after), "seconds": seconds, "peak_bytes": peak_bytes}
    return result | {"input_bytes": input_bytes, "report": str(after.report)}


def _peak_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def unique_by_dictionary(codes: "np.ndarray") -> "np.ndarray":
    """The reference: the first of equal tuples keeps its codes, the others take the lowest free last code."""
    held, late = {}, []
    for row, item in enumerate(map(tuple, codes.tolist())):
        if item in held:
            late.append((item, row))
        else:
            held[item] = row
    after = codes.copy()
    for item, row in sorted(late):
        free = next(code for code in range(SIZES[-1]) if (*item[:-1], code) not in held)
        held[(*item[:-1], free)] = row
        after[row, -1] = free
    return after


def against_dictionary(num_items: int, repeats: int) -> dict:
    """Times both sides in turn on the same items."""
    import numpy as np

    from llmrec.item_tokenizers.semantic_ids import SemanticIds

    before = SemanticIds(tuple(map(str, range(num_items))), random_codes(num_items, 0.1), SIZES)
    seconds, reference = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        ours = before.make_unique()
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        theirs = unique_by_dictionary(before.codes)
        reference.append(time.perf_counter() - start)
    return {"same": bool(np.array_equal(ours.codes, theirs)), "seconds": seconds, "reference": reference}


def same_cost(num_items: int = 3_000) -> bool:
    """Whether a loop over a dictionary of prefixes comes to the same sum of squared distances."""
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    from llmrec.item_tokenizers.code_assignment import assign_min_cost
    from llmrec.item_tokenizers.uniqueness import CodeGeometry

    draws, sizes = np.random.default_rng(2), (8, 8, 128)
    books = tuple(draws.standard_normal((size, WIDTH), dtype=np.float32) for size in sizes)
    geometry = CodeGeometry(draws.standard_normal((num_items, WIDTH), dtype=np.float32), books)
    codes = np.column_stack([draws.integers(0, size, num_items) for size in sizes])
    prefixes: dict = {}
    for row, item in enumerate(map(tuple, codes.tolist())):
        prefixes.setdefault(item[:-1], {}).setdefault(item[-1], []).append(row)
    after = codes.copy()
    for groups in prefixes.values():
        rows = np.array([row for group in groups.values() if len(group) > 1 for row in group], dtype=int)
        free = np.array([code for code in range(sizes[-1]) if len(groups.get(code, ())) != 1])
        after[rows, -1] = free[linear_sum_assignment(geometry.distances(rows, codes[rows], 2)[:, free])[1]]
    rows = np.arange(num_items)
    ours = geometry.distortion(rows, assign_min_cost(codes, sizes, geometry))
    return bool(np.isclose(ours, geometry.distortion(rows, after), rtol=1e-6))


def measure(num_items: int, part: int, repeats: int) -> dict:
    """Runs all cases and puts the result in the form of all benchmarks."""
    import numpy as np

    rows, checks, loads = [], [same_cost()], []
    for name in CASES:
        command = [sys.executable, __file__, "--case", name, "--num_items", str(num_items), "--repeats", str(repeats)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        checks.append(found["valid"])
        rows.append(
            {
                "name": name,
                "items": num_items,
                "value": statistics.median(found["seconds"]),
                "unit": "s",
                "reference": None,
                "ratio": None,
                "peak_bytes": found["peak_bytes"],
                "report": found["report"],
                "range": [min(found["seconds"]), max(found["seconds"])],
            }
        )
        loads.append(os.getloadavg()[0])
    found = against_dictionary(part, repeats)
    checks.append(found["same"])
    loads.append(os.getloadavg()[0])
    load, cpus = max(loads), os.cpu_count() or 1
    value, reference = statistics.median(found["seconds"]), statistics.median(found["reference"])
    rows.append(
        {
            "name": "crowded_vs_dictionary_of_tuples",
            "items": part,
            "value": value,
            "unit": "s",
            "reference": reference,
            "ratio": reference / value if load <= MOST_LOAD_PER_CPU * cpus else None,
            "range": [min(found["seconds"]), max(found["seconds"])],
        }
    )
    return {
        "benchmark": "unique_codes",
        "same_answer": all(checks),
        "machine": {"cpu": platform.machine(), "cpus": cpus, "load_average": load, "repeats": repeats},
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "rows": rows,
    }


def main() -> int:
    """Parses the command line, measures, prints; 1 where an answer is wrong or the time asked for is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: 1,000,000 items in place of 10,000,000")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--num_items", type=int, help="catalogue size, in place of these")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each case (default: %(default)s)")
    parser.add_argument("--case", choices=sorted(CASES), help="run this case alone and print JSON")
    given = parser.parse_args()
    num_items = given.num_items or (1_000_000 if given.quick else 10_000_000)
    if given.case:
        print(json.dumps(run_case(given.case, num_items, given.repeats)))
        return 0
    result = measure(num_items, min(num_items, 200_000 if given.quick else 1_000_000), given.repeats)
    machine = result["machine"]
    print(f"valid, and the same answer as the references: {result['same_answer']}")
    print(f"cpus {machine['cpus']}, load average up to {machine['load_average']:.1f}, repeats {machine['repeats']}")
    print(f"{'case':34} {'items':>12} {'seconds':>8} {'range':>15} {'beyond input':>13}  report")
    for row in result["rows"]:
        memory = f"{row['peak_bytes'] / 1e9:10.2f} GB" if "peak_bytes" in row else ""
        low, high = row["range"]
        times = f"{row['value']:8.2f} {low:7.2f}-{high:<7.2f}"
        print(f"{row['name']:34} {row['items']:12,} {times} {memory:>13}  {row.get('report', '')}")
    row = result["rows"][-1]
    if row["ratio"] is None:
        print("the machine is busy: no ratio")
    else:
        print(f"the dictionary of tuples takes {row['reference']:.2f} s, {row['ratio']:.1f} times as long")
    slow = [row["name"] for row in result["rows"] if row["name"].startswith("random") and row["value"] > MOST_SECONDS]
    if slow:
        print(f"more than {MOST_SECONDS:.0f} s: {', '.join(slow)}")
    if given.output:
        from llmrec.files import write_json

        write_json(given.output, result)
    return 0 if result["same_answer"] and not slow else 1


if __name__ == "__main__":
    sys.exit(main())
