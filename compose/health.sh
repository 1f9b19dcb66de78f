#!/bin/bash
# The health of one container, for its HEALTHCHECK: exit code 0 when it is well, 1 with a line that says why when it is not.
#
#   pagewire-health http        the frontend's event loop answers (GET /live)
#   pagewire-health ready       the whole stack can serve (GET /ready)
#   pagewire-health scheduler   the scheduler's loop turns, or this container's spare waits for its turn
#   pagewire-health tokenizer   ... and lists this container's tokenizer as ready, whose loop turns
#   pagewire-health worker      ... and lists this container's worker as ready, whose loop turns
#
# It runs every few seconds in each container, so it starts no Python: services write a line into the run directory each second, whose first
# word is the machine's uptime. Only a frontend that speaks TLS is asked by one.
run_dir=${PAGEWIRE_RUN_DIR:-/run/pagewire}
oldest=10
timeout=4

# In a cluster, PAGEWIRE_PORT may be the URL of a service of that name, which is no setting.
port=8000
for value in "$PAGEWIRE_PORT" "$PORT"; do
    case $value in '' | *[!0-9]*) ;; *) port=$value ;; esac
done

# Unlike uname, it starts no process.
read -r host </proc/sys/kernel/hostname

# fresh NAME: says what the service's own line says, unless that is a recent "ok"
fresh() {
    local at text now
    read -r now _ </proc/uptime
    if ! read -r at text 2>/dev/null <"$run_dir/health-$1"; then
        echo "$1 has not started yet in $run_dir"
    elif [ $((${now%.*} - at)) -gt "$oldest" ]; then
        echo "$1 has made no progress for $((${now%.*} - at)) s"
    elif [ "${text%%[ ,]*}" != ok ]; then
        echo "$1: $text"
    else
        return 0
    fi
    return 1
}

# http PATH: asks the frontend in this container
http() {
    local status
    if [ -z "$PAGEWIRE_SSL_CERTFILE" ]; then
        { exec 3<>"/dev/tcp/127.0.0.1/$port"; } 2>/dev/null || { echo "nothing listens on port $port"; return 1; }
        printf 'GET %s HTTP/1.0\r\n\r\n' "$1" >&3
        IFS= read -r -t "$timeout" status <&3
        case $status in
            "HTTP/"*" 200 "*) return 0 ;;
            "HTTP/"*) echo "$1 answered ${status#* }"; tail -n 1 <&3; return 1 ;;
        esac
    fi
    exec python3 "${PAGEWIRE_HEALTH_TLS:-/usr/local/lib/pagewire-health-tls.py}" "$port" "$1"
}

case $1 in
    http) http /live ;;
    ready) http /ready ;;
    scheduler) fresh "scheduler-$host" ;;
    tokenizer | worker) fresh scheduler && fresh "$1-$host" ;;
    *) sed -n '2,/^run_dir/s/^# \{0,1\}//p' "$0"; exit 1 ;;
esac
