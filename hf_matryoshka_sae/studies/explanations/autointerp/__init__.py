"""Automated interpretability: latents explained by a language model, and the explanations examined on other text."""
