"""Push: every file of a repository in one commit, so that it is never half there.

Weights are uploaded first and mean nothing until the commit names them. A push that was interrupted anywhere is
completed by running it again; what is already uploaded is not sent twice.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from .. import __version__
from ..models import SAECollectionConfig, SAEModel
from ..models.hub_failures import downloads_checked, requests_named
from ..models.places import MODEL_TYPES
from .card import sae_card
from .contents import Repository, check_sae, code_files, run_repository, sae_files
from .layout import SAEFolder, find_saes
from .measure import measure_run


_CONFIG = "config.json"
# What huggingface_hub raises where an upload failed, or an answer is none of the Hub's: a login page, half of it.
_UNUSABLE_ANSWERS = (RuntimeError, json.JSONDecodeError, KeyError, TypeError, AttributeError, AssertionError)


def push(
    run_dir: str | Path,
    repo_id: str,
    saes: Sequence[str] | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    measure: bool = True,
    license: str = "apache-2.0",
    show: bool = True,
) -> CommitInfo:
    """Push the SAEs of a run, with their card, in one commit.

    The repository holds `<hookpoint>/{config.json, model.safetensors, statistics.safetensors}` (`<name>/<hookpoint>/`
    where several SAEs of a run are pushed; weights of a large one may lie in pieces), an index of them as
    `config.json`, the card, its plots, and at the root the code with which they load where this package is not
    installed. SAEs that were pushed there before, from another run, stay; the card is that of this run.

    Args:
        run_dir (`str` or `Path`): Folder of a run; or of one SAE, which then lies at the root of the repository.
        repo_id (`str`): Repository id; created if it does not exist.
        saes (`Sequence[str]`, *optional*): Names or patterns of the SAEs to push; all of the run by default.
        private (`bool`, *optional*): Whether a repository that is created here is private.
        token (`str` or `bool`, *optional*): Token of the Hub; by default the one huggingface_hub knows.
        revision (`str`, *optional*): Branch; created if it does not exist.
        create_pr (`bool`, *optional*, defaults to `False`): Whether to open a pull request.
        commit_message (`str`, *optional*): Message of the commit.
        measure (`bool`, *optional*, defaults to `True`):
            Whether to measure first what the card shows and the run's folder lacks; see [`measure_run`].
        license (`str`, *optional*, defaults to `"apache-2.0"`): Licence of the weights, for the card.
        show (`bool`, *optional*, defaults to `True`): Whether to show progress bars.

    Returns:
        `CommitInfo` of huggingface_hub.

    Raises:
        `ValueError`: if there is no SAE, or a damaged one; nothing is sent then.
        `OSError`: if a request fails for good, or its answer is none of the Hub's. The repository is as it was or
            complete, and the same call again completes it.
    """
    folders = find_saes(run_dir, saes)
    for sae in folders:
        check_sae(sae.folder)
    api = _api(token)
    with _requests(repo_id):  # a wrong name, or no connection, is told before anything is measured
        api.repo_exists(repo_id)
    if measure:
        measure_run(run_dir, saes, show=show)
    message = commit_message or f"Push {', '.join(sae.subfolder or sae.hookpoint or 'an SAE' for sae in folders)}"
    repo_id, parent, before = _prepare(api, repo_id, private, revision)
    _check_root(repo_id, before, at_root=folders[0].subfolder == "")
    repository = run_repository(run_dir, repo_id, folders, before, license)
    return _commit(api, repo_id, repository, message, revision, create_pr, parent)


def push_sae(
    sae: SAEModel,
    repo_id: str,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "5GB",
    tags: Sequence[str] | None = None,
    license: str | None = None,
) -> CommitInfo:
    """Push one SAE to the root of a repository, in one commit: what `sae.push_to_hub(repo_id)` does.

    Args:
        sae ([`SAEModel`]): The SAE.
        repo_id (`str`): Repository id; created if it does not exist.
        commit_message (`str`, *optional*): Message of the commit.
        commit_description (`str`, *optional*): Text below the message.
        private (`bool`, *optional*): Whether a repository that is created here is private.
        token (`str` or `bool`, *optional*): Token of the Hub; by default the one huggingface_hub knows.
        revision (`str`, *optional*): Branch; created if it does not exist.
        create_pr (`bool`, *optional*, defaults to `False`): Whether to open a pull request.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): Size above which the weights are split.
        tags (`Sequence[str]`, *optional*): Tags for the card, beside its own.
        license (`str`, *optional*): Licence of the weights, for the card; by default "apache-2.0" for an SAE of a run
            that is at hand, and left open for one whose weights may belong to others.

    Returns:
        `CommitInfo` of huggingface_hub.
    """
    with tempfile.TemporaryDirectory() as scratch:
        sae.save_pretrained(scratch, max_shard_size=max_shard_size)
        api = _api(token)
        repo_id, parent, before = _prepare(api, repo_id, private, revision)
        _check_root(repo_id, before, at_root=True)
        place = SAEFolder(Path(scratch), "", sae.config.hookpoint or "", "")
        came_from = Path(sae.config.name_or_path) if sae.config.name_or_path else None
        came_from = came_from if came_from is not None and came_from.is_dir() else None
        card = sae_card(sae, repo_id, came_from, license, _about_ids(sae))
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *(tags or [])]))
        files = {"README.md": str(card).encode(), **sae_files(place), **code_files()}
        message = commit_message or f"Push {type(sae).__name__}"
        return _commit(api, repo_id, Repository(files, [""]), message, revision, create_pr, parent, commit_description)


def _about_ids(sae: SAEModel) -> str:
    """Return the card's sentence on sorted or pruned latents; empty where they are neither."""
    ids = sae.latent_ids.cpu()
    if torch.equal(ids, torch.arange(len(ids))):
        return ""
    return (
        f"Its {len(ids):,} latents were sorted or pruned from a larger or differently ordered SAE; the tensor "
        "`latent_ids` says which latent of that each one was."
    )


# The Hub


def _api(token: str | bool | None) -> HfApi:
    return HfApi(token=token, library_name="hf_matryoshka_sae", library_version=__version__)


@contextmanager
def _requests(repo_id: str) -> Iterator[None]:
    """Add to the errors of failed requests what they mean for the push."""
    outcome = (
        f"Nothing half was committed: {repo_id} is either as it was or complete. Push again to complete it: what is "
        "uploaded is not sent twice."
    )
    try:
        with requests_named(lambda reason: f"The push to {repo_id} failed ({reason}). {outcome}", _UNUSABLE_ANSWERS):
            yield
    except HfHubHTTPError as error:
        if getattr(error.response, "status_code", None) == 412:
            raise ValueError(
                f"{repo_id} received another commit during the push; nothing was changed. Push again: what is "
                "uploaded is not sent twice."
            ) from error
        error.append_to_message(f"\n{outcome}")  # behind the Hub's own words, which say why it refused
        raise
    except HFValidationError:
        raise
    except ValueError as error:
        raise ValueError(f"The push to {repo_id} failed ({error}). {outcome}") from error


def _prepare(
    api: HfApi, repo_id: str, private: bool | None, revision: str | None
) -> tuple[str, str | None, dict[str, Any] | None]:
    """Create repository and branch if missing; return its full id, its newest commit and its root's `config.json`."""
    with _requests(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not api.revision_exists(repo_id, revision):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        parent = api.model_info(repo_id, revision=revision).sha
        if not api.file_exists(repo_id, _CONFIG, revision=revision):
            return repo_id, parent, None
        with downloads_checked(repo_id, {}):
            path = api.hf_hub_download(repo_id, _CONFIG, revision=parent)
    try:
        return repo_id, parent, json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"The config.json at the root of {repo_id}, to which this push would add, is damaged ({error}). Delete "
            "that file on the Hub, or push to another repository or `revision`."
        ) from error


def _check_root(repo_id: str, before: dict[str, Any] | None, at_root: bool) -> None:
    """Raise `ValueError` where an SAE at the root and SAEs in folders would meet: one kind would hide the other."""
    kind = (before or {}).get("model_type")
    if at_root and kind == SAECollectionConfig.model_type:
        raise ValueError(
            f"{repo_id} holds SAEs in folders ({', '.join(before['saes'])}); one at its root would hide them. Push to "
            "another repository or `revision`, or push the run's folder instead of the SAE's."
        )
    if not at_root and kind in MODEL_TYPES:
        raise ValueError(
            f"{repo_id} holds an SAE at its root, which an index of others would hide. Push to another repository or "
            "`revision`."
        )


def _commit(
    api: HfApi,
    repo_id: str,
    repository: Repository,
    message: str,
    revision: str | None,
    create_pr: bool,
    parent: str | None,
    description: str | None = None,
) -> CommitInfo:
    with _requests(repo_id):
        stale = [name for name in api.list_repo_files(repo_id, revision=parent) if repository.replaces(name)]
        operations = [CommitOperationAdd(name, content) for name, content in sorted(repository.files.items())]
        operations += [CommitOperationDelete(name) for name in stale]
        return api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            commit_description=description,
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent,
        )
