"""One dictionary in training: its weights, its optimizer, and everything that is counted about it."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from ...models import SAEConfig, SAEModel
from ...models.sharding import Layout, all_sum, exchange_rows
from ..config.spec import SAESpec
from .competition import Competition
from .growth import FrozenBase
from .losses import Objective, level_weights
from .optimizer import build_optimizer, store_weights
from .schedules import annealed_k, dead_window, learning_rate, random_prefix_widths, weights_progress
from .sparsity import SparsityCoefficient
from .state import LearnerState


# Entries of the decoder that are projected at once: what fits a CPU's cache; few launches on a GPU.
_PIECE = {"cpu": 2**18, "cuda": 2**26}


@dataclass
class StepStatistics:
    """What a step tells about a dictionary, averaged over processes and micro-batches.

    Args:
        loss (`float`), fvu (`list[float]`): The objective, and the fraction of variance unexplained at each prefix.
        widths (`list[int]` or `None`): The widths of these prefixes; `None` where they are drawn anew at each step.
        l0 (`float`): Latents that fired per token.
        dead (`float`): Share of latents that have not fired on `dead_tokens` tokens.
        auxk (`float`), sparsity (`float`), lr (`float`), grad_norm (`float`): As named.
    """

    loss: float
    fvu: list[float]
    widths: list[int] | None
    l0: float
    dead: float
    auxk: float
    sparsity: float
    lr: float
    grad_norm: float


class Learner(LearnerState):
    """Trains one SAE at one hookpoint.

    Args:
        name (`str`): Folder of the results, `<sae name>/<hookpoint>`.
        hookpoint (`str`): Where in the language model its hidden states come from.
        sae ([`SAEModel`]): Initialised, in normalised units; of a sharded dictionary the latents of this process.
        spec ([`SAESpec`]): Objective and optimiser.
        mean (`Tensor` of shape `(D,)`), scale (`float`): The normalisation.
        accelerator (`Accelerator`): Owns devices and processes.
        steps (`int`), batch_size (`int`): Optimizer steps of the run; tokens in each, over all processes.
        seed (`int`): Of the random prefixes.
        base ([`FrozenBase`], *optional*): The first latents, where these are not trained.
        layout ([`Layout`], *optional*): The processes that train it, this one among them; by default all of them, each
            with the whole dictionary.
        config ([`SAEConfig`], *optional*): Of the whole dictionary; by default the SAE's.
        device (`torch.device`, *optional*): Where it is trained; by default the accelerator's.
        first_threshold (`float`, *optional*): What [`start_at_target`] gave.
    """

    def __init__(
        self,
        name: str,
        hookpoint: str,
        sae: SAEModel,
        spec: SAESpec,
        mean: Tensor,
        scale: float,
        accelerator: Accelerator,
        *,
        steps: int,
        batch_size: int,
        seed: int = 0,
        base: FrozenBase | None = None,
        layout: Layout | None = None,
        config: SAEConfig | None = None,
        device: torch.device | None = None,
        first_threshold: float | None = None,
    ) -> None:
        self.config = sae.config if config is None else config
        self.layout = layout = layout or _data_parallel(accelerator, self.config.num_latents)
        # Accelerate's wrapper would give every process the first one's weights, and knows no group but all of them.
        wrapped = layout.shards == 1 and device is None and layout.replicas == accelerator.num_processes
        device = device or accelerator.device
        self.name, self.hookpoint, self.spec = name, hookpoint, spec
        self.accelerator, self.steps, self.batch_size, self.seed = accelerator, steps, batch_size, seed
        self.mean, self.scale = mean.to(device), scale
        self.sae = sae.to(device).train()
        store_weights(self.sae, spec)
        self.sae.b_enc.requires_grad_(spec.train_b_enc)
        self.base, self.fixed = base, 0 if base is None else base.width
        if base is not None:
            base.hold(self.sae)
        scales = dict.fromkeys(("W_enc", "r_mag"), spec.encoder_lr_scale)
        scales |= dict.fromkeys(("b_enc", "b_mag"), spec.encoder_bias_lr_scale)
        scales |= {"threshold": spec.threshold_lr_scale, "b_dec": spec.decoder_bias_lr_scale}
        groups = [
            {
                "params": [parameter],
                "lr_scale": scales.get(name, 1.0),
                "unit_rows": name == "W_dec" and spec.unit_norm_decoder,
                "first_row": 0 if name == "b_dec" else layout.rows[0],
            }
            for name, parameter in self._parameters()
            if parameter.requires_grad
        ]
        optimizer = build_optimizer(groups, spec, steps, seed)
        self.objective, self.optimizer = Objective(self.sae, spec, layout), accelerator.prepare(optimizer)
        self._reduces = not wrapped and layout.processes > 1
        if wrapped:
            self.objective = accelerator.prepare(self.objective)

        num_latents = sae.config.num_latents
        self.competition = Competition(self.sae, spec, steps, layout, self.fixed)
        self.k = getattr(self.config, "k", None)
        self.dead_tokens = dead_window(spec, steps * batch_size, batch_size)
        # To know whether any latent is dead the host must wait for the device: not at every step of a long window.
        self.dead_every = max(1, self.dead_tokens // batch_size // 16)
        # The dead latents of this process, ascending, `None` where none has any; how many there are in all.
        self.dead, self.num_dead = None, 0
        self.tokens_since_fired = torch.zeros(num_latents, dtype=torch.int64, device=device)
        self.energy = torch.zeros(num_latents, device=device) if spec.sort_every else None
        self.sparsity = SparsityCoefficient(spec, sae.config.activation_name, steps, device, first_threshold)
        self.average: dict[str, Tensor] | None = None
        if spec.ema_decay is not None:  # float32, whatever the weights are: it moves by a small share each step
            self.average = {
                name: torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
                for name, parameter in self._parameters()
            }
        self.updates = 0
        # Steps left out: for hidden states, for gradients that were not finite; and how many in a row just now.
        self._skipped = torch.zeros(3, dtype=torch.int64, device=device)
        self.last: dict[str, Tensor] = {}
        self._micro: list[dict[str, Tensor]] = []
        self._project_decoder()

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.sae.named_parameters()

    # One step. Nothing in it makes the host wait for the device, but for the look at dead latents now and then.

    def accumulate(self, x: Tensor, step: int) -> None:
        """Add the gradients of one micro-batch of raw hidden states `(n, D)`.

        Where one of them is not finite, the loss and so the gradients of all processes become NaN, and [`step`] leaves
        the weights as they are.
        """
        spec, sae = self.spec, self.sae
        if self.k is not None:
            sae.k = annealed_k(spec, self.k, step, self.steps)
        widths = self.config.widths
        if spec.random_prefixes:
            widths = random_prefix_widths(spec, self.config.num_latents, self.seed, step)
        x = x.to(self.mean, non_blocking=True)
        finite = torch.stack(x.aminmax()).isfinite().all()  # of NaN both are NaN
        x = torch.where(finite, x, 0.0).sub_(self.mean).div_(self.scale)
        weights = level_weights(spec, len(widths), weights_progress(spec, step, self.steps))
        if self.base is not None:
            weights = self.base.outer_weights(weights, widths)
        num_dead = self.num_dead if self.layout.shards > 1 else None
        sparsity = 0.0 if self.competition.holds(step) else self.sparsity.at(step)
        with self.accelerator.autocast(), self.competition.at(step, x, first=not self._micro):
            loss, statistics = self.objective(x, self.dead, widths, weights, sparsity, num_dead)
        self.accelerator.backward(loss * torch.where(finite, 1.0, torch.nan))
        self._micro.append({**statistics, "loss": loss.detach().float(), "unusable": (~finite).float()})

    def step(self, step: int) -> None:
        """Apply the accumulated gradients and update every counter; a gradient that is not finite changes nothing."""
        spec = self.spec
        if self._reduces:
            self._reduce_gradients()
        if self.base is not None:
            self.base.silence(self.sae)
        self._project_gradient()
        self.grad_norm = self._gradient_norm()
        finite = torch.isfinite(self.grad_norm)
        # The fused kernel reads both on the device: clipping makes no copy, and skipping needs no answer from it.
        optimizer = self.optimizer.optimizer
        optimizer.found_inf = (~finite).float()
        if spec.grad_clip is not None:
            optimizer.grad_scale = ((self.grad_norm + 1e-6) / spec.grad_clip).clamp(min=1.0).float()
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr_scale"] * learning_rate(spec, self.config, step, self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._project_decoder(finite)
        self._average()
        self._count(step, finite)

    @torch.no_grad()
    def _reduce_gradients(self) -> None:
        """Average over replicas what each computed; `b_dec`, to which all shards add, is summed over them as well."""
        layout = self.layout
        for name, parameter in self._parameters():
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            group = layout.group if name == "b_dec" else layout.replica_group
            if group is not None:
                dist.all_reduce(parameter.grad, group=group)
                parameter.grad /= layout.replicas

    def _gradient_norm(self) -> Tensor:
        """The length of the whole dictionary's gradient."""
        named = [(name, parameter.grad) for name, parameter in self._parameters() if parameter.grad is not None]
        if self.layout.shards == 1:
            return torch.nn.utils.get_total_norm([gradient for _, gradient in named])
        counted = [gradient for name, gradient in named if name != "b_dec" or self.layout.shard == 0]
        return all_sum(torch.nn.utils.get_total_norm(counted).square(), self.layout.shard_group).sqrt()

    def skipped(self) -> tuple[int, int, int]:
        """Steps left out because of hidden states, because of gradients, and in a row just now; the host waits."""
        return tuple(self._skipped.tolist())

    @torch.no_grad()
    def _project_gradient(self) -> None:
        """Take the part of the decoder's gradient along each row away: a unit row only turns."""
        gradient = self.sae.W_dec.grad
        if self.spec.unit_norm_decoder and gradient is not None:
            # vecdot forms the product first: in pieces it stays in the cache, and no copy of W_dec is made.
            size = _piece_rows(gradient)
            for part, rows in zip(gradient.split(size), self.sae.W_dec.split(size), strict=True):
                exact, rows = part.float(), rows.float()
                exact.addcmul_(torch.linalg.vecdot(exact, rows)[:, None], rows, value=-1)
                if exact is not part:
                    part.copy_(exact)

    @torch.no_grad()
    def _project_decoder(self, changed: Tensor | None = None) -> None:
        rounded = self.sae.W_dec.dtype == torch.bfloat16
        if self.spec.unit_norm_decoder and not (rounded and changed is not None):  # rounded once, by the optimizer
            rows = self.sae.W_dec[self.fixed :]
            wide = torch.promote_types(rows.dtype, torch.float32)
            for part in rows.split(_piece_rows(rows)):
                norms = torch.linalg.vector_norm(part, dim=1, keepdim=True, dtype=wide).clamp(min=1e-12)
                if changed is not None:  # dividing again would round again
                    norms = torch.where(changed, norms, 1.0)
                part.div_(norms)
        if self.sae.config.activation_name == "jumprelu":
            self.sae.threshold[self.fixed :].clamp_(min=0)

    @torch.no_grad()
    def _average(self) -> None:
        self.updates += 1
        if self.average is not None:
            for name, parameter in self._parameters():
                self.average[name].lerp_(parameter.float(), 1 - self.spec.ema_decay)

    @torch.no_grad()
    def _count(self, step: int, finite: Tensor) -> None:
        """Counters that need all processes: which latents fired, how many, how strongly; none of an unusable step."""
        mean = self._means_over_batch()
        before = self.last or {key: torch.zeros_like(value) for key, value in mean.items()}
        self.last = {key: torch.where(finite, value, before[key]) for key, value in mean.items()}
        silent = torch.where(mean["fired"] > 0, 0, self.tokens_since_fired + self.batch_size)
        self.tokens_since_fired = torch.where(finite, silent, self.tokens_since_fired)
        states = ~finite & (mean["unusable"] > 0)
        self._skipped = torch.stack(
            [self._skipped[0] + states, self._skipped[1] + (~finite & ~states), (self._skipped[2] + 1) * ~finite]
        )
        if self.spec.dead_threshold_decay and not self.competition.holds(step):
            # Below its kernel's window a latent has no gradient, and nothing else brings it back.
            dead = (self.tokens_since_fired[self.fixed :] >= self.dead_tokens) & finite
            self.sae.threshold[self.fixed :] *= 1 - self.spec.dead_threshold_decay * dead
        self.sparsity.follow(self.last["l0"], step, finite)
        if self.energy is not None:
            self.energy = torch.where(finite, torch.lerp(self.energy, mean["energy"], 0.05), self.energy)
            if (step + 1) % self.spec.sort_every == 0:
                self._sort()
        if (step + 1) % self.dead_every == 0:
            self._find_dead()

    def _means_over_batch(self) -> dict[str, Tensor]:
        """Each statistic averaged over micro-batches and replicas; `l0`, of which a shard knows its part, summed."""
        layout, keys = self.layout, list(self._micro[0])
        sums = {key: torch.stack([entry[key] for entry in self._micro]).sum(0) for key in keys}
        count = len(self._micro) * layout.replicas
        self._micro.clear()
        if layout.shards == 1:
            return _summed(sums, layout.group, count)
        of_latents = {key: sums.pop(key) for key in ("fired", "energy") if key in sums}
        once = 1.0 if layout.shard == 0 else 0.0
        sums = {key: value if key == "l0" else value * once for key, value in sums.items()}
        return _summed(of_latents, layout.replica_group, count) | _summed(sums, layout.group, count)

    def _find_dead(self) -> None:
        silent = self.tokens_since_fired >= self.dead_tokens
        silent[: self.fixed] = False  # cannot be revived
        self._set_dead(silent)

    def _set_dead(self, silent: Tensor) -> None:
        dead = silent.nonzero().squeeze(1)
        self.num_dead = len(dead)
        if self.layout.shards > 1:
            self.num_dead = int(all_sum(silent.sum(), self.layout.shard_group))
        self.dead = dead if self.num_dead else None

    @torch.no_grad()
    def _sort(self) -> None:
        """Put latents in order of energy; weights, moments, averages and counters move together."""
        tensors = self._rows()
        tensors.pop("weights/latent_ids")  # those of a dictionary in training are its places
        if self.layout.shards > 1:
            self._sort_over_shards(tensors)
            return
        order = self.energy.argsort(descending=True, stable=True)
        for tensor in tensors.values():
            tensor.copy_(tensor[order])
        if self.dead is not None:
            self.dead = order.argsort()[self.dead].sort().values

    def _sort_over_shards(self, tensors: dict[str, Tensor]) -> None:
        start, stop = self.layout.rows
        energy = self.energy.new_zeros(self.layout.num_latents)
        energy[start:stop] = self.energy
        order = all_sum(energy, self.layout.shard_group).argsort(descending=True, stable=True)
        silent = torch.zeros_like(self.tokens_since_fired, dtype=torch.bool)
        if self.dead is not None:
            silent[self.dead] = True
        for tensor in (*tensors.values(), silent):
            exchange_rows(tensor, order, self.layout)
        self._set_dead(silent)

    def statistics(self, step: int) -> StepStatistics:
        """What the last step told; moves numbers to the host."""
        variance = max((self.last["square"] - self.last["mean"].square().sum()).item(), 1e-30)
        return StepStatistics(
            loss=self.last["loss"].item(),
            fvu=[sse / variance for sse in self.last["sse"].tolist()],
            widths=None if self.spec.random_prefixes else list(self.config.widths),
            l0=self.last["l0"].item(),
            dead=self.share_silent(self.dead_tokens),
            auxk=self.last["auxk"].item(),
            sparsity=self.sparsity.value.item(),
            lr=learning_rate(self.spec, self.config, step, self.steps),
            grad_norm=float(self.grad_norm),
        )

    def share_silent(self, tokens: int) -> float:
        """The share of latents that fired on none of the last so many tokens; all who share the dictionary ask."""
        silent = (self.tokens_since_fired >= tokens).sum()
        return all_sum(silent, self.layout.shard_group).item() / self.layout.num_latents

    # The end

    @torch.no_grad()
    def finished(self) -> SAEModel:
        """A copy of the SAE as it is saved, still in normalised units: averaged weights, unit rows, final k."""
        sae = copy.deepcopy(self.sae).eval()
        sae.k = self.k
        if self.average is not None and self.updates:
            correction = 1 - self.spec.ema_decay**self.updates
            for name, parameter in sae.named_parameters():
                mean = self.average[name] / correction
                if name == "W_dec" and self.spec.unit_norm_decoder:
                    mean = mean.div_(mean.norm(dim=1, keepdim=True).clamp(min=1e-12))
                parameter.copy_(mean)
        competing = sae.config.activation_name in ("topk", "batch_topk")
        scaled = sae.config.scale_by_decoder_norm
        # Folding norms where latents compete by values without them would change which latents win.
        if not self.spec.unit_norm_decoder and (self.base is None if scaled else not competing):
            sae.fold_decoder_norm_()
        if self.base is not None:
            self.base.copy_rows(sae, self.sae)
        for parameter in sae.parameters():
            parameter.requires_grad_(True)
        return sae


def _piece_rows(matrix: Tensor) -> int:
    """How many rows are projected at once."""
    return max(1, _PIECE.get(matrix.device.type, 2**26) // matrix.shape[1])


def _data_parallel(accelerator: Accelerator, num_latents: int) -> Layout:
    """Every process has the whole dictionary."""
    world = accelerator.num_processes
    group = dist.group.WORLD if world > 1 else None
    return Layout(num_latents, accelerator.process_index, world, replica_group=group, group=group)


def _summed(values: dict[str, Tensor], group: dist.ProcessGroup | None, count: int) -> dict[str, Tensor]:
    """Sums over the processes of `group`, in one reduction, divided by `count`."""
    packed = all_sum(torch.cat([value.flatten() for value in values.values()]), group) / count
    shares = packed.split([value.numel() for value in values.values()])
    return {key: share.view(value.shape) for (key, value), share in zip(values.items(), shares, strict=True)}
