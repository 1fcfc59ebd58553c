"""The benchmarks of generation, on models and catalogues small enough for a test."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llmrec.generation.beam_search import BeamSearchOutput
from llmrec.generation.trie import ItemTrie

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "eval" / "benchmarks"


@pytest.fixture(scope="module")
def scripts():
    """The scripts, which import each other as siblings."""
    sys.path.insert(0, str(FOLDER))
    import generation
    import generation_gpu
    import generation_memory
    import random_models
    import validity

    yield SimpleNamespace(
        speed=generation, gpu=generation_gpu, memory=generation_memory, models=random_models, validity=validity
    )
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def setup(scripts):
    """A small model and 300 items, with prompts of different lengths."""
    sizes = (12, 12, 12)
    model, vocabulary = scripts.models.random_model(
        scripts.models.SHAPES["tiny"], sizes, dtype=torch.float32, device="cpu"
    )
    prompts = [scripts.models.random_prompts(1, length, 300, seed=length)[0] for length in (9, 4, 12)]
    named = {"first": prompts, "longest": prompts, "one": prompts[:1], "task": prompts}
    return replace(scripts.gpu.make_setup(model, vocabulary, 300, device="cpu", with_dictionary=True), prompts=named)


def answer(leaves, scores):
    return torch.tensor([leaves]), torch.tensor([scores])


@pytest.mark.parametrize(
    ("leaves", "scores", "same", "ties"),
    [
        ([3, 1, 2], [-1.0, -2.0, -3.0], True, 0),
        ([3, 1, 2], [-1.0, -2.00005, -3.0], True, 0),
        ([3, 1, 2], [-1.0, -2.001, -3.0], False, 0),
        ([3, 1, 2], [-1.0, float("nan"), -3.0], False, 0),
        ([1, 3, 2], [-2.0, -1.0, -3.0], False, 2),  # another order
        ([1, 3, 2], [-1.0, -2.0, -3.0], False, 2),  # the scores of others
        ([3, 1, 7], [-1.0, -2.0, -3.0], True, 1),  # ties with the last
        ([3, 1, 7], [-1.0, -2.0, -2.9], False, 1),
        ([3, 7, 2], [-1.0, -2.0, -3.0], False, 1),
        ([3, 1, -1], [-1.0, -2.0, -torch.inf], False, 0),
        ([3, 1, 1], [-1.0, -2.0, -3.0], False, 0),
    ],
)
def test_what_counts_as_the_same_answer(scripts, leaves, scores, same, ties):
    compared = scripts.speed.compare(answer(leaves, scores), answer([3, 1, 2], [-1.0, -2.0, -3.0]))
    assert (compared.same, compared.num_ties) == (same, ties)


def test_ties_may_change_places(scripts):
    found = answer([1, 3, 2], [-1.00001, -1.00002, -3.0])
    compared = scripts.speed.compare(found, answer([3, 1, 2], [-1.0, -1.00003, -3.0]))
    assert compared.same
    assert compared.num_ties == 2
    assert compared.largest_difference == pytest.approx(2e-5, abs=1e-6)


def test_prompts_and_dictionary_by_hand(scripts):
    items = np.array([[50, 60], [51, 61], [50, 62]])
    assert scripts.speed.joined_prompt([7, 8], [1, 2], items) == [7, 8, 50, 60, 1, 2, 51, 61, 1, 2, 50, 62]
    assert scripts.speed.prefix_dictionary(items) == {(): [50, 51], (50,): [60, 62], (51,): [61]}
    input_ids, mask = scripts.speed.padded([[5], [6, 7]], 9, "cpu")
    assert input_ids.tolist() == [[9, 5], [6, 7]]
    assert mask.tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize("scope", ["vocabulary", "trie"])
@pytest.mark.parametrize("processor", [False, True])
@torch.no_grad()
def test_the_reference_gives_items_with_the_scores_of_plain_forwards(scripts, setup, scope, processor):
    prompt = setup.prompts["one"]
    tokens, scores = scripts.speed.generate_reference(setup, prompt, 4, scope=scope, processor=processor)
    leaves, _ = scripts.speed.scored_leaves(setup, tokens, scores)
    assert (leaves >= 0).all()
    for beam, score in zip(tokens[0].tolist(), scores[0].tolist(), strict=True):
        logits = setup.model(input_ids=torch.tensor([prompt[0] + beam])).logits[0, len(prompt[0]) - 1 : -1]
        expected = 0.0
        for level, token in enumerate(beam):
            among = logits[level]
            if scope == "trie":
                among = among[setup.allowed_tokens[tuple(beam[:level])]]
            expected += float(logits[level, token] - among.logsumexp(0))
        assert score == pytest.approx(expected, abs=1e-4)


def test_cases_agree_and_a_wrong_search_is_noticed(scripts, setup, monkeypatch):
    speed = scripts.speed
    for case in speed.CASES:
        row = speed.run_case(replace(case, num_beams=6), setup, repeats=2, repeats_reference=1)
        assert row["same_answer"], case.name
        assert len(row["seconds"]) == 4  # two before generate, two after
    assert row["title"] == "3 users, 6 beams, prompts of recommend"
    assert row["tokens"] == [4, 12]

    def other_scope(*given, scope, **named):
        return search(*given, scope="codes", **named)

    search = speed.beam_search
    monkeypatch.setattr(speed, "beam_search", other_scope)
    assert not speed.run_case(speed.CASES[0], setup, repeats=1, repeats_reference=1)["same_answer"]


def test_no_ratio_on_a_busy_machine(scripts, setup, monkeypatch, tmp_path, capsys):
    speed = scripts.speed
    monkeypatch.setattr(speed, "load_setup", lambda *_: setup)
    monkeypatch.setattr(speed.torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(speed.os, "cpu_count", lambda: 2)
    output = tmp_path / "out.json"
    line = ["--quick", "--output", str(output), "--cases", speed.CASES[0].name, speed.CASES[5].name]
    for load, words, ratios in ((1.3, [], True), (1.5, [], False), (1.5, ["--busy"], True)):
        monkeypatch.setattr(speed.os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert speed.main([*line, *words]) == 0
        report, printed = json.loads(output.read_text()), capsys.readouterr().out
        assert report["benchmark"] == "generation"
        assert report["same_answer"]
        assert report["machine"]["load_average"] == load
        assert [row["name"] for row in report["rows"]] == [speed.CASES[0].name, speed.CASES[5].name]
        for row in report["rows"]:
            assert (row["ratio"] is not None) == ratios
            if ratios:
                assert row["ratio"] == pytest.approx(row["reference"] / row["value"])
        assert ("No ratios" in printed) == (not ratios)
        assert ("(busy)" in printed) == (words == ["--busy"])
        assert "| 2 users, 5 beams |" in printed

    monkeypatch.setattr(speed, "compare", lambda *_: speed.Comparison(False, 1.0, 0))
    assert speed.main(line) == 1
    assert "NO" in capsys.readouterr().out


def test_the_setup_of_a_data_set_and_a_model(scripts, tmp_path, factories):
    lengths = [17, 19, 16, 18, 5, 4, 17, 18, 19, 17]
    generator = np.random.default_rng(0)
    items = [str(item) for item in range(30)]
    data = tmp_path / "data"
    data.mkdir()
    inter = {str(user): generator.integers(0, 30, length).tolist() for user, length in enumerate(lengths)}
    inter["0"] += range(30)  # so that every item is there
    (data / "Beauty.inter.json").write_text(json.dumps(inter))
    (data / "Beauty.item.json").write_text(json.dumps({item: {"title": f"item {item}"} for item in items}))
    keys = generator.choice(4**3, 30, replace=False)
    codes = np.stack(np.unravel_index(keys, (4, 4, 4)), axis=1)
    tokens = {item: [f"<{'abc'[level]}_{code}>" for level, code in enumerate(codes[int(item)])] for item in items}
    (data / "Beauty.letter-index.json").write_text(json.dumps(tokens))
    factories.make_tiny_model().save_pretrained(tmp_path / "model")
    factories.make_text_tokenizer().save_pretrained(tmp_path / "model")

    made = scripts.speed.load_setup(str(tmp_path / "model"), data)
    assert made.trie.num_items == 30
    histories = [length - 1 for length in lengths]
    histories[0] += 30
    assert [len(prompt) for prompt in made.prompts["one"]] == [len(made.prompts["first"][0])]
    steps = np.diff([len(prompt) for prompt in made.prompts["first"]]) / np.diff(histories[:8])
    assert len(set(steps.tolist())) == 1  # a text, and as many tokens for each item
    assert steps[0] > 3  # the separator has tokens of its own
    assert len(made.prompts["longest"]) == 5  # histories of 15 to 17 items
    assert len(made.prompts["task"]) == 8
    last = json.loads((data / "Beauty.inter.json").read_text())["4"][-2]
    expected = made.vocabulary.token_ids(codes[last]).tolist()
    assert made.prompts["first"][4][-3:] == made.prompts["task"][4][-3:] == expected
    row = scripts.speed.run_case(replace(scripts.speed.CASES[0], num_beams=4), made, repeats=1, repeats_reference=1)
    assert row["same_answer"]


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells the memory")


@linux
def test_the_peak_is_that_of_the_call_alone(scripts):
    before = np.ones(30_000_000, np.uint8)  # not counted
    held = []

    def search():
        np.ones(60_000_000, np.uint8).sum()  # freed again, and still in the peak
        held.append(np.ones(5_000_000, np.uint8))

    assert 59e6 < scripts.memory.peak_bytes(search, "cpu") < 75e6
    assert scripts.memory.peak_bytes(lambda: None, "cpu") < 5e6
    assert before.sum() == 30_000_000


@linux
def test_memory_in_processes_of_their_own(scripts):
    common = {"scope": "vocabulary", "num_requests": 1, "context": 200, "shape": "tiny", "device": "cpu", "threads": 1}
    ours, reference = (scripts.memory.measure(side=side, num_beams=64, **common) for side in ("llmrec", "generate"))
    assert 0 < ours < reference


def test_the_table_of_memory(scripts, monkeypatch, tmp_path, capsys):
    sizes = {("llmrec", 1): 100, ("llmrec", 256): 110, ("generate", 8): 880}
    asked = []

    def measured(**settings):
        asked.append(settings)
        return sizes[settings["side"], settings["num_beams"]] * 10**6

    monkeypatch.setattr(scripts.memory, "measure", measured)
    output = tmp_path / "out.json"
    assert scripts.memory.main(["--output", str(output), "--requests", "8"]) == 0
    assert len(asked) == 7
    assert {settings["num_requests"] for settings in asked} == {8}
    rows = json.loads(output.read_text())["rows"]
    assert [row["value"] for row in rows[:3]] == pytest.approx([1.1] * 3)
    assert rows[3]["ratio"] == pytest.approx(8.0)
    assert "| trie_8_requests | 100 | 110 | 1.10 | 1.15 |" in capsys.readouterr().out


def test_wrong_answers_are_counted(scripts):
    codes = np.array([[0, 0], [0, 1], [1, 0], [2, 1], [2, 1]])  # 4 leaves
    catalogue = scripts.validity.Catalogue.make(codes, (3, 2), 0)
    everything = np.ones(5, bool)

    def wrong(leaves, left=everything, num_beams=3, may_be_fewer=False):
        leaves = torch.tensor(leaves, dtype=torch.int64)
        return scripts.validity.num_wrong(catalogue, leaves, left, num_beams, may_be_fewer=may_be_fewer)

    assert wrong([0, 1, 3]) == 0
    assert wrong([0, 1, 1]) == 1  # twice
    assert wrong([0, 1]) == 1  # one is missing
    assert wrong([0, 1], may_be_fewer=True) == 0
    assert wrong([], may_be_fewer=True) == 1
    assert wrong([0, 1, 2, 3], num_beams=6) == 0  # there are no more
    assert wrong([0, 2, 3], left=np.array([True, False, True, True, False])) == 0  # one item of the leaf is left
    assert wrong([0, 2, 3], left=np.array([True, False, True, False, False])) == 2  # not allowed, and too many
    assert wrong([0, 2], left=np.array([True, False, True, False, False])) == 0


def test_every_score_by_plain_loops(scripts):
    codes = np.array([[0, 0], [0, 1], [1, 0], [2, 1]])
    catalogue = scripts.validity.Catalogue.make(codes, (3, 2), 1)
    prompt, first = [5, 9, 30], catalogue.vocabulary.first_token_id
    scores = scripts.validity.every_score(catalogue, prompt, torch.from_numpy(codes))
    follows = {0: [0, 1], 1: [0], 2: [1]}
    for item, (one, two) in enumerate(codes.tolist()):
        with torch.no_grad():
            logits = catalogue.model(input_ids=torch.tensor([[*prompt, first + one]])).logits[0, -2:].double()
        top, second = logits[0], logits[1]
        level_two = second[first + 3 : first + 5]
        expected = {
            "vocabulary": top.log_softmax(0)[first + one] + second.log_softmax(0)[first + 3 + two],
            "codes": top[first : first + 3].log_softmax(0)[one] + level_two.log_softmax(0)[two],
            "trie": top[first : first + 3].log_softmax(0)[one] + level_two[two] - level_two[follows[one]].logsumexp(0),
        }
        for scope, score in expected.items():
            assert float(scores[scope][item]) == pytest.approx(float(score), abs=1e-4)


def test_exactness_finds_what_is_wrong(scripts, monkeypatch):
    found = scripts.validity.check_exactness(2)
    assert (found.catalogues, found.wrong) == (2, 0)
    assert found.scores > 100
    assert 0 < found.largest_difference < 1e-3

    fresh = scripts.validity.Exactness
    expected = torch.tensor([-3.0, -1.0, -2.0], dtype=torch.float64)
    for leaves, scores, wrong in (
        ([1, 2, 0, -1], [-1.0, -2.0, -3.0, -torch.inf], 0),
        ([1, 2, -1, -1], [-1.0, -2.0, -torch.inf, -torch.inf], 1),  # not all
        ([2, 1, 0, -1], [-2.0, -1.0, -3.0, -torch.inf], 1),  # another order
        ([1, 2, 0, -1], [-1.0, -2.1, -3.0, -torch.inf], 1),
        ([1, 2, 0, -1], [-1.0, float("nan"), -3.0, -torch.inf], 1),
    ):
        one = fresh()
        scripts.validity.compare_all(one, torch.tensor(leaves), torch.tensor(scores), expected)
        assert one.wrong == wrong


def test_searches_that_ignore_the_subset_are_noticed(scripts, monkeypatch):
    validity = scripts.validity
    catalogue, generator = validity.random_catalogue(3, most_items=200)
    count = validity.Count()
    validity.check_searches(catalogue, generator, num_beams=20, count=count)
    assert count.answers > 500
    assert count.invalid == 0
    monkeypatch.setattr(ItemTrie, "subset", lambda *_, **__: None)
    validity.check_searches(catalogue, generator, num_beams=20, count=count)
    assert count.invalid > 0


def test_the_report_of_validity(scripts, monkeypatch, tmp_path, capsys):
    validity = scripts.validity
    exact, catalogues, one = validity.check_exactness, validity.check_random_catalogues, validity.check_one
    monkeypatch.setattr(validity, "check_exactness", lambda _: exact(1))
    monkeypatch.setattr(validity, "check_random_catalogues", lambda _: catalogues(2))
    monkeypatch.setattr(
        validity,
        "check_one",
        lambda name, codes, sizes, *, num_answers, num_beams: one(
            name, codes[:2000], sizes, num_answers=num_answers, num_beams=16
        ),
    )
    output = tmp_path / "out.json"
    assert validity.main(["--answers", "6000", "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert report["same_answer"]
    assert sum(row.get("recommendations", 0) for row in report["rows"]) >= 6000
    assert report["rows"][0]["reference"] > 0.3  # without the trie much is no item
    assert report["rows"][-1]["largest_score_difference"] < 1e-3
    assert "0 wrong" in capsys.readouterr().out

    monkeypatch.setattr(validity, "scores_differ", lambda *_: 1)
    assert validity.main(["--answers", "100"]) == 1


def test_the_floor_by_hand(scripts):
    gpu, sizes = scripts.gpu, (12, 12, 12)
    shape = scripts.models.SHAPES["tiny"]
    model, vocabulary = scripts.models.random_model(shape, sizes, dtype=torch.float32, device="cpu")
    trie = gpu.make_setup(model, vocabulary, 300, device="cpu").trie
    attention, multilayer = 64 * 64 * 2 + 64 * 32 * 2, 3 * 64 * 128
    norms = 2 * 64 + 2 * 16
    body = 2 * (attention + multilayer + norms) + 64
    work = gpu.Workload(sizes, 300, num_requests=2, context=50, num_beams=20, scope="trie")
    head, rows = 64 * 12, (2, 24, 40)  # of the first level all 12 codes, then 20 beams a request
    operations = sum(2 * (body * tokens + head * row) for tokens, row in zip((100, 24, 40), rows, strict=True))
    assert gpu.floor_milliseconds(work, model, trie, 1e30, 1e12) == pytest.approx(1e3 * operations / 1e12)
    each_position = 2 * 2 * 2 * 16 * 4  # keys and values, 2 layers, 2 heads, 16 wide, 4 bytes
    moved = 3 * (body + head) * 4 + (100 + 124 + 164) * each_position
    assert gpu.floor_milliseconds(work, model, trie, 1e12, 1e30) == pytest.approx(1e3 * moved / 1e12)
    whole = gpu.floor_milliseconds(replace(work, scope="vocabulary"), model, trie, 1e30, 1e12)
    assert whole - 1e3 * operations / 1e12 == pytest.approx(1e-9 * 2 * 66 * 64 * (310 + 36 - 12))


def test_peaks_and_overlap(scripts):
    assert scripts.gpu.peaks_of("NVIDIA H200", None, None) == (4.8e12, 989e12)
    assert scripts.gpu.peaks_of("NVIDIA A100-SXM4-80GB", None, None) is None
    assert scripts.gpu.peaks_of("NVIDIA A100-SXM4-80GB", 2.0, 312.0) == (2e12, 312e12)
    left, right = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 0], [2, 5]])
    scores = torch.zeros(2, 2)
    assert scripts.gpu.overlap(BeamSearchOutput(left, scores), BeamSearchOutput(right, scores)) == 0.75


def test_engines_that_differ_are_noticed(scripts, monkeypatch):
    found = scripts.gpu.same_answers(["eager", "graphs"], ["vocabulary", "trie"], "cpu")
    assert len(found) == 4
    assert all(difference < 1e-4 for difference in found.values())
    search = scripts.gpu.beam_search
    monkeypatch.setattr(
        scripts.gpu, "beam_search", lambda *given, scope, **named: search(*given, scope="codes", **named)
    )
    assert str(scripts.gpu.same_answers(["eager"], ["trie"], "cpu")["eager, trie"]).startswith("differs")


def test_the_script_for_gpus_without_one(scripts, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert scripts.gpu.main([]) == 0
    assert "not measured" in capsys.readouterr().out


def test_the_script_for_gpus_on_a_cpu(tmp_path):
    output = tmp_path / "out.json"
    command = [sys.executable, "eval/benchmarks/generation_gpu.py", "--cpu_check", "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": ".", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert report["same_answer"]
    assert [row["unit"] for row in report["rows"]] == ["ms", "ms"]
    assert report["rows"][0]["same_items_as_eager"] == 1.0
    assert report["rows"][1]["same_items"] == 1.0
    assert "93.2 ms" in done.stdout
