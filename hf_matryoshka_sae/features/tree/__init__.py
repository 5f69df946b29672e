"""Which latents of a prefix those of the next one refine."""
