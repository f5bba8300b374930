"""Cancels in ComfyUI at random moments: `python benchmarks/cancel.py --times 20 --comfyui 0.10`.

Starts a real ComfyUI, one of those that the tests run against, whose layers look for a Cancel as those of 0.3.65 and
later do. Then, as often as asked:

- wait: a training is cancelled; its prompt must end as interrupted, its LoRA must apply, and the run must go on.
- background: while a run trains in the background, another prompt that samples is cancelled; that prompt must end as
  interrupted, and the run must go on.

Prints how many of each did.
"""

import argparse
import random
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from backends import BACKENDS, OLDEST
from comfyui import Server, apply_graph, sample_graph, train_graph, wait_until

LONGEST = 6.0  # seconds after its start in which a prompt is cancelled: models are loaded in the first two


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--comfyui", choices=[backend.name for backend in BACKENDS], default=OLDEST.name)
    args = parser.parse_args()
    (backend,) = [backend for backend in BACKENDS if backend.name == args.comfyui]
    if backend.missing:
        parser.error(backend.missing)
    moments = random.Random(args.seed)
    print(date.today(), "ComfyUI", backend.name)
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder), check=True, backend=backend) as server:
        for name, attempt in (("wait", cancel_training), ("background", cancel_another)):
            right = sum(attempt(server, i, moments.uniform(0, LONGEST)) for i in range(args.times))
            print(f"{name}: {right} of {args.times}", flush=True)
        print(server.log.read_text().count("InterruptProcessingException"), "InterruptProcessingException in the log")


def cancel_training(server: Server, i: int, moment: float) -> bool:
    name = f"waiting-{i}"
    prompt = server.queue(train_graph(name, epochs=500, seed=i))
    ended = cancel(server, prompt, moment)
    status = server.status(name)
    if "execution_interrupted" not in ended["messages"]:
        return said(name, moment, ended)
    if status.get("state") not in ("stopped", None):  # None: cancelled before there was a run
        return said(name, moment, status)
    goes_on = train_graph(name, epochs=status.get("epoch", 0) + 1, seed=i) | apply_graph(run=["train", 0])
    told = server.run(goes_on)["info"]["text"]
    return f"after epoch {status.get('epoch', 0) + 1}," in told[0] or said(name, moment, told)


def cancel_another(server: Server, i: int, moment: float) -> bool:
    name = f"behind-{i}"
    server.run(train_graph(name, epochs=500, seed=i, mode="background"))
    graph = train_graph("x") | sample_graph(["shapes", 0], seed=i)
    del graph["train"]
    graph["sampler"]["inputs"]["steps"] = 2000
    ended = cancel(server, server.queue(graph), moment)
    status = server.until(name, lambda status: status["state"] != "loading")
    server.post(f"/tdpo/runs/{name}/stop")
    server.until(name, lambda status: status["state"] not in ("running", "stopping"))
    right = "execution_interrupted" in ended["messages"] and status["state"] == "running"
    return right or said(name, moment, (ended["messages"], status))


def cancel(server: Server, prompt: str, moment: float) -> dict:
    """What the history says of a prompt that is cancelled some seconds after its start."""
    wait_until(lambda: prompt in str(server.get("/queue")["queue_running"]), "its start")
    time.sleep(moment)
    server.post("/interrupt")
    return server.ended(prompt)


def said(name: str, moment: float, what: object) -> bool:
    print(f"{name}, cancelled after {moment:.1f} s: {what}", flush=True)
    return False


if __name__ == "__main__":
    main()
