"""The page's server over HTTP: what it answers, and whom and what it refuses."""

import base64
import contextlib
import http.client
import io
import json
import socket
import threading
import time

import pytest
from PIL import Image

from fedvlm_jax.asking import demo_server
from fedvlm_jax.asking.asker import Answer, Sample
from fedvlm_jax.asking.demo_requests import MOST_BODY, RefusedError, read_form
from fedvlm_jax.asking.demo_server import About, open_server
from fedvlm_jax.asking.question import Shown
from fedvlm_jax.errors import UserError

HOSTILE = '<script>alert("x")</script>'


def draw(size=(30, 20), kind="PNG"):
    Image.new("RGB", size, (200, 30, 90)).save(file := io.BytesIO(), kind)
    return file.getvalue()


class Fake:
    """Models that answer with what they were asked."""

    clients = ("ann", HOSTILE)
    most_pictures, chooses, max_pixels = 2, False, 10_000

    def __init__(self):
        self.asked = []

    def ask(self, client, question, shown):
        self.asked.append((client, question, shown.contents))
        if question == "long":
            return ["prompt too long"]
        if question == "fail":
            raise RuntimeError("out of\nmemory")
        return [{"personal": Answer(f"{client}\x1b[31m: {question}"), "zero_shot": Answer("a", (("a", 0.75),))}]

    def list_samples(self, client, most):
        if client not in self.clients:
            raise UserError(f"there is no client {client!r}")
        return [Sample(7, "What?", "a cat")][:most]

    def read_sample(self, number):
        assert number == 7
        return Shown((("picture 1",),), contents=(draw((600, 300)),))


@contextlib.contextmanager
def serving(host="127.0.0.1", samples=3):
    with open_server(host, 0) as server:
        server.models, server.samples, server.about = Fake(), samples, About("run", "plora", ("a note",))
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


def call(server, method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    sent = {
        "Host": f"127.0.0.1:{server.server_port}",
        **{name.replace("_", "-"): text for name, text in headers.items()},
    }
    connection.request(method, path, body, {name: text for name, text in sent.items() if text is not None})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer, content


def ask(server, body=None, **form):
    if body is None:
        given = {"client": "ann", "question": "What?", "pictures": [base64.b64encode(draw()).decode()], **form}
        body = json.dumps(given)
    answer, content = call(server, "POST", "/ask", body, Content_Type="application/json")
    return answer.status, json.loads(content)


def test_the_page_escapes_what_strangers_wrote_and_loads_nothing(server):
    answer, content = call(server, "GET", "/")
    page = content.decode()
    assert answer.status == 200
    assert HOSTILE not in page
    assert "&lt;script&gt;alert" in page
    assert "http://" not in page
    assert "https://" not in page
    policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    (nonce,) = {policy[name] for name in ("script-src", "style-src")}
    assert f'<script nonce="{nonce[7:-1]}">' in page
    again = call(server, "GET", "/")[0].headers["Content-Security-Policy"]
    assert nonce not in again, "a nonce serves once"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_a_question_is_answered(server):
    status, told = ask(server, client=HOSTILE, question="  Was ist das? ")
    assert status == 200
    assert [each["model"] for each in told["answers"]] == ["zero-shot", "personal model"]
    assert told["answers"][1]["answer"] == HOSTILE + "\\x1b[31m: Was ist das?", "what moves a cursor is written out"
    assert told["answers"][0]["classes"] == [{"name": "a", "probability": 0.75}]
    assert server.models.asked[-1] == (HOSTILE, "Was ist das?", (draw(),))


def test_samples_are_offered_shown_and_asked(server):
    offered = json.loads(call(server, "GET", "/samples?client=ann")[1])
    assert offered == {"samples": [{"number": 7, "question": "What?", "answer": "a cat"}]}
    answer, content = call(server, "GET", "/pictures/7?client=ann")
    assert answer.headers["Content-Type"] == "image/png"
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.size == (256, 128)
    assert ask(server, sample=7, pictures=[])[0] == 200
    assert server.models.asked[-1][2] == (draw((600, 300)),)
    assert ask(server, sample=8, pictures=[])[0] == 404, "no row that is not offered"
    assert call(server, "GET", "/pictures/8?client=ann")[0].status == 404
    assert call(server, "GET", "/samples?client=eve")[0].status == 400


def test_without_samples_no_row_is_shown():
    with serving(samples=0) as server:
        assert call(server, "GET", "/pictures/7?client=ann")[0].status == 404
        assert b'id="samples"' not in call(server, "GET", "/")[1]


BOMB = draw((200, 51))


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ({"question": " "}, "the question is empty"),
        ({"pictures": []}, "choose a picture first"),
        ({"pictures": ["bm8gcGljdHVyZQ=="]}, "the picture: broken or truncated image"),
        ({"pictures": [base64.b64encode(BOMB).decode()]}, "image of more than 10,000 pixels"),
        ({"pictures": ["%%%"]}, "the picture did not arrive whole"),
        ({"pictures": [3]}, "the picture did not arrive whole"),
        ({"pictures": ["bm8gcGljdHVyZQ=="] * 9}, "9 pictures of one question"),
        ({"question": "long"}, "prompt too long"),
        ({"question": 3}, "the request is not as this server's page sends it"),
        ({"sample": "7"}, "the request is not as this server's page sends it"),
        ({"body": "{"}, "the request is not as this server's page sends it"),
        ({"body": "[1]"}, "the request is not as this server's page sends it"),
        ({"body": "[" * 100_000}, "the request is not as this server's page sends it"),
        ({"question": "what \ud800 is"}, "has bytes that are no UTF-8"),
    ],
)
def test_bad_questions_are_refused_in_a_line(server, form, told):
    status, content = ask(server, **form)
    assert status == 400
    assert told in content["error"]
    assert "\n" not in content["error"]


def test_a_fault_of_ours_is_one_line_too(server):
    assert ask(server, question="fail") == (500, {"error": "RuntimeError: out of memory"})
    assert ask(server)[0] == 200, "and the next question is answered"


def test_other_sites_cannot_ask(server):
    """By their name for this machine, by a form, or from their page."""
    body, kind = json.dumps({"client": "ann"}), "application/json"
    here = f"http://127.0.0.1:{server.server_port}"
    for method, path in (("GET", "/"), ("POST", "/ask")):
        for host in ("evil.example", f"evil.example:{server.server_port}", "127.0.0.1", "", "[", "127.0.0.1:x"):
            assert call(server, method, path, body, Host=host, Content_Type=kind)[0].status == 421
    asked = len(server.models.asked)
    for headers in (
        {"Content_Type": "text/plain"},
        {"Content_Type": "multipart/form-data"},
        {"Content_Type": kind, "Origin": "http://evil.example"},
        {"Content_Type": kind, "Origin": "null"},
    ):
        assert call(server, "POST", "/ask", body, **headers)[0].status == 403
    assert call(server, "OPTIONS", "/ask", Origin="http://evil.example")[0].status == 501
    assert len(server.models.asked) == asked
    assert call(server, "POST", "/ask", body, Content_Type=kind, Origin=here)[0].status == 400  # it has no picture
    localhost = f"localhost:{server.server_port}"
    assert call(server, "GET", "/", Host=localhost)[0].status == 200


def test_paths_lead_nowhere_else(server):
    for path in ("/../etc/passwd", "/pictures/../../etc", "/pictures/x?client=ann", "/ask", f"/pictures/{'9' * 5000}"):
        assert call(server, "GET", path)[0].status == 404
    assert call(server, "POST", "/", "{}", Content_Type="application/json")[0].status == 404
    assert call(server, "PUT", "/ask", "{}")[0].status == 501


def test_uploads_are_bounded_before_they_are_read(server):
    for length, status in ((str(MOST_BODY + 1), 413), ("-1", 411), ("x", 411), ("9" * 5000, 411)):
        with socket.create_connection(("127.0.0.1", server.server_port), 10) as connection:
            head = f"POST /ask HTTP/1.0\r\nHost: 127.0.0.1:{server.server_port}\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode())
            assert connection.recv(100).split()[1] == str(status).encode()


def test_questions_wait_in_a_short_line(server, monkeypatch):
    held = threading.BoundedSemaphore(1)
    held.acquire()
    monkeypatch.setattr(server, "waiting", held)
    assert ask(server) == (503, {"error": "too many questions are waiting: try again"})


def test_a_silent_visitor_is_left(monkeypatch):
    monkeypatch.setattr(demo_server._Handler, "timeout", 0.2)
    with serving() as server, socket.create_connection(("127.0.0.1", server.server_port), 10) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n")
        assert connection.recv(10) == b""
        assert call(server, "GET", "/")[0].status == 200


def test_a_visitor_who_sends_a_byte_now_and_then_is_left(monkeypatch):
    """In the head of a request, and in its body, where a place in the line of questions is taken."""
    monkeypatch.setattr(demo_server, "REQUEST", 0.5)
    with serving() as server:
        head = f"POST /ask HTTP/1.0\r\nHost: 127.0.0.1:{server.server_port}\r\nContent-Type: application/json\r\n"
        for sent in ("GET / HTTP/1.0\r\n", f"{head}Content-Length: 1000\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", server.server_port), 10) as connection:
                connection.sendall(sent.encode())
                began = time.monotonic()
                with contextlib.suppress(OSError):
                    while time.monotonic() - began < 5:
                        connection.sendall(b"x")
                        time.sleep(0.05)
                assert time.monotonic() - began < 5
        monkeypatch.setattr(server.models, "ask", lambda *_: time.sleep(1) or ["slow"])
        assert ask(server) == (400, {"error": "slow"}), "an answer may take longer than a request"


def test_visitors_are_counted(monkeypatch):
    monkeypatch.setattr(demo_server, "VISITORS", 2)
    with serving() as server, contextlib.ExitStack() as held:
        for _ in range(2):
            held.enter_context(socket.create_connection(("127.0.0.1", server.server_port), 10))
        with pytest.raises((http.client.HTTPException, OSError)):
            call(server, "GET", "/")
        held.close()
        for _ in range(100):
            with contextlib.suppress(http.client.HTTPException, OSError):
                assert call(server, "GET", "/")[0].status == 200
                return
            time.sleep(0.05)
        pytest.fail("places that were left are not taken again")


def test_a_request_of_lists_alone_takes_no_memory(monkeypatch):
    """Of 44 MB that would be a gigabyte."""
    monkeypatch.setattr("json.loads", lambda body: pytest.fail("it was read"))
    with pytest.raises(RefusedError, match="not as this server's page sends it"):
        read_form(b'{"pictures":[' + b"[]," * 50_000 + b"[]]}")


def test_a_port_that_is_taken_is_told(server):
    for host, port, told in (
        ("127.0.0.1", server.server_port, rf"--port {server.server_port} of 127.0.0.1 is taken by another program"),
        ("no such host", 0, "--host no such host: there is no such host"),
        ("192.0.2.1", 0, "--port 0 of 192.0.2.1 cannot be had"),
    ):
        with pytest.raises(UserError, match=told):
            open_server(host, port)


def test_who_is_known_by_which_name():
    with open_server("127.0.0.1", 0) as server:
        port = server.server_port
        assert server.url == f"http://127.0.0.1:{port}/"
        assert all(server.knows(f"{name}:{port}") for name in ("localhost", "127.0.0.1", "[::1]"))
        assert not any(server.knows(host) for host in (f"192.0.2.1:{port}", f"localhost:{port + 1}", ""))
    with open_server("0.0.0.0", 0) as server:
        port = server.server_port
        assert server.knows(f"192.0.2.1:{port}")
        assert server.knows(f"{socket.gethostname()}:{port}")
        assert not server.knows(f"evil.example:{port}"), "no name that another site may give this machine"
