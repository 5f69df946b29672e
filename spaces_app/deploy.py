"""Put the Space on the Hub: this folder, and the package beside it, in one commit.

python spaces_app/deploy.py your-name/your-space
python spaces_app/deploy.py your-name/your-space --dry_run /tmp/space
"""

import argparse
import re
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import httpx
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PACKAGE = ROOT / "hf_matryoshka_sae"


def tested_versions() -> dict[str, str]:
    """Read the version of each package in `constraints.txt`, by its normalised name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def requirements(versions: dict[str, str]) -> str:
    """The Space's `requirements.txt`: what the package needs, and ZeroGPU's helper, at the tested versions.

    Gradio is missing: the Hub installs it, at the `sdk_version` of the front matter.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [Requirement(line).name for line in project["dependencies"]] + ["spaces"]
    return "".join(f"{name}=={versions[canonicalize_name(name)]}\n" for name in names)


def assemble(target: Path) -> None:
    """Write the files of the Space into a folder that is empty or not there.

    Raises:
        `ValueError`: if there is something in the folder.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is not empty. Name a folder that is not there yet.")
    target.mkdir(parents=True, exist_ok=True)
    versions = tested_versions()
    shutil.copyfile(HERE / "app.py", target / "app.py")
    (target / "requirements.txt").write_text(requirements(versions), encoding="utf-8")
    page = (HERE / "README.md").read_text(encoding="utf-8")
    page = re.sub(r"^sdk_version: .*$", f"sdk_version: {versions['gradio']}", page, count=1, flags=re.MULTILINE)
    (target / "README.md").write_text(page, encoding="utf-8")
    shutil.copytree(PACKAGE, target / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))


def main(arguments: list[str] | None = None) -> int:
    """Make the Space and upload its files; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repo_id", metavar="YOUR_NAME/SPACE")
    parser.add_argument("--private", action="store_true", help="of a Space that is made")
    parser.add_argument("--dry_run", type=Path, metavar="DIR", help="write the files there and upload nothing")
    parsed = parser.parse_args(arguments)
    try:
        if parsed.dry_run:
            assemble(parsed.dry_run)
            return 0
        with tempfile.TemporaryDirectory() as scratch:
            assemble(Path(scratch))
            api = HfApi(library_name="hf_matryoshka_sae")
            private = True if parsed.private else None
            api.create_repo(parsed.repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=parsed.repo_id,
                repo_type="space",
                folder_path=scratch,
                commit_message="The page and the package",
                delete_patterns=["hf_matryoshka_sae/**"],
            )
        sys.stdout.write(f"{commit.repo_url}\n")
    except (ValueError, OSError, httpx.HTTPError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
