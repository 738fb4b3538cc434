# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A stand-in for fastgpt-sandbox, written from the recorded contract: it is there, but runs no code."""

from __future__ import annotations

import os

from aiohttp import web


async def run_code(_request: web.Request) -> web.Response:
    return web.json_response({"statusCode": 400, "message": "this is a lab stand-in for fastgpt-sandbox: it runs no code"}, status=400)


async def missing(request: web.Request) -> web.Response:
    return web.json_response({"message": f"Cannot {request.method} {request.path}", "error": "Not Found", "statusCode": 404}, status=404)


def main() -> None:
    app = web.Application()
    app.router.add_post("/sandbox/js", run_code)
    app.router.add_route("*", "/{tail:.*}", missing)
    web.run_app(app, port=int(os.environ.get("PORT") or 3000), access_log=None)


if __name__ == "__main__":
    main()
