"""The language model whose hidden states are read, with whichever head its checkpoint has."""

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from ..common.hub_access import check_reachable
from ..models.screening import bf16_is_fast


EMBEDDED = "embedded"


def load_language_model(
    name: str, revision: str | None = None, dtype: str | None = None, device: torch.device | str = "cpu"
) -> tuple[nn.Module, object]:
    """Load a language model, frozen and in evaluation mode; return it and its tokenizer.

    Args:
        name (`str`): Hub id, folder, or `"embedded"` for the model that ships with the package.
        revision (`str`, *optional*): Branch, tag or commit.
        dtype (`str`, *optional*): `"float32"`, `"bfloat16"` or `"float16"`; by default the checkpoint's. `"auto"` is
            `"bfloat16"` where the hardware multiplies it fast, elsewhere the checkpoint's.
        device (`torch.device`, *optional*, defaults to `"cpu"`): Where the model runs.

    Returns:
        The model (causal, masked or plain encoder, as its checkpoint says) and the tokenizer.

    Raises:
        `ValueError`: if the model cannot be found or read, or the type is unknown.
    """
    if dtype not in (None, "float32", "bfloat16", "float16", "auto"):
        raise ValueError(f"The model's type must be float32, bfloat16, float16 or auto, got {dtype!r}.")
    if dtype == "auto":
        dtype = "bfloat16" if bf16_is_fast(torch.device(device)) else None
    if name == EMBEDDED:
        from ..assets import load_embedded_lm

        model, tokenizer = load_embedded_lm()
        model = model.to(getattr(torch, dtype or "float32"))
    else:
        try:
            check_reachable(name, "config.json", revision=revision)
            config = AutoConfig.from_pretrained(name, revision=revision)
            model = model_class(config).from_pretrained(name, revision=revision, dtype=dtype or "auto")
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        except OSError as error:
            raise ValueError(
                f"The language model {name!r} cannot be loaded: {error} Check the id or folder and the network, or "
                f"take `{EMBEDDED}`, the model that ships with the package."
            ) from error
    return model.eval().requires_grad_(False).to(device), tokenizer


def load_tokenizer(name: str, revision: str | None = None) -> object:
    """Load the tokenizer of a language model alone; `name` and errors are those of [`load_language_model`]."""
    if name == EMBEDDED:
        from ..assets import load_embedded_lm

        return load_embedded_lm()[1]
    try:
        check_reachable(name, "config.json", revision=revision)
        return AutoTokenizer.from_pretrained(name, revision=revision)
    except OSError as error:
        raise ValueError(f"The tokenizer of {name!r} cannot be loaded: {error}") from error


def model_class(config: PreTrainedConfig) -> type:
    """Return the auto class whose models have the head of a checkpoint."""
    architecture = (config.architectures or [""])[0]
    if architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return AutoModelForCausalLM
    if architecture in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        return AutoModelForMaskedLM
    return AutoModel
