import json
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from llmrec.errors import DataError, MissingPartError
from llmrec.item_tokenizers.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH
from llmrec.training.joint_report import judge, read_history, write_history, write_joint_report

PLOT = WIDTH - LEFT - RIGHT


def _history(length=12, **changes):
    """Cycles as a good training leaves them; `changes` are functions of the cycle, None leaves a key out."""
    made = {
        "epoch": lambda cycle: cycle + 1,
        "share_changed": lambda cycle: 0.4 / (cycle + 1),
        "collision_rate": lambda cycle: 0.02 - 0.001 * cycle,
        "largest_group": lambda cycle: 3,
        "utilisation": lambda cycle: [0.9, 1.0, 0.8],
        "tokenizer_quantization": lambda cycle: 0.5 / (cycle + 1),
        "tokenizer_reconstruction": lambda cycle: 4.201 + 0.0008 * cycle,
        "tokenizer_sia": lambda cycle: 0.2,
        "tokenizer_psa": lambda cycle: 3.0,
        "recommender_loss": lambda cycle: 5.0 - 0.1 * cycle,
        "recommender_sia": lambda cycle: 0.4,
        "recommender_psa": lambda cycle: 3.5,
        "aligned": lambda cycle: cycle >= 4,
        "tokenizer_seconds": lambda cycle: 3.0,
        "encoding_seconds": lambda cycle: 1.0,
        "recommender_seconds": lambda cycle: 16.0,
        "eval_ndcg@10": lambda cycle: 0.03 - 0.001 * abs(cycle - 8),
        "eval_recall@10": lambda cycle: 0.06,
        "eval_loss": lambda cycle: 4.0,
    }
    made.update(changes)
    return [
        {"cycle": cycle} | {name: found for name, make in made.items() if (found := make(cycle)) is not None}
        for cycle in range(length)
    ]


def _series(name, values):
    """A good history in which one figure is as given; None: not measured in that cycle."""
    return _history(len(values), **{name: lambda cycle: values[cycle]})


class Page:
    """The page's charts by heading, its verdicts by name and the rows of its table."""

    def __init__(self, path):
        self.text = path.read_text(encoding="utf-8")
        body = ElementTree.fromstring(self.text[self.text.index("<main>") : self.text.index("</main>") + 7])
        self.body = body
        self.headings = [heading.text for heading in body.iter("h2")]
        self.cards = {card.find("h3").text: card for card in body.iter("article")}
        panels = [panel for panel in body.iter("div") if panel.get("class") == "panel"]
        self.charts = {panel.find("h3").text: panel.find("svg") for panel in panels}
        self.legends = {
            panel.find("h3").text: [
                (entry.find("i").get("class"), entry.find("i").tail) for entry in panel.iter("span")
            ]
            for panel in panels
        }
        self.facts = {panel.find("h3").text: panel.findtext("p[@class='facts']") for panel in panels}
        self.columns = [cell.text for cell in body.iter("th")]
        rows = [[cell.text for cell in row.iter("td")] for row in body.iter("tr")]
        self.rows = [dict(zip(self.columns, row, strict=True)) for row in rows if row]

    def lines(self, heading):
        """Corners of each line of a chart, by name."""
        return {
            line.find("title").text: [tuple(map(float, point.split(","))) for point in line.get("points").split()]
            for line in self.charts[heading].findall("polyline")
        }


def _page(path, cycles, **arguments):
    write_joint_report(path / "joint_report.html", cycles, title=arguments.pop("title", "ETEGRec"), **arguments)
    return Page(path / "joint_report.html")


def _verdict(cycles, name, **arguments):
    return {verdict.name: verdict for verdict in judge(cycles, **arguments)}[name]


def test_history_goes_through_its_file(tmp_path):
    path = tmp_path / "joint_history.json"
    cycles = _history(3)
    write_history(path, cycles)
    assert read_history(path) == cycles
    assert json.loads(path.read_text())["format_version"] == 1
    write_history(path, [])
    assert read_history(path) == []
    assert [file.name for file in tmp_path.iterdir()] == ["joint_history.json"]


def test_history_with_what_is_not_finite_is_still_json(tmp_path):
    path = tmp_path / "joint_history.json"
    write_history(
        path, [{"cycle": 0, "recommender_loss": math.nan, "eval_loss": None, "utilisation": (0.5, math.inf)}]
    )

    def refuse(name):
        raise AssertionError(name)

    written = json.loads(path.read_text(), parse_constant=refuse)["cycles"]
    assert written == [{"cycle": 0, "recommender_loss": None, "utilisation": [0.5, None]}]
    (read,) = read_history(path)
    assert list(read) == ["cycle", "recommender_loss", "utilisation"]
    assert math.isnan(read["recommender_loss"])
    assert read["utilisation"][0] == 0.5
    assert math.isnan(read["utilisation"][1])
    write_history(path, [read])  # again the same
    assert json.loads(path.read_text())["cycles"] == written


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds a JSON list, not the history"),
        ('{"cycles": []}', "no format_version"),
        ('{"format_version": 2, "cycles": []}', "upgrade llmrec"),
        ('{"format_version": 1}', "no list of records under 'cycles'"),
        ('{"format_version": 1, "cycles": [3]}', "no list of records under 'cycles'"),
        ("{", "not valid JSON"),
    ],
)
def test_a_file_that_is_no_history(tmp_path, content, message):
    path = tmp_path / "joint_history.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_history(path)


def test_a_missing_history(tmp_path):
    with pytest.raises(MissingPartError, match="joint_history"):
        read_history(tmp_path / "joint_history.json")


def test_the_whole_page(tmp_path):
    page = _page(tmp_path, _history(), title="<b>ETEGRec</b> & co")
    assert page.body.findtext(".//h1") == "<b>ETEGRec</b> & co"
    assert "<title>&lt;b&gt;ETEGRec&lt;/b&gt; &amp; co</title>" in page.text
    assert not re.search(r"<script|<link|src=|href=|url\(|@import", page.text)
    assert "prefers-color-scheme:dark" in page.text
    assert page.headings == ["Recommender", "Codes", "Alignment", "Item tokenizer's own loss", "All figures"]
    assert list(page.charts) == [
        *("Validation NDCG@10 and Recall@10", "Recommender loss", "Seconds of a cycle"),
        *("Items whose codes changed", "Collision rate", "Codes in use by level"),
        *("Sequence-item alignment", "Preference-semantic alignment", "Quantization", "Reconstruction"),
    ]
    summary = page.body.findtext("header/p")
    assert "12 cycles, 12 epochs of the recommender. Aligned from cycle 4 on." in summary


def test_points_lie_where_the_figures_are(tmp_path):
    page = _page(tmp_path, _history(5, collision_rate=lambda cycle: (0.0, 0.01, 0.04, 0.02, 0.03)[cycle]))
    (line,) = page.lines("Collision rate").values()
    assert [x for x, _ in line] == pytest.approx([LEFT + PLOT * cycle / 4 for cycle in range(5)], abs=0.06)
    height = HEIGHT - TOP - BOTTOM  # 0.04 is the top mark
    expected = [TOP + height * (1 - share) for share in (0.0, 0.25, 1.0, 0.5, 0.75)]
    assert [y for _, y in line] == pytest.approx(expected, abs=0.06)
    seconds = page.lines("Seconds of a cycle")  # 16 against 3 + 1, top mark 20
    assert {y for _, y in seconds["recommender"]} == {round(TOP + height * (1 - 16 / 20), 1)}
    assert {y for _, y in seconds["item tokenizer and encoding"]} == {round(TOP + height * (1 - 4 / 20), 1)}
    assert page.facts["Seconds of a cycle"] == "item tokenizer and encoding: 20% of all"


def test_shares_start_at_zero(tmp_path):
    page = _page(tmp_path, _history(2, utilisation=lambda cycle: [0.99 + 0.005 * cycle]))
    texts = [text.text for text in page.charts["Codes in use by level"].findall("text")]
    assert [text for text in texts if text.endswith("%")] == ["0%", "25%", "50%", "75%", "100%"]


def test_two_sides_and_levels_are_told_apart(tmp_path):
    page = _page(tmp_path, _history(3, utilisation=lambda cycle: [0.5, 1.0 - 0.25 * cycle]))
    sides = page.lines("Sequence-item alignment")
    tokenizer, recommender = sides["item tokenizer's epochs"], sides["recommender's epochs"]
    base = HEIGHT - BOTTOM
    assert (base - tokenizer[0][1]) / (base - recommender[0][1]) == pytest.approx(0.5, abs=0.01)  # 0.2 and 0.4
    assert page.legends["Sequence-item alignment"] == [
        ("b0", "item tokenizer's epochs"),
        ("b1", "recommender's epochs"),
    ]
    levels = page.lines("Codes in use by level")
    assert list(levels) == ["a", "b"]
    assert len({y for _, y in levels["a"]}) == 1
    assert levels["b"][0][1] < levels["b"][1][1] < levels["b"][2][1]  # falls
    assert levels["b"][2] == levels["a"][2]


def test_a_line_where_the_alignment_came_on(tmp_path):
    page = _page(tmp_path, _history(9))
    for heading, chart in page.charts.items():
        (event,) = chart.findall("line[@class='event']")
        assert float(event.get("x1")) == pytest.approx(LEFT + PLOT / 2, abs=0.06), heading  # cycle 4 of 0 to 8
        assert [text.text for text in chart.findall("text")].count("alignment on") == 1


@pytest.mark.parametrize(
    ("aligned", "told"),
    [
        ([True, True, True], "Aligned from the first cycle on."),
        ([False, False, False], "The alignment weights were never on."),
        ([None, None, None], None),
    ],
)
def test_no_line_where_the_alignment_did_not_come_on(tmp_path, aligned, told):
    page = _page(tmp_path, _series("aligned", aligned))
    assert 'class="event"' not in page.text
    summary = page.body.findtext("header/p")
    assert summary.endswith("of the recommender." if told is None else told)


def test_alignment_that_came_on_twice(tmp_path):
    page = _page(tmp_path, _series("aligned", [False, True, None, True, False, True]))
    assert "Aligned from cycle 1 and again from 5 on." in page.body.findtext("header/p")
    assert len(page.charts["Collision rate"].findall("line[@class='event']")) == 2


def test_the_best_cycle_is_ringed(tmp_path):
    page = _page(tmp_path, _history())
    chart = page.charts["Validation NDCG@10 and Recall@10"]
    rings = [circle for circle in chart.findall("circle") if "ring" in circle.get("class")]
    lines = page.lines("Validation NDCG@10 and Recall@10")
    places = [(float(ring.get("cx")), float(ring.get("cy"))) for ring in rings]
    assert places == [lines["NDCG@10"][8], lines["Recall@10"][8]]
    assert [ring.find("title").text for ring in rings] == [
        "NDCG@10, best: 0.03 at cycle 8", "Recall@10, best: 0.06 at cycle 8",
    ]  # fmt: skip
    assert "ring" not in {circle.get("class")[-4:] for circle in page.charts["Recommender loss"].findall("circle")}


def test_the_best_is_the_one_that_was_chosen(tmp_path):
    page = _page(tmp_path, _history(), best_epoch=4)  # the end of cycle 3
    ring = page.charts["Validation NDCG@10 and Recall@10"].find("circle[@class='l0 ring']")
    assert ring.find("title").text == "NDCG@10, best: 0.025 at cycle 3"
    verdict = _verdict(_history(), "Best NDCG@10", best_epoch=4)
    assert verdict.value == "0.025"
    assert "cycle 3, after epoch 4 of" in verdict.meaning
    assert "The highest is 0.03, of cycle 8." in verdict.meaning
    assert "Chosen was" not in verdict.meaning
    three_a_cycle = _history(epoch=lambda cycle: 3 * (cycle + 1))
    verdict = _verdict(three_a_cycle, "Best NDCG@10", best_epoch=25)
    assert "cycle 8, after epoch 27 of" in verdict.meaning
    assert "Chosen was the evaluation after epoch 25" in verdict.meaning
    rounded = _history(epoch=lambda cycle: round((cycle + 1) / 3, 4))  # 0.3333 is the end of cycle 0
    verdict = _verdict(rounded, "Best NDCG@10", best_epoch=1 / 3)
    assert "cycle 0, after epoch 0.3333 of" in verdict.meaning
    assert "Chosen was" not in verdict.meaning
    assert _verdict(_history(), "Best NDCG@10", best_epoch=1000).value == "0.03"  # of no cycle: the highest


def test_the_table_holds_every_figure(tmp_path):
    cycles = _history(3, extra=lambda cycle: "<i>" if cycle else None)
    del cycles[1]["eval_ndcg@10"]
    cycles[1]["recommender_loss"] = math.nan
    cycles[2]["utilisation"] = [0.25]
    page = _page(tmp_path, cycles)
    assert page.columns[:8] == [
        *("Cycle", "Epoch", "Aligned", "Eval ndcg@10", "Eval recall@10", "Eval loss", "Share changed"),
        "Collision rate",
    ]
    assert page.columns[8:11] == ["Utilisation a", "Utilisation b", "Utilisation c"]
    assert len(set(page.columns)) == len(page.columns) == len(cycles[0] | cycles[2]) + 2  # three levels, one list
    assert [row["Cycle"] for row in page.rows] == ["0", "1", "2"]
    assert [row["Eval ndcg@10"] for row in page.rows] == ["0.022", "-", "0.024"]
    assert [row["Recommender loss"] for row in page.rows] == ["5", "NaN", "4.8"]
    assert [row["Share changed"] for row in page.rows] == ["40.0%", "20.0%", "13.3%"]
    assert [row["Utilisation a"] for row in page.rows] == ["90.0%", "90.0%", "25.0%"]
    assert [row["Utilisation c"] for row in page.rows] == ["80.0%", "80.0%", "-"]
    assert [row["Extra"] for row in page.rows] == ["-", "<i>", "<i>"]
    assert {row["Aligned"] for row in page.rows} == {"no"}


def test_only_what_was_measured_is_drawn(tmp_path):
    cycles = [{"cycle": cycle, "recommender_loss": 5.0 - cycle, "eval_loss": math.nan} for cycle in range(3)]
    page = _page(tmp_path, cycles)
    assert list(page.charts) == ["Recommender loss"]
    assert page.headings == ["Recommender", "All figures"]
    assert list(page.lines("Recommender loss")) == ["training"]
    assert page.legends["Recommender loss"] == [("b0", "training")]
    assert list(page.cards) == ["Not a number"]
    assert "Ringed" not in page.text


def test_gaps_leave_the_other_points_where_they_are(tmp_path):
    losses = [5.0, math.nan, None, math.inf, 3.0, None, 1.0]
    page = _page(tmp_path, _series("recommender_loss", losses))
    xs = [x for x, _ in page.lines("Recommender loss")["training"]]
    assert xs == pytest.approx([LEFT, LEFT + PLOT * 4 / 6, LEFT + PLOT], abs=0.06)
    losses = [None, None, 5.0, 4.0, None]  # the axis is that of all records
    cycles = _history(5, recommender_loss=lambda cycle: losses[cycle], eval_loss=lambda cycle: None)
    page = _page(tmp_path, cycles)
    xs = [x for x, _ in page.lines("Recommender loss")["training"]]
    assert xs == pytest.approx([LEFT + PLOT * 2 / 4, LEFT + PLOT * 3 / 4], abs=0.06)


def test_a_range_too_narrow_for_three_digits(tmp_path):
    page = _page(tmp_path, _history(9))  # 4.201 to 4.2074
    texts = page.charts["Reconstruction"].findall("text")
    marks = [text.text for text in texts if text.get("text-anchor") == "end" and text.text.startswith("4.")]
    assert len(marks) >= 4
    assert len(set(marks)) == len(marks)
    assert [float(mark) for mark in marks] == sorted(map(float, marks))


@pytest.mark.parametrize(
    "cycles",
    [
        [],
        [{}],
        [{"cycle": 0}],
        _history(1),
        [{"cycle": None, "utilisation": [], "aligned": None, "eval_ndcg@10": math.nan}],
        [{"cycle": math.nan, "utilisation": [math.nan, None, 0.5], "share_changed": math.nan}, {"cycle": 1}],
        [{"utilisation": 0.5, "epoch": "3", "aligned": 1, "eval_ndcg@10": True}],
        _series("eval_ndcg@10", [math.nan] * 3),
        [dict.fromkeys(record, math.nan) for record in _history(2)],
    ],
)
def test_little_or_odd_records_make_a_page(tmp_path, cycles):
    page = _page(tmp_path, cycles, best_epoch=3)
    assert len(page.rows) == len(cycles)
    for chart in page.charts.values():
        for circle in chart.findall("circle"):
            assert LEFT <= float(circle.get("cx")) <= WIDTH - RIGHT
            assert TOP <= float(circle.get("cy")) <= HEIGHT - BOTTOM
    assert not re.search(r'(points|cx|cy|x1|y)="[^"]*(nan|inf)', page.text)


def test_truth_values_and_texts_are_no_figures(tmp_path):
    page = _page(tmp_path, [{"utilisation": [True, None], "epoch": "3", "aligned": 1, "eval_ndcg@10": True}])
    assert (page.charts, page.cards) == ({}, {})
    assert "1 cycle." in page.body.findtext("header/p")


def test_no_cycle_yet(tmp_path):
    page = _page(tmp_path, [])
    assert "No cycle has ended yet." in page.body.findtext("header/p")
    assert (page.charts, page.cards, page.headings) == ({}, {}, [])


def test_records_in_another_order(tmp_path):
    cycles = _history(5)
    page = _page(tmp_path, [cycles[place] for place in (3, 0, 4, 2, 1)])
    assert [row["Cycle"] for row in page.rows] == ["0", "1", "2", "3", "4"]
    xs = [x for x, _ in page.lines("Recommender loss")["training"]]
    assert xs == sorted(xs)


def test_verdicts_of_a_good_training(tmp_path):
    verdicts = {verdict.name: verdict for verdict in judge(_history())}
    assert {name: verdict.state for name, verdict in verdicts.items()} == {
        "Best NDCG@10": "good", "Codes changed": "good", "Collisions": "good", "Codes used": "good",
    }  # fmt: skip
    assert [verdict.value for verdict in verdicts.values()] == ["0.03", "3.33%", "0.90%", "80.0%"]
    assert "cycle 8, after epoch 9 of the recommender." in verdicts["Best NDCG@10"].meaning
    assert "The last measured is 0.027, of cycle 11." in verdicts["Best NDCG@10"].meaning
    assert "from 2.00% in cycle 0 to 0.90% in cycle 11" in verdicts["Collisions"].meaning
    assert "level c" in verdicts["Codes used"].meaning
    mean = sum(0.4 / cycle for cycle in range(1, 13)) / 12
    assert f"The mean of all 12 cycles is {mean:.1%}." in verdicts["Codes changed"].meaning
    cards = _page(tmp_path, _history()).cards
    assert list(cards) == list(verdicts)
    for name, card in cards.items():
        assert card.get("class") == "card good"
        assert card.findtext("p[@class='figure']") == verdicts[name].value
        assert card.find("p[@class='remedy']") is None


@pytest.mark.parametrize(
    ("values", "value", "state", "words"),
    [
        ([0.01, 0.02, 0.03], "0.03", "look", "still rising"),
        ([0.03, 0.02, 0.01], "0.03", "look", "No later cycle was better"),
        ([0.01, 0.03, 0.03], "0.03", "good", ""),  # the first of equals
        ([0.01, 0.03, math.nan], "0.03", "look", "still rising"),
        ([None, 0.02, None], "0.02", "look", "One evaluation"),
        ([0.0, 0.0, 0.0], "0", "bad", "among the first ten"),
    ],
)
def test_verdict_on_the_best(values, value, state, words):
    verdict = _verdict(_series("eval_ndcg@10", values), "Best NDCG@10")
    assert (verdict.value, verdict.state) == (value, state)
    assert words in verdict.remedy
    assert bool(words) == bool(verdict.remedy)


@pytest.mark.parametrize(
    ("values", "state", "words"),
    [
        ([0.1] * 6 + [0.51, 0.6], "bad", "in every cycle from 6 on: the codes do not settle"),
        ([0.9] * 6 + [0.49, 0.6], "look", "more than half"),
        ([0.9] * 6 + [0.6, 0.5], "good", ""),  # half is not more than half
        ([0.9] * 3, "look", "more than half"),  # too few to tell
        ([0.9] * 4, "bad", "from 3 on"),
        ([0.0] * 4, "look", "No item got other codes in any of 4 cycles"),
        ([0.0], "good", ""),
        ([0.5, 0.1, 0.0], "good", ""),
    ],
)
def test_verdict_on_codes_that_change(values, state, words):
    verdict = _verdict(_series("share_changed", values), "Codes changed")
    assert verdict.state == state
    assert words in verdict.meaning
    assert ("tokenizer_learning_rate" in verdict.remedy) == (state != "good")
    if state == "good":
        assert "settle" not in verdict.meaning


@pytest.mark.parametrize(
    ("values", "state", "words"),
    [
        ([0.02, 0.025, 0.031], "bad", "from 2.00% in cycle 0 to 3.10% in cycle 2. That is growth by more than half"),
        ([0.02, 0.025, 0.03], "good", ""),
        ([0.02, 0.08, 0.02], "look", "to 8.00% in cycle 1"),
        ([0.0, 0.0005], "good", ""),  # an item of two thousand
        ([0.0, 0.01], "bad", "from 0%"),
        ([0.5], "good", "in cycle 0"),
    ],
)
def test_verdict_on_collisions(values, state, words):
    verdict = _verdict(_series("collision_rate", values), "Collisions")
    assert verdict.state == state
    assert words in verdict.meaning
    assert bool(verdict.remedy) == (state != "good")


@pytest.mark.parametrize(
    ("values", "value", "state", "words"),
    [
        ([[0.9, 0.6, 0.7], [0.9, 0.4, 0.3]], "30.0%", "bad", "Levels b, c fell under 50%"),
        ([[0.9, 0.4], [0.5, 0.4]], "40.0%", "look", "Level b never had 50%"),
        ([[0.9, 0.8], [0.9, 0.3], [0.9, 0.5]], "50.0%", "look", "Level b had been under 50%"),
        ([[0.3, 0.9], [0.3, 0.45]], "30.0%", "bad", "Level b fell under 50%"),
        ([[0.9, 0.8], [0.9]], "80.0%", "good", "level b"),
        ([[0.9, math.nan]], "90.0%", "good", "level a"),
    ],
)
def test_verdict_on_codes_in_use(values, value, state, words):
    verdict = _verdict(_series("utilisation", values), "Codes used")
    assert (verdict.value, verdict.state) == (value, state)
    assert words in verdict.meaning
    assert bool(verdict.remedy) == (state != "good")


def test_verdict_on_what_is_not_finite(tmp_path):
    cycles = _history(4)
    cycles[2]["tokenizer_<sia>"] = math.inf
    cycles[2]["utilisation"] = [0.9, math.nan]
    cycles[3]["eval_loss"] = math.nan
    verdict = judge(cycles)[0]
    assert (verdict.name, verdict.value, verdict.state) == ("Not a number", "cycle 2", "bad")
    assert "finite: utilisation, tokenizer_<sia>." in verdict.meaning
    card = _page(tmp_path, cycles).cards["Not a number"]
    assert card.get("class") == "card bad"
    assert card.findtext("p[@class='remedy']") == verdict.remedy
    write_history(tmp_path / "joint_history.json", cycles)
    assert judge(read_history(tmp_path / "joint_history.json"))[0] == verdict  # through the file too
