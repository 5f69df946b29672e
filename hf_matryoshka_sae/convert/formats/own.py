"""Our own format, that of transformers: `config.json`, `model.safetensors`."""

from pathlib import Path

from ...models import CONFIGS, MODELS, SAEModel
from ..base import Format
from ..checkpoint import Checkpoint
from ..source import HubFiles


_MODELS = {config.model_type: MODELS[config] for config in CONFIGS.values()}


def claims(checkpoint: Checkpoint) -> bool:
    """Return whether the config names one of our classes."""
    return checkpoint.config.get("model_type") in _MODELS


def read(checkpoint: Checkpoint) -> SAEModel:
    """Return the SAE of a folder or repository; with a `width` no more of it is read."""
    kind = checkpoint.config.get("model_type")
    if kind not in _MODELS:
        raise ValueError(
            f"{checkpoint.name} is no SAE of hf_matryoshka_sae: its config names the model type {kind!r}."
        )
    hints, files, folder = checkpoint.hints, checkpoint.place.files, checkpoint.place.folder
    fields = {name: getattr(hints, name) for name in ("prefix_widths", "k", "hookpoint", "base_model")}
    fields = {name: value for name, value in fields.items() if value is not None}
    for name in fields:
        if not hasattr(_MODELS[kind].config_class, name):
            raise ValueError(f"{checkpoint.name} is a {kind}, which has no `{name}`.")
    options = fields | {"dtype": hints.dtype, "width": hints.width}
    if isinstance(files, HubFiles):
        where = {"subfolder": folder, "revision": files.revision, "token": files.token}
        sae = _MODELS[kind].from_pretrained(files.repo_id, **where, **options)
    else:
        sae = _MODELS[kind].from_pretrained(str(files.root / folder), **options)
    return sae.eval()


def objection(sae: SAEModel) -> None:
    """Return `None`: every SAE can be written."""


def write(sae: SAEModel, path: Path) -> None:
    """Write as `save_pretrained` does."""
    sae.save_pretrained(path)


FORMAT = Format("hf_matryoshka_sae", claims, read, objection, write)
