"""http(s) that keeps to the rules for URLs on its way: where redirects lead, and the addresses that names stand for."""

from __future__ import annotations

import ssl
import urllib.request
from functools import cache, partial
from http.client import HTTPConnection, HTTPMessage, HTTPSConnection
from ipaddress import ip_address
from typing import IO, Any

from .urls import url_fault

# Where a cloud's machines ask for their own keys, beside the link-local addresses: AWS over IPv6, Alibaba.
_METADATA = (ip_address("fd00:ec2::254"), ip_address("100.100.100.200"))


class RefusedAddressError(PermissionError):
    """A redirect or an address that is not followed."""


def open_http(request: urllib.request.Request | str, *, timeout_seconds: float) -> Any:
    """The answer of a server. Raises urllib's errors, and RefusedAddressError, which urllib puts into a URLError."""
    return _opener().open(request, timeout=timeout_seconds)


@cache
def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_Http(), _Https(ssl.create_default_context()), _Redirects())


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        fault = url_fault(newurl)
        if req.type == "https" and newurl.lower().startswith("http:"):
            fault = "from https to http"
        if fault:
            raise RefusedAddressError(f"{req.full_url}: the server's redirect is not followed: {fault}")
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None:
            new.must_be_public = not getattr(req, "peer_is_private", True)  # type: ignore[attr-defined]
        return new


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(partial(_HttpConnection, request=req), req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__(context=context)
        self._own_context = context

    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(partial(_HttpsConnection, request=req), req, context=self._own_context)


class _HttpConnection(HTTPConnection):
    def __init__(self, *arguments: Any, request: urllib.request.Request, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._request = request

    def connect(self) -> None:
        super().connect()
        _check_peer(self, self._request)


class _HttpsConnection(_HttpConnection, HTTPSConnection):
    """Checked once the connection is encrypted, before anything is asked."""


def _check_peer(connection: HTTPConnection, request: urllib.request.Request) -> None:
    # Once connected and before anything is asked: a name may stand for another address each time it is looked up.
    address = ip_address(connection.sock.getpeername()[0].partition("%")[0])
    address = getattr(address, "ipv4_mapped", None) or address
    fault = ""
    if address.is_link_local or address in _METADATA:
        fault = f"{address} is an address where machines keep their own keys"
    elif getattr(request, "must_be_public", False) and address.is_private:
        fault = f"it leads from a public server to {address}, an address of this network"
    if fault:
        connection.close()
        raise RefusedAddressError(f"{request.full_url} may not be read: {fault}")
    request.peer_is_private = address.is_private  # type: ignore[attr-defined]
