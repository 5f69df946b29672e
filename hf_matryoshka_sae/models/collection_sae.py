"""The root of a repository, or of a run's folder, that holds several SAEs: an index of their folders.

AutoModel.from_pretrained("user/saes")                                  # says which there are; loads the only one
AutoModel.from_pretrained("user/saes", subfolder="model.layers.12")
"""

import os
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, PreTrainedModel

from .config_checks import CheckedConfig
from .modeling_sae import MODELS
from .places import COLLECTION_TYPE, only_place, saes_below
from .weight_checks import is_inner_folder


@strict
class SAECollectionConfig(CheckedConfig, PreTrainedConfig):
    """The `config.json` at the root of a repository of SAEs, or of a run's folder.

    Args:
        saes (`dict`): For each folder what its SAE is: `model_type`, `base_model`, `hookpoint`, `d_in`, `num_latents`
            and `prefix_widths`.
    """

    model_type = COLLECTION_TYPE

    saes: dict[str, dict] | None = None


class SAECollection(PreTrainedModel):
    """What `AutoModel` finds at the root of a repository of SAEs. It has no weights of its own."""

    config_class = SAECollectionConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Load the only SAE of a repository or folder.

        Raises:
            `ValueError`: if there are several; it lists their folders, one of which is to be given as `subfolder`. If
                the index is damaged.
        """
        source = pretrained_model_name_or_path
        config = kwargs.pop("config", None)
        if config is None:
            names = ("revision", "token", "cache_dir", "force_download", "local_files_only")
            where = {key: kwargs[key] for key in names if key in kwargs}
            config = SAECollectionConfig.from_pretrained(source, **where)
        # In a folder SAEs come and go by copying; what is there counts.
        saes = saes_below(source) if Path(source).is_dir() else config.saes or {}
        place = only_place(source, saes)
        models = {config.model_type: model for config, model in MODELS.items()}
        kind = saes[place].get("model_type")
        if not isinstance(kind, str) or kind not in models or not is_inner_folder(place):
            raise ValueError(
                f"The index (config.json) of {source} names {kind!r} in the folder {place!r}, which is no SAE in it. "
                "Push it again, or load the folder that you mean with `subfolder`."
            )
        return models[kind].from_pretrained(source, *args, **kwargs | {"subfolder": place})
