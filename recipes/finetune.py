"""Fine-tune an LLM into a generative recommender, from a data set to a saved recommender and its results.

Everything on the embedded synthetic catalogue, offline, in a few minutes on two CPU cores:

    accelerate launch recipes/finetune.py

SmolLM2-135M with LETTER codes on Amazon Beauty; any setting of the file can be given on the command line too:

    accelerate launch recipes/finetune.py --config recipes/beauty/smollm2_letter.yaml --max_steps 50

Two processes (GPUs, or CPU processes where there is none):

    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/finetune.py --config recipes/...

After an interruption, from the last checkpoint:

    accelerate launch recipes/finetune.py --config recipes/... --resume_from_checkpoint latest
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEFAULTS = [
    *("--config", str(HERE / "synthetic" / "tiny_llama_letter.yaml")),
    *("--item_tokenizer", str(HERE.parent / "tokenizers" / "synthetic" / "letter.yaml")),
]


def main(command_line: list[str]) -> None:
    """Runs the recipe with these arguments; without `--config`, on the embedded default."""
    from llmrec.training.finetune import run

    run(command_line if "--config" in command_line else [*DEFAULTS, *command_line])


if __name__ == "__main__":
    main(sys.argv[1:])
