import dataclasses
import json

import numpy as np
import pytest

from llmrec.embeddings.base import ItemEmbeddings
from llmrec.errors import DataError
from llmrec.item_tokenizers import diagnostics
from llmrec.item_tokenizers.diagnostics import (
    CodeDiagnostics,
    LevelUsage,
    Reconstruction,
    collapse_warning,
    diagnose,
    monitored_figures,
)
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.item_tokenizers.uniqueness import CodeGeometry


def test_usage_by_hand():
    usage = LevelUsage.of_counts(np.array([4, 2, 2, 0]))
    assert (usage.codebook_size, usage.used, usage.dead, usage.largest) == (4, 3, 1, 4)
    assert usage.entropy == pytest.approx(1.5)  # 1/2 * 1 + 1/4 * 2 + 1/4 * 2
    assert usage.perplexity == pytest.approx(2**1.5)
    # Gini = mean absolute difference / (2 * mean): |differences| of 0, 2, 2, 4 add up to 2 * (2+2+4+0+2+2) = 24
    assert usage.gini == pytest.approx(24 / 16 / (2 * 2))


def test_limits_of_the_measures():
    even, one = LevelUsage.of_counts(np.full(8, 3)), LevelUsage.of_counts(np.array([9, 0, 0, 0]))
    assert (even.entropy, even.perplexity, even.gini) == (3.0, 8.0, 0.0)
    assert (one.entropy, one.perplexity, one.gini) == (0.0, 1.0, 0.75)


def test_collisions_and_groups():
    codes = np.array([[0, 0], [0, 0], [0, 1], [1, 0], [1, 0], [1, 0], [2, 1]])
    found = diagnose(SemanticIds(tuple("abcdefg"), codes, (4, 2)))
    assert (found.num_items, found.num_distinct, found.items_in_collision) == (7, 4, 5)
    assert found.collision_rate == pytest.approx(3 / 7)
    assert found.group_sizes == {1: 2, 2: 1, 3: 1}
    assert [level.used for level in found.levels] == [3, 2]
    text = str(found)
    assert "collision rate 42.86%: 4 different tuples, 5 items share one, largest group 3" in text
    assert len(text.splitlines()) == 8


def test_an_empty_catalogue_has_a_table_too():
    found = diagnose(SemanticIds((), np.zeros((0, 2), dtype=int), (4, 2)))
    assert found.levels[0].dead == 4
    assert "collision rate 0.00%" in str(found)


# Latents on a line, mean 0 and variance (16 + 4 + 4 + 16) / 4 = 10; codes keep the sign, then all but the last item.
LATENTS = np.array([[-4.0], [-2.0], [2.0], [4.0]], dtype=np.float32)
CODEBOOKS = (np.array([[-3.0], [3.0]], dtype=np.float32), np.array([[-1.0], [1.0]], dtype=np.float32))
LINE_CODES = np.array([[0, 0], [0, 1], [1, 0], [1, 0]])


def test_reconstruction_by_hand():
    found = Reconstruction.measure(LINE_CODES, CodeGeometry(LATENTS, CODEBOOKS))
    # After the first level every item is 1 away; after both only the last is wrong, 4 - (3 - 1) = 2 away.
    assert found.squared_error == pytest.approx((1.0, 1.0))
    assert found.variance == pytest.approx(10.0)
    assert found.relative_error == pytest.approx((0.1, 0.1))
    exact = Reconstruction.measure(np.array([[0, 0], [0, 1], [1, 0], [1, 1]]), CodeGeometry(LATENTS, CODEBOOKS))
    assert exact.squared_error == pytest.approx((1.0, 0.0))


def test_reconstruction_is_read_in_blocks_from_a_memory_map(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    latents = (30_000 + generator.normal(size=(101, 5))).astype(np.float32)  # far from 0: no digits may be lost
    codebooks = tuple(generator.normal(size=(6, 5)).astype(np.float32) for _ in range(3))
    codebooks[0][:] += 30_000
    codes = generator.integers(0, 6, (101, 4))  # the fourth is a counter, without a codebook
    np.save(tmp_path / "latents.npy", latents)
    monkeypatch.setattr(diagnostics, "LATENT_BLOCK", 7)
    found = Reconstruction.measure(codes, CodeGeometry(np.load(tmp_path / "latents.npy", mmap_mode="r"), codebooks))
    left = latents.astype(np.float64)
    assert found.variance == pytest.approx(left.var(axis=0).sum(), rel=1e-9)
    for level, codebook in enumerate(codebooks):
        left = left - codebook[codes[:, level]]
        assert found.squared_error[level] == pytest.approx((left**2).sum(axis=1).mean(), rel=1e-9)
    assert len(found.relative_error) == 3


def test_reconstruction_at_its_edges():
    equal = Reconstruction.measure(LINE_CODES, CodeGeometry(np.zeros((4, 1), dtype=np.float32), CODEBOOKS))
    assert (equal.variance, equal.relative_error) == (0.0, (0.0, 0.0))
    empty = Reconstruction.measure(LINE_CODES[:0], CodeGeometry(LATENTS[:0], CODEBOOKS))
    assert empty.squared_error == (0.0, 0.0)
    with pytest.raises(DataError, match=r"latents of 4 items and 2 codebooks, the codes 3 items"):
        Reconstruction.measure(LINE_CODES[:3], CodeGeometry(LATENTS, CODEBOOKS))


def test_all_of_it_survives_json():
    codes = SemanticIds(tuple("abcd"), LINE_CODES, (2, 2))
    found = diagnose(
        codes, geometry=CodeGeometry(LATENTS, CODEBOOKS), neighbours={"text": ItemEmbeddings(tuple("abcd"), LATENTS)}
    )
    assert [prefix.distinct for prefix in found.prefixes] == [2, 3]
    # By cosine a and b are equal, and c and d: but all three others are asked for.
    assert found.neighbours["text"].num_neighbours == 3
    text = str(found)
    assert "error left" in text
    assert "Codes shared with the 3 nearest: text" in text
    assert "code overlap): 0.4167" in text  # first codes: 4 of 12 pairs; second: 6 of 12
    content = json.loads(json.dumps(dataclasses.asdict(found)))
    assert CodeDiagnostics.from_json(content) == found
    for name in ("prefixes", "reconstruction", "neighbours"):  # of an earlier llmrec
        del content[name]
    assert CodeDiagnostics.from_json(content) == diagnose_without_prefixes(codes)
    with pytest.raises(DataError, match="no diagnostics of codes"):
        CodeDiagnostics.from_json({"num_items": 4})


def diagnose_without_prefixes(codes):
    return dataclasses.replace(diagnose(codes), prefixes=())


def test_monitored_figures_by_hand():
    codes = np.array([[0, 0], [0, 0], [1, 0], [1, 1]], dtype=np.int32)
    assert monitored_figures(codes, (4, 2)) == {
        "collision_rate": 0.25,
        "used_a": 2.0,
        "used_b": 2.0,
        "perplexity_a": pytest.approx(2.0),
        "perplexity_b": pytest.approx(4 / 3**0.75),  # 2 ** entropy of 3/4 and 1/4
    }
    assert monitored_figures(codes[:0], (4, 2))["collision_rate"] == 0.0


def _figures(used, perplexity):
    return {f"used_{'ab'[n]}": float(u) for n, u in enumerate(used)} | {
        f"perplexity_{'ab'[n]}": float(p) for n, p in enumerate(perplexity)
    }


def test_collapse_is_named_with_its_remedy():
    assert collapse_warning(_figures((26, 256), (20, 250)), (256, 256), 1000) is None
    found = collapse_warning(_figures((25, 5), (20, 5)), (256, 256), 1000)
    assert found.startswith("the items use only 5 of 256 codes of level b (collapse): set revive_until")
    assert "only 25 of 256 codes of level a" in collapse_warning(_figures((25, 30), (20, 30)), (256, 256), 1000)
    # Few items can't use more codes than they are.
    assert collapse_warning(_figures((25, 25), (20, 20)), (256, 256), 30) is None
    found = collapse_warning(_figures((200, 250), (19.9, 200)), (256, 256), 1000)
    assert found.startswith("nearly all items sit on few of the 200 used codes of level a (perplexity 19.9)")
    assert collapse_warning(_figures((200, 250), (20.1, 200)), (256, 256), 1000) is None
    # The worst of both kinds is named.
    assert "5 of 256 codes of level b" in collapse_warning(_figures((200, 5), (19.9, 5)), (256, 256), 1000)
    assert "200 used codes of level a" in collapse_warning(_figures((200, 20), (2.0, 20)), (256, 256), 1000)


def test_collapse_of_real_codes():
    spread = np.arange(1000)[:, None] % 256
    one = np.zeros((1000, 1), dtype=int)
    assert collapse_warning(monitored_figures(spread, (256,)), (256,), 1000) is None
    assert "only 1 of 256 codes of level a" in collapse_warning(monitored_figures(one, (256,)), (256,), 1000)
