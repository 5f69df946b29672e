"""Loading where the package is not installed: the same SAE, bit for bit, from the code in the repository."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from hf_matryoshka_sae import hub as sae_hub
from hf_matryoshka_sae.models import modeling_sae

from ..models.reference import VARIANTS, hidden_states, make_sae


# An interpreter that cannot import the package, whatever its path holds.
WITHOUT_PACKAGE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_matryoshka_sae":
            raise ModuleNotFoundError("No module named 'hf_matryoshka_sae'")

sys.meta_path.insert(0, Blocked())
try:
    import hf_matryoshka_sae
    raise SystemExit("the package can be imported")
except ModuleNotFoundError:
    pass
"""

LOAD = """
from safetensors.torch import load_file, save_file
from transformers import AutoModel

try:
    AutoModel.from_pretrained("tester/one")
    raise SystemExit("code of the repository ran unasked")
except ValueError as error:
    assert "trust_remote_code" in str(error), error
states = load_file("input.safetensors")
found = {}
for repo, revision, place in %r:
    for width in (5, None):
        sae = AutoModel.from_pretrained(
            repo, subfolder=place, revision=revision, trust_remote_code=True, width=width
        )
        assert type(sae).__module__.startswith("transformers_modules"), type(sae)
        latents = sae.encode(states["x"])
        key = f"{place}-{width}"
        found[key + "-latents"], found[key] = latents.to_dense(), sae.decode(latents)
        found[key + "-loss"] = sae(states["x"]).loss
        found[key + "-prefixes"] = sae.decode_prefixes(latents)
save_file({name: value.detach().contiguous() for name, value in found.items()}, "output.safetensors")
"""


def run(code: str, folder: Path, url: str) -> None:
    """Run Python code without the package in a folder, with an empty cache, against the loopback Hub."""
    environment = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "PYTHONPATH")}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT_PACKAGE + code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{code}\n{done.stderr}"


def results(sae, x: torch.Tensor) -> dict[str, torch.Tensor]:
    latents = sae.encode(x)
    return {
        "-latents": latents.to_dense(),
        "": sae.decode(latents),
        "-loss": sae(x).loss,
        "-prefixes": sae.decode_prefixes(latents),
    }


@pytest.mark.slow
def test_every_family_gives_equal_outputs_without_the_package_and_none_unasked(hub, tmp_path):
    """In folders of a repository and, of one SAE alone, at the root; the whole after a part."""
    saes = {variant: make_sae(variant, torch.float32, hookpoint=f"layers.{i}") for i, variant in enumerate(VARIANTS)}
    saes["normalised"] = make_sae("topk", torch.float32, hookpoint="layers.x", input_normalization="layer_norm")
    saes["pieces"] = make_sae("gated", torch.float32, hookpoint="layers.p")
    for name, sae in saes.items():
        size = 400 if name == "pieces" else "5GB"
        sae.save_pretrained(tmp_path / "run" / "sae" / sae.config.hookpoint, max_shard_size=size)
    assert (tmp_path / "run" / "sae" / "layers.p" / "latents.index.json").is_file()
    commit = sae_hub.push(tmp_path / "run", "tester/all", measure=False, show=False)
    HfApi().create_tag("tester/all", tag="v1", revision=commit.oid)
    places = {sae.config.hookpoint: sae for sae in saes.values()} | {
        "": make_sae("matryoshka-batch_topk", torch.float32)
    }
    places[""].push_to_hub("tester/one")
    x = hidden_states(40, dtype=torch.float32)
    save_file({"x": x}, tmp_path / "input.safetensors")
    revision = hub.repos["tester/one"].branches["main"]
    repositories = [("tester/all", "v1", place) if place else ("tester/one", revision, "") for place in places]
    run(LOAD % (repositories,), tmp_path, hub.url)
    found = load_file(tmp_path / "output.safetensors")
    for place, sae in places.items():
        for width, expected in ((None, sae), (5, sae.truncate(5))):
            for name, value in results(expected, x).items():
                assert torch.equal(found[f"{place}-{width}{name}"], value), (place, width, name)


@pytest.mark.release
def test_the_cards_snippets_run_as_printed(hub, tmp_path):
    sae = make_sae("matryoshka-batch_topk", torch.float32, d_in=128, hookpoint="model.layers.1", base_model="embedded")
    sae.save_pretrained(tmp_path / "run" / "sae" / "model.layers.1")
    sae_hub.push(tmp_path / "run", "tester/card", measure=False, show=False)
    sae.push_to_hub("tester/card-of-one")
    alone = []
    for repo in ("tester/card", "tester/card-of-one"):
        blocks = re.findall(r"```python\n(.*?)```", hub.files(repo)["README.md"].decode(), re.DOTALL)
        with_package, without = sorted(blocks, key=lambda block: "trust_remote_code" in block)
        assert all(f'"{repo}"' in block for block in blocks) and "trust_remote_code" not in with_package
        exec(compile(with_package, repo, "exec"), {})
        alone.append(without)
    run(f"for block in {alone!r}:\n    exec(compile(block, 'card', 'exec'), {{}})", tmp_path, hub.url)


def test_the_code_imports_only_what_a_reader_has():
    """Relative imports of files beside it; else the standard library and what transformers brings along."""
    folder = Path(modeling_sae.__file__).parent
    allowed = {"torch", "transformers", "huggingface_hub", "safetensors", *sys.stdlib_module_names}
    allowed.add("triton")  # inside `try`, tested by loading without it
    wrong = []
    for path in set(folder.glob("*.py")) - {folder / "__init__.py"}:
        for line in path.read_text().splitlines():
            relative = re.match(r"\s*from (\.+)(\S*) import", line)
            absolute = re.match(r"\s*(?:from|import) ([A-Za-z_]\w*)", line)
            if relative and not (relative[1] == "." and (folder / f"{relative[2]}.py").is_file()):
                wrong.append(f"{path.name}: {line}")
            elif absolute and absolute[1] not in allowed:
                wrong.append(f"{path.name}: {line}")
    assert not wrong
