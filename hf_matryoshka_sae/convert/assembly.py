"""What all formats share: an SAE from its tensors on the way in, its normal form and whole files on the way out."""

import copy
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models import CONFIGS, SAEConfig, SAEModel, build_sae
from .checkpoint import Checkpoint, quoted


logger = logging.getLogger(__name__)

# Names of F and D in configs. (Bussmann's `dict_size` is not what a Matryoshka SAE has.)
_NAMES_OF_F = ("d_sae", "n_latents", "hidden_dim", "num_latents")
_NAMES_OF_D = ("d_in", "d_model", "n_inputs", "input_dim", "act_size")


def assemble(
    checkpoint: Checkpoint,
    activation: str,
    *,
    W_enc: Tensor,
    W_dec: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    threshold: Tensor | float | None = None,
    r_mag: Tensor | None = None,
    b_mag: Tensor | None = None,
    k: int | float | None = None,
    prefix_widths: Sequence[int] | None = None,
    **fields: Any,
) -> SAEModel:
    """Build an SAE of the family that `activation` names, with prefix widths a Matryoshka one; return it.

    What the user says takes precedence over the files.

    Args:
        checkpoint ([`Checkpoint`]): The checkpoint that the tensors come from.
        activation (`str`): `"relu"`, `"topk"`, `"batch_topk"`, `"jumprelu"` or `"gated"`.
        W_enc (`Tensor` of shape `(F, D)`): Encoder.
        W_dec (`Tensor` of shape `(F, D)`): Decoder.
        b_enc (`Tensor` of shape `(F,)`): Bias of the encoder; of a gated SAE that of the gate.
        b_dec (`Tensor` of shape `(D,)`): Bias of the decoder.
        threshold (`Tensor` of shape `(F,)` or `float`, *optional*): Threshold of BatchTopK and JumpReLU.
        r_mag (`Tensor` of shape `(F,)`, *optional*): Logarithmic scale of a gated SAE's magnitudes.
        b_mag (`Tensor` of shape `(F,)`, *optional*): Bias of a gated SAE's magnitudes.
        k (`int` or `float`, *optional*): Latents per token of TopK and BatchTopK.
        prefix_widths (`Sequence[int]`, *optional*): Widths at which prefixes are SAEs; F is added if it is missing.
        fields: More fields of the config.

    Returns:
        [`SAEModel`] in `eval` mode.

    Raises:
        `ValueError`: if k is needed and not known, or sizes do not fit.
    """
    hints, (num_latents, d_in) = checkpoint.hints, W_enc.shape
    _check_sizes(checkpoint, num_latents, d_in)
    fields |= {"d_in": d_in, "num_latents": num_latents}
    fields |= {name: value for name in ("hookpoint", "base_model") if (value := getattr(hints, name)) is not None}
    state = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
    if activation in ("topk", "batch_topk"):
        fields["k"] = _checked_k(checkpoint, activation, k if hints.k is None else hints.k)
    _warn_where_hints_differ(checkpoint, activation, k, prefix_widths)
    if activation in ("batch_topk", "jumprelu"):
        assert threshold is not None
        state["threshold"] = _thresholds(checkpoint, torch.as_tensor(threshold, dtype=torch.float32), num_latents)
    if activation == "gated":
        state |= {"r_mag": r_mag, "b_mag": b_mag}
    widths = prefix_widths if hints.prefix_widths is None else hints.prefix_widths
    if widths is None:
        config = CONFIGS[activation].from_dict(fields)
    elif activation == "gated":
        raise ValueError(f"{checkpoint.name} is a gated SAE; a Matryoshka one is relu, topk, batch_topk or jumprelu.")
    else:
        widths = list(widths)
        if prefix_widths is not None and hints.prefix_widths is None and widths and widths[-1] < num_latents:
            widths.append(num_latents)
        config = CONFIGS["matryoshka"].from_dict({"activation": activation, "prefix_widths": widths, **fields})
    return _filled(config, state, hints.dtype, checkpoint.tensors)


def _warn_where_hints_differ(
    checkpoint: Checkpoint, activation: str, k: int | float | None, prefix_widths: Sequence[int] | None
) -> None:
    """Warn where the user's hints, which take precedence, differ from the files."""
    hints = checkpoint.hints
    if hints.k is not None and activation not in ("topk", "batch_topk"):
        logger.warning("%s keeps no fixed number of latents (%s): `k` has no effect.", checkpoint.name, activation)
    elif hints.k is not None and k is not None and float(k) != float(hints.k):
        logger.warning("%s says k = %g; it is loaded with k = %g, as asked.", checkpoint.name, float(k), hints.k)
    stored, widths = prefix_widths, hints.prefix_widths
    if stored is not None and widths is not None and list(stored) != list(widths):
        logger.warning("%s was trained at widths %s; it is loaded with %s.", checkpoint.name, [*stored], [*widths])


def _check_sizes(checkpoint: Checkpoint, num_latents: int, d_in: int) -> None:
    """Raise `ValueError` where the config has other sizes than the tensors: it belongs to another checkpoint."""
    trainer = checkpoint.config.get("trainer")
    sizes = [(name, num_latents, checkpoint.config.get(name)) for name in _NAMES_OF_F]
    sizes += [(name, d_in, checkpoint.config.get(name)) for name in _NAMES_OF_D]
    if isinstance(trainer, dict):  # dictionary_learning's
        sizes += [("dict_size", num_latents, trainer.get("dict_size"))]
        sizes += [("activation_dim", d_in, trainer.get("activation_dim"))]
    for name, size, stated in sizes:
        if stated and stated != size:
            raise ValueError(
                f"The tensors of {checkpoint.name} have {size} where its config says {name} {stated}: they do not "
                "belong together."
            )


def _thresholds(checkpoint: Checkpoint, threshold: Tensor, num_latents: int) -> Tensor:
    """Return one threshold for each latent, at least 0.

    Source libraries apply a ReLU first, so that a threshold below 0 acts like one of 0. Some learnt thresholds may be
    below 0; where all are, none was ever set.
    """
    below = int((threshold < 0).sum())
    if below and below == threshold.numel():
        raise ValueError(
            f"Every threshold of {checkpoint.name} is below 0 (down to {threshold.min():g}), as where it was never "
            "set. Set it, or save the SAE as a TopK one."
        )
    if below:
        logger.warning("%d thresholds of %s are below 0; they act as 0.", below, checkpoint.name)
    return threshold.expand(num_latents).clamp(min=0)


def _checked_k(checkpoint: Checkpoint, activation: str, k: int | float | None) -> int | float:
    if k is None:
        raise ValueError(f"Nothing in {checkpoint.name} says how many latents it keeps per token: pass `k`.")
    if isinstance(k, Tensor) and k.numel() == 1:
        k = k.item()
    if isinstance(k, bool) or not isinstance(k, int | float) or not abs(k) < 2**62:
        raise ValueError(f"k of {checkpoint.name} should be a number of latents, is {quoted(k)}.")
    if activation == "topk" and k != int(k):
        raise ValueError(f"`k` must be a whole number where each token keeps k latents, got {k}.")
    return int(k) if k == int(k) else float(k)


def _filled(config: SAEConfig, state: dict[str, Tensor], dtype: torch.dtype, stored: dict[str, Tensor]) -> SAEModel:
    """Return a model with these tensors, without drawing random ones first, which takes longer than reading them.

    A tensor in the file's own memory (`stored`), or in that of another tensor, is copied.
    """
    with torch.device("meta"):
        sae = build_sae(config)
    used = {tensor.untyped_storage().data_ptr() for tensor in stored.values()}
    for name, tensor in state.items():
        own = tensor.to(torch.float32 if name == "threshold" else dtype).contiguous()
        address = own.untyped_storage().data_ptr()
        state[name] = own.clone() if address in used else own
        used.add(address)
    state["latent_ids"] = torch.arange(config.num_latents)
    sae.load_state_dict(state, assign=True)
    return sae.eval()


@torch.no_grad()
def plain(sae: SAEModel, subtracts: bool | None = None, unit_rows: bool = True) -> SAEModel:
    """Return an SAE that computes the same, in the form that a format can write.

    Args:
        sae ([`SAEModel`]): The SAE, which is not changed.
        subtracts (`bool`, *optional*): Whether `b_dec` is to be subtracted from the input; by default as it is.
        unit_rows (`bool`, *optional*, defaults to `True`): Fold the decoder's norms into the encoder where latents are
            measured in their units; else the config keeps saying so.
    """
    sae = copy.deepcopy(sae).eval()
    if sae.config.scale_by_decoder_norm and unit_rows:
        sae.fold_decoder_norm_()
    if subtracts is not None and sae.config.apply_b_dec_to_input != subtracts:
        shift = sae.W_enc @ sae.b_dec * (1 if subtracts else -1)
        sae.b_enc += shift
        if sae.config.activation_name == "gated":
            sae.b_mag += sae.r_mag.exp() * shift
        sae.config.apply_b_dec_to_input = subtracts
    return sae


def cpu_tensors(sae: SAEModel) -> dict[str, Tensor]:
    """Return the tensors of an SAE on the CPU, in its own memory."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in sae.state_dict().items()}


def write_json(file: Path, content: dict) -> None:
    """Write a JSON file with a line per field."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
