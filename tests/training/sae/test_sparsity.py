"""The coefficient of the penalty against its rule in plain numbers."""

import math

import pytest
import torch

from hf_matryoshka_sae.training.config.spec import SAESpec
from hf_matryoshka_sae.training.sae.sparsity import SparsityCoefficient


YES, NO = torch.tensor(True), torch.tensor(False)


def coefficient(activation="relu", first_threshold=None, **fields):
    fields = {"type": activation, "target_l0": 8.0, "sparsity_warmup_steps": 0, **fields}
    return SparsityCoefficient(SAESpec.from_dict(fields, ""), activation, 100, torch.device("cpu"), first_threshold)


def test_it_follows_the_distance_and_its_change():
    one = coefficient(sparsity_coefficient=2.0, controller_rate=0.1)
    expected, before = math.log(2.0), None
    for step, l0 in enumerate((16.0, 12.0, 8.0, 7.0, 1000.0)):
        one.follow(torch.tensor(l0), step, YES)
        error = max(-1.0, min(1.0, math.log(l0 / 8.0)))
        expected += 0.1 * error + (0.0 if before is None else error - before)
        before = error
        assert one.value.item() == pytest.approx(math.exp(expected), rel=1e-5)


def test_a_step_that_was_left_out_changes_nothing():
    one, other = (coefficient(sparsity_coefficient=2.0) for _ in range(2))
    for of in (one, other):
        of.follow(torch.tensor(16.0), 0, YES)
    one.follow(torch.tensor(torch.nan), 1, NO)
    for of in (one, other):
        of.follow(torch.tensor(10.0), 2, YES)
    assert one.value == other.value


def test_in_the_warm_up_it_only_falls():
    for l0, moves in ((40.0, False), (2.0, True)):
        one = coefficient(sparsity_coefficient=2.0, sparsity_warmup_steps=50)
        one.follow(torch.tensor(l0), 3, YES)
        assert (one.value < 2.0).item() is moves
        assert one.at(3) == pytest.approx(one.value.item() * 4 / 51)


@pytest.mark.parametrize("activation", ["jumprelu", "topk"])
def test_others_stay_as_they_are(activation):
    fields = {"sparsity_coefficient": 3.0} if activation == "jumprelu" else {"target_l0": None}
    one = coefficient(activation, **fields)
    before = one.at(5)
    one.follow(torch.tensor(100.0), 5, YES)
    assert one.at(5) == before == (3.0 if activation == "jumprelu" else 0.0)


def test_it_goes_on_from_its_state_and_from_that_of_an_earlier_version():
    one = coefficient(sparsity_coefficient=2.0)
    one.follow(torch.tensor(16.0), 0, YES)
    other, older = (coefficient(sparsity_coefficient=1.0) for _ in range(2))
    other.load_state_dict(one.state_dict())
    older.load_state_dict({"sparsity": one.value.item()})
    for of in (one, other, older):
        of.follow(torch.tensor(9.0), 1, YES)
    assert other.value == one.value
    assert older.value > one.value  # it does not know that L0 has fallen


@pytest.mark.parametrize(("penalty", "expected"), [("l1", 0.3), ("log", 0.03)])
def test_a_start_at_the_target_sets_the_scale(penalty, expected):
    assert coefficient(first_threshold=0.3, sparsity_penalty=penalty).value.item() == pytest.approx(expected)
    assert coefficient(sparsity_penalty=penalty).value.item() == pytest.approx(expected / 3)
