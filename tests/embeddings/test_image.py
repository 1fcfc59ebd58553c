import http.server
import logging
import os
import threading

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llmrec.embeddings import image as module
from llmrec.embeddings import image_reading
from llmrec.embeddings.image import embed_images
from llmrec.errors import DataError, MissingPartError, SettingsError

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SHAPE, "image_size": 16, "patch_size": 8}
TEXT = {**SHAPE, "vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}


def make_model(kind: str):
    if kind == "clip":
        return CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=8))
    if kind == "clip_vision":
        return CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=8))
    if kind == "siglip":
        return SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT))
    if kind == "vit":  # a classifier: its checkpoint has no pooler
        return ViTForImageClassification(ViTConfig(**VISION))
    return Dinov2Model(Dinov2Config(**VISION))


@pytest.fixture(scope="module")
def make_encoder(tmp_path_factory):
    """`make_encoder(kind)`: a random two-layer vision model with an image processor, in a folder, and the model."""

    def make(kind: str):
        folder = tmp_path_factory.mktemp(kind)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = make_model(kind)
        model.save_pretrained(folder)
        if kind.startswith("clip"):
            processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        else:
            processor = SiglipImageProcessorPil(size={"height": 16, "width": 16})
        processor.save_pretrained(folder)
        return folder, model.eval()

    return make


@pytest.fixture(scope="module")
def clip(make_encoder):
    return make_encoder("clip")


def picture(seed: int, size=(20, 24)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3))
    return Image.fromarray(values.astype(np.uint8))


@pytest.fixture
def folder(tmp_path):
    """0.png to 3.png, different pictures."""
    path = tmp_path / "images"
    path.mkdir()
    for seed in range(4):
        picture(seed, (20 + seed, 24)).save(path / f"{seed}.png")
    return path


def catalogue(images: list, column: str = "image") -> datasets.Dataset:
    return datasets.Dataset.from_dict({"item_id": [f"i{row}" for row in range(len(images))], column: images})


def expected(folder, model, image: Image.Image) -> np.ndarray:
    """One picture straight through the model."""
    inputs = AutoImageProcessor.from_pretrained(folder)(images=image, return_tensors="pt")
    with torch.no_grad():
        if hasattr(model, "get_image_features"):
            return model.get_image_features(**inputs).pooler_output[0].numpy()
        if isinstance(model, ViTForImageClassification):
            return model.vit(**inputs).last_hidden_state[0, 0].numpy()
        output = model(**inputs)
        return (output.image_embeds if hasattr(output, "image_embeds") else output.pooler_output)[0].numpy()


@pytest.mark.parametrize("kind", ["clip", "clip_vision", "siglip", "vit", "dinov2"])
def test_vectors_are_those_of_the_model(make_encoder, folder, kind):
    path, model = make_encoder(kind)
    found = embed_images(
        catalogue([f"{seed}.png" for seed in range(4)]), encoder=str(path), image_folder=folder, batch_size=3
    )
    assert found.vectors.shape == (4, 8 if kind.startswith("clip") else 16)
    for seed in range(4):
        with Image.open(folder / f"{seed}.png") as image:
            np.testing.assert_allclose(found.vectors[seed], expected(path, model, image), atol=1e-5)
    assert found.present is None
    assert found.source["kind"] == "image"
    assert found.source["unreadable_images"] == 0


def test_broken_missing_and_huge_images_are_masked(clip, folder, caplog, monkeypatch):
    monkeypatch.setattr(image_reading, "MAX_PIXELS", 3000)
    (folder / "text.png").write_text("not an image")
    whole = (folder / "1.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    picture(5, (60, 60)).save(folder / "bomb.png")
    picture(6, (2, 300)).save(folder / "thin.png")
    names = ["0.png", "text.png", None, "cut.png", "no.png", "bomb.png", "2.png", "thin.png", "  "]
    with caplog.at_level(logging.WARNING):
        found = embed_images(catalogue(names), encoder=str(clip[0]), image_folder=folder, batch_size=2)
    good = embed_images(catalogue(["0.png", "2.png"]), encoder=str(clip[0]), image_folder=folder).vectors
    assert found.present.tolist() == [row in (0, 6) for row in range(9)]
    np.testing.assert_allclose(found.vectors[[0, 6]], good, atol=1e-5)
    np.testing.assert_allclose(found.vectors[~found.present], np.tile(good.mean(axis=0), (7, 1)), atol=1e-5)
    assert found.source["items_without_image"] == 2
    assert found.source["unreadable_images"] == 5
    assert "2 of 9 items are masked whose image is broken or cut off: 'i1', 'i3'" in caplog.text
    assert "1 of 9 items are masked whose file doesn't exist: 'i4'" in caplog.text
    assert "'i5', 'i7'" in caplog.text


def test_nothing_readable_is_an_error(clip, tmp_path):
    with pytest.raises(DataError, match=r"none of the 2 items .* \(1 without an image in that column, 1 whose file"):
        embed_images(catalogue([None, str(tmp_path / "no.png")]), encoder=str(clip[0]))


def test_the_first_readable_image_of_a_list_is_taken(clip, folder):
    (folder / "broken.png").write_bytes(b"?")
    items = catalogue([["broken.png", "1.png", "0.png"], ["2.png"], []])
    found = embed_images(items, encoder=str(clip[0]), image_folder=folder)
    good = embed_images(catalogue(["1.png", "2.png"]), encoder=str(clip[0]), image_folder=folder).vectors
    np.testing.assert_allclose(found.vectors[:2], good, atol=1e-5)
    assert found.present.tolist() == [True, True, False]


@pytest.mark.parametrize("listed", [False, True])
def test_images_of_the_datasets_library(clip, folder, listed):
    pictures = [picture(0), None, picture(2)]
    items = catalogue([[] if one is None else [one] for one in pictures] if listed else pictures)
    kind = datasets.List(datasets.Image()) if listed else datasets.Image()
    found = embed_images(items.cast_column("image", kind), encoder=str(clip[0]))
    np.testing.assert_allclose(found.vectors[0], expected(*clip, pictures[0]), atol=1e-5)
    np.testing.assert_allclose(found.vectors[2], expected(*clip, pictures[2]), atol=1e-5)
    assert found.present.tolist() == [True, False, True]


def test_transparent_upright_and_tiny_pictures(make_encoder, folder):
    path, model = make_encoder("siglip")
    clear = Image.new("RGBA", (20, 24), (0, 0, 0, 0))
    clear.putpixel((3, 3), (255, 0, 0, 255))
    clear.save(folder / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture(1).save(folder / "turned.png", exif=exif)
    picture(2, (5, 3)).save(folder / "tiny.png")  # three rows, not three channels
    names = ["clear.png", "turned.png", "tiny.png"]
    found = embed_images(catalogue(names), encoder=str(path), image_folder=folder).vectors
    white = Image.new("RGB", (20, 24), "white")
    white.putpixel((3, 3), (255, 0, 0))
    np.testing.assert_allclose(found[0], expected(path, model, white), atol=1e-5)
    np.testing.assert_allclose(found[1], expected(path, model, picture(1).rotate(-90, expand=True)), atol=1e-5)
    flat = picture(2, (5, 3)).resize((16, 16), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(found[2], expected(path, model, flat), atol=1e-4)


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/missing.png":
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.content if self.path == "/good.png" else b"x" * 5000)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(folder):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as running:
        running.content = (folder / "0.png").read_bytes()
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_urls_are_fetched_only_where_allowed(clip, folder, server, monkeypatch, tmp_path):
    monkeypatch.setattr(image_reading, "URL_BYTES", 4000)
    items = catalogue([f"{server}/good.png", f"{server}/missing.png", f"{server}/large.png", "http://127.0.0.1:1/x"])
    with pytest.raises(DataError, match=r"item 'i0' is the URL .*good\.png'.*allow_urls=True"):
        embed_images(items, encoder=str(clip[0]))
    found = embed_images(items, encoder=str(clip[0]), allow_urls=True, cache_dir=tmp_path / "cache")
    with Image.open(folder / "0.png") as image:
        np.testing.assert_allclose(found.vectors[0], expected(*clip, image), atol=1e-5)
    assert found.present.tolist() == [True, False, False, False]
    assert not (tmp_path / "cache").exists()  # the others may answer next time
    with pytest.raises(DataError, match="only http and https"):
        embed_images(catalogue(["file:///etc/passwd"]), encoder=str(clip[0]), allow_urls=True)


def test_cached_result_needs_no_model(clip, folder, tmp_path, monkeypatch):
    items = catalogue(["0.png", "1.png", "no.png"])
    arguments = {"encoder": str(clip[0]), "image_folder": folder, "cache_dir": tmp_path / "cache"}
    first = embed_images(items, **arguments)

    class Refused(Exception):
        pass

    def refuse(*args):
        raise Refused

    monkeypatch.setattr(module, "ImageEncoder", refuse)
    again = embed_images(items, **arguments, batch_size=1)
    assert np.array_equal(first.vectors, again.vectors)
    assert again.present.tolist() == [True, True, False]
    assert again.source == first.source
    for change in ({"dtype": "bfloat16"}, {"revision": "other"}):
        with pytest.raises(Refused):
            embed_images(items, **{**arguments, **change})
    with pytest.raises(Refused):
        embed_images(catalogue(["0.png", "2.png", "no.png"]), **arguments)
    os.utime(folder / "0.png", (1, 1))
    with pytest.raises(Refused):
        embed_images(items, **arguments)


def test_half_precision(clip, folder):
    items = catalogue(["0.png", "1.png"])
    full = embed_images(items, encoder=str(clip[0]), image_folder=folder).vectors
    half = embed_images(items, encoder=str(clip[0]), image_folder=folder, dtype="bfloat16").vectors
    assert half.dtype == np.float32
    assert not np.array_equal(full, half)
    np.testing.assert_allclose(half, full, atol=0.05 * np.abs(full).max())


def test_what_cannot_work(clip, make_encoder, folder, tmp_path, monkeypatch):
    items = catalogue(["0.png"])
    with pytest.raises(DataError, match="no column 'photo'; its columns are item_id, image"):
        embed_images(items, encoder=str(clip[0]), column="photo")
    with pytest.raises(DataError, match="the image of item 'i0' is a int"):
        embed_images(catalogue([3]), encoder=str(clip[0]))
    with pytest.raises(MissingPartError, match="no folder"):
        embed_images(items, encoder="./no/such/model")
    path, _ = make_encoder("dinov2")
    (path / "preprocessor_config.json").unlink()
    with pytest.raises(MissingPartError, match="has no image processor"):
        embed_images(items, encoder=str(path), image_folder=folder)
    with pytest.raises(SettingsError, match="batch_size is 0"):
        embed_images(items, encoder=str(clip[0]), batch_size=0)

    def refuse():
        raise SettingsError('`pip install "llmrec[image]"`')

    monkeypatch.setattr(module, "import_pillow", refuse)
    with pytest.raises(SettingsError, match=r"llmrec\[image\]"):
        embed_images(items, encoder=str(clip[0]))


def test_weights_that_are_missing_are_refused(make_encoder, folder):
    from safetensors.torch import load_file, save_file

    path, _ = make_encoder("dinov2")
    state = load_file(path / "model.safetensors")
    del state["encoder.layer.1.mlp.fc1.weight"]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MissingPartError, match=r"lacks 1 weight\(s\) of its model"):
        embed_images(catalogue(["0.png"]), encoder=str(path), image_folder=folder)
