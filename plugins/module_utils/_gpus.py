# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: for the modules of this collection only; it may change in any release.
"""NVIDIA GPUs from the PCI bus and from nvidia-smi, whatever state the driver is in. No function here raises on what it reads."""

from __future__ import annotations

import csv
import fnmatch
import os
import re
from typing import Any, Callable, Dict, List, Optional, Tuple

# The fields of one query. The last two are not known to every branch: compute_cap came after 470.
BASE_FIELDS = ("index", "name", "uuid", "pci.bus_id", "memory.total", "memory.used", "driver_version")
LATER_FIELDS = ("compute_cap", "mig.mode.current")

# Compute capability by PCI device id, for GPUs whose driver does not say it. NVIDIA gives each chip a range of ids; (from, to, capability).
CAPABILITIES: Tuple[Tuple[int, int, str], ...] = (
    (0x0FC0, 0x0FFF, "3.0"),  # GK107
    (0x1000, 0x101F, "3.5"),  # GK110
    (0x1020, 0x103F, "3.5"),
    (0x1180, 0x11FF, "3.0"),  # GK104, GK106
    (0x1340, 0x13BF, "5.0"),  # GM108, GM107
    (0x13C0, 0x143F, "5.2"),  # GM204, GM206
    (0x15F0, 0x15FF, "6.0"),  # GP100: P100
    (0x1600, 0x17FF, "5.2"),  # GM204, GM200: M40
    (0x1B00, 0x1D7F, "6.1"),  # GP102 to GP108: P40, P4
    (0x1D80, 0x1DFF, "7.0"),  # GV100: V100
    (0x1E00, 0x1FFF, "7.5"),  # TU10x: T4
    (0x2080, 0x20FF, "8.0"),  # GA100: A100, A800, A30
    (0x2180, 0x21FF, "7.5"),  # TU116
    (0x2200, 0x22FF, "8.6"),  # GA102: A10, A40, 3090
    (0x2300, 0x23FF, "9.0"),  # GH100: H100, H800, H20, H200
    (0x2400, 0x25FF, "8.6"),  # GA103 to GA107
    (0x2600, 0x28FF, "8.9"),  # AD10x: L4, L20, L40S, 4090
    (0x2900, 0x29FF, "10.0"),  # GB100: B200
    (0x2B80, 0x2DFF, "12.0"),  # GB20x: 5090
    (0x2E00, 0x2E7F, "12.1"),  # GB10
    (0x2F00, 0x2FFF, "12.0"),  # GB205
    (0x3180, 0x31FF, "10.3"),  # GB300
)
# Exceptions in those ranges.
CAPABILITY_OF = {0x102D: "3.7"}  # K80
# Names of GPUs of data centres and workstations, for a report before a driver is there.
NAMES = {
    0x102D: "Tesla K80", 0x15F8: "Tesla P100", 0x15F9: "Tesla P100", 0x17FD: "Tesla M40", 0x1B38: "Tesla P40", 0x1BB3: "Tesla P4",
    0x1DB1: "Tesla V100", 0x1DB4: "Tesla V100", 0x1DB5: "Tesla V100", 0x1DB6: "Tesla V100", 0x1E02: "TITAN RTX", 0x1E04: "GeForce RTX 2080 Ti",
    0x1EB8: "Tesla T4", 0x20B0: "A100", 0x20B2: "A100", 0x20B5: "A100", 0x20B7: "A30", 0x20F1: "A100", 0x20F3: "A800", 0x20F5: "A800",
    0x2204: "GeForce RTX 3090", 0x2236: "A10", 0x2322: "H800", 0x2324: "H800", 0x2329: "H20", 0x2330: "H100", 0x2331: "H100", 0x2335: "H200",
    0x2684: "GeForce RTX 4090", 0x2685: "GeForce RTX 4090 D", 0x26B9: "L40S", 0x26BA: "L20", 0x27B8: "L4", 0x2901: "B200",
    0x2B85: "GeForce RTX 5090", 0x2B87: "GeForce RTX 5090 D",
}  # fmt: skip

INSTALL = "Install the NVIDIA driver (branch 580 serves every GPU from Maxwell to Blackwell) and reboot"


def capability_of(device_id: Optional[int]) -> Optional[str]:
    """Compute capability of a PCI device id, None where the table has none."""
    if device_id is None:
        return None
    if device_id in CAPABILITY_OF:
        return CAPABILITY_OF[device_id]
    return next((capability for first, last, capability in CAPABILITIES if first <= device_id <= last), None)


def _read(path: str, limit: int = 200) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as handle:
            return handle.read(limit).strip()
    except OSError:
        return ""


def _hexadecimal(text: str) -> Optional[int]:
    try:
        return int(text, 16)
    except ValueError:
        return None


def _four_digits(number: Optional[int]) -> Optional[str]:
    return None if number is None else "%04x" % number


def bus_id(text: str) -> str:
    """One form for the kernel's 0000:3b:00.0 and nvidia-smi's 00000000:3B:00.0."""
    match = re.match(r"^([0-9a-fA-F]{4,8}):([0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-7])$", text.strip())
    if not match:
        return text.strip().lower()
    return "%04x:%s" % (int(match.group(1), 16), match.group(2).lower())


def scan_bus(root: str = "/sys") -> List[Dict[str, Any]]:
    """NVIDIA's display controllers and accelerators, as the kernel sees them; needs neither a driver nor a package."""
    folder = os.path.join(root, "bus/pci/devices")
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    found = []
    for name in names:
        path = os.path.join(folder, name)
        if _read(os.path.join(path, "vendor")).lower() != "0x10de" or not _read(os.path.join(path, "class")).lower().startswith("0x03"):
            continue
        bound = os.path.join(path, "driver")
        found.append(
            {
                "pci_bus": bus_id(name),
                "device_id": _hexadecimal(_read(os.path.join(path, "device"))),
                "bound": os.path.basename(os.path.realpath(bound)) if os.path.exists(bound) else "",
            }
        )
    return found


def count_nvswitches(root: str = "/sys") -> int:
    """NVSwitches on the bus. Those of Blackwell boards are not on it."""
    folder = os.path.join(root, "bus/pci/devices")
    try:
        names = os.listdir(folder)
    except OSError:
        return 0
    paths = [os.path.join(folder, name) for name in names]
    return sum(_read(os.path.join(path, "vendor")).lower() == "0x10de" and _read(os.path.join(path, "class")).lower().startswith("0x0680") for path in paths)


def loaded_driver(root: str = "/sys") -> str:
    """Version of the kernel module that is in memory, empty where none is."""
    return _read(os.path.join(root, "module/nvidia/version"))


def said(text: str) -> Optional[str]:
    """A value of nvidia-smi; None for its many ways to say nothing."""
    text = text.strip()
    if not text or text.startswith("[") or text.upper() in ("N/A", "ERR!", "UNKNOWN ERROR", "NOT SUPPORTED", "NONE"):
        return None
    return text


def _whole(text: Optional[str]) -> Optional[int]:
    match = re.match(r"^(\d+)(?:\.\d+)?(?:\s*MiB)?$", text or "")
    return int(match.group(1)) if match else None


def parse_csv(text: str, fields: Tuple[str, ...]) -> List[Dict[str, Optional[str]]]:
    """The rows of a query; a line that is no row, such as a warning, is left out."""
    rows = []
    try:
        for row in csv.reader(text.splitlines(), skipinitialspace=True):
            if len(row) == len(fields) and re.match(r"^\d+$", row[0].strip()):
                rows.append({field: said(value) for field, value in zip(fields, row)})
    except csv.Error:
        pass
    return rows


def unknown_field(text: str) -> bool:
    return "is not a valid field to query" in text


def failure(rc: int, text: str) -> str:
    """What is wrong and what helps, for an nvidia-smi that failed."""
    flat = " ".join(text.split())
    low = flat.lower()
    if "version mismatch" in low:
        return "The NVIDIA driver was updated, and the module of another version is still loaded. Reboot the host, and hold the driver's packages."
    if "no devices were found" in low:
        return "The NVIDIA driver runs and finds no GPU that it can use. Look for NVRM in the kernel's log (dmesg), and check power and seating of the card."
    if "insufficient permissions" in low:
        return "nvidia-smi may not open /dev/nvidia*. Run it as root, and check the modes of these files and SELinux."
    if rc == 9 or "couldn't communicate with the nvidia driver" in low:
        return (
            "nvidia-smi is installed, and no NVIDIA driver is loaded. Check that dkms status says installed for uname -r, that nouveau is not loaded"
            " and that Secure Boot accepts the module, then reboot."
        )
    if rc in (124, 137):
        return "nvidia-smi did not answer in time. Look for Xid errors in the kernel's log (dmesg), and reboot the host."
    if "unable to determine the device handle" in low or "gpu is lost" in low:
        return "A GPU has fallen off the bus (%s). Reboot the host; if it comes back, check power, cooling and seating of the card." % flat[:160].rstrip(".")
    return "nvidia-smi failed with code %d: %s. Repair or reinstall the NVIDIA driver." % (rc, (flat[:200] or "no message").rstrip("."))


def cuda_version(text: str) -> str:
    """The newest CUDA that the driver runs, from any of nvidia-smi's reports."""
    match = re.search(r"CUDA[A-Za-z ]*Version\s*:\s*(\d+\.\d+)", text)
    return match.group(1) if match else ""


Run = Callable[[List[str]], Tuple[int, str]]


def query(run: Run) -> Tuple[List[Dict[str, Optional[str]]], str]:
    """All GPUs that nvidia-smi shows, or why it shows none. `run` gets arguments and returns code and output."""

    def ask(fields: Tuple[str, ...]) -> Tuple[int, str]:
        return run(["--query-gpu=" + ",".join(fields), "--format=csv,noheader,nounits"])

    fields = BASE_FIELDS + LATER_FIELDS
    rc, text = ask(fields)
    if unknown_field(text):
        # an old branch: what it knows is asked for, the rest one by one
        rc, text = ask(BASE_FIELDS)
        rows = parse_csv(text, BASE_FIELDS)
        for field in LATER_FIELDS if rows else ():
            later_rc, later = ask(("index", field))
            values = {row["index"]: row[field] for row in parse_csv(later, ("index", field))} if later_rc == 0 else {}
            for row in rows:
                row[field] = values.get(row["index"])
    else:
        rows = parse_csv(text, fields)
    if not rows:
        return [], failure(rc, text) if rc != 0 or "no devices" in text.lower() else failure(rc, text or "it answered with nothing")
    return rows, failure(rc, text) if rc != 0 else ""


def _silent(device: Dict[str, Any], problem: str) -> str:
    if device["bound"] == "vfio-pci":
        return "The GPU %s is reserved for a virtual machine (vfio-pci). Give it back to the host, or serve the models in that machine." % device["pci_bus"]
    return problem


def gather(devices: List[Dict[str, Any]], module_version: str, run: Optional[Run], nvswitches: int = 0) -> Dict[str, Any]:
    """All facts. `run` is None where there is no nvidia-smi."""
    rows: List[Dict[str, Optional[str]]] = []
    problem, cuda = "", ""
    if run is not None:
        rows, problem = query(run)
        if rows:
            cuda = cuda_version(run(["-q", "-d", "MEMORY"])[1])
    elif devices and module_version:
        problem = "The NVIDIA driver %s is loaded, and nvidia-smi is missing. Install the driver's utilities of the same version." % module_version
    elif devices:
        nouveau = " nouveau drives the GPU: keep it out of the initramfs." if any(device["bound"] == "nouveau" for device in devices) else ""
        problem = "The NVIDIA driver is not installed. %s.%s" % (INSTALL, nouveau)

    by_bus = {device["pci_bus"]: device for device in devices}
    gpus: List[Dict[str, Any]] = []
    for row in rows:
        bus = bus_id(row["pci.bus_id"] or "")
        device_id = by_bus.get(bus, {}).get("device_id")
        memory = _whole(row["memory.total"])
        mig = {"enabled": True, "disabled": False}.get((row.get("mig.mode.current") or "").lower())
        gpus.append(
            {
                "index": int(row["index"] or 0),
                "name": row["name"] or NAMES.get(device_id or 0, "NVIDIA GPU"),
                "uuid": row["uuid"],
                "pci_bus": bus or None,
                "device_id": _four_digits(device_id),
                "kernel_driver": by_bus.get(bus, {}).get("bound") or None,
                "memory_mb": memory,
                "memory_used_mb": _whole(row["memory.used"]),
                "memory_foreign_mb": _whole(row["memory.used"]),
                "compute_capability": row.get("compute_cap") or capability_of(device_id),
                "driver_version": row["driver_version"] or module_version or None,
                "mig": mig,
                "problem": "" if memory else "The driver does not say how much memory this GPU has. Reboot the host, or look into the kernel's log (dmesg).",
            }
        )
    shown = {gpu["pci_bus"] for gpu in gpus}
    hidden = [device for device in devices if device["pci_bus"] not in shown]
    lost = ""
    if rows and hidden:
        names = ", ".join(device["pci_bus"] for device in hidden)
        lost = "The NVIDIA driver does not show the GPU %s. Look for NVRM and Xid in the kernel's log (dmesg), then reboot the host." % names
    # without a driver nobody numbers them; the bus is the order in which nvidia-smi will
    number = max((gpu["index"] for gpu in gpus), default=-1) + 1
    for position, device in enumerate(hidden):
        gpus.append(
            {
                "index": number + position,
                "name": NAMES.get(device["device_id"] or 0, "NVIDIA GPU %04x" % (device["device_id"] or 0)),
                "uuid": None,
                "pci_bus": device["pci_bus"],
                "device_id": _four_digits(device["device_id"]),
                "kernel_driver": device["bound"] or None,
                "memory_mb": None,
                "memory_used_mb": None,
                "memory_foreign_mb": None,
                "compute_capability": capability_of(device["device_id"]),
                "driver_version": module_version or None,
                "mig": None,
                "problem": _silent(device, problem or lost),
            }
        )
    versions = [gpu["driver_version"] for gpu in gpus if gpu["driver_version"]]
    if not problem and lost:
        problem = next((gpu["problem"] for gpu in gpus if gpu["problem"]), lost)
    return {
        "gpus": sorted(gpus, key=lambda gpu: int(gpu["index"])),
        "driver_version": versions[0] if versions else module_version,
        "loaded_version": module_version,
        "cuda_version": cuda,
        "nvswitches": nvswitches,
        # left-overs of a driver on a host without a GPU are nobody's problem
        "problem": problem if gpus else "",
    }


def service_of(cgroup: str) -> str:
    """Id of the container, or else the systemd unit, that a process belongs to, by its /proc/PID/cgroup."""
    container = re.search(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])", cgroup)
    if container:
        return container.group(0)
    units = re.findall(r"/([^/\s]+\.service)", cgroup)
    return units[-1] if units else ""


def subtract_own(facts: Dict[str, Any], run: Run, own: List[str], proc: str = "/proc") -> None:
    """Leaves in memory_foreign_mb what is used by others than these units and containers."""
    fields = ("pid", "gpu_uuid", "used_gpu_memory")
    rc, text = run(["--query-compute-apps=" + ",".join(fields), "--format=csv,noheader,nounits"])
    for row in parse_csv(text, fields) if rc == 0 else ():
        service = service_of(_read(os.path.join(proc, row["pid"] or "", "cgroup"), 4096))
        if not service or not any(fnmatch.fnmatchcase(service, pattern) for pattern in own):
            continue
        for gpu in facts["gpus"]:
            if gpu["uuid"] == row["gpu_uuid"] and gpu["memory_foreign_mb"] is not None:
                used = _whole(row["used_gpu_memory"])
                # how much of it is its own is not said everywhere; then nothing can be called foreign
                gpu["memory_foreign_mb"] = None if used is None else max(gpu["memory_foreign_mb"] - used, 0)
