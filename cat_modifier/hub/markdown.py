# SPDX-License-Identifier: Apache-2.0
"""Sections of a Markdown file that a program may rewrite, and escaping of what goes in."""

import re

__all__ = ["code", "fenced", "has_section", "plain", "read_section", "replace_section"]

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+\-.!|~$@:])")
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufeff]+")
"""Control characters, ends of lines, and marks that change the direction of text"""


def plain(text: str) -> str:
    """Escape text, so that it is one line of Markdown without any markup"""
    text = _SPECIAL.sub(r"\\\1", " ".join(_UNSEEN.sub(" ", text).split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code(text: str) -> str:
    """Make a span of code of text, on one line, also in a table"""
    text = " ".join(_UNSEEN.sub(" ", text).split()).replace("|", "\\|")
    ticks = "`" * (_longest_run(text) + 1)
    space = " " if "`" in text or not text else ""
    return f"{ticks}{space}{without_comments(text)}{space}{ticks}"


def fenced(text: str, language: str) -> str:
    """Make a block of code of text, which cannot end it"""
    lines = [_UNSEEN.sub(" ", line.expandtabs()) for line in text.splitlines()]
    ticks = "`" * max(3, _longest_run(text) + 1)
    return "\n".join([f"{ticks}{language}", without_comments("\n".join(lines)), ticks])


def without_comments(text: str) -> str:
    """Break up the beginnings of comments of HTML, as which sections are marked"""
    return text.replace("<!--", "<! --")


def has_section(text: str, name: str) -> bool:
    """Whether a Markdown file has a section between the marks of a name"""
    return _section(name).search(text) is not None


def read_section(text: str, name: str) -> str:
    """
    :return: text between the marks of a name
    :raises ValueError: if there are no such marks
    """
    match = _section(name).search(text)
    if match is None:
        raise ValueError(f"there is no section {name!r}")
    return match[2]


def replace_section(text: str, name: str, content: str) -> str:
    """Replace what is between the marks of a name, or add a section at the end"""
    content = content.strip("\n")
    content = f"{content}\n" if content else ""
    if has_section(text, name):
        # a function, since a string's backslashes would be read as escapes
        return _section(name).sub(lambda match: match[1] + content + match[3], text, count=1)
    first, last = _marks(name)
    return f"{text.rstrip()}\n\n{first}\n{content}{last}\n"


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- cat-modifier:{name} -->", f"<!-- /cat-modifier:{name} -->"


def _section(name: str) -> re.Pattern[str]:
    first, last = map(re.escape, _marks(name))
    return re.compile(rf"(^{first}[ \t]*\r?\n)(.*?)(^{last}[ \t]*\r?$)", re.M | re.S)


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
