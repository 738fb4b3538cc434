# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import json
import os
import sys
import tarfile
import threading
import time
import typing as t
from pathlib import Path

import pytest

FAKE_HUB = """#!{python}
import os, sys, pathlib
target = pathlib.Path(sys.argv[sys.argv.index("--local-dir") + 1])
pathlib.Path({log!r}).write_text(repr((sys.argv[1:], os.environ.get("HF_ENDPOINT"))))
(target / "config.json").write_text("{{}}")
(target / ".cache").mkdir()
"""


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
        "hub": {"name": "hub", "dir": str(tmp_path / "engines" / "hub-0123456789ab")},
        "weights": [{"model": "m", "path": str(tmp_path / "models" / "m" / "v1"), **weights}] if weights else [],
    }


def status(tool: t.Any) -> dict[str, t.Any]:
    return dict(json.loads(tool.STATUS.read_text()))


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
    assert tool.run(job(tmp_path, source="url", url=f"{www.url}/text.tar")) == 1 and "not a tar archive" in status(tool)["error"]


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


@pytest.mark.parametrize(
    ("source", "command"),
    [
        ("huggingface", "['download', 'org/m', '--local-dir', '{new}', '--quiet', '--revision', 'v1', '--exclude', '*.onnx', '--exclude', '*.h5']"),
        ("modelscope", "['download', 'org/m', '--local-dir', '{new}', '--revision', 'v1', '--exclude', '*.onnx', '*.h5']"),
    ],
)
def test_hub_clients_get_their_command_lines(tool: t.Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, command: str) -> None:
    wanted = job(tmp_path, source=source, id="org/m", revision="v1", exclude=["*.onnx", "*.h5"], endpoint="http://mirror", need_gb=0.1)
    hub = Path(wanted["hub"]["dir"]) / "bin"
    hub.mkdir(parents=True)
    for name in ("hf", "modelscope"):
        (hub / name).write_text(FAKE_HUB.format(python=sys.executable, log=str(tmp_path / "log")))
        (hub / name).chmod(0o755)
    monkeypatch.setattr(tool, "build", lambda engine, job, progress: None)
    assert tool.run(wanted) == 0, status(tool)["error"]
    new = tmp_path / "models" / "m" / ".v1.new"
    endpoint = "'http://mirror'" if source == "huggingface" else "None"
    assert (tmp_path / "log").read_text() == f"({command.format(new=new)}, {endpoint})"
    target = tmp_path / "models" / "m" / "v1"
    assert {path.name for path in target.iterdir()} == {".complete", "config.json"} and [path.name for path in target.parent.iterdir()] == ["v1"]


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
    engine = {"name": "infinity", "dir": str(tmp_path / "engines" / "infinity-0123456789ab"), "torch": "2", "lock": "/lock.txt"}
    return {**wanted, "python": sys.executable, "uv_version": "1", "packages": packages, "engines": [engine]}


def test_engine_is_built_once_and_a_half_one_again(tool: t.Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = engine_job(tool, tmp_path, monkeypatch, index_url="http://i/", find_links="", torch_index="http://t/", offline=False)
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
    wanted = engine_job(tool, tmp_path, monkeypatch, index_url="http://i/", find_links="http://w:1/", torch_index="http://t/", offline=True)
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
