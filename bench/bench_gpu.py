# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""`make bench-gpu`: our model servers on an NVIDIA GPU, with models of real shapes, beside the cards' figures and the way the seed's servers work.

See README.md beside this file. What was measured is written after each step, so that a killed run leaves figures too."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
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
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import bench_models as base
import yaml
from bench_models import PASSAGE, ROOT, SHORT, BenchError, Body, Cost, Run, Server

sys.path[:0] = [str(ROOT / ".collections"), str(ROOT / "tests" / "support")]

from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _gpus  # noqa: E402
from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils import _placement  # noqa: E402
from ports import free_port  # noqa: E402

REPORT = ROOT / ".bench" / "gpu.json"
CHAT, EMBEDDING, RERANKS = "Baichuan2-7B-Chat", "M3E-large", ("bge-reranker-base", "bge-reranker-large")
WIDTHS = (16, 8, 4)
# a run that took longer is not repeated
REPEATED_SECONDS = 6.0
# a round of requests without streams, and how many different ones there are
ROUND_SECONDS = 4.0
BODIES = 300
# what every phase needs at least: less is not begun
PHASE_SECONDS = 35.0
START_SECONDS = 150.0
RUN_SECONDS = 120.0
POLL_SECONDS = 0.2
PACKAGES = ("torch", "transformers", "tokenizers", "huggingface-hub", "safetensors", "numpy", "bitsandbytes", "accelerate", "uvicorn", "starlette",
            "infinity-emb", "sentence-transformers", "fastapi", "pydantic")  # fmt: skip


Check = Callable[[str, Body, Any], None]


def checked(answered: list[base.Answered], check: Check) -> None:
    for way, body, data in answered:
        check(way, body, json.loads(data))


def lasting(bodies: list[Body], clients: int, items: int, answered: list[base.Answered], seconds: float) -> Run:
    """Each client asks until the time is over, at least once. A next round goes on with other bodies, the same for each way: a server that does something
    anew for each length of a text meets new lengths in every round."""
    counted: dict[str, itertools.count[int]] = {}

    async def ask(way: str, server: Server) -> tuple[int, tuple[float, ...]]:
        numbers, ends = counted.setdefault(way, itertools.count()), time.perf_counter() + seconds

        async def client() -> int:
            done = 0
            while not done or time.perf_counter() < ends:
                await base.posting([bodies[next(numbers) % len(bodies)]], 1, items, answered)(way, server)
                done += items
            return done

        return sum(await asyncio.gather(*(client() for _unused in range(clients)))), ()

    return ask


def gigabytes(mebibytes: float) -> float:
    return round(mebibytes * 1.048576 / 1000, 2)


# -- the GPU -----------------------------------------------------------------------------------------------------------


def smi(*arguments: str) -> tuple[int, str]:
    try:
        answer = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as exc:
        return 126, str(exc)
    return answer.returncode, answer.stdout if answer.stdout.strip() else answer.stderr


def gpu_facts() -> list[Body]:
    """As the module gpu_facts returns them."""
    facts = _gpus.gather(_gpus.scan_bus(), _gpus.loaded_driver(), lambda args: smi(*args), 0)
    return list(facts["gpus"])


class Memory:
    """What processes hold of a GPU, looked at again and again, and the most of it. Nothing without a GPU."""

    def __init__(self, index: int | None) -> None:
        self.index, self.held, self.most = index, {}, {}  # type: int | None, dict[int, int], dict[int, int]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if index is not None:
            self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            self.look()

    def look(self) -> None:
        fields = ("pid", "used_gpu_memory")
        rc, text = smi("-i", str(self.index), "--query-compute-apps=" + ",".join(fields), "--format=csv,noheader,nounits")
        rows = _gpus.parse_csv(text, fields) if rc == 0 else []
        told = [(row["pid"] or "", row["used_gpu_memory"] or "") for row in rows]
        self.held = {int(pid): int(used) for pid, used in told if pid.isdigit() and used.isdigit()}
        rc, text = smi("-i", str(self.index), "--query-gpu=memory.used", "--format=csv,noheader,nounits")
        if rc == 0 and text.strip().isdigit():
            self.held[0] = int(text)  # all of them together
        for pid, used in self.held.items():
            self.most[pid] = max(self.most.get(pid, 0), used)

    def forget(self) -> None:
        self.most = {}

    def of(self, pid: int) -> dict[str, float]:
        """In GB: of a process, now and at most, and of the whole GPU, which is all that there is where processes are not told."""
        held, most = dict(self.held), dict(self.most)
        found = {"now": held.get(pid), "most": most.get(pid), "gpu_now": held.get(0), "gpu_most": most.get(0)}
        return {name: gigabytes(used) for name, used in found.items() if used is not None}

    def end(self) -> None:
        self._ended.set()
        if self.index is not None:
            self._thread.join(5)


# -- what is compared --------------------------------------------------------------------------------------------------


def catalogue() -> list[Body]:
    text = (ROOT / "roles" / "model_cards" / "vars" / "main.yml").read_text(encoding="utf-8")
    return list(yaml.safe_load(text)["model_cards_catalogue"])


def servers(models: pathlib.Path, gpus: list[int]) -> dict[str, Body]:
    """All of them on one host, by the names of this bench."""

    def server(model: str, engine: str, bits: int) -> Body:
        return {"model": model, "port": free_port() - 10000, "engine": engine, "gpus": gpus, "quantize_bit": bits,
                "weights": {"source": "path", "path": str(models / model)}}  # fmt: skip

    chats = {f"chat_{bits}": server(CHAT, "legacy_chat", bits) for bits in WIDTHS}
    return {**chats, **{model: server(model, "infinity", 16) for model in (EMBEDDING, *RERANKS)}}


def predicted(listed: dict[str, Body], facts: list[Body]) -> dict[str, Body]:
    """What the card and the placement say of each server's memory, in GB, by the functions that place models."""
    cards = catalogue()
    known = {card["name"]: card for card in cards}
    placed, faults = _placement.place(list(listed.values()), cards, facts)
    if faults:
        raise BenchError("the models are not placed on this host: " + "; ".join(faults))
    found = {}
    for name, server in listed.items():
        card, width, place = known[server["model"]], server["quantize_bit"], placed[server["port"]]
        reserve = _placement.number(place["entry"].get("reserve_gb")) or _placement.RESERVE_GB
        weights, cache = _placement.weights_gb(card, width), _placement.cache_gb(card)
        found[name] = {
            "weights": round(weights, 2), "cache_of_one_context": round(cache, 2), "reserve": reserve, "sum": round(weights + cache + reserve, 2),
            "table": card["memory"][width].get("vram_gb"), "need": place["need_gb"], "given": place["memory_gb"], "given_to_cache": place["cache_gb"],
        }  # fmt: skip
    return found


def rated(costs: list[Cost]) -> Body:
    best = max(costs, key=lambda cost: cost.rate)
    found: Body = {"per_second": round(best.rate, 2), "cpu_ms_each": round(best.cpu_ms, 3), "rounds": len(costs)}
    if best.firsts:
        found |= {"first_token_median_s": round(statistics.median(best.firsts), 3), "first_token_last_s": round(base.last_first(costs), 3)}
    return found


def with_ratios(rates: dict[str, dict[str, Body]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, ways in rates.items():
        found[name] = dict(ways)
        if {"ours", "baseline"} <= set(ways):
            found[name]["ratio"] = round(ways["ours"]["per_second"] / ways["baseline"]["per_second"], 2)
    return found


# -- the bench ---------------------------------------------------------------------------------------------------------


class GpuBench:
    def __init__(self, given: argparse.Namespace, directory: pathlib.Path) -> None:
        self.given, self.directory = given, directory
        self.logs = given.logs or directory
        self.logs.mkdir(parents=True, exist_ok=True)
        self.ends = time.monotonic() + given.budget
        self.deadline = self.ends
        self.size, self.tokens = ("tiny", 16) if given.tiny else ("real", base.NEW_TOKENS)
        self.models = directory / "models"
        self.rates: dict[str, dict[str, Body]] = {}
        self.result: Body = {"complete": False, "device": given.device, "shapes": self.size, "new_tokens": self.tokens, "machine": {}, "steps": [],
                             "start_s": {}, "memory_gb": {}, "notes": {}}  # fmt: skip
        self.memory = Memory(given.gpu if given.device == "cuda" else None)
        self.listed: dict[str, Body] = {}
        self.servers: dict[str, Body] = {}

    # ------------------------------------------------------------ steps

    def left(self) -> float:
        return max(self.deadline - time.monotonic(), 0.1)

    def write(self) -> None:
        base.write(self.given.out, {**self.result, "rates": with_ratios(self.rates)})

    def step(self, name: str, most: float, work: Callable[[], Any], least: float = 1.0) -> bool:
        """Whether it went well. What does not fit into the budget any more is left out, what fails is told, and the next goes on."""
        began = time.monotonic()
        told: Body = {"name": name}
        self.deadline = min(began + most, self.ends)
        if self.ends - began < least:
            told["skipped"] = f"{self.ends - began:.0f} s of the budget are left"
        else:
            try:
                work()
            except Exception as exc:
                told["error"] = f"{type(exc).__name__}: {exc}"[-4000:]
        told["seconds"] = round(time.monotonic() - began, 1)
        self.result["steps"].append(told)
        self.write()
        print(json.dumps(told, ensure_ascii=False), flush=True)
        return not {"skipped", "error"} & set(told)

    def call(self, command: list[str], **more: Any) -> str:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=self.left(), check=False, **more)
        if done.returncode != 0:
            raise BenchError(f"{command[:4]} ends with {done.returncode}:\n{done.stdout[-3000:]}")
        return str(done.stdout)

    # ------------------------------------------------------------ before

    def prepare(self) -> None:
        defaults = yaml.safe_load((base.ROLE / "defaults" / "main.yml").read_text(encoding="utf-8"))
        given = {"legacy_chat": self.given.legacy_chat, "infinity": self.given.infinity}
        self.engines = {name: path.absolute() if path else base.engine(name, defaults) for name, path in given.items()}
        facts = gpu_facts() if self.given.device == "cuda" else []
        if self.given.device == "cuda" and not any(gpu["index"] == self.given.gpu and gpu["memory_mb"] for gpu in facts):
            raise BenchError(f"no GPU {self.given.gpu} that works: {facts}")
        self.listed = servers(self.models, [self.given.gpu] if facts else [])
        directories = {name + behind: path for name, path in self.engines.items() for behind in ("", "-gpu")}
        threads = max((os.cpu_count() or 1) // 2, 1)
        self.servers = base.written(self.directory, directories, self.listed, model_cards_catalogue=catalogue(), model_cards_extra=[],
                                    model_server_threads=threads, model_server__gpus=facts)  # fmt: skip
        for name, path in self.engines.items():
            ask = ("import importlib.metadata as m, json, sys\nfound = {}\nfor one in sys.argv[1:]:\n    try: found[one] = m.version(one)\n"
                   "    except m.PackageNotFoundError: pass\nprint(json.dumps({'python': sys.version.split()[0], **found}))")  # fmt: skip
            self.result["machine"][name] = json.loads(self.call([str(path / "bin" / "python"), "-I", "-c", ask, *PACKAGES]))
        self.result["machine"] |= {"cpus": os.cpu_count(), "threads": threads, "gpus": [{**gpu, "uuid": None} for gpu in facts]}
        self.result["memory_gb"] = {name: {"card": card} for name, card in predicted(self.listed, facts).items()} if facts else {}
        self.result["commands"] = {name: server["argv"] for name, server in self.servers.items()}

    def weights(self) -> None:
        python = str(self.engines["legacy_chat"] / "bin" / "python")
        script = [python, str(ROOT / "bench" / "gpu_models.py"), str(self.models), self.given.device, self.size]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": str(self.given.gpu)}
        logs = [self.logs / "weights-large.log", self.logs / "weights-small.log"]
        making = []
        for names, log in zip(((CHAT,), (EMBEDDING, *RERANKS)), logs, strict=True):
            with log.open("w") as output:
                making.append(subprocess.Popen([*script, *names], env=environment, stdout=output, stderr=subprocess.STDOUT))
        try:
            for process, log in zip(making, logs, strict=True):
                if process.wait(self.left()) != 0:
                    raise BenchError(log.read_text()[-3000:])
        finally:
            for process in making:
                process.kill()
        self.result["notes"]["weights_gb"] = {
            path.name: round(sum(one.stat().st_size for one in path.rglob("*.safetensors")) / 1e9, 2) for path in sorted(self.models.iterdir())
        }

    # ------------------------------------------------------------ servers

    def ours(self, name: str, probe: Body) -> Server:
        return base.launched(name, self.servers[name], probe, self.directory, self.logs / f"ours-{name}.log")

    def baseline(self, name: str, kind: str, probe: Body) -> Server:
        server = self.servers[name]
        seed = None if kind == "chat" else self.given.seed_packages
        device = "cuda:0" if self.given.device == "cuda" else "cpu"
        log = self.logs / f"baseline-{name}.log"
        return base.baseline(kind, server, base.path_of(server), base.adapted("baseline", probe), log, seed, device)

    @contextlib.contextmanager
    def raised(self, name: str, make: dict[str, Callable[[], Server]]) -> Iterator[dict[str, Server]]:
        """Those that answer; they start side by side."""
        raised: dict[str, Server] = {}
        try:
            began = {way: one() for way, one in make.items()}
            raised.update(began)
            outcomes: list[BaseException | None] = []
            self.step(f"{name}: start", START_SECONDS, lambda: outcomes.extend(asyncio.run(self.wait(list(began.values())))))
            for (way, server), outcome in zip(began.items(), outcomes or [BenchError("not started")] * len(began), strict=True):
                if outcome is None:
                    self.result["start_s"].setdefault(name, {})[way] = round(server.ready, 1)
                else:
                    raised.pop(way).stop()
                    self.fault(f"{name}: start of {way}", outcome)
            self.held(name, raised, "start")
            yield raised
            self.held(name, raised, "runs")
        finally:
            for server in raised.values():
                server.stop()
            self.write()

    async def wait(self, servers: list[Server]) -> list[BaseException | None]:
        return await asyncio.gather(*(server.wait(self.left() + time.monotonic() - server.began) for server in servers), return_exceptions=True)

    def fault(self, name: str, outcome: BaseException) -> None:
        def again() -> None:
            raise outcome

        self.step(name, 1, again, float("-inf"))

    def held(self, name: str, servers: dict[str, Server], when: str) -> None:
        """What each holds of the GPU, at most since this was asked last, and of the host's memory."""
        if self.memory.index is not None:
            time.sleep(2 * POLL_SECONDS)
        for way, server in servers.items():
            figures = self.result["memory_gb"].setdefault(name, {}).setdefault(way, {})
            figures[when] = self.memory.of(server.process.pid)
            with contextlib.suppress(OSError):
                figures["host"] = gigabytes(server.start().peak_mb)
        self.memory.forget()

    def measure(self, figure: str, servers: dict[str, Server], run: Run, rounds: int = 0) -> None:
        for way, server in servers.items():
            self.step(f"{figure}: {way}", RUN_SECONDS, functools.partial(self.rounds, figure, way, server, run, rounds or self.given.rounds), 5.0)

    def rounds(self, figure: str, way: str, server: Server, run: Run, most: int) -> None:
        costs: list[Cost] = []
        while len(costs) < most:
            began = time.monotonic()
            costs.append(asyncio.run(self.limited(way, server, run)))
            self.rates.setdefault(figure, {})[way] = rated(costs)
            if time.monotonic() - began > min(REPEATED_SECONDS, self.left()):
                break

    async def limited(self, way: str, server: Server, run: Run) -> Cost:
        return await asyncio.wait_for(base.measured(way, server, run), self.left())

    def phase(self, name: str, work: Callable[[], None]) -> None:
        """A fault outside of its steps is told like one of a step."""
        if self.ends - time.monotonic() < PHASE_SECONDS and not self.given.tiny:
            self.step(name, 0, lambda: None, PHASE_SECONDS)
            return
        self.memory.forget()
        try:
            work()
        except Exception as exc:
            self.fault(name, exc)

    # ------------------------------------------------------------ chat

    def chat(self, bits: int, way: str) -> None:
        name, rng, texts = f"chat_{bits}", random.Random(3), base.Texts()  # noqa: S311
        questions = [base.hanzi(rng, *SHORT) for _unused in range(32)]
        # the template takes some tokens too
        most = 4096 - self.tokens - 64
        long = base.hanzi(rng, most, most)
        probe = {"model": CHAT, "messages": [{"role": "user", "content": "ping"}], "max_tokens": 1, "temperature": 0, "stream": True}
        start = (lambda: self.ours(name, probe)) if way == "ours" else (lambda: self.baseline(name, "chat", probe))

        def asking(prompts: list[str]) -> Run:
            return base.streaming(CHAT, prompts, self.tokens, texts)

        with self.raised(name, {way: start}) as servers:
            if way == "ours":
                # first, while nothing else has grown the allocator's share
                self.measure(f"{name}_whole_context", servers, asking([long]), 1)
                self.held(name, servers, "whole_context")
            counts = (1, 8, 32) if way == "ours" else (1, 8)
            for count in counts:
                warming = base.streaming(CHAT, questions[: count if way == "ours" else 1], 16, {})
                self.step(f"{name}_{count}: warm", 60, functools.partial(self.warm, servers, warming))
                self.measure(f"{name}_{count}", servers, asking(questions[:count]))
            if way == "ours":
                log = next(iter(servers.values())).log.read_text(errors="replace") if servers else ""
                self.result["notes"][name] = [line for line in log.splitlines() if "legacy_chat" in line][:5]
        said = {key: text for key, text in texts.items() if key[1] == questions[0]}
        self.result["notes"].setdefault("first_answer", {})[f"{name}, {way}"] = next(iter(said.values()), "")[:32]

    # ------------------------------------------------------------ embeddings and rerank

    def both(self, name: str, kind: str, probe: Body, body: Callable[[], Body], items: int, figures: tuple[str, str], check: Check) -> None:
        make = {"ours": lambda: self.ours(name, probe), "baseline": lambda: self.baseline(name, kind, probe)}
        bodies = [body() for _unused in range(8 if self.given.tiny else BODIES)]
        seconds = 0.0 if self.given.tiny else ROUND_SECONDS
        with self.raised(name, make) as servers:
            self.step(f"{name}: warm", 60, lambda: self.warm(servers, base.posting(bodies[-1:], 1, items, [])))
            for figure, clients in zip(figures, (1, 8), strict=True):
                answered: list[base.Answered] = []
                self.measure(figure, servers, lasting(bodies, clients, items, answered, seconds))
                self.step(f"{figure}: answers", 30, functools.partial(checked, answered, check))

    def warm(self, servers: dict[str, Server], run: Run) -> None:
        for way, server in servers.items():
            asyncio.run(self.limited(way, server, run))

    def embeddings(self) -> None:
        rng = random.Random(1)  # noqa: S311
        sizes = {"ours": 64 if self.given.tiny else 1024, "baseline": 1536}

        def body() -> Body:
            return {**base.embedding_body(rng, 64, SHORT), "model": EMBEDDING}

        probe = {"model": EMBEDDING, "input": ["ping"]}
        self.both(EMBEDDING, "embedding", probe, body, 64, ("embeddings_1x64", "embeddings_8x64"),
                  lambda way, sent, answer: base.embedded(sent, answer, sizes[way]))  # fmt: skip

    def rerank(self, model: str) -> None:
        rng = random.Random(2)  # noqa: S311

        def body() -> Body:
            return {"model": model, "query": base.hanzi(rng, 8, 24), "documents": [base.hanzi(rng, *PASSAGE) for _unused in range(30)]}

        scores: dict[tuple[str, str], dict[int, float]] = {}
        probe = {"model": model, "query": "ping", "documents": ["ping", "pong"]}
        self.both(model, "rerank", probe, body, 30, (f"{model}_1x30", f"{model}_8x30"),
                  lambda way, sent, answer: scores.__setitem__((way, sent["query"]), base.scored(way, answer, 30)))  # fmt: skip
        # 16 bit beside the baseline's 32
        pairs = [(one, scores[("baseline", query)]) for (way, query), one in scores.items() if way == "ours" and ("baseline", query) in scores]
        if pairs:
            self.result["notes"][f"{model}, farthest scores"] = round(max(abs(one[at] - other[at]) for one, other in pairs for at in one), 5)

    # ------------------------------------------------------------ all of it

    def run(self) -> None:
        self.write()
        if not self.step("preparation", 3600 if not self.given.legacy_chat else 90, self.prepare):
            return
        self.step("weights", 240, self.weights)
        self.phase("chat_16", lambda: self.chat(16, "ours"))
        self.phase("chat_16, baseline", lambda: self.chat(16, "baseline"))
        self.phase("chat_4", lambda: self.chat(4, "ours"))
        self.phase(EMBEDDING, self.embeddings)
        self.phase(RERANKS[1], lambda: self.rerank(RERANKS[1]))
        self.phase("chat_8", lambda: self.chat(8, "ours"))
        self.phase(RERANKS[0], lambda: self.rerank(RERANKS[0]))

    def end(self) -> None:
        self.memory.end()
        self.result["complete"] = not any({"error", "skipped"} & set(step) for step in self.result["steps"])
        self.write()


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--out", type=pathlib.Path, default=REPORT)
    add("--budget", type=float, default=1800, metavar="SECONDS", help="what does not fit into it is left out")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tries the bench itself, with --tiny")
    add("--gpu", type=int, default=0, help="index of the GPU, by bus")
    add("--tiny", action="store_true", help="small shapes and short answers, which measure nothing")
    add("--rounds", type=int, default=2, help="runs of which the best counts, where one is short")
    add("--legacy-chat", type=pathlib.Path, metavar="DIR", help="environment of that engine instead of one made as the role makes it")
    add("--infinity", type=pathlib.Path, metavar="DIR", help="the same of infinity")
    add("--seed-packages", type=pathlib.Path, metavar="DIR", help="packages before those of the engine for the baseline of embeddings and rerank")
    add("--scratch", type=pathlib.Path, metavar="DIR", help="where 20 GB of weights go for the time being; the system's temporary directory by default")
    add("--logs", type=pathlib.Path, metavar="DIR", help="keep the servers' logs there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    given = arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers go too
    directory = pathlib.Path(tempfile.mkdtemp(prefix="bench-gpu-", dir=given.scratch))
    try:
        bench = GpuBench(given, directory)
        try:
            bench.run()
        finally:
            bench.end()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    for name, ways in with_ratios(bench.rates).items():
        print(name, json.dumps(ways), flush=True)
    print(json.dumps(bench.result["memory_gb"], indent=1))
    return 0 if bench.result["complete"] else 2


if __name__ == "__main__":
    sys.exit(main())
