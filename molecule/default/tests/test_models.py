# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Several model servers on one host, one model on two hosts, TLS between them, engines in containers, and what breaks when one dies."""

from __future__ import annotations

import concurrent.futures
import json
import ssl
import time
import urllib.error
import urllib.request

import pytest
from lab_hosts import HOSTS, ROOT
from machines import host, status

APP = HOSTS["app-1"]
BODIES = {
    "chat": ("chat/completions", {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 64}),
    "embedding": ("embeddings", {"input": ["one passage", "another passage"]}),
    "rerank": ("rerank", {"query": "what is a cat", "documents": ["a cat is an animal", "the weather is fine"]}),
}


def ask(url, key, kind, model):
    """Status and answer of one real request from the machine that the tests run on."""
    route, body = BODIES[kind]
    request = urllib.request.Request(
        f"{url}/v1/{route}", json.dumps({**body, "model": model}).encode(), {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    )
    context = ssl.create_default_context(cafile=ROOT / ".lab" / "ca" / "ca.pem")
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
        with opener.open(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")
    except OSError as error:
        return 0, str(error)


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
        code, answer = ask(entry["url"], entry["keys"][0], entry["kind"], entry["model"])
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


def count_requests(name):
    return int(host(name).check_output("grep -c /v1/embeddings /var/log/nginx/selfhosted-fastgpt-model_server.log || true") or 0)


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
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(ask, url, key, "rerank", "tiny-cross-encoder") for _number in range(40)]
        gpu.check_output("systemctl kill -s KILL selfhosted-model@8003.service")
        running += [pool.submit(ask, url, key, "rerank", "tiny-cross-encoder") for _number in range(40)]
        answers = [future.result() for future in running]
    assert [code for code, _answer in answers] == [200] * 80, [answer for code, answer in answers if code != 200][:3]
    assert ask(url, "sk-" + "0" * 48, "rerank", "tiny-cross-encoder")[0] == 401
    wait_for(entry_of(every, "tiny-cross-encoder@gpu-1"))


def wait_for(entry, seconds=90):
    deadline = time.monotonic() + seconds
    while ask(entry["url"], entry["keys"][0], entry["kind"], entry["model"])[0] != 200:
        assert time.monotonic() < deadline, f"{entry['name']} did not come back within {seconds} s"
        time.sleep(1)


@pytest.mark.parametrize("name, port", [("all-MiniLM-L6-v2@gpu-1", 8002), ("tiny-qwen2-chat@gpu-1", 8001), ("tiny-legacy-chat@gpu-2", 8001)])
def test_an_engine_killed_under_load_loses_its_own_requests_only_and_comes_back(every, name, port):
    entry = entry_of(every, name)
    others = [other for other in every if other["host"] == entry["host"] and other is not entry]
    machine = host(entry["host"])
    run = machine.check_output(f"systemctl show -p InvocationID --value selfhosted-model@{port}.service")
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        own = [pool.submit(ask, entry["url"], entry["keys"][0], entry["kind"], entry["model"]) for _number in range(30)]
        theirs = [pool.submit(ask, other["url"], other["keys"][0], other["kind"], other["model"]) for other in others for _number in range(10)]
        machine.check_output(f"systemctl kill -s KILL selfhosted-model@{port}.service")
        lost = [answer for code, answer in (future.result() for future in own) if code != 200]
        assert [code for code, _answer in (future.result() for future in theirs)] == [200] * len(theirs)
    # whoever is refused meanwhile learns it in OpenAI's shape
    assert all(answer["error"]["code"] == "upstream_down" for answer in lost if isinstance(answer, dict))
    wait_for(entry)
    assert machine.check_output(f"systemctl show -p InvocationID --value selfhosted-model@{port}.service") != run


def test_vllm_has_its_gpu_and_nothing_more(every):
    gpu = host("gpu-3")
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
    gpu = host("gpu-3")
    gpu.check_output("docker exec model-8001 kill -9 1 || docker kill model-8001 && docker start model-8001")
    wait_for(entry_of(every, "gpu-chat@gpu-3"))


def test_quantization_is_what_was_asked_for():
    command = json.loads(host("gpu-2").check_output("cat /etc/selfhosted-fastgpt/model_server/servers.json"))["servers"][0]["argv"]
    assert command[command.index("--quantize-bit") + 1] == "8"
