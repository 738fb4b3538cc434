# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: for the modules of this collection only; it may change in any release.

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  timeout:
    description:
      - Seconds that one request may take in all. A model that is asked for the first time may take long.
    type: int
    default: 120
  validate_certs:
    description:
      - Whether the certificate of an C(https) server is checked.
    type: bool
    default: true
  ca_path:
    description:
      - PEM file on the target with the certificates of the authorities to trust. Without it those of the system are trusted.
    type: path
  client_cert:
    description:
      - PEM file on the target with a client certificate; it may hold the key as well.
    type: path
  client_key:
    description:
      - PEM file on the target with the key of O(client_cert).
    type: path
attributes:
  diff_mode:
    support: none
  idempotent:
    support: full
notes:
  - A red check is a result, not a failure of the task. Add C(failed_when), as in the examples, where it should be one.
  - The proxies of the environment are not used, since the servers are inside the site.
"""

    SERVICE = r"""
options:
  url:
    description:
      - Root of the service, C(http://) or C(https://) with host and port and no path (no C(/v1), no C(/api)), as the target reaches it.
    type: str
    required: true
  label:
    description:
      - Word that begins the name of each check, to tell several servers apart.
    type: str
"""
