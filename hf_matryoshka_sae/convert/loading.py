"""One SAE of any format, loaded and saved."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ..models import SAEModel
from ..models.weight_checks import check_numbers
from .base import Format
from .checkpoint import Checkpoint, Hints
from .names import check_name
from .registry import FORMATS, able_to_write, objection, recognized
from .source import find_weights, locate


logger = logging.getLogger(__name__)


def load(
    path_or_repo: str | Path,
    format: str | None = None,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    dtype: torch.dtype | None = None,
    prefix_widths: Sequence[int] | None = None,
    k: int | float | None = None,
    hookpoint: str | None = None,
    base_model: str | None = None,
    width: int | None = None,
) -> SAEModel:
    """Load an SAE that any library wrote.

    Its latents and reconstructions are those of the library, on raw hidden states: normalisations are in the weights,
    or in the config's `input_normalization`. Pickles are read without running what is in them.

    Args:
        path_or_repo (`str` or `Path`): A file of weights, a folder with one SAE in or under it, or a Hub repository,
            of which only that SAE's files are downloaded.
        format (`str`, *optional*): One of [`formats`]; found by looking when left out.
        subfolder (`str`, *optional*): Folder or file of the SAE, where there are several.
        revision (`str`, *optional*): Branch, tag or commit of a repository.
        token (`str` or `bool`, *optional*): Token for a repository, as in huggingface_hub.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Type of the weights; thresholds stay in fp32.
        prefix_widths (`Sequence[int]`, *optional*): Widths at which a Matryoshka SAE was trained, where its files do
            not say; they end at the number of latents.
        k (`int` or `float`, *optional*): Latents per token, where the files do not say.
        hookpoint (`str`, *optional*): Place of its hidden states: a module's path in transformers, with `:input` for
            what goes into it.
        base_model (`str`, *optional*): Hub id of the language model.
        width (`int`, *optional*): Number of the first latents to keep.

    Returns:
        [`SAEModel`] in `eval` mode.

    Raises:
        `ValueError`: if there is no SAE or there are several, if files are damaged or do not fit together, or if it
            computes something that no SAE here does.
    """
    hints = Hints(prefix_widths, k, hookpoint, base_model, width, dtype or torch.float32)
    if format is not None:
        check_name(format)
    checkpoint = Checkpoint(locate(path_or_repo, subfolder, revision, token), hints)
    with _named_in_errors(checkpoint):
        library_format = recognized(checkpoint) if format is None else FORMATS[format]
        sae = library_format.read(checkpoint)
        if width is not None and width != sae.config.num_latents:
            sae = sae.truncate(width)
        if library_format.name != "hf_matryoshka_sae":  # which checks its own
            check_numbers(sae.state_dict(), sae.config, checkpoint.name)
    return sae.eval()


@contextmanager
def _named_in_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """Add the checkpoint's name to an error that lacks it."""
    try:
        yield
    except ValueError as error:
        if checkpoint.place.folder in str(error) and checkpoint.place.files.name in str(error):
            raise
        raise ValueError(f"{checkpoint.name} cannot be loaded: {error}") from error


def save(sae: SAEModel, path: str | Path, format: str = "hf_matryoshka_sae") -> None:
    """Write an SAE for another library.

    Every file is complete before it takes its name.

    Args:
        sae ([`SAEModel`]): The SAE, which is not changed.
        path (`str` or `Path`): A folder; for formats of one file also that file.
        format (`str`, *optional*, defaults to `"hf_matryoshka_sae"`): One of `formats(writable=True)`.

    Raises:
        `ValueError`: if the format is not known, is only read, or cannot express this SAE (the message says why, and
            which formats can), or if the folder holds an SAE of another format.
    """
    check_name(format, writable=True)
    library_format = FORMATS[format]
    _check_target(Path(path).expanduser(), library_format)
    reason = objection(library_format, sae)
    if reason is not None:
        raise ValueError(f"{format} cannot express this SAE: {reason}. What can: {', '.join(able_to_write(sae))}.")
    ids = sae.latent_ids.cpu()
    if format != "hf_matryoshka_sae" and not torch.equal(ids, torch.arange(len(ids))):
        logger.warning("%s has no place for the original ids of sorted or pruned latents; they are lost.", format)
    library_format.write(sae, Path(path).expanduser())


def _check_target(path: Path, library_format: Format) -> None:
    """Raise `ValueError` if a folder holds an SAE of another format: files of two formats would be neither."""
    weights = find_weights([file.name for file in path.iterdir() if file.is_file()]) if path.is_dir() else []
    for name in weights:
        present = recognized(Checkpoint(locate(path / name), Hints()))
        if present.name != library_format.name:
            raise ValueError(
                f"{path} holds an SAE in the format {present.name} ({name}). Choose another folder, or empty it."
            )
