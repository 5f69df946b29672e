"""Listing and loading what a repository or a folder holds."""

import json
import os

import pytest
import torch

from hf_matryoshka_sae import hub as sae_hub
from hf_matryoshka_sae.hub import SAEInfo, find_saes
from hf_matryoshka_sae.hub.command import pull_main, push_main

from ..models.reference import make_sae
from ..models.test_saving import assert_same_tensors


REPO = "tester/many"
HOOKPOINTS = ("layers.0", "layers.1", "layers.10.mlp:input")


@pytest.fixture
def folder(tmp_path):
    """A folder of three SAEs, with what else a run leaves behind."""
    for hookpoint in HOOKPOINTS:
        sae = make_sae("matryoshka-topk", torch.float32, hookpoint=hookpoint, base_model="some/model")
        sae.save_pretrained(tmp_path / "run" / "sae" / hookpoint.replace(":", "-"))
    make_sae("relu").save_pretrained(tmp_path / "run" / "checkpoint-00000005")
    make_sae("relu").save_pretrained(tmp_path / "run" / "sae" / "layers.0" / ".saving-1")
    (tmp_path / "run" / "other").mkdir()
    (tmp_path / "run" / "other" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "run" / "sae" / "config.json").write_text("not JSON")
    return tmp_path / "run"


def contents(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def repo(hub, folder):
    sae_hub.push(folder, REPO, measure=False, show=False)
    hub.requests.clear()
    return REPO


def test_the_saes_of_a_folder_are_found_without_litter(folder):
    make_sae("relu").save_pretrained(folder / "before-20260101-000000" / "sae" / "layers.0")  # of an earlier run
    found = find_saes(folder)
    assert [sae.subfolder for sae in found] == ["layers.0", "layers.1", "layers.10.mlp-input"]
    assert {sae.name for sae in found} == {"sae"} and [sae.hookpoint for sae in found] == list(HOOKPOINTS)
    assert [sae.subfolder for sae in find_saes(folder, ["sae/*.1"])] == ["layers.1"]
    (alone,) = find_saes(folder / "sae" / "layers.0")
    assert (alone.subfolder, alone.hookpoint) == ("", "layers.0")


def test_listing_reads_the_index_alone(hub, repo):
    found = sae_hub.list_saes(repo)
    assert found["layers.1"] == SAEInfo("layers.1", "matryoshka_sae", "some/model", "layers.1", 6, 13, [2, 5, 13])
    assert list(found) == ["layers.0", "layers.1", "layers.10.mlp-input"]
    assert {request.path.rsplit("/", 1)[1] for request in hub.requests} == {"config.json", "many"}


def test_a_folder_is_listed_by_its_own_places(folder):
    assert next(iter(sae_hub.list_saes(folder))) == "sae/layers.0"
    assert list(sae_hub.list_saes(folder / "sae" / "layers.0")) == [""]


def test_a_repository_without_an_index_is_looked_through(hub, folder):
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*/layers.*/*.*")
        if path.is_file()
    }
    hub.add(REPO, {name: data for name, data in files.items() if "/." not in name})
    assert len(sae_hub.list_saes(REPO)) == 3


@pytest.mark.parametrize("saes", ['{"layers.0": {"model_type": "relu_sae"}}', "[1, 2]", '{"layers.0": 3}'])
def test_a_damaged_index_is_refused(hub, saes):
    hub.add(REPO, {"config.json": f'{{"model_type": "sae_collection", "saes": {saes}}}'.encode()})
    with pytest.raises(ValueError, match="index .*damaged"):
        sae_hub.list_saes(REPO)


@pytest.mark.parametrize("place", ["../out", "/out", "a/../../out", "C:\\\\out", "a\\u0000b"])
def test_an_index_of_places_outside_the_repository_is_refused(hub, place):
    entry = '{"model_type": "relu_sae", "d_in": 6, "num_latents": 13}'
    hub.add(REPO, {"config.json": f'{{"model_type": "sae_collection", "saes": {{"{place}": {entry}}}}}'.encode()})
    with pytest.raises(ValueError, match="index .*damaged.*no place in it"):
        sae_hub.list_saes(REPO)


@pytest.mark.parametrize("field", ['"d_in": "6"', '"num_latents": -1', '"hookpoint": 3', '"prefix_widths": ["a"]'])
def test_an_index_of_absurd_fields_is_refused(hub, field):
    entry = f'{{"model_type": "relu_sae", "d_in": 6, "num_latents": 13, {field}}}'
    hub.add(REPO, {"config.json": f'{{"model_type": "sae_collection", "saes": {{"a": {entry}}}}}'.encode()})
    with pytest.raises(ValueError, match="index .*damaged"):
        sae_hub.list_saes(REPO)


def test_a_type_that_is_not_known_is_said_when_it_is_loaded(hub, repo):
    index = json.loads(hub.files(REPO)["config.json"])
    index["saes"]["layers.1"]["model_type"] = "llama"
    hub.add(REPO, {"config.json": json.dumps(index).encode()})
    assert len(sae_hub.list_saes(REPO)) == 3 and sae_hub.load(REPO, "layers.0")
    with pytest.raises(ValueError, match="layers.1 of tester/many is of the type 'llama', which is no SAE"):
        sae_hub.load(REPO, "layers.1")


def test_a_damaged_index_in_the_cache_is_fetched_again(hub, repo, tmp_path):
    assert len(sae_hub.list_saes(REPO)) == 3
    (cached,) = (tmp_path / "cache").glob("models--tester--many/snapshots/*/config.json")
    cached.resolve().write_text("{")
    assert len(sae_hub.list_saes(REPO)) == 3
    sae_hub.load(REPO, "layers.0")
    (cached,) = (tmp_path / "cache").glob("models--tester--many/snapshots/*/layers.0/config.json")
    cached.resolve().write_text("{")
    with pytest.raises(ValueError, match="config.json of layers.0 of tester/many is damaged.*force_download=True"):
        sae_hub.load(REPO, "layers.0")
    assert sae_hub.load(REPO, "layers.0", force_download=True)


def test_an_index_that_names_what_is_not_there_is_refused(hub, repo):
    index = json.loads(hub.files(REPO)["config.json"])
    index["saes"]["layers.7"] = index["saes"]["layers.0"]
    hub.add(REPO, {"config.json": json.dumps(index).encode()})
    with pytest.raises(ValueError, match="names layers.7, and there is no SAE there"):
        sae_hub.load(REPO, "layers.7")


def test_a_repository_without_saes_is_refused(hub):
    hub.add("tester/other", {"config.json": b'{"model_type": "llama"}'})
    with pytest.raises(ValueError, match="holds no SAE"):
        sae_hub.list_saes("tester/other")


@pytest.mark.parametrize("where", ["Hub", "folder"])
def test_one_is_loaded_by_its_place_or_hookpoint(repo, folder, where):
    source = repo if where == "Hub" else folder
    expected = sae_hub.load(folder / "sae" / "layers.10.mlp-input")
    assert_same_tensors(sae_hub.load(source, "layers.10.mlp:input"), expected)
    assert_same_tensors(sae_hub.load(source, "layers.10.mlp:input", width=4), expected.truncate(4))
    with pytest.raises(ValueError, match="holds 3 SAEs; name one of: .*layers.0"):
        sae_hub.load(source)
    with pytest.raises(ValueError, match="holds 0 SAEs under 'layers.7'; name one of"):
        sae_hub.load(source, "layers.7")


def test_many_are_loaded_by_a_pattern(repo, folder):
    found = sae_hub.load_many(repo, "layers.?", width=3)
    assert list(found) == ["layers.0", "layers.1"] and all(sae.config.num_latents == 3 for sae in found.values())
    assert len(sae_hub.load_many(folder)) == 3
    with pytest.raises(ValueError, match="No SAE of .* matches 'attn'. It holds: layers.0"):
        sae_hub.load_many(repo, "attn")


# Commands


def test_pull_fetches_the_first_latents_and_saves_them_where_asked(hub, repo, folder, tmp_path, capsys):
    assert pull_main([repo, "--width", "4", "--saes", "layers.[01]", "--output_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "tester/many/layers.0: MatryoshkaSAE, 4 of 13 latents, saved in" in printed and "mlp" not in printed
    expected = sae_hub.load(folder / "sae" / "layers.1").truncate(4)
    assert_same_tensors(sae_hub.load(tmp_path / "out" / "layers.1"), expected)
    assert pull_main([repo]) == 0
    assert "layers.10.mlp-input: MatryoshkaSAE, 13 of 13 latents" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="making a link needs a privilege there")
def test_pull_writes_nothing_outside_its_folder(hub, repo, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "layers.0").symlink_to(tmp_path / "elsewhere")
    assert pull_main([repo, "--saes", "layers.0", "--output_dir", str(tmp_path / "out")]) == 2
    assert "'layers.0' would be saved outside" in capsys.readouterr().err
    assert not (tmp_path / "elsewhere").exists()
    assert pull_main([repo, "--saes", "layers.1", "--output_dir", str(tmp_path / "out")]) == 0


def test_mistakes_are_one_line_and_a_status(hub, repo, capsys):
    cases = {
        ("tester/nowhere",): "tester/nowhere",
        (repo, "--width", "14"): "`width` must lie between 1 and 13 for layers.0, got 14",
        (repo, "--saes", "x"): "No SAE of tester/many matches 'x'",
    }
    for arguments, message in cases.items():
        assert pull_main(list(arguments)) == 2
        assert message in capsys.readouterr().err
    assert not any("safetensors" in request.path for request in hub.requests)


def test_push_writes_what_it_would_send(hub, folder, tmp_path, capsys):
    assert push_main([str(folder), REPO, "--no_measure", "--dry_run", str(tmp_path / "dry")]) == 0
    assert not hub.requests and "tester/many" in capsys.readouterr().out
    assert push_main([str(folder), REPO, "--no_measure", "--private"]) == 0
    assert f"/{REPO}/commit/" in capsys.readouterr().out and hub.repos[REPO].private
    written = {
        p.relative_to(tmp_path / "dry").as_posix(): p.read_bytes()
        for p in (tmp_path / "dry").rglob("*.*")
        if p.is_file()
    }
    assert written == hub.files(REPO)
    weights = folder / "sae" / "layers.0" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:300])
    assert push_main([str(folder), REPO, "--no_measure", "--dry_run", str(tmp_path / "dry")]) == 2
    assert "damaged or half-written" in capsys.readouterr().err
    assert push_main([str(tmp_path / "nowhere"), REPO]) == 2
    assert "is no folder" in capsys.readouterr().err
