"""Files about the project say the same: version and date, workflows, what scripts need."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import hf_matryoshka_sae


ROOT = Path(__file__).parents[1]
SCRIPTS = [path for path in sorted((ROOT / "examples").glob("*.py")) if "__main__" in path.read_text(encoding="utf-8")]


def test_version_and_date_are_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version, date = re.search(r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", changes, re.M).groups()
    assert version == citation["version"] == hf_matryoshka_sae.__version__
    assert date == str(citation["date-released"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "hf_matryoshka_sae.__version__"


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_workflows_are_yaml_whose_actions_are_pinned_and_hold_no_token(path):
    text = path.read_text(encoding="utf-8")
    data = yaml.safe_load(text)
    for action in re.findall(r"uses: (\S+)", text):
        assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", action), action
    assert "secrets." not in text
    if path.parent.name == "workflows":
        assert data["permissions"] == {"contents": "read"}  # what a job needs besides, it says itself


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_say_what_they_need(path):
    text = path.read_text(encoding="utf-8")
    block = re.search(r"(?m)^# /// script$\s(?P<lines>(^#(| .*)$\s)+)^# ///$", text)  # as PEP 723 has it
    header = tomllib.loads("".join(line[2:] or "\n" for line in block["lines"].splitlines(keepends=True)))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert header["requires-python"] == project["requires-python"]
    names = {}
    for line in header["dependencies"]:
        names[Requirement(line).name] = Requirement(line).extras
    assert names["hf_matryoshka_sae"] <= set(project["optional-dependencies"])
    modules = set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.M))
    if "playwright" in modules:
        assert "playwright" in names
    if "hf_matryoshka_sae.space" in text:
        assert "space" in names["hf_matryoshka_sae"]
    source = header["tool"]["uv"]["sources"]["hf_matryoshka_sae"]
    assert (path.parent / source["path"]).resolve() == ROOT
