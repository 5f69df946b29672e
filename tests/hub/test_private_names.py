"""What is pushed names Hub ids, and no file, folder or machine of whoever pushes."""

import json
import re
import socket
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModel

from hf_matryoshka_sae import TopKSAE, TopKSAEConfig
from hf_matryoshka_sae.assets import embedded_text, load_embedded_lm
from hf_matryoshka_sae.features import build_index
from hf_matryoshka_sae.hub import measure_run, push
from hf_matryoshka_sae.hub.card_text import text_words
from hf_matryoshka_sae.hub.command import push_main
from hf_matryoshka_sae.hub.public import hub_id, public_index

from .. import tiny_run
from .test_card import edit


REPO = "someone/sae"
MARK = "zebra"  # part of every name that is nobody's business
NESTED = "nested/model.layers.0"


def written(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def dry_run(run, target) -> dict[str, bytes]:
    assert push_main([str(run), REPO, "--no_measure", "--dry_run", str(target)]) == 0
    return written(target)


def assert_nothing_private(files: dict[str, bytes], place: Path) -> None:
    private = (MARK.encode(), str(place).encode())
    leaks = {name: word for name, data in files.items() for word in private if word in data or word in name.encode()}
    assert not leaks
    host = rb"\b" + socket.gethostname().encode() + rb"\b"
    text = [data for name, data in files.items() if not name.endswith((".png", ".parquet", ".safetensors", ".py"))]
    assert not any(re.search(host, data) for data in text)


@pytest.fixture
def private_run(run_copy, tmp_path, monkeypatch):
    """The measured run, as if all that it was made from lay in folders of this machine."""
    build_index(run_copy / NESTED, tokens=300, context_length=32, lm_batch_size=4, show=False)
    run, place = run_copy.rename(tmp_path / f"{MARK}-out"), tmp_path / f"{MARK}-place"
    monkeypatch.chdir(tmp_path)
    names = {name: place / f"{MARK}-{name}" for name in ("lm", "text", "first", "base", "cache")}
    for path in names.values():
        path.mkdir(parents=True)

    def move(fields):
        fields |= {"model": str(names["lm"]), "output_dir": f"runs/{MARK}-out", "init_from": None}
        fields |= {"dataset": {"path": f"{place.name}/{MARK}-text"}, "eval_dataset": {"path": f"{place}/{MARK}.txt"}}
        fields["activation_cache"] = f"~/{MARK}-cache"
        fields["saes"][0] |= {"grow_from": str(names["base"]), "freeze_base": False}
        fields["saes"][1]["init_from"] = f"{place.name}/{MARK}-first"

    def remember(fields):
        command = (
            f"matryoshka-sae train --config {MARK}.yaml --dataset.path={MARK}-text --model '{MARK}-lm/' "
            f"--output_dir runs/{MARK}-out --saes.0.grow_from={MARK}-base --tokens 9"
        )
        fields["sessions"][0]["command"] = command
        fields["on_this_machine"] = ["dataset", "eval_dataset", "model"]  # as earlier versions wrote it

    edit(run / "run.yaml", move)
    edit(run / "provenance.json", remember)
    for config in run.glob("*/*/config.json"):
        edit(config, lambda fields: fields.update(base_model=str(names["lm"])))
    edit(
        run / NESTED / "features" / "index.json",
        lambda about: about.update(
            base_model=f"{MARK}-lm", tokenizer=f"{MARK}-lm", dataset=about["dataset"] | {"path": f"{MARK}-text"}
        ),
    )
    return run


def test_no_name_of_a_local_file_or_folder_is_pushed(private_run, tmp_path):
    files = dry_run(private_run, tmp_path / "repo")
    assert f"{NESTED}/features/index.json" in files
    assert_nothing_private(files, tmp_path)
    text = files["README.md"].decode()
    (shown,) = [yaml.safe_load(part.split("```")[0]) for part in text.split("```yaml\n")[1:]]
    assert shown["model"] == "a local language model" and shown["saes"][1]["init_from"] == "a local SAE"
    assert shown["dataset"]["path"] == shown["eval_dataset"]["path"] == "a local data set"
    assert "train --config run.yaml '--dataset.path=a local data set' --model 'a local language model" in text
    assert "base_model" not in json.loads(files[f"{NESTED}/config.json"])
    assert json.loads(files["config.json"])["saes"][NESTED]["base_model"] is None
    assert ModelCard(text).data.base_model is None


def test_one_sae_of_it_is_pushed_without_the_name_of_its_folder(private_run, tmp_path, hub):
    alone = private_run / f"{MARK}-alone"
    (private_run / NESTED).rename(alone)
    push(alone, REPO, measure=False, show=False)
    assert_nothing_private(hub.files(REPO), tmp_path)
    AutoModel.from_pretrained(alone).push_to_hub("someone/other")
    assert_nothing_private(hub.files("someone/other"), tmp_path)
    assert hub.messages == ["Push model.layers.0", "Push MatryoshkaSAE"]


def test_hub_ids_stay(run_copy, tmp_path):
    def publish(fields):
        fields |= {"model": "org/llm", "dataset": {"path": "org/text"}, "init_from": "org/first"}

    edit(run_copy / "run.yaml", publish)
    edit(run_copy / NESTED / "config.json", lambda fields: fields.update(base_model="org/llm"))
    files = dry_run(run_copy, tmp_path / "repo")
    text = files["README.md"].decode()
    assert "model: org/llm" in text and "path: org/text" in text and "init_from: org/first" in text
    assert json.loads(files[f"{NESTED}/config.json"])["base_model"] == "org/llm"
    assert ModelCard(text).data.base_model == "org/llm" and ModelCard(text).data.datasets == ["org/text"]
    about = {"base_model": "org/llm", "tokenizer": "org/llm", "dataset": {"path": "org/text", "split": "train"}}
    assert public_index(about, "org/llm") == about


def test_a_model_that_was_a_folder_in_training_is_no_hub_id_elsewhere(run_copy, tmp_path):
    edit(run_copy / "run.yaml", lambda fields: fields.update(model="models/lm"))
    edit(run_copy / "provenance.json", lambda fields: fields.update(on_this_machine=["model"]))
    edit(run_copy / NESTED / "config.json", lambda fields: fields.update(base_model="models/lm"))
    files = dry_run(run_copy, tmp_path / "repo")
    assert b"models/lm" not in files["README.md"] + files[f"{NESTED}/config.json"] + files["config.json"]
    assert hub_id("models/lm") == "models/lm"


def test_text_that_an_evaluation_names_is_linked_where_it_has_an_owner():
    assert text_words("zebra-folder") == text_words("./zebra.txt") == "a local data set, column `text`"
    assert text_words("org/text").startswith("[org/text](https://huggingface.co/datasets/org/text)")
    assert "`embedded`, split `heldout`" in text_words("embedded")


@pytest.mark.release
def test_a_run_of_local_files_alone_is_pushed_without_their_names(tmp_path, monkeypatch):
    place = tmp_path / f"{MARK}-place"
    names = {
        name: str(place / f"{MARK}-{name}") for name in ("lm", "text.jsonl", "heldout.txt", "first", "out", "cache")
    }
    for part in load_embedded_lm():
        part.save_pretrained(names["lm"])
    Path(names["text.jsonl"]).write_text("".join(json.dumps({"text": text}) + "\n" for text in embedded_text()[:300]))
    Path(names["heldout.txt"]).write_text("\n\n".join(embedded_text("heldout")[:80]))
    torch.manual_seed(0)
    first = TopKSAE(TopKSAEConfig(d_in=128, num_latents=64, k=4, hookpoint="model.layers.0", base_model=names["lm"]))
    first.save_pretrained(names["first"])
    flags = ["--config", f"{place}/{MARK}.yaml", "--dataset.path", names["text.jsonl"], "--output_dir", names["out"]]
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python", "-m", "hf_matryoshka_sae.train", *flags])
    run = tiny_run.run(
        Path(names["out"]),
        model=names["lm"],
        dataset={"path": names["text.jsonl"]},
        eval_dataset={"path": names["heldout.txt"]},
        activation_cache=names["cache"],
        hookpoints=["model.layers.0"],
        saes=[
            {"type": "topk", "name": "on", "init_from": names["first"]},
            {"name": "grown", "activation": "topk", "grow_from": names["first"], "num_latents": 96, "k": 6},
        ],
    )
    measure_run(run, show=False)
    build_index(run / "on" / "model.layers.0", dataset=names["text.jsonl"], tokens=300, context_length=32, show=False)
    files = dry_run(run, tmp_path / "repo")
    assert "on/model.layers.0/features/index.json" in files and "plots/evaluation.png" in files
    assert_nothing_private(files, tmp_path)
    assert "--config run.yaml --dataset.path 'a local data set' --output_dir runs/sae" in files["README.md"].decode()
