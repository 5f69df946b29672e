"""Kinds of faults that `benchmarks/faults.py` tries, a module each."""
