"""The SAEs of a sweep as points: place in the grid, compute, held-out loss; written to CSV and read back."""

import csv
import io
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from ...common.files import write_text
from ...training import RunConfig
from .config import Sweep
from .plan import is_finished


logger = logging.getLogger(__name__)


@dataclass
class Point:
    """One SAE of a sweep.

    Args:
        num_latents (`int`): Number F of latents.
        k (`int`): Active latents of a token.
        loss (`float`): Held-out FVU.
        tokens (`int`, *optional*): Number of training tokens.
        flops (`float`, *optional*): Training compute, as in [`training_flops`].
        held_out (`bool`, *optional*): Whether no law is fitted to it.
        l0 (`float`, *optional*): Mean number of active latents of a held-out token.
        ce (`float`, *optional*): Cross-entropy of the language model with the reconstruction spliced in, in nats.
        recaptured (`float`, *optional*): Recaptured loss against zero ablation.
        dead (`float`, *optional*): Share of latents that never fire on the held-out tokens.
    """

    num_latents: int
    k: int
    loss: float
    tokens: int | None = None
    flops: float | None = None
    held_out: bool = False
    l0: float | None = None
    ce: float | None = None
    recaptured: float | None = None
    dead: float | None = None


def training_flops(num_latents: int, k: int, tokens: int, d_in: int) -> float:
    """Return the FLOPs of the dictionary's own matrix products in training: tokens x D x (2 F + 8 k).

    Of each token 2 D F are the encoder's; 2 D k each are those of the decoder and of three backward products through
    the k active latents: to the values, to `W_dec` and to `W_enc`. Selection, auxiliary loss, inner prefixes,
    optimizer and the language model, which all SAEs share, are left out. Dense training would take 12 D F a token.

    Args:
        num_latents (`int`): Number F of latents.
        k (`int`): Active latents of a token.
        tokens (`int`): Number of training tokens.
        d_in (`int`): Width D of the hidden states.
    """
    return float(tokens * d_in * (2 * num_latents + 8 * k))


def finished_points(sweep: Sweep, runs: Sequence[RunConfig]) -> list[Point]:
    """Return the SAEs of the grid whose runs are finished, sorted by tokens, k and F."""
    held_out = sweep.grid.held_out(sweep.fields.get("seed", 0))
    pairs_by_name = {sweep.spec(*pair).name: pair for pair in sweep.grid.pairs}
    points = []
    for run in runs:
        if not is_finished(run):
            continue
        folder = Path(run.output_dir)
        (result,) = json.loads((folder / "results.json").read_text(encoding="utf-8"))["results"]
        for name, rows in result["saes"].items():
            if name in pairs_by_name and rows[-1]["fvu"] is None:  # JSON's word for what is not finite
                logger.warning(f"{folder / name} has no FVU that is a number: it is left out of the fits.")
            elif name in pairs_by_name:
                size, k = pairs_by_name[name]
                d_in = _d_in(folder / name / result["hookpoint"].replace(":", "-"))
                points.append(
                    Point(
                        size,
                        k,
                        rows[-1]["fvu"],
                        run.tokens,
                        training_flops(size, k, run.tokens, d_in),
                        (size, k) in held_out,
                        *(rows[-1][key] for key in ("l0", "ce", "recaptured_zero", "dead")),
                    )
                )
    return sorted(points, key=lambda point: (point.tokens, point.k, point.num_latents))


def _d_in(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["d_in"]


def write_points(points: Sequence[Point], path: Path) -> None:
    """Write a CSV file with a line for each point; unknown values are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Point)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**asdict(point), "held_out": int(point.held_out)} for point in points)
    write_text(path, text.getvalue())


def read_points(path: str | Path) -> list[Point]:
    """Read points from a CSV file with columns `num_latents`, `k`, `loss` and any others of [`Point`].

    Args:
        path (`str` or `Path`): The CSV file.

    Raises:
        `ValueError`: for a file that is missing, a column that is missing or unknown, or a value that is no number.
    """
    try:
        lines = list(csv.DictReader(Path(path).read_text(encoding="utf-8").splitlines()))
    except OSError as error:
        raise ValueError(f"The points cannot be read from {path}: {error}") from error
    kinds = {field.name: field.type for field in fields(Point)}
    columns = lines[0].keys() if lines else set()
    missing, unknown = {"num_latents", "k", "loss"} - columns, columns - kinds.keys()
    if missing or unknown:
        wrong = f"lacks {', '.join(sorted(missing))}" if missing else f"has unknown {', '.join(map(str, unknown))}"
        raise ValueError(f"{path} {wrong}: its columns must be num_latents, k, loss and any of {', '.join(kinds)}.")
    points = []
    for number, line in enumerate(lines, 2):
        values = {}
        for name, text in line.items():
            if text:
                values[name] = _number(text, kinds[name], f"{path}, line {number}, {name}")
        if {"num_latents", "k", "loss"} - values.keys():
            raise ValueError(f"{path}, line {number}: num_latents, k and loss must have values.")
        points.append(Point(**values))
    return points


def _number(text: str, kind: type, where: str) -> int | float | bool:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    whole = kind in (int, int | None, bool)
    if not math.isfinite(number) or (whole and number != int(number)):
        raise ValueError(f"{where}: expected a {'whole ' if whole else ''}number, got {text!r}.")
    return bool(number) if kind is bool else int(number) if whole else number


def frontier(points: Sequence[Point], k: int) -> list[Point]:
    """Return the fitted points of one k of which no other has a lower loss with as little compute."""
    at_k = [point for point in points if point.k == k and not point.held_out and point.flops is not None]
    return [at_k[i] for i in efficient_frontier([p.flops for p in at_k], [p.loss for p in at_k])]


def efficient_frontier(compute: Sequence[float], loss: Sequence[float]) -> np.ndarray:
    """Return the indices of the points of which no other has a lower loss with as little compute, by compute.

    Args:
        compute (`Sequence[float]`): Compute of each point, `[m]`.
        loss (`Sequence[float]`): Loss of each point, `[m]`.
    """
    compute, loss = np.asarray(compute, dtype=np.float64), np.asarray(loss, dtype=np.float64)
    order = np.lexsort((loss, compute))
    best = np.minimum.accumulate(loss[order])
    return order[np.r_[True, best[1:] < best[:-1]]] if len(order) else order
