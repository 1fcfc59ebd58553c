"""Wide beam search on a GPU with Qwen3-1.7B's shape: milliseconds a batch, and how far that is from the hardware.

    PYTHONPATH=. python eval/benchmarks/generation_gpu.py --output generation_gpu.json
    PYTHONPATH=. python eval/benchmarks/generation_gpu.py --codebook_size 256 --num_items 1000000
    PYTHONPATH=. python eval/benchmarks/generation_gpu.py --cpu_check       # tries the script, measures nothing

Random weights in bfloat16, random items of three codes, eight requests of 1,000 tokens, 256 beams, answers held on the
items. Needs torch and transformers, no data and no network. Three engines: the plain search, the same with the model's
forward compiled (`torch.compile`), and CUDA graphs (`GraphedSearch`). Before anything is timed, all engines and
`generate(prefix_allowed_tokens_fn=...)` must give the same on a small model in float32. At full size bfloat16 leaves
them free to differ in close scores: the share of items in common is told.

The floor is what no engine can pass: for each forward the longer of reading the weights and the keys and values once
and of 2 x parameters x tokens operations, at the card's peak rates; attention, selection and launches count nothing.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from generation import (
    TOLERANCE,
    Setup,
    compare,
    generate_reference,
    machine,
    prefix_dictionary,
    scored_leaves,
    versions,
)
from random_models import SHAPES, random_codes, random_model, random_prompts

from llmrec.generation.beam_search import SCOPES, BeamSearchOutput, beam_search
from llmrec.generation.trie import ItemTrie
from llmrec.vocabulary import CodeVocabulary

ENGINES = ("eager", "compiled", "graphs")
TARGETS = {"first": 93.0, "after tuning": 50.0}  # milliseconds, on an H100 or H200
QUOTED = (
    "Quoted, not measured here: NVIDIA SID-GR inference (recsys-examples, README), H100, Qwen3-1.7B, 1,000 tokens, 256"
    " beams, 3 codes, no constraint: 93.2 ms a batch of 8, 17.6 ms a batch of 1."
)
PEAKS = {"H200": (4.8e12, 989e12), "H100 80GB HBM3": (3.35e12, 989e12)}  # bytes/s, dense bf16 operations/s

Search = Callable[[Sequence[Sequence[int]]], BeamSearchOutput]


@dataclass(frozen=True)
class Workload:
    """What is searched.

    Attributes:
        codebook_sizes: Of the levels.
        num_items: N.
        num_requests: B.
        context: Tokens of a prompt.
        num_beams: K.
        scope: As in `beam_search`.
    """

    codebook_sizes: tuple[int, ...]
    num_items: int
    num_requests: int
    context: int
    num_beams: int
    scope: str


SMALL = Workload((32, 32, 32), 500, 4, 60, 16, "vocabulary")


def compile_or_not(model: Any, engine: str) -> None:
    """Readies a model's forward for an engine; what was compiled before is forgotten."""
    model._compiled_call_impl = None
    if engine == "compiled":
        torch.compiler.reset()
        model.compile(dynamic=False)


def make_search(engine: str, setup: Setup, num_beams: int, scope: str) -> Search:
    """A search of the engine's kind, on a model that is ready for it."""
    model, trie, vocabulary = setup.model, setup.trie, setup.vocabulary
    if engine == "graphs":
        from llmrec.generation.graphs import GraphedSearch

        return GraphedSearch(model, trie, vocabulary, num_beams=num_beams, scope=scope)
    return lambda prompts: beam_search(model, prompts, trie, vocabulary, num_beams=num_beams, scope=scope)


def synchronize(device: str) -> None:
    """Waits until the device has done everything."""
    if device != "cpu":
        torch.cuda.synchronize()


def milliseconds(search: Search, batches: Sequence[Sequence[Sequence[int]]], repeats: int, device: str) -> list[float]:
    """Of each of so many searches, host time included, other prompts in turn; after three that warm up."""
    for repeat in range(3):
        search(batches[repeat % len(batches)])
    taken = []
    for repeat in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        search(batches[repeat % len(batches)])
        synchronize(device)
        taken.append(1e3 * (time.perf_counter() - start))
    return taken


def floor_milliseconds(work: Workload, model: Any, trie: ItemTrie, bandwidth: float, peak: float) -> float:
    """The least time that the card's memory and its matrix units leave to a batch."""
    config, embedding = model.config, model.get_input_embeddings()
    rows_of_matrix, width = embedding.weight.shape
    in_matrices = (rows_of_matrix + len(embedding.new_rows)) * width
    body = sum(parameter.numel() for parameter in model.parameters()) - in_matrices  # embedding and head are tied
    bytes_each = embedding.weight.element_size()
    key_value_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * bytes_each

    seconds, positions, beams = 0.0, work.num_requests * work.context, 0
    for level, size in enumerate(work.codebook_sizes):
        first = level == 0
        rows = work.num_requests * (1 if first else min(work.num_beams, trie.num_nodes(level)))
        tokens = positions if first else rows
        head = width * (size if work.scope != "vocabulary" else rows_of_matrix + len(embedding.new_rows))
        beams += 0 if first else rows
        moved = (body + head) * bytes_each + (positions + beams) * key_value_bytes
        seconds += max(moved / bandwidth, 2 * (body * tokens + head * rows) / peak)
    return 1e3 * seconds


def overlap(found: BeamSearchOutput, reference: BeamSearchOutput) -> float:
    """Mean share of a request's leaves that the other answer holds too."""
    shares = [
        len(set(left) & set(right)) / len(set(right))
        for left, right in zip(found.leaves.tolist(), reference.leaves.tolist(), strict=True)
    ]
    return statistics.mean(shares)


def make_setup(
    model: Any, vocabulary: CodeVocabulary, num_items: int, *, device: str, with_dictionary: bool = False
) -> Setup:
    """A model and random items."""
    codes = random_codes(num_items, vocabulary.codebook_sizes)
    trie = ItemTrie.from_codes(codes, vocabulary.codebook_sizes).to(device)
    allowed_tokens = prefix_dictionary(vocabulary.token_ids(codes)) if with_dictionary else {}
    return Setup(model, vocabulary, trie, allowed_tokens, pad_token_id=0, prompts={})


def same_answers(engines: Sequence[str], scopes: Sequence[str], device: str) -> dict[str, Any]:
    """On a small model in float32, the largest score difference of each engine to `generate`, or what went wrong."""
    model, vocabulary = random_model(SHAPES["tiny"], SMALL.codebook_sizes, dtype=torch.float32, device=device)
    setup = make_setup(model, vocabulary, SMALL.num_items, device=device, with_dictionary=True)
    prompts = random_prompts(SMALL.num_requests, SMALL.context, vocabulary.first_token_id)
    found: dict[str, Any] = {}
    for engine in engines:
        compile_or_not(model, "eager")
        references = [
            scored_leaves(setup, *generate_reference(setup, prompts, SMALL.num_beams, scope=scope)) for scope in scopes
        ]
        compile_or_not(model, engine)
        for scope, reference in zip(scopes, references, strict=True):
            search = make_search(engine, setup, SMALL.num_beams, scope)
            search(prompts[::-1])  # what an engine records must not be what it answers later
            answer = search(prompts)
            compared = compare((answer.leaves, answer.scores), reference, tolerance=TOLERANCE)
            difference = compared.largest_difference
            found[f"{engine}, {scope}"] = difference if compared.same else f"differs, scores by {difference:.1e}"
    return found


def measure(
    engine: str, setup: Setup, work: Workload, *, repeats: int, peaks: tuple[float, float] | None, device: str
) -> dict[str, Any]:
    """The row of one engine, on a model that is ready for it."""
    batches = [
        random_prompts(work.num_requests, work.context, setup.vocabulary.first_token_id, seed=seed)
        for seed in range(4)
    ]
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    search = make_search(engine, setup, work.num_beams, work.scope)
    taken = milliseconds(search, batches, repeats, device)
    peak_bytes = torch.cuda.max_memory_allocated() if device != "cpu" else None
    found = search(batches[0])
    compiled, setup.model._compiled_call_impl = setup.model._compiled_call_impl, None
    plain = make_search("eager", setup, work.num_beams, work.scope)(batches[0])
    setup.model._compiled_call_impl = compiled

    median = statistics.median(taken)
    floor = floor_milliseconds(work, setup.model, setup.trie, *peaks) if peaks else None
    return {
        "name": f"{engine}_{'x'.join(map(str, work.codebook_sizes))}_{work.num_items}_items_{work.scope}",
        "engine": engine,
        "codebook_sizes": list(work.codebook_sizes),
        "num_items": work.num_items,
        "scope": work.scope,
        "value": median,
        "unit": "ms",
        "reference": None,
        "ratio": None,
        "milliseconds": taken,
        "floor": floor,
        "share_of_floor": floor / median if floor else None,
        "same_items_as_eager": overlap(found, plain),
        "peak_bytes": peak_bytes,
    }


def against_generate(engine: str, setup: Setup, work: Workload, *, repeats: int, device: str) -> dict[str, Any]:
    """A row of an engine beside `generate`, which stores the context once per beam."""
    prompts = random_prompts(work.num_requests, work.context, setup.vocabulary.first_token_id)
    compile_or_not(setup.model, engine)
    search = make_search(engine, setup, work.num_beams, work.scope)
    ours = statistics.median(milliseconds(search, [prompts], repeats, device))
    compile_or_not(setup.model, "eager")

    def reference(batch: Sequence[Sequence[int]]) -> BeamSearchOutput:
        found = generate_reference(setup, batch, work.num_beams, scope=work.scope)
        return BeamSearchOutput(*scored_leaves(setup, *found))

    taken, same = None, None
    try:
        taken = statistics.median(milliseconds(reference, [prompts], min(repeats, 3), device))
        same = overlap(search(prompts), reference(prompts))
    except torch.OutOfMemoryError:
        print("generate: out of memory", file=sys.stderr)
    return {
        "name": f"{engine}_vs_generate_{work.num_beams}_beams_{work.num_items}_items_{work.scope}",
        "value": ours,
        "unit": "ms",
        "reference": taken,  # None: out of memory
        "ratio": None if taken is None else taken / ours,
        "same_items": same,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| engine | codes | items | scope | ms a batch (least to most) | floor, ms | share | items as eager | GB |",
        "|---|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [
            row["engine"],
            " x ".join(map(str, row["codebook_sizes"])),
            f"{row['num_items']:,}",
            row["scope"],
            f"{row['value']:.1f} ({min(row['milliseconds']):.1f} to {max(row['milliseconds']):.1f})",
            "-" if row["floor"] is None else f"{row['floor']:.1f}",
            "-" if row["floor"] is None else f"{row['share_of_floor']:.0%}",
            f"{row['same_items_as_eager']:.1%}",
            "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def peaks_of(device_name: str, bandwidth: float | None, peak: float | None) -> tuple[float, float] | None:
    """Bytes and operations a second: what is given, else what is known of the card; None where nothing is."""
    if bandwidth is not None and peak is not None:
        return 1e12 * bandwidth, 1e12 * peak
    return next((peaks for name, peaks in PEAKS.items() if name in device_name), None)


def main(command_line: list[str] | None = None) -> int:
    """Parses the command line, measures, prints; 1 where the engines' answers differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one catalogue, 5 repeats, no generate")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--scopes", nargs="+", choices=SCOPES, default=["trie"], help="default: trie")
    parser.add_argument("--codebook_size", type=int, default=8192, help="of each of 3 codes (default: %(default)s)")
    parser.add_argument("--num_items", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--batch_size", type=int, default=8, help="requests at once (default: %(default)s)")
    parser.add_argument("--context", type=int, default=1000, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--num_beams", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--reference_beams", type=int, default=50, help="of generate; 0: none (default: %(default)s)")
    parser.add_argument("--bandwidth", type=float, help="of the card's memory, TB/s, where it isn't an H100 or H200")
    parser.add_argument("--peak", type=float, help="of the card, dense bf16 TFLOP/s")
    parser.add_argument("--cpu_check", action="store_true", help="a tiny model on the CPU, to try this script")
    given = parser.parse_args(command_line)

    shape, device = SHAPES["qwen3-1.7b"], "cuda"
    if given.cpu_check:
        shape, device, given.engines, given.repeats = SHAPES["tiny"], "cpu", ["eager"], 3
        given.codebook_size, given.num_items, given.batch_size = 32, [500], 2
        given.context, given.num_beams, given.reference_beams = 40, 8, 4
    elif not torch.cuda.is_available():
        print("No GPU here: not measured. --cpu_check tries the script with a tiny model on the CPU.")
        return 0
    if given.quick:
        given.num_items, given.repeats, given.reference_beams = given.num_items[:1], min(given.repeats, 5), 0
    device_name = "cpu" if device == "cpu" else torch.cuda.get_device_name()
    peaks = peaks_of(device_name, given.bandwidth, given.peak)

    answers = same_answers(given.engines, given.scopes, device)
    same = not any(isinstance(found, str) and found.startswith("differs") for found in answers.values())
    print(f"Small model in float32 against generate, largest score difference: {answers}")
    sizes = (given.codebook_size,) * 3
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model, vocabulary = random_model(shape, sizes, dtype=dtype, device=device)
    setups = {num_items: make_setup(model, vocabulary, num_items, device=device) for num_items in given.num_items}
    rows: list[dict[str, Any]] = []
    for engine in given.engines:
        compile_or_not(model, engine)
        for num_items, setup in setups.items():
            for scope in given.scopes:
                work = Workload(sizes, num_items, given.batch_size, given.context, given.num_beams, scope)
                rows.append(measure(engine, setup, work, repeats=given.repeats, peaks=peaks, device=device))
                print(f"{rows[-1]['name']}: {rows[-1]['value']:.1f} ms", file=sys.stderr)
    print(table(rows))
    if given.reference_beams:
        few = (given.batch_size, given.context, given.reference_beams, given.scopes[0])
        setup = make_setup(model, vocabulary, given.num_items[0], device=device, with_dictionary=True)
        work = Workload(sizes, given.num_items[0], *few)
        row = against_generate(given.engines[0], setup, work, repeats=given.repeats, device=device)
        rows.append(row)
        reference = "out of memory" if row["ratio"] is None else f"{row['reference']:.1f} ms, {row['ratio']:.1f} x"
        print(f"\n{given.reference_beams} beams, {given.engines[0]}: {row['value']:.1f} ms; generate: {reference}")
    print(f"\n{device_name}; batch {given.batch_size}, {given.context} tokens, {given.num_beams} beams. {QUOTED}")
    if given.output is not None:
        from llmrec.files import write_json

        report = {
            "benchmark": "generation_gpu",
            "same_answer": same,
            "answers": answers,
            "quick": given.quick,
            "cpu_check": given.cpu_check,
            "targets": TARGETS,
            "quoted": QUOTED,
            "machine": machine(torch.get_num_threads()) | {"device": device_name},
            "versions": versions(),
            "rows": rows,
        }
        write_json(given.output, report)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
