"""A run's folder, or a repository, that is named as a whole: the SAE that is meant, or which there are."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel

from hf_matryoshka_sae import MatryoshkaSAE, TopKSAE
from hf_matryoshka_sae import hub as sae_hub
from hf_matryoshka_sae.models.places import collection_index, saes_below

from ..axes import each
from .reference import make_sae
from .test_saving import assert_same_tensors


REPO = "tester/run"


@pytest.fixture(params=["with an index", "of an earlier version"])
def run(request, tmp_path):
    """Makes a run's folder with an SAE at each of some hookpoints, and gives these."""

    def make(*hookpoints):
        saes = {}
        for hookpoint in hookpoints:
            saes[hookpoint] = make_sae("matryoshka-topk", torch.float32, hookpoint=hookpoint)
            saes[hookpoint].save_pretrained(tmp_path / "run" / "nested" / hookpoint)
        make_sae("relu").save_pretrained(tmp_path / "run" / "checkpoint-00000005")
        make_sae("relu").save_pretrained(tmp_path / "run" / ".trash" / "old")
        if request.param == "with an index":
            index = collection_index(saes_below(tmp_path / "run"))
            (tmp_path / "run" / "config.json").write_text(json.dumps(index))
        return tmp_path / "run", saes

    return make


@each(width=[None, 4], subfolder=["", "nested", "nested/", "nested/layers.3"])
def test_the_only_sae_of_a_run_is_loaded_from_its_folder(run, subfolder, width):
    folder, saes = run("layers.3")
    loaded = MatryoshkaSAE.from_pretrained(folder, subfolder=subfolder, width=width)
    assert_same_tensors(loaded, saes["layers.3"] if width is None else saes["layers.3"].truncate(width))
    with pytest.raises(ValueError, match="holds a matryoshka_sae, not a topk_sae"):
        TopKSAE.from_pretrained(folder, subfolder=subfolder, width=width)


def test_auto_model_loads_from_a_run_with_an_index_what_it_loads_from_the_hub(tmp_path):
    sae = make_sae("gated", torch.float32, hookpoint="layers.3")
    sae.save_pretrained(tmp_path / "gated" / "layers.3")
    (tmp_path / "config.json").write_text(json.dumps(collection_index(saes_below(tmp_path))))
    assert_same_tensors(AutoModel.from_pretrained(tmp_path), sae)
    assert_same_tensors(AutoModel.from_pretrained(tmp_path, width=4), sae.truncate(4))
    assert AutoConfig.from_pretrained(tmp_path).saes["gated/layers.3"]["num_latents"] == sae.config.num_latents
    make_sae("relu").save_pretrained(tmp_path / "relu" / "layers.3")  # copied there later
    with pytest.raises(ValueError, match="holds 2 SAEs. .* one of gated/layers.3, relu/layers.3"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("width", [None, 4])
def test_the_saes_of_a_folder_are_listed_where_none_or_another_is_named(run, width):
    folder, _ = run("layers.3", "layers.4")
    there = r"`subfolder=` one of nested/layers\.3, nested/layers\.4\."
    with pytest.raises(ValueError, match=f"holds 2 SAEs. Say which: {there}"):
        MatryoshkaSAE.from_pretrained(folder, width=width)
    for wrong in ("layers.3", "nested/layers.5", "nested"):
        with pytest.raises(ValueError, match=f"no SAE in its subfolder '{wrong}'. Say which: {there}"):
            MatryoshkaSAE.from_pretrained(folder, subfolder=wrong, width=width)
    loaded = MatryoshkaSAE.from_pretrained(folder, subfolder="nested/layers.4", width=width)
    assert loaded.config.hookpoint == "layers.4"


def test_what_is_no_run_is_refused_as_before(tmp_path):
    with pytest.raises(OSError, match="no weights in .*model.safetensors"):
        MatryoshkaSAE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="holds a llama"):
        MatryoshkaSAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("width", [None, 4])
def test_a_repository_lists_its_saes_likewise(hub, run, width):
    folder, saes = run("layers.3", "layers.4")
    sae_hub.push(folder, REPO, measure=False, show=False)
    there = r"`subfolder=` one of layers\.3, layers\.4\."
    for index in (True, False):
        if not index:
            files = {name: data for name, data in hub.files(REPO).items() if name != "config.json"}
            hub.add("tester/other", files)
        repo = REPO if index else "tester/other"
        with pytest.raises(ValueError, match=f"holds 2 SAEs. Say which: {there}"):
            MatryoshkaSAE.from_pretrained(repo, width=width)
        with pytest.raises(ValueError, match=f"no SAE in its subfolder 'nested/layers.3'. Say which: {there}"):
            MatryoshkaSAE.from_pretrained(repo, subfolder="nested/layers.3", width=width)
        loaded = MatryoshkaSAE.from_pretrained(repo, subfolder="layers.3", width=width)
        assert_same_tensors(loaded, saes["layers.3"] if width is None else saes["layers.3"].truncate(width))


@pytest.mark.parametrize("load", [AutoModel, MatryoshkaSAE])
def test_the_only_sae_of_a_repository_is_loaded(hub, run, load):
    folder, saes = run("layers.3")
    sae_hub.push(folder, REPO, measure=False, show=False)
    assert_same_tensors(load.from_pretrained(REPO), saes["layers.3"])
    assert_same_tensors(load.from_pretrained(REPO, width=4, revision="main"), saes["layers.3"].truncate(4))
    with pytest.raises(OSError, match="tester/nowhere"):
        MatryoshkaSAE.from_pretrained("tester/nowhere")
