"""The pieces that pages are put together from: cards of verdicts, sections, panels with a chart and its legend."""

from collections.abc import Iterator, Sequence
from html import escape

from llmrec.item_tokenizers.report.charts import NUM_COLOURS
from llmrec.item_tokenizers.report.verdicts import STATE_WORDS, Verdict

_SIGNS = {"good": "✓", "look": "!", "bad": "✕"}


def cards(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """A section with one card a verdict."""
    yield '<section><div class="cards">'
    for verdict in verdicts:
        yield (
            f'<article class="card {verdict.state}"><h3>{escape(verdict.name)}</h3><p class="figure">'
            f'{escape(verdict.value)}</p><p class="pill">{_SIGNS[verdict.state]} {STATE_WORDS[verdict.state]}</p>'
            f"<p>{escape(verdict.meaning)}</p>"
        )
        if verdict.remedy:
            yield f'<p class="remedy">{escape(verdict.remedy)}</p>'
        yield "</article>"
    yield "</div></section>"


def section(heading: str, text: str, panels: Sequence[str]) -> Iterator[str]:
    """Heading, text and panels side by side; nothing where all panels are empty."""
    if any(panels):
        yield f"<section><h2>{escape(heading)}</h2><p>{escape(text)}</p>"
        yield f'<div class="charts">{"".join(panels)}</div></section>'


def panel(heading: str, chart: str, facts: str = "", names: Sequence[str] = (), muted: Sequence[str] = ()) -> str:
    """A chart with its heading, the legend of its `names` (those of `muted` in grey), and a line of facts."""
    legend_line = legend([escape(name) for name in names], muted) if names else ""
    note = f'<p class="facts">{escape(facts)}</p>' if facts else ""
    return f'<div class="panel"><h3>{escape(heading)}</h3>{legend_line}{chart}{note}</div>'


def legend(names: Sequence[str], muted: Sequence[str] = ()) -> str:
    """Names (already escaped) with the colour of their place."""
    entries = "".join(
        f'<span><i class="{"bm" if name in muted else f"b{number % NUM_COLOURS}"}"></i>{name}</span>'
        for number, name in enumerate(names)
    )
    return f'<p class="legend">{entries}</p>'
