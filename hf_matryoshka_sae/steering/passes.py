"""Where a forward pass stands: which of its tokens are padding, at which position each is, which were generated.

A hook at a layer sees hidden states alone. What the model as a whole was given, and how many tokens its cache holds,
says which tokens they belong to; a wrapper around `generate` says where the prompt ends.

Shapes: B rows (texts, beams, samples), S tokens of this pass.
"""

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


_Entered = TypeVar("_Entered")


@dataclass
class _Entry:
    value: Any
    stack: ExitStack
    users: int = 0


_ENTRIES: "WeakKeyDictionary[nn.Module, dict[tuple, _Entry]]" = WeakKeyDictionary()


@contextmanager
def shared(module: nn.Module, key: str, enter: Callable[[], AbstractContextManager[_Entered]]) -> Iterator[_Entered]:
    """Enter a context once for all that ask for it in this thread under one module and key; the last one leaves it.

    Args:
        module (`nn.Module`): Whose context it is.
        key (`str`): Which of its contexts.
        enter (`Callable`): Returns the context manager, called where nobody has entered yet.
    """
    entries, place = _ENTRIES.setdefault(module, {}), (threading.get_ident(), key)
    if place not in entries:
        stack = ExitStack()
        entries[place] = _Entry(stack.enter_context(enter()), stack)
    entry = entries[place]
    entry.users += 1
    try:
        yield entry.value
    finally:
        entry.users -= 1
        if not entry.users:
            del entries[place]
            entry.stack.close()


@dataclass
class Passes:
    """What is known of the model's current forward pass.

    Args:
        prompt (`int`, *optional*): Columns of the prompt, padding included; `None` before the first pass.
        past (`int`): Columns that the cache holds.
        mask (`Tensor`, *optional*): Attention mask `[B, past + S]`, where the model was given one of that kind.
        position_ids (`Tensor`, *optional*): Positions `[B, S]` or `[1, S]`, where the model was given them.
        generating (`bool`): Whether the pass is one of `generate`.
        running (`bool`): Whether a pass is under way.
    """

    prompt: int | None = None
    past: int = 0
    mask: Tensor | None = None
    position_ids: Tensor | None = None
    generating: bool = False
    running: bool = False

    def begin(self, given: dict[str, Any]) -> None:
        """Note what the model is given, before it runs."""
        # Its argument has had several names.
        cache = next((value for value in given.values() if hasattr(value, "get_seq_length")), None)
        mask, self.running = given.get("attention_mask"), True
        self.past = 0 if cache is None else int(cache.get_seq_length())
        self.mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self.position_ids = given.get("position_ids")
        tokens = next((given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), None)
        if not self.generating and not self.past and tokens is not None:
            self.prompt = tokens.shape[1]

    def end(self) -> None:
        """Forget the pass, so that a part of the model that is called by itself is not taken for it."""
        self.past, self.mask, self.position_ids, self.running = 0, None, None, False

    def real(self, shape: torch.Size) -> Tensor | None:
        """Return which tokens are no padding, bool `[B, S]`; `None` where the model was not told of any."""
        return None if (mask := self._own(self.mask, shape)) is None else mask.bool()

    def _own(self, columns: Tensor | None, shape: torch.Size) -> Tensor | None:
        """Return the columns of this pass among those of all tokens so far."""
        if columns is None or columns.shape[0] != shape[0] or columns.shape[1] < shape[1]:
            return None
        # A static cache has columns beyond the present; a mask may leave those of the past out.
        start = self.past if columns.shape[1] >= self.past + shape[1] else columns.shape[1] - shape[1]
        return columns[:, start : start + shape[1]]

    def chosen(self, shape: torch.Size, positions: str, from_position: int) -> Tensor | None:
        """Return which of the tokens may be changed, bool `[B, S]`; `None` for all of them.

        Args:
            shape (`torch.Size`): B and S of the hidden states.
            positions (`str`): One of [`Change`]'s.
            from_position (`int`): First position that may be changed; padding does not count.
        """
        chosen = None
        if positions != "all":
            prompt = self.prompt if self.prompt is not None else shape[1]
            first = prompt - (positions == "new")
            chosen = (torch.arange(shape[1]) + self.past >= first).expand(shape[0], -1)
        if from_position:
            late = self._positions(shape) >= from_position
            chosen = late if chosen is None else chosen.to(late.device) & late
        return chosen

    def _positions(self, shape: torch.Size) -> Tensor:
        counted = None if self.mask is None else self._own(self.mask.long().cumsum(1) - 1, shape)
        if counted is None and self.position_ids is not None and self.position_ids.shape[-1] == shape[1]:
            counted = self.position_ids.reshape(-1, shape[1]).expand(shape[0], -1)
        return (torch.arange(shape[1]) + self.past).expand(shape[0], -1) if counted is None else counted


@contextmanager
def watched(model: nn.Module) -> Iterator[Passes]:
    """Keep a [`Passes`] up to date while the block runs.

    Args:
        model (`nn.Module`): The model whose `forward` and `generate` are called.
    """
    passes, owner = Passes(), threading.get_ident()
    names = list(inspect.signature(model.forward).parameters)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == owner:
            passes.begin(dict(zip(names, args, strict=False)) | kwargs)

    def after(*_: Any) -> None:
        if threading.get_ident() == owner:
            passes.end()

    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        model.register_forward_hook(after, always_call=True),
    ]
    try:
        with _generation_told(model, passes) if hasattr(model, "generate") else nullcontext():
            yield passes
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _generation_told(model: nn.Module, passes: Passes) -> Iterator[None]:
    """Tell `passes` where the prompt ends while the model's `generate` runs."""
    original, owner = model.generate, threading.get_ident()
    was_own = vars(model).get("generate")

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != owner:
            return original(*args, **kwargs)
        given = [kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")]
        tokens = args[0] if args else next((each for each in given if each is not None), None)
        before = passes.prompt, passes.generating
        passes.prompt, passes.generating = (1 if tokens is None else tokens.shape[1]), True
        try:
            return original(*args, **kwargs)
        finally:
            passes.prompt, passes.generating = before

    vars(model)["generate"] = generate
    try:
        yield
    finally:
        if was_own is None:
            vars(model).pop("generate", None)
        else:
            vars(model)["generate"] = was_own


def eager(model: nn.Module) -> AbstractContextManager:
    """Return a context in which a compiled model runs as it is written.

    Compiled code keeps the hooks that were there when it was compiled: it would neither see new ones nor lose them.
    On an accelerator `generate` may compile the model by itself.
    """
    accelerated = any(parameter.device.type not in ("cpu", "meta") for parameter in model.parameters())
    compiles = accelerated or "torch._dynamo" in sys.modules  # which nothing but a compilation needs
    return torch.compiler.set_stance("force_eager") if compiles else nullcontext()


def unwrapped(model: nn.Module) -> list[nn.Module]:
    """Return the model and, last, the transformers model itself, inside what `torch.compile` or PEFT put around it.

    A wrapper calls the inner `forward` without its hooks, or is left out by `generate`: both have to be watched.
    """
    models = [getattr(model, "_orig_mod", model)]
    if hasattr(models[0], "get_base_model"):
        models.append(models[0].get_base_model())
    return models
