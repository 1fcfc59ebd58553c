import json

import numpy as np
import pytest

from llmrec.embeddings.base import ItemEmbeddings
from llmrec.errors import DataError, SettingsError, UnknownItemError
from llmrec.item_tokenizers.base import NotFittedError
from llmrec.item_tokenizers.given_codes import GivenCodesTokenizer
from llmrec.item_tokenizers.semantic_ids import SemanticIds

IDS = ("a", "b", "é", "d")
INDEX = {"0": ["<a_1>", "<b_2>"], "1": ["<a_0>", "<b_2>"], "2": ["<a_1>", "<b_2>"], "3": ["<a_1>", "<b_0>"]}


def embeddings_of(item_ids, width=2):
    return ItemEmbeddings(tuple(item_ids), np.zeros((len(item_ids), width), dtype=np.float32))


@pytest.fixture
def index_path(tmp_path):
    path = tmp_path / "x.index.json"
    path.write_text(json.dumps(INDEX))
    return path


@pytest.fixture
def tokenizer(index_path):
    return GivenCodesTokenizer.from_index(index_path, IDS)


def test_known_items_in_any_order_and_number_get_their_codes(tokenizer):
    assert tokenizer.is_fitted
    assert tokenizer.codebook_sizes == (3, 3)
    found = tokenizer.quantize(embeddings_of(["d", "é"]))
    assert found.semantic_ids.item_ids == ("d", "é")
    assert found.semantic_ids.codes.tolist() == [[1, 0], [1, 2]]
    assert found.geometry is None
    several = {"image": embeddings_of(IDS, 5), "text": embeddings_of(IDS)}
    assert tokenizer.encode(several, policy="allow").codes.tolist() == [[1, 2], [0, 2], [1, 2], [1, 0]]
    unique = tokenizer.encode(embeddings_of(IDS))
    assert unique.codes.tolist() == [[1, 2], [0, 2], [1, 1], [1, 0]]
    assert unique.policy == "min_cost"


def test_new_items_and_fitting_are_refused(tokenizer):
    with pytest.raises(UnknownItemError, match=r"'new'.*nothing was fitted"):
        tokenizer.encode(embeddings_of(["a", "new"]))
    with pytest.raises(UnknownItemError, match="'new'"):
        tokenizer.extend(tokenizer.encode(embeddings_of(IDS)), embeddings_of(["new"]))
    with pytest.raises(SettingsError, match=r"can't be fitted.*from_index"):
        tokenizer.fit(embeddings_of(IDS))
    with pytest.raises(NotFittedError, match="not fitted"):
        GivenCodesTokenizer().encode(embeddings_of(IDS))
    with pytest.raises(NotFittedError, match="nothing to save"):
        GivenCodesTokenizer().save_pretrained("nowhere")
    with pytest.raises(DataError, match="no embeddings"):
        tokenizer.encode({})


def test_the_saved_folder_stands_alone(tokenizer, index_path, tmp_path):
    tokenizer.save_pretrained(tmp_path / "saved")
    index_path.unlink()
    loaded = GivenCodesTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded.semantic_ids.item_ids == IDS
    assert loaded.fit_report == {"items": 4, "index": "x.index.json"}
    np.testing.assert_array_equal(loaded.semantic_ids.codes, tokenizer.semantic_ids.codes)
    assert loaded.encode(embeddings_of(["é"])).codes.tolist() == [[1, 2]]


def test_a_counter_of_the_file_is_kept(tmp_path):
    path = tmp_path / "x.index.json"
    path.write_text(json.dumps({"0": ["<|a_1|>", "<|b_1|>"], "1": ["<|a_1|>", "<|b_1|>", "<|c_1|>"]}))
    GivenCodesTokenizer.from_index(path, ["x", "y"]).save_pretrained(tmp_path / "saved")
    loaded = GivenCodesTokenizer.from_pretrained(tmp_path / "saved")
    again = loaded.encode(embeddings_of(["x", "y"]), policy="extra_level")
    assert again.codes.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert again.policy == "extra_level"


def test_codes_from_elsewhere():
    given = SemanticIds(("x", "y"), np.array([[0, 1], [1, 0]]), (2, 2))
    assert GivenCodesTokenizer.from_semantic_ids(given).encode(embeddings_of(["y"])).codes.tolist() == [[1, 0]]


def test_beauty(beauty_dir):
    ids = tuple(f"item{row}" for row in range(12_101))
    tokenizer = GivenCodesTokenizer.from_index(beauty_dir / "Beauty.letter-index.json", ids)
    assert tokenizer.codebook_sizes == (256,) * 4
    assert tokenizer.quantize(embeddings_of(["item0"])).semantic_ids.codes.tolist() == [[183, 70, 232, 6]]
    assert tokenizer.quantize(embeddings_of(ids)).semantic_ids.num_distinct == 12_088
