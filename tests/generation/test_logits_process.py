import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList

from llmrec.errors import SettingsError
from llmrec.generation.logits_process import TrieLogitsProcessor
from llmrec.generation.trie import ItemTrie
from llmrec.vocabulary import CodeVocabulary

CODES = np.array([[2, 0, 1], [0, 1, 3], [0, 1, 0], [2, 0, 0], [0, 1, 3], [0, 0, 2]])
SIZES = (3, 2, 4)
FIRST = 10  # levels start at token 10, 13 and 15; the last code is token 18
WIDTH = 24


def _allowed(processor, *rows):
    scores = torch.arange(float(WIDTH)).repeat(len(rows), 1)
    masked = processor(torch.tensor(rows), scores)
    assert masked.shape == scores.shape
    finite = torch.isfinite(masked)
    assert torch.equal(masked[finite], scores[finite])
    assert (masked[~finite] == -torch.inf).all()
    return [row.nonzero().flatten().tolist() for row in finite]


@pytest.fixture
def parts():
    return ItemTrie.from_codes(CODES, SIZES), CodeVocabulary(SIZES, FIRST)


def test_every_step_allows_exactly_the_children(parts):
    processor = TrieLogitsProcessor(*parts, 2, eos_token_id=1, pad_token_id=0)
    assert _allowed(processor, [0, 5]) == [[10, 12]]
    assert _allowed(processor, [0, 5, 10], [5, 5, 12]) == [[13, 14], [13]]
    assert _allowed(processor, [0, 5, 10, 14], [5, 5, 12, 13]) == [[15, 18], [15, 16]]
    assert _allowed(processor, [0, 5, 10, 14, 18]) == [[1]]
    assert _allowed(processor, [0, 5, 10, 14, 18, 1], [0, 5, 10, 14, 18, 1]) == [[0, 1]] * 2


def test_padding_that_is_the_end_token_frees_no_row(parts):
    processor = TrieLogitsProcessor(*parts, 4, eos_token_id=1, pad_token_id=1)
    assert _allowed(processor, [1, 1, 1, 5], [1, 5, 5, 5]) == [[10, 12]] * 2
    assert _allowed(processor, [1, 1, 1, 5, 12]) == [[13]]


def test_steps_in_any_order_give_the_same(parts):
    processor = TrieLogitsProcessor(*parts, 1, eos_token_id=1)
    later = _allowed(processor, [5, 10, 14])
    assert _allowed(processor, [5]) == [[10, 12]]
    assert _allowed(processor, [5, 10, 14]) == later


def test_rows_without_an_item_may_only_end(parts):
    processor = TrieLogitsProcessor(*parts, 1, eos_token_id=[1, 2])
    assert _allowed(processor, [5, 11], [5, 3], [5, 10]) == [[1, 2], [1, 2], [13, 14]]
    assert _allowed(processor, [5, 10, 16]) == [[1, 2]]


def test_each_request_has_its_own_denied_items(parts):
    trie, vocabulary = parts
    denied = trie.denied_leaves([np.array([3, 0, 1]), np.arange(6), np.array([1, 4, 2])])
    processor = TrieLogitsProcessor(trie, vocabulary, 1, eos_token_id=1, denied=denied)
    # two beams a request; the leaf of rows 1 and 4 is denied only where both are
    assert _allowed(processor, *[[5]] * 6) == [[10]] * 2 + [[1]] * 2 + [[10, 12]] * 2
    assert (
        _allowed(
            processor,
            *[
                [5, 10],
                [
                    5,
                    10,
                ],
            ]
            * 3,
        )
        == [[13, 14]] * 2 + [[1]] * 2 + [[13]] * 2
    )
    assert _allowed(processor, *[[5, 10, 14]] * 3) == [[15, 18], [1], [1]]
    with pytest.raises(SettingsError, match="4 rows can't be divided among 3 requests"):
        _allowed(processor, *[[5]] * 4)


def test_what_does_not_fit_is_refused(parts):
    trie, vocabulary = parts
    processor = TrieLogitsProcessor(trie, vocabulary, 2, eos_token_id=1)
    with pytest.raises(SettingsError, match=r"shorter than the prompt \(2\)"):
        _allowed(processor, [5])
    with pytest.raises(SettingsError, match="12 logits, the codes reach up to token 12"):
        processor(torch.tensor([[5, 5]]), torch.zeros(1, 12))
    with pytest.raises(SettingsError, match="different semantic IDs"):
        TrieLogitsProcessor(trie, CodeVocabulary((3, 2, 5), FIRST), 2, eos_token_id=1)
    with pytest.raises(SettingsError, match="needs an end-of-sequence token"):
        TrieLogitsProcessor(trie, vocabulary, 2, eos_token_id=[])


@pytest.mark.parametrize(
    "mode",
    [{"do_sample": False}, {"do_sample": True, "top_k": 5}, {"num_beams": 4}, {"num_beams": 3, "do_sample": True}],
)
def test_every_mode_of_generate_writes_items(tiny, mode):
    codes, trie, vocabulary = tiny.random_catalogue(0)
    model = tiny.tiny_model("llama", vocabulary)
    input_ids, attention_mask = tiny.padded(tiny.random_prompts(1, (3, 9, 6)))
    processor = TrieLogitsProcessor(trie, vocabulary, input_ids.shape[1], eos_token_id=2, pad_token_id=2)
    known = {tuple(row) for row in codes.tolist()}
    for seed in range(3):  # a second call starts clean
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_processor=LogitsProcessorList([processor]),
            max_new_tokens=6,
            num_return_sequences=mode.get("num_beams", 1),
            **mode,
        )[:, input_ids.shape[1] :]
        assert len(output) == 3 * mode.get("num_beams", 1)
        assert {tuple(row) for row in vocabulary.codes(output[:, :3].numpy()).tolist()} <= known
        assert (output[:, 3:] == 2).all()  # ended right after the last code
