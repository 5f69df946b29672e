"""Small sound checkpoints of every format, which `checkpoints.py` then breaks. D = 16, F = 32, unless said."""

import json
import math
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_matryoshka_sae import CONFIGS, SAEModel, build_sae, convert
from hf_matryoshka_sae.progressive.statistics import LatentStatistics


D, F = 16, 32
OURS = ("relu", "topk", "batch_topk", "jumprelu", "gated", "matryoshka", "pieces", "shards", "collection")
BOMBS = ("bomb_npz", "bomb_wide_npz", "bomb_pt")
_HOOK = "blocks.2.hook_resid_post"


def write_seeds(folder: Path) -> list[str]:
    """Write one folder per checkpoint; returns their names."""
    torch.manual_seed(0)
    _write_ours(folder)
    _write_formats(folder)
    _write_smaller_formats(folder)
    _write_bombs(folder)
    return sorted(path.name for path in folder.iterdir())


def _sae(kind: str, **fields) -> SAEModel:
    sae = build_sae(CONFIGS[kind](d_in=D, num_latents=F, **fields)).eval()
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            if name == "threshold":
                tensor.copy_(torch.rand(F) * 0.5 + 0.1)
            elif tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape) * 0.3)
    return sae


def _write_ours(folder: Path) -> None:
    for kind in ("relu", "jumprelu", "gated"):
        _sae(kind).save_pretrained(folder / kind)
    _sae("topk", k=4, group_size=8, input_normalization="layer_norm").save_pretrained(folder / "topk")
    _sae("batch_topk", k=4).save_pretrained(folder / "batch_topk")
    nested = _sae("matryoshka", k=4, prefix_widths=[4, 16, F], prefix_weights=[1, 1, 2])
    nested.save_pretrained(folder / "matryoshka")
    nested.save_pretrained(folder / "pieces", max_shard_size=2000)
    _as_shards(folder / "matryoshka", folder / "shards")
    nested.save_pretrained(folder / "collection" / "layers.2")
    entry = {"model_type": "matryoshka_sae", "d_in": D, "num_latents": F, "prefix_widths": [4, 16, F]}
    entry |= {"base_model": None, "hookpoint": "layers.2"}
    _json(folder / "collection" / "config.json", {"model_type": "sae_collection", "saes": {"layers.2": entry}})
    shares = {name: torch.rand(F, dtype=torch.float64) for name in ("frequency", "mean", "mean_square")}
    shares |= {name: torch.rand(F, dtype=torch.float64) for name in ("contribution", "leave_one_out", "attribution")}
    neighbours = torch.randint(0, F, (F, 4))
    statistics = LatentStatistics(
        1000, torch.arange(F), neighbours=neighbours, cofiring=torch.rand(F, 4, dtype=torch.float64), **shares
    )
    statistics.save(folder / "statistics")


def _as_shards(source: Path, target: Path) -> None:
    """The same weights in two files with transformers' index."""
    target.mkdir()
    shutil.copy(source / "config.json", target)
    state = _state(source / "model.safetensors")
    shards = {f"model-0000{n}-of-00002.safetensors": sorted(state)[n - 1 :: 2] for n in (1, 2)}
    for name, held in shards.items():
        save_file({key: state[key] for key in held}, target / name, {"format": "pt"})
    weight_map = {key: name for name, held in shards.items() for key in held}
    _json(target / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": weight_map})


def _state(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def _write_formats(folder: Path) -> None:
    """What the package writes for other libraries."""
    nested = {"k": 4, "prefix_widths": [4, 16, F]}
    for name, format, sae in (
        ("saelens_matryoshka", "saelens", _sae("matryoshka", **nested)),
        ("saelens_gated", "saelens", _sae("gated")),
        ("saelens_jumprelu", "saelens", _sae("jumprelu")),
        ("saelens_topk", "saelens", _sae("topk", k=4)),
        ("sparsify", "sparsify", _sae("topk", k=4)),
        ("sparsify_groups", "sparsify", _sae("topk", k=4, group_size=8)),
        ("gemma_scope", "gemma_scope", _sae("jumprelu")),
        ("openai_relu", "openai", _sae("relu")),
        ("openai_topk", "openai", _sae("topk", k=4, input_normalization="layer_norm")),
        ("dictionary_relu", "dictionary_learning", _sae("relu")),
        ("dictionary_gated", "dictionary_learning", _sae("gated")),
        ("dictionary_topk", "dictionary_learning", _sae("topk", k=4)),
        ("dictionary_jumprelu", "dictionary_learning", _sae("jumprelu")),
        ("dictionary_matryoshka", "dictionary_learning", _one_threshold(_sae("matryoshka", **nested))),
    ):
        convert.save(sae, folder / name, format)


def _one_threshold(sae: SAEModel) -> SAEModel:
    sae.threshold.fill_(0.3)
    return sae


def _write_smaller_formats(folder: Path) -> None:
    """What the package only reads, from these libraries' layouts."""
    W_enc, W_dec, b_enc, b_dec = (torch.randn(*shape) * 0.3 for shape in ((F, D), (F, D), (F,), (D,)))
    threshold = torch.rand(F) * 0.5 + 0.1
    across, back = W_enc.T.contiguous(), W_dec.T.contiguous()
    named = {"W_enc": across, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
    linear = {"encoder.weight": W_enc, "encoder.bias": b_enc, "decoder.weight": back, "decoder.bias": b_dec}
    config = {
        "architecture": "jump_relu",
        "model_name": "gemma-v3-270m-pt",
        "hf_hook_point_in": "model.layers.2.output",
    }
    small = {"w_enc": across, "w_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, "threshold": threshold}
    _write(folder / "gemma_scope_2", small, "params.safetensors", config)
    config = {"d_model": D, "d_sae": F, "jump_relu_threshold": 0.3, "norm_activation": "dataset-wise"}
    config |= {"dataset_average_activation_norm": {"in": 7.0, "out": 7.0}, "hook_point_in": _HOOK}
    _write(folder / "llama_scope" / "checkpoints", linear, "final.safetensors")
    _json(folder / "llama_scope" / "hyperparams.json", config | {"sparsity_include_decoder_norm": True})
    state = {"W_E": across, "b_E": b_enc, "W_D": W_dec, "b_D": b_dec}
    state |= {f"dataset_average_activation_norm.{_HOOK}": torch.tensor(7.0)}
    state |= {"activation_function.log_jumprelu_threshold": threshold.log()}
    config = {"sae_type": "sae", "d_model": D, "act_fn": "jumprelu", "norm_activation": "dataset-wise"}
    config |= {"hook_point_in": _HOOK, "hook_point_out": _HOOK, "model_name": "meta-llama/Llama-3.1-8B"}
    _write(folder / "llamascopium", state, "sae_weights.safetensors", config)
    state = {"encoder.weight": W_enc, "decoder.weight": back, "pre_encoder_bias": b_dec}
    config = {"n_inputs": D, "n_latents": F, "k": 4, "standardize": True}
    _write(folder / "mlsae", state, "model.safetensors", config)
    state = {"encoder.weight": W_enc, "pre_bias": b_dec, "latent_bias": b_enc}
    config = {"input_dim": D, "hidden_dim": F, "k": 4, "normalize": True}
    _write(folder / "csr", state, "model.safetensors", config)
    state = {name.replace(".", "_linear."): tensor for name, tensor in linear.items()}
    _write(folder / "goodfire", state, "Llama-3.1-8B-Instruct-SAE-l19.pth")
    _write(folder / "nabeshima", named | {"normalizer.running_avg": torch.tensor([5.0])}, "matryoshka.pt")
    config = {"act_size": D, "dict_size": F, "top_k": 4, "model_name": "gpt2-small", "input_unit_norm": "True"}
    config |= {"hook_point": "blocks.8.hook_resid_pre", "group_sizes": str([4, 12, 16])}
    state = named | {"threshold": torch.tensor(0.3)}
    _write(folder / "bussmann", state, "sae.pt", config | {"sae_type": "global-matryoshka-topk"})
    state = named | {"jumprelu.log_threshold": threshold.log()}
    _write(folder / "bussmann_jumprelu", state, "sae.pt", config | {"sae_type": "jumprelu"})
    state = {"W_enc": W_enc, "W_dec": back, "b_enc": b_enc, "b_dec": b_dec}
    _write(folder / "qwen_scope" / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_5", state, "layer11.sae.pt")


def _write(folder: Path, state: dict[str, Tensor], name: str, config: dict | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (save_file if name.endswith(".safetensors") else torch.save)(state, folder / name)
    if config is not None:
        _json(folder / "config.json", config)


def _write_bombs(folder: Path) -> None:
    """Compressed zeros: a few hundred KB that say they are half a gigabyte."""
    latents, d_in = 2**16, 2**10
    shapes = {"W_enc": (d_in, latents), "W_dec": (latents, d_in), "b_enc": (latents,), "b_dec": (d_in,)}
    shapes["threshold"] = (latents,)
    _npz_of_zeros(folder / "bomb_npz" / "params.npz", shapes)
    _npz_of_zeros(folder / "bomb_wide_npz" / "params.npz", {"W_enc": (2**12, 2**15), "W_dec": (4, 4)})
    state = {"encoder.weight": torch.zeros(2**15, 2**11), "encoder.bias": torch.zeros(2**15)}
    state |= {"decoder.weight": torch.zeros(2**11, 2**15), "decoder.bias": torch.zeros(2**11)}
    plain, target = folder / "plain.pt", folder / "bomb_pt" / "ae.pt"
    torch.save(state, plain)
    target.parent.mkdir()
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as out:
        for entry in source.namelist():
            out.writestr(entry, source.read(entry))
    plain.unlink()


def _npz_of_zeros(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    file.parent.mkdir()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, shape in shapes.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array_header_1_0(entry, {"descr": "<f4", "fortran_order": False, "shape": shape})
                left, zeros = 4 * math.prod(shape), bytes(2**22)
                while left:
                    left -= entry.write(zeros[:left])


def _json(file: Path, content: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
