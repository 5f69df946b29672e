"""Kinds of faults that the package is put through; each module has `run(seed, count) -> Outcome`."""
