"""Small runs to plan."""

from hf_matryoshka_sae.planning import Device, read_workload
from hf_matryoshka_sae.training import RunConfig


FIELDS = {
    "model": "embedded",
    "dataset": {"path": "embedded"},
    "hookpoints": ["model.layers.2"],
    "batch_size": 4096,
    "tokens": 409_600,
    "output_dir": "unused",
}
# Round numbers: 1 TFLOP/s, 1 GB/s, 10 GB/s inside a machine of 4, 1 GB/s out of it.
DEVICE = Device(
    "round", 1e9, {"float32": 1e12, "bfloat16": 2e12}, 1e9, 10e9, 1e9, 0.0, 4, matmul_share=1.0, memory_share=1.0
)


def config(*saes, **fields):
    """A run's config with a TopK dictionary of 1,024 latents, or those given."""
    return RunConfig.from_dict(
        {**FIELDS, "saes": list(saes) or [{"type": "topk", "num_latents": 1024, "k": 8}], **fields}
    )


def workload(*saes, dead_share=0.0, **fields):
    """What the planner reads from it."""
    return read_workload(config(*saes, **fields), dead_share=dead_share)
