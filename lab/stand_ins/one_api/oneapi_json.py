# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""JSON the way a Go program reads and writes it.

Part of the One-API stand-in, written from the recorded contract. The real server binds bodies to typed structs:
a string in a number field is an error with a text of its own, keys match ignoring case, null leaves a plain field alone.
"""

from __future__ import annotations

import json
from typing import Any

POINTER = "*"
_ZERO: dict[str, Any] = {"string": "", "bool": False, "int": 0, "int64": 0, "uint": 0, "float64": 0}


class GoError(Exception):
    """A decode error with the text that Go's encoding/json would give."""


class GoFloat(float):
    """A number with a dot or an exponent; its text is kept because Go quotes it in errors."""

    raw: str

    def __new__(cls, raw: str) -> GoFloat:
        self = super().__new__(cls, raw)
        self.raw = raw
        return self


def _refuse_constant(text: str) -> Any:
    raise GoError(f"invalid character '{text[0]}' looking for beginning of value")


_DECODER = json.JSONDecoder(parse_float=GoFloat, parse_constant=_refuse_constant)


def decode(body: bytes, whole: bool = False) -> Any:
    """Read one JSON value; `whole` also refuses what follows it (json.Unmarshal), else it is ignored (Decoder.Decode)."""
    text = body.decode("utf-8", "replace").lstrip(" \t\r\n")
    if not text:
        raise GoError("unexpected end of JSON input" if whole else "EOF")
    try:
        value, end = _DECODER.raw_decode(text)
    except json.JSONDecodeError as exc:
        rest = text[exc.pos :].lstrip()
        if not rest or exc.msg.startswith("Unterminated"):
            raise GoError("unexpected end of JSON input" if whole else "unexpected EOF") from exc
        where = "looking for beginning of object key string" if "property name" in exc.msg else "looking for beginning of value"
        if exc.msg.startswith(("Expecting ','", "Expecting ':'")):
            where = "after object key:value pair" if "," in exc.msg else "after object key"
        raise GoError(f"invalid character '{rest[0]}' {where}") from exc
    if whole and text[end:].strip():
        raise GoError(f"invalid character '{text[end:].lstrip()[0]}' after top-level value")
    return value


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


def _fits(value: Any, kind: str) -> bool:
    if kind == "string":
        return isinstance(value, str)
    if kind == "bool":
        return isinstance(value, bool)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if kind == "float64":
        return True
    if isinstance(value, float):
        return False
    return 0 <= value < 2**64 if kind == "uint" else -(2**63) <= value < 2**63


def bind(value: Any, fields: dict[str, str], struct: str, package: str = "model") -> dict[str, Any]:
    """Fill a struct: every field of `fields` (name -> Go type, "*" in front for pointers), zero values where absent."""
    result: dict[str, Any] = {name: None if kind.startswith(POINTER) else _ZERO[kind] for name, kind in fields.items()}
    if value is None:
        return result
    if not isinstance(value, dict):
        raise GoError(f"json: cannot unmarshal {_kind(value)} into Go value of type {package}.{struct}")
    folded = {name.lower(): name for name in fields}
    fault = ""
    for key, item in value.items():
        name = key if key in fields else folded.get(key.lower(), "")
        if not name or item is None:
            if name and fields[name].startswith(POINTER):
                result[name] = None
            continue
        kind = fields[name].lstrip(POINTER)
        if _fits(item, kind):
            result[name] = float(item) if isinstance(item, float) else item
        elif not fault:
            what = _kind(item)
            if what == "number" and kind not in ("string", "bool"):
                what += f" {item.raw if isinstance(item, GoFloat) else item}"
            fault = f"json: cannot unmarshal {what} into Go struct field {struct}.{name} of type {kind}"
    if fault:
        raise GoError(fault)
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def encode(value: Any) -> bytes:
    """Compact, UTF-8, with <, > and & escaped as Go does it."""
    text = json.dumps(_plain(value), ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026").encode()


def encode_map(value: dict[str, Any]) -> bytes:
    """A gin.H: its top-level keys come out sorted."""
    return encode(dict(sorted(value.items())))
