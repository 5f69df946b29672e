"""A small language model, SAEs on it, and what an index of them should hold, by sorting N x F activations."""

import torch

from hf_matryoshka_sae.activations import harvest, heldout_batches
from hf_matryoshka_sae.features import IndexSizes, build_index
from hf_matryoshka_sae.models import MatryoshkaSAE, MatryoshkaSAEConfig

from ..activations import tiny


HOOKPOINT, LENGTH, WINDOWS, LATENTS = "model.layers.1", 12, 4, 40
SIZES = IndexSizes(top_contexts=3, sampled_contexts=10, context_tokens=7, cofiring=4, neighbours=3, cofiring_tokens=25)


def language_model():
    torch.manual_seed(0)
    return tiny.llama()


def make_sae(**options) -> MatryoshkaSAE:
    torch.manual_seed(1)
    options = {"activation": "topk", "k": 5, "prefix_widths": [10, LATENTS]} | options
    config = MatryoshkaSAEConfig(d_in=16, num_latents=LATENTS, base_model="tiny", hookpoint=HOOKPOINT, **options)
    return MatryoshkaSAE(config).eval()


def build(folder, sae=None, model=None, texts=None, tokens=600, **options):
    """An index in a folder."""
    options = {
        "sizes": SIZES,
        "context_length": LENGTH,
        "lm_batch_size": WINDOWS,
        "show": False,
        "showcase": False,
    } | options
    texts = tiny.texts(80) if texts is None else texts
    sae, model = sae or make_sae(), model or language_model()
    return build_index(sae, model, texts, tokens, folder, tokenizer=tiny.tokenizer(), **options)


def dense(sae=None, model=None, tokens=600, exclude="special"):
    """Token ids `(B, S)` and activations `(B, S, F)`, 0 where positions do not count, and how many count."""
    sae, model = sae or make_sae(), model or language_model()
    batches = heldout_batches(tiny.texts(80), tiny.tokenizer(), LENGTH, tokens, WINDOWS, exclude=exclude)
    ids, values = [], []
    for batch in batches:
        states = harvest(model, batch.input_ids, None, [HOOKPOINT])[HOOKPOINT]
        with torch.no_grad():
            values.append(sae.encode(states).to_dense() * batch.keep[..., None])
        ids.append(batch.input_ids)
    return torch.cat(ids), torch.cat(values), sum(int(batch.keep.sum()) for batch in batches)
