import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from llmrec.item_tokenizers.report.charts import (
    HEIGHT,
    LEFT,
    MAP_EDGE,
    MAP_HEIGHT,
    MAP_WIDTH,
    RIGHT,
    WIDTH,
    area_chart,
    bar_chart,
    count,
    figure,
    line_chart,
    percent,
    point_map,
)


def _parse(svg):
    return ElementTree.fromstring(svg)  # fails where a tag is open or a letter isn't escaped


def test_numbers_in_few_digits():
    assert [percent(value) for value in (0, 0.4269, 0.0614, 0.00067, 1e-7, 1)] == [
        "0%", "43%", "6.1%", "0.067%", "<0.001%", "100%",
    ]  # fmt: skip
    assert [count(value) for value in (0, 256, 8828, 12101, 2_500_000)] == ["0", "256", "8,828", "12.1k", "2.5M"]
    assert [figure(value) for value in (0.01234, 3, 250_000)] == ["0.0123", "3", "250k"]


def test_area_of_sorted_counts():
    svg = _parse(area_chart([1, 0, 4, 2], label="x"))
    points = [tuple(map(float, point.split(","))) for point in svg.find("polygon").get("points").split()]
    steps = points[1:-1]
    assert len(steps) == 8  # two corners a code
    heights = [HEIGHT - y for _, y in steps[::2]]
    base = HEIGHT - points[0][1]
    drawn = np.array(heights) - base
    assert drawn / drawn[0] == pytest.approx([1, 0.5, 0.25, 0], abs=0.01)
    dead = svg.find("rect")  # the last quarter
    assert float(dead.get("x")) == pytest.approx(LEFT + 0.75 * (WIDTH - LEFT - RIGHT), abs=0.1)
    assert _parse(area_chart([1, 1], label="x")).find("rect") is None
    many = _parse(area_chart(np.arange(20_000), label="x")).find("polygon").get("points").split()
    assert len(many) == 2 * 512 + 2


def test_bars_are_as_high_as_their_values():
    svg = _parse(bar_chart(["a", "<b>"], {"as fitted": [8, 2], "in use": [4, 0]}, label="x", muted=["in use"]))
    bars = svg.findall("rect")
    heights = np.array([float(bar.get("height")) for bar in bars])
    assert heights / heights[0] == pytest.approx([1, 0.5, 0.25, 0], abs=0.01)
    assert [bar.get("class") for bar in bars] == ["f0", "fm", "f0", "fm"]
    assert bars[2].find("title").text == "<b>, as fitted: 2"
    assert [text.text for text in svg.findall("text[@class='value']")] == ["8", "2"]  # grey ones by pointing only
    assert all(float(bar.get("y")) > 0 for bar in bars)


def test_bars_of_nothing():
    assert _parse(bar_chart(["a"], {"x": [0]}, label="x")).find("rect").get("height") == "0.0"


def test_lines():
    svg = _parse(line_chart({"loss": [(0, 4.0), (5, float("nan")), (10, 2.0)], "best": [(5, 3.0)]}, label="x"))
    loss, best = (line.get("points").split() for line in svg.findall("polyline"))
    assert [float(point.split(",")[0]) for point in loss] == [LEFT, WIDTH - RIGHT]  # what isn't finite is left out
    assert float(best[0].split(",")[0]) == pytest.approx((LEFT + WIDTH - RIGHT) / 2)
    ys = [float(point.split(",")[1]) for point in (loss[0], best[0], loss[1])]
    assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.15)
    assert line_chart({"loss": [(0, float("nan"))]}, label="x") == ""
    assert _parse(line_chart({"flat": [(1, 5.0), (2, 5.0)], "below": [(1, -3.0)]}, label="x")) is not None
    assert _parse(line_chart({"zero": [(1, 0.0)]}, label="x")) is not None


def test_lines_over_another_axis_with_events_and_rings():
    series = {"<loss>": [(2, 8.0), (4, 9.0), (6, 10.0)], "other": [(2, 9.0)]}
    arguments = {"axis": "cycle", "span": (0, 8), "from_zero": True, "form": lambda value: f"{value:g}!"}
    drawn = line_chart(
        series, label="x", events=[(6, "a < b"), (2, "on"), (9, "outside")], ring=(4, "best"), **arguments
    )
    svg = _parse(drawn)
    across = (WIDTH - LEFT - RIGHT) / 8
    first = [tuple(map(float, point.split(","))) for point in svg.find("polyline").get("points").split()]
    assert [x for x, _ in first] == pytest.approx([LEFT + 2 * across, LEFT + 4 * across, LEFT + 6 * across], abs=0.06)
    zero = float(next(text for text in svg.findall("text") if text.text == "0!").get("y")) - 4
    assert (zero - first[0][1]) / (zero - first[2][1]) == pytest.approx(0.8, abs=0.01)  # the axis starts at 0
    events = svg.findall("line[@class='event']")
    assert [float(event.get("x1")) for event in events] == pytest.approx([first[2][0], first[0][0]], abs=0.06)
    assert all(event.get("x1") == event.get("x2") for event in events)
    words = {text.text: text for text in svg.findall("text")}
    assert "outside" not in words
    assert (words["a < b"].get("text-anchor"), words["on"].get("text-anchor")) == ("end", "start")  # inward
    assert words["on"].get("x") == events[1].get("x1")
    (ring,) = svg.findall("circle[@class='l0 ring']")  # the other line has nothing there
    assert (float(ring.get("cx")), float(ring.get("cy"))) == first[1]
    assert ring.find("title").text == "<loss>, best: 9! at cycle 4"
    assert svg.find("text[@class='value']").text == "9!"
    assert svg.find("circle[@class='f0']/title").text == "<loss>: 10! at cycle 6"
    assert [text for text in words if text in ("0", "8", "cycle", "epoch")] == ["0", "8", "cycle"]


def test_what_a_ring_says_stays_in_the_plot():
    for y in (0.0, 0.5, 1.0):
        for x in (0, 1):
            lines = {"a": [(x, y)], "b": [(0, 0.0), (1, 1.0)]}
            text = _parse(line_chart(lines, label="x", ring=(x, "best"))).find("text[@class='value']")
            assert 12 < float(text.get("y")) < HEIGHT - 20
            assert text.get("text-anchor") == ("start", "end")[x]


def test_map_of_points():
    points = np.array([[0.0, 0.0], [1.0, 1.0], [0.5, 0.5], [0.0, 1.0]])
    hints = ['"a" & <b>', "two", "three", "four"]
    svg = point_map(points, np.array([7, 3, 3, 7]), hints, strong=[3, 7], label="x")
    groups = {group.get("class"): group for group in _parse(svg).findall("g")}
    assert [circle.find("title").text for circle in groups["f1"]] == ['"a" & <b>', "four"]
    corner = groups["f1"][0]
    assert (float(corner.get("cx")), float(corner.get("cy"))) == (MAP_EDGE, MAP_EDGE)
    centre = groups["f0"][1]
    assert (float(centre.get("cx")), float(centre.get("cy"))) == (MAP_WIDTH / 2, MAP_HEIGHT / 2)


def test_groups_without_a_strong_colour_are_pale_and_below():
    groups = np.repeat(np.arange(20), 3)
    svg = point_map(np.random.default_rng(0).normal(size=(60, 2)), groups, ["x"] * 60, strong=[19, 0], label="x")
    assert svg.count("<circle") == 60
    styles = [group.get("class") for group in _parse(svg).findall("g")]
    assert styles == ["pale"] * 18 + ["f1", "f0"]
    assert len(set(re.findall(r'class="pale" style="--h:(\d+)"', svg))) == 18
