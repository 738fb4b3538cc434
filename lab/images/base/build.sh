#!/usr/bin/env bash
# build.sh SUITE: a Debian host with systemd, unprovisioned, as a tar on stdout.
# force-unsafe-io stays in the image: unpacking packages is what costs time in a lab host.
set -euo pipefail
suite=$1
here=$(cd "$(dirname "$0")" && pwd)
packages=systemd,systemd-sysv,dbus,python3,python3-venv,python3-apt,ca-certificates,iproute2,iptables,sudo,procps,openssh-server,curl
[ -d /dev/shm ] && export TMPDIR=/dev/shm
# On a failure mmdebstrap sends HUP to its whole process group, hence a session of its own.
# shellcheck disable=SC2016  # the hooks expand $1 themselves
exec setsid -w mmdebstrap --variant=minbase --include="$packages" \
  --aptopt='Acquire::Languages "none"' --aptopt='APT::Install-Recommends "false"' --dpkgopt=force-unsafe-io \
  --customize-hook="copy-in $here/rootfs/etc $here/rootfs/usr /" \
  --customize-hook='sh "$1"/usr/local/sbin/lab-base-setup "$1"; rm "$1"/usr/local/sbin/lab-base-setup' \
  "$suite" -
