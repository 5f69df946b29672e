"""A dictionary that gains latents: what it had stays bit for bit, what is new learns."""

import argparse
import ast
import inspect
import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModel

from hf_matryoshka_sae import (
    BatchTopKSAEConfig,
    GatedSAEConfig,
    JumpReLUSAEConfig,
    MatryoshkaSAE,
    MatryoshkaSAEConfig,
    ReluSAEConfig,
    TopKSAEConfig,
    build_sae,
)
from hf_matryoshka_sae.evaluation import open_heldout
from hf_matryoshka_sae.training import Interrupted, RunConfig, train
from hf_matryoshka_sae.training.config.spec import SAESpec
from hf_matryoshka_sae.training.sae.calibration import calibrate_threshold
from hf_matryoshka_sae.training.sae.growth import BatchTopKOnBase, FrozenBase, grow, grown_start
from hf_matryoshka_sae.training.sae.learner import Learner

from ...axes import each


D, F = 32, 24
HOOKPOINT = "model.layers.1"
RUN = {
    "model": "embedded",
    "hookpoints": [HOOKPOINT],
    "context_length": 32,
    "tokens": 20 * 128,
    "batch_size": 128,
    "lm_batch_size": 8,
    "shuffle_tokens": 2048,
    "window_pool_tokens": 100_000,
    "normalization_tokens": 1024,
    "eval_tokens": 300,
    "eval_baselines": False,
    "calibration_tokens": 2000,
    "checkpoint_every": 0,
}
SPARSITY = {"relu": {"target_l0": 8.0}, "topk": {"k": 6}, "batch_topk": {"k": 6}, "jumprelu": {"target_l0": 8.0}}
LARGER = {"relu": {"target_l0": 40.0}, "topk": {}, "batch_topk": {"k": 10}, "jumprelu": {"target_l0": 40.0}}
BASES = {name: {"type": name} for name in SPARSITY} | {
    f"nested-{name}": {"activation": name, "prefix_widths": [8, 32]} for name in ("batch_topk", "jumprelu")
}


@pytest.fixture(scope="module", autouse=True)
def text(tmp_path_factory):
    """Some text, so that runs need not read all that Python carries."""
    folder = tmp_path_factory.mktemp("text")
    for name, modules in {"dataset": (argparse, ast, inspect), "eval_dataset": (shutil,)}.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": inspect.getsource(module)}) + "\n" for module in modules))
        RUN[name] = {"path": str(path)}


def config(folder, saes, **fields):
    return RunConfig.from_dict({**RUN, "output_dir": str(folder), "saes": saes, **fields})


def grown_spec(folder, name, **fields):
    activation = name.removeprefix("nested-")
    spec = {"activation": activation, "num_latents": 80, "grow_from": str(folder / "base" / name), "name": name}
    return {**spec, **LARGER[activation], **fields}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text):
    """A run of bases, one that grows each while frozen, and the results of both."""
    folder = tmp_path_factory.mktemp("growth")
    saes = [
        {"name": name, "num_latents": 32, **fields, **SPARSITY[name.removeprefix("nested-")]}
        for name, fields in BASES.items()
    ]
    (before,) = train(config(folder / "base", saes))
    grown = [grown_spec(folder, name) for name in BASES]
    # Another seed, and so another normalisation.
    (after,) = train(config(folder / "grown", grown, seed=3))
    return folder, before["saes"], after["saes"]


def load(folder, name, **options):
    return AutoModel.from_pretrained(folder / name / HOOKPOINT, **options)


@pytest.mark.parametrize("name", BASES)
def test_a_frozen_base_is_bit_for_bit_the_same_after_a_run(runs, name):
    folder = runs[0]
    base, grown = load(folder / "base", name), load(folder / "grown", name)
    assert type(grown) is MatryoshkaSAE
    assert grown.prefix_widths == [*base.prefix_widths, 80]
    for key, tensor in base.state_dict().items():
        assert torch.equal(grown.state_dict()[key][: len(tensor)], tensor), key
    assert grown.latent_ids.tolist() == list(range(80))
    x = 3 * torch.randn(50, base.config.d_in)
    for smaller in (grown.truncate(32), load(folder / "grown", name, width=32)):
        assert torch.equal(smaller.encode(x).to_dense(), base.encode(x).to_dense())
        assert torch.equal(smaller(x).reconstruction, base(x).reconstruction)
    if hasattr(base, "threshold"):  # thresholds decide: the whole dictionary encodes the base's latents as before
        together = grown.encode(x, width=32, selection="mask").to_dense()[:, :32]
        assert torch.allclose(together, base.encode(x).to_dense(), atol=1e-4)


@pytest.mark.parametrize("name", BASES)
def test_new_latents_explain_what_the_frozen_base_leaves(runs, name):
    folder, before, after = runs
    *inner, outer = after[name]
    if name.removeprefix("nested-") != "topk":  # where new latents take places from the base's
        for one, other in zip(inner, before[name], strict=True):
            assert one["fvu"] == pytest.approx(other["fvu"], rel=1e-3)
            assert one["l0"] == pytest.approx(other["l0"], rel=1e-3)
    assert outer["fvu"] < 0.95 * before[name][-1]["fvu"]
    grown = load(folder / "grown", name)
    start = grow(load(folder / "base", name), 80)
    assert (grown.W_enc[32:] - start.W_enc[32:]).norm(dim=1).min() > 0  # every new latent has moved


def test_new_thresholds_are_one_number_for_the_l0_of_base_and_new_latents(runs):
    for name in ("batch_topk", "nested-batch_topk"):
        threshold = load(runs[0] / "grown", name).threshold
        assert len(threshold[:32].unique()) == len(threshold[32:].unique()) == 1
        assert threshold[0] != threshold[-1]
        # On the text that they were solved on: a module of 300 tokens that is held out fires more or less by itself.
        grown = load(runs[0] / "grown", name)
        data = open_heldout("embedded", HOOKPOINT, RUN["dataset"], tokens=5000, context_length=32)
        states = torch.cat(list(data.activations()))
        assert grown.encode(states).l0.float().mean().item() == pytest.approx(10, rel=0.1)
        assert grown.encode(states, width=32).l0.float().mean().item() == pytest.approx(6, rel=0.1)


@pytest.mark.release
def test_a_base_that_is_not_frozen_trains_along(runs, tmp_path):
    saes = [grown_spec(runs[0], name, freeze_base=False) for name in ("batch_topk", "nested-jumprelu", "relu")]
    (free,) = train(config(tmp_path, saes, seed=3))
    for spec in saes:
        name = spec["name"]
        base, grown = load(runs[0] / "base", name), load(tmp_path, name)
        for key, tensor in base.state_dict().items():
            moved = (grown.state_dict()[key][: len(tensor)] != tensor).float().mean()
            assert moved == 0 if key == "latent_ids" else moved > 0.9, key
        assert free["saes"][name][-1]["fvu"] < runs[1][name][-1]["fvu"]


@pytest.mark.release
def test_an_interrupted_run_ends_the_same_even_if_the_source_has_changed(runs, tmp_path, interrupt):
    names, source = ["nested-batch_topk", "jumprelu"], tmp_path / "sources"
    for name in names:
        load(runs[0] / "base", name).save_pretrained(source / "base" / name / HOOKPOINT)
    again = config(tmp_path / "again", [grown_spec(source, name) for name in names], seed=3)
    whole = train(config(tmp_path / "whole", [grown_spec(source, name) for name in names], seed=3))
    steps = interrupt(8)
    with pytest.raises(Interrupted):
        train(again)
    for name in names:
        changed = load(runs[0] / "base", name)
        changed.b_enc.data += 1e-3
        changed.save_pretrained(source / "base" / name / HOOKPOINT)
    assert train(again) == whole
    assert steps == list(range(20))
    for name in names:
        one, other = (load_file(tmp_path / run / name / HOOKPOINT / "model.safetensors") for run in ("whole", "again"))
        assert all(torch.equal(one[key], other[key]) for key in one)


def _one_of_two(rank, run):
    train(run)


@pytest.mark.release
def test_two_processes_keep_the_base_too(runs, tmp_path, two_processes):
    names = ["batch_topk", "jumprelu"]
    two_processes.run(_one_of_two, config(tmp_path / "run", [grown_spec(runs[0], name) for name in names]))
    for name in names:
        base, grown = load(runs[0] / "base", name), load(tmp_path / "run", name)
        for key, tensor in base.state_dict().items():
            assert torch.equal(grown.state_dict()[key][: len(tensor)], tensor), key
        assert (grown.W_enc[32:] - grow(base, 80).W_enc[32:]).abs().amin(1).max() > 0


# Growing itself


def trained(activation="batch_topk", nested=True, d_in=D, dtype=torch.float32, **fields):
    """A base with every tensor at random, as training might have left it."""
    kinds = {"relu": ReluSAEConfig, "topk": TopKSAEConfig, "batch_topk": BatchTopKSAEConfig}
    fields = {"d_in": d_in, "num_latents": F, "hookpoint": HOOKPOINT, **fields}
    if activation in ("topk", "batch_topk"):
        fields.setdefault("k", 4)
    if nested:
        fields |= {"activation": activation, "prefix_widths": [8, F]}
    sae = build_sae(MatryoshkaSAEConfig(**fields) if nested else kinds.get(activation, JumpReLUSAEConfig)(**fields))
    generator = torch.Generator().manual_seed(7)
    for tensor in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec):
        tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator)
    if hasattr(sae, "threshold"):
        sae.threshold.data = 0.5 + torch.rand(F, generator=generator)
    sae.latent_ids.copy_(torch.randperm(F, generator=generator) * 3)
    return sae.to(dtype).eval()


@each(
    nested=[True, False],
    activation=list(SPARSITY),
    fields=[{}, {"apply_b_dec_to_input": False}, {"scale_by_decoder_norm": True}],
)
def test_the_base_is_the_first_prefix(activation, nested, fields):
    sae = trained(activation, nested, **fields)
    before = {key: tensor.clone() for key, tensor in sae.state_dict().items()}
    grown = grow(sae, 50, seed=1)
    assert grown.prefix_widths == ([8, F, 50] if nested else [F, 50])
    assert not grown.training
    assert all(torch.equal(sae.state_dict()[key], tensor) for key, tensor in before.items())
    x = torch.randn(40, D)
    assert torch.equal(grown.truncate(F).encode(x).to_dense(), sae.encode(x).to_dense())
    assert torch.equal(grown.truncate(F)(x).reconstruction, sae(x).reconstruction)
    assert grown.latent_ids[:F].tolist() == sae.latent_ids.tolist()
    assert grown.latent_ids[F:].tolist() == list(range(int(sae.latent_ids.max()) + 1, int(sae.latent_ids.max()) + 27))
    # Before the encoder's bias new latents see centred hidden states, whether or not the family centres them.
    centred = grown.W_enc[F:] @ (x - sae.b_dec).T
    shift = 0 if sae.config.apply_b_dec_to_input else sae.b_dec
    applied = grown.W_enc[F:] @ (x - sae.b_dec + shift).T + grown.b_enc[F:, None]
    assert torch.allclose(applied, centred, atol=1e-5)


def test_the_seed_decides_the_new_latents_and_a_sample_aims_them_at_its_residuals():
    sae, x = trained(), torch.randn(30, D)
    x[3] = torch.nan
    one, same, other = grow(sae, 40, 1), grow(sae, 40, 1), grow(sae, 40, 2)
    assert torch.equal(one.W_dec, same.W_dec) and not torch.equal(one.W_dec, other.W_dec)
    aimed = grow(sae, 80, 1, x)
    assert torch.equal(aimed.W_dec[F + 29 :], grow(sae, 80, 1).W_dec[F + 29 :])  # past the usable rows: as drawn
    usable = x[x.isfinite().all(1)]
    residual = (usable - sae(usable).reconstruction).double()
    cosines = aimed.W_dec[F : F + 29].double() @ (residual / residual.norm(dim=1, keepdim=True)).T
    assert torch.allclose(cosines.max(1).values, torch.ones(29, dtype=torch.float64), atol=1e-5)
    assert cosines.argmax(1).unique().numel() == 29
    assert torch.equal(aimed.W_enc[F : F + 29], aimed.W_dec[F : F + 29])


def test_the_base_keeps_its_type_and_its_threshold_in_fp32():
    grown = grow(trained(dtype=torch.bfloat16), 50, sample=torch.randn(30, D))
    assert grown.W_enc.dtype == torch.bfloat16
    assert grown.threshold.dtype == trained(dtype=torch.bfloat16).threshold.dtype


def test_k_and_inner_prefixes_of_the_outer_part_can_be_given():
    grown = grow(trained(), 50, k=9, prefix_widths=[8, F, 30, 50])
    assert (grown.config.k, grown.prefix_widths) == (9, [8, F, 30, 50])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_latents": F}, f"`num_latents` \\({F}\\) must be larger than the {F}"),
        ({"num_latents": 40, "prefix_widths": [10, F, 40]}, r"must begin with those of the SAE to grow, \[8, 24\]"),
        ({"num_latents": 40, "prefix_widths": [8, F, 39]}, "end at num_latents"),
        ({"num_latents": 40, "k": 41}, "`k` must lie between"),
        ({"num_latents": 40, "sample": torch.randn(5, D + 1)}, r"`sample` must be of shape \(N, 32\), got \(5, 33\)"),
        ({"num_latents": 40, "sample": torch.full((5, D), torch.nan)}, "no row of finite hidden states, out of 5"),
    ],
)
def test_what_does_not_fit_cannot_grow(fields, message):
    with pytest.raises(ValueError, match=message):
        grow(trained(), **fields)


# Training on a frozen base


def data(count=8, size=128):
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(D, D, generator=generator)
    return [torch.randn(size, D, generator=generator) @ mixing + 1 for _ in range(count)]


def learner(sae, **fields):
    fields = {"num_latents": 50, "grow_from": "base", "lr": 1e-2, "activation": sae.config.activation_name, **fields}
    spec = SAESpec.from_dict(fields, "")
    sample = torch.cat(data())
    mean, scale = sample.mean(0), float(sample.std()) * D**0.5
    grown, base = grown_start(sae, spec, HOOKPOINT, mean, scale, sample, seed=0)
    AcceleratorState._reset_state(reset_partial_state=True)
    rest = {"steps": 10, "batch_size": 128, "base": base}
    return Learner("grown", HOOKPOINT, grown, spec, mean, scale, Accelerator(cpu=True), **rest)


def ended(one):
    """The trained SAE as the trainer saves it."""
    sae = one.finished()
    if sae.config.activation_name == "batch_topk":
        calibrate_threshold(sae, [(x - one.mean) / one.scale for x in data()], one.k)
    sae.fold_normalization_(one.mean, one.scale)
    one.base.restore(sae)
    return sae


@pytest.mark.parametrize(
    ("activation", "fields"),
    [
        ("relu", {"target_l0": 30.0}),
        ("relu", {"target_l0": 30.0, "unit_norm_decoder": True, "ema_decay": 0.9}),
        ("topk", {"unit_norm_decoder": False, "multi_topk": True}),
        ("batch_topk", {"k": 12, "ema_decay": 0.9, "bias_level": True}),
        ("batch_topk", {"k": 12, "preset": "saelens", "lr": 1e-2}),
        ("jumprelu", {"target_l0": 30.0, "unit_norm_decoder": False}),
        ("jumprelu", {"target_l0": 30.0, "grad_clip": 0.1, "auxk_coefficient": 1.0}),
    ],
    ids=str,
)
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
def test_no_option_of_a_run_moves_a_frozen_base(activation, fields, scaled):
    # Rows of any length, and with `scaled` latents measured by them: both a converted SAE may have.
    sae = trained(activation, scale_by_decoder_norm=scaled)
    before = {key: tensor.clone() for key, tensor in sae.state_dict().items()}
    x = torch.cat(data(2))
    dense = sae.encode(x).to_dense()
    one = learner(sae, dead_tokens=128, **fields)
    for step, batch in enumerate(data()):
        one.accumulate(batch, step)
        one.step(step)
        if one.dead is not None:
            assert one.dead.min() >= F
    grown = ended(one)
    for key, tensor in before.items():
        assert torch.equal(grown.state_dict()[key][: len(tensor)], tensor), key
    assert grown.config.scale_by_decoder_norm is scaled
    if "k" not in fields:
        assert torch.equal(grown.truncate(F).encode(x).to_dense(), dense)
    assert all(parameter.requires_grad for parameter in grown.parameters())
    # What the file says is what was trained, up to rounding.
    expected = one.finished()
    inside = expected.encode((x - one.mean) / one.scale)
    if activation != "batch_topk":
        assert torch.allclose(grown.encode(x).to_dense(), inside.to_dense() * one.scale, atol=1e-3)


def test_new_latents_of_batch_topk_get_the_places_the_base_leaves():
    sae = grow(trained(), 50, k=9)
    sae.threshold.fill_(1.0)
    x = torch.randn(64, D)
    dense = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    kept = torch.zeros_like(dense, dtype=torch.bool)
    kept[:, :F] = dense[:, :F] > 1
    left = 9 * 64 - int(kept.sum())
    assert left > 0
    cut = dense[:, F:].flatten().sort(descending=True).values[left - 1]
    kept[:, F:] = dense[:, F:] >= cut
    sae.family = BatchTopKOnBase(F)
    pairs = sae.train().encode_pairs(x)
    assert len(pairs.values) == 9 * 64
    found = torch.zeros_like(kept)
    found[pairs.rows, pairs.cols] = True
    assert torch.equal(found, kept)
    order = pairs.rows * 50 + pairs.cols
    assert torch.equal(order, order.sort().values)
    sae.k = 0.5  # less than the base fires
    assert (sae.encode_pairs(x).cols < F).all()


def test_calibration_leaves_the_base_its_thresholds():
    sae = grow(trained(), 50, k=9)
    before = sae.threshold.clone()
    sae.family = BatchTopKOnBase(F)
    threshold = calibrate_threshold(sae, [torch.randn(500, D) for _ in range(4)], 9)
    torch.manual_seed(0)
    assert torch.equal(sae.threshold[:F], before[:F])
    assert torch.equal(sae.threshold[F:], torch.full((26,), threshold))
    assert sae.eval().encode(torch.randn(4000, D)).l0.float().mean().item() == pytest.approx(9, rel=0.03)


def test_all_weight_of_the_loss_is_on_prefixes_that_can_change():
    base = FrozenBase(trained())
    assert base.outer_weights([0.2, 0.3, 0.5], [8, F, 50]) == [0, 0, 1]
    assert base.outer_weights([1, 1, 1, 1, 1], [8, F, 30, 50]) == [0, 0, 0, 2.5, 2.5]  # b_dec alone stands first
    with pytest.raises(ValueError, match="past the frozen base"):
        base.outer_weights([1.0, 1.0, 0.0], [8, F, 50])


# Mistakes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_from": "base"}, "exclude each other"),
        ({"type": "topk"}, "makes an SAE of `type: matryoshka`"),
        ({"num_latents": None}, "needs `num_latents`"),
        ({"random_prefixes": 4}, "`random_prefixes` would move a frozen base"),
        ({"sort_every": 2}, "`sort_every` would move a frozen base"),
    ],
)
def test_a_mistake_in_an_entry_is_said_at_once(fields, message):
    with pytest.raises(ValueError, match=message):
        SAESpec.from_dict({"grow_from": "base", "num_latents": 50, **fields}, "")


def test_a_run_does_not_grow_and_go_on_at_once(tmp_path):
    with pytest.raises(ValueError, match="cannot be in a run with `init_from`"):
        config(tmp_path, [{"grow_from": "base", "num_latents": 50}], init_from="base")


@pytest.mark.parametrize(
    ("base", "fields", "message"),
    [
        ({"hookpoint": "model.layers.2"}, {}, "was trained at model.layers.2, not at model.layers.1"),
        ({"activation": "jumprelu"}, {"activation": "batch_topk"}, "Say `activation: jumprelu`"),
        ({}, {}, r"`k` \(4\) leaves no room .* the frozen base alone fires .*Give a larger `k`"),
        ({"activation": "relu"}, {"target_l0": 2.0}, r"`target_l0` \(2\) leaves no room"),
        ({}, {"k": 20, "level_weights": [1.0, 1.0, 0.0]}, "past the frozen base"),
        ({}, {"k": 20, "level_weights": [1.0, 1.0]}, "`level_weights` needs 3 numbers"),
        ({}, {"num_latents": 20}, "must be larger"),
    ],
    ids=str,
)
def test_a_base_that_does_not_fit_the_run_is_refused(base, fields, message):
    with pytest.raises(ValueError, match=message):
        learner(trained(**base), **fields)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing", "`grow_from: .*missing` cannot be loaded"),
        ("empty", "`grow_from: .*empty` cannot be loaded: .* holds no SAE"),
        ("base", "holds several SAEs, name one"),
        ("narrow", "reads hidden states of width 32; model.layers.1 has 128"),
        ("gated", "A gated SAE cannot grow"),
    ],
)
def test_a_source_without_a_base_is_refused_before_training(runs, tmp_path, source, message):
    (tmp_path / "empty").mkdir()
    trained().save_pretrained(tmp_path / "narrow")
    build_sae(GatedSAEConfig(d_in=128, num_latents=F)).save_pretrained(tmp_path / "gated")
    path = runs[0] / "base" if source == "base" else tmp_path / source
    with pytest.raises(ValueError, match=message):
        train(config(tmp_path / "run", [{"grow_from": str(path), "num_latents": 50, "k": 20}]))
