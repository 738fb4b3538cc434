# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fixtures of the module tests; each system has a file of its own beside this one."""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "support"))

from fixtures_mongodb import mongo_lab  # noqa: E402
from fixtures_oneapi import _oneapi_session, certificates, oneapi, oneapi_factory, oneapi_shared, quick_retries  # noqa: E402

__all__ = ["_oneapi_session", "certificates", "mongo_lab", "oneapi", "oneapi_factory", "oneapi_shared", "quick_retries"]
