"""Draws packages.svg, the map of the library's folders, from the imports in its files.

    python docs/pictures/packages.py [FOLDER]

FOLDER is a package's folder (default: himix_megatron of this checkout). Each of its folders is a box; files beside them make a
box of their own. A folder lies above all that it imports. An arrow that follows from others is left out: A imports C is not
drawn where A imports B and B imports C. Folders that import each other in a cycle lie on one level, joined by a red arrow.
"""

from __future__ import annotations

import ast
import sys
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from draw import FOLDER, Picture

Edges = set[tuple[str, str]]
BESIDE = "(top level)"
"""Name of the box of files that lie in no folder."""


def imports_of(file: Path, package: str, root: Path) -> Iterator[str]:
    """Dotted names below the package that a file imports, at its top or inside a function."""
    here = [package, *file.relative_to(root).parent.parts]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix(f"{package}.") for name in names if name.startswith(f"{package}."))


def read(root: Path) -> tuple[dict[str, list[Path]], Edges]:
    """The files of each folder, and who imports whom."""
    files: dict[str, list[Path]] = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if parts != ("__init__.py",):
            files.setdefault(parts[0] if len(parts) > 1 else BESIDE, []).append(file)
    edges: Edges = set()
    for folder, own in files.items():
        for name in {name for file in own for name in imports_of(file, root.name, root)}:
            first = name.split(".")[0]
            target = first if first in files else BESIDE if (root / f"{first}.py").is_file() else folder
            if target != folder:
                edges.add((folder, target))
    return files, edges


def reached(edges: Edges) -> Edges:
    """All pairs of which the first imports the second, itself or by others."""
    found = set(edges)
    while more := {(a, d) for a, b in found for c, d in edges if b == c} - found:
        found |= more
    return found


def needed(edges: Edges, reach: Edges) -> Edges:
    """The arrows that do not follow from others. Folders in a cycle keep all of theirs among each other."""
    cycles = {(a, b) for a, b in edges if (b, a) in reach}
    others = {a for pair in edges for a in pair}
    return cycles | {
        (a, c)
        for a, c in edges - cycles
        if not any((a, b) in reach and (b, c) in reach and (b, a) not in reach and (c, b) not in reach for b in others)
    }


def levels_of(folders: list[str], edges: Edges, reach: Edges) -> dict[str, int]:
    """1 for folders that import none, else one more than the highest that is imported; the same for a cycle's members."""
    levels = dict.fromkeys(folders, 1)
    for _ in folders:
        for a, b in edges:
            above = 0 if (b, a) in reach else 1
            levels[a] = max(levels[a], levels[b] + above)
    return levels


class Rows:
    """Boxes and arrows' bends on rows, ordered so that few arrows cross, and placed near what they are joined to."""

    def __init__(self, levels: dict[str, int], edges: Edges) -> None:
        self.rows: list[list[str]] = [
            sorted(name for name in levels if levels[name] == n) for n in range(1, max(levels.values()) + 1)
        ]
        self.links: list[tuple[str, str]] = []
        """From a row to the next below; an arrow over several rows bends in each between."""
        self.paths: dict[tuple[str, str], list[str]] = {}
        for a, b in sorted(edges):
            between = range(levels[a] - 1, levels[b], -1)
            path = [a, *(f"{a}>{b}@{level}" for level in between), b]
            for name, level in zip(path[1:-1], between, strict=True):
                self.rows[level - 1].append(name)
            self.paths[a, b] = path
            if levels[a] != levels[b]:
                self.links += pairwise(path)
        self.joined: dict[str, list[str]] = {name: [] for row in self.rows for name in row}
        for upper, lower in self.links:
            self.joined[upper].append(lower)
            self.joined[lower].append(upper)
        self._order()

    def _order(self) -> None:
        best, fewest = self.rows, self._crossings()
        for sweep in range(24):
            place = {name: i / max(1, len(row) - 1) if len(row) > 1 else 0.5 for row in self.rows for i, name in enumerate(row)}
            step = 1 if sweep % 2 else -1
            for row in self.rows[::step]:
                mean = {
                    n: sum(place[m] for m in self.joined[n]) / len(self.joined[n]) if self.joined[n] else place[n] for n in row
                }
                row.sort(key=mean.__getitem__)
                place |= {name: i / max(1, len(row) - 1) if len(row) > 1 else 0.5 for i, name in enumerate(row)}
            self._swap()
            if (crossings := self._crossings()) < fewest:
                best, fewest = [list(row) for row in self.rows], crossings
        self.rows = best

    def _swap(self) -> None:
        """Swap neighbours as long as fewer arrows cross."""
        fewest = self._crossings()
        for row in self.rows:
            for i in range(len(row) - 1):
                row[i], row[i + 1] = row[i + 1], row[i]
                if (crossings := self._crossings()) < fewest:
                    fewest = crossings
                else:
                    row[i], row[i + 1] = row[i + 1], row[i]

    def _crossings(self) -> int:
        place = {name: i for row in self.rows for i, name in enumerate(row)}
        level = {name: n for n, row in enumerate(self.rows) for name in row}
        links = [(level[a], place[a], place[b]) for a, b in self.links]
        return sum(m == n and (a - c) * (b - d) < 0 for i, (m, a, b) in enumerate(links) for n, c, d in links[:i])

    def positions(self, widths: dict[str, float], left: float, right: float) -> dict[str, float]:
        """The middle of each box and bend."""
        at = {}
        for row in self.rows:
            room = (right - left - sum(widths.get(name, 16) for name in row)) / (len(row) + 1)
            x = left + room
            for name in row:
                at[name] = x + widths.get(name, 16) / 2
                x += widths.get(name, 16) + room
        for _ in range(40):
            for row in self.rows:
                wanted = [sum(at[m] for m in self.joined[n]) / len(self.joined[n]) if self.joined[n] else at[n] for n in row]
                halves = [widths.get(name, 16) / 2 for name in row]
                spread(wanted, halves, left, right, gap=18)
                at |= dict(zip(row, wanted, strict=True))
        ends = [at[name] + side * widths.get(name, 16) / 2 for name in at for side in (-1, 1)]
        shift = (left + right - min(ends) - max(ends)) / 2
        return {name: x + shift for name, x in at.items()}


def spread(places: list[float], halves: list[float], left: float, right: float, gap: float) -> None:
    """Move boxes apart, as little as it takes, until none overlap and all are within."""
    for _ in range(60):
        for i in range(len(places) - 1):
            lack = places[i] + halves[i] + gap + halves[i + 1] - places[i + 1]
            if lack > 0.01:
                places[i] -= lack / 2
                places[i + 1] += lack / 2
        places[0] = max(places[0], left + halves[0])
        places[-1] = min(places[-1], right - halves[-1])


def described(folder: str, files: list[Path], root: Path, width: float) -> list[str]:
    """Two lines for a box so wide, under a folder's name: what its docstring says first, or else its files."""
    own = root / folder / "__init__.py"
    said = ast.get_docstring(ast.parse(own.read_text(encoding="utf-8"))) if own.is_file() else None
    words = (said or "").strip().split("\n\n")[0].replace("\n", " ").rstrip(".")
    words = words or ", ".join(file.stem for file in files if file.stem != "__init__")
    return textwrap.wrap(words, int(width / 8), max_lines=2, placeholder=" ...", break_on_hyphens=False)


def draw(root: Path) -> Picture:
    files, edges = read(root)
    reach = reached(edges)
    levels = levels_of(list(files), edges, reach)
    rows = Rows(levels, needed(edges, reach))
    count, top, box_height, pitch = max(levels.values()), 70, 72, 108
    cycles = sorted({a for a, b in reach if a != b and (b, a) in reach})
    said = f"{len(files)} folders on {count} levels, {len(edges)} imports between them" + (
        f"; in a cycle: {', '.join(cycles)}" if cycles else ", none upward"
    )
    listed = (", ".join(sorted(name for name in files if levels[name] == n)) for n in range(count, 0, -1))
    p = Picture(
        "packages",
        f"The folders of {root.name} and which import which\n\n{said}. From the highest level down: {'; '.join(listed)}",
    )
    p.height = top + pitch * count
    p.text(16, 34, f"*{root.name}/", 18)
    p.text(944, 28, f"{said}\nan arrow that follows from others is not drawn", 14, "muted", "end")
    most = max(map(len, rows.rows))
    widths = dict.fromkeys(files, min(230.0, 896 / most - 18))
    at = rows.positions(widths, 48, 944)
    y_of = {name: top + pitch * (count - level) for name, level in levels.items()}
    for n in range(1, count + 1):
        y = top + pitch * (count - n)
        p.parts.append(
            f'<rect class="panel" stroke-width="0" x="8" y="{y - 8}" width="944" height="{box_height + 16}" rx="6"/>'
        )
        p.text(20, y + box_height / 2 + 6, f"*{n}", 16, "muted")
    ports = _ports(rows, at, widths)
    for (a, b), path in sorted(rows.paths.items()):
        cycle = (b, a) in reach
        points: list[tuple[float, float]] = [(ports[a, b, "out"], y_of[a] + box_height)]
        for bend in path[1:-1]:
            row = top + pitch * (count - int(bend.rpartition("@")[2]))
            points += [(at[bend], row - 10), (at[bend], row + box_height + 10)]
        points.append((ports[a, b, "in"], y_of[b] - 1))
        if cycle:
            side = 1 if at[a] < at[b] else -1
            beside = y_of[a] + box_height / 2 + 10 * side
            points = [(at[a] + side * widths[a] / 2, beside), (at[b] - side * (widths[b] / 2 + 1), beside)]
            if abs(at[a] - at[b]) > 1.5 * widths[a]:  # over the boxes between
                over, out, into = y_of[a] - 18 - 3 * side, at[a] + 20 * side, at[b] - 20 * side
                points = [(out, y_of[a]), (out, over), (into, over), (into, y_of[b])]
        p.arrow(*points, kind="alarm" if cycle else "plain")
    for name, own in files.items():
        words = "\n".join([f"*{name}" if name == BESIDE else f"*{name}/", *described(name, own, root, widths[name])])
        kind = "alarm" if name in cycles else "both" if levels[name] == count else "text"
        p.box(at[name] - widths[name] / 2, y_of[name], widths[name], box_height, words, kind, 14)
    return p


def _ports(rows: Rows, at: dict[str, float], widths: dict[str, float]) -> dict[tuple[str, str, str], float]:
    """Where each arrow leaves its box and enters the other: side by side, in the order of where they come from."""
    ends: dict[tuple[str, str], list[tuple[float, tuple[str, str]]]] = {}
    for (a, b), path in rows.paths.items():
        ends.setdefault((a, "out"), []).append((at[path[1]], (a, b)))
        ends.setdefault((b, "in"), []).append((at[path[-2]], (a, b)))
    found = {}
    for (name, side), arrows in ends.items():
        for i, (_, edge) in enumerate(sorted(arrows)):
            found[*edge, side] = at[name] + (i - (len(arrows) - 1) / 2) * min(26, (widths[name] - 30) / len(arrows))
    return found


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER.parents[1] / "himix_megatron"
    draw(root.resolve()).save()


if __name__ == "__main__":
    main()
