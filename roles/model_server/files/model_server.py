# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Launches, compares, applies and probes the model servers of this host. Private to the role selfhosted.fastgpt.model_server.

launch INSTANCE   becomes the engine of that instance (ExecStart of selfhosted-model@.service)
plan              what is missing or differs, as JSON; the wanted servers.json may come on standard input (--stdin)
apply             makes the units what servers.json says, as JSON
probe             one real request to each server, as JSON; --wait SECONDS, --restart for the timer
uninstall         stops and removes every unit
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

TOOL = Path(__file__).resolve()
CONFIG = Path(os.environ.get("MODEL_SERVER_CONFIG", "/etc/selfhosted-fastgpt/model_server/servers.json"))
STATE = Path(os.environ.get("MODEL_SERVER_STATE", "/var/lib/selfhosted-model"))
UNITS = Path(os.environ.get("MODEL_SERVER_UNITS", "/etc/systemd/system"))
RUN = Path(os.environ.get("MODEL_SERVER_RUN", "/run/selfhosted-model"))
PREFIX = "selfhosted-model@"
TEMPLATE = "selfhosted-model@.service"
HEALTH = "selfhosted-model-health"
MARKER = ".complete"
ENGINE_DIR = re.compile(r"^(infinity|transformers|legacy_chat|hub|uv)(-gpu)?-[0-9a-f.]{5,}$")
ROLE_LABEL = "label=selfhosted.fastgpt.role=model_server"
# An engine that is started again this often does not come up by waiting.
HOPELESS = 4

Server = dict[str, Any]


class Trouble(Exception):
    """Something that the operator has to know; the message holds the remedy."""


def load(text: str | None = None) -> dict[str, Any]:
    try:
        return dict(json.loads(CONFIG.read_text(encoding="utf-8") if text is None else text))
    except OSError as error:
        raise Trouble(f"{CONFIG}: {error.strerror}: run the role model_server again.") from error
    except ValueError as error:
        raise Trouble(f"{CONFIG}: not JSON ({error}): run the role model_server again.") from error


def unit_of(instance: str) -> str:
    return f"{PREFIX}{instance}.service"


def write(path: Path, text: str, mode: int = 0o644) -> bool:
    """Whether the file had to be written; a reader never sees half of it."""
    try:
        if path.read_text(encoding="utf-8") == text:
            return False
    except OSError:
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.chmod(mode)
    temporary.replace(path)
    return True


def content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


# ---------------------------------------------------------------- launch


def launch(instance: str) -> None:
    server = next((one for one in load()["servers"] if one["instance"] == instance), None)
    if server is None:
        raise Trouble(f"{instance}: not in {CONFIG}; this unit is left over: systemctl disable --now {unit_of(instance)}")
    directory = Path(server["cwd"])
    for name in server.get("directories", []):
        (directory / name).mkdir(parents=True, exist_ok=True)
    for name, target in server.get("links", {}).items():
        link = directory / name
        if not link.is_symlink() or os.readlink(link) != target:
            link.unlink(missing_ok=True)
            link.symlink_to(target)
    for path in [server["argv"][0], *server.get("needs", [])]:
        if not os.access(path, os.R_OK):
            raise Trouble(f"{path}: missing or not readable for this user: run the role model_server again.")
    os.chdir(directory)
    os.execve(server["argv"][0], server["argv"], server["env"])


# ---------------------------------------------------------------- what stands


class Standing(NamedTuple):
    """What runs a server at this moment: a unit, or a container."""

    called: str
    active: bool = False
    run: str = ""
    age: float = 0.0
    restarts: int = 0
    pid: int = 0


def look(servers: list[Server]) -> dict[str, Standing]:
    units = [server for server in servers if not server.get("container")]
    found = states([unit_of(server["instance"]) for server in units])
    uptime = time.clock_gettime(time.CLOCK_MONOTONIC)
    result: dict[str, Standing] = {}
    for server in units:
        unit = unit_of(server["instance"])
        state = found.get(unit, {})
        result[server["instance"]] = Standing(
            unit,
            state.get("ActiveState") == "active",
            state.get("InvocationID", ""),
            uptime - int(state.get("ActiveEnterTimestampMonotonic") or 0) / 1e6,
            int(state.get("NRestarts") or 0),
            int(state.get("MainPID") or 0),
        )
    containers = inspect([str(server["container"]) for server in servers if server.get("container")])
    for server in servers:
        if server.get("container"):
            result[server["instance"]] = containers.get(str(server["container"]), Standing(f"container {server['container']}"))
    return result


def inspect(names: list[str]) -> dict[str, Standing]:
    if not names:
        return {}
    try:
        answer = subprocess.run(["docker", "inspect", "--type", "container", *names], capture_output=True, text=True, check=False)
        entries = json.loads(answer.stdout or "[]")
    except (OSError, ValueError):
        return {}
    found = {}
    for entry in entries:
        state, name = entry["State"], entry["Name"].lstrip("/")
        # fractions have nine digits there, more than Python 3.9 to 3.10 read
        started = datetime.strptime(state["StartedAt"][:19], "%Y-%m-%dT%H:%M:%S").replace(tzinfo=timezone.utc)
        age = (datetime.now(timezone.utc) - started).total_seconds()
        found[name] = Standing(f"container {name}", bool(state["Running"]), f"{entry['Id']} {state['StartedAt']}", age, int(entry.get("RestartCount", 0)))
    return found


def start_again(server: Server) -> None:
    if server.get("container"):
        docker("restart", str(server["container"]))
    else:
        systemctl("restart", unit_of(server["instance"]))


def docker(*arguments: str) -> None:
    try:
        answer = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise Trouble(f"docker {' '.join(arguments)}: {error.strerror}") from error
    # somebody was faster
    if answer.returncode != 0 and not (arguments[0] == "rm" and "No such container" in answer.stderr):
        raise Trouble(f"docker {' '.join(arguments)}: {answer.stderr.strip() or answer.returncode}")


def last_words(server: Server) -> str:
    """The end of a server's log, with the command that shows more of it."""
    command = ["docker", "logs", "--tail", "12", str(server["container"])] if server.get("container") else []
    command = command or ["journalctl", "-u", unit_of(server["instance"]), "-n", "12", "--no-pager", "-o", "cat"]
    try:
        answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError:
        return ""
    lines = answer.stdout.strip()
    shown = f"docker logs {server['container']}" if server.get("container") else f"journalctl -u {unit_of(server['instance'])}"
    return f"\nLast lines of {shown}:\n{lines}" if lines else ""


def systemctl(*arguments: str, check: bool = True) -> str:
    answer = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, check=False)
    if check and answer.returncode != 0:
        raise Trouble(f"systemctl {' '.join(arguments)}: {(answer.stderr or answer.stdout).strip() or answer.returncode}")
    return answer.stdout


def states(units: list[str]) -> dict[str, dict[str, str]]:
    if not units:
        return {}
    found: dict[str, dict[str, str]] = {}
    wanted = "Id,ActiveState,SubState,UnitFileState,NeedDaemonReload,NRestarts,MainPID,InvocationID,ActiveEnterTimestampMonotonic"
    for block in systemctl("show", "-p", wanted, "--", *units).split("\n\n"):
        values = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        if "Id" in values:
            found[values["Id"]] = values
    return found


def standing() -> set[str]:
    """Instances that systemd, a stamp or a drop-in knows of, listed or not."""
    names = {path.name for path in STATE.glob("stamps/*") if not path.name.startswith(".")}
    names |= {path.name[len(PREFIX) : -len(".service.d")] for path in UNITS.glob(f"{PREFIX}?*.service.d")}
    names |= {path.name[len(PREFIX) : -len(".service")] for path in UNITS.glob(f"*.wants/{PREFIX}?*.service")}
    for line in systemctl("list-units", "--all", "--plain", "--no-legend", f"{PREFIX}*.service", check=False).splitlines():
        if line.strip().startswith(PREFIX):
            names.add(line.split()[0][len(PREFIX) : -len(".service")])
    return names


def engine_fault(path: str) -> str:
    """Why an engine's directory cannot be used; empty when it can."""
    marker = Path(path) / MARKER
    if not marker.exists():
        return "not built"
    python = Path(path) / "bin" / "python"
    if not python.exists():
        return "its Python is gone"
    answer = subprocess.run(
        [str(python), "-I", "-S", "-c", "import sys; print('python%d.%d' % sys.version_info[:2])"], capture_output=True, text=True, check=False
    )
    if answer.returncode != 0 or not (Path(path) / "lib" / answer.stdout.strip()).is_dir():
        return "its Python is another version now"
    return ""


def weights_fault(weights: dict[str, Any]) -> str:
    path = Path(weights["path"])
    if weights.get("in_place"):
        return "" if (path / "config.json").is_file() else f"{path} has no config.json"
    return "" if (path / MARKER).is_file() else "not there"


def digest(server: Server, config: dict[str, Any]) -> str:
    """Everything whose change needs a restart."""
    parts = [json.dumps(server, sort_keys=True), content(UNITS / TEMPLATE), dropin(server)]
    parts += [content(Path(server[key]) / MARKER) for key in ("engine_dir", "weights") if server.get(key)]
    parts += [content(Path(name)) for name in server.get("files", [])]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def dropin(server: Server) -> str:
    lines = [f"MemoryMax={server['memory_max']}"] if server.get("memory_max") else []
    if server.get("gpus"):
        # the device nodes of a driver that nobody has used since the boot are made by this setuid program, which the engine may not run
        lines += ["PrivateDevices=no", "DevicePolicy=closed", "DeviceAllow=char-nvidia* rw", "ExecStartPre=+-/usr/bin/nvidia-modprobe -c 0 -u"]
    return "\n".join(["# Written by the role selfhosted.fastgpt.model_server", "[Service]", *lines, ""]) if lines else ""


def code_fault(config: dict[str, Any]) -> str:
    """Whether the engine that is code of this role is here in another form."""
    code = config.get("code") or {}
    if not code:
        return ""
    digest = hashlib.sha256()
    for path in sorted(Path(code["dir"]).glob("*.py")):
        digest.update(f"{path.name}\n{content(path)}\n".encode())
    return "" if digest.hexdigest() == code["sha256"] else "differs"


def mended(source: str) -> str:
    """A tokenizer's own code with the initialisation of its base class at the end of its constructor.

    transformers asks a tokenizer for its vocabulary from within that initialisation since 4.34, before older code has read it.
    """
    tree = ast.parse(source)
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__init__"]:
        calls = [one for one in function.body if ast.unparse(one).startswith("super().__init__(")]
        reads = [one for one in function.body if "sp_model" in ast.unparse(one)]
        if calls and reads and function.body.index(calls[0]) < function.body.index(reads[-1]):
            function.body.remove(calls[0])
            function.body.insert(function.body.index(reads[-1]) + 1, calls[0])
    return ast.unparse(tree) + "\n"


def mended_path(server: Server) -> Path:
    return Path(server["cwd"]) / "mended" / str(server["mend"])


def mend(server: Server) -> tuple[str, str]:
    """The mended tokenizer, and why what stands is not that; empty when it is."""
    source = Path(server["weights"]) / str(server["mend"])
    if not source.is_file():
        return "", f"{source} is not there"
    try:
        text = mended(content(source))
    except SyntaxError as error:
        raise Trouble(f"{source}: not Python ({error}): the weights are damaged, remove their directory and run the role again.") from error
    return text, "" if content(mended_path(server)) == text else "not mended"


def inputs(server: Server) -> str:
    """What a container reads from this host and keeps as it was at its start: its mounts are those files, not those that took their names later."""
    parts = [content(Path(server["weights"]) / MARKER), content(mended_path(server)) if server.get("mend") else ""]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def inputs_stamp(server: Server) -> Path:
    return Path(server["cwd"]) / "inputs"


def outdated_containers(config: dict[str, Any]) -> dict[str, str]:
    """Those that do not run with what the host holds now, each with the reason."""
    found = {}
    for server in config["servers"]:
        stamp = content(inputs_stamp(server)) if server.get("container") else ""
        if server.get("container") and stamp != inputs(server):
            found[str(server["container"])] = "its files changed" if stamp else "new"
    return found


def gone_containers(config: dict[str, Any]) -> list[str]:
    """Our containers that are not listed any more."""
    try:
        answer = subprocess.run(["docker", "ps", "-a", "--filter", ROLE_LABEL, "--format", "{{.Names}}"], capture_output=True, text=True, check=False)
    except OSError:
        return []
    wanted = {server["container"] for server in config["servers"] if server.get("container")}
    return sorted(set(answer.stdout.split()) - wanted)


def health_units(config: dict[str, Any]) -> dict[str, str]:
    interval = int(config.get("health", {}).get("interval", 60))
    head = "# Written by the role selfhosted.fastgpt.model_server\n"
    return {
        f"{HEALTH}.service": head + "[Unit]\nDescription=One real request to each model server, restart of those that fail\n"
        f"[Service]\nType=oneshot\nExecStart={sys.executable} {TOOL} probe --restart\nTimeoutStartSec=900\n",
        f"{HEALTH}.timer": head + "[Unit]\nDescription=Health of the model servers\n"
        f"[Timer]\nOnBootSec={interval}\nOnUnitInactiveSec={interval}\nAccuracySec=5\n[Install]\nWantedBy=timers.target\n",
    }


def differences(config: dict[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Instances to start again and instances to remove, each with the reason."""
    servers = {server["instance"]: server for server in config["servers"] if not server.get("container")}
    found = states([unit_of(name) for name in servers])
    restart: dict[str, str] = {}
    for name, server in servers.items():
        state = found.get(unit_of(name), {})
        stamp = content(STATE / "stamps" / name)
        if not stamp:
            restart[name] = "new"
        elif state.get("ActiveState") not in ("active", "activating", "reloading"):
            restart[name] = f"was {state.get('ActiveState') or 'not there'}"
        elif stamp != digest(server, config):
            restart[name] = "changed"
        elif state.get("UnitFileState") != "enabled":
            restart[name] = "was not enabled"
        elif content(UNITS / f"{unit_of(name)}.d" / "limits.conf") != dropin(server):
            restart[name] = "its limits were changed"
    remove = {name: "no longer listed" for name in standing() - set(servers)}
    return restart, remove


def health_fault(config: dict[str, Any]) -> str:
    units = health_units(config)
    wanted = bool(config["servers"]) and bool(config.get("health", {}).get("enabled", True))
    state = states([f"{HEALTH}.timer"]).get(f"{HEALTH}.timer", {})
    runs = state.get("ActiveState") == "active" and state.get("UnitFileState") == "enabled"
    if wanted and not (runs and all(content(UNITS / name) == text for name, text in units.items())):
        return "the health timer is not as it should be"
    if not wanted and (runs or any((UNITS / name).exists() for name in units)):
        return "the health timer is not wanted"
    return ""


def stale_engines(config: dict[str, Any]) -> list[Path]:
    used = {Path(engine["dir"]) for engine in config["engines"]}
    root = Path(config["engines_dir"])
    return sorted(path for path in root.glob("*-*") if path.is_dir() and ENGINE_DIR.match(path.name) and path not in used) if root.is_dir() else []


def plan(config: dict[str, Any]) -> dict[str, Any]:
    engines = {engine["name"]: engine_fault(engine["dir"]) for engine in config["engines"] if engine.get("needed", True)}
    weights = {one["model"]: weights_fault(one) for one in config["weights"]}
    restart, remove = differences(config)
    changes = [f"engine {name}: {why}" for name, why in engines.items() if why]
    changes += [f"weights of {name}: {why}" for name, why in weights.items() if why]
    changes += [f"{unit_of(name)}: {why}" for name, why in sorted({**restart, **remove}.items())]
    changes += [f"container {name}: no longer listed" for name in gone_containers(config)]
    mends = {server["name"]: mend(server)[1] for server in config["servers"] if server.get("mend")}
    changes += [f"tokenizer of {name}: {why}" for name, why in mends.items() if why]
    changes += [f"container {name}: {why}" for name, why in outdated_containers(config).items()]
    code = code_fault(config)
    changes += [f"code of the engine legacy_chat: {code}"] if code else []
    health = health_fault(config)
    return {
        "code": bool(code),
        "engines": [name for name, why in engines.items() if why],
        "weights": [name for name, why in weights.items() if why],
        "changes": changes + ([health] if health else []) + [f"{path}: no longer used" for path in stale_engines(config)],
        "now": time.time(),
    }


# ---------------------------------------------------------------- apply


def apply(config: dict[str, Any]) -> dict[str, Any]:
    restart, remove = differences(config)
    servers = {server["instance"]: server for server in config["servers"]}
    changed = [f"{unit_of(name)}: {why}" for name, why in sorted({**restart, **remove}.items())]
    removed = [unit_of(name) for name in sorted(remove)]
    if removed:
        systemctl("disable", "--now", *removed, check=False)
        systemctl("reset-failed", *removed, check=False)
        for name in remove:
            shutil.rmtree(UNITS / f"{unit_of(name)}.d", ignore_errors=True)
            shutil.rmtree(STATE / name, ignore_errors=True)
            (STATE / "stamps" / name).unlink(missing_ok=True)
    for container in gone_containers(config):
        docker("rm", "--force", container)
        for part in ("cache", "mended"):
            shutil.rmtree(STATE / container.rpartition("-")[2] / part, ignore_errors=True)
        (STATE / container.rpartition("-")[2] / "inputs").unlink(missing_ok=True)
        changed.append(f"container {container}: no longer listed")
    apply_containers(config, changed)
    for name in restart:
        # gone before anything is touched, so that a killed run starts the instance again
        (STATE / "stamps" / name).unlink(missing_ok=True)
        text = dropin(servers[name])
        if text:
            write(UNITS / f"{unit_of(name)}.d" / "limits.conf", text)
        else:
            shutil.rmtree(UNITS / f"{unit_of(name)}.d", ignore_errors=True)
    health = health_fault(config)
    if health:
        changed.append(health)
        apply_health(config)
    if restart or remove or health:
        systemctl("daemon-reload")
    if health and config["servers"] and config.get("health", {}).get("enabled", True):
        systemctl("enable", f"{HEALTH}.timer")
        systemctl("restart", f"{HEALTH}.timer")
    if restart:
        units = [unit_of(name) for name in sorted(restart)]
        systemctl("enable", *units)
        systemctl("restart", *units)
        for name in restart:
            write(STATE / "stamps" / name, digest(servers[name], config))
    for path in stale_engines(config):
        shutil.rmtree(path, ignore_errors=True)
        changed.append(f"{path}: no longer used")
    return {"changed": changed}


def apply_containers(config: dict[str, Any], changed: list[str]) -> None:
    """Their files. The containers themselves are made by the role afterwards."""
    listed = [server for server in config["servers"] if server.get("container")]
    for server in listed:
        (Path(server["cwd"]) / "cache").mkdir(parents=True, exist_ok=True)
        if server.get("mend"):
            text, why = mend(server)
            if not text:
                raise Trouble(f"tokenizer of {server['name']}: {why}: the weights are not those that the model's card speaks of. Correct mend_tokenizer.")
            if why:
                write(mended_path(server), text)
                changed.append(f"tokenizer of {server['name']}: mended")
    outdated = outdated_containers(config)
    there = inspect(list(outdated))
    for name, why in outdated.items():
        if name in there:
            docker("restart", name)
        changed.append(f"container {name}: {why}")
    # last, so that a killed run starts them again
    for server in listed:
        write(inputs_stamp(server), inputs(server))


def apply_health(config: dict[str, Any]) -> None:
    if config["servers"] and config.get("health", {}).get("enabled", True):
        for name, text in health_units(config).items():
            write(UNITS / name, text)
        return
    systemctl("disable", "--now", f"{HEALTH}.timer", check=False)
    for name in health_units(config):
        (UNITS / name).unlink(missing_ok=True)


def uninstall() -> dict[str, Any]:
    empty: dict[str, Any] = {"servers": [], "engines": [], "weights": [], "engines_dir": "/nonexistent"}
    result = apply(empty)
    if (UNITS / TEMPLATE).exists():
        (UNITS / TEMPLATE).unlink()
        systemctl("daemon-reload")
        result["changed"].append(TEMPLATE)
    return result


# ---------------------------------------------------------------- probe


def listener_fault(server: Server, standing_as: Standing) -> str:
    """An old process that holds the port answers in place of the unit's own; only root sees whose socket it is."""
    main = str(standing_as.pid)
    if os.geteuid() != 0 or standing_as.pid == 0:
        return ""
    port = int(server["port"])
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in content(Path(table)).splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and int(columns[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{columns[9]}]")
    for process in Path("/proc").iterdir():
        if not inodes or not process.name.isdigit():
            continue
        try:
            holds = any(os.readlink(entry) in inodes for entry in (process / "fd").iterdir())
        except OSError:
            continue
        if holds and not descends(process.name, main):
            name = content(process / "comm").strip()
            return (
                f"port {port} is held by process {process.name} ({name}), which is not {unit_of(server['instance'])}. "
                f"Stop it, then: systemctl restart {unit_of(server['instance'])}"
            )
    return ""


def descends(process: str, ancestor: str) -> bool:
    while process not in ("0", ""):
        if process == ancestor:
            return True
        # the command's name may hold spaces and parentheses
        process = (content(Path("/proc") / process / "stat").rpartition(")")[2].split() + ["", ""])[1]
    return False


def check_answer(probe: dict[str, Any], answer: Any) -> str:
    kind = probe["kind"]
    try:
        if kind == "embedding":
            vector = answer["data"][0]["embedding"]
            if probe.get("dimensions") and len(vector) != probe["dimensions"]:
                return f"the vector has {len(vector)} dimensions, the model card says {probe['dimensions']}. Correct the card, or the weights."
            if not vector or not all(math.isfinite(number) for number in vector):
                return "the vector holds values that are no numbers. The weights are damaged."
        elif kind == "rerank":
            scores = [result["relevance_score"] for result in answer["results"]]
            if len(scores) != len(probe["body"]["documents"]) or not all(math.isfinite(number) for number in scores):
                return "not every document got a score."
        elif kind == "rerank46":
            if len([result["score"] for result in answer["data"]]) != len(probe["body"]["inputs"]):
                return "not every input got a score."
        elif not isinstance(answer["choices"][0]["message"], dict):
            return "the answer holds no message."
    except (KeyError, IndexError, TypeError):
        return f"the answer has another shape: {json.dumps(answer)[:200]}"
    return ""


def engine_key(server: Server) -> str:
    try:
        return str(json.loads(content(Path(server["key_file"])))[server["instance"]])
    except (ValueError, KeyError):
        # the engine refuses it, and says so
        return "none"


def ask(server: Server, timeout: float) -> dict[str, Any]:
    probe = server["probe"]
    started = time.monotonic()
    detail, slow = "", False
    headers = {"Content-Type": "application/json"}
    if server.get("key_file"):
        headers["Authorization"] = f"Bearer {engine_key(server)}"
    try:
        call = urllib.request.Request(probe["url"], json.dumps(probe["body"]).encode(), headers)
        # never through a proxy of the environment
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(call, timeout=timeout) as reply:
            detail = check_answer(probe, json.loads(reply.read()))
    except urllib.error.HTTPError as error:
        detail = f"HTTP {error.code}: {error.read(300).decode(errors='replace').strip()}"
        if error.code == 401:
            detail += f" Its key is not that of {server.get('key_file', 'a file of ours')}: run the role model_server again."
    except (TimeoutError, socket.timeout):
        detail, slow = f"no answer within {timeout:.0f} s", True
    except urllib.error.URLError as error:
        slow = isinstance(error.reason, (TimeoutError, socket.timeout))
        detail = f"no answer within {timeout:.0f} s" if slow else f"no connection: {error.reason}"
    except ValueError:
        detail = "the answer is not JSON"
    except OSError as error:
        detail = f"no answer: {error}"
    return {
        "instance": server["instance"],
        "name": server["name"],
        "ok": not detail,
        "slow": slow,
        "seconds": round(time.monotonic() - started, 3),
        "detail": detail,
    }


def lives(server: Server) -> bool:
    """Whether a server that is late says of itself that it is well."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://127.0.0.1:{server['port']}/health", timeout=10) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def probe(config: dict[str, Any], wait: float) -> dict[str, Any]:
    deadline = time.monotonic() + wait
    left = {server["instance"]: server for server in config["servers"]}
    results: dict[str, dict[str, Any]] = {}
    hopeless: set[str] = set()
    while True:
        found = look(list(left.values()))
        for name, server in list(left.items()):
            timeout = max(5.0, min(120.0, deadline - time.monotonic()))
            result = ask(server, timeout)
            foreign = listener_fault(server, found[name])
            if foreign:
                result.update(ok=False, detail=foreign)
            if not result["ok"] and found[name].restarts >= HOPELESS:
                hopeless.add(name)
            results[name] = result
            if result["ok"]:
                del left[name]
        if not left or time.monotonic() >= deadline or hopeless >= set(left):
            break
        time.sleep(1)
    for name, server in left.items():
        results[name]["detail"] += last_words(server)
    return {"ok": not left, "servers": [results[server["instance"]] for server in config["servers"]]}


def watch(config: dict[str, Any]) -> dict[str, Any]:
    """One round of the timer. An error counts whole, a late answer half: a server under load is late too."""
    health = config.get("health", {})
    memory_file = RUN / "health.json"
    try:
        memory = json.loads(memory_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        memory = {}
    found = look(config["servers"])
    kept: dict[str, Any] = {}
    restarted = []
    ok = True
    for server in config["servers"]:
        name = server["instance"]
        state = found[name]
        if not state.active:
            # stopped by somebody, or systemd or Docker is at it already
            continue
        before = memory.get(name, {})
        run = state.run
        entry: dict[str, Any] = before if before.get("run") == run else {"run": run, "answered": False, "failures": 0.0}
        result = ask(server, float(health.get("timeout", 60)))
        if result["ok"]:
            entry.update(answered=True, failures=0.0)
        else:
            if entry["answered"] or state.age > float(server.get("start_timeout", 600)):
                entry["failures"] += 0.5 if result["slow"] and lives(server) else 1.0
            print(f"{state.called}: {result['detail']}", file=sys.stderr)
        if entry["failures"] >= float(health.get("failures", 2)):
            try:
                start_again(server)
                print(f"{state.called}: restarted, its real requests fail", file=sys.stderr)
                restarted.append(state.called)
                continue
            except Trouble as trouble:
                # the next round tries again, and meanwhile the timer's unit has failed, which a monitor sees
                print(f"{state.called}: its real requests fail, and it cannot be restarted: {trouble}", file=sys.stderr)
                ok = False
        kept[name] = entry
    write(memory_file, json.dumps(kept))
    return {"ok": ok, "restarted": restarted}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("launch").add_argument("instance")
    commands.add_parser("plan").add_argument("--stdin", action="store_true", help="read the wanted servers.json from standard input")
    commands.add_parser("apply").add_argument("--check", action="store_true", help="only say what would change")
    prober = commands.add_parser("probe")
    prober.add_argument("--wait", type=float, default=0, metavar="SECONDS", help="how long to wait for all of them")
    prober.add_argument("--restart", action="store_true", help="restart a server whose real requests fail")
    commands.add_parser("uninstall")
    given = parser.parse_args(arguments)
    try:
        if given.command == "launch":
            launch(given.instance)
            return 0
        if given.command == "uninstall":
            result = uninstall()
        elif given.command == "plan":
            result = plan(load(sys.stdin.read() if given.stdin else None))
        elif given.command == "apply":
            config = load()
            result = {"changed": plan(config)["changes"]} if given.check else apply(config)
        elif given.restart:
            result = watch(load())
        else:
            result = probe(load(), given.wait)
    except Trouble as error:
        print(str(error), file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0 if result.get("ok", True) else 1


if __name__ == "__main__":
    sys.exit(main())
