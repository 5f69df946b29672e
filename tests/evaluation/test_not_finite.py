"""What a language model makes NaN is in no figure and counted; what an SAE makes NaN is shown."""

import json

import pytest
import torch

from hf_matryoshka_sae.common.files import write_json
from hf_matryoshka_sae.evaluation import Dictionary, evaluate_fidelity, open_heldout
from hf_matryoshka_sae.evaluation.baselines import PrincipalComponents
from hf_matryoshka_sae.evaluation.data import windows_of
from hf_matryoshka_sae.evaluation.report import plot, table

from .test_fidelity import build


HOOKPOINT, WIDTHS = "model.layers.1", [8, 20, 48]


@pytest.fixture
def data():
    return open_heldout(hookpoint=HOOKPOINT, tokens=500, context_length=40, lm_batch_size=5)


def break_windows(data, layer, broken, value=torch.nan):
    """Puts `value` at one position of the windows that `broken` says, where they pass a layer, whatever the batch."""
    ids, marked = [], torch.cat([batch.input_ids for batch in data.batches])[broken]

    def spoil(module, given, output):
        rows = (ids[0][:, None] == marked[None]).all(-1).any(1)
        output = output.clone()
        output[rows, 7, 3] = value
        return output

    data.model.model.embed_tokens.register_forward_pre_hook(lambda module, given: ids.__setitem__(slice(None), given))
    data.model.model.layers[layer].register_forward_hook(spoil)


def without(data, broken):
    """The batches without some windows."""
    parts = (~broken).split([len(batch.keep) for batch in data.batches])
    return [windows_of(batch, part) for batch, part in zip(data.batches, parts, strict=True) if part.any()]


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_windows_that_the_language_model_breaks_are_in_no_figure_and_counted(data, value):
    count = sum(len(batch.keep) for batch in data.batches)
    broken = torch.zeros(count, dtype=torch.bool)
    broken[:5] = broken[6] = True  # a batch of nothing else, and one of two windows
    data.batches, every = without(data, broken), data.batches
    sae = build("matryoshka", k=5, prefix_widths=WIDTHS)
    subjects = {"it": Dictionary(sae), "principal components": PrincipalComponents.fit(data, [8])}
    expected = evaluate_fidelity(data, subjects, similarity_tokens=50, show=False)
    data.batches = every
    break_windows(data, 1, broken, value)
    subjects = {"it": Dictionary(sae), "principal components": PrincipalComponents.fit(data, [8])}
    found = evaluate_fidelity(data, subjects, similarity_tokens=50, show=False)
    assert (expected.pop("excluded_windows"), found.pop("excluded_windows")) == (0, 6)
    for name, rows in expected.pop("subjects").items():
        for row, other in zip(rows, found["subjects"][name], strict=True):
            similarity = row.pop("rsa"), other.pop("rsa")
            assert similarity[0]["spearman"] == pytest.approx(similarity[1]["spearman"])
            assert other == pytest.approx(row, rel=1e-5), name
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_predictions_that_break_past_the_hookpoint_are_in_no_loss(data):
    broken = torch.zeros(sum(len(batch.keep) for batch in data.batches), dtype=torch.bool)
    broken[3] = True
    break_windows(data, 2, broken)
    result = evaluate_fidelity(data, {"it": Dictionary(build("topk", k=5), WIDTHS)}, show=False)
    assert result["excluded_windows"] == 0 and result["tokens"] == data.tokens
    scored = data.batches[0].keep[3, :-1]
    assert result["excluded_predictions"] == scored.sum()  # attention of 0 times NaN: what stands before it too
    assert all(torch.isfinite(torch.tensor(result[key])) for key in ("clean_ce", "zero_ce", "mean_ce"))
    for row in result["subjects"]["it"]:
        assert all(
            torch.isfinite(torch.tensor(row[key])) for key in ("ce", "kl", "recaptured_zero", "recaptured_mean")
        )


def test_text_of_which_nothing_is_finite_is_told(data):
    count = sum(len(batch.keep) for batch in data.batches)
    break_windows(data, 0, torch.ones(count, dtype=torch.bool))
    with pytest.raises(ValueError, match=f"All {count} windows .* NaN or infinity"):
        evaluate_fidelity(data, {"it": Dictionary(build("topk", k=5), WIDTHS)}, show=False)


def test_a_reconstruction_that_is_not_finite_is_shown_at_its_widths_alone(data, tmp_path):
    sae = build("relu")
    sae.W_dec.data[30] = torch.inf
    result = evaluate_fidelity(data, {"broken": Dictionary(sae, WIDTHS)}, show=False)
    result |= {"hookpoint": HOOKPOINT, "saes": result.pop("subjects")}
    whole = result["saes"]["broken"]
    assert [torch.tensor(row["fvu"]).isfinite().item() for row in whole] == [True, True, False]
    for row in whole[:2]:
        assert all(row[key] is not None and row[key] == row[key] for key in ("fvu", "ce", "kl", "cossim"))
    assert whole[2]["rsa"] is None and whole[2]["ce"] != whole[2]["ce"]
    assert "nan" in table([result]).splitlines()[-1]
    write_json(tmp_path / "results.json", {"results": [result]})
    text = (tmp_path / "results.json").read_text()
    again = json.loads(text, parse_constant=lambda literal: pytest.fail(f"{literal} is no JSON"))
    assert again["results"][0]["saes"]["broken"][2]["fvu"] is None
    assert " - " in table(again["results"])
    plot(again["results"], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size
