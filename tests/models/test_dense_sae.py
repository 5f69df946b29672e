"""The dense way of an SAE is the model, for every family; what exports and compiles gives the same."""

import pytest
import torch

from hf_matryoshka_sae.models.dense_sae import DenseSAE

from ..axes import each
from .test_fast_path import make_sae


FAMILIES = ["relu", "topk", "batch_topk", "jumprelu", "gated", "matryoshka-topk", "matryoshka-batch_topk"]
CONFIGS = {
    "plain": {},
    "layer norm": {"input_normalization": "layer_norm"},
    "norms": {"scale_by_decoder_norm": True},
    "refined": {"refine_steps": 2, "input_normalization": "layer_norm"},
}


def case(variant: str, **fields) -> tuple[torch.nn.Module, torch.Tensor]:
    fields |= {"prefix_widths": [10, 40]} if variant.startswith("matryoshka") else {}
    sae = make_sae(variant, torch.float32, num_latents=40, **fields).eval()
    return sae, torch.randn(3, 5, sae.config.d_in)


@each(variant=FAMILIES, fields=CONFIGS)
def test_it_gives_what_the_model_gives(variant, fields):
    sae, x = case(variant, **fields)
    reconstruction, latents = DenseSAE(sae)(x)
    expected = sae(x, return_loss=False)
    torch.testing.assert_close(latents, expected.latents.to_dense(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reconstruction, expected.reconstruction, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", FAMILIES)
def test_it_is_exported_for_any_number_of_tokens(variant):
    sae, x = case(variant)
    tokens = torch.export.Dim("tokens", min=2, max=1000)
    exported = torch.export.export(DenseSAE(sae), (x[0],), dynamic_shapes=({0: tokens},)).module()
    more = torch.randn(17, x.shape[-1])
    for got, expected in zip(exported(more), DenseSAE(sae)(more), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("variant", FAMILIES)
def test_refined_codes_are_those_of_the_model(variant):
    sae, x = case(variant, refine_steps=2)
    _, latents = DenseSAE(sae)(x)
    torch.testing.assert_close(latents, sae.encode(x).to_dense(), rtol=1e-5, atol=1e-5)


def test_it_compiles_without_a_break():
    sae, x = case("matryoshka-topk")
    compiled = torch.compile(DenseSAE(sae), fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(x), DenseSAE(sae)(x), strict=True):
        torch.testing.assert_close(got, expected)


def test_onnx_gives_the_same(tmp_path):
    pytest.importorskip("onnxscript", reason="needs the optional package onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="needs the optional package onnxruntime")
    sae, x = case("matryoshka-batch_topk")
    torch.onnx.export(DenseSAE(sae), (x[0],), tmp_path / "sae.onnx", dynamo=True)
    session = runtime.InferenceSession(tmp_path / "sae.onnx")
    outputs = session.run(None, {session.get_inputs()[0].name: x[0].numpy()})
    for got, expected in zip(outputs, DenseSAE(sae)(x[0]), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-5)


def test_groups_of_latents_that_compete_are_refused():
    sae, _ = case("topk")
    sae.config.group_size = 4
    with pytest.raises(ValueError, match="group_size"):
        DenseSAE(sae)
