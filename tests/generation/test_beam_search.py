import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from llmrec.errors import SettingsError
from llmrec.generation import beam_search as module
from llmrec.generation import head, tree_models
from llmrec.generation.beam_search import SCOPES, beam_search
from llmrec.generation.generate_search import generate_search
from llmrec.generation.scoring import score_leaves
from llmrec.generation.selection import Diversity, Sampling
from llmrec.generation.tree_models import why_no_tree
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
        output = beam_search(model, prompts, trie, vocabulary, num_beams=len(codes), scope=scope)
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
    assert why_no_tree(model, vocabulary) is None
    prompts = tiny.random_prompts(4, (9, 2, 5, 17))
    batch = prompts
    output = beam_search(model, batch, trie, vocabulary, num_beams=10, scope=scope)
    leaves, scores = generate_search(model, batch, trie, vocabulary, num_beams=10, scope=scope)
    assert torch.equal(output.leaves, leaves)
    torch.testing.assert_close(output.scores, scores, atol=1e-4, rtol=0)


def test_a_request_alone_gives_what_it_gives_in_a_batch(tiny):
    _, trie, vocabulary = tiny.random_catalogue(5, num_items=100, sizes=(5, 6, 7))
    model = tiny.tiny_model("llama", vocabulary)
    prompts = tiny.random_prompts(6, (1, 14, 6))
    denied = [np.array([3, 4]), np.array([], dtype=np.int64), np.arange(50)]
    together = beam_search(model, prompts, trie, vocabulary, num_beams=7, subset=trie.subset(deny=denied))
    for row, prompt in enumerate(prompts):
        alone = beam_search(
            model, [prompt], trie, vocabulary, num_beams=7, subset=trie.subset(deny=denied[row : row + 1])
        )
        assert torch.equal(alone.leaves[0], together.leaves[row])
        torch.testing.assert_close(alone.scores[0], together.scores[row], atol=1e-4, rtol=0)


def test_merged_code_rows_give_the_same_answers(tiny):
    _, trie, vocabulary = tiny.random_catalogue(7)
    model = tiny.tiny_model("qwen3", vocabulary, tie_word_embeddings=True)
    batch = tiny.random_prompts(8, (5, 9))
    before = [beam_search(model, batch, trie, vocabulary, num_beams=12, scope=scope) for scope in SCOPES]
    merge_code_rows(model)
    for scope, expected in zip(SCOPES, before, strict=True):
        output = beam_search(model, batch, trie, vocabulary, num_beams=12, scope=scope)
        assert torch.equal(output.leaves, expected.leaves)
        torch.testing.assert_close(output.scores, expected.scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize("search", ["tree", "generate"])
@pytest.mark.parametrize("scope", SCOPES)
def test_denied_items_leave_the_others_as_they_were(tiny, search, scope, monkeypatch):
    if search == "generate":
        monkeypatch.setattr(module, "why_no_tree", lambda *_: "to test it")
    codes, trie, vocabulary = tiny.random_catalogue(9)
    model = tiny.tiny_model("llama", vocabulary)
    prompts = tiny.random_prompts(10, (4, 6, 5, 8))
    denied_rows = [
        np.flatnonzero(codes[:, 0] == codes[0, 0]),  # a whole branch
        np.arange(len(codes)),  # everything
        np.array([], dtype=np.int64),
        np.arange(1, len(codes)),  # all but one
    ]
    everything = beam_search(model, prompts, trie, vocabulary, num_beams=40, scope=scope)
    output = beam_search(
        model,
        prompts,
        trie,
        vocabulary,
        num_beams=40,
        scope=scope,
        subset=trie.subset(deny=denied_rows),
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
        monkeypatch.setattr(module, "why_no_tree", lambda *_: "to test it")
    generator = np.random.default_rng(0)
    codes = np.stack([generator.integers(0, 2, 25), np.arange(25) % 13, np.arange(25)], axis=1)
    trie, vocabulary = ItemTrie.from_codes(codes, (2, 13, 25)), CodeVocabulary((2, 13, 25), 40)
    model = tiny.tiny_model("llama", vocabulary)
    batch = tiny.random_prompts(1, (5, 3))
    for num_beams in (1, 3, 24, 25, 60):
        output = beam_search(model, batch, trie, vocabulary, num_beams=num_beams)
        assert output.leaves.shape == (2, num_beams)
        for leaves in output.leaves:
            found = leaves[leaves >= 0].tolist()
            assert len(found) == len(set(found)) == min(num_beams, 25)


def test_generation_defaults_of_a_checkpoint_have_no_effect(tiny):
    codes, trie, vocabulary = tiny.random_catalogue(11)
    model = tiny.tiny_model("llama", vocabulary)
    batch = tiny.random_prompts(12, (6, 4))
    leaves, scores = generate_search(model, batch, trie, vocabulary, num_beams=len(codes))
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
    again, scores_again = generate_search(model, batch, trie, vocabulary, num_beams=len(codes))
    assert torch.equal(leaves, again)
    assert torch.equal(scores, scores_again)
    assert model.generation_config is instruct
    tree = beam_search(model, batch, trie, vocabulary, num_beams=len(codes))
    assert torch.equal(tree.leaves, leaves)


# Layers that look back over a window: prompts here are longer than it.
MIXED = ["full_attention", "sliding_attention"]
WINDOWED = [
    ("mistral", {"sliding_window": 5}),
    ("ministral", {"sliding_window": 5, "layer_types": ["sliding_attention"] * 2, "head_dim": 8}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "layer_types": MIXED}),
    ("gemma2", {"sliding_window": 5, "layer_types": MIXED, "head_dim": 8, "attn_implementation": "eager"}),
    ("gemma3_text", {"sliding_window": 5, "layer_types": MIXED, "head_dim": 8}),
]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("model_type", "settings"), WINDOWED)
def test_layers_with_a_window(tiny, model_type, settings, scope):
    codes, trie, vocabulary = tiny.random_catalogue(13)
    model = tiny.tiny_model(model_type, vocabulary, **settings)
    assert why_no_tree(model, vocabulary) is None
    for lengths in ((20, 12, 3, 9), (14,), (7, 7)):
        prompts = tiny.random_prompts(14, lengths)
        output = beam_search(model, prompts, trie, vocabulary, num_beams=trie.num_items, scope=scope)
        for prompt, leaves, scores in zip(prompts, output.leaves, output.scores, strict=True):
            expected = tiny.exhaustive_scores(model, prompt, codes, trie, vocabulary, scope)
            torch.testing.assert_close(scores.double(), expected[trie.items[leaves].long()], atol=1e-4, rtol=0)


def test_models_that_ignore_the_mask_fall_back_and_say_why(tiny, caplog):
    codes, trie, vocabulary = tiny.random_catalogue(13)
    sizes = dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "head_dim"), 8)
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "num_experts": 0}
    layer_types = ["full_attention", "linear_attention"]
    recurrent = tiny.tiny_model("qwen3_next", vocabulary, layer_types=layer_types, **heads, **sizes)
    convolution = tiny.tiny_model("lfm2", vocabulary, layer_types=["full_attention", "conv"], conv_L_cache=3)
    assert "layers of type linear_attention" in why_no_tree(recurrent, vocabulary)
    assert "layers of type conv" in why_no_tree(convolution, vocabulary)
    flash = tiny.tiny_model("llama", vocabulary)
    flash.config._attn_implementation = "flash_attention_2"
    assert "'flash_attention_2' takes no 4-D mask" in why_no_tree(flash, vocabulary)
    prompts = tiny.random_prompts(14, (20, 12))
    with caplog.at_level(logging.INFO, logger=module.__name__):
        module._logged.clear()
        output = beam_search(convolution, prompts, trie, vocabulary, num_beams=trie.num_items)
        beam_search(convolution, prompts, trie, vocabulary, num_beams=2)
    assert len([record for record in caplog.records if "through transformers' generate" in record.message]) == 1
    assert "layers of type conv" in caplog.text
    found = set(trie.items[output.leaves[0]].tolist())
    assert found == set(range(len(codes)))
    with pytest.raises(SettingsError, match="takes a tree of beams, but the model has layers of type conv"):
        beam_search(convolution, prompts, trie, vocabulary, num_beams=2, sampling=Sampling())


@pytest.mark.parametrize("model_type", ["granite", "cohere", "starcoder2", "stablelm"])
def test_architectures_that_were_never_tried_check_themselves(tiny, model_type, caplog, monkeypatch):
    codes, trie, vocabulary = tiny.random_catalogue(15)
    settings = {"granite": {"logits_scaling": 3.0}, "cohere": {"logit_scale": 0.3}}.get(model_type, {})
    model = tiny.tiny_model(model_type, vocabulary, **settings)
    with caplog.at_level(logging.INFO, logger="llmrec.generation.tree_models"):
        assert why_no_tree(model, vocabulary) is None
    assert f"models of type '{model_type}' were not tried before" in caplog.text
    prompts = tiny.random_prompts(16, (6, 3))
    for scope in SCOPES:
        output = beam_search(model, prompts, trie, vocabulary, num_beams=30, scope=scope)
        for prompt, leaves, scores in zip(prompts, output.leaves, output.scores, strict=True):
            expected = tiny.exhaustive_scores(model, prompt, codes, trie, vocabulary, scope)
            torch.testing.assert_close(scores.double(), expected[trie.items[leaves].long()], atol=1e-4, rtol=0)


def test_an_architecture_that_reads_the_mask_otherwise_is_found_out(tiny, monkeypatch):
    _, _, vocabulary = tiny.random_catalogue(17)
    monkeypatch.setattr(tree_models, "TRIED", frozenset())
    careless = tiny.tiny_model("llama", vocabulary)
    whole = careless.forward
    monkeypatch.setattr(careless, "forward", lambda attention_mask=None, **rest: whole(**rest))
    assert "scores a tree of beams otherwise" in why_no_tree(careless, vocabulary)
    strict = tiny.tiny_model("llama", vocabulary)
    monkeypatch.setattr(strict, "forward", lambda input_ids, **rest: whole(input_ids, past_key_values=1))
    assert "fails on a tree of beams" in why_no_tree(strict, vocabulary)
    assert why_no_tree(tiny.tiny_model("llama", vocabulary), vocabulary) is None


def test_prompts_are_read_without_padding_and_the_start_in_common_once(tiny):
    codes, trie, vocabulary = tiny.random_catalogue(19)
    model = tiny.tiny_model("llama", vocabulary, hidden_size=256)
    instruction = tiny.random_prompts(20, (9,))[0]
    prompts = [instruction + prompt for prompt in tiny.random_prompts(21, (3, 12, 5, 7, 1))]
    shapes = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    output = beam_search(model, prompts, trie, vocabulary, num_beams=30)
    assert shapes[0] == (1, 9 + 3 + 12 + 5 + 7 + 1)
    assert shapes[1:] == [(5, 4), (5, trie.num_nodes(2))]
    for prompt, leaves, scores in zip(prompts, output.leaves, output.scores, strict=True):
        expected = tiny.exhaustive_scores(model, prompt, codes, trie, vocabulary, "vocabulary")
        torch.testing.assert_close(scores.double(), expected[trie.items[leaves].long()], atol=1e-4, rtol=0)


@pytest.mark.parametrize("scope", SCOPES)
def test_only_the_vocabulary_scope_computes_other_columns_than_the_codes(tiny, scope, monkeypatch):
    _, trie, vocabulary = tiny.random_catalogue(22)
    model = tiny.tiny_model("llama", vocabulary)
    linear, columns = head.F.linear, []
    counting = SimpleNamespace(
        linear=lambda x, weight, *bias: (columns.append(len(weight)), linear(x, weight, *bias))[1]
    )
    monkeypatch.setattr(head, "F", counting)
    monkeypatch.setattr(head, "_FEWEST_TOKENS", 16)
    monkeypatch.setattr(head, "_ELEMENTS", {"cpu": 1})
    beam_search(model, [[3, 4, 5]], trie, vocabulary, num_beams=6, scope=scope)
    # after the prompt the two other levels, of 6 and 5 codes; the vocabulary is made up of 40 text tokens and 15 codes
    assert columns == ([15, 16, 16, 8] * 2 if scope == "vocabulary" else [6, 5])


@pytest.mark.parametrize("scope", SCOPES)
def test_bfloat16_gives_valid_items(tiny, scope):
    codes, trie, vocabulary = tiny.random_catalogue(15, num_items=100, sizes=(5, 6, 7))
    model = tiny.tiny_model("llama", vocabulary).to(torch.bfloat16)
    output = beam_search(model, tiny.random_prompts(16, (9, 4)), trie, vocabulary, num_beams=20, scope=scope)
    assert output.scores.dtype == torch.float32
    known = {tuple(row) for row in codes.tolist()}
    for found, _ in _as_items(output, codes, trie):
        assert len(set(found)) == 20
        assert set(found) <= known


def test_what_makes_no_sense_is_refused(tiny):
    _, trie, vocabulary = tiny.random_catalogue(17)
    model, batch = tiny.tiny_model("llama", vocabulary), [[3, 4]]
    with pytest.raises(SettingsError, match="unknown scope 'items'; known: vocabulary, codes, trie"):
        beam_search(model, batch, trie, vocabulary, num_beams=3, scope="items")
    with pytest.raises(SettingsError, match="num_beams is 0"):
        beam_search(model, batch, trie, vocabulary, num_beams=0)
    with pytest.raises(SettingsError, match="belong to different semantic IDs"):
        beam_search(model, batch, trie, CodeVocabulary((4, 6, 6), 40), num_beams=3)


def test_drawn_items_have_the_distribution_of_the_constrained_model(tiny):
    codes, trie, vocabulary = tiny.random_catalogue(23, num_items=8, sizes=(3, 2, 3))
    model = tiny.tiny_model("llama", vocabulary, initializer_range=0.1)
    prompt, temperature, draws = [5, 6, 7], 1.7, 4000
    steps = _constrained_steps(tiny, model, prompt, codes, trie, vocabulary, temperature)
    first = torch.zeros(8)
    second = torch.zeros(8)
    for start in range(0, draws, 500):
        sampling = Sampling(temperature, seed=range(start, start + 500))
        output = beam_search(model, [prompt] * 500, trie, vocabulary, num_beams=3, sampling=sampling)
        rows = trie.items[output.leaves].long()
        assert all(len(set(drawn)) == 3 for drawn in rows.tolist())
        first += torch.bincount(rows[:, 0], minlength=8)
        second += torch.bincount(rows[:, 1], minlength=8)
    expected_second = sum(steps[other] * steps / (1 - steps[other]) * (torch.arange(8) != other) for other in range(8))
    for counts, expected in ((first, steps), (second, expected_second)):  # without replacement
        deviation = (counts / draws - expected).abs() / (expected * (1 - expected) / draws).sqrt()
        assert float(deviation.max()) < 4.5, deviation


def _constrained_steps(tiny, model, prompt, codes, trie, vocabulary, temperature):
    """Probability [N] of each item when codes are drawn one by one, with the trie's mask and a temperature."""
    tokens = torch.from_numpy(vocabulary.token_ids(codes))
    with torch.no_grad():
        logits = model(input_ids=torch.cat([torch.tensor(prompt).expand(len(codes), -1), tokens], 1)).logits
    logits = logits[:, len(prompt) - 1 : -1].double() / temperature
    chances = torch.ones(len(codes), dtype=torch.float64)
    for item in range(len(codes)):
        for level in range(trie.num_levels):
            siblings = (codes[:, :level] == codes[item, :level]).all(axis=1)
            allowed = sorted(set(tokens[siblings, level].tolist()))
            chances[item] *= logits[item, level, allowed].softmax(0)[allowed.index(int(tokens[item, level]))]
    return chances.float()


def test_a_draw_depends_on_its_seed_alone(tiny):
    _, trie, vocabulary = tiny.random_catalogue(24, num_items=100, sizes=(5, 6, 7))
    model = tiny.tiny_model("llama", vocabulary)
    prompts = tiny.random_prompts(25, (3, 8, 5))
    subset = trie.subset(deny=[np.arange(60)] * 3)
    together = beam_search(
        model, prompts, trie, vocabulary, num_beams=9, sampling=Sampling(0.8, [4, 5, 6]), subset=subset
    )
    for request, prompt in enumerate(prompts):
        alone = beam_search(
            model,
            [prompt],
            trie,
            vocabulary,
            num_beams=9,
            sampling=Sampling(0.8, 4 + request),
            subset=trie.subset(deny=[np.arange(60)]),
        )
        assert torch.equal(alone.leaves[0], together.leaves[request])
        scores = score_leaves(model, [prompt], [alone.leaves[0].numpy()], trie, vocabulary)[0]
        np.testing.assert_allclose(scores, alone.scores[0].numpy(), atol=1e-4)  # true log-probabilities
        assert set(trie.items[alone.leaves[0]].tolist()) <= set(range(60, 100))
    other = beam_search(model, prompts, trie, vocabulary, num_beams=9, sampling=Sampling(0.8, 7), subset=subset)
    assert not torch.equal(other.leaves, together.leaves)
    everything = beam_search(model, prompts, trie, vocabulary, num_beams=100, sampling=Sampling(3.0, 1), subset=subset)
    assert (everything.leaves[:, :40] >= 0).all()
    assert (everything.leaves[:, 40:] == -1).all()
    assert all(len(set(leaves.tolist())) == 40 for leaves in everything.leaves[:, :40])
    with pytest.raises(SettingsError, match="2 seeds for 3 requests"):
        beam_search(model, prompts, trie, vocabulary, num_beams=9, sampling=Sampling(1.0, [1, 2]))
    with pytest.raises(SettingsError, match="temperature is 0"):
        Sampling(0.0)


def test_groups_keep_away_from_each_others_codes(tiny):
    codes, trie, vocabulary = tiny.random_catalogue(26, num_items=150, sizes=(6, 6, 7))
    model = tiny.tiny_model("llama", vocabulary)
    prompts = tiny.random_prompts(27, (3, 8, 5, 4))
    best = beam_search(model, prompts, trie, vocabulary, num_beams=12)
    leaf_codes = codes[trie.items[trie.item_starts[:-1].long()].numpy()]

    def first_codes(output):
        return [len(set(leaf_codes[leaves.numpy(), 0].tolist())) for leaves in output.leaves]

    one = beam_search(model, prompts, trie, vocabulary, num_beams=12, diversity=Diversity(1, 9.0))
    assert torch.equal(one.leaves, best.leaves)
    diverse = beam_search(model, prompts, trie, vocabulary, num_beams=12, diversity=Diversity(4, 50.0))
    assert sum(first_codes(diverse)) > sum(first_codes(best))
    for request, prompt in enumerate(prompts):
        leaves = diverse.leaves[request]
        assert len(set(leaves.tolist())) == 12
        scores = score_leaves(model, [prompt], [leaves.numpy()], trie, vocabulary)[0]
        np.testing.assert_allclose(scores, diverse.scores[request].numpy(), atol=1e-4)
        # the first group is a plain search of its own width, and the answer takes turns between the groups
        alone = beam_search(model, [prompt], trie, vocabulary, num_beams=3)
        assert leaves[::4].tolist() == alone.leaves[0].tolist()
    with pytest.raises(SettingsError, match="3 beams can't be divided into 4 groups"):
        beam_search(model, prompts, trie, vocabulary, num_beams=3, diversity=Diversity(4, 1.0))
    with pytest.raises(SettingsError, match="can't be combined"):
        beam_search(model, prompts, trie, vocabulary, num_beams=8, diversity=Diversity(4, 1.0), sampling=Sampling())
