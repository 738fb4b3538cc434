# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Real databases out of the lab's own images, on this machine's loopback, for the nodes of One-API's stand-in."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "tests" / part) for part in ("support", "unit/lab")]

import test_one_api_stand_in  # noqa: E402
from services import Service, docker, number  # noqa: E402
from test_one_api_stand_in import OneApi  # noqa: E402

# a fixture
upstream = test_one_api_stand_in.upstream


@pytest.fixture(scope="session")
def mariadb(tmp_path_factory):
    """With its password in a file and root let in by the socket alone, as the role does it."""
    directory = tmp_path_factory.mktemp("mariadb")
    directory.chmod(0o755)
    (directory / "password").write_text("p@ss:w/ord?\n")
    (directory / "root.sql").write_text("ALTER USER 'root'@'localhost' IDENTIFIED VIA unix_socket;\n")
    service = Service(
        "mariadb:10.11", 3306, ("mariadb-admin", "--protocol=tcp", "-h", "127.0.0.1", "ping"), "--cap-drop", "ALL", "--user", "999:999",
        "-v", f"{directory}:/run/oneapi-database:ro", "-v", f"{directory / 'root.sql'}:/docker-entrypoint-initdb.d/root.sql:ro",
        "-e", "MARIADB_RANDOM_ROOT_PASSWORD=1", "-e", "MARIADB_DATABASE=oneapi", "-e", "MARIADB_USER=oneapi",
        "-e", "MARIADB_PASSWORD_FILE=/run/oneapi-database/password", "--tmpfs", "/var/lib/mysql:uid=999,gid=999,mode=0700",
        command=("mariadbd", "--character-set-server=utf8mb4", "--collation-server=utf8mb4_unicode_ci"),
    )  # fmt: skip
    yield service
    service.remove()


@pytest.fixture(scope="session")
def postgres():
    service = Service("pgvector:pg17", 5432, ("pg_isready", "-h", "127.0.0.1"), "-e", "POSTGRES_PASSWORD=secret")
    yield service
    service.remove()


@pytest.fixture(scope="session")
def cache():
    service = Service("redis:7.0", 6379, ("redis-cli", "-a", "secret", "ping"), command=("--requirepass", "secret"))
    yield service
    service.remove()


@pytest.fixture(params=["mysql", "postgres"])
def database(request):
    """An empty database: its kind and SQL_DSN."""
    name = f"test{number()}"
    if request.param == "mysql":
        service = request.getfixturevalue("mariadb")
        docker("exec", "--user", "0", service.name, "mariadb", "-e", f"CREATE DATABASE {name}; GRANT ALL ON {name}.* TO oneapi@'%'")
        return "mysql", f"oneapi:p@ss:w/ord?@tcp(127.0.0.1:{service.port})/{name}?charset=utf8mb4&parseTime=True"
    service = request.getfixturevalue("postgres")
    service.run("createdb", "-U", "postgres", name)
    return "postgres", f"postgres://postgres:secret@127.0.0.1:{service.port}/{name}?sslmode=disable"


@pytest.fixture
def node(tmp_path):
    nodes = []

    def make(**env):
        nodes.append(OneApi(tmp_path / f"node{len(nodes)}", **env))
        return nodes[-1]

    yield make
    for each in nodes:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()
