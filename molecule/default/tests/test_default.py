# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What stands after site.yml, seen from the hosts themselves and from each other."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess

import pytest
from lab_hosts import HOSTS, SSH
from machines import host, listening, status

APP, GPU = HOSTS["app-1"], HOSTS["gpu-1"]
DOORS = {"app-1": {8000, 8001, 8080, 8090}, "gpu-1": {8001, 8002, 8003}, "gpu-2": {8001, 8002, 8003}}
PUBLISHED = {"app-1": {27017, 5432}, "gpu-1": set(), "gpu-2": set()}


@pytest.mark.parametrize("name", HOSTS)
def test_only_the_door_and_the_databases_listen_on_the_node_address(name):
    open_ports = {int(port) for address, port in listening(host(name)) if not address.startswith(("127.", "[::1]"))}
    assert open_ports - {22} == DOORS[name] | PUBLISHED[name]


@pytest.mark.parametrize("name", HOSTS)
def test_nothing_listens_on_every_address(name):
    assert {port for address, port in listening(host(name)) if address in ("0.0.0.0", "*", "[::]") and port != "22"} == set()


@pytest.mark.parametrize("port", sorted(PUBLISHED["app-1"]))
def test_databases_answer_their_consumers_and_nobody_else(app, gpu, port):
    probe = f"timeout 4 bash -c 'exec 3<>/dev/tcp/{APP}/{port}'"
    assert app.run(probe).rc == 0
    assert gpu.run(probe).rc != 0


@pytest.mark.parametrize("port", [18001, 18002, 18003])
def test_engines_are_closed_to_the_network(app, gpu, port):
    assert ("127.0.0.1", str(port)) in listening(gpu)
    assert app.run(f"timeout 4 bash -c 'exec 3<>/dev/tcp/{GPU}/{port}'").rc != 0


@pytest.mark.parametrize("kind", ["chat", "embedding", "rerank"])
def test_a_model_server_asks_for_its_key_on_every_route(app, endpoints, kind):
    url, key = endpoints[kind]["url"], endpoints[kind]["keys"][0]
    for wrong in ([], ["-H", "Authorization: Bearer sk-aaabbbcccdddeeefffggghhhiiijjjkkk"], ["-H", f"Authorization: Bearer {key.upper()}"],
                  ["-H", f"Authorization: Bearer {key}x"], ["-H", f"Authorization: Bearer {key[:-1]}"]):  # fmt: skip
        code, body = status(app, f"{url}/v1/models", *wrong)
        assert (code, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")
    code, body = status(app, f"{url}/v1/models", "-H", f"Authorization: Bearer {key}")
    assert code == 200
    assert [model["id"] for model in json.loads(body)["data"]] == [endpoints[kind]["model"]]


@pytest.mark.parametrize("path", ["/metrics", "/rerank", "/embeddings", "/docs", "/openapi.json", "/v2/rerank"])
def test_routes_that_engines_leave_open_are_closed(app, endpoints, path):
    assert status(app, endpoints["rerank"]["url"] + path)[0] in (401, 404)


def test_health_needs_no_key(app, endpoints):
    assert status(app, endpoints["embedding"]["url"] + "/health")[0] == 200


@pytest.mark.parametrize("kind", ["chat", "embedding", "rerank"])
def test_units_are_hardened_and_run_as_a_user_of_their_own(gpu, endpoints, kind):
    unit = f"selfhosted-model@{endpoints[kind]['port']}.service"
    asked = "User,NoNewPrivileges,ProtectSystem,ActiveState,UnitFileState"
    shown = dict(line.split("=", 1) for line in gpu.check_output(f"systemctl show {unit} -p {asked}").splitlines())
    assert shown["ActiveState"] == "active"
    assert shown["UnitFileState"] == "enabled"
    assert shown["NoNewPrivileges"] == "yes"
    assert shown["ProtectSystem"] == "strict"
    assert shown["User"] not in ("", "root")


@pytest.mark.parametrize("name", ["one-api", "mongodb", "pgvector", "fastgpt", "fastgpt-sandbox"])
def test_containers_are_fenced_in(app, name):
    found = json.loads(app.check_output(f"docker inspect {name}"))[0]
    assert found["State"]["Status"] == "running"
    assert found["State"]["Health"]["Status"] == "healthy"
    assert found["HostConfig"]["RestartPolicy"]["Name"] == "always"
    assert "no-new-privileges" in " ".join(found["HostConfig"]["SecurityOpt"])
    assert found["HostConfig"]["CapDrop"] == ["ALL"]
    assert found["HostConfig"]["Privileged"] is False
    assert found["HostConfig"]["LogConfig"]["Config"]["max-size"]
    assert found["HostConfig"]["Memory"] > 0
    assert found["Config"]["Labels"]["selfhosted.fastgpt.role"]
    assert not found["Config"]["Image"].endswith(":latest")


def test_no_container_was_made_twice_or_left_over(app):
    names = app.check_output("docker ps -a --format '{{.Names}}'").split()
    assert sorted(names) == ["fastgpt", "fastgpt-sandbox", "model-8001", "mongodb", "one-api", "pgvector"]


def test_config_json_is_strict_json_and_names_the_models(app, every):
    path = "/etc/selfhosted-fastgpt/fastgpt/config.json"
    config = json.loads(app.check_output(f"cat {path}"))
    assert [model["model"] for model in config["llmModels"]] == [entry["model"] for entry in every if entry["kind"] == "chat"]
    assert [model["model"] for model in config["vectorModels"]] == ["all-MiniLM-L6-v2"]
    assert [model["requestUrl"] for model in config["reRankModels"]] == [f"http://{APP}:8090/v1/rerank"]
    found = app.file(path)
    assert (found.uid, found.gid, oct(found.mode)) == (1001, 0, "0o640")


def test_no_url_that_a_container_uses_names_localhost(app):
    for name in ("fastgpt", "one-api"):
        env = dict(entry.split("=", 1) for entry in json.loads(app.check_output(f"docker inspect {name}"))[0]["Config"]["Env"])
        urls = {key: value for key, value in env.items() if "://" in value}
        assert not [key for key, value in urls.items() if "localhost" in value or "127.0.0.1" in value]
        if name == "fastgpt":
            assert urls["OPENAI_BASE_URL"] == f"http://{APP}:8000/v1"
            assert f"{APP}:27017" in urls["MONGODB_URI"]


def test_the_gateway_has_one_channel_for_each_server_and_no_v1_in_it(app, secrets, every):
    relayed = [entry for entry in every if entry["kind"] != "rerank"]
    assert len(relayed) == 5
    code, body = status(app, f"http://{APP}:8000/api/channel/search?keyword=", "-H", f"Authorization: {secrets['oneapi_root_access_token']}")
    assert code == 200
    channels = json.loads(body)["data"]
    assert sorted(channel["name"] for channel in channels) == sorted(entry["name"] for entry in relayed)
    assert sorted(channel["base_url"] for channel in channels) == sorted(entry["url"] for entry in relayed)
    assert {channel["type"] for channel in channels} == {8}
    tokens = json.loads(status(app, f"http://{APP}:8000/api/token/search?keyword=", "-H", f"Authorization: {secrets['oneapi_root_access_token']}")[1])["data"]
    assert [token["name"] for token in tokens] == ["fastgpt"]
    assert sorted(tokens[0]["models"].split(",")) == sorted({entry["model"] for entry in relayed})


def test_no_default_password_is_left(app):
    body = {"username": "root", "password": "123456"}
    answer = json.loads(status(app, f"http://{APP}:8000/api/user/login", "-H", "Content-Type: application/json", "-d", json.dumps(body))[1])
    assert answer["success"] is False
    body = {"username": "root", "password": "03ac674216f3e15c761ee1a5e255f067953623c8b388b4459e13f978d7c846f4"}  # sha256 of 1234
    answer = json.loads(
        status(app, f"http://{APP}:8080/api/support/user/account/loginByPassword", "-H", "Content-Type: application/json", "-d", json.dumps(body))[1]
    )
    assert answer["code"] != 200


def test_registration_is_closed(app):
    body = {"username": "stranger", "password": "stranger-1234"}
    answer = json.loads(status(app, f"http://{APP}:8000/api/user/register", "-H", "Content-Type: application/json", "-d", json.dumps(body))[1])
    assert answer["success"] is False


def test_a_forged_client_address_is_overwritten(app):
    assert "proxy_set_header X-Forwarded-For $remote_addr;" in app.check_output("cat /etc/nginx/conf.d/selfhosted-fastgpt-oneapi.conf")


def test_the_keyfile_belongs_to_mongod_alone(app):
    found = [line.split() for line in app.check_output("find /etc/selfhosted-fastgpt/mongodb -type f -printf '%m %U %G %f\\n'").splitlines()]
    assert {name: (mode, uid, gid) for mode, uid, gid, name in found} == {
        **dict.fromkeys(("keyfile", "root_password", "server.pem"), ("400", "999", "999")),
        # the certificate's own key is root's alone, and certificates are no secret
        "tls-own.key": ("600", "0", "0"), "tls-own.pem": ("644", "0", "0"), "ca.pem": ("444", "999", "999"),
    }  # fmt: skip


@pytest.mark.parametrize("name", HOSTS)
def test_no_secret_lies_in_a_file_that_everybody_can_read(name, secrets, every):
    wanted = sorted(set(secrets.values()) | {entry["keys"][0] for entry in every})
    assert len(wanted) >= 12
    # asked as a user without rights; /tmp is a file system of its own, so -xdev leaves the list of secrets itself out
    find = (
        "find / -xdev -type f -readable -size -20M -not -path '/usr/share/*' -not -path '/usr/lib/*' "
        "-not -path '/opt/*/site-packages/*' -print0 2>/dev/null"
    )
    script = (
        "cat > /tmp/wanted; control=/var/tmp/control; head -1 /tmp/wanted > $control; chmod 0644 /tmp/wanted $control; "
        f'sudo -u nobody sh -c "{find} | xargs -0 grep -lFf /tmp/wanted"; rm -f /tmp/wanted $control'
    )
    asked = subprocess.run([*SSH, f"ops@{HOSTS[name]}", script], input="\n".join(wanted) + "\n", text=True, capture_output=True, check=False)
    # the control shows that the search finds something at all
    assert asked.stdout.split() == ["/var/tmp/control"], asked.stderr


def test_the_stack_answers_after_its_containers_were_killed(app, secrets):
    app.check_output("docker kill mongodb pgvector fastgpt >/dev/null; docker start mongodb pgvector fastgpt")
    import hashlib

    body = json.dumps({"username": "root", "password": hashlib.sha256(secrets["fastgpt_root_password"].encode()).hexdigest()})
    for _attempt in range(60):
        out = app.run(f"curl -s -m 10 -H 'Content-Type: application/json' -d '{body}' http://{APP}:8080/api/support/user/account/loginByPassword").stdout
        if '"code":200' in out.replace(" ", ""):
            return
        app.run("sleep 1")
    pytest.fail("FastGPT did not let root in within a minute")


def test_the_gateway_s_own_log_file_is_rotated_under_it(app):
    folder = "/var/lib/selfhosted-fastgpt/oneapi/logs"
    before = app.check_output(f"cat {folder}/*.log")
    assert before
    app.check_output("dpkg-query -W logrotate >/dev/null 2>&1 || apt-get install -y -q logrotate >/dev/null")
    app.check_output("logrotate --force /etc/logrotate.d/selfhosted-fastgpt-oneapi")
    # it goes on writing meanwhile, from the file's beginning
    assert set(before.splitlines()).isdisjoint(app.check_output(f"cat {folder}/*.log").splitlines())
    app.check_output(f"curl -s -o /dev/null http://{APP}:8000/api/status")
    app.check_output(f"for i in 1 2 3 4 5 6 7 8 9 10; do grep -q . {folder}/*.log && exit 0; sleep 1; done; exit 1")


def test_runs_were_killed_on_the_way():
    report = json.loads((pathlib.Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "killed-runs.json").read_text(encoding="utf-8"))
    assert report["killed"] == 5
    assert report["process_lines"] >= 50
