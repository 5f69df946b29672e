"""What an earlier version wrote opens for ever: `tests/data/v*`, each made by `tests/data/make.py` of its time."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

import hf_matryoshka_sae  # noqa: F401  (registers the classes)
from hf_matryoshka_sae import hub
from hf_matryoshka_sae.cli import main
from hf_matryoshka_sae.features import FeatureIndex
from hf_matryoshka_sae.progressive import LatentStatistics, prune


VERSIONS = sorted(path for path in (Path(__file__).parent / "data").glob("v*") if path.is_dir())
SAE = "run/nested/model.layers.1"


@pytest.fixture(params=VERSIONS, ids=lambda path: path.name)
def artefacts(request, tmp_path, monkeypatch) -> Path:
    """A copy of what a version wrote; relative paths in it are relative to it."""
    folder = tmp_path / request.param.name
    shutil.copytree(request.param, folder)
    monkeypatch.chdir(folder)
    return folder


def test_an_sae_of_each_family_gives_what_it_gave(artefacts):
    folders = sorted((artefacts / "saes").iterdir())
    assert len(folders) == 6
    for folder in folders:
        sae, record = AutoModel.from_pretrained(folder).eval(), load_file(folder / "expected.safetensors")
        latents = sae.encode(record["input"])
        torch.testing.assert_close(latents.to_dense(), record["latents"], msg=folder.name)
        torch.testing.assert_close(sae.decode(latents), record["reconstruction"], msg=folder.name)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_weights_it_would_have_had(artefacts):
    fields = json.loads((artefacts / "run.yaml").read_text()) | {"output_dir": "run-interrupted"}
    assert main(["train", *(f"--{name}={json.dumps(value)}" for name, value in fields.items())]) == 0
    sessions = json.loads((artefacts / "run-interrupted/provenance.json").read_text())["sessions"]
    assert [session["from_step"] for session in sessions] == [0, 8]
    resumed = AutoModel.from_pretrained("run-interrupted/nested/model.layers.1").state_dict()
    for name, tensor in AutoModel.from_pretrained(SAE).state_dict().items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-4, atol=1e-5)  # kernels of another torch may round


@pytest.mark.slow
def test_a_run_reads_a_cache(artefacts):
    fields = json.loads((artefacts / "run.yaml").read_text()) | {"activation_cache": "cache", "tokens": 1024}
    fields |= {"activation_cache_dtype": "int8"}
    assert main(["train", *(f"--{name}={json.dumps(value)}" for name, value in fields.items())]) == 0
    assert (artefacts / "cached/results.json").is_file()


def test_statistics_and_an_index_are_read(artefacts):
    sae = AutoModel.from_pretrained(SAE)
    statistics = LatentStatistics.load(SAE)
    assert prune(sae, width=5, statistics=statistics).config.num_latents == 5
    index = FeatureIndex.open(SAE)
    fires = (index.feature(latent) for latent in range(sae.config.num_latents))
    assert sum(feature.frequency > 0 for feature in fires) > 12


def test_a_pushed_repository_is_listed_and_loaded(artefacts):
    (info,) = hub.list_saes("repository").values()
    assert (info.num_latents, list(info.prefix_widths)) == (24, [6, 12, 24])
    whole, part = hub.load("repository"), hub.load("repository", width=6)
    assert torch.equal(part.W_dec, whole.W_dec[:6])
    assert torch.equal(whole.W_dec, AutoModel.from_pretrained(SAE).W_dec)
