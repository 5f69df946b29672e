"""Faults that a user's machine or habits bring about, one kind a module: `run(seed, count) -> Outcome`."""
