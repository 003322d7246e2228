"""The local page of `fedvlm demo`, over HTTP: choose a client, drop a picture, ask, and see all models' answers.

Python's `http.server` carries it: a page, two kinds of small answers and an upload need no framework, and what is not
installed needs no updates. It serves this machine alone unless the user says otherwise. What comes in is untrusted: a
request must name this server as its host and, from a page, as its origin, so that no other site's page can ask;
uploads are bounded before they are read, and pictures are decoded as those of data are. The page loads nothing from
elsewhere, which its headers hold it to.
"""

import contextlib
import errno
import io
import ipaddress
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from fedvlm_jax.asking.asker import list_models
from fedvlm_jax.asking.demo_requests import (
    MOST_BODY,
    MOST_UPLOAD,
    NUMBER,
    Models,
    RefusedError,
    describe_sample,
    read_form,
    read_pictures,
    write_answer,
)
from fedvlm_jax.asking.question import Shown, check_question
from fedvlm_jax.data.image_decoding import decode_picture
from fedvlm_jax.errors import UserError, explain_error
from fedvlm_jax.reporting.pages import render
from fedvlm_jax.utils.untrusted_text import clean

WAITING = 3
"""Questions that may wait for the one that is being answered."""

SIDE = 256
"""Pixels that a sample's picture is shown with at most."""

SECONDS = 30
"""Seconds that a reader or a writer may be silent."""

REQUEST = 120.0
"""Seconds that a whole request may take to arrive: who sends a byte now and then is never silent."""

VISITORS = 64
"""Connections at a time; further ones are closed."""


class About(NamedTuple):
    """Lines at the head of the page: the run's name, what it is, and what a reader should know."""

    title: str
    subtitle: str
    notes: Sequence[str] = ()


class DemoServer(ThreadingHTTPServer):
    """A server that holds its port from the start, and answers once `models` are there."""

    daemon_threads = True
    models: Models
    about: About
    samples: int

    def __init__(self, family: socket.AddressFamily, address: tuple[Any, ...], host: str) -> None:
        """Bind the address; `host` is what the user calls it."""
        self.address_family, self.host = family, host
        self.asking, self.waiting = threading.Lock(), threading.BoundedSemaphore(1 + WAITING)
        self.places = threading.BoundedSemaphore(VISITORS)
        super().__init__((address[0], address[1]), _Handler)

    @property
    def url(self) -> str:
        """The page's address on this machine."""
        everywhere = self.host in ("", "0.0.0.0", "::")  # compared with, not bound
        host = "127.0.0.1" if everywhere else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}/"

    def knows(self, host: str) -> bool:
        """Say whether a request's header `Host` names this server: of another name the page may be another site's."""
        try:
            name, port = urlsplit(f"//{host}").hostname or "", urlsplit(f"//{host}").port or 80
        except ValueError:
            return False
        names = {"localhost", "127.0.0.1", "::1", self.host.lower()}
        if not is_loopback(self.host):
            names.add(socket.gethostname().lower())
        return port == self.server_port and (name in names or (not is_loopback(self.host) and _is_number(name)))

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, as long as there are places."""
        if self.places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and free the place."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Drop a connection that failed: whoever asked has left."""


def is_loopback(host: str) -> bool:
    """Say whether only this machine reaches a host.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    return host == "localhost" or (_is_number(host) and ipaddress.ip_address(host).is_loopback)


def _is_number(host: str) -> bool:
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host)
        return True
    return False


def open_server(host: str, port: int) -> DemoServer:
    """Take a port, any that is free for 0; nothing is answered yet.

    Raises:
        UserError: it is taken or not to be had, or there is no such host.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return DemoServer(family, address, host)
    except (socket.gaierror, UnicodeError):
        raise UserError(f"--host {host}: there is no such host; 127.0.0.1 is this machine") from None
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        why = "is taken by another program" if taken else f"cannot be had ({os.strerror(error.errno or 0)})"
        raise UserError(f"--port {port} of {host} {why}: choose another, or 0 for any that is free") from None


class _Handler(BaseHTTPRequestHandler):
    timeout = SECONDS
    server_version, sys_version = "fedvlm", ""

    @property
    def demo(self) -> DemoServer:
        assert isinstance(self.server, DemoServer)
        return self.server

    def setup(self) -> None:
        """Open the connection, for as long as a request may take to arrive."""
        super().setup()
        self._late = threading.Timer(REQUEST, self._leave)
        self._late.daemon = True
        self._late.start()

    def finish(self) -> None:
        """Close the connection."""
        self._late.cancel()
        super().finish()

    def _leave(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        """Write no log of requests: they hold what people ask."""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, work: Any) -> None:
        """Send what the work returns, or in one line why there is nothing."""
        try:
            if not self.demo.knows(self.headers.get("Host", "")):
                raise RefusedError(421, f"this page is at {self.demo.url}")
            work()
        except RefusedError as error:
            self._send_json({"error": str(error)}, error.status)
        except UserError as error:
            self._send_json({"error": clean(" ".join(str(error).split()))}, 400)
        except OSError:  # the connection's: nobody is there to be told
            self.close_connection = True
        except Exception as error:
            self._send_json({"error": clean(explain_error(error))}, 500)

    def _get(self) -> None:
        asked = urlsplit(self.path)
        server, parts = self.demo, asked.path.strip("/").split("/")
        client = parse_qs(asked.query).get("client", [""])[0]
        if parts == [""]:
            nonce = secrets.token_urlsafe(16)
            models = server.models
            page = render(
                "demo.html.j2",
                about=server.about,
                clients={name: clean(name) for name in models.clients},
                several=models.most_pictures > 1,
                chooses=models.chooses,
                samples=server.samples > 0,
                limit=MOST_UPLOAD,
                nonce=nonce,
            )
            self._send(page.encode(), "text/html; charset=utf-8", nonce=nonce)
        elif parts == ["favicon.ico"]:
            self._send(b"", "image/png")
        elif parts == ["samples"]:
            found = server.models.list_samples(client, server.samples)
            self._send_json({"samples": [describe_sample(sample) for sample in found]})
        elif len(parts) == 2 and parts[0] == "pictures" and NUMBER.fullmatch(parts[1]):
            picture = decode_picture(self._read_sample(client, int(parts[1])).contents[0])
            picture.thumbnail((SIDE, SIDE))
            picture.save(file := io.BytesIO(), "PNG")
            self._send(file.getvalue(), "image/png")
        else:
            raise RefusedError(404, "there is no such page")

    def _read_sample(self, client: str, number: int) -> Shown:
        """Read one of the samples that are offered, and no other row."""
        if number not in {sample.number for sample in self.demo.models.list_samples(client, self.demo.samples)}:
            raise RefusedError(404, "there is no such test picture")
        return self.demo.models.read_sample(number)

    def _post(self) -> None:
        if urlsplit(self.path).path != "/ask":
            raise RefusedError(404, "there is no such page")
        # A browser asks before it sends JSON to another site, and is not answered; a form cannot send it at all.
        origin, kind = self.headers.get("Origin"), self.headers.get_content_type()
        if (origin is not None and origin != f"http://{self.headers.get('Host')}") or kind != "application/json":
            raise RefusedError(403, "questions are asked by this server's own page")
        length = self.headers.get("Content-Length", "")
        if not NUMBER.fullmatch(length):
            raise RefusedError(411, "the request does not say how long it is")
        if int(length) > MOST_BODY:
            raise RefusedError(413, f"pictures of more than {MOST_UPLOAD >> 20} MiB are not taken")
        if not self.demo.waiting.acquire(blocking=False):
            raise RefusedError(503, "too many questions are waiting: try again")
        try:
            body = self.rfile.read(int(length))
            self._late.cancel()  # what follows may take its time
            self._send_json(self._ask(read_form(body)))
        finally:
            self.demo.waiting.release()

    def _ask(self, form: Mapping[str, Any]) -> dict[str, Any]:
        models, client, sample = self.demo.models, form["client"], form["sample"]
        question = form["question"].strip() or "?" if models.chooses else check_question(form["question"])
        shown = self._read_sample(client, sample) if sample is not None else read_pictures(form["pictures"], models)
        with self.demo.asking:  # one at a time: answers take all the machine has
            start = time.perf_counter()
            answered = models.ask(client, question, shown)[0]
            seconds = time.perf_counter() - start
        if isinstance(answered, str):
            raise UserError(answered)
        told = [write_answer(shown_as, answered[model]) for model, shown_as in list_models([answered]).items()]
        return {"answers": told, "seconds": round(seconds, 1)}

    def _send_json(self, content: Mapping[str, Any], status: int = 200) -> None:
        self._send(json.dumps(content).encode(), "application/json", status)

    def _send(self, content: bytes, kind: str, status: int = 200, nonce: str = "") -> None:
        own = f"'nonce-{nonce}'" if nonce else "'none'"
        policy = {
            **dict.fromkeys(("default-src", "base-uri", "form-action", "frame-ancestors"), "'none'"),
            **dict.fromkeys(("style-src", "script-src"), own),
            "img-src": "'self' blob:",
            "connect-src": "'self'",
        }
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }
        with contextlib.suppress(OSError):  # who asked may have left
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
