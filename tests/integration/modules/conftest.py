# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fixtures of the module tests; each system has a file of its own beside this one."""

from __future__ import annotations

from fixtures_mongodb import mongo_lab
from fixtures_oneapi import _oneapi_session, certificates, oneapi, oneapi_factory, oneapi_shared, quick_retries

__all__ = ["_oneapi_session", "certificates", "mongo_lab", "oneapi", "oneapi_factory", "oneapi_shared", "quick_retries"]
