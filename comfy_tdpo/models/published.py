"""The presets' models on the hub, of which the package has the configurations: what these tell is known offline."""

from typing import NamedTuple

from ..user_files import user_path


class Published(NamedTuple):
    """A model on the hub.

    family: its name in FAMILIES.
    networks, schedule: where configs/ has the configurations of its networks, and that of its noise schedule.
    """

    family: str
    networks: str
    schedule: str


_XL = Published("stable-diffusion", "sdxl", "sdxl")
_SD1 = Published("stable-diffusion", "sd1", "sd1")
PUBLISHED = {
    "CompVis/stable-diffusion-v1-4": _SD1,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _SD1,
    "stabilityai/sd-turbo": Published("stable-diffusion", "sd2", "turbo"),
    "stabilityai/stable-diffusion-xl-base-1.0": _XL,
    "stabilityai/sdxl-turbo": _XL._replace(schedule="turbo"),
    "stabilityai/stable-diffusion-3.5-medium": Published("stable-diffusion-3", "sd3", "sd3"),
    "black-forest-labs/FLUX.1-dev": Published("flux", "flux-dev", "flux-dev"),
    "black-forest-labs/FLUX.1-schnell": Published("flux", "flux-schnell", "flux-schnell"),
    "Tongyi-MAI/Z-Image": Published("z-image", "z-image", "z-image"),
    "Tongyi-MAI/Z-Image-Turbo": Published("z-image", "z-image", "z-image-turbo"),
}


def published(source: str) -> Published | None:
    """What is known of the model `source` if it is a hub id of these, and no file or folder of that name."""
    return PUBLISHED[source] if source in PUBLISHED and not user_path(source).exists() else None
