#!/usr/bin/python
# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
module: applied_service
short_description: Keep a service running with the configuration that is on disk
version_added: 1.0.0
description:
  - Enables and starts a service, and restarts or reloads it when its files differ from those that it was last
    started or reloaded with.
  - A handler is lost when a run dies between the writing of a file and the restart. This module remembers the digest of
    the files that were applied, so that the next run does what the killed one still owed.
  - Where systemd is not the first process, the distribution's own script of the service is asked, by C(service).
  - A service that has been running since before its files were last written counts as having them applied.
author:
  - selfhosted.fastgpt contributors (@selfhosted)
extends_documentation_fragment:
  - selfhosted.fastgpt._attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  name:
    description: Name of the unit, with its suffix or without (then C(.service)).
    type: str
    required: true
  files:
    description:
      - Files and glob patterns that make up the service's configuration. Those that do not exist count as empty.
    type: list
    elements: str
    default: []
  on_change:
    description: What makes the service take over changed files.
    type: str
    choices: [restart, reload]
    default: restart
  validate:
    description: A command, as a list, that must succeed before the service is started, restarted or reloaded.
    type: list
    elements: str
    default: []
  state_dir:
    description: Where the digests are remembered.
    type: path
    default: /var/lib/selfhosted-fastgpt/applied
"""

EXAMPLES = r"""
- name: Let nginx run what is written
  selfhosted.fastgpt.applied_service:
    name: nginx
    files: [/etc/nginx/conf.d/*.conf]
    on_change: reload
    validate: [nginx, -t]
"""

RETURN = r"""
actions:
  description: What was done, or would be done in check mode.
  returned: always
  type: list
  elements: str
  sample: [enable, reload]
"""

import glob
import hashlib
import os
import re
import time
from typing import NoReturn

from ansible.module_utils.basic import AnsibleModule


def digest(patterns: list[str]) -> tuple[str, float]:
    """The digest of all files that match, and the time of the newest one."""
    sha, newest = hashlib.sha256(), 0.0
    for path in sorted({p for pattern in patterns for p in glob.glob(pattern)}):
        with open(path, "rb") as handle:
            sha.update(path.encode() + b"\0" + hashlib.sha256(handle.read()).digest())
        # a removal shows in the folder's time only
        newest = max(newest, os.stat(path).st_mtime)
    return sha.hexdigest(), newest


def remembered(stamp: str) -> str:
    try:
        with open(stamp, encoding="ascii") as handle:
            return handle.read().strip()
    except OSError:
        return ""


def remember(stamp: str, want: str) -> None:
    if remembered(stamp) != want:
        os.makedirs(os.path.dirname(stamp), mode=0o755, exist_ok=True)
        with open(stamp + ".new", "w", encoding="ascii") as handle:
            handle.write(want + "\n")
        os.replace(stamp + ".new", stamp)


def by_script(module: AnsibleModule) -> NoReturn:
    """The same without systemd: the script of the service starts, restarts and says whether it runs; nobody knows since when."""
    params = module.params
    name = re.sub(r"\.service$", "", params["name"])
    service = module.get_bin_path("service", required=True)
    try:
        want, _newest = digest(params["files"])
    except OSError as exc:
        module.fail_json(msg="cannot read a file of %s: %s" % (name, exc))
    stamp = os.path.join(params["state_dir"], name)
    applied = remembered(stamp)
    rc, out, err = module.run_command([service, name, "status"])
    if rc == 4 or "unrecognized service" in out + err:
        if module.check_mode:
            module.exit_json(changed=True, actions=["start"])
        module.fail_json(msg="systemd does not run here, and there is no script of the service %s: %s" % (name, (err or out).strip()))
    actions = ["start"] if rc != 0 else [params["on_change"]] if applied != want else []
    before, after = {"digest": applied, "state": "active" if rc == 0 else "inactive"}, {"digest": want, "state": "active"}
    result = {"changed": bool(actions), "actions": actions, "diff": {"before": before, "after": after} if actions else {}}
    if module.check_mode or not actions:
        module.exit_json(**result)
    if params["validate"]:
        rc, out, err = module.run_command(params["validate"])
        if rc != 0:
            module.fail_json(msg="%s is left as it runs, since its configuration is refused by `%s`: %s" % (
                name, " ".join(params["validate"]), (err or out).strip()))
    rc, out, err = module.run_command([service, name, actions[0]])
    if rc != 0:
        module.fail_json(msg="service %s %s failed: %s" % (name, actions[0], (err or out).strip()))
    remember(stamp, want)
    module.exit_json(**result)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "files": {"type": "list", "elements": "str", "default": []},
            "on_change": {"type": "str", "choices": ["restart", "reload"], "default": "restart"},
            "validate": {"type": "list", "elements": "str", "default": []},
            "state_dir": {"type": "path", "default": "/var/lib/selfhosted-fastgpt/applied"},
        },
        supports_check_mode=True,
    )
    params = module.params
    unit = params["name"] if "." in params["name"] else params["name"] + ".service"

    if not os.path.isdir("/run/systemd/system"):
        by_script(module)

    def systemctl(*args: str, fail: bool = True) -> str:
        rc, out, err = module.run_command(["systemctl", *args])
        if rc != 0 and fail:
            _rc, log, _err = module.run_command(["journalctl", "-u", unit, "-n", "15", "--no-pager", "-o", "cat"])
            module.fail_json(msg="systemctl %s failed: %s. Last lines of its journal: %s" % (" ".join(args), (err or out).strip(), log.strip()))
        return out

    def shown() -> dict[str, str]:
        out = systemctl("show", unit, "-p", "LoadState,ActiveState,UnitFileState,ActiveEnterTimestampMonotonic,NeedDaemonReload", fail=False)
        return dict(line.split("=", 1) for line in out.splitlines() if "=" in line)

    try:
        want, newest = digest(params["files"])
    except OSError as exc:
        module.fail_json(msg="cannot read a file of %s: %s" % (unit, exc))
    stamp = os.path.join(params["state_dir"], unit)
    applied = remembered(stamp)

    state = shown()
    if state.get("LoadState") != "loaded" and not module.check_mode:
        systemctl("daemon-reload")
        state = shown()
    if state.get("LoadState") != "loaded":
        if module.check_mode:
            module.exit_json(changed=True, actions=["enable", "start"])
        module.fail_json(msg="there is no systemd unit %s on this host" % unit)

    active = state.get("ActiveState") in ("active", "activating", "reloading")
    if not applied and active:
        entered = float(state.get("ActiveEnterTimestampMonotonic") or 0) / 1e6
        started = time.time() - time.clock_gettime(time.CLOCK_MONOTONIC) + entered
        if newest < started:
            applied = want

    actions = []
    if state.get("UnitFileState") not in ("enabled", "static", "alias", "indirect", "generated", "enabled-runtime"):
        actions.append("enable")
    if not active:
        actions.append("start")
    elif applied != want:
        actions.append(params["on_change"])

    before = {"digest": applied, "state": state.get("ActiveState"), "unit_file": state.get("UnitFileState")}
    after = {"digest": want, "state": "active", "unit_file": "enabled" if "enable" in actions else state.get("UnitFileState")}
    result = {"changed": bool(actions), "actions": actions, "diff": {"before": before, "after": after} if actions else {}}
    if module.check_mode:
        module.exit_json(**result)

    if set(actions) & {"start", "restart", "reload"}:
        if params["validate"]:
            rc, out, err = module.run_command(params["validate"])
            if rc != 0:
                module.fail_json(msg="%s is left as it runs, since its configuration is refused by `%s`: %s" % (
                    unit, " ".join(params["validate"]), (err or out).strip()))
        if state.get("NeedDaemonReload") == "yes":
            systemctl("daemon-reload")
    for action in actions:
        # a service that failed too often refuses a start until it is told to forget
        if action in ("start", "restart"):
            systemctl("reset-failed", unit, fail=False)
        systemctl(action, unit)
    remember(stamp, want)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
