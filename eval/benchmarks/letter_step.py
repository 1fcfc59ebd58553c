"""What LETTER's regularisers cost: a training step of LETTER against one of a plain RQ-VAE, same network, same batch.

    python eval/benchmarks/letter_step.py            # some minutes
    python eval/benchmarks/letter_step.py --quick --output letter_step.json

Both sides run in turn in one process, so that a busy machine slows both. LETTER's step holds everything it adds:
Sinkhorn on the last level, the collaborative loss, the diversity loss, and its share of the clustering of the codes
that opens every epoch. Before that the vectorised diversity loss is checked against a loop over the batch.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from pathlib import Path

MOST_LOAD_PER_CPU = 1.5


def step_functions(num_items: int, width: int):
    """Training steps of both sides, and the refresh of LETTER's clusters; names to functions without arguments."""
    import numpy as np
    import torch

    from llmrec.item_tokenizers.fit_loop import TrainBatch
    from llmrec.item_tokenizers.item_vectors import ItemBatch
    from llmrec.item_tokenizers.letter import LetterConfig, LetterTokenizer
    from llmrec.item_tokenizers.rq_vae import RQVAE, RQVAEConfig, RQVAETokenizer
    from llmrec.processes import Processes

    draws = torch.Generator().manual_seed(0)
    text = torch.nn.functional.normalize(torch.randn(num_items, width, generator=draws), dim=1)
    vectors = {"text": text, "collaborative": 0.3 * torch.randn(num_items, 32, generator=draws) / 32**0.5}
    sides = {"rq_vae": RQVAETokenizer(RQVAEConfig()), "letter": LetterTokenizer(LetterConfig())}
    functions = {}
    for name, tokenizer in sides.items():
        module = RQVAE(width, tokenizer.config).train()
        module.input_scale.fill_(width**-0.5)
        module.quantizer.initialise(module.latents(text), "random", np.random.default_rng(0))
        tokenizer.start_epoch(module, 0)
        optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3, fused=True)
        size = tokenizer.config.batch_size
        items = ItemBatch({modality: tensor[:size] for modality, tensor in vectors.items()}, {})
        batch = TrainBatch(items, size, Processes.alone("cpu"), draws)

        def step(tokenizer=tokenizer, module=module, optimizer=optimizer, batch=batch):
            losses = tokenizer.batch_losses(module, batch)
            optimizer.zero_grad(set_to_none=True)
            sum(losses.values()).backward()
            optimizer.step()

        functions[name] = step
        functions[f"{name}_epoch"] = lambda tokenizer=tokenizer, module=module: tokenizer.start_epoch(module, 0)
    return functions


def same_answer() -> bool:
    """Whether the diversity loss equals LETTER's definition, computed item by item."""
    import torch

    from llmrec.item_tokenizers.letter import diversity_loss

    draws = torch.Generator().manual_seed(0)
    codebook = torch.randn(64, 8, generator=draws)
    codes = torch.randint(64, (100,), generator=draws)
    partners = (codes + torch.randint(1, 64, (100,), generator=draws)) % 64
    losses = []
    for code, partner in zip(codes.tolist(), partners.tolist(), strict=True):
        products = codebook @ codebook[code]
        others = torch.cat([products[:code], products[code + 1 :]])
        losses.append(torch.logsumexp(others, 0) - products[partner])
    return torch.allclose(diversity_loss(codes, partners, codebook), torch.stack(losses).mean(), rtol=1e-5)


def measure(repeats: int, num_items: int, width: int) -> dict:
    """Runs both sides in turn and puts the result in the form of all benchmarks."""
    import torch

    functions = step_functions(num_items, width)
    seconds = {name: [] for name in functions}
    for repeat in range(-3, repeats):
        for name, function in functions.items():
            if name.endswith("_epoch") and repeat % 10:
                continue
            start = time.perf_counter()
            function()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    steps_of_epoch = -(-num_items // 1024)
    clustering = statistics.median(seconds["letter_epoch"]) / steps_of_epoch
    letter, rq_vae = (statistics.median(seconds[name]) for name in ("letter", "rq_vae"))
    spread = {name: statistics.quantiles(seconds[name], n=4)[::2] for name in ("letter", "rq_vae")}
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    quiet = load <= MOST_LOAD_PER_CPU * cpus
    row = {"name": "letter_step_vs_rq_vae_step", "value": letter + clustering, "unit": "s", "reference": rq_vae,
           "ratio": rq_vae / (letter + clustering) if quiet else None, "clustering_share": clustering,
           "repeats": repeats, "quartiles": spread}  # fmt: skip
    return {
        "benchmark": "letter_step",
        "same_answer": same_answer(),
        "machine": {"cpu": platform.machine(), "cpus": cpus, "threads": torch.get_num_threads(), "load_average": load},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rows": [row],
    }  # fmt: skip


def main() -> int:
    """Parses the command line, measures, prints; 1 where the answers differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: 40 steps in place of 300")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--num_items", type=int, default=12_101, help="catalogue size (default: %(default)s)")
    parser.add_argument("--width", type=int, default=384, help="width of the text vectors (default: %(default)s)")
    given = parser.parse_args()
    result = measure(40 if given.quick else 300, given.num_items, given.width)
    row, machine = result["rows"][0], result["machine"]
    print(f"same answer as the loop: {result['same_answer']}")
    print(f"threads {machine['threads']}, load average {machine['load_average']:.1f}, repeats {row['repeats']}")
    for name, seconds in (
        ("RQ-VAE step", row["reference"]),
        ("LETTER step with its share of clustering", row["value"]),
    ):
        print(f"{name:42} {1000 * seconds:8.1f} ms")
    if row["ratio"] is None:
        print("the machine is busy: no ratio (the two ran in turn, but that is not enough to trust it)")
    else:
        print(f"LETTER takes {1 / row['ratio']:.2f} times an RQ-VAE step (ratio {row['ratio']:.2f})")
    if given.output:
        from llmrec.files import write_json

        write_json(given.output, result)
    return 0 if result["same_answer"] else 1


if __name__ == "__main__":
    sys.exit(main())
