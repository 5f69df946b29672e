"""A steering as a PEFT adapter, exact or refused: what it says is found out by running model and adapter.

What is added to every token is the bias of a projection that writes to the hookpoint: LoRA with matrices of zeros and
`lora_bias=True`. Where a LayerNorm gives the hidden states themselves (BERT), it is that LayerNorm's bias, as
LN tuning. Erased directions are LoRA of as many ranks, W - Q (Q^T W), on every writer of the residual stream. What
depends on activations is no linear map of the hidden states, and has no adapter.

Shapes: D width of the hidden states, r ranks.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..activations.hookpoints import run_model
from .applying import applied
from .parts import Part
from .passes import unwrapped
from .residual import calls_of, is_projection, probe_tokens, writers_of


if TYPE_CHECKING:
    from peft import PeftModel

    from .artefact import Steering


_TRIED = 3  # carriers of a change, the nearest to the hookpoint first
# Error on the logits relative to the effect, see `_error`; models of float64 take norms in float32, too.
_EXACT = {torch.float64: 1e-5, torch.float32: 1e-4}
_EXACT_IN_HALF = 0.1  # half precision rounds more than that of a small effect


def to_peft(steering: "Steering", model: nn.Module, adapter_name: str = "default") -> "PeftModel":
    """Make a PEFT model whose adapter does what the steering does in place, or refuse.

    The adapter saves, loads and switches as PEFT's own do. PEFT merges a bias only into a projection that has one:
    Llama's, Qwen's and Mistral's have none, so that the adapter of an addition stays beside them. PEFT hot-swaps LoRA
    of projections alone, not that of embeddings (erased directions) or LN tuning (BERT).

    Args:
        steering ([`Steering`]): Additions to every token, or erased directions.
        model (`nn.Module`): The transformers model, into which the adapter is put.
        adapter_name (`str`, *optional*, defaults to `"default"`): Name of the adapter.

    Returns:
        `PeftModel`: The model with the adapter. The adapter has been run beside the hook: logits are the same.

    Raises:
        `ValueError`: if no adapter does the same; the message says why.
        `ImportError`: if PEFT is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("Adapters need PEFT: pip install 'hf_matryoshka_sae[steering]'.") from error
    if len(unwrapped(model)) > 1:
        raise ValueError(
            "The model has an adapter already. Load the base model, and add this one as a further adapter."
        )
    check_expressible(steering)
    steering.check(model)
    modes = {part.mode for part in steering.parts}
    if modes == {"erase"}:
        config, fill = _erasing(peft, steering.parts, model)
    else:
        config, fill = _adding(peft, steering.parts, model)
    expected = _logits(model, steering.parts)
    plain = _logits(model)
    dtype = next(model.parameters()).dtype
    with warnings.catch_warnings(), torch.no_grad():
        # That a projection without bias cannot be merged into is said above; tied embeddings are run below.
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config, adapter_name, autocast_adapter_dtype=dtype == torch.float32)
        fill(adapted, adapter_name)
    adapted.train(model.training)
    error = _error(_logits(adapted), expected, plain)
    if error > _EXACT.get(dtype, _EXACT_IN_HALF):
        adapted.unload()
        raise ValueError(
            f"An adapter does not do the same in {type(model).__name__}: its logits differ from the hook's by "
            f"{error:.1%} of the effect. Steer in place, with `applied`."
        )
    return adapted


def check_expressible(steering: "Steering") -> None:
    """Raise `ValueError` if a part is no constant change, which is all that vectors and adapters can make."""
    for part in steering.parts:
        if part.mode in ("clamp", "remove"):
            raise ValueError(
                f"Mode {part.mode!r} depends on what fires: the change differs from token to token, and no bias or "
                "low-rank matrix makes it. Steer in place, or use mode 'add', or 'erase' for the whole direction."
            )
        if part.mode == "add" and not part.is_constant:
            why = (
                f"only where latent {part.condition} fires"
                if part.condition is not None
                else "scaled by each token's norm, as this SAE normalises its input"
                if part.normalization is not None
                else f"at some positions alone ({part.positions!r}, from {part.from_position})"
            )
            raise ValueError(f"The change is made {why}; an adapter changes every token alike. Steer in place.")
    if len({part.mode == "erase" for part in steering.parts}) > 1:
        raise ValueError("Additions and erased directions need an adapter each: split the steering by mode.")


# Additions

Fill = Callable[["PeftModel", str], None]


def _adding(peft: Any, parts: Sequence[Part], model: nn.Module) -> tuple[Any, Fill]:
    """Return the adapter's config, and the function that fills it, for vectors that are added to every token."""
    vectors: dict[str, Tensor] = {}
    for part in parts:
        carrier = carrier_of(model, part)
        vectors[carrier] = vectors.get(carrier, 0) + part.vector
    norms = {name for name in vectors if isinstance(model.get_submodule(name), nn.LayerNorm)}
    if norms and norms != set(vectors):
        raise ValueError("Some hookpoints need the bias of a LayerNorm and some that of a projection: split them.")
    if norms:
        config = peft.LNTuningConfig(target_modules=_exactly(vectors), inference_mode=True)
    else:
        config = peft.LoraConfig(
            r=1,
            lora_alpha=1,
            lora_bias=True,
            target_modules=_exactly(vectors),
            fan_in_fan_out=not isinstance(model.get_submodule(next(iter(vectors))), nn.Linear),
            inference_mode=True,
        )

    def fill(adapted: "PeftModel", adapter: str) -> None:
        for name, vector in vectors.items():
            layer = adapted.get_base_model().get_submodule(name)
            if norms:
                layer.ln_tuning_layers[adapter].bias += vector.to(layer.ln_tuning_layers[adapter].bias)
                continue
            for matrix in (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight):
                matrix.zero_()
            layer.lora_B[adapter].bias.copy_(vector)

    return config, fill


def carrier_of(model: nn.Module, part: Part) -> str:
    """Return the module by whose bias a vector can be added at a hookpoint.

    Args:
        model (`nn.Module`): A transformers model.
        part ([`Part`]): An addition.

    Raises:
        `ValueError`: if the hook's logits are those of no bias that lies before the hookpoint.
    """
    width = part.vectors.shape[1]
    calls = calls_of(model, part.hookpoint)
    candidates = [
        call.name
        for call in reversed(calls)
        if call.output is not None and call.output.shape[-1] == width and _has_place(call.module)
    ]
    times = [call.name for call in calls]
    candidates = [name for name in dict.fromkeys(candidates) if times.count(name) == 1][:_TRIED]
    plain, expected = _logits(model), _logits(model, [part])
    errors = {}
    for name in candidates:
        handle = model.get_submodule(name).register_forward_hook(lambda _, __, output: output + part.vector.to(output))
        try:
            errors[name] = _error(_logits(model), expected, plain)
        finally:
            handle.remove()
        if errors[name] <= _EXACT.get(plain.dtype, _EXACT_IN_HALF):
            return name
    tried = ", ".join(f"{name} (logits off by {error:.0%} of the effect)" for name, error in errors.items())
    raise ValueError(
        f"No bias adds a vector at {part.hookpoint!r} of {type(model).__name__}: between its projections and there it "
        f"normalises, scales or routes. Tried: {tried or 'nothing, as no projection lies before it'}. Steer in place."
    )


def _has_place(module: nn.Module) -> bool:
    """Return whether PEFT can add a bias to what a module gives."""
    return is_projection(module) or (isinstance(module, nn.LayerNorm) and module.bias is not None)


# Erased directions


def _erasing(peft: Any, parts: Sequence[Part], model: nn.Module) -> tuple[Any, Fill]:
    """Return the adapter's config, and the function that fills it, for directions taken out of every writer."""
    writers = writers_of(model)
    biased = [name for name in writers if getattr(model.get_submodule(name), "bias", None) is not None]
    if biased:
        raise ValueError(
            f"{biased[0]} has a bias that writes, too. PEFT's LoRA changes biases of projections, but not together "
            "with embeddings: no one adapter does both. Steer in place, with `applied`."
        )
    basis = torch.linalg.qr(torch.cat([part.vectors for part in parts]).T.double()).Q  # [D, r]
    rank = basis.shape[1]
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=_exactly(writers), inference_mode=True)

    def fill(adapted: "PeftModel", adapter: str) -> None:
        for name in writers:
            layer = adapted.get_base_model().get_submodule(name)
            weight = layer.get_base_layer().weight.double()
            directions = basis.to(weight)
            if adapter in layer.lora_embedding_A:  # [r, V] and [D, r]
                layer.lora_embedding_A[adapter].copy_((weight @ directions).T)
                layer.lora_embedding_B[adapter].copy_(-directions)
            else:
                layer.lora_A[adapter].weight.copy_(directions.T @ weight)
                layer.lora_B[adapter].weight.copy_(-directions)

    return config, fill


def _exactly(names: Sequence[str] | dict[str, Any]) -> str | list[str]:
    """Return `target_modules` that PEFT matches with these modules alone: a list also matches the ends of paths."""
    return "|".join(f"(?:{name})".replace(".", r"\.") for name in sorted(names))


# Running both


def _logits(model: nn.Module, parts: Sequence[Part] = ()) -> Tensor:
    """Return what a model gives for a few tokens: logits, or hidden states where it has no head."""
    inner = unwrapped(model)[-1]
    with torch.no_grad(), applied(model, parts, quiet=True):
        output = run_model(inner, probe_tokens(inner), None)
    logits = getattr(output, "logits", None)
    return logits if logits is not None else output[0]


def _error(logits: Tensor, expected: Tensor, plain: Tensor) -> float:
    """Return the largest difference of two results relative to the largest effect, or to a 1000th of the plain one."""
    effect = (expected - plain).abs().max().clamp(min=1e-3 * plain.abs().max())
    return float((logits - expected).abs().max() / effect)
