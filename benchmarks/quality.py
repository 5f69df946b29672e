"""Train one config with several seeds and compare every prefix with recorded figures of other libraries.

    python benchmarks/quality.py --config examples/small_llama_matryoshka.yaml --peers ../shared/peer_quality.json

Prints a table and writes it to `<output>/quality.json`. The recorded file holds, for each library, rows of width, l0,
fvu and recaptured (loss) under `prefix`; the best Matryoshka library at each width is the bar. Further flags override
fields of the config, as in training.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean

from hf_matryoshka_sae.training import load_run_config, train
from hf_matryoshka_sae.training.run.checkpoints import write_json


def best_peers(path: str) -> dict[int, dict[str, float]]:
    """For each width the least FVU and the most recaptured loss among the recorded Matryoshka libraries."""
    best: dict[int, dict[str, float]] = {}
    for name, entry in json.loads(Path(path).read_text()).items():
        if not isinstance(entry, dict) or "matryoshka" not in name:
            continue
        for row in entry["prefix"]:
            bar = best.setdefault(row["width"], {"fvu": row["fvu"], "recaptured": row["recaptured"]})
            bar["fvu"] = min(bar["fvu"], row["fvu"])
            bar["recaptured"] = max(bar["recaptured"], row["recaptured"])
    return best


def main() -> int:
    """Train, compare, print; the exit status is 1 where a prefix falls short."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--peers", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", default="runs/quality")
    known, flags = parser.parse_known_args()
    seeds = []
    for seed in known.seeds:
        folder = Path(known.output) / f"seed-{seed}"
        train(load_run_config(known.config, [*flags, f"--seed={seed}", f"--output_dir={folder}"]))
        (rows,) = json.loads((folder / "results.json").read_text())["results"][0]["saes"].values()
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        seeds.append({"seed": seed, "rows": rows, "dead_in_training": next(iter(last["saes"].values()))["dead"]})
    peers = best_peers(known.peers)
    write_json(Path(known.output) / "quality.json", {"config": known.config, "seeds": seeds, "best_peer": peers})
    return report(seeds, peers)


def report(seeds: list[dict], peers: dict[int, dict[str, float]]) -> int:
    """Print the table; returns 1 where any seed falls short of the best peer at any prefix."""
    out, short = sys.stdout.write, 0
    out(f"\n{len(seeds)} seeds; FVU and recaptured loss: mean (worst) against the best peer\n")
    out(f"{'width':>6} {'L0':>7} {'FVU':>17} {'peer':>7} {'recaptured':>17} {'peer':>7} {'dead':>8}\n")
    for index, row in enumerate(seeds[0]["rows"]):
        rows = [entry["rows"][index] for entry in seeds]
        fvus, captured = [r["fvu"] for r in rows], [r["recaptured_zero"] for r in rows]
        peer = peers.get(row["width"], {"fvu": float("nan"), "recaptured": float("nan")})
        short |= max(fvus) > peer["fvu"] or min(captured) < peer["recaptured"]
        out(
            f"{row['width']:>6} {mean(r['l0'] for r in rows):>7.3f} {mean(fvus):>8.4f} ({max(fvus):.4f}) "
            f"{peer['fvu']:>7.4f} {mean(captured):>8.4f} ({min(captured):.4f}) {peer['recaptured']:>7.4f} "
            f"{max(r['dead'] for r in rows):>8.3%}\n"
        )
    out(f"dead at the end of training: {max(entry['dead_in_training'] for entry in seeds):.3%} (worst seed)\n")
    out("falls short somewhere\n" if short else "at least as good as the best peer at every prefix, every seed\n")
    return int(short)


if __name__ == "__main__":
    sys.exit(main())
