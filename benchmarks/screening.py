"""Screening with bf16 products against float64: pairs that differ, how much of the bound is used, candidates.

    python benchmarks/screening.py --model ../shared/lm --dataset ../shared/text/train.parquet \
        --hookpoint model.layers.1

Trains a TopK and a BatchTopK SAE for each k on the hidden states (a short run), then screens held-back tokens of the
same text and compares every selection with that of float64. Prints a table; writes `runs/screening/<model>.json` and
a plot of candidates against k.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModel

from hf_matryoshka_sae.common.files import write_json
from hf_matryoshka_sae.evaluation import open_heldout
from hf_matryoshka_sae.models import SAEModel
from hf_matryoshka_sae.models.encoder_blocks import EncoderBlocks
from hf_matryoshka_sae.models.screening import counts, screened, screening
from hf_matryoshka_sae.models.selection import select_batch_topk, select_topk
from hf_matryoshka_sae.training import RunConfig, train


matplotlib.use("Agg")
_ROWS = 2048


def main() -> int:
    """Train, compare, print; returns the exit status: 1 where a bound was violated."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded", help="language model: folder, Hub id or embedded")
    parser.add_argument("--dataset", default="embedded", help="text: a parquet file with a column text, or embedded")
    parser.add_argument("--hookpoint", default="model.layers.2")
    parser.add_argument("--num_latents", type=int, default=4096)
    parser.add_argument("--ks", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--train_tokens", type=int, default=200_000)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens that are compared")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/screening"))
    options = parser.parse_args()
    name = Path(options.model).name
    states = torch.cat(list(tqdm(_states(options), desc="hidden states", unit="batches")))
    cut = min(options.train_tokens, len(states) // 2)
    saes = _trained(states[:cut], options, options.output_dir / name)
    compared = states[: options.tokens]
    rows = [_compared(sae, compared, k, kind) for (k, kind), sae in saes.items()]
    for row in rows:
        sys.stdout.write("  ".join(f"{key} {value}" for key, value in row.items()) + "\n")
    write_json(options.output_dir / f"{name}.json", {"options": {**vars(options), "output_dir": None}, "rows": rows})
    _plot(rows, options.output_dir / f"{name}.png")
    return int(any(row["violations"] for row in rows))


def _states(options: argparse.Namespace) -> Iterator[Tensor]:
    dataset = "embedded" if options.dataset == "embedded" else {"path": options.dataset, "column": "text"}
    data = open_heldout(options.model, hookpoint=options.hookpoint, dataset=dataset, tokens=options.tokens)
    return data.activations()


def _trained(states: Tensor, options: argparse.Namespace, folder: Path) -> dict[tuple[int, str], SAEModel]:
    specs = [
        {"type": kind, "name": f"{kind}-{k}", "num_latents": options.num_latents, "k": k}
        for k in options.ks
        for kind in ("topk", "batch_topk")
    ]
    fields = {"saes": specs, "tokens": len(states), "batch_size": _ROWS, "output_dir": str(folder), "resume": False}
    train(RunConfig.from_dict(fields), states=states)
    trained = [AutoModel.from_pretrained(next((folder / spec["name"]).rglob("config.json")).parent) for spec in specs]
    return {(int(sae.k), sae.config.activation_name): sae for sae in trained}


@torch.no_grad()
def _compared(sae: SAEModel, states: Tensor, k: int, kind: str) -> dict[str, object]:
    """What screening selects of all states, against float64."""
    row = {
        "kind": kind,
        "k": k,
        "tokens": len(states),
        "pairs": 0,
        "wrong": 0,
        "near": 0,
        "violations": 0,
        "used": 0.0,
    }
    b_dec = sae.b_dec if sae.config.apply_b_dec_to_input else None
    W, b = sae.W_enc.double(), sae.b_enc.double()
    counts.__init__()
    for number, x in enumerate(tqdm(states.split(_ROWS), desc=f"{kind} {k}")):
        blocks = EncoderBlocks(x, sae.W_enc, sae.b_enc, b_dec)
        true = blocks.x.double() @ W.T + b
        if number % 8 == 0:  # an eighth of all pairs are held against their bounds
            _check_bound(blocks, true, row)
        cut = {
            "topk": lambda t: t.topk(k, dim=1).values[:, -1:],
            "batch_topk": lambda t: t.flatten().kthvalue(t.numel() - k * len(t) + 1).values,
        }[kind](true)
        with screening(True):
            select = select_topk if kind == "topk" else select_batch_topk
            rows, cols, _ = select(blocks, k)
        chosen = torch.zeros_like(true, dtype=torch.bool)
        chosen[rows, cols] = True
        differs = (chosen != (true >= cut)).nonzero(as_tuple=True)
        lengths = blocks.x.double().norm(dim=1)[differs[0]] * W.norm(dim=1)[differs[1]]
        away = (true - cut)[differs].abs() > 1e-6 * lengths
        row["pairs"] += len(rows)
        row["wrong"] += int(away.sum())
        row["near"] += int((~away).sum())
    row |= {"candidates for a winner": round(counts.candidates / max(1, counts.pairs), 4)}
    row |= {
        "candidates for a token": round(counts.candidates / max(1, counts.tokens - counts.fallbacks), 2),
        "fallbacks": counts.fallbacks,
    }
    return row


def _check_bound(blocks: EncoderBlocks, true: Tensor, row: dict[str, object]) -> None:
    """Count pre-activations outside their bounds; the largest share of the bound that one needed."""
    for part in screened(blocks):
        size = part.stop - part.start
        upper, inside = part.upper[:, :size].double(), true[:, part.start : part.stop]
        bound = (part.of_tokens.double() @ part.of_latents[:, :size].double()) + upper.abs() * 2.0**-9
        share = ((inside - (upper - part.of_tokens.double() @ part.of_latents[:, :size].double())).abs() / bound).max()
        row["used"] = round(max(row["used"], float(share)), 4)
        row["violations"] += int(share > 1)


def _plot(rows: list[dict[str, object]], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 4))
    for kind in ("topk", "batch_topk"):
        points = [(row["k"], row["candidates for a token"]) for row in rows if row["kind"] == kind]
        axes.plot(*zip(*points, strict=True), marker="o", label=kind)
    ks = sorted({row["k"] for row in rows})
    axes.plot(ks, ks, "--", color="gray", label="winners")
    axes.set(xlabel="k", ylabel="candidates scored again in float32, per token")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
