"""Derived seeds differ where PyTorch looks."""

import torch

from hf_matryoshka_sae.common.seeds import derived_seed


def test_purposes_and_seeds_draw_different_numbers():
    seeds = [derived_seed(seed, purpose) for seed in (0, 1, 2**32) for purpose in ("a", "b")]
    drawn = {torch.rand(1, generator=torch.Generator().manual_seed(seed)).item() for seed in [*seeds, 0]}
    assert len(drawn) == 7
    assert derived_seed(3, "a") == derived_seed(3, "a")
