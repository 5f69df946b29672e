"""Tokens per second with the language model running ahead in a thread (`overlap: true`) and without.

    OMP_NUM_THREADS=1 python benchmarks/overlap.py      # leaves a core free for the thread
    python benchmarks/overlap.py --config run.yaml

The two take turns in one process. Rows are read in gulps and ahead of training, so that over a short time more may be
trained on than was read, or the reverse: the smaller of both counts. Results go to `runs/overlap.json`; the weights
after the last step are compared too.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from hf_matryoshka_sae.demo import DEMO
from hf_matryoshka_sae.training import RunConfig, load_run_config
from hf_matryoshka_sae.training.run.checkpoints import write_json
from hf_matryoshka_sae.training.run.trainer import Trainer


class Timed:
    """A trainer, and what its steps took."""

    def __init__(self, config: RunConfig):
        self.trainer, self.made, self.rates, self.longest_wait = Trainer(config), 0, [], 0.0
        self.read = 0
        self.advance, self.trainer.feed.advance = self.trainer.feed.advance, self._advance
        self.trainer.harvest.model.register_forward_pre_hook(self._count, with_kwargs=True)
        self.steps(3)
        self.rates.clear()

    def _count(self, module, args, kwargs) -> None:
        self.read += kwargs["input_ids"].numel()

    def _advance(self) -> None:
        began = time.perf_counter()
        self.advance()
        self.longest_wait = max(self.longest_wait, time.perf_counter() - began)

    def steps(self, count: int) -> None:
        """Make `count` steps and note the tokens per second."""
        self.read, began = 0, time.perf_counter()
        for _ in range(count):
            self.trainer._step(self.made)
            self.made += 1
        tokens = min(self.read, count * self.trainer.config.batch_size)
        self.rates.append(tokens / (time.perf_counter() - began))
        self.trainer.harvest.close()  # nothing is read while the other is timed


def main() -> None:
    """Measure in turns, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a run's YAML (default: the demo's run)")
    parser.add_argument("--steps", type=int, default=96, help="steps in a turn")
    parser.add_argument("--turns", type=int, default=3)
    known, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        both = {}
        for overlap in (False, True):
            own = {"output_dir": f"{folder}/{overlap}", "overlap": overlap}
            config = (
                load_run_config(known.config, [*flags, *(f"--{name}={value}" for name, value in own.items())])
                if known.config
                else RunConfig.from_dict(DEMO | own)
            )
            both[overlap] = Timed(config)
        for _ in range(known.turns):
            for timed in both.values():
                timed.steps(known.steps)
    rates = {overlap: statistics.median(timed.rates) for overlap, timed in both.items()}
    weights = [timed.trainer.learners[0].sae.W_enc for timed in both.values()]
    equal = torch.equal(*weights)
    sys.stdout.write(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads\n")
    for overlap, timed in both.items():
        sys.stdout.write(
            f"overlap {overlap!s:6}{rates[overlap]:>9.0f} tokens/s, longest wait {timed.longest_wait:.2f} s\n"
        )
    sys.stdout.write(f"ratio {rates[True] / rates[False]:.2f}, weights equal bit for bit: {equal}\n")
    Path("runs").mkdir(exist_ok=True)
    write_json(
        Path("runs/overlap.json"),
        {
            "threads": torch.get_num_threads(),
            "tokens_per_second": {str(overlap): timed.rates for overlap, timed in both.items()},
            "longest_wait_s": {str(overlap): timed.longest_wait for overlap, timed in both.items()},
            "weights_equal": equal,
        },
    )


if __name__ == "__main__":
    main()
