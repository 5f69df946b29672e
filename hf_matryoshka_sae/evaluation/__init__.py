"""What an SAE is worth: fidelity, features, interpretability and effects per prefix width, baselines beside them."""

from .baselines import Identity, PrincipalComponents, random_dictionary
from .data import HeldOut, activation_batches, open_heldout
from .fidelity import evaluate_fidelity
from .geometry import density_metrics, weight_geometry
from .language_model import LossScaling
from .similarity import TokenSample, representational_similarity
from .subjects import Dictionary, Subject


__all__ = [
    "Dictionary",
    "HeldOut",
    "Identity",
    "LossScaling",
    "PrincipalComponents",
    "Subject",
    "TokenSample",
    "activation_batches",
    "density_metrics",
    "evaluate_fidelity",
    "open_heldout",
    "random_dictionary",
    "representational_similarity",
    "weight_geometry",
]
