import pytest

from llmrec.errors import SettingsError
from llmrec.tasks.prompt_frame import PromptFrame

CHAT = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def fill(template, **slots):
    return template.fill(slots.__getitem__)


def test_slots_are_filled_with_token_ids_in_the_order_of_the_text(byte_tokenizer):
    template = PromptFrame(byte_tokenizer).prompt("Q {query} of {history}! {other}", ("history", "query"))
    assert template.slots == ("query", "history")
    ids = fill(template, query=[7, 8], history=[9])
    before, between, after = (byte_tokenizer(text).input_ids for text in ("Q ", " of ", "! {other}"))
    assert ids == [*before, 7, 8, *between, 9, *after]
    assert template.num_tokens == len(ids) - 3


@pytest.mark.parametrize("text", ["no slot", "{history} and {history}", "{History}"])
def test_a_slot_stands_exactly_once(byte_tokenizer, text):
    with pytest.raises(SettingsError, match=r"needs \{history\} exactly once"):
        PromptFrame(byte_tokenizer).prompt(text, ("history",))


def test_a_start_token_stands_first_where_the_tokenizer_adds_it(start_token_tokenizer):
    template = PromptFrame(start_token_tokenizer).prompt("Items {history} :", ("history",))
    assert fill(template, history=[40]) == [1, 4, 40, 12]


def test_a_chat_turn(byte_tokenizer):
    byte_tokenizer.chat_template = CHAT
    template = PromptFrame(byte_tokenizer, chat=True).prompt("Take {history}, then:\n", ("history",))
    ids = fill(template, history=[9, 9])
    plain = byte_tokenizer.convert_tokens_to_ids
    assert ids[ids.index(9) + 2 :][:7] == byte_tokenizer(", then:").input_ids  # line ends at the end are left out
    assert byte_tokenizer.decode(ids).startswith("[user]Take ")
    assert byte_tokenizer.decode(ids).endswith(", then:</s>[assistant]")
    assert ids.count(plain("</s>")) == 1  # a special token, not its letters


def test_a_chat_prompt_is_the_same_on_every_day(byte_tokenizer):
    byte_tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }} {{ date_string }} {{ messages[0]['content'] }}"
    template = PromptFrame(byte_tokenizer, chat=True).prompt("{history}", ("history",))
    assert byte_tokenizer.decode(fill(template, history=[])) == "26 Jul 2024 26 Jul 2024 "


def test_chats_that_cannot_work(byte_tokenizer):
    with pytest.raises(SettingsError, match="no chat template"):
        PromptFrame(byte_tokenizer, chat=True)
    byte_tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(SettingsError, match="doesn't keep the template"):
        PromptFrame(byte_tokenizer, chat=True).prompt("take {history}", ("history",))


def test_an_encoder_reads_the_end_token(byte_tokenizer):
    end = byte_tokenizer.eos_token_id
    frame = PromptFrame(byte_tokenizer, encoder_decoder=True)
    assert fill(frame.prompt("{history}", ("history",)), history=[9]) == [9, end]
    assert fill(frame.target("{codes}", ("codes",), is_text=False), codes=[5]) == [5]


def test_targets(byte_tokenizer, text_tokenizer):
    end = byte_tokenizer.eos_token_id
    target = PromptFrame(byte_tokenizer).target("{title}\n{description}", ("title", "description"), is_text=True)
    assert fill(target, title=[5], description=[6]) == [5, *byte_tokenizer("\n").input_ids, 6, end]
    with pytest.raises(SettingsError, match="no end-of-sequence token"):
        PromptFrame(text_tokenizer).target("{title}", ("title",), is_text=True)
