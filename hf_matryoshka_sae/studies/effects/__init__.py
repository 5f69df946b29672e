"""What a latent does to the language model's predictions."""
