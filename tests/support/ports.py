# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ports for servers of tests and benches."""

from __future__ import annotations

import fcntl
import os
import pathlib
import socket
import tempfile

# below the ephemeral ports, so that no client's connection takes one meanwhile
_FIRST, _END = 20000, 32000
# one counter for all processes of this user: two of them that probe at the same moment would both find a port free
_COUNTER = pathlib.Path(tempfile.gettempdir()) / f"selfhosted-fastgpt-ports.{os.getuid()}"


def free_port() -> int:
    """Of 127.0.0.1; no process of this user gets it again before all the others were handed out."""
    with open(_COUNTER, "a+", encoding="ascii") as counter:
        fcntl.flock(counter, fcntl.LOCK_EX)
        counter.seek(0)
        text = counter.read()
        start = int(text) if text.isdigit() and _FIRST <= int(text) < _END else _FIRST
        for port in (*range(start, _END), *range(_FIRST, start)):
            with socket.socket() as probe:
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError:
                    continue
            counter.truncate(0)
            counter.write(str(port + 1))
            return port
    raise AssertionError("no free port")
