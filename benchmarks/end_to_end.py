"""Tokens per second from text to a trained SAE, against sae-lens' runner and sparsify's trainer.

    python benchmarks/end_to_end.py                                            # the embedded model and text
    python benchmarks/end_to_end.py --model ../shared/lm --text ../shared/text/train.parquet --tokens 2_000_000

Every contender reads the same documents with the same language model at the same hookpoint, and trains as many latents
with the same k on as many tokens, in batches and contexts of the same size; special tokens are left out. Everything
else, such as learning rates and the size of the shuffle buffer, is each library's default.

The clock runs from the text file on disk to the last optimizer step and what the library saves then: reading,
tokenising, the language model's forward passes, shuffling, training. Imports, loading the language model, and
judging the SAE are left out. Ours goes through `training.Trainer`, with `_finish` (calibration, evaluation, report)
after the clock has stopped; it fills its pool of text and its shuffle buffer first, which a longer run spreads over
more tokens. sae-lens tokenises document by document and sends whole passes through a plain transformers model;
sparsify tokenises the text at once, with `chunk_and_tokenize`, shuffles its windows and does not mix hidden states.
On a GPU sparsify trains in bfloat16, the others in float32.

Each run has a process of its own. With several repeats they take turns and the fastest counts, so that other work on
the machine weighs little. Where cores are shared, leave one free with `--threads`: threads that wait for each other
on a busy core are several times slower than one. FVU is that of a few held-out documents, measured for all in the same
way; learning rates are not tuned for runs this short, so it tells that something was learnt, not which library learns
best.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import AutoModel

from hf_matryoshka_sae.activations import (
    DatasetConfig,
    harvest_rows,
    heldout_batches,
    load_documents,
    load_language_model,
)
from hf_matryoshka_sae.demo import DEMO
from hf_matryoshka_sae.models.configuration_sae import default_prefix_widths
from hf_matryoshka_sae.training import RunConfig
from hf_matryoshka_sae.training.data import text as setup
from hf_matryoshka_sae.training.run.checkpoints import write_json
from hf_matryoshka_sae.training.run.trainer import Trainer


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HELDOUT_TOKENS = 20_000


# What each process runs


def ours(kind: str, args: argparse.Namespace, work: Path, out: Path) -> dict[str, float]:
    """This package's trainer."""
    loaded = load_language_model(str(work / "lm"), device=DEVICE)
    run = {
        "model": str(work / "lm"),
        "dataset": {"path": str(work / "train.jsonl")},
        "eval_dataset": {"path": str(work / "heldout.jsonl")},
        "hookpoints": [args.hookpoint],
        "context_length": args.context_length,
        "tokens": args.tokens,
        "batch_size": args.batch_size,
        "eval_tokens": 4096,  # for the report, which is not measured
        "saes": [{"type": kind, "name": "sae", "num_latents": args.num_latents, "k": args.k}],
        "output_dir": str(out),
    }
    config = RunConfig.from_dict(DEMO | run)
    ended = 0.0
    start = now()
    with patch.object(setup, "load_language_model", return_value=loaded):
        trainer = Trainer(config)
    finish = trainer._finish

    def finish_untimed() -> list:
        nonlocal ended
        ended = now()
        return finish()

    with patch.object(trainer, "_finish", finish_untimed):
        trainer.run()
    sae = AutoModel.from_pretrained(out / "sae" / args.hookpoint).to(DEVICE)
    return judged(ended - start, lambda x: sae(x).reconstruction, args, work)


def sae_lens(kind: str, args: argparse.Namespace, work: Path, out: Path) -> dict[str, float]:
    """sae-lens' `LanguageModelSAETrainingRunner`, on the route for plain transformers models."""
    import sae_lens as library
    from datasets import load_dataset
    from sae_lens.load_model import load_model

    name = "AutoModelForCausalLM"
    model = load_model(name, str(work / "lm"), DEVICE, hook_names=[args.hookpoint])
    own = {"matryoshka_widths": default_prefix_widths(args.num_latents)} if kind.startswith("Matryoshka") else {}
    sae_config = getattr(library, f"{kind}TrainingSAEConfig")(
        d_in=model.model.config.get_text_config().hidden_size,
        d_sae=args.num_latents,
        k=args.k,
        device=DEVICE,
        **own,
    )
    config = library.LanguageModelSAERunnerConfig(
        sae=sae_config,
        model_name=str(work / "lm"),
        model_class_name=name,
        hook_name=args.hookpoint,
        context_size=args.context_length,
        training_tokens=args.tokens,
        train_batch_size_tokens=args.batch_size,
        # Counted in contexts. The default of 20 stays unless it cannot hold a batch.
        n_batches_in_buffer=max(20, -(-args.batch_size // args.context_length)),
        exclude_special_tokens=True,
        device=DEVICE,
        logger=library.LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=str(out),
        verbose=False,
    )
    start = now()
    text = load_dataset("json", data_files=str(work / "train.jsonl"), split="train", streaming=True)
    runner = library.LanguageModelSAETrainingRunner(config, override_dataset=text, override_model=model)
    sae = runner.run()
    seconds = now() - start
    return judged(seconds, sae.eval(), args, work)


def sparsify(args: argparse.Namespace, work: Path, out: Path) -> dict[str, float]:
    """sparsify's `Trainer` on `chunk_and_tokenize`'s windows, shuffled, as its command line does it."""
    import sparsify as library
    from datasets import load_dataset
    from sparsify.data import chunk_and_tokenize
    from transformers import AutoTokenizer

    model = AutoModel.from_pretrained(work / "lm").to(DEVICE)
    tokenizer = AutoTokenizer.from_pretrained(work / "lm")
    hookpoint = args.hookpoint.removeprefix(f"{model.base_model_prefix}.")  # as seen from inside the head
    config = library.TrainConfig(
        library.SparseCoderConfig(num_latents=args.num_latents, k=args.k),
        batch_size=args.batch_size // args.context_length,
        hookpoints=[hookpoint],
        exclude_tokens=list(tokenizer.all_special_ids),
        log_to_wandb=False,
        save_dir=str(out),
        run_name="run",
    )
    start = now()
    text = load_dataset("json", data_files=str(work / "train.jsonl"), split="train")
    windows = chunk_and_tokenize(
        text, tokenizer, max_seq_len=args.context_length, num_proc=max(1, args.threads // 2)
    ).shuffle(42)
    needed = args.tokens // args.context_length
    if len(windows) < needed:
        raise ValueError(f"The text has {len(windows)} windows, {needed} are needed.")
    library.Trainer(config, windows.with_format("torch").select(range(needed)), model).fit()
    seconds = now() - start
    sae = library.SparseCoder.load_from_disk(out / "run" / hookpoint, device=DEVICE)
    return judged(seconds, lambda x: sae(x).sae_out, args, work)


OURS = "hf_matryoshka_sae"
CONTENDERS: dict[str, Callable[[argparse.Namespace, Path, Path], dict[str, float]]] = {
    f"{OURS} Matryoshka BatchTopK": partial(ours, "matryoshka"),
    "sae-lens Matryoshka BatchTopK": partial(sae_lens, "MatryoshkaBatchTopK"),
    f"{OURS} TopK": partial(ours, "topk"),
    "sae-lens TopK": partial(sae_lens, "TopK"),
    "sparsify TopK": sparsify,
}


def now() -> float:
    """Seconds, when the device has done what it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def judged(
    seconds: float, reconstruct: Callable[[torch.Tensor], torch.Tensor], args: argparse.Namespace, work: Path
) -> dict[str, float]:
    """The measurement, with the fraction of variance unexplained on held-out text."""
    model, tokenizer = load_language_model(str(work / "lm"), device=DEVICE)
    text = DatasetConfig(str(work / "heldout.jsonl"))
    batches = heldout_batches(text, tokenizer, args.context_length, HELDOUT_TOKENS)
    x = torch.cat([harvest_rows(model, batch, [args.hookpoint])[args.hookpoint].float() for batch in batches])
    error = sum((rows - reconstruct(rows)).square().sum().item() for rows in x.split(2048))
    return {
        "seconds": seconds,
        "tokens_per_second": args.tokens / seconds,
        "fvu": error / (x - x.mean(0)).square().sum().item(),
    }


def run_contender(args: argparse.Namespace, work: Path, out: Path) -> None:
    """Run one contender in this process and leave what it gave, or why it could not, in `out/result.json`."""
    try:
        result = CONTENDERS[args.contender](args, work, out)
    except Exception as error:  # whatever a library raises is a result too
        first, *_ = str(error).strip().splitlines() or [""]
        result = {"error": f"{type(error).__name__}: {first}"}
    write_json(out / "result.json", result)


# The process that starts them


def prepare(args: argparse.Namespace, work: Path) -> None:
    """Write the language model, held-out documents, and just enough others for the run into `work`.

    Just enough, because some libraries tokenise all the text they are given. A text that is too short is repeated.
    """
    model, tokenizer = load_language_model(args.model)
    model.save_pretrained(work / "lm")
    tokenizer.save_pretrained(work / "lm")
    documents = load_documents(DatasetConfig(args.text), shuffle=True)
    write_documents(work / "heldout.jsonl", take(documents, tokenizer, 1.2 * HELDOUT_TOKENS))
    train = take(documents, tokenizer, 1.1 * args.tokens)  # some are lost at the ends of windows
    if not train:
        raise SystemExit(f"{args.text} holds too little text.")
    length = sum(len(ids) for ids in tokenizer(train)["input_ids"])
    write_documents(work / "train.jsonl", train * max(1, -(-args.tokens * 11 // (10 * length))))


def take(documents, tokenizer, tokens: float) -> list[str]:
    """Documents of at least so many tokens, or what is left."""
    taken: list[str] = []
    while tokens > 0 and (found := documents.take(64)):
        taken += found
        tokens -= sum(len(ids) for ids in tokenizer(found)["input_ids"])
    return taken


def write_documents(path: Path, documents: list[str]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def start_contender(name: str, args: argparse.Namespace, flags: list[str], work: Path) -> dict[str, float | str]:
    """Run one contender in a process of its own, with empty caches and no network."""
    with tempfile.TemporaryDirectory() as out:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), str(args.threads))
        offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "HF_DATASETS_CACHE": f"{out}/cache"}
        triton = {} if DEVICE == "cuda" else {"SPARSIFY_DISABLE_TRITON": "1"}
        own = ["--contender", name, "--work", str(work), "--out", out]
        done = subprocess.run(
            [sys.executable, __file__, *flags, *own],
            env=os.environ | threads | offline | triton,
            stdout=subprocess.DEVNULL,
            stderr=None if args.verbose else subprocess.DEVNULL,
        )
        path = Path(out) / "result.json"
        return json.loads(path.read_text()) if path.exists() else {"error": f"exit status {done.returncode}"}


def best(runs: list[dict]) -> dict:
    """The fastest of the runs, or why there is none."""
    timed = [run for run in runs if "error" not in run]
    return max(timed, key=lambda run: run["tokens_per_second"]) if timed else runs[-1]


def ratio(name: str, results: dict[str, dict]) -> float | None:
    """Speed relative to ours with the same kind of SAE."""
    base = results.get(f"{OURS} {name.split(' ', 1)[1]}", {}).get("tokens_per_second")
    return results[name]["tokens_per_second"] / base if base and "error" not in results[name] else None


def table(results: dict[str, dict]) -> str:
    """The results as text."""
    lines = [f"{'':<39} {'tokens/s':>9} {'ratio to ours':>14} {'FVU':>7}"]
    for name, result in results.items():
        if "error" in result:
            lines.append(f"{name:<39} {result['error']}")
        else:
            relative = f"{result['ratio']:.2f}" if result["ratio"] else ""
            lines.append(f"{name:<39} {result['tokens_per_second']:>9.0f} {relative:>14} {result['fvu']:>7.4f}")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, dict], path: Path, title: str) -> None:
    """Bars of tokens per second; a contender that could not run has none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(results)[::-1]
    speeds = [results[name].get("tokens_per_second", 0.0) for name in names]
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(names) + 1.4), layout="constrained")
    bars = axes.barh(names, speeds, color=["C0" if name.startswith(OURS) else "C7" for name in names])
    axes.bar_label(bars, [f"{speed:,.0f}" if speed else "could not run" for speed in speeds], padding=4)
    axes.set_xlabel("tokens per second, from text to trained SAE")
    axes.set_title(title, fontsize=9)
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def versions() -> dict[str, str]:
    """Of the libraries that are installed."""
    found = {}
    for name in ("torch", "transformers", "datasets", OURS, "sae-lens", "eai-sparsify"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def parse() -> argparse.Namespace:
    """The command line; `tokens` is rounded down to whole batches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="folder of a causal language model")
    parser.add_argument("--text", default="embedded", help=".jsonl, .parquet or .txt file, with a column `text`")
    parser.add_argument("--hookpoint", default=DEMO["hookpoints"][0])
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--num_latents", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=2048)
    parser.add_argument("--context_length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", default="runs", help="folder of end_to_end.json and end_to_end.png")
    parser.add_argument("--verbose", action="store_true", help="show what the libraries write to standard error")
    parser.add_argument("--contender", choices=CONTENDERS, help="run this one alone and print what it gave")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.batch_size % args.context_length:
        parser.error("--batch_size must be a multiple of --context_length: sparsify counts batches in contexts")
    args.tokens -= args.tokens % args.batch_size
    return args


def main() -> int:
    """Measure, print, write; the exit status is 1 where one of ours could not run."""
    args = parse()
    if args.out:
        run_contender(args, Path(args.work), Path(args.out))
        return 0
    runs: dict[str, list[dict]] = {name: [] for name in CONTENDERS if args.contender in (None, name)}
    with tempfile.TemporaryDirectory() as work:
        prepare(args, Path(work))
        for _ in range(args.repeats):
            for name, done in runs.items():
                done.append(start_contender(name, args, sys.argv[1:], Path(work)))
                sys.stderr.write(f"{name}: {json.dumps(done[-1])}\n")
    results = {name: dict(best(done)) for name, done in runs.items()}
    for name in results:
        results[name]["ratio"] = ratio(name, results)
    title = (
        f"{DEVICE}, {args.threads} threads; {args.tokens:,} tokens, F = {args.num_latents}, k = {args.k}, "
        f"batch {args.batch_size}, context {args.context_length}"
    )
    sys.stdout.write(f"\n{title}\n{', '.join(f'{name} {version}' for name, version in versions().items())}\n\n")
    sys.stdout.write(table(results))
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        name: value for name, value in vars(args).items() if name not in ("contender", "work", "out", "output")
    }
    report = {"device": DEVICE, "settings": settings, "versions": versions(), "results": results, "runs": runs}
    write_json(folder / "end_to_end.json", report)
    plot(results, folder / "end_to_end.png", title)
    return int(any("error" in result for name, result in results.items() if name.startswith(OURS)))


if __name__ == "__main__":
    sys.exit(main())
