"""Two replicas, two shards of the latents, and 2 x 2 over four processes train every family as one does, to 1e-5."""

import copy

import pytest
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from hf_matryoshka_sae.models import build_sae
from hf_matryoshka_sae.training.config.spec import SAESpec
from hf_matryoshka_sae.training.data.placement import Meshes, Placement
from hf_matryoshka_sae.training.run.building import own_config
from hf_matryoshka_sae.training.sae.calibration import calibrate_l0, calibrate_threshold
from hf_matryoshka_sae.training.sae.initialization import initialize
from hf_matryoshka_sae.training.sae.learner import Learner

from ...processes import forget_accelerator


# d_in, latents, tokens, steps, precision. In many steps of a large float32
# dictionary some pre-activation comes so near to a threshold or a cut that rounding decides; not so in float64.
SHAPES = {"small": (8, 62, 64, 5, torch.float32), "larger": (32, 514, 128, 8, torch.float64)}
CASES = {"1x2": (1, 2, "small"), "2x1": (2, 1, "small"), "2x2": (2, 2, "larger")}
SPECS = {
    "matryoshka": {"type": "matryoshka", "k": 3, "error_unit": "fvu", "sort_every": 2},
    "random prefixes": {"type": "matryoshka", "k": 3, "random_prefixes": 4, "sort_every": 0},
    "matryoshka topk": {"type": "matryoshka", "k": 3, "activation": "topk", "bias_level": True},
    "matryoshka jumprelu": {"type": "matryoshka", "activation": "jumprelu", "target_l0": 5.0, "bandwidth": 0.5},
    "matryoshka relu": {"type": "matryoshka", "activation": "relu", "sparsity_coefficient": 0.05},
    "topk": {"type": "topk", "k": 3},
    "topk, gradients through the residual": {"type": "topk", "k": 3, "auxk_detach_residual": False},
    "multi-topk": {"type": "topk", "k": 3, "multi_topk": True},
    "batch_topk": {"type": "batch_topk", "k": 3, "k_start": 8, "k_anneal_steps": 4, "topk_fraction": 0.4},
    "jumprelu": {"type": "jumprelu", "target_l0": 5.0, "bandwidth": 0.5},
    "jumprelu, free l0": {"type": "jumprelu", "sparsity_coefficient": 0.01, "bandwidth": 0.5},
    "relu": {"type": "relu", "target_l0": 5.0, "sparsity_warmup_steps": 0},
    "gated": {"type": "gated", "target_l0": 5.0},
    "clipped, averaged": {"type": "topk", "k": 3, "grad_clip": 0.1, "ema_decay": 0.9, "unit_norm_decoder": False},
    "by decoder norm": {"type": "batch_topk", "k": 3, "scale_by_decoder_norm": True, "unit_norm_decoder": False},
    "nabeshima": {"preset": "nabeshima", "target_l0": 5.0},
}


def data(step: int, shape: str) -> torch.Tensor:
    """Replicas differ in scale and some rows are repeated, so that a cut of a part would not be the cut of all."""
    d_in, _, tokens, _, dtype = SHAPES[shape]
    x = torch.randn(tokens, d_in, generator=torch.Generator().manual_seed(step), dtype=dtype)
    x[tokens // 2 :] *= 3
    x[5] = x[4]
    x[tokens // 2] = x[tokens // 2 - 1]
    return x


def outcome(rank: int, replicas: int, shards: int, shape: str) -> dict[str, dict[str, torch.Tensor]]:
    """Losses of all steps, then weights, counters and threshold of this process's latents, of every spec."""
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    assert accelerator.num_processes == replicas * shards
    placement = Placement(0, "layer", tuple(range(replicas * shards)), shards, replicas * shards)
    meshes, found = Meshes(accelerator, [placement]), {}
    d_in, num_latents, tokens, steps, dtype = SHAPES[shape]
    for name, fields in SPECS.items():
        spec = SAESpec.from_dict({"num_latents": num_latents, "lr": 3e-3, "dead_tokens": tokens, **fields}, "")
        whole = spec.sae_config(d_in, "lm", "layer")
        layout = meshes.layout(placement, num_latents, 1.5)
        sae = build_sae(own_config(whole, layout))
        sample = torch.randn(64, d_in, generator=torch.Generator().manual_seed(99))
        initialize(sae, spec, sample, sample.mean(0), 0, layout)
        mean, length = torch.zeros(d_in, dtype=dtype), {"steps": 2 * steps, "batch_size": tokens, "seed": 3}
        one = Learner(
            name, "layer", sae.to(dtype), spec, mean, 1.0, accelerator, layout=layout, config=whole, **length
        )
        latents = torch.arange(*layout.rows)
        one.tokens_since_fired[(latents % 3 == 0) & (latents < num_latents // 2)] = tokens
        one._find_dead()  # the second half, so a shard, has none
        losses = []
        for step in range(steps):
            with accelerator.accumulate(one.objective):
                one.accumulate(data(step, shape).chunk(replicas)[layout.replica], step)
            one.step(step)
            told = one.statistics(step)
            losses.append([told.loss, *told.fvu, told.l0, told.dead, told.auxk, told.sparsity, told.grad_norm])
        sae = one.finished()
        result = {f"weight {key}": value for key, value in copy.deepcopy(sae.state_dict()).items()}
        result |= {"losses": torch.tensor(losses), "since fired": one.tokens_since_fired.clone().float()}
        if one.config.activation_name == "batch_topk":
            batches = (data(step, shape).chunk(replicas)[layout.replica] for step in range(90, 96))
            result["threshold"] = torch.tensor(calibrate_threshold(sae, batches, 3, layout))
        elif one.config.activation_name != "topk":
            batches = [data(step, shape).chunk(replicas)[layout.replica] for step in range(90, 96)]
            result["shift"] = torch.tensor(calibrate_l0(sae, batches, 3, layout))
        found[name] = result
    return found


_alone: dict[str, dict] = {}


def alone(shape: str) -> dict[str, dict[str, torch.Tensor]]:
    if shape not in _alone:
        forget_accelerator()
        _alone[shape] = outcome(0, 1, 1, shape)
    return _alone[shape]


@pytest.fixture(scope="module", params=["1x2", "2x1", pytest.param("2x2", marks=pytest.mark.slow)])
def outcomes(request):
    """What one process has, and what each replica's shards have."""
    replicas, shards, shape = CASES[request.param]
    processes = request.getfixturevalue("two_processes" if replicas * shards == 2 else "four_processes")
    found = processes.run(outcome, replicas, shards, shape)
    return alone(shape), [found[replica * shards : (replica + 1) * shards] for replica in range(replicas)]


def joined(parts: list[dict[str, torch.Tensor]], key: str) -> torch.Tensor:
    """A tensor of the whole dictionary from those of its shards; what all of them know must be the same."""
    values = [part[key] for part in parts]
    if key in ("weight b_dec", "losses", "threshold", "shift"):
        assert all(torch.equal(value, values[0]) for value in values), key
        return values[0]
    return torch.cat(values)


@pytest.mark.parametrize("name", SPECS)
def test_sharded_training_equals_that_of_one_process(outcomes, name):
    expected = outcomes[0][name]
    for replica in outcomes[1]:
        parts = [part[name] for part in replica]
        assert parts[0].keys() == expected.keys()
        for key, value in expected.items():
            found = joined(parts, key)
            assert found.shape == value.shape, key
            assert torch.allclose(found, value, atol=1e-5, rtol=1e-5), (key, (found - value).abs().max())
    start = expected["losses"][0, 0]
    assert (expected["losses"][1:, 0] - start).abs().max() > 1e-3  # something was learnt
