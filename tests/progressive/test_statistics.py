import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from hf_matryoshka_sae.activations import TokenStream, harvest
from hf_matryoshka_sae.evaluation.data import HeldOut
from hf_matryoshka_sae.progressive import statistics as module
from hf_matryoshka_sae.progressive.statistics import LatentStatistics, latent_statistics

from ..activations import tiny
from ..axes import each
from ..models.reference import OPTIONS, VARIANTS, F, assert_close, dense_latents, hidden_states, make_sae


def _decoder(sae):
    rows = sae.W_dec.detach()
    return rows / rows.norm(dim=1, keepdim=True) if sae.config.scale_by_decoder_norm else rows


def _dense(sae, x):
    return dense_latents(sae, dict(sae.state_dict()), x, F, "restrict").detach()


def _expected(sae, x):
    """The definitions, with N x F activations."""
    acts, rows = _dense(sae, x), _decoder(sae)
    residual = x - acts @ rows - sae.b_dec.detach()
    without = [(residual + acts[:, i : i + 1] * rows[i]).square().sum(1).mean() for i in range(F)]
    cosine = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
    neighbours = cosine.fill_diagonal_(-2).argsort(dim=1, descending=True)[:, :4]
    fires = (acts > 0).double()
    return {
        "frequency": fires.mean(0),
        "mean": acts.mean(0),
        "mean_square": acts.square().mean(0),
        "contribution": (acts[:, :, None] * rows).square().sum(2).mean(0),
        "leave_one_out": torch.stack(without) - residual.square().sum(1).mean(),
        "neighbours": neighbours,
        "cofiring": (fires.T @ fires / len(x)).gather(1, neighbours),
        "latent_ids": sae.latent_ids,
    }


def _check(found, expected):
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            assert getattr(found, name).dtype == torch.float64
            assert_close(getattr(found, name), tensor)
        else:
            assert torch.equal(getattr(found, name), tensor), name


@each(options=OPTIONS, variant=list(VARIANTS))
def test_statistics_equal_the_dense_reference(variant, options, way, monkeypatch):
    monkeypatch.setattr(module, "_ENTRIES_AT_ONCE", 5 * F)  # several blocks of tokens, and of neighbours
    sae, x = make_sae(variant, **options), hidden_states(64)
    found = latent_statistics(sae, x.split(23), neighbours=4)
    assert found.tokens == 64
    _check(found, _expected(sae, x))


def test_the_mode_of_the_sae_plays_no_part_and_stays():
    sae, x = make_sae("batch_topk").train(), hidden_states(40)
    found = latent_statistics(sae, [x], neighbours=4)
    assert sae.training
    _check(found, _expected(sae.eval(), x))


def test_bfloat16_hidden_states_are_summed_in_float64():
    sae, x = make_sae("relu", torch.float32), hidden_states(500).bfloat16()
    found = latent_statistics(sae, [x])
    expected = _expected(sae.double(), x.double())
    torch.testing.assert_close(found.mean_square, expected["mean_square"], rtol=1e-5, atol=0)
    torch.testing.assert_close(found.leave_one_out, expected["leave_one_out"], rtol=1e-4, atol=1e-5)


def test_an_sae_in_bfloat16_can_be_measured():
    sae = make_sae("jumprelu", torch.float32).bfloat16()
    found = latent_statistics(sae, [hidden_states(50)])
    assert all(tensor.isfinite().all() for tensor in found.tensors().values())


def test_a_latent_that_never_fires_has_zeros_and_one_latent_has_no_neighbours():
    sae = make_sae("relu")
    with torch.no_grad():
        sae.b_enc[3] = -1e6
    found = latent_statistics(sae, [hidden_states(30)])
    assert found.frequency[3] == found.mean_square[3] == found.leave_one_out[3] == found.cofiring[3].sum() == 0
    assert latent_statistics(sae.truncate(1), [hidden_states(30)]).neighbours.shape == (1, 0)
    silent = latent_statistics(sae.truncate(4), [torch.full((5, 6), 1e-9)[:0], hidden_states(1)], neighbours=0)
    assert silent.tokens == 1 and silent.cofiring.shape == (4, 0)


# Attribution


def _heldout(batches=3):
    stream = TokenStream(tiny.texts(60), tiny.tokenizer(), 16, 4)
    return HeldOut(tiny.llama(), [next(stream) for _ in range(batches)], "model.layers.1")


@each(variant=["topk", "gated", "matryoshka-jumprelu"], options=OPTIONS)
def test_attribution_is_the_gradient_with_the_error_kept(variant, options):
    """x = reconstruction + error, the error held fixed: autograd through the decoder gives dL/da."""
    data, sae = _heldout(), make_sae(variant, torch.float32, d_in=16, **options)
    found = latent_statistics(sae, data, attribution=True)
    total, tokens, rows = torch.zeros(F), 0, _decoder(sae)
    for batch in data.batches:
        x = harvest(data.model, batch.input_ids, None, [data.hookpoint])[data.hookpoint]
        acts = dense_latents(sae, dict(sae.state_dict()), x.flatten(0, 1), F, "restrict").detach().requires_grad_()
        error = x.flatten(0, 1) - acts.detach() @ rows
        states = torch.where(batch.keep[..., None], (acts @ rows + error).view_as(x), x)
        handle = data.model.model.layers[1].register_forward_hook(lambda *_, states=states: states)
        logits = data.model(batch.input_ids).logits
        handle.remove()
        scored = batch.keep[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1][scored], batch.input_ids[:, 1:][scored], reduction="sum"
        )
        (gradient,) = torch.autograd.grad(loss, acts)
        total += (acts * gradient)[batch.keep.flatten()].abs().sum(0).detach()
        tokens += int(batch.keep.sum())
    assert found.tokens == tokens
    torch.testing.assert_close(found.attribution.float(), total / tokens, rtol=1e-4, atol=1e-7)
    assert found.attribution.max() > 1e-4
    without = latent_statistics(sae, data)
    assert without.attribution is None
    torch.testing.assert_close(without.mean_square, found.mean_square, rtol=1e-5, atol=1e-9)


def test_attribution_needs_the_language_model():
    with pytest.raises(ValueError, match="pass a `HeldOut`"):
        latent_statistics(make_sae("topk"), [hidden_states(4)], attribution=True)


# Errors


def test_bad_data_is_named():
    sae, bad = make_sae("topk"), hidden_states(10)
    bad[2:5, 1], bad[7, 0] = torch.nan, torch.inf
    with pytest.raises(ValueError, match="4 of the 10 hidden states of batch 1 are not finite"):
        latent_statistics(sae, [hidden_states(10), bad])
    with pytest.raises(ValueError, match=r"shape \(n, 6\), got \(3, 5\)"):
        latent_statistics(sae, [torch.zeros(3, 5)])
    with pytest.raises(ValueError, match="activations are empty"):
        latent_statistics(sae, [])
    with pytest.raises(ValueError, match="`neighbours` must be at least 0"):
        latent_statistics(sae, [hidden_states(2)], neighbours=-1)


# Reordering


def test_selected_statistics_are_those_of_the_permuted_sae():
    sae, x, order = make_sae("jumprelu"), hidden_states(64), torch.randperm(F)
    found = latent_statistics(sae, [x], neighbours=4)
    sae.permute_(order)
    chosen = found.select(order)
    _check(chosen, _expected(sae, x))
    chosen.check(sae)
    with pytest.raises(ValueError, match="in another order"):
        found.check(sae)
    with pytest.raises(ValueError, match="13 latents, the SAE has 5"):
        found.check(sae.truncate(5))


def test_neighbours_that_are_gone_become_minus_one_and_stay_so():
    found = latent_statistics(make_sae("relu"), [hidden_states(64)], neighbours=4)
    kept = torch.tensor([7, 2, 11, 0])
    chosen = found.select(kept)
    for row, old in enumerate(kept.tolist()):
        for slot in range(4):
            neighbour = chosen.neighbours[row, slot]
            if neighbour >= 0:
                assert kept[neighbour] == found.neighbours[old, slot]
                assert chosen.cofiring[row, slot] == found.cofiring[old, slot]
            else:
                assert found.neighbours[old, slot] not in kept and chosen.cofiring[row, slot] == 0
    assert (chosen.neighbours < 0).any() and (chosen.neighbours >= 0).any()
    again = chosen.select(torch.arange(4))
    assert torch.equal(again.neighbours, chosen.neighbours)


@pytest.mark.parametrize(
    "kept, message",
    [
        ([0, 0, 1], "1 repeats"),
        ([0, F], "numbered 0 to 12"),
        ([-1, 0], "numbered"),
        ([0.5], "float32"),
        ([[1]], "shape"),
    ],
)
def test_a_selection_that_is_none_is_refused(kept, message):
    found = latent_statistics(make_sae("relu"), [hidden_states(4)])
    with pytest.raises(ValueError, match=message):
        found.select(torch.tensor(kept))


# Files


@pytest.mark.parametrize("with_attribution", [False, True])
def test_statistics_survive_the_disk(tmp_path, with_attribution):
    found = latent_statistics(make_sae("topk"), [hidden_states(64)])
    if with_attribution:
        found = dataclasses.replace(found, attribution=torch.rand(F, dtype=torch.float64))
    path = found.save(tmp_path / "sae")
    assert [file.name for file in path.parent.iterdir()] == ["statistics.safetensors"]
    for source in (path, path.parent):
        loaded = LatentStatistics.load(source)
        assert loaded.tokens == found.tokens and loaded.tensors().keys() == found.tensors().keys()
        assert all(torch.equal(tensor, found.tensors()[name]) for name, tensor in loaded.tensors().items())


def test_broken_files_are_errors(tmp_path):
    found = latent_statistics(make_sae("topk"), [hidden_states(8)])
    with pytest.raises(ValueError, match="no latent statistics at"):
        LatentStatistics.load(tmp_path)
    path = found.save(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged or half-written"):
        LatentStatistics.load(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="no file of format"):
        LatentStatistics.load(path)
    metadata = {"format": "hf_matryoshka_sae.latent_statistics/1", "tokens": "8"}
    tensors = found.tensors()
    save_file({name: tensor for name, tensor in tensors.items() if name != "mean"}, path, metadata)
    with pytest.raises(ValueError, match="has not the tensors of latent statistics"):
        LatentStatistics.load(path)
    save_file(tensors | {"mean": tensors["mean"][:3].clone()}, path, metadata)
    with pytest.raises(ValueError, match="different numbers of latents"):
        LatentStatistics.load(path)


@pytest.mark.parametrize("tokens", ["-5", "0", "", "1.5", "abc", "9" * 5000])
def test_a_number_of_tokens_is_one(tmp_path, tokens):
    found = latent_statistics(make_sae("topk"), [hidden_states(8)])
    metadata = {"format": "hf_matryoshka_sae.latent_statistics/1", "tokens": tokens}
    save_file(found.tensors(), tmp_path / "statistics.safetensors", metadata)
    with pytest.raises(ValueError, match="statistics.safetensors states .* tokens"):
        LatentStatistics.load(tmp_path)


@pytest.mark.parametrize(
    "name, change",
    [
        ("mean", lambda tensor: tensor.fill_(float("nan"))),
        ("contribution", lambda tensor: tensor.fill_(float("inf"))),
        ("frequency", lambda tensor: tensor.fill_(1.5)),
        ("frequency", lambda tensor: tensor.fill_(-0.5)),
        ("cofiring", lambda tensor: tensor[:, :1]),
        ("mean", lambda tensor: tensor[:, None]),
        ("mean", lambda tensor: tensor[0]),
        ("mean_square", lambda tensor: tensor.long()),
        ("leave_one_out", lambda tensor: tensor > 0),
        ("latent_ids", lambda tensor: tensor.double()),
        ("latent_ids", lambda tensor: tensor - 100),
        ("neighbours", lambda tensor: tensor + F),
    ],
)
def test_statistics_that_no_measurement_gives_are_refused(tmp_path, name, change):
    found = latent_statistics(make_sae("topk"), [hidden_states(8)])
    broken = found.tensors() | {name: change(found.tensors()[name].clone()).contiguous()}
    dataclasses.replace(found, **broken).save(tmp_path)
    with pytest.raises(ValueError, match="statistics.safetensors.*Measure it anew"):
        LatentStatistics.load(tmp_path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    found = latent_statistics(make_sae("topk"), [hidden_states(8)])
    path = found.save(tmp_path)
    before = path.read_bytes()

    def fail(tensors, staged, metadata):
        staged.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        found.save(tmp_path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# Processes


def _one_of_two(rank, x):
    return latent_statistics(make_sae("topk"), x.split(16)[rank::2])


def test_two_processes_agree_with_one(two_processes):
    x = hidden_states(80)
    torch.manual_seed(0)
    one = latent_statistics(make_sae("topk"), x.split(16))
    for found in two_processes.run(_one_of_two, x):
        assert found.tokens == 80
        _check(found, one.tensors())
