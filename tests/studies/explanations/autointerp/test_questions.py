"""Prompts in files."""

import pytest

from hf_matryoshka_sae.studies.explanations.autointerp.questions import PLACEHOLDERS, Questions


def test_the_package_has_every_prompt():
    questions = Questions()
    for name, placeholders in PLACEHOLDERS.items():
        (message,) = questions.of(name, **{one: f"<{one}> costs $5 {{}}" for one in placeholders})
        assert message["role"] == "user" and "$5 {}" in message["content"]
        assert all(f"<{one}>" in message["content"] for one in placeholders)


def test_a_users_own_prompt_takes_the_place_of_one(tmp_path):
    (tmp_path / "explain.md").write_text("For $$1: ${passages}!\n")
    questions = Questions(tmp_path)
    assert questions.of("explain", passages="p")[0]["content"] == "For $1: p!"
    values = {"explanation": "e", "count": 1, "tokens": "t"}
    assert questions.of("simulation", **values) == Questions().of("simulation", **values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("$passages and $explanation", r"'explain.md' takes \$passages; \$explanation is unknown"),
        ("no passages", r"\$passages is missing"),
        ("$passages for 5 $.", r"a lone \$ stands there"),
        ("$$passages", r"\$passages is missing"),
    ],
)
def test_wrong_placeholders_are_said(tmp_path, text, message):
    (tmp_path / "explain.md").write_text(text)
    with pytest.raises(ValueError, match=message):
        Questions(tmp_path)


def test_a_folder_without_prompts_is_said(tmp_path):
    with pytest.raises(ValueError, match="holds no prompts: expected a folder with any of explain.md"):
        Questions(tmp_path)
