"""A progressive code of hidden states: any first bytes of it are a code of fewer latents.

A code is a header and then packets, one per group of latents and block of tokens: first all tokens' base latents, then
the next group's. Bytes cut off anywhere cost the packets that are no longer whole, and nothing else. The statistics of
the latents are not part of a code: encoder and decoder both have them, beside the SAE.
"""

import hashlib
import logging
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..common.distributed import processes
from ..models import SAEModel, SparseLatents
from ..models.sparse_ops import LatentPairs, PairIndex
from .coding.packets import Packet, WholePackets, read_packet, write_packet
from .coding.steps import choose_step, step_cost
from .rate import CodeModel, Moments, bins, checked_step, checked_widths


logger = logging.getLogger(__name__)

_MAGIC = b"HMSP"
_VERSION = 1
_FIXED = struct.Struct("<4sBBBHIId8s")  # magic, version, depth, dimensions, groups, F, block, step, fingerprint
_CHECKSUM = struct.Struct("<I")
_DEEPEST = 24  # bits of a bin's number
_TOKENS_AT_ONCE = 8192  # encoded together by the SAE
_SMALLEST_GROUP = 16  # of the default groups of an SAE with one width


@torch.no_grad()
def encode_progressive(
    sae: SAEModel,
    x: Tensor,
    statistics: Moments,
    step: float | None = None,
    groups: Sequence[int] | None = None,
    block: int = 256,
) -> bytes:
    """Code hidden states so that every prefix of the bytes is a code; return the bytes.

    Args:
        sae ([`SAEModel`]): The encoder; all latents compete, as at inference (`selection="mask"`).
        x (`Tensor` of shape `(..., D)`): Hidden states.
        statistics (any object with `tokens`, `frequency`, `mean`, `mean_square`): Statistics of this SAE's latents on
            other data; the decoder needs the same.
        step (`float`, *optional*): Width of a bin, in the units of the latents' values. A value is off by less than
            this, and adds about `step^2 / 12` to the squared error, less for large steps. By default the largest step
            by which the squared error grows by at most 2% ([`choose_step`]). What the step costs is logged;
            [`step_cost`] measures it at every width.
        groups (`Sequence[int]`, *optional*): Widths at which a group ends, increasing to F. Default: the SAE's prefix
            widths, or powers of two.
        block (`int`, *optional*, defaults to 256): Tokens per packet. Longer blocks have less overhead (about 4 bytes
            a packet), shorter ones lose less where a code is cut.

    Returns:
        `bytes`: A code for [`decode_progressive`].

    Raises:
        `ValueError`: if hidden states, statistics, step, groups or block do not fit, or there are no hidden states, or
            some are not finite.
        `ImportError`: if constriction is not installed.
    """
    constriction = _constriction()
    model = _model(sae, statistics)
    flat = x.reshape(-1, x.shape[-1])
    pairs = _firing(sae, x)
    step = choose_step(sae, flat, statistics) if step is None else checked_step(step)
    widths = tuple(_default_groups(sae) if groups is None else _checked_groups(groups, len(model)))
    logger.info("%s", step_cost(sae, flat[:_TOKENS_AT_ONCE], statistics, step, widths))
    numbers = bins(pairs.values, step)
    header = _Header(
        shape=tuple(x.shape[:-1]),
        num_latents=len(model),
        step=step,
        block=_checked_block(block),
        depth=_depth(numbers, step),
        groups=widths,
        fingerprint=_fingerprint(sae, statistics),
    )
    of_packets = _by_packet(header, pairs.rows.numpy(), pairs.cols.numpy(), numbers.long().numpy())
    work = _with_bar(zip(header.packets(), of_packets, strict=True), header)
    packets = [write_packet(constriction, model, packet, inside) for packet, inside in work]
    return header.to_bytes() + b"".join(packets)


@torch.no_grad()
def decode_progressive(sae: SAEModel, data: bytes, statistics: Moments) -> Tensor:
    """Return the reconstruction of hidden states from a code, or from its first bytes.

    Args:
        sae ([`SAEModel`]): The SAE with which the hidden states were coded.
        data (`bytes`): A code, cut off anywhere after its header. Latents of packets cut off count as silent.
        statistics (any object with `tokens`, `frequency`, `mean`, `mean_square`): The statistics of the encoder.

    Returns:
        `Tensor` of shape `(..., D)`.

    Raises:
        `ValueError`: if there is no whole header, or one that is damaged, of another kind, or of another dictionary.
        `ImportError`: if constriction is not installed.
    """
    return sae.decode(decode_latents(sae, data, statistics))


def decode_latents(sae: SAEModel, data: bytes, statistics: Moments) -> SparseLatents:
    """Return the latents in a code or its first bytes, of shape `(..., K)`; see [`decode_progressive`]."""
    constriction = _constriction()
    model = _model(sae, statistics)
    header, offset = _Header.read(data)
    if header.fingerprint != _fingerprint(sae, statistics):
        raise ValueError(
            f"This code is of another dictionary (it has {header.num_latents} latents, this one {len(model)}), of one "
            "with its latents in another order, or was made with other statistics. Decode it with its own."
        )
    whole = WholePackets(data, offset)
    work = _with_bar(zip(header.packets(), whole, strict=False), header)
    parts = [read_packet(constriction, model, packet, words) for packet, words in work]
    if len(parts) == header.num_packets and whole.offset < len(data):
        raise ValueError("There are bytes after the last packet: this is more than one code, or a damaged one.")
    rows, latents, numbers = torch.from_numpy(np.concatenate([np.empty((3, 0), np.int64), *parts], axis=1))
    order = (rows * len(model) + latents).argsort()
    values = model.read(latents[order], numbers[order], header.step).to(sae.W_dec.dtype)
    slots = LatentPairs(PairIndex(rows[order], latents[order], header.num_tokens, len(model)), values).to_slots()
    shape, device = (*header.shape, slots.values.shape[-1]), sae.W_dec.device
    return SparseLatents(slots.values.view(shape).to(device), slots.indices.view(shape).to(device), len(model))


# Header


@dataclass
class _Header:
    """The header of a code: sizes, step and groups, and a fingerprint of the dictionary."""

    shape: tuple[int, ...]
    num_latents: int
    step: float
    block: int
    depth: int
    groups: tuple[int, ...]
    fingerprint: bytes

    @property
    def num_tokens(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def num_blocks(self) -> int:
        return -(-self.num_tokens // self.block)

    @property
    def num_packets(self) -> int:
        return len(self.groups) * self.num_blocks

    def packets(self) -> Iterator[Packet]:
        """Yield the packets in the order of the code."""
        for latents in zip((0, *self.groups), self.groups, strict=False):
            for begin in range(0, self.num_tokens, self.block):
                yield Packet((begin, min(begin + self.block, self.num_tokens)), latents, self.step, self.depth)

    def to_bytes(self) -> bytes:
        fields = (self.depth, len(self.shape), len(self.groups), self.num_latents, self.block, self.step)
        fixed = _FIXED.pack(_MAGIC, _VERSION, *fields, self.fingerprint)
        body = fixed + struct.pack(f"<{len(self.shape)}Q{len(self.groups)}I", *self.shape, *self.groups)
        return body + _CHECKSUM.pack(zlib.crc32(body))

    @classmethod
    def read(cls, data: bytes) -> tuple["_Header", int]:
        """Return the header of a code, and where its packets begin."""
        if data[: len(_MAGIC)] != _MAGIC[: len(data)]:
            raise ValueError(f"This is no progressive code: it begins with {data[:4]!r}, not with {_MAGIC!r}.")
        if len(data) < _FIXED.size:
            raise ValueError(f"{len(data)} bytes are too few for the header of a code. Read more of it.")
        _, version, depth, dimensions, num_groups, num_latents, block, step, fingerprint = _FIXED.unpack_from(data)
        if version != _VERSION:
            raise ValueError(f"This code is of version {version}; this package reads version {_VERSION}. Update it.")
        sizes = struct.Struct(f"<{dimensions}Q{num_groups}I")
        end = _FIXED.size + sizes.size
        if len(data) < end + _CHECKSUM.size:
            raise ValueError(f"{len(data)} bytes are too few: the header of this code takes {end + _CHECKSUM.size}.")
        if _CHECKSUM.unpack_from(data, end)[0] != zlib.crc32(data[:end]):
            raise ValueError("The header of this code is damaged. Read or send it again.")
        numbers = sizes.unpack_from(data, _FIXED.size)
        header = cls(numbers[:dimensions], num_latents, step, block, depth, numbers[dimensions:], fingerprint)
        return header, end + _CHECKSUM.size


def _fingerprint(sae: SAEModel, statistics: Moments) -> bytes:
    """Return eight bytes of a hash of all that encoder and decoder must share, other than the weights."""
    digest = hashlib.sha256(struct.pack("<QQ", len(statistics.frequency), statistics.tokens))
    for tensor in (sae.latent_ids, statistics.frequency, statistics.mean, statistics.mean_square):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.digest()[:8]


# Input of a code


def _model(sae: SAEModel, statistics: Moments) -> CodeModel:
    if sae.config.input_normalization is not None:
        raise ValueError(
            f"This SAE normalises each hidden state by itself ({sae.config.input_normalization}), and the code holds "
            "latents alone: it could not be decoded."
        )
    model = CodeModel.of(statistics).to("cpu")
    if len(model) != sae.config.num_latents:
        raise ValueError(
            f"The statistics are of {len(model)} latents, the SAE has {sae.config.num_latents}. "
            "Measure them on this SAE."
        )
    return model


def _firing(sae: SAEModel, x: Tensor) -> LatentPairs:
    """Return the pairs with a positive value, at inference, on the CPU."""
    if not x.numel() or not x.isfinite().all():
        raise ValueError(
            f"Hidden states to code must be finite and at least one, got shape {tuple(x.shape)}. "
            "Leave out the tokens that are not finite."
        )
    training = sae.training
    sae.eval()  # BatchTopK in training selects over the batch: a token's latents would depend on the others
    try:
        slots = [sae.encode(rows) for rows in x.reshape(-1, x.shape[-1]).split(_TOKENS_AT_ONCE)]
    finally:
        sae.train(training)
    rows, latents, values = [], [], []
    for part, inside in enumerate(slots):
        row, slot = (inside.values > 0).nonzero(as_tuple=True)
        rows.append(row + part * _TOKENS_AT_ONCE)
        latents.append(inside.indices[row, slot])
        values.append(inside.values[row, slot])
    rows, latents, values = (torch.cat(parts).cpu() for parts in (rows, latents, values))
    return LatentPairs(PairIndex(rows, latents, x.shape[:-1].numel(), sae.config.num_latents), values)


def _by_packet(header: _Header, rows: np.ndarray, latents: np.ndarray, numbers: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the pairs of each packet, `(3, M)`, in the order of the code; pairs come by token, then by latent."""
    group = np.searchsorted(header.groups, latents, side="right")
    packet = group * header.num_blocks + rows // header.block
    order = packet.argsort(kind="stable")
    ends = np.searchsorted(packet[order], np.arange(1, header.num_packets))
    yield from np.split(np.stack([rows, latents, numbers])[:, order], ends, axis=1)


def _depth(numbers: Tensor, step: float) -> int:
    """Return how many bits hold every bin's number."""
    largest = float(numbers.max()) if len(numbers) else 0.0
    if largest >= 2**_DEEPEST:
        raise ValueError(
            f"A step of {step} is too small: the largest value is {largest:.3g} steps, more than 2^{_DEEPEST}. "
            "`default_step(statistics)` is one that fits."
        )
    return int(largest).bit_length()


def _default_groups(sae: SAEModel) -> list[int]:
    num_latents, widths = sae.config.num_latents, sae.prefix_widths
    if len(widths) > 1:
        return widths
    powers = [2**n for n in range(_SMALLEST_GROUP.bit_length() - 1, num_latents.bit_length())]
    return [width for width in powers if width < num_latents] + [num_latents]


def _checked_groups(groups: Sequence[int], num_latents: int) -> list[int]:
    groups = checked_widths(groups, num_latents)
    if groups[-1] != num_latents:
        raise ValueError(f"`groups` must end at num_latents ({num_latents}), got {groups}. Every latent is coded.")
    return groups


def _checked_block(block: int) -> int:
    if not 1 <= block < 2**32:
        raise ValueError(f"`block` must be at least one token, got {block}.")
    return int(block)


def _with_bar(packets: Iterable, header: _Header) -> Iterable:
    """Return the packets, with a bar where they take a while."""
    quiet = processes()[0] != 0
    return tqdm(packets, total=header.num_packets, desc="packets", delay=3, leave=False, disable=quiet)


def _constriction() -> ModuleType:
    try:
        import constriction
    except ImportError as error:
        raise ImportError(
            "A progressive code needs constriction: pip install 'hf_matryoshka_sae[codec]', or constriction itself."
        ) from error
    return constriction
