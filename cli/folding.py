"""Tables that fit a screen: rows of one kind share a line, and columns that say nothing are left out."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from itertools import groupby

#: Of a name, texts and numbers in turn, each with the values that it takes.
Parts = tuple[tuple[str, ...], ...]


def fold(names: Iterable[str]) -> list[tuple[str, list[int]]]:
    """Names that differ in numbers alone as few patterns, each with the places of its names, by first appearance.

        layer1.0.conv1, layer1.0.conv2, layer1.1.conv1, layer1.1.conv2    ->    layer1.{0,1}.conv{1,2}

    A pattern stands for these names and no others: where ``layer1.0.conv2`` is missing, two patterns are needed.
    """
    found: dict[Parts, list[int]] = {}
    for place, name in enumerate(names):
        found.setdefault(tuple((part,) for part in re.split(r"(\d+)", name)), []).append(place)
    for number in range(1, max(map(len, found), default=0), 2):  # each second part is a number
        merged: dict[Hashable, tuple[Parts, list[int]]] = {}
        for parts, places in found.items():
            rest = (parts[:number], parts[number + 1 :]) if number < len(parts) else parts
            if rest in merged:
                before, others = merged[rest]
                parts = (*parts[:number], before[number] + parts[number], *parts[number + 1 :])
                places = others + places
            merged[rest] = parts, places
        found = dict(merged.values())
    return sorted(((_pattern(parts), sorted(places)) for parts, places in found.items()), key=lambda pair: pair[1])


def grouped(rows: Sequence[tuple[str, Hashable]]) -> list[tuple[str, list[int]]]:
    """Rows ``(name, all else that they say)`` that say the same, as patterns of their names and places in ``rows``.

    A pattern of several names ends in how many: ``layer1.{0,1}.conv1 x2``.
    """
    alike: dict[Hashable, list[int]] = {}
    for place, (_, rest) in enumerate(rows):
        alike.setdefault(rest, []).append(place)
    found = [
        (pattern + (f" x{len(chosen)}" if len(chosen) > 1 else ""), [places[each] for each in chosen])
        for places in alike.values()
        for pattern, chosen in fold(rows[place][0] for place in places)
    ]
    return sorted(found, key=lambda group: group[1])


def _pattern(parts: Parts) -> str:
    return "".join(values[0] if len(values) == 1 else "{" + _numbers(values) + "}" for values in parts)


def _numbers(values: Sequence[str]) -> str:
    """``0,1``, and three or more in a row as ``0..5``; ``01`` is no number in a row."""
    runs = []
    plain = sorted(values, key=int)
    for _, run in groupby(enumerate(plain), key=lambda pair: int(pair[1]) - pair[0]):
        found = [value for _, value in run]
        whole = all(value == str(int(value)) for value in found)
        runs += [f"{found[0]}..{found[-1]}"] if len(found) > 2 and whole else found
    return ",".join(runs)


def that_fit(widths: Sequence[int], order: Sequence[int], room: int, gap: int = 2) -> list[int]:
    """Which columns of these widths fit into ``room``, taken in ``order``, the first in any case; in their own order.

    A column that does not fit is left out, and a narrower one behind it may still come.
    """
    chosen: list[int] = []
    used = -gap
    for column in order:
        if not chosen or used + gap + widths[column] <= room:
            chosen.append(column)
            used += gap + widths[column]
    return sorted(chosen)


def broken(name: str, room: int) -> str:
    """``name`` in lines of at most ``room``, broken behind dots, slashes and spaces where it has some."""
    lines = [""]
    for part in re.findall(rf"[^./ ]{{1,{room - 3}}}[./ ]?|[./ ]", name):
        if lines[-1].strip() and len(lines[-1]) + len(part.rstrip()) > room:
            lines.append("  ")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)
