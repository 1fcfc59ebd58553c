"""Trains an item tokenizer and a recommender together (ETEGRec): hands over to `accelerate launch`.

Every option but those below is a setting of the run and overrides the settings file.
"""

import argparse

from llmrec.commands import finetune

HELP = "train item tokenizer and recommender together (accelerate launch)"
EXAMPLES = """examples:
  llmrec train-joint --config recipes/beauty/etegrec_t5.yaml
  llmrec train-joint --accelerate_config accelerate_configs/ddp.yaml --config recipes/beauty/etegrec_t5.yaml
  llmrec train-joint --config recipes/beauty/etegrec_llama.yaml --cycle 4

All settings: python -m llmrec.training.joint_run --help"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command, those of `llmrec finetune`; all others are handed over."""
    finetune.add_arguments(parser)
    parser.usage = "llmrec train-joint [-h] [--verbose] [--accelerate_config FILE] --config FILE [SETTING ...]"


def run(arguments: argparse.Namespace) -> None:
    """Becomes `accelerate launch`, as `llmrec finetune` does."""
    finetune.launch("llmrec.training.joint_run", arguments)
