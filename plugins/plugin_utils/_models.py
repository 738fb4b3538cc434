# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: for the filters of this collection only; it may change in any release.
"""What several filters know about model cards, ports, versions and fault lines. Everything here is a pure function."""

from __future__ import annotations

import difflib
import json
import re
import typing as t
import unicodedata
from collections.abc import Mapping, Sequence

KINDS = ("chat", "embedding", "rerank")
WIDTHS = (16, 8, 4)
# The engine of a door at port P listens on loopback at P + 10000, a reranker's adapter at P + 20000.
ENGINE_OFFSET = 10000
ADAPTER_OFFSET = 20000
PORT_MIN = 1024
PORT_MAX = 65535 - ADAPTER_OFFSET
# What each engine can be used for at all, whatever a card says.
ENGINES: dict[str, dict[str, tuple[t.Any, ...]]] = {
    "transformers": {"kinds": ("chat",), "devices": ("cpu",), "widths": (16,)},
    "vllm": {"kinds": ("chat",), "devices": ("gpu",), "widths": WIDTHS},
    "legacy_chat": {"kinds": ("chat",), "devices": ("cpu", "gpu"), "widths": WIDTHS},
    "infinity": {"kinds": ("embedding", "rerank"), "devices": ("cpu", "gpu"), "widths": (16,)},
}
# These live in containers, the others in an environment of their own on the host.
CONTAINER_ENGINES = ("vllm",)
# FastGPT cuts longer vectors off without a word and pads shorter ones.
DIMENSIONS_MAX = 1536
FASTGPT_FIRST = (4, 6, 8)
FASTGPT_MODELS_LEAVE_FILE = (4, 8, 20)
FASTGPT_FILE_REMOVED = (4, 15, 0)

_USERINFO = re.compile(r"(://)[^/@\s\"']*@")
# No slash and no comma: the name is a directory on the model server and an item of One-API's comma lists.
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_VERSION = re.compile(r"(v?)(\d+)\.(\d+)(?:\.(\d+))?(-[A-Za-z0-9][A-Za-z0-9._-]*)?")


def is_int(value: t.Any) -> t.TypeGuard[int]:
    """True and False are ints in Python, but never a port or a width."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_list(value: t.Any) -> t.TypeGuard[Sequence[t.Any]]:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def shown(value: t.Any, limit: int = 80) -> str:
    """One printable line for any value; the user part of a URL is left out."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str, skipkeys=True)
    except (TypeError, ValueError, RecursionError):
        text = f"({type(value).__name__})"
    text = _USERINFO.sub(r"\1***@", text)
    strange = _strange(text)
    text = _printable(text)
    return (text if len(text) <= limit else text[: limit - 3] + "...") + strange


def _strange(text: str) -> str:
    """Names the first character that nobody sees, or takes for one of ASCII's."""
    for char in text:
        name = unicodedata.name(char, "")
        mixed = name.startswith(("CYRILLIC ", "GREEK ")) and re.search("[A-Za-z0-9]", text)
        if unicodedata.category(char) == "Cf" or name.startswith(("FULLWIDTH ", "MATHEMATICAL ")) or mixed:
            return f" (with U+{ord(char):04X}, {name})"
    return ""


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)


def fault(variable: str, value: str, rule: str, remedy: str, where: str = "") -> str:
    """The one form of a fault, always one line: a variable's name can hold a key of the user's, a rule a value of theirs."""
    return _printable(": ".join(part for part in (where, variable, value, rule) if part) + f". {remedy}" + ("" if remedy.endswith("?") else "."))


def nearest(name: t.Any, known: t.Iterable[t.Any]) -> str:
    """A sentence part that names what was probably meant."""
    names = sorted({str(item) for item in known})
    if not names:
        return "none is known"
    by_case = {item.casefold(): item for item in names}
    close = difflib.get_close_matches(str(name).casefold()[:200], list(by_case), n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(by_case[item] for item in close) + "?"
    return "known: " + ", ".join(names[:20])


def index_cards(cards: t.Any) -> dict[str, Mapping[str, t.Any]]:
    """Cards by name; a later one replaces an earlier one, so that cards of the user's win over the catalogue."""
    found: dict[str, Mapping[str, t.Any]] = {}
    for card in cards if is_list(cards) else []:
        if isinstance(card, Mapping) and isinstance(card.get("name"), str):
            found[str(card["name"])] = card
    return found


def engines_of(card: Mapping[str, t.Any]) -> list[Mapping[str, t.Any]]:
    engines = card.get("engines")
    return [
        engine
        for engine in (engines if is_list(engines) else [])
        if isinstance(engine, Mapping) and isinstance(engine.get("name"), str) and engine.get("device") in ("cpu", "gpu")
    ]


def widths_of(engine: Mapping[str, t.Any]) -> list[int]:
    widths = engine.get("quantize_bits", [16])
    return [int(width) for width in widths if is_int(width)] if is_list(widths) else []


def devices_of(gpus: t.Any) -> tuple[str, ...]:
    """The devices that a server's `gpus` allows, in order of preference."""
    if gpus == "auto":
        return ("gpu", "cpu")
    return ("gpu",) if gpus else ("cpu",)


def engines_for(card: Mapping[str, t.Any], quantize_bit: t.Any, gpus: t.Any, engine: t.Any = None) -> list[Mapping[str, t.Any]]:
    """The card's engines that could serve it so, in order of preference. One on request is asked for by an empty `gpus`."""
    return [
        candidate
        for device in devices_of(gpus)
        for candidate in engines_of(card)
        if candidate["device"] == device
        and engine in (None, candidate["name"])
        and quantize_bit in widths_of(candidate)
        and not (gpus == "auto" and candidate.get("on_request") is True)
    ]


def choose_engine(card: Mapping[str, t.Any], quantize_bit: t.Any, gpus: t.Any, engine: t.Any = None) -> Mapping[str, t.Any] | None:
    """What serves it as long as nobody has looked at the host's GPUs: an engine that needs none, where there is one."""
    fit = engines_for(card, quantize_bit, gpus, engine)
    return next((candidate for candidate in fit if candidate["device"] == "cpu"), fit[0] if fit else None)


def combinations_of(card: Mapping[str, t.Any]) -> list[str]:
    """What can be served of a card, in words for a remedy."""
    found: list[str] = []
    for engine in engines_of(card):
        gpus = "gpus: []" if engine["device"] == "cpu" else "gpus: auto or [0]"
        slow = ", slow" if engine.get("on_request") is True else ""
        found += [f"quantize_bit: {width} with {gpus} ({engine['name']} on {str(engine['device']).upper()}{slow})" for width in widths_of(engine)]
    return found


def served_models(cards: Mapping[str, Mapping[str, t.Any]], kind: t.Any) -> list[str]:
    return [name for name, card in cards.items() if card.get("kind") == kind and combinations_of(card)]


def container_of(engine: str, port: int) -> str:
    """The container that an engine behind this door lives in, empty where it is none."""
    return f"model-{port}" if engine in CONTAINER_ENGINES else ""


def model_name_is_good(name: str) -> bool:
    return _MODEL_NAME.fullmatch(name) is not None


def door_ports(port: int, kind: t.Any) -> dict[int, str]:
    """Every port that a model server takes on its host."""
    ports = {port: "door", port + ENGINE_OFFSET: "engine"}
    if kind == "rerank":
        ports[port + ADAPTER_OFFSET] = "rerank adapter"
    return ports


def parse_version(value: t.Any) -> tuple[int, int, int] | None:
    """`v4.8.9` or `v4.8.15-fix3` as numbers; None for what is no image tag of FastGPT's."""
    match = _VERSION.fullmatch(value) if isinstance(value, str) else None
    # The only tags without v are two fix releases (4.8.12-fix, 4.8.13-fix).
    if not match or not (match[1] or match[5]):
        return None
    return int(match[2]), int(match[3]), int(match[4] or 0)


def version_fault(value: t.Any, variable: str = "fastgpt_version") -> str | None:
    """Why this release cannot configure that FastGPT, or None."""
    served = "Choose v4.6.8 to v4.8.19, e.g. v4.8.9"
    version = parse_version(value)
    if version is None:
        return fault(variable, shown(value), "is not an image tag of the form v4.8.9", f'Write it as quoted text with its v. {served}')
    if version < FASTGPT_FIRST:
        return fault(variable, shown(value), "is older than v4.6.8, whose config.json is the first that this collection writes", served)
    if version >= FASTGPT_FILE_REMOVED:
        return fault(variable, shown(value), "no longer reads a config.json and wants AI Proxy, which this release does not set up", served)
    if version >= FASTGPT_MODELS_LEAVE_FILE:
        return fault(
            variable,
            shown(value),
            "keeps its models in MongoDB behind its model API since v4.8.20 and ignores those of config.json; this release does not serve that API yet",
            served,
        )
    return None
