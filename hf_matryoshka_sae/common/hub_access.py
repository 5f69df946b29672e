"""A check that the Hub can be reached, before a library is called that would try for half a minute."""

import errno
import socket
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit


_ATTEMPTS, _PAUSE = 3, 0.4  # seconds between attempts
_CONNECTED_WITHIN = 2.0  # seconds; on a slower network the library's own retries do better
# Errors after which another attempt is of no use: no way to the host, or nobody listens there.
_NO_NETWORK = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ECONNREFUSED}


def check_reachable(repo_id: str, filename: str, revision: str | None = None, repo_type: str = "model") -> None:
    """Raise at once if a repository cannot be read: it is not on this machine, and there is no network.

    Args:
        repo_id (`str`): The repository; a folder of that name needs no network.
        filename (`str`): A file that a cached copy of the repository has.
        revision (`str`, *optional*): Branch, tag or commit.
        repo_type (`str`, *optional*, defaults to `"model"`): `model` or `dataset`.

    Raises:
        `OSError`: if the Hub's name cannot be looked up, or its address not be reached, three times in about a second.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    # A name with two slashes is a path, whether it exists or not: not for the Hub to answer.
    is_at_hand = Path(repo_id).exists() or constants.HF_HUB_OFFLINE or repo_id.count("/") > 1
    if is_at_hand or isinstance(
        try_to_load_from_cache(repo_id, filename, revision=revision, repo_type=repo_type), str
    ):
        return
    error = _unreachable(constants.ENDPOINT)
    if error is not None:
        raise OSError(f"it is not on this machine, and {constants.ENDPOINT} cannot be reached: {error}.")


def _unreachable(endpoint: str) -> OSError | None:
    """Return why an address cannot be reached; `None` where it can, or where only a request would show it."""
    url = urlsplit(endpoint)
    if url.scheme in urllib.request.getproxies() or "all" in urllib.request.getproxies() or url.hostname is None:
        return None  # a proxy looks names up itself
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE)
        try:
            port = url.port or (443 if url.scheme == "https" else 80)
            socket.create_connection((url.hostname, port), timeout=_CONNECTED_WITHIN).close()
            return None
        except socket.gaierror as error:
            reason = error
        except OSError as error:
            if error.errno not in _NO_NETWORK:
                return None
            reason = error
    return reason
