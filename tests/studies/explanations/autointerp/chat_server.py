"""A loopback endpoint that speaks OpenAI's chat completions, for as long as a test."""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatServer:
    """Answers `POST /v1/chat/completions` and keeps what it was asked.

    Args:
        answer (`Callable[[str], str]`): From the last message to the answer.
    """

    def __init__(self, answer: Callable[[str], str] = lambda text: "yes"):
        self.answer = answer
        self.usage: bool = True
        self.message: dict = {}  # more fields of the message
        self.finish = "stop"
        self.body: bytes | None = None  # sent instead of an answer
        self.requests: list[dict] = []
        self.failures: dict[int, int | str] = {}  # by the request's number, from 1: a status, "hang" or "drop"
        self.headers: dict[str, str] = {}  # of failures
        self.trouble = "busy"
        self.lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def _handler(server: ChatServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.requests.append({"path": self.path, "body": body, "headers": dict(self.headers)})
                failure = server.failures.get(len(server.requests))
            if failure == "drop":
                self.close_connection = True
            elif isinstance(failure, int):
                self._send(failure, json.dumps({"error": {"message": server.trouble}}).encode(), server.headers)
            else:
                if failure == "hang":
                    time.sleep(1.5)
                self._send(200, server.body or self._completion(body), {})

        def _completion(self, body: dict) -> bytes:
            question = body["messages"][-1]["content"]
            text = server.answer(question)
            message = {"role": "assistant", "content": text} | server.message
            choice = {"index": 0, "finish_reason": server.finish, "message": message}
            reply = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice]}
            if server.usage:
                read, written = len(question.split()), len(text.split())
                usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
                reply["usage"] = usage
            return json.dumps(reply).encode()

        def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            for name, value in headers.items():
                self.send_header(name, value)
            with contextlib.suppress(OSError):  # who asked may have gone
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *values) -> None:
            pass

    return Handler
