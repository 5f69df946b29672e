"""The SAEs as models: outputs and gradients against dense references, shapes, prefixes, building."""

import pytest
import torch

from hf_matryoshka_sae import CONFIGS, MatryoshkaSAEConfig, SAEOutput, SparseLatents, TopKSAE, build_sae

from ..axes import each
from .reference import (
    OPTIONS,
    PREFIXES,
    VARIANTS,
    D,
    F,
    assert_close,
    dense_forward,
    hidden_states,
    make_sae,
    step_with_kernel,
)


pytestmark = pytest.mark.usefixtures("way")


N = 7
variants = pytest.mark.parametrize("variant", VARIANTS)


def assert_same_gradient(actual: torch.Tensor, expected: torch.Tensor):
    assert_close(*(torch.zeros_like(actual) if t.grad is None else t.grad for t in (actual, expected)))


def assert_same_outputs(actual: SAEOutput, expected: SAEOutput):
    for name in ("loss", "reconstruction"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    for name in ("values", "indices"):
        assert torch.equal(getattr(actual.latents, name), getattr(expected.latents, name)), name


# Against the dense reference


@each(variant=list(VARIANTS), fields=OPTIONS, training={"eval": False, "train": True})
def test_outputs_and_gradients_equal_a_dense_reference(variant, fields, training):
    sae, x = make_sae(variant, **fields).train(training), hidden_states(N).requires_grad_()
    output = sae(x)
    output.loss.backward()
    state = {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()}
    for name, _ in sae.named_parameters():
        state[name].requires_grad_()
    reference_x = x.detach().clone().requires_grad_()
    acts, prefixes, loss = dense_forward(sae, reference_x, state=state)
    loss.backward()
    assert 0 < output.latents.l0.sum() < N * F
    assert_close(output.latents.to_dense(), acts)
    assert_close(output.reconstruction, prefixes[-1])
    assert_close(output.loss, loss)
    assert_close(output.losses["sse"], ((prefixes - reference_x) ** 2).sum(-1).mean(-1))
    assert_close(x.grad, reference_x.grad)
    for name, parameter in sae.named_parameters():
        if name == "threshold" and not training:
            continue  # outside training, latents just below their thresholds are not computed
        assert_same_gradient(parameter, state[name])
        # The gate's bias cancels out of the magnitudes: it learns from the penalty alone.
        assert parameter.grad.abs().max() > 0 or (variant == "gated" and name == "b_enc"), name


@each(variant=["jumprelu", "gated", "matryoshka-jumprelu"], fields=OPTIONS)
def test_penalties_on_gates_have_the_gradients_of_a_dense_reference(variant, fields):
    sae, x = make_sae(variant, **fields).train(), hidden_states(N)
    pairs = sae.encode_pairs(x)
    ours = (torch.relu(pairs.gate) if variant == "gated" else pairs.gate).sum()
    ours.backward()
    state = {name: tensor.detach().clone().requires_grad_() for name, tensor in sae.named_parameters()}
    norms = state["W_dec"].norm(dim=1) if sae.config.scale_by_decoder_norm else 1
    centred = x - state["b_dec"] if sae.config.apply_b_dec_to_input else x
    pre = (centred @ state["W_enc"].T + state["b_enc"]) * norms
    if variant == "gated":
        penalty, learns = torch.relu(pre).sum(), "b_enc"
    else:
        penalty, learns = step_with_kernel(pre.detach(), state["threshold"], sae.config.bandwidth).sum(), "threshold"
    penalty.backward()
    assert_close(ours, penalty)
    assert getattr(sae, learns).grad.abs().max() > 0
    for name, parameter in sae.named_parameters():
        assert_same_gradient(parameter, state[name])


@each(
    weights=[None, [1, 1, 1], [0.2, 0, 3]],
    width=[None, 1, 5, 7],
    activation=["relu", "topk", "batch_topk", "jumprelu"],
)
def test_matryoshka_weighs_its_prefixes_as_configured_at_every_width(activation, width, weights):
    sae, x = make_sae(f"matryoshka-{activation}", prefix_weights=weights), hidden_states(N)
    acts, prefixes, loss = dense_forward(sae, x, width)
    output = sae(x, width=width)
    assert_close(output.loss, loss)
    assert_close(output.reconstruction, prefixes[-1])
    assert_close(output.latents.to_dense(), acts)


# Shapes, types, and what is refused


@variants
def test_tokens_may_have_any_leading_dimensions(variant):
    sae, x = make_sae(variant), hidden_states(2, 3, 4)
    flat, deep = sae(x.view(24, D)), sae(x)
    assert torch.equal(deep.loss, flat.loss)
    assert torch.equal(deep.reconstruction.view(24, D), flat.reconstruction) and deep.reconstruction.shape == x.shape
    assert torch.equal(deep.latents.to_dense().view(24, F), flat.latents.to_dense())
    assert torch.equal(sae.encode(x).to_dense(), deep.latents.to_dense())
    assert_close(sae.decode(deep.latents), deep.reconstruction)


@variants
def test_batch_selection_counts_the_tokens_of_all_leading_dimensions(variant):
    sae, x = make_sae(variant).train(), hidden_states(2, 3, 4)
    assert torch.equal(sae(x).latents.to_dense().view(24, F), sae(x.view(24, D)).latents.to_dense())


@each(variant=list(VARIANTS), shape=[(3,), (2, 3), (2, 1, 3)])
def test_silent_latents_reconstruct_the_bias(variant, shape):
    sae, x = make_sae(variant), hidden_states(*shape)
    with torch.no_grad():
        sae.b_enc.fill_(-1000)
    latents = sae.encode(x)
    assert latents.to_dense().shape == (*shape, F) and not latents.to_dense().any()
    assert torch.equal(sae.decode(latents), sae.b_dec.expand(*shape, D))
    sae(x).loss.backward()
    assert sae.b_dec.grad.abs().max() > 0 and not sae.W_enc.grad.any()


@each(variant=list(VARIANTS), shape=[(0,), (2, 0)], training={"eval": False, "train": True})
def test_an_empty_batch_has_empty_outputs(variant, shape, training):
    sae, x = make_sae(variant).train(training), hidden_states(*shape)
    latents = sae.encode(x)
    assert latents.to_dense().shape == (*shape, F)
    assert sae.decode(latents).shape == sae(x).reconstruction.shape == x.shape
    assert sae.decode_prefixes(latents).shape == (len(sae.prefix_widths), *x.shape)


@variants
def test_bf16_follows_the_float64_reference_and_keeps_its_type(variant):
    sae, x = make_sae(variant, torch.bfloat16), hidden_states(64, dtype=torch.bfloat16)
    output = sae(x)
    output.loss.backward()
    assert output.reconstruction.dtype == output.latents.values.dtype == sae.W_dec.grad.dtype == torch.bfloat16
    exact = make_sae(variant)
    exact.load_state_dict(sae.state_dict())
    _, prefixes, loss = dense_forward(exact, x.double())
    error = (output.reconstruction.double() - prefixes[-1]).norm() / prefixes[-1].norm()
    assert error < 0.1  # a rounded pre-activation may cross a threshold
    assert abs(output.loss.item() / loss.item() - 1) < 0.05


@pytest.mark.parametrize("variant", ["jumprelu", "batch_topk", "matryoshka-jumprelu", "matryoshka-batch_topk"])
def test_bf16_latents_just_above_an_fp32_threshold_fire(variant):
    sae, x = make_sae(variant, torch.bfloat16), hidden_states(1, dtype=torch.bfloat16)
    pre = torch.nn.functional.linear(x - sae.b_dec, sae.W_enc, sae.b_enc)
    # Rounded to bf16 each threshold would equal its pre-activation.
    sae.threshold.data = (pre[0].float() * (1 - 1e-4)).clamp(min=0).detach()
    assert (pre > 0).any() and torch.equal(sae.threshold.bfloat16(), pre[0].clamp(min=0))
    assert torch.equal(sae.encode(x).to_dense(), pre.clamp(min=0))


def test_inputs_of_another_type_are_converted():
    sae = make_sae("topk", torch.float32)
    assert sae(hidden_states(3)).reconstruction.dtype == torch.float32


@pytest.mark.parametrize("call", ["__call__", "encode"])
def test_hidden_states_of_another_width_are_refused_with_both_widths(call):
    sae = make_sae("topk", base_model="some/model", hookpoint="layers.3")
    with pytest.raises(ValueError, match=rf"d_in = {D}, got \(2, 5\).*some/model at layers\.3"):
        getattr(sae, call)(torch.randn(2, 5))


@each(width=[0, -1, F + 1], call=["__call__", "encode"])
def test_widths_outside_the_dictionary_are_refused(call, width):
    sae, x = make_sae("matryoshka-relu"), hidden_states(2)
    with pytest.raises(ValueError, match=f"`width` must lie between 1 and num_latents .{F}., got {width}"):
        getattr(sae, call)(x, width=width)
    with pytest.raises(ValueError, match="`width` must lie"):
        sae.decode(sae.encode(x), width=width)
    with pytest.raises(ValueError, match="`width` must lie"):
        sae.truncate(width)


def test_unknown_selection_is_refused():
    with pytest.raises(ValueError, match="'restrict' or 'mask', got 'drop'"):
        make_sae("topk").encode(hidden_states(2), selection="drop")


def test_return_dict_false_gives_a_tuple():
    _, reconstruction, latents, losses = make_sae("topk")(hidden_states(2), return_dict=False)
    assert reconstruction.shape == (2, D) and isinstance(latents, SparseLatents) and set(losses) == {"sse"}


# Prefixes


@variants
def test_each_decoded_prefix_is_the_decode_at_its_width(variant):
    sae, x = make_sae(variant), hidden_states(2, 5)
    latents = sae.encode(x)
    prefixes, dense = sae.decode_prefixes(latents), latents.to_dense()
    assert sae.prefix_widths == (list(PREFIXES) if variant.startswith("matryoshka") else [F])
    assert prefixes.shape == (len(sae.prefix_widths), 2, 5, D)
    for width, prefix in zip(sae.prefix_widths, prefixes, strict=True):
        assert_close(prefix, sae.decode(latents, width=width))
        assert_close(prefix, dense[..., :width] @ sae.W_dec[:width] + sae.b_dec)


@each(variant=list(VARIANTS), fields=OPTIONS, width=[1, 2, 6, F])
def test_a_truncated_sae_is_the_whole_one_at_that_width(variant, fields, width):
    sae, x = make_sae(variant, **fields), hidden_states(N)
    small = sae.truncate(width)
    assert type(small) is type(sae) and small.config.num_latents == width and small.prefix_widths[-1] == width
    cut = sae.encode(x, width=width).to_dense()
    assert torch.equal(small.encode(x).to_dense(), cut[:, :width]) and not cut[:, width:].any()
    assert torch.equal(small(x).reconstruction, sae(x, width=width).reconstruction)
    assert torch.equal(small(x).loss, sae(x, width=width).loss)
    assert sae.config.num_latents == F and len(sae.W_enc) == F  # the whole one is untouched
    with torch.no_grad():
        small.W_dec.zero_()
    assert sae.W_dec[:width].any()


@each(variant=list(VARIANTS), selection=["restrict", "mask"], training={"eval": False, "train": True})
def test_restrict_competes_inside_the_prefix_and_mask_over_all_latents(variant, selection, training):
    sae, x, width = make_sae(variant).train(training), hidden_states(20), 6
    acts, _, _ = dense_forward(sae, x, width, selection)
    assert_close(sae.encode(x, width, selection).to_dense(), acts)
    other = dense_forward(sae, x, width, "mask" if selection == "restrict" else "restrict")[0]
    competes = variant.endswith("topk") and not (variant.endswith("batch_topk") and not training)
    assert torch.equal(acts, other) != competes


PLAIN = {"relu": {}, "topk": {"k": 3}, "batch_topk": {"k": 2.5}, "jumprelu": {"bandwidth": 0.3}}


@each(activation=list(PLAIN), training={"eval": False, "train": True})
def test_one_prefix_is_the_plain_family_bit_for_bit(activation, training):
    shared = {"d_in": D, "num_latents": F, **PLAIN[activation]}
    saes = []
    for config in (
        CONFIGS[activation](**shared),
        MatryoshkaSAEConfig(activation=activation, prefix_widths=[F], **shared),
    ):
        torch.manual_seed(1)
        saes.append(build_sae(config).train(training))
    plain, nested = saes
    x = hidden_states(50, dtype=torch.float32)
    outputs = [sae(x) for sae in saes]
    assert_same_outputs(*outputs)
    for output in outputs:
        output.loss.backward()
    assert plain.state_dict().keys() == nested.state_dict().keys()
    for (name, a), (_, b) in zip(plain.named_parameters(), nested.named_parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a.grad, b.grad), name


# Building


@pytest.mark.parametrize("family", CONFIGS)
def test_a_fresh_sae_has_unit_decoder_rows_a_tied_encoder_and_its_ids(family):
    sae = build_sae(CONFIGS[family](d_in=D, num_latents=64, **({"k": 4} if "topk" in family else {})))
    assert type(sae).config_class is type(sae.config)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    assert torch.equal(sae.W_enc, sae.W_dec) and not sae.b_enc.any() and not sae.b_dec.any()
    assert sae.latent_ids.tolist() == list(range(64))
    for name, value in sae.family.initial(sae).items():
        assert (getattr(sae, name) == value).all()


@pytest.mark.parametrize("family", CONFIGS)
def test_an_sae_can_be_built_on_the_meta_device(family):
    with torch.device("meta"):
        sae = build_sae(CONFIGS[family](d_in=D, num_latents=64))
    assert {tensor.device.type for tensor in sae.state_dict().values()} == {"meta"}


def test_annealed_k_replaces_the_configured_one():
    sae = make_sae("topk")
    sae.k = 5
    with torch.no_grad():
        sae.b_enc.fill_(100)
    assert (sae.encode(hidden_states(N)).l0 == 5).all() and sae.config.k == 3


def test_it_is_a_transformers_model_without_embeddings():
    sae = make_sae("topk")
    assert sae.get_input_embeddings() is None and isinstance(sae, TopKSAE) and sae.main_input_name == "hidden_states"
