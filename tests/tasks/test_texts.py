import numpy as np
import pytest

from llmrec.errors import DataError
from llmrec.tasks.texts import read_texts, tokenize_texts, without_trailing_punctuation
from llmrec.vocabulary import CodeVocabulary


def test_cells_become_texts():
    column = ["Red  pen\n", None, float("nan"), "", "  ", 12, ["a", None, " b "], [], np.array(["c", ["d"]], object)]
    assert read_texts(column, "title") == [["Red pen"], [], [], [], [], ["12"], ["a", "b"], [], ["c", "d"]]
    assert read_texts([["a", "b"], []], "title", one_a_row=True) == [["a b"], []]
    with pytest.raises(DataError, match="column 'title' holds a dict in row 1"):
        read_texts(["a", {"b": 1}], "title")


def test_titles_lose_punctuation_at_their_ends():
    texts = [["Red pen."], ["A, b; - "], ["3 x 3 (12)"], ["Why?!"], ["..."], [], ["C++ \u2013"]]
    stripped = [["Red pen"], ["A, b"], ["3 x 3 (12)"], ["Why"], [], [], ["C++"]]
    assert without_trailing_punctuation(texts) == stripped


def test_texts_are_kept_by_row(byte_tokenizer, caplog):
    vocabulary = CodeVocabulary.add_to(byte_tokenizer, (2, 3))
    texts = [["red", "blue ink"], [], ["tea"], ["</s>"]]
    with caplog.at_level("INFO", "llmrec"):
        tokens = tokenize_texts(texts, byte_tokenizer, vocabulary, max_tokens=4, what="queries")
    assert len(tokens) == 4
    assert tokens.counts.tolist() == [2, 0, 1, 0]  # a text of special tokens alone is none
    assert tokens.lengths.tolist() == [3, 4, 3]
    assert [byte_tokenizer.decode(tokens.text(number)) for number in range(3)] == ["red", "blue", "tea"]
    assert "queries: 1 of 4 texts are cut at 4 tokens" in caplog.text
    assert not len(tokenize_texts([], byte_tokenizer, vocabulary, max_tokens=4, what="queries"))


def test_no_text_is_a_code_or_a_special_token(byte_tokenizer):
    vocabulary = CodeVocabulary.add_to(byte_tokenizer, (2, 3))
    text = "a<a_1> b</s><b_2><s>c <a_9><pad>"
    assert set(byte_tokenizer(text).input_ids) >= {vocabulary.first_token_id + 1, byte_tokenizer.eos_token_id}
    tokens = tokenize_texts([[text]], byte_tokenizer, vocabulary, max_tokens=64, what="titles")
    assert byte_tokenizer.decode(tokens.text(0)) == "a bc <a_9>"  # what is no code stays text
    assert max(tokens.text(0)) < 256


def test_unknown_words_stay(text_tokenizer):
    vocabulary = CodeVocabulary.add_to(text_tokenizer, (2, 3))
    tokens = tokenize_texts([["Items zebra first"]], text_tokenizer, vocabulary, max_tokens=64, what="titles")
    assert tokens.text(0) == [4, text_tokenizer.unk_token_id, 11]
