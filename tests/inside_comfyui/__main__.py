"""Runs under ComfyUI's own Python, not under pytest: prints as JSON how far its models are from ours.

python tests/inside_comfyui CHECKOUT answers each line of its input, which is a JSON list: a question, and what it is
about. Those are ["shapes"], and likewise shapes_flow, sd2, sdxl, sd3, flux, z_image, sd1, decoders, thread, weights,
quantised, scaled, needs, refusals, damaged; ["lora", FILE], ["whole", FILE], ["baked", SNAPSHOT, FILE, STRENGTH],
["blended", FILE], ["syntax", LINE...].
"""

import json
import sys
import traceback

import begin  # noqa: F401 - before all others
import torch
from flux import flux
from kept_otherwise import quantised, scaled
from listed_names import needs_
from lora_files import baked, blended, lora, whole
from prompt_text import syntax, weights
from refused import damaged, refusals
from sd3 import sd3
from sdxl import sdxl
from shapes_flow import shapes_flow
from small_models import decoders, sd1, sd2, shapes, thread
from z_image import z_image

torch.set_num_threads(1)
questions = {"shapes": shapes, "sd2": sd2, "sd1": sd1, "lora": lora, "refusals": refusals, "damaged": damaged}
questions |= {"baked": baked, "blended": blended, "decoders": decoders, "thread": thread}
questions |= {"sdxl": sdxl, "sd3": sd3, "flux": flux, "z_image": z_image, "shapes_flow": shapes_flow, "whole": whole}
questions |= {"syntax": syntax, "weights": weights, "quantised": quantised, "scaled": scaled, "needs": needs_}
for line in sys.stdin:
    question, *about = json.loads(line)
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            answer = questions[question](*about)
    except Exception:
        answer = {"traceback": traceback.format_exc()}
    print(json.dumps(answer), flush=True)
