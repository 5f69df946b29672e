"""Sentence embeddings as sparse codes of any width: the module of sentence-transformers around an SAE.

    code = SAE.encode(embedding)[:width]                    one SAE for pooled embeddings
    code = max over tokens of log(1 + SAE.encode(token))    one SAE for tokens (SPLARE, arXiv 2603.13277)

A query need not be rounded to a few latents: the product of a query q with what a document's code a stands for, x^ =
W_dec^T a + b_dec, is (W_dec q).a up to a constant of the query. So a query's code may be its products with all rows of
the decoder, W_dec (q - b_dec) ("projections"); documents are as sparse as ever, and the ranking is much better.

An encoder finds a document's latents in one product, not the best ones. `refine` steps of normalised iterative hard
thresholding (Blumensath & Davies 2010) start from its code a and keep the number of latents that are not 0:

    a <- largest entries of max(0, a + mu W_dec (x - x^)),   mu = |g|^2 / |W_dec^T g|^2, g = W_dec (x - x^) where a > 0

A folder that holds this module carries this file and those of `models/` in its root, so that
`SparseEncoder(folder, trust_remote_code=True)` opens it where this package is not installed; what a saved module is
saved from again carries them on.

Shapes: N texts, T tokens, D width of the embedding, F latents.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from sentence_transformers.base.modules.module import Module
from torch import Tensor

from ..models.modeling_sae import MODELS, SAEModel


POOLINGS = ("embedding", "max")
QUERIES = ("codes", "projections")
NAMES_FILE = "latent_names.json"
_CONFIG_FILE = "sparse_embedding.json"
_PACKAGE_IMPORT = re.compile(r"^from \.\.models\.", re.MULTILINE)


class SparseEmbedding(Module):
    """Replaces a text's embedding by the latents of an SAE, `(N, F)`, the first of which work alone.

    Args:
        sae ([`SAEModel`]): Trained on the embeddings; with `pooling="max"` on the token embeddings.
        width (`int`, *optional*): Only the first `width` latents, equal to that slice of the whole code; the embedding
            then has so many dimensions. By default all.
        max_active_dims (`int`, *optional*): Keep only so many of a text's latents, the largest. By default all.
        pooling (`str`, *optional*, defaults to `"embedding"`): What the SAE reads: the pooled `"embedding"`, or each
            token, of whose latents the `"max"` is kept.
        queries (`str`, *optional*): What `encode_query` gives: a query's `"codes"`, or its `"projections"` on all
            latents. By default projections where the SAE reads pooled embeddings as they are.
        refine (`int`, *optional*, defaults to 0): Steps by which codes are fitted to their embeddings; 10 find most
            of what there is. Needs an SAE that reads pooled embeddings as they are.
        names (`dict[str, dict]`, *optional*): What latents mean by their `latent_ids`, see [`name_latents`].

    Raises:
        `ValueError`: if the width is not between 1 and F, or pooling and queries are unknown or do not go together.
    """

    config_keys: ClassVar = ["width", "max_active_dims", "pooling", "queries", "refine"]
    config_file_name = _CONFIG_FILE
    forward_kwargs: ClassVar = {"max_active_dims", "width", "task"}

    def __init__(
        self,
        sae: SAEModel,
        width: int | None = None,
        max_active_dims: int | None = None,
        pooling: str = "embedding",
        queries: str | None = None,
        names: dict[str, dict[str, Any]] | None = None,
        refine: int = 0,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"`pooling` must be one of {', '.join(POOLINGS)}, got {pooling!r}.")
        linear = pooling == "embedding" and sae.config.input_normalization is None
        queries = queries or ("projections" if linear else "codes")
        if queries not in QUERIES or (queries == "projections" and not linear):
            raise ValueError(
                "`queries` must be `codes`, or `projections` for an SAE that reads pooled embeddings as they are; "
                f"got {queries!r}, with `pooling: {pooling}`, `input_normalization: {sae.config.input_normalization}`."
            )
        if refine < 0 or (refine and not linear):
            raise ValueError(
                "`refine` is a number of steps, above 0 only for an SAE that reads pooled embeddings as they are; "
                f"got {refine}, with `pooling: {pooling}`, `input_normalization: {sae.config.input_normalization}`."
            )
        for name, value in (("width", width), ("max_active_dims", max_active_dims)):
            if value is not None and not 1 <= value <= sae.config.num_latents:
                raise ValueError(
                    f"`{name}` must be between 1 and the SAE's {sae.config.num_latents} latents, got {value}."
                )
        self.sae, self.width, self.max_active_dims = sae, width, max_active_dims
        self.pooling, self.queries, self.refine = pooling, queries, refine
        self.names = names or {}

    def forward(
        self,
        features: dict[str, Any],
        max_active_dims: int | None = None,
        width: int | None = None,
        task: str | None = None,
    ) -> dict[str, Any]:
        """The features with `sentence_embedding` replaced by latents.

        Args:
            features (`dict`): Of the modules before: `sentence_embedding` `(N, D)`, or with `pooling="max"`
                `token_embeddings` `(N, T, D)` and `attention_mask` `(N, T)`.
            max_active_dims (`int`, *optional*): For this call; `encode` passes it on.
            width (`int`, *optional*): For this call: latents past it are 0. The shape stays, so that queries and
                documents of different widths can be compared.
            task (`str`, *optional*): `"query"` where `encode_query` asks.

        Raises:
            `ValueError`: if the width is not between 1 and the module's own, or D is not the SAE's.
        """
        dimension = self.get_embedding_dimension()
        width = dimension if width is None else width
        if not 1 <= width <= dimension:
            raise ValueError(f"`width` must be between 1 and {dimension}, the latents of this encoder; got {width}.")
        if self.pooling == "max":
            code = self._of_tokens(features["token_embeddings"], features["attention_mask"], width)
        elif self.queries == "projections" and task == "query":
            rows = features["sentence_embedding"].to(self.sae.W_dec)
            code = (rows - self.sae.b_dec) @ self.sae.W_dec[:width].T
        else:
            code = self._encoded(features["sentence_embedding"], width)
        code = _largest(code, max_active_dims or self.max_active_dims)
        features["sentence_embedding"] = torch.nn.functional.pad(code, (0, dimension - width))
        return features

    def _encoded(self, rows: Tensor, width: int) -> Tensor:
        # "mask": a width is a slice of the whole code, so that stored codes can be cut later.
        if not self.refine:
            return self.sae.encode(rows, width=width, selection="mask").to_dense()[:, :width]
        code = self.sae.encode(rows, selection="mask").to_dense()
        return refined(code, rows.to(code) - self.sae.b_dec, self.sae.W_dec, self.refine)[:, :width]

    def _of_tokens(self, tokens: Tensor, mask: Tensor, width: int) -> Tensor:
        rows, _ = mask.bool().nonzero(as_tuple=True)
        latents = self._encoded(tokens[mask.bool()], width).log1p()
        return latents.new_zeros(len(tokens), width).scatter_reduce_(
            0, rows[:, None].expand_as(latents), latents, "amax"
        )

    def get_embedding_dimension(self) -> int:
        """Dimensions of an embedding: the width, or F."""
        return self.width or self.sae.config.num_latents

    def save(self, output_path: str, *_args: Any, safe_serialization: bool = True, **_kwargs: Any) -> None:
        """Save the SAE, this module's fields and the names of latents; and the code that opens them, one level up."""
        if not safe_serialization:
            raise ValueError("An SAE is saved as safetensors only: leave `safe_serialization` out.")
        self.sae.save_pretrained(output_path)
        self.save_config(output_path)
        if self.names:
            _write(Path(output_path) / NAMES_FILE, json.dumps(self.names, ensure_ascii=False))
        ship_code(Path(output_path).resolve().parent)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        **_kwargs: Any,
    ) -> Self:
        """Load what [`save`] wrote, from a folder or the Hub; arguments as of every module.

        Raises:
            `ValueError`: if what lies there is no SAE.
        """
        place = {"subfolder": subfolder, "token": token, "cache_folder": cache_folder, "revision": revision}
        place |= {"local_files_only": local_files_only}
        fields = cls.load_config(model_name_or_path, **place)
        model_type = cls.load_config(model_name_or_path, config_filename="config.json", **place).get("model_type")
        known = {config.model_type: model for config, model in MODELS.items()}
        if model_type not in known:
            raise ValueError(f"{model_name_or_path}/{subfolder} holds a model of type {model_type}, which is no SAE.")
        names = cls.load_file_path(model_name_or_path, NAMES_FILE, **place)
        place["cache_dir"] = place.pop("cache_folder")
        sae = known[model_type].from_pretrained(model_name_or_path, **place)
        return cls(sae, **fields, names=names and json.loads(Path(names).read_text(encoding="utf-8")))


def refined(code: Tensor, rows: Tensor, decoder: Tensor, steps: int) -> Tensor:
    """Codes that say more of what they stand for, with as many latents as before.

    Args:
        code (`Tensor` of shape `(N, F)`): Codes, not negative.
        rows (`Tensor` of shape `(N, D)`): What they stand for, without the decoder's bias.
        decoder (`Tensor` of shape `(F, D)`): Rows of the decoder.
        steps (`int`): Of normalised iterative hard thresholding.
    """
    if not len(code):
        return code
    kept, begun, tiny = (code > 0).sum(1, keepdim=True), code, torch.finfo(code.dtype).tiny
    most = max(1, int(kept.max()))
    for _ in range(steps):
        gradient = (rows - code @ decoder) @ decoder.T
        inside = gradient * (code > 0)
        size = inside.square().sum(1, keepdim=True) / (inside @ decoder).square().sum(1, keepdim=True).clamp(min=tiny)
        code = (code + size * gradient).clamp(min=0)
        code = code * (code >= code.topk(most).values.gather(1, (kept - 1).clamp(min=0)))
    # Where latents are much alike a step may lead away.
    errors = [(rows - each @ decoder).square().sum(1, keepdim=True) for each in (code, begun)]
    return torch.where(errors[0] < errors[1], code, begun)


def _largest(code: Tensor, kept: int | None) -> Tensor:
    """The `kept` entries of each row `(F,)` that are largest in size; of equal ones the first."""
    if kept is None or kept >= code.shape[1]:
        return code
    best = code.abs().sort(dim=1, descending=True, stable=True).indices[:, :kept]
    return torch.zeros_like(code).scatter_(1, best, code.gather(1, best))


def ship_code(root: Path) -> None:
    """Write this file and those of the SAE classes flat into a model's root, where the loader of custom code looks."""
    own = Path(__file__)
    inside = {path.name: path for path in (own.parent.parent / "models").glob("*.py")} or {
        path.name: path for path in own.parent.glob("*.py")
    }
    inside.pop("__init__.py", None)
    for name, path in inside.items():
        if path.resolve() != (root / name).resolve():
            shutil.copyfile(path, root / name)
    _write(root / own.name, _PACKAGE_IMPORT.sub("from .", own.read_text(encoding="utf-8")))


def _write(path: Path, text: str) -> None:
    """Write a file whole before it takes its name."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    staged.write_text(text, encoding="utf-8")
    os.replace(staged, path)


__all__ = ["POOLINGS", "QUERIES", "SparseEmbedding", "refined", "ship_code"]
