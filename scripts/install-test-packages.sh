#!/bin/sh
# Installs the system packages that only the tests need, from Debian: a real S3 server (see s3-server.sh), Postgres, a browser,
# and a builder of container images (see build-test-image.sh).
set -eu

set -- ceph-common ceph-mon ceph-osd radosgw fonts-dejavu-core debian-archive-keyring mmdebstrap podman postgresql runc
command -v google-chrome >/dev/null || set -- "$@" chromium
[ "$(dpkg-query -W -f '${Status}\n' "$@" 2>/dev/null | grep -c 'ok installed')" -ne $# ] || exit 0
[ "$(id -u)" = 0 ] || exec sudo "$0"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
{ apt-get update && apt-get install --yes --no-install-recommends "$@"; } >"$log" 2>&1 || {
  cat "$log" >&2
  exit 1
}
