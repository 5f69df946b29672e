"""Small random models of many architectures, and an SAE whose vectors matter to them."""

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hf_matryoshka_sae.models import MatryoshkaSAE, MatryoshkaSAEConfig

from ..activations import tiny


WIDTH, LATENTS = 16, 40


def qwen2():
    return Qwen2ForCausalLM(Qwen2Config(**tiny.SIZES, num_key_value_heads=1)).eval()


def mistral():
    return MistralForCausalLM(MistralConfig(**tiny.SIZES, num_key_value_heads=1)).eval()


def gemma2():
    return Gemma2ForCausalLM(Gemma2Config(**tiny.SIZES, num_key_value_heads=1, head_dim=8)).eval()


ARCHITECTURES = tiny.ARCHITECTURES | {
    "qwen2": (qwen2, "model.layers"),
    "mistral": (mistral, "model.layers"),
    "gemma2": (gemma2, "model.layers"),
}


def model_of(name: str, dtype: torch.dtype = torch.float32):
    """A model whose layers do something, and its block number 1."""
    torch.manual_seed(0)
    build, layers = ARCHITECTURES[name]
    model = build().to(dtype)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model, f"{layers}.1"


def make_sae(hookpoint: str, dtype: torch.dtype = torch.float32, **options) -> MatryoshkaSAE:
    torch.manual_seed(1)
    options = {"activation": "topk", "k": 5, "prefix_widths": [10, LATENTS]} | options
    config = MatryoshkaSAEConfig(d_in=WIDTH, num_latents=LATENTS, hookpoint=hookpoint, **options)
    return MatryoshkaSAE(config).to(dtype).eval()


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(7, 200, (rows, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model, ids, **options):
    return model(input_ids=ids, **options).logits
