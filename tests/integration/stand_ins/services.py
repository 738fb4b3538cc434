# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Containers of the lab's own images on this machine's loopback."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import time

LOCAL = "selfhosted-fastgpt-lab"
_numbers = itertools.count()


def number():
    return next(_numbers)


def docker(*words):
    return subprocess.run(["docker", *words], check=True, capture_output=True, text=True).stdout.strip()


class Service:
    """One container of a lab image with a port on 127.0.0.1."""

    def __init__(self, image, port, ready, *words, command=()):
        self.name = f"sflab-test-{os.getpid()}-{number()}"
        docker("run", "-d", "--name", self.name, "--label", "selfhosted.fastgpt.lab.test=1", "-p", f"127.0.0.1::{port}", *words, f"{LOCAL}/{image}", *command)
        self.inside = port
        try:
            self.wait(ready)
        except BaseException:
            self.remove()
            raise

    def wait(self, ready):
        deadline = time.monotonic() + 60
        while subprocess.run(["docker", "exec", self.name, *ready], capture_output=True, check=False).returncode:
            running = docker("inspect", "-f", "{{.State.Running}}", self.name) == "true"
            if not running or time.monotonic() > deadline:
                raise AssertionError(subprocess.run(["docker", "logs", self.name], capture_output=True, text=True, check=False))
            time.sleep(0.2)

    @property
    def port(self):
        return json.loads(docker("inspect", "-f", "{{json .NetworkSettings.Ports}}", self.name))[f"{self.inside}/tcp"][0]["HostPort"]

    def run(self, *words):
        return docker("exec", self.name, *words)

    def remove(self):
        subprocess.run(["docker", "rm", "-fv", self.name], capture_output=True, check=False)
