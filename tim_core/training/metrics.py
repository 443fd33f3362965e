"""metrics.csv of a run, and a TensorBoard log beside it."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import TimError, one_line
from ..files import atomic_write, check_file

NAME = "metrics.csv"


def log(folder: Path, row: dict, board=None) -> None:
    """Appends a row to metrics.csv and to the TensorBoard writer `board`. New columns are added to the file."""
    path = folder / NAME
    if not path.exists() or not path.stat().st_size:
        atomic_write(path, lambda tmp: _write_rows(tmp, list(row), []))
    with _opened(path) as rows:
        columns = list(rows.fieldnames or [])
        more = [name for name in row if name not in columns]
        before = [row for row in rows if None not in row] if more else []
    if more:
        columns += more
        atomic_write(path, lambda tmp: _write_rows(tmp, columns, before))
    try:
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, columns).writerow(row)
    except OSError as error:
        raise TimError(f"{path}: cannot be written ({error.strerror})") from error
    if board is not None:
        try:
            for name, value in row.items():
                if name != "step":
                    board.add_scalar(name, value, row["step"])
            board.flush()
        except OSError as error:
            raise TimError(f"{folder}: its TensorBoard log cannot be written ({error.strerror})") from error


def check(folder: Path) -> None:
    """TimError if the metrics.csv in a folder is none of a run."""
    if (folder / NAME).exists():
        with _opened(folder / NAME):
            pass


def forget_after(folder: Path, step: int) -> None:
    """Drops rows of later steps, which a resumed run writes again, and damaged rows."""
    path = folder / NAME
    if path.exists():
        with _opened(path) as rows:
            columns = list(rows.fieldnames or [])
            found = list(rows)
        kept = [row for row in found if None not in (*row, *row.values()) and row["step"].isdecimal() and int(row["step"]) <= step]
        if kept != found or not path.read_bytes().endswith(b"\r\n"):  # or the last row was cut
            atomic_write(path, lambda tmp: _write_rows(tmp, columns, kept))


def tensorboard(folder: Path, start: int):
    """A TensorBoard writer for a run that starts at step `start`; None if tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder, purge_step=start + 1)


@contextmanager
def _opened(path: Path) -> Iterator[csv.DictReader]:
    """The rows of a file. TimError naming it if it is none of `log`."""
    advice = "move it away, or choose another output"
    check_file(path)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            columns = list(rows.fieldnames or [])
            if columns and ("step" not in columns or len(set(columns)) < len(columns)):
                raise TimError(f"{path}: is no metrics of a run, its columns are {', '.join(columns)}; {advice}")
            yield rows
    except OSError as error:
        raise TimError(f"{path}: cannot be read ({error.strerror})") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise TimError(f"{path}: is no metrics of a run ({one_line(error)}); {advice}") from None


def _write_rows(path: Path, columns: list[str], rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
