"""Saved tensors go back into a model exactly, or not at all."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from llmrec.errors import DataError, MissingPartError


def load_exactly(model: nn.Module, state: Mapping[str, torch.Tensor], source: str | Path) -> None:
    """Loads weights that must be all there and of the right shapes: never random ones in their place.

    Raises:
        MissingPartError: A tensor is missing.
        DataError: There is one too many, or one of another shape.
    """
    expected = model.state_dict()
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing:
        raise MissingPartError(f"{source} lacks {len(missing)} tensor(s), first {missing[0]!r}")
    if extra:
        raise DataError(f"{source} holds {len(extra)} tensor(s) too many, first {extra[0]!r}")
    for name, tensor in expected.items():
        if tensor.shape != state[name].shape:
            raise DataError(
                f"{source}: {name!r} has shape {tuple(state[name].shape)}, but {tuple(tensor.shape)} follows from the"
                " settings and the items"
            )
    model.load_state_dict(dict(state))


def refuse_random_weights(missing: Iterable[str], source: str, *, unused: tuple[str, ...] = ()) -> None:
    """Refuses a pretrained model that transformers filled up with random weights, which it only logs.

    Args:
        missing: Names of the weights that the files lack.
        source: Folder or Hub ID, for the message.
        unused: Names that may be missing begin with one of these: what they name isn't used.

    Raises:
        MissingPartError: Another weight is missing.
    """
    needed = sorted(name for name in missing if not name.startswith(unused))
    if needed:
        raise MissingPartError(
            f"{source} lacks {len(needed)} weight(s) of its model, first {needed[0]!r}, and random ones would stand in"
            " their place: its files and its config.json don't belong together"
        )
