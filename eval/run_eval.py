"""Evaluates recommenders and baselines as a settings file says, in one process or several.

    python eval/run_eval.py                                             # the recommender of the default recipe
    python eval/run_eval.py --config eval/beauty/leave_one_out.yaml --output results.json
    accelerate launch --config_file accelerate_configs/ddp.yaml eval/run_eval.py --config eval/beauty/...

Several processes share the examples and give the figures of one.
"""

import argparse
import logging
import sys
from pathlib import Path

DEFAULT_CONFIG = Path(__file__).parent / "synthetic" / "leave_one_out.yaml"


def main(command_line: list[str] | None = None) -> int:
    """Parses the command line, evaluates, prints; 2 and one line on standard error where that can't work."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="settings file (default: %(default)s)")
    parser.add_argument("--recommenders", nargs="+", metavar="FOLDER", help="in place of those of the file")
    parser.add_argument("--examples", type=int, metavar="N", help="measure on a random part of N examples")
    parser.add_argument("--output", metavar="FILE", help="write the results here, as JSON")
    given = parser.parse_args(command_line)

    import torch
    from accelerate import Accelerator

    from llmrec.commands.evaluate import EvaluationSettings, report, run_evaluation
    from llmrec.errors import LlmrecError

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    try:
        settings = EvaluationSettings.from_yaml(
            given.config, recommenders=given.recommenders, examples=given.examples, output=given.output
        )
        accelerator = Accelerator(cpu=not torch.cuda.is_available())  # else CPU processes wouldn't know each other
        results = run_evaluation(settings, accelerator=accelerator)
        if accelerator.is_main_process:
            report(settings, results)
        accelerator.end_training()
    except LlmrecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
