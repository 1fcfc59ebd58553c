import numpy as np
import pytest
import torch

from llmrec.errors import SettingsError
from llmrec.generation import scoring
from llmrec.generation.beam_search import SCOPES, beam_search
from llmrec.generation.scoring import score_leaves
from llmrec.vocabulary import CodeVocabulary


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("way", ["tree", "one by one"])
def test_given_items_get_their_exhaustive_scores(tiny, scope, way, monkeypatch):
    if way != "tree":
        monkeypatch.setattr(scoring, "why_no_tree", lambda *_: "to test it")
    monkeypatch.setattr(scoring, "MAX_LEAVES", 16)  # several parts
    codes, trie, vocabulary = tiny.random_catalogue(0, num_items=60, sizes=(4, 6, 5))
    model = tiny.tiny_model("llama", vocabulary)
    prompts = tiny.random_prompts(1, (9, 2, 5, 6))
    generator = np.random.default_rng(2)
    rows = [generator.integers(0, 60, 45), np.array([7, 7, 3]), np.array([], dtype=np.int64), np.arange(60)]
    leaf_of_item = trie.leaf_of_item.numpy()
    found = score_leaves(model, prompts, [leaf_of_item[of_one] for of_one in rows], trie, vocabulary, scope=scope)
    for prompt, of_one, scores in zip(prompts, rows, found, strict=True):
        expected = tiny.exhaustive_scores(model, prompt, codes, trie, vocabulary, scope)[of_one]
        assert scores.dtype == np.float32
        assert scores.shape == of_one.shape
        torch.testing.assert_close(torch.from_numpy(scores).double(), expected, atol=1e-4, rtol=0)


def test_scores_are_those_of_the_search(tiny):
    _, trie, vocabulary = tiny.random_catalogue(3, num_items=80, sizes=(5, 6, 7))
    model = tiny.tiny_model("qwen3", vocabulary)
    prompts = tiny.random_prompts(4, (3, 12))
    output = beam_search(model, prompts, trie, vocabulary, num_beams=20)
    found = score_leaves(model, prompts, output.leaves.numpy(), trie, vocabulary)
    np.testing.assert_allclose(np.stack(found), output.scores.numpy(), atol=1e-4)


def test_a_shared_prefix_is_written_once(tiny, monkeypatch):
    codes, trie, vocabulary = tiny.random_catalogue(5, num_items=100, sizes=(3, 7, 6))
    model = tiny.tiny_model("llama", vocabulary)
    lengths = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    score_leaves(model, tiny.random_prompts(6, (4,)), [np.arange(100)], trie, vocabulary)
    distinct = [len(np.unique(codes[:, :depth], axis=0)) for depth in (1, 2)]
    assert lengths == [4, *distinct]


@pytest.mark.parametrize("sizes", [(30,), (6, 8)])
def test_one_and_two_levels(tiny, sizes):
    codes, trie, vocabulary = tiny.random_catalogue(7, num_items=20, sizes=sizes)
    model = tiny.tiny_model("llama", vocabulary)
    for scope in SCOPES:
        found = score_leaves(model, [[3, 4, 5]], [trie.leaf_of_item.numpy()], trie, vocabulary, scope=scope)[0]
        expected = tiny.exhaustive_scores(model, [3, 4, 5], codes, trie, vocabulary, scope)
        torch.testing.assert_close(torch.from_numpy(found).double(), expected, atol=1e-4, rtol=0)


def test_what_makes_no_sense_is_refused(tiny):
    _, trie, vocabulary = tiny.random_catalogue(8)
    model = tiny.tiny_model("llama", vocabulary)
    with pytest.raises(SettingsError, match="2 arrays of leaves for 1 prompts"):
        score_leaves(model, [[3]], [np.arange(2), np.arange(2)], trie, vocabulary)
    with pytest.raises(SettingsError, match="outside the trie, which has 30"):
        score_leaves(model, [[3]], [np.array([30])], trie, vocabulary)
    with pytest.raises(SettingsError, match="at least one token in each"):
        score_leaves(model, [[]], [np.array([3])], trie, vocabulary)
    with pytest.raises(SettingsError, match="different semantic IDs"):
        score_leaves(model, [[3]], [np.array([3])], trie, CodeVocabulary((4, 6, 6), 40))
