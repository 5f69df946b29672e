"""What a learner's next step depends on, as tensors with a row for each latent and a tree of all the rest."""

from typing import Any

import torch
from torch import Tensor


class LearnerState:
    """How a dictionary in training is saved, loaded and put into another order; a part of [`Learner`]."""

    def _rows(self) -> dict[str, Tensor]:
        """Every tensor of which each latent has a row, by name; not copies."""
        size = self.sae.config.num_latents
        rows = {f"weights/{name}": tensor for name, tensor in self.sae.state_dict().items() if name != "b_dec"}
        for name, tensor in self._moments().items():
            if not name.startswith("b_dec/") and tensor.ndim and len(tensor) == size:
                rows[f"optimizer/{name}"] = tensor
        if self.average is not None:
            rows |= {f"average/{name}": tensor for name, tensor in self.average.items() if name != "b_dec"}
        if self.energy is not None:
            rows["energy"] = self.energy
        return rows | {"tokens_since_fired": self.tokens_since_fired}

    def _moments(self) -> dict[str, Tensor]:
        """The optimizer's state as `<parameter>/<key>`."""
        state = self.optimizer.optimizer.state
        named = [(name, state.get(parameter, {})) for name, parameter in self._parameters()]
        return {f"{name}/{key}": value for name, entries in named for key, value in entries.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on.

        Returns:
            `dict`: `rows`, tensors with a row for each latent of this process, and `shared`, a tree of all the rest,
            which is equal on all processes. Tensors are not copies.
        """
        rows = self._rows()
        if self.dead is not None:
            rows["dead"] = torch.zeros_like(self.tokens_since_fired, dtype=torch.bool).index_fill_(0, self.dead, True)
        shared = {
            "b_dec": self.sae.b_dec.detach(),
            "optimizer": {name: value for name, value in self._moments().items() if f"optimizer/{name}" not in rows},
            "average": None if self.average is None else self.average["b_dec"],
            "mean": self.mean,
            "scale": self.scale,
            "bandwidth": getattr(self.sae.config, "bandwidth", None),
            **self.sparsity.state_dict(),
            "updates": self.updates,
            "skipped": self._skipped,
            "base": None if self.base is None else self.base.raw,
        }
        return {"rows": rows, "shared": shared}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what [`state_dict`] gave, with the rows of this process's latents."""
        rows, shared, device = dict(state["rows"]), state["shared"], self.mean.device
        self._load_moments(
            {name.removeprefix("optimizer/"): rows.pop(name) for name in list(rows) if name.startswith("optimizer/")}
            | shared["optimizer"]
        )
        dead = rows.pop("dead", None)
        targets = self._rows()
        for name, value in rows.items():
            targets[name].copy_(value)
        self.sae.b_dec.copy_(shared["b_dec"])
        if self.average is not None:
            self.average["b_dec"].copy_(shared["average"])
        self.mean, self.scale = shared["mean"].to(device), shared["scale"]
        if shared["bandwidth"] is not None:
            self.sae.config.bandwidth = shared["bandwidth"]
        self.sparsity.load_state_dict(shared)
        self.updates = shared["updates"]
        self._skipped = shared["skipped"].to(device)
        self._set_dead(
            torch.zeros_like(self.tokens_since_fired, dtype=torch.bool) if dead is None else dead.to(device)
        )
        if self.base is not None:
            self.base.raw = shared["base"]

    def _load_moments(self, moments: dict[str, Tensor]) -> None:
        state, parameters = self.optimizer.optimizer.state, dict(self._parameters())
        for name, value in moments.items():
            owner, key = name.rsplit("/", 1)
            state[parameters[owner]][key] = value.to(self.mean.device)
