# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Several model servers on one host, one model on two hosts, TLS between them, engines in containers, and what breaks when one dies."""

from __future__ import annotations

import contextlib
import json

import pytest
from asking import BROKEN_OFF, ask, ask_entry, load, wait_until
from lab_hosts import HOSTS
from machines import host, status
from rotation import rotated_key

APP = HOSTS["app-1"]


def entry_of(every, name):
    return next(entry for entry in every if entry["name"] == name)


@pytest.fixture(scope="module")
def joint(app):
    """URL and key of the door before both rerankers, as FastGPT has them."""
    (model,) = json.loads(app.check_output("cat /etc/selfhosted-fastgpt/fastgpt/config.json"))["reRankModels"]
    return model["requestUrl"].removesuffix("/v1/rerank"), model["requestAuth"].removeprefix("Bearer ")


def test_every_server_answers_a_real_request_and_those_of_gpu_2_speak_tls(every):
    assert {entry["host"] for entry in every if entry["url"].startswith("https:")} == {"gpu-2"}
    for entry in every:
        code, answer = ask_entry(entry)
        assert code == 200, (entry["name"], answer)


def test_a_certificate_of_another_ca_is_refused(app, every):
    entry = entry_of(every, "all-MiniLM-L6-v2@gpu-2")
    assert app.run(f"curl -s -m 10 {entry['url']}/health").rc == 60
    plain = app.run(f"curl -s -m 10 -o /dev/null -w '%{{http_code}}' {entry['url'].replace('https', 'http')}/health")
    assert plain.stdout == "400"


def test_the_key_of_a_certificate_is_roots_alone():
    found = host("gpu-2").check_output("find /etc/nginx -name '*.key' -printf '%m %u\\n'").split("\n")
    assert found
    assert set(found) == {"600 root"}


def test_both_servers_of_a_model_get_requests_through_the_gateway(every):
    counts = {name: count_requests(name) for name in ("gpu-1", "gpu-2")}
    app = host("app-1")
    (token,) = json.loads(gateway_tokens(app))["data"]
    for _number in range(30):
        code, answer = ask(f"http://{APP}:8000", f"sk-{token['key']}", "embedding", "all-MiniLM-L6-v2")
        assert code == 200, answer
    assert all(count_requests(name) > before for name, before in counts.items())


def gateway_tokens(app):
    from lab_hosts import vault

    return status(app, f"http://{APP}:8000/api/token/search?keyword=", "-H", f"Authorization: {vault()['oneapi_root_access_token']}")[1]


def count_requests(name, pattern="/v1/embeddings"):
    return int(host(name).check_output(f"grep -c '{pattern}' /var/log/nginx/selfhosted-fastgpt-model_server.log || true") or 0)


def run_of(machine, port):
    return machine.check_output(f"systemctl show -p InvocationID --value selfhosted-model@{port}.service")


def test_no_key_is_in_an_access_log(every):
    for name in HOSTS:
        logs = host(name).run("cat /var/log/nginx/*.log").stdout
        assert logs
        assert not [entry["name"] for entry in every if entry["keys"][0] in logs]
        assert "sk-" not in logs


def test_a_reranker_that_dies_is_not_missed(every, joint):
    """FastGPT's door asks the other one; not a single request is lost."""
    url, key = joint
    gpu = host("gpu-1")
    before = {name: count_requests(name, "/v1/rerank") for name in ("gpu-1", "gpu-2")}
    failed = count_requests("gpu-1", '/v1/rerank","status":503')
    run = run_of(gpu, 8003)
    with load(4, lambda: ask(url, key, "rerank", "tiny-cross-encoder")) as answers:
        wait_until(lambda: len(answers) >= 20, 60, "20 answers of both")
        assert all(count_requests(name, "/v1/rerank") > before[name] for name in before), "one of the two was never asked"
        gpu.check_output("systemctl kill -s KILL selfhosted-model@8003.service")
        wait_until(lambda: count_requests("gpu-1", '/v1/rerank","status":503') > failed, 30, "a request that met the dead one")
        other = count_requests("gpu-2", "/v1/rerank")
        wait_until(lambda: count_requests("gpu-2", "/v1/rerank") >= other + 5, 60, "the other one goes on")
        wait_until(lambda: ask_entry(entry_of(every, "tiny-cross-encoder@gpu-1"))[0] == 200, 120, "it comes back")
    assert {code for code, _answer in answers} == {200}, [answer for code, answer in answers if code != 200][:3]
    assert run_of(gpu, 8003) != run
    assert ask(url, "sk-" + "0" * 48, "rerank", "tiny-cross-encoder")[0] == 401


@pytest.mark.parametrize("name, port", [("all-MiniLM-L6-v2@gpu-1", 8002), ("tiny-qwen2-chat@gpu-1", 8001), ("tiny-legacy-chat@gpu-2", 8001)])
def test_an_engine_killed_under_load_loses_its_own_requests_only_and_comes_back(every, name, port):
    entry = entry_of(every, name)
    machine = host(entry["host"])
    run = run_of(machine, port)
    others = [other for other in every if other["host"] == entry["host"] and other is not entry]
    assert len(others) == 2
    with contextlib.ExitStack() as stack:
        theirs = [stack.enter_context(load(1, lambda other=other: ask_entry(other))) for other in others]
        own = stack.enter_context(load(4, lambda: ask_entry(entry)))
        wait_until(lambda: len(own) >= 8 and all(theirs), 120, "all of them answer")
        assert {code for code, _answer in own} == {200}
        machine.check_output(f"systemctl kill -s KILL selfhosted-model@{port}.service")
        wait_until(lambda: own[-1][0] != 200, 30, "somebody notices that it was killed")
        served = [len(answers) for answers in theirs]
        wait_until(lambda: own[-1][0] == 200, 120, "it comes back")
    # an answer that was under way can only be broken off, one for each client at most
    assert [code for code, _answer in own].count(BROKEN_OFF) <= 4
    lost = [answer for code, answer in own if code not in (BROKEN_OFF, 200)]
    # whoever is refused meanwhile learns it in OpenAI's shape
    assert {code for code, _answer in own} - {BROKEN_OFF} == {200, 503}
    assert {answer["error"]["code"] for answer in lost} == {"upstream_down"}
    assert all(len(answers) > before for answers, before in zip(theirs, served, strict=True)), "the others went on meanwhile"
    assert {code for answers in theirs for code, _answer in answers} == {200}
    assert run_of(machine, port) != run


def test_vllm_has_its_gpu_and_nothing_more(every):
    gpu = host("app-1")
    found = json.loads(gpu.check_output("docker inspect model-8001"))[0]
    assert found["HostConfig"]["DeviceRequests"][0]["DeviceIDs"] == ["nvidia.com/gpu=0"]
    assert gpu.check_output("docker exec model-8001 sh -c 'ls /dev/nvidia*'") == "/dev/nvidia0"
    assert found["HostConfig"]["CapDrop"] == ["ALL"]
    assert found["HostConfig"]["Privileged"] is False
    assert "no-new-privileges" in found["HostConfig"]["SecurityOpt"]
    assert found["HostConfig"]["PortBindings"]["8000/tcp"] == [{"HostIp": "127.0.0.1", "HostPort": "18001"}]
    command = found["Config"]["Cmd"]
    assert command[command.index("--gpu-memory-utilization") + 1] not in ("0.000", "1.000")
    # the engine itself asks for a key too, since everybody on its host reaches it
    assert status(gpu, "http://127.0.0.1:18001/v1/models")[0] == 401


def test_a_dead_container_comes_back(every):
    gpu = host("app-1")
    entry = entry_of(every, "gpu-chat@app-1")
    assert ask_entry(entry)[0] == 200
    count = int(gpu.check_output("docker inspect -f '{{.RestartCount}}' model-8001"))
    gpu.check_output("kill -9 $(docker inspect -f '{{.State.Pid}}' model-8001)")
    wait_until(lambda: int(gpu.check_output("docker inspect -f '{{.RestartCount}}' model-8001")) > count, 30, "Docker starts it again")
    wait_until(lambda: ask_entry(entry)[0] == 200, 90, "it comes back")


def test_quantization_is_what_was_asked_for(every):
    gpu = host("gpu-2")
    servers = json.loads(gpu.check_output("cat /etc/selfhosted-fastgpt/model_server/servers.json"))["servers"]
    (command,) = [one["argv"] for one in servers if one["instance"] == "8001"]
    assert command[command.index("--quantize-bit") + 1] == "8"
    # the engine's own words, after it has looked at its layers
    assert "tiny-legacy-chat: 8 bits" in gpu.check_output("journalctl -u selfhosted-model@8001.service -o cat --no-pager")


def test_a_master_key_of_a_rotation_that_was_taken_back_opens_nothing(every, secrets):
    for entry in (one for one in every if one["host"] == "gpu-2"):
        assert ask(entry["url"], rotated_key(secrets, entry), entry["kind"], entry["model"])[0] == 401
