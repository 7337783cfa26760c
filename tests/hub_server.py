"""A server on this machine that speaks what an upload and a download use of the Hugging Face hub's protocol."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote


class HubServer(ThreadingHTTPServer):
    """Repositories with their commits; only requests with the token `hf_writer` may write."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}  # repository, commit, file
        self.private: dict[str, bool] = {}
        self.answered: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, repository: str, files: dict[str, bytes]) -> str:
        """Add a commit on top of the last one; gives its hash."""
        commits = self.commits.setdefault(repository, {})
        before = commits[list(commits)[-1]] if commits else {}
        name = hashlib.sha1(f"{repository} {len(commits)}".encode()).hexdigest()
        commits[name] = before | files
        return name


class Handler(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer_file(with_content=False)

    def do_GET(self) -> None:
        self.answer_file(with_content=True)

    def do_POST(self) -> None:
        body = self.body()
        self.server.answered.append(f"POST {self.path}")
        if self.headers.get("Authorization") != "Bearer hf_writer":
            self.answer(401, {"error": "Invalid credentials in Authorization header"})
        elif self.path == "/api/repos/create":
            wanted = json.loads(body)
            repository = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            if repository in self.server.commits:
                self.answer(409, {"error": "You already created this model repo"})
            else:
                self.server.commits[repository] = {}
                self.server.private[repository] = wanted.get("private", wanted.get("visibility") == "private")
                self.answer(200, {"url": f"{self.server.url}/{repository}", "name": repository, "id": "1"})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif "/commit/" in self.path:
            repository = unquote(self.path).removeprefix("/api/models/").split("/commit/")[0]
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            name = self.server.commit(repository, files)
            url = f"{self.server.url}/{repository}/commit/{name}"
            self.answer(200, {"success": True, "commitOid": name, "commitUrl": url, "hookOutput": ""})
        else:
            self.answer(404, {"error": f"tests answer no {self.path}"})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer_file(self, *, with_content: bool) -> None:
        self.server.answered.append(f"{self.command} {self.path}")
        repository, _, rest = unquote(self.path).lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        commits = self.server.commits.get(repository)
        if not commits:
            return self.answer(404, {"error": "Repository not found"}, code="RepoNotFound")
        revision = list(commits)[-1] if revision == "main" else revision
        if revision not in commits:
            return self.answer(404, {"error": "Invalid rev id"}, code="RevisionNotFound")
        if name not in commits[revision]:
            return self.answer(404, {"error": "Entry not found"}, code="EntryNotFound")
        content = commits[revision][name]
        self.send_response(200)
        self.send_header("X-Repo-Commit", revision)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_content:
            self.wfile.write(content)
        return None

    def answer(self, status: int, content: dict, code: str | None = None) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)


@contextmanager
def running_hub() -> Iterator[HubServer]:
    with HubServer() as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
