"""`matryoshka-sae cache` on the embedded language model: parts, what it prints, what a run then reads."""

import json

import pytest
import yaml

from hf_matryoshka_sae import cli
from hf_matryoshka_sae.activations.cache.format import read_index
from hf_matryoshka_sae.activations.cache.storage import CacheStorage
from hf_matryoshka_sae.training import RunConfig, train

from .run.test_trainer import RUN


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**RUN, "output_dir": str(tmp_path / "run")}))
    return str(path)


def _cache(*arguments):
    return cli.main(["cache", *map(str, arguments)])


def _state(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_parts_of_several_launches_make_a_cache_that_a_run_reads(config, tmp_path, capsys, caplog):
    folder = tmp_path / "cache"
    build = (
        "--config",
        config,
        "--activation_cache",
        folder,
        "--tokens",
        "3000",
        "--activation_cache_dtype",
        "int8",
        "--of",
        2,
    )
    assert _cache(*build, "--shard", 1) == 0
    assert "not complete; --shard 0 has not ended" in capsys.readouterr().out
    assert _cache("--info", folder) == 2
    assert "--shard 0 has not ended" in capsys.readouterr().err
    assert _cache(*build, "--shard", 0) == 0
    printed = capsys.readouterr().out
    index = read_index(CacheStorage(folder))
    assert f"3,000 rows, {index.bytes / 1e6:.1f} MB, int8" in printed
    assert f"model.layers.1: d 128, relative squared error (FVU) {index.errors['model.layers.1']:.3g}" in printed
    before = _state(folder)
    assert _cache(*build, "--shard", 0) == 0 and _state(folder) == before  # there is nothing to do
    fields = {**RUN, "output_dir": str(tmp_path / "run"), "activation_cache": str(folder)}
    with caplog.at_level("WARNING"):
        train(RunConfig.from_dict(fields))
    assert "The activation cache has 3000 rows, the run needs 9120: it will read them 3.04 times" in caplog.text
    with pytest.raises(ValueError, match="dtype is int8 there, bf16 here"):
        train(RunConfig.from_dict({**fields, "resume": False, "activation_cache_dtype": "bf16"}))
    assert _state(folder) == before


def test_what_a_cache_is_and_whether_it_is_whole(config, tmp_path, capsys):
    folder = tmp_path / "cache"
    flags = ("--activation_cache", folder, "--context_length", 32, "--calibration_tokens", 1000, "--tokens", 2000)
    assert _cache("--config", config, *flags) == 0
    capsys.readouterr()
    assert _cache("--info", folder) == 0
    printed = capsys.readouterr().out
    assert "2,000 rows" in printed and "fp32" in printed and "context_length: 32" in printed
    assert "shards have their sizes" in printed
    shard = next(folder.glob("shard-*"))
    shard.write_bytes(shard.read_bytes() + b"x")
    assert _cache("--info", folder) == 2
    assert f"'{shard.name}' is missing or has not the size" in capsys.readouterr().err


def test_without_tokens_there_are_as_many_as_the_run_needs(config, tmp_path):
    assert _cache("--config", config, "--activation_cache", tmp_path / "cache") == 0
    index = json.loads((tmp_path / "cache/index.json").read_text())
    assert index["rows"] == RUN["tokens"] + RUN["calibration_tokens"]


def test_mistakes_are_told(config, tmp_path, capsys):
    folder = tmp_path / "cache"
    place = ("--config", config, "--activation_cache", folder)
    for arguments, message in {
        ("--config", config): "Say where to: --activation_cache FOLDER",
        (*place, "--shard", 2, "--of", 2): "--shard must lie between 0 and --of - 1 = 1",
        (
            "--config",
            config,
            "--activation_cache",
            folder,
            "--tokens",
            1,
            "--of",
            2,
        ): "at least 1 for each of 2 writers, got 1",
        ("--config", config, "--activation_cache", "nosuch://there/cache"): "cannot be reached",
        (*place, "--contxt_length", 4): "Unknown field `contxt_length`",
        ("--info", folder): "holds no complete activation cache",
    }.items():
        assert _cache(*arguments) == 2
        assert message in capsys.readouterr().err
    assert not folder.exists()
    build = (*place, "--tokens", 2000)
    assert _cache(*build) == 0
    before = _state(folder)
    assert _cache(*build, "--context_length", 16) == 2
    assert "made with something else: context_length is 64 there, 16 here" in capsys.readouterr().err
    assert _state(folder) == before
    with pytest.raises(SystemExit):
        _cache("--info", folder, "--context_length", 16)
    with pytest.raises(SystemExit):
        _cache("--activation_cache", folder)
