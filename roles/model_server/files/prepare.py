# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Builds engines and fetches weights, telling how far it is. Private to the role selfhosted.fastgpt.model_server.

It takes a job as JSON on standard input and runs on when the play that started it is killed: a later one waits for it.
--progress tells the state of the running job: at once when it has ended, else after a while that grows with its age.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, BinaryIO, Callable

RUN = Path(os.environ.get("MODEL_SERVER_RUN", "/run/selfhosted-model"))
STATUS = RUN / "prepare.json"
LOCK = RUN / "prepare.lock"
MARKER = ".complete"
CHUNK = 1 << 20
ENGINE_GB = 4.0
START_GRACE = 30.0


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
            if self.measure:
                try:
                    self.say(doing=self.measure())
                except OSError:
                    pass
            time.sleep(4)


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
    answer = subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False)
    if answer.returncode != 0:
        tail = "\n".join(answer.stdout.strip().splitlines()[-12:])
        raise Trouble(f"{what} failed ({answer.returncode}):\n{without_credentials(tail)}")


# ---------------------------------------------------------------- engines


def package_env(job: dict[str, Any], torch: bool = False) -> dict[str, str]:
    """Indexes go by environment: they may hold credentials."""
    packages = job["packages"]
    index = "" if packages.get("offline") else packages.get("index_url", "")
    links = packages.get("find_links", "")
    if torch and packages.get("torch_index") and not packages.get("offline"):
        index = packages["torch_index"]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "UV_", "PYTHON"))}
    bundle = "/etc/ssl/certs/ca-certificates.crt"
    if os.path.exists(bundle):
        # the host's own authorities, also where a proxy signs
        env.setdefault("SSL_CERT_FILE", bundle)
        env.setdefault("PIP_CERT", bundle)
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
    need_room(directory.parent, ENGINE_GB if engine.get("torch") else 0.5, f"engine {name}")
    progress.step(f"engine {name}: preparing uv")
    directory.parent.mkdir(parents=True, exist_ok=True)
    uv = make_uv(job)
    progress.step(f"engine {name}: installing", lambda: f"engine {name}: installing, {size_of(directory) >> 20} MB so far")
    shutil.rmtree(directory, ignore_errors=True)
    call([job["python"], "-m", "venv", "--without-pip", str(directory)], package_env(job), f"engine {name}: making its environment")
    install = [uv, "pip", "install", "--quiet", "--python", str(directory / "bin" / "python"), "--no-deps", "--only-binary", ":all:", "--compile-bytecode"]
    if engine.get("torch"):
        env = package_env(job, torch=True)
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


def open_url(url: str, offset: int = 0) -> Any:
    parts = urllib.parse.urlsplit(url)
    headers = {"Range": f"bytes={offset}-"} if offset else {}
    if parts.username:
        import base64

        secret = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(secret.encode()).decode()
        url = urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)


def download(url: str, part: Path, what: str, progress: Progress) -> None:
    """Into PART, going on where an earlier try stopped."""
    tries, sizes = 5, [0]
    progress.step(what, lambda: f"{what}: {size_of(part) >> 20} of {sizes[0] >> 20 or '?'} MB")
    for attempt in range(1, tries + 1):
        offset = part.stat().st_size if part.exists() else 0
        try:
            with open_url(url, offset) as reply:
                if reply.status != 206:
                    offset = 0
                length = int(reply.headers.get("Content-Length") or 0)
                sizes[0] = offset + length
                # the archive and what is in it, for a moment
                need_room(part.parent, (length + sizes[0]) / 1e9, what)
                with part.open("ab" if offset else "wb") as out:
                    shutil.copyfileobj(reply, out, CHUNK)
            if not length or part.stat().st_size == sizes[0]:
                return
            problem = f"{part.stat().st_size} of {sizes[0]} bytes came"
        except urllib.error.HTTPError as error:
            if error.code == 416:
                part.unlink(missing_ok=True)
            elif error.code < 500:
                raise Trouble(f"{what}: {without_credentials(url)}: HTTP {error.code}. Correct the URL, or put the file there.") from error
            problem = f"HTTP {error.code}"
        except OSError as error:
            problem = str(getattr(error, "reason", error))
        if attempt < tries:
            time.sleep(min(30, 2**attempt))
    raise Trouble(f"{what}: {without_credentials(url)}: {problem}. Check the URL and proxy_env; the next run goes on where this one stopped.")


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


def checksum(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(CHUNK), b""):
            found.update(block)
    return found.hexdigest()


def unpack(archive: BinaryIO, target: Path, what: str) -> None:
    """Plain files and directories below TARGET, and nothing else."""
    root = os.path.realpath(target)
    try:
        with tarfile.open(fileobj=archive, mode="r:*") as tar:
            for member in tar:
                path = os.path.realpath(os.path.join(root, member.name))
                if path != root and not path.startswith(root + os.sep):
                    raise Trouble(f"{what}: the archive holds {member.name!r}, which leads out of its directory.")
                if member.isdir():
                    os.makedirs(path, exist_ok=True)
                elif member.isfile():
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                    source = tar.extractfile(member)
                    assert source is not None
                    with source, open(path, "wb") as out:
                        shutil.copyfileobj(source, out, CHUNK)
                else:
                    raise Trouble(f"{what}: the archive holds {member.name!r}, which is neither a file nor a directory. Pack it with tar -h.")
    except tarfile.TarError as error:
        raise Trouble(f"{what}: not a tar archive: {error}") from error


def inner(directory: Path) -> Path:
    """Archives hold the files, or one directory with the files."""
    entries = list(directory.iterdir())
    return entries[0] if len(entries) == 1 and entries[0].is_dir() else directory


def hub_argv(weights: dict[str, Any], hub: str, target: Path) -> list[str]:
    exclude = weights.get("exclude") or []
    if weights["source"] == "modelscope":
        argv = [f"{hub}/bin/modelscope", "download", weights["id"], "--local-dir", str(target)]
        argv += ["--revision", weights["revision"]] if weights.get("revision") else []
        return argv + (["--exclude", *exclude] if exclude else [])
    argv = [f"{hub}/bin/hf", "download", weights["id"], "--local-dir", str(target), "--quiet"]
    argv += ["--revision", weights["revision"]] if weights.get("revision") else []
    for pattern in exclude:
        argv += ["--exclude", pattern]
    return argv


def readable(directory: Path) -> None:
    """Weights are no secret, and the engines run as another user."""
    for where, names, files in os.walk(directory):
        for name in names:
            Path(where, name).chmod(0o755)
        for name in files:
            Path(where, name).chmod(0o644)
    directory.chmod(0o755)


def fetch(weights: dict[str, Any], job: dict[str, Any], progress: Progress) -> None:
    model, target = weights["model"], Path(weights["path"])
    what = f"weights of {model}"
    if weights["source"] == "path":
        if not (target / "config.json").is_file():
            raise Trouble(f"{what}: {target}: has no config.json. Correct weights.path of this server, or put the files there.")
        return
    if (target / MARKER).is_file():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    for path in (target.parent.parent, target.parent):
        path.chmod(0o755)
    work = target.with_name(f".{target.name}.new")
    shutil.rmtree(target, ignore_errors=True)
    if weights["source"] == "url":
        part = target.with_name(f".{target.name}.part")
        download(weights["url"], part, what, progress)
        progress.step(f"{what}: unpacking")
        wanted = str(weights.get("sha256") or listed_checksum(weights["url"])).lower()
        if wanted and checksum(part) != wanted:
            part.unlink()
            raise Trouble(f"{what}: {without_credentials(weights['url'])}: its sha256 is not {wanted}. The file is damaged or not the one meant.")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        with part.open("rb") as archive:
            unpack(archive, work, what)
    else:
        need_room(target.parent, float(weights.get("need_gb") or 1), what)
        about = f" of about {weights['need_gb']} GB" if weights.get("need_gb") else ""
        # kept from an earlier try: both clients go on where they stopped
        work.mkdir(exist_ok=True)
        progress.step(what, lambda: f"{what}: {size_of(work) / 1e9:.1f} GB{about}")
        env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        home = target.with_name(".home")
        home.mkdir(exist_ok=True)
        env.update(HOME=str(home), HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1", NO_COLOR="1")
        env.update({"HF_ENDPOINT": weights["endpoint"]} if weights.get("endpoint") and weights["source"] == "huggingface" else {})
        hint = f"{what}: {weights['source']} {weights['id']} (check the id, proxy_env, model_server_weights_source)"
        call(hub_argv(weights, job["hub"]["dir"], work), env, hint)
        for leftover in (home, work / ".cache", work / ".msc", work / ".mv", work / "._____temp"):
            shutil.rmtree(leftover, ignore_errors=True)
    files = inner(work)
    if not (files / "config.json").is_file():
        raise Trouble(f"{what}: no config.json came with it. Correct the id or the URL.")
    readable(files)
    complete(files, {key: without_credentials(str(weights.get(key) or "")) for key in ("source", "id", "url", "revision", "sha256")})
    files.replace(target)
    shutil.rmtree(work, ignore_errors=True)
    target.with_name(f".{target.name}.part").unlink(missing_ok=True)
    progress.say(changed=[*progress.state["changed"], what])


# ---------------------------------------------------------------- run and tell


def run(job: dict[str, Any]) -> int:
    RUN.mkdir(parents=True, exist_ok=True)
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        progress = Progress()
        progress.say()
        threading.Thread(target=progress.tick, daemon=True).start()
        error = ""
        try:
            missing = {one["source"] for one in job["weights"] if not (Path(one["path"]) / MARKER).is_file()}
            hubs = [job["hub"]] if missing & {"modelscope", "huggingface"} else []
            for engine in [*hubs, *job["engines"]]:
                build(engine, job, progress)
            for weights in job["weights"]:
                fetch(weights, job, progress)
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
