"""From a Train node to a run: everything on ComfyUI's executor but the training itself."""

import comfy.model_management
import comfy.utils

from ..trainer.run import RunFolder
from . import quitting
from .choosing import choose, is_done
from .configure import Wanted
from .graph import Wires
from .place import all_runs, tell
from .starting import check_device_free, job_under_way, prepare, start, wait_for
from .words import AS_IT_IS


def train(wires: Wires, wanted: Wanted, name: str, resume: str, wait: bool, node: str) -> RunFolder:
    """The run that is meant, trained to its end where it `wait`s, and begun where it does not."""
    runs, device = all_runs(), comfy.model_management.get_torch_device()
    config, prompts = wanted.config(), wanted.prompts()
    run = choose(runs, name, resume, config, prompts)
    if resume == AS_IT_IS or is_done(run, config):
        return run
    job = job_under_way(runs, run)
    if job is None:
        check_device_free(run, device)
        factory = wires.factory(config, prompts, device)  # in main memory until the models there have made room
        prepare(runs, run, config, prompts)
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
        quitting.save_before()
        job = start(runs, run, factory, device, node, tell)
    if wait:
        bar = comfy.utils.ProgressBar(100 * config.epochs)
        wait_for(job, bar.update_absolute)
    return run
