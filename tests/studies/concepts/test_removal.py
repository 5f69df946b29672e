"""SCR and TPP: planted latents, the formulas by brute force, units, prefixes, what is refused."""

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from hf_matryoshka_sae.activations import TokenBatch
from hf_matryoshka_sae.assets import load_embedded_lm
from hf_matryoshka_sae.evaluation import Dictionary, HeldOut
from hf_matryoshka_sae.models import BatchTopKSAEConfig, MatryoshkaSAEConfig, ReluSAEConfig, TopKSAEConfig, build_sae
from hf_matryoshka_sae.studies import LabelledTask, TokenTasks
from hf_matryoshka_sae.studies.concepts.probes import Coinciding, class_of, fit_coinciding, fit_exclusive
from hf_matryoshka_sae.studies.concepts.removal import (
    Contributions,
    spurious_correlation_removal,
    targeted_probe_perturbation,
)
from hf_matryoshka_sae.studies.probing.columns import LatentColumns
from hf_matryoshka_sae.studies.probing.logistic import LogisticProbe
from hf_matryoshka_sae.studies.probing.tasks import attribute_task


D, F, VOCABULARY = 10, 24, 600
A, B, NOT_B = 9, 5, 6  # the latents of the two attributes; of b one for either sign
CLASSES = (3, 7, 12)


@dataclass
class Table(HeldOut):
    """A "language model" whose hidden state is a row of a table for each token."""

    def states(self, batch):
        return self.model(batch.input_ids)[batch.keep]


def open_table(rows: torch.Tensor, batches: int = 8) -> Table:
    torch.manual_seed(2)
    table = nn.Embedding(VOCABULARY, D).requires_grad_(False)
    table.weight.copy_(rows)
    found = []
    for _ in range(batches):
        ids = torch.randint(VOCABULARY, (12, 16))
        found.append(TokenBatch(ids, torch.ones_like(ids), torch.ones_like(ids).bool()))
    return Table(table, found, "table")


def labels_of(data: Table, *functions) -> TokenTasks:
    names = [f"label {number}" for number in range(len(functions))]
    return TokenTasks(names, [torch.stack([of(batch.input_ids) for of in functions], -1) for batch in data.batches])


def noise() -> torch.Tensor:
    return 0.05 * torch.randn(VOCABULARY, D, generator=torch.Generator().manual_seed(0))


def two_attributes() -> tuple[Table, TokenTasks]:
    """a is the sign of the first number of the hidden state; b that of the second, which is three times as loud."""
    ids = torch.arange(VOCABULARY)
    rows = noise()
    rows[:, 0] += ids % 2 - 0.5
    rows[:, 1] += 3 * (ids // 2 % 2 - 0.5)
    data = open_table(rows)
    return data, labels_of(data, lambda ids: ids % 2 == 1, lambda ids: ids // 2 % 2 == 1)


def three_classes() -> tuple[Table, TokenTasks]:
    """Each class is a number of the hidden state."""
    ids = torch.arange(VOCABULARY)
    rows = noise()
    rows[ids, ids % 3] += 1
    data = open_table(rows)
    return data, labels_of(data, *(lambda ids, number=number: ids % 3 == number for number in range(3)))


def dictionary(planted: dict[int, int], config=MatryoshkaSAEConfig, **options):
    """Random latents, but those planted are numbers of the hidden state."""
    torch.manual_seed(1)
    options = (
        {"activation": "relu", "prefix_widths": [4, 10, F], **options} if config is MatryoshkaSAEConfig else options
    )
    sae = build_sae(config(d_in=D, num_latents=F, **options)).eval()
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(F, D) * (torch.arange(D) > 2))
        for latent, place in planted.items():
            sae.W_enc[latent] = torch.eye(D)[abs(place)] * (1 if place >= 0 else -1)
        sae.W_dec.copy_(sae.W_enc / sae.W_enc.norm(dim=1, keepdim=True))
        sae.b_enc.fill_(-0.02)
        sae.b_dec.zero_()
    return sae


def scr(*arguments, **options):
    return spurious_correlation_removal(*arguments, **{"show": False, "latents": (1, 2), **options})


def tpp(*arguments, **options):
    return targeted_probe_perturbation(*arguments, **{"show": False, "latents": (1, 2), **options})


def score(report, subject, width, count):
    (row,) = [row for row in report.records if (row["subject"], row["width"]) == (subject, width)]
    low, high = row["interval"][str(count)]
    assert low <= row["score"][str(count)] + 1e-12 and row["score"][str(count)] <= high + 1e-12
    return row["score"][str(count)]


def test_a_spurious_attribute_of_one_latent_is_taken_out():
    data, task = two_attributes()
    report = scr(data, dictionary({A: 0, B: 1, NOT_B: -1}), task)
    for width in (10, F):
        assert score(report, "sae", width, 2) > 0.95
        assert -0.1 < score(report, "sae", width, 1) < 0.7
    assert abs(score(report, "sae", 4, 2)) < 0.1  # the latents are not among the first four
    (facts,) = report.about["tasks"].values()
    assert facts["base"] < 0.8 and facts["clean"] > 0.99 and facts["keeps_first"] == 1
    assert abs(score(report, "random (sae)", F, 2)) < 0.6
    assert [row["width"] for row in report.records if row["kind"] == "random"] == [4, 10, F]


def test_classes_of_one_latent_each_are_perturbed_one_at_a_time():
    data, task = three_classes()
    report = tpp(data, dictionary(dict(zip(CLASSES, range(3), strict=True))), task)
    # without its latent a class is never told: its balanced accuracy falls from 1 to one half
    assert score(report, "sae", F, 1) == pytest.approx(0.5, abs=0.03)
    assert score(report, "sae", 4, 1) == pytest.approx(0.5 / 3, abs=0.05)  # of three classes one has its latent there
    assert abs(score(report, "random (sae)", F, 1)) < 0.2
    assert all(facts["accuracy"] > 0.99 for facts in report.about["tasks"].values())


def test_latents_that_know_nothing_score_nothing():
    data, task = three_classes()
    assert abs(score(tpp(data, dictionary({}), task, baselines=False), "sae", F, 2)) < 0.02
    data, task = two_attributes()
    assert abs(score(scr(data, dictionary({}), task, baselines=False), "sae", F, 2)) < 0.1


FAMILIES = [
    (ReluSAEConfig, {}),
    (ReluSAEConfig, {"scale_by_decoder_norm": True}),
    (TopKSAEConfig, {"k": 5}),
    (ReluSAEConfig, {"input_normalization": "layer_norm"}),
    (BatchTopKSAEConfig, {"k": 5, "input_normalization": "constant_norm"}),
]


@pytest.mark.parametrize(("config", "options"), FAMILIES)
def test_ablation_and_both_scores_by_brute_force(config, options):
    """Everything again in the test's own words: latents set to zero, decoded, the error added."""
    sae = dictionary({A: 0, B: 1, NOT_B: -1}, config, **options)
    torch.manual_seed(3)
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(F, 1) + 0.5)
    x = torch.randn(400, D)
    attributes = torch.stack([x[:, 0] + 0.4 * torch.randn(400) > 0, x[:, 1] + x[:, 3] > 0], 1)
    pairs = Contributions(sae).encode(x)[0]
    columns = LatentColumns.of_pairs(pairs.rows, pairs.cols, pairs.values.detach(), 400, F)
    test = torch.arange(400) % 3 == 0
    latents = sae.encode(x)
    dense = latents.to_dense().double()
    error = x - sae.decode(latents)

    def ablated(chosen):
        latents = sae.encode(x)
        latents.values = latents.values.masked_fill(torch.isin(latents.indices, torch.tensor(chosen)), 0)
        return error + sae.decode(latents)

    def accuracy(log_odds, target):
        said = log_odds > 0
        return ((said[target]).double().mean() + (~said[~target]).double().mean()).item() / 2

    def attribution(weight, target, part):
        factor = pairs.input_norm[1] if pairs.input_norm is not None else torch.ones(400, 1)
        rows = sae.W_dec if not sae.config.scale_by_decoder_norm else sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
        effect = dense * factor.double() * (rows.double() @ weight)
        return (effect[part & target].mean(0) - effect[part & ~target].mean(0)).detach()

    with torch.no_grad():
        found = fit_coinciding("pair", x, attributes, test, 1000, torch.Generator().manual_seed(0))
        expected = torch.zeros(2, 2, 1)
        for concept in (0, 1):
            part = torch.zeros(400, dtype=torch.bool)
            part[found.contrast[:, concept] != 0] = True
            effects = attribution(found.own.weight[concept], attributes[:, 1 - concept], part).abs()
            for number, count in enumerate((1, 4)):
                log_odds = found.scored.scores(ablated(effects[:20].topk(count).indices.tolist()))[found.test, 0]
                expected[concept, number, 0] = accuracy(log_odds, attributes[found.test, concept])
        (got,) = found.accuracies(columns, sae.W_dec, [20], [1, 4])
        assert torch.allclose(got.float(), expected, atol=1e-6)
        base = [accuracy(found.log_odds[:, 0], attributes[found.test, at]) for at in (0, 1)]
        kept = base.index(min(base))
        gap = found.clean[kept].item() - base[kept]
        assert gap > 0.05
        assert found.scores(got)[0].tolist() == pytest.approx(
            [(expected[kept, number, 0].item() - base[kept]) / gap for number in (0, 1)], abs=1e-5
        )

        labels = torch.nn.functional.one_hot(x[:, :3].argmax(1), 3).bool()
        classes = fit_exclusive(["0", "1", "2"], x, labels, test, 1000, torch.Generator().manual_seed(0))
        (got,) = classes.accuracies(columns, sae.W_dec, [F], [2])
        clean = [accuracy(classes.scored.scores(x)[classes.test, j], labels[classes.test, j]) for j in range(3)]
        for i in range(3):
            part = classes.contrast[:, i] != 0
            effects = attribution(classes.own.weight[i], labels[:, i], part)
            effects *= (dense[part & labels[:, i]].mean(0) > dense[part & ~labels[:, i]].mean(0)).detach()
            log_odds = classes.scored.scores(ablated(effects.topk(2).indices.tolist()))[classes.test]
            drops = [clean[j] - accuracy(log_odds[:, j], labels[classes.test, j]) for j in range(3)]
            others = sum(drops[j] for j in range(3) if j != i) / 2
            assert classes.scores(got)[i, 0].item() == pytest.approx(drops[i] - others, abs=1e-6)


def told(base_a: int, base_b: int, clean: tuple[float, float]) -> Coinciding:
    """Of eight examples, so many are told right for either attribute."""
    a = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]).bool()
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    said = a.clone()
    said[order[: 8 - base_a]] ^= True
    b = said.clone()
    b[order[: 8 - base_b]] ^= True
    nothing = LogisticProbe(torch.zeros(1, 1), torch.zeros(1))
    log_odds = torch.where(said, 1.0, -1.0)[:, None]
    targets = torch.stack([a, b], 1)
    return Coinciding(
        ["pair"], torch.zeros(8, 2), nothing, nothing, torch.arange(8), targets, log_odds, torch.tensor(clean).double()
    )


def test_the_lower_base_counts_and_of_equal_ones_both():
    after = torch.tensor([[[0.8]], [[0.9]]]).double()  # (R, K, J): without b, without a
    pair = told(4, 6, (1.0, 1.0))
    base = pair.base.tolist()
    assert base[0] < base[1]
    assert pair.scores(after).item() == pytest.approx((0.8 - base[0]) / (1 - base[0]))
    tie = told(6, 6, (1.0, 1.0))
    (first, second) = tie.base.tolist()
    assert first == second and tie.facts()["pair"]["keeps_first"] == 0.5
    assert tie.scores(after).item() == pytest.approx(((0.8 - first) + (0.9 - first)) / 2 / (1 - first))


def test_a_probe_that_has_nothing_to_gain_scores_zero():
    pair = told(4, 6, (0.5, 0.7))
    pair.clean = pair.base + 0.0005
    assert pair.scores(torch.ones(2, 3, 1).double()).tolist() == [[0, 0, 0]]


def test_neither_score_depends_on_the_units_of_latents():
    data, task = two_attributes()
    sae, other = dictionary({A: 0, B: 1, NOT_B: -1}), dictionary({A: 0, B: 1, NOT_B: -1})
    factors = torch.logspace(-2, 2, F)[torch.randperm(F)]
    with torch.no_grad():
        other.W_enc.mul_(factors[:, None])
        other.b_enc.mul_(factors)
        other.W_dec.div_(factors[:, None])
    for metric, (data, task) in ((scr, two_attributes()), (tpp, three_classes())):
        rows, others = (metric(data, each, task, baselines=False).records for each in (sae, other))
        for row, same in zip(rows, others, strict=True):
            assert row["score"] == pytest.approx(same["score"], abs=1e-9)


@pytest.mark.parametrize(("activation", "options"), [("relu", {}), ("topk", {"k": 3})])
def test_the_row_of_a_prefix_is_that_of_the_dictionary_cut(activation, options):
    data, task = two_attributes()
    sae = dictionary({A: 0, B: 1, NOT_B: -1}, activation=activation, **options)
    whole = scr(data, {"sae": Dictionary(sae, [7, F], "restrict")}, task, baselines=False)
    cut = scr(data, {"sae": sae.truncate(7)}, task, widths=[7], baselines=False)
    assert [row["width"] for row in whole.records] == [7, F]
    assert whole.records[0]["score"] == pytest.approx(cut.records[0]["score"])
    assert whole.records[0]["tasks"] == cut.records[0]["tasks"]


def test_a_seed_gives_the_same_and_another_seed_another():
    data, task = two_attributes()
    runs = [scr(data, dictionary({A: 0}), task, seed=seed, baselines=False, most=40).to_dict() for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_everything_shown_carries_the_warning(tmp_path):
    data, task = three_classes()
    report = tpp(data, dictionary({}), task)
    assert "arXiv 2605.18229" in str(report) and "do not rank" in str(report)
    report.save(tmp_path)
    saved = json.loads((tmp_path / "tpp.json").read_text())
    assert "2605.18229" in saved["warning"] and saved["rows"] == report.records
    assert (tmp_path / "tpp.png").stat().st_size > 10_000
    assert {row["kind"] for row in report.records} == {"dictionary", "random", "neurons"}


@pytest.fixture(scope="module")
def embedded() -> HeldOut:
    model, tokenizer = load_embedded_lm()
    return HeldOut(model.eval(), [], "model.layers.1", None, tokenizer)


def texts(count: int = 160) -> dict[str, list]:
    nouns, endings = ("film", "book"), ("was dull and bad", "was a joy to see")
    written = [
        f"This {nouns[n % 2]} {endings[n // 2 % 2]}, says reader {n} of the {n % 7} papers." for n in range(count)
    ]
    return {
        "text": written,
        "what": [n % 2 for n in range(count)],
        "liked": ["no" if n // 2 % 2 else "yes" for n in range(count)],
    }


def test_two_columns_are_two_attributes_of_texts(embedded):
    task = attribute_task(texts(), ("what", "liked"), max_texts=120)
    assert task.classes == ["what 1", "liked yes"] and len(task.texts) == 120
    for text, (what, liked) in zip(task.texts, task.labels.tolist(), strict=True):
        assert what == ("book" in text) and liked == ("dull" in text)
    sae = build_sae(TopKSAEConfig(d_in=128, num_latents=64, k=4)).eval()
    report = scr(embedded, sae, task, least=3, splits=2)
    assert report.about["examples"] == {"texts": 120}
    assert list(report.about["tasks"]) == ["labels: what 1 x labels: liked yes"]


def test_attributes_that_are_none_are_refused():
    rows = texts()
    with pytest.raises(ValueError, match="no column 'wht'. *|Did you mean"):
        attribute_task(rows, ("wht", "liked"))
    with pytest.raises(ValueError, match="must have two classes, got 160"):
        attribute_task({**rows, "what": list(range(160))}, ("what", "liked"))
    rows["liked"] = ["no" if n % 2 else "yes" for n in range(160)]  # always as `what`
    with pytest.raises(ValueError, match="Each combination of what and liked needs 20 texts"):
        attribute_task(rows, ("what", "liked"))


def test_what_cannot_be_measured_is_told():
    data, task = two_attributes()
    sae = dictionary({})
    with pytest.raises(ValueError, match="`latents` must hold numbers of latents, each at least 1; got \\[0\\]"):
        scr(data, sae, task, latents=(0,))
    with pytest.raises(ValueError, match="`most` must be at least 20, got 5"):
        scr(data, sae, task, most=5)
    with pytest.raises(ValueError, match="`pairs` must hold pairs of two of label 0, label 1; got \\['label 9'\\]"):
        scr(data, sae, task, [("label 0", "label 9")])
    with pytest.raises(ValueError, match="No pair of attributes has 300 examples"):
        scr(data, sae, task, least=300, most=1000)
    with pytest.raises(ValueError, match="TPP needs three classes"):
        tpp(data, sae, task)
    with pytest.raises(ValueError, match="'sae' is a int"):
        scr(data, 3, task)
    with pytest.raises(ValueError, match="the data has no batches"):
        scr(Table(data.model, [], "table"), sae, task)


def test_an_example_of_several_classes_has_none():
    assert class_of(torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 0], [0, 0, 1]]).bool()).tolist() == [0, -1, -1, 2]


def test_classes_of_texts(embedded):
    rows = texts()
    three = LabelledTask.from_dataset({"text": rows["text"], "label": [n % 3 for n in range(160)]})
    sae = build_sae(TopKSAEConfig(d_in=128, num_latents=64, k=4)).eval()
    report = tpp(embedded, sae, three, least=5, splits=2, baselines=False)
    assert list(report.about["tasks"]) == ["labels: 0", "labels: 1", "labels: 2"]


def _one_of_two(rank: int) -> list[dict]:
    data, task = two_attributes()
    return scr(data, dictionary({A: 0, B: 1, NOT_B: -1}), task).records


@pytest.mark.slow
def test_two_processes_find_what_one_finds(two_processes):
    data, task = two_attributes()
    alone = scr(data, dictionary({A: 0, B: 1, NOT_B: -1}), task)
    for rows in two_processes.run(_one_of_two):
        for row, same in zip(rows, alone.records, strict=True):
            assert row["score"] == pytest.approx(same["score"], abs=1e-9)
