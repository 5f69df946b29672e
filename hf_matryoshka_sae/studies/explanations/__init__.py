"""Whether what a latent fires on can be said: token patterns (N2G) and automated interpretability."""
