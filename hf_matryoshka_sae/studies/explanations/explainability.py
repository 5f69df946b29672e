"""How well patterns of tokens explain latents, at each width, beside a random dictionary and the model's neurons.

Latents are drawn and a width's scores estimated as in `drawn_latents.py`.

Explained are latents that fire at least `least` times in the text that examples come from; what fires less cannot be
explained by examples, and its share is reported.
"""

from collections.abc import Mapping, Sequence

from tqdm.auto import tqdm

from ...common.checks import check_at_least
from ...common.distributed import gathered, processes
from ...common.report import Column, Report
from ...evaluation.data import HeldOut
from ...models import SAEModel
from ..drawn_latents import DrawnLatents, as_records, firing_counts, with_baselines
from .n2g import Explainer, firing_examples, score


SCORES = ("f1", "precision", "recall", "correlation")


_COLUMNS = (
    Column("latents", "drawn", "latents that were drawn.", "d"),
    Column("explainable", "explainable", "share of latents that fire often enough to be explained.", ".1%", "higher"),
    Column("f1", "F1", "of the patterns' prediction where a latent fires, on other text.", ".3f", "higher"),
    Column("precision", "precision", "of the same.", ".3f", "higher", table="value"),
    Column("recall", "recall", "of the same.", ".3f", "higher", table="value"),
    Column("correlation", "corr.", "Pearson's, of predicted and actual activations.", ".3f", "higher", table="value"),
)


def explainability(
    saes: Mapping[str, SAEModel],
    examples: HeldOut,
    test: HeldOut,
    widths: Sequence[int] | None = None,
    per_group: int = 16,
    examples_per_latent: int = 16,
    substitutes: int = 5,
    least: int = 10,
    baselines: bool = True,
    seed: int = 0,
    resamples: int = 1000,
    show: bool = True,
) -> Report:
    """Explain latents by patterns and test the patterns on other text.

    Args:
        saes (`dict[str, SAEModel]`): By name; of one hookpoint. Several processes share the latents.
        examples ([`HeldOut`]): Text that examples come from.
        test ([`HeldOut`]): Other text, that patterns are tested on; of the same model and hookpoint.
        widths (`Sequence[int]`, *optional*): By default each SAE's prefix widths.
        per_group (`int`, *optional*, defaults to 16): Latents drawn from each group that a width adds.
        examples_per_latent (`int`, *optional*, defaults to 16): Examples that a latent is explained from.
        substitutes (`int`, *optional*, defaults to 5): Substitutes of each token; see [`Explainer`].
        least (`int`, *optional*, defaults to 10): How often a latent has to fire among the examples.
        baselines (`bool`, *optional*, defaults to `True`): Also explain a random dictionary for each SAE, and the
            neurons: the dimensions of the hidden states, the strongest of each token.
        seed (`int`, *optional*, defaults to 0): Of what is drawn.
        resamples (`int`, *optional*, defaults to 1000): Of the intervals.
        show (`bool`, *optional*, defaults to `True`): Show progress bars in the main process.

    Returns:
        [`Report`]: for each subject and width the number of drawn `latents`, which share is `explainable`, and the
        scores of `SCORES`; the drawn `latents` as [`Explained`].

    Raises:
        `ValueError`: if there is no SAE, widths it does not have, or nothing fires often enough.
    """
    check_at_least(1, per_group=per_group, least=least)
    rows, found = {}, {}
    for name, (sae, chosen) in with_baselines(saes, examples, widths, baselines, seed).items():
        drawn = DrawnLatents.of(firing_counts(sae, examples) >= least, chosen, per_group, seed)
        if not drawn.latents:
            raise ValueError(
                f"No latent of `{name}` fires on at least {least} of the {examples.tokens} tokens that examples come "
                "from. Give more text, or a smaller `least`."
            )
        from_text, on_text = (firing_examples(sae, data, drawn.latents, show) for data in (examples, test))
        explainer = Explainer(sae, examples, examples_per_latent, substitutes, seed)
        rank, world = processes()
        bar = tqdm(drawn.latents[rank::world], desc=f"explaining {name}", disable=not show or rank != 0, leave=False)
        own = [score(one, explainer.explain(one, from_text), on_text, examples_per_latent) for one in bar]
        explained = found[name] = sorted(gathered(own), key=lambda one: one.latent)
        values = {one.latent: [getattr(one, key) for key in SCORES] for one in explained}
        rows[name] = drawn.rows(values, SCORES, resamples, seed)
    about = {
        "hookpoint": test.hookpoint,
        "example_tokens": examples.tokens,
        "test_tokens": test.tokens,
        "per_group": per_group,
        "examples_per_latent": examples_per_latent,
        "substitutes": substitutes,
        "least": least,
        "seed": seed,
    }
    title = "N2G: patterns of tokens against firing on other text"
    records, intervals = as_records(rows), "Intervals: 95%, bootstrap over the drawn latents within groups."
    return Report(
        "patterns", title, records, _COLUMNS, about, ["f1"], intervals=intervals, latents=found, grouped=True
    )
