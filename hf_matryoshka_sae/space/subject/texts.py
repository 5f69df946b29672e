"""Texts that a visitor pastes, searched by the latents of their embeddings; of each hit which latents answered."""

from textwrap import shorten
from typing import TYPE_CHECKING, Any

from ...activations.sentences import SENTENCE_EMBEDDING


if TYPE_CHECKING:
    from .opened import Opened


MOST_TEXTS = 500
_REFINE = 10  # steps by which codes are fitted to embeddings; they rank better
_SHOWN, _EXAMPLES = 5, 5  # latents of a hit; texts by whose words a latent is named
_ENOUGH, _QUOTED = 40, 32  # texts whose words can name latents; characters of a text that stands for one


def check_reads_texts(opened: "Opened") -> None:
    """Raise `ValueError` if an open SAE reads something else than embeddings of whole texts."""
    if not opened.of_texts:
        raise ValueError(
            f"This SAE reads {opened.hookpoint}, token by token. Texts are searched with one that was trained on "
            f"embeddings of whole texts (`hookpoints: [{SENTENCE_EMBEDDING}]`)."
        )


def coded(opened: "Opened", texts: tuple[str, ...]) -> tuple[Any, Any, dict[str, Any]]:
    """Return what encodes, the index of the texts, and the words that name the latents which fire on them."""
    model = opened.reader.encoder()  # says so where sentence-transformers is not installed
    from ...retrieval import SparseIndex, name_latents, sparse_encoder

    encoder = sparse_encoder(model, opened.sae, refine=_REFINE)
    codes = encoder.encode_document(list(texts))
    names = name_latents(codes, list(texts), opened.sae.latent_ids.tolist(), examples=_EXAMPLES)
    return encoder, SparseIndex(codes, decoder=opened.sae.W_dec), names


def search_texts(opened: "Opened", texts: tuple[str, ...], query: str, width: int, top: int) -> list[dict[str, Any]]:
    """Return the texts that answer a query best, by the first latents, with the latents that answered.

    Args:
        opened ([`Opened`]): The SAE.
        texts (`tuple[str, ...]`): What is searched.
        query (`str`): What for.
        width (`int`): Number of first latents that count.
        top (`int`): At most so many hits.

    Returns:
        `list[dict]`: Of each hit its `number` among the texts, `text`, `score` (the cosine), and `latents`: number,
        name and share of the score of those that made most of it.
    """
    encoder, index, names = opened.texts(texts)
    asked = encoder.encode_query([query]).to_dense()
    hits = index.search(asked, top_k=top, width=width)
    return [
        {
            "number": int(document),
            "text": texts[document],
            "score": float(score),
            "latents": [
                [latent, _name(opened, names, latent, len(texts)), share]
                for latent, share in index.explain(asked[0], int(document), width)[:_SHOWN]
            ],
        }
        for document, score in zip(hits.documents[0], hits.scores[0], strict=True)
        if document >= 0
    ]


def _name(opened: "Opened", names: dict[str, Any], latent: int, count: int) -> str:
    """Return what the index calls a latent; else of many texts the words that its own share, of few the largest."""
    own = names.get(str(int(opened.sae.latent_ids[latent])))
    if opened.labels[latent] or own is None:
        return opened.labels[latent]
    if count < _ENOUGH:  # what a few texts share says nothing
        return f"“{shorten(own['texts'][0], _QUOTED, placeholder='…')}”"
    return ", ".join(own["words"])
