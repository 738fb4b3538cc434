# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Builds engines and fetches weights, telling how far it is. Private to the role selfhosted.fastgpt.model_server.

It takes a job as JSON on standard input and runs on when the play that started it is killed: a later one waits for it.
--progress tells the state of the running job: at once when it has ended, else after a while that grows with its age.
"""

from __future__ import annotations

import argparse
import base64
import errno
import fcntl
import fnmatch
import hashlib
import http.client
import json
import lzma
import math
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Callable

RUN = Path(os.environ.get("MODEL_SERVER_RUN", "/run/selfhosted-model"))
STATUS = RUN / "prepare.json"
LOCK = RUN / "prepare.lock"
MARKER = ".complete"
CHUNK = 1 << 20
ENGINE_GB = 4.0
START_GRACE = 30.0
AUTHORITIES = "/etc/ssl/certs/ca-certificates.crt"
HUBS = {"modelscope": "https://modelscope.cn", "huggingface": "https://huggingface.co"}
# Files at a time, and how often one that came damaged is fetched.
WORKERS, TRIES = 4, 3
# Locks that this process's children hold too, so that a later run waits for the last of them when this one is killed.
HELD: list[int] = []


class Trouble(Exception):
    """Something that the operator has to know; the message holds the remedy."""


def without_credentials(text: str) -> str:
    return re.sub(r"(\w+://)[^/@\s]+@", r"\1***@", text)


class Progress:
    """The status file: what is being done, and how far it is."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"pid": os.getpid(), "started": time.time(), "done": False, "ok": False}
        self.state.update(doing="starting", changed=[], error="")
        self.lock = threading.Lock()
        self.measure: Callable[[], str] | None = None
        RUN.mkdir(parents=True, exist_ok=True)

    def say(self, **values: Any) -> None:
        with self.lock:
            if self.state["done"]:  # the ticker was still measuring
                return
            self.state.update(values)
            temporary = STATUS.with_suffix(".new")
            temporary.write_text(json.dumps(self.state), encoding="utf-8")
            temporary.replace(STATUS)

    def step(self, text: str, measure: Callable[[], str] | None = None) -> None:
        self.measure = measure
        self.say(doing=text)
        print(text, flush=True)

    def tick(self) -> None:
        while not self.state["done"]:
            begun = time.monotonic()
            if self.measure:
                try:
                    self.say(doing=self.measure())
                except OSError:
                    pass
            # walking through an engine's thousands of files takes its time
            time.sleep(max(1.0, 20 * (time.monotonic() - begun)))


def size_of(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    total = 0
    for directory, _names, files in os.walk(path):
        for name in files:
            try:
                total += os.lstat(os.path.join(directory, name)).st_size
            except OSError:
                pass
    return total


def need_room(path: Path, wanted_gb: float, what: str) -> None:
    while not path.is_dir():
        path = path.parent
    free = shutil.disk_usage(path).free / 1e9
    if free < wanted_gb:
        raise Trouble(f"{what}: {path}: needs {wanted_gb:.1f} GB, {free:.1f} GB are free. Make room, or set data_root to a larger disk.")


def call(argv: list[str], env: dict[str, str], what: str) -> None:
    """Nothing secret is in argv: it shows in the process list."""
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    answer = subprocess.run(argv, env=env, text=True, errors="replace", check=False, pass_fds=HELD, **streams)
    if answer.returncode != 0:
        tail = "\n".join(answer.stdout.strip().splitlines()[-12:])
        raise Trouble(f"{what} failed ({answer.returncode}):\n{without_credentials(tail)}")


# ---------------------------------------------------------------- engines


def package_env(job: dict[str, Any], torch_index: str = "") -> dict[str, str]:
    """Indexes go by environment: they may hold credentials."""
    packages = job["packages"]
    index = "" if packages.get("offline") else packages.get("index_url", "")
    links = packages.get("find_links", "")
    if torch_index and not packages.get("offline"):
        index = torch_index
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "UV_", "PYTHON"))}
    if os.path.exists(AUTHORITIES):
        # the host's own authorities, also where a proxy signs
        env.setdefault("SSL_CERT_FILE", AUTHORITIES)
        env.setdefault("PIP_CERT", AUTHORITIES)
    env.update(PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1", PIP_NO_CACHE_DIR="1", UV_NO_CONFIG="1", UV_PYTHON_DOWNLOADS="never")
    env.update(UV_HTTP_TIMEOUT="300", UV_CACHE_DIR=str(Path(job["engines_dir"]) / ".cache"), HOME=env.get("HOME", "/root"))
    if index:
        env.update(PIP_INDEX_URL=index, UV_DEFAULT_INDEX=index)
    elif packages.get("offline"):
        env.update(PIP_NO_INDEX="1", UV_NO_INDEX="1")
    if links:
        env.update(PIP_FIND_LINKS=links, UV_FIND_LINKS=links)
    plain = [urllib.parse.urlsplit(url).netloc.rpartition("@")[2] for url in (index, links) if url.startswith("http://")]
    if plain:
        # pip leaves out an http source that it is not told to trust
        env["PIP_TRUSTED_HOST"] = " ".join(plain)
    return env


def complete(directory: Path, said: dict[str, Any]) -> None:
    temporary = directory / f"{MARKER}.new"
    temporary.write_text(json.dumps({**said, "made": int(time.time())}) + "\n", encoding="utf-8")
    temporary.replace(directory / MARKER)


def stands(directory: Path) -> bool:
    """Whether an engine is whole and its Python still the one that it was made with."""
    if not (directory / MARKER).exists():
        return False
    python = directory / "bin" / "python"
    if not python.exists():
        return False
    version = [str(python), "-I", "-S", "-c", "import sys; print('python%d.%d' % sys.version_info[:2])"]
    answer = subprocess.run(version, capture_output=True, text=True, check=False)
    return answer.returncode == 0 and (directory / "lib" / answer.stdout.strip()).is_dir()


def make_uv(job: dict[str, Any]) -> str:
    directory = Path(job["engines_dir"]) / f"uv-{job['uv_version']}"
    if not stands(directory):
        shutil.rmtree(directory, ignore_errors=True)
        env = package_env(job)
        call([job["python"], "-m", "venv", str(directory)], env, "uv: making its environment")
        pip = [str(directory / "bin" / "python"), "-m", "pip", "install", "--quiet", "--only-binary", ":all:", f"uv=={job['uv_version']}"]
        call(pip, env, f"uv {job['uv_version']}: pip install (check model_server_pip_index_url and model_server_pip_find_links)")
        complete(directory, {"uv": job["uv_version"]})
    return str(directory / "bin" / "uv")


def build(engine: dict[str, Any], job: dict[str, Any], progress: Progress) -> None:
    name, directory = engine["name"], Path(engine["dir"])
    if stands(directory):
        return
    need_room(directory.parent, engine.get("need_gb", ENGINE_GB), f"engine {name}")
    progress.step(f"engine {name}: preparing uv")
    directory.parent.mkdir(parents=True, exist_ok=True)
    uv = make_uv(job)
    progress.step(f"engine {name}: installing", lambda: f"engine {name}: installing, {size_of(directory) >> 20} MB so far")
    shutil.rmtree(directory, ignore_errors=True)
    call([job["python"], "-m", "venv", "--without-pip", str(directory)], package_env(job), f"engine {name}: making its environment")
    install = [uv, "pip", "install", "--quiet", "--python", str(directory / "bin" / "python"), "--no-deps", "--only-binary", ":all:", "--compile-bytecode"]
    if engine.get("torch"):
        env = package_env(job, engine.get("torch_index") or "")
        what = f"engine {name}: torch {engine['torch']} (check model_server_torch_index and model_server_pip_find_links)"
        call([*install, f"torch=={engine['torch']}"], env, what)
    call([*install, "--require-hashes", "-r", engine["lock"]], package_env(job), f"engine {name}: its packages (check model_server_pip_index_url)")
    if engine.get("torch"):
        # a torch for GPUs cannot be imported without their libraries; the rest is proven by a real request
        python = str(directory / "bin" / "python")
        call([python, "-I", "-c", "import torch"], package_env(job), f"engine {name}: import of torch (check model_server_torch_index)")
    complete(directory, {"engine": name, "torch": engine.get("torch")})
    progress.say(changed=[*progress.state["changed"], f"engine {name}"])


# ---------------------------------------------------------------- weights


class Problem(Exception):
    """Why a hub or a server did not give what was asked for: what kind it is, its own words, whether waiting may help."""

    def __init__(self, kind: str, said: str, passes: bool = False, wait: float = 0) -> None:
        super().__init__(kind, said)
        self.kind, self.said, self.passes, self.wait = kind, said, passes, wait


def explain(error: BaseException) -> Problem:
    """Looks for the cause behind what the hubs' clients and their transports raise."""
    causes: list[BaseException] = []
    left: list[Any] = [error]
    while left:
        one = left.pop(0)
        if isinstance(one, BaseException) and one not in causes:
            causes.append(one)
            left += [one.__cause__, one.__context__, getattr(one, "reason", None), *one.args]
    for one in causes:
        if isinstance(one, Problem):
            return one
    names = " ".join(cls.__name__ for one in causes for cls in type(one).__mro__)
    for one in causes:
        response = getattr(one, "response", None)
        status = getattr(response, "status_code", None) or getattr(one, "status_code", None) or getattr(one, "code", None)
        if isinstance(status, int) and 400 <= status < 600:
            return refused(status, one, response, names)
    numbers = {one.errno for one in causes if isinstance(one, OSError) and not isinstance(one, (ssl.SSLError, socket.gaierror))}
    said = without_queries(" ".join(str(causes[-1] if str(causes[-1]) else error).split()))
    inner = next((one for one in reversed(causes) if isinstance(one, OSError) and one.strerror), None)
    if inner is not None:
        said = str(inner.strerror)
    if numbers & {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return Problem("disk", said)
    if numbers & {errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.ENAMETOOLONG, errno.ESTALE}:
        return Problem("write", said)
    if any(isinstance(one, ssl.SSLError) for one in causes):
        return Problem("tls", said)
    if "FileIntegrityError" in names:
        return Problem("damaged", "what came has another size or checksum than the hub lists")
    if "ProxyError" in names:
        return Problem("proxy", said, passes=True)
    if any(isinstance(one, socket.gaierror) for one in causes) or "NameResolutionError" in names:
        return Problem("dns", said, passes=True)
    if "JSONDecodeError" in names:
        return Problem("strange", "its answer is not JSON, so no hub stands there")
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return Problem("strange", said)
    broken = any(isinstance(one, (ConnectionError, TimeoutError)) for one in causes)
    if broken or isinstance(error, OSError) or any(word in names for word in ("NetworkError", "TransportError", "Timeout")):
        return Problem("line", said or type(error).__name__, passes=True)
    return Problem("strange", f"{type(error).__name__}: {said}")


def refused(status: int, error: Any, response: Any, names: str) -> Problem:
    headers = getattr(response, "headers", None) or getattr(error, "headers", None) or {}
    words = headers.get("X-Error-Message") or ""
    body = getattr(error, "response_body", None)
    if not words and isinstance(body, dict):
        words = body.get("Message") or body.get("message") or ""
    said = f"HTTP {status}" + (f" ({' '.join(str(words).split())[:300]})" if words else "")
    if status == 416:
        return Problem("range", said)
    if status in (408, 425, 429) or status >= 500:
        asked = str(headers.get("Retry-After") or "")
        return Problem("server", said, passes=True, wait=min(600.0, float(asked)) if asked.isdigit() else 0)
    if status == 407:
        return Problem("proxy", said)
    if status in (401, 403):
        return Problem("denied", said)
    if status in (404, 410):
        return Problem("revision" if "RevisionNotFound" in names else "missing", said)
    return Problem("strange", said)


def without_queries(text: str) -> str:
    """Addresses of stores are signed in their queries."""
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)


def proxy_of(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return ""
    return without_credentials(urllib.request.getproxies().get(parts.scheme, ""))


def told(problem: Problem, weights: dict[str, Any], where: str, file: str = "") -> Trouble:
    """The problem with all names in it, and what to do."""
    source = weights["source"]
    token, own = f"model_server_{source}_token", "weights.url" if source == "url" else "weights.id"
    proxy = proxy_of(where)
    network = f"Check proxy_env (now: {proxy})" if proxy else "Check the host's way to it and proxy_env"
    if source == "url":
        denied = "Put the user and password that it wants into the URL."
    elif weights.get("token"):
        denied = f"The token in {token} is not let in: check it, and accept the model's terms on the hub, or correct {own}."
    else:
        denied = f"It is private, wants its terms accepted, or is not there: set {token}, or correct {own}."
    remedy = {
        "denied": denied,
        "missing": f"Correct {own}, or put it there."
        if source == "url"
        else f"Correct {own}, set {token} if it is a private one, or take another model_server_weights_source.",
        "revision": "Correct weights.revision: a branch, a tag or a commit of this repository.",
        "dns": f"{network}, and its name server.",
        "line": f"{network}. The next run goes on where this one stopped.",
        "proxy": f"{network}, and that the proxy lets this host through.",
        "tls": f"Put the authority that signs it into the host's ca-certificates, or correct the address. {network}.",
        "server": "Try again later, or take another source. The next run goes on where this one stopped.",
        "damaged": f"It was fetched {TRIES} times. The file on the server or something on the way is broken: take another source or revision.",
        "disk": "Make room, or set model_server_weights_dir to a larger disk. What came is kept; the next run goes on from there.",
        "write": "Let root write there (a mount that is gone or read-only?), or set model_server_weights_dir to another directory.",
    }.get(problem.kind, "Correct the address or the id, or take another source.")
    asked = f"{weights['id']} (revision {weights.get('revision') or 'of the default branch'})" if source != "url" else ""
    names = ": ".join(name for name in (without_credentials(where), asked, file) if name)
    return Trouble(f"weights of {weights['model']}: {names}: {problem.said}. {remedy}")


def amount(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


class Meter:
    """How far a download is: of how much, how fast over the last minute, how long it still takes."""

    def __init__(self, what: str, total: int, *places: Path) -> None:
        self.what, self.total, self.places = what, total, places
        self.seen: list[tuple[float, int]] = []

    def __call__(self) -> str:
        here, now = sum(size_of(place) for place in self.places if place.exists()), time.monotonic()
        self.seen = [one for one in self.seen if one[0] > now - 60] + [(now, here)]
        text = f"{self.what}: {amount(here)} of {amount(self.total) if self.total else '?'}"
        (since, first), passed = self.seen[0], now - self.seen[0][0]
        if passed < 1 or here <= first:
            return text if since == now else f"{text}, nothing new for {passed:.0f} s"
        speed = (here - first) / passed
        left = max(0.0, self.total - here) / speed
        return f"{text}, {amount(speed)}/s" + (f", {math.ceil(left / 60)} min left" if left > 90 else f", {left:.0f} s left" if self.total else "")


def digest(path: Path, found: Any) -> str:
    with path.open("rb") as file:
        for block in iter(lambda: file.read(CHUNK), b""):
            found.update(block)
    return str(found.hexdigest())


def checksum(path: Path) -> str:
    return digest(path, hashlib.sha256())


def intact(path: Path, entry: dict[str, Any]) -> bool:
    """Whether a file is what the hub lists: by SHA-256, or by Git's own name for small ones."""
    if not path.is_file() or path.stat().st_size != entry["size"]:
        return False
    if entry["sha256"]:
        return checksum(path) == str(entry["sha256"])
    if entry["blob"]:
        return digest(path, hashlib.sha1(b"blob %d\0" % entry["size"], usedforsecurity=False)) == str(entry["blob"])
    return True


def whole(directory: Path) -> str:
    """Why an engine could not load what is there; empty when nothing is known against it."""
    try:
        if not (directory / "config.json").is_file():
            return "has no config.json"
        for path in sorted(directory.iterdir()):
            if path.name.endswith(".index.json"):
                try:
                    shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
                except (ValueError, KeyError, AttributeError, TypeError):
                    continue
                missing = sorted(str(name) for name in shards if not (directory / str(name)).is_file())
                if missing:
                    return f"lacks {', '.join(missing[:3])}{' and more' if missing[3:] else ''}, which {path.name} lists"
            elif path.is_file() and 0 < path.stat().st_size < 1024:
                with path.open("rb") as file:
                    if file.read(42).startswith(b"version https://git-lfs.github.com/spec/"):
                        return f"holds {path.name} as a pointer of Git LFS (git lfs pull was not run)"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return ""


def safe(files: list[dict[str, Any]], whose: str) -> None:
    """A listing comes from elsewhere, and its names become paths that root writes to."""
    seen: set[str] = set()
    for entry in files:
        path, size = entry["path"], entry["size"]
        parts = path.split("/") if isinstance(path, str) else [""]
        odd = any(part in ("", ".", "..") or len(part.encode()) > 240 or re.search(r"[\x00-\x1f\x7f\\]", part) for part in parts)
        if odd or not isinstance(size, int) or size < 0 or path in seen:
            raise Trouble(f"{whose}: its listing holds {path!r} (size {size!r}), which is not a file of a model. Take another source.")
        seen.add(path)
    for path in seen:
        if any(path[:at] in seen for at in range(len(path)) if path[at] == "/"):
            raise Trouble(f"{whose}: its listing holds {path!r} below a file. Take another source.")


def wanted_files(files: list[dict[str, Any]], exclude: list[str]) -> list[dict[str, Any]]:
    """Without what nobody reads, and without pickles of what is there as safetensors too."""
    patterns = [pattern + "*" if pattern.endswith("/") else pattern for pattern in exclude]
    better = {entry["path"].rpartition("/")[0] for entry in files if re.fullmatch(r"(.*/)?model[^/]*\.safetensors", entry["path"])}

    def wanted(path: str) -> bool:
        directory, _slash, name = path.rpartition("/")
        if path in (MARKER, f"{MARKER}.new", ".gitattributes") or (directory in better and re.fullmatch(r"pytorch_model.*\.bin(\.index\.json)?", name)):
            return False
        return not any(fnmatch.fnmatch(path, pattern) for pattern in patterns)

    return [entry for entry in files if wanted(entry["path"])]


class Order:
    """Weights that are not there yet, and their work directory, which outlives a killed run:

    listing.json, files/ (becomes the model's directory), parts/ (halves of files), archive (of a URL), home/ (of the clients), lock.
    """

    def __init__(self, weights: dict[str, Any], job: dict[str, Any], progress: Progress) -> None:
        self.weights, self.job, self.progress = weights, job, progress
        self.what, self.source = f"weights of {weights['model']}", weights["source"]
        self.target = Path(weights["path"])
        self.work = self.target.with_name(f".{self.target.name}.new")
        self.files, self.parts, self.archive = self.work / "files", self.work / "parts", self.work / "archive"
        self.entries: list[dict[str, Any]] = []
        self.listing: dict[str, Any] = {}
        self.size = 0
        if self.source != "url":
            for own, all_of_them in (("endpoint", "endpoints"), ("token", "tokens")):
                weights[own] = job.get(all_of_them, {}).get(self.source) or ""
        self.where = weights["url"] if self.source == "url" else weights["endpoint"] or HUBS[self.source]

    def take(self, held: ExitStack) -> bool:
        """Ours alone until the run ends, also where hosts share the directory; false when another one has brought it meanwhile."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        for path in (self.target.parent.parent, self.target.parent):
            if path.stat().st_mode & 0o755 != 0o755:
                path.chmod(path.stat().st_mode | 0o755)
        while True:
            self.work.mkdir(exist_ok=True)
            try:
                file = (self.work / "lock").open("w")
            except FileNotFoundError:
                continue  # the other one has just ended
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.progress.step(f"{self.what}: waiting for another run or host that fetches them")
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                pass  # a file system without locks: checksums still hold
            try:
                same = os.stat(self.work / "lock").st_ino == os.fstat(file.fileno()).st_ino
            except FileNotFoundError:
                same = False
            there = (self.target / MARKER).is_file()
            if same and not there:
                held.callback(file.close)
                held.callback(HELD.remove, file.fileno())
                HELD.append(file.fileno())
                return True
            if same:
                shutil.rmtree(self.work, ignore_errors=True)
            file.close()
            if there:
                return False

    def look(self) -> None:
        """What there is to fetch, before anything is."""
        for name in ("files", "parts", "home"):
            (self.work / name).mkdir(exist_ok=True)
        sweep(self.work, {"files", "parts", "home", "lock", "listing.json", "archive", "archive.json"})
        self.progress.step(f"{self.what}: asking {without_credentials(self.where)}")
        if self.source == "url":
            self.size = url_size(self.weights)
            return
        key = [self.source, self.where, self.weights["id"], self.weights.get("revision") or ""]
        try:
            self.listing = json.loads((self.work / "listing.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.listing = {}
        if self.listing.get("key") != key:
            self.listing = {"key": key, **self.ask({"do": "list"})}
        self.accept()

    def accept(self) -> None:
        whose = f"{self.what}: {self.where}: {self.weights['id']}"
        safe(self.listing["files"], whose)
        self.entries = wanted_files(self.listing["files"], self.weights.get("exclude") or [])
        if not any(entry["path"] == "config.json" for entry in self.entries):
            raise Trouble(f"{whose}: no config.json among its {len(self.listing['files'])} files. Correct weights.id.")
        self.size = sum(entry["size"] for entry in self.entries)
        for entry in self.entries:
            entry["part"] = hashlib.sha256(json.dumps([entry["path"], entry["size"], entry["sha256"], entry["blob"]]).encode()).hexdigest()[:32]
        # what a listing before this one brought, and halves of it
        kept = {entry["path"] for entry in self.entries}
        kept |= {path + ".incomplete" for path in kept}
        for path in [path for path in self.files.rglob("*") if not path.is_dir() or path.is_symlink()]:
            if path.relative_to(self.files).as_posix() not in kept:
                path.unlink()
        sweep(self.parts, {entry["part"] for entry in self.entries})
        temporary = self.work / "listing.new"
        temporary.write_text(json.dumps(self.listing), encoding="utf-8")
        temporary.replace(self.work / "listing.json")

    def missing(self) -> int:
        """Bytes of disk that it still takes; an archive lies beside what is in it for a moment."""
        here = size_of(self.archive) if self.source == "url" and self.archive.exists() else size_of(self.files) + size_of(self.parts)
        return max(0, (2 * self.size if self.source == "url" else self.size) - here)

    def ask(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """One answer of the hub's client, which ends with this process."""
        hub = {key: self.weights.get(key) or "" for key in ("source", "id", "revision", "endpoint", "token")}
        hub.update(wanted, commit=self.listing.get("commit") or "", target=str(self.files), parts=str(self.parts), workers=WORKERS)
        hub["pause"] = self.job.get("pause", 1.0)
        env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "HUGGING", "MODELSCOPE_", "XDG_"))}
        env.update(HOME=str(self.work / "home"), NO_COLOR="1", DO_NOT_TRACK="1", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
        # half a file of its faster protocol cannot be gone on with
        env.update(HF_HUB_DISABLE_XET="1", HF_HUB_DOWNLOAD_TIMEOUT="60", HF_HUB_ETAG_TIMEOUT="60", PYTHONDONTWRITEBYTECODE="1")
        # retries are ours, and a large file may take longer than the hour that it gives
        env.update(MODELSCOPE_DOWNLOAD_MAX_RETRIES="0", MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT=str(30 * 86400), MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS="1")
        if os.path.exists(AUTHORITIES):
            env.setdefault("SSL_CERT_FILE", AUTHORITIES)
            env.setdefault("REQUESTS_CA_BUNDLE", env["SSL_CERT_FILE"])
        argv = [f"{self.job['hub']['dir']}/bin/python", str(Path(__file__).with_name("hub.py"))]
        with tempfile.TemporaryFile() as words:
            with subprocess.Popen(argv, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, pass_fds=HELD) as client:
                assert client.stdin is not None and client.stdout is not None
                try:
                    client.stdin.write(json.dumps(hub).encode() + b"\n")
                    client.stdin.flush()
                except BrokenPipeError:
                    pass
                said = client.stdout.read().decode(errors="replace").strip().splitlines()
            words.seek(0)
            tail = words.read().decode(errors="replace").strip().splitlines()[-6:]
        try:
            answer = dict(json.loads(said[-1]))
        except (IndexError, ValueError):
            answer = {"problem": {"kind": "strange", "said": f"its client ended with {client.returncode}: {' '.join(tail)}", "file": ""}}
        if "problem" in answer:
            problem = answer["problem"]
            said_by = without_queries(problem["said"])
            if self.weights["token"]:
                said_by = said_by.replace(self.weights["token"], "***")
            raise told(Problem(problem["kind"], said_by), self.weights, self.where, problem["file"]) from Problem(problem["kind"], said_by)
        return answer

    def fetch(self) -> None:
        if self.source == "url":
            self.fetch_archive()
        else:
            self.fetch_files()
        files = inner(self.files)
        fault = whole(files)
        if fault:
            raise Trouble(f"{self.what}: what came {fault}. Correct {'the URL' if self.source == 'url' else 'weights.id or model_server_weights_exclude'}.")
        self.progress.step(f"{self.what}: moving them in")
        readable(files)
        for path in files.rglob("*"):
            settle(path)
        kept = {key: without_credentials(str(self.weights.get(key) or "")) for key in ("source", "id", "url", "revision", "sha256")}
        pinned = [[entry["path"], entry["size"], entry["sha256"] or entry["blob"]] for entry in sorted(self.entries, key=lambda entry: str(entry["path"]))]
        kept["commit"] = self.listing.get("commit") or ""
        kept["listing"] = hashlib.sha256(json.dumps(pinned).encode()).hexdigest() if pinned else ""
        complete(files, kept)
        settle(files / MARKER)
        settle(files)
        # without a marker, so no engine runs on it
        shutil.rmtree(self.target, ignore_errors=True)
        files.replace(self.target)
        settle(self.target.parent)
        shutil.rmtree(self.work, ignore_errors=True)
        self.progress.say(changed=[*self.progress.state["changed"], self.what])

    def fetch_files(self) -> None:
        self.progress.step(self.what, Meter(self.what, self.size, self.files, self.parts))
        try:
            self.ask({"do": "fetch", "files": self.entries})
        except Trouble as trouble:
            cause = trouble.__cause__
            if not isinstance(cause, Problem) or cause.kind not in ("missing", "revision", "damaged"):
                raise
            # a branch may have moved on since it was listed
            fresh = self.ask({"do": "list"})
            if fresh["files"] == [{key: value for key, value in entry.items() if key != "part"} for entry in self.listing["files"]]:
                raise
            self.listing = {"key": self.listing["key"], **fresh}
            self.accept()
            need_room_for([self])
            self.progress.step(self.what, Meter(self.what, self.size, self.files, self.parts))
            self.ask({"do": "fetch", "files": self.entries})
        for directory in sorted((path for path in self.files.rglob("*") if path.is_dir()), reverse=True):
            if not any(directory.iterdir()):
                directory.rmdir()

    def fetch_archive(self) -> None:
        weights = self.weights
        wanted = str(weights.get("sha256") or listed_checksum(weights["url"])).lower()
        resumed = download(weights, self.archive, self.progress, self.job.get("pause", 1.0))
        self.progress.step(f"{self.what}: checking {amount(size_of(self.archive))}")
        if wanted and checksum(self.archive) != wanted and resumed:
            self.archive.unlink()
            download(weights, self.archive, self.progress, self.job.get("pause", 1.0))
        if wanted and checksum(self.archive) != wanted:
            self.archive.unlink()
            raise Trouble(f"{self.what}: {without_credentials(weights['url'])}: its sha256 is not {wanted}. The file is damaged or not the one meant.")
        shutil.rmtree(self.files)
        self.files.mkdir()
        self.progress.step(f"{self.what}: unpacking", Meter(f"{self.what}: unpacking", 0, self.files))
        try:
            with self.archive.open("rb") as archive:
                unpack(archive, self.files, f"{self.what}: {without_credentials(weights['url'])}")
        except Trouble:
            self.archive.unlink()
            raise
        except OSError as error:
            raise told(explain(error), weights, self.where, str(self.files)) from error


def sweep(directory: Path, kept: set[str]) -> None:
    for path in directory.iterdir():
        if path.name in kept:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sweep_abandoned(order: Order, paths: set[Path]) -> None:
    """Halves of other revisions of this model that nobody wants any more."""
    kept = {f".{path.name}.new" for path in paths if path.parent == order.target.parent}
    for path in order.target.parent.glob(".*"):
        if path.name in kept or not path.name.endswith((".new", ".part")):
            continue
        try:
            with (path / "lock" if path.is_dir() else path).open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
        except OSError:
            pass


def need_room_for(orders: list[Order]) -> None:
    """All that is to come, by file system, with the numbers."""
    disks: dict[int, list[Order]] = {}
    for order in orders:
        disks.setdefault(order.work.stat().st_dev, []).append(order)
    for sharing in disks.values():
        missing, free = sum(order.missing() for order in sharing), shutil.disk_usage(sharing[0].work).free
        # directories, and blocks that are not full
        if missing and missing * 1.01 + 10_000_000 > free:
            each = ", ".join(f"{order.weights['model']} {amount(order.missing())}" for order in sharing)
            raise Trouble(
                f"weights: {sharing[0].target.parent.parent}: {amount(missing)} are still to come ({each}), {amount(free)} are free. "
                "Make room, or set model_server_weights_dir (or data_root) to a larger disk."
            )


def settle(path: Path) -> None:
    """On the disk, not only on its way there."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_url(url: str, offset: int = 0, method: str = "GET", unless: str = "") -> Any:
    parts = urllib.parse.urlsplit(url)
    headers = {"Range": f"bytes={offset}-", **({"If-Range": unless} if unless else {})} if offset else {}
    if parts.username:
        secret = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(secret.encode()).decode()
        url = urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers, method=method), timeout=60)


def url_size(weights: dict[str, Any]) -> int:
    """0 where the server does not say; what only may pass shows in the download."""
    try:
        with open_url(weights["url"], method="HEAD") as reply:
            return int(reply.headers.get("Content-Length") or 0)
    except urllib.error.HTTPError as error:
        problem = explain(error)
        if problem.kind in ("missing", "denied", "proxy") and error.code != 403:
            raise told(problem, weights, weights["url"]) from error
    except OSError as error:
        problem = explain(error)
        if not problem.passes:
            raise told(problem, weights, weights["url"]) from error
    return 0


def download(weights: dict[str, Any], part: Path, progress: Progress, pause: float) -> bool:
    """Into PART; true when it went on with what was there before."""
    url, what, fruitless, resumed = weights["url"], f"weights of {weights['model']}", 0, False
    meter = Meter(what, 0, part)
    progress.step(what, meter)
    note = part.with_name(f"{part.name}.json")
    problem = Problem("line", "")
    while fruitless < 2 * TRIES:
        offset = here = part.stat().st_size if part.exists() else 0
        try:
            unless = str(json.loads(note.read_text(encoding="utf-8"))) if offset else ""
        except (OSError, ValueError):
            unless = ""
        try:
            with open_url(url, offset, unless=unless) as reply:
                if reply.status != 206 or not str(reply.headers.get("Content-Range") or f"bytes {offset}-").startswith(f"bytes {offset}-"):
                    if reply.status == 206:
                        part.unlink()
                        raise OSError("the server sent another range than it was asked for")
                    offset = 0
                resumed = resumed or offset > 0
                length = int(reply.headers.get("Content-Length") or 0)
                meter.total = offset + length if length else 0
                # the archive and what is in it, for a moment
                need_room(part.parent, (length + meter.total) / 1e9, what)
                if not offset:
                    stamp = reply.headers.get("ETag") or reply.headers.get("Last-Modified") or ""
                    # only a strong one says that the bytes are the same
                    note.write_text(json.dumps("" if stamp.startswith("W/") else stamp), encoding="utf-8")
                with part.open("ab" if offset else "wb") as out:
                    shutil.copyfileobj(reply, out, CHUNK)
            came = part.stat().st_size
            if not length or came == meter.total:
                return resumed
            problem = Problem("line", f"{came} of {meter.total} bytes came", passes=True)
        except (OSError, http.client.HTTPException) as error:
            problem = explain(error) if isinstance(error, OSError) else Problem("line", f"{type(error).__name__}: {error}", passes=True)
        if problem.kind == "range":
            part.unlink(missing_ok=True)
        elif not problem.passes:
            raise told(problem, weights, url)
        fruitless = 0 if (part.stat().st_size if part.exists() else 0) > here else fruitless + 1
        time.sleep(max(problem.wait, min(30.0, pause * 2**fruitless)))
    raise told(problem, weights, url)


def listed_checksum(url: str) -> str:
    """From the SHA256SUMS beside the file, where there is one."""
    base, _slash, name = url.partition("?")[0].rpartition("/")
    try:
        with open_url(f"{base}/SHA256SUMS") as reply:
            lines: list[str] = reply.read(CHUNK).decode(errors="replace").splitlines()
    except (OSError, ValueError):
        return ""
    sums = {columns[1].lstrip("*"): columns[0] for columns in (line.split() for line in lines) if len(columns) == 2}
    return str(sums.get(urllib.parse.unquote(name), ""))


def unpack(archive: BinaryIO, target: Path, what: str) -> None:
    """Plain files and directories below TARGET, and nothing else."""
    root = os.path.realpath(target)
    try:
        with tarfile.open(fileobj=archive, mode="r:*") as tar:
            for member in tar:
                path = os.path.realpath(os.path.join(root, member.name))
                if path != root and not path.startswith(root + os.sep):
                    raise Trouble(f"{what}: the archive holds {member.name!r}, which leads out of its directory. Pack it anew.")
                if member.isdir():
                    os.makedirs(path, exist_ok=True)
                elif member.isfile():
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                    source = tar.extractfile(member)
                    assert source is not None
                    with source, open(path, "wb") as out:
                        shutil.copyfileobj(source, out, CHUNK)
                else:
                    remedy = "Pack it with tar -h --hard-dereference."
                    raise Trouble(f"{what}: the archive holds {member.name!r}, which is neither a file nor a directory. {remedy}")
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise Trouble(f"{what}: not a whole tar archive: {error}. Pack it anew.") from error


def inner(directory: Path) -> Path:
    """Archives hold the files, or one directory with the files."""
    entries = list(directory.iterdir())
    return entries[0] if len(entries) == 1 and entries[0].is_dir() else directory


def readable(directory: Path) -> None:
    """Weights are no secret, and the engines run as another user."""
    for where, names, files in os.walk(directory):
        for name in names:
            Path(where, name).chmod(0o755)
        for name in files:
            Path(where, name).chmod(0o644)
    directory.chmod(0o755)


def orders_of(job: dict[str, Any], progress: Progress, held: ExitStack) -> list[Order]:
    """What is not there yet; all of it is looked at before any of it is fetched."""
    for weights in job["weights"]:
        fault = whole(Path(weights["path"])) if weights["source"] == "path" else ""
        if fault:
            raise Trouble(f"weights of {weights['model']}: {weights['path']}: {fault}. Correct weights.path of this server, or put the files there.")
    fetched = [weights for weights in job["weights"] if weights["source"] != "path"]
    paths = {Path(weights["path"]) for weights in fetched}
    orders: list[Order] = []
    # in one order everywhere, so that no two hosts wait for each other
    for weights in sorted(fetched, key=lambda one: str(one["path"])):
        order = Order(weights, job, progress)
        if not (order.target / MARKER).is_file() and guarded(order, partial(order.take, held)):
            sweep_abandoned(order, paths)
            orders.append(order)
    for order in orders:
        guarded(order, order.look)
    need_room_for(orders)
    return orders


def guarded(order: Order, step: Callable[[], Any]) -> Any:
    try:
        return step()
    except OSError as error:
        raise told(explain(error), order.weights, order.where, str(error.filename or order.work)) from error


# ---------------------------------------------------------------- run and tell


def run(job: dict[str, Any]) -> int:
    RUN.mkdir(parents=True, exist_ok=True)
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        HELD[:] = [lock.fileno()]
        progress = Progress()
        progress.say()
        threading.Thread(target=progress.tick, daemon=True).start()
        error = ""
        try:
            missing = {one["source"] for one in job["weights"] if not (Path(one["path"]) / MARKER).is_file()}
            if missing & set(HUBS):
                build(job["hub"], job, progress)
            with ExitStack() as held:
                # what cannot be had is said before engines are built for minutes
                orders = orders_of(job, progress, held)
                for engine in job["engines"]:
                    build(engine, job, progress)
                need_room_for(orders)
                for order in orders:
                    guarded(order, order.fetch)
        except Trouble as trouble:
            error = str(trouble)
        except Exception as trouble:  # noqa: BLE001 - the status file is all that the play sees of this process
            error = f"{progress.state['doing']}: {type(trouble).__name__}: {trouble}"
        shutil.rmtree(Path(job["engines_dir"]) / ".cache", ignore_errors=True)
        progress.measure = None
        progress.say(done=True, ok=not error, error=without_credentials(error), doing="failed" if error else "ready")
    print(error or "ready", flush=True)
    return 1 if error else 0


def tell(seconds: float, since: float) -> int:
    """State of the job that was started after SINCE; one that died without a word is a failed one."""
    deadline = time.monotonic() + seconds
    grace = time.monotonic() + START_GRACE
    while True:
        try:
            state = json.loads(STATUS.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            state = {"pid": 0, "started": 0, "done": True}
        alive = os.path.exists(f"/proc/{state['pid']}")
        if state["started"] < since:
            earlier = "waiting for an earlier run, " + state["doing"] if alive and not state["done"] else "starting"
            state = {"done": False, "ok": False, "doing": earlier, "changed": [], "error": ""}
            if earlier == "starting" and time.monotonic() > grace:
                state.update(done=True, error="It did not start. Run the play again.")
        elif not state["done"] and not alive:
            state.update(done=True, error="It was killed. Run the play again; it goes on where it stopped.")
        if state["done"] or time.monotonic() >= deadline:
            print(json.dumps(state))
            return 0
        time.sleep(0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--progress", action="store_true", help="tell the state of the running job")
    parser.add_argument("--since", type=float, default=0, metavar="EPOCH", help="ignore jobs that were started before")
    given = parser.parse_args()
    if given.progress:
        # a play looks again and again, and each look nests an include: a download of hours must not nest hundreds
        return tell(min(120.0, max(5.0, (time.time() - given.since) / 4)), given.since)
    job = json.loads(sys.stdin.read())
    os.umask(0o022)
    return run(job)


if __name__ == "__main__":
    sys.exit(main())
