"""Files that are saved can be read by whom the umask allows to."""

import os
import stat

import pytest
import torch

from hf_matryoshka_sae import convert
from hf_matryoshka_sae.progressive import latent_statistics

from .reference import hidden_states, make_sae


pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")


@pytest.fixture(params=[0o022, 0o027], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}


def test_every_saved_file_has_the_permissions_of_the_umask(tmp_path, umask):
    sae = make_sae("topk", torch.float32, hookpoint="layers.0")
    sae.save_pretrained(tmp_path / "one")
    sae.save_pretrained(tmp_path / "pieces", max_shard_size=400)
    latent_statistics(sae, [hidden_states(20, dtype=torch.float32)]).save(tmp_path / "one")
    convert.save(sae, tmp_path / "saelens", "saelens")
    convert.save(sae, tmp_path / "sparsify" / "layers.0", "sparsify")
    found = modes(tmp_path)
    assert {"model.safetensors", "statistics.safetensors", "sae_weights.safetensors", "sae.safetensors"} <= set(found)
    assert set(found.values()) == {0o666 & ~umask}, found
