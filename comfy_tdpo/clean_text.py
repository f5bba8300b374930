"""Text that came from anywhere: what looks the same becomes the same.

Editors, web pages and chat programs add signs that nobody sees, and spaces that are not plain ones. A text encoder
reads them as tokens, and files lose some of them, so that a prompt is no longer found under its own name.
"""

import re

_LINE_ENDS = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
# The byte order mark, soft hyphens, spaces and joiners without a width, and marks of the direction of writing.
_UNSEEN = "\u00ad\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff"
# These two join or part letters of Indic and Arabic scripts, and join emoji; beside ASCII they do nothing.
_JOINERS = "(?<![^\x00-\x7f])[\u200c\u200d]+|[\u200c\u200d]+(?![^\x00-\x7f])"
_INVISIBLE = re.compile(f"[{_UNSEEN}]")
_IDLE_JOINERS = re.compile(_JOINERS)
_SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")

UNUSUAL = f"[{_UNSEEN}\u200c\u200d\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]"  # a pattern of what `clean` changes


def clean(text: str) -> str:
    """`text` without signs that nobody sees, with plain spaces and with "\\n" as the line ending."""
    text = _INVISIBLE.sub("", _LINE_ENDS.sub("\n", text))
    return _SPACES.sub(" ", _IDLE_JOINERS.sub("", text))


def one_line(text: str) -> str:
    """The same on one line, with single spaces between words and none around them."""
    return " ".join(clean(text).split())
