"""Trains an item tokenizer and a recommender together (ETEGRec): hands over to `accelerate launch`.

Every option but those below is a setting of the run and overrides the settings file.
"""

import argparse
import os
import sys
from pathlib import Path

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
    """Becomes `accelerate launch`: signals and the exit status are its own."""
    from llmrec.errors import MissingPartError

    for path in (arguments.config, arguments.accelerate_config):
        if path is not None and not path.is_file():
            raise MissingPartError(f"no settings file {path}")
    command = launch_command(arguments.config, arguments.accelerate_config, arguments.passed_on)
    sys.stdout.flush()
    os.execv(command[0], command)


def launch_command(config: Path, accelerate_config: Path | None, passed_on: list[str]) -> list[str]:
    """The command line that trains."""
    # --quiet: what went wrong stands in the run's own last line, not in a traceback of the launcher.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    if accelerate_config is not None:
        launcher += ["--config_file", str(accelerate_config)]
    return [*launcher, "-m", "llmrec.training.joint_run", "--config", str(config), *passed_on]
