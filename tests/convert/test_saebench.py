"""What SAEBench's evaluations take: the same latents in units of their contribution, the same reconstruction."""

import pytest
import torch

from hf_matryoshka_sae import convert

from ..axes import each
from .reference import SHAPES, inputs
from .test_save import VARIANTS, random_sae


NAMES = {"model_name": "pythia-70m", "hook_name": "blocks.1.hook_resid_post"}
PLAIN = [name for name in VARIANTS if "transcoder" not in name]


@each(shape=SHAPES, variant=PLAIN)
def test_it_computes_what_the_sae_does(variant, shape):
    sae, x = random_sae(variant, *shape), inputs(shape[0])
    adapter = convert.to_saebench(sae, **NAMES)
    norms = torch.ones(shape[1]) if sae.config.scale_by_decoder_norm else sae.W_dec.norm(dim=1)
    with torch.no_grad():
        latents = sae.encode(x).to_dense() * norms
        reconstruction = sae(x).reconstruction
        torch.testing.assert_close(adapter.encode(x), latents, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(adapter(x), reconstruction, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(adapter.decode(adapter.encode(x[None]))[0], reconstruction, atol=1e-5, rtol=1e-5)
    assert adapter.W_enc.shape == shape and adapter.W_dec.shape == shape[::-1] and adapter.check_decoder_norms()


def test_prefixes_of_a_matryoshka_sae():
    sae, x = random_sae("matryoshka batch_topk"), inputs(16)
    with torch.no_grad():
        prefixes = sae.decode_prefixes(sae.encode(x))
        for width, expected in zip(sae.prefix_widths, prefixes, strict=True):
            adapter = convert.to_saebench(sae, width=width, **NAMES)
            assert adapter.cfg.d_sae == width == adapter.W_enc.shape[1]
            torch.testing.assert_close(adapter(x), expected, atol=1e-5, rtol=1e-5)


def test_config():
    sae = random_sae("matryoshka batch_topk")
    sae.config.base_model, sae.config.hookpoint = "google/gemma-2-2b", "model.layers.12"
    cfg = convert.to_saebench(sae).cfg
    assert (cfg.model_name, cfg.hook_name, cfg.hook_layer) == ("gemma-2-2b", "blocks.12.hook_resid_post", 12)
    assert (cfg.d_in, cfg.d_sae, cfg.dtype, cfg.device) == (16, 64, "float32", "cpu")
    assert cfg.architecture == "matryoshka_batch_topk" and cfg.apply_b_dec_to_input is True
    fields = cfg.to_dict()
    # Every field of sae_bench.custom_saes.custom_sae_config.CustomSAEConfig in version 0.6.0.
    assert set(fields) >= {
        "model_name", "d_in", "d_sae", "hook_layer", "hook_name", "context_size", "hook_head_index", "architecture",
        "apply_b_dec_to_input", "finetuning_scaling_factor", "activation_fn_str", "prepend_bos",
        "normalize_activations", "dtype", "device", "dataset_path", "dataset_trust_remote_code", "seqpos_slice",
        "training_tokens", "sae_lens_training_version", "neuronpedia_id",
    }  # fmt: skip
    assert cfg.activation_fn_kwargs == {} and cfg.model_from_pretrained_kwargs == {}


def test_types_follow_and_thresholds_stay_exact():
    adapter = convert.to_saebench(random_sae("jumprelu"), **NAMES)
    threshold = adapter.threshold.clone()
    same = adapter.to(device="cpu", dtype=torch.bfloat16)
    assert same is adapter and adapter.dtype == torch.bfloat16 and adapter.cfg.dtype == "bfloat16"
    assert adapter.W_enc.dtype == torch.bfloat16 and torch.equal(adapter.threshold, threshold)
    assert adapter.encode(inputs(16)).dtype == torch.bfloat16 and adapter.check_decoder_norms()


@pytest.mark.parametrize("variant", ["relu", "topk", "jumprelu", "gated", "topk groups"])
def test_normalising_changed_decoder_rows_keeps_what_it_computes(variant):
    adapter, x = convert.to_saebench(random_sae(variant), **NAMES), inputs(16)
    with torch.no_grad():
        adapter.W_dec.mul_(1.7)
        before = adapter(x)
        assert not adapter.check_decoder_norms()
        adapter.normalize_decoder()
        assert adapter.check_decoder_norms()
        torch.testing.assert_close(adapter(x), before, atol=1e-5, rtol=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match="which hook_name|Which model_name"):
        convert.to_saebench(random_sae("relu"))
    adapter = convert.to_saebench(random_sae("topk layer_norm"), **NAMES)
    with pytest.raises(ValueError, match="encode the hidden states of these latents first"):
        adapter.decode(torch.zeros(5, 64))
    latents = adapter.encode(inputs(16))
    with pytest.raises(ValueError, match=r"Latents have shape \(5, 64\)"):
        adapter.decode(latents[:5])
    with pytest.raises(ValueError, match="transcoder"):
        convert.to_saebench(random_sae("relu transcoder"), **NAMES)
    with pytest.raises(ValueError, match="`width` must lie between"):
        convert.to_saebench(random_sae("relu"), width=65, **NAMES)
