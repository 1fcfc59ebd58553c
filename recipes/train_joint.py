"""Train an item tokenizer and a recommender together (ETEGRec, arXiv 2409.05546), from a data set to results.

Everything on the embedded synthetic catalogue, offline, in a few minutes on two CPU cores:

    accelerate launch recipes/train_joint.py

The paper's T5 on Amazon Beauty; any setting of the file can be given on the command line too:

    accelerate launch recipes/train_joint.py --config recipes/beauty/etegrec_t5.yaml --sia_weight 1e-3

With a language model in its place:

    accelerate launch recipes/train_joint.py --config recipes/beauty/etegrec_llama.yaml

To compare with: the item tokenizer left as it is, or both trained in every step:

    accelerate launch recipes/train_joint.py --config recipes/... --train_tokenizer false
    accelerate launch recipes/train_joint.py --config recipes/... --alternate false

Two processes (GPUs, or CPU processes where there is none):

    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/train_joint.py --config recipes/...
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEFAULTS = [
    *("--config", str(HERE / "synthetic" / "etegrec_tiny_llama.yaml")),
    *("--item_tokenizer", str(HERE.parent / "tokenizers" / "synthetic" / "etegrec_rq_vae.yaml")),
]


def main(command_line: list[str]) -> None:
    """Runs the recipe with these arguments; without `--config`, on the embedded default."""
    from llmrec.training.joint_run import run

    run(command_line if "--config" in command_line else [*DEFAULTS, *command_line])


if __name__ == "__main__":
    main(sys.argv[1:])
