#!/usr/bin/env bash
# Starts dockerd and waits for it, also where PID 1 is not systemd.
set -euo pipefail
if [ "$(cat /proc/1/comm)" = systemd ]; then
  systemctl start docker
  exit 0
fi
# Cgroups are mounted only where the machine came without any.
if ! mountpoint -q /sys/fs/cgroup; then
  if [ -z "$(awk '!/^#/ && $2 != 0' /proc/cgroups)" ]; then
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
  else
    mount -t tmpfs -o mode=755 cgroup /sys/fs/cgroup
    awk '!/^#/ && $4 == 1 {print $1}' /proc/cgroups | while read -r controller; do
      mkdir -p "/sys/fs/cgroup/$controller"
      mount -t cgroup -o "$controller" cgroup "/sys/fs/cgroup/$controller" || rmdir "/sys/fs/cgroup/$controller"
    done
  fi
fi
# With v1 systemd in a container wants the hierarchy of its name.
if [ ! -f /sys/fs/cgroup/cgroup.controllers ] && ! mountpoint -q /sys/fs/cgroup/systemd; then
  mount -o remount,rw /sys/fs/cgroup 2>/dev/null || true
  mkdir -p /sys/fs/cgroup/systemd
  mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd
fi
# What a killed daemon left behind.
pid=$(cat /var/run/docker.pid 2>/dev/null || true)
if [ -n "$pid" ] && ! grep -qs dockerd "/proc/$pid/comm"; then
  rm -f /var/run/docker.pid /var/run/docker/containerd/containerd.pid
fi
device=$(ip -4 route show default | awk '{print $5; exit}')
mtu=$(cat "/sys/class/net/$device/mtu" 2>/dev/null || echo 1500)
setsid nohup dockerd --mtu "$mtu" --log-level warn >>/var/log/dockerd.log 2>&1 </dev/null &
for _ in $(seq 120); do
  if docker info >/dev/null 2>&1; then
    # So that `lab.py clean` can end what was started here, and nothing else.
    cp /var/run/docker.pid /run/selfhosted-fastgpt-lab.dockerd
    exit 0
  fi
  sleep 0.5
done
echo "dockerd did not come up; the end of /var/log/dockerd.log:" >&2
tail -n 30 /var/log/dockerd.log >&2
exit 1
