import numpy as np
import pytest

from llmrec.data.synthetic import synthetic_dataset
from llmrec.embeddings import sources as sources_module
from llmrec.embeddings.base import ItemEmbeddings
from llmrec.embeddings.collaborative import SASRec
from llmrec.embeddings.sources import EmbeddingSource, make_embeddings
from llmrec.errors import ItemOrderError, LlmrecError, MissingPartError, SettingsError


@pytest.fixture(scope="module")
def dataset():
    return synthetic_dataset(num_users=60, num_items=40)


def made(dataset, folder, /, *, resume=False, **settings):
    sources = {name: EmbeddingSource.from_settings(name, values) for name, values in settings.items()}
    return make_embeddings(sources, dataset, folder, resume=resume)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encoder": "tfidf"}, "say where it comes from"),
        ("text", "say where it comes from"),
        ({"from": "sound"}, "from is 'sound'; known: text, image, sasrec, lightgcn, file"),
        ({"from": "text", "colour": 1}, "unknown setting 'colour'"),
        ({"from": "text", "items": 1}, "unknown setting 'items'"),
        ({"from": "image", "colour": 1}, "unknown setting 'colour'"),
        ({"from": "sasrec", "colour": 1}, "unknown setting 'colour'"),
        ({"from": "sasrec", "width": 0}, "width is 0"),
        ({"from": "lightgcn", "colour": 1}, "unknown setting 'colour'"),
        ({"from": "file"}, "a file needs its path"),
        ({"from": "file", "path": "x", "missing": "guess"}, "choose error or mask"),
        ({"from": "text", "reduce_to": "small"}, "reduce_to is 'small'"),
    ],
)
def test_wrong_sources_are_refused_before_any_work(values, message):
    with pytest.raises(SettingsError, match=message):
        EmbeddingSource.from_settings("some", values)


def test_text_and_reduction(dataset, tmp_path):
    found = made(dataset, tmp_path, words={"from": "text", "encoder": "tfidf", "width": 16, "reduce_to": 8})
    assert list(found) == ["words"]
    assert found["words"].item_ids == dataset.item_ids
    assert found["words"].width == 8


@pytest.mark.parametrize("kind", ["sasrec", "lightgcn"])
def test_collaborative_models_see_the_training_part_alone_and_are_saved(dataset, tmp_path, kind):
    found = made(dataset, tmp_path, cf={"from": kind, "width": 8, "epochs": 1})["cf"]
    assert found.item_ids == dataset.item_ids
    assert found.width == 8
    assert found.source["part"] == "training part only"
    again = made(dataset, tmp_path / "none", cf={"from": "file", "path": str(tmp_path / kind)})["cf"]
    np.testing.assert_array_equal(again.vectors, found.vectors)


def test_resumed_the_model_is_not_trained_again(dataset, tmp_path, monkeypatch):
    settings = {"from": "sasrec", "width": 8, "epochs": 1}
    first = made(dataset, tmp_path, resume=True, cf=settings)["cf"]

    def refuse(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(SASRec, "fit", refuse)
    again = made(dataset, tmp_path, resume=True, cf=settings)["cf"]
    np.testing.assert_array_equal(first.vectors, again.vectors)
    with pytest.raises(AssertionError, match="trained again"):
        made(dataset, tmp_path, resume=True, cf=settings | {"epochs": 2})


def test_files_with_ids_are_brought_into_the_order_of_the_catalogue(dataset, tmp_path):
    draws = np.random.default_rng(0)
    order = draws.permutation(dataset.num_items)
    vectors = draws.normal(size=(dataset.num_items, 3)).astype(np.float32)
    own = ItemEmbeddings(tuple(np.array(dataset.item_ids)[order].tolist()), vectors[order])
    own.save(tmp_path / "own.safetensors")
    found = made(dataset, tmp_path, own={"from": "file", "path": str(tmp_path / "own.safetensors")})["own"]
    np.testing.assert_array_equal(found.vectors, vectors)
    own.select(np.arange(30)).save(tmp_path / "some.safetensors")
    source = {"from": "file", "path": str(tmp_path / "some.safetensors")}
    with pytest.raises(LlmrecError):
        made(dataset, tmp_path, own=source)
    masked = made(dataset, tmp_path, own=source | {"missing": "mask"})["own"]
    assert masked.present.sum() == 30
    np.testing.assert_array_equal(masked.vectors[order[:30]], vectors[order[:30]])


def test_a_plain_array_must_be_as_long_as_the_catalogue(dataset, tmp_path):
    np.save(tmp_path / "plain.npy", np.ones((dataset.num_items, 2), np.float32))
    plain = made(dataset, tmp_path, own={"from": "file", "path": str(tmp_path / "plain.npy")})["own"]
    assert plain.item_ids == dataset.item_ids
    np.save(tmp_path / "short.npy", np.ones((3, 2), np.float32))
    with pytest.raises(LlmrecError, match="3"):
        made(dataset, tmp_path, own={"from": "file", "path": str(tmp_path / "short.npy")})


def test_a_missing_file_stops_before_the_other_modalities_are_made(dataset, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("text was embedded first")

    monkeypatch.setitem(sources_module.CONTENT, "text", refuse)
    sources = {
        "text": EmbeddingSource("text", {}),
        "own": EmbeddingSource("file", {"path": str(tmp_path / "none.npy")}),
    }
    with pytest.raises(MissingPartError, match=r"none\.npy"):
        make_embeddings(sources, dataset, tmp_path)


def test_a_model_of_another_catalogue_is_refused(dataset, tmp_path):
    made(dataset, tmp_path, cf={"from": "sasrec", "width": 8, "epochs": 1})
    other = synthetic_dataset(num_users=60, num_items=41)
    with pytest.raises(ItemOrderError):
        made(other, tmp_path, cf={"from": "file", "path": str(tmp_path / "sasrec")})
