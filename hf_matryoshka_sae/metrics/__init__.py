"""`evaluate` modules: thin adapters over `evaluation`."""
