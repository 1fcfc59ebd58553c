import importlib.util
import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from safetensors import safe_open

from llmrec.embeddings.base import ItemEmbeddings
from llmrec.errors import DataError, ItemOrderError, LlmrecError, MissingPartError, SettingsError, UnknownItemError
from llmrec.item_tokenizers.rq_vae import RQVAEConfig, RQVAETokenizer
from llmrec.recommender import Recommender


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny = _load("tiny")


@pytest.fixture(scope="module")
def recommender(tmp_path_factory):
    return tiny.recommender(tmp_path_factory.mktemp("recommender"))


def _pairs(answer):
    return [(entry.item_id, round(entry.score, 3)) for entry in answer]


def _assert_same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert [entry.item_id for entry in one] == [entry.item_id for entry in other]
        assert [entry.title for entry in one] == [entry.title for entry in other]
        assert [entry.score for entry in one] == pytest.approx([entry.score for entry in other], abs=1e-4)


def test_the_answer_is_the_best_unseen_items(recommender):
    history = ["item-3", "item-8", "item-3"]
    rows = [int(item_id.removeprefix("item-")) for item_id in history]
    codes, trie = recommender.semantic_ids.codes, recommender.trie
    prompt = recommender.task.prompt(rows)
    scores = tiny.exhaustive_scores(recommender.model, prompt, codes, trie, recommender.vocabulary, "vocabulary")
    expected = [f"item-{row}" for row in scores.argsort(descending=True).tolist()]
    answer = recommender.recommend(history, k=5, num_beams=30)
    assert [entry.item_id for entry in answer] == [item for item in expected if item not in history][:5]
    for entry in answer:
        row = int(entry.item_id.removeprefix("item-"))
        assert entry.score == pytest.approx(float(scores[row]), abs=1e-4)
        assert entry.title == (f"Title of item-{row}" if row % 5 else "")
    kept = recommender.recommend(history, k=5, num_beams=30, exclude_seen=False)
    assert [entry.item_id for entry in kept] == expected[:5]


def test_a_history_alone_gives_what_it_gives_among_others(recommender):
    histories = tiny.histories(0, (3, 0, 9, 1, 4, 2, 2, 6, 20))
    together = recommender.recommend(histories, k=6, batch_size=4)
    assert len(together) == 9
    _assert_same([recommender.recommend(history, k=6) for history in histories], together)
    _assert_same(recommender.recommend(histories, k=6, batch_size=1), together)
    assert recommender.recommend([]) == recommender.recommend([[]])[0]
    assert recommender.recommend([histories[0]], k=6)[0] == recommender.recommend(histories[0], k=6)


def test_only_the_latest_items_are_in_the_prompt_but_all_are_left_out(recommender):
    long = tiny.histories(1, (12,))[0]
    everything = recommender.recommend(long, k=30, exclude_seen=False)
    _assert_same([everything], [recommender.recommend(long[-4:], k=30, exclude_seen=False)])
    unseen = recommender.recommend(long, k=30)
    assert _pairs(unseen) == [pair for pair in _pairs(everything) if pair[0] not in long]


def test_fewer_than_k_only_where_fewer_items_are_left(recommender):
    history = [f"item-{row}" for row in range(27)]
    answer = recommender.recommend(history, k=10)
    assert {entry.item_id for entry in answer} == {"item-27", "item-28", "item-29"}
    assert recommender.recommend([f"item-{row}" for row in range(30)]) == []
    assert len(recommender.recommend([], k=100)) == 30
    for k in (1, 4, 29):
        assert len(recommender.recommend(history[:1], k=k)) == k


@pytest.mark.parametrize("scope", ["vocabulary", "codes", "trie"])
def test_items_that_share_their_codes_share_the_score(tmp_path, scope):
    codes = np.array([[0, 0], [1, 1], [0, 0], [2, 1], [0, 0], [1, 1]])
    recommender = tiny.recommender(tmp_path, codes=codes, sizes=(3, 2), scope=scope)
    answer = recommender.recommend([], k=6)
    assert len({entry.item_id for entry in answer}) == 6
    groups = {}
    for entry in answer:
        groups.setdefault(entry.score, []).append(entry.item_id)
    assert sorted(groups.values()) == [["item-0", "item-2", "item-4"], ["item-1", "item-5"], ["item-3"]]
    unseen = recommender.recommend(["item-2", "item-3", "item-1", "item-5"], k=6)
    assert [entry.item_id for entry in unseen] == ["item-0", "item-4"]
    assert len(recommender.recommend([], k=2, num_beams=2)) == 2


def test_unknown_items_are_an_error_or_skipped_and_counted(recommender, caplog):
    with pytest.raises(UnknownItemError, match=r"1 unknown item ID.*'nope'"):
        recommender.recommend([["item-1"], ["item-2", "nope"]])
    with caplog.at_level(logging.WARNING, logger="llmrec.recommender"):
        skipped = recommender.recommend([["item-1"], ["item-2", "nope"]], on_unknown="skip")
    assert "skipped 1 unknown item IDs in 2 histories" in caplog.text
    _assert_same(skipped, recommender.recommend([["item-1"], ["item-2"]]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("item-1",), DataError, "pass a list of item IDs"),
        (([3],), DataError, "item IDs are strings"),
        (([], 0), SettingsError, "k is 0"),
    ],
)
def test_arguments_that_make_no_sense(recommender, arguments, error, message):
    with pytest.raises(error, match=message):
        recommender.recommend(*arguments)


def test_settings_that_make_no_sense(recommender):
    with pytest.raises(SettingsError, match="a search of 5 beams can't give 10 items"):
        recommender.recommend([], k=10, num_beams=5)
    with pytest.raises(SettingsError, match="on_unknown is 'ignore'"):
        recommender.recommend([], on_unknown="ignore")


def test_recommending_leaves_the_model_in_its_mode(recommender):
    recommender.model.train()
    with_dropout = recommender.recommend(["item-1"])
    assert recommender.model.training
    recommender.model.eval()
    assert recommender.recommend(["item-1"]) == with_dropout
    assert not recommender.model.training


def test_nan_is_an_error(tmp_path):
    recommender = tiny.recommender(tmp_path)
    with torch.no_grad():
        recommender.model.get_base_model().model.norm.weight.fill_(float("nan"))
    with pytest.raises(DataError, match="the model computes NaN"):
        recommender.recommend(["item-1"])


def test_parts_that_do_not_fit_are_refused(recommender):
    parts = {
        name: getattr(recommender, name)
        for name in ("model", "text_tokenizer", "semantic_ids", "vocabulary", "items", "task", "config")
    }
    with pytest.raises(SettingsError, match=r"max_history is 9 in the config, 4 in the task"):
        Recommender(**{**parts, "config": replace(recommender.config, max_history=9)})
    with pytest.raises(SettingsError, match="unknown scope 'items'"):
        Recommender(**{**parts, "config": replace(recommender.config, scope="items")})
    shuffled = recommender.items.select([1, 0, *range(2, 30)])
    with pytest.raises(ItemOrderError, match="differ first at row 0"):
        Recommender(**{**parts, "items": shuffled})
    without_codes = tiny.tiny_model("llama", recommender.vocabulary, code_rows=False, vocab_size=13)
    with pytest.raises(SettingsError, match="it doesn't know them"):
        Recommender(**{**parts, "model": without_codes})


ADAPTER_FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "items.parquet",
    "recommender_config.json",
    "semantic_ids.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
FULL_FILES = ADAPTER_FILES - {"adapter_config.json", "adapter_model.safetensors"} | {
    "config.json",
    "generation_config.json",
    "model.safetensors",
}


@pytest.mark.parametrize("kind", ["adapter", "rows", "plain"])
@pytest.mark.parametrize("scope", ["vocabulary", "trie"])
def test_save_load_merge_save_load(tmp_path, kind, scope):
    recommender = tiny.recommender(tmp_path, kind=kind, scope=scope, metrics=[{"metrics": {"Recall@10": 0.1}}])
    histories = tiny.histories(2, (3, 7, 1))
    expected = recommender.recommend(histories, k=20)
    recommender.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == (
        ADAPTER_FILES if kind == "adapter" else FULL_FILES
    )
    loaded = Recommender.from_pretrained(tmp_path / "saved", device="cpu")
    _assert_same(loaded.recommend(histories, k=20), expected)
    assert loaded.config.metrics == recommender.config.metrics
    assert loaded.config.versions["llmrec"]
    assert loaded.items.column_names == ["item_id", "title", "price"]
    assert loaded.is_adapter == (kind == "adapter")

    merged = loaded.merge()
    assert type(merged.model).__name__ == "LlamaForCausalLM"
    _assert_same(merged.recommend(histories, k=20), expected)
    _assert_same(loaded.recommend(histories, k=20), expected)  # merging left it alone
    merged.save_pretrained(tmp_path / "saved")  # takes the place of the first
    assert {path.name for path in (tmp_path / "saved").iterdir()} == FULL_FILES
    again = Recommender.from_pretrained(tmp_path / "saved")
    _assert_same(again.recommend(histories, k=20), expected)


def test_the_adapter_holds_lora_and_rows_and_nothing_else(recommender, tmp_path):
    recommender.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "adapter_model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert all(".lora_A." in name or ".lora_B." in name or "trainable_tokens_delta" in name for name in names)
    assert len(names) == 2 * 2 * 2 + 2  # two layers, two projections, A and B; rows of embedding and untied head
    for path in (tmp_path / "saved").iterdir():
        assert path.suffix in (".json", ".safetensors", ".parquet", ".md")


def test_a_fresh_process_gives_the_same_answer(recommender, tmp_path):
    recommender.save_pretrained(tmp_path / "saved")
    history = ["item-4", "item-17"]
    code = (
        "import sys, json; from llmrec import Recommender;"
        "answer = Recommender.from_pretrained(sys.argv[1]).recommend(sys.argv[2:], k=20);"
        "print(json.dumps([(entry.item_id, entry.score) for entry in answer]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "saved"), *history]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    answer = json.loads(result.stdout.splitlines()[-1])
    expected = recommender.recommend(history, k=20)
    assert [item_id for item_id, _ in answer] == [entry.item_id for entry in expected]
    assert [score for _, score in answer] == pytest.approx([entry.score for entry in expected], abs=1e-4)


def test_the_item_tokenizer_travels_along(recommender, tmp_path):
    vectors = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    embeddings = ItemEmbeddings(recommender.semantic_ids.item_ids, vectors)
    config = RQVAEConfig(num_codebooks=3, codebook_size=4, epochs=1)
    item_tokenizer = RQVAETokenizer(config).fit(embeddings, progress=False)
    whole = Recommender(
        recommender.model,
        recommender.text_tokenizer,
        recommender.semantic_ids,
        recommender.vocabulary,
        recommender.items,
        recommender.task,
        recommender.config,
        item_tokenizer,
    )
    whole.config = replace(recommender.config, metrics=[{"metrics": {"Recall@10": 0.1}}])  # as after an evaluation
    whole.save_pretrained(tmp_path / "saved")
    assert "RQVAETokenizer" in (tmp_path / "saved" / "README.md").read_text()
    loaded = Recommender.from_pretrained(tmp_path / "saved")
    assert isinstance(loaded.item_tokenizer, RQVAETokenizer)
    assert (loaded.item_tokenizer.encode(embeddings).codes == item_tokenizer.encode(embeddings).codes).all()
    shutil.rmtree(tmp_path / "saved" / "item_tokenizer")
    with pytest.raises(MissingPartError, match="item_tokenizer is missing"):
        Recommender.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("kind", ["adapter", "plain"])
def test_each_missing_part_is_an_error_that_names_it(tmp_path, kind):
    tiny.recommender(tmp_path, kind=kind).save_pretrained(tmp_path / "saved")
    optional = {"README.md", "generation_config.json"}
    for name in (ADAPTER_FILES if kind == "adapter" else FULL_FILES) - optional:
        folder = tmp_path / f"without {name}"
        shutil.copytree(tmp_path / "saved", folder)
        (folder / name).unlink()
        with pytest.raises(MissingPartError, match=name):
            Recommender.from_pretrained(folder)
    for name in optional & {path.name for path in (tmp_path / "saved").iterdir()}:
        (tmp_path / "saved" / name).unlink()
    Recommender.from_pretrained(tmp_path / "saved")
    with pytest.raises(MissingPartError, match=r"no recommender folder '\./nowhere'"):
        Recommender.from_pretrained("./nowhere")
    with pytest.raises(MissingPartError, match=r"is no recommender folder: recommender_config\.json is missing"):
        Recommender.from_pretrained(tmp_path)


def test_damaged_parts_are_errors(tmp_path):
    tiny.recommender(tmp_path, kind="plain").save_pretrained(tmp_path / "saved")

    def changed(name, change):
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "saved", folder)
        change(folder / name)
        return folder

    def edit(**values):
        def change(path):
            path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

        return change

    def cut(path):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    for name, change, error, message in (
        ("recommender_config.json", edit(format_version=99), DataError, "has format 99"),
        ("recommender_config.json", edit(first_token_id=7), SettingsError, "first_token_id is 7 in the config"),
        ("recommender_config.json", edit(codebook_sizes=[4, 6]), SettingsError, "codebooks of sizes"),
        ("recommender_config.json", edit(surprise=1), DataError, "unknown settings: surprise"),
        ("recommender_config.json", cut, DataError, "not valid JSON"),
        ("model.safetensors", cut, DataError, "can't be read"),
        ("semantic_ids.safetensors", cut, DataError, "not a safetensors file"),
        ("items.parquet", cut, DataError, "can't be read"),
    ):
        with pytest.raises(error, match=message):
            Recommender.from_pretrained(changed(name, change))


def test_missing_weights_are_never_random(tmp_path):
    tiny.recommender(tmp_path, kind="plain").save_pretrained(tmp_path / "saved")
    from safetensors.torch import load_file, save_file

    path = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(MissingPartError, match=r"lack 1 tensor.*layers\.1\.mlp\.up_proj"):
        Recommender.from_pretrained(tmp_path / "saved")


def test_a_base_model_that_is_gone_is_named(tmp_path):
    recommender = tiny.recommender(tmp_path)
    recommender.save_pretrained(tmp_path / "saved")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(MissingPartError, match="base"):
        Recommender.from_pretrained(tmp_path / "saved")
    loaded = Recommender.from_pretrained(tmp_path / "saved", base_model=str(tmp_path / "moved"))
    _assert_same([loaded.recommend(["item-2"])], [recommender.recommend(["item-2"])])


def test_an_interrupted_save_leaves_the_old_one(tmp_path, monkeypatch):
    recommender = tiny.recommender(tmp_path)
    recommender.save_pretrained(tmp_path / "saved")
    expected = recommender.recommend(["item-2"])
    before = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}

    def fail(folder):
        raise OSError("disk full")

    monkeypatch.setattr(recommender.text_tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        recommender.save_pretrained(tmp_path / "saved")
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before
    assert Recommender.from_pretrained(tmp_path / "saved").recommend(["item-2"]) == expected
    assert {path.name for path in tmp_path.iterdir()} == {"base", "saved"}


def test_other_files_of_the_folder_stay(tmp_path):
    recommender = tiny.recommender(tmp_path)
    checkpoint = tmp_path / "run" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    (tmp_path / "run" / "model.safetensors").write_bytes(b"of an older save")
    recommender.save_pretrained(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {*ADAPTER_FILES, "checkpoint-5"}
    assert (checkpoint / "state.json").read_text() == "{}"
    recommender.save_pretrained(tmp_path / "run")
    assert Recommender.from_pretrained(tmp_path / "run").recommend(["item-2"]) == recommender.recommend(["item-2"])


def test_titles_are_optional(recommender, tmp_path):
    bare = Recommender(
        recommender.model,
        recommender.text_tokenizer,
        recommender.semantic_ids,
        recommender.vocabulary,
        datasets.Dataset.from_dict({"item_id": list(recommender.semantic_ids.item_ids)}),
        recommender.task,
        recommender.config,
    )
    bare.save_pretrained(tmp_path / "saved")
    assert {entry.title for entry in Recommender.from_pretrained(tmp_path / "saved").recommend([])} == {""}


def test_every_error_is_a_llmrec_error(recommender):
    with pytest.raises(LlmrecError):
        recommender.recommend(["nope"])
