# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: for the filters of this collection only; it may change in any release.
"""Which GPUs each model server of one host gets. Everything here is a pure function of the servers, the cards and the GPUs."""

from __future__ import annotations

import math
import re
import typing as t
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils._models import (
    combinations_of,
    devices_of,
    engines_for,
    fault,
    index_cards,
    is_int,
    is_list,
    shown,
)

# The driver keeps a part of a GPU's memory for itself, and what allocators lose to fragments must lie somewhere.
USABLE = 0.92
# Less than this of other programs is part of what is not usable anyway. More is rounded up to whole GB: a server is started again when its share
# changes, and should not be for a few MB.
FOREIGN_GB = 1.0
# What an engine takes besides weights and cache (CUDA context, kernels' workspace), where its entry does not say.
RESERVE_GB = 1.5
# Steps of the search before it gives up, far more than a host with eight GPUs needs.
STEPS = 2000
# What torch's builds ask of a host, by the last part of the index that they come from: (compute capability from, to, driver).
# Sources: PyTorch's release matrix, NVIDIA's table of minor-version compatibility.
TORCH_BUILDS: dict[str, tuple[float, float, str]] = {
    "cu118": (3.7, 9.0, "450.80"),
    "cu126": (5.0, 9.0, "525.60"),
    "cu128": (7.0, 12.9, "525.60"),
    "cu130": (7.5, 12.9, "580"),
    "cu132": (7.5, 12.9, "580"),
}
TORCH_DEFAULT = "cu130"


def number(value: t.Any) -> float:
    """A card's figure; what is none counts as nothing."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return 0.0
    return float(value) if math.isfinite(value) and value > 0 else 0.0


def _by_width(card: Mapping[str, t.Any], width: t.Any, key: str) -> float:
    memory = card.get("memory")
    sizes = (memory.get(width) or memory.get(str(width))) if isinstance(memory, Mapping) else None
    return number(sizes.get(key)) if isinstance(sizes, Mapping) else 0.0


def _kept(card: Mapping[str, t.Any]) -> float:
    return min(number(card.get("parameters_unquantized_billion")), number(card.get("parameters_billion")))


def weights_gb(card: Mapping[str, t.Any], width: int) -> float:
    """Embeddings and the output layer stay in 16 bit, whatever the width of the rest."""
    whole = number(card.get("parameters_billion"))
    kept = whole if width == 16 else _kept(card)
    return kept * 2 + (whole - kept) * width / 8


def cache_gb(card: Mapping[str, t.Any]) -> float:
    """The KV cache of one request as long as the card's context."""
    return number(card.get("kv_bytes_per_token")) * number(card.get("context")) / 1e9 if card.get("kind") == "chat" else 0.0


def ram_gb(card: Mapping[str, t.Any], width: int, engine: Mapping[str, t.Any]) -> float:
    """Memory of the host: the table's figure is the floor."""
    floor = _by_width(card, width, "ram_gb")
    if engine.get("device") == "gpu":
        return floor
    # legacy_chat computes in 32 bit on a CPU, and so does all that is not quantized
    double = 2 if engine.get("name") == "legacy_chat" else 1
    quantized = 0.0 if width == 16 else weights_gb(card, width) - 2 * _kept(card)
    return max(floor, (weights_gb(card, width) - quantized + cache_gb(card)) * double + quantized + 1.0)


def engine_needs(engine: Mapping[str, t.Any], torch_index: str = "") -> tuple[float, float, str]:
    """Lowest and highest compute capability, lowest driver: as the engine's entry says, else as torch's build for it does."""
    build = re.search(r"/(cu\d+)/?$", torch_index)
    least, most, driver = TORCH_BUILDS.get(build[1] if build else TORCH_DEFAULT, TORCH_BUILDS[TORCH_DEFAULT])
    if engine.get("name") == "vllm":
        least, most, driver = 0.0, 99.0, ""
    return (
        number(engine.get("compute_capability_min")) or least,
        number(engine.get("compute_capability_max")) or most,
        str(engine.get("driver_min") or driver),
    )


def _version(text: t.Any) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", str(text))[:3])


@dataclass(frozen=True)
class Gpu:
    index: int
    name: str
    total_gb: float
    capability: float
    driver: str
    unusable: str
    foreign_gb: float = 0.0

    @property
    def usable_gb(self) -> float:
        return max(self.total_gb * USABLE - self.foreign_gb, 0.0)

    @property
    def words(self) -> str:
        return f"GPU {self.index} ({self.name})"


def read_gpus(gpus: t.Any) -> list[Gpu]:
    """The GPUs as the module gpu_facts returns them, in the order of their index."""
    found: dict[int, Gpu] = {}
    for item in gpus if is_list(gpus) else []:
        if not isinstance(item, Mapping) or not is_int(item.get("index")):
            continue
        total = number(item.get("memory_mb")) * 1.048576 / 1000
        unusable = ""
        if not total:
            unusable = str(item.get("problem") or "its driver does not say how much memory it has. Repair the NVIDIA driver.")
        elif item.get("mig") is True:
            unusable = "MIG is on, and models are placed on whole GPUs. Turn it off with nvidia-smi -mig 0."
        capability = number(item.get("compute_capability"))
        try:
            capability = capability or float(str(item.get("compute_capability")))
        except ValueError:
            pass
        foreign = number(item.get("memory_foreign_mb")) * 1.048576 / 1000
        found[item["index"]] = Gpu(
            item["index"],
            str(item.get("name") or "NVIDIA GPU"),
            total,
            capability,
            str(item.get("driver_version") or ""),
            unusable,
            float(math.ceil(foreign)) if foreign >= FOREIGN_GB else 0.0,
        )
    return [found[index] for index in sorted(found)]


@dataclass(frozen=True)
class Choice:
    """One way to serve one model: an engine on some GPUs, and what it takes of each."""

    engine: Mapping[str, t.Any]
    gpus: tuple[int, ...]
    need: float
    floor: float

    @property
    def most(self) -> float:
        return max(self.need, self.floor)


@dataclass
class Server:
    position: int
    item: Mapping[str, t.Any]
    card: Mapping[str, t.Any]
    engines: list[Mapping[str, t.Any]] = field(default_factory=list)
    cpu: Mapping[str, t.Any] | None = None
    reason: str = ""

    @property
    def width(self) -> int:
        return int(self.item.get("quantize_bit", 16))

    @property
    def explicit(self) -> tuple[int, ...] | None:
        gpus = self.item.get("gpus", "auto")
        return tuple(gpus) if is_list(gpus) else None

    @property
    def words(self) -> str:
        return f"{self.card['name']} in {self.width} bit"

    def choice(self, engine: Mapping[str, t.Any], gpus: Sequence[int]) -> Choice:
        parts = max(len(gpus), 1)
        reserve = number(engine.get("reserve_gb")) or RESERVE_GB
        need = (weights_gb(self.card, self.width) + cache_gb(self.card)) / parts + reserve
        return Choice(engine, tuple(gpus), need, _by_width(self.card, self.width, "vram_gb") / parts)


class Host:
    """The GPUs of one host, and what is on them."""

    def __init__(self, gpus: Sequence[Gpu], torch_index: str) -> None:
        self.gpus = {gpu.index: gpu for gpu in gpus}
        self.torch_index = torch_index
        self.taken: dict[int, list[Choice]] = {gpu.index: [] for gpu in gpus}

    def free(self, index: int) -> float:
        return self.gpus[index].usable_gb - sum(choice.need for choice in self.taken[index])

    def room(self, choice: Choice) -> bool:
        """The tables of the cards speak of whole GPUs, the sums of what is really taken, so each has its own limit."""
        return all(
            self.free(index) >= choice.need
            and self.gpus[index].total_gb - self.gpus[index].foreign_gb >= sum(other.most for other in self.taken[index]) + choice.most
            for index in choice.gpus
        )

    def put(self, choice: Choice) -> None:
        for index in choice.gpus:
            self.taken[index].append(choice)

    def take(self, choice: Choice) -> None:
        for index in choice.gpus:
            self.taken[index].pop()

    def unfit(self, gpu: Gpu, engine: Mapping[str, t.Any]) -> str:
        """Why an engine cannot use a GPU, however much memory it has."""
        least, most, driver = engine_needs(engine, self.torch_index)
        name = " ".join(str(part) for part in (engine["name"], engine.get("image", "")) if part)
        if gpu.unusable:
            return f"{gpu.words}: {gpu.unusable.rstrip('.')}"
        if gpu.capability and not least <= gpu.capability <= most:
            limit = f"{least} or more" if gpu.capability < least else f"at most {most} in this build"
            return f"{gpu.words}: has the compute capability {gpu.capability}, {name} needs {limit}"
        if driver and gpu.driver and _version(gpu.driver) < _version(driver):
            return f"{gpu.words}: has the driver {gpu.driver}, {name} needs {driver} or newer"
        return ""

    def choices(self, server: Server) -> t.Iterator[Choice]:
        """Engines in the card's order, as few GPUs as will do, the fullest that still have room first."""
        for engine in server.engines:
            fit = [gpu for gpu in self.gpus.values() if not self.unfit(gpu, engine)]
            if server.explicit is not None:
                choice = server.choice(engine, server.explicit)
                if len(server.explicit) in counts(engine) and set(server.explicit) <= {gpu.index for gpu in fit} and self.room(choice):
                    yield choice
                continue
            for count in counts(engine):
                for name in dict.fromkeys(gpu.name for gpu in fit) if count > 1 else [""]:
                    alike = [gpu.index for gpu in fit if name in ("", gpu.name)]
                    # its share of a spread model is the same on every GPU
                    having = [index for index in alike if self.room(server.choice(engine, [index] * count))]
                    having.sort(key=lambda index: (self.free(index), index))
                    if count == 1:
                        yield from (server.choice(engine, [index]) for index in having)
                    elif len(having) >= count:
                        yield server.choice(engine, sorted(having[:count]))


def counts(engine: Mapping[str, t.Any]) -> list[int]:
    """On how many GPUs an engine can spread one model."""
    most = engine.get("gpus_max")
    most = most if is_int(most) and most > 0 else 1
    # tensor parallelism halves the heads again and again
    return [count for count in range(1, min(most, 64) + 1) if engine["name"] != "vllm" or count & (count - 1) == 0]


def _search(host: Host, servers: Sequence[Server], steps: list[int]) -> dict[int, Choice] | None:
    """The first fit, where a server that came later in the list moves before an earlier one does."""
    if not servers:
        return {}
    steps[0] -= 1
    if steps[0] < 0:
        return None
    for choice in list(host.choices(servers[0])):
        host.put(choice)
        rest = _search(host, servers[1:], steps)
        if rest is not None:
            return {servers[0].position: choice, **rest}
        host.take(choice)
    return None


def _fit(gpus: Sequence[Gpu], torch_index: str, servers: Sequence[Server]) -> dict[int, Choice] | None:
    pinned = [server for server in servers if server.explicit is not None]
    free = [server for server in servers if server.explicit is None]
    largest = sorted(free, key=lambda server: -max((server.choice(engine, [0]).most for engine in server.engines), default=0.0))
    for order in (free, largest):
        found = _search(Host(gpus, torch_index), pinned + order, [STEPS])
        if found is not None:
            return found
    return None


def _squeeze(gpus: Sequence[Gpu], torch_index: str, servers: Sequence[Server]) -> dict[int, Choice]:
    """Without a look at memory, since the user said so: the emptiest GPU for each."""
    host = Host(gpus, torch_index)
    found: dict[int, Choice] = {}
    for server in servers:
        engine = next(engine for engine in server.engines if any(not host.unfit(gpu, engine) for gpu in gpus))
        fit = [gpu.index for gpu in gpus if not host.unfit(gpu, engine)]
        choice = server.choice(engine, server.explicit or [max(fit, key=lambda index: (host.free(index), -index))])
        host.put(choice)
        found[server.position] = choice
    return found


def _budgets(gpus: Sequence[Gpu], placed: Mapping[int, Choice], elastic: set[int]) -> dict[int, float]:
    """What each server may take of each of its GPUs. Chat engines share what is left, for their caches."""
    budgets: dict[int, float] = {}
    for gpu in gpus:
        here = {position: choice for position, choice in placed.items() if gpu.index in choice.gpus}
        base = {position: choice.most for position, choice in here.items()}
        if sum(base.values()) > gpu.usable_gb:
            base = {position: choice.need for position, choice in here.items()}
        if sum(base.values()) > gpu.usable_gb:
            base = {position: need * gpu.usable_gb / sum(base.values()) for position, need in base.items()}
        left = max(gpu.usable_gb - sum(base.values()), 0.0)
        hungry = sum(need for position, need in base.items() if position in elastic)
        for position, need in base.items():
            share = need + left * need / hungry if position in elastic and hungry else need
            budgets[position] = min(budgets.get(position, share), share)
    return budgets


def _down(value: float, digits: int) -> float:
    return math.floor(value * 10**digits) / 10**digits


def _up(value: float) -> float:
    return math.ceil(value * 10 - 1e-6) / 10


def _shortage(gpus: Sequence[Gpu], torch_index: str, servers: Sequence[Server]) -> str:
    """One line with all the numbers of a host whose models do not fit."""
    needs = []
    for server in servers:
        where = f"on {', '.join(map(str, server.explicit))}" if server.explicit else "auto"
        each = " or ".join(
            dict.fromkeys(
                f"{_up(server.choice(engine, server.explicit or [0]).most)} GB{' each' if len(server.explicit or ()) > 1 else ''} with {engine['name']}"
                for engine in server.engines
            )
        )
        needs.append(f"{server.words} ({where}): {each}")
    host = Host(gpus, torch_index)
    for choice in _squeezed_until_full(gpus, torch_index, servers):
        host.put(choice)
    rest = [
        f"{gpu.words} {round(gpu.total_gb, 1)} GB{f', {gpu.foreign_gb:g} GB of it used by other programs' if gpu.foreign_gb else ''}, "
        f"{max(round(host.free(gpu.index), 1), 0.0)} GB free then"
        for gpu in gpus
        if not gpu.unusable
    ]
    return f"needs: {'; '.join(needs)}. GPUs: {'; '.join(rest)}"


def _squeezed_until_full(gpus: Sequence[Gpu], torch_index: str, servers: Sequence[Server]) -> list[Choice]:
    """What does fit, server by server, so that the refusal can say how much is left then."""
    host = Host(gpus, torch_index)
    found = []
    for server in servers:
        choice = next(host.choices(server), None)
        if choice is not None:
            host.put(choice)
            found.append(choice)
    return found


class _Placing:
    def __init__(self, servers: t.Any, cards: t.Any, gpus: t.Any, torch_index: str, check_resources: bool) -> None:
        self.gpus = read_gpus(gpus)
        self.usable = [gpu for gpu in self.gpus if not gpu.unusable]
        self.torch_index = torch_index
        self.check_resources = check_resources
        self.faults: list[str] = []
        self.servers: list[Server] = []
        known = index_cards(cards)
        for position, item in enumerate(servers if is_list(servers) else []):
            model = item.get("model") if isinstance(item, Mapping) else None
            card = known.get(model) if isinstance(model, str) else None
            if card is not None and is_int(item.get("port")) and is_int(item.get("quantize_bit", 16)):
                self.servers.append(Server(position, item, card))

    def add(self, server: Server, key: str, rule: str, remedy: str) -> None:
        self.faults.append(fault(f"model_servers[{server.position}].{key}", shown(server.item.get(key, "auto" if key == "gpus" else None)), rule, remedy))

    def sort_out(self, server: Server) -> None:
        """Engines that some GPU can run, and the CPU engine to fall back on."""
        item = server.item
        wanted = item.get("gpus", "auto")
        possible = engines_for(server.card, server.width, wanted, item.get("engine"))
        server.cpu = next((engine for engine in possible if engine["device"] == "cpu"), None)
        on_gpus = [engine for engine in possible if engine["device"] == "gpu"]
        works = "What works: " + ("; ".join(combinations_of(server.card)) or "another model")
        if not possible:
            self.add(server, "gpus", f"no engine serves {server.words} there", works)
            return
        if "gpu" not in devices_of(wanted) or not on_gpus:
            return
        if not self.gpus:
            if server.cpu is None:
                self.add(server, "gpus", f"the host has no NVIDIA GPU, which {server.words} needs", works)
            else:
                server.reason = "the host has no GPU"
            return
        if server.explicit is not None:
            there = [gpu.index for gpu in self.gpus]
            missing = [index for index in server.explicit if index not in there]
            if missing:
                self.add(server, "gpus", f"the host has the GPUs {', '.join(map(str, there))}", "Name those, or leave gpus out")
                return
            if not any(len(server.explicit) in counts(engine) for engine in on_gpus):
                able = sorted({count for engine in on_gpus for count in counts(engine)})
                self.add(server, "gpus", f"{server.card['name']} runs on {', '.join(map(str, able))} GPUs at once", "Name so many")
                return
            on_gpus = [engine for engine in on_gpus if len(server.explicit) in counts(engine)]
        asked = [gpu for gpu in self.gpus if server.explicit is None or gpu.index in server.explicit]
        # a broken driver is repaired or worked around by name, never by a quiet move to the CPU
        if all(gpu.unusable for gpu in asked) or (server.explicit and any(gpu.unusable for gpu in asked)):
            broken = next(gpu for gpu in asked if gpu.unusable)
            rule, dummy, remedy = broken.unusable.partition(". ")
            also = f", or serve {server.card['name']} with gpus: []" if engines_for(server.card, server.width, []) else ""
            self.add(server, "gpus", f"{broken.words}: {rule.rstrip('.')}", (remedy.rstrip(".") or "Choose other GPUs") + also)
            return
        host = Host(asked, self.torch_index)
        reasons: list[str] = []
        for engine in on_gpus:
            unfit = [reason for reason in (host.unfit(gpu, engine) for gpu in asked) if reason]
            if len(unfit) == len(asked) or (server.explicit and unfit):
                reasons += unfit
            else:
                server.engines.append(engine)
        if not server.engines:
            told = "; ".join(dict.fromkeys(reasons))
            if server.cpu is None:
                self.add(server, "gpus", told, f"Update the driver or choose another GPU. {works}")
            else:
                server.reason = told

    def run(self) -> dict[int, dict[str, t.Any]]:
        for server in self.servers:
            self.sort_out(server)
        if self.faults:
            return {}
        must = [server for server in self.servers if server.engines and server.cpu is None]
        may = [server for server in self.servers if server.engines and server.cpu is not None]
        placed = _fit(self.usable, self.torch_index, must)
        if placed is None and self.check_resources:
            self.faults.append(
                fault(
                    "model_servers",
                    "gpus",
                    f"these models do not fit on the GPUs of this host: {_shortage(self.usable, self.torch_index, must)}",
                    "Move a model to another host, choose a smaller quantize_bit where the model has one, or set model_server_check_resources: false "
                    "to try it all the same",
                )
            )
            return {}
        if placed is None:
            self.usable = [replace(gpu, foreign_gb=0.0) for gpu in self.usable]
            placed = _squeeze(self.usable, self.torch_index, must)
            may = []
        # earlier in the list goes first, so that a model added at its end moves none
        kept = list(must)
        for server in may:
            trial = sorted([*kept, server], key=lambda one: one.position)
            found = _fit(self.usable, self.torch_index, trial)
            if found is None:
                server.reason = f"not enough GPU memory left: {_shortage(self.usable, self.torch_index, trial)}"
            else:
                kept, placed = trial, found
        return self.answer(placed)

    def answer(self, placed: Mapping[int, Choice]) -> dict[int, dict[str, t.Any]]:
        elastic = {server.position for server in self.servers if server.card.get("kind") == "chat"}
        budgets = _budgets(self.usable, placed, elastic)
        totals = {gpu.index: gpu.total_gb for gpu in self.usable}
        answer: dict[int, dict[str, t.Any]] = {}
        for server in self.servers:
            choice = placed.get(server.position)
            engine = choice.engine if choice else server.cpu
            if engine is None:
                continue
            device = "gpu" if choice else "cpu"
            memory = ram_gb(server.card, server.width, engine)
            budget = budgets[server.position] if choice else 0.0
            # what the budget leaves for the cache, on all of its GPUs together
            cache = cache_gb(server.card)
            spare = max(cache + (budget - choice.need) * len(choice.gpus), 0.0) if choice and cache else cache
            answer[server.item["port"]] = {
                "engine": str(engine["name"]),
                "device": device,
                "gpus": list(choice.gpus) if choice else [],
                "need_gb": _up(choice.most if choice else memory),
                "memory_gb": _down(budget, 2),
                "cache_gb": _down(spare, 2),
                "fraction": _down(min(budget / totals[index] for index in choice.gpus), 3) if choice else 0.0,
                "ram_gb": _up(memory),
                "reason": "" if choice else server.reason,
                "entry": dict(engine),
            }
        return answer


def place(
    servers: t.Any, cards: t.Any, gpus: t.Any, torch_index: t.Any = "", check_resources: bool = True
) -> tuple[dict[int, dict[str, t.Any]], list[str]]:
    """The placement by port, or the faults that prevent one."""
    placing = _Placing(servers, cards, gpus, str(torch_index or ""), check_resources)
    return placing.run(), placing.faults
