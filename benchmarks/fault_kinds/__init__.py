"""Kinds of faults, each a module with `run(seed, count) -> Outcome`; `benchmarks/faults.py` runs them all."""
