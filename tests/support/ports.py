# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ports for servers of tests and benches."""

from __future__ import annotations

import os
import socket

# another process begins elsewhere
_PORTS = iter(range(20000 + os.getpid() % 1000 * 8, 32000))


def free_port() -> int:
    """Of 127.0.0.1, never the same twice, and below the ephemeral ports, so that no client's connection takes it meanwhile."""
    for port in _PORTS:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")
