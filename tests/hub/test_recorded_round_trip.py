"""SAEs that other libraries wrote, after everything that happens to an SAE here."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from hf_matryoshka_sae import convert
from hf_matryoshka_sae.hub.command import pull_main
from hf_matryoshka_sae.progressive import latent_statistics, prune

from ..conftest import SHARED


RECORDED = sorted((SHARED / "checkpoints").rglob("expected.safetensors"))


def assert_recorded(sae, expected, places=None) -> None:
    """Latents, at the places they are now, and reconstruction are the recorded ones."""
    latents = sae.encode(expected["input"])
    wanted = expected["latents"] if places is None else expected["latents"][:, places]
    torch.testing.assert_close(latents.to_dense(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(latents), expected["reconstruction"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: str(path.parent.relative_to(SHARED / "checkpoints")))
def test_saved_pushed_pulled_and_pruned_to_full_it_computes_the_same(hub, tmp_path, path):
    expected = load_file(path)
    sae = convert.load(path.parent)
    num_latents = sae.config.num_latents
    sae.save_pretrained(tmp_path / "saved")
    saved = AutoModel.from_pretrained(tmp_path / "saved")
    assert_recorded(saved, expected)
    saved.push_to_hub("tester/peer")
    part = AutoModel.from_pretrained("tester/peer", width=num_latents // 4)
    assert torch.equal(part.W_dec, sae.W_dec[: num_latents // 4])
    assert pull_main(["tester/peer", "--output_dir", str(tmp_path / "pulled")]) == 0
    pulled = AutoModel.from_pretrained(tmp_path / "pulled")
    assert_recorded(pulled, expected)
    assert_recorded(AutoModel.from_pretrained("tester/peer", width=num_latents), expected)
    statistics = latent_statistics(pulled, [expected["input"]])
    pruned = prune(pulled, num_latents, statistics=statistics)
    assert sorted(pruned.latent_ids.tolist()) == list(range(num_latents))
    assert_recorded(pruned, expected, pruned.latent_ids)


def test_there_are_recorded_checkpoints(shared):
    assert len(RECORDED) >= 15
