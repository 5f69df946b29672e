"""The main job on what ships with the package: train, look at the table, load back, look at a few latents."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModel, PreTrainedTokenizerBase

from .activations import DatasetConfig, TokenBatch, harvest, heldout_batches, load_language_model
from .models import SAEModel
from .train import main as train_main


DEMO = {
    "model": "embedded",
    "dataset": {"path": "embedded"},
    "eval_dataset": {"path": "embedded", "split": "heldout"},
    "hookpoints": ["model.layers.2"],
    "context_length": 128,
    "tokens": 1_000_000,
    "batch_size": 2048,
    "eval_tokens": 30_000,
    "calibration_tokens": 100_000,
    "saes": [{"type": "matryoshka", "name": "matryoshka", "num_latents": 2048, "k": 16}],
}
"""The run of the demo: the fields of a training YAML."""


def demo(output_dir: str) -> int:
    """Train the embedded demo into `output_dir`, reload its SAE and print some latents; returns the exit status."""
    run = {**DEMO, "output_dir": output_dir}
    status = train_main([f"--{name}={json.dumps(value)}" for name, value in run.items()])  # JSON is YAML
    if status:
        return status
    _show(Path(output_dir) / "matryoshka" / DEMO["hookpoints"][0], DEMO["hookpoints"][0])
    return 0


def _show(path: Path, hookpoint: str) -> None:
    sae = AutoModel.from_pretrained(path)
    model, tokenizer = load_language_model("embedded")
    text = DatasetConfig(**DEMO["eval_dataset"])
    batches = heldout_batches(text, tokenizer, DEMO["context_length"], DEMO["eval_tokens"])
    sys.stdout.write(f"\nAutoModel.from_pretrained({str(path)!r}) -> {type(sae).__name__}, {sae.prefix_widths}\n")
    sys.stdout.write(_top_tokens(sae, model, tokenizer, batches, hookpoint))


def _top_tokens(
    sae: SAEModel,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[TokenBatch],
    hookpoint: str,
    per_prefix: int = 2,
    shown: int = 4,
) -> str:
    """The strongest contexts of the latents that carry most in each prefix group, as text."""
    ids, values = [], []
    for batch in batches:
        states = harvest(model, batch.input_ids, batch.attention_mask, [hookpoint])[hookpoint]
        with torch.no_grad():
            dense = sae.encode(states).to_dense() * batch.keep[..., None]
        ids.append(batch.input_ids)
        values.append(dense)
    tokens, dense = torch.cat(ids), torch.cat(values)
    energy = dense.square().sum((0, 1))
    lines, start = [], 0
    for width in sae.prefix_widths:
        for latent in (energy[start:width].topk(min(per_prefix, width - start)).indices + start).tolist():
            strongest = dense[..., latent].flatten().topk(shown)
            contexts = [_context(tokens, tokenizer, position) for position in strongest.indices.tolist()]
            lines.append(f"  latent {latent:>5} (prefix {width:>5}): " + "  |  ".join(contexts))
        start = width
    return "Where a few latents fire most (the token in [[ ]]):\n" + "\n".join(lines) + "\n"


def _context(tokens: torch.Tensor, tokenizer: PreTrainedTokenizerBase, position: int, before: int = 5) -> str:
    row, column = divmod(position, tokens.shape[1])
    left = tokenizer.decode(tokens[row, max(0, column - before) : column].tolist())
    token = tokenizer.decode(tokens[row, column : column + 1].tolist())
    return f"{left}[[{token}]]".replace("\n", "\\n").strip()
