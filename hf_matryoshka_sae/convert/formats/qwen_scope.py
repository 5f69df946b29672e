"""Qwen-Scope (`layer<n>.sae.pt`): TopK on the residual stream after layer n.

`W_enc` is `(F, D)` and `W_dec` `(D, F)`, the other way round than their names mean elsewhere. `b_dec` is not
subtracted from the input. k and the model are in the repository's name, `SAE-Res-<model>-W<F / 1024>K-L0_<k>`.
"""

import re
from typing import Any

from ...models import SAEModel
from ..assembly import assemble
from ..base import Format
from ..checkpoint import Checkpoint


_REPOSITORY = re.compile(r"SAE-Res-(.+?)-W\d+K-L0_(\d+)")
_LAYER = re.compile(r"layer(\d+)\.sae\.pt")


def claims(checkpoint: Checkpoint) -> bool:
    """Return whether file or repository have the names of Qwen-Scope."""
    return bool(_LAYER.fullmatch(checkpoint.file_name) or _REPOSITORY.search(checkpoint.name))


def read(checkpoint: Checkpoint) -> SAEModel:
    """Return the SAE of one layer."""
    b_enc, b_dec = checkpoint.vector("b_enc"), checkpoint.vector("b_dec")
    W_enc, W_dec = checkpoint.matrices("W_enc", "W_dec", (len(b_enc), len(b_dec)), transposed=(False, True))
    repository, layer = _REPOSITORY.search(checkpoint.name), _LAYER.fullmatch(checkpoint.file_name)
    places: dict[str, Any] = {}
    if repository is not None:
        places["base_model"] = f"Qwen/{repository[1]}"
    if layer is not None:
        places["hookpoint"] = f"model.layers.{layer[1]}"
    return assemble(
        checkpoint,
        "topk",
        W_enc=W_enc,
        W_dec=W_dec,
        b_enc=b_enc,
        b_dec=b_dec,
        k=int(repository[2]) if repository else None,
        apply_b_dec_to_input=False,
        **places,
    )


FORMAT = Format("qwen_scope", claims, read)
