"""What `matryoshka-sae plan` foretells of a run on this machine, beside what the run then takes.

    python benchmarks/planner.py                  # all shapes; the largest takes 8 GB and a few minutes
    python benchmarks/planner.py --shapes 0 2     # only these

Each shape is trained for a few steps on the embedded language model in a process of its own, with a checkpoint on the
way, calibration, saving and the closing evaluation. Memory is the largest resident set of that process; a step's time
is the median of the steps after the first. Prints a table and writes it to `planner.md` beside this file.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from hf_matryoshka_sae.common.files import write_text
from hf_matryoshka_sae.planning import find_device, make_plan, read_workload
from hf_matryoshka_sae.planning.report import table
from hf_matryoshka_sae.training import load_run_config


STEPS = 6
# A name, an entry of `saes`, tokens in a step, and the share of latents that the run will find dead.
SHAPES = [
    ("TopK", {"type": "topk", "num_latents": 16_384, "k": 32}, 1024, 0.0),
    ("ReLU, half of all latents fire", {"type": "relu", "num_latents": 16_384}, 1024, 0.0),
    ("Matryoshka of BatchTopK", {"type": "matryoshka", "num_latents": 65_536, "k": 32}, 1024, 0.0),
    ("TopK, most latents dead", {"type": "topk", "num_latents": 131_072, "k": 32, "dead_tokens": 512}, 512, 0.95),
    (
        "BatchTopK, averaged weights",
        {"type": "batch_topk", "num_latents": 262_144, "k": 64, "ema_decay": 0.99},
        512,
        0.0,
    ),
    ("Matryoshka of BatchTopK", {"type": "matryoshka", "num_latents": 1_048_576, "k": 32}, 512, 0.0),
]


# Where there is /proc, the peak is read there: the other measure begins with what the parent had.
_RUN = """
import sys
from pathlib import Path
from hf_matryoshka_sae.train import main
status = main(sys.argv[2:])
told = Path("/proc/self/status")
if told.exists():
    peak = next(line for line in told.read_text().splitlines() if line.startswith("VmHWM"))
    Path(sys.argv[1]).write_text(str(int(peak.split()[1]) * 1024))
sys.exit(status)
"""


def flags(entry: dict, batch_size: int, folder: str) -> list[str]:
    """The command-line flags of a run of a few steps."""
    fields = {
        "model": "embedded",
        "dataset": "embedded",
        "hookpoints": ["model.layers.2"],
        "saes": [entry],
        "tokens": STEPS * batch_size,
        "batch_size": batch_size,
        "checkpoint_every": STEPS // 2,
        "keep_checkpoints": 1,
        "calibration_tokens": 4 * batch_size,
        "normalization_tokens": 8192,
        "eval_tokens": 2048,
        "log_every": 1,
        "output_dir": folder,
    }
    return [f"--{name}={json.dumps(value)}" for name, value in fields.items()]


def run(arguments: list[str], folder: Path, batch_size: int) -> tuple[float, float]:
    """Train in a process of its own: bytes at its peak, and seconds of a step."""
    command = [sys.executable, "-c", _RUN, str(folder / "peak.txt"), *arguments]
    log = folder / "log.txt"
    with open(log, "wb") as output:
        child = subprocess.Popen(command, stdout=output, stderr=output)
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise RuntimeError(f"The run ended with status {status}: {log.read_text()[-2000:]}")
    peak, unit = folder / "peak.txt", 1 if sys.platform == "darwin" else 1024
    peak_bytes = int(peak.read_text()) if peak.exists() else usage.ru_maxrss * unit
    return peak_bytes, _step_seconds(folder / "metrics.jsonl", batch_size)


def _step_seconds(path: Path, batch_size: int) -> float:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    times = [row["step"] * batch_size / row["tokens_per_second"] for row in rows]
    return statistics.median(b - a for a, b in zip(times, times[1:], strict=False))


def measure(number: int) -> dict:
    """Foretell and train one shape."""
    name, entry, batch_size, dead = SHAPES[number]
    with tempfile.TemporaryDirectory() as folder:
        arguments = flags(entry, batch_size, folder)
        work = read_workload(load_run_config(None, arguments), dead_share=dead)
        layout = make_plan(work, 1, find_device("cpu")).layouts[0]
        peak, seconds = run(arguments, Path(folder), batch_size)
    return {
        "name": name,
        "latents": entry["num_latents"],
        "batch": batch_size,
        "phase": layout.memory.peak_phase,
        "planned_bytes": layout.memory.peak,
        "bytes": peak,
        "planned_seconds": layout.step_seconds,
        "seconds": seconds,
    }


def as_table(rows: list[dict], markdown: bool) -> str:
    """Planned, measured and their ratio."""
    head = [
        "run",
        "latents",
        "tokens",
        "peak at",
        "GB planned",
        "measured",
        "ratio",
        "step s planned",
        "measured",
        "ratio",
    ]
    cells = [
        [
            row["name"],
            f"{row['latents']:,}",
            str(row["batch"]),
            row["phase"],
            f"{row['planned_bytes'] / 1e9:.2f}",
            f"{row['bytes'] / 1e9:.2f}",
            f"{row['planned_bytes'] / row['bytes']:.2f}",
            f"{row['planned_seconds']:.2f}",
            f"{row['seconds']:.2f}",
            f"{row['planned_seconds'] / row['seconds']:.2f}",
        ]
        for row in rows
    ]
    return table(head, cells, markdown)


def main() -> None:
    """Measure the shapes asked for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, nargs="+", default=list(range(len(SHAPES))))
    parser.add_argument("--output", default=str(Path(__file__).with_suffix(".md")))
    parsed = parser.parse_args()
    rows = []
    for number in parsed.shapes:
        rows.append(measure(number))
        sys.stdout.write(as_table(rows[-1:], markdown=False) + "\n")
        sys.stdout.flush()
    about = (
        f"{date.today()}, {platform.machine()}, {torch.get_num_threads()} thread(s), Python "
        f"{platform.python_version()}, torch {version('torch')}, transformers {version('transformers')}."
    )
    text = (
        f"# Planned and measured\n\n    python benchmarks/planner.py\n\n{about}\n\n{as_table(rows, markdown=True)}\n"
    )
    write_text(Path(parsed.output), text)


if __name__ == "__main__":
    main()
