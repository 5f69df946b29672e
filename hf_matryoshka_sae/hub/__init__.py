"""SAEs on the Hub: push a run, list what a repository holds, load it, fetch the first latents only."""
