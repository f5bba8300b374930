"""A reward as a service over HTTP; comfy_tdpo/rewards/remote/protocol.py says what it is asked and answers.

Requests are read and answered on threads of their own, and scored one after the other on the thread that called `work`:
a model is used by one thread, and Ctrl-C ends the scoring too.
"""

import json
import logging
from concurrent.futures import Future
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from comfy_tdpo.rewards import RewardModel, score_images
from comfy_tdpo.rewards.remote.protocol import LARGEST_BODY, answer, unpacked

logger = logging.getLogger(__name__)

TICK = 0.5  # seconds between two looks whether Ctrl-C came, which Windows needs
SLOWEST = 60.0  # seconds that a client may keep silent


class RewardServer(ThreadingHTTPServer):
    """Scores what it is asked with `model` on `device`; port 0 means any that is free.

    Raises:
        OSError: the address cannot be used.
    """

    daemon_threads = True

    def __init__(self, host: str, port: int, model: RewardModel, device: torch.device):
        self.model, self.device = model, device
        self.jobs: SimpleQueue[tuple[Tensor, list[str], Future[list[float]]]] = SimpleQueue()
        self._ended = False
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}"

    def work(self) -> None:
        """Listen and score until `end` is called."""
        Thread(target=self.serve_forever, name="tdpo-serve", daemon=True).start()
        try:
            while not self._ended:
                with suppress(Empty):
                    self._do(*self.jobs.get(timeout=TICK))
        finally:
            self.shutdown()
            self.server_close()

    def end(self) -> None:
        self._ended = True

    def _do(self, images: Tensor, prompts: list[str], scores: Future[list[float]]) -> None:
        try:
            scores.set_result(self._score(images, prompts))
        except Exception as error:  # the client is told, and the next one is served
            scores.set_exception(error)

    @torch.no_grad()
    def _score(self, images: Tensor, prompts: list[str]) -> list[float]:
        self.model.check_prompts(prompts)
        return score_images(self.model, images.to(self.device), prompts).tolist()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of the server."""


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    timeout = SLOWEST  # of the connection

    def do_GET(self) -> None:  # noqa: N802  # the name that http.server calls
        """For people and for checks of health: which reward this is."""
        self._send(200, json.dumps({"reward": self.server.model.name}).encode())

    def do_POST(self) -> None:  # noqa: N802
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            self._refuse(411, "got a request without its length; expected Content-Length")
            return
        if len(length) > 12 or int(length) > LARGEST_BODY:
            self._refuse(413, f"got {length[:20]} bytes; expected at most {LARGEST_BODY}: send fewer images at once")
            return
        body = self.rfile.read(int(length))
        scores: Future[list[float]] = Future()
        try:
            images, prompts = unpacked(body)
            self.server.jobs.put((images, prompts, scores))
            found = scores.result()
        except ValueError as error:
            self._refuse(400, str(error))
        except Exception as error:  # of the model
            logger.warning("%s", error)
            self._refuse(500, str(error))
        else:
            self._send(200, answer(body, found))

    def _refuse(self, status: int, reason: str) -> None:
        self._send(status, json.dumps({"error": " ".join(reason.split())}).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged; what fails is."""
