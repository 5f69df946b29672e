"""How well patterns of tokens explain latents, at each width, beside a random dictionary and the model's neurons.

Latents are drawn and a width's scores estimated as in `drawn_latents.py`.

Explained are latents that fire at least `least` times in the text that examples come from; what fires less cannot be
explained by examples, and its share is reported.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ...common.distributed import gathered, processes
from ...common.figures import draw_widths, save_figure
from ...evaluation.data import HeldOut
from ...models import SAEModel
from ..drawn_latents import NEURONS, DrawnLatents, firing_counts, with_baselines
from .n2g import Explained, Explainer, firing_examples, score


SCORES = ("f1", "precision", "recall", "correlation")


@dataclass
class Explainability:
    """Scores of several dictionaries.

    Args:
        rows (`dict[str, list[dict]]`): By name, for each width: `width`, `latents` (drawn), `explainable` (share of
            its latents that fire often enough), and each of `SCORES`, with an `_interval`.
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
                interval = row["f1_interval"]
                told = "-" if interval is None else f"{interval[0]:.3f} {interval[1]:.3f}"
                lines.append(
                    f"  {row['width']:>8d} {row['latents']:>6d} {row['explainable']:>12.1%} {row['f1']:>7.3f} "
                    f"{told:>15} {row['precision']:>10.3f} {row['recall']:>7.3f} "
                    f"{row['correlation']:>7.3f}"
                )
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw F1 against width, with intervals, to a PNG."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axis = figure.subplots()
        draw_widths(axis, self.rows, "f1", flat=(NEURONS,))
        axis.set(ylabel="F1 of N2G patterns (mean over latents)", ylim=(0, 1))
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
        saes (`dict[str, SAEModel]`): By name; of one hookpoint. Several processes share the latents.
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
    if per_group < 1 or least < 1:
        raise ValueError(f"`per_group` and `least` must be at least 1, got {per_group} and {least}.")
    rows, found = {}, {}
    for name, (sae, chosen) in with_baselines(saes, examples, widths, baselines, seed).items():
        drawn = DrawnLatents.of(firing_counts(sae, examples) >= least, chosen, per_group, seed)
        if not drawn.latents:
            raise ValueError(
                f"No latent of `{name}` fires on at least {least} of the {examples.tokens} tokens that examples come "
                "from. Give more text, or a smaller `least`."
            )
        explained = _explain(name, sae, drawn.latents, examples, test, examples_per_latent, substitutes, seed, show)
        found[name] = explained
        values = {one.latent: [getattr(one, key) for key in SCORES] for one in explained}
        rows[name] = drawn.rows(values, SCORES, resamples, seed)
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
    rank, world = processes()
    bar = tqdm(latents[rank::world], desc=f"explaining {name}", disable=not show or rank != 0, leave=False)
    found = gathered([score(one, explainer.explain(one, from_text), on_text, count) for one in bar])
    return sorted(found, key=lambda one: one.latent)
