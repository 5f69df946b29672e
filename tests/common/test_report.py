"""A report's rows, table, Markdown, JSON and plot say the same figures; intervals against what they are defined by."""

import base64
import io
import json
import math
import re
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from hf_matryoshka_sae.common.intervals import middle_95, ratio_interval, resampled_means, resampled_rows
from hf_matryoshka_sae.common.report import Column, Report


COLUMNS = [
    Column("f1", "F1", "of firing.", ".2f", "higher"),
    Column("n_5", "N = 5", "five latents.", ".1f", "lower", path="score.5", interval="bounds.5", uninformed=0.5),
    Column("hidden", "hidden", "in no table.", table="nothing"),
]


@pytest.fixture
def report() -> Report:
    records = [
        {"subject": "it", "kind": "dictionary", "width": 4, "f1": 0.25, "f1_interval": [0.125, 0.5], "hidden": 7.0},
        {"subject": "it", "kind": "dictionary", "width": 16, "f1": 0.5, "f1_interval": None, "score": {"5": 3.0}},
        {"subject": "neurons", "kind": "neurons", "width": 8, "f1": math.nan, "score": {"5": 1.0}},
        {"subject": "nothing", "kind": "nothing", "width": None, "f1": 0.0},
    ]
    records[1]["bounds"] = {"5": [2.0, 4.0]}
    about = {"seed": 3, "skipped": {"a task": "too rare"}}
    return Report("it", "A title", records, COLUMNS, about, ["f1", "n_5"], ["a note"], warning="Beware.")


def test_rows_are_a_frame_whose_columns_say_what_they_mean(report):
    frame = report.rows
    assert list(frame.columns) == [
        "subject",
        "kind",
        "width",
        "f1",
        "f1_low",
        "f1_high",
        "n_5",
        "n_5_low",
        "n_5_high",
        "hidden",
    ]
    wide = frame[frame.width == 16].iloc[0]
    assert (wide.f1, wide.n_5, wide.n_5_low, wide.n_5_high) == (0.5, 3.0, 2.0, 4.0) and math.isnan(wide.f1_low)
    assert frame.attrs["meaning"]["f1"] == "of firing." and frame.attrs["better"]["n_5"] == "lower"


def test_the_table_shows_figures_with_their_intervals_and_what_was_left_out(report):
    lines = str(report).splitlines()
    assert lines[:2] == ["A title", "warning: Beware."]
    assert lines[2].split() == ["width", "F1", "95%", "N", "=", "5", "95%"]
    assert lines[3].split() == ["it", "4", "0.25", "0.12..0.50", "-", "-"]
    assert lines[4].split() == ["it", "16", "0.50", "-", "3.0", "2.0..4.0"]
    assert lines[-3].split()[:2] == ["nothing", "-"]
    assert lines[-2:] == ["left out: a task (too rare)", "a note"]
    assert len({len(line) for line in lines[2:7]}) == 1
    assert "| it | 16 | 0.50 | - | 3.0 | 2.0..4.0 |" in report.markdown() and "F1 ↑" in report.markdown()


def test_json_has_every_record_and_null_for_what_is_not_finite(report, tmp_path):
    report.save(tmp_path)
    read = json.loads((tmp_path / "it.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert read == json.loads(report.as_json()) and read["seed"] == 3 and read["warning"] == "Beware."
    assert read["rows"][2]["f1"] is None and read["rows"][1] == report.records[1]
    assert (tmp_path / "it.png").stat().st_size > 5000
    report.grouped = True
    assert report.to_dict()["saes"]["neurons"][0]["score"] == {"5": 1.0}
    assert report.flat()["it"][1] == {
        "width": 16,
        "kind": "dictionary",
        "f1": 0.5,
        "n_5": 3.0,
        "n_5_interval": [2.0, 4.0],
    }


def test_a_subject_that_is_not_there_is_named(report):
    assert [record["width"] for record in report.subject("it")] == [4, 16]
    with pytest.raises(ValueError, match="there are 'it', 'neurons', 'nothing'"):
        report.subject("other")


def test_a_bootstrap_has_the_width_of_the_normal_interval():
    random = np.random.default_rng(0)
    table = random.normal(2.0, 1.0, size=(400, 2))
    low, high = middle_95(resampled_means(table, 4000, random))[1]
    half = stats.norm.ppf(0.975) * table[:, 1].std() / 20
    assert [low, high] == pytest.approx([table[:, 1].mean() - half, table[:, 1].mean() + half], abs=0.15 * half)
    weights = np.full(400, 3.0)
    rows = resampled_rows(400, 4000, np.random.default_rng(1))
    assert ratio_interval(3 * table[:, 0], weights, rows) == pytest.approx(middle_95(table[:, 0][rows].mean(1)))
    assert resampled_means(np.empty((0, 3)), 5, random).shape == (5, 3)


def test_a_notebook_shows_the_table_and_the_plot_and_keeps_its_backend(report):
    before = matplotlib.get_backend()
    report.records[0]["subject"] = "<it> & td>"
    page = report._repr_html_()
    root = ElementTree.fromstring(f"<div>{page[: page.index('<img')].replace('<br>', ' ')}</div>")
    rows = [[cell.text for cell in row] for row in root.iter("tr")]
    assert rows[0] == [None, "width", "F1 ↑", "95%", "N = 5 ↓", "95%"]
    assert rows[1] == ["<it> & td>", "4", "0.25", "0.12..0.50", "-", "-"] and len(rows) == 5
    assert "Beware." in page and "a note" in page and "left out: a task" in page
    picture = re.search(r'src="data:image/png;base64,([^"]+)"', page)[1]
    assert Image.open(io.BytesIO(base64.b64decode(picture))).size[0] > 300
    assert matplotlib.get_backend() == before
