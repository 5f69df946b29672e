"""`matryoshka-sae convert`."""

import json

import pytest

from hf_matryoshka_sae import convert
from hf_matryoshka_sae.convert.command import main

from .test_save import random_sae


@pytest.fixture
def source(tmp_path):
    convert.save(random_sae("matryoshka batch_topk"), tmp_path / "source", "dictionary_learning")
    return tmp_path / "source"


def test_to_ours_and_to_saelens(source, tmp_path, capsys):
    options = ["--hookpoint", "gpt_neox.layers.3", "--base_model", "EleutherAI/pythia-70m"]
    assert main([str(source), str(tmp_path / "ours"), *options]) == 0
    said = capsys.readouterr().out
    assert "MatryoshkaSAE: 64 latents of 16 dimensions, prefixes 3, 32, 64" in said
    assert "gpt_neox.layers.3 of EleutherAI/pythia-70m" in said
    assert convert.load(tmp_path / "ours").prefix_widths == [3, 32, 64]
    assert main([str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "saelens", "--width", "32"]) == 0
    config = json.loads((tmp_path / "theirs" / "cfg.json").read_text())
    assert config["d_sae"] == 32 and config["metadata"]["hook_name"] == "blocks.3.hook_resid_post"


def test_options_say_what_files_do_not(tmp_path):
    convert.save(random_sae("relu"), tmp_path / "source", "saelens")
    options = ["--prefix_widths", "8,64", "--from", "saelens"]
    assert main([str(tmp_path), str(tmp_path / "ours"), "--subfolder", "source", *options]) == 0
    assert convert.load(tmp_path / "ours").prefix_widths == [8, 64]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--to", "gemma_scope"], "gemma_scope cannot express this SAE"),
        (["--to", "gema_scope"], "Did you mean 'gemma_scope'"),
        (["--from", "openai"], "lacks the tensor latent_bias"),
        (["--subfolder", "nothing"], "holds no SAE"),
        (["--width", "65"], "must lie between 1 and num_latents"),
        (["--k", "0"], "`k` must lie between"),
    ],
)
def test_errors_are_one_line(source, tmp_path, capsys, options, message):
    assert main([str(source), str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said


def test_help_lists_the_formats(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in convert.formats())
    assert "--prefix_widths" in said and "--subfolder" in said
