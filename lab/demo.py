# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""`make demo`: raise the lab, deploy with the playbook that production uses, prove that it answers, and report."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from sflab.catalogue import DEFAULT_FASTGPT
from sflab.common import VAULT, VAULT_PASSWORD
from sflab.runs import ROOT, Run, run_playbook, vault_environment
from sflab.timeline import picture

DEMO = ROOT / ".demo"
NAME = "demo"
NET = os.environ.get("LAB_NET", "172.31.77")


def headline(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def make_secrets() -> None:
    """The lab's vault file, by the playbook that any user runs."""
    run = run_playbook(
        ROOT / "playbooks" / "secrets.yml", "localhost,", ROOT / ".lab" / "runs" / "secrets", quiet=True,
        extravars={"secrets_file": str(VAULT), "secrets_password_file": str(VAULT_PASSWORD)}, environment=vault_environment(),
    )  # fmt: skip
    if run.rc != 0:
        print(run.stdout)
        raise SystemExit("the lab's secrets could not be made")


def secret(name: str) -> str:
    """One value of the lab's vault, to show it on the screen of whoever runs the demo."""
    text = subprocess.run(
        [ROOT / ".venv" / "bin" / "ansible-vault", "view", "--vault-password-file", VAULT_PASSWORD, VAULT],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return next((line.partition(": ")[2].strip("'\"") for line in text.splitlines() if line.startswith(f"{name}: ")), "?")


def raise_lab(version: str, name: str = NAME, net: str = NET, hosts: Sequence[str] = ()) -> dict[str, Any]:
    """The lab's hosts; gives its state."""
    command = [sys.executable, str(ROOT / "lab" / "lab.py"), "up", "--name", name, "--net", net, "--fastgpt-version", version]
    command += [word for host in hosts for word in ("--host", host)]
    subprocess.run(command, check=True)
    state: dict[str, Any] = json.loads((ROOT / ".lab" / name / "state.json").read_text(encoding="utf-8"))
    return state


def play(name: str, version: str, extravars: dict[str, Any] | None = None, cmdline: str = "") -> Run:
    environment = {**vault_environment(), "LAB_NET": NET, "FASTGPT_VERSION": version}
    return run_playbook(
        ROOT / "playbooks" / name, ROOT / "inventories" / "lab", DEMO / "runner" / name, extravars=extravars, environment=environment, cmdline=cmdline
    )


def main() -> int:
    """The demo; the exit status says whether it worked."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--fastgpt-version", default=os.environ.get("FASTGPT_VERSION") or DEFAULT_FASTGPT)
    version = arguments.parse_args().fastgpt_version
    started = time.monotonic()
    DEMO.mkdir(exist_ok=True)
    report_path = DEMO / "report.json"
    report_path.unlink(missing_ok=True)
    report: dict[str, Any] = {"ok": False, "fastgpt_version": version, "stand_ins": [], "site": {}, "checks": []}

    headline("raising the lab: app-1 and gpu-1")
    state = raise_lab(version)
    report["stand_ins"] = state["stand_ins"]
    make_secrets()

    headline("site.yml: from bare hosts to FastGPT")
    site = play("site.yml", version, cmdline="--skip-tags verify")
    report["site"] = {
        "changed": site.total("changed"),
        "failed": site.total("failures") + site.total("dark"),
        "seconds": site.seconds,
        "round_trips": site.round_trips,
        "changed_tasks": site.changed_tasks[:200],
    }
    report["timeline"] = site.timeline.as_data()
    checks_path = DEMO / "checks.json"
    checks_path.unlink(missing_ok=True)
    verify_rc = 1
    if site.rc == 0:
        headline("verify.yml: does it answer?")
        verify_rc = play("verify.yml", version, {"verify_report_path": str(checks_path)}).rc
        if checks_path.exists():
            report["checks"] = json.loads(checks_path.read_text(encoding="utf-8"))["checks"]
    report["ok"] = site.rc == 0 and verify_rc == 0 and bool(report["checks"]) and all(check["ok"] for check in report["checks"])
    report["seconds"] = round(time.monotonic() - started, 1)
    pathlib.Path(report_path).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    headline("result")
    for entry in report["stand_ins"]:
        print(f"STAND-IN  {entry['image']}: {entry['stand_in']} (the real thing: {entry['real_version']})")
    green = sum(1 for check in report["checks"] if check["ok"])
    print(f"site.yml  changed {report['site']['changed']}, failed {report['site']['failed']}, {report['site']['seconds']} s, "
          f"module round trips per host {report['site']['round_trips']}")  # fmt: skip
    print("who worked when:")
    print("\n".join(picture(site.timeline.spans())))
    print(f"verify    {green} of {len(report['checks'])} checks ok")
    if report["ok"]:
        app = state["hosts"]["app-1"]
        print(f"\nFastGPT   http://{app}:8080   root / {secret('fastgpt_root_password')}")
        print(f"One-API   http://{app}:8000   root / {secret('oneapi_root_password')}")
        print(f"hosts     ssh -i .lab/ssh/id_ed25519 -o UserKnownHostsFile=.lab/ssh/known_hosts ops@{app}")
        print("remove    make demo-down")
    print(f"\nreport    {report_path.relative_to(ROOT)}: {'ok' if report['ok'] else 'NOT ok'}, {report['seconds']} s in all")
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
