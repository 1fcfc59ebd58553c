"""The command `llmrec`: one parser, one command a module of `llmrec/commands/`.

Nothing heavy is imported before a command runs, so `--help` is quick. What a user can do wrong ends with one line on
standard error and exit status 2; `--verbose` adds the log and the traceback.
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from llmrec._version import __version__
from llmrec.commands import codes, data, embed, evaluate, finetune, fit, info, push, recommend, train_joint
from llmrec.errors import LlmrecError

COMMANDS: dict[str, ModuleType] = {
    "data": data,
    "embed": embed,
    "fit": fit,
    "codes": codes,
    "finetune": finetune,
    "train-joint": train_joint,
    "evaluate": evaluate,
    "recommend": recommend,
    "push": push,
    "info": info,
}
PASSING_ON = ("finetune", "train-joint")  # what these don't know are settings of the run
BAD_INPUT = 2
INTERRUPTED = 130
BROKEN_PIPE = 141  # what a shell reports for a command that SIGPIPE ended

_DESCRIPTION = """Turns an LLM into a generative recommender.

From interactions to recommendations:
  llmrec data interactions.csv --items items.csv --k_core 5 --output data/mine
  llmrec fit --config tokenizers/beauty/letter.yaml --output_dir runs/codes
  llmrec finetune --config recipes/beauty/smollm2_letter.yaml
  llmrec evaluate runs/beauty_smollm2_letter/recommender --dataset ../shared/data/beauty
  llmrec recommend runs/beauty_smollm2_letter/recommender --history B004756YJA B0020YLEYK"""


class CommandParser(argparse.ArgumentParser):
    """A parser that takes no abbreviations and says what is wrong in one line."""

    def __init__(self, **settings: object):
        settings |= {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(**settings)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Ends with exit status 2."""
        self.exit(BAD_INPUT, f"error: {message} (see {self.prog} --help)\n")


def main(command_line: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        command_line: Words after `llmrec`; those of the process by default.

    Returns:
        Exit status: 0; 2 for bad input; 130 after Ctrl-C. Unknown options raise `SystemExit` with 2.
    """
    arguments = _parse(command_line)
    verbose = getattr(arguments, "verbose", False)
    _set_up_logging(verbose)
    try:
        COMMANDS[arguments.command].run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has stopped; nothing more is written, not even by the interpreter as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
    except (LlmrecError, OSError) as error:
        if verbose:
            logging.getLogger(__name__).exception("%s failed", arguments.command)
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    return 0


def _parse(command_line: Sequence[str] | None) -> argparse.Namespace:
    verbose = CommandParser(add_help=False)
    verbose.add_argument(
        "--verbose", action="store_true", default=argparse.SUPPRESS, help="show the log, and tracebacks of errors"
    )
    parser = CommandParser(prog="llmrec", description=_DESCRIPTION, parents=[verbose])
    parser.add_argument("--version", action="version", version=f"llmrec {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        of_command = commands.add_parser(
            name, parents=[verbose], help=module.HELP, description=module.__doc__, epilog=module.EXAMPLES
        )
        module.add_arguments(of_command)
    arguments, passed_on = parser.parse_known_args(command_line)
    if passed_on and arguments.command not in PASSING_ON:
        commands.choices[arguments.command].error(f"unrecognized arguments: {' '.join(passed_on)}")
    arguments.passed_on = passed_on
    return arguments


def _set_up_logging(verbose: bool) -> None:
    """Without `verbose`, only llmrec's own warnings: those of other libraries are for who writes code with them."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger().setLevel(logging.WARNING if verbose else logging.ERROR)
    logging.getLogger("llmrec").setLevel(logging.INFO if verbose else logging.WARNING)
    if not verbose and not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module="llmrec")


if __name__ == "__main__":
    sys.exit(main())
