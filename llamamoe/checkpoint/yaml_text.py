"""Read YAML without code, duplicate keys, and values that cannot be written again."""

from __future__ import annotations

from typing import Any

import yaml

from .plain_values import MOST_DIGITS, Huge, oddities

_MOST_VALUES = 100_000


class _UniqueKeys(yaml.SafeLoader):
    """A safe YAML loader that refuses duplicate keys instead of silently using the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See PyYAML."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} appears twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """See PyYAML; a number with thousands of digits, which Python does not print, is left to `oddities`."""
        text = str(node.value)
        return super().construct_yaml_int(node) if len(text) <= MOST_DIGITS else Huge(len(text))


_UniqueKeys.add_constructor("tag:yaml.org,2002:int", _UniqueKeys.construct_yaml_int)


def parse_yaml(text: str) -> Any:
    """Parse YAML without running code.

    Raises:
        yaml.YAMLError: The text is invalid, or holds values that cannot be written again; errors of PyYAML about odd values
            and nesting are reported so, too.
    """
    try:
        data = yaml.load(text, Loader=_UniqueKeys)  # a SafeLoader
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from None
    odd = next(oddities(data, _MOST_VALUES, nul=False), None)
    if odd is not None:
        raise yaml.YAMLError(odd)
    return data
