# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: for the modules of this collection only; it may change in any release.
"""Timed checks of HTTP services. A check is green, or red with a remedy; nothing that happens inside one is a traceback."""

from __future__ import annotations

import json
import math
import os
import re
import time
import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _http

_DETAIL_MAX = 400
_ANSWER_MAX = 160

# The options of the doc fragment _checks.
HTTP_ARGUMENTS: dict[str, dict[str, t.Any]] = {
    "timeout": {"type": "int", "default": 120},
    "validate_certs": {"type": "bool", "default": True},
    "ca_path": {"type": "path"},
    "client_cert": {"type": "path"},
    "client_key": {"type": "path"},
}


class HttpOptions(t.TypedDict):
    """What _http.request takes besides the request itself."""

    timeout: float
    validate_certs: bool
    ca_path: str | None
    client_cert: str | None
    client_key: str | None


def _shown_url(url: str) -> str:
    return re.sub(r"//[^/]*@", "//***@", url)


def http_options(module: AnsibleModule) -> HttpOptions:
    """Those options of a module. One that cannot work fails the task: it says nothing about the servers."""
    params = module.params
    url = params.get("url")
    if url is not None and not re.fullmatch(r"https?://[^/\s?#@]+/?", url):
        module.fail_json(msg=f"url: {_shown_url(url)}: must be http:// or https:// with host and port, without a path and without a user.")
    if params["timeout"] < 1:
        module.fail_json(msg=f"timeout: {params['timeout']}: must be at least 1 second.")
    for option in ("ca_path", "client_cert", "client_key"):
        path = params[option]
        if path and not os.access(path, os.R_OK):
            module.fail_json(msg=f"{option}: {path}: there is no such file on this host, or user {os.geteuid()} may not read it.")
    return {
        "timeout": float(params["timeout"]),
        "validate_certs": params["validate_certs"],
        "ca_path": params["ca_path"],
        "client_cert": params["client_cert"],
        "client_key": params["client_key"],
    }


class CheckError(Exception):
    """A red check: what was found, and what to do about it."""

    def __init__(self, found: str, remedy: str = "") -> None:
        super().__init__(found)
        self.found = found
        self.remedy = remedy


class Checks:
    """Runs checks one after the other. Secrets never reach a detail."""

    def __init__(self, secrets: t.Iterable[str | None] = ()) -> None:
        self.results: list[dict[str, t.Any]] = []
        self._secrets = {secret for secret in secrets if secret}

    def hide(self, secret: str) -> None:
        """Also keep this one, which was only now learnt, out of the details."""
        if secret:
            self._secrets.add(secret)

    def run(self, name: str, check: t.Callable[[], str]) -> bool:
        """`check` answers with a detail, or raises CheckError."""
        started = time.monotonic()
        ok = False
        try:
            detail = check()
            ok = True
        except CheckError as exc:
            detail = sentences(exc.found, exc.remedy)
        except _http.TransportError as exc:
            detail = sentences(str(exc), "See that the service runs there and that nothing between the hosts closes the port")
        except Exception as exc:  # a check that crashes has found something, and the others must still run
            detail = sentences(f"the check stopped at an answer that it does not understand ({type(exc).__name__}: {exc})")
        self.add(name, ok, time.monotonic() - started, detail)
        return ok

    def skip(self, name: str, reason: str) -> None:
        """A check that could not be made is red: it proves nothing."""
        self.add(name, False, 0.0, f"Not tried: {reason}.")

    def add(self, name: str, ok: bool, seconds: float, detail: str) -> None:
        # Longest first: a key may contain another one.
        for secret in sorted(self._secrets, key=len, reverse=True):
            detail = detail.replace(secret, "********")
        detail = " ".join(detail.split())
        if len(detail) > _DETAIL_MAX:
            detail = detail[: _DETAIL_MAX - 3] + "..."
        self.results.append({"name": name, "ok": ok, "seconds": round(seconds, 3), "detail": detail})

    @property
    def ok(self) -> bool:
        return all(result["ok"] for result in self.results)


def sentences(*parts: str) -> str:
    return " ".join(part.rstrip(". ") + "." for part in parts if part)


def join_url(root: str, path: str) -> str:
    return root.rstrip("/") + path


def bearer(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def answer_of(response: t.Any) -> str:
    """Status and message of an answer, in one short line, whatever its shape."""
    text = response.text() if isinstance(response, _http.Response) else ""
    message: t.Any = text
    try:
        message = message_of(json.loads(text)) or text
    except ValueError:
        pass
    message = " ".join(str(message).split())
    if len(message) > _ANSWER_MAX:
        message = message[: _ANSWER_MAX - 3] + "..."
    return f"HTTP {response.status}" + (f", {message}" if message else "")


def message_of(body: t.Any) -> str:
    """The message in an error body of OpenAI, One-API, FastGPT or FastAPI, else nothing."""
    if not isinstance(body, dict):
        return ""
    error = body.get("error")
    if isinstance(error, dict):
        return str(error.get("message") or error)
    for key in ("message", "detail", "msg", "statusText"):
        if body.get(key):
            return str(body[key])
    return str(error or "")


def json_object(response: _http.Response, remedy: str = "") -> dict[str, t.Any]:
    try:
        body = response.json()
    except ValueError as exc:
        raise CheckError(f"the answer is no JSON: {answer_of(response)}", remedy) from exc
    if not isinstance(body, dict):
        raise CheckError(f"the answer is no JSON object: {answer_of(response)}", remedy)
    return body


def expect_ok(response: _http.Response, remedy: str = "") -> dict[str, t.Any]:
    """The body of a 200 answer that reports no error inside."""
    if response.status != 200:
        raise CheckError(answer_of(response), remedy)
    body = json_object(response, remedy)
    if body.get("error"):
        raise CheckError(f"HTTP 200 with an error inside: {message_of(body)}", remedy)
    return body


def _is_number(value: t.Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_embeddings(body: dict[str, t.Any], count: int, dimensions: int | None, remedy: str = "") -> str:
    """An embeddings answer of OpenAI's shape: as many vectors as texts, of the right length, usable by inner product."""
    data = body.get("data")
    if not isinstance(data, list) or len(data) != count:
        raise CheckError(f"{count} texts gave {len(data) if isinstance(data, list) else 'no'} vectors", remedy)
    for item in data:
        vector = item.get("embedding") if isinstance(item, dict) else None
        if not isinstance(vector, list) or not vector or not all(_is_number(value) for value in vector):
            raise CheckError("a vector is missing or has something else than numbers in it", remedy)
        if dimensions and len(vector) != dimensions:
            raise CheckError(f"a vector has {len(vector)} dimensions, not {dimensions}", remedy)
        length = math.sqrt(sum(value * value for value in vector))
        # FastGPT compares by inner product, which ranks wrongly where lengths differ.
        if abs(length - 1) > 0.02:
            raise CheckError(f"a vector has the length {length:.3g}, not 1: it is not normalised", remedy)
    return f"{len(data[0]['embedding'])} dimensions"


def check_rerank(body: dict[str, t.Any], count: int, remedy: str = "") -> str:
    """A rerank answer of Cohere's shape: each document once, with a score, the best first."""
    results = body.get("results")
    if not isinstance(results, list) or len(results) != count:
        raise CheckError(f"{count} documents gave {len(results) if isinstance(results, list) else 'no'} results", remedy)
    scores = [result.get("relevance_score") if isinstance(result, dict) else None for result in results]
    if not all(_is_number(score) for score in scores):
        raise CheckError("a result has no relevance_score", remedy)
    if sorted(str(result.get("index")) for result in results) != sorted(str(index) for index in range(count)):
        raise CheckError("the results do not name each document once", remedy)
    numbers = [float(t.cast(float, score)) for score in scores]
    if numbers != sorted(numbers, reverse=True):
        raise CheckError("the results are not ordered by score, the best first", remedy)
    return f"scores {numbers[0]:.3f} to {numbers[-1]:.3f}"


def check_completion(body: dict[str, t.Any], remedy: str = "") -> str:
    """The text of a chat answer of OpenAI's shape."""
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        content = "".join(str((part.get("text") or {}).get("content", "")) for part in content if isinstance(part, dict) and isinstance(part.get("text"), dict))
    if not isinstance(content, str) or not content:
        raise CheckError(f"no text in the answer ({message_of(body) or 'choices[0].message.content is empty'})", remedy)
    # The server of the original tutorial says so with status 200.
    if "不支持非stream模式" in content:
        raise CheckError("the server only streams and says so in a 200 answer", remedy)
    return content


def read_stream(stream: _http.Stream, remedy: str = "") -> tuple[str, int]:
    """Text and number of chunks of a chat stream. An error inside a stream of status 200 is an error."""
    with stream:
        if stream.status != 200:
            body = stream.read()
            raise CheckError(answer_of(_http.Response(stream.status, stream.headers, body)), remedy)
        content_type = stream.headers.get("content-type", "")
        if "text/event-stream" not in content_type:
            raise CheckError(f"asked for a stream, got {content_type or 'no content type'}: {stream.read()[:_ANSWER_MAX].decode('utf-8', 'replace')}", remedy)
        event, text, chunks, finished = "", [], 0, False
        for raw in stream:
            line = raw.decode("utf-8", errors="replace")
            if not line:
                event = ""
            elif line.startswith("event:"):
                event = line[6:].strip()
            elif line.startswith("data:"):
                data = line[5:].strip()
                if data == "[DONE]":
                    finished = True
                    break
                delta, ended = _chunk(data, event, remedy)
                if delta is not None:
                    chunks += 1
                    text.append(delta)
                finished = finished or ended
    if not chunks or not "".join(text):
        raise CheckError("the stream ended without any text", remedy)
    if not finished:
        raise CheckError(f"the stream broke off after {chunks} chunks, without an end", remedy)
    return "".join(text), chunks


def _chunk(data: str, event: str, remedy: str) -> tuple[str | None, bool]:
    try:
        body = json.loads(data)
    except ValueError as exc:
        raise CheckError(f"a line of the stream is no JSON: {data[:_ANSWER_MAX]}", remedy) from exc
    if event == "error" or (isinstance(body, dict) and "choices" not in body and (body.get("error") or message_of(body))):
        raise CheckError(f"an error inside a stream of status 200: {(message_of(body) or data)[:_ANSWER_MAX]}", remedy)
    if not isinstance(body, dict) or event not in ("", "answer", "fastAnswer", "message"):
        return None, False
    if body.get("error"):
        raise CheckError(f"an error inside a stream of status 200: {message_of(body)[:_ANSWER_MAX]}", remedy)
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    delta = choice.get("delta")
    content = delta.get("content") if isinstance(delta, dict) else None
    return (content if isinstance(content, str) and content else None), bool(choice.get("finish_reason"))
