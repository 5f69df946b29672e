"""One dictionary in training: its weights, its optimizer, and everything that is counted about it."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from ..models import SAEModel
from .config import SAESpec
from .growth import FrozenBase
from .losses import Objective, all_sum, level_weights
from .optimizer import build_optimizer, store_weights
from .schedules import annealed_k, dead_window, learning_rate, random_prefix_widths, sparsity_warmup


# Entries of the decoder that are projected at once: what fits a CPU's cache; few launches on a GPU.
_PIECE = {"cpu": 2**18, "cuda": 2**26}


@dataclass
class StepStatistics:
    """What a step tells about a dictionary, averaged over processes and micro-batches.

    Args:
        loss (`float`), fvu (`list[float]`): The objective, and the fraction of variance unexplained at each prefix.
        l0 (`float`): Latents that fired per token.
        dead (`float`): Share of latents that have not fired on `dead_tokens` tokens.
        auxk (`float`), sparsity (`float`), lr (`float`), grad_norm (`float`): As named.
    """

    loss: float
    fvu: list[float]
    l0: float
    dead: float
    auxk: float
    sparsity: float
    lr: float
    grad_norm: float


class Learner:
    """Trains one SAE at one hookpoint.

    Args:
        name (`str`): Folder of the results, `<sae name>/<hookpoint>`.
        sae ([`SAEModel`]): Initialised, in normalised units.
        spec ([`SAESpec`]): Objective and optimiser.
        mean (`Tensor` of shape `(D,)`), scale (`float`): The normalisation.
        accelerator (`Accelerator`): Owns devices and processes.
        steps (`int`), batch_size (`int`): Optimizer steps of the run; tokens in each, over all processes.
        seed (`int`): Of the random prefixes.
        base ([`FrozenBase`], *optional*): The first latents, where these are not trained.
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
        steps: int,
        batch_size: int,
        seed: int = 0,
        base: FrozenBase | None = None,
    ):
        device = accelerator.device
        self.name, self.hookpoint, self.spec = name, hookpoint, spec
        self.accelerator, self.steps, self.batch_size, self.seed = accelerator, steps, batch_size, seed
        self.group = dist.group.WORLD if accelerator.num_processes > 1 else None
        self.mean, self.scale = mean.to(device), scale
        self.sae = sae.to(device).train()
        store_weights(self.sae, spec)
        self.sae.b_enc.requires_grad_(spec.train_b_enc)
        self.base, self.fixed = base, 0 if base is None else base.width
        if base is not None:
            base.hold(self.sae)
        scales = {"W_enc": spec.encoder_lr_scale, "b_enc": spec.encoder_bias_lr_scale}
        scales["threshold"] = spec.threshold_lr_scale
        groups = [
            {
                "params": [parameter],
                "lr_scale": scales.get(name, 1.0),
                "unit_rows": name == "W_dec" and spec.unit_norm_decoder,
            }
            for name, parameter in self._parameters()
            if parameter.requires_grad
        ]
        optimizer = build_optimizer(groups, spec, seed)
        self.objective, self.optimizer = accelerator.prepare(Objective(self.sae, spec, self.group), optimizer)

        num_latents = sae.config.num_latents
        self.k = getattr(sae.config, "k", None)
        self.dead_tokens = dead_window(spec, steps * batch_size, batch_size)
        # To know whether any latent is dead the host must wait for the device: not at every step of a long window.
        self.dead_every = max(1, self.dead_tokens // batch_size // 16)
        self.dead: Tensor | None = None  # the dead latents, ascending; `None` where there are none
        self.tokens_since_fired = torch.zeros(num_latents, dtype=torch.int64, device=device)
        self.energy = torch.zeros(num_latents, device=device) if spec.sort_every else None
        sparsity = spec.sparsity_coefficient or 0.0
        if spec.sparsity_coefficient is None and spec.target_l0 is not None:
            sparsity = 0.1  # in units where E||x||^2 = 1; the controller moves it from there
        self.penalised, self.sparsity = sparsity != 0, torch.tensor(sparsity, device=device)
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

    def _parameters(self):
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
        widths = sae.prefix_widths
        if spec.random_prefixes:
            widths = random_prefix_widths(spec, sae.config.num_latents, self.seed, step)
        x = x.to(device=self.mean.device, dtype=torch.float32, non_blocking=True)
        finite = torch.isfinite(x).all()
        x = (torch.where(finite, x, 0.0) - self.mean) / self.scale
        sparsity = self.sparsity * sparsity_warmup(spec, step, self.steps) if self.penalised else 0.0
        weights = level_weights(spec, len(widths), step / self.steps)
        if self.base is not None:
            weights = self.base.outer_weights(weights, widths)
        loss, statistics = self.objective(x, self.dead, widths, weights, sparsity)
        self.accelerator.backward(loss * torch.where(finite, 1.0, torch.nan))
        self._micro.append({**statistics, "loss": loss.detach().float(), "unusable": (~finite).float()})

    def step(self, step: int) -> None:
        """Apply the accumulated gradients and update every counter; a gradient that is not finite changes nothing."""
        spec = self.spec
        if self.base is not None:
            self.base.silence(self.sae)
        self._project_gradient()
        gradients = [parameter.grad for _, parameter in self._parameters() if parameter.grad is not None]
        self.grad_norm = torch.nn.utils.get_total_norm(gradients)
        finite = torch.isfinite(self.grad_norm)
        # The fused kernel reads both on the device: clipping makes no copy, and skipping needs no answer from it.
        optimizer = self.optimizer.optimizer
        optimizer.found_inf = (~finite).float()
        if spec.grad_clip is not None:
            optimizer.grad_scale = ((self.grad_norm + 1e-6) / spec.grad_clip).clamp(min=1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr_scale"] * learning_rate(spec, self.sae.config, step, self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._project_decoder(finite)
        self._average()
        self._count(step, finite)

    def skipped(self) -> tuple[int, int, int]:
        """Steps left out because of hidden states, because of gradients, and in a row just now; the host waits."""
        return tuple(self._skipped.tolist())

    @torch.no_grad()
    def _project_gradient(self) -> None:
        """Take the part of the decoder's gradient along each row away: a unit row only turns."""
        gradient = self.sae.W_dec.grad
        if self.spec.unit_norm_decoder and gradient is not None:
            # vecdot forms the product first: in pieces it stays in the cache, and no copy of W_dec is made.
            size = max(1, _PIECE.get(gradient.device.type, 2**26) // gradient.shape[1])
            for part, rows in zip(gradient.split(size), self.sae.W_dec.split(size), strict=True):
                exact, rows = part.float(), rows.float()
                exact.addcmul_(torch.linalg.vecdot(exact, rows)[:, None], rows, value=-1)
                if exact is not part:
                    part.copy_(exact)

    @torch.no_grad()
    def _project_decoder(self, changed: Tensor | None = None) -> None:
        rounded = self.sae.W_dec.dtype != torch.float32
        if self.spec.unit_norm_decoder and not (rounded and changed is not None):  # rounded once, by the optimizer
            rows = self.sae.W_dec[self.fixed :]
            norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float32).clamp(min=1e-12)
            if changed is not None:  # dividing again would round again
                norms = torch.where(changed, norms, 1.0)
            rows.div_(norms)
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
        self._control_sparsity(step, finite)
        if self.energy is not None:
            self.energy = torch.where(finite, torch.lerp(self.energy, mean["energy"], 0.05), self.energy)
            if (step + 1) % self.spec.sort_every == 0:
                self._sort()
        if (step + 1) % self.dead_every == 0:
            self._find_dead()

    def _means_over_batch(self) -> dict[str, Tensor]:
        """Each statistic averaged over micro-batches and processes."""
        keys = list(self._micro[0])
        parts = [torch.stack([entry[key] for entry in self._micro]).sum(0) for key in keys]
        packed = all_sum(torch.cat([part.flatten() for part in parts]), self.group)
        packed = packed / (len(self._micro) * self.accelerator.num_processes)
        self._micro.clear()
        shares = packed.split([part.numel() for part in parts])
        return {key: share.view(part.shape) for key, share, part in zip(keys, shares, parts, strict=True)}

    def _find_dead(self) -> None:
        silent = self.tokens_since_fired >= self.dead_tokens
        silent[: self.fixed] = False  # cannot be revived
        dead = silent.nonzero().squeeze(1)
        self.dead = dead if len(dead) else None

    def _control_sparsity(self, step: int, finite: Tensor) -> None:
        """Raise the coefficient where more than `target_l0` latents fire, lower it where fewer do (Nabeshima 2024)."""
        spec = self.spec
        controlled = spec.target_l0 is not None and self.sae.config.activation_name in ("relu", "gated")
        if controlled and sparsity_warmup(spec, step, self.steps) >= 1:
            rate = torch.where(self.last["l0"] >= spec.target_l0, spec.controller_rate, -spec.controller_rate)
            self.sparsity = self.sparsity * torch.where(finite, 1 + rate, 1.0)

    @torch.no_grad()
    def _sort(self) -> None:
        """Put latents in order of energy; weights, moments, averages and counters move together."""
        order = self.energy.argsort(descending=True, stable=True)
        tensors = [parameter for name, parameter in self._parameters() if name != "b_dec"]
        if self.sae.config.activation_name == "batch_topk":
            tensors.append(self.sae.threshold)
        for parameter in list(tensors):
            state = self.optimizer.state.get(parameter, {})
            tensors += [tensor for tensor in state.values() if tensor.ndim]  # all but the number of steps
        if self.average is not None:
            tensors += [tensor for name, tensor in self.average.items() if name != "b_dec"]
        for tensor in [*tensors, self.energy, self.tokens_since_fired]:
            tensor.copy_(tensor[order])
        if self.dead is not None:
            self.dead = order.argsort()[self.dead].sort().values

    def statistics(self, step: int) -> StepStatistics:
        """What the last step told; moves numbers to the host."""
        variance = max(self.last["variance"].item(), 1e-30)
        return StepStatistics(
            loss=self.last["loss"].item(),
            fvu=[sse / variance for sse in self.last["sse"].tolist()],
            l0=self.last["l0"].item(),
            dead=(self.tokens_since_fired >= self.dead_tokens).float().mean().item(),
            auxk=self.last["auxk"].item(),
            sparsity=self.sparsity.item(),
            lr=learning_rate(self.spec, self.sae.config, step, self.steps),
            grad_norm=float(self.grad_norm),
        )

    # The end, and checkpoints

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
        if not self.spec.unit_norm_decoder and (sae.config.scale_by_decoder_norm or not competing):
            # Elsewhere it would change which latents win.
            if self.base is None or not sae.config.scale_by_decoder_norm:
                sae.fold_decoder_norm_()
        if self.base is not None:
            self.base.copy_rows(sae, self.sae)
        for parameter in sae.parameters():
            parameter.requires_grad_(True)
        return sae

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        moments = self.optimizer.state_dict()
        return {
            "weights": dict(self.sae.state_dict()),
            "optimizer": {str(index): dict(state) for index, state in moments["state"].items()},
            "average": self.average,
            "energy": self.energy,
            "tokens_since_fired": self.tokens_since_fired,
            "mean": self.mean,
            "scale": self.scale,
            "bandwidth": getattr(self.sae.config, "bandwidth", None),
            "sparsity": self.sparsity.item(),
            "updates": self.updates,
            "dead": self.dead,
            "skipped": self._skipped,
            "base": None if self.base is None else self.base.raw,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what [`state_dict`] gave."""
        self.sae.load_state_dict(state["weights"])
        moments = self.optimizer.state_dict()
        moments["state"] = {int(index): entry for index, entry in state["optimizer"].items()}
        self.optimizer.load_state_dict(moments)
        device = self.mean.device
        if self.average is not None:
            self.average = {name: tensor.to(device) for name, tensor in state["average"].items()}
        if self.energy is not None:
            self.energy = state["energy"].to(device)
        self.tokens_since_fired = state["tokens_since_fired"].to(device)
        self.mean, self.scale = state["mean"].to(device), state["scale"]
        if state["bandwidth"] is not None:
            self.sae.config.bandwidth = state["bandwidth"]
        self.sparsity, self.updates = torch.tensor(state["sparsity"], device=device), state["updates"]
        self._skipped = state["skipped"].to(device)
        self.dead = None if state["dead"] is None else state["dead"].to(device)
        if self.base is not None:
            self.base.raw = state["base"]
