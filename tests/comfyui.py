"""A real ComfyUI server for tests, started in a folder of its own with the pack in it and asked over the network."""

import json
import socket
import struct
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import children
from backends import OLDEST, ROOT, Backend

MISSING = OLDEST.missing

PATIENCE = 300  # seconds for what takes a few on a quiet machine


def wait_until(true: Callable[[], Any], what: str) -> Any:
    """What `true` gives, once it is truthy."""
    end = time.monotonic() + PATIENCE
    while not (found := true()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.1)
    return found


CHECK = """
import comfy.model_management
import comfy.ops

def asking(forward):
    def ask_first(self, *args, **kwargs):
        comfy.model_management.throw_exception_if_processing_interrupted()
        return forward(self, *args, **kwargs)
    return ask_first

for layer in vars(comfy.ops.disable_weight_init).values():
    if isinstance(layer, type) and "forward" in vars(layer):
        layer.forward = asking(layer.forward)

NODE_CLASS_MAPPINGS = {}
"""


# As core's Start Loop and End Loop, which these versions lack: copies of the nodes between them, with ids of their own
LOOP = """
import json
from comfy_execution.graph_utils import GraphBuilder

class Loop:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "loop", "tests", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"body": ("STRING", {}), "iterations": ("STRING", {})}}

    def loop(self, body, iterations):
        builder, body = GraphBuilder(), json.loads(body)
        for number, changes in enumerate(json.loads(iterations)):
            copies = {id: builder.node(node["class_type"], f"{number}_{id}") for id, node in body.items()}
            for id, copy in copies.items():
                copy.set_override_display_id(id)
                for name, value in body[id]["inputs"].items():
                    copy.set_input(name, copies[value[0]].out(value[1]) if isinstance(value, list) else value)
            for name, value in changes.items():
                copies["train"].set_input(name, value)
        return {"result": (), "expand": builder.finalize()}

NODE_CLASS_MAPPINGS = {"TestLoop": Loop}
"""


class Server:
    """A running server; everything it writes lies in `base`.

    With `check`, each layer of ComfyUI first looks whether the user has cancelled, as it does from 0.3.65 on.
    `flags` are more arguments for ComfyUI.
    """

    def __init__(self, base: Path, check: bool = False, *, backend: Backend = OLDEST, flags: tuple[str, ...] = ()):
        self.base, self.log, self.backend = base, base / "log.txt", backend
        for folder in ("custom_nodes", "models/loras", "user", "input"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        pack = base / "custom_nodes" / "tdpo-under-test"
        if not pack.exists():
            pack.symlink_to(ROOT, target_is_directory=True)
        (base / "custom_nodes" / "loop.py").write_text(LOOP)
        if check and not backend.asks:
            (base / "custom_nodes" / "check.py").write_text(CHECK)
        self.port = _free_port()
        command = [*backend.command(base), "--cpu", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--disable-api-nodes", "--disable-auto-launch", *flags]
        with self.log.open("a") as log:
            self.process = children.start(command, cwd=backend.checkout, stdout=log, stderr=log)
        try:
            wait_until(self._is_up, "the server")
        except BaseException:
            children.end(self.process)
            raise

    def _is_up(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.get("/system_stats") is not None
        except OSError:
            return False

    def end(self) -> int:
        """As a service manager does it: asked to, then killed; the exit status."""
        self.process.terminate()
        try:
            return self.process.wait(timeout=PATIENCE)
        finally:
            children.end(self.process)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        children.end(self.process)

    # --- over HTTP

    def raw(self, path: str, method: str = "GET", data: Any = None) -> tuple[int, bytes]:
        body = None if data is None else json.dumps(data).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def get(self, path: str) -> Any:
        return json.loads(self.raw(path)[1])

    def post(self, path: str, data: Any = None) -> tuple[int, Any]:
        status, body = self.raw(path, "POST", data or {})
        return status, json.loads(body) if body else None

    # --- graphs

    def queue(self, graph: dict) -> str:
        status, answer = self.post("/prompt", {"prompt": graph})
        assert status == 200, answer
        return answer["prompt_id"]

    def ended(self, prompt_id: str) -> dict:
        """What the history has of a prompt, once it has ended: its messages by name, and its outputs."""
        entry = wait_until(lambda: self.get(f"/history/{prompt_id}").get(prompt_id), "the end of a prompt")
        return {"messages": _messages(entry["status"]), "outputs": entry["outputs"]}

    def interrupted(self, prompt_id: str) -> dict:
        """As `ended`, asking again until it ends: what comes before its execution begins, ComfyUI forgets."""

        def ended() -> dict:
            self.post("/interrupt")
            return self.get(f"/history/{prompt_id}")

        wait_until(ended, "the end of a prompt that was interrupted")
        return self.ended(prompt_id)

    def run(self, graph: dict) -> dict:
        """Queue a graph and wait for its success; its outputs by node."""
        result = self.ended(self.queue(graph))
        assert "execution_success" in result["messages"], result["messages"]
        return result["outputs"]

    def error(self, graph: dict) -> str:
        """Queue a graph that must fail; the sentence its user reads."""
        status, answer = self.post("/prompt", {"prompt": graph})
        if status != 200:
            ((node,),) = [[*answer["node_errors"].values()]]
            return node["errors"][0]["details"]
        messages = self.ended(answer["prompt_id"])["messages"]
        assert "execution_error" in messages, messages
        return messages["execution_error"]["exception_message"].strip()

    def status(self, run: str) -> dict:
        return self.get(f"/tdpo/runs/{run}")

    def loras(self) -> list[str]:
        """What ComfyUI's own Load LoRA lists."""
        return self.get("/object_info/LoraLoader")["LoraLoader"]["input"]["required"]["lora_name"][0]

    def until(self, run: str, true: Callable[[dict], Any]) -> dict:
        """The status of a run, once it is as wanted."""

        def wanted() -> dict | None:
            status = self.status(run)
            return status if "state" in status and true(status) else None

        return wait_until(wanted, f"run {run}")


class Events:
    """The text messages of a server's WebSocket; just enough of RFC 6455 to read them."""

    def __init__(self, server: Server):
        self._socket = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
        self._file = self._socket.makefile("rb")
        self._socket.sendall(
            f"GET /ws?clientId=tests HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        while self._file.readline().strip():
            pass

    def until(self, last: Callable[[dict], bool]) -> list[dict]:
        """All messages up to the one that is the `last`."""
        found: list[dict] = []
        while not found or not last(found[-1]):
            head = self._file.read(2)
            length = head[1] & 127
            if length >= 126:
                length = int.from_bytes(self._file.read(2 if length == 126 else 8), "big")
            body = self._file.read(length)
            if head[0] & 15 == 9:  # a ping, answered with an empty mask
                self._socket.sendall(struct.pack("!BB", 0x8A, 0x80 | length) + bytes(4) + body)
            elif head[0] & 15 == 1:
                found.append(json.loads(body))
        return found

    def close(self) -> None:
        self._socket.close()


def _messages(status: dict) -> dict[str, Any]:
    """What the history says of how a prompt went, by the names of the messages."""
    if all(isinstance(message, list) for message in status["messages"]):
        return dict(status["messages"])
    # the fork's own: names alone, and behind a colon what failed
    parts = [message.partition(": ") for message in status["messages"]]
    return {name: {"exception_message": reason} for name, _, reason in parts}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- graphs: Shapes, small enough for a second an epoch

MODEL, CLIP, VAE, REWARD = ["shapes", 0], ["shapes", 1], ["shapes", 2], ["reward", 0]


def train_graph(run_name: str, /, **changes: Any) -> dict:
    """Shapes Model and Reward Model into Train."""
    inputs = {"model": MODEL, "clip": CLIP, "vae": VAE, "reward": REWARD, "run_name": run_name, "resume": "continue"}
    inputs |= {"mode": "wait", "algorithm": "tdpo-r", "epochs": 2, "samples_per_epoch": 4, "steps": 3, "guidance": 0.0}
    inputs |= {"resolution": 0, "rank": 4, "learning_rate": 0.0, "seed": 1, "prompt_set": "auto"}
    inputs["settings"] = "output.grid_images = 2"
    return {
        "shapes": {"class_type": "TDPOShapesModel", "inputs": {}},
        "reward": {"class_type": "TDPORewardModel", "inputs": {"reward": "shapes-aesthetic", "weight": 1.0}},
        "train": {"class_type": "TDPOTrain", "inputs": inputs | changes},
    }


def loop_graph(body: dict, *iterations: dict) -> dict:
    """What runs `body` once for each of the `iterations`, with these inputs of its node `train`."""
    inputs = {"body": json.dumps(body), "iterations": json.dumps(iterations)}
    return {"loop": {"class_type": "TestLoop", "inputs": inputs}}


def apply_graph(**changes: Any) -> dict:
    """LoRA Apply on Shapes, of a wired run where `run` is given; what it says is shown by `info`."""
    inputs = {"model": MODEL, "strength": 1.0, "snapshot": "latest", "epoch": 1, "lora_name": "none"}
    return {
        "apply": {"class_type": "TDPOApplyLoRA", "inputs": inputs | changes},
        "info": {"class_type": "PreviewAny", "inputs": {"source": ["apply", 1]}},
    }


def evaluate_graph(**changes: Any) -> dict:
    """Evaluate on the run of `train_graph`; its table is shown by `told`."""
    inputs = {"run": ["train", 0], "model": MODEL, "clip": CLIP, "vae": VAE, "prompt_set": "auto", "images": 1}
    judge = {"reward": "shapes-gold", "weight": 1.0}
    inputs |= {"epochs": "", "rewards": ["judge", 0]}
    return {
        "judge": {"class_type": "TDPORewardModel", "inputs": judge},
        "evaluate": {"class_type": "TDPOEvaluate", "inputs": inputs | changes},
        "told": {"class_type": "PreviewAny", "inputs": {"source": ["evaluate", 0]}},
    }


def sample_graph(model: list, seed: int = 7) -> dict:
    """ComfyUI's own sampler on a MODEL, and Score Images on what it draws; the text is shown by `scored`."""
    sampler = {"model": model, "positive": ["text", 0], "negative": ["empty", 0], "latent_image": ["latent", 0]}
    sampler |= {"seed": seed, "steps": 4, "cfg": 3.0, "sampler_name": "ddim", "scheduler": "normal", "denoise": 1.0}
    score = {"images": ["image", 0], "reward": REWARD, "prompt": "a red circle"}
    return {
        "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": CLIP, "text": "a red circle"}},
        "empty": {"class_type": "CLIPTextEncode", "inputs": {"clip": CLIP, "text": ""}},
        "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 2}},
        "sampler": {"class_type": "KSampler", "inputs": sampler},
        "image": {"class_type": "VAEDecode", "inputs": {"samples": ["sampler", 0], "vae": VAE}},
        "score": {"class_type": "TDPOScoreImages", "inputs": score},
        "scored": {"class_type": "PreviewAny", "inputs": {"source": ["score", 1]}},
        "shown": {"class_type": "PreviewImage", "inputs": {"images": ["score", 2]}},
    }
