"""Push: every file of a repository in one commit, so that it is never half there.

Weights are uploaded first and mean nothing until the commit names them. A push that was interrupted anywhere is
completed by running it again; what is already uploaded is not sent twice.
"""

import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel

from .. import __version__, models
from ..features import FeatureIndex
from ..features.layout import FOLDER as INDEX_FOLDER
from ..features.layout import INDEX
from ..models import MODELS, SAECollection, SAECollectionConfig, SAEModel
from ..models.checkpoint_files import WHOLE_TENSORS
from ..models.digests import DIGESTS_NAME, digest, row_digests
from ..progressive.statistics import STATISTICS_FILE
from .card import card_assets, run_card, sae_card
from .layout import MODEL_TYPES, SAEFolder, find_saes
from .measure import measure_run
from .repository import SAEInfo


logger = logging.getLogger(__name__)

Content = Path | bytes

_CONFIG = "config.json"
_WEIGHTS = "model*.safetensors*"


@dataclass(frozen=True)
class Repository:
    """What a repository is to hold.

    Args:
        files (`dict[str, Path | bytes]`): By their paths in the repository.
        folders (`list[str]`): Of the SAEs; weights of earlier pushes in them are replaced.
    """

    files: dict[str, Content]
    folders: list[str]

    def replaces(self, name: str) -> bool:
        """Whether a file of the repository belongs to what an earlier push put in these folders, and goes."""
        if name in self.files:
            return False
        folder, _, last = name.rpartition("/")
        parent, _, last_folder = folder.rpartition("/")
        beside_config = fnmatchcase(last, _WEIGHTS) or last in (DIGESTS_NAME, STATISTICS_FILE)
        own = beside_config and folder in self.folders
        own |= last_folder == INDEX_FOLDER and parent in self.folders
        pictures = any(name.startswith(f"plots/{place}/" if place else "plots/") for place in self.folders)
        return pictures or own

    def write(self, folder: str | Path) -> None:
        """Write the files below a folder."""
        for name, content in self.files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())


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
    where several SAEs of a run are pushed), an index of them as `config.json`, the card, its plots, and at the root
    the code with which they load where this package is not installed. SAEs that were pushed there before, from
    another run, stay; the card is that of this run.

    Args:
        run_dir (`str` or `Path`): Folder of a run; or of one SAE, which then lies at the root of the repository.
        repo_id (`str`): Made if it is not there.
        saes (`Sequence[str]`, *optional*): Names or patterns of the SAEs to push; all of the run by default.
        private (`bool`, *optional*): Of a repository that is made.
        token (`str` or `bool`, *optional*): By default the one huggingface_hub knows.
        revision (`str`, *optional*): Branch; made if it is not there.
        create_pr (`bool`, *optional*, defaults to `False`): Open a pull request.
        commit_message (`str`, *optional*): What the commit says.
        measure (`bool`, *optional*, defaults to `True`):
            Measure first what the card shows and the run's folder lacks; see [`measure_run`].
        license (`str`, *optional*, defaults to `"apache-2.0"`): Of the weights, for the card.
        show (`bool`, *optional*, defaults to `True`): Show progress bars.

    Returns:
        `CommitInfo` of huggingface_hub.

    Raises:
        `ValueError`: if there is no SAE, or a damaged one; nothing is sent then.
        `OSError`: if the connection fails; the repository is as it was, and the same call again completes it.
    """
    found = find_saes(run_dir, saes)
    for sae in found:
        check_sae(sae.folder)
    if measure:
        measure_run(run_dir, saes, show=show)
    message = commit_message or f"Push {', '.join(sae.subfolder or sae.name for sae in found)}"
    api = _api(token)
    with _connection(repo_id):
        repo_id, parent, before = _prepare(api, repo_id, private, revision)
        _check_root(repo_id, before, at_root=found[0].subfolder == "")
        repository = run_repository(run_dir, repo_id, found, before, license)
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
        sae ([`SAEModel`]): Loaded, pruned or trained.
        repo_id (`str`), commit_message, commit_description, private, token, revision, create_pr, max_shard_size, tags:
            As in `PreTrainedModel.push_to_hub`.
        license (`str`, *optional*): Of the weights, for the card; by default "apache-2.0" for an SAE of a run that is
            at hand, and left open for one whose weights may be somebody else's.

    Returns:
        `CommitInfo` of huggingface_hub.
    """
    with tempfile.TemporaryDirectory() as scratch, _connection(repo_id):
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
    """What a card says of latents that were sorted or pruned."""
    ids = sae.latent_ids.cpu()
    if torch.equal(ids, torch.arange(len(ids))):
        return ""
    return (
        f"Its {len(ids):,} latents were sorted or pruned from a larger or differently ordered SAE; the tensor "
        "`latent_ids` says which latent of that each one was."
    )


# What a repository holds


def run_repository(
    run_dir: str | Path,
    repo_id: str,
    saes: Sequence[SAEFolder],
    before: dict[str, Any] | None = None,
    license: str = "apache-2.0",
) -> Repository:
    """The files of a run's repository.

    Args:
        run_dir (`str` or `Path`): The run's folder.
        repo_id (`str`): The repository, for the card's snippets.
        saes (`Sequence[SAEFolder]`): The SAEs to put there.
        before (`dict`, *optional*): The `config.json` that is there, whose index is added to.
        license (`str`, *optional*, defaults to `"apache-2.0"`): Of the weights, for the card.
    """
    files: dict[str, Content] = {}
    for sae in saes:
        check_sae(sae.folder)
        files |= sae_files(sae)
    if saes[0].subfolder:
        files[_CONFIG] = _index(saes, before)
    others = sorted(set((before or {}).get("saes") or {}) - {sae.subfolder for sae in saes})
    notes = f"Also in this repository, from other pushes: {', '.join(f'`{other}`' for other in others)}." * bool(
        others
    )
    card: ModelCard = run_card(run_dir, repo_id, list(saes), license=license, notes=notes)
    files |= card_assets(run_dir, list(saes))
    files |= {"README.md": str(card).encode(), **code_files()}
    return Repository(files, [sae.subfolder for sae in saes])


def sae_files(sae: SAEFolder) -> dict[str, Content]:
    """The files of one SAE: config, weights, digests of their rows; statistics and index where there are any."""
    config = _public(json.loads((sae.folder / _CONFIG).read_text()))
    config["auto_map"] = _auto_map(*_classes(config))
    files: dict[str, Content] = {_CONFIG: _json(config)}
    files |= {path.name: path for path in sorted(sae.folder.glob(_WEIGHTS))}
    files[DIGESTS_NAME] = _json(_digests(sae.folder))
    if (sae.folder / STATISTICS_FILE).is_file():
        files[STATISTICS_FILE] = sae.folder / STATISTICS_FILE
    files |= _index_files(sae.folder)
    return {f"{sae.subfolder}/{name}" if sae.subfolder else name: content for name, content in files.items()}


def _index_files(folder: Path) -> dict[str, Content]:
    """The feature index of an SAE, where there is one of these weights."""
    if not (folder / INDEX_FOLDER / INDEX).is_file():
        return {}
    try:
        FeatureIndex.open(folder).check(AutoModel.from_pretrained(folder))
    except ValueError as error:
        logger.warning("The feature index in %s is left out: %s", folder, error)
        return {}
    return {f"{INDEX_FOLDER}/{path.name}": path for path in sorted((folder / INDEX_FOLDER).glob("[!.]*.*"))}


def code_files() -> dict[str, Content]:
    """The code with which SAEs load where this package is not installed; it has to lie at the root."""
    folder = Path(models.__file__).parent
    return {path.name: path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"}


def check_sae(folder: Path) -> None:
    """Read a saved SAE's files as far as needed to know that they are whole; raises `ValueError` where not."""
    try:
        config = AutoConfig.from_pretrained(folder)
        shapes = {}
        for path in _weight_files(folder):
            with safe_open(path, framework="pt") as file:
                shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"The SAE in {folder} is damaged or half-written ({error}). Save it again.") from error
    expected = [config.num_latents, config.d_in]
    if [shapes.get(name) for name in ("W_enc", "W_dec")] != [expected, expected]:
        raise ValueError(
            f"The SAE in {folder} has no whole weights: W_enc and W_dec should be {expected}, got "
            f"{shapes.get('W_enc')} and {shapes.get('W_dec')}. Save it again."
        )


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return [folder / "model.safetensors"]
    return sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})


def _digests(folder: Path) -> dict[str, Any]:
    """Digests of the rows of all tensors, one tensor in memory at a time."""
    config = AutoConfig.from_pretrained(folder)
    found: dict[str, Any] = {}
    headers: dict[str, str] = {}
    for path in _weight_files(folder):
        with open(path, "rb") as raw:
            length = raw.read(8)
            headers[path.name] = digest(length + raw.read(int.from_bytes(length, "little")))
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                one = row_digests({name: file.get_tensor(name)}, config.num_latents, config.widths, WHOLE_TENSORS)
                found = {
                    key: value | found.get(key, {}) if isinstance(value, dict) else value for key, value in one.items()
                }
    return {**found, "headers": headers}


def _index(saes: Sequence[SAEFolder], before: dict[str, Any] | None) -> bytes:
    """The root's `config.json`: the SAEs that were there, and those that come."""
    entries: dict[str, Any] = {}
    if before is not None and before.get("model_type") == SAECollectionConfig.model_type:
        entries |= before.get("saes") or {}
    for sae in saes:
        config = _public(json.loads((sae.folder / _CONFIG).read_text()))
        entries[sae.subfolder] = SAEInfo.of(sae.subfolder, config).entry()
    auto_map = _auto_map(SAECollectionConfig, SAECollection)
    kind = SAECollectionConfig.model_type
    return _json(
        {"architectures": [SAECollection.__name__], "auto_map": auto_map, "model_type": kind, "saes": entries}
    )


def _public(config: dict[str, Any]) -> dict[str, Any]:
    """A config as others may see it: of a language model in a folder of this machine only that folder's name."""
    model = config.get("base_model")
    if isinstance(model, str) and (Path(model).is_absolute() or model.startswith(("~", ".")) or Path(model).is_dir()):
        return config | {"base_model": Path(model).name}
    return config


def _classes(config: dict[str, Any]) -> tuple[type, type]:
    (found,) = (pair for pair in MODELS.items() if pair[0].model_type == config["model_type"])
    return found


def _auto_map(config: type, model: type) -> dict[str, str]:
    pairs = {"AutoConfig": config, "AutoModel": model}
    return {auto: f"{cls.__module__.rsplit('.', 1)[1]}.{cls.__name__}" for auto, cls in pairs.items()}


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()


# The Hub


def _api(token: str | bool | None) -> HfApi:

    return HfApi(token=token, library_name="hf_matryoshka_sae", library_version=__version__)


@contextmanager
def _connection(repo_id: str) -> Iterator[None]:
    """Say what a connection that failed for good means."""
    try:
        yield
    except httpx.HTTPError as error:
        if isinstance(error, HfHubHTTPError):
            raise  # the Hub's own words
        raise OSError(
            f"The connection to the Hub broke during the push to {repo_id} ({error}). The repository is either as it "
            "was or complete; push again: what is uploaded is not sent twice."
        ) from error


def _prepare(
    api: HfApi, repo_id: str, private: bool | None, revision: str | None
) -> tuple[str, str | None, dict[str, Any] | None]:
    """Make what is missing; the repository's full id, its newest commit, and its root's `config.json`."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not api.revision_exists(repo_id, revision):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    parent = api.model_info(repo_id, revision=revision).sha
    if not api.file_exists(repo_id, _CONFIG, revision=revision):
        return repo_id, parent, None
    found = json.loads(Path(api.hf_hub_download(repo_id, _CONFIG, revision=parent)).read_text())
    return repo_id, parent, found


def _check_root(repo_id: str, before: dict[str, Any] | None, at_root: bool) -> None:
    """A repository has one SAE at its root, or several in folders: the other kind would be lost."""
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
    stale = [name for name in api.list_repo_files(repo_id, revision=parent) if repository.replaces(name)]
    operations = [CommitOperationAdd(name, content) for name, content in sorted(repository.files.items())]
    operations += [CommitOperationDelete(name) for name in stale]
    try:
        return api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            commit_description=description,
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent,
        )
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 412:
            raise ValueError(
                f"{repo_id} has got another commit meanwhile; nothing was changed. Push again: what is uploaded is "
                "not sent twice."
            ) from error
        raise
