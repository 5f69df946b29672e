"""Every request of pushes and pulls failed, one at a time: an error of ours or success, never half or wrong weights.

    python -c "from benchmarks.fault_kinds.requests import run; print(run(0))"

A loopback Hub (that of the tests) notes the requests of each job. Then each job is done once for each of its requests,
and that request fails in a way drawn at random; afterwards the same call without faults has to complete.
"""

import copy
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from transformers import AutoModel
from transformers.utils import hub as transformers_hub

import hf_matryoshka_sae
from hf_matryoshka_sae import MatryoshkaSAE, MatryoshkaSAEConfig, SAEModel
from hf_matryoshka_sae import hub as sae_hub
from hf_matryoshka_sae.progressive.statistics import STATISTICS_FILE
from hf_matryoshka_sae.training import RunConfig


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.hub_server import HubServer

from .outcome import Outcome


PACKAGE = str(Path(hf_matryoshka_sae.__file__).parent)
REPO, OTHERS = "tester/run", "tester/others"
ONE_FILE, PIECES = "matryoshka/layers.0", "pieces/layers.0"  # the SAEs, by their places in run and repository
LATENTS, SMALL, LARGE = 512, 64, 256
WAYS = [
    *[(how, for_good) for how in ("429", "500", "503", "drop", "truncate", "html") for for_good in (False, True)],
    *[(how, False) for how in ("cut", "corrupt", "lost answer")],
]
"""How a request fails, and whether each repetition of it does too."""

_Request = tuple[str, str, int]  # method, path, and the how manieth of these in its job


@dataclass
class Job:
    """Something a user does.

    Args:
        act (`Callable`): Does it.
        right (`Callable`): Whether what `act` returned is right.
        warm (`Callable`, *optional*): Done before, without faults.
        pushes (`str`, *optional*): The repository that it writes to.
    """

    act: Callable[[], Any]
    right: Callable[[Any], bool]
    warm: Callable[[], Any] | None = None
    pushes: str | None = None


class Bench:
    """A loopback Hub, a run's folder, and the jobs that go between them."""

    def __init__(self, hub: HubServer, home: Path):
        self.hub, self.home, self.caches = hub, home, 0
        self.saes = _save_run(home / "run", "matryoshka", "pieces")
        _save_run(home / "first", "first")
        self.jobs: dict[str, Job] = {}
        self.new_cache()
        sae_hub.push(home / "first", OTHERS, measure=False, show=False)
        self.start = copy.deepcopy((hub.repos, hub.objects))
        self.whole: dict[str, dict[str, bytes]] = {}
        for repo in (REPO, OTHERS):
            self._push(repo)
            self.whole[repo] = hub.files(repo)
        self.pushed = copy.deepcopy((hub.repos, hub.objects))
        self._add_jobs()

    def _push(self, repo: str) -> Any:
        return sae_hub.push(self.home / "run", repo, measure=False, show=False)

    def _add_jobs(self) -> None:
        for name, repo in (("push", REPO), ("push beside others", OTHERS)):
            self.jobs[name] = Job(lambda repo=repo: self._push(repo), lambda commit: True, pushes=repo)
        for name, place in (("one file", ONE_FILE), ("pieces", PIECES)):

            def load(width: int | None, place: str = place) -> Callable[[], SAEModel]:
                given = {} if width is None else {"width": width}
                return lambda: MatryoshkaSAE.from_pretrained(REPO, subfolder=place, **given)

            def right(width: int | None, place: str = place) -> Callable[[SAEModel], bool]:
                return lambda sae: self._same(sae, place, width)

            self.jobs[f"whole, {name}"] = Job(load(None), right(None))
            self.jobs[f"width {SMALL}, {name}"] = Job(load(SMALL), right(SMALL))
            self.jobs[f"width {LARGE} after {SMALL}, {name}"] = Job(load(LARGE), right(LARGE), load(SMALL))
            self.jobs[f"whole after {SMALL}, {name}"] = Job(load(None), right(None), load(SMALL))
        self.jobs["AutoModel"] = Job(
            lambda: AutoModel.from_pretrained(REPO, subfolder=ONE_FILE), lambda sae: self._same(sae, ONE_FILE, None)
        )
        self.jobs["load by name"] = Job(
            lambda: sae_hub.load(REPO, ONE_FILE), lambda sae: self._same(sae, ONE_FILE, None)
        )
        self.jobs["list"] = Job(lambda: sae_hub.list_saes(REPO), lambda saes: sorted(saes) == sorted(self.saes))
        self.jobs["load_many"] = Job(
            lambda: sae_hub.load_many(REPO, width=SMALL),
            lambda saes: len(saes) == 2 and all(self._same(sae, place, SMALL) for place, sae in saes.items()),
        )

    def _same(self, sae: SAEModel, place: str, width: int | None) -> bool:
        expected = self.saes[place].truncate(width or LATENTS).state_dict()
        found = sae.state_dict()
        return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)

    def new_cache(self) -> None:
        """An empty cache."""
        self.caches += 1
        constants.HF_HUB_CACHE = str(self.home / f"cache-{self.caches}")

    def prepare(self, name: str) -> Job:
        """The Hub and an empty cache as they are before a job."""
        job = self.jobs[name]
        shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
        self.new_cache()
        self.hub.heal()
        self.hub.repos, self.hub.objects = copy.deepcopy(self.start if job.pushes else self.pushed)
        if job.warm is not None:
            job.warm()
        return job

    def requests(self, name: str) -> list[_Request]:
        """The requests of a job, in an order that does not depend on its threads."""
        job, noted = self.prepare(name), []
        self.hub.watch(lambda number, method, path: noted.append((method, path)))
        job.act()
        self.hub.watch(None)
        return sorted((*request, 1 + noted[:index].count(request)) for index, request in enumerate(noted))

    def try_one(self, name: str, method: str, path: str, nth: int, how: str, for_good: bool) -> str | None:
        """Do a job while one of its requests fails; what was not as promised."""
        job = self.prepare(name)
        before = {} if job.pushes is None or job.pushes not in self.hub.repos else self.hub.files(job.pushes)
        self.hub.fail_request(method, path, nth, how, for_good)
        problem = None
        try:
            if not job.right(job.act()):
                problem = "the result is wrong"
        except Exception as error:
            problem = _not_ours(error)
        self.hub.heal()
        if job.pushes in self.hub.repos and self.hub.files(job.pushes) not in ({}, before, self.whole[job.pushes]):
            problem = "half a commit, or another one"
        try:
            if not job.right(job.act()):
                problem = problem or "the same call again is wrong"
        except Exception as error:
            problem = problem or f"the same call again fails: {type(error).__name__}: {error}"
        if job.pushes and self.hub.files(job.pushes) != self.whole[job.pushes]:
            problem = problem or "the same push again does not complete it"
        return problem


def run(seed: int, count: int | None = None) -> Outcome:
    """Fail requests of every job, and see what comes of it.

    Args:
        seed (`int`): Of the order, and of the ways to fail.
        count (`int`, *optional*): Requests to fail; by default each of every job once.
    """
    draw, outcome = random.Random(seed), Outcome("requests")
    with bench() as jobs:
        cases = [(name, request) for name in jobs.jobs for request in jobs.requests(name)]
        draw.shuffle(cases)
        for index in range(len(cases) if count is None else count):
            name, request = cases[index % len(cases)]
            how, for_good = draw.choice(WAYS)
            problem = jobs.try_one(name, *request, how, for_good)
            outcome.tried += 1
            if problem is None:
                outcome.survived += 1
            else:
                outcome.failures.append(f"try_one{(name, *request, how, for_good)}: {problem}")
    return outcome


@contextmanager
def bench() -> Iterator[Bench]:
    """Jobs on a Hub of their own; nobody waits before trying again."""
    changed = ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "HF_HUB_CACHE")
    before = {name: getattr(constants, name) for name in changed}
    with (
        HubServer() as hub,
        tempfile.TemporaryDirectory() as home,
        mock.patch.object(time, "sleep"),
        mock.patch.object(transformers_hub, "_hf_api", None),
    ):
        constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = hub.url, False, True
        constants.HUGGINGFACE_CO_URL_TEMPLATE = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        try:
            yield Bench(hub, Path(home))
        finally:
            for name, value in before.items():
                setattr(constants, name, value)


def _save_run(folder: Path, *names: str) -> dict[str, SAEModel]:
    """A folder as a run leaves it, with statistics; the SAEs by their places in it."""
    saes = {}
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        config = MatryoshkaSAEConfig(d_in=32, num_latents=LATENTS, k=8, hookpoint="layers.0", base_model="some/model")
        sae = MatryoshkaSAE(config).eval()
        with torch.no_grad():
            sae.b_enc.normal_()
        sae.save_pretrained(folder / name / "layers.0", max_shard_size=40_000 if name == "pieces" else "5GB")
        save_file({"frequency": torch.rand(LATENTS)}, folder / name / "layers.0" / STATISTICS_FILE)
        saes[f"{name}/layers.0"] = sae
    fields = {"model": "some/model", "dataset": "some/text", "hookpoints": ["layers.0"], "tokens": 9000}
    entries = [{"type": "matryoshka", "name": name, "num_latents": LATENTS, "k": 8} for name in names]
    run_config = RunConfig.from_dict(fields | {"saes": entries, "output_dir": "runs/one"})
    (folder / "run.yaml").write_text(json.dumps(run_config.to_dict()))
    return saes


def _not_ours(error: Exception) -> str | None:
    """What is wrong with an error that a user gets: it should name the repository and say how to go on.

    Those that transformers' `AutoModel` raises before the package is asked for anything are its own.
    """
    text, files = str(error), [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    if not any(file.startswith(PACKAGE) for file in files):
        return None
    if not isinstance(error, OSError | ValueError) or isinstance(error, json.JSONDecodeError):
        return f"{type(error).__name__}: {text}"
    named = REPO in text or OTHERS in text
    return None if named and "again" in text else f"not a message of ours: {type(error).__name__}: {text}"
