"""A page about codes: one HTML file with verdicts and plots that opens without a network.

Puts together what `diagnostics.py` measures, `verdicts.py` judges and `charts.py` draws. Measures nothing
itself but the two axes of the map.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from llmrec._version import __version__
from llmrec.embeddings.base import ItemEmbeddings
from llmrec.errors import DataError
from llmrec.files import atomic_file
from llmrec.item_tokenizers.diagnostics import CodeDiagnostics
from llmrec.item_tokenizers.neighbours import NeighbourAgreement
from llmrec.item_tokenizers.report.charts import (
    NUM_COLOURS,
    area_chart,
    bar_chart,
    count,
    figure,
    line_chart,
    percent,
    point_map,
)
from llmrec.item_tokenizers.report.parts import cards, legend, panel, section
from llmrec.item_tokenizers.report.style import PAGE, STYLE
from llmrec.item_tokenizers.report.verdicts import Verdict, judge
from llmrec.item_tokenizers.semantic_ids import SemanticIds

MAP_ITEMS = 4_000  # drawn at most: about 0.6 MB
TITLE_LENGTH = 80
GROUP_SIZES = ((2, 2), (3, 3), (4, 4), (5, 8), (9, 16), (17, None))
_OF_LEVEL = re.compile(r"(.+)_([a-z])")  # used_a, perplexity_b: one chart for all levels


def write_html_report(
    path: str | Path,
    *,
    title: str,
    before: CodeDiagnostics,
    after: CodeDiagnostics,
    semantic_ids: SemanticIds,
    map_embeddings: ItemEmbeddings | None = None,
    item_titles: Sequence[str] | None = None,
    history: Sequence[Mapping[str, float]] | None = None,
) -> None:
    """Writes the page, whole or not at all.

    It needs no script, font or network, follows the reader's light or dark setting, and stays under about 1.5 MB:
    of more than 4,000 items the map shows a seeded sample.

    Args:
        path: The .html file.
        title: Heading: method and data set, say.
        before: Diagnostics of the codes as fitted; `after` again where they aren't known.
        after: Diagnostics of `semantic_ids`, with reconstruction and neighbours where these are to be shown.
        semantic_ids: The codes in use.
        map_embeddings: Places the items on the map (the first two principal components of their directions); None: no
            map. Items without a vector aren't on it.
        item_titles: One text an item, shown where the map is pointed at.
        history: Figures while fitting, one mapping a measuring, each with "epoch"; None: no curves.

    Raises:
        DataError: Titles or diagnostics of another number of items.
        ItemOrderError: The embeddings are about other items, or in another order.
    """
    given = {"item_titles": len(semantic_ids) if item_titles is None else len(item_titles), "after": after.num_items}
    for what, found in given.items():
        if found != len(semantic_ids):
            raise DataError(f"{what} has {found} items, the codes have {len(semantic_ids)}: give those of these codes")
    sections = [
        *_headline(title, after, judge(before, after, semantic_ids.report)),
        *_usage(after, semantic_ids),
        *_collisions(before, after),
        *_kept(after),
        *_map(semantic_ids, map_embeddings, item_titles),
        *_curves(history or ()),
        *_levels(after),
    ]
    page = PAGE.format(title=escape(title), style=STYLE, body="\n".join(sections), version=escape(__version__))
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")


def _headline(title: str, after: CodeDiagnostics, verdicts: Sequence[Verdict]) -> Iterator[str]:
    sizes = ", ".join(dict.fromkeys(f"{level.codebook_size:,}" for level in after.levels))
    yield f"<header><h1>{escape(title)}</h1><p>{after.num_items:,} items, {len(after.levels)} levels of {sizes} codes,"
    yield f" uniqueness policy {escape(after.policy)}</p></header>"
    yield from cards(verdicts)


def _usage(after: CodeDiagnostics, semantic_ids: SemanticIds) -> Iterator[str]:
    charts = []
    for number, level in enumerate(after.levels):
        counts = np.bincount(semantic_ids.codes[:, number], minlength=level.codebook_size)
        is_counter = after.policy == "extra_level" and number == len(after.levels) - 1
        heading = f"Level {_letter(number)}" + (" (counter)" if is_counter else "")
        facts = f"{level.used:,} of {level.codebook_size:,} codes used, {level.dead:,} dead · perplexity"
        facts += f" {level.perplexity:,.1f} · Gini {level.gini:.2f} · largest {level.largest:,}"
        charts.append(panel(heading, area_chart(counts, label=f"Items per code of level {_letter(number)}"), facts))
    yield from section(
        "Use of the codes",
        "Items of each code, most used first. A flat top is even use; a spike at the left means that a few codes hold"
        " most items. Shaded: codes without items.",
        charts,
    )


def _collisions(before: CodeDiagnostics, after: CodeDiagnostics) -> Iterator[str]:
    series = {"as fitted": _in_groups(before), "in use": _in_groups(after)}
    if before is after:
        del series["as fitted"]
    shown = [number for number in range(len(GROUP_SIZES)) if any(values[number] for values in series.values())]
    names = [f"{low}" if low == high else f"{low}-{high}" if high else f"{low}+" for low, high in GROUP_SIZES]
    charts = []
    if shown:
        chart = bar_chart(
            [names[number] for number in shown],
            {name: [values[number] for number in shown] for name, values in series.items()},
            label="Items in collision groups by size of the group",
        )
        alone = " · ".join(
            f"{name}: {found.group_sizes.get(1, 0):,} of {found.num_items:,} items alone"
            for name, found in zip(series, (before, after)[-len(series) :], strict=True)
        )
        charts.append(panel("Items by size of their group", chart, alone, list(series)))
    prefixes = after.prefixes
    if prefixes:
        chart = bar_chart(
            ["".join(_letter(level) for level in range(prefix.depth)) for prefix in prefixes],
            {"prefixes": [prefix.distinct for prefix in prefixes]},
            label="Different prefixes by depth",
        )
        each = ", ".join(f"{prefix.items_each:,.1f}" for prefix in prefixes)
        charts.append(panel("Different prefixes by depth", chart, f"items of each in the mean: {each}"))
    text = "Items that share all their codes with another, by the number of items that share them." if shown else ""
    text += "" if shown else "No two items share all their codes."
    yield from section("Collisions and prefixes", text, charts)


def _in_groups(found: CodeDiagnostics) -> list[int]:
    return [
        sum(
            size * tuples
            for size, tuples in found.group_sizes.items()
            if size >= low and (high is None or size <= high)
        )
        for low, high in GROUP_SIZES
    ]


def _kept(after: CodeDiagnostics) -> Iterator[str]:
    charts = []
    if after.reconstruction is not None:
        errors = [1.0, *after.reconstruction.relative_error]
        names = ["none", *("".join(_letter(level) for level in range(depth)) for depth in range(1, len(errors)))]
        chart = bar_chart(names, {"error left": errors}, label="Reconstruction error by level", form=percent)
        facts = "share of the variance of the latents that the first codes don't tell"
        charts.append(panel("Reconstruction by level", chart, facts))
    for space, agreement in after.neighbours.items():
        charts.append(_neighbour_chart(space, agreement))
    if charts:
        yield from section(
            "What the codes keep",
            "How near the codes bring back what was quantised, and how often an item's nearest items (by cosine) share"
            " its first codes, against random pairs. Codes that know nothing of a space lie at chance.",
            charts,
        )


def _neighbour_chart(space: str, agreement: NeighbourAgreement) -> str:
    depths = range(1, len(agreement.shared_prefix) + 1)
    series = {"neighbours": agreement.shared_prefix, "chance": agreement.chance}
    chart = bar_chart(
        ["".join(_letter(level) for level in range(depth)) for depth in depths],
        series,
        label=f"{space.capitalize()} neighbours that share the first codes",
        form=percent,
        muted=["chance"],
    )
    chances = ", ".join(percent(chance) for chance in agreement.chance)
    lifts = ", ".join("-" if lift is None else f"{lift:,.0f}" for lift in agreement.lift)
    facts = f"{agreement.num_neighbours} nearest of {agreement.num_queries:,} items · chance {chances} · times chance"
    facts += f" {lifts} · equal codes, mean over levels {agreement.code_overlap:.3f}"
    return panel(f"{space.capitalize()} neighbours", chart, facts, list(series), ["chance"])


def _map(
    semantic_ids: SemanticIds, embeddings: ItemEmbeddings | None, item_titles: Sequence[str] | None
) -> Iterator[str]:
    if embeddings is None:
        return
    embeddings.check_order(semantic_ids.item_ids, "the embeddings of the map")
    present = embeddings.present
    rows = np.arange(len(embeddings)) if present is None else np.flatnonzero(present)
    if len(rows) < 3:
        return
    if len(rows) > MAP_ITEMS:
        rows = np.sort(np.random.default_rng(0).choice(rows, MAP_ITEMS, replace=False))
    points, share = principal_axes(embeddings.vectors[rows])
    hints = []
    for row in rows.tolist():
        name = semantic_ids.item_ids[row] if item_titles is None else str(item_titles[row])
        name = "".join(letter if letter.isprintable() else " " for letter in name)
        name = name if len(name) <= TITLE_LENGTH else f"{name[: TITLE_LENGTH - 1]}…"
        hints.append(f"{name}\n{' '.join(semantic_ids.tokens(row))}")
    items = np.bincount(semantic_ids.codes[:, 0])
    largest = np.argsort(-items, kind="stable")[:NUM_COLOURS].tolist()
    drawn = point_map(points, semantic_ids.codes[rows, 0], hints, strong=largest, label="Items by first code")
    names = [f"&lt;a_{code}&gt; {items[code]:,}" for code in largest if items[code]]
    sample = f"{len(rows):,} of {len(embeddings):,} items"
    yield (
        "<section><h2>Map of items</h2><p>Each point is an item, coloured by its first code: the eight most frequent"
        " in strong colours, the others pale. Point at one to see its title and codes, and its whole group. Groups"
        " that hold together are what one hopes for; the map keeps only"
        f" {share:.0%} of the variance, so groups that overlap here may lie apart.</p>"
        f'<div class="panel">{legend(names)}{drawn}<p class="facts">{sample} · first two principal components of'
        " their directions</p></div></section>"
    )


def principal_axes(vectors: np.ndarray) -> tuple[np.ndarray, float]:
    """The first two principal components of the directions of some vectors.

    Args:
        vectors: float [n, D], brought to length 1 here.

    Returns:
        float64 [n, 2] (a second column of zeros where D is 1) and their share of the variance. The sign of each is
        fixed by making the entry of largest size of its axis positive.
    """
    units = np.asarray(vectors, dtype=np.float64)
    units = units / np.maximum(np.linalg.norm(units, axis=1, keepdims=True), 1e-12)
    units -= units.mean(axis=0)
    _, singular, axes = np.linalg.svd(units, full_matrices=False)
    axes = axes[:2]
    axes *= np.where(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)] < 0, -1.0, 1.0)[:, None]
    points = np.zeros((len(units), 2))
    points[:, : len(axes)] = units @ axes.T
    return points, float((singular[:2] ** 2).sum() / max((singular**2).sum(), 1e-12))


def _curves(history: Sequence[Mapping[str, float]]) -> Iterator[str]:
    names = list(dict.fromkeys(name for measured in history for name in measured if name != "epoch"))
    lines = {
        name: [(float(row["epoch"]), float(row[name])) for row in history if "epoch" in row and name in row]
        for name in names
    }
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, points in lines.items():
        of_level = _OF_LEVEL.fullmatch(name)
        heading, line = (of_level[1], of_level[2]) if of_level else (name, name)
        panels.setdefault({"used": "used codes"}.get(heading, heading), {})[line] = points
    charts = []
    for heading, series in panels.items():
        chart = line_chart(
            series, label=f"{heading} by epoch", form=percent if heading == "collision_rate" else figure
        )
        if chart:
            words = heading.replace("_", " ")
            charts.append(panel(words[0].upper() + words[1:], chart, "", list(series) if len(series) > 1 else []))
    if charts:
        yield from section("While fitting", "Figures of all items, measured every few epochs.", charts)


def _levels(after: CodeDiagnostics) -> Iterator[str]:
    headings = ["level", "codes", "used", "dead", "entropy (bits)", "perplexity", "Gini", "largest"]
    headings += ["prefixes", "items each", "largest prefix"]
    yield '<section><h2>All figures by level</h2><div class="panel scroll"><table><thead><tr>'
    yield "".join(f"<th>{heading}</th>" for heading in headings) + "</tr></thead><tbody>"
    for number, level in enumerate(after.levels):
        cells = [_letter(number), count(level.codebook_size), count(level.used), count(level.dead)]
        cells += [f"{level.entropy:.2f}", f"{level.perplexity:,.1f}", f"{level.gini:.3f}", f"{level.largest:,}"]
        if number < len(after.prefixes):
            prefix = after.prefixes[number]
            cells += [f"{prefix.distinct:,}", f"{prefix.items_each:,.2f}", f"{prefix.largest:,}"]
        yield "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    yield "</tbody></table></div></section>"


def _letter(level: int) -> str:
    return chr(ord("a") + level)
