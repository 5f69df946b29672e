"""Refitting a pruned SAE without training: thresholds for a target L0, and least squares on fixed activations.

With the activations `a` fixed, `x ~ b + W^T a` is linear. Its best bias is `E[x - W^T a]`; its best bias and decoder
together solve, with residuals r, covariances over tokens and a ridge that pulls towards the old decoder,

    (Cov[a, a] + lambda) dW = Cov[a, r],   db = E[r] - dW^T E[a]

A bias that is also taken from the input would change the activations: `b_enc` (and a Gated SAE's `b_mag`) move along,
so that every pre-activation stays as it was.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..common.distributed import processes, reduce_sum
from ..evaluation.data import HasActivations, activation_batches
from ..models import SAEModel
from ..models.sparse_ops import LatentPairs, gather_sum
from .greedy import add_products
from .statistics import firing_blocks


MAX_DECODER_REFIT_LATENTS = 8192
"""Four F x F matrices of doubles are needed: 2 GiB for that many latents."""

_HELD_OUT_EVERY = 4  # batches
_BINS = 2**16
_OCTAVES = 32  # thresholds are scaled by factors from 2^-16 to 2^16, in steps of 0.03%


@dataclass
class Refit:
    """A refitted SAE, with its quality before and after.

    Args:
        sae ([`SAEModel`]): The refitted SAE.
        fvu_before (`float`): Fraction of variance unexplained before.
        fvu_after (`float`): Fraction of variance unexplained after.
        l0_before (`float`): Latents per token before.
        l0_after (`float`): Latents per token after.
        tokens (`int`): Number of tokens on which these were measured.
        held_out (`bool`): Whether those tokens, of every fourth batch, took no part in the fit; `False` where there
            are fewer batches.
    """

    sae: SAEModel
    fvu_before: float
    fvu_after: float
    l0_before: float
    l0_after: float
    tokens: int
    held_out: bool


def refit(
    sae: SAEModel,
    activations: HasActivations | Iterable[Tensor],
    decoder: bool = False,
    ridge: float = 0.1,
    l0: float | None = None,
) -> Refit:
    """Fit the bias, and optionally the decoder and the thresholds, to data in closed form; return the fitted SAE.

    One pass; a second, before it, for `l0`. Sums are in float64 and over all processes. For a Matryoshka SAE the
    widest prefix is fitted.

    Args:
        sae ([`SAEModel`]): The SAE, which is not changed.
        activations ([`HeldOut`] or an iterable of `(n, D)` tensors): Raw hidden states.
        decoder (`bool`, *optional*, defaults to `False`): Fit the decoder's rows too; they lose their length of 1.
            Where latents are scaled by it (`scale_by_decoder_norm`), it is folded into the encoder first.
        ridge (`float`, *optional*, defaults to 0.1): Weight of the distance to the old rows, in units of the mean
            variance of a latent; holds rows of latents too rare to be fitted.
        l0 (`float`, *optional*): Latents per token to which BatchTopK or JumpReLU thresholds are rescaled, all by one
            factor.

    Raises:
        `ValueError`: if there are no hidden states, some are not finite or of another width, the family has no
            threshold, `l0` is out of reach, the data cannot be read twice, or the decoder is too large to fit.
    """
    _check(sae, activations, decoder, ridge, l0)
    fitted = copy.deepcopy(sae)
    if decoder and sae.config.scale_by_decoder_norm:
        fitted.fold_decoder_norm_()
    before = None
    if l0 is not None:
        before = _rescale_thresholds(fitted, activations, l0)
    moments = [_Moments(fitted, decoder) for _ in range(2)]
    for fresh, x, pairs in _folds(fitted, activations, "refit"):
        moments[fresh].add(x, pairs)
    train, fresh = moments
    for part in moments:
        part.reduce()
    if not train.tokens:
        raise ValueError("There are no hidden states to fit to: the activations are empty.")
    held_out = fresh.tokens > 0
    measured = fresh if held_out else train
    rows, bias = train.solve(ridge)
    _shift_bias(fitted, bias)
    if rows is not None:
        fitted.W_dec.data += rows.to(fitted.W_dec)
    fvu_before, l0_before = before[held_out] if before else (measured.fvu(), measured.l0)
    return Refit(
        sae=fitted,
        fvu_before=fvu_before,
        fvu_after=measured.fvu(rows, bias),
        l0_before=l0_before,
        l0_after=measured.l0,
        tokens=int(measured.tokens),
        held_out=held_out,
    )


def _check(
    sae: SAEModel, activations: HasActivations | Iterable[Tensor], decoder: bool, ridge: float, l0: float | None
) -> None:
    if decoder and sae.config.num_latents > MAX_DECODER_REFIT_LATENTS:
        raise ValueError(
            f"The decoder is fitted for at most {MAX_DECODER_REFIT_LATENTS:,} latents, this SAE has "
            f"{sae.config.num_latents:,}. Refit its bias alone (`decoder=False`)."
        )
    if not 0 < ridge < float("inf"):
        raise ValueError(f"`ridge` must be above 0, got {ridge}.")
    if l0 is None:
        return
    if not hasattr(sae, "threshold"):
        raise ValueError(f"`l0` rescales thresholds, and a {sae.config.activation_name} SAE has none.")
    if sae.config.refine_steps:
        raise ValueError("`l0` rescales thresholds of one product; `refined(sae, l0=...)` sets those of this SAE.")
    if not 0 < l0 <= sae.config.num_latents:
        raise ValueError(f"`l0` must lie between 0 and num_latents ({sae.config.num_latents}), got {l0}.")
    check_rereadable(activations, "Rescaling thresholds")


def check_rereadable(activations: HasActivations | Iterable[Tensor] | None, purpose: str) -> None:
    """Raise `ValueError` for an iterator, which would be empty in a second pass."""
    if isinstance(activations, Iterator):
        raise ValueError(f"{purpose} reads the data more than once: pass a list or a `HeldOut`, not an iterator.")


def _folds(
    sae: SAEModel, activations: HasActivations | Iterable[Tensor], task: str
) -> Iterator[tuple[bool, Tensor, LatentPairs]]:
    """Yield blocks of the data and whether they are of the held-out batches."""
    batches = tqdm(activation_batches(activations), desc=task, disable=processes()[0] != 0, leave=False)
    for number, x, pairs in firing_blocks(sae, batches):
        yield number % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1, x, pairs


class _Moments:
    """Sums of residuals, and with `decoder` of their products with activations."""

    def __init__(self, sae: SAEModel, decoder: bool = False) -> None:
        self.sae = sae
        latents, d_in = sae.config.num_latents, sae.config.d_in
        shapes = {"scalars": (4,), "x": (d_in,), "residual": (d_in,)}
        if decoder:
            shapes |= {"latents": (latents,), "products": (latents, latents), "cross": (latents, d_in)}
        device = sae.W_dec.device
        self.sums = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}

    def add(self, x: Tensor, pairs: LatentPairs) -> None:
        sums = self.sums
        with torch.no_grad():
            reconstruction = self.sae.decode_pairs(pairs, [pairs.num_latents])[0]
        x = x.to(sums["x"])
        residual = x - reconstruction
        sums["x"] += x.sum(0)
        sums["residual"] += residual.sum(0)
        fired = (pairs.values > 0).sum()
        sums["scalars"] += torch.stack([x.new_tensor(len(x)), x.square().sum(), residual.square().sum(), fired])
        if "products" in sums:
            values = pairs.values.double()
            order, offsets = pairs.index.by_latent
            sums["latents"].index_add_(0, pairs.cols, values)
            sums["cross"] += gather_sum(values[order], residual, pairs.rows[order], offsets)
            add_products(sums["products"], pairs)

    def reduce(self) -> None:
        """Sum over processes, then divide by the tokens."""
        reduce_sum(*self.sums.values())
        self.tokens = self.sums["scalars"][0].item()
        for total in self.sums.values():
            total /= max(1.0, self.tokens)
        self.l0 = self.sums["scalars"][3].item()

    def solve(self, ridge: float) -> tuple[Tensor | None, Tensor]:
        """Return the changes of the decoder `(F, D)`, if it is fitted, and of the bias `(D,)`."""
        sums = self.sums
        if "products" not in sums:
            return None, sums["residual"]
        mean = sums["latents"]
        covariance = sums["products"] - mean[:, None] * mean
        # A latent that never fires has a row of zeros: the ridge leaves its decoder row as it is.
        weight = ridge * covariance.diagonal().mean()
        covariance.diagonal().add_(weight.clamp(min=torch.finfo(torch.float64).tiny))
        cross = sums["cross"] - mean[:, None] * sums["residual"]
        rows = torch.cholesky_solve(cross, torch.linalg.cholesky(covariance))
        return rows, sums["residual"] - mean @ rows

    def fvu(self, rows: Tensor | None = None, bias: Tensor | None = None) -> float:
        """Return the FVU of this data after changes of decoder and bias: exact, from the sums."""
        _, square, error, _ = self.sums["scalars"]
        if bias is not None:
            error = error - 2 * bias @ self.sums["residual"] + bias @ bias
        if rows is not None:
            cross, products, mean = self.sums["cross"], self.sums["products"], self.sums["latents"]
            error = error - 2 * (rows * cross).sum() + 2 * (mean @ rows) @ bias + (rows * (products @ rows)).sum()
        variance = square - self.sums["x"].square().sum()
        return (error / variance).item()


@torch.no_grad()
def _shift_bias(sae: SAEModel, shift: Tensor) -> None:
    """Add to `b_dec`, and keep every pre-activation as it was (in place)."""
    if sae.config.apply_b_dec_to_input:
        compensation = sae.W_enc.double() @ shift
        sae.b_enc += compensation.to(sae.b_enc)
        if sae.config.activation_name == "gated":
            sae.b_mag += (sae.r_mag.double().exp() * compensation).to(sae.b_mag)
    sae.b_dec += shift.to(sae.b_dec)


def _rescale_thresholds(
    sae: SAEModel, activations: HasActivations | Iterable[Tensor], l0: float
) -> list[tuple[float, float]]:
    """Multiply the thresholds by the factor at which `l0` latents fire per token.

    One pass with all thresholds at 0 counts, in bins, how often latents exceed each multiple of their thresholds.
    Thresholds that are not above 0 stay as they are.

    Returns:
        FVU and L0 of the SAE as it was, on the data that is fitted and on the held-out part.
    """
    threshold = sae.threshold.detach().double()
    open_sae = copy.deepcopy(sae)
    open_sae.threshold.data.clamp_(max=0)
    counts = torch.zeros(_BINS, dtype=torch.float64, device=threshold.device)
    moments = [_Moments(sae) for _ in range(2)]
    for fresh, x, pairs in _folds(open_sae, activations, "thresholds"):
        limit = threshold[pairs.cols]
        ratio = torch.where(limit > 0, pairs.values / limit, torch.inf)
        bins = (ratio.log2() + _OCTAVES / 2) * (_BINS / _OCTAVES)
        counts.index_add_(0, bins.clamp(0, _BINS - 1).long(), (pairs.values > 0).double())
        moments[fresh].add(x, pairs.keep(pairs.values > limit))
    reduce_sum(counts)
    for part in moments:
        part.reduce()
    tokens = sum(part.tokens for part in moments)
    if not tokens:
        raise ValueError("There are no hidden states to fit to: the activations are empty.")
    above = counts.flip(0).cumsum(0).flip(0) / tokens  # per token, that exceed the lower edge of each bin
    best = int((above - l0).abs().argmin())
    if not 0 < best < _BINS - 1 or abs(above[best].item() - l0) > 0.05 * l0:
        raise ValueError(
            f"No factor of the thresholds gives an L0 of {l0:g}: between {above[-1].item():.2f} and "
            f"{above[0].item():.2f} latents can fire per token."
        )
    factor = 2.0 ** (best * _OCTAVES / _BINS - _OCTAVES / 2)
    sae.threshold.data.copy_(torch.where(threshold > 0, threshold * factor, threshold))
    return [(part.fvu() if part.tokens else float("nan"), part.l0) for part in moments]
