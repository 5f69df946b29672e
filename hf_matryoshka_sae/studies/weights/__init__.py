"""What the weights alone tell: matching between SAEs, hedging, composition (meta-SAE)."""
