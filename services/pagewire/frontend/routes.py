"""What metrics and logs call a request: few words, whatever clients send."""

from typing import Final

from aiohttp import hdrs, web

UNKNOWN: Final = "unknown"


def route_of(request: web.Request) -> str:
    """The pattern of its route, such as /v1/models/{id}; UNKNOWN where there is none."""
    resource = request.match_info.route.resource
    return UNKNOWN if resource is None else resource.canonical


def method_of(request: web.Request) -> str:
    """Its method, UNKNOWN for one that HTTP does not know."""
    return request.method if request.method in hdrs.METH_ALL else UNKNOWN
