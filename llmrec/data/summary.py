"""The figures that describe a data set at a glance."""

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rich.table import Table

    from llmrec.data.interactions import InteractionDataset


@dataclass(frozen=True)
class DatasetSummary:
    """Size and shape of a data set; `str()` is a plain table, `to_table()` one for the terminal.

    Attributes:
        name: Name of the data set.
        num_users: Users, those without interactions included.
        num_items: Items of the catalogue, those that nobody took included.
        num_interactions: Interactions.
        density: Interactions per pair of user and item.
        shortest_history: Interactions of the user with the fewest.
        mean_history: Mean interactions per user.
        median_history: Median interactions per user.
        longest_history: Interactions of the user with the most.
        untaken_items: Items that nobody took.
        repeats: Interactions with an item that the same user took before.
        first_time: Earliest interaction, ISO 8601 in UTC; None without timestamps.
        last_time: Latest interaction.
        drops: Reason to number of rows dropped since reading.
    """

    name: str
    num_users: int
    num_items: int
    num_interactions: int
    density: float
    shortest_history: int
    mean_history: float
    median_history: float
    longest_history: int
    untaken_items: int
    repeats: int
    first_time: str | None
    last_time: str | None
    drops: dict[str, int]

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the table."""
        history = f"{self.mean_history:.1f} / {self.median_history:g} ({self.shortest_history}–{self.longest_history})"  # noqa: RUF001
        rows = [
            ("users", f"{self.num_users:,}"),
            ("items", f"{self.num_items:,}"),
            ("interactions", f"{self.num_interactions:,}"),
            ("density", f"{self.density:.4%}"),
            ("history length, mean / median (range)", history),
            ("items that nobody took", f"{self.untaken_items:,}"),
            ("repeated interactions", f"{self.repeats:,}"),
            ("time", f"{self.first_time} to {self.last_time}" if self.first_time else "none: order of rows"),
        ]
        return rows + [(f"dropped: {reason}", f"{count:,}") for reason, count in self.drops.items()]

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(label) for label, _ in rows)
        return "\n".join([self.name, *(f"  {label:<{width}}  {value}" for label, value in rows)])

    def to_table(self) -> "Table":
        """The summary as a rich table."""
        from rich.table import Table

        table = Table(title=self.name, show_header=False)
        for label, value in self.rows():
            table.add_row(label, value)
        return table

    def to_json(self) -> dict[str, Any]:
        """The summary as a dict that `json` can write."""
        return asdict(self)


def summarize(dataset: "InteractionDataset") -> DatasetSummary:
    """Counts what `DatasetSummary` holds."""
    lengths = np.diff(dataset.offsets)
    users = np.repeat(np.arange(dataset.num_users), lengths)
    pairs = np.sort(users * max(dataset.num_items, 1) + dataset.flat_items)  # sorting beats np.unique at this size
    times = dataset.flat_timestamps
    first, last = (None, None) if times is None or not len(times) else (_iso(times.min()), _iso(times.max()))
    cells = dataset.num_users * dataset.num_items
    return DatasetSummary(
        name=dataset.name,
        num_users=dataset.num_users,
        num_items=dataset.num_items,
        num_interactions=dataset.num_interactions,
        density=dataset.num_interactions / cells if cells else 0.0,
        shortest_history=int(lengths.min(initial=np.iinfo(np.int64).max)) if len(lengths) else 0,
        mean_history=float(lengths.mean()) if len(lengths) else 0.0,
        median_history=float(np.median(lengths)) if len(lengths) else 0.0,
        longest_history=int(lengths.max(initial=0)),
        untaken_items=int((np.bincount(dataset.flat_items, minlength=dataset.num_items) == 0).sum()),
        repeats=int((pairs[1:] == pairs[:-1]).sum()),
        first_time=first,
        last_time=last,
        drops=dict(dataset.drops),
    )


def _iso(seconds: np.integer) -> str:
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
