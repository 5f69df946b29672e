"""A sharded dictionary on disk: written and read by its processes, each its own latents, by none of them whole."""

import copy
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ...models import SAEConfig, SAEModel
from ...models.checkpoint_files import read_latents
from ...models.pieces import allocate_files, plan_files, write_index, write_latents
from ...models.saving import staged_files
from ...models.sharding import Layout


_MAX_BYTES = "5GB"


def save_own_rows(
    sae: SAEModel, config: SAEConfig, layout: Layout, folder: Path, max_bytes: int | str = _MAX_BYTES
) -> None:
    """Save a dictionary of which every process of `layout` holds a part; all of them call this.

    Where each process holds the whole, one writes. The files are those that one process would write.

    Args:
        sae ([`SAEModel`]): The latents of this process.
        config ([`SAEConfig`]): Of the whole dictionary.
        layout ([`Layout`]): Which latents, and who has the others.
        folder (`Path`): Where to, on a file system that all of them share.
        max_bytes (`int` or `str`, *optional*, defaults to `"5GB"`): Of a file.

    Raises:
        `OSError`: in all processes where one cannot write; what was in the folder stays.
    """
    first, tensors = layout.replica == layout.shard == 0, dict(sae.state_dict())
    plan = plan_files(tensors, layout.num_latents, max_bytes)
    with ExitStack() as stack:
        staging, error = None, None
        try:
            if first:
                staging = stack.enter_context(staged_files(folder))
                allocate_files(staging, plan)
        except OSError as caught:
            error = caught
        staging = _agreed(layout, staging, error)[0]
        try:
            if layout.replica == 0:
                write_latents(staging, plan, layout.rows[0], tensors)
        except OSError as caught:
            error = caught
        _agreed(layout, None, error)
        if first:
            write_index(staging, plan)
            config.save_pretrained(staging)
    if layout.shards > 1:
        dist.barrier(layout.group)


def _agreed(layout: Layout, value: Any, error: OSError | None) -> list:
    """What each process says; raises everywhere where one failed."""
    said = (value, None if error is None else str(error))
    answers = [said] * layout.processes
    if layout.shards > 1:
        dist.all_gather_object(answers, said, group=layout.group)
    if error is not None:
        raise error
    for rank, (_, reason) in enumerate(answers):
        if reason is not None:
            raise OSError(f"Process {rank} of those that hold this dictionary could not write its latents: {reason}")
    return [value for value, _ in answers]


def load_own_rows(
    model_class: type[SAEModel], config: SAEConfig, source: str | Path, layout: Layout, **where: Any
) -> SAEModel:
    """The latents of this process of a saved dictionary; no others are read.

    Args:
        model_class (`type`): Of the SAE.
        config ([`SAEConfig`]): Of the part that this process holds.
        source (`str` or `Path`): Folder or repository of the whole.
        layout ([`Layout`]): Which latents.
        where: As for [`read_latents`].

    Returns:
        [`SAEModel`] in `eval` mode.
    """
    _, tensors = read_latents(source, *layout.rows, **where)
    sae = model_class(copy.deepcopy(config)).to(tensors["W_enc"].dtype)
    sae.load_state_dict(tensors)
    return sae.eval()
