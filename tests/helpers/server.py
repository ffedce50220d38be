"""A web server for tests: files with byte ranges, and the faults of real servers."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit


@dataclass
class Server:
    """Server of the files in ``directory``.

    Args:
        fault: gives, for the number of a request from 1, what goes wrong: a status; "drop" (the connection ends after
            half of the body), "hang" (no response), "trickle" (a byte every 20 ms) or None
        ranges: False ignores the header Range
        retry_after: value of the header in responses with a status of ``fault``
        redirect: URL to which every request is redirected
    """

    url: str
    directory: Path
    fault: Callable[[int], int | str | None] = lambda number: None
    ranges: bool = True
    retry_after: str | None = None
    redirect: str | None = None
    headers_seen: list[dict[str, str]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    bytes_sent: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _closed: threading.Event = field(default_factory=threading.Event)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        with self._lock:
            self.requests.append(handler.path)
            self.headers_seen.append({name.lower(): value for name, value in handler.headers.items()})
            fault = self.fault(len(self.requests))
        if fault == "hang":
            self._closed.wait()
        path = self.directory / urlsplit(handler.path).path.lstrip("/")
        if self.redirect or isinstance(fault, int) or not path.is_file():
            handler.send_response(302 if self.redirect else fault if isinstance(fault, int) else 404)
            if self.redirect:
                handler.send_header("Location", f"{self.redirect}{handler.path}")
            if self.retry_after is not None:
                handler.send_header("Retry-After", self.retry_after)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        data, status, found = path.read_bytes(), 200, None
        if self.ranges:
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
        size = len(data)
        if found:
            start, stop = int(found[1]), min(int(found[2] or size), size - 1) + 1
            data, status = data[start:stop], 206
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        if found:
            handler.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        handler.end_headers()
        if fault == "drop":
            data = data[: len(data) // 2]
            handler.close_connection = True
        with self._lock:
            self.bytes_sent += len(data)
        self._send(handler, data, slowly=fault == "trickle")

    def _send(self, handler: BaseHTTPRequestHandler, data: bytes, slowly: bool) -> None:
        while slowly and data and not self._closed.is_set():
            handler.wfile.write(data[:1])
            handler.wfile.flush()
            data = data[1:]
            time.sleep(0.02)
        handler.wfile.write(data)

    def close(self) -> None:
        """Let hanging requests end."""
        self._closed.set()


@contextmanager
def serve(directory: Path) -> Iterator[Server]:
    """Serve the files of ``directory`` on the loopback address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            server.answer(self)

        def log_message(self, *args: object) -> None:
            pass

    class QuietServer(ThreadingHTTPServer):
        def handle_error(self, *args: object) -> None:  # a client that has gone away
            pass

    http = QuietServer(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{http.server_port}", directory)
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        http.shutdown()
        http.server_close()
        thread.join()
