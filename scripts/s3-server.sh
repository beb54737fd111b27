#!/bin/sh
# A real S3 server on this machine for the tests: Ceph's object gateway on one monitor and one store in memory.
#
#   scripts/s3-server.sh start DIR PORT     http://127.0.0.1:PORT; state, logs and process ids in DIR, which is made anew
#   scripts/s3-server.sh stop DIR           ends it and removes DIR
#
# Two users: owner (key owner, secret owner-secret) and stranger (stranger, stranger-secret), who may do nothing of the
# owner's. Packages: scripts/install-test-packages.sh. Nobody else can reach it, and nothing is kept: not for real data.
set -eu

usage() {
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

stop() {
  for file in "$1"/*.pid; do
    [ -f "$file" ] && kill -9 "$(cat "$file")" 2>/dev/null || true # they hold nothing that has to be saved
  done
  rm -rf "$1"
}

start() {
  dir=$1 port=$2
  for program in ceph ceph-mon ceph-osd monmaptool radosgw radosgw-admin; do
    command -v $program >/dev/null || { echo "$0: $program is missing; run scripts/install-test-packages.sh" >&2; exit 1; }
  done
  mkdir "$dir" "$dir/mon" "$dir/osd" "$dir/rgw" "$dir/run"
  dir=$(cd "$dir" && pwd)
  monitor=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  id=$(cat /proc/sys/kernel/random/uuid)
  cat >"$dir/ceph.conf" <<END
[global]
fsid = $id
mon host = [v2:127.0.0.1:$monitor/0]
mon initial members = a
public addr = 127.0.0.1
cluster addr = 127.0.0.1
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
ms bind ipv6 = false
# Without these three the processes never find each other when nobody has to log in.
ms mon client mode = crc secure
ms mon service mode = crc secure
ms mon cluster mode = crc secure
auth cluster required = none
auth service required = none
auth client required = none
osd objectstore = memstore
memstore device bytes = 4294967296
osd max object name len = 460
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd class load list = *
osd class default list = *
mon allow pool size one = true
mon max pg per osd = 1000
# A start is a long row of small decisions of the monitor, each of which waits this long.
paxos propose interval = 0.05
paxos min wait = 0.01
run dir = $dir/run
crash dir = $dir/run
admin socket = $dir/run/\$name.asok
log file = $dir/\$name.log
mon data = $dir/mon
osd data = $dir/osd
mgr data = $dir/mgr
rgw data = $dir/rgw
rgw frontends = beast endpoint=127.0.0.1:$port tcp_nodelay=1
rgw thread pool size = 32
END
  trap 'stop "$dir"' EXIT
  trap 'exit 1' INT TERM
  monmaptool --create --addv a "[v2:127.0.0.1:$monitor]" --fsid "$id" "$dir/monmap" >/dev/null
  ceph-mon -c "$dir/ceph.conf" -i a --mkfs --monmap "$dir/monmap" >/dev/null
  run mon ceph-mon -i a
  osd=$(cat /proc/sys/kernel/random/uuid)
  timeout 60 ceph -c "$dir/ceph.conf" osd new "$osd" >/dev/null
  ceph-osd -c "$dir/ceph.conf" -i 0 --mkfs --osd-uuid "$osd" >/dev/null 2>&1
  run osd ceph-osd -i 0
  run rgw radosgw -n client.rgw
  for user in owner stranger; do
    timeout 60 radosgw-admin -c "$dir/ceph.conf" user create --uid=$user --display-name=$user --access-key=$user \
      --secret-key=$user-secret >/dev/null 2>&1
  done
  tries=600
  until python3 -c "import socket; socket.create_connection(('127.0.0.1', $port))" 2>/dev/null; do
    tries=$((tries - 1))
    [ $tries -gt 0 ] && kill -0 "$(cat "$dir/rgw.pid")" || { tail -5 "$dir/rgw.out" >&2; exit 1; }
    sleep 0.1
  done
  trap - EXIT INT TERM
}

# run NAME PROGRAM ARGUMENT...
run() {
  name=$1 program=$2
  shift 2
  "$program" -c "$dir/ceph.conf" "$@" -f >"$dir/$name.out" 2>&1 </dev/null &
  echo $! >"$dir/$name.pid"
}

case "${1-} $#" in
  "start 3") start "$2" "$3" ;;
  "stop 2") stop "$2" ;;
  *) usage ;;
esac
