"""All layouts of a run on some devices: memory, traffic, time; the best of them, or options that make one fit."""

from dataclasses import dataclass, replace
from typing import Any

from ..training.config.run import RunConfig
from .counts import Mesh, Part, language_model_part, step_parts
from .devices import Device
from .memory import Memory, memory, reader_bytes
from .traffic import Transfer, step_traffic
from .workload import Workload


@dataclass(frozen=True)
class LayoutPlan:
    """A layout and its cost.

    Args:
        mesh ([`Mesh`]): Numbers of replicas and shards.
        device ([`Device`]): The device, which all are alike.
        memory ([`Memory`]): Memory of one device.
        compute (`tuple` of [`Part`]): Parts of a step on one device.
        traffic (`tuple` of [`Transfer`]): Collectives of a step.
        steps (`int`): Optimizer steps of the run.
        reader_bytes (`float`): Memory of a process that only runs the language model (`lm_processes`); 0 without such.
        reader_seconds (`float`): Seconds of such a process for a step; 0 without such.
    """

    mesh: Mesh
    device: Device
    memory: Memory
    compute: tuple[Part, ...]
    traffic: tuple[Transfer, ...]
    steps: int
    reader_bytes: float = 0.0
    reader_seconds: float = 0.0

    @property
    def fits(self) -> bool:
        """Return whether the peak leaves the device's headroom free."""
        return max(self.memory.peak, self.reader_bytes) <= self.device.usable

    @property
    def step_seconds(self) -> float:
        """Return the seconds of one step: parts and transfers in turn, beside processes that only read."""
        own = sum(part.seconds(self.device) for part in self.compute) + self.traffic_seconds
        return max(own, self.reader_seconds)

    @property
    def traffic_seconds(self) -> float:
        """Return the seconds of communication in one step."""
        return sum(transfer.seconds for transfer in self.traffic)

    @property
    def run_seconds(self) -> float:
        """Return the seconds of all steps."""
        return self.steps * self.step_seconds

    def to_dict(self) -> dict[str, Any]:
        """Return the plan's numbers for a JSON file, in bytes and seconds."""
        return {
            "replicas": self.mesh.replicas,
            "latent_shards": self.mesh.shards,
            "fits": self.fits,
            "peak_bytes": self.memory.peak,
            "peak_phase": self.memory.peak_phase,
            "memory": self.memory.phases,
            "compute": {
                part.name: {"flops": part.flops, "bytes": part.moved, "seconds": part.seconds(self.device)}
                for part in self.compute
            },
            "traffic": {move.name: {"bytes": move.sent, "seconds": move.seconds} for move in self.traffic},
            "step_seconds": self.step_seconds,
            "run_seconds": self.run_seconds,
        }


@dataclass(frozen=True)
class Plan:
    """All layouts of a run.

    Args:
        work ([`Workload`]): The run.
        device ([`Device`]): Each device.
        layouts (`tuple` of [`LayoutPlan`]): From all replicas to all shards.
        skipped (`tuple[str, ...]`): Layouts over which batch or latents cannot be divided.
    """

    work: Workload
    device: Device
    layouts: tuple[LayoutPlan, ...]
    skipped: tuple[str, ...] = ()

    @property
    def best(self) -> LayoutPlan | None:
        """Return the fastest layout that fits, `None` where none does."""
        return min(
            (layout for layout in self.layouts if layout.fits), key=lambda plan: plan.step_seconds, default=None
        )


def make_plan(work: Workload, devices: int, device: Device) -> Plan:
    """Return the plans of all layouts R x S of `devices`.

    Raises:
        `ValueError`: if `devices` is not positive, or the batch can be divided over no layout.
    """
    if devices < 1:
        raise ValueError(f"--devices must be at least 1, got {devices}.")
    readers = work.lm_processes or devices
    holders = devices - (work.lm_processes or 0)
    if holders < 1:
        raise ValueError(
            f"`lm_processes: {work.lm_processes}` leaves none of {devices} processes for the dictionaries."
        )
    meshes = [Mesh(holders // shards, shards) for shards in range(1, holders + 1) if holders % shards == 0]
    layouts, skipped = [], []
    for mesh in meshes:
        # Each reader has its own share of the batch, and each replica that of as many readers.
        splits_batch = not work.batch_size % (readers * work.accumulation) and not readers % mesh.replicas
        if not splits_batch or any(mesh.shards > shape.num_latents for shape in work.dictionaries):
            skipped.append(str(mesh))
        else:
            layouts.append(plan_layout(work, mesh, device))
    if not layouts:
        raise ValueError(
            f"`batch_size` ({work.batch_size}) must be a multiple of processes that run the language model x "
            f"gradient_accumulation_steps ({readers} x {work.accumulation}), and every dictionary must have at least "
            f"{holders} latents, one for each process that holds it."
        )
    return Plan(work, device, tuple(layouts), tuple(skipped))


def plan_layout(work: Workload, mesh: Mesh, device: Device) -> LayoutPlan:
    """Return the cost of one layout."""
    return LayoutPlan(
        mesh,
        device,
        memory(work, mesh, device),
        tuple(step_parts(work, mesh, device)),
        tuple(step_traffic(work, mesh, device)),
        work.steps,
        reader_bytes(work, device) if work.lm_processes else 0.0,
        language_model_part(work, work.lm_processes).seconds(device) if work.lm_processes else 0.0,
    )


def yaml_lines(config: RunConfig, layout: LayoutPlan) -> list[str]:
    """Return the lines of the run's YAML that ask for a layout."""
    lines = [f"latent_shards: {layout.mesh.shards}"]
    if config.gradient_accumulation_steps > 1:
        lines.append(f"gradient_accumulation_steps: {config.gradient_accumulation_steps}")
    return lines


# Tried in this order where nothing fits: as asked for, then what rounds ever more.
_SMALLER_TYPES = (
    ({}, ""),
    ({"moment_bytes": 2}, "optimizer_dtype: bfloat16"),
    ({"moment_bytes": 1}, "optimizer_dtype: int8"),
    ({"moment_bytes": 1, "weight_bytes": 2}, "optimizer_dtype: int8, weights_dtype: bfloat16"),
)
_MOST_MICRO_BATCHES, _MOST_DEVICES = 64, 4096


def what_would_fit(work: Workload, devices: int, device: Device) -> list[str]:
    """Return, where no layout fits, how many devices would do, and options with which fewer would.

    More micro-batches are tried first (they change no result), and twice as many devices each time.
    """
    hints, fewest = [], _MOST_DEVICES + 1
    for fields, lines in _SMALLER_TYPES:
        count = devices
        while count < fewest:
            plan = _with_micro_batches(_with_types(work, fields), count, device)
            if plan is not None:
                hints.append(_hint(plan, work, lines))
                fewest = count
                break
            count *= 2
    return hints or [f"No option helps on up to {_MOST_DEVICES} devices: take a smaller dictionary."]


def _with_types(work: Workload, fields: dict[str, int]) -> Workload:
    shapes = (
        replace(shape, **{name: min(size, getattr(shape, name)) for name, size in fields.items()})
        for shape in work.dictionaries
    )
    return replace(work, dictionaries=tuple(shapes))


def _with_micro_batches(work: Workload, devices: int, device: Device) -> Plan | None:
    parts = work.accumulation
    while parts <= _MOST_MICRO_BATCHES and work.batch_size % (devices * parts) == 0:
        plan = make_plan(replace(work, accumulation=parts), devices, device)
        if plan.best is not None:
            return plan
        parts *= 2
    return None


def _hint(plan: Plan, work: Workload, lines: str) -> str:
    best = plan.best
    assert best is not None
    settings = [lines] if lines else []
    if plan.work.accumulation > work.accumulation:
        settings.append(f"gradient_accumulation_steps: {plan.work.accumulation}")
    settings.append(f"latent_shards: {best.mesh.shards}")
    devices = best.mesh.devices + (work.lm_processes or 0)
    return f"{devices} devices with {', '.join(settings)} ({best.memory.peak / 1e9:.1f} GB each)"
