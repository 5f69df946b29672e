"""What is stored with an index, against losses, latents and continuations that are computed otherwise."""

import pytest
import torch

from hf_matryoshka_sae.activations import DatasetConfig, harvest, heldout_batches, spliced_losses
from hf_matryoshka_sae.evaluation import HeldOut
from hf_matryoshka_sae.features import FeatureIndex
from hf_matryoshka_sae.features.showcase import measure_showcase, showcase_widths, source_of
from hf_matryoshka_sae.models import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_matryoshka_sae.steering import reconstruct_text

from ..activations import tiny
from . import small


KEYS = {
    "width",
    "fvu",
    "l0",
    "recaptured_zero",
    "recaptured_mean",
    "ce",
    "kl",
    "pooled_cosine",
    "neighbours",
    "size_mb",
}


def heldout(model=None, kind="bos", hookpoint=small.HOOKPOINT) -> HeldOut:
    model, tokenizer = model or small.language_model(), tiny.tokenizer(kind)
    batches = heldout_batches(tiny.texts(60), tokenizer, small.LENGTH, 300, small.WINDOWS, exclude="special")
    return HeldOut(model, batches, hookpoint, tokenizer.mask_token_id, tokenizer)


@pytest.fixture(scope="module")
def measured():
    sae, data = small.make_sae(activation="relu"), heldout()
    order, largest = torch.arange(small.LATENTS).flip(0), torch.full((small.LATENTS,), 2.0)
    return sae, data, measure_showcase(sae, data, order, largest, show=False)


@pytest.mark.parametrize("num_latents, prefixes, count", [(2048, [64, 192], 12), (5, [5], 5), (64, range(1, 33), 33)])
def test_widths_hold_prefixes_and_the_whole(num_latents, prefixes, count):
    config = MatryoshkaSAEConfig(d_in=2, num_latents=num_latents, k=2, prefix_widths=sorted({*prefixes, num_latents}))
    widths = showcase_widths(MatryoshkaSAE(config))
    assert len(widths) == count and widths == sorted(set(widths)) and widths[-1] == num_latents
    assert set(prefixes) <= set(widths) and widths[0] == min(max(1, num_latents // 64), min(prefixes))


def test_the_curve_is_that_of_dense_reconstructions(measured):
    sae, data, showcase = measured
    rows = {row["width"]: row for row in showcase["curve"]["trained"]}
    assert list(rows) == showcase["sample"]["widths"] and showcase["tokens"] == data.tokens
    assert all(set(row) == KEYS for rows in showcase["curve"].values() for row in rows)
    weights = {name: tensor.double() for name, tensor in sae.state_dict().items()}

    def reconstructed(x, width):
        acts = ((x.double() - weights["b_dec"]) @ weights["W_enc"].T + weights["b_enc"]).relu()
        return (acts[:, :width] @ weights["W_dec"][:width] + weights["b_dec"]).to(x)

    x = torch.cat(list(data.activations()))
    for width in (1, 10, small.LATENTS):
        error = (reconstructed(x, width) - x).double().square().sum() / (x - x.mean(0)).double().square().sum()
        assert rows[width]["fvu"] == pytest.approx(float(error), rel=1e-4)
        losses = [
            spliced_losses(data.model, batch, data.hookpoint, lambda states, width=width: reconstructed(states, width))
            for batch in data.batches
        ]
        assert rows[width]["ce"] == pytest.approx(float(sum(a for a, _ in losses) / sum(n for _, n in losses)))
    assert rows[small.LATENTS]["size_mb"] == pytest.approx(
        sum(tensor.numel() * tensor.element_size() for tensor in sae.state_dict().values()) / 1e6
    )
    assert rows[10]["size_mb"] == pytest.approx(
        sum(tensor.numel() * tensor.element_size() for tensor in sae.truncate(10).state_dict().values()) / 1e6
    )
    whole = [rows[-1]["fvu"] for rows in showcase["curve"].values()]
    assert whole[0] == pytest.approx(whole[1], rel=1e-4)
    assert showcase["curve"]["energy"][0]["fvu"] != showcase["curve"]["trained"][0]["fvu"]


def test_the_sample_is_read_and_continued_at_each_width(measured):
    sae, data, showcase = measured
    sample = showcase["sample"]
    ids = torch.tensor([[data.tokenizer.bos_token_id, *data.tokenizer(sample["text"])["input_ids"]]])
    states = harvest(data.model, ids, None, [data.hookpoint])[data.hookpoint][0, 1:]
    with torch.no_grad():
        acts = sae.encode(states).to_dense()
    assert len(sample["tokens"]) == ids.shape[1] > 5
    named = set()
    for number, width in enumerate(sample["widths"]):
        assert sample["firings"][number][0] == []  # the first token is not read
        for row, token in zip(acts, sample["firings"][number][1:], strict=True):
            best = row[:width].topk(min(3, width))
            expected = [(i, v) for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True) if v > 0]
            assert [latent for latent, _ in token] == [latent for latent, _ in expected]
            assert [value for _, value in token] == pytest.approx([value for _, value in expected], rel=1e-3)
            named |= {latent for latent, _ in token}
        alone = reconstruct_text(sae, data.model, data.tokenizer, sample["text"], width, data.hookpoint, 24)
        assert sample["continuations"][number] == alone.spliced and sample["plain"] == alone.plain
    assert len(set(sample["continuations"])) > 1
    assert showcase["largest"] == {str(latent): 2.0 for latent in named}


def test_an_encoder_has_similarity_and_no_losses():
    torch.manual_seed(0)
    data = heldout(tiny.bert().bert, "encoder", "encoder.layer.1")
    sae = small.make_sae(activation="relu")
    showcase = measure_showcase(sae, data, torch.arange(small.LATENTS), torch.ones(small.LATENTS), show=False)
    assert showcase["base"]["ce"] is showcase["base"]["ce_zero"] is None
    assert showcase["sample"]["plain"] is showcase["sample"]["continuations"] is None
    for row in showcase["curve"]["trained"]:
        assert set(row) == KEYS and row["ce"] is row["recaptured_zero"] is row["kl"] is None
        assert 0 <= row["neighbours"] <= 1
    assert any(token for token in showcase["sample"]["firings"][-1])


def test_an_index_keeps_it(tmp_path, caplog):
    sae = small.make_sae()
    index = small.build(tmp_path, showcase=True)
    assert index.showcase()["curve"]["trained"][-1]["width"] == small.LATENTS
    assert FeatureIndex.open(tmp_path).for_sae(sae).showcase() == index.showcase()
    assert index.for_sae(sae.truncate(10)).showcase() is None
    (tmp_path / "features" / "showcase.json").write_text("{}")
    with pytest.raises(ValueError, match="damaged: showcase.json"):
        FeatureIndex.open(tmp_path).showcase()
    assert small.build(tmp_path, resume=False).showcase() is None
    assert not (tmp_path / "features" / "showcase.json").exists()


def test_its_source_names_text_that_others_can_read_and_no_file(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("words")
    assert source_of(DatasetConfig(str(file)), 128, "special") is None
    assert source_of(["words"], 128, "special") is None
    named = source_of(DatasetConfig("somebody/text", split="test"), 64, "first")
    assert (named["path"], named["split"], named["context_length"]) == ("somebody/text", "test", 64)
