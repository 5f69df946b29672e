"""Devices: memory, arithmetic, bandwidths; from data sheets, or measured on this machine.

Peaks are those of NVIDIA's data sheets for the SXM modules, dense (without structured sparsity). What a run reaches of
them is an assumption, written into the device as `matmul_share` and `memory_share`.
"""

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from ..common.command import nearest


if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Device:
    """One device of a machine, and how it reaches the others.

    Args:
        name (`str`): Name, as `--device` takes it.
        memory (`float`): Size of the memory in bytes.
        flops (`dict[str, float]`): Peak operations per second by type of the product, `"float32"` and `"bfloat16"`.
        bandwidth (`float`): Bytes per second between the device and its memory.
        link (`float`): Bus bandwidth of a collective inside a machine, bytes per second, as nccl-tests defines it.
        network (`float`): Bytes per second that one device can send to other machines.
        process (`float`): Bytes that a process takes before it holds anything: libraries, CUDA context, NCCL.
        per_machine (`int`): Devices in a machine.
        matmul_share (`float`): Share of `flops` that matmuls reach.
        memory_share (`float`): Share of `bandwidth` that passes over memory reach.
        headroom (`float`): Share of the memory that is left free, for fragmentation.
    """

    name: str
    memory: float
    flops: dict[str, float]
    bandwidth: float
    link: float
    network: float
    process: float = 1.5e9
    per_machine: int = 8
    matmul_share: float = 0.5
    memory_share: float = 0.7
    headroom: float = 0.08

    @property
    def kind(self) -> str:
        """Return `"cpu"` or `"cuda"`."""
        return "cpu" if self.name == "cpu" else "cuda"

    @property
    def usable(self) -> float:
        """Return the number of bytes that a run may take."""
        return self.memory * (1 - self.headroom)

    def rate(self, dtype: str) -> float:
        """Return the operations per second that a matmul of this type reaches."""
        return self.flops[dtype] * self.matmul_share

    @property
    def stream(self) -> float:
        """Return the bytes per second that a pass over memory reaches."""
        return self.bandwidth * self.memory_share


# Inside a machine: what nccl-tests' all_reduce_perf reaches at large sizes, about 370 GB/s on NVLink 4 (900 GB/s both
# ways) and 230 on NVLink 3. Between machines: one 400 Gb/s (H100, H200) or 200 Gb/s (A100) port for each device, nine
# tenths of the line rate.
DEVICES = {
    "h200": Device("h200", 141e9, {"float32": 67e12, "bfloat16": 989e12}, 4.8e12, 370e9, 45e9),
    "h100": Device("h100", 80e9, {"float32": 67e12, "bfloat16": 989e12}, 3.35e12, 370e9, 45e9),
    "a100-80": Device("a100-80", 80e9, {"float32": 19.5e12, "bfloat16": 312e12}, 2.04e12, 230e9, 22e9),
    "a100-40": Device("a100-40", 40e9, {"float32": 19.5e12, "bfloat16": 312e12}, 1.56e12, 230e9, 22e9),
}

# Measured: what is resident once a run has loaded a small language model and its text, without its buffer.
_CPU_PROCESS = 0.48e9


def find_device(name: str, per_machine: int | None = None) -> Device:
    """Return the device called `name`.

    Args:
        name (`str`): One of `DEVICES`; an amount of memory such as `"80GB"` (in other respects an H100); or `"cpu"`,
            one process of this machine, whose speed is measured in a second.
        per_machine (`int`, *optional*): Devices in a machine, 8 by default; processes on this machine for `"cpu"`.

    Raises:
        `ValueError`: for any other name.
    """
    key = name.lower()
    if key == "cpu":
        return _this_machine(per_machine or 1)
    amount = re.fullmatch(r"(\d+(?:\.\d+)?)\s*g(i?)b", key)
    if amount:
        size = float(amount[1]) * (2**30 if amount[2] else 1e9)
        device = replace(DEVICES["h100"], name=name, memory=size)
    elif key in DEVICES:
        device = DEVICES[key]
    else:
        known = ", ".join([*DEVICES, "cpu"])
        raise ValueError(f'Unknown device {name!r}: take {known}, or an amount such as "80GB".{nearest(key, DEVICES)}')
    return replace(device, per_machine=per_machine) if per_machine else device


def _this_machine(processes: int) -> Device:
    import torch

    memory = psutil.virtual_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="utf-8").strip() if limit.exists() else "max"
    memory = memory if text == "max" else min(memory, int(text))
    rates = {dtype: _matmul_rate(getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}
    bandwidth = _copy_rate()
    return Device(
        "cpu",
        memory / processes,
        rates,
        bandwidth,
        link=bandwidth / 4,  # gloo over loopback copies into and out of a socket on either side
        network=1.25e9,  # 10 Gb/s
        process=_CPU_PROCESS,
        per_machine=processes,
        matmul_share=1.0,
        memory_share=1.0,
    )


def _usual_time(work: Callable[[], object], seconds: float = 0.3) -> float:
    """Return the median time of several runs, with the machine as busy as it will be in training."""
    work()
    times, began = [], time.perf_counter()
    while not times or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _matmul_rate(dtype: "torch.dtype") -> float:
    """Return the operations per second of an encoder's matmul: few columns, a result that leaves the cache."""
    import torch

    x, weights = torch.ones(512, 128, dtype=dtype), torch.ones(16384, 128, dtype=dtype)
    out = torch.empty(512, 16384, dtype=dtype)
    return 2 * 512 * 128 * 16384 / _usual_time(lambda: torch.mm(x, weights.T, out=out))


def _copy_rate() -> float:
    """Return the bytes per second read and written by a copy that fits no cache."""
    import torch

    source = torch.ones(2**25)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _usual_time(lambda: target.copy_(source))
