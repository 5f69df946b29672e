"""Hookpoints: places in a transformers model whose hidden states are read, and the forward pass that stops there.

A hookpoint is a module path as `model.named_modules()` gives it (`"model.layers.3"`), which means the module's output,
or that path with `:input` for what goes into it. Nothing here knows any architecture: forward hooks copy no tensor,
and an exception raised by the last hook ends the forward pass before the next module runs.
"""

import difflib
import fnmatch
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class _AllCaptured(Exception):
    """Ends a forward pass once every hookpoint has been seen; never leaves this module."""


def resolve_hookpoints(model: nn.Module, patterns: str | Sequence[str]) -> list[str]:
    """Return the hookpoints of a model that module paths and globs name.

    Args:
        model (`nn.Module`): the language model.
        patterns (`str` or `list[str]`): module paths or globs (`"model.layers.*"`, where `*` also crosses dots unless
            the glob names as many parts as the path has), each with an optional `:input` or `:output` (the default).

    Returns:
        `list[str]`: hookpoints in the order of `model.named_modules()`, without repeats; `:output` is left off.

    Raises:
        `ValueError`: a pattern matches no module (the message lists near matches), or none was given.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise ValueError("No hookpoints given; pass module paths such as 'model.layers.3' or globs.")
    paths = [path for path, _ in model.named_modules() if path]
    chosen = set()
    for pattern in patterns:
        path, side = split_hookpoint(pattern)
        matches = _matching(paths, path)
        if not matches:
            raise ValueError(f"No module matches the hookpoint '{pattern}'. {_near_matches(paths, path)}")
        chosen.update((match, side) for match in matches)
    sides = ("input", "output")
    return [_join(path, side) for path in paths for side in sides if (path, side) in chosen]


def split_hookpoint(hookpoint: str) -> tuple[str, str]:
    """Split a hookpoint into module path and side, `"input"` or `"output"`.

    Raises:
        `ValueError`: the suffix is neither.
    """
    path, _, side = hookpoint.partition(":")
    if side not in ("", "input", "output"):
        raise ValueError(f"Hookpoint '{hookpoint}' ends in ':{side}'; expected ':input', ':output' or nothing.")
    return path, side or "output"


def _join(path: str, side: str) -> str:
    return path if side == "output" else f"{path}:{side}"


def _matching(paths: list[str], pattern: str) -> list[str]:
    if not any(sign in pattern for sign in "*?["):
        return [pattern] if pattern in paths else []
    matches = [path for path in paths if fnmatch.fnmatchcase(path, pattern)]
    # "layers.*" is asked for the layers, not for every part of each: prefer paths as deep as the glob.
    same_depth = [path for path in matches if path.count(".") == pattern.count(".")]
    return same_depth or matches


def _near_matches(paths: list[str], pattern: str) -> str:
    ends = [path for path in paths if path.endswith(f".{pattern}")]
    near = ends + difflib.get_close_matches(pattern, paths, n=5, cutoff=0.5)
    if not near:
        near = [path for path in paths if path.count(".") <= 1][:8]
    return f"Near it: {', '.join(dict.fromkeys(near))}."


def harvest(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, hookpoints: Sequence[str]
) -> dict[str, Tensor]:
    """Return hidden states at some hookpoints, from a forward pass that stops at the last of them.

    Args:
        model (`nn.Module`): a transformers model; its mode (`train` or `eval`) is left as it is.
        input_ids (`Tensor`): tokens, `[B, S]`, on the model's device.
        attention_mask (`Tensor`, *optional*): `[B, S]`, 0 at padding; `None` says that there is no padding, which
            lets the attention use its fastest kernel.
        hookpoints (`list[str]`): as [`resolve_hookpoints`] returns them. A module called several times in one pass
            gives its first call.

    Returns:
        `dict[str, Tensor]`: `[B, S, D]` for each hookpoint, in the model's type, without gradient.

    Raises:
        `ValueError`: a hookpoint does not exist, is not reached, or does not carry a `[B, S, D]` tensor.
    """
    captured: dict[str, Tensor] = {}

    def capture(hookpoint: str, value: Any) -> None:
        if hookpoint not in captured:
            captured[hookpoint] = _hidden_states(hookpoint, value, input_ids.shape)
        if len(captured) == len(set(hookpoints)):
            raise _AllCaptured

    with hooked(model, [(hookpoint, capture) for hookpoint in dict.fromkeys(hookpoints)]):
        try:
            with torch.no_grad():
                run_model(model, input_ids, attention_mask)
        except _AllCaptured:
            pass
    missing = [hookpoint for hookpoint in hookpoints if hookpoint not in captured]
    if missing:
        raise ValueError(
            f"The forward pass of {type(model).__name__} never reached {', '.join(missing)}. Choose modules that are"
            " called for text input."
        )
    return {hookpoint: captured[hookpoint] for hookpoint in hookpoints}


def hookpoint_widths(model: nn.Module, hookpoints: Sequence[str]) -> dict[str, int]:
    """Return the width D of the hidden states at each hookpoint, from a forward pass over two tokens."""
    tokens = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    return {hookpoint: states.shape[-1] for hookpoint, states in harvest(model, tokens, None, hookpoints).items()}


def run_model(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> Any:
    """Return the model's output without a key-value cache, which a whole sequence at once has no use for."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    return model(input_ids=input_ids, attention_mask=attention_mask, **options)


@contextmanager
def hooked(model: nn.Module, hooks: Iterable[tuple[str, Callable[[str, object], Tensor | None]]]) -> Iterator[None]:
    """Call `hook(hookpoint, value)` when this thread's forward pass gets to each hookpoint.

    A tensor that a hook returns takes the place of the hidden states. The hooks are gone when the block ends, however
    it ends. A forward pass of another thread does not see them.
    """
    owner = threading.get_ident()

    def of_this_thread(hook: Callable) -> Callable:
        return lambda hookpoint, value: hook(hookpoint, value) if threading.get_ident() == owner else None

    handles = []
    try:
        for hookpoint, hook in hooks:
            handles.append(_register(model, hookpoint, of_this_thread(hook)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _register(model: nn.Module, hookpoint: str, hook: Callable) -> RemovableHandle:
    path, side = split_hookpoint(hookpoint)
    try:
        module = model.get_submodule(path)
    except AttributeError:
        paths = [name for name, _ in model.named_modules() if name]
        raise ValueError(f"The model has no module '{path}'. {_near_matches(paths, path)}") from None
    if side == "output":
        return module.register_forward_hook(lambda _module, _args, output: _replaced(output, hook(hookpoint, output)))

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return _replaced(args, hook(hookpoint, args)), kwargs
        value = hook(hookpoint, kwargs.get("hidden_states"))
        return args, kwargs if value is None else {**kwargs, "hidden_states": value}

    return module.register_forward_pre_hook(before, with_kwargs=True)


def _replaced(value: Any, states: Tensor | None) -> Any:
    """Return a module's output (tensor, tuple or `ModelOutput`) with its hidden states exchanged."""
    if states is None or isinstance(value, Tensor):
        return value if states is None else states
    if isinstance(value, tuple):
        return (states, *value[1:])
    value[next(iter(value.keys()))] = states
    return value


def first_tensor(value: Any) -> Tensor | None:
    """Return the hidden states in a module's input or output: the value itself or the first entry of a tuple."""
    if isinstance(value, dict):  # a ModelOutput is a dict
        value = next(iter(value.values()), None)
    if isinstance(value, (tuple, list)):
        value = value[0] if value else None
    return value if isinstance(value, Tensor) else None


def _hidden_states(hookpoint: str, value: Any, shape: torch.Size) -> Tensor:
    states = first_tensor(value)
    if states is None or states.ndim != 3 or states.shape[:2] != shape:
        received = f"a tensor of shape {list(states.shape)}" if states is not None else f"a {type(value).__name__}"
        raise ValueError(
            f"Hookpoint '{hookpoint}' carries {received}; expected hidden states [batch, sequence, width] with"
            f" [batch, sequence] = {list(shape)}. Choose a module that returns hidden states, such as a layer."
        )
    return states.detach()
