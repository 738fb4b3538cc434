# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Signed flat repositories of stub packages under the names of NVIDIA's, for hosts that reach no repository of theirs and have no GPU.

    stub_repository.py DIRECTORY KERNEL

The packages hold shell scripts that behave as the real ones are known to: apt is content without headers and no module is built, nvidia-smi
ends with 9 where no module is loaded, and with a message on a mismatch. `fakes` holds what a bare container lacks: dkms, modinfo, modprobe, uname.
"""

from __future__ import annotations

import hashlib
import pathlib
import subprocess
import sys
import tempfile

DRIVERS = ("580.95.05", "580.173.02", "595.91.07")
TOOLKITS = ("1.19.1-1", "1.20.0-1")
STATE = "/var/lib/stub-nvidia"

NVIDIA_SMI = """#!/bin/sh
# STUB of nvidia-smi {version}
version={version}
loaded=$(cat {state}/loaded 2>/dev/null)
if [ -z "$loaded" ]; then
  echo "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA driver is installed and running."
  exit 9
fi
if [ "$loaded" != "$version" ]; then echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18; fi
case "$1" in
  --query-gpu=*)
    for i in 0 1; do echo "$i, STUB GPU, GPU-00000000-0000-0000-0000-00000000000$i, 00000000:0$((i + 1)):00.0, 46068, 0, $version, 8.9, [N/A]"; done;;
  -q) printf '%-54s : %s\\n' 'Driver Version' "$version" 'CUDA Version' 13.0;;
  -L) printf '%s\\n' 'GPU 0: STUB GPU (UUID: GPU-00000000-0000-0000-0000-000000000000)' \\
    'GPU 1: STUB GPU (UUID: GPU-00000000-0000-0000-0000-000000000001)';;
esac
"""
# As DKMS does it: no headers, no module, and apt ends well.
BUILD = """#!/bin/sh
kernel=$(uname -r)
mkdir -p {state}/dkms
if [ -e /lib/modules/$kernel/build ]; then
  mkdir -p {state}/$kernel
  echo {version} >{state}/$kernel/nvidia
  echo "nvidia/{version}, $kernel, x86_64: installed" >{state}/dkms/status
else
  echo "Module build for kernel $kernel was skipped since the kernel headers for this kernel do not seem to be installed."
  rm -rf {state}/$kernel
  echo "nvidia/{version}: added" >{state}/dkms/status
fi
exit 0
"""
FORGET = f'#!/bin/sh\nif [ "$1" != upgrade ]; then rm -rf {STATE}/dkms {STATE}/$(uname -r); fi\nexit 0\n'
CTK = f"""#!/bin/sh
# STUB of nvidia-ctk: writes a specification for the loaded driver, with the device nodes that the host pretends to have
[ "$1 $2" = 'cdi generate' ] || exit 0
mkdir -p /var/run/cdi
cat >/var/run/cdi/nvidia.yaml <<END
cdiVersion: 0.5.0
kind: nvidia.com/gpu
# libcuda.so.$(cat {STATE}/loaded)
devices:
  - name: all
    containerEdits:
      deviceNodes: [{{path: /dev/nvidia0}}, {{path: /dev/nvidia1}}]
containerEdits:
  mounts:
    - {{hostPath: /usr/bin/nvidia-smi, containerPath: /usr/bin/nvidia-smi, options: [ro, nosuid, nodev, bind]}}
    - {{hostPath: {STATE}, containerPath: {STATE}, options: [ro, nosuid, nodev, bind]}}
END
"""
REFRESH_SERVICE = "[Unit]\nDescription=STUB CDI refresh\n[Service]\nType=oneshot\nExecStart=/usr/bin/nvidia-ctk cdi generate\n"
REFRESH_PATH = "[Unit]\nDescription=STUB CDI refresh\n[Path]\nPathChanged=/usr/bin/nvidia-ctk\n[Install]\nWantedBy=multi-user.target\n"
PERSISTENCED = (
    "[Unit]\nDescription=STUB persistence daemon\n[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n"
)

FAKES = {
    "uname": '#!/bin/sh\nif [ "$1" = -r ] && [ -e /etc/stub-kernel ]; then exec cat /etc/stub-kernel; fi\nexec /usr/bin/uname.real "$@"\n',
    # modinfo -k KERNEL -F version NAME
    "modinfo": f"#!/bin/sh\nexec cat {STATE}/$2/$5\n",
    "dkms": f"#!/bin/sh\ncat {STATE}/dkms/status 2>/dev/null\nexit 0\n",
    "modprobe": f"""#!/bin/sh
for name in "$@"; do :; done
[ "$name" = nvidia ] || exit 0
version=$(cat {STATE}/$(uname -r)/nvidia) || exit 1
[ ! -e {STATE}/refused ] || {{ echo 'modprobe: ERROR: could not insert nvidia: Key was rejected by service' >&2; exit 1; }}
mkdir -p /sys/module/nvidia && echo "$version" >/sys/module/nvidia/version && echo "$version" >{STATE}/loaded
""",
}


class Package:
    """One stub: control fields, files, and scripts of dpkg."""

    def __init__(self, name: str, version: str, files: dict[str, str] | None = None, scripts: dict[str, str] | None = None, **fields: str) -> None:
        self.name, self.version, self.files, self.scripts = name, version, files or {}, scripts or {}
        self.fields = {"Package": name, "Version": version, "Architecture": "all", "Maintainer": "nobody <nobody@example.invalid>",
                       **{key.replace("_", "-"): value for key, value in fields.items()}, "Description": f"STUB of {name}"}  # fmt: skip

    @property
    def control(self) -> str:
        return "".join(f"{key}: {value}\n" for key, value in self.fields.items())

    def build(self, target: pathlib.Path) -> pathlib.Path:
        deb = target / f"{self.name}_{self.version}_all.deb"
        with tempfile.TemporaryDirectory() as scratch:
            root = pathlib.Path(scratch)
            root.chmod(0o755)
            for path, text in self.files.items():
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_text(text)
                (root / path).chmod(0o755 if text.startswith("#!") else 0o644)
            (root / "DEBIAN").mkdir()
            (root / "DEBIAN" / "control").write_text(self.control)
            for script, text in self.scripts.items():
                (root / "DEBIAN" / script).write_text(text)
                (root / "DEBIAN" / script).chmod(0o755)
            subprocess.run(["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(root), str(deb)], check=True, stdout=subprocess.DEVNULL)
        return deb


def cuda_packages(kernel: str) -> list[Package]:
    kind = "cloud-amd64" if kernel.endswith("-cloud-amd64") else "amd64"
    found = [
        Package(f"linux-headers-{kernel}", "99", {f"lib/modules/{kernel}/build/Makefile": "# STUB\n"}),
        Package(f"linux-headers-{kind}", "99", Depends=f"linux-headers-{kernel}"),
        Package(
            "cuda-toolkit-12-8",
            "12.8.1-1",
            {"usr/local/cuda-12.8/bin/nvcc": "#!/bin/sh\necho 'release 12.8'\n", "usr/local/cuda-12.8/lib64/libcudart.so": "STUB\n"},
        ),
        # what nobody must install, since it brings a driver
        Package("cuda", "12.8.1-1", Depends="cuda-drivers"),
    ]
    for branch in sorted({version.partition(".")[0] for version in DRIVERS}):
        pin = f"Package: *nvidia* cuda-drivers*\nPin: version {branch}.*\nPin-Priority: 1000\n"
        found.append(Package(f"nvidia-driver-pinning-{branch}", "1-1", {"etc/apt/preferences.d/nvidia-driver-pinning": pin},
                             Provides="nvidia-driver-pinning", Conflicts="nvidia-driver-pinning"))  # fmt: skip
    for version in DRIVERS:
        whole = f"{version}-1"
        build = {"postinst": BUILD.format(version=version, state=STATE), "prerm": FORGET}
        found += [
            Package(
                "nvidia-driver-cuda", whole, {"usr/bin/nvidia-smi": NVIDIA_SMI.format(version=version, state=STATE)}, Depends=f"nvidia-persistenced (= {whole})"
            ),
            Package("nvidia-persistenced", whole, {"lib/systemd/system/nvidia-persistenced.service": PERSISTENCED}),
            Package("nvidia-kernel-open-dkms", whole, scripts=build, Conflicts="nvidia-kernel-dkms"),
            Package("nvidia-kernel-dkms", whole, scripts=build, Conflicts="nvidia-kernel-open-dkms"),
            Package("nvidia-open", whole, Depends=f"nvidia-kernel-open-dkms (= {whole}), nvidia-driver-cuda (= {whole})"),
            Package("cuda-drivers", whole, Depends=f"nvidia-kernel-dkms (= {whole}), nvidia-driver-cuda (= {whole})", Conflicts="nvidia-open"),
        ]
    return found


def toolkit_packages() -> list[Package]:
    found = []
    for version in TOOLKITS:
        found += [
            Package("nvidia-container-toolkit", version, Depends=f"nvidia-container-toolkit-base (= {version}), libnvidia-container-tools (= {version})"),
            Package("nvidia-container-toolkit-base", version, {
                "usr/bin/nvidia-ctk": CTK, "usr/bin/nvidia-container-runtime": '#!/bin/sh\nexec runc "$@"\n',
                "lib/systemd/system/nvidia-cdi-refresh.service": REFRESH_SERVICE, "lib/systemd/system/nvidia-cdi-refresh.path": REFRESH_PATH}),
            Package("libnvidia-container-tools", version, Depends=f"libnvidia-container1 (= {version})"),
            Package("libnvidia-container1", version),
        ]  # fmt: skip
    return found


def publish(packages: list[Package], folder: pathlib.Path, home: pathlib.Path) -> None:
    """Packages, Release and InRelease of a flat repository."""
    folder.mkdir(parents=True)
    index = ""
    for package in packages:
        data = package.build(folder).read_bytes()
        index += f"{package.control}Filename: ./{package.name}_{package.version}_all.deb\nSize: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n\n"
    (folder / "Packages").write_text(index)
    digest = hashlib.sha256(index.encode()).hexdigest()
    (folder / "Release").write_text(
        f"Origin: STUB\nLabel: STUB\nSuite: stub\nDate: Thu, 01 Jan 2026 00:00:00 UTC\nSHA256:\n {digest} {len(index.encode())} Packages\n"
    )
    subprocess.run(["gpg", "--homedir", str(home), "--batch", "--yes", "--clearsign", "-o", str(folder / "InRelease"), str(folder / "Release")], check=True)


def main(target: pathlib.Path, kernel: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        home = pathlib.Path(scratch)
        home.chmod(0o700)
        gpg = ["gpg", "--homedir", str(home), "--batch", "--quiet"]
        subprocess.run([*gpg, "--passphrase", "", "--quick-generate-key", "STUB repository <nobody@example.invalid>", "rsa3072", "sign", "never"], check=True)
        publish(cuda_packages(kernel), target / "cuda", home)
        publish(toolkit_packages(), target / "toolkit", home)
        key = subprocess.run([*gpg, "--armor", "--export"], check=True, capture_output=True, text=True).stdout
        for path in (target / "key.asc", target / "toolkit" / "gpgkey"):
            path.write_text(key)
        subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "all"], check=False)
    fakes = target / "fakes"
    fakes.mkdir()
    for name, text in FAKES.items():
        (fakes / name).write_text(text)
        (fakes / name).chmod(0o755)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2])
