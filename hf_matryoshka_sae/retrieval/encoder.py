"""A sentence-transformers `SparseEncoder` whose dimensions are an SAE's latents, and which says what they mean."""

import json
from pathlib import Path
from typing import Any, ClassVar

from sentence_transformers import SentenceTransformer, SparseEncoder
from torch import Tensor

from ..activations.sentences import SENTENCE_EMBEDDING
from ..common.files import write_json
from ..convert import load as load_sae
from ..models import SAEModel
from .sparse_embedding import SparseEmbedding


_PORTABLE = f"sparse_embedding.{SparseEmbedding.__name__}"  # the module's name where this package is not installed


class LatentEncoder(SparseEncoder):
    """A `SparseEncoder` with an SAE as its last module; arguments as of `SparseEncoder`.

    What it saves opens as `SparseEncoder(folder, trust_remote_code=True)` without this package, and as
    `LatentEncoder(folder)` with it. `encode`, `encode_query` and `encode_document` take `width=` and
    `max_active_dims=`.
    """

    _module_classes: ClassVar = {_PORTABLE: SparseEmbedding}

    @property
    def latents(self) -> SparseEmbedding:
        """The module with the SAE."""
        return self[-1]

    def preprocess(self, inputs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in sentence-transformers.

        Raises:
            `ValueError`: where no text has a token, and the tokenizer adds none: transformers would stop deep inside.
        """
        features = super().preprocess(inputs, *args, **kwargs)
        if "input_ids" in features and not features["input_ids"].numel():
            raise ValueError("There is no token to read: the texts are empty, and this model's tokenizer adds none.")
        return features

    def save(self, path: str, *args: Any, **kwargs: Any) -> None:
        """Save the whole model; arguments as of `SparseEncoder.save`."""
        super().save(path, *args, **kwargs)
        modules = Path(path) / "modules.json"
        entries = json.loads(modules.read_text(encoding="utf-8"))
        own = f"{SparseEmbedding.__module__}.{SparseEmbedding.__name__}"
        for entry in entries:
            entry["type"] = _PORTABLE if entry["type"] == own else entry["type"]
        write_json(modules, entries)

    def decode(self, embeddings: Tensor, top_k: int | None = None) -> list:
        """What the dimensions of embeddings mean, by descending value.

        Args:
            embeddings (`Tensor` of shape `(F,)` or `(N, F)`): What `encode` gives, sparse or dense.
            top_k (`int`, *optional*): At most so many of each; by default all that are not 0.

        Returns:
            A list of `(name, value)`, for several embeddings a list of such; the name of a latent without one is
            `"latent 17"`.

        Raises:
            `ValueError`: if the embeddings are not of this model's dimension.
        """
        dense = embeddings.to_dense() if embeddings.is_sparse else embeddings
        if dense.shape[-1] != self.get_embedding_dimension() or dense.ndim > 2:
            raise ValueError(
                f"Embeddings must be (N, {self.get_embedding_dimension()}) or one row, got {tuple(dense.shape)}."
            )
        decoded = []
        for row in dense.reshape(-1, dense.shape[-1]):
            order = row.argsort(descending=True, stable=True)[: top_k or int((row > 0).sum())]
            decoded.append([(self.name_of(int(latent)), float(row[latent])) for latent in order if row[latent] > 0])
        return decoded[0] if dense.ndim == 1 else decoded

    def name_of(self, latent: int) -> str:
        """The name of a dimension: words of the texts that it stands for, or its number.

        Args:
            latent (`int`): Its number, from 0.

        Raises:
            `ValueError`: if there is no such dimension.
        """
        if not 0 <= latent < self.get_embedding_dimension():
            raise ValueError(f"Latents are numbered 0 to {self.get_embedding_dimension() - 1} here, got {latent}.")
        number = int(self.latents.sae.latent_ids[latent])
        entry = self.latents.names.get(str(number))
        return ", ".join(entry["words"]) if entry and entry["words"] else f"latent {number}"


def sparse_encoder(
    model: str | Path | SentenceTransformer,
    sae: str | Path | SAEModel,
    width: int | None = None,
    max_active_dims: int | None = None,
    pooling: str = "embedding",
    queries: str | None = None,
    refine: int = 0,
) -> LatentEncoder:
    """The `SparseEncoder` made of a sentence-transformers model and an SAE of its embeddings.

    Args:
        model (`str`, `Path` or `SentenceTransformer`): The dense model; a folder or Hub id is loaded.
        sae (`str`, `Path` or [`SAEModel`]): An SAE, or where one lies, of any format that [`convert.load`] reads.
        width (`int`, *optional*): Only the first `width` latents, see [`SparseEmbedding`].
        max_active_dims (`int`, *optional*): Keep only so many of a text's latents.
        pooling (`str`, *optional*, defaults to `"embedding"`): What the SAE reads: the pooled `embedding`, or each
            token, of whose latents the `max` is kept.
        queries (`str`, *optional*): What `encode_query` gives: `codes`, or `projections` on all latents, which rank
            better; see [`SparseEmbedding`].
        refine (`int`, *optional*, defaults to 0): Steps by which codes of documents are fitted to their embeddings;
            10 rank much better, and cost as many products with the dictionary.

    Raises:
        `ValueError`: if the SAE reads another width than the model's, or something else than embeddings of texts.
    """
    dense = model if isinstance(model, SentenceTransformer) else SentenceTransformer(str(model))
    loaded = sae if isinstance(sae, SAEModel) else load_sae(sae)
    given = dense.get_embedding_dimension()
    if loaded.config.d_in != given:
        raise ValueError(
            f"The SAE reads embeddings of width {loaded.config.d_in} (of {loaded.config.base_model or 'an unnamed '}"
            f"{'' if loaded.config.base_model else 'model'}), and this model's have {given}."
        )
    if pooling == "embedding" and loaded.config.hookpoint not in (None, "", SENTENCE_EMBEDDING):
        raise ValueError(
            f"This SAE reads {loaded.config.hookpoint} of {loaded.config.base_model}, not the embeddings of whole "
            f"texts. Train one with `hookpoints: [{SENTENCE_EMBEDDING}]`, or take its latents of tokens with "
            "`pooling='max'`."
        )
    module = SparseEmbedding(loaded.eval(), width, max_active_dims, pooling, queries, refine=refine)
    encoder = LatentEncoder(modules=[*dense, module], prompts=dense.prompts, similarity_fn_name="cosine")
    return encoder.to(dense.device)
