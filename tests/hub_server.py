"""A small server that answers as the Hugging Face Hub does, and misbehaves on demand."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

COMMIT = "c0ffee" + "0" * 34
REPOSITORY = "somebody/tiny"


@dataclass
class Hub:
    """What the server holds and how it behaves; files above ``large_bytes`` are stored as the hub stores large ones."""

    files: dict[str, bytes]
    endpoint: str = ""
    large_bytes: int = 100
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    """(path, Range header) of every request."""
    cut_after: dict[str, list[int]] = field(default_factory=dict)
    """File -> bytes after which each coming answer breaks off."""
    corrupt: dict[str, int] = field(default_factory=dict)
    """File -> how many coming answers have a wrong byte."""
    ignores_range: bool = False
    refusal: tuple[int, dict[str, str]] | None = None
    """Status and headers of every answer."""
    listing: bytes | None = None
    """Instead of the metadata."""

    def metadata(self) -> bytes:
        if self.listing is not None:
            return self.listing
        siblings = []
        for name, content in self.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            sibling = {"rfilename": name, "size": len(content), "blobId": blob}
            if len(content) > self.large_bytes:
                sibling["lfs"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 130}
            siblings.append(sibling)
        return json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}).encode()

    def fetched(self) -> list[str]:
        """Names of the files asked for, in order."""
        return [path.split("/cdn/")[1] for path, _ in self.requests if "/cdn/" in path]

    def ranges(self, name: str) -> list[str | None]:
        return [wanted for path, wanted in self.requests if path == f"/cdn/{name}"]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        hub, path = self.hub, self.path.split("?")[0]
        hub.requests.append((path, self.headers.get("Range")))
        if hub.refusal is not None:
            return self._answer(*hub.refusal, b"")
        if path.startswith("/api/models/"):
            known = (f"/api/models/{REPOSITORY}", *(f"/api/models/{REPOSITORY}/revision/{name}" for name in ("main", "v2", COMMIT)))
            if path in known:
                return self._answer(200, {"Content-Type": "application/json"}, hub.metadata())
            code = "RevisionNotFound" if f"{REPOSITORY}/revision" in path else "RepoNotFound"
            return self._answer(404 if code == "RevisionNotFound" else 401, {"X-Error-Code": code}, b"{}")
        resolved = re.fullmatch(rf"/{REPOSITORY}/resolve/{COMMIT}/(.+)", path)
        if resolved:
            return self._answer(302, {"Location": f"{hub.endpoint}/cdn/{resolved[1]}"}, b"")
        return self._file(path.removeprefix("/cdn/"))

    def _file(self, name: str) -> None:
        content = self.hub.files[name]
        if self.hub.corrupt.get(name, 0) > 0:
            self.hub.corrupt[name] -= 1
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        ranged = start is not None and not self.hub.ignores_range
        body = content[int(start[1]) :] if start and ranged else content
        cuts = self.hub.cut_after.get(name)
        sent = body[: cuts.pop(0)] if cuts else body
        self._answer(206 if ranged else 200, {}, sent, len(body))

    def _answer(self, status: int, headers: dict[str, str], body: bytes, announced: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if announced is None else announced))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def use_as_default(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Make ``endpoint`` the hub of this process, as HF_ENDPOINT would have if it had been set before."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[Hub]:
    """Run the server on a free local port."""
    hub = Hub(dict(files))
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
