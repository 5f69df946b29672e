"""What an SAE is worth, one folder for each question, on top of all that measures, ranks, trains and reads."""

from .concepts.absorption import AbsorptionThresholds, absorption, absorption_on_task
from .concepts.first_letter import FirstLetterTask, NotDefined, first_letter_task
from .concepts.removal import spurious_correlation_removal, targeted_probe_perturbation
from .concepts.report import ConceptRemoval
from .drawn_latents import neuron_dictionary
from .effects.ablation import AblationSparsity, ablation_sparsity
from .explanations.autointerp import AutoInterp, automated_interpretability, open_judge
from .explanations.explainability import Explainability, explainability
from .probing.probe_losses import probe_losses
from .probing.report import ProbeReport
from .probing.tasks import LabelledTask, TokenTasks, attribute_task
from .weights.hedging import hedging_rate
from .weights.matching import decoder_matching, matched_cosine, maximum_mean_correlation
from .weights.meta_sae import MetaSAE, meta_sae


__all__ = [
    "AblationSparsity",
    "AbsorptionThresholds",
    "AutoInterp",
    "ConceptRemoval",
    "Explainability",
    "FirstLetterTask",
    "LabelledTask",
    "MetaSAE",
    "NotDefined",
    "ProbeReport",
    "TokenTasks",
    "ablation_sparsity",
    "absorption",
    "absorption_on_task",
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
    "spurious_correlation_removal",
    "targeted_probe_perturbation",
]
