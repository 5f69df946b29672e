"""What a card needs is measured once, with the run's own text, and again where the weights have changed."""

import json
import shutil

import pytest
import torch
from transformers import AutoModel

from hf_matryoshka_sae.assets import embedded_sae_path
from hf_matryoshka_sae.hub import measure
from hf_matryoshka_sae.hub.card import card_assets, run_card
from hf_matryoshka_sae.hub.layout import find_saes
from hf_matryoshka_sae.hub.measure import is_measured, measure_run
from hf_matryoshka_sae.models.digests import folder_digest
from hf_matryoshka_sae.progressive import LatentStatistics


NESTED = "nested/model.layers.0"


def times(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_sae_gets_its_files_and_the_run_its_baselines(measured_run):
    names = ("statistics.safetensors", "progressive_curve.json", "progressive_curve.png", "power_law.json")
    for sae in find_saes(measured_run):
        assert all((sae.folder / name).is_file() for name in names)
        assert all(is_measured(sae.folder, name) for name in ("statistics", "progressive_curve", "power_law"))
    results = json.loads((measured_run / "evaluation.json").read_text())["results"]
    assert [result["hookpoint"] for result in results] == ["model.layers.0", "model.layers.2:input"]
    assert {"nested", "plain", "random (nested)", "random (plain)", "identity"} <= results[0]["saes"].keys()
    assert (measured_run / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_the_held_out_text_is_that_of_the_closing_report(measured_run):
    closing = {each["hookpoint"]: each for each in json.loads((measured_run / "results.json").read_text())["results"]}
    for result in json.loads((measured_run / "evaluation.json").read_text())["results"]:
        report = closing[result["hookpoint"]]
        assert result["tokens"] == report["tokens"] == 240
        for name, rows in report["saes"].items():
            for row, again in zip(rows, result["saes"][name], strict=True):
                assert again["fvu"] == pytest.approx(row["fvu"], rel=1e-6)
                assert again["ce"] == pytest.approx(row["ce"], rel=1e-6)


def test_losses_of_a_curve_are_measured_at_the_prefix_widths(measured_run):
    rows = json.loads((measured_run / NESTED / "progressive_curve.json").read_text())["rows"]
    assert {row["width"] for row in rows if row.get("ce") is not None} == {32, 160}
    assert len(rows) > 5


def test_a_second_call_opens_nothing_and_writes_nothing(measured_run, monkeypatch):
    before = times(measured_run)
    monkeypatch.setattr(measure, "load_language_model", lambda *a, **k: pytest.fail("the language model was opened"))
    measure_run(measured_run)
    assert times(measured_run) == before


def test_what_is_done_when_killed_is_not_done_again(finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "_evaluate", lambda *a: None)
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    with monkeypatch.context() as patch:
        patch.setattr(measure, "_write_power_laws", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            measure_run(folder, names=["plain"], show=False)
    place = folder / "plain/model.layers.0"
    before = times(place)
    assert is_measured(place, "progressive_curve") and not is_measured(place, "power_law")
    measure_run(folder, names=["plain"], show=False)
    after = times(place)
    for name in ("statistics.safetensors", "progressive_curve.json", "progressive_curve.png"):
        assert after[place / name] == before[place / name]
    assert is_measured(place, "power_law")
    assert not (folder / "nested/model.layers.0/measured.json").exists()


def test_changed_weights_are_measured_again_and_the_others_are_not(run_copy):
    before = times(run_copy)
    sae = AutoModel.from_pretrained(run_copy / "plain/model.layers.0")
    with torch.no_grad():
        sae.b_dec.add_(1.0)
    sae.save_pretrained(run_copy / "plain/model.layers.0")
    assert not is_measured(run_copy / "plain/model.layers.0", "progressive_curve")
    measure_run(run_copy, show=False)
    after = times(run_copy)
    changed = {path.relative_to(run_copy).parts[0] for path in after if after[path] != before.get(path)}
    assert changed == {"plain", "evaluation.json", "evaluation.png", "measured.json"}


def test_statistics_that_a_user_made_of_these_weights_are_kept(finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "_evaluate", lambda *a: None)
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    place = folder / "plain/model.layers.0"
    sae = AutoModel.from_pretrained(place)
    own = measure.latent_statistics(sae, [torch.randn(70, sae.config.d_in)])
    own.save(place)
    measure_run(folder, names=["plain"], show=False)
    assert LatentStatistics.load(place).tokens == 70
    assert json.loads((place / "power_law.json").read_text())["tokens"] == 70


def test_what_was_deleted_or_damaged_is_measured_again_and_nothing_else(run_copy):
    place, before = run_copy / "plain/model.layers.0", times(run_copy)
    (place / "statistics.safetensors").unlink()
    (place / "power_law.json").unlink()
    (run_copy / "evaluation.json").write_text("[]")
    measure_run(place, show=False)
    assert LatentStatistics.load(place).tokens == 240
    assert times(run_copy)[place / "progressive_curve.json"] == before[place / "progressive_curve.json"]
    (result,) = json.loads((run_copy / "evaluation.json").read_text())["results"]
    assert list(result["weights"]) == ["plain/model.layers.0"] and "plain" in result["saes"]


def test_too_few_values_for_a_power_law_are_said_to_be_too_few(measured_run, tmp_path):
    sae = AutoModel.from_pretrained(measured_run / NESTED).truncate(40)
    statistics = LatentStatistics.load(measured_run / NESTED).select(torch.arange(40))
    measure._write_power_laws(sae, statistics, tmp_path)
    found = json.loads((tmp_path / "power_law.json").read_text())
    assert "needs 50 values" in found["not_fitted"]["energy"]


def test_a_folder_without_a_run_is_an_error_that_says_so(measured_run, tmp_path):
    shutil.copytree(measured_run / "nested", tmp_path / "nested")
    with pytest.raises(ValueError, match="no run.yaml"):
        measure_run(tmp_path)
    measure_run(tmp_path / NESTED)  # a single SAE may come from anywhere


def test_prefixes_are_drawn_nested_where_an_index_knows_them(tmp_path):
    folder = tmp_path / "sae"
    shutil.copytree(embedded_sae_path(), folder)
    weights, path = folder_digest(folder), folder / "nested_prefixes.png"
    measure._draw_nested(folder, weights)
    drawn = path.stat().st_mtime_ns
    assert path.read_bytes().startswith(b"\x89PNG") and is_measured(folder, "nested_prefixes", weights)
    measure._draw_nested(folder, weights)
    assert path.stat().st_mtime_ns == drawn
    assert card_assets(folder) == {"plots/nested_prefixes.png": path}
    assert "](plots/nested_prefixes.png)" in str(run_card(folder, "me/sae"))
    path.unlink()
    sae = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        sae.W_enc += 1
    sae.save_pretrained(folder)
    measure._draw_nested(folder, folder_digest(folder))  # of an index of other weights nothing is drawn
    assert not path.exists()
