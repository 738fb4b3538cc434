# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[4] / "roles" / "model_server" / "files" / "model_server.py"
TIMER = "selfhosted-model-health.timer"


def unit(instance: str) -> str:
    return f"selfhosted-model@{instance}.service"


def test_first_apply_starts_everything_and_a_second_changes_nothing(host: t.Any) -> None:
    config = host.config(host.server("8001"), host.server("8002"))
    assert set(host.tool.plan(config)["changes"]) == {f"{unit('8001')}: new", f"{unit('8002')}: new", "the health timer is not as it should be"}
    assert len(host.tool.apply(config)["changed"]) == 3
    assert host.states()[unit("8001")] == {"UnitFileState": "enabled", "ActiveState": "active", "InvocationID": "1"}
    assert host.states()[TIMER]["ActiveState"] == "active"
    assert host.tool.plan(config)["changes"] == []
    assert host.tool.apply(config) == {"changed": []}
    assert sum(line.startswith("restart " + unit("8001")) for line in host.log()) == 1


@pytest.mark.parametrize("what", ["argument", "unit", "weights", "engine", "memory", "stopped", "disabled", "drop-in"])
def test_only_what_changed_is_restarted(host: t.Any, what: str) -> None:
    host.tool.apply(host.config(host.server("8001"), host.server("8002")))
    values: dict[str, t.Any] = {"argument": {"argv": ["/bin/true", "x"]}, "memory": {"memory_max": "3G"}}.get(what, {})
    if what == "weights":
        Path(host.server("8002")["weights"], ".complete").write_text("other")
    elif what == "stopped":
        host.set_state(unit("8002"), ActiveState="failed")
    elif what == "disabled":
        host.set_state(unit("8002"), UnitFileState="disabled")
    elif what == "drop-in":
        (host.tool.UNITS / f"{unit('8002')}.d" / "limits.conf").unlink()
    elif what == "unit":
        (host.tool.UNITS / "selfhosted-model@.service").write_text("[Service]\nUser=x\n")
    elif what == "engine":
        (host.engine_dir() / ".complete").write_text("rebuilt")
    changed = host.tool.apply(host.config(host.server("8001"), host.server("8002", **values)))["changed"]
    both = what in ("unit", "engine")
    assert [line.split(":")[0] for line in changed] == ([unit("8001")] if both else []) + [unit("8002")]
    assert host.tool.apply(host.tool.load())["changed"] == []


def test_a_changed_server_that_does_not_run_is_not_waited_for(host: t.Any) -> None:
    host.tool.apply(host.config(host.server("8001"), host.server("8002")))
    host.set_state(unit("8002"), ActiveState="inactive")
    config = host.config(host.server("8001", memory_max="3G"), host.server("8002", memory_max="3G"))
    assert host.tool.plan(config)["changes"] == [f"{unit('8001')}: changed", f"{unit('8002')}: was inactive"]


def test_a_restart_that_failed_is_done_again(host: t.Any) -> None:
    config = host.config(host.server("8001"))
    (host.root / "fail").touch()
    with pytest.raises(host.tool.Trouble, match="restart"):
        host.tool.apply(config)
    (host.root / "fail").unlink()
    assert host.tool.apply(config)["changed"] == [f"{unit('8001')}: new"]
    assert host.tool.apply(config)["changed"] == []


def test_what_is_no_longer_listed_goes(host: t.Any) -> None:
    host.tool.apply(host.config(host.server("8001"), host.server("8002")))
    host.set_state(unit("8009"), ActiveState="active")  # nobody knows where it came from
    (host.tool.STATE / "8002").mkdir()
    changed = host.tool.apply(host.config(host.server("8001")))["changed"]
    assert changed == [f"{unit('8002')}: no longer listed", f"{unit('8009')}: no longer listed"]
    assert set(host.states()) == {unit("8001"), TIMER}
    assert not (host.tool.STATE / "8002").exists() and not (host.tool.UNITS / f"{unit('8002')}.d").exists()


def test_without_servers_the_timer_goes_and_uninstall_leaves_no_unit(host: t.Any) -> None:
    host.tool.apply(host.config(host.server("8001")))
    assert "the health timer is not wanted" in host.tool.apply(host.config())["changed"]
    host.tool.apply(host.config(host.server("8001")))
    assert host.tool.uninstall()["changed"]
    assert list(host.tool.UNITS.iterdir()) == [] and host.states() == {}


def test_unused_engines_go_and_other_directories_stay(host: t.Any) -> None:
    old = host.engine_dir("infinity-ffffffffffff")
    other = host.root / "engines" / "my-own"
    other.mkdir()
    config = host.config(host.server("8001"))
    assert f"{old}: no longer used" in host.tool.plan(config)["changes"]
    host.tool.apply(config)
    assert not old.exists() and other.exists() and host.engine_dir().exists()


def test_plan_says_what_is_missing(host: t.Any) -> None:
    server = host.server("8001")
    config = host.config(server, host.server("8002"))
    Path(server["weights"], ".complete").unlink()
    (host.engine_dir() / ".complete").unlink()
    plan = host.tool.plan(config)
    assert plan["engines"] == ["infinity"] and plan["weights"] == ["m8001@host"]


def test_an_engine_whose_python_moved_on_is_rebuilt(host: t.Any) -> None:
    config = host.config(host.server("8001"))
    library = host.engine_dir() / "lib"
    next(library.iterdir()).rename(library / "python2.7")
    assert host.tool.plan(config)["engines"] == ["infinity"]
    (host.engine_dir() / "bin" / "python").unlink()
    assert host.tool.engine_fault(str(host.engine_dir())) == "its Python is gone"


def test_weights_in_place_need_a_config(host: t.Any, tmp_path: Path) -> None:
    assert host.tool.weights_fault({"path": str(tmp_path), "in_place": True}) == f"{tmp_path} has no config.json"
    (tmp_path / "config.json").touch()
    assert host.tool.weights_fault({"path": str(tmp_path), "in_place": True}) == ""


def run(host: t.Any, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **{f"MODEL_SERVER_{name}": str(getattr(host.tool, name)) for name in ("CONFIG", "STATE", "UNITS", "RUN")}}
    return subprocess.run([sys.executable, str(TOOL), *arguments], env=env, input=stdin, capture_output=True, text=True, check=False)


def test_commands(host: t.Any) -> None:
    config = host.config(host.server("8001"))
    assert json.loads(run(host, "plan", "--stdin", stdin=json.dumps({**config, "servers": []})).stdout)["changes"] == []
    assert len(json.loads(run(host, "apply", "--check").stdout)["changed"]) == 2
    assert host.states() == {}
    assert len(json.loads(run(host, "apply").stdout)["changed"]) == 2
    host.tool.CONFIG.write_text("{")
    answer = run(host, "plan")
    assert answer.returncode == 2 and "not JSON" in answer.stderr and "Traceback" not in answer.stderr


def test_launch_becomes_the_engine(host: t.Any) -> None:
    directory = host.root / "state" / "8001"
    directory.mkdir()
    (directory / "model-x").symlink_to("/nowhere")
    server = host.server("8001", argv=["/bin/sh", "-c", "pwd; ls; readlink model-x; echo $A$HOME"], env={"A": "b", "PATH": "/bin"})
    server.update(directories=["cache/hub"], links={"model-x": server["weights"]}, needs=[server["weights"] + "/config.json"])
    host.config(server)
    assert run(host, "launch", "8001").stdout.split() == [str(directory), "cache", "model-x", server["weights"], "b"]
    Path(server["weights"], "config.json").unlink()
    answer = run(host, "launch", "8001")
    assert answer.returncode == 2 and "run the role model_server again" in answer.stderr
    assert "systemctl disable" in run(host, "launch", "8009").stderr


@pytest.mark.parametrize(
    ("kind", "answer", "detail"),
    [
        ("embedding", {"data": [{"embedding": [0.1, 0.2, 0.3]}]}, ""),
        ("embedding", {"data": [{"embedding": [0.1]}]}, "1 dimensions, the model card says 3"),
        ("embedding", {"data": [{"embedding": [0.1, 0.2, float("nan")]}]}, "no numbers"),
        ("embedding", {"data": []}, "another shape"),
        ("embedding", [], "another shape"),
        ("rerank", {"results": [{"relevance_score": 0.1}, {"relevance_score": 0.2}]}, ""),
        ("rerank", {"results": [{"relevance_score": 0.1}]}, "not every document"),
        ("rerank46", {"data": [{"score": 1}]}, ""),
        ("rerank46", {"data": []}, "not every input"),
        ("chat", {"choices": [{"message": {"content": ""}}]}, ""),
        ("chat", {"choices": []}, "another shape"),
    ],
)
def test_a_real_answer_is_asked_for(host: t.Any, fake_engine: t.Any, kind: str, answer: t.Any, detail: str) -> None:
    fake_engine.answer = lambda path, body: (200, answer)
    result = host.tool.probe(host.config(host.server("8001", fake_engine.port, kind)), 0)
    assert result["ok"] == (detail == "") and detail in result["servers"][0]["detail"]
    if detail:
        assert "it said something" in result["servers"][0]["detail"]


def test_errors_and_silence_are_told_apart(host: t.Any, fake_engine: t.Any) -> None:
    fake_engine.answer = lambda path, body: (503, {"error": "CB worker is dead"})
    assert "HTTP 503" in host.tool.ask(host.server("8001", fake_engine.port), 5)["detail"]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert host.tool.ask(host.server("8001", silent.getsockname()[1]), 0.2)["slow"]
    assert "no connection" in host.tool.ask(host.server("8001", 1), 5)["detail"]


def test_waiting_ends_early_for_an_engine_that_keeps_dying(host: t.Any, fake_engine: t.Any) -> None:
    fake_engine.answer = lambda path, body: (200, {"data": [{"embedding": [1, 2, 3]}]})
    host.set_state(unit("8001"), ActiveState="activating", NRestarts=5)
    result = host.tool.probe(host.config(host.server("8001", 1), host.server("8002", fake_engine.port)), 60)
    assert [one["ok"] for one in result["servers"]] == [False, True]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root sees whose socket it is")
def test_an_old_process_that_holds_the_port_is_not_the_engine(host: t.Any, fake_engine: t.Any) -> None:
    fake_engine.answer = lambda path, body: (200, {"data": [{"embedding": [1, 2, 3]}]})
    config = host.config(host.server("8001", fake_engine.port))
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        host.set_state(unit("8001"), ActiveState="active", MainPID=sleeper.pid)
        detail = host.tool.probe(config, 0)["servers"][0]["detail"]
        assert f"held by process {os.getpid()}" in detail
        host.set_state(unit("8001"), MainPID=os.getpid())
        assert host.tool.probe(config, 0)["ok"]
    finally:
        sleeper.kill()
        sleeper.wait()


def test_the_timer_restarts_after_two_failures_and_not_before(host: t.Any, fake_engine: t.Any) -> None:
    config = host.config(host.server("8001", fake_engine.port))
    host.tool.apply(config)
    host.set_state(unit("8001"), ActiveEnterTimestampMonotonic=10**15)  # just started
    fake_engine.answer = lambda path, body: (500, {})
    for _round in range(4):  # not ready yet is no failure
        assert host.tool.watch(config)["restarted"] == []
    fake_engine.answer = lambda path, body: (200, {"data": [{"embedding": [1, 2, 3]}]})
    assert host.tool.watch(config)["restarted"] == []
    fake_engine.answer = lambda path, body: (500, {})
    assert host.tool.watch(config)["restarted"] == []
    assert host.tool.watch(config)["restarted"] == [unit("8001")]
    assert host.tool.watch(config)["restarted"] == []  # a new run starts from nothing
    host.set_state(unit("8001"), ActiveState="inactive")
    assert host.tool.watch(config)["restarted"] == []


def test_a_late_answer_of_a_living_server_counts_half(host: t.Any, fake_engine: t.Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = host.config(host.server("8001", fake_engine.port))
    host.tool.apply(config)
    fake_engine.answer = lambda path, body: (200, {})
    monkeypatch.setattr(host.tool, "ask", lambda server, timeout: {"ok": False, "slow": True, "detail": "late"})
    rounds = [bool(host.tool.watch(config)["restarted"]) for _round in range(4)]
    assert rounds == [False, False, False, True]
    fake_engine.answer = lambda path, body: (503, {})
    assert [bool(host.tool.watch(config)["restarted"]) for _round in range(2)] == [False, True]


def test_a_broken_memory_does_not_stop_the_timer(host: t.Any) -> None:
    shutil.rmtree(host.tool.RUN)
    assert host.tool.watch(host.config())["restarted"] == []
    (host.tool.RUN / "health.json").write_text("{")
    assert host.tool.watch(host.config())["restarted"] == []


def test_a_container_is_asked_and_restarted_but_never_started_here(host: t.Any, fake_engine: t.Any) -> None:
    keys = host.root / "keys.json"
    keys.write_text('{"8001": "sk-engine"}')
    server = host.server("8001", fake_engine.port, container="model-8001", key_file=str(keys))
    config = host.config(server)
    assert host.tool.plan(config)["changes"] == ["container model-8001: new", "the health timer is not as it should be"]
    host.tool.apply(config)
    assert host.tool.plan(config)["changes"] == []
    assert host.tool.differences(config) == ({}, {}) and not any("selfhosted-model@" in line for line in host.log() if "list-units" not in line)
    fake_engine.answer = lambda path, body: (200, {"data": [{"embedding": [1, 2, 3]}]})
    host.set_container("model-8001")
    assert host.tool.watch(config)["restarted"] == []
    assert fake_engine.headers[-1]["Authorization"] == "Bearer sk-engine"
    fake_engine.answer = lambda path, body: (500, {})
    assert host.tool.watch(config)["restarted"] == []
    assert host.tool.watch(config)["restarted"] == ["container model-8001"]
    assert host.tool.watch(config)["restarted"] == [], "a new run starts from nothing"
    host.set_container("model-8001", running=False)
    assert host.tool.watch(config)["restarted"] == [], "stopped by somebody"


def test_a_container_that_keeps_dying_is_not_waited_for(host: t.Any) -> None:
    host.set_container("model-8001", restarts=5)
    result = host.tool.probe(host.config(host.server("8001", 1, container="model-8001")), 60)
    assert not result["ok"] and "docker logs model-8001:\nCUDA out of memory" in result["servers"][0]["detail"]


def test_a_container_that_is_gone_is_told(host: t.Any) -> None:
    result = host.tool.probe(host.config(host.server("8001", 1, container="model-8001")), 0)
    assert not result["ok"] and "no connection" in result["servers"][0]["detail"]


def test_a_key_that_is_missing_is_told(host: t.Any, fake_engine: t.Any) -> None:
    fake_engine.answer = lambda path, body: (401, {"error": "Unauthorized"})
    server = host.server("8001", fake_engine.port, key_file=str(host.root / "none.json"))
    assert "run the role model_server again" in host.tool.ask(server, 5)["detail"]


def test_gpus_are_let_through_and_nothing_else(host: t.Any) -> None:
    text = host.tool.dropin(host.server("8001", gpus=[0, 1]))
    assert "PrivateDevices=no" in text and "DeviceAllow=char-nvidia* rw" in text and "DevicePolicy=closed" in text
    assert "PrivateDevices" not in host.tool.dropin(host.server("8001", gpus=[]))


def test_containers_that_are_no_longer_listed_go(host: t.Any) -> None:
    host.set_container("model-8001")
    assert host.tool.plan(host.config())["changes"] == ["container model-8001: no longer listed"]
    assert host.tool.apply(host.config())["changed"] == ["container model-8001: no longer listed"]
    assert host.tool.plan(host.config())["changes"] == []
    host.set_container("model-8001")
    assert host.tool.gone_containers(host.config(host.server("8001", container="model-8001"))) == []


TOKENIZER = '''
class Tokenizer(PreTrainedTokenizer):
    def __init__(self, vocab_file, **kwargs):
        self.kwargs = kwargs
        super().__init__(vocab_file=vocab_file, **kwargs)
        self.vocab_file = vocab_file
        self.sp_model = Reader(vocab_file)

    def get_vocab(self):
        return self.sp_model.vocabulary
'''


def test_a_tokenizer_reads_its_vocabulary_before_its_base_asks_for_it(host: t.Any) -> None:
    class Base:
        def __init__(self, **kwargs: t.Any) -> None:
            self.asked = self.get_vocab()  # type: ignore[attr-defined]

    class Reader:
        def __init__(self, path: str) -> None:
            self.vocabulary = {path: 1}

    names: dict[str, t.Any] = {"PreTrainedTokenizer": Base, "Reader": Reader}
    exec(TOKENIZER, names)  # noqa: S102 - our own text
    with pytest.raises(AttributeError):
        names["Tokenizer"]("v")
    exec(host.tool.mended(TOKENIZER), names)  # noqa: S102
    assert names["Tokenizer"]("v").asked == {"v": 1}
    once = host.tool.mended(TOKENIZER)
    assert host.tool.mended(once) == once


def test_a_mended_tokenizer_is_written_once_and_again_when_the_weights_change(host: t.Any) -> None:
    server = host.server("8001", container="model-8001", mend="tokenization.py")
    config = host.config(server)
    source = Path(server["weights"]) / "tokenization.py"
    assert any("is not there" in line for line in host.tool.plan(config)["changes"])
    source.write_text(TOKENIZER)
    assert "tokenizer of m8001@host: not mended" in host.tool.plan(config)["changes"]
    assert "tokenizer of m8001@host: mended" in host.tool.apply(config)["changed"]
    assert host.tool.plan(config)["changes"] == []
    host.set_container("model-8001")
    source.write_text(TOKENIZER.replace("vocab_file = vocab_file", "file = vocab_file"))
    assert host.tool.plan(config)["changes"] == ["tokenizer of m8001@host: not mended"]
    assert host.restarts("model-8001") == 0
    assert host.tool.apply(config)["changed"] == ["tokenizer of m8001@host: mended", "container model-8001: its files changed"]
    # a mount of one file shows the file that it was at the start, whatever has its name now
    assert host.restarts("model-8001") == 1
    assert host.tool.apply(config)["changed"] == [] == host.tool.plan(config)["changes"] and host.restarts("model-8001") == 1
    Path(server["weights"], ".complete").write_text("others")
    assert host.tool.apply(config)["changed"] == ["container model-8001: its files changed"] and host.restarts("model-8001") == 2
    source.write_text("def")
    with pytest.raises(host.tool.Trouble, match="damaged"):
        host.tool.plan(config)


def test_a_restart_of_a_container_that_failed_is_done_again(host: t.Any) -> None:
    server = host.server("8001", container="model-8001")
    config = host.config(server)
    host.tool.apply(config)
    host.set_container("model-8001")
    Path(server["weights"], ".complete").write_text("others")
    (host.root / "fail").touch()
    with pytest.raises(host.tool.Trouble, match="docker restart model-8001: no room"):
        host.tool.apply(config)
    (host.root / "fail").unlink()
    assert host.tool.apply(config)["changed"] == ["container model-8001: its files changed"] and host.restarts("model-8001") == 1
    (host.root / "fail").touch()
    with pytest.raises(host.tool.Trouble, match="docker rm --force model-8001: no room"):
        host.tool.apply(host.config())


def test_a_tokenizer_that_the_weights_do_not_have_is_refused(host: t.Any) -> None:
    config = host.config(host.server("8001", container="model-8001", mend="tokenization.py"))
    with pytest.raises(host.tool.Trouble, match=r"tokenization.py is not there.*Correct mend_tokenizer"):
        host.tool.apply(config)


@pytest.mark.parametrize("contained", [False, True])
def test_the_timer_says_that_it_could_not_restart(host: t.Any, fake_engine: t.Any, capsys: pytest.CaptureFixture[str], contained: bool) -> None:
    server = host.server("8001", fake_engine.port, **({"container": "model-8001"} if contained else {}))
    config = host.config(server)
    host.tool.apply(config)
    host.set_container("model-8001")
    fake_engine.answer = lambda path, body: (200, {"data": [{"embedding": [1, 2, 3]}]})
    assert host.tool.watch(config) == {"ok": True, "restarted": []}
    fake_engine.answer = lambda path, body: (500, {})
    host.tool.watch(config)
    (host.root / "fail").touch()
    assert host.tool.main(["probe", "--restart"]) == 1
    assert "cannot be restarted" in capsys.readouterr().err
    (host.root / "fail").unlink()
    assert host.tool.watch(config) == {"ok": True, "restarted": ["container model-8001" if contained else unit("8001")]}


def test_the_code_of_our_engine_is_compared(host: t.Any) -> None:
    code = host.root / "legacy_chat"
    code.mkdir()
    (code / "a.py").write_text("x")
    config = host.config(code={"dir": str(code), "sha256": hashlib.sha256(b"a.py\nx\n").hexdigest()})
    assert not host.tool.plan(config)["code"]
    (code / "a.py").write_text("y")
    assert host.tool.plan(config)["code"] and "code of the engine legacy_chat: differs" in host.tool.plan(config)["changes"]
