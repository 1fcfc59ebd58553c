"""Pushes a recommender folder to the Hugging Face Hub, as one commit."""

import argparse
import sys
from contextlib import redirect_stdout

from llmrec.errors import LlmrecError, SettingsError

HELP = "push a recommender to the Hub"
EXAMPLES = """examples:
  llmrec push runs/beauty_smollm2_letter/recommender someone/beauty-smollm2-letter --private
  llmrec push runs/synthetic/recommender someone/synthetic --merge

An adapter on a base model that only this machine has is refused: --merge writes the adapter into the base and pushes
the whole model."""


class HubError(LlmrecError, ConnectionError):
    """The Hub can't be reached, or refuses."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("folder", metavar="FOLDER", help="a recommender folder")
    parser.add_argument("repo_id", metavar="REPO_ID", help="user/name; made where it doesn't exist")
    parser.add_argument("--merge", action="store_true", help="push the whole model, with the adapter written into it")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="branch to push to; made where it doesn't exist")
    parser.add_argument("--token", help="access token; better: `hf auth login`, or the variable HF_TOKEN")
    parser.add_argument("--base_model", metavar="NAME", help="take an adapter's base model from this folder or name")
    parser.add_argument("--message", default="Upload recommender", help="of the commit (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Loads (so that a folder with a part missing never gets there), pushes, prints the address."""
    from huggingface_hub.errors import HFValidationError, HTTPError  # of httpx or httpx2, as its version has it
    from huggingface_hub.utils import validate_repo_id

    from llmrec.commands.options import load_recommender

    try:
        validate_repo_id(arguments.repo_id)
    except HFValidationError as error:
        raise SettingsError(f"{arguments.repo_id!r} can't be the name of a repository: {error}") from error
    recommender = load_recommender(arguments.folder, base_model=arguments.base_model)
    try:
        with redirect_stdout(sys.stderr):  # see load_recommender
            address = (recommender.merge() if arguments.merge else recommender).push_to_hub(
                arguments.repo_id,
                private=arguments.private,
                token=arguments.token,
                revision=arguments.revision,
                commit_message=arguments.message,
            )
    except SettingsError as error:
        raise SettingsError(f"{error} (on the command line: --merge)") from error
    except (HTTPError, ConnectionError) as error:
        raise HubError(f"the Hub refused the push, or can't be reached: {error}") from error
    print(f"pushed to {address}")
