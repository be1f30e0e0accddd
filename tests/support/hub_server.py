"""A Hub on 127.0.0.1, with just enough of the protocol for `huggingface_hub` to read from it and push to it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.support.hub_repositories import Hub, Refused, file_hash, git_hash, is_large


NAME, REVISION = "(?P<name>(?:spaces/)?[^/]+/[^/]+)", "(?P<revision>[^/]+)"
API = f"/api/(?:models/|(?=spaces/)){NAME}"
# The requests we handle: HTTP method, path, and the method of `HubHandler` that answers.
ROUTES = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("GET", f"{API}(?:/revision/{REVISION})?", "info"),
    ("GET", f"{API}/tree/{REVISION}", "tree"),
    ("GET", f"{API}/refs", "refs"),
    ("GET", f"/{NAME}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate_card"),
    ("POST", f"{API}/branch/(?P<branch>[^/]+)", "create_branch"),
    ("POST", f"{API}/preupload/{REVISION}", "choose_upload_modes"),
    ("POST", f"/{NAME}\\.git/info/lfs/objects/batch", "plan_large_files"),
    ("PUT", "/large-files/(?P<oid>[0-9a-f]{64})", "store_large_file"),
    ("POST", "/large-files/(?P<oid>[0-9a-f]{64})/verify", "verify_large_file"),
    ("POST", f"{API}/commit/{REVISION}", "commit"),
]


class HubHandler(BaseHTTPRequestHandler):
    """Answers requests. The methods in `ROUTES` return a value to send as JSON, or send their own response."""

    def answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub: Hub = self.server.hub
        path, method = urlsplit(self.path).path, "GET" if self.command == "HEAD" else self.command
        matches = ((re.fullmatch(pattern, path), name) for verb, pattern, name in ROUTES if verb == method)
        try:
            match, name = next((pair for pair in matches if pair[0]), (None, None))
            if match is None:
                raise Refused(404, f"The tests' Hub does not know {method} {path}")
            arguments = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
            content = getattr(self, name)(**arguments)
            if content is not None:
                self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})
        except Refused as refused:
            self.refuse(refused)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.server.requests.append((status, self.command, self.path))
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, refused: Refused, **more: str) -> None:
        headers = {"Content-Type": "application/json", "X-Error-Message": refused.message}
        if refused.code is not None:
            headers["X-Error-Code"] = refused.code
        self.reply(refused.status, json.dumps({"error": refused.message, **more}).encode(), headers)

    def log_message(self, *args) -> None:
        """Prints nothing: requests are recorded in `server.requests` instead."""

    # Reading

    def whoami(self) -> dict:
        if self.token not in self.hub.tokens:
            raise Refused(401, "Invalid username or password.")
        role = "read" if self.token.startswith("read") else "write"
        auth = {"type": "access_token", "accessToken": {"displayName": "token", "role": role}}
        return {"type": "user", "name": self.hub.tokens[self.token], "orgs": [], "auth": auth}

    def info(self, name: str, revision: str = "main") -> dict:
        repository = self.hub.read(name, self.token)
        sha = repository.find(revision)
        siblings = [{"rfilename": path} for path in repository.commits[sha]]
        return {"_id": "0", "id": name, "sha": sha, "private": repository.private, "siblings": siblings}

    def tree(self, name: str, revision: str) -> list[dict]:
        repository = self.hub.read(name, self.token)
        files = repository.commits[repository.find(revision)]
        return [{"type": "file", "path": path, "size": len(b), "oid": git_hash(b)} for path, b in files.items()]

    def refs(self, name: str) -> dict:
        branches = self.hub.read(name, self.token).branches.items()
        listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches]
        return {"branches": listed, "converts": [], "tags": []}

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository = self.hub.read(name, self.token)
        sha = repository.find(revision)
        body = repository.commits[sha].get(path)
        if body is None:
            headers = {"X-Repo-Commit": sha, "X-Error-Code": "EntryNotFound"}
            return self.reply(404, b"", headers)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{git_hash(body)}"'}
        if is_large(path):
            headers |= {"X-Linked-Etag": f'"{file_hash(path, body)}"', "X-Linked-Size": str(len(body))}
        return self.reply(200, body, headers)

    # Writing

    def create(self) -> dict | None:
        wanted = json.loads(self.body)
        is_space = wanted.get("type") == "space"
        if is_space and wanted.get("sdk") not in ("gradio", "docker", "static"):
            raise Refused(400, "A Space needs an SDK")
        name = f"{wanted['organization'] or self.hub.tokens.get(self.token)}/{wanted['name']}"
        name = f"spaces/{name}" if is_space else name
        url = f"{self.server.url}/{name}"
        if not self.hub.create(name, wanted.get("visibility") == "private", self.token):
            return self.refuse(Refused(409, "You already created this repo"), url=url)
        return {"url": url}

    def validate_card(self) -> dict:
        return {"errors": [], "warnings": []}

    def create_branch(self, name: str, branch: str) -> dict:
        repository = self.hub.write(name, self.token)
        if branch in repository.branches:
            raise Refused(409, f"Reference refs/heads/{branch} already exists")
        repository.branches[branch] = repository.branches["main"]
        return {}

    def choose_upload_modes(self, name: str, revision: str) -> dict:
        repository = self.hub.write(name, self.token)
        present = repository.commits[repository.find(revision)]
        answers = []
        for path in (file["path"] for file in json.loads(self.body)["files"]):
            mode = "lfs" if is_large(path) else "regular"
            oid = file_hash(path, present[path]) if path in present else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def plan_large_files(self, name: str) -> dict:
        self.hub.write(name, self.token)
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            href = f"{self.server.url}/large-files/{entry['oid']}"
            if entry["oid"] not in self.hub.large_files:
                entry["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        return {"transfer": "basic", "objects": objects}

    def store_large_file(self, oid: str) -> dict:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "The content does not have the announced SHA-256")
        self.hub.large_files[oid] = self.body
        return {}

    def verify_large_file(self, oid: str) -> dict:
        if len(self.hub.large_files.get(oid, b"")) != json.loads(self.body)["size"]:
            raise Refused(404, "The file was not uploaded")
        return {}

    def commit(self, name: str, revision: str) -> dict:
        repository = self.hub.write(name, self.token)
        sha = self.hub.apply(repository, revision, [json.loads(line) for line in self.body.splitlines()])
        return {"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha}


@contextmanager
def serve_hub(
    repositories: dict[str, Path] | None = None, tokens: dict[str, str] | None = None
) -> Iterator[ThreadingHTTPServer]:
    """
    Serves repositories of models and Spaces within the context.

    Args:
        repositories (`dict[str, Path]`, *optional*): Folders by `owner/name`, each served as a single commit.
        tokens (`dict[str, str]`, *optional*): The user each token belongs to; without any, nothing can be pushed.

    Yields:
        The server: `server.url` is the value for `HF_ENDPOINT`, `server.requests` the requests so far as
        `(status, method, path)`, and `server.hub` the content of the repositories.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.hub = Hub(repositories or {}, tokens or {})
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


def connect(monkeypatch: pytest.MonkeyPatch, server: ThreadingHTTPServer, token: str | None, home: Path) -> None:
    """
    Points `huggingface_hub` in this process to a server from [`serve_hub`]. It reads its environment at import, so
    setting variables now would be too late.

    Args:
        monkeypatch (`pytest.MonkeyPatch`): Undoes the changes after the test.
        server (`ThreadingHTTPServer`): The server.
        token (`str`, *optional*): The token of the logged-in user, if any.
        home (`Path`): An empty folder, so that the real user's login is not found.
    """
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # the server speaks LFS only
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setenv("HF_TOKEN", token or "")
