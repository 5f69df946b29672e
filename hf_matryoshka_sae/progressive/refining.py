"""SAEs whose codes look again at what they left out, as sparse as before: less error without training."""

import copy
import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..evaluation.data import HasActivations
from ..evaluation.firing import firings_of
from ..evaluation.similarity import TokenSample
from ..models import SAEModel


logger = logging.getLogger(__name__)

_ROWS = 1024  # tokens encoded at once
_TOLERANCE = 1e-3  # of the L0
_TRIES = 40


@torch.no_grad()
def refined(
    sae: SAEModel,
    activations: HasActivations | Iterable[Tensor] | None = None,
    steps: int = 1,
    step_size: float = 0.2,
    tokens: int = 8192,
    l0: float | None = None,
) -> SAEModel:
    """Return a copy of an SAE that refines its codes `steps` times and fires as often as before.

    A latent that another one covers fires less, and one that is needed beside it more (`models/refinement.py`). All
    weights stay. A step raises the pre-activations of what fires, so thresholds move along, all by one amount:
    `threshold`, or `-b_enc` of ReLU and Gated. TopK keeps its k and needs no data.

    Args:
        sae ([`SAEModel`]): The SAE, which is not changed; ours or another library's, refined before or not.
        activations ([`HeldOut`] or an iterable of `(n, D)` tensors, *optional*): Raw hidden states of training text,
            for all families but TopK.
        steps (`int`, *optional*, defaults to 1): How often; 0 goes back to one product. Encoding costs about as much
            again for each.
        step_size (`float`, *optional*, defaults to 0.2): How far a step goes. Four of 0.1 do more than two of 0.2;
            where many latents fire together, larger ones overshoot, and a warning says so.
        tokens (`int`, *optional*, defaults to 8192): Tokens, drawn from all hidden states, that thresholds are set on.
        l0 (`float`, *optional*): Latents per token to aim at; by default those of `sae` on these tokens.

    Returns:
        [`SAEModel`] of the same class, in `eval` mode, whose config has `refine_steps` and `refine_step_size`.

    Raises:
        `ValueError`: for a step or a size that the config refuses, no hidden states or some of another width, or an L0
            out of reach.
    """
    result = copy.deepcopy(sae).eval()
    if result.config.scale_by_decoder_norm:
        result.fold_decoder_norm_()
    config = copy.deepcopy(result.config)
    config.refine_steps, config.refine_step_size = steps, step_size
    config.validate_fields()
    thresholds = config.activation_name != "topk"
    if l0 is not None and not thresholds:
        raise ValueError(f"A TopK SAE keeps k = {config.k} latents per token, so that `l0` has no meaning; got {l0}.")
    if activations is None and thresholds:
        raise ValueError(
            f"Pass hidden states as `activations`: the thresholds of a {config.activation_name} SAE have to move with "
            "its codes, or another number of latents fires than before."
        )
    if activations is None:
        result.config = config
        return result
    sample = TokenSample.of(activations, tokens).tokens().to(sae.W_enc)
    if sample.shape[1] != config.d_in:
        raise ValueError(f"`activations` must be of width d_in = {config.d_in}, got {tuple(sample.shape)}.")
    parts, before = sample.split(_ROWS), _error(result, sample)
    wanted = _l0(result, parts) if l0 is None else l0
    if thresholds and not 0 < wanted < config.num_latents:
        raise ValueError(f"`l0` must lie between 0 and num_latents ({config.num_latents}), got {wanted:g}.")
    result.config = config
    if thresholds:
        _move_thresholds(result, wanted, parts)
    after = _error(result, sample)
    if after > before and steps and l0 is None:
        logger.warning(
            "With `steps=%s` and `step_size=%s` the error is %.3g times what it was: take a smaller `step_size`.",
            steps,
            step_size,
            after / before,
        )
    return result


def _error(sae: SAEModel, sample: Tensor) -> float:
    """Return the squared error of the first hidden states of a sample."""
    x = sample[:_ROWS]
    return (sae(x, return_loss=False).reconstruction - x).square().sum().item()


def _l0(sae: SAEModel, parts: Iterable[Tensor]) -> float:
    """Return how many latents fire per token."""
    told = firings_of(sae, parts)
    return told.fired.sum().item() / told.tokens.item()


def _move_thresholds(sae: SAEModel, wanted: float, parts: tuple[Tensor, ...]) -> None:
    """Raise all thresholds by the amount at which `wanted` latents fire per token; negative where too few do."""
    name = "threshold" if hasattr(sae, "threshold") else "b_enc"
    before = getattr(sae, name).detach().clone()

    def l0_at(amount: float) -> float:
        moved = (before + amount).clamp(min=0) if name == "threshold" else before - amount
        getattr(sae, name).copy_(moved)
        return _l0(sae, parts)

    values = sae.encode(parts[0]).values
    width = 0.1 * values[values > 0].mean().item() if (values > 0).any() else 1.0
    if not _bisect(l0_at, wanted, width):
        raise ValueError(
            f"No threshold lets {wanted:g} latents fire per token with such codes. Take fewer steps or a smaller "
            "`step_size`, or pass another `l0`."
        )


def _bisect(l0_at: Callable[[float], float], wanted: float, width: float) -> bool:
    """Find the amount at which a falling function has a value, first from 0 outwards; `False` where there is none."""
    found = l0_at(0.0)
    sign = 1.0 if found > wanted else -1.0
    inner, outer, halving = 0.0, sign * width, False
    for _ in range(_TRIES):
        amount = (inner + outer) / 2 if halving else outer
        found = l0_at(amount)
        if abs(found / wanted - 1) < _TOLERANCE:
            return True
        if (found - wanted) * sign > 0:
            inner = amount
            outer = outer if halving else 2 * outer
        else:
            outer, halving = amount, True
    # Equal pre-activations of many tokens may leave no amount that is nearer.
    return abs(found / wanted - 1) < 10 * _TOLERANCE
