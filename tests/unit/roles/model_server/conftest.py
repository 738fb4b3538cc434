# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import http.server
import importlib.util
import json
import sys
import threading
import typing as t
from pathlib import Path

import pytest

FILES = Path(__file__).resolve().parents[4] / "roles" / "model_server" / "files"

SYSTEMCTL = """#!{python}
import json, sys, pathlib
root = pathlib.Path({root!r})
with open(root / "systemctl.log", "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
states = json.loads((root / "states.json").read_text())
command = sys.argv[1]
units = [name for name in sys.argv[2:] if name.endswith((".service", ".timer"))]
if command == "show":
    for name in units:
        state = dict(ActiveState="inactive", UnitFileState="", NRestarts="0", MainPID="0", InvocationID="", ActiveEnterTimestampMonotonic="1")
        state.update(states.get(name, {{}}))
        print("Id=" + name)
        print("\\n".join(key + "=" + str(value) for key, value in state.items()), end="\\n\\n")
elif command == "list-units":
    print("\\n".join(name + " loaded active running" for name in states if name.startswith("selfhosted-model@")))
elif command in ("enable", "disable", "restart"):
    fail = (root / "fail").exists() and command == "restart" and "@" in sys.argv[-1]
    for name in units:
        state = states.setdefault(name, {{}})
        if command == "enable":
            state["UnitFileState"] = "enabled"
        elif command == "disable":
            states.pop(name)
        elif not fail:
            state["ActiveState"] = "active"
            state["InvocationID"] = str(int(state.get("InvocationID", 0)) + 1)
    (root / "states.json").write_text(json.dumps(states))
    sys.exit(1 if fail else 0)
"""

DOCKER = """#!{python}
import json, sys, pathlib
root = pathlib.Path({root!r})
containers = json.loads((root / "containers.json").read_text())
if sys.argv[1] == "inspect":
    found = [containers[name] for name in sys.argv[4:] if name in containers]
    print(json.dumps(found))
    sys.exit(0 if len(found) == len(sys.argv[4:]) else 1)
elif sys.argv[1] in ("restart", "rm") and (root / "fail").exists():
    sys.exit("no room")
elif sys.argv[1] == "restart":
    with open(root / "docker.log", "a") as log:
        log.write(sys.argv[2] + "\\n")
    containers[sys.argv[2]]["State"]["StartedAt"] = "2020-01-02T00:00:00.5Z"
    (root / "containers.json").write_text(json.dumps(containers))
elif sys.argv[1] == "ps":
    print("\\n".join(containers))
elif sys.argv[1] == "rm":
    containers.pop(sys.argv[-1])
    (root / "containers.json").write_text(json.dumps(containers))
elif sys.argv[1] == "logs":
    print("CUDA out of memory", file=sys.stderr)
"""


def load(name: str) -> t.Any:
    spec = importlib.util.spec_from_file_location(name, FILES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakeEngine:
    """Answers every POST with what `answer` gives, a status and an object."""

    def __init__(self) -> None:
        self.answer: t.Callable[[str, t.Any], tuple[int, t.Any]] = lambda path, body: (200, {})
        self.asked: list[t.Any] = []
        self.headers: list[t.Any] = []
        engine = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *arguments: t.Any) -> None:
                pass

            def reply(self, status: int, body: t.Any) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                self.reply(*engine.answer(self.path, None))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                engine.asked.append(body)
                engine.headers.append(self.headers)
                self.reply(*engine.answer(self.path, body))

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = int(self.server.server_address[1])
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def fake_engine() -> t.Iterator[FakeEngine]:
    engine = FakeEngine()
    yield engine
    engine.stop()


class Host:
    """A host's files in a temporary directory, with a systemctl that only remembers."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.tool = load("model_server")
        for name in ("STATE", "UNITS", "RUN"):
            path = root / name.lower()
            path.mkdir()
            setattr(self.tool, name, path)
        self.tool.CONFIG = root / "servers.json"
        binary = root / "bin" / "systemctl"
        binary.parent.mkdir()
        binary.write_text(SYSTEMCTL.format(python=sys.executable, root=str(root)))
        binary.chmod(0o755)
        journal = root / "bin" / "journalctl"
        journal.write_text("#!/bin/sh\necho it said something\n")
        journal.chmod(0o755)
        docker = root / "bin" / "docker"
        docker.write_text(DOCKER.format(python=sys.executable, root=str(root)))
        docker.chmod(0o755)
        (root / "containers.json").write_text("{}")
        monkeypatch.setenv("PATH", f"{binary.parent}:/usr/bin:/bin")
        (root / "states.json").write_text("{}")
        (self.tool.UNITS / "selfhosted-model@.service").write_text("[Service]\n")
        (root / "engines").mkdir()

    def states(self) -> dict[str, t.Any]:
        return dict(json.loads((self.root / "states.json").read_text()))

    def set_state(self, unit: str, **values: t.Any) -> None:
        states = self.states()
        states.setdefault(unit, {}).update(values)
        (self.root / "states.json").write_text(json.dumps(states))

    def set_container(self, name: str, running: bool = True, restarts: int = 0) -> None:
        state = {"Running": running, "StartedAt": "2020-01-01T00:00:00.123456789Z"}
        entry = {"Id": "f00", "Name": f"/{name}", "State": state, "RestartCount": restarts}
        (self.root / "containers.json").write_text(json.dumps({name: entry}))

    def restarts(self, container: str) -> int:
        path = self.root / "docker.log"
        return path.read_text().splitlines().count(container) if path.exists() else 0

    def log(self) -> list[str]:
        path = self.root / "systemctl.log"
        return path.read_text().splitlines() if path.exists() else []

    def engine_dir(self, name: str = "infinity-0123456789ab") -> Path:
        path = self.root / "engines" / name
        if not path.exists():
            (path / "bin").mkdir(parents=True)
            (path / "bin" / "python").symlink_to(sys.executable)
            (path / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}").mkdir(parents=True)
            (path / ".complete").write_text("{}")
        return path

    def weights(self, model: str) -> Path:
        path = self.root / "models" / model / "main"
        if not path.exists():
            path.mkdir(parents=True)
            (path / "config.json").write_text("{}")
            (path / ".complete").write_text("{}")
        return path

    def server(self, instance: str, port: int = 1, kind: str = "embedding", **values: t.Any) -> dict[str, t.Any]:
        bodies: dict[str, t.Any] = {
            "embedding": {"input": ["ping"]},
            "rerank": {"documents": ["a", "b"]},
            "rerank46": {"inputs": [{"id": 1, "text": "a"}]},
            "chat": {"messages": []},
        }
        return {
            "instance": instance,
            "name": f"m{instance}@host",
            "port": port,
            "engine_dir": str(self.engine_dir()),
            "weights": str(self.weights(f"m{instance}")),
            "argv": ["/bin/true"],
            "env": {},
            "cwd": str(self.root / "state" / instance),
            "memory_max": "2G",
            "start_timeout": 600,
            "probe": {"kind": kind, "url": f"http://127.0.0.1:{port}/v1/x", "body": bodies[kind], "dimensions": 3 if kind == "embedding" else None},
            **values,
        }

    def config(self, *servers: dict[str, t.Any], **values: t.Any) -> dict[str, t.Any]:
        config = {
            "engines_dir": str(self.root / "engines"),
            "engines": [{"name": "infinity", "dir": str(self.engine_dir())}],
            "weights": [{"model": server["name"], "path": server["weights"]} for server in servers if server.get("weights")],
            "health": {"enabled": True, "interval": 60, "timeout": 2, "failures": 2},
            "servers": list(servers),
            **values,
        }
        self.tool.CONFIG.write_text(json.dumps(config))
        return config


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


@pytest.fixture
def script() -> t.Callable[[str], t.Any]:
    """Loads one of the role's scripts."""
    return load
