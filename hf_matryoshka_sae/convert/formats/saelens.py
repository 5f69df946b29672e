"""SAELens (`cfg.json`, `sae_weights.safetensors`): version 6, and the flat configs of the versions before.

    x   = norm(x) - b_dec          (b_dec where `apply_b_dec_to_input`, which a config without the field means)
    pre = x W_enc + b_enc          (TopK: times ||d_i|| where `rescale_acts_by_decoder_norm`)

BatchTopK and Matryoshka SAEs are exported as JumpReLU with one threshold for all latents; only the metadata of their
training says what they are, and at which widths. While they train, the threshold is `topk_threshold`, in units of
`pre * ||d_i||`.
"""

import logging
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ...models import SAEModel
from ...models.configuration_sae import nearest
from ...models.saving import staged_files
from ..assembly import assemble, cpu_tensors, plain, write_json
from ..base import Format, first_objection
from ..checkpoint import Checkpoint, number_list
from ..hook_names import (
    from_module_path,
    from_transformer_lens,
    hf_model_id,
    kept_with_warning,
    to_module_path,
    to_transformer_lens,
    transformer_lens_model,
)


logger = logging.getLogger(__name__)

# Our activation for each architecture that an SAE's maths here covers.
_ARCHITECTURES = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "batchtopk": "batch_topk",
    "matryoshka_batchtopk": "batch_topk",
    "transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
}
_REFUSED = {
    "skip_transcoder": "it adds a matrix times its input to the reconstruction",
    "jumprelu_skip_transcoder": "it adds a matrix times its input to the reconstruction",
    "temporal": "its latents depend on the tokens before",
    "matching_pursuit": "its latents are found one after the other",
    "abstopk": "its latents can be negative",
}
_TENSORS = {
    "relu": set(),
    "topk": set(),
    "jumprelu": {"threshold", "log_threshold"},
    "batch_topk": {"threshold", "topk_threshold"},
    "gated": {"b_gate", "r_mag", "b_mag"},
}
_NORMALIZATIONS = {
    "none": None,
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
    "expected_average_only_in": None,
}
_WRITTEN = {"relu": "standard", "topk": "topk", "batch_topk": "jumprelu", "jumprelu": "jumprelu", "gated": "gated"}
_TRANSCODERS = {"relu": "transcoder", "jumprelu": "jumprelu_transcoder"}


def claims(checkpoint: Checkpoint) -> bool:
    """Return whether the config has the sizes that only SAELens calls so."""
    return {"d_in", "d_sae"} <= checkpoint.config.keys()


def read(checkpoint: Checkpoint) -> SAEModel:
    """Return the SAE of a SAELens folder."""
    architecture = _architecture(checkpoint)
    transcodes = architecture.endswith("transcoder")
    b_dec = checkpoint.vector("b_dec")
    b_enc = checkpoint.vector("b_gate" if architecture == "gated" else "b_enc")
    W_enc, W_dec = checkpoint.matrices("W_enc", "W_dec", (len(b_enc), len(b_dec)), transposed=(True, False))
    activation, extra = _family(checkpoint, architecture, len(b_enc))
    sae = assemble(
        checkpoint,
        activation,
        W_enc=W_enc,
        W_dec=_finetuned(checkpoint, W_dec),
        b_enc=b_enc,
        b_dec=b_dec,
        apply_b_dec_to_input=not transcodes and checkpoint.config.get("apply_b_dec_to_input") not in (False, 0),
        input_normalization=_normalization(checkpoint, transcodes),
        **_places(checkpoint, transcodes),
        **extra,
    )
    _fold_scaler(checkpoint, sae)
    return sae


def _family(checkpoint: Checkpoint, architecture: str, num_latents: int) -> tuple[str, dict[str, Any]]:
    """Return the activation, and options that only some families have."""
    config, activation = checkpoint.config, _ARCHITECTURES[architecture]
    _refuse_more_tensors(checkpoint, activation)
    trained_as, widths, k = _training(checkpoint)
    extra: dict[str, Any] = {"prefix_widths": widths, "k": k}
    if activation == "gated":
        extra |= {name: checkpoint.vector(name, length=num_latents) for name in ("r_mag", "b_mag")}
    if activation in ("jumprelu", "batch_topk"):
        extra["threshold"] = _threshold(checkpoint, num_latents)
    if activation == "topk":
        extra["scale_by_decoder_norm"] = config.get("rescale_acts_by_decoder_norm", "aux_loss_coefficient" in config)
    elif checkpoint.has("topk_threshold"):
        extra["scale_by_decoder_norm"] = config.get("rescale_acts_by_decoder_norm", True)
    # Without k it could not be trained on as what it was; what it computes is the same.
    known = k is not None or checkpoint.hints.k is not None
    if activation == "jumprelu" and known and str(trained_as).endswith("batchtopk"):
        activation = "batch_topk"
    return activation, extra


def _architecture(checkpoint: Checkpoint) -> str:
    config = checkpoint.config
    if not config:
        raise ValueError(f"There is no cfg.json beside {checkpoint.name}, which says what its tensors mean.")
    architecture = config.get("architecture", "standard")
    function = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    if "metadata" not in config and function == "topk":  # before version 6 "standard" was all that was written
        architecture = "topk"
    elif function not in ("relu", "topk"):
        raise ValueError(
            f"{checkpoint.name} has the activation function {function!r}; only 'relu' and 'topk' are read."
        )
    if architecture in _REFUSED:
        raise ValueError(
            f"{checkpoint.name} is a SAELens {architecture!r}: {_REFUSED[architecture]}; no SAE does that."
        )
    if architecture not in _ARCHITECTURES:
        raise ValueError(
            f"{checkpoint.name} has the SAELens architecture {architecture!r}, which is not known here."
            f"{nearest(str(architecture), _ARCHITECTURES)}"
        )
    if architecture.endswith("transcoder") and config.get("apply_b_dec_to_input"):
        raise ValueError(f"{checkpoint.name} is a transcoder that subtracts b_dec; SAELens has no such thing.")
    return architecture


def _refuse_more_tensors(checkpoint: Checkpoint, activation: str) -> None:
    """Raise `ValueError` for tensors that the architecture lacks, as they would change what is computed."""
    known = {"W_enc", "W_dec", "b_enc", "b_dec", "scaling_factor"} | _TENSORS[activation]
    more = sorted(checkpoint.tensors.keys() - known)
    if more:
        raise ValueError(
            f"{checkpoint.name} holds {', '.join(more)}, which its architecture "
            f"({checkpoint.config.get('architecture', 'standard')}) has no use for: cfg.json and weights do not "
            "belong together, or it computes something that is not known here."
        )


def _training(checkpoint: Checkpoint) -> tuple[str | None, list[int] | None, int | float | None]:
    """Return the architecture in training, prefix widths and k, from whichever file has them."""
    config, metadata = checkpoint.config, checkpoint.config.get("metadata") or {}
    architecture = metadata.get("training_architecture") or config.get("architecture")
    details = metadata.get("training_architecture_details") or {}
    widths = details.get("matryoshka_widths", config.get("matryoshka_widths"))
    k = config.get("k", details.get("k", (config.get("activation_fn_kwargs") or {}).get("k")))
    if widths is None and checkpoint.hints.prefix_widths is None:
        runner = checkpoint.json_beside("runner_cfg.json").get("sae") or {}
        widths, k = runner.get("matryoshka_widths"), runner.get("k") if k is None else k
        if runner.get("architecture") == "matryoshka_batchtopk":
            architecture = "matryoshka_batchtopk"
        if widths is None and "matryoshka" in str(architecture):
            logger.warning(
                "%s was trained as a Matryoshka SAE, but nothing says at which widths; it is loaded as a plain SAE. "
                "Pass `prefix_widths`.",
                checkpoint.name,
            )
    return architecture, number_list(widths), k


def _threshold(checkpoint: Checkpoint, num_latents: int) -> Tensor | float:
    if checkpoint.has("topk_threshold"):
        return checkpoint.scalar("topk_threshold")
    if checkpoint.has("log_threshold"):
        return checkpoint.vector("log_threshold", length=num_latents).exp()
    return checkpoint.vector("threshold", length=num_latents)


def _finetuned(checkpoint: Checkpoint, W_dec: Tensor) -> Tensor:
    """Return the decoder with the factors by which older versions could scale each latent."""
    if not checkpoint.has("scaling_factor"):
        return W_dec
    factors = checkpoint.vector("scaling_factor", length=len(W_dec))
    if not checkpoint.config.get("finetuning_scaling_factor") and not (factors == 1).all():
        raise ValueError(
            f"{checkpoint.name} holds a `scaling_factor` that its config does not use. Set finetuning_scaling_factor "
            "in the config to true, or take the tensor out."
        )
    return W_dec * factors[:, None]


def _normalization(checkpoint: Checkpoint, transcodes: bool) -> str | None:
    kind = checkpoint.config.get("normalize_activations") or "none"
    kind = "expected_average_only_in" if kind is True else kind
    if kind not in _NORMALIZATIONS:
        raise ValueError(
            f"{checkpoint.name} has normalize_activations {kind!r}; what is read is {', '.join(_NORMALIZATIONS)}. "
            "SAELens folds a whitening into the weights when it saves a finished SAE: convert that one."
        )
    if _NORMALIZATIONS[kind] and transcodes:
        raise ValueError(f"{checkpoint.name} is a transcoder that normalises its input ({kind}) but not its output.")
    return _NORMALIZATIONS[kind]


def _fold_scaler(checkpoint: Checkpoint, sae: SAEModel) -> None:
    """Fold a constant factor on the input, which SAELens keeps in a file of its own until training ends (in place)."""
    kind = checkpoint.config.get("normalize_activations")
    if kind not in (True, "expected_average_only_in"):
        return
    factor = checkpoint.json_beside("activation_scaler.json").get("scaling_factor")
    if factor is not None and not factor > 0:
        raise ValueError(f"`scaling_factor` in activation_scaler.json should be above 0, is {factor}.")
    if factor is None:
        logger.warning(
            "%s was trained on hidden states times a factor which is not among its files. It is loaded as SAELens "
            "loads it, without one: scale its input to a mean length of sqrt(d_in).",
            checkpoint.name,
        )
        return
    # As SAELens folds it: latents keep the units that they were trained in.
    sae.W_enc.data *= factor
    sae.W_dec.data /= factor
    sae.b_dec.data /= factor
    if sae.config.scale_by_decoder_norm and hasattr(sae, "threshold"):
        sae.threshold.data /= factor  # is in units of the decoder's rows


def _places(checkpoint: Checkpoint, transcodes: bool) -> dict[str, str | None]:
    """Return language model and hookpoints in our vocabulary."""
    config = checkpoint.config
    metadata = config.get("metadata") or config
    model = hf_model_id(checkpoint.hints.base_model or metadata.get("model_name"))
    places = {"base_model": model, "hookpoint": None}
    sides = {"hookpoint": ("hook_name", "hf_hook_name")}
    if transcodes:
        sides["output_hookpoint"] = ("hook_name_out", "hf_hook_name_out")
    for ours, (theirs, hf) in sides.items():
        if ours == "hookpoint" and checkpoint.hints.hookpoint is not None:
            continue
        name = metadata.get(theirs) or (metadata.get("hook_point") if ours == "hookpoint" else None)
        if metadata.get(hf):
            places[ours] = from_module_path(metadata[hf])
        elif metadata.get("hook_head_index") is not None:
            places[ours] = kept_with_warning(name, None, model)  # one head of several has no module
        else:
            places[ours] = kept_with_warning(name, from_transformer_lens(name, model) if name else None, model)
    if transcodes:
        places["output_hookpoint"] = places["output_hookpoint"] or "unknown"
    return places


def objection(sae: SAEModel) -> str | None:
    """Return why SAELens has no SAE that computes this; `None` where it has one."""
    config = sae.config
    transcodes = config.output_hookpoint is not None
    return first_objection(
        (getattr(config, "group_size", None) is not None, "it has no activation that keeps the largest of each group"),
        (transcodes and config.activation_name not in _TRANSCODERS, "its transcoders are ReLU or JumpReLU"),
        (transcodes and config.input_normalization is not None, "its transcoders do not undo a normalisation"),
    )


def write(sae: SAEModel, path: Path) -> None:
    """Write `cfg.json` and `sae_weights.safetensors` into a folder."""
    transcodes = sae.config.output_hookpoint is not None
    scaled = sae.config.activation_name == "topk" and sae.config.scale_by_decoder_norm
    sae = plain(sae, subtracts=False if transcodes else None, unit_rows=not scaled)
    tensors, activation = cpu_tensors(sae), sae.config.activation_name
    state = {name: tensors[name].T.contiguous() if name == "W_enc" else tensors[name] for name in ("W_enc", "W_dec")}
    state |= {"b_dec": tensors["b_dec"], "b_gate" if activation == "gated" else "b_enc": tensors["b_enc"]}
    state |= {name: tensors[name] for name in ("r_mag", "b_mag", "threshold") if name in tensors}
    with staged_files(path, keep_others=True, last="cfg.json") as staging:
        save_file(state, staging / "sae_weights.safetensors")
        write_json(staging / "cfg.json", _config(sae, scaled))


def _config(sae: SAEModel, scaled: bool) -> dict[str, Any]:
    config, activation = sae.config, sae.config.activation_name
    transcodes = config.output_hookpoint is not None
    normalizations = {ours: theirs for theirs, ours in reversed(_NORMALIZATIONS.items())}
    content = {
        "architecture": _TRANSCODERS[activation] if transcodes else _WRITTEN[activation],
        "d_in": config.d_in,
        "d_sae": config.num_latents,
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": config.apply_b_dec_to_input,
        "normalize_activations": normalizations[config.input_normalization],
        "reshape_activations": "none",
        "metadata": _metadata(sae),
    }
    if activation == "topk":
        content |= {"k": int(config.k), "rescale_acts_by_decoder_norm": scaled}
    if transcodes:
        content["d_out"] = config.d_in
    return content


def _metadata(sae: SAEModel) -> dict[str, Any]:
    config, activation = sae.config, sae.config.activation_name
    metadata: dict[str, Any] = {"sae_lens_version": "6.0.0", "model_name": transformer_lens_model(config.base_model)}
    for ours, theirs, hf in (
        ("hookpoint", "hook_name", "hf_hook_name"),
        ("output_hookpoint", "hook_name_out", "hf_hook_name_out"),
    ):
        place = getattr(config, ours)
        if place is not None:
            metadata |= {theirs: to_transformer_lens(place, config.base_model) or place, hf: to_module_path(place)}
    widths = getattr(config, "prefix_widths", None)
    if widths is not None or activation == "batch_topk":
        name = "batchtopk" if activation == "batch_topk" else _WRITTEN[activation]
        details: dict[str, Any] = {"k": config.k} if activation in ("topk", "batch_topk") else {}
        if widths is not None:
            name, details["matryoshka_widths"] = f"matryoshka_{name}", list(widths)
        metadata |= {"training_architecture": name, "training_architecture_details": details}
    return {name: value for name, value in metadata.items() if value is not None}


FORMAT = Format("saelens", claims, read, objection, write)
