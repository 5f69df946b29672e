"""Tokens per second of harvesting against the bare forward pass, and of a whole run with a profile of its time.

    python benchmarks/throughput.py                       # on the embedded language model
    python benchmarks/throughput.py --config run.yaml --steps 200

Harvesting reads and tokenises text, runs the language model up to the hookpoint, keeps the rows wanted, shuffles them
in the buffer and draws batches. The bare pass is the same truncated forward on token batches that are ready. Both are
timed in turns; the best of each counts, so that other work on the machine weighs little. Results go to
`runs/throughput.json`.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from hf_matryoshka_sae.activations import harvest
from hf_matryoshka_sae.demo import DEMO
from hf_matryoshka_sae.training import RunConfig, load_run_config
from hf_matryoshka_sae.training.run.checkpoints import write_json
from hf_matryoshka_sae.training.run.trainer import Trainer


def harvest_ratio(trainer: Trainer, batches: int, repeats: int) -> dict[str, float]:
    """Tokens per second of the bare truncated forward and of the stream, and their ratio."""
    stream = trainer.harvest.streams[0]
    device = trainer.accelerator.device
    ready = [next(stream.token_stream) for _ in range(batches)]
    tokens = sum(batch.input_ids.numel() for batch in ready)
    next(stream)  # the buffer is full
    passes = 0

    def count(*_) -> None:
        nonlocal passes
        passes += 1

    counter = stream.model.register_forward_pre_hook(count)

    def bare() -> None:
        for batch in ready:
            mask = batch.attention_mask.to(device) if batch.padded else None
            harvest(stream.model, batch.input_ids.to(device), mask, stream.hookpoints)

    def streamed() -> None:
        # The buffer refills in gulps: what counts is the passes made, not the batches drawn.
        while passes < len(ready):
            next(stream)

    best = {"bare": 0.0, "stream": 0.0}
    for _ in range(repeats):
        for name, work in (("bare", bare), ("stream", streamed)):
            passes = 0
            seconds = timed(work, device)
            best[name] = max(best[name], passes / len(ready) * tokens / seconds)
    counter.remove()
    return {
        "bare_tokens_per_second": best["bare"],
        "stream_tokens_per_second": best["stream"],
        "ratio": best["stream"] / best["bare"],
    }


def timed(work, device: torch.device) -> float:
    """Seconds that `work()` takes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def whole_run(trainer: Trainer, steps: int) -> dict:
    """Tokens per second of training steps, the share of time in each part, and the operators that take most."""
    for step in range(3):
        trainer._step(step)
    parts, advance = {"harvest": 0.0, "step": 0.0}, trainer.feed.advance

    def timed() -> None:
        start = time.perf_counter()
        advance()
        parts["harvest"] += time.perf_counter() - start

    trainer.feed.advance = timed
    start = time.perf_counter()
    for step in range(3, steps + 3):
        trainer._step(step)
    total = time.perf_counter() - start
    parts["step"] = total - parts["harvest"]
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for step in range(steps + 3, steps + 13):
            trainer._step(step)
    top = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)[:12]
    everything = sum(event.self_cpu_time_total for event in profiled.key_averages())
    return {
        "tokens_per_second": steps * trainer.config.batch_size / total,
        "share": {name: seconds / total for name, seconds in parts.items()},
        "operators": {event.key: event.self_cpu_time_total / everything for event in top},
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a run's YAML (default: the demo's run)")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batches", type=int, default=40, help="forward passes in each timing of harvesting")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default="runs/throughput.json")
    known, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        flags += [f"--output_dir={folder}"]
        config = (
            load_run_config(known.config, flags)
            if known.config
            else RunConfig.from_dict(DEMO | {"output_dir": folder})
        )
        config.overlap = False  # a thread that reads ahead would be timed with whatever runs beside it
        trainer = Trainer(config)
        result = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": str(trainer.accelerator.device),
            "harvest": harvest_ratio(trainer, known.batches, known.repeats),
            "run": whole_run(trainer, known.steps),
        }
    Path(known.output).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(known.output), result)
    harvested, run = result["harvest"], result["run"]
    out = sys.stdout.write
    out(f"\ntorch {result['torch']}, {result['device']}, {result['threads']} threads\n")
    out(f"bare truncated forward  {harvested['bare_tokens_per_second']:>10.0f} tokens/s\n")
    out(f"harvesting              {harvested['stream_tokens_per_second']:>10.0f} tokens/s\n")
    out(f"ratio                   {harvested['ratio']:>10.3f}\n")
    out(f"whole run               {run['tokens_per_second']:>10.0f} tokens/s\n")
    out("  " + ", ".join(f"{name} {share:.0%}" for name, share in run["share"].items()) + " of the time\n")
    for name, share in run["operators"].items():
        out(f"  {share:>6.1%}  {name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
