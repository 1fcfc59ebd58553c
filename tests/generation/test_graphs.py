import numpy as np
import pytest
import torch

from llmrec.errors import SettingsError
from llmrec.generation.beam_search import SCOPES, beam_search
from llmrec.generation.graphs import GraphedSearch


def _same(found, expected):
    assert torch.equal(found.leaves, expected.leaves)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scope", SCOPES)
def test_recorded_searches_give_the_same_answers(tiny, scope):
    _, trie, vocabulary = tiny.random_catalogue(0, num_items=100, sizes=(5, 6, 7))
    model = tiny.tiny_model("llama", vocabulary)
    search = GraphedSearch(model, trie, vocabulary, num_beams=10, scope=scope, length_step=8)
    allowed = trie.item_set(np.arange(70))
    for number, lengths in enumerate([(3, 7, 2), (8, 8, 8, 8), (5,), (6, 1, 4), (16, 9), (2, 7, 7)]):
        prompts = tiny.random_prompts(number, lengths)
        expected = beam_search(model, prompts, trie, vocabulary, num_beams=10, scope=scope)
        _same(search(prompts), expected)
        denied = [np.arange(request, 60) for request in range(len(lengths))]
        for subset in (trie.subset(deny=denied), trie.subset(allow=allowed, deny=denied), trie.subset(allow=allowed)):
            _same(
                search(prompts, subset),
                beam_search(model, prompts, trie, vocabulary, num_beams=10, scope=scope, subset=subset),
            )
    assert len(search._recorded) == 16  # of 24 searches: shapes come up again


def test_answers_don_t_share_memory_with_the_buffers(tiny):
    _, trie, vocabulary = tiny.random_catalogue(1)
    model = tiny.tiny_model("llama", vocabulary)
    search = GraphedSearch(model, trie, vocabulary, num_beams=40, length_step=8)
    first, second = tiny.random_prompts(2, (4, 7))
    kept = search([first])
    before = kept.scores.clone()
    assert not torch.equal(search([second]).scores, before)
    assert torch.equal(kept.scores, before)
    assert kept.leaves.shape == (1, 40)
    assert (kept.leaves[0, 30:] == -1).all()


def test_what_can_t_be_recorded_is_refused(tiny):
    _, trie, vocabulary = tiny.random_catalogue(3)
    model = tiny.tiny_model("llama", vocabulary)
    with pytest.raises(SettingsError, match="num_beams is 0"):
        GraphedSearch(model, trie, vocabulary, num_beams=0)
    model.config.layer_types = ["full_attention", "conv"]
    with pytest.raises(SettingsError, match="can't be recorded with this model: the model has layers of type conv"):
        GraphedSearch(model, trie, vocabulary, num_beams=3)
