"""A hostile input and what the command line must make of it, and how a command is run within bounds of time and memory."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import resource
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import IO, Any

from tests.corpus.originals import Originals
from tests.support import mentions
from tim_core.cli import main

SEED = int(os.environ.get("TIM_CORPUS_SEED", "0"))  # of the values and places; the classes are the same for every seed
SECONDS, BYTES = 10, 2 * 2**30  # that a command may take, the bytes beyond what the process has already
LONGEST_LINE = 2100  # characters of an error line
PROGRESS = re.compile(r"%\||\d(it|s|step|image)/|\[\d\d:\d\d")


@dataclass(frozen=True)
class Outcome:
    """What a command did. new, changed: names of files below the folder, that it made, that it changed or removed."""

    code: int
    out: str
    err: str
    seconds: float
    folder: Path
    new: tuple[str, ...]
    changed: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        """The lines on stderr, without progress bars."""
        return [line for line in re.split("[\r\n]+", self.err) if line.strip() and not PROGRESS.search(line)]

    def check_printable(self) -> None:
        """AssertionError for control characters and lone surrogates, which a terminal acts on or cannot show."""
        wrong = [line for line in (*self.out.split("\n"), *self.lines) if not line.isprintable()]
        assert not wrong, wrong


@dataclass(frozen=True)
class Fails:
    """One error line that names the thing, its value or the advice, in this order; no file is made or changed."""

    named: tuple[object, ...]
    code: int = 1

    def check(self, outcome: Outcome, originals: Originals) -> None:
        outcome.check_printable()
        *others, last = outcome.lines or [""]
        assert outcome.code == self.code, f"exit code {outcome.code}, not {self.code}\n{outcome.out}{outcome.err}"
        assert last.startswith("tim: error: ") and len(last) <= LONGEST_LINE, last[:5000]
        assert all(line.startswith("tim: ") and not line.startswith("tim: error: ") for line in others), outcome.err[:5000]
        assert mentions(last, *self.named), f"{last}\ndoes not name {self.named}"
        assert outcome.out == "" and not outcome.new and not outcome.changed, (outcome.out, outcome.new, outcome.changed)


@dataclass(frozen=True)
class Gives:
    """Exit code 0, and what `look` asserts of the outcome. said: what the log lines name; without it there are none."""

    look: Callable[[Outcome, Originals], None]
    said: tuple[object, ...] = ()

    def check(self, outcome: Outcome, originals: Originals) -> None:
        assert outcome.code == 0, f"exit code {outcome.code}\n{outcome.err}"
        outcome.check_printable()
        assert all(line.startswith("tim: ") for line in outcome.lines), outcome.err[:5000]
        assert mentions(" ".join(outcome.lines), *self.said) and (self.said or not outcome.lines), outcome.lines
        assert not [name for name in outcome.new if ".part" in name], outcome.new
        self.look(outcome, originals)


@dataclass(frozen=True)
class Either:
    """An error, or a result, where both are right: damage that may hit what is not used."""

    error: Fails
    result: Gives

    def check(self, outcome: Outcome, originals: Originals) -> None:
        (self.error if outcome.code else self.result).check(outcome, originals)


@dataclass(frozen=True)
class Case:
    """build(folder, originals) writes files into an empty folder, where the command then runs -> the arguments of `tim`.

    child: whether it runs in a child process, because it may crash or hang where no signal reaches it.
    """

    name: str
    build: Callable[[Path, Originals], Sequence[object]]
    expected: Fails | Gives | Either
    child: bool = False


GENERATORS: list[Callable[[Random], Iterable[Case]]] = []


def generator(function: Callable[[Random], Iterable[Case]]) -> Callable[[Random], Iterable[Case]]:
    """Registers a function that makes cases from a random generator of its own."""
    GENERATORS.append(function)
    return function


def all_cases(seed: int = SEED) -> list[Case]:
    return [case for make in GENERATORS for case in make(Random(f"{seed} {make.__name__}"))]


def fails(*named: object, code: int = 1) -> Fails:
    return Fails(named, code)


def gives(name: str, reference: Callable[[Originals], Path], said: Sequence[object] = ()) -> Gives:
    """The file `name` is made and has the bytes of another file, and no other file is made or changed."""

    def look(outcome: Outcome, originals: Originals) -> None:
        assert outcome.new == (name,) and not outcome.changed, (outcome.new, outcome.changed)
        assert (outcome.folder / name).read_bytes() == reference(originals).read_bytes(), "another result than that of the clean input"

    return Gives(look, tuple(said))


def run_case(case: Case, folder: Path, originals: Originals) -> None:
    """Runs a case in an empty folder, which is the working directory, and checks what comes of it."""
    arguments = [str(word) for word in case.build(folder, originals)]
    case.expected.check(run_command(arguments, folder, case.child), originals)


def run_command(arguments: Sequence[str], folder: Path, child: bool = False) -> Outcome:
    """Runs `tim` with these arguments. AssertionError if it takes longer than SECONDS; beyond BYTES it has no more memory."""
    before = _files(folder)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.monotonic()
        code = (_in_child if child else _in_process)(arguments, out, err)
        seconds = time.monotonic() - started
        texts = [(stream.seek(0), stream.read().decode("utf-8", "replace"))[1] for stream in (out, err)]
    after = _files(folder)
    assert code is not None and seconds < 2 * SECONDS, f"took longer than {SECONDS} s\n{texts[1][-5000:]}"
    changed = tuple(name for name in before if before[name] != after.get(name))
    return Outcome(code, *texts, seconds, folder, tuple(sorted(after.keys() - before.keys())), changed)


class TookTooLong(BaseException):
    """Not an Exception, which the command line turns into a line."""


def _in_process(arguments: Sequence[str], out: IO[bytes], err: IO[bytes]) -> int | None:
    """-> the exit code; None if it took too long."""

    def stop(*_: Any) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, stop)
    try:
        with _redirected(out, err), _limited_memory():
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            return _run(arguments)
    except TookTooLong:
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _in_child(arguments: Sequence[str], out: IO[bytes], err: IO[bytes]) -> int | None:
    """-> the exit code, the negative number of the signal that ended it, None if it took too long."""
    if (child := os.fork()) == 0:
        try:
            with _redirected(out, err), _limited_memory():
                code = _run(arguments)
            os._exit(code)
        finally:
            os._exit(70)
    end = time.monotonic() + SECONDS
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
        time.sleep(0.01)
    if done[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return None
    return os.waitstatus_to_exitcode(done[1])


def _run(arguments: Sequence[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except TookTooLong:
        raise
    except BaseException:  # such as a panic of a Rust library
        traceback.print_exc()
        return 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


@contextmanager
def _redirected(out: IO[bytes], err: IO[bytes]) -> Iterator[None]:
    """What Python and libraries write to stdout and stderr goes to these files, log lines too."""
    root = logging.getLogger()
    loggers = [one for one in logging.Logger.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    streams = [h for one in loggers for h in one.handlers if type(h) is logging.StreamHandler]
    kept = root.handlers[:], sys.stdout, sys.stderr, os.dup(1), os.dup(2), [h.stream for h in streams]
    root.handlers.clear()  # the command line sets up its own
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", buffering=1, closefd=False) for number in (1, 2))
    for handler in streams:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        root.handlers[:], sys.stdout, sys.stderr, *descriptors, old = kept
        for number, descriptor in zip((1, 2), descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        for handler, stream in zip(streams, old):
            handler.setStream(stream)


@contextmanager
def _limited_memory() -> Iterator[None]:
    """No more than BYTES of address space beyond what the process has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _files(folder: Path) -> dict[str, object]:
    """What is below a folder, by name: the type, size, time, and the digest of regular files. Only temporary folders are listed."""
    found: dict[str, object] = {}
    for top, folders, files in os.walk(folder):
        for name in (*(name for name in folders if name.endswith(".part")), *files):
            path = Path(top, name)
            status = path.lstat()
            regular = stat.S_ISREG(status.st_mode)
            readable = regular and status.st_size < 2**26 and os.access(path, os.R_OK)
            digest = hashlib.sha256(path.read_bytes()).hexdigest() if readable else ""
            times = status.st_mtime_ns if regular else 0
            found[str(path.relative_to(folder))] = (stat.S_IFMT(status.st_mode), status.st_size if regular else 0, times, digest)
    return found
