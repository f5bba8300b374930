"""That a training is saved when ComfyUI ends.

A normal end and Ctrl+C run what `atexit` holds, which stops all jobs. A request to terminate, as service managers send
it, would kill ComfyUI on the spot; it is made the same as Ctrl+C, where nobody else has taken it.
"""

import signal

from server import PromptServer


def save_before() -> None:
    """See to it, from any thread: signals can only be taken on the main one, where ComfyUI's server loop runs."""
    PromptServer.instance.loop.call_soon_threadsafe(_take_sigterm)


def _take_sigterm() -> None:
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
