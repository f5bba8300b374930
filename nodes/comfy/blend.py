"""A LoRA whose strength changes over the sampling steps, by ComfyUI's own hooks: one pass a step.

With most schedules, the first step is the base model's, which composes the image, and the LoRA grows towards the last.
Annealed importance guidance (AIG, arXiv 2409.06493) instead blends the outputs of base and tuned model with the same
weights, (k / T)^p at step k of T, in two passes. Here the weights of the LoRA are scaled, and k / T is the sampling
percent.
"""

from typing import Any

import comfy.hooks
import comfy.lora_convert
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..runs.combos import SCHEDULES

KEYFRAMES = 100  # the strength changes at every hundredth of the sampling, and only there


def blend_weights(model: Any, weights: dict[str, Tensor], strength: float, schedule: str) -> Any | None:
    """The MODEL with a LoRA of up to `strength`, by a key of SCHEDULES; None if no weight fits the MODEL."""
    converted = comfy.lora_convert.convert_lora(weights)
    patched, _, group = comfy.hooks.load_hook_lora_for_models(model, None, converted, strength, 0)
    (hook,) = group.hooks
    if not patched.hook_patches.get(hook.hook_ref):
        return None
    for step in range(KEYFRAMES):
        done = step / KEYFRAMES
        # without guaranteed steps, each step takes the newest keyframe that has begun
        keyframe = comfy.hooks.HookKeyframe(SCHEDULES[schedule](done), start_percent=done, guarantee_steps=0)
        hook.hook_keyframe.add(keyframe)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "tdpo_blend", _Attach(group))
    return patched


class _Attach:
    """Attaches hooks to all conditionings of a sampling: ComfyUI's hooks belong to conditionings, not to models."""

    def __init__(self, group: comfy.hooks.HookGroup):
        self.group = group

    def __call__(self, sample: Any, *args: Any, **kwargs: Any) -> Any:
        combined: dict[int, comfy.hooks.HookGroup] = {}  # one group for equal ones, so that they share a pass
        for conditionings in sample.class_obj.conds.values():
            for conditioning in conditionings:
                own = conditioning.get("hooks")
                if id(own) not in combined:
                    combined[id(own)] = comfy.hooks.HookGroup.combine_all_hooks([own, self.group])
                conditioning["hooks"] = combined[id(own)]
        return sample(*args, **kwargs)
