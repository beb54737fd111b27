"""Draws docs/images/house.svg, which package imports which, from the imports: `python scripts/draw-house.py`."""

import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.test_architecture import MODULES, floors, rooms  # noqa: E402

FILE = ROOT / "docs" / "images" / "house.svg"
WIDTH, HEIGHT, GAP, FLOOR = 920, 30, 14, 74
LEFT = 40
LEFT_OUT = {"adfm", "adfm.__main__"}  # the version number, and `python -m adfm`


def svg() -> str:
    """The drawing: a row a floor, a box a room, a line from each room to those that it imports directly.

    A line that follows from two others is left out: of a, b, c where a imports b and c, and b imports c, the line from
    a to c.
    """
    below = {room: imports - LEFT_OUT for room, imports in rooms().items() if room not in LEFT_OUT}
    floor = {room: number for room, number in floors().items() if room in below}
    reach = {room: set(imports) for room, imports in below.items()}
    for room in sorted(below, key=floor.__getitem__):
        reach[room] |= {further for each in below[room] for further in reach[each]}
    lines = {
        room: sorted(each for each in imports if not any(each in reach[other] for other in imports))
        for room, imports in below.items()
    }
    top = max(floor.values())
    centre: dict[str, float] = {}
    for number in range(1, top + 1):  # from the ground up, each room near the middle of those under it
        row = [room for room in below if floor[room] == number]

        def middle(room: str) -> float:
            return sum(centre[each] for each in lines[room]) / len(lines[room]) if lines[room] else 0

        row.sort(key=lambda room: (middle(room), room))
        space = (WIDTH - LEFT - sum(map(_width, row))) / (len(row) + 1)
        x = LEFT + space
        for room in row:
            centre[room] = x + _width(room) / 2
            x += _width(room) + space
    height = top * FLOOR + GAP

    def y(room: str) -> int:
        return (top - floor[room]) * FLOOR + GAP

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="14" text-anchor="middle">',
        "<title>Packages of adfm by floor; a line leads from a package down to one that it imports</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for number in range(1, top + 1):
        parts.append(f'<text x="18" y="{(top - number) * FLOOR + GAP + 20}" fill="#888888">{number}</text>')
    for room in sorted(below, key=lambda room: (-floor[room], centre[room])):
        for each in lines[room]:
            parts.append(
                f'<line x1="{centre[room]:.0f}" y1="{y(room) + HEIGHT}" x2="{centre[each]:.0f}" y2="{y(each)}" '
                'stroke="#9e9e9e"/>'
            )
    for room in sorted(below, key=lambda room: (-floor[room], centre[room])):
        package = any(module.startswith(f"{room}.") for module in MODULES)
        parts.append(
            f'<rect x="{centre[room] - _width(room) / 2:.0f}" y="{y(room)}" width="{_width(room)}" height="{HEIGHT}" '
            f'rx="4" fill="{"#b2dfdb" if package else "#eeeeee"}" stroke="#00695c"/>'
            f'<text x="{centre[room]:.0f}" y="{y(room) + 20}" fill="#111111">{escape(_label(room))}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _label(room: str) -> str:
    return room.removeprefix("adfm.")


def _width(room: str) -> int:
    return 9 * len(_label(room)) + 22


if __name__ == "__main__":
    FILE.write_text(svg(), encoding="utf-8")
