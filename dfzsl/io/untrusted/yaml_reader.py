"""Read YAML files of plain values, bounded in size, depth and the length of each value."""

from __future__ import annotations

import copy
import functools
import os
from typing import Any

import yaml

from dfzsl.utils.errors import UserError

from ..files import read_text

# Characters of a whole file, of a text and of a number; levels of nesting.
MAX_FILE_LENGTH, MAX_TEXT_LENGTH, MAX_NUMBER_LENGTH, MAX_DEPTH = 1 << 18, 4096, 40, 20


class _PlainLoader(yaml.SafeLoader):
    """Load plain values only.

    An alias is refused because ten lines of aliases can make a billion values, and a long number because
    converting it takes minutes.
    """

    MAX_LENGTH = {  # noqa: RUF012
        **{f"tag:yaml.org,2002:{name}": MAX_NUMBER_LENGTH for name in ("null", "bool", "int", "float")},
        **{f"tag:yaml.org,2002:{name}": MAX_TEXT_LENGTH for name in ("str", "seq", "map")},
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
            if (longest := self.MAX_LENGTH.get(node.tag)) is None:
                raise _refusal(node, f"the tag {tag}; only numbers, texts, lists and keys are read")
            if isinstance(node, yaml.ScalarNode) and len(node.value) > longest:
                raise _refusal(node, f"a value ({tag}) of more than {longest} characters")
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
    if len(text) > MAX_FILE_LENGTH:
        raise UserError(f"{path}: {len(text):,} characters; a YAML file here has at most {MAX_FILE_LENGTH:,}")
    try:
        return copy.deepcopy(_parse(text))
    # ValueError, LookupError and TypeError come from values that do not have the type that their tag claims.
    except (yaml.YAMLError, ValueError, LookupError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or error
        where = f" (line {mark.line + 1})" if mark else ""
        raise UserError(f"{path}: not plain YAML: {problem}{where}") from None
