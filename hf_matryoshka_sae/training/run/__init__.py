"""A run as a whole: its folder, steps, checkpoints, watchdog, records and end."""
