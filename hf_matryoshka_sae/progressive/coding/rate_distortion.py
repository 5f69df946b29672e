"""Rate against distortion: a dictionary's progressive code beside principal components with a uniform quantiser.

The natural baseline of a code of hidden states is a linear transform code: principal components, all quantised with
one step (which is optimal at high rate: reverse water-filling), and an ideal entropy code for each component's bins,
whose probabilities are counted on other tokens. Distortion is FVU, and the language model's loss where there is one.

Shapes: N tokens, D `d_in`, S steps.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...common.report import Column, Report
from ...evaluation.baselines import PrincipalComponents
from ...evaluation.data import HasActivations, HeldOut
from ...evaluation.fidelity import evaluate_fidelity
from ...evaluation.subjects import Dictionary
from ...models import SAEModel
from ...models.sparse_ops import LatentPairs
from ..rate import Moments, RateSums
from .steps import read_back


COLUMNS = (
    Column("bits", "bits", "ideal bits per token.", ".1f"),
    Column("fvu", "FVU", "of what is decoded.", better="lower", limits=(0, 1.2)),
    Column("recaptured", "recaptured", "share of the language model's loss, zero-ablated.", better="higher"),
)


class QuantisedComponents:
    """Principal components with a uniform quantiser, at several steps, as a subject of an evaluation.

    Args:
        components ([`PrincipalComponents`]): Fitted on other tokens than are coded.
        steps (`Sequence[float]`): Widths of a bin, in the units of the hidden states.
        sample (`Tensor` of shape `(N, D)`): Hidden states on which bins are counted, not those that are coded.
    """

    def __init__(self, components: PrincipalComponents, steps: Sequence[float], sample: Tensor) -> None:
        self.components, self.steps = components, list(steps)
        self.widths = list(range(1, len(self.steps) + 1))  # numbers of the steps
        self._bits = [_BinCode.of(self._scores(sample), step) for step in self.steps]

    def _scores(self, x: Tensor) -> Tensor:
        return (x.double() - self.components.mean) @ self.components.components.T

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Return what is decoded of hidden states `(N, D)` at each step, `(S, N, D)`."""
        scores = self._scores(x.cpu())
        rows = [
            (scores / step).round() * step @ self.components.components + self.components.mean for step in self.steps
        ]
        return torch.stack(rows).to(x)

    @torch.no_grad()
    def bits(self, x: Tensor) -> list[float]:
        """Return the ideal bits per token of hidden states `(N, D)` at each step."""
        scores = self._scores(x.cpu())
        return [code.bits(scores) for code in self._bits]


class _BinCode:
    """Counts of each component's bins on a sample, as probabilities; a bin that was not seen costs an escape."""

    def __init__(self, counts: list[dict[int, int]], total: int, step: float) -> None:
        self.counts, self.total, self.step = counts, total, step

    @classmethod
    def of(cls, scores: Tensor, step: float) -> "_BinCode":
        numbers = (scores / step).round().long()
        counts = []
        for column in numbers.T:
            values, members = column.unique(return_counts=True)
            counts.append(dict(zip(values.tolist(), members.tolist(), strict=True)))
        return cls(counts, len(scores), step)

    def bits(self, scores: Tensor) -> float:
        total = 0.0
        for counts, column in zip(self.counts, (scores / self.step).round().long().T, strict=True):
            values, members = column.unique(return_counts=True)
            kinds = len(counts) + 1
            # Each bin counts half an occurrence more; one that was not seen shares the escape's with its neighbours.
            chance = [(counts.get(value, 0) + 0.5) / (self.total + 0.5 * kinds) for value in values.tolist()]
            chance = torch.tensor(chance, dtype=torch.float64)
            new = torch.tensor([value not in counts for value in values.tolist()])
            chance = torch.where(new, chance / (1 + values.abs().double()), chance)
            total += float(-(members * chance.log2()).sum())
        return total / len(scores)


class CodedDictionary(Dictionary):
    """An SAE whose latents are read from their bins."""

    def __init__(self, sae: SAEModel, widths: Sequence[int], statistics: Moments, step: float) -> None:
        super().__init__(sae, widths)
        self._sums = RateSums(statistics, self.widths, step)

    def encode(self, x: Tensor) -> list[LatentPairs]:
        """Return the latents as decoded."""
        (pairs,) = super().encode(x)
        pairs = pairs.keep(pairs.values > 0)
        return [read_back(pairs, self._sums.model, self._sums.step)]

    def rates(self, states: Iterable[Tensor]) -> list[float]:
        """Return the ideal bits per token at each width."""
        for x in states:
            self._sums.add(super().encode(x)[0])
        return self._sums.bits_per_token()["bits"].tolist()


def rate_distortion(
    data: HeldOut,
    fit: HasActivations | Iterable[Tensor],
    sae: SAEModel,
    statistics: Moments,
    steps: Sequence[float],
    widths: Sequence[int] | None = None,
    component_steps: Sequence[float] = (0.25, 0.5, 1.0, 2.0, 4.0),
    language_model: bool = True,
    show: bool = True,
) -> Report:
    """Measure rate and distortion of a progressive code, beside principal components with a quantiser.

    Args:
        data ([`HeldOut`]): Tokens that are coded; one process.
        fit ([`HasActivations`] or iterable of `Tensor`): Other hidden states, which components and their bins are of.
        sae ([`SAEModel`]): The SAE.
        statistics (any object with `tokens`, `frequency`, `mean`, `mean_square`): Statistics of its latents, on other
            tokens than are coded.
        steps (`Sequence[float]`): Steps of the code, in the units of the latents' values.
        widths (`Sequence[int]`, *optional*): Widths at which the code is cut; by default the SAE's prefix widths.
        component_steps (`Sequence[float]`, *optional*): Steps of the components, as shares of the standard deviation
            of the component in the middle of the spectrum.
        language_model (`bool`, *optional*, defaults to `True`): Whether to measure losses where there are any.
        show (`bool`, *optional*, defaults to `True`): Whether to show progress bars.

    Returns:
        [`Report`]: rows by subject (the code at each step; the components) and width (number of latents; `None`).
    """
    widths = list(widths or sae.prefix_widths)
    sample = torch.cat([x.cpu() for x in (fit.activations() if hasattr(fit, "activations") else fit)])
    components = PrincipalComponents.fit([sample], [1])
    unit = float(components.variances[len(components.variances) // 2].sqrt())
    linear = QuantisedComponents(components, [share * unit for share in component_steps], sample)
    subjects: dict[str, Any] = {"principal components": linear}
    subjects |= {f"code, step {step:.3g}": CodedDictionary(sae, widths, statistics, step) for step in steps}
    result = evaluate_fidelity(data, subjects, language_model, similarity_tokens=0, show=show)
    coded = torch.cat([x.cpu() for x in data.activations()])
    records = []
    for name, subject in subjects.items():
        components_alone = subject is linear
        rates = linear.bits(coded) if components_alone else subject.rates(data.activations())
        for row, bits in zip(result["subjects"][name], rates, strict=True):
            records.append(
                {
                    "subject": name,
                    "kind": "linear code" if components_alone else "dictionary",
                    "width": None if components_alone else row["width"],
                    "bits": bits,
                    "fvu": row["fvu"],
                    "recaptured": row["recaptured_zero"],
                }
            )
    about = {"hookpoint": data.hookpoint, "tokens": result["tokens"], "steps": list(steps)}
    return RateDistortion("rate_distortion", "Rate and distortion, ideal entropy codes", records, COLUMNS, about)


class RateDistortion(Report):
    """A [`Report`] whose plot has distortion against bits."""

    def figure(self) -> Any:
        """Draw FVU, and recaptured loss where there is one, against bits per token."""
        from matplotlib.figure import Figure

        drawn = [c for c in self.columns[1:] if any(c.value(record) is not None for record in self.records)]
        figure = Figure(figsize=(5.2 * len(drawn), 4.2), layout="constrained")
        for axis, column in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
            for number, (name, rows) in enumerate(self.subjects().items()):
                points = sorted((row["bits"], column.value(row)) for row in rows)
                style = "s--" if rows[0]["kind"] == "linear code" else "o-"
                axis.plot(*zip(*points, strict=True), style, color=f"C{number}", label=name, markersize=4)
            axis.set(xlabel="bits per token", ylabel=f"{column.title} ({column.better} is better)")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
        return figure
