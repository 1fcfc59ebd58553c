"""Joint training on two processes, under every engine, is that of one process; killed and resumed, that of one run.

Each engine is started once, on two CPU processes, with the file of accelerate_configs/ as it is. Three runs a launch:

* "t5": trained whole, two batches accumulated;
* "llama": LoRA, packed rows, of which some are empty;
* "whole": `train_jointly` from data to folder, both phases: the last one begins a second training in each process.

FSDP2 can't take a T5, and has the LLaMA in "whole" too.

SGD hides no factor. The item tokenizer and the projections have AdamW always.
"""

import functools
import importlib.util
import json
import multiprocessing
import os
import signal
from dataclasses import dataclass

import launching
import numpy as np
import pytest
import tiny_t5
import torch
import yaml
from safetensors.torch import load_file

from llmrec.training.checkpoint_files import newest_whole_checkpoint

SCRIPT = launching.SCRIPT.with_name("joint_in_processes.py")
# Strong enough that codes and weights would be others without it, or with the negatives of one process alone.
ALIGNMENT = {"sia_weight": 0.1, "psa_weight": 0.1}
TOKENIZER = {"learning_rate": 0.01, "batch_size": 5, "passes": 4}
T5 = {
    "name": "t5",
    "family": "t5",
    "tokenizer": TOKENIZER,
    "alignment": ALIGNMENT,
    "settings": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
    },
}
LLAMA = {
    "name": "llama",
    "family": "llama",
    "tokenizer": TOKENIZER,
    "alignment": ALIGNMENT,
    "settings": {
        "per_device_train_batch_size": 1,
        "packing": True,
        "row_length": 40,
        "num_train_epochs": 2,
        "learning_rate": 0.02,
    },
}
# Dropout and AdamW have states to lose. Four steps an epoch, a checkpoint every two: in an epoch, and at its end.
STOPPED = {
    "name": "stopped",
    "family": "t5",
    "tokenizer": TOKENIZER,
    "alignment": ALIGNMENT,
    "settings": {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 3,
        "optim": "adamw_torch",
        "learning_rate": 0.001,
        "save_strategy": "steps",
        "save_steps": 2,
    },
}
WHOLE = {
    "cycle": 2,
    "alignment_warmup_epochs": 0,
    **ALIGNMENT,
    "counter_size": 4,
    "tokenizer_learning_rate": 0.01,
    "tokenizer_batch_size": 5,
    "tokenizer_passes": 4,
    "final_epochs": 1,
    "final_learning_rate": 0.02,
    "num_printed": 0,
    "max_history": 8,
    "packing": False,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "code_learning_rate_factor": 1.0,
    "optim": "sgd",
    "learning_rate": 0.02,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1e9,
    "num_train_epochs": 2,
    "save_strategy": "epoch",
    "logging_steps": 1,
    "disable_tqdm": True,
    "seed": 1,
}


OF_FAMILY = {
    "t5": {
        "trained": "full",
        "template": "{history}",
        "sample_form": "prefix",
        "eval_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
    },
    "llama": {
        "trained": "lora",
        "lora_dropout": 0.0,
        "template": "Items chosen : {history}",
        "eval_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
    },
}


@dataclass(frozen=True)
class Engine:
    config: str
    distributed_type: str
    is_sharded: bool = False
    families: tuple = ("t5", "llama")

    @property
    def is_deepspeed(self):
        return self.distributed_type == "DEEPSPEED"


ENGINES = {
    "ddp": Engine("ddp", "MULTI_CPU"),
    "zero2": Engine("deepspeed_zero2", "DEEPSPEED"),
    "zero3": Engine("deepspeed_zero3", "DEEPSPEED", is_sharded=True),
    "fsdp2": Engine("fsdp2", "FSDP", is_sharded=True, families=("llama",)),
}
# Names of the runs of a trainer: parameters of the tests, passed over where the engine has no such run.
FAMILIES = pytest.mark.parametrize("name", ["t5", "llama"])


@pytest.fixture(scope="module")
def script():
    """The functions of the started script."""
    spec = importlib.util.spec_from_file_location("joint_in_processes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bases(script, factories, tmp_path_factory):
    """Saved models: what ZeRO-3 draws, since it shares a model out while it is made, is not what one process draws."""
    folder = tmp_path_factory.mktemp("bases")
    tiny_t5.make_t5().save_pretrained(folder / "t5")
    script.make_text_tokenizer().save_pretrained(folder / "t5")
    tiny_t5.make_t5(dropout_rate=0.1).save_pretrained(folder / "stopped")
    factories.make_tiny_model().save_pretrained(folder / "llama")
    factories.make_text_tokenizer().save_pretrained(folder / "llama")
    return folder


def based(plan, bases):
    return {**plan, "base": str(bases / plan["name"])}


@pytest.fixture(scope="module")
def whole(script, factories, bases, tmp_path_factory):
    """Runs of `train_jointly` by family: data, embeddings, settings of the item tokenizer and base model, as files."""
    folder = tmp_path_factory.mktemp("whole")
    factories.make_dataset().save(folder / "data")
    script.make_embeddings().save(folder / "vectors.safetensors")
    settings = {
        "method": "rq_vae",
        "dataset": str(folder / "data"),
        "embeddings": {"text": {"from": "file", "path": str(folder / "vectors.safetensors")}},
        "item_tokenizer": {**script.item_tokenizer_settings(), "hidden_sizes": [16]},
        "uniqueness_policy": "extra_level",
    }
    (folder / "rq_vae.yaml").write_text(yaml.safe_dump(settings))
    files = {"dataset": str(folder / "data"), "item_tokenizer": str(folder / "rq_vae.yaml")}
    return {
        family: {"name": "whole", "whole": {**WHOLE, **files, **of, "model_name_or_path": str(bases / family)}}
        for family, of in OF_FAMILY.items()
    }


@dataclass(frozen=True)
class Run:
    """What a `JointTrainer` left: results and what stands beside the model, of each process; the model's tensors."""

    results: list
    beside: list
    trained: dict

    @classmethod
    def of(cls, folder, name, *, num_processes=2):
        results = launching.results_of(folder, num_processes=num_processes, name=name)
        files = [folder / name / f"joint-{index}.safetensors" for index in range(num_processes)]
        return cls(results, [load_file(file) for file in files], load_file(folder / name / "trained.safetensors"))


def of_one_process(plan, key="settings"):
    """The same batches at once."""
    settings = plan[key]
    doubled = {"per_device_train_batch_size": 2 * settings["per_device_train_batch_size"]}
    return {**plan, key: {**settings, **doubled}}


@pytest.fixture(scope="module")
def one_process(script, bases, whole, tmp_path_factory):
    """Folders by family with what one process makes of the runs."""
    folders = {}
    for plan in (T5, LLAMA):
        family = plan["name"]
        folders[family] = tmp_path_factory.mktemp(f"one_process_{family}")
        for part in (family, "whole"):
            (folders[family] / part).mkdir()
        script.run_trainer(based(of_one_process(plan), bases), folders[family] / family)
        script.run_whole(of_one_process(whole[family], "whole"), folders[family] / "whole")
    return folders


def start(folder, plan, repository, config="ddp"):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "SCRIPT", SCRIPT)
        config_file = repository / "accelerate_configs" / f"{config}.yaml"
        launching.start(folder, plan, config_file=config_file, DS_ACCELERATOR="cpu")


@dataclass(frozen=True)
class Launched:
    engine: Engine
    folder: object

    def run(self, name):
        if name not in self.engine.families:
            pytest.skip(f"{self.engine.config} can't take the {name}")
        return Run.of(self.folder, name)


@pytest.fixture(scope="module")
def launch(bases, whole, repository, tmp_path_factory):
    """`launch(name)`: the engine of that name, started once."""

    @functools.cache
    def launched(name):
        engine = ENGINES[name]
        folder = tmp_path_factory.mktemp(name)
        runs = [based(plan, bases) for plan in (T5, LLAMA) if plan["name"] in engine.families]
        plan = {"runs": [*runs, whole[engine.families[0]]], "shim": name == "fsdp2"}
        start(folder, plan, repository, engine.config)
        return Launched(engine, folder)

    return launched


@pytest.fixture(scope="module", params=list(ENGINES))
def launched(request, launch):
    if ENGINES[request.param].is_deepspeed and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    return launch(request.param)


@pytest.fixture(scope="module")
def expected_whole(launched, one_process):
    """The folder of one process for the family that the engine's whole run has."""
    return one_process[launched.engine.families[0]]


def measured(records):
    """What doesn't depend on how fast it went."""
    return [{name: value for name, value in record.items() if "seconds" not in name} for record in records]


def assert_same_records(found, expected, **tolerance):
    found, expected = measured(found), measured(expected)
    assert [record.keys() for record in found] == [record.keys() for record in expected]
    for left, right in zip(found, expected, strict=True):
        for name, value in right.items():
            assert left[name] == pytest.approx(value, **tolerance), name


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: name + text)


def test_two_processes_of_the_engine_asked_for(launched):
    for name in launched.engine.families:
        for result in launched.run(name).results:
            assert (result["num_processes"], result["distributed_type"]) == (2, launched.engine.distributed_type)
    main, other = launching.results_of(launched.folder, name="whole")
    assert not main["sharded"]
    assert other["sharded"] is launched.engine.is_sharded


@FAMILIES
def test_every_step_is_that_of_one_process(launched, one_process, name):
    expected = Run.of(one_process[name], name, num_processes=1).results[0]["log"]
    for result in launched.run(name).results:
        assert launching.same_steps(result["log"], expected), (result["log"], expected)


@FAMILIES
def test_weights_and_codes_are_those_of_one_process(launched, one_process, name):
    """Model, item tokenizer and projections: in-batch negatives are those of the batch of both processes."""
    expected, found = Run.of(one_process[name], name, num_processes=1), launched.run(name)
    assert_close(found.trained, expected.trained)
    for result, beside in zip(found.results, found.beside, strict=True):
        assert_close(beside, expected.beside[0])
        assert result["codes_before"] == expected.results[0]["codes_before"]
        assert result["codes"] == expected.results[0]["codes"] != result["codes_before"]


@FAMILIES
def test_both_processes_measure_what_one_does(launched, one_process, name):
    expected = Run.of(one_process[name], name, num_processes=1).results[0]["records"]
    assert len(expected) == 2
    for record in expected:
        assert record["aligned"]
        assert record["share_changed"] > 0
        assert {"tokenizer_sia", "tokenizer_psa", "recommender_sia", "recommender_psa"} < record.keys()
    for result in launched.run(name).results:
        assert_same_records(result["records"], expected, rel=1e-5, abs=1e-5)


# From data to folder


def phase_log(folder, phase=""):
    """Steps and validation losses of a phase, by its last checkpoint."""
    last = max((folder / "whole" / phase).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = json.loads((last / "trainer_state.json").read_text())
    steps = [line for line in state["log_history"] if "loss" in line]
    return steps, [line["eval_loss"] for line in state["log_history"] if "eval_loss" in line]


@pytest.mark.parametrize("phase", ["", "final"])
def test_both_phases_are_those_of_one_process(launched, expected_whole, phase):
    """The last phase, a second training in the same processes, begins with the weights of the best epoch."""
    steps, losses = phase_log(launched.folder, phase)
    expected_steps, expected_losses = phase_log(expected_whole, phase)
    assert launching.same_steps(steps, expected_steps, tolerance=1e-4), (steps, expected_steps)
    assert [step["learning_rate"] for step in steps] == [step["learning_rate"] for step in expected_steps]
    assert losses == pytest.approx(expected_losses, rel=1e-4)


def test_the_best_epoch_is_not_the_last(one_process):
    """Else nothing here would notice where codes or weights of the last one were taken."""
    _, losses = phase_log(one_process["t5"])
    assert losses[0] < losses[1]
    codes = [
        load_file(one_process["t5"] / "whole" / f"checkpoint-{step}" / "joint" / "semantic_ids.safetensors")["codes"]
        for step in (4, 8)
    ]
    assert not torch.equal(*codes)


def test_results_and_codes_are_those_of_one_process(launched, expected_whole):
    expected = launching.results_of(expected_whole, num_processes=1, name="whole")[0]
    for result in launching.results_of(launched.folder, name="whole"):
        assert result["codes"] == expected["codes"]
        assert result["metrics"] == expected["metrics"]
    found, expected = (
        json.loads((folder / "whole" / "joint_history.json").read_text())["cycles"]
        for folder in (launched.folder, expected_whole)
    )
    assert_same_records(found, expected, rel=1e-4, abs=1e-4)


def test_the_saved_folder_recommends_as_one_process_does(launched, expected_whole, script):
    from llmrec.recommender import Recommender

    expected = launching.results_of(expected_whole, num_processes=1, name="whole")[0]["recommended"]
    found = script.recommend(Recommender.from_pretrained(launched.folder / "whole" / "recommender"))
    assert found["items"] == expected["items"]
    assert [len(items) for items in found["items"]] == [5, 5, 5]
    for left, right in zip(found["scores"], expected["scores"], strict=True):
        np.testing.assert_allclose(left, right, atol=1e-4)


# Killed and resumed


def in_two_processes(script, plan):
    """Runs a plan under DDP in two forked processes, which needn't import anything; their exit codes."""
    environment = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(launching.free_port())}

    def process(index):
        os.environ.update(environment, RANK=str(index), LOCAL_RANK=str(index))
        script.main(plan)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=process, args=(index,)) for index in range(2)]
    for one in processes:
        one.start()
    for one in processes:
        one.join(timeout=120)
        one.kill()
    return [one.exitcode for one in processes]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_killed_twice_and_resumed_is_never_killed(script, bases, tmp_path):
    """In an epoch of the item tokenizer, resumed from the end of an epoch; in one of the recommender, from within."""
    steps_of_tokenizer = 3 * 4  # of an epoch: twelve items in fives, four times
    kills = [{"tokenizer_step": 2 * steps_of_tokenizer + 5}, {"step": 11}]
    folders = [tmp_path / "whole", tmp_path / "killed"]
    plans = [{"output_dir": str(folder), "runs": [based(STOPPED, bases)]} for folder in folders]
    for folder in folders:
        folder.mkdir()
    in_two_processes(script, plans[0])
    run_folder = folders[1] / "stopped"
    for kill, newest in zip(kills, ("checkpoint-8", "checkpoint-10"), strict=True):
        assert in_two_processes(script, {**plans[1], "kill": kill}) == [-signal.SIGKILL] * 2
        assert newest_whole_checkpoint(run_folder).name == newest
    in_two_processes(script, plans[1])
    expected, found = (Run.of(folder, "stopped") for folder in folders)
    for left, right in zip([found.trained, *found.beside], [expected.trained, *expected.beside], strict=True):
        assert left.keys() == right.keys()
        assert [name for name, tensor in right.items() if not torch.equal(left[name], tensor)] == []
    for left, right in zip(found.results, expected.results, strict=True):
        assert left["num_processes"] == right["num_processes"] == 2
        assert left["codes"] == right["codes"]
        assert left["log"] == right["log"]
        assert_same_records(left["records"], right["records"], rel=1e-12)


@pytest.mark.parametrize("name", ["etegrec", "t5"])
def test_fsdp_with_an_encoder_decoder_is_refused_before_data_are_read(name, bases, tmp_path, monkeypatch):
    """torch's FSDP2 gives up in the first forward: encoder and decoder read one embedding."""
    from llmrec.errors import SettingsError
    from llmrec.training.joint_run import parse, train_jointly

    base = str(bases / "t5") if name == "t5" else name
    settings = {
        "model_name_or_path": base,
        "dataset": "nowhere.csv",
        "item_tokenizer": "nowhere.yaml",
        "trained": "full",
    }
    settings |= {"sample_form": "prefix", "output_dir": str(tmp_path / "run")}
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SettingsError, match="an encoder-decoder, and the engine is FSDP"):
        train_jointly(*parse([part for name, value in settings.items() for part in (f"--{name}", value)]))
    assert not (tmp_path / "run").exists()
