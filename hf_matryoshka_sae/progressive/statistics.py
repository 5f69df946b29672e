"""Statistics of latents: one pass over data that keeps sums, and the file in which they are stored.

Shapes: F latents, m neighbours, N tokens. A latent's value `a` and its decoder row `d` are in the SAE's own units:
where it measures latents by contribution (`scale_by_decoder_norm`), `a` is the contribution and `d` has length 1.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..activations.gradients import loss_gradients
from ..common.distributed import processes, reduce_sum
from ..common.files import staged
from ..evaluation.data import HasActivations, HeldOut, activation_batches
from ..evaluation.firing import FiringSums
from ..models import SAEModel
from ..models.safetensors_file import give_usual_permissions
from ..models.sparse_ops import LatentPairs, pair_dot, row_norms


STATISTICS_FILE = "statistics.safetensors"
_FORMAT = "hf_matryoshka_sae.latent_statistics/1"
_ENTRIES_AT_ONCE = 2**24  # tokens x latents in a block: 16 MB of flags, or as many pairs at worst


@dataclass
class LatentStatistics:
    """Statistics of each latent on data.

    Args:
        tokens (`int`): Number N of tokens on which they were measured.
        latent_ids (`Tensor` of shape `(F,)`): Ids of the latents, those of the SAE, int64.
        frequency (`Tensor` of shape `(F,)`): Share of tokens on which the latent fires, `E[a > 0]`. All float64.
        mean (`Tensor` of shape `(F,)`): `E[a]` over all tokens.
        mean_square (`Tensor` of shape `(F,)`): Energy `E[a^2]` (Peter & Søgaard 2025, arXiv 2505.00190).
        contribution (`Tensor` of shape `(F,)`): `E[(a ||d||)^2]`; the energy, if decoder rows have length 1.
        leave_one_out (`Tensor` of shape `(F,)`): Growth of the squared error where this latent alone is left out,
            `E[2 a (r . d) + (a ||d||)^2]` with the residual r; negative where the latent raises the error.
        neighbours (`Tensor` of shape `(F, m)`): Latents with the most similar decoder rows (cosine), nearest first.
            They are places in the dictionary, not ids; -1 where a neighbour is gone.
        cofiring (`Tensor` of shape `(F, m)`): Share of tokens on which latent and neighbour both fire.
        attribution (`Tensor` of shape `(F,)`, *optional*): `E|a dL/da|`, in nats, with the error of the
            reconstruction kept, so that `dL/da = d . dL/dx` in the clean model.
    """

    tokens: int
    latent_ids: Tensor
    frequency: Tensor
    mean: Tensor
    mean_square: Tensor
    contribution: Tensor
    leave_one_out: Tensor
    neighbours: Tensor
    cofiring: Tensor
    attribution: Tensor | None = None

    def __len__(self) -> int:
        return len(self.latent_ids)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are not `None`, by name."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "tokens"}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def check(self, sae: SAEModel) -> None:
        """Raise `ValueError` where these are not the statistics of this SAE's latents, in this order."""
        if len(self) != sae.config.num_latents:
            raise ValueError(
                f"These are statistics of {len(self)} latents, the SAE has {sae.config.num_latents}. Measure them "
                "anew, or take `statistics.select(...)` of the latents that were kept."
            )
        if not torch.equal(self.latent_ids, sae.latent_ids.cpu()):
            raise ValueError(
                "These statistics belong to other latents, or to the same in another order (`latent_ids` differ). "
                "Reorder them with `statistics.select(order)` when the SAE is sorted, or measure them anew."
            )

    def select(self, kept: Tensor) -> "LatentStatistics":
        """Return the statistics of some latents, or of all in another order.

        Args:
            kept (`Tensor` of shape `(n,)`): Places of the latents, each once; a neighbour that is gone becomes -1 and
                its co-firing 0.
        """
        kept = check_places(kept, len(self))
        place = torch.full((len(self) + 1,), -1)  # the last entry is that of -1, which stays -1
        place[kept] = torch.arange(len(kept))
        tensors = {name: tensor[kept] for name, tensor in self.tensors().items()}
        tensors["neighbours"] = place[tensors["neighbours"]]
        tensors["cofiring"] = tensors["cofiring"].masked_fill(tensors["neighbours"] < 0, 0)
        return LatentStatistics(self.tokens, **tensors)

    def save(self, folder: str | os.PathLike) -> Path:
        """Write `statistics.safetensors` into a folder, usually the SAE's own; return its path."""
        path = Path(folder) / STATISTICS_FILE
        with staged(path) as temporary:
            metadata = {"format": _FORMAT, "tokens": str(self.tokens)}
            save_file({name: tensor.contiguous() for name, tensor in self.tensors().items()}, temporary, metadata)
            give_usual_permissions(temporary)
        return path

    @classmethod
    def load(cls, source: str | os.PathLike) -> "LatentStatistics":
        """Read statistics from a folder or a file.

        Raises:
            `ValueError`: if there is no such file, it is damaged, or it holds something else.
        """
        path = Path(source)
        path = path / STATISTICS_FILE if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"There are no latent statistics at {path}. Write them with `LatentStatistics.save`.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        except (SafetensorError, TypeError, AttributeError) as error:  # the latter for types that torch lacks
            raise ValueError(f"{path} cannot be read ({error}): damaged or half-written. Measure it anew.") from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path} is no file of format {_FORMAT!r}, but of {metadata.get('format')!r}.")
        tokens = metadata.get("tokens", "")
        if not re.fullmatch(r"[1-9]\d{0,17}", tokens):
            raise ValueError(f"{path} states {tokens[:40]!r} tokens, which is no number. Measure it anew.")
        try:
            statistics = cls(int(tokens), **tensors)
        except TypeError as error:
            raise ValueError(f"{path} has not the tensors of latent statistics: {error}. Measure it anew.") from error
        statistics._check_tensors(path)
        return statistics

    def _check_tensors(self, path: Path) -> None:
        """Raise `ValueError` for tensors that no measurement gives."""
        for name, tensor in self.tensors().items():
            places, pairs = name in ("latent_ids", "neighbours"), name in ("neighbours", "cofiring")
            if tensor.dim() != 1 + pairs or len(tensor) != self.latent_ids.numel():
                raise ValueError(f"{path} holds tensors of different numbers of latents: {name}. Measure it anew.")
            if tensor.is_floating_point() == places or tensor.dtype == torch.bool or not tensor.isfinite().all():
                raise ValueError(f"{name} in {path} ({tensor.dtype}) holds what is no finite number. Measure it anew.")
        if self.neighbours.shape != self.cofiring.shape or not _within(self.neighbours, -1, len(self) - 1):
            raise ValueError(f"neighbours and cofiring in {path} do not belong together. Measure it anew.")
        if not _within(self.latent_ids, 0) or not all(_within(part, 0, 1) for part in (self.frequency, self.cofiring)):
            raise ValueError(f"{path} holds shares of tokens that are not between 0 and 1. Measure it anew.")


def _within(tensor: Tensor, lowest: float, highest: float = torch.inf) -> bool:
    return not tensor.numel() or lowest <= tensor.min().item() <= tensor.max().item() <= highest


def check_places(places: Tensor, num_latents: int) -> Tensor:
    """Return places of latents as int64 on the CPU, or raise `ValueError` for repeats and places out of range."""
    places = torch.as_tensor(places).cpu()
    if places.dim() != 1 or places.is_floating_point() or places.dtype == torch.bool:
        raise ValueError(f"Expected a list of latents, got a {places.dtype} tensor of shape {tuple(places.shape)}.")
    if len(places.unique()) != len(places):
        raise ValueError(f"Each latent may appear once; {len(places) - len(places.unique())} repeats were given.")
    if len(places) and not 0 <= places.min() <= places.max() < num_latents:
        raise ValueError(
            f"Latents are numbered 0 to {num_latents - 1}, got {places.min().item()} to {places.max().item()}."
        )
    return places.long()


def decoder_rows(sae: SAEModel) -> Tensor:
    """Return the decoder rows `(F, D)` that go with the values the SAE gives its latents, in float32 or better."""
    rows = sae.W_dec.detach().to(torch.promote_types(sae.W_dec.dtype, torch.float32))
    return rows / row_norms(rows)[:, None] if sae.config.scale_by_decoder_norm else rows


def nearest_latents(sae: SAEModel, count: int) -> Tensor:
    """Return the `count` latents with the most similar decoder rows (cosine), nearest first, `(F, count)` on the CPU.

    They are computed in blocks: nothing of size F x F is kept. There are at most F - 1.
    """
    rows = sae.W_dec.detach().float()
    rows = rows / row_norms(rows)[:, None]
    count, block = min(count, len(rows) - 1), max(1, _ENTRIES_AT_ONCE // len(rows))
    nearest = torch.empty(len(rows), count, dtype=torch.int64)
    for start in range(0, len(rows) if count else 0, block):
        cosine = rows[start : start + block] @ rows.T
        own = torch.arange(len(cosine), device=rows.device)
        cosine[own, start + own] = -torch.inf
        nearest[start : start + block] = cosine.topk(count).indices.cpu()
    return nearest


def firing_blocks(sae: SAEModel, batches: Iterable[Tensor]) -> Iterator[tuple[int, Tensor, LatentPairs]]:
    """Yield the number of the batch, hidden states `(n, D)` and their latents at inference, in blocks of bounded size.

    Where an SAE normalises each hidden state, these are the encoder's inputs, so that all errors are in their units.

    Args:
        sae ([`SAEModel`]): The SAE, whose mode stays as it is.
        batches (`Iterable[Tensor]`): Hidden states `(n, D)` of any floating type and on any device.

    Raises:
        `ValueError`: for another width than `d_in`, or rows that are not finite.
    """
    for number, batch in enumerate(batches):
        for part in _parts(sae, batch, number):
            yield number, sae.normalized(batch[part])[0], encoded(sae, batch[part])


def _parts(sae: SAEModel, batch: Tensor, number: int) -> Iterator[slice]:
    """Return slices of a checked batch, of so few rows that every latent might fire on all of them."""
    if batch.dim() != 2 or batch.shape[1] != sae.config.d_in:
        raise ValueError(
            f"Expected hidden states of shape (n, {sae.config.d_in}), got {tuple(batch.shape)} in batch {number}."
        )
    broken = int((~batch.isfinite().all(1)).sum())
    if broken:
        raise ValueError(
            f"{broken} of the {len(batch)} hidden states of batch {number} are not finite. Leave them out, or load "
            "the language model in another type (bfloat16 or float32)."
        )
    rows = max(1, _ENTRIES_AT_ONCE // sae.config.num_latents)
    return (slice(start, start + rows) for start in range(0, len(batch), rows))


def encoded(sae: SAEModel, x: Tensor) -> LatentPairs:
    """Return the latents of `(n, D)` hidden states at inference, without gradient and without those of value 0.

    They decode to the encoder's input, see [`firing_blocks`].
    """
    training = sae.training
    sae.eval()
    try:
        with torch.no_grad():
            pairs = sae.encode_pairs(x.to(sae.W_enc))
    finally:
        sae.train(training)
    return replace(pairs.keep(pairs.values != 0), input_norm=None)


def along_decoder(sae: SAEModel, pairs: LatentPairs, rows: Tensor) -> Tensor:
    """Return `rows[token] . d[latent]` for each pair `(M,)`, float64; `rows` is `(n, D)`."""
    source = decoder_rows(sae)
    return pair_dot(rows.to(source), pairs.rows, pairs.index.by_token, source, pairs.cols).double()


def latent_statistics(
    sae: SAEModel,
    activations: HasActivations | Iterable[Tensor],
    neighbours: int = 8,
    attribution: bool = False,
) -> LatentStatistics:
    """Measure statistics of each latent on data, in one pass; return them.

    Sums are in float64 and over all processes; each process brings its own share of the data. Beside the sums, memory
    is a block of tokens.

    Args:
        sae ([`SAEModel`]): The SAE, measured as at inference and at its full width.
        activations ([`HeldOut`] or an iterable of `(n, D)` tensors): Raw hidden states.
        neighbours (`int`, *optional*, defaults to 8): Latents m to compare each latent with; 0 for none.
        attribution (`bool`, *optional*, defaults to `False`): Also measure each latent's effect on the language
            model's loss to first order; needs a [`HeldOut`].

    Raises:
        `ValueError`: if there are no hidden states, some are not finite or of another width, or attribution is asked
            of hidden states alone.
    """
    if neighbours < 0:
        raise ValueError(f"`neighbours` must be at least 0, got {neighbours}.")
    if attribution and not isinstance(activations, HeldOut):
        raise ValueError(
            "Attribution needs the language model's gradients: pass a `HeldOut` (see `open_heldout`), not hidden "
            f"states alone ({type(activations).__name__})."
        )
    sums = _Sums(sae, neighbours, attribution)
    batches = _with_gradients(activations) if attribution else ((x, None) for x in activation_batches(activations))
    batches = tqdm(batches, desc="latent statistics", disable=processes()[0] != 0, leave=False)
    for number, (x, gradient) in enumerate(batches):
        for part in _parts(sae, x, number):
            inputs, norm = sae.normalized(x[part])
            slope = None if gradient is None else gradient[part]
            if slope is not None and norm is not None:
                slope = slope * norm[1].to(slope.device)
            sums.add(inputs, encoded(sae, x[part]), slope)
    return sums.statistics()


def _with_gradients(source: HeldOut) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in source.share():
        yield loss_gradients(source.model, batch, source.hookpoint, mask_token_id=source.mask_token_id)


class _Sums:
    """Sums over tokens, from which the statistics follow."""

    def __init__(self, sae: SAEModel, neighbours: int, attribution: bool) -> None:
        self.sae, self.device = sae, sae.W_dec.device
        self.neighbours = nearest_latents(sae, neighbours).to(self.device)
        self.squared_norms = decoder_rows(sae).double().square().sum(1)
        self.firing = FiringSums(len(self.neighbours), self.device)
        names = ["leave_one_out"] + ["attribution"] * attribution
        self.sums = {
            name: torch.zeros(len(self.neighbours), dtype=torch.float64, device=self.device) for name in names
        }
        self.cofiring = torch.zeros(self.neighbours.shape, dtype=torch.float64, device=self.device)

    def add(self, x: Tensor, pairs: LatentPairs, gradient: Tensor | None) -> None:
        with torch.no_grad():
            residual = x.to(self.device) - self.sae.decode_pairs(pairs, [pairs.num_latents])[0]
        values, cols = pairs.values.double(), pairs.cols
        self.firing.add(pairs)
        self._sum("leave_one_out", cols, 2 * values * along_decoder(self.sae, pairs, residual))
        if gradient is not None:
            self._sum("attribution", cols, (values * along_decoder(self.sae, pairs, gradient.to(self.device))).abs())
        if self.neighbours.shape[1]:
            self._add_cofiring(pairs.keep(pairs.values > 0))

    def _sum(self, name: str, cols: Tensor, values: Tensor) -> None:
        self.sums[name].index_add_(0, cols, values)

    def _add_cofiring(self, pairs: LatentPairs) -> None:
        fires = torch.zeros(pairs.num_rows, pairs.num_latents, dtype=torch.bool, device=self.device)
        fires[pairs.rows, pairs.cols] = True
        for slot in range(self.neighbours.shape[1]):  # one after the other: all at once would be m times the pairs
            both = fires[pairs.rows, self.neighbours[pairs.cols, slot]]
            self.cofiring[:, slot].index_add_(0, pairs.cols, both.double())

    def statistics(self) -> LatentStatistics:
        reduce_sum(self.cofiring, *self.sums.values())
        tokens = int(self.firing.reduce().tokens)
        if not tokens:
            raise ValueError("There are no hidden states to measure latents on: the activations are empty.")
        fires = dict(zip(("frequency", "mean", "mean_square"), (self.firing.fired, *self.firing.moments), strict=True))
        means = {name: (total.double() / tokens).cpu() for name, total in (fires | self.sums).items()}
        contribution = means["mean_square"] * self.squared_norms.cpu()
        means["leave_one_out"] += contribution
        return LatentStatistics(
            tokens=tokens,
            latent_ids=self.sae.latent_ids.cpu().clone(),
            contribution=contribution,
            neighbours=self.neighbours.cpu(),
            cofiring=(self.cofiring / tokens).cpu(),
            **means,
        )
