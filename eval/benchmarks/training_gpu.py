"""Fine-tuning on a GPU in the shapes of Qwen3-1.7B and LLaMA-7B: tokens a second, share of the card's peak, memory.

    PYTHONPATH=. python eval/benchmarks/training_gpu.py --output training_gpu.json
    PYTHONPATH=. python eval/benchmarks/training_gpu.py --shapes llama-7b --attention sdpa --compile layers
    PYTHONPATH=. python eval/benchmarks/training_gpu.py --cpu_check          # tries the script, measures nothing

Random weights in bfloat16 with LoRA on all linear layers (or all weights trained, in float32 with autocast to
bfloat16), packed real histories of Amazon Beauty in the form `history` (made-up ones of the same lengths where the
data set isn't there), llmrec's own trainer: forward, backward, clipping, AdamW. Needs no download. A layout says how a
step's tokens are cut into rows: `4x4096` is four rows of 4,096. Short rows leave attention less to do, which without a
kernel that skips blocks (`sdpa`) reads every pair of a row.

MFU, the share of the card's peak, counts 4 operations a token and parameter for LoRA (forward, and backward to the
inputs; frozen weights need no gradient) and 6 for full training. N is the number of parameters without embedding and
head, so attention, the head and recomputation earn nothing. Published figures count all parameters (NVIDIA's for NeMo:
4 x 8.03e9 x 12,473 tokens/s = 401 TFLOP/s): that is the second MFU, to compare with them and with nothing else.

With `--beauty` nothing is timed: SmolLM2-135M is fine-tuned on Amazon Beauty, LoRA and full, three seeds each, and its
test metrics stand beside published ones (`beauty_results.py`).
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from generation import machine, versions
from generation_gpu import peaks_of, synchronize
from random_models import SHAPES, Shape, random_codes
from training_sides import LORA, Setup, Side, llmrec_side, make_setup
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from llmrec.data.interactions import InteractionDataset
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.vocabulary import add_code_rows

ATTENTION = ("sdpa", "flash_attention_2", "flex_attention")
COMPILE = ("off", "layers", "model")
TRAINED = ("lora", "full")
OPERATIONS = {"lora": 4, "full": 6}  # of a token and a parameter
TARGET = 0.40
QUOTED = (
    "Quoted, not measured here: NVIDIA NeMo AutoModel (performance summary, April 2026), one H100, LoRA, bfloat16,"
    " packed rows of 4,096: Llama-3-8B 12,473 tokens/s (40.6 % of 989 TFLOP/s), Qwen2.5-7B 14,110 tokens/s (42.8 %)."
)
NUM_ITEMS, CODEBOOK_SIZES = 12_101, (256, 256, 256, 256)  # Beauty's, and LETTER's


@dataclass(frozen=True)
class Workload:
    """One way to train.

    Attributes:
        shape: A name of `SHAPES`.
        trained: "lora" or "full".
        attention: transformers' `attn_implementation`.
        batch_size: Rows of a step.
        row_length: Tokens of a row.
        checkpointing: Whether activations are computed again in the backward pass.
        compiled: "off", "layers" (each decoder layer by itself) or "model" (the Trainer's `torch_compile`).
        scope: `loss_scope`.
    """

    shape: str
    trained: str
    attention: str
    batch_size: int
    row_length: int
    checkpointing: bool
    compiled: str
    scope: str

    @property
    def name(self) -> str:
        """Of its row."""
        words = [self.shape, self.trained, self.attention, f"{self.batch_size}x{self.row_length}", self.scope]
        words += ["checkpointing"] * self.checkpointing + [f"compiled_{self.compiled}"] * (self.compiled != "off")
        return "_".join(words)


def plain_tokenizer(num_tokens: int) -> PreTrainedTokenizerFast:
    """A text tokenizer of whole words, of the length asked for, that knows the default prompt."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<unk>", "Items", "chosen", "by", "one", "person", ",", "oldest", "first", ":"]
    words += [f"word{number}" for number in range(num_tokens - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")


def beauty_histories(beauty: Path) -> tuple[InteractionDataset, SemanticIds]:
    """Amazon Beauty's training part and its published codes."""
    from llmrec.data.loading import load_dataset_from
    from llmrec.data.splits import leave_one_out

    dataset = load_dataset_from(beauty)
    index = beauty / "Beauty.letter-index.json"
    codes = SemanticIds.from_index_json(index, dataset.item_ids, item_keys=dataset.item_keys)
    return leave_one_out(dataset).train, codes


def random_histories(num_users: int, *, seed: int = 0) -> tuple[InteractionDataset, SemanticIds]:
    """Made-up histories of lengths as Beauty's training part has them: at least 3, 6.9 on average, a long tail."""
    import datasets

    generator = np.random.default_rng(seed)
    lengths = 2 + generator.geometric(1 / 4.9, num_users)
    histories = [generator.integers(0, NUM_ITEMS, length).tolist() for length in lengths]
    item_ids = [f"item-{row}" for row in range(NUM_ITEMS)]
    users = {"user_id": [f"user-{user}" for user in range(num_users)], "items": histories}
    items = datasets.Dataset.from_dict({"item_id": item_ids})
    dataset = InteractionDataset(items, datasets.Dataset.from_dict(users), name="made-up histories")
    codes = random_codes(NUM_ITEMS, CODEBOOK_SIZES, seed=seed)
    return dataset, SemanticIds(tuple(item_ids), codes, CODEBOOK_SIZES)


def random_base(shape: Shape, attention: str, *, dtype: torch.dtype, device: str) -> Any:
    """A model of random weights, made on its device."""
    config = CONFIG_MAPPING[shape.model_type](**shape.settings)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def parameter_counts(model: Any) -> tuple[int, int]:
    """Parameters without embedding and head, and all; of a base, before code rows and LoRA."""
    matrices = {id(module.weight): module.weight for module in (model.get_input_embeddings(), model.lm_head)}
    every = sum(parameter.numel() for parameter in model.parameters())
    return every - sum(matrix.numel() for matrix in matrices.values()), every


def mfu(tokens_per_second: float, num_parameters: int, trained: str, peak: float) -> float:
    """Share of a card's peak (operations a second) that the counted operations take."""
    return tokens_per_second * num_parameters * OPERATIONS[trained] / peak


def trained_model(base: Any, setup: Setup, work: Workload) -> Any:
    """The base with code rows, with LoRA where that is trained, as the workload wants it."""
    from peft import LoraConfig

    from llmrec.adapter import add_lora

    add_code_rows(base, setup.vocabulary)
    model = add_lora(base, LoraConfig(**LORA)) if work.trained == "lora" else base
    if work.checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if work.compiled == "layers":
        torch.compiler.reset()
        for layer in base.model.layers:
            layer.compile(dynamic=False)
    return model


def make_side(work: Workload, setup: Setup, device: str) -> tuple[Side, tuple[int, int]]:
    """The trainer of a workload, and its parameter counts."""
    dtype = torch.bfloat16 if work.trained == "lora" else torch.float32
    base = random_base(SHAPES[work.shape], work.attention, dtype=dtype, device=device)
    counts = parameter_counts(base)
    side = llmrec_side(
        setup,
        "history",
        scope=work.scope,
        batch_size=work.batch_size,
        row_length=work.row_length,
        model=trained_model(base, setup, work),
        torch_compile=work.compiled == "model",
    )
    return side, counts


def measure(
    work: Workload, setup: Setup, *, steps: int, warm_up: int, peak: float | None, device: str
) -> dict[str, Any]:
    """The row of a workload: the steps one by one, on batches as full as any."""
    cuda = device != "cpu"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    side, (body, every) = make_side(work, setup, device)
    full = np.flatnonzero(side.num_tokens == side.num_tokens.max())[: steps + warm_up]
    batches = [side.batch(int(step)) for step in np.resize(full, steps + warm_up)]
    seconds = []
    for batch in batches:
        synchronize(device)
        start = time.perf_counter()
        side.step(batch)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    taken = statistics.median(seconds[warm_up:])
    tokens = int(side.num_tokens.max())
    return {
        "name": work.name,
        "value": tokens / taken,
        "unit": "tokens/s",
        "reference": None,
        "ratio": None,
        "target_mfu": TARGET,
        "mfu": None if peak is None else mfu(tokens / taken, body, work.trained, peak),
        "mfu_all_parameters": None if peak is None else mfu(tokens / taken, every, work.trained, peak),
        "parameters_without_embedding": body,
        "parameters": every,
        "targets_per_second": statistics.mean(side.num_targets(batch) for batch in batches[warm_up:]) / taken,
        "real_token_share": side.real_token_share,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "seconds": seconds[warm_up:],
        "seconds_of_warm_up": seconds[:warm_up],
        "workload": asdict(work),
    }


def try_to_measure(work: Workload, setup: Setup, **settings: Any) -> dict[str, Any]:
    """The row of a workload, or why it doesn't run: not installed, not possible together, or out of memory."""
    try:
        row = measure(work, setup, **settings)
    except (ImportError, ValueError, RuntimeError, NotImplementedError) as error:
        message = " ".join(str(error).split())
        row = {"name": work.name, "unit": "tokens/s", "value": None, "reference": None, "ratio": None}
        row |= {"error": f"{type(error).__name__}: {message[:200]}", "workload": asdict(work)}
    gc.collect()
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| workload | tokens/s (least to most) | targets/s | MFU | MFU, all parameters counted | GB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if row["value"] is None:
            lines.append(f"| {row['name']} | {row['error']} | | | | |")
            continue
        fastest, slowest = (row["value"] * statistics.median(row["seconds"]) / end for end in _ends(row["seconds"]))
        shares = ["-" if row[key] is None else f"{row[key]:.1%}" for key in ("mfu", "mfu_all_parameters")]
        cells = [row["name"], f"{row['value']:,.0f} ({slowest:,.0f} to {fastest:,.0f})"]
        cells += [f"{row['targets_per_second']:,.0f}", *shares]
        cells.append("-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def layout(text: str) -> tuple[int, int]:
    """Rows and tokens of a row, of a text such as "4x4096"."""
    rows, _, length = text.partition("x")
    if not (rows.isdecimal() and length.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} isn't ROWSxTOKENS, such as 4x4096")
    return int(rows), int(length)


def workloads(given: argparse.Namespace) -> list[Workload]:
    """All that the command line asks for."""
    settings = product(given.shapes, given.trained, given.attention, given.layouts, given.checkpointing, given.compile)
    return [
        Workload(shape, trained, attention, rows, length, checkpointing == "on", compiled, given.scope)
        for shape, trained, attention, (rows, length), checkpointing, compiled in settings
    ]


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first of each setting, 5 steps")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["qwen3-1.7b", "llama-7b"])
    parser.add_argument("--trained", nargs="+", choices=TRAINED, help="default: lora; of --beauty: both")
    parser.add_argument("--attention", nargs="+", choices=ATTENTION, default=list(ATTENTION))
    parser.add_argument(
        "--layouts", nargs="+", type=layout, default=[(4, 4096), (16, 1024)], help="default: 4x4096 16x1024"
    )
    parser.add_argument("--checkpointing", nargs="+", choices=("off", "on"), default=["off", "on"])
    parser.add_argument("--compile", nargs="+", choices=COMPILE, default=["off"], help="default: off")
    parser.add_argument("--scope", choices=("vocabulary", "codes", "trie"), default="vocabulary", help="of the loss")
    parser.add_argument("--steps", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--warm_up", type=int, default=3, help="steps before (default: %(default)s)")
    parser.add_argument("--peak", type=float, help="of the card, dense bf16 TFLOP/s, where it isn't an H100 or H200")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/beauty"), help="default: %(default)s")
    parser.add_argument("--cpu_check", action="store_true", help="a tiny model on the CPU, to try this script")
    parser.add_argument("--beauty", action="store_true", help="fine-tune SmolLM2-135M on Beauty instead")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of --beauty (default: 0 1 2)")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of --beauty's runs")
    return parser


def main(command_line: list[str] | None = None) -> int:
    """Parses the command line, measures, prints."""
    given = make_parser().parse_args(command_line)
    if given.beauty:
        from beauty_results import report

        return report(given.trained or TRAINED, given.seeds, given.data, given.set, given.output)
    device, given.trained = "cuda", given.trained or ["lora"]
    if given.cpu_check:
        device, given.shapes, given.attention, given.steps, given.warm_up = "cpu", ["tiny"], ["sdpa"], 2, 1
        given.layouts, given.trained = [(2, 128)], list(TRAINED)
    elif not torch.cuda.is_available():
        print("No GPU here: not measured. --cpu_check tries the script with a tiny model on the CPU.")
        return 0
    if given.quick:
        for name in ("shapes", "attention", "layouts", "checkpointing", "compile"):
            setattr(given, name, getattr(given, name)[:1])
        given.steps = min(given.steps, 5)
    device_name = "cpu" if device == "cpu" else torch.cuda.get_device_name()
    bandwidth = None if given.peak is None else 0.0  # is not asked for here
    peaks = peaks_of(device_name, bandwidth, given.peak)

    there = given.data.is_dir() and not given.cpu_check
    train, semantic_ids = (
        beauty_histories(given.data) if there else random_histories(500 if given.cpu_check else 20_000)
    )
    rows = []
    for work in workloads(given):
        tokenizer = plain_tokenizer(SHAPES[work.shape].first_token_id)
        setup = make_setup(None, tokenizer, semantic_ids, train)
        settings = {"steps": given.steps, "warm_up": given.warm_up, "device": device}
        rows.append(try_to_measure(work, setup, peak=None if peaks is None else peaks[1], **settings))
        print(json.dumps({key: rows[-1].get(key) for key in ("name", "value", "mfu", "error")}), file=sys.stderr)
    print(table(rows))
    print(f"\n{device_name}; {train.name}, all tokens of the rows are real; median of {given.steps} steps. {QUOTED}")
    if given.output is not None:
        from llmrec.files import write_json

        report_of_all = {
            "benchmark": "training_gpu",
            "same_answer": None,  # speed alone; training.py compares
            "quick": given.quick,
            "cpu_check": given.cpu_check,
            "quoted": QUOTED,
            "machine": machine(torch.get_num_threads()) | {"device": device_name},
            "versions": versions(),
            "rows": rows,
        }
        write_json(given.output, report_of_all)
    return 0 if any(row["value"] is not None for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
