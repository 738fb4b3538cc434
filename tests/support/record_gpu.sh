#!/usr/bin/env bash
# What a host with NVIDIA GPUs says to those who ask as the module gpu_facts does, for the tests: record_gpu.sh DIRECTORY
# Standard output, error output and code of each command, what the module reads of /sys, and what the module makes of it. UUIDs, serial numbers
# and other numbers of the single device are zeroed, and programs lose their names. It changes nothing, and goes on where a command fails or is
# not there. PYTHONPATH needs ansible-core.
set -uo pipefail
to=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/../.." || exit
export LC_ALL=C PYTHONPATH=.collections${PYTHONPATH:+:$PYTHONPATH}
GPUS=ansible_collections.selfhosted.fastgpt.plugins.module_utils._gpus
python=${PYTHON:-python3}

keep() { # NAME COMMAND...
  local name=$1
  shift
  timeout -k 5 40 "$@" </dev/null >"$to/$name.out" 2>"$to/$name.err"
  echo $? >"$to/$name.rc"
  [ -s "$to/$name.err" ] || rm "$to/$name.err"
}

fields=$("$python" -c "from $GPUS import BASE_FIELDS, LATER_FIELDS; print(','.join(BASE_FIELDS + LATER_FIELDS))")
keep query_gpu nvidia-smi --query-gpu="$fields" --format=csv,noheader,nounits
keep query_gpu_unknown nvidia-smi --query-gpu=index,no.such.field --format=csv,noheader,nounits
keep memory nvidia-smi -q -d MEMORY
keep query_compute_apps nvidia-smi --query-compute-apps=pid,gpu_uuid,used_gpu_memory --format=csv,noheader,nounits
keep nvidia_smi nvidia-smi
keep list nvidia-smi -L
keep full_xml nvidia-smi -q -x
keep topology nvidia-smi topo -m
keep fields nvidia-smi --help-query-gpu
keep no_such_gpu nvidia-smi -i 99
keep driver_version cat /proc/driver/nvidia/version
keep modprobe nvidia-modprobe --version
keep lspci lspci -nn
keep kernel uname -r
keep secure_boot mokutil --sb-state
keep devices sh -c 'ls -l /dev/nvidia*'

# a path and what is there, since the names of these folders may not be in a repository
for device in /sys/bus/pci/devices/*; do
  [ -e "$device/vendor" ] || continue
  for file in vendor class device subsystem_vendor subsystem_device; do
    [ -r "$device/$file" ] && echo "${device#/sys/}/$file $(cat "$device/$file")"
  done
  [ -e "$device/driver" ] && echo "${device#/sys/}/driver $(basename "$(readlink -f "$device/driver")")"
done >"$to/sysfs.txt"
[ -e /sys/module/nvidia/version ] && echo "module/nvidia/version $(cat /sys/module/nvidia/version)" >>"$to/sysfs.txt"

# shellcheck disable=SC2016
keep module sh -c 'echo "{\"ANSIBLE_MODULE_ARGS\": {}}" | "$0" -m ansible_collections.selfhosted.fastgpt.plugins.modules.gpu_facts' "$python"
# shellcheck disable=SC2016
keep module_own sh -c 'echo "{\"ANSIBLE_MODULE_ARGS\": {\"own_services\": [\"selfhosted-model@*.service\"]}}" | "$0" -m ansible_collections.selfhosted.fastgpt.plugins.modules.gpu_facts' "$python"

find "$to" -type f \( -name '*.out' -o -name '*.err' \) -print0 | xargs -0 sed -E -i \
  -e 's/(GPU|MIG)-[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}/\1-00000000-0000-0000-0000-000000000000/g' \
  -e 's#<(serial|gpu_pdi|pdi|platformInfo|chassis_serial_number|gpu_guid|module_guid|cluster_uuid|uuid_ib)>[^<]*<#<\1>0<#g' \
  -e 's#<process_name>[^<]*<#<process_name>program<#g' \
  -e 's#^(\|.* (C|G|C\+G|M\+C) +)[^ ]+( +[0-9]+MiB \|)$#\1program\3#' \
  -e 's/^( *(Serial Number|Chassis Serial Number|GPU PDI|GPU GUID|ClusterUUID) *: ).*/\10/'
