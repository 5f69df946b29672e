"""dictionary_learning (`ae.pt`, `config.json`).

Every class subtracts `b_dec` before the encoder, except JumpReLU and the "April update" (`AutoEncoderNew`). Which
class a checkpoint is, its tensors say; `config.json`, which may be missing, adds names and k. Intermediate backups
have the same file name, with the state dict under `ae`. The norm factor of training is in the weights already. ReLU
dictionaries are read as they are stored; the library's `load_dictionary` also gives their decoder unit rows, so that
its latents are ours times the rows' lengths (`sae.fold_decoder_norm_()` does the same).
"""

import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models import SAEModel
from ...models.saving import staged_files
from ..assembly import assemble, cpu_tensors, plain, write_json
from ..base import Format, first_objection
from ..checkpoint import Checkpoint, cumulated, number_list
from ..hook_names import hf_model_id, kept_with_warning, layout_of


logger = logging.getLogger(__name__)

_JUMPRELU = {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}
_CLASSES = {
    "AutoEncoder": {"encoder.weight", "encoder.bias", "decoder.weight", "bias"},
    "AutoEncoderNew": {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"},
    "GatedAutoEncoder": {"encoder.weight", "decoder.weight", "decoder_bias", "gate_bias", "mag_bias", "r_mag"},
    "MatryoshkaBatchTopKSAE": _JUMPRELU | {"group_sizes"},
    "JumpReluAutoEncoder": _JUMPRELU,
    "AutoEncoderTopK": {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec"},
    "BatchTopKSAE": {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "threshold"},
}
_TRAINERS = {
    "AutoEncoder": "StandardTrainer",
    "AutoEncoderNew": "StandardTrainerAprilUpdate",
    "GatedAutoEncoder": "GatedSAETrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
    "AutoEncoderTopK": "TopKTrainer",
    "BatchTopKSAE": "BatchTopKTrainer",
    "MatryoshkaBatchTopKSAE": "MatryoshkaBatchTopKTrainer",
}


def claims(checkpoint: Checkpoint) -> bool:
    """Return whether the config names a class of the library, or a pickle holds the tensors of one."""
    if "dict_class" in (checkpoint.config.get("trainer") or {}):
        return True
    is_pickle = not checkpoint.file_name.endswith((".safetensors", ".npz"))
    return is_pickle and _class_of(_unwrapped(checkpoint)) is not None


def _unwrapped(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the state dict, also where it is one entry of a backup."""
    inner = checkpoint.values.get("ae")
    if isinstance(inner, dict):
        return {name: value for name, value in inner.items() if isinstance(value, Tensor)}
    return checkpoint.tensors


def _class_of(tensors: dict[str, Tensor]) -> str | None:
    """Return the class that has all these tensors; those with few come before those with more of the same."""
    names = tensors.keys()
    if names >= _JUMPRELU and tensors["threshold"].dim() == 0 and "group_sizes" not in names:
        return None  # a Matryoshka SAE without its groups, or none of this library's
    classes = [name for name, tensor_names in _CLASSES.items() if tensor_names <= names]
    if "BatchTopKSAE" in classes:  # an AutoEncoderTopK has the same tensors
        return "AutoEncoderTopK"
    return classes[0] if classes else None


def _dict_class(checkpoint: Checkpoint) -> str:
    trainer = checkpoint.config.get("trainer") or {}
    by_tensors, stated = _class_of(checkpoint.tensors), trainer.get("dict_class")
    if stated == "IdentityDict":
        raise ValueError(f"{checkpoint.name} is an IdentityDict: it has no latents of its own to convert.")
    if stated is None and by_tensors is None:
        raise ValueError(
            f"{checkpoint.name} is no dictionary of dictionary_learning; it holds {checkpoint.described()}."
        )
    if stated is None:
        return _topk_or_batch(checkpoint) if by_tensors == "AutoEncoderTopK" else by_tensors
    if stated not in _CLASSES:
        raise ValueError(
            f"{checkpoint.name} has the class {stated!r}, which is unknown here. Known: {', '.join(sorted(_CLASSES))}."
        )
    missing = _CLASSES[stated] - checkpoint.tensors.keys()
    if missing:
        raise ValueError(
            f"{checkpoint.name} should be a {stated} and lacks {', '.join(sorted(missing))}; it holds "
            f"{checkpoint.described()}."
        )
    return stated


def _topk_or_batch(checkpoint: Checkpoint) -> str:
    """Return which of two classes with the same tensors a checkpoint is, by its threshold."""
    if checkpoint.has("threshold") and checkpoint.scalar("threshold") >= 0:
        logger.warning(
            "%s may be a TopK or a BatchTopK SAE, which its config.json would say. It is loaded as BatchTopK, because "
            "its threshold was set.",
            checkpoint.name,
        )
        return "BatchTopKSAE"
    return "AutoEncoderTopK"


def read(checkpoint: Checkpoint) -> SAEModel:
    """Return the SAE of a trainer's folder, or of one of its steps."""
    checkpoint.unwrap("ae")
    kind = _dict_class(checkpoint)
    b_dec = checkpoint.vector("decoder.bias" if kind == "AutoEncoderNew" else "b_dec", "bias", "decoder_bias")
    b_enc = checkpoint.vector("b_enc", "encoder.bias", "gate_bias")
    by_linear = "encoder.weight" in checkpoint.tensors
    encoder, decoder = ("encoder.weight", "decoder.weight") if by_linear else ("W_enc", "W_dec")
    transposed = (False, True) if by_linear else (True, False)
    W_enc, W_dec = checkpoint.matrices(encoder, decoder, (len(b_enc), len(b_dec)), transposed)
    activation, extra = _family(checkpoint, kind, len(b_enc))
    return assemble(
        checkpoint,
        activation,
        W_enc=W_enc,
        W_dec=W_dec,
        b_enc=b_enc,
        b_dec=b_dec,
        apply_b_dec_to_input=kind not in ("AutoEncoderNew", "JumpReluAutoEncoder"),
        **extra,
        **_places(checkpoint),
    )


def _family(checkpoint: Checkpoint, kind: str, num_latents: int) -> tuple[str, dict[str, Any]]:
    match kind:
        case "AutoEncoder" | "AutoEncoderNew":
            return "relu", {}
        case "GatedAutoEncoder":
            return "gated", {
                "r_mag": checkpoint.vector("r_mag", length=num_latents),
                "b_mag": checkpoint.vector("mag_bias", length=num_latents),
            }
        case "JumpReluAutoEncoder":
            return "jumprelu", {"threshold": checkpoint.vector("threshold", length=num_latents)}
    k = (checkpoint.config.get("trainer") or {}).get("k")
    extra = {"k": checkpoint.scalar("k") if checkpoint.has("k") else k}
    if kind == "MatryoshkaBatchTopKSAE":
        extra["prefix_widths"] = cumulated(number_list(checkpoint.tensors["group_sizes"]))
        if extra["prefix_widths"][-1:] != [num_latents]:
            raise ValueError(
                f"group_sizes of {checkpoint.name} should add up to its {num_latents} latents; they are "
                f"{checkpoint.tensors['group_sizes'].tolist()}."
            )
    if kind == "AutoEncoderTopK":
        return "topk", extra
    threshold = checkpoint.scalar("threshold")
    if threshold < 0:
        logger.warning(
            "The threshold of %s was never set (it is %g). It is loaded as TopK, k latents for each token.",
            checkpoint.name,
            threshold,
        )
        return "topk", extra
    return "batch_topk", extra | {"threshold": threshold}


def _places(checkpoint: Checkpoint) -> dict[str, str | None]:
    """Return language model and hookpoint, from the layer, the sub-module's name and which of its sides was read."""
    trainer, buffer = checkpoint.config.get("trainer") or {}, checkpoint.config.get("buffer") or {}
    model = hf_model_id(checkpoint.hints.base_model or trainer.get("lm_name"))
    name, layer, side = trainer.get("submodule_name"), trainer.get("layer"), buffer.get("io", "out")
    path, layout = None, layout_of(model)
    if re.fullmatch(r"resid_post(_layer_?\d+)?", str(name)) and layout is not None and isinstance(layer, int):
        path = layout.layer(layer)
    elif re.match(r"(model|transformer|gpt_neox)\.\w", str(name)):  # a path already
        path = str(name)
    if side == "in_and_out":  # a transcoder
        return {"base_model": model, "hookpoint": f"{path or name}:input", "output_hookpoint": path or str(name)}
    hookpoint = path if path is None or side == "out" else f"{path}:input"
    hookpoint = checkpoint.hints.hookpoint or kept_with_warning(name, hookpoint, model)
    return {"base_model": model, "hookpoint": hookpoint}


def objection(sae: SAEModel) -> str | None:
    """Return why the library has no dictionary that computes this; `None` where it has one."""
    config, activation = sae.config, sae.config.activation_name
    nested = hasattr(config, "prefix_widths")
    reason = first_objection(
        (config.input_normalization is not None, "its dictionaries do not normalise each hidden state"),
        (config.output_hookpoint is not None, "it does not say that an SAE is a transcoder"),
        (getattr(config, "group_size", None) is not None, "it has no activation that keeps the largest of each group"),
        (nested and activation != "batch_topk", "its Matryoshka SAEs are all BatchTopK; as a plain one it would lose "
         "its prefix widths"),
    )  # fmt: skip
    if reason is None and activation == "batch_topk":
        threshold = plain(sae).threshold.clamp(min=0)
        if (threshold != threshold[0]).any():
            reason = (
                f"its BatchTopK SAEs have one threshold for all latents, and this one has several, from "
                f"{threshold.min():.4g} to {threshold.max():.4g}"
            )
    return reason


def write(sae: SAEModel, path: Path) -> None:
    """Write `ae.pt` and `config.json` into a folder."""
    kind = _written_class(sae)
    subtracts = None if kind.startswith("AutoEncoder") and kind != "AutoEncoderTopK" else kind != "JumpReluAutoEncoder"
    sae = plain(sae, subtracts=subtracts)
    tensors = cpu_tensors(sae)
    with staged_files(path, keep_others=True, last="config.json") as staging:
        torch.save(_state(sae, kind, tensors), staging / "ae.pt")
        write_json(staging / "config.json", _config(sae, kind))


def _written_class(sae: SAEModel) -> str:
    if hasattr(sae.config, "prefix_widths"):
        return "MatryoshkaBatchTopKSAE"
    if sae.config.activation_name == "relu":
        return "AutoEncoder" if sae.config.apply_b_dec_to_input else "AutoEncoderNew"
    return {
        "topk": "AutoEncoderTopK",
        "batch_topk": "BatchTopKSAE",
        "jumprelu": "JumpReluAutoEncoder",
        "gated": "GatedAutoEncoder",
    }[sae.config.activation_name]


def _state(sae: SAEModel, kind: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    W_enc, W_dec, b_enc, b_dec = (tensors[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    matrices = {"encoder.weight": W_enc, "decoder.weight": W_dec.T.contiguous()}
    match kind:
        case "AutoEncoder":
            return {"bias": b_dec, **matrices, "encoder.bias": b_enc}
        case "AutoEncoderNew":
            return {**matrices, "encoder.bias": b_enc, "decoder.bias": b_dec}
        case "GatedAutoEncoder":
            biases = {"gate_bias": b_enc, "mag_bias": tensors["b_mag"], "r_mag": tensors["r_mag"]}
            return {"decoder_bias": b_dec, **biases, **matrices}
    named = {"W_enc": W_enc.T.contiguous(), "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
    if kind == "JumpReluAutoEncoder":
        return {**named, "threshold": tensors["threshold"]}
    # The library counts whole latents, and reads a threshold below 0 as one that was never set.
    k = torch.tensor(max(1, round(sae.config.k)), dtype=torch.int)
    threshold = tensors["threshold"][0].clamp(min=0).clone() if "threshold" in tensors else torch.tensor(-1.0)
    if kind == "MatryoshkaBatchTopKSAE":
        return {**named, "k": k, "threshold": threshold, "group_sizes": torch.tensor(_group_sizes(sae))}
    return {"b_dec": b_dec, "k": k, "threshold": threshold, **matrices, "encoder.bias": b_enc}


def _group_sizes(sae: SAEModel) -> list[int]:
    widths = sae.prefix_widths
    return [b - a for a, b in zip([0, *widths], widths, strict=False)]


def _config(sae: SAEModel, kind: str) -> dict[str, Any]:
    config = sae.config
    layer = re.search(r"\.(\d+)(\.|:|$)", config.hookpoint or "")
    trainer = {
        "trainer_class": _TRAINERS[kind],
        "dict_class": kind,
        "activation_dim": config.d_in,
        "dict_size": config.num_latents,
        "layer": int(layer[1]) if layer else None,
        "lm_name": config.base_model,
        "submodule_name": (config.hookpoint or "").removesuffix(":input") or None,
    }
    if config.activation_name in ("topk", "batch_topk"):
        trainer["k"] = max(1, round(config.k))
    if kind == "MatryoshkaBatchTopKSAE":
        trainer["group_sizes"] = _group_sizes(sae)
    side = "in" if (config.hookpoint or "").endswith(":input") else "out"
    return {"trainer": trainer, "buffer": {"d_submodule": config.d_in, "io": side, "ctx_len": None}}


FORMAT = Format("dictionary_learning", claims, read, objection, write)
