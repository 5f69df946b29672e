"""Against dense float64 sums over all tokens at once, with the language model's layers run by hand."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from hf_matryoshka_sae.activations import load_language_model
from hf_matryoshka_sae.evaluation import Dictionary, HeldOut, evaluate_fidelity, language_model, open_heldout
from hf_matryoshka_sae.evaluation.language_model import LossScaling
from hf_matryoshka_sae.models import CONFIGS, MODELS


HOOKPOINT = "model.layers.1"


@pytest.fixture(scope="module")
def data() -> HeldOut:
    return open_heldout(hookpoint=HOOKPOINT, tokens=700, context_length=40, lm_batch_size=5)


def build(kind: str, **fields):
    torch.manual_seed(1)
    sae = MODELS[CONFIGS[kind]](CONFIGS[kind](d_in=128, num_latents=48, **fields)).eval()
    sae.W_enc.data *= 0.1
    if hasattr(sae, "threshold"):
        sae.threshold.data.fill_(0.3)
    return sae


def spliced_by_hand(data: HeldOut, replacement) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Log-probabilities in float64 of a float64 model, by a hook of our own, and the right tokens."""
    model, _ = load_language_model("embedded")
    model = model.double()
    logits, targets = [], []
    for batch in data.batches:

        def hook(module, arguments, output, batch=batch):
            states = (output[0] if isinstance(output, tuple) else output).clone()
            if replacement is not None:
                states[batch.keep] = replacement(states[batch.keep])
            return (states, *output[1:]) if isinstance(output, tuple) else states

        handle = model.model.layers[1].register_forward_hook(hook)
        with torch.no_grad():
            out = model(batch.input_ids).logits
        handle.remove()
        scored = batch.keep[:, :-1]
        logits.append(out[:, :-1][scored].log_softmax(-1))
        targets.append(batch.input_ids[:, 1:][scored])
    return torch.cat(logits), torch.cat(targets)


@pytest.mark.parametrize(
    "kind, fields",
    [("matryoshka", {"k": 5, "prefix_widths": [8, 20, 48]}), ("jumprelu", {})],
)
def test_rows_equal_a_float64_evaluation(data, kind, fields):
    sae, widths = build(kind, **fields), [8, 20, 48]
    result = evaluate_fidelity(data, {"it": Dictionary(sae, widths)}, similarity_tokens=20, show=False)
    x = torch.cat(list(data.activations())).double()
    with torch.no_grad():
        dense = torch.cat([sae.encode(part.float()).to_dense() for part in x.split(100)]).double()
    clean, targets = spliced_by_hand(data, None)
    zero, _ = spliced_by_hand(data, torch.zeros_like)
    assert result["tokens"] == len(x)
    assert result["clean_ce"] == pytest.approx(cross_entropy(clean, targets).item(), rel=1e-5)
    assert result["zero_ce"] == pytest.approx(cross_entropy(zero, targets).item(), rel=1e-5)
    for row, width in zip(result["subjects"]["it"], widths, strict=True):
        out = dense[:, :width] @ sae.W_dec[:width].double() + sae.b_dec.double()
        fvu = (x - out).square().sum() / (x - x.mean(0)).square().sum()
        fired = dense[:, :width] > 0
        assert row["fvu"] == pytest.approx(fvu.item(), rel=1e-5)
        assert row["l0"] == pytest.approx(fired.double().sum(1).mean().item())
        assert row["l1"] == pytest.approx(dense[:, :width].sum(1).mean().item(), rel=1e-6)
        assert row["dead"] == pytest.approx((~fired.any(0)).double().mean().item())

        def replace(states, width=width):
            kept = sae.encode(states.float()).to_dense()[:, :width].double()
            return kept @ sae.W_dec[:width].double() + sae.b_dec.double()

        with torch.no_grad():
            spliced, _ = spliced_by_hand(data, replace)
        ce = cross_entropy(spliced, targets).item()
        assert row["ce"] == pytest.approx(ce, rel=1e-5)
        assert row["kl"] == pytest.approx((clean.exp() * (clean - spliced)).sum(1).mean().item(), rel=1e-4)
        clean_ce, zero_ce = (cross_entropy(part, targets).item() for part in (clean, zero))
        assert row["recaptured_zero"] == pytest.approx((zero_ce - ce) / (zero_ce - clean_ce), rel=1e-4)


def test_restricting_a_topk_dictionary_is_its_prefix(data):
    sae = build("topk", k=5)
    rows = evaluate_fidelity(data, {"it": Dictionary(sae, [8, 48], "restrict")}, similarity_tokens=20, show=False)[
        "subjects"
    ]["it"]
    small = evaluate_fidelity(data, {"it": Dictionary(sae.truncate(8))}, similarity_tokens=20, show=False)["subjects"][
        "it"
    ]
    masked = evaluate_fidelity(data, {"it": Dictionary(sae, [8, 48])}, similarity_tokens=20, show=False)["subjects"][
        "it"
    ]
    for key in ("fvu", "l0", "l1", "dead", "ce", "kl"):
        assert rows[0][key] == pytest.approx(small[0][key], rel=1e-6), key
    assert rows[0]["l0"] > masked[0]["l0"]
    assert rows[1]["fvu"] == pytest.approx(masked[1]["fvu"], rel=1e-6)


def test_ablated_losses_are_kept_with_the_states_of_the_same_text(data, monkeypatch):
    """Who keeps hidden states measures zero and mean once; another text or another hookpoint has its own."""
    kept: dict = {}
    keeping, sae = replace(data, kept_states=kept), build("topk", k=5)
    passes = []
    logits = language_model.spliced_logits
    monkeypatch.setattr(language_model, "spliced_logits", lambda *a, **k: passes.append(1) or logits(*a, **k))

    def measured(source):
        passes.clear()
        return evaluate_fidelity(source, {"it": Dictionary(sae, [48])}, similarity_tokens=0, show=False), len(passes)

    (plain, each), batches = measured(data), len(data.batches)
    assert each == 4 * batches
    assert measured(keeping) == (plain, 4 * batches) and measured(keeping) == (plain, 2 * batches)
    half, elsewhere = replace(keeping, batches=data.batches[:2]), replace(keeping, hookpoint="model.layers.0")
    for source in (half, elsewhere):
        expected, _ = measured(replace(source, kept_states=None))
        assert measured(source) == (expected, 4 * len(source.batches))


def test_activations_alone_give_no_losses(data):
    batches = list(data.activations())
    rows = evaluate_fidelity(batches, {"it": Dictionary(build("relu"))}, similarity_tokens=20, show=False)["subjects"][
        "it"
    ]
    assert rows[0]["ce"] is None and 0 < rows[0]["rsa"]["spearman"] < 1


def test_what_does_not_fit_is_said(data):
    sae = build("relu")
    with pytest.raises(ValueError, match="between 1 and 48"):
        Dictionary(sae, [0, 8])
    with pytest.raises(ValueError, match="d_in = 128"):
        evaluate_fidelity([torch.zeros(4, 7)], {"it": Dictionary(sae)}, similarity_tokens=20, show=False)
    with pytest.raises(ValueError, match="no held-out tokens"):
        evaluate_fidelity([], {"it": Dictionary(sae)}, similarity_tokens=20, show=False)


def test_a_share_of_compute_is_that_of_the_law():
    """Against losses made by the law from compute that is known."""
    law = LossScaling(exponent=0.3, irreducible=1.7)
    losses = {compute: 1.7 + (1e3 / compute) ** 0.3 for compute in (1e6, 1e7)}
    assert law.compute_share(losses[1e7], losses[1e6]) == pytest.approx(0.1)
    assert law.compute_share(losses[1e6], losses[1e6]) == pytest.approx(1)
    with pytest.raises(ValueError, match="must be below the language model's on this text, 1.5"):
        law.compute_share(1.5, 3.0)
    with pytest.raises(ValueError, match="exponent above 0"):
        LossScaling(0.0)
