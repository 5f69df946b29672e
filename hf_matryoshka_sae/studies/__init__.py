"""Studies of what an SAE is worth, one folder for each question."""

from typing import TYPE_CHECKING

from ..common.lazy import imports_on_use


if TYPE_CHECKING:
    from ..common.report import Column, Report
    from .concepts.absorption import AbsorptionThresholds, absorption, absorption_on_task
    from .concepts.first_letter import FirstLetterTask, NotDefined, first_letter_task
    from .concepts.properties import property_absorption
    from .concepts.removal import spurious_correlation_removal, targeted_probe_perturbation
    from .drawn_latents import neuron_dictionary
    from .effects.ablation import ablation_sparsity
    from .explanations.autointerp.interpretability import automated_interpretability
    from .explanations.autointerp.judges import open_judge
    from .explanations.explainability import explainability
    from .frontier import agreement, sparsity_frontier
    from .probing.probe_losses import probe_losses
    from .probing.tasks import LabelledTask, TokenTasks, attribute_task
    from .weights.hedging import hedging_rate
    from .weights.matching import decoder_matching, matched_cosine, maximum_mean_correlation
    from .weights.meta_sae import meta_sae


__all__ = [
    "AbsorptionThresholds",
    "Column",
    "FirstLetterTask",
    "LabelledTask",
    "NotDefined",
    "Report",
    "TokenTasks",
    "ablation_sparsity",
    "absorption",
    "absorption_on_task",
    "agreement",
    "attribute_task",
    "automated_interpretability",
    "decoder_matching",
    "explainability",
    "first_letter_task",
    "hedging_rate",
    "matched_cosine",
    "maximum_mean_correlation",
    "meta_sae",
    "neuron_dictionary",
    "open_judge",
    "probe_losses",
    "property_absorption",
    "sparsity_frontier",
    "spurious_correlation_removal",
    "targeted_probe_perturbation",
]

__getattr__, __dir__ = imports_on_use(__name__)
