"""The loss of a language model when reconstructions take the place of its hidden states.

    recaptured_zero, _mean   (CE_ablated - CE_spliced) / (CE_ablated - CE_clean), ablated to zero or to the mean;
                             SAEBench calls the first `ce_loss_score`
    delta_ce                 CE_spliced - CE_clean, nats per token
    kl                       E[KL(clean || spliced)] over predictions, nats
    kl_score                 (KL_zero - KL_spliced) / KL_zero

    compute_share            training compute of a model of that loss over that of this one, see [`LossScaling`]

Cross-entropy and KL are counted where hidden states were replaced; special tokens keep theirs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..activations import TokenBatch, spliced_logits
from ..common.distributed import reduce_sum
from .data import HeldOut
from .subjects import Subject


_ROWS = 1024  # float32 copies of logits are rows x vocabulary
_LOGITS = 2**27  # logits of the clean model kept at a time


class LossSums:
    """Cross-entropy and divergence from the clean model, summed over predictions, of several replacements.

    Args:
        replacements (`int`): Number of replacements.
    """

    def __init__(self, replacements: int) -> None:
        self.predictions, self.excluded = torch.zeros(2, dtype=torch.int64).unbind()
        self.ce = torch.zeros(replacements, dtype=torch.float64)
        self.kl = torch.zeros(replacements, dtype=torch.float64)

    @torch.no_grad()
    def add(self, index: int, clean: Tensor, spliced: Tensor, targets: Tensor) -> None:
        """Add replacement `index`'s logits `(S, V)`, with the clean model's and the tokens to predict `(S,)`."""
        parts = zip(clean.split(_ROWS), spliced.split(_ROWS), targets.split(_ROWS), strict=True)
        for before, after, target_ids in parts:
            before, after = before.float().log_softmax(-1), after.float().log_softmax(-1)
            self.ce[index] += F.nll_loss(after, target_ids, reduction="none").double().sum().cpu()
            self.kl[index] += (before.exp() * (before - after)).sum(-1).double().sum().cpu()

    def reduce(self) -> "LossSums":
        """Return the sums of all processes."""
        reduce_sum(self.predictions, self.excluded, self.ce, self.kl)
        return self


class LossBaselines:
    """The losses against which a reconstruction is judged.

    Args:
        clean_ce (`float`): Cross-entropy of the model as it is, nats per token.
        zero_ce (`float`): Cross-entropy with the hidden states replaced by zero.
        mean_ce (`float`): Cross-entropy with the hidden states replaced by their mean.
        zero_kl (`float`): Divergence of the zero-ablated model from the clean one, nats per token.
        excluded_predictions (`int`, *optional*, defaults to 0): Predictions that no figure counts, because the model
            as it is gives NaN or infinity there.
    """

    def __init__(
        self, clean_ce: float, zero_ce: float, mean_ce: float, zero_kl: float, excluded_predictions: int = 0
    ) -> None:
        self.clean_ce, self.zero_ce, self.mean_ce, self.zero_kl = clean_ce, zero_ce, mean_ce, zero_kl
        self.excluded_predictions = excluded_predictions

    def row(self, ce: float, kl: float) -> dict[str, float | None]:
        """Return every metric of one replacement."""
        return {
            "ce": ce,
            "delta_ce": ce - self.clean_ce,
            "recaptured_zero": _recaptured(self.zero_ce, ce, self.clean_ce),
            "recaptured_mean": _recaptured(self.mean_ce, ce, self.clean_ce),
            "kl": kl,
            "kl_score": (self.zero_kl - kl) / self.zero_kl if self.zero_kl else None,
        }


@dataclass(frozen=True)
class LossScaling:
    """How a language model's loss falls with its training compute: L(C) = irreducible + (constant / C)^exponent.

    A model of loss L was then trained with ((L_clean - irreducible) / (L - irreducible))^(1 / exponent) of the compute
    of one with L_clean; the constant cancels. Gao et al. 2024 (arXiv 2406.04093) state the loss of a spliced model so.

    Args:
        exponent (`float`): Exponent, above 0.
        irreducible (`float`, *optional*, defaults to 0): Irreducible loss in nats per token, below the loss of every
            model compared; of the same text and tokenizer as the losses.
    """

    exponent: float
    irreducible: float = 0.0

    def __post_init__(self) -> None:
        if not self.exponent > 0 or not self.irreducible >= 0:
            raise ValueError(
                "A scaling law needs an exponent above 0 and an irreducible loss of at least 0, got "
                f"{self.exponent} and {self.irreducible}."
            )

    def compute_share(self, clean_ce: float, ce: float) -> float:
        """Return the share of training compute at which a model would have loss `ce`.

        Raises:
            `ValueError`: if the irreducible loss is not below both losses.
        """
        if self.irreducible >= min(clean_ce, ce):
            raise ValueError(
                f"The irreducible loss, {self.irreducible:.4f} nats, must be below the language model's on this text, "
                f"{min(clean_ce, ce):.4f}. Is the scaling law one of this kind of text and tokenizer?"
            )
        return ((clean_ce - self.irreducible) / (ce - self.irreducible)) ** (1 / self.exponent)


def _recaptured(ablated: float, spliced: float, clean: float) -> float | None:
    return (ablated - spliced) / (ablated - clean) if ablated != clean else None


@torch.no_grad()
def spliced_metrics(
    data: HeldOut,
    mean: Tensor,
    subjects: Sequence[Subject],
    advance: Callable[[int], None] = lambda _passes: None,
) -> tuple[LossBaselines, list[list[dict[str, float | None]]]]:
    """Return losses of the language model with each subject's reconstructions, and with none, zero and the mean.

    Args:
        data ([`HeldOut`]): A model with a loss, and tokens; every process runs its share of the batches.
        mean (`Tensor` of shape `(D,)`): Mean of the hidden states.
        subjects (`Sequence[Subject]`): Each encodes a batch once; its reconstructions are spliced in turn.
        advance (`Callable`, *optional*): Called with the number of passes of the language model that were done.

    Returns:
        [`LossBaselines`], and for each subject the metrics at each of its widths.
    """
    # Zero and mean are the same for all dictionaries: who keeps hidden states of this text keeps their losses too.
    kept: dict[Any, Any] = {} if data.kept_states is None else data.kept_states
    key = ("baselines", data.hookpoint, *((each.input_ids.data_ptr(), each.input_ids.shape) for each in data.batches))
    base, sums = LossSums(3), [LossSums(len(subject.widths)) for subject in subjects]
    for batch in data.share():
        for part in _parts(batch, data):
            part, states = data.finite(part)
            if not len(states):
                advance(sum(len(subject.widths) for subject in subjects))
                continue
            clean, targets = _logits(data, part, None)
            usable = _usable(clean)
            clean, targets = clean[usable], targets[usable]
            if key not in kept:
                base.predictions += usable.sum().cpu()
                base.excluded += (~usable).sum().cpu()
                base.add(0, clean, clean, targets)
                base.add(1, clean, _logits(data, part, torch.zeros_like)[0][usable], targets)
                base.add(2, clean, _logits(data, part, lambda x: mean.to(x).expand_as(x))[0][usable], targets)
            for subject, total in zip(subjects, sums, strict=True):
                for index, output in enumerate(subject.reconstruct(states)):
                    spliced, _ = _logits(data, part, lambda x, output=output: output.to(x))
                    total.add(index, clean, spliced[usable], targets)
                    advance(1)
    base = kept[key] if key in kept else kept.setdefault(key, base.reduce())
    predictions = int(base.predictions) or math.nan  # without predictions every figure is NaN
    for entry in sums:
        entry.reduce()
    clean_ce, zero_ce, mean_ce = (base.ce / predictions).tolist()
    zero_kl = (base.kl[1] / predictions).item()
    baselines = LossBaselines(clean_ce, zero_ce, mean_ce, zero_kl, int(base.excluded))
    return baselines, [
        [baselines.row(*pair) for pair in (torch.stack([total.ce, total.kl], 1) / predictions).tolist()]
        for total in sums
    ]


def _logits(data: HeldOut, batch: TokenBatch, replace: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor]:
    return spliced_logits(data.model, batch, data.hookpoint, replace, mask_token_id=data.mask_token_id)


def _usable(logits: Tensor) -> Tensor:
    """Return positions `(S,)` at which the logits `(S, V)` are a distribution: no NaN, no positive infinity."""
    return torch.cat([part.float().logsumexp(-1).isfinite() for part in logits.split(_ROWS)])


def _parts(batch: TokenBatch, data: HeldOut) -> list[TokenBatch]:
    """Return the batch in pieces whose logits may be kept."""
    vocabulary = data.model.get_output_embeddings().weight.shape[0]
    size = max(1, _LOGITS // (batch.input_ids.shape[1] * vocabulary))
    pieces = zip(*(t.split(size) for t in (batch.input_ids, batch.attention_mask, batch.keep)), strict=True)
    return [TokenBatch(*piece, batch.padded) for piece in pieces]
