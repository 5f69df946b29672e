"""Taking a pruned SAE along: as a zip file, or to a repository on the Hub."""

import shutil
import tempfile
import time
import zipfile
from pathlib import Path

from ...models import SAEModel
from .opened import Opened, Pruning


_KEPT_SECONDS = 3600


def export(opened: Opened, pruning: Pruning, folder: Path) -> Path:
    """Write a zip file that holds what `AutoModel.from_pretrained` reads, in a folder that is named after the pruning.

    Zip files in the folder that are older than an hour are removed.
    """
    for old in folder.glob("*/*.zip"):
        if time.time() - old.stat().st_mtime > _KEPT_SECONDS:
            shutil.rmtree(old.parent, ignore_errors=True)
    sae, name = opened.pruned(pruning), _name(opened, pruning)
    target = Path(tempfile.mkdtemp(dir=folder)) / f"{name}.zip"
    with tempfile.TemporaryDirectory(dir=folder) as saved:
        sae.save_pretrained(saved)
        with zipfile.ZipFile(target, "w") as file:  # weights do not get smaller by packing
            for path in sorted(Path(saved).iterdir()):
                file.write(path, f"{name}/{path.name}")
            file.writestr(f"{name}/README.md", _readme(name, sae))
    return target


def push(sae: SAEModel, repo: str, token: str | None, private: bool) -> tuple[str, str]:
    """Push an SAE to a repository; returns its id and address.

    Raises:
        `ValueError`: if it is not named by its owner and its name.
    """
    repo = repo.strip()
    if repo.count("/") != 1:
        raise ValueError("Name the repository as your-name/its-name.")
    address = sae.push_to_hub(repo, token=token, private=private).repo_url
    return address.repo_id, str(address)


def _name(opened: Opened, pruning: Pruning) -> str:
    source = Path(opened.source).name or "sae"
    place = "" if opened.subfolder == "" else "-" + opened.subfolder.replace("/", "-")
    return f"{source}{place}-{pruning.ranking}-{pruning.width}" + (f"-k{pruning.k}" if pruning.k else "")


def _readme(name: str, sae: SAEModel) -> str:
    return (
        f"# {name}\n\n{sae.config.num_latents} latents of an SAE on `{sae.config.hookpoint}` of "
        f"`{sae.config.base_model}`, pruned. `latent_ids` says which they were.\n\n"
        "```python\nimport hf_matryoshka_sae  # registers the classes\nfrom transformers import AutoModel\n\n"
        f'sae = AutoModel.from_pretrained("{name}")\n```\n'
    )
