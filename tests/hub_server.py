"""A Hub on 127.0.0.1 that serves repositories from folders, in as much of the protocol as `huggingface_hub` needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


COMMIT = hashlib.sha1(b"the only commit").hexdigest()


class HubHandler(BaseHTTPRequestHandler):
    """Answers `/api/models/NAME[/revision/REV | /tree/REV]` and `/NAME/resolve/REV/FILE`; a `NAME` is `owner/name`."""

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def answer(self, with_body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        name, rest = "/".join(parts[2:4] if is_api else parts[:2]), parts[4:] if is_api else parts[2:]
        folder = self.server.repositories.get(name)
        if folder is None:
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"}, with_body)
        elif is_api:
            content = tree(folder) if rest[:1] == ["tree"] else model_info(name, folder)
            self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"}, with_body)
        elif rest[0] == "resolve" and (folder / "/".join(rest[2:])).is_file():
            body = (folder / "/".join(rest[2:])).read_bytes()
            self.reply(200, body, {"ETag": f'"{git_hash(body)}"'}, with_body)
        else:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body)

    def reply(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.server.requests.append((status, self.command, self.path))
        self.send_response(status)
        for key, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        """Requests are kept in `server.requests` instead of printed."""


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def git_hash(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def model_info(name: str, folder: Path) -> dict:
    siblings = [{"rfilename": path.relative_to(folder).as_posix()} for path in files(folder)]
    return {"_id": "0", "id": name, "modelId": name, "sha": COMMIT, "private": False, "siblings": siblings}


def tree(folder: Path) -> list[dict]:
    return [
        {
            "type": "file",
            "path": path.relative_to(folder).as_posix(),
            "size": path.stat().st_size,
            "oid": git_hash(path.read_bytes()),
        }
        for path in files(folder)
    ]


@contextmanager
def serve_hub(repositories: dict[str, Path]) -> Iterator[ThreadingHTTPServer]:
    """
    Serves folders as model repositories while the context lasts.

    Args:
        repositories (`dict[str, Path]`): Folders by `owner/name`.

    Yields:
        The server: `server.url` is the value for `HF_ENDPOINT`, `server.requests` what was asked, as
        `(status, method, path)`.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.repositories = repositories
    server.requests = []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
