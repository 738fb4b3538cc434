# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Renders the role's templates with Ansible's own engine: a JSON object of variables a line in, the texts a line out.

A process of its own, since Ansible's collection loader takes over the import of ansible_collections.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import init_plugin_loader
from ansible.template import Templar, trust_as_template

ROOT = Path(__file__).resolve().parents[3]
ROLE = ROOT / "roles" / "door"


def main() -> None:
    init_plugin_loader([str(ROOT / ".collections")])
    loader = DataLoader()
    known = {}
    for part in ("defaults", "vars"):
        known.update(loader.load_from_file(str(ROLE / part / "main.yml"), trusted_as_template=True))
    for line in sys.stdin:
        variables = {**known, "ansible_managed": "Ansible managed", "ansible_facts": {}, **json.loads(line)}
        answer = {}
        for name in ("door.conf.j2", "keys.conf.j2"):
            text = loader.get_text_file_contents(str(ROLE / "templates" / name))
            answer[name] = Templar(loader=loader, variables=variables).template(trust_as_template(text))
        for name in ("door__files", "door__links"):
            answer[name] = Templar(loader=loader, variables=variables).template(trust_as_template("{{ %s }}" % name))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
