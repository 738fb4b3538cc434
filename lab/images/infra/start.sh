#!/usr/bin/env bash
set -euo pipefail
nginx
exec docker-registry serve /etc/registry.yml
