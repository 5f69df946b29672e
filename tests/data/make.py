"""Make what `tests/test_artefacts.py` opens: files of every kind that this package writes, as this version has them.

    python tests/data/make.py tests/data/v1

Made once for each layout of files and then kept as it is: whatever comes later must open it.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_matryoshka_sae import CONFIGS, build_sae
from hf_matryoshka_sae.cli import main as cli
from hf_matryoshka_sae.evaluation import open_heldout
from hf_matryoshka_sae.progressive import latent_statistics


D_IN, NUM_LATENTS, K = 16, 12, 3
RUN = {
    "model": "embedded",
    "dataset": {"path": "text.jsonl"},
    "hookpoints": ["model.layers.1"],
    "context_length": 32,
    "tokens": 2048,
    "batch_size": 128,
    "shuffle_tokens": 256,
    "window_pool_tokens": 4096,
    "normalization_tokens": 1024,
    "calibration_tokens": 512,
    "eval_tokens": 512,
    "eval_fraction": 0.2,
    "lm_batch_size": 4,
    "checkpoint_every": 8,
    "keep_checkpoints": 2,
    "saes": [{"type": "matryoshka", "name": "nested", "num_latents": 24, "k": 4, "prefix_widths": [6, 12, 24]}],
}
"""A run of 16 steps; `run-interrupted` is what it left after eight."""


def main(folder: Path) -> None:
    """Write everything into a folder that is not there yet."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    for name, config in CONFIGS.items():
        _family(folder / "saes" / name, config)
    os.chdir(folder)
    words = (Path(__file__).parents[2] / "README.md").read_text().split("\n\n")
    Path("text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    _train("run", RUN)
    left_out = shutil.ignore_patterns("nested", "results.*", "config.json", "checkpoint-00000016", ".run.lock")
    shutil.copytree("run", "run-interrupted", ignore=left_out)
    sae = "run/nested/model.layers.1"
    flags = ["--model", "embedded", "--dataset", "text.jsonl", "--context_length", "32"]
    assert cli(["index", sae, *flags, "--tokens", "1500", "--top_contexts", "4"]) == 0
    data = open_heldout("embedded", hookpoint="model.layers.1", tokens=500, context_length=32)
    from transformers import AutoModel

    latent_statistics(AutoModel.from_pretrained(sae), data).save(sae)
    assert cli(["push", "run", "somebody/nested", "--dry_run", "repository", "--no_measure"]) == 0
    Path("run.yaml").write_text(json.dumps(RUN | {"output_dir": "cached"}))
    stored = ["--activation_cache", "cache", "--activation_cache_dtype", "int8"]
    assert cli(["cache", "--config", "run.yaml", *stored, "--tokens", "1024"]) == 0
    for needless in [*Path().glob("run/checkpoint-*"), *Path().rglob("*.png"), *Path("repository").glob("*.py")]:
        shutil.rmtree(needless) if needless.is_dir() else needless.unlink()


def _family(folder: Path, config: type) -> None:
    """An SAE of a family, and what it gives for a few hidden states."""
    sparsity = {"k": K} if "k" in config.__dataclass_fields__ else {}
    widths = {"prefix_widths": [4, NUM_LATENTS]} if "prefix_widths" in config.__dataclass_fields__ else {}
    sae = build_sae(config(d_in=D_IN, num_latents=NUM_LATENTS, **sparsity, **widths)).eval()
    for parameter in sae.parameters():
        parameter.data = torch.randn_like(parameter).abs() if parameter.ndim == 0 else torch.randn_like(parameter)
    for name, value in sae.state_dict().items():
        if "threshold" in name:
            value.copy_(value.abs() * 0.1)
    sae.save_pretrained(folder)
    x = torch.randn(7, D_IN)
    latents = sae.encode(x)
    record = {"input": x, "latents": latents.to_dense(), "reconstruction": sae.decode(latents)}
    save_file({name: tensor.detach().contiguous() for name, tensor in record.items()}, folder / "expected.safetensors")


def _train(output_dir: str, fields: dict) -> None:
    flags = [f"--{name}={json.dumps(value)}" for name, value in fields.items()]
    assert cli(["train", *flags, f"--output_dir={output_dir}"]) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
