"""Which text an SAE is judged on."""

import torch

from hf_matryoshka_sae.evaluation import open_heldout
from hf_matryoshka_sae.evaluation.data import as_config


def test_the_embedded_text_by_its_name_is_the_held_out_part():
    named, default = (
        open_heldout("embedded", hookpoint="model.layers.2", dataset=dataset, tokens=500)
        for dataset in ("embedded", None)
    )
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(named.batches, default.batches, strict=True))


def test_text_is_named_by_a_path_or_by_fields():
    assert as_config("texts/news.parquet").path == "texts/news.parquet"
    assert as_config({"path": "news", "column": "body"}).column == "body"
