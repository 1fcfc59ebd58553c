"""Fits an item tokenizer from a settings file, and saves it with the semantic IDs of the catalogue."""

import argparse
from pathlib import Path

HELP = "fit an item tokenizer"
EXAMPLES = """example:
  llmrec fit --config tokenizers/synthetic/letter.yaml --output_dir runs/codes

OUTPUT_DIR gets item_tokenizer/, semantic_ids.safetensors, diagnostics.json and report.html; `item_tokenizer:` of a
recipe takes the folder. Paths in the settings file start from the folder that the command is started in. On several
processes: `accelerate launch --config_file FILE tokenizers/fit.py`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--config", type=Path, required=True, metavar="FILE", help="settings file, such as those of tokenizers/"
    )
    parser.add_argument("--output_dir", type=Path, required=True, metavar="FOLDER", help="where the result goes")
    parser.add_argument("--resume", action="store_true", help="keep a checkpoint, and go on from one that is there")


def run(arguments: argparse.Namespace) -> None:
    """Fits, saves, prints what the codes look like."""
    from llmrec.item_tokenizers.fitting import FitSettings, fit_from_settings

    settings = FitSettings.from_yaml(arguments.config)
    fitted = fit_from_settings(settings, arguments.output_dir, resume=arguments.resume)
    print(fitted.before)
    print(f"\n{fitted.semantic_ids.report}")
    print(f"saved in {arguments.output_dir}")
