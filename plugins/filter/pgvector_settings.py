# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Callable

from ansible.errors import AnsibleFilterError

DOCUMENTATION = r"""
name: pgvector_settings
short_description: Settings of a PostgreSQL that holds an HNSW index, from its vectors and its memory
version_added: 1.0.0
author: selfhosted.fastgpt contributors (@selfhosted)
description:
  - Works out the memory settings, the size of C(/dev/shm) and the smallest sensible host for a number of vectors in an HNSW
    index as FastGPT makes it (C(m=32), C(float4)).
  - A vector of 1536 dimensions takes one page of 8 kB in the index, 8.2 kB in the table and 7.2 kB of memory while the graph is
    built.
positional: _input, memory_mb, cpus
options:
  _input:
    description: Number of vectors that are expected.
    type: int
    required: true
  memory_mb:
    description: Memory that PostgreSQL may use, in MiB. Not the whole host where other services share it.
    type: int
    required: true
  cpus:
    description: Number of CPUs that PostgreSQL may use.
    type: int
    required: true
  dimensions:
    description: Dimensions of the column. FastGPT pads every vector to 1536.
    type: int
    default: 1536
  max_connections:
    description: Number of connections that PostgreSQL accepts.
    type: int
    default: 100
  settings:
    description: Settings that win over those worked out here. C(/dev/shm) follows a larger C(maintenance_work_mem).
    type: dict
    default: {}
"""

EXAMPLES = r"""
- name: Show what a million vectors need
  ansible.builtin.debug:
    var: 1000000 | selfhosted.fastgpt.pgvector_settings(memory_mb=16384, cpus=4)
"""

RETURN = r"""
_value:
  description: What was worked out. Sizes are whole MiB.
  type: dict
  contains:
    settings:
      description: Settings of PostgreSQL and their values as text.
      type: dict
    shm_mb:
      description: Size of the container's C(/dev/shm). Parallel index builds of up to RV(_value.build_mb) fit.
      type: int
    build_mb:
      description: The C(maintenance_work_mem) to set in a session that builds or rebuilds the index.
      type: int
    graph_mb:
      description: Memory that the graph takes while it is built at once.
      type: int
    index_mb:
      description: Size of the index on disk.
      type: int
    table_mb:
      description: Size of the table on disk.
      type: int
    index_cached:
      description: Whether the index fits into the memory, so that a search does not wait for the disk.
      type: bool
    minimum:
      description: The smallest host for this number of vectors (C(cpus), C(memory_gb), C(disk_gb)), alone on it.
      type: dict
"""

MIB = 1024 * 1024
PAGE = 8192
HNSW_M = 32
UNITS = {"B": 1, "kB": 1024, "MB": MIB, "GB": 1024 * MIB, "TB": MIB * MIB}

# (vectors up to, CPUs, memory in GB, disk in GB): the table of FastGPT's documentation
MINIMUM = ((100_000, 2, 2, 5), (1_000_000, 4, 8, 50), (5_000_000, 8, 32, 200))


def graph_bytes(dimensions: int, m: int = HNSW_M) -> float:
    """Memory per vector of pgvector's in-memory graph: element, neighbours of layer 0, of the upper layers, value."""
    return 128 + 8 + (8 + 2 * m * 16) + (8 + m * 16) / (m - 1) + (4 * dimensions + 8)


def index_bytes(dimensions: int, m: int = HNSW_M) -> float:
    """Disk per vector of the index: as many elements with their neighbours in a page as fit."""
    element = 4 * dimensions + 8 + 2 * m * 6 + 80
    return PAGE / max(1, PAGE // element) if element <= PAGE else math.ceil(element / PAGE) * PAGE


def table_bytes(dimensions: int) -> float:
    """Disk per row: the vector in TOAST chunks of four to a page, and the narrow row itself."""
    value = 4 * dimensions + 8
    return math.ceil(value / 1996) * (PAGE / 4) + 180


def minimum(vectors: int) -> dict[str, int]:
    for limit, cpus, memory, disk in MINIMUM:
        if vectors <= limit:
            return {"cpus": cpus, "memory_gb": memory, "disk_gb": disk}
    limit, cpus, memory, disk = MINIMUM[-1]
    return {"cpus": cpus, "memory_gb": math.ceil(memory * vectors / limit), "disk_gb": math.ceil(disk * vectors / limit)}


def whole(name: str, value: Any, least: int) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise AnsibleFilterError(f"pgvector_settings: {name}: {value!r}: must be a whole number of at least {least}.")
    return number


def clamp(value: float, least: float, most: float) -> int:
    return int(max(least, min(value, most)))


def as_text(name: str, value: Any) -> str:
    """A setting as PostgreSQL reads it on its command line."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if not isinstance(value, (str, int, float)):
        raise AnsibleFilterError(f"pgvector_settings: settings: {name}: must be a text, a number or a boolean, not {type(value).__name__}.")
    return str(value)


def mebibytes(name: str, text: str) -> int:
    """A memory setting in MiB; PostgreSQL counts a bare number in kB."""
    match = re.fullmatch(r"([0-9]+) *(B|kB|MB|GB|TB|)", text.strip())
    if not match:
        raise AnsibleFilterError(f"pgvector_settings: settings: {name}: {text!r}: must be a size such as 512MB or 2GB.")
    return math.ceil(int(match[1]) * UNITS[match[2] or "kB"] / MIB)


def pgvector_settings(
    expected_vectors: int,
    memory_mb: int,
    cpus: int,
    dimensions: int = 1536,
    max_connections: int = 100,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    vectors = whole("expected_vectors", expected_vectors, 1)
    memory = whole("memory_mb", memory_mb, 256)
    cores = whole("cpus", cpus, 1)
    width = whole("dimensions", dimensions, 1)
    connections = whole("max_connections", max_connections, 10)

    graph = math.ceil(vectors * graph_bytes(width) / MIB)
    index = math.ceil(vectors * index_bytes(width) / MIB)
    table = math.ceil(vectors * table_bytes(width) / MIB)

    # A quarter of the memory, but not more than there is to cache.
    shared_buffers = clamp(memory / 4, 64, max(256, 1.1 * (index + table)))
    # Every autovacuum worker takes autovacuum_work_mem, so neither may be what a build of the index wants.
    maintenance = clamp(memory / 16, 64, 2048)
    autovacuum = clamp(memory / 32, 32, 1024)
    max_wal = clamp(memory / 2, 512, min(32768, max(1024, index + table)))

    # A build that fits is given what it needs; one that spills anyway leaves room for the searches meanwhile.
    needed = math.ceil(1.05 * graph)
    build = needed if needed <= 0.6 * memory else clamp((memory - 4096) / 2, maintenance, 0.6 * memory)
    build = max(build, maintenance)

    chosen = {
        "autovacuum_work_mem": f"{autovacuum}MB",
        "effective_cache_size": f"{memory * 3 // 4}MB",
        "maintenance_work_mem": f"{maintenance}MB",
        "max_connections": str(connections),
        "max_parallel_maintenance_workers": str(clamp(min(cores - 1, memory // 4096), 0, 7)),
        "max_parallel_workers": str(max(2, cores)),
        "max_wal_size": f"{max_wal}MB",
        "max_worker_processes": str(max(8, cores)),
        "shared_buffers": f"{shared_buffers}MB",
    }
    chosen.update({str(name): as_text(str(name), value) for name, value in (settings or {}).items()})
    build = max(build, mebibytes("maintenance_work_mem", chosen["maintenance_work_mem"]))

    return {
        "settings": chosen,
        # A parallel build keeps its graph in /dev/shm and fails where that is smaller than maintenance_work_mem.
        "shm_mb": max(128, math.ceil(1.05 * build / 64) * 64),
        "build_mb": build,
        "graph_mb": graph,
        "index_mb": index,
        "table_mb": table,
        "index_cached": index <= 0.75 * memory,
        "minimum": minimum(vectors),
    }


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"pgvector_settings": pgvector_settings}
