"""The processes that work together: who has which rows, how tensors and gradients meet, who holds which weights.

The processes are accelerate's (`accelerate launch`); here is only what is computed over them. The rule of all losses:
every process returns its share, so that the sum over processes is the loss of the whole batch, and gradients are
added. So any number of processes, also with parts of unequal size, gives the gradient of one.

An engine may also share the weights of a model out over them (DeepSpeed ZeRO-3, FSDP, tensor parallelism): then no
process can compute alone, and what is outside a forward has to be gathered first.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed
from torch import nn


class Processes:
    """Some processes that work on one thing together; see `alone` and `launched`.

    Args:
        index: Number of this process, from 0.
        count: How many there are.
        device: Where this one computes.
    """

    def __init__(self, index: int, count: int, device: torch.device | str):
        self.index = index
        self.count = count
        self.device = torch.device(device)

    def __repr__(self) -> str:
        return f"Processes({self.index} of {self.count}, on {self.device})"

    @classmethod
    def alone(cls, device: torch.device | str | None = None) -> "Processes":
        """This process by itself, also where others run; device None: the first GPU, or else the CPU."""
        return cls(0, 1, device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @classmethod
    def launched(cls) -> "Processes":
        """All processes that `accelerate launch` started; this one alone where it started none.

        What is then called with them must be called by every one of them, or the others wait forever.
        """
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        device = "cpu" if state.device.type == "cpu" else state.device  # accelerate numbers CPUs: "cpu:1"
        return cls(state.process_index, state.num_processes, device)

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and logs."""
        return self.index == 0

    def part(self, size: int) -> slice:
        """This process's rows of `size`: contiguous, in the order of processes, sizes differing by 1 at most."""
        return self._part_of(self.index, size)

    def _part_of(self, index: int, size: int) -> slice:
        return slice(index * size // self.count, (index + 1) * size // self.count)

    def gather_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of all processes, one part after the other, on each of them.

        Differentiable: the gradient of a row is the sum of what all processes have for it.

        Args:
            tensor: [B_i, ...]; the parts may have different numbers of rows.
        """
        if self.count == 1:
            return tensor
        gathered: torch.Tensor = _GatherRows.apply(tensor, self)
        return gathered

    def gather_array(self, array: np.ndarray) -> np.ndarray:
        """The rows of all processes' NumPy arrays, in their order, on each of them; without gradients."""
        if self.count == 1:
            return array
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
        return self.gather_rows(tensor).cpu().numpy()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor added over processes: a new one, without gradient."""
        total = tensor.detach().clone()
        if self.count > 1:
            distributed.all_reduce(total)
        return total

    def sum_gradients(self, module: nn.Module) -> None:
        """Adds the gradients of all processes, in one exchange; a parameter without one counts as 0."""
        if self.count == 1:
            return
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def broadcast(self, value: Any) -> Any:
        """The main process's value on all of them; tensors, arrays, plain objects."""
        if self.count == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Waits for all of them."""
        if self.count > 1:
            distributed.barrier()

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process goes through the block before the others do: it writes a cache, they read it."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()


def is_sharded(model: nn.Module) -> bool:
    """Whether this process has only a share of some of the model's parameters, or may have (FSDP with one process).

    Every forward of such a model needs all processes at once.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return True
    # `ds_id`: DeepSpeed's ZeRO-3
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def device_of(model: Any) -> torch.device:
    """Where a model computes; the weights of a sharded one may wait on the CPU (offload)."""
    device: torch.device = Processes.launched().device if is_sharded(model) else model.device
    return device


@contextlib.contextmanager
def gathered(parameters: Iterable[nn.Parameter], *, modify: bool = False) -> Iterator[None]:
    """Within the block parameters that ZeRO-3 has shared out are whole, on every process; others are as they are.

    All processes must enter it.

    Args:
        parameters: Shared out or not; repeats are fine.
        modify: Whether what the main process writes into them in the block is shared out to all, after it.
    """
    shared = list({id(parameter): parameter for parameter in parameters if hasattr(parameter, "ds_id")}.values())
    if not shared:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(shared, modifier_rank=0 if modify else None):
        yield


class _GatherRows(torch.autograd.Function):
    """`Processes.gather_rows`."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, processes: Processes) -> torch.Tensor:
        sizes = torch.zeros(processes.count, dtype=torch.int64, device=tensor.device)
        sizes[processes.index] = len(tensor)
        distributed.all_reduce(sizes)
        counts = sizes.tolist()
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(parts, padded)
        ctx.start, ctx.size = sum(counts[: processes.index]), len(tensor)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradients[0].contiguous().clone()
        distributed.all_reduce(total)
        return total[ctx.start : ctx.start + ctx.size], None
