"""What is wrong with a run's fields is told before torch; the classes register in whatever order packages come."""

import subprocess
import sys

import pytest

import hf_matryoshka_sae
from hf_matryoshka_sae import models
from hf_matryoshka_sae.training.config.spec import FAMILIES


HEAVY = ("torch", "transformers", "accelerate", "datasets", "numpy", "huggingface_hub")
OPTIONAL = ("matplotlib", "datasets", "evaluate", "gradio", "pandas", "wandb")


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_wrong_fields_are_told_before_anything_heavy_is_imported(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "model: embedded\ndataset: embedded\nhookpoints: [model.layers.1]\n"
        "saes: [{type: topk, k: 8, num_latents: 64}]\noutput_dir: never\n"
    )
    mistakes = {
        "--context_lenght 64": "Did you mean 'context_length'?",
        "--saes.0.kk 8": "Unknown field `saes.0.kk`",
        "--saes.0.type topkk": "Did you mean 'topk'?",
        "--saes.0.activation batchtopk": "Did you mean 'batch_topk'?",
        "--saes.0.preset papr": "Did you mean 'paper'?",
        "--model_dtype float23": "Did you mean 'float32'?",
        "--trackers [tensorbord]": "Did you mean 'tensorboard'?",
        "--dataset no/such.parquet": "does not exist",
        "--model ./no/such-model": "does not exist",
        "--batch_size many": "must be of type int",
    }
    code = f"""
import sys
from hf_matryoshka_sae.train import main
for flags in {list(mistakes)!r}:
    assert main(["--config", {str(tmp_path / "run.yaml")!r}, *flags.split()]) == 2
assert main(["--config", "no/such.yaml"]) == 2
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, loaded
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line]
    for line, expected in zip(lines, [*mistakes.values(), "There is no config file no/such.yaml"], strict=True):
        assert expected in line


@pytest.mark.slow
@pytest.mark.parametrize("first", ["hf_matryoshka_sae", "transformers"])
def test_classes_register_whichever_package_is_imported_first_and_nothing_optional_is(first):
    second = {"hf_matryoshka_sae": "transformers", "transformers": "hf_matryoshka_sae"}[first]
    code = f"""
import sys, {first}
loaded = [name for name in {OPTIONAL!r} if name in sys.modules]
assert not loaded or {first!r} == "transformers", loaded
import {second}
from transformers import AutoConfig, AutoModel
config = AutoConfig.for_model("topk_sae", d_in=4, num_latents=8, k=2)
sae = AutoModel.from_config(config)
import hf_matryoshka_sae
assert type(sae) is hf_matryoshka_sae.TopKSAE
assert hf_matryoshka_sae.SAEModel.publisher is not None
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_names_of_the_package_are_those_of_the_models():
    assert set(hf_matryoshka_sae.__all__) == {"__version__", *models.__all__}
    assert set(FAMILIES) == set(models.CONFIGS)
    with pytest.raises(AttributeError, match="no attribute 'TopKSAF'"):
        hf_matryoshka_sae.TopKSAF  # noqa: B018
