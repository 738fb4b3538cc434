# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""fastgpt_config as Ansible runs it, on real files."""

from __future__ import annotations

import json
import os
import pathlib
import stat
import typing as t

import pytest
from fixtures_mongodb import run_mongo_module

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
