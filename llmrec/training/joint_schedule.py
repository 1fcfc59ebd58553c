"""Who learns when in joint training (ETEGRec, arXiv 2409.05546, section 3.4)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class JointSchedule:
    """Who learns when.

    Attributes:
        cycle: C, epochs of a cycle: one of the item tokenizer, C - 1 of the recommender.
        warmup_epochs: Epochs, of both kinds, in which nothing is aligned.
        alternate: Whether they learn in turns; else both in every step, and items are encoded anew after every epoch.
        train_tokenizer: Whether the item tokenizer learns at all; else nothing is aligned either.
    """

    cycle: int = 2
    warmup_epochs: int = 10
    alternate: bool = True
    train_tokenizer: bool = True

    def cycle_of(self, epoch: int) -> int:
        """The cycle that an epoch of the recommender, counted from 0, belongs to."""
        return epoch // (self.cycle - 1) if self.alternate else epoch

    def epochs_before(self, epoch: int) -> int:
        """Epochs of both kinds that lie before an epoch of the recommender, the one that began its cycle included."""
        return epoch + self.cycle_of(epoch) + 1 if self.alternate and self.train_tokenizer else epoch

    def aligns_recommender(self, epoch: int) -> bool:
        """Whether an epoch of the recommender, counted from 0, is aligned."""
        return self.train_tokenizer and self.epochs_before(epoch) >= self.warmup_epochs

    def aligns_tokenizer(self, cycle: int) -> bool:
        """Whether the epoch of the item tokenizer that begins a cycle is aligned."""
        return self.alternate and self.train_tokenizer and cycle * self.cycle >= self.warmup_epochs

    def num_tokenizer_epochs(self, epochs: int) -> int:
        """Epochs of the item tokenizer beside so many of the recommender."""
        return -(-epochs // (self.cycle - 1)) if self.alternate and self.train_tokenizer else 0
