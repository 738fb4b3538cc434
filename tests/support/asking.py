# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Real requests to model servers of a lab, from the machine that the tests run on."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

from lab_hosts import ROOT

BODIES = {
    "chat": ("chat/completions", {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 64}),
    "embedding": ("embeddings", {"input": ["one passage", "another passage"]}),
    "rerank": ("rerank", {"query": "what is a cat", "documents": ["a cat is an animal", "the weather is fine"]}),
}
Answer = tuple[int, Any]
# in the place of a status, where one came and the answer did not
BROKEN_OFF = -1


def ask(url: str, key: str, kind: str, model: str) -> Answer:
    """Status and answer of one request; status 0 and why, where there was none."""
    route, body = BODIES[kind]
    request = urllib.request.Request(
        f"{url}/v1/{route}", json.dumps({**body, "model": model}).encode(), {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    )
    context = ssl.create_default_context(cafile=ROOT / ".lab" / "ca" / "ca.pem")
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
        with opener.open(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")
    except http.client.IncompleteRead as error:
        return BROKEN_OFF, str(error)
    except OSError as error:
        return 0, str(error)


def ask_entry(entry: dict[str, Any]) -> Answer:
    return ask(entry["url"], entry["keys"][0], entry["kind"], entry["model"])


@contextlib.contextmanager
def load(clients: int, once: Callable[[], Answer]) -> Iterator[list[Answer]]:
    """Clients that ask again and again until the block ends; what they were answered, in that order."""
    answers: list[Answer] = []
    ended = threading.Event()

    def client() -> None:
        while not ended.is_set():
            answers.append(once())
            if answers[-1][0] != 200:
                ended.wait(0.1)

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client) for _number in range(clients)]
        try:
            yield answers
        finally:
            ended.set()
        for one in running:
            one.result()


def wait_until(what: Callable[[], Any], seconds: float, words: str) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"{words}: not within {seconds:.0f} s"
        time.sleep(0.2)
