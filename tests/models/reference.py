"""Dense float64 references, written from the equations and sharing no code with the package.

Everything is built as N x F, selections by explicit sorting of Python tuples, and gradients by plain autograd.
"""

import torch
from torch import Tensor

from hf_matryoshka_sae import CONFIGS, SAEModel, build_sae


D, F = 6, 13  # F is no multiple of 8
PREFIXES = (2, 5, 13)

VARIANTS = {
    "relu": {"type": "relu"},
    "topk": {"type": "topk", "k": 3},
    "batch_topk": {"type": "batch_topk", "k": 2.5},
    "jumprelu": {"type": "jumprelu", "bandwidth": 0.6},
    "gated": {"type": "gated"},
    "matryoshka-relu": {"type": "matryoshka", "activation": "relu"},
    "matryoshka-topk": {"type": "matryoshka", "activation": "topk", "k": 3},
    "matryoshka-batch_topk": {"type": "matryoshka", "activation": "batch_topk", "k": 2.5},
    "matryoshka-jumprelu": {"type": "matryoshka", "activation": "jumprelu", "bandwidth": 0.6},
}
OPTIONS = {
    "default": {},
    "b_dec unused at the input": {"apply_b_dec_to_input": False},
    "scaled by the decoder's norms": {"scale_by_decoder_norm": True},
}


def make_sae(variant: str, dtype: torch.dtype = torch.float64, **fields) -> SAEModel:
    """A small SAE with random weights, non-zero biases, decoder rows of different lengths and different thresholds."""
    fields = {"d_in": D, "num_latents": F} | VARIANTS[variant] | fields
    kind = fields.pop("type")
    if kind == "matryoshka":
        fields.setdefault("prefix_widths", list(PREFIXES))
    sae = build_sae(CONFIGS[kind](**fields)).to(dtype).eval()
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            if name == "threshold":
                tensor.copy_(torch.rand(tensor.shape) * 0.8 + 0.1)
            elif name == "r_mag":
                tensor.copy_(torch.randn(tensor.shape) * 0.3)
            elif tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape) * (0.7 if tensor.dim() == 2 else 0.3))
    return sae


def hidden_states(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, D, dtype=dtype)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def topk_mask(pre: Tensor, k: int) -> Tensor:
    """True at the k largest positive entries of each row, the lowest index first among equals."""
    mask = torch.zeros_like(pre, dtype=torch.bool)
    for row, values in enumerate(pre.tolist()):
        best = sorted(range(len(values)), key=lambda col: (-values[col], col))[:k]
        for col in best:
            mask[row, col] = values[col] > 0
    return mask


def batch_topk_mask(pre: Tensor, k: float) -> Tensor:
    """True at the int(k N) largest positive entries of the batch, the lowest (token, latent) first among equals."""
    values = pre.flatten().tolist()
    best = sorted(range(len(values)), key=lambda position: (-values[position], position))[: int(k * len(pre))]
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[[position for position in best if values[position] > 0]] = True
    return mask.view(pre.shape)


def step_with_kernel(pre: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """H(pre - theta), whose gradient to theta is -(1 / bandwidth) 1[|pre - theta| < bandwidth / 2]."""
    window = ((pre - theta).abs() < bandwidth / 2).to(pre.dtype).detach() / bandwidth
    return (pre > theta).to(pre.dtype) - window * (theta - theta.detach())


def dense_latents(sae: SAEModel, state: dict[str, Tensor], x: Tensor, width: int, selection: str) -> Tensor:
    """Activations (N, F), zero past `width`, as a differentiable function of `state` and `x`."""
    config = sae.config
    seen = width if selection == "restrict" else config.num_latents
    kind = getattr(config, "activation", config.model_type.removesuffix("_sae"))
    centred = x - state["b_dec"] if config.apply_b_dec_to_input else x
    projection = (centred @ state["W_enc"].T)[:, :seen]
    norms = state["W_dec"].norm(dim=1)[:seen] if config.scale_by_decoder_norm else torch.ones(seen, dtype=x.dtype)
    pre = (projection + state["b_enc"][:seen]) * norms
    if kind == "topk":
        acts = pre * topk_mask(pre.detach(), int(config.k))
    elif kind == "batch_topk" and sae.training:
        acts = pre * batch_topk_mask(pre.detach(), config.k)
    elif kind == "batch_topk":
        acts = pre * (pre > state["threshold"][:seen])
    elif kind == "jumprelu":
        theta = state["threshold"][:seen]
        step = step_with_kernel(pre, theta, config.bandwidth)
        # a = z H(z - theta), whose gradient to theta is theta times the step's (Rajamanoharan et al. 2024, eq. 11)
        acts = pre * step.detach() + theta.detach() * (step - step.detach())
    elif kind == "gated":
        magnitude = torch.relu(state["r_mag"][:seen].exp() * projection + state["b_mag"][:seen]) * norms
        acts = (pre > 0) * magnitude
    else:
        acts = torch.relu(pre)
    acts = acts[:, :width]
    return torch.cat([acts, acts.new_zeros(len(x), config.num_latents - width)], dim=1)


def dense_forward(
    sae: SAEModel, x: Tensor, width: int | None = None, selection: str = "restrict", state: dict | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(latents (N, F), reconstructions of every prefix up to `width` (P, N, D), loss)."""
    config, state = sae.config, state or dict(sae.state_dict())
    width = width or config.num_latents
    acts = dense_latents(sae, state, x, width, selection)
    W_dec = state["W_dec"]
    if config.scale_by_decoder_norm:
        W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
    widths = getattr(config, "prefix_widths", [config.num_latents])
    inner = [w for w in widths if w < width] + [width]
    weights = getattr(config, "prefix_weights", None)
    weights = [1 / len(inner)] * len(inner) if weights is None else weights[: len(inner)]
    prefixes = torch.stack([acts[:, :w] @ W_dec[:w] + state["b_dec"] for w in inner])
    errors = ((prefixes - x) ** 2).sum(-1).mean(-1)
    return acts, prefixes, sum(weight * error for weight, error in zip(weights, errors, strict=True))
