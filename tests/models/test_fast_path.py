"""What the sparse path promises as a whole: results do not depend on blocks, ties are decided, nothing is N x F."""

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_matryoshka_sae.models import dense_ops, encoder_blocks, selection

from ..axes import each
from .reference import VARIANTS, assert_close, batch_topk_mask, make_sae, step_with_kernel, topk_mask


NUM_TOKENS, D_IN, NUM_LATENTS = 24, 6, 150
WIDTHS = [7, 40, 150]
COMPETING = [name for name in VARIANTS if name.endswith("topk")]


def tied_sae(variant: str, **fields):
    """Weights of small integers, every latent twice: sums are exact, and most pre-activations are tied."""
    if variant.startswith("matryoshka"):
        fields["prefix_widths"] = WIDTHS
    sae = make_sae(variant, num_latents=NUM_LATENTS, d_in=D_IN, **fields)
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            if tensor.is_floating_point() and name != "threshold":
                tensor.copy_(torch.randint(-2, 3, tensor.shape))
        for tensor in (sae.W_enc, sae.W_dec, sae.b_enc):
            tensor[1::2] = tensor[::2]
    return sae.train()


def tied_states() -> torch.Tensor:
    """Tokens of small integers, some of them twice."""
    x = torch.randint(-2, 3, (NUM_TOKENS, D_IN)).double()
    x[1::4] = x[::4]
    return x


def step(sae, x, weights) -> dict[str, torch.Tensor]:
    """The weighted error and all its gradients, as training takes them."""
    pairs = sae.encode_pairs(x)
    sse, residual = sae.prefix_errors(pairs, x, sae.prefix_widths)
    loss = (sse * weights).sum() + residual.sum() / 8
    if pairs.gate is not None:
        loss = loss + torch.relu(pairs.gate).sum() / 4
    names = [name for name, parameter in sae.named_parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, [getattr(sae, name) for name in names], allow_unused=True)
    return {"loss": loss.detach(), **dict(zip(names, gradients, strict=True))}


def dense_step(sae, x, weights) -> dict[str, torch.Tensor]:
    """The same from the equations: N x F tensors, explicit sorting, autograd."""
    config, name = sae.config, sae.config.activation_name
    pre = (x - sae.b_dec if config.apply_b_dec_to_input else x) @ sae.W_enc.T + sae.b_enc
    gate = None
    if name == "topk":
        a = torch.relu(pre) * topk_mask(pre.detach(), config.k)
    elif name == "batch_topk":
        a = torch.relu(pre) * batch_topk_mask(pre.detach(), config.k)
    elif name == "jumprelu":
        gate = step_with_kernel(pre, sae.threshold, config.bandwidth)
        jump = sae.threshold.detach() * gate  # a jump costs its height, the threshold (arXiv 2407.14435, eq. 11)
        a = pre * gate.detach() + jump - jump.detach()
    elif name == "gated":
        gate = pre
        magnitude = torch.relu(sae.r_mag.exp() * (pre - sae.b_enc) + sae.b_mag)
        a = magnitude * (pre > 0)
    else:
        a = torch.relu(pre)
    errors = [x - a[:, :width] @ sae.W_dec[:width] - sae.b_dec for width in sae.prefix_widths]
    sse = torch.stack([error.square().sum(-1).mean() for error in errors])
    loss = (sse * weights).sum() + errors[-1].sum() / 8
    if gate is not None:
        loss = loss + torch.relu(gate).sum() / 4
    names = [name for name, parameter in sae.named_parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, [getattr(sae, name) for name in names], allow_unused=True)
    return {"loss": loss.detach(), **dict(zip(names, gradients, strict=True))}


def weights_of(sae) -> torch.Tensor:
    return torch.linspace(1, 2, len(sae.prefix_widths), dtype=torch.float64)


@each(
    block={"one block": None, "blocks of 32": 32, "blocks of 64": 64},
    static={"listed": False, "static": True},
    share={"pairs": 2.0, "matmuls": -1.0},
    variant=list(VARIANTS),
)
def test_gradients_are_those_of_the_dense_reference_where_values_tie(variant, share, static, block, monkeypatch):
    set_blocks(monkeypatch, block)
    monkeypatch.setattr(dense_ops, "_SHARE", share)
    monkeypatch.setattr(dense_ops, "_FEWEST", 0)
    monkeypatch.setattr(selection, "_host_may_look", lambda device: not static)
    sae, x = tied_sae(variant), tied_states()
    ours, dense = step(sae, x, weights_of(sae)), dense_step(sae, x, weights_of(sae))
    for key, expected in dense.items():
        if expected is None:
            assert ours[key] is None or not ours[key].any(), key
        else:
            assert_close(ours[key], expected)


def set_blocks(monkeypatch, latents: int | None) -> None:
    if latents is not None:
        monkeypatch.setitem(encoder_blocks.BLOCK_ENTRIES, "cpu", latents * NUM_TOKENS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_of_any_size_give_the_same_bits(variant, monkeypatch):
    sae, x = tied_sae(variant), tied_states()
    seen = []
    for latents in (160, 96, 64, 32):
        set_blocks(monkeypatch, latents)
        seen.append(step(sae, x, weights_of(sae)))
    for other in seen[1:]:
        for key, value in seen[0].items():
            assert value is None or torch.equal(value, other[key]), key


class Largest(TorchDispatchMode):
    """The most entries that any operation gave back."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(part, torch.Tensor):
                self.entries = max(self.entries, part.numel())
        return out


@each(static={"listed": False, "static": True}, variant=COMPETING)
def test_nothing_of_size_n_x_f_is_made(variant, static, monkeypatch):
    num_tokens, num_latents, block = 512, 2048, 128
    monkeypatch.setitem(encoder_blocks.BLOCK_ENTRIES, "cpu", block * num_tokens)
    monkeypatch.setattr(selection, "_host_may_look", lambda device: not static)
    encoder_blocks._kept.__dict__.clear()
    fields = {"prefix_widths": [256, 2048]} if variant.startswith("matryoshka") else {}
    sae = make_sae(variant, torch.float32, num_latents=num_latents, k=3, **fields).train()
    x = torch.randn(num_tokens, sae.config.d_in)
    with Largest() as largest:
        step(sae, x, weights_of(sae))
    # A block, or the candidates of a token's or the batch's best groups (32 latents each) beside the best so far.
    assert largest.entries <= max(block * num_tokens, 33 * 3 * num_tokens * 2)
    assert largest.entries < num_tokens * num_latents / 4


def test_nothing_of_size_n_x_f_is_kept_for_the_backward_pass():
    sae = make_sae("matryoshka-batch_topk", torch.float32, num_latents=2048, k=3, prefix_widths=[256, 2048]).train()
    x, kept = torch.randn(512, sae.config.d_in), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        sse, _ = sae.prefix_errors(sae.encode_pairs(x), x, sae.prefix_widths)
        sse.sum().backward()
    assert max(kept) <= 2048 * sae.config.d_in


def test_many_latents_that_fire_are_summed_by_matmuls_and_few_are_not():
    assert dense_ops.worthwhile(num_pairs=500_000, num_rows=10_000, num_latents=100)
    assert not dense_ops.worthwhile(num_pairs=100_000, num_rows=10_000, num_latents=100)
    assert not dense_ops.worthwhile(num_pairs=500, num_rows=10, num_latents=100)


@each(num_latents=[1, 31, 33, 100, 1021], variant=["topk", "matryoshka-batch_topk", "relu"])
def test_any_number_of_latents_trains(variant, num_latents):
    k = {"k": min(3, num_latents)} if variant != "relu" else {}
    fields = {"prefix_widths": sorted({max(1, num_latents // 3), num_latents})} if "matryoshka" in variant else {}
    sae = make_sae(variant, num_latents=num_latents, **k, **fields).train()
    x = torch.randn(9, sae.config.d_in, dtype=torch.float64)
    ours, dense = step(sae, x, weights_of(sae)), dense_step(sae, x, weights_of(sae))
    for key, expected in dense.items():
        if expected is not None:
            assert_close(ours[key], expected)


def test_inference_mode_leaves_nothing_that_another_call_cannot_use(monkeypatch) -> None:
    monkeypatch.setattr(encoder_blocks, "_kept", threading.local())
    sae = make_sae("topk", num_latents=64, d_in=8, k=3)
    x = torch.randn(5, 8)
    with torch.inference_mode():
        inside = sae.encode(x).to_dense()
    assert torch.equal(sae.encode(x).to_dense(), inside)
