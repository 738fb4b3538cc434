# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: for the modules of this collection only; it may change in any release.
"""FastGPT's config.json as data: versions and eras, checks, canonical JSON, and a reader for JSON5."""

from __future__ import annotations

import ipaddress
import json
import math
import re
import typing as t
import unicodedata
from urllib.parse import urlsplit

JsonDict = dict[str, t.Any]

MASK = "********"
SECRET_KEYS = frozenset({"requestAuth", "chatApiKey", "key", "doc2xKey", "apiKey", "token"})
# FastGPT stores 1536 numbers per vector: shorter ones are padded, longer ones cut.
VECTOR_SIZE = 1536


# versions


class VersionError(ValueError):
    pass


_VERSION = re.compile(r"v?(\d{1,3})\.(\d{1,3})(?:\.(\d{1,3}))?(?:-[A-Za-z][A-Za-z0-9.-]*)?\Z")


def parse_version(text: str) -> tuple[int, int, int]:
    """v4.8.12-fix, 4.8.9, v4.7. A suffix names a repaired image of the same version."""
    found = _VERSION.match(text.strip())
    if not found:
        raise VersionError(f"version: {text!r}: must be FastGPT's image tag, such as v4.8.9 or v4.8.12-fix.")
    return int(found[1]), int(found[2]), int(found[3] or 0)


def era_of(version: tuple[int, int, int]) -> str:
    """'' before what is known, else A to E."""
    for era, first in (("E", (4, 17, 0)), ("D", (4, 15, 0)), ("C", (4, 8, 20)), ("B", (4, 8, 4)), ("A", (4, 6, 8))):
        if version >= first:
            return era
    return ""


def refusal(text: str) -> str:
    """Why models cannot be given to this version in config.json; empty if they can."""
    version = parse_version(text)
    era = era_of(version)
    if era == "":
        return f"version: {text}: FastGPT before v4.6.8 has another config.json (chatModels, qaModels, cqModels): use v4.6.8 to v4.8.19."
    if era == "C":
        return (
            f"version: {text}: from v4.8.20 on FastGPT ignores the models of config.json and keeps them in its database"
            " (system_models), set by its model API, PUT /api/core/ai/model/updateWithJson, as root: use v4.6.8 to"
            " v4.8.19 with this module, or a later release of this collection that has the model API."
        )
    if era in ("D", "E"):
        return (
            f"version: {text}: from v4.15 on FastGPT reads no config.json at all (environment variables and its model"
            " API take its place): use v4.6.8 to v4.8.19 with this module, or a later release of this collection."
        )
    return ""


# what an entry holds, in the order of the file


class Field(t.NamedTuple):
    kind: str  # str, int, number, bool, dict, list
    default: t.Any = None  # None: left out if not given
    required: bool = False


_PRICES: dict[str, Field] = {
    "inputPrice": Field("number", 0),
    "outputPrice": Field("number", 0),
    "charsPointsPrice": Field("number", 0),
}
_HEAD: dict[str, Field] = {
    "model": Field("str", required=True),
    "name": Field("str"),
    "provider": Field("str", "Other"),
    "avatar": Field("str"),
}
LLM_FIELDS: dict[str, Field] = {
    **_HEAD,
    "maxContext": Field("int", required=True),
    "maxResponse": Field("int", required=True),
    "quoteMaxToken": Field("int", required=True),
    "maxTemperature": Field("number", 1.2),
    **_PRICES,
    "censor": Field("bool", False),
    "vision": Field("bool", False),
    "datasetProcess": Field("bool", True),
    "usedInClassify": Field("bool", True),
    "usedInExtractFields": Field("bool", True),
    "usedInToolCall": Field("bool", True),
    "usedInQueryExtension": Field("bool", True),
    "toolChoice": Field("bool", False),
    "functionCall": Field("bool", False),
    "customCQPrompt": Field("str", ""),
    "customExtractPrompt": Field("str", ""),
    "defaultSystemChatPrompt": Field("str", ""),
    "defaultConfig": Field("dict", {}),
    "fieldMap": Field("dict"),
}
VECTOR_FIELDS: dict[str, Field] = {
    **_HEAD,
    **_PRICES,
    "defaultToken": Field("int", 500),
    "maxToken": Field("int", 1800),
    "weight": Field("int", 100),
    "hidden": Field("bool"),
    "defaultConfig": Field("dict"),
    "dbConfig": Field("dict"),
    "queryConfig": Field("dict"),
}
RERANK_FIELDS: dict[str, Field] = {
    **_HEAD,
    **_PRICES,
    "requestUrl": Field("str", required=True),
    "requestAuth": Field("str", ""),
}
SPEECH_FIELDS: dict[str, Field] = {
    **_HEAD,
    **_PRICES,
    "price": Field("number"),
    "voices": Field("list", []),
}
WHISPER_FIELDS: dict[str, Field] = {**_HEAD, **_PRICES, "price": Field("number")}
SYSTEM_FIELDS: dict[str, Field] = {
    "openapiPrefix": Field("str", "fastgpt"),
    "vectorMaxProcess": Field("int", 15),
    "qaMaxProcess": Field("int", 15),
    "pgHNSWEfSearch": Field("int", 100),
    "tokenWorkers": Field("int"),
}
WHISPER_DEFAULT = {"model": "whisper-1", "name": "Whisper1"}
# Read by nobody in these versions, of use to the checks only; they do not go into the file.
CHECK_ONLY = {"context": Field("int"), "dimensions": Field("int"), "tools": Field("bool"), "isDefault": Field("bool")}
# pgvector's hnsw.ef_search: with a larger one each search is an SQL error.
EF_SEARCH_MOST = 1000
# Needed for the user interface: where no model has the flag, its list of models is empty.
FLAGS_FROM = {
    "datasetProcess": (4, 6, 8),
    "usedInClassify": (4, 7, 0),
    "usedInExtractFields": (4, 7, 0),
    "usedInToolCall": (4, 7, 0),
    "usedInQueryExtension": (4, 7, 0),
}


class Built(t.NamedTuple):
    config: JsonDict
    faults: list[str]
    warnings: list[str]


def build(
    version: str,
    *,
    system_env: t.Mapping[str, t.Any] | None = None,
    llm_models: t.Sequence[t.Mapping[str, t.Any]] = (),
    vector_models: t.Sequence[t.Mapping[str, t.Any]] = (),
    rerank_models: t.Sequence[t.Mapping[str, t.Any]] = (),
    audio_speech_models: t.Sequence[t.Mapping[str, t.Any]] = (),
    whisper_model: t.Mapping[str, t.Any] | None = None,
    fe_configs: t.Mapping[str, t.Any] | None = None,
) -> Built:
    """The whole file for a version of eras A and B, with all that is wrong in it. Raises VersionError for a bad tag."""
    refused = refusal(version)
    if refused:
        return Built({}, [refused], [])
    builder = _Builder(parse_version(version))
    config: JsonDict = {}
    if fe_configs:
        config["feConfigs"] = builder.plain("fe_configs", dict(fe_configs))
        if builder.version < (4, 7, 1):
            builder.warnings.append(f"fe_configs: FastGPT {version} does not read feConfigs; they count from v4.7.1 on.")
    config["systemEnv"] = builder.system_env(system_env or {})
    builder.check_system(config["systemEnv"])
    config["llmModels"] = builder.entries("llm_models", llm_models, LLM_FIELDS)
    config["vectorModels"] = builder.entries("vector_models", vector_models, VECTOR_FIELDS)
    config["reRankModels"] = builder.entries("rerank_models", rerank_models, RERANK_FIELDS)
    config["audioSpeechModels"] = builder.entries("audio_speech_models", audio_speech_models, SPEECH_FIELDS)
    config["whisperModel"] = builder.entry("whisper_model", whisper_model or WHISPER_DEFAULT, WHISPER_FIELDS)
    builder.check_llm(config["llmModels"], llm_models)
    builder.check_vector(config["vectorModels"], vector_models)
    builder.check_rerank(config["reRankModels"])
    builder.check_names(config)
    return Built(config, builder.faults, builder.warnings)


class _Builder:
    def __init__(self, version: tuple[int, int, int]) -> None:
        self.version = version
        self.faults: list[str] = []
        self.warnings: list[str] = []

    # values

    def system_env(self, given: t.Mapping[str, t.Any]) -> JsonDict:
        given = dict(given)
        for key, variable in (("oneapiUrl", "OPENAI_BASE_URL"), ("chatApiKey", "CHAT_API_KEY")):
            if given.pop(key, None) is not None:
                self.faults.append(f"system_env.{key}: it silently overrides the container's environment: set {variable} there instead.")
        return self.entry("system_env", given, SYSTEM_FIELDS)

    def entries(self, option: str, items: t.Sequence[t.Mapping[str, t.Any]], fields: t.Mapping[str, Field]) -> list[JsonDict]:
        defaults = [i for i, item in enumerate(items) if _bool(item.get("isDefault")) is True]
        if len(defaults) > 1:
            names = ", ".join(str(items[i].get("model")) for i in defaults)
            self.faults.append(f"{option}: {names} have isDefault: one model of a kind can be the default.")
        # FastGPT takes the first of the list.
        order = defaults[:1] + [i for i in range(len(items)) if i not in defaults[:1]]
        return [self.entry(f"{option}[{i}]", items[i], fields) for i in order]

    def entry(self, label: str, given: t.Mapping[str, t.Any], fields: t.Mapping[str, Field]) -> JsonDict:
        label = f"{label} ({given['model']})" if isinstance(given.get("model"), str) and given["model"] else label
        result: JsonDict = {}
        for key, field in fields.items():
            value = given.get(key)
            if value is None:
                if field.required:
                    self.faults.append(f"{label}.{key}: is missing: {_KIND_NAMES[field.kind]} is needed.")
                elif key == "name" and isinstance(given.get("model"), str):
                    result[key] = given["model"]
                elif field.default is not None:
                    result[key] = _copy(field.default)
                continue
            result[key] = self.value(f"{label}.{key}", value, field.kind)
            if field.required and result[key] == "":
                self.faults.append(f"{label}.{key}: is empty: {_KIND_NAMES[field.kind]} is needed.")
        for key in sorted(set(given) - set(fields), key=str):
            if key in CHECK_ONLY:
                if given[key] is not None:
                    self.value(f"{label}.{key}", given[key], CHECK_ONLY[key].kind)
                continue
            if given[key] is None:
                continue
            self.warnings.append(f"{label}.{key}: FastGPT v4.6.8 to v4.8.19 knows no such field; it is written as it is.")
            result[str(key)] = self.plain(f"{label}.{key}", given[key])
        return result

    def value(self, label: str, value: t.Any, kind: str) -> t.Any:
        """Bring a value to its type; a number or a bool may come as text from a variable."""
        if kind in ("int", "number"):
            number = _number(value)
            if number is not None and (kind == "number" or number == int(number)):
                return int(number) if number == int(number) else number
        elif kind == "bool":
            truth = _bool(value)
            if truth is not None:
                return truth
        elif isinstance(value, _TYPES[kind]):
            return self.plain(label, value)
        shown = MASK if label.rpartition(".")[2] in SECRET_KEYS else repr(value)[:80]
        self.faults.append(f"{label}: {shown}: must be {_KIND_NAMES[kind]}.")
        return value

    def plain(self, label: str, value: t.Any) -> t.Any:
        """A copy that JSON can hold, keys of dictionaries in order."""
        if isinstance(value, dict):
            return {self.plain(f"{label}, a key", str(k)): self.plain(f"{label}.{k}", value[k]) for k in sorted(value, key=str)}
        if isinstance(value, (list, tuple)):
            return [self.plain(f"{label}[{i}]", v) for i, v in enumerate(value)]
        if isinstance(value, float) and not math.isfinite(value):
            self.faults.append(f"{label}: {value}: JSON has no such number.")
            return None
        if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
            self.faults.append(f"{label}: holds half of a character (a lone surrogate), which UTF-8 cannot hold: write the whole character.")
            return ""
        if value is None or isinstance(value, (str, bool, int, float)):
            return value
        self.faults.append(f"{label}: {value!r}: must be text, a number, a bool, a list or a dictionary.")
        return None

    # rules

    def check_system(self, system_env: JsonDict) -> None:
        for key, value in system_env.items():
            if key in SYSTEM_FIELDS and _is_int(value) and value < 1:
                self.faults.append(f"system_env.{key}: {value}: must be at least 1.")
        search = system_env.get("pgHNSWEfSearch")
        if _is_int(search) and search > EF_SEARCH_MOST:
            self.faults.append(f"system_env.pgHNSWEfSearch: {search}: pgvector refuses every search with more than {EF_SEARCH_MOST}.")

    def check_llm(self, models: list[JsonDict], given: t.Sequence[t.Mapping[str, t.Any]]) -> None:
        if not models:
            self.faults.append("llm_models: the list is empty: FastGPT cannot make a dataset without a chat model.")
            return
        known = {item.get("model"): item for item in given if isinstance(item.get("model"), str)}
        for index, model in enumerate(models):
            label = f"llm_models ({model.get('model', index)})"
            card = known.get(str(model.get("model")), {})
            context, response, quote = (model.get(k) for k in ("maxContext", "maxResponse", "quoteMaxToken"))
            if not (_is_int(context) and _is_int(response) and _is_int(quote)):
                continue
            for key in ("maxContext", "maxResponse", "quoteMaxToken"):
                if model[key] < 1:
                    self.faults.append(f"{label}.{key}: {model[key]}: must be at least 1 token.")
            if response >= context:
                self.faults.append(f"{label}.maxResponse: {response}: must be less than maxContext ({context}), else no question fits.")
            elif response + quote > context:
                self.faults.append(
                    f"{label}.quoteMaxToken: {quote}: with maxResponse ({response}) it is more than maxContext"
                    f" ({context}): use at most {context - response}, less what question and history take."
                )
            window = _number(card.get("context"))
            if window is not None and context > window:
                self.faults.append(
                    f"{label}.maxContext: {context}: the model's own context is {window:g} tokens: use at most that many, or correct the model's card."
                )
            temperature = model.get("maxTemperature")
            if isinstance(temperature, (int, float)) and not 0 < temperature <= 2:
                self.faults.append(f"{label}.maxTemperature: {temperature}: must be above 0 and at most 2.")
            tools = [k for k in ("toolChoice", "functionCall") if model.get(k) is True]
            if tools and _bool(card.get("tools")) is not True:
                self.warnings.append(f"{label}: {' and '.join(tools)}: right only if the model's server speaks tools; with false FastGPT asks by prompt.")
        for flag, since in FLAGS_FROM.items():
            if self.version >= since and not any(m.get(flag) is True for m in models):
                self.faults.append(f"llm_models: no model has {flag}: true: FastGPT offers none for this use then; set it on one.")

    def check_vector(self, models: list[JsonDict], given: t.Sequence[t.Mapping[str, t.Any]]) -> None:
        if not models:
            self.faults.append("vector_models: the list is empty: FastGPT cannot make a dataset without an embedding model.")
        for model in models:
            label = f"vector_models ({model.get('model')})"
            short, most, weight = (model.get(k) for k in ("defaultToken", "maxToken", "weight"))
            for key, value in (("defaultToken", short), ("maxToken", most)):
                if _is_int(value) and value < 1:
                    self.faults.append(f"{label}.{key}: {value}: must be at least 1 token.")
            if _is_int(weight) and weight < 0:
                self.faults.append(f"{label}.weight: {weight}: must not be negative.")
            if _is_int(short) and _is_int(most) and short > most:
                self.faults.append(f"{label}.defaultToken: {short}: must not be more than maxToken ({most}).")
        for item in given:
            chunk, window = (_number(item.get(k)) for k in ("defaultToken", "context"))
            if chunk is not None and window is not None and chunk > window:
                self.warnings.append(
                    f"vector_models ({item.get('model')}).defaultToken: {chunk:g}: the model reads {window:g} tokens of a text and leaves the rest out."
                )
            size = _number(item.get("dimensions"))
            if size is not None and not 1 <= size <= VECTOR_SIZE:
                self.faults.append(
                    f"vector_models ({item.get('model')}).dimensions: {size:g}: FastGPT stores {VECTOR_SIZE} numbers"
                    " and cuts the rest: use a model with at most that many."
                )

    def check_rerank(self, models: list[JsonDict]) -> None:
        for model in models:
            label = f"rerank_models ({model.get('model')})"
            url = model.get("requestUrl")
            if isinstance(url, str) and url:
                wrong = url_fault(url)
                if wrong:
                    self.faults.append(f"{label}.requestUrl: {url}: {wrong}.")
            auth = model.get("requestAuth")
            if isinstance(auth, str) and auth.lower().startswith("bearer "):
                self.faults.append(f"{label}.requestAuth: leave 'Bearer ' out: FastGPT adds it.")
        if len(models) > 1:
            self.warnings.append(
                f"rerank_models: FastGPT up to v4.8.19 uses the first only ({models[0].get('model')}); put several"
                " servers of one model behind one address instead."
            )

    def check_names(self, config: JsonDict) -> None:
        lists = {
            "llm_models": "llmModels",
            "vector_models": "vectorModels",
            "rerank_models": "reRankModels",
            "audio_speech_models": "audioSpeechModels",
        }
        everywhere: dict[str, str] = {}
        for option, key in lists.items():
            models = {m["model"]: i for i, m in enumerate(config[key]) if isinstance(m.get("model"), str)}
            for index, model in enumerate(config[key]):
                name = model.get("name")
                if isinstance(name, str) and models.get(name, index) != index and model.get("model") != name:
                    self.faults.append(f"{option}: name {name!r} of {model.get('model')} is another entry's model: FastGPT would take one for the other.")
            for value in models:
                if value != value.strip() or "," in value:
                    self.faults.append(f"{option}: model {value!r}: must be as the gateway has it, without a comma and without blanks around it.")
            for field in ("model", "name"):
                seen: set[str] = set()
                for model in config[key]:
                    value = model.get(field)
                    if not isinstance(value, str):
                        continue
                    if value in seen:
                        self.faults.append(f"{option}: {field} {value!r} stands there twice: it must be unique.")
                    seen.add(value)
                    if field == "model":
                        other = everywhere.setdefault(value, option)
                        if other != option:
                            self.warnings.append(f"{option}: {value} is in {other} too: from v4.8.20 on all models share one list of names.")


_TYPES: dict[str, type] = {"str": str, "dict": dict, "list": list}
_KIND_NAMES = {
    "str": "text",
    "int": "a whole number",
    "number": "a number",
    "bool": "true or false",
    "dict": "a dictionary",
    "list": "a list",
}


def _copy(value: t.Any) -> t.Any:
    return json.loads(json.dumps(value))


_WORDS_OF_BOOL = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _bool(value: t.Any) -> bool | None:
    if isinstance(value, bool):
        return value
    return _WORDS_OF_BOOL.get(value.lower()) if isinstance(value, str) else None


def _is_int(value: t.Any) -> t.TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: t.Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and not re.fullmatch(r"\s*[+-]?\d{1,15}(\.\d{1,15})?\s*", value):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def url_fault(url: str) -> str:
    """What is wrong with a URL that the FastGPT container calls; empty if nothing."""
    if re.search(r"[\s{}<>\"'\\]", url):
        return "must be a URL without spaces and placeholders"
    try:
        parts = urlsplit(url)
        host = parts.hostname
        port = parts.port
    except ValueError:
        return "is no URL"
    if parts.scheme not in ("http", "https") or not host:
        return "must be absolute, http://<host>:<port>/<path>: FastGPT takes a relative one as its own"
    if port == 0:
        return "has port 0"
    if parts.username or parts.password:
        return "must hold no user and password: the key belongs into requestAuth"
    host = host.rstrip(".")
    loopback = host == "localhost" or host.endswith(".localhost")
    try:
        address = ipaddress.ip_address(host)
        loopback = loopback or address.is_loopback or address.is_unspecified
    except ValueError:
        pass
    if loopback:
        return "is the FastGPT container itself there: use the address under which other hosts reach the server"
    if parts.path in ("", "/"):
        return "must be the whole endpoint, such as http://<host>:<port>/v1/rerank"
    return ""


# text


def canonical(config: t.Mapping[str, t.Any]) -> str:
    """Strict JSON, which every version reads; the order of keys is that of the tables above."""
    return json.dumps(config, ensure_ascii=False, indent=2, allow_nan=False) + "\n"


def same(left: t.Any, right: t.Any) -> bool:
    """Equal as JSON: the order of keys does not count, that of lists does, true is not 1."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, (int, float)) and isinstance(right, (int, float)):
        return left == right
    return type(left) is type(right) and bool(left == right)


class Existing(t.NamedTuple):
    """A file as found. `strict`: plain JSON that every version can read. `error`: why it is not readable at all."""

    value: t.Any
    strict: bool
    error: str


def read_existing(data: bytes) -> Existing:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as exc:
        return Existing(None, False, f"it is not UTF-8 ({exc.reason})")
    try:
        return Existing(json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant), True, "")
    except (ValueError, RecursionError):
        pass
    try:
        return Existing(read_json5(text), False, "")
    except Json5Error as exc:
        return Existing(None, False, str(exc))


def _unique(pairs: list[tuple[str, t.Any]]) -> JsonDict:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def _no_constant(name: str) -> t.Any:
    raise ValueError(name)


def masked(config: t.Any, other: t.Any = None) -> t.Any:
    """A copy for the diff. Secrets are hidden, but a secret that differs from `other`'s is told to differ."""
    if isinstance(config, dict):
        result: JsonDict = {}
        for key, value in config.items():
            twin = other.get(key) if isinstance(other, dict) else None
            if key in SECRET_KEYS and isinstance(value, str) and value:
                differs = isinstance(twin, str) and twin != value
                result[key] = f"{MASK} (differs)" if differs else MASK
            else:
                result[key] = masked(value, twin)
        return result
    if isinstance(config, list):
        twins: dict[t.Any, t.Any] = {}
        if isinstance(other, list):
            twins = {item.get("model"): item for item in other if isinstance(item, dict) and _hashable(item.get("model"))}
        return [masked(item, twins.get(item.get("model")) if isinstance(item, dict) and _hashable(item.get("model")) else None) for item in config]
    return config


def _hashable(value: t.Any) -> bool:
    return isinstance(value, str)


def secrets_in(value: t.Any) -> set[str]:
    """Values under the names that secrets have, wherever they stand."""
    if isinstance(value, dict):
        own = {v for k, v in value.items() if k in SECRET_KEYS and isinstance(v, str) and v}
        return own.union(*(secrets_in(v) for v in value.values()))
    if isinstance(value, list):
        return set().union(*(secrets_in(v) for v in value))
    return set()


def in_order(value: t.Any, like: t.Any) -> t.Any:
    """The keys of `value` in the order of `like`, so that a diff shows differences only."""
    if isinstance(value, dict):
        pattern = like if isinstance(like, dict) else {}
        keys = [k for k in pattern if k in value] + [k for k in value if k not in pattern]
        return {k: in_order(value[k], pattern.get(k)) for k in keys}
    if isinstance(value, list):
        patterns = like if isinstance(like, list) else []
        return [in_order(v, patterns[i] if i < len(patterns) else (patterns[0] if patterns else None)) for i, v in enumerate(value)]
    return value


# JSON5


class Json5Error(ValueError):
    pass


_NUMBER = re.compile(r"[+-]?(?:Infinity|NaN|0[xX][0-9a-fA-F]+|(?:(?:0|[1-9]\d*)(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)")
_BLANK = re.compile(r"(?:[\s\ufeff\u00a0]+|//[^\n\r\u2028\u2029]*|/\*.*?\*/)*", re.DOTALL)
_NAME = re.compile(r"(?:[^\W\d]|\$)(?:\w|[$\u200c\u200d])*")
_NAME_REST = re.compile(r"(?:\w|[$\u200c\u200d])*")
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "0": "\0"}
_DEEPEST = 200
_WORDS = {"true": True, "false": False, "null": None}


def read_json5(text: str) -> t.Any:
    """A small reader of JSON5: comments, trailing commas, single quotes, bare keys, all its numbers. Raises Json5Error."""
    return _Json5(text).document()


class _Json5:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.depth = 0

    def document(self) -> t.Any:
        value = self.value()
        self.blank()
        if self.at < len(self.text):
            raise self.error("there is more after the end")
        return value

    def error(self, what: str) -> Json5Error:
        line = self.text.count("\n", 0, self.at) + 1
        column = self.at - (self.text.rfind("\n", 0, self.at) + 1) + 1
        return Json5Error(f"line {line} column {column}: {what}")

    def blank(self) -> None:
        found = _BLANK.match(self.text, self.at)
        self.at = found.end() if found else self.at
        if self.text.startswith("/*", self.at):
            raise self.error("the comment does not end")

    def peek(self) -> str:
        self.blank()
        if self.at >= len(self.text):
            raise self.error("the text ends too early")
        return self.text[self.at]

    def value(self) -> t.Any:
        char = self.peek()
        if char in "{[":
            self.depth += 1
            if self.depth > _DEEPEST:
                raise self.error("too deep")
            result = self.object() if char == "{" else self.array()
            self.depth -= 1
            return result
        if char in "\"'":
            return self.string(char)
        found = _NUMBER.match(self.text, self.at)
        if found:
            self.at = found.end()
            if self.at < len(self.text) and (self.text[self.at].isalnum() or self.text[self.at] in "_$."):
                raise self.error("this is no number")
            return self.number(found[0])
        word = _NAME.match(self.text, self.at)
        if word and word[0] in _WORDS:
            self.at = word.end()
            return _WORDS[word[0]]
        raise self.error(f"unexpected {char!r}")

    @staticmethod
    def number(text: str) -> int | float:
        sign = -1 if text.startswith("-") else 1
        bare = text.lstrip("+-")
        if bare == "Infinity":
            return sign * math.inf
        if bare == "NaN":
            return math.nan
        if bare[:2] in ("0x", "0X"):
            return sign * int(bare, 16)
        if bare.isdigit():
            # Python refuses to convert very long ones; JavaScript has doubles only.
            return sign * (int(bare) if len(bare) < 400 else math.inf)
        return sign * float(bare)

    def object(self) -> JsonDict:
        result: JsonDict = {}
        self.at += 1
        while True:
            char = self.peek()
            if char == "}":
                self.at += 1
                return result
            key = self.string(char) if char in "\"'" else self.name()
            if self.peek() != ":":
                raise self.error("a colon is missing")
            self.at += 1
            result[key] = self.value()
            if self.peek() == ",":
                self.at += 1
            elif self.peek() != "}":
                raise self.error("a comma is missing")

    def array(self) -> list[t.Any]:
        result: list[t.Any] = []
        self.at += 1
        while True:
            if self.peek() == "]":
                self.at += 1
                return result
            result.append(self.value())
            if self.peek() == ",":
                self.at += 1
            elif self.peek() != "]":
                raise self.error("a comma is missing")

    def name(self) -> str:
        found = _NAME.match(self.text, self.at)
        if not found:
            raise self.error("a key is missing")
        start, self.at = self.at, found.end()
        # a letter may be written with a combining mark, which is no letter by itself
        while unicodedata.category(self.text[self.at : self.at + 1] or " ") in ("Mn", "Mc"):
            self.at = _NAME_REST.match(self.text, self.at + 1).end()  # type: ignore[union-attr]
        return self.text[start : self.at]

    def string(self, quote: str) -> str:
        parts: list[str] = []
        self.at += 1
        while True:
            if self.at >= len(self.text):
                raise self.error("the text in quotes does not end")
            char = self.text[self.at]
            if char == quote:
                self.at += 1
                # Surrogate halves written as two escapes are one character.
                return "".join(parts).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            if char in "\n\r":
                raise self.error("a line ends inside of quotes")
            if char == "\\":
                parts.append(self.escape())
                continue
            parts.append(char)
            self.at += 1

    def escape(self) -> str:
        self.at += 1
        char = self.text[self.at : self.at + 1]
        self.at += 1
        if char in ("x", "u"):
            size = 2 if char == "x" else 4
            digits = self.text[self.at : self.at + size]
            if not re.fullmatch(r"[0-9a-fA-F]{%d}" % size, digits):
                raise self.error(f"\\{char} needs {size} hexadecimal digits")
            self.at += size
            return chr(int(digits, 16))
        if char == "\r" and self.text.startswith("\n", self.at):
            self.at += 1
            return ""
        if char in ("\n", "\r", "\u2028", "\u2029"):
            return ""
        if char == "" or (char.isdigit() and (char != "0" or self.text[self.at : self.at + 1].isdigit())):
            raise self.error("this escape is not allowed")
        return _ESCAPES.get(char, char)
