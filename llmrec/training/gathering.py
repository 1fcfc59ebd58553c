"""What is trained, gathered from a model that an engine shares out over processes, and handed back to it.

DeepSpeed ZeRO-3 leaves empty parameters behind, FSDP2 puts a `DTensor` in the place of each, DDP and ZeRO-2 leave the
whole ones. Here all of them look alike. Only parameters that are trained are gathered, a few at a time: the frozen
weights of a base of billions of parameters are never copied to save an adapter.

The model to search with is the unwrapped one, `accelerator.unwrap_model(model)`, under every engine: ZeRO-3 and FSDP2
gather weights in hooks of its modules, so it must have been through the engine (`Trainer.train`, `prepare_model`), and
every process must make the same forwards (`llmrec.recommendation.request_batches` sees to that).

This module knows engines and parameters. It knows nothing of files, codes or adapters.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llmrec.errors import DataError
from llmrec.processes import gathered

if TYPE_CHECKING:
    from accelerate import Accelerator

_GROUP_ELEMENTS = 2**28  # gathered at a time: 1 GB of float32
_EFFICIENT_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def trained_parameters(model: nn.Module, accelerator: "Accelerator") -> dict[str, Tensor]:
    """Copies of all parameters that are trained, whole, under any engine.

    To be called by every process, since all of them hold a share.

    Args:
        model: The trainer's model, wrapped or not, after the engine has prepared it.
        accelerator: Of the running processes.

    Returns:
        On the main process: name in the unwrapped model to a tensor on the CPU, of the parameter's shape and dtype;
        tied parameters once, under the name that `named_parameters` gives. On the others: nothing.
    """
    found: dict[str, Tensor] = {}
    for group in _groups(_trained(model, accelerator)):
        with gathered(group.values()):
            for name, parameter in group.items():
                whole = _whole(parameter.detach(), accelerator)
                if accelerator.is_main_process:
                    found[name] = whole.to("cpu", copy=True)
    return found


def load_trained_parameters(model: nn.Module, tensors: Mapping[str, Tensor], accelerator: "Accelerator") -> None:
    """Overwrites all parameters that are trained, whole or shared out, with given ones.

    To be called by every process with the same tensors: each reads the file. An optimizer that DeepSpeed keeps in
    float32 follows, so that training goes on from the new values; its moments stay.

    Args:
        model: As for `trained_parameters`.
        tensors: As `trained_parameters` gave them to the main process.
        accelerator: Of the running processes.

    Raises:
        DataError: A tensor is missing, unknown or of another shape; nothing was overwritten then.
    """
    trained = _trained(model, accelerator)
    _check(trained, tensors)
    with torch.no_grad():
        for group in _groups(trained):
            with gathered(group.values(), modify=True):
                for name, parameter in group.items():
                    _overwrite(parameter, tensors[name])
    for optimizer in _deepspeed_optimizers(accelerator):
        optimizer.refresh_fp32_params()


def keep_sums_in_float32(accelerator: "Accelerator") -> None:
    """Lets FSDP2 add up gradients, and hand on losses, in float32 where it computes in 16 bits.

    accelerate 1.15 rounds both to 16 bits; DDP doesn't. To be called before the model is prepared.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if plugin is not None and plugin.fsdp_version == 2 and policy is not None:
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)


def rebuilt_whole(model: nn.Module, accelerator: "Accelerator", build: Callable[[], nn.Module]) -> nn.Module | None:
    """A trained model that is shared out, as one that a single process can use, save and merge.

    To be called by every process. The frozen weights are not gathered but loaded once more.

    Args:
        model: As for `trained_parameters`.
        accelerator: Of the running processes.
        build: Gives the model as it was before the training, with the same names of parameters.

    Returns:
        On the main process the model in evaluation mode, where `build` puts it; on the others None.
    """
    tensors = trained_parameters(model, accelerator)
    if not accelerator.is_main_process:
        return None
    with loaded_whole():
        whole = build()
    parameters = dict(whole.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    return whole.eval()


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Within the block models are built and loaded whole by each process alone, also under ZeRO-3 and FSDP2.

    With `zero3_init_flag` transformers splits every model that is loaded, with collectives: a text encoder or a base
    model that only the main process loads would wait for the others forever. With `fsdp_cpu_ram_efficient_loading` it
    leaves the weights empty on all processes but the first of a machine.
    """
    from transformers.integrations import deepspeed

    config, efficient = deepspeed._hf_deepspeed_config_weak_ref, os.environ.get(_EFFICIENT_LOADING)
    deepspeed.unset_hf_deepspeed_config()
    os.environ[_EFFICIENT_LOADING] = "false"
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config
        if efficient is None:
            del os.environ[_EFFICIENT_LOADING]
        else:
            os.environ[_EFFICIENT_LOADING] = efficient


def _trained(model: nn.Module, accelerator: "Accelerator") -> dict[str, nn.Parameter]:
    unwrapped = accelerator.unwrap_model(model, keep_torch_compile=False)
    return {name: parameter for name, parameter in unwrapped.named_parameters() if parameter.requires_grad}


def _groups(parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters in their order, in groups that are gathered together; the same on every process."""
    group: dict[str, nn.Parameter] = {}
    size = 0
    for name, parameter in parameters.items():
        elements = _shape(parameter).numel()
        if group and size + elements > _GROUP_ELEMENTS:
            yield group
            group, size = {}, 0
        group[name] = parameter
        size += elements
    if group:
        yield group


def _shape(parameter: nn.Parameter) -> torch.Size:
    """The whole parameter's."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _whole(parameter: Tensor, accelerator: "Accelerator") -> Tensor:
    if not isinstance(parameter, DTensor):
        return parameter
    # Shares that wait on the CPU (offload) meet on the device, where the processes talk to each other.
    return cast(DTensor, parameter.to(accelerator.device)).full_tensor()


def _overwrite(parameter: nn.Parameter, value: Tensor) -> None:
    if isinstance(parameter, DTensor):
        local = parameter.to_local()
        whole = value.to(device=local.device, dtype=local.dtype)
        # Every process cuts its own share out of what it has: nothing is sent.
        share = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        local.copy_(share.to_local())
    else:
        parameter.copy_(value)


def _check(trained: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    if trained.keys() != tensors.keys():
        missing, unknown = sorted(trained.keys() - tensors.keys()), sorted(tensors.keys() - trained.keys())
        raise DataError(
            f"the tensors don't fit what the model trains: {len(missing)} missing (first {missing[:1]}),"
            f" {len(unknown)} unknown (first {unknown[:1]})"
        )
    for name, parameter in trained.items():
        if _shape(parameter) != tensors[name].shape:
            raise DataError(
                f"{name} has shape {list(tensors[name].shape)}, the model's {list(_shape(parameter))}: they belong to"
                " another base model or to other codes"
            )


def _deepspeed_optimizers(accelerator: "Accelerator") -> list[Any]:
    """The optimizers in which DeepSpeed keeps float32 copies of what is trained."""
    engine = getattr(getattr(accelerator, "deepspeed_engine_wrapped", None), "engine", None)
    optimizer = getattr(engine, "optimizer", None)
    return [optimizer] if hasattr(optimizer, "refresh_fp32_params") else []
