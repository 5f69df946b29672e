"""What an SAE answers where other libraries take it for a stack of linear layers: FSDP, PEFT, quantisation."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar


Method = TypeVar("Method", bound=Callable)


def forward_method(method: Method) -> Method:
    """A method of a module that uses its weights as `forward` does, also where FSDP2 has sharded them.

    FSDP2 gathers the weights for `forward` alone, until it is told of other methods. It cannot be told before it has
    wrapped the module, so that is done at the method's first call.
    """

    @wraps(method)
    def sharded(self: Any, *args: Any, **kwargs: Any) -> Any:
        fsdp = sys.modules.get("torch.distributed.fsdp")  # who has wrapped a module has imported it
        if fsdp is not None and method.__name__ not in vars(self) and isinstance(self, fsdp.FSDPModule):
            fsdp.register_fsdp_forward_method(self, method.__name__)
            return getattr(self, method.__name__)(*args, **kwargs)
        return method(self, *args, **kwargs)

    return sharded


def refuse_quantization(quantization: Any) -> None:
    """Raises `ValueError` for a quantisation: it would do nothing."""
    if quantization is not None:
        raise ValueError(
            "An SAE cannot be quantised while it is loaded: quantisers replace linear layers, and its weights are "
            "parameters of its own, so nothing would change. Leave `quantization_config` out. "
            "`dtype=torch.bfloat16` halves the memory, `width=` loads the first latents only."
        )


class Integration:
    """How an SAE meets libraries that expect layers; a part of [`SAEModel`]."""

    def get_input_embeddings(self) -> None:
        """Return nothing: an SAE has no embeddings, and FSDP2 asks for them."""

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002 (refused, whatever they are)
        """Raises `ValueError`: PEFT adapts an SAE inside another module only."""
        raise ValueError(
            "PEFT adapts layers, and an SAE's weights are parameters of the model itself. Put it inside a module: "
            "`peft.get_peft_model(torch.nn.Sequential(sae), LoraConfig(target_parameters=['0.W_enc', '0.W_dec']))`; "
            "`merge_and_unload()[0]` is then the adapted SAE."
        )

    load_adapter = add_adapter
