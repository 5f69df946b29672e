"""A run small enough for tests, with two hookpoints and two families."""

from pathlib import Path

from hf_matryoshka_sae.training import RunConfig, train


RUN = {
    "model": "embedded",
    "dataset": {"path": "embedded"},
    "hookpoints": ["model.layers.0", "model.layers.2:input"],
    "context_length": 32,
    "tokens": 10 * 128,
    "batch_size": 128,
    "lm_batch_size": 4,
    "shuffle_tokens": 1024,
    "normalization_tokens": 1024,
    "eval_tokens": 240,
    "eval_baselines": False,
    "calibration_tokens": 1000,
    "saes": [
        {"type": "matryoshka", "name": "nested", "num_latents": 160, "k": 4, "prefix_widths": [32, 160]},
        {"type": "topk", "name": "plain", "num_latents": 64, "k": 4, "hookpoints": ["model.layers.0"]},
    ],
}


def run(folder: Path, **fields) -> Path:
    """Train it; returns the run's folder."""
    train(RunConfig.from_dict({**RUN, **fields, "output_dir": str(folder)}))
    return folder
