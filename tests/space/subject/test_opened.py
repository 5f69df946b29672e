"""Rankings, prunings and figures of an open SAE, against numpy, `prune` and `evaluate_fidelity`."""

import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModel

from hf_matryoshka_sae.activations import harvest
from hf_matryoshka_sae.assets import embedded_sae_path
from hf_matryoshka_sae.evaluation import Dictionary, evaluate_fidelity
from hf_matryoshka_sae.models import ReluSAE, ReluSAEConfig, TopKSAE, TopKSAEConfig
from hf_matryoshka_sae.progressive import LatentStatistics, latent_statistics, prune
from hf_matryoshka_sae.space import Library
from hf_matryoshka_sae.space.endpoints import Endpoints
from hf_matryoshka_sae.space.subject import indexes, prunings
from hf_matryoshka_sae.space.subject.prunings import Pruning, size_mb


TOKENS, PLACE = 2000, "model.layers.2"
WIDTHS = [64, 192, 448, 960, 2048]


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(tokens=TOKENS)


@pytest.fixture(scope="module")
def embedded(library):
    return library.open("embedded")


@pytest.fixture(scope="module")
def states(embedded) -> torch.Tensor:
    """Hidden states `(N, D)` of the held-out text."""
    found = []
    for batch in embedded.data.batches:
        harvested = harvest(embedded.data.model, batch.input_ids, batch.attention_mask, [PLACE])[PLACE]
        found.append(harvested[batch.keep].float())
    return torch.cat(found)


def saved(sae, folder):
    sae.save_pretrained(folder)
    return str(folder)


def topk(folder) -> str:
    torch.manual_seed(1)
    config = TopKSAEConfig(d_in=128, num_latents=96, k=12, base_model="embedded", hookpoint=PLACE)
    return saved(TopKSAE(config), folder)


def relu(folder) -> str:
    torch.manual_seed(1)
    config = ReluSAEConfig(d_in=128, num_latents=48, base_model="embedded", hookpoint=PLACE)
    return saved(ReluSAE(config), folder)


def changed_copy(folder) -> str:
    """The embedded SAE with its index and statistics, and one weight that is another."""
    shutil.copytree(embedded_sae_path(), folder)
    sae = AutoModel.from_pretrained(folder)
    sae.W_enc.data[5, 7] += 1
    return saved(sae, folder)


# Rankings


@pytest.mark.parametrize(
    "ranking, field", [("energy", "mean_square"), ("frequency", "frequency"), ("attribution", "attribution")]
)
def test_latents_are_ranked_within_their_prefix(embedded, ranking, field):
    scores = getattr(LatentStatistics.load(embedded_sae_path()), field).numpy()
    expected = []
    for start, stop in zip([0, *WIDTHS], WIDTHS, strict=False):
        expected += (start + np.argsort(-scores[start:stop], kind="stable")).tolist()
    assert embedded.order(ranking).tolist() == expected
    assert embedded.order("trained").tolist() == list(range(2048))


def test_places_are_where_the_rankings_have_a_latent(embedded):
    for latent in (0, 5, 64, 2047):
        places = embedded.places(latent)
        assert list(places) == ["trained", "energy", "frequency", "attribution"] and places["trained"] == latent
        for ranking, place in places.items():
            assert embedded.order(ranking)[place] == latent


def test_places_do_not_wait_for_measuring(library, tmp_path):
    sae = library.open(topk(tmp_path))
    assert sae.places(3) == {"trained": 3}
    sae.order("energy")
    assert set(sae.places(3)) == {"trained", "energy", "frequency", "attribution"}


def test_statistics_beside_the_sae_are_used(embedded):
    assert embedded.statistics().tokens == LatentStatistics.load(embedded_sae_path()).tokens != TOKENS


def test_statistics_of_other_latents_are_measured_anew(library, embedded, states, tmp_path):
    shutil.copytree(embedded_sae_path(), tmp_path, dirs_exist_ok=True)
    pruned = saved(embedded.sae.truncate(64), tmp_path)  # beside the statistics of all 2,048
    found = library.open(pruned).statistics()
    with torch.no_grad():
        acts = embedded.sae.truncate(64).eval().encode(states).to_dense().double()
    assert found.tokens == len(states) and len(found) == 64
    torch.testing.assert_close(found.mean_square, acts.square().mean(0), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found.frequency, (acts > 0).double().mean(0))


# What is asked for


def test_defaults_are_filled_in(embedded):
    assert embedded.check(Pruning()) == Pruning("trained", 2048, None)
    assert embedded.check(Pruning(k=16)).k is None  # as trained
    assert embedded.check(Pruning("energy", 5, 9)) == Pruning("energy", 5, 5)


def test_k_is_left_out_where_there_is_none(library, tmp_path):
    sae = library.open(relu(tmp_path))
    assert not sae.counts and sae.check(Pruning(k=3)) == Pruning("trained", 48, None)


@pytest.mark.parametrize(
    "pruning, message",
    [
        (Pruning("best"), "trained, energy, frequency, attribution; got 'best'"),
        (Pruning(width=-1), "between 1 and 2048, got -1"),
        (Pruning(width=2049), "between 1 and 2048, got 2049"),
        (Pruning(k=0), "at least 1 latent per token, got 0"),
        (Pruning(k=-4), "at least 1 latent per token, got -4"),
    ],
)
def test_what_there_is_not_is_said(embedded, pruning, message):
    with pytest.raises(ValueError, match=message):
        embedded.check(pruning)


# Prunings


@pytest.mark.parametrize("ranking, width", [("energy", 300), ("frequency", 2048), ("attribution", 1)])
def test_a_pruning_is_what_prune_leaves(embedded, ranking, width):
    found = embedded.pruned(Pruning(ranking, width))
    whole = AutoModel.from_pretrained(embedded_sae_path())
    expected = prune(whole, width, by=ranking, statistics=LatentStatistics.load(embedded_sae_path()))
    assert not found.training and found.config.num_latents == width
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_the_trained_order_is_cut_off(embedded):
    found = embedded.pruned(Pruning(width=100))
    whole = AutoModel.from_pretrained(embedded_sae_path())
    assert torch.equal(found.W_dec, whole.W_dec[:100]) and found.prefix_widths == [64, 100]
    assert embedded.pruned(Pruning(width=2048)) is embedded.sae


@pytest.mark.parametrize("ranking, width, k", [("trained", 960, 8), ("energy", 448, 20), ("trained", 2048, 30)])
def test_k_of_a_batch_topk_sae_is_how_many_fire(embedded, states, ranking, width, k):
    sae = embedded.pruned(embedded.check(Pruning(ranking, width, k)))
    with torch.no_grad():
        l0 = (sae.encode(states).to_dense() > 0).sum(1).double().mean()
    assert float(l0) == pytest.approx(k, rel=0.05) and sae.config.k == k
    assert embedded.sae.config.k == 16  # of the SAE itself nothing changed


@pytest.mark.parametrize("width, k", [(96, 5), (96, 20), (40, 3), (8, 30)])
def test_k_of_a_topk_sae_is_how_many_fire(library, states, tmp_path, width, k):
    whole = library.open(topk(tmp_path / "topk"))
    pruning = whole.check(Pruning("trained", width, k))
    assert pruning.k == min(k, width)
    for sae in (whole.pruned(pruning), AutoModel.from_pretrained(saved(whole.pruned(pruning), tmp_path / "pruned"))):
        with torch.no_grad():
            pre = (states - sae.b_dec) @ sae.W_enc.T + sae.b_enc
            fires = sae.encode(states).to_dense() > 0
        assert torch.equal(fires.sum(1), (pre > 0).sum(1).clamp(max=pruning.k))
    assert whole.sae.k == whole.sae.config.k == 12


def test_what_is_kept_has_an_end(embedded):
    for width in range(1, 31):
        embedded.pruned(Pruning(width=width))
    assert sum(isinstance(key, tuple) and key[0] == "pruned" for key in embedded._kept) <= 8
    assert embedded.pruned(Pruning(width=1)).config.num_latents == 1


# Figures


def test_figures_are_those_of_the_sae_that_is_downloaded(embedded):
    found = embedded.measured(Pruning(width=192))
    smaller = AutoModel.from_pretrained(embedded_sae_path(), width=192).eval()
    expected = evaluate_fidelity(embedded.data, {"it": Dictionary(smaller, [192])})
    (row,) = expected.pop("subjects")["it"]
    for name, value in (expected | row).items():
        assert found[name] == pytest.approx(value, rel=1e-6) if isinstance(value, float) else found[name] == value
    assert found["tokens"] == TOKENS


def test_figures_are_measured_once(embedded, monkeypatch):
    first = embedded.measured(Pruning(width=7))
    calls = []
    monkeypatch.setattr(prunings, "evaluate_fidelity", lambda *args, **options: calls.append(args))
    monkeypatch.setattr(embedded.data.model, "forward", lambda *args, **options: calls.append(args))
    assert embedded.has("measured", Pruning(width=7)) and not embedded.has("measured", Pruning(width=8))
    assert embedded.measured(Pruning(width=7)) == first and not calls


def test_the_size_is_that_of_the_file(embedded, tmp_path):
    sae = embedded.pruned(Pruning(width=192))
    sae.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size / 1e6
    assert size_mb(sae) < size < size_mb(sae) + 0.002


# Its index


def test_an_index_of_other_weights_is_not_taken(library, embedded, tmp_path):
    assert embedded.index is not None and embedded.labels[461] != ""
    other = library.open(changed_copy(tmp_path / "changed"))
    assert other.index is None and other.labels[461] == ""
    assert Endpoints(library).describe(other.source)["index_tokens"] is None
    for asked in (other.require_index, other.tree, other.columns):
        with pytest.raises(ValueError, match="no feature index yet. Build it"):
            asked()


@pytest.mark.slow
def test_an_index_that_was_built_is_there_also_tomorrow(library, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MATRYOSHKA_SAE_CACHE", str(tmp_path / "cache"))
    folder = topk(tmp_path / "topk")
    sae = library.open(folder)
    assert sae.index is None
    assert indexes.build(sae, 1500) == 1500
    built = sae.require_index()
    assert built.about["tokens"] == 1500 and len(built) == 96
    assert {path.name for path in (tmp_path / "topk").iterdir()} == {"config.json", "model.safetensors"}
    again = Library(tokens=500).open(folder)
    assert again.index is not None and again.index.peak_tokens() == built.peak_tokens()
    monkeypatch.setenv("HF_MATRYOSHKA_SAE_CACHE", str(tmp_path / "elsewhere"))
    assert Library(tokens=500).open(folder).index is None


def test_measured_statistics_are_those_of_latent_statistics(library, tmp_path):
    sae = library.open(relu(tmp_path))
    expected = latent_statistics(sae.sae, sae.data, attribution=True)
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(sae.statistics().tensors()[name], tensor)
