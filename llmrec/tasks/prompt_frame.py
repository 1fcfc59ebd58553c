"""Templates to token IDs: plain text, or the user's turn of a chat.

A template is text with slots such as "{history}". What stands in a slot (codes, titles, a query) is token IDs already
and is joined to the template as token IDs, never as text: no merge of the text tokenizer can cross from one into the
other, and nothing that an item's text says can become a code or a special token. The chat template of the tokenizer is
rendered with the slots still in it, and the rendered text is split at them.

Each piece is tokenised on its own, so a SentencePiece tokenizer (LLaMA) begins every piece as a new word: 'called "'
and a title give 'called " Red pen'. Training and inference do it alike.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from llmrec.errors import SettingsError

# Some chat templates (Llama 3.2, Mistral) write today's date, so a prompt would differ from day to day. They get this
# one, by the name that Llama's asks for and in the place of the function that the others call.
_DATE = "26 Jul 2024"
_FIXED_DATE = "{%- macro strftime_now(format) -%}" + _DATE + "{%- endmacro -%}"


@dataclass(frozen=True)
class PromptTemplate:
    """A template as token IDs.

    Attributes:
        text: As it was given.
        pieces: Token IDs before, between and after the slots; one more than there are slots.
        slots: Names of the slots, in the order in which they stand.
    """

    text: str
    pieces: tuple[tuple[int, ...], ...]
    slots: tuple[str, ...]

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of the template itself, without what stands in its slots."""
        return sum(map(len, self.pieces))

    def fill(self, read: Callable[[str], Sequence[int]]) -> list[int]:
        """Token IDs of the template with its slots filled.

        Args:
            read: Gives the token IDs for a slot, by its name.
        """
        token_ids = list(self.pieces[0])
        for slot, piece in zip(self.slots, self.pieces[1:], strict=True):
            token_ids += read(slot)
            token_ids += piece
        return token_ids


class PromptFrame:
    """What stands around every prompt of a model.

    Plain prompts begin with the text tokenizer's start token where it adds one. Prompts of an encoder-decoder model
    end with its end-of-sequence token, as T5's and BART's do. In a chat the template is the user's turn, and the
    prompt ends where the assistant's answer begins; what else is in it (a system turn, start tokens) is the chat
    template's.

    Args:
        text_tokenizer: With the code tokens in it.
        chat: Whether prompts are turns of a chat.
        encoder_decoder: Whether prompts are for an encoder.

    Raises:
        SettingsError: `chat` with a text tokenizer that has no chat template.
    """

    def __init__(self, text_tokenizer: PreTrainedTokenizerBase, *, chat: bool = False, encoder_decoder: bool = False):
        if chat and not getattr(text_tokenizer, "chat_template", None):
            raise SettingsError(
                "chat is set, but the text tokenizer has no chat template: take the instruction-tuned variant of the"
                " model, or leave chat out"
            )
        self.text_tokenizer = text_tokenizer
        self.chat = chat
        self.encoder_decoder = encoder_decoder
        start, end = text_tokenizer.bos_token_id, text_tokenizer.eos_token_id
        adds_start = start is not None and list(text_tokenizer("a").input_ids)[:1] == [start]
        self._start = [int(start)] if adds_start and not chat else []
        self._end = [int(end)] if encoder_decoder and end is not None else []

    def prompt(self, text: str, slots: Sequence[str]) -> PromptTemplate:
        """Reads the template of a prompt.

        Args:
            text: With each of the slots in it exactly once; other braces are text.
            slots: Their names.

        Raises:
            SettingsError: A slot is missing or stands twice, or the chat template doesn't keep the text as it is.
        """
        found = _split(text, slots)[1::2]
        for slot in slots:
            if found.count(slot) != 1:
                raise SettingsError(f"a template needs {{{slot}}} exactly once, got {text!r}")
        if self.chat:
            parts = _split(self._render(text), slots)
            if parts[1::2] != found:
                raise SettingsError(
                    f"the chat template of the text tokenizer doesn't keep the template {text!r} as it is: use plain"
                    " prompts (chat: false)"
                )
        else:
            parts = _split(text, slots)
        pieces = [self._text_ids(part) for part in parts[::2]]
        pieces[0] = self._start + pieces[0]
        pieces[-1] = pieces[-1] + self._end
        return PromptTemplate(text, tuple(map(tuple, pieces)), tuple(found))

    def target(self, text: str, slots: Sequence[str], *, is_text: bool) -> PromptTemplate:
        """Reads the template of a target, which is no turn of its own and has no start token.

        Args:
            text: With slots in it.
            slots: Their names.
            is_text: The end-of-sequence token follows: other than an item's codes, text can be of any length.

        Raises:
            SettingsError: A target of text with a text tokenizer that has no end-of-sequence token.
        """
        parts = _split(text, slots)
        pieces = [self._text_ids(part) for part in parts[::2]]
        if is_text:
            if self.text_tokenizer.eos_token_id is None:
                raise SettingsError(
                    "the text tokenizer has no end-of-sequence token, so a model can't learn where a text ends: leave"
                    " out the tasks that write text, or set its eos_token"
                )
            pieces[-1] = [*pieces[-1], int(self.text_tokenizer.eos_token_id)]
        return PromptTemplate(text, tuple(map(tuple, pieces)), tuple(parts[1::2]))

    def _render(self, text: str) -> str:
        chat_template = self.text_tokenizer.get_chat_template()
        rendered = self.text_tokenizer.apply_chat_template(
            [{"role": "user", "content": text.strip()}],
            chat_template=(_FIXED_DATE if "strftime_now" in chat_template else "") + chat_template,
            tokenize=False,
            add_generation_prompt=True,
            date_string=_DATE,
        )
        return str(rendered)

    def _text_ids(self, text: str) -> list[int]:
        ids = self.text_tokenizer(text, add_special_tokens=False).input_ids if text else []
        return [int(token_id) for token_id in ids]


def _split(text: str, slots: Sequence[str]) -> list[str]:
    """Text, slot, text, slot, ..., text."""
    return re.split("{(" + "|".join(map(re.escape, slots)) + ")}", text)
