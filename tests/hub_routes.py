"""What the loopback Hub answers to which request."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

from .hub_storage import LFS_NAMES, LFS_THRESHOLD, File, Repo


if TYPE_CHECKING:
    from .hub_server import HubServer


_PAGE = b"<!DOCTYPE html><html><body>Sign in to the network of this hotel</body></html>"


@dataclass
class Request:
    """What the server noted of one request."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    status: int = 0
    sent: int = 0  # bytes of the answer's body


class _Answer(Exception):
    """Ends a request with a status."""

    def __init__(self, status: int, code: str | None = None, message: str = "", **headers: str):
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = ({"X-Error-Code": code} if code else {}) | {"X-Error-Message": message} | headers


def handler_of(hub: "HubServer") -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # it would hold back each body for 40 ms

        def log_message(self, *args) -> None:
            pass

        def do_GET(self):
            self._handle()

        do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

        def _handle(self) -> None:
            url = urlsplit(self.path)
            self.route, self.query = unquote(url.path), parse_qs(url.query)
            self.noted = Request(
                self.command, self.route, self.headers.get("Range"), self.headers.get("Authorization")
            )
            hub.requests.append(self.noted)
            self.failure = hub._next(self.command, self.route)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.failure == "drop":
                return self._close()
            if self.failure in ("429", "500", "503"):
                return self._send(int(self.failure), b"{}")
            if self.failure == "html":
                return self._send(200, _PAGE, {"Content-Type": "text/html"})
            try:
                for methods, pattern, act in _ROUTES:
                    found = re.fullmatch(pattern, self.route)
                    if found and self.command in methods.split():
                        return act(self, body, **found.groupdict())
                raise _Answer(404, message=f"no route {self.command} {self.route}")
            except _Answer as answer:
                self._send(answer.status, json.dumps({"error": answer.message}).encode(), answer.headers)

        def _close(self) -> None:
            self.close_connection = True
            self.connection.shutdown(2)

        def _send(self, status: int, data: bytes = b"", headers: dict[str, str] | None = None) -> None:
            if self.failure == "lost answer":
                return self._close()
            if self.failure == "cut":
                data = data[: len(data) // 2]
            self.noted.status = status
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", (headers or {}).get("X-Length") or str(len(data)))
            self.end_headers()
            if self.command == "HEAD":
                return None
            if self.failure == "corrupt" and data:
                middle = len(data) // 2
                data = data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]
            if self.failure == "truncate":
                data = data[: len(data) // 2]
            self.noted.sent = len(data)
            try:
                self.wfile.write(data)
            except OSError:  # the client went away
                self.close_connection = True
                return None
            return self._close() if self.failure == "truncate" else None

        def json(self, data, status: int = 200) -> None:
            self._send(status, json.dumps(data).encode(), {"Content-Type": "application/json"})

        # Who asks for what

        def repo(self, kind: str, name: str, write: bool = False) -> Repo:
            key = name if kind in ("models", "") else f"{kind}/{name}"
            found = hub.repos.get(key)
            trusted = hub.token is None or self.noted.authorization == f"Bearer {hub.token}"
            if found is None or (found.private and not trusted):  # the Hub does not tell which
                raise _Answer(404 if trusted else 401, "RepoNotFound", "Repository not found")
            if write and not trusted:
                raise _Answer(403, message="Forbidden: this token may not write")
            return found

        def commit_of(self, repo: Repo, revision: str) -> str:
            sha = repo.resolve(revision)
            if sha is None:
                raise _Answer(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return sha

        # Reading

        def resolve(self, body: bytes, name: str, rev: str, path: str, kind: str = "") -> None:
            repo = self.repo(kind, name)
            sha = self.commit_of(repo, rev)
            file = repo.commits[sha].get(path)
            if file is None:
                raise _Answer(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": sha})
            headers = {"X-Repo-Commit": sha, "ETag": f'"{file.etag}"'}
            if hub.cdn and file.lfs:
                headers = {
                    "X-Repo-Commit": sha,
                    "X-Linked-Etag": f'"{file.etag}"',
                    "X-Linked-Size": str(len(file.data)),
                }
                return self._send(302, b"", headers | {"Location": f"{hub.cdn}/cdn/{file.etag}"})
            self._send_file(file.data, headers)

        def fetch(self, body: bytes, etag: str) -> None:
            """What another host gives, which knows no tokens."""
            found = [file for repo in hub.repos.values() for tree in repo.commits.values() for file in tree.values()]
            self._send_file(next(file.data for file in found if file.etag == etag), {})

        def _send_file(self, data: bytes, headers: dict[str, str]) -> None:
            status = 200
            if hub.ranges:
                headers["Accept-Ranges"] = "bytes"
                wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.noted.range or "")
                if wanted:
                    start, end = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
                    if start >= len(data):
                        raise _Answer(416, message="Range not satisfiable")
                    headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
                    data, status = data[start : end + 1], 206
            if self.command == "HEAD":
                headers["X-Length"] = str(len(data))
            self._send(status, data, headers)

        def info(self, body: bytes, kind: str, name: str, rev: str = "main") -> None:
            repo = self.repo(kind, name)
            sha = self.commit_of(repo, rev)
            sized, files = "blobs" in self.query, repo.commits[sha]
            siblings = [
                {"rfilename": path} | ({"size": len(files[path].data)} if sized else {}) for path in sorted(files)
            ]
            self.json(
                {"id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []}
            )

        def tree(self, body: bytes, kind: str, name: str, rev: str, path: str = "") -> None:
            repo = self.repo(kind, name)
            files = repo.commits[self.commit_of(repo, rev)]
            prefix, deep = f"{path}/" if path else "", self.query.get("recursive", ["false"])[0].lower() == "true"
            entries: dict[str, dict] = {}
            for full, file in sorted(files.items()):
                if full.startswith(prefix):
                    parts = full[len(prefix) :].split("/")
                    for depth in range(1, len(parts) if deep else min(2, len(parts))):
                        folder = prefix + "/".join(parts[:depth])
                        entries[folder] = {"type": "directory", "oid": "0", "size": 0, "path": folder}
                    if deep or len(parts) == 1:
                        entries[full] = _entry(full, file)
            if path and not entries:
                raise _Answer(404, "EntryNotFound", f"{path} does not exist")
            self.json(list(entries.values()))

        def paths_info(self, body: bytes, kind: str, name: str, rev: str) -> None:
            repo = self.repo(kind, name)
            files = repo.commits[self.commit_of(repo, rev)]
            paths = parse_qs(body.decode()).get("paths") or json.loads(body or b"{}").get("paths", [])
            self.json([_entry(path, files[path]) for path in paths if path in files])

        def refs(self, body: bytes, kind: str, name: str) -> None:
            repo = self.repo(kind, name)
            named = {"branches": ("heads", repo.branches), "tags": ("tags", repo.tags)}
            self.json(
                {
                    key: [{"name": n, "ref": f"refs/{place}/{n}", "targetCommit": sha} for n, sha in found.items()]
                    for key, (place, found) in named.items()
                }
                | {"converts": []}
            )

        def whoami(self, body: bytes) -> None:
            self.json({"name": "tester", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

        # Writing

        def create(self, body: bytes) -> None:
            fields = json.loads(body)
            name = "/".join(filter(None, (fields.get("organization"), fields["name"])))
            name = name if "/" in name else f"tester/{name}"
            kind = f"{fields.get('type') or 'model'}s"
            key = name if kind == "models" else f"{kind}/{name}"
            if hub.token is not None and self.noted.authorization != f"Bearer {hub.token}":
                raise _Answer(401, message="Invalid username or password.")
            with hub.lock:
                exists = key in hub.repos
                hub.repos.setdefault(key, Repo(fields.get("visibility") == "private" or bool(fields.get("private"))))
            self.json({"url": f"{hub.url}/{key}", "name": name, "id": name}, 409 if exists else 200)

        def validate_yaml(self, body: bytes) -> None:
            self.json({"errors": [], "warnings": []})

        def preupload(self, body: bytes, kind: str, name: str, rev: str) -> None:
            repo = self.repo(kind, name, write=True)
            known = repo.commits[self.commit_of(repo, rev)]
            answers = []
            for file in json.loads(body)["files"]:
                path, sample = file["path"], base64.b64decode(file.get("sample", ""))
                large = file["size"] > LFS_THRESHOLD and b"\0" in sample
                answers.append(
                    {
                        "path": path,
                        "uploadMode": "lfs" if LFS_NAMES.match(path) or large else "regular",
                        "shouldIgnore": False,
                        "oid": known[path].etag if path in known else None,
                    }
                )
            self.json({"files": answers})

        def lfs_batch(self, body: bytes, name: str, kind: str = "") -> None:
            self.repo(kind, name, write=True)
            objects = []
            for item in json.loads(body)["objects"]:
                entry = {"oid": item["oid"], "size": item["size"]}
                if item["oid"] not in hub.objects:
                    entry["actions"] = {"upload": {"href": f"{hub.url}/lfs/{item['oid']}"}}
                objects.append(entry)
            self.json({"transfer": "basic", "objects": objects})

        def lfs_put(self, body: bytes, oid: str) -> None:
            if hashlib.sha256(body).hexdigest() != oid:
                raise _Answer(400, message="The content is not what its name says")
            hub.objects[oid] = body
            self._send(200)

        def commit(self, body: bytes, kind: str, name: str, rev: str) -> None:
            repo = self.repo(kind, name, write=True)
            with hub.lock:
                if rev not in repo.branches:
                    raise _Answer(404, "RevisionNotFound", f"Invalid rev id: {rev}")
                files = dict(repo.commits[repo.branches[rev]])
                for line in body.splitlines():
                    operation = json.loads(line)
                    self._apply(repo, rev, files, operation["key"], operation["value"])
                sha = repo.commit(rev, files)
                header = json.loads(body.splitlines()[0])["value"]
                hub.messages.append(f"{header['summary']}\n{header['description']}".strip())
            url = f"{hub.url}/{name}/commit/{sha}"
            self.json({"success": True, "commitUrl": url, "commitOid": sha, "hookOutput": ""})

        def _apply(self, repo: Repo, rev: str, files: dict[str, File], key: str, value: dict) -> None:
            match key:
                case "header":
                    if value.get("parentCommit") not in (None, repo.branches[rev]):
                        raise _Answer(412, message="A commit has happened since")
                case "file":
                    files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
                case "lfsFile":
                    if value["oid"] not in hub.objects:
                        raise _Answer(
                            400, message=f"LFS pointer pointed to a file that does not exist: {value['path']}"
                        )
                    files[value["path"]] = File(hub.objects[value["oid"]], lfs=True)
                case "deletedFile":
                    files.pop(value["path"], None)
                case "deletedFolder":
                    for path in [path for path in files if path.startswith(value["path"].rstrip("/") + "/")]:
                        del files[path]

        def branch(self, body: bytes, kind: str, name: str, rev: str) -> None:
            repo = self.repo(kind, name, write=True)
            if rev in repo.branches:
                raise _Answer(409, message="Reference already exists")
            start = json.loads(body or b"{}").get("startingPoint") or "main"
            repo.branches[rev] = self.commit_of(repo, start)
            self.json({})

        def tag(self, body: bytes, kind: str, name: str, rev: str) -> None:
            repo = self.repo(kind, name, write=True)
            new = json.loads(body)["tag"]
            if new in repo.tags:
                raise _Answer(409, message="Tag reference exists already")
            repo.tags[new] = self.commit_of(repo, rev)
            self.json({})

    return Handler


def _entry(path: str, file: File) -> dict:
    entry = {"type": "file", "oid": file.etag, "size": len(file.data), "path": path}
    if file.lfs:
        entry["lfs"] = {"oid": file.etag, "size": len(file.data), "pointerSize": 130}
    return entry


_ID = r"(?P<name>[^/]+/[^/]+?)"
_API = rf"/api/(?P<kind>models|datasets|spaces)/{_ID}"
_PLACE = rf"/(?:(?P<kind>datasets|spaces)/)?{_ID}"


def _route(methods: str, pattern: str, name: str) -> tuple[str, str, Callable]:
    def act(handler, body, **groups):
        return getattr(handler, name)(body, **{key: value for key, value in groups.items() if value is not None})

    return methods, pattern, act


_ROUTES = [
    _route("GET", r"/api/whoami-v2", "whoami"),
    _route("POST", r"/api/repos/create", "create"),
    _route("POST", r"/api/validate-yaml", "validate_yaml"),
    _route("POST", rf"{_API}/preupload/(?P<rev>.+)", "preupload"),
    _route("POST", rf"{_API}/commit/(?P<rev>.+)", "commit"),
    _route("POST", rf"{_API}/branch/(?P<rev>.+)", "branch"),
    _route("POST", rf"{_API}/tag/(?P<rev>.+)", "tag"),
    _route("POST", rf"{_API}/paths-info/(?P<rev>[^/]+)", "paths_info"),
    _route("GET", rf"{_API}/refs", "refs"),
    _route("GET", rf"{_API}/revision/(?P<rev>.+)", "info"),
    _route("GET", rf"{_API}/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?", "tree"),
    _route("GET", _API, "info"),
    _route("POST", rf"{_PLACE}\.git/info/lfs/objects/batch", "lfs_batch"),
    _route("GET", r"/cdn/(?P<etag>[0-9a-f]{64})", "fetch"),
    _route("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    _route("GET HEAD", rf"{_PLACE}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
]
