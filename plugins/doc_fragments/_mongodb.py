# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: for the modules of this collection only; it may change in any release.

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  login_host:
    description:
      - Name or address of a MongoDB server. The module connects to exactly this server first and finds the primary from there.
    type: str
    default: 127.0.0.1
  login_port:
    description:
      - Port of the server in O(login_host).
    type: int
    default: 27017
  login_user:
    description:
      - User to log in as. It needs the rights of the role V(root), or V(clusterAdmin) and V(userAdminAnyDatabase).
      - Where no user exists yet, and the module runs on the server's own host (in a container - inside it), the localhost
        exception is used instead, also when this option is set.
    type: str
  login_password:
    description:
      - Password of O(login_user).
    type: str
  login_password_previous:
    description:
      - The password that may still be in force. It is tried when O(login_password) is refused.
    type: str
  login_database:
    description:
      - Authentication database of O(login_user).
    type: str
    default: admin
  tls:
    description:
      - Connect with TLS, to all members. A server that asks for TLS, or has none, is told apart in the error.
    type: bool
    default: false
  tls_ca_file:
    description:
      - PEM file on the target with the certificate authorities to trust. Without it those of the system are used.
      - Needs O(tls=true).
    type: path
  tls_certificate_key_file:
    description:
      - One PEM file on the target with a client certificate and its private key, for servers that ask for one (those with
        C(--tlsCAFile) and without C(--tlsAllowConnectionsWithoutCertificates)).
      - Needs O(tls=true).
    type: path
  tls_certificate_key_password:
    description:
      - Password of an encrypted private key in O(tls_certificate_key_file).
    type: str
  validate_certs:
    description:
      - Check the server's certificate and name. Only switch this off for a test.
    type: bool
    default: true
  timeout:
    description:
      - Seconds to wait for each thing that takes its time - the server's first answer, an election, the synchronisation of a
        new member, a majority write.
    type: int
    default: 120
requirements:
  - pymongo >= 3.11 on the target (Debian and Ubuntu - C(python3-pymongo)). Tested with 3.11.0, the one of Debian 12, and 4.20.0
  - MongoDB >= 4.4. Tested with 4.4.2, 5.0.4 and 6.0.5
"""
