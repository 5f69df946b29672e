"""What an SAE is worth at twelve widths, and what is left of a sample text at each: stored with its feature index.

    {"format_version": 1, "tokens": 10000, "selection": "mask",
     "source": {"path": "embedded", "name": None, "split": "heldout", "column": "text", "context_length": 128,
                "exclude": "special"},
     "curve": {"trained": [{"width": 64, "fvu": .61, "l0": 9.1, "recaptured_zero": .78, "recaptured_mean": .72,
                            "ce": 4.2, "kl": .9, "pooled_cosine": None, "neighbours": None, "size_mb": .07}, ...],
               "energy": [...]},
     "base": {"ce": 3.1, "ce_zero": 8.2, "ce_mean": 7.4, "pooled_cosine": None, "neighbours": None},
     "sample": {"text": "...", "tokens": [...], "widths": [...], "firings": [[[[latent, value], ...], ...], ...],
                "continuations": [...], "plain": "..."},
     "largest": {"71": 12.3}}

`source` says which text was read, for other figures to be held against these; of files, whose paths are nobody's
business, and in indexes of earlier versions it is missing or `None`. `energy` orders the latents by E[a^2], within the
groups between prefix widths. A model that predicts no tokens has no losses (`None`); of it there are `pooled_cosine`
and `neighbours`, see `evaluation.pooled`. Continuations are `None` for a model that generates no text. Under selection
mask the latents of the whole SAE compete, then those past a width are dropped.
"""

import logging
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import DatasetConfig, heldout_batches
from ..activations.hookpoints import hooked
from ..activations.language_model import EMBEDDED
from ..common.data_source import local_files
from ..common.distributed import gathered, processes
from ..evaluation import Dictionary, HeldOut, evaluate_fidelity
from ..evaluation.data import as_config
from ..evaluation.opening import run_of
from ..models import SAEModel
from ..models.pieces import WHOLE_TENSORS
from ..progressive import sort_latents
from .continuing import Reconstructing, continued, prompt_tokens
from .index.columns import largest_of
from .index.latent_pass import LatentPass
from .index.layout import SHOWCASE_VERSION
from .text import longest, read_text, strongest, text_features


logger = logging.getLogger(__name__)

WIDTHS, TOKENS = 12, 10_000  # as many as the page reads: what it measures more stands on the same curve
_SPAN = 64  # the narrowest width is at most this part of the whole
_NEW_TOKENS, _LATENTS_OF_TOKEN, _LONGEST = 24, 3, 96
_ROW = ("fvu", "l0", "recaptured_zero", "recaptured_mean", "ce", "kl", "pooled_cosine", "neighbours")
_SENTENCE = 140  # characters of the sample
_PLAIN = re.compile(r"\w[a-z ,']{50,}[.!?]")


def showcase_widths(sae: SAEModel, count: int = WIDTHS) -> list[int]:
    """Return every prefix width and others between on about a logarithmic scale, from a 64th to the whole."""
    whole = sae.config.num_latents
    widths = sorted({max(1, whole // _SPAN), *sae.prefix_widths, whole})
    while len(widths) < count:
        gaps = [(high / low, low, high) for low, high in pairwise(widths) if high - low > 1]
        if not gaps:
            break
        _, low, high = max(gaps)
        widths = sorted([*widths, min(max(round((low * high) ** 0.5), low + 1), high - 1)])
    return widths


def measure_showcase(
    sae: SAEModel,
    data: HeldOut,
    energy: Tensor,
    largest: Tensor,
    show: bool = True,
) -> dict[str, Any]:
    """Measure an SAE at twelve widths, as trained and sorted by energy, and read a sample text at each.

    Args:
        sae ([`SAEModel`]): The SAE, in `eval` mode.
        data ([`HeldOut`]): Its language model and held-out tokens. Under `torch.distributed` each process evaluates
            its share, and all return the same.
        energy (`Tensor` of shape `(F,)`): Latents in the order of their energy, largest first.
        largest (`Tensor` of shape `(F,)`): Largest activation of each latent.
        show (`bool`, *optional*, defaults to `True`): Whether to show progress bars.

    Returns:
        `dict`: Values for JSON, as described above.

    Raises:
        `ValueError`: for a transcoder, which reconstructs another place than it reads.
    """
    widths = showcase_widths(sae)
    orders = {"trained": sae, "energy": sort_latents(sae, order=energy)}
    subjects = {name: Dictionary(each, widths, "mask") for name, each in orders.items()}
    result = evaluate_fidelity(data, subjects, similarity_tokens=0, show=show)
    pooled = result.get("pooled") or {}
    sample = _sample(sae, data, widths)
    named = {latent for row in sample["firings"] for token in row for latent, _ in token}
    return {
        "format_version": SHOWCASE_VERSION,
        "tokens": result["tokens"],
        "selection": "mask",
        "curve": {name: [_row(sae, row) for row in rows] for name, rows in result["subjects"].items()},
        "base": {
            "ce": result["clean_ce"],
            "ce_zero": result["zero_ce"],
            "ce_mean": result["mean_ce"],
            "pooled_cosine": pooled.get("pooled_cosine"),
            "neighbours": pooled.get("neighbours"),
        },
        "sample": sample,
        "largest": {str(latent): _short(largest[latent]) for latent in sorted(named)},
    }


def _row(sae: SAEModel, row: dict[str, Any]) -> dict[str, Any]:
    return {"width": row["width"], **{key: row.get(key) for key in _ROW}, "size_mb": size_mb(sae, row["width"])}


def size_mb(sae: SAEModel, width: int) -> float:
    """Return the megabytes (10^6 bytes) of the tensors of an SAE's first `width` latents."""
    share = width / sae.config.num_latents
    tensors = sae.state_dict().items()
    return sum(x.numel() * x.element_size() * (1 if name in WHOLE_TENSORS else share) for name, x in tensors) / 1e6


def _short(value: Any) -> float:
    return float(f"{float(value):.4g}")


def index_showcase(
    sae: SAEModel,
    model: nn.Module,
    tokenizer: Any,
    hookpoint: str,
    folder: Path | None,
    latent_pass: LatentPass,
    text: tuple[DatasetConfig | list[str] | None, int, str],
    show: bool,
) -> dict[str, Any] | None:
    """Return what is stored with an index, `None` where it cannot be measured, which a warning says.

    The text is the held-out one of the run in whose folder the SAE lies, or of the embedded text; else the beginning
    of the text of the index.
    """
    dataset, context_length, exclude = text
    if dataset is None:
        return None
    run = run_of(folder)
    embedded = isinstance(dataset, DatasetConfig) and dataset.path == EMBEDDED
    heldout = as_config(None) if embedded else dataset if run is None or run.dataset is None else run.dataset
    # In the main process all sums are added up.
    sums, top = latent_pass.sums, largest_of(latent_pass.contexts)
    order = sums.moments[1].argsort(descending=True, stable=True)
    energy, largest, tokens = gathered([(order.cpu(), top.cpu(), min(TOKENS, int(sums.tokens)))])[0]
    try:
        batches = heldout_batches(heldout, tokenizer, context_length, tokens, exclude=exclude)
        data = HeldOut(model, batches, hookpoint, tokenizer.mask_token_id, tokenizer)
        source = source_of(heldout, context_length, exclude)
        return measure_showcase(sae, data, energy, largest, show) | {"source": source}
    except ValueError as error:
        if processes()[0] == 0:
            logger.warning("The index holds no figures of the SAE at several widths: %s", error)
        return None


def source_of(dataset: DatasetConfig | list[str], context_length: int, exclude: str) -> dict[str, Any] | None:
    """Return what tells one held-out text from another; `None` of texts and files that are nobody else's."""
    if not isinstance(dataset, DatasetConfig) or (dataset.path != EMBEDDED and local_files(dataset) is not None):
        return None
    fields = {name: getattr(dataset, name) for name in ("path", "name", "split", "column")}
    return {**fields, "context_length": context_length, "exclude": exclude}


# The sample text


def _sample(sae: SAEModel, data: HeldOut, widths: list[int]) -> dict[str, Any]:
    """Return a text of the held-out ones with its latents and the model's continuation at each width."""
    text, most = _sentence(_texts(data)), min(_LONGEST, longest(data.model) - _NEW_TOKENS)
    while len(data.tokenizer(text)["input_ids"]) > most and " " in text:
        text = text.rpartition(" ")[0]
    features = text_features(sae, data.model, data.tokenizer, text, data.hookpoint, top=1, max_tokens=most)
    firings = []
    for width in widths:
        tokens = strongest(features.pairs.keep(features.pairs.cols < width), _LATENTS_OF_TOKEN)
        firings.append([[[latent, _short(value)] for latent, value in token] for token in tokens])
    plain, continuations = _continuations(sae, data, text, widths)
    return {
        "text": text,
        "tokens": features.tokens,
        "widths": widths,
        "firings": firings,
        "continuations": continuations,
        "plain": plain,
    }


def _texts(data: HeldOut) -> Iterable[str]:
    for batch in data.batches:
        for ids, keep in zip(batch.input_ids, batch.keep, strict=True):
            yield data.tokenizer.decode(ids[keep], skip_special_tokens=True)


def _sentence(texts: Iterable[str]) -> str:
    """Return the longest plain sentence that is not too long; where there is none, the beginning of the first text."""
    beginning, plain = "", []
    for text in texts:
        sentences = [" ".join(sentence.split()) for sentence in re.split(r"(?<=[.!?])\s+", text)]
        beginning = beginning or " ".join(sentences)[:_SENTENCE].rpartition(" ")[0]
        # Windows begin and end anywhere, so that the first and the last are not whole.
        plain += [sentence for sentence in sentences[1:-1] if _PLAIN.fullmatch(sentence)]
    return max((sentence for sentence in plain if len(sentence) <= _SENTENCE), key=len, default=beginning)


def _continuations(sae: SAEModel, data: HeldOut, text: str, widths: list[int]) -> tuple[str | None, list[str] | None]:
    """Return how the model continues the text as it is, and with hidden states reconstructed at each width.

    All are rows of one batch.
    """
    model, tokenizer = data.model, data.tokenizer
    if not data.has_loss or not getattr(model, "can_generate", lambda: False)():
        return None, None
    room = longest(model) - _NEW_TOKENS
    ids = prompt_tokens(tokenizer, text, room).to(data.device)
    keep = read_text(tokenizer, text, room)[0].keep[:, : ids.shape[1]].repeat(len(widths) + 1, 1)
    keep[0] = False
    rows = torch.arange(len(widths) + 1) > 0

    def replace(states: Tensor) -> Tensor:
        each = sae.decode_pairs(sae.encode_pairs(states.to(sae.W_enc)), widths)  # of all rows at all widths
        places = torch.arange(len(widths))
        return each.unflatten(1, (len(widths), -1))[places, places].flatten(0, 1).to(states)

    with torch.no_grad(), hooked(model, [(data.hookpoint, Reconstructing(replace, keep, rows))]):
        tokens = continued(model, tokenizer, ids.repeat(len(keep), 1), _NEW_TOKENS)
    plain, *others = (tokenizer.decode(row, skip_special_tokens=True) for row in tokens)
    return plain, others
