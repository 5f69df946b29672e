"""A training step asks the device nothing: on a GPU each answer would empty its queue.

Seen from the operations dispatched, so that no GPU is needed: what gives numbers to Python, has a shape that depends
on the data, or copies a Python list to the device.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_matryoshka_sae.models import selection

from ...axes import each
from .test_learner import SMALLEST, N, batches, learner


ASKING = {
    "_local_scalar_dense",
    "bincount",
    "is_nonzero",
    "item",
    "lift_fresh",
    "masked_select",
    "nonzero",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
}


class Asked(TorchDispatchMode):
    """Collects the operations that would make the host wait."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "_index_put_impl_") else ()
        if any(index is not None and index.dtype == torch.bool for index in indices):
            self.names.add(f"{name} with a mask")
        if name in ASKING or (name == "repeat_interleave" and isinstance(args[-1], torch.Tensor)):
            self.names.add(name)
        return func(*args, **(kwargs or {}))


def test_asking_is_noticed():
    values = torch.rand(5)
    for ask in (
        lambda: values.sum().item(),
        lambda: bool(values.any()),
        lambda: values[values > 0.5],
        lambda: values.nonzero(),
        lambda: torch.tensor([1.0, 2.0]),
        lambda: torch.bincount(torch.zeros(3, dtype=torch.int64)),
    ):
        with Asked() as asked:
            ask()
        assert asked.names


@each(
    fields=[
        {"type": "topk"},
        {"type": "topk", "multi_topk": True},
        {"type": "batch_topk", "grad_clip": 1.0, "ema_decay": 0.9},
        {"type": "matryoshka", "sort_every": 1},
        {"type": "matryoshka", "random_prefixes": 4},
        {"type": "matryoshka", "activation": "topk", "error_unit": "fvu"},
        {"preset": "saelens"},
        {"type": "matryoshka", "sort_every": 1, "grad_clip": 1.0, **SMALLEST},
        {"type": "topk", "optimizer_dtype": "bfloat16"},
    ],
    dead={"all alive": None, "some dead": [3, 9, 40]},
)
def test_a_step_asks_the_device_nothing(fields, dead, monkeypatch):
    monkeypatch.setattr(selection, "_host_may_look", lambda device: False)
    one = learner(**fields)
    one.dead_every = 1000
    x, following = batches(2)
    one.accumulate(x, 0)
    one.step(0)
    one.dead = None if dead is None else torch.tensor(dead)
    with Asked() as asked:
        one.accumulate(following, 1)
        one.step(1)
    assert not asked.names
    assert one.skipped() == (0, 0, 0)


@pytest.mark.parametrize("fields", [{"type": "topk"}, {"type": "matryoshka"}], ids=str)
def test_the_way_that_asks_nothing_gives_the_same_step(fields, monkeypatch):
    weights = []
    for may_look in (True, False):
        monkeypatch.setattr(selection, "_host_may_look", lambda device, answer=may_look: answer)
        torch.manual_seed(0)
        one = learner(**fields)
        for step, x in enumerate(batches(3)):
            one.accumulate(x, step)
            one.step(step)
        weights.append([parameter.detach().clone() for parameter in one.sae.parameters()])
    for a, b in zip(*weights, strict=True):
        assert torch.equal(a, b)


def test_dead_latents_are_looked_for_a_few_times_in_their_window():
    assert learner(type="topk", dead_tokens=3 * N).dead_every == 1
    assert learner(type="topk", dead_tokens=320 * N).dead_every == 20
