"""Two gloo processes give the gradients, counters and thresholds of one process with the joined batch."""

import pytest
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from hf_matryoshka_sae.models import build_sae
from hf_matryoshka_sae.training.config.spec import SAESpec
from hf_matryoshka_sae.training.sae.calibration import calibrate_threshold
from hf_matryoshka_sae.training.sae.initialization import initialize
from hf_matryoshka_sae.training.sae.learner import Learner

from ...processes import forget_accelerator


D, F, N = 8, 64, 64
SPECS = {
    "matryoshka": {"type": "matryoshka", "k": 3, "error_unit": "fvu", "sort_every": 2},
    "topk": {"type": "topk", "k": 3},
    "batch_topk": {"type": "batch_topk", "k": 3},
    "jumprelu": {"type": "jumprelu", "target_l0": 5.0, "bandwidth": 0.5},
    "relu": {"type": "relu", "target_l0": 5.0, "sparsity_warmup_steps": 0},
    "gated": {"type": "gated", "target_l0": 5.0},
    "nabeshima": {"preset": "nabeshima", "target_l0": 5.0},
}


def data(step: int) -> torch.Tensor:
    """Ranks differ in scale and some rows are repeated, so that a cut per process would not be the cut of all."""
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(step))
    x[N // 2 :] *= 3
    x[5] = x[4]
    x[N // 2] = x[N // 2 - 1]
    return x


def outcome(rank: int, world: int) -> dict[str, dict[str, torch.Tensor]]:
    """Gradients of a step, weights and counters after three, and the threshold, of every spec."""
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    assert accelerator.num_processes == world
    found = {}
    for name, fields in SPECS.items():
        spec = SAESpec.from_dict({"num_latents": F, "lr": 1e-3, "dead_tokens": N, **fields}, "")
        sae = build_sae(spec.sae_config(D, "lm", "layer"))
        torch.manual_seed(0)
        initialize(sae, spec, torch.randn(64, D), torch.zeros(D), seed=0)
        one = Learner(name, "layer", sae, spec, torch.zeros(D), 1.0, accelerator, steps=10, batch_size=N)
        one.tokens_since_fired[::3] = N  # AuxK has something to do from the start
        one._find_dead()
        result = {}
        for step in range(3):
            share = data(step).chunk(world)[rank]
            with accelerator.accumulate(one.objective):
                one.accumulate(share, step)
            if step == 0:
                result |= {
                    f"gradient {key}": p.grad.clone() for key, p in sae.named_parameters() if p.grad is not None
                }
            one.step(step)
        result |= {f"weight {key}": p.detach().clone() for key, p in sae.named_parameters()}
        result["since fired"] = one.tokens_since_fired.clone().float()
        result["l0"] = one.last["l0"].clone()
        result["sparsity"] = one.sparsity
        if name == "batch_topk":
            sae = one.finished()
            chunks = (data(step).chunk(world)[rank] for step in range(10, 20))
            result["threshold"] = torch.tensor(calibrate_threshold(sae, chunks, 3, one.layout))
        found[name] = result
    return found


@pytest.fixture(scope="module")
def outcomes(two_processes):
    forget_accelerator()
    return outcome(0, 1), *two_processes.run(outcome, 2)


@pytest.mark.parametrize("name", SPECS)
def test_two_processes_equal_one(outcomes, name):
    one, first, second = (outcome[name] for outcome in outcomes)
    assert one.keys() == first.keys()
    for key, expected in one.items():
        tolerance = {"atol": 1e-5, "rtol": 1e-5} if key.startswith("gradient") else {"atol": 1e-4, "rtol": 1e-4}
        assert torch.allclose(first[key], expected, **tolerance), key
        assert torch.equal(first[key], second[key]), key
    assert one["gradient W_enc"].abs().max() > 1e-3
