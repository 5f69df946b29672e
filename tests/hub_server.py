"""A loopback Hub: an HTTP server that the unmodified huggingface_hub client pushes to and loads from.

    with HubServer() as hub:                       # hub.url is the endpoint
        hub.fail(3, "drop")                        # the third request from now finds its connection closed
        ...
        print(hub.bytes_sent(), [request.path for request in hub.requests])

Repositories live in memory. Commits are atomic, as on the Hub; what a client has to know is in the answers' headers.
"""

import re
import threading
from collections.abc import Callable
from http.server import ThreadingHTTPServer

from .hub_routes import Request, handler_of
from .hub_storage import File, Repo, is_lfs


FAILURES = ("drop", "lost answer", "429", "500", "503", "truncate", "corrupt", "html", "cut")
"""Ways to fail: `truncate` breaks off in the middle of the body, `cut` sends half of it as if it were all."""


class HubServer:
    """A Hub on the loopback interface.

    Args:
        token (`str`, *optional*): What writing, and reading private repositories, needs; nothing where absent.
    """

    def __init__(self, token: str | None = None):
        self.token = token
        self.reset()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(self))
        self._http.daemon_threads = True
        self._http.handle_error = lambda *request: None  # clients that go away are what the tests are about
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def reset(self) -> None:
        """Forget everything."""
        self.lock = threading.RLock()
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # uploaded to LFS, committed or not
        self.requests: list[Request] = []
        self.messages: list[str] = []  # of commits
        self.ranges, self._failures, self._named, self.on_request = True, {}, {}, None
        self.cdn: str | None = None  # where large files are redirected to
        self.counted = 0

    def __enter__(self) -> "HubServer":
        return self

    def __exit__(self, *error) -> None:
        self._http.shutdown()
        self._http.server_close()

    # What a test says and asks

    def fail(self, number: int, how: str = "drop", times: int = 1) -> None:
        """Let the `number`-th request from now (from 1 on) fail, and those after it up to `times`."""
        assert how in FAILURES, how
        with self.lock:
            self._failures = {self.counted + number + i: how for i in range(times)}

    def fail_request(self, method: str, path: str, nth: int, how: str, for_good: bool = False) -> None:
        """Let the `nth` request (from 1 on) of this method and path fail, or that and every later one of them."""
        assert how in FAILURES, how
        with self.lock:
            self._named[method, path] = [nth, how, for_good]

    def heal(self) -> None:
        """Let no request fail from now on."""
        with self.lock:
            self._failures, self._named = {}, {}

    def serve_large_files_elsewhere(self) -> None:
        """Redirect requests for LFS files to another host, as the Hub does; it is this server by another name."""
        self.cdn = self.url.replace("127.0.0.1", "localhost")

    def watch(self, call: Callable[[int, str, str], None] | None) -> None:
        """Call `call(number, method, path)` when a request comes; what it does delays the answer."""
        with self.lock:
            self.counted, self.on_request = 0, call

    def bytes_sent(self, pattern: str = "") -> int:
        """Bytes of the answers' bodies, of requests whose path matches."""
        return sum(request.sent for request in self.requests if re.search(pattern, request.path))

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision holds."""
        found = self.repos[repo]
        return {name: file.data for name, file in found.commits[found.resolve(revision)].items()}

    def add(self, repo: str, files: dict[str, bytes], private: bool = False) -> str:
        """Commit files to a repository, made if it is not there; returns the commit."""
        with self.lock:
            found = self.repos.setdefault(repo, Repo(private))
            tree = found.commits[found.branches["main"]]
            return found.commit("main", tree | {name: File(data, is_lfs(name, data)) for name, data in files.items()})

    def _next(self, method: str, path: str) -> str | None:
        """Count a request; how it is to fail, if it is."""
        if path.startswith("/api/agent-harnesses"):  # asked once a day, by chance
            return None
        with self.lock:
            self.counted += 1
            number, call = self.counted, self.on_request
            failure = self._failures.pop(number, None) or self._named_failure(method, path)
        if call is not None:
            call(number, method, path)
        return failure

    def _named_failure(self, method: str, path: str) -> str | None:
        if (method, path) not in self._named:
            return None
        nth, how, for_good = self._named[method, path]
        self._named[method, path][0] = nth = nth - 1
        return how if nth == 0 or (nth < 0 and for_good) else None
