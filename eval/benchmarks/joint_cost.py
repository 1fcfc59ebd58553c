"""What the item tokenizer's half of a cycle costs beside the recommender's, in joint training (ETEGRec).

    python eval/benchmarks/joint_cost.py --quick                          # the T5 alone, fewer steps
    python eval/benchmarks/joint_cost.py --output joint_cost.json         # some minutes

On Amazon Beauty, with the settings of recipes/beauty/etegrec_*.yaml: the paper's T5 and SmolLM2-135M with LoRA, RQ-VAE
256-512-256-128 of three levels of 256 codes on vectors of width 256 (random ones: what they hold costs nothing), and a
counter level. The first half of a cycle, states of sequences, an epoch of the item tokenizer and the encoding of all
12,101 items, is run whole, with the alignments on. Of the recommender's epoch a number of steps is timed, with the
alignments on too: seconds a token of these times the tokens of the epoch.

The reference is the way of the released code: the frozen recommender reads every training sequence in an epoch of the
item tokenizer. Its cost is computed from the time that reading took a sequence here.

The codes that are put in place must be those that the item tokenizer gives when it encodes the catalogue by itself.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from generation import is_busy, machine, versions
from transformers import TrainerCallback

from llmrec.data.loading import load_dataset_from
from llmrec.data.splits import DatasetSplits, leave_one_out
from llmrec.embeddings.base import ItemEmbeddings
from llmrec.item_tokenizers.rq_vae import RQVAEConfig, RQVAETokenizer
from llmrec.processes import Processes
from llmrec.tasks.batch_plan import BatchPlan
from llmrec.tiny_model import ETEGREC, build
from llmrec.training.finetune import untrained_recommender
from llmrec.training.joint import JointTrainer
from llmrec.training.joint_run import joint_trainer, make_unique, parse
from llmrec.training.preparation import ItemCodes
from llmrec.training.tokenizer_training import AlignmentSettings, JointTokenizer, TokenizerTraining

ROOT = Path(__file__).resolve().parents[2]
TARGET = 0.10
RECIPES = {"T5": "etegrec_t5.yaml", "SmolLM2-135M": "etegrec_llama.yaml"}
WARM_UP_STEPS = 2


class StepTimes(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        self.seconds.append(time.perf_counter() - self._start)


def fitted_tokenizer(splits: DatasetSplits) -> tuple[RQVAETokenizer, dict[str, ItemEmbeddings]]:
    """An RQ-VAE of the paper's sizes, fitted for an epoch on random vectors."""
    dataset = splits.dataset
    vectors = np.random.default_rng(0).standard_normal((dataset.num_items, 256), dtype=np.float32)
    embeddings = {"text": ItemEmbeddings(dataset.item_ids, vectors)}
    config = RQVAEConfig(num_codebooks=3, codebook_size=256, codebook_dim=128, hidden_sizes=(512, 256), epochs=1)
    return RQVAETokenizer(config).fit(embeddings), embeddings


def trainer_of(recipe: str, splits: DatasetSplits, folder: Path, *, steps: int) -> tuple[JointTrainer, StepTimes]:
    """The joint trainer of a recipe for some steps, aligned from the first."""
    more = {"output_dir": folder, "max_steps": steps, "alignment_warmup_epochs": 0, "eval_strategy": "no"}
    more |= {"save_strategy": "no", "load_best_model_at_end": "false", "logging_strategy": "no", "final_epochs": 0}
    more |= {"early_stopping_patience": 0, "warmup_steps": 0, "disable_tqdm": "true"}
    line = [part for name, value in more.items() for part in (f"--{name}", str(value))]
    arguments, training, model_arguments = parse(["--config", str(ROOT / "recipes" / "beauty" / recipe), *line])
    if model_arguments.model_name_or_path == ETEGREC:
        build(ETEGREC, splits.dataset.titles, folder / "base_model")
        model_arguments.model_name_or_path = str(folder / "base_model")
    tokenizer, embeddings = fitted_tokenizer(splits)
    joint = JointTokenizer(
        tokenizer,
        embeddings,
        TokenizerTraining(batch_size=arguments.tokenizer_batch_size, passes=arguments.tokenizer_passes),
        AlignmentSettings(),
        Processes.launched(),
    )
    codes = ItemCodes(make_unique(joint.quantize(), arguments), tokenizer, "RQ-VAE")
    recommender = untrained_recommender(arguments, training, model_arguments, splits, codes)
    trainer = joint_trainer(recommender, joint, splits, arguments, training)
    times = StepTimes()
    trainer.add_callback(times)
    return trainer, times


def tokens_of_step(plan: BatchPlan, number: int) -> int:
    """Real tokens of a step, counted from 0 over all epochs."""
    epoch, step = divmod(number, plan.num_steps)
    rows = plan.rows(epoch)[step * plan.rows_per_step : (step + 1) * plan.rows_per_step]
    return sum(int(plan.samples.lengths(epoch)[row].sum()) for row in rows)


def measure(name: str, splits: DatasetSplits, *, steps: int) -> tuple[dict[str, Any], bool]:
    """A row of the table, and whether the codes are the item tokenizer's own."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, times = trainer_of(RECIPES[name], splits, Path(folder), steps=steps + WARM_UP_STEPS)
        reading: list[float] = []
        read_states = trainer._item_states

        def timed(cycle: int) -> Any:
            start = time.perf_counter()
            states = read_states(cycle)
            reading.append(time.perf_counter() - start)
            return states

        trainer._item_states = timed  # type: ignore[method-assign]
        trainer.train()
        assert trainer.plan is not None
        found = trainer.item_tokenizer.tokenizer.quantize(trainer.item_tokenizer.embeddings)
        same = np.array_equal(found.semantic_ids.codes, trainer.recommender.semantic_ids.codes[:, :3])
        plan = trainer.plan
        lengths = plan.samples.lengths(0)
        timed_tokens = [tokens_of_step(plan, number) for number in range(len(times.seconds))][WARM_UP_STEPS:]
        per_token = sum(times.seconds[WARM_UP_STEPS:]) / sum(timed_tokens)
        epoch = per_token * int(lengths.sum())
        tokens = int(lengths.sum())
    record = trainer.records[0]
    cost = record["tokenizer_seconds"] + record["encoding_seconds"]
    tokens_read = int(trainer.tokens_read)
    released = cost + reading[0] * (tokens / tokens_read - 1)
    row = {
        "name": f"tokenizer_half_{name}",
        "value": cost / epoch,
        "unit": "of a recommender epoch",
        "reference": released / epoch,
        "ratio": released / cost,
        "target": TARGET,
        "seconds_reading": reading[0],
        "seconds_tokenizer": record["tokenizer_seconds"] - reading[0],
        "seconds_encoding": record["encoding_seconds"],
        "seconds_recommender_epoch": epoch,
        "milliseconds_token": [
            1000 * seconds / count for seconds, count in zip(times.seconds[WARM_UP_STEPS:], timed_tokens, strict=True)
        ],
        "tokens_read": tokens_read,
        "tokens_of_an_epoch": tokens,
    }
    return row, bool(same)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| recommender | states read | tokenizer epoch | encoding | recommender epoch | share | all read | target |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        seconds = [f"{row[f'seconds_{part}']:,.1f} s" for part in ("reading", "tokenizer", "encoding")]
        cells = [row["name"].removeprefix("tokenizer_half_"), *seconds, f"{row['seconds_recommender_epoch']:,.0f} s"]
        cells += [f"{row['value']:.1%}", f"{row['reference']:.1%}", f"{row['target']:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(command_line: list[str] | None = None) -> int:
    """Parses the command line, measures, prints; 1 where the codes aren't the item tokenizer's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the T5 alone, 4 steps")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--steps", type=int, default=20, help="of the recommender, timed (default: %(default)s)")
    parser.add_argument("--beauty", type=Path, default=Path("../shared/data/beauty"), help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    given = parser.parse_args(command_line)
    torch.set_num_threads(given.threads)
    load = os.getloadavg()[0]
    splits = leave_one_out(load_dataset_from(str(given.beauty)))
    names = ["T5"] if given.quick else list(RECIPES)
    measured = [measure(name, splits, steps=4 if given.quick else given.steps) for name in names]
    rows, same = [row for row, _ in measured], all(found for _, found in measured)
    print(table(rows))
    if is_busy(load, os.cpu_count() or 1):
        print(f"\nload average {load:.1f} before the start: others use this machine, don't quote these figures")
    print(f"\ncodes in place equal to those of the item tokenizer by itself: {same}")
    if given.output is not None:
        from llmrec.files import write_json

        report = {
            "benchmark": "joint_cost",
            "same_answer": same,
            "quick": given.quick,
            "load_average": load,
            "machine": machine(given.threads),
            "versions": versions(),
            "rows": rows,
        }
        write_json(given.output, report)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
