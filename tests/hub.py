"""A stand-in for the Hugging Face hub: an HTTP server with the endpoints that huggingface_hub uses for models.

Repositories live in memory. Only requests with the right token are answered, a commit applies as a whole or not at all,
and an uploaded file must have the announced hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest
from huggingface_hub import constants

TOKEN = "hf_of_the_test"


class Hub(ThreadingHTTPServer):
    """`repositories` maps "owner/name" to path -> contents. `refuse(path)` may return a status to answer with."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.uploaded: dict[str, bytes] = {}  # sha256 -> contents
        self.commits = 0
        self.refuse: Any = lambda path: None


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    """A running stand-in, which huggingface_hub takes for the hub."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_POST(self) -> None:
        self._answer()

    do_PUT = do_GET = do_HEAD = do_POST

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self) -> None:
        body = self._body()
        path = urlsplit(self.path).path
        if status := self.server.refuse(path):
            return self._send(status, {"error": "refused by the test"})
        if not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid username or password."})
        parts = path.strip("/").split("/")
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if parts[0] == "lfs":
            self.server.uploaded[hashlib.sha256(body).hexdigest()] = body
            return self._send(200, {})
        name = "/".join(parts[:2] if parts[0] != "api" else parts[2:4]).removesuffix(".git")
        files = self.server.repositories.get(name)
        if files is None:
            return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                item | {"actions": {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            return self._send(200, {"transfer": "basic", "objects": objects})
        if parts[0] != "api":
            return self._file(files, "/".join(parts[4:]))
        action = parts[4]
        if action == "preupload":
            kinds = {True: "lfs", False: "regular"}
            listed = [
                {"path": f["path"], "uploadMode": kinds[f["path"].endswith(".safetensors")], "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self._send(200, {"files": listed})
        if action == "tree":
            return self._send(200, [{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in files.items()])
        if action == "commit":
            return self._commit(name, [json.loads(line) for line in body.splitlines()])
        info = {"id": name, "sha": _sha(files), "siblings": [{"rfilename": path} for path in files]}
        return self._send(200, info | {"private": False, "tags": [], "downloads": 0, "likes": 0})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        known = name in self.server.repositories
        if not known:
            self.server.repositories[name] = {".gitattributes": b"*.safetensors filter=lfs"}
            self.server.private[name] = wanted.get("visibility") == "private" or wanted.get("private", False)
        self._send(409 if known else 200, {"url": f"{self.server.url}/{name}", "id": name})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = dict(self.server.repositories[name])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.uploaded[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.server.repositories[name] = files
        self.server.commits += 1
        sha = _sha(files)
        self._send(200, {"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha})

    def _file(self, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            return self._send(404, {}, {"X-Error-Code": "EntryNotFound"})
        tag = hashlib.sha256(files[path]).hexdigest()
        self._send(200, files[path], {"ETag": f'"{tag}"', "X-Repo-Commit": _sha(files)})

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in (
            {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})
        ).items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _sha(files: dict[str, bytes]) -> str:
    """A commit's id, 40 hexadecimal digits."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
