"""Numbers of things in messages."""


def number_of(count: int, noun: str) -> str:
    """Such as "1 image" and "2 images"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def in_tenths(amount: float) -> str:
    """An amount with one decimal, such as "3.5", or "below 0.1" where that would be "0.0" of something."""
    return f"{amount:,.1f}" if amount >= 0.05 or amount == 0 else "below 0.1"
