# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: image_ref
short_description: Name of a container image at the registry that stands in for its own
version_added: 1.0.0
author:
  - selfhosted.fastgpt contributors (@selfhosted)
description:
  - Reads an image name as Docker does, so that V(mongo:5) is V(docker.io/library/mongo:5), and replaces its registry by the one that the map names.
  - A name whose registry is not in the map comes back as given. Tags and digests are kept.
positional: registries
options:
  _input:
    description: Public name of the image.
    type: str
    required: true
  registries:
    description:
      - Host of a public registry as key, host and optional path of its stand-in as value, without a scheme.
    type: dict
    default: {}
"""

EXAMPLES = r"""
- name: Take images from the registry of the house
  ansible.builtin.debug:
    msg: "{{ 'mongo:5.0.32' | selfhosted.fastgpt.image_ref({'docker.io': 'harbor.example/hub'}) }}"
  # harbor.example/hub/library/mongo:5.0.32
"""

RETURN = r"""
_value:
  description: Name to pull.
  type: str
"""

import re
import typing as t
from collections.abc import Mapping

from ansible.errors import AnsibleFilterError
from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils._models import shown

_DOMAIN = r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*(?::[0-9]{1,5})?"
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*"
_PATH = rf"{_COMPONENT}(?:/{_COMPONENT})*"
_IMAGE = re.compile(
    rf"(?P<path>{_PATH})(?P<rest>(?::[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}})?(?:@[A-Za-z][A-Za-z0-9]*(?:[+._-][A-Za-z0-9]+)*:[0-9a-fA-F]{{32,}})?)"
)
_REGISTRY = re.compile(rf"{_DOMAIN}(?:/{_PATH})?")
_HUB = "docker.io"
_HUB_ALIASES = ("index.docker.io", "registry-1.docker.io")


def _split(name: str) -> tuple[str, str]:
    """Docker's rule: the first part is a registry if it has a dot or a colon, an upper-case letter, or is localhost."""
    first, slash, rest = name.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost" or first != first.lower()):
        return (_HUB if first in _HUB_ALIASES else first), rest
    return _HUB, name


def image_ref(name: t.Any, registries: t.Any = None) -> str:
    if not isinstance(name, str):
        raise AnsibleFilterError(f"image_ref: {shown(name)}: an image name must be text such as mongo:5.0.32.")
    registries = {} if registries is None else registries
    if not isinstance(registries, Mapping):
        raise AnsibleFilterError(f"image_ref: registries: {shown(registries)}: must be a dictionary such as {{docker.io: harbor.example/hub}}.")
    targets: dict[str, str] = {}
    for source, target in registries.items():
        cleaned = target.rstrip("/") if isinstance(target, str) else ""
        if not isinstance(source, str) or not re.fullmatch(_DOMAIN, source):
            raise AnsibleFilterError(f"image_ref: registries: {shown(source)}: a key must be the host of a registry such as docker.io.")
        if not _REGISTRY.fullmatch(cleaned):
            raise AnsibleFilterError(
                f"image_ref: registries: {source}: {shown(target)}: must be host[:port][/path] in the form harbor.example/hub, without a scheme."
            )
        targets[_HUB if source in _HUB_ALIASES else source] = cleaned

    registry, rest = _split(name)
    match = _IMAGE.fullmatch(rest)
    if not match or not re.fullmatch(_DOMAIN, registry):
        raise AnsibleFilterError(f"image_ref: {shown(name)}: not an image name such as mongo:5.0.32 or ghcr.io/labring/fastgpt:v4.8.9.")
    if registry not in targets:
        return str(name)
    path = match["path"]
    if registry == _HUB and "/" not in path:
        path = f"library/{path}"
    return f"{targets[registry]}/{path}{match['rest']}"


class FilterModule:
    """Filter of the same name."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"image_ref": image_ref}
