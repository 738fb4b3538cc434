# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""`make bench-models`: our model servers beside the way in which the seed's work, on this machine's CPU. See README.md beside this file."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import aiohttp
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from ports import free_port  # noqa: E402

ROLE = ROOT / "roles" / "model_server"
ENGINES = ROOT / ".cache" / "engines"
MODELS = ROOT / ".cache" / "bench-models"
REPORT = ROOT / ".bench" / "models.json"
ROUNDS = 3
START_SECONDS = 180
NEW_TOKENS = 128
# what the seed's requirements pin of what stands around the model, newer by years in the engine that it is compared to
SEED_PACKAGES = ("fastapi==0.99.1", "pydantic==1.10.7", "uvicorn==0.23.1")
CONTEXT = 2048
HEADLINES = ("embeddings_1x64", "embeddings_8x64", "rerank_1x30", "rerank_8x30", "chat_1", "chat_8", "chat_32")
# least ratio of items per second
GOALS = {"embeddings_1x64": 3.0, "embeddings_8x64": 3.0, "rerank_8x30": 1.3, "chat_1": 1.0, "chat_8": 4.0}
TTFT_GOAL = 10.0

Body = dict[str, Any]


class BenchError(Exception):
    """A server did something else than what was to be measured."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """One run against one server: items per second, its CPU time per item, and seconds until each stream's first token."""

    rate: float
    cpu_ms: float
    firsts: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Start:
    """Seconds until the first answer, and memory after the runs."""

    seconds: float
    rss_mb: float
    peak_mb: float


@dataclasses.dataclass(frozen=True)
class Figures:
    costs: dict[str, dict[str, list[Cost]]]  # of each figure, by way
    starts: dict[str, dict[str, Start]]  # of each kind, by way


# Runs against a server: how many items it answered, and seconds until each stream's first token.
Run = Callable[[str, "Server"], Coroutine[Any, Any, tuple[int, tuple[float, ...]]]]


# -- the report --------------------------------------------------------------------------------------------------------


def best(costs: list[Cost]) -> float:
    return max(cost.rate for cost in costs)


def last_first(costs: list[Cost]) -> float:
    """Seconds until the last of the streams had its first token, in the best round."""
    return min(max(cost.firsts) for cost in costs)


def pair(ours: float, baseline: float, ratio: float) -> dict[str, float]:
    return {"ours": round(ours, 3), "baseline": round(baseline, 3), "ratio": round(ratio, 2)}


def report(figures: Figures) -> dict[str, Any]:
    costs = figures.costs
    rates = {name: pair(best(ways["ours"]), best(ways["baseline"]), best(ways["ours"]) / best(ways["baseline"])) for name, ways in costs.items()}
    ours, baseline = (last_first(costs["chat_8"][way]) for way in ("ours", "baseline"))
    tried = {name: round(best(ways["tried"]), 3) for name, ways in costs.items() if "tried" in ways}
    streams = {name: ways for name, ways in costs.items() if name.startswith("chat")}
    return {
        **{name: rates[name] for name in HEADLINES},
        "last_ttft_8": pair(ours, baseline, baseline / ours),
        "without_goal": {name: rate for name, rate in rates.items() if name not in HEADLINES},
        **({"tried": tried} if tried else {}),
        "transformers_serve": {
            name: {"rate": round(best(ways["transformers_serve"]), 3), "last_ttft": round(last_first(ways["transformers_serve"]), 3)}
            for name, ways in streams.items()
            if "transformers_serve" in ways
        },
        "cpu_ms_per_item": {name: {way: round(min(cost.cpu_ms for cost in runs), 3) for way, runs in ways.items()} for name, ways in costs.items()},
        "first_token_s": {
            name: {
                way: {"median": round(min(statistics.median(cost.firsts) for cost in runs), 3), "last": round(last_first(runs), 3)}
                for way, runs in ways.items()
            }
            for name, ways in streams.items()
        },
        "start_s": {kind: {way: round(start.seconds, 2) for way, start in ways.items()} for kind, ways in figures.starts.items()},
        "memory_mb": {
            kind: {way: {"after": round(start.rss_mb), "peak": round(start.peak_mb)} for way, start in ways.items()} for kind, ways in figures.starts.items()
        },
    }


def goals(result: dict[str, Any]) -> list[tuple[bool, str]]:
    """Whether each goal was reached, and its text. Nothing is rounded in its favour."""
    told = []
    for name, least in GOALS.items():
        ratio = result[name]["ours"] / result[name]["baseline"]
        told.append((ratio >= least, f"{name}: {ratio:.2f} times the baseline's, at least {least:g}"))
    ratio = result["last_ttft_8"]["baseline"] / result["last_ttft_8"]["ours"]
    told.append((ratio >= TTFT_GOAL, f"first token of the last of 8 streams: {ratio:.1f} times sooner, at least {TTFT_GOAL:g}"))
    return told


def write(path: pathlib.Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def show(name: str, ways: dict[str, list[Cost]]) -> None:
    for way, runs in ways.items():
        rates = " ".join(f"{cost.rate:8.1f}" for cost in runs)
        line = f"{name:<24}{way:<20}{best(runs):>9.1f}/s  of {rates}  {min(cost.cpu_ms for cost in runs):>8.2f} CPU ms each"
        print(line + (f"  last first token {last_first(runs):.3f} s" if runs[0].firsts else ""), flush=True)


# -- what is asked -----------------------------------------------------------------------------------------------------


def hanzi(rng: random.Random, shortest: int, longest: int) -> str:
    return "".join(chr(rng.randint(0x4E00, 0x9FA5)) for _unused in range(rng.randint(shortest, longest)))


def embedding_body(rng: random.Random, texts: int, lengths: tuple[int, int]) -> Body:
    return {"model": "embedding", "input": [hanzi(rng, *lengths) for _unused in range(texts)]}


def embedded(body: Body, answer: Any, size: int) -> None:
    rows = answer["data"]
    if len(rows) != len(body["input"]) or any(len(row["embedding"]) != size for row in rows):
        raise BenchError(f"{len(rows)} vectors of {len(rows[0]['embedding']) if rows else 0} numbers for {len(body['input'])} texts; expected {size}")


# -- the servers -------------------------------------------------------------------------------------------------------


def engine(name: str, defaults: dict[str, Any]) -> pathlib.Path:
    """The environment of an engine, made as the role makes it, in the directory that tests/engines/run.sh uses too."""
    lock, torch = ROLE / "files" / "requirements" / f"{name}.txt", str(defaults["model_server_torch_version"])
    directory = ENGINES / f"{name}-{hashlib.sha256(lock.read_bytes() + torch.encode()).hexdigest()[:12]}"
    if (directory / ".complete").exists():
        return directory
    print(f"environment of {name}", flush=True)
    ENGINES.mkdir(parents=True, exist_ok=True)
    job = {
        "python": os.path.realpath(sys.executable), "uv_version": defaults["model_server_uv_version"], "engines_dir": str(ENGINES), "weights": [],
        "packages": {"index_url": os.environ.get("PIP_INDEX_URL", ""), "find_links": str(ENGINES / "wheels")},
        "engines": [{"name": name, "dir": str(directory), "lock": str(lock), "torch": torch}],
    }  # fmt: skip
    # pip knows best where this machine's torch comes from
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(ENGINES / "wheels"), f"torch=={torch}"]
    subprocess.run(fetch, check=True)
    made = subprocess.run(
        ["python3", str(ROLE / "files" / "prepare.py")],
        input=json.dumps(job),
        text=True,
        env={**os.environ, "MODEL_SERVER_RUN": str(ENGINES / "run")},
        check=False,
    )
    if made.returncode != 0:
        raise BenchError(f"{name}: its environment could not be made; see above")
    return directory


def seed_packages(python: str) -> pathlib.Path:
    directory = MODELS / ("web-" + hashlib.sha256(" ".join(SEED_PACKAGES).encode()).hexdigest()[:12])
    if not directory.exists():
        temporary = directory.with_suffix(".new")
        shutil.rmtree(temporary, ignore_errors=True)
        uv = pathlib.Path(sys.executable).with_name("uv")
        subprocess.run([str(uv), "pip", "install", "--quiet", "--python", python, "--target", str(temporary), *SEED_PACKAGES], check=True)
        temporary.rename(directory)
    return directory


def card(name: str, kind: str, engines: list[str], **more: Any) -> Body:
    return {
        "name": name, "kind": kind, "context": 512, "max_response": 0, "kv_bytes_per_token": 0, "trust_remote_code": False, "weights": {},
        "memory": {"16": {"ram_gb": 2}}, "engines": [{"name": one, "device": "cpu", "quantize_bits": [16]} for one in engines], **more,
    }  # fmt: skip


CARDS = [
    card("embedding", "embedding", ["infinity"], dimensions=384),
    card("embedding-large", "embedding", ["infinity"], dimensions=1024),
    card("rerank", "rerank", ["infinity"]),
    # keys and values of 4 layers of 2 heads of 64 float32
    card("chat", "chat", ["legacy_chat", "transformers"], context=CONTEXT, max_response=512, kv_bytes_per_token=2 * 4 * 2 * 64 * 4),
]
# our servers by name: model, engine
OURS = {
    "embedding": ("embedding", "infinity"),
    "embedding-large": ("embedding-large", "infinity"),
    "rerank": ("rerank", "infinity"),
    "chat": ("chat", "legacy_chat"),
    "chat, transformers serve": ("chat", "transformers"),
}


def written(directory: pathlib.Path, engines: dict[str, pathlib.Path], servers: dict[str, Body], **more: Any) -> dict[str, Body]:
    """What the role itself would write into servers.json for these servers, by their names here."""
    values = {
        "bench_servers": str(directory / "servers.json"), "model_servers": list(servers.values()), "node_address": "127.0.0.1",
        "model_server__weights": [], "model_server__state": str(directory / "state"),
        "model_server__engine_dirs": {name: str(path) for name, path in engines.items()},
        "model_server__legacy_dir": str(ROLE / "files" / "legacy_chat"), "model_server__legacy_files": [], "model_server__legacy_hash": "",
        "ansible_connection": "local", "ansible_python_interpreter": sys.executable, **more,
    }  # fmt: skip
    (directory / "values.json").write_text(json.dumps(values), encoding="utf-8")
    command = [sys.executable, "-m", "ansible", "playbook", "-i", "localhost,", "--extra-vars", f"@{directory / 'values.json'}"]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_LOCAL_TEMP": str(directory / "ansible")}
    playbook = str(ROOT / "bench" / "model_servers.yml")
    run = subprocess.run([*command, playbook], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if run.returncode != 0:
        raise BenchError(f"model_servers.yml fails (rc {run.returncode}):\n{run.stdout[-3000:]}")
    found = {one["instance"]: one for one in json.loads((directory / "servers.json").read_text(encoding="utf-8"))["servers"]}
    return {name: found[str(server["port"])] for name, server in servers.items()}


def rendered(directory: pathlib.Path, engines: dict[str, pathlib.Path]) -> dict[str, Body]:
    """Our servers on a host without a GPU, with one thread each."""
    servers = {
        name: {"model": model, "port": free_port() - 10000, "engine": one, "gpus": [], "weights": {"source": "path", "path": str(MODELS / model)}}
        for name, (model, one) in OURS.items()
    }
    return written(directory, engines, servers, model_cards_catalogue=[], model_cards_extra=CARDS, model_server_threads=1, model_server__gpus=[])


def path_of(server: Body) -> str:
    """Of the requests that one is asked."""
    return str(server["probe"]["url"]).removeprefix(f"http://127.0.0.1:{server['port']}")


def launched(name: str, server: Body, probe: Body, directory: pathlib.Path, log: pathlib.Path) -> Server:
    """Started by the role's own launcher, as systemd starts it."""
    environment = {**os.environ, "MODEL_SERVER_CONFIG": str(directory / "servers.json")}
    pathlib.Path(server["cwd"]).mkdir(parents=True, exist_ok=True)
    command = ["python3", "-I", str(ROLE / "files" / "model_server.py"), "launch", server["instance"]]
    return Server(name, server["port"], path_of(server), probe, command, environment, log)


class Server:
    """A process that answers on a port."""

    def __init__(self, name: str, port: int, path: str, probe: Body, command: list[str], environment: dict[str, str], log: pathlib.Path) -> None:
        self.name, self.url, self.probe, self.log = name, f"http://127.0.0.1:{port}{path}", probe, log
        self.began = time.monotonic()
        with log.open("w") as output:
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        self.ready = 0.0

    async def wait(self, seconds: float = START_SECONDS) -> None:
        """Until it answers a real request; one that loads its model with the first is not ready earlier."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
            while time.monotonic() < self.began + seconds:
                if self.process.poll() is not None:
                    break
                with contextlib.suppress(aiohttp.ClientConnectionError):
                    async with session.post(self.url, json=self.probe) as answer:
                        text = await answer.text()
                        if answer.status == 200:
                            self.ready = time.monotonic() - self.began
                            return
                        raise BenchError(f"{self.name}: {answer.status} {text[:500]}")
                await asyncio.sleep(0.02)
        raise BenchError(f"{self.name}: does not answer:\n{self.log.read_text()[-3000:]}")

    def cpu(self) -> float:
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def start(self) -> Start:
        status = dict(line.split(":", 1) for line in pathlib.Path(f"/proc/{self.process.pid}/status").read_text().splitlines())
        return Start(self.ready, *(int(status[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM")))

    def pause(self, paused: bool) -> None:
        """So that one that has nothing to do takes no time from the other."""
        os.killpg(self.process.pid, signal.SIGSTOP if paused else signal.SIGCONT)

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def baseline(kind: str, beside: Body, path: str, probe: Body, log: pathlib.Path, seed: pathlib.Path | None, device: str = "cpu") -> Server:
    """With torch, transformers and tokenizers of the engine that it is compared to, and the same variables of threads, GPUs and hubs."""
    port = free_port()
    environment = {name: value for name, value in beside["env"].items() if not name.startswith("INFINITY_")}
    environment["HOME"] = environment["HF_HOME"] = str(log.parent)
    if kind != "chat" and seed:
        environment["PYTHONPATH"] = str(seed)
    python = str(pathlib.Path(beside["engine_dir"]) / "bin" / "python")
    command = [python, str(ROOT / "bench" / "seed_servers.py"), kind, beside["weights"], str(port), device]
    return Server(f"baseline of {beside['model']}", port, path, probe, command, environment, log)


# -- runs --------------------------------------------------------------------------------------------------------------

Answered = tuple[str, Body, bytes]
# what was said, by way and prompt
Texts = dict[tuple[str, str], str]


async def measured(way: str, server: Server, run: Run) -> Cost:
    cpu, began = server.cpu(), time.perf_counter()
    items, firsts = await run(way, server)
    seconds = time.perf_counter() - began
    return Cost(items / seconds, 1000 * (server.cpu() - cpu) / items, firsts)


def posting(bodies: list[Body], clients: int, items: int, answered: list[Answered]) -> Run:
    """Each client sends its share of the bodies, one when the last is answered."""

    async def ask(way: str, server: Server) -> tuple[int, tuple[float, ...]]:
        # a blocked server closes a connection that it had no time to look at
        connector = aiohttp.TCPConnector(force_close=True)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=300)) as session:

            async def client(share: list[Body]) -> list[Answered]:
                answers = []
                for body in share:
                    async with session.post(server.url, json=adapted(way, body)) as answer:
                        data = await answer.read()
                        if answer.status != 200:
                            raise BenchError(f"{server.name}: {answer.status} {data[:500]!r}")
                        answers.append((way, body, data))
                return answers

            for share in await asyncio.gather(*(client(bodies[at::clients]) for at in range(clients))):
                answered.extend(share)
        return items * len(bodies), ()

    return ask


def scored(way: str, answer: Any, documents: int) -> dict[int, float]:
    if way != "baseline":
        scores = {row["index"]: row["relevance_score"] for row in answer["results"]}
    else:
        scores = {int(row["id"]): row["score"] for row in answer["data"]}
    if sorted(scores) != list(range(documents)):
        raise BenchError(f"{way}: scores of {len(scores)} documents for {documents}")
    return scores


async def stream(server: Server, session: aiohttp.ClientSession, body: Body) -> tuple[float, str]:
    """Seconds until the first token, and what was said."""
    began, first, parts = time.perf_counter(), 0.0, []
    async with session.post(server.url, json=body) as answer:
        if answer.status != 200:
            raise BenchError(f"{server.name}: {answer.status} {(await answer.text())[:500]}")
        async for line in answer.content:
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:])["choices"]
                text = choices[0]["delta"].get("content") if choices else None
                if text:
                    first = first or time.perf_counter() - began
                    parts.append(text)
    text = "".join(parts)
    if len(text) != body["max_tokens"]:  # each token of these models is one character
        raise BenchError(f"{server.name}: {len(text)} tokens instead of {body['max_tokens']}: {text!r}")
    return first, text


def streaming(model: str, prompts: list[str], tokens: int, texts: Texts, times: int = 1) -> Run:
    """A stream for each of the prompts at once."""

    async def ask(way: str, server: Server) -> tuple[int, tuple[float, ...]]:
        async def one(session: aiohttp.ClientSession, prompt: str) -> float:
            body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "temperature": 0, "stream": True}
            first, texts[way, prompt] = await stream(server, session, body)
            return first

        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=300)) as session:
            firsts: list[float] = []
            for _unused in range(times):
                firsts += await asyncio.gather(*(one(session, prompt) for prompt in prompts))
        return tokens * len(prompts) * times, tuple(firsts)

    return ask


class Bench:
    def __init__(self, directory: pathlib.Path, tried: dict[str, str]) -> None:
        self.directory, self.tried = directory, tried
        defaults = yaml.safe_load((ROLE / "defaults" / "main.yml").read_text(encoding="utf-8"))
        self.engines = {name: engine(name, defaults) for name in ("infinity", "legacy_chat", "transformers")}
        self.infinity = str(self.engines["infinity"] / "bin" / "python")
        subprocess.run([self.infinity, str(ROOT / "bench" / "tiny_models.py"), str(MODELS)], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        self.seed = seed_packages(self.infinity)
        self.servers = rendered(directory, self.engines)
        self.figures = Figures({}, {})

    def ours(self, name: str, probe: Body) -> Server:
        server = self.servers[name]
        return launched(name, server, probe, self.directory, self.directory / f"{server['instance']}.log")

    def varied(self, name: str, probe: Body) -> Server:
        """The same engine with what is tried beside what the role writes."""
        server, port = self.servers[name], free_port()
        environment = {**server["env"], **self.tried, "INFINITY_PORT": str(port)}
        return Server(f"{name}, tried", port, path_of(server), probe, server["argv"], environment, self.directory / f"tried-{name}.log")

    def ways(self, model: str, kind: str, path: str, probe: Body) -> dict[str, Callable[[], Server]]:
        """The three servers of an embedding or rerank model."""
        ways = {"ours": lambda: self.ours(model, probe), "baseline": lambda: self.baseline(kind, model, path, adapted("baseline", probe))}
        return {**ways, "tried": lambda: self.varied(model, probe)} if self.tried else ways

    def baseline(self, kind: str, model: str, path: str, probe: Body) -> Server:
        return baseline(kind, self.servers[model], path, probe, self.directory / f"baseline-{model}.log", self.seed)

    @contextlib.contextmanager
    def raised(self, kind: str, start: dict[str, Callable[[], Server]]) -> Iterator[dict[str, Server]]:
        """One after another, each alone while it starts; all are stopped in the end."""
        servers: dict[str, Server] = {}
        try:
            for way, make in start.items():
                servers[way] = make()
                asyncio.run(servers[way].wait())
                servers[way].pause(True)
            yield servers
            self.figures.starts[kind] = {way: server.start() for way, server in servers.items()}
        finally:
            for server in servers.values():
                server.stop()

    def measure(self, name: str, servers: dict[str, Server], rounds: int, run: Run) -> None:
        """In turns, so that whatever else this machine does meets all of them; the first of a turn changes."""
        costs: dict[str, list[Cost]] = {way: [] for way in servers}
        for turn in range(rounds):
            order = list(servers.items())
            for way, server in order[::-1] if turn % 2 else order:
                server.pause(False)
                costs[way].append(asyncio.run(measured(way, server, run)))
                server.pause(True)
        self.figures.costs[name] = costs
        show(name, costs)

    # ------------------------------------------------------------ embeddings and rerank

    def batches(self, name: str, servers: dict[str, Server], bodies: list[Body], clients: int, items: int, check: Callable[[str, Body, Any], None]) -> None:
        """What is counted is what was answered right."""
        answered: list[Answered] = []
        self.measure(name, servers, ROUNDS, posting(bodies, clients, items, answered))
        for way, body, data in answered:
            check(way, body, json.loads(data))

    def embeddings(self) -> None:
        rng = random.Random(1)  # noqa: S311
        probe = {"model": "embedding", "input": ["ping"]}

        def check(size: dict[str, int]) -> Callable[[str, Body, Any], None]:
            return lambda way, body, answer: embedded(body, answer, size[way])

        with self.raised("embedding", self.ways("embedding", "embedding", "/v1/embeddings", probe)) as servers:
            sizes = check({"ours": 384, "tried": 384, "baseline": 1536})
            few = [embedding_body(rng, 64, SHORT) for _unused in range(3)]
            many = [embedding_body(rng, 64, SHORT) for _unused in range(8)]
            self.batches("embeddings_1x64", servers, few, 1, 64, sizes)
            self.batches("embeddings_8x64", servers, many, 8, 64, sizes)
            self.batches("embeddings_1x32_long", servers, [embedding_body(rng, 32, LONG)], 1, 32, sizes)
        large = {**probe, "model": "embedding-large"}
        with self.raised("embedding_m3e_large", self.ways("embedding-large", "embedding", "/v1/embeddings", large)) as servers:
            body = {**embedding_body(rng, 16, SHORT), "model": "embedding-large"}
            self.batches("embeddings_m3e_large", servers, [body], 1, 16, check({"ours": 1024, "tried": 1024, "baseline": 1536}))

    def rerank(self) -> None:
        rng = random.Random(2)  # noqa: S311

        def body() -> Body:
            return {"model": "rerank", "query": hanzi(rng, 8, 24), "documents": [hanzi(rng, *PASSAGE) for _unused in range(30)]}

        def check(way: str, sent: Body, answer: Any) -> None:
            scores = scored(way, answer, 30)
            previous = seen.setdefault(sent["query"], scores) if way != "tried" else scores
            # the same pairs through the same weights; both put a sigmoid behind the logit
            if any(abs(previous[at] - scores[at]) > 1e-3 for at in scores):
                raise BenchError(f"{way}: other scores for the same pairs: {scores} and {previous}")

        seen: dict[str, dict[int, float]] = {}
        probe = {"model": "rerank", "query": "ping", "documents": ["ping", "pong"]}
        with self.raised("rerank", self.ways("rerank", "rerank", "/v1/rerank", probe)) as servers:
            bodies = [body() for _unused in range(8)]
            self.batches("rerank_1x30", servers, bodies[:2], 1, 30, check)
            self.batches("rerank_8x30", servers, bodies, 8, 30, check)

    # ------------------------------------------------------------ chat

    def chat(self) -> None:
        rng = random.Random(3)  # noqa: S311
        questions, long = [hanzi(rng, *SHORT) for _unused in range(32)], [hanzi(rng, *LONG) for _unused in range(8)]
        texts: Texts = {}

        def asking(prompts: list[str], times: int = 1) -> Run:
            return streaming("chat", prompts, NEW_TOKENS, texts, times)

        probe = {"model": "chat", "messages": [{"role": "user", "content": "ping"}], "max_tokens": 1, "temperature": 0, "stream": True}
        start = {
            "ours": lambda: self.ours("chat", probe),
            "baseline": lambda: self.baseline("chat", "chat", "/v1/chat/completions", probe),
            "transformers_serve": lambda: self.ours("chat, transformers serve", probe),
        }
        with self.raised("chat", start) as servers:
            self.measure("chat_1", servers, ROUNDS, asking(questions[:1], 4))
            if texts["ours", questions[0]] != texts["baseline", questions[0]]:
                raise BenchError(f"ours and the baseline say different things: {texts}")
            self.measure("chat_8", servers, ROUNDS, asking(questions[:8]))
            self.measure("chat_8_long_prompts", servers, ROUNDS, asking(long))
            self.measure("chat_32", servers, ROUNDS, asking(questions))


# characters, which are tokens: questions and sentences; pieces of a document, as FastGPT cuts them, or puts them into a prompt; passages
SHORT, LONG, PASSAGE = (8, 32), (380, 500), (20, 200)


def adapted(way: str, body: Body) -> Body:
    """The seed's reranker knows only the shape that FastGPT before 4.7 sends."""
    if way == "baseline" and "documents" in body:
        return {"query": body["query"], "inputs": [{"id": str(at), "text": text} for at, text in enumerate(body["documents"])]}
    return body


def setting(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name.startswith("INFINITY_"):
        raise argparse.ArgumentTypeError(f"{text}: give INFINITY_NAME=VALUE")
    return name, value


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--try", dest="tried", action="append", default=[], type=setting, metavar="NAME=VALUE",
                        help="measure infinity with this variable too, as a further way; e.g. 'INFINITY_BATCH_SIZE=8;'")  # fmt: skip
    given = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers go too
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="bench-models-") as directory:
            bench = Bench(pathlib.Path(directory), dict(given.tried))
            bench.embeddings()
            bench.rerank()
            bench.chat()
    except (BenchError, aiohttp.ClientError, TimeoutError) as exc:
        print(f"bench-models: {exc or type(exc).__name__}", file=sys.stderr)
        return 2
    result = report(bench.figures)
    write(REPORT, result)
    for kind, ways in bench.figures.starts.items():
        for way, start in ways.items():
            print(f"{kind:<24}{way:<20}first answer after {start.seconds:5.1f} s, {start.rss_mb:5.0f} MB, at most {start.peak_mb:5.0f} MB")
    told = goals(result)
    for reached, text in told:
        print(f"goal {'reached' if reached else 'missed':<9}{text}")
    print(f"{time.monotonic() - began:.0f} s")
    return 0 if all(reached for reached, _unused in told) else 1


if __name__ == "__main__":
    sys.exit(main())
