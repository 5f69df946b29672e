"""Doses and costs against the same sums written out here; the search for a dose; the report's words and plot."""

import pytest
import torch
from torch.nn import functional as F

from hf_matryoshka_sae.activations import heldout_batches
from hf_matryoshka_sae.evaluation.data import HeldOut
from hf_matryoshka_sae.steering import DoseReport, Steering, auto_dose, dose_report

from ..activations import tiny
from .architectures import make_sae, model_of


LATENT = 3


@pytest.fixture(scope="module")
def data():
    model, hookpoint = model_of("llama")
    batches = heldout_batches(tiny.texts(60), tiny.tokenizer(), 16, 400, 8)
    return HeldOut(model, batches, hookpoint, None, tiny.tokenizer())


@pytest.fixture(scope="module")
def steering(data):
    return Steering.from_latents(make_sae(data.hookpoint), {LATENT: 0.1})


@torch.no_grad()
def loss_and_dose(data, vector):
    """Cross-entropy of the kept positions' predictions with a vector added, and mean of ||vector|| / ||state||."""
    losses, doses = [], []

    def hook(_, __, output):
        doses.append((vector.norm() / output.norm(dim=-1))[batch.keep])
        return output + vector

    for batch in data.batches:
        handle = data.model.get_submodule(data.hookpoint).register_forward_hook(hook)
        scores = data.model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
        handle.remove()
        scored = batch.keep[:, :-1] & batch.attention_mask[:, 1:].bool()
        losses.append(F.cross_entropy(scores[scored].double(), batch.input_ids[:, 1:][scored], reduction="none"))
    return float(torch.cat(losses).mean()), float(torch.cat(doses).mean())


def test_dose_and_cost_are_those_of_a_vector_added_by_hand(data, steering):
    report = dose_report(steering, data, factors=[4, 1], prompts=0, random_directions=1, show=False)
    plain, _ = loss_and_dose(data, torch.zeros(16))
    assert [record["factor"] for record in report.of("latent")] == [1, 4]
    for record in report.of("latent"):
        loss, dose = loss_and_dose(data, record["factor"] * steering.parts[0].vector)
        assert record["relative_dose"] == pytest.approx(dose, rel=1e-4)
        assert record["cost"] == pytest.approx(loss - plain, abs=1e-5)
    for latent, random in zip(report.of("latent"), report.of("random"), strict=True):
        assert random["relative_dose"] == pytest.approx(latent["relative_dose"], rel=1e-4)
        assert random["cost"] != latent["cost"]
    assert "nothing is known of the effect" in report.summary


def test_wanted_and_firing_tokens_are_counted_in_what_is_sampled(data, steering):
    options = dict(factors=[30], prompts=6, new_tokens=5, random_directions=1, show=False, seed=4)
    report = dose_report(steering, data, wanted=r" ?w1\d*", prompt="w7 w8", **options)
    (steered,) = report.of("latent")
    starts = torch.cat([batch.input_ids[:, :8] for batch in data.batches])[:6]
    torch.manual_seed(4)
    with steering.scaled(30).applied(data.model, quiet=True):
        whole = data.model.generate(
            starts,
            attention_mask=torch.ones_like(starts),
            do_sample=True,
            top_k=0,
            pad_token_id=5,
            max_new_tokens=5,
            min_new_tokens=5,
        )
    texts = [data.tokenizer.decode([token]).strip() for token in whole[:, 8:].flatten().tolist()]
    assert steered["wanted"] == pytest.approx(sum(text.startswith("w1") for text in texts) / 30)
    with torch.no_grad():
        states = data.model.model(whole, output_hidden_states=True).hidden_states[2]
        fires = steering.parts[0].sae.encode(states).to_dense()[:, 8:, LATENT] > 0
    assert steered["fires"] == pytest.approx(float(fires.float().mean()))
    low, high = steered["fires_interval"]
    assert low <= steered["fires"] <= high
    assert report.of("prompt")[0]["cost"] is None and len(report.of("plain")) == 1


def test_an_auto_dose_is_the_largest_within_the_cost(data, steering):
    factor = auto_dose(steering, data, max_cost=0.01, show=False)
    plain, _ = loss_and_dose(data, torch.zeros(16))
    within, beyond = (loss_and_dose(data, f * steering.parts[0].vector)[0] - plain for f in (factor, 1.03 * factor))
    assert within <= 0.01 < beyond
    made = Steering.from_latents(steering.parts[0].sae, {LATENT: 0.1}, dose="auto", data=data, max_cost=0.01)
    assert made.parts[0].values[0] == pytest.approx(0.1 * factor)


def test_a_report_is_kept_with_the_artefact(data, steering, tmp_path):
    report = dose_report(steering, data, factors=[1, 50], prompts=4, new_tokens=3, random_directions=1, show=False)
    made = Steering(steering.parts, report.to_dict())
    made.save_pretrained(tmp_path)
    assert (tmp_path / "dose.png").stat().st_size > 1000
    card = (tmp_path / "README.md").read_text()
    assert "| latent | 50 |" in card and report.summary in card
    loaded = DoseReport.from_dict(Steering.from_pretrained(tmp_path).dose)
    assert str(loaded) == str(report)
    assert made.scaled(2).dose is None


def record(kind, dose, cost, wanted):
    low, high = wanted - 0.02, wanted + 0.02
    shares = dict.fromkeys(("wanted", "fires"), wanted) | {
        f"{name}_interval": [low, high] for name in ("wanted", "fires")
    }
    return {"kind": kind, "factor": dose, "relative_dose": dose, "cost": cost} | shares


def test_a_useful_dose_does_more_than_a_random_direction_within_the_cost():
    def report(*latent):
        return DoseReport(
            [
                record("plain", 0.0, 0.0, 0.1),
                record("random", 0.1, 0.01, 0.1),
                record("random", 0.2, 0.05, 0.3),
                *latent,
            ],
            {"max_cost": 0.1, "wanted": "digits"},
            1.0,
        )

    both = report(record("latent", 0.1, 0.02, 0.2), record("latent", 0.2, 0.08, 0.5))
    assert [each["factor"] for each in both.useful] == [0.1, 0.2] and "0.1 to 0.2" in both.summary
    first = report(record("latent", 0.1, 0.02, 0.2), record("latent", 0.2, 0.08, 0.3))
    assert [each["factor"] for each in first.useful] == [0.1]
    none = report(record("latent", 0.1, 0.02, 0.11), record("latent", 0.2, 0.2, 0.9))
    assert not none.useful and "No dose within 0.1 nats" in none.summary


def test_what_cannot_be_measured_is_said(data, steering):
    sae = steering.parts[0].sae
    for options, message in [
        (dict(factors=[0.0]), "`factors`"),
        (dict(wanted="nothing of the kind"), "No token is wanted"),
        (dict(wanted="["), "no regular expression"),
    ]:
        with pytest.raises(ValueError, match=message):
            dose_report(steering, data, prompts=2, show=False, **options)
    with pytest.raises(ValueError, match="no value that could be larger"):
        auto_dose(Steering.from_latents(sae, [LATENT], "remove"), data, show=False)
    with pytest.raises(ValueError, match="`max_cost` must be above 0"):
        auto_dose(steering, data, max_cost=0, show=False)
    with pytest.raises(ValueError, match="adds nothing"):
        auto_dose(Steering.from_latents(sae, {LATENT: 0.0}), data, show=False)
    assert (
        len(dose_report(Steering.from_latents(sae, [LATENT], "remove"), data, prompts=0, show=False).of("latent")) == 1
    )
