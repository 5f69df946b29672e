"""Charts: what they hand to the page's script, and what the script draws of it, in a browser without the page."""

import json
import math
from importlib.resources import files
from xml.etree import ElementTree

import pytest

from hf_matryoshka_sae.space.looks.charts import Axis, Mark, line_chart


HOSTILE = "<script>alert('a & \"b\"')</script>"
WIDTH = 400


def spec_of(chart: str) -> dict:
    root = ElementTree.fromstring(chart)  # well-formed, too
    assert root.get("role") == "img" and root.get("aria-label")
    return json.loads(root.get("data-spec"))


def test_series_and_marks_are_handed_over_sorted():
    series = {"one": [(2, 2), (1, 1)], "none": [], "two": [(1, 2), (2, 3)]}
    marks = [Mark("two", 2, 3, "here: 3"), Mark("none", 1, 1, "nowhere")]
    chart = line_chart(series, Axis("x"), Axis("y"), marks)
    spec = spec_of(chart)
    assert [(one["name"], one["points"]) for one in spec["series"]] == [
        ("one", [[1, 1], [2, 2]]),
        ("two", [[1, 2], [2, 3]]),
    ]
    assert spec["marks"] == [{"x": 2, "y": 3, "text": "here: 3", "series": 1}]
    said = ElementTree.fromstring(chart).get("aria-label")
    assert "one goes from 1 at 1 to 2 at 2" in said and "two goes" in said and "here: 3" in said


def test_what_a_chart_says_is_text():
    chart = line_chart({HOSTILE: [(1, 2), (2, 3)]}, Axis(HOSTILE), Axis(HOSTILE), [Mark(HOSTILE, 1, 2, HOSTILE)])
    assert "<script" not in chart and spec_of(chart)["series"][0]["name"] == HOSTILE


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_has_no_place_is_left_out(bad):
    points = [(1, 1.0), (2, bad), (bad, 2.0), (3, 3.0)]
    chart = line_chart({"a": points, "b": [(1, bad)]}, Axis("x"), Axis("y"), [Mark("a", 1, bad, "nowhere")])
    assert chart == line_chart({"a": [(1, 1.0), (3, 3.0)]}, Axis("x"), Axis("y"))
    logarithmic = line_chart({"a": [(0, 1.0), (-2, 1.0), (1, 1.0), (8, 2.0)]}, Axis("x", log=True), Axis("y"))
    assert len(spec_of(logarithmic)["series"][0]["points"]) == 2


@pytest.mark.parametrize("series", [{}, {"a": []}, {"a": [(1, math.nan)]}])
def test_nothing_measured_is_said(series):
    assert "Nothing was measured yet" in line_chart(series, Axis("x"), Axis("y"))


# What the script draws


@pytest.fixture(scope="module")
def drawn(chromium):
    """Draws charts in an empty page; returns the places of points, ticks, marks and all text."""
    script, style = (files("hf_matryoshka_sae.space").joinpath(name).read_text() for name in ("chart.js", "page.css"))
    page = chromium.new_page()
    page.set_content("<!doctype html><body></body>")
    page.add_style_tag(content=style)
    page.evaluate(f"() => ({script})()")

    def draw(chart: str) -> dict:
        page.evaluate("html => { document.body.innerHTML = html; }", f'<div style="width:{WIDTH}px">{chart}</div>')
        page.locator("nested-chart svg").wait_for()
        return page.evaluate(
            """() => {
              const number = (of, name) => Number(of.getAttribute(name));
              const all = query => [...document.querySelectorAll(query)];
              return {
                points: all('.series circle').map(dot => [number(dot, 'cx'), number(dot, 'cy')]),
                line: document.querySelector('polyline').getAttribute('points'),
                across: all('svg > text[text-anchor=middle]:not(.label)').map(t => [number(t, 'x'), t.textContent]),
                up: all('svg > text[text-anchor=end]').filter(t => number(t, 'x') < 60)
                  .map(t => [number(t, 'y') - 4, t.textContent]),
                marks: all('.mark circle').map(dot => [number(dot, 'cx'), number(dot, 'cy')]),
                text: document.body.innerText, scripts: all('nested-chart script').length,
                inside: all('text').every(text => {
                  const box = text.getBoundingClientRect(), svg = text.ownerSVGElement.getBoundingClientRect();
                  return box.left >= svg.left - 1 && box.right <= svg.right + 1 && box.bottom <= svg.bottom + 1;
                }),
              };
            }"""
        )

    yield draw
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize("log", [False, True])
def test_points_and_ticks_lie_where_their_values_are(drawn, log):
    points = [(64, 0.8), (192, 0.5), (448, 0.31), (2048, 0.1)]
    found = drawn(line_chart({"a": points}, Axis("width", log=log), Axis("FVU")))
    scale = math.log if log else float
    (left, top), *_, (right, bottom) = found["points"]
    assert left < right and top < bottom  # the largest FVU is highest
    for (x, y), (a, b) in zip(found["points"], points, strict=True):
        back = scale(64) + (x - left) / (right - left) * (scale(2048) - scale(64))
        assert back == pytest.approx(scale(a), abs=(scale(2048) - scale(64)) * 1e-3)
        assert 0.8 + (y - top) / (bottom - top) * (0.1 - 0.8) == pytest.approx(b, abs=1e-3)
    line = [tuple(map(float, place.split(","))) for place in found["line"].split()]
    assert line == [tuple(place) for place in found["points"]]
    assert len(found["across"]) >= 2 and len(found["up"]) >= 3 and found["inside"]
    for x, text in found["across"]:
        share = (scale(float(text.replace(",", ""))) - scale(64)) / (scale(2048) - scale(64))
        assert x == pytest.approx(left + share * (right - left), abs=0.2)
    for y, text in found["up"]:
        assert y == pytest.approx(top + (float(text) - 0.8) / (0.1 - 0.8) * (bottom - top), abs=0.2)


@pytest.mark.slow
def test_a_mark_stands_on_its_point_and_text_stays_text(drawn):
    series = {HOSTILE: [(1, 2.0), (2, 3.0)], "b": [(1, 1.0), (2, 1.0)]}
    found = drawn(line_chart(series, Axis(HOSTILE), Axis("y"), [Mark(HOSTILE, 2, 3.0, HOSTILE)]))
    assert found["marks"] == [found["points"][1]] and not found["scripts"]
    assert HOSTILE in found["text"]  # of the legend


@pytest.mark.slow
@pytest.mark.parametrize(
    "points", [[(5, 3.0)], [(5, 3.0), (5, 3.0)], [(1, 2.0), (9, 2.0)], [(1, 0.0)], [(-3, -2.0), (4, -7.0)]]
)
def test_a_point_a_level_line_and_negative_values_are_drawn(drawn, points):
    found = drawn(line_chart({"a": points}, Axis("x"), Axis("y")))
    assert len(found["points"]) == len(points)
    assert all(0 <= x <= WIDTH and 0 <= y <= 300 for x, y in found["points"])
