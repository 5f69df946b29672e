"""Scaling laws from a grid of SAEs: plan the runs, train what is missing, measure, fit, report."""

from typing import TYPE_CHECKING

from ...common.lazy import imports_on_use


if TYPE_CHECKING:
    from .config import Grid, Sweep, load_sweep
    from .plan import plan_runs
    from .points import Point, read_points, training_flops, write_points
    from .report import BudgetFits, ScalingReport, fit_points
    from .running import train_runs


__all__ = [
    "BudgetFits",
    "Grid",
    "Point",
    "ScalingReport",
    "Sweep",
    "fit_points",
    "load_sweep",
    "plan_runs",
    "read_points",
    "train_runs",
    "training_flops",
    "write_points",
]

__getattr__, __dir__ = imports_on_use(__name__)
