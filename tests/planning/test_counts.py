"""Arithmetic, memory and traffic of a step, against real tensors and sums written out by hand."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from hf_matryoshka_sae.models import build_sae
from hf_matryoshka_sae.models.selection import EncoderBlocks
from hf_matryoshka_sae.planning import Mesh, find_device
from hf_matryoshka_sae.planning.counts import block_latents, step_parts
from hf_matryoshka_sae.planning.memory import memory
from hf_matryoshka_sae.planning.traffic import bandwidth, step_traffic
from hf_matryoshka_sae.training.sae.learner import Learner

from .workloads import DEVICE, config, workload


ONE = Mesh(1, 1)


def parts(work, mesh=ONE, device=DEVICE):
    return {part.name: part for part in step_parts(work, mesh, device)}


def traffic(work, mesh):
    return {move.name: move for move in step_traffic(work, mesh, DEVICE)}


@pytest.mark.parametrize("shape", [(7, 100), (512, 2**16), (2048, 999), (2**25, 64)])
def test_blocks_are_those_of_the_encoder(shape):
    tokens, latents = shape
    x = torch.zeros(1, 1).expand(tokens, 1)
    blocks = EncoderBlocks(x, torch.zeros(latents, 1), torch.zeros(latents))
    assert block_latents(tokens, latents, find_device("cpu")) == blocks.block_latents


def test_operations_of_a_topk_step():
    found = parts(workload({"type": "topk", "num_latents": 1024, "k": 8, "auxk_coefficient": 0.0}))
    tokens, d_in = 4096, 128
    assert found["encoder"].flops == 2 * tokens * 1024 * d_in  # one product
    assert found["decoder"].flops == 2 * tokens * 8 * d_in
    assert found["gradients"].flops == 3 * 2 * tokens * 8 * d_in  # to values, decoder and encoder
    assert "AuxK" not in found


def test_operations_are_shared_out():
    work = workload({"num_latents": 4096, "k": 8})
    whole = parts(work)
    for mesh in (Mesh(4, 1), Mesh(2, 2), Mesh(1, 4)):
        share = parts(work, mesh)
        for name in ("language model", "encoder", "decoder", "gradients"):
            assert share[name].flops == pytest.approx(whole[name].flops / 4)
    # Replicas each go through a whole optimizer, shards through theirs.
    assert parts(work, Mesh(4, 1))["optimizer"].moved == whole["optimizer"].moved
    assert parts(work, Mesh(1, 4))["optimizer"].moved == whole["optimizer"].moved / 4


def test_optimizer_passes():
    """Adam reads weight, gradient and two moments and writes three of them; the norm reads the gradient."""
    entry = {"type": "topk", "num_latents": 1024, "k": 8, "unit_norm_decoder": False}
    bytes_each = 4 * (4 + 3 + 1)
    assert parts(workload(entry))["optimizer"].moved == 2 * 1024 * 128 * bytes_each


def test_a_part_takes_the_longer_of_arithmetic_and_memory():
    part = parts(workload())["encoder"]
    assert replace(part, flops=3e12, moved=1e9).seconds(DEVICE) == 3
    assert replace(part, flops=3e12, moved=4e9).seconds(DEVICE) == 4
    assert replace(part, flops=3e12, moved=1e9, dtype="bfloat16").seconds(DEVICE) == 1.5


@pytest.mark.parametrize(
    "entry",
    [
        {"type": "topk", "num_latents": 4096, "k": 8},
        {"type": "batch_topk", "num_latents": 4096, "k": 8, "ema_decay": 0.9},
        {"type": "jumprelu", "num_latents": 4096},
        {"type": "matryoshka", "num_latents": 4096, "k": 8, "prefix_widths": [1024, 4096]},
    ],
)
def test_memory_is_that_of_real_tensors(entry):
    """A learner takes a step; its tensors are weighed."""
    run = config(entry, batch_size=64, tokens=6400)
    sae = build_sae(run.saes[0].sae_config(128, "embedded", "model.layers.2"))
    shape = {"steps": 100, "batch_size": 64}
    learner = Learner("name", "place", sae, run.saes[0], torch.zeros(128), 1.0, Accelerator(cpu=True), **shape)
    learner.accumulate(torch.randn(64, 128), 0)
    gradients = sum(parameter.grad.nbytes for parameter in sae.parameters() if parameter.grad is not None)
    learner.step(0)
    weights = sum(tensor.nbytes for tensor in [*sae.parameters(), *sae.buffers()])
    moments = sum(
        value.nbytes for state in learner.optimizer.state.values() for value in state.values() if value.dim()
    )
    averaged = sum(tensor.nbytes for tensor in (learner.average or {}).values())
    found = memory(workload(entry, batch_size=64, tokens=6400), ONE, DEVICE).phases["step"]
    assert found["weights"] == pytest.approx(weights, rel=0.01)
    assert found["gradients"] == pytest.approx(gradients, rel=0.01)
    assert found["optimizer state"] == pytest.approx(moments, rel=0.01)
    assert found["average"] == pytest.approx(averaged, rel=0.01)


def test_memory_of_shards_and_types():
    entry = {"type": "topk", "num_latents": 2**20, "k": 8}
    small = entry | {"optimizer_dtype": "int8", "weights_dtype": "bfloat16"}
    whole, shard = (memory(workload(entry), mesh, DEVICE).phases["step"] for mesh in (ONE, Mesh(1, 4)))
    light = memory(workload(small), ONE, DEVICE).phases["step"]
    for name in ("weights", "gradients", "optimizer state", "counters"):
        assert shard[name] == pytest.approx(whole[name] / 4)
    assert light["gradients"] == whole["gradients"] / 2
    assert light["optimizer state"] == pytest.approx(whole["optimizer state"] / 4, rel=0.05)
    # Whoever reads a whole replica's batch holds all of it.
    assert shard["prefix errors"] == whole["prefix errors"]


def test_memory_of_micro_batches_and_replicas():
    entry = {"num_latents": 2**14, "k": 8}
    one, four = (memory(workload(entry, gradient_accumulation_steps=n), ONE, DEVICE).phases["step"] for n in (1, 4))
    assert four["prefix errors"] == one["prefix errors"] / 4
    assert four["gradients"] == one["gradients"] * 1.5  # a matrix's new gradient beside the two that add up
    assert memory(workload(entry), Mesh(4, 1), DEVICE).phases["step"]["gradients"] == one["gradients"] * 2  # buckets


def test_dead_latents_cost_memory_and_time():
    alive, dying = workload(), workload(dead_share=0.5)
    assert memory(dying, ONE, DEVICE).phases["step"]["AuxK"] > 0
    assert parts(dying)["AuxK"].flops > 2 * 4096 * 512 * 128
    assert "AuxK" not in memory(alive, ONE, DEVICE).phases["step"]


def ring(chunks: int, size: float, passes: int) -> float:
    """Bytes that each of `chunks` devices sends: in every pass, its part `chunks - 1` times."""
    return sum(size / chunks for _ in range(passes) for _ in range(chunks - 1))


def test_traffic_of_shards():
    work = workload({"num_latents": 4096, "k": 8, "prefix_widths": [1024, 4096]})
    found = traffic(work, Mesh(1, 4))
    assert found["partial sums"].sent == ring(4, 4096 * 2 * 128 * 4, passes=2)
    assert found["activations"].sent == ring(4, 4096 * 128 * 4, passes=1)
    assert found["values over all"].sent == ring(4, 4 * 4096 * 8 * 4, passes=1)  # each its even share, four times over
    assert found["gradients"].sent == 0


def test_traffic_of_replicas():
    found = traffic(workload(), Mesh(4, 1))
    assert found["gradients"].sent == ring(4, 2 * 1024 * 128 * 4, passes=2)
    assert found["partial sums"].sent == found["activations"].sent == 0


def test_one_device_sends_nothing():
    assert all(move.sent == move.seconds == 0 for move in traffic(workload(), ONE).values())


@pytest.mark.parametrize(
    ("size", "stride", "expected"),
    [
        (4, 1, 10e9),  # a whole machine
        (2, 2, 10e9),  # two of its four devices
        (8, 1, 4e9),  # two machines: four ports
        (16, 4, 1e9),  # one device of each machine: one port
        (8, 2, 2e9),
    ],
)
def test_bandwidth_of_groups(size, stride, expected):
    assert bandwidth(DEVICE, size, stride) == expected


def test_ports_are_no_faster_than_the_machine():
    assert bandwidth(replace(DEVICE, network=5e9), 8, 1) == 10e9
