"""Packets of the progressive code: which latents fire on which tokens, then the bins of their values.

All of it is yes-or-no questions to an arithmetic coder (constriction), with the probabilities of `rate.CodeModel`:

- Firing is a tree over tokens for each latent: does it fire at all on these 2^n tokens? If so, in the first half? In
  the second? One question settles many silent tokens, and the bits are those of one question for each token.
- A bin's number is found by halving: is it in the upper half of what is left?

Writer and reader run the same code; only the writer knows the answers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from ..rate import RAREST, CodeModel


_GRID = (
    2**12
)  # probabilities are rounded to multiples of 1 / _GRID: other machines' logarithms differ in the last digit


@dataclass
class Packet:
    """The tokens and latents of a packet, and how its bins are coded.

    Args:
        tokens (`tuple[int, int]`): First token, and one past the last.
        latents (`tuple[int, int]`): First latent, and one past the last.
        step (`float`): Width of a bin.
        depth (`int`): Bits of a bin's number.
    """

    tokens: tuple[int, int]
    latents: tuple[int, int]
    step: float
    depth: int


def write_packet(constriction: ModuleType, model: CodeModel, packet: Packet, pairs: np.ndarray) -> bytes:
    """Return the bytes of a packet.

    Args:
        constriction (`ModuleType`): The library `constriction`.
        model ([`CodeModel`]): The probability model, on the CPU.
        packet ([`Packet`]): Tokens and latents of the packet.
        pairs (`np.ndarray` of shape `(3, M)`): Token, latent and bin of each firing latent, by token, then by latent.
    """
    coder = _Writer(constriction)
    _code(coder, model, packet, pairs)
    return coder.to_bytes()


def read_packet(constriction: ModuleType, model: CodeModel, packet: Packet, words: np.ndarray) -> np.ndarray:
    """Return the pairs `(3, M)` in a packet's words, which [`write_packet`] wrote.

    Raises:
        `ValueError`: if no encoder writes such words.
    """
    return _code(_Reader(constriction, words), model, packet)


class WholePackets:
    """Iterates over the words of whole packets; `offset` is the first byte after the last of them."""

    def __init__(self, data: bytes, offset: int) -> None:
        self.data, self.offset = data, offset

    def __iter__(self) -> Iterator[np.ndarray]:
        while (head := _read_varint(self.data, self.offset)) is not None:
            words, begin = head
            if begin + 4 * words > len(self.data):
                return
            self.offset = begin + 4 * words
            yield np.frombuffer(self.data, "<u4", words, begin).astype(np.uint32)


class _Writer:
    """Writes answers into a packet."""

    def __init__(self, constriction: ModuleType) -> None:
        self.bernoulli = constriction.stream.model.Bernoulli(perfect=False)
        self.coder = constriction.stream.queue.RangeEncoder()

    def answers(self, probability: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """Write yes or no for each probability of yes."""
        self.coder.encode(truth.astype(np.int32), self.bernoulli, probability)
        return truth

    def to_bytes(self) -> bytes:
        """Return the number of 32-bit words, then the words."""
        words = self.coder.get_compressed().astype("<u4")
        return _varint(len(words)) + words.tobytes()


class _Reader:
    """Reads answers from a packet's words."""

    def __init__(self, constriction: ModuleType, words: np.ndarray) -> None:
        self.bernoulli = constriction.stream.model.Bernoulli(perfect=False)
        self.coder = constriction.stream.queue.RangeDecoder(words)

    def answers(self, probability: np.ndarray, truth: None) -> np.ndarray:  # noqa: ARG002  (only a writer knows it)
        """Read yes or no for each probability of yes."""
        try:
            return self.coder.decode(self.bernoulli, probability).astype(bool)
        except AssertionError as error:  # constriction's error for words that no encoder writes
            raise ValueError("A packet of this code is damaged. Read or send it again.") from error


def _code(coder: _Writer | _Reader, model: CodeModel, packet: Packet, pairs: np.ndarray | None = None) -> np.ndarray:
    """Write the pairs, or read them where they are `None`; return them."""
    (begin, end), (first, last) = packet.tokens, packet.latents
    firing, bins = None, None
    if pairs is not None:
        bins = pairs[2]
        firing = np.zeros((end - begin, last - first), bool)
        firing[pairs[0] - begin, pairs[1] - first] = True
    fires = model.fires[first:last].numpy()
    trees = [
        _code_firing(coder, fires, None if firing is None else firing[a:b], b - a) for a, b in _trees(end - begin)
    ]
    tokens, latents = np.concatenate(trees).nonzero()
    latents += first
    return np.stack([tokens + begin, latents, _code_bins(coder, model, packet, latents, bins)])


def _trees(tokens: int) -> Iterator[tuple[int, int]]:
    """Yield runs of 2^n tokens that make up a block, longest first, so that no tree has an empty place."""
    begin = 0
    for power in reversed(range(tokens.bit_length())):
        if tokens >> power & 1:
            yield begin, begin + 2**power
            begin += 2**power


def _code_firing(coder: _Writer | _Reader, fires: np.ndarray, firing: np.ndarray | None, tokens: int) -> np.ndarray:
    """Return whether each latent fires on each of 2^n tokens, `(tokens, latents)`.

    Where a latent fires within a run of tokens with probability f, it does within two such runs with f (2 - f). If it
    does within the two, then within the first with 1 / (2 - f); if not there, then surely within the second. (Products
    and quotients only: every machine rounds these alike.)
    """
    runs, truth = [fires], [firing]
    for _ in range(tokens.bit_length() - 1):
        runs.append(runs[-1] * (2 - runs[-1]))
        truth.append(None if firing is None else truth[-1][0::2] | truth[-1][1::2])

    def ask(level: int, probability: np.ndarray, places: np.ndarray, latents: np.ndarray) -> np.ndarray:
        return coder.answers(probability, None if firing is None else truth[level][places, latents])

    latents = np.arange(len(fires))
    places = np.zeros_like(latents)
    anywhere = ask(-1, runs[-1], places, latents)
    places, latents = places[anywhere], latents[anywhere]
    for level in reversed(range(len(runs) - 1)):
        run = runs[level][latents]
        first = ask(level, 1 / (2 - run), 2 * places, latents)
        second = np.ones_like(first)
        second[first] = ask(level, run[first], 2 * places[first] + 1, latents[first])
        places = np.concatenate([2 * places[first], 2 * places[second] + 1])
        latents = np.concatenate([latents[first], latents[second]])
    answers = np.zeros((tokens, len(fires)), bool)
    answers[places, latents] = True
    return answers


def _code_bins(
    coder: _Writer | _Reader, model: CodeModel, packet: Packet, latents: np.ndarray, bins: np.ndarray | None
) -> np.ndarray:
    """Return the bin of each firing latent's value, `(M,)`."""
    columns = torch.from_numpy(latents)
    low = np.zeros(len(latents), np.int64)
    for level in reversed(range(packet.depth)):
        half = 2**level
        probability = _upper_half(model, packet, columns, torch.from_numpy(low), half)
        low = low + half * coder.answers(probability.numpy(), None if bins is None else (bins & half) > 0)
    return low


def _upper_half(model: CodeModel, packet: Packet, latents: Tensor, low: Tensor, half: int) -> Tensor:
    """Return the probability that a bin from `low` to `low + 2 half` lies in the upper half, `(M,)`."""

    def above(bins: Tensor) -> Tensor:
        return model.above(latents, bins.double() * packet.step)

    below, middle, end = above(low), above(low + half), above(low + 2 * half)
    # Where the model has next to no mass, both halves are equally likely.
    probability = (middle - end + RAREST) / (below - end + 2 * RAREST)
    return (probability * _GRID).round().clamp(1, _GRID - 1) / _GRID


def _varint(number: int) -> bytes:
    """Return a number in groups of 7 bits, lowest first; all bytes but the last have their highest bit set."""
    out = bytearray()
    while number >= 128:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _read_varint(data: bytes, offset: int) -> tuple[int, int] | None:
    """Return the number at `offset` and where it ends; `None` where the data ends first."""
    number = 0
    for place in range(offset, len(data)):
        number |= (data[place] & 127) << 7 * (place - offset)
        if data[place] < 128:
            return number, place + 1
    return None
