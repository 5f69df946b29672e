"""What an SAE is worth: fidelity, features, interpretability and effects per prefix width, baselines beside them."""

from .ablation import AblationSparsity, ablation_sparsity
from .absorption import AbsorptionThresholds, absorption, absorption_on_task
from .autointerp import AutoInterp, automated_interpretability, open_judge
from .baselines import Identity, PrincipalComponents, random_dictionary
from .concept_removal import spurious_correlation_removal, targeted_probe_perturbation
from .concept_report import ConceptRemoval
from .data import HeldOut, activation_batches, open_heldout
from .drawn_latents import neuron_dictionary
from .explainability import Explainability, explainability
from .fidelity import evaluate_fidelity
from .first_letter import FirstLetterTask, NotDefined, first_letter_task
from .geometry import density_metrics, weight_geometry
from .hedging import hedging_rate
from .language_model import LossScaling
from .matching import decoder_matching, matched_cosine, maximum_mean_correlation
from .meta_sae import MetaSAE, meta_sae
from .probe_report import ProbeReport
from .probe_tasks import LabelledTask, TokenTasks, attribute_task
from .probing import probe_losses
from .similarity import TokenSample, representational_similarity
from .subjects import Dictionary, Subject


__all__ = [
    "AblationSparsity",
    "AbsorptionThresholds",
    "AutoInterp",
    "ConceptRemoval",
    "Dictionary",
    "Explainability",
    "FirstLetterTask",
    "HeldOut",
    "Identity",
    "LabelledTask",
    "LossScaling",
    "MetaSAE",
    "NotDefined",
    "PrincipalComponents",
    "ProbeReport",
    "Subject",
    "TokenSample",
    "TokenTasks",
    "ablation_sparsity",
    "absorption",
    "absorption_on_task",
    "activation_batches",
    "attribute_task",
    "automated_interpretability",
    "decoder_matching",
    "density_metrics",
    "evaluate_fidelity",
    "explainability",
    "first_letter_task",
    "hedging_rate",
    "matched_cosine",
    "maximum_mean_correlation",
    "meta_sae",
    "neuron_dictionary",
    "open_heldout",
    "open_judge",
    "probe_losses",
    "random_dictionary",
    "representational_similarity",
    "spurious_correlation_removal",
    "targeted_probe_perturbation",
    "weight_geometry",
]
