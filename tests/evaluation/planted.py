"""SAEs of which it is known what they fire on: each latent on one token."""

import torch

from hf_matryoshka_sae.evaluation import HeldOut
from hf_matryoshka_sae.models import ReluSAE, ReluSAEConfig, SAEModel


EMBEDDING = "model.embed_tokens"


def planted(data: HeldOut, tokens: list[int]) -> SAEModel:
    """An SAE whose latent n fires on token n of a list alone: the embedding of that token, and a threshold."""
    rows = data.model.get_input_embeddings().weight.detach().float()
    sae = ReluSAE(ReluSAEConfig(d_in=rows.shape[1], num_latents=len(tokens), hookpoint=EMBEDDING)).eval()
    with torch.no_grad():
        own = rows[tokens]
        # A whitened direction tells every token from all others.
        solved = torch.linalg.lstsq(rows.double(), torch.eye(len(rows), dtype=torch.float64)[:, tokens]).solution.T
        scores = rows.double() @ solved.T
        best = scores[tokens, torch.arange(len(tokens))]
        scores[tokens, torch.arange(len(tokens))] = -torch.inf
        second = scores.amax(0)
        assert (best > second).all()
        sae.W_enc.copy_(solved.float())
        sae.b_enc.copy_((-(best + second) / 2).float())
        sae.W_dec.copy_(own)
        sae.b_dec.zero_()
    return sae


def frequent(data: HeldOut, count: int) -> list[int]:
    ids = torch.cat([batch.input_ids[batch.keep] for batch in data.batches])
    return ids.bincount().argsort(descending=True)[2 : 2 + count].tolist()
