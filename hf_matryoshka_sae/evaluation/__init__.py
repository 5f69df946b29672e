"""What an SAE is worth: fidelity per prefix width, geometry, matching, absorption, and baselines beside them."""

from .ablation import AblationSparsity, ablation_sparsity
from .absorption import AbsorptionThresholds, absorption, absorption_on_task
from .autointerp import AutoInterp, automated_interpretability, open_judge
from .baselines import Identity, PrincipalComponents, random_dictionary
from .data import HeldOut, activation_batches, open_heldout
from .drawn_latents import neuron_dictionary
from .explainability import Explainability, explainability
from .fidelity import evaluate_fidelity
from .first_letter import FirstLetterTask, NotDefined, first_letter_task
from .geometry import density_metrics, weight_geometry
from .hedging import hedging_rate
from .matching import decoder_matching, matched_cosine, maximum_mean_correlation
from .probe_report import ProbeReport
from .probe_tasks import LabelledTask, TokenTasks
from .probing import probe_losses
from .similarity import TokenSample, representational_similarity
from .subjects import Dictionary, Subject


__all__ = [
    "AblationSparsity",
    "AbsorptionThresholds",
    "AutoInterp",
    "Dictionary",
    "Explainability",
    "FirstLetterTask",
    "HeldOut",
    "Identity",
    "LabelledTask",
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
    "automated_interpretability",
    "decoder_matching",
    "density_metrics",
    "evaluate_fidelity",
    "explainability",
    "first_letter_task",
    "hedging_rate",
    "matched_cosine",
    "maximum_mean_correlation",
    "neuron_dictionary",
    "open_heldout",
    "open_judge",
    "probe_losses",
    "random_dictionary",
    "representational_similarity",
    "weight_geometry",
]
