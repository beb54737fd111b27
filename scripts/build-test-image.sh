#!/bin/sh
# Builds localhost/adfm:cpu with Podman, for tests/pipelines/test_containers.py. Where the base image cannot be pulled,
# one is made of Debian's packages, and pip in the build is configured as it is on this machine.
set -eu
cd "$(dirname "$0")/.."
export CONTAINERS_CONF="$PWD/tests/pipelines/containers.conf"

base_of_debian() {
  base=localhost/adfm-test-base
  podman image exists "$base" && return
  made=$(mktemp --suffix .tar)
  trap 'rm -f "$made"' EXIT
  mmdebstrap --quiet --variant=apt --include=ca-certificates,git,python3,python3-pip,python3-venv bookworm "$made" &&
    podman import --quiet "$made" "$base" >/dev/null
}

base=$(sed -n 's/^ARG BASE=//p' Containerfile)
set --
if ! podman image exists "$base" && ! timeout 300 podman pull --quiet "$base" >/dev/null 2>&1; then
  base_of_debian || true # what is missing is said below
  set -- --build-arg BASE="$base"
  # The files of pip's configuration, and what they name on this machine's disk.
  for path in $(.venv/bin/python -m pip config debug | sed -n 's/^ *\(\/.*\), exists: True$/\1/p') \
    $(.venv/bin/python -m pip config list | tr -d "'" | tr '= ' '\n\n' |
      sed 's,^file://,,; s,/simple/*$,,' | grep '^/' | sort -u); do
    set -- "$@" --volume "$path:$path:ro"
  done
fi
podman run --rm "$base" true || {
  echo 'NOT TESTED: containers do not run on this machine; the tests of the image will skip' >&2
  exit 0
}
make image TARGETS=cpu BUILDER=podman BUILD_ARGS="$*"
