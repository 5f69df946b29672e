"""What commands say of themselves and of wrong arguments needs nothing heavy; classes register in any order."""

import ast
import json
import subprocess
import sys
from importlib import import_module

import pytest

import hf_matryoshka_sae
from hf_matryoshka_sae import cli, models
from hf_matryoshka_sae.training.config.spec import FAMILIES

from .test_house import modules


HEAVY = (
    *("torch", "transformers", "accelerate", "datasets", "numpy", "huggingface_hub", "safetensors"),
    *("pandas", "pyarrow", "scipy", "matplotlib", "gradio"),
)
OPTIONAL = ("matplotlib", "datasets", "evaluate", "gradio", "pandas", "wandb")
RUN = """
model: embedded
dataset: embedded
hookpoints: [model.layers.1]
saes: [{type: topk, k: 8, num_latents: 64}]
output_dir: never
"""
MISTAKES = {
    "train --config run.yaml --context_lenght 64": "Did you mean 'context_length'?",
    "train --config run.yaml --saes.0.kk 8": "Unknown field `saes.0.kk`",
    "train --config run.yaml --saes.0.type topkk": "`saes.0`: Unknown SAE family `type: topkk`. Did you mean 'topk'?",
    "train --config run.yaml --saes.0.k 1600": "`saes.0`: `k` must lie between 1 and num_latents (64), got 1600",
    "train --config run.yaml --saes.0.activation batchtopk": "Did you mean 'batch_topk'?",
    "train --config run.yaml --saes.0.preset papr": "Did you mean 'paper'?",
    "train --config run.yaml --model_dtype float23": "Did you mean 'float32'?",
    "train --config run.yaml --trackers [tensorbord]": "Did you mean 'tensorboard'?",
    "train --config run.yaml --dataset no/such.parquet": "does not exist",
    "train --config run.yaml --model ./no/such-model": "does not exist",
    "train --config run.yaml --batch_size many": "must be of type int",
    "train --config no/such.yaml": "There is no config file no/such.yaml",
    "cache --config run.yaml --shard 2 --of 2 --activation_cache x": "--shard must lie between 0 and --of - 1 = 1",
    "cache --config run.yaml --activation_cache_dtype int4": "Did you mean 'int8'?",
    "plan --config run.yaml --device h300": "Unknown device 'h300'",
    "plan --config run.yaml --hookpoints []": "`hookpoints` is empty",
    "sweep --config run.yaml --sweep.kk 3": "Unknown field `sweep.kk`",
    "sweep --points a.csv --batch_size 3": "--batch_size means nothing beside --points",
    "evaluate embedded --tokens 0": "`tokens` must be at least 1",
    "evaluate embedded --widths 8,x": "expected whole numbers such as 64,128,256, got '8,x'",
    "evaluate embedded --dataset no/such.parquet": "does not exist",
    "index embedded --top_contexts 0": "`top_contexts` must be at least 1",
    "index embedded --dataset no/such.parquet": "does not exist",
    "steer embedded --latents 5": "mode 'add' wants LATENT=VALUE, such as 1203=4.0, got '5'",
    "steer embedded --latents 5=x": "expected numbers such as 1203=4.0, got '5=x'",
    "steer embedded --latents 5=1 --output_dir x --export gguff": "Unknown format 'gguff'. Did you mean 'gguf'?",
    "space --port many": "invalid int value: 'many'",
    "push no/such/run user/name": "is no folder",
    "pull user/name --width 0": "`width` must be at least 1, got 0",
    "convert a b --to saelense": "Unknown format 'saelense'. Did you mean 'saelens'?",
    "convert a b --to qwen_scope": "qwen_scope is only read",
    "toy --steps 0": "`steps` must be above 0",
    "synthetic --trees 600": "`trees` must lie between 0 and `features` (512), got 600",
    "synthetic --recipes run.yaml --p_max 2": "Expected 0 < `p_min` <= `p_max` < 1",
    "demo --tokens 5": "unrecognized arguments: --tokens 5",
}
SCRIPT = f"""
import contextlib, io, json, sys
from hf_matryoshka_sae import cli
said = {{}}
for command in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(command.split())
        except SystemExit as end:
            status = end.code
    heavy = [name for name in {HEAVY} if name in sys.modules]
    assert not heavy, f"{{command}} imports {{heavy}}"
    said[command] = status, out.getvalue() + err.getvalue()
print(json.dumps(said))
"""


def python(code: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Status and words of the help of every command and of every mistake, from one process without heavy modules."""
    folder = tmp_path_factory.mktemp("light")
    (folder / "run.yaml").write_text(RUN)
    helps = ["--help", *(f"{command} --help" for command in (*cli.COMMANDS, "demo"))]
    done = python(SCRIPT, json.dumps([*helps, *MISTAKES]), cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_help_of_every_command_says_what_each_flag_means(said):
    for command in (*cli.COMMANDS, "demo"):
        status, text = said[f"{command} --help"]
        assert status == 0 and f"matryoshka-sae {command}" in text
        assert command in said["--help"][1]
        flags = text.replace("\n" + " " * 24, "  ").splitlines()  # argparse goes on below a long flag
        bare = [line for line in flags if line.startswith("  --") and len(line.split("  ")) < 3]
        assert not bare, bare


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_told_before_anything_heavy_is_imported(said, command):
    status, text = said[command]
    assert status == 2 and MISTAKES[command] in text


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


def test_names_that_are_imported_on_use_are_no_files():
    """Whoever had imported the file would get it in place of the name."""
    for room, path in modules().items():
        if path.name == "__init__.py" and "imports_on_use" in path.read_text():
            (block,) = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.If))
            names = {alias.name for line in block.body for alias in line.names}
            assert not [name for name in names if f"{room}.{name}" in modules()], room
            assert names <= set(dir(import_module(room))), room


def test_names_of_the_package_are_those_of_the_models():
    assert set(hf_matryoshka_sae.__all__) == {"__version__", *models.__all__}
    assert set(FAMILIES) == set(models.CONFIGS)
    with pytest.raises(AttributeError, match="no attribute 'TopKSAF'"):
        hf_matryoshka_sae.TopKSAF  # noqa: B018
