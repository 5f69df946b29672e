"""The pages: their functions on good and bad uploads, and that they build. No browser."""

import importlib
import json

import numpy as np
import pytest
import torch

from hf_matryoshka_sae.evaluation.reconstruction import ReconstructionSums
from hf_matryoshka_sae.metrics.uploads import read_array, read_arrays, read_numbers, read_statistics


gr = pytest.importorskip("gradio")
pytest.importorskip("evaluate")


@pytest.fixture(scope="module")
def pages():
    names = ("sae_fidelity", "progressive_curve")
    return {name: importlib.import_module(f"hf_matryoshka_sae.metrics.{name}.app") for name in names}


@pytest.fixture
def arrays(tmp_path):
    """Hidden states, and files of them and of reconstructions at 2 widths."""
    x = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "both.npy", np.stack([0.5 * x, 0.9 * x]))
    np.savetxt(tmp_path / "half.csv", 0.5 * x, delimiter=",")
    np.savetxt(tmp_path / "most.csv", 0.9 * x, delimiter=";")
    return x, {path.name: str(path) for path in tmp_path.iterdir()}


def sums_of(x, *factors):
    sums = ReconstructionSums.zeros(len(factors), x.shape[1])
    sums.add(torch.from_numpy(x), torch.stack([factor * torch.from_numpy(x) for factor in factors]))
    return sums


def test_fidelity_of_uploads_pastes_and_sums(pages, arrays):
    page, (x, files) = pages["sae_fidelity"], arrays
    sums = sums_of(x, 0.5)
    (wanted,) = sums.rows()
    pasted = "\n".join(" ".join(map(str, row)) for row in x)
    for found in (
        page.measure_arrays(files["x.npy"], "", files["half.csv"], ""),
        page.measure_arrays(None, pasted, files["half.csv"], "ignored"),
        page.measure_statistics(None, json.dumps(sums.to_dict())),
    ):
        table = {name: value for name, value, meaning in found if meaning}
        assert table.pop("tokens") == 40
        assert table == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_the_curve_of_uploads_pastes_and_sums(pages, arrays):
    page, (x, files) = pages["progressive_curve"], arrays
    pasted = [files["half.csv"], files["most.csv"]]
    for summary, table, charts in (
        page.measure_arrays(files["x.npy"], "", [files["both.npy"]], "", "8, 64", "0.1"),
        page.measure_arrays(files["x.npy"], "", pasted, "", "8 64", "0.1"),
        page.measure_statistics(None, json.dumps([sums_of(x, 0.5, 0.9).to_dict()]), "8, 64", "0.1"),
    ):
        column = table["headers"].index("fvu")
        assert [row[0] for row in table["data"]] == [8, 64]
        fvu = [row[column] for row in table["data"]]
        assert fvu == pytest.approx([row["fvu"] for row in sums_of(x, 0.5, 0.9).rows()], rel=1e-3)
        assert "40 tokens" in summary and "An FVU of 0.1 takes **" in summary
        assert charts.count("<nested-chart") == 2 and charts.count("[8, ") == charts.count("[64, ") == 2


def test_the_examples_can_be_measured(pages):
    states, reconstructions = pages["sae_fidelity"].EXAMPLE
    assert pages["sae_fidelity"].measure_arrays(None, states, None, reconstructions)
    states, reconstructions, widths = pages["progressive_curve"].EXAMPLE
    found = pages["progressive_curve"].measure_arrays(None, states, None, reconstructions, widths, "0.5, 0.001")
    assert "takes at most **8** latents" in found[0] and "0.001 is not reached" in found[0]


def test_a_bad_upload_is_a_message(pages, arrays):
    _, files = arrays
    for wrong, message in [
        ((None, "", None, "1"), "Upload or paste the hidden states"),
        ((files["x.npy"], "", None, "1 2"), "same number of rows"),
        ((files["x.npy"], "", files["both.npy"], ""), "same number of rows"),
    ]:
        with pytest.raises(gr.Error, match=message):
            pages["sae_fidelity"].measure_arrays(*wrong)
    with pytest.raises(gr.Error, match="no JSON"):
        pages["sae_fidelity"].measure_statistics(None, "{")
    curve = pages["progressive_curve"]
    for wrong, message in [
        ((files["x.npy"], "", None, "1 2", "8", "0.1"), "of that shape at each width"),
        ((files["x.npy"], "", [files["both.npy"]], "", "8", "0.1"), "2 strictly increasing numbers"),
        ((files["x.npy"], "", [files["both.npy"]], "", "8, 8.5", "0.1"), "whole numbers"),
        ((files["x.npy"], "", [files["both.npy"]], "", "", "0.1"), "Enter the widths"),
        ((files["x.npy"], "", [files["both.npy"], files["x.npy"]], "", "8, 9", "0.1"), "the same shape"),
    ]:
        with pytest.raises(gr.Error, match=message):
            curve.measure_arrays(*wrong)


def test_what_is_no_array_is_named(tmp_path):
    (tmp_path / "text.npy").write_bytes(b"hello")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.save(tmp_path / "strings.npy", np.array(["a"]))
    for name in ("text.npy", "bytes.csv", "objects.npy", "strings.npy"):
        with pytest.raises(ValueError, match=f"{name}|must be numbers"):
            read_array(str(tmp_path / name), None, "hidden states")
    with pytest.raises(ValueError, match="without a header"):
        read_array(None, "a,b\n1,2", "hidden states")
    with pytest.raises(ValueError, match="Upload or paste the reconstructions"):
        read_arrays(None, " \n", "reconstructions")
    with pytest.raises(ValueError, match=r"result of ReconstructionSums.to_dict"):
        read_statistics(None, "[1]")
    with pytest.raises(ValueError, match="must be numbers separated by commas"):
        read_numbers("1, x", "widths")


def test_pages_build_with_named_endpoints(pages):
    for page in pages.values():
        endpoints = page.build_demo().get_api_info()["named_endpoints"]
        assert set(endpoints) == {"/measure_arrays", "/measure_statistics"}
