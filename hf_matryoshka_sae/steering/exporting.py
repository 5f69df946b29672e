"""A steering as files that other tools read, exact or refused with the reason.

| format | read by | what it can say |
|---|---|---|
| `peft` | PEFT, and what serves its adapters | additions at all positions; erased directions |
| `gguf` | llama.cpp, as a control vector | additions after a block, the first one excepted |
| `vectors` | hotwire-vllm and others | additions after a block, everywhere or to generated tokens alone |
| `lm_eval` | the evaluation harness's model `steered` | additions at modules' outputs; one erased direction |
"""

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..activations import load_language_model
from ..activations.hookpoints import split_hookpoint
from ..common.command import nearest
from ..common.files import staged, write_json
from .adapters import check_expressible
from .change import FORMATS
from .residual import blocks_of, writers_of


if TYPE_CHECKING:
    from .artefact import Steering


def export(steering: "Steering", folder: Path, format: str, model: nn.Module | None = None) -> Path:
    """Write a steering for another tool.

    Args:
        steering ([`Steering`]): The steering.
        folder (`Path`): Folder to write into.
        format (`str`): One of `FORMATS`.
        model (`nn.Module`, *optional*): The language model, which says where its blocks are, and is as it was
            afterwards; by default the one that the SAE names is loaded.

    Returns:
        `Path`: The file, or for `"peft"` and `"vectors"` the folder.

    Raises:
        `ValueError`: if the format is unknown or cannot say what the steering does; the message says why.
        `ImportError`: if the tool's own package is needed and not installed.
    """
    if format not in FORMATS:
        raise ValueError(f"Unknown format {format!r}.{nearest(format, FORMATS)}")
    if model is None:
        name = next((part.base_model for part in steering.parts if part.base_model), None)
        if name is None:
            raise ValueError("The SAE names no language model: pass the `model` whose blocks are steered.")
        model, _ = load_language_model(name)
    steering.check(model)
    writers = {"peft": _peft, "gguf": _gguf, "vectors": _vectors, "lm_eval": _lm_eval}
    return writers[format](steering, folder, model)


def _peft(steering: "Steering", folder: Path, model: nn.Module) -> Path:
    adapted = steering.to_peft(model)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        with warnings.catch_warnings():  # PEFT takes a bias for a shard that was not gathered
            warnings.filterwarnings("ignore", message=".*have invalid shape.*lora_B.bias.*")
            adapted.save_pretrained(partial, save_embedding_layers=False)  # they are as they were
        folder.mkdir(exist_ok=True)
        for path in partial.iterdir():
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        adapted.unload()
    return folder


def _gguf(steering: "Steering", folder: Path, model: nn.Module) -> Path:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("Control vectors need gguf: pip install 'hf_matryoshka_sae[steering]'.") from error
    check_expressible(steering)
    vectors = _by_layer(steering, model)
    if 0 in vectors:
        raise ValueError(
            "llama.cpp adds control vectors after the second block at the earliest, and this changes what the first "
            "block gives. Steer with another tool, or an SAE of a later block."
        )
    path = folder / "control_vector.gguf"
    with staged(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "controlvector")
        writer.add_string("controlvector.model_hint", model.config.model_type)
        writer.add_uint32("controlvector.layer_count", len(vectors))
        for layer, vector in sorted(vectors.items()):
            writer.add_tensor(f"direction.{layer}", vector.float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def _vectors(steering: "Steering", folder: Path, model: nn.Module) -> Path:
    generated = {part.positions == "generated" for part in steering.parts}
    if len(generated) > 1:
        raise ValueError("Changes of all tokens and of generated ones cannot be in one request: split the steering.")
    decode_only = generated == {True}
    check_expressible(_everywhere(steering) if decode_only else steering)
    requests = []
    for layer, vector in sorted(_by_layer(steering, model).items()):
        name = f"steering-layer{layer}"
        with staged(folder / f"{name}.pt") as temporary:
            torch.save(vector.float(), temporary)
        requests.append({"id": name, "layer": layer, "scale": 1.0, "decode_only": decode_only})
    write_json(folder / "requests.json", requests)
    norms = {str(layer): (steering.dose or {}).get("state_norm") for layer in _by_layer(steering, model)}
    if len(norms) == 1 and None not in norms.values():
        write_json(folder / "h_norms.json", norms)
    return folder


def _everywhere(steering: "Steering") -> "Steering":
    return replace(steering, parts=tuple(replace(part, positions="all") for part in steering.parts))


def _lm_eval(steering: "Steering", folder: Path, model: nn.Module) -> Path:
    check_expressible(steering)
    names = {id(module): name for name, module in model.base_model.named_modules()}
    vectors: dict[str, Tensor] = {}
    erased = [part for part in steering.parts if part.mode == "erase"]
    if len(erased) > 1 or (erased and len(erased[0].latents) > 1):
        raise ValueError("The harness makes one change at a module, and two erased directions are two: erase one.")
    for part in steering.parts:
        for hookpoint in writers_of(model) if erased else [part.hookpoint]:
            path, side = split_hookpoint(hookpoint)
            name = names.get(id(model.get_submodule(path)))
            if side == "input" or name is None:
                raise ValueError(
                    f"The harness changes outputs of modules of {type(model.base_model).__name__}, and "
                    f"{hookpoint!r} is none."
                )
            vectors[name] = part.vectors[0] if erased else vectors.get(name, 0) + part.vector
    path = folder / "steering.pt"
    # Its "clamp" sets the projection onto the unit vector: to 0, that erases the direction.
    action, coefficient = ("clamp", 0.0) if erased else ("add", 1.0)
    with staged(path) as temporary:
        torch.save(
            {
                name: {
                    "action": action,
                    "steering_vector": vector.float(),
                    "steering_coefficient": coefficient,
                    "bias": None,
                    "head_index": None,
                }
                for name, vector in vectors.items()
            },
            temporary,
        )
    return path


def _by_layer(steering: "Steering", model: nn.Module) -> dict[int, Tensor]:
    """Return what is added after each block, by the block's number."""
    layers = {name: number for number, name in enumerate(blocks_of(model))}
    vectors: dict[int, Tensor] = {}
    for part in steering.parts:
        if part.mode == "erase":
            raise ValueError("These files hold vectors that are added, and a direction is erased: export to 'peft'.")
        path, side = split_hookpoint(part.hookpoint)
        layer = layers.get(path, -1) - (side == "input")
        if path not in layers or layer < 0:
            raise ValueError(
                f"These files add vectors after a block, {min(layers)} to {max(layers, key=layers.get)}, and "
                f"{part.hookpoint!r} is no such place."
            )
        vectors[layer] = vectors.get(layer, 0) + part.vector
    return vectors
