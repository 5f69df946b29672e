"""What a progressive curve at 32 widths costs beside an evaluation at one width.

    python benchmarks/curve.py [--model embedded --hookpoint model.layers.2] [--num_latents 4096] [--tokens 60000]

Both go over the same held-out tokens: language model, encoder, reconstruction metrics at each width. Measured in
turns; the medians and their ratio are printed, and written to `runs/curve.json`. The weights are random: time does not
depend on them once thresholds let k latents fire per token.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hf_matryoshka_sae.common.files import write_json
from hf_matryoshka_sae.evaluation import HeldOut, open_heldout
from hf_matryoshka_sae.models import MatryoshkaSAEConfig, build_sae
from hf_matryoshka_sae.progressive import calibrate_thresholds, latent_statistics, progressive_curve


def main() -> int:
    """Measure and print; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--hookpoint", default="model.layers.2")
    parser.add_argument("--num_latents", type=int, default=4096)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--output", default="runs/curve.json")
    options = parser.parse_args()
    data = open_heldout(options.model, options.hookpoint, tokens=options.tokens)
    sae = _dictionary(data, options.num_latents, options.k)
    widths = [round(options.num_latents * step / 32) for step in range(1, 33)]
    known = latent_statistics(sae, data)

    def curve(widths: list[int], rate: bool) -> Callable[[], object]:
        return lambda: progressive_curve(
            sae, data, widths, statistics=known, rate=rate, loss_widths=[], similarity_tokens=0, show=False
        )

    jobs = {
        "harvest alone": lambda: [len(x) for x in data.activations()],
        "1 width": curve(widths[-1:], False),
        "32 widths": curve(widths, False),
        "1 width, with bits": curve(widths[-1:], True),
        "32 widths, with bits": curve(widths, True),
    }
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(options.turns + 1):  # the first turn warms up
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}
    ratios = {
        "32 widths / 1": medians["32 widths"] / medians["1 width"],
        "32 widths / 1, with bits": medians["32 widths, with bits"] / medians["1 width, with bits"],
    }
    out = sys.stdout.write
    threads = torch.get_num_threads()
    out(f"torch {torch.__version__}, {threads} threads, F {options.num_latents}, {data.tokens} tokens\n")
    for name, seconds in medians.items():
        out(f"{name:<22} {seconds:7.2f} s\n")
    for name, ratio in ratios.items():
        out(f"{name:<24} {ratio:.2f}\n")
    write_json(Path(options.output), {"options": vars(options), "seconds": medians, "ratios": ratios})
    return 0


def _dictionary(data: HeldOut, num_latents: int, k: int):
    """Random directions about the mean, with a threshold that lets k latents fire."""
    x = torch.cat(list(data.activations()))
    sae = build_sae(MatryoshkaSAEConfig(d_in=x.shape[1], num_latents=num_latents, k=k, activation="batch_topk")).eval()
    sae.b_dec.data = x.mean(0)
    calibrate_thresholds(sae, [x], [k], widths=[num_latents])
    return sae


if __name__ == "__main__":
    sys.exit(main())
