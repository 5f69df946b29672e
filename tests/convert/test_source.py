"""Finding the one SAE that is meant: in folders, in files, and on a Hub, of which nothing else is downloaded."""

import io
import json
import logging

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from hf_matryoshka_sae import TopKSAEConfig, build_sae, convert
from hf_matryoshka_sae.convert.source import find_weights

from .reference import assert_computes, encode_decode, inputs, relu, weights


@pytest.mark.parametrize(
    "paths, inside, found",
    [
        (["a/cfg.json", "a/sae_weights.safetensors", "a/sparsity.safetensors"], "", ["a/sae_weights.safetensors"]),
        (["ae.pt", "checkpoints/ae_0.pt", "checkpoints/ae_9.pt"], "", ["ae.pt"]),
        (["t/ae.pt", "t/checkpoints/ae_0.pt", "u/ae.pt"], "", ["t/ae.pt", "u/ae.pt"]),
        (["t/ae.pt", "t/checkpoints/ae_0.pt"], "t/checkpoints", ["t/checkpoints/ae_0.pt"]),
        (["x/params.safetensors", "x/examples.safetensors"], "x", ["x/params.safetensors"]),
        (["layer0.sae.pt", "layer1.sae.pt"], "layer1.sae.pt", ["layer1.sae.pt"]),
        (["m/model.safetensors", "m/checkpoint-5/model.safetensors", "m/.saving-1/model.safetensors",
          "m/before-20260101-000000/x/model.safetensors"], "",
         ["m/model.safetensors"]),
        (["model.safetensors.index.json", "model-00001-of-00002.safetensors"], "", ["model.safetensors.index.json"]),
        (["Llama-SAE-l19.pth", "README.md"], "", ["Llama-SAE-l19.pth"]),
        (["layers.1/sae.safetensors", "layers.10/sae.safetensors"], "layers.1", ["layers.1/sae.safetensors"]),
        (["README.md", "trainer_state.pt"], "", []),
        (["a/sae.safetensors"], "b", []),
    ],
)  # fmt: skip
def test_weights_among_other_files(paths, inside, found):
    assert find_weights(paths, inside) == found


def test_nothing_and_nonsense(tmp_path):
    with pytest.raises(ValueError, match="no file or folder here"):
        convert.load(tmp_path / "nothing")
    (tmp_path / "README.md").write_text("text")
    with pytest.raises(ValueError, match=r"holds no SAE: none of its 1 files \(README.md\)"):
        convert.load(tmp_path)


# On a Hub


def saelens_files(prefix, tensors):
    state = {name: tensors[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    state["W_enc"] = state["W_enc"].T.contiguous()
    config = {"d_in": 16, "d_sae": 64, "architecture": "standard", "metadata": {}}
    return {
        f"{prefix}/cfg.json": json.dumps(config).encode(),
        f"{prefix}/sae_weights.safetensors": save(state),
        f"{prefix}/sparsity.safetensors": save({"sparsity": torch.zeros(64)}),
    }


@pytest.fixture
def repository(hub):
    tensors = weights(16, 64)
    files = {"README.md": b"# SAEs"}
    for layer in range(3):
        files |= saelens_files(f"layer_{layer}", tensors | {"b_dec": tensors["b_dec"] + layer})
    hub.add("someone/saes", files)
    hub.requests.clear()
    return hub, tensors


def test_only_the_files_of_one_sae_are_downloaded(repository):
    hub, tensors = repository
    sae = convert.load("someone/saes", subfolder="layer_2")
    x = inputs(16)
    assert_computes(sae, x, *encode_decode(x, tensors | {"b_dec": tensors["b_dec"] + 2}, relu))
    names = {request.path for request in hub.requests if "/resolve/" in request.path}
    assert {name.split("/layer_")[-1] for name in names} == {"2/cfg.json", "2/sae_weights.safetensors"}


def test_several_are_listed_without_downloading(repository):
    hub, _ = repository
    with pytest.raises(ValueError, match="holds 3 SAEs; pass `subfolder` to say which: layer_0, layer_1, layer_2"):
        convert.load("someone/saes")
    assert not any("/resolve/" in request.path for request in hub.requests)
    with pytest.raises(ValueError, match="under 'layer_9' holds no SAE"):
        convert.load("someone/saes", subfolder="layer_9")


def test_revisions(repository):
    hub, tensors = repository
    first = hub.repos["someone/saes"].branches["main"]
    hub.add("someone/saes", saelens_files("layer_0", tensors | {"b_dec": tensors["b_dec"] * 0}))
    assert convert.load("someone/saes", subfolder="layer_0").b_dec.abs().max() == 0
    old = convert.load("someone/saes", subfolder="layer_0", revision=first)
    torch.testing.assert_close(old.b_dec.detach(), tensors["b_dec"])
    with pytest.raises(ValueError, match="no revision 'v9'"):
        convert.load("someone/saes", revision="v9")


def test_no_such_repository(hub):
    with pytest.raises(ValueError, match="the Hub has no such repository"):
        convert.load("someone/nothing")


def test_names_in_the_repository_count(hub):
    tensors = weights(16, 64)
    state = {name: tensors[name] for name in ("W_enc", "b_enc", "b_dec")} | {"W_dec": tensors["W_dec"].T.contiguous()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    hub.add("Qwen/SAE-Res-Qwen3-8B-Base-W1K-L0_5", {"layer4.sae.pt": buffer.getvalue()})
    sae = convert.load("Qwen/SAE-Res-Qwen3-8B-Base-W1K-L0_5")
    assert (sae.config.k, sae.config.hookpoint) == (5, "model.layers.4")
    assert sae.config.base_model == "Qwen/Qwen3-8B-Base"


def test_our_own_format_on_a_hub(hub, tmp_path):
    sae = build_sae(TopKSAEConfig(d_in=16, num_latents=64, k=4))
    sae.save_pretrained(tmp_path / "sae")
    files = {f"layers.1/{file.name}": file.read_bytes() for file in (tmp_path / "sae").iterdir()}
    hub.add("someone/ours", files)
    back = convert.load("someone/ours", width=8)
    assert torch.equal(back.W_enc, sae.W_enc[:8])


def test_without_a_connection_the_cache_is_enough(repository, monkeypatch):
    _, tensors = repository
    convert.load("someone/saes", subfolder="layer_1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    sae = convert.load("someone/saes", subfolder="layer_1")
    torch.testing.assert_close(sae.b_dec.detach(), tensors["b_dec"] + 1)
    with pytest.raises(ValueError, match="the Hub cannot be reached"):
        convert.load("someone/other")


@pytest.mark.parametrize("how", ["500", "truncate"])
def test_a_broken_download_is_a_clear_error(repository, how, caplog, monkeypatch):
    hub, _ = repository
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits before it tries again
    with caplog.at_level(logging.ERROR):
        hub.fail(2, how, times=50)
        with pytest.raises(ValueError, match="layer_1/cfg.json|cannot be downloaded|cannot be reached"):
            convert.load("someone/saes", subfolder="layer_1")
