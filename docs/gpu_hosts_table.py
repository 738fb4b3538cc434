# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Write the decisions for GPU hosts into gpu-hosts.md. With --check, say whether it is out of date.

What a row says is asked of the same function that the roles ask. The text around the generated part is written by hand and stays.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / ".collections"))

from ansible_collections.selfhosted.fastgpt.plugins.filter.gpu_host_packages import gpu_host_packages  # noqa: E402
from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils import _gpu_hosts as table  # noqa: E402

PAGE = ROOT / "docs" / "gpu-hosts.md"
BEGIN = "<!-- begin decisions, written by docs/gpu_hosts_table.py -->"
END = "<!-- end decisions -->"
# A GPU of each kind: the open module drives one, the proprietary the other.
DEVICES = {"open": ["26ba"], "proprietary": ["1db6"]}
GENERATIONS = {(5, 0): "Maxwell", (7, 5): "Turing", (9, 0): "Ada and Hopper", (12, 1): "Blackwell"}
SHA = "0" * 64
# What the scenario gpu_dkms builds for real.
BUILT = {("debian12", "distro", "proprietary")}


def host_of(name: str) -> dict[str, Any]:
    row = table.PLATFORMS[name]
    return {"distribution": row["distributions"][0], "version": row["version"] or "22.03", "architecture": "x86_64"}


def branch_of(name: str, source: str) -> str:
    row = table.PLATFORMS[name]
    if source == "distro" and isinstance(row.get("archive"), dict):
        return str(next(iter(row["archive"].values()))["branch"])
    if source == "nvidia" and "newest" in row:
        return "570"
    return str(row.get("oldest", table.DEFAULT_BRANCH)) if source == "nvidia" else table.DEFAULT_BRANCH


def pin_text(pin: dict[str, Any]) -> str:
    words = {"package": "package", "stream": "stream", "pattern": "versionlock"}
    for key in ("stream", "pattern", "package"):
        if key in pin and not (key == "package" and pin["kind"] == "versionlock"):
            return f"{words[key]} `{pin[key]}`"
    return {"preferences": f"apt preferences `{pin.get('version', '')}`", "name": "the branch in the names"}.get(pin["kind"], "none")


def driver_rows() -> list[str]:
    lines = ["| distribution | source | branch | module | packages | how the branch is kept | run |", "|---|---|---|---|---|---|---|"]
    for name, row in table.PLATFORMS.items():
        for source in table.SOURCES:
            branch = branch_of(name, source)
            for flavour, devices in DEVICES.items():
                options = {
                    "source": source,
                    "branch": branch,
                    "module": flavour,
                    "runfile_sha256": SHA,
                    "runfile": f"NVIDIA-Linux-x86_64-{branch}.0.0.run" if source == "runfile" else "",
                }
                found = gpu_host_packages(host_of(name), "driver", devices, options)
                if found["fault"]:
                    if source == "distro" and isinstance(row.get("archive"), dict):
                        lines.append(f"| {row['title']} | {source} | {branch} | {flavour} | refused: its version differs from the driver's | | |")
                    continue
                if source == "runfile" and row["cuda"]:
                    continue
                packages = " ".join(f"`{package}`" for package in found["packages"])
                if source == "runfile":
                    packages += f" and the runfile with `--kernel-module-type={flavour}`"
                run = row["support"]
                if source != "nvidia" and run == table.LAB:
                    run = "lab, Debian's own packages and a real build" if (name, source, flavour) in BUILT else table.UNRUN
                lines.append(f"| {row['title']} | {source} | {branch} | {flavour} | {packages} | {pin_text(found['pin'])} | {run} |")
    return lines


def compute_rows() -> list[str]:
    lines = ["| distribution | branch | module | packages |", "|---|---|---|---|"]
    for name in ("debian12", "ubuntu2404", "rhel9"):
        for branch in ("580", "595"):
            for flavour, devices in (("open", ["26ba"]), ("proprietary", ["1eb8"])):
                found = gpu_host_packages(host_of(name), "driver", devices, {"branch": branch, "module": flavour, "variant": "compute"})
                lines.append(f"| {table.PLATFORMS[name]['title']} | {branch} | {flavour} | {' '.join(f'`{package}`' for package in found['packages'])} |")
    return lines


def branch_rows() -> list[str]:
    lines = ["| branch | modules | GPUs from | to | standing, November 2026 |", "|---|---|---|---|---|"]
    for name, row in table.BRANCHES.items():
        lines.append(f"| {name} | {', '.join(row['flavours'])} | {GENERATIONS[row['first']]} | {GENERATIONS[row['last']]} | {row['standing']} |")
    return lines


def repository_rows() -> list[str]:
    lines = ["| distribution | NVIDIA's repository | container toolkit | Docker of the distribution | Docker's repository |", "|---|---|---|---|---|"]
    for name, row in table.PLATFORMS.items():
        host = host_of(name)
        driver = gpu_host_packages(host, "driver", DEVICES["open"], {"source": "nvidia", "branch": branch_of(name, "nvidia")})
        toolkit = gpu_host_packages(host, "toolkit", options={"version": "1.20.0-1"})
        own = gpu_host_packages(host, "docker")
        other = gpu_host_packages(host, "docker", options={"source": "docker"})
        cells = [
            f"`{driver['repositories'][0]['url']}`" if not driver["fault"] else "none",
            f"`{toolkit['repositories'][0]['url']}`",
            " ".join(f"`{package}`" for package in own["packages"] if package.startswith("docker")) if not own["fault"] else "none",
            f"`{other['repositories'][0]['url']}`" if not other["fault"] else "none",
        ]
        lines.append(f"| {row['title']} | {' | '.join(cells)} |")
    return lines


def mirror_rows() -> list[str]:
    lines = ["| what | variable | default | `mirror_region: cn` |", "|---|---|---|---|"]
    names = {
        "cuda": "`nvidia_driver_repository`, `cuda_toolkit_repository`",
        "toolkit": "`nvidia_container_toolkit_repository`",
        "docker": "`container_engine_repository`",
        "debian": "`nvidia_driver_debian_mirror`",
        "registry_mirrors": "`container_engine_registry_mirrors`",
    }
    for key, variable in names.items():
        urls = [[region[key]] if isinstance(region[key], str) else region[key] for region in table.MIRRORS.values()]
        cells = [", ".join(f"`{url}`" for url in found) or "none" for found in urls]
        lines.append(f"| {key.replace('_', ' ')} | {variable} | {' | '.join(cells)} |")
    return lines


def section() -> str:
    parts = [
        BEGIN,
        "",
        "### Driver",
        "",
        *driver_rows(),
        "",
        "### Driver without the parts of a desktop",
        "",
        "`nvidia_driver_variant: compute`. From branch 590 on Ubuntu's names lose the branch.",
        "",
        *compute_rows(),
        "",
        "### Branches",
        "",
        *branch_rows(),
        "",
        "### Repositories",
        "",
        *repository_rows(),
        "",
        "### Mirrors",
        "",
        *mirror_rows(),
        "",
        END,
    ]
    return "\n".join(parts)


def page(text: str) -> str:
    return text[: text.index(BEGIN)] + section() + text[text.index(END) + len(END) :]


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    wanted = page(text)
    if text == wanted:
        print("docs/gpu-hosts.md: up to date")
        return 0
    if "--check" in sys.argv:
        print("out of date: docs/gpu-hosts.md. Run python docs/gpu_hosts_table.py")
        return 1
    PAGE.write_text(wanted, encoding="utf-8")
    print("docs/gpu-hosts.md: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
