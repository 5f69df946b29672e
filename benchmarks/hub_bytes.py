"""Bytes on the wire when the first latents of an SAE are pulled, counted by the server.

    python benchmarks/hub_bytes.py

A 64 MB SAE is pushed to a loopback Hub and loaded at growing widths, from an empty cache, by the unmodified client.
"""

import os
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.hub_server import HubServer


def main() -> None:
    """Print the table."""
    with HubServer() as server, tempfile.TemporaryDirectory() as home:
        # Read when huggingface_hub is imported.
        os.environ |= {"HF_ENDPOINT": server.url, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "loopback"}
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        from transformers import AutoModel
        from transformers.utils import logging

        from hf_matryoshka_sae import MatryoshkaSAE, MatryoshkaSAEConfig

        logging.disable_progress_bar()
        latents = 16_384
        sae = MatryoshkaSAE(MatryoshkaSAEConfig(d_in=512, num_latents=latents, k=32))
        sae.push_to_hub("user/sae")
        size = len(server.files("user/sae")["model.safetensors"])
        sys.stdout.write(f"model.safetensors: {size / 2**20:.2f} MiB, {latents} latents\n")
        sys.stdout.write(
            f"{'width':>8} {'requests':>9} {'bytes':>12} {'share of the file':>18} {'over':>9} {'s':>6}\n"
        )
        before = 0
        for width in (latents // 16, latents // 4, latents // 4, latents // 2, None):
            server.requests.clear()
            began = time.monotonic()
            loaded = AutoModel.from_pretrained("user/sae", **({} if width is None else {"width": width}))
            seconds = time.monotonic() - began
            reached = loaded.config.num_latents
            assert loaded.W_dec.equal(sae.W_dec[:reached])
            assert loaded.W_enc.equal(sae.W_enc[:reached])
            sent, share = server.bytes_sent(), (reached - before) / latents
            asked = [request for request in server.requests if "agent-harnesses" not in request.path]
            sys.stdout.write(
                f"{'all' if width is None else width:>8} {len(asked):>9} {sent:>12} {sent / size:>18.4%} "
                f"{sent - share * size:>9.0f} {seconds:>6.2f}\n"
            )
            before = max(before, reached)
        sys.stdout.write("over: bytes beyond the new latents' share of the file\n")


if __name__ == "__main__":
    main()
