"""Fine-tunes a recommender: hands over to `accelerate launch`, on one device or many.

Every option but those below is a setting of the run and overrides the settings file.
"""

import argparse
import os
import sys
from pathlib import Path

HELP = "fine-tune a recommender (accelerate launch)"
EXAMPLES = """examples:
  llmrec finetune --config recipes/beauty/smollm2_letter.yaml --max_steps 50
  llmrec finetune --accelerate_config accelerate_configs/ddp.yaml --config recipes/beauty/smollm2_letter.yaml
  llmrec finetune --config recipes/beauty/smollm2_letter.yaml --resume_from_checkpoint latest

All settings: python -m llmrec.training.finetune --help"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command; all others are handed over."""
    parser.usage = "llmrec finetune [-h] [--verbose] [--accelerate_config FILE] --config FILE [SETTING ...]"
    parser.add_argument(
        "--config", type=Path, required=True, metavar="FILE", help="settings file, such as those of recipes/"
    )
    parser.add_argument(
        "--accelerate_config",
        type=Path,
        metavar="FILE",
        help="devices and processes, such as accelerate_configs/ddp.yaml (default: what `accelerate config` set up)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Becomes `accelerate launch`: signals and the exit status are its own."""
    launch("llmrec.training.finetune", arguments)


def launch(module: str, arguments: argparse.Namespace) -> None:
    """Becomes `accelerate launch -m module` with the options of this command.

    Raises:
        MissingPartError: A settings file isn't there.
    """
    from llmrec.errors import MissingPartError

    for path in (arguments.config, arguments.accelerate_config):
        if path is not None and not path.is_file():
            raise MissingPartError(f"no settings file {path}")
    command = launch_command(module, arguments.config, arguments.accelerate_config, arguments.passed_on)
    sys.stdout.flush()
    os.execv(command[0], command)


def launch_command(module: str, config: Path, accelerate_config: Path | None, passed_on: list[str]) -> list[str]:
    """The command line that runs a module of training."""
    # --quiet: what went wrong stands in the run's own last line, not in a traceback of the launcher.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    if accelerate_config is not None:
        launcher += ["--config_file", str(accelerate_config)]
    return [*launcher, "-m", module, "--config", str(config), *passed_on]
