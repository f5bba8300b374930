"""Shapes: a small text-to-image world that ships with the package and can be trained on any machine."""

from pathlib import Path

WORLD = Path(__file__).parent / "world"

# The models that ship, by name, which is also that of their preset: a U-Net and a flow-matching transformer. Both draw
# with the same autoencoder and read prompts with the same text encoder.
MODELS = {"shapes": WORLD / "pipeline", "shapes-flow": WORLD / "flow"}
TINY_DECODER = WORLD / "decoder" / "model.safetensors"  # of their latents
