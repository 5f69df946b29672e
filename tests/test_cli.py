"""The ways in: sub-commands and the demo."""

import importlib.util
import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml

from hf_matryoshka_sae import cli, demo
from hf_matryoshka_sae.studies.scaling.config import load_sweep
from hf_matryoshka_sae.training import load_run_config


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    """A demo of fewer tokens; its folder and what it printed."""
    folder, short = tmp_path_factory.mktemp("demo"), {"tokens": 60_000, "eval_tokens": 4000}
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.chdir(folder)
        patch.setattr(demo, "DEMO", {**demo.DEMO, **short, "calibration_tokens": 20_000})
        assert cli.main(["demo"]) == 0
    return folder, printed.getvalue()


@pytest.mark.slow
def test_the_demo_prints_the_table_reloads_the_sae_and_shows_latents(demo_run):
    folder, printed = demo_run
    assert "recaptured" in printed
    assert "-> MatryoshkaSAE" in printed
    widths = [int(width) for width in re.findall(r"^matryoshka +(\d+) +\d+\.\d+ +0\.\d+", printed, re.MULTILINE)]
    assert widths == [64, 192, 448, 960, 2048]
    assert len(re.findall(r"latent +\d+ \(prefix", printed)) == 10
    assert printed.count("[[") == 1 + 10 * 4
    assert (folder / "runs/demo/results.png").is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_is_a_valid_config(path):
    load = load_sweep if path.name.startswith("sweep") else load_run_config
    load(path)


def test_train_without_arguments_shows_its_help(capsys):
    assert cli.main(["train"]) == 0
    assert "--batch_size  whole number, default 2048" in capsys.readouterr().out


def test_the_reference_page_is_what_the_fields_say():
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text() == script.page(), "run `python docs/make_reference.py`"


def test_a_mistake_is_one_line_on_stderr_and_a_status(capsys, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": "embedded", "datasett": "embedded"}))
    assert cli.main(["train", "--config", str(path)]) == 2
    assert "error: Unknown field `datasett`. Did you mean 'dataset'?" in capsys.readouterr().err
