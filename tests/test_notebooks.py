"""The notebooks of `examples/` are as they were run: every cell in order, with outputs, without errors or places."""

import ast
import json
import re
from pathlib import Path

import pytest


NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))
PLACES = re.compile(r"/(?:work|root|tmp|home|Users)/|[A-Z]:\\\\")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request) -> dict:
    return json.loads(request.param.read_text(encoding="utf-8"))


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 4


def test_it_was_run_from_the_first_cell_to_the_last(notebook):
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        ast.parse("".join(cell["source"]))
        for output in cell["outputs"]:
            assert output["output_type"] != "error" and output.get("name") != "stderr", output


def test_it_ends_with_a_figure(notebook):
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert "image/png" in outputs[-1]["data"]


def test_it_names_no_place_of_a_machine_and_needs_no_bars(notebook):
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            data = {kind: text for kind, text in output.get("data", {}).items() if not kind.startswith("image/")}
            assert not any("widget" in kind for kind in data)
            text = re.sub(r"base64,[^\"\\]+", "", json.dumps([output.get("text"), data]))
            assert not PLACES.search(text), PLACES.search(text)
        assert not PLACES.search("".join(cell["source"]))


def test_links_lead_to_other_notebooks(notebook):
    text = "".join(line for cell in notebook["cells"] if cell["cell_type"] == "markdown" for line in cell["source"])
    for target in re.findall(r"\]\(([^)h][^)]*)\)", text):
        assert (NOTEBOOKS[0].parent / target).exists(), target
