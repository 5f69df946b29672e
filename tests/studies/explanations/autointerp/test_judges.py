"""A chat model of transformers as a judge."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_matryoshka_sae.assets import embedded_lm_path
from hf_matryoshka_sae.studies.explanations.autointerp.judges import ChatModelJudge, open_judge


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
MESSAGES = [{"role": "user", "content": "How are you?"}]


def tiny_chat_model(folder: Path, seed: int = 0, template: str | None = TEMPLATE, longest: int = 4096) -> Path:
    """A small Llama that nobody trained, saved with the embedded model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_lm_path())
    tokenizer.chat_template = template
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=longest,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_it_reads_the_template_and_answers_greedily(tmp_path):
    folder = tiny_chat_model(tmp_path / "chat")
    judge = ChatModelJudge(str(folder), device="cpu", max_tokens=5)
    reply = judge.ask(MESSAGES)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), LlamaForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer("<user>How are you?<a>", return_tensors="pt", add_special_tokens=False)["input_ids"]
    length = ids.shape[1]
    for _ in range(5):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert reply.text == tokenizer.decode(ids[0, length:], skip_special_tokens=True)
    assert (reply.prompt_tokens, reply.completion_tokens) == (length, 5) and judge.ask(MESSAGES).text == reply.text


def test_checkpoints_of_one_name_are_told_apart_by_their_weights(tmp_path):
    judges = [open_judge(str(tiny_chat_model(tmp_path / str(seed) / "chat", seed))) for seed in (0, 1)]
    again = open_judge(str(tiny_chat_model(tmp_path / "2" / "chat", 1)))
    assert [judge.name for judge in judges] == ["chat", "chat"]
    assert judges[0].settings != judges[1].settings == again.settings


def test_what_is_no_chat_model_is_said(tmp_path):
    folder = tiny_chat_model(tmp_path / "plain", template=None)
    with pytest.raises(ValueError, match="has no chat template.*Instruct or Chat"):
        ChatModelJudge(str(folder))
    with pytest.raises(ValueError, match="`max_tokens` must be at least 1"):
        ChatModelJudge(str(folder), max_tokens=0)


def test_a_question_that_is_too_long_is_said(tmp_path):
    judge = ChatModelJudge(str(tiny_chat_model(tmp_path / "short", longest=16)), device="cpu")
    with pytest.raises(ValueError, match=r"A question of \d+ tokens is too long for `short`, which reads 16"):
        judge.ask([{"role": "user", "content": "word " * 30}])
    assert judge.ask([{"role": "user", "content": "x"}]).completion_tokens <= 16
