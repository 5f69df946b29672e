"""What is found in a folder, a file and a repository, and what is left out."""

import json

import pytest
import torch

from hf_matryoshka_sae import convert
from hf_matryoshka_sae.convert import saes_in
from hf_matryoshka_sae.convert.places import only_sae

from ..models.reference import make_sae
from .reference import weights
from .test_source import saelens_files


def write(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@pytest.fixture
def theirs() -> dict[str, bytes]:
    """Two SAEs as SAELens has them, beside a language model, a state of training and what was moved aside."""
    files = saelens_files("layer_0", weights(16, 64)) | saelens_files("layer_1", weights(16, 64))
    files |= saelens_files("checkpoint-5", weights(16, 64)) | saelens_files(".saving-1", weights(16, 64))
    return files | {"lm/config.json": b'{"model_type": "llama"}', "lm/model.safetensors": b"", "optimizer.pt": b""}


@pytest.mark.parametrize("where", ["folder", "Hub"])
def test_another_librarys_saes_are_found_by_their_files(hub, tmp_path, theirs, where):
    write(tmp_path, theirs)
    hub.add("someone/saes", theirs)
    source = str(tmp_path) if where == "folder" else "someone/saes"
    saes = saes_in(source)
    assert list(saes) == ["layer_0", "layer_1"] and [sae.name for sae in saes.values()] == list(saes)
    assert all(sae.config is None for sae in saes.values())
    assert saes["layer_1"].load().config.d_in == 16 and saes["layer_1"].load(width=5).config.num_latents == 5
    (alone,) = saes_in(source, "layer_1").values()
    assert (alone.name, alone.load().config.num_latents) == ("layer_1", 64)
    with pytest.raises(ValueError, match="holds 2 SAEs. One is wanted. Name one of: layer_0, layer_1"):
        only_sae(saes, " One is wanted.")


def test_a_file_of_weights_is_an_sae(tmp_path, theirs):
    write(tmp_path, theirs)
    path = tmp_path / "layer_0" / "sae_weights.safetensors"
    assert torch.equal(saes_in(path)[""].load().W_enc, convert.load(path).W_enc)


@pytest.mark.parametrize("where", ["folder", "Hub"])
def test_those_of_this_package_come_first_and_keep_their_dtype(hub, tmp_path, theirs, where):
    write(tmp_path, theirs)
    sae = make_sae("relu", torch.bfloat16, hookpoint="layers.2:input")
    sae.save_pretrained(tmp_path / "run" / "layers.2-input")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("not JSON")
    hub.add(
        "someone/saes",
        {p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in tmp_path.rglob("*.*") if p.is_file()},
    )
    saes = saes_in(tmp_path if where == "folder" else "someone/saes")
    assert list(saes) == ["run/layers.2-input"]
    (place,) = saes.values()
    assert (place.name, place.hookpoint) == ("run", "layers.2:input")
    assert place.load().dtype == torch.bfloat16 and torch.equal(place.load().W_dec, sae.W_dec)
    assert place.load_config().hookpoint == "layers.2:input"


def test_the_embedded_one_has_no_folder_to_write_to():
    (place,) = saes_in("embedded").values()
    assert (place.name, place.folder) == ("embedded", None) and place.load().config.num_latents == 2048


@pytest.mark.parametrize("source", ["/nowhere", "./nowhere", "a/b/c", "x" * 500, "a\tb"])
def test_what_is_no_place_at_all_is_said(source):
    with pytest.raises(ValueError, match="no folder or file .* no name of a repository"):
        saes_in(source)


def test_a_language_model_is_no_sae(hub, tmp_path):
    files = {"config.json": json.dumps({"model_type": "gpt2"}).encode(), "model.safetensors": b""}
    write(tmp_path, files)
    hub.add("someone/lm", files)
    for source in (tmp_path, "someone/lm"):
        with pytest.raises(ValueError, match="holds no SAE"):
            saes_in(source)
