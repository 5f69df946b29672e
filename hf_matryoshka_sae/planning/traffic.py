"""The traffic between devices in a step, and its time.

Times follow nccl-tests: of a buffer of b bytes in a group of n, an all-gather moves b (n - 1) / n through each
device's link and an all-reduce twice that. Inside a machine the link is its bus bandwidth. A group that spans machines
sends through as many network ports as it has devices in a machine, side by side, but no faster than inside.
"""

from dataclasses import dataclass

from .counts import Mesh, local_latents, micro_batch, sent_candidates
from .devices import Device
from .workload import Workload


@dataclass(frozen=True)
class Transfer:
    """One kind of collective, summed over a step.

    Args:
        name (`str`): Name of the data that are sent.
        sent (`float`): Bytes that leave each device.
        bandwidth (`float`): Bytes per second of the group that it runs in.
    """

    name: str
    sent: float
    bandwidth: float

    @property
    def seconds(self) -> float:
        """Return the time of the transfer, without latency: messages are large."""
        return self.sent / self.bandwidth if self.sent else 0.0


def step_traffic(work: Workload, mesh: Mesh, device: Device) -> list[Transfer]:
    """Return all collectives of a step; devices of a shard group are neighbours, those of replicas are apart."""
    replicas, shards = mesh.replicas, mesh.shards
    tokens = micro_batch(work, mesh) * work.accumulation
    group, apart = bandwidth(device, shards, 1), bandwidth(device, replicas, shards)
    whole = bandwidth(device, mesh.devices, 1)
    gathers = {"activations": 0.0, "selected values": 0.0, "values over all": 0.0}
    reduces = {"partial sums": 0.0, "gradients": 0.0}
    if shards > 1:
        gathers["activations"] = tokens * sum(work.lm.widths.values()) * work.lm.bytes_each
    for shape in work.dictionaries:
        chosen = tokens * sent_candidates(work, shape, mesh) * 4
        if shape.activation == "batch_topk":
            gathers["values over all"] += chosen * mesh.devices
        elif shape.activation == "topk":
            gathers["selected values"] += chosen * shards
        if shards > 1:
            reduces["partial sums"] += tokens * shape.prefixes * shape.d_in * 4 * shape.decodes
            if shape.auxk and work.dead_share:
                reduces["partial sums"] += tokens * shape.d_in * 4
                gathers["selected values"] += tokens * min(shape.auxk, 2 * shape.auxk / shards) * shards * 4
        reduces["gradients"] += 2 * local_latents(shape.num_latents, mesh) * shape.d_in * shape.weight_bytes
    return [
        Transfer("activations", gathers["activations"] * _share(shards), group),
        Transfer("selected values", gathers["selected values"] * _share(shards), group),
        Transfer("values over all", gathers["values over all"] * _share(mesh.devices), whole),
        Transfer("partial sums", 2 * reduces["partial sums"] * _share(shards), group),
        Transfer("gradients", 2 * reduces["gradients"] * _share(replicas), apart),
    ]


def _share(size: int) -> float:
    return (size - 1) / size


def bandwidth(device: Device, size: int, stride: int) -> float:
    """Return the bus bandwidth of a group of `size` devices, each `stride` after the one before."""
    inside = min(size, max(1, device.per_machine // stride))
    return device.link if inside == size else min(device.link, inside * device.network)
