"""Numbers of things in messages."""


def number_of(count: int, noun: str) -> str:
    """Such as "1 image" and "2 images"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def rounded(amount: float) -> str:
    """An amount with one decimal, or with two significant digits where that would be 0.0."""
    return f"{amount:,.1f}" if amount >= 0.1 or amount == 0 else f"{amount:.2g}"
