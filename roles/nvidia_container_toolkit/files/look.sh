# shellcheck shell=sh
# What stands of NVIDIA's container toolkit, one fact a line. Changes nothing.
set -u
export LC_ALL=C
if [ -e /etc/selfhosted-fastgpt/nvidia_container_toolkit ]; then echo managed; fi
for file in /etc/cdi/*.yaml /etc/cdi/*.json /var/run/cdi/*.yaml /var/run/cdi/*.json; do
  if [ -f "$file" ] && grep -q nvidia.com/gpu "$file"; then echo "cdi $file"; fi
done
# a specification names the libraries of the driver that it was made for
if [ -r /sys/module/nvidia/version ] && [ -f /var/run/cdi/nvidia.yaml ] && ! grep -qF "$(cat /sys/module/nvidia/version)" /var/run/cdi/nvidia.yaml; then
  echo stale
fi
if [ -f /etc/docker/daemon.json ] && grep -q nvidia-container-runtime /etc/docker/daemon.json; then echo runtime; fi
if command -v dpkg-query >/dev/null; then
  dpkg-query -W -f '${db:Status-Status} package ${Package} ${Version}\n' '*nvidia-container*' nvidia-docker2 2>/dev/null | sed -n 's/^installed //p'
else
  rpm -qa --qf 'package %{NAME} %{VERSION}-%{RELEASE}\n' '*nvidia-container*' nvidia-docker2
fi
exit 0
