"""Regular expressions over tokens, and the latents that fire where they match."""
