"""Adam with moments, and weights, of fewer bytes: 16 or 8 bits in place of 32.

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2,   w = w - lr m^ / (sqrt(v^) + eps)      (Kingma & Ba 2015)

is computed in float32, some rows at a time; only what is kept between steps is rounded. It is rounded up or down at
random, with the odds that make the mean exact: to the nearest, a second moment that changes by a thousandth a step
never changes at all, nor does a weight whose step is below half of its last bit.

    bfloat16   8 exponent bits, 7 of the fraction
    int8       m: a sign, 4 exponent bits, 3 of the fraction; v: 5 exponent bits, 3 of the fraction; both relative to
               the largest of the row (one float32 a row), which so decays exactly where a row gets no gradient

Rows know nothing of each other, and the dice are a function of (seed, step, row, column): a learner that holds a range
of rows gives these the same values, and so does a resumed one.

Shapes: F rows (latents), D columns; one-dimensional parameters stay float32.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...models import SAEModel
from ..config.spec import SAESpec
from .schedules import adam_betas


# Entries updated at once: what fits a CPU's cache; few launches on a GPU.
_PIECE = {"cpu": 2**17, "cuda": 2**24}
_E4M3 = torch.float8_e4m3fn
_E4M3_MAX = torch.finfo(_E4M3).max
# The first moment, the second moment and the weight roll dice of their own.
_M, _V, _W = range(3)


def build_optimizer(groups: list[dict[str, Any]], spec: SAESpec, steps: int, seed: int = 0) -> torch.optim.Optimizer:
    """The optimizer of a dictionary: PyTorch's fused Adam, or [`LowPrecisionAdam`] where the spec wants less memory.

    Args:
        groups (`list[dict]`): Parameter groups. [`LowPrecisionAdam`] reads `unit_rows` and `first_row` of them.
        spec ([`SAESpec`]): Its `betas`, `betas_steps`, `adam_eps`, `optimizer_dtype` and `weights_dtype` are read.
        steps (`int`): Of the run.
        seed (`int`, *optional*, defaults to 0): Of the dice.
    """
    betas = adam_betas(spec, steps)
    if spec.optimizer_dtype == spec.weights_dtype == "float32":
        return torch.optim.Adam(groups, lr=1.0, betas=betas, eps=spec.adam_eps, fused=True)
    return LowPrecisionAdam(groups, 1.0, betas, spec.adam_eps, spec.optimizer_dtype, seed)


@torch.no_grad()
def store_weights(sae: SAEModel, spec: SAESpec) -> None:
    """Store `W_enc` and `W_dec` as `weights_dtype` says; biases and thresholds stay float32."""
    if spec.weights_dtype != "float32":
        for weight in (sae.W_enc, sae.W_dec):
            weight.data = weight.data.to(getattr(torch, spec.weights_dtype))


class LowPrecisionAdam(torch.optim.Optimizer):
    """Adam that keeps its moments, and weights that are bfloat16, in fewer bits.

    Like the fused Adam it reads two attributes on the device, if they are set, and never makes the host wait:
    `found_inf` (not 0: change nothing) and `grad_scale` (divides gradients). All tensors of a parameter's state but
    `step` have its rows first.

    Args:
        groups (`Iterable`): Parameters or groups. Groups may have `unit_rows` (`bool`): bfloat16 rows are brought to
            length 1 before they are rounded; and `first_row` (`int`): the number of a parameter's first row, where it
            holds only a range of rows.
        lr (`float`), betas (`tuple[float, float]`), eps (`float`): As in Adam.
        moments (`str`): `float32`, `bfloat16` or `int8`.
        seed (`int`, *optional*, defaults to 0): Of the dice.
    """

    def __init__(
        self,
        groups: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        moments: str,
        seed: int = 0,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "unit_rows": False, "first_row": 0})
        self.moments, self.seed = moments, seed
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of all parameters that have gradients."""
        assert closure is None, "gradients are there already"
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is not None:
                    self._step(parameter, group, number)

    def _step(self, parameter: Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[parameter]
        if not state:
            state.update(self._zeros(parameter))
        kept = parameter.new_zeros((), dtype=torch.bool) if self.found_inf is None else self.found_inf != 0
        kept = kept.to(parameter.device)
        state["step"] += (~kept).float()
        dice = _Dice(self.seed, number, state["step"], parameter)
        columns = parameter[0].numel()
        size = max(1, _PIECE.get(parameter.device.type, 2**24) // columns)
        for start in range(0, len(parameter), size):
            rows = slice(start, start + size)
            dice.roll(group["first_row"] + start, min(size, len(parameter) - start))
            self._step_rows(parameter, rows, state, group, kept, dice)

    def _zeros(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state before the first step."""
        device, shape = parameter.device, parameter.shape
        state = {"step": torch.zeros((), device=device)}
        if self.moments == "int8" and parameter.ndim > 1:
            for name, dtype in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
                state[name] = torch.zeros(shape, dtype=dtype, device=device)
                state[f"{name}_scale"] = torch.zeros(shape[0], device=device)
            return state
        dtype = torch.bfloat16 if self.moments == "bfloat16" and parameter.ndim > 1 else torch.float32
        return state | {name: torch.zeros(shape, dtype=dtype, device=device) for name in ("exp_avg", "exp_avg_sq")}

    def _step_rows(
        self,
        parameter: Tensor,
        rows: slice,
        state: dict[str, Tensor],
        group: dict[str, Any],
        kept: Tensor,
        dice: "_Dice",
    ) -> None:
        (beta1, beta2), part = group["betas"], parameter[rows]
        gradient = parameter.grad[rows].float()
        if self.grad_scale is not None:
            gradient = gradient / self.grad_scale.to(gradient.device)
        m, v = _read(state, "exp_avg", rows), _read(state, "exp_avg_sq", rows)
        m = m.lerp_(gradient, 1 - beta1)
        v = v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        # 1 - beta^t, with no loss of digits in the first steps of a beta near 1
        first, second = (-torch.expm1(state["step"] * math.log(beta)) for beta in (beta1, beta2))
        update = v.sqrt().div_(second.sqrt()).add_(group["eps"]).reciprocal_().mul_(m).mul_(group["lr"] / first)
        weight = part.float() - update
        if part.dtype == torch.bfloat16:
            if group["unit_rows"]:
                weight /= weight.norm(dim=1, keepdim=True).clamp_(min=1e-12)
            weight = _to_bfloat16(weight, dice(_W))
        _replace(part, weight, kept)
        for name, moment, kind in (("exp_avg", m, _M), ("exp_avg_sq", v, _V)):
            for key, value in _written(state, name, moment, dice, kind).items():
                _replace(state[key][rows], value, kept)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        # PyTorch would turn every tensor into the parameter's type.
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, entry in state_dict["state"].items():
            device = parameters[index].device
            self.state[parameters[index]] = {key: value.to(device, copy=True) for key, value in entry.items()}


# Formats


def _read(state: dict[str, Tensor], name: str, rows: slice) -> Tensor:
    """Some rows of a moment as float32, never the stored memory itself."""
    codes = state[name][rows]
    if codes.dtype == torch.int8:
        # Sign, exponent and fraction take their places in a float32, whose exponent counts from 120 lower. (PyTorch's
        # own conversion is many times slower on a CPU.)
        bits = codes.int().bitwise_left_shift_(20).bitwise_and_(-0x78100000)
        return bits.view(torch.float32).mul_(2.0**120).mul_(state["exp_avg_scale"][rows, None])
    if codes.dtype == torch.uint8:
        bits = (codes.int() + _LOWEST).bitwise_left_shift_(20)
        return bits.view(torch.float32).mul_(state["exp_avg_sq_scale"][rows, None])
    return codes.to(torch.float32, copy=True)


def _written(state: dict[str, Tensor], name: str, moment: Tensor, dice: "_Dice", kind: int) -> dict[str, Tensor]:
    """What is stored of a moment."""
    dtype = state[name].dtype
    if dtype == torch.float32:
        return {name: moment}
    if dtype == torch.bfloat16:
        return {name: _to_bfloat16(moment, dice(kind))}
    # A row of zeros has scale 0, with which any code gives zeros.
    largest = moment.abs().amax(1)
    scaled = moment / largest.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    if dtype == torch.int8:
        scaled = _rounded(scaled.mul_(_E4M3_MAX), dice(kind), 20).to(_E4M3).view(torch.int8)
        return {name: scaled, f"{name}_scale": largest / _E4M3_MAX}
    codes = (_bits(scaled, dice(kind), 20) >> 20) - _LOWEST
    return {name: codes.clamp_(min=0).to(torch.uint8), f"{name}_scale": largest}


# A float32 without its last 20 bits: exponent and 3 bits of the fraction. 1.0, the largest of a row, is code 255; code
# 0 is 1.125 * 2^-32, never zero: it stands below a fraction line.
_LOWEST = (0x3F800000 >> 20) - 255


def _bits(values: Tensor, noise: Tensor, drop: int) -> Tensor:
    """Return the bits of float32 numbers plus noise below bit `drop`.

    Cut there, they are rounded at random, in the mean exactly: the numbers between two cuts are evenly spaced.
    """
    return (noise & (2**drop - 1)).add_(values.view(torch.int32))


def _replace(old: Tensor, new: Tensor, kept: Tensor) -> None:
    """Overwrite `old` with `new`, which is lost, unless the flag is set; what a NaN is does not matter.

    (torch.where with one flag for all entries is several times slower on a CPU.)
    """
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32}[old.element_size()]
    old, new = old.view(integer), new.view(integer)
    old.bitwise_xor_(new.bitwise_xor_(old).bitwise_and_(kept.to(integer) - 1))


def _rounded(values: Tensor, noise: Tensor, drop: int) -> Tensor:
    return _bits(values, noise, drop).bitwise_and_(-(2**drop)).view(torch.float32)


def _to_bfloat16(values: Tensor, noise: Tensor) -> Tensor:
    return _rounded(values, noise, 16).to(torch.bfloat16)


# Dice


class _Dice:
    """Random numbers of 20 bits that are a function of seed, parameter, step, row and column.

    That of row i and column j is the upper part of a_i b_j modulo 2^32, with a (odd) and b random (multiplicative
    hashing): a hash of rows and of columns, and for each entry one product.

    Args:
        seed (`int`), number (`int`): Of the run; of the parameter.
        step (`Tensor` of shape `()`): On the device; the host does not see it.
        parameter (`Tensor`): Its shape and device are read.
    """

    def __init__(self, seed: int, number: int, step: Tensor, parameter: Tensor) -> None:
        start = (seed * 1_000_003 + number) % 2**31
        self.key = _mixed(step.long() + (start << 31))
        self.shape, self.device = parameter.shape[1:], parameter.device
        self.rows = self.key

    def roll(self, first: int, count: int) -> None:
        """Go to `count` rows from number `first` on."""
        numbers = torch.arange(first, first + count, device=self.device)
        self.rows = (_short(_mixed(self.key ^ numbers)) | 1).view(-1, *(1 for _ in self.shape))

    def __call__(self, kind: int) -> Tensor:
        """Numbers `(count, D)` of one kind for these rows, int32, of which the last 20 bits count."""
        size = self.shape.numel()
        columns = torch.arange(size, device=self.device) + (kind + 1) * 2**40
        return (self.rows * _short(_mixed(self.key ^ columns)).view(self.shape)).bitwise_right_shift_(12)


def _mixed(numbers: Tensor) -> Tensor:
    """A hash of int64 numbers: the finaliser of SplitMix64 (Steele, Lea & Flood 2014); products wrap around."""
    numbers = numbers * -0x61C8864680B583EB
    numbers = (numbers ^ (numbers >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    numbers = (numbers ^ (numbers >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return numbers ^ (numbers >> 31 & 0x1FFFFFFFF)


def _short(numbers: Tensor) -> Tensor:
    """The upper half of int64 numbers."""
    return (numbers >> 32).int()
