"""The code: what comes back, from the whole and from any first bytes, and how many bytes it takes."""

import sys

import pytest
import torch

from hf_matryoshka_sae import (
    BatchTopKSAEConfig,
    GatedSAEConfig,
    JumpReLUSAEConfig,
    MatryoshkaSAEConfig,
    ReluSAEConfig,
    TopKSAEConfig,
    build_sae,
)
from hf_matryoshka_sae.models import SAEModel
from hf_matryoshka_sae.progressive import codec
from hf_matryoshka_sae.progressive.codec import decode_latents, decode_progressive, encode_progressive
from hf_matryoshka_sae.progressive.rate import bits_per_token, default_step
from hf_matryoshka_sae.progressive.statistics import LatentStatistics, latent_statistics

from ..axes import each


pytest.importorskip("constriction")

D, F = 8, 24
CONFIGS = {
    "relu": ReluSAEConfig(d_in=D, num_latents=F),
    "topk": TopKSAEConfig(d_in=D, num_latents=F, k=4),
    "batch_topk": BatchTopKSAEConfig(d_in=D, num_latents=F, k=4),
    "jumprelu": JumpReLUSAEConfig(d_in=D, num_latents=F),
    "gated": GatedSAEConfig(d_in=D, num_latents=F),
    "matryoshka": MatryoshkaSAEConfig(d_in=D, num_latents=F, k=4, prefix_widths=[4, 10, F]),
}


def random_sae(name: str = "matryoshka") -> SAEModel:
    sae = build_sae(CONFIGS[name]).eval()
    with torch.no_grad():
        sae.b_enc.copy_(torch.randn(F) * 0.5 - 0.5)
        if hasattr(sae, "threshold"):
            sae.threshold.fill_(0.3)
    return sae


def measured(sae: SAEModel, tokens: int = 500) -> LatentStatistics:
    return latent_statistics(sae, [torch.randn(tokens, D)], neighbours=0)


def orthonormal_sae() -> SAEModel:
    """Every latent that is added lowers the error: values above 0.5, rows at right angles."""
    sae = build_sae(JumpReLUSAEConfig(d_in=D, num_latents=D)).eval()
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(D))
        sae.W_dec.copy_(torch.eye(D))
        sae.threshold.fill_(0.5)
    return sae


# Whole codes


@each(name=list(CONFIGS), shape=[(5, 7), (1,), ()])
def test_latents_come_back_within_a_step(name, shape):
    sae = random_sae(name)
    x, statistics, step = torch.randn(*shape, D), measured(sae), 0.1
    data = encode_progressive(sae, x, statistics, step=step, block=16)
    with torch.no_grad():
        expected = sae.encode(x)
    found = decode_latents(sae, data, statistics)
    assert found.values.shape[:-1] == torch.Size(shape)
    assert found.num_latents == F
    assert torch.equal(found.to_dense() > 0, expected.to_dense() > 0)
    assert (found.to_dense() - expected.to_dense()).abs().max() <= step
    with torch.no_grad():
        assert torch.equal(decode_progressive(sae, data, statistics), sae.decode(found))


@each(block=[1, 3, 8, 64, 1000], groups=[None, [F], [1, 2, F]])
def test_blocks_and_groups_change_the_order_alone(block, groups):
    sae = random_sae()
    x, statistics = torch.randn(67, D), measured(sae)
    expected = decode_latents(sae, encode_progressive(sae, x, statistics), statistics).to_dense()
    data = encode_progressive(sae, x, statistics, groups=groups, block=block)
    assert torch.equal(decode_latents(sae, data, statistics).to_dense(), expected)


def test_what_the_statistics_never_saw_is_coded_too():
    sae = random_sae("topk")
    statistics = measured(sae)
    for name in ("frequency", "mean", "mean_square"):
        getattr(statistics, name)[:6] = 0
    statistics.frequency[6:9] = 1
    x = torch.randn(50, D) * torch.logspace(-6, 6, 50)[:, None]
    with torch.no_grad():
        expected = sae.encode(x).to_dense()
    data = encode_progressive(sae, x, statistics, step=1.0)
    found = decode_latents(sae, data, statistics).to_dense()
    assert torch.equal(found > 0, expected > 0)
    # A float32 of this size is itself rounded.
    assert ((found - expected).abs() <= 1.0 + 1e-6 * expected).all()


def test_tokens_without_a_latent_come_back_as_such():
    sae = random_sae("relu")
    statistics = measured(sae)
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    data = encode_progressive(sae, torch.randn(5, D), statistics)
    with torch.no_grad():
        assert torch.equal(decode_progressive(sae, data, statistics), sae.b_dec.expand(5, D))


def test_a_code_does_not_depend_on_how_many_tokens_are_encoded_at_once_or_on_training_mode(monkeypatch):
    sae = random_sae("batch_topk")
    x, statistics = torch.randn(40, D), measured(sae)
    expected = encode_progressive(sae, x, statistics)
    monkeypatch.setattr(codec, "_TOKENS_AT_ONCE", 7)
    sae.train()
    assert encode_progressive(sae, x, statistics) == expected
    assert sae.training


# First bytes


def test_every_first_bytes_decode_and_latents_are_only_added():
    sae = orthonormal_sae()
    statistics = latent_statistics(sae, [torch.randn(500, D)], neighbours=0)
    x = torch.randn(2, 5, D)
    data = encode_progressive(sae, x, statistics, step=0.1, groups=[1, 3, D], block=4)
    header = next(n for n in range(len(data)) if _decodes(sae, data[:n], statistics))
    before, error, kept = torch.zeros(2, 5, D), float("inf"), set()
    for length in range(header, len(data) + 1):
        latents = decode_latents(sae, data[:length], statistics).to_dense()
        assert torch.equal(latents[before > 0], before[before > 0])
        now = (decode_progressive(sae, data[:length], statistics) - x).square().sum().item()
        assert now <= error
        before, error = latents, now
        kept.add(int((latents > 0).sum()))
    assert kept >= {0, int((x > 0.5).sum())} and len(kept) > 5
    for length in range(header):
        with pytest.raises(ValueError, match="too few"):
            decode_progressive(sae, data[:length], statistics)


def _decodes(sae: SAEModel, data: bytes, statistics: LatentStatistics) -> bool:
    try:
        decode_progressive(sae, data, statistics)
    except ValueError:
        return False
    return True


def test_base_latents_of_all_tokens_come_first():
    sae = random_sae()
    x, statistics = torch.randn(20, D), measured(sae)
    data = encode_progressive(sae, x, statistics, step=0.1, block=8)
    whole = decode_latents(sae, data, statistics).to_dense()
    packet = torch.arange(3).repeat_interleave(torch.tensor([4, 6, 14])) * 3 + torch.arange(20)[:, None] // 8
    place = 0
    for length in [*range(len(data) * 3 // 10, len(data), 3), len(data)]:
        found = decode_latents(sae, data[:length], statistics).to_dense()
        while place < 9 and not found.equal(whole * (packet < place)):
            place += 1
        assert found.equal(whole * (packet < place))
    assert place == 9


# Sizes


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_bytes_are_within_two_percent_of_the_ideal_rate(share):
    sae = random_sae("topk")
    x, statistics = torch.randn(4096, D), measured(sae, tokens=20_000)
    step = share * default_step(statistics)
    ideal = bits_per_token(sae.encode_pairs(x), statistics, [F], step)["bits"].item() * len(x)
    assert ideal < 8 * len(encode_progressive(sae, x, statistics, step=step)) < 1.02 * ideal


def test_rare_latents_cost_what_they_should():
    """Silence on many tokens is settled at once; the bits are those of asking for each token."""
    sae = orthonormal_sae()
    with torch.no_grad():
        sae.threshold.fill_(2.7)
    statistics = latent_statistics(sae, [torch.randn(100_000, D)], neighbours=0)
    x = torch.randn(50_000, D)
    ideal = bits_per_token(sae.encode_pairs(x), statistics, [D], 0.1)["bits"].item() * len(x)
    assert ideal < 8 * len(encode_progressive(sae, x, statistics, step=0.1, groups=[D], block=3000)) < 1.05 * ideal


# Refusals


def test_a_code_of_another_kind_or_a_damaged_one_is_refused():
    sae = random_sae()
    statistics = measured(sae)
    data = encode_progressive(sae, torch.randn(9, D), statistics)
    for spoiled, message in (
        (b"PK\x03\x04" + data, "no progressive code"),
        (b"X", "no progressive code"),
        (b"", "too few"),
        (data[:4] + b"\x09" + data[5:], "version 9"),
        (data[:20] + bytes([data[20] ^ 1]) + data[21:], "header of this code is damaged"),
        (data + b"\x00", "after the last packet"),
        (data + data, "after the last packet"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_progressive(sae, spoiled, statistics)


def test_a_damaged_packet_is_refused_or_read_as_other_latents():
    sae = random_sae()
    statistics = measured(sae)
    data = encode_progressive(sae, torch.randn(64, D), statistics, groups=[F])
    refused = 0
    for begin in range(len(data) - 100, len(data) - 4, 4):
        spoiled = data[:begin] + b"\xff" * (len(data) - begin)
        try:
            found = decode_latents(sae, spoiled, statistics)
        except ValueError as error:
            refused += "A packet of this code is damaged" in str(error)
        else:
            assert found.values.isfinite().all() and found.values.shape[0] == 64
    assert refused


def test_another_dictionary_order_or_statistics_are_refused():
    sae = random_sae()
    statistics = measured(sae)
    data = encode_progressive(sae, torch.randn(9, D), statistics)
    with pytest.raises(ValueError, match="of another dictionary"):
        decode_progressive(sae, data, measured(sae))
    with pytest.raises(ValueError, match="statistics are of 24 latents, the SAE has 10"):
        decode_progressive(sae.truncate(10), data, statistics)
    narrow = sae.truncate(10)
    with pytest.raises(ValueError, match="it has 24 latents, this one 10"):
        decode_progressive(narrow, data, measured(narrow))
    sae.permute_(torch.randperm(F))
    with pytest.raises(ValueError, match="in another order"):
        decode_progressive(sae, data, statistics)


@pytest.mark.parametrize(
    ("x", "fields", "message"),
    [
        (torch.full((3, D), torch.nan), {}, "finite and at least one"),
        (torch.zeros(0, D), {}, "finite and at least one"),
        (torch.zeros(3, D + 1), {}, "d_in = 8"),
        (torch.ones(3, D), dict(step=0.0), "`step` must be a positive number"),
        (torch.randn(30, D), dict(step=1e-9), "is too small"),
        (torch.ones(3, D), dict(groups=[4, 4, F]), "strictly increase"),
        (torch.ones(3, D), dict(groups=[4, 10]), "must end at num_latents"),
        (torch.ones(3, D), dict(block=0), "at least one token"),
    ],
)
def test_what_cannot_be_coded_is_refused(x, fields, message):
    sae = random_sae()
    with pytest.raises(ValueError, match=message):
        encode_progressive(sae, x, measured(sae), **fields)


def test_without_constriction_the_error_says_what_to_install(monkeypatch):
    sae = random_sae()
    statistics = measured(sae)
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ImportError, match=r"hf_matryoshka_sae\[codec\]"):
        encode_progressive(sae, torch.randn(3, D), statistics)
