import logging

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from llmrec.errors import SettingsError
from llmrec.generation import beam_search as module
from llmrec.generation.beam_search import SCOPES, beam_search, why_no_tree
from llmrec.generation.generate_search import generate_search
from llmrec.generation.trie import ItemTrie
from llmrec.vocabulary import CodeVocabulary, merge_code_rows

# (model type, its settings): tied and untied heads, MHA and grouped queries
MODELS = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"tie_word_embeddings": False}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"tie_word_embeddings": True}),
    ("qwen3", {"tie_word_embeddings": False, "vocab_size": 60}),  # longer matrix than tokenizer
]
OTHER_TREE_MODELS = [
    ("mistral", {"sliding_window": None}),
    ("gemma", {}),
    ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "tie_word_embeddings": False}),
    ("olmo2", {}),
    ("phi3", {}),
    ("smollm3", {}),
]


def _as_items(output, codes, trie):
    """Codes and scores of each request, without the empty places."""
    leaf_codes = codes[trie.items[trie.item_starts[:-1].long()].numpy()]
    answers = []
    for leaves, scores in zip(output.leaves, output.scores, strict=True):
        live = leaves >= 0
        assert torch.equal(live, torch.isfinite(scores))
        answers.append(([tuple(leaf_codes[leaf].tolist()) for leaf in leaves[live]], scores[live]))
    return answers


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("model_type", "settings"), MODELS)
def test_with_enough_beams_the_order_is_the_exhaustive_one(tiny, model_type, settings, scope):
    for seed in range(2):
        codes, trie, vocabulary = tiny.random_catalogue(seed)
        model = tiny.tiny_model(model_type, vocabulary, seed=seed, **settings)
        prompts = tiny.random_prompts(seed, (3, 11, 7))
        output = beam_search(model, *tiny.padded(prompts), trie, vocabulary, num_beams=len(codes), scope=scope)
        for prompt, leaves, scores in zip(prompts, output.leaves, output.scores, strict=True):
            expected = tiny.exhaustive_scores(model, prompt, codes, trie, vocabulary, scope)
            rows = trie.items[leaves]
            assert sorted(rows.tolist()) == list(range(len(codes)))
            assert torch.all(scores[:-1] >= scores[1:])
            torch.testing.assert_close(scores.double(), expected[rows.long()], atol=1e-4, rtol=0)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("model_type", "settings"), [*MODELS, *OTHER_TREE_MODELS])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_tree_gives_the_beams_of_generate(tiny, model_type, settings, scope, attention):
    _, trie, vocabulary = tiny.random_catalogue(3, num_items=80, sizes=(5, 6, 7))
    model = tiny.tiny_model(model_type, vocabulary, attn_implementation=attention, **settings)
    assert why_no_tree(model) is None
    prompts = tiny.random_prompts(4, (9, 2, 5, 17))
    batch = tiny.padded(prompts)
    output = beam_search(model, *batch, trie, vocabulary, num_beams=10, scope=scope)
    leaves, scores = generate_search(model, *batch, trie, vocabulary, num_beams=10, scope=scope)
    assert torch.equal(output.leaves, leaves)
    torch.testing.assert_close(output.scores, scores, atol=1e-4, rtol=0)


def test_a_request_alone_gives_what_it_gives_in_a_batch(tiny):
    _, trie, vocabulary = tiny.random_catalogue(5, num_items=100, sizes=(5, 6, 7))
    model = tiny.tiny_model("llama", vocabulary)
    prompts = tiny.random_prompts(6, (1, 14, 6))
    denied = trie.denied_leaves([np.array([3, 4]), np.array([], dtype=np.int64), np.arange(50)])
    together = beam_search(model, *tiny.padded(prompts), trie, vocabulary, num_beams=7, denied=denied)
    for row, prompt in enumerate(prompts):
        alone = beam_search(model, *tiny.padded([prompt]), trie, vocabulary, num_beams=7, denied=denied[row : row + 1])
        assert torch.equal(alone.leaves[0], together.leaves[row])
        torch.testing.assert_close(alone.scores[0], together.scores[row], atol=1e-4, rtol=0)


def test_merged_code_rows_give_the_same_answers(tiny):
    _, trie, vocabulary = tiny.random_catalogue(7)
    model = tiny.tiny_model("qwen3", vocabulary, tie_word_embeddings=True)
    batch = tiny.padded(tiny.random_prompts(8, (5, 9)))
    before = [beam_search(model, *batch, trie, vocabulary, num_beams=12, scope=scope) for scope in SCOPES]
    merge_code_rows(model)
    for scope, expected in zip(SCOPES, before, strict=True):
        output = beam_search(model, *batch, trie, vocabulary, num_beams=12, scope=scope)
        assert torch.equal(output.leaves, expected.leaves)
        torch.testing.assert_close(output.scores, expected.scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize("search", ["tree", "generate"])
@pytest.mark.parametrize("scope", SCOPES)
def test_denied_items_leave_the_others_as_they_were(tiny, search, scope, monkeypatch):
    if search == "generate":
        monkeypatch.setattr(module, "why_no_tree", lambda model: "to test it")
    codes, trie, vocabulary = tiny.random_catalogue(9)
    model = tiny.tiny_model("llama", vocabulary)
    prompts = tiny.random_prompts(10, (4, 6, 5, 8))
    denied_rows = [
        np.flatnonzero(codes[:, 0] == codes[0, 0]),  # a whole branch
        np.arange(len(codes)),  # everything
        np.array([], dtype=np.int64),
        np.arange(1, len(codes)),  # all but one
    ]
    everything = beam_search(model, *tiny.padded(prompts), trie, vocabulary, num_beams=40, scope=scope)
    output = beam_search(
        model,
        *tiny.padded(prompts),
        trie,
        vocabulary,
        num_beams=40,
        scope=scope,
        denied=trie.denied_leaves(denied_rows),
    )
    assert output.leaves.shape == (4, 40)
    for request, rows in enumerate(denied_rows):
        denied_leaves = set(trie.leaf_of_item[rows].tolist())
        expected = [
            (leaf, score)
            for leaf, score in zip(everything.leaves[request].tolist(), everything.scores[request], strict=True)
            if leaf >= 0 and leaf not in denied_leaves
        ]
        leaves = output.leaves[request]
        assert leaves[leaves >= 0].tolist() == [leaf for leaf, _ in expected]
        assert (leaves >= 0).sum() == len(codes) - len(rows)
        for score, (_, wanted) in zip(output.scores[request], expected, strict=False):
            assert float(score) == pytest.approx(float(wanted), abs=1e-4)


@pytest.mark.parametrize("search", ["tree", "generate"])
def test_more_beams_than_first_codes_lose_no_item(tiny, search, monkeypatch):
    if search == "generate":
        monkeypatch.setattr(module, "why_no_tree", lambda model: "to test it")
    generator = np.random.default_rng(0)
    codes = np.stack([generator.integers(0, 2, 25), np.arange(25) % 13, np.arange(25)], axis=1)
    trie, vocabulary = ItemTrie.from_codes(codes, (2, 13, 25)), CodeVocabulary((2, 13, 25), 40)
    model = tiny.tiny_model("llama", vocabulary)
    batch = tiny.padded(tiny.random_prompts(1, (5, 3)))
    for num_beams in (1, 3, 24, 25, 60):
        output = beam_search(model, *batch, trie, vocabulary, num_beams=num_beams)
        assert output.leaves.shape == (2, num_beams)
        for leaves in output.leaves:
            found = leaves[leaves >= 0].tolist()
            assert len(found) == len(set(found)) == min(num_beams, 25)


def test_generation_defaults_of_a_checkpoint_have_no_effect(tiny):
    codes, trie, vocabulary = tiny.random_catalogue(11)
    model = tiny.tiny_model("llama", vocabulary)
    batch = tiny.padded(tiny.random_prompts(12, (6, 4)))
    leaves, scores = generate_search(model, *batch, trie, vocabulary, num_beams=len(codes))
    instruct = GenerationConfig(
        do_sample=True,
        temperature=0.3,
        top_k=3,
        top_p=0.5,
        repetition_penalty=1.5,
        no_repeat_ngram_size=1,
        suppress_tokens=vocabulary.token_ids(codes[0]).tolist(),
        min_new_tokens=9,
        num_beams=2,
        max_length=5,
        eos_token_id=int(vocabulary.token_ids(codes[0])[0]),
        bos_token_id=1,
    )
    model.generation_config = instruct
    again, scores_again = generate_search(model, *batch, trie, vocabulary, num_beams=len(codes))
    assert torch.equal(leaves, again)
    assert torch.equal(scores, scores_again)
    assert model.generation_config is instruct
    tree = beam_search(model, *batch, trie, vocabulary, num_beams=len(codes))
    assert torch.equal(tree.leaves, leaves)


def test_models_that_ignore_the_mask_fall_back_and_say_why(tiny, caplog):
    _, trie, vocabulary = tiny.random_catalogue(13)
    window = tiny.tiny_model("mistral", vocabulary, sliding_window=8)
    assert "window of 8" in why_no_tree(window)
    mixed = tiny.tiny_model(
        "qwen2",
        vocabulary,
        use_sliding_window=True,
        sliding_window=8,
        layer_types=["full_attention", "sliding_attention"],
    )
    assert "sliding_attention" in why_no_tree(mixed)
    prompts = tiny.random_prompts(14, (20, 12))  # longer than the window
    with caplog.at_level(logging.INFO, logger=module.__name__):
        module._logged.clear()
        for model in (window, mixed):
            output = beam_search(model, *tiny.padded(prompts), trie, vocabulary, num_beams=trie.num_items)
            codes = _codes(trie)
            for prompt, leaves, scores in zip(prompts, output.leaves, output.scores, strict=True):
                expected = tiny.exhaustive_scores(model, prompt, codes, trie, vocabulary, "vocabulary")
                torch.testing.assert_close(scores.double(), expected[trie.items[leaves].long()], atol=1e-4, rtol=0)
    assert "through transformers' generate" in caplog.text
    assert "window of 8" in caplog.text


def _codes(trie):
    """Codes [N, L] of the items, read back from the trie."""
    codes = np.empty((trie.num_items, trie.num_levels), dtype=np.int64)
    for leaf in range(trie.num_leaves):
        rows = trie.items[trie.item_starts[leaf] : trie.item_starts[leaf + 1]].numpy()
        for level in range(trie.num_levels):
            node = int((trie.leaf_starts[level + 1] <= leaf).sum()) - 1
            codes[rows, level] = trie.codes[level][node]
    return codes


@pytest.mark.parametrize("scope", SCOPES)
def test_bfloat16_gives_valid_items(tiny, scope):
    codes, trie, vocabulary = tiny.random_catalogue(15, num_items=100, sizes=(5, 6, 7))
    model = tiny.tiny_model("llama", vocabulary).to(torch.bfloat16)
    output = beam_search(
        model, *tiny.padded(tiny.random_prompts(16, (9, 4))), trie, vocabulary, num_beams=20, scope=scope
    )
    assert output.scores.dtype == torch.float32
    known = {tuple(row) for row in codes.tolist()}
    for found, _ in _as_items(output, codes, trie):
        assert len(set(found)) == 20
        assert set(found) <= known


def test_what_makes_no_sense_is_refused(tiny):
    _, trie, vocabulary = tiny.random_catalogue(17)
    model, batch = tiny.tiny_model("llama", vocabulary), tiny.padded([[3, 4]])
    with pytest.raises(SettingsError, match="unknown scope 'items'; known: vocabulary, codes, trie"):
        beam_search(model, *batch, trie, vocabulary, num_beams=3, scope="items")
    with pytest.raises(SettingsError, match="num_beams is 0"):
        beam_search(model, *batch, trie, vocabulary, num_beams=0)
    with pytest.raises(SettingsError, match="belong to different semantic IDs"):
        beam_search(model, *batch, trie, CodeVocabulary((4, 6, 6), 40), num_beams=3)
