# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import functools
import hashlib
import http.server
import io
import json
import os
import socket
import ssl
import sys
import tarfile
import threading
import time
import typing as t
import urllib.error
from email.message import Message
from pathlib import Path

import pytest


class Served:
    """A web server on a directory; Range is answered as nginx does."""

    def __init__(self, root: Path) -> None:
        self.ranges: list[str] = []
        self.cut = 0
        served = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *arguments: t.Any) -> None:
                pass

            def do_GET(self) -> None:
                path = Path(self.translate_path(self.path))
                if not path.is_file():
                    self.send_error(404)
                    return
                data = path.read_bytes()
                start = 0
                if self.headers.get("Range"):
                    served.ranges.append(self.headers["Range"])
                    start = int(self.headers["Range"].split("=")[1].rstrip("-"))
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                if served.cut:  # the line breaks once
                    data, served.cut = data[: served.cut], 0
                    self.close_connection = True
                self.wfile.write(data[start:])

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(root)))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def www(tmp_path: Path) -> t.Iterator[Served]:
    root = tmp_path / "www"
    root.mkdir()
    served = Served(root)
    yield served
    served.server.shutdown()
    served.server.server_close()


@pytest.fixture
def tool(script: t.Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> t.Any:
    module = script("prepare")
    module.RUN = tmp_path / "run"
    module.STATUS, module.LOCK = module.RUN / "prepare.json", module.RUN / "prepare.lock"
    module.START_GRACE = 0.2
    monkeypatch.setattr(module.time, "sleep", lambda seconds, real=time.sleep: real(min(seconds, 0.02)))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return module


def archive(path: Path, names: dict[str, bytes], link: str = "") -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in names.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mode = 0o600
            tar.addfile(info, io.BytesIO(data))
        if link:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(info)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def job(tmp_path: Path, **weights: t.Any) -> dict[str, t.Any]:
    return {
        "engines_dir": str(tmp_path / "engines"),
        "engines": [],
        "pause": 0,
        "hub": {"name": "hub", "dir": str(tmp_path / "engines" / "hub-0123456789ab")},
        "weights": [{"model": "m", "path": str(tmp_path / "models" / "m" / "v1"), **weights}] if weights else [],
    }


def status(tool: t.Any) -> dict[str, t.Any]:
    return dict(json.loads(tool.STATUS.read_text()))


def test_nothing_is_said_after_the_end(tool: t.Any) -> None:
    """A ticker that was measuring when the end was told must neither take it back nor write beside the run that comes next."""
    progress = tool.Progress()
    progress.say(done=True, ok=True, doing="ready")
    tool.STATUS.unlink()
    progress.say(doing="12 MB")
    assert not tool.STATUS.exists() and progress.state["doing"] == "ready"


@pytest.mark.parametrize("top", ["", "m-v1/"])
def test_archive_lands_whole_and_once(tool: t.Any, www: Served, tmp_path: Path, top: str) -> None:
    sha256 = archive(tmp_path / "www" / "m.tar", {f"{top}config.json": b"{}", f"{top}sub/weights.bin": b"x" * 5000})
    wanted = job(tmp_path, source="url", url=f"{www.url}/m.tar", sha256=sha256)
    assert tool.run(wanted) == 0
    target = tmp_path / "models" / "m" / "v1"
    assert {path.relative_to(target).as_posix() for path in target.rglob("*")} == {".complete", "config.json", "sub", "sub/weights.bin"}
    assert (target / "sub" / "weights.bin").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in target.parent.iterdir()] == ["v1"]
    assert status(tool)["changed"] == ["weights of m"] and status(tool)["ok"]
    www.server.shutdown()
    assert tool.run(wanted) == 0 and status(tool)["changed"] == []


def test_broken_line_goes_on_where_it_stopped(tool: t.Any, www: Served, tmp_path: Path) -> None:
    archive(tmp_path / "www" / "m.tar", {"config.json": b"{}", "w": b"y" * 50000})
    www.cut = 20000
    assert tool.run(job(tmp_path, source="url", url=f"{www.url}/m.tar")) == 0
    assert www.ranges == ["bytes=20000-"]
    assert (tmp_path / "models" / "m" / "v1" / "w").read_bytes() == b"y" * 50000


def test_half_a_directory_of_a_killed_run_is_replaced(tool: t.Any, www: Served, tmp_path: Path) -> None:
    archive(tmp_path / "www" / "m.tar", {"config.json": b"{}"})
    target = tmp_path / "models" / "m" / "v1"
    for path in (target, target.with_name(".v1.new")):
        path.mkdir(parents=True)
        (path / "junk").touch()
    assert tool.run(job(tmp_path, source="url", url=f"{www.url}/m.tar")) == 0
    assert {path.name for path in target.iterdir()} == {".complete", "config.json"}


def test_checksum_given_or_listed_is_checked(tool: t.Any, www: Served, tmp_path: Path) -> None:
    sha256 = archive(tmp_path / "www" / "m.tar", {"config.json": b"{}"})
    assert tool.run(job(tmp_path, source="url", url=f"{www.url}/m.tar", sha256="0" * 64)) == 1
    assert "sha256" in status(tool)["error"] and not (tmp_path / "models" / "m" / "v1").exists()
    (tmp_path / "www" / "SHA256SUMS").write_text(f"{'1' * 64}  m.tar\n")
    assert tool.run(job(tmp_path, source="url", url=f"{www.url}/m.tar")) == 1
    (tmp_path / "www" / "SHA256SUMS").write_text(f"{sha256} *m.tar\n")
    assert tool.run(job(tmp_path, source="url", url=f"{www.url}/m.tar")) == 0


@pytest.mark.parametrize(
    ("names", "link", "text"),
    [
        ({"../evil": b"x"}, "", "leads out"),
        ({"/tmp/evil": b"x"}, "", "leads out"),
        ({"a": b""}, "link", "neither a file"),
        ({"readme": b""}, "", "no config.json"),
    ],
)
def test_bad_archives_are_refused(tool: t.Any, www: Served, tmp_path: Path, names: t.Any, link: str, text: str) -> None:
    archive(tmp_path / "www" / "m.tar", names, link)
    assert tool.run(job(tmp_path, source="url", url=f"{www.url}/m.tar")) == 1
    assert text in status(tool)["error"] and not (tmp_path / "models" / "m" / "v1").exists()


def test_errors_name_the_url_without_its_credentials(tool: t.Any, www: Served, tmp_path: Path) -> None:
    url = www.url.replace("//", "//me:secret@")
    assert tool.run(job(tmp_path, source="url", url=f"{url}/none.tar")) == 1
    assert "HTTP 404" in status(tool)["error"] and "secret" not in tool.STATUS.read_text()
    (tmp_path / "www" / "text.tar").write_text("hello")
    assert tool.run(job(tmp_path, source="url", url=f"{www.url}/text.tar")) == 1 and "not a whole tar archive" in status(tool)["error"]


def test_no_room_is_said_before(tool: t.Any, www: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive(tmp_path / "www" / "m.tar", {"config.json": b"{}"})
    monkeypatch.setattr(tool.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100}))
    assert tool.run(job(tmp_path, source="url", url=f"{www.url}/m.tar")) == 1
    assert "are free" in status(tool)["error"] and "data_root" in status(tool)["error"]


def test_path_is_used_where_it_lies(tool: t.Any, tmp_path: Path) -> None:
    wanted = job(tmp_path, source="path")
    assert tool.run(wanted) == 1 and "has no config.json" in status(tool)["error"]
    target = tmp_path / "models" / "m" / "v1"
    target.mkdir(parents=True)
    (target / "config.json").touch()
    assert tool.run(wanted) == 0 and [path.name for path in target.iterdir()] == ["config.json"]


FAKE_PYTHON = """#!{python}
import json, os, pathlib, sys
job = json.loads(sys.stdin.readline())
log = pathlib.Path({log!r})
with log.open("a") as out:
    out.write(json.dumps([job, dict(os.environ), sys.argv]) + "\\n")
if job["do"] == "list":
    print(json.dumps({{"commit": "c0ffee", "files": json.loads(pathlib.Path({files!r}).read_text())}}))
else:
    for entry in job["files"]:
        path = pathlib.Path(job["target"], entry["path"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x" * entry["size"])
    print("{{}}")
"""


def entry(path: str, size: t.Any = 2, **values: str) -> dict[str, t.Any]:
    return {"path": path, "size": size, "sha256": "", "blob": "", **values}


@pytest.fixture
def clients(tool: t.Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> t.Callable[..., t.Any]:
    """A client of the hubs that lists what it is told to; the real ones are in tests/engines/hub."""
    python = tmp_path / "engines" / "hub-0123456789ab" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE_PYTHON.format(python=sys.executable, log=str(tmp_path / "log"), files=str(tmp_path / "files")))
    python.chmod(0o755)
    monkeypatch.setattr(tool, "build", lambda engine, job, progress: None)

    def listing(*files: dict[str, t.Any]) -> list[t.Any]:
        (tmp_path / "files").write_text(json.dumps(files))
        return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()] if (tmp_path / "log").exists() else []

    return listing


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_hub_clients_get_their_job_and_nothing_else_of_the_host(
    tool: t.Any, clients: t.Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN", "PYTHONPATH"):
        monkeypatch.setenv(name, "of this host")
    monkeypatch.setenv("https_proxy", "http://proxy")
    names = ("config.json", "a.onnx", "model.safetensors", "pytorch_model.bin", "1_Dense/pytorch_model.bin", ".complete")
    clients(*(entry(name) for name in names))
    wanted = job(tmp_path, source=source, id="org/m", revision="v1", exclude=["*.onnx"])
    wanted.update(endpoints={source: "http://mirror"}, tokens={source: "s3cret"})
    assert tool.run(wanted) == 0, status(tool)["error"]
    (listed, env, argv), (fetched, _env, _argv) = clients()
    assert (listed["id"], listed["revision"], listed["endpoint"], listed["token"]) == ("org/m", "v1", "http://mirror", "s3cret")
    assert [one["path"] for one in fetched["files"]] == ["config.json", "model.safetensors", "1_Dense/pytorch_model.bin"] and fetched["commit"] == "c0ffee"
    assert "of this host" not in env.values() and env["https_proxy"] == "http://proxy" and env["HF_HUB_DISABLE_XET"] == "1"
    assert "s3cret" not in json.dumps([env, argv])
    target = tmp_path / "models" / "m" / "v1"
    marker = json.loads((target / ".complete").read_text())
    assert marker["commit"] == "c0ffee" and len(marker["listing"]) == 64 and "s3cret" not in json.dumps(marker)
    assert [path.name for path in target.parent.iterdir()] == ["v1"]


@pytest.mark.parametrize(
    "files",
    [
        *([entry(path)] for path in ("../evil", "/etc/evil", "a/../../evil", "a//b", "./a", "a/", "", "a\\..\\b", "a\nb", "a\0b", "x" * 241)),
        [entry("a", None)],
        [entry("a", -1)],
        [entry("a", "2")],
        [entry("a"), entry("a")],
        [entry("a"), entry("a/b")],
        [entry(None)],  # type: ignore[arg-type]
    ],
)
def test_a_listing_whose_names_lead_out_is_refused(tool: t.Any, clients: t.Any, tmp_path: Path, files: list[t.Any]) -> None:
    clients(entry("config.json"), *files)
    assert tool.run(job(tmp_path, source="huggingface", id="org/m")) == 1
    assert "its listing holds" in status(tool)["error"] and "org/m" in status(tool)["error"]
    assert len(clients()) == 1 and not [path for path in tmp_path.rglob("*") if "evil" in path.name]


def test_what_is_intact(tool: t.Any, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"hello\n")
    sha256 = hashlib.sha256(b"hello\n").hexdigest()
    # what `git hash-object` says of it
    blob = "ce013625030ba8dba906f756967f9e9ca394464a"
    assert tool.intact(path, entry("file", 6, sha256=sha256)) and tool.intact(path, entry("file", 6, blob=blob)) and tool.intact(path, entry("file", 6))
    assert not tool.intact(path, entry("file", 5)) and not tool.intact(path, entry("file", 6, sha256="0" * 64))
    assert not tool.intact(path, entry("file", 6, blob="0" * 40)) and not tool.intact(tmp_path / "none", entry("none", 0))


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "model-1.safetensors"}}', "lacks model-1.safetensors"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "config.json"}}', ""),
        ("model.safetensors", "weights", ""),
    ],
)
def test_a_directory_that_no_engine_could_load(tool: t.Any, tmp_path: Path, name: str, text: str, fault: str) -> None:
    target = tmp_path / "models" / "m" / "v1"
    target.mkdir(parents=True)
    (target / "config.json").write_text("{}")
    (target / name).write_text(text)
    assert tool.run(job(tmp_path, source="path")) == bool(fault)
    assert fault in status(tool)["error"] and ("weights.path" in status(tool)["error"] or not fault)


def test_a_file_that_changed_is_not_gone_on_with(tool: t.Any, www: Served, tmp_path: Path) -> None:
    archive(tmp_path / "www" / "m.tar", {"config.json": b"{}", "w": b"y" * 50000})
    wanted = job(tmp_path, source="url", url=f"{www.url}/m.tar")
    work = tmp_path / "models" / "m" / ".v1.new"
    work.mkdir(parents=True)
    (work / "archive").write_bytes(b"half of what was there")
    sha256 = hashlib.sha256((tmp_path / "www" / "m.tar").read_bytes()).hexdigest()
    wanted["weights"][0]["sha256"] = sha256
    assert tool.run(wanted) == 0, status(tool)["error"]
    assert www.ranges[0] == "bytes=22-" and (tmp_path / "models" / "m" / "v1" / "w").read_bytes() == b"y" * 50000


@pytest.mark.parametrize(
    ("error", "kind", "passes"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk", False),
        (OSError(errno.EROFS, "Read-only file system"), "write", False),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "line", True),
        (TimeoutError("timed out"), "line", True),
        (socket.gaierror(-2, "Name or service not known"), "dns", True),
        (ssl.SSLCertVerificationError(1, "CERTIFICATE_VERIFY_FAILED"), "tls", False),
        (urllib.error.URLError(ssl.SSLError(1, "wrong version number")), "tls", False),
        (urllib.error.HTTPError("http://h", 404, "Not Found", Message(), None), "missing", False),
        (urllib.error.HTTPError("http://h", 401, "Unauthorized", Message(), None), "denied", False),
        (urllib.error.HTTPError("http://h", 407, "Proxy", Message(), None), "proxy", False),
        (urllib.error.HTTPError("http://h", 503, "Busy", Message(), None), "server", True),
        (ValueError("no hub"), "strange", False),
    ],
)
def test_causes_are_told_apart(tool: t.Any, error: Exception, kind: str, passes: bool) -> None:
    for one in (error, RuntimeError(error)):
        problem = tool.explain(one)
        assert (problem.kind, problem.passes) == (kind, passes)
    try:
        raise RuntimeError("outer") from error
    except RuntimeError as outer:
        assert tool.explain(outer).kind == kind


def test_every_kind_has_its_remedy(tool: t.Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://me:secret@proxy:3128")
    weights = {"model": "m", "source": "modelscope", "id": "org/m", "revision": "v1"}
    kinds = ("denied", "missing", "dns", "line", "proxy", "damaged", "disk")
    said = {kind: str(tool.told(tool.Problem(kind, "no"), weights, "https://h", "f")) for kind in kinds}
    assert all(text.startswith("weights of m: https://h: org/m (revision v1): f: no. ") for text in said.values()) and len(set(said.values())) == len(said)
    assert "model_server_modelscope_token" in said["denied"] and "http://***@proxy:3128" in said["line"] and "secret" not in said["line"]


def test_how_far_it_is(tool: t.Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(tool.time, "monotonic", lambda: clock[0])
    meter = tool.Meter("w", 30_000_000, tmp_path, tmp_path / "none")
    assert meter() == "w: 0 B of 30.0 MB"
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    clock[0] += 10
    assert meter() == "w: 3.0 MB of 30.0 MB, 300.0 kB/s, 90 s left"
    clock[0] += 5
    assert meter() == "w: 3.0 MB of 30.0 MB, 200.0 kB/s, 3 min left"
    clock[0] += 70
    assert meter() == "w: 3.0 MB of 30.0 MB"
    clock[0] += 30
    assert meter() == "w: 3.0 MB of 30.0 MB, nothing new for 30 s"


FAKE_UV = """#!/bin/sh
echo "$@ index=$UV_DEFAULT_INDEX links=$UV_FIND_LINKS none=$UV_NO_INDEX" >> "$(dirname "$0")/../../../log"
[ ! -e "$(dirname "$0")/../../../fail" ] || { echo "no matching distribution at http://me:secret@host/"; exit 1; }
"""


def engine_job(tool: t.Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **packages: t.Any) -> dict[str, t.Any]:
    uv = tmp_path / "engines" / "uv-1" / "bin"
    uv.mkdir(parents=True, exist_ok=True)
    (uv / "uv").write_text(FAKE_UV)
    (uv / "uv").chmod(0o755)
    monkeypatch.setattr(tool, "make_uv", lambda job: str(uv / "uv"))
    monkeypatch.setattr(tool, "need_room", lambda path, wanted, what: None)
    wanted = job(tmp_path)
    engine = {"name": "infinity", "dir": str(tmp_path / "engines" / "infinity-0123456789ab"), "torch": "2", "lock": "/lock.txt", "torch_index": "http://t/"}
    return {**wanted, "python": sys.executable, "uv_version": "1", "packages": packages, "engines": [engine]}


def test_engine_is_built_once_and_a_half_one_again(tool: t.Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = engine_job(tool, tmp_path, monkeypatch, index_url="http://i/", find_links="", offline=False)
    directory = Path(wanted["engines"][0]["dir"])
    (directory / "junk").mkdir(parents=True)
    assert tool.run(wanted) == 1  # torch did not come: the fake installs nothing
    assert "import of torch" in status(tool)["error"] and not (directory / ".complete").exists()
    real = tool.call
    monkeypatch.setattr(tool, "call", lambda argv, env, what: None if "import" in what else real(argv, env, what))
    assert tool.run(wanted) == 0 and (directory / ".complete").exists() and not (directory / "junk").exists()
    lines = (tmp_path / "log").read_text().splitlines()[-2:]
    assert lines[0].endswith("torch==2 index=http://t/ links= none=") and "--no-deps" in lines[0]
    assert lines[1].endswith("--require-hashes -r /lock.txt index=http://i/ links= none=")
    assert tool.run(wanted) == 0 and len((tmp_path / "log").read_text().splitlines()) == 4


def test_wheelhouse_is_used_alone_when_offline(tool: t.Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = engine_job(tool, tmp_path, monkeypatch, index_url="http://i/", find_links="http://w:1/", offline=True)
    assert tool.run(wanted) == 1
    assert [line.split("index=")[1] for line in (tmp_path / "log").read_text().splitlines()] == [" links=http://w:1/ none=1"] * 2
    assert tool.package_env(wanted)["PIP_TRUSTED_HOST"] == "w:1"


def test_a_failed_installation_says_why(tool: t.Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fail").touch()
    assert tool.run(engine_job(tool, tmp_path, monkeypatch)) == 1
    error = status(tool)["error"]
    assert "torch 2" in error and "no matching distribution" in error and "model_server_torch_index" in error and "secret" not in error


def test_telling(tool: t.Any, capsys: pytest.CaptureFixture[str]) -> None:
    def told(since: float, seconds: float = 0.0) -> dict[str, t.Any]:
        capsys.readouterr()
        assert tool.tell(seconds, since) == 0
        return dict(json.loads(capsys.readouterr().out))

    assert told(time.time())["doing"] == "starting"
    assert "did not start" in told(time.time(), 5)["error"]
    tool.Progress().say(doing="torch")
    assert told(0)["doing"] == "torch" and not told(0)["done"]
    assert told(time.time() + 9)["doing"] == "waiting for an earlier run, torch"
    tool.STATUS.write_text(json.dumps({**status(tool), "pid": 2**22 + 1}))
    assert told(0)["done"] and "killed" in told(0)["error"]
    tool.Progress().say(done=True, ok=True, doing="ready")
    assert told(0, 60)["ok"]


def test_unexpected_trouble_reaches_the_play(tool: t.Any, tmp_path: Path) -> None:
    assert tool.run(job(tmp_path, source="url", url="nonsense://x")) == 1
    assert status(tool)["done"] and status(tool)["error"]
    assert os.path.exists(tool.LOCK)
