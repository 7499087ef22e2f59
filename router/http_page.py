"""The live page at ``/``: files of router/page, read once at start and served from memory.

A request names an entry of a fixed table, never a path. The page needs nothing from elsewhere, and
its policy lets the browser fetch nothing from elsewhere, run no script that is not one of these
files, and send no form anywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from aiohttp import ETag, web

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
INDEX = "index.html"
NAMES = (
    INDEX,
    "style.css",
    "cluster.css",
    "details.css",
    "chat.css",
    "icon.svg",
    "main.js",
    "api.js",
    "dom.js",
    "format.js",
    "charts.js",
    "cluster.js",
    "flow.js",
    "requests.js",
    "timeline.js",
    "chat.js",
)
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Kept, but asked about each time: the files of one version belong together.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    path: str
    content_type: str
    body: bytes
    etag: str

    async def serve(self, request: web.Request) -> web.Response:
        if any(tag.value in (self.etag, "*") for tag in request.if_none_match or ()):
            response = web.Response(status=304, headers=HEADERS)
        else:
            response = web.Response(
                body=self.body, content_type=self.content_type, charset="utf-8", headers=HEADERS
            )
        response.etag = ETag(self.etag)
        return response


def load_page() -> tuple[PageFile, ...]:
    folder = resources.files("router") / "page"
    found = []
    for name in NAMES:
        body = (folder / name).read_bytes()
        path = "/" if name == INDEX else f"/page/{name}"
        tag = hashlib.sha256(body).hexdigest()[:24]
        found.append(PageFile(path, _TYPES[name.rpartition(".")[2]], body, tag))
    return tuple(found)


def page_routes(files: Sequence[PageFile]) -> list[web.RouteDef]:
    return [web.get(file.path, file.serve) for file in files]
