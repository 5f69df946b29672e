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
from .change import Change


@dataclass(frozen=True, kw_only=True)
class Part(Change):
    """The change of some latents of one SAE at one hookpoint.

    Args:
        latents (`tuple[int, ...]`): The n latents, by their place in the SAE.
        latent_ids (`tuple[int, ...]`): What they were called before the SAE was sorted or pruned.
        values (`tuple[float, ...]`): Value of each, in units of its activation; 0 for `"remove"` and `"erase"`.
        vectors (`Tensor` of shape `(n, D)`): Decoder rows in units of activations, float32 or better.
        digest (`str`): Of the latents' weights; an SAE with other weights at these latents is another one.
        sae_name (`str`, *optional*): Hub id or folder of the SAE.
        subfolder (`str`, *optional*): Its folder in there.
        revision (`str`, *optional*): Commit of the repository.
        base_model (`str`, *optional*): The language model that the SAE was trained on.
        normalization (`str`, *optional*): The SAE's `input_normalization`, by which changes are scaled token by token.
        sae ([`SAEModel`], *optional*): The SAE, where it is at hand.

    The other arguments are those of [`Change`]; `hookpoint` is given.
    """

    latents: tuple[int, ...]
    latent_ids: tuple[int, ...]
    values: tuple[float, ...]
    vectors: Tensor
    digest: str
    sae_name: str | None = None
    subfolder: str = ""
    revision: str | None = None
    base_model: str | None = None
    normalization: str | None = None
    sae: SAEModel | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = {len(self.latents), len(self.latent_ids), len(self.values), len(self.vectors)}
        if len(sizes) != 1 or not self.vectors.isfinite().all():
            raise ValueError(
                f"The decoder rows of latents {list(self.latents)} are not finite, or not one for each value."
            )

    @property
    def is_constant(self) -> bool:
        """Return whether the same vector is added to every token."""
        return self.mode == "add" and self.is_everywhere and self.normalization is None

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


def part_of(sae: SAEModel, values: Mapping[int, float] | Iterable[int], change: Change, **source: Any) -> Part:
    """Return the change of some latents of an SAE.

    Args:
        sae ([`SAEModel`]): The SAE.
        values (`dict[int, float]`): Value of each latent, in units of its activation; for `"remove"` and `"erase"` the
            latents suffice.
        change ([`Change`]): How and where.
        **source: Where the SAE is from: `sae_name`, `subfolder` and `revision` of [`Part`].

    Raises:
        `ValueError`: if there is no such latent, a value is not finite, or the SAE does not see what it would change.
    """
    config = sae.config
    if isinstance(values, str) or not isinstance(values, Iterable) or not list(values):
        raise ValueError(f"Expected latents with their values, such as {{1203: 4.0}}, got {values!r}.")
    if change.has_values and not isinstance(values, Mapping):
        raise ValueError(f"Mode {change.mode!r} needs a value for each latent, such as {{1203: 4.0}}, got {values!r}.")
    if change.needs_sae and config.output_hookpoint not in (None, config.hookpoint):
        raise ValueError(
            f"This SAE reads {config.hookpoint} and writes {config.output_hookpoint}: what fires is not seen where "
            "the change is made. Use mode 'add' without a condition."
        )
    sae = sae if change.width is None else sae.truncate(change.width)
    latents = [checked_latent(latent, sae.config.num_latents) for latent in values]
    condition = None if change.condition is None else checked_latent(change.condition, sae.config.num_latents)
    rows = sae.W_dec.detach()[latents].cpu()
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    hookpoint = change.hookpoint or config.output_hookpoint or own_hookpoint(sae, None)
    return Part(
        **{**vars(change), "hookpoint": hookpoint, "condition": condition},
        latents=tuple(latents),
        latent_ids=tuple(sae.latent_ids[latents].tolist()),
        values=tuple(_checked_value(n, values[n]) if change.has_values else 0.0 for n in values),
        vectors=rows / row_norms(rows)[:, None] if config.scale_by_decoder_norm else rows,
        digest=digest_of(sae, latents),
        base_model=config.base_model,
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


def _checked_value(latent: int, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"The value of latent {latent} must be a finite number, got {value!r}.")
    return float(value)
