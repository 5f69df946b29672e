"""What the loopback Hub keeps: repositories of whole commits, in memory."""

import hashlib
import json
import re
from dataclasses import dataclass, field


LFS_THRESHOLD = 10_000  # bytes; binary files of these names always go to LFS
LFS_NAMES = re.compile(r".*\.(safetensors|pt|npz|bin|png)$")


@dataclass
class File:
    """A file of a commit; `etag` is what the Hub gives: sha256 for LFS, git's sha1 for the others."""

    data: bytes
    lfs: bool

    @property
    def etag(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Repo:
    """Commits (each a whole tree), and the names that point to them."""

    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("main", {})

    def commit(self, branch: str, files: dict[str, File]) -> str:
        """Make `files` the whole tree of a branch."""
        content = json.dumps([len(self.commits), {name: file.etag for name, file in sorted(files.items())}])
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = dict(files), sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a commit's own name means."""
        return (
            self.branches.get(revision) or self.tags.get(revision) or (revision if revision in self.commits else None)
        )


def is_lfs(name: str, data: bytes) -> bool:
    return bool(LFS_NAMES.match(name)) or len(data) > LFS_THRESHOLD
