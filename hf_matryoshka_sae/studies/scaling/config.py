"""A sweep is the YAML of a training run whose `saes` and `tokens` are made from a section `sweep`."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...common.checks import check_at_least
from ...training import RunConfig, SAESpec
from ...training.config.fields import from_dict, override, read_yaml
from ...training.config.run import LARGEST_EVALUATION


_LEAST_OF_K, _LEAST_JOINT = 3, 6  # constants of the laws


@dataclass
class Grid:
    """Fields of the section `sweep:`; one SAE is trained for each combination of size, k and tokens."""

    num_latents: list[int]
    """Sizes F of the dictionaries."""
    k: list[int]
    """Latents per token, for each size."""
    tokens: list[int]
    """Training budgets. Each is a run of its own: the learning rate falls over the whole of it."""
    sae: dict = field(default_factory=lambda: {"type": "topk"})
    """All other fields of an entry of `saes`, the same for every SAE."""
    hold_out: float | list = 0.2
    """SAEs that no law is fitted to and each is tested on, as a share of the (F, k), drawn by the run's seed from each
    k alike, or as a list [[F, k], ...]. One that is held out is so with every budget."""
    saes_per_run: int | None = None
    """Largest number of SAEs in a run, where not all fit into a device's memory."""

    def __post_init__(self) -> None:
        for name in ("num_latents", "k", "tokens"):
            values = getattr(self, name)
            if not values or min(values) < 1 or len(set(values)) < len(values):
                raise ValueError(f"`sweep.{name}` must list different numbers of at least 1, got {values}.")
            setattr(self, name, sorted(values))
        if not isinstance(self.sae, dict):
            raise ValueError(f"`sweep.sae` must hold fields such as {{type: topk}}, got {self.sae!r}.")
        for name in ("num_latents", "k", "name"):
            if name in self.sae:
                raise ValueError(f"`sweep.sae.{name}` differs between the SAEs of a sweep: leave it out.")
        check_at_least(1, **{"sweep.saes_per_run": self.saes_per_run})
        self._check_hold_out()

    def _check_hold_out(self) -> None:
        if isinstance(self.hold_out, float) and not 0 <= self.hold_out < 1:
            raise ValueError(f"`sweep.hold_out` must lie in [0, 1), got {self.hold_out}.")
        if not isinstance(self.hold_out, float | list):
            raise ValueError(f"`sweep.hold_out` must be a share or a list of [num_latents, k], got {self.hold_out!r}.")
        if isinstance(self.hold_out, list):
            for pair in self.hold_out:
                if not isinstance(pair, list) or tuple(pair) not in self.pairs:
                    raise ValueError(f"`sweep.hold_out` must list [num_latents, k] of the grid, got {pair!r}.")

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """All (F, k) of the grid."""
        return [(size, k) for size in self.num_latents for k in self.k]

    def held_out(self, seed: int) -> set[tuple[int, int]]:
        """Return the (F, k) that are held out; `seed` decides where a share is given."""
        if isinstance(self.hold_out, list):
            return {(size, k) for size, k in self.hold_out}
        draw, held_out = random.Random(seed), set()
        columns = [draw.sample(self.num_latents, len(self.num_latents)) for _ in self.k]
        order = draw.sample(range(len(self.k)), len(self.k))
        for i in range(round(self.hold_out * len(self.pairs))):  # from each k in turn, so that no law loses all points
            column = order[i % len(order)]
            held_out.add((columns[column].pop(), self.k[column]))
        return held_out


@dataclass
class Sweep:
    """A checked sweep.

    Args:
        grid ([`Grid`]): Sizes, k and budgets of the SAEs.
        fields (`dict`): Fields of the runs, without `saes` and `tokens`.
    """

    grid: Grid
    fields: dict[str, Any]

    @classmethod
    def from_dict(cls, data: dict) -> "Sweep":
        """Make a checked sweep from nested dicts; raise `ValueError` for fields that do not fit."""
        return cls.read(data).check_saes()

    @classmethod
    def read(cls, data: dict) -> "Sweep":
        """Make a sweep from nested dicts; raise `ValueError` for unknown fields and impossible values."""
        fields = dict(data)
        if "sweep" not in fields:
            raise ValueError("A sweep's config needs a section `sweep: {num_latents: [..], k: [..], tokens: [..]}`.")
        grid = from_dict(Grid, fields.pop("sweep"), "sweep.")
        for name in ("saes", "tokens"):
            if name in fields:
                raise ValueError(f"A sweep makes `{name}` from its section `sweep`: leave the field out.")
        if fields.get("resume") is False:
            raise ValueError("A sweep trains what its folder lacks. To start over, give another `output_dir`.")
        sweep = cls(grid, fields)
        sweep.spec(*grid.pairs[0])  # an unknown field is named as it is in the file
        for tokens in grid.tokens:
            run = sweep.run(tokens, grid.pairs)
        if len(run.hookpoints) > 1 or set("*?[") & set(run.hookpoints[0]):
            raise ValueError(f"A sweep is about one hookpoint without wildcards, got {run.hookpoints}.")
        return sweep

    def check_saes(self) -> "Sweep":
        """Return this sweep; raise `ValueError` for fields that do not fit the family. Only this needs torch."""
        self.run(self.grid.tokens[0], self.grid.pairs).check_saes()
        return self

    def check_laws(self) -> None:
        """Raise `ValueError` if its points that are not held out are too few for any law."""
        fitted = set(self.grid.pairs) - self.grid.held_out(self.fields.get("seed", 0))
        at_k = max(sum(k == each for _, each in fitted) for k in self.grid.k)
        if at_k * len(self.grid.tokens) <= _LEAST_OF_K and len(fitted) <= _LEAST_JOINT:
            raise ValueError(
                f"The sweep has {len(fitted)} (num_latents, k) to fit, at most {at_k} sizes for one k, and "
                f"{len(self.grid.tokens)} token budgets: too few for any law. L(F) needs more than {_LEAST_OF_K} "
                f"sizes at one k, L(F, k) more than {_LEAST_JOINT} pairs. List more, or lower `sweep.hold_out` "
                f"({self.grid.hold_out})."
            )

    @property
    def folder(self) -> Path:
        """Folder of its runs and its report."""
        return Path(self.fields["output_dir"])

    def spec(self, num_latents: int, k: int) -> SAESpec:
        """Return the spec of one SAE."""
        return SAESpec.from_dict(self._entry(num_latents, k), "sweep.sae.")

    def _entry(self, num_latents: int, k: int) -> dict[str, Any]:
        name = f"{self.grid.sae.get('type', 'matryoshka')}-{num_latents}-k{k}"
        return {**self.grid.sae, "num_latents": num_latents, "k": k, "name": name}

    def run(self, tokens: int, pairs: list[tuple[int, int]], folder: Path | None = None) -> RunConfig:
        """Return the run that trains the SAEs of these (F, k) on this number of tokens."""
        saes = [self._entry(*pair) for pair in pairs]
        place = {} if folder is None else {"output_dir": str(folder)}
        # Laws compare losses on the same held-out tokens, of many SAEs with each other.
        same = {"eval_tokens": LARGEST_EVALUATION, "eval_baselines": False}
        return RunConfig.read({**same, **self.fields, **place, "tokens": tokens, "saes": saes})


def load_sweep(path: str | Path, flags: list[str] | None = None, look: Callable[[Sweep], None] | None = None) -> Sweep:
    """Return the sweep that a YAML file and command-line flags describe.

    Args:
        path (`str` or `Path`): The YAML file.
        flags (`list[str]`, *optional*): Flags such as `["--sweep.k", "[8, 16]", "--batch_size", "4096"]`.
        look (`Callable[[Sweep], None]`, *optional*): Called with the sweep before torch is imported for further
            checks.

    Raises:
        `ValueError`: for a file that is missing or no YAML, and for fields that do not fit.
    """
    sweep = Sweep.read(override(read_yaml(path), flags or []))
    if look is not None:
        look(sweep)
    return sweep.check_saes()
