import shutil

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CompileConfig,
    LogitsProcessorList,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation import utils as generation_utils

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
    before = scores.clone()
    masked = processor(torch.tensor(rows), scores)
    assert torch.equal(scores, before)
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


def test_steps_and_rows_in_any_order_give_the_same(parts):
    processor = TrieLogitsProcessor(*parts, 1, eos_token_id=1)
    later = _allowed(processor, [5, 10, 14], [5, 12, 13])
    assert _allowed(processor, [5]) == [[10, 12]]
    assert _allowed(processor, [5, 10, 14, 18]) == [[1]]
    assert _allowed(processor, [5, 12, 13], [5, 10, 14]) == later[::-1]


def test_rows_without_an_item_may_only_end(parts):
    processor = TrieLogitsProcessor(*parts, 1, eos_token_id=[1, 2])
    assert _allowed(processor, [5, 11], [5, 3], [5, 10]) == [[1, 2], [1, 2], [13, 14]]
    assert _allowed(processor, [5, 10, 16]) == [[1, 2]]


def test_finished_rows_may_go_on_for_any_number_of_steps(parts):
    processor = TrieLogitsProcessor(*parts, 1, eos_token_id=1, pad_token_id=0)
    for steps in range(1, 30):
        ended = [1] + [0] * (steps - 1)
        rows = [5, 10, 14, 18, *ended], [5, *([0] * (steps + 3))], [5, *([23, -1, 10**9] * 20)[: steps + 3]]
        assert _allowed(processor, *rows) == [[0, 1]] * 3
    # a row that ended early beside one that has not: padding, as any other token, stands for no code
    assert _allowed(processor, [5, 1, 0], [5, 10, 14]) == [[1], [15, 18]]
    assert _allowed(processor, [5, -1, 10**12], [5, 12, 13]) == [[1], [15, 16]]


def test_a_row_always_has_a_way_to_go_whatever_other_processors_forbid(parts):
    processor = TrieLogitsProcessor(*parts, 1, eos_token_id=1)
    lowest = torch.finfo(torch.float32).min
    scores = torch.zeros(2, WIDTH)
    scores[:, 1] = -torch.inf  # as min_new_tokens does
    scores[0, [13, 14]] = -torch.inf  # as suppress_tokens does: no child of the first row is left
    masked = processor(torch.tensor([[5, 10], [5, 12]]), scores)
    assert masked[0, 1] == lowest
    assert masked[0].isfinite().sum() == 1
    assert masked[1].isfinite().nonzero().flatten().tolist() == [13]
    masked = processor(torch.tensor([[5, 10, 14, 18]]), scores[:1])
    assert masked[0, 1] == lowest
    assert masked.isfinite().sum() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_request_has_its_own_subset(parts, dtype):
    trie, vocabulary = parts
    subset = trie.subset(deny=[np.array([3, 0, 1]), np.arange(6), np.array([1, 4, 2])])
    processor = TrieLogitsProcessor(trie, vocabulary, 1, eos_token_id=1, subset=subset)
    # two beams a request; the leaf of rows 1 and 4 is left out only where both are
    assert _allowed(processor, *[[5]] * 6) == [[10]] * 2 + [[1]] * 2 + [[10, 12]] * 2
    assert _allowed(processor, *[[5, 10]] * 6) == [[13, 14]] * 2 + [[1]] * 2 + [[13]] * 2
    assert _allowed(processor, *[[5, 10, 14]] * 3) == [[15, 18], [1], [1]]
    assert processor(torch.tensor([[5]] * 3), torch.zeros(3, WIDTH, dtype=dtype)).dtype == dtype
    with pytest.raises(SettingsError, match="4 rows can't be divided among the 3 requests"):
        _allowed(processor, *[[5]] * 4)


def test_one_allowed_set_serves_any_number_of_rows(parts):
    trie, vocabulary = parts
    subset = trie.subset(allow=trie.item_set(np.array([2, 3])))
    processor = TrieLogitsProcessor(trie, vocabulary, 1, eos_token_id=1, subset=subset)
    for rows in (1, 2, 5):
        assert _allowed(processor, *[[5]] * rows) == [[10, 12]] * rows
        assert _allowed(processor, *[[5, 10, 14]] * rows) == [[15]] * rows


def test_what_does_not_fit_is_refused(parts):
    trie, vocabulary = parts
    processor = TrieLogitsProcessor(trie, vocabulary, 2, eos_token_id=1)
    with pytest.raises(SettingsError, match=r"shorter than the prompt \(2\)"):
        _allowed(processor, [5])
    with pytest.raises(SettingsError, match="12 logits, codes and end tokens reach up to token 18"):
        processor(torch.tensor([[5, 5]]), torch.zeros(1, 12))
    with pytest.raises(SettingsError, match="reach up to token 30"):
        _allowed(TrieLogitsProcessor(trie, vocabulary, 1, eos_token_id=1, pad_token_id=30), [5])
    with pytest.raises(SettingsError, match="the logits are on meta, the trie of the processor on cpu"):
        processor(torch.tensor([[5, 5]], device="meta"), torch.zeros(1, WIDTH, device="meta"))
    with pytest.raises(SettingsError, match="different semantic IDs"):
        TrieLogitsProcessor(trie, CodeVocabulary((3, 2, 5), FIRST), 2, eos_token_id=1)
    for nothing in ([], None):
        with pytest.raises(SettingsError, match="needs an end-of-sequence token"):
            TrieLogitsProcessor(trie, vocabulary, 2, eos_token_id=nothing)
    with pytest.raises(SettingsError, match="prompt_length is -1"):
        TrieLogitsProcessor(trie, vocabulary, -1, eos_token_id=1)
    with pytest.raises(SettingsError, match=r"\[1, 18\] end or pad a sequence, but 10 to 18 are the codes"):
        TrieLogitsProcessor(trie, vocabulary, 1, eos_token_id=1, pad_token_id=18)


class _Operations(TorchDispatchMode):
    """Names of all operations that run in the block."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        self.names.append(f"{name} to a device" if name == "_to_copy" and kwargs.get("device") is not None else name)
        return func(*args, **kwargs)


# What reads a value back from the device, or brings one there from Python
SYNCHRONISING = {
    "_local_scalar_dense",
    "item",
    "nonzero",
    "masked_select",
    "unique",
    "lift_fresh",
    "_to_copy to a device",
    "equal",
}


@pytest.mark.parametrize("with_subset", [False, True])
def test_a_step_is_the_same_operations_for_any_number_of_rows_and_none_waits(tiny, with_subset):
    codes, trie, vocabulary = tiny.random_catalogue(0)
    subset = trie.subset(deny=[np.array([3, 4])]) if with_subset else None
    processor = TrieLogitsProcessor(trie, vocabulary, 2, eos_token_id=2, pad_token_id=1, subset=subset)
    tokens = torch.from_numpy(vocabulary.token_ids(codes[:1]))
    for step in range(6):
        row = torch.cat([torch.tensor([[5, 6]]), tokens, torch.tensor([[2, 1]])], dim=1)[:, : 2 + step]
        recorded = []
        for rows in (1, 64):
            input_ids, scores = row.repeat(rows, 1), torch.zeros(rows, 60)
            processor(input_ids, scores)  # what is kept for a device is made by now
            with _Operations() as operations:
                processor(input_ids, scores)
            recorded.append(operations.names)
        assert recorded[0] == recorded[1]
        assert not SYNCHRONISING & set(recorded[0])


@pytest.mark.parametrize(("backend", "lengths"), [("eager", range(2, 12)), ("inductor", [3])])
def test_it_compiles_as_one_graph(tiny, backend, lengths):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    codes, trie, vocabulary = tiny.random_catalogue(0, sizes=(3, 4), num_items=7)
    subset = trie.subset(allow=trie.item_set(np.arange(5)), deny=[np.array([3]), np.array([1, 2])])
    processor = TrieLogitsProcessor(trie, vocabulary, 2, eos_token_id=2, pad_token_id=1, subset=subset)
    compiled = torch.compile(processor, fullgraph=True, backend=backend)
    tokens = torch.from_numpy(vocabulary.token_ids(codes[[0, 3, 6, 2]]))
    rows = torch.cat([torch.full((4, 2), 5), tokens, torch.full((4, 7), 2)], dim=1)
    scores = torch.randn(4, 60, generator=torch.Generator().manual_seed(0))
    for length in lengths:
        assert torch.equal(compiled(rows[:, :length], scores), processor(rows[:, :length], scores))


MODES = {
    "greedy": {},
    "top-k": {"do_sample": True, "top_k": 5},
    "top-p": {"do_sample": True, "top_p": 0.7, "top_k": 0},
    "temperature": {"do_sample": True, "temperature": 1.7, "top_k": 0},
    "beams": {"num_beams": 4, "num_return_sequences": 4},
    "beam-sample": {"num_beams": 3, "num_return_sequences": 3, "do_sample": True, "temperature": 1.5},
}


def _model(tiny, kind, vocabulary, seed=0):
    if kind == "llama":
        return tiny.tiny_model("llama", vocabulary, seed=seed)
    width = vocabulary.first_token_id + vocabulary.num_tokens
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "t5":  # the token that pads also starts the decoder
            common = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
            config = T5Config(**common, vocab_size=width, decoder_start_token_id=0, eos_token_id=2)
            model = T5ForConditionalGeneration(config)
        else:
            layers = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
            sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "init_std": 0.3}
            config = BartConfig(**layers, **sizes, vocab_size=width, max_position_embeddings=128)
            model = BartForConditionalGeneration(config)
    return model.eval()


def _by_python(codes, vocabulary, prompt_length, eos):
    """The same constraint as a function of Python lists, for transformers' own processor."""
    following = {}
    for row in vocabulary.token_ids(codes).tolist():
        for step, token in enumerate(row):
            following.setdefault(tuple(row[:step]), set()).add(token)

    def allowed(batch, input_ids):
        return sorted(following.get(tuple(input_ids[prompt_length:].tolist()), {eos}))

    return allowed


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["llama", "t5", "bart"])
def test_every_mode_of_generate_gives_what_a_list_of_allowed_tokens_gives(tiny, kind, mode, batch_size):
    codes, trie, vocabulary = tiny.random_catalogue(0)
    model = _model(tiny, kind, vocabulary)
    input_ids, attention_mask = tiny.padded(tiny.random_prompts(1, (3, 9, 6)[:batch_size]))
    prompt_length = input_ids.shape[1] if kind == "llama" else 1
    eos, pad = (2, 2) if kind == "llama" else (2, model.config.pad_token_id)
    processor = TrieLogitsProcessor(trie, vocabulary, prompt_length, eos_token_id=eos, pad_token_id=pad)
    reference = _by_python(codes, vocabulary, prompt_length, eos)
    model.generation_config.forced_eos_token_id = None
    known = {tuple(row) for row in codes.tolist()}
    for seed in range(2):  # a second call starts clean
        outputs = []
        for constraint in (
            {"logits_processor": LogitsProcessorList([processor])},
            {"prefix_allowed_tokens_fn": reference},
        ):
            torch.manual_seed(seed)
            outputs.append(
                model.generate(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    max_new_tokens=6,
                    eos_token_id=eos,
                    pad_token_id=pad,
                    **MODES[mode],
                    **constraint,
                )[:, prompt_length:]
            )
        assert torch.equal(*outputs)
        assert len(outputs[0]) == batch_size * MODES[mode].get("num_beams", 1)
        assert {tuple(row) for row in vocabulary.codes(outputs[0][:, :3].numpy()).tolist()} <= known
        assert (outputs[0][:, 3] == eos).all()  # ended right after the last code


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("mode", ["greedy", "top-k", "beams"])
def test_a_static_cache_changes_nothing(tiny, kind, mode):
    _, trie, vocabulary = tiny.random_catalogue(2)
    model = _model(tiny, kind, vocabulary)
    input_ids, attention_mask = tiny.padded(tiny.random_prompts(3, (4, 10)))
    prompt_length = input_ids.shape[1] if kind == "llama" else 1
    processor = TrieLogitsProcessor(trie, vocabulary, prompt_length, eos_token_id=2, pad_token_id=2)
    outputs = []
    for cache in (None, "static"):
        torch.manual_seed(0)
        outputs.append(
            model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                logits_processor=LogitsProcessorList([processor]),
                max_new_tokens=5,
                eos_token_id=2,
                pad_token_id=2,
                cache_implementation=cache,
                **MODES[mode],
            )
        )
    assert torch.equal(*outputs)


@pytest.mark.slow
def test_a_compiled_forward_changes_nothing(tiny):
    _, trie, vocabulary = tiny.random_catalogue(2)
    model = tiny.tiny_model("llama", vocabulary)
    input_ids, attention_mask = tiny.padded(tiny.random_prompts(3, (4, 10)))
    processor = TrieLogitsProcessor(trie, vocabulary, input_ids.shape[1], eos_token_id=2, pad_token_id=2)
    compiling = CompileConfig(mode="default")
    compiling._compile_all_devices = True  # transformers compiles on GPUs only, unless told so
    outputs = []
    for settings in ({}, {"cache_implementation": "static", "compile_config": compiling}):
        outputs.append(
            model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                logits_processor=LogitsProcessorList([processor]),
                max_new_tokens=5,
                **settings,
            )
        )
    assert torch.equal(*outputs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


def test_processors_that_forbid_the_end_leave_the_items_whole(tiny):
    codes, trie, vocabulary = tiny.random_catalogue(4)
    model = tiny.tiny_model("llama", vocabulary)
    input_ids, attention_mask = tiny.padded(tiny.random_prompts(5, (4, 7)))
    processor = TrieLogitsProcessor(trie, vocabulary, input_ids.shape[1], eos_token_id=2, pad_token_id=2)
    known = {tuple(row) for row in codes.tolist()}
    for mode in ("greedy", "top-k"):
        output = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_processor=LogitsProcessorList([processor]),
            min_new_tokens=5,
            max_new_tokens=6,
            **MODES[mode],
        )[:, input_ids.shape[1] :]
        assert {tuple(row) for row in vocabulary.codes(output[:, :3].numpy()).tolist()} <= known
        assert (output[:, 3:] == 2).all()


@pytest.mark.parametrize("mode", ["greedy", "top-k", "beams"])
def test_steps_for_the_sake_of_other_processes_change_nothing(tiny, mode, monkeypatch):
    _, trie, vocabulary = tiny.random_catalogue(6)
    model = tiny.tiny_model("llama", vocabulary)
    input_ids, attention_mask = tiny.padded(tiny.random_prompts(7, (3, 8)))
    processor = TrieLogitsProcessor(trie, vocabulary, input_ids.shape[1], eos_token_id=2, pad_token_id=2)
    forwards, asked = [], []
    model.register_forward_hook(lambda *_: forwards.append(1))

    def another_process_goes_on(unfinished, op):
        asked.append(float(unfinished))
        unfinished += len(asked) < 9

    monkeypatch.setattr(generation_utils.dist, "all_reduce", another_process_goes_on)
    outputs = []
    for synced in (False, True):
        torch.manual_seed(0)
        outputs.append(
            model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                logits_processor=LogitsProcessorList([processor]),
                max_new_tokens=5,
                synced_gpus=synced,
                **MODES[mode],
            )
        )
        forwards.append(0)
    assert torch.equal(*outputs)
    alone = forwards.index(0)
    assert asked[-1] == 0
    assert len(forwards) - alone - 2 == 8 > alone  # it did go on after its own rows had ended


def _generate_one(model, prompt, processor, **settings):
    return model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        logits_processor=LogitsProcessorList([processor]),
        eos_token_id=2,
        pad_token_id=2,
        **{"max_new_tokens": 5, **settings},
    )[0, len(prompt) :].tolist()


@pytest.mark.parametrize("help_from", ["itself", "another model", "the prompt"])
def test_assisted_generation_gives_the_item_it_gives_alone(tiny, help_from):
    codes, trie, vocabulary = tiny.random_catalogue(8, num_items=60, sizes=(5, 6, 7))
    model = tiny.tiny_model("llama", vocabulary)
    assistant = tiny.tiny_model("llama", vocabulary, seed=0 if help_from == "itself" else 1)
    drafted = []
    model.register_forward_pre_hook(
        lambda _, __, inputs: drafted.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    most_at_once = 0
    for number, prompt in enumerate(tiny.random_prompts(9, (5, 9, 7, 12, 4, 6))):
        # a history of items, as recommenders have it: their codes are what prompt lookup finds again
        history = vocabulary.token_ids(codes[number : number + 3]).flatten().tolist()
        prompt = [*prompt, *history, *history]
        processor = TrieLogitsProcessor(trie, vocabulary, len(prompt), eos_token_id=2, pad_token_id=2)
        alone = _generate_one(model, prompt, processor)
        help_given = (
            {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
            if help_from == "the prompt"
            else {"assistant_model": assistant}
        )
        drafted.clear()
        assert _generate_one(model, prompt, processor, **help_given) == alone
        most_at_once = max(most_at_once, *drafted[1:], 0)
        assert vocabulary.codes(np.array(alone[:3])).tolist() in codes.tolist()
        for seed in range(5):
            torch.manual_seed(seed)
            sampled = _generate_one(model, prompt, processor, do_sample=True, top_k=0, **help_given)
            assert vocabulary.codes(np.array(sampled[:3])).tolist() in codes.tolist()
            assert sampled[3] == 2
    assert most_at_once > 1  # drafts were tried


@pytest.mark.parametrize(("kind", "by_lookup"), [("t5", False), ("t5", True), ("bart", False)])
def test_assisted_decoders_give_the_item_they_give_alone(tiny, kind, by_lookup):
    codes, trie, vocabulary = tiny.random_catalogue(8, num_items=60, sizes=(5, 6, 7))
    model, assistant = _model(tiny, kind, vocabulary), _model(tiny, kind, vocabulary, seed=1)
    processor = TrieLogitsProcessor(trie, vocabulary, 1, eos_token_id=2, pad_token_id=model.config.pad_token_id)
    for part in (model, assistant):
        part.generation_config.forced_eos_token_id = None
    help_given = {"prompt_lookup_num_tokens": 2} if by_lookup else {"assistant_model": assistant}
    for prompt in tiny.random_prompts(9, (5, 9, 7, 12)):
        outputs = [
            model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                logits_processor=LogitsProcessorList([processor]),
                eos_token_id=2,
                max_new_tokens=5,
                **help_or_none,
            )
            for help_or_none in ({}, help_given)
        ]
        assert torch.equal(*outputs)
        assert vocabulary.codes(outputs[0][0, 1:4].numpy()).tolist() in codes.tolist()


def test_assisted_sampling_keeps_the_distribution(tiny):
    codes, trie, vocabulary = tiny.random_catalogue(10, num_items=4, sizes=(2, 3))
    model = tiny.tiny_model("llama", vocabulary)
    assistant = tiny.tiny_model("llama", vocabulary, seed=1)
    prompt = tiny.random_prompts(11, (4,))[0]
    processor = TrieLogitsProcessor(trie, vocabulary, len(prompt), eos_token_id=2, pad_token_id=2)
    expected = tiny.exhaustive_scores(model, prompt, codes, trie, vocabulary, "trie").exp()
    draws = 300
    counts = torch.zeros(4, dtype=torch.float64)
    rows = {tuple(tokens): row for row, tokens in enumerate(vocabulary.token_ids(codes).tolist())}
    torch.manual_seed(0)
    for _ in range(draws):
        settings = {"assistant_model": assistant, "do_sample": True, "top_k": 0, "max_new_tokens": 2}
        counts[rows[tuple(_generate_one(model, prompt, processor, **settings))]] += 1
    assert expected.max() < 0.9
    four_deviations = 4 * (expected * (1 - expected) / draws).sqrt()
    assert ((counts / draws - expected).abs() <= four_deviations).all()


@pytest.mark.parametrize("do_sample", [False, True])
def test_an_assistant_of_another_text_tokenizer_is_refused(tiny, do_sample):
    _, trie, _ = tiny.random_catalogue(12)
    text_tokenizer, its_tokenizer = tiny.text_tokenizer(), tiny.text_tokenizer()
    vocabulary = CodeVocabulary.add_to(text_tokenizer, trie.codebook_sizes)
    model = tiny.tiny_model("llama", vocabulary)
    assistant = tiny.tiny_model("llama", vocabulary, code_rows=False, vocab_size=len(its_tokenizer))
    prompt = text_tokenizer("Items chosen by one person")["input_ids"]
    processor = TrieLogitsProcessor(trie, vocabulary, len(prompt), eos_token_id=2, pad_token_id=2)
    with pytest.raises(SettingsError, match=r"has 13 logits.* assistant model if there is one, need the code"):
        _generate_one(
            model,
            prompt,
            processor,
            do_sample=do_sample,
            assistant_model=assistant,
            tokenizer=text_tokenizer,
            assistant_tokenizer=its_tokenizer,
        )
