"""Configurations: what they refuse, what they derive, and that they survive the disk."""

import json

import pytest
from transformers import AutoConfig

from hf_matryoshka_sae import (
    CONFIGS,
    BatchTopKSAEConfig,
    GatedSAEConfig,
    JumpReLUSAEConfig,
    MatryoshkaSAEConfig,
    ReluSAEConfig,
    TopKSAEConfig,
)

from ..axes import each


SMALL = {"d_in": 4, "num_latents": 16}


def matryoshka(**fields) -> MatryoshkaSAEConfig:
    return MatryoshkaSAEConfig(**SMALL | {"k": 2} | fields)


@pytest.mark.parametrize("config_class", CONFIGS.values(), ids=CONFIGS)
def test_unknown_field_is_refused_and_the_nearest_one_named(config_class):
    with pytest.raises(ValueError, match=r"Unknown field 'num_latent'.*Did you mean 'num_latents'\?"):
        config_class(**SMALL, num_latent=3)


def test_unknown_field_near_to_none_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"Unknown field 'zzz' for ReluSAEConfig\. Known: .*d_in.*num_latents"):
        ReluSAEConfig(**SMALL, zzz=3)


@each(name=["d_in", "num_latents"], size=[0, -3])
def test_sizes_below_one_are_refused(name, size):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got {size}"):
        GatedSAEConfig(**SMALL | {name: size})


@each(
    k=[0, -1, 17, float("nan"), float("inf")],
    build={
        "topk": lambda k: TopKSAEConfig(**SMALL, k=k),
        "batch_topk": lambda k: BatchTopKSAEConfig(**SMALL, k=k),
        "matryoshka-topk": lambda k: matryoshka(activation="topk", k=k),
        "matryoshka-batch_topk": lambda k: matryoshka(activation="batch_topk", k=k),
    },
)
def test_k_outside_the_dictionary_is_refused(build, k):
    with pytest.raises(ValueError, match=r"`k` must lie between 1 and num_latents \(16\)"):
        build(k)


@pytest.mark.parametrize(
    "build", [lambda k: TopKSAEConfig(**SMALL, k=k), lambda k: matryoshka(activation="topk", k=k)], ids=["topk", "m"]
)
def test_fractional_k_is_refused_where_each_token_keeps_k(build):
    with pytest.raises(ValueError, match="`k` must be a whole number.*got 2.5"):
        build(2.5)


@pytest.mark.parametrize("widths", [[], [4, 4, 16], [8, 4, 16], [0, 16], [-2, 16], [4, 8], [4, 32], [16, 4]])
def test_prefix_widths_must_increase_up_to_the_dictionary(widths):
    with pytest.raises(ValueError, match=r"`prefix_widths` must be positive, strictly increase.*\(16\)"):
        matryoshka(prefix_widths=widths)


@pytest.mark.parametrize(
    "weights", [[], [1], [1, 1, 1], [1, -0.5], [0, 0], [float("nan"), 1], [1, float("inf")]], ids=str
)
def test_prefix_weights_must_be_one_finite_weight_for_each_prefix(weights):
    with pytest.raises(ValueError, match="`prefix_weights` needs one weight .* each of the 2 prefixes"):
        matryoshka(prefix_widths=[4, 16], prefix_weights=weights)


def test_unknown_activation_is_refused_and_the_nearest_one_named():
    with pytest.raises(ValueError, match=r"Unknown activation 'batchtopk'.*Did you mean 'batch_topk'\?"):
        matryoshka(activation="batchtopk")


@each(
    build={"jumprelu": lambda **f: JumpReLUSAEConfig(**SMALL, **f), "m": matryoshka},
    field=[{"bandwidth": 0}, {"bandwidth": -1.0}, {"bandwidth": float("nan")}, {"initial_threshold": -0.1}],
)
def test_bandwidths_and_thresholds_that_give_no_gradient_are_refused(build, field):
    with pytest.raises(ValueError, match=f"`{next(iter(field))}` must be"):
        build(**field)


@pytest.mark.parametrize("field", [{"k": "32"}, {"d_in": 4.0}, {"apply_b_dec_to_input": "no"}], ids=str)
def test_values_of_another_type_are_refused_by_name(field):
    with pytest.raises(Exception, match=f"field '{next(iter(field))}'"):
        TopKSAEConfig(**SMALL | field)


@pytest.mark.parametrize("load", [AutoConfig.from_pretrained, ReluSAEConfig.from_pretrained], ids=["auto", "class"])
def test_newer_format_on_disk_is_refused_even_with_fields_we_do_not_know(tmp_path, load):
    ReluSAEConfig(**SMALL).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2, "invented_later": 1}))
    with pytest.raises(ValueError, match="written in format 2"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("num_latents", "expected"),
    [(4096, [128, 384, 896, 1920, 4096]), (65536, [2048, 6144, 14336, 30720, 65536]), (3, [1, 3]), (1, [1])],
)
def test_default_prefixes_have_the_published_shares(num_latents, expected):
    assert MatryoshkaSAEConfig(num_latents=num_latents, k=1).prefix_widths == expected


def test_default_prefixes_are_valid_for_every_size():
    for num_latents in range(1, 70):
        widths = MatryoshkaSAEConfig(num_latents=num_latents, k=1).widths
        assert widths == sorted(set(widths)) and widths[0] >= 1 and widths[-1] == num_latents


@pytest.mark.parametrize(
    "config",
    [
        ReluSAEConfig(**SMALL, apply_b_dec_to_input=False, base_model="some/model", hookpoint="layers.3:input"),
        TopKSAEConfig(**SMALL, k=5, scale_by_decoder_norm=True),
        BatchTopKSAEConfig(**SMALL, k=2.5),
        JumpReLUSAEConfig(**SMALL, bandwidth=0.001, initial_threshold=0.002),
        GatedSAEConfig(**SMALL),
        matryoshka(activation="topk", prefix_widths=(3, 7, 16), prefix_weights=(1, 0.5, 2)),
    ],
    ids=lambda config: config.model_type,
)
def test_json_round_trip_keeps_every_field_and_the_class(tmp_path, config):
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    before, after = (json.loads(each.to_json_string(use_diff=False)) for each in (config, loaded))
    assert after | {"_name_or_path": ""} == before
    assert loaded.widths == config.widths


def test_a_cut_keeps_inner_prefixes_and_gives_the_cut_one_the_weight_of_its_prefix():
    config = matryoshka(k=12, prefix_widths=[2, 8, 16], prefix_weights=[1, 2, 3])
    assert config.truncated(5) == {"num_latents": 5, "k": 5, "prefix_widths": [2, 5], "prefix_weights": [1, 2]}
    assert config.truncated(8) == {"num_latents": 8, "k": 8, "prefix_widths": [2, 8], "prefix_weights": [1, 2]}
    assert config.truncated(1) == {"num_latents": 1, "k": 1, "prefix_widths": [1], "prefix_weights": [1]}


def test_a_cut_to_prefixes_of_weight_zero_weighs_them_alike(tmp_path):
    config = matryoshka(prefix_widths=[2, 16], prefix_weights=[0, 1])
    changed = config.truncated(2)
    assert changed["prefix_weights"] is None
    MatryoshkaSAEConfig(**SMALL | changed | {"k": 2}).save_pretrained(tmp_path)
