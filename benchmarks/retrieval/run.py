"""Retrieval with fewer bytes a document: ours beside dense, quantised and sparse ways of storing an embedding.

    pip install bm25s           # beside the package's extra `retrieval`
    python benchmarks/retrieval/run.py --model sentence-transformers/all-MiniLM-L6-v2 --corpora corpora

corpora.py says where the corpora come from. Embeddings of all texts are made once and kept in the output folder; SAEs
and CSR learn from the half that is not searched, with several seeds. Prints nDCG@10 and recall@100 (one right document
for each query) with half of the 95% interval over seeds, against bytes; writes `retrieval.json`, `.md` and `.png`.
What is in `retrieval.json` is not measured again: stop the command and run it once more, with the same options.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import torch
from contenders import (
    HALF,
    Embedded,
    Row,
    bm25_scores,
    byte_code_rows,
    csr_rows,
    cut_rows,
    half_whitened,
    plain_rows,
    pq_rows,
    sae_rows,
)
from corpora import Corpus, load
from csr import trained_csr
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModel

from hf_matryoshka_sae.activations.sentences import load_sentence_transformer
from hf_matryoshka_sae.common.files import write_json
from hf_matryoshka_sae.models import SAEModel
from hf_matryoshka_sae.progressive import latent_statistics, prune
from hf_matryoshka_sae.training import RunConfig, train


matplotlib.use("Agg")
from matplotlib import pyplot as plt


CORPORA = ("python", "wordnet")
MOST_QUERIES, MOST_OTHERS = 4000, 20_000
T_975 = {3: 4.303, 4: 3.182, 5: 2.776}


def main() -> None:
    """Embed, learn, score, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="sentence-transformers model: folder or Hub id")
    parser.add_argument("--corpora", type=Path, required=True, help="folder in which the packages are unpacked")
    parser.add_argument("--num_latents", type=int, default=1024)
    parser.add_argument("--k", type=int, default=85, help="latents of a document")
    parser.add_argument("--more_ks", type=int, nargs="*", default=[24], help="measured with the first seed alone")
    parser.add_argument("--csr_lr", type=float, default=1e-3, help="CSR's highest learning rate")
    parser.add_argument("--tokens", type=int, default=200_000, help="embeddings that an SAE learns from, with repeats")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/retrieval"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    corpora = {name: load(name, options.corpora) for name in CORPORA}
    data, pairs = embedded(corpora, options.model, options.output)
    whitened = {name: half_whitened(part) for name, part in data.items()}
    points = fixed_points(corpora, data, options.output)
    points += [point(row, name, None) for name, part in whitened.items() for row in plain_rows(part, HALF)]
    path, first = options.output / "retrieval.json", options.seeds[0]
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    before = [one for one in before if one.get("step")]
    points, done = points + before, {one["step"] for one in before}
    steps = [(our_rows, options.k, seed) for seed in options.seeds]
    steps += [(csr_and_pruned_rows, options.k, seed) for seed in options.seeds]
    steps += [(our_rows, k, first) for k in options.more_ks]
    for make, k, seed in tqdm(steps):
        step = f"{make.__name__}, k {k}, seed {seed}"
        if step in done:
            continue
        points += [point(row, name, seed, step) for row, name in make(data, whitened, pairs, options, k, seed)]
        write_json(path, points)
        (options.output / "retrieval.md").write_text(summary(points), encoding="utf-8")
        plot(points, options.output / "retrieval.png")
    sys.stdout.write(summary(points))


def fixed_points(corpora: dict[str, Corpus], data: dict[str, Embedded], folder: Path) -> list[dict]:
    """Figures of what is the same with every seed; kept in `folder`."""
    path = folder / "fixed.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    points = []
    for name, corpus in corpora.items():
        scores, size = bm25_scores(corpus.queries[:MOST_QUERIES], corpus.documents[:MOST_QUERIES])
        rows = [*plain_rows(data[name]), *cut_rows(data[name]), *pq_rows(data[name]), Row("BM25", "", size, scores)]
        points += [point(row, name, None) for row in tqdm(rows, desc=name)]
    write_json(path, points)
    return points


def embedded(
    corpora: dict[str, Corpus], model: str, folder: Path
) -> tuple[dict[str, Embedded], tuple[Tensor, Tensor]]:
    """Embeddings of each corpus, and of the pairs that CSR's contrastive loss learns from; kept in `folder`."""
    path = folder / "embeddings.pt"
    rows: dict[str, Tensor] = torch.load(path, weights_only=True) if path.exists() else {}
    wanted: dict[str, list[str]] = {"others": []}
    for name, corpus in corpora.items():
        kept = slice(0, MOST_QUERIES)
        wanted |= {f"{name} queries": corpus.queries[kept], f"{name} documents": corpus.documents[kept]}
        wanted[f"{name} left"], wanted[f"{name} right"] = (list(part) for part in zip(*corpus.pairs, strict=True))
        wanted["others"] += corpus.others
    wanted["others"] = wanted["others"][:: max(1, len(wanted["others"]) // MOST_OTHERS)]
    missing = [key for key, texts in wanted.items() if len(rows.get(key, ())) != len(texts)]
    encoder = load_sentence_transformer(model) if missing else None
    for key in missing:
        rows[key] = encoder.encode(wanted[key], batch_size=64, convert_to_tensor=True, show_progress_bar=True).clone()
        torch.save(rows, path)
    pairs = tuple(torch.cat([rows[f"{name} {side}"] for name in corpora]) for side in ("left", "right"))
    training = torch.cat([*pairs, rows["others"]])
    return {n: Embedded(rows[f"{n} queries"], rows[f"{n} documents"], training) for n in corpora}, pairs


Data = dict[str, Embedded]
Pairs = tuple[Tensor, Tensor]


def our_rows(
    data: Data, whitened: Data, _: Pairs, options: argparse.Namespace, k: int, seed: int
) -> Iterator[tuple[Row, str]]:
    """Our SAEs of the embeddings and of the half-whitened ones."""
    folder = options.output / f"seed-{seed}-k-{k}"
    for prefix, corpora in (("", data), (HALF, whitened)):
        place = folder / "half" if prefix else folder
        sae = trained(next(iter(corpora.values())).training, options, k, seed, place, "matryoshka")
        for name, part in corpora.items():
            yield from ((row, name) for row in sae_rows(f"{prefix}ours, k {k}", sae, part, sae.prefix_widths))


def csr_and_pruned_rows(
    data: Data, _: Data, pairs: Pairs, options: argparse.Namespace, k: int, seed: int
) -> Iterator[tuple[Row, str]]:
    """CSR, and with the first seed a plain TopK SAE that is sorted and pruned, and its byte code."""
    training = next(iter(data.values())).training
    csr = trained_csr(pairs, training, options.num_latents, k, options.tokens, seed, options.csr_lr)
    for name, part in data.items():
        yield from ((row, name) for row in csr_rows(f"CSR, k {k}", csr, part))
    if seed != options.seeds[0]:
        return
    plain = trained(training, options, k, seed, options.output / f"seed-{seed}-k-{k}" / "plain", "topk")
    measured = latent_statistics(plain, [training], neighbours=0)
    for width in our_widths(options, k, seed):
        pruned = prune(plain, width, statistics=measured) if width < options.num_latents else plain
        for name, part in data.items():
            yield from ((row, name) for row in sae_rows(f"TopK pruned, k {k}", pruned, part, [width]))
    for name, part in data.items():
        yield from ((row, name) for row in byte_code_rows(f"TopK byte code, k {k}", plain, part))


def our_widths(options: argparse.Namespace, k: int, seed: int) -> list[int]:
    """The prefix widths of our SAE of a seed."""
    place = options.output / f"seed-{seed}-k-{k}" / "matryoshka" / "sentence_embedding"
    return AutoModel.from_pretrained(place).prefix_widths


def trained(training: Tensor, options: argparse.Namespace, k: int, seed: int, folder: Path, kind: str) -> SAEModel:
    """An SAE of the training embeddings; kept in the folder."""
    specs = [{"type": kind, "name": kind, "num_latents": options.num_latents, "k": k}]
    fields = {"saes": specs, "tokens": options.tokens, "batch_size": 512, "seed": seed, "output_dir": str(folder)}
    if not (folder / "results.json").exists():
        train(
            RunConfig.from_dict(fields | {"hookpoints": ["sentence_embedding"], "checkpoint_every": 0}),
            states=training,
        )
    return AutoModel.from_pretrained(folder / kind / "sentence_embedding")


def point(row: Row, corpus: str, seed: int | None, step: str = "") -> dict:
    """Figures of a row: the i-th document is the right one of the i-th query; ties count against it."""
    right = row.scores.diagonal()[:, None]
    rank = (row.scores >= right).sum(1) - 1
    gain = torch.where(rank < 10, 1 / torch.log2(rank + 2.0), 0.0)
    figures = {"ndcg": gain.mean().item(), "recall": (rank < 100).float().mean().item()}
    about = {"step": step, "corpus": corpus, "seed": seed}
    return {**about, "name": row.name, "size": row.size, "bytes": row.bytes, **figures}


def grouped(points: list[dict]) -> Iterator[tuple[tuple, dict[str, tuple[float, float]]]]:
    """Mean and half of the 95% interval over seeds of each row's figures; 0 with fewer than three seeds."""
    keys = list(dict.fromkeys((p["corpus"], p["name"], p["size"]) for p in points))
    for key in keys:
        same = [p for p in points if (p["corpus"], p["name"], p["size"]) == key]
        figures = {}
        for name in ("bytes", "ndcg", "recall"):
            values = [p[name] for p in same]
            half = T_975[len(values)] * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 2 else 0.0
            figures[name] = statistics.mean(values), half
        yield key, figures


def summary(points: list[dict]) -> str:
    """A table in markdown for each corpus."""
    lines = []
    for corpus in CORPORA:
        lines += [f"\n## {corpus}\n", "| | size | bytes | nDCG@10 | recall@100 |", "|---|---|---:|---:|---:|"]
        for (name_of_corpus, name, size), figures in grouped(points):
            if name_of_corpus == corpus:
                told = [
                    f"{mean:.4f}" + (f" ± {half:.4f}" if half else "") for mean, half in list(figures.values())[1:]
                ]
                lines.append(f"| {name} | {size} | {figures['bytes'][0]:.0f} | {told[0]} | {told[1]} |")
    return "\n".join(lines) + "\n"


def plot(points: list[dict], path: Path) -> None:
    """NDCG against bytes of a document, a line for each method."""
    figure, axes = plt.subplots(1, len(CORPORA), figsize=(13, 5), sharey=True)
    for axis, corpus in zip(axes, CORPORA, strict=True):
        lines: dict[str, list] = {}
        for (name_of_corpus, name, _), figures in grouped(points):
            if name_of_corpus == corpus:
                lines.setdefault(name, []).append((figures["bytes"][0], *figures["ndcg"]))
        # The rest is in the table; CSR is better as it was trained than refined.
        kept = {
            name: line
            for name, line in lines.items()
            if "as codes" not in name and ("not refined" in name) == name.startswith("CSR")
        }
        for number, (name, line) in enumerate(kept.items()):
            sizes, means, halves = zip(*sorted(line), strict=True)
            style = "--" if name.startswith(HALF) else "-"
            axis.errorbar(
                sizes,
                means,
                yerr=halves,
                marker="o",
                markersize=3,
                linestyle=style,
                label=name,
                color=plt.cm.tab20(number),
            )
        axis.set(xscale="log", xlabel="bytes of a document", ylabel="nDCG@10", title=corpus)
    axes[-1].legend(fontsize=6, ncol=2)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
