"""What a trained dictionary is worth on held-out text: a table per prefix, as numbers, as text and as a plot."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..activations import TokenBatch, harvest, has_lm_loss, spliced_losses
from ..models import SAEModel
from .checkpoints import write_json


ABOUT = (
    "fvu: squared error over the variance about the held-out mean. recaptured: (ablated - spliced) / "
    "(ablated - clean) cross-entropy, with the hidden states replaced by zero (zero) or by their mean (mean) as the "
    "ablation. dead: share of the prefix's latents that never fire on the held-out tokens. selection mask: all "
    "latents compete for places, those past the width are dropped; the same as encoding the prefix alone wherever a "
    "threshold decides."
)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Sequence[TokenBatch],
    hookpoint: str,
    saes: dict[str, SAEModel],
    mask_token_id: int | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Reconstruction and recaptured language-model loss of SAEs at one hookpoint.

    Args:
        model (`nn.Module`): The language model.
        batches (`Sequence[TokenBatch]`): Held-out tokens.
        hookpoint (`str`): Where the SAEs read.
        saes (`dict[str, SAEModel]`): By name; in `eval()` mode, taking raw hidden states.
        mask_token_id (`int`, *optional*): The tokenizer's, for a masked language model.
        show (`bool`, *optional*, defaults to `True`): Show a progress bar.

    Returns:
        `dict`: `tokens`, the losses `clean_ce`, `zero_ce`, `mean_ce` (`None` for a model without a language-model
        loss), and under `saes` a list of rows for each SAE.

    Raises:
        `ValueError`: if there are no held-out tokens.
    """
    device = next(model.parameters()).device
    batches = [batch.to(device) for batch in batches]
    sums = {name: _Sums(sae) for name, sae in saes.items()}
    total, square, tokens = 0.0, 0.0, 0
    for batch in batches:
        states = harvest(model, batch.input_ids, batch.attention_mask, [hookpoint])[hookpoint][batch.keep].float()
        total = total + states.double().sum(0)
        square += states.double().square().sum().item()
        tokens += len(states)
        for entry in sums.values():
            entry.add(states)
    if not tokens:
        raise ValueError("There are no held-out tokens to evaluate on. Name an `eval_dataset` with text.")
    mean = total / tokens
    variance = square / tokens - mean.square().sum().item()
    result: dict[str, Any] = {"hookpoint": hookpoint, "tokens": tokens, "variance": variance}
    losses = _Losses(model, batches, hookpoint, mask_token_id)
    losses.open_bar(3 + sum(len(entry.widths) for entry in sums.values()), show)
    result["clean_ce"] = losses(None)
    result["zero_ce"] = losses(torch.zeros_like)
    result["mean_ce"] = losses(lambda x: mean.to(x).expand_as(x))
    result["saes"] = {}
    for name, entry in sums.items():
        rows = entry.rows(tokens, variance)
        for row in rows:
            row["ce"] = losses(_splice(saes[name], row["width"]))
            row["recaptured_zero"] = _recaptured(result["zero_ce"], row["ce"], result["clean_ce"])
            row["recaptured_mean"] = _recaptured(result["mean_ce"], row["ce"], result["clean_ce"])
        result["saes"][name] = rows
    losses.close()
    return result


class _Sums:
    """Running sums of one SAE: every prefix from one encoding."""

    def __init__(self, sae: SAEModel):
        self.sae, self.widths = sae, sae.prefix_widths
        self.sse = torch.zeros(len(self.widths), dtype=torch.float64)
        self.fired = torch.zeros(sae.config.num_latents, dtype=torch.int64)

    def add(self, states: Tensor) -> None:
        x = states.to(self.sae.W_enc)
        pairs = self.sae.encode_pairs(x)
        prefixes = self.sae.decode_pairs(pairs, self.widths)
        self.sse += (prefixes.float() - states).double().square().sum((-1, -2)).cpu()
        active = pairs.cols[pairs.values > 0]
        self.fired += torch.bincount(active, minlength=len(self.fired)).cpu()

    def rows(self, tokens: int, variance: float) -> list[dict[str, Any]]:
        return [
            {
                "width": width,
                "l0": self.fired[:width].sum().item() / tokens,
                "fvu": sse / tokens / variance,
                "dead": (self.fired[:width] == 0).double().mean().item(),
            }
            for width, sse in zip(self.widths, self.sse.tolist(), strict=True)
        ]


class _Losses:
    """Mean token cross-entropy of the model with its hidden states replaced; counts passes on a progress bar."""

    def __init__(self, model: nn.Module, batches: Sequence[TokenBatch], hookpoint: str, mask_token_id: int | None):
        self.model, self.batches, self.hookpoint, self.mask_token_id = model, batches, hookpoint, mask_token_id
        self.known = has_lm_loss(model)

    def open_bar(self, passes: int, show: bool) -> None:
        self.bar = tqdm(total=passes, desc="language-model loss", disable=not (show and self.known), leave=False)

    def __call__(self, replace: Callable[[Tensor], Tensor] | None) -> float | None:
        if not self.known:
            return None
        total, count = 0.0, 0
        for batch in self.batches:
            loss, tokens = spliced_losses(self.model, batch, self.hookpoint, replace, mask_token_id=self.mask_token_id)
            total, count = total + float(loss), count + int(tokens)
        self.bar.update()
        return total / max(1, count)

    def close(self) -> None:
        self.bar.close()


def _splice(sae: SAEModel, width: int) -> Callable[[Tensor], Tensor]:
    def replace(x: Tensor) -> Tensor:
        pairs = sae.encode_pairs(x.to(sae.W_enc), width, selection="mask")
        return sae.decode_pairs(pairs, [width])[0].to(x)

    return replace


def _recaptured(ablated: float | None, spliced: float | None, clean: float | None) -> float | None:
    if ablated is None or spliced is None or clean is None or ablated == clean:
        return None
    return (ablated - spliced) / (ablated - clean)


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results of [`evaluate`] as text, a line per prefix."""
    header = f"{'width':>8} {'L0':>8} {'FVU':>8} {'CE':>8} {'recaptured':>11} {'(mean abl.)':>11} {'dead':>7}"
    lines = []
    for result in results:
        if result["clean_ce"] is not None:
            lines.append(
                f"{result['hookpoint']}: {result['tokens']} held-out tokens, CE clean {result['clean_ce']:.4f}, "
                f"zero-ablated {result['zero_ce']:.4f}, mean-ablated {result['mean_ce']:.4f}"
            )
        else:
            lines.append(f"{result['hookpoint']}: {result['tokens']} held-out tokens, no language-model loss")
        for name, rows in result["saes"].items():
            lines += [f"  {name} (selection: mask)", "  " + header]
            lines += ["  " + _line(row) for row in rows]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    def number(value: float | None, width: int) -> str:
        return f"{'-':>{width}}" if value is None else f"{value:>{width}.4f}"

    return (
        f"{row['width']:>8} {row['l0']:>8.2f} {row['fvu']:>8.4f} {number(row['ce'], 8)} "
        f"{number(row['recaptured_zero'], 11)} {number(row['recaptured_mean'], 11)} {row['dead']:>7.2%}"
    )


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw FVU and recaptured loss against prefix width to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    drawn = [("fvu", "fraction of variance unexplained"), ("recaptured_zero", "recaptured loss (zero ablation)")]
    for result in results:
        for name, rows in result["saes"].items():
            for axis, (key, _) in zip(axes, drawn, strict=True):
                points = [(row["width"], row[key]) for row in rows if row[key] is not None]
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", label=f"{name} @ {result['hookpoint']}")
    for axis, (_, label) in zip(axes, drawn, strict=True):
        axis.set(xlabel="prefix width (latents)", ylabel=label, xscale="log")
        axis.grid(alpha=0.3, which="both")
        widths = sorted({row["width"] for result in results for rows in result["saes"].values() for row in rows})
        axis.set_xticks(widths, [str(width) for width in widths], rotation=45 if len(widths) > 8 else 0)
        axis.minorticks_off()
    axes[0].set_ylim(bottom=0)
    if axes[1].lines:
        axes[1].set_ylim(top=1)
    axes[0].legend(fontsize=8)
    figure.suptitle("Held-out reconstruction of every prefix")
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)
    pyplot.close(figure)


def write_report(results: Sequence[dict[str, Any]], folder: Path, accelerator: Accelerator) -> None:
    """Save `results.json` and `results.png` in `folder` and print the table."""
    write_json(folder / "results.json", {"about": ABOUT, "selection": "mask", "results": list(results)})
    plot(results, folder / "results.png")
    accelerator.print(table(results))
    accelerator.print(f"Saved {folder / 'results.json'} and {folder / 'results.png'}")
