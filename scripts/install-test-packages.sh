#!/bin/sh
# Installs the system packages that only the tests need: a real S3 server (see s3-server.sh), from Debian or Ubuntu.
set -eu

if dpkg-query -W -f '${Status}\n' ceph-common ceph-mon ceph-osd radosgw 2>/dev/null | grep -c 'ok installed' | grep -qx 4; then
  exit
fi
[ "$(id -u)" = 0 ] || exec sudo "$0"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
{ apt-get update && apt-get install --yes --no-install-recommends ceph-common ceph-mon ceph-osd radosgw; } >"$log" 2>&1 || {
  cat "$log" >&2
  exit 1
}
