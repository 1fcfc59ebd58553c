import numpy as np
import pytest
import torch

from llmrec.errors import SettingsError
from llmrec.item_tokenizers.rq_kmeans import RQKMeansConfig, RQKMeansTokenizer
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.training.row_initialization import (
    check_code_init,
    codebook_rows,
    initialize_rows,
    item_title_means,
    set_rows,
    title_rows,
    title_token_ids,
)
from llmrec.vocabulary import CodeVocabulary, add_code_rows

VOCABULARY = CodeVocabulary((2, 3), 16)  # rows 0, 1 of level a; 2, 3, 4 of level b
CODES = np.array([[0, 2], [0, 0], [1, 0], [1, 0]])  # nobody carries <b_1>
BASE = torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 8.0], [6.0, 6.0]])
TITLES = ["Items chosen", "by", None, "person one person"]


class GivenVectors:
    """An item tokenizer, as far as rows are concerned."""

    def __init__(self, *codebooks):
        self.codebooks = codebooks

    def code_vectors(self):
        return self.codebooks


def test_title_means_by_hand():
    means, has_title = item_title_means(BASE, [[0, 1], [2], [], [3, 3, 0]])
    assert means.tolist() == [[3.0, 0.0], [0.0, 8.0], [0.0, 0.0], [pytest.approx(14 / 3), 4.0]]
    assert has_title.tolist() == [True, True, False, True]
    assert item_title_means(BASE.bfloat16(), [[0, 1]])[0].dtype == torch.float32


def test_title_rows_by_hand():
    means = torch.tensor([[3.0, 0.0], [0.0, 8.0], [0.0, 0.0], [5.0, 4.0]])
    rows, known = title_rows(means, torch.tensor([True, True, False, True]), CODES, VOCABULARY)
    # <a_0>: items 0, 1. <a_1>: item 3 alone, as item 2 has no title. <b_0>: items 1, 3. <b_2>: item 0.
    assert rows.tolist() == [[1.5, 4.0], [5.0, 4.0], [2.5, 6.0], [0.0, 0.0], [3.0, 0.0]]
    assert known.tolist() == [True, True, True, False, True]


def test_codebook_rows_recover_a_linear_map():
    """Title means that are a linear function of the sum of code vectors: an item's rows have that mean, exactly."""
    generator = np.random.default_rng(0)
    codes = np.stack([generator.integers(0, size, 300) for size in (4, 5)], axis=1)
    vectors = [generator.normal(size=(4, 3)), 0.3 * generator.normal(size=(5, 3))]
    slope, intercept = generator.normal(size=(3, 2)), np.array([1.0, -2.0])
    means = torch.tensor((vectors[0][codes[:, 0]] + vectors[1][codes[:, 1]]) @ slope + intercept, dtype=torch.float32)
    vocabulary = CodeVocabulary((4, 5), 16)
    rows, known = codebook_rows(means, torch.ones(300, dtype=torch.bool), codes, vocabulary, vectors)
    assert known.all()
    expected = np.concatenate([intercept + 2 * level @ slope for level in vectors])  # two levels: twice the part
    np.testing.assert_allclose(rows.numpy(), expected, atol=5e-3)
    places = codes + vocabulary.level_offsets
    torch.testing.assert_close(rows[torch.from_numpy(places)].mean(dim=1), means, atol=5e-3, rtol=0)


def test_titles_that_codes_say_nothing_about_shrink_to_the_mean():
    """The penalty is chosen by what is left out, so noise isn't fitted: rows stay near the mean title."""
    generator = np.random.default_rng(1)
    vectors = [generator.normal(size=(64, 32))]
    codes = generator.integers(0, 64, (80, 1))
    means = torch.from_numpy(generator.normal(size=(80, 16)).astype(np.float32))
    rows, _ = codebook_rows(means, torch.ones(80, dtype=torch.bool), codes, CodeVocabulary((64,), 16), vectors)
    assert (rows - means.mean(dim=0)).abs().mean() < 0.1  # without a penalty: above 0.5


def test_untitled_items_and_counters_are_left_out_of_the_regression():
    vectors = [np.array([[0.0, 1.0], [1.0, 0.0]])]
    codes = np.array([[0, 0], [1, 0], [0, 1], [1, 1], [0, 2]])
    means = torch.tensor([[1.0, 1.0], [3.0, 3.0], [1.0, 1.0], [3.0, 3.0], [99.0, 99.0]])
    has_title = torch.tensor([True, True, True, True, False])
    rows, known = codebook_rows(means, has_title, codes, VOCABULARY, vectors)
    torch.testing.assert_close(rows[:2], torch.tensor([[1.0, 1.0], [3.0, 3.0]]), atol=1e-2, rtol=0)
    assert known.tolist() == [True, True, False, False, False]
    with pytest.raises(SettingsError, match=r"codebooks have \(3,\) vectors"):
        codebook_rows(means, has_title, codes, VOCABULARY, [np.zeros((3, 2))])


def test_title_tokens_have_no_start_token(start_token_tokenizer):
    assert title_token_ids(start_token_tokenizer, ["Items chosen", None, " ", "by"]) == [[4, 5], [], [], [6]]


# In a model


@pytest.fixture
def with_rows(tiny_model):
    def make(*, tied):
        model = tiny_model(tied=tied)
        add_code_rows(model, VOCABULARY, seed=1)
        return model

    return make


def rows_of(model):
    return [module.new_rows.detach().clone() for module in (model.get_input_embeddings(), model.lm_head)]


@pytest.mark.parametrize("tied", [True, False])
def test_titles_fill_embedding_and_head(with_rows, text_tokenizer, tied):
    model = with_rows(tied=tied)
    before = rows_of(model)
    arguments = {"vocabulary": VOCABULARY, "codes": CODES, "text_tokenizer": text_tokenizer, "titles": TITLES}
    initialize_rows(model, "mean", **arguments)
    assert all(torch.equal(*pair) for pair in zip(rows_of(model), before, strict=True))
    initialize_rows(model, "titles", **arguments, init_scale=0.0)
    for module, rows, start in zip((model.get_input_embeddings(), model.lm_head), rows_of(model), before, strict=True):
        words = module.weight.detach()  # Items 4, chosen 5, by 6, one 7, person 8
        items = [words[[4, 5]].mean(0), words[6], words[[8, 7, 8]].mean(0)]
        torch.testing.assert_close(rows[0], (items[0] + items[1]) / 2)
        torch.testing.assert_close(rows[1], items[2])
        torch.testing.assert_close(rows[2], (items[1] + items[2]) / 2)
        assert torch.equal(rows[3], start[3])  # nobody carries the code: it keeps the mean with noise
        torch.testing.assert_close(rows[4], items[0])
    assert (model.lm_head.new_rows is model.get_input_embeddings().new_rows) is tied


def test_noise_tells_codes_of_the_same_items_apart(with_rows, text_tokenizer):
    made = {}
    for name, scale, seed in (("plain", 0.0, 0), ("noise", 1.0, 0), ("again", 1.0, 0), ("other", 1.0, 1)):
        model = with_rows(tied=True)
        initialize_rows(
            model, "titles", vocabulary=VOCABULARY, codes=np.array([[0, 1]]), text_tokenizer=text_tokenizer,
            titles=["chosen by"], init_scale=scale, seed=seed,
        )  # fmt: skip
        made[name] = rows_of(model)[0]
    assert torch.equal(made["plain"][0], made["plain"][3])  # <a_0> and <b_1>, of one item
    assert not torch.equal(made["noise"][0], made["noise"][3])
    assert torch.equal(made["noise"], made["again"])
    assert not torch.equal(made["noise"], made["other"])
    deviation = model.get_input_embeddings().weight.detach().std(dim=0)
    error = (made["noise"] - made["plain"])[[0, 3]] / deviation
    assert 0.05 < error.std() < 0.2  # a tenth


def test_codebook_of_a_fitted_item_tokenizer(with_rows, text_tokenizer):
    from llmrec.embeddings.base import ItemEmbeddings

    generator = np.random.default_rng(0)
    item_ids = tuple(f"item-{row}" for row in range(40))
    embeddings = ItemEmbeddings(item_ids, generator.normal(size=(40, 6)).astype(np.float32), {})
    tokenizer = RQKMeansTokenizer(RQKMeansConfig(num_codebooks=2, codebook_size=4, balance="none")).fit(embeddings)
    quantized = tokenizer.quantize(embeddings)
    assert [vectors.shape for vectors in tokenizer.code_vectors()] == [(4, 6), (4, 6)]
    codes = quantized.semantic_ids.codes
    residual = embeddings.vectors - tokenizer.code_vectors()[0][codes[:, 0]]
    distances = ((residual[:, None] - tokenizer.code_vectors()[1]) ** 2).sum(-1)
    assert np.array_equal(distances.argmin(1), codes[:, 1])  # the vectors are those that the codes were chosen by

    vocabulary = CodeVocabulary((4, 4), 16)
    model = with_rows(tied=False)
    for module in (model.get_input_embeddings(), model.lm_head):
        module.new_rows = torch.nn.Parameter(torch.zeros(8, 32))
    words = ["Items", "chosen", "by", "one"]
    titles = [words[code] for code in codes[:, 0]]  # titles tell the first code
    initialize_rows(
        model, "codebook", vocabulary=vocabulary, codes=codes, text_tokenizer=text_tokenizer, titles=titles,
        item_tokenizer=tokenizer, init_scale=0.0,
    )  # fmt: skip
    for module in (model.get_input_embeddings(), model.lm_head):
        base, rows = module.weight.detach(), module.new_rows.detach()
        items = torch.from_numpy(codes + vocabulary.level_offsets)
        guessed = torch.cdist(rows[items].mean(dim=1), base[[4, 5, 6, 7]]).argmin(dim=1)
        assert (guessed == torch.from_numpy(codes[:, 0])).float().mean() > 0.9


def test_set_rows_refuses_what_does_not_fit(with_rows):
    rows = torch.ones(5, 32)
    with pytest.raises(SettingsError, match="tied to its embedding: give none"):
        set_rows(with_rows(tied=True), rows, rows)
    with pytest.raises(SettingsError, match="a matrix of its own: give rows for it"):
        set_rows(with_rows(tied=False), rows)
    model = with_rows(tied=False)
    with pytest.raises(SettingsError, match=r"shape \[4, 32\] were given, the model's have \[5, 32\]"):
        set_rows(model, rows[:4], rows)
    set_rows(model, rows, 2 * rows)
    assert [float(found.mean()) for found in rows_of(model)] == [1.0, 2.0]


def test_a_start_that_lacks_its_source_is_refused():
    codes = SemanticIds(tuple("abcd"), CODES, (2, 3), "allow")
    check_code_init("mean", codes)
    check_code_init("codebook", codes, titles=TITLES, item_tokenizer=GivenVectors(np.zeros((2, 2))))
    with pytest.raises(SettingsError, match="code_init is 'median'"):
        check_code_init("median", codes)
    with pytest.raises(SettingsError, match="no item has one"):
        check_code_init("titles", codes, titles=[None, "", None, None])
    with pytest.raises(SettingsError, match="3 titles were given for 4 items"):
        check_code_init("titles", codes, titles=TITLES[:3])
    with pytest.raises(SettingsError, match="no item tokenizer is known"):
        check_code_init("codebook", codes, titles=TITLES)
    with pytest.raises(SettingsError, match="GivenVectors has none"):
        check_code_init("codebook", codes, titles=TITLES, item_tokenizer=GivenVectors())
