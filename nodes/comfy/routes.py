"""The HTTP routes through which the browser asks about runs, deletes them, and votes."""

import asyncio
from collections.abc import Callable
from typing import Any

from aiohttp import web
from server import PromptServer

from ..runs import answers
from .folders import all_runs, shown_pictures


def register_routes() -> None:
    """Add the routes to ComfyUI's server, before it starts to serve."""
    routes = PromptServer.instance.routes

    @routes.get("/tdpo/runs")
    async def runs(_request: web.Request) -> web.Response:
        return await _respond("overview")

    @routes.get("/tdpo/runs/{id}")
    async def run(request: web.Request) -> web.Response:
        return await _respond("status", request.match_info["id"])

    @routes.get("/tdpo/runs/{id}/metrics")
    async def metrics(request: web.Request) -> web.Response:
        return await _respond("metrics", request.match_info["id"], request.query.get("after", "0"))

    @routes.get("/tdpo/runs/{id}/pictures/{name}")
    async def picture(request: web.Request) -> web.Response:
        return await _respond("picture", request.match_info["id"], request.match_info["name"])

    @routes.get("/tdpo/runs/{id}/samples/{epoch}")
    async def grid(request: web.Request) -> web.Response:
        return await _respond("grid", request.match_info["id"], request.match_info["epoch"])

    @routes.get("/tdpo/runs/{id}/evaluation")
    async def evaluation(request: web.Request) -> web.Response:
        return await _respond("evaluation", request.match_info["id"])

    @routes.get("/tdpo/runs/{id}/strengths/{epoch}/{strength}")
    async def at_strength(request: web.Request) -> web.Response:
        return await _respond("at_strength", *(request.match_info[part] for part in ("id", "epoch", "strength")))

    @routes.post("/tdpo/runs/{id}/stop")
    async def stop(request: web.Request) -> web.Response:
        return await _respond("stop", request.match_info["id"])

    @routes.delete("/tdpo/runs/{id}")
    async def delete(request: web.Request) -> web.Response:
        return await _respond("delete", request.match_info["id"])

    @routes.get("/tdpo/table")
    async def table(_request: web.Request) -> web.Response:
        return await _respond("table")

    @routes.get("/tdpo/tastes/{name}")
    async def taste(request: web.Request) -> web.Response:
        return await _respond("taste", request.match_info["name"])

    @routes.get("/tdpo/tastes/{name}/ballot")
    async def ballot(request: web.Request) -> web.Response:
        return await _respond("ballot", request.match_info["name"], shown_pictures())

    @routes.post("/tdpo/tastes/{name}/votes")
    async def vote(request: web.Request) -> web.Response:
        return await _respond("vote", request.match_info["name"], await request.text(), shown_pictures())


async def _respond(question: str, *arguments: Any) -> web.Response:
    """Answer on another thread, as this reads files and draws, and the server must not wait for it."""
    status, answer = await asyncio.to_thread(_ask, question, *arguments)
    if isinstance(answer, bytes):
        return web.Response(body=answer, content_type="image/png", headers={"Cache-Control": "no-store"})
    return web.json_response(answer, status=status)


def _ask(question: str, *arguments: Any) -> tuple[int, Any]:
    ask: Callable[..., tuple[int, Any]] = getattr(answers, question)
    return ask(all_runs(), *arguments)
