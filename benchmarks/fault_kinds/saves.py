"""Two processes save one SAE by accelerate's idiom: after each save the folder holds it whole and nothing else.

    python -m benchmarks.fault_kinds.saves

Few folders are saved into again and again: as one file or in pieces, from the SAE itself, out of its wrapper, or from
a gathered state dict.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .outcome import Outcome


_FOLDERS = 3
_ROOT = Path(__file__).resolve().parents[2]
_LAUNCH = ("-m", "accelerate.commands.accelerate_cli", "launch")
_LAUNCH += ("--config_file", str(_ROOT / "accelerate_configs/cpu_gloo.yaml"), "--num_cpu_threads_per_process", "1")


def run(seed: int, count: int = 12) -> Outcome:
    """Launch two processes that save `count` times, and say how many saves were whole.

    Args:
        seed (`int`): Of the weights, the folders and the ways of saving.
        count (`int`, *optional*, defaults to 12): Saves.
    """
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, *_LAUNCH, "-m", __spec__.name, scratch, str(seed), str(count)]
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120 + 10 * count)
        results = Path(scratch, "results.jsonl")
        lines = [json.loads(line) for line in results.open()] if results.exists() else []
    failures = [f"save {number}: {line}" for number, line in enumerate(lines) if line]
    last = done.stderr.strip().splitlines()[-1:] or ["no message"]
    failures += [f"save {number}: not reached, {last[0]}" for number in range(len(lines), count)]
    if done.returncode and not failures:
        failures = [f"all saves are whole, but the run ended with {done.returncode}: {last[0]}"]
    return Outcome("saves", count, count - len(failures), failures)


def save_often(folder: Path, seed: int, count: int) -> None:
    """What each of the two processes does."""
    import random

    import torch
    from accelerate import Accelerator
    from accelerate.utils import gather_object

    from hf_matryoshka_sae import MatryoshkaSAE, MatryoshkaSAEConfig

    accelerator, choices = Accelerator(cpu=True), random.Random(seed)
    assert accelerator.num_processes == 2, "the processes know nothing of each other"
    torch.manual_seed(seed)
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(d_in=16, num_latents=256, k=4))
    model = accelerator.prepare(sae)
    for _ in range(count):
        with torch.no_grad():
            sae.W_enc.normal_()
        place = folder / f"{choices.randrange(_FOLDERS)}"
        arguments = {"is_main_process": accelerator.is_main_process, "save_function": accelerator.save}
        if choices.random() < 0.5:
            arguments["max_shard_size"] = choices.choice(["4KB", "10KB"])
        if choices.random() < 0.5:
            arguments["state_dict"] = accelerator.get_state_dict(model)
        saved = accelerator.unwrap_model(model) if choices.random() < 0.5 else sae
        crashes = []
        try:
            saved.save_pretrained(place, **arguments)
        except Exception as error:
            crashes.append(f"process {accelerator.process_index} raises {error!r}")
        crashes = gather_object(crashes)
        if accelerator.is_main_process:
            fault = "; ".join(filter(None, (*crashes, _fault(place, sae))))
            with (folder / "results.jsonl").open("a") as results:
                results.write(json.dumps(fault) + "\n")
        accelerator.wait_for_everyone()
    accelerator.end_training()


def _fault(place: Path, sae) -> str | None:
    """What is wrong with a saved SAE."""
    import torch
    from transformers import AutoModel

    try:
        loaded = AutoModel.from_pretrained(place).state_dict()
    except (OSError, ValueError) as error:
        return f"does not load: {error}"
    others = [name for name, tensor in sae.state_dict().items() if not torch.equal(loaded[name], tensor)]
    if others:
        return f"other values of {', '.join(others)} than were saved"
    litter = [path.name for path in place.iterdir() if path.suffix not in (".json", ".safetensors")]
    return f"left {', '.join(litter)}" if litter else None


if __name__ == "__main__":
    if len(sys.argv) > 1:
        save_often(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    else:
        sys.stdout.write(f"{run(0)}\n")
