"""A web server for tests: files with ranges of bytes, and the faults of real ones."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Server:
    """``fault`` decides, from the number of the request, what goes wrong: a status, "drop", or nothing."""

    url: str
    directory: Path
    fault: Callable[[int], int | str | None] = lambda number: None
    ranges: bool = True
    retry_after: str | None = None
    headers_seen: list[dict[str, str]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    bytes_sent: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        with self._lock:
            self.requests.append(handler.path)
            self.headers_seen.append({name.lower(): value for name, value in handler.headers.items()})
            fault = self.fault(len(self.requests))
        path = self.directory / handler.path.lstrip("/")
        if isinstance(fault, int) or not path.is_file():
            handler.send_response(fault if isinstance(fault, int) else 404)
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
        handler.wfile.write(data)


@contextmanager
def serve(directory: Path) -> Iterator[Server]:
    """Serves the files of ``directory`` on this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            server.answer(self)

        def log_message(self, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{http.server_port}", directory)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
