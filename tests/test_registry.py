"""Parts by name: a cell of a notebook may be run again, two parts of one name are told."""

from __future__ import annotations

import pytest

from scarceseg.errors import ConfigError
from scarceseg.registry import Registry


def test_a_part_that_is_defined_again_replaces_itself() -> None:
    parts: Registry[type] = Registry("part", "scarceseg.methods")

    def cell(number: int) -> type:
        @parts.register("x", "y")
        class Part:
            value = number

        return Part

    cell(1)
    second = cell(2)
    assert parts.get("x") is parts.get("y") is second and "y" in parts.names()


def test_two_parts_of_one_name_are_told() -> None:
    parts: Registry[object] = Registry("part", "scarceseg.methods")
    first = parts.register("x")(object())

    @parts.register("z")
    def other() -> None: ...

    for part in (object(), other):  # the first has no name of its own
        with pytest.raises(ConfigError, match="part 'x' is registered twice"):
            parts.register("w", "x")(part)
    assert parts.get("x") is first and "w" not in parts.names()
