"""What a feature index costs beside the bare forward pass, and whether its top contexts are the right ones.

    python benchmarks/feature_index.py --sae runs/sae --model LM --dataset text.parquet [--tokens 1000000] [--tree]

Build and bare forward pass (which stops at the hookpoint) go over the same batches, in turns, as do the build and a
progressive curve with and without screening; medians and their ratio are printed, with the peak memory, the size on
disk, the time to open the index and to read a latent, and how many of some latents' top contexts differ from sorting
all their activations. All of it also goes to `runs/feature_index.json`.
"""

import argparse
import logging
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModel

from hf_matryoshka_sae.activations import DatasetConfig, TokenBatch, harvest, heldout_batches, load_language_model
from hf_matryoshka_sae.common.files import write_json
from hf_matryoshka_sae.evaluation import HeldOut
from hf_matryoshka_sae.features import FeatureIndex, IndexSizes, build_index
from hf_matryoshka_sae.models import SAEModel
from hf_matryoshka_sae.models.screening import screening
from hf_matryoshka_sae.progressive import progressive_curve


_WINDOWS = 32  # in a batch


def main() -> int:
    """Measure and print; returns 0 where the top contexts are right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--context_length", type=int, default=128)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--checked", type=int, default=64, help="latents whose top contexts are compared")
    parser.add_argument("--tree", action="store_true", help="with parents and children")
    parser.add_argument("--output", default="runs/feature_index.json")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    sae = AutoModel.from_pretrained(options.sae).eval()
    hookpoint = sae.config.hookpoint
    lm, tokenizer = load_language_model(options.model)
    text = DatasetConfig(options.dataset)
    batches = heldout_batches(text, tokenizer, options.context_length, options.tokens, _WINDOWS)
    tokens = sum(int(batch.keep.sum()) for batch in batches)

    def forward() -> None:
        for batch in batches:
            harvest(lm, batch.input_ids, None, [hookpoint])

    with tempfile.TemporaryDirectory() as folder:

        def build() -> FeatureIndex:
            tree = _tree(sae) if options.tree else None
            return build_index(
                sae,
                lm,
                text,
                options.tokens,
                folder,
                hookpoint=hookpoint,
                tokenizer=tokenizer,
                context_length=options.context_length,
                lm_batch_size=_WINDOWS,
                tree=tree,
                resume=False,
                show=False,
            )

        forward_times, build_times, before = [], [], 0.0
        data = HeldOut(lm, batches, hookpoint, None, tokenizer)
        others: dict[str, list[float]] = {}
        for _ in range(options.turns):
            forward_times.append(_timed(forward))
            before = before or _peak()
            build_times.append(_timed(build))
            for name, enabled in (("", None), ("_with_float32_products", False)):
                with screening(enabled):
                    if name:
                        others.setdefault(f"build{name}", []).append(_timed(build))
                    curve = _timed(lambda: progressive_curve(sae, data, sae.prefix_widths))
                    others.setdefault(f"curve{name}", []).append(curve)
        ratios = [bare / whole for bare, whole in zip(forward_times, build_times, strict=True)]
        result = {
            "tokens": tokens,
            "threads": torch.get_num_threads(),
            "forward_tokens_per_second": tokens / statistics.median(forward_times),
            "build_tokens_per_second": tokens / statistics.median(build_times),
            **{f"{name}_tokens_per_second": tokens / statistics.median(times) for name, times in others.items()},
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "peak_memory_mb": _peak(),
            "peak_memory_before_mb": before,
            "disk_mb": sum(path.stat().st_size for path in Path(folder).rglob("*.*")) / 1e6,
            **_reading(folder),
        }
        result["different"] = _differing(FeatureIndex.open(folder), sae, lm, batches, options.checked)
    width = max(map(len, result))
    sys.stdout.write("".join(f"{name:<{width}}  {_shown(value)}\n" for name, value in result.items()))
    write_json(Path(options.output), result)
    return int(result["different"] > 0)


def _tree(sae: SAEModel):
    from hf_matryoshka_sae.features.tree.tree import EdgeSums

    return EdgeSums(sae)


def _timed(job: Callable[[], object]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def _shown(value) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) and value < 1e4 else f"{value:.0f}"


def _reading(folder: str) -> dict[str, float]:
    """Milliseconds to open the index, and the median of 50 latents' pages, each read by an index just opened too."""
    opening = statistics.median(_timed(lambda: FeatureIndex.open(folder)) for _ in range(5))
    index = FeatureIndex.open(folder)
    latents = random.Random(0).sample(range(len(index)), min(50, len(index)))
    times = [_timed(lambda latent=latent: index.feature(latent)) for latent in latents]
    cold = [_timed(lambda latent=latent: FeatureIndex.open(folder).feature(latent)) for latent in latents]
    return {
        "open_ms": 1e3 * opening,
        "feature_ms": 1e3 * statistics.median(times),
        "feature_of_new_index_ms": 1e3 * statistics.median(cold),
    }


@torch.no_grad()
def _differing(index: FeatureIndex, sae: SAEModel, lm: torch.nn.Module, batches: list[TokenBatch], count: int) -> int:
    """Latents whose top contexts are not what sorting the peaks of all windows gives."""
    latents = random.Random(1).sample(range(len(index)), min(count, len(index)))
    peaks, places = [], []
    for batch in batches:
        looked_at = batch.keep.clone()
        looked_at[:, 0] = True  # the rows the index encodes: bits of a matmul depend on its shape
        states = harvest(lm, batch.input_ids, None, [sae.config.hookpoint])[sae.config.hookpoint]
        values = torch.zeros(*batch.keep.shape, len(latents))
        values[looked_at] = sae.encode(states[looked_at]).to_dense()[:, latents]
        peak, place = (values * batch.keep[..., None]).max(1)
        peaks.append(peak)
        places.append(place)
    peaks, places = torch.cat(peaks), torch.cat(places)
    different = 0
    for column, latent in enumerate(latents):
        order = peaks[:, column].sort(descending=True, stable=True).indices[: IndexSizes.top_contexts]
        expected = [(int(n), int(places[n, column])) for n in order if peaks[n, column] > 0]
        different += expected != [(each.window, each.position) for each in index.feature(latent).top_contexts]
    return different


if __name__ == "__main__":
    sys.exit(main())
