"""Seeds of draws that must be independent of each other."""

from hashlib import blake2b


def derived_seed(seed: int, purpose: str) -> int:
    """Return a seed for one purpose: two purposes, or two seeds, draw different numbers.

    PyTorch's generator on the CPU uses the lowest 32 bits alone, so that adding a large number changes nothing, and
    two draws of one shape from the same seed are equal.
    """
    return int.from_bytes(blake2b(f"{purpose} {seed}".encode(), digest_size=4).digest(), "little")
