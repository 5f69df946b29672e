"""Rank, sort, prune and code: any dictionary as a progressive one."""

from .budget import Budget, width_for_budget
from .codec import decode_latents, decode_progressive, encode_progressive
from .coding.rate_distortion import rate_distortion
from .coding.steps import StepCost, choose_step, step_cost
from .curve import ProgressiveCurve, curves_figure, default_widths, plot_curves, progressive_curve
from .greedy import GreedyOrder, greedy_order
from .merging import Merged, merge_latents
from .power_law import PowerLawFit, decoder_spectrum, fit_power_law
from .power_law_plot import plot_power_laws
from .pruning import prune
from .ranking import RANKINGS, rank_latents, sort_latents
from .rate import RateSums, bits_per_token, default_step, naive_bits
from .refining import refined
from .refit import Refit, refit
from .statistics import LatentStatistics, latent_statistics
from .thresholds import calibrate_thresholds, with_threshold


__all__ = [
    "RANKINGS",
    "Budget",
    "GreedyOrder",
    "LatentStatistics",
    "Merged",
    "PowerLawFit",
    "ProgressiveCurve",
    "RateSums",
    "Refit",
    "StepCost",
    "bits_per_token",
    "calibrate_thresholds",
    "choose_step",
    "curves_figure",
    "decode_latents",
    "decode_progressive",
    "decoder_spectrum",
    "default_step",
    "default_widths",
    "encode_progressive",
    "fit_power_law",
    "greedy_order",
    "latent_statistics",
    "merge_latents",
    "naive_bits",
    "plot_curves",
    "plot_power_laws",
    "progressive_curve",
    "prune",
    "rank_latents",
    "rate_distortion",
    "refined",
    "refit",
    "sort_latents",
    "step_cost",
    "width_for_budget",
    "with_threshold",
]
