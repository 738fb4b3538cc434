# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""prepare.py with the real clients of both hubs, against a local one."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
import typing as t
from pathlib import Path

import pytest
from conftest import PREPARE, Host, tiny_model

FIRST = "model-00001-of-00002.safetensors"
TOKEN = "hf_of_nobody"


def test_lands_whole_readable_and_pinned(host: Host, hub: t.Any) -> None:
    files = tiny_model()
    commit = hub.add("org/m", {**files, ".gitattributes": b"", "onnx/model.onnx": b"x" * 3000, "pytorch_model.bin": b"y" * 3000})
    weights = host.weights(exclude=["onnx/*"])
    assert host.run(host.job(weights)) == ""
    marker = host.has(files, weights)
    assert (marker["commit"], marker["source"], marker["id"]) == (commit if host.source == "huggingface" else "", host.source, "org/m")
    target = Path(weights["path"])
    assert {path.stat().st_mode & 0o777 for path in target.rglob("*") if path.is_file() and path.name != ".complete"} == {0o644}
    assert (target / "1_Pooling").stat().st_mode & 0o777 == 0o755 and host.state()["changed"] == ["weights of m"]
    assert hub.sent("*.onnx") == 0 and hub.sent("*.bin") == 0, "a pickle of what is there as safetensors"

    # the branch moves on: what a branch was resolved to stays, without a question
    hub.add("org/m", {**files, "config.json": b'{"model_type": "bert", "new": 1}'}, tag="v2")
    hub.asked.clear()
    assert host.run(host.job(weights)) == "" and host.state()["changed"] == [] and hub.asked == []
    other = host.weights(revision="v2")
    assert host.run(host.job(other)) == ""
    assert b"new" in (Path(other["path"]) / "config.json").read_bytes()
    marker_2 = json.loads((Path(other["path"]) / ".complete").read_text())
    assert marker_2["listing"] != marker["listing"] and marker_2["revision"] == "v2"


def test_goes_through_what_passes(host: Host, hub: t.Any) -> None:
    files = tiny_model()
    hub.add("org/m", files)
    hub.fault("org/m", "status", status=503)
    hub.fault("org/m", "status", status=429, wait=1)
    hub.fault(FIRST, "drop", after=100_000, times=2)
    hub.fault("model-00002*", "status", status=500, times=3)
    hub.fault("config.json", "status", status=429, wait=1)
    hub.fault("tokenizer.json", "wrong")
    begun = time.monotonic()
    assert host.run() == ""
    host.has(files)
    assert time.monotonic() - begun > 1, "Retry-After was kept"
    assert hub.sent(FIRST) <= len(files[FIRST]) + 2 * 65536, "went on where the line broke"
    assert hub.sent("tokenizer.json") == 10_000 and hub.sent("model-00002*") == len(files["model-00002-of-00002.safetensors"])


def test_a_server_that_ignores_ranges_costs_bytes_only(host: Host, hub: t.Any) -> None:
    files = tiny_model()
    hub.add("org/m", files)
    hub.fault(FIRST, "drop", after=100_000)
    hub.fault(FIRST, "whole")
    assert host.run() == ""
    host.has(files)
    assert hub.sent(FIRST) == len(files[FIRST]) + 100_000


@pytest.mark.parametrize("kind", ["wrong", "short"])
def test_a_damaged_file_never_serves_and_is_alone_fetched_again(host: Host, hub: t.Any, kind: str) -> None:
    files = tiny_model()
    hub.add("org/m", files)
    hub.fault(FIRST, kind, times=99, after=50_000)
    error = host.run()
    for text in ("weights of m", hub.url, "org/m", FIRST, "take another source"):
        assert text in error
    tries = sum(one.method == "GET" and one.file == FIRST for one in hub.asked)
    assert 2 <= tries <= 10 and not Path(host.weights()["path"]).exists()
    hub.faults.clear()
    sent = hub.sent()
    assert host.run() == ""
    host.has(files)
    assert hub.sent() - sent < len(files[FIRST]) + 10_000, "the others were kept"


def test_killed_at_random_it_goes_on_and_leaves_nobody(host: Host, hub: t.Any) -> None:
    files = tiny_model(1_500_000)
    hub.add("org/m", files)
    hub.fault("*.safetensors", "slow", rate=1_000_000, times=99)
    whole, draw = sum(map(len, files.values())), random.Random(host.source)  # noqa: S311 - moments of a test
    target, kept = Path(host.weights()["path"]), 0

    def landed() -> int:
        """Bytes of files, whole and half ones."""
        found = [path for folder in ("files", "parts") for path in target.parent.glob(f".*.new/{folder}/**/*")]
        return sum(path.stat().st_size for path in found if path.is_file())

    for share in (0.0, draw.uniform(0.01, 0.2), draw.uniform(0.01, 0.2), draw.uniform(0.01, 0.2)):
        process, deadline = host.start(host.job()), time.monotonic() + 20
        while not (landed() - kept > share * whole if share else host.clients()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert host.gone(), "nobody writes on behind a killed run"
        assert not target.exists()
        assert sum(path.is_file() for path in target.parent.rglob("*")) <= 2 * len(files) + 5, "halves pile up"
        assert landed() - kept >= share * whole, "what had landed stays"
        kept = landed()
    hub.faults.clear()
    # the answers to the dead have their own records
    hub.asked.clear()
    assert host.run() == ""
    host.has(files)
    assert hub.sent() <= whole - kept, "what lies there is not fetched again"


def test_two_hosts_on_one_share_and_two_models(host: Host, hub: t.Any) -> None:
    first, second = tiny_model(), tiny_model(100_000, seed=2)
    hub.add("org/m", first)
    hub.add("org/n", second)
    hub.fault("*.safetensors", "slow", rate=400_000, times=8)
    both = [host.weights(), host.weights("org/n", model="n")]
    runs = [host.start(host.job(*both), run="one"), host.start(host.job(*reversed(both)), run="two"), host.start(host.job(*both), run="one")]
    assert [(run.communicate(timeout=60), run.returncode)[1] for run in runs] == [0, 0, 0]
    host.has(first, both[0])
    host.has(second, both[1])
    assert hub.sent() == sum(map(len, [*first.values(), *second.values()])), "fetched once"


def test_what_another_revision_left_half_is_swept(host: Host, hub: t.Any) -> None:
    files = tiny_model()
    hub.add("org/m", files, tag="v1")
    hub.fault("*", "wrong", times=99)
    assert host.run(host.job(host.weights(revision="v1"))) != ""
    hub.faults.clear()
    assert [path.name for path in (host.models / "m").iterdir()] == [f".{host.source}-v1.new"]
    assert host.run() == ""
    host.has(files)


def test_a_branch_that_moves_during_the_download(host: Host, hub: t.Any) -> None:
    hub.add("org/m", tiny_model())
    hub.fault("tokenizer.json", "status", status=400, times=1)
    assert "HTTP 400" in host.run()
    moved = {**tiny_model(seed=3), "new.json": b"{}"}
    if host.source == "huggingface":
        # a commit stays what it is, though the branch is elsewhere
        hub.add("org/m", moved)
        assert host.run() == ""
        host.has(tiny_model())
        return
    hub.add("org/m", moved)
    assert host.run() == ""
    host.has(moved)


def test_a_commit_that_is_gone_is_resolved_anew(host: Host, hub: t.Any) -> None:
    old = hub.add("org/m", tiny_model())
    hub.fault("tokenizer.json", "status", status=400)
    assert "HTTP 400" in host.run()
    files = tiny_model(seed=4)
    hub.add("org/m", files)
    del hub.repositories["org/m"].commits[old]
    assert host.run() == ""
    host.has(files)


def test_progress_is_visible(host: Host, hub: t.Any) -> None:
    hub.add("org/m", tiny_model(2_000_000))
    hub.fault("*.safetensors", "slow", rate=500_000, times=99)
    process = host.start(host.job())
    deadline, said = time.monotonic() + 15, ""
    while "/s," not in said and time.monotonic() < deadline:
        time.sleep(0.2)
        if (host.root / "run" / "prepare.json").exists():
            said = host.state()["doing"]
    process.kill()
    process.wait()
    assert said.startswith("weights of m: ") and " of 2.7 MB" in said and said.endswith(" left")
    argv, env = [sys.executable, str(PREPARE), "--progress", "--since", "0"], {**host.env, "MODEL_SERVER_RUN": str(host.root / "run")}
    told = json.loads(subprocess.run(argv, env=env, capture_output=True, check=True).stdout)
    assert told["done"] and "goes on where it stopped" in told["error"]


# ---------------------------------------------------------------- refusals


def test_what_is_not_there(host: Host, hub: t.Any) -> None:
    hub.add("org/m", tiny_model())
    error = host.run(host.job(host.weights("org/nothing")))
    assert all(text in error for text in ("weights of m", hub.url, "org/nothing", "HTTP 40", "weights.id"))
    error = host.run(host.job(host.weights(revision="nowhere")))
    assert all(text in error for text in ("org/m (revision nowhere)", "HTTP 404", "nowhere"))
    assert "weights.revision" in error or host.source == "modelscope"
    hub.add("org/empty", {"readme": b"x"})
    assert "no config.json" in host.run(host.job(host.weights("org/empty")))
    assert not [path for path in host.models.rglob("*") if path.name == ".complete"]


def test_private_ones_want_their_token(host: Host, hub: t.Any) -> None:
    files = tiny_model()
    hub.add("org/m", files, token=TOKEN, gated=host.source == "huggingface")
    assert f"set model_server_{host.source}_token" in host.run()
    error = host.run(host.job(token="hf_a_wrong_one"))
    assert "hf_a_wrong_one" not in error and ("is not let in" in error or host.source == "modelscope")
    process = host.start(host.job(token=TOKEN))
    seen = ""
    while process.poll() is None:
        for client in host.clients():
            try:
                seen += Path("/proc", client, "cmdline").read_text() + Path("/proc", client, "environ").read_text()
            except OSError:
                pass
        time.sleep(0.02)
    assert process.stdout and TOKEN not in process.stdout.read() and seen and TOKEN not in seen
    host.has(files)
    assert not [one for one in hub.asked if one.path.startswith("/store/") and one.token and one.path.count(TOKEN)]
    written = [path for path in host.root.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert written == []


def test_the_network_is_named(host: Host, hub: t.Any, tmp_path: Path) -> None:
    hub.add("org/m", tiny_model())
    host.env["no_proxy"] = ""
    for name in ("http_proxy", "https_proxy"):
        host.env[name] = "http://me:secret@127.0.0.1:9"
    error = host.run()
    assert "proxy_env (now: http://***@127.0.0.1:9)" in error and "secret" not in error
    for name in ("http_proxy", "https_proxy"):
        del host.env[name]
    error = host.run(host.job(endpoints={host.source: "http://hub.invalid"}))
    assert "http://hub.invalid" in error and "name server" in error
    error = host.run(host.job(endpoints={host.source: "http://127.0.0.1:9"}))
    assert "Connection refused" in error and "proxy_env" in error
    hub.fault("org/m", "not_json", times=9)
    assert "not JSON" in host.run()


def test_a_certificate_of_nobody(host: Host, tmp_path: Path, hub: t.Any) -> None:
    certificate = tmp_path / "both.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*make, "-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "cert")], check=True, capture_output=True)
    certificate.write_text((tmp_path / "key").read_text() + (tmp_path / "cert").read_text())
    with type(hub)(certificate=certificate) as signed:
        files = tiny_model(20_000)
        signed.add("org/m", files)
        wanted = host.job(endpoints={host.source: signed.url})
        error = host.run(wanted)
        assert "ertificate" in error.lower() and "ca-certificates" in error
        # what the host trusts is trusted
        host.env["SSL_CERT_FILE"] = str(tmp_path / "cert")
        assert host.run(wanted) == ""
        host.has(files)


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil-of-hub"])
def test_names_that_lead_out_are_refused(host: Host, hub: t.Any, name: str) -> None:
    hub.add("org/m", {**tiny_model(3000), "victim": b"evil"})
    hub.listed["victim"] = {"rfilename": name, "Path": name}
    error = host.run()
    assert "its listing holds" in error and repr(name)[1:-1] in error
    assert hub.sent() == 0 and not [path for path in host.root.rglob("*") if "evil" in path.name] and not Path("/tmp/evil-of-hub").exists()


IN_A_SMALL_DISK = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size={size} none {models} && {fill} exec "$@"', "sh")


def small(host: Host, size: str, fill: str = "") -> tuple[str, ...]:
    host.models.mkdir(exist_ok=True)
    return tuple(part.format(size=size, models=host.models, fill=fill) if "{" in part else part for part in IN_A_SMALL_DISK)


def test_a_disk_too_small_is_said_before(host: Host, hub: t.Any) -> None:
    hub.add("org/m", tiny_model(900_000))
    hub.add("org/n", tiny_model(600_000))
    error = host.run(host.job(host.weights(), host.weights("org/n", model="n")), before=small(host, "10m"))
    assert "2.0 MB are still to come" in error and "m 1.2 MB" in error and "n 805.1 kB" in error and "10.5 MB are free" in error
    assert "model_server_weights_dir" in error and hub.sent() == 0


def test_a_disk_that_fills_up_meanwhile(host: Host, hub: t.Any) -> None:
    hub.add("org/m", tiny_model(1_500_000))
    hub.fault("*.safetensors", "slow", rate=600_000, times=99)
    # another one fills the disk as soon as the download has begun
    watch = "(until [ $(du -sk {models} | cut -f1) -gt 400 ]; do sleep 0.05; done; dd if=/dev/zero of={models}/other bs=64k 2>/dev/null) &"
    error = host.run(before=small(host, "14m", watch.format(models=host.models)))
    assert "No space left on device" in error and "Make room" in error and "goes on from there" in error
