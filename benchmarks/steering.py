r"""What steering costs in a forward pass, and what five latents of a small SAE do to its language model.

    python benchmarks/steering.py overhead
    python benchmarks/steering.py latents --sae runs/small-llama/matryoshka/model.layers.1 \
        --model ../shared/lm --dataset ../shared/text/heldout.parquet

`overhead` takes a random Llama, so that it needs no files. `latents` finds each latent by a search for the tokens on
which it is to fire, takes the child or parent that a tree of the latents gives it, and writes dose reports and plots.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

import hf_matryoshka_sae  # noqa: F401  (registers the SAE classes with AutoModel)
from hf_matryoshka_sae.common.files import write_json
from hf_matryoshka_sae.evaluation import open_heldout
from hf_matryoshka_sae.features import LatentTree, build_tree, search_latents
from hf_matryoshka_sae.models import BatchTopKSAE, BatchTopKSAEConfig
from hf_matryoshka_sae.steering import Steering, dose_report, steered


CONCEPTS = {
    "digits": (r"\s?\d+", " 1 2 3 4 5 6 7 8 9"),
    "opening quotation mark": (r'\s"', ' "yes," "no," "why?"'),
    "personal pronouns": (r"\s(he|she|they|we|I|you)", " he and she and they and we and you"),
    "modal verbs": (r"\s(would|could|should|will|can|may|might|must)", " would could should will can may might must"),
    "numbers in words": (r"\s(one|two|three|four|five|six|seven|eight|nine|ten)", " one two three four five six"),
}
"""Of each concept: the tokens on which its latent is to fire and which are wanted, and a prompt that asks for them."""
FOLLOWING = {
    "personal pronouns": r"('ve|'ll|'m|'d|\s(can|have|know|could|guess|think))",
    "modal verbs": r"\s(be|have|not|become|make|come|see|get|take)",
}
"""What follows such tokens, as the latents' own effects on logits say: wanted with `--following`."""


def main() -> None:
    """Run one of the two parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("overhead", "latents"))
    parser.add_argument("--sae", help="folder of the SAE (latents)")
    parser.add_argument("--model", help="language model (latents)")
    parser.add_argument("--dataset", help="held-out text (latents)")
    parser.add_argument("--search_tokens", type=int, default=60_000)
    parser.add_argument("--tokens", type=int, default=6_000, help="on which costs are measured")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--max_cost", type=float, default=0.2)
    parser.add_argument("--only", nargs="+", choices=CONCEPTS, help="some of the concepts")
    parser.add_argument("--following", action="store_true", help="of some concepts, want the tokens that follow")
    parser.add_argument("--alone", action="store_true", help="without the latents' parents and children")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/steering"))
    options = parser.parse_args()
    overhead(options) if options.part == "overhead" else latents(options)


@torch.no_grad()
def overhead(options: argparse.Namespace) -> None:
    """Time forward passes of a model with and without steering at one layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, vocab_size=8192
    )
    model, ids = LlamaForCausalLM(config).eval(), torch.randint(8192, (4, 128))
    sae = BatchTopKSAE(BatchTopKSAEConfig(d_in=512, num_latents=8192, k=32, hookpoint="model.layers.3")).eval()
    sae.threshold.data.fill_(1.5)  # lets about k of the random latents through
    modes = {
        "plain": nullcontext,
        "add": lambda: steered(model, sae, {3: 1.0}),
        "add, new positions": lambda: steered(model, sae, {3: 1.0}, positions="new"),
        "clamp, 8192 latents": lambda: steered(model, sae, {3: 1.0}, "clamp"),
        "clamp, width 512": lambda: steered(model, sae, {3: 1.0}, "clamp", width=512),
        "erase": lambda: steered(model, sae, [3], "erase"),
    }
    passes = {
        "read 4 x 128": lambda: model(ids, use_cache=False),
        "generate 32 from 4 x 128": lambda: model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=32,
            min_new_tokens=32,
            do_sample=False,
            pad_token_id=0,
        ),
    }
    found = {}
    for kind, work in passes.items():
        seconds: dict[str, list[float]] = {name: [] for name in modes}
        for turn in range(options.repeats + 1):
            for name, context in modes.items():
                with context():
                    took = timed(work)
                if turn:
                    seconds[name].append(took)
        # Of each turn the ratio, as the machine's speed changes from turn to turn.
        found[kind] = {
            name: statistics.median(a / b for a, b in zip(values, seconds["plain"], strict=True)) - 1
            for name, values in seconds.items()
        }
        sys.stdout.write(f"{kind}: {1000 * statistics.median(seconds['plain']):.0f} ms plain\n")
        for name, share in found[kind].items():
            sys.stdout.write(f"  {name:22}{share:+8.1%}\n")
    write_json(options.output_dir / "overhead.json", found)


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def latents(options: argparse.Namespace) -> None:
    """Find latents, measure their doses and those of a relative, write reports."""
    sae = AutoModel.from_pretrained(options.sae).eval()
    place = {"hookpoint": sae.config.hookpoint, "dataset": options.dataset, "context_length": 128}
    data = open_heldout(options.model, tokens=options.search_tokens, **place)
    tree = build_tree(sae, data, show=False)
    few = replace(data, batches=data.batches[: max(1, options.tokens // (32 * 128))])
    for concept in options.only or (FOLLOWING if options.following else CONCEPTS):
        pattern, prompt = CONCEPTS[concept]
        wanted = FOLLOWING[concept] if options.following else pattern
        hit = search_latents(f"[re `{pattern}`]", sae, data, top=1, show=False)[0]
        sys.stdout.write(
            f"\n# {concept}: cosine {hit.cosine:.2f}, precision {hit.precision:.2f}, recall {hit.recall:.2f}\n"
        )
        for role, latent in family(tree, hit.latent)[: 1 if options.alone else None]:
            node = tree.node(latent)
            report = dose_report(
                Steering.from_latents(sae, {latent: node.maximum}),
                few,
                wanted=wanted,
                prompt=prompt if role == "found" else None,
                max_cost=options.max_cost,
                prompts=options.prompts,
                show=False,
            )
            name = f"{concept} {role}".replace(" ", "-")
            about = {"latent": latent, "level": node.level, "largest": node.maximum, "frequency": node.frequency}
            write_json(options.output_dir / f"{name}.json", report.to_dict() | about)
            report.plot(options.output_dir / f"{name}.png")
            sys.stdout.write(f"\n{role}: latent {latent}, level {node.level}, largest activation {node.maximum:.2f}\n")
            sys.stdout.write(f"{report}\n")
            sys.stdout.flush()


def family(tree: LatentTree, latent: int) -> list[tuple[str, int]]:
    """A latent, with its parent and its strongest child where it has them."""
    node = tree.node(latent)
    found = [("found", latent), ("parent", node.parent), *(("child", child) for child in node.children[:1])]
    return [(role, number) for role, number in found if number is not None]


if __name__ == "__main__":
    main()
