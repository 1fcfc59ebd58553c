"""What beams cost in memory: the peak of a search with 256 beams against that with one.

    python eval/benchmarks/generation_memory.py --quick                        # under a minute
    python eval/benchmarks/generation_memory.py --output generation_memory.json
    python eval/benchmarks/generation_memory.py --device cuda --shape qwen3-1.7b

Random weights in the shape of a published model, a random catalogue of 12,101 items with four codes of 256, prompts of
1,000 tokens, one request or eight at once. Each measurement has a process of its own. It builds the model, makes a
tiny search so that everything is loaded, and then counts what one search takes above that, at its peak. The reference
is `generate(prefix_allowed_tokens_fn=...)`, which holds the prompt's keys and values once per beam; it gets fewer
beams, because 256 don't fit.

On the CPU (Linux only) the peak is VmHWM, the largest resident size, set back right before the search by writing 5 to
/proc/self/clear_refs. Two settings of glibc make it exact: blocks from 64 KiB on are mapped on their own
(MALLOC_MMAP_THRESHOLD_), so that freed tensors leave the process at once, and what the warm-up left is given back
(malloc_trim). On a GPU it is torch.cuda.max_memory_allocated.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from generation import Setup, generate_reference, machine, prefix_dictionary, versions
from random_models import SHAPES, random_codes, random_model, random_prompts

from llmrec.generation.beam_search import SCOPES, beam_search
from llmrec.generation.trie import ItemTrie

CODEBOOK_SIZES = (256, 256, 256, 256)
NUM_ITEMS = 12_101
TARGET = 1.15
GLIBC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


def peak_bytes(search: Callable[[], object], device: str) -> int:
    """The largest memory that a call takes above what is held before it."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        search()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    search()
    return status_bytes("VmHWM") - before


def status_bytes(name: str) -> int:
    """An entry of /proc/self/status that is a size."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status tells no {name}: on the CPU this benchmark needs Linux")


def measure_here(
    *, side: str, scope: str, num_requests: int, num_beams: int, context: int, shape: str, device: str, threads: int
) -> int:
    """Bytes of one search, measured in this process."""
    torch.set_num_threads(threads)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model, vocabulary = random_model(SHAPES[shape], CODEBOOK_SIZES, dtype=dtype, device=device)
    codes = random_codes(NUM_ITEMS, CODEBOOK_SIZES)
    trie = ItemTrie.from_codes(codes, CODEBOOK_SIZES).to(device)
    allowed_tokens = prefix_dictionary(vocabulary.token_ids(codes)) if side == "generate" else {}
    setup = Setup(model, vocabulary, trie, allowed_tokens, pad_token_id=0, prompts={})

    def search(prompts: list[list[int]], beams: int) -> object:
        if side == "generate":
            return generate_reference(setup, prompts, beams, scope=scope)
        return beam_search(model, prompts, trie, vocabulary, num_beams=beams, scope=scope)

    num_tokens = SHAPES[shape].first_token_id
    search(random_prompts(2, 16, num_tokens, seed=1), 2)
    prompts = random_prompts(num_requests, context, num_tokens)
    return peak_bytes(lambda: search(prompts, num_beams), device)


def measure(**settings: Any) -> int:
    """The same in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", json.dumps(settings)]
    finished = subprocess.run(command, env={**os.environ, **GLIBC}, stdout=subprocess.PIPE, text=True, check=True)
    return int(finished.stdout.split()[-1])


def rows_of(
    scopes: Sequence[str], requests: list[int], num_beams: int, reference_beams: int, common: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for each scope and number of requests, and one of the reference for each number of requests."""
    rows = []
    for num_requests in requests:
        peaks = {}
        for scope in scopes:
            ours = {"side": "llmrec", "scope": scope, "num_requests": num_requests, **common}
            one, many = (measure(num_beams=beams, **ours) for beams in (1, num_beams))
            peaks[scope] = many
            rows.append(
                {
                    "name": f"{scope}_{num_requests}_requests",
                    "value": many / one,
                    "unit": f"peak with {num_beams} beams / with 1",
                    "target": TARGET,
                    "reference": None,
                    "ratio": None,
                    "peak_bytes": {"1": one, str(num_beams): many},
                }
            )
            print(f"{scope}, {num_requests} requests: {many / one:.2f}", file=sys.stderr)
        if reference_beams:
            settings = {"side": "generate", "scope": "vocabulary", "num_requests": num_requests, **common}
            found = measure(num_beams=reference_beams, **settings)
            rows.append(
                {
                    "name": f"{num_requests}_requests_vs_generate",
                    "value": peaks["vocabulary"],
                    "unit": f"bytes with {num_beams} beams, generate with {reference_beams}",
                    "target": None,
                    "reference": found,
                    "ratio": found / peaks["vocabulary"],
                    "peak_bytes": {str(num_beams): peaks["vocabulary"]},
                }
            )
    return rows


def table(rows: list[dict[str, Any]], num_beams: int, reference_beams: int) -> str:
    """The rows in Markdown."""
    lines = [f"| search | 1 beam, MB | {num_beams} beams, MB | x | target |", "|---|--:|--:|--:|--:|"]
    for row in rows:
        if row["reference"] is None:
            one, many = (size / 1e6 for size in row["peak_bytes"].values())
            lines.append(f"| {row['name']} | {one:.0f} | {many:.0f} | {row['value']:.2f} | {row['target']:g} |")
        else:
            size = row["reference"] / 1e6
            lines.append(f"| generate, {reference_beams} beams: {size:.0f} MB | | | {row['ratio']:.1f} of llmrec | |")
    return "\n".join(lines)


def main(command_line: list[str] | None = None) -> int:
    """Parses the command line, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one request of 100 tokens, 32 beams, two scopes")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2-135m", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu (float32) or cuda (bfloat16) (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8], help="default: 1 8")
    parser.add_argument("--context", type=int, default=1000, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--num_beams", type=int, default=256, help="default: %(default)s")
    parser.add_argument(
        "--reference_beams", type=int, default=8, help="of generate, 0 for no reference (default: %(default)s)"
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one measurement, in the process of its own
    given = parser.parse_args(command_line)
    if given.measure is not None:
        print(measure_here(**json.loads(given.measure)))
        return 0
    if given.quick:
        given.requests, given.context, given.num_beams, given.reference_beams = [1], 100, 32, 4

    common = {name: getattr(given, name) for name in ("context", "shape", "device", "threads")}
    scopes = ("vocabulary", "trie") if given.quick else SCOPES
    rows = rows_of(scopes, given.requests, given.num_beams, given.reference_beams, common)
    print(table(rows, given.num_beams, given.reference_beams))
    print(f"\n{given.shape}, prompts of {given.context} tokens, {given.device}; peak above the loaded, warm model.")
    if given.output is not None:
        from llmrec.files import write_json

        report = {
            "benchmark": "generation_memory",
            "same_answer": None,  # nothing is answered; generation.py compares
            "quick": given.quick,
            "settings": common,
            "machine": machine(given.threads),
            "versions": versions(),
            "rows": rows,
        }
        write_json(given.output, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
