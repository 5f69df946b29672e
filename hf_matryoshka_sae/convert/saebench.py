"""An SAE for SAEBench's evaluations: dense latents, decoder rows of length 1, a `cfg` with its fields."""

import re
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..models import SAEModel
from .hook_names import to_transformer_lens, transformer_lens_model


@dataclass
class SAEBenchConfig:
    """The config that SAEBench reads: the fields of its custom SAEs' config, with the same meanings."""

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    context_size: int | None = None
    hook_head_index: int | None = None
    architecture: str = ""
    apply_b_dec_to_input: bool | None = None
    finetuning_scaling_factor: bool | None = None
    activation_fn_str: str = ""
    prepend_bos: bool = True
    normalize_activations: str = "none"
    dtype: str = "float32"
    device: str = "cpu"
    dataset_path: str = ""
    dataset_trust_remote_code: bool = True
    seqpos_slice: tuple = (None,)
    training_tokens: int = -100_000
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    # Read by SAEBench, and no part of `to_dict`.
    activation_fn_kwargs: ClassVar[dict[str, Any]] = {}
    model_from_pretrained_kwargs: ClassVar[dict[str, Any]] = {}

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary, for JSON."""
        return asdict(self)


class SAEBenchAdapter(nn.Module):
    """An SAE with the parts that SAEBench uses; [`to_saebench`] returns it.

    Latents are in units of their contribution, `a ||d_i||`, in which decoder rows have length 1; which of them fire is
    decided as the SAE decides it. An SAE that normalises each hidden state undoes it for the tokens that were encoded
    last, as SAEBench decodes latents without their hidden states.

    Args:
        sae ([`SAEModel`]): Any family; its weights are copied.
        cfg ([`SAEBenchConfig`]): Config with SAEBench's fields.

    Attributes:
        W_enc (`Tensor` of shape `(D, F)`), W_dec (`Tensor` of shape `(F, D)`), b_enc (`Tensor` of shape `(F,)`),
        b_dec (`Tensor` of shape `(D,)`): The parameters.
    """

    def __init__(self, sae: SAEModel, cfg: SAEBenchConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.device, self.dtype = sae.W_enc.device, sae.W_enc.dtype
        self.hook_name, self.hook_layer = cfg.hook_name, cfg.hook_layer
        self._input_normalization, self._input_norm = sae.config.input_normalization, None
        self._activation, self._k = sae.config.activation_name, getattr(sae.config, "k", None)
        lengths = sae.W_dec.detach().norm(dim=1)
        lengths = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
        self.W_enc = nn.Parameter((sae.W_enc.detach() * lengths[:, None]).T.contiguous())
        self.W_dec = nn.Parameter(sae.W_dec.detach() / lengths[:, None])
        self.b_enc = nn.Parameter(sae.b_enc.detach() * lengths)
        self.b_dec = nn.Parameter(sae.b_dec.detach().clone())
        # TopK may compete in units of the pre-activation; thresholds may already be in those of the contribution.
        units = torch.ones_like(lengths) if sae.config.scale_by_decoder_norm else lengths
        self.register_buffer("_units", units)
        threshold = getattr(sae, "threshold", None)
        self.threshold = None if threshold is None else threshold.detach().clamp(min=0).float() * units.float()
        if self._activation == "gated":
            self.r_mag = nn.Parameter(sae.r_mag.detach().clone())
            self.b_mag = nn.Parameter(sae.b_mag.detach() * lengths)
        group_size = getattr(sae.config, "group_size", None)
        self._groups = None if group_size is None else sae.latent_ids // group_size

    def encode(self, x: Tensor) -> Tensor:
        """Return dense latents `(..., F)` of hidden states `(..., D)`."""
        x = self._normalized(x.to(self.dtype))
        centred = x - self.b_dec if self.cfg.apply_b_dec_to_input else x
        pre = centred @ self.W_enc + self.b_enc
        match self._activation:
            case "topk":
                return torch.relu(pre) * self._kept(pre / self._units)
            case "jumprelu" | "batch_topk":
                return torch.relu(pre) * (pre > self.threshold)
            case "gated":
                magnitude = self.r_mag.exp() * (pre - self.b_enc) + self.b_mag
                return torch.relu(magnitude) * (pre > 0)
        return torch.relu(pre)

    def _normalized(self, x: Tensor) -> Tensor:
        """Return the encoder's input; keep shift and scale, which decoding has to undo."""
        if self._input_normalization == "layer_norm":
            shift = x.mean(-1, keepdim=True)
            scale = (x - shift).std(-1, keepdim=True)
            self._input_norm = shift, scale
            return (x - shift) / (scale + 1e-5)
        if self._input_normalization == "constant_norm":
            scale = x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / x.shape[-1] ** 0.5
            self._input_norm = torch.zeros_like(scale), scale
            return x / scale
        return x

    def _kept(self, scores: Tensor) -> Tensor:
        """Return a mask of the latents that are kept: the k largest of a token, or the largest of each group."""
        if self._groups is None:
            none = torch.zeros_like(scores, dtype=torch.bool)
            return none.scatter(-1, scores.topk(int(self._k), dim=-1).indices, True)
        index = self._groups.to(scores.device).expand(scores.shape)
        largest = torch.full_like(scores, -torch.inf).scatter_reduce(-1, index, scores, "amax")
        return scores == largest.gather(-1, index)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Return the reconstruction `(..., D)` of latents `(..., F)`.

        Raises:
            `ValueError`: if the SAE normalises hidden states, and those encoded last are not as many.
        """
        decoded = feature_acts.to(self.dtype) @ self.W_dec + self.b_dec
        if self._input_normalization is None:
            return decoded
        if self._input_norm is None or self._input_norm[1].shape[:-1] != decoded.shape[:-1]:
            raise ValueError(
                f"This SAE normalises each hidden state ({self._input_normalization}): encode the hidden states of "
                f"these latents first. Latents have shape {tuple(feature_acts.shape)}."
            )
        shift, scale = self._input_norm
        return decoded * scale + shift

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction `(..., D)` of hidden states `(..., D)`."""
        return self.decode(self.encode(x))

    def to(self, *args: Any, **kwargs: Any) -> "SAEBenchAdapter":
        """Move as `nn.Module.to` does, with `device`, `dtype` and `cfg`; thresholds stay in fp32."""
        super().to(*args, **kwargs)
        self.device, self.dtype = self.W_enc.device, self.W_enc.dtype
        self.cfg.device, self.cfg.dtype = str(self.device), str(self.dtype).removeprefix("torch.")
        if self.threshold is not None:
            self.threshold = self.threshold.to(self.device)
        return self

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Give the decoder rows of length 1 again, and what was their length to the encoder (in place)."""
        lengths = self.W_dec.norm(dim=1)
        lengths = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
        self.W_dec /= lengths[:, None]
        self.W_enc *= lengths
        self.b_enc *= lengths
        self._units *= lengths
        if self.threshold is not None:
            self.threshold *= lengths.float()
        if self._activation == "gated":
            self.b_mag *= lengths

    @torch.no_grad()
    def check_decoder_norms(self) -> bool:
        """Return whether the rows of the decoder have length 1, as far as their type can say."""
        tolerance = 1e-2 if self.dtype in (torch.bfloat16, torch.float16) else 1e-5
        return bool((self.W_dec.float().norm(dim=1) - 1).abs().max() <= tolerance)


def to_saebench(
    sae: SAEModel,
    width: int | None = None,
    *,
    model_name: str | None = None,
    hook_name: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> SAEBenchAdapter:
    """Return the object that SAEBench's evaluations take in place of an SAE of its own.

    Args:
        sae ([`SAEModel`]): An SAE of any family, which is not changed.
        width (`int`, *optional*): Number of the first latents to keep, for one evaluation per prefix.
        model_name (`str`, *optional*): TransformerLens's name of the model; by default that of `base_model`.
        hook_name (`str`, *optional*): TransformerLens's name of the hook; by default that of `hookpoint`.
        device (`torch.device` or `str`, *optional*): Device of the result; by default the SAE's.
        dtype (`torch.dtype`, *optional*): Type of the result; by default the SAE's.

    Returns:
        [`SAEBenchAdapter`], an `nn.Module`: `W_enc (D, F)`, `W_dec (F, D)` with rows of length 1, `b_enc`, `b_dec`,
        `encode`, `decode`, `cfg`.

    Raises:
        `ValueError`: if a name cannot be found, or SAEBench has no place for what the SAE computes.
    """
    config = sae.config
    if config.output_hookpoint is not None:
        raise ValueError("This is a transcoder; SAEBench replaces hidden states by their own reconstruction.")
    if config.refine_steps:
        raise ValueError("SAEBench encodes by one product, and this SAE has `refine_steps`: pass the one before.")
    model_name = model_name or transformer_lens_model(config.base_model)
    if hook_name is None and config.hookpoint is not None:
        hook_name = to_transformer_lens(config.hookpoint, config.base_model)
    if model_name is None or hook_name is None:
        missing = "model_name" if model_name is None else "hook_name"
        raise ValueError(
            f"Which {missing} TransformerLens has for {config.base_model or 'an unnamed model'} at "
            f"{config.hookpoint or 'an unnamed hookpoint'} is not known: pass `{missing}`."
        )
    layer = re.match(r"blocks\.(\d+)\.", hook_name)
    part = sae if width is None else sae.truncate(width)
    nested = "matryoshka_" if hasattr(config, "prefix_widths") else ""
    cfg = SAEBenchConfig(
        model_name=model_name,
        d_in=config.d_in,
        d_sae=part.config.num_latents,
        hook_layer=int(layer[1]) if layer else 0,
        hook_name=hook_name,
        architecture=nested + config.activation_name,
        apply_b_dec_to_input=config.apply_b_dec_to_input,
        activation_fn_str=config.activation_name,
    )
    return SAEBenchAdapter(part, cfg).to(device=device or sae.W_enc.device, dtype=dtype or sae.W_enc.dtype).eval()
