# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Another master key for the lab's model servers, and the keys that follow from it, computed here anew."""

from __future__ import annotations

import hashlib
import hmac
from typing import Any


def rotated(secrets: dict[str, str]) -> str:
    return hashlib.sha256(secrets["model_server_master_key"].encode()).hexdigest()


def key_of(master: str, host: str, model: str, port: int) -> str:
    return "sk-" + hmac.new(master.encode(), f"{host}/{model}/{port}".encode(), hashlib.sha256).hexdigest()[:48]


def rotated_key(secrets: dict[str, str], entry: dict[str, Any]) -> str:
    return key_of(rotated(secrets), entry["host"], entry["model"], entry["port"])
