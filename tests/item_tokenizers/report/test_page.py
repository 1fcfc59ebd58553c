import re
from html.parser import HTMLParser

import numpy as np
import pytest

from llmrec.embeddings.base import ItemEmbeddings
from llmrec.errors import DataError, ItemOrderError
from llmrec.item_tokenizers.diagnostics import diagnose
from llmrec.item_tokenizers.report import page
from llmrec.item_tokenizers.report.page import principal_axes, write_html_report
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.item_tokenizers.uniqueness import CodeGeometry

VOID = {"meta", "line", "rect", "circle", "polygon", "polyline"}


class Page(HTMLParser):
    """Checks that tags close, and keeps text, headings and addresses."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.headings, self.links = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data)


@pytest.fixture(scope="module")
def fitted():
    """Sixty items of two levels in groups of six with like vectors; two pairs collide."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(10, 4))
    groups = np.repeat(np.arange(10), 6)
    vectors = (centres[groups] + 0.1 * generator.normal(size=(60, 4))).astype(np.float32)
    ids = tuple(f"item-{row}" for row in range(60))
    codes = np.stack([groups, np.tile(np.arange(6), 10)], axis=1)
    codes[1], codes[13] = codes[0], codes[12]
    raw = SemanticIds(ids, codes, (12, 8))
    geometry = CodeGeometry(
        vectors, (np.vstack([centres, centres[:2]]).astype(np.float32), np.zeros((8, 4), "float32"))
    )
    embeddings = ItemEmbeddings(ids, vectors)
    unique = raw.make_unique("min_cost", geometry=geometry)
    return {
        "before": diagnose(raw, geometry=geometry),
        "after": diagnose(unique, geometry=geometry, neighbours={"text": embeddings}),
        "semantic_ids": unique,
        "map_embeddings": embeddings,
    }


HISTORY = [
    {"epoch": epoch, "loss": 1 / (epoch + 1), "collision_rate": 0.1, "used_a": 9.0, "used_b": 5.0 + epoch}
    for epoch in range(0, 9, 3)
]


def _write(path, **arguments):
    write_html_report(path, title="<LETTER> & co", **arguments)
    return path.read_text(encoding="utf-8")


def test_the_whole_page(tmp_path, fitted):
    titles = ["<script>alert(1)</script>", 'quote " & \x07 bell', "long " * 100, *(f"Title {n}" for n in range(57))]
    text = _write(tmp_path / "deep" / "report.html", **fitted, item_titles=titles, history=HISTORY)
    page = Page(text)
    assert page.links == []
    assert not re.search(r"https?://|<script|@import|url\(|\x07", text)
    assert page.headings[0] == "<LETTER> & co"
    for heading in (
        "Collisions as fitted", "Items moved", "Text neighbours", "Level a", "Level b", "Items by size of their group",
        "Reconstruction by level", "Map of items", "While fitting", "Loss", "Used codes", "All figures by level",
    ):  # fmt: skip
        assert heading in page.headings, heading
    words = "".join(page.words)
    assert "as fitted: 56 of 60 items alone · in use: 60 of 60 items alone" in words
    assert "10 of 12 codes used, 2 dead" in words
    assert "<script>alert(1)</script>\n<a_0> <b_" in words
    assert words.count("long ") < 20
    assert text.count("<polyline") == 4  # loss, collision rate, and used codes of two levels in one chart
    assert page.headings.count("Used codes") == 1
    assert "<a_0> 6" in page.words
    assert "prefers-color-scheme:dark" in text
    assert [name.name for name in (tmp_path / "deep").iterdir()] == ["report.html"]


def test_every_item_is_on_the_map_once_or_a_sample_is(tmp_path, fitted, monkeypatch):
    text = _write(tmp_path / "a.html", **fitted)
    shown = re.findall(r"<title>(item-\d+)\n", text)
    assert sorted(shown) == sorted(fitted["semantic_ids"].item_ids)
    monkeypatch.setattr(page, "MAP_ITEMS", 25)
    sample = _write(tmp_path / "b.html", **fitted)
    assert len(set(re.findall(r"<title>(item-\d+)\n", sample))) == 25
    assert "25 of 60 items" in sample
    assert sample == _write(tmp_path / "c.html", **fitted)  # the same at every time


def test_items_without_a_vector_are_not_on_the_map(tmp_path, fitted):
    vectors = fitted["map_embeddings"].vectors
    embeddings = ItemEmbeddings(fitted["semantic_ids"].item_ids, vectors, present=np.arange(60) >= 20)
    text = _write(tmp_path / "a.html", **(fitted | {"map_embeddings": embeddings}))
    assert len(re.findall(r"<title>item-\d+\n", text)) == 40
    assert "<title>item-19\n" not in text


def test_the_least_page(tmp_path):
    codes = SemanticIds(tuple("abc"), np.array([[0], [1], [2]]), (4,))
    found = diagnose(codes)
    page = Page(_write(tmp_path / "a.html", before=found, after=found, semantic_ids=codes, history=[]))
    assert "No two items share all their codes." in "".join(page.words)
    assert not {"Map of items", "What the codes keep", "While fitting", "Collisions as fitted"} & set(page.headings)
    empty = SemanticIds((), np.zeros((0, 2), dtype=int), (4, 2))
    found = diagnose(empty)
    Page(_write(tmp_path / "b.html", before=found, after=found, semantic_ids=empty))


def test_what_does_not_fit_is_refused_and_nothing_written(tmp_path, fitted):
    with pytest.raises(DataError, match="item_titles has 2 items, the codes have 60"):
        _write(tmp_path / "a.html", **fitted, item_titles=["a", "b"])
    few = SemanticIds(tuple("abc"), np.array([[0], [1], [2]]), (4,))
    with pytest.raises(DataError, match="after has 3 items"):
        _write(tmp_path / "a.html", **(fitted | {"after": diagnose(few)}))
    other = ItemEmbeddings(fitted["semantic_ids"].item_ids[::-1], fitted["map_embeddings"].vectors)
    with pytest.raises(ItemOrderError, match="the embeddings of the map"):
        _write(tmp_path / "a.html", **(fitted | {"map_embeddings": other}))
    assert list(tmp_path.iterdir()) == []


def test_a_large_catalogue_stays_small(tmp_path):
    generator = np.random.default_rng(0)
    ids = tuple(f"item-{row:06d}" for row in range(9_000))
    codes = SemanticIds(ids, generator.integers(0, 4096, (9_000, 4)), (4096,) * 4)
    found = diagnose(codes)
    embeddings = ItemEmbeddings(ids, generator.normal(size=(9_000, 8)))
    text = _write(
        tmp_path / "a.html", before=found, after=found, semantic_ids=codes, map_embeddings=embeddings,
        item_titles=["A title as long as those of real items often are, with many words in it & more"] * 9_000,
    )  # fmt: skip
    assert len(text.encode()) < 1_500_000


def test_principal_axes():
    along = np.array([3.0, -1.0, -2.0])
    vectors = np.array([[10.0, value, 0.0] for value in along])
    points, share = principal_axes(vectors)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert share == pytest.approx(1.0)
    assert np.linalg.norm(points[0] - points[2]) == pytest.approx(np.linalg.norm(units[0] - units[2]))
    assert np.sign(points[:, 0]).tolist() == [1, -1, -1]  # the largest entry of the axis, along y, is positive
    assert np.array_equal(principal_axes(5 * vectors)[0].round(9), points.round(9))  # directions only
    line, _ = principal_axes(np.array([[1.0], [-1.0], [2.0]]))
    assert line[:, 1].tolist() == [0, 0, 0]
