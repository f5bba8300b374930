"""Paths that a user gives, and text files from any system.

Text is read only if its encoding is certain: UTF-8, UTF-16 and UTF-32 with a byte order mark, and UTF-16 and UTF-32
without one if the zero bytes leave no doubt. Anything else is rejected with a message that says what it seems to be,
because guessing between one-byte encodings could silently change letters.
"""

import codecs
import os
import re
import stat
import sys
import unicodedata
from pathlib import Path

LARGEST = 64 * 2**20  # bytes
SAVE_AS_UTF8 = "save it as UTF-8 in a text editor"

# UTF-32 comes before UTF-16, because its little-endian mark starts with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_KINDS = (
    (rb"\x89PNG", "a PNG image"),
    (rb"\xff\xd8\xff", "a JPEG image"),
    (rb"GIF8[79]a", "a GIF image"),
    (rb"RIFF.{4}WEBP", "a WebP image"),
    (rb"%PDF-", "a PDF document"),
    (rb"\{\\rtf", "a formatted document (RTF)"),
    (rb"PK\x03\x04", "a ZIP archive or an Office document"),
    (rb"\xd0\xcf\x11\xe0", "an Office document"),
    (rb"\x1f\x8b", "a gzip archive"),
    (rb"PAR1[^\w\s]", "a Parquet table"),
    (rb".{5}\0{3}\{", "a .safetensors file"),
    (rb"(?i)\s*<(!doctype|html|\?xml)", "a web page or an XML document"),
)
_LINE_ENDS = re.compile("\r\n|[\r\v\f]")
_SURROGATE = re.compile("[\ud800-\udfff]")  # how Python represents a byte that is not UTF-8
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f]")


def user_path(text: str | Path) -> Path:
    """The path that a user means, with `~` expanded, because a shell does not expand it in `--run-dir=~/runs`.

    Raises:
        ValueError: the path is empty, is not UTF-8, or names the home folder of an unknown user.
    """
    if not str(text).strip():
        raise ValueError(
            f"got {str(text)!r} as a path; expected a file or folder: check whether a variable in the command is empty"
        )
    check_name(text)
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        first = Path(text).parts[0]
        raise ValueError(
            f"got the path '{text}', but {first} has no home folder here; write out the full path, or ./{text} if the "
            "name itself starts with ~"
        ) from error


def check_name(path: str | Path) -> None:
    """Raise ValueError if a path is not UTF-8: neither TOML nor the safetensors library can represent it."""
    if _SURROGATE.search(str(path)):
        raise ValueError(f"got the path {str(path)!r}, which {_why_not_utf8(str(path))}")


def _why_not_utf8(path: str) -> str:
    try:
        os.fsencode(path).decode()
    except UnicodeError:
        return "is not UTF-8; rename the file or folder"
    return f"the encoding of this system, {sys.getfilesystemencoding()}, does not have; set PYTHONUTF8=1"


def read_text(path: Path, largest: int = LARGEST) -> str:
    """The text of a file, without byte order marks and with "\\n" as the line ending.

    Carriage returns, vertical tabs and form feeds count as line endings too.

    Args:
        largest: size in bytes above which a file is rejected unread.

    Raises:
        ValueError: the file cannot be read or is not text; the message is one line that names the file and says what
            to do.
    """
    data = _read_bytes(path, largest)
    kind = next((kind for start, kind in _KINDS if re.match(start, data, re.DOTALL)), None)
    if kind:
        raise ValueError(f"'{path}' is {kind}; expected plain text: export or copy its text into a .txt file")
    text = _LINE_ENDS.sub("\n", _decode(data, path).removesuffix("\x1a"))  # DOS's end-of-file character
    text = text.replace("\ufeff", "")  # anywhere, because files may have been concatenated
    if found := _CONTROL.search(text):
        raise ValueError(
            f"'{path}' contains the control character U+{ord(found[0]):04X} in line {_line_number(text, found.start())}"
            "; expected plain text: delete that character"
        )
    return text


def _read_bytes(path: Path, largest: int) -> bytes:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ValueError(f"'{path}' is a folder; expected a text file: name a file in it")
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"'{path}' is a pipe or a device; expected a file, which can be read again: save the text")
        if status.st_size > largest:
            size, most = status.st_size / 2**20, largest / 2**20
            raise ValueError(f"'{path}' has {size:.0f} MiB; expected text of at most {most:.0f} MiB: keep part of it")
        return path.read_bytes()
    except OSError as error:
        if isinstance(error, FileNotFoundError) and path.is_symlink():
            raise ValueError(
                f"'{path}' is a link to '{path.readlink()}', which is not there; mount or restore it, or name "
                "another file"
            ) from error
        raise ValueError(f"'{path}' cannot be read: {error.strerror}; check the path and its permissions") from error


def _decode(data: bytes, path: Path) -> str:
    mark, encoding = next(((mark, name) for mark, name in _MARKS if data.startswith(mark)), (b"", ""))
    if not mark and b"\0" in data:
        encoding = _encoding_without_mark(data)
        if not encoding:
            raise ValueError(
                f"'{path}' contains null bytes, as UTF-16, binary files and files in mixed encodings do; expected "
                f"UTF-8 text: if it is text, {SAVE_AS_UTF8}"
            )
    try:
        text = data[len(mark) :].decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(_undecodable(path, data, encoding, error)) from error
    if encoding.startswith("utf-16") and not _is_assigned(text):
        raise ValueError(_damaged(path, encoding))
    return text


def _encoding_without_mark(data: bytes) -> str:
    """UTF-32 or UTF-16, judged by the zero bytes; empty if they leave a doubt.

    Chinese or Japanese in UTF-16 has few zero bytes in either position, so only mostly Latin text is certain.
    """
    for encoding in ("utf-32-le", "utf-32-be"):
        if _is_text(data, encoding):
            return encoding
    for encoding, low, high in (("utf-16-le", data[::2], data[1::2]), ("utf-16-be", data[1::2], data[::2])):
        if 0 not in low and 2 * high.count(0) >= len(high) and _is_text(data, encoding):
            return encoding
    return ""


def _is_text(data: bytes, encoding: str) -> bool:
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return not _CONTROL.search(text) and _is_assigned(text)


def _is_assigned(text: str) -> bool:
    """Whether all characters are assigned in Unicode. Only the basic plane is checked: emoji may be newer than Python's
    tables."""
    return all(unicodedata.category(letter) != "Cn" for letter in set(text) if ord(letter) < 0x10000)


def _undecodable(path: Path, data: bytes, encoding: str, error: UnicodeDecodeError) -> str:
    if encoding not in ("", "utf-8"):
        return _damaged(path, encoding)
    start = data.rfind(b"\n", 0, error.start) + 1
    line = data[start : error.start + 20].split(b"\n")[0].strip().decode("cp1252", errors="replace")
    number = data.count(b"\n", 0, error.start) + 1
    return (
        f"'{path}' is not UTF-8: line {number} contains the byte 0x{data[error.start]:02x}; it looks like an older "
        f"encoding (as Windows-1252, the line reads {line[-60:]!r}): {SAVE_AS_UTF8}"
    )


def _damaged(path: Path, encoding: str) -> str:
    name = encoding[:6].upper()
    return (
        f"'{path}' starts as {name} but is not {name} throughout: it was cut off, or text in another encoding was "
        f"appended; repair it in a text editor and save it as UTF-8"
    )


def _line_number(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
