# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Paths, progress, commands, Docker."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .catalogue import LabError

LAB_DIR = Path(__file__).resolve().parent.parent
REPO = LAB_DIR.parent
STATE = REPO / ".lab"
FILES = STATE / "files"
LOGS = STATE / "log"
SCRATCH = STATE / "tmp"
VAULT_PASSWORD = STATE / "vault-password"
VAULT = REPO / "inventories" / "lab" / "group_vars" / "all" / "vault.yml"
START = time.monotonic()
_print_lock = threading.Lock()


def say(text: str) -> None:
    """One line of progress, with the seconds since the start."""
    with _print_lock:
        print(f"[lab {time.monotonic() - START:6.1f}s] {text}", flush=True)


def last_line(path: Path) -> str:
    """What a running command wrote last."""
    try:
        with path.open("rb") as handle:
            handle.seek(max(0, path.stat().st_size - 2000))
            lines = [line for line in handle.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return lines[-1].strip()[:110] if lines else ""


def make_vault_password() -> None:
    """Once; whatever reads the lab's inventory needs it, also before there is a vault."""
    if not VAULT_PASSWORD.exists():
        VAULT_PASSWORD.parent.mkdir(parents=True, exist_ok=True)
        # a vault file of another password would be of no use
        VAULT.unlink(missing_ok=True)
        VAULT_PASSWORD.touch(mode=0o600)
        VAULT_PASSWORD.write_text(secrets.token_urlsafe(24) + "\n", encoding="ascii")


class Step:
    """A named piece of work: says that it starts, that it still runs, and what it took."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.log = LOGS / (name.replace("/", "_").replace(" ", "_").replace(":", "_") + ".log")
        self.seconds = 0.0

    def __enter__(self) -> Step:
        LOGS.mkdir(parents=True, exist_ok=True)
        self.log.write_bytes(b"")
        self._begin = time.monotonic()
        self._stop = threading.Event()
        say(f"{self.name} ...")
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def _beat(self) -> None:
        while not self._stop.wait(10):
            say(f"{self.name}: {time.monotonic() - self._begin:.0f} s so far: {last_line(self.log)}")

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        self._stop.set()
        self._thread.join()
        self.seconds = time.monotonic() - self._begin
        say(f"{self.name}: {'failed after' if kind else 'done in'} {self.seconds:.1f} s")

    def run(self, command: Sequence[str | Path], **kwargs: Any) -> None:
        """Run a command with its output in the step's log; its tail is the error's text."""
        with self.log.open("ab") as log:
            log.write(("$ " + " ".join(map(str, command)) + "\n").encode())
            log.flush()
            kwargs.setdefault("stdin", subprocess.DEVNULL)
            done = subprocess.run([str(c) for c in command], stdout=kwargs.pop("stdout", log), stderr=log, check=False, **kwargs)
        if done.returncode:
            tail = "\n  ".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise LabError(f"{self.name}: {command[0]} ended with {done.returncode} (whole log: {self.log}):\n  {tail}")


def output(command: Sequence[str | Path], check: bool = True, timeout: float | None = None) -> str:
    """The standard output of a short command; an empty string when it may fail and does."""
    try:
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, timeout=timeout, stdin=subprocess.DEVNULL)
    except (FileNotFoundError, subprocess.TimeoutExpired) as exc:
        if check:
            raise LabError(f"{command[0]}: {exc}") from exc
        return ""
    if done.returncode:
        if check:
            raise LabError(f"{' '.join(map(str, command))}: {done.stderr.strip() or done.stdout.strip()}")
        return ""
    return done.stdout


def docker_inspect(kind: str, *names: str) -> list[dict[str, Any]]:
    """docker inspect; what does not exist is left out."""
    if not names:
        return []
    done = subprocess.run(["docker", kind, "inspect", *names], capture_output=True, text=True, check=False)
    try:
        return list(json.loads(done.stdout or "[]"))
    except ValueError as exc:
        raise LabError(f"docker {kind} inspect: {done.stderr.strip()}") from exc


def image_info(name: str) -> dict[str, Any] | None:
    """A local image, if there is one."""
    found = docker_inspect("image", name)
    return found[0] if found else None


def tree_hash(*parts: Path | str) -> str:
    """A hash over texts and over files: names, executable bits and contents."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(f"text {part}\n".encode())
            continue
        files = [part] if part.is_file() else sorted(p for p in part.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        for path in files:
            name = path.name if path is part else str(path.relative_to(part))
            digest.update(f"file {name} {path.stat().st_mode & 0o111:o} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:24]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_if_changed(path: Path, text: str, mode: int = 0o644) -> bool:
    """Replace a file in one go, only when its text differs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.read_text() == text:
        path.chmod(mode)
        return False
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text)
    temporary.chmod(mode)
    temporary.replace(path)
    return True


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Two runs of this script in one checkout take turns."""
    STATE.mkdir(exist_ok=True)
    with (STATE / "lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another run of lab.py works in this checkout, waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def pip_python() -> str:
    """A Python 3.11 that has pip: the lab hosts' wheels are chosen by it."""
    for candidate in (str(REPO / ".venv/bin/python"), sys.executable, "/usr/bin/python3"):
        found = output([candidate, "-c", "import pip, sys; print('%d.%d' % sys.version_info[:2])"], check=False).strip()
        if found == "3.11":
            return candidate
    venv = STATE / "pip-venv"
    if not (venv / "bin/python").exists() and shutil.which("python3.11"):
        output(["python3.11", "-m", "venv", venv])
    if (venv / "bin/python").exists():
        return str(venv / "bin/python")
    raise LabError("the lab needs Python 3.11 with pip (Debian 12: apt-get install python3-venv): its model hosts run Debian 12")


def require_root() -> None:
    """Docker, sysctl and mmdebstrap need it."""
    if os.geteuid() != 0:
        raise LabError("the lab needs root: it starts dockerd, builds Debian images and sets a sysctl")
