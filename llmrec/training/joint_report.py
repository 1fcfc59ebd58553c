"""What a joint training measured, cycle by cycle: its file and a page that shows it in verdicts, curves and a table.

A record is a mapping of one cycle: "cycle" counts from 0, "epoch" is the number of recommender epochs done at its end,
and a key is absent where nothing was measured. Knows records only: neither the trainer nor the item tokenizer.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from llmrec._version import __version__
from llmrec.errors import DataError
from llmrec.files import atomic_file, check_format, read_json, write_json
from llmrec.item_tokenizers.report.charts import figure, line_chart, percent
from llmrec.item_tokenizers.report.parts import cards, panel, section
from llmrec.item_tokenizers.report.style import PAGE, STYLE
from llmrec.item_tokenizers.report.verdicts import Verdict

FORMAT_VERSION = 1
ALIGNMENT_ON = "alignment on"
EPOCH_TOLERANCE = 1e-3  # epochs are counted in fractions, and rounded in the records

_TERM = "tokenizer_"
_NOT_A_TERM = ("tokenizer_sia", "tokenizer_psa", "tokenizer_seconds")
_SHARES = ("share_changed", "collision_rate", "utilisation")
_FIRST_COLUMNS = ("cycle", "epoch", "aligned", "eval_ndcg@10", "eval_recall@10", "eval_loss", *_SHARES)

Record = Mapping[str, Any]
Point = tuple[float, float]


def write_history(path: str | os.PathLike[str], cycles: Sequence[Record]) -> None:
    """Writes the records of all cycles so far as JSON, whole or not at all.

    Numbers that aren't finite become null, which other readers of JSON understand. Keys whose value is None count as
    not measured and are left out.
    """
    written = [{key: _to_json(value) for key, value in record.items() if value is not None} for record in cycles]
    write_json(path, {"format_version": FORMAT_VERSION, "cycles": written})


def read_history(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads what `write_history` wrote; a number that wasn't finite comes back as NaN.

    Raises:
        MissingPartError: There is no such file.
        DataError: It is not the history of a joint training, or of a later llmrec.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a JSON {type(content).__name__}, not the history of a joint training")
    check_format(content, FORMAT_VERSION, path)
    cycles = content.get("cycles")
    if not isinstance(cycles, list) or not all(isinstance(record, dict) for record in cycles):
        raise DataError(
            f"{path} has no list of records under 'cycles': it is not the history of a joint training; give the path"
            " of its joint_history.json"
        )
    return [{key: _from_json(value) for key, value in record.items()} for record in cycles]


def write_joint_report(
    path: str | os.PathLike[str], cycles: Sequence[Record], *, title: str, best_epoch: float | None = None
) -> None:
    """Writes the page, whole or not at all.

    It needs no script, font or network and follows the reader's light or dark setting. Charts and verdicts about what
    no record has are left out.

    Args:
        path: The .html file.
        cycles: The records; those without a "cycle" are numbered by their place.
        title: Heading: recommender, item tokenizer and data set, say.
        best_epoch: Recommender epochs done at the evaluation that was chosen; its cycle is marked. None, or an epoch
            that no cycle reached: the cycle of the highest NDCG@10 is marked, the first of equals.
    """
    records = _numbered(cycles)
    chosen = _chosen(records, best_epoch)
    sections = [*_headline(title, records, judge(cycles, best_epoch=best_epoch))]
    if records:
        sections += [*_charts(records, None if chosen is None else chosen["cycle"]), *_table(records)]
    page = PAGE.format(title=escape(title), style=STYLE, body="\n".join(sections), version=escape(__version__))
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")


def judge(cycles: Sequence[Record], *, best_epoch: float | None = None) -> tuple[Verdict, ...]:
    """What the records say in words, with what to do about it; nothing about what wasn't measured.

    Args:
        cycles: The records.
        best_epoch: As in `write_joint_report`.
    """
    records = _numbered(cycles)
    judged = (_broken(records), _best(records, best_epoch), _changed(records), _collisions(records), _in_use(records))
    return tuple(verdict for verdict in judged if verdict is not None)


def _broken(records: Sequence[Record]) -> Verdict | None:
    for record in records:
        names = [name for name, value in record.items() if _is_broken(value)]
        if names:
            return Verdict(
                "Not a number", f"cycle {record['cycle']:g}", "bad",
                f"The first cycle with figures that aren't finite: {', '.join(names)}. The curves leave them out.",
                "Lower learning_rate or tokenizer_learning_rate, or train in bfloat16 or float32 instead of float16.",
            )  # fmt: skip
    return None


def _is_broken(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_is_broken(part) for part in value)
    return isinstance(value, float) and not math.isfinite(value)


def _best(records: Sequence[Record], best_epoch: float | None) -> Verdict | None:
    points = _points(records, "eval_ndcg@10")
    chosen = _chosen(records, best_epoch)
    if not points or chosen is None:
        return None
    value, cycle, epoch = _number(chosen, "eval_ndcg@10"), chosen["cycle"], _number(chosen, "epoch")
    meaning = f"On the validation split, at the end of cycle {cycle:g}"
    meaning += f", after epoch {epoch:g} of the recommender." if math.isfinite(epoch) else "."
    if best_epoch is not None and epoch > best_epoch + EPOCH_TOLERANCE:
        meaning += f" Chosen was the evaluation after epoch {best_epoch:g}, of which no figure is kept here."
    best_cycle, highest = max(points, key=lambda point: point[1])
    if highest > value:
        meaning += f" The highest is {figure(highest)}, of cycle {best_cycle:g}."
    if points[-1][0] != cycle:
        meaning += f" The last measured is {figure(points[-1][1])}, of cycle {points[-1][0]:g}."
    if highest <= 0:
        remedy = "No wanted item was ever among the first ten: see whether the losses fall, and train longer."
        return Verdict("Best NDCG@10", figure(value), "bad", meaning, remedy)
    remedy = ""
    if len(points) == 1:
        remedy = "One evaluation says nothing about the course: train longer."
    elif best_cycle == points[-1][0]:
        remedy = "It was still rising at the end: more num_train_epochs may give more."
    elif best_cycle == points[0][0]:
        remedy = "No later cycle was better: compare with train_tokenizer: false, lower tokenizer_learning_rate."
    return Verdict("Best NDCG@10", figure(value), "look" if remedy else "good", meaning, remedy)


def _changed(records: Sequence[Record]) -> Verdict | None:
    points = _points(records, "share_changed")
    if not points:
        return None
    cycle, last = points[-1]
    quarter = points[-math.ceil(len(points) / 4) :]
    meaning = f"Items that got other codes in the last cycle ({cycle:g})."
    if len(points) > 1:
        meaning += f" The mean of all {len(points)} cycles is {_share(sum(y for _, y in points) / len(points))}."
        if all(y == 0 for _, y in points):
            return Verdict(
                "Codes changed", "0%", "look", f"No item got other codes in any of {len(points)} cycles.",
                "Raise tokenizer_learning_rate, unless the item tokenizer was meant to stay as it is.",
            )  # fmt: skip
    if len(points) >= 4 and all(y > 0.5 for _, y in quarter):
        meaning += f" More than half changed in every cycle from {quarter[0][0]:g} on: the codes do not settle."
        return Verdict("Codes changed", _share(last), "bad", meaning, "Lower tokenizer_learning_rate.")
    if last > 0.5:
        meaning += " That is more than half, and the recommender learns anew what they mean."
        return Verdict("Codes changed", _share(last), "look", meaning, "Lower tokenizer_learning_rate if it stays so.")
    return Verdict("Codes changed", _share(last), "good", meaning)


def _collisions(records: Sequence[Record]) -> Verdict | None:
    points = _points(records, "collision_rate")
    if not points:
        return None
    (start, first), (end, last) = points[0], points[-1]
    meaning = "Items whose codes another item had first, before the uniqueness policy"
    if len(points) == 1:
        return Verdict("Collisions", _share(last), "good", f"{meaning}, in cycle {end:g}.")
    meaning += f": from {_share(first)} in cycle {start:g} to {_share(last)} in cycle {end:g}."
    remedy = "Lower tokenizer_learning_rate or the alignment weights: items become harder to tell apart."
    if _grew(first, last):
        return Verdict("Collisions", _share(last), "bad", f"{meaning} That is growth by more than half.", remedy)
    peak_cycle, peak = max(points, key=lambda point: point[1])
    if _grew(first, peak):
        meaning += f" In between they grew by more than half, to {_share(peak)} in cycle {peak_cycle:g}."
        return Verdict("Collisions", _share(last), "look", meaning, "See what the best cycle had before using it.")
    return Verdict("Collisions", _share(last), "good", meaning)


def _grew(first: float, later: float) -> bool:
    """By more than half, and by more than an item in a thousand: from 0, any growth is by more than half."""
    return later > 1.5 * first and later - first > 0.001


def _in_use(records: Sequence[Record]) -> Verdict | None:
    levels = {_letter(level): points for level, points in enumerate(_levels(records)) if points}
    if not levels:
        return None
    worst = min(levels, key=lambda name: levels[name][-1][1])
    value = _share(levels[worst][-1][1])
    meaning = f"Share of its codes that level {worst}, which uses fewest, has in use at the end."
    low = [name for name, points in levels.items() if points[-1][1] < 0.5]
    fell = [name for name in low if any(y >= 0.5 for _, y in levels[name])]
    dipped = [name for name, points in levels.items() if any(y < 0.5 for _, y in points)]
    if fell:
        meaning += f" {_name_levels(fell)} fell under 50%."
        remedy = "Lower tokenizer_learning_rate or the alignment weights."
        return Verdict("Codes used", value, "bad", meaning, remedy)
    if low:
        meaning += f" {_name_levels(low)} never had 50%."
        return Verdict("Codes used", value, "look", meaning, "Use a smaller codebook, or fit the item tokenizer anew.")
    if dipped:
        meaning += f" {_name_levels(dipped)} had been under 50% before."
        return Verdict("Codes used", value, "look", meaning, "See what the best cycle had before using it.")
    return Verdict("Codes used", value, "good", meaning)


def _name_levels(letters: Sequence[str]) -> str:
    return f"Level{'s' if len(letters) > 1 else ''} {', '.join(letters)}"


def _headline(title: str, records: Sequence[Record], verdicts: Sequence[Verdict]) -> Iterator[str]:
    yield f"<header><h1>{escape(title)}</h1><p>{escape(_summary(records))}</p></header>"
    yield from cards(verdicts)


def _summary(records: Sequence[Record]) -> str:
    if not records:
        return "Joint training of item tokenizer and recommender. No cycle has ended yet."
    text = f"Joint training of item tokenizer and recommender: {len(records):,} cycle{'s' if len(records) > 1 else ''}"
    epochs = [epoch for _, epoch in _points(records, "epoch")]
    text += f", {max(epochs):g} epochs of the recommender." if epochs else "."
    known = _alignment(records)
    turns = _alignment_on(records)
    if turns:
        text += f" Aligned from cycle {' and again from '.join(f'{cycle:g}' for cycle in turns)} on."
    elif known:
        text += " Aligned from the first cycle on." if known[0][1] else " The alignment weights were never on."
    return text


def _charts(records: Sequence[Record], best: float | None) -> Iterator[str]:
    cycles = [record["cycle"] for record in records]
    span = (min(cycles), max(cycles))
    events = [(cycle, ALIGNMENT_ON) for cycle in _alignment_on(records)]

    def draw(
        heading: str, series: Mapping[str, Sequence[Point]], facts: str = "", share: bool = False, ring: bool = False
    ) -> str:
        lines = {name: points for name, points in series.items() if points}
        chart = line_chart(
            lines,
            label=f"{heading} by cycle",
            form=percent if share else _form(lines),
            axis="cycle",
            span=span,
            from_zero=share,
            events=events,
            ring=(best, "best") if ring and best is not None else None,
        )
        return panel(heading, chart, facts, list(lines) if len(series) > 1 else ()) if chart else ""

    def of(names: Mapping[str, str]) -> dict[str, list[Point]]:
        return {name: _points(records, key) for key, name in names.items()}

    yield from section(
        "Recommender",
        "Means of each cycle's epochs, and its last evaluation on the validation split."
        + ("" if best is None else f" Ringed: cycle {best:g}, the best."),
        [
            draw(
                "Validation NDCG@10 and Recall@10",
                of({"eval_ndcg@10": "NDCG@10", "eval_recall@10": "Recall@10"}),
                ring=True,
            ),
            draw("Recommender loss", of({"recommender_loss": "training", "eval_loss": "validation"})),
            draw("Seconds of a cycle", *_seconds(records)),
        ],
    )
    levels = {_letter(level): points for level, points in enumerate(_levels(records))}
    yield from section(
        "Codes",
        "Of all items, as encoded in each cycle and before the uniqueness policy.",
        [
            draw("Items whose codes changed", of({"share_changed": "changed"}), share=True),
            draw("Collision rate", of({"collision_rate": "collisions"}), share=True),
            draw("Codes in use by level", levels, share=True),
        ],
    )
    both = {"tokenizer": "item tokenizer's epochs", "recommender": "recommender's epochs"}
    yield from section(
        "Alignment",
        "Mean losses without their weights, in the epochs of either side. Lower: the two sides agree more.",
        [
            draw("Sequence-item alignment", of({f"{side}_sia": name for side, name in both.items()})),
            draw("Preference-semantic alignment", of({f"{side}_psa": name for side, name in both.items()})),
        ],
    )
    terms = [name for name in _names(records) if name.startswith(_TERM) and name not in _NOT_A_TERM]
    yield from section(
        "Item tokenizer's own loss",
        "Mean of each term over its epochs.",
        [draw(_words(name.removeprefix(_TERM)), of({name: name})) for name in terms],
    )


def _seconds(records: Sequence[Record]) -> tuple[dict[str, list[Point]], str]:
    """Seconds of a cycle on either side, and the item tokenizer's share of all in words."""
    tokenizer = []
    for record in records:
        parts = [_number(record, name) for name in ("tokenizer_seconds", "encoding_seconds")]
        found = [seconds for seconds in parts if math.isfinite(seconds)]
        if found:
            tokenizer.append((record["cycle"], sum(found)))
    recommender = _points(records, "recommender_seconds")
    series = {"item tokenizer and encoding": tokenizer, "recommender": recommender}
    own, total = sum(y for _, y in tokenizer), sum(y for points in series.values() for _, y in points)
    facts = (
        f"item tokenizer and encoding: {percent(own / total)} of all" if total and tokenizer and recommender else ""
    )
    return series, facts


def _table(records: Sequence[Record]) -> Iterator[str]:
    names = _names(records)
    widths = {
        name: max((len(record[name]) for record in records if isinstance(record.get(name), list)), default=0)
        for name in names
    }
    yield "<section><h2>All figures</h2><p>Losses are means without weights. -: not measured.</p>"
    yield '<div class="panel scroll"><table><thead><tr>'
    for name in names:
        words = [f"{_words(name)} {_letter(level)}" for level in range(widths[name])] or [_words(name)]
        yield "".join(f"<th>{escape(word)}</th>" for word in words)
    yield "</tr></thead><tbody>"
    for record in records:
        cells = []
        for name in names:
            value = record.get(name)
            parts = list(value) if isinstance(value, list) else [value]
            parts += [None] * (max(widths[name], 1) - len(parts))
            cells += [_cell(name, part) for part in parts]
        yield "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
    yield "</tbody></table></div></section>"


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{value}"
    if name in ("cycle", "epoch"):
        return f"{value:g}"
    return _share(value) if name in _SHARES else figure(value)


def _form(series: Mapping[str, Sequence[Point]]) -> Callable[[float], str]:
    """Three digits, or as many as tell the values of a narrow range apart (at most six)."""
    values = [y for points in series.values() for _, y in points]
    span, size = max(values, default=0.0) - min(values, default=0.0), max(map(abs, values), default=0.0)
    digits = min(math.ceil(math.log10(size / span)) + 2, 6) if span > 0 else 3
    return figure if digits <= 3 else lambda value: f"{value:.{digits}g}"


def _numbered(cycles: Sequence[Record]) -> list[dict[str, Any]]:
    """The records by their cycle, ascending, each with a finite "cycle"; None values are left out."""
    records = []
    for place, record in enumerate(cycles):
        kept = {name: value for name, value in record.items() if value is not None}
        cycle = _number(kept, "cycle")
        records.append({**kept, "cycle": cycle if math.isfinite(cycle) else float(place)})
    return sorted(records, key=lambda record: record["cycle"])


def _chosen(records: Sequence[Record], best_epoch: float | None) -> Record | None:
    """The record of `best_epoch`, else of the highest NDCG@10; always one with an NDCG@10."""
    measured = [record for record in records if math.isfinite(_number(record, "eval_ndcg@10"))]
    if best_epoch is not None:
        for record in measured:
            if _number(record, "epoch") >= best_epoch - EPOCH_TOLERANCE:
                return record
    return max(measured, key=lambda record: float(record["eval_ndcg@10"]), default=None)


def _alignment(records: Sequence[Record]) -> list[tuple[float, bool]]:
    return [(record["cycle"], record["aligned"]) for record in records if isinstance(record.get("aligned"), bool)]


def _alignment_on(records: Sequence[Record]) -> list[float]:
    """Cycles in which the alignment weights came on; one that was aligned from the start doesn't count."""
    return [cycle for (_, before), (cycle, now) in pairwise(_alignment(records)) if now and not before]


def _levels(records: Sequence[Record]) -> list[list[Point]]:
    """Share of the codes in use by cycle, one list a level."""
    lists = [(record["cycle"], _numbers(record.get("utilisation"))) for record in records]
    return [
        [(cycle, shares[level]) for cycle, shares in lists if level < len(shares) and math.isfinite(shares[level])]
        for level in range(max((len(shares) for _, shares in lists), default=0))
    ]


def _points(records: Sequence[Record], name: str) -> list[Point]:
    values = [(record["cycle"], _number(record, name)) for record in records]
    return [(cycle, value) for cycle, value in values if math.isfinite(value)]


def _names(records: Sequence[Record]) -> list[str]:
    """Every name of any record: the first columns first, the others in order of appearance."""
    found = dict.fromkeys(name for record in records for name in record)
    return [name for name in _FIRST_COLUMNS if name in found] + [name for name in found if name not in _FIRST_COLUMNS]


def _number(record: Record, name: str) -> float:
    """The number of that name, NaN where there is none."""
    numbers = _numbers(record.get(name))
    return numbers[0] if len(numbers) == 1 else math.nan


def _numbers(value: Any) -> list[float]:
    """All numbers of a value, places without one in a list as NaN; truth values aren't numbers."""
    if isinstance(value, list | tuple):
        return [_numbers(part)[0] if _numbers(part) else math.nan for part in value]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


def _to_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [_to_json(part) for part in value] if isinstance(value, list | tuple) else value


def _from_json(value: Any) -> Any:
    if value is None:
        return math.nan
    return [_from_json(part) for part in value] if isinstance(value, list) else value


def _share(value: float) -> str:
    return "0%" if value == 0 else f"{value:.2%}" if value < 0.1 else f"{value:.1%}"


def _words(name: str) -> str:
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]


def _letter(level: int) -> str:
    return chr(ord("a") + level)
