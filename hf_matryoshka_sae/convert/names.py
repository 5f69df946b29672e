"""The formats by name, for a command that checks its arguments before torch is imported."""

from ..common.command import nearest


ABOUT = {
    "hf_matryoshka_sae": "this package: config.json + model.safetensors, as transformers has it",
    "saelens": "SAELens, version 6 or before: cfg.json + sae_weights.safetensors",
    "sparsify": "sparsify: <hookpoint>/cfg.json + sae.safetensors",
    "gemma_scope": "Gemma Scope: params.npz",
    "gemma_scope_2": "Gemma Scope 2: params.safetensors (+ config.json)",
    "llama_scope": "Llama Scope and R1-Distill: hyperparams.json + checkpoints/final.safetensors",
    "llamascopium": "llamascopium: config.json + sae_weights.safetensors with W_E and W_D",
    "mlsae": "tim-lawson/mlsae: config.json + model.safetensors",
    "csr": "sentence-transformers SparseAutoEncoder (CSR): config.json + model.safetensors",
    "openai": "OpenAI's GPT-2 autoencoders, ReLU and TopK: <layer>.pt",
    "goodfire": "Goodfire and DeepSeek-R1: a state dict of two linear layers",
    "nabeshima": "noanabeshima/matryoshka-saes: a state dict with normalizer.running_avg",
    "bussmann": "bartbussmann/matryoshka_sae and BatchTopK: sae.pt + config.json",
    "dictionary_learning": "dictionary_learning: ae.pt (+ config.json)",
    "qwen_scope": "Qwen-Scope: layer<n>.sae.pt",
}
"""One line about each format, in the order in which they are tried on a checkpoint."""

WRITABLE = ("hf_matryoshka_sae", "saelens", "sparsify", "gemma_scope", "openai", "dictionary_learning", "csr")
"""Formats that can be written too."""


def formats(writable: bool = False) -> dict[str, str]:
    """Return the formats that can be read, or written.

    Args:
        writable (`bool`, *optional*, defaults to `False`): Only the formats that [`save`] knows.

    Returns:
        `dict[str, str]`: One line about each format, by its name.
    """
    return {name: about for name, about in ABOUT.items() if name in WRITABLE or not writable}


def check_name(name: str, writable: bool = False) -> None:
    """Raise `ValueError` for the name of no format, with what is near, or of one that is only read."""
    if name not in ABOUT:
        raise ValueError(f"Unknown format {name!r}.{nearest(name, ABOUT)}")
    if writable and name not in WRITABLE:
        raise ValueError(f"{name} is only read. Formats that are written: {', '.join(WRITABLE)}.")
