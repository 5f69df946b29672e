"""Types of the fields in other libraries' configs, checked when a config is read.

Libraries give a field of one name the same type, so that one table serves all formats. A field that no format reads is
not checked.
"""

from pathlib import Path
from typing import Any


_DEEPEST = 50  # dictionaries and lists in each other
_LARGEST = 2**62
_KINDS = {
    "an object": "metadata training_architecture_details activation_fn_kwargs sae trainer buffer "
    "dataset_average_activation_norm",
    "a text": "model_type architecture training_architecture activation_fn_str activation_fn activation act_fn "
    "sae_type dict_class norm_activation model_name lm_name hook_name hf_hook_name hook_name_out hf_hook_name_out "
    "hook_point hook_point_in hook_point_out hf_hook_point_in hf_hook_point_out submodule_name io",
    "a number": "k top_k jump_relu_threshold scaling_factor in out expansion_factor",
    "a whole number": "d_in d_sae d_model num_latents n_latents n_inputs input_dim hidden_dim act_size dict_size "
    "activation_dim",
    "true or false": "rescale_acts_by_decoder_norm",
    "a text, true or false": "normalize_activations",
}
_FIELDS = {name: kind for kind, names in _KINDS.items() for name in names.split()}


def check_fields(content: dict[str, Any], file: Path) -> None:
    """Raise `ValueError` for a field that a format reads and that is of another type than there.

    Args:
        content (`dict`): Content of a JSON file; sections in it are checked too.
        file (`Path`): The file, for the message.
    """
    if _too_deep(content):
        raise ValueError(f"{file} has lists or objects in each other more than {_DEEPEST} times. It is damaged.")
    for name, value in content.items():
        kind = _FIELDS.get(name)
        if kind is None or value is None or _is(kind, value):
            if kind == "an object" and value:
                check_fields(value, file)
            continue
        raise ValueError(f"`{name}` in {file} should be {kind}, is {repr(value)[:60]}. It is damaged: get it again.")


def _is(kind: str, value: Any) -> bool:
    if isinstance(value, bool):
        return "true" in kind
    match kind:
        case "an object":
            return isinstance(value, dict)
        case "a text" | "a text, true or false":
            return isinstance(value, str)
        case "a number":
            return isinstance(value, int | float) and abs(value) <= _LARGEST
        case "a whole number":
            return isinstance(value, int) and abs(value) <= _LARGEST
    return False


def _too_deep(content: Any) -> bool:
    level = [content]
    for _ in range(_DEEPEST):
        level = [inner for holder in level for inner in _inside(holder) if isinstance(inner, dict | list)]
        if not level:
            return False
    return True


def _inside(holder: dict | list) -> list:
    return list(holder.values()) if isinstance(holder, dict) else holder
