"""Loading models without the progress bars and log messages of diffusers, transformers and the hub's client; errors are
still raised."""

from collections.abc import Iterator
from contextlib import contextmanager

import diffusers.utils.logging as diffusers_logging
import huggingface_hub.utils.logging as hub_logging
import transformers.utils.logging as transformers_logging


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence diffusers and transformers inside the block and restore their settings after it."""
    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    bar = transformers_logging.is_progress_bar_enabled()
    try:
        diffusers_logging.set_verbosity_error()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        yield
    finally:
        diffusers_logging.set_verbosity(levels[0])
        transformers_logging.set_verbosity(levels[1])
        if bar:
            transformers_logging.enable_progress_bar()


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Silence the hub's client inside the block, which tells of every failed attempt, but for its progress bars."""
    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)
