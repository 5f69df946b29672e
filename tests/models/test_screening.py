"""Screening with bf16 products: its bound and its selection against float64, and where it gives up."""

import copy

import pytest
import torch

from hf_matryoshka_sae.models import screening as module
from hf_matryoshka_sae.models.encoder_blocks import EncoderBlocks
from hf_matryoshka_sae.models.screening import counts, screened, screening
from hf_matryoshka_sae.models.selection import select_above, select_batch_topk, select_topk

from ..axes import each
from .reference import batch_topk_mask, topk_mask
from .test_fast_path import dense_step, make_sae, step, weights_of


N, D, F = 257, 96, 700


def plain() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(N, D), "W_enc": torch.randn(F, D), "b_enc": torch.randn(F)}


def outlier_dimension() -> dict[str, torch.Tensor]:
    encoder = plain()
    encoder["x"][:, 3] *= 1000
    return encoder


def cancellation() -> dict[str, torch.Tensor]:
    """Products whose large halves take each other away."""
    encoder = plain()
    half = 100 * torch.randn(N, D // 2)
    encoder["x"] = torch.cat([half, half + torch.randn(N, D // 2)], 1)
    encoder["W_enc"][:, D // 2 :] = -encoder["W_enc"][:, : D // 2]
    return encoder


def duplicated() -> dict[str, torch.Tensor]:
    encoder = plain()
    return encoder | {"W_enc": encoder["W_enc"][torch.arange(F) % 50], "b_enc": encoder["b_enc"][torch.arange(F) % 50]}


def some_zero() -> dict[str, torch.Tensor]:
    encoder = plain()
    encoder["x"][::3] = 0
    encoder["W_enc"][::5] = 0
    return encoder


STATES = {
    "plain": plain,
    "far from the origin": lambda: plain() | {"x": torch.randn(N, D) + 30 * torch.randn(D)},
    "an outlier dimension": outlier_dimension,
    "cancellation": cancellation,
    "tiny": lambda: plain() | {"x": 1e-20 * torch.randn(N, D), "b_enc": torch.zeros(F)},
    "huge": lambda: plain() | {"x": 1e6 * torch.randn(N, D)},
    "all lengths": lambda: plain() | {"x": torch.randn(N, D) * torch.logspace(-20, 6, N)[:, None]},
    "huge biases": lambda: plain() | {"b_enc": 1e4 * torch.randn(F)},
    "duplicated latents": duplicated,
    "zeros": some_zero,
    "scaled": lambda: plain() | {"scale": torch.rand(F) * 3 + 0.01, "b_dec": torch.randn(D)},
}


def exact(encoder: dict[str, torch.Tensor]) -> torch.Tensor:
    """The pre-activations in float64."""
    wide = {name: part.double() for name, part in encoder.items()}
    pre = (wide["x"] - wide.get("b_dec", 0)) @ wide["W_enc"].T + wide["b_enc"]
    return pre * wide.get("scale", 1)


def slack(encoder: dict[str, torch.Tensor]) -> torch.Tensor:
    """What two float32 numbers of this kind may differ by: `1e-6 ||w|| ||x||` and the last bits of the bias."""
    x = encoder["x"].double() - encoder.get("b_dec", torch.zeros(D)).double()
    lengths = x.norm(dim=1)[:, None] * encoder["W_enc"].double().norm(dim=1) + encoder["b_enc"].double().abs()
    return 1e-6 * lengths * encoder.get("scale", torch.ones(F)).double()


def agrees(selection: tuple[torch.Tensor, ...], winners: torch.Tensor, near: torch.Tensor) -> bool:
    """Whether the pairs are the `winners`, but for those that are `near` the cut."""
    chosen = torch.zeros(winners.shape, dtype=torch.bool)
    chosen[selection[0], selection[1]] = True
    return bool((chosen == winners)[~near].all())


@each(states=STATES, block={"one block": None, "blocks": 192})
def test_no_pre_activation_is_outside_its_bounds(states, block):
    encoder = states()
    true = exact(encoder)
    for part in screened(EncoderBlocks(**encoder, block_latents=block)):
        inside = true[:, part.start : part.stop]
        upper = part.upper[:, : part.stop - part.start].double()
        width = 2 * (part.of_tokens.double() @ part.of_latents.double())[:, : part.stop - part.start]
        rounding = upper.abs() * 2.0**-8
        assert (inside <= upper + rounding).all() and (inside >= upper - rounding - width).all()


def test_a_threshold_that_takes_a_huge_bias_away_leaves_what_float32_has_rounded_inside_the_bounds():
    small = plain()
    encoder = {"x": 1e-3 * small["x"], "W_enc": 1e-3 * small["W_enc"], "b_enc": 1e4 + small["b_enc"]}
    blocks, limit = EncoderBlocks(**encoder), encoder["b_enc"]
    rows, cols = (part.flatten() for part in torch.meshgrid(torch.arange(N), torch.arange(F), indexing="ij"))
    scored = blocks.exact(rows, cols).view(N, F).double() - limit.double()
    (part,) = screened(blocks, limit)
    upper = part.upper[:, :F].double()
    width = 2 * (part.of_tokens.double() @ part.of_latents.double())[:, :F]
    rounding = upper.abs() * 2.0**-8
    assert (scored <= upper + rounding).all()
    assert (scored >= upper - rounding - width).all()


@each(
    states=STATES,
    static={"listed": False, "static": True},
    block={"one block": None, "blocks": 192},
    k=[1, 8, 150],
)
def test_the_largest_are_those_of_float64(states, static, block, k):
    encoder = states()
    true, near = exact(encoder), slack(encoder)
    with screening(True):
        of_tokens = select_topk(EncoderBlocks(**encoder, block_latents=block), k, static)
        of_batch = select_batch_topk(EncoderBlocks(**encoder, block_latents=block), k, static=static)
    row_cut = true.topk(k, dim=1).values[:, -1:]
    assert len(of_tokens[0]) == len(of_batch[0]) == k * N
    assert agrees(of_tokens, topk_mask(true, k) | (true <= 0), ((true - row_cut).abs() <= 2 * near) | (true <= near))
    cut = true.flatten().topk(k * N).values[-1]
    allowed = ((true - cut).abs() <= 2 * near) | (true <= near)
    assert agrees(of_batch, batch_topk_mask(true, k) | (true <= 0), allowed)


@each(states=STATES, block={"one block": None, "blocks": 192})
def test_those_above_a_threshold_are_those_of_float64(states, block):
    encoder = states()
    true, near = exact(encoder), slack(encoder)
    threshold = true.quantile(0.99, dim=0).float()
    with screening(True):
        selection = select_above(EncoderBlocks(**encoder, block_latents=block), threshold)
    assert agrees(selection, true > threshold, (true - threshold).abs() <= near)


def test_a_value_depends_on_neither_the_batch_nor_the_blocks():
    encoder = plain()
    with screening(True):
        whole = select_topk(EncoderBlocks(**encoder), 8)
        parts = select_topk(EncoderBlocks(**encoder, block_latents=64), 8)
        alone = select_topk(EncoderBlocks(**encoder | {"x": encoder["x"][5:9]}), 8)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert torch.equal(alone[2], whole[2][5 * 8 : 9 * 8]) and torch.equal(alone[1], whole[1][5 * 8 : 9 * 8])


def test_tokens_of_which_bf16_cannot_tell_are_counted_and_selected_in_float32():
    encoder = plain()
    encoder["x"][7] = 0  # its pre-activations are the biases, of which fewer than k are positive
    encoder["b_enc"] = torch.where(torch.arange(F) < 3, 1.0, -1.0)
    before = counts.fallbacks
    with screening(True):
        rows, cols, values = select_topk(EncoderBlocks(**encoder), 8)
    assert counts.fallbacks - before == 1
    assert cols[rows == 7].tolist() == list(range(8)) and values[rows == 7].tolist() == [1.0] * 3 + [-1.0] * 5


FAMILIES = ["relu", "topk", "batch_topk", "jumprelu", "gated", "matryoshka-topk", "matryoshka-batch_topk"]


@each(variant=FAMILIES, enabled=[True, False])
def test_the_gradients_of_a_step_are_those_of_dense_tensors_in_float64(variant, enabled):
    fields = {"prefix_widths": [100, 700]} if variant.startswith("matryoshka") else {}
    sae = make_sae(variant, torch.float32, num_latents=700, **fields).train()
    x, before = torch.randn(300, sae.config.d_in), counts.candidates
    if variant in ("relu", "jumprelu", "gated"):  # at first half of all latents fire: bf16 products say nothing of use
        pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
        sae.b_enc.data -= pre.quantile(0.98) - (float(sae.threshold.max()) if variant == "jumprelu" else 0.0)
    with screening(enabled):
        gradients = step(sae, x, weights_of(sae))
    assert (counts.candidates > before) == enabled
    for name, expected in dense_step(copy.deepcopy(sae).double(), x.double(), weights_of(sae)).items():
        if expected is not None:
            assert (gradients[name].double() - expected).norm() <= 1e-6 * expected.norm(), name


def test_a_config_a_context_and_small_batches_turn_it_off(monkeypatch):
    monkeypatch.setattr(module, "bf16_is_fast", lambda device: True)
    monkeypatch.setattr(module, "_SMALLEST", 1000)
    encoder = plain()
    assert module.screens(EncoderBlocks(**encoder))
    assert not module.screens(EncoderBlocks(**encoder, screening=False))
    assert not module.screens(EncoderBlocks(**encoder | {"x": encoder["x"][:1]}))
    assert not module.screens(EncoderBlocks(**{name: part.double() for name, part in encoder.items()}))
    with screening(False):
        assert not module.screens(EncoderBlocks(**encoder))
    with pytest.raises(RuntimeError), screening(True):
        raise RuntimeError
    assert not getattr(module._state, "forced", None)
