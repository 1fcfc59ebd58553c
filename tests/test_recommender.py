import json
import logging
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import datasets
import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open

from llmrec.embeddings.base import ItemEmbeddings
from llmrec.errors import DataError, ItemOrderError, LlmrecError, MissingPartError, SettingsError, UnknownItemError
from llmrec.item_tokenizers.rq_vae import RQVAEConfig, RQVAETokenizer
from llmrec.recommendation import catalogue_search
from llmrec.recommender import Recommender


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
    with caplog.at_level(logging.WARNING, logger="llmrec.recommendation.item_filters"):
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


@pytest.mark.parametrize("scope", ["vocabulary", "codes", "trie"])
@pytest.mark.parametrize("shared", [False, True])
def test_scores_are_those_of_an_exhaustive_search(tmp_path, scope, shared):
    drawn = np.random.default_rng(3).integers(0, 12, 30)
    codes = np.stack(np.unravel_index(drawn, (3, 2, 2)), axis=1) if shared else None
    sizes = (3, 2, 2) if shared else (4, 6, 5)
    recommender = tiny.recommender(tmp_path, codes=codes, sizes=sizes, scope=scope)
    histories = tiny.histories(4, (2, 9, 0, 3))
    items = ["item-7", "item-0", "item-29", "item-7", "item-13"]
    scores = recommender.score(histories, items)
    for history, of_history in zip(histories, scores, strict=True):
        prompt = recommender.task.prompt([int(item_id.removeprefix("item-")) for item_id in history])
        exhaustive = tiny.exhaustive_scores(
            recommender.model, prompt, recommender.semantic_ids.codes, recommender.trie, recommender.vocabulary, scope
        )
        assert of_history == pytest.approx(exhaustive[[7, 0, 29, 7, 13]].tolist(), abs=1e-4)
        recommended = {
            entry.item_id: entry.score for entry in recommender.recommend(history, k=30, exclude_seen=False)
        }
        assert of_history == pytest.approx([recommended[item_id] for item_id in items], abs=1e-4)
        assert recommender.score(history, items) == pytest.approx(of_history, abs=1e-4)
    own = [["item-1"], [], ["item-2", "item-3"], ["item-4"] * 3]
    for number, of_history in enumerate(recommender.score(histories, own, batch_size=2)):
        assert of_history == pytest.approx(recommender.score(histories[number], own[number]), abs=1e-4)
        assert len(of_history) == len(own[number])


def test_scores_of_unknown_items(recommender, caplog):
    with pytest.raises(UnknownItemError, match="'nope'"):
        recommender.score(["item-1"], ["item-2", "nope"])
    with pytest.raises(UnknownItemError, match="'nope'"):
        recommender.score(["nope"], ["item-2"])
    scores = recommender.score(["item-1", "nope"], ["item-2", "nope", "item-3"], on_unknown="skip")
    assert scores[1] == float("-inf")
    expected = recommender.score(["item-1"], ["item-2", "item-3"])
    assert [scores[0], scores[2]] == pytest.approx(expected, abs=1e-5)
    assert "skipped 1 unknown item IDs in 1 histories" in caplog.text
    assert "skipped 1 unknown item IDs in the items to score" in caplog.text
    assert recommender.score(["item-1"], []) == []
    assert recommender.score([["item-1"], []], []) == [[], []]
    assert recommender.score(["item-1"], ["nope"], on_unknown="skip") == [float("-inf")]


def test_items_to_score_that_make_no_sense(recommender):
    with pytest.raises(DataError, match="one history takes one list of items"):
        recommender.score([], [["item-1"]])
    with pytest.raises(SettingsError, match="1 lists of items to score for 2 histories"):
        recommender.score([[], []], [["item-1"]])
    with pytest.raises(DataError, match="pass a list of item IDs"):
        recommender.score([], "item-1")


@pytest.mark.parametrize("settings", [{}, {"top_k": 12}])
def test_a_draw_is_fixed_by_seed_and_history(recommender, settings):
    histories = tiny.histories(6, (3, 0, 5, 3, 1, 1))
    settings = {"k": 6, "temperature": 1.5, **settings}
    together = recommender.recommend(histories, seed=1, **settings)
    for answer, history in zip(together, histories, strict=True):
        assert len({entry.item_id for entry in answer}) == 6
        assert not {entry.item_id for entry in answer} & set(history)
        assert [entry.score for entry in answer] == pytest.approx(
            recommender.score(history, [entry.item_id for entry in answer]), abs=1e-4
        )
    _assert_same(recommender.recommend(histories, seed=1, batch_size=2, **settings), together)
    _assert_same(recommender.recommend(histories[::-1], seed=1, **settings), together[::-1])
    _assert_same([recommender.recommend(history, seed=1, **settings) for history in histories], together)
    other = recommender.recommend(histories, seed=2, **settings)
    assert [_pairs(answer) for answer in other] != [_pairs(answer) for answer in together]


def test_histories_of_one_call_do_not_share_their_noise(recommender):
    # Flat enough that the model hardly matters: with the same noise all would draw the same.
    histories = [[f"item-{row}"] for row in range(8)]
    answers = recommender.recommend(histories, k=3, temperature=1e4, exclude_seen=False)
    assert len({tuple(entry.item_id for entry in answer) for answer in answers}) > 4


def test_top_k_draws_among_the_best(recommender):
    best = recommender.recommend(["item-3"], k=4, num_beams=30)
    cold = recommender.recommend(["item-3"], k=4, num_beams=30, temperature=1e-4, top_k=20)
    _assert_same([cold], [best])
    top = {entry.item_id for entry in recommender.recommend(["item-3"], k=5, num_beams=30)}
    drawn = [recommender.recommend(["item-3"], k=2, num_beams=30, temperature=9.0, top_k=5, seed=n) for n in range(12)]
    assert {entry.item_id for answer in drawn for entry in answer} == top


def test_groups_cover_more_of_the_catalogue(recommender):
    def first_codes(answer):
        return {
            int(recommender.semantic_ids.codes[recommender.item_index.rows([entry.item_id])[0], 0]) for entry in answer
        }

    history = ["item-3", "item-4"]
    alike = recommender.recommend(history, k=4, num_beams=4)
    diverse = recommender.recommend(history, k=4, num_beams=4, num_groups=4, diversity_penalty=100.0)
    assert len({entry.item_id for entry in diverse}) == 4
    assert len(first_codes(diverse)) == 4 > len(first_codes(alike))
    assert [entry.score for entry in diverse] == pytest.approx(
        recommender.score(history, [entry.item_id for entry in diverse]), abs=1e-4
    )


class FitsOnly:
    """A search that runs out of memory above some number of requests."""

    def __init__(self, function, most, error):
        self.function, self.most, self.error = function, most, error
        self.searched = []

    def __call__(self, model, prompts, *arguments, **settings):
        self.searched.append((len(prompts), settings.get("num_beams")))
        if len(prompts) > self.most:
            raise self.error
        return self.function(model, prompts, *arguments, **settings)


def test_out_of_memory_splits_the_batch_and_never_lowers_the_beams(recommender, monkeypatch, caplog):
    histories = tiny.histories(7, (3, 1, 4, 1, 5, 9, 2, 6))
    expected, scores = recommender.recommend(histories, k=5), recommender.score(histories, ["item-1", "item-2"])
    error = torch.OutOfMemoryError("CUDA out of memory.")
    for name in ("beam_search", "score_leaves"):
        function = getattr(catalogue_search, name)
        monkeypatch.setattr(catalogue_search, name, FitsOnly(function, 2, error))
    with caplog.at_level(logging.WARNING, logger="llmrec.recommendation.request_batches"):
        answers = recommender.recommend(histories, k=5)
        assert catalogue_search.beam_search.searched == [(8, 20), (4, 20), (2, 20), (2, 20), (2, 20), (2, 20)]
        assert caplog.text.count("out of memory with") == 2
        split = recommender.score(histories, ["item-1", "item-2"])
    _assert_same(answers, expected)
    assert np.array(split) == pytest.approx(np.array(scores), abs=1e-4)
    monkeypatch.setattr(catalogue_search.beam_search, "most", 0)
    with pytest.raises(SettingsError, match="out of memory with a single request"):
        recommender.recommend(histories)
    assert not recommender.model.training


@pytest.mark.parametrize("scope", ["vocabulary", "trie"])
def test_threads_get_what_one_thread_gets(tmp_path, scope):
    recommender = tiny.recommender(tmp_path, scope=scope)
    histories = tiny.histories(8, (3, 1, 4, 0, 5, 2))
    expected = [recommender.recommend(history, k=5) for history in histories]
    scores = recommender.score(histories[0], ["item-1", "item-2"])
    recommender.model.train()

    def work(number):
        if number % 5 == 4:
            assert recommender.score(histories[0], ["item-1", "item-2"]) == pytest.approx(scores, abs=1e-4)
        _assert_same([recommender.recommend(histories[number % 6], k=5)], [expected[number % 6]])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(60)))
    assert recommender.model.training


def test_files_are_handed_on(recommender, monkeypatch):
    given = {}

    def recommend_file(*arguments, **options):
        given.update(arguments=arguments, options=options)
        return "summary"

    monkeypatch.setattr("llmrec.recommendation.batch.recommend_file", recommend_file)
    assert recommender.recommend_file("users.parquet", "answers", 5, history_column="items", num_beams=7) == "summary"
    assert given["arguments"] == (recommender, "users.parquet", "answers", 5)
    assert given["options"] == {"history_column": "items", "num_beams": 7}


def test_another_scope_than_the_trained_one_can_be_asked_for(tmp_path):
    recommender = tiny.recommender(tmp_path, scope="trie")
    of_scope = {scope: _pairs(recommender.recommend(["item-1"], scope=scope)) for scope in ("vocabulary", "trie")}
    assert of_scope["trie"] == _pairs(recommender.recommend(["item-1"])) != of_scope["vocabulary"]
    items = [item_id for item_id, _ in of_scope["vocabulary"]]
    scores = recommender.score(["item-1"], items, scope="vocabulary")
    assert scores == pytest.approx([score for _, score in of_scope["vocabulary"]], abs=1e-3)
    with pytest.raises(SettingsError, match="unknown scope 'items'; known: vocabulary, codes, trie"):
        recommender.recommend(["item-1"], scope="items")
