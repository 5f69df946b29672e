"""Every code block of the README and of docs/, as a reader would run it.

Blocks of a page run in order, in one folder in which the demo has been run (with fewer tokens) and which has the
checkout's examples/ and the like beside it. Python blocks share their names, YAML blocks whose first line names a file
are written to it, shell commands run through the functions behind them, against a loopback Hub. `open_heldout` gives
fewer tokens than it is asked for. Before a block may stand

    <!-- run with: --tokens 3000 -->    flags that are added to its commands, so that it ends soon
    <!-- not run: why -->               Python is compiled, flags are read, and no more
"""

import argparse
import contextlib
import functools
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.layout_engine import ConstrainedLayoutEngine

from hf_matryoshka_sae import cli, convert, demo, evaluation, hub
from hf_matryoshka_sae.evaluation import open_heldout
from hf_matryoshka_sae.hub import measure
from hf_matryoshka_sae.train import main as train
from hf_matryoshka_sae.training import RunConfig, load_run_config


ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "api")]
BESIDE = ("accelerate_configs", "benchmarks", "examples", "spaces_app")
FEW = dict(eval_tokens=600, calibration_tokens=1_000, normalization_tokens=1_000)
SHORT = dict(demo.DEMO, tokens=8_192, **FEW)
HELDOUT_TOKENS = 600

BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>run with|not run): (?P<said>.*?) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass
class Block:
    """A code block; `flags` are added to its commands, and it runs unless there is a `reason` not to."""

    where: str
    language: str
    code: str
    flags: list[str]
    reason: str | None


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    assert text.count("```") == 2 * len(BLOCK.findall(text)), (
        f"a block of {page.name} is not closed or has no language"
    )
    made = []
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("code")) + 1
        flags = shlex.split(found["said"]) if found["mark"] == "run with" else []
        reason = found["said"] if found["mark"] == "not run" else None
        made.append(Block(f"{page.relative_to(ROOT)}:{line}", found["language"], found["code"], flags, reason))
    return made


def commands(block: Block) -> list[list[str]]:
    """The commands of a shell block, without variables that are set for them."""
    lines = block.code.replace("\\\n", " ").replace("&&", "\n").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [[word for word in words if not re.match(r"[A-Z_]+=", word)] for words in split if words]


class FlagsAreRight(Exception):
    """The arguments of a command were read; it goes no further."""


@contextlib.contextmanager
def only_read(monkeypatch):
    """Commands end where their arguments have been read."""
    depth = 0

    def ending(read):
        def read_and_stop(parser, *args, **kwargs):
            nonlocal depth
            depth += 1
            try:
                found = read(parser, *args, **kwargs)
            finally:
                depth -= 1
            if depth == 0 and parser.prog != "matryoshka-sae":  # which hands on to the parser of a sub-command
                raise FlagsAreRight
            return found

        return read_and_stop

    with monkeypatch.context() as patch, pytest.raises(FlagsAreRight):
        for name in ("parse_args", "parse_known_args"):
            patch.setattr(argparse.ArgumentParser, name, ending(getattr(argparse.ArgumentParser, name)))
        yield


def run_command(words: list[str], runs: bool, monkeypatch) -> None:
    """Run a command, or read its flags; what is no command of ours must at least be there."""
    match words:
        case ["matryoshka-sae", "train", *flags] | ["python", "-m", "hf_matryoshka_sae.train", *flags]:
            train_with(flags, runs)
        case ["accelerate", "launch", *_]:
            from accelerate.commands.launch import launch_command_parser

            parsed = launch_command_parser().parse_args(words[2:])
            assert parsed.module and parsed.training_script == "hf_matryoshka_sae.train"
            train_with(parsed.training_script_args, runs=False)
        case ["matryoshka-sae", *arguments] if runs:
            assert cli.main(arguments) == 0
        case ["matryoshka-sae", *arguments]:
            with only_read(monkeypatch):
                cli.main(arguments)
        case ["python", script, *flags] if script.endswith(".py"):
            with only_read(monkeypatch), monkeypatch.context() as patch:
                patch.setattr(sys, "argv", [script, *flags])
                patch.syspath_prepend(ROOT / Path(script).parent)
                runpy.run_path(str(ROOT / script), run_name="__main__")
        case ["make", *targets]:
            assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in targets)
        case ["pip", "install", *arguments]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            asked = re.findall(r"\.\[(\w+)\]", " ".join(arguments))
            assert set(asked) <= set(extras)
        case ["python3", "-m", "venv", _] | [".", _] | ["pytest"]:
            pass
        case _:
            pytest.fail(f"no way to try {shlex.join(words)!r}")


def train_with(flags: list[str], runs: bool) -> None:
    if "--help" in flags:
        assert train(flags) == 0
    elif runs:
        assert train([*flags, *(f"--{name}={few}" for name, few in FEW.items() if f"--{name}" not in flags)]) == 0
    else:
        at = flags.index("--config")
        load_run_config(flags[at + 1], flags[:at] + flags[at + 2 :])


def run_block(block: Block, names: dict[str, Any], monkeypatch) -> None:
    if block.language == "python":
        code = compile_block(block)
        if block.reason is None:
            exec(code, names)
    elif block.language == "yaml":
        RunConfig.from_dict(yaml.safe_load(block.code))
        if name := re.match(r"# (\S+\.yaml)\n", block.code):
            Path(name[1]).write_text(block.code)
    elif block.language == "bash":
        for words in commands(block):
            run_command(words + block.flags, block.reason is None, monkeypatch)
    else:
        assert block.language == "text", f"{block.where} is {block.language}"


def compile_block(block: Block):
    """Its code, whose lines are those of the page."""
    line = int(block.where.rpartition(":")[2])
    return compile("\n" * (line - 1) + block.code, block.where, "exec")


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("documentation")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(demo, "DEMO", SHORT)
        assert cli.main(["demo"]) == 0
        patch.setattr(measure, "fit_power_law", functools.partial(measure.fit_power_law, resamples=20))
        patch.setattr(ConstrainedLayoutEngine, "execute", lambda self, figure: None)
        hub.measure_run("runs/demo")  # what every push of it would do first
    return folder


@pytest.fixture
def reader(demo_folder, tmp_path, monkeypatch, request) -> Path:
    """Where a reader of a page stands."""
    request.getfixturevalue("hub")  # the loopback one
    folder = tmp_path / "reader"
    shutil.copytree(demo_folder, folder)
    for name in BESIDE:
        (folder / name).symlink_to(ROOT / name)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(ConstrainedLayoutEngine, "execute", lambda self, figure: None)
    monkeypatch.setattr(demo, "DEMO", SHORT)
    monkeypatch.setattr(demo, "demo", lambda output_dir: 0)  # done
    few = functools.partial(open_heldout, tokens=HELDOUT_TOKENS)
    monkeypatch.setattr(evaluation, "open_heldout", lambda *args, tokens=None, **kwargs: few(*args, **kwargs))
    return folder


def _quick(page: Path) -> Any:
    """The README runs in continuous integration; pages of docs/, a minute and more in all, before a release."""
    marks = () if page.name == "README.md" else pytest.mark.release
    return pytest.param(page, id=page.relative_to(ROOT).as_posix(), marks=marks)


@pytest.mark.slow
@pytest.mark.parametrize("page", [_quick(page) for page in PAGES])
def test_every_block_of_a_page_runs(page, reader, monkeypatch):
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        try:
            run_block(block, names, monkeypatch)
        except BaseException as error:
            error.add_note(f"in the block at {block.where}")
            raise


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_python_block_compiles_and_every_run_is_a_valid_config(page):
    for block in blocks(page):
        if block.language == "python":
            compile_block(block)
        elif block.language == "yaml":
            RunConfig.from_dict(yaml.safe_load(block.code))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_a_page_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", BLOCK.sub("", page.read_text())):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_navigation_names_every_page_once():
    text = (ROOT / "mkdocs.yml").read_text()
    named = re.findall(r"(\S+\.md)$", text[text.index("nav:") :], re.MULTILINE)
    there = [page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")]
    assert sorted(named) == sorted(there)


def test_the_table_of_formats_is_that_of_the_registry():
    writable = convert.formats(writable=True)
    rows = [
        f"| `{name}` | {about.replace('<', '&lt;')}{'; also written' if name in writable else ''} |"
        for name, about in convert.formats().items()
    ]
    assert "\n".join(rows) in (ROOT / "docs/guides/data.md").read_text()
