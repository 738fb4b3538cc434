# shellcheck shell=sh
# What stands on this host, one fact a line; read by the filter nvidia_driver_state. Changes nothing, needs nothing that a bare host lacks.
set -u
export LC_ALL=C
kernel=$(uname -r)
echo "kernel $kernel"
if [ -e /etc/selfhosted-fastgpt/nvidia_driver ]; then echo "managed $(tr '\n' ' ' </etc/selfhosted-fastgpt/nvidia_driver)"; fi

# mokutil where it is there, else the firmware's own variable: its last byte says it
if command -v mokutil >/dev/null; then
  case $(mokutil --sb-state 2>&1) in
    *'SecureBoot enabled'*) echo 'secure_boot enabled' ;;
    *'SecureBoot disabled'*) echo 'secure_boot disabled' ;;
  esac
else
  for variable in /sys/firmware/efi/efivars/SecureBoot-*; do
    if [ -r "$variable" ]; then
      case $(od -An -t u1 "$variable" | tr -d '\n' | sed 's/ *$//; s/.* //') in 1) echo 'secure_boot enabled' ;; *) echo 'secure_boot disabled' ;; esac
    fi
  done
fi

if [ -r /sys/module/nvidia/version ]; then echo "loaded $(cat /sys/module/nvidia/version)"; fi
if [ -d /sys/module/nouveau ]; then echo 'nouveau loaded'; fi
if [ -n "$(ls -A /proc/driver/nvidia-nvswitch/devices 2>/dev/null)" ]; then echo 'nvswitch yes'; fi
if command -v modinfo >/dev/null; then
  for name in nvidia nvidia-current; do
    version=$(modinfo -k "$kernel" -F version "$name" 2>/dev/null | head -n 1)
    if [ -n "$version" ]; then echo "module $name $version"; fi
  done
fi
if command -v dkms >/dev/null; then dkms status 2>/dev/null | sed 's/^/dkms /'; fi
if command -v dpkg-query >/dev/null; then
  dpkg-query -W -f 'package ${Package} ${Version} ${db:Status-Want} ${db:Status-Status}\n' \
    '*nvidia*' 'cuda-drivers*' 'libcuda*' 'libnvcuvid*' 'libnvoptix*' 'linux-headers-*' gcc make dkms nvlsm libnvsdm 2>/dev/null
else
  locked=$(cat /etc/dnf/plugins/versionlock.list 2>/dev/null)
  rpm -qa --qf '%{NAME} %{VERSION}-%{RELEASE} %{VERSION}-%{RELEASE}.%{ARCH}\n' '*nvidia*' 'cuda-drivers*' 'kernel-devel*' 'kernel-headers' gcc make dkms nvlsm libnvsdm |
    while read -r name version whole; do
      want=install
      case "$locked" in *"$name-"*) want=hold ;; esac
      echo "package $name $version $want installed"
      case $name in kernel-devel) echo "package kernel-devel-$whole $version $want installed" ;; esac
    done
fi
for file in /usr/bin/nvidia-uninstall /usr/bin/nvidia-installer; do
  if [ -e "$file" ]; then echo "uninstaller $file"; fi
done
if command -v docker >/dev/null; then timeout 20 docker ps --format 'container {{.Names}}' 2>/dev/null; fi
if command -v podman >/dev/null; then timeout 20 podman ps --format 'container {{.Names}}' 2>/dev/null; fi
if [ -e /lib/systemd/system/nvidia-persistenced.service ] || [ -e /usr/lib/systemd/system/nvidia-persistenced.service ]; then echo 'persistenced yes'; fi

# an initramfs that is older than the blacklist brings nouveau back with the next boot
list=/etc/modprobe.d/blacklist-nouveau.conf
for image in "/boot/initrd.img-$kernel" "/boot/initramfs-$kernel.img" /boot/initrd.img-*; do
  if [ -e "$image" ] && [ -e "$list" ] && { command -v update-initramfs || command -v dracut; } >/dev/null; then
    if [ "$image" -ot "$list" ]; then echo 'initramfs stale'; else echo 'initramfs fresh'; fi
    break
  fi
done
exit 0
