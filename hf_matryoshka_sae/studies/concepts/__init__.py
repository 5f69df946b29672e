"""Concepts that an SAE splits, absorbs or mixes: first-letter absorption, SCR and TPP."""
