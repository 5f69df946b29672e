"""Checkpoints that the other libraries' own code wrote, and what these libraries give for them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_matryoshka_sae import MatryoshkaSAE, SAEModel, convert

from .reference import assert_computes


FAMILIES = {
    "dictionary_learning/batch_topk": "BatchTopKSAE",
    "dictionary_learning/gated": "GatedSAE",
    "dictionary_learning/jumprelu": "JumpReLUSAE",
    "dictionary_learning/matryoshka_batch_topk": "MatryoshkaSAE",
    "dictionary_learning/standard": "ReluSAE",
    "dictionary_learning/topk": "TopKSAE",
    "gemma_scope/layer_2/width_256/average_l0_8": "JumpReLUSAE",
    "openai/relu_v1": "ReluSAE",
    "openai/topk_v5": "TopKSAE",
    "saelens/gated": "GatedSAE",
    "saelens/jumprelu": "JumpReLUSAE",
    "saelens/matryoshka_batchtopk": "MatryoshkaSAE",
    "saelens/standard": "ReluSAE",
    "saelens/standard_layer_norm": "ReluSAE",
    "saelens/standard_no_bdec_input": "ReluSAE",
    "saelens/topk": "TopKSAE",
    "saelens/topk_rescaled": "TopKSAE",
    "sparsify/groupmax/layers.2": "TopKSAE",
    "sparsify/topk/layers.2": "TopKSAE",
}


@pytest.fixture(params=sorted(FAMILIES))
def recorded(request, shared) -> tuple[str, Path]:
    return request.param, shared / "checkpoints" / request.param


def check(sae: SAEModel, folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    assert_computes(sae, expected["input"], expected["latents"], expected["reconstruction"])


def test_found_by_looking_it_gives_what_its_library_gives(recorded):
    name, folder = recorded
    sae = convert.load(folder)
    assert type(sae).__name__ == FAMILIES[name]
    assert not sae.training and sae.W_enc.dtype == torch.float32
    check(sae, folder)


def test_after_an_export_to_the_same_format(recorded, tmp_path):
    name, folder = recorded
    sae = convert.load(folder)
    convert.save(sae, tmp_path / "out", name.split("/")[0])
    back = convert.load(tmp_path / "out")
    assert type(back) is type(sae) and back.prefix_widths == sae.prefix_widths
    check(back, folder)


@pytest.mark.parametrize("name", ["saelens/matryoshka_batchtopk", "dictionary_learning/matryoshka_batch_topk"])
def test_prefix_widths_come_along(shared, name):
    sae = convert.load(shared / "checkpoints" / name)
    assert isinstance(sae, MatryoshkaSAE) and sae.config.activation == "batch_topk"
    assert sae.prefix_widths == [32, 64, 128, 256] and sae.config.k == 8


def test_several_saes_are_listed(shared):
    with pytest.raises(ValueError, match="holds 8 SAEs; pass `subfolder`.*topk_rescaled"):
        convert.load(shared / "checkpoints" / "saelens")
    sae = convert.load(shared / "checkpoints", subfolder="saelens/topk")
    assert sae.config.k == 8
