"""The blocks of a network: its transformer layers, or the stages of a U-Net or a decoder."""

from torch import nn


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The outermost modules that are called and listed in a ModuleList."""
    listed = isinstance(network, nn.ModuleList)
    found = []
    for child in network.children():
        is_block = listed and type(child).forward is not nn.Module.forward
        found += [child] if is_block else blocks_of(child)
    return found
