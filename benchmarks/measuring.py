"""Seconds, memory, processes of their own, and tables. Importing it makes `lance_core` importable."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def least(runs: Iterable[Iterable[float]]) -> float:
    """The least of all: other programs can only add."""
    return min(chain.from_iterable(runs))


def peak_gigabytes() -> float:
    """The most memory this process has had resident."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux getrusage also counts what ran in this process before Python did
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def in_own_process(script: str, *options: str) -> dict[str, object]:
    """The JSON object in the last line of what `script` prints; its memory peak is its own."""
    done = subprocess.run([sys.executable, script, *options], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(columns: Mapping[str, Mapping[str, object]]) -> str:
    """Rows of figures or words under the columns' titles; '-' where a column lacks one."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    cells = {title: [_cell(column.get(name, "-")) for name in names] for title, column in columns.items()}
    widths = {title: 2 + max(map(len, [title, *column])) for title, column in cells.items()}
    width = max(map(len, names), default=0)
    lines = [" " * width + "".join(f"{title:>{widths[title]}}" for title in cells)]
    for index, name in enumerate(names):
        lines.append(f"{name:<{width}}" + "".join(f"{column[index]:>{widths[t]}}" for t, column in cells.items()))
    return "\n".join(lines)


def markdown(title: str, rows: Mapping[str, Mapping[str, object]]) -> str:
    """A table in Markdown whose rows, by their names, have words or figures by the names of the columns."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [[title, *names], ["---"] * (1 + len(names))]
    lines += [[row, *(_cell(values.get(name, "")) for name in names)] for row, values in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def told(main: Callable[[], None]) -> None:
    """Runs a script; what its user got wrong ends it with one sentence."""
    from lance_core.errors import LanceError  # torch comes with it, which not every script wants

    try:
        main()
    except LanceError as error:
        sys.exit(f"Error: {error}")


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)
