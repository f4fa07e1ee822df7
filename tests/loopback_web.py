"""A web server on this machine that serves good pages, and misbehaves in every way that its path names."""

from __future__ import annotations

import gzip
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat

from papers import pdf

PAGE = """<!DOCTYPE html><html><head><meta charset="utf-8"><title>Llamas</title><style>p {}</style></head><body>
<nav><ul><li><a href="/">Start page</a></li><li><a href="/shop">Shop</a></li></ul></nav>
<article><h1>Llamas of the Andes</h1>
<p>The llama is a domesticated camelid, widely used as a <b>pack animal</b> by Andean cultures for a long time.</p>
<p>Llamas are social animals and live with others as a herd. They can learn simple tasks after a few repetitions.</p>
<p>A full-grown llama can reach a height of 1.8 metres at the top of its head, and can weigh up to 272 kilograms.</p>
</article><script>document.title = "no text"</script><footer>Copyright by nobody in particular</footer></body></html>"""
MIB = 1 << 20


class LoopbackWeb:
    def __init__(self) -> None:
        self.ended = threading.Event()
        self.asked: list[str] = []
        self.headers: list[Message] = []
        self.n_sent = 0  # bytes of endless bodies

        class Handler(_Handler):
            web = self

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    web: LoopbackWeb
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.web.asked.append(self.path)
        self.web.headers.append(self.headers)
        if self.path.startswith("http://"):  # asked as a proxy
            self._send(b"", None, 302, Location=f"{self.web.url}/text")
            return
        self.close_connection = True
        with suppress(OSError):
            getattr(self, "serve_" + self.path.split("?")[0].strip("/").replace("-", "_").replace(".", "_"))()

    def _send(self, body: bytes, kind: str | None, status: int = 200, **more: str) -> None:
        self.send_response(status)
        if kind is not None:
            self.send_header("Content-Type", kind)
        headers = {"Content-Length": str(len(body))} | {name.replace("_", "-"): more[name] for name in more}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def serve_page(self) -> None:
        self._send(PAGE.encode(), "text/html; charset=utf-8")

    def serve_text(self) -> None:
        self._send(b"just a text\n", "text/plain")

    def serve_bytes(self) -> None:
        self._send(b"text of no type\n", None)

    def serve_latin(self) -> None:
        self._send("Grüße, Ñandú".encode("latin-1"), "text/plain; charset=ISO-8859-1")

    def serve_paper(self) -> None:
        self._send(pdf("Of paper"), "application/pdf")

    def serve_packed(self) -> None:
        self._send(gzip.compress(b"a packed text"), "text/plain", Content_Encoding="gzip")

    def serve_packed_twice(self) -> None:
        self._send(gzip.compress(b"a packed ") + gzip.compress(b"text"), "text/plain", Content_Encoding="gzip")

    def serve_image(self) -> None:
        self._send(b"\x89PNG\r\n\x1a\n", "image/png")

    def serve_lie(self) -> None:
        self._send(b"\x89PNG\r\n\x1a\n\0\0\0", "text/plain")

    def serve_gone(self) -> None:
        self._send(b"<h1>no such page</h1>", "text/html", 404)

    def serve_broken(self) -> None:
        self._send(b"Traceback", "text/plain", 500)

    def serve_loop(self) -> None:
        self._send(b"", None, 302, Location="/loop")

    def serve_spiral(self) -> None:
        n = int(self.path.partition("?")[2] or 0)
        self._send(b"", None, 302, Location=f"/spiral?{n + 1}")

    def serve_moved(self) -> None:
        self._send(b"", None, 301, Location="/text")

    def serve_fat(self) -> None:
        """Sends us on, and says more than anybody wants to hear about it."""
        self.send_response(302)
        self.send_header("Location", "/text")
        self.end_headers()
        for _ in range(200):
            self.wfile.write(b" " * MIB)
            self.web.n_sent += MIB

    def serve_to_file(self) -> None:
        self._send(b"", None, 302, Location="file:///etc/hostname")

    def serve_to_ftp(self) -> None:
        self._send(b"", None, 302, Location="ftp://127.0.0.1:9/x")

    def serve_short(self) -> None:
        self._send(b"only this", "text/plain", Content_Length="1000")

    def serve_promise(self) -> None:
        """Says that there are 10 GB, and sends as many as are taken."""
        self._endless({"Content-Length": str(10 << 30)}, lambda: repeat(b"word " * 20_000))

    def serve_endless(self) -> None:
        """Says nothing of its length."""
        self._endless({}, lambda: repeat(b"word " * 20_000))

    def serve_bomb(self) -> None:
        """A little that becomes 10 GB."""
        packer = zlib.compressobj(wbits=31)

        def packed() -> Iterator[bytes]:
            for _ in range(10 << 10):
                yield packer.compress(b" " * MIB)

        self._endless({"Content-Encoding": "gzip"}, packed)

    def _endless(self, headers: dict[str, str], parts: Callable[[], Iterator[bytes]]) -> None:
        self.send_response(200)
        for name, value in ({"Content-Type": "text/plain"} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        for part in parts():
            self.wfile.write(part)
            self.web.n_sent += len(part)

    def serve_silent(self) -> None:
        self.web.ended.wait()

    def serve_drip(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.end_headers()
        while not self.web.ended.wait(0.05):
            self.wfile.write(b".")

    def serve_drip_headers(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not self.web.ended.wait(0.05):
            self.wfile.write(b".")
