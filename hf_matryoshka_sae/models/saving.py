"""Saving an SAE: every file whole before it takes its name, whichever processes save into the same folder."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .pieces import PIECES_INDEX_NAME, allocate_files, is_weights, plan_files, write_index, write_latents
from .safetensors_file import give_usual_permissions


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def staged_files(target: Path, keep_others: bool = False, last: str = "config.json") -> Iterator[Path]:
    """A folder to write a checkpoint's files to; when the block ends they take their places in `target`.

    Every file is complete before it takes its name, the file `last` comes last, before it the index of pieces, and
    nothing changes where the block raises. Of several processes that save into one folder at once, each puts all of
    its files in place before the next begins: the last one's stay.

    Args:
        target (`Path`): Where the files belong; made if it is not there.
        keep_others (`bool`, *optional*, defaults to `False`): Leave weights of an earlier save in other shards.
        last (`str`, *optional*, defaults to `"config.json"`): The file by which a reader knows that all are there.
    """
    target.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
    try:
        yield staging
        with _one_at_a_time(target):
            _put_in_place(staging, target, keep_others, last)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _put_in_place(staging: Path, target: Path, keep_others: bool, last: str) -> None:
    written = {file.name for file in staging.iterdir()}
    for name in written:
        give_usual_permissions(staging / name)
    if PIECES_INDEX_NAME in written:
        # An earlier index would speak of a mixture of earlier and new pieces.
        (target / PIECES_INDEX_NAME).unlink(missing_ok=True)
    ordered = sorted(written, key=lambda name: (name == last, name == PIECES_INDEX_NAME))
    for name in ordered[:-1]:
        os.replace(staging / name, target / name)
    # Weights of an earlier save in other files; they would be read, or an index that is left speak of them.
    earlier = [] if keep_others else [path.name for path in target.iterdir() if is_weights(path.name)]
    for name in sorted(set(earlier) - written, key=lambda name: name != PIECES_INDEX_NAME):
        (target / name).unlink()
    os.replace(staging / last, target / last)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Keep other processes and threads of this machine out of this block for the same folder.

    The folder itself is locked, so that no lock file lies among a checkpoint's. Where there are no such locks (on
    Windows, on some network file systems) nobody is kept out.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class Saving:
    """How every SAE is saved and pushed; a part of [`SAEModel`]."""

    publisher = None  # how the installed package pushes an SAE: card and code are past these portable files

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """As in transformers, but every file is complete before it takes its name; the config comes last.

        A dictionary larger than `max_shard_size` (by default "5GB") is written in pieces by latents, see `pieces.py`:
        transformers' shards would hold each tensor whole.

        Args:
            save_directory (`str` or `os.PathLike`): Made if it is not there; an earlier save in it is replaced.
            is_main_process (`bool`, *optional*, defaults to `True`):
                `False` touches nothing: another process saves the same SAE. Without it every process saves, so each
                can save an SAE of its own.
            state_dict (`dict[str, Tensor]`, *optional*):
                What to save in place of the SAE's own tensors, such as `accelerator.get_state_dict(model)`.
            max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`), push_to_hub (`bool`, *optional*),
                variant (`str`, *optional*), ...: As for any transformers model.

        Raises:
            `ValueError`: if the tensors are spread over processes and no gathered `state_dict` is given.
            `OSError`: if a file cannot be written; what was in the folder stays.
        """
        kwargs |= {"is_main_process": is_main_process, "state_dict": state_dict}
        if self._distributed_by_transformers:  # its processes gather, or write, the weights together
            super().save_pretrained(save_directory, **kwargs)
            return
        if not is_main_process or _gathered_elsewhere(state_dict):
            return
        if kwargs.pop("push_to_hub", False):
            names = ("repo_id", "commit_message", "private", "token", "revision", "create_pr", "max_shard_size")
            pushed = {name: kwargs[name] for name in names if name in kwargs}
            self.push_to_hub(pushed.pop("repo_id", Path(save_directory).name), **pushed)
            for name in ("repo_id", "commit_message", "private", "create_pr", "revision"):
                kwargs.pop(name, None)
        size = kwargs.setdefault("max_shard_size", "5GB")
        state = state_dict or self.state_dict()
        if any(hasattr(tensor, "full_tensor") for tensor in state.values()):
            raise ValueError(
                "The weights are spread over processes (FSDP). Gather them on all processes, then save: "
                "`sae.save_pretrained(folder, is_main_process=accelerator.is_main_process, "
                "state_dict=accelerator.get_state_dict(model))`."
            )
        with staged_files(Path(save_directory), keep_others=bool(kwargs.get("variant"))) as staging:
            plan = plan_files(state, self.config.num_latents, size)
            if len(plan.pieces) == 1 or kwargs.get("variant"):
                super().save_pretrained(staging, **kwargs | {"state_dict": dict(state)})  # which it empties
                return
            super().save_pretrained(staging, **kwargs | {"state_dict": {}})  # the config alone
            allocate_files(staging, plan)
            write_latents(staging, plan, 0, state, show=True)
            write_index(staging, plan)

    @property
    def _distributed_by_transformers(self) -> bool:
        return getattr(self.config, "distributed_config", None) is not None

    def should_save_on_this_rank(self, is_main_process: bool) -> bool:
        """Whether this process writes files; transformers asks.

        Its own answer lets only the first process of a group write, also where each saves an SAE of its own.
        """
        if self._distributed_by_transformers:
            return super().should_save_on_this_rank(is_main_process)
        return is_main_process

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Push to the root of a repository, in one commit; arguments as in transformers.

        With the package installed, the commit also holds a card, digests of the rows, and code for those who load it
        without the package. `hf_matryoshka_sae.hub.push` does the same for a whole run.
        """
        push = type(self).publisher
        return super().push_to_hub(repo_id, **kwargs) if push is None else push(self, repo_id, **kwargs)


def _gathered_elsewhere(state_dict: dict | None) -> bool:
    """Whether this is what the other processes get where the first one gathers the weights: nothing."""
    first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    return state_dict is not None and not state_dict and not first
