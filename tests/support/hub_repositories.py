"""
The content of the tests' Hub: repositories of models, and of Spaces as `spaces/owner/name`, with branches and commits,
and who may write to them.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path


class Refused(Exception):
    """A response other than success: a status, a message and, if there is one, the Hub's own error code."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass
class Repository:
    """Each commit's files by path, and the latest commit of each branch."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        content = [len(self.commits), branch, {path: git_hash(body) for path, body in files.items()}]
        sha = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def find(self, revision: str) -> str:
        """The commit that a branch or commit hash refers to."""
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha


class Hub:
    """
    The repositories, and the contents of large files (git LFS) by their SHA-256.

    Args:
        folders (`dict[str, Path]`): The initial content of each repository (`owner/name`).
        tokens (`dict[str, str]`): The user each token belongs to; users own the repositories under their name. Tokens
            that begin with `read` may only read.
    """

    def __init__(self, folders: dict[str, Path], tokens: dict[str, str]):
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        for name, folder in folders.items():
            self.repositories[name] = Repository()
            self.repositories[name].commit("main", read_folder(folder))

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """A repository's files by path."""
        repository = self.repositories[name]
        return repository.commits[repository.find(revision)]

    def create(self, name: str, private: bool, token: str | None) -> bool:
        """Creates an empty repository; returns `False` if it already exists."""
        self._check_owner(name, token)
        if name in self.repositories:
            return False
        self.repositories[name] = Repository(private)
        self.repositories[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return True

    def read(self, name: str, token: str | None) -> Repository:
        repository = self.repositories.get(name)
        if repository is None or (repository.private and self.tokens.get(token) != name.split("/")[-2]):
            raise Refused(404 if token in self.tokens else 401, "Repository not found", "RepoNotFound")
        return repository

    def write(self, name: str, token: str | None) -> Repository:
        repository = self.read(name, token)
        self._check_owner(name, token)
        return repository

    def _check_owner(self, name: str, token: str | None) -> None:
        owner = name.split("/")[-2]
        if token not in self.tokens:
            raise Refused(401, "Invalid username or password.")
        if token.startswith("read"):
            raise Refused(403, "Forbidden: pass a token with write access.")
        if self.tokens[token] != owner:
            raise Refused(
                403, f'You don\'t have the rights to create or change a model under the namespace "{owner}".'
            )

    def apply(self, repository: Repository, branch: str, operations: list[dict]) -> str:
        """Commits the operations sent by `POST /commit`, one per line."""
        files = dict(repository.commits[repository.find(branch)])
        for key, value in ((operation["key"], operation["value"]) for operation in operations):
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.large_files[value["oid"]]
            elif key == "deletedFile" and files.pop(value["path"], None) is None:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
        return repository.commit(branch, files)


def read_folder(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".whl"))


def git_hash(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def file_hash(path: str, body: bytes) -> str:
    """The hash by which the Hub identifies a file."""
    return hashlib.sha256(body).hexdigest() if is_large(path) else git_hash(body)
