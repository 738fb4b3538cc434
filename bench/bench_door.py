# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the door costs of a model server's throughput.

An embedding server's shape stands behind a real nginx with the role's own template: one batch at a time, 64 texts a request, 1024 numbers a text.
Eight clients ask it directly and through the door in turn; the best of three rounds counts. Writes .bench/door.json.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import typing as t
from pathlib import Path

from aiohttp import web

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "integration" / "door"))

from conftest import Door, Renderer  # noqa: E402
from ports import free_port  # noqa: E402

CLIENTS, SECONDS, ROUNDS = 8, 4.0, 3
# seconds a batch takes, and texts in it: a large batch as FastGPT sends it, and the smallest request that there is
SHAPES = {"30 ms, 64 texts": (0.030, 64), "0.5 ms, 1 text": (0.0005, 1)}
KEY = "sk-bench"


def serve(port: int, seconds: float, texts: int) -> None:
    random.seed(1)
    rows = [{"object": "embedding", "index": index, "embedding": [round(random.uniform(-1, 1), 8) for _unused in range(1024)]} for index in range(texts)]
    body = json.dumps({"object": "list", "data": rows, "model": "m", "usage": {"prompt_tokens": 1, "total_tokens": 1}}).encode()

    async def main() -> None:
        turn = asyncio.Lock()

        async def embed(request: web.Request) -> web.Response:
            await request.json()
            async with turn:
                # asyncio sleeps no less than a millisecond, and a model server's batch keeps its thread busy anyway
                if seconds >= 0.005:
                    await asyncio.sleep(seconds)
                else:
                    end = time.perf_counter() + seconds
                    while time.perf_counter() < end:
                        pass
            return web.Response(body=body, content_type="application/json")

        app = web.Application(client_max_size=2**26)
        app.router.add_post("/v1/embeddings", embed)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await asyncio.Event().wait()

    asyncio.run(main())


async def measure(port: int, texts: int) -> float:
    payload = json.dumps({"model": "m", "input": ["向量" * 100] * texts}).encode()
    head = (
        f"POST /v1/embeddings HTTP/1.1\r\nHost: door\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    # one write, as most clients do it; a client that is busier than the server would measure itself
    request = head.encode() + payload
    done, begin = 0, 0.0

    async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(request)
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200"), answer
        length = next(line for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.split(b":")[1]))

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        for _unused in range(200):  # until the server stands
            try:
                return await asyncio.open_connection("127.0.0.1", port, limit=2**22)
            except ConnectionError:
                await asyncio.sleep(0.05)
        raise SystemExit(f"nothing answers on port {port}")

    connections = [await connect() for _unused in range(CLIENTS)]
    await asyncio.gather(*(ask(*connection) for connection in connections))

    async def client(connection: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        nonlocal done
        while time.perf_counter() < begin + SECONDS:
            await ask(*connection)
            done += 1

    begin = time.perf_counter()
    await asyncio.gather(*map(client, connections))
    rate = done / (time.perf_counter() - begin)
    for _reader, writer in connections:
        writer.close()
    return rate


def cpu_seconds(pids: t.Iterable[int]) -> float:
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def compare(door: Door, seconds: float, texts: int) -> dict[str, float]:
    port, behind = free_port(), free_port()
    door.open({"port": port, "upstream": f"127.0.0.1:{behind}", "api_keys": [KEY], "pass": ["/v1/"]})
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(behind, seconds, texts), daemon=True)
    server.start()
    best = {"direct": 0.0, "door": 0.0}
    cpu = requests = 0.0
    try:
        for _unused in range(ROUNDS):
            for way, number in (("direct", behind), ("door", port)):
                before = cpu_seconds(door.workers())
                rate = asyncio.run(measure(number, texts))
                best[way] = max(best[way], rate)
                if way == "door":
                    cpu += cpu_seconds(door.workers()) - before
                    requests += rate * SECONDS
    finally:
        server.terminate()
        server.join(10)
    return {
        **{way: round(rate, 2) for way, rate in best.items()},
        "cost_percent": round(100 * (1 - best["door"] / best["direct"]), 2),
        "door_cpu_ms_per_request": round(1000 * cpu / requests, 3),
    }


def main() -> None:
    directory = Path(tempfile.mkdtemp(prefix="door-bench-"))
    directory.chmod(0o755)
    renderer = Renderer()
    door = Door(directory / "door", renderer)
    try:
        found = {name: compare(door, *shape) for name, shape in SHAPES.items()}
    finally:
        door.stop()
        renderer.process.terminate()
        shutil.rmtree(directory)
    for name, figures in found.items():
        print(f"{name}: {figures}")
    target = ROOT / ".bench" / "door.json"
    target.parent.mkdir(exist_ok=True)
    real, least = found.values()
    target.write_text(json.dumps({**real, "smallest_request": least}, indent=2) + "\n")


if __name__ == "__main__":
    main()
