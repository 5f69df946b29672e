import pytest

from hf_matryoshka_sae.features import FeatureIndex
from hf_matryoshka_sae.features.command import main
from hf_matryoshka_sae.models import TopKSAE, TopKSAEConfig


@pytest.mark.slow
def test_the_command_builds_and_tells(tmp_path, capsys):
    config = TopKSAEConfig(d_in=128, num_latents=64, k=4, base_model="embedded", hookpoint="model.layers.1")
    TopKSAE(config).save_pretrained(tmp_path)
    for tokens, flags, split in ((700, [], "heldout"), (200, ["--split", "train"], "train")):
        assert main([str(tmp_path), "--tokens", f"{tokens}", "--context_length", "32", *flags]) == 0
        assert f"64 latents over {tokens} tokens" in capsys.readouterr().out
        dataset = FeatureIndex.open(tmp_path).about["dataset"]
        assert (dataset["path"], dataset["split"]) == ("embedded", split)
    assert main([str(tmp_path), "--hookpoint", "model.layer.9"]) == 2
    assert "No module matches" in capsys.readouterr().err
    assert main([str(tmp_path), "--dataset", str(tmp_path / "none.jsonl")]) == 2
    assert main([str(tmp_path / "nothing")]) == 2
    assert "no folder" in capsys.readouterr().err
    assert main([str(tmp_path), "--save_every", "0"]) == 2
    assert "`save_every`" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path), "--output_dir", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err
