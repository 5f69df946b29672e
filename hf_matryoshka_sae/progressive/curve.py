"""Progressive curves: reconstruction, language-model loss, similarity, and the rate in latents and bits, by width."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common.distributed import gathered
from ..common.figures import figure_html, save_figure
from ..common.files import write_json
from ..common.report import Report
from ..evaluation import Dictionary, HeldOut, activation_batches, evaluate_fidelity
from ..evaluation.data import HasActivations
from ..evaluation.report import report_of
from ..models import SAEModel
from ..models.sparse_ops import LatentPairs
from .coding.steps import SAMPLE, choose_step, read_back
from .rate import RateSums
from .statistics import LatentStatistics, latent_statistics


if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class ProgressiveCurve:
    """The metrics of an SAE at each of many widths.

    Args:
        rows (`list[dict]`): One for each width; see [`progressive_curve`] for the keys.
        about (`dict`): `tokens`, `selection`, `hookpoint`, `step`, and the losses of the clean and the ablated model.
    """

    rows: list[dict[str, Any]]
    about: dict[str, Any]

    def column(self, key: str) -> list[float | None]:
        """Return one metric at every width."""
        return [row.get(key) for row in self.rows]

    def __str__(self) -> str:
        return str(self._report)

    @property
    def _report(self) -> Report:
        return report_of({**self.about, "saes": {"progressive curve": self.rows}})

    def _repr_html_(self) -> str:
        """What a notebook shows: table and plot."""
        return self._report.table_html() + figure_html(curves_figure({"": self}))

    def save(self, folder: str | Path, name: str = "progressive_curve") -> None:
        """Write `<name>.json` and `<name>.png` into a folder."""
        write_json(Path(folder) / f"{name}.json", {**self.about, "rows": self.rows})
        self.plot(Path(folder) / f"{name}.png")

    def plot(self, path: str | Path) -> None:
        """Draw distortion against width and against bits per token to a PNG."""
        plot_curves({"": self}, path)


def plot_curves(curves: dict[str, ProgressiveCurve], path: str | Path) -> None:
    """Write what [`curves_figure`] draws to a PNG."""
    save_figure(curves_figure(curves), Path(path))


def curves_figure(curves: dict[str, ProgressiveCurve]) -> "Figure":
    """Draw several curves into one picture: FVU against width and bits, recaptured loss and RSA against width."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    panels = [
        ("width", "fvu", "width (latents)", "fraction of variance unexplained"),
        ("bits", "fvu_coded", "bits per token", "FVU of the coded latents"),
        ("width", "recaptured_zero", "width (latents)", "recaptured loss (zero ablation)"),
        ("width", "rsa", "width (latents)", "RSA (Spearman)"),
    ]
    lines = {panel: {name: _points(curve, panel[0], panel[1]) for name, curve in curves.items()} for panel in panels}
    drawn = [panel for panel in panels if any(lines[panel].values())]  # such as losses, of a model that has none
    across = min(2, max(1, len(drawn)))
    down = max(1, -(-len(drawn) // across))
    figure = Figure(figsize=(5.5 * across, 4 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for axis, panel in zip(axes, drawn, strict=False):
        for name, points in lines[panel].items():
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3.5, label=name or None)
        axis.set(xlabel=panel[2], ylabel=panel[3], xscale="log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # a curve may span less than a power of ten
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3, which="both")
        if panel[1].startswith("fvu"):
            axis.axhline(1, color="black", linewidth=0.8, linestyle=":", label="the mean")
            axis.set_ylim(0, min(1.2, axis.get_ylim()[1]))
        else:
            axis.set_ylim(max(-0.2, axis.get_ylim()[0]), 1)
    if drawn:
        axes[0].legend(fontsize=8)
    for axis in axes[len(drawn) :]:
        axis.remove()
    return figure


def _points(curve: ProgressiveCurve, x_key: str, y_key: str) -> list[tuple[float, float]]:
    points = [(row.get(x_key), _number(row.get(y_key))) for row in curve.rows]
    return [point for point in points if None not in point]


def _number(value: Any) -> float | None:
    return value["spearman"] if isinstance(value, dict) else value


def default_widths(sae: SAEModel, count: int = 16) -> list[int]:
    """Return prefix widths, and `count` widths from 1/64 of the dictionary to all of it on a logarithmic scale."""
    num_latents = sae.config.num_latents
    ratio = min(64, num_latents)
    spread = {max(1, round(num_latents / ratio ** (1 - i / (count - 1)))) for i in range(count)}
    return sorted(spread | set(sae.prefix_widths))


def progressive_curve(
    sae: SAEModel,
    data: HeldOut | HasActivations | Iterable[Tensor],
    widths: Sequence[int] | None = None,
    selection: str = "mask",
    statistics: LatentStatistics | None = None,
    step: float | None = None,
    rate: bool = True,
    loss_widths: Sequence[int] | None = None,
    similarity_tokens: int = 500,
    seed: int = 0,
    show: bool = True,
) -> ProgressiveCurve:
    """Measure an SAE at every width of a list. All widths are reconstructed in one pass over the data.

    Args:
        sae ([`SAEModel`]): An SAE trained for prefixes, or sorted with [`sort_latents`].
        data ([`HeldOut`], or an iterable of `(n, D)` tensors that can be read again): Losses need a [`HeldOut`].
        widths (`Sequence[int]`, *optional*): Any widths; by default [`default_widths`].
        selection (`str`, *optional*, defaults to `"mask"`): See [`Dictionary`]. `"restrict"` encodes a TopK SAE anew
            at each width.
        statistics ([`LatentStatistics`], *optional*): Statistics that encoder and decoder of the bit stream share; by
            default measured on `data` in another pass.
        step (`float`, *optional*): Quantiser step of the bit stream; by default [`choose_step`].
        rate (`bool`, *optional*, defaults to `True`): Measure bits per token, and the distortion of the coded latents.
            An SAE that normalises each hidden state by itself has none: its latents alone decode to nothing.
        loss_widths (`Sequence[int]`, *optional*): Widths at which the language model's loss is measured, each by a
            pass of the model; by default all of `widths`.
        similarity_tokens (`int`, *optional*, defaults to 500): Tokens of RSA (0: leave it out).
        seed (`int`, *optional*, defaults to 0): Seed of the choice of these tokens.
        show (`bool`, *optional*, defaults to `True`): Show progress bars.

    Returns:
        [`ProgressiveCurve`], whose rows hold `width`, every key of [`evaluate_fidelity`] and, with `rate`, `bits`,
        `index_bits`, `value_bits` (per token, ideal code length under the statistics' model) and `fvu_coded` (the FVU
        with values as the bit stream holds them).

    Raises:
        `ValueError`: for widths the SAE does not have, or data that cannot be evaluated.
    """
    widths = default_widths(sae) if widths is None else list(widths)
    plain = Dictionary(sae, widths, selection)
    subjects: dict[str, Dictionary] = {"sae": plain}
    sums, coded = None, None
    if rate and sae.config.input_normalization is None:
        if not isinstance(data, HeldOut | Tensor) and iter(activation_batches(data)) is activation_batches(data):
            data = list(data)
        statistics = statistics or latent_statistics(sae, data)
        statistics.check(sae)
        step = gathered([choose_step(sae, _some(data), statistics)])[0] if step is None else step
        sums = [RateSums(statistics, part, step) for part in plain.encodings]
        coded = subjects["coded"] = _Coded(plain, sums)
    result = evaluate_fidelity(
        data,
        subjects,
        similarity_tokens=similarity_tokens,
        seed=seed,
        show=show,
        loss_widths={"sae": plain.widths if loss_widths is None else list(loss_widths), "coded": []},
    )
    subject_rows = result.pop("subjects")
    rows = subject_rows["sae"]
    if sums is not None and coded is not None:
        parts = [one.bits_per_token() for one in sums]
        bits = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        for number, (row, other) in enumerate(zip(rows, subject_rows["coded"], strict=True)):
            row.update({key: bits[key][number].item() for key in ("bits", "index_bits", "value_bits")})
            row["fvu_coded"] = other["fvu"]
    hookpoint = data.hookpoint if isinstance(data, HeldOut) else sae.config.hookpoint or "activations"
    about = {"hookpoint": hookpoint, "selection": selection, "step": sums[0].step if sums else None}
    return ProgressiveCurve(rows, {**about, **result})


def _some(data: HeldOut | HasActivations | Iterable[Tensor]) -> Tensor:
    """Return the first hidden states of the data, as many as a step is tried on."""
    parts, count = [], 0
    for x in activation_batches(data):
        parts.append(x)
        count += len(x)
        if count >= SAMPLE:
            break
    return torch.cat(parts)


class _Coded(Dictionary):
    """A dictionary with the values of the bit stream, which are quantised."""

    def __init__(self, plain: Dictionary, sums: list[RateSums]) -> None:
        super().__init__(plain.sae, plain.widths, plain.selection)
        self.sums = sums

    def count(self, pairs: list[LatentPairs]) -> None:
        """Count the latents that fire in a batch, and their bits: of each encoding its own."""
        super().count(pairs)
        for sums, part in zip(self.sums, pairs, strict=True):
            sums.add(part)

    def decode(self, pairs: list[LatentPairs]) -> Tensor:
        """Return the reconstructions `(P, N, D)` from quantised latents."""
        fired = [part.keep(part.values > 0) for part in pairs]
        return super().decode([read_back(part, self.sums[0].model, self.sums[0].step) for part in fired])
