"""A Hugging Face Hub on this machine: the endpoints that huggingface_hub calls for downloads and uploads."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "1" * 40
OLD_COMMIT = "2" * 40


@dataclass
class Repository:
    """A model; its files at each revision's commit."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {COMMIT: {}})
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    gated: bool = False
    writable: bool = True
    private: bool = False

    def commit(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.revisions.get(revision)


def of_folder(folder: Path, **more: bytes) -> Repository:
    """A model with the files of a folder."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
    return Repository(commits={COMMIT: files | more})


class HubServer(ThreadingHTTPServer):
    """Serves repositories; notes what is asked and what is committed.

    Every answer may be another's (wrong_answer). Files may be broken (status 500) or withdrawn (404), but for ranges of
    them, end before they begin (cut), come so many times with a bit that is not theirs (flips), or a byte now and then
    (slow). It may say no hashes.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.account: dict[str, Any] | None = {
            "name": "me",
            "orgs": [{"name": "org"}],
            "auth": {"accessToken": {"role": "write"}},
        }
        self.asked: list[str] = []
        self.blobs: dict[str, bytes] = {}
        self.fail_commits = False
        self.wrong_answer: bytes | None = None
        self.broken_files: set[str] = set()
        self.withdrawn_files: set[str] = set()
        self.cut_files: set[str] = set()
        self.flips: dict[str, int] = {}
        self.slow_files: set[str] = set()
        self.says_hashes = True
        self.before_weights: Callable[[str], None] = lambda file: None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def bytes_of_weights(self) -> int:
        """Number of requests of whole files of weights."""
        return sum(line.startswith("GET") and line.endswith(".safetensors") for line in self.asked)


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.0"  # no connection outlives the server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        ranged = " ranged" if self.headers.get("Range") else ""
        self.server.asked.append(f"{self.command} {path}{ranged}")
        if self.server.wrong_answer is not None:
            self._send(200, self.server.wrong_answer, {"Content-Type": "application/json"})
        elif path == "/api/whoami-v2":
            account = self.server.account
            self._json(account or {"error": "Invalid"}, 200 if account else 401)
        elif path == "/api/validate-yaml":
            self._json({"warnings": [], "errors": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.startswith("/upload/"):
            self.server.blobs[path.removeprefix("/upload/")] = body
            self._send(200, b"")
        elif found := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            self._batch(json.loads(body))
        elif found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/([\w-]+)(?:/(.+))?)?", path):
            self._model(found[1], found[2], found[3], body)
        elif found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", urlsplit(self.path).path):
            self._resolve(*map(unquote, found.groups()))  # a revision may have slashes
        else:
            self._json({"error": f"unknown {path}"}, 404)

    def _found(self, name: str) -> Repository | None:
        """The repository; None after an answer that there is none."""
        repository = self.server.repositories.get(name)
        if repository is None:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        return repository

    def _model(self, name: str, action: str | None, rest: str | None, body: bytes) -> None:
        repository = self._found(name)
        if repository is None:
            return
        if action == "auth-check":
            self._json({}, 200 if repository.writable else 403)
            return
        revision = rest if rest and action in ("revision", "tree", "preupload", "commit") else "main"
        commit = repository.commit(revision)
        if commit is None:
            self._json({"error": "Revision not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return
        files = repository.commits[commit]
        if action in (None, "revision"):
            siblings = [self._sibling(name, content) for name, content in files.items()]
            self._json({"id": name, "modelId": name, "sha": commit, "siblings": siblings, "gated": repository.gated})
        elif action == "tree":
            tree = [{"type": "file", "path": n, "size": len(c), "oid": _oid(c)} for n, c in files.items()]
            self._json(tree)
        elif action == "preupload":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._json({"files": modes})
        elif action == "commit":
            self._commit(name, files, body)

    def _sibling(self, name: str, content: bytes) -> dict[str, Any]:
        sibling = {"rfilename": name, "size": len(content), "blobId": _oid(content)}
        if not (self.server.says_hashes and name.endswith(".safetensors")):
            return sibling
        sha256 = hashlib.sha256(content).hexdigest()
        return sibling | {"lfs": {"size": len(content), "sha256": sha256, "pointerSize": 134}}

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repository = self._found(name)
        if repository is None:
            return
        if repository.gated:
            self._json({"error": "gated"}, 403, {"X-Error-Code": "GatedRepo"})
            return
        if file in self.server.broken_files and not self.headers.get("Range"):  # headers of weights are still read
            self._json({"error": "broken"}, 500)
            return
        commit = repository.commit(revision)
        content = repository.commits[commit].get(file) if commit else None
        withdrawn = file in self.server.withdrawn_files and not self.headers.get("Range")
        if content is None or withdrawn:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"X-Repo-Commit": str(commit), "ETag": f'"{_oid(content)}"', "X-Linked-Size": str(len(content))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            part = content[int(asked[1]) : int(asked[2] or len(content)) + 1]
            self._send(206, part, headers)
        else:
            if self.command == "GET" and file.endswith(".safetensors"):
                self.server.before_weights(file)
            if self.command == "GET" and self.server.flips.get(file):
                self.server.flips[file] -= 1
                content = content[:-1] + bytes([content[-1] ^ 1])
            self._send(200, content, headers, cut=file in self.server.cut_files, slow=file in self.server.slow_files)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.server.repositories:
            self._json({"error": "exists", "url": f"{self.server.address}/{name}"}, 409)
            return
        self.server.repositories[name] = Repository(private=asked.get("visibility") == "private")
        self._json({"url": f"{self.server.address}/{name}"})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.server.address}/upload/{one['oid']}"}}}
            for one in asked["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, files: dict[str, bytes], body: bytes) -> None:
        if self.server.fail_commits:
            self._json({"error": "no space left in the account"}, 403)
            return
        for line in body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        url = f"{self.server.address}/{name}/commit/{COMMIT}"
        self._json({"success": True, "commitOid": COMMIT, "commitUrl": url})

    def _json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(
        self,
        status: int,
        content: bytes,
        headers: dict[str, str] | None = None,
        cut: bool = False,
        slow: bool = False,
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD" or cut:
            return
        with contextlib.suppress(ConnectionError):  # nobody listens any more
            for byte in content if slow else b"":
                self.wfile.write(bytes([byte]))
                time.sleep(0.1)
            self.wfile.write(b"" if slow else content)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
