"""What an SAE is worth."""

from .data import HeldOut, activation_batches, open_heldout
from .fidelity import evaluate_fidelity
from .subjects import Dictionary, Subject


__all__ = ["Dictionary", "HeldOut", "Subject", "activation_batches", "evaluate_fidelity", "open_heldout"]
