"""What a device holds, part by part, in each phase of a run; its peak is that of the largest phase.

Phases: the start (first weights are drawn), a step, a checkpoint, and the end (a copy of the dictionary is finished
and saved while the optimizer's state is still there). On a CPU a checkpoint is written from the same memory; on an
accelerator it is the host's.
"""

from dataclasses import dataclass

import torch

from ..training.setup import overlaps
from .counts import Mesh, block_latents, candidates, local_latents, micro_batch, selection_bytes_held
from .devices import Device
from .workload import BYTES, DictionaryShape, Workload


# Bytes of a (token, latent) pair through a step: its place twice, its value, its order by latent, and gradients.
_PAIR = 72
# Tensors of the size of the batch: raw, normalised, centred, and what statistics form of them.
_BATCH_COPIES = 6
# `save_tree` clones the state it writes, and the clones stay until Python's garbage collector comes by.
CHECKPOINT_COPIES = 1


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Args:
        phases (`dict[str, dict[str, float]]`): For each phase its parts.
        host (`float`): Bytes of the host's memory that a process on an accelerator needs to write a checkpoint.
    """

    phases: dict[str, dict[str, float]]
    host: float

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def parts(self) -> dict[str, float]:
        """What that phase holds."""
        return self.phases[self.peak_phase]

    @property
    def peak(self) -> float:
        """Bytes."""
        return sum(self.parts.values())


def memory(work: Workload, mesh: Mesh, device: Device) -> Memory:
    """The phases of a run on one device of a mesh."""
    held = _held(work, mesh, device)
    matrices = [_matrix(shape, mesh) * shape.weight_bytes for shape in work.dictionaries]
    state = held["weights"] + held["optimizer state"] + held["average"] + held["counters"]
    on_cpu = device.kind == "cpu"
    copies = {"checkpoint copy": CHECKPOINT_COPIES * state} if on_cpu else {}
    begun = {name: held[name] for name in ("process", "language model", "shuffle buffer", "weights", "counters")}
    finished = {"finished copy": 2 * max(matrices)}
    block = {"encoder block": _block(work, mesh, device)} if on_cpu else {}
    phases = {
        "start": begun | {"first weights": 3 * max(matrices)},
        "step": held | _step(work, mesh, device),
        "checkpoint": held | block | copies,
        "end": held | block | copies | finished,
    }
    if on_cpu:
        phases["checkpoint"]["shuffle buffer copy"] = 2 * held["shuffle buffer"]
    return Memory(phases, 0.0 if on_cpu else CHECKPOINT_COPIES * state)


def _matrix(shape: DictionaryShape, mesh: Mesh) -> int:
    return local_latents(shape.num_latents, mesh) * shape.d_in


def _held(work: Workload, mesh: Mesh, device: Device) -> dict[str, float]:
    """What is there through the whole of training."""
    shapes, row_bytes = work.dictionaries, 4 if device.kind == "cpu" else work.lm.bytes_each
    counts = [local_latents(shape.num_latents, mesh) for shape in shapes]
    own_tokens = work.batch_size // (mesh.devices * work.accumulation)
    buffered = max(work.buffer_tokens, 2 * own_tokens + work.window_tokens)
    ahead = 1.5 if overlaps(work.overlap, torch.device(device.kind), mesh.devices) else 1.0
    width = sum(work.lm.widths.values())
    activations = work.window_tokens * work.lm.hidden * work.lm.bytes_each
    return {
        "process": device.process + work.pool_tokens * (5 if device.kind == "cpu" else 0),
        "language model": work.lm.parameters * work.lm.bytes_each + activations,
        "shuffle buffer": buffered * ahead * width * row_bytes,
        "weights": sum(
            2 * _matrix(shape, mesh) * shape.weight_bytes + 16 * n for shape, n in zip(shapes, counts, strict=True)
        ),
        "optimizer state": sum(
            4 * _matrix(shape, mesh) * shape.moment_bytes + 8 * n for shape, n in zip(shapes, counts, strict=True)
        ),
        "average": sum(2 * _matrix(shape, mesh) * 4 for shape in shapes if shape.averaged),
        # Tokens since each latent fired, its energy, and the packed statistics of a step.
        "counters": sum(44 * n for n in counts),
    }


def _block(work: Workload, mesh: Mesh, device: Device) -> float:
    tokens = micro_batch(work, mesh)
    return max(
        tokens * block_latents(tokens, local_latents(shape.num_latents, mesh), device) * BYTES[work.product]
        for shape in work.dictionaries
    )


def _step(work: Workload, mesh: Mesh, device: Device) -> dict[str, float]:
    """What a step adds: gradients of all dictionaries; of the one at work, the larger of both passes' temporaries."""
    gradients = sum(2 * _matrix(shape, mesh) * shape.weight_bytes for shape in work.dictionaries)
    if mesh.shards == 1 and mesh.replicas > 1:
        gradients *= 2  # DDP's buckets
    if work.accumulation > 1:  # a matrix's new gradient beside what is added up
        gradients += max(_matrix(shape, mesh) * shape.weight_bytes for shape in work.dictionaries)
    largest = max(
        (_passes(work, shape, mesh, device) for shape in work.dictionaries), key=lambda parts: sum(parts.values())
    )
    return {"gradients": gradients, **largest}


def _passes(work: Workload, shape: DictionaryShape, mesh: Mesh, device: Device) -> dict[str, float]:
    tokens, latents = micro_batch(work, mesh), local_latents(shape.num_latents, mesh)
    product, width, matrix = BYTES[work.product], shape.d_in, _matrix(shape, mesh)
    block, chosen = block_latents(tokens, latents, device), candidates(work, shape, mesh)
    competing = shape.activation in ("topk", "batch_topk")
    selection = tokens * chosen * 40 if competing else 0.0
    if competing and mesh.devices > 1:
        selection += tokens * chosen * mesh.devices * 4  # gathered values
    if device.kind == "cuda" and competing:
        selection += selection_bytes_held(tokens, block, chosen)
    parts = {
        "batch": tokens * width * 4 * _BATCH_COPIES,
        "prefix errors": 2 * tokens * shape.prefixes * width * 4 * shape.decodes,
        "pairs": tokens * shape.k / mesh.shards * _PAIR * shape.decodes,
        "encoder block": tokens * block * product,
        "selection": selection,
    }
    if shape.dense:
        parts["dense latents"] = 2 * tokens * latents * 4
    if device.kind == "cuda" and product < shape.weight_bytes:
        parts["decoder in bf16"] = matrix * product
    if shape.auxk and work.dead_share:
        parts["AuxK"] = _auxk(work, shape, mesh, device)
    return parts


def _auxk(work: Workload, shape: DictionaryShape, mesh: Mesh, device: Device) -> float:
    """Rows of dead latents and their gradients; pairs, or products with all of them where they are few."""
    tokens, dead = micro_batch(work, mesh), work.dead_share * local_latents(shape.num_latents, mesh)
    rows = 4 * dead * shape.d_in * shape.weight_bytes
    if dead <= 4 * shape.auxk:
        return rows + 4 * tokens * dead * 4
    block = block_latents(tokens, int(dead), device)
    wanted = min(shape.auxk, shape.auxk * 2 / mesh.shards)  # the capacity factor of AuxK is 2
    keys = selection_bytes_held(tokens, block, wanted) if device.kind == "cuda" else 0
    return rows + tokens * wanted * (_PAIR + 20) + keys
