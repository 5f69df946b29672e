"""The published objectives, dense and in float64, written from their equations (no code of the package)."""

import torch


def encode(x, W_enc, b_enc, b_dec):
    return (x - b_dec) @ W_enc.T + b_enc


def batch_topk(pre, k):
    """Keep the int(k * N) largest positive entries of the batch."""
    flat = pre.clamp(min=0).flatten()
    cut = flat.sort(descending=True).values[int(k * len(pre)) - 1]
    return torch.where((pre >= cut) & (pre > 0), pre, 0.0)


def topk(pre, k):
    cut = pre.sort(dim=1, descending=True).values[:, k - 1 : k]
    return torch.where((pre >= cut) & (pre > 0), pre, 0.0)


def prefix_errors(x, a, W_dec, b_dec, widths):
    """Squared error of each prefix, summed over D, averaged over tokens."""
    return torch.stack([(x - a[:, :m] @ W_dec[:m] - b_dec).square().sum(1).mean() for m in widths])


def variance(x):
    return (x - x.mean(0)).square().sum(1).mean()


def auxk(x, residual, pre, W_dec, dead, k_aux, rectify=True):
    """Squared error of what the k_aux dead latents with the largest pre-activations decode, against the residual."""
    masked = torch.where(dead, pre, torch.full_like(pre, -torch.inf))
    chosen = torch.zeros_like(pre)
    index = masked.topk(min(k_aux, int(dead.sum())), dim=1).indices
    chosen.scatter_(1, index, pre.gather(1, index))
    if rectify:
        chosen = chosen.clamp(min=0)
    return (residual - chosen @ W_dec).square().sum(1).mean()
