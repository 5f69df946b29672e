"""Put the Space on the Hub: this folder, and the package beside it, in one commit.

python spaces_app/deploy.py your-name/your-space
python spaces_app/deploy.py your-name/your-space --dry_run /tmp/space
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import httpx


HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "hf_matryoshka_sae"


def assemble(target: Path) -> None:
    """Write the files of the Space into a folder that is empty or not there.

    Raises:
        `ValueError`: if there is something in the folder.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is not empty. Name a folder that is not there yet.")
    target.mkdir(parents=True, exist_ok=True)
    for name in ("app.py", "README.md", "requirements.txt"):
        shutil.copyfile(HERE / name, target / name)
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
