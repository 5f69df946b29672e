"""Fit scaling laws to points, test them on held-out points, and report them as tables and files."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...common.files import write_json, write_text
from ...common.report import markdown_table
from .laws import (
    JointScalingLaw,
    PowerLawWithFloor,
    ScalingLaw,
    fit_joint_scaling_law,
    fit_power_law_with_floor,
)
from .plots import plot_scaling
from .points import Point, frontier, write_points


ABOUT = (
    "loss: squared error on held-out text over the variance about its mean (FVU). L(F) = A F^-b + E at each k, L(C) = "
    "A C^-b + E over the points that no other one of the same k beats with as little compute, L(F, k) = exp(alpha + "
    "beta_k ln k + beta_n ln F + gamma ln k ln F) + exp(zeta + eta ln k) (Gao et al. 2024, arXiv 2406.04093); E and "
    "the second exponential are irreducible. Fitted by least squares of the log loss with a soft L1 loss; intervals: "
    "95%, percentiles of a bootstrap of points or of residuals. C: tokens x D x (2 F + 8 k) floating-point "
    "operations, the dictionary's own products; the language model's forward passes, which all SAEs share, are left "
    "out. Held out: points that no law here was fitted to; their errors are |predicted / measured - 1|."
)

_COLUMNS = (
    ("tokens", "tokens", ",d"),
    ("k", "k", "d"),
    ("F", "num_latents", "d"),
    ("FVU", "loss", ".4f"),
    ("C", "flops", ".3g"),
    ("L0", "l0", ".2f"),
    ("CE", "ce", ".4f"),
    ("recaptured", "recaptured", ".4f"),
    ("dead", "dead", ".2%"),
)


@dataclass
class BudgetFits:
    """The laws of one training budget.

    Args:
        tokens (`int`, *optional*): Number of training tokens.
        joint ([`JointScalingLaw`], *optional*): The law L(F, k).
        sizes (`dict[int, PowerLawWithFloor]`): The laws L(F), by k.
        held_out (`dict[str, float]`): Mean error on held-out points, by predictor: `joint`, `size` (L(F), at points
            whose k has a fit), and the baselines `plane` (a power law in F and k without irreducible term), `nearest`
            (the fitted point nearest in ln F and ln k) and `mean` (of the fitted log losses).
    """

    tokens: int | None
    joint: JointScalingLaw | None = None
    sizes: dict[int, PowerLawWithFloor] = field(default_factory=dict)
    held_out: dict[str, float] = field(default_factory=dict)


@dataclass
class ScalingReport:
    """All points and laws of a sweep; `str()` is the text of `report.md`.

    Args:
        points (`list[Point]`): All points, fitted and held out.
        budgets (`list[BudgetFits]`): Laws of each training budget, by tokens.
        compute (`dict[int, PowerLawWithFloor]`): The laws L(C), by k.
        notes (`list[str]`): Laws that could not be fitted, and why.
    """

    points: list[Point]
    budgets: list[BudgetFits]
    compute: dict[int, PowerLawWithFloor]
    notes: list[str]

    def save(self, folder: str | Path) -> None:
        """Write `sweep.json`, `sweep.csv`, `report.md` and `scaling.png` into a folder."""
        folder = Path(folder)
        write_points(self.points, folder / "sweep.csv")
        write_json(folder / "sweep.json", self.to_dict())
        plot_scaling(self, folder / "scaling.png")
        write_text(folder / "report.md", str(self))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return {
            "about": ABOUT,
            "budgets": [
                {
                    "tokens": fits.tokens,
                    "joint": fits.joint and fits.joint.to_dict(),
                    "sizes": {str(k): law.to_dict() for k, law in fits.sizes.items()},
                    "held_out": fits.held_out,
                }
                for fits in self.budgets
            ],
            "compute": {str(k): law.to_dict() for k, law in self.compute.items()},
            "notes": self.notes,
            "points": [asdict(point) for point in self.points],
        }

    def __str__(self) -> str:
        parts = [f"# Scaling laws of {len(self.points)} SAEs", "![the fits](scaling.png)", ABOUT]
        for fits in self.budgets:
            parts.append(f"## {_budget(fits.tokens)}")
            laws = {"L(F, k)": fits.joint} if fits.joint else {}
            parts.append(_law_table(laws | {f"L(F), k = {k}": law for k, law in fits.sizes.items()}))
            if fits.held_out:
                count = sum(point.held_out for point in self.points if point.tokens == fits.tokens)
                parts.append(_error_table(fits.held_out, count))
        if self.compute:
            parts += ["## Compute", _law_table({f"L(C), k = {k}": law for k, law in self.compute.items()})]
        if self.notes:
            parts += ["## Not fitted", "\n".join(f"- {note}" for note in self.notes)]
        return "\n\n".join([*parts, "## Points", self._point_table()]) + "\n"

    def _point_table(self) -> str:
        columns = [entry for entry in _COLUMNS if any(getattr(point, entry[1]) is not None for point in self.points)]
        laws = {fits.tokens: fits.joint for fits in self.budgets if fits.joint}
        rows = []
        for point in self.points:
            values = [(getattr(point, name), form) for _, name, form in columns]
            cells = ["" if value is None else f"{value:{form}}" for value, form in values]
            if laws:
                law = laws.get(point.tokens)
                cells.append(f"{law.predict(point.num_latents, point.k):.4f}" if law else "")
            rows.append([*cells, "yes" if point.held_out else ""])
        titles = [title for title, *_ in columns] + ["L(F, k)"] * bool(laws) + ["held out"]
        return markdown_table(titles, rows)


def fit_points(points: Sequence[Point], resamples: int = 200, seed: int = 0) -> ScalingReport:
    """Fit every law that the points allow to those that are not held out, and test it on those that are.

    Args:
        points (`Sequence[Point]`): Points, for example [`finished_points`] of a sweep.
        resamples (`int`, *optional*, defaults to 200): Number of bootstrap resamples.
        seed (`int`, *optional*, defaults to 0): Seed of the bootstrap.

    Raises:
        `ValueError`: if no law can be fitted.
    """
    notes: list[str] = []
    budgets, compute = [], {}
    for tokens in sorted({point.tokens for point in points}, key=lambda tokens: tokens or 0):
        of_budget = [point for point in points if point.tokens == tokens]
        fits = BudgetFits(tokens)
        fitted = [point for point in of_budget if not point.held_out]
        where = f"{_budget(tokens)}, L(F, k)"
        fits.joint = _tried(fit_joint_scaling_law, ("num_latents", "k"), fitted, resamples, seed, where, notes)
        for k in sorted({point.k for point in fitted}):
            where, at_k = f"{_budget(tokens)}, L(F) at k = {k}", [point for point in fitted if point.k == k]
            law = _tried(fit_power_law_with_floor, ("num_latents",), at_k, resamples, seed, where, notes)
            if law is not None:
                fits.sizes[k] = law
        fits.held_out = _held_out_errors(fits, fitted, [point for point in of_budget if point.held_out])
        budgets.append(fits)
    with_compute = [point for point in points if not point.held_out and point.flops is not None]
    for k in sorted({point.k for point in with_compute}):
        law = _tried(
            fit_power_law_with_floor, ("flops",), frontier(with_compute, k), resamples, seed, f"L(C) at k = {k}", notes
        )
        if law is not None:
            compute[k] = law
    if not compute and not any(fits.joint or fits.sizes for fits in budgets):
        raise ValueError("No law can be fitted. " + " ".join(notes))
    return ScalingReport(list(points), budgets, compute, notes)


def _tried(
    fit: Callable[..., ScalingLaw],
    columns: tuple[str, ...],
    points: Sequence[Point],
    resamples: int,
    seed: int,
    where: str,
    notes: list[str],
) -> Any:
    inputs = [[getattr(point, column) for point in points] for column in columns]
    try:
        return fit(*inputs, [point.loss for point in points], resamples=resamples, seed=seed)
    except ValueError as error:
        notes.append(f"{where}: {error}")
        return None


def _held_out_errors(fits: BudgetFits, fitted: Sequence[Point], tests: Sequence[Point]) -> dict[str, float]:
    if not tests or not fitted:
        return {}
    places, logs = _places(fitted), np.log([point.loss for point in fitted])
    unknown, measured = _places(tests), np.array([point.loss for point in tests])
    plane = np.linalg.lstsq(np.c_[np.ones(len(fitted)), places], logs, rcond=None)[0]
    distances = ((unknown[:, None] - places[None]) ** 2).sum(-1)
    predictions = {
        "plane": np.exp(np.c_[np.ones(len(tests)), unknown] @ plane),
        "nearest": np.exp(logs[distances.argmin(1)]),
        "mean": np.full(len(tests), math.exp(logs.mean())),
    }
    if fits.joint is not None:
        predictions["joint"] = fits.joint.predict([p.num_latents for p in tests], [p.k for p in tests])
    errors = {name: float(abs(values / measured - 1).mean()) for name, values in predictions.items()}
    known = [point for point in tests if point.k in fits.sizes]
    if known:
        ratios = [float(fits.sizes[point.k].predict(point.num_latents)) / point.loss - 1 for point in known]
        errors["size"] = float(np.abs(ratios).mean())
    return errors


def _places(points: Sequence[Point]) -> np.ndarray:
    return np.log([[point.num_latents, point.k] for point in points])


_PREDICTORS = {
    "joint": "L(F, k)",
    "size": "L(F) at the point's k",
    "plane": "baseline: power law in F and k, no irreducible term",
    "nearest": "baseline: the nearest fitted point",
    "mean": "baseline: the mean",
}


def _budget(tokens: int | None) -> str:
    return "All points" if tokens is None else f"{tokens:,} tokens"


def _error_table(errors: dict[str, float], count: int) -> str:
    rows = [[title, f"{errors[name]:.2%}"] for name, title in _PREDICTORS.items() if name in errors]
    return markdown_table([f"what predicts the {count} held-out points", "mean error"], rows)


def _law_table(laws: dict[str, ScalingLaw]) -> str:
    rows = [
        [name, law.constants_text(), f"{law.rmse:.2%}", f"{law.r2:.4f}", f"{law.points}", law.interval_from]
        for name, law in laws.items()
    ]
    return markdown_table(["law", "constants [95%]", "error", "R²", "points", "resampled"], rows)
