# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pathlib
import sys

import pytest
import yaml

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3] / "tests" / "support"))
from lab_hosts import HOSTS, ROOT, vault  # noqa: E402 - its path was just added
from machines import host  # noqa: E402

sys.path.insert(0, str(ROOT / ".collections"))
from ansible_collections.selfhosted.fastgpt.plugins.filter.model_endpoints import model_endpoints  # noqa: E402


@pytest.fixture(scope="session")
def app():
    return host("app-1")


@pytest.fixture(scope="session")
def gpu():
    return host("gpu-1")


@pytest.fixture(scope="session")
def secrets():
    return vault()


@pytest.fixture(scope="session")
def every(secrets):
    """All model servers with their keys, by the filter that the roles use."""
    lab = yaml.safe_load((ROOT / "inventories" / "lab" / "group_vars" / "all" / "main.yml").read_text(encoding="utf-8"))
    more = yaml.safe_load((ROOT / "inventories" / "lab-models" / "hosts.yml").read_text(encoding="utf-8"))["all"]["children"]["lab"]["hosts"]
    servers = {"gpu-1": lab["model_servers"], **{name: values["model_servers"] for name, values in more.items()}}
    for server in (server for listed in servers.values() for server in listed):
        server.pop("weights", None)
    tls = [name for name, values in more.items() if values.get("model_server_tls_own_ca")]
    return model_endpoints(servers, lab["model_cards_extra"], HOSTS, secrets["model_server_master_key"], tls_hosts=tls)


@pytest.fixture(scope="session")
def endpoints(every):
    """Those of gpu-1 by kind."""
    return {entry["kind"]: entry for entry in every if entry["host"] == "gpu-1"}
