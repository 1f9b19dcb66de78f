#!/usr/bin/env python3
"""Asks a frontend that speaks TLS, for pagewire-health: health_tls.py PORT PATH. Exit code 0 when it
answers 200, else 1 with a line that says why."""

import http.client
import os
import ssl
import sys

TIMEOUT_S = 4.0


def main() -> int:
    port, path = int(sys.argv[1]), sys.argv[2]
    certificate = os.environ.get("PAGEWIRE_SSL_CERTFILE", "")
    try:
        problem = ask(https(port, certificate, os.environ.get("PAGEWIRE_SSL_KEYFILE")), path)
    except (OSError, http.client.HTTPException) as error:
        problem = f"{path}: {error}"
    if problem:
        print(problem)
    return 1 if problem else 0


def ask(connection: http.client.HTTPConnection, path: str) -> str:
    connection.request("GET", path)
    answer = connection.getresponse()
    if answer.status == 200:
        return ""
    return f"{path} answered {answer.status}: {answer.read(500).decode(errors='replace')}"


def https(port: int, certificate: str, key: str | None) -> http.client.HTTPSConnection:
    """The server's certificate is not checked: it names a host and not this address. It is shown to
    a frontend that asks for clients' certificates."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if certificate:
        context.load_cert_chain(certificate, key or None)
    return http.client.HTTPSConnection("127.0.0.1", port, timeout=TIMEOUT_S, context=context)


if __name__ == "__main__":
    sys.exit(main())
