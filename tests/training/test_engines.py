"""DDP, DeepSpeed ZeRO-2 and ZeRO-3, FSDP2 and two machines train, save, resume and recommend as one process does.

Each engine is started once, on two CPU processes, with the file of accelerate_configs/ as it is; what it wrote is
looked at by many tests. Two runs a launch:

* "untied": SGD without clipping, which hides no factor; accumulation; as many samples as no process count divides;
* "tied": AdamW; no accumulation; packed rows, some of them empty; resumed from a checkpoint in the middle.
"""

import importlib.util
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from launching import begin, free_port, results_of, same_steps, start
from safetensors.torch import load_file

NUM_SAMPLES = 13
NUM_USERS = [5, 1]  # on two processes: three and two users, one and none
UNTIED = {
    "name": "untied",
    "num_samples": NUM_SAMPLES,
    "num_evaluated": NUM_SAMPLES,
    "num_users": NUM_USERS,
    "settings": {
        "tied": False,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 6,
        "loss_scope": "trie",
        "train_sampling_strategy": "group_by_length",
    },
}
TIED = {
    "name": "tied",
    "num_samples": NUM_SAMPLES,
    "resume_from": "checkpoint-3",
    "settings": {
        "per_device_train_batch_size": 2,
        "packing": True,
        "row_length": 32,
        "max_steps": 6,
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "lr_scheduler_type": "linear",
        "save_strategy": "steps",
        "save_steps": 3,
    },
}
HALF = {
    "name": "half",
    "settings": {"max_steps": 4, "per_device_train_batch_size": 4, "bf16": True, "max_grad_norm": 0.5},
}
BASE_OF = {"untied": "untied", "tied": "tied", "half": "tied"}


@dataclass(frozen=True)
class Engine:
    config: str
    distributed_type: str
    wrapped_by: str
    runs: tuple = (UNTIED, TIED)
    is_sharded: bool = False
    plan: dict = field(default_factory=dict)

    @property
    def is_deepspeed(self):
        return self.distributed_type == "DEEPSPEED"


ENGINES = {
    "ddp": Engine("ddp", "MULTI_CPU", "DistributedDataParallel"),
    "zero2": Engine("deepspeed_zero2", "DEEPSPEED", "DeepSpeedEngine"),
    "zero3": Engine("deepspeed_zero3", "DEEPSPEED", "DeepSpeedEngine", (UNTIED, TIED, HALF), is_sharded=True),
    "zero3_offload": Engine("deepspeed_zero3_offload", "DEEPSPEED", "DeepSpeedEngine", is_sharded=True),
    "fsdp2": Engine("fsdp2", "FSDP", "FSDPPeftModel", (UNTIED, TIED, HALF), is_sharded=True, plan={"shim": True}),
}


@pytest.fixture(scope="module")
def bases(factories, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for tied in (True, False):
        factories.make_tiny_model(tied=tied).save_pretrained(folder / ("tied" if tied else "untied"))
    return folder


@pytest.fixture(scope="module")
def script():
    """The functions of the started script."""
    spec = importlib.util.spec_from_file_location("train_in_processes", results_of.__globals__["SCRIPT"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Reference:
    log: list
    evaluation: dict
    recommended: dict
    tensors: dict


@pytest.fixture(scope="module")
def one_process(script, factories, bases, tmp_path_factory):
    """What one process makes of both runs, with the same batches at once."""
    found = {}
    for plan in (UNTIED, TIED, HALF):
        settings = {**plan["settings"], "gradient_accumulation_steps": 1, "save_strategy": "no", "bf16": False}
        share = 2 * plan["settings"].get("gradient_accumulation_steps", 1)
        settings["per_device_train_batch_size"] = share * plan["settings"]["per_device_train_batch_size"]
        name = plan["name"]
        alone = {**plan, "settings": settings, "base": str(bases / BASE_OF[name])}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(factories, "make_tiny_model", factories.make_tiny_model)
            trainer = script.make_trainer(alone, tmp_path_factory.mktemp(name))
        trainer.train()
        evaluation = trainer.evaluate(torch.utils.data.Subset(trainer.plan.samples, range(NUM_SAMPLES)))
        recommended = script.recommend(script.make_recommender(trainer.model), None, NUM_USERS)
        tensors = factories.trained_tensors(trainer)
        found[name] = Reference(factories.step_log(trainer), evaluation, recommended, tensors)
    return found


@dataclass(frozen=True)
class Launched:
    engine: Engine
    folder: object
    results: dict


@pytest.fixture(scope="module", params=list(ENGINES))
def launched(request, bases, repository, tmp_path_factory):
    engine = ENGINES[request.param]
    if engine.is_deepspeed and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    folder = tmp_path_factory.mktemp(request.param)
    runs = [{**plan, "base": str(bases / BASE_OF[plan["name"]])} for plan in engine.runs]
    config_file = repository / "accelerate_configs" / f"{engine.config}.yaml"
    start(folder, {"runs": runs, **engine.plan}, config_file=config_file, DS_ACCELERATOR="cpu")
    results = {plan["name"]: results_of(folder, name=plan["name"]) for plan in runs}
    return Launched(engine, folder, results)


def test_the_engine_is_the_one_asked_for(launched, one_process):
    engine = launched.engine
    for name in ("untied", "tied"):
        whole = 0
        for result in launched.results[name]:
            assert (result["num_processes"], result["distributed_type"]) == (2, engine.distributed_type)
            assert result["wrapped_by"] == engine.wrapped_by
            whole += result["held_elements"]
        trained = sum(tensor.numel() for tensor in one_process[name].tensors.values())
        # Both processes together hold every weight once (and some padding), or both hold all.
        assert (whole < 1.2 * whole_size(name, trained)) is engine.is_sharded
    if engine.is_deepspeed:
        stage = launched.results["untied"][0]["deepspeed"]["zero_optimization"]
        assert stage["stage"] == (3 if engine.is_sharded else 2)
        offloads = engine.config.endswith("offload")
        assert (stage["offload_param"]["device"] == "cpu") is offloads
        assert (stage["offload_optimizer"]["device"] == "cpu") is offloads


def whole_size(name, trained):
    from factories import NUM_TEXT_TOKENS, make_tiny_model

    model = make_tiny_model(tied=name == "tied", vocab_size=NUM_TEXT_TOKENS)
    return sum(parameter.numel() for parameter in model.parameters()) + trained


def test_nothing_is_looked_for_that_is_not_there(launched):
    """DDP says so at the first step, once for each process."""
    assert "find_unused_parameters" not in (launched.folder / "output-0.txt").read_text()


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_every_step_is_that_of_one_process(launched, one_process, name):
    for result in launched.results[name]:
        assert same_steps(result["log"], one_process[name].log), (result["log"], one_process[name].log)


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_what_was_trained_is_gathered_whole_and_equal(launched, one_process, name):
    """On the main process alone, under the names and with the values of one process."""
    assert [result["num_tensors"] for result in launched.results[name]] == [len(one_process[name].tensors), 0]
    found = load_file(launched.folder / name / "trained.safetensors")
    assert found.keys() == one_process[name].tensors.keys()
    for key, tensor in one_process[name].tensors.items():
        torch.testing.assert_close(found[key], tensor, atol=1e-5, rtol=1e-4)


def test_the_validation_loss_is_that_of_one_process(launched, one_process):
    for result in launched.results["untied"]:
        expected = one_process["untied"].evaluation
        assert result["evaluation"]["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)


def test_a_run_resumed_in_the_middle_is_the_run_that_went_on(launched):
    for result in launched.results["tied"]:
        assert same_steps(result["resumed_log"], result["log"], tolerance=1e-6)
        assert result["resumed_difference"] == 0


def test_checkpoints_hold_what_is_trained_and_no_base(launched, one_process):
    folder = launched.folder / "tied" / "checkpoint-3"
    saved = load_file(folder / "adapter_model.safetensors")
    assert len(saved) == len(one_process["tied"].tensors)
    assert not list(folder.rglob("model*.safetensors"))
    assert not list(folder.glob("pytorch_model*"))  # FSDP's
    for path in folder.rglob("*model_states.pt"):  # DeepSpeed's
        assert not any("base_layer" in name for name in torch.load(path, weights_only=False)["module"])


def test_recommends_under_the_engine_as_one_process_does(launched, one_process):
    """Also where processes hold different numbers of users, and search a different number of times."""
    expected = one_process["untied"].recommended
    for result in launched.results["untied"]:
        found = result["recommended"]
        assert found["items"] == expected["items"]
        np.testing.assert_allclose(found["scores"], expected["scores"], atol=1e-4)
        assert found["ranks"] == expected["ranks"]
    assert [len(ranks) for ranks in expected["ranks"].values()] == NUM_USERS


def test_the_adapter_loads_in_a_plain_process(launched, one_process, script, bases):
    from transformers import AutoModelForCausalLM

    from llmrec.adapter import load_adapter

    base = AutoModelForCausalLM.from_pretrained(bases / "untied")
    model = load_adapter(base, launched.folder / "untied" / "adapter")
    found = script.recommend(script.make_recommender(model), None, [])
    of_engine = launched.results["untied"][0]["recommended"]
    assert found["items"] == of_engine["items"]
    np.testing.assert_allclose(found["scores"], of_engine["scores"], atol=1e-5)


def test_what_was_gathered_is_loaded_back(launched):
    """Into the model, and into what DeepSpeed's optimizer goes on from."""
    for result in launched.results["untied"]:
        assert result["loaded_difference"] == 0


def test_precision_and_clipping_are_the_recipes(launched, one_process):
    if HALF not in launched.engine.runs:
        pytest.skip("looked at under two engines")
    for name, enabled, clipping in (("untied", False, 1e9), ("half", True, 0.5)):
        of_deepspeed = launched.results[name][0].get("deepspeed")
        if launched.engine.is_deepspeed:
            assert of_deepspeed["bf16"]["enabled"] is enabled
            assert of_deepspeed["gradient_clipping"] == clipping
            assert ("torch.bfloat16" in launched.results[name][0]["dtypes"]) is enabled
    assert same_steps(launched.results["half"][0]["log"], one_process["half"].log, tolerance=0.05)


def test_two_machines_equal_one_process(one_process, bases, repository, tmp_path):
    """Both on this one: each starts the template with its own rank, and one process where the template has eight."""
    plan = {**TIED, "base": str(bases / "tied"), "name": ""}
    del plan["resume_from"]
    options = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    config_file = repository / "accelerate_configs" / "multi_node.yaml"
    processes = [
        begin(tmp_path, plan, config_file=config_file, options=[*options, "--machine_rank", str(rank)])
        for rank in range(2)
    ]
    for process in processes:
        try:
            process.wait(timeout=120)
        finally:
            process.kill()
    for result in results_of(tmp_path):
        assert (result["num_processes"], result["wrapped_by"]) == (2, "DistributedDataParallel")
        assert same_steps(result["log"], one_process["tied"].log)
