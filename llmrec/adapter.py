"""LoRA layers together with the new rows: added, saved and loaded as one adapter.

PEFT and the Trainer know nothing of `new_rows`. Left alone they freeze them (`get_peft_model`), leave them out of
checkpoints, and write the whole resized embedding matrix instead. Everything that adds, saves or loads an adapter in
llmrec goes through here. A saved adapter holds LoRA and new rows and nothing else, the rows in the layout of PEFT's
trainable tokens, so that plain PEFT on a resized base loads it and gives equal logits.
"""

import copy
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmrec.errors import DataError, MissingPartError, SettingsError
from llmrec.files import atomic_file, read_json, write_json
from llmrec.vocabulary import CodeRows, CodeVocabulary, add_code_rows, code_row_parameters, has_code_rows

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

logger = logging.getLogger(__name__)

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_ROWS_SUFFIX = ".token_adapter.trainable_tokens_delta"  # PEFT's name for the rows of trainable tokens
_ADAPTER_NAME = "default"


def add_lora(model: PreTrainedModel, config: "LoraConfig", *, seed: int = 0) -> "PeftModel":
    """Wraps a model that has code rows with LoRA layers, and leaves LoRA and new rows trainable.

    Args:
        model: After `add_code_rows`.
        config: LoRA settings. "all-linear" leaves the head alone.
        seed: Seeds LoRA's initial weights, which PEFT draws from the global generator.

    Raises:
        SettingsError: The model has no code rows yet, or LoRA is to go on its embedding or head, or PEFT is told to
            train other rows of these on its own.
    """
    from peft import get_peft_model

    if not has_code_rows(model):
        raise SettingsError("add code rows before LoRA: call add_code_rows(model, vocabulary) first")
    if config.trainable_token_indices or config.modules_to_save:
        raise SettingsError(
            "trainable_token_indices and modules_to_save must stay empty: llmrec trains the rows of the code tokens"
            " itself, as parameters of their own"
        )
    # PEFT reads the base's config from the Hub, by this name, to compare vocabulary sizes; the rows make them differ.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, config, adapter_name=_ADAPTER_NAME)
    for name, module in model.named_modules():
        if isinstance(getattr(module, "base_layer", None), CodeRows):  # PEFT puts its layer around ours
            raise SettingsError(
                f"LoRA on {name} is not supported: it holds the rows of the code tokens, trained whole"
            )
    for parameter in code_row_parameters(peft_model):
        parameter.requires_grad_(True)
    return cast("PeftModel", peft_model)


def save_adapter(
    model: "PeftModel", folder: str | os.PathLike[str], *, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Writes `adapter_model.safetensors` and `adapter_config.json`: LoRA and new rows, nothing else.

    Args:
        model: What `add_lora` or `load_adapter` returned.
        folder: Made where it is missing.
        state_dict: The gathered parameters of a sharded model (ZeRO-3, FSDP2); by default the model's own.

    Raises:
        DataError: `state_dict` lacks the new rows.
    """
    from peft import get_peft_model_state_dict

    folder = Path(folder)
    parameters = state_dict if state_dict is not None else model.state_dict()
    tensors = get_peft_model_state_dict(
        model, state_dict=parameters, adapter_name=_ADAPTER_NAME, save_embedding_layers=False
    )
    row_keys = _row_keys(model)
    indices: dict[str, list[int]] = {}
    for name, module in row_keys.items():
        source = f"{name}.new_rows"
        if source not in parameters:
            raise DataError(f"can't save the adapter: the model's state has no {source}")
        rows = parameters[source]
        tensors[f"{name}{_ROWS_SUFFIX}"] = rows
        indices[name.rpartition(".")[2]] = [module.first_token_id + row for row in range(len(rows))]
    config = copy.copy(model.peft_config[_ADAPTER_NAME])
    settings = {**config.to_dict(), "trainable_token_indices": indices, "inference_mode": True}
    settings["peft_type"] = str(getattr(config.peft_type, "value", config.peft_type))
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with atomic_file(folder / ADAPTER_WEIGHTS) as temporary:
        save_file(contiguous, temporary, metadata={"format": "pt"})
    write_json(folder / ADAPTER_CONFIG, json.loads(json.dumps(settings, default=str)))


def _row_keys(model: nn.Module) -> dict[str, Any]:
    """Module name -> module, of the embedding, and of the head where it isn't tied to it."""
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, CodeRows) and id(module.new_rows) not in seen:
            seen.add(id(module.new_rows))
            found[name] = module
    return found


def load_adapter(model: PreTrainedModel, folder: str | os.PathLike[str], *, is_trainable: bool = False) -> "PeftModel":
    """Puts a saved adapter on its base model, which needs neither resizing nor code rows beforehand.

    Args:
        model: The base the adapter was trained on. It changes in place.
        folder: Where `save_adapter` wrote.
        is_trainable: Whether LoRA and new rows are to be trained on.

    Raises:
        MissingPartError: One of the two files isn't there.
        DataError: The adapter has no new rows, or doesn't fit the model.
    """
    from peft import LoraConfig

    folder = Path(folder)
    settings = read_json(folder / ADAPTER_CONFIG)
    indices = settings.get("trainable_token_indices")
    if not isinstance(indices, dict) or not indices:
        raise DataError(f"{folder / ADAPTER_CONFIG} names no trained tokens: it is not an llmrec adapter")
    ids = next(iter(indices.values()))
    if not has_code_rows(model):
        add_code_rows(model, CodeVocabulary((len(ids),), int(ids[0])), init_scale=0.0)
    settings = {**settings, "trainable_token_indices": None, "inference_mode": not is_trainable}
    peft_model = add_lora(model, LoraConfig.from_peft_type(**settings))
    load_adapter_weights(peft_model, folder)
    if not is_trainable:
        peft_model.requires_grad_(False).eval()
    return peft_model


def load_adapter_weights(model: "PeftModel", folder: str | os.PathLike[str]) -> None:
    """Overwrites LoRA and new rows of a model with those of a saved adapter, and refuses to leave any as they were.

    Raises:
        MissingPartError: The weights file isn't there.
        DataError: A tensor is missing, unknown or of another shape.
    """
    path = Path(folder) / ADAPTER_WEIGHTS
    if not path.is_file():
        raise MissingPartError(f"{path} is missing: the folder holds no adapter")
    tensors = load_file(path)
    own = dict(model.named_parameters())
    targets: dict[str, nn.Parameter] = {
        f"{name}{_ROWS_SUFFIX}": module.new_rows for name, module in _row_keys(model).items()
    }
    for name, parameter in own.items():
        if f".{_ADAPTER_NAME}." in f"{name}.":
            targets[name.replace(f".{_ADAPTER_NAME}", "")] = parameter
    if targets.keys() != tensors.keys():
        missing, unknown = sorted(targets.keys() - tensors.keys()), sorted(tensors.keys() - targets.keys())
        raise DataError(
            f"{path} doesn't fit the model: {len(missing)} tensor(s) missing (first {missing[:1]}), {len(unknown)}"
            f" unknown (first {unknown[:1]})"
        )
    for name, parameter in targets.items():
        if parameter.shape != tensors[name].shape:
            raise DataError(
                f"{path}: {name} has shape {list(tensors[name].shape)}, the model's {list(parameter.shape)}; the"
                " adapter belongs to another base model or to other codes"
            )
    with torch.no_grad():
        for name, parameter in targets.items():
            parameter.copy_(tensors[name])


def merge_adapter(model: "PeftModel") -> PreTrainedModel:
    """Writes LoRA and new rows into the base and returns it as a plain transformers model with the same logits.

    The model given is used up. For a base loaded in 4 or 8 bits, load it in 16 or 32 bits and put the adapter on that:
    merging would round the weights again, and the logits with them.

    Raises:
        SettingsError: The base is quantised.
    """
    from llmrec.vocabulary import merge_code_rows

    if getattr(model.get_base_model(), "is_quantized", False):
        raise SettingsError(
            "merging into a base of 4 or 8 bits rounds its weights once more; load the base in bfloat16 or float32,"
            " put the adapter on it and merge there"
        )
    merged = cast(Any, model).merge_and_unload()
    merge_code_rows(merged)
    return cast(PreTrainedModel, merged)
