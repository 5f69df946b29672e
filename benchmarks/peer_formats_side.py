"""The half of peer_formats.py that runs where the other libraries are installed. It imports nothing of this package.

    python peer_formats_side.py read FOLDER    # what each library makes of the exports in FOLDER
    python peer_formats_side.py write FOLDER   # SAEs of each library's own classes, and what they give

An export is a folder with `job.json` (`{"library": ...}`), `input.safetensors` and the files. What a library gives
lies beside it in `expected.safetensors`: `input`, `latents` and `reconstruction`.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


SHAPES = ((16, 64), (32, 32), (48, 96), (24, 10))  # d_in, num_latents: also as many, and fewer, than dimensions
TOKENS = 200


def evaluate_saelens(folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    latents = sae.encode(x)
    return latents, sae.decode(latents)


def evaluate_dictionary_learning(folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from dictionary_learning.dictionary import AutoEncoder
    from dictionary_learning.utils import load_dictionary

    kind = json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
    if kind == "AutoEncoder":  # by default it loads latents in units of their contribution
        dictionary = AutoEncoder.from_pretrained(folder / "ae.pt", normalize_decoder=False)
    else:
        dictionary, _ = load_dictionary(str(folder), "cpu")
    latents = dictionary.encode(x)
    return latents, dictionary.decode(latents)


def evaluate_sparsify(folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from sparsify import SparseCoder

    return _of_sparse_coder(SparseCoder.load_from_disk(folder), x)


def _of_sparse_coder(coder, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    top_acts, top_indices, _ = coder.encode(x)
    latents = torch.zeros(len(x), coder.num_latents).scatter(-1, top_indices, top_acts)
    return latents, coder.decode(top_acts, top_indices)


READERS = {
    "saelens": evaluate_saelens,
    "dictionary_learning": evaluate_dictionary_learning,
    "sparsify": evaluate_sparsify,
}


@torch.no_grad()
def read(root: Path) -> None:
    """Write what each library gives for the exports of this package."""
    for job in sorted(root.rglob("job.json")):
        x = load_file(job.parent / "input.safetensors")["input"]
        evaluate = READERS[json.loads(job.read_text())["library"]]
        _record(job.parent, x, *evaluate(job.parent, x))


def _record(folder: Path, x: torch.Tensor, latents: torch.Tensor, reconstruction: torch.Tensor) -> None:
    tensors = {"input": x, "latents": latents, "reconstruction": reconstruction}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "expected.safetensors")


@torch.no_grad()
def randomize(module: torch.nn.Module) -> None:
    """Random weights; no bias and no threshold is 0, and decoder rows have different lengths."""
    for name, tensor in module.state_dict().items():
        if name in ("k", "group_sizes"):
            continue
        if "threshold" in name:
            tensor.copy_(torch.rand_like(tensor) * 0.5 + 0.1)
        elif tensor.dim() == 2:
            tensor.copy_(torch.randn_like(tensor) / tensor.shape[0] ** 0.5)
        else:
            tensor.copy_(torch.randn_like(tensor) * 0.3)


def saelens_saes(d_in: int, d_sae: int) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Names, and functions that save an SAE and return what evaluates it."""
    import sae_lens

    sizes = {"d_in": d_in, "d_sae": d_sae}
    k = max(1, d_sae // 8)
    options = {
        "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig, {}),
        "standard layer_norm": (
            sae_lens.StandardSAE,
            sae_lens.StandardSAEConfig,
            {"normalize_activations": "layer_norm"},
        ),
        "standard constant_norm": (
            sae_lens.StandardSAE,
            sae_lens.StandardSAEConfig,
            {"normalize_activations": "constant_norm_rescale"},
        ),
        "standard expected_average": (
            sae_lens.StandardSAE,
            sae_lens.StandardSAEConfig,
            {"normalize_activations": "expected_average_only_in"},
        ),
        "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig, {}),
        "jumprelu no b_dec": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig, {"apply_b_dec_to_input": False}),
        "gated": (sae_lens.GatedSAE, sae_lens.GatedSAEConfig, {}),
        "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig, {"k": k}),
        "topk k=1 layer_norm": (
            sae_lens.TopKSAE,
            sae_lens.TopKSAEConfig,
            {"k": 1, "normalize_activations": "layer_norm"},
        ),
        "topk rescaled": (
            sae_lens.TopKSAE,
            sae_lens.TopKSAEConfig,
            {"k": k, "rescale_acts_by_decoder_norm": True},
        ),
        "transcoder": (
            sae_lens.Transcoder,
            sae_lens.TranscoderConfig,
            {"d_out": d_in, "apply_b_dec_to_input": False},
        ),
        "jumprelu transcoder": (
            sae_lens.JumpReLUTranscoder,
            sae_lens.JumpReLUTranscoderConfig,
            {"d_out": d_in, "apply_b_dec_to_input": False},
        ),
    }
    for name, (sae_class, config_class, fields) in options.items():

        def save(folder: Path, sae_class=sae_class, config_class=config_class, fields=fields):
            sae = sae_class(config_class(**sizes, **fields))
            randomize(sae)
            sae.save_model(folder)
            return sae

        yield name, save
    nested = sorted({max(1, d_sae // 4), max(1, d_sae // 2), d_sae})
    for name, sae_class, config_class, fields in (
        ("batchtopk", sae_lens.BatchTopKTrainingSAE, sae_lens.BatchTopKTrainingSAEConfig, {}),
        (
            "matryoshka_batchtopk",
            sae_lens.MatryoshkaBatchTopKTrainingSAE,
            sae_lens.MatryoshkaBatchTopKTrainingSAEConfig,
            {"matryoshka_widths": nested},
        ),
    ):
        for rescaled in (True, False):
            for trained in (False, True):

                def save(
                    folder: Path,
                    sae_class=sae_class,
                    config_class=config_class,
                    fields=fields,
                    rescaled=rescaled,
                    trained=trained,
                ):
                    config = config_class(**sizes, **fields, k=k, rescale_acts_by_decoder_norm=rescaled)
                    sae = sae_class(config)
                    randomize(sae)
                    if trained:  # a checkpoint of training; judged by its finished form
                        sae.save_model(folder)
                    finished = folder.parent / f"{folder.name} finished" if trained else folder
                    sae.save_inference_model(finished)
                    return sae_lens.SAE.load_from_disk(finished)

                kind = " checkpoint" if trained else ""
                yield f"{name}{'' if rescaled else ' not rescaled'}{kind}", save


def dictionaries(d_in: int, size: int) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """The same for dictionary_learning."""
    from dictionary_learning import dictionary as plain
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    k = max(1, size // 8)
    first = max(1, size // 4)
    makers = {
        "AutoEncoder": lambda: plain.AutoEncoder(d_in, size),
        "AutoEncoderNew": lambda: plain.AutoEncoderNew(d_in, size),
        "GatedAutoEncoder": lambda: plain.GatedAutoEncoder(d_in, size),
        "JumpReluAutoEncoder": lambda: plain.JumpReluAutoEncoder(d_in, size),
        "AutoEncoderTopK": lambda: AutoEncoderTopK(d_in, size, k),
        "BatchTopKSAE": lambda: BatchTopKSAE(d_in, size, k),
        "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(d_in, size, k, [first, first, size - 2 * first]),
    }
    for name, make in makers.items():

        def save(folder: Path, name=name, make=make):
            dictionary = make()
            randomize(dictionary)
            torch.save(dictionary.state_dict(), folder / "ae.pt")
            trainer = {"dict_class": name, "activation_dim": d_in, "dict_size": size, "layer": 1, "k": k}
            trainer |= {"lm_name": "EleutherAI/pythia-70m-deduped", "submodule_name": "resid_post_layer_1"}
            config = {"trainer": trainer, "buffer": {"d_submodule": d_in, "io": "out"}}
            (folder / "config.json").write_text(json.dumps(config))
            return dictionary

        yield name, save


def sparse_coders(d_in: int, num_latents: int) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """The same for sparsify."""
    from sparsify import SparseCoder, SparseCoderConfig

    options = {
        "topk": {"k": max(1, num_latents // 8), "num_latents": num_latents},
        "groupmax": {"k": 2, "num_latents": num_latents, "activation": "groupmax"},
        "transcoder": {"k": 3, "num_latents": num_latents, "transcode": True},
        "expansion factor": {"k": 3, "num_latents": 0, "expansion_factor": 2, "normalize_decoder": False},
    }
    for name, fields in options.items():

        def save(folder: Path, fields=fields):
            coder = SparseCoder(d_in, SparseCoderConfig(**fields))
            randomize(coder)
            coder.save_to_disk(folder)
            return coder

        yield name, save


@torch.no_grad()
def write(root: Path) -> None:
    """Save SAEs of each library's classes, and what they give."""
    for d_in, size in SHAPES:
        for library, makers in (
            ("saelens", saelens_saes),
            ("dictionary_learning", dictionaries),
            ("sparsify", sparse_coders),
        ):
            for name, save in makers(d_in, size):
                folder = root / library / name / f"{d_in} x {size}"
                folder.mkdir(parents=True)
                sae = save(folder)
                x = torch.randn(TOKENS, d_in) * 1.5 + 0.2
                if library == "sparsify":
                    _record(folder, x, *_of_sparse_coder(sae, x))
                else:
                    latents = sae.encode(x)
                    _record(folder, x, latents, sae.decode(latents))


if __name__ == "__main__":
    torch.manual_seed(0)
    {"read": read, "write": write}[sys.argv[1]](Path(sys.argv[2]))
