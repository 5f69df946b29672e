"""The root of a repository, or of a run's folder, that holds several SAEs: an index of their folders.

AutoModel.from_pretrained("user/saes")                                  # says which there are; loads the only one
AutoModel.from_pretrained("user/saes", subfolder="model.layers.12")
"""

from pathlib import Path

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, PreTrainedModel

from .modeling_sae import MODELS
from .places import COLLECTION_TYPE, only_place, saes_below


@strict
class SAECollectionConfig(PreTrainedConfig):
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
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load the only SAE of a repository or folder.

        Raises:
            `ValueError`: if there are several; it lists their folders, one of which is to be given as `subfolder`.
        """
        source = pretrained_model_name_or_path
        config = kwargs.pop("config", None)
        if config is None:
            where = {key: kwargs[key] for key in ("revision", "token", "cache_dir") if key in kwargs}
            config = SAECollectionConfig.from_pretrained(source, **where)
        # In a folder SAEs come and go by copying; what is there counts.
        saes = saes_below(source) if Path(source).is_dir() else config.saes or {}
        place = only_place(source, saes)
        (model,) = (model for config, model in MODELS.items() if config.model_type == saes[place]["model_type"])
        return model.from_pretrained(source, *args, **kwargs | {"subfolder": place})
