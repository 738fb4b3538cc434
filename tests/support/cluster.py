# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The scenario `cluster`: runs of site.yml on many hosts, planned changes and faults, all while somebody asks FastGPT.

    cluster.py converge           site.yml, with a timeline
    cluster.py seed               an app, a document and its vectors, which all later steps look for
    cluster.py planned [name...]  grow, shrink, drain ...: nobody may notice
    cluster.py faults [name...]   what breaks, who notices, how long, and what the next run mends

Each step writes its figures into .bench/reliability.json, from which docs/reliability_table.py makes docs/reliability.md.
The environment says which lab: LAB_SCENARIO=cluster, LAB_NAME, LAB_NET.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import http.client
import json
import os
import platform
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from lab_hosts import GROWN, HOSTS, INVENTORY, NAME, ROOT, play, site
from lab_hosts import vault as read_vault
from probe import Failed, Probe, Summary, post
from sflab.catalogue import container_name
from sflab.common import STATE, docker_inspect, output, say
from sflab.hosts import restart_host
from sflab.timeline import parallel, picture

sys.path.insert(0, str(ROOT / ".collections"))
from ansible_collections.selfhosted.fastgpt.plugins.module_utils._fastgpt_graphs import app_body  # noqa: E402

# outlives the hosts
RECORD = ROOT / ".bench" / "reliability.json"
SEED = STATE / NAME / "seed.json"
BASE = [name for name in HOSTS if name not in ("gpu-3", "db-4", "db-5")]
MEMBERS, GATEWAYS, MODEL_HOSTS, APPS = ["db-1", "db-2", "db-3"], ["gw-1", "gw-2"], ["gpu-1", "gpu-2"], ["app-1", "app-2"]
CHAT, EMBEDDING, RERANK = "tiny-qwen2-chat", "all-MiniLM-L6-v2", "tiny-cross-encoder"
QUESTION = "Which animal guards the archive of the lighthouse?"
PASSAGE = "A heron guards the archive of the lighthouse, and nobody knows since when."
WHOLE_SECONDS = 300
LEAST_SECONDS = 15


vault = functools.cache(read_vault)


class Wrong(Exception):
    """What makes the scenario red."""


# -- FastGPT -------------------------------------------------------------------------------------------------------------


def door(host: str) -> tuple[str, int]:
    return HOSTS[host], 8080


def call(host: str, method: str, path: str, body: Any = None, token: str = "") -> Any:
    """The data of an answer of FastGPT's API."""
    request = urllib.request.Request(
        "http://{}:{}/api/{}".format(*door(host), path), method=method, data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json", **({"token": token} if token else {})},
    )  # fmt: skip
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as exc:
        answer = json.loads(exc.read() or b"{}")
    if answer.get("code") != 200:
        raise Wrong(f"{method} {path} through {host}: {answer.get('message') or answer}")
    return answer["data"]


def log_in(host: str) -> str:
    secret = hashlib.sha256(vault()["fastgpt_root_password"].encode()).hexdigest()
    return str(call(host, "POST", "support/user/account/loginByPassword", {"username": "root", "password": secret})["token"])


def seed() -> dict[str, str]:
    """Once: a dataset with a document, and an app that answers from it."""
    if SEED.exists():
        found: dict[str, str] = json.loads(SEED.read_text(encoding="utf-8"))
        return found
    token = log_in("app-1")
    dataset = call("app-1", "POST", "core/dataset/create",
                   {"name": "reliability", "type": "dataset", "vectorModel": EMBEDDING, "agentModel": CHAT}, token)  # fmt: skip
    collection = call("app-1", "POST", "core/dataset/collection/create", {"datasetId": dataset, "name": "reliability", "type": "virtual"}, token)
    for text in (PASSAGE, "The tide table hangs beside the stove.", "灯塔的守门人每天早晨记录天气。"):
        call("app-1", "POST", "core/dataset/data/insertData", {"collectionId": collection, "q": text, "a": ""}, token)
    body = app_body("reliability", (4, 8, 9), CHAT, dataset, EMBEDDING, True)
    app = None
    for attempt in range(5):  # the first app of a fresh database collides with the making of a collection
        try:
            app = call("app-1", "POST", "core/app/create", body, token)
            break
        except Wrong:
            if attempt == 4:
                raise
            time.sleep(1)
    key = call("app-2", "POST", "support/openapi/create", {"name": "reliability", "appId": app}, token)
    made = {"dataset": dataset, "app": str(app), "key": key}
    SEED.write_text(json.dumps(made), encoding="utf-8")
    return made


def still_there() -> None:
    """The document and its vector that were written before, found through every door, with a rank of the reranker."""
    for host in APPS:
        token = log_in(host)
        found = call(host, "POST", "core/dataset/searchTest", {
            "datasetId": seed()["dataset"], "text": QUESTION, "limit": 5000, "similarity": 0, "searchMode": "embedding", "usingReRank": True,
            "datasetSearchUsingExtensionQuery": False,
        }, token)  # fmt: skip
        items = found.get("list") if isinstance(found, dict) else found
        first = next((item for item in items or [] if item.get("q") == PASSAGE), None)
        if first is None:
            raise Wrong(f"the passage that was stored is not found any more through {host}")
        if not any(score.get("type") == "reRank" for score in first.get("score") or []):
            raise Wrong(f"no rank of the reranker in a search through {host}")


def ask(at: tuple[str, int]) -> None:
    """One question through the whole chain: search, rank, chat."""
    body = {"stream": False, "detail": True, "messages": [{"role": "user", "content": QUESTION}]}
    status, raw = post(at, "/api/v1/chat/completions", body, {"Authorization": f"Bearer {seed()['key']}"})
    try:
        answer = json.loads(raw)
    except ValueError:
        raise Failed(f"HTTP {status}, no JSON") from None
    if status != 200 or "choices" not in answer:
        raise Failed(f"HTTP {status}: {str(answer.get('message') or answer)[:90]}")
    if not answer["choices"][0]["message"]["content"]:
        raise Failed("an empty answer")
    if not any(step.get("quoteList") for step in answer.get("responseData") or []):
        raise Failed("an answer without the passages")


# -- what stands -----------------------------------------------------------------------------------------------------------


def pid(host: str) -> int:
    found = docker_inspect("container", container_name(NAME, host))
    return int(found[0]["State"]["Pid"]) if found and found[0]["State"]["Running"] else 0


def inside(host: str, *words: str, check: bool = True) -> str:
    """As root on a lab host, whatever its network is like."""
    return output(["docker", "exec", container_name(NAME, host), *words], check=check, timeout=120)


def ask_member(host: str, *words: str) -> subprocess.CompletedProcess[str]:
    """From the host's own network, since MongoDB lets nobody else in."""
    script = [sys.executable, str(ROOT / "tests" / "support" / "replica_status.py"), HOSTS[host], str(STATE / "ca" / "ca.pem"), *words]
    command = ["nsenter", f"--net=/proc/{pid(host)}/ns/net", *script]
    return subprocess.run(command, input=vault()["mongodb_root_password"], capture_output=True, text=True, check=False)


def replica_set() -> dict[str, str]:
    """Host: state, by the first member that knows; empty where none answers."""
    names = {address: name for name, address in HOSTS.items()}
    for host in [name for name in HOSTS if name.startswith("db-")]:
        if not pid(host):
            continue
        done = ask_member(host)
        if done.returncode == 0:
            found = {names.get(address, address): state for address, state in json.loads(done.stdout).items()}
            if found.get(host) in ("PRIMARY", "SECONDARY"):
                return found
    return {}


def primary() -> str:
    found = [host for host, state in replica_set().items() if state == "PRIMARY"]
    if len(found) != 1:
        raise Wrong(f"the replica set has {len(found)} primaries")
    return found[0]


def lone_primary() -> str:
    """The primary, moved away from db-3 where it is there: that host has pgvector too, and one thing is broken at a time."""
    deadline = time.monotonic() + 120
    while (found := primary()) == "db-3":
        done = ask_member(found, "step-down")
        if time.monotonic() > deadline:
            raise Wrong(f"db-3 stays the primary: {done.stderr[-300:]}")
        wait_whole()
    return found


def get(host: str, port: int, path: str, **headers: str) -> tuple[int, bytes]:
    link = http.client.HTTPConnection(HOSTS[host], port, timeout=5)
    try:
        link.request("GET", path, headers=headers)
        answer = link.getresponse()
        return answer.status, answer.read()
    finally:
        link.close()


def channels() -> list[str]:
    status, body = get("gw-1", 8000, "/api/channel/search?keyword=", Authorization=vault()["oneapi_root_access_token"])
    data = json.loads(body)
    if status != 200 or not data.get("success"):
        raise Wrong(f"gw-1: {status} {body[:100]!r}")
    return sorted(channel["name"] for channel in data["data"])


def not_whole(members: list[str], model_hosts: list[str]) -> str:
    """What is missing of all that was deployed; empty when nothing is."""
    states = replica_set()
    if sorted(states) != sorted(members) or sorted(states.values()) != sorted(["PRIMARY"] + ["SECONDARY"] * (len(members) - 1)):
        return f"replica set: {states}"
    try:
        for host in GATEWAYS:
            status, body = get(host, 8000, "/api/channel/search?keyword=", Authorization=vault()["oneapi_root_access_token"])
            if status != 200 or not json.loads(body).get("success"):
                return f"{host}: HTTP {status}"
        for host in model_hosts:
            for port in (8001, 8002, 8003):
                status, _body = get(host, port, "/health")
                if status != 200:
                    return f"{host}:{port}: HTTP {status}"
        for host in APPS:
            ask(door(host))
    except (OSError, http.client.HTTPException, ValueError, Failed) as exc:
        return f"{type(exc).__name__}: {exc}"
    return ""


def wait_whole(members: list[str] | None = None, model_hosts: list[str] | None = None, seconds: float = WHOLE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while True:
        problem = not_whole(members or MEMBERS, model_hosts or MODEL_HOSTS)
        if not problem:
            return
        if time.monotonic() > deadline:
            raise Wrong(f"not whole again after {seconds:.0f} s: {problem}")
        time.sleep(0.5)


# -- the record --------------------------------------------------------------------------------------------------------------


def record(part: str, name: str, entry: dict[str, Any]) -> None:
    """One figure; a step that is measured again replaces its older one."""
    data = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    data["where"] = {
        "date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(), "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "kernel": platform.release(), "hosts": len(BASE),
        "stand_ins": [item["image"] for item in json.loads((STATE / NAME / "state.json").read_text(encoding="utf-8"))["stand_ins"]],
    }  # fmt: skip
    data["steps"] = {"planned": {key: what.title for key, what in PLANNED.items()}, "faults": {key: what.title for key, what in FAULTS.items()}}
    data.setdefault(part, {})[name] = entry
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    say(f"{part} {name}: {json.dumps({key: value for key, value in entry.items() if key != 'picture'}, ensure_ascii=False)}")


def heard(found: Summary) -> dict[str, Any]:
    return {"asked": found.asked, "failed": found.failed, "other_door": found.moved, "slowest_seconds": found.slowest, "faults": found.faults}


def run_site(directory: str, **options: Any) -> Any:
    run = site(directory, **options)
    if run.rc:
        print(run.stdout[-6000:])
        raise Wrong(f"{directory}: site.yml ended with {run.rc}: {[(item['host'], item['task']) for item in run.failed]}")
    return run


def converge() -> None:
    """The first time cold, which begins a new record; from then on what an unchanged inventory costs."""
    name = "again" if (STATE / NAME / "converge-cold").exists() else "cold"
    run = run_site(f"converge-{name}")
    if name == "cold":
        RECORD.unlink(missing_ok=True)
    spans = run.timeline.spans()
    entry = {
        "seconds": run.seconds, "changed": run.total("changed"), "round_trips": run.round_trips,
        "changed_tasks": run.changed_tasks if name == "again" else [],
        "plays": {play: parallel(spans, play) for play in dict.fromkeys(span.play for span in spans)}, "picture": picture(spans, 80),
        "slowest_tasks": sorted(run.tasks.items(), key=lambda item: -item[1])[:10],
    }  # fmt: skip
    record("runs", name, entry)
    print(json.dumps({"changed": run.total("changed"), "changed_tasks": run.changed_tasks if name == "again" else []}))


# -- planned changes -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Planned:
    """Something that nobody may notice."""

    title: str
    work: Callable[[], list[Any]]
    check: Callable[[], None]


def grow() -> list[Any]:
    return [run_site("grow", inventory=GROWN)]


def grown() -> None:
    wait_whole([*MEMBERS, "db-4", "db-5"], [*MODEL_HOSTS, "gpu-3"])
    if f"{CHAT}@gpu-3" not in channels():
        raise Wrong(f"gpu-3 has no channel: {channels()}")


def shrink() -> list[Any]:
    """With settings that have the containers of both services made anew and the chat servers started again, one host after the other. The run after the
    next change takes them back."""
    settings = {"oneapi_sync_frequency": 6, "fastgpt_extra_env": {"RELIABILITY": "measured"}, "model_server_chat_batch_tokens": 500}
    return [run_site("shrink", inventory=INVENTORY, extravars=settings)]


def shrunk() -> None:
    wait_whole()
    if [name for name in channels() if name.endswith("@gpu-3")]:
        raise Wrong(f"gpu-3 still has channels: {channels()}")
    for host in ("gpu-3", "db-4", "db-5"):  # they are nobody's business any more
        output(["docker", "stop", "-t", "20", container_name(NAME, host)])
    wait_whole()


def drain() -> list[Any]:
    runs = [play(ROOT / "playbooks" / "drain.yml", "drain", extravars={"drain_host": "gpu-2"})]
    if runs[0].rc:
        print(runs[0].stdout[-6000:])
        raise Wrong("drain.yml failed")
    if [name for name in channels() if name.endswith("@gpu-2")]:
        raise Wrong(f"gpu-2 still has channels after drain.yml: {channels()}")
    return [*runs, run_site("undrain")]


PLANNED = {
    "grow": Planned("a third model host and two more MongoDB members", grow, grown),
    "shrink": Planned("the same three hosts leave the inventory, and other settings have One-API, FastGPT and the chat servers made anew", shrink, shrunk),
    "drain": Planned("a model host is drained, and taken back by `site.yml`, which takes the settings back too", drain, wait_whole),
}


def planned(names: list[str]) -> None:
    with Probe([door(host) for host in APPS], ask) as probe:
        for name in names or list(PLANNED):
            what = PLANNED[name]
            begin = time.monotonic()
            runs = what.work()
            what.check()
            still_there()
            probe.settle()
            found = probe.since(begin)
            entry = {"title": what.title, **heard(found), "seconds": round(sum(run.seconds for run in runs), 1),
                     "changed": sum(run.total("changed") for run in runs)}  # fmt: skip
            record("planned", name, entry)
            if found.failed or found.asked < 10:
                raise Wrong(f"{what.title}: {found.failed} of {found.asked} questions failed: {found.faults}")


# -- faults ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fault:
    """Something breaks at `victim`, is left broken for so many seconds, and is then mended: by nobody, by `mend`, or by site.yml."""

    title: str
    victim: Callable[[], str]
    break_it: Callable[[str], None]
    hold: float
    mended_by: str
    mend: Callable[[str], None] | None = None
    # tasks that the run afterwards may change something in
    changes: tuple[str, ...] = ()
    # the run afterwards is that of the next fault: both mend themselves, and what either has left it would mend
    shares_run: bool = False


def kill_process(host: str, container: str) -> None:
    number = inside(host, "docker", "inspect", "-f", "{{.State.Pid}}", container).strip()
    inside(host, "kill", "-9", number)


def stop_container(host: str, container: str) -> None:
    inside(host, "docker", "stop", container)


def kill_model_server(host: str) -> None:
    inside(host, "systemctl", "kill", "-s", "KILL", "selfhosted-model@8001.service")


def cable(host: str, state: str) -> None:
    """The machine's end of a host's network link: the host keeps its address and hears nothing."""
    index = inside(host, "cat", "/sys/class/net/eth0/iflink").strip()
    links = json.loads(output(["ip", "-j", "link", "show"]))
    name = next(link["ifname"] for link in links if str(link["ifindex"]) == index)
    output(["ip", "link", "set", name, state])


def fill_disk(host: str) -> None:
    """All of it, as another program's log might."""
    script = "cd /var/lib/selfhosted-fastgpt && fallocate -l $(($(df --output=avail -B1 . | tail -1) - 33554432)) filler && dd if=/dev/zero of=rest bs=4k; df ."
    inside(host, "sh", "-c", script, check=False)


def empty_disk(host: str) -> None:
    inside(host, "rm", "-f", "/var/lib/selfhosted-fastgpt/filler", "/var/lib/selfhosted-fastgpt/rest")


def power_cut(host: str) -> None:
    restart_host(NAME, host)


def reboot(host: str) -> None:
    """A clean one; the network and the disk stay its own."""
    output(["docker", "stop", "-t", "60", container_name(NAME, host)], timeout=120)
    output(["docker", "start", container_name(NAME, host)])


FAULTS = {
    "mongodb-primary": Fault("MongoDB's primary is killed (its process)", lone_primary, lambda host: kill_process(host, "mongodb"), 5, "itself",
                             shares_run=True),
    "mongodb-primary-host": Fault("the host of MongoDB's primary loses power and boots again", lone_primary, power_cut, 0, "itself", shares_run=True),
    "model-server": Fault("a chat model server is killed", lambda: "gpu-1", kill_model_server, 5, "itself"),
    "gateway-master": Fault(
        "One-API's master node is stopped", lambda: "gw-1", lambda host: stop_container(host, "one-api"), 20, "site.yml",
        changes=("Run the container one-api",),
    ),
    "disk-full": Fault("the disk of MongoDB's primary is full", lone_primary, fill_disk, 70, "room on the disk", empty_disk, shares_run=True),
    "network-model": Fault(
        "a model host is cut off from the network", lambda: "gpu-2", lambda host: cable(host, "down"), 45, "the network", lambda host: cable(host, "up"),
        shares_run=True,
    ),
    "network-primary": Fault(
        "the host of MongoDB's primary is cut off from the network", lone_primary, lambda host: cable(host, "down"), 45, "the network",
        lambda host: cable(host, "up"), shares_run=True,
    ),
    **{f"reboot-{host}": Fault(f"{host} is rebooted", lambda host=host: host, reboot, 0, "itself", shares_run=True) for host in BASE},
}  # fmt: skip


def measure(name: str, probe: Probe, waiting: dict[str, dict[str, Any]], last: bool) -> None:
    """One fault; `waiting` are the entries of those before it that share its run."""
    fault = FAULTS[name]
    wait_whole()
    victim = fault.victim()
    say(f"fault {name}: {fault.title}, {victim}")
    begin = time.monotonic()
    run = None
    try:
        fault.break_it(victim)
        broken = time.monotonic()
        time.sleep(fault.hold)
    finally:
        if fault.mend is not None:
            fault.mend(victim)
    mended = time.monotonic()
    if fault.mended_by == "site.yml":
        run = run_site(f"after-{name}", cmdline="--skip-tags verify")
    wait_whole()
    whole = time.monotonic()
    # what is whole again at once is watched all the same
    time.sleep(max(0.0, begin + LEAST_SECONDS - whole))
    probe.settle()
    found = probe.since(begin)
    entry = {
        "title": fault.title, "victim": victim, "mended_by": fault.mended_by, "held_seconds": fault.hold, **heard(found),
        "answers_seconds": round(found.last_failure - begin, 1) if found.last_failure else 0.0,
        "break_seconds": round(broken - begin, 1), "whole_seconds": round(whole - (mended if fault.mend else begin), 1),
    }  # fmt: skip
    waiting[name] = entry
    record("faults", name, entry)
    if found.asked < 5:
        raise Wrong(f"{fault.title}: only {found.asked} questions were asked")
    still_there()
    if last or not fault.shares_run:
        rest = time.monotonic()
        # the last one is verified too
        run = run or run_site(f"after-{name}", cmdline="" if last else "--skip-tags verify")
        probe.settle()
        seen = {"run_seconds": run.seconds, "run_changed": run.changed_tasks, "failed_during_run": probe.since(rest).failed}
        allowed = tuple(task for one in waiting for task in FAULTS[one].changes)
        for one, what in waiting.items():
            record("faults", one, {**what, **seen})
        odd = [task for task in run.changed_tasks if not task.endswith(allowed or ("-",))]
        # Ansible's own count, lest a change that no event told of passes
        if odd or run.total("changed") != len(run.changed_tasks):
            raise Wrong(f"{', '.join(FAULTS[one].title for one in waiting)}: the run afterwards changed {odd}, {run.total('changed')} tasks in all")
        if seen["failed_during_run"]:
            raise Wrong(f"{fault.title}: questions failed while the run afterwards went on")
        waiting.clear()


def faults(names: list[str]) -> None:
    wanted = names or list(FAULTS)
    waiting: dict[str, dict[str, Any]] = {}
    with Probe([door(host) for host in APPS], ask) as probe:
        for name in wanted:
            measure(name, probe, waiting, name == wanted[-1])


def main() -> None:
    step, names = sys.argv[1], sys.argv[2:]
    known = {"planned": PLANNED, "faults": FAULTS}.get(step, {})
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"{step}: unknown {', '.join(unknown)}; known are {', '.join(known)}")
    try:
        if step == "converge":
            converge()
        elif step == "seed":
            seed()
            wait_whole()
            still_there()
        else:
            seed()
            {"planned": planned, "faults": faults}[step](names)
    except Wrong as exc:
        sys.exit(str(exc))


if __name__ == "__main__":
    main()
