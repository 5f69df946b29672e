"""What encoding a prefix, and decoding alone, cost beside the whole encoder's matmul.

    python benchmarks/inference.py

Prints a table and writes `runs/inference.json`. `width=n` should cost n / F of the whole encoder, decoding next to
nothing.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hf_matryoshka_sae.common.files import write_json
from hf_matryoshka_sae.models import MatryoshkaSAEConfig, SAEModel, build_sae
from hf_matryoshka_sae.models.screening import screening


def main() -> None:
    """Measure in alternation, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d_in", type=int, default=768)
    parser.add_argument("--num_latents", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    works = contenders(options)
    with torch.no_grad():
        seconds = {name: [] for name in works}
        for turn in range(options.repeats + 2):
            for name, work in works.items():
                took = timed(work, options.device)
                if turn >= 2:
                    seconds[name].append(took)
    medians = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
    matmul = medians["encoder matmul"]
    sys.stdout.write(f"{'':24}{'ms':>10}{'x matmul':>10}\n")
    for name, ms in medians.items():
        sys.stdout.write(f"{name:24}{ms:10.1f}{ms / matmul:10.3f}\n")
    Path("runs").mkdir(exist_ok=True)
    write_json(Path("runs/inference.json"), {"options": vars(options), "ms": medians})


def contenders(options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """The matmul, encoding at several widths, decoding."""
    width, device = options.num_latents, options.device
    config = MatryoshkaSAEConfig(d_in=options.d_in, num_latents=width, k=options.k, prefix_widths=[width // 16, width])
    sae = build_sae(config).to(device).eval()
    x = torch.randn(options.tokens, options.d_in, device=device)
    out = torch.empty(options.tokens, width, device=device)
    sae.threshold.fill_((x @ sae.W_enc.T).flatten().topk(options.k * options.tokens).values.min())
    latents = sae.encode(x)
    works = {"encoder matmul": lambda: torch.mm(x, sae.W_enc.T, out=out)}
    for part in (1, 2, 4, 16):
        works[f"encode, width F / {part}"] = lambda n=width // part: sae.encode(x, width=n)
    works["encode, float32 products"] = lambda: _unscreened(sae, x)
    return works | {"decode": lambda: sae.decode(latents), "decode all prefixes": lambda: sae.decode_prefixes(latents)}


def _unscreened(sae: SAEModel, x: torch.Tensor) -> object:
    with screening(False):
        return sae.encode(x)


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds until the work is done, on a GPU too."""
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
