"""CSR (Wen et al. 2025, arXiv 2503.01776) as sentence-transformers trains it, on embeddings that are there already."""

import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.losses import CSRLoss
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder
from torch import Tensor
from tqdm.auto import tqdm


_BATCH = 256


def trained_csr(
    pairs: tuple[Tensor, Tensor], training: Tensor, num_latents: int, k: int, tokens: int, seed: int, lr: float
) -> SparseAutoEncoder:
    """A CSR module after as many embeddings as our SAEs see: its reconstruction and its contrastive loss.

    Args:
        pairs (`tuple` of two `Tensor`s of shape `(M, D)`): Queries and their documents, for the contrastive loss.
        training (`Tensor` of shape `(N, D)`): All embeddings, for the reconstruction; a batch has as many of them as
            of pairs.
        num_latents (`int`), k (`int`), tokens (`int`), seed (`int`): Size, sparsity, embeddings seen, and seed.
        lr (`float`): Highest learning rate.
    """
    torch.manual_seed(seed)
    module = SparseAutoEncoder(training.shape[1], num_latents, k=k)
    with torch.no_grad():
        module.pre_bias.copy_(training.mean(0))
    loss = CSRLoss(SparseEncoder(modules=[module], device="cpu"))
    steps = tokens // (3 * _BATCH)
    optimizer = torch.optim.Adam(module.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    module.train()
    for _ in tqdm(range(steps), desc=f"CSR {k}", leave=False):
        chosen = torch.randint(len(pairs[0]), (_BATCH,))
        parts = [pairs[0][chosen], pairs[1][chosen], training[torch.randint(len(training), (_BATCH,))]]
        outputs = [module({"sentence_embedding": part}) for part in parts]
        total = sum(loss.reconstruction_loss.compute_loss_from_embeddings(outputs).values())
        total = total + loss.loss.compute_loss_from_embeddings([o["sentence_embedding"] for o in outputs[:2]], None)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()
    return module.eval()
