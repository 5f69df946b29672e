"""What weights and optimizer state of fewer bits cost: the same SAEs, trained at each precision, on held-out text.

    OMP_NUM_THREADS=1 python benchmarks/low_precision.py          # the embedded model, ten minutes on a core
    python benchmarks/low_precision.py --model ../shared/lm --hookpoints model.layers.1 --context_length 256 \
        --dataset.path ../shared/text/train.parquet --dataset.column text \
        --eval_dataset.path ../shared/text/heldout.parquet --eval_dataset.column text

A seed gives all precisions the same first weights and the same batches: they train side by side. Measured is what was
saved and loaded again, so bfloat16 weights also encode and decode in bfloat16. Ratios are to float32 at the same seed;
beside them stands by how much float32 itself differs between seeds. Bytes are counted from the tensors that a learner
holds (weights, gradients, moments); times are medians of steps that take turns. Further flags override fields of the
run, as in training. Prints the tables and writes them to `low_precision.md` beside this file (`--report`).
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers import AutoModel

from hf_matryoshka_sae.evaluation import Dictionary, evaluate_fidelity
from hf_matryoshka_sae.models import build_sae
from hf_matryoshka_sae.training.config.fields import override
from hf_matryoshka_sae.training.config.run import RunConfig
from hf_matryoshka_sae.training.config.spec import SAESpec
from hf_matryoshka_sae.training.data.harvest import Harvest, open_harvest
from hf_matryoshka_sae.training.data.placement import Processes
from hf_matryoshka_sae.training.sae.calibration import calibrate_threshold
from hf_matryoshka_sae.training.sae.initialization import initialize, input_scaling
from hf_matryoshka_sae.training.sae.learner import Learner


PRECISIONS = {
    "float32": {},
    "bfloat16 moments": {"optimizer_dtype": "bfloat16"},
    "int8 moments": {"optimizer_dtype": "int8"},
    "bfloat16 weights and moments": {"weights_dtype": "bfloat16", "optimizer_dtype": "bfloat16"},
    "bfloat16 weights, int8 moments": {"weights_dtype": "bfloat16", "optimizer_dtype": "int8"},
}
NUM_LATENTS, K = 1024, 16
FAMILIES = {
    "matryoshka": {"type": "matryoshka", "activation": "batch_topk", "k": K, "prefix_widths": [64, 256, NUM_LATENTS]},
    "topk": {"type": "topk", "k": K},
    "jumprelu": {"type": "jumprelu", "target_l0": float(K)},
}
RUN = {
    "model": "embedded",
    "dataset": {"path": "embedded"},
    "hookpoints": ["model.layers.2"],
    "tokens": 409_600,
    "batch_size": 1024,
    "eval_tokens": 30_000,
    "calibration_tokens": 50_000,
}
STEP_SHAPE = (512, 8192, 2048, 32)  # d_in, num_latents, tokens, k


def run_config(flags: list[str], seed: int = 0) -> RunConfig:
    """The run that the flags describe, of every family at every precision."""
    saes = [
        {"name": f"{family}/{precision}", "num_latents": NUM_LATENTS, **FAMILIES[family], **PRECISIONS[precision]}
        for family, precision in itertools.product(FAMILIES, PRECISIONS)
    ]
    fields = {**RUN, "dataset": dict(RUN["dataset"]), "saes": saes, "seed": seed, "output_dir": "."}
    return RunConfig.from_dict(override(fields, flags))


def trained(config: RunConfig) -> dict[str, list[dict]]:
    """The held-out rows, one for each width, of every SAE of the run."""
    accelerator = Accelerator()
    harvest = open_harvest(config, accelerator, Processes.of(config))
    learners = [_begin(config, spec, harvest, accelerator) for spec in config.saes]
    stream = iter(harvest.streams[0])
    for step in tqdm(range(config.steps), desc=f"seed {config.seed}"):
        states = next(stream)[harvest.hookpoints[0]]
        for one in learners:
            one.accumulate(states, step)
            one.step(step)
    calibration = [
        next(stream)[harvest.hookpoints[0]] for _ in range(-(-config.calibration_tokens // config.batch_size))
    ]
    harvest.close()
    with tempfile.TemporaryDirectory() as folder:
        saes = {one.name: Dictionary(_loaded(one, calibration, Path(folder) / one.name)) for one in learners}
    data = harvest.heldout(harvest.hookpoints[0])
    return evaluate_fidelity(data, saes, language_model=False, similarity_tokens=0)["subjects"]


def _begin(config: RunConfig, spec: SAESpec, harvest: Harvest, accelerator: Accelerator) -> Learner:
    """A learner whose first weights depend on the run's seed alone."""
    (hookpoint,) = harvest.hookpoints
    statistics_, sample = harvest.statistics[hookpoint], harvest.sample[hookpoint]
    mean, scale = input_scaling(spec, statistics_, sample)
    sae = build_sae(spec.sae_config(len(mean), config.model, hookpoint))
    initialize(sae, spec, (sample - mean) / scale, (statistics_.mean.to(sample) - mean) / scale, config.seed)
    shape = {"steps": config.steps, "batch_size": config.batch_size, "seed": config.seed}
    return Learner(spec.name, hookpoint, sae, spec, mean, scale, accelerator, **shape)


def _loaded(one: Learner, calibration: list[torch.Tensor], folder: Path):
    """The trained SAE, saved and loaded again."""
    sae = one.finished()
    if sae.config.activation_name == "batch_topk":
        calibrate_threshold(sae, ((states.float() - one.mean) / one.scale for states in calibration), one.k)
    sae.fold_normalization_(one.mean, one.scale)
    sae.save_pretrained(folder)
    return AutoModel.from_pretrained(folder).eval()


def learner(precision: str) -> Learner:
    """A Matryoshka SAE in training at the shape whose steps are timed."""
    d_in, num_latents, tokens, k = STEP_SHAPE
    fields = {"num_latents": num_latents, "k": k, "dead_tokens": 10**9, **PRECISIONS[precision]}
    spec = SAESpec.from_dict({"type": "matryoshka", **fields}, "")
    sae = build_sae(spec.sae_config(d_in, "", ""))
    initialize(sae, spec, torch.randn(64, d_in), torch.zeros(d_in), seed=0)
    shape = {"steps": 10**5, "batch_size": tokens}
    return Learner("", "", sae, spec, torch.zeros(d_in), d_in**0.5, Accelerator(cpu=True), **shape)


def costs(steps: int) -> dict[str, dict[str, float]]:
    """Bytes per latent, and milliseconds of a whole step and of the optimizer's share, of each precision."""
    learners = {precision: learner(precision) for precision in PRECISIONS}
    seconds = {precision: [] for precision in PRECISIONS}
    bytes_held = {}
    for step in range(steps + 2):
        x = torch.randn(STEP_SHAPE[2], STEP_SHAPE[0], generator=torch.Generator().manual_seed(step))
        for precision, one in learners.items():
            began = time.perf_counter()
            one.accumulate(x, step)
            between = time.perf_counter()
            if precision not in bytes_held and step:
                bytes_held[precision] = _bytes(one) / STEP_SHAPE[1]
            resumed = time.perf_counter()
            one.step(step)
            seconds[precision].append((between - began + time.perf_counter() - resumed, time.perf_counter() - resumed))
    return {
        precision: {
            "bytes": bytes_held[precision],
            "step": 1000 * statistics.median(whole for whole, _ in taken[2:]),
            "optimizer": 1000 * statistics.median(share for _, share in taken[2:]),
        }
        for precision, taken in seconds.items()
    }


def _bytes(one: Learner) -> int:
    """Of weights, gradients and the optimizer's state."""
    weights = list(one.sae.parameters())
    held = [*weights, *(weight.grad for weight in weights)]
    held += [tensor for state in one.optimizer.state.values() for tensor in state.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def quality_table(results: dict[int, dict[str, list[dict]]], seeds: list[int]) -> str:
    """FVU of every family and width at each precision, mean over seeds, and its ratio to float32."""
    lines = []
    for family in FAMILIES:
        widths = [row["width"] for row in results[seeds[0]][f"{family}/float32"]]
        lines += [
            f"\n### {family}\n",
            "| precision | L0 | " + " | ".join(f"FVU at {width}" for width in widths) + " |",
        ]
        lines += ["|" + " --- |" * (2 + len(widths))]
        for precision in PRECISIONS:
            rows = [results[seed][f"{family}/{precision}"] for seed in seeds]
            cells = [f"{statistics.mean(row[-1]['l0'] for row in rows):.2f}"]
            for place in range(len(widths)):
                fvus = [row[place]["fvu"] for row in rows]
                base = [results[seed][f"{family}/float32"][place]["fvu"] for seed in seeds]
                ratios = [fvu / other for fvu, other in zip(fvus, base, strict=True)]
                spread = f" x{statistics.mean(ratios):.4f} ({min(ratios):.4f} to {max(ratios):.4f})"
                if precision == "float32":
                    pairs = [a / b for a, b in itertools.permutations(base, 2)]
                    spread = f", seeds apart x{max(pairs):.4f}" if pairs else ""
                cells.append(f"{statistics.mean(fvus):.4f}{spread}")
            lines.append(f"| {precision} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cost_table(found: dict[str, dict[str, float]]) -> str:
    """Bytes and times of each precision, with ratios to float32."""
    base = found["float32"]
    lines = ["| precision | bytes per latent | of float32 | step | its optimizer |", "|" + " --- |" * 5]
    for precision, row in found.items():
        lines.append(
            f"| {precision} | {row['bytes']:.0f} | {row['bytes'] / base['bytes']:.3f} | "
            f"x{row['step'] / base['step']:.2f} | x{row['optimizer'] / base['optimizer']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Train, time, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=12, help="steps that are timed")
    parser.add_argument("--report", type=Path, default=Path(__file__).with_suffix(".md"))
    known, flags = parser.parse_known_args()
    found = costs(known.steps)
    results = {seed: trained(run_config(flags, seed)) for seed in known.seeds}
    config = run_config(flags)
    command = " ".join(["python benchmarks/low_precision.py", *sys.argv[1:]])
    d_in, num_latents, tokens, k = STEP_SHAPE
    report = "\n".join(
        [
            "# What fewer bits cost\n",
            f"{date.today()}, torch {torch.__version__}, transformers {version('transformers')}, "
            f"{torch.get_num_threads()} thread(s); `{command}`",
            f"\n{NUM_LATENTS} latents at `{config.hookpoints[0]}` of `{Path(config.model).name}`, "
            f"{config.tokens:,} tokens, seeds {', '.join(map(str, known.seeds))}. FVU on held-out text: the mean over "
            "seeds, then the ratio to float32 at the same seed (least to most).",
            quality_table(results, known.seeds),
            f"\n## Memory and time\n\nWeights, gradients and moments of a Matryoshka SAE, d_in {d_in}, {num_latents} "
            f"latents; a step on {tokens} tokens at k {k}, ratios to float32 in turns.\n",
            cost_table(found),
        ]
    )
    sys.stdout.write(report + "\n")
    known.report.write_text(report + "\n")
    Path("runs").mkdir(exist_ok=True)
    Path("runs/low_precision.json").write_text(json.dumps({"rows": results, "costs": found}, indent=1))


if __name__ == "__main__":
    main()
