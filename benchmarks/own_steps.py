"""One training step of this package's families, of the bare encoder, and of the same model in dense autograd."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_matryoshka_sae.models import SAEModel, build_sae
from hf_matryoshka_sae.models.screening import screening
from hf_matryoshka_sae.training.config.spec import SAESpec
from hf_matryoshka_sae.training.sae.initialization import initialize
from hf_matryoshka_sae.training.sae.learner import Learner


Step = Callable[[Tensor], None]
Factory = Callable[[], Step]

MATMUL = "encoder matmul"
MATMUL_PAIR = "encoder matmul pair"
OURS = "ours Matryoshka BatchTopK"
EXACT = "ours Matryoshka BatchTopK, float32 products"
DENSE = "dense autograd Matryoshka BatchTopK"

FAMILIES = {
    OURS: {"type": "matryoshka", "activation": "batch_topk"},
    "ours Matryoshka TopK": {"type": "matryoshka", "activation": "topk"},
    "ours Matryoshka JumpReLU": {"type": "matryoshka", "activation": "jumprelu"},
    "ours TopK": {"type": "topk"},
    "ours BatchTopK": {"type": "batch_topk"},
    "ours ReLU": {"type": "relu"},
    "ours JumpReLU": {"type": "jumprelu"},
    "ours Gated": {"type": "gated"},
}


def own_steps(
    d_in: int, num_latents: int, num_tokens: int, k: int, widths: list[int], device: str
) -> dict[str, Factory]:
    """Steps by name, each as what makes the weights and returns the step; see `peer_steps.peer_steps`."""
    shape = (d_in, num_latents, num_tokens, k, widths, device)
    own = {name: lambda fields=fields: _learner_step(fields, *shape) for name, fields in FAMILIES.items()}
    own[EXACT] = lambda: _unscreened(own[OURS]())
    return own | {DENSE: lambda: _dense_step(d_in, num_latents, k, widths, device)}


def matmul_step(d_in: int, num_latents: int, num_tokens: int, device: str, pair: bool = False) -> Step:
    """The bare product `x W_enc^T` into memory that is ready: nothing could be cheaper. bf16 on a GPU.

    With `pair` also that of the weight's gradient, which a dense encoder cannot do without.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    weight = torch.randn(num_latents, d_in, device=device, dtype=dtype)
    out = torch.empty(num_tokens, num_latents, device=device, dtype=dtype)
    gradient = torch.empty_like(weight) if pair else None

    def step(x: Tensor) -> None:
        x = x.to(dtype)
        torch.mm(x, weight.T, out=out)
        if gradient is not None:
            torch.mm(out.T, x, out=gradient)

    return step


def _learner_step(
    fields: dict, d_in: int, num_latents: int, num_tokens: int, k: int, widths: list[int], device: str
) -> Step:
    """A step as the trainer makes it, with the family's default recipe."""
    thresholded = fields.get("activation", fields["type"]) in ("relu", "jumprelu", "gated")
    own = {"target_l0": float(k)} if thresholded else {"k": k}
    own |= {"prefix_widths": widths} if fields["type"] == "matryoshka" else {}
    spec = SAESpec.from_dict({"num_latents": num_latents, **fields, **own}, "")
    sae = build_sae(spec.sae_config(d_in, "", ""))
    initialize(sae, spec, torch.randn(64, d_in), torch.zeros(d_in), seed=0)
    if thresholded:
        _let_through(sae, k, spec)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="bf16" if device == "cuda" else "no")
    # A run long enough that its learning rate and its window of dead latents are those of a real one.
    shape = {"steps": 10**5, "batch_size": num_tokens}
    learner = Learner("", "", sae, spec, torch.zeros(d_in), d_in**0.5, accelerator, **shape)
    made = 0

    def step(x: Tensor) -> None:
        nonlocal made
        learner.accumulate(x, made)
        learner.step(made)
        made += 1

    return step


def _unscreened(step: Step) -> Step:
    """The same step with screening off."""

    def exact(x: Tensor) -> None:
        with screening(False):
            step(x)

    return exact


@torch.no_grad()
def _let_through(sae: SAEModel, k: int, spec: SAESpec) -> None:
    """Thresholds at which k latents fire per token: the sparsity that these families are trained to, not begun at."""
    x = torch.randn(256, sae.config.d_in) / sae.config.d_in**0.5
    pre = x @ sae.W_enc.T
    cut = pre.flatten().topk(k * len(x)).values.min()
    if sae.config.activation_name == "jumprelu":
        sae.threshold.fill_(cut)
    else:
        sae.b_enc.fill_(-cut)


def _dense_step(d_in: int, num_latents: int, k: int, widths: list[int], device: str) -> Step:
    """The same model and loss as one would first write them: dense tensors, plain autograd, fused Adam."""
    rows = torch.randn(num_latents, d_in, device=device)
    W_dec = nn.Parameter(rows / rows.norm(dim=1, keepdim=True))
    W_enc, b_enc = nn.Parameter(W_dec.detach().clone()), nn.Parameter(torch.zeros(num_latents, device=device))
    b_dec = nn.Parameter(torch.zeros(d_in, device=device))
    optimizer = torch.optim.Adam([W_enc, W_dec, b_enc, b_dec], lr=1e-4, fused=True)
    edges = list(zip([0, *widths], widths, strict=False))

    def loss_of(x: Tensor) -> Tensor:
        pre = torch.relu((x - b_dec) @ W_enc.T + b_enc)
        cut = pre.detach().flatten().topk(k * len(x), sorted=False).values.min()
        active = pre * (pre >= cut)
        decoded, loss = b_dec, 0.0
        for start, end in edges:
            decoded = decoded + active[:, start:end] @ W_dec[start:end]
            loss = loss + (x - decoded).square().sum(-1).mean()
        return loss / len(edges)

    def step(x: Tensor) -> None:
        x = x / d_in**0.5
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = loss_of(x)
        loss.backward()
        with torch.no_grad():
            W_dec.grad.sub_((W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))

    return step
