"""Results of several recommenders as one table: for the terminal, as Markdown, as JSON.

Both protocols stand side by side in every table, named: with seen items kept among the answers (the papers' protocol)
and with seen items left out (as in use).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmrec.errors import SettingsError
from llmrec.evaluation.evaluator import SEEN_KEPT, SEEN_LEFT_OUT, EvaluationResult

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN = {"recall": "Recall", "ndcg": "NDCG", "mrr": "MRR"}


@dataclass(frozen=True)
class ResultsTable:
    """Rows are recommenders, in the order they were given; a group of rows a protocol.

    Attributes:
        results: What the table shows.
        metrics: Its columns.
        title: Data set, split and number of examples.
    """

    results: tuple[EvaluationResult, ...]
    metrics: tuple[str, ...]
    title: str

    def rows(self) -> list[list[str]]:
        """Protocol, recommender, then one figure a metric ("–" where it was not measured)."""
        return [
            [
                result.protocol,
                result.name,
                *(f"{result.metrics[one]:.4f}" if one in result.metrics else "–" for one in self.metrics),  # noqa: RUF001
            ]
            for protocol in (SEEN_KEPT, SEEN_LEFT_OUT)
            for result in self.results
            if result.protocol == protocol
        ]

    def header(self) -> list[str]:
        """Names of the columns."""
        return ["protocol", "recommender", *(_heading(metric) for metric in self.metrics)]

    def to_rich(self) -> "Table":
        """For the terminal."""
        from rich.table import Table

        table = Table(title=self.title)
        for number, heading in enumerate(self.header()):
            table.add_column(heading, justify="left" if number < 2 else "right")
        previous = None
        for row in self.rows():
            if previous not in (None, row[0]):
                table.add_section()
            previous = row[0]
            table.add_row(*row)
        return table

    def __rich__(self) -> "Table":
        return self.to_rich()

    def to_markdown(self) -> str:
        """For a README or model card."""
        header = self.header()
        lines = [f"| {' | '.join(header)} |", f"|{'---|' * 2}{'---:|' * (len(header) - 2)}"]
        lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in self.rows()]
        return f"{self.title}\n\n" + "\n".join(lines) + "\n"

    def to_json(self, *, with_ranks: bool = False) -> dict[str, Any]:
        """A dict that `json` can write."""
        return {"title": self.title, "results": [one.to_json(with_ranks=with_ranks) for one in self.results]}

    def __str__(self) -> str:
        cells = [self.header(), *self.rows()]
        widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if number < 2 else cell.rjust(width) for number, (cell, width) in enumerate(pairs)
            )
            for pairs in (list(zip(row, widths, strict=True)) for row in cells)
        ]
        return "\n".join([self.title, *(line.rstrip() for line in lines)])


def results_table(results: Sequence[EvaluationResult], *, metrics: Sequence[str] | None = None) -> ResultsTable:
    """Puts results on the same examples into one table.

    Args:
        results: Of several recommenders, ideally each under both protocols.
        metrics: Columns; None takes all, in the order of the first result.

    Raises:
        SettingsError: No results, or they are of different examples.
    """
    if not results:
        raise SettingsError("there are no results to show: evaluate at least one recommender")
    first = results[0]
    for other in results[1:]:
        if (other.examples, other.num_examples) != (first.examples, first.num_examples):
            raise SettingsError(
                f"{first.name!r} and {other.name!r} were evaluated on different examples ({first.dataset}"
                f" {first.split}, {first.num_examples}; {other.dataset} {other.split}, {other.num_examples}): one"
                " table can't hold both"
            )
    columns = tuple(metrics or dict.fromkeys(metric for result in results for metric in result.metrics))
    where = " ".join(part for part in (first.dataset, first.split) if part) or "results"
    return ResultsTable(tuple(results), columns, f"{where}, {first.num_examples:,} examples, full ranking")


def _heading(metric: str) -> str:
    name, _, k = metric.partition("@")
    return f"{_SHOWN.get(name, name)}@{k}" if k else _SHOWN.get(name, name)
