"""What an SAE is worth."""

from .data import HeldOut, activation_batches, open_heldout


__all__ = ["HeldOut", "activation_batches", "open_heldout"]
