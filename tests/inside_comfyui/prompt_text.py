"""How ComfyUI reads prompts, and how we do."""

from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event

from begin import CPU, difference

from comfy_tdpo.nodes.comfy import models_in, shapes_out


def syntax(*lines: str) -> dict[str, str]:
    """The text of each line that ComfyUI's tokenizer gives weights to."""
    from comfy.sd1_clip import escape_important, token_weights, unescape_important

    texts = {line: "".join(text for text, _ in token_weights(escape_important(line), 1.0)) for line in lines}
    return {line: " ".join(unescape_important(text).split()) for line, text in texts.items()}


def weights() -> dict[str, float | str]:
    """What a training's model and its rewards get of a prompt with weights."""
    from comfy_tdpo.nodes.runs.prompts import read_prompts
    from comfy_tdpo.nodes.runs.registry import Runs
    from comfy_tdpo.nodes.runs.start import prepare
    from comfy_tdpo.trainer.config import make_config
    from nodes import CLIPTextEncode

    model, clip, vae = shapes_out.shapes_native()
    line, words = "a (red:1.5) circle", "a red circle"
    prompts, config = read_prompts(f"\ufeff{line}\u00a0", "prompts"), make_config("shapes")
    factory = models_in.Wires(model, clip, vae).factory(config, prompts, CPU)
    with TemporaryDirectory() as folder:
        runs = Runs(Path(folder) / "runs", Path(folder) / "loras")
        run = runs.folder("one")
        prepare(runs, run, config, prompts)
        training = factory(run, Event(), lambda *_: None)
        (prompt,) = set(training.prompts + training.keeper.grid_prompts)
        encoded = training.policy.encode_prompts([prompt]).parts["states"]
    (((native, _),),) = CLIPTextEncode().encode(clip, line)
    (((plain, _),),) = CLIPTextEncode().encode(clip, words)
    return {"prompt": prompt, "off its line": difference(encoded, native), "off its words": difference(encoded, plain)}
