"""Seeds of draws that must have nothing to do with each other."""

from hashlib import blake2b


def derived_seed(seed: int, purpose: str) -> int:
    """A seed for one purpose: two purposes, or two seeds, draw different numbers.

    PyTorch's generator on the CPU looks at the lowest 32 bits alone, so adding a large number changes nothing; and two
    draws of one shape from the same seed are the same.
    """
    return int.from_bytes(blake2b(f"{purpose} {seed}".encode(), digest_size=4).digest(), "little")
