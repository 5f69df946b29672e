"""A run's YAML and flags: what is accepted, and that every mistake is named."""

import pytest
import yaml

from hf_matryoshka_sae.training.config.run import RunConfig, load_run_config
from hf_matryoshka_sae.training.config.spec import SAESpec


RUN = {
    "model": "embedded",
    "dataset": {"path": "embedded"},
    "hookpoints": ["model.layers.1"],
    "saes": [{"type": "matryoshka", "num_latents": 64, "k": 4}],
    "output_dir": "out",
    "tokens": 4096,
}


def changed(**fields):
    return {**RUN, **fields}


def test_yaml_and_flags_give_one_config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(RUN))
    flags = ["--batch_size", "512", "--dataset.column=body", "--saes.0.k", "8", "--saes.0.lr=1e-3", "--pack", "false"]
    config = load_run_config(path, flags)
    assert (config.batch_size, config.dataset.column, config.pack) == (512, "body", False)
    assert (config.saes[0].k, config.saes[0].lr) == (8, 1e-3)
    assert config.steps == 8


def test_saved_fields_give_the_same_config():
    config = RunConfig.from_dict(RUN)
    assert RunConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", 0.001])
def test_numbers_may_be_written_as_yaml_reads_them_as_text(text):
    assert SAESpec.from_dict({"lr": text}, "").lr == 1e-3


def test_underscored_numbers_are_numbers():
    assert RunConfig.from_dict(changed(tokens="50_000_000")).tokens == 50_000_000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (changed(batchsize=3), "batch_size"),
        (changed(dataset={"path": "x", "colum": "y"}), "dataset.colum.*column"),  # codespell:ignore
        (changed(saes=[{"type": "matryoshka", "num_latent": 3}]), "saes.0.num_latent.*num_latents"),
        (changed(saes=[{"type": "matrioshka"}]), "matryoshka"),
        (changed(saes=[{"preset": "papr"}]), "paper"),
        (changed(saes=[]), "saes"),
        (changed(saes=[3]), "saes.0"),
        (changed(hookpoints=[]), "hookpoints"),
        (changed(tokens="many"), "tokens.*int"),
        (changed(tokens=100), "less than one batch"),
        (changed(pack="perhaps"), "pack.*bool"),
        (changed(batch_size=0), "batch_size"),
        (changed(exclude="firts"), "exclude.*first"),  # codespell:ignore
        (changed(saes=[{"random_prefixes": 3, "type": "topk"}]), "matryoshka"),
        (changed(saes=[{"ema_decay": 1.0}]), "^`saes.0`: `ema_decay`"),
        (
            changed(saes=[{"k": 4, "num_latents": 64}, {"num_latents": 64, "k": 1000}]),
            "^`saes.1`: `k` must lie .* 1000",
        ),
        (changed(saes=[{"type": "relu", "k": 4, "num_latents": 64}]), "^`saes.0`: `k` is no field"),
        ({key: RUN[key] for key in RUN if key != "model"}, "Missing.*model"),
    ],
)
def test_a_mistake_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        RunConfig.from_dict(fields).check_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokenz", "5000"], "tokenz.*tokens"),
        (["tokens", "5000"], "flag"),
        (["--tokens"], "needs a value"),
        (["--saes.7.k", "3"], "list of 1"),
        (["--tokens.k", "3"], "no fields"),
    ],
)
def test_a_wrong_flag_is_named(tmp_path, flags, message):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(RUN))
    with pytest.raises(ValueError, match=message):
        load_run_config(path, flags)


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2", ""])
def test_a_file_that_is_no_config_is_refused(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"run\.yaml"):
        load_run_config(path)


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"nowhere\.yaml"):
        load_run_config("nowhere.yaml")


def test_fields_of_another_family_are_refused():
    with pytest.raises(ValueError, match="target_l0"):
        SAESpec.from_dict({"type": "relu", "k": 3}, "").sae_config(8, "lm", "layer")
    with pytest.raises(ValueError, match="activation"):
        SAESpec.from_dict({"type": "topk", "activation": "relu"}, "").sae_config(8, "lm", "layer")


@pytest.mark.parametrize("fields", [{}, {"activation": None}])
def test_a_field_that_the_preset_set_is_said_to_be_its(fields):
    with pytest.raises(ValueError, match=r"It comes from `preset: paper`, which is for `type: matryoshka`"):
        RunConfig.from_dict(changed(saes=[{"type": "topk", "num_latents": 64, "preset": "paper", "k": 4, **fields}]))


def test_a_run_wins_over_its_preset():
    spec = SAESpec.from_dict({"preset": "paper", "lr": 1e-2}, "")
    assert (spec.lr, spec.level_weights) == (1e-2, "sum")


def test_the_matryoshka_recipe_gives_way_to_fields_that_are_given():
    def recipe(**fields):
        spec = SAESpec.from_dict(fields, "")
        return spec.level_weights, spec.level_weights_end, spec.sort_every

    assert recipe() == recipe(activation="relu") == ("inner", "whole", 50)
    assert recipe(level_weights="mean") == ("mean", None, 50)
    assert recipe(level_weights_end="mean") == ("mean", "mean", 50)
    assert recipe(sort_every=0) == ("inner", "whole", 0)
    assert recipe(init_from="runs/one") == ("inner", "whole", 0)  # ids that people cite stay
    assert recipe(grow_from="runs/one", num_latents=8) == ("inner", "whole", 0)
    assert recipe(preset="balance") == ("balance", None, 0)
    assert recipe(type="topk") == ("mean", None, 0)


def test_only_new_saes_without_a_preset_begin_with_places_for_each_token():
    def fraction(**fields):
        return SAESpec.from_dict(fields, "").topk_fraction

    assert fraction() == fraction(activation="jumprelu") == 0.3
    assert fraction(type="batch_topk") == fraction(type="jumprelu") == 0.7
    assert fraction(type="topk") == fraction(type="gated") == fraction(preset="paper") == 0
    assert fraction(init_from="runs/one") == fraction(grow_from="runs/one", num_latents=8) == 0
    with pytest.raises(ValueError, match="frozen base would not fire"):
        fraction(grow_from="runs/one", num_latents=8, topk_fraction=0.1)


def test_b_dec_is_slow_except_in_a_preset():
    def scale(**fields):
        return SAESpec.from_dict(fields, "").decoder_bias_lr_scale

    assert scale() == scale(activation="topk") == scale(activation="jumprelu") == 0.1
    assert scale(type="topk") == scale(type="gated") == scale(activation="relu") == 0.03
    assert scale(preset="paper") == 1
    assert scale(type="topk", decoder_bias_lr_scale=0.5) == 0.5


@pytest.mark.parametrize("field", ["decoder_bias_lr_scale", "betas_steps"])
def test_rates_and_steps_are_not_negative(field):
    with pytest.raises(ValueError, match=f"`{field}` must be 0 or more, got -1"):
        SAESpec.from_dict({field: -1}, "")


@pytest.mark.parametrize("field", ["level_weights", "level_weights_end"])
def test_an_unknown_scheme_of_weights_is_named_before_anything_is_loaded(field):
    with pytest.raises(ValueError, match=rf"`{field}` must be .* mean, sum.* got 'inne'.*'inner'"):
        SAESpec.from_dict({field: "inne"}, "")


def test_prefix_fractions_become_widths():
    spec = SAESpec.from_dict({"preset": "bussmann", "num_latents": 64, "k": 4}, "")
    assert spec.sae_config(8, "lm", "layer").prefix_widths == [4, 8, 16, 32, 64]
    with pytest.raises(ValueError, match="add up to 1"):
        SAESpec.from_dict({"prefix_fractions": [0.5, 0.1]}, "").sae_config(8, "lm", "layer")


def test_types_of_weights_and_moments_are_checked():
    spec = SAESpec.from_dict({"optimizer_dtype": "int8", "weights_dtype": "bfloat16"}, "")
    assert (spec.optimizer_dtype, spec.weights_dtype) == ("int8", "bfloat16")
    assert SAESpec().optimizer_dtype == SAESpec().weights_dtype == "float32"
    for name, value in (("optimizer_dtype", "float16"), ("weights_dtype", "int8")):
        with pytest.raises(ValueError, match=f"`saes.0.{name}` is '{value}'"):
            SAESpec.from_dict({name: value}, "saes.0.")
    grown = {"grow_from": "base", "num_latents": 50, "weights_dtype": "bfloat16"}
    with pytest.raises(ValueError, match="would round a frozen base. Leave it out"):
        SAESpec.from_dict(grown, "")
    SAESpec.from_dict({**grown, "freeze_base": False}, "")
