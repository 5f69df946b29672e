"""Names of latents, on texts whose words are planted."""

import pytest
import torch

from hf_matryoshka_sae.retrieval import name_latents


def test_a_latent_is_named_by_the_words_of_its_texts() -> None:
    common = "the report says that today"
    texts = [f"{common} rivers flood valley {i}" for i in range(6)] + [
        f"{common} violin concert {i}" for i in range(6)
    ]
    codes = torch.zeros(12, 3)
    codes[:6, 0], codes[6:, 1] = torch.arange(1.0, 7), torch.arange(1.0, 7)
    names = name_latents(codes, texts, latent_ids=[7, 5, 9])
    assert set(names) == {"7", "5"}  # the third never fires
    assert set(names["7"]["words"]) == {"rivers", "flood", "valley"}
    assert set(names["5"]["words"][:2]) == {"violin", "concert"}
    assert names["5"]["texts"][0] == texts[-1] and names["5"]["share"] == 0.5


def test_every_code_needs_its_text() -> None:
    with pytest.raises(ValueError, match="codes of 2 texts, and 1 texts"):
        name_latents(torch.ones(2, 3), ["one"], latent_ids=[0, 1, 2])
