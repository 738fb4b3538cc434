# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
import time
import typing as t
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PREPARE = ROOT / "roles" / "model_server" / "files" / "prepare.py"

spec = importlib.util.spec_from_file_location("test_hub_server", ROOT / "tests" / "support" / "hub.py")
assert spec and spec.loader
server = importlib.util.module_from_spec(spec)
sys.modules["test_hub_server"] = server
spec.loader.exec_module(server)


def tiny_model(size: int = 300_000, seed: int = 1) -> dict[str, bytes]:
    draw = random.Random(seed)  # noqa: S311 - bytes of a test
    return {
        "config.json": b'{"model_type": "bert"}',
        "model-00001-of-00002.safetensors": draw.randbytes(size),
        "model-00002-of-00002.safetensors": draw.randbytes(size // 3),
        "model.safetensors.index.json": b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}',
        "1_Pooling/config.json": b"{}",
        "empty.txt": b"",
        "tokenizer.json": draw.randbytes(5000),
    }


class Host:
    """A host's directories and the processes of prepare.py on it, as the role starts them."""

    def __init__(self, root: Path, url: str, source: str) -> None:
        self.root, self.url, self.source = root, url, source
        self.models = root / "models"
        self.env = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "no_proxy": "127.0.0.1"}
        self.started: list[subprocess.Popen[str]] = []

    def weights(self, name: str = "org/m", revision: str = "", model: str = "m", **values: t.Any) -> dict[str, t.Any]:
        path = self.models / model / f"{self.source}-{revision or 'latest'}"
        return {"model": model, "path": str(path), "source": self.source, "id": name, "revision": revision, "exclude": [], **values}

    def job(self, *weights: dict[str, t.Any], token: str = "", **values: t.Any) -> dict[str, t.Any]:
        wanted = {
            "python": sys.executable,
            "engines_dir": str(self.root / "engines"),
            "engines": [],
            "hub": {"name": "hub", "dir": os.environ["ENGINE_DIR"]},
            "endpoints": {self.source: self.url},
            "tokens": {self.source: token},
            "weights": list(weights) or [self.weights()],
            "pause": 0.01,
        }
        return {**wanted, **values}

    def start(self, job: dict[str, t.Any], run: str = "run", before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        streams: dict[str, t.Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        argv = [*before, sys.executable, str(PREPARE)]
        process = subprocess.Popen(argv, env={**self.env, "MODEL_SERVER_RUN": str(self.root / run)}, text=True, **streams)
        self.started.append(process)
        assert process.stdin
        process.stdin.write(json.dumps(job))
        process.stdin.close()
        process.stdin = None
        return process

    def run(self, job: dict[str, t.Any] | None = None, **values: t.Any) -> str:
        """The error; empty when all is there."""
        process = self.start(job or self.job(), **values)
        process.communicate(timeout=60)
        state = self.state(values.get("run", "run"))
        assert (process.returncode == 0) == state["ok"] == (not state["error"]) and state["done"]
        return str(state["error"])

    def state(self, run: str = "run") -> dict[str, t.Any]:
        return dict(json.loads((self.root / run / "prepare.json").read_text()))

    def has(self, files: dict[str, bytes], weights: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """What the marker says of a model that is there, whole and alone."""
        target = Path((weights or self.weights())["path"])
        there = {path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file() and path.name != ".complete"}
        assert there == files
        assert [path.name for path in target.parent.iterdir()] == [target.name]
        return dict(json.loads((target / ".complete").read_text()))

    def clients(self) -> list[str]:
        """Processes of the hubs' clients that work below this host's directories."""
        found = []
        for process in Path("/proc").iterdir():
            try:
                if process.name.isdigit() and b"/hub.py" in (process / "cmdline").read_bytes():
                    found += [process.name] if str(self.root) in (process / "environ").read_text(errors="replace") else []
            except OSError:
                pass
        return found

    def gone(self, seconds: float = 5) -> bool:
        deadline = time.monotonic() + seconds
        while self.clients():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


@pytest.fixture
def hub() -> t.Iterator[t.Any]:
    with server.Hub() as running:
        yield running


@pytest.fixture(params=["huggingface", "modelscope"])
def host(request: pytest.FixtureRequest, tmp_path: Path, hub: t.Any) -> t.Iterator[Host]:
    one = Host(tmp_path, hub.url, request.param)
    yield one
    for process in one.started:
        process.kill()
        process.wait()
