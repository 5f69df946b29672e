"""`matryoshka-sae space`, where it does not come to serving."""

import socket
import subprocess
import sys

import pytest

from hf_matryoshka_sae import cli
from hf_matryoshka_sae.assets import embedded_sae_path


def test_help_says_what_can_be_given(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["space", "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for option in (
        "REPO_OR_DIR",
        "--model",
        "--dataset",
        "--tokens",
        "--port",
        "--host",
        "--share",
        "--mcp",
        "--most_gigabytes",
    ):
        assert option in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nobody/nothing"], "'nobody/nothing' cannot be opened"),
        ([str(embedded_sae_path() / "features")], "holds no SAE"),
        (["--tokens", "0"], "at least 1"),
        (["--context_length", "1"], "at least 1"),
        (["--most_gigabytes", "-1"], "more than 0"),
    ],
)
def test_what_cannot_be_opened_ends_with_a_message(capsys, arguments, message):
    pytest.importorskip("gradio")
    assert cli.main(["space", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


@pytest.mark.parametrize("arguments", [["--port", "many"], ["--tokens", "1.5"], ["one", "two"], ["--nothing"]])
def test_arguments_there_are_not_are_refused(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(["space", *arguments])
    assert ended.value.code == 2 and "usage: matryoshka-sae space" in capsys.readouterr().err


@pytest.mark.release
def test_without_gradio_it_says_what_to_install():
    script = (
        "import sys; sys.modules['gradio'] = None\n"
        "import hf_matryoshka_sae.space as space; space.Library\n"
        "from hf_matryoshka_sae import cli; sys.exit(cli.main(['space']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2 and 'pip install "hf_matryoshka_sae[space]"' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_port_that_is_taken_ends_with_a_message(capsys):
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert cli.main(["space", "--port", str(taken.getsockname()[1]), "--tokens", "300"]) == 2
    error = capsys.readouterr().err
    assert "error: " in error and "Traceback" not in error
