from task_texts import CODE_TEXTS, DESCRIPTIONS, TITLES

from llmrec.tasks.codes_to_item import KINDS, codes_to_item_samples

TITLE, BOTH, DESCRIPTION = (set(kind.prompts) for kind in KINDS)


def test_each_template_asks_for_what_the_item_has(make_source, read, byte_tokenizer):
    samples = codes_to_item_samples(make_source())
    assert samples.has_text_targets
    assert samples.num_targets == len(samples) == 4
    for item in range(4):
        pairs = {read(samples.sample(item, epoch)) for epoch in range(300)}
        title, description, codes = TITLES[item], DESCRIPTIONS[item], CODE_TEXTS[item]
        expected = set()
        if title:
            expected |= {(text.format(codes=codes), f"{title}</s>") for text in TITLE}
        if description:
            expected |= {(text.format(codes=codes), f"{description}</s>") for text in DESCRIPTION}
        if title and description:
            expected |= {(text.format(codes=codes), f"{title}\n{description}</s>") for text in BOTH}
        assert pairs == expected
    sample = samples.sample(3)
    assert sample["labels"][-1] == sample["input_ids"][-1] == byte_tokenizer.eos_token_id


def test_lengths_and_kinds(make_source, check_lengths):
    check_lengths(codes_to_item_samples(make_source()))
    assert all(len(kind.prompts) >= 8 for kind in KINDS)


def test_a_text_that_is_cut_ends_with_the_end_token(make_source, read):
    samples = codes_to_item_samples(make_source(columns=("title",), max_text_tokens=3))
    assert {read(samples.sample(1, epoch))[1] for epoch in range(20)} == {"Blu</s>"}


def test_an_encoder_decoder_model(make_source, byte_tokenizer):
    samples = codes_to_item_samples(make_source(columns=("title",), encoder_decoder=True))
    sample = samples.sample(2)
    assert sample["labels"] == [*byte_tokenizer("Tent").input_ids, byte_tokenizer.eos_token_id]
    assert byte_tokenizer.decode(sample["input_ids"][:-1]) in {text.format(codes=CODE_TEXTS[3]) for text in TITLE}
