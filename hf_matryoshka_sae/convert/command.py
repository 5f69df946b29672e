"""`matryoshka-sae convert`: an SAE of one library for another."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..common.command import whole_numbers
from .names import WRITABLE, check_name, formats


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert one SAE as the command-line arguments say; returns the exit status."""
    parsed = _parser().parse_args(arguments)
    try:
        check_name(parsed.to, writable=True)
        if parsed.source_format is not None:
            check_name(parsed.source_format)
    except ValueError as error:
        return _refused(error)
    return _convert(parsed)


def _convert(parsed: argparse.Namespace) -> int:
    from safetensors import SafetensorError

    from .loading import load, save

    try:
        sae = load(
            parsed.source,
            parsed.source_format,
            subfolder=parsed.subfolder,
            revision=parsed.revision,
            prefix_widths=parsed.prefix_widths,
            k=parsed.k,
            hookpoint=parsed.hookpoint,
            base_model=parsed.base_model,
            width=parsed.width,
        )
        save(sae, parsed.target, parsed.to)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, SafetensorError) as error:
        return _refused(error)
    widths = "" if len(sae.prefix_widths) == 1 else f", prefixes {', '.join(map(str, sae.prefix_widths))}"
    sys.stdout.write(
        f"{type(sae).__name__}: {sae.config.num_latents} latents of {sae.config.d_in} dimensions{widths}; "
        f"{sae.config.hookpoint or 'no hookpoint'} of {sae.config.base_model or 'no model'}\n"
        f"Saved {Path(parsed.target)} as {parsed.to}\n"
    )
    return 0


def _refused(error: Exception) -> int:
    sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
    return 2


def _parser() -> argparse.ArgumentParser:
    known = "\n".join(
        f"  {name:<20} {'reads and writes' if name in WRITABLE else 'reads':<17} {about}"
        for name, about in formats().items()
    )
    parser = argparse.ArgumentParser(
        prog="matryoshka-sae convert",
        description="Convert an SAE from one library's format into another's.",
        epilog=f"formats:\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="file of weights, folder with one SAE, or Hub id")
    parser.add_argument("target", metavar="TARGET", help="folder (or file) to write")
    parser.add_argument("--to", default="hf_matryoshka_sae", metavar="FORMAT", help="to write (default: %(default)s)")
    parser.add_argument(
        "--from", dest="source_format", metavar="FORMAT", help="format of SOURCE (default: found from its files)"
    )
    parser.add_argument("--subfolder", help="folder or file in SOURCE, where it holds several SAEs")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    parser.add_argument(
        "--prefix_widths", type=whole_numbers, help="such as 64,256,1024; of a format that has no prefixes"
    )
    parser.add_argument("--k", type=float, help="latents per token, where the files of SOURCE do not hold it")
    parser.add_argument(
        "--hookpoint",
        help="where it reads: a module's path in transformers (with ':input': the module's input)",
    )
    parser.add_argument("--base_model", help="Hub id of the language model")
    parser.add_argument("--width", type=int, help="keep only the first latents")
    return parser
