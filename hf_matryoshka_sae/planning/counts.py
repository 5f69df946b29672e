"""The cost of one step to a device: arithmetic and passes over its memory, part by part.

A part's time is the longer of the two: operations at the rate of a matmul, bytes at that of memory (the roofline of
Williams et al. 2009). Parts follow each other, so their times add up.

Shapes: N tokens of a device's replica in a step, n in a micro-batch, D `d_in`, F latents of the device's shard, P
prefixes, k latents per token of which k / S fall to a shard.
"""

from dataclasses import dataclass
from math import ceil

from ..models.encoder_blocks import BLOCK_ENTRIES, GROUP
from .devices import Device
from .workload import BYTES, DictionaryShape, Workload


@dataclass(frozen=True)
class Mesh:
    """Devices as replicas, which share a batch, of shards, which share the latents.

    Args:
        replicas (`int`): Number R of replicas.
        shards (`int`): Number S of shards in a replica.
    """

    replicas: int
    shards: int

    @property
    def devices(self) -> int:
        """Return the number of devices, R x S."""
        return self.replicas * self.shards

    def __str__(self) -> str:
        return f"{self.replicas} x {self.shards}"


@dataclass(frozen=True)
class Part:
    """A part of a step on one device.

    Args:
        name (`str`): Name of the part in tables.
        flops (`float`): Number of multiplications and additions.
        moved (`float`): Bytes that go between the device and its memory.
        dtype (`str`): Type of the products, `"float32"` or `"bfloat16"`.
    """

    name: str
    flops: float
    moved: float
    dtype: str = "float32"

    def seconds(self, device: Device) -> float:
        """Return the time of arithmetic or of memory, whichever is longer."""
        return max(self.flops / device.rate(self.dtype), self.moved / device.stream)


def local_latents(num_latents: int, mesh: Mesh) -> int:
    """Return the number of rows of the largest shard."""
    return ceil(num_latents / mesh.shards)


def micro_batch(work: Workload, mesh: Mesh) -> int:
    """Return the number of tokens that a replica sees at once."""
    return ceil(work.batch_size / (mesh.replicas * work.accumulation))


def block_latents(tokens: int, num_latents: int, device: Device) -> int:
    """Return the number of latents in a block of pre-activations, as `EncoderBlocks` chooses it."""
    fitting = max(1, BLOCK_ENTRIES[device.kind] // max(1, tokens))
    return min(-(-fitting // GROUP), -(-num_latents // GROUP)) * GROUP


def own_candidates(work: Workload, shape: DictionaryShape, mesh: Mesh) -> float:
    """Return how many pairs per token a process selects among its own latents, before the cut over all processes."""
    if shape.activation == "batch_topk":
        return sent_candidates(work, shape, mesh)
    return shape.k if shape.activation == "topk" else shape.k / mesh.shards


def sent_candidates(work: Workload, shape: DictionaryShape, mesh: Mesh) -> float:
    """Return how many values per token a process sends: `capacity_factor` times its even share of the k places."""
    if shape.activation == "batch_topk":  # the places of all replicas' tokens, over all processes
        return min(shape.k * mesh.replicas, shape.k * work.capacity_factor / mesh.shards)
    return min(shape.k, ceil(shape.k * work.capacity_factor / mesh.shards))


def step_parts(work: Workload, mesh: Mesh, device: Device) -> list[Part]:
    """Return every part of a step on one device, summed over the run's dictionaries."""
    parts = [] if work.lm_processes else [language_model_part(work, mesh.devices)]
    by_name: dict[str, list[Part]] = {}
    for shape in work.dictionaries:
        for part in _of_dictionary(work, shape, mesh, device):
            by_name.setdefault(part.name, []).append(part)
    for name, same in by_name.items():
        parts.append(Part(name, sum(p.flops for p in same), sum(p.moved for p in same), same[0].dtype))
    return parts


def language_model_part(work: Workload, readers: int) -> Part:
    """Return the part of a step in each of the processes that run the language model."""
    tokens, dtype = work.batch_size / readers, "float32" if work.lm.bytes_each == 4 else "bfloat16"
    weights = tokens / work.window_tokens * work.lm.parameters * work.lm.bytes_each
    return Part("language model", tokens * work.lm.flops_per_token, weights, dtype)


def _of_dictionary(work: Workload, shape: DictionaryShape, mesh: Mesh, device: Device) -> list[Part]:
    latents, tokens = local_latents(shape.num_latents, mesh), work.batch_size / mesh.replicas
    micro, width, weight = micro_batch(work, mesh), shape.d_in, shape.weight_bytes
    product = BYTES[work.product]
    matrix, pairs = latents * width, tokens * shape.k / mesh.shards
    block = block_latents(micro, latents, device)
    blocks = work.accumulation * ceil(latents / block)
    entries = tokens * latents
    levels = tokens * shape.prefixes * width * 4
    parts = [
        Part("batches", 0, tokens * width * 4 * 14),
        Part(
            "encoder",
            2 * entries * width,
            work.accumulation * matrix * (weight + (2 * product if product < weight else 0))
            + entries * product
            + blocks * micro * width * product,
            work.product,
        ),
        Part("selection", entries, _selection_bytes(work, shape, mesh, device, entries, blocks, block)),
    ]
    if shape.dense:  # matmuls over all N x F
        parts.append(Part("decoder", 2 * shape.decodes * entries * width, entries * 8 + levels * 4))
        parts.append(Part("gradients", 6 * shape.decodes * entries * width, entries * 24 + pairs * 40 + levels * 3))
    else:
        copy = work.accumulation * matrix * (weight + product) if device.kind == "cuda" and product < weight else 0
        rows = pairs * width * shape.decodes
        parts.append(Part("decoder", 2 * rows, rows * product + levels * 4 + copy))
        written = work.accumulation * 2 * matrix * weight + (work.accumulation - 1) * 6 * matrix * weight
        parts.append(Part("gradients", 6 * rows, 3 * rows * product + levels * 3 + pairs * 200 + written))
    if shape.auxk and work.dead_share:
        parts.append(_auxk_part(work, shape, mesh, tokens, latents))
    return [*parts, Part("optimizer", 24 * matrix, _optimizer_bytes(shape, matrix))]


def _selection_bytes(
    work: Workload, shape: DictionaryShape, mesh: Mesh, device: Device, entries: float, blocks: int, block: int
) -> float:
    """Return the bytes of passes over blocks, and over the keys of groups and their members (`models.selection`)."""
    product, chosen = BYTES[work.product], own_candidates(work, shape, mesh)
    if shape.activation not in ("topk", "batch_topk"):
        return entries * (product + 2) + entries / 2 * 60
    if device.kind == "cpu":
        return entries * product * 1.2 + entries / GROUP * 12
    rows = blocks * micro_batch(work, mesh)
    return entries * product + rows * KEY_BYTES * 2 * _keys(block, chosen)


KEY_BYTES = 32
"""Bytes of an entry in a selection on an accelerator: a 64-bit key with its place, and temporaries."""


def _keys(block: int, count: float) -> float:
    """Return the number of keys per row: of groups and of the best groups' members, or of every entry."""
    groups = block / GROUP
    return groups + count * GROUP if groups > count else block


def selection_bytes_held(tokens: int, block: int, count: float) -> float:
    """Return the most bytes that these keys take, on an accelerator."""
    groups = block / GROUP
    return tokens * KEY_BYTES * (max(groups, count * GROUP) if groups > count else block)


def _auxk_part(work: Workload, shape: DictionaryShape, mesh: Mesh, tokens: float, latents: int) -> Part:
    dead = work.dead_share * latents
    used = min(shape.auxk / mesh.shards, dead)
    rows = tokens * used * shape.d_in
    flops = 2 * tokens * dead * shape.d_in + 8 * rows
    moved = 10 * dead * shape.d_in * 4 + tokens * dead * BYTES[work.product] * 2 + 4 * rows * 4 + tokens * used * 200
    return Part("AuxK", flops, moved, work.product)


def _optimizer_bytes(shape: DictionaryShape, matrix: float) -> float:
    """Return the bytes of Adam, gradient norm, projections, averages and sorting, for two matrices."""
    weight, moment = shape.weight_bytes, shape.moment_bytes
    moved = 2 * matrix * (3 * weight + 4 * moment) + 2 * matrix * weight
    moved += 6 * matrix * weight if shape.unit_norm else 0
    moved += 2 * matrix * 12 if shape.averaged else 0
    if shape.sort_every:
        moved += 4 * (2 * weight + 4 * moment) * matrix / shape.sort_every
    return moved
