"""Texts searched with an SAE of sentence embeddings: the endpoint against the library, what the tab shows of it."""

import pytest
import torch

from hf_matryoshka_sae.models import TopKSAEConfig, build_sae


pytest.importorskip("gradio")
pytest.importorskip("sentence_transformers")

from hf_matryoshka_sae.retrieval import SparseIndex, sparse_encoder
from hf_matryoshka_sae.space.tabs.texts import hits_html


TEXTS = ["Return the number of items.", "A violin <b>concert</b>", "Rivers flood the valley."]


@pytest.fixture(scope="module")
def of_texts(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("of-texts")
    torch.manual_seed(0)
    config = TopKSAEConfig(d_in=128, num_latents=64, k=6, base_model="embedded", hookpoint="sentence_embedding")
    build_sae(config).save_pretrained(folder)
    return str(folder)


def test_texts_are_found_as_the_library_finds_them(endpoints, of_texts):
    found = endpoints.search_texts("\n".join([*TEXTS, "", TEXTS[0]]), "music", of_texts, width=40)
    opened = endpoints.library.look(of_texts)
    encoder = sparse_encoder(opened.reader.encoder(), opened.sae, refine=10)
    index = SparseIndex(encoder.encode_document(TEXTS), decoder=opened.sae.W_dec)
    query = encoder.encode_query(["music"]).to_dense()
    hits = index.search(query, width=40)
    assert [hit["number"] for hit in found] == [int(one) for one in hits.documents[0] if one >= 0] and found
    assert [hit["score"] for hit in found] == pytest.approx(hits.scores[0][: len(found)].tolist())
    for hit in found:
        expected = index.explain(query[0], hit["number"], 40)[:5]
        assert [latent for latent, *_ in hit["latents"]] == [latent for latent, _ in expected]
        assert [share for *_, share in hit["latents"]] == pytest.approx([share for _, share in expected])
    page = hits_html(found, (of_texts, ""), "<i>", 40)
    assert "&lt;i&gt;" in page and "<b>concert" not in page and 'data-latent="' in page


def test_what_does_not_fit_is_said(endpoints, of_texts):
    with pytest.raises(ValueError, match=r"reads model.layers.2, token by token"):
        endpoints.search_texts("one", "two")
    with pytest.raises(ValueError, match="Paste some texts"):
        endpoints.search_texts(" \n ", "two", of_texts)
    with pytest.raises(ValueError, match="got 501"):
        endpoints.search_texts("\n".join(map(str, range(501))), "two", of_texts)
    with pytest.raises(ValueError, match="on the tab “Texts”"):
        endpoints.read_text("one", of_texts)
