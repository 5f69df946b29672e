"""Which pairs can win, told by bf16 products with a certain bound: the selection of float32 at bf16's price.

The encoder's matmul only has to say which (token, latent) pairs can win. Let x^ and w^ be a token and a latent
rounded to bf16. Then, by the Cauchy-Schwarz inequality,

    |w.x - w^.x^| = |(w - w^).x + w^.(x - x^)| <= ||w - w^|| ||x|| + ||w^|| ||x - x^||

and all four lengths are known for every row. What float32 itself rounds is bounded in the same way: a sum of n
products is wrong by at most n 2^-23 ||w|| ||x||, in whatever order it is taken (Higham 2002, section 3.1; twice the
constant, to spare). So the error of a pair is at most

    E = r X + l T + d,   r = ||w - w^||,  X = ||x||,  l = ||w||,  T = ||x - x^|| (1 + 2^-7) + n 2^-23 (...),

a sum of three products, which rides along as three more columns of the matmul, each rounded up to bf16: the matmul
gives U = w^.x^ + b + E, an upper bound of the pre-activation, and U - 2E is a lower one. (Three columns hold the bias,
as a sum of bf16 numbers that is exact to 2^-24. Hidden states are centred first, which makes X and T small; what that
takes away is a constant of each latent and joins its bias.)

A pair whose upper bound misses the cut cannot win. The others, about 1.1 to 1.3 for each winner, are scored again in
float32, one dot product each, and the exact cut is made among those. So the selection is that of float32 dot products
taken one by one; it depends on neither the size of the blocks nor the batch.

Upper bounds of pairs in question are positive, and positive bf16 numbers are ordered as their bits are: groups and
entries are compared as 16-bit integers.

Shapes: N tokens, D `d_in`, F latents, B latents in a block, G groups of a block.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from .encoder_blocks import EncoderBlocks, keep_buffer, take_buffer, whole_groups


_GROUP = 64
_COLUMNS = 6  # hi, mid and low part of the bias; r X; l T; d
_UP = 1 + 2**-7  # a number times this, rounded to bf16, is not below the number
_OUT = 2**-8  # twice what rounding U to bf16 may change, as a share of it
_LEAST = 1e-17  # below this float32 squares vanish, and with them the lengths of rows
_SAMPLED, _FAR = 64, 0.1  # tokens looked at, and the share of their squared length that makes a mean worth taking off
_PIECE = {"cpu": 2**17}  # entries of the encoder that are rounded at once
_SMALLEST = 2**22  # entries N F below which nothing is gained
_MANY = 2**20  # tokens
_state = threading.local()
logger = logging.get_logger(__name__)


@dataclass
class ScreeningCounts:
    """What screening has done in this process: tokens that were screened, and those for which bf16 could not tell.

    Args:
        tokens (`int`): Tokens times selections.
        fallbacks (`int`): Of these, how many were selected from float32 products after all.
        pairs (`int`), candidates (`int`): Pairs that won, and those that were scored again in float32.
    """

    tokens: int = 0
    fallbacks: int = 0
    pairs: int = 0
    candidates: int = 0


counts = ScreeningCounts()


def count_fallback(tokens: int) -> None:
    """Count tokens of which bf16 could not tell; say so once, where it happens to most of many."""
    counts.fallbacks += tokens
    if counts.fallbacks > max(_MANY, counts.tokens // 2):
        logger.warning_once(
            "For most tokens bf16 products cannot tell which latents win (outlier dimensions, large biases, or many "
            "latents that fire): float32 products decide, as without screening. `screening: false` in the SAE's "
            "config saves the attempt."
        )


@contextmanager
def screening(enabled: bool | None) -> Iterator[None]:
    """Turns screening with bf16 products on or off in this thread, whatever the hardware and the config say.

    Args:
        enabled (`bool` or `None`): `None` leaves the choice to the hardware.
    """
    before, _state.forced = getattr(_state, "forced", None), enabled
    try:
        yield
    finally:
        _state.forced = before


def bf16_is_fast(device: torch.device) -> bool:
    """Whether bf16 products are several times as fast as float32's: on a GPU, and where a CPU has instructions."""
    if device.type == "cpu":
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # torch has no public ones
        return any(getattr(torch.cpu, name, bool)() for name in names)
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def screens(blocks: EncoderBlocks) -> bool:
    """Whether a selection is made by way of bf16 products."""
    if blocks.dtype != torch.float32 or blocks.W_enc.dtype != torch.float32 or not blocks.num_rows:
        return False
    forced = getattr(_state, "forced", None)
    if forced is not None:
        return forced
    enough = blocks.num_rows * blocks.num_latents >= _SMALLEST
    return blocks.screening and enough and bf16_is_fast(blocks.device)


@dataclass
class ScreenedBlock:
    """Upper bounds of a block of pre-activations, and what they exceed the lower bounds by.

    Args:
        start (`int`): The first latent.
        stop (`int`): The one after the last.
        upper (`Tensor` of shape `(N, B)`): bf16, padded to whole groups with -inf.
        of_tokens (`Tensor` of shape `(N, 3)`), of_latents (`Tensor` of shape `(3, B)`): Their product is E.
    """

    start: int
    stop: int
    upper: Tensor
    of_tokens: Tensor
    of_latents: Tensor

    def group_maxima(self) -> Tensor:
        """The largest upper bound of each group as bits, `(N, G)`; where none is positive, some negative one."""
        return self.upper.view(torch.int16).view(len(self.upper), -1, _GROUP).amax(-1)

    def lower(self, maxima: Tensor | None) -> Tensor:
        """Numbers that the largest entries of groups reach, `(N, G)`; without `maxima` those of entries, `(N, B)`."""
        if maxima is None:
            return _below(self.upper.float()) - 2 * self.of_tokens @ self.of_latents
        of_groups = self.of_latents.view(3, -1, _GROUP).amax(-1)
        return _below(maxima.view(torch.bfloat16).float()) - 2 * self.of_tokens @ of_groups

    def reaching(self, maxima: Tensor, floor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens and latents of the pairs whose upper bound reaches a floor, sorted by token, then by latent.

        Args:
            maxima (`Tensor` of shape `(N, G)`): As [`group_maxima`] gives them.
            floor (`Tensor` of shape `(N, 1)` or `(1, 1)`, *optional*): Positive numbers; by default 0.
        """
        per_row = maxima.shape[1]
        bits = maxima.new_zeros(1, 1) if floor is None else _bits_below(floor)
        groups = (maxima >= bits).flatten().nonzero().squeeze(1)
        members = self.upper.view(torch.int16).view(-1, _GROUP).index_select(0, groups)
        hits = _positions(members >= (bits[groups // per_row] if len(bits) > 1 else bits))
        group = groups[hits // _GROUP]
        return group // per_row, self.start + group % per_row * _GROUP + hits % _GROUP

    def share_reaching(self) -> float:
        """About what share of the entries has an upper bound above 0."""
        return (self.upper[::64].view(torch.int16) >= 0).float().mean().item()


def _positions(mask: Tensor) -> Tensor:
    """Return the flat positions of the few true entries of `(M, 64)`, ascending, in half the time of `nonzero`."""
    words = mask.view(torch.int64).flatten().nonzero().squeeze(1)  # eight entries each, of which most hold none
    word, place = mask.view(-1, 8).index_select(0, words).nonzero(as_tuple=True)
    return words[word] * 8 + place


def _below(upper: Tensor) -> Tensor:
    """What rounding to bf16 may have raised is taken off."""
    return upper - upper.abs() * _OUT


def above(upper: Tensor) -> Tensor:
    """What rounding to bf16 may have lowered is put back."""
    return upper + upper.abs() * _OUT


def _bits_below(floor: Tensor) -> Tensor:
    """The bits of bf16 numbers a little below positive float32 ones."""
    return ((floor * (1 - _OUT)).view(torch.int32) >> 16).to(torch.int16)


def _up(values: Tensor) -> Tensor:
    """Not negative numbers, as bf16 ones that are not smaller."""
    return (values * _UP).bfloat16()


def _lengths(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1) + _LEAST


def screened(blocks: EncoderBlocks, limit: Tensor | float | None = None) -> Iterator[ScreenedBlock]:
    """Upper bounds of the pre-activations, less a limit of each latent, a block at a time; the next overwrites it.

    Args:
        blocks ([`EncoderBlocks`]): Float32 pre-activations.
        limit (`Tensor` of shape `(F,)` or `float`, *optional*): Taken off.
    """
    x, depth = blocks.x, blocks.x.shape[1]
    inner = whole_groups(depth + _COLUMNS, 32)
    kappa = inner * 2.0**-23
    centre = _centre(x)
    centred = x if centre is None else x - centre
    left = torch.zeros(len(x), inner, dtype=torch.bfloat16, device=x.device)
    rounded = left[:, :depth].copy_(centred)
    length = _lengths(centred)
    lengths = length if centre is None else length + _lengths(x) + _lengths(centre[None])
    noise = _lengths(centred - rounded) * _UP + kappa * (length + lengths)
    left[:, depth : depth + _COLUMNS] = 1
    left[:, depth + 3], left[:, depth + 4] = _up(length), _up(noise)
    of_tokens = left[:, depth + 3 : depth + _COLUMNS].float()
    buffer = take_buffer(blocks.num_rows * whole_groups(blocks.block_latents, _GROUP), torch.bfloat16, x.device)
    for start, stop in blocks.ranges():
        right, of_latents = _latents(blocks, start, stop, limit, centre, inner)
        width = whole_groups(stop - start, _GROUP)
        upper = buffer[: len(x) * width].view(len(x), width)
        torch.mm(left, right.T, out=upper[:, : stop - start])
        upper[:, stop - start :] = -torch.inf
        yield ScreenedBlock(start, stop, upper, of_tokens, F.pad(of_latents, (0, width - stop + start)))
    keep_buffer(buffer)


def _centre(x: Tensor) -> Tensor | None:
    """Return the mean hidden state `(D,)`, or `None` where taking it off would hardly shorten any."""
    sample = x[:: max(1, len(x) // _SAMPLED)]
    mean = sample.mean(0)
    if x.device.type == "cpu" and mean.square().sum() < _FAR * sample.square().sum(1).mean():
        return None
    return x.mean(0).nan_to_num(0.0, 0.0, 0.0)  # a token that is not finite spoils none but itself


def _latents(
    blocks: EncoderBlocks, start: int, stop: int, limit: Tensor | float | None, centre: Tensor | None, inner: int
) -> tuple[Tensor, Tensor]:
    """The latents of a block as bf16 rows with columns of the bound, `(B, inner)`; and those columns, `(3, B)`."""
    W_enc, bias = blocks.W_enc[start:stop].detach(), blocks.b_enc[start:stop].detach().float()
    scale = None if blocks.scale is None else blocks.scale[start:stop]
    depth = W_enc.shape[1]
    right = W_enc.new_empty(len(W_enc), inner, dtype=torch.bfloat16)
    constant, residue, length = W_enc.new_zeros(3, len(W_enc)).unbind()
    size = max(1, _PIECE.get(W_enc.device.type, 2**26) // depth)
    for first in range(0, len(W_enc), size):  # in pieces that stay in a CPU's cache
        piece = slice(first, first + size)
        rows = W_enc[piece] if scale is None else W_enc[piece] * scale[piece, None]
        rounded = right[piece, :depth].copy_(rows)
        length[piece], residue[piece] = _lengths(rows), _lengths(rows - rounded)
        if centre is not None:
            constant[piece] = rows @ centre
    if scale is not None:
        bias = bias * scale
    size_of_sum = bias.abs() + constant.abs()
    if limit is not None:
        of_block = limit[start:stop].detach() if isinstance(limit, Tensor) else bias.new_full((), limit)
        size_of_sum, bias = size_of_sum + of_block.abs(), bias - of_block
    # Of what takes each other away float32 has rounded both: the bound knows their sizes, not that of the difference.
    d = size_of_sum * (inner * 2.0**-23) + _LEAST**2
    bias = bias + constant
    for column in range(depth, depth + 3):  # the sum of three bf16 numbers is the bias to 24 bits
        right[:, column] = bias
        bias = bias - right[:, column]
    right[:, depth + 3 : depth + _COLUMNS] = torch.stack([_up(residue), _up(length), _up(d)], 1)
    right[:, depth + _COLUMNS :] = 0
    return right, right[:, depth + 3 : depth + _COLUMNS].float().T.contiguous()
