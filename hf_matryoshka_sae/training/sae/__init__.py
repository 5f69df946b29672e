"""How one SAE learns: losses, optimizer, schedules, penalty, initialisation, growth, thresholds."""
