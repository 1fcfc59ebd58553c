"""Gathering in one process; test_engines.py does it under every engine."""

import os

import pytest
import torch
from accelerate import Accelerator
from transformers.integrations import deepspeed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from llmrec.errors import DataError
from llmrec.training import gathering
from llmrec.training.gathering import load_trained_parameters, loaded_whole, rebuilt_whole, trained_parameters


@pytest.fixture
def trainer(factories, tmp_path):
    return factories.make_trainer(tmp_path, tied=False)


def test_all_that_is_trained_and_nothing_else(trainer, monkeypatch):
    expected = {name: tensor for name, tensor in trainer.model.named_parameters() if tensor.requires_grad}
    assert 0 < len(expected) < len(list(trainer.model.parameters()))
    assert sum("new_rows" in name for name in expected) == 2
    for elements in (2**28, 100, 1):  # gathered at a time
        monkeypatch.setattr(gathering, "_GROUP_ELEMENTS", elements)
        found = trained_parameters(trainer.model, trainer.accelerator)
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_groups_keep_the_order_and_hold_no_more_than_they_may(monkeypatch):
    monkeypatch.setattr(gathering, "_GROUP_ELEMENTS", 10)
    parameters = {str(number): torch.nn.Parameter(torch.zeros(size)) for number, size in enumerate((4, 6, 1, 30, 2))}
    groups = [list(group) for group in gathering._groups(parameters)]
    assert groups == [["0", "1"], ["2"], ["3"], ["4"]]


def test_what_is_gathered_is_a_copy(trainer):
    found = trained_parameters(trainer.model, trainer.accelerator)
    before = {name: tensor.clone() for name, tensor in found.items()}
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(1)
    assert all(torch.equal(found[name], before[name]) for name in before)


def test_loading_is_the_other_way_round(trainer):
    model = trainer.model
    frozen = {name: tensor.clone() for name, tensor in model.named_parameters() if not tensor.requires_grad}
    tensors = {name: tensor + 1 for name, tensor in trained_parameters(model, trainer.accelerator).items()}
    load_trained_parameters(model, tensors, trainer.accelerator)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in {**frozen, **tensors}.items())


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape"])
def test_what_does_not_fit_is_refused_and_changes_nothing(trainer, fault):
    before = trained_parameters(trainer.model, trainer.accelerator)
    tensors = {name: tensor + 1 for name, tensor in before.items()}
    last = list(tensors)[-1]
    if fault == "missing":
        del tensors[last]
    elif fault == "unknown":
        tensors["other"] = torch.zeros(1)
    else:
        tensors[last] = tensors[last][:-1]
    with pytest.raises(DataError, match={"missing": "1 missing", "unknown": "1 unknown", "shape": "shape"}[fault]):
        load_trained_parameters(trainer.model, tensors, trainer.accelerator)
    after = trained_parameters(trainer.model, trainer.accelerator)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_rebuilt_model_is_the_trained_one(factories, trainer, tmp_path):
    trainer.train()
    found = rebuilt_whole(
        trainer.model, trainer.accelerator, lambda: factories.make_trainer(tmp_path, tied=False).model
    )
    assert found is not trainer.model
    assert not found.training
    input_ids = torch.arange(20).view(1, -1)
    assert torch.equal(found(input_ids=input_ids).logits, trainer.model.eval()(input_ids=input_ids).logits)


class Zero3:
    """What transformers looks at to know that ZeRO-3 is on."""

    def is_zero3(self):
        return True


def test_models_are_loaded_whole_and_then_as_before(monkeypatch):
    config = Zero3()
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: config)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    assert is_deepspeed_zero3_enabled()
    with loaded_whole():
        assert not is_deepspeed_zero3_enabled()
        assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    assert is_deepspeed_zero3_enabled()
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
    monkeypatch.delenv("FSDP_CPU_RAM_EFFICIENT_LOADING")
    with loaded_whole():
        pass
    assert "FSDP_CPU_RAM_EFFICIENT_LOADING" not in os.environ


def test_a_plain_linear_model(tmp_path):
    """Full training, without any wrapper."""
    model = torch.nn.Linear(3, 2)
    found = trained_parameters(model, Accelerator(cpu=True))
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {"weight": (2, 3), "bias": (2,)}
