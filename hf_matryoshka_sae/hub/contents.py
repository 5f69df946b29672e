"""The files of a repository, from the folder of a run or of one SAE."""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel

from .. import models
from ..features import FeatureIndex
from ..features.index.layout import INDEX
from ..features.sizes import FOLDER as INDEX_FOLDER
from ..models import MODELS, SAECollection, SAECollectionConfig
from ..models.checkpoint_files import weight_files
from ..models.digests import DIGESTS_NAME, digest, row_digests
from ..models.pieces import WHOLE_TENSORS, is_weights
from ..models.places import collection_index
from ..progressive.statistics import STATISTICS_FILE
from ..training.run.provenance import read_provenance
from .card import card_assets, run_card
from .layout import SAEFolder
from .measure import run_folder
from .public import public_config, public_index


logger = logging.getLogger(__name__)

Content = Path | bytes

_CONFIG = "config.json"


@dataclass(frozen=True)
class Repository:
    """The files of a repository.

    Args:
        files (`dict[str, Path | bytes]`): A file or its content, by its path in the repository.
        folders (`list[str]`): Folders of the SAEs; weights of earlier pushes in them are replaced.
    """

    files: dict[str, Content]
    folders: list[str]

    def replaces(self, name: str) -> bool:
        """Return whether a file was put into these folders by an earlier push and is to be deleted."""
        if name in self.files:
            return False
        folder, _, last = name.rpartition("/")
        parent, _, last_folder = folder.rpartition("/")
        beside_config = _is_weights(last) or last in (DIGESTS_NAME, STATISTICS_FILE)
        own = beside_config and folder in self.folders
        own |= last_folder == INDEX_FOLDER and parent in self.folders
        pictures = any(name.startswith(f"plots/{place}/" if place else "plots/") for place in self.folders)
        return pictures or own

    def write(self, folder: str | Path) -> None:
        """Write the files below a folder."""
        for name, content in self.files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                shutil.copyfile(content, path)


def run_repository(
    run_dir: str | Path,
    repo_id: str,
    saes: Sequence[SAEFolder],
    before: dict[str, Any] | None = None,
    license: str = "apache-2.0",
) -> Repository:
    """Return the files of a run's repository.

    Args:
        run_dir (`str` or `Path`): The run's folder.
        repo_id (`str`): Repository id, for the code in the card.
        saes (`Sequence[SAEFolder]`): SAEs that the repository shall hold.
        before (`dict`, *optional*): The `config.json` at its root now; the SAEs of its index stay in the new one.
        license (`str`, *optional*, defaults to `"apache-2.0"`): Licence of the weights, for the card.
    """
    files: dict[str, Content] = {}
    folder = run_folder(Path(run_dir).expanduser())
    local = {} if folder is None else read_provenance(folder)
    here = "model" in local["on_this_machine"] if "on_this_machine" in local else None
    for sae in saes:
        check_sae(sae.folder)
        files |= sae_files(sae, here)
    if saes[0].subfolder:
        files[_CONFIG] = _index(saes, before, here)
    others = sorted(set((before or {}).get("saes") or {}) - {sae.subfolder for sae in saes})
    notes = f"Also in this repository, from other pushes: {', '.join(f'`{other}`' for other in others)}." * bool(
        others
    )
    card: ModelCard = run_card(run_dir, repo_id, list(saes), license=license, notes=notes)
    files |= card_assets(run_dir, list(saes))
    files |= {"README.md": str(card).encode(), **code_files()}
    return Repository(files, [sae.subfolder for sae in saes])


def sae_files(sae: SAEFolder, here: bool | None = None) -> dict[str, Content]:
    """Return the files of one SAE: config, weights, digests of their rows; statistics and index where there are any.

    Args:
        sae ([`SAEFolder`]): The SAE.
        here (`bool`, *optional*): Whether its language model was a local folder in training; `None` if unknown.
    """
    config = public_config(json.loads((sae.folder / _CONFIG).read_text(encoding="utf-8")), here)
    config["auto_map"] = _auto_map(*_classes(config))
    files: dict[str, Content] = {_CONFIG: _json(config)}
    files |= {path.name: path for path in sorted(sae.folder.iterdir()) if _is_weights(path.name)}
    files[DIGESTS_NAME] = _json(_digests(sae.folder))
    if (sae.folder / STATISTICS_FILE).is_file():
        files[STATISTICS_FILE] = sae.folder / STATISTICS_FILE
    files |= _index_files(sae.folder, config.get("base_model"))
    return {f"{sae.subfolder}/{name}" if sae.subfolder else name: content for name, content in files.items()}


def _is_weights(name: str) -> bool:
    return is_weights(name) or fnmatchcase(name, "model*.safetensors*")  # of variants too


def _index_files(folder: Path, model: str | None) -> dict[str, Content]:
    """Return the files of an SAE's feature index; none if there is no index of these weights."""
    if not (folder / INDEX_FOLDER / INDEX).is_file():
        return {}
    try:
        FeatureIndex.open(folder).check(AutoModel.from_pretrained(folder))
    except ValueError as error:
        logger.warning("The feature index in %s is left out: %s", folder, error)
        return {}
    files: dict[str, Content] = {path.name: path for path in sorted((folder / INDEX_FOLDER).glob("[!.]*.*"))}
    files[INDEX] = _json(public_index(json.loads((folder / INDEX_FOLDER / INDEX).read_text(encoding="utf-8")), model))
    return {f"{INDEX_FOLDER}/{name}": content for name, content in files.items()}


def code_files() -> dict[str, Content]:
    """Return the code with which SAEs load without this package; transformers looks for it at the root."""
    folder = Path(models.__file__).parent
    return {path.name: path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"}


def check_sae(folder: Path) -> None:
    """Check from config and headers that a saved SAE is complete; raise `ValueError` where it is not."""
    try:
        config = AutoConfig.from_pretrained(folder)
        shapes: dict[str, list[int]] = {}
        for part in weight_files(folder, config.num_latents):
            with safe_open(part.path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (a safe_open file cannot be iterated)
                    rows, *others = file.get_slice(name).get_shape()
                    if name not in WHOLE_TENSORS and rows != part.stop - part.start:
                        raise ValueError(f"{name} in {part.path} has {rows} rows, not {part.stop - part.start}")
                    shapes[name] = [shapes.get(name, [0])[0] + rows, *others]
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"The SAE in {folder} is damaged or half-written ({error}). Save it again.") from error
    expected = [config.num_latents, config.d_in]
    if [shapes.get(name) for name in ("W_enc", "W_dec")] != [expected, expected]:
        raise ValueError(
            f"The SAE in {folder} has no whole weights: W_enc and W_dec should be {expected}, got "
            f"{shapes.get('W_enc')} and {shapes.get('W_dec')}. Save it again."
        )


def _digests(folder: Path) -> dict[str, Any]:
    """Compute digests of the rows of all tensors with one tensor in memory at a time; blocks end where files do."""
    config = AutoConfig.from_pretrained(folder)
    files = weight_files(folder, config.num_latents)
    widths = [*config.widths, *(part.stop for part in files)]
    digests_of_rows: dict[str, Any] = row_digests({}, config.num_latents, widths, WHOLE_TENSORS)
    headers: dict[str, str] = {}
    for part in files:
        with open(part.path, "rb") as raw:
            length = raw.read(8)
            headers[Path(part.path).name] = digest(length + raw.read(int.from_bytes(length, "little")))
        with safe_open(part.path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safe_open file cannot be iterated)
                tensor = {name: file.get_tensor(name)}
                one = row_digests(tensor, config.num_latents, widths, WHOLE_TENSORS, part.start)
                digests_of_rows["whole"] |= one["whole"]
                for row_name, digests in one["rows"].items():
                    digests_of_rows["rows"].setdefault(row_name, []).extend(digests)
    return {**digests_of_rows, "headers": headers}


def _index(saes: Sequence[SAEFolder], before: dict[str, Any] | None, here: bool | None) -> bytes:
    """Return the root's `config.json`, the index of the SAEs of earlier pushes and of this one."""
    configs = {sae.subfolder: json.loads((sae.folder / _CONFIG).read_text(encoding="utf-8")) for sae in saes}
    index = collection_index({place: public_config(config, here) for place, config in configs.items()})
    if before is not None and before.get("model_type") == SAECollectionConfig.model_type:
        index["saes"] = (before.get("saes") or {}) | index["saes"]
    return _json(index | {"auto_map": _auto_map(SAECollectionConfig, SAECollection)})


def _classes(config: dict[str, Any]) -> tuple[type, type]:
    (classes,) = (pair for pair in MODELS.items() if pair[0].model_type == config["model_type"])
    return classes


def _auto_map(config: type, model: type) -> dict[str, str]:
    pairs = {"AutoConfig": config, "AutoModel": model}
    return {auto: f"{cls.__module__.rsplit('.', 1)[1]}.{cls.__name__}" for auto, cls in pairs.items()}


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()
