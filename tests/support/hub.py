# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A model hub for tests: as much of Hugging Face's and of ModelScope's API as their clients ask for, with faults on order.

    with Hub() as hub:
        hub.add("org/model", {"config.json": b"{}", "model.safetensors": weights})
        hub.fault("*.safetensors", "drop", after=20000, times=2)

Both APIs serve the same repositories; a file of LFS lies behind a redirect to /store, as in reality. As a program it serves
DIRECTORY/<owner>/<name>/ until it is stopped: hub.py DIRECTORY [--host HOST] [--port PORT].
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import http.server
import json
import ssl
import threading
import time
import typing as t
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path

# What is at least so large is a file of LFS.
LFS = 1024


def blob_name(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # noqa: S324 - Git's name of it


@dataclass
class Repository:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    token: str = ""
    gated: bool = False

    def commit_of(self, revision: str) -> str:
        return self.branches.get(revision) or (revision if revision in self.commits else "")


@dataclass
class Fault:
    """The next TIMES answers about files like PATTERN go wrong.

    drop: the line breaks AFTER bytes. status: STATUS, with Retry-After where WAIT is. slow: RATE bytes a second. wrong: other bytes.
    short: a whole answer that ends AFTER bytes. whole: Range is ignored. not_json: a page of some proxy.
    """

    pattern: str
    kind: str
    times: int = 1
    after: int = 0
    status: int = 500
    wait: int | None = None
    rate: int = 100_000


@dataclass
class Asked:
    method: str
    path: str
    file: str
    offset: int
    token: str
    status: int = 0
    sent: int = 0


class Hub:
    def __init__(self, host: str = "127.0.0.1", port: int = 0, certificate: Path | None = None) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.asked: list[Asked] = []
        self.lock = threading.Lock()
        # what a listing says in place of the truth, by path
        self.listed: dict[str, dict[str, t.Any]] = {}
        hub = self

        class Handler(Answer):
            pass

        Handler.hub = hub
        self.server = http.server.ThreadingHTTPServer((host, port), Handler)
        self.server.daemon_threads = True
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.url = f"http{'s' if certificate else ''}://{host}:{self.server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, files: dict[str, bytes], token: str = "", gated: bool = False, tag: str = "") -> str:
        """A new commit, which the default branches (and TAG) are then at."""
        repository = self.repositories.setdefault(name, Repository())
        commit = hashlib.sha1(repr((name, len(repository.commits), sorted(files))).encode()).hexdigest()  # noqa: S324 - as Git names it
        repository.commits[commit] = dict(files)
        repository.branches.update(dict.fromkeys(["main", "master", *([tag] if tag else [])], commit))
        repository.token, repository.gated = token, gated
        return commit

    def fault(self, pattern: str, kind: str, **values: t.Any) -> None:
        with self.lock:
            self.faults.append(Fault(pattern, kind, **values))

    def due(self, file: str, kinds: tuple[str, ...]) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.kind in kinds and fnmatch.fnmatch(file, fault.pattern):
                    fault.times -= 1
                    return fault
        return None

    def sent(self, pattern: str = "*") -> int:
        """Bytes of files that went out."""
        return sum(one.sent for one in self.asked if one.file and fnmatch.fnmatch(one.file, pattern))


class Answer(http.server.BaseHTTPRequestHandler):
    hub: t.ClassVar[Hub]
    protocol_version = "HTTP/1.1"
    record: Asked

    def log_message(self, *_arguments: t.Any) -> None:
        pass

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        path, query = urllib.parse.unquote(url.path), dict(urllib.parse.parse_qsl(url.query))
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
        text = self.headers.get("Range", "")
        offset = int(text.removeprefix("bytes=").partition("-")[0]) if text.startswith("bytes=") else 0
        self.record = Asked(self.command, path, "", offset, bearer)
        self.hub.asked.append(self.record)
        try:
            if path.startswith("/store/"):
                self.store(path.removeprefix("/store/"))
            elif path.startswith("/api/v1/models/"):
                self.modelscope(path.removeprefix("/api/v1/models/"), query)
            elif path.startswith("/api/models/"):
                self.model_info(path.removeprefix("/api/models/"))
            elif "/resolve/" in path:
                self.resolve(path.lstrip("/"))
            else:
                self.say(404, {"error": "not here"})
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_HEAD = do_GET

    # ------------------------------------------------------------ answers

    def say(self, status: int, body: t.Any, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.record.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def wrong(self, file: str) -> bool:
        fault = self.hub.due(file, ("status", "not_json"))
        if fault and fault.kind == "not_json":
            self.say(200, b"<html>Please log in to this network</html>", Content_Type="text/html")
        elif fault:
            headers = {} if fault.wait is None else {"Retry_After": str(fault.wait)}
            self.say(fault.status, {"Code": fault.status, "Message": "a fault that was ordered"}, X_Error_Message="a fault that was ordered", **headers)
        return fault is not None

    def bytes_of(self, file: str, data: bytes, **headers: str) -> None:
        """The file, or the rest of it, or what a fault makes of it."""
        if self.wrong(file):
            return
        fault = self.hub.due(file, ("drop", "slow", "wrong", "short", "whole"))
        self.record.file = file
        kind, offset = fault.kind if fault else "", self.record.offset
        if kind == "wrong":
            data = bytes(byte ^ 1 for byte in data[:16]) + data[16:]
        if kind == "short" and fault:
            data = data[: fault.after]
        if kind == "whole":
            offset = 0
        if offset >= len(data) and offset:
            self.say(416, b"", Content_Range=f"bytes */{len(data)}")
            return
        rest = data[offset:]
        self.record.status = 206 if offset else 200
        self.send_response(self.record.status)
        self.send_header("Content-Length", str(len(rest)))
        self.send_header("Accept-Ranges", "bytes")
        if offset:
            self.send_header("Content-Range", f"bytes {offset}-{len(data) - 1}/{len(data)}")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind == "drop" and fault:
            rest, self.close_connection = rest[: fault.after], True
        step = max(1, fault.rate // 20) if kind == "slow" and fault else 65536
        for at in range(0, len(rest), step):
            self.wfile.write(rest[at : at + step])
            self.record.sent += len(rest[at : at + step])
            if kind == "slow":
                time.sleep(0.05)

    def allowed(self, repository: Repository | None) -> bool:
        return repository is not None and (not repository.token or self.record.token == repository.token)

    # ------------------------------------------------------------ Hugging Face

    def model_info(self, path: str) -> None:
        name, _revision, revision = path.partition("/revision/")
        repository = self.hub.repositories.get(name)
        if self.wrong(name):
            return
        if repository is None or not (repository.gated or self.allowed(repository)):
            # nobody learns whether it is private or not there
            self.say(401, {"error": "Invalid username or password."}, X_Error_Message="Invalid username or password.")
            return
        commit = repository.commit_of(revision or "main")
        if not commit:
            self.say(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id: " + revision)
            return
        siblings = []
        for file, data in repository.commits[commit].items():
            entry: dict[str, t.Any] = {"rfilename": file, "size": len(data), "blobId": blob_name(data)}
            if len(data) >= LFS:
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append({**entry, **self.hub.listed.get(file, {})})
        self.say(200, {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "private": False, "tags": [], "downloads": 0})

    def resolve(self, path: str) -> None:
        name, _resolve, rest = path.partition("/resolve/")
        revision, _slash, file = rest.partition("/")
        repository = self.hub.repositories.get(name)
        if repository is None or not self.allowed(repository):
            code = "GatedRepo" if repository and repository.gated else "RepoNotFound"
            self.say(401, b"", X_Error_Code=code, X_Error_Message=f"Access to model {name} is restricted.")
            return
        commit = repository.commit_of(revision)
        if not commit or file not in repository.commits[commit]:
            self.say(404, b"", X_Error_Code="EntryNotFound" if commit else "RevisionNotFound", X_Error_Message="not found: " + rest)
            return
        self.deliver(file, repository.commits[commit][file], X_Repo_Commit=commit)

    def deliver(self, file: str, data: bytes, **headers: str) -> None:
        if len(data) < LFS:
            self.bytes_of(file, data, ETag=f'"{blob_name(data)}"', **headers)
            return
        name = hashlib.sha256(data).hexdigest()
        if self.wrong(file):
            return
        self.say(302, b"", Location=f"{self.hub.url}/store/{name}/{urllib.parse.quote(file)}?Signature=SECRET-SIGNATURE", X_Linked_Size=str(len(data)),
                 X_Linked_ETag=f'"{name}"', **headers)  # fmt: skip

    def store(self, path: str) -> None:
        name, _slash, file = path.partition("/")
        for repository in self.hub.repositories.values():
            for files in repository.commits.values():
                if file in files and hashlib.sha256(files[file]).hexdigest() == name:
                    self.bytes_of(file, files[file], ETag=f'"{name}"')
                    return
        self.say(404, b"")

    # ------------------------------------------------------------ ModelScope

    def modelscope(self, path: str, query: dict[str, str]) -> None:
        name, _repo, what = path.partition("/repo")
        repository = self.hub.repositories.get(name)
        if what == "/files" and self.wrong(name):
            return
        if repository is None or not self.allowed(repository):
            self.say(404, {"Code": 10010205001, "Message": f"model {name} is not there or not yours", "RequestId": "1", "Success": False})
            return
        commit = repository.commit_of(query.get("Revision", "master"))
        if not commit:
            self.say(404, {"Code": 10010204001, "Message": f"no such revision {query.get('Revision')}", "RequestId": "1", "Success": False})
            return
        files = repository.commits[commit]
        if what == "/files":
            directories = {str(parent) for file in files for parent in Path(file).parents if str(parent) != "."}
            entries: list[dict[str, t.Any]] = [{"Path": one, "Name": Path(one).name, "Type": "tree", "Size": 0, "Sha256": ""} for one in sorted(directories)]
            for file, data in files.items():
                entry = {"Path": file, "Name": Path(file).name, "Type": "blob", "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}
                entries.append({**entry, "IsLFS": len(data) >= LFS, "Revision": commit, **self.hub.listed.get(file, {})})
            self.say(200, {"Code": 200, "Success": True, "Message": "", "Data": {"Files": entries, "LatestCommitter": {"Id": "", "ShortId": commit[:8]}}})
        elif query.get("FilePath") in files:
            self.deliver(query["FilePath"], files[query["FilePath"]])
        else:
            self.say(404, {"Code": 10010204002, "Message": f"no such file {query.get('FilePath')}", "RequestId": "1", "Success": False})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    given = parser.parse_args()
    with Hub(given.host, given.port) as hub:
        for directory in given.directory.glob("*/*"):
            files = {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
            hub.add("/".join(directory.parts[-2:]), files)
        print(hub.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
