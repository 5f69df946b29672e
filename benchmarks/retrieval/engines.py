"""Coarse to fine on one index, and other engines: quality, work and time of a query.

    python benchmarks/retrieval/engines.py --output runs/retrieval --corpora corpora    # after run.py, with its files

Work is products of a query's and a document's numbers, as a share of what ranking every document by its whole code
takes. Prints a table for each corpus, and for five queries of each what was found and because of which latents.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from contenders import REFINE, half_whitened
from corpora import Corpus, load
from run import CORPORA, embedded
from transformers import AutoModel

from hf_matryoshka_sae.common.files import write_json
from hf_matryoshka_sae.models import SAEModel
from hf_matryoshka_sae.retrieval import SparseIndex, name_latents
from hf_matryoshka_sae.retrieval.sparse_embedding import refined


WAYS = {
    "coarse {}, 200 candidates": {"candidates": 200},
    "coarse {}, 64 values, 200 candidates": {"candidates": 200, "coarse_dims": 64},
}


@torch.no_grad()
def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpora", type=Path, required=True, help="folder in which the packages are unpacked")
    parser.add_argument("--output", type=Path, default=Path("runs/retrieval"))
    parser.add_argument(
        "--sae", default="seed-0-k-85/half/matryoshka/sentence_embedding", help="of half-whitened embeddings"
    )
    parser.add_argument("--only", nargs="+", choices=CORPORA, default=CORPORA)
    parser.add_argument("--model", help="sentence-transformers model, where embeddings.pt has to be made")
    options = parser.parse_args()
    corpora = {name: load(name, options.corpora) for name in CORPORA}
    data, _ = embedded(corpora, options.model, options.output)
    sae, result = AutoModel.from_pretrained(options.output / options.sae), {}
    for name in options.only:
        plain, part = data[name], half_whitened(data[name])
        codes = sae.encode(part.documents, selection="mask").to_dense()
        codes = refined(codes, part.documents - sae.b_dec, sae.W_dec, REFINE)
        index, asked = SparseIndex(codes, decoder=sae.W_dec), (part.queries - sae.b_dec) @ sae.W_dec.T
        _show(corpora[name], index, asked, sae)
        sys.stdout.flush()
        result[name] = _engines(index, asked, plain.queries, plain.documents, sae)
        sys.stdout.write(f"\n{name}: {len(asked)} queries, {len(codes)} documents\n")
        for way, (ndcg, work, milliseconds) in result[name].items():
            sys.stdout.write(f"{way:<44} nDCG@10 {ndcg:.4f}  work {work:7.1%}  {milliseconds:8.3f} ms a query\n")
    write_json(options.output / "engines.json", result)


def _engines(
    index: SparseIndex, asked: torch.Tensor, queries: torch.Tensor, documents: torch.Tensor, sae: SAEModel
) -> dict[str, tuple[float, float, float]]:
    """What each way to search gives: nDCG@10, share of the work, milliseconds of a query."""
    whole = index.search(asked, top_k=10).work
    searches: dict[str, Callable] = {"whole code": lambda: index.search(asked, top_k=10)}
    for width in sae.prefix_widths[:-1]:
        searches[f"first {width} alone"] = lambda width=width: index.search(asked, top_k=10, width=width)
        for way, fields in WAYS.items():
            searches[way.format(width)] = lambda width=width, fields=fields: index.search(
                asked, top_k=10, coarse_width=width, **fields
            )
    searches["whole code, 128 values, 400 candidates"] = lambda: index.search(
        asked, top_k=10, coarse_width=index.num_latents, coarse_dims=128, candidates=400
    )
    found = {}
    for way, search in searches.items():
        began = time.perf_counter()
        hits = search()
        seconds = time.perf_counter() - began
        found[way] = _ndcg(hits.documents), hits.work / whole, 1000 * seconds / len(asked)
    began = time.perf_counter()
    numbers = (queries @ documents.T).topk(10).indices.numpy()
    seconds = time.perf_counter() - began
    work = documents.numel() / whole
    found["dense, one matmul"] = _ndcg(numbers), work, 1000 * seconds / len(queries)
    return found


def _ndcg(documents: np.ndarray) -> float:
    rank = np.where(documents == np.arange(len(documents))[:, None], np.arange(documents.shape[1]), 1e9).min(1)
    return float(np.where(rank < 10, 1 / np.log2(rank + 2), 0).mean())


def _show(corpus: Corpus, index: SparseIndex, asked: torch.Tensor, sae: SAEModel) -> None:
    """Five queries: what was found, and because of which latents, named by the words of the documents."""
    documents = corpus.documents[: len(index)]
    names = name_latents(index.by_document, documents, sae.latent_ids.tolist())
    for number in range(0, 400, 80):
        best = int(index.search(asked[number : number + 1], top_k=1).documents[0, 0])
        sys.stdout.write(f"\nQ {corpus.queries[number]}\n{'=' if best == number else 'x'} {documents[best][:200]}\n")
        for latent, share in index.explain(asked[number], best)[:4]:
            words = names.get(str(int(sae.latent_ids[latent])), {}).get("words", [])
            sys.stdout.write(f"    {share:5.0%}  latent {latent}: {', '.join(words)}\n")


if __name__ == "__main__":
    main()
