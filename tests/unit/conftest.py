# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The gate draws the same examples every time; `make explore` looks for new ones."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

try:
    from hypothesis import settings
except ImportError:  # ansible-test's own environment lacks it, and the property tests are skipped there
    pass
else:
    settings.register_profile("gate", derandomize=True, max_examples=100, deadline=None)
    settings.register_profile("explore", max_examples=5000, deadline=None)
    settings.load_profile("gate")
