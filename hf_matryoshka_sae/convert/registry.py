"""All formats, in the order in which they are tried on a checkpoint."""

from ..models import SAEModel
from .base import Format
from .checkpoint import Checkpoint
from .formats import (
    bussmann,
    dictionary_learning,
    embeddings,
    gemma_scope,
    gemma_scope_2,
    goodfire,
    llama_scope,
    llamascopium,
    nabeshima,
    openai,
    own,
    qwen_scope,
    saelens,
    sparsify,
)


# Ours by its config alone, before any tensor is read; then those that one name of a tensor or file tells apart.
_ORDER = (
    own.FORMAT,
    saelens.FORMAT,
    sparsify.FORMAT,
    gemma_scope.FORMAT,
    gemma_scope_2.FORMAT,
    llama_scope.FORMAT,
    llamascopium.FORMAT,
    embeddings.MLSAE,
    embeddings.CSR,
    openai.FORMAT,
    goodfire.FORMAT,
    nabeshima.FORMAT,
    bussmann.FORMAT,
    dictionary_learning.FORMAT,
    qwen_scope.FORMAT,
)
FORMATS = {format.name: format for format in _ORDER}


def recognized(checkpoint: Checkpoint) -> Format:
    """Return the format of a checkpoint, by its files, its config, and the names of its tensors.

    Raises:
        `ValueError`: if it is of no known format.
    """
    for format in _ORDER:
        if format.claims(checkpoint):
            return format
    fields = ", ".join(list(checkpoint.config)[:12]) or "none"
    raise ValueError(
        f"{checkpoint.name} is of no format that is known here. Its tensors: {checkpoint.described()}; its config's "
        f"fields: {fields}. If you know what it is, pass `format`: {', '.join(FORMATS)}."
    )


def able_to_write(sae: SAEModel) -> list[str]:
    """Return names of the formats that can express an SAE."""
    return [name for name, format in FORMATS.items() if format.write and objection(format, sae) is None]


def objection(format: Format, sae: SAEModel) -> str | None:
    """Return why a format that can be written cannot express an SAE; `None` where it can."""
    if sae.config.refine_steps and format is not own.FORMAT:
        return "its encoder is one product; `progressive.refined(sae, data, steps=0)` takes `refine_steps` back"
    return format.objection(sae)
