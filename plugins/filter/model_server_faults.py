# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: model_server_faults
short_description: What is wrong with a list of model servers
version_added: 1.0.0
author:
  - selfhosted.fastgpt contributors (@selfhosted)
description:
  - Finds all faults of one host's C(model_servers) list at once, for any YAML value.
  - A width or a placement that no engine of the card serves is a fault whose remedy names the combinations that work.
  - So is code from a hub that runs on the host at a revision that moves. A commit or a tag, an archive with a checksum and a directory are pinned.
positional: cards, host
options:
  _input:
    description: The host's C(model_servers) list.
    type: raw
    required: true
  cards:
    description: Model cards, the catalogue followed by cards of your own.
    type: list
    elements: dict
    required: true
  host:
    description: Name that begins every sentence, usually the host's.
    type: str
    default: ''
  weights_source:
    description: Hub that weights come from where a server has no C(weights) of its own, C(modelscope), C(huggingface), or empty for a place of your own.
    type: str
    default: modelscope
  gpus:
    description:
      - GPUs of the host as M(selfhosted.fastgpt.gpu_facts) returns them. Given, a list without other faults is placed on them as
        P(selfhosted.fastgpt.gpu_placement#filter) does, and what prevents that is a fault.
    type: list
    elements: dict
  torch_index:
    description: Index that torch for GPUs comes from, as in P(selfhosted.fastgpt.gpu_placement#filter).
    type: str
    default: ''
  check_resources:
    description: Whether it is a fault that models do not fit on the GPUs.
    type: bool
    default: true
"""

EXAMPLES = r"""
- name: Refuse a list with faults
  ansible.builtin.assert:
    that: faults == []
    fail_msg: "{{ faults | join('\n') }}"
  vars:
    faults: "{{ model_servers | selfhosted.fastgpt.model_server_faults(model_cards_catalogue, inventory_hostname) }}"
"""

RETURN = r"""
_value:
  description: One sentence for each fault, in the form host, variable, value, rule, remedy.
  type: list
  elements: str
"""

import re
import typing as t
from collections.abc import Mapping

from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils._models import (
    DIMENSIONS_MAX,
    ENGINES,
    KINDS,
    PORT_MAX,
    PORT_MIN,
    WIDTHS,
    combinations_of,
    devices_of,
    door_ports,
    engines_for,
    engines_of,
    fault,
    index_cards,
    is_int,
    is_list,
    model_name_is_good,
    nearest,
    shown,
    widths_of,
)
from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils._placement import place

_KEYS = ("model", "port", "quantize_bit", "gpus", "engine", "weights")
# What each source of weights needs besides its name.
_SOURCES = {"modelscope": "id", "huggingface": "id", "url": "url", "path": "path"}
# Branches, which anybody who may write to the repository can move.
_MOVING = ("", "main", "master", "head", "dev", "latest")
_WEIGHT_KEYS = ("source", "id", "url", "path", "revision", "sha256")


class _Server:
    """Checks one item; collects into the list that it is given."""

    def __init__(self, index: int, item: Mapping[t.Any, t.Any], cards: Mapping[str, Mapping[str, t.Any]], host: str, source: str, found: list[str]) -> None:
        self.prefix = f"model_servers[{index}]"
        self.item = item
        self.cards = cards
        self.host = host
        self.source = source
        self.found = found
        self.card: Mapping[str, t.Any] | None = None
        self.width_is_good = self.gpus_are_good = self.engine_is_good = True

    def add(self, key: str, value: t.Any, rule: str, remedy: str) -> None:
        self.found.append(fault(f"{self.prefix}.{key}" if key else self.prefix, shown(value), rule, remedy, self.host))

    def check(self) -> None:
        for key in self.item:
            if key not in _KEYS:
                self.add(str(shown(key)).strip('"'), self.item[key], "is no key of a model server", f"Remove it; {nearest(key, _KEYS)}")
        self.check_model()
        self.check_port()
        self.check_quantize_bit()
        self.check_gpus()
        self.check_engine()
        self.check_weights()
        if self.card is not None:
            self.check_card(self.card)
            self.check_pinned(self.card)
            if self.width_is_good and self.gpus_are_good and self.engine_is_good:
                self.check_served(self.card)

    def check_model(self) -> None:
        model = self.item.get("model")
        if not isinstance(model, str) or not model:
            self.add("model", model, "must be the name of a model card", f"Name one; {nearest('', self.cards)}")
        elif model not in self.cards:
            self.add("model", model, "there is no such model card", f"Correct the name ({nearest(model, self.cards)}), or add a card to model_cards_extra")
        else:
            self.card = self.cards[model]
            if not model_name_is_good(model):
                self.add("model", model, "may only have letters, digits, dots, dashes and underscores", "Rename the card in model_cards_extra")

    def check_port(self) -> None:
        port = self.item.get("port")
        if not is_int(port) or not PORT_MIN <= port <= PORT_MAX:
            rule = f"must be a number from {PORT_MIN} to {PORT_MAX}, since the engine takes the port 10000 above it and an adapter the one 20000 above"
            self.add("port", port, rule, "Choose another, e.g. 8001")

    def check_quantize_bit(self) -> None:
        width = self.item.get("quantize_bit", 16)
        if not is_int(width) or width not in WIDTHS:
            self.width_is_good = False
            self.add("quantize_bit", width, "must be the number 16, 8 or 4", "Leave it out for 16")

    def check_gpus(self) -> None:
        gpus = self.item.get("gpus", "auto")
        if gpus == "auto":
            return
        if not is_list(gpus) or not all(is_int(index) and index >= 0 for index in gpus) or len(set(gpus)) != len(gpus):
            self.gpus_are_good = False
            self.add("gpus", gpus, "must be auto, a list of different GPU numbers such as [0, 1], or [] for the CPU", "Leave it out for auto")

    def check_engine(self) -> None:
        engine = self.item.get("engine")
        if engine is None:
            return
        names = [str(candidate["name"]) for candidate in engines_of(self.card)] if self.card is not None else []
        if not isinstance(engine, str):
            self.engine_is_good = False
            self.add("engine", engine, "must be the name of an engine", "Leave it out for the card's own")
        elif self.card is not None and engine not in names:
            self.engine_is_good = False
            self.add("engine", engine, f"the card {self.card['name']} has no such engine", f"Leave it out, or choose from: {', '.join(dict.fromkeys(names))}")

    def check_weights(self) -> None:
        weights = self.item.get("weights")
        if weights is None:
            return
        if not isinstance(weights, Mapping):
            self.add("weights", weights, "must be a dictionary with a source", "Leave it out for the card's own weights")
            return
        for key in weights:
            if key not in _WEIGHT_KEYS:
                self.add(f"weights.{str(shown(key)).strip(chr(34))}", weights[key], "is no key of weights", f"Remove it; {nearest(key, _WEIGHT_KEYS)}")
        source = weights.get("source")
        if not isinstance(source, str) or source not in _SOURCES:
            self.add("weights.source", source, f"must be one of {', '.join(_SOURCES)}", "Say where the weights come from")
            return
        needed = _SOURCES[source]
        value = weights.get(needed)
        if not isinstance(value, str) or not value:
            self.add(f"weights.{needed}", value, f"source {source} needs it as text", "Add it")
        elif needed == "path" and not value.startswith("/"):
            self.add("weights.path", value, "must be an absolute path on the host", "Write it from the root, e.g. /srv/models/m3e-large")
        elif needed == "url" and not re.fullmatch(r"https?://[^\s/]+\S*", value):
            self.add("weights.url", value, "must be an http:// or https:// URL", "Correct it")
        elif needed == "id" and not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", value, re.ASCII):
            self.add("weights.id", value, "must have the form owner/name", "Copy it from the address of the model's page")
        for key, pattern, rule in (
            ("revision", r"[\w./-]{1,128}", "must be a branch, tag or commit as text"),
            ("sha256", r"[0-9a-fA-F]{64}", "must be 64 hexadecimal digits as text"),
        ):
            extra = weights.get(key)
            if extra is not None and (not isinstance(extra, str) or not re.fullmatch(pattern, extra, re.ASCII)):
                self.add(f"weights.{key}", extra, rule, "Quote it, or leave it out")

    def check_card(self, card: Mapping[str, t.Any]) -> None:
        """A card of the user's own may be wrong in itself."""
        remedy = f"Correct the card {card['name']} in model_cards_extra"
        kind = card.get("kind")
        if kind not in KINDS:
            self.add("model", card["name"], f"its card has the kind {shown(kind)}, not one of {', '.join(KINDS)}", remedy)
        elif kind == "embedding":
            size = card.get("dimensions")
            if not is_int(size) or size < 1:
                self.add("model", card["name"], f"its card has the dimensions {shown(size)}, not a positive number", remedy)
            elif size > DIMENSIONS_MAX:
                rule = f"its vectors have {size} dimensions, of which FastGPT would silently keep {DIMENSIONS_MAX}"
                self.add("model", card["name"], rule, f"Choose an embedding model with at most {DIMENSIONS_MAX}")
        if not is_int(card.get("context")) or card["context"] < 1:
            self.add("model", card["name"], f"its card has the context {shown(card.get('context'))}, not a positive number of tokens", remedy)
        if not engines_of(card):
            self.add("model", card["name"], "its card has no engines, each with name and device (cpu or gpu)", remedy)
        for engine in engines_of(card):
            unfit = self.engine_fault(card, engine)
            if unfit:
                self.add("model", card["name"], unfit, remedy)

    def engine_fault(self, card: Mapping[str, t.Any], engine: Mapping[str, t.Any]) -> str:
        name = engine["name"]
        if name not in ENGINES:
            return f"its card has the engine {shown(name)}, not one of {', '.join(ENGINES)}"
        can = ENGINES[name]
        if card.get("kind") in KINDS and card["kind"] not in can["kinds"]:
            return f"its card has the engine {name}, which serves {' and '.join(can['kinds'])} only"
        if engine["device"] not in can["devices"]:
            return f"its card has {name} on {engine['device']}, and it runs on {' and '.join(can['devices'])} only"
        widths = widths_of(engine)
        if not widths or set(widths) - set(can["widths"]):
            return f"its card has {name} with the quantize_bits {shown(engine.get('quantize_bits'))}, of which it can do {', '.join(map(str, can['widths']))}"
        if name == "vllm":
            if not isinstance(engine.get("image"), str) or not engine["image"]:
                return "its card has vllm without an image, the tag of the version that serves this model"
            ways = engine.get("quantization")
            for width in widths:
                if width != 16 and not (isinstance(ways, Mapping) and isinstance(ways.get(width, ways.get(str(width))), str)):
                    return f"its card has vllm with {width} bit and no quantization that says how, so that the width would be ignored"
        return ""

    def check_pinned(self, card: Mapping[str, t.Any]) -> None:
        """Code of the repository runs on the host, so it must not change without somebody's decision."""
        if card.get("trust_remote_code") is not True:
            return
        weights = {} if self.item.get("weights") is None else self.item["weights"]
        if not isinstance(weights, Mapping):
            return
        source = weights.get("source", self.source)
        if source == "url" and not weights.get("sha256"):
            remedy = "Add its sha256"
            self.add("weights.sha256", weights.get("sha256"), f"{card['name']} runs code of its archive, so the archive must be pinned", remedy)
        if source not in ("modelscope", "huggingface"):
            return
        own = card.get("weights")
        known = own.get(source) if isinstance(own, Mapping) else None
        # the card's revision is one of the card's repository
        same = not weights.get("id") or (isinstance(known, Mapping) and weights["id"] == known.get("id"))
        revision = weights.get("revision", known.get("revision") if isinstance(known, Mapping) and same else None)
        if revision is None or str(revision).casefold() in _MOVING:
            rule = f"{card['name']} runs code of its repository on {source}, and this revision moves"
            self.add("weights.revision", revision, rule, "Name the commit (or a tag) that you have looked at, or give a path or an archive with its sha256")

    def check_served(self, card: Mapping[str, t.Any]) -> None:
        width, gpus, engine = self.item.get("quantize_bit", 16), self.item.get("gpus", "auto"), self.item.get("engine")
        if not engines_of(card) or engines_for(card, width, gpus, engine):
            return
        working = "; ".join(combinations_of(card))
        remedy = f"What works: {working}" if working else f"Correct the card {card['name']} in model_cards_extra"
        here = [item for item in engines_of(card) if item["device"] in devices_of(gpus) and engine in (None, item["name"])]
        if here and all(width not in widths_of(item) for item in here):
            self.add("quantize_bit", width, f"no engine serves {card['name']} in this width there", remedy)
        elif engine is not None:
            self.add("engine", engine, f"does not serve {card['name']} on this placement", remedy)
        else:
            self.add("gpus", gpus, f"no engine serves {card['name']} on this placement", remedy)


def _clashes(servers: list[tuple[int, Mapping[t.Any, t.Any]]], cards: Mapping[str, Mapping[str, t.Any]], host: str) -> list[str]:
    found: list[str] = []
    owners: dict[int, tuple[int, str]] = {}
    models: dict[str, int] = {}
    for index, item in servers:
        model, port = item.get("model"), item.get("port")
        if isinstance(model, str) and model:
            if model in models:
                rule = f"is on this host already, in model_servers[{models[model]}]"
                found.append(fault(f"model_servers[{index}].model", shown(model), rule, "Remove one; a second host takes a second server of a model", host))
            else:
                models[model] = index
        if not is_int(port) or not PORT_MIN <= port <= PORT_MAX:
            continue
        card = cards.get(model) if isinstance(model, str) else None
        for number, part in door_ports(port, card.get("kind") if card else None).items():
            if number in owners and owners[number][0] != index:
                other, other_part = owners[number]
                rule = f"its {part} takes port {number}, which is the {other_part}'s of model_servers[{other}]"
                found.append(fault(f"model_servers[{index}].port", shown(port), rule, "Choose another port", host))
                break
            owners.setdefault(number, (index, part))
    return found


def model_server_faults(
    servers: t.Any,
    cards: t.Any,
    host: t.Any = "",
    weights_source: t.Any = "modelscope",
    gpus: t.Any = None,
    torch_index: t.Any = "",
    check_resources: t.Any = True,
) -> list[str]:
    where = str(host or "")
    if servers is None:
        return []
    if not is_list(servers):
        return [fault("model_servers", shown(servers), "must be a list", "Begin every model server with a dash", where)]
    known = index_cards(cards)
    found: list[str] = []
    good: list[tuple[int, Mapping[t.Any, t.Any]]] = []
    for index, item in enumerate(servers):
        if isinstance(item, Mapping):
            good.append((index, item))
            _Server(index, item, known, where, str(weights_source or ""), found).check()
        else:
            remedy = "Write it as - {model: M3E-large, port: 8002}"
            found.append(fault(f"model_servers[{index}]", shown(item), "must be a dictionary with model and port", remedy, where))
    found += _clashes(good, known, where)
    if gpus is None or found:
        return found
    dummy, misplaced = place(servers, cards, gpus, torch_index, bool(check_resources))
    return [f"{where}: {line}" if where else line for line in misplaced]


class FilterModule:
    """Filter of the same name."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"model_server_faults": model_server_faults}
