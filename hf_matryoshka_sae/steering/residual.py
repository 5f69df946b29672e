"""What writes into a model's residual stream, found by running the model, whatever its architecture.

A pass over a few tokens records, in the order of the calls, which modules ran and what they gave. A block whose output
is its input plus the outputs of some of its projections has these projections as writers; where no set of projections
adds up, the block normalises or routes what it writes (Gemma 2, OLMo 2, BERT; mixtures of experts), and has none.

Shapes: S tokens of the pass, D width of the residual stream.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..activations.hookpoints import first_tensor, run_model


_TOKENS = 6
_ROUNDINGS = 8  # by which a sum of writers may differ from the stream, in units of its type's precision
_MOST_WRITERS = 4  # of a block; attention and MLP have one each

_WRITERS: "WeakKeyDictionary[nn.Module, list[str]]" = WeakKeyDictionary()


@dataclass
class Call:
    """A module that ran.

    Args:
        name (`str`): Its path in the model.
        module (`nn.Module`): The module.
        given (`Tensor`, *optional*): Hidden states that it was given.
        output (`Tensor`, *optional*): Hidden states that it returned.
    """

    name: str
    module: nn.Module
    given: Tensor | None
    output: Tensor | None


def probe_tokens(model: nn.Module) -> Tensor:
    """Return a few different tokens `(1, S)` on the model's device."""
    vocabulary = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    return torch.randint(len(vocabulary), (1, _TOKENS), generator=generator).to(vocabulary.device)


@torch.no_grad()
def calls_of(model: nn.Module, until: str | None = None) -> list[Call]:
    """Return the modules that ran in a pass over a few tokens, in the order in which they ended.

    Args:
        model (`nn.Module`): A transformers model.
        until (`str`, *optional*): A hookpoint; only what ran before its hidden states were there is returned.
    """
    path, _, side = (until or "").partition(":")
    calls: list[Call] = []
    reached = False

    def before(name: str) -> None:
        nonlocal reached
        reached = reached or (side == "input" and name == path)

    def after(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal reached
        if not reached:
            given = first_tensor(args) if args else kwargs.get("hidden_states")
            calls.append(Call(name, module, given, first_tensor(output)))
        reached = reached or name == path

    with _recorded(model, before, after):
        run_model(model, probe_tokens(model), None)
    return calls


@contextmanager
def _recorded(model: nn.Module, before: Any, after: Any) -> Iterator[None]:
    handles, training = [], [module for module in model.modules() if module.training]
    try:
        for name, module in model.named_modules():
            module.training = False  # dropout would add up to nothing
            handles += [
                module.register_forward_pre_hook(lambda *_, name=name: before(name)),
                module.register_forward_hook(
                    lambda module, args, kwargs, output, name=name: after(name, module, args, kwargs, output),
                    with_kwargs=True,
                ),
            ]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True


def is_projection(module: nn.Module) -> bool:
    """Return whether a module is a matrix product: `nn.Linear`, or GPT-2's `Conv1D`."""
    return isinstance(module, nn.Linear | Conv1D)


def blocks_of(model: nn.Module) -> list[str]:
    """Return the paths of a model's blocks: the longest list of modules of one class.

    Raises:
        `ValueError`: if the model has no such list.
    """
    lists = [
        (len(module), name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
    ]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of blocks whose writers could be found.")
    # The first of several that are as long: an inner list is named after the one that holds it.
    length, name = max(lists, key=lambda each: (each[0], -len(each[1])))
    return [f"{name}.{number}" for number in range(length)]


def writers_of(model: nn.Module) -> list[str]:
    """Return the embeddings and projections whose outputs add up to a model's residual stream.

    Raises:
        `ValueError`: if a block's output is not its input plus the outputs of some of its projections, or the input of
            the first is no sum of embeddings.
    """
    if model not in _WRITERS:
        _WRITERS[model] = _found_writers(model)
    return _WRITERS[model]


def _found_writers(model: nn.Module) -> list[str]:
    calls = calls_of(model)
    blocks = blocks_of(model)
    by_name = {call.name: call for call in calls}
    first = by_name[blocks[0]]
    embeddings = [call for call in calls if isinstance(call.module, nn.Embedding)]
    embedded = _adding_up([call for call in embeddings if _fits(call, first.given)], first.given)
    if embedded is None:
        raise ValueError(
            f"What {blocks[0]} is given is no sum of embeddings, so no direction can be taken out of "
            f"{type(model).__name__} where it is written. Use mode 'remove' or 'clamp' at one hookpoint."
        )
    names = [call.name for call in embedded]
    for block in blocks:
        call = by_name[block]
        projections = [
            each
            for each in calls
            if each.name.startswith(f"{block}.") and is_projection(each.module) and _fits(each, call.output)
        ]
        writing = _adding_up(projections, call.output, call.given)
        if writing is None:
            raise ValueError(
                f"{block} of {type(model).__name__} gives more than its input plus outputs of its projections: it "
                "normalises, scales or routes what it writes, so that no edit of its projections takes a direction "
                "out of it. Use mode 'remove' or 'clamp' at one hookpoint."
            )
        names += [each.name for each in writing]
    return names


def _fits(call: Call, states: Tensor) -> bool:
    return call.output is not None and call.output.shape[-2:] == states.shape[-2:]


def _adding_up(calls: Sequence[Call], total: Tensor, before: Tensor | None = None) -> list[Call] | None:
    """Return the fewest calls whose outputs add up to `total - before`; without `before` up to a factor (Gemma's)."""
    error = _ROUNDINGS * torch.finfo(total.dtype).eps * float(total.abs().max())
    wanted = total.double() if before is None else total.double() - before.double()
    for size in range(1, min(len(calls), _MOST_WRITERS) + 1):
        for some in combinations(calls, size):
            sum_of = torch.stack([call.output.double().expand_as(wanted) for call in some]).sum(0)
            factor = (sum_of * wanted).sum() / sum_of.square().sum() if before is None else 1.0
            if (factor * sum_of - wanted).abs().max() <= error:
                return list(some)
    return None
