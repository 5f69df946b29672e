"""The sub-command against the functions it is made of, and two processes against one."""

import json
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch

from hf_matryoshka_sae import cli, convert
from hf_matryoshka_sae.evaluation import Dictionary, evaluate_fidelity, open_heldout, weight_geometry
from hf_matryoshka_sae.evaluation.opening import open_saes
from hf_matryoshka_sae.models import MatryoshkaSAEConfig, TopKSAEConfig, build_sae


HOOKPOINT = "model.layers.1"
SMALL = ["--tokens", "700", "--context_length", "40"]


def saved(folder, config_class=MatryoshkaSAEConfig, **fields):
    """An untrained SAE for the embedded model, saved as a run saves it."""
    torch.manual_seed(1)
    fields = {"d_in": 128, "num_latents": 48, "k": 5, "base_model": "embedded", "hookpoint": HOOKPOINT, **fields}
    if config_class is MatryoshkaSAEConfig:
        fields.setdefault("prefix_widths", [8, 20, 48])
    sae = build_sae(config_class(**fields)).eval()
    sae.W_enc.data *= 0.1
    if hasattr(sae, "threshold"):
        sae.threshold.data.fill_(0.3)
    sae.save_pretrained(folder)
    return sae


def found(folder):
    (result,) = json.loads((folder / "evaluation.json").read_text())["results"]
    return result


def near(got, wanted):
    """Equal but for the order in which sums were taken."""
    if isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        for key, value in wanted.items():
            near(got[key], value)
    elif isinstance(wanted, list):
        assert len(got) == len(wanted)
        for pair in zip(got, wanted, strict=True):
            near(*pair)
    else:
        assert got == pytest.approx(wanted, rel=1e-6, abs=1e-9) if isinstance(wanted, float) else got == wanted


@pytest.mark.slow
def test_the_report_is_what_the_functions_give(tmp_path, capsys):
    sae = saved(tmp_path / "run/nested" / HOOKPOINT)
    assert cli.main(["evaluate", str(tmp_path / "run/nested" / HOOKPOINT), *SMALL]) == 0
    result = found(tmp_path / "run/nested" / HOOKPOINT)
    data = open_heldout("embedded", HOOKPOINT, tokens=700, context_length=40)
    wanted = evaluate_fidelity(data, {"nested": Dictionary(sae)}, show=False)
    assert list(result["saes"]) == ["nested", "random (nested)", "principal components", "identity"]
    for row, expected, shape in zip(
        result["saes"]["nested"], wanted["subjects"]["nested"], weight_geometry(sae), strict=True
    ):
        near({key: row[key] for key in expected}, expected)
        near(row["geometry"], shape)
        density = row["density"]
        assert density["tokens"] == 700 and density["frac_alive"] == pytest.approx(1 - row["dead"])
    for row, expected in zip(result["saes"]["random (nested)"], result["saes"]["nested"], strict=True):
        assert row["l0"] == pytest.approx(expected["l0"], rel=0.01)
        assert 0 < row["fvu"] < 1
    (identity,) = result["saes"]["identity"]
    assert (identity["fvu"], identity["recaptured_zero"]) == (0, 1)
    assert [row["width"] for row in result["saes"]["principal components"]] == [8, 20, 48]
    assert (tmp_path / "run/nested" / HOOKPOINT / "evaluation.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "recaptured" in printed and "max dec cos" in printed and "evaluation.png" in printed


def test_all_saes_of_a_folder_at_the_widths_given(tmp_path):
    saved(tmp_path / "run/nested" / HOOKPOINT)
    topk = saved(tmp_path / "run/plain" / HOOKPOINT, TopKSAEConfig)
    saved(tmp_path / "run/before-20260101-000000/plain" / HOOKPOINT)  # of an earlier run
    (tmp_path / "run/checkpoint-1").mkdir()
    (tmp_path / "run/checkpoint-1/config.json").write_text('{"model_type": "llama"}')
    out = tmp_path / "out"
    flags = ["--widths", "16,8", "--selection", "restrict", "--no_baselines", "--output_dir", str(out)]
    assert cli.main(["evaluate", str(tmp_path / "run"), *SMALL, *flags]) == 0
    result = found(out)
    assert list(result["saes"]) == ["nested", "plain"] and result["selection"] == "restrict"
    assert [row["width"] for row in result["saes"]["plain"]] == [8, 16]
    assert [row["l0"] for row in result["saes"]["plain"]] == [
        pytest.approx(sum(restricted_l0(topk, width)) / 700) for width in (8, 16)
    ]
    alive = [row["density"]["frac_alive"] for row in result["saes"]["plain"]]
    assert alive == pytest.approx([1 - row["dead"] for row in result["saes"]["plain"]])


def restricted_l0(sae, width):
    data = open_heldout("embedded", HOOKPOINT, tokens=700, context_length=40)
    for x in data.activations():
        yield (sae.truncate(width).encode(x).to_dense() > 0).sum().item()


def test_names_tell_saes_apart(tmp_path):
    for place in ("a/model.layers.1", "b/model.layers.1-input", "c"):
        hookpoint = "model.layers.1:input" if place.startswith("b") else HOOKPOINT
        saved(tmp_path / place, hookpoint=hookpoint)
    saved(tmp_path / "a/model.layers.2", hookpoint="model.layers.2")
    groups, folder = open_saes(str(tmp_path))
    assert folder == tmp_path
    assert {where: list(saes) for where, saes in groups.items()} == {
        ("embedded", HOOKPOINT): ["a", "c"],
        ("embedded", "model.layers.1:input"): ["b"],
        ("embedded", "model.layers.2"): ["a"],
    }
    (together,) = open_saes(str(tmp_path), hookpoint=HOOKPOINT)[0].values()
    assert list(together) == ["a/model.layers.1", "a/model.layers.2", "b", "c"]
    for subfolder in ("a/model.layers.1", "c"):
        assert list(*open_saes(str(tmp_path), subfolder)[0].values()) == [subfolder[0]]


def test_a_peers_checkpoint_is_evaluated_as_what_it_becomes(tmp_path):
    """The same latents saved by this package and as SAELens saves them have the same figures."""
    sae = saved(tmp_path / "ours", TopKSAEConfig)
    convert.save(sae, tmp_path / "theirs" / "layer_1", "saelens")
    results = []
    for source in ("ours", "theirs"):
        out = tmp_path / f"out-{source}"
        flags = ["--hookpoint", HOOKPOINT, "--model", "embedded", "--no_baselines", "--output_dir", str(out)]
        assert cli.main(["evaluate", str(tmp_path / source), *SMALL, *flags]) == 0
        results.append(found(out)["saes"])
    near(results[1]["layer_1"][0]["fvu"], results[0]["ours"][0]["fvu"])
    near(results[1]["layer_1"][0]["l0"], results[0]["ours"][0]["l0"])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--hookpoint", "model.layers.9"], "model.layers.9"),
        (["--model", "nowhere/nothing"], "--dataset"),
        (["--dataset", "missing.txt"], "missing.txt"),
        (["--widths", "8,64"], r"between 1 and 48, got [8, 64]"),
        (["--subfolder", "other"], "holds no SAE"),
        (["--tokens", "0"], "`tokens` must be at least 1"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path)
    assert cli.main(["evaluate", str(tmp_path), *SMALL, *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "evaluation.json").exists()


def test_what_the_config_lacks_must_be_named(tmp_path, capsys):
    saved(tmp_path / "a", base_model=None)
    assert cli.main(["evaluate", str(tmp_path / "a")]) == 2
    assert "names no model; pass --model" in capsys.readouterr().err
    assert cli.main(["evaluate", str(tmp_path / "nothing")]) == 2
    assert "There is no folder or file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(tmp_path / "a"), "--widths", "8,x"])
    assert "whole numbers such as 64,128,256" in capsys.readouterr().err


def _printed(rank: int, command: list[str]) -> str:
    with redirect_stdout(StringIO()) as output:
        assert cli.main(command) == 0
    return output.getvalue()


@pytest.mark.release
def test_two_processes_report_what_one_does(tmp_path, two_processes):
    saved(tmp_path / "sae")
    command = ["evaluate", str(tmp_path / "sae"), "--tokens", "1500", "--context_length", "40", "--output_dir"]
    printed = "".join(two_processes.run(_printed, [*command, str(tmp_path / "two")]))
    assert printed.count("held-out tokens") == printed.count("Saved") == 1
    assert cli.main([*command, str(tmp_path / "one")]) == 0
    near(found(tmp_path / "two"), found(tmp_path / "one"))
