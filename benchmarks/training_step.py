"""What a training step costs: this package, dense autograd and other libraries beside the bare encoder matmul.

    benchmarks/make_environment.sh .venv-benchmarks
    .venv-benchmarks/bin/python benchmarks/training_step.py                 # all shapes, a good half hour on a CPU
    .venv-benchmarks/bin/python benchmarks/training_step.py --shapes 0 --only ours

For each shape (d_in, num_latents, tokens, k) and each contender the matmul, our Matryoshka step and the contender's
step take turns in this process; medians are taken after a warm-up. What counts are ratios to what stood beside it, so
that other work on the machine weighs on all alike. Peak memory is that of weights, optimizer and steps: on a CPU the
growth of a child process's resident set, on a GPU what the allocator counts. Prints a table, writes
`runs/training_step.json` and `.png`, and puts the table into README.md beside this file. Shapes measured on the same
day with the same versions are kept.
"""

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import matplotlib
import torch
from own_steps import MATMUL, MATMUL_PAIR, OURS, Factory, Step, matmul_step, own_steps
from peer_steps import peer_steps
from tqdm.auto import tqdm

from hf_matryoshka_sae.common.files import write_json
from hf_matryoshka_sae.training.run.memory import keep_freed_memory


matplotlib.use("Agg")
from matplotlib import pyplot as plt


SHAPES = {
    "cpu": [(512, 8192, 2048, 32), (768, 32768, 2048, 32), (768, 65536, 1024, 64)],
    "cuda": [
        (512, 8192, 2048, 32),
        (768, 32768, 2048, 32),
        (768, 65536, 1024, 64),
        (2304, 65536, 8192, 64),
        (4096, 262144, 8192, 64),
    ],
}
PACKAGES = ("hf_matryoshka_sae", "torch", "transformers", "sae-lens", "dictionary-learning", "eai-sparsify", "triton")
Shape = tuple[int, int, int, int]


def contenders(shape: Shape, device: str) -> dict[str, Factory]:
    """Everything that is measured beside the matmul, ours first."""
    d_in, num_latents, num_tokens, k = shape
    widths = [num_latents * part // 32 for part in (1, 3, 7, 15, 32)]
    arguments = (d_in, num_latents, num_tokens, k, widths, device)
    return own_steps(*arguments) | peer_steps(*arguments)


def measure(shape: Shape, device: str, steps: int, wanted: list[str]) -> dict[str, dict]:
    """Milliseconds of each contender, and of the matmul and our Matryoshka step beside it."""
    d_in, num_latents, num_tokens, _ = shape
    makers = {name: make for name, make in contenders(shape, device).items() if not wanted or _is_wanted(name, wanted)}
    x = torch.randn(num_tokens, d_in, device=device)
    matmuls = {MATMUL: matmul_step(d_in, num_latents, num_tokens, device)}
    if device == "cuda":
        matmuls[MATMUL_PAIR] = matmul_step(d_in, num_latents, num_tokens, device, pair=True)
    rows = {}
    for name, make in tqdm(makers.items(), desc=f"{shape}"):
        try:
            rows[name] = _beside(name, make, contenders(shape, device)[OURS], matmuls, x, steps)
        except torch.OutOfMemoryError:
            rows[name] = {"error": "out of memory"}
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def _is_wanted(name: str, wanted: list[str]) -> bool:
    return any(part in name for part in wanted)


def _beside(
    name: str, make: Factory, make_ours: Factory, matmuls: dict[str, Step], x: torch.Tensor, steps: int
) -> dict:
    """Medians of `steps` turns."""
    turn = {**matmuls, OURS: make_ours()}
    if name != OURS:
        if x.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if x.is_cuda else 0
        turn[name] = make()
    seconds: dict[str, list[float]] = {part: [] for part in turn}
    for done in range(steps + 2):
        for part, step in turn.items():
            took = timed(step, x)
            if done >= 2:
                seconds[part].append(took)
    medians = {part: 1000 * statistics.median(values) for part, values in seconds.items()}
    row = {"ms": medians[name], "ours_ms": medians[OURS]} | {part: medians[part] for part in matmuls}
    row |= {"x_matmul": row["ms"] / row[MATMUL], "x_ours": row["ms"] / row["ours_ms"]}
    if x.is_cuda and name != OURS:
        row["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return row


def timed(step: Step, x: torch.Tensor) -> float:
    """Seconds of one step, on a GPU until it is done."""
    if x.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    step(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


# Memory


def peak_memory(shape: Shape, device: str, name: str) -> float:
    """Megabytes that weights, optimizer and three steps take at their peak, measured in a child process."""
    command = [sys.executable, __file__, "--memory", name, "--device", device, "--shape", *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return float("nan")
    return json.loads(done.stdout.splitlines()[-1])


def _report_peak(shape: Shape, device: str, name: str) -> None:
    make = contenders(shape, device)[name]
    x = torch.randn(shape[2], shape[0], device=device)
    # What a library loads when first used is not the step's.
    small = (64, 256, 128, 4)
    contenders(small, device)[name]()(torch.randn(128, 64, device=device))
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _resident("VmRSS")
    step = make()
    for _ in range(3):
        step(x)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _resident("VmHWM")
    sys.stdout.write(f"{(peak - before) / 2**20}\n")


def _resident(field: str) -> int:
    """Bytes of the resident set now (VmRSS), or at its peak (VmHWM). Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


# Output


def lines_of(shape: Shape, rows: dict[str, dict]) -> Iterator[str]:
    """The Markdown table of a shape."""
    yield f"**d_in {shape[0]}, {shape[1]:,} latents, {shape[2]:,} tokens, k {shape[3]}**"
    yield ""
    pair = any(MATMUL_PAIR in row for row in rows.values())
    yield "| step | ms | x encoder matmul |" + (" x matmul pair |" if pair else "") + " x ours | peak MB |"
    yield "|---|---:|---:|---:|---:|" + ("---:|" if pair else "")
    first = rows.get(OURS) or next(row for row in rows.values() if "ms" in row)
    yield f"| {MATMUL} | {first[MATMUL]:.1f} | 1.00 |" + (" |" if pair else "") + " | |"
    for name, row in rows.items():
        if "error" in row:
            yield f"| {name} | {row['error']} | | |" + (" |" if pair else "") + " |"
            continue
        share = f" {row['ms'] / row[MATMUL_PAIR]:.2f} |" if pair else ""
        peak = f"{row['peak_mb']:,.0f}" if "peak_mb" in row else ""
        yield f"| {name} | {row['ms']:.1f} | {row['x_matmul']:.2f} |{share} {row['x_ours']:.2f} | {peak} |"
    yield ""


def name_of(shape: Shape) -> str:
    return "d {}, F {}, N {}, k {}".format(*shape)


def measured_before(setting: str, path: Path) -> dict[str, dict[str, dict]]:
    """Shapes that an earlier call measured on the same day with the same versions."""
    before = json.loads(path.read_text()) if path.exists() else {}
    return before.get("shapes", {}) if before.get("setting") == setting else {}


def heading(device: str) -> str:
    """Versions, date and machine."""
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"{date.today()}, {where}, Python {platform.python_version()}, " + ", ".join(
        f"{name} {version(name)}" for name in PACKAGES if _installed(name)
    )


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def write_into_readme(device: str, text: str) -> None:
    """Put the table between its two marks."""
    path = Path(__file__).parent / "README.md"
    begin, end = f"<!-- training_step {device} -->", f"<!-- end of training_step {device} -->"
    before, _, rest = path.read_text().partition(begin)
    _, _, after = rest.partition(end)
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def plot(tables: dict[str, dict[str, dict]], path: Path) -> None:
    """Bars of the ratio to the matmul, one panel a shape."""
    figure, axes = plt.subplots(1, len(tables), figsize=(6.5 * len(tables), 5.5), squeeze=False)
    for axis, (shape, rows) in zip(axes[0], tables.items(), strict=True):
        rows = {name: row for name, row in rows.items() if "ms" in row}
        names, ratios = list(rows)[::-1], [row["x_matmul"] for row in rows.values()][::-1]
        colours = ["tab:blue" if name.startswith("ours") else "0.65" for name in names]
        axis.bar_label(axis.barh(names, ratios, color=colours), fmt="%.1f", padding=2)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(title=shape, xlabel="step time / encoder matmul", xscale="log", xlim=(0.8, 1.6 * max(ratios)))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=10, help="turns that count")
    parser.add_argument("--shapes", type=int, nargs="*", help="which of the shapes; all by default")
    parser.add_argument("--only", nargs="*", default=[], help="parts of names; all by default")
    parser.add_argument("--output_dir", type=Path, default=Path("runs"))
    parser.add_argument("--leave_readme", action="store_true", help="do not put the table into README.md")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=int, nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = arguments.device
    keep_freed_memory()  # as the trainer does; the others get it as well
    if arguments.memory:
        _report_peak(tuple(arguments.shape), device, arguments.memory)
        return
    shapes = SHAPES[device]
    shapes = [shapes[i] for i in arguments.shapes] if arguments.shapes else shapes
    setting, path = heading(device), arguments.output_dir / "training_step.json"
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    tables = measured_before(setting, path)
    for shape in shapes:
        rows = measure(shape, device, arguments.steps, arguments.only)
        for name, row in rows.items():
            if "error" not in row:
                row["peak_mb"] = peak_memory(shape, device, name)
        tables[name_of(shape)] = rows
        write_json(path, {"setting": setting, "shapes": tables})
        plot(tables, arguments.output_dir / "training_step.png")
    text = [setting, ""]
    for shape in SHAPES[device]:
        if name_of(shape) in tables:
            text += lines_of(shape, tables[name_of(shape)])
    sys.stdout.write("\n".join(text) + "\n")
    if not arguments.leave_readme:
        write_into_readme(device, "\n".join(text))


if __name__ == "__main__":
    main()
