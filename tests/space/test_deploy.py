"""The Space: its files, what they promise the Hub, and that they run where nothing else of this repository is."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from ..conftest import SERVER


ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hf_matryoshka_sae"


@pytest.fixture(scope="module")
def deploy():
    spec = importlib.util.spec_from_file_location("deploy", ROOT / "spaces_app" / "deploy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What `--dry_run` writes."""
    target = tmp_path_factory.mktemp("deploy") / "new" / "space"
    command = [sys.executable, str(ROOT / "spaces_app" / "deploy.py"), "your-name/space", "--dry_run", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def card(folder) -> dict:
    text = (folder / "README.md").read_text()
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_front_matter_is_what_the_hub_reads(folder, card):
    assert card["title"] and card["sdk"] == "gradio" and card["license"] == "apache-2.0" and card["hf_oauth"] is True
    assert len(card["short_description"]) <= 60
    assert (folder / card["app_file"]).is_file()
    assert re.fullmatch(r"3\.12(\.\d+)?", str(card["python_version"]))
    assert re.fullmatch(r"\d+\.\d+\.\d+", card["sdk_version"])
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {card["colorFrom"], card["colorTo"]} <= colours


def constraints() -> dict[str, str]:
    """The versions that `make test` installs."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_the_space_gets_the_versions_that_are_tested(folder, card):
    pins = constraints()
    assert card["sdk_version"] == pins["gradio"]
    lines = (folder / "requirements.txt").read_text().splitlines()
    assert set(lines) <= {f"{name}=={version}" for name, version in pins.items()}
    needed = {Requirement(line).name.lower() for line in project()["dependencies"]} | {"spaces"}
    assert {line.split("==")[0] for line in lines} == needed


def test_the_tested_versions_are_all_that_the_package_asks_for():
    """Whatever is installed here: pins may be older than it."""
    pins, extras = constraints(), project()["optional-dependencies"]
    for line in project()["dependencies"] + [line for lines in extras.values() for line in lines]:
        asked = Requirement(line)
        if asked.name != "hf_matryoshka_sae":
            assert asked.specifier.contains(pins[asked.name.lower()]), line


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_package_is_there_whole_and_nothing_else(folder):
    found = files(folder)
    there = {f"hf_matryoshka_sae/{name}" for name in files(PACKAGE) if "__pycache__" not in name}
    assert found == there | {"app.py", "README.md", "requirements.txt"}
    for name in ("assets/sae/model.safetensors", "assets/sae/features/index.json", "space/page.css", "space/page.js"):
        assert (folder / "hf_matryoshka_sae" / name).read_bytes() == (PACKAGE / name).read_bytes()


def test_a_folder_with_something_in_it_is_left_alone(deploy, tmp_path, capsys):
    (tmp_path / "mine").write_text("keep me")
    for target in (tmp_path, tmp_path / "mine"):
        assert deploy.main(["your-name/space", "--dry_run", str(target)]) == 2
        assert "is not empty" in capsys.readouterr().err
    assert files(tmp_path) == {"mine"} and (tmp_path / "mine").read_text() == "keep me"
    (tmp_path / "empty").mkdir()
    assert deploy.main(["your-name/space", "--dry_run", str(tmp_path / "empty")]) == 0


@pytest.mark.release
def test_the_app_is_made_where_nothing_else_is(folder):
    for needed in ("gradio", "itsdangerous", "authlib"):  # the Hub installs gradio[oauth]
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"needs {needed}")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "SYSTEM": "spaces"}
    environment |= {"SPACE_ID": "your-name/space", "OPENID_PROVIDER_URL": "https://huggingface.co"}
    environment |= {"OAUTH_CLIENT_ID": "a", "OAUTH_CLIENT_SECRET": "b", "OAUTH_SCOPES": "openid profile"}
    script = (
        "import os, sys, app, hf_matryoshka_sae\n"
        "print(hf_matryoshka_sae.__file__)\n"
        "print(type(app.demo).__name__, app.library.public)\n"
        "print(app.library.open('embedded').num_latents)\n"
        "try: app.library.open('hf_matryoshka_sae/assets/sae')\n"
        "except ValueError as error: print(error)\n"
        "sys.stdout.flush(); os._exit(0)\n"  # what warms the page need not end
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    where, made, latents, closed = done.stdout.splitlines()
    assert Path(where) == folder / "hf_matryoshka_sae" / "__init__.py"
    assert (made, latents) == ("Blocks True", "2048") and "no name of a repository on the Hub" in closed


@pytest.mark.parametrize("private", [False, True])
def test_the_space_is_pushed_in_one_commit(deploy, folder, hub, capsys, private):
    assert deploy.main(["your-name/space", *(["--private"] if private else [])]) == 0
    repo = SERVER.repos["spaces/your-name/space"]
    assert repo.private is private
    before, after = repo.commits.values()
    assert before == {} and set(after) == files(folder)
    assert all(after[name].data == (folder / name).read_bytes() for name in after)
    assert "your-name/space" in capsys.readouterr().out


def test_a_push_takes_along_what_the_package_no_longer_has(deploy, folder, hub):
    assert deploy.main(["your-name/space"]) == 0
    repo = SERVER.repos["spaces/your-name/space"]
    (last,) = [tree for tree in repo.commits.values() if tree]
    old = {"hf_matryoshka_sae/gone.py": last["app.py"], "notes.md": last["app.py"]}
    repo.commit("main", last | old)
    assert deploy.main(["your-name/space"]) == 0
    assert set(repo.commits[repo.branches["main"]]) == files(folder) | {"notes.md"}


def test_a_hub_that_does_not_answer_is_a_message(deploy, hub, capsys):
    hub.token = "another"
    try:
        assert deploy.main(["your-name/space"]) == 2
    finally:
        hub.token = None
    assert capsys.readouterr().err.startswith("error: ")
