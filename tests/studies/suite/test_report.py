"""The page of verdict: what it says of numbers made up for it, and that nothing is on it twice."""

import pytest
from PIL import Image

from hf_matryoshka_sae.studies.suite.report import questions, verdict, write_report


def section(name, columns, rows, better="higher", **more):
    return {
        "name": name,
        "title": f"The {name}",
        "question": f"How is {name}?",
        "about": f"About {name}.",
        "columns": columns,
        "better": better,
        "rows": rows,
        "facts": {"tokens": 4096},
        "size": 10,
        "full": 10,
        "unit": "tokens",
        "seconds": 2.0,
        "notes": [],
        "text": f"table of {name}",
        "plot": None,
        **more,
    }


@pytest.fixture
def place():
    narrow = {"width": 8, "l0": 2.0, "fvu": 0.5, "recaptured_zero": 0.7, "dead": 0.0, "rare": 0.0}
    wide = {"width": 32, "l0": 4.0, "fvu": 0.1, "recaptured_zero": 0.95, "dead": 0.25, "rare": 0.02}
    fidelity = [narrow | {"rare_interval": [0.0, 0.0]}, wide | {"rare_interval": [0.01, 0.05]}]
    patterns = [
        {"width": 8, "f1": 0.3, "token_f1": 0.4, "pair_f1": 0.5, "f1_interval": None},
        {"width": 32, "f1": 0.4, "token_f1": 0.45, "pair_f1": 0.55, "f1_interval": [0.35, 0.45]},
    ]
    random = [{"width": 32, "f1": 0.2, "f1_interval": [0.15, 0.25], "token_f1": 0.1, "pair_f1": 0.1}]
    channels = {"all channels": [{"width": None, "share": 0.2}], "channels (16)": [{"width": None, "share": 0.6}]}
    effects = channels | {"it": [{"width": 32, "share": 0.3}], "random (it)": [{"width": 32, "share": 0.301}]}
    sections = [
        section("fidelity", (("l0", "L0", ".2f"), ("fvu", "FVU", ".4f")), {"it": fidelity}, "lower"),
        section("patterns", (("f1", "F1", ".3f"),), {"it": patterns, "random (it)": random}),
        section("effects", (("share", "share", ".3f"),), effects, "lower"),
        section("letters", (("x", "x", ".1f"),), {}, left_out="it does not spell"),
    ]
    return {
        "model": "m",
        "hookpoint": "h",
        "dataset": "d",
        "tokens": 5000,
        "selection": "mask",
        "saes": ["it"],
        "weights": {"it": None},
        "folder": "h",
        "sections": sections,
    }


def test_the_paragraph_says_what_the_numbers_say(place):
    told = verdict(place, "it")
    assert "All 32 latents, 4.0 of them on a token, leave 10.0% of the variance unexplained" in told
    assert "recapture 95.0% of the language model's loss" in told and "Its first 8 alone" in told
    assert "better than random directions in the patterns" in told
    assert "No clear difference from random directions in the effects" in told
    assert "Patterns (F1 0.40) say less than a table of the last two tokens (0.55)." in told
    assert "About 2.0% of its latents (1.0% to 5.0%)" in told and "25.0% on none of the 4,096 seen" in told


def test_a_line_for_each_question_with_its_baselines(place):
    lines = questions(place, "it").splitlines()
    assert lines[0] == "|  | measured by | first 8 | all 32 | random | others |"
    assert "| How is patterns? | F1 | 0.300 | 0.400 [0.350 0.450] | 0.200 [0.150 0.250] |" in lines[3]
    assert "table of the last token 0.450" in lines[3]
    assert len(lines) == 5  # nothing of what was left out


def test_the_page_has_one_picture_and_a_line_for_what_was_left_out(place, tmp_path):
    page = write_report(tmp_path, [place], 3).read_text()
    details = (tmp_path / "details.md").read_text()
    assert page.count("![") == 1 and "- The letters: left out, it does not spell" in page
    assert "letters" not in details.split("\n\n", 2)[2] and details.count("table of patterns") == 1
    assert "table of patterns" not in page and "of 3 that were asked for" in page
    picture = Image.open(tmp_path / "h/overview.png")
    assert picture.width / picture.height > 2.5  # three panels in a row, none of them empty
