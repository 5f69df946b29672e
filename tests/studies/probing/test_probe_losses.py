"""Probe losses: planted latents, prefixes, baselines, and that neither batches nor processes matter."""

import json
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from hf_matryoshka_sae.activations import TokenBatch, heldout_batches
from hf_matryoshka_sae.assets import load_embedded_lm
from hf_matryoshka_sae.common.intervals import CrossedBootstrap
from hf_matryoshka_sae.common.report import Report
from hf_matryoshka_sae.evaluation import Dictionary, HeldOut
from hf_matryoshka_sae.models import MatryoshkaSAEConfig, ReluSAEConfig, TopKSAEConfig, build_sae
from hf_matryoshka_sae.studies import LabelledTask, TokenTasks, probe_losses
from hf_matryoshka_sae.studies.probing.token_properties import property_names


D, F, VOCABULARY = 8, 16, 40


@dataclass
class Table(HeldOut):
    """A "language model" whose hidden state is a row of a table for each token."""

    def states(self, batch):
        return self.model(batch.input_ids)[batch.keep]


def build(activation="relu", **options):
    """Latent 5 is the hidden state's first number, which says whether a token's id is divisible by 4."""
    torch.manual_seed(1)
    shape = {"d_in": D, "num_latents": F, "prefix_widths": [4, 8, F]}
    sae = build_sae(MatryoshkaSAEConfig(**shape, activation=activation, apply_b_dec_to_input=False, **options)).eval()
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(F, D) * (torch.arange(D) > 0))
        sae.W_enc[5] = torch.eye(D)[0] * 2
        sae.W_dec.copy_(sae.W_enc / sae.W_enc.norm(dim=1, keepdim=True))
        sae.b_enc.fill_(-0.5)
        sae.b_dec.zero_()
    return sae


def open_table(batches: int = 6, padding: bool = True) -> Table:
    torch.manual_seed(2)
    table = nn.Embedding(VOCABULARY, D).requires_grad_(False)
    table.weight[:, 0] = (torch.arange(VOCABULARY) % 4 == 0).float()
    found = []
    for _ in range(batches):
        ids = torch.randint(VOCABULARY, (5, 12))
        mask = torch.ones_like(ids)
        mask[-1, 9:] = 0 if padding else 1
        keep = mask.bool()
        keep[:, 0] = False
        found.append(TokenBatch(ids, mask, keep))
    return Table(table, found, "table")


def tasks_of(data: HeldOut) -> TokenTasks:
    """Divisible by 4, and by chance (but the same for the same window and place)."""
    labels = []
    for batch in data.batches:
        chance = (batch.input_ids.sum(1, keepdim=True) * 7 + torch.arange(12) * 5) % 3 == 0
        labels.append(torch.stack([batch.input_ids % 4 == 0, chance], -1))
    return TokenTasks(["divisible", "chance"], labels)


def probe(data: HeldOut, subjects=None, **options):
    subjects = build() if subjects is None else subjects
    return probe_losses(data, subjects, tasks_of(data), **{"show": False, "k": (), **options})


def same(left, right, tolerance: float = 1e-6) -> None:
    assert left.about == right.about
    assert [row["subject"] for row in left.records] == [row["subject"] for row in right.records]
    for one, other in zip(left.records, right.records, strict=True):
        assert one["width"] == other["width"]
        assert one["probe_loss"] == pytest.approx(other["probe_loss"], abs=tolerance)
        assert one["probe_loss_interval"] == pytest.approx(other["probe_loss_interval"], abs=tolerance)
        for name, task in one["tasks"].items():
            assert task["loss"] == pytest.approx(other["tasks"][name]["loss"], abs=tolerance)
            assert task.get("latents") == other["tasks"][name].get("latents")
            assert task.get("k_sparse") == other["tasks"][name].get("k_sparse")


def test_a_planted_latent_is_found_and_chance_scores_the_entropy():
    report = probe(open_table(), splits=4)
    rows = {row["width"]: row for row in report.subject("sae")}
    for width in (8, F):
        divisible = rows[width]["tasks"]["divisible"]
        assert divisible["latents"] == [5] * 4
        assert divisible["loss"] < 0.03
    assert rows[4]["tasks"]["divisible"]["loss"] > 0.4
    for row in rows.values():
        assert abs(row["tasks"]["chance"]["loss"] - math.log(2)) < 0.1
        low, high = row["probe_loss_interval"]
        assert low <= row["probe_loss"] <= high
    means = [task["loss"] for task in rows[F]["tasks"].values()]
    assert rows[F]["probe_loss"] == pytest.approx(sum(means) / 2)


def test_a_channel_that_is_the_label_is_found_too():
    report = probe(open_table())
    (channels,) = report.subject("hidden-state channels")
    assert channels["tasks"]["divisible"]["latents"] == [0] * 3 and channels["gain"] == 0
    assert channels["tasks"]["divisible"]["loss"] < 0.03
    assert report.subject("sae")[0]["gain"] == pytest.approx(
        channels["probe_loss"] - report.subject("sae")[0]["probe_loss"]
    )
    (nothing,) = report.subject("knows nothing")
    assert nothing["probe_loss"] == pytest.approx(math.log(2))
    assert [row["width"] for row in report.subject("random (sae)")] == [4, 8, F]


@pytest.mark.parametrize(("activation", "options"), [("relu", {}), ("topk", {"k": 3})])
def test_the_row_of_a_prefix_is_that_of_the_dictionary_cut(activation, options):
    sae, data = build(activation, **options), open_table()
    whole = probe(data, {"sae": Dictionary(sae, [6, F], "restrict")}, baselines=False)
    cut = probe(data, {"sae": sae.truncate(6)}, widths=[6], baselines=False)
    for name, task in whole.records[0]["tasks"].items():
        other = cut.records[0]["tasks"][name]
        assert task["latents"] == other["latents"]
        for loss in ("loss", "train_loss"):
            assert task[loss] == pytest.approx(other[loss])
    assert [row["width"] for row in whole.records] == [6, F]


def test_the_order_of_batches_does_not_matter():
    data = open_table()
    report = probe(data, k=(1, 2))
    data.batches = [
        TokenBatch(batch.input_ids.flip(0), batch.attention_mask.flip(0), batch.keep.flip(0))
        for batch in reversed(data.batches)
    ]
    same(report, probe(data, k=(1, 2)))


def test_intervals_are_those_of_a_mean_of_tasks_and_splits():
    random = np.random.default_rng(0)
    of_tasks, of_splits = random.normal(size=(1, 400)), random.normal(size=(50, 1))
    for values, count in ((np.repeat(of_tasks, 5, 0), 400), (np.repeat(of_splits, 7, 1), 50)):
        low, high = CrossedBootstrap(*values.shape, resamples=4000).interval(values)
        half = 1.96 * values.std() / count**0.5
        assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
        assert high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_no_more_tokens_are_read_than_asked_for():
    data = open_table()
    report = probe(data, max_tokens=200, baselines=False)
    assert 180 <= report.about["examples"]["tokens"] <= 200
    assert probe(data, baselines=False).about["examples"]["tokens"] == data.tokens


def labelled(count: int = 60) -> LabelledTask:
    words = ("film", "wonderful", "script", "terrible")
    texts = [
        f"This {words[number % 3]} was {'dull and bad' if number % 2 else 'a joy to see'}, says number {number}."
        for number in range(count)
    ]
    return LabelledTask.from_dataset({"text": texts, "label": ["bad" if n % 2 else "good" for n in range(count)]})


@pytest.fixture(scope="module")
def embedded() -> HeldOut:
    model, tokenizer = load_embedded_lm()
    return HeldOut(model.eval(), [], "model.layers.1", None, tokenizer)


def told(embedded: HeldOut, sentence: str) -> HeldOut:
    """A hundred such sentences, no two alike."""
    nouns = ("cat", "reader", "stone", "apple", "module", "string")
    texts = [sentence.format(number=number, noun=nouns[number * number % 11 % 6]) for number in range(100)]
    return replace(embedded, batches=heldout_batches(["".join(texts)], embedded.tokenizer, 64, 3000))


def test_texts_are_read_by_the_means_of_their_tokens(embedded):
    torch.manual_seed(0)
    sae = build_sae(TopKSAEConfig(d_in=128, num_latents=64, k=4)).eval()
    report = probe_losses(embedded, sae, labelled(), k=(), show=False)
    assert report.about["examples"] == {"texts": 60}
    assert list(report.about["tasks"].values()) == [0.5]
    (row,) = report.subject("sae")
    task = row["tasks"]["labels: good"]
    # The same by hand, of the first split: means over all tokens but the first, one probe for each latent.
    assert task["loss"] < 0.6 and len(task["latents"]) == 3
    (channels,) = report.subject("hidden-state channels")
    assert channels["probe_loss"] < 0.5


def test_pooling_is_a_mean_over_kept_tokens(embedded):
    from hf_matryoshka_sae.studies.probing.examples import text_batches, text_examples

    torch.manual_seed(0)
    task = labelled()
    dictionary = Dictionary(build_sae(TopKSAEConfig(d_in=128, num_latents=64, k=4)))
    examples = text_examples(embedded, task, {"sae": dictionary}, 64, 10**6, False)
    batches, _ = text_batches(task, embedded, 64)
    assert len(batches) == 2
    latents = examples.latents["sae"][0].dense(torch.arange(64))
    for batch in batches:
        for row in range(len(batch.input_ids)):
            one = TokenBatch(*(part[row : row + 1] for part in (batch.input_ids, batch.attention_mask, batch.keep)))
            states = embedded.states(one)
            distance = (examples.hidden - states.mean(0)).norm(dim=1)
            place = int(distance.argmin())
            assert distance[place] < 1e-4
            expected = dictionary.encode(states)[0].to_slots().to_dense().mean(0)
            torch.testing.assert_close(latents[place], expected, atol=1e-4, rtol=1e-3)
            text = embedded.tokenizer.decode(one.input_ids[0][one.keep[0]])
            assert ("dull" not in text) == examples.labels[place, 0].item()


def test_texts_and_tokens_go_together(embedded, tmp_path):
    sae = build_sae(TopKSAEConfig(d_in=128, num_latents=64, k=4)).eval()
    data = told(embedded, "{number} {noun} walked to a {noun}.")
    properties = TokenTasks.of_properties(data, ["digit", "begins a word", "-ly"])
    report = probe_losses(data, sae, [labelled(), properties], show=False)
    assert list(report.about["tasks"]) == ["digit", "begins a word", "labels: good"]
    assert report.about["skipped"].keys() == {"-ly"}
    assert set(report.about["examples"]) == {"tokens", "texts"}
    printed = str(report)
    assert "left out: -ly" in printed and "random (sae)" in printed and "probe loss" in printed
    report.save(tmp_path)
    read = json.loads((tmp_path / "probing.json").read_text())
    assert read["rows"] == report.records
    assert (tmp_path / "probing.png").stat().st_size > 10_000
    row = report.subject("sae")[0]
    assert set(row["k_sparse"]) == {"1", "2", "5"} and 0 <= row["k_sparse"]["1"]["auc"] <= 1
    assert report.subject("all channels together")[0]["probe_loss"] < row["probe_loss"]
    with pytest.raises(ValueError, match="there are 'sae'"):
        report.subject("other")


def test_what_follows_from_the_text_is_the_default(embedded):
    sae = build_sae(TopKSAEConfig(d_in=128, num_latents=32, k=4)).eval()
    data = told(
        embedded,
        'The old {noun} said: "It is {number}." She quickly walked to the CITY (and its {noun}) while reading, but '
        "a character of theirs wanted more.\n",
    )
    report = probe_losses(data, sae, k=(), splits=1, baselines=False, show=False)
    assert {*report.about["tasks"], *report.about["skipped"]} == set(property_names())
    assert len(report.about["tasks"]) > 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splits": 0}, "splits"),
        ({"test_share": 1.0}, "test_share"),
        ({"k": (0,)}, "at least 1"),
        ({"max_pairs": 100}, "raise `max_pairs`"),
        ({"test_share": 0.001}, "30 different windows cannot be split"),
        ({"least_share": 0.45}, "No task can be probed"),
        ({"widths": [99]}, "between 1 and 16"),
        ({"ridge": 0.0}, "ridge"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        probe(open_table(), baselines=False, **options)


def test_bad_subjects_and_tasks_are_named():
    data = open_table()
    with pytest.raises(ValueError, match="subjects` is empty"):
        probe(data, {})
    with pytest.raises(ValueError, match="is a int"):
        probe(data, {"x": 3})
    with pytest.raises(ValueError, match="TokenTasks"):
        probe_losses(data, build(), ["digit"])
    with pytest.raises(ValueError, match="tokenizer"):
        probe_losses(data, build())
    with pytest.raises(ValueError, match="come twice"):
        probe_losses(data, build(), [tasks_of(data), tasks_of(data)], k=(), show=False)
    with pytest.raises(ValueError, match="no batches"):
        probe_losses(Table(data.model, [], "table"), build(), tasks_of(Table(data.model, [], "table")))
    wide = build_sae(ReluSAEConfig(d_in=9, num_latents=4)).eval()
    with pytest.raises(ValueError, match="d_in = 9"):
        probe(data, wide, baselines=False)


def _one_of_two(rank: int, data: Table) -> Report:
    report = probe(data, {"relu": build(), "topk": build("topk", k=3)}, k=(1, 2))
    # One of the processes alone has too many activations; both say so.
    firing = [len(Dictionary(build()).encode(data.states(batch))[0].values) for batch in data.batches]
    with pytest.raises(ValueError, match="raise `max_pairs`"):
        probe(data, max_pairs=sum(firing[1::2]) + 1, baselines=False)
    return report


@pytest.mark.slow
def test_two_processes_find_what_one_finds(two_processes):
    data = open_table(5)
    alone = probe(data, {"relu": build(), "topk": build("topk", k=3)}, k=(1, 2))
    for report in two_processes.run(_one_of_two, data):
        same(report, alone)
