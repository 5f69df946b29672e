"""How long commands take to say what they are, or what is wrong, beside what importing torch takes.

    python benchmarks/start_up.py [--rounds 5]

Every line is a fresh process; they run in turns, and the best of all rounds counts: of the time that passes, and of
the processor's, which other work on the machine changes less.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hf_matryoshka_sae.cli import COMMANDS


IMPORTS = {
    "python -c pass": "pass",
    "import torch": "import torch",
    "from transformers import PreTrainedModel": "from transformers import PreTrainedModel",
    "import hf_matryoshka_sae": "import hf_matryoshka_sae",
    "import hf_matryoshka_sae, then MatryoshkaSAE": "import hf_matryoshka_sae; hf_matryoshka_sae.MatryoshkaSAE",
}
WRONG = {
    "a wrong field in the YAML": ["train", "--config", "wrong.yaml"],
    "a wrong flag": ["train", "--config", "run.yaml", "--context_lenght", "64"],
    "a wrong value of a flag": ["train", "--config", "run.yaml", "--saes.0.activation", "batchtopk"],
    "a wrong field in the YAML of a sweep": ["sweep", "--config", "run.yaml", "--sweep.kk", "3"],
    "a wrong format to convert": ["convert", "a", "b", "--to", "saelense"],
    "a wrong value for evaluate": ["evaluate", "embedded", "--tokens", "0"],
    "k above num_latents (needs the models)": ["train", "--config", "run.yaml", "--saes.0.k", "1000"],
}
RUN = """
model: embedded
dataset: embedded
hookpoints: [model.layers.1]
saes: [{type: topk, k: 8, num_latents: 64}]
output_dir: never
"""


def commands() -> dict[str, list[str]]:
    """What is timed, as arguments of Python."""
    cli = ["-m", "hf_matryoshka_sae.cli"]
    helps = {f"{name or 'matryoshka-sae'} --help": [*cli, *name.split(), "--help"] for name in ("", *COMMANDS, "demo")}
    imports = {name: ["-c", code] for name, code in IMPORTS.items()}
    return imports | helps | {name: [*cli, *arguments] for name, arguments in WRONG.items()}


def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds that pass and seconds of the processor, each the best of some rounds in turns."""
    best: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "run.yaml").write_text(RUN)
        Path(folder, "wrong.yaml").write_text(f"{RUN}context_lenght: 64\n")
        for _ in range(rounds):
            for name, arguments in commands().items():
                start, before = time.perf_counter(), os.times()
                done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)
                passed, after = time.perf_counter() - start, os.times()
                if done.returncode != (2 if name in WRONG else 0):
                    raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr}")
                busy = after[2] + after[3] - before[2] - before[3]
                best[name] = [min(pair) for pair in zip((passed, busy), best.get(name, (passed, busy)), strict=True)]
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="of all commands in turns (default: %(default)s)")
    best = measure(parser.parse_args().rounds)
    sys.stdout.write("| | seconds | of import torch | processor | of import torch |\n|---|---:|---:|---:|---:|\n")
    for name, times in best.items():
        cells = [f"{each:.2f} | {each / torch:.2f}" for each, torch in zip(times, best["import torch"], strict=True)]
        sys.stdout.write(f"| {name} | {' | '.join(cells)} |\n")


if __name__ == "__main__":
    main()
