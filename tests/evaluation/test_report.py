"""Files that others read: JSON without words that JSON does not have."""

import json
import math

import pytest

from hf_matryoshka_sae.common.files import as_json, write_json
from hf_matryoshka_sae.studies.suite.report import cell


def refused(literal):
    pytest.fail(f"{literal} is no JSON")


def test_numbers_that_are_not_finite_are_null_wherever_they_stand(tmp_path):
    data = {"a": math.nan, "b": [1.5, math.inf, {"c": (-math.inf, 2, None, True, "NaN")}], 3: 0.0}
    expected = {"a": None, "b": [1.5, None, {"c": [None, 2, None, True, "NaN"]}], "3": 0.0}
    write_json(tmp_path / "it.json", data)
    for text in ((tmp_path / "it.json").read_text(), as_json(data)):
        assert json.loads(text, parse_constant=refused) == expected
    assert "\n" not in as_json(data)
    assert as_json({"a": [1, 2.5]}, indent=2) == json.dumps({"a": [1, 2.5]}, indent=2)


def test_an_interval_that_is_not_known_is_left_out():
    assert cell({"f1": 0.5, "f1_interval": [None, None]}, "f1", ".2f") == "0.50"
    assert cell({"f1": 0.5, "f1_interval": [0.25, 0.75]}, "f1", ".2f") == "0.50 [0.25 0.75]"
