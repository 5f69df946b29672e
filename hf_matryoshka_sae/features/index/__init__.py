"""The feature index of an SAE, kept beside its weights: what each latent fires on, promotes and resembles."""
