"""Mutated checkpoints of every format: each loads and works, or is refused in our words.

A mutated checkpoint is survived when it either loads and encodes a small input, or raises `ValueError` or `OSError`
with a message that names one of its files; when no code of it ran and nothing was written beside it; when its peak
memory stayed within three times its files plus 200 MB; and when it took no more than 5 seconds of the process's own
CPU time (machines are noisy: not of the clock). What must be refused (see `checkpoint_mutations.py`) may not load.

    PYTHONPATH=. python -m benchmarks.fault_kinds.checkpoints --seed 0 --count 2000
    PYTHONPATH=. python -m benchmarks.fault_kinds.checkpoints --seed 0 --case 17
"""

import argparse
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path

from tqdm.auto import tqdm

from .checkpoint_mutations import Fault, break_folder
from .checkpoint_seeds import BOMBS, OURS, write_seeds
from .outcome import Outcome


_SECONDS = 5.0
_BYTES = 200 * 2**20
_ADDRESSES = 2 * 2**30  # of a worker beyond what it begins with: a bomb that is not refused ends as MemoryError
_PATIENCE = 120  # seconds by the clock after which a worker is given up
_SHARE_OF_BOMBS = 0.01


def run(seed: int, count: int = 2000, workers: int = 2, peers: Path | None = None) -> Outcome:
    """Break and load `count` checkpoints in reused worker processes.

    Args:
        seed (`int`): The same faults for the same seed.
        count (`int`, *optional*, defaults to 2000): How many.
        workers (`int`, *optional*, defaults to 2): Processes.
        peers (`Path`, *optional*): A folder of other libraries' checkpoints, which are broken too.
    """
    failures = []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        places = Path(folder)
        names = _sound(places / "seeds", peers)
        tasks = ((number, seed, names, places) for number in range(count))
        for number, failure in tqdm(_answers(tasks, workers), total=count, desc="Mutated checkpoints"):
            if failure is not None:
                again = f"--seed {seed} --case {number}" + (f" --peers {peers}" if peers else "")
                failures.append(f"{failure}  [python -m benchmarks.fault_kinds.checkpoints {again}]")
    return Outcome("mutated checkpoints", count, count - len(failures), failures)


def _sound(folder: Path, peers: Path | None) -> list[str]:
    """Write the checkpoints that are to be broken; their names."""
    names = write_seeds(folder)
    for path in sorted(peers.rglob("expected.safetensors")) if peers else ():
        names.append("peer-" + "-".join(path.parent.relative_to(peers).parts))
        # Names of folders matter to some formats.
        target = folder / names[-1] / path.parent.name
        shutil.copytree(path.parent, target, ignore=shutil.ignore_patterns("expected*"))
    return names


def _answers(tasks: Iterable[tuple], workers: int) -> Iterator[tuple[int, str | None]]:
    """Number and failure of each task, by processes that are begun anew when they die or hang."""
    tasks, busy, idle = iter(tasks), {}, [_begin() for _ in range(workers)]
    try:
        while True:
            while idle and (task := next(tasks, None)) is not None:
                process, pipe = idle.pop()
                pipe.send(task)
                busy[pipe] = (process, task[0], time.monotonic())
            if not busy:
                return
            for pipe in wait(list(busy), timeout=1):
                process, number, _ = busy.pop(pipe)
                try:
                    yield number, pipe.recv()
                    idle.append((process, pipe))
                except EOFError:
                    process.join()
                    yield number, f"the process died ({process.exitcode})"
                    idle.append(_begin())
            for pipe, (process, number, since) in list(busy.items()):
                if time.monotonic() - since > _PATIENCE:
                    del busy[pipe]
                    process.kill()
                    yield number, f"no answer in {_PATIENCE} s"
                    idle.append(_begin())
    finally:
        for process, _ in [*idle, *((process, None) for process, *_ in busy.values())]:
            process.kill()


def _begin() -> tuple[multiprocessing.Process, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _work(pipe: Connection) -> None:
    """Answer tasks until the other end is gone. One thread, offline, with bounded addresses."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    import logging
    import resource
    import warnings

    import torch

    from hf_matryoshka_sae import convert  # noqa: F401  (before memory is measured)
    from hf_matryoshka_sae.progressive.statistics import LatentStatistics  # noqa: F401

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + _ADDRESSES,) * 2)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        pipe.send(_tried(*task))


def _tried(number: int, seed: int, names: list[str], places: Path) -> str | None:
    """Break and load one checkpoint; what is wrong with how that ended."""
    rng = random.Random(f"{seed}-{number}")
    bombs = [name for name in names if name in BOMBS]
    others = [name for name in names if name not in BOMBS]
    name = rng.choice(bombs if rng.random() < _SHARE_OF_BOMBS else others)
    with tempfile.TemporaryDirectory(prefix=f"case-{number}-", dir=places) as base:
        folder, outside, marker = Path(base) / name, Path(base) / "outside", Path(base) / "marker"
        outside.mkdir()
        shutil.copytree(places / "seeds" / name, folder)
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        fault = Fault("compressed zeros", True) if name in BOMBS else break_folder(folder, marker, outside, rng)
        wrong = _wrong(name, folder, marker, fault, rng)
    return None if wrong is None else f"{name}: {fault.what}: {wrong}"


def _wrong(name: str, folder: Path, marker: Path, fault: Fault, rng: random.Random) -> str | None:
    before = _listing(folder.parent)
    size = sum(path.stat().st_size for path in folder.parent.rglob("*") if path.is_file())
    Path("/proc/self/clear_refs").write_text("5")
    memory, began = _memory("VmRSS"), time.process_time()
    width = rng.choice([None, None, 4])
    answer = _loaded(name, folder, width, rng)
    seconds, peak = time.process_time() - began, _memory("VmHWM") - memory
    if marker.exists():
        return "code of the file ran"
    if _listing(folder.parent) != before:
        return f"wrote or took away {sorted(_listing(folder.parent) ^ before)[:3]}"
    if peak > 3 * size + _BYTES:
        return f"took {peak / 2**20:.0f} MB for files of {size / 2**20:.1f} MB ({_said(answer)})"
    if seconds > _SECONDS:
        return f"took {seconds:.1f} s ({_said(answer)})"
    if answer is None:
        allowed = not fault.refused or (fault.rows and width is not None)
        return None if allowed else "loaded, and must be refused"
    if not isinstance(answer, ValueError | OSError):
        return f"raised {_said(answer)}"
    files = {folder.name} | {path.name for path in folder.rglob("*")}
    if not any(file in str(answer) for file in files):
        return f"the message names no file: {_said(answer)}"
    if "weights_only" in str(answer):
        return f"the message repeats torch's advice: {_said(answer)}"
    return None


def _listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def _said(answer: BaseException | None) -> str:
    if answer is None:
        return "loaded"
    frames = traceback.extract_tb(answer.__traceback__)
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(answer).__name__}{where}: {' '.join(str(answer).split())[:160]}"


def _loaded(name: str, folder: Path, width: int | None, rng: random.Random) -> BaseException | None:
    """Load it in one of the ways there are for it, and use it; the exception where that raises one.

    `AutoModel` finds out by itself of which class a config is. What it stumbles over before that is not ours to mend;
    then our class is asked.
    """
    import torch
    from transformers import AutoModel

    from hf_matryoshka_sae import MODELS, convert
    from hf_matryoshka_sae.models import SAECollection
    from hf_matryoshka_sae.progressive.statistics import LatentStatistics

    classes = {config.model_type.removesuffix("_sae"): model for config, model in MODELS.items()}
    own = classes.get(name, classes["matryoshka"])
    ways = [lambda: convert.load(folder, width=width)]
    if name in OURS:
        ways += [lambda: own.from_pretrained(folder, width=width), lambda: AutoModel.from_pretrained(folder)]
    if name == "collection":
        ways = [lambda: SAECollection.from_pretrained(folder)] * 2 + [lambda: AutoModel.from_pretrained(folder)]
    way = rng.choice(ways)
    if way is ways[-1] and name in OURS and not _is_told_apart(folder):
        way = ways[1]
    try:
        if name == "statistics":
            statistics = LatentStatistics.load(folder)
            statistics.select(torch.arange(min(4, len(statistics))))
            return None
        sae = way()
        with torch.no_grad():
            x = torch.randn(4, sae.config.d_in)
            sae.encode(x.to(sae.W_enc.dtype))
            sae(x)
    except (MemoryError, Exception) as error:  # whatever it raises is what this is about
        return error
    # A threshold of infinity is that of a latent that never fires; a negative one counts as 0 except in JumpReLU.
    for key, value in sae.state_dict().items():
        lowest = 0 if sae.config.activation_name == "jumprelu" else -torch.inf
        if not ((value >= lowest).all() if key == "threshold" else value.isfinite().all()):
            return AssertionError(f"loaded with a {key} not finite or below 0")
    return None


def _is_told_apart(folder: Path) -> bool:
    """Whether transformers finds out from a config which class it is of; before that none of ours is asked."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(folder)
    except Exception as error:
        return any("hf_matryoshka_sae" in frame.filename for frame in traceback.extract_tb(error.__traceback__))
    return True


def main(arguments: list[str] | None = None) -> int:
    """Print what was survived; returns 1 where something was not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--peers", type=Path, help="folder of other libraries' checkpoints to break as well")
    parser.add_argument("--case", type=int, help="only this one, in this process")
    parsed = parser.parse_args(arguments)
    if parsed.case is not None:
        with tempfile.TemporaryDirectory() as folder:
            names = _sound(Path(folder) / "seeds", parsed.peers)
            wrong = _tried(parsed.case, parsed.seed, names, Path(folder))
        sys.stdout.write(f"{wrong or 'survived'}\n")
        return int(wrong is not None)
    outcome = run(parsed.seed, parsed.count, parsed.workers, parsed.peers)
    sys.stdout.write("\n".join(outcome.failures) + f"\n{outcome.survived} of {outcome.tried} survived\n")
    for failed, number in Counter(line.split(":")[0] for line in outcome.failures).most_common():
        sys.stdout.write(f"{number:5} {failed}\n")
    return int(bool(outcome.failures))


if __name__ == "__main__":
    sys.exit(main())
