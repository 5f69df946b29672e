"""What is changed at one hookpoint: some latents of one SAE, by how much, and where.

With d_i the decoder row of latent i, in units of the latent's activation a_i, the hidden state x of a token becomes

    add      x + sum_i v_i d_i
    clamp    x + sum_i (v_i - a_i) d_i
    remove   x - sum_i a_i d_i
    erase    x - Q Q^T x, with Q an orthonormal basis of the d_i, at everything that writes into the residual stream

so that the error of the SAE's reconstruction stays in x. Erasing is directional ablation (Arditi et al. 2024, arXiv
2406.11717, section 2.4): a change of the whole model, where removing changes one place.

Shapes: M tokens, D width of the hidden states, n latents.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..features.text import checked_latent, own_hookpoint
from ..models import SAEModel
from ..models.outputs import normalized
from ..models.sparse_ops import row_norms
from ..progressive.statistics import encoded
from .passes import POSITIONS


MODES = ("add", "clamp", "remove", "erase")


@dataclass(frozen=True)
class Part:
    """The change of some latents of one SAE at one hookpoint.

    Args:
        hookpoint (`str`): Module whose output is changed, or `"path:input"`.
        mode (`str`): One of `MODES`.
        latents (`tuple[int, ...]`): The n latents, by their place in the SAE.
        latent_ids (`tuple[int, ...]`): What they were called before the SAE was sorted or pruned.
        values (`tuple[float, ...]`): Value of each, in units of its activation; 0 for `"remove"` and `"erase"`.
        vectors (`Tensor` of shape `(n, D)`): Decoder rows in units of activations, float32 or better.
        digest (`str`): Of the latents' weights; an SAE with other weights at these latents is another one.
        sae_name (`str`, *optional*): Hub id or folder of the SAE.
        subfolder (`str`, *optional*): Its folder in there.
        revision (`str`, *optional*): Commit of the repository.
        base_model (`str`, *optional*): The language model that the SAE was trained on.
        width (`int`, *optional*): Encode with the first `width` latents alone.
        condition (`int`, *optional*): Change only tokens on which this latent of the SAE fires.
        positions (`str`, *optional*, defaults to `"all"`): One of `POSITIONS`.
        from_position (`int`, *optional*, defaults to 0): First position that is changed.
        normalization (`str`, *optional*): The SAE's `input_normalization`, by which changes are scaled token by token.
        sae ([`SAEModel`], *optional*): The SAE, where it is at hand.
    """

    hookpoint: str
    mode: str
    latents: tuple[int, ...]
    latent_ids: tuple[int, ...]
    values: tuple[float, ...]
    vectors: Tensor
    digest: str
    sae_name: str | None = None
    subfolder: str = ""
    revision: str | None = None
    base_model: str | None = None
    width: int | None = None
    condition: int | None = None
    positions: str = "all"
    from_position: int = 0
    normalization: str | None = None
    sae: SAEModel | None = field(default=None, repr=False, compare=False)

    @property
    def needs_sae(self) -> bool:
        """Return whether the change depends on activations, so that the SAE has to encode."""
        return self.mode in ("clamp", "remove") or self.condition is not None

    @property
    def is_constant(self) -> bool:
        """Return whether the same vector is added to every token."""
        everywhere = self.positions == "all" and not self.from_position and self.condition is None
        return self.mode == "add" and everywhere and self.normalization is None

    @property
    def vector(self) -> Tensor:
        """Return the sum of the decoder rows times their values, `(D,)`: what `"add"` adds."""
        return self.vectors.new_tensor(self.values) @ self.vectors

    @cached_property
    def basis(self) -> Tensor:
        """Return an orthonormal basis of the decoder rows, `(D, n)`: what `"erase"` takes out."""
        return torch.linalg.qr(self.vectors.T.double()).Q.to(self.vectors)

    def facts(self) -> dict[str, Any]:
        """Return everything but tensors, JSON-able."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("vectors", "sae")}

    def scaled(self, factor: float) -> "Part":
        """Return the part with all values times `factor`."""
        return replace(self, values=tuple(value * factor for value in self.values))

    def difference(self, x: Tensor) -> Tensor:
        """Return what is added to hidden states `(M, D)`, of the same shape, or `(D,)` where it is one for all.

        Raises:
            `ValueError`: if the SAE is needed and not at hand.
        """
        vectors = self.vectors.to(x.device, torch.promote_types(self.vectors.dtype, x.dtype))
        if self.mode == "erase":
            basis = self.basis.to(vectors)
            return -(x.to(vectors) @ basis) @ basis.T
        values = vectors.new_tensor(self.values)
        fires = None
        if self.needs_sae:
            wanted = list(self.latents) + ([] if self.condition is None else [self.condition])
            before = self._activations(x, wanted).to(vectors)
            fires = None if self.condition is None else before[:, -1:] > 0
            values = values if self.mode == "add" else values - before[:, : len(self.latents)]
        added = values @ vectors
        if self.normalization is not None:
            added = added * normalized(x.to(vectors), self.normalization)[1][1]
        return added if fires is None else added * fires

    def _activations(self, x: Tensor, latents: list[int]) -> Tensor:
        """Return activations `(M, n)` of some latents at inference."""
        if self.sae is None:
            raise ValueError(
                f"Mode {self.mode!r} needs the SAE to encode with, and it is not at hand: pass `sae=` to "
                "`Steering.with_sae`."
            )
        pairs = encoded(self.sae, x.to(self.sae.W_enc))
        place = torch.full((pairs.num_latents,), -1, device=pairs.cols.device)
        values = pairs.values.new_zeros(len(x), len(latents))
        for column, latent in enumerate(latents):  # one latent may stand twice: changed, and a condition
            place.fill_(-1)[latent] = column
            there = place[pairs.cols] >= 0
            values[pairs.rows[there], column] = pairs.values[there]
        return values


def part_of(
    sae: SAEModel,
    values: Mapping[int, float] | Iterable[int],
    mode: str = "add",
    hookpoint: str | None = None,
    width: int | None = None,
    positions: str = "all",
    from_position: int = 0,
    condition: int | None = None,
    **source: Any,
) -> Part:
    """Return the change of some latents of an SAE; arguments are those of [`Steering.from_latents`].

    Raises:
        `ValueError`: if there is no such latent, a value is not finite, or an option means nothing.
    """
    _check_options(sae, values, mode, positions, from_position, condition)
    config = sae.config
    sae = sae if width is None else sae.truncate(width)
    latents = [checked_latent(latent, sae.config.num_latents) for latent in values]
    amounts = [values[latent] for latent in values] if isinstance(values, Mapping) else [0.0] * len(latents)
    amounts = [_checked_value(*each) for each in zip(latents, amounts, strict=True)]
    if condition is not None:
        condition = checked_latent(condition, sae.config.num_latents)
    rows = sae.W_dec.detach()[latents].cpu()
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    rows = rows / row_norms(rows)[:, None] if config.scale_by_decoder_norm else rows
    if not rows.isfinite().all():
        raise ValueError(f"The decoder rows of latents {latents} hold numbers that are not finite: the SAE is broken.")
    return Part(
        hookpoint=config.output_hookpoint or own_hookpoint(sae, hookpoint) if hookpoint is None else hookpoint,
        mode=mode,
        latents=tuple(latents),
        latent_ids=tuple(int(sae.latent_ids[latent]) for latent in latents),
        values=tuple(amounts if mode in ("add", "clamp") else [0.0] * len(amounts)),
        vectors=rows,
        digest=digest_of(sae, latents),
        base_model=config.base_model,
        width=width,
        condition=condition,
        positions=positions,
        from_position=from_position,
        normalization=config.input_normalization,
        sae=sae,
        **source,
    )


def digest_of(sae: SAEModel, latents: Iterable[int]) -> str:
    """Return a SHA-256 of some latents' weights in float32, which sorting, pruning and saving leave as they are."""
    chosen, digest = list(latents), hashlib.sha256()
    for name in ("W_enc", "b_enc", "W_dec"):
        rows = getattr(sae, name).detach()[chosen]
        digest.update(rows.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_options(
    sae: SAEModel, values: Any, mode: str, positions: str, from_position: int, condition: int | None
) -> None:
    if mode not in MODES or positions not in POSITIONS:
        raise ValueError(f"Expected `mode` in {MODES} and `positions` in {POSITIONS}, got {mode!r} and {positions!r}.")
    if isinstance(values, str) or not isinstance(values, Iterable) or not list(values):
        raise ValueError(f"Expected latents with their values, such as {{1203: 4.0}}, got {values!r}.")
    if mode in ("add", "clamp") and not isinstance(values, Mapping):
        raise ValueError(f"Mode {mode!r} needs a value for each latent, such as {{1203: 4.0}}, got {values!r}.")
    if isinstance(from_position, bool) or not isinstance(from_position, int) or from_position < 0:
        raise ValueError(f"`from_position` must be a whole number of at least 0, got {from_position!r}.")
    if mode == "erase" and (positions != "all" or from_position or condition is not None):
        raise ValueError("Mode 'erase' takes a direction out of the whole model: it has no positions or condition.")
    transcodes = sae.config.output_hookpoint not in (None, sae.config.hookpoint)
    if transcodes and (mode in ("clamp", "remove") or condition is not None):
        raise ValueError(
            f"This SAE reads {sae.config.hookpoint} and writes {sae.config.output_hookpoint}; what fires is not seen "
            "where the change is made. Use mode 'add' without a condition."
        )


def _checked_value(latent: int, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"The value of latent {latent} must be a finite number, got {value!r}.")
    return float(value)
