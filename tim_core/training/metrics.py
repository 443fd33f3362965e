"""metrics.csv of a run, and a TensorBoard log beside it."""

import csv
from pathlib import Path

from ..files import atomic_write

NAME = "metrics.csv"


def log(folder: Path, row: dict, board=None) -> None:
    """Appends a row to metrics.csv and to the TensorBoard writer `board`. New columns are added to the file."""
    path = folder / NAME
    if not path.exists() or not path.stat().st_size:
        _write_rows(path, list(row), [])
    with path.open(newline="") as file:
        columns = list((rows := csv.DictReader(file)).fieldnames)
        more = [name for name in row if name not in columns]
        before = list(rows) if more else []
    if more:
        columns += more
        atomic_write(path, lambda tmp: _write_rows(tmp, columns, before))
    with path.open("a", newline="") as file:
        csv.DictWriter(file, columns).writerow(row)
    if board is not None:
        for name, value in row.items():
            if name != "step":
                board.add_scalar(name, value, row["step"])
        board.flush()


def forget_after(folder: Path, step: int) -> None:
    """Drops rows of later steps, which a resumed run writes again, and damaged rows."""
    path = folder / NAME
    if path.exists():
        with path.open(newline="") as file:
            columns = (rows := csv.DictReader(file)).fieldnames or []
            kept = [row for row in rows if None not in (*row, *row.values()) and row["step"].isdecimal() and int(row["step"]) <= step]
        atomic_write(path, lambda tmp: _write_rows(tmp, columns, kept))


def tensorboard(folder: Path, start: int):
    """A TensorBoard writer for a run that starts at step `start`; None if tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder, purge_step=start + 1)


def _write_rows(path: Path, columns: list[str], rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
