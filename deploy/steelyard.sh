#!/bin/sh
# `steelyard` on a machine of the cluster: as the service's user, with the service's settings, against the running cluster.
set -eu
if [ "$(id -un)" != steelyard ] && [ "$(id -u)" -ne 0 ]; then
    echo "error: run it as root (sudo steelyard ...)" >&2
    exit 1
fi
set -a
# shellcheck source=/dev/null
. /etc/steelyard/steelyard.env
set +a
export PYTHONPATH=/opt/steelyard/current PYTHONDONTWRITEBYTECODE=1 HOME=/var/lib/steelyard XDG_CACHE_HOME=/var/cache/steelyard
set -- /opt/steelyard/venv/bin/python -m serving.cli.main "$@"
cd /
if [ "$(id -u)" -eq 0 ]; then
    exec runuser -u steelyard -- "$@"
fi
exec "$@"
