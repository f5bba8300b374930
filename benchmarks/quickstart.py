"""What the quickstart's images gain and keep: `python benchmarks/quickstart.py --seeds 3`.

Runs workflows/shapes_quickstart.json as it ships in a real ComfyUI (COMFYUI_PATH, or ~/comfy/ComfyUI), with several
seeds, and scores its images from before and after by the training reward, shapes-gold and shapes-judge. All images are
drawn by ComfyUI's own KSampler. Prints a table; changes of the training reward are in standard deviations of the images
before. The seconds are those from Run to the first picture of any kind; the first seed's hold all that ComfyUI loads.
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import comfyui
from test_workflows import load, nodes_of, prompt_of

NAMES = ("shapes-aesthetic", "shapes-gold", "shapes-judge")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to this, of the training and of the images")
    args = parser.parse_args()
    if comfyui.MISSING:
        parser.error(comfyui.MISSING)
    comfyui.PATIENCE = 3600
    print(f"{date.today()}, {platform.machine()}, Python {platform.python_version()}\n")
    print("| seed | s to the first picture | LoRA | " + " | ".join(NAMES) + " |")
    print("|---" * (3 + len(NAMES)) + "|", flush=True)
    with tempfile.TemporaryDirectory() as folder, comfyui.Server(Path(folder)) as server:
        for seed in range(1, args.seeds + 1):
            print(line(server, seed), flush=True)


def line(server: comfyui.Server, seed: int) -> str:
    workflow = load("shapes_quickstart")
    prompt = prompt_of(workflow, server.get("/object_info"), seed=seed, run_name=f"seed {seed}")
    (apply,) = nodes_of(workflow, "TDPOApplyLoRA")
    prompt["info"] = show(str(apply["id"]), 1)
    scorers = [str(node["id"]) for node in nodes_of(workflow, "TDPOScoreImages")]  # before, after
    for name in NAMES:
        prompt[name] = {"class_type": "TDPORewardModel", "inputs": {"reward": name, "weight": 1.0, "weights": "auto"}}
        for id in scorers:
            inputs = prompt[id]["inputs"] | {"reward": [name, 0]}
            prompt[f"{name} {id}"] = {"class_type": "TDPOScoreImages", "inputs": inputs}
            prompt[f"{name} {id} text"] = show(f"{name} {id}", 1)
    seen, start = pictures(server), time.monotonic()
    queued = server.queue(prompt)
    comfyui.wait_until(lambda: pictures(server) - seen, "a picture")
    seconds = time.monotonic() - start
    outputs = server.ended(queued)["outputs"]
    cells = []
    for name in NAMES:
        before, after = (scores(outputs[f"{name} {id} text"]["text"][0]) for id in scorers)
        gain = statistics.fmean(after) - statistics.fmean(before)
        unit = statistics.pstdev(before) if name == NAMES[0] else 1.0
        cells.append(f"{gain / unit:+.2f}")
    return f"| {seed} | {seconds:.1f} | {outputs['info']['text'][0]} | " + " | ".join(cells) + " |"


def pictures(server: comfyui.Server) -> set[Path]:
    return {file for folder in ("output", "temp") for file in (server.base / folder).glob("**/*.png")}


def show(node: str, output: int) -> dict[str, Any]:
    return {"class_type": "PreviewAny", "inputs": {"source": [node, output]}}


def scores(text: str) -> list[float]:
    """Those of each image, from the text of Score Images: the mean in the first line, then one in each line."""
    return [float(line.split(": ")[1]) for line in text.splitlines()[1:]]


if __name__ == "__main__":
    main()
