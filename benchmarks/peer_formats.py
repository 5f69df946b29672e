"""SAEs exchanged with the libraries themselves: what is exported is loaded there, what they save is loaded here.

    python benchmarks/peer_formats.py --peers-python ../peers/bin/python

The other Python has sae-lens, dictionary-learning and eai-sparsify (their dependencies may clash with this package's):

    python -m venv ../peers
    ../peers/bin/pip install sae-lens==6.54.12 dictionary-learning==0.1.0 eai-sparsify==1.3.3

Weights are random, no bias and no threshold is 0, and there are more, as many and fewer latents than dimensions. The
table has the largest absolute difference over all shapes, of latents and of reconstructions, in fp32. Exit status 1
where one exceeds 1e-5.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peer_formats_side import SHAPES, TOKENS
from safetensors.torch import load_file, save_file

from hf_matryoshka_sae import CONFIGS, SAEModel, build_sae, convert


TOLERANCE = 1e-5
LIBRARIES = ("saelens", "dictionary_learning", "sparsify")

VARIANTS = {
    "matryoshka batch_topk": {"type": "matryoshka", "activation": "batch_topk", "one_threshold": True},
    "matryoshka batch_topk, scaled": {
        "type": "matryoshka",
        "activation": "batch_topk",
        "scale_by_decoder_norm": True,
        "one_threshold": True,
    },
    "matryoshka batch_topk, many thresholds": {"type": "matryoshka", "activation": "batch_topk"},
    "matryoshka relu": {"type": "matryoshka", "activation": "relu"},
    "matryoshka topk": {"type": "matryoshka", "activation": "topk"},
    "matryoshka jumprelu": {"type": "matryoshka", "activation": "jumprelu"},
    "relu": {"type": "relu"},
    "relu, b_dec only added": {"type": "relu", "apply_b_dec_to_input": False},
    "relu, scaled": {"type": "relu", "scale_by_decoder_norm": True},
    "relu, layer_norm": {"type": "relu", "input_normalization": "layer_norm"},
    "relu, constant_norm": {"type": "relu", "input_normalization": "constant_norm"},
    "relu transcoder": {"type": "relu", "output_hookpoint": "model.layers.1.mlp"},
    "topk": {"type": "topk"},
    "topk, b_dec only added": {"type": "topk", "apply_b_dec_to_input": False},
    "topk, scaled": {"type": "topk", "scale_by_decoder_norm": True},
    "topk, layer_norm": {"type": "topk", "input_normalization": "layer_norm"},
    "topk, groups": {"type": "topk", "group_size": 2},
    "topk transcoder": {"type": "topk", "output_hookpoint": "model.layers.1.mlp"},
    "batch_topk": {"type": "batch_topk", "one_threshold": True},
    "batch_topk, scaled": {"type": "batch_topk", "scale_by_decoder_norm": True, "one_threshold": True},
    "jumprelu": {"type": "jumprelu"},
    "jumprelu, b_dec only added": {"type": "jumprelu", "apply_b_dec_to_input": False},
    "jumprelu transcoder": {"type": "jumprelu", "output_hookpoint": "model.layers.1.mlp"},
    "gated": {"type": "gated"},
    "gated, b_dec only added": {"type": "gated", "apply_b_dec_to_input": False},
    "gated, scaled": {"type": "gated", "scale_by_decoder_norm": True},
}


def random_sae(d_in: int, num_latents: int, variant: dict) -> SAEModel:
    """An SAE with random weights; no bias and no threshold is 0, and decoder rows have different lengths."""
    fields = {"d_in": d_in, "num_latents": num_latents, "hookpoint": "model.layers.1"} | variant
    kind, one_threshold = fields.pop("type"), fields.pop("one_threshold", False)
    config_class = CONFIGS[kind]
    if hasattr(config_class, "k"):
        fields["k"] = max(1, num_latents // 8)
    if "group_size" in fields:
        fields["k"] = num_latents // fields["group_size"]
    if kind == "matryoshka":
        fields["prefix_widths"] = sorted({max(1, num_latents // 4), max(1, num_latents // 2), num_latents})
    sae = build_sae(config_class(**fields)).eval()
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            if name == "threshold":
                tensor.copy_((torch.rand(()) if one_threshold else torch.rand(num_latents)) * 0.5 + 0.1)
            elif name != "latent_ids":
                tensor.copy_(torch.randn(tensor.shape) * (tensor.shape[-1] ** -0.5 if tensor.dim() == 2 else 0.3))
    return sae


@torch.no_grad()
def export(root: Path) -> dict[Path, SAEModel]:
    """Write every SAE in every format that can express it."""
    exported = {}
    for name, variant in VARIANTS.items():
        for d_in, num_latents in SHAPES:
            sae = random_sae(d_in, num_latents, variant)
            for library in [name for name in LIBRARIES if name in convert.able_to_write(sae)]:
                folder = root / library / name / f"{d_in} x {num_latents}"
                convert.save(sae, folder, library)
                (folder / "job.json").write_text(json.dumps({"library": library}))
                save_file({"input": torch.randn(TOKENS, d_in) * 1.5 + 0.2}, folder / "input.safetensors")
                exported[folder] = sae
    return exported


@torch.no_grad()
def differences(sae: SAEModel, folder: Path) -> tuple[float, float]:
    """The largest absolute differences of latents and of reconstructions from what the library gives."""
    expected = load_file(folder / "expected.safetensors")
    latents = sae.encode(expected["input"])
    of_latents = (latents.to_dense() - expected["latents"]).abs().max().item()
    found = (sae.decode(latents), sae(expected["input"]).reconstruction)
    return of_latents, max((each - expected["reconstruction"]).abs().max().item() for each in found)


def run_there(python: str, verb: str, folder: Path) -> None:
    """Run the other half where the libraries are."""
    script = Path(__file__).with_name("peer_formats_side.py")
    environment = os.environ | {"SPARSIFY_DISABLE_TRITON": "1"}
    result = subprocess.run(
        [python, str(script), verb, str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode:
        sys.exit(f"{python} {script.name} {verb} failed:\n{result.stderr[-3000:]}")


def report(title: str, rows: dict[tuple[str, str], list[tuple[float, float]]]) -> float:
    """Print a table with a line per library and SAE, over all shapes; returns the largest difference."""
    lines = [title, f"{'library':<20} {'SAE':<46} {'shapes':>6} {'latents':>9} {'recon.':>9}"]
    for (library, name), found in rows.items():
        latents, reconstructions = (max(each) for each in zip(*found, strict=True))
        lines.append(f"{library:<20} {name:<46} {len(found):>6} {latents:>9.1e} {reconstructions:>9.1e}")
    sys.stdout.write("\n".join(lines) + "\n\n")
    return max(max(pair) for found in rows.values() for pair in found)


def main() -> int:
    """Both directions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers-python", required=True, help="the python of an environment with the libraries")
    parsed = parser.parse_args()
    logging.disable(logging.WARNING)  # names of models that nobody gave
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        ours, theirs = Path(temporary, "ours"), Path(temporary, "theirs")
        theirs.mkdir()
        exported = export(ours)
        run_there(parsed.peers_python, "read", ours)
        run_there(parsed.peers_python, "write", theirs)
        there: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for folder, sae in exported.items():
            there.setdefault(folder.parts[-3:-1], []).append(differences(sae, folder))
        here: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for file in sorted(theirs.rglob("expected.safetensors")):
            key = file.parent.parts[-3:-1]
            here.setdefault(key, []).append(differences(convert.load(file.parent), file.parent))
    worst = max(report("Exported here, loaded there", there), report("Saved there, loaded here", here))
    sys.stdout.write(f"largest difference {worst:.1e} (at most {TOLERANCE:.0e} is asked for)\n")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
