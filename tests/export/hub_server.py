"""A hub on this machine, as far as an upload asks it: repositories, cards, large files by Git LFS, commits; and files.

What it answers is what huggingface_hub's own client reads: it stands in for the server alone.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

TOKEN = "hf_of_the_tests"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


class Hub(ThreadingHTTPServer):
    """Repositories by name; `broken` has the ends of paths that are answered with an error."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories, self.objects, self.broken = {}, {}, set()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def create(self, asked):
        name = f"{asked['organization']}/{asked['name']}"
        there = name in self.repositories
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.repositories.setdefault(name, Repository(private))
        return 409 if there else 200, {"url": f"{self.address}/{name}"}

    def check_card(self, content):
        """As the hub does: the base is a model of the hub's, and the licence one of a list, or named."""
        about = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)[1])
        wrong = not re.fullmatch(r"[\w.-]+/[\w.-]+", about.get("base_model", "a/b")) or about["license"] != "other"
        return (400 if wrong else 200), {"errors": [{"message": f"wrong: {about}"}] if wrong else [], "warnings": []}

    def choose_modes(self, files):
        return 200, {"files": [
            {"path": path, "uploadMode": "lfs" if path.endswith(".safetensors") else "regular", "shouldIgnore": False}
            for path in (file["path"] for file in files)
        ]}  # fmt: skip

    def offer(self, objects):
        places = [{**each, "actions": {"upload": {"href": f"{self.address}/lfs/{each['oid']}"}}} for each in objects]
        return 200, {"transfer": "basic", "objects": places}

    def commit(self, name, lines):
        repository = self.repositories[name]
        for line in map(json.loads, lines.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository.commits.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile"
                repository.files[value["path"]] = self.objects[value["oid"]]
        return 200, {"commitUrl": f"{self.address}/{name}/commit/1", "commitOid": "1" * 40}


class Answer(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.say(401, {"error": "Invalid username or password."})
        path = self.path.partition("?")[0]
        if any(path.endswith(end) for end in self.server.broken):
            return self.say(400, {"error": "out of order"})
        if match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            return self.say(*self.server.commit(match[1], body))
        asked = json.loads(body)
        if path == "/api/repos/create":
            return self.say(*self.server.create(asked))
        if path == "/api/validate-yaml":
            return self.say(*self.server.check_card(asked["content"]))
        if path.endswith("/preupload/main"):
            return self.say(*self.server.choose_modes(asked["files"]))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.say(*self.server.offer(asked["objects"]))
        return self.say(404, {"error": path})

    def do_PUT(self):
        content, name = self.rfile.read(int(self.headers["Content-Length"])), self.path.rpartition("/")[2]
        whole = hashlib.sha256(content).hexdigest() == name
        if whole:
            self.server.objects[name] = content
        self.say(200 if whole else 400, {})

    def do_HEAD(self):
        self.give(whole=False)

    def do_GET(self):
        self.give(whole=True)

    def give(self, *, whole):
        """A file of a repository, to those who may read it."""
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path)
        repository = self.server.repositories.get(match[1]) if match else None
        known = self.headers["Authorization"] == f"Bearer {TOKEN}"
        if repository is None or (repository.private and not known) or match[2] not in repository.files:
            missing = "Entry" if repository is not None and known else "Repo"
            self.send_response(404)
            self.send_header("X-Error-Code", f"{missing}NotFound")
            return self.end_headers()
        content = repository.files[match[2]]
        self.send_response(200)
        self.send_header("X-Repo-Commit", "1" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return self.wfile.write(content) if whole else None

    def say(self, status, content):
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@contextmanager
def open_hub():
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
