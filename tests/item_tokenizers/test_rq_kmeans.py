import threading

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sklearn.cluster import KMeans

from llmrec.embeddings.base import ItemEmbeddings
from llmrec.errors import DataError, SettingsError
from llmrec.item_tokenizers import residuals, rq_kmeans
from llmrec.item_tokenizers.rq_kmeans import RQKMeansConfig, RQKMeansTokenizer
from llmrec.processes import Processes

SMALL = {"num_codebooks": 3, "codebook_size": 16}


def embeddings(count=300, width=12, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return ItemEmbeddings(tuple(f"item-{row}" for row in range(count)), vectors)


def fit(of=None, **settings):
    return RQKMeansTokenizer(RQKMeansConfig(**SMALL | settings)).fit(of or embeddings(), progress=False)


def codes_of(tokenizer, of=None):
    return tokenizer.quantize(of or embeddings()).semantic_ids.codes


def sizes_of(codes, level, size=16):
    return np.bincount(codes[:, level], minlength=size)


def plain_lloyd(vectors, centres, rounds):
    """Level by level with all residuals in memory, from given starts."""
    left, books = vectors.astype(np.float64), []
    for start in centres:
        book = start.astype(np.float64)
        for _ in range(rounds):
            codes = ((left[:, None] - book) ** 2).sum(2).argmin(1)
            book = np.stack([left[codes == k].mean(0) if (codes == k).any() else book[k] for k in range(len(book))])
        books.append(book)
        left = left - book[((left[:, None] - book) ** 2).sum(2).argmin(1)]
    return books


def test_full_is_lloyd_on_residuals(monkeypatch):
    """In chunks of 7 rows, against the plain loop with everything in memory."""
    monkeypatch.setattr(residuals, "CHUNK_ROWS", 7)
    starts, original = [], rq_kmeans.start_centres
    monkeypatch.setattr(rq_kmeans, "start_centres", lambda *given: starts.append(original(*given)) or starts[-1])
    tokenizer = fit(iterations=4, tolerance=0.0)
    expected = plain_lloyd(embeddings().vectors, starts, 4)
    for found, book in zip(tokenizer.codebooks, expected, strict=True):
        np.testing.assert_allclose(found.numpy(), book, atol=1e-5)
    assert tokenizer.fit_report["rounds"] == [4, 4, 4]


def test_one_level_is_as_good_as_scikit_learn():
    blobs = np.random.default_rng(1).normal(size=(2000, 2)).astype(np.float32)
    of = ItemEmbeddings(tuple(map(str, range(2000))), blobs)
    ours = fit(of, num_codebooks=1, tolerance=0.0, iterations=300).fit_report["inertia"][0]
    theirs = KMeans(16, n_init=1, max_iter=300, tol=0.0, random_state=0).fit(blobs).inertia_
    assert ours < 1.05 * theirs


def test_codes_are_nearest_centres_and_the_report_is_true():
    tokenizer, vectors = fit(), embeddings().vectors
    codes, left = codes_of(tokenizer), vectors.astype(np.float64)
    for level, book in enumerate(tokenizer.codebooks):
        distances = ((left[:, None] - book.double().numpy()) ** 2).sum(2)
        np.testing.assert_array_equal(codes[:, level], distances.argmin(1))
        left = left - book.double().numpy()[codes[:, level]]
        assert tokenizer.fit_report["inertia"][level] == pytest.approx((left**2).sum(), rel=1e-4)
    quantized = tokenizer.quantize(embeddings())
    assert quantized.semantic_ids.collision_rate == pytest.approx(tokenizer.fit_report["collision_rate"])
    np.testing.assert_array_equal(codes, tokenizer.quantize_catalogue(embeddings()).semantic_ids.codes)


def test_the_geometry_holds_the_vectors_themselves():
    of = embeddings()  # never copied: a memory-mapped catalogue may be larger than memory
    assert np.shares_memory(fit(of).quantize(of).geometry.latents, of.vectors)


def test_memory_mapped_read_only_vectors(tmp_path):
    of = embeddings()
    np.save(tmp_path / "vectors.npy", of.vectors)
    mapped = ItemEmbeddings(of.item_ids, np.load(tmp_path / "vectors.npy", mmap_mode="r"))
    for settings in ({}, {"balance": "exact"}, {"algorithm": "mini_batch", "batch_size": 50, "iterations": 5}):
        np.testing.assert_array_equal(codes_of(fit(mapped, **settings), mapped), codes_of(fit(**settings)))


def test_mini_batches_move_centres_by_their_counts(monkeypatch):
    """Two batches of two rows in one dimension, by hand: each centre is the mean of all it has had."""
    vectors = np.array([[0.0], [1.0], [10.0], [12.0]], dtype=np.float32)
    of = ItemEmbeddings(("a", "b", "c", "d"), vectors)
    batches = iter([np.array([0, 2]), np.array([1, 3])])
    monkeypatch.setattr(rq_kmeans, "start_centres", lambda *_: np.array([[3.0], [9.0]], dtype=np.float32))
    sample_rows = rq_kmeans.sample_rows
    monkeypatch.setattr(
        rq_kmeans, "sample_rows", lambda n, most, draws: next(batches) if most == 2 else sample_rows(n, most, draws)
    )
    tokenizer = fit(of, algorithm="mini_batch", batch_size=2, iterations=2, num_codebooks=1, codebook_size=2)
    np.testing.assert_allclose(tokenizer.codebooks[0], [[0.5], [11.0]])


def test_mini_batches_come_near_the_full_algorithm():
    full = fit().fit_report["inertia"][-1]
    batches = fit(algorithm="mini_batch", batch_size=64, iterations=60).fit_report["inertia"][-1]
    assert batches < 1.1 * full


def test_dead_centres_are_moved_to_far_points(monkeypatch):
    """All centres start at one place: only one would ever get an item."""
    monkeypatch.setattr(rq_kmeans, "start_centres", lambda vectors, count, _: np.repeat(vectors[:1], count, axis=0))
    codes = codes_of(fit())
    assert [int((sizes_of(codes, level) > 0).sum()) for level in range(3)] == [16, 16, 16]


@pytest.mark.parametrize("balance", ["exact", "greedy"])
def test_balanced_catalogues_have_equal_sizes_at_every_level(balance):
    tokenizer = fit(balance=balance)
    quantized = tokenizer.quantize_catalogue(embeddings())
    for level in range(3):
        assert set(sizes_of(quantized.semantic_ids.codes, level)) == {18, 19}  # 300 / 16
    assert quantized.semantic_ids.collision_rate == pytest.approx(tokenizer.fit_report["collision_rate"])
    nearest = codes_of(tokenizer)
    assert (nearest != quantized.semantic_ids.codes).any()
    part = ItemEmbeddings(embeddings().item_ids[7:9], embeddings().vectors[7:9])
    np.testing.assert_array_equal(codes_of(tokenizer, part), nearest[7:9])  # new items: whoever comes with them


def test_exact_is_cheaper_than_onerecs_order_and_slack_cheaper_than_none():
    inertia = [fit(**settings).fit_report["inertia"][0] for settings in (
        {"balance": "greedy"}, {"balance": "exact"}, {"balance": "exact", "size_slack": 0.5})]  # fmt: skip
    assert inertia[0] > inertia[1] > inertia[2]
    codes = fit(balance="exact", size_slack=0.5).quantize_catalogue(embeddings()).semantic_ids.codes
    assert sizes_of(codes, 0).min() >= 9
    assert sizes_of(codes, 0).max() <= 29
    assert len(set(sizes_of(codes, 0))) > 2


def test_size_limits_by_hand():
    assert RQKMeansConfig(codebook_size=256).size_limits(12_101) == (47, 48)
    assert RQKMeansConfig(codebook_size=16).size_limits(32) == (2, 2)
    assert RQKMeansConfig(codebook_size=16).size_limits(3) == (0, 1)
    assert RQKMeansConfig(codebook_size=10, size_slack=0.5).size_limits(100) == (5, 15)
    assert RQKMeansConfig(codebook_size=10, size_slack=2.0).size_limits(100) == (0, 30)


def test_a_catalogue_above_the_limit_is_balanced_block_by_block():
    tokenizer = fit(balance="exact", balanced_items=100)
    assert tokenizer.fit_report["fitted_items"] == 100
    codes = tokenizer.quantize_catalogue(embeddings()).semantic_ids.codes
    for block in range(3):
        assert set(sizes_of(codes[100 * block : 100 * block + 100], 1)) == {6, 7}


class _Together(Processes):
    """Processes that are threads of this one."""

    def __init__(self, index, count, shared):
        super().__init__(index, count, "cpu")
        self.shared = shared
        self.meeting = shared.setdefault("meeting", threading.Barrier(count, timeout=60))

    def _all(self, value):
        self.shared[self.index] = value
        self.meeting.wait()
        values = [self.shared[index] for index in range(self.count)]
        self.meeting.wait()
        return values

    def sum(self, tensor):
        return torch.stack(self._all(tensor)).sum(0)

    def gather_array(self, array):
        return np.concatenate(self._all(array))

    def broadcast(self, value):
        return self._all(value)[0]

    def barrier(self):
        self._all(None)


@pytest.mark.parametrize(
    "settings",
    [{}, {"balance": "exact"}, {"balance": "greedy", "balanced_items": 120},
     {"algorithm": "mini_batch", "batch_size": 50, "iterations": 12}],
)  # fmt: skip
def test_three_processes_learn_what_one_learns(settings):
    shared, results = {}, {}

    def work(index):
        processes = _Together(index, 3, shared)
        tokenizer = RQKMeansTokenizer(RQKMeansConfig(**SMALL | settings))
        tokenizer.fit(embeddings(), progress=False, processes=processes)
        quantized = [make(embeddings(), processes=processes) for make in
                     (tokenizer.quantize, tokenizer.quantize_catalogue)]  # fmt: skip
        results[index] = (tokenizer, *(found.semantic_ids.codes for found in quantized))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = fit(**settings)
    assert len(results) == 3
    for tokenizer, nearest, catalogue in results.values():
        for ours, theirs in zip(alone.codebooks, tokenizer.codebooks, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        np.testing.assert_array_equal(nearest, codes_of(alone))
        np.testing.assert_array_equal(catalogue, alone.quantize_catalogue(embeddings()).semantic_ids.codes)


class Killed(Exception):
    pass


@pytest.mark.parametrize("rounds_until_killed", [5, 13, 27])
@pytest.mark.parametrize(
    "settings", [{}, {"balance": "exact"}, {"algorithm": "mini_batch", "batch_size": 50, "iterations": 20}]
)
def test_a_killed_fit_resumes_to_the_same_codebooks(rounds_until_killed, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(rq_kmeans, "CHECKPOINT_EVERY", 3)
    settings = {"iterations": 12, "tolerance": 0.0} | settings
    whole = fit(**settings)
    original, done = RQKMeansTokenizer._round, []

    def killed(self, *arguments):
        done.append(1)
        if len(done) == rounds_until_killed:
            raise Killed
        return original(self, *arguments)

    def start(**more):
        tokenizer = RQKMeansTokenizer(RQKMeansConfig(**SMALL | settings | more))
        return tokenizer.fit(embeddings(), progress=False, checkpoint_folder=tmp_path)

    monkeypatch.setattr(RQKMeansTokenizer, "_round", killed)
    with pytest.raises(Killed):
        start()
    with safe_open(tmp_path / rq_kmeans.CHECKPOINT_NAME, framework="pt") as file:
        assert "codes" in file.keys()  # noqa: SIM118 (not a mapping)
    resumed = start()
    assert len(done) - rounds_until_killed < sum(whole.fit_report["rounds"])  # it did go on, not begin again
    assert resumed.fit_report == whole.fit_report
    assert resumed.fit_history == whole.fit_history
    for left, right in zip(resumed.codebooks, whole.codebooks, strict=True):
        assert torch.equal(left, right)
    with pytest.raises(DataError, match="other settings or other data"):
        start(seed=1)


def test_levels_are_monitored():
    seen = []
    tokenizer = RQKMeansTokenizer(RQKMeansConfig(**SMALL))
    tokenizer.fit(embeddings(), progress=False, monitor=lambda step, figures: seen.append((step, figures)))
    assert [step for step, _ in seen] == [1, 2, 3]
    assert seen[0][1]["inertia"] > seen[1][1]["inertia"] > seen[2][1]["inertia"]
    assert seen[2][1]["used_c"] == 16
    assert tokenizer.fit_history == tuple(figures for _, figures in seen)


@pytest.mark.parametrize("settings", [{}, {"balance": "exact"}, {"balance": "greedy"}, {"algorithm": "mini_batch"}])
@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_small_and_equal_catalogues(settings, count):
    few = embeddings(count)
    assert fit(few, **settings).encode(few).is_unique
    equal = ItemEmbeddings(few.item_ids, np.repeat(few.vectors[:1], count, axis=0))
    tokenizer = fit(equal, **settings)
    assert all(torch.isfinite(codebook).all() for codebook in tokenizer.codebooks)
    assert tokenizer.encode(equal).report.collisions_before == count - 1


def test_no_more_items_than_codes_are_met_exactly():
    few = embeddings(16)
    assert fit(few).fit_report["inertia"][0] < 1e-4  # of 16 squared norms of about 12
    assert fit(few).fit_report["rounds"] == [2, 2, 2]  # rounding errors are no reason to move centres on and on
    assert fit(few, balance="exact").fit_report["collision_rate"] == 0.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"iterations": 0}, "iterations is 0"), ({"balance": "even"}, "none, greedy, exact"),
     ({"algorithm": "lloyd"}, "full, mini_batch"), ({"size_slack": -0.1}, "size_slack"),
     ({"codebook_size": 1}, "codebook_size is 1: 2"),
     ({"algorithm": "mini_batch", "balance": "exact"}, "choose algorithm 'full'")],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(wrong, message):
    with pytest.raises(SettingsError, match=message):
        RQKMeansConfig(**wrong)


def test_weights_of_other_settings_are_refused():
    tokenizer = RQKMeansTokenizer(RQKMeansConfig(**SMALL))
    with pytest.raises(DataError, match=r"weights don't fit .*\(3, 8, 12\), expected \(3, 16, 12\)"):
        tokenizer._load_state({"codebooks": torch.zeros(3, 8, 12)}, {"text": 12})
    with pytest.raises(DataError, match="weights don't fit"):
        tokenizer._load_state({}, {"text": 12})
