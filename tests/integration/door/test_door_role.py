# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The role's own tasks, with a directory in the place of /etc/nginx and stubs for dpkg and systemd."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest
from conftest import Door, Pki, Upstream, make_certificate, trusting, wait_for
from ports import free_port

ROOT = Path(__file__).resolve().parents[3]
BIN = Path(sys.executable).parent
STUBS = {
    "dpkg-query": 'shift 3; for name in "$@"; do echo "$name installed"; done',
    "systemctl": """case "$1" in
show) printf 'LoadState=loaded\\nActiveState=active\\nUnitFileState=enabled\\nActiveEnterTimestampMonotonic=1\\n' ;;
*) echo "$@" >>{root}/systemctl.log; [ "$1" != reload ] || [ ! -s {root}/nginx.pid ] || kill -HUP $(cat {root}/nginx.pid) ;;
esac""",
    # what is asked where systemd is not the first process, as on the machines of these tests
    "service": """case "$2" in
status) ;;
*) echo "$2" >>{root}/systemctl.log; [ "$2" != reload ] || [ ! -s {root}/nginx.pid ] || kill -HUP $(cat {root}/nginx.pid) ;;
esac""",
    "nginx": 'exec /usr/sbin/nginx -c {root}/nginx.conf "$@"',
}
PLAY = """
- hosts: all
  gather_facts: false
  tasks:
    - ansible.builtin.include_role:
        name: selfhosted.fastgpt.door
"""


class Host:
    """What the role believes to be a host."""

    def __init__(self, door: Door) -> None:
        self.door, self.root = door, door.root
        for path in ("bin", "etc/sites-enabled", "etc/modules-enabled"):
            (self.root / path).mkdir()
        for name, text in STUBS.items():
            stub = self.root / "bin" / name
            stub.write_text("#!/bin/sh\n" + text.replace("{root}", str(self.root)) + "\n")
            stub.chmod(0o755)
        (self.root / "play.yml").write_text(PLAY)

    def run(self, *services: dict[str, t.Any], check: bool = False, fails: bool = False, **variables: t.Any) -> tuple[dict[str, int], str]:
        given = {
            "door_name": "test",
            "door_address": "127.0.0.1",
            "door_tls_names": ["127.0.0.1"],
            "door_services": [{"name": "a model", **service} for service in services],
            "door__nginx_dir": str(self.root / "etc"),
            "door__log_dir": str(self.root / "log"),
            "door__socket_dir": str(self.root / "sockets"),
            "door__state_dir": str(self.root / "state"),
            "door__unit_dir": str(self.root / "unit"),
            "ansible_python_interpreter": sys.executable,
            **variables,
        }
        (self.root / "vars.json").write_text(json.dumps(given))
        command = [BIN / "ansible-playbook", "-i", "host,", "-c", "local", "-e", f"@{self.root}/vars.json", self.root / "play.yml", "--diff", "-v"]
        env = {**os.environ, "PATH": f"{self.root}/bin:{os.environ['PATH']}", "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}
        env["ANSIBLE_PIPELINING"] = "true"
        env["ANSIBLE_COLLECTIONS_PATH"] = str(ROOT / ".collections")
        done = subprocess.run(
            [*map(str, command), *(["--check"] if check else [])], capture_output=True, text=True, check=False, timeout=120, env=env, cwd=ROOT
        )
        assert (done.returncode != 0) is fails, done.stdout + done.stderr
        recap = re.search(r"ok=(\d+)\s+changed=(\d+)", done.stdout)
        assert recap
        return {"ok": int(recap[1]), "changed": int(recap[2])}, done.stdout

    def files(self) -> dict[str, str]:
        found = {}
        for path in sorted((self.root / "etc").rglob("*")):
            if path.is_file():
                found[str(path.relative_to(self.root / "etc"))] = path.read_text()
        return found

    def mode(self, name: str) -> int:
        return stat.S_IMODE((self.root / "etc" / name).stat().st_mode)


@pytest.mark.skipif(os.geteuid() != 0, reason="the role gives its files to root")
def test_the_role(door: Door, upstreams: t.Callable[..., Upstream]) -> None:
    host = Host(door)
    one, two = upstreams(), upstreams()
    ca = make_certificate("own ca", ca=True)
    own = {"door_tls_ca_certificate": ca.pem, "door_tls_ca_key": ca.key_pem}
    port, plain = free_port(), free_port()
    servers = [{"address": one.address, "api_key": "sk-behind-1"}, {"address": two.address, "api_key": "sk-behind-2"}]
    guarded: dict[str, t.Any] = {"port": port, "upstream": servers, "api_keys": ["sk-Right"], "pass": ["/v1/"], "tls": {"own_ca": True}}
    given = make_certificate("given", ca)
    second = {"port": plain, "upstream": one.address, "open": True, "tls": {"certificate": given.pem, "key": given.key_pem}}

    recap, output = host.run(guarded, second, check=True, **own)
    assert recap["changed"] and not host.files() and "Would make a certificate" in output

    recap, output = host.run(guarded, second, **own)
    door.start()
    for asked in (port, plain):
        assert door.ask(asked, context=trusting(ca)).status == 200
    assert not re.search("sk-Right|sk-behind|PRIVATE KEY", output)
    written = host.files()
    # the CA's key stays on the controller, and what is secret is root's
    assert ca.key_pem.splitlines()[1] not in "".join(written.values())
    for name, text in written.items():
        assert (host.mode(name) == 0o600) is bool(re.search("sk-|PRIVATE KEY", text)), name
    assert "worker_shutdown_timeout 3600s;" in written["modules-enabled/99-selfhosted-fastgpt.conf"]

    recap, output = host.run(guarded, second, **own)
    assert recap["changed"] == 0, output
    assert host.files() == written

    # renewed in time, with the key that it has; a service that has gone takes its files along
    before = door.workers()
    host.run(guarded, door_tls_renew_days=366, door_tls_valid_days=1000, **own)
    renewed = host.files()
    assert renewed["selfhosted-fastgpt-own.key"] == written["selfhosted-fastgpt-own.key"]
    assert renewed["selfhosted-fastgpt-own.pem"] != written["selfhosted-fastgpt-own.pem"]
    assert f"selfhosted-fastgpt-test-{plain}.pem" in written and f"selfhosted-fastgpt-test-{plain}.pem" not in renewed
    wait_for(lambda: len(door.workers() - before) == 2)
    assert door.ask(port, context=trusting(ca)).status == 200

    # refused before anything is written
    recap, output = host.run({**guarded, "upstream": "http://127.0.0.1:1/"}, fails=True, **own)
    assert "door_services[0].upstream" in output and "is no address and port" in output and host.files() == renewed

    host.run()
    assert not [name for name in host.files() if "test" in name]


@pytest.mark.skipif(os.geteuid() != 0, reason="the role gives its files to root")
def test_a_plain_service_costs_no_more_than_it_did(door: Door, upstream: Upstream, pki: Pki) -> None:
    host = Host(door)
    plain = {"port": free_port(), "upstream": upstream.address, "open": True}
    host.run(plain)
    recap, output = host.run(plain)
    assert recap["changed"] == 0
    # dpkg, welcome page, drop-in and its directory, shutdown time; services, applied
    modules = re.findall(r"TASK \[selfhosted.fastgpt.(?:door|packages) : ([^\]]*)\] \**\n(?:.*\n)*?(ok|changed|skipping|included|fatal|)(?=:)", output)
    ran = [name for name, state in modules if state == "ok" and not name.startswith(("Validating", "Remember"))]
    assert len(ran) <= 7, ran
    # files of the host: a link each, which a renewed file changes
    for suffix, text in (("crt", pki.server.pem), ("key", pki.server.key_pem)):
        (host.root / f"given.{suffix}").write_text(text)
    linked = {**plain, "tls": {"certificate_file": f"{host.root}/given.crt", "key_file": f"{host.root}/given.key"}}
    host.run(linked)
    door.start()
    assert door.ask(linked["port"], context=trusting(pki.ca)).status == 200
    log = (host.root / "systemctl.log").read_text().count("reload")
    (host.root / "given.crt").write_text(pki.server.pem + "\n")
    recap, _output = host.run(linked)
    assert recap["changed"] == 1 and (host.root / "systemctl.log").read_text().count("reload") == log + 1
