"""Text to explain latents from, and a trained SAE on it."""

from dataclasses import replace

import pytest
from transformers import AutoModel

from hf_matryoshka_sae.assets import embedded_sae_path
from hf_matryoshka_sae.evaluation import HeldOut, open_heldout
from hf_matryoshka_sae.models import SAEModel

from ...evaluation.planted import EMBEDDING


@pytest.fixture(scope="session")
def text() -> tuple[HeldOut, HeldOut]:
    """Examples and test text at the embedding layer of the embedded model."""
    options = {"hookpoint": EMBEDDING, "lm_batch_size": 8}
    return (
        open_heldout("embedded", dataset={"path": "embedded", "split": "train"}, tokens=8_000, **options),
        open_heldout("embedded", dataset={"path": "embedded", "split": "heldout"}, tokens=8_000, **options),
    )


@pytest.fixture(scope="session")
def trained(text) -> tuple[SAEModel, HeldOut, HeldOut]:
    """The first levels of the embedded SAE, and the text at its hookpoint."""
    sae = AutoModel.from_pretrained(embedded_sae_path(), width=448).eval()
    return sae, *(replace(data, hookpoint="model.layers.2") for data in text)
