#!/bin/sh
# Two NVIDIA L20 on the PCI bus, as the kernel shows them, and the programs that a container lacks.
set -eu
mountpoint -q /sys/bus/pci/devices || mount -t tmpfs none /sys/bus/pci/devices
mountpoint -q /sys/module || mount -t tmpfs none /sys/module
for bus in 01 02; do
  device=/sys/bus/pci/devices/0000:$bus:00.0
  mkdir -p "$device"
  echo 0x10de >"$device/vendor"
  echo 0x030200 >"$device/class"
  echo 0x26ba >"$device/device"
done
for number in 0 1; do [ -e /dev/nvidia$number ] || mknod -m 0666 /dev/nvidia$number c 195 $number; done
for name in dkms modinfo modprobe; do install -m 0755 /srv/stub/fakes/$name /usr/local/bin/; done
# apt runs the packages' scripts without /usr/local on their path
[ -e /usr/bin/uname.real ] || mv /usr/bin/uname /usr/bin/uname.real
install -m 0755 /srv/stub/fakes/uname /usr/bin/uname
