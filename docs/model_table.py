# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Write every way to serve a model of the catalogue into models.md. With --check, say whether it is out of date.

Whether a way is refused, and what it takes, is asked of the same functions that the plan asks. The text around the generated part is
written by hand and stays.
"""

from __future__ import annotations

import pathlib
import sys
from dataclasses import dataclass
from typing import Any

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / ".collections"))

from ansible_collections.selfhosted.fastgpt.plugins.filter.model_server_faults import model_server_faults  # noqa: E402
from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils._models import ENGINES, WIDTHS, engines_for, engines_of, widths_of  # noqa: E402
from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils._placement import counts, engine_needs, place  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
CARDS = ROOT / "roles" / "model_cards" / "vars" / "main.yml"
BEGIN = "<!-- begin models, written by docs/model_table.py -->"
END = "<!-- end models -->"
# Larger and newer than any: what the cards ask for is wanted here, not what one GPU has.
GPU = {"index": 0, "name": "GPU", "memory_mb": 1_000_000, "compute_capability": "9.0", "driver_version": "999"}

_PLACED = "tests/unit/plugins/filter/test_gpu_placement.py::"
_FILTERS = "tests/unit/plugins/filter/test_model_filters.py::"
_LEGACY = "tests/engines/legacy_chat/"
_SERVER = "tests/unit/roles/model_server/"
_LAB = "molecule/default/tests/test_default.py::"
_KILLED = "molecule/default/tests/test_models.py::test_an_engine_killed_under_load_loses_its_own_requests_only_and_comes_back"
_ASKED = "molecule/default/tests/test_models.py::test_every_server_answers_a_real_request_and_those_of_gpu_2_speak_tls"
_OFFERED = "tests/unit/docs/test_model_table.py::test_every_way_that_is_offered_is_placed_so"

# (engine, device): what ran and what did not, and the tests.
TESTS: dict[tuple[str, str], tuple[str, tuple[str, ...]]] = {
    ("transformers", "cpu"): (
        "The real engine with a tiny Qwen2 of hand-made weights, deployed and asked in the lab. The models of the catalogue were not at hand.",
        (
            f"{_LAB}test_a_model_server_asks_for_its_key_on_every_route",
            f"{_LAB}test_units_are_hardened_and_run_as_a_user_of_their_own",
            _ASKED,
            _KILLED,
            f"{_SERVER}test_model_server.py::test_a_real_answer_is_asked_for",
            f"{_PLACED}test_without_gpus",
            _OFFERED,
        ),
    ),
    ("vllm", "gpu"): (
        "Not run: no GPU and no image of vLLM was at hand. The lab deploys a stand-in that refuses the command lines that vLLM refuses, "
        "on a host that pretends to have GPUs.",
        (
            f"{_PLACED}test_engine_on_a_gpu",
            f"{_PLACED}test_tensor_parallel",
            f"{_PLACED}test_too_old_for_vllm",
            f"{_PLACED}test_engine_by_name",
            "molecule/default/tests/test_models.py::test_vllm_has_its_gpu_and_nothing_more",
            "molecule/default/tests/test_models.py::test_a_dead_container_comes_back",
            f"{_SERVER}test_model_server.py::test_a_container_is_asked_and_restarted_but_never_started_here",
            f"{_SERVER}test_model_server.py::test_a_tokenizer_reads_its_vocabulary_before_its_base_asks_for_it",
            f"{_SERVER}test_model_server.py::test_a_mended_tokenizer_is_written_once_and_again_when_the_weights_change",
            _OFFERED,
        ),
    ),
    ("legacy_chat", "gpu"): (
        "Run on one H100 by hand, with a model of random weights of Baichuan2-7B's shape in transformers' Llama class, in 16, 8 and 4 bit: "
        "[figures](../bench/README.md). The code of Baichuan2's and ChatGLM2's repositories was not, and the tests need no GPU.",
        (
            f"{_PLACED}test_engine_on_a_gpu",
            f"{_LEGACY}test_models.py::test_number_types",
            f"{_LEGACY}test_faults.py::test_out_of_memory_starts_again_with_less",
            f"{_SERVER}test_model_server.py::test_gpus_are_let_through_and_nothing_else",
            _OFFERED,
        ),
    ),
    ("legacy_chat", "cpu"): (
        "The real engine with tiny models of random weights: Qwen2 of transformers, which is deployed and asked in the lab too, and classes written "
        "here with the interface of Baichuan2's and ChatGLM2's repositories. The weights of the catalogue were not at hand.",
        (
            f"{_LEGACY}test_models.py::test_a_batch_answers_as_each_alone",
            f"{_LEGACY}test_models.py::test_quantized_is_quantized_and_close",
            f"{_LEGACY}test_models.py::test_a_width_that_is_not_honoured_is_refused",
            f"{_LEGACY}test_models.py::test_prompts_are_what_the_models_were_trained_on",
            f"{_LEGACY}test_api.py::test_stream_says_the_same_as_the_whole",
            f"{_LEGACY}test_faults.py::test_sigterm_ends_it_in_seconds_under_load",
            "molecule/default/tests/test_models.py::test_quantization_is_what_was_asked_for",
            _ASKED,
            _KILLED,
            f"{_PLACED}test_memory_of_the_host",
            _OFFERED,
        ),
    ),
    ("infinity", "gpu"): (
        "Run on one H100 by hand, with M3E-large and both rerankers of random weights: [figures](../bench/README.md). The unit's rights and the role's "
        "environment were not, and the tests need no GPU.",
        (
            f"{_PLACED}test_engine_on_a_gpu",
            f"{_FILTERS}test_endpoint_before_and_after_a_look_at_the_gpus",
            f"{_SERVER}test_model_server.py::test_gpus_are_let_through_and_nothing_else",
            _OFFERED,
        ),
    ),
    ("infinity", "cpu"): (
        "The real engine with a real embedding model (all-MiniLM-L6-v2) and a BERT reranker of hand-made weights, deployed and asked in the "
        "lab. M3E and bge-reranker themselves were not at hand.",
        (
            f"{_LAB}test_a_model_server_asks_for_its_key_on_every_route",
            f"{_LAB}test_routes_that_engines_leave_open_are_closed",
            _ASKED,
            _KILLED,
            f"{_SERVER}test_model_server.py::test_a_real_answer_is_asked_for",
            f"{_SERVER}test_rerank_adapter.py::test_old_shape_is_converted_both_ways",
            f"{_PLACED}test_without_gpus",
            _OFFERED,
        ),
    ),
}
REFUSED = (
    "The plan refuses the server before any host is touched, and names what works.",
    (
        "tests/unit/docs/test_model_table.py::test_every_refusal_names_what_works",
        f"{_FILTERS}test_server_faults",
        "tests/integration/playbooks/test_bad_inventories.py::test_a_bad_inventory_is_refused",
    ),
)


@dataclass(frozen=True)
class Way:
    card: dict[str, Any]
    engine: str
    device: str
    width: int

    @property
    def server(self) -> dict[str, Any]:
        """The item of model_servers that asks for exactly this."""
        gpus = [0] if self.device == "gpu" else []
        return {"model": self.card["name"], "port": 8001, "quantize_bit": self.width, "gpus": gpus, "engine": self.engine}

    def faults(self, cards: list[dict[str, Any]]) -> list[str]:
        return model_server_faults([self.server], cards)

    def placed(self, cards: list[dict[str, Any]]) -> dict[str, Any]:
        found, faults = place([self.server], cards, [GPU])
        if faults:
            raise SystemExit(f"{self.server}: offered by model_server_faults and refused by place: {faults}")
        return found[8001]


def catalogue() -> list[dict[str, Any]]:
    cards: list[dict[str, Any]] = yaml.safe_load(CARDS.read_text(encoding="utf-8"))["model_cards_catalogue"]
    return cards


def ways(card: dict[str, Any]) -> list[Way]:
    """Every engine for models of this kind, on every device, in every width: those of the card in its order, then the others."""
    own = [(str(engine["name"]), str(engine["device"]), width) for engine in engines_of(card) for width in widths_of(engine)]
    every = [(name, device, width) for name, can in ENGINES.items() if card["kind"] in can["kinds"] for device in can["devices"] for width in WIDTHS]
    return [Way(card, name, device, width) for name, device, width in dict.fromkeys([*own, *every])]


def written(way: Way) -> str:
    """What has to stand in model_servers beside model and port."""
    gpus: Any = "auto" if way.device == "gpu" else []
    first = next(iter(engines_for(way.card, way.width, gpus)), {"name": ""})
    parts = {"quantize_bit": way.width if way.width != 16 else None, "gpus": "[]" if way.device == "cpu" else None,
             "engine": way.engine if first["name"] != way.engine else None}  # fmt: skip
    return ", ".join(f"`{key}: {value}`" for key, value in parts.items() if value is not None) or "nothing"


def anchor(engine: str, device: str) -> str:
    return f"{engine}-on-{device}"


def row(way: Way, cards: list[dict[str, Any]]) -> tuple[str, ...]:
    """Everything but the width."""
    head = (way.engine, way.device.upper())
    if way.faults(cards):
        return (*head, "refused", "", "", "", "", "", "[refusals](#refusals)")
    found = way.placed(cards)
    tests = f"[{way.engine} on {way.device.upper()}](#{anchor(way.engine, way.device)})"
    if way.device == "cpu":
        return (*head, written(way), "", "", f"{found['ram_gb']} GB", "", "", tests)
    capability, _most, driver = engine_needs(found["entry"])
    spread = ", ".join(map(str, counts(found["entry"])))
    return (*head, written(way), f"{found['need_gb']} GB", spread, f"{found['ram_gb']} GB", str(capability), driver, tests)


def table(card: dict[str, Any], cards: list[dict[str, Any]]) -> list[str]:
    rows: dict[tuple[str, ...], list[int]] = {}
    for way in ways(card):
        rows.setdefault(row(way, cards), []).append(way.width)
    size = f", {card['dimensions']} dimensions" if "dimensions" in card else ""
    lines = [f"### {card['name']}", "", f"{card['kind'].capitalize()}, {card['context']} tokens{size}, {card['disk_gb']} GB of disk.", ""]
    lines += ["| bits | engine | on | to be written | GPU memory | GPUs | host memory | compute capability | driver | tests |", "|" + "---|" * 10]
    return lines + ["|" + "|".join(f" {cell} " if cell else " " for cell in (", ".join(map(str, widths)), *cells)) + "|" for cells, widths in rows.items()]


def section() -> str:
    cards = catalogue()
    lines = [BEGIN, "", "## The models", ""]
    for card in cards:
        lines += [*table(card, cards), ""]
    lines += ["## The tests", ""]
    for (engine, device), (text, nodes) in TESTS.items():
        lines += [f"### {engine} on {device.upper()}", "", text, "", *(f"* `{node}`" for node in nodes), ""]
    lines += ["### Refusals", "", REFUSED[0], "", *(f"* `{node}`" for node in REFUSED[1]), ""]
    return "\n".join([*lines, END])


def page(text: str) -> str:
    return text[: text.index(BEGIN)] + section() + text[text.index(END) + len(END) :]


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    wanted = page(text)
    if text != wanted and "--check" in sys.argv:
        print("out of date: docs/models.md. Run python docs/model_table.py")
        return 1
    PAGE.write_text(wanted, encoding="utf-8")
    print(f"docs/models.md: {'up to date' if text == wanted else 'written'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
