"""A report that is served on this machine, and made anew as its runs go on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from megatron_stable.analysis.report.frame import ICON
from megatron_stable.analysis.report.page import render
from megatron_stable.analysis.report.run import Run
from megatron_stable.errors import ConfigError, MegatronStableError

HOST = "127.0.0.1"
EVERY = 5.0  # seconds between two looks at the runs
# reloads the page when there is a new one, with the same parts of it unfolded
SCRIPT = """<script>
const parts = () => [...document.querySelectorAll("details")];
const kept = JSON.parse(sessionStorage.getItem("parts") || "[]");
addEventListener("DOMContentLoaded", () => parts().forEach((part, i) => { if (i in kept) part.open = kept[i]; }));
addEventListener("pagehide", () => sessionStorage.setItem("parts", JSON.stringify(parts().map(part => part.open))));
setInterval(async () => {
  const answer = await fetch("version").catch(() => null);
  if (answer && answer.ok && await answer.text() !== "VERSION") location.reload();
}, PERIOD);
</script>
"""


class Watch:
    """Serves the report of runs.

    Args:
        port: Of this machine; 0: one that is free.
        every: Seconds between two looks at the runs.

    Raises:
        ConfigError: The port is taken.
    """

    def __init__(self, runs: Sequence[Run], port: int, every: float = EVERY) -> None:
        self.runs, self.every = runs, every
        self.version, self.page = 0, _waiting([run.name for run in runs], self._head(0)).encode()
        self._stale = True  # whether the page is not that of what was read
        self._ended = threading.Event()
        try:
            self.server = ThreadingHTTPServer((HOST, port), self._handler())
        except OSError as error:
            raise ConfigError(f"port {port} cannot be had: {error.strerror or error}; choose another --port") from None

    @property
    def address(self) -> str:
        """Where a browser finds it."""
        return f"http://{HOST}:{self.server.server_address[1]}/"

    def _head(self, version: int) -> str:
        return SCRIPT.replace("VERSION", str(version)).replace("PERIOD", f"{1000 * self.every:.0f}")

    def look(self) -> None:
        """Make the page anew if the runs have gone on."""
        for run in self.runs:
            self._stale |= run.refresh()
        if not self._stale:
            return
        version = self.version + 1
        head = self._head(version)
        waiting = [run.name for run in self.runs if not run.curves.step]
        page = _waiting(waiting, head) if waiting else render(self.runs, head)
        self.page, self.version, self._stale = page.encode(), version, False

    def serve(self, say: Callable[[str], None]) -> None:
        """Serve until :meth:`end`, or an interrupt; a quarter of the time, at most, goes into making pages."""
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        try:
            while not self._ended.is_set():
                began = time.monotonic()
                try:
                    self.look()
                except Exception as error:  # of a file that is half written, say: the next look may do
                    what = str(error) if isinstance(error, MegatronStableError) else f"{type(error).__name__}: {error}"
                    say(f"warning: the page stays as it was: {what}")
                self._ended.wait(max(self.every, 3 * (time.monotonic() - began)))
        finally:
            self.server.shutdown()
            self.server.server_close()

    def end(self) -> None:
        """Stop serving."""
        self._ended.set()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        watch = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                host = self.headers.get("Host", HOST).partition(":")[0]
                if host not in (HOST, "localhost"):  # a foreign page that has its name lead here
                    self.send_error(403)
                    return
                with suppress(ConnectionError):  # of a browser that went on before it had all
                    self._answer()

            def _answer(self) -> None:
                path = urlsplit(self.path).path
                answers = {"/": (watch.page, "text/html"), "/version": (str(watch.version).encode(), "text/plain")}
                body, kind = answers.get(path, (b"", ""))
                self.send_response(200 if path in answers else 404)
                self.send_header("Content-Type", f"{kind or 'text/plain'}; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def _waiting(names: Sequence[str], head: str) -> str:
    """The page while a run has recorded nothing yet, or nothing has been read."""
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>report</title>{ICON}{head}</head>'
        f"<body><main><h1>Waiting</h1><p>No step has been read and drawn yet: {escape(', '.join(names))}. "
        "The page comes by itself.</p></main>"
        "</body></html>"
    )
