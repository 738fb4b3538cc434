# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the FastGPT stand-in does differently by version, and how config.json is read. Pure, needs no database.

Written from the recorded contract; it covers eras A and B (4.6.8 to 4.8.19).
"""

from __future__ import annotations

import dataclasses
import errno
import json
import re
from typing import Any

import json5

FIRST, LAST = (4, 6, 8), (4, 8, 19)
LISTS = ("llmModels", "vectorModels", "reRankModels", "audioSpeechModels")
DIMENSIONS = 1536


class ConfigError(Exception):
    """The text as the real log has it, after `Load init config error`."""


def parse_version(text: str) -> tuple[int, int, int]:
    match = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?(?:$|-)", text)
    if not match:
        raise ValueError(f"FASTGPT_VERSION {text!r}: expected vX.Y.Z")
    version = (int(match[1]), int(match[2]), int(match[3] or 0))
    if not FIRST <= version <= LAST:
        raise ValueError(f"FASTGPT_VERSION {text!r}: this stand-in covers v4.6.8 to v4.8.19")
    return version


@dataclasses.dataclass(frozen=True)
class Rules:
    """The habits of one version."""

    version: tuple[int, int, int]

    @property
    def text(self) -> str:
        return ".".join(str(part) for part in self.version)

    @property
    def json5(self) -> bool:
        return self.version >= (4, 8, 4)

    @property
    def init_at_start(self) -> bool:
        return self.version >= (4, 8, 14)

    @property
    def rereads_config(self) -> bool:
        """Every five minutes, by a cron job that later versions do not have."""
        return self.version < (4, 6, 9)

    @property
    def race_retries(self) -> int:
        """Retries of the root user's creation that are logged before the first boot dies."""
        return 0 if self.version < (4, 7, 0) else 2 if self.version < (4, 8, 0) else 3

    @property
    def race_kills(self) -> bool:
        return not (4, 7, 0) <= self.version < (4, 8, 0)

    @property
    def new_rerank(self) -> bool:
        return self.version >= (4, 7, 0)

    @property
    def workflow(self) -> bool:
        """Apps are v2 graphs (nodes and edges); before, v1 (modules with targets)."""
        return self.version >= (4, 8, 0)

    @property
    def error_status(self) -> int:
        """HTTP status of errors that carry a code of their own in the body."""
        return 200 if self.version < (4, 8, 18) else 500

    @property
    def login_limit(self) -> tuple[int, int] | None:
        """Log-ins in so many seconds from one address. Since then a wrong password and a missing user are one error with a name."""
        return (10, 120) if self.version >= (4, 8, 18) else None

    @property
    def cookie(self) -> str:
        return "fastgpt_token" if self.version >= (4, 8, 5) else "token"

    @property
    def secure_cookie(self) -> bool:
        return self.version <= (4, 8, 0)

    @property
    def hnsw_build(self) -> int:
        return 128 if self.workflow else 64

    @property
    def recall_limits(self) -> dict[str, tuple[int, int]]:
        """search mode -> how many by vector, how many by words."""
        if self.version < (4, 7, 0):
            return {"embedding": (100, 0), "fullTextRecall": (0, 100), "mixedRecall": (60, 40)}
        if self.version < (4, 8, 0):
            return {"embedding": (150, 0), "fullTextRecall": (0, 150), "mixedRecall": (100, 80)}
        return {"embedding": (100, 0), "fullTextRecall": (0, 100), "mixedRecall": (80, 60)}

    @property
    def rank_constants(self) -> tuple[int, int, int]:
        """k of reciprocal rank fusion for vectors, words, rerank."""
        return (60, 60, 58) if self.new_rerank else (60, 64, 60)

    def collection(self, name: str) -> str:
        """MongoDB name of dataset.collections and its like; renamed at 4.8.1."""
        return name.replace(".", "_") if self.version >= (4, 8, 1) else name

    @property
    def admin_calls(self) -> frozenset[str]:
        """Upgrade calls that this generation of the image knows."""
        if self.version < (4, 7, 0):
            return frozenset({"initv462", "initv463", "initv463-2", "initv464", "initv467"})
        if self.version < (4, 8, 0):
            return frozenset({"clearInvalidData", "initv464", "initv467", "initv468", "initv47", "initv471"})
        later = {(4, 8, 1): "initv481", (4, 8, 5): "initv485", (4, 8, 6): "initv486", (4, 8, 8): "initv488", (4, 8, 10): "initv4810",
                 (4, 8, 15): "initv4815", (4, 8, 17): "initv4817", (4, 8, 18): "initv4818", (4, 8, 19): "initv4819"}  # fmt: skip
        return frozenset({"clearInvalidData", "initv47", "initv471"} | {name for since, name in later.items() if self.version >= since})


# -- config.json -------------------------------------------------------------------------------------------------------


def parse_config(text: str, rules: Rules) -> dict[str, Any]:
    """Strict JSON before 4.8.4, JSON5 from then on. Nothing else is checked: `{}` is fine, unknown keys stay."""
    try:
        value = json5.loads(text) if rules.json5 else json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as exc:
        if exc.pos >= len(text):
            raise ConfigError("SyntaxError: Unexpected end of JSON input") from exc
        if "property name" in exc.msg:
            raise ConfigError(f"SyntaxError: Expected double-quoted property name in JSON at position {exc.pos}") from exc
        raise ConfigError(f"SyntaxError: Unexpected token {text[exc.pos]} in JSON at position {exc.pos}") from exc
    except ValueError as exc:
        raise ConfigError(f"SyntaxError: JSON5: invalid character: {exc}") from exc
    return normalise(value if isinstance(value, dict) else {})


def _no_constant(text: str) -> Any:
    raise json.JSONDecodeError("constant", text, 0)


def normalise(value: dict[str, Any]) -> dict[str, Any]:
    config = {**value, "systemEnv": value.get("systemEnv") or {}, "whisperModel": value.get("whisperModel")}
    for name in LISTS:
        config[name] = value.get(name) or []
    return config


def load_config(path: str, rules: Rules) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError as exc:
        code = errno.errorcode.get(exc.errno or 0, "EIO")
        words = {"EACCES": "permission denied, open", "ENOENT": "no such file or directory, open", "EISDIR": "illegal operation on a directory, read"}
        raise ConfigError(f"Error: {code}: {words.get(code, exc.strerror)} '{path}'") from exc
    return parse_config(text, rules)


def public_models(config: dict[str, Any], rules: Rules) -> dict[str, Any]:
    """The model lists as getInitData shows them: a reranker's address and key are blanked."""
    blank: dict[str, Any] = {} if rules.version < (4, 7, 0) else {"requestUrl": "", "requestAuth": ""}
    rerank = [
        {**{key: value for key, value in item.items() if key not in ("requestUrl", "requestAuth")}, **blank}
        for item in config["reRankModels"]
        if isinstance(item, dict)
    ]
    return {
        "llmModels": config["llmModels"],
        "vectorModels": config["vectorModels"],
        "reRankModels": rerank,
        "whisperModel": config["whisperModel"],
        "audioSpeechModels": config["audioSpeechModels"],
    }


def find_model(models: list[dict[str, Any]], wanted: str | None) -> dict[str, Any] | None:
    """By model or name; the first entry stands in for anything unknown."""
    for model in models:
        if wanted and wanted in (model.get("model"), model.get("name")):
            return model
    return models[0] if models else None


# -- small text tools ----------------------------------------------------------------------------------------------------


def count_tokens(text: str) -> int:
    """Near enough to a tokenizer: a Chinese character is one, four other characters are one."""
    wide = sum(1 for char in text if ord(char) > 0x2E7F)
    return wide + (len(text) - wide + 3) // 4


def search_words(text: str) -> str:
    """Words for the full-text index: latin words, and Chinese text as single characters and pairs."""
    words: list[str] = []
    for part in re.findall(r"[A-Za-z0-9]+|[\u2e80-\u9fff\uac00-\ud7af]+", text.lower()):
        if part[0].isascii():
            words.append(part)
        else:
            words.extend(part)
            words.extend(part[i : i + 2] for i in range(len(part) - 1))
    return " ".join(words)


def simple_text(text: str | None) -> str:
    """Trimmed, with runs of blank lines and control characters taken out."""
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", " ", (text or "").replace("\r\n", "\n").strip())
    return re.sub(r"\n{3,}", "\n\n", text)


def pad_vector(vector: list[float]) -> list[float]:
    return (vector + [0.0] * (DIMENSIONS - len(vector)))[:DIMENSIONS]


def default_indexes(rules: Rules, q: str, a: str, given: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """Texts to embed for one item: "q\\na"; 4.7 and later also q alone."""
    whole = f"{q}\n{a}".strip()
    items = [{"text": str(item.get("text", "")), "defaultIndex": item.get("text", "").strip() == whole} for item in given or []]
    if not rules.new_rerank:
        return items or [{"text": whole, "defaultIndex": True}]
    if not items:
        items = [{"text": whole, "defaultIndex": True}]
    if not any(item["defaultIndex"] for item in items):
        items.insert(0, {"text": whole, "defaultIndex": True})
    elif rules.workflow and q and a and not any(item["text"] == q for item in items):
        items.append({"text": q, "defaultIndex": False})
    return items[:6]


# -- ranking -------------------------------------------------------------------------------------------------------------


def fuse(lists: list[tuple[int, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """Reciprocal rank fusion; a single list comes back as it is, without an rrf score."""
    lists = [(k, items) for k, items in lists if items]
    if not lists:
        return []
    if len(lists) == 1:
        return lists[0][1]
    merged: dict[str, dict[str, Any]] = {}
    totals: dict[str, float] = {}
    for k, items in lists:
        for rank, item in enumerate(items, start=1):
            key = item["id"]
            totals[key] = totals.get(key, 0.0) + 1 / (k + rank)
            if key not in merged:
                merged[key] = {**item, "score": [dict(score) for score in item["score"]]}
                continue
            for score in item["score"]:
                same = next((old for old in merged[key]["score"] if old["type"] == score["type"]), None)
                if same:
                    same["value"] = max(same["value"], score["value"])
                else:
                    merged[key]["score"].append(dict(score))
    ordered = sorted(merged.values(), key=lambda item: -totals[item["id"]])
    for index, item in enumerate(ordered):
        item["score"] = [score for score in item["score"] if score["type"] != "rrf"]
        item["score"].append({"type": "rrf", "value": totals[item["id"]], "index": index})
    return ordered


def drop_same(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items whose letters and digits are the same count once."""
    seen: set[str] = set()
    kept = []
    for item in items:
        text = "".join(char for char in f"{item['q']}{item.get('a') or ''}" if char.isalnum())
        if text not in seen:
            seen.add(text)
            kept.append(item)
    return kept


def score_of(item: dict[str, Any], kind: str) -> float | None:
    return next((score["value"] for score in item["score"] if score["type"] == kind), None)


def fit_tokens(items: list[dict[str, Any]], limit: float) -> list[dict[str, Any]]:
    """As many as the limit allows, with a tolerance of 500; at least one."""
    kept, total = [], 0
    for item in items:
        total += count_tokens(f"{item['q']}{item.get('a') or ''}")
        if total > limit + 500:
            break
        kept.append(item)
        if total > limit:
            break
    return kept or items[:1]
