"""What is checked before transformers reads all weights of an SAE at once."""

import os

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .checkpoint_files import asked_config, pinned
from .weight_checks import WeightFile, check_headers, read_shards


def check_whole(config_class: type, source: str | os.PathLike, kwargs: dict) -> None:
    """Compare the headers of all weights with the config, before transformers makes anything of either's size.

    Args:
        config_class (`type`): Class of the config.
        source (`str` or `os.PathLike`): Folder or repository id.
        kwargs (`dict`): What `from_pretrained` got. It gains the config, and that no pickle is read.

    Raises:
        `ValueError`: if config and weights do not fit each other, or an index names files elsewhere.
        `OSError`: if the files are not there or cannot be fetched.
    """
    given = ("state_dict", "gguf_file")
    if source is None or kwargs.get("use_safetensors") is False or any(kwargs.get(name) for name in given):
        return
    where, _ = pinned(source, kwargs)
    config = asked_config(config_class, source, where, kwargs)
    if getattr(config, "transformers_weights", None) is not None:
        raise ValueError(f"The config of {source} names a file of weights itself. Take out `transformers_weights`.")
    optional = where | {"_raise_exceptions_for_missing_entries": False}
    single, index = (_of_variant(name, kwargs) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    path = cached_file(source, single, **optional)
    if path is not None:
        files = [WeightFile(path, None, 0, config.num_latents)]
    else:
        path = cached_file(source, index, **optional)
        if path is None:
            raise OSError(f"There are no weights in {source}: neither {single} nor {index}.")
        shards = {cached_file(source, shard, **where): names for shard, names in read_shards(path).items()}
        files = [WeightFile(path, names, 0, config.num_latents) for path, names in shards.items()]
    check_headers(files, config, source)
    kwargs |= {"config": config, "use_safetensors": True}
    if "revision" in where:
        kwargs["revision"] = where["revision"]  # the commit, so that it is not looked up again
    kwargs.pop("force_download", None)  # it was


def _of_variant(name: str, kwargs: dict) -> str:
    """The name of a file of weights in the variant that is asked for, as transformers has it."""
    stem, _, extension = name.rpartition(".")
    return f"{stem}.{kwargs['variant']}.{extension}" if kwargs.get("variant") else name
