"""How much: what a steering does to a model and what it costs, against its dose, beside a random direction.

    relative dose   mean over tokens of ||change|| / ||hidden state|| at the hookpoint
    cost            rise of the cross-entropy on other text, in nats a token
    wanted          share of the wanted tokens among those that the steered model samples
    fires           share of sampled tokens on which the latents fire when the plain model reads them

A random direction has the norm of the latent's and is put at the same tokens. Of a useful dose the effect is above
both that of the plain model and that of the random direction, by their intervals, at a cost within the bound.

Shapes: P prompts, S tokens, V vocabulary.
"""

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..activations import harvest, spliced_logits
from ..activations.hookpoints import first_tensor, hooked
from ..common.intervals import ratio_interval, resampled_rows
from ..common.seeds import derived_seed
from ..common.token_text import token_texts
from ..evaluation.data import HeldOut
from ..features.firings import values_of
from ..progressive.statistics import encoded
from .report import DoseReport


if TYPE_CHECKING:
    from .artefact import Steering


RELATIVE_DOSES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
_OWN_TOKENS, _RESAMPLES = 20, 500
_BEGINNING = 8  # tokens of a window with which a prompt begins
_SMALLEST, _HALVINGS = 1e-3, 7  # of the search for a dose: first relative dose, and steps of the bisection


@dataclass(frozen=True)
class _Effect:
    """What a steering does to text that is given, and to text that is sampled."""

    loss: float
    relative_dose: float
    state_norm: float
    counts: np.ndarray | None  # of each prompt: new tokens, wanted ones, those on which the latents fire; [P, 3]


@torch.no_grad()
def dose_report(
    steering: "Steering",
    data: HeldOut,
    factors: Sequence[float] | None = None,
    wanted: str | Sequence[int] | None = None,
    prompt: str | None = None,
    max_cost: float = 0.1,
    prompts: int = 32,
    new_tokens: int = 24,
    random_directions: int = 2,
    seed: int = 0,
    show: bool = True,
) -> DoseReport:
    """Measure what a steering does and what it costs, at several doses.

    Args:
        steering ([`Steering`]): The steering; all its values are scaled together.
        data ([`HeldOut`]): Language model, and text that has nothing to do with the latents; the first 8 tokens of its
            windows are the prompts.
        factors (`Sequence[float]`, *optional*): What the values are multiplied by; by default such that the relative
            doses are about `RELATIVE_DOSES`. Removal and erasure have one dose.
        wanted (`str` or `Sequence[int]`, *optional*): Tokens that the steering is to bring: a regular expression that
            the whole text of a token matches, or token ids. By default the 20 tokens on which the latents fire most.
        prompt (`str`, *optional*): Words that ask the plain model for the same; measured beside.
        max_cost (`float`, *optional*, defaults to 0.1): Largest cost of a useful dose, in nats.
        prompts (`int`, *optional*, defaults to 32): Number of prompts that are continued; 0 samples no text.
        new_tokens (`int`, *optional*, defaults to 24): Tokens that are sampled after each.
        random_directions (`int`, *optional*, defaults to 2): Number of random directions, over which is averaged.
        seed (`int`, *optional*, defaults to 0): Seed of directions and samples; the same samples for every dose.
        show (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Raises:
        `ValueError`: if the model has no loss, a factor is not above 0, or `wanted` is no pattern or matches no token.
    """
    steering = _prepared(steering, data, encoding=True)
    chosen = _Wanted(steering, data, wanted)
    prompts = prompts if getattr(data.model, "can_generate", lambda: False)() else 0
    bench = _Bench(data, steering.parts[0].hookpoint, chosen, prompts, new_tokens, seed)
    plain = bench.effect(None)
    factors = _factors(steering, plain, factors)
    directions = [("latent", steering)]
    directions += [("random", _at_random(steering, derived_seed(seed, str(n)))) for n in range(random_directions)]
    records = [_record("plain", 0.0, [plain], plain)]
    with tqdm(total=len(factors) * len(directions), desc="doses", disable=not show, leave=False) as bar:
        for factor in factors:
            for kind in dict.fromkeys(name for name, _ in directions):
                effects = []
                for _, direction in (each for each in directions if each[0] == kind):
                    effects.append(bench.effect(direction.scaled(factor)))
                    bar.update()
                records.append(_record(kind, factor, effects, plain))
    if prompt is not None and prompts:
        asked = bench.effect(None, prompt)
        records.append(_record("prompt", 0.0, [asked], asked) | {"cost": None})
    about = {
        "latents": [list(part.latent_ids) for part in steering.parts],
        "mode": [part.mode for part in steering.parts],
        "wanted": chosen.words,
        "prompt": prompt,
        "max_cost": max_cost,
        "tokens": data.tokens,
        "prompts": prompts,
        "new_tokens": new_tokens,
        "random_directions": random_directions,
        "seed": seed,
    }
    return DoseReport(records, about, plain.state_norm)


def auto_dose(steering: "Steering", data: HeldOut, max_cost: float = 0.1, show: bool = True) -> float:
    """Return the largest factor of a steering's values whose cost stays within a bound, to about 1%.

    Args:
        steering ([`Steering`]): The steering; all its values are scaled together.
        data ([`HeldOut`]): Language model and text on which the cost is measured.
        max_cost (`float`, *optional*, defaults to 0.1): Largest rise of the cross-entropy, in nats a token.
        show (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Raises:
        `ValueError`: if the steering has no values, or the smallest change costs more already.
    """
    if any(part.mode in ("remove", "erase") for part in steering.parts):
        raise ValueError("Removal and erasure have no value that could be larger or smaller: leave `dose` away.")
    if not max_cost > 0:
        raise ValueError(f"`max_cost` must be above 0 nats, got {max_cost!r}.")
    steering = _prepared(steering, data)
    bench = _Bench(data, steering.parts[0].hookpoint)
    plain = bench.effect(None)

    def costs_too_much(factor: float) -> bool:
        bar.update()
        cost = bench.effect(steering.scaled(factor)).loss - plain.loss
        return not cost <= max_cost  # NaN is too much

    with tqdm(desc="dose", unit="pass", disable=not show, leave=False) as bar:
        low = _SMALLEST * _unit(steering, plain)
        if costs_too_much(low):
            raise ValueError(
                f"Already {low:.3g} times the values cost more than {max_cost} nats. Raise `max_cost`; a clamped "
                "latent that matters costs as much as its removal."
            )
        high = 2 * low
        while not costs_too_much(high):
            low, high = high, 2 * high
            if high > 1e6 * _unit(steering, plain):
                return low  # nothing after the hookpoint looks at this direction
        for _ in range(_HALVINGS):
            middle = (low * high) ** 0.5
            low, high = (low, middle) if costs_too_much(middle) else (middle, high)
    return low


def _prepared(steering: "Steering", data: HeldOut, encoding: bool = False) -> "Steering":
    """Return a steering with its SAEs, once it is known to fit: what looks for that runs the model."""
    steering = steering.ready(encoding)
    with steering.applied(data.model, quiet=True):
        return steering


# Wanted tokens


class _Wanted:
    """The tokens that a steering is to bring, and when its latents count as firing."""

    def __init__(self, steering: "Steering", data: HeldOut, wanted: str | Sequence[int] | None) -> None:
        size = len(data.model.get_input_embeddings().weight)
        self.firing = [part for part in steering.parts if part.sae is not None and part.mode != "erase"]
        self.ids = torch.zeros(size, dtype=torch.bool)
        if isinstance(wanted, str):
            try:
                pattern, count = re.compile(wanted), min(size, len(data.tokenizer))
            except re.error as error:
                raise ValueError(f"`wanted` is no regular expression: {wanted!r} has an {error}.") from error
            texts = token_texts(data.tokenizer, range(count))
            ids = [token for token, text in enumerate(texts) if pattern.fullmatch(text)]
            self.words = f"tokens that match {wanted!r}"
        elif wanted is not None:
            ids, self.words = list(wanted), f"{len(wanted)} tokens"
        else:
            ids = self._own(data, size)
            texts = token_texts(data.tokenizer, ids) if data.tokenizer is not None else map(str, ids)
            self.words = f"tokens on which the latents fire most: {' '.join(map(repr, texts))}"
        if not ids and (wanted is not None or not self.firing):
            raise ValueError(f"No token is wanted: {wanted!r} matches none of the vocabulary's {size}.")
        self.ids[ids] = True

    def _own(self, data: HeldOut, size: int) -> list[int]:
        total = torch.zeros(size)
        for batch in data.share():
            total.index_add_(0, batch.input_ids[batch.keep].cpu(), self.fires(data, batch.input_ids)[batch.keep.cpu()])
        return [int(token) for token in total.argsort(descending=True)[:_OWN_TOKENS] if total[token] > 0]

    def fires(self, data: HeldOut, ids: Tensor) -> Tensor:
        """Return the sum of the steered latents' activations on tokens `[B, S]`, of the plain model, on the host."""
        total = torch.zeros(ids.shape)
        for part in self.firing:
            reads = part.sae.config.hookpoint or part.hookpoint
            states = harvest(data.model, ids, None, [reads])[reads].flatten(0, 1).float()
            pairs = encoded(part.sae, states.to(part.sae.W_enc.device))
            latents = torch.tensor(part.latents).unique()
            total += values_of(pairs, latents).sum(1).view(ids.shape)
        return total


# Measuring


@dataclass(frozen=True)
class _Bench:
    """Where steerings are measured: text for the dose and the cost; prompts that are continued for the effect."""

    data: HeldOut
    hookpoint: str
    wanted: _Wanted | None = None
    prompts: int = 0
    new_tokens: int = 0
    seed: int = 0

    def effect(self, steering: "Steering | None", prompt: str | None = None) -> _Effect:
        """Measure a steering, or with `None` the plain model."""
        data, sums, count = self.data, torch.zeros(3, dtype=torch.float64), [0, 0]
        erased = [] if steering is None else [part for part in steering.parts if part.mode == "erase"]
        for batch in data.share():
            seen: list[Tensor] = []

            def look(_: str, value: Any, keep: Tensor = batch.keep, seen: list[Tensor] = seen) -> None:
                seen.append(first_tensor(value)[keep].detach().float())

            with ExitStack() as stack:
                stack.enter_context(hooked(data.model, [(self.hookpoint, look)]))
                if steering is not None:
                    stack.enter_context(steering.applied(data.model, quiet=True))
                    stack.enter_context(hooked(data.model, [(self.hookpoint, look)]))
                logits, targets = spliced_logits(
                    data.model, batch, self.hookpoint, None, mask_token_id=data.mask_token_id
                )
            states, change = seen[0], seen[-1] - seen[0]
            if erased:  # long before the hookpoint; how much of a plain state that is
                states = data.states(batch)
                change = sum((part.difference(states) for part in erased), torch.zeros_like(states))
            norms = states.norm(dim=-1).clamp(min=1e-30)
            loss = F.cross_entropy(logits.float(), targets, reduction="sum")
            sums += torch.tensor([float(loss), float((change.norm(dim=-1) / norms).sum()), float(norms.sum())])
            count = [count[0] + len(targets), count[1] + len(norms)]
        means = sums / torch.tensor([max(1, count[0]), max(1, count[1]), max(1, count[1])])
        counts = self._counts(steering, prompt) if self.prompts and self.wanted is not None else None
        return _Effect(*means.tolist(), counts)

    def _counts(self, steering: "Steering | None", prompt: str | None) -> np.ndarray:
        """Return for each prompt the number of new tokens, of wanted ones, and of those on which the latents fire."""
        data, wanted, starts = self.data, self.wanted, self._starts(prompt)
        assert wanted is not None
        pad = data.tokenizer.pad_token_id if data.tokenizer is not None else None
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng([starts.device] if starts.device.type == "cuda" else []))
            torch.manual_seed(self.seed)
            if steering is not None:
                stack.enter_context(steering.applied(data.model, quiet=True))
            whole = data.model.generate(
                starts,
                attention_mask=torch.ones_like(starts),
                max_new_tokens=self.new_tokens,
                min_new_tokens=self.new_tokens,
                do_sample=True,
                top_k=0,
                temperature=1.0,
                pad_token_id=pad or 0,
            )
        new = whole[:, starts.shape[1] :].cpu()
        fires = wanted.fires(data, whole)[:, starts.shape[1] :] > 0
        counts = [torch.full((len(new),), new.shape[1]), wanted.ids[new].sum(1), fires.sum(1)]
        return torch.stack(counts, 1).double().numpy()

    def _starts(self, prompt: str | None) -> Tensor:
        """Return beginnings of windows, `(P, S)`; behind their first token comes the prompt, where one is given."""
        data = self.data
        rows = [batch.input_ids[:, :_BEGINNING] for batch in data.batches if batch.input_ids.shape[1] >= _BEGINNING]
        if not rows:
            raise ValueError(f"The text has no window of {_BEGINNING} tokens, with which a prompt could begin.")
        starts = torch.cat(rows)[: self.prompts].to(data.device)
        if prompt is None:
            return starts
        asked = torch.tensor(data.tokenizer(prompt, add_special_tokens=False)["input_ids"], device=starts.device)
        return torch.cat([starts[:, :1], asked.expand(len(starts), -1), starts[:, 1:]], 1)


def _unit(steering: "Steering", plain: _Effect) -> float:
    """Return the factor at which a steering's vectors are about as long as the hidden states."""
    longest = max(float(part.vector.norm()) for part in steering.parts)
    if not longest > 0:
        raise ValueError("The steering adds nothing: its values, or its decoder rows, are 0.")
    return plain.state_norm / longest


def _factors(steering: "Steering", plain: _Effect, factors: Sequence[float] | None) -> list[float]:
    if all(part.mode in ("remove", "erase") for part in steering.parts):
        return [1.0]
    if factors is None:
        return [dose * _unit(steering, plain) for dose in RELATIVE_DOSES]
    if not factors or not all(0 < factor < float("inf") for factor in factors):
        raise ValueError(f"`factors` must be finite numbers above 0, got {factors!r}.")
    return sorted(map(float, factors))


def _at_random(steering: "Steering", seed: int) -> "Steering":
    """Return a steering with random directions of the same norms in place of the decoder rows."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for part in steering.parts:
        rows = torch.randn(part.vectors.shape, generator=generator).to(part.vectors)
        norms = part.vectors.norm(dim=1, keepdim=True) / rows.norm(dim=1, keepdim=True)
        parts.append(replace(part, vectors=rows * norms))
    return replace(steering, parts=tuple(parts), dose=None)


def _record(kind: str, factor: float, effects: list[_Effect], plain: _Effect) -> dict[str, Any]:
    record: dict[str, Any] = {
        "kind": kind,
        "factor": factor,
        "relative_dose": float(np.mean([effect.relative_dose for effect in effects])),
        "cost": float(np.mean([effect.loss - plain.loss for effect in effects])),
    }
    if effects[0].counts is not None:
        counts = np.concatenate([effect.counts for effect in effects])
        rows = resampled_rows(len(counts), _RESAMPLES, np.random.default_rng(0))
        for name, column in (("wanted", 1), ("fires", 2)):
            record[name] = float(counts[:, column].sum() / counts[:, 0].sum())
            record[f"{name}_interval"] = ratio_interval(counts[:, column], counts[:, 0], rows)
    return record
