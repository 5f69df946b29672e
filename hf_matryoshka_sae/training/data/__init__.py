"""Where a run's hidden states come from, and which process gets which."""
