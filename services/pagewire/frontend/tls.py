"""HTTPS: the flags' files as an SSL context. Knows nothing of HTTP."""

import ssl
from pathlib import Path

from pagewire.config import FrontendConfig


def context_of(config: FrontendConfig) -> ssl.SSLContext | None:
    """The TLS context of the listening socket; None without --ssl-certfile. Raises ValueError with
    one line that names the flag and the file."""
    if not config.ssl_certfile:
        for flag in ("ssl_keyfile", "ssl_ca_certs"):
            if getattr(config, flag):
                raise ValueError(
                    f"--{flag.replace('_', '-')} needs --ssl-certfile, the server's certificate"
                )
        return None
    for flag in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        if (path := getattr(config, flag)) and not Path(path).is_file():
            raise ValueError(f"--{flag.replace('_', '-')} {path}: there is no such file")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # An encrypted key gets an empty password, which fails: without one, OpenSSL would ask at
        # the terminal.
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile or None, password=bytes)
    except (ssl.SSLError, OSError) as error:
        where = config.ssl_certfile + (
            f" and {config.ssl_keyfile}" if config.ssl_keyfile else " (with no --ssl-keyfile)"
        )
        raise ValueError(
            f"--ssl-certfile: no certificate with its key in {where}: {error}"
        ) from None
    if config.ssl_ca_certs:
        try:
            context.load_verify_locations(config.ssl_ca_certs)
        except (ssl.SSLError, OSError) as error:
            raise ValueError(
                f"--ssl-ca-certs {config.ssl_ca_certs}: no certificates in it: {error}"
            ) from None
    context.verify_mode = ssl.VerifyMode(config.ssl_cert_reqs)
    return context
