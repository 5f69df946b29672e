"""The sections on a tiny model, and the report, its cuts and what a card reads from it."""

import json
import math

import pytest
import torch
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from hf_matryoshka_sae.activations import TokenBatch
from hf_matryoshka_sae.assets import embedded_sae_path
from hf_matryoshka_sae.evaluation import HeldOut, LossScaling, evaluate_fidelity, open_heldout
from hf_matryoshka_sae.evaluation.subjects import Dictionary
from hf_matryoshka_sae.models import MatryoshkaSAEConfig, build_sae
from hf_matryoshka_sae.studies import NotDefined
from hf_matryoshka_sae.studies.suite import SECTIONS, Bench, Section, run_sections, write_report
from hf_matryoshka_sae.studies.suite.report import cuts, metric_lines


class Words:
    """As much of a tokenizer as patterns and probes look at."""

    bos_token_id, pad_token_id, eos_token_id, unk_token_id, mask_token_id = 0, None, None, None, None
    all_special_ids = [0]

    def __call__(self, text, **options):
        return {"input_ids": []}  # it puts nothing around a text

    def decode(self, ids, **options):
        return "".join(f" w{int(token)}" for token in torch.as_tensor(ids).reshape(-1))

    def convert_ids_to_tokens(self, ids):
        return [f" w{token}" for token in ids]

    def batch_decode(self, rows, **options):
        return [self.decode(row) for row in rows]


@pytest.fixture(scope="module")
def bench() -> Bench:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    batches = []
    for seed in range(6):
        ids = torch.randint(1, 40, (4, 20), generator=torch.Generator().manual_seed(seed))
        ids[:, 0] = 0
        batches.append(TokenBatch(ids, torch.ones_like(ids), ids != 0, padded=False))
    sae = build_sae(MatryoshkaSAEConfig(d_in=16, num_latents=24, k=4, prefix_widths=[8, 24], activation="topk")).eval()
    data = HeldOut(LlamaForCausalLM(config).eval(), batches, "model.layers.0", tokenizer=Words())
    return Bench(data, {"it": sae}, scaling=LossScaling(0.1))


def test_halves_share_no_window(bench):
    first, second = bench.halves
    rows = [{tuple(row) for batch in half.batches for row in batch.input_ids.tolist()} for half in (first, second)]
    assert rows[0] and rows[1] and not rows[0] & rows[1]
    alone = Bench(HeldOut(bench.data.model, bench.data.batches[:1], "model.layers.0"), bench.saes)
    assert [half.tokens for half in alone.halves] == [38, 38]


def test_tokens_are_taken_from_all_over_the_text(bench):
    part = bench.data.sample(bench.data.tokens // 3)
    assert len(part.batches) == 2
    assert part.batches[0] is bench.data.batches[0] and part.batches[1] is bench.data.batches[3]
    assert bench.data.sample(10**9).tokens == bench.data.tokens


def test_fidelity_is_what_evaluate_fidelity_gives(bench):
    section = next(each for each in SECTIONS if each.name == "fidelity")
    found = section.run(bench, 10**9)
    expected = evaluate_fidelity(bench.data, {"it": Dictionary(bench.saes["it"])}, show=False)["subjects"]["it"]
    for row, right in zip(found.rows["it"], expected, strict=True):
        assert row["fvu"] == pytest.approx(right["fvu"])
        assert row["rsa"] == pytest.approx(right["rsa"]["spearman"])
        assert row["ce"] == pytest.approx(right["ce"])


ON_TEXT = ("probes", "autointerp", "removal", "absorption", "spelling")  # what needs words
OPTIONAL = {"pooled_cosine", "neighbours"}  # of encoders


@pytest.fixture(scope="module")
def embedded() -> Bench:
    """The widest levels of the embedded SAE left out."""
    sae = AutoModel.from_pretrained(embedded_sae_path(), width=192).eval()
    return Bench(open_heldout("embedded", sae.config.hookpoint, tokens=8_000), {"it": sae}, widths=[64, 192])


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
def test_every_section_has_its_columns_in_its_rows(section, bench, request, tmp_path):
    bench = request.getfixturevalue("embedded") if section.name in ON_TEXT else bench
    if section.name in ("spelling", "comparison"):
        with pytest.raises(NotDefined, match="does not spell|there is one SAE"):
            section.run(bench, section.least)
        return
    found = section.run(bench, section.least)
    json.dumps([found.rows, found.details, found.facts, found.notes])
    assert found.text
    assert [row["width"] for row in found.rows["it"]] == (bench.widths or [8, 24])
    for key, _, form in section.columns:
        for row in found.rows["it"] if key not in OPTIONAL else []:
            low, high = row.get(f"{key}_interval") or (-math.inf, math.inf)
            assert low <= row[key] <= high and format(row[key], form)
    assert "random (it)" in found.rows or section.name == "composition"
    found.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_the_report_has_every_number_and_says_what_was_cut(bench, tmp_path):
    sections = [Section(**{**vars(each), "full": 3}) for each in SECTIONS if each.name == "ablation"]
    found = run_sections(bench, tmp_path / "model.layers.0", sections, {}, show=False)
    found[0]["full"] = 64
    missing = {**found[0], "title": "Another", "size": 0, "rows": {}, "left_out": "no time was left"}
    place = {
        "model": "a/model",
        "hookpoint": "model.layers.0",
        "dataset": "some.txt",
        "tokens": bench.data.tokens,
        "selection": "mask",
        "saes": ["it"],
        "weights": {"it": "abc"},
        "folder": "model.layers.0",
        "sections": [*found, missing],
    }
    path = write_report(tmp_path, [place], minutes=2)
    text, details = path.read_text(), (tmp_path / "details.md").read_text()
    first, last = found[0]["rows"]["it"]
    for row in (first, last):
        assert f"{row['fraction']:.4f} [{row['fraction_interval'][0]:.4f}" in text
    for row in found[0]["rows"]["random (it)"]:
        assert f"{row['fraction']:.4f}" in details
    assert "- Sparsity of downstream effects: about 3 tokens instead of 64" in text
    assert "- Another: left out, no time was left" in text and "Another" not in details
    assert "](model.layers.0/ablation.png)" in details and (tmp_path / "model.layers.0/ablation.png").is_file()
    assert "](model.layers.0/overview.png)" in text and (tmp_path / "model.layers.0/overview.png").is_file()
    assert json.loads((tmp_path / "suite.json").read_text())["places"][0]["weights"] == {"it": "abc"}
    assert cuts([{**found[0], "full": 3}]) == []


def test_rows_of_a_metric_stand_under_their_widths():
    rows = {
        "it": [{"width": 4, "f1": 0.5, "f1_interval": [0.4, 0.6]}, {"width": 8, "f1": None}],
        "random (it)": [{"width": 4, "f1": 0.1}, {"width": 8, "f1": 0.2}],
        "neurons": [{"width": 32, "f1": 0.3}],
        "another": [{"width": 4, "f1": 0.9}],
    }
    assert metric_lines(rows, "it", "f1", "F1", ".1f", [4, 8]) == [
        ["F1", "**SAE**", "0.5 [0.4 0.6]", ""],
        ["", "random", "0.1", "0.2"],
        ["", "neurons (32)", "", "0.3"],
    ]
    assert metric_lines(rows, "it", "none", "None", ".1f", [4, 8]) == []
