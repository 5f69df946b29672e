"""The hedging rate where it is known, and against projections solved for by least squares."""

import numpy as np
import pytest
import torch

from hf_matryoshka_sae.studies.weights.hedging import hedging_rate


D, H, ADDED = 20, 6, 3


def _unit(rows):
    return rows / rows.norm(dim=1, keepdim=True)


def _grown():
    control = torch.randn(H, D, dtype=torch.float64)
    return control, torch.cat([control + 0.5 * torch.randn(H, D), torch.randn(ADDED, D)])


def test_a_dictionary_that_did_not_move_does_not_hedge():
    control, _ = _grown()
    found = hedging_rate(control, torch.cat([control, torch.randn(ADDED, D)]))
    assert found["hedging_rate"] == found["projection"] == found["random_projection"] == found["change"] == 0
    assert (found["width"], found["added"]) == (H, ADDED)


def test_projections_equal_least_squares():
    control, extended = _grown()
    found = hedging_rate(control, extended, draws=400)
    change = (_unit(extended)[:H] - _unit(control)).numpy()
    new = extended[H:].numpy()
    projected = [new.T @ np.linalg.lstsq(new.T, row, rcond=None)[0] for row in change]
    assert found["projection"] == pytest.approx(np.linalg.norm(projected, axis=1).mean(), abs=1e-12)
    assert found["change"] == pytest.approx(np.linalg.norm(change, axis=1).mean(), abs=1e-12)
    # E||Q d||^2 = N / D ||d||^2 for a random span Q
    assert found["random_projection"] == pytest.approx(found["change"] * (ADDED / D) ** 0.5, rel=0.06)
    assert found["random_projection_std"] > 0
    expected = (found["projection"] - found["random_projection"]) / (1 - found["random_projection"])
    assert found["hedging_rate"] == pytest.approx(max(0, expected))


def test_letting_go_of_the_new_latents_is_hedging_and_moving_elsewhere_is_not():
    axes = torch.eye(D, dtype=torch.float64)
    new = axes[H : H + ADDED]
    extended = torch.cat([axes[:H], new])
    hedged = _unit(axes[:H] + 0.8 * new[torch.arange(H) % ADDED])
    elsewhere = _unit(axes[:H] + 0.8 * axes[-H:])
    found, none = hedging_rate(hedged, extended), hedging_rate(elsewhere, extended)
    assert found["projection"] == pytest.approx(0.8 / 1.64**0.5)
    assert found["hedging_rate"] > 0.4
    assert none["projection"] == pytest.approx(0, abs=1e-12)
    assert none["hedging_rate"] == 0


def test_lengths_repeated_rows_and_rotation_change_nothing():
    control, extended = _grown()
    before = hedging_rate(control, extended)
    scaled = hedging_rate(control * 3, extended * (torch.rand(H + ADDED, 1) + 0.1))
    assert scaled == pytest.approx(before, rel=1e-6)
    repeated = hedging_rate(control, torch.cat([extended, 2 * extended[-1:]]))
    assert repeated["projection"] == pytest.approx(before["projection"], abs=1e-10)
    rotation = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q
    turned = hedging_rate(control @ rotation, extended @ rotation)
    assert turned["projection"] == pytest.approx(before["projection"], abs=1e-10)
    assert hedging_rate(control, extended) == before
    assert hedging_rate(control, extended, seed=1) != before


def test_wrong_input_is_named():
    control, extended = _grown()
    with pytest.raises(ValueError, match=r"\(h, D\) and \(h \+ N, D\)"):
        hedging_rate(control[:, 1:], extended)
    with pytest.raises(ValueError, match="from 1 to 19 rows more"):
        hedging_rate(control, control)
    with pytest.raises(ValueError, match="span everything"):
        hedging_rate(control, torch.randn(H + D, D))
    with pytest.raises(ValueError, match="extended decoder holds rows that are zero"):
        hedging_rate(control, extended * (torch.arange(H + ADDED) > 0)[:, None])
    with pytest.raises(ValueError, match="draws"):
        hedging_rate(control, extended, draws=0)
