"""Prunings of SAEs whose codes look again."""

import pytest
import torch

from hf_matryoshka_sae import MatryoshkaSAEConfig, build_sae
from hf_matryoshka_sae.space.subject.prunings import at_k


@pytest.mark.parametrize("steps", [0, 2])
def test_the_threshold_of_a_prefix_lets_k_through(steps):
    config = MatryoshkaSAEConfig(d_in=16, num_latents=64, k=6, prefix_widths=[24, 64], refine_steps=steps)
    sae, x = build_sae(config).eval(), torch.randn(3000, 16)
    smaller = at_k(sae, x, 24, 3)
    l0 = (smaller.encode(x).values > 0).sum(1).double().mean().item()
    assert l0 == pytest.approx(3, rel=5e-3)
    assert (smaller.config.num_latents, smaller.config.k, smaller.config.refine_steps) == (24, 3, steps)
