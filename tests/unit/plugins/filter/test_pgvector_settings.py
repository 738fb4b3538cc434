# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.selfhosted.fastgpt.plugins.filter.pgvector_settings import (
    FilterModule,
    graph_bytes,
    index_bytes,
    mebibytes,
    pgvector_settings,
    table_bytes,
)
from hypothesis import given
from hypothesis import strategies as st

MEMORY = ("shared_buffers", "effective_cache_size", "maintenance_work_mem", "max_wal_size", "autovacuum_work_mem")


def mb(result: dict[str, Any], name: str) -> int:
    return mebibytes(name, result["settings"][name])


def test_bytes_as_measured() -> None:
    # reference/gpu-hosts-and-databases.md 10
    assert round(graph_bytes(1536, 16)) == 6826
    assert round(graph_bytes(1536, 32)) == 7337
    assert index_bytes(1536) == 8192
    assert round(table_bytes(1536)) == 8372


@pytest.mark.parametrize(
    ("memory_gb", "cpus", "vectors", "expected"),
    [
        (8, 4, 1_000_000, (2048, 6144, 512, 4096, 256)),
        (16, 4, 1_000_000, (4096, 12288, 1024, 8192, 512)),
        (32, 8, 5_000_000, (8192, 24576, 2048, 16384, 1024)),
        (64, 16, 5_000_000, (16384, 49152, 2048, 32768, 1024)),
    ],
)
def test_memory_settings_are_those_of_the_table(memory_gb: int, cpus: int, vectors: int, expected: tuple[int, ...]) -> None:
    result = pgvector_settings(vectors, memory_gb * 1024, cpus)
    assert tuple(mb(result, name) for name in MEMORY) == expected


@pytest.mark.parametrize(("memory_gb", "cpus", "vectors", "workers"), [(8, 4, 10**6, 2), (16, 4, 10**6, 3), (32, 8, 5 * 10**6, 7), (64, 16, 5 * 10**6, 7)])
def test_parallel_builds_follow_cpus_and_memory(memory_gb: int, cpus: int, vectors: int, workers: int) -> None:
    settings = pgvector_settings(vectors, memory_gb * 1024, cpus)["settings"]
    assert settings["max_parallel_maintenance_workers"] == str(workers)
    assert settings["max_parallel_workers"] == str(cpus)
    assert int(settings["max_worker_processes"]) >= int(settings["max_parallel_workers"])


@pytest.mark.parametrize(
    ("vectors", "cpus", "memory_gb", "disk_gb"),
    [(1, 2, 2, 5), (100_000, 2, 2, 5), (100_001, 4, 8, 50), (1_000_000, 4, 8, 50), (5_000_000, 8, 32, 200), (10_000_000, 8, 64, 400)],
)
def test_minimum_is_the_documented_table(vectors: int, cpus: int, memory_gb: int, disk_gb: int) -> None:
    minimum = pgvector_settings(vectors, 4096, 2)["minimum"]
    assert minimum == {"cpus": cpus, "memory_gb": memory_gb, "disk_gb": disk_gb}


def test_recommended_hosts_cache_the_index_and_minimal_ones_do_not() -> None:
    assert pgvector_settings(1_000_000, 16 * 1024, 4)["index_cached"] is True
    assert pgvector_settings(1_000_000, 8 * 1024, 4)["index_cached"] is False
    assert pgvector_settings(5_000_000, 64 * 1024, 16)["index_cached"] is True
    assert pgvector_settings(5_000_000, 32 * 1024, 8)["index_cached"] is False


def test_a_build_that_fits_is_given_the_whole_graph() -> None:
    fits = pgvector_settings(1_000_000, 16 * 1024, 4)
    assert fits["graph_mb"] <= fits["build_mb"] <= 7500
    spills = pgvector_settings(1_000_000, 8 * 1024, 4)
    assert spills["build_mb"] == 2048


def test_few_vectors_take_little_of_a_large_host() -> None:
    result = pgvector_settings(10_000, 64 * 1024, 16)
    assert mb(result, "shared_buffers") == 256
    assert mb(result, "max_wal_size") == 1024


@given(
    vectors=st.integers(1, 10**8), memory=st.integers(256, 2**21), cpus=st.integers(1, 512), dimensions=st.integers(1, 2000),
    connections=st.integers(10, 5000),
)
def test_what_must_hold_on_any_host(vectors: int, memory: int, cpus: int, dimensions: int, connections: int) -> None:
    result = pgvector_settings(vectors, memory, cpus, dimensions, connections)
    assert result["shm_mb"] >= result["build_mb"] >= mb(result, "maintenance_work_mem")
    assert mb(result, "shared_buffers") + mb(result, "maintenance_work_mem") <= memory
    assert mb(result, "autovacuum_work_mem") <= mb(result, "maintenance_work_mem")
    assert mb(result, "effective_cache_size") <= memory
    assert result["settings"]["max_connections"] == str(connections)
    assert all(isinstance(value, str) for value in result["settings"].values())
    assert int(result["settings"]["max_parallel_maintenance_workers"]) < cpus


@given(vectors=st.integers(1, 10**7), memory=st.integers(512, 2**18))
def test_more_memory_never_lowers_a_setting(vectors: int, memory: int) -> None:
    less, more = pgvector_settings(vectors, memory, 4), pgvector_settings(vectors, 2 * memory, 4)
    assert all(mb(less, name) <= mb(more, name) for name in MEMORY)


def test_given_settings_win() -> None:
    settings = pgvector_settings(1000, 4096, 2, settings={"work_mem": "16MB", "jit": False, "random_page_cost": 1.1, "shared_buffers": "1GB"})["settings"]
    assert (settings["work_mem"], settings["jit"], settings["random_page_cost"], settings["shared_buffers"]) == ("16MB", "off", "1.1", "1GB")


def test_shm_follows_a_larger_maintenance_work_mem() -> None:
    result = pgvector_settings(1000, 4096, 2, settings={"maintenance_work_mem": "3GB"})
    assert result["shm_mb"] >= 3072


@pytest.mark.parametrize(("text", "size"), [("64MB", 64), ("2GB", 2048), ("1048576", 1024), ("65536kB", 64), ("1 GB", 1024), ("1TB", 1048576), ("1B", 1)])
def test_sizes_as_postgresql_writes_them(text: str, size: int) -> None:
    assert mebibytes("work_mem", text) == size


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"expected_vectors": 0}, "expected_vectors"),
        ({"expected_vectors": "many"}, "expected_vectors"),
        ({"memory_mb": 100}, "memory_mb"),
        ({"cpus": 0}, "cpus"),
        ({"cpus": True}, "cpus"),
        ({"dimensions": 0}, "dimensions"),
        ({"max_connections": 1}, "max_connections"),
        ({"settings": {"maintenance_work_mem": "2 gigs"}}, "maintenance_work_mem"),
        ({"settings": {"work_mem": ["16MB"]}}, "work_mem"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(AnsibleFilterError, match=named):
        pgvector_settings(**{"expected_vectors": 1000, "memory_mb": 4096, "cpus": 2, **arguments})


def test_filter_is_registered() -> None:
    assert FilterModule().filters() == {"pgvector_settings": pgvector_settings}
