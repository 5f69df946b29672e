"""Trees of latents: the latents of a prefix, and those of the next one that refine them."""
