#!/usr/bin/python

# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: mongodb_replica_set_info
short_description: State, members and lag of a MongoDB replica set
version_added: 1.0.0
author:
  - selfhosted.fastgpt contributors (@selfhosted)
description:
  - Tells how a MongoDB server stands in its replica set, the state of all members, and whether the set is as declared.
  - Can measure a write that a majority acknowledges.
  - Fails only where the server does not answer or refuses the log-in.
extends_documentation_fragment:
  - selfhosted.fastgpt._mongodb
  - selfhosted.fastgpt._attributes
  - selfhosted.fastgpt._attributes.action_group
attributes:
  check_mode:
    support: full
    details:
      - This module does not modify state; with O(probe_write=true) it writes an oplog note, which is left out in check mode.
  diff_mode:
    support: N/A
    details:
      - This module does not modify state.
  idempotent:
    support: N/A
    details:
      - This module does not modify state.
options:
  name:
    description:
      - Name that the set should have, for RV(matches).
    type: str
  members:
    description:
      - Members that the set should have, for RV(matches). The same list as that of M(selfhosted.fastgpt.mongodb_replica_set).
    type: list
    elements: dict
    suboptions:
      host:
        description:
          - Name or address and port.
        type: str
        required: true
      priority:
        description:
          - 0 to 1000.
        type: float
      votes:
        description:
          - Votes in elections.
        type: int
        choices: [0, 1]
        default: 1
      hidden:
        description:
          - Hidden from clients.
        type: bool
        default: false
      arbiter:
        description:
          - Votes and holds no data.
        type: bool
        default: false
  probe_write:
    description:
      - Write an oplog note (no collection is touched) and wait until a majority acknowledges it.
    type: bool
    default: false
seealso:
  - module: selfhosted.fastgpt.mongodb_replica_set
"""

EXAMPLES = r"""
- name: See whether the set takes writes
  selfhosted.fastgpt.mongodb_replica_set_info:
    login_host: 192.0.2.11
    login_user: root
    login_password: "{{ mongodb_root_password }}"
    probe_write: true
    timeout: 10
  register: replica_set
  failed_when: replica_set is failed or replica_set.majority_write_ms is none
"""

RETURN = r"""
initiated:
  description: Whether the server has a replica set configuration.
  returned: success
  type: bool
name:
  description: Name of the set, empty if there is none.
  returned: success
  type: str
state:
  description:
    - State of the asked server - C(PRIMARY), C(SECONDARY), C(ARBITER), C(STARTUP2) and so on, C(UNINITIATED), C(REMOVED) (its
      configuration does not contain it), or C(STANDALONE).
  returned: success
  type: str
  sample: PRIMARY
primary:
  description: Host of the primary, empty if there is none.
  returned: success
  type: str
members:
  description: All members, as the asked server sees them.
  returned: success
  type: list
  elements: dict
  contains:
    host:
      description: Host and port.
      type: str
    state:
      description: Its state.
      type: str
    healthy:
      description: Whether it answers and is primary, secondary or arbiter.
      type: bool
    lag_seconds:
      description: How far it is behind the primary; null if unknown.
      type: float
    message:
      description: What the server says of it, for example why it is not reached.
      type: str
config:
  description: The managed settings of all members. Null where they cannot be read.
  returned: success
  type: list
  elements: dict
matches:
  description: Whether name and members are as declared. Null if neither is given or the configuration cannot be read.
  returned: success
  type: bool
majority_write_ms:
  description: Milliseconds that the majority write took. Null if not asked for, or if it failed.
  returned: success
  type: int
majority_write_error:
  description: Why the majority write failed, else empty.
  returned: success
  type: str
server_version:
  description: Version of MongoDB.
  returned: success
  type: str
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _mongodb as m
from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _mongodb_plan as planning


def gather(module: AnsibleModule, settings: m.Settings, access: m.Access, wanted: list[planning.Member] | None) -> dict[str, t.Any]:
    result: dict[str, t.Any] = {
        "initiated": False,
        "name": "",
        "state": "UNINITIATED",
        "primary": "",
        "members": [],
        "config": None,
        "matches": None,
        "majority_write_ms": None,
        "majority_write_error": "",
        "server_version": str(access.node.command("buildInfo").get("version", "")),
    }
    name = module.params["name"]
    asked = wanted is not None or name is not None
    try:
        status = access.node.status()
    except m.Refused as exc:
        states = {
            m.NOT_YET_INITIALIZED: "UNINITIATED",
            m.INVALID_CONFIG: "REMOVED",
            m.NO_REPLICATION_ENABLED: "STANDALONE",
        }
        if exc.code not in states:
            raise
        result["state"] = states[exc.code]
        result["initiated"] = exc.code == m.INVALID_CONFIG
        result["matches"] = False if asked else None
        if module.params["probe_write"]:
            result["majority_write_error"] = exc.message
        return result
    result.update(initiated=True, name=str(status["set"]), members=m.member_states(status))
    result["state"] = next((str(x["stateStr"]) for x in status["members"] if x.get("self")), "UNKNOWN")
    result["primary"] = next((x["host"] for x in result["members"] if x["state"] == "PRIMARY"), "")
    try:
        docs = access.node.config()["members"]
        result["config"] = m.compact(docs, wanted or ())
        if asked:
            result["matches"] = name in (None, result["name"]) and (wanted is None or not planning.differences(docs, wanted))
    except m.Refused as exc:
        if exc.code != m.UNAUTHORIZED:
            raise
    if module.params["probe_write"] and not module.check_mode:
        write(settings, access, result)
    return result


def write(settings: m.Settings, access: m.Access, result: dict[str, t.Any]) -> None:
    primary: m.Access | None = None
    try:
        primary = m.find_primary(settings, access, [x["host"] for x in result["members"]])
        if primary is None:
            result["majority_write_error"] = "no primary can be reached from here"
            return
        result["majority_write_ms"] = primary.node.majority_write(float(settings.timeout))
    except (m.MongoFault, m.Unreachable, m.Refused) as exc:
        result["majority_write_error"] = str(exc)
    finally:
        if primary is not None and primary is not access:
            primary.node.close()


def main() -> None:
    spec = m.connection_argument_spec()
    spec.update(
        name=dict(type="str"),
        members=dict(
            type="list",
            elements="dict",
            options=dict(
                host=dict(type="str", required=True),
                priority=dict(type="float"),
                votes=dict(type="int", default=1, choices=[0, 1]),
                hidden=dict(type="bool", default=False),
                arbiter=dict(type="bool", default=False),
            ),
        ),
        probe_write=dict(type="bool", default=False),
    )
    module = AnsibleModule(
        argument_spec=spec,
        required_together=m.CONNECTION_REQUIRED_TOGETHER,
        required_by=m.CONNECTION_REQUIRED_BY,
        supports_check_mode=True,
    )
    settings = m.settings_of(module)
    wanted: list[planning.Member] | None = None
    if module.params["members"] is not None:
        wanted, faults = planning.wanted_members(module.params["members"])
        if faults:
            module.fail_json(msg="\n".join(faults))
    result: dict[str, t.Any] = {}
    failure = ""
    access: m.Access | None = None
    try:
        access = m.open_login(settings, float(settings.timeout))
        result = gather(module, settings, access, wanted)
    except m.MongoFault as exc:
        failure = str(exc)
    except m.Unreachable as exc:
        failure = f"MongoDB at {exc.address} stopped answering: {exc.reason}."
    except m.Refused as exc:
        failure = f"MongoDB at {exc.address} answers: {exc.message} (code {exc.code})."
    finally:
        if access is not None:
            access.node.close()
    if failure:
        module.fail_json(msg=failure)
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
