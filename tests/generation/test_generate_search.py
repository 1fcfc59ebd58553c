from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from llmrec.adapter import add_lora
from llmrec.errors import SettingsError
from llmrec.generation.generate_search import generate_search
from llmrec.generation.trie import ItemTrie
from llmrec.vocabulary import CodeVocabulary

SCOPES = ("vocabulary", "codes", "trie")
KINDS = ("llama", "t5", "bart")


def _model(tiny, kind, vocabulary, seed=0):
    if kind == "llama":
        return tiny.tiny_model("llama", vocabulary, seed=seed)
    width = vocabulary.first_token_id + vocabulary.num_tokens
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "t5":  # the token that pads also starts the decoder
            common = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
            model = T5ForConditionalGeneration(
                T5Config(**common, vocab_size=width, decoder_start_token_id=0, initializer_factor=2.0)
            )
        else:  # by default it forces the last token of every sequence to be the end
            layers = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
            sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "init_std": 0.3}
            model = BartForConditionalGeneration(
                BartConfig(**layers, **sizes, vocab_size=width, max_position_embeddings=128)
            )
            assert model.generation_config.forced_eos_token_id is not None
    return model.eval()


def _exhaustive_scores(tiny, model, prompt, codes, trie, vocabulary, scope):
    """Score [N] of every item by plain forwards, of models with and without an encoder."""
    if not model.config.is_encoder_decoder:
        return tiny.exhaustive_scores(model, prompt, codes, trie, vocabulary, scope)

    def as_decoder(input_ids):  # logits where a decoder-only model would have them
        start = torch.full_like(input_ids[:, :1], model.config.decoder_start_token_id)
        answers = torch.cat([start, input_ids[:, len(prompt) :]], dim=1)
        logits = model(input_ids=input_ids[:, : len(prompt)], decoder_input_ids=answers).logits
        return SimpleNamespace(logits=torch.nn.functional.pad(logits, (0, 0, len(prompt) - 1, 0)))

    return tiny.exhaustive_scores(as_decoder, prompt, codes, trie, vocabulary, scope)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", KINDS)
def test_with_enough_beams_the_order_is_the_exhaustive_one(tiny, kind, scope):
    for seed in range(2):
        codes, trie, vocabulary = tiny.random_catalogue(seed)
        model = _model(tiny, kind, vocabulary, seed)
        prompts = tiny.random_prompts(seed, (3, 11, 7))
        leaves, scores = generate_search(model, prompts, trie, vocabulary, num_beams=len(codes), scope=scope)
        assert leaves.dtype == torch.int64
        assert scores.dtype == torch.float32
        for prompt, found, of_found in zip(prompts, leaves, scores, strict=True):
            expected = _exhaustive_scores(tiny, model, prompt, codes, trie, vocabulary, scope)
            assert expected.std() > 0.5  # the order is clear
            rows = trie.items[found].long()
            assert sorted(rows.tolist()) == list(range(len(codes)))
            assert torch.all(of_found[:-1] >= of_found[1:])
            torch.testing.assert_close(of_found.double(), expected[rows], atol=1e-4, rtol=0)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", KINDS)
def test_one_beam_takes_the_best_code_of_each_level(tiny, kind, scope):
    codes, trie, vocabulary = tiny.random_catalogue(20, num_items=60, sizes=(5, 6, 7))
    model = _model(tiny, kind, vocabulary)
    prompts = tiny.random_prompts(21, (2, 6, 9, 4))
    denied = np.arange(0, 60, 3)
    for subset, left in ((None, np.arange(60)), (trie.subset(deny=[denied] * 4), np.setdiff1d(np.arange(60), denied))):
        leaves, scores = generate_search(model, prompts, trie, vocabulary, num_beams=1, scope=scope, subset=subset)
        assert leaves.shape == scores.shape == (4, 1)
        for prompt, leaf, score in zip(prompts, leaves[:, 0], scores[:, 0], strict=True):
            chosen = left
            for level in range(3):  # prefixes are scored as the items of a trie that ends there
                prefixes, sizes = np.unique(codes[:, : level + 1], axis=0), trie.codebook_sizes[: level + 1]
                of_prefixes = _exhaustive_scores(
                    tiny,
                    model,
                    prompt,
                    prefixes,
                    ItemTrie.from_codes(prefixes, sizes),
                    CodeVocabulary(sizes, vocabulary.first_token_id),
                    scope,
                )
                of_items = [
                    float(of_prefixes[(prefixes == codes[row, : level + 1]).all(axis=1).argmax()]) for row in chosen
                ]
                best = codes[chosen[int(np.argmax(of_items))], level]
                chosen = chosen[codes[chosen, level] == best]
            assert trie.items[leaf] == chosen[0]
            assert float(score) == pytest.approx(max(of_items), abs=1e-4)


@pytest.mark.parametrize("num_beams", [1, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_a_request_alone_gives_what_it_gives_in_a_batch(tiny, kind, num_beams):
    _, trie, vocabulary = tiny.random_catalogue(5, num_items=100, sizes=(5, 6, 7))
    model = _model(tiny, kind, vocabulary)
    prompts = tiny.random_prompts(6, (1, 14, 6))
    denied = [np.array([3, 4]), np.array([], dtype=np.int64), np.arange(50)]
    settings = {"num_beams": num_beams}
    leaves, scores = generate_search(model, prompts, trie, vocabulary, subset=trie.subset(deny=denied), **settings)
    for row, prompt in enumerate(prompts):
        subset = trie.subset(deny=denied[row : row + 1])
        alone, scores_alone = generate_search(model, [prompt], trie, vocabulary, subset=subset, **settings)
        assert torch.equal(alone[0], leaves[row])
        torch.testing.assert_close(scores_alone[0], scores[row], atol=1e-4, rtol=0)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_subset_leaves_out_changes_no_other_score(tiny, kind, scope):
    codes, trie, vocabulary = tiny.random_catalogue(9)
    model = _model(tiny, kind, vocabulary)
    prompts = tiny.random_prompts(10, (4, 6, 5, 8))
    denied_rows = [
        np.flatnonzero(codes[:, 0] == codes[0, 0]),  # a whole branch
        np.arange(len(codes)),  # everything
        np.array([], dtype=np.int64),
        np.arange(1, len(codes)),  # all but one
    ]
    allowed_rows = np.arange(0, len(codes), 2)
    subset = trie.subset(allow=trie.item_set(allowed_rows), deny=denied_rows)
    everything, all_scores = generate_search(model, prompts, trie, vocabulary, num_beams=40, scope=scope)
    leaves, scores = generate_search(model, prompts, trie, vocabulary, num_beams=40, scope=scope, subset=subset)
    assert leaves.shape == scores.shape == (4, 40)
    for request, denied in enumerate(denied_rows):
        left = set(trie.leaf_of_item[np.setdiff1d(allowed_rows, denied)].tolist())
        expected = [
            (leaf, score)
            for leaf, score in zip(everything[request].tolist(), all_scores[request].tolist(), strict=True)
            if leaf in left
        ]
        assert len(expected) == len(left)
        assert leaves[request].tolist() == [leaf for leaf, _ in expected] + [-1] * (40 - len(left))
        assert scores[request, : len(left)].tolist() == pytest.approx([score for _, score in expected], abs=1e-4)
        assert torch.isneginf(scores[request, len(left) :]).all()


def test_one_beam_of_a_request_that_nothing_is_left_for_is_empty(tiny):
    _, trie, vocabulary = tiny.random_catalogue(9)
    model = _model(tiny, "llama", vocabulary)
    subset = trie.subset(deny=[np.arange(30), np.arange(29)])
    leaves, scores = generate_search(model, [[5, 6], [7]], trie, vocabulary, num_beams=1, subset=subset)
    assert leaves.tolist() == [[-1], [int(trie.leaf_of_item[29])]]
    assert torch.isneginf(scores[0, 0])
    assert torch.isfinite(scores[1, 0])


def test_more_beams_than_first_codes_lose_no_item(tiny):
    generator = np.random.default_rng(0)
    codes = np.stack([generator.integers(0, 2, 25), np.arange(25) % 13, np.arange(25)], axis=1)
    trie, vocabulary = ItemTrie.from_codes(codes, (2, 13, 25)), CodeVocabulary((2, 13, 25), 40)
    model = _model(tiny, "t5", vocabulary)
    for num_beams in (1, 2, 3, 24, 25, 60):
        leaves, scores = generate_search(model, [[5, 3], [9, 8, 7]], trie, vocabulary, num_beams=num_beams)
        assert leaves.shape == (2, num_beams)
        assert torch.equal(leaves >= 0, torch.isfinite(scores))
        for of_request in leaves:
            found = of_request[of_request >= 0].tolist()
            assert len(found) == len(set(found)) == min(num_beams, 25)


@pytest.mark.parametrize("num_beams", [1, 10])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_encoder_reads_each_prompt_once(tiny, kind, num_beams):
    _, trie, vocabulary = tiny.random_catalogue(22)
    model = _model(tiny, kind, vocabulary)
    seen, decoded = [], []
    model.get_encoder().register_forward_pre_hook(
        lambda _, __, inputs: seen.append((tuple(inputs["input_ids"].shape), inputs["attention_mask"].tolist())),
        with_kwargs=True,
    )
    model.get_decoder().register_forward_pre_hook(
        lambda _, __, inputs: decoded.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    generate_search(model, tiny.random_prompts(23, (2, 4, 1)), trie, vocabulary, num_beams=num_beams)
    # one call, one row a request, padded on the right; the decoder: one token a beam and level
    assert seen == [((3, 4), [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])]
    assert decoded == [(3 * num_beams, 1)] * 3


def test_a_decoder_without_a_start_token_starts_with_that_of_sentences(tiny):
    codes, trie, vocabulary = tiny.random_catalogue(24)
    model = _model(tiny, "bart", vocabulary)
    model.generation_config.bos_token_id, model.generation_config.decoder_start_token_id = 7, None
    leaves, scores = generate_search(model, [[5, 6]], trie, vocabulary, num_beams=30)
    model.config.decoder_start_token_id = 7  # what the plain forwards start with
    expected = _exhaustive_scores(tiny, model, [5, 6], codes, trie, vocabulary, "vocabulary")
    torch.testing.assert_close(scores[0].double(), expected[trie.items[leaves[0]].long()], atol=1e-4, rtol=0)


def test_decoder_only_prompts_are_padded_on_the_left(tiny):
    _, trie, vocabulary = tiny.random_catalogue(22)
    model = _model(tiny, "llama", vocabulary)
    seen = []
    model.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs), with_kwargs=True)
    generate_search(model, [[5, 6], [7, 8, 9]], trie, vocabulary, num_beams=2)
    assert seen[0]["input_ids"][::2].tolist() == [[0, 5, 6], [7, 8, 9]]
    assert seen[0]["attention_mask"][::2].tolist() == [[0, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("num_beams", [1, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_generation_defaults_of_a_checkpoint_have_no_effect(tiny, kind, num_beams):
    codes, trie, vocabulary = tiny.random_catalogue(11)
    model = _model(tiny, kind, vocabulary)
    prompts = tiny.random_prompts(12, (6, 4))
    search = (prompts, trie, vocabulary)
    leaves, scores = generate_search(model, *search, num_beams=num_beams)
    some_codes = vocabulary.token_ids(codes[0]).tolist()
    other_code = next(token for token in range(40, 44) if token not in some_codes)
    instruct = GenerationConfig(
        do_sample=True,
        temperature=0.3,
        top_k=3,
        top_p=0.5,
        repetition_penalty=1.5,
        no_repeat_ngram_size=1,
        suppress_tokens=some_codes,
        forced_bos_token_id=other_code,
        forced_eos_token_id=2,
        min_new_tokens=9,
        num_beams=2,
        max_length=5,
        eos_token_id=some_codes[0],
        bos_token_id=1,
        decoder_start_token_id=model.generation_config.decoder_start_token_id,
    )
    model.generation_config = instruct
    again, scores_again = generate_search(model, *search, num_beams=num_beams)
    assert torch.equal(leaves, again)
    assert torch.equal(scores, scores_again)
    assert model.generation_config is instruct
    with pytest.raises(SettingsError, match="different semantic IDs"):
        generate_search(model, prompts, trie, CodeVocabulary((4, 6, 6), 40), num_beams=2)
    assert model.generation_config is instruct


def test_a_model_with_lora_layers(tiny):
    codes, trie, vocabulary = tiny.random_catalogue(11)
    model = _model(tiny, "llama", vocabulary)
    settings = model.generation_config
    plain, _ = generate_search(model, [[5, 6]], trie, vocabulary, num_beams=30)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        wrapped = add_lora(model, lora).eval()
    leaves, scores = generate_search(wrapped, [[5, 6]], trie, vocabulary, num_beams=30)
    assert not torch.equal(leaves, plain)
    expected = tiny.exhaustive_scores(wrapped, [5, 6], codes, trie, vocabulary, "vocabulary")
    torch.testing.assert_close(scores[0].double(), expected[trie.items[leaves[0]].long()], atol=1e-4, rtol=0)
    assert model.generation_config is settings
    assert "generation_config" not in vars(wrapped)


def test_what_makes_no_sense_is_refused(tiny):
    _, trie, vocabulary = tiny.random_catalogue(17)
    model = _model(tiny, "llama", vocabulary)
    with pytest.raises(SettingsError, match="the prompt of request 1 is empty"):
        generate_search(model, [[3, 4], []], trie, vocabulary, num_beams=3)
    with pytest.raises(SettingsError, match="unknown scope 'items'; known: vocabulary, codes, trie"):
        generate_search(model, [[3, 4]], trie, vocabulary, num_beams=3, scope="items")
    with pytest.raises(SettingsError, match="there are no requests"):
        generate_search(model, [], trie, vocabulary, num_beams=3)
    plain = tiny.tiny_model("llama", vocabulary, code_rows=False, vocab_size=45)
    with pytest.raises(SettingsError, match="45 logits, codes and end tokens reach up to token 54"):
        generate_search(plain, [[3, 4]], trie, vocabulary, num_beams=3)
