#!/usr/bin/env python3
"""The health of one container, for its HEALTHCHECK: exit code 0 when it is well, 1 with a line that says why when it is not.

    pagewire-health http        the frontend's event loop answers (GET /live)
    pagewire-health ready       the whole stack can serve (GET /ready)
    pagewire-health scheduler   the scheduler answers a message in time
    pagewire-health tokenizer   ... and lists this container's tokenizer as ready
    pagewire-health worker      ... and lists this container's worker as ready

The last three ask the scheduler what it knows, as any process of the stack could: a heartbeat from an unknown process is answered with
the roster. Each container asks from one address of its own, so that the scheduler keeps one connection for it, however often it asks.
"""

import hashlib
import http.client
import os
import socket
import ssl
import sys
import time

TIMEOUT_S = 4.0


def main() -> int:
    what = sys.argv[1] if len(sys.argv) == 2 else "--help"
    try:
        if what in ("http", "ready"):
            problem = ask_http("/live" if what == "http" else "/ready")
        elif what in ("scheduler", "tokenizer", "worker"):
            problem = ask_scheduler(what)
        else:
            problem = __doc__ or ""
    except OSError as error:
        problem = f"{what}: {error}"
    if problem:
        print(problem)
    return 1 if problem else 0


def ask_http(path: str) -> str:
    connection = connect(int(os.environ.get("PORT", "8000")))
    connection.request("GET", path)
    answer = connection.getresponse()
    return (
        ""
        if answer.status == 200
        else f"{path} answered {answer.status}: {answer.read(500).decode(errors='replace')}"
    )


def connect(port: int) -> http.client.HTTPConnection:
    """Over HTTPS where the frontend has a certificate. It is not checked: it names a host and not
    this address."""
    certificate = os.environ.get("PAGEWIRE_SSL_CERTFILE")
    if not certificate:
        return http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    # Shown to a frontend that asks for clients' certificates.
    context.load_cert_chain(certificate, os.environ.get("PAGEWIRE_SSL_KEYFILE") or None)
    return http.client.HTTPSConnection("127.0.0.1", port, timeout=TIMEOUT_S, context=context)


def ask_scheduler(role: str) -> str:
    from pagewire_protocol.channels import Inbox, Outbox, inbox_address, prepare_run_dir
    from pagewire_protocol.messages import Heartbeat, Role, Roster

    run_dir = prepare_run_dir(os.environ.get("PAGEWIRE_RUN_DIR", "/run/pagewire"))
    host = socket.gethostname()
    own = int.from_bytes(hashlib.sha256(f"{role}-{host}".encode()).digest()[:7], "big") | 1
    inbox: Inbox[Roster] = Inbox(run_dir, Role.WORKER, own)
    outbox = Outbox()
    try:
        outbox.send(
            inbox_address(run_dir, Role.SCHEDULER, 0), Heartbeat(inbox.address, own, 0, False)
        )
        deadline = time.monotonic() + TIMEOUT_S
        while (left := deadline - time.monotonic()) > 0 and inbox.wait(left):
            for roster in inbox.drain():
                return judge(roster.peers, role, f"{role}-{host}")
    finally:
        outbox.close()
        inbox.close()
    return f"the scheduler did not answer within {TIMEOUT_S:g} s"


def judge(peers: tuple, role: str, name: str) -> str:
    if role == "scheduler":
        return ""
    mine = [peer for peer in peers if peer.name == name]
    if not mine:
        return f"the scheduler knows no {name}"
    return "" if mine[0].ready else f"{name}: {mine[0].stage} {mine[0].fraction:.0%}"


if __name__ == "__main__":
    sys.exit(main())
