"""The memory of a device, part by part, in each phase of a run; its peak is that of the largest phase.

Phases: the start (weights are made and first values drawn), a step, a checkpoint (written from where the tensors lie,
in chunks), the end (a copy of the dictionary is finished and saved while the optimizer's state is still there), and
the closing evaluation (of dictionaries loaded back; on a CPU their files are mapped, and the encoder is read whole).
"""

from dataclasses import dataclass

import torch

from ..training.data.text import overlaps
from ..training.run.report import LARGEST_RANDOM
from .counts import (
    Mesh,
    block_latents,
    local_latents,
    micro_batch,
    own_candidates,
    selection_bytes_held,
    sent_candidates,
)
from .devices import Device
from .workload import BYTES, DictionaryShape, Workload


# Bytes of a (token, latent) pair through a step: its place twice, its value, its order by latent, and gradients.
_PAIR = 72
# Tensors of the size of the batch: raw, normalised, centred, and what statistics form of them.
_BATCH_COPIES = 6
_EVALUATION = 0.2e9  # measured: similarities of sampled tokens, logits
_DRAWN = 4 * 2**26  # bytes of the first weights that are drawn at once


@dataclass(frozen=True)
class Memory:
    """The bytes that a run takes on one device.

    Args:
        phases (`dict[str, dict[str, float]]`): Bytes of each part, by phase.
    """

    phases: dict[str, dict[str, float]]

    @property
    def peak_phase(self) -> str:
        """Return the phase that takes most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def parts(self) -> dict[str, float]:
        """Return the parts of that phase."""
        return self.phases[self.peak_phase]

    @property
    def peak(self) -> float:
        """Return the bytes of that phase."""
        return sum(self.parts.values())


def memory(work: Workload, mesh: Mesh, device: Device) -> Memory:
    """Return the phases of a run on one device of a mesh."""
    held = _held(work, mesh, device)
    matrices = [_matrix(shape, mesh) * shape.weight_bytes for shape in work.dictionaries]
    begun = {name: held[name] for name in ("process", "language model", "shuffle buffer", "weights", "counters")}
    block = {"encoder block": _block(work, mesh, device)} if device.kind == "cpu" else {}  # kept from step to step
    finished = {"finished copy": 2 * max(matrices) + max(_unaveraged(work, mesh))}
    mapped = device.kind == "cpu" and mesh.shards == 1
    evaluated = {"saved dictionary": (1 if mapped else 2) * sum(matrices), "evaluation": _EVALUATION}
    if mesh.shards > 1 and device.kind == "cpu":  # a shard's rows are read, then copied into its model
        evaluated["evaluation"] = max(_EVALUATION, 2 * max(matrices))
    beside = [_matrix(shape, mesh) for shape in work.dictionaries if work.baselines and mesh.shards == 1]
    beside = [4 * weights for weights in beside if weights <= LARGEST_RANDOM]
    evaluated["random dictionaries"] = 2 * sum(beside) + max(beside, default=0)  # one is being drawn
    if work.lm_processes:  # those that hold dictionaries load it only now
        evaluated["language model"] = _language_model(work)
    return Memory(
        {
            "start": begun | {"first weights": 3 * min(max(matrices), _DRAWN)},
            "step": held | _step(work, mesh, device),
            "checkpoint": held | block | {"shuffle buffer copy": held["shuffle buffer"]},
            "end": held | block | finished,
            "evaluation": held | block | evaluated,
        }
    )


def reader_bytes(work: Workload, device: Device) -> float:
    """Return the bytes of a process that only runs the language model (`lm_processes`)."""
    return device.process + _language_model(work) + _shuffle_buffer(work, work.lm_processes or 1, device)


def _language_model(work: Workload) -> float:
    """Return the bytes of the weights and of a forward pass."""
    return (work.lm.parameters + work.window_tokens * work.lm.hidden) * work.lm.bytes_each


def _shuffle_buffer(work: Workload, readers: int, device: Device) -> float:
    """Return the bytes of hidden states that wait; half as many again are read ahead."""
    rows = max(work.buffer_tokens, 2 * work.batch_size // (work.accumulation * readers) + work.window_tokens)
    ahead = 1.5 if overlaps(work.overlap, torch.device(device.kind), readers) else 1.0
    return rows * ahead * sum(work.lm.widths.values()) * (4 if device.kind == "cpu" else work.lm.bytes_each)


def _unaveraged(work: Workload, mesh: Mesh) -> list[float]:
    """Return the bytes of the quotient by which an average becomes a weight, by matrix."""
    return [_matrix(shape, mesh) * 4 * shape.averaged for shape in work.dictionaries]


def _matrix(shape: DictionaryShape, mesh: Mesh) -> int:
    return local_latents(shape.num_latents, mesh) * shape.d_in


def _held(work: Workload, mesh: Mesh, device: Device) -> dict[str, float]:
    """Return the bytes that are held throughout training, by part."""
    shapes, reads = work.dictionaries, not work.lm_processes
    counts = [local_latents(shape.num_latents, mesh) for shape in shapes]
    return {
        "process": device.process + (5 * work.pool_tokens if device.kind == "cpu" and reads else 0),
        "language model": _language_model(work) if reads else 0.0,
        "shuffle buffer": _shuffle_buffer(work, mesh.devices, device) if reads else 0.0,
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
    """Return the bytes that a step adds: all gradients, and the temporaries of the dictionary that takes most."""
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
    block, chosen = block_latents(tokens, latents, device), own_candidates(work, shape, mesh)
    competing = shape.activation in ("topk", "batch_topk")
    selection = tokens * chosen * 40 if competing else 0.0
    if competing and mesh.devices > 1:
        over = mesh.devices if shape.activation == "batch_topk" else mesh.shards
        selection += 2 * tokens * sent_candidates(work, shape, mesh) * over * 4  # gathered values, joined
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
    """Return the bytes of dead latents' rows and gradients, and of pairs, or of all products where they are few."""
    tokens, dead = micro_batch(work, mesh), work.dead_share * local_latents(shape.num_latents, mesh)
    rows = 4 * dead * shape.d_in * shape.weight_bytes
    if dead <= 4 * shape.auxk:
        return rows + 4 * tokens * dead * 4
    block = block_latents(tokens, int(dead), device)
    keys = selection_bytes_held(tokens, block, shape.auxk) if device.kind == "cuda" else 0
    return rows + tokens * shape.auxk * (_PAIR + 20) + keys
