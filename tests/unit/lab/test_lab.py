# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab's pure parts: image table, LAB_IMAGES, names, packed files, tiny models, limits of the machine."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest

if sys.version_info < (3, 11):
    pytest.skip("the lab runs on Python 3.11", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "lab"))

from sflab import catalogue, files, hosts, models  # noqa: E402
from sflab.catalogue import LabError  # noqa: E402


def names(version: str) -> list[str]:
    return [image.public for image in catalogue.images_for(version)]


def test_names_are_those_that_the_roles_ask_for() -> None:
    assert names("v4.8.9") == [
        "docker.io/library/mongo:5.0.32", "docker.io/library/mongo:4.4.29", "docker.io/pgvector/pgvector:0.8.6-pg17",
        "docker.io/justsong/one-api:v0.6.10", "docker.io/library/mariadb:10.11.11", "docker.io/library/redis:7.2.7",
        "docker.io/vllm/vllm-openai:v0.33.0", "ghcr.io/labring/fastgpt:v4.8.9", "ghcr.io/labring/fastgpt-sandbox:v4.8.9",
    ]


@pytest.mark.parametrize("version, sandbox", [("v4.6.8", False), ("v4.7.1", False), ("v4.8.3", False), ("v4.8.4", True), ("v4.8.10", True),
                                              ("v4.8.4-fix", True), ("v4.9.0", True)])
def test_sandbox_from_4_8_4(version: str, sandbox: bool) -> None:
    assert (f"ghcr.io/labring/fastgpt-sandbox:{version}" in names(version)) is sandbox
    assert f"ghcr.io/labring/fastgpt:{version}" in names(version)


@pytest.mark.parametrize("version", ["4.8.9", "v4", "latest", "", "v4.8.9;rm"])
def test_versions_that_are_none(version: str) -> None:
    with pytest.raises(LabError, match="FastGPT version"):
        catalogue.images_for(version)


def test_every_image_says_what_it_really_is() -> None:
    for image in catalogue.images_for("v4.8.9"):
        assert image.real_version
        assert image.stand_in.startswith(f"{catalogue.LOCAL}/")
        assert image.key in catalogue.KEYS


def test_lab_images() -> None:
    assert catalogue.parse_lab_images("") == {}
    text = "fastgpt=real/fastgpt:v4.8.9  one-api=127.0.0.1:5555/one-api:x@sha256:00"
    assert catalogue.parse_lab_images(text) == {"fastgpt": "real/fastgpt:v4.8.9", "one-api": "127.0.0.1:5555/one-api:x@sha256:00"}
    assert catalogue.parse_lab_images("mongo=a,pgvector=b") == {"mongo": "a", "pgvector": "b"}


@pytest.mark.parametrize("text, says", [("fastgpt", "expected"), ("fastgpt=", "expected"), ("oneapi=x", "unknown name 'oneapi'"),
                                        ("fastgpt=a fastgpt=b", "twice")])
def test_lab_images_faults(text: str, says: str) -> None:
    with pytest.raises(LabError, match=says):
        catalogue.parse_lab_images(text)


def test_hosts() -> None:
    assert catalogue.parse_hosts(list(catalogue.DEFAULT_HOSTS)) == [
        catalogue.Host("app-1", "trixie", 11), catalogue.Host("gpu-1", "bookworm", 12)]
    assert catalogue.parse_host("gpu-2=trixie=13=2") == catalogue.Host("gpu-2", "trixie", 13, gpus=2)
    assert catalogue.parse_host("db-1=bookworm=13=0=2") == catalogue.Host("db-1", "bookworm", 13, disk_gb=2)


@pytest.mark.parametrize("texts, says", [
    (["app-1"], "expected name=suite"), (["App=trixie=3"], "expected name=suite"), (["a=sid=3"], "suite must be"), (["a=trixie=2"], "last octet"),
    (["a=trixie=255"], "last octet"), (["a=trixie=x"], "expected"), (["a=trixie=3", "a=trixie=4"], "name given twice: a"),
    (["a=trixie=3=x"], "0 to 8 GPUs"), (["a=trixie=3=9"], "0 to 8 GPUs"), (["a=trixie=3=0=x"], "0 to 64 GB"),
    (["a=trixie=3", "b=trixie=3"], "octet given twice: 3"),
])
def test_host_faults(texts: list[str], says: str) -> None:
    with pytest.raises(LabError, match=says):
        catalogue.parse_hosts(texts)


def test_container_names_go_both_ways_and_never_reach_into_another_lab() -> None:
    assert catalogue.container_name("demo", "app-1") == "sflab-demo-app-1"
    assert catalogue.host_of("demo", "sflab-demo-app-1") == "app-1"
    assert catalogue.host_of("demo", "sflab-demo2-app-1") is None
    assert catalogue.host_of("demo", "mongodb") is None


@pytest.mark.parametrize("name", ["", "Demo", "a-b", "1a", "a" * 17, "a/b", "a b"])
def test_lab_name_faults(name: str) -> None:
    with pytest.raises(LabError):
        catalogue.check_name(name)


@pytest.mark.parametrize("net", ["172.31", "172.31.77.0", "8.8.8", "300.1.1", "x"])
def test_net_faults(net: str) -> None:
    with pytest.raises(LabError):
        catalogue.check_net(net)


def test_net() -> None:
    assert catalogue.check_net("172.31.77") == "172.31.77"


def test_packing_is_deterministic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FILES", tmp_path)
    (tmp_path / "models").mkdir()
    content = {"b.json": b"{}", "1_Pooling/config.json": b"[]"}
    files.pack("m", content)
    first = (tmp_path / "models/m.tar").read_bytes()
    files.pack("m", dict(reversed(content.items())))
    assert (tmp_path / "models/m.tar").read_bytes() == first
    assert b"m/1_Pooling/config.json" in first


def test_byte_pairs() -> None:
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 256, b"abc": 257, b"bc": 258}
    assert models.split_token(b"abc", ranks, 257) == [b"ab", b"c"]
    assert models.split_token(b"abcabx", ranks, 300) == [b"abc", b"ab", b"x"]
    letters = models.byte_letters()
    assert len(set(letters.values())) == 256
    assert (letters[ord(" ")], letters[ord("\n")], letters[ord("a")]) == ("Ġ", "Ċ", "a")


def test_safetensors_layout() -> None:
    data = models.safetensors({"b": models.filled(2.0, 3), "a": models.zeros(2, 2)})
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    assert (8 + size) % 8 == 0
    assert header["a"] == {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    assert header["b"]["data_offsets"] == [16, 28]
    assert struct.unpack("<3f", data[8 + size + 16:]) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("token, content", [(b" the", False), (b" MongoDB", True), (b"?", False), (b" x", False), (b"42", True), ("数".encode(), True)])
def test_content_words(token: bytes, content: bool) -> None:
    assert models.is_content(token) is content


def test_limits_are_raised_once_and_restored_with_the_last_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    low, high, absent = tmp_path / "low", tmp_path / "high", tmp_path / "absent"
    low.write_text("5\n")
    high.write_text("50\n")
    standing = ["a container"]
    monkeypatch.setattr(hosts, "RAISED", ((low, 20), (high, 20), (absent, 20)))
    monkeypatch.setattr(hosts, "RAISED_BEFORE", tmp_path / "before.json")
    monkeypatch.setattr(hosts, "lab_containers", lambda: standing)
    for _time in range(2):
        hosts.raise_limits()
        assert (low.read_text(), high.read_text(), absent.exists()) == ("20\n", "50\n", False)
    hosts.restore_limits()
    assert low.read_text() == "20\n", "a lab still stands"
    standing.clear()
    for _time in range(2):
        hosts.restore_limits()
        assert (low.read_text(), high.read_text(), hosts.RAISED_BEFORE.exists()) == ("5\n", "50\n", False)
