"""A dictionary of a million latents on an ordinary machine: trained, saved, loaded by prefix, pruned.

    python benchmarks/million.py                   # 6 GB of memory, 6 GB of disk, some minutes on two cores
    python benchmarks/million.py --steps 4         # only as many steps

Each phase runs in a process of its own; its largest resident set is measured, and that of training is set beside what
`matryoshka-sae plan` foretells. Prints a table and writes it to `million.md` beside this file.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

from hf_matryoshka_sae.common.files import write_text
from hf_matryoshka_sae.planning import find_device, make_plan, read_workload
from hf_matryoshka_sae.training import load_run_config


HERE = Path(__file__).parent
CONFIG = HERE.parent / "examples" / "million_latents.yaml"
PREFIXES = (4_096, 131_072)

# Each gets the folder of the saved SAE and prints numbers as JSON. VmHWM, unlike ru_maxrss, is this process's alone.
_PEAK = "int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) * 1024"
_LOAD = f"""
import json, sys
from transformers import AutoModel
import hf_matryoshka_sae
before = {_PEAK}
sae = AutoModel.from_pretrained(sys.argv[1], width=int(sys.argv[2]))
print(json.dumps({{"latents": sae.config.num_latents, "before": before, "peak": {_PEAK}}}))
"""
_PRUNE = f"""
import json, sys
from transformers import AutoModel
from hf_matryoshka_sae.evaluation import Dictionary, evaluate_fidelity, open_heldout
from hf_matryoshka_sae.progressive import prune
sae = AutoModel.from_pretrained(sys.argv[1])
data = open_heldout("embedded", sae.config.hookpoint, tokens=4000)
small = prune(sae, 16_384, activations=data)
small.save_pretrained(sys.argv[2])
pruned = AutoModel.from_pretrained(sys.argv[2])
subjects = {{"pruned": Dictionary(pruned), "first": Dictionary(sae.truncate(16_384))}}
found = evaluate_fidelity(data, subjects, language_model=False, similarity_tokens=0)
rows = {{name: rows[-1]["fvu"] for name, rows in found["subjects"].items()}}
print(json.dumps({{"latents": pruned.config.num_latents, "fvu": rows, "peak": {_PEAK}}}))
"""
_TRAIN = f"""
import json, sys
from hf_matryoshka_sae.train import main
status = main(sys.argv[1:])
print(json.dumps({{"status": status, "peak": {_PEAK}}}))
"""


def phase(code: str, *arguments: str) -> dict:
    """Run a phase in a process of its own; what it printed last, and the seconds it took."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return {**json.loads(done.stdout.strip().splitlines()[-1]), "seconds": time.monotonic() - began}


def measure(steps: int | None, folder: str) -> tuple[list[str], dict]:
    """The table's rows, and what training logged."""
    flags = ["--output_dir", f"{folder}/run"] + (["--tokens", str(1024 * steps)] if steps else [])
    config = load_run_config(CONFIG, flags)
    planned = make_plan(read_workload(config), 1, find_device("cpu")).best
    trained = phase(_TRAIN, "--config", str(CONFIG), *flags)
    name = next(Path(folder, "run").glob("*/*/config.json")).parent
    rows = [row("train, save, evaluate", config.saes[0].num_latents, trained, planned.memory.peak / 1e9)]
    for width in PREFIXES:
        rows.append(row(f"load the first {width:,}", width, phase(_LOAD, str(name), str(width))))
    pruned = phase(_PRUNE, str(name), f"{folder}/pruned")
    rows.append(row("statistics, prune, save, load", pruned["latents"], pruned))
    lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").open()]
    fvu = [next(iter(line["saes"].values()))["fvu"][-1] for line in lines]
    size = sum(file.stat().st_size for file in name.iterdir()) / 1e9
    return rows, {"fvu": (fvu[0], fvu[-1]), "steps": lines[-1]["step"], "size": size, "pruned": pruned["fvu"]}


def row(what: str, latents: int, found: dict, planned: float | None = None) -> str:
    """A line of the table."""
    peak = found["peak"] / 1e9
    beside = "" if planned is None else f"{planned:.2f} ({planned / peak:.2f} x)"
    return f"| {what} | {latents:,} | {peak:.2f} | {beside} | {found['seconds']:.0f} |"


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="optimizer steps (default: those of the YAML file)")
    parser.add_argument("--output", default=str(HERE / "million.md"))
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows, told = measure(parsed.steps, folder)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    text = "\n".join(
        [
            "# A million latents",
            "",
            f"    {' '.join(['python', 'benchmarks/million.py', *sys.argv[1:]])}",
            "",
            f"{date.today()}, {platform.machine()}, {threads} thread(s), Python {platform.python_version()}, "
            f"{versions}.",
            "",
            "| phase | latents | peak GB | planned GB | seconds |",
            "| --- | ---: | ---: | ---: | ---: |",
            *rows,
            "",
            f"d_in 128; {told['size']:.2f} GB on disk. FVU of a batch {told['fvu'][0]:.3f} at the first step, "
            f"{told['fvu'][1]:.3f} at step {told['steps']}.",
            f"FVU of 16,384 latents on held-out text: {told['pruned']['pruned']:.3f} pruned by energy, "
            f"{told['pruned']['first']:.3f} the first ones.",
            "",
        ]
    )
    write_text(Path(parsed.output), text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
