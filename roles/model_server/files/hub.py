# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Lists and fetches a model with its hub's own client. Private to the role selfhosted.fastgpt.model_server.

prepare.py calls it with the Python that has the clients. The job is one line of JSON on standard input and the answer one on
standard output. It ends when standard input does, so that a killed prepare.py leaves nobody behind who still writes.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, Callable

from prepare import TRIES, Problem, explain, intact

Entry = dict[str, Any]


class HuggingFace:
    tries = TRIES

    def __init__(self, job: dict[str, Any]) -> None:
        from huggingface_hub import HfApi, constants

        self.job = job
        # what waits in memory is lost when the line breaks or this is killed; it takes 10 MB at a time
        constants.DOWNLOAD_CHUNK_SIZE = 1 << 16
        # False: no token of this machine's user either
        self.api = HfApi(endpoint=job["endpoint"] or None, token=job["token"] or False)

    def list(self) -> dict[str, Any]:
        info = self.api.model_info(self.job["id"], revision=self.job["revision"] or None, files_metadata=True, timeout=20)
        files = []
        for one in info.siblings or []:
            lfs = one.lfs.sha256 if one.lfs else ""
            files.append({"path": one.rfilename, "size": one.lfs.size if one.lfs else one.size, "sha256": lfs, "blob": "" if lfs else one.blob_id})
        return {"commit": info.sha, "files": files}

    def part(self, entry: Entry) -> Path:
        return Path(self.job["parts"], entry["part"])

    def fetch(self, entry: Entry) -> None:
        # hf_hub_download throws half a file away, so this goes one level below it
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        target, part, size = Path(self.job["target"], entry["path"]), self.part(entry), entry["size"]
        if intact(target, entry):
            return
        if part.exists() and part.stat().st_size > size:
            part.unlink()
        url = hf_hub_url(self.job["id"], entry["path"], revision=self.job["commit"], endpoint=self.job["endpoint"] or None)
        headers = {**build_hf_headers(token=self.job["token"] or False), "Accept-Encoding": "identity"}
        with part.open("r+b" if part.exists() else "w+b") as out:
            here = out.seek(0, os.SEEK_END)
            http_get(url, out, resume_size=here, headers=headers, expected_size=size, displayed_filename=target.name, _nb_retries=0)
        if not intact(part, entry):
            part.unlink()
            raise Problem("damaged", "what came has another checksum than the hub lists")
        target.parent.mkdir(parents=True, exist_ok=True)
        part.replace(target)


class ModelScope:
    # its client has fetched a damaged file three times when it says so
    tries = 1

    def __init__(self, job: dict[str, Any]) -> None:
        from modelscope_hub import HubApi

        self.job = job
        self.api = HubApi(endpoint=job["endpoint"] or None, token=job["token"] or "")

    def list(self) -> dict[str, Any]:
        files = self.api.list_repo_files(self.job["id"], "model", revision=self.job["revision"] or None)
        # it names no commit that could be asked for; the checksums pin what is fetched
        return {"commit": "", "files": [{"path": one.path, "size": one.size, "sha256": one.sha256 or "", "blob": ""} for one in files if one.type != "tree"]}

    def part(self, entry: Entry) -> Path:
        return Path(self.job["target"], entry["path"] + ".incomplete")

    def fetch(self, entry: Entry) -> None:
        self.api.download_file(
            self.job["id"],
            "model",
            entry["path"],
            revision=self.job["revision"] or None,
            local_dir=self.job["target"],
            expected_sha256=entry["sha256"] or None,
            file_size=entry["size"] or None,
        )


def insist(attempt: Callable[[], Any], part: Path | None, pause: float, tries: int = TRIES) -> Any:
    """The result of ATTEMPT; what passes is tried again, without end as long as bytes arrive, a damaged file TRIES times."""
    fruitless = damaged = 0

    def far() -> int:
        return part.stat().st_size if part and part.exists() else 0

    while True:
        before = far()
        try:
            return attempt()
        except Exception as error:  # noqa: BLE001 - the clients raise whatever their transports do
            problem = explain(error)
        damaged += problem.kind == "damaged"
        fruitless = 0 if far() > before else fruitless + 1
        if problem.kind == "range" and part:
            part.unlink(missing_ok=True)
            damaged += 1
        if damaged >= tries or fruitless >= 2 * TRIES or not (problem.passes or problem.kind in ("damaged", "range")):
            raise Problem("damaged", problem.said) if problem.kind == "range" else problem
        time.sleep(max(problem.wait, min(30.0, pause * 2**fruitless)))


def fetch(hub: Any, job: dict[str, Any]) -> dict[str, Any]:
    # the largest first: it takes longest
    entries = sorted(job["files"], key=lambda entry: -entry["size"])
    with ThreadPoolExecutor(job["workers"]) as pool:
        running = {pool.submit(insist, partial(hub.fetch, entry), hub.part(entry), job["pause"], hub.tries): entry for entry in entries}
        for done in as_completed(running):
            error = done.exception()
            if error is not None:
                # what the others have is on disk already
                answer(explain(error), running[done]["path"])
    return {}


def answer(problem: Problem, path: str = "") -> None:
    print(json.dumps({"problem": {"kind": problem.kind, "said": problem.said, "file": path}}), flush=True)
    os._exit(1)


def main() -> None:
    job = json.loads(sys.stdin.readline())

    def until_the_caller_is_gone() -> None:
        sys.stdin.read()
        os._exit(3)

    threading.Thread(target=until_the_caller_is_gone, daemon=True).start()
    try:
        hub = (HuggingFace if job["source"] == "huggingface" else ModelScope)(job)
        said = insist(hub.list, None, job["pause"]) if job["do"] == "list" else fetch(hub, job)
        print(json.dumps(said), flush=True)
    except Exception as error:  # noqa: BLE001 - prepare.py says it with a remedy
        answer(explain(error))
    # no waiting for the thread that reads
    os._exit(0)


if __name__ == "__main__":
    main()
