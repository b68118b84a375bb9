"""Read YAML files of plain values, bounded in size, depth and the length of each value."""

from __future__ import annotations

import copy
import functools
import os
from typing import Any

import yaml

from dfzsl.utils.errors import UserError

from ..files import read_text

MAX_FILE_CHARS, MAX_STRING_CHARS, MAX_NUMBER_CHARS = 1 << 18, 4096, 40
MAX_DEPTH = 20  # levels of nesting


class _PlainLoader(yaml.SafeLoader):
    """Load plain values only.

    Aliases are refused because ten lines of them can expand to a billion values, and long numbers because
    converting one takes minutes.
    """

    MAX_CHARS = {  # noqa: RUF012
        **{f"tag:yaml.org,2002:{name}": MAX_NUMBER_CHARS for name in ("null", "bool", "int", "float")},
        **{f"tag:yaml.org,2002:{name}": MAX_STRING_CHARS for name in ("str", "seq", "map")},
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        start = self.peek_event()
        if isinstance(start, yaml.AliasEvent):
            raise _refusal(start, "an alias (*name); write the value out")
        if self.depth > MAX_DEPTH:
            raise _refusal(start, f"more than {MAX_DEPTH} levels")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node is not None:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            if (max_chars := self.MAX_CHARS.get(node.tag)) is None:
                raise _refusal(node, f"the tag {tag}; only numbers, strings, lists and mappings are allowed")
            if isinstance(node, yaml.ScalarNode) and len(node.value) > max_chars:
                raise _refusal(node, f"a value ({tag}) of more than {max_chars} characters")
        return node


def _refusal(at: yaml.Event | yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=f"it has {problem}", problem_mark=at.start_mark)


# Cached because a sweep reads the same configs for each of its runs.
@functools.lru_cache
def _parse(text: str) -> object:
    return _PlainLoader(text).get_single_data()


def read_yaml(path: str | os.PathLike[str]) -> object:
    """Read a YAML file of plain values.

    Raises:
        UserError: the file is missing, is not YAML, is too large, or has aliases, tags or long values.
    """
    text = read_text(path)
    if len(text) > MAX_FILE_CHARS:
        raise UserError(f"{path}: {len(text):,} characters; a YAML file may have at most {MAX_FILE_CHARS:,}")
    try:
        return copy.deepcopy(_parse(text))
    # ValueError, LookupError and TypeError come from values that do not have the type that their tag claims.
    except (yaml.YAMLError, ValueError, LookupError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or error
        where = f" (line {mark.line + 1})" if mark else ""
        raise UserError(f"{path}: not plain YAML: {problem}{where}") from None
