"""sparsify (`cfg.json`, `sae.safetensors`), one folder per hookpoint.

`encoder.weight` and `W_dec` both are stored latent by latent, `(F, D)`, whatever `normalize_decoder` says. `b_dec` is
subtracted from the input unless it is a transcoder. `num_latents` 0 means `expansion_factor` times `d_in`.
"""

import logging
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ...models import SAEModel
from ...models.saving import staged_files
from ..assembly import assemble, cpu_tensors, plain, write_json
from ..base import Format, first_objection
from ..checkpoint import Checkpoint
from ..hook_names import from_sparsify, hf_model_id, kept_with_warning


logger = logging.getLogger(__name__)


def claims(checkpoint: Checkpoint) -> bool:
    """Return whether the config has the fields of a sparse coder, or a linear encoder is beside a plain decoder."""
    return {"k", "d_in", "expansion_factor"} <= checkpoint.config.keys() or checkpoint.has("encoder.weight", "W_dec")


def read(checkpoint: Checkpoint) -> SAEModel:
    """Return the SAE of a hookpoint's folder."""
    config = checkpoint.config
    if not config:
        logger.warning("There is no cfg.json beside %s: it is taken for a TopK SAE.", checkpoint.name)
    _refuse_other_maths(checkpoint)
    b_enc, b_dec = checkpoint.vector("encoder.bias"), checkpoint.vector("b_dec")
    W_enc, W_dec = checkpoint.matrices("encoder.weight", "W_dec", (len(b_enc), len(b_dec)), transposed=(False, False))
    expanded = (config.get("expansion_factor") or 0) * (config.get("d_in") or 0)
    if not config.get("num_latents") and expanded not in (0, len(b_enc)):
        raise ValueError(f"{checkpoint.name} has {len(b_enc)} latents where its cfg.json says {expanded}.")
    k, extra = config.get("k", checkpoint.hints.k), {}
    if config.get("activation", "topk") == "groupmax":
        extra["group_size"] = _group_size(checkpoint, len(b_enc), k)
    transcodes = bool(config.get("transcode"))
    return assemble(
        checkpoint,
        "topk",
        W_enc=W_enc,
        W_dec=W_dec,
        b_enc=b_enc,
        b_dec=b_dec,
        k=k,
        apply_b_dec_to_input=not transcodes,
        **_places(checkpoint, transcodes),
        **extra,
    )


def _refuse_other_maths(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    if config.get("activation", "topk") not in ("topk", "groupmax"):
        raise ValueError(
            f"{checkpoint.name} has the activation {config['activation']!r}; what is known is 'topk' and 'groupmax'."
        )
    if config.get("signed"):
        raise ValueError(f"{checkpoint.name} is signed: its latents can be negative, those of an SAE here cannot.")
    if config.get("skip_connection") or checkpoint.has("W_skip"):
        raise ValueError(
            f"{checkpoint.name} is a transcoder with a skip connection: it adds a matrix times its input, which no "
            "SAE does."
        )


def _group_size(checkpoint: Checkpoint, num_latents: int, k: int | None) -> int:
    if not isinstance(k, int) or k < 1 or num_latents % k:
        raise ValueError(
            f"{checkpoint.name} keeps the largest of each of k groups; its {num_latents} latents do not fall into "
            f"k = {k} groups of one size."
        )
    return num_latents // k


def _places(checkpoint: Checkpoint, transcodes: bool) -> dict[str, str | None]:
    """Return the hookpoints from the folder's name, and the model from the run's config above it."""
    run = checkpoint.json_beside("config.json", up=1)
    model = hf_model_id(checkpoint.hints.base_model or run.get("model"))
    name = Path(checkpoint.name).parent.name
    looks_like_a_place = any(part in ("layers", "h", "embed_tokens", "wte") for part in name.split("."))
    if not looks_like_a_place:
        name = None
    if checkpoint.hints.hookpoint is None:
        hookpoint = kept_with_warning(name, from_sparsify(name, model) if name else None, model)
    else:
        hookpoint = checkpoint.hints.hookpoint
    if transcodes:  # from what goes into a module to what comes out of it
        inside = f"{hookpoint}:input" if hookpoint and ":" not in hookpoint else hookpoint
        return {"base_model": model, "hookpoint": inside, "output_hookpoint": hookpoint or "unknown"}
    return {"base_model": model, "hookpoint": hookpoint}


def objection(sae: SAEModel) -> str | None:
    """Return why sparsify has no sparse coder that computes this; `None` where it has one."""
    config = sae.config
    if config.activation_name != "topk":
        return f"its sparse coders are TopK, and this SAE is {config.activation_name}"
    groups = _groups(sae)
    return first_objection(
        (hasattr(config, "prefix_widths"), "its config has no place for prefix widths"),
        (config.input_normalization is not None, "its sparse coders do not normalise each hidden state"),
        (groups is not None and groups[0] * config.group_size != config.num_latents,
         "its groups are all of one size, and of this SAE latents were pruned"),
        (groups is not None and not groups[1], "its groups are runs of latents, and this SAE's are sorted or pruned"),
    )  # fmt: skip


def _groups(sae: SAEModel) -> tuple[int, bool] | None:
    """Return how many groups there are, and whether each is a run of neighbours in its order."""
    group_size = getattr(sae.config, "group_size", None)
    if group_size is None:
        return None
    groups = sae.latent_ids // group_size
    number = len(groups.unique())
    runs = groups.view(-1, group_size) if len(groups) == number * group_size else groups[None]
    return number, bool((runs == runs[:, :1]).all())


def write(sae: SAEModel, path: Path) -> None:
    """Write `cfg.json` and `sae.safetensors` into a folder, which sparsify expects to be named after the hookpoint."""
    transcodes, groups = sae.config.output_hookpoint is not None, _groups(sae)
    sae = plain(sae, subtracts=not transcodes)
    tensors, config = cpu_tensors(sae), sae.config
    state = {
        "encoder.weight": tensors["W_enc"],
        "encoder.bias": tensors["b_enc"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    content: dict[str, Any] = {
        "activation": "topk" if groups is None else "groupmax",
        "expansion_factor": max(1, config.num_latents // config.d_in),
        "normalize_decoder": bool((tensors["W_dec"].float().norm(dim=1) - 1).abs().max() < 1e-3),
        "num_latents": config.num_latents,
        "k": int(config.k) if groups is None else groups[0],
        "multi_topk": False,
        "skip_connection": False,
        "transcode": transcodes,
        "d_in": config.d_in,
    }
    with staged_files(path, keep_others=True, last="cfg.json") as staging:
        save_file(state, staging / "sae.safetensors")
        write_json(staging / "cfg.json", content)


FORMAT = Format("sparsify", claims, read, objection, write)
