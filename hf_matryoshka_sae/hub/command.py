"""`matryoshka-sae push` and `matryoshka-sae pull`."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from ..common.command import exit_status
from .layout import find_saes


def push_main(arguments: list[str] | None = None) -> int:
    """Run `matryoshka-sae push RUN_DIR REPO` and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="matryoshka-sae push",
        description="Push the SAEs of a run with their model card to the Hub, in one commit. Metrics that the card "
        "shows and the run has not measured are measured first.",
    )
    parser.add_argument("run", metavar="RUN_DIR", help="folder of a run, or of one SAE")
    parser.add_argument("repo", metavar="REPO", help="user/name on the Hub; created if it does not exist")
    parser.add_argument("--saes", nargs="+", metavar="NAME", help="names or patterns of the SAEs (default: all)")
    parser.add_argument("--private", action="store_true", default=None, help="make the repository private")
    parser.add_argument("--revision", help="branch; created if it does not exist")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--message", help="commit message")
    parser.add_argument("--license", default="apache-2.0", help="licence of the weights (default: %(default)s)")
    parser.add_argument("--no_measure", action="store_true", help="measure nothing: the card shows what there is")
    parser.add_argument("--dry_run", metavar="DIR", help="write the repository's files to a folder, send nothing")
    return _run(parser, arguments, _push)


def _push(parsed: argparse.Namespace) -> None:
    saes = find_saes(parsed.run, parsed.saes)
    from .contents import run_repository
    from .measure import measure_run
    from .pushing import push

    if parsed.dry_run is not None:
        if not parsed.no_measure:
            measure_run(parsed.run, parsed.saes)
        run_repository(parsed.run, parsed.repo, saes, license=parsed.license).write(parsed.dry_run)
        sys.stdout.write(f"Wrote what {parsed.repo} would hold to {parsed.dry_run}\n")
        return
    commit = push(
        parsed.run,
        parsed.repo,
        saes=parsed.saes,
        private=parsed.private,
        revision=parsed.revision,
        create_pr=parsed.create_pr,
        commit_message=parsed.message,
        measure=not parsed.no_measure,
        license=parsed.license,
    )
    sys.stdout.write(f"{commit.pr_url or commit.commit_url}\n")


def pull_main(arguments: list[str] | None = None) -> int:
    """Run `matryoshka-sae pull REPO --width n` and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="matryoshka-sae pull",
        description="Download SAEs, or only their first latents, into the cache. A larger width later downloads only "
        "the missing rows.",
    )
    parser.add_argument("repo", metavar="REPO", help="user/name on the Hub")
    parser.add_argument("--width", type=int, help="number of first latents to download (default: all)")
    parser.add_argument(
        "--saes", nargs="+", default=["*"], metavar="NAME", help="hookpoints, folders or patterns (default: all)"
    )
    parser.add_argument("--revision", help="branch, tag or commit")
    parser.add_argument("--output_dir", metavar="DIR", help="also save each SAE in a folder below this one")
    return _run(parser, arguments, _pull)


def _pull(parsed: argparse.Namespace) -> None:
    if parsed.width is not None and parsed.width < 1:
        raise ValueError(f"`width` must be at least 1, got {parsed.width}.")
    from .repository import list_saes, load, matching

    saes = list_saes(parsed.repo, revision=parsed.revision)
    chosen = {sae.subfolder: sae for names in parsed.saes for sae in matching(saes, names, parsed.repo)}.values()
    for info in chosen:  # before anything is fetched
        if parsed.width is not None and parsed.width > info.num_latents:
            place = info.subfolder or parsed.repo
            raise ValueError(f"`width` must lie between 1 and {info.num_latents} for {place}, got {parsed.width}.")
    for info in chosen:
        sae = load(parsed.repo, info.subfolder, parsed.width, revision=parsed.revision)
        place = f"{parsed.repo}/{info.subfolder}".rstrip("/")
        line = f"{place}: {type(sae).__name__}, {sae.config.num_latents} of {info.num_latents} latents"
        if parsed.output_dir is not None:
            folder = _inside(Path(parsed.output_dir), info.subfolder)
            sae.save_pretrained(folder)
            line += f", saved in {folder}"
        sys.stdout.write(line + "\n")


def _inside(root: Path, subfolder: str) -> Path:
    """Return `root / subfolder`; raise `ValueError` where that lies outside the root, also through a link."""
    folder = root / subfolder
    if not folder.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{subfolder!r} would be saved outside {root}. Nothing was written there.")
    return folder


def _run(
    parser: argparse.ArgumentParser, arguments: list[str] | None, act: Callable[[argparse.Namespace], None]
) -> int:
    parsed = parser.parse_args(arguments)
    return exit_status(lambda: act(parsed), "Stopped. Run the same command again to continue.")
