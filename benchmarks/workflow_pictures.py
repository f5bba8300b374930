"""Takes the workflows' thumbnails and the README's screenshot from real runs in ComfyUI's own frontend.

`python benchmarks/workflow_pictures.py http://127.0.0.1:8188 [NAME...]` opens each workflow on a running ComfyUI that
has this pack, runs it, and writes workflows/NAME.jpg, and docs/images/live-node.png for the quickstart. Workflows for
Stable Diffusion are not run, since they need a checkpoint: their thumbnails show only the graph. Needs playwright and
Chromium (at `$CHROMIUM`, or else /usr/bin/chromium).
"""

import argparse
import io
import json
import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

ROOT = Path(__file__).parent.parent
THUMBNAIL, GROUND = (512, 512), "#222222"
VIEW = {"width": 1600, "height": 1000}
MINUTES = 20  # that a workflow may take

SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.ColorPalette": "dark",
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
    "Comfy.VueNodes.Enabled": False,
    "LiteGraph.Canvas.LowQualityRenderingZoomThreshold": 0,
}
READY = "() => !!(window.app?.extensionManager && window.LiteGraph?.registered_node_types?.TDPOTrain)"
OPEN = """async (graph) => {
  await window.app.loadGraphData(graph);
  await new Promise((done) => setTimeout(done, 1000));
}"""
# Puts the nodes and groups of those titles, or all, in the middle of the canvas; returns where they are on the screen.
FIT = """async (titles) => {
  const { graph, canvas } = window.app;
  const { x, y, width: wide, height: high } = canvas.canvas.getBoundingClientRect();
  const chosen = [...graph.nodes, ...graph.groups].filter((part) => !titles.length || titles.includes(part.title));
  const boxes = chosen.map(({ pos, size }) => [pos[0], pos[1] - 30, pos[0] + size[0], pos[1] + size[1]]);
  const edge = (choose, i) => choose(...boxes.map((box) => box[i]));
  const [left, top, right, bottom] = [edge(Math.min, 0), edge(Math.min, 1), edge(Math.max, 2), edge(Math.max, 3)];
  const scale = Math.min((wide - 100) / (right - left), (high - 140) / (bottom - top), 1.4);
  canvas.ds.scale = scale;
  canvas.ds.offset = [70 / scale - left, 90 / scale - top]; // right of the side bar and below the tabs
  canvas.setDirty(true, true);
  await new Promise((done) => setTimeout(done, 1500));
  return { x: x + 62, y: y + 82, width: (right - left) * scale + 16, height: (bottom - top) * scale + 16 };
}"""


@dataclass(frozen=True)
class Picture:
    """What the thumbnail of a workflow shows: the images of the nodes of those titles, side by side, after a run;
    without a run, or after votes on the pictures of a run, the groups and nodes of those titles, or the whole graph if
    there are none."""

    titles: tuple[str, ...] = ()
    is_run: bool = True
    is_voted: bool = False


PICTURES = {
    "shapes_quickstart": Picture(("Before, with scores", "After, with scores")),
    "shapes_taste": Picture(("TDPO Taste",), is_voted=True),
    "shapes_inspect_neurons": Picture(("Neurons over the epochs",)),
    "compare_algorithms": Picture(
        ("tdpo-r: before, and at its highest reward", "ddpo-100: before, and at its highest reward")
    ),
    "multi_reward": Picture(("Aligned, with scores",)),
    "sd15_align_aesthetic": Picture(("1  Align",), is_run=False),
    "sd15_align_colourfulness": Picture(("1  Align",), is_run=False),
    "sd15_apply_and_compare": Picture(is_run=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("server", help="address of a ComfyUI with this pack")
    parser.add_argument("names", nargs="*", default=list(PICTURES), help="workflows; the default is all")
    args = parser.parse_args()
    with import_module("playwright.sync_api").sync_playwright() as playwright:
        chromium = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=VIEW, device_scale_factor=1.5)
        page.request.post(f"{args.server}/api/settings", data=SETTINGS)
        for name in args.names:
            take(page, args.server, name, PICTURES[name])


def take(page: Any, server: str, name: str, picture: Picture) -> None:
    page.goto(server)
    page.wait_for_function(READY, timeout=120_000)
    page.wait_for_timeout(2000)
    page.evaluate(OPEN, json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8")))
    if picture.is_run:
        run(page)
    else:
        page.keyboard.press("Escape")  # the dialog about a missing checkpoint
        page.wait_for_timeout(1000)
    if picture.is_voted:
        vote(page)
    has_images = picture.is_run and not picture.is_voted
    shown = images_of(page, server, picture.titles) if has_images else screenshot(page, picture.titles)
    shown = ImageOps.pad(shown.convert("RGB"), THUMBNAIL, color=GROUND)
    shown.save(ROOT / "workflows" / f"{name}.jpg", quality=88)
    if name == "shapes_quickstart":
        screenshot(page, ("TDPO-R Train",)).save(ROOT / "docs" / "images" / "live-node.png", optimize=True)


def run(page: Any) -> None:
    """Run the graph that is open, to its end."""
    page.evaluate(
        """() => new Promise((done, fail) => {
          window.app.api.addEventListener("execution_success", () => done());
          for (const end of ["execution_error", "execution_interrupted"]) {
            window.app.api.addEventListener(end, ({ detail }) => fail(new Error(detail.exception_message ?? end)));
          }
          setTimeout(() => fail(new Error("it took too long")), MINUTES * 60000);
          window.app.queuePrompt(0);
        })""".replace("MINUTES", str(MINUTES))
    )
    page.wait_for_timeout(3000)


def vote(page: Any) -> None:
    """Like the pictures on the brightest ground, a quarter of them, and dislike the rest."""
    page.evaluate("""() => {
      const buttons = [...document.querySelectorAll(".tdpo-picture")];
      const ground = (button) => {
        const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
        canvas.drawImage(button.firstChild, 0, 0);
        return canvas.getImageData(0, 0, 1, 1).data.slice(0, 3).reduce((sum, level) => sum + level);
      };
      const sorted = buttons.sort((one, other) => ground(other) - ground(one));
      for (const button of sorted.slice(0, buttons.length / 4)) button.click();
    }""")
    page.wait_for_timeout(5000)
    page.get_by_role("button", name="Dislike the rest").evaluate("(button) => button.click()")
    page.wait_for_timeout(10_000)


# The files that the node of a title has shown.
SHOWN = """(title) => {
  const { graph, nodeOutputs } = window.app;
  return nodeOutputs[graph.nodes.find((node) => node.title === title).id].images;
}"""


def images_of(page: Any, server: str, titles: tuple[str, ...]) -> Image.Image:
    """The images that those nodes have shown, in a square: each node's in columns of its own."""
    parts = []
    for title in titles:
        files = page.evaluate(SHOWN, title)
        bodies = [page.request.get(f"{server}/view", params=file).body() for file in files]
        parts.append([Image.open(io.BytesIO(body)).convert("RGB") for body in bodies])
    rows = max(int(len(part) ** 0.5) for part in parts)
    columns = max(rows // len(parts), 1)  # of each node
    width, height = parts[0][0].size
    sheet = Image.new("RGB", (len(parts) * columns * width + 8 * (len(parts) - 1), rows * height), GROUND)
    for i, part in enumerate(parts):
        left = i * (columns * width + 8)
        for j, image in enumerate(part[: rows * columns]):
            sheet.paste(image, (left + j % columns * width, j // columns * height))
    return sheet


def screenshot(page: Any, titles: tuple[str, ...]) -> Image.Image:
    clip = page.evaluate(FIT, list(titles))
    return Image.open(io.BytesIO(page.screenshot(clip=clip)))


if __name__ == "__main__":
    main()
