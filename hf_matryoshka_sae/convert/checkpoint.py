"""A checkpoint of another library: its tensors, its config, and what the user says about it.

Nothing in a file is run: pickles are read with `weights_only=True`, numpy archives without objects. Whatever is
missing, damaged or of another shape is a `ValueError` that says what was expected, what came, and what to do.
"""

import ast
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config_fields import check_fields
from .source import Place
from .tensor_files import read_tensors, split_tensors


_CONFIGS = ("cfg.json", "hyperparams.json", "config.json")

# Below the first and above the second, encoder and decoder cannot have been stored as documented.
_UNRELATED, _TIED = 0.2, 0.6


@dataclass(frozen=True)
class Hints:
    """What a user says about a checkpoint; a field that is `None` is read from the files.

    Args:
        prefix_widths (`Sequence[int]`, *optional*): Widths at which its prefixes were trained to be SAEs.
        k (`int` or `float`, *optional*): Latents per token.
        hookpoint (`str`, *optional*): Place of its hidden states, as a path in transformers.
        base_model (`str`, *optional*): Hub id of the language model.
        width (`int`, *optional*): Number of the first latents to keep.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Type of the loaded SAE.
    """

    prefix_widths: Sequence[int] | None = None
    k: int | float | None = None
    hookpoint: str | None = None
    base_model: str | None = None
    width: int | None = None
    dtype: torch.dtype = torch.float32


@dataclass
class Checkpoint:
    """A checkpoint that is being converted.

    Args:
        place ([`Place`]): Its files.
        hints ([`Hints`], *optional*): What the user says about it.
    """

    place: Place
    hints: Hints = field(default_factory=Hints)

    @property
    def name(self) -> str:
        """Return the path, from which some formats infer what no file says."""
        return self.place.name

    @property
    def file_name(self) -> str:
        """Return the name of the file of weights."""
        return self.place.weights.rsplit("/", 1)[-1]

    @cached_property
    def config(self) -> dict[str, Any]:
        """Return the JSON beside the weights, or above a folder `checkpoints`; empty where there is none."""
        for up in (0, 1) if Path(self.name).parent.name == "checkpoints" else (0,):
            for name in _CONFIGS:
                file = self.place.beside(name, up)
                if file is not None:
                    return read_json(file)
        return {}

    @cached_property
    def _contents(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        file = self.place.files.fetch(self.place.weights)
        if file is None:
            raise ValueError(f"{self.name} is not there.")
        return read_tensors(file)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the file, as they are stored."""
        return self._contents[0]

    @property
    def values(self) -> dict[str, Any]:
        """Return what a pickle or archive holds that is no tensor."""
        return self._contents[1]

    def unwrap(self, name: str) -> None:
        """Continue with a dictionary inside the file, where it has one of this name."""
        inner = self.values.get(name)
        if isinstance(inner, dict):
            self._contents = split_tensors(inner, self.name)

    def json_beside(self, name: str, up: int = 0) -> dict[str, Any]:
        """Return another JSON file of the checkpoint; empty where there is none."""
        file = self.place.beside(name, up)
        return {} if file is None else read_json(file)

    def has(self, *names: str) -> bool:
        """Return whether the file holds all of these tensors."""
        return all(name in self.tensors for name in names)

    def tensor(self, *names: str) -> Tensor:
        """Return the first of these tensors that the file holds, in fp32.

        Raises:
            `ValueError`: if the file holds none of them, or the tensor is not of floating numbers.
        """
        return as_floats(self._floating(*names))

    def _floating(self, *names: str) -> Tensor:
        """Return the tensor of [`tensor`] in the type in which it is stored."""
        stored = self._stored(*names)
        if not stored.is_floating_point():
            raise ValueError(
                f"{names[0]} of {self.name} should hold floating numbers, is of type {stored.dtype}: it is damaged, "
                "or quantised in a way that is not known here. Save it as float32, float16 or bfloat16."
            )
        return stored

    def _stored(self, *names: str) -> Tensor:
        for name in names:
            if name in self.tensors:
                return self.tensors[name]
        raise ValueError(f"{self.name} lacks the tensor {' or '.join(names)}; it holds {self.described()}.")

    def vector(self, *names: str, length: int | None = None) -> Tensor:
        """Return a tensor of one axis, in fp32."""
        vector = self.tensor(*names)
        if vector.dim() != 1 or length not in (None, len(vector)):
            expected = "one axis" if length is None else f"shape ({length},)"
            raise ValueError(f"{names[0]} of {self.name} should have {expected}, has shape {tuple(vector.shape)}.")
        return vector

    def scalar(self, *names: str) -> float:
        """Return the value of a tensor with one entry, of any numeric type, or raise `ValueError`."""
        tensor = self._stored(*names)
        if tensor.numel() != 1:
            raise ValueError(f"{names[0]} of {self.name} should be one number, has shape {tuple(tensor.shape)}.")
        value = tensor.item()
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"{names[0]} of {self.name} should be a number, is {value}.")
        return float(value)

    def positive(self, *names: str) -> float:
        """Return the value of a tensor with one entry that must be above 0, such as a length to divide by."""
        self.tensor(*names)
        value = self.scalar(*names)
        if value <= 0:
            raise ValueError(f"{names[0]} of {self.name} should be above 0, is {value}.")
        return value

    def matrix(self, *names: str, shape: tuple[int, int], transposed: bool) -> Tensor:
        """Return a weight matrix as `(F, D)`, in fp32.

        The lengths of the biases say which axis is which, not the name. Where F equals D they cannot.

        Args:
            *names (`str`): Names of the tensor, of which the first that the file holds counts.
            shape (`tuple[int, int]`): F and D.
            transposed (`bool`): Whether the library stores `(D, F)`, for F = D.
        """
        matrix, (num_latents, d_in) = self._floating(*names), shape
        if tuple(matrix.shape) == (num_latents, d_in):
            return as_floats(matrix.T if transposed and num_latents == d_in else matrix)
        if tuple(matrix.shape) == (d_in, num_latents):
            return as_floats(matrix.T)
        message = (
            f"{names[0]} of {self.name} should be {num_latents} x {d_in} or its transpose, as long as the biases of "
            f"the latents and of the reconstruction are; it has shape {tuple(matrix.shape)}."
        )
        if matrix.dim() == 2 and num_latents in matrix.shape:
            message += " A transcoder into another width has no place in an SAE, whose reconstruction is as wide."
        raise ValueError(message)

    def matrices(
        self, encoder: str, decoder: str, shape: tuple[int, int], transposed: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor]:
        """Return encoder and decoder as `(F, D)` each; see [`matrix`].

        Raises:
            `ValueError`: for other shapes; and where F = D and the weights themselves say that one of the two is
                stored the other way round: rows of encoder and decoder of one latent resemble each other.
        """
        W_enc = self.matrix(encoder, shape=shape, transposed=transposed[0])
        W_dec = self.matrix(decoder, shape=shape, transposed=transposed[1])
        if shape[0] == shape[1]:
            as_stored, otherwise = _resemblance(W_enc, W_dec), _resemblance(W_enc, W_dec.T)
            if as_stored < _UNRELATED and otherwise > _TIED:
                raise ValueError(
                    f"{encoder} and {decoder} of {self.name} fit each other only when one is transposed (mean cosine "
                    f"{otherwise:.2f}, else {as_stored:.2f}), which this format does not do. With as many latents as "
                    "dimensions the shapes cannot tell which: store them as its library does."
                )
        return W_enc, W_dec

    def described(self) -> str:
        """Return names and shapes of the tensors, for messages."""
        shapes = [f"{name} {tuple(tensor.shape)}" for name, tensor in list(self.tensors.items())[:12]]
        more = len(self.tensors) - len(shapes)
        return (", ".join(shapes) or "no tensors") + (f" and {more} more" if more > 0 else "")


def as_floats(tensor: Tensor) -> Tensor:
    """Return a tensor in fp32 and row after row: itself where it is so, else one copy, and none between."""
    if tensor.dtype == torch.float32 and tensor.is_contiguous():
        return tensor
    return torch.empty(tensor.shape, dtype=torch.float32).copy_(tensor)


def quoted(value: Any) -> str:
    """Return a value for a message, or its type where it is no text or number and may be large."""
    return repr(value)[:60] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def _resemblance(W_enc: Tensor, W_dec: Tensor) -> float:
    return torch.cosine_similarity(W_enc, W_dec, dim=1).mean().item()


def number_list(value: Any) -> list[int] | None:
    """Return whole numbers from a list, or from a list that was written as a string; `None` for `None`.

    Raises:
        `ValueError`: if it is neither.
    """
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"Expected a list of whole numbers such as '[256, 256]', got {value!r}.") from error
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(
        isinstance(part, int | float) and not isinstance(part, bool) and part == int(part) for part in value
    ):
        raise ValueError(f"Expected a list of whole numbers, got {value!r}.")
    return [int(part) for part in value]


def cumulated(group_sizes: Sequence[int] | None) -> list[int] | None:
    """Return prefix widths from the sizes of the groups between them; `None` for `None`."""
    if group_sizes is None:
        return None
    return [sum(group_sizes[: i + 1]) for i in range(len(group_sizes))]


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object from a file.

    Raises:
        `ValueError`: if it holds no JSON, something else than an object, or a field of another type than formats have.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also for numbers of thousands of digits, and for absurd nesting
        raise ValueError(f"{file} is no JSON ({error}). It is damaged or half-written: get it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} should hold a JSON object, holds a {type(content).__name__}.")
    check_fields(content, file)
    return content
