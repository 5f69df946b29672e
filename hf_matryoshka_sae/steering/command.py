"""`matryoshka-sae steer`: steer a language model by an SAE's latents, measure the dose, write the artefact."""

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.checks import check_at_least
from ..common.command import add_subject_flags, chosen_dataset, exit_status, measuring, nearest
from .change import FORMATS, MODES, POSITIONS, Change


if TYPE_CHECKING:
    from ..common.data_source import DatasetConfig
    from ..evaluation.data import HeldOut
    from .artefact import Steering


def main(arguments: list[str] | None = None) -> int:
    """Run `matryoshka-sae steer` and return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    # argparse takes "-5=1" for a flag, and its own message for what it should say of a latent below 0.
    parsed = _parser().parse_args([f" {each}" if re.match(r"-\d+=", each) else each for each in given])
    return exit_status(lambda: _run(parsed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="matryoshka-sae steer",
        description="Steer a language model by latents of an SAE: continue prompts both ways, measure what each dose "
        "does and costs, and write the steering for this package and for other tools.",
    )
    parser.add_argument("sae", metavar="REPO_OR_DIR", help="folder or Hub id of an SAE of any format, or 'embedded'")
    parser.add_argument(
        "--latents",
        nargs="+",
        required=True,
        metavar="LATENT=VALUE",
        help="latents with their values, in units of their activations, such as 1203=4.0; to remove or erase: 1203",
    )
    parser.add_argument("--mode", default="add", choices=MODES, help="kind of change (default: %(default)s)")
    parser.add_argument("--subfolder", help="folder of the SAE in its repository")
    parser.add_argument("--revision", help="branch, tag or commit of its repository")
    add_subject_flags(parser, 20_000, "other text", where="reconstructs and is changed")
    parser.add_argument("--width", type=int, help="encode with the first latents alone (default: all)")
    parser.add_argument(
        "--positions", default="all", choices=POSITIONS, help="positions that are changed (default: %(default)s)"
    )
    parser.add_argument("--condition", type=int, metavar="LATENT", help="change only tokens on which it fires")
    parser.add_argument("--prompt", action="append", default=[], help="text to continue both ways; may be repeated")
    parser.add_argument("--new_tokens", type=int, default=40, help="of a continuation (default: %(default)s)")
    parser.add_argument("--auto_dose", action="store_true", help="scale the values to the largest within --max_cost")
    parser.add_argument("--report", action="store_true", help="measure effect and cost at several doses")
    parser.add_argument("--max_cost", type=float, default=0.1, help="in nats on other text (default: %(default)s)")
    parser.add_argument("--wanted", metavar="REGEX", help="tokens to bring (default: those on which the latents fire)")
    parser.add_argument("--output_dir", help="folder to save the steering in")
    parser.add_argument("--export", nargs="+", default=[], metavar="FORMAT", help=f"also as {', '.join(FORMATS)}")
    parser.add_argument("--push", metavar="REPO", help="user/name on the Hub to push the steering to")
    return parser


def _run(parsed: argparse.Namespace) -> None:
    values = _values(parsed.latents, parsed.mode)
    check_at_least(1, width=parsed.width, new_tokens=parsed.new_tokens, tokens=parsed.tokens)
    for name in parsed.export:
        if name not in FORMATS:
            raise ValueError(f"Unknown format {name!r}.{nearest(name, FORMATS)}")
    if parsed.export and not parsed.output_dir:
        raise ValueError("--export writes into a folder: pass --output_dir.")
    options = {name: getattr(parsed, name) for name in ("hookpoint", "width", "positions", "condition")}
    Change(parsed.mode, **options)  # raises where they do not go together
    dataset = chosen_dataset(parsed)
    with measuring():
        _steer(parsed, values, options, dataset)


def _values(latents: list[str], mode: str) -> dict[int, float]:
    values = {}
    for text in latents:
        latent, given, value = text.partition("=")
        if (mode in ("add", "clamp")) != bool(given):
            wanted = "LATENT=VALUE, such as 1203=4.0" if mode in ("add", "clamp") else "a latent alone, such as 1203"
            raise ValueError(f"--latents: mode {mode!r} wants {wanted}, got {text!r}.")
        try:
            values[int(latent)] = float(value or 0)
        except ValueError:
            raise ValueError(f"--latents: expected numbers such as 1203=4.0, got {text!r}.") from None
    return values


def _steer(
    parsed: argparse.Namespace, values: dict[int, float], options: dict[str, Any], dataset: "DatasetConfig"
) -> None:
    from dataclasses import replace

    from ..convert.places import only_sae, saes_in
    from ..evaluation.data import open_heldout
    from .artefact import Steering
    from .measuring import auto_dose, dose_report

    place = only_sae(saes_in(parsed.sae, parsed.subfolder, revision=parsed.revision))
    sae = place.load()
    steering = Steering.from_latents(
        sae,
        values,
        parsed.mode,
        **options,
        sae_name=parsed.sae,
        revision=parsed.revision,
        subfolder=place.subfolder,
    )
    model = parsed.model or sae.config.base_model
    if model is None:
        raise ValueError("The SAE names no language model: pass --model.")
    data = open_heldout(model, steering.parts[0].hookpoint, dataset, parsed.tokens)
    if parsed.auto_dose:
        factor = auto_dose(steering, data, parsed.max_cost)
        steering = steering.scaled(factor)
        _say(f"{factor:.4g} times the values cost {parsed.max_cost} nats")
    if parsed.report:
        report = dose_report(steering, data, wanted=parsed.wanted, max_cost=parsed.max_cost)
        steering = replace(steering, dose=report.to_dict())
        _say(report)
    for prompt in parsed.prompt:
        _continue(steering, data, prompt, parsed.new_tokens)
    if parsed.output_dir:
        steering.save_pretrained(parsed.output_dir)
        _say(f"Saved {parsed.output_dir}")
    for name in parsed.export:
        _say(f"Wrote {steering.export(Path(parsed.output_dir) / name, name, data.model)}")
    if parsed.push:
        _say(steering.push_to_hub(parsed.push).commit_url)


def _continue(steering: "Steering", data: "HeldOut", prompt: str, new_tokens: int) -> None:
    from ..features.continuing import continued, prompt_tokens
    from ..features.text import longest

    ids = prompt_tokens(data.tokenizer, prompt, longest(data.model) - new_tokens).to(data.device)
    given = (data.model, data.tokenizer, ids, new_tokens, 0.0, 0)
    (plain,) = continued(*given)
    with steering.applied(data.model):
        (steered,) = continued(*given)
    for name, tokens in (("plain", plain), ("steered", steered)):
        _say(f"{name:>8}: {prompt}{data.tokenizer.decode(tokens, skip_special_tokens=True)}")


def _say(words: Any) -> None:
    sys.stdout.write(f"{words}\n")
