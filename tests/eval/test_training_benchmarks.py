"""The benchmarks of training, on models and catalogues small enough for a test."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import factories
import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from llmrec.tasks.collator import RowCollator
from llmrec.training.finetune import parse

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "eval" / "benchmarks"


@pytest.fixture(scope="module")
def scripts():
    """The scripts, which import each other as siblings."""
    sys.path.insert(0, str(FOLDER))
    import beauty_results
    import packing
    import random_models
    import rows_overhead
    import training
    import training_gpu
    import training_sides

    yield SimpleNamespace(
        beauty=beauty_results,
        gpu=training_gpu,
        models=random_models,
        overhead=rows_overhead,
        packing=packing,
        sides=training_sides,
        training=training,
    )
    sys.path.remove(str(FOLDER))


def make_setup(scripts, *, tied=True):
    """The small catalogue: 58 targets an epoch, prompts of 3 text tokens and up to 8 items of 3 codes."""
    return scripts.sides.make_setup(
        factories.make_tiny_model(tied=tied),
        factories.make_text_tokenizer(),
        factories.make_semantic_ids(),
        factories.make_dataset(),
        template="Items chosen : {history}",
        max_history=8,
    )


@pytest.fixture(scope="module")
def setup(scripts):
    return make_setup(scripts)


@pytest.mark.parametrize("tied", [True, False])
def test_both_sides_have_the_same_loss_and_gradients(scripts, tied):
    agreement = scripts.sides.compare_sides(make_setup(scripts, tied=tied), num_samples=5)
    assert agreement.loss > 3
    assert agreement.loss_difference < 1e-5
    assert agreement.gradient_difference < 1e-5
    assert agreement.same()


def test_a_side_that_differs_is_noticed(scripts, setup, monkeypatch):
    side = scripts.sides.llmrec_side
    monkeypatch.setattr(
        scripts.sides, "llmrec_side", lambda *given, **named: side(*given, ranking_temperature=0.8, **named)
    )
    agreement = scripts.sides.compare_sides(setup, num_samples=5)
    assert agreement.gradient_difference > 0.01
    assert not agreement.same()


def test_every_side_teaches_each_target_once_and_pads_as_it_says(scripts, setup):
    sides = scripts.sides
    lengths = setup.samples("prefix").lengths()
    made = {
        "random": sides.reference_side(setup, "random", batch_size=4),
        "grouped": sides.reference_side(setup, "group_by_length", batch_size=4),
        "history": sides.llmrec_side(setup, "history", row_length=64),
        "prefix": sides.llmrec_side(setup, "prefix", row_length=64),
    }
    expected = int((np.diff(factories.make_dataset().offsets) - 1).sum())
    for name, side in made.items():
        batches = [side.batch(step) for step in range(len(side.batches))]
        assert sum(side.num_targets(batch) for batch in batches) == expected == 58, name
        assert [batch["input_ids"].numel() for batch in batches] == side.num_tokens.tolist(), name
        if name in ("random", "grouped"):
            real = int(sum(batch["attention_mask"].sum() for batch in batches))
            assert side.real_token_share == pytest.approx(real / side.num_tokens.sum())
            assert real == lengths.sum()
    assert made["random"].real_token_share < made["grouped"].real_token_share < made["prefix"].real_token_share


def test_the_reference_trains_whole_matrices_and_llmrec_rows(scripts, setup):
    sides = scripts.sides
    reference, ours = sides.reference_side(setup, "random", batch_size=4), sides.llmrec_side(setup, "history")

    def trained(side):
        return {name: parameter.shape for name, parameter in side.model.named_parameters() if parameter.requires_grad}

    whole = [shape for name, shape in trained(reference).items() if ".lora_" not in name]
    assert whole == [(26, 32), (26, 32)]  # 16 words and 10 codes, embedding and head
    assert [shape for name, shape in trained(ours).items() if ".lora_" not in name] == [(10, 32)]
    lora = [{name for name in trained(side) if ".lora_" in name} for side in (reference, ours)]
    assert lora[0] == lora[1]
    assert len(lora[0]) == 2 * 2 * 7  # layers, A and B, linear layers
    assert "logits_to_keep" not in reference.batch(0)


class StopAfterTwo(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == 2


@pytest.mark.parametrize("name", ["random", "history"])
def test_a_driven_step_is_the_trainers_own(scripts, setup, name, tmp_path):
    """The weights after two driven steps are those after two steps of `train`, on the same batches."""

    def make():
        if name == "history":
            return scripts.sides.llmrec_side(setup, "history", row_length=64, bf16=False)
        return scripts.sides.reference_side(setup, "random", batch_size=4, bf16=False)

    driven, trained = make(), make()
    before = [parameter.detach().clone() for parameter in driven.model.parameters()]
    trainer, seen = trained.trainer, []
    training_step = trainer.training_step

    def recorded(model, inputs, *more):
        seen.append({key: tensor.clone() for key, tensor in inputs.items()})
        return training_step(model, inputs, *more)

    trainer.training_step = recorded
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.args.output_dir = str(tmp_path)
    trainer.add_callback(StopAfterTwo())
    trainer.train()
    assert len(seen) == 2
    for batch in seen:
        driven.step(batch)
    parameters = list(zip(driven.model.parameters(), trained.model.parameters(), before, strict=True))
    for one, other, _ in parameters:
        torch.testing.assert_close(one, other)
    assert sum(not torch.equal(one, old) for one, _, old in parameters) > 14


def test_steps_of_all_sizes_are_chosen(scripts):
    num_tokens = np.random.default_rng(0).permutation(1000)
    steps = scripts.sides.spread_steps(num_tokens, 5, 4)
    assert steps.shape == (5, 4)
    assert len(np.unique(steps)) == 20
    chosen = np.sort(num_tokens[steps], axis=1)
    assert (np.abs(np.diff(np.sort(chosen.ravel())) - 50) <= 1).all()  # at even distances
    for quarter in range(4):
        assert ((chosen[:, quarter] >= 250 * quarter) & (chosen[:, quarter] < 250 * (quarter + 1))).all()
    assert np.ptp(chosen.mean(axis=1)) < 120  # no round has the larger ones
    assert scripts.sides.spread_steps(np.array([3, 1]), 2, 3).max() <= 1  # fewer than asked for


def test_the_report_of_training(scripts, setup, monkeypatch, tmp_path, capsys):
    training = scripts.training
    monkeypatch.setattr(training, "load_setup", lambda *_, **__: setup)
    monkeypatch.setattr(training, "ROW_LENGTH", 64)
    monkeypatch.setattr(training, "BATCH_SIZE", 4)
    monkeypatch.setattr(training.torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(training.os, "cpu_count", lambda: 2)
    peaks = {
        "random": 900,
        "grouped": 800,
        "history": 300,
        "prefix": 400,
        "history_trie": 200,
        "history_plain_step": 350,
    }
    monkeypatch.setattr(training, "measure_memory", lambda name, *_: peaks[name] * 10**6)
    output = tmp_path / "out.json"
    one = ["--cases", "history_vs_random"]
    for load, words, shown in ((1.3, [], True), (1.5, one, False), (1.5, [*one, "--busy"], True)):
        monkeypatch.setattr(training.os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert training.main(["--rounds", "2", "--steps", "2", "--output", str(output), *words]) == 0
        report, printed = json.loads(output.read_text()), capsys.readouterr().out
        assert report["benchmark"] == "training"
        assert report["same_answer"]
        assert report["targets_per_epoch"] == {"history": 58, "prefix": 58}
        num_cases = 1 if words else len(training.CASES)
        assert len(report["rows"]) == 2 * num_cases
        speed = report["rows"][0]
        assert speed["name"] == "history_vs_random"
        assert (speed["ratio"] is not None) is shown
        assert len(speed["ours"]["rounds"]) == 2
        assert len(speed["ours"]["seconds"]) == 4
        memory = report["rows"][num_cases]
        assert memory["ratio"] == pytest.approx(3.0)  # memory doesn't depend on how busy the machine is
        assert "| history vs random | 300 | 900 | 3.00 | 2 |" in printed
        assert ("(busy)" in printed) is ("--busy" in words)
    assert training.main(["--quick", "--busy"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5  # two lines of a table's head, a row, a blank, a line


def test_a_different_answer_fails(scripts, setup, monkeypatch):
    training = scripts.training
    monkeypatch.setattr(training, "load_setup", lambda *_, **__: setup)
    monkeypatch.setattr(training, "ROW_LENGTH", 64)
    monkeypatch.setattr(training.torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(training, "compare_sides", lambda *_, **__: scripts.sides.Agreement(1.0, 0.1, 0.0))
    assert training.main(["--quick", "--busy"]) == 1


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells the memory")


@linux
def test_peak_memory_grows_with_what_is_kept(scripts, setup, monkeypatch):
    """An embedding of 38 MB: the reference copies it twice, with gradients and moments; llmrec doesn't."""
    monkeypatch.setattr(scripts.training, "ROW_LENGTH", 64)
    monkeypatch.setattr(scripts.training, "BATCH_SIZE", 1)
    peaks = {}
    for name in ("history_trie", "random"):
        wide = factories.make_tiny_model()
        wide.resize_token_embeddings(300_000, mean_resizing=False)
        peaks[name] = scripts.training.peak_of(replace(setup, make_base=lambda wide=wide: wide), name)
    matrix = 300_000 * 32 * 4
    assert peaks["history_trie"] < 3 * matrix  # the logits of a few tokens, to see that packing works
    assert peaks["random"] > 7 * matrix  # copies, gradients and moments of two


def test_rows_give_the_loss_of_frozen_rows_and_learn(scripts):
    overhead = scripts.overhead
    for tied in (True, False):
        setup = make_setup(scripts, tied=tied)
        batch = overhead.packed_batch(setup, row_length=64)
        assert batch["input_ids"].shape[1] > 50
        assert overhead.loss_difference(setup, batch) < 1e-5
        rows = overhead.with_rows(setup)
        before = [parameter.detach().clone() for parameter in rows.token_parameters]
        assert len(before) == (1 if tied else 2)
        rows.step(batch)
        assert all(not torch.equal(*pair) for pair in zip(before, rows.token_parameters, strict=True))
        assert rows.state_bytes() == len(before) * 10 * 32 * 4 * 4  # parameter, gradient, two moments
        whole = overhead.saved_modules(setup)
        whole.step(batch)
        assert whole.state_bytes() == 2 * 26 * 32 * 4 * 4


def test_the_overhead_is_that_of_neighbouring_steps(scripts):
    median, low, high = scripts.overhead.overhead([1.1, 2.1, 4.4, 1.05], [1.0, 2.0, 4.0, 1.0])
    assert median == pytest.approx(0.075)
    assert low < median < high
    assert scripts.overhead.overhead([1.5], [1.0]) == pytest.approx((0.5, 0.5, 0.5))


def test_the_report_of_the_overhead(scripts, setup, monkeypatch, tmp_path, capsys):
    overhead = scripts.overhead
    monkeypatch.setattr(overhead, "load_setup", lambda *_, **__: setup)
    monkeypatch.setattr(overhead.torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(overhead, "trainable_tokens", lambda _: (_ for _ in ()).throw(ValueError("not with this")))
    output = tmp_path / "out.json"
    for words, shown in (([], False), (["--busy"], True)):
        monkeypatch.setattr(overhead.os, "getloadavg", lambda: (99.0, 0.0, 0.0))
        assert overhead.main(["--quick", "--output", str(output), *words]) == 0
        report, printed = json.loads(output.read_text()), capsys.readouterr().out
        assert report["same_answer"]
        assert (report["rows"][0]["ratio"] is not None) is shown
        assert report["rows"][1]["ratio"] == pytest.approx(2 * 26 / 10)
        assert report["rows"][2]["ratio"] is None
        assert "`trainable_token_indices` | doesn't run" in printed
        assert ("No overhead" in printed) is not shown


def test_shares_of_real_tokens_by_hand(scripts, setup):
    samples = setup.samples("history")
    rows = scripts.packing.share_rows(samples, "history", [64, 128])
    assert [row["name"] for row in rows] == ["history_rows_of_64", "history_rows_of_128"]
    lengths = samples.lengths()
    assert rows[0]["real_tokens"] == lengths.sum()
    # all 16 samples are one batch, so without packing the order doesn't matter
    assert rows[0]["reference"] == pytest.approx(lengths.sum() / (16 * lengths.max()))
    assert rows[0]["grouped_by_length"] == pytest.approx(rows[0]["reference"])
    assert rows[0]["reference"] < rows[0]["value"] <= 1


def test_packed_samples_that_see_each_other_are_noticed(scripts, setup, monkeypatch):
    packing = scripts.packing
    differences = packing.exactness(setup, num_samples=5)
    assert set(differences) == {"base model", *packing.FAMILIES}
    assert all(difference < 1e-5 for difference in differences.values())

    def leaking(pad, *, packing):
        def collate(rows):
            batch = RowCollator(pad, packing=packing)(rows)
            return batch | {"position_ids": torch.arange(batch["input_ids"].shape[1])[None]}

        return collate

    monkeypatch.setattr(packing, "RowCollator", leaking)
    assert min(packing.exactness(setup, num_samples=5).values()) > packing.TOLERANCE


def test_the_report_of_packing(scripts, setup, monkeypatch, tmp_path, capsys):
    packing = scripts.packing
    monkeypatch.setattr(packing, "load_setup", lambda *_, **__: setup)
    monkeypatch.setattr(packing.torch, "set_num_threads", lambda _: None)
    output = tmp_path / "out.json"
    assert packing.main(["--quick", "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert report["same_answer"]
    assert len(report["rows"]) == 4
    assert "| history rows of 512 |" in capsys.readouterr().out
    monkeypatch.setattr(packing, "exactness", lambda *_, **__: {"base model": 0.1})
    assert packing.main(["--quick"]) == 1


def test_mfu_by_hand(scripts):
    gpu = scripts.gpu
    # NVIDIA's own: 12,473 tokens/s of Llama-3-8B on an H100 is 402 TFLOP/s, 40.6 % of 989
    assert gpu.mfu(12_473, 8_030_000_000, "lora", 989e12) == pytest.approx(0.405, abs=1e-3)
    assert gpu.mfu(1000, 10**9, "full", 1e13) == pytest.approx(0.6)
    base = gpu.random_base(scripts.models.SHAPES["tiny"], "sdpa", dtype=torch.float32, device="cpu")
    attention, multilayer, norms = 64 * 64 * 2 + 64 * 32 * 2, 3 * 64 * 128, 2 * 64 + 2 * 16
    body = 2 * (attention + multilayer + norms) + 64
    assert gpu.parameter_counts(base) == (body, body + 310 * 64)  # embedding and head are tied
    untied = factories.make_tiny_model(tied=False)
    body, every = gpu.parameter_counts(untied)
    assert every - body == 2 * 16 * 32


def test_shapes_have_the_published_numbers_of_parameters(scripts):
    published = {"smollm2-135m": 134.5e6, "qwen3-1.7b": 1.72e9, "llama-7b": 6.74e9}
    for name, number in published.items():
        base = scripts.gpu.random_base(scripts.models.SHAPES[name], "sdpa", dtype=torch.bfloat16, device="meta")
        assert scripts.gpu.parameter_counts(base)[1] == pytest.approx(number, rel=0.005), name


def test_what_does_not_run_is_told(scripts):
    gpu = scripts.gpu
    train, semantic_ids = gpu.random_histories(50)
    setup = gpu.make_setup(None, gpu.plain_tokenizer(300), semantic_ids, train)
    work = gpu.Workload("tiny", "lora", "flash_attention_2", 1, 128, False, "off", "trie")
    settings = {"steps": 1, "warm_up": 1, "peak": 1e12, "device": "cpu"}
    row = gpu.try_to_measure(work, setup, **settings)
    assert row["value"] is None
    assert "ImportError" in row["error"]
    row = gpu.try_to_measure(replace(work, attention="sdpa"), setup, **settings)
    assert row["mfu"] == pytest.approx(row["value"] * row["parameters_without_embedding"] * 4 / 1e12)
    assert row["real_token_share"] > 0.9


def test_made_up_histories_are_as_long_as_real_ones(scripts):
    train, semantic_ids = scripts.gpu.random_histories(5000)
    lengths = np.diff(train.offsets)
    assert lengths.min() == 3
    assert lengths.mean() == pytest.approx(6.9, abs=0.2)  # Beauty: 131,413 targets of 22,363 users, and one each
    assert semantic_ids.codes.shape == (12_101, 4)


def test_layouts(scripts):
    assert scripts.gpu.layout("16x1024") == (16, 1024)
    for wrong in ("16", "x", "4x-1", "axb"):
        with pytest.raises(scripts.gpu.argparse.ArgumentTypeError, match="ROWSxTOKENS"):
            scripts.gpu.layout(wrong)
    given = scripts.gpu.make_parser().parse_args(["--trained", "lora", "--shapes", "tiny"])
    assert len(scripts.gpu.workloads(given)) == 3 * 2 * 2


def test_the_script_for_gpus_without_one(scripts, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert scripts.gpu.main([]) == 0
    assert "not measured" in capsys.readouterr().out


def test_the_script_for_gpus_on_a_cpu(tmp_path):
    output = tmp_path / "out.json"
    command = [sys.executable, "eval/benchmarks/training_gpu.py", "--cpu_check", "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": ".", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert [row["workload"]["trained"] for row in report["rows"]] == ["lora", "lora", "full", "full"]
    assert all(row["value"] > 0 for row in report["rows"])
    assert "12,473 tokens/s" in done.stdout


@pytest.mark.parametrize("trained", ["lora", "full"])
def test_settings_of_the_runs_on_beauty(scripts, trained, tmp_path):
    words = scripts.beauty.command_of(trained, 7, tmp_path, ["max_steps=2", "learning_rate=3e-4"])
    arguments, training, model = parse(words)
    assert (model.trained, training.seed, training.max_steps) == (trained, 7, 2)
    assert training.learning_rate == pytest.approx(3e-4)
    assert training.output_dir == f"runs/beauty_results/{trained}_7"
    assert arguments.evaluation_examples is None  # all users
    with pytest.raises(SystemExit, match="NAME=VALUE"):
        scripts.beauty.command_of(trained, 7, tmp_path, ["max_steps"])


def test_results_on_beauty_beside_published_ones(scripts, monkeypatch, tmp_path, capsys):
    beauty = scripts.beauty
    found = {("lora", 0): 0.05, ("lora", 1): 0.06, ("full", 0): 0.04, ("full", 1): 0.04}
    monkeypatch.setattr(beauty, "run", lambda trained, seed, *_: dict.fromkeys(beauty.METRICS, found[trained, seed]))
    output = tmp_path / "out.json"
    line = ["--beauty", "--seeds", "0", "1", "--output", str(output)]
    assert scripts.gpu.main(line) == 0
    rows = {row["name"]: row for row in json.loads(output.read_text())["rows"]}
    assert rows["lora_recall@10"]["value"] == pytest.approx(0.055)
    assert rows["lora_recall@10"]["deviation"] == pytest.approx(0.01 / 2**0.5)
    assert rows["lora_recall@10"]["ratio"] == pytest.approx(0.055 / 0.0703)
    printed = capsys.readouterr().out
    assert "| SmolLM2-135M, full, 2 seeds | 0.0400 ± 0.0000 |" in printed
    assert "| LETTER-LC-Rec (LLaMA-7B), published | 0.0505 | 0.0703 | 0.0355 | 0.0418 |" in printed
    assert scripts.gpu.main([*line, "--trained", "full"]) == 0
    assert {row["name"].partition("_")[0] for row in json.loads(output.read_text())["rows"]} == {"full"}
