"""What is answered where a route raised: an error in OpenAI's shape, and for what nobody foresaw a line in the log."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from llmkit.core.errors import LlmkitError
from llmkit.serve import reply
from llmkit.serve.refusal import Refusal, refused


async def _refused(request: Request, cause: Exception) -> Response:
    if not isinstance(cause, Refusal):
        raise cause
    return reply.error(reply.noted(request.scope, cause))


async def _wrong(request: Request, cause: Exception) -> Response:
    if not isinstance(cause, LlmkitError):
        raise cause
    return reply.error(reply.noted(request.scope, refused(cause)))


async def _no_route(request: Request, cause: Exception) -> Response:
    status = getattr(cause, "status_code", 404)
    if status != 405:
        what = f"there is no {request.url.path[:200]}" if status == 404 else "the request cannot be answered"
        return reply.error(Refusal(status, what, code="not_found"))
    methods = (getattr(cause, "headers", None) or {}).get("Allow", "").split(", ")
    allowed = ", ".join(sorted(methods))
    what = f"{request.method[:20]} is not answered here; ask with {allowed}"
    answer = reply.error(Refusal(405, what, code="method_not_allowed"))
    answer.headers["allow"] = allowed
    return answer


async def _fault(request: Request, cause: Exception) -> Response:
    return reply.error(reply.noted(request.scope, cause))


HANDLERS: dict[Any, Any] = {Refusal: _refused, LlmkitError: _wrong, HTTPException: _no_route, Exception: _fault}
