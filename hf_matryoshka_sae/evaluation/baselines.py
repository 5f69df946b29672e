"""Baselines of a dictionary: random directions at its L0, principal components of its width, the identity.

Random dictionaries come close to trained ones on several published metrics (arXiv 2602.14111), and no linear code of
m numbers per token reconstructs better than principal components, so no figure means much without them. Each baseline
is used as a dictionary is: `widths`, and `reconstruct(x)` of shape `(P, N, D)`. A random dictionary is an SAE itself.

Shapes: N tokens, D `d_in`, F latents, P widths.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.distributed import reduce_sum
from ..common.seeds import derived_seed
from ..models import BatchTopKSAEConfig, SAEConfig, SAEModel, TopKSAEConfig, build_sae
from ..models.sparse_ops import row_norms
from .data import HasActivations
from .firing import firings_of
from .geometry import checked_widths, groups
from .similarity import TokenSample, checked_batches


_BLOCK_ENTRIES = 2**23
_LEAST_COMPONENTS = 2  # widths of principal components
_SMALLEST_SCALE = 1e-3  # not 0, even where a group adds to the error: its latents must fire, to keep the L0


class Identity:
    """Hidden states in place of their reconstructions: the upper end of every scale.

    Args:
        widths (`Sequence[int]`): Widths at which it is reported.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        self.widths = list(widths)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return hidden states `(N, D)` once for each width, `(P, N, D)`."""
        return x.expand(len(self.widths), *x.shape)


@dataclass
class PrincipalComponents:
    """The best linear code of m numbers per token, `mean + sum over i < m of <x - mean, v_i> v_i`, at each width m.

    Its numbers are dense, so at equal width it spends more than a sparse dictionary, and beyond D it has no use.

    Args:
        mean (`Tensor` of shape `(D,)`): Mean of the fitted hidden states, float64.
        components (`Tensor` of shape `(D, D)`): Rows v_i, the one of largest variance first, float64.
        variances (`Tensor` of shape `(D,)`): Variance along each component, float64.
        widths (`list[int]`): Widths m; any at or above D gives x itself.
    """

    mean: Tensor
    components: Tensor
    variances: Tensor
    widths: list[int]

    @classmethod
    @torch.no_grad()
    def fit(cls, activations: HasActivations | Iterable[Tensor], widths: Sequence[int]) -> "PrincipalComponents":
        """Find the components, from a covariance summed in float64 over batches and processes.

        Args:
            activations ([`HasActivations`] or iterable of `Tensor`): Batches `(n, D)`; read once. Fitted on the tokens
                that are evaluated, it is the bound for codes of its width; on others, a baseline like any other.
            widths (`Sequence[int]`): Widths m, each at least 1.

        Raises:
            `ValueError`: for widths below 1, no tokens, or hidden states that are all the same.
        """
        widths = list(widths)
        if not widths or min(widths) < 1:
            raise ValueError(f"`widths` must name at least one width, each at least 1; got {widths}.")
        sums: Tensor | None = None
        for x in checked_batches(activations, task="covariance"):
            rows = torch.cat([x.double(), x.new_ones(len(x), 1).double()], 1)  # the ones sum up x and the count
            sums = rows.T @ rows if sums is None else sums.addmm_(rows.T, rows)
        if sums is None:
            raise ValueError("There are no tokens to fit components to: the activations are empty.")
        reduce_sum(sums)
        mean = sums[-1, :-1] / sums[-1, -1]
        covariance = sums[:-1, :-1] / sums[-1, -1] - mean.outer(mean)
        variances, components = torch.linalg.eigh(covariance)
        if not variances.sum() > 1e-12 * (covariance + mean.outer(mean)).trace():  # below lies rounding
            raise ValueError("The hidden states do not vary; there are no components to fit.")
        return cls(mean, components.T.flip(0).contiguous(), variances.flip(0).clamp(min=0), widths)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Return the reconstruction of hidden states `(N, D)` at each width, `(P, N, D)`."""
        d_in = len(self.mean)
        if x.dim() != 2 or x.shape[1] != d_in:
            raise ValueError(f"These components take hidden states (N, {d_in}), got {tuple(x.shape)}.")
        mean, components = self.mean.to(x), self.components.to(x)
        scores = (x - mean) @ components.T
        return torch.stack([torch.addmm(mean, scores[:, :width], components[:width]) for width in self.widths])

    def fvu(self, widths: Sequence[int] | None = None) -> list[float]:
        """Return the fraction of variance unexplained at each width on the fitted tokens."""
        widths = self.widths if widths is None else widths
        return [(self.variances[width:].sum() / self.variances.sum()).item() for width in widths]


def component_widths(widths: Sequence[int], d_in: int) -> list[int]:
    """Return widths at which principal components say something beside SAEs of these `widths`: those below `d_in`.

    They end at `d_in`: where SAEs are wider than that, a few smaller numbers show how they get there.
    """
    below = [width for width in widths if width < d_in]
    below += [max(1, d_in // part) for part in (8, 4, 2)] if len(below) < _LEAST_COMPONENTS else []
    return sorted(set(below))


@torch.no_grad()
def random_dictionary(
    sae: SAEModel,
    activations: HasActivations | Iterable[Tensor],
    widths: Sequence[int] | None = None,
    tokens: int = 8192,
    seed: int = 0,
) -> SAEModel:
    """Return an SAE of random directions that fires as often as `sae` does at every width.

    The decoder's rows are random unit vectors, the encoder's point the same way, `b_dec` is the mean. Of each group of
    latents that a width adds, one threshold lets as many pairs of token and latent through as fire in `sae`, and one
    factor scales the values so that the squared error at that width is least, given the widths before it: unscaled,
    the sum of many random directions overshoots, and would be too easy to beat. Thresholds are at least 0, so where
    `sae` fires on more than half of all pairs the L0 stays below.

    Class and config are those of `sae`, except that TopK becomes BatchTopK: which of k places fall into a prefix is
    learnt, and only thresholds can match it. ReLU and Gated carry the threshold in `b_enc`.

    Args:
        sae ([`SAEModel`]): The SAE in `eval` mode, for raw hidden states; its L0 is that of selection `"mask"`.
        activations ([`HasActivations`] or iterable of `Tensor`): Batches `(n, D)`; read once.
        widths (`Sequence[int]`, *optional*): Widths at which L0 is matched; by default the prefixes of `sae`.
        tokens (`int`, *optional*, defaults to 8192): Tokens to calibrate on; on others L0 differs by 1 to 2%.
        seed (`int`, *optional*, defaults to 0): Seed of the directions and the sample.

    Returns:
        [`SAEModel`] in `eval` mode and float32.

    Raises:
        `ValueError`: for bad widths, empty or bad activations, or an SAE of which nothing fires.
    """
    widths = checked_widths(widths, sae)
    x = TokenSample.of(activations, tokens, seed).tokens().to(sae.W_enc.device, torch.float32)
    if x.shape[1] != sae.config.d_in:
        raise ValueError(f"This SAE takes hidden states of width d_in = {sae.config.d_in}, got {tuple(x.shape)}.")
    parts = x.split(max(1, _BLOCK_ENTRIES // max(sae.config.num_latents, len(widths) * x.shape[1])))
    fired = firings_of(sae, parts).fired
    if not fired.any():
        raise ValueError("No latent of the SAE fires on these hidden states; there is no L0 to match.")
    random = build_sae(_config(sae.config, fired.sum().item() / len(x))).to(x.device).eval()
    # Not the seed itself: an SAE trained with it may have begun with the same directions.
    generator = torch.Generator().manual_seed(derived_seed(seed, "random dictionary"))
    directions = torch.randn(random.W_dec.shape, generator=generator)
    random.W_dec.copy_(directions.div_(row_norms(directions)[:, None]))  # in place: it is as large as the dictionary
    del directions
    random.b_dec.copy_(x.double().mean(0))
    thresholds, scales = x.new_zeros(len(random.W_dec)), x.new_ones(len(random.W_dec))
    bounds = widths if widths[-1] == len(scales) else [*widths, len(scales)]
    for group in groups(bounds):
        thresholds[group] = _threshold(random, group, parts, int(fired[group].sum()))
    _set_encoder(random, thresholds, scales)
    for group, scale in zip(groups(bounds), _scales(random, bounds, parts), strict=True):
        scales[group] = scale
    _set_encoder(random, thresholds, scales)
    return random


def _config(config: SAEConfig, l0: float) -> SAEConfig:
    """Return the same config, or where each token keeps k latents that of thresholds with as many on average."""
    config = copy.deepcopy(config)
    config.refine_steps = 0  # the thresholds are those of one product
    if isinstance(config, TopKSAEConfig):
        shared = ("d_in", "num_latents", "apply_b_dec_to_input", "scale_by_decoder_norm", "base_model", "hookpoint")
        config = BatchTopKSAEConfig(**{name: getattr(config, name) for name in shared}, k=l0)
    elif config.activation_name == "topk":
        config.activation = "batch_topk"
    if config.activation_name == "batch_topk":
        config.k = l0
    return config


def _threshold(random: SAEModel, group: slice, parts: Sequence[Tensor], count: int) -> float:
    """Return a threshold that `count` projections on a group's directions exceed, half-way to the next one."""
    largest = random.W_dec.new_zeros(0)
    for x in parts:
        projections = ((x - random.b_dec) @ random.W_dec[group].T).flatten()
        if len(largest) > count:
            projections = projections[projections > largest[-1]]
        joined = torch.cat([largest, projections])
        largest = joined.topk(min(count + 1, len(joined))).values
    if count == 0:
        return max(0.0, largest[0].item())
    return max(0.0, largest[count - 1 : count + 1].mean().item())


def _set_encoder(random: SAEModel, thresholds: Tensor, scales: Tensor) -> None:
    """Set latents to `scale * <x - b_dec, d>` where the projection exceeds the threshold; ReLU subtracts it."""
    random.W_enc.copy_(random.W_dec * scales[:, None])
    bias = torch.zeros_like(scales) if random.config.apply_b_dec_to_input else -(random.W_enc @ random.b_dec)
    if random.config.activation_name in ("batch_topk", "jumprelu"):
        random.b_enc.copy_(bias)
        random.threshold.copy_(thresholds * scales)
        return
    random.b_enc.copy_(bias - thresholds * scales)
    if random.config.activation_name == "gated":
        random.b_mag.copy_(bias)
        random.r_mag.zero_()


def _scales(random: SAEModel, widths: list[int], parts: Sequence[Tensor]) -> list[float]:
    """Return for each group, one after the other, the factor of least squared error.

    With y = x - b_dec and u_g what group g adds, over all tokens: c_g = <y - sum_{h<g} c_h u_h, u_g> / ||u_g||^2.
    """
    products = torch.zeros(len(widths) + 1, len(widths) + 1, dtype=torch.float64, device=random.W_dec.device)
    for x in parts:
        prefixes = random.decode_pairs(random.encode_pairs(x), widths) - random.b_dec
        added = torch.cat([prefixes[:1], prefixes.diff(dim=0), (x - random.b_dec)[None]]).double().flatten(1)
        products += added @ added.T
    scales: list[float] = []
    for g, row in enumerate(products[:-1].tolist()):
        left = row[-1] - sum(scale * product for scale, product in zip(scales, row, strict=False))
        scales.append(max(_SMALLEST_SCALE, left / row[g]) if row[g] > 0 else 1.0)
    return scales
