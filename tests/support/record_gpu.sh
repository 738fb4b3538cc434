#!/usr/bin/env bash
# What a host with NVIDIA GPUs says to those who ask as the module gpu_facts does, for the tests: record_gpu.sh DIRECTORY
# Standard output, error output and code of each command, what the module reads of /sys, and what the module makes of it. UUIDs, serial numbers
# and other numbers of the single device are zeroed. It changes nothing, and goes on where a command fails or is not there. PYTHONPATH needs ansible-core.
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

for device in /sys/bus/pci/devices/*; do
  [ -e "$device/vendor" ] || continue
  copy=$to$device
  mkdir -p "$copy"
  for file in vendor class device subsystem_vendor subsystem_device; do
    cat "$device/$file" >"$copy/$file" 2>/dev/null || rm -f "$copy/$file"
  done
  if [ -e "$device/driver" ]; then
    driver=$(basename "$(readlink -f "$device/driver")")
    mkdir -p "$to/sys/bus/pci/drivers/$driver"
    ln -sfn "../../drivers/$driver" "$copy/driver"
  fi
done
if [ -e /sys/module/nvidia/version ]; then
  mkdir -p "$to/sys/module/nvidia"
  cat /sys/module/nvidia/version >"$to/sys/module/nvidia/version"
fi

# shellcheck disable=SC2016
keep module sh -c 'echo "{\"ANSIBLE_MODULE_ARGS\": {}}" | "$0" -m ansible_collections.selfhosted.fastgpt.plugins.modules.gpu_facts' "$python"
# shellcheck disable=SC2016
keep module_own sh -c 'echo "{\"ANSIBLE_MODULE_ARGS\": {\"own_services\": [\"selfhosted-model@*.service\"]}}" | "$0" -m ansible_collections.selfhosted.fastgpt.plugins.modules.gpu_facts' "$python"

find "$to" -type f \( -name '*.out' -o -name '*.err' \) -print0 | xargs -0 sed -E -i \
  -e 's/(GPU|MIG)-[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}/\1-00000000-0000-0000-0000-000000000000/g' \
  -e 's#<(serial|gpu_pdi|pdi|platformInfo|chassis_serial_number|gpu_guid|module_guid|cluster_uuid|uuid_ib)>[^<]*<#<\1>0<#g' \
  -e 's/^( *(Serial Number|Chassis Serial Number|GPU PDI|GPU GUID|ClusterUUID) *: ).*/\10/'
