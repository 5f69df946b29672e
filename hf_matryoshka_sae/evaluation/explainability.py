"""How well patterns of tokens explain latents, at each width, beside a random dictionary and the model's neurons.

Latents are drawn from each group that a width adds, and a width's score is the mean over its latents, estimated by
groups: sum over groups of (latents in the group that fire) * (mean of those drawn) / (latents that fire). Intervals
span the 2.5th to the 97.5th percentile of bootstrap resamples of the drawn latents, within groups.

Explained are latents that fire at least `least` times in the text that examples come from; what fires less cannot be
explained by examples, and its share is reported.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..models import SAEModel, TopKSAE, TopKSAEConfig
from .baselines import random_dictionary
from .data import HeldOut
from .distributed import processes
from .firing import FiringSums
from .geometry import checked_widths
from .n2g import Explained, Explainer, firing_examples, score
from .report import save_figure


SCORES = ("f1", "precision", "recall", "correlation")
RANDOM, NEURONS = "random", "neurons"


@dataclass
class Explainability:
    """Scores of several dictionaries.

    Args:
        rows (`dict[str, list[dict]]`): By name, for each width: `width`, `latents` (drawn), `explainable` (share of
            its latents that fire often enough), each of `SCORES`, and `f1_interval`.
        latents (`dict[str, list[Explained]]`): The drawn latents of each.
        about (`dict`): Of the run: tokens, examples, seed.
    """

    rows: dict[str, list[dict[str, Any]]]
    latents: dict[str, list[Explained]]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {
            **self.about,
            "saes": self.rows,
            "latents": {name: [vars(one) for one in found] for name, found in self.latents.items()},
        }

    def __str__(self) -> str:
        lines = ["N2G: patterns of tokens against firing on other text"]
        head = f"{'width':>8} {'drawn':>6} {'explainable':>12} {'F1':>7} {'95% interval':>15}"
        head += f" {'precision':>10} {'recall':>7} {'corr.':>7}"
        for name, rows in self.rows.items():
            lines += [f"  {name}", f"  {head}"]
            for row in rows:
                low, high = row["f1_interval"]
                lines.append(
                    f"  {row['width']:>8d} {row['latents']:>6d} {row['explainable']:>12.1%} {row['f1']:>7.3f} "
                    f"{f'{low:.3f} {high:.3f}':>15} {row['precision']:>10.3f} {row['recall']:>7.3f} "
                    f"{row['correlation']:>7.3f}"
                )
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw F1 against width, with intervals, to a PNG."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axis = figure.subplots()
        for name, rows in self.rows.items():
            if name == NEURONS:  # of one width
                axis.axhline(rows[-1]["f1"], color="gray", linestyle=":", label=NEURONS)
                continue
            widths, middle = [row["width"] for row in rows], [row["f1"] for row in rows]
            below = [max(0.0, row["f1"] - row["f1_interval"][0]) for row in rows]
            above = [max(0.0, row["f1_interval"][1] - row["f1"]) for row in rows]
            axis.errorbar(widths, middle, yerr=[below, above], marker="o", markersize=4, capsize=3, label=name)
        axis.set(xlabel="width (latents)", ylabel="F1 of N2G patterns (mean over latents)", xscale="log", ylim=(0, 1))
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
        save_figure(figure, Path(path))


def explainability(
    saes: Mapping[str, SAEModel],
    examples: HeldOut,
    test: HeldOut,
    widths: Sequence[int] | None = None,
    per_group: int = 16,
    examples_per_latent: int = 16,
    substitutes: int = 5,
    least: int = 10,
    baselines: bool = True,
    seed: int = 0,
    resamples: int = 1000,
    show: bool = True,
) -> Explainability:
    """Explain latents by patterns and test the patterns on other text.

    Args:
        saes (`dict[str, SAEModel]`): By name; of one hookpoint.
        examples ([`HeldOut`]): Text that examples come from.
        test ([`HeldOut`]): Other text, that patterns are tested on; of the same model and hookpoint.
        widths (`Sequence[int]`, *optional*): By default each SAE's prefix widths.
        per_group (`int`, *optional*, defaults to 16): Latents drawn from each group that a width adds.
        examples_per_latent (`int`, *optional*, defaults to 16), substitutes (`int`, *optional*, defaults to 5): See
            [`Explainer`].
        least (`int`, *optional*, defaults to 10): How often a latent has to fire among the examples.
        baselines (`bool`, *optional*, defaults to `True`): Also explain a random dictionary for each SAE, and the
            neurons: the dimensions of the hidden states, the strongest of each token.
        seed (`int`, *optional*, defaults to 0): Of what is drawn.
        resamples (`int`, *optional*, defaults to 1000): Of the intervals.
        show (`bool`, *optional*, defaults to `True`): Show progress bars in the main process.

    Returns:
        [`Explainability`].

    Raises:
        `ValueError`: if there is no SAE, widths it does not have, or nothing fires often enough.
    """
    if not saes:
        raise ValueError("Name at least one SAE to explain.")
    if per_group < 1 or least < 1:
        raise ValueError(f"`per_group` and `least` must be at least 1, got {per_group} and {least}.")
    subjects: dict[str, tuple[SAEModel, list[int]]] = {}
    for name, sae in saes.items():
        chosen = checked_widths(widths, sae)
        subjects[name] = sae.eval(), chosen
        if baselines:
            subjects[f"{RANDOM} ({name})"] = random_dictionary(sae, examples, chosen, seed=seed), chosen
    if baselines:
        first = next(iter(saes.values()))
        neurons = neuron_dictionary(examples, k=max(1, round(mean_l0(first, examples))))
        subjects[NEURONS] = neurons, [neurons.config.num_latents]
    rows, found = {}, {}
    for name, (sae, chosen) in subjects.items():
        counts = _counts(sae, examples)
        drawn = _drawn(counts, chosen, per_group, least, seed)
        if not any(drawn):
            raise ValueError(
                f"No latent of `{name}` fires on at least {least} of the {examples.tokens} tokens that examples come "
                "from. Give more text, or a smaller `least`."
            )
        latents = [latent for group in drawn for latent in group]
        explained = _explain(name, sae, latents, examples, test, examples_per_latent, substitutes, seed, show)
        found[name] = explained
        rows[name] = _rows(explained, drawn, counts, chosen, least, resamples, seed)
    about = {
        "hookpoint": test.hookpoint,
        "example_tokens": examples.tokens,
        "test_tokens": test.tokens,
        "per_group": per_group,
        "examples_per_latent": examples_per_latent,
        "substitutes": substitutes,
        "least": least,
        "seed": seed,
    }
    return Explainability(rows, found, about)


def _explain(
    name: str,
    sae: SAEModel,
    latents: list[int],
    examples: HeldOut,
    test: HeldOut,
    count: int,
    substitutes: int,
    seed: int,
    show: bool,
) -> list[Explained]:
    from_text, on_text = (firing_examples(sae, data, latents, show) for data in (examples, test))
    explainer = Explainer(sae, examples, count, substitutes, seed)
    bar = tqdm(latents, desc=f"explaining {name}", disable=not show or processes()[0] != 0, leave=False)
    return [score(one, explainer.explain(one, from_text), on_text, count) for one in bar]


@torch.no_grad()
def _counts(sae: SAEModel, data: HeldOut) -> np.ndarray:
    """On how many tokens each latent fires, `(F,)`; every process reads all of the text."""
    sums = FiringSums(sae.config.num_latents)
    for batch in data.batches:
        sums.add(sae.encode_pairs(data.states(batch.to(data.device)).to(sae.W_enc)))
    return sums.fired.cpu().numpy()


def mean_l0(sae: SAEModel, data: HeldOut) -> float:
    """How many latents fire per token; every process reads all of the text."""
    return float(_counts(sae, data).sum() / data.tokens)


def _drawn(counts: np.ndarray, widths: list[int], per_group: int, least: int, seed: int) -> list[list[int]]:
    """Latents of each group between two widths that fire often enough, some of them."""
    generator = np.random.default_rng(seed)
    groups = []
    for start, stop in zip([0, *widths[:-1]], widths, strict=True):
        alive = np.flatnonzero(counts[start:stop] >= least) + start
        groups.append(sorted(generator.permutation(alive)[:per_group].tolist()))
    return groups


def _rows(
    explained: list[Explained],
    drawn: list[list[int]],
    counts: np.ndarray,
    widths: list[int],
    least: int,
    resamples: int,
    seed: int,
) -> list[dict[str, Any]]:
    """A row for each width, from the groups below it."""
    table = {one.latent: [getattr(one, key) for key in SCORES] for one in explained}
    alive = [int((counts[start:stop] >= least).sum()) for start, stop in zip([0, *widths[:-1]], widths, strict=True)]
    values = [np.array([table[latent] for latent in group]).reshape(-1, len(SCORES)) for group in drawn]
    generator = np.random.default_rng(seed)
    means = [group.mean(0) if len(group) else np.zeros(len(SCORES)) for group in values]
    samples = [_resampled(group[:, 0], resamples, generator) for group in values]
    rows = []
    for number, width in enumerate(widths, start=1):
        weights = np.array(alive[:number], dtype=float)
        if not weights.sum():
            scores, interval = np.zeros(len(SCORES)), [0.0, 0.0]
        else:
            weights /= weights.sum()
            scores = sum(weight * mean for weight, mean in zip(weights, means, strict=False))
            drawn_again = sum(weight * sample for weight, sample in zip(weights, samples, strict=False))
            interval = np.quantile(drawn_again, [0.025, 0.975]).tolist()
        rows.append(
            {
                "width": width,
                "latents": sum(map(len, drawn[:number])),
                "explainable": sum(alive[:number]) / width,
                **dict(zip(SCORES, map(float, scores), strict=True)),
                "f1_interval": interval,
            }
        )
    return rows


def _resampled(values: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """The mean of each resample, `(resamples,)`."""
    if not len(values):
        return np.zeros(resamples)
    return values[generator.integers(len(values), size=(resamples, len(values)))].mean(1)


@torch.no_grad()
def neuron_dictionary(data: HeldOut, k: int) -> TopKSAE:
    """The dimensions of the hidden states as a dictionary: of each token the k that differ most from their mean.

    Latent d is dimension d above its mean, latent D + d the same below it; decoder rows are unit vectors.

    Args:
        data ([`HeldOut`]): Whose hidden states.
        k (`int`): Dimensions per token; at most D.
    """
    total, count = None, 0
    for batch in data.batches:
        states = data.states(batch.to(data.device)).double()
        total = states.sum(0) if total is None else total + states.sum(0)
        count += len(states)
    if total is None:
        raise ValueError("There are no hidden states to take neurons from.")
    d_in = len(total)
    config = TopKSAEConfig(d_in=d_in, num_latents=2 * d_in, k=min(k, d_in), hookpoint=data.hookpoint)
    sae = TopKSAE(config).eval()
    unit = torch.eye(d_in)
    sae.W_enc.copy_(torch.cat([unit, -unit]))
    sae.W_dec.copy_(torch.cat([unit, -unit]))
    sae.b_enc.zero_()
    sae.b_dec.copy_((total / count).float())
    return sae.to(data.device)
