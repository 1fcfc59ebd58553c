"""What is trained on a frozen base, LoRA layers and the new rows or the new rows alone: one adapter.

PEFT and the Trainer know nothing of `new_rows`. Left alone they freeze them (`get_peft_model`), leave them out of
checkpoints, and write the whole resized embedding matrix instead. Everything that adds, saves or loads an adapter in
llmrec goes through here. A saved adapter holds LoRA and new rows and nothing else, the rows in the layout of PEFT's
trainable tokens, so that plain PEFT on a resized base loads it and gives equal logits. Without LoRA it is an adapter
of trainable tokens and of no other kind (`peft_type` TRAINABLE_TOKENS), which PEFT loads as well.
"""

import copy
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmrec.errors import DataError, MissingPartError, SettingsError
from llmrec.files import atomic_file, read_json, write_json
from llmrec.vocabulary import (
    CodeRows,
    CodeVocabulary,
    add_code_rows,
    code_row_parameters,
    has_code_rows,
    merge_code_rows,
)

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

logger = logging.getLogger(__name__)

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_ROWS_SUFFIX = ".token_adapter.trainable_tokens_delta"  # PEFT's name for the rows of trainable tokens, beside LoRA
_ROWS_ALONE = ("base_model.model.", ".trainable_tokens_delta")  # its names around a module, without LoRA
_ADAPTER_NAME = "default"
_MARK = "_only_code_rows_are_trained"  # a model's attribute


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
    _keep_differentiable(model)
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


def freeze_base(model: PreTrainedModel) -> None:
    """Freezes all but the new rows of a model that has no LoRA: the rows are then its adapter.

    Args:
        model: After `add_code_rows`, its base in any precision. It changes in place.

    Raises:
        SettingsError: The model has no code rows yet, or LoRA.
    """
    if not has_code_rows(model):
        raise SettingsError("add code rows before freezing the base: call add_code_rows(model, vocabulary) first")
    if _has_lora(model):
        raise SettingsError("the model has LoRA layers, which add_lora has set up: only a plain model can be frozen")
    _keep_differentiable(model)
    model.requires_grad_(False)
    for parameter in code_row_parameters(model):
        parameter.requires_grad_(True)
    setattr(model, _MARK, True)
    if getattr(model, "is_quantized", False):
        # The Trainer refuses a base of 4 or 8 bits without PEFT's own layers; this is how transformers says that
        # something of 16 or 32 bits is trained on it (seen in 5.17 to 5.23).
        model._hf_peft_config_loaded = True


def _keep_differentiable(model: nn.Module) -> None:
    """Keeps bitsandbytes from packing 4-bit weights anew.

    On a CPU with AVX512-BF16 it does so (0.50) in a layer's first forward in evaluation mode. From then on no gradient
    passes through that layer, and nothing says so: one evaluation, and the rest of a training run learns the wrong
    thing.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            if getattr(getattr(cast(Any, module).weight, "quant_state", None), "packing_format_for_cpu", False):
                raise SettingsError(
                    f"the 4-bit weights of {name} were used before and are packed for inference, which passes no"
                    " gradient: load the base anew, and set up what is trained before its first forward"
                )
            module.support_avx512bf16_for_cpu = False


def is_adapter(model: nn.Module) -> bool:
    """Whether the base is as it was loaded, so that LoRA and new rows, or the new rows alone, say all that is new."""
    return _has_lora(model) or getattr(model, _MARK, False)


def _has_lora(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def save_adapter(
    model: "PeftModel | PreTrainedModel",
    folder: str | os.PathLike[str],
    *,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes `adapter_model.safetensors` and `adapter_config.json`: LoRA and new rows, nothing else.

    Args:
        model: What `add_lora` or `load_adapter` returned, or a model after `freeze_base`.
        folder: Made where it is missing.
        state_dict: The gathered parameters of a sharded model (ZeRO-3, FSDP2); by default the model's own.

    Raises:
        SettingsError: The base was trained too: an adapter would not hold what it learned.
        DataError: `state_dict` lacks a parameter.
    """
    folder = Path(folder)
    names = parameter_names(model)
    parameters = dict(model.named_parameters()) if state_dict is None else state_dict
    missing = sorted(set(names.values()) - parameters.keys())
    if missing:
        raise DataError(f"can't save the adapter: the model's state has no {missing[0]} ({len(missing)} are missing)")
    tensors = {key: parameters[name].detach().cpu().contiguous() for key, name in names.items()}
    rows = {name: len(parameters[f"{name}.new_rows"]) for name in _row_keys(model)}
    settings = _settings_to_save(model, rows)
    with atomic_file(folder / ADAPTER_WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(folder / ADAPTER_CONFIG, json.loads(json.dumps(settings, default=str)))


def parameter_names(model: "PeftModel | PreTrainedModel") -> dict[str, str]:
    """Name of each tensor of the saved adapter -> name of the parameter in the (unwrapped) model.

    Raises:
        SettingsError: The model is no adapter.
    """
    if not is_adapter(model):
        raise SettingsError("the model is trained whole: there is no adapter of it. Save the model itself")
    if not _has_lora(model):
        before, after = _ROWS_ALONE
        return {f"{before}{name}{after}": f"{name}.new_rows" for name in _row_keys(model)}
    from peft import get_peft_model_state_dict

    lora: dict[str, Any] = {name: name for name, _ in model.named_parameters() if "new_rows" not in name}
    names: dict[str, str] = get_peft_model_state_dict(
        model, state_dict=lora, adapter_name=_ADAPTER_NAME, save_embedding_layers=False
    )
    return {**names, **{f"{name}{_ROWS_SUFFIX}": f"{name}.new_rows" for name in _row_keys(model)}}


def _settings_to_save(model: Any, rows: Mapping[str, int]) -> dict[str, Any]:
    """What `adapter_config.json` holds; `rows` says how many each module has, which a sharded one doesn't know."""
    indices = {
        name.rpartition(".")[2]: list(range(module.first_token_id, module.first_token_id + rows[name]))
        for name, module in _row_keys(model).items()
    }
    if _has_lora(model):
        config = copy.copy(model.peft_config[_ADAPTER_NAME])
        settings = {**config.to_dict(), "trainable_token_indices": indices, "inference_mode": True}
    else:
        from peft import TrainableTokensConfig

        config = TrainableTokensConfig(
            token_indices=next(iter(indices.values())), target_modules=sorted(indices), inference_mode=True
        )
        settings = {**config.to_dict(), "base_model_name_or_path": model.config.name_or_path}
    settings["peft_type"] = str(getattr(config.peft_type, "value", config.peft_type))
    return {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}


def _row_keys(model: nn.Module) -> dict[str, Any]:
    """Module name -> module, of the embedding, and of the head where it isn't tied to it."""
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, CodeRows) and id(module.new_rows) not in seen:
            seen.add(id(module.new_rows))
            found[name] = module
    return found


def load_adapter(
    model: PreTrainedModel, folder: str | os.PathLike[str], *, is_trainable: bool = False
) -> "PeftModel | PreTrainedModel":
    """Puts a saved adapter on its base model, which needs neither resizing nor code rows beforehand.

    A base that was resized for the code tokens gives the same logits: its own rows of them are never read.

    Args:
        model: The base the adapter was trained on. It changes in place.
        folder: Where `save_adapter` wrote.
        is_trainable: Whether LoRA and new rows are to be trained on.

    Returns:
        A `PeftModel` where the adapter has LoRA, else the model given.

    Raises:
        MissingPartError: One of the two files isn't there.
        DataError: The adapter has no new rows, or doesn't fit the model.
    """
    from peft import LoraConfig

    folder = Path(folder)
    settings = read_json(folder / ADAPTER_CONFIG)
    rows_alone = settings.get("peft_type") == "TRAINABLE_TOKENS"
    indices = settings.get("trainable_token_indices")
    ids = settings.get("token_indices") if rows_alone else next(iter(indices.values())) if indices else None
    if not ids or not (rows_alone or isinstance(indices, dict)):
        raise DataError(f"{folder / ADAPTER_CONFIG} names no trained tokens: it is not an llmrec adapter")
    if not has_code_rows(model):
        add_code_rows(model, CodeVocabulary((len(ids),), int(ids[0])), init_scale=0.0)
    adapted: PeftModel | PreTrainedModel = model
    if rows_alone:
        freeze_base(model)
    else:
        settings = {**settings, "trainable_token_indices": None, "inference_mode": not is_trainable}
        adapted = add_lora(model, LoraConfig.from_peft_type(**settings))
    load_adapter_weights(adapted, folder)
    if not is_trainable:
        adapted.requires_grad_(False).eval()
    return adapted


def load_adapter_weights(model: "PeftModel | PreTrainedModel", folder: str | os.PathLike[str]) -> None:
    """Overwrites LoRA and new rows of a model with those of a saved adapter, and refuses to leave any as they were.

    Raises:
        MissingPartError: The weights file isn't there.
        DataError: A tensor is missing, unknown or of another shape.
    """
    tensors = read_adapter_weights(model, folder)
    own = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise DataError(
                f"{Path(folder) / ADAPTER_WEIGHTS}: {name} has shape {list(tensor.shape)}, the model's"
                f" {list(own[name].shape)}; the adapter belongs to another base model or to other codes"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def read_adapter_weights(model: "PeftModel | PreTrainedModel", folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of a saved adapter, whole and on the CPU, by the names that their parameters have in the model.

    Raises:
        MissingPartError: The weights file isn't there.
        DataError: A tensor is missing or unknown.
    """
    path = Path(folder) / ADAPTER_WEIGHTS
    if not path.is_file():
        raise MissingPartError(f"{path} is missing: the folder holds no adapter")
    tensors, names = load_file(path), parameter_names(model)
    if names.keys() != tensors.keys():
        missing, unknown = sorted(names.keys() - tensors.keys()), sorted(tensors.keys() - names.keys())
        raise DataError(
            f"{path} doesn't fit the model: {len(missing)} tensor(s) missing (first {missing[:1]}), {len(unknown)}"
            f" unknown (first {unknown[:1]})"
        )
    return {names[key]: tensor for key, tensor in tensors.items()}


def merge_adapter(model: "PeftModel | PreTrainedModel") -> PreTrainedModel:
    """Writes LoRA and new rows into the base and returns it as a plain transformers model with the same logits.

    The model given is used up. On a base of 4 or 8 bits merging would round the weights again, and the logits with
    them: `merge_quantized` takes the base in 16 or 32 bits for that.

    Raises:
        SettingsError: The base is quantised.
    """
    if is_quantized(model):
        raise SettingsError(
            "merging into a base of 4 or 8 bits rounds its weights once more; load the base in bfloat16 or float32"
            " and merge there: merge_quantized(model, base, probe)"
        )
    merged: Any = cast(Any, model).merge_and_unload() if _has_lora(model) else model
    merge_code_rows(merged)
    if hasattr(merged, _MARK):
        delattr(merged, _MARK)
    return cast(PreTrainedModel, merged)


def merge_quantized(model: "PeftModel | PreTrainedModel", base: PreTrainedModel, probe: Tensor) -> PreTrainedModel:
    """Merges an adapter that was trained on a base of 4 or 8 bits into the same base in 16 or 32 bits.

    The logits are those of the adapter on the base given. They differ from those of the training run by what its
    rounding did, which LoRA has partly learned to undo; the difference is logged.

    Args:
        model: The adapter on its quantised base; it stays as it is.
        base: The same base, loaded in bfloat16 or float32. It is used up.
        probe: Token IDs int64 [B, T] without padding, to compare the logits on.

    Raises:
        SettingsError: `base` is quantised itself.
        DataError: `base` is another model.
    """
    if is_quantized(base):
        raise SettingsError("the base to merge into must be loaded in bfloat16 or float32, without quantisation")
    with TemporaryDirectory() as folder:
        save_adapter(model, folder)
        whole = load_adapter(base, folder)
    with torch.no_grad():
        ours = whole(input_ids=probe.to(whole.device), use_cache=False).logits.float().cpu()
        difference = (model(input_ids=probe.to(model.device), use_cache=False).logits.float().cpu() - ours).abs()
    logger.info(
        "merging into the base in %s: logits differ from those on the quantised base by %.3g at most, %.3g on average"
        " (their standard deviation: %.3g)",
        str(whole.dtype).removeprefix("torch."), difference.max(), difference.mean(), ours.std(),
    )  # fmt: skip
    return merge_adapter(whole)


def is_quantized(model: nn.Module) -> bool:
    """Whether the base is held in 8 bits or fewer."""
    base = cast(Any, model).get_base_model() if _has_lora(model) else model
    return bool(getattr(base, "is_quantized", False))
