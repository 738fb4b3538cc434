# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""fastgpt_config as Ansible runs it, on real files."""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import typing as t

import pytest
from fixtures_mongodb import REPO, run_mongo_module

SECRET = "sk-0123456789abcdef-secret"
BASE: dict[str, t.Any] = {
    "version": "v4.8.9",
    "llm_models": [{"model": "chat", "maxContext": 4096, "maxResponse": 1024, "quoteMaxToken": 2000}],
    "vector_models": [{"model": "M3E-large", "dimensions": 1024}],
    "rerank_models": [{"model": "rerank", "requestUrl": "http://192.0.2.1:8003/v1/rerank", "requestAuth": SECRET}],
}


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "config.json"


def config(path: pathlib.Path, *, check: bool = False, **changes: t.Any) -> dict[str, t.Any]:
    result = run_mongo_module("fastgpt_config", {"path": str(path), **BASE, **changes}, check=check)
    assert SECRET not in result["_raw"]
    return result


def done(result: dict[str, t.Any], changed: bool) -> dict[str, t.Any]:
    assert not result.get("failed"), result.get("msg")
    assert result["changed"] is changed, result
    return result


def mode(path: pathlib.Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_write_check_and_again(path: pathlib.Path) -> None:
    predicted = done(config(path, check=True), True)
    assert not path.exists()
    made = done(config(path), True)
    assert made["diff"] == predicted["diff"] and made["era"] == "B"
    assert made["diff"]["before"] == "" and '"requestAuth": "********"' in made["diff"]["after"]
    assert made["models"] == {"llm": ["chat"], "vector": ["M3E-large"], "rerank": ["rerank"]}
    assert mode(path) == 0o640
    written = json.loads(path.read_text())
    assert written["reRankModels"][0]["requestAuth"] == SECRET
    assert "dimensions" not in written["vectorModels"][0]
    inode = path.stat().st_ino
    again = done(config(path), False)
    assert path.stat().st_ino == inode and again["diff"]["before"] == again["diff"]["after"]
    done(config(path, check=True), False)


def test_reordered_and_reindented_file_is_left_alone(path: pathlib.Path) -> None:
    done(config(path), True)
    value = json.loads(path.read_text())
    path.write_text(json.dumps({k: value[k] for k in reversed(value)}, separators=(",", ":")))
    done(config(path), False)


def test_comments_are_removed_and_the_diff_says_so(path: pathlib.Path) -> None:
    done(config(path), True)
    plain = path.read_text()
    path.write_text("// a comment\n" + plain)
    result = done(config(path), True)
    assert "comments" in result["diff"]["before_header"] and result["diff"]["before"] == result["diff"]["after"]
    assert path.read_text() == plain


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"\xff\xfe\x00", b"", b"[]", b'{"reRankModels": 3, "llmModels": [1, null]}', b"{a: NaN}"])
def test_an_unreadable_file_is_replaced(path: pathlib.Path, content: bytes) -> None:
    path.write_bytes(content)
    done(config(path, check=True), True)
    assert path.read_bytes() == content
    done(config(path), True)
    done(config(path), False)


def test_changed_secret_shows_without_being_shown(path: pathlib.Path) -> None:
    done(config(path), True)
    old = path.read_text()
    rerank = [{**BASE["rerank_models"][0], "requestAuth": "sk-another-key-0123"}]
    result = done(config(path, rerank_models=rerank), True)
    assert "(differs)" in result["diff"]["after"] and "sk-" not in result["diff"]["before"] + result["diff"]["after"]
    assert path.read_text() == old.replace(SECRET, "sk-another-key-0123")


def test_order_of_models_is_a_change(path: pathlib.Path) -> None:
    two = [*BASE["llm_models"], {**BASE["llm_models"][0], "model": "second"}]
    done(config(path, llm_models=two), True)
    done(config(path, llm_models=two), False)
    done(config(path, llm_models=two[::-1]), True)


def test_mode_owner_and_backup(path: pathlib.Path) -> None:
    done(config(path, mode="0600"), True)
    assert mode(path) == 0o600
    # A mode that is not given is not touched on an existing file.
    done(config(path), False)
    assert mode(path) == 0o600
    changed = done(config(path, mode="0640", check=True), True)
    assert mode(path) == 0o600 and changed["changed"]
    done(config(path, mode="0640"), True)
    if os.geteuid() == 0:
        done(config(path, owner="1001", group="1001"), True)
        assert (path.stat().st_uid, path.stat().st_gid) == (1001, 1001)
        done(config(path, owner="1001", group="1001"), False)
    result = done(config(path, system_env={"qaMaxProcess": 3}, backup=True), True)
    backup = pathlib.Path(result["backup_file"])
    assert json.loads(backup.read_text())["systemEnv"]["qaMaxProcess"] == 15 and mode(backup) == 0o640
    assert mode(path) == 0o640
    if os.geteuid() == 0:
        assert path.stat().st_uid == 1001


def test_symbolic_link_is_followed(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path.symlink_to(tmp_path / "real.json")
    done(config(path), True)
    assert path.is_symlink() and (tmp_path / "real.json").is_file()
    done(config(path), False)


def test_links_that_lead_nowhere(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path.symlink_to(tmp_path / "absent" / "real.json")
    assert f"the directory {tmp_path / 'absent'} does not exist" in config(path)["msg"]
    path.unlink()
    path.symlink_to(path)
    assert "not a regular file" in config(path)["msg"]
    path.unlink()
    path.symlink_to(tmp_path)
    assert "is a directory" in config(path)["msg"]


def test_what_is_no_file_is_refused_without_being_read(path: pathlib.Path) -> None:
    os.mkfifo(path)
    assert "not a regular file" in config(path)["msg"]


@pytest.mark.parametrize("option", ["owner", "group"])
def test_unknown_owner_is_told_before_anything_is_written(path: pathlib.Path, option: str) -> None:
    result = config(path, **{option: "nosuch"})
    assert result["failed"] and f"this host has no such {option}" in result["msg"] and "1001" in result["msg"]
    assert list(path.parent.iterdir()) == []
    # The account may be made by the same run.
    done(config(path, check=True, **{option: "nosuch"}), True)


@pytest.mark.parametrize("bad", ["rw", "0888", "u+q", "640 "])
def test_impossible_mode_is_told_before_anything_is_written(path: pathlib.Path, bad: str) -> None:
    for check in (True, False):
        result = config(path, mode=bad, check=check)
        assert result["failed"] and "must be octal" in result["msg"]
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(("given", "found"), [("u=rw,g=r,o=", 0o640), (0o604, 0o604), ("0o600", 0o600), ("a-rwx,u+r", 0o400)])
def test_modes_that_ansible_knows(path: pathlib.Path, given: t.Any, found: int) -> None:
    done(config(path, mode=given), True)
    assert mode(path) == found
    done(config(path, mode=given), False)


def test_a_file_that_fastgpt_cannot_read_is_warned_of(path: pathlib.Path) -> None:
    def warned(result: dict[str, t.Any]) -> bool:
        return any("user 1001" in text for text in result["warnings"])

    assert warned(config(path)) and warned(config(path)) and warned(config(path, check=True))
    assert not warned(config(path, mode="0644"))
    assert not warned(config(path, mode="0640", check=True))
    if os.geteuid() == 0:
        for owner, group, bits in (("1001", "0", "0400"), ("0", "1001", "0640")):
            assert not warned(config(path, owner=owner, group=group, mode=bits))
        assert warned(config(path, owner="1001", group="0", mode="0044"))


@pytest.fixture
def open_dir() -> t.Iterator[pathlib.Path]:
    """A directory that other users can reach, unlike those of pytest."""
    directory = pathlib.Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


# The module in a process whose user is changed, or which is killed at its nth step on the files.
CHILD = """
import os, runpy, signal, sys
from ansible.module_utils import basic
user, watched, fatal = int(sys.argv[1]), sys.argv[2].split(":"), int(sys.argv[3])
basic._ANSIBLE_ARGS, basic._ANSIBLE_PROFILE = sys.stdin.buffer.read(), "legacy"
seen = 0
def hook(event, args):
    global seen
    paths = [os.fsdecode(a) for a in args if isinstance(a, (str, bytes))]
    if event.split(".")[0] not in ("open", "os", "shutil", "tempfile") or not any(w in p for p in paths for w in watched):
        return
    seen += 1
    if seen == fatal:
        os.kill(os.getpid(), signal.SIGKILL)
if fatal:
    sys.addaudithook(hook)
if user:
    os.setgroups([]); os.setgid(user); os.setuid(user)
runpy.run_module("ansible_collections.selfhosted.fastgpt.plugins.modules.fastgpt_config", run_name="__main__")
"""


def child(arguments: dict[str, t.Any], temporary: str, user: int = 0, fatal: int = 0) -> subprocess.CompletedProcess[bytes]:
    text = json.dumps({"ANSIBLE_MODULE_ARGS": {**BASE, **arguments, "_ansible_remote_tmp": temporary}})
    watched = f"{pathlib.Path(arguments['path']).parent}:{temporary}"
    environment = {**os.environ, "PYTHONPATH": str(REPO / ".collections"), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-c", CHILD, str(user), watched, str(fatal)], input=text.encode(), capture_output=True, env=environment, timeout=60, check=False
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="changes its user")
def test_a_directory_that_may_not_be_written_is_told_in_check_mode_too(open_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    target = open_dir / "config.json"
    for check in (True, False):
        done_ = child({"path": str(target), "_ansible_check_mode": check}, "/tmp", user=65534)
        result = json.loads(done_.stdout)
        assert result["failed"] and f"the directory {open_dir} is not writable" in result["msg"] and b"Traceback" not in done_.stderr
    done(config(target, mode="0644"), True)
    # Nothing to write, nothing to complain of.
    assert json.loads(child({"path": str(target), "mode": "0644"}, "/tmp", user=65534).stdout)["changed"] is False
    target.chmod(0o600)
    assert "cannot be read: Permission denied" in json.loads(child({"path": str(target)}, "/tmp", user=65534).stdout)["msg"]


@pytest.mark.parametrize("other_disk", [False, True])
@pytest.mark.parametrize("stands", [False, True])
def test_killed_at_any_step_leaves_the_old_file_or_the_new_one(tmp_path: pathlib.Path, stands: bool, other_disk: bool) -> None:
    """With the temporary directory on another file system the file is copied before it is renamed."""
    if other_disk and (not os.access("/dev/shm", os.W_OK) or os.stat("/dev/shm").st_dev == tmp_path.stat().st_dev):
        pytest.skip("no second file system")
    temporary = pathlib.Path(tempfile.mkdtemp(dir="/dev/shm" if other_disk else tmp_path))
    made = tmp_path / "made"
    made.mkdir()
    path = made / "config.json"
    done(config(path), True)
    new = path.read_text()
    done(config(path, system_env={"qaMaxProcess": 3}), True)
    old = path.read_text()
    assert old != new
    kills = before = after = 0
    try:
        for step in range(1, 80):
            shutil.rmtree(made)
            made.mkdir()
            if stands:
                path.write_text(old)
                path.chmod(0o640)
            ended = child({"path": str(path)}, str(temporary), fatal=step)
            found = path.read_text() if path.exists() else None
            assert found == new or found == (old if stands else None), f"step {step}"
            before, after = before + (found != new), after + (found == new)
            if ended.returncode != -signal.SIGKILL:
                break
            kills += 1
            assert not path.exists() or mode(path) == 0o640, f"step {step}"
            if step % 4:
                continue
            # The next run does the rest.
            assert not json.loads(child({"path": str(path)}, str(temporary)).stdout).get("failed")
            assert path.read_text() == new and mode(path) == 0o640
    finally:
        shutil.rmtree(temporary)
    # It was killed on both sides of the rename, and the last run was not killed.
    assert kills >= 4 and before >= 2 and after >= 2 and ended.returncode == 0


def test_runs_at_once_leave_the_file_of_one_of_them(path: pathlib.Path) -> None:
    wanted = [{"qaMaxProcess": number} for number in range(1, 7)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda env: config(path, system_env=env, mode="0644", backup=True), wanted))
    assert not [result["msg"] for result in results if result.get("failed")]
    last = json.loads(path.read_text())["systemEnv"]["qaMaxProcess"]
    assert last in range(1, 7) and mode(path) == 0o644
    done(config(path, system_env={"qaMaxProcess": last}), False)


def test_validate_that_cannot_be_run(path: pathlib.Path) -> None:
    for command in ("no-such-program-here %s", "grep 'x %s"):
        result = config(path, validate=command)
        assert result["failed"] and "cannot be run" in result["msg"] and list(path.parent.iterdir()) == []
    shown = config(path, validate="sh -c 'cat \"$0\"; exit 1' %s")
    assert "refuses the new file" in shown["msg"]


def test_a_lone_surrogate_is_a_fault(path: pathlib.Path) -> None:
    result = config(path, llm_models=[{**BASE["llm_models"][0], "defaultSystemChatPrompt": "\ud800"}])
    assert result["failed"] and "half of a character" in result["msg"] and not path.exists()


def test_secrets_under_other_options_are_hidden(path: pathlib.Path) -> None:
    result = config(path, system_env={"customPdfParse": {"key": "sk-hidden-somewhere"}, "chatApiKey": "sk-another-secret"})
    assert result["failed"] and "sk-hidden" not in result["_raw"] and "sk-another" not in result["_raw"]


def test_validate(path: pathlib.Path) -> None:
    refused = config(path, validate="grep -q no-such-text %s")
    assert refused["failed"] and "refuses the new file" in refused["msg"] and not path.exists()
    assert list(path.parent.iterdir()) == []
    done(config(path, validate="python3 -m json.tool %s"), True)
    assert "%s" in config(path, validate="true")["msg"]


def test_a_directory_made_by_docker_is_named(path: pathlib.Path) -> None:
    path.mkdir()
    for check in (True, False):
        result = config(path, check=check)
        assert result["failed"] and "is a directory" in result["msg"] and f"rmdir {path}" in result["msg"]


def test_missing_parent(path: pathlib.Path) -> None:
    below = path / "config.json"
    assert "make it first" in config(below)["msg"]
    # The directory would be made by the same run.
    done(config(below, check=True), True)


@pytest.mark.parametrize(
    ("version", "text"), [("v4.8.20", "model API"), ("v4.14.2", "model API"), ("v4.15.0", "no config.json"), ("v4.6.7", "v4.6.8"), ("latest", "image tag")]
)
def test_other_versions_are_refused(path: pathlib.Path, version: str, text: str) -> None:
    result = config(path, version=version)
    assert result["failed"] and text in result["msg"] and not path.exists()


def test_faults_are_told_together_and_nothing_is_written(path: pathlib.Path) -> None:
    result = config(path, llm_models=[], vector_models=[], check=False)
    assert result["failed"] and len(result["msg"].splitlines()) == 2 == len(result["faults"])
    assert not path.exists()
