# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: for the modules of this collection only; it may change in any release.

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  url:
    description:
      - Root of One-API, without a path, as this host reaches it.
      - V(localhost) means the host that the task runs on.
    type: str
    required: true
  access_token:
    description:
      - The access token of a user of the management API (32 hexadecimal characters), not a relay key (C(sk-...)).
      - On a fresh server it is what the environment variable E(INITIAL_ROOT_ACCESS_TOKEN) said at its very first start.
      - Needs no log-in, so it is not subject to the limit of 20 log-ins in 20 minutes per client address.
    type: str
  validate_certs:
    description: Whether the certificate of an C(https) server is checked.
    type: bool
    default: true
  ca_path:
    description: PEM file with the certificates of the authorities to trust.
    type: path
  client_cert:
    description: PEM file with a client certificate; it may hold the key as well.
    type: path
  client_key:
    description: PEM file with the key of O(client_cert), without a passphrase.
    type: path
  timeout:
    description: Seconds that one request may take in all.
    type: int
    default: 30
  rate_limit_wait:
    description:
      - Seconds to wait in all for one request that the general rate limit refuses (HTTP 429).
      - One-API v0.6.10 allows 240 requests in 180 seconds per client address, unless E(GLOBAL_API_RATE_LIMIT) says otherwise (V(0) is none).
    type: int
    default: 200
  use_proxy:
    description: Whether the proxies of the task's environment are used. One-API is inside the site as a rule.
    type: bool
    default: false
notes:
  - One-API v0.6.8 or newer is needed. The fork new-api is refused, since its management API differs.
  - A server that cannot be reached is a failure, in check mode too.
  - Connection errors and HTTP 429 are retried for a limited time, at the pace of a C(Retry-After) header where a proxy sends one. Where the
    answer to a creation is lost, the module looks for the result before it tries again.
  - A redirect or a web page in place of an answer is a failure, since it comes from a proxy before One-API or from a wrong O(url).
"""

    LOGIN = r"""
options:
  username:
    description: User to log in as where O(access_token) is not given or not accepted.
    type: str
    default: root
  password:
    description:
      - Password of O(username).
      - At most one log-in is made per task, tried once more where its answer is lost. One-API allows 20 in 20 minutes per client address.
    type: str
"""
