# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: placement_table
short_description: Where the models run, as the lines of a table
version_added: 1.0.0
author: selfhosted.fastgpt contributors (@selfhosted)
description:
  - One line for each model server, with host, model, port, engine, width, GPUs and the memory that it needs there.
  - Below it stands one line for each GPU of the hosts, with what is placed on it.
positional: gpus
options:
  _input:
    description: Endpoints as P(selfhosted.fastgpt.model_endpoints#filter) gives them with the hosts' GPUs.
    type: list
    elements: dict
    required: true
  gpus:
    description: Host names as keys, their GPUs as M(selfhosted.fastgpt.gpu_facts) returns them as values.
    type: dict
    default: {}
  markdown:
    description: Whether the lines are those of a Markdown report.
    type: bool
    default: false
"""

EXAMPLES = r"""
- ansible.builtin.debug:
    msg: "{{ endpoints | selfhosted.fastgpt.placement_table({'gpu-1': host.gpus}) }}"
"""

RETURN = r"""
_value:
  description: Lines of text.
  type: list
  elements: str
"""

import typing as t
from collections.abc import Mapping, Sequence

from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils._placement import read_gpus

_HEAD = ("host", "model", "port", "engine", "bits", "runs on", "needs", "note")
_GPU_HEAD = ("host", "GPU", "name", "memory", "needed", "models")


def _text(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def placement_table(endpoints: Sequence[Mapping[str, t.Any]], gpus: t.Any = None, markdown: t.Any = False) -> list[str]:
    rows: list[tuple[str, ...]] = [_HEAD]
    used: dict[tuple[str, int], list[Mapping[str, t.Any]]] = {}
    for endpoint in endpoints:
        indexes = [int(index) for index in endpoint["gpus"]]
        for index in indexes:
            used.setdefault((str(endpoint["host"]), index), []).append(endpoint)
        on_gpus = f"GPU {', '.join(map(str, indexes))}" if indexes else "CPU"
        need = f"{endpoint['need_gb']} GB" + (" each" if len(indexes) > 1 else "")
        cells = (endpoint["host"], endpoint["model"], endpoint["port"], endpoint["engine"], endpoint["quantize_bit"], on_gpus, need, endpoint["note"])
        rows.append(tuple(str(cell) for cell in cells))
    cards: list[tuple[str, ...]] = [_GPU_HEAD]
    for host in sorted(gpus) if isinstance(gpus, Mapping) else ():
        for gpu in read_gpus(gpus[host]):
            here = used.get((str(host), gpu.index), [])
            needed = f"{round(sum(float(endpoint['need_gb']) for endpoint in here), 1)} GB"
            models = ", ".join(str(endpoint["model"]) for endpoint in here)
            cards.append((str(host), str(gpu.index), gpu.name, f"{round(gpu.total_gb, 1)} GB" if gpu.total_gb else "?", needed, models or gpu.unusable or "-"))
    form = _markdown if markdown else _text
    return form(rows) + (["", *form(cards)] if len(cards) > 1 else [])


class FilterModule:
    """Filter of the same name."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"placement_table": placement_table}
