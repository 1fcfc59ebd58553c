"""Fits an item tokenizer from a settings file and saves it with the semantic IDs of the catalogue.

    python tokenizers/fit.py                                            # embedded synthetic catalogue, a minute
    python tokenizers/fit.py --config tokenizers/beauty/letter.yaml --output_dir runs/beauty_letter
    python tokenizers/fit.py --config tokenizers/beauty/rq_vae.yaml --output_dir runs/beauty_rq_vae --resume
    accelerate launch --config_file accelerate_configs/ddp.yaml tokenizers/fit.py --config ...    # several processes

Writes `item_tokenizer/`, `semantic_ids.safetensors`, `diagnostics.json` and `report.html` into the output folder.
"""

import argparse
import logging
import sys
from pathlib import Path

DEFAULT_CONFIG = Path(__file__).parent / "synthetic" / "letter.yaml"


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line, fits, prints diagnostics; 1 and one line on standard error where that can't work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="settings file (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/item_tokenizer"), help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="keep a checkpoint, and go on from one that is there")
    given = parser.parse_args(arguments)

    from llmrec.errors import LlmrecError
    from llmrec.item_tokenizers.fitting import FitSettings, fit_from_settings
    from llmrec.processes import Processes

    processes = Processes.launched()
    level = logging.INFO if processes.is_main else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    try:
        settings = FitSettings.from_yaml(given.config)
        fitted = fit_from_settings(settings, given.output_dir, resume=given.resume, processes=processes)
    except LlmrecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not processes.is_main:
        return 0
    print(fitted.before)
    print(f"\n{fitted.semantic_ids.report}")
    print(f"saved in {given.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
