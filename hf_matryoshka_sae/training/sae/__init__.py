"""How one SAE learns: losses, optimizer, schedules, initialisation, growth, thresholds."""
