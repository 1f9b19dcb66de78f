"""The pages for browsers: a chat at `/`, the description of the API at `/docs`. Each is one HTML file
that is the same on every server and asks the server for all that it shows."""

import base64
import hashlib
import re
from pathlib import Path
from typing import Final

from aiohttp import web


class Page:
    """One of the HTML files of this directory, with the headers that let a browser run the script
    and the styles of this very file, and talk to this server alone."""

    def __init__(self, name: str) -> None:
        self._text = (Path(__file__).parent / name).read_text()
        scripts, styles = self._hashes("script"), self._hashes("style")
        self._policy = (
            f"default-src 'none'; script-src {scripts}; style-src {styles}; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

    def response(self, status: int = 200, **headers: str) -> web.Response:
        """The page as an answer with `status` and further `headers`."""
        return web.Response(
            text=self._text,
            status=status,
            content_type="text/html",
            charset="utf-8",
            headers={
                "Content-Security-Policy": self._policy,
                "X-Content-Type-Options": "nosniff",
                "Referrer-Policy": "no-referrer",
                "Cache-Control": "no-cache",
                **headers,
            },
        )

    def _hashes(self, tag: str) -> str:
        """The contents of the `tag` elements, as a policy's sources name them."""
        contents: list[str] = re.findall(f"<{tag}>(.*?)</{tag}>", self._text, re.DOTALL)
        digests = (hashlib.sha256(content.encode()).digest() for content in contents)
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


_HOME: Final = Page("home.html")
_DOCS: Final = Page("docs.html")


async def home(request: web.Request) -> web.Response:
    """GET /, /v1: a chat. The page needs no key; what it asks the server for does."""
    return _HOME.response()


async def docs(request: web.Request) -> web.Response:
    """GET /docs: what /openapi.json describes, as a page."""
    return _DOCS.response()


def docs_without_key() -> web.Response:
    """/docs for a request without a key: 401 as everywhere, with the same page for a body, which
    asks a person for the key."""
    return _DOCS.response(401, **{"WWW-Authenticate": "Bearer"})
