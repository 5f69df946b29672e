# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_matryoshka_sae"]
#
# [tool.uv.sources]
# hf_matryoshka_sae = {path = "..", editable = true}
# ///
"""Make the SAE that ships with the package, with its statistics and feature index: about two minutes on two cores.

matryoshka-sae demo --output_dir runs/demo
python examples/train_embedded_sae.py runs/demo hf_matryoshka_sae/assets/sae
"""

import argparse
import shutil
from pathlib import Path

from transformers import AutoModel

import hf_matryoshka_sae  # noqa: F401  (registers the classes with AutoModel)
from hf_matryoshka_sae.evaluation import open_heldout
from hf_matryoshka_sae.features import IndexSizes, build_index
from hf_matryoshka_sae.progressive import latent_statistics


TEXT = {"path": "embedded", "split": "train"}
SIZES = IndexSizes(top_contexts=10, quantile_contexts=1, context_tokens=24)  # fewer than usual: it ships


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the demo's run")
    parser.add_argument("output_dir", type=Path)
    parsed = parser.parse_args()
    (source,) = (parsed.run / "matryoshka").iterdir()
    parsed.output_dir.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(source / name, parsed.output_dir / name)
    sae = AutoModel.from_pretrained(parsed.output_dir).eval()
    build_index(str(parsed.output_dir), dataset=TEXT, tokens=800_000, sizes=SIZES)
    data = open_heldout("embedded", sae.config.hookpoint, TEXT, tokens=200_000)
    latent_statistics(sae, data, attribution=True).save(parsed.output_dir)


if __name__ == "__main__":
    main()
