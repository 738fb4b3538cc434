# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: for the modules of this collection only; it may change in any release.
"""What the oneapi_* modules decide, as pure functions of what is wanted and what the server shows."""

from __future__ import annotations

import difflib
import ipaddress
import json
import math
import re
import typing as t
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation

Row = t.Dict[str, t.Any]

MASK = "********"
ENABLED, DISABLED, EXPIRED, EXHAUSTED = 1, 2, 3, 4
_PATH_KEEPING_TYPES = (1, 8)  # base_url + the client's path
_GROUP_LIMIT = 32
_MAPPING_LIMIT = 1024
_TOKEN_NAME_LIMIT = 30
# Types 47 to 51 came with v0.6.11; older servers treat an unknown type like 8, so the URL would be wrong.
_LAST_TYPE_OF_0_6_10 = 46


class Fault(Exception):
    """What the user asked for cannot be right; the text says why and what to do."""


# ---- common ------------------------------------------------------------------------------------------------------------


def clean_list(values: t.Iterable[t.Any], what: str) -> list[str]:
    """Trimmed, without empty entries and repetitions, order kept: the server does none of that."""
    result: list[str] = []
    for value in values:
        text = str(value).strip()
        if "," in text:
            raise Fault(f"{what}: {text!r} holds a comma, which One-API takes for a separator. Give one entry per list element")
        if text and text not in result:
            result.append(text)
    return result


def same_members(stored: t.Any, wanted: t.Iterable[str]) -> bool:
    """Whether a stored comma list has exactly these entries; a blank or a repetition in it is a difference."""
    return sorted(str(stored or "").split(",")) == sorted(wanted) if stored else not list(wanted)


def json_text(value: t.Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def parsed(text: t.Any) -> t.Any:
    """A stored JSON text as data; an empty one as {}, an unreadable one as itself."""
    if text in (None, ""):
        return {}
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return text


# ---- channels ----------------------------------------------------------------------------------------------------------


def normalise_channels(channels: t.Iterable[Row], version: tuple[int, int, int] | None) -> list[Row]:
    """Wanted channels as the API's fields (`models` stays a list), or a Fault. None means: leave it as it is."""
    result: list[Row] = []
    seen: set[str] = set()
    for item in channels:
        channel = _normalise_channel(item, version)
        if channel["name"] in seen:
            raise Fault(f"channel {channel['name']}: is listed twice. Names are unique here: join the models of both in one")
        seen.add(channel["name"])
        result.append(channel)
    return result


def _normalise_channel(item: Row, version: tuple[int, int, int] | None) -> Row:
    name = str(item.get("name") or "").strip()
    if not name:
        raise Fault("channels: an entry has no name. Give each a unique name")
    where = f"channel {name}"
    absent = item.get("state") == "absent"
    result: Row = {"name": name, "state": "absent" if absent else "present"}
    if absent:
        return result
    kind = item.get("type")
    result["type"] = 8 if kind is None else int(kind)
    if result["type"] < 1:
        raise Fault(f"{where}: type: {result['type']} is not a channel type. Use 8 for a local OpenAI-compatible server")
    if version and version < (0, 6, 11) and result["type"] > _LAST_TYPE_OF_0_6_10:
        raise Fault(f"{where}: type: {result['type']} is unknown to this One-API, which would treat it like 8. Use 8, or upgrade")
    result["key"] = _channel_key(item.get("key"), where)
    result["models"] = clean_list(item.get("models") or [], f"{where}: models")
    if not result["models"]:
        raise Fault(f"{where}: models: is empty, so nothing would be routed to it. List at least one model, or set state to absent")
    result["group"] = ",".join(clean_list(str(item.get("group") or "default").split(","), f"{where}: group")) or "default"
    if len(result["group"]) > _GROUP_LIMIT:
        raise Fault(f"{where}: group: is longer than {_GROUP_LIMIT} characters in all, which One-API cannot store. Use fewer or shorter groups")
    result["priority"] = int(item.get("priority") or 0)
    result["status"] = DISABLED if item.get("enabled") is False else ENABLED
    result["base_url"] = _base_url(item.get("base_url"), result["type"], where)
    mapping = item.get("model_mapping")
    result["model_mapping"] = None if mapping is None else _mapping(mapping, where)
    config = item.get("config")
    result["config"] = None if config is None else dict(config)
    result["system_prompt"] = item.get("system_prompt")
    if result["system_prompt"] and version and version < (0, 6, 9):
        raise Fault(f"{where}: system_prompt: is unknown to this One-API. Leave it out, or upgrade to v0.6.9 or newer")
    return result


def _channel_key(key: t.Any, where: str) -> str | None:
    if key is None:
        return None
    text = str(key).strip()
    if not text:
        return None
    if re.search(r"[\r\n]", text):
        raise Fault(f"{where}: key: has more than one line, of which One-API would make one channel each. Give one key per channel")
    return text


def _base_url(value: t.Any, kind: int, where: str) -> str | None:
    if value is None:
        if kind in _PATH_KEEPING_TYPES[1:]:
            raise Fault(f"{where}: base_url: is needed for type {kind}. Give the server's root, e.g. http://gpu-1:8000")
        return None
    text = str(value).strip().rstrip("/")
    if text and not re.match(r"https?://[^/\s]+", text):
        raise Fault(f"{where}: base_url: {text!r} is not an http:// or https:// URL. Give the server's root, e.g. http://gpu-1:8000")
    if not text and kind in _PATH_KEEPING_TYPES[1:]:
        raise Fault(f"{where}: base_url: is empty. Give the server's root, e.g. http://gpu-1:8000")
    if kind in _PATH_KEEPING_TYPES and text.endswith("/v1"):
        raise Fault(f"{where}: base_url: {text!r} ends in /v1, but One-API adds the client's whole path, /v1 included. Leave /v1 out")
    return text


def _mapping(value: t.Any, where: str) -> dict[str, str]:
    mapping = {str(name): str(target) for name, target in dict(value).items()}
    if len(json_text(mapping)) > _MAPPING_LIMIT:
        raise Fault(f"{where}: model_mapping: is longer than {_MAPPING_LIMIT} characters as JSON, which One-API cannot store. Shorten it")
    return mapping


def channel_body(channel: Row) -> Row:
    """The body that creates it."""
    body: Row = {
        "name": channel["name"],
        "type": channel["type"],
        "key": channel["key"],
        "models": ",".join(channel["models"]),
        "group": channel["group"],
        "priority": channel["priority"],
        "status": channel["status"],
        "base_url": channel["base_url"] or "",
    }
    if channel["model_mapping"]:
        body["model_mapping"] = json_text(channel["model_mapping"])
    if channel["config"]:
        body["config"] = json_text(channel["config"])
    if channel["system_prompt"]:
        body["system_prompt"] = channel["system_prompt"]
    return body


def channel_changes(row: Row, channel: Row) -> Row:
    """The fields of a PUT that make `row` what `channel` wants; what is not in it stays unchanged on the server.

    Empty strings and zeros are skipped by the server for all but base_url, model_mapping, priority and system_prompt.
    """
    changes: Row = {}
    if row.get("type") != channel["type"]:
        changes["type"] = channel["type"]
    if not same_members(row.get("models"), channel["models"]):
        changes["models"] = ",".join(channel["models"])
    if not same_members(row.get("group") or "default", channel["group"].split(",")):
        changes["group"] = channel["group"]
    if (row.get("priority") or 0) != channel["priority"]:
        changes["priority"] = channel["priority"]
    if row.get("status") != channel["status"]:
        changes["status"] = channel["status"]
    if channel["base_url"] is not None and (row.get("base_url") or "") != channel["base_url"]:
        changes["base_url"] = channel["base_url"]
    if channel["model_mapping"] is not None and parsed(row.get("model_mapping")) != channel["model_mapping"]:
        changes["model_mapping"] = json_text(channel["model_mapping"]) if channel["model_mapping"] else ""
    if channel["config"] is not None and parsed(row.get("config")) != channel["config"]:
        # "" would be skipped; "{}" says the same and is not.
        changes["config"] = json_text(channel["config"])
    if channel["system_prompt"] is not None and (row.get("system_prompt") or "") != channel["system_prompt"]:
        changes["system_prompt"] = channel["system_prompt"]
    return changes


def unused_prompts(channels: t.Iterable[Row], version: tuple[int, int, int] | None) -> list[str]:
    """Channels whose system prompt this One-API would leave out for some model: to v0.6.10 it rewrites only what it maps."""
    if version is None or version >= (0, 6, 11):
        return []
    result = []
    for channel in channels:
        mapping = channel.get("model_mapping") or {}
        if channel.get("system_prompt") and channel["type"] in _PATH_KEEPING_TYPES and any(mapping.get(model, model) == model for model in channel["models"]):
            result.append(channel["name"])
    return result


def all_models(rows: t.Iterable[Row]) -> set[str]:
    """Every model that a channel is for, switched off or not, spelt as the server has it."""
    return {model for row in rows for model in str(row.get("models") or "").split(",")}


def pairs(rows: t.Iterable[Row], wanted: t.Iterable[Row]) -> list[tuple[Row, Row]]:
    """Each wanted channel that exists, beside its row, which is the oldest of that name."""
    oldest = {str(row.get("name")): row for row in sorted(rows, key=lambda item: int(item["id"]), reverse=True)}
    return [(oldest[channel["name"]], channel) for channel in wanted if channel["state"] == "present" and channel["name"] in oldest]


def channel_shown(row: Row) -> Row:
    """A channel's row as it appears in a diff: no key, lists instead of comma texts."""
    shown: Row = {
        "type": row.get("type"),
        "status": row.get("status"),
        "base_url": row.get("base_url") or "",
        "models": sorted(part for part in str(row.get("models") or "").split(",") if part),
        "group": row.get("group") or "default",
        "priority": row.get("priority") or 0,
        "model_mapping": parsed(row.get("model_mapping")),
        "system_prompt": row.get("system_prompt") or "",
    }
    if parsed(row.get("config")):
        shown["config"] = MASK
    return shown


@dataclass
class ChannelPlan:
    """Steps in the order in which they are safe: a model that moves is served by its new channel before the old goes."""

    updates: list[tuple[Row, Row]] = field(default_factory=list)  # (row, changes); empty changes only rebuild the routes
    creates: list[Row] = field(default_factory=list)  # wanted channels
    deletes: list[Row] = field(default_factory=list)  # rows
    kept: dict[str, Row] = field(default_factory=dict)  # name -> row, of those that are wanted

    def __bool__(self) -> bool:
        return bool(self.updates or self.creates or self.deletes)

    def diff(self) -> dict[str, Row]:
        before: Row = {}
        after: Row = {}
        for row, changes in self.updates:
            name = row["name"]
            before[name] = channel_shown(row)
            after[name] = channel_shown({**row, **changes})
            if "key" in changes:
                before[name]["key"] = "not readable"
                after[name]["key"] = MASK
            elif not changes:
                before[name]["routes"] = "missing"
                after[name]["routes"] = "rebuilt"
        for channel in self.creates:
            after[channel["name"]] = {**channel_shown(channel_body(channel)), "key": MASK}
        for row in self.deletes:
            name = str(row.get("name"))
            before[f"{name} (id {row.get('id')})" if name in self.kept or name in before else name] = channel_shown(row)
        return {"before": before, "after": after}


def plan_channels(
    rows: t.Iterable[Row],
    wanted: t.Iterable[Row],
    *,
    purge: bool = False,
    purge_pattern: str = r".+@.+",
    rewrite: t.Collection[str] = (),
    routeless: t.Collection[str] = (),
) -> ChannelPlan:
    """`rewrite`: names to be written whole, key included. `routeless`: names whose routes are missing on the server.

    Of several rows of one name the oldest (lowest id) stays, whoever looks; the key in it may be another's, so it is
    written again.
    """
    plan = ChannelPlan()
    by_name: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda item: int(item["id"])):
        by_name.setdefault(str(row.get("name")), []).append(row)
    names: set[str] = set()
    for channel in wanted:
        name = channel["name"]
        names.add(name)
        found = by_name.get(name, [])
        if channel["state"] == "absent":
            plan.deletes.extend(found)
            continue
        if not found:
            plan.creates.append(channel)
            continue
        row = found[0]
        plan.kept[name] = row
        plan.deletes.extend(found[1:])
        changes = channel_changes(row, channel)
        if name in rewrite:
            body = channel_body(channel)
            changes = {**{key: value for key, value in body.items() if value not in (None, "")}, **changes}
            changes.pop("name")
        elif len(found) > 1 and channel["key"]:
            changes["key"] = channel["key"]
        if changes or name in rewrite or name in routeless:
            plan.updates.append((row, changes))
    if purge:
        owned = re.compile(purge_pattern)
        for name, found in by_name.items():
            if name not in names and owned.fullmatch(name):
                plan.deletes.extend(found)
    return plan


# ---- tokens ------------------------------------------------------------------------------------------------------------


def normalise_token(params: Row) -> Row:
    name = str(params.get("name") or "").strip()
    if not name:
        raise Fault("name: is empty. Give the token a name")
    if len(name.encode("utf-8")) > _TOKEN_NAME_LIMIT:
        raise Fault(f"name: {name!r} is longer than {_TOKEN_NAME_LIMIT} bytes in UTF-8, which One-API refuses. Use a shorter one")
    wanted: Row = {"name": name}
    models = params.get("models")
    wanted["models"] = None if models is None else sorted(clean_list(models, "models"))
    subnets = params.get("subnets")
    wanted["subnets"] = None if subnets is None else [_subnet(item) for item in clean_list(subnets, "subnets")]
    wanted["unlimited_quota"] = params.get("unlimited_quota") is not False
    wanted["remain_quota"] = params.get("remain_quota")
    if wanted["remain_quota"] is not None and wanted["remain_quota"] < 0:
        raise Fault(f"remain_quota: {wanted['remain_quota']} is negative. Give 0 or more, or unlimited_quota")
    expired = params.get("expired_time")
    wanted["expired_time"] = -1 if expired is None else int(expired)
    if wanted["expired_time"] != -1 and wanted["expired_time"] < 1:
        raise Fault(f"expired_time: {wanted['expired_time']} is no time. Give seconds since 1970, or -1 for never")
    wanted["enabled"] = params.get("enabled") is not False
    wanted["quota_policy"] = params.get("quota_policy") or "on_create"
    return wanted


def _subnet(text: str) -> str:
    if "/" not in text:
        raise Fault(f"subnets: {text!r} has no prefix length, which One-API asks for. Write e.g. {text}/32")
    try:
        # Python takes a netmask after the slash as well, the server does not.
        if not text.rpartition("/")[2].isdigit():
            raise ValueError("the prefix length is not a number")
        ipaddress.ip_network(text, strict=False)
    except ValueError as exc:
        raise Fault(f"subnets: {text!r} is not a network in CIDR notation ({exc}). Write e.g. 10.0.0.0/24") from exc
    return text


def token_body(wanted: Row) -> Row:
    """The body that creates it."""
    return {
        "name": wanted["name"],
        "expired_time": wanted["expired_time"],
        "remain_quota": wanted["remain_quota"] or 0,
        "unlimited_quota": wanted["unlimited_quota"],
        "models": ",".join(wanted["models"] or []),
        "subnet": ",".join(wanted["subnets"] or []),
    }


def token_changes(row: Row, wanted: Row) -> Row:
    """Fields that differ. The quota left is used up by requests, so it is no difference of itself."""
    changes: Row = {}
    if wanted["models"] is not None and not same_members(row.get("models"), wanted["models"]):
        changes["models"] = ",".join(wanted["models"])
    if wanted["subnets"] is not None and not same_members(row.get("subnet"), wanted["subnets"]):
        changes["subnet"] = ",".join(wanted["subnets"])
    if row.get("expired_time") != wanted["expired_time"]:
        changes["expired_time"] = wanted["expired_time"]
    if bool(row.get("unlimited_quota")) != wanted["unlimited_quota"]:
        changes["unlimited_quota"] = wanted["unlimited_quota"]
        if not wanted["unlimited_quota"] and wanted["remain_quota"] is not None:
            changes["remain_quota"] = wanted["remain_quota"]
        return changes
    fill_up = not wanted["unlimited_quota"] and wanted["quota_policy"] == "always"
    if fill_up and wanted["remain_quota"] not in (None, row.get("remain_quota")):
        changes["remain_quota"] = wanted["remain_quota"]
    return changes


def token_replacement(row: Row, changes: Row) -> Row:
    """The body of a PUT: it replaces all of these, so that what is not to change is repeated from the row."""
    kept = {name: row.get(name) for name in ("name", "expired_time", "remain_quota", "unlimited_quota", "models", "subnet")}
    return {"id": row["id"], **kept, **changes}


def token_status(row: Row, changes: Row, wanted: Row, now: float) -> int | None:
    """The status to set, or None. A token that the server marked as used up or expired stays so until that is mended."""
    status = row.get("status")
    if not wanted["enabled"]:
        return DISABLED if status == ENABLED else None
    if status == ENABLED:
        return None
    after = {**row, **changes}
    if status == EXPIRED and after.get("expired_time") != -1 and (after.get("expired_time") or 0) <= now:
        return None
    if status == EXHAUSTED and not after.get("unlimited_quota") and (after.get("remain_quota") or 0) <= 0:
        return None
    return ENABLED


def token_shown(row: Row) -> Row:
    return {
        "name": row.get("name"),
        "status": row.get("status"),
        "expired_time": row.get("expired_time"),
        "unlimited_quota": bool(row.get("unlimited_quota")),
        "remain_quota": row.get("remain_quota") or 0,
        "models": sorted(part for part in str(row.get("models") or "").split(",") if part),
        "subnets": [part for part in str(row.get("subnet") or "").split(",") if part],
    }


# ---- options -----------------------------------------------------------------------------------------------------------

RATIO_KEYS = ("ModelRatio", "GroupRatio", "CompletionRatio")
# Not in the server's list until they are set.
LATE_KEYS = (
    "LarkClientId",
    "LarkClientSecret",
    "OidcClientId",
    "OidcClientSecret",
    "OidcWellKnown",
    "OidcAuthorizationEndpoint",
    "OidcTokenEndpoint",
    "OidcUserinfoEndpoint",
)
_HIDDEN = ("Token", "Secret")
_SECRET = ("Token", "Secret", "SecretKey")


def option_hidden(key: str) -> bool:
    """Whether the server never shows the option."""
    return key.endswith(_HIDDEN)


def option_secret(key: str) -> bool:
    return key.endswith(_SECRET)


def option_wanted(key: str, value: t.Any) -> t.Any:
    """The wanted value, of the type in which it is compared: bool, dict, list or str."""
    if value is None:
        raise Fault(f"options: {key}: has no value. Give one, or leave the option out")
    if key in RATIO_KEYS:
        return _ratios(key, value)
    if key.endswith("Enabled"):
        # The server takes exactly "true" for true, and everything else, like "True", for false.
        if isinstance(value, bool):
            return value
        text = str(value).strip().lower()
        if text not in ("true", "false"):
            raise Fault(f"options: {key}: {value!r} is neither true nor false")
        return text == "true"
    if key == "EmailDomainWhitelist" and isinstance(value, list):
        return ",".join(clean_list(value, f"options: {key}"))
    if isinstance(value, (bool, dict, list)):
        return value
    return _number_text(value) if isinstance(value, float) else str(value)


def _ratios(key: str, value: t.Any) -> dict[str, t.Any]:
    # Invalid JSON would be stored before it is refused, so it must not be sent.
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as exc:
            raise Fault(f"options: {key}: is not valid JSON ({exc}). Give a mapping of names to numbers") from exc
    if not isinstance(value, dict):
        raise Fault(f"options: {key}: is not a mapping. Give a mapping of names to numbers")
    result: dict[str, t.Any] = {}
    for name, ratio in value.items():
        if isinstance(ratio, str):
            try:
                ratio = json.loads(ratio)
            except ValueError:
                pass
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not math.isfinite(ratio) or ratio < 0:
            raise Fault(f"options: {key}: {name}: {ratio!r} is not a number of 0 or more")
        result[str(name)] = ratio
    return result


def _number_text(value: float) -> str:
    text = format(Decimal(repr(value)), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def option_text(wanted: t.Any, stored: str | None) -> str:
    """The string to send. A mapping is merged over the stored one, since the server replaces the whole of it."""
    if isinstance(wanted, bool):
        return "true" if wanted else "false"
    if isinstance(wanted, dict):
        current = parsed(stored)
        return json_text({**current, **wanted} if isinstance(current, dict) else wanted)
    if isinstance(wanted, list):
        return json_text(wanted)
    return str(wanted)


def option_matches(wanted: t.Any, stored: str | None) -> bool:
    if stored is None:
        return False
    if isinstance(wanted, bool):
        return (stored == "true") == wanted
    if isinstance(wanted, dict):
        current = parsed(stored)
        return isinstance(current, dict) and all(name in current and current[name] == value for name, value in wanted.items())
    if isinstance(wanted, list):
        return bool(parsed(stored) == wanted)
    if wanted == stored:
        return True
    try:
        return Decimal(wanted) == Decimal(stored)
    except InvalidOperation:
        return False


def unknown_option(key: str, known: t.Collection[str]) -> str | None:
    """A remark where the server does not know the key: it would store a misspelt one all the same."""
    if key in known or key in LATE_KEYS or option_hidden(key):
        return None
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    lower = [name for name in known if name.lower() == key.lower()]
    hint = (lower or close or [""])[0]
    return f"options: {key}: One-API does not know this option" + (f". Did you mean {hint}?" if hint else "")


def option_order(item: tuple[str, t.Any]) -> tuple[int, str]:
    """Switches off first, values next, switches on last: some are refused until the values they need are there."""
    key, wanted = item
    if key.endswith("Enabled"):
        return (2 if wanted is True else 0, key)
    return (1, key)


# ---- users -------------------------------------------------------------------------------------------------------------


def check_user(name: str, password: str | None) -> None:
    if not 1 <= len(name) <= 12:
        raise Fault(f"name: {name!r} must have 1 to 12 characters")
    if password is None:
        return
    if not 8 <= len(password) <= 20:
        raise Fault(f"password: has {len(password)} characters; One-API takes 8 to 20. Choose another")
    if password == "$I_LOVE_U":
        raise Fault("password: this value means 'leave it unchanged' to One-API. Choose another")
