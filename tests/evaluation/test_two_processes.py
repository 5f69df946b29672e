"""What latents mean and do, measured by two processes as by one."""

import json

import pytest

from hf_matryoshka_sae.evaluation import HeldOut, open_heldout
from hf_matryoshka_sae.studies import ablation_sparsity, explainability

from .planted import EMBEDDING, frequent, planted


def measured(data: HeldOut) -> dict:
    sae = planted(data, frequent(data, 12))
    half = len(data.batches) // 2
    first = HeldOut(data.model, data.batches[:half], EMBEDDING, tokenizer=data.tokenizer)
    second = HeldOut(data.model, data.batches[half:], EMBEDDING, tokenizer=data.tokenizer)
    patterns = explainability({"it": sae}, first, second, [4, 12], 4, substitutes=1, show=False)
    ablated = ablation_sparsity({"it": sae}, data, [4, 12], tokens=9, per_group=2, show=False)
    return json.loads(json.dumps({"patterns": patterns.to_dict(), "ablated": ablated.to_dict()}))


def _one_of_two(rank: int) -> dict:
    return measured(open_heldout("embedded", EMBEDDING, tokens=4000, lm_batch_size=4))


def close(found, right) -> None:
    """Equal up to rounding: random directions are fitted to sums whose order differs."""
    if isinstance(right, dict):
        assert found.keys() == right.keys()
        for key in right:
            close(found[key], right[key])
    elif isinstance(right, list):
        assert len(found) == len(right)
        for one, other in zip(found, right, strict=True):
            close(one, other)
    else:
        assert found == (pytest.approx(right, rel=1e-3, abs=1e-6) if isinstance(right, float) else right)


@pytest.mark.release
def test_two_processes_find_what_one_finds(two_processes):
    alone = measured(open_heldout("embedded", EMBEDDING, tokens=4000, lm_batch_size=4))
    for found in two_processes.run(_one_of_two):
        close(found, alone)
