"""`matryoshka-sae steer` on the embedded model."""

import pytest

from hf_matryoshka_sae import cli
from hf_matryoshka_sae.steering import Steering


def test_the_command_steers_measures_and_writes(tmp_path, capsys):
    pytest.importorskip("peft", reason="needs the extra `steering`")
    flags = ["--tokens", "300", "--new_tokens", "3", "--prompt", "Return a", "--auto_dose", "--max_cost", "0.05"]
    flags += ["--output_dir", str(tmp_path / "out"), "--export", "peft", "vectors"]
    assert cli.main(["steer", "embedded", "--latents", "5=1.0", "9=0.5", *flags]) == 0
    said = capsys.readouterr().out
    assert "times the values cost 0.05 nats" in said and "plain: Return a" in said and "steered: Return a" in said
    made = Steering.from_pretrained(tmp_path / "out")
    assert made.parts[0].latents == (5, 9) and made.parts[0].values[0] == 2 * made.parts[0].values[1]
    assert (tmp_path / "out/peft/adapter_config.json").is_file()
    assert (tmp_path / "out/vectors/steering-layer2.pt").is_file()


def test_mistakes_are_told_in_a_line(tmp_path, capsys):
    for flags, message in [
        (["--latents", "99999=1"], "got 99999"),
        (["--latents", "5", "--mode", "remove", "--tokens", "300", "--auto_dose"], "no value that could be larger"),
        (["--latents", "-5=1"], "got -5"),
        (["--latents", "5", "--mode", "erase", "--positions", "new"], "has no positions"),
        (["--latents", "5=1", "--export", "peft"], "pass --output_dir"),
    ]:
        assert cli.main(["steer", "embedded", *flags]) == 2
        assert message in capsys.readouterr().err
