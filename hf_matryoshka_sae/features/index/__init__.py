"""The feature index of an SAE: what each latent fires on, promotes and is near to, kept beside the weights."""
