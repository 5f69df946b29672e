"""Ablation sparsity: how few of the next tokens' logits a latent acts on.

At one token, latent i is ablated from the hidden state x: x - a_i d_i; the error of the SAE stays. Delta is the
change of the logits, over the V tokens of the vocabulary and the T positions from that token on, less its median at
each position (a constant changes no prediction). With n = (||Delta||_1 / ||Delta||_2)^2, which is 1 if one logit
changes and V T if all change alike, the *fraction* is n / (V T). Gao et al. 2024 (arXiv 2406.04093), with T = 16.

The fraction of a width is the mean over all pairs of a token and a latent that fires on it. Tokens are sampled; on
each token some latents are sampled from each group between two widths, and stand for all that fire there. Intervals
span the 2.5th to the 97.5th percentile of bootstrap resamples of the tokens.

Shapes: A ablations, T positions, V vocabulary, W widths, N drawn tokens.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...activations import is_masked_lm
from ...activations.hookpoints import first_tensor, hooked
from ...common.checks import check_at_least
from ...common.distributed import processes, reduce_sum
from ...common.intervals import ratio_interval, resampled_rows
from ...common.logs import progress
from ...common.report import Column, Report
from ...evaluation.data import HeldOut
from ...models import SAEModel
from ...models.sparse_ops import LatentPairs
from ..drawn_latents import as_records, with_baselines


_LOGITS = 2**26  # largest number of logits in memory at a time
_ROUNDING = 16  # a change of logits below this many units in the last place is no effect


_COLUMNS = (
    Column("fraction", "fraction", "share of the next tokens' logits that a latent acts on.", ".4f", "lower"),
    Column("size", "size", "mean of ||Delta||_2, the length of the change of the logits.", ".3f"),
    Column("pairs", "pairs", "number of ablations.", "d"),
    Column("no_effect", "no effect", "number of ablations that changed no logit; the means leave them out.", "d"),
)


@torch.no_grad()
def ablation_sparsity(
    saes: Mapping[str, SAEModel],
    data: HeldOut,
    widths: Sequence[int] | None = None,
    tokens: int = 64,
    per_group: int = 4,
    positions: int = 16,
    baselines: bool = True,
    seed: int = 0,
    resamples: int = 1000,
    show: bool = True,
) -> Report:
    """Ablate latents one at a time and measure how many logits change.

    All latents of the SAE compete for places (selection `mask`).

    Args:
        saes (`dict[str, SAEModel]`): SAEs of one hookpoint, by name.
        data ([`HeldOut`]): Text and a causal language model; several processes share the tokens.
        widths (`Sequence[int]`, *optional*): Widths to measure; by default each SAE's prefix widths.
        tokens (`int`, *optional*, defaults to 64): Number of tokens sampled from the text.
        per_group (`int`, *optional*, defaults to 4): Number of latents ablated on each token from each group between
            two widths.
        positions (`int`, *optional*, defaults to 16): Number T of positions, from the token's own on.
        baselines (`bool`, *optional*, defaults to `True`): Whether to ablate a random dictionary for each SAE too, and
            the neurons: the dimensions of the hidden states, each set to its mean.
        seed (`int`, *optional*, defaults to 0): Seed of the samples.
        resamples (`int`, *optional*, defaults to 1000): Number of bootstrap resamples of the intervals.
        show (`bool`, *optional*, defaults to `True`): Whether to show progress bars in the main process.

    Returns:
        [`Report`]: `fraction`, `size`, `pairs` and `no_effect` for each subject and width; `fraction`, `size` and
        `pairs` of single latents in `latents`.

    Raises:
        `ValueError`: if the model is no causal language model, windows have fewer than `positions` tokens, or an SAE
            does not have these widths.
    """
    check_at_least(1, tokens=tokens, per_group=per_group, positions=positions)
    if not data.has_loss or is_masked_lm(data.model):
        raise ValueError(
            f"Ablations are followed to the next tokens' logits, and {type(data.model).__name__} predicts no next "
            "token. Use a causal language model."
        )
    places = _places(data, tokens, positions, seed)
    logits = positions * data.model.get_output_embeddings().weight.shape[0]
    show = show and processes()[0] == 0
    rows, latents = {}, {}
    for name, (sae, chosen) in with_baselines(saes, data, widths, baselines, seed).items():
        ablations = _Ablations(sae, chosen, per_group, seed)
        rank, world = processes()
        own = range(rank, len(places), world)
        for number in progress(own, desc=f"ablating {name}", disable=not show, leave=False):
            ablations.add(number, data, *places[number], positions)
        table = ablations.table(len(places))
        rows[name], latents[name] = _rows(table, chosen, logits, resamples, seed), _by_latent(table, logits)
    about = {
        "hookpoint": data.hookpoint,
        "selection": "mask",
        "tokens": len(places),
        "positions": positions,
        "per_group": per_group,
        "seed": seed,
    }
    title = f"ablation sparsity: share of the next {positions} tokens' logits that a latent acts on"
    intervals = "Intervals: 95%, bootstrap over the drawn tokens."
    records = as_records(rows)
    return Report("ablation", title, records, _COLUMNS, about, intervals=intervals, latents=latents, grouped=True)


def _places(data: HeldOut, tokens: int, positions: int, seed: int) -> list[tuple[Tensor, int]]:
    """Sample tokens; return for each the window up to its last position, and the token's place in it."""
    starts = []
    for number, batch in enumerate(data.batches):
        length = batch.input_ids.shape[1]
        if length < positions:
            continue
        whole = batch.attention_mask.bool().unfold(1, positions, 1).all(2)  # [B, S - T + 1]
        whole_kept = (whole & batch.keep[:, : length - positions + 1]).nonzero()
        starts += [(number, *place) for place in whole_kept.tolist()]
    if not starts:
        raise ValueError(
            f"No window has {positions} tokens after one that is kept. Give longer windows (`context_length`), or "
            "fewer `positions`."
        )
    order = torch.randperm(len(starts), generator=torch.Generator().manual_seed(seed))[:tokens]
    sampled = [starts[index] for index in order.tolist()]
    return [(data.batches[number].input_ids[row, : at + positions], at) for number, row, at in sampled]


class _Ablations:
    """Ablations of one SAE, a row each: token, group, latent, number that fire in the group, n, ||Delta||_2."""

    def __init__(self, sae: SAEModel, widths: Sequence[int], per_group: int, seed: int) -> None:
        self.sae, self.widths, self.per_group, self.seed = sae, widths, per_group, seed
        self.rows: list[Tensor] = []

    def add(self, token: int, data: HeldOut, window: Tensor, place: int, positions: int) -> None:
        """Ablate latents at one token and add their rows."""
        window, hook = window.to(data.device)[None], _Ablation(place)
        with hooked(data.model, [(data.hookpoint, hook)]):
            clean = _last_logits(data.model, window, positions)
            assert hook.state is not None, "the hookpoint was resolved before"
            group, latents, firing, values = self._drawn(token, self.sae.encode_pairs(hook.state.to(self.sae.W_enc)))
            if not len(values):
                return
            effects = []
            for removed in (values[:, None] * self.sae.W_dec[latents]).split(max(1, _LOGITS // clean.numel())):
                hook.removed = removed
                logits = _last_logits(data.model, window.expand(len(removed), -1), positions)
                effects.append(_effects(logits, clean))
        labels = torch.stack([torch.full_like(group, token), group, latents, firing], 1).double()
        self.rows.append(torch.cat([labels, torch.cat(effects)], 1).cpu())

    def _drawn(self, token: int, pairs: LatentPairs) -> tuple[Tensor, ...]:
        """Sample latents that fire in each group: group, latent, number that fire in the group, value."""
        fires = pairs.values > 0
        cols, values = pairs.cols[fires], pairs.values[fires]
        group = torch.bucketize(cols, torch.tensor(self.widths, device=cols.device), right=True)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + token)
        chosen, firing = [], []
        for number in range(len(self.widths)):
            inside = (group == number).nonzero().flatten()
            order = torch.randperm(len(inside), generator=generator)[: self.per_group]
            chosen.append(inside[order.to(inside.device)])
            firing.append(torch.full_like(chosen[-1], len(inside)))
        index = torch.cat(chosen)
        return group[index], cols[index], torch.cat(firing), values[index]

    def table(self, tokens: int) -> np.ndarray:
        """Return the ablations of all processes, in the order of their tokens."""
        filled = torch.zeros(tokens, self.per_group * len(self.widths), 7, dtype=torch.float64)
        for rows in self.rows:
            filled[int(rows[0, 0]), : len(rows)] = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        reduce_sum(filled)
        return filled[filled[..., 6] > 0].numpy()


class _Ablation:
    """A hook that records the hidden state at one position in the first pass and subtracts `removed` in later ones."""

    def __init__(self, place: int) -> None:
        self.place = place
        self.state: Tensor | None = None
        self.removed: Tensor | None = None

    def __call__(self, hookpoint: str, value: Any) -> Tensor | None:
        states = first_tensor(value)
        if states is None or states.ndim != 3:
            raise ValueError(f"Hookpoint '{hookpoint}' does not carry hidden states [batch, sequence, width].")
        if self.removed is None:
            self.state = states[:, self.place].float()
            return None
        states = states.clone()  # the same tensor may go on elsewhere as the residual stream
        states[:, self.place] = (states[:, self.place].float() - self.removed).to(states)
        return states


def _last_logits(model: torch.nn.Module, ids: Tensor, positions: int) -> Tensor:
    """Return the logits of the last positions, `(A, T, V)` in float32."""
    parameters = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
    if "logits_to_keep" in parameters:
        options["logits_to_keep"] = positions
    return model(input_ids=ids, **options).logits[:, -positions:].float()


def _effects(ablated: Tensor, clean: Tensor) -> Tensor:
    """Compute n and ||Delta||_2 of each ablation, `(A, 2)` in float64; both are 0 where only rounding changes."""
    delta = ablated - clean
    rounding = _ROUNDING * torch.finfo(clean.dtype).eps * clean.abs().max()
    delta = (delta - delta.median(-1, keepdim=True).values).flatten(1).double()
    l1, l2, changes = delta.abs().sum(1), delta.norm(dim=1), delta.abs().amax(1) > rounding
    return torch.stack([(l1 / torch.where(changes, l2, torch.inf)) ** 2, l2 * changes], 1)


def _rows(table: np.ndarray, widths: Sequence[int], logits: int, resamples: int, seed: int) -> list[dict[str, Any]]:
    """Return a row for each width, from the groups below it."""
    firing, sums = _by_token(table, len(widths))
    if not len(firing):
        raise ValueError("Nothing fires on the sampled tokens, so nothing can be ablated. Sample more `tokens`.")
    again = resampled_rows(len(firing), resamples, np.random.default_rng(seed))
    rows = []
    for number, width in enumerate(widths, start=1):
        inside = table[table[:, 1] < number]
        weights, values = firing[:, :number].sum(1), sums[:, :number].sum(1)
        fraction, size, interval = 0.0, 0.0, [0.0, 0.0]
        if weights.sum():
            fraction, size = values.sum(0) / weights.sum()
            interval = ratio_interval(values[:, 0], weights, again)
        rows.append(
            {
                "width": width,
                "fraction": float(fraction / logits),
                "fraction_interval": [float(bound / logits) for bound in interval],
                "size": float(size),
                "pairs": len(inside),
                "no_effect": int((inside[:, 4] == 0).sum()),
            }
        )
    return rows


def _by_token(table: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the latents that fire per token and group, `(N, G)`, and estimates of the sums over them, `(N, G, 2)`.

    Ablations that changed nothing are left out of the means: they are neither sparse nor dense.
    """
    tokens, number = np.unique(table[:, 0], return_inverse=True)
    firing, sums = np.zeros((len(tokens), groups)), np.zeros((len(tokens), groups, 2))
    for token in range(len(tokens)):
        for group in range(groups):
            ablations = table[(number == token) & (table[:, 1] == group)]
            acting = ablations[ablations[:, 4] > 0]
            if len(acting):
                firing[token, group] = ablations[0, 3] * len(acting) / len(ablations)
                sums[token, group] = firing[token, group] * acting[:, 4:6].mean(0)
    return firing, sums


def _by_latent(table: np.ndarray, logits: int) -> dict[int, dict[str, Any]]:
    by_latent = {}
    for latent in np.unique(table[:, 2]).astype(int).tolist():
        acting = table[(table[:, 2] == latent) & (table[:, 4] > 0)]
        if len(acting):
            n, size = acting[:, 4:6].mean(0)
            by_latent[latent] = {"fraction": float(n / logits), "size": float(size), "pairs": len(acting)}
    return by_latent
