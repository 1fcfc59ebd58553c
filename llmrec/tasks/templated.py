"""Samples that are a template with its slots filled, the template drawn anew each epoch.

What all tasks but next-item prediction have in common. A task says which templates a sample may draw, and what stands
in their slots; lengths and token IDs follow from that.
"""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmrec.tasks.base import TaskSamples, draws, join
from llmrec.tasks.epoch_cache import EpochCache
from llmrec.tasks.prompt_frame import PromptFrame, PromptTemplate
from llmrec.tasks.slots import Slot

# Draws among numbers of choices that differ from sample to sample are remainders of draws among so many.
_MANY = 2**40


@dataclass(frozen=True)
class Kind:
    """Templates that show the same and ask for the same.

    Attributes:
        prompts: Texts with the slots of `shown`.
        shown: Names of the slots of each prompt.
        target: What is to be written, with slots: "{codes}", or text.
        asked: Names of its slots.
    """

    prompts: Sequence[str]
    shown: tuple[str, ...]
    target: str
    asked: tuple[str, ...]

    @property
    def writes_text(self) -> bool:
        """Whether the target is text."""
        return self.target != "{codes}"

    def read(self, frame: PromptFrame) -> list[tuple[PromptTemplate, PromptTemplate]]:
        """Each of the prompts, and the target beside it, as token IDs."""
        target = frame.target(self.target, self.asked, is_text=self.writes_text)
        return [(frame.prompt(text, self.shown), target) for text in self.prompts]


@dataclass(frozen=True, eq=False)
class Draw:
    """What S samples are in one epoch.

    Attributes:
        templates: int64 [S], number of the template.
        slots: What fills the slots, by their names.
    """

    templates: np.ndarray
    slots: Mapping[str, Slot]


class TemplatedSamples(TaskSamples):
    """Samples of templates.

    Args:
        name: Of the task.
        frame: What stands around prompts.
        kinds: Their templates are numbered one kind after the other.
        seed: Of all draws.
    """

    def __init__(self, name: str, frame: PromptFrame, kinds: Sequence[Kind], *, seed: int):
        self.name = name
        self.seed = seed
        self._encoder_decoder = frame.encoder_decoder
        self._writes_text = any(kind.writes_text for kind in kinds)
        self._templates = [pair for kind in kinds for pair in kind.read(frame)]
        self._drawn = EpochCache(self.draw)
        self._num_literals = np.array([prompt.num_tokens + target.num_tokens for prompt, target in self._templates])
        names = sorted({slot for pair in self._templates for template in pair for slot in template.slots})
        # how many times each template shows each slot: int64 [templates, slots]
        self._slot_names = names
        self._uses = np.array(
            [[(*prompt.slots, *target.slots).count(name) for name in names] for prompt, target in self._templates]
        )

    @abc.abstractmethod
    def draw(self, epoch: int) -> Draw:
        """What the samples are in an epoch: a pure function of it and of the seed."""

    @property
    def num_targets(self) -> int:
        """Items, or texts, that one epoch teaches: one a sample."""
        return len(self)

    @property
    def has_text_targets(self) -> bool:
        """Whether some targets are text."""
        return self._writes_text

    def lengths(self, epoch: int = 0) -> np.ndarray:
        """Tokens of each sample; see `TaskSamples`."""
        drawn = self._drawn(epoch)
        lengths = self._num_literals[drawn.templates]
        for name, uses in zip(self._slot_names, self._uses.T, strict=True):
            lengths = lengths + uses[drawn.templates] * drawn.slots[name].lengths
        return lengths

    def sample(self, index: int, epoch: int = 0) -> dict[str, list[int]]:
        """One sample; see `TaskSamples`."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        drawn = self._drawn(epoch)
        prompt, target = self._templates[drawn.templates[index]]

        def read(slot: str) -> list[int]:
            return drawn.slots[slot].tokens(index)

        return join(prompt.fill(read), target.fill(read), encoder_decoder=self._encoder_decoder)

    def draw_among(self, counts: np.ndarray | int, epoch: int, what: str) -> np.ndarray:
        """Draws one of `counts` choices for each sample: int64 [S] in [0, counts).

        Args:
            counts: Of all samples, or int64 [S] of each, all at least 1.
            epoch: From 0.
            what: What is drawn, such as "template".
        """
        return draws(self.seed, epoch, len(self), _MANY, stream=f"{self.name} {what}") % counts
