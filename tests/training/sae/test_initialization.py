"""What a new dictionary begins with, against counts of what then fires."""

import pytest
import torch

from hf_matryoshka_sae.models import build_sae
from hf_matryoshka_sae.models.sharding import Layout
from hf_matryoshka_sae.training.config.spec import SAESpec
from hf_matryoshka_sae.training.sae.initialization import initialize, start_at_target


F, TARGET = 512, 8.0


def states(d_in, count=4000):
    """Centred, with E||x||^2 = 1, a few dimensions far larger than the others."""
    x = torch.randn(count, d_in, generator=torch.Generator().manual_seed(0))
    x[:, : d_in // 8] *= 5
    return x / x.square().sum(1).mean().sqrt()


def begun(d_in=32, layout=None, num_latents=F, **fields):
    spec = SAESpec.from_dict({"num_latents": num_latents, "target_l0": TARGET, **fields}, "")
    sae, x = build_sae(spec.sae_config(d_in, "lm", "layer")), states(d_in)
    initialize(sae, spec, x, torch.zeros(d_in), seed=3, layout=layout)
    return sae, x, start_at_target(sae, spec, x, 3, layout)


@pytest.mark.parametrize("d_in", [16, 64])
@pytest.mark.parametrize(
    "fields",
    [
        {"type": "relu"},
        {"type": "gated"},
        {"type": "jumprelu"},
        {"activation": "jumprelu"},
        {"activation": "relu", "decoder_init_norm": 0.1, "encoder_init": "normal", "apply_b_dec_to_input": False},
        {"type": "relu", "encoder_init_scale": 3.0, "unit_norm_decoder": False, "decoder_init_norm": 0.1},
    ],
    ids=str,
)
def test_a_new_dictionary_begins_with_its_target_l0(fields, d_in):
    sae, x, threshold = begun(d_in, **fields)
    latents = sae.eval().encode(x)
    assert latents.l0.float().mean().item() == pytest.approx(TARGET, rel=0.15)
    assert threshold > 0
    if "jumprelu" in fields.values():
        assert sae.config.bandwidth == pytest.approx(threshold / 2)
        assert sae.config.initial_threshold == threshold


def test_gated_magnitudes_begin_as_those_of_relu():
    sae, x, _ = begun(16, type="gated")
    relu = begun(16, type="relu")[0].eval().encode(x).to_dense()
    assert torch.equal(sae.eval().encode(x).to_dense(), relu)


def test_what_a_run_gives_itself_wins():
    sae, _, threshold = begun(type="jumprelu", initial_threshold=0.7, bandwidth=0.3)
    assert threshold == 0.7
    assert sae.threshold.unique().tolist() == pytest.approx([0.7])
    assert sae.config.bandwidth == 0.3
    sae, _, threshold = begun(type="gated", start_at_target=False)
    assert threshold is None
    assert not sae.b_enc.any()
    assert begun(preset="nabeshima")[2] is None


@pytest.mark.parametrize("field", ["init_from", "grow_from"])
def test_what_goes_on_from_a_trained_sae_does_not_begin_anew(field):
    spec = SAESpec.from_dict({"activation": "relu", "num_latents": F, field: "folder"}, "")
    assert not spec.starts_at_target


def test_every_shard_begins_with_the_same_threshold():
    whole = begun(type="jumprelu")[2]
    layout = Layout(F, shard=1, shards=2)
    assert begun(type="jumprelu", num_latents=F // 2, layout=layout)[2] == whole
