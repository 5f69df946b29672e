"""The Python corpus as a local task of MTEB, run on the dense model and on sparse encoders made of it.

    pip install mteb
    python benchmarks/retrieval/mteb_run.py --model sentence-transformers/all-MiniLM-L6-v2 --corpora corpora \
        --sae runs/retrieval/seed-0-k-85/matryoshka

Prints nDCG@10 and recall@100 as MTEB measures them, beside those of sentence-transformers' own evaluator; writes
MTEB's result files to `--output`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import mteb
from contenders import REFINE
from corpora import Corpus, load
from datasets import Dataset
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from sentence_transformers.sparse_encoder.evaluation import SparseInformationRetrievalEvaluator

from hf_matryoshka_sae.activations.sentences import load_sentence_transformer
from hf_matryoshka_sae.retrieval import sparse_encoder


def main() -> None:
    """Run each model on the task; print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="sentence-transformers model: folder or Hub id")
    parser.add_argument("--sae", required=True, help="SAE of its embeddings")
    parser.add_argument("--corpora", type=Path, required=True, help="folder in which the packages are unpacked")
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--widths", type=int, nargs="*", default=[224])
    parser.add_argument("--output", type=Path, default=Path("runs/retrieval/mteb"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    corpus = load("python", options.corpora)
    corpus.queries, corpus.documents = corpus.queries[: options.queries], corpus.documents[: options.queries]
    dense = load_sentence_transformer(options.model)
    models: dict[str, Any] = {"dense": dense, "sparse": sparse_encoder(dense, options.sae, refine=REFINE)}
    for width in options.widths:
        models[f"sparse, width {width}"] = sparse_encoder(dense, options.sae, width=width, refine=REFINE)
    models["sparse, not refined"] = sparse_encoder(dense, options.sae)
    for name, model in models.items():
        task = _task(corpus)
        (result,) = mteb.evaluate(model, task, cache=None, show_progress_bar=False).task_results
        result.to_disk(options.output / f"{name.replace(', ', '-').replace(' ', '_')}.json")
        scores = result.scores["test"][0]
        line = f"{name:<28} MTEB nDCG@10 {scores['ndcg_at_10']:.4f} recall@100 {scores['recall_at_100']:.4f}"
        if name != "dense":
            own = _evaluator(corpus)(model)
            line += f"  sentence-transformers {next(v for k, v in own.items() if k.endswith('ndcg@10')):.4f}"
        sys.stdout.write(line + "\n")


def _evaluator(corpus: Corpus) -> SparseInformationRetrievalEvaluator:
    queries = {f"q{i}": text for i, text in enumerate(corpus.queries)}
    documents = {f"d{i}": text for i, text in enumerate(corpus.documents)}
    return SparseInformationRetrievalEvaluator(queries, documents, {f"q{i}": {f"d{i}"} for i in range(len(queries))})


def _task(corpus: Corpus) -> AbsTaskRetrieval:
    """A task whose i-th document answers the i-th query."""

    class PythonDocumentation(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="PythonDocumentation",
            dataset={"path": "local/python-documentation", "revision": "3.11"},
            description="The first sentence of an entry of Python's documentation, and the rest of it.",
            type="Retrieval",
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            domains=["Programming", "Written"],
            license="not specified",
        )

        def load_data(self, **_: Any) -> None:
            numbers = range(len(corpus.queries))
            queries = {"id": [f"q{i}" for i in numbers], "text": corpus.queries}
            documents = {"id": [f"d{i}" for i in numbers], "text": corpus.documents}
            relevant = {f"q{i}": {f"d{i}": 1} for i in numbers}
            split = {"corpus": Dataset.from_dict(documents), "queries": Dataset.from_dict(queries)}
            split |= {"relevant_docs": relevant, "top_ranked": None}
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    return PythonDocumentation()


if __name__ == "__main__":
    main()
