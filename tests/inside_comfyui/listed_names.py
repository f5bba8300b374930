"""The list of the names of ComfyUI that we use."""

import ast
import asyncio
import inspect
import logging
import sys
from types import MethodType, SimpleNamespace
from typing import Any

import comfy.lora_convert
import comfy_api.latest
from aiohttp.web import RouteTableDef

import comfy_tdpo.nodes
from comfy_tdpo.nodes.comfy import needs


def needs_() -> dict[str, Any]:
    """What of the list is not here, which of its calls would be refused, and what a start says that lacks something."""
    from execution import PromptQueue
    from server import PromptServer

    told = MethodType(PromptServer.send_sync, object())
    queue = SimpleNamespace(set_flag=MethodType(PromptQueue.set_flag, object()))
    PromptServer.instance = SimpleNamespace(loop=None, routes=RouteTableDef(), send_sync=told, prompt_queue=queue)
    return {
        "missing": needs.missing_names(),
        "calls refused": [line for line in needs.NEEDS.split("\n") if "(" in line and not is_taken(line)],
        "lacking": {
            "convert_lora": start_without(comfy.lora_convert, "convert_lora"),
            "Custom": start_without(comfy_api.latest.io, "Custom"),
        },
    }


def is_taken(line: str) -> bool:
    """Whether the call in a line fits the signature of what it calls."""
    call = ast.parse(line, mode="eval").body
    try:
        inspect.signature(needs.find(line.partition("(")[0])).bind(
            *[None for _ in call.args], **{keyword.arg: None for keyword in call.keywords}
        )
    except TypeError:
        return False
    return True


def start_without(owner: Any, name: str) -> dict[str, Any]:
    """How many nodes there are if ComfyUI lacks a name, and what its log then says."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("comfy_tdpo").addHandler(handler)
    kept = getattr(owner, name)
    delattr(owner, name)
    try:
        nodes = asyncio.run(ask_for_nodes())
    finally:
        setattr(owner, name, kept)
        logging.getLogger("comfy_tdpo").removeHandler(handler)
    return {"nodes": len(nodes), "log": lines}


async def ask_for_nodes() -> list:
    for name in [name for name in sys.modules if name.startswith("comfy_tdpo.nodes.") and "needs" not in name]:
        del sys.modules[name]  # as at a start
    return await (await comfy_tdpo.nodes.comfy_entrypoint()).get_node_list()
