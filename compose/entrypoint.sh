#!/bin/sh
# Starts one service under a name that no other container's service has: process ids repeat between containers, host names do not.
set -eu
service=$1
shift
# Unlike uname, it starts no process.
read -r host </proc/sys/kernel/hostname
exec pagewire "$service" --name "$service-$host" "$@"
