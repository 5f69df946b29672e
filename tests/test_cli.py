"""The ways in: sub-commands and the demo."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_matryoshka_sae import cli, demo
from hf_matryoshka_sae.studies.scaling.config import load_sweep
from hf_matryoshka_sae.training import load_run_config


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    """A demo of fewer tokens, run as from the command line; its folder and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    short = dict(demo.DEMO, tokens=60_000, eval_tokens=4000, calibration_tokens=20_000)
    script = (
        f"from hf_matryoshka_sae import cli, demo; demo.DEMO.update({short!r}); raise SystemExit(cli.main(['demo']))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_the_demo_prints_the_table_reloads_the_sae_and_shows_latents(demo_run):
    folder, printed = demo_run
    assert "recaptured" in printed
    assert "-> MatryoshkaSAE" in printed
    widths = [int(width) for width in re.findall(r"^ +(\d+) +\d+\.\d+ +0\.\d+", printed, re.MULTILINE)]
    assert widths == [64, 192, 448, 960, 2048]
    assert len(re.findall(r"latent +\d+ \(prefix", printed)) == 10
    assert printed.count("[[") == 1 + 10 * 4
    assert (folder / "runs/demo/results.png").is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_is_a_valid_config(path):
    load = load_sweep if path.name.startswith("sweep") else load_run_config
    load(path)


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("train", "sweep", "evaluate", "push", "pull", "convert", "toy", "demo"))


def test_train_help_lists_every_field(capsys):
    assert cli.main(["train"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("hookpoints", "batch_size", "prefix_widths", "auxk_coefficient"))


@pytest.mark.parametrize(
    "command, flag",
    [
        ("cache", "--shard"),
        ("sweep", "--points"),
        ("evaluate", "--widths"),
        ("push", "--dry_run"),
        ("pull", "--width"),
        ("convert", "--prefix_widths"),
        ("toy", "--random_tree"),
    ],
)
def test_commands_with_their_own_flags_list_them(capsys, command, flag):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    assert flag in capsys.readouterr().out


def test_a_mistake_is_one_line_on_stderr_and_a_status(capsys, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": "embedded", "datasett": "embedded"}))
    assert cli.main(["train", "--config", str(path)]) == 2
    assert "error: Unknown field `datasett`. Did you mean 'dataset'?" in capsys.readouterr().err


def test_an_unknown_flag_of_the_demo_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["demo", "--tokens", "5"])
    assert "--tokens" in capsys.readouterr().err
