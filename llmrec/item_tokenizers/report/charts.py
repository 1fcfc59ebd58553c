"""Charts of codes as SVG text: bars, lines, areas and a map of points. No script, no font, no library.

Colours are CSS variables (`--s0` to `--s7`, `--muted`, `--line`), so that the page decides on light and dark.
Knows numbers and labels only.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 300, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 16, 30
MAP_WIDTH, MAP_HEIGHT, MAP_EDGE = 1_100, 620, 12
MOST_POINTS = 512  # of an area: more can't be seen
NUM_COLOURS = 8

Format = Callable[[float], str]


def percent(value: float) -> str:
    """A share in two digits: 43%, 6.1%, 0.067%."""
    if value == 0 or value >= 0.0995:
        return f"{value:.0%}"
    return f"{100 * value:.2g}%" if value >= 1e-5 else "<0.001%"


def count(value: float) -> str:
    """A whole number, shortened from ten thousand up."""
    if abs(value) >= 999_500:
        return f"{value / 1e6:.3g}M"
    return f"{value / 1e3:.3g}k" if abs(value) >= 10_000 else f"{value:,.0f}"


def figure(value: float) -> str:
    """Any number in three digits."""
    return f"{value:.3g}" if abs(value) < 10_000 else count(value)


def area_chart(counts: Sequence[int] | np.ndarray, *, label: str) -> str:
    """Items per code, most used first, as a filled step curve; codes without items are marked.

    Args:
        counts: Items of each code, in any order.
        label: Read to those who can't see it.
    """
    heights = np.sort(np.asarray(counts))[::-1]
    size, used = len(heights), int(np.count_nonzero(heights))
    shown = heights[np.linspace(0, size - 1, min(size, MOST_POINTS)).astype(int)]
    top, marks = _axis(float(heights.max(initial=1)))
    plot_width = WIDTH - LEFT - RIGHT
    steps = [
        f"{LEFT + plot_width * position / len(shown):.1f},{_y(float(value), 0, top):.1f}"
        for number, value in enumerate(shown)
        for position in (number, number + 1)
    ]
    base = _y(0, 0, top)
    body = _grid(marks, 0, top, count)
    body += f'<polygon class="f0" points="{LEFT},{base:.1f} {" ".join(steps)} {WIDTH - RIGHT},{base:.1f}"/>'
    if used < size:
        left = LEFT + plot_width * used / size
        body += (
            f'<rect class="dead" x="{left:.1f}" y="{TOP}" width="{WIDTH - RIGHT - left:.1f}" height="{base - TOP}"/>'
        )
    body += _text(LEFT, HEIGHT - 10, "1") + _text(WIDTH - RIGHT, HEIGHT - 10, f"{size:,}", "end")
    body += _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, "codes, most used first", "middle")
    return _svg(body, label)


def bar_chart(
    categories: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    label: str,
    form: Format = count,
    muted: Sequence[str] = (),
) -> str:
    """Bars side by side, each with its value above it (grey ones show it when pointed at).

    Args:
        categories: Below the axis.
        series: Values of each category, by name.
        label: Read to those who can't see it.
        form: Writes a value.
        muted: Names of series that are drawn in grey.
    """
    top, marks = _axis(max((max(values, default=0.0) for values in series.values()), default=0.0))
    body = _grid(marks, 0, top, form)
    slot = (WIDTH - LEFT - RIGHT) / max(len(categories), 1)
    bar = min(slot * 0.8 / max(len(series), 1), 44)
    for place, category in enumerate(categories):
        middle = LEFT + slot * (place + 0.5)
        for number, (name, values) in enumerate(series.items()):
            x = middle + (number - len(series) / 2) * bar
            y = _y(values[place], 0, top)
            style = "fm" if name in muted else f"f{number}"
            hint = escape(f"{category}, {name}: {form(values[place])}")
            body += f'<rect class="{style}" x="{x + 1:.1f}" y="{y:.1f}" width="{bar - 2:.1f}"'
            body += f' height="{_y(0, 0, top) - y:.1f}"><title>{hint}</title></rect>'
            if name not in muted:
                body += _text(x + bar / 2, y - 4, form(values[place]), "middle", "value")
        body += _text(middle, HEIGHT - 10, category, "middle")
    return _svg(body, label)


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    label: str,
    form: Format = figure,
    axis: str = "epoch",
    span: tuple[float, float] | None = None,
    from_zero: bool = False,
    events: Sequence[tuple[float, str]] = (),
    ring: tuple[float, str] | None = None,
) -> str:
    """Lines over epochs, or over whatever `axis` names.

    Args:
        series: Points (epoch, value) by name, ascending; values that aren't finite are left out.
        label: Read to those who can't see it.
        form: Writes a value.
        axis: What runs to the right.
        span: First and last epoch of the axis, so that several charts can be compared; None: those of the points.
            Points must lie inside.
        from_zero: The axis of values starts at 0 however high the lines lie.
        events: Epoch and words of each upright line; those outside of the axis are left out.
        ring: Epoch and words (`best`): points at this epoch are ringed, each with its value beside it.

    Returns:
        The SVG; an empty text where no value is finite.
    """
    finite = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for name, points in series.items()
    }
    points = [point for line in finite.values() for point in line]
    if not points:
        return ""
    first, last = span or (min(x for x, _ in points), max(x for x, _ in points))
    low, high = min(y for _, y in points), max(y for _, y in points)
    if from_zero or 0 <= low < 0.6 * high or low == high:
        low = min(low, 0.0)
    top, marks = _axis(high, low)
    low = min(low, marks[0])
    body = _grid(marks, low, top, form)
    across = (WIDTH - LEFT - RIGHT) / ((last - first) or 1.0)
    for x, words in events:
        if first <= x <= last:
            body += _event(LEFT + (x - first) * across, words)
    for number, (name, line) in enumerate(finite.items()):
        places = [(LEFT + (x - first) * across, _y(y, low, top)) for x, y in line]
        style = number % NUM_COLOURS
        body += f'<polyline class="l{style}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}">'
        body += f"<title>{escape(name)}</title></polyline>"
        if places:
            body += f'<circle class="f{style}" cx="{places[-1][0]:.1f}" cy="{places[-1][1]:.1f}" r="3">'
            body += f"<title>{escape(f'{name}: {form(line[-1][1])} at {axis} {line[-1][0]:g}')}</title></circle>"
        for (x, y), (across_x, down_y) in zip(line, places, strict=True):
            if ring is not None and x == ring[0]:
                hint = f"{name}, {ring[1]}: {form(y)} at {axis} {x:g}"
                body += _ring(across_x, down_y, style, form(y), hint)
    body += _text(LEFT, HEIGHT - 10, f"{first:g}") + _text(WIDTH - RIGHT, HEIGHT - 10, f"{last:g}", "end")
    body += _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, axis, "middle")
    return _svg(body, label)


def point_map(
    points: np.ndarray, groups: np.ndarray, hints: Sequence[str], *, strong: Sequence[int], label: str
) -> str:
    """Points coloured by group: some groups in strong colours and on top, the others pale, in a hue of their own.

    Args:
        points: float [n, 2], any scale; each axis is stretched to its range.
        groups: int [n].
        hints: Shown when pointed at, n texts (escaped here).
        strong: Groups in the colours `--s0`, `--s1`, ...; eight at most.
        label: Read to those who can't see it.
    """
    low, span = points.min(axis=0), np.maximum(np.ptp(points, axis=0), 1e-12)
    room = np.array([MAP_WIDTH - 2 * MAP_EDGE, MAP_HEIGHT - 2 * MAP_EDGE])
    places = MAP_EDGE + (points - low) / span * room
    body = []
    for name in sorted(np.unique(groups).tolist(), key=lambda name: (name in strong, name)):
        if name in strong:
            body.append(f'<g class="f{strong.index(name)}">')
        else:
            body.append(f'<g class="pale" style="--h:{name * 137.508 % 360:.0f}">')  # golden angle: far apart in hue
        radius = 4.5 if name in strong else 3.5
        for row in np.flatnonzero(groups == name).tolist():
            x, y = places[row]
            body.append(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="{radius}"><title>{escape(hints[row])}</title></circle>')
        body.append("</g>")
    return _svg("".join(body), label, MAP_WIDTH, MAP_HEIGHT, "map")


def _svg(body: str, label: str, width: int = WIDTH, height: int = HEIGHT, style: str = "chart") -> str:
    start = f'<svg class="{style}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
    return f"{start}{body}</svg>"


def _text(x: float, y: float, text: str, anchor: str = "start", style: str = "") -> str:
    place = f' class="{style}"' if style else ""
    return f'<text{place} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _event(x: float, words: str) -> str:
    """An upright line over the whole plot, with its words above the plot, on the side that has room."""
    line = f'<line class="event" style="stroke:var(--muted);stroke-dasharray:3 3" x1="{x:.1f}" x2="{x:.1f}"'
    line += f' y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    return line + _text(x, TOP - 4, words, _inward(x))


def _ring(x: float, y: float, style: int, value: str, hint: str) -> str:
    circle = f'<circle class="l{style} ring" style="fill:none;stroke-width:2" cx="{x:.1f}" cy="{y:.1f}" r="5.5">'
    below = y - 9 < TOP + 8  # above it the words of events would be in the way
    words = _text(x, y + 19 if below else y - 9, value, _inward(x), "value")
    return f"{circle}<title>{escape(hint)}</title></circle>{words}"


def _inward(x: float) -> str:
    """The anchor of a text that starts at x and must not leave the plot."""
    return "start" if x < (LEFT + WIDTH - RIGHT) / 2 else "end"


def _y(value: float, low: float, top: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / ((top - low) or 1.0))


def _axis(high: float, low: float = 0.0) -> tuple[float, list[float]]:
    """The end of an axis that holds `high`, and three to six round values on it."""
    span = (high - low) or abs(high) or 1.0
    rough = span / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    marks = [number * step for number in range(start, max(end, start + 1) + 1)]
    return marks[-1], marks


def _grid(marks: Sequence[float], low: float, top: float, form: Format) -> str:
    lines = []
    for mark in marks:
        y = _y(mark, low, top)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(_text(LEFT - 6, y + 4, form(mark), "end"))
    return "".join(lines)
