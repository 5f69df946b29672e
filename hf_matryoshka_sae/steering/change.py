"""How latents are changed, and at which tokens: the options that every way to steer takes. No torch."""

from dataclasses import dataclass


MODES = ("add", "clamp", "remove", "erase")
POSITIONS = ("all", "new", "generated")
"""Positions that may be changed: all; from the prompt's last token on, which decides the first new one; new ones."""
FORMATS = ("peft", "gguf", "vectors", "lm_eval")
"""Files for other tools, see [`export`]."""


@dataclass(frozen=True)
class Change:
    """How latents are changed, and at which tokens.

    Args:
        mode (`str`, *optional*, defaults to `"add"`): `"add"` adds the latent's decoder row times the value to the
            hidden state, whether the latent fires or not; `"clamp"` sets its activation to the value, `"remove"` to 0;
            `"erase"` takes the direction of its decoder row out of the model's whole residual stream.
        hookpoint (`str`, *optional*): Where the change is made; by default where the SAE reconstructs.
        width (`int`, *optional*): Encode with the first `width` latents alone; all by default.
        positions (`str`, *optional*, defaults to `"all"`): Positions that are changed: `"all"`; `"new"`, from the
            prompt's last token on, which decides the first new one; or `"generated"`, those of new tokens alone.
            Outside `generate` the prompt is what is read with an empty cache.
        from_position (`int`, *optional*, defaults to 0): First position that is changed; padding does not count.
        condition (`int`, *optional*): Change only tokens on which this latent of the SAE fires.

    Raises:
        `ValueError`: if an option is unknown, or means nothing with the mode.
    """

    mode: str = "add"
    hookpoint: str | None = None
    width: int | None = None
    positions: str = "all"
    from_position: int = 0
    condition: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("mode", MODES), ("positions", POSITIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` should be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        first = self.from_position
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise ValueError(f"`from_position` must be a whole number of at least 0, got {first!r}.")
        if self.mode == "erase" and not self.is_everywhere:
            raise ValueError(
                "Mode 'erase' takes a direction out of the whole model: it has no positions or condition."
            )

    @property
    def has_values(self) -> bool:
        """Return whether each latent needs a value."""
        return self.mode in ("add", "clamp")

    @property
    def needs_sae(self) -> bool:
        """Return whether the change depends on activations, so that the SAE has to encode."""
        return self.mode in ("clamp", "remove") or self.condition is not None

    @property
    def is_everywhere(self) -> bool:
        """Return whether every token is changed."""
        return self.positions == "all" and not self.from_position and self.condition is None
