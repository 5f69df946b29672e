"""What single latents, or a few, know of labels."""
