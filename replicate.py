#!/usr/bin/env python3
# /// script
# requires-python = ">=3.8"
# dependencies = ["PyYAML"]
# ///
"""Replicate: version control for machine learning, in one Python file.

In a training script::

    import replicate
    experiment = replicate.init(path=".", params={"learning_rate": 0.01})
    experiment.checkpoint(path="model.pth", metrics={"loss": 0.1}, primary_metric=("loss", "minimize"))

On the command line: ``python replicate.py ls`` (then ``show``, ``diff``, ``plot``, ``report``, ``checkout``, ``help``).

The file has twelve sections; each builds on the ones above it:

     0  imports and constants             6  archives: ignore rules, packing, unpacking
     1  errors and the console            7  repository: documents, journals, rows, checkout
     2  values: JSON, times, short forms  8  recorder: journal, uploads, signals
     3  model: Experiment, lists, plots   9  library: Project, init, experiments, callbacks
     4  filters and sorting              10  rendering: tables, show, diff, curves, report (data in, text out)
     5  configuration, threads, storage  11  commands, parser, main

To follow one task through the code, read in this order:

    record      init(), create_experiment() [9]; Recorder.checkpoint() packs the files [6] and appends to a journal [8]; in
                the background, threads fold the journal into the document, compress archives and upload to buckets [8]
    list        ls_command() [11], list_rows() and RowCache [7], filters and sorting [4], render_list() [10]
    show, diff  their commands [11], find_item() [7], Experiment [3], compare_files() [7], render_experiment() and
                render_diff() [10]
    plot        plot_command() [11], Experiment [3], render_plot() [10]
    report      report_command() [11], report_data() and render_report() [10]
    clean up    prune_command(), verify_command() [11], prunable() [3], Pruning, Usage and Verification [7]
    check out   checkout_command() [11], Project.checkout() [9], Checkout [7], Archive and TarReader [6]
    push        push_command() [11], send_abandoned() and send_experiment() [8], Storage [5]
"""
from __future__ import annotations

import argparse
import datetime
import errno
import io
import json
import os
import platform
import re
import shlex
import shutil
import signal
import stat
import struct
import sys
import tarfile
import threading
import time
import zlib
from contextlib import contextmanager

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import (Any, BinaryIO, Callable, Container, Dict, Iterable, Iterator, List, NoReturn, Optional, Sequence,
                        Set, TextIO, Tuple, Union)
    Column = Tuple[str, Sequence[str]]  # a table column: its title, and one cell (of one or more lines) per row
    Options = Sequence[Tuple[Tuple[str, ...], Dict[str, Any]]]
    Block = Tuple[str, Sequence[Sequence[Optional[str]]]]  # of `show` or `diff`: a heading, and rows of a label and texts
    Paint = Callable[[str, str], str]  # (text, style of Console.COLORS) -> text in that style


# ------------------------------------------------------------------------------------------------------------------
# 0  Imports and constants
# ------------------------------------------------------------------------------------------------------------------

__version__ = "1.0.0"
__all__ = ["init", "experiments", "keras_callback", "lightning_callback", "transformers_callback", "Project", "Experiment",
           "Checkpoint", "ExperimentList", "CheckpointList", "ReplicateError", "DoesNotExist", "ConfigNotFound",
           "ReadError", "WriteError", "RepositoryConfigurationError", "IncompatibleRepositoryVersion",
           "CorruptedRepositorySpec"]

HEARTBEAT_INTERVAL = 10.0        # seconds between heartbeats of a running experiment
HEARTBEAT_TIMEOUT = 30.0         # seconds without a heartbeat before an experiment counts as stopped
CONFIG_NAMES = ("replicate.yaml", "replicate.yml", "keepsake.yaml", "keepsake.yml")
IGNORE_NAMES = (".replicateignore", ".keepsakeignore")
CONFIG_SEARCH_DEPTH = 100        # directories
DEFAULT_STORAGE = os.path.join(".replicate", "storage")
REPOSITORY_VERSION = 1
MAX_INT_BITS = 1000
MAX_NESTING = 50                 # levels of lists and objects in a param or metric
SHORT_ID = 7                     # hex digits
LARGE_CODE_BYTES = 1 << 30       # init() warns when it saves more
LOW_DISK_BYTES = 1 << 30         # recording warns when less is free
COPY_BYTES = 4 << 20             # per read and write
ANALYTICS_URL = ""               # no server of our own: REPLICATE_ANALYTICS_URL names one
FEEDBACK_URL = ""                # likewise: REPLICATE_FEEDBACK_URL


# ------------------------------------------------------------------------------------------------------------------
# 1  Errors and the console
# ------------------------------------------------------------------------------------------------------------------

class ReplicateError(Exception):
    """The base class of all errors that Replicate raises; the text is written for the user."""


class DoesNotExist(ReplicateError):
    """No experiment, checkpoint, file or bucket has that name, or several match the prefix."""


class ConfigNotFound(ReplicateError):
    """There is no project here: neither a replicate.yaml nor a repository."""


class ReadError(ReplicateError):
    """Something in the repository or on disk cannot be read."""


class WriteError(ReplicateError):
    """Something cannot be written; any earlier version is intact."""


class RepositoryConfigurationError(ReplicateError):
    """The configuration is invalid or names no usable repository."""


class IncompatibleRepositoryVersion(ReplicateError):
    """The repository is in the format of a newer version of Replicate."""


class CorruptedRepositorySpec(ReplicateError):
    """repository.json is not {"version": N}."""


class UsageError(ReplicateError):
    """The command line is wrong: exit code 2."""


class Console:
    """Prints messages for people to stderr. Data goes to stdout, through say()."""

    COLORS = {"info": "\x1b[2m", "warning": "\x1b[33m", "error": "\x1b[31m", "bold": "\x1b[1m", "faint": "\x1b[2m",
              "heading": "\x1b[1;4m", "added": "\x1b[32m", "removed": "\x1b[31m", "hunk": "\x1b[36m",
              **{"curve %d" % number: "\x1b[%dm" % code for number, code in enumerate((36, 33, 35, 32, 34, 31))}}

    def __init__(self) -> None:
        self.color: Optional[bool] = None  # None: decide by NO_COLOR
        self.verbose = False

    def colored(self, text: str, style: str, stream: TextIO) -> str:
        """text in that style if stream shows colors, or else plain."""
        wanted = self.color if self.color is not None else not os.environ.get("NO_COLOR")
        shown = wanted and is_terminal(stream) and os.environ.get("TERM") != "dumb"
        return "%s%s\x1b[0m" % (self.COLORS[style], text) if shown else text

    def info(self, message: str) -> None:
        """Print a message, which may have several lines."""
        self._say(message, "info")

    def warning(self, message: str) -> None:
        """Print a warning."""
        self._say(message, "warning")

    def error(self, message: str) -> None:
        """Print an error."""
        self._say(message, "error")

    def debug(self, message: str) -> None:
        """Print a message if -v is given."""
        if self.verbose:
            self._say(message, "info")

    def _say(self, message: str, style: str) -> None:
        write_text(sys.stderr, "".join(
            "%s%s\n" % (self.colored("   │ " if number else "═══╡ ", style, sys.stderr), escape_control(line))
            for number, line in enumerate(message.split("\n"))))


def write_text(stream: Optional[TextIO], text: str) -> None:
    """Write text, escaping what the stream's encoding lacks. Raises OSError or ValueError, but never for stderr."""
    if stream is None:
        return
    try:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        if not can_encode(stream, text):  # check first: stderr raises nothing and escapes the frame, too
            plain = text.replace("═══╡", "===|").replace("   │", "   |")
            text = plain.encode(encoding, "backslashreplace").decode(encoding)
        stream.write(text)
        stream.flush()
    except (OSError, ValueError):
        if stream is not sys.stderr:
            raise


def is_terminal(stream: Optional[TextIO]) -> bool:
    """Whether stream is an open terminal."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def can_encode(stream: Optional[TextIO], text: str) -> bool:
    """Whether the stream's encoding has all characters of text."""
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
        return True
    except UnicodeEncodeError:
        return False


def terminal_width(stream: Optional[TextIO]) -> Optional[int]:
    """The width of the terminal in columns, or None if stream is not a terminal."""
    return shutil.get_terminal_size().columns if is_terminal(stream) else None


console = Console()

# C0 and C1 controls, bidirectional and zero-width marks, line separators, tags and lone surrogates.
_CONTROL = ("\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
            "\ud800-\udfff\U000e0000-\U000e0fff")


def escape_control(text: str) -> str:
    """text with every character escaped that could control a terminal or reorder a line (\\n, \\x1b, \\u202e)."""
    if text.isascii() and text.isprintable():
        return text
    return re.sub("[%s]" % _CONTROL, lambda match: match.group().encode("unicode_escape").decode("ascii"), text)


class Progress:
    """A progress line on the terminal that counts bytes; silent in a pipe and for quick work."""

    DELAY = 0.5     # seconds before the line appears
    INTERVAL = 0.1  # seconds between updates

    def __init__(self, label: str, total: int, quiet: bool = False) -> None:
        self.label, self.total, self.done = label, total, 0
        self._next = time.monotonic() + self.DELAY
        self._active = is_terminal(sys.stderr) and not quiet
        self._shown = False

    def add(self, amount: int) -> None:
        """Count amount more bytes."""
        self.done += amount
        if self._active:
            text = "%s: %s" % (self.label, format_size(self.done))
            if self.total:
                text += " of %s (%d %%)" % (format_size(self.total), min(100, 100 * self.done // self.total))
            self.show(text)

    def show(self, text: str) -> None:
        """Show text as the line, cut at the edge of the terminal, unless it was updated less than INTERVAL ago."""
        if self._active and time.monotonic() >= self._next:
            self._next = time.monotonic() + self.INTERVAL
            self._shown = True
            write_text(sys.stderr, "\r\x1b[K" + escape_control(text)[:shutil.get_terminal_size().columns - 1])

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        if self._shown:
            write_text(sys.stderr, "\r\x1b[K")


def confirm(message: str, question: str, otherwise: str) -> None:
    """Show message and ask question; raises ReplicateError unless the answer is yes.

    otherwise: what to do without a terminal to ask on.
    """
    if not is_terminal(sys.stdin):
        raise ReplicateError("%s\nNothing was changed. %s" % (message, otherwise))
    console.warning(message)
    write_text(sys.stderr, question + " (y/N) ")
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):
        write_text(sys.stderr, "\n")
    if answer.strip().lower() not in ("y", "yes"):
        raise ReplicateError("Nothing was changed.")


def program_name() -> str:
    """The command that runs this file, ready to paste: `replicate` if installed, or else `python3 replicate.py`."""
    try:
        program = sys.argv[0] if __name__ == "__main__" else os.path.relpath(__file__)
    except OSError:  # the working directory was removed
        program = __file__
    if os.path.basename(os.path.dirname(os.path.abspath(program))) in ("bin", "Scripts", "site-packages", "dist-packages"):
        return "replicate"
    python = os.path.basename(sys.executable) or "python3"
    if shutil.which(python) != sys.executable:
        python = sys.executable
    if __name__ == "__main__" and __spec__ is not None:
        return "%s -m replicate" % shlex.quote(python)
    return "%s %s" % (shlex.quote(python), shlex.quote(program))


# ------------------------------------------------------------------------------------------------------------------
# 2  Values: JSON, times, short forms
# ------------------------------------------------------------------------------------------------------------------

NON_FINITE = {"[NaN]": float("nan"), "[+Infinity]": float("inf"), "[-Infinity]": float("-inf")}
ABSENT: Any = type("Absent", (), {"__repr__": lambda self: "ABSENT"})()
TIMESTAMP = r"(\d{4}-\d\d-\d\d)[Tt](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?([Zz]|[+-]\d\d:\d\d)"


def plain_value(value: Any, where: str = "value") -> Any:
    """value as str, int, float, bool, None, list or dict.

    Recognizes scalars and arrays of numpy, torch, tensorflow and jax by their methods, without importing the libraries.
    Raises TypeError, which names `where`, for anything that cannot be stored.
    """
    if value is None or type(value) in (str, float, bool):
        return value
    if isinstance(value, int):
        if value.bit_length() > MAX_INT_BITS:
            raise TypeError("%s is a number of %d bits: at most %d can be stored" % (where, value.bit_length(), MAX_INT_BITS))
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if hasattr(value, "tolist") and callable(value.tolist):          # numpy, torch, jax
        plain = value.tolist()
        return float(plain) if type(plain) is type(value) else plain_value(plain, where)  # tolist() keeps a longdouble
    if hasattr(value, "numpy") and callable(value.numpy):            # tensorflow
        return plain_value(value.numpy(), where)
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, (str, int, float, bool)):
                raise TypeError("%s has a key that is not a string: %r" % (where, key))
        return {str(key): plain_value(item, "%s[%r]" % (where, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(item, where) for item in value]
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    if hasattr(value, "as_integer_ratio"):                           # Decimal, Fraction
        return float(value)
    raise TypeError("%s is of type %s, which cannot be stored (str, int, float, bool, None, lists and dicts can)" %
                    (where, type(value).__name__))


def plain_param(value: Any, where: str, unknown: List[str]) -> Any:
    """value as a plain value, whatever its type: a dict-like object becomes a dict, a set a sorted list, a function its
    name. Anything without such a form becomes text, and its place is added to `unknown`.

    Raises RecursionError for an object that contains itself.
    """
    from collections import abc
    try:
        fields = fields_of(value)
        if fields is not None:
            return {key_text(key): plain_param(item, "%s.%s" % (where, key_text(key)), unknown)
                    for key, item in fields.items()}
        if isinstance(value, abc.Set):
            return sorted([plain_param(item, where, unknown) for item in value], key=sort_key)
        if isinstance(value, abc.Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview)):
            return [plain_param(item, where, unknown) for item in value]
        name = name_of(value)
        return plain_value(value, where) if name is None else name
    except RecursionError:
        raise
    except Exception:  # plain_value() refuses it, or its own methods fail
        unknown.append("%s (%s)" % (where, type(value).__name__))
        return text_of(value)


def fields_of(value: Any) -> Optional[Dict[Any, Any]]:
    """The items of a mapping, or the fields of a dataclass instance or namespace (not nested ones); None otherwise."""
    import types
    from collections.abc import Mapping
    kind = type(value)
    if kind is dict:
        return dict(value)  # another thread may change it
    if isinstance(value, Mapping) or (hasattr(kind, "keys") and hasattr(kind, "__getitem__")):
        return {key: value[key] for key in value.keys()}
    if hasattr(kind, "__dataclass_fields__"):
        from dataclasses import fields
        return {field.name: getattr(value, field.name) for field in fields(value) if hasattr(value, field.name)}
    return vars(value) if isinstance(value, (argparse.Namespace, types.SimpleNamespace)) else None


def name_of(value: Any) -> Optional[str]:
    """The name of an Enum member, function, class or module, or the text of a dtype, device or time; None otherwise."""
    import enum
    import types
    if isinstance(value, enum.Enum) and not isinstance(value, (int, float, str)):
        return value.name
    if isinstance(value, types.ModuleType) or (callable(value) and hasattr(value, "__name__")):
        return str(value.__name__)
    kinds = {kind.__name__.lower() for kind in type(value).__mro__}
    return str(value) if kinds & {"dtype", "device", "date", "time", "timedelta"} else None


def key_text(key: Any) -> str:
    """A mapping's key as a param's name."""
    return str.__str__(key) if isinstance(key, str) else name_of(key) or text_of(key)


def text_of(value: Any) -> str:
    """str(value) without memory addresses, cut to 1,000 characters; the type if str() fails."""
    try:
        text = str(value)
    except Exception:
        text = object.__repr__(value)
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", text)
    return text if len(text) <= 1000 else text[:997] + "..."


def pack_floats(value: Any) -> Any:
    """A plain value with NaN and the infinities replaced by their strings in the repository format."""
    if isinstance(value, float):
        if value != value:
            return "[NaN]"
        return value if value - value == 0 else "[+Infinity]" if value > 0 else "[-Infinity]"
    if isinstance(value, dict):
        return {key: pack_floats(item) for key, item in value.items()}
    return [pack_floats(item) for item in value] if isinstance(value, list) else value


def unpack_floats(value: Any) -> Any:
    """The inverse of pack_floats()."""
    kind = type(value)
    if kind is str:
        return NON_FINITE.get(value, value) if value[:1] == "[" else value
    if kind is dict:
        return {key: unpack_floats(item) for key, item in value.items()}
    return [unpack_floats(item) for item in value] if kind is list else value


def json_text(value: Any, indent: Optional[int]) -> str:
    """value as JSON, on one line if indent is None; NaN and the infinities are packed."""
    settings: Dict[str, Any] = {"ensure_ascii": False, "allow_nan": False, "indent": indent,
                                "separators": (",", ":" if indent is None else ": ")}
    try:
        return json.dumps(value, **settings)
    except ValueError:  # NaN or infinity: in a document, 1e999 is read as infinity
        return json.dumps(pack_floats(value), **settings)


def encode_json(value: Any, indent: Optional[int] = 1) -> bytes:
    """value as UTF-8 JSON; a lone surrogate becomes a JSON escape."""
    return json_text(value, indent).encode("utf-8", "backslashreplace")


def decode_json(data: bytes, where: str) -> Any:
    """Parse untrusted JSON. Raises ReadError, which names `where`."""
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ReadError("%s is not valid JSON: %s" % (where, short_reason(error))) from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError("%s is not JSON" % name)


def shown_json(value: Any) -> str:
    """JSON to print, indented by two; characters that could control a terminal are JSON escapes."""
    text = json_text(value, 2)
    if text.isascii() and "\x7f" not in text:  # json.dumps escapes the ASCII controls itself
        return text
    return re.sub("(?!\n)[%s]" % _CONTROL, lambda match: json.dumps(match.group())[1:-1], text)


def short_reason(error: BaseException) -> str:
    """Why it failed, as part of a sentence."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    return (text[:200] + "..." if len(text) > 200 else text) or type(error).__name__


def new_id() -> str:
    """A new ID: 64 hex digits from the system's random source."""
    return os.urandom(32).hex()


def is_id(text: Any) -> bool:
    """Whether text is safe as part of a path or key: 1 to 128 lower-case hex digits."""
    return isinstance(text, str) and 0 < len(text) <= 128 and not text.strip("0123456789abcdef")


def timestamp(seconds: Optional[float] = None) -> str:
    """A time (default: now) in RFC 3339 form, UTC, with microseconds."""
    seconds = time.time() if seconds is None else seconds
    whole = int(seconds)
    return "%04d-%02d-%02dT%02d:%02d:%02d" % time.gmtime(whole)[:6] + ".%06dZ" % ((seconds - whole) * 1e6)


def parse_time(text: str) -> datetime.datetime:
    """An RFC 3339 time as an aware UTC datetime, cut to microseconds. Raises ValueError."""
    if len(text) == 27 and text[26] == "Z" and text[10] == "T" and text[19] == "." and text.isascii():
        return datetime.datetime.fromisoformat(text[:26] + "+00:00")  # our own form, ten times as fast
    match = re.fullmatch(TIMESTAMP, text, re.ASCII)
    if match is None:
        raise ValueError("not an RFC 3339 time: %r" % text)
    day, clock, fraction, zone = match.groups()
    value = datetime.datetime.fromisoformat("%s %s.%s+00:00" % (day, clock, (fraction or "").ljust(6, "0")[:6]))
    if zone in "Zz":
        return value
    offset = datetime.timedelta(hours=int(zone[:3]), minutes=int(zone[0] + zone[4:]))
    try:
        return value - offset
    except OverflowError as error:
        raise ValueError("a time outside the years 1 to 9999: %r" % text) from error


def local_time(moment: datetime.datetime) -> datetime.datetime:
    """moment in the local time zone, or in UTC at the far ends of the calendar."""
    try:
        return moment.astimezone()
    except (OverflowError, ValueError, OSError):
        return moment


def canonical_time(text: str) -> str:
    """A valid time as text that sorts by time: UTC, always with 9 fractional digits."""
    if text[-1] != "Z" or text[10] != "T":
        match = re.fullmatch(TIMESTAMP, text, re.ASCII)
        text = "%04d-%02d-%02dT%02d:%02d:%02d.%sZ" % (*parse_time(text).timetuple()[:6], match and match.group(3) or "")
    return text[:19] + "." + text[20:-1].ljust(9, "0")


# Each unit is used for times shorter than the limit, where its count would round up to one of the next unit.
RELATIVE_UNITS = (  # (limit and unit in seconds, text for one, text for several)
    (59.5, 1, "about a second", "%d seconds"), (59.5 * 60, 60, "about a minute", "%d minutes"),
    (23.5 * 3600, 3600, "about an hour", "%d hours"), (73 * 3600, 86400, "one day", "%d days"))


def relative_time(moment: datetime.datetime, now: datetime.datetime) -> str:
    """'2 minutes ago'; from 73 hours on, the local date."""
    seconds = (now - moment).total_seconds()
    for limit, unit, one, several in RELATIVE_UNITS:
        if abs(seconds) < limit:
            count = int(abs(seconds) / unit + 0.5)
            text = several % count if count > 1 else one
            return text + " ago" if seconds > -0.5 else "in " + text
    return "%04d-%02d-%02d" % local_time(moment).timetuple()[:3]


DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def full_time(moment: datetime.datetime) -> str:
    """'Mon, 02 Jan 2006 22:54:05 +08' in the local time zone; English in every locale."""
    local = local_time(moment)
    return "%s, %02d %s %04d %s %s" % (DAYS[local.weekday()], local.day, MONTHS[local.month - 1], local.year,
                                       local.strftime("%H:%M:%S"), local.tzname())


def format_cell(value: Any) -> str:
    """A param or metric as a table cell: text cut to 20 characters, floats with 5 significant digits."""
    kind = type(value)
    if kind is float:
        if value != value:
            return "NaN"
        if value - value != 0:
            return "+Inf" if value > 0 else "-Inf"
        return "%.20g" % value if 1e5 < value < 1e20 else "%.5g" % value
    if kind is int:
        return str(value)
    text = value if kind is str else value_text(value)
    return escape_control(text if len(text) <= 20 else text[:17] + "...")


def format_value(value: Any) -> str:
    """A param or metric in full, safe to print: strings unquoted, floats as NaN or 2 (for 2.0), the rest as JSON."""
    return escape_control(value_text(value))


def value_text(value: Any) -> str:
    """format_value() without escaping control characters."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value - value != 0:  # NaN or infinite
        return format_cell(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return "%d" % value
    return json_text(value, None)


def format_size(count: float) -> str:
    """A number of bytes as text: '1.5 GB' (powers of 1000)."""
    if count < 1000:
        return plural(int(count), "byte")
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 1000:
            return "%.1f %s" % (count, unit)
    return "%.1f TB" % (count / 1000)


def plural(count: int, noun: str) -> str:
    """'1 file', '2 files'."""
    return "%d %s%s" % (count, noun, "" if count == 1 else "s")


def nearest(name: str, names: Iterable[str]) -> str:
    """' Did you mean X?' with the closest of names, or '' if none is close."""
    import difflib
    close = difflib.get_close_matches(name, list(names), 1)
    return " Did you mean %r?" % close[0] if close else ""


KIND_RANK = {bool: 1, int: 0, float: 0, str: 2, list: 3, dict: 4}


def same_value(left: Any, right: Any) -> bool:
    """Whether two values are equal and of one kind: 1 is 1.0, true is not 1, NaN is NaN."""
    kind = type(left)
    if KIND_RANK.get(kind) != KIND_RANK.get(type(right)):
        return False
    if kind is list:
        return len(left) == len(right) and all(map(same_value, left, right))
    if kind is dict:
        return left.keys() == right.keys() and all(same_value(item, right[key]) for key, item in left.items())
    return left == right or (left != left and right != right)


def sort_key(value: Any) -> Tuple[int, Any]:
    """A sort key for values of mixed kinds: numbers, booleans, strings, then the rest as JSON."""
    rank = KIND_RANK.get(type(value), 5)
    return (rank, value if rank < 3 else json.dumps(pack_floats(value), sort_keys=True))


def flat_params(params: Dict[str, Any]) -> Dict[str, Any]:
    """Nested params by dotted name: {"model": {"depth": 2}} becomes {"model.depth": 2}.

    Lists and empty dicts stay as they are. On a clash, a name that was given with its dots wins.
    """
    nested = {name: value for name, value in params.items() if type(value) is dict and value}
    if not nested:
        return params
    flat = {"%s.%s" % (name, inner): item for name, value in nested.items() for inner, item in flat_params(value).items()}
    flat.update((name, value) for name, value in params.items() if name not in nested)
    return flat


# ------------------------------------------------------------------------------------------------------------------
# 3  Model: Experiment, Checkpoint, their lists
# ------------------------------------------------------------------------------------------------------------------

def _text(key: str, doc: str) -> property:
    """A property that reads a text of the stored document; "", which the peer writes for null, becomes None."""
    return property(lambda self: text_in(self._document, key), doc=doc)


class _Stored:
    """What experiments and checkpoints share."""

    __slots__ = ("_document",)

    _document: Dict[str, Any]
    id = _text("id", "64 hex digits.")

    def __eq__(self, other: Any) -> bool:
        return type(self) is type(other) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def created(self) -> datetime.datetime:
        """When it was made (UTC); for an experiment, when it started."""
        return parse_time(self._document["created"])

    def short_id(self) -> str:
        """The first 7 digits of the ID, as the command line shows it."""
        return self.id[:SHORT_ID]


class Checkpoint(_Stored):
    """A version of an experiment's outputs at one step: files and metrics."""

    __slots__ = ("_experiment",)

    path = _text("path", "The saved file or directory, relative to the project directory; None: no files.")

    def __init__(self, document: Dict[str, Any], experiment: Optional[Experiment] = None) -> None:
        self._document = document
        self._experiment = experiment

    def __repr__(self) -> str:
        return "<Checkpoint %s step=%d>" % (self.short_id(), self.step)

    @property
    def step(self) -> int:
        """How far training had come, in the script's own unit."""
        return self._document.get("step") or 0

    @property
    def metrics(self) -> Dict[str, Any]:
        """Metric values by name."""
        return unpack_floats(self._document.get("metrics") or {})

    @property
    def primary_metric(self) -> Optional[Dict[str, str]]:
        """{"name": ..., "goal": "maximize" or "minimize"}, or None."""
        return self._document.get("primary_metric")

    @property
    def pruned(self) -> Optional[str]:
        """The path that was saved, if its files were pruned (the metrics stay); None otherwise."""
        return None if self.path else text_in(self._document, "pruned")

    def checkout(self, output_directory: str, quiet: bool = False) -> None:
        """Copy the experiment's files into output_directory, and this checkpoint's files over them.

        Existing files are replaced. Raises DoesNotExist if the files are gone, WriteError, ReadError.
        """
        self._attached().project.checkout(self._experiment, self, output_directory, quiet=quiet)

    def open(self, path: str) -> BinaryIO:
        """Open the saved file at path for reading in binary. The path is one that checkpoint() accepts.

        Looks in the checkpoint, then in its experiment. Raises DoesNotExist, ReadError.
        """
        return self._attached().project.open(self._experiment, self, path)

    def _attached(self) -> Experiment:
        if self._experiment is None:
            raise DoesNotExist("Checkpoint %s is not in a repository." % self.short_id())
        return self._experiment

    def to_json(self) -> Dict[str, Any]:
        """The checkpoint as it is stored."""
        return self._document

    def _repr_html_(self) -> str:
        rows = [("ID", self.short_id()), ("Created", full_time(self.created)), ("Path", self.path or ""), ("Step", self.step)]
        return html_table(("Checkpoint", ""), rows + sorted(self.metrics.items()))


class CheckpointList(List[Checkpoint] if TYPE_CHECKING else list):  # type: ignore[misc]
    """A list of checkpoints, oldest first, with the columns `.metrics["loss"]` and `.step`. A slice is one, too."""

    @property
    def step(self) -> List[int]:
        """The step of each checkpoint."""
        return [checkpoint.step for checkpoint in self]

    @property
    def metrics(self) -> CheckpointMetrics:
        """`.metrics["loss"]` is the list of each checkpoint's value of that metric, None where it has none."""
        return CheckpointMetrics(self)

    def primary_metric(self) -> Optional[str]:
        """The name of the primary metric of the first checkpoint that has one, or None."""
        return (primary_of([checkpoint._document for checkpoint in self]) or {}).get("name")

    def latest(self) -> Optional[Checkpoint]:
        """The newest checkpoint by creation time, or None."""
        index = latest_index([checkpoint._document for checkpoint in self])
        return None if index is None else self[index]

    def best(self) -> Optional[Checkpoint]:
        """The checkpoint with the best value of the primary metric (the latest of equals), or None."""
        index = best_index([checkpoint._document for checkpoint in self])
        return None if index is None else self[index]

    def plot(self, metric: Optional[str] = None, logy: bool = False, *, ax: Any = None) -> Any:
        """Plot a metric (by default the primary one) against steps, on ax or the current axes; returns the axes."""
        experiment = self[0]._experiment if self else None
        return plot_metric([(experiment.short_id() if experiment else "", self)], metric, logy, ax)

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return CheckpointList(found) if isinstance(index, slice) else found

    def _repr_html_(self) -> str:
        names = sorted({name for checkpoint in self for name in checkpoint.metrics})
        best = self.best()
        rows = [[checkpoint.short_id() + (" (best)" if checkpoint is best else ""), checkpoint.step,
                 full_time(checkpoint.created)] + [checkpoint.metrics.get(name, "") for name in names]
                for checkpoint in self]
        return html_table(["ID", "Step", "Created"] + names, rows)


def primary_of(items: Sequence[Dict[str, Any]]) -> Optional[Dict[str, str]]:
    """The primary metric of the first of these stored checkpoints that has one, or None."""
    return next((item["primary_metric"] for item in items if item.get("primary_metric")), None)


def latest_index(items: Sequence[Dict[str, Any]]) -> Optional[int]:
    """The index of the newest of these stored checkpoints, the last of equals; None if there are none."""
    times = [canonical_time(item["created"]) for item in items]
    return len(times) - 1 - times[::-1].index(max(times)) if times else None


def best_index(items: Sequence[Dict[str, Any]]) -> Optional[int]:
    """The index of the stored checkpoint with the best usable value of the primary metric, the latest of equals; None if
    none has a usable value.
    """
    primary = primary_of(items)
    if primary is None:
        return None
    values = [usable_value(item, primary["name"]) for item in items]
    usable = [index for index, value in enumerate(values) if value is not None]
    if not usable:
        return None
    best = (max if primary["goal"] == "maximize" else min)(values[index] for index in usable)
    equals = [index for index in usable if values[index] == best]
    return equals[latest_index([items[index] for index in equals]) or 0]


def usable_value(item: Dict[str, Any], metric: str) -> Any:
    """A metric of a stored checkpoint if it is a number other than NaN, or else None."""
    value = (item.get("metrics") or {}).get(metric)
    value = NON_FINITE.get(value) if type(value) is str else value
    return value if _is_number(value) and value == value else None


def prunable(items: Sequence[Dict[str, Any]], keep_best: int, keep_latest: int) -> List[Dict[str, Any]]:
    """An experiment's stored checkpoints whose files may go: all with files except the keep_best best and the keep_latest
    latest. Without usable values of a primary metric, the latest count as the best.
    """
    primary = primary_of(items)
    latest = sorted([item for item in items if item.get("path")][::-1], key=lambda item: canonical_time(item["created"]),
                    reverse=True)
    best = latest
    if primary:
        measured = [item for item in latest if usable_value(item, primary["name"]) is not None]
        best = sorted(measured, key=lambda item: usable_value(item, primary["name"]),
                      reverse=primary["goal"] == "maximize") or latest
    kept = {item["id"] for item in best[:keep_best] + latest[:keep_latest]}
    return [item for item in latest if item["id"] not in kept]


def strip_files(items: Iterable[Dict[str, Any]], ids: Container[str]) -> Set[str]:
    """Mark the stored checkpoints with one of these IDs as pruned; returns the IDs of those that had files."""
    changed = [item for item in items if item["id"] in ids and item.get("path")]
    for item in changed:
        item.update(path=None, pruned=item["path"])
    return {item["id"] for item in changed}


def with_metric(checkpoints: Iterable[Checkpoint], metric: str) -> CheckpointList:
    """The checkpoints that have a metric: its curve joins them, whatever else was recorded in between."""
    return CheckpointList(item for item in checkpoints if metric in (item._document.get("metrics") or ()))


class CheckpointMetrics:
    """A CheckpointList's metrics as columns, by name."""

    def __init__(self, checkpoints: CheckpointList) -> None:
        self._checkpoints = checkpoints

    def __getitem__(self, name: str) -> List[Any]:
        return [checkpoint.metrics.get(name) for checkpoint in self._checkpoints]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({name for checkpoint in self._checkpoints for name in checkpoint.metrics}))


class Experiment(_Stored):
    """One run of a training script: its inputs (code, params, command, ...) and its checkpoints.

    init(), experiments.create(), experiments.get() and experiments.list() return it. `project` is the Project it is in.
    """

    __slots__ = ("project", "checkpoints", "__weakref__")

    host = _text("host", "The name or address of the machine, or None.")
    user = _text("user", "Who ran it, or None.")
    command = _text("command", "The program's arguments, shell-quoted, without secrets.")
    path = _text("path", "The file or directory that init() saved, relative to the project directory; None: no files.")
    python_version = _text("python_version", "Such as '3.11.7'.")
    name = _text("name", "Its name, or None.")
    note = _text("note", "Its note, or None.")
    code = _text("code", "A short digest of the names and contents of what init(path=...) saved: the same for the same code.")

    def __init__(self, document: Dict[str, Any], project: Any = None) -> None:
        self.project = project
        self._document = document
        self.checkpoints = CheckpointList(Checkpoint(item, self) for item in document.get("checkpoints") or ())

    def __repr__(self) -> str:
        return "<Experiment %s %s>" % (self.short_id(), plural(len(self.checkpoints), "checkpoint"))

    def __enter__(self) -> Experiment:
        return self

    def __exit__(self, kind: Any, error: Optional[BaseException], trace: Any) -> None:
        self.project.stop(self, error)

    @property
    def config(self) -> Optional[Dict[str, str]]:
        """{'repository': URL, 'storage': ''}, or None."""
        return self._document.get("config") or None

    @property
    def full_command(self) -> Optional[str]:
        """The command that runs it again in the project directory, `python train.py`; `command` if that is unknown."""
        return text_in(self._document, "full_command") or self.command

    @property
    def params(self) -> Dict[str, Any]:
        """Hyperparameters by name, nested as given."""
        return unpack_floats(self._document.get("params") or {})

    @property
    def flat_params(self) -> Dict[str, Any]:
        """Hyperparameters by dotted name (`model.depth`), as the command line shows them."""
        return flat_params(self.params)

    @property
    def python_packages(self) -> Dict[str, str]:
        """Installed version by package name."""
        return self._document.get("python_packages") or {}

    @property
    def replicate_version(self) -> Optional[str]:
        """The version of Replicate (or keepsake) that recorded it."""
        return self._document.get("replicate_version") or self._document.get("keepsake_version")

    @property
    def tags(self) -> List[str]:
        """Its tags, sorted."""
        return texts_in(self._document, "tags")

    @property
    def outcome(self) -> Optional[Dict[str, str]]:
        """How it ended: {"status", "time", and for a failure "error"}. None while it runs, or if that is unknown.

        status is "completed", "failed" (an uncaught exception or a non-zero sys.exit), "interrupted" (Ctrl-C) or
        "terminated" (SIGTERM, SIGHUP).
        """
        outcome = outcome_of(self._document)
        return outcome if outcome.get("status") in ENDINGS else None

    @property
    def status(self) -> str:
        """As `ls` shows it: "running", the status of its outcome, "lost" (killed) or "stopped" (not known)."""
        return status_of(self._document, self.is_running())

    @property
    def duration(self) -> Optional[datetime.timedelta]:
        """The time from its start to its latest checkpoint; None without checkpoints."""
        latest = self.latest()
        return latest.created - self.created if latest else None

    def latest(self) -> Optional[Checkpoint]:
        """The newest checkpoint, or None."""
        return self.checkpoints.latest()

    def best(self) -> Optional[Checkpoint]:
        """The best checkpoint by the primary metric, or None."""
        return self.checkpoints.best()

    def primary_metric(self) -> Optional[str]:
        """The name of the primary metric of the first checkpoint that has one, or None."""
        return self.checkpoints.primary_metric()

    def is_running(self) -> bool:
        """Whether its last heartbeat is less than 30 seconds old."""
        return self.project.is_running(self)

    def checkpoint(self, path: Optional[str] = None, step: Optional[int] = None, metrics: Optional[Dict[str, Any]] = None,
                   primary_metric: Optional[Tuple[str, str]] = None, quiet: bool = False, **unknown: Any) -> Checkpoint:
        """Record a checkpoint: a snapshot of the file or directory at path, and metrics.

        path is relative to the project directory; step defaults to one more than the last, starting at 0;
        primary_metric is (name, "maximize" or "minimize"). Never raises: it prints what is wrong with the arguments and
        records the rest. Once it has returned, the checkpoint is safe even if the process is killed.
        """
        for name in unknown:
            known = ("path", "step", "metrics", "primary_metric", "quiet")
            console.error("checkpoint() has no argument %r.%s" % (
                name, nearest(name, known) or " A metric goes into metrics={%r: ...}." % name))
        return self.project.record(self, path, step, metrics, primary_metric, quiet)

    def stop(self) -> None:
        """Finish pending work and mark the experiment as stopped."""
        self.project.stop(self)

    def refresh(self) -> None:
        """Read the experiment again from the repository. Raises DoesNotExist if it was removed."""
        self.project.refresh(self)

    def delete(self) -> None:
        """Remove the experiment, its checkpoints and all their files from the repository."""
        self.project.delete(self)

    def checkout(self, output_directory: str, quiet: bool = False) -> None:
        """Copy the experiment's files into output_directory, and its best (or else latest) checkpoint's over them."""
        self.project.checkout(self, self.best() or self.latest(), output_directory, quiet=quiet)

    def plot(self, metric: Optional[str] = None, logy: bool = False, *, ax: Any = None) -> Any:
        """Plot a metric (by default the primary one) against steps, on ax or the current axes; returns the axes."""
        return plot_metric([(self.short_id(), self.checkpoints)], metric, logy, ax)

    def to_json(self) -> Dict[str, Any]:
        """The document as it is stored."""
        return dict(self._document, checkpoints=[checkpoint._document for checkpoint in self.checkpoints])

    def _replace(self, document: Dict[str, Any]) -> None:
        """Take a newer document."""
        self.__init__(document, self.project)  # type: ignore[misc]

    def _repr_html_(self) -> str:
        rows = [("ID", self.id), ("Created", full_time(self.created)), ("Host", self.host or ""),
                ("User", self.user or ""), ("Command", self.full_command or "")]
        return html_table(("Experiment", ""), rows) + html_list([self], show_all=True) + self.checkpoints._repr_html_()


# Nothing validates the keys of a document beyond the published format, and other programs may have written them:
# the next functions return only what has the right type.

def text_in(document: Dict[str, Any], key: str) -> Optional[str]:
    """A text of a document or summary, or None."""
    value = document.get(key)
    return value if type(value) is str and value else None


def texts_in(document: Dict[str, Any], key: str) -> List[str]:
    """A list of texts of a document or summary, [] if it has none."""
    value = document.get(key)
    return [item for item in value if type(item) is str and item] if type(value) is list else []


def git_in(document: Dict[str, Any]) -> Dict[str, Any]:
    """The known ones of {"commit", "branch", "dirty"} of the git checkout that ran, from a document or summary."""
    facts = document.get("git")
    kinds = {"commit": str, "branch": str, "dirty": bool}
    return {key: facts[key] for key, kind in kinds.items() if type(facts.get(key)) is kind} if type(facts) is dict else {}


ENDINGS = ("completed", "failed", "interrupted", "terminated")
OPEN = "open"  # the status of an outcome until the run ends
STATUSES = ("running", "stopped", *ENDINGS, "lost")  # that a filter may name; all but "running" are also "stopped"


def outcome_of(document: Dict[str, Any]) -> Dict[str, str]:
    """How the run of a document or summary ended: {"status", "time", "error"}, or {} if it does not say."""
    outcome: Any = document.get("outcome")
    try:
        parse_time(outcome["time"])
        valid = outcome["status"] in (*ENDINGS, OPEN) and {type(value) for value in outcome.values()} == {str}
    except (TypeError, KeyError, ValueError):
        valid = False
    return outcome if valid else {}


def status_of(document: Dict[str, Any], running: bool) -> str:
    """'running', one of ENDINGS, 'lost' (it died without recording how), or 'stopped' (nothing is recorded)."""
    status = "running" if running else outcome_of(document).get("status", "stopped")
    return "lost" if status == OPEN else status


class ExperimentList(List[Experiment] if TYPE_CHECKING else list):  # type: ignore[misc]
    """A list of experiments, oldest first. A slice is one, too."""

    def plot(self, metric: Optional[str] = None, logy: bool = False, *, ax: Any = None) -> Any:
        """Plot a metric of every experiment against steps, on ax or the current axes; returns the axes."""
        return plot_metric([(experiment.short_id(), experiment.checkpoints) for experiment in self], metric, logy, ax)

    def scatter(self, param: str, metric: Optional[str] = None, logx: bool = False, logy: bool = False, *,
                ax: Any = None) -> Any:
        """Plot a metric of each best (or latest) checkpoint against a param, on ax or the current axes; returns the axes."""
        return plot_scatter(self, param, metric, logx, logy, ax)

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with a row for each experiment and the columns of `ls --csv`: fields, params by dotted name,
        and the metrics of the best (or else latest) checkpoint.

        Raises ReplicateError without pandas.
        """
        try:
            import pandas
        except ImportError as error:
            raise ReplicateError("to_dataframe() needs pandas: install it with 'pip install pandas'. "
                                 "Everything else works without it.") from error
        rows = rows_of(self, running_of(self))
        return pandas.DataFrame({name: [row.created if name == "started" else row.plain(name) for row in rows]
                                 for name in column_names(rows)})

    def delete(self) -> None:
        """Remove all of them from the repository."""
        for experiment in self:
            experiment.delete()

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return ExperimentList(found) if isinstance(index, slice) else found

    def _repr_html_(self) -> str:
        return html_list(self, show_all=False)


def running_of(experiments: Sequence[Experiment]) -> Set[str]:
    """The IDs of all running experiments in the projects of these."""
    projects = {experiment.project for experiment in experiments} - {None}
    return {item_id for project in projects for item_id in project.running()}


def rows_of(experiments: Sequence[Experiment], running: Container[str]) -> List[Row]:
    """The rows of experiments, with all of their checkpoints; running: IDs of running experiments."""
    rows = []
    for experiment in experiments:
        rows.append(Row.of(experiment.to_json()))
        rows[-1].running, rows[-1].checkpoints = experiment.id in running, experiment.checkpoints
    return rows


def html_list(experiments: Sequence[Experiment], show_all: bool) -> str:
    """`ls --wide` as HTML for a notebook, which may be read later: with full times, and sparklines of the primary metrics."""
    rows = rows_of(experiments, running_of(experiments))
    if not rows:
        return html_table(["No experiments"], [])
    primary = sorted({row.summary["primary_metric"] for row in rows} - {None})
    names = [name for name, _ in wide_names(rows, show_all)] + ["~" + name for name in primary]
    columns = [WideColumn(name, rows, None, cut=True) for name in names]
    return html_table([column.title for column in columns], zip(*[column.texts for column in columns]))


def html_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """An HTML table with every cell escaped."""
    from html import escape

    def row(cells: Sequence[Any], tag: str) -> str:
        texts = (cell if isinstance(cell, str) else format_value(cell) for cell in cells)
        return "<tr>%s</tr>" % "".join("<%s>%s</%s>" % (tag, escape(escape_control(text)), tag) for text in texts)

    return "<table>%s%s</table>" % (row(header, "th"), "".join(row(cells, "td") for cells in rows))


def _axes(ax: Any, x: str, y: str, logx: bool, logy: bool) -> Any:
    """ax, or matplotlib's current axes if it is None, with labels and scales. Raises ReplicateError without matplotlib."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ReplicateError("Plots need matplotlib: install it with 'pip install matplotlib'. "
                             "Everything else works without it.") from error
    axes = pyplot.gca() if ax is None else ax
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if logx:
        axes.set_xscale("log")
    if logy:
        axes.set_yscale("log")
    return axes


def _primary_name(lists: Iterable[CheckpointList], metric: Optional[str]) -> str:
    """metric, or the name of the primary metric of the first list that has one. Raises ReplicateError if none has."""
    for name in (metric, *map(CheckpointList.primary_metric, lists)):
        if name:
            return name
    raise ReplicateError("There is no primary metric to plot: pass the name of a metric, as in plot('loss').")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def plot_metric(curves: Sequence[Tuple[str, CheckpointList]], metric: Optional[str], logy: bool, ax: Any) -> Any:
    """Plot one line for each (label, checkpoints): the metric against steps, with gaps where it is not a number."""
    name = _primary_name([checkpoints for _, checkpoints in curves], metric)
    axes = _axes(ax, "step", name, False, logy)
    for label, checkpoints in curves:
        found = with_metric(checkpoints, name)
        values = [value if _is_number(value) else float("nan") for value in found.metrics[name]]
        axes.plot(found.step, values, label=label, marker="." if len(values) < 50 else None)
    if len(axes.get_legend_handles_labels()[1]) > 1:  # counts the lines of earlier calls, too
        axes.legend()
    return axes


def plot_scatter(experiments: ExperimentList, param: str, metric: Optional[str], logx: bool, logy: bool, ax: Any) -> Any:
    """Plot one point for each experiment that has both the param and the metric."""
    name = _primary_name([experiment.checkpoints for experiment in experiments], metric)
    points = []
    for experiment in experiments:
        checkpoint = experiment.best() or experiment.latest()
        value = checkpoint.metrics.get(name) if checkpoint else None
        params = experiment.flat_params
        if param in params and _is_number(value):
            points.append((params[param], value, experiment.short_id()))
    axes = _axes(ax, param, name, logx, logy)
    if not all(_is_number(x) for x, _, _ in points):
        points = [(format_value(x), y, label) for x, y, label in points]
    axes.scatter([x for x, _, _ in points], [y for _, y, _ in points])
    for x, y, label in points:
        axes.annotate(label, (x, y))
    return axes


class Row:
    """An experiment in a listing: its document, but only the best and latest of its checkpoints.

    Filters, sorting, tables and `ls --json` all use it.
    """

    __slots__ = ("summary", "id", "version", "checkpoint_ids", "running", "created", "latest", "best", "params", "metrics",
                 "checkpoints")

    def __init__(self, summary: Dict[str, Any], version: str, checkpoint_ids: str) -> None:
        self.summary = summary                # what summarize() returns
        self.id: str = summary["id"]
        self.version = version                # of the document; "" if the row must not be cached
        self.checkpoint_ids = checkpoint_ids  # the first ROW_ID_DIGITS digits of each, joined with spaces
        self.running = False
        self.created = parse_time(summary["created"])
        self.latest: Optional[Dict[str, Any]] = summary["latest_checkpoint"]  # as stored
        self.best: Optional[Dict[str, Any]] = summary["best_checkpoint"]      # as stored
        self.params = flat_params(unpack_floats(summary.get("params") or {}))  # by dotted name
        self.metrics: Dict[str, Any] = unpack_floats((self.best or self.latest or {}).get("metrics") or {})
        self.checkpoints = CheckpointList()   # all of them if they have been read, or else none

    @classmethod
    def of(cls, document: Dict[str, Any], version: str = "") -> Row:
        """The row of a valid document."""
        ids = [item["id"][:ROW_ID_DIGITS] for item in document.get("checkpoints") or ()]
        return cls(summarize(document), version, " ".join(ids))

    @property
    def status(self) -> str:
        """As status_of() returns it."""
        return status_of(self.summary, self.running)

    def may_have_checkpoint(self, prefix: str) -> bool:
        """Whether a checkpoint's ID may start with prefix, judged by the digits that the row keeps."""
        return " " + prefix[:ROW_ID_DIGITS] in " " + self.checkpoint_ids

    def value(self, name: str) -> Any:
        """The field, label, metric or param that a filter or sort key calls by that name, or ABSENT."""
        if name in FIELDS:
            return FIELDS[name](self)
        if name.startswith("params."):
            return self._param(name[len("params."):])
        if name.startswith("metrics."):
            return self.metrics.get(name[len("metrics."):], ABSENT)
        if self.is_label(name):
            return next(iter(self.alternatives(name)), ABSENT)
        return self.metrics[name] if name in self.metrics else self._param(name)

    def _param(self, name: str) -> Any:
        """A param by its dotted name, or a whole nested param by its top-level name."""
        nested = self.summary.get("params") or {}
        return self.params[name] if name in self.params else unpack_floats(nested.get(name, ABSENT))

    def plain(self, name: str) -> Any:
        """value() in a form for JSON: a time as stored, the list of all tags or GPUs, for ~loss the list of its values; None
        if it is absent.
        """
        if name in TIME_FIELDS:
            return self.summary["created"]
        if name[:1] == "~":
            values = with_metric(self.checkpoints, name[1:]).metrics[name[1:]]
            return [value if _is_number(value) else None for value in values]
        if name in LIST_LABELS and self.is_label(name):
            return LABELS[name](self.summary)
        value = self.value(name)
        return None if value is ABSENT else value

    def is_label(self, name: str) -> bool:
        """Whether name is one of the LABELS and no param or metric of this experiment."""
        return name in LABELS and name not in self.metrics and name not in self.params

    def alternatives(self, name: str) -> List[Any]:
        """The values that a filter may match, such as all tags; an experiment that has ended is also "stopped"."""
        if name == "id":
            return [self.id, self.id[:SHORT_ID]]
        if name == "status":
            return [self.status] if self.status in ("running", "stopped") else [self.status, "stopped"]
        if self.is_label(name):
            return [value for value in LABELS[name](self.summary) if value not in (None, "")]
        value = self.value(name)
        return [] if value is ABSENT or value is None else [value]

    def to_json(self) -> Dict[str, Any]:
        """The experiment in `ls --json`."""
        labels = {key: self.summary[key] for key in LABEL_KEYS if key in self.summary}
        return dict({key: self.summary.get(key) for key in SHOWN_KEYS}, params=self.summary.get("params") or {}, **labels,
                    status=self.status, running=self.running)


NOT_LISTED = ("checkpoints", "config", "python_version", "python_packages", "imported_packages", "replicate_version",
              "keepsake_version")  # keys of a document that a row leaves out
ROW_ID_DIGITS = 12  # digits of each checkpoint's ID that a row keeps
SHOWN_KEYS = ("id", "created", "params", "command", "num_checkpoints", "latest_checkpoint", "best_checkpoint", "user",
              "host")  # keys that every experiment in `ls --json` has
LABEL_KEYS = ("name", "tags", "note", "code", "git", "gpus", "job", "outcome")  # further ones, if the document has them


def summarize(document: Dict[str, Any]) -> Dict[str, Any]:
    """A valid document without the keys in NOT_LISTED, plus its best and latest checkpoint."""
    items = document.get("checkpoints") or ()
    latest, best, primary = latest_index(items), best_index(items), primary_of(items)
    summary = {key: value for key, value in document.items() if key not in NOT_LISTED}
    summary.update(num_checkpoints=len(items), primary_metric=primary["name"] if primary else None,
                   latest_checkpoint=None if latest is None else items[latest],
                   best_checkpoint=None if best is None else items[best])
    return summary


def checked_summary(summary: Any, experiment_id: str) -> Dict[str, Any]:
    """summary, if summarize() can have returned it for the experiment with that ID. Raises ReadError otherwise."""
    _check_fields([summary], dict(_EXPERIMENT_FIELDS, **_SUMMARY_FIELDS))
    _check_depth(summary)
    if not summary.keys() >= _SUMMARY_FIELDS.keys() or summary["num_checkpoints"] is None:
        raise ReadError("a field is missing")
    if summary["id"] != experiment_id:
        raise ReadError("its id is that of another experiment")
    _check_checkpoints([summary[key] for key in ("latest_checkpoint", "best_checkpoint") if summary[key] is not None])
    return summary


# Every document is untrusted until it has passed these checks.

_EXPERIMENT_FIELDS = {"params": dict, "config": dict, "python_packages": dict, "checkpoints": list, "host": str, "user": str,
                      "command": str, "path": str, "python_version": str, "replicate_version": str, "keepsake_version": str}
_CHECKPOINT_FIELDS = {"metrics": dict, "step": int, "path": str, "primary_metric": dict}
_SUMMARY_FIELDS = {"num_checkpoints": int, "latest_checkpoint": dict, "best_checkpoint": dict, "primary_metric": str}


def checked_experiment(document: Any, experiment_id: str) -> Dict[str, Any]:
    """document, if it is a valid experiment document with that ID. Raises ReadError otherwise."""
    _check_fields([document], _EXPERIMENT_FIELDS)
    _check_depth(document)
    if document["id"] != experiment_id:
        raise ReadError("its id is not the name of its file")
    if not set(map(type, (document.get("python_packages") or {}).values())) <= {str}:
        raise ReadError("python_packages holds something that is not text")
    items = document.get("checkpoints") or ()
    _check_checkpoints(items)
    if len({item["id"] for item in items}) != len(items):
        raise ReadError("two of its checkpoints have the same ID")
    return document


def checked_checkpoint(item: Any) -> Dict[str, Any]:
    """item, if it is a valid checkpoint. Raises ReadError otherwise."""
    _check_checkpoints([item])
    _check_depth(item)
    return item


def _check_checkpoints(items: Sequence[Any]) -> None:
    _check_fields(items, _CHECKPOINT_FIELDS)
    for primary in [item["primary_metric"] for item in items if item.get("primary_metric") is not None]:
        if type(primary.get("name")) is not str or primary.get("goal") not in ("maximize", "minimize"):
            raise ReadError("primary_metric is not {name, goal}")


def _check_fields(documents: Sequence[Any], fields: Dict[str, Any]) -> None:
    """Raise ReadError unless each document has a valid id and creation time, and the fields are of these types or null."""
    if not {type(document) for document in documents} <= {dict}:
        raise ReadError("it is not a JSON object")
    if not all([is_id(document.get("id")) for document in documents]):
        raise ReadError("id is not made of hex digits")
    try:
        for document in documents:
            parse_time(document["created"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReadError("created is not an RFC 3339 time") from error
    for key, kind in fields.items():
        wrong = {type(document.get(key)) for document in documents} - {kind, type(None)}
        if wrong:
            raise ReadError("%s has the wrong type (%s)" % (key, wrong.pop().__name__))


def _check_depth(value: Any) -> None:
    """Raise ReadError if containers are nested more deeply than recursive code can follow."""
    level, containers = [value], {dict, list}
    for _ in range(MAX_NESTING):
        level = [item for container in level
                 for item in (container.values() if type(container) is dict else container)
                 if type(item) in containers]
        if not level:
            return
    raise ReadError("it is nested too deeply")


# ------------------------------------------------------------------------------------------------------------------
# 4  Filters and sorting
# ------------------------------------------------------------------------------------------------------------------

FIELDS: Dict[str, Callable[[Row], Any]] = {
    "started": lambda row: row.created,
    "created": lambda row: row.created,
    "step": lambda row: (row.latest or {}).get("step") or 0,
    "user": lambda row: row.summary.get("user"),
    "host": lambda row: row.summary.get("host"),
    "command": lambda row: row.summary.get("command"),
    "status": lambda row: row.status,
    "id": lambda row: row.id,
    "duration": lambda row: row.latest and (parse_time(row.latest["created"]) - row.created).total_seconds(),
    "checkpoints": lambda row: row.summary["num_checkpoints"],
}
LABELS: Dict[str, Callable[[Dict[str, Any]], List[Any]]] = {
    "name": lambda summary: [text_in(summary, "name")],
    "tag": lambda summary: texts_in(summary, "tags"),
    "note": lambda summary: [text_in(summary, "note")],
    "code": lambda summary: [text_in(summary, "code")],
    "commit": lambda summary: [git_in(summary).get("commit"), git_in(summary).get("commit", "")[:SHORT_ID]],
    "branch": lambda summary: [git_in(summary).get("branch")],
    "dirty": lambda summary: [git_in(summary).get("dirty")],
    "gpu": lambda summary: texts_in(summary, "gpus"),
    "job": lambda summary: [text_in(summary, "job")],
}
"""Fields of which an experiment may have none or several values. A param or metric of the same name takes precedence."""
LIST_LABELS = ("tag", "gpu")
CSV_FIELDS = ("id", "name", "started", "status", "duration", "checkpoints", "step", "tag", "note", "host", "user", "command",
              "code", "commit")
TEXT_FIELDS = ("user", "host", "command", "status", "id")
TIME_FIELDS = ("started", "created")
ORDER = {"<": lambda a, b: a < b, "<=": lambda a, b: a <= b, ">": lambda a, b: a > b, ">=": lambda a, b: a >= b}


def known_names(rows: Iterable[Row]) -> Set[str]:
    """Every name that a filter or sort key may use for these experiments."""
    names = set(FIELDS) | set(LABELS)
    for row in rows:
        metrics = {name for item in (row.latest, row.best) if item for name in item.get("metrics") or ()}
        params = [*row.params, *(row.summary.get("params") or ())]  # by dotted name, and nested ones as a whole
        names.update(params, metrics, map("params.".__add__, params), map("metrics.".__add__, metrics))
    return names


def column_groups(rows: Sequence[Row]) -> Tuple[List[str], Dict[str, str], Dict[str, str]]:
    """The fields, the column of each param by its name, and that of each metric: `params.x` if x means something else."""
    params = {name for row in rows for name in row.params}
    metrics = {name for row in rows for name in row.metrics}
    return ([name for name in CSV_FIELDS if name in FIELDS or name not in params | metrics],
            {name: "params." + name if name in FIELDS or name in metrics else name for name in sorted(params)},
            {name: "metrics." + name if name in FIELDS or name in params else name for name in sorted(metrics)})


def column_names(rows: Sequence[Row]) -> List[str]:
    """The columns of `ls --csv`: fields, every param and every metric."""
    fields, params, metrics = column_groups(rows)
    return [*fields, *params.values(), *metrics.values()]


class Comparison:
    """<name> <operator> <value>"""

    def __init__(self, name: str, operator: str, value: Any, text: str) -> None:
        self.name, self.operator, self.value = name, operator, value
        self.text = text  # the value as typed: a code 1234567 is not a number

    def __call__(self, row: Row) -> bool:
        """Whether an experiment satisfies the comparison."""
        found = row.alternatives(self.name)
        if not found:
            return self.operator in ("=", "==") and self.value is None
        if self.name in TIME_FIELDS:
            return self._matches_time(found[0])
        value = self.value
        if value is not None and self.operator != "~" and type(found[0]) is str and row.is_label(self.name):
            value = [str(item) for item in value] if self.operator == "in" else self.text
        return (all if self.operator == "!=" else any)([self._matches_one(actual, value) for actual in found])

    def _matches_one(self, actual: Any, value: Any) -> bool:
        if self.operator == "~":
            return isinstance(actual, str) and value.search(actual) is not None
        if self.operator == "in":
            return any(same_value(actual, item) for item in value)
        if self.operator in ORDER:  # only numbers, booleans and strings have one, each among themselves
            kind = KIND_RANK.get(type(actual), 5)
            return kind <= 2 and kind == KIND_RANK.get(type(value)) and ORDER[self.operator](actual, value)
        return same_value(actual, value) == (self.operator != "!=")

    def _matches_time(self, actual: datetime.datetime) -> bool:
        if self.value is None:
            return self.operator == "!="
        start, end = self.value
        inside = start <= actual < end
        return {"=": inside, "==": inside, "!=": not inside, "<": actual < start, "<=": actual < end,
                ">": actual >= end, ">=": actual >= start}[self.operator]


FILTER_HELP = """Filters have the format "<name> <operator> <value>", where <operator> is one of
  =  !=  <  <=  >  >=    equal, not equal, less, greater
  ~                      contains a match of the regular expression
  in [a, b]              is one of these values
Join several with and, or, not and parentheses."""


class Filter:
    """A filter, read from its text by recursive descent: each production of the grammar is the docstring of a method, which
    returns a function that tells whether an experiment matches.
    """

    MAX_DEPTH = 50
    OPERATORS = ("=", "==", "!=", "<", "<=", ">", ">=", "~", "in")
    NOT = r"not(?![\w\-./:])(?!\s*[=!<>~])"
    HEAD = (r"""\s*(?:"([^"]*)"|'([^']*)'|([\w\-./:]+(?:[ \t]+(?!(?:and|or)\s)[\w\-./:]+)*?))"""
            r"""\s*(?:([=!<>~]+)|(?<=\s)(in)\s*(?=\[))""")

    def __init__(self, text: str) -> None:
        """filter := either END. Raises ReplicateError, which names the position and shows the format."""
        self.text = text
        self.position = 0
        self.depth = 0
        self.names: List[str] = []  # that it uses
        if not text.strip():
            self.fail("it is empty")
        self.matches = self.either()
        self.take(r"\s*")
        if self.position < len(text):
            self.fail("unexpected %r" % text[self.position])

    def either(self) -> Callable[[Row], bool]:
        """either := both ("or" both)*"""
        return self.joined("or", any, self.both)

    def both(self) -> Callable[[Row], bool]:
        """both := term ("and" term)*"""
        return self.joined("and", all, self.term)

    def joined(self, word: str, decide: Callable[[Iterable[bool]], bool],
               operand: Callable[[], Callable[[Row], bool]]) -> Callable[[Row], bool]:
        """operand (word operand)*"""
        operands = [operand()]
        while self.take(r"\s*%s\b" % word):
            operands.append(operand())
        if len(operands) == 1:
            return operands[0]
        return lambda row: decide(matches(row) for matches in operands)

    def term(self) -> Callable[[Row], bool]:
        """term := "not" term | "(" either ")" | comparison"""
        self.depth += 1
        if self.depth > self.MAX_DEPTH:
            self.fail("it is nested too deeply")
        self.take(r"\s*")
        if self.take(r"\("):
            matches = self.either()
            self.take(r"\s*")
            if not self.take(r"\)"):
                self.fail("a closing parenthesis is missing")
        elif self.take(self.NOT):
            operand = self.term()
            matches = lambda row: not operand(row)  # noqa: E731
        else:
            matches = self.comparison()
        self.depth -= 1
        return matches

    def comparison(self) -> Comparison:
        """comparison := name operator value"""
        head = self.match(self.HEAD)
        if head is None:
            self.fail("expected a name and an operator")
        name = next(part for part in head.groups()[:3] if part is not None)
        operator = head.group(4) or head.group(5)
        if not name:
            self.fail("the name is missing")
        if operator not in self.OPERATORS:
            self.position = head.start(4)
            self.fail("%r is not an operator" % operator)
        self.position = head.end()
        self.names.append(name)
        text, quoted = self.value_text()
        try:
            return Comparison(name, operator, self.convert(name, operator, text, quoted), text)
        except ValueError as error:
            self.position = head.end()
            self.take(r"\s*")
            self.fail(str(error))

    def value_text(self) -> Tuple[str, bool]:
        """value := quoted | all text up to an `and` or `or` before a whole term, a closing parenthesis or the end"""
        self.take(r"\s*")
        start = self.position
        quote = self.match("[\"']")
        if quote:
            if not self.take("{0}[^{0}]*{0}".format(quote.group())):
                self.fail("the closing quote is missing")
            text = self.text[start + 1:self.position - 1]
            self.take(r"\s*")
            if not (self.match(r"\)|\Z") or self.at_joint()):
                self.fail("there is text after the closing quote")
            return text, True
        nesting = 0
        while self.position < len(self.text):
            character = self.text[self.position]
            if character == "(":
                nesting += 1
            elif character == ")":
                if not nesting and self.depth > 1:
                    break
                nesting -= 1
            elif character.isspace() and self.at_joint():
                break
            self.position += 1
        text = self.text[start:self.position].strip()
        if not text:
            self.fail("the value is missing")
        joint = re.search(r"(?:&&|\|\|)(?=%s)" % self.HEAD, text)
        if joint:
            self.position = start + joint.start()
            self.fail("write '%s' instead of '%s', or put the value in quotes" % (
                "and" if joint.group() == "&&" else "or", joint.group()))
        return text, False

    def at_joint(self) -> bool:
        """Whether `and` or `or` comes next, followed by the start of a whole term with a value."""
        joint = self.match(r"\s*(?:and|or)(?![\w\-./:])(?:\s*(?:\(|%s))*" % self.NOT)
        head = joint and re.compile(self.HEAD).match(self.text, joint.end())
        return bool(head and self.text[head.end():].strip())

    def convert(self, name: str, operator: str, text: str, quoted: bool) -> Any:
        """The value of a comparison: null, number, boolean, JSON, time or text. Raises ValueError."""
        if operator in ("~", "in") and name in TIME_FIELDS:
            raise ValueError("%s cannot be used with '%s'" % (name, operator))
        if operator == "~":
            try:
                return re.compile(text)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError("the regular expression is invalid: %s" % error) from error
        if operator == "in":
            items = read_list(text)
            items = [str(item) for item in items] if name in TEXT_FIELDS else items
            return check_statuses(items) if name == "status" else items
        if not quoted and text in ("null", "None"):
            return None
        if name in TIME_FIELDS:
            return read_date(text)
        if name == "status" and operator in ("=", "==", "!="):
            check_statuses([text])
        value = text if quoted or name in TEXT_FIELDS else read_value(text)
        if name == "duration" and type(value) not in (int, float):
            raise ValueError("%r is not a number of seconds" % text)
        return value

    def match(self, pattern: str) -> Optional[re.Match]:
        """The match of pattern at the current position, or None."""
        return re.compile(pattern).match(self.text, self.position)

    def take(self, pattern: str) -> bool:
        """Skip the match of pattern at the current position; returns whether there is one."""
        match = self.match(pattern)
        if match:
            self.position = match.end()
        return match is not None

    def fail(self, reason: str) -> NoReturn:
        """Raise the error for the current position."""
        raise ReplicateError("Filter %s cannot be read at character %d: %s.\n\n%s" % (
            json.dumps(self.text, ensure_ascii=False), self.position + 1, reason, FILTER_HELP))


def check_statuses(texts: List[str]) -> List[str]:
    """The same texts. Raises ValueError if one is a status that no experiment can have."""
    for text in texts:
        if text not in STATUSES:
            raise ValueError("there is no status %r.%s Choose from %s" % (
                text, nearest(text.lower(), STATUSES), ", ".join(STATUSES)))
    return texts


def read_value(text: str) -> Any:
    """A value as a person types it: null, number, true or false, JSON array or object; or else the text itself."""
    lowered = text.lower()
    if lowered in ("null", "none"):
        return None
    if lowered in ("true", "false"):
        return lowered == "true"
    if text[0] in "[{":
        try:
            return unpack_floats(json.loads(text))
        except (ValueError, RecursionError):
            return text
    for kind in (int, float):
        try:
            return kind(text) if "_" not in text else text
        except ValueError:
            pass
    return text


def read_list(text: str) -> List[Any]:
    """`[a, "b", 3]`: JSON, or plain words between commas. Raises ValueError."""
    value = read_value(text)
    if isinstance(value, list):
        return value
    if not text.endswith("]"):
        raise ValueError("write a list as [a, b]")
    items = [item.strip() for item in text[1:-1].split(",")]
    if not all(items):
        raise ValueError("the list has an empty item")
    return [item[1:-1] if item[0] in "\"'" and item[-1] == item[0] and len(item) > 1 else read_value(item) for item in items]


TIME_UNITS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 7 * 86400}
DATE_FORM = r"(?P<year>\d{4})(?P<separator>[-/])(?P<month>\d{1,2})(?:(?P=separator)(?P<day>\d{1,2}))?"
SHOWN_DATE_FORM = r"(?:[A-Z][a-z]{2}, )?(?P<day>\d{1,2}) (?P<month>%s) (?P<year>\d{4})" % "|".join(MONTHS)
CLOCK_FORM = (r"(?:[ T]\s*(?P<hour>\d{1,2}):(?P<minute>\d\d)(?::(?P<second>\d\d))?(?:\.(?P<fraction>\d+))?"
              r"\s*(?P<zone>Z|UTC|GMT|[+-]\d\d(?::?\d\d)?|[A-Z]{3,5})?)?")


def read_date(text: str) -> Tuple[datetime.datetime, datetime.datetime]:
    """A time as a person types it, as the span [start, end) in UTC. Raises ValueError.

    2026-01-31, 2026/01/31, 2026-01 or 31 Jan 2026, optionally followed by a time (local unless a zone is given);
    '2 hours ago'; the form that `show` prints. A month means all of it, a date the whole day, a time without seconds the
    whole minute.
    """
    try:
        return _parse_span(text)
    except (ValueError, OverflowError, OSError) as error:
        raise ValueError("%r is not a date: %s" % (text, error)) from error


def _parse_span(text: str) -> Tuple[datetime.datetime, datetime.datetime]:
    ago = re.fullmatch(r"(?i)(\d{1,9}|an?|one)\s+(second|minute|hour|day|week)s?\s+ago", text)
    if ago:
        count = int(ago.group(1)) if ago.group(1).isdigit() else 1
        distance = datetime.timedelta(seconds=count * TIME_UNITS[ago.group(2).lower()])
        start = datetime.datetime.now(datetime.timezone.utc) - distance
        return start, start + datetime.timedelta(seconds=1)
    match = re.fullmatch(DATE_FORM + CLOCK_FORM, text) or re.fullmatch(SHOWN_DATE_FORM + CLOCK_FORM, text)
    if match is None:
        raise ValueError("write 2026-01-31, 2026-01-31 23:59 or '2 hours ago'")
    found = match.groupdict()
    year, day = int(found["year"]), found["day"]
    month = MONTHS.index(found["month"]) + 1 if found["month"] in MONTHS else int(found["month"])
    if not day:
        if found["hour"]:
            raise ValueError("it has a time but no day")
        following = datetime.datetime(year + month // 12, month % 12 + 1, 1)
        return _in_utc(datetime.datetime(year, month, 1), None), following.astimezone(datetime.timezone.utc)
    hour, minute, second = [int(found[part] or 0) for part in ("hour", "minute", "second")]
    fraction = datetime.timedelta(microseconds=int((found["fraction"] or "0").ljust(6, "0")[:6]))
    start = _in_utc(datetime.datetime(year, month, int(day), hour, minute, second), found["zone"]) + fraction
    seconds = 1e-6 if found["fraction"] else 1 if found["second"] else 60 if found["hour"] else 86400
    return start, start + datetime.timedelta(seconds=seconds)


def _in_utc(naive: datetime.datetime, zone: Optional[str]) -> datetime.datetime:
    """A time in a zone (Z, an offset, or the local zone's name as `show` prints it; default: local) in UTC."""
    if zone in ("Z", "UTC", "GMT"):
        return naive.replace(tzinfo=datetime.timezone.utc)
    offset = re.fullmatch(r"([+-]\d\d):?(\d\d)?", zone or "")
    if offset:
        minutes = int(offset.group(1)) * 60 + int(offset.group(1)[0] + (offset.group(2) or "0"))
        return naive.replace(tzinfo=datetime.timezone.utc) - datetime.timedelta(minutes=minutes)
    local = naive.astimezone()
    for moment in (local, naive.replace(fold=1).astimezone()):
        if zone in (None, moment.tzname()):
            return moment.astimezone(datetime.timezone.utc)
    raise ValueError("unknown time zone %s; write an offset such as +02:00" % zone)


def parse_sort(key: str) -> Tuple[str, bool]:
    """(name, descending) of a sort key such as `loss` or `started-desc`."""
    match = re.fullmatch(r"\s*(.*?)\s*(-desc|-asc)?", key, re.DOTALL)
    if match is None or not match.group(1):
        raise ReplicateError("The sort key is empty. Name a field, param or metric, for instance --sort=started-desc.")
    return match.group(1), match.group(2) == "-desc"


def sort_rows(rows: List[Row], name: str, descending: bool) -> List[Row]:
    """rows (which come oldest first), sorted by that value; rows without it, or with NaN, come last in both orders."""
    present: List[Tuple[Row, Any]] = []
    missing: List[Tuple[Row, Any]] = []
    for row in rows:
        value = row.value(name)
        usable = value is not ABSENT and value is not None and value == value
        (present if usable else missing).append((row, value))
    if name not in TIME_FIELDS:
        present.sort(key=lambda pair: sort_key(pair[1]), reverse=descending)
    elif descending:
        present.reverse()
    return [row for row, _ in present + missing]


# ------------------------------------------------------------------------------------------------------------------
# 5  Configuration, threads, storage
# ------------------------------------------------------------------------------------------------------------------

class Location:
    """Where a project and its repository are."""

    def __init__(self, directory: str, url: Optional[str]) -> None:
        self.directory = directory  # absolute path of the project directory
        self.url = url              # repository URL, with an absolute path if file://; None: no repository yet


def find_location(repository: Optional[str] = None, directory: Optional[str] = None) -> Location:
    """The project directory and repository, from the arguments, environment, configuration or default.

    Raises RepositoryConfigurationError, or ConfigNotFound if the directory does not exist.
    """
    directory = directory or os.environ.get("REPLICATE_PROJECT_DIRECTORY") or None
    if directory is not None and not os.path.isdir(directory):
        raise ConfigNotFound("There is no directory %s." % directory)
    start = os.path.abspath(directory or working_directory())
    found = _search_upward(start, CONFIG_NAMES + (DEFAULT_STORAGE,), 1 if directory else CONFIG_SEARCH_DEPTH)
    is_default = found is not None and found.endswith(os.sep + DEFAULT_STORAGE)
    project = os.path.dirname(found) if found else start
    if is_default:
        project = os.path.dirname(project)
    typed = repository or os.environ.get("REPLICATE_REPOSITORY")
    if typed:
        return Location(project, absolute_url(typed, working_directory()))
    if found is None:
        return Location(project, None)
    return Location(project, "file://" + found if is_default else absolute_url(read_config(found), project))


try:
    START_DIRECTORY = os.getcwd()  # a script may change it later, as Hydra does
except OSError:  # it was removed
    START_DIRECTORY = os.sep


def working_directory() -> str:
    """The working directory (absolute), or where this process started if Hydra has moved it into its output.

    Raises ConfigNotFound if it was removed.
    """
    try:
        place = os.getcwd()
        return START_DIRECTORY if "hydra" in sys.modules and os.path.isdir(os.path.join(place, ".hydra")) else place
    except OSError as error:
        raise ConfigNotFound("The working directory was removed, or cannot be read: %s." % short_reason(error)) from error


def _search_upward(directory: str, names: Sequence[str], depth: int) -> Optional[str]:
    """The path of the first of names that exists in directory, or else in the nearest directory above it, or None."""
    for _ in range(depth):
        for name in names:
            path = os.path.join(directory, name)
            if os.path.exists(path):
                return path
        parent = os.path.dirname(directory)
        if parent == directory:
            return None
        directory = parent
    return None


def read_config(path: str) -> str:
    """The repository URL in a replicate.yaml. Raises RepositoryConfigurationError."""
    try:
        with open_regular(path, follow=True) as file:
            data = read_up_to(file, (1 << 20) + 1)
        if len(data) > 1 << 20:
            raise RepositoryConfigurationError("%s is larger than 1 MB: that is not a configuration." % path)
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RepositoryConfigurationError("%s cannot be read: %s." % (path, short_reason(error))) from error
    values = read_flat_yaml(text)
    if values is None:
        values = _read_yaml(text, path)
    if not values or not isinstance(values, dict):
        raise RepositoryConfigurationError("%s %s. It needs a line such as 'repository: s3://my-bucket'." % (
            path, "has no 'key: value' lines" if values else "is empty"))
    unknown = [str(key) for key in values if key not in ("repository", "storage")]
    if unknown:
        raise RepositoryConfigurationError("%s has the unknown key %r. The valid keys are 'repository' and its old "
                                           "name 'storage'." % (path, unknown[0]))
    if len(values) == 2:
        raise RepositoryConfigurationError("%s has both 'repository' and its old name 'storage'. Remove 'storage'." % path)
    key, url = next(iter(values.items()))
    if not isinstance(url, str) or not url:
        raise RepositoryConfigurationError("%s: '%s' must be a URL such as 's3://my-bucket'." % (path, key))
    if key == "storage":
        console.warning("%s: 'storage' is deprecated: call it 'repository'." % path)
    return url


def read_flat_yaml(text: str) -> Optional[Dict[str, str]]:
    """The values of YAML with only `key: text` lines, quotes and comments; None for richer YAML, which needs PyYAML."""
    values = {}
    for line in text.replace("\r\n", "\n").split("\n"):
        if re.fullmatch(r"[ ]*(#.*)?", line) and line.replace("\t", " ").isprintable():
            continue
        match = re.fullmatch(r"""([a-z_]+):[ ]+(?:"([^"\\]*)"|'([^']*)'|((?:[a-z0-9]+:/|[a-z.~]*)/"""
                             r"""[^\s"'#,\[\]{}&*!|>%@`]*[^\s"'#,\[\]{}&*!|>%@`:]))[ ]*(?:[ ]#.*)?""", line)
        if match is None or match.group(1) in values or not line.isprintable():
            return None
        values[match.group(1)] = next(part for part in match.groups()[1:] if part is not None)
    return values


def _read_yaml(text: str, path: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise RepositoryConfigurationError(
            "Without PyYAML, %s can only be a line such as 'repository: file://runs' or 'repository: s3://my-bucket'. "
            "For anything else, install it with 'pip install PyYAML'." % path) from error
    try:
        return yaml.safe_load(text)
    except Exception as error:  # PyYAML lets exceptions of many kinds escape, even KeyError
        raise RepositoryConfigurationError("%s is not valid YAML: %s." % (path, short_reason(error))) from error


def absolute_url(url: str, directory: str) -> str:
    """url, with a file:// path made absolute from directory. Raises RepositoryConfigurationError if it is invalid."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in BACKENDS:
        raise RepositoryConfigurationError("%r is not a repository URL: it must start with file://, s3:// or gs://." % url)
    if not rest or (scheme != "file" and rest.startswith("/")):
        raise RepositoryConfigurationError("%r names no %s." % (url, "directory" if scheme == "file" else "bucket"))
    if "\0" in rest:
        raise RepositoryConfigurationError("%r contains a null character." % url)
    if scheme == "file":
        return "file://" + os.path.abspath(os.path.join(directory, os.path.expanduser(rest)))
    return scheme + "://" + rest.strip("/")


def open_storage(url: str) -> Storage:
    """The storage at an absolute URL."""
    scheme, _, rest = url.partition("://")
    return BACKENDS[scheme](rest)


def in_threads(function: Callable[[Any], Any], items: Iterable[Any], count: int = 0) -> Iterator[Any]:
    """Yield function(item) for each item, in order, computed by `count` threads (default: one per core, at most 8).

    At most two items per thread are in flight. No thread is left working when the iteration ends, except after Ctrl-C,
    which does not wait. If no thread can start (the interpreter is shutting down), the caller does the work.
    """
    from collections import deque
    from concurrent.futures import Future
    from queue import SimpleQueue
    tasks: Any = SimpleQueue()
    ending = False

    def work() -> None:
        for item, future in iter(tasks.get, None):
            try:
                future.set_result(None if ending else function(item))
            except BaseException as error:
                future.set_exception(error)

    started = 0
    for _ in range(count or min(os.cpu_count() or 1, 8)):
        try:
            threading.Thread(target=work, name="replicate-pool", daemon=True).start()
        except RuntimeError:
            break
        started += 1
    if not started:
        yield from map(function, items)
        return
    waiting: Any = deque()
    try:
        for item in items:
            waiting.append(Future())
            tasks.put((item, waiting[-1]))
            if len(waiting) >= 2 * started:
                yield waiting[0].result()
                waiting.popleft()
        while waiting:
            yield waiting[0].result()
            waiting.popleft()
    except KeyboardInterrupt:
        waiting.clear()
        raise
    finally:
        ending = True
        for _ in range(started):
            tasks.put(None)
        for future in waiting:
            future.exception()  # waits until it is done


class Entry:
    """One stored object in a listing."""

    __slots__ = ("key", "name", "size", "modified", "version")

    def __init__(self, key: str, size: int, modified: float, version: str) -> None:
        self.key = key            # relative to the repository's root, with forward slashes
        self.name = key[key.rfind("/") + 1:]
        self.size = size          # bytes
        self.modified = modified  # seconds since the epoch, by the storage's clock
        self.version = version    # changes whenever the content does


class Storage:
    """The operations of every backend; everything else is plain functions that use these.

    Keys are relative to the repository's root. Every object appears whole or not at all. Methods raise DoesNotExist
    for a missing key, ReadError or WriteError for other failures, each with one sentence for the user.
    """

    scheme = ""
    has_journals = False  # journals and locks are kept beside the documents, instead of an index
    clock_skew = 0.0      # seconds by which the storage's clock is ahead of ours

    deadline: Optional[float] = None
    """Set it when the process has to end, for example to time.monotonic() + 10. From then on no request is retried or
    waits more than 3 seconds for the server, and requests in the last 3 seconds fail at once with Unreachable. A request
    that another thread has started may take longer: do not wait for it beyond the deadline."""

    def prepare(self) -> None:
        """Create the directory or bucket if it is missing, and check that we may write. Recording starts with it."""
        raise NotImplementedError

    def list(self, folder: str) -> Iterator[Entry]:
        """Yield the objects directly in folder ('metadata/experiments/'), in any order."""
        raise NotImplementedError

    def stat(self, key: str) -> Entry:
        """The entry of one object."""
        raise NotImplementedError

    def open(self, key: str, entry: Optional[Entry] = None) -> BinaryIO:
        """Open an object as a binary stream; on a server only the entry's version, if given."""
        raise NotImplementedError

    def pin(self, key: str) -> Tuple[Entry, Callable[[int, int], BinaryIO]]:
        """The entry of an object, and a function that opens the bytes [start, end) of exactly this version."""
        raise NotImplementedError

    def write(self, key: str, data: bytes) -> None:
        """Store data under key."""
        raise NotImplementedError

    def upload(self, key: str, path: str, progress: Callable[[int], None] = lambda count: None) -> None:
        """Store a copy of a local file under key; calls progress with the number of bytes after each step."""
        raise NotImplementedError

    def update(self, key: str, change: Callable[[Optional[bytes]], Optional[bytes]]) -> None:
        """Replace an object by change(its bytes, or None if it is missing) without losing changes of other processes.

        change may be called several times; it returns None to leave the object alone.
        """
        raise NotImplementedError

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects by exact key; missing ones are not an error."""
        raise NotImplementedError

    def remove(self, key: str) -> None:
        """Remove one object that other processes may be updating; update() then finds it missing."""
        self.delete([key])

    def read(self, key: str, entry: Optional[Entry] = None) -> bytes:
        """The bytes of an object; of the entry's version, if given and still there."""
        with self.open(key, entry) as stream:
            return stream.read()

    def in_parallel(self, function: Callable[[Any], Any], items: Iterable[Any], large: bool = False) -> Iterator[Any]:
        """Yield function(item) for each item, in order; on a server, several at a time."""
        return map(function, items)


class DiskStorage(Storage):
    """A directory. New files are written to its tmp/ and then renamed into place.

    Files and folders inherit the permissions for group and others from their folder, and so from the root, whatever the
    umask: a group can share a repository, and nobody else can read one in a private folder.
    """

    scheme = "file"
    has_journals = True
    updating = threading.RLock()  # held during an update on a disk without locks

    def __init__(self, root: str) -> None:
        self.root = root

    def path(self, key: str) -> str:
        """The file of a key."""
        return "%s%s%s" % (self.root, os.sep, key if os.sep == "/" else key.replace("/", os.sep))

    def prepare(self) -> None:
        if not hasattr(os, "pwrite"):
            raise WriteError("Recording needs Linux or macOS. On Windows, record in WSL: the commands work in both.")
        try:
            os.makedirs(self.root, exist_ok=True)
            with self._new_lock("probe"):
                pass
        except OSError as error:
            raise WriteError("The repository %s cannot be written: %s." % (self.root, short_reason(error))) from error

    def list(self, folder: str) -> Iterator[Entry]:
        try:
            with os.scandir(self.path(folder)) as entries:
                for entry in entries:
                    try:
                        status = entry.stat()
                    except OSError:  # just deleted, or a broken link
                        continue
                    if not stat.S_ISDIR(status.st_mode):
                        yield disk_entry(folder + entry.name, status)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise ReadError("%s cannot be listed: %s." % (self.path(folder), short_reason(error))) from error

    def stat(self, key: str) -> Entry:
        try:
            return disk_entry(key, os.stat(self.path(key)))
        except OSError as error:
            raise self._read_failure(key, error) from error

    def open(self, key: str, entry: Optional[Entry] = None) -> RegularFile:
        try:
            return open_regular(self.path(key), follow=True)
        except OSError as error:
            raise self._read_failure(key, error) from error

    def pin(self, key: str) -> Tuple[Entry, Callable[[int, int], BinaryIO]]:
        file = self.open(key)
        return (disk_entry(key, os.fstat(file.fileno())),
                lambda start, end: FileRange(file, start, end))  # type: ignore[return-value]

    def read(self, key: str, entry: Optional[Entry] = None) -> bytes:
        try:
            return super().read(key)
        except OSError as error:
            raise self._read_failure(key, error) from error

    def create(self, key: str, write: Callable[[BinaryIO], Any]) -> Any:
        """Store under key what write(file) writes, and return what it returns. Raises WriteError.

        The temporary file stays locked until it is in place, so that remove_leftovers() can tell that it is in use.
        """
        lock = self._new_lock(key.rpartition("/")[2])
        try:
            lock.acquire()
            with os.fdopen(lock.descriptor, "wb", 0, closefd=False) as file:
                result = write(file)
            os.close(os.dup(lock.descriptor))  # NFS reports a full disk only here
            if not lock.is_held:  # Windows, which has no such locks, moves only closed files
                lock.release(remove=False)
            self._move_in(lock.path, key)
            return result
        except OSError as error:
            raise self.write_failure(key, error) from error
        finally:
            lock.release()

    def _move_in(self, path: str, key: str) -> None:
        try:
            os.replace(path, self.path(key))
        except FileNotFoundError:
            folders = key.split("/")[:-1]
            for depth in range(len(folders)):
                make_folder(self.path("/".join(folders[:depth + 1])))
            os.replace(path, self.path(key))

    def write(self, key: str, data: bytes) -> None:
        self.create(key, lambda file: write_all(file, data))

    def upload(self, key: str, path: str, progress: Callable[[int], None] = lambda count: None) -> None:
        def copy(target: BinaryIO) -> None:
            with open(path, "rb", 0) as source:
                for data in iter(lambda: source.read(COPY_BYTES), b""):
                    write_all(target, data)
                    progress(len(data))

        self.create(key, copy)

    def update(self, key: str, change: Callable[[Optional[bytes]], Optional[bytes]]) -> None:
        try:
            with self._lock(key) as lock, self._one_thread(lock):
                try:
                    old: Optional[bytes] = self.read(key)
                except DoesNotExist:
                    old = None
                new = change(old)
                if new is not None:
                    self.write(key, new)
        except OSError as error:
            raise self.write_failure(key, error) from error

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            try:
                os.unlink(self.path(key))
            except (FileNotFoundError, NotADirectoryError):
                pass
            except OSError as error:
                raise WriteError("%s cannot be removed: %s." % (self.path(key), short_reason(error))) from error

    def remove(self, key: str) -> None:
        try:
            with self._lock(key) as lock, self._one_thread(lock):
                self.delete([key])
        except OSError as error:
            raise WriteError("%s cannot be removed: %s." % (self.path(key), short_reason(error))) from error

    def leftovers(self, folder: str) -> Iterator[Tuple[Entry, FileLock]]:
        """Yield the files that killed processes left in tmp/ or journals/, each locked until the next one is asked for.

        Our files count if nobody has them locked; any file in tmp/ counts if it is older than a day and not locked.
        """
        for entry in sorted(self.list(folder), key=lambda entry: entry.name):
            old = entry.modified < time.time() - LEFTOVER_SECONDS
            if entry.name.endswith((".part", ".lock", ".jsonl")) or old and folder == "tmp/":
                lock = FileLock(self.path(entry.key), create=False)
                try:
                    if lock.acquire(wait=False) and (old or lock.is_held):
                        yield entry, lock
                except OSError:  # it is gone, or we may not open it
                    continue
                finally:
                    lock.release(remove=False)

    def sync(self, keys: Iterable[str]) -> None:
        """Flush these objects to the physical disk; skips those that are gone."""
        for key in keys:
            for path in (self.path(key), os.path.dirname(self.path(key))):
                try:
                    descriptor = os.open(path, os.O_RDONLY)
                    try:
                        os.fsync(descriptor)
                    finally:
                        os.close(descriptor)
                except OSError:
                    continue

    def write_failure(self, key: str, error: OSError) -> WriteError:
        """The error for a failed write of key."""
        return WriteError("%s could not be written: %s." % (self.path(key), short_reason(error)))

    def _read_failure(self, key: str, error: OSError) -> ReplicateError:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return DoesNotExist("%s does not exist." % self.path(key))
        return ReadError("%s cannot be read: %s." % (self.path(key), short_reason(error)))

    def _lock(self, key: str) -> FileLock:
        """The lock that a process must hold to replace or remove the object."""
        return FileLock(self.path("tmp/%s.lock" % key.rpartition("/")[2]))

    def _one_thread(self, lock: FileLock) -> Any:
        """A context for one thread of this process at a time, unless the lock keeps them apart."""
        return threading.Lock() if lock.is_held else DiskStorage.updating

    def _new_lock(self, name: str) -> FileLock:
        """The lock of a new temporary file."""
        return FileLock(self.path("tmp/%s.%s.part" % (name, os.urandom(6).hex())), os.O_EXCL)


def disk_entry(key: str, status: os.stat_result) -> Entry:
    """The entry of a file."""
    version = "%d-%d-%d" % (status.st_size, status.st_mtime_ns, status.st_ino)
    return Entry(key, status.st_size, status.st_mtime_ns / 1e9, version)


NONBLOCK = getattr(os, "O_NONBLOCK", 0)  # not on Windows
NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)  # not on Windows
BINARY = getattr(os, "O_BINARY", 0)      # only on Windows


class FileRange:
    """The bytes [start, end) of an open file, which stays open."""

    def __init__(self, file: RegularFile, start: int, end: int) -> None:
        self._file, self._position, self._end = file, start, end

    def read(self, size: int = -1) -> bytes:
        """Up to size bytes (-1: all), b"" at the end."""
        left = self._end - self._position
        with self._file.reading:
            self._file.seek(self._position)
            data = self._file.read(left if size < 0 else min(size, left))
        self._position += len(data)
        return data

    def __enter__(self) -> FileRange:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        """Nothing to close: other ranges may use the file."""


class Unreadable(OSError):
    """A file cannot be opened or is not a regular one; the text is the reason."""


def open_regular(path: str, follow: bool = False) -> RegularFile:
    """Open a regular file for reading; never waits, even if path is a FIFO. Raises Unreadable."""
    flags = os.O_RDONLY | NONBLOCK | BINARY | (0 if follow else NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise Unreadable(error.errno, error.strerror) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Unreadable(0, "it is not a regular file")
    return RegularFile(descriptor)


class RegularFile(io.FileIO):
    """A file open for reading, which threads may share.

    It closes without a ResourceWarning when it is dropped: an archive stays open as long as it is used.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "rb")
        self.reading = threading.Lock()  # held from a seek() to its read()

    def __del__(self) -> None:
        self.close()


class FileLock:
    """An exclusive lock between processes, on a file; it ends when its holder dies. release() removes the file.

    The file inherits the permissions for group and others from its folder, so that whoever may write there can lock it.
    """

    def __init__(self, path: str, flags: int = 0, create: bool = True) -> None:
        self.path = path
        self.descriptor = -1
        self.is_held = False  # stays False after acquire() if the file system has no locks
        self._flags = os.O_RDWR | BINARY | flags | (os.O_CREAT if create else NONBLOCK)

    def acquire(self, wait: bool = True) -> bool:
        """Take the lock; False if another process holds it and wait is False. Raises OSError."""
        while True:
            descriptor = self._open()
            try:
                locked = lock_descriptor(descriptor, wait)
                if locked is False:
                    return False
                status = os.fstat(descriptor)
                if os.path.samestat(os.stat(self.path), status):
                    self.descriptor, self.is_held = descriptor, bool(locked)
                    share(descriptor, status, os.path.dirname(self.path))
                    return True
            except FileNotFoundError:  # the holder removed the file while we waited
                continue
            finally:
                if self.descriptor != descriptor:
                    os.close(descriptor)

    def _open(self) -> int:
        try:
            return os.open(self.path, self._flags, 0o666)
        except FileNotFoundError:
            if not self._flags & os.O_CREAT:
                raise
            make_folder(os.path.dirname(self.path))
            return os.open(self.path, self._flags, 0o666)

    def release(self, remove: bool = True) -> None:
        """Release the lock, and remove its file unless remove is False."""
        if self.descriptor >= 0:
            if remove and self.is_held:  # first: another process may lock it afterwards
                remove_file(self.path)
            os.close(self.descriptor)
            if remove and not self.is_held:  # Windows removes only closed files
                remove_file(self.path)
            self.descriptor, self.is_held = -1, False

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.release()


def lock_descriptor(descriptor: int, wait: bool) -> Optional[bool]:
    """Lock an open file until it is closed: True; False if another process holds the lock, None if there are no locks."""
    try:
        import fcntl
    except ImportError:  # on Windows, where nothing is recorded
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
        return None
    return True


def make_folder(path: str) -> None:
    """Make a folder that inherits permissions and group from its parent, whatever the umask."""
    parent = os.path.dirname(path)
    os.makedirs(parent, exist_ok=True)
    mode = 0o700 | os.stat(parent).st_mode & 0o2077
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        return
    _change_mode(path, mode)


def make_private_folder(path: str) -> None:
    """Make a folder that only its owner may enter. Ignores failure: using the folder fails then."""
    try:
        os.makedirs(path, 0o700, exist_ok=True)
    except OSError:
        pass


def share(descriptor: int, status: os.stat_result, folder: str) -> None:
    """Give a file of ours its folder's permissions for group and others, whatever the umask."""
    mode = 0o600 | os.stat(folder).st_mode & 0o066
    if status.st_mode & 0o777 != mode and status.st_uid == os.geteuid():
        _change_mode(descriptor, mode)


def _change_mode(file: Union[int, str], mode: int) -> None:
    try:
        os.chmod(file, mode)
    except OSError:  # a file system without permissions
        pass


def write_all(file: BinaryIO, data: Union[bytes, memoryview]) -> None:
    """Write all of data to an unbuffered file."""
    view = memoryview(data)
    while view:
        view = view[file.write(view):]


def remove_file(path: str) -> None:
    """Remove a file if it is there and can be removed."""
    try:
        os.unlink(path)
    except OSError:
        pass


class Unreachable(ReplicateError):
    """The server did not answer, or reports a problem that may pass: worth another try."""


class NoBucket(DoesNotExist):
    """The bucket does not exist."""


class Changed(ReplicateError):
    """An object has another version than expected."""


BEYOND = 1 << 62  # the end of any object
NO_BUCKET = "There is no bucket for %s. Check the name: recording creates a missing bucket, reading does not."


class CloudStorage(Storage):
    """What S3 and Google Cloud Storage share: reads that resume, merging updates, parallel requests.

    A backend makes the requests, which its SDK retries, and translates the SDK's errors.
    """

    ATTEMPTS = 5           # per request, with growing pauses: about 8 seconds in all
    FIRST_PAUSE = 0.5      # seconds; the SDK for S3 has its own, similar pauses
    LONGEST_PAUSE = 8.0
    TIMEOUT = 20.0         # seconds without a byte before a request fails
    LAST_TIMEOUT = 3.0     # the same once there is a deadline
    PARALLEL = 16          # requests at a time
    RANGE_BYTES = BEYOND   # that one request reads at most
    LARGE_UPLOADS = 2      # files at a time; a part of each is in memory
    package = ""           # the SDK's, to install
    _failures = 0          # requests without an answer
    _has_told = False      # tell_of_retry() has

    def __init__(self, rest: str) -> None:
        self.bucket, _, root = rest.partition("/")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}", self.bucket):
            raise RepositoryConfigurationError("%r is not a bucket name." % self.bucket)
        self.root = root.strip("/") + "/" if root.strip("/") else ""
        self.url = "%s://%s" % (self.scheme, rest)
        try:
            self.start_sdk()
        except ImportError as error:
            raise RepositoryConfigurationError(
                "%s:// repositories need %s: install it with 'pip install %s'. Repositories on disk (file://) work "
                "without it." % (self.scheme, self.package, self.package)) from error
        except Exception as error:
            file = getattr(error, "filename", None)  # with credentials that cannot be read
            raise RepositoryConfigurationError("%s cannot be used: %s%s." % (
                self.url, "%s: " % file if file else "", short_reason(error).rstrip("."))) from error

    # -- what a backend provides

    def start_sdk(self) -> None:
        """Import the SDK and make a client. Raises ImportError, or the SDK's errors if it lacks settings."""
        raise NotImplementedError

    def translate(self, error: Exception, key: str) -> ReplicateError:
        """The error to raise for one of the SDK's."""
        raise NotImplementedError

    def list_page(self, prefix: str, token: Any) -> Tuple[List[Entry], Any]:
        """(up to 1,000 entries below prefix, token of the next page or None)."""
        raise NotImplementedError

    def read_part(self, key: str, start: int, end: int, version: Optional[str]) -> Tuple[BinaryIO, str, int]:
        """(stream of the bytes [start, end), version, size of the object, or BEYOND if it is not known).

        With a version, raises Changed for any other; without, the size is known.
        """
        raise NotImplementedError

    def put(self, key: str, data: bytes, version: Optional[str]) -> None:
        """Store an object. With a version, only if that is still the current one ('': no object); raises Changed if not."""
        raise NotImplementedError

    def find_bucket(self) -> Any:
        """Ask for the bucket: raises if it does not exist or belongs to somebody else."""
        raise NotImplementedError

    def create_bucket(self) -> None:
        """Create the bucket."""
        raise NotImplementedError

    # -- what the backends share

    def call(self, request: Callable[[], Any], key: str) -> Any:
        """The result of a request, with the SDK's errors translated."""
        try:
            self.check_deadline()
            return request()
        except ReplicateError:
            raise
        except Exception as error:
            raise self.translate(error, key) from error

    def check_deadline(self, *args: Any, **kwargs: Any) -> None:
        """Raise Unreachable if a request that starts now may outlast the deadline."""
        if self.deadline is not None and time.monotonic() > self.deadline - self.LAST_TIMEOUT:
            raise Unreachable("%s cannot take more before the program ends." % self.url)

    def tell_of_retry(self, error: Exception) -> None:
        """Tell the user once why a command takes long, not of a single broken connection. Recorders tell by themselves."""
        self._failures += 1
        if not self._has_told and (self._failures > 1 or "Timeout" in type(error).__name__) and (
                threading.current_thread() is threading.main_thread()):
            self._has_told = True
            console.info("%s does not answer: trying again" % self.url)

    def in_parallel(self, function: Callable[[Any], Any], items: Iterable[Any], large: bool = False) -> Iterator[Any]:
        """Yield function(item) for each item, in order, several at a time; fewer if each takes much memory (large)."""
        return in_threads(function, items, self.LARGE_UPLOADS if large else self.PARALLEL)

    def prepare(self) -> None:
        try:
            self.call(self.find_bucket, "")
        except NoBucket:
            try:
                self.call(self.create_bucket, "")
            except ReplicateError as error:
                try:  # another machine may have made it, or a request of ours whose answer was lost
                    self.call(self.find_bucket, "")
                except NoBucket:
                    raise error from None
            console.warning("Created the bucket %s, which did not exist. If the name is misspelled, delete it." % self.bucket)
        probe = "tmp/probe.%s" % os.urandom(6).hex()
        self.write(probe, b"")
        self.delete([probe])

    def list(self, folder: str) -> Iterator[Entry]:
        token: Any = None
        while True:
            entries, token = self.call(lambda: self.list_page(self.root + folder, token), "")  # noqa: B023
            yield from (entry for entry in entries if "/" not in entry.key[len(folder):])
            if not token:
                return

    def open(self, key: str, entry: Optional[Entry] = None) -> BinaryIO:
        return ResumingStream(self, key, 0, BEYOND, entry)  # type: ignore[return-value]

    def pin(self, key: str) -> Tuple[Entry, Callable[[int, int], BinaryIO]]:
        entry = self.stat(key)
        return entry, lambda start, end: ResumingStream(self, key, start, end, entry)  # type: ignore[return-value]

    def read(self, key: str, entry: Optional[Entry] = None) -> bytes:
        try:
            return super().read(key, entry)
        except Changed:  # since the caller listed it
            return super().read(key)

    def write(self, key: str, data: bytes) -> None:
        self.call(lambda: self.put(key, data, None), key)

    def update(self, key: str, change: Callable[[Optional[bytes]], Optional[bytes]]) -> None:
        for _ in range(100):
            try:
                stream = ResumingStream(self, key)
                old: Optional[bytes] = stream.read()
                version = stream.version
            except NoBucket:
                raise
            except DoesNotExist:
                old, version = None, ""
            except Changed:  # while we read it
                continue
            new = change(old)
            if new is None:
                return
            try:
                self.call(lambda: self.put(key, new, version), key)  # noqa: B023
                return
            except Changed:  # by another machine, or by our own request whose answer was lost
                continue
        raise WriteError("%s in %s could not be updated: other processes keep changing it." % (key, self.url))


class ResumingStream:
    """The bytes [start, end) of one version of an object; if the connection breaks, it reconnects and goes on."""

    def __init__(self, storage: CloudStorage, key: str, start: int = 0, end: int = BEYOND,
                 entry: Optional[Entry] = None) -> None:
        self._storage, self._key = storage, key
        self._position, self._end = start, min(end, entry.size) if entry else end
        self._stream: Any = None  # of the bytes up to _stream_end
        self._stream_end = start
        self.version = entry.version if entry else None
        if start < self._end:
            storage.call(self._connect, key)

    def _connect(self) -> None:
        self._stream_end = min(self._end, self._position + self._storage.RANGE_BYTES)
        self._stream, self.version, size = self._storage.read_part(self._key, self._position, self._stream_end, self.version)
        self._end = min(self._end, size)

    def _read_once(self, size: int) -> bytes:
        if self._stream is None or self._position == self._stream_end:
            self._connect()
        data = self._stream.read(min(size, self._stream_end - self._position))
        if not data:
            raise Unreachable("%s closed the connection too early." % self._storage.url)
        return data

    def read(self, size: int = -1) -> bytes:
        """Up to size bytes (-1: all), b"" at the end. Raises ReadError, Changed."""
        if size < 0:
            return b"".join(iter(lambda: self.read(1 << 20), b""))
        size = min(size, self._end - self._position)
        if size <= 0:
            return b""
        for attempts_left in reversed(range(self._storage.ATTEMPTS)):
            try:
                data = self._storage.call(lambda: self._read_once(size), self._key)
                self._position += len(data)
                return data
            except Unreachable:
                self._stream = None
                if not attempts_left or self._storage.deadline is not None:
                    raise
        return b""

    def __enter__(self) -> ResumingStream:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._stream = None  # closes the connection


class S3Storage(CloudStorage):
    """A bucket of Amazon S3, or of another server with its protocol, set up by boto3's usual settings."""

    scheme = "s3"
    package = "boto3"
    MISSING = ("404", "NoSuchKey", "NotFound")
    STALE = ("412", "PreconditionFailed", "ConditionalRequestConflict", "409")
    PASSING = ("SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "Throttling", "ThrottlingException",
               "TooManyRequests", "OperationAborted", "NoSuchUpload")

    def start_sdk(self) -> None:
        import boto3
        import botocore.exceptions
        import botocore.session
        self._errors = botocore.exceptions
        self._clients: Dict[bool, Any] = {}
        self._creating = threading.Lock()
        core = botocore.session.get_session()
        for name in ("request_checksum_calculation", "response_checksum_validation"):  # some servers refuse the default
            core.set_config_variable(name, "when_required")
        self._session = boto3.session.Session(botocore_session=core)
        self._client  # so that bad settings are reported at once

    def __copy__(self) -> S3Storage:
        """The same bucket with its own deadline, and so with its own clients, which check it."""
        twin: S3Storage = object.__new__(S3Storage)
        twin.__dict__.update(self.__dict__, _clients={})
        return twin

    @property
    def _client(self) -> Any:
        """A client of the SDK; one with short timeouts once there is a deadline, since a client's timeouts are fixed."""
        hurried = self.deadline is not None
        with self._creating:
            if hurried not in self._clients:
                self._clients[hurried] = self._new_client(hurried)
            return self._clients[hurried]

    def _new_client(self, hurried: bool) -> Any:
        from botocore.config import Config
        timeout = self.LAST_TIMEOUT if hurried else self.TIMEOUT
        config = Config(connect_timeout=min(5.0, timeout), read_timeout=timeout, max_pool_connections=2 * self.PARALLEL,
                        retries={"total_max_attempts": 1 if hurried else self.ATTEMPTS, "mode": "legacy"})
        client = self._session.client("s3", config=config)
        client.meta.events.register("after-call.s3", self._note_clock)
        client.meta.events.register("before-send.s3", self.check_deadline)
        client.meta.events.register_first("needs-retry.s3", self._before_retry)
        return client

    def _note_clock(self, parsed: Dict[str, Any], **kwargs: Any) -> None:
        self.clock_skew = http_date_skew(parsed.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date"))

    def _before_retry(self, caught_exception: Optional[Exception] = None, **kwargs: Any) -> None:
        """Raise the error of a request that the SDK is about to retry if another try is useless; else tell of the retry."""
        if caught_exception is not None:
            if self.deadline is not None or isinstance(caught_exception, self._errors.SSLError):
                raise caught_exception
            self.tell_of_retry(caught_exception)

    def translate(self, error: Exception, key: str) -> ReplicateError:
        name = "%s in %s" % (key, self.url) if key else self.url
        reason = re.sub(r'(endpoint URL: "\w+://[^/"]+)/[^"]*', r"\1", short_reason(error)).rstrip(".")
        if isinstance(error, self._errors.ClientError):
            answer = error.response.get("Error", {})
            code = str(answer.get("Code", ""))
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            reason = "%s (%s)" % (str(answer.get("Message") or "no reason given").rstrip("."), code)
            if code in self.PASSING or status >= 500 and code != "NotImplemented" or status == 429:
                return Unreachable("%s cannot be reached: %s." % (self.url, reason))
            if code == "NoSuchBucket" or (status == 404 and not key):
                return NoBucket(NO_BUCKET % self.url)
            if code in self.STALE or status == 412:
                return Changed("Another process changed %s." % name)
            if code in self.MISSING:
                return DoesNotExist("%s does not exist." % name)
            return ReadError("The server refused a request for %s: %s." % (name, reason))
        if isinstance(error, (self._errors.NoCredentialsError, self._errors.PartialCredentialsError,
                              self._errors.CredentialRetrievalError, self._errors.ParamValidationError,
                              self._errors.NoRegionError, self._errors.SSLError)):
            return ReadError("%s cannot be used: %s." % (self.url, reason))
        if isinstance(error, (self._errors.BotoCoreError, OSError)) or type(error).__module__.startswith("urllib3"):
            return Unreachable("%s cannot be reached: %s." % (self.url, reason))
        return ReadError("%s: %s." % (name, reason))

    def list_page(self, prefix: str, token: Any) -> Tuple[List[Entry], Any]:
        extra = {"ContinuationToken": token} if token else {}
        page = self._client.list_objects_v2(Bucket=self.bucket, Prefix=prefix, MaxKeys=1000, **extra)
        entries = [Entry(item["Key"][len(self.root):], item["Size"], item["LastModified"].timestamp(),
                         item["ETag"].strip('"')) for item in page.get("Contents", ())]
        return entries, page.get("NextContinuationToken") if page.get("IsTruncated") else None

    def stat(self, key: str) -> Entry:
        head = self.call(lambda: self._client.head_object(Bucket=self.bucket, Key=self.root + key), key)
        return Entry(key, head["ContentLength"], head["LastModified"].timestamp(), head["ETag"].strip('"'))

    def read_part(self, key: str, start: int, end: int, version: Optional[str]) -> Tuple[BinaryIO, str, int]:
        from urllib3.exceptions import ProtocolError
        extra = {"IfMatch": '"%s"' % version} if version else {}
        if start or end < BEYOND:
            extra["Range"] = "bytes=%d-%s" % (start, end - 1 if end < BEYOND else "")
        target = {"Bucket": self.bucket, "Key": self.root + key}
        try:
            answer = self._client.get_object(**target, **extra)
        except ProtocolError:  # the SDK does not retry when the text of an error is cut off
            answer = self._client.get_object(**target, **extra)
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.get("ContentRange") or "")
        if extra.get("Range") and (found is None or int(found.group(1)) != start):
            raise ReadError("%s did not return the requested part of %s." % (self.url, key))
        size = int(found.group(2)) if found else answer["ContentLength"]
        return answer["Body"], answer["ETag"].strip('"'), size

    def put(self, key: str, data: bytes, version: Optional[str]) -> None:
        condition = {} if version is None else {"IfMatch": '"%s"' % version} if version else {"IfNoneMatch": "*"}
        target = {"Bucket": self.bucket, "Key": self.root + key}
        try:
            self._client.put_object(Body=data, **target, **condition)
        except (self._errors.ParamValidationError, self._errors.ClientError) as error:
            code = getattr(error, "response", {}).get("Error", {}).get("Code", "NotImplemented")
            if not condition or code != "NotImplemented":
                raise
            self._client.put_object(Body=data, **target)  # an older boto3, or a server without conditions

    def upload(self, key: str, path: str, progress: Callable[[int], None] = lambda count: None) -> None:
        """Upload in this thread: the SDK's own threads refuse to work while the interpreter shuts down, and block it."""
        from boto3.s3.transfer import TransferConfig
        try:
            with open(path, "rb") as file:
                self.call(lambda: self._client.upload_fileobj(file, self.bucket, self.root + key, Callback=progress,
                                                              Config=TransferConfig(use_threads=False)), key)
        except Unreachable as error:  # perhaps the upload is complete, and only the answer was lost
            if "NoSuchUpload" not in str(error) or self.stat(key).size != os.path.getsize(path):
                raise

    def delete(self, keys: Iterable[str]) -> None:
        names = [{"Key": self.root + key} for key in keys]
        for start in range(0, len(names), 1000):
            batch = {"Objects": names[start:start + 1000], "Quiet": True}
            answer = self.call(lambda: self._client.delete_objects(Bucket=self.bucket, Delete=batch), "")  # noqa: B023
            for error in answer.get("Errors", ()):
                if error.get("Code") not in self.MISSING:
                    raise WriteError("%s in %s cannot be removed: %s." % (
                        str(error.get("Key", ""))[len(self.root):], self.url, error.get("Message")))

    def find_bucket(self) -> Any:
        self._client.head_bucket(Bucket=self.bucket)

    def create_bucket(self) -> None:
        region = self._client.meta.region_name
        extra = {} if region in (None, "us-east-1", "aws-global") else {
            "CreateBucketConfiguration": {"LocationConstraint": region}}
        self._client.create_bucket(Bucket=self.bucket, **extra)


class GCSStorage(CloudStorage):
    """A bucket of Google Cloud Storage, with application default credentials, or of STORAGE_EMULATOR_HOST."""

    scheme = "gs"
    package = "google-cloud-storage"
    PARALLEL = 10          # the size of the SDK's connection pool
    RANGE_BYTES = 8 << 20  # an answer is held in memory
    PART_BYTES = 8 << 20   # of an upload in parts

    def start_sdk(self) -> None:
        import google.api_core.exceptions
        import google.auth.exceptions
        from google.cloud import storage
        from google.cloud.storage.retry import DEFAULT_RETRY
        os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")  # saves a request
        self._errors, self._auth_errors = google.api_core.exceptions, google.auth.exceptions
        self._retry = DEFAULT_RETRY.with_delay(self.FIRST_PAUSE, self.LONGEST_PAUSE, 2.0)
        self._client = storage.Client(os.environ.get("GOOGLE_CLOUD_PROJECT"))  # None: only creating a bucket needs one
        self._client._http.hooks["response"].append(self._note_clock)
        self._bucket = self._client.bucket(self.bucket)

    def _note_clock(self, response: Any, *args: Any, **kwargs: Any) -> None:
        self.clock_skew = http_date_skew(response.headers.get("date"))

    def _limits(self, attempts: Optional[int] = None) -> Dict[str, Any]:
        """Arguments for the SDK: how long it waits for an answer, and how often it tries (default: ATTEMPTS times)."""
        if self.deadline is not None:
            return {"timeout": self.LAST_TIMEOUT, "retry": None}
        tries = iter(range((attempts or self.ATTEMPTS) - 1))

        def worthwhile(error: Exception) -> bool:
            again = (isinstance(self.translate(error, ""), Unreachable) and self.deadline is None
                     and next(tries, None) is not None)
            if again and getattr(error, "response", None) is None:  # an answer is no silence
                self.tell_of_retry(error)
            return again

        return {"timeout": self.TIMEOUT, "retry": self._retry.with_predicate(worthwhile)}

    def translate(self, error: Exception, key: str) -> ReplicateError:
        name = "%s in %s" % (key, self.url) if key else self.url
        error = getattr(error, "cause", None) or error  # what the SDK wraps when its retries run out
        failed = error.args[0] if error.args else None  # urllib3's error, which may hold another
        text = str(getattr(error, "message", None) or short_reason(getattr(failed, "reason", None) or error))
        pool = getattr(failed, "pool", None)
        if pool is not None:
            text = re.sub(r"HTTPS?Connection(Pool)?\(.*?\)|<urllib3\S* object at \w+>", "%s:%s" % (pool.host, pool.port), text)
        inner = re.search(r'"message":\s*"([^"]+)"', text)  # errors of media requests hold the whole answer
        reason = inner.group(1) if inner else re.sub(r"^[A-Z]+ https?://\S+: ", "", text)
        reason = reason.strip().rstrip(".:")
        code = getattr(error, "code", None) or getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, self._errors.NotFound):
            if not key or "specified bucket" in reason.lower():
                return NoBucket(NO_BUCKET % self.url)
            return DoesNotExist("%s does not exist." % name)
        if isinstance(error, self._errors.PreconditionFailed):
            return Changed("Another process changed %s." % name)
        if isinstance(error, self._auth_errors.GoogleAuthError) and not isinstance(error, self._auth_errors.TransportError):
            return ReadError("%s cannot be used: %s." % (self.url, reason))
        if isinstance(code, int) and code < 500 and code not in (408, 429):
            return ReadError("The server refused a request for %s: %s." % (name, reason))
        module = type(error).__module__.split(".")[0]
        if isinstance(error, OSError) or module in ("google", "requests", "urllib3", "http"):
            return Unreachable("%s cannot be reached: %s." % (self.url, reason))
        return ReadError("%s: %s." % (name, reason))

    def _blob(self, key: str, chunk_size: Optional[int] = None) -> Any:
        return self._bucket.blob(self.root + key, chunk_size)

    def list_page(self, prefix: str, token: Any) -> Tuple[List[Entry], Any]:
        pages = self._client.list_blobs(self._bucket, prefix=prefix, page_token=token, max_results=None, page_size=1000,
                                        fields="items(name,size,updated,generation),nextPageToken", **self._limits())
        entries = [Entry(blob.name[len(self.root):], blob.size or 0, blob.updated.timestamp(), str(blob.generation))
                   for blob in next(pages.pages, ())]
        return entries, pages.next_page_token

    def stat(self, key: str) -> Entry:
        blob = self._blob(key)
        self.call(lambda: blob.reload(**self._limits()), key)
        return Entry(key, blob.size or 0, blob.updated.timestamp(), str(blob.generation))

    def read_part(self, key: str, start: int, end: int, version: Optional[str]) -> Tuple[BinaryIO, str, int]:
        size = BEYOND
        if version is None:
            entry = self.stat(key)
            size, version = entry.size, entry.version
        data = b""
        if start < min(end, size):
            data = self._blob(key).download_as_bytes(start=start, end=min(end, size) - 1, raw_download=True, checksum=None,
                                                     if_generation_match=int(version), **self._limits())
        return io.BytesIO(data), version, size

    def read(self, key: str, entry: Optional[Entry] = None) -> bytes:
        """The bytes of an object in one request; the inherited method first asks for the version."""
        return self.call(lambda: self._blob(key).download_as_bytes(raw_download=True, checksum=None, **self._limits()), key)

    def put(self, key: str, data: bytes, version: Optional[str]) -> None:
        self._blob(key).upload_from_string(data, "application/octet-stream", **self._limits(),
                                           if_generation_match=None if version is None else int(version or 0))

    def upload(self, key: str, path: str, progress: Callable[[int], None] = lambda count: None) -> None:
        size = os.path.getsize(path)
        blob = self._blob(key, self.PART_BYTES if size > self.PART_BYTES else None)
        attempts = self.ATTEMPTS * (1 + size // self.PART_BYTES)
        with CountingFile(path, progress, self.check_deadline) as file:
            self.call(lambda: blob.upload_from_file(file, size=size, content_type="application/octet-stream",
                                                    checksum=None, **self._limits(attempts)), key)

    def delete(self, keys: Iterable[str]) -> None:
        def remove(key: str) -> None:
            try:
                self.call(lambda: self._blob(key).delete(**self._limits()), key)
            except DoesNotExist:
                pass

        for _ in self.in_parallel(remove, keys):
            pass

    def find_bucket(self) -> Any:
        self._client.get_bucket(self.bucket, **self._limits())

    def create_bucket(self) -> None:
        self._client.create_bucket(self.bucket, **self._limits())


class CountingFile(io.FileIO):
    """A file opened for reading that calls check before each read, and reports the bytes read."""

    def __init__(self, path: str, progress: Callable[[int], None], check: Callable[[], None]) -> None:
        super().__init__(path, "rb")
        self._progress, self._check = progress, check

    def read(self, size: Optional[int] = -1) -> bytes:
        self._check()
        data = super().read(size)
        self._progress(len(data))
        return data


def http_date_skew(date: Optional[str]) -> float:
    """The seconds by which an HTTP Date header is ahead of our clock; 0 without a valid one."""
    from email.utils import parsedate_to_datetime
    try:
        return parsedate_to_datetime(date or "").timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
        return 0.0


BACKENDS: Dict[str, Callable[[str], Storage]] = {kind.scheme: kind for kind in (DiskStorage, S3Storage, GCSStorage)}


# ------------------------------------------------------------------------------------------------------------------
# 6  Archives: ignore rules, pack, unpack
# ------------------------------------------------------------------------------------------------------------------

NEVER_SAVED = (".replicate", ".keepsake", ".git", ".mypy_cache", "__pycache__", ".ipynb_checkpoints", ".env")
LOGS = (b"slurm-*.out", b"nohup.out", b"events.out.tfevents.*", b"lightning_logs/", b"mlruns/", b"wandb/",
        b"/outputs/20[0-9][0-9]-*/", b"/multirun/20[0-9][0-9]-*/")  # of schedulers, frameworks and trackers: they are no code
STAGING_PREFIX = ".replicate-checkout-"
SUGGESTED_NAMES = 10000  # remembered by a checkout, so that it can suggest the nearest one


class IgnoreRules:
    """The ignore patterns of a project, in the syntax of gitignore(5)."""

    def __init__(self, patterns: Sequence[bytes] = ()) -> None:
        self._rules: List[Tuple[str, Any, bool, bool]] = []  # folder, compiled pattern, negated, directories only
        self._add("", patterns)

    def read(self, directory: str, folder: str) -> None:
        """Add the ignore files of a directory; folder is its path relative to the project ('' or 'a/b/')."""
        for name in IGNORE_NAMES:
            try:
                with open_regular(os.path.join(directory, name), follow=True) as file:
                    content = file.read()
            except Unreadable:
                continue
            if content.startswith(b"\xef\xbb\xbf"):  # a byte order mark
                content = content[3:]
            self._add(folder, [line[:-1] if line.endswith(b"\r") else line for line in content.split(b"\n")])

    def _add(self, folder: str, lines: Iterable[bytes]) -> None:
        self._rules += [(folder,) + rule for rule in map(_ignore_rule, lines) if rule]

    def excludes(self, path: str, is_directory: bool) -> bool:
        """Whether the last pattern that matches a path ignores it; none of its parents may be ignored."""
        for folder, pattern, negated, directories_only in reversed(self._rules):
            if path.startswith(folder) and (is_directory or not directories_only):
                if pattern.match(os.fsencode(path[len(folder):])):
                    return not negated
        return False


def _ignore_rule(line: bytes) -> Optional[Tuple[Any, bool, bool]]:
    """(compiled pattern, negated, directories only) for one line; None for comments and lines that match nothing."""
    if line.startswith(b"#"):
        return None
    stripped = line.rstrip(b" ")
    if len(stripped) < len(line) and (len(stripped) - len(stripped.rstrip(b"\\"))) % 2:
        stripped += b" "  # the space is escaped
    line = stripped
    negated = line.startswith(b"!")
    line = line[negated:]
    directories_only = line.endswith(b"/")
    if directories_only:
        line = line[:-1]
    anchored = b"/" in line
    if line.startswith(b"/"):
        line = line[1:]
    if not line:
        return None
    expression = _wildcard_expression(line, anchored)
    if expression is None:
        return None
    return re.compile((b"" if anchored else b"(?:.*/)?") + expression + rb"\Z", re.DOTALL), negated, directories_only


def _wildcard_expression(pattern: bytes, anchored: bool) -> Optional[bytes]:
    """A regular expression for a gitignore pattern; None for one that can never match."""
    parts: List[bytes] = []
    position = 0
    while position < len(pattern):
        character = pattern[position:position + 1]
        start = position
        position += 1
        if character == b"*":
            while pattern[position:position + 1] == b"*":
                position += 1
            # Git compares the text before the first wildcard by itself, so "**" may also start the rest.
            first = pattern[start - 1:start] in (b"", b"/") or not re.search(rb"[*?\[\\]", pattern[:start])
            alone = first and pattern[position:position + 1] in (b"", b"/")
            if not (position - start > 1 and alone and anchored):
                parts.append(b"[^/]*")
            elif position == len(pattern):
                parts.append(b".*")
            else:
                parts.append(b"(?:.*/)?")
                position += 1
        elif character == b"?":
            parts.append(b"[^/]")
        elif character == b"[":
            found = _bracket_expression(pattern, position)
            if found is None:
                return None
            expression, position = found
            parts.append(expression)
        elif character == b"\\":
            if position == len(pattern):
                return None
            parts.append(re.escape(pattern[position:position + 1]))
            position += 1
        else:
            parts.append(re.escape(character))
    return b"".join(parts)


# The POSIX classes of the C locale, as they stand in the brackets of a regular expression.
_POSIX_CLASSES = {b"alnum": rb"0-9A-Za-z", b"alpha": rb"A-Za-z", b"blank": rb" \t", b"cntrl": rb"\x00-\x1f\x7f",
                  b"digit": rb"0-9", b"graph": rb"!-~", b"lower": rb"a-z", b"print": rb" -~", b"punct": rb"!-/:-@\[-`{-~",
                  b"space": rb"\t-\r ", b"upper": rb"A-Z", b"xdigit": rb"0-9A-Fa-f"}
_BRACKET_ITEM = rb"\[:([^]]*):\]|(\\.|[^\\])(?:-(?!\])(\\.|[^\\]))?"  # [:class:], a character, or a range of them


def _bracket_expression(pattern: bytes, position: int) -> Optional[Tuple[bytes, int]]:
    """(regular expression, next position) for the bracket that opens before position; None if it is malformed."""
    negated = pattern[position:position + 1] in (b"!", b"^")
    start = position = position + negated
    parts: List[bytes] = []
    while position == start or pattern[position:position + 1] != b"]":  # a first ] is a member
        item = re.compile(_BRACKET_ITEM, re.DOTALL).match(pattern, position)
        if item is None:
            return None
        name, first, last = item.groups()
        if name is not None:
            if name not in _POSIX_CLASSES:
                return None
            parts.append(_POSIX_CLASSES[name])
        else:
            parts.append(re.escape(first[-1:]))
            if last is not None and first[-1:] < last[-1:]:  # git takes z-a for z alone
                parts.append(b"-" + re.escape(last[-1:]))
        position = item.end()
    return b"(?!/)[%s%s]" % (b"^" if negated else b"", b"".join(parts)), position + 1


class Source:
    """A file to be packed."""

    __slots__ = ("name", "path", "size")

    def __init__(self, name: str, path: str, size: int) -> None:
        self.name = name  # relative to the project directory, with forward slashes
        self.path = path  # of the file itself, if the name is a link to it
        self.size = size  # bytes, when it was found


def relative_path(path: Any, directory: str) -> str:
    """A user's path relative to the project directory, with forward slashes ('.' for all of it). If there is nothing, the path
    is one in the working directory.

    Raises TypeError if it is not a path, ValueError if it is empty, missing or outside the project.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError("path must be a string, not %s" % type(path).__name__)
    text = os.fspath(path)
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError("path is empty" if not text else "path %r is not a file name" % (text,))
    full = os.path.abspath(os.path.join(directory, text))
    relative = place_in(directory, full)
    if relative.split("/")[0] == os.pardir or os.path.isabs(relative):
        raise ValueError("path %r is outside the project directory %s" % (text, directory))
    if not os.path.exists(full):
        if os.path.exists(text) and full != os.path.abspath(text):  # a script in a subdirectory
            return relative_path(os.path.abspath(text), directory)
        raise ValueError("path %r does not exist (it is relative to the project directory %s)" % (text, directory))
    return relative


def place_in(directory: str, path: str) -> str:
    """An absolute path relative to a directory, with forward slashes; it starts with '..' if it is outside."""
    try:
        relative = os.path.relpath(path, directory)
        if relative.split(os.sep)[0] == os.pardir:
            relative = os.path.relpath(os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)),
                                       os.path.realpath(directory))
    except ValueError:  # on another drive of Windows
        return path
    return relative.replace(os.sep, "/")


def find_sources(directory: str, path: str, excluded: Sequence[str] = (), warn: Callable[[str], None] = console.warning,
                 patterns: Sequence[bytes] = ()) -> List[Source]:
    """The files to save at path (see relative_path()), sorted by name, without those ignored or never saved.

    excluded: absolute directories to leave out (a repository inside the project). patterns: ignored unless an ignore file
    says otherwise. The path itself is saved even if an ignore file lists it: the user asked for it. Raises ValueError if it
    is never saved.
    """
    for part in path.split("/"):
        if is_never_saved(part):
            raise ValueError("path %r is never saved: it is inside %s" % (path, part))
        if part != "." and (is_unsafe(part) or is_protected(part)):
            raise ValueError("path %r is not saved: a file with this name could not be checked out" % path)
    top = os.path.join(directory, path)
    if os.path.isdir(top):
        prefix = "" if path == "." else path + "/"
        rules = IgnoreRules(patterns)
        rules.read(directory, "")
        if prefix:
            rules.read(top, prefix)
        found = _files_below(top, prefix, rules, {os.path.realpath(item) for item in excluded}, warn)
    else:
        found = _regular_file(path, top, warn)
    return sorted(found, key=lambda source: source.name)


RERUN_MARK = os.path.join(".replicate", "rerun")  # a file in each folder that `replicate rerun` makes
REPORT_NAME = "report.html"  # where `replicate report` writes its page


def is_never_saved(name: str) -> bool:
    """Whether files and directories of that name stay out of every archive."""
    return name in NEVER_SAVED or name.startswith((".env.", STAGING_PREFIX))


def _files_below(directory: str, prefix: str, rules: IgnoreRules, excluded: Set[str],
                 warn: Callable[[str], None]) -> Iterator[Source]:
    """Yield the files to save in a directory, and warn of others; prefix is its path in the project ('' or 'a/b/')."""
    try:
        with os.scandir(directory) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
    except OSError as error:
        warn("%s is not saved: %s." % (directory, short_reason(error)))
        return
    for entry in entries:
        name = prefix + entry.name
        if is_never_saved(entry.name):
            continue
        if is_unsafe(entry.name) or is_protected(entry.name):
            warn("%s is not saved: a file with this name could not be checked out." % name)
            continue
        is_directory = entry.is_dir(follow_symlinks=False)
        if rules.excludes(name, is_directory):
            continue
        if is_directory:
            if not _is_separate(entry.path) and not (excluded and os.path.realpath(entry.path) in excluded):
                yield from _files_below(entry.path, name + "/", rules, excluded, warn)
        elif entry.name == REPORT_NAME and is_report(entry.path):
            continue
        elif entry.is_symlink() and os.path.isdir(entry.path):
            warn("%s is not saved: it is a link to a directory." % name)
        else:
            yield from _regular_file(name, entry.path, warn)


def _is_separate(directory: str) -> bool:
    """Whether a folder in a project is a virtual environment or the work of `replicate rerun`."""
    return any(os.path.exists(os.path.join(directory, name)) for name in ("pyvenv.cfg", "conda-meta", RERUN_MARK))


def is_report(path: str) -> bool:
    """Whether a file is a page that `report` wrote."""
    try:
        with open_regular(path) as file:
            return b'<meta name="generator" content="Replicate">' in file.read(1000)
    except (OSError, ReplicateError):
        return False


def _regular_file(name: str, path: str, warn: Callable[[str], None]) -> Iterator[Source]:
    """Yield a file if it is a regular one; sockets and the like are skipped."""
    try:
        status = os.stat(path)
    except OSError as error:
        warn("%s is not saved: %s." % (name, short_reason(error)))
        return
    if stat.S_ISREG(status.st_mode):
        yield Source(name, os.path.realpath(path) if os.path.islink(path) else path, status.st_size)


# An archive is a .tar.gz of many gzip members, which every reader takes for one file. A member starts at a file or at
# each MEMBER_BYTES of the content of a large one, so that threads can pack members and a reader can fetch one file alone.
# Data that does not shrink is stored uncompressed. Empty gzip members at the end hold a table of contents in their extra
# fields (RFC 1952, subfield "RV"): zlib-compressed JSON {"members": [[compressed size, size]...], "files": [[name, offset
# in the tar, size, CRC-32]...]}. The last one has a fixed length and says where the first one starts.

MEMBER_BYTES = 1 << 20            # of a large file in one gzip member
GROUP_BYTES = 256 << 10           # small files share a member up to this size
MAX_MEMBER_BYTES = 16 << 20       # a table of contents that claims more is ignored,
MAX_TABLE_ENTRIES = 500000        # and so is one with more members and files
STORED_BYTES = 65535              # the most that a stored deflate block can hold
PIECE_BYTES = 256 << 10           # compressed bytes read at a time; gunzip() copies what is left of it for each member
LEVEL = 1                         # of zlib: higher levels take much longer and gain little
SHRINKS = 0.9                     # data that shrinks to less than this part of its size is compressed
SAMPLED_MEMBERS = 8               # one in so many members of a large file is sampled
SAMPLE_BYTES = 16 << 10           # of data, to see whether it shrinks
SETTLING_SECONDS = 0.005          # two changes within it can leave the same modification time
GZIP_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
GZIP_EXTRA_HEADER = b"\x1f\x8b\x08\x04\x00\x00\x00\x00\x00\xff"
GZIP_EMPTY_BODY = b"\x03\x00" + bytes(8)
FOOTER_BYTES = 10 + 2 + 4 + 16 + len(GZIP_EMPTY_BODY)
MAX_FIELD_BYTES = 65535 - 4


class Table:
    """The table of contents of an archive."""

    def __init__(self, members: List[Tuple[int, int]], files: List[Tuple[str, int, int, int]]) -> None:
        self.members = members  # (compressed size, size) of each gzip member with data, from the start of the file
        self.files = files      # (name in the project, offset of its header in the tar, size, CRC-32)

    def encode(self) -> bytes:
        """The gzip members that hold it."""
        content = encode_json({"members": self.members, "files": self.files}, indent=None)
        packed = zlib.compress(content)
        fields = b"".join(_extra_member(packed[start:start + MAX_FIELD_BYTES])
                         for start in range(0, len(packed), MAX_FIELD_BYTES))
        start = sum(compressed for compressed, _ in self.members)
        return fields + _extra_member(struct.pack("<QQ", start, len(fields)))

    @classmethod
    def read(cls, read_range: Callable[[int, int], bytes], size: int) -> Optional[Table]:
        """The table of an archive of size bytes, or None if it has none that can be trusted."""
        tail_start = max(0, size - 65536)
        tail = read_range(tail_start, size)
        field = _extra_field(tail[-FOOTER_BYTES:])
        if field is None or len(field[0]) != 16:
            return None
        start, length = struct.unpack("<QQ", field[0])
        if start + length + FOOTER_BYTES != size:
            return None
        fields = tail[start - tail_start:-FOOTER_BYTES] if start >= tail_start else read_range(start, start + length)
        pieces, rest = [], memoryview(fields)
        while rest:
            field = _extra_field(rest)
            if field is None:
                return None
            pieces.append(field[0])
            rest = rest[field[1]:]
        return cls._decode(b"".join(pieces), start)

    @classmethod
    def _decode(cls, packed: bytes, start: int) -> Optional[Table]:
        unpacker = zlib.decompressobj()
        try:
            text = unpacker.decompress(packed, MAX_MEMBER_BYTES)
            if text.count(b"[") + text.count(b"{") > MAX_TABLE_ENTRIES:
                return None
            content = json.loads(text)
            members = [(int(compressed), int(size)) for compressed, size in content["members"]]
            files = [(str(name), int(offset), int(size), int(crc)) for name, offset, size, crc in content["files"]]
        except (zlib.error, ValueError, TypeError, KeyError, RecursionError, OverflowError):
            return None
        if sum(compressed for compressed, _ in members) != start:
            return None
        if not all(18 < compressed <= 2 * MAX_MEMBER_BYTES and 0 < size <= MAX_MEMBER_BYTES for compressed, size in members):
            return None
        return cls(members, files)


def _extra_member(data: bytes) -> bytes:
    """An empty gzip member with data in its extra field."""
    return (GZIP_EXTRA_HEADER + (len(data) + 4).to_bytes(2, "little") + b"RV" + len(data).to_bytes(2, "little") + data +
            GZIP_EMPTY_BODY)


def _extra_field(data: Union[bytes, memoryview]) -> Optional[Tuple[Union[bytes, memoryview], int]]:
    """(content, length) of the member at the start of data; None if _extra_member() did not make it."""
    length = int.from_bytes(data[14:16], "little")
    if (data[:10] != GZIP_EXTRA_HEADER or data[12:14] != b"RV" or data[10:12] != (length + 4).to_bytes(2, "little")
            or data[16 + length:16 + length + len(GZIP_EMPTY_BODY)] != GZIP_EMPTY_BODY):
        return None
    return data[16:16 + length], 16 + length + len(GZIP_EMPTY_BODY)


class ArchiveWriter:
    """Writes gzip members and their table to an unbuffered file."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.table = Table([], [])
        self.position = 0  # where the next member goes
        self.offset = 0    # of its content in the tar

    def add(self, member: bytes, size: int) -> None:
        """Append one gzip member that holds size bytes of tar."""
        write_at(self.file, member, self.position)
        self.note(len(member), size)

    def note(self, compressed: int, size: int) -> None:
        """Count a member that is already in its place."""
        self.table.members.append((compressed, size))
        self.position += compressed
        self.offset += size

    def finish(self) -> None:
        """Append the table, and end the file there."""
        table = self.table.encode()
        write_at(self.file, table, self.position)
        self.file.truncate(self.position + len(table))


def pack(file: BinaryIO, archive_id: str, sources: Sequence[Source],
         warn: Callable[[str], None] = console.warning) -> Tuple[Table, bool]:
    """Write the archive of sources to an unbuffered file; large files stay uncompressed, so that this is as fast as a copy.

    Returns its table, and whether recompress() would shrink a large file. Raises OSError.
    """
    writer = ArchiveWriter(file)
    shrinks = False
    for source in sources:
        if source.size > GROUP_BYTES:
            shrinks |= store_large(writer, archive_id, source, warn)
    groups = group_small([source for source in sources if source.size <= GROUP_BYTES])
    grown: List[Source] = []  # since they were found
    for files, tar, member, problems in in_threads(lambda group: pack_group(archive_id, group, grown), groups):
        for problem in problems:
            warn(problem)
        if tar:
            writer.table.files += [(name, writer.offset + offset, size, crc) for name, offset, size, crc in files]
            writer.add(member, tar)
    for source in grown:
        shrinks |= store_large(writer, archive_id, source, warn)
    writer.add(gzip_member(bytes(1024)), 1024)
    writer.finish()
    return writer.table, shrinks


def group_small(sources: Sequence[Source]) -> Iterator[List[Source]]:
    """Yield groups of small files, each for one gzip member."""
    group: List[Source] = []
    waiting = 0
    for source in sources:
        if group and waiting + source.size > GROUP_BYTES:
            yield group
            group, waiting = [], 0
        group.append(source)
        waiting += source.size + 1024
    if group:
        yield group


def pack_group(archive_id: str, sources: Sequence[Source],
               grown: List[Source]) -> Tuple[List[Tuple[str, int, int, int]], int, bytes, List[str]]:
    """([(name, offset in the tar, size, CRC-32)], size of the tar, its gzip member, problems) for a group of files.

    Adds files that have become large to `grown`, and leaves them out.
    """
    files: List[Tuple[str, int, int, int]] = []
    parts: List[bytes] = []
    problems: List[str] = []
    offset = 0
    for source in sources:
        try:
            data, status, changed = read_small(source)
        except OSError as error:
            problems.append("%s is not saved: %s." % (source.name, short_reason(error)))
            continue
        if status.st_size > GROUP_BYTES:
            grown.append(source)
            continue
        if changed:
            problems.append(CHANGED % source.name)
        files.append((source.name, offset, len(data), zlib.crc32(data)))
        parts += [tar_header(archive_id, source.name, status, len(data)), data, bytes(-len(data) % 512)]
        offset += sum(map(len, parts[-3:]))
    return files, offset, gzip_member(b"".join(parts)) if parts else b"", problems


CHANGED = "%s changed while it was saved: the saved copy may mix old and new content."


def read_small(source: Source) -> Tuple[bytes, os.stat_result, bool]:
    """(content, status, whether it changed during both of two readings) of a small file; of a larger one, the content
    is cut off. Raises OSError.
    """
    with open_regular(source.path) as stream:
        for _ in range(2):
            before = os.fstat(stream.fileno())
            stream.seek(0)
            data = read_up_to(stream, min(before.st_size, GROUP_BYTES))
            if before.st_size > GROUP_BYTES or len(data) == before.st_size and is_unchanged(before, os.fstat(stream.fileno())):
                return data, before, False
    return data, before, True


def store_large(writer: ArchiveWriter, archive_id: str, source: Source, warn: Callable[[str], None]) -> bool:
    """Append a large file uncompressed; return whether it would shrink. Raises OSError if the archive cannot be written."""
    try:
        with open_regular(source.path) as stream:
            for is_last in (False, True):
                before = os.fstat(stream.fileno())
                settle(before)
                size = before.st_size
                header = tar_header(archive_id, source.name, before, size)
                position = writer.position + stored_size(len(header))
                crc, is_complete, shrinks = store_content(stream, size, writer.file, position)
                if is_complete and is_unchanged(before, os.fstat(stream.fileno())):
                    break
                if is_last:
                    warn(CHANGED % source.name)
    except Unreadable as error:
        warn("%s is not saved: %s." % (source.name, short_reason(error)))
        return False
    writer.table.files.append((source.name, writer.offset, size, crc))
    writer.add(stored_member(header), len(header))
    for start in range(0, size, MEMBER_BYTES):
        length = min(MEMBER_BYTES, size - start)
        writer.note(stored_size(length), length)
    if size % 512:
        writer.add(stored_member(bytes(-size % 512)), -size % 512)
    return shrinks


def store_content(stream: BinaryIO, size: int, file: BinaryIO, position: int) -> Tuple[int, bool, bool]:
    """Write size bytes of a stream uncompressed, in gzip members from this position of a file, with several threads.

    Returns their CRC-32, whether all of them were there, and whether a sample shrinks. Raises Unreadable, OSError.
    """
    def store(start: int) -> Tuple[int, int, bool, bool]:
        length = min(MEMBER_BYTES, size - start)
        try:
            data = os.pread(stream.fileno(), length, start)
        except OSError as error:
            raise Unreadable(error.errno, error.strerror) from error
        is_complete = len(data) == length
        member = stored_member(data if is_complete else data.ljust(length, b"\0"))
        write_at(file, member, position + start // MEMBER_BYTES * stored_size(MEMBER_BYTES))
        is_sampled = start % (SAMPLED_MEMBERS * MEMBER_BYTES) == 0
        return length, int.from_bytes(member[-8:-4], "little"), is_complete, is_sampled and does_shrink(data)

    whole_crc, all_complete, any_shrinks = 0, True, False
    shift = crc_shift(MEMBER_BYTES)
    threads = 2 if size < 8 * MEMBER_BYTES else 0
    for length, crc, is_complete, shrinks in in_threads(store, range(0, size, MEMBER_BYTES), threads):
        whole_crc = crc_product(shift if length == MEMBER_BYTES else crc_shift(length), whole_crc) ^ crc
        all_complete &= is_complete
        any_shrinks |= shrinks
    return whole_crc, all_complete, any_shrinks


# The CRC-32 of two parts together is that of the first, times x^(bits of the second) modulo the polynomial, plus that of
# the second (Ross Williams, "A painless guide to CRC error detection algorithms", 1993).

CRC_POLYNOMIAL = 0xedb88320  # of gzip and zip; bit 31 is the coefficient of x^0, as in every CRC here


def crc_product(one: int, other: int) -> int:
    """The product of two polynomials modulo that of CRC-32."""
    product = 0
    for bit in range(31, -1, -1):
        if one >> bit & 1:
            product ^= other
        other = other >> 1 ^ (CRC_POLYNOMIAL if other & 1 else 0)
    return product


def crc_shift(length: int) -> int:
    """The factor for the CRC-32 of data that `length` more bytes follow: what as many zeros make of 1."""
    return zlib.crc32(bytes(length), 0x7fffffff) ^ 0xffffffff  # zlib inverts its state


def is_unchanged(before: os.stat_result, after: os.stat_result) -> bool:
    """Whether nobody wrote to a file between two looks at it."""
    return (before.st_size, before.st_mtime_ns, before.st_ctime_ns) == (after.st_size, after.st_mtime_ns, after.st_ctime_ns)


def settle(status: os.stat_result) -> None:
    """Wait until another change would give the file another modification time."""
    age = time.time() - status.st_mtime
    if 0 <= age < SETTLING_SECONDS:
        time.sleep(SETTLING_SECONDS - age)


def write_at(file: BinaryIO, data: Union[bytes, memoryview], position: int) -> None:
    """Write all of data at a position of an unbuffered file."""
    written = os.pwrite(file.fileno(), data, position)
    while written < len(data):
        written += os.pwrite(file.fileno(), memoryview(data)[written:], position + written)


def read_up_to(stream: BinaryIO, length: int) -> bytes:
    """The next length bytes of a stream, or fewer at its end."""
    parts: List[bytes] = []
    while length:
        data = stream.read(length)
        if not data:
            break
        parts.append(data)
        length -= len(data)
    return b"".join(parts)


def tar_header(archive_id: str, name: str, status: os.stat_result, size: int) -> bytes:
    """The header blocks of a file, in GNU format and without its owner."""
    member = tarfile.TarInfo("%s/%s" % (archive_id, name))
    member.size, member.mode, member.mtime = size, status.st_mode & 0o777, max(0, int(status.st_mtime))
    return member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def gzip_member(data: bytes) -> bytes:
    """A gzip member that holds data: compressed if that pays, else stored."""
    if not does_shrink(data):
        return stored_member(data)
    packer = zlib.compressobj(LEVEL, zlib.DEFLATED, 31)
    packed = packer.compress(data) + packer.flush()
    return packed if len(packed) < len(data) else stored_member(data)


def does_shrink(data: bytes) -> bool:
    """Whether a sample of data shrinks enough for compression to pay."""
    half = SAMPLE_BYTES // 2
    sample = data if len(data) <= SAMPLE_BYTES else data[len(data) // 4:][:half] + data[len(data) // 4 * 3:][:half]
    return len(zlib.compress(sample, LEVEL)) < SHRINKS * len(sample)


def stored_member(data: bytes) -> bytes:
    """A gzip member that holds data in stored blocks (RFC 1951, 3.2.4)."""
    view = memoryview(data)
    parts: List[Any] = [GZIP_HEADER]
    for start in range(0, len(view), STORED_BYTES):
        block = view[start:start + STORED_BYTES]
        is_last = start + len(block) == len(view)
        parts += [struct.pack("<BHH", is_last, len(block), len(block) ^ 0xffff), block]
    return b"".join(parts + [struct.pack("<II", zlib.crc32(view), len(view))])


def stored_size(size: int) -> int:
    """The length of the gzip member that stores size bytes."""
    return len(GZIP_HEADER) + size + 5 * -(-size // STORED_BYTES) + 8


def recompress(archive: Archive, file: BinaryIO, check: Callable[[], Any]) -> None:
    """Copy one of our archives to a file, and compress its stored members where that pays.

    Calls check() before each member; what that raises ends the work. Raises ReadError, OSError.
    """
    from itertools import accumulate
    table = archive.table
    if table is None:
        raise ReadError("it has no table of contents")
    writer = ArchiveWriter(file)
    writer.table.files = table.files
    starts = accumulate([0] + [compressed for compressed, _ in table.members])

    def convert(place: Tuple[int, Tuple[int, int]]) -> Tuple[bytes, int]:
        start, (compressed, size) = place
        check()
        member = archive.read_range(start, start + compressed)
        return gzip_member(inflate_member(member, size)) if compressed == stored_size(size) else member, size

    for member, size in in_threads(convert, zip(starts, table.members)):
        writer.add(member, size)
    writer.finish()


def inflate_member(data: bytes, size: int) -> bytes:
    """The content of a gzip member that must hold exactly size bytes. Raises ReadError."""
    unpacker = zlib.decompressobj(31)
    try:
        content = unpacker.decompress(data, size + 1)
    except zlib.error as error:
        raise ReadError("it is damaged (%s)" % error) from error
    if not unpacker.eof or unpacker.unused_data or len(content) != size:
        raise ReadError("its table of contents is wrong")
    return content


class Archive:
    """A .tar.gz in a storage, ours or Keepsake's, open for reading."""

    def __init__(self, storage: Storage, key: str) -> None:
        """Raises DoesNotExist, ReadError."""
        entry, self._open = storage.pin(key)
        self.size = entry.size
        self.table = Table.read(self.read_range, self.size) if self.size > FOOTER_BYTES else None

    def has_lost_table(self) -> bool:
        """Whether it has a table of contents that is damaged."""
        return self.table is None and self.size > FOOTER_BYTES and self.read_range(
            self.size - FOOTER_BYTES, self.size).startswith(GZIP_EXTRA_HEADER)

    def read_range(self, start: int, end: int) -> bytes:
        """The bytes [start, end) of the archive. Raises ReadError."""
        with self._open(start, end) as stream:
            data = read_up_to(stream, end - start)
        if len(data) < end - start:
            raise ReadError("it is cut off")
        return data

    def files(self, wanted: Callable[[str], bool], archive_id: str,
              name: Optional[str] = None) -> Iterator[Tuple[tarfile.TarInfo, Iterator[Any]]]:
        """Yield (member, pieces of its content) for each wanted file; of a name that the table lists, read only that file.

        Take the pieces of a file before you ask for the next one. Raises ReadError for a member that is neither a plain
        file nor a directory below `<archive_id>/`, and the errors of zlib and tarfile: see reading_archive.
        """
        located = self._located(name, archive_id) if name else None
        for member, pieces in [located] if located else read_tar(self._content(), archive_id):
            if wanted(member.name):
                yield member, pieces

    def sums(self, archive_id: str) -> Dict[str, Tuple[int, int]]:
        """(size, CRC-32) of each file by name, from the table if there is one. Raises like files()."""
        if self.table:
            return {safe_name("%s/%s" % (archive_id, name), archive_id): (size, crc)
                    for name, _, size, crc in self.table.files}
        with Progress("Reading %s" % archive_id[:SHORT_ID], 0) as progress:
            return self.read_sums(archive_id, progress.add)

    def read_sums(self, archive_id: str, progress: Callable[[int], None]) -> Dict[str, Tuple[int, int]]:
        """Read all files, and return (size, CRC-32) of each by name. Raises like files()."""
        found: Dict[str, Tuple[int, int]] = {}
        for member, pieces in self.files(lambda name: True, archive_id):
            crc = 0
            for piece in pieces:
                crc = zlib.crc32(piece, crc)
                progress(len(piece))
            found[member.name] = member.size, crc
        return found

    def contents(self, archive_id: str, sizes: Dict[str, int]) -> Dict[str, bytes]:
        """The content of these files. Raises ReadError if one is larger than its size here, and like files()."""
        chosen = [self.files(sizes.__contains__, archive_id)] if self.table is None else [
            self.files(name.__eq__, archive_id, name) for name in sorted(sizes)]
        return {member.name: b"".join(_limited(pieces, sizes[member.name])) for files in chosen for member, pieces in files}

    def copy_file(self, name: str, archive_id: str, target: BinaryIO) -> bool:
        """Write the file called name to target, and return whether there is one."""
        found = False
        for _, pieces in self.files(name.__eq__, archive_id, name):
            target.seek(0)  # the last of several wins, as in a checkout
            target.truncate()
            target.writelines(pieces)
            found = True
        return found

    def _located(self, name: str, archive_id: str) -> Optional[Tuple[tarfile.TarInfo, Iterator[Any]]]:
        places = [(offset, size) for listed, offset, size, _ in self.table.files if listed == name] if self.table else []
        if places:
            offset, size = places[-1]
            try:
                member, pieces = next(read_tar(self._content(offset, offset + size + 8192), archive_id))
                if member.name == name:
                    return member, pieces
            except (StopIteration, ReadError, zlib.error, tarfile.TarError, EOFError, ValueError):
                pass  # the table is wrong: the headers decide
        return None

    def _content(self, start: int = 0, end: Optional[int] = None) -> Iterator[bytes]:
        """Yield the tar in pieces: from offset start to the end of the gzip member that holds offset end, or all of it."""
        first, last, skip = 0, self.size, 0
        if self.table and end is not None:
            position = compressed_position = 0
            for compressed, size in self.table.members:
                if position <= start:
                    first, skip = compressed_position, start - position
                compressed_position += compressed
                if position < end:
                    last = compressed_position
                position += size
        with self._open(first, last) as stream:
            for piece in gunzip(stream):
                yield piece[skip:]
                skip = max(0, skip - len(piece))


def _limited(pieces: Iterable[bytes], limit: int) -> Iterator[bytes]:
    """Yield pieces up to a total length. Raises ReadError beyond it."""
    for piece in pieces:
        limit -= len(piece)
        if limit < 0:
            raise ReadError("it is too large")
        yield piece


def gunzip(stream: BinaryIO) -> Iterator[bytes]:
    """Yield the content of a gzip file of one or more members in pieces. Raises EOFError, zlib.error."""
    unpacker, is_inside, is_first = zlib.decompressobj(31), False, True
    for data in iter(lambda: stream.read(PIECE_BYTES), b""):
        while data:
            if not (is_inside or is_first):
                data = data.lstrip(b"\0")  # zeros may follow a member
                if not data:
                    break
            is_inside, is_first = True, False
            content = unpacker.decompress(data, 4 * MEMBER_BYTES)
            data = unpacker.unconsumed_tail
            if content:
                yield content
            if unpacker.eof:
                data = unpacker.unused_data
                unpacker, is_inside = zlib.decompressobj(31), False
    if is_inside:
        raise EOFError("it is cut off")


class TarReader:
    """Reads an untrusted tar stream. Raises ReadError for anything but regular files and directories.

    The limits keep a small hostile archive from costing much time or memory. Each is far above what honest archives hold.
    """

    MAX_HEADER_BYTES = 64 << 10
    MAX_HEADERS = 8              # long names and PAX headers before one member
    MAX_RECORDS = 256            # of a PAX header
    MAX_NAME_BYTES = 4096
    MAX_DEPTH = 255              # nested directories
    MAX_IDLE_MEMBERS = 100000    # directories and repeated names
    MAX_MEMBERS = 2000000
    MAX_NAMES_BYTES = 64 << 20   # of all names together

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._names: Set[int] = set()  # hashes of the names so far
        self._names_bytes = 0
        self._idle_members = 0
        self._buffer = memoryview(b"")
        self._left = 0     # bytes of the current member's content,
        self._padding = 0  # and of the padding after it

    def members(self) -> Iterator[tarfile.TarInfo]:
        """Yield each member. Take its content from data() before you ask for the next one."""
        overrides: Dict[str, str] = {}
        headers = 0
        while True:
            self._left += self._padding
            for _ in self.data():  # skip what nobody has taken
                pass
            self._left, self._padding = 512, 0
            block = b"".join(self.data())
            if not block.strip(b"\0"):
                for _ in self._pieces:  # so that zlib checks the checksum at the end
                    pass
                return
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            size = int(overrides.get("size", info.size))
            if size < 0:
                raise ReadError("it has a member of negative size")
            self._left, self._padding = size, -size % 512
            if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE):
                headers += 1
                if headers > self.MAX_HEADERS:
                    raise ReadError("it has more than %d headers before one file" % self.MAX_HEADERS)
                overrides.update(self._extended_header(info.type, size))
                continue
            name = overrides.get("path", info.name)
            if any(key.startswith("GNU.sparse") for key in overrides) or info.type not in (
                    tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
                raise ReadError("%s in it is not a regular file or directory" % (escape_control(name) or "something"))
            if info.isdir():
                self._left = self._padding = 0
            overrides, headers = {}, 0
            self._check_bounds(name, info.isdir())
            info.name, info.size = name, size
            yield info

    def _check_bounds(self, name: str, is_directory: bool) -> None:
        """Raise ReadError if a name or the number of members exceeds a limit."""
        length = len(name.encode("utf-8", "surrogateescape"))
        if length > self.MAX_NAME_BYTES:
            raise ReadError("it has a file name of %d bytes, more than %d" % (length, self.MAX_NAME_BYTES))
        if name.count("/") > self.MAX_DEPTH:
            raise ReadError("it has more than %d nested directories" % self.MAX_DEPTH)
        if is_directory or hash(name) in self._names:
            self._idle_members += 1
            if self._idle_members > self.MAX_IDLE_MEMBERS:
                raise ReadError("it has more than %d directories and repeated names" % self.MAX_IDLE_MEMBERS)
            return
        self._names.add(hash(name))
        self._names_bytes += length
        if len(self._names) > self.MAX_MEMBERS:
            raise ReadError("it has more than %d files" % self.MAX_MEMBERS)
        if self._names_bytes > self.MAX_NAMES_BYTES:
            raise ReadError("its file names take more than %s" % format_size(self.MAX_NAMES_BYTES))

    def data(self) -> Iterator[memoryview]:
        """Yield the content of the current member in pieces."""
        while self._left:
            while not self._buffer:
                piece = next(self._pieces, None)
                if piece is None:
                    raise EOFError("it is cut off")
                self._buffer = memoryview(piece)
            taken = self._buffer[:self._left]
            self._buffer = self._buffer[len(taken):]
            self._left -= len(taken)
            yield taken

    def _extended_header(self, kind: bytes, size: int) -> Dict[str, str]:
        """What a GNU long name or a PAX header says about the next member."""
        if size > self.MAX_HEADER_BYTES:
            raise ReadError("it has a header of %d bytes, more than %d" % (size, self.MAX_HEADER_BYTES))
        content = b"".join(self.data())
        if kind == tarfile.GNUTYPE_LONGNAME:
            return {"path": content.rstrip(b"\0").decode("utf-8", "surrogateescape")}
        if kind == tarfile.XHDTYPE:
            return read_pax(content)
        return {}


def read_pax(content: bytes) -> Dict[str, str]:
    """The records of a PAX header ("<length> <key>=<value>\\n"; POSIX.1-2001). Raises ReadError."""
    records: Dict[str, str] = {}
    position = count = 0
    while position < len(content):
        match = re.compile(rb"(\d{1,7}) ([^=\n]+)=").match(content, position)
        end = position + (int(match.group(1)) if match else 0)
        if match is None or not match.end() < end <= len(content) or content[end - 1:end] != b"\n":
            raise ReadError("it has a malformed PAX header")
        key = match.group(2).decode("utf-8", "replace")
        value = content[match.end():end - 1].decode("utf-8", "surrogateescape")
        if key == "size" and not (value.isascii() and value.isdigit() and len(value) < 20):
            raise ReadError("it has a malformed PAX header")
        count += 1
        if count > TarReader.MAX_RECORDS:
            raise ReadError("it has a PAX header of more than %d records" % TarReader.MAX_RECORDS)
        records[key] = value
        position = end
    return records


def read_tar(content: Iterator[bytes], archive_id: str) -> Iterator[Tuple[tarfile.TarInfo, Iterator[memoryview]]]:
    """Yield (member with its path in the project, pieces of its content) for each file.

    Raises ReadError, EOFError, TarError.
    """
    reader = TarReader(content)
    for member in reader.members():
        member.name = safe_name(member.name, archive_id)
        if not member.isdir():
            yield member, reader.data()


def safe_name(name: str, archive_id: str) -> str:
    """The path in the project of a member with this name, '' for the top directory. Raises ReadError for a dangerous one."""
    parts = name.rstrip("/").split("/")
    if parts[0] != archive_id:
        raise ReadError("%s in it is not below the folder %s" % (escape_control(name), archive_id[:SHORT_ID]))
    for part in parts[1:]:
        if is_unsafe(part):
            raise ReadError("%s in it is not a safe file name" % escape_control(name))
        if is_protected(part):
            raise ReadError("%s in it would be written into %s" % (escape_control(name), escape_control(part)))
    return "/".join(parts[1:])


def is_unsafe(part: str) -> bool:
    """Whether a path component is more than a plain name on some system."""
    return (part in ("", ".", "..") or "\\" in part or "\0" in part or len(part) > 255
            or re.match(r"[A-Za-z]:", part) is not None)


def is_protected(part: str) -> bool:
    """Whether a path component names .git or .replicate on any file system (case, dots, ignorable characters)."""
    plain = re.sub("[\u200c-\u200f\u202a-\u202e\u206a-\u206f\ufeff]", "", part).lower().rstrip(". ").partition(":")[0]
    return plain in (".git", ".replicate", "git~1", "replic~1") or plain.startswith(STAGING_PREFIX)


def unpack_to(directory: str, files: Iterable[Tuple[tarfile.TarInfo, Iterator[Any]]],
              progress: Optional[Progress] = None) -> Set[str]:
    """Write files below a private directory, and return their names. Raises ReadError, OSError."""
    written: Set[str] = set()
    for member, pieces in files:
        path = os.path.join(directory, *member.name.split("/"))
        try:
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | BINARY, 0o600)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise ReadError("%s in it is both a file and a directory" % escape_control(member.name)) from error
        with os.fdopen(descriptor, "wb", 0) as file:
            for piece in pieces:
                write_all(file, piece)
                if progress:
                    progress.add(len(piece))
        os.chmod(path, member.mode & 0o755 | 0o600)
        written.add(member.name)
    return written


def code_digest(sums: Dict[str, Tuple[int, int]]) -> str:
    """SHORT_ID hex digits that identify the names and contents of files. sums: (size, CRC-32) by name."""
    import hashlib
    lines = ["%s\0%d\0%08x\n" % (name, *sums[name]) for name in sorted(sums)]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:SHORT_ID]


# ------------------------------------------------------------------------------------------------------------------
# 7  Repository: layout, documents, journals, find, remove, check out
# ------------------------------------------------------------------------------------------------------------------

EXPERIMENTS = "metadata/experiments/"
HEARTBEATS = "metadata/heartbeats/"
JOURNALS = "journals/"
LIVE_LOCK = ".live.lock"


def document_key(experiment_id: str) -> str:
    """The key of an experiment's document."""
    return "%s%s.json" % (EXPERIMENTS, experiment_id)


def heartbeat_key(experiment_id: str) -> str:
    """The key of an experiment's heartbeat."""
    return "%s%s.json" % (HEARTBEATS, experiment_id)


def archive_key(kind: str, item_id: str) -> str:
    """The key of an archive; kind is 'experiments' or 'checkpoints'."""
    return "%s/%s.tar.gz" % (kind, item_id)


class ExperimentGone(ReplicateError):
    """Somebody removed an experiment that is being recorded."""


class Journal(FileLock):
    """A locked file of checkpoints that are not in their experiment's document yet, one JSON line each.

    `{"checkpoint": {...}}` adds a checkpoint, `{"removed": "<id>"}` removes it again, `{"pruned": "<id>"}` only its files.
    The experiment's ID and the time make the file's name. A full disk or a killed process leaves a torn line, which readers
    skip. Once its lines are in the document, release() removes it.
    """

    def __init__(self, storage: DiskStorage, experiment_id: str) -> None:
        """Raises OSError."""
        self.key = "%s%s.%016x-%s.jsonl" % (JOURNALS, experiment_id, time.time_ns(), os.urandom(4).hex())
        super().__init__(storage.path(self.key), os.O_APPEND)
        self.acquire()

    def append(self, line: bytes) -> None:
        """Add a line, which then survives the death of the process. Raises OSError."""
        data = b"\n" + line + b"\n"
        if os.write(self.descriptor, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_journals(journals: Iterable[bytes], known: Container[str]) -> Tuple[List[Dict[str, Any]], Set[str]]:
    """(the checkpoints in journals whose IDs are not known, oldest first; the IDs of all that were pruned)."""
    added: Dict[str, Dict[str, Any]] = {}
    removed: Set[str] = set()
    pruned: Set[str] = set()
    for line in filter(None, b"\n".join(journals).split(b"\n")):
        try:
            record = decode_json(line, "journal")
            if "removed" in record:
                removed.add(str(record["removed"]))
            elif "pruned" in record:
                pruned.add(str(record["pruned"]))
            else:
                item = checked_checkpoint(record["checkpoint"])
                added[item["id"]] = item
        except (ReadError, TypeError, KeyError, AttributeError):
            console.debug("Skipped a torn line in a journal.")
    strip_files(added.values(), pruned)
    new = [item for item_id, item in added.items() if item_id not in removed and item_id not in known]
    return sorted(new, key=lambda item: canonical_time(item["created"])), pruned


def merge_journals(document: Dict[str, Any], journals: Iterable[bytes]) -> None:
    """Add the new checkpoints in journals to a document, and take out the files of pruned ones."""
    items = document.get("checkpoints") or []
    new, pruned = read_journals(journals, {item["id"] for item in items})
    strip_files(items, pruned)
    if new:
        document["checkpoints"] = items = items + new
    note_pruned(document, pruned - {item["id"] for item in items})


def note_pruned(header: Dict[str, Any], ids: Set[str]) -> None:
    """Note in a pending document which uploaded checkpoints to prune in the bucket."""
    if ids and header.get(SENT_KEY):
        header[PRUNED_KEY] = sorted(ids.union(texts_in(header, PRUNED_KEY)))


def decode_document(data: bytes, experiment_id: str) -> Dict[str, Any]:
    """The document of an experiment. Raises ReadError if data is not a valid one."""
    return checked_experiment(decode_json(data, "it"), experiment_id)


def warn_of_skipped(key: str, reason: str) -> None:
    """Warn that a document cannot be used."""
    console.warning("Skipped %s: %s." % (escape_control(key), reason))


def ignore_skipped(key: str, reason: str) -> None:
    """Say nothing of a document that cannot be used: its user does not need it, or has been warned."""


class Repository:
    """Experiments and checkpoints in a storage. The README describes the layout.

    pending: the repository on disk that holds what has not been uploaded to this one yet.
    """

    def __init__(self, url: str, storage: Optional[Storage] = None, pending: Optional[Repository] = None) -> None:
        self.url = url
        self.storage = storage or open_storage(url)
        self.pending = pending

    # -- the format version

    def check_version(self) -> bool:
        """Whether anybody has written to it. Raises IncompatibleRepositoryVersion, CorruptedRepositorySpec."""
        try:
            data = self.storage.read("repository.json")
        except DoesNotExist:
            return False
        try:
            version = decode_json(data, "repository.json")["version"]
            if type(version) is not int or version < 1:
                raise ReadError("its version is not a number")
        except (ReadError, TypeError, KeyError) as error:
            raise CorruptedRepositorySpec("The file repository.json of %s is damaged: it should be {\"version\": 1}." %
                                          self.url) from error
        if version > REPOSITORY_VERSION:
            raise IncompatibleRepositoryVersion(
                "The repository %s has format version %d, but Replicate %s only knows version %d: install a newer one." %
                (self.url, version, __version__, REPOSITORY_VERSION))
        return True

    def prepare(self) -> None:
        """Make it ready for recording. Raises WriteError, and like check_version()."""
        exists = self.check_version()
        remove_leftovers(self)
        self.storage.prepare()
        if not exists:
            self.storage.write("repository.json", encode_json({"version": REPOSITORY_VERSION}, indent=None))

    # -- documents

    def create(self, document: Dict[str, Any]) -> None:
        """Store the document of a new experiment."""
        self.storage.write(document_key(document["id"]), DocumentText(document).data())

    def load(self, experiment_id: str) -> Dict[str, Any]:
        """The document of an experiment, merged with its journals. Raises DoesNotExist, ReadError."""
        waiting = self._contents(self.journals().get(experiment_id, ()))  # before the document, into which they are folded
        try:
            data = self.storage.read(document_key(experiment_id))
        except DoesNotExist as error:
            raise DoesNotExist("Experiment %s does not exist in %s." % (experiment_id[:SHORT_ID], self.url)) from error
        try:
            document = decode_document(data, experiment_id)
        except ReadError as error:
            raise ReadError("The document of experiment %s cannot be read: %s." % (
                experiment_id[:SHORT_ID], str(error).rstrip("."))) from error
        merge_journals(document, waiting)
        return document

    def experiments(self, skipped: Callable[[str, str], None] = warn_of_skipped,
                    ids: Optional[Container[str]] = None) -> List[Experiment]:
        """Every readable experiment (of these IDs) with all its checkpoints, oldest first; calls skipped(key, reason) for
        others.
        """
        waiting = self.journal_contents()
        entries = [entry for entry in self.document_entries(skipped) if ids is None or entry.name[:-5] in ids]
        found = list(map(Experiment, self.documents(entries, waiting, skipped)))
        return sorted(found, key=lambda experiment: (canonical_time(experiment._document["created"]), experiment.id))

    def document_entries(self, skipped: Callable[[str, str], None] = warn_of_skipped) -> List[Entry]:
        """The entries of the documents; calls skipped(key, reason) for each file with another kind of name."""
        entries = []
        for entry in self.storage.list(EXPERIMENTS):
            if entry.name.endswith(".json") and is_id(entry.name[:-5]):
                entries.append(entry)
            else:
                skipped(entry.key, "its name is not that of an experiment")
        return entries

    def documents(self, entries: Sequence[Entry], waiting: Dict[str, List[bytes]],
                  skipped: Callable[[str, str], None] = warn_of_skipped) -> Iterator[Dict[str, Any]]:
        """Yield the documents of these entries, merged with their journals; call skipped(key, reason) for unreadable ones.

        waiting: see journal_contents().
        """
        def read(entry: Entry) -> Any:
            try:
                return decode_document(self.storage.read(entry.key, entry), entry.name[:-5])
            except ReplicateError as error:
                return error

        for entry, document in zip(entries, self.storage.in_parallel(read, entries)):
            if isinstance(document, DoesNotExist):  # somebody removed it meanwhile
                continue
            if isinstance(document, ReplicateError):
                skipped(entry.key, str(document).rstrip("."))
                continue
            if document["id"] in waiting:
                merge_journals(document, waiting[document["id"]])
            yield document

    def waiting(self) -> List[str]:
        """The IDs of the experiments that this project has not uploaded yet, or not completely."""
        entries = self.pending.storage.list(EXPERIMENTS) if self.pending else ()
        return [entry.name[:-5] for entry in entries]

    # -- heartbeats

    def beat(self, experiment_id: str) -> None:
        """Mark an experiment as running now."""
        self.storage.write(heartbeat_key(experiment_id), encode_json(
            {"experiment_id": experiment_id, "last_heartbeat": timestamp()}, indent=None))

    def running(self) -> Set[str]:
        """The IDs of the experiments whose last heartbeat is recent."""
        return {entry.name[:-5] for entry in self.storage.list(HEARTBEATS)
                if entry.name.endswith(".json") and self.is_recent(entry)}

    def is_running(self, experiment_id: str) -> bool:
        """Whether the last heartbeat of an experiment is recent."""
        try:
            return self.is_recent(self.storage.stat(heartbeat_key(experiment_id)))
        except DoesNotExist:
            return False

    def is_recent(self, entry: Entry) -> bool:
        """Whether a heartbeat is recent: on disk by its content, on a bucket by its modification time there."""
        if not self.storage.has_journals:
            return entry.modified > time.time() + self.storage.clock_skew - HEARTBEAT_TIMEOUT
        try:
            beat = parse_time(decode_json(self.storage.read(entry.key), entry.key)["last_heartbeat"])
        except (ReplicateError, TypeError, KeyError, ValueError):
            return False
        return beat.timestamp() > time.time() - HEARTBEAT_TIMEOUT

    # -- journals

    def journals(self) -> Dict[str, List[str]]:
        """The keys of each experiment's journals, oldest first."""
        found: Dict[str, List[str]] = {}
        for entry in self.storage.list(JOURNALS) if self.storage.has_journals else ():
            experiment_id, _, rest = entry.name.partition(".")
            if is_id(experiment_id) and rest.endswith(".jsonl"):
                found.setdefault(experiment_id, []).append(entry.key)
        return {experiment_id: sorted(keys) for experiment_id, keys in found.items()}

    def journal_contents(self) -> Dict[str, List[bytes]]:
        """The contents of each experiment's journals. Read them before the documents, into which they are folded."""
        return {experiment_id: self._contents(keys) for experiment_id, keys in self.journals().items()}

    def _contents(self, keys: Iterable[str]) -> List[bytes]:
        contents = []
        for key in keys:
            try:
                contents.append(self.storage.read(key))
            except ReplicateError:  # folded since it was listed
                continue
        return contents

    def fold(self, experiment_id: str, keys: Sequence[str], text: Optional[DocumentText] = None,
             more: bytes = b"", final: Optional[Dict[str, Any]] = None) -> Optional[DocumentText]:
        """Merge these journals, `more` journal lines and final keys into a document, and return its text.

        text: what the last fold() returned; saves parsing a document that nobody else changed.
        Raises ExperimentGone if the document is gone, WriteError, ReadError.
        """
        def change(old: Optional[bytes]) -> Optional[bytes]:
            nonlocal text
            if old is None:
                raise ExperimentGone("Experiment %s was removed from %s." % (experiment_id[:SHORT_ID], self.url))
            if text is None or text.data() != old:
                text = DocumentText(decode_document(old, experiment_id))
            text.merge(self._contents(keys) + [more], final or {})
            data = text.data()
            return data if data != old else None

        self.storage.update(document_key(experiment_id), change)
        return text

    # -- changing and removing

    def remove_experiment(self, experiment: Experiment) -> None:
        """Remove an experiment and all that belongs to it, its document last. Raises WriteError."""
        ids = [experiment.id] + [checkpoint.id for checkpoint in experiment.checkpoints]
        keys = [archive_key("checkpoints", item_id) for item_id in ids[1:]]
        keys += [archive_key("experiments", experiment.id), heartbeat_key(experiment.id)]
        self.storage.delete(keys + self.journals().get(experiment.id, []) + self._temporary_keys(ids))
        self.storage.remove(document_key(experiment.id))

    def remove_checkpoint(self, experiment: Experiment, checkpoint: Checkpoint) -> None:
        """Remove a checkpoint's files, then its entry in the document. Raises WriteError."""
        self.storage.delete([archive_key("checkpoints", checkpoint.id)] + self._temporary_keys([checkpoint.id]))

        def change(document: Dict[str, Any]) -> None:
            for key in self.journals().get(experiment.id, ()):
                self._append_removal(key, checkpoint.id)
            document["checkpoints"] = [item for item in document.get("checkpoints") or () if item["id"] != checkpoint.id]

        try:
            self.edit(experiment.id, change)
        except DoesNotExist:  # somebody removed the experiment meanwhile
            pass

    def edit(self, experiment_id: str, change: Callable[[Dict[str, Any]], Any]) -> None:
        """Store the document of an experiment after change(document) has changed it. Raises DoesNotExist, WriteError."""
        def changed(old: Optional[bytes]) -> Optional[bytes]:
            if old is None:
                raise DoesNotExist("Experiment %s does not exist in %s." % (experiment_id[:SHORT_ID], self.url))
            document = decode_document(old, experiment_id)
            change(document)
            return encode_json(document)

        self.storage.update(document_key(experiment_id), changed)

    def _append_removal(self, key: str, checkpoint_id: str) -> None:
        """Note in a journal that nobody may fold this checkpoint."""
        path = self.storage.path(key)  # type: ignore[attr-defined]
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | BINARY), "ab", 0) as file:
                file.write(b"\n" + encode_json({"removed": checkpoint_id}, indent=None) + b"\n")
        except FileNotFoundError:  # folded since it was listed
            pass

    def _temporary_keys(self, ids: Sequence[str]) -> List[str]:
        """The keys of the files that killed processes left in tmp/ of these experiments and checkpoints."""
        entries = self.storage.list("tmp/") if self.storage.has_journals else ()
        return [entry.key for entry in entries if entry.name.partition(".")[0] in ids and not entry.name.endswith(".lock")]

    # -- files

    def archive(self, kind: str, item_id: str) -> Archive:
        """The archive of an experiment or checkpoint, wherever it is. Raises DoesNotExist, ReadError."""
        if self.pending is not None:
            try:
                return self.pending.archive(kind, item_id)
            except DoesNotExist:
                pass
        return Archive(self.storage, archive_key(kind, item_id))


def archives_of(experiment: Experiment, checkpoints: Sequence[Optional[Checkpoint]]) -> List[Tuple[str, str]]:
    """(kind, ID) of each archive that an experiment and these of its checkpoints should have."""
    items = [("experiments", experiment), *[("checkpoints", checkpoint) for checkpoint in checkpoints]]
    return [(kind, item.id) for kind, item in items if item and item.path]


def archive_names(layers: Sequence[Tuple[str, str]], word: str) -> str:
    """'checkpoint 1a2b3c4 and experiment 2b3c4d5' for archives_of() them, joined by a word."""
    return (" %s " % word).join("%s %s" % (kind[:-1], item_id[:SHORT_ID]) for kind, item_id in reversed(layers))


def open_saved_file(repository: Repository, experiment: Experiment, checkpoint: Optional[Checkpoint],
                    names: Sequence[str]) -> BinaryIO:
    """A saved file with one of these names as a binary file object: the checkpoint's, else the experiment's.

    Raises DoesNotExist, ReadError.
    """
    import tempfile
    layers = archives_of(experiment, [checkpoint])
    for kind, item_id in reversed(layers):
        with reading_archive(repository, kind, item_id):
            file = tempfile.TemporaryFile()
            if any(repository.archive(kind, item_id).copy_file(name, item_id, file) for name in names):
                file.seek(0)
                return file
            file.close()
    absent = absent_files(experiment, checkpoint)
    if absent:
        raise DoesNotExist("%s Experiment %s itself has no file %s." % (absent, experiment.short_id(), names[0]))
    raise DoesNotExist("There is no file %s in %s." % (
        names[0], archive_names(layers, "or") or "experiment " + experiment.short_id()))


def absent_files(experiment: Experiment, checkpoint: Optional[Checkpoint]) -> str:
    """A sentence about a checkpoint without files; empty if it has some, or if no checkpoint of the experiment has."""
    if not checkpoint or checkpoint.path:
        return ""
    if checkpoint.pruned:
        return pruned_files(checkpoint)
    others = CheckpointList(item for item in experiment.checkpoints if item.path)
    best, latest = others.best(), others.latest()
    if not latest:
        return ""
    return "Checkpoint %s saved no files; the %s one that did is %s (step %d)." % (
        checkpoint.short_id(), "best" if best else "latest", (best or latest).short_id(), (best or latest).step)


def pruned_files(checkpoint: Checkpoint) -> str:
    """A sentence about the files of a pruned checkpoint."""
    return "The files of checkpoint %s (%s) were pruned; only its metrics were kept." % (
        checkpoint.short_id(), checkpoint.pruned)


def stored_archives(storage: Storage, kind: str) -> Dict[str, Entry]:
    """The archives of a kind, 'experiments' or 'checkpoints', by the ID of their owner."""
    names = [(entry.name.partition("."), entry) for entry in storage.list(kind + "/")]
    return {item_id: entry for (item_id, _, ending), entry in names if is_id(item_id) and ending == "tar.gz"}


# What killed processes leave on a disk.

def live_lock(storage: DiskStorage, experiment_id: str) -> FileLock:
    """The lock that a process holds while it records an experiment here. The file holds the machine's name."""
    return FileLock(storage.path("tmp/" + experiment_id + LIVE_LOCK))


def remove_leftovers(repository: Repository) -> None:
    """Remove the temporary files and heartbeats of killed processes from a disk, as far as permissions allow."""
    storage = repository.storage
    if not isinstance(storage, DiskStorage):
        return
    try:
        for entry, lock in storage.leftovers("tmp/"):
            try:
                experiment_id = entry.name[:-len(LIVE_LOCK)]
                if entry.name.endswith(LIVE_LOCK) and is_id(experiment_id) and lock.is_held:
                    if storage.read(entry.key) == os.fsencode(platform.node()):  # locks may not reach other machines
                        storage.delete([heartbeat_key(experiment_id)])
            finally:
                lock.release()
        storage.delete([entry.key for entry in storage.list(HEARTBEATS)
                        if is_id(entry.name[:-5]) and not repository.is_recent(entry)])
    except ReplicateError as error:
        console.debug(str(error))


def fold_abandoned(repository: Repository) -> None:
    """Fold the journals of killed processes and remove what else they left, as far as permissions allow."""
    storage = repository.storage
    if not isinstance(storage, DiskStorage):
        return
    remove_leftovers(repository)
    for entry, lock in storage.leftovers(JOURNALS):
        experiment_id = entry.name.partition(".")[0]
        if is_id(experiment_id) and entry.name.endswith(".jsonl"):
            try:
                repository.fold(experiment_id, [entry.key])
            except (ExperimentGone, DoesNotExist):
                pass
            except ReplicateError as error:
                console.debug("A journal could not be folded: %s" % error)
                continue
            lock.release()


class Usage:
    """The bytes that archives take: code and weights by experiment, unowned for each archive without one."""

    def __init__(self, storage: Storage, rows: Sequence[Row]) -> None:
        code, weights = stored_archives(storage, "experiments"), stored_archives(storage, "checkpoints")
        owners = {digits: row.id for row in rows for digits in row.checkpoint_ids.split()}
        self.code = {row.id: code.pop(row.id).size if row.id in code else 0 for row in rows}
        self.weights = dict.fromkeys(self.code, 0)
        self.unowned = [entry.size for entry in code.values()]
        for item_id, entry in weights.items():
            owner = owners.get(item_id[:ROW_ID_DIGITS])
            if owner is None:
                self.unowned.append(entry.size)
            else:
                self.weights[owner] += entry.size

    def total(self, experiment_id: str) -> int:
        """The bytes of one experiment."""
        return self.code[experiment_id] + self.weights[experiment_id]


class Pruning:
    """The checkpoints of an experiment that lose their files; their metrics stay."""

    def __init__(self, experiment: Experiment, archives: Dict[str, Entry], keep_best: int, keep_latest: int) -> None:
        items = [checkpoint._document for checkpoint in experiment.checkpoints]
        self.experiment = experiment
        self.ids = [item["id"] for item in prunable(items, keep_best, keep_latest)]
        self.ids += [checkpoint.id for checkpoint in experiment.checkpoints  # an earlier pruning was killed
                     if checkpoint.pruned and checkpoint.id in archives]
        self._sizes = {item_id: archives[item_id].size for item_id in self.ids if item_id in archives}
        self.bytes = sum(self._sizes.values())

    def run(self, repository: Repository) -> Tuple[int, int]:
        """Mark the checkpoints as pruned in the document, then remove their archives. Return (checkpoints, bytes) removed.

        Raises DoesNotExist, ReadError, WriteError.
        """
        noted: Set[str] = set()

        def change(document: Dict[str, Any]) -> None:
            items = document.get("checkpoints") or ()
            strip_files(items, self.ids)
            noted.update(item["id"] for item in items if not item.get("path"))

        repository.edit(self.experiment.id, change)
        ids = [item_id for item_id in self.ids if item_id in noted]
        repository.storage.delete([archive_key("checkpoints", item_id) for item_id in ids])
        return len(ids), sum(self._sizes.get(item_id, 0) for item_id in ids)


LEFTOVER_SECONDS = 86400.0  # before what nobody locks is a leftover; an archive without a document, too: it is written first


class Verification:
    """Checks everything in a repository, and collects the faults."""

    def __init__(self, repository: Repository, fix: bool) -> None:
        self.repository, self.fix = repository, fix
        self.storage = repository.storage
        self.faults: List[Tuple[str, str]] = []  # (key, what is wrong)
        self.removed: List[str] = []             # keys

    def fault(self, key: str, reason: str) -> None:
        """Note what is wrong with an object."""
        self.faults.append((key, reason))

    def run(self) -> Tuple[int, List[Tuple[str, str, Experiment]]]:
        """Check all but the archives of experiments; return (number of experiments, those archives)."""
        self._killed_processes()
        experiments = self.repository.experiments(self.fault)
        present = {entry.name[:-5] for entry in self.storage.list(EXPERIMENTS)}
        limit = self._age_limit(experiments)

        def unowned(kind: str, owned: Container[str]) -> List[str]:
            return [archive_key(kind, item_id) for item_id, entry in stored_archives(self.storage, kind).items()
                    if item_id not in owned and entry.modified < limit]

        self._leftovers(unowned("experiments", present))
        if len(experiments) == len(present):  # else the archive may belong to one that cannot be read
            checkpoints = [checkpoint for experiment in experiments for checkpoint in experiment.checkpoints]
            self._leftovers(unowned("checkpoints", {checkpoint.id for checkpoint in checkpoints if not checkpoint.pruned}))
        self._leftovers([entry.key for entry in self.storage.list(HEARTBEATS)
                         if entry.name[:-5] not in present and not self.repository.is_recent(entry)])
        return len(present), [(*place, experiment) for experiment in experiments
                              for place in archives_of(experiment, experiment.checkpoints)]

    def _age_limit(self, experiments: Sequence[Experiment]) -> float:
        """The time in seconds since the epoch before which an archive without a document is a leftover.

        A running experiment may still be uploading, or waiting for disk space.
        """
        running = self.repository.running()
        since = [experiment.created.timestamp() for experiment in experiments if experiment.id in running]
        if len(since) < len(running):
            return 0.0
        return min([time.time() + self.storage.clock_skew - LEFTOVER_SECONDS, *since])

    def _killed_processes(self) -> None:
        """Report or clean up what killed processes left on a disk."""
        if not isinstance(self.storage, DiskStorage):
            return
        for entry, lock in self.storage.leftovers("tmp/"):
            if self.fix:
                self.removed.append(entry.key)
                lock.release()
            else:
                self.fault(entry.key, "no experiment uses it; --fix removes it")
        if self.fix:
            fold_abandoned(self.repository)
        for entry, _ in self.storage.leftovers(JOURNALS):
            self.fault(entry.key, "a killed run left it; --fix folds it into its experiment")

    def _leftovers(self, keys: Sequence[str]) -> None:
        """Report or remove objects that no experiment uses."""
        if self.fix:
            self.storage.delete(keys)
            self.removed += keys
            return
        for key in keys:
            self.fault(key, "no experiment uses it; --fix removes it")

    def check_archives(self, places: Sequence[Tuple[str, str, Experiment]]) -> None:
        """Read these archives in full, and compare them with their checksums."""
        def problem(place: Tuple[str, str, Experiment]) -> Optional[str]:
            kind, item_id, experiment = place
            try:
                with reading_archive(self.repository, kind, item_id):
                    archive = self.repository.archive(kind, item_id)
                    found = archive.read_sums(item_id, progress.add)
                    if archive.table and found != archive.sums(item_id):
                        return "its files differ from its table of contents"
                    if archive.has_lost_table():
                        return "its table of contents is damaged; its files are not"
                    if kind == "experiments" and experiment.code not in (None, code_digest(found)):
                        return "its files differ from those that the experiment recorded"
            except DoesNotExist:
                is_expected = self._is_expected(kind, item_id, experiment.id)
                return "it is missing; experiment %s needs it" % experiment.short_id() if is_expected else None
            except ReadError as error:
                cause = error.__cause__ or error
                reason = short_reason(cause).rstrip(".").rpartition("decompressing data: ")[2]
                return reason if isinstance(cause, (ReplicateError, EOFError)) else "it is damaged: " + reason
            return None

        with Progress("Verifying", 0) as progress:
            for (kind, item_id, _), reason in zip(places, in_threads(problem, places)):
                if reason:
                    self.fault(archive_key(kind, item_id), reason)

    def _is_expected(self, kind: str, item_id: str, experiment_id: str) -> bool:
        """Whether an experiment should still have an archive: somebody may have removed or pruned it meanwhile."""
        try:
            now = Experiment(self.repository.load(experiment_id))
        except DoesNotExist:
            return False
        return (kind, item_id) in archives_of(now, now.checkpoints)


# Rows list experiments, and find them by name or ID.

def list_rows(repository: Repository) -> List[Row]:
    """A row for each readable experiment, oldest first. Reads only documents that changed since the last listing."""
    storage = repository.storage
    running, waiting = repository.running(), repository.journal_contents()
    listed = time.time()
    entries = {entry.name[:-5]: entry for entry in repository.document_entries()}
    cache = RowCache(repository.url)
    cached = cache.rows()
    found = {row.id: row for row in cached
             if row.id in entries and row.id not in waiting and row.version == entries[row.id].version}
    stale = [entry for experiment_id, entry in entries.items() if experiment_id not in found]
    new: Dict[str, Row] = {}
    if not storage.has_journals and len(stale) >= INDEX_MIN_STALE:  # one object instead of many documents
        new = {row.id: row for row in read_index(storage, stale)}
    missing = [entry for entry in stale if entry.name[:-5] not in new]
    for document in repository.documents(missing, waiting):
        entry = entries[document["id"]]
        is_settled = not storage.has_journals or entry.modified < listed - RowCache.SETTLED_SECONDS
        new[document["id"]] = Row.of(document, entry.version if is_settled and document["id"] not in waiting else "")
    if new or len(cached) > len(found):
        cache.update([row for row in new.values() if row.version], entries)
    found.update(new)
    if not storage.has_journals and len(missing) >= max(INDEX_MIN_STALE, len(entries) // 10):
        write_index(storage, found.values())
    for experiment_id in running & found.keys():
        found[experiment_id].running = True
    return sorted(found.values(), key=lambda row: (canonical_time(row.summary["created"]), row.id))


def find_item(repository: Repository, name: str) -> Tuple[Experiment, Optional[Checkpoint]]:
    """The experiment of that name, or the experiment or checkpoint (with its experiment) whose ID starts with it.

    Raises DoesNotExist.
    """
    return find_items(repository, [name])[0]


def find_items(repository: Repository, names: Sequence[str]) -> List[Tuple[Experiment, Optional[Checkpoint]]]:
    """Find each of several names like find_item(). Raises DoesNotExist for the first that fits none or several."""
    from functools import lru_cache
    rows: Optional[List[Row]] = None

    @lru_cache(maxsize=None)
    def load(experiment_id: str) -> Experiment:
        return Experiment(repository.load(experiment_id))

    found: List[Tuple[Experiment, Optional[Checkpoint]]] = []
    for name in names:
        if len(name) == 64 and is_id(name):  # a whole ID, as `ls -q` prints it, needs no search
            try:
                found.append((load(name), None))
                continue
            except DoesNotExist:
                pass
        if rows is None:
            rows = list_rows(repository)
        matches = _matches(name, rows, load)
        if not matches:
            if name and any(experiment_id.startswith(name) for experiment_id in repository.waiting()):
                hint = " It has not been uploaded yet: run '%s push'." % program_name()
            else:
                hint = nearest(name, filter(None, (text_in(row.summary, "name") for row in rows)))
            raise DoesNotExist("Experiment or checkpoint not found: %s.%s" % (name or "the ID is empty", hint))
        if len(matches) > 1:
            raise _ambiguous(name, matches)
        found.append(matches[0])
    return found


def _matches(name: str, rows: Sequence[Row],
             load: Callable[[str], Experiment]) -> List[Tuple[Experiment, Optional[Checkpoint]]]:
    """The experiments of that name, or those and the checkpoints whose ID it is or else starts with it."""
    if not is_id(name):
        return [(load(row.id), None) for row in rows if name and text_in(row.summary, "name") == name]
    found: List[Tuple[Experiment, Optional[Checkpoint]]] = []
    for row in rows:
        if row.id.startswith(name):
            found.append((load(row.id), None))
        if row.may_have_checkpoint(name):
            found += [(load(row.id), checkpoint) for checkpoint in load(row.id).checkpoints if checkpoint.id.startswith(name)]
    return [match for match in found if (match[1] or match[0]).id == name] or found


def _ambiguous(name: str, matches: Sequence[Tuple[Experiment, Optional[Checkpoint]]]) -> DoesNotExist:
    """The error for a name or the start of an ID that fits several."""
    digits = max(SHORT_ID, len(name) + 3) if is_id(name) else SHORT_ID
    kinds = ["%s %s" % ("checkpoint" if checkpoint else "experiment", (checkpoint or experiment).id[:digits])
             for experiment, checkpoint in matches]
    return DoesNotExist("The %s is ambiguous: it could be %s%s. Type %s." % (
        "ID " + name if is_id(name) else "name %r" % name, " or ".join(kinds[:5]),
        " or %d more" % (len(kinds) - 5) if len(kinds) > 5 else "", "more of it" if is_id(name) else "one of these IDs"))


class RowCache:
    """An SQLite file with the rows of a repository that this user has listed.

    A row counts only while its document has the same version. If the file is locked, read-only, damaged or on a full disk,
    or Python has no sqlite3, there is no cache: never an error or a long wait.
    """

    FORMAT = 5
    LOCK_SECONDS = 0.1         # to wait for another command
    MAX_FILES = 64             # repositories in the cache directory
    BATCH = 500                # rows to parse together, so that they share the texts of their keys
    SETTLED_SECONDS = 2.0      # a file that changed more recently may change again and look the same

    def __init__(self, url: str) -> None:
        name = re.sub(r"[^A-Za-z0-9.-]+", "-", url)[-100:]
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        self._path = os.path.join(base, "replicate", "%s-%08x.%d" % (name, zlib.crc32(os.fsencode(url)), self.FORMAT))

    def rows(self) -> List[Row]:
        """Every row in the file."""
        def read(database: Any) -> List[Row]:
            cursor = database.execute("SELECT version, summary, checkpoints, checksum FROM rows")
            found: List[Row] = []
            for batch in iter(lambda: cursor.fetchmany(self.BATCH), []):
                versions, summaries, checkpoint_ids, checksums = zip(*batch)
                if list(checksums) != list(map(self._checksum, versions, summaries, checkpoint_ids)):
                    raise ValueError("a checksum is wrong")
                found += map(Row, json.loads("[%s]" % ",".join(summaries)), versions, checkpoint_ids)
            return found

        return (self._attempt(read) if os.path.exists(self._path) else None) or []

    def update(self, new: Sequence[Row], present: Container[str]) -> None:
        """Store new rows, and remove those of experiments that are not present any more."""
        def write(database: Any) -> None:
            database.execute("BEGIN IMMEDIATE")
            database.execute("CREATE TABLE IF NOT EXISTS rows (id TEXT PRIMARY KEY, version TEXT, summary TEXT, "
                             "checkpoints TEXT, checksum INTEGER)")
            gone = [found for found in database.execute("SELECT id FROM rows") if found[0] not in present]
            database.executemany("DELETE FROM rows WHERE id = ?", gone)
            encode = json.JSONEncoder(separators=(",", ":")).encode
            for row in new:
                values = (row.version, encode(row.summary), row.checkpoint_ids)
                database.execute("INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?, ?)",
                                 (row.id, *values, self._checksum(*values)))
            database.execute("COMMIT")

        if not os.path.exists(self._path):
            self._make_room()
        self._attempt(write)

    @staticmethod
    def _checksum(*values: str) -> int:
        return zlib.crc32("\0".join(values).encode("utf-8", "surrogatepass"))

    def _attempt(self, work: Callable[[Any], Any]) -> Any:
        """What work(database) returns; None if the cache cannot be used."""
        try:
            import sqlite3
        except ImportError:
            return None
        try:
            database = sqlite3.connect(self._path, timeout=self.LOCK_SECONDS, isolation_level=None)
            try:
                database.execute("PRAGMA synchronous = OFF")  # a power cut may cost the cache, and nothing else
                return work(database)
            finally:
                database.close()
        except sqlite3.OperationalError as error:  # locked, read-only, no table yet, a full disk
            console.debug("The cache %s cannot be used: %s" % (self._path, error))
        except (sqlite3.Error, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            console.debug("The cache %s is damaged: %s" % (self._path, error))
            remove_file(self._path)
        return None

    def _make_room(self) -> None:
        """Make the private directory and an empty file, and remove the oldest of too many files."""
        directory = os.path.dirname(self._path)
        try:
            os.makedirs(directory, 0o700, exist_ok=True)
            os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600))
            files = sorted(os.scandir(directory), key=lambda entry: entry.stat().st_mtime)
            for entry in files[:-self.MAX_FILES]:
                remove_file(entry.path)
        except OSError as error:
            console.debug("The cache cannot be written: %s" % error)


# The index of a bucket is an object with the rows of its experiments, for machines that have never listed it: one line per
# experiment, `<ID> <version> <JSON>`, gzipped. Others write it, so it is checked like their documents.

INDEX = "index/rows-1.gz"
INDEX_MIN_STALE = 100            # changed documents that make it worth reading or writing
INDEX_MAX_BYTES = 512 << 20      # when unpacked


def read_index(storage: Storage, entries: Iterable[Entry]) -> Iterator[Row]:
    """Yield the rows of those entries whose version is in the index."""
    try:
        data = b"".join(_limited(gunzip(storage.open(INDEX)), INDEX_MAX_BYTES))
    except (ReplicateError, EOFError, zlib.error):  # there is none, or it is damaged
        return
    lines = dict(line.split(b" {", 1) for line in data.split(b"\n") if b" {" in line)
    for entry in entries:
        try:
            summary = decode_json(b"{" + lines[_index_key(entry.name[:-5], entry.version)], "a row")
            checkpoint_ids = summary.pop("checkpoint_ids")
            if type(checkpoint_ids) is str:
                yield Row(checked_summary(summary, entry.name[:-5]), entry.version, checkpoint_ids)
        except (ReadError, KeyError, TypeError, AttributeError):
            continue


def write_index(storage: Storage, rows: Iterable[Row]) -> None:
    """Write the index for others, if this user may."""
    lines = [b"%s %s" % (_index_key(row.id, row.version), encode_json(
        dict(row.summary, checkpoint_ids=row.checkpoint_ids), indent=None)) for row in rows]
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    try:
        storage.write(INDEX, packer.compress(b"\n".join(lines)) + packer.flush())
    except ReplicateError as error:
        console.debug("The index was not written: %s" % error)


def _index_key(experiment_id: str, version: str) -> bytes:
    """The start of a line."""
    return ("%s %s" % (experiment_id, version)).encode("utf-8", "replace")


class DocumentText:
    """An experiment document as stored, to which checkpoints are added without encoding the others again."""

    def __init__(self, document: Dict[str, Any]) -> None:
        checkpoints = document.get("checkpoints")
        self._ids = {item["id"] for item in checkpoints or ()}
        self._header = {key: value for key, value in document.items() if key != "checkpoints"}
        self._checkpoints = encoded_checkpoints(checkpoints)

    def data(self) -> bytes:
        """The whole text."""
        header = encode_json(dict(self._header, checkpoints=0))[:-len(b"0\n}")]
        return b"%s%s\n}" % (header, self._checkpoints)

    def merge(self, journals: Iterable[bytes], final: Dict[str, Any]) -> None:
        """Do what merge_journals() does, and add final keys."""
        new, pruned = read_journals(journals, self._ids)
        if pruned & self._ids:
            items = json.loads(self._checkpoints)
            strip_files(items, pruned)
            self._checkpoints = encoded_checkpoints(items)
        if new:
            lines = encoded_checkpoints(new)
            self._checkpoints = self._checkpoints[:-len(b"\n ]")] + b"," + lines[1:] if self._ids else lines
            self._ids.update(item["id"] for item in new)
        note_pruned(self._header, pruned - self._ids)
        merge_final_keys(self._header, final)


def encoded_checkpoints(items: Optional[Sequence[Dict[str, Any]]]) -> bytes:
    """The value of `checkpoints` in a document."""
    return encode_json(items).replace(b"\n", b"\n ")  # no JSON string holds a line break


@contextmanager
def reading_archive(repository: Repository, kind: str, item_id: str) -> Iterator[None]:
    """Turn what is wrong with an archive into a ReadError or DoesNotExist that names it."""
    name = "%s %s" % (kind[:-1], item_id[:SHORT_ID])
    try:
        yield
    except DoesNotExist as error:
        raise DoesNotExist("The files of %s are gone from %s: its archive is missing." % (name, repository.url)) from error
    except (ReadError, EOFError, UnicodeError, ValueError, OverflowError, tarfile.TarError, zlib.error) as error:
        raise ReadError("The archive of %s in %s cannot be used: %s." % (
            name, repository.url, short_reason(error).rstrip("."))) from error


# `diff` and resuming compare two sets of files, each a SavedFiles or a PresentFiles.

MAX_TEXT_BYTES = 1 << 20      # of a file to compare by lines, if it has no null character near its start
MAX_TEXT_LINES = 20000
MAX_TEXTS_BYTES = 64 << 20    # of all such files


class SavedFiles:
    """The files in one archive of a repository; sums: (size, CRC-32) by name."""

    def __init__(self, repository: Repository, kind: str, item_id: str) -> None:
        """Raises DoesNotExist, ReadError."""
        self._place = repository, kind, item_id
        with reading_archive(*self._place):
            self._archive = repository.archive(kind, item_id)
            self.sums = self._archive.sums(item_id)

    def contents(self, names: Iterable[str]) -> Dict[str, bytes]:
        """The content of each of these files. Raises ReadError."""
        with reading_archive(*self._place):
            return self._archive.contents(self._place[2], {name: self.sums[name][0] for name in names})


class PresentFiles:
    """The files that would be saved now; sums: (size, CRC-32) by name."""

    def __init__(self, sources: Iterable[Source]) -> None:
        self._sources = {source.name: source for source in sources}
        self.sums: Dict[str, Tuple[int, int]] = {}
        for name, source in self._sources.items():
            size = crc = 0
            try:
                with open_regular(source.path) as file:
                    for piece in iter(lambda: file.read(COPY_BYTES), b""):
                        size, crc = size + len(piece), zlib.crc32(piece, crc)
            except Unreadable:  # it would not be saved
                continue
            self.sums[name] = size, crc

    def contents(self, names: Iterable[str]) -> Dict[str, bytes]:
        """The content of each of these files. Raises OSError."""
        found = {}
        for name in names:
            with open_regular(self._sources[name].path) as file:
                found[name] = read_up_to(file, MAX_TEXT_BYTES)
        return found


class FileChange:
    """A file that differs between an old and a new set of files."""

    def __init__(self, name: str, sizes: Tuple[Optional[int], Optional[int]]) -> None:
        self.name, self.sizes = name, sizes  # bytes; None where there is no such file
        self.lines: Optional[List[bytes]] = None  # of a unified diff; None for a binary or large file

    @property
    def kind(self) -> str:
        """'added', 'removed' or 'changed'."""
        return "added" if self.sizes[0] is None else "removed" if self.sizes[1] is None else "changed"

    def to_json(self) -> Dict[str, Any]:
        """The element of `diff --json`: sizes in bytes, and for a text how many lines were added and removed."""
        added, removed = self.counts()
        lines = {} if self.lines is None else {"lines_added": added, "lines_removed": removed}
        return dict({"change": self.kind, "old_size": self.sizes[0], "new_size": self.sizes[1]}, **lines)

    def counts(self) -> Tuple[int, int]:
        """How many lines were added and removed."""
        body = [line[:1] for line in self.lines or ()]
        return body.count(b"+"), body.count(b"-")


def changed_names(old: Any, new: Any) -> List[str]:
    """The names of the files that differ between two sets of files, sorted."""
    return [name for name in sorted(old.sums.keys() | new.sums.keys()) if old.sums.get(name) != new.sums.get(name)]


def compare_files(old: Any, new: Any, wanted: Callable[[str], bool] = lambda name: True) -> List[FileChange]:
    """The changes from one set of files to another, sorted by name. Raises ReadError, OSError."""
    changes = [FileChange(name, (old.sums.get(name, (None,))[0], new.sums.get(name, (None,))[0]))
               for name in changed_names(old, new) if wanted(name)]
    room, texts = MAX_TEXTS_BYTES, []
    for change in changes:
        sizes = [size for size in change.sizes if size is not None]
        room -= sum(sizes)
        if max(sizes) <= MAX_TEXT_BYTES and room >= 0:
            texts.append(change)
    before = old.contents([change.name for change in texts if change.sizes[0] is not None])
    after = new.contents([change.name for change in texts if change.sizes[1] is not None])
    for change in texts:
        pair = before.get(change.name), after.get(change.name)
        if not any(b"\0" in content[:8000] or content.count(b"\n") > MAX_TEXT_LINES for content in pair if content):
            change.lines = changed_lines(*pair)
    return changes


def changed_lines(old: Optional[bytes], new: Optional[bytes]) -> List[bytes]:
    """The hunks of a unified diff between two texts, as lines with their line ends."""
    import difflib
    pair = [[line + b"\n" for line in (text or b"").split(b"\n")] for text in (old, new)]
    for lines in pair:
        last = lines.pop()[:-1]  # after the last line end
        lines += [last + b"\n\\ No newline at end of file\n"] if last else []
    return list(difflib.diff_bytes(difflib.unified_diff, *pair, lineterm=b"\n"))[2:]  # type: ignore[misc,arg-type]


class Checkout:
    """Unpacks files from archives into a directory: first into a private folder there, then each file into its place."""

    def __init__(self, directory: str) -> None:
        self.directory = os.path.abspath(directory)
        self._new: List[str] = []  # directories that do not exist yet
        folder = self.directory
        while not os.path.lexists(folder):
            self._new.append(folder)
            folder = os.path.dirname(folder)
        self._staging = ""
        self.files: Set[str] = set()  # the names of the staged files

    def __enter__(self) -> Checkout:
        import tempfile
        try:
            os.makedirs(self.directory, exist_ok=True)
            self._remove_leftovers()
            self._staging = tempfile.mkdtemp(prefix="%s%d-" % (self._staging_prefix(), os.getpid()), dir=self.directory)
        except OSError as error:
            reason = "it is not a directory" if isinstance(error, FileExistsError) else short_reason(error)
            raise WriteError("%s cannot be written: %s." % (self.directory, reason)) from error
        return self

    def __exit__(self, *exc_info: Any) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)
        for folder in self._new:
            try:
                os.rmdir(folder)  # only if it is still empty
            except OSError:
                break

    @staticmethod
    def _staging_prefix() -> str:
        """How the names of this machine's staging folders start: another machine may check out into a shared folder, too."""
        return "%s%08x-" % (STAGING_PREFIX, zlib.crc32(os.fsencode(platform.node())))

    def _remove_leftovers(self) -> None:
        """Remove the staging folders of processes of this machine that were killed."""
        prefix = self._staging_prefix()
        for name in os.listdir(self.directory):
            pid = name[len(prefix):].partition("-")[0]
            if name.startswith(prefix) and pid.isdecimal() and not process_is_alive(int(pid)):
                shutil.rmtree(os.path.join(self.directory, name), ignore_errors=True)  # it leaves links alone

    def stage(self, repository: Repository, layers: Sequence[Tuple[str, str]], path: Optional[str], quiet: bool) -> None:
        """Unpack all files of archives, or those at or below path; the last archive that has a file wins.

        If path is a directory of which a later archive has files, an earlier archive that is gone only draws a warning.
        Raises DoesNotExist if an archive or path does not exist, ReadError, WriteError.
        """
        names: List[str] = []  # to suggest the nearest one

        def wanted(name: str) -> bool:
            if len(names) < SUGGESTED_NAMES:
                names.append(name)
            return name not in staged and (path is None or name == path or name.startswith(path + "/"))

        with Progress("Checking out", 0, quiet) as progress:
            for kind, item_id in reversed(layers):
                staged = frozenset(self.files)
                try:
                    with reading_archive(repository, kind, item_id):
                        archive = repository.archive(kind, item_id)
                        progress.total += archive.size
                        self.files |= unpack_to(self._staging, archive.files(wanted, item_id, path), progress)
                except DoesNotExist as error:
                    if not (path and self.files):
                        raise
                    console.warning("%s Only the checkpoint's own files are checked out." % error)
                except OSError as error:
                    raise WriteError("%s cannot be written: %s." % (self.directory, short_reason(error))) from error
                if path in self.files:
                    return
        if not self.files:
            owners = archive_names(layers, "or")
            raise DoesNotExist("There is no file or directory %s in %s.%s" % (path, owners, nearest(path, names)) if path
                               else "There are no files in %s." % owners)

    def check_target(self) -> None:
        """Raise WriteError if a staged file cannot be moved into place safely."""
        for name in self.files:
            parts = name.split("/")
            for depth in range(1, len(parts)):
                parent = os.path.join(self.directory, *parts[:depth])
                if os.path.islink(parent) or (os.path.lexists(parent) and not os.path.isdir(parent)):
                    raise WriteError("%s is in the way of %s: it is %s. Nothing was changed." % (
                        escape_control(parent), escape_control(name),
                        "a link" if os.path.islink(parent) else "not a directory"))
            target = self._target(name)
            if os.path.isdir(target) and not os.path.islink(target):
                raise WriteError("%s is in the way: it is a directory. Nothing was changed." % escape_control(target))

    def drop_foreign_configs(self) -> None:
        """Leave out each configuration that would make its directory use another repository, with a warning."""
        for name in [name for name in self.files if name.rpartition("/")[2] in CONFIG_NAMES]:
            folder = os.path.dirname(self._target(name))
            current = _configured_url(folder)
            saved = _configured_url(folder, self._staged(name)) if current is not None else None
            if saved != current:
                console.warning("%s is left as it is: the saved one %s." % (
                    escape_control(self._target(name)), "names another repository" if saved else "cannot be read"))
                self.files.remove(name)

    def drop_files_below(self, root: str) -> None:
        """Leave out, with a warning, what the peer saved of its own repository: it would put old documents in place of new."""
        below = place_in(os.path.realpath(self.directory), os.path.realpath(root)) + "/"
        found = {name for name in self.files if name.startswith(below)}
        if found:
            console.warning("%s is left as it is: it is the repository, not a part of the code." % root)
            self.files -= found

    def _staged(self, name: str) -> str:
        return os.path.join(self._staging, *name.split("/"))

    def _target(self, name: str) -> str:
        return os.path.join(self.directory, *name.split("/"))

    def conflicts(self) -> List[str]:
        """The names of existing files that would get other content."""
        return [name for name in sorted(self.files) if os.path.lexists(self._target(name))
                and not same_content(self._staged(name), self._target(name))]

    def move(self) -> None:
        """Move every staged file into place. Raises WriteError; the files moved before it are whole."""
        for name in sorted(self.files):
            target = self._target(name)
            try:
                os.makedirs(os.path.dirname(target), exist_ok=True)
                os.replace(self._staged(name), target)
            except OSError as error:
                raise WriteError("%s could not be replaced: %s. Run the checkout again to finish it." %
                                 (target, short_reason(error))) from error


def _configured_url(directory: str, config: Optional[str] = None) -> Optional[str]:
    """The URL that a configuration names, by default the directory's own one or its .replicate/storage.

    Returns None if there is none, '' if it cannot be read.
    """
    if config is None:
        config = _search_upward(directory, CONFIG_NAMES, 1)
        if config is None:
            storage = os.path.join(directory, DEFAULT_STORAGE)
            return "file://" + storage if os.path.exists(storage) else None
    try:
        return absolute_url(read_config(config), directory)
    except RepositoryConfigurationError:
        return ""


def same_content(left: str, right: str) -> bool:
    """Whether two paths are regular files with the same content, and the second one is no link."""
    import filecmp
    try:
        return not os.path.islink(right) and filecmp.cmp(left, right, shallow=False)
    except OSError:
        return False


def process_is_alive(pid: int) -> bool:
    """Whether a process of this machine exists."""
    if os.name == "nt":  # where os.kill() would send it Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is another user's
        pass
    return True


# ------------------------------------------------------------------------------------------------------------------
# 8  Recorder: journal, uploads, signals
# ------------------------------------------------------------------------------------------------------------------

FOLD_INTERVAL = 1.0     # seconds between two writes of a document, at least;
FOLD_SHARE = 50         # longer if a write is slow: this many times its duration,
MAX_FOLD_INTERVAL = 8   # but at most this many seconds
MAX_PACKING = 2         # archives waiting for compression before checkpoint() waits too
TERMINATION_SECONDS = 10.0  # for stopping after SIGTERM, and for waiting until a bucket answers
JOIN_SECONDS = 3.5          # the part of that for the last heartbeat: one request, see Storage.deadline

MAX_STEP = (1 << 63) - 1
MAX_LABEL_CHARACTERS = 100  # in a name or tag
MAX_ERROR_CHARACTERS = 300  # kept of the error that ended a run
SECRET_NAMES = ("token", "api-key", "password", "passwd", "secret", "secret-key", "access-key", "access-token",
                "auth-token", "api-token", "hf-token", "client-secret")
SECRET_SHAPES = (r"\b(?:(?:AKIA|ASIA)[0-9A-Z]{16}|hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|"
                 r"github_pat_[A-Za-z0-9_]{20,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}|sk-[\w-]{16,})")


def masked_command(arguments: Sequence[str]) -> str:
    """The arguments as one shell-quoted line, with `***` for each secret."""
    masked, hide_next = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        is_secret = name.lstrip("-+").replace("_", "-").lower() in SECRET_NAMES
        if hide_next and not argument.startswith("--"):
            masked.append("***")
        elif is_secret and equals:
            masked.append(shlex.quote(name + "=") + "***")
        else:
            hidden = re.sub(SECRET_SHAPES, "***", re.sub(r"(://[^/\s:@]*:)[^@/\s]+@", r"\1***@", argument))
            is_plain = hidden != argument and re.fullmatch(r"[\w@%+=:,./*-]+", hidden)
            masked.append(hidden if is_plain else shlex.quote(hidden))
        hide_next = is_secret and not equals and argument.startswith("-")
    return " ".join(masked)


def program_arguments(directory: str) -> List[str]:
    """sys.argv, with the program's path relative to the project directory if it is inside."""
    arguments = list(getattr(sys, "argv", [])) or [""]
    return [inner_path(arguments[0], directory)] + arguments[1:]


def inner_path(path: str, directory: str) -> str:
    """The path relative to the directory if it is absolute and inside; otherwise the path itself."""
    relative = os.path.relpath(path, directory) if os.path.isabs(path) else os.pardir
    return path if relative.split(os.sep)[0] == os.pardir else relative


# How to run a program again: a line to paste in the project directory, with the interpreter or launcher that ran it.

LAUNCHERS = r"python[\d.]*|uv|mpirun|mpiexec|orterun|prterun"  # torchrun, accelerate and the like are Python programs


def rerun_command(directory: str) -> Optional[str]:
    """The shell command that runs this program again from the project directory, with `***` for each secret.

    None if there is no such command: in an interactive session, a notebook, or after `python -c`.
    """
    words = (list(getattr(sys, "orig_argv", ())) or command_line(os.getpid()) or
             [sys.executable] + list(getattr(sys, "argv", [])))
    start = program_index(words)
    if start is None and os.path.isfile(sys.argv[0] if getattr(sys, "argv", None) else ""):  # multiprocessing: python -c
        words = [words[0]] + sys.argv
        start = 1
    if start is None or "ipykernel" in sys.modules:
        return None
    parent, program = command_line(os.getppid()), words[start:]
    if parent[-len(program):] == program and re.fullmatch(LAUNCHERS, os.path.basename(parent[0])):
        words = parent
    command = masked_command(typed_words(words))
    place = inner_path(START_DIRECTORY, directory)
    return command if place == os.curdir else "cd %s && %s" % (shlex.quote(place), command)


def command_line(pid: int) -> List[str]:
    """The command line of a process; [] if the system does not tell."""
    try:
        with open("/proc/%d/cmdline" % pid, "rb") as file:
            return os.fsdecode(file.read()).split("\0")[:-1]
    except OSError:
        return []


def program_index(words: Sequence[str]) -> Optional[int]:
    """The index of the script or `-m` in Python's command line; None for `-c`, standard input or no program."""
    index = 1
    while index < len(words) and re.match(r"-[^-cm]|--.", words[index]):
        index += 2 if words[index] in ("-X", "-W", "--check-hash-based-pycs") else 1
    return index if index < len(words) and not re.match(r"-(c|$)", words[index]) else None


def typed_words(words: Sequence[str]) -> List[str]:
    """A command line as a person types it: `torchrun train.py` for `/usr/bin/python3 /usr/bin/torchrun train.py`."""
    typed = [typed_path(words[0]), *words[1:]]
    start = program_index(words) if re.match("python", os.path.basename(words[0])) else None
    if start is not None:
        typed[start] = typed_path(words[start])
        if os.path.isabs(words[start]) and shutil.which(typed[start]) == words[start]:
            return typed[start:]
    return typed


def typed_path(path: str) -> str:
    """The name of a program on the search path; otherwise its path, relative to the start directory if it is inside."""
    name = os.path.basename(path)
    return name if os.path.isabs(path) and shutil.which(name) == path else inner_path(path, START_DIRECTORY)


def is_this_python(program: str) -> bool:
    """Whether this command starts the Python installation that runs this file, with the same packages."""
    path = shutil.which(program) or ""
    return os.path.dirname(path) == os.path.dirname(sys.executable) and os.path.basename(path).startswith("python")


def distributions() -> Dict[str, Tuple[str, str]]:
    """(version, metadata folder) of each distribution on the module path, by normalized name and sorted."""
    found: Dict[str, Tuple[str, str]] = {}
    for directory in sys.path:
        try:
            names = os.listdir(directory or ".")
        except (OSError, TypeError, ValueError):  # a program may put anything into sys.path
            continue
        for name in names:
            match = re.fullmatch(r"([\w.]+(?:-[\w.]+)*?)-(\d[\w.!+]*)(?:-py[\d.]+)?\.(?:dist-info|egg-info)", name)
            if match:
                found.setdefault(normalized_name(match.group(1)), (match.group(2), os.path.join(directory, name)))
    return dict(sorted(found.items()))


def normalized_name(name: str) -> str:
    """The name of a distribution in the normal form of PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def imported_packages() -> List[str]:
    """The names of the installed distributions with a module that is imported now.

    Most have a module of the same name; for the others, their metadata lists what they install.
    """
    modules = {name.partition(".")[0] for name, module in list(sys.modules.items())
               if module is not None and isinstance(name, str)}
    installed = distributions()
    found = {normalized_name(name) for name in modules} & set(installed)
    unclaimed = {name for name in modules if normalized_name(name) not in found}
    unclaimed.difference_update(getattr(sys, "stdlib_module_names", sys.builtin_module_names))
    if unclaimed:
        found.update(name for name, (_, folder) in installed.items()
                     if name not in found and not unclaimed.isdisjoint(top_level_names(folder)))
    return sorted(found)


def top_level_names(folder: str) -> Set[str]:
    """The names of the modules that a distribution installs, and of the files beside them."""
    for file_name in ("top_level.txt", "RECORD"):
        try:
            with open(os.path.join(folder, file_name), encoding="utf-8", errors="replace") as file:
                names = {line.partition("/")[0] for line in file}
        except OSError:
            continue
        if names:
            return {name.partition(".")[0].strip() for name in names}
    return set()


FINAL_KEYS = ("imported_packages", "outcome")  # of a document: written when recording stops or resumes


def final_keys(document: Dict[str, Any]) -> Dict[str, Any]:
    """The FINAL_KEYS that a document has, with their values."""
    return {key: document[key] for key in FINAL_KEYS if key in document}


def merge_final_keys(document: Dict[str, Any], values: Dict[str, Any]) -> bool:
    """Merge values of FINAL_KEYS into a document, uniting lists and keeping the later outcome; return whether it changed."""
    merged = {}
    for key, value in values.items():
        old = document.get(key)
        if isinstance(value, list) and isinstance(old, list):
            value = sorted(value + [item for item in old if item not in value], key=str)
        merged[key] = value
    before = outcome_of(document)
    if before and canonical_time(before["time"]) > canonical_time(outcome_of(merged).get("time", before["time"])):
        del merged["outcome"]
    changed = any(key not in document or document[key] != value for key, value in merged.items())
    document.update(merged)
    return changed


ANSWER_SECONDS = 0.5  # that git and nvidia-smi are given


def machine_keys(directory: str) -> Dict[str, Any]:
    """The keys `git` and `gpus` of a document, as far as git and nvidia-smi answer."""
    has_git = _search_upward(directory, (".git",), CONFIG_SEARCH_DEPTH)
    lines = output_of(directory, "git", "status", "--porcelain=v2", "--branch", "--untracked-files=no") if has_git else []
    header = dict(line[2:].split(" ", 1) for line in lines if re.match("# [a-z.]+ ", line))
    git = {"commit": header.get("branch.oid"), "branch": header.get("branch.head"),
           "dirty": any(line[:1] != "#" for line in lines)}
    names = output_of(directory, "nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    gpus = [name.strip() for name in names if name.strip()]
    return dict({"git": git} if header else {}, **({"gpus": gpus} if gpus else {}))


def output_of(directory: str, *words: str) -> List[str]:
    """The lines that a program prints; [] if there is no such program, it fails or it is late, when it is killed."""
    import subprocess
    try:
        done = subprocess.run(words, cwd=directory, env=dict(os.environ, GIT_OPTIONAL_LOCKS="0"), timeout=ANSWER_SECONDS,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.decode("utf-8", "replace").splitlines() if done.returncode == 0 else []


def checked_labels(name: Any = None, tags: Any = None, note: Any = None) -> Dict[str, Any]:
    """The keys `name`, `tags` and `note` of a document, without those not given. Raises TypeError, ValueError."""
    labels: Dict[str, Any] = {}
    if name is not None:
        labels["name"] = checked_label(name, "name")
        if is_id(labels["name"]):
            raise ValueError("name %r could be an ID: it has only digits and letters from a to f" % name)
    if tags is not None:
        if isinstance(tags, str) or not hasattr(tags, "__iter__"):
            raise TypeError("tags must be a list of strings, not %r" % (tags,))
        labels["tags"] = sorted({checked_label(tag, "tag") for tag in tags})
    if note is not None:
        if not isinstance(note, str):
            raise TypeError("note must be a string, not %s" % type(note).__name__)
        labels["note"] = note.strip()
    return labels


def checked_label(text: Any, kind: str) -> str:
    """A name or tag without surrounding white space. Raises TypeError, ValueError."""
    if not isinstance(text, str):
        raise TypeError("%s must be a string, not %s" % (kind, type(text).__name__))
    text = str.__str__(text).strip()
    if not text or len(text) > MAX_LABEL_CHARACTERS or not text.isprintable():
        raise ValueError("%s %r must be one line of 1 to %d characters" % (kind, text, MAX_LABEL_CHARACTERS))
    return text


def opening() -> Dict[str, str]:
    """The outcome of a run that starts or resumes now."""
    return {"status": OPEN, "time": timestamp()}


def following(outcome: Dict[str, str], document: Dict[str, Any]) -> Dict[str, str]:
    """An outcome that replaces the one of a document: no earlier, even if the clock was set back."""
    before = outcome_of(document).get("time", "")
    return dict(outcome, time=max(outcome["time"], before, key=canonical_time)) if before else outcome


def ending(error: Optional[BaseException] = None) -> Dict[str, str]:
    """The outcome of a run that ends now, by an exception or normally."""
    outcome = {"status": "failed", "time": timestamp()}
    code = error.code if isinstance(error, SystemExit) else None
    if error is None or isinstance(error, SystemExit) and code in (None, 0):
        return dict(outcome, status="completed")
    if isinstance(error, KeyboardInterrupt) or code == 128 + signal.SIGINT:
        return dict(outcome, status="interrupted")
    if code in [128 + number for number in termination_signals()]:
        return dict(outcome, status="terminated")
    if isinstance(code, int):
        return dict(outcome, error="exit code %d" % code)
    lines = text_of(error).strip().split("\n")
    text = "%s: %s" % (type(error).__name__, lines[-1].strip()) if lines[-1] else type(error).__name__
    return dict(outcome, error=re.sub(SECRET_SHAPES, "***", text)[:MAX_ERROR_CHARACTERS])


def termination_signals() -> List[int]:
    """The signals with which schedulers end a program, and a terminal that is closed."""
    return [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def ending_of_program(returncode: int) -> Dict[str, str]:
    """The outcome of a program that ended with this return code of subprocess."""
    if returncode >= 0 or -returncode in [signal.SIGINT, *termination_signals()]:
        return ending(SystemExit(exit_status(returncode)))
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = "signal %d" % -returncode
    return dict(ending(), status="failed", error="ended by " + name)


def exit_status(returncode: int) -> int:
    """The exit code that a shell reports for a return code of subprocess: minus n stands for signal n."""
    return returncode if returncode >= 0 else 128 - returncode


def user_name() -> Optional[str]:
    """The login name, from the environment or the password database."""
    import getpass
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):
        return None


def checked_params(params: Any, unknown: List[str]) -> Dict[str, Any]:
    """The params as they are stored; those without a plain form become text, and their names are added to `unknown`.

    Raises TypeError if params is not a dict, a namespace or a dataclass object.
    """
    try:
        fields = {} if params is None else fields_of(params)
    except Exception:  # a foreign object may raise anything
        fields = None
    if fields is None:
        raise TypeError("params must be a dict, a namespace or a dataclass object, not %s" % type(params).__name__)
    return {key_text(key): _checked_param(value, key_text(key), unknown) for key, value in fields.items()}


def _checked_param(value: Any, name: str, unknown: List[str]) -> Any:
    try:
        plain = pack_floats(plain_param(value, name, unknown))
        _check_depth([plain])
        return plain
    except (RecursionError, ReadError):
        unknown.append("%s (nested too deeply)" % name)
        return text_of(value)


def checked_metric(value: Any, where: str) -> Any:
    """The value of a metric as it is stored. Raises TypeError."""
    try:
        plain = pack_floats(plain_value(value, where))
        _check_depth([plain])
    except (RecursionError, ReadError) as error:
        raise TypeError("%s is nested too deeply" % where) from error
    except TypeError:
        raise
    except Exception as error:  # a foreign object may raise anything
        raise TypeError("%s is a %s, which cannot be read: %s" % (where, type(value).__name__,
                                                                  short_reason(error))) from error
    return plain


def current_job() -> Optional[str]:
    """The scheduler's ID of this job, which stays the same when the job is preempted and restarted."""
    return os.environ.get("REPLICATE_JOB") or os.environ.get("SLURM_JOB_ID") or None


def check_same_params(experiment: Experiment, given: Dict[str, Any]) -> None:
    """Raise ValueError if a param, as stored, differs from what the experiment started with."""
    stored = flat_params(experiment._document.get("params") or {})
    for name, value in flat_params(given).items():
        if not same_value(value, stored.get(name, ABSENT)):
            was = "started with %s" % format_value(stored[name]) if name in stored else "started without it"
            raise ValueError("param %r is %s, but experiment %s %s. Leave out resume to start a new experiment" % (
                name, format_value(value), experiment.short_id(), was))


def new_document(location: Location, path: Optional[str], params: Dict[str, Any], heartbeat: bool,
                 program: Sequence[str] = ()) -> Dict[str, Any]:
    """The document of an experiment that starts now.

    heartbeat: whether it will have heartbeats; if not, it gets no outcome, as nobody could tell a lost run from a live one.
    program: the command of the program to record, if that is not this process.
    """
    document: Dict[str, Any] = {
        "id": new_id(), "created": timestamp(), "params": params, "host": platform.node(), "user": user_name(),
        "config": {"repository": location.url, "storage": ""},
        "command": masked_command(program_arguments(location.directory)), "full_command": rerun_command(location.directory),
        "path": path, "python_version": platform.python_version(),
        "python_packages": {name: version for name, (version, _) in distributions().items()},
        "replicate_version": __version__, "checkpoints": []}
    if program:
        document["command"] = masked_command(program)
    if program and not is_this_python(program[0]):
        document.update(python_version=None, python_packages={})
    job = current_job()
    document.update({"job": job} if job else {}, **({"outcome": opening()} if heartbeat else {}))
    return document


def next_checkpoint(experiment: Experiment, path: Optional[str], step: Any, metrics: Dict[str, Any],
                    primary_metric: Optional[Dict[str, str]], problems: List[str]) -> Checkpoint:
    """A new checkpoint, added to its experiment; later than the last one even if the clock stands still or goes back."""
    last = experiment.checkpoints[-1]._document if experiment.checkpoints else None
    created, after = timestamp(), (last or experiment._document)["created"]
    if created <= after:
        created = timestamp(parse_time(after).timestamp() + 2e-6)
    checkpoint = Checkpoint({"id": new_id(), "created": created, "metrics": metrics,
                             "step": _valid_step(step, last, problems), "path": path, "primary_metric": primary_metric},
                            experiment)
    experiment.checkpoints.append(checkpoint)
    return checkpoint


def save_archive(storage: DiskStorage, kind: str, item_id: str, sources: Sequence[Source]) -> Tuple[Table, bool]:
    """Store the archive of sources; return its table, and whether shrink_archive() should make it smaller later.

    This takes no longer than a plain copy. Raises WriteError.
    """
    return storage.create(archive_key(kind, item_id), lambda file: pack(file, item_id, sources))


def shrink_archive(storage: DiskStorage, kind: str, item_id: str, check: Callable[[], None] = lambda: None) -> None:
    """Replace an archive that save_archive() stored by a smaller one; check() may raise to stop the work.

    Raises WriteError, ReadError, DoesNotExist.
    """
    key = archive_key(kind, item_id)
    archive = Archive(storage, key)

    def check_all() -> None:
        storage.stat(key)  # raises DoesNotExist if it was removed: it must not come back
        check()

    def write(file: BinaryIO) -> None:
        recompress(archive, file, check_all)
        check_all()

    try:
        storage.create(key, write)
    except WriteError:
        storage.stat(key)  # raises DoesNotExist if `rm` has just removed the archive, and our temporary file with it
        raise


# What is recorded for a bucket goes to a repository on disk first, the pending area, and is uploaded from there.

PENDING = os.path.join(".replicate", "pending")
SENT_KEY = "replicate_sent"     # in a pending document: the bucket has it, so uploading must not create it again
PRUNED_KEY = "replicate_pruned"  # in a pending document: IDs of checkpoints whose files are to be deleted in the bucket
REACH_SECONDS = 5.0             # that init() waits for a bucket to answer
SMALL_UPLOAD_BYTES = 512 << 10  # files up to this size are uploaded many at a time
FIRST_SEND_PAUSE = 1.0          # seconds between two attempts to upload; doubled after each,
LONGEST_SEND_PAUSE = 60.0       # up to this


def pending_repository(directory: str, url: str) -> Repository:
    """The pending area of a project for a bucket."""
    name = "%s-%08x" % (re.sub(r"[^A-Za-z0-9.]+", "-", url), zlib.crc32(os.fsencode(url)))
    return Repository("file://" + os.path.join(directory, PENDING, name))


def pending_areas(pending: Repository) -> List[Repository]:
    """The pending area, and the extra ones that own_pending_area() made."""
    base, name = os.path.split(pending.storage.root)  # type: ignore[attr-defined]
    names = sorted(os.listdir(base)) if os.path.isdir(base) else []
    return [Repository("file://" + os.path.join(base, item)) for item in names if item == name or item.startswith(name + ".")]


def own_pending_area(pending: Repository, experiment_id: str) -> Tuple[Repository, FileLock]:
    """A pending area in which no other process records this experiment, and its owner_lock(), held.

    Makes an extra area if another process records it in the usual one. Raises WriteError.
    """
    while True:
        make_private_folder(pending.storage.root)  # type: ignore[attr-defined]
        pending.prepare()
        lock = owner_lock(pending, experiment_id)
        if lock.acquire(wait=False):
            return pending, lock
        pending = Repository("%s.%s" % (pending.url, os.urandom(4).hex()))


def owner_lock(pending: Repository, experiment_id: str) -> FileLock:
    """The lock of the process that records an experiment; no other process uploads it while the lock is held."""
    return FileLock(pending.storage.path("%s%s.owner" % (JOURNALS, experiment_id)))  # type: ignore[attr-defined]


class Sent:
    """How much was uploaded."""

    def __init__(self) -> None:
        self.experiments = self.checkpoints = self.bytes = 0

    def __str__(self) -> str:
        return "%s and %s (%s of files)" % (plural(self.experiments, "experiment"),
                                            plural(self.checkpoints, "checkpoint"), format_size(self.bytes))


def copy_object(source: Storage, target: Storage, key: str, progress: Callable[[int], None]) -> int:
    """Copy an object between storages unless the target has it; return the bytes copied. Raises DoesNotExist if it is missing."""
    entry = source.stat(key)
    try:
        if target.stat(key).size == entry.size:
            return 0
    except DoesNotExist:
        pass
    progress(0)
    if isinstance(source, DiskStorage):
        try:
            target.upload(key, source.path(key), progress)
        except FileNotFoundError as error:
            raise DoesNotExist("%s does not exist." % source.path(key)) from error
        return entry.size
    import tempfile
    with tempfile.TemporaryDirectory(prefix="replicate-") as directory:
        path = os.path.join(directory, "copy")
        with source.open(key, entry=entry) as stream, open(path, "xb", 0) as file:
            for data in iter(lambda: stream.read(1 << 20), b""):
                write_all(file, data)
        target.upload(key, path, progress)
    return entry.size


def send_experiment(source: Repository, target: Repository, document: Dict[str, Any], checkpoints: List[Dict[str, Any]],
                    sent: Sent, progress: Callable[[int], None], pruned: Container[str] = ()) -> bool:
    """Copy an experiment and these of its checkpoints, the document last; return whether that changed the target's document.

    What the target already has stays, except for the files of pruned checkpoints; its document takes our final keys.
    Raises ExperimentGone if the document says that it was uploaded before, but the target no longer has it.
    """
    keys = [archive_key("experiments", document["id"])] if document.get("path") else []
    keys += [archive_key("checkpoints", item["id"]) for item in checkpoints if item.get("path")]
    sizes = {}
    for key in keys:
        try:
            sizes[key] = source.storage.stat(key).size
        except DoesNotExist:  # uploaded before, or pruned
            continue
    header = {key: value for key, value in document.items() if key not in ("checkpoints", SENT_KEY, PRUNED_KEY)}
    gone = ExperimentGone("Experiment %s was removed from %s." % (document["id"][:SHORT_ID], target.url))
    noted = set(texts_in(document, PRUNED_KEY))
    stripped: Set[str] = set()
    started = time.monotonic()
    new, is_changed = checkpoints, True  # what the target did not have, and whether its document changes

    def copy(key: str) -> int:
        try:
            return copy_object(source.storage, target.storage, key, progress)
        except DoesNotExist as error:
            if isinstance(error, NoBucket) or key[key.rfind("/") + 1:].partition(".")[0] not in pruned:
                raise
            return 0

    def change(old: Optional[bytes]) -> Optional[bytes]:
        nonlocal new, is_changed
        if old is None:
            if document.get(SENT_KEY):
                raise gone
            stripped.update(strip_files(checkpoints, pruned))
            return DocumentText(dict(header, checkpoints=checkpoints)).data()
        theirs = decode_document(old, document["id"])
        known = {item["id"] for item in theirs.get("checkpoints") or ()}
        new = [item for item in checkpoints if item["id"] not in known]
        theirs["checkpoints"] = (theirs.get("checkpoints") or []) + new
        newly = strip_files(theirs["checkpoints"], pruned) | strip_files(theirs["checkpoints"], {
            item["id"] for item in checkpoints if item.get("pruned") and not item.get("path")})
        stripped.update(newly, (item["id"] for item in theirs["checkpoints"]  # an upload that failed may have left its archive
                                if item["id"] in noted and not item.get("path")))
        is_changed = merge_final_keys(theirs, final_keys(document)) or bool(new or newly)
        return DocumentText(theirs).data() if is_changed else None

    if sizes and document.get(SENT_KEY):
        try:
            target.storage.read(document_key(document["id"]))
        except NoBucket:
            raise
        except DoesNotExist as error:
            raise gone from error
    for large in (False, True):
        chosen = [key for key, size in sizes.items() if (size > SMALL_UPLOAD_BYTES) == large]
        sent.bytes += sum(target.storage.in_parallel(copy, chosen, large))
    try:
        target.storage.update(document_key(document["id"]), change)
    except ExperimentGone:  # removed while its archives were uploaded
        target.storage.delete(keys)
        raise
    if time.monotonic() - started > LEFTOVER_SECONDS / 2:  # `verify --fix` may have removed them as leftovers
        for key in sizes:
            copy(key)
    if stripped:
        target.storage.delete([archive_key("checkpoints", item_id) for item_id in stripped])
    sent.checkpoints += len(new)
    return is_changed


def send_pending(pending: Repository, remote: Repository, experiment_id: str, unready: Set[str], finished: bool,
                 sent: Sent, progress: Callable[[int], None], pruned: Set[str]) -> None:
    """Upload an experiment from the pending area, without its unready checkpoints, then remove here what was uploaded.

    finished: its recording has ended, so nothing of it stays here. pruned: see send_experiment(); those noted in the
    document are added. Raises ExperimentGone, after removing it here too, and Unreachable and the like.
    """
    if finished:
        document = pending.load(experiment_id)
    else:  # what is only in the journal cannot be removed here after its upload, and would be uploaded again
        document = decode_document(pending.storage.read(document_key(experiment_id)), experiment_id)
    noted = set(texts_in(document, PRUNED_KEY))
    pruned.update(noted)
    ready = [item for item in document.get("checkpoints") or () if item["id"] not in unready]
    if ready or noted or not document.get(SENT_KEY) or finished and (final_keys(document) or pruned):
        if experiment_id in unready:
            return
        try:
            send_experiment(pending, remote, document, ready, sent, progress, pruned)
        except ExperimentGone:
            pending.remove_experiment(Experiment(document))
            raise
        sent.experiments += 1
    left = [archive_key("checkpoints", item["id"]) for item in ready if item.get("pruned") and not item.get("path")]
    if left:  # by an upload that failed
        remote.storage.delete(left)
    done = {item["id"] for item in ready}
    with_files = {item["id"] for item in ready if item.get("path")}
    if finished and not unready:
        pending.remove_experiment(Experiment(document))
        return

    def change(old: Optional[bytes]) -> Optional[bytes]:
        if old is None:
            return None
        kept = decode_document(old, experiment_id)
        items = kept.get("checkpoints") or ()
        kept["checkpoints"] = [item for item in items if item["id"] not in done]
        kept[SENT_KEY] = True
        since = set(texts_in(kept, PRUNED_KEY)) - noted  # pruned during the upload
        kept[PRUNED_KEY] = sorted(since | {item["id"] for item in items if item["id"] in with_files and not item.get("path")})
        return DocumentText(kept).data()

    pending.storage.delete([archive_key("checkpoints", item_id) for item_id in done] +  # first: the disk may be full
                           [archive_key("experiments", experiment_id)])
    pending.storage.update(document_key(experiment_id), change)


def send_abandoned(pending: Repository, remote: Repository, sent: Sent, progress: Callable[[int], None]) -> List[str]:
    """Upload what ended processes left pending; return the IDs of the experiments that running ones still record."""
    busy = []
    for area in pending_areas(pending):
        fold_abandoned(area)
        for entry in list(area.storage.list(EXPERIMENTS)):
            experiment_id = entry.name[:-5]
            if not is_id(experiment_id):
                continue
            lock = owner_lock(area, experiment_id)
            is_busy = not lock.acquire(wait=False)
            if is_busy or not lock.is_held and (  # a disk may have no locks
                    active_recorder((remote.url, experiment_id)) or remote.is_running(experiment_id)):
                lock.release(remove=False)
                busy.append(experiment_id)
                continue
            try:
                send_pending(area, remote, experiment_id, set(), True, sent, progress, set())
                remote.storage.delete([heartbeat_key(experiment_id)])  # a killed process leaves it
            except ExperimentGone as error:
                console.warning("%s; its waiting checkpoints were dropped." % _problem(error))
            except NoBucket:
                raise
            except DoesNotExist as error:
                console.debug(str(error))  # another process has uploaded it
            finally:
                lock.release()
        remove_unnamed(area)
        if area.url != pending.url and not busy and next(area.storage.list(EXPERIMENTS), None) is None:
            shutil.rmtree(area.storage.root, ignore_errors=True)  # type: ignore[attr-defined]
    return busy


def remove_unnamed(area: Repository) -> None:
    """Remove the archives that killed processes left in a pending area: no document and no journal names them."""
    unreadable: List[str] = []
    experiments = area.experiments(lambda key, reason: unreadable.append(key))
    named = {place for experiment in experiments for place in archives_of(experiment, experiment.checkpoints)}
    limit = min([time.time() - LEFTOVER_SECONDS,  # what a running experiment has written may wait for its line in the journal
                 *(experiment.created.timestamp() for experiment in experiments)])
    for kind in ("experiments", "checkpoints") if not unreadable else ():
        area.storage.delete([archive_key(kind, item_id) for item_id, entry in stored_archives(area.storage, kind).items()
                             if entry.modified < limit and (kind, item_id) not in named])


class Condition(threading.Condition):
    """A condition that Ctrl-C never leaves locked: `with` calls the methods of its lock, which cannot be interrupted."""

    __enter__ = property(lambda self: self.lock.__enter__)
    __exit__ = property(lambda self: self.lock.__exit__)

    def __init__(self) -> None:
        self.lock = threading.RLock()
        super().__init__(self.lock)


class LiveDocument:
    """The document of an experiment that this process records, and the journal in front of it.

    `changed` guards both, and is notified when there is something to fold.
    """

    def __init__(self, repository: Repository, experiment: Experiment, changed: Any) -> None:
        self.storage: DiskStorage = repository.storage  # type: ignore[assignment]
        self.unwritten: List[bytes] = []     # lines that a full disk refused
        self.fold_at = float("inf")          # monotonic seconds
        self._repository, self._id, self._changed = repository, experiment.id, changed
        self._text: Optional[DocumentText] = DocumentText(experiment._document)
        self.journals: List[Journal] = []    # append() writes to the last one
        self._needs_journal = True           # none is open, or the last one is being folded or could not be
        self._is_gone = False
        self._folding = threading.RLock()
        self._last_fold, self._pause = float("-inf"), FOLD_INTERVAL

    def append(self, record: Dict[str, Any]) -> Optional[str]:
        """Append a line to the journal, where it survives the process; if that fails, keep it in memory and return why."""
        with self._changed:
            if self._is_gone:
                return None
            self.unwritten.append(encode_json(record, indent=None))
            if self.fold_at == float("inf"):
                self.fold_at = max(time.monotonic(), self._last_fold + self._pause)
                self._changed.notify_all()
            try:
                if self._needs_journal:
                    self.journals.append(Journal(self.storage, self._id))
                    self._needs_journal = False
                journal = self.journals[-1]
                while self.unwritten:
                    line = self.unwritten.pop(0)  # before it is written: a signal handler may append, too
                    try:
                        journal.append(line)
                    except BaseException:
                        self.unwritten.insert(0, line)
                        raise
            except OSError as error:
                return _problem(self.storage.write_failure(JOURNALS + self._id, error))
            return None

    def fold(self, final: Optional[Dict[str, Any]] = None) -> None:
        """Move the lines of the journals and those in memory into the document, and add final keys.

        Raises ExperimentGone, WriteError, ReadError.
        """
        with self._folding:
            with self._changed:
                journals, lines = list(self.journals), list(self.unwritten)
                self._needs_journal, self.fold_at = True, float("inf")
            if not (journals or lines or final):
                return
            started = time.monotonic()
            try:
                self._text = self._repository.fold(self._id, [journal.key for journal in journals], self._text,
                                                   b"\n".join(lines), final)
            except ReplicateError:
                with self._changed:
                    self.fold_at = time.monotonic() + MAX_FOLD_INTERVAL
                raise
            with self._changed:
                self._last_fold = time.monotonic()
                self._pause = min(MAX_FOLD_INTERVAL, max(FOLD_INTERVAL, FOLD_SHARE * (self._last_fold - started)))
                written = set(lines)
                self.unwritten = [line for line in self.unwritten if line not in written]
                del self.journals[:len(journals)]
                for journal in journals:
                    journal.release()

    def close(self, remove: bool) -> None:
        """Give up the journals: remove them if the experiment is gone, else leave them to the next process."""
        with self._folding, self._changed:
            for journal in self.journals:
                journal.release(remove)
            self.journals, self._needs_journal, self._is_gone, self.fold_at = [], True, remove, float("inf")


class Hurry(ReplicateError):
    """The process is ending, so work that can wait stops."""


class Worker:
    """A recorder's thread that folds the journal into the document, compresses archives and, for a bucket, uploads from the
    pending area what is ready.
    """

    def __init__(self, recorder: Recorder, remote: Optional[Repository], prepared: bool, lock: Optional[FileLock]) -> None:
        self.recorder, self.remote = recorder, remote
        self.lock = lock                         # live_lock() on a disk; owner_lock() in the pending area, held already
        self.changed = recorder.changed
        self.ended = threading.Event()
        self.stopping = False                    # it finishes what is left
        self.is_done = False                     # everything was uploaded
        self.limit = float("inf")                # monotonic seconds, when the thread has to end
        self.packing: List[Tuple[str, str]] = []
        self.is_uploading = False
        self.failure: Optional[Exception] = None if prepared else Unreachable("%s does not answer." % recorder.target.url)
        self._prepared = prepared
        self._bytes = self._round = 0            # uploaded by this process; up to the last _upload()
        self._last_progress = 0.0                # monotonic seconds, when the bucket last took data
        self._upload_at = 0.0 if remote else float("inf")
        self._pause = FIRST_SEND_PAUSE
        self._sends_abandoned = True             # ended processes may have left something pending, too

    def run(self) -> None:
        """The thread itself."""
        try:
            self._work()
        finally:
            self.ended.set()
            if self.recorder.over:  # finish() may not have waited for this
                self.release()

    def _work(self) -> None:
        recorder = self.recorder
        while True:
            with self.changed:
                if recorder.gone or recorder.over:  # read under the lock, so that no notification is missed
                    return
                pause = min(self._upload_at, recorder.document.fold_at) - time.monotonic()
                if not (self.packing or self.stopping) and pause > 0:
                    self.changed.wait(min(pause, threading.TIMEOUT_MAX))
                    continue
                last = self.stopping and len(self.packing) <= 1
            if self.packing:
                self._compress(*self.packing[0])
            self._fold_if_due()
            if self.remote and not recorder.over and (last or time.monotonic() >= self._upload_at):
                self._upload(self.remote, last)
            if last:
                return

    def release(self) -> None:
        """Let other processes go on with the experiment, and upload what is still pending."""
        with self.changed:
            if self.lock:
                self.lock.release()

    def _fold_if_due(self) -> None:
        if time.monotonic() >= self.recorder.document.fold_at:
            self.recorder.fold()

    # -- compression

    def pack_later(self, kind: str, item_id: str) -> None:
        """Queue an archive for compression."""
        with self.changed:
            self.packing.append((kind, item_id))
            self.changed.notify_all()

    def wait_for_room(self, quiet: bool) -> None:
        """Wait while too many archives are queued for compression, but never for an upload."""
        def must_wait() -> bool:
            return len(self.packing) >= MAX_PACKING and not (
                self.is_uploading or self.recorder.gone or self.recorder.closed or termination.deferred or
                self.ended.is_set())

        with self.changed:
            if must_wait() and not quiet:
                console.info("Waiting for earlier checkpoints to compress...")
            while must_wait():
                self.changed.wait(0.5)

    def _compress(self, kind: str, item_id: str) -> None:
        def check() -> None:
            hurry = self.limit < float("inf") if self.remote else time.monotonic() >= self.limit
            if hurry or self.recorder.over:
                raise Hurry("The process is ending.")
            self._fold_if_due()  # readers do not wait for the compression of a large archive

        try:
            shrink_archive(self.recorder.storage, kind, item_id, check)
        except (DoesNotExist, Hurry):
            pass
        except Exception as error:
            if not self.recorder.gone:
                self.recorder.messages.report(WriteError("Saved files could not be compressed, so they take more space: %s." %
                                                         short_reason(error.__cause__ or error).rstrip(".")))
        with self.changed:
            del self.packing[:1]
            self.changed.notify_all()
            if self.recorder.gone or item_id in self.recorder.pruned:  # its archive was deleted, and has just been replaced
                self.recorder.discard([archive_key(kind, item_id)])
        self.upload_soon()

    # -- uploads

    def upload_soon(self) -> None:
        """Note that there is something new for the bucket."""
        with self.changed:
            if self.remote and self.failure is None:
                self._upload_at = 0.0
                self.changed.notify_all()

    def _upload(self, remote: Repository, last: bool) -> None:
        """Upload what is in the document, except for archives that wait for compression; retry later if that fails."""
        self.is_uploading, self._upload_at = True, float("inf")
        self._count(0)
        try:
            self._send(remote, last)
            self.is_done, self._pause = last, FIRST_SEND_PAUSE
            if self.failure:
                self.failure, self._upload_at = None, 0.0  # upload_soon() has waited for this
                console.info("%s can be reached again." % remote.url)
        except ExperimentGone:
            self.recorder.lose()
        except Exception as error:  # recording goes on, whatever it is
            console.debug("Uploading failed: %s" % error)
            if not (self.failure or self.stopping):
                console.warning("%s.\nRecording continues; uploads will be retried." % _problem(error))
            self.failure, self._upload_at = error, time.monotonic() + self._pause
            self._pause = min(2 * self._pause, LONGEST_SEND_PAUSE)
        finally:
            self.is_uploading, self._round = False, self._bytes

    def _send(self, remote: Repository, last: bool) -> None:
        if not self._prepared:
            remote.prepare()
            self._prepared = True
        with self.changed:
            unready = {item_id for _, item_id in self.packing}
        send_pending(self.recorder.repository, remote, self.recorder.experiment.id, unready, last, Sent(), self._count,
                     self.recorder.pruned)
        if self._sends_abandoned and not last:
            send_abandoned(pending_repository(self.recorder.directory, remote.url), remote, Sent(), self._count)
            self._sends_abandoned = False

    def _count(self, sent: int) -> None:
        self._bytes += sent
        self._last_progress = time.monotonic()

    # -- the end

    def finish_by(self, limit: float) -> None:
        """Finish what is left by this time (monotonic seconds)."""
        with self.changed:
            self.stopping, self.limit = True, min(self.limit, limit)
            if self.remote and self.limit < float("inf"):
                self.remote.storage.deadline = self.limit
            self.changed.notify_all()

    def wait(self) -> None:
        """Wait until the thread has finished, its limit has passed, or the bucket has stopped answering."""
        total, size = len(self.packing), None
        try:
            with Progress("", 0) as progress:
                while not self.ended.wait(0.05) and time.monotonic() < self.limit:
                    if self.is_uploading and time.monotonic() > self._last_progress + TERMINATION_SECONDS:
                        return
                    if termination.deferred:
                        self.finish_by(time.monotonic() + TERMINATION_SECONDS - JOIN_SECONDS)
                    if self.packing or not self.remote:
                        progress.show("Compressing the last checkpoints: %d of %d" % (total - len(self.packing), total))
                    else:
                        size = self._round + self._waiting_bytes() if size is None else size
                        progress.show("Uploading: %s of %s (Ctrl-C leaves the rest for '%s push')" % (
                            format_size(self._bytes), format_size(max(size, self._bytes)), program_name()))
        except KeyboardInterrupt:
            console.warning("Interrupted.")

    def _waiting_bytes(self) -> int:
        """The size of this experiment's archives in the pending area; each stays there until all of an _upload() are sent."""
        experiment = self.recorder.experiment
        owners = {experiment.id, *(checkpoint.id for checkpoint in experiment.checkpoints)}
        return sum(entry.size for kind in ("experiments", "checkpoints")
                   for item_id, entry in stored_archives(self.recorder.storage, kind).items() if item_id in owners)

    def warn_of_rest(self) -> None:
        """Warn if something was not uploaded."""
        if not self.remote or self.recorder.gone or self.is_done:
            return
        if self.failure:
            console.warning("%s." % _problem(self.failure))
        console.warning("Not everything was uploaded to %s. The rest is safe in %s; the next run in this project or "
                        "'%s push' uploads it." % (self.remote.url, self.recorder.repository.url, program_name()))


class Pulse:
    """A recorder's thread that writes heartbeats, and notices when the experiment is removed."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.has_beaten = threading.Event()       # or has failed to
        self.ended = threading.Event()
        self.failure: Optional[Exception] = None  # why recording cannot start

    def run(self) -> None:
        """The thread itself."""
        try:
            self._work()
        finally:
            self.ended.set()

    def _work(self) -> None:
        import copy
        recorder = self.recorder
        target = Repository(recorder.target.url, copy.copy(recorder.target.storage))  # with a deadline of its own
        while not (recorder.gone or recorder.over):
            next_beat = time.monotonic() + HEARTBEAT_INTERVAL
            target.storage.deadline = time.monotonic() + max(HEARTBEAT_INTERVAL, JOIN_SECONDS)
            self._beat(target)
            with recorder.changed:
                recorder.changed.wait_for(lambda: recorder.gone or recorder.over, next_beat - time.monotonic())
        if recorder.settings.heartbeat and not recorder.gone and active_recorder(recorder.key()) is None:
            target.storage.deadline = time.monotonic() + JOIN_SECONDS
            try:
                target.storage.delete([heartbeat_key(recorder.experiment.id)])
            except ReplicateError as error:
                recorder.messages.report(error)

    def _beat(self, target: Repository) -> None:
        """Write a heartbeat, if the experiment still exists."""
        recorder = self.recorder
        try:
            recorder.storage.stat(document_key(recorder.experiment.id))
            if recorder.settings.heartbeat:
                target.beat(recorder.experiment.id)
                if recorder.gone:  # removed while it was written
                    target.storage.delete([heartbeat_key(recorder.experiment.id)])
        except DoesNotExist as error:
            if isinstance(error, NoBucket):
                recorder.messages.report(error)
            elif not (recorder.closed and recorder.worker.remote):  # the last upload removes it from the pending area
                recorder.lose()
        except Exception as error:  # the next heartbeat tries again
            if self.has_beaten.is_set() or isinstance(error, Unreachable):
                recorder.messages.report(error)
            else:
                self.failure = error
        finally:
            self.has_beaten.set()


class Messages:
    """What a recorder tells the user: each problem once, and checkpoints without files at most once a second."""

    has_hinted = False  # whether this process has given hint_at_outputs()

    def __init__(self) -> None:
        self.reported: Set[str] = set()
        self._next_time = 0.0   # monotonic seconds, before which checkpoints without files are not shown
        self._skipped = 0       # such checkpoints

    def report(self, error: BaseException) -> None:
        """Print an error of a background thread once; the worker itself warns that a bucket is unreachable."""
        text = str(error) if isinstance(error, ReplicateError) else "%s: %s" % (type(error).__name__, error)
        if isinstance(error, (Unreachable, NoBucket)):
            console.debug(text)
        elif text not in self.reported:
            self.reported.add(text)
            console.error(text)

    def report_gone(self, experiment: Experiment, url: str) -> None:
        """Print once that an experiment was removed from the repository at url."""
        self.report(ReplicateError("Experiment %s was removed from %s: it is no longer recorded." % (
            experiment.short_id(), url)))

    def hint_at_outputs(self, path: str, is_directory: bool) -> None:
        """Tell the user, once in each process, that init() saved what an earlier run wrote at path, and how to avoid that."""
        if not Messages.has_hinted:
            Messages.has_hinted = True
            line = "/%s%s" % (path, "/" if is_directory else "")
            console.info("init() saved the %s of an earlier run as code, so CODE differs from run to run. To leave it out, "
                         "add the line '%s' to .replicateignore: checkpoint() still saves it." % (path, line))

    def report_checkpoint(self, checkpoint: Checkpoint, problems: List[str], failure: Optional[str], quiet: bool) -> None:
        """Print what became of a checkpoint: its invalid arguments, why the journal failed, or that it was recorded."""
        if problems:
            console.error("Checkpoint %s: %s. The rest of it %s." % (
                checkpoint.short_id(), "; ".join(problems), "waits in memory" if failure else "was recorded"))
        if failure and "journal" not in self.reported:
            console.error("%s. Checkpoint %s and later ones wait in memory until they can be written." %
                          (failure, checkpoint.short_id()))
        (self.reported.add if failure else self.reported.discard)("journal")
        now = time.monotonic()
        if problems or failure or quiet:
            return
        if not checkpoint.path and now < self._next_time:
            self._skipped += 1
            return
        more = " and %s before it" % plural(self._skipped, "other") if self._skipped else ""
        self._next_time, self._skipped = now + 1.0, 0
        name = "%s (step %d)%s" % (checkpoint.short_id(), checkpoint.step, more)
        console.info("Saved %s as checkpoint %s" % (checkpoint.path, name) if checkpoint.path else "Checkpoint " + name)


class RecordingSettings:
    """How a process records an experiment.

    role: a "script" records what it does itself; a "runner" records a program that it started (`replicate run`); a
    "guest" adds to the experiment of a runner (`replicate checkpoint`), which ends when that program does.
    """

    def __init__(self, heartbeat: bool = True, keep: Optional[Tuple[int, int]] = None, role: str = "script",
                 program: Sequence[str] = ()) -> None:
        self.heartbeat = heartbeat  # mark the experiment as running
        self.keep = keep            # the files of this many of the best and of the latest checkpoints; None: of all
        self.role = role
        self.program = program      # the command line that a runner runs


class Recorder:
    """Records one experiment of this process into a repository on disk: the user's own, or the pending area of a bucket.

    checkpoint() writes the files and a line of the journal; as these survive a crash, nothing is lost. Two threads do the
    rest: the worker folds the journal into the document, compresses and uploads; the pulse writes heartbeats. Only they use
    the network, so stop() never waits longer than its limits.
    """

    def __init__(self, repository: Repository, experiment: Experiment, directory: str, settings: RecordingSettings,
                 remote: Optional[Repository] = None, prepared: bool = True, lock: Optional[FileLock] = None) -> None:
        self.repository = repository
        self.target = remote or repository
        self.storage: DiskStorage = repository.storage  # type: ignore[assignment]
        self.experiment = experiment
        self.directory = directory
        self.settings = settings
        self.pruned: Set[str] = set()                 # the IDs of checkpoints whose files were not kept
        self.pid = os.getpid()
        self.gone = False                             # the experiment was removed
        self.closed = False                           # no more checkpoints are taken
        self.over = False                             # both threads have to end
        self.changed = Condition()                    # guards this object, its document and its worker
        self.document = LiveDocument(repository, experiment, self.changed)
        self.pulse = Pulse(self)
        self.worker = Worker(self, remote, prepared, lock)
        self.messages = Messages()
        self.code: Dict[str, Tuple[int, int]] = {}    # size and CRC-32 of each file that init() saved
        self._saving: List[Tuple[int, Any]] = []      # of each running checkpoint(): its thread, a lock that it holds
        self._keys = [archive_key("experiments", experiment.id)]  # and the other archives that this run writes

    def key(self) -> Tuple[str, str]:
        """(URL, experiment ID): a process has one active recorder for each."""
        return self.target.url, self.experiment.id

    def claim(self) -> bool:
        """Show that this process records the experiment; return False if another process on this disk does."""
        if self.worker.lock is None:
            lock = live_lock(self.storage, self.experiment.id)
            try:
                if not lock.acquire(wait=False):
                    return False
                os.write(lock.descriptor, os.fsencode(platform.node()))
            except OSError as error:
                console.debug("Experiment %s cannot be locked: %s" % (self.experiment.short_id(), error))
            self.worker.lock = lock
        return True

    def start(self) -> None:
        """Start the threads and mark the experiment as running. Raises WriteError and the like."""
        patience = 0 if self.worker.failure else REACH_SECONDS
        if self.settings.role != "guest":
            self.claim()
        _recorders.append(self)
        install_exit_hooks()
        exit_calls.watch()
        for name, task in (("pulse", self.pulse), ("worker", self.worker)):
            try:
                if termination.ending:  # read after the recorder is in the list; set before those in the list are stopped
                    raise RuntimeError("the process is ending")
                threading.Thread(target=task.run, name="replicate-" + name, daemon=True).start()
            except RuntimeError as error:  # or the system allows no more threads
                self.pulse.failure = WriteError("Recording cannot start: %s." % error)
                self.pulse.has_beaten.set()
                task.ended.set()
        self.pulse.has_beaten.wait(patience)
        if self.pulse.failure is not None:
            stop_all(TERMINATION_SECONDS, [self])
            raise self.pulse.failure

    # -- called by the training script

    def checkpoint(self, experiment: Experiment, path: Any, step: Any, metrics: Any, primary_metric: Any,
                   quiet: bool) -> Optional[Checkpoint]:
        """See Experiment.checkpoint; never raises. None if another thread has just stopped this recorder.

        experiment: the caller's object, which need not be the one that the recorder was started with.
        """
        problems: List[str] = []
        values, primary = _valid_metrics(metrics, problems), _valid_primary(primary_metric, problems)
        saving = threading.Lock()
        with termination, saving:
            exit_calls.error = None
            with self.changed:
                if self.closed:
                    return None
                self._saving = [(thread, other) for thread, other in self._saving if other.locked()]
                self._saving.append((threading.get_ident(), saving))
                checkpoint = next_checkpoint(self.experiment, None, step, values, primary, problems)
                if experiment is not self.experiment:
                    checkpoint = Checkpoint(checkpoint._document, experiment)
                    experiment.checkpoints.append(checkpoint)
                if path is None:  # before the lock is released, so that the document keeps this order
                    failure = self.document.append({"checkpoint": checkpoint._document})
            if path is not None:
                try:
                    self._save_files(checkpoint, path, quiet)
                except Exception as error:  # recording must never break training
                    problems.append(_problem(error))
                failure = self.document.append({"checkpoint": checkpoint._document})
                if self.settings.keep and not failure:
                    self._prune(*self.settings.keep)
            self.messages.report_checkpoint(checkpoint, problems, failure, quiet)
        return checkpoint

    def _save_files(self, checkpoint: Checkpoint, path: Any, quiet: bool) -> None:
        saved = relative_path(path, self.directory)
        sources = find_sources(self.directory, saved, [self.storage.root])
        if not sources:
            raise ValueError("path %r contains no files to save" % (path,))
        warn_if_disk_is_low(self.storage.root, sum(source.size for source in sources), self.messages.reported)
        self.worker.wait_for_room(quiet)
        table, large = save_archive(self.storage, "checkpoints", checkpoint.id, sources)
        checkpoint._document["path"] = saved
        is_changed = any(self.code.get(name, (size, crc)) != (size, crc) for name, _, size, crc in table.files)
        if is_changed and saved != ".":
            self.messages.hint_at_outputs(saved, os.path.isdir(os.path.join(self.directory, saved)))
        with self.changed:
            self._keys.append(archive_key("checkpoints", checkpoint.id))
            if self.gone:  # removed while it was written
                self.storage.delete(self._keys[-1:])
        if large:
            self.worker.pack_later("checkpoints", checkpoint.id)

    def _prune(self, keep_best: int, keep_latest: int) -> None:
        """Remove the files of checkpoints that init() was told not to keep; in a bucket, the worker does that."""
        with self.changed:
            items = [checkpoint._document for checkpoint in self.experiment.checkpoints]
            ids = {item["id"] for item in prunable(items, keep_best, keep_latest)}
            if any(self.document.append({"pruned": item_id}) for item_id in ids):
                return  # the disk is full: the next checkpoint tries again
            self.pruned |= strip_files(items, ids)
        self.discard([archive_key("checkpoints", item_id) for item_id in ids])

    # -- called by the threads

    def discard(self, keys: Sequence[str]) -> None:
        """Remove archives that nobody needs; recording goes on if that fails."""
        try:
            self.storage.delete(keys)
        except ReplicateError as error:
            self.messages.report(error)

    def fold(self, final: Optional[Dict[str, Any]] = None) -> None:
        """Fold the journal and final keys into the document; if that fails, the worker tries the journal again later."""
        try:
            if not self.gone:
                self.document.fold(final)
                self.worker.upload_soon()
        except ExperimentGone:
            self.lose()
        except Exception as error:
            self.messages.report(error)

    def lose(self) -> None:
        """Stop recording because somebody removed the experiment; say so once.

        If only its pending area was removed, the bucket keeps what it has.
        """
        if self.gone:
            return
        try:
            self.target.storage.stat(document_key(self.experiment.id))
            only_here = True
        except ReplicateError as error:  # after any other error, what the bucket may have stays
            only_here = not isinstance(error, DoesNotExist)
        self.abandon(from_bucket=not only_here)
        self.messages.report_gone(self.experiment, (self.repository if only_here else self.target).url)

    # -- the end

    def close(self, deadline: float, outcome: Dict[str, str]) -> bool:
        """Take no more checkpoints, write those made, and tell the worker to finish; return False if already closed."""
        if os.getpid() != self.pid:
            return False
        with self.changed:
            if self.closed:
                return False
            self.closed = True
            self.changed.notify_all()
        if self in _recorders:
            _recorders.remove(self)
        if not _recorders:
            exit_calls.ignore()
        try:
            self._write_end(deadline, outcome)
        except KeyboardInterrupt:  # the second of two: what is running now is over all the same
            self._write_end(time.monotonic(), outcome)
            self.over = True
            raise
        return True

    def _write_end(self, deadline: float, outcome: Dict[str, str]) -> None:
        for thread, saving in self._saving:
            if thread == threading.get_ident() and saving.locked():  # the caller is a signal handler: our threads may wait
                deadline = min(deadline, time.monotonic() + TERMINATION_SECONDS)  # for a lock that checkpoint() has
            else:
                saving.acquire(timeout=min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX))
        final = {"outcome": following(outcome, self.experiment._document)} if self.settings.role != "guest" else {}
        self.experiment._document.update(final)
        self.fold(dict(final, imported_packages=imported_packages()) if self.settings.role == "script" else final)
        if self.document.unwritten:
            console.error("%s of experiment %s could not be written and will be lost." % (
                plural(len(self.document.unwritten), "checkpoint"), self.experiment.short_id()))
        self.document.close(remove=self.gone)
        if self.worker.failure:
            deadline = min(deadline, time.monotonic() + TERMINATION_SECONDS)
        self.worker.finish_by(deadline - JOIN_SECONDS)

    def finish(self) -> None:
        """Wait for the worker, then for the pulse, which removes the heartbeat, and for the disk itself."""
        self.worker.wait()
        with self.changed:
            self.over = True
            self.worker.finish_by(time.monotonic())
        until = time.monotonic() + JOIN_SECONDS
        try:
            for ended in (self.pulse.ended, self.worker.ended):
                ended.wait(max(0.0, until - time.monotonic()))
        finally:
            if self.worker.ended.is_set():
                self.worker.release()
        self.worker.warn_of_rest()
        # last, since a slow disk may take longer than a scheduler waits before it kills
        self.storage.sync(self._keys + [document_key(self.experiment.id)])

    def abandon(self, from_bucket: bool = True) -> None:
        """Stop recording because the experiment is removed, and remove what this run has written."""
        with self.changed:
            self.gone = True
            del self.worker.packing[1:]  # the worker may be at the first; stop() waits until it has noticed
            self.document.unwritten.clear()
            self.changed.notify_all()
        self.document.close(remove=True)
        self.worker.release()
        keys = self._keys + [heartbeat_key(self.experiment.id)]
        try:
            self.storage.delete(keys)
            if self.worker.remote:
                self.repository.remove_experiment(self.experiment)
                if from_bucket:
                    self.target.storage.delete(keys)
        except ReplicateError as error:
            console.debug(str(error))

    def forget(self) -> None:
        """In a forked child, let go of the parent's files; without our own locks, whose threads do not exist there."""
        for journal in self.document.journals:
            journal.release(remove=False)
        if self.worker.lock:
            self.worker.lock.release(remove=False)


def _problem(error: BaseException) -> str:
    """The text of an error without its final full stop, to be part of a sentence."""
    if isinstance(error, ReplicateError):
        return str(error).rstrip(".")
    text = short_reason(error) if isinstance(error, (OSError, ValueError, TypeError)) else repr(error)
    return text.rstrip(".")


def _valid_step(step: Any, last: Optional[Dict[str, Any]], problems: List[str]) -> int:
    following = min((last.get("step") or 0) + 1, MAX_STEP) if last else 0
    if step is None:
        return following
    try:
        value = plain_value(step, "step")
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is int and -MAX_STEP <= value <= MAX_STEP:
            return value
        shown = repr(step)[:50]
    except Exception:  # a foreign object may raise anything
        shown = "a " + type(step).__name__
    problems.append("step must be an integer, not %s: recorded as step %d" % (shown, following))
    return following


def _valid_metrics(metrics: Any, problems: List[str]) -> Dict[str, Any]:
    try:
        fields = {} if metrics is None else fields_of(metrics)
    except Exception:  # a foreign object may raise anything
        fields = None
    if fields is None:
        problems.append("metrics must be a dict, not %s" % type(metrics).__name__)
    valid = {}
    for name, value in (fields or {}).items():
        try:
            if not isinstance(name, str):
                raise TypeError("the names in metrics must be strings, not %r" % (name,))
            valid[str.__str__(name)] = checked_metric(value, "metrics[%r]" % name)
        except Exception as error:  # a foreign object may raise anything
            problems.append(_problem(error))
    return valid


def _valid_primary(primary: Any, problems: List[str]) -> Optional[Dict[str, str]]:
    if primary is None:
        return None
    try:
        name, goal = primary
        if isinstance(primary, (tuple, list)) and isinstance(name, str) and name and goal in ("maximize", "minimize"):
            return {"name": str.__str__(name), "goal": str.__str__(goal)}
        shown = repr(primary)[:80]
    except Exception:  # a foreign object may raise anything
        shown = type(primary).__name__
    problems.append("primary_metric must be (name, 'maximize' or 'minimize'), not %s" % shown)
    return None


def warn_of_params(params: Dict[str, Any], unknown: Sequence[str]) -> None:
    """Warn about params that look like secrets, and about those in `unknown`, which have no plain form."""
    for name, value in params.items():
        if re.search(SECRET_SHAPES, value if isinstance(value, str) else json.dumps(value)):
            console.warning("Param %r looks like a secret: everyone who can read the repository can see it." % name)
    if unknown:
        more = " and %d more" % (len(unknown) - 10) if len(unknown) > 10 else ""
        console.warning("These params cannot be stored as JSON, so their text is recorded: %s%s." % (
            ", ".join(unknown[:10]), more))


def prepare_in_time(repository: Repository) -> bool:
    """Prepare a repository for recording; return False if it does not answer in time.

    Raises ReplicateError if the repository cannot be used.
    """
    if repository.storage.has_journals:
        repository.prepare()
        return True
    outcome: List[Optional[BaseException]] = []

    def prepare() -> None:
        try:
            repository.prepare()
            outcome.append(None)
        except BaseException as error:  # raised below, in the caller's thread
            outcome.append(error)

    thread = threading.Thread(target=prepare, name="replicate-prepare", daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    problem = outcome[0] if outcome else Unreachable("%s cannot be reached: it does not answer." % repository.url)
    if isinstance(problem, Unreachable):
        console.warning("%s. Recording continues; uploads will be retried." % _problem(problem))
        return False
    if problem is not None:
        raise problem
    return True


def warn_if_disk_is_low(directory: str, size: int, reported: Set[str]) -> None:
    """Warn once if writing `size` bytes leaves little space on the disk."""
    while not os.path.isdir(directory):
        directory = os.path.dirname(directory)
    try:
        free = shutil.disk_usage(directory).free
    except OSError:
        return
    if free < size + LOW_DISK_BYTES and "disk" not in reported:
        reported.add("disk")
        console.warning("The disk of %s is nearly full: saving %s with only %s free." %
                        (directory, format_size(size), format_size(free)))


def warn_if_code_is_large(sources: Sequence[Source]) -> None:
    """Warn if init() saves surprisingly much, and name the largest files."""
    size = sum(source.size for source in sources)
    if size > LARGE_CODE_BYTES:
        largest = sorted(sources, key=lambda source: -source.size)[:3]
        console.warning("init() saves %s in %s. The largest are %s. List those you do not need in .replicateignore." % (
            format_size(size), plural(len(sources), "file"),
            ", ".join("%s (%s)" % (source.name, format_size(source.size)) for source in largest)))


# What happens when the process ends.

_recorders: List[Recorder] = []  # those that take checkpoints
_stopped_while_raising: List[Tuple[Recorder, type, int]] = []  # with the type and id() of the exception then propagating
_finalizer: Any = None           # of multiprocessing, which calls stop_at_exit()
_resuming = threading.RLock()    # held while a recorder resumes an experiment


def active_recorder(key: Tuple[str, str]) -> Optional[Recorder]:
    """This process's recorder with that Recorder.key(), unless it is closed."""
    return next((recorder for recorder in list(_recorders) if recorder.key() == key and not recorder.closed), None)


class Termination:
    """Handles termination_signals(): stops every experiment, then does what the handler before it did.

    As a context it defers them while the main thread is inside recording code, since the handler needs the same
    locks. The main thread is inside while the frame that entered the context is on the stack; so if Ctrl-C prevents
    leaving the context, later signals are handled all the same.
    """

    def __init__(self) -> None:
        self.ending = False             # nothing new is recorded
        self.deferred: Any = None       # the arguments of _finish() for a signal that came inside the context
        self._frame: Any = None         # that entered the context
        self._first: Dict[int, Any] = {}  # by signal: the handler that was there before ours
        self._mask: Any = None
        self._watches_forks = False     # in this process, or in one that it was forked from

    def install(self) -> None:
        """Handle the signals from now on, except those that the program ignores; does nothing outside the main thread."""
        from functools import partial
        if threading.current_thread() is not threading.main_thread():
            return
        if not self._watches_forks and hasattr(os, "register_at_fork"):
            self._watches_forks = True
            os.register_at_fork(before=self._before_fork, after_in_parent=self._after_fork, after_in_child=self._in_child)
        for number in termination_signals():
            current = signal.getsignal(number)
            if current not in (None, signal.SIG_IGN) and not self._is_ours(current):
                self._first.setdefault(number, current)
                signal.signal(number, partial(self._handle, current))  # which a script's later handler may call in turn

    def _is_ours(self, handler: Any) -> bool:
        return getattr(handler, "func", None) == self._handle

    def _is_inside(self, frame: Any) -> bool:
        """Whether a frame of the main thread is the one that entered the context, or was called from it."""
        while self._frame is not None and frame is not None:
            if frame is self._frame:
                return True
            frame = frame.f_back
        return False

    def _handle(self, previous: Any, number: int, frame: Any) -> None:
        if self._is_inside(frame):
            self.deferred = (previous, number, frame)
        else:
            self._finish(previous, number, frame)

    def _finish(self, previous: Any, number: int, frame: Any) -> None:
        was_ending, self.ending = self.ending, True
        try:
            stop_all(TERMINATION_SECONDS, outcome=dict(ending(), status="terminated"))
            if not callable(previous):
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
        finally:
            self.ending = was_ending
        if callable(previous):
            previous(number, frame)

    def __enter__(self) -> None:
        frame = sys._getframe(1)
        if threading.current_thread() is threading.main_thread() and not self._is_inside(frame):
            self._frame = frame

    def __exit__(self, *exc_info: Any) -> None:
        if self._frame is sys._getframe(1):
            self._frame = None
            if self.deferred:
                deferred, self.deferred = self.deferred, None
                self._finish(*deferred)

    # A forked child records nothing, so it gets the first handlers back. The signals are blocked while the child starts,
    # since Python drops those there that have arrived but were not handled yet.

    def _before_fork(self) -> None:
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, termination_signals())

    def _after_fork(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _in_child(self) -> None:
        global _resuming
        _resuming, DiskStorage.updating = threading.RLock(), threading.RLock()
        self.ending, self._frame, self.deferred = False, None, None
        for number, first in self._first.items():
            if self._is_ours(signal.getsignal(number)):
                signal.signal(number, first)
        self._first.clear()
        for recorder in _recorders:
            recorder.forget()
        _recorders.clear()
        _stopped_while_raising.clear()
        exit_calls.error = None
        self._after_fork()


termination = Termination()


class ExitCalls:
    """Notes the exit code of sys.exit(), which the interpreter does not reveal, by replacing it while a run is open."""

    def __init__(self) -> None:
        self.error: Optional[SystemExit] = None  # of the last call; a later checkpoint clears it: it was caught
        self._original: Any = sys.exit           # kept after ignore(): a module may have imported ours by name
        self._is_placed = False

    def watch(self) -> None:
        """Replace sys.exit."""
        self.error = None
        if not self._is_placed:
            self._original, sys.exit, self._is_placed = sys.exit, self._exit, True

    def ignore(self) -> None:
        """Restore sys.exit, unless somebody else has replaced it since."""
        if self._is_placed and sys.exit == self._exit:
            sys.exit, self._is_placed = self._original, False

    def _exit(self, status: Any = None) -> NoReturn:
        """Exit the interpreter by raising SystemExit(status)."""
        if threading.current_thread() is threading.main_thread():
            self.error = SystemExit(status)
        self._original(status)
        raise SystemExit(status)


exit_calls = ExitCalls()


def uncaught_error() -> Optional[BaseException]:
    """The exception or sys.exit() that ends the process, or None; to be called at its very end.

    In an interactive session an exception ends only one command, so it does not count.
    """
    if hasattr(sys, "ps1") or sys.flags.interactive or "ipykernel" in sys.modules:
        return None
    in_flight = sys.exc_info()[1]  # at the end of a child of multiprocessing
    return in_flight or getattr(sys, "last_value", None) or exit_calls.error


def stop_all(timeout: Optional[float] = None, recorders: Optional[Sequence[Recorder]] = None,
             outcome: Optional[Dict[str, str]] = None) -> None:
    """Stop these recorders, or all of this process; what takes longer than the timeout (seconds) is left pending."""
    deadline = time.monotonic() + timeout if timeout is not None else float("inf")
    with termination:
        try:
            closed = [recorder for recorder in list(_recorders if recorders is None else recorders)
                      if recorder.close(deadline, outcome or ending())]
            for recorder in closed:
                recorder.finish()
        except KeyboardInterrupt:
            if recorders is not None:
                raise
            console.warning("Interrupted: the next replicate command here finishes the rest.")


def stop_at_exit() -> None:
    """Stop every experiment at the end of the process, and let threads that still run start no other."""
    termination.ending = True
    error = uncaught_error()
    stop_all(outcome=ending(error))
    for recorder, kind, number in _stopped_while_raising:
        if error is not None and type(error) is kind and (kind is SystemExit or id(error) == number):
            amend_outcome(recorder, ending(error))


def amend_outcome(recorder: Recorder, outcome: Dict[str, str]) -> None:
    """Replace the outcome of a recorder that has finished: in the bucket if everything was uploaded, else here."""
    try:
        recorder.target.storage.deadline = time.monotonic() + TERMINATION_SECONDS
        repository = recorder.target if recorder.worker.is_done else recorder.repository
        repository.fold(recorder.experiment.id, [], final={"outcome": outcome})
    except ReplicateError as error:
        recorder.messages.report(error)


def install_exit_hooks() -> None:
    """Have experiments stopped at the end of the process, or by termination_signals()."""
    global _finalizer
    import atexit
    atexit.unregister(stop_at_exit)
    atexit.register(stop_at_exit)
    process = sys.modules.get("multiprocessing.process")
    if process is not None and process.parent_process():  # such a child may end without the functions of atexit
        from multiprocessing.util import Finalize
        if _finalizer is None or not _finalizer.still_active():
            _finalizer = Finalize(None, stop_at_exit, exitpriority=0)
    termination.install()


# ------------------------------------------------------------------------------------------------------------------
# 9  Library: Project, init, experiments
# ------------------------------------------------------------------------------------------------------------------

NO_REPOSITORY = ("Neither replicate.yaml nor %s was found for the project directory %s. Record a first run with replicate.init() "
                 "in a script, see how it looks with '%s demo', or name a repository with -R.")


class ArgumentError(ReplicateError, TypeError, ValueError):
    """An argument of init() or create() has the wrong type or value."""


class Project:
    """A project directory and its repository.

    repository is a URL, directory a path; either defaults to what the command line would find when the project is first
    used. Raises RepositoryConfigurationError, ConfigNotFound.
    """

    def __init__(self, repository: Optional[str] = None, directory: Optional[str] = None) -> None:
        if directory is not None and not os.path.isdir(directory):
            raise ConfigNotFound("There is no directory %s." % directory)
        self._arguments = (absolute_url(repository, working_directory()) if repository else None,
                           None if directory is None else os.path.abspath(directory))
        self._location: Optional[Location] = None
        self._repository: Optional[Repository] = None
        self.recorders = Recorders(self)
        self.experiments = ExperimentCollection(lambda: self)

    def __deepcopy__(self, memo: Any) -> Project:
        """Itself: a copy of an experiment is recorded by the same recorder."""
        return self

    def __reduce__(self) -> Tuple[Any, ...]:
        """An experiment that is pickled for another process can only be read there."""
        return _unpickled_project, (self.location.url, self.directory)

    @property
    def location(self) -> Location:
        """Where the project and its repository are."""
        if self._location is None or self._location.url is None:  # a configuration may come later
            self._location = find_location(*self._arguments)
        return self._location

    @property
    def directory(self) -> str:
        """The project directory (absolute)."""
        return self.location.directory

    @property
    def repository(self) -> Repository:
        """The repository. Raises ConfigNotFound if there is none, ReadError if it cannot be read."""
        if self._repository is None:
            repository = self.open_repository()
            repository.check_version()
            self._repository = repository
        return self._repository

    def open_repository(self) -> Repository:
        """Open the repository without checking its version. Raises ConfigNotFound if there is none."""
        location = self.location
        if location.url is None:
            raise ConfigNotFound(NO_REPOSITORY % (DEFAULT_STORAGE, location.directory, program_name()))
        repository = Repository(location.url)
        if not repository.storage.has_journals:
            pending = self.pending()
            root = pending.storage.root  # type: ignore[attr-defined]
            repository.pending = pending if os.access(root, os.R_OK | os.X_OK) else None  # another user's is private
        return repository

    def prepare(self) -> bool:
        """Prepare the repository for recording, a new .replicate/storage if there is none; False if a bucket does not answer.

        Raises ReplicateError if the repository cannot be used.
        """
        location = self.location
        if location.url is None:
            location.url = "file://" + os.path.join(location.directory, DEFAULT_STORAGE)
        self._repository = self.open_repository()
        return prepare_in_time(self._repository)

    def pending(self) -> Repository:
        """The pending area for this repository."""
        return pending_repository(self.directory, self.location.url or "")

    def waiting(self, experiment_id: str) -> List[Dict[str, Any]]:
        """The documents of an experiment in the pending areas, with the checkpoints that wait to be uploaded."""
        found = []
        for area in pending_areas(self.pending()):
            try:
                found.append(area.load(experiment_id))
            except DoesNotExist:
                continue
        return found

    def files_to_save(self, path: str, warn: Callable[[str], None] = console.warning,
                      patterns: Sequence[bytes] = LOGS) -> List[Source]:
        """The code to save at a path as relative_path() returns it, without the repository's files: see find_sources()."""
        url = self.location.url or ""
        excluded = [url[len("file://"):]] if url.startswith("file://") else []
        return find_sources(self.directory, path, excluded, warn, patterns)

    # -- what Experiment and Checkpoint ask of their project: see their methods of the same names

    def record(self, experiment: Experiment, path: Any, step: Any, metrics: Any, primary_metric: Any,
               quiet: bool) -> Checkpoint:
        """See Experiment.checkpoint."""
        while not termination.ending:
            try:
                recorder = self.recorders.ready(experiment)
            except Exception as error:  # recording must never break training
                if not termination.ending:
                    console.error("Experiment %s cannot be recorded: %s." % (experiment.short_id(), _problem(error)))
                break
            if recorder.pid != os.getpid():
                report_child()
                break
            if recorder.gone:
                recorder.messages.report_gone(experiment, recorder.target.url)
                break
            checkpoint = recorder.checkpoint(experiment, path, step, metrics, primary_metric, quiet)
            if checkpoint is not None:  # else another thread has just stopped the recorder
                return checkpoint
        else:
            if threading.current_thread() is threading.main_thread():
                console.error("This checkpoint is not recorded: experiment %s ended with the program. A function of atexit "
                              "can make checkpoints if it is registered after init()." % experiment.short_id())
        return unrecorded_checkpoint(experiment, path, step, metrics, primary_metric)

    def stop(self, experiment: Experiment, error: Optional[BaseException] = None,
             outcome: Optional[Dict[str, str]] = None) -> None:
        """See Experiment.stop; error is the exception that ends the experiment, or outcome tells how it ended.

        If another process records the experiment, only its heartbeat is removed.
        """
        recorder = self.recorders.find(experiment)
        if recorder is None:
            self.repository.storage.delete([heartbeat_key(experiment.id)])
            return
        in_flight = sys.exc_info()[1]
        stop_all(None, [recorder], outcome or ending(error))
        if in_flight is not None and error is None and outcome is None:
            # stopped in `finally:`, say: only the end of the process shows whether the exception ends it
            _stopped_while_raising.append((recorder, type(in_flight), id(in_flight)))

    def refresh(self, experiment: Experiment) -> None:
        """See Experiment.refresh."""
        waiting = self.waiting(experiment.id)  # first: it may be uploaded meanwhile
        experiment._replace(merged_document([self.repository.load(experiment.id), *waiting]))

    def delete(self, experiment: Experiment) -> None:
        """See Experiment.delete."""
        recorder = self.recorders.find(experiment)
        if recorder is not None:
            if recorder in _recorders:
                _recorders.remove(recorder)
            recorder.abandon()
        try:
            self.refresh(experiment)
        except DoesNotExist:
            pass
        self.repository.remove_experiment(experiment)

    def is_running(self, experiment: Experiment) -> bool:
        """See Experiment.is_running."""
        return self.repository.is_running(experiment.id)

    def running(self) -> Set[str]:
        """The IDs of all experiments that are running."""
        return self.repository.running()

    def open(self, experiment: Experiment, checkpoint: Optional[Checkpoint], path: str) -> BinaryIO:
        """See Checkpoint.open."""
        names = list(dict.fromkeys([normal_path(path), place_in(self.directory, os.path.abspath(path))]))
        return open_saved_file(self.repository, experiment, checkpoint, names)

    def checkout(self, experiment: Experiment, checkpoint: Optional[Checkpoint], output_directory: str,
                 path: Optional[str] = None, quiet: bool = False,
                 approve: Callable[[List[str]], None] = lambda names: None) -> List[str]:
        """Copy files into a directory and return their names. approve() gets the names of existing files whose content
        would change, and raises an exception to prevent that.

        Raises DoesNotExist, ReadError, WriteError.
        """
        layers = archives_of(experiment, [checkpoint])
        absent = absent_files(experiment, checkpoint)
        if not layers:
            raise DoesNotExist("Nothing to check out: %s" % (
                absent or "experiment %s saved no files." % experiment.short_id()))
        if absent:
            console.warning(absent)
        with Checkout(output_directory) as checkout:
            wanted = normal_path(path) if path else "."
            checkout.stage(self.repository, layers, None if wanted == "." else wanted, quiet)
            checkout.check_target()
            checkout.drop_foreign_configs()
            if isinstance(self.repository.storage, DiskStorage):
                checkout.drop_files_below(self.repository.storage.root)
            approve(checkout.conflicts())
            checkout.move()
            return sorted(checkout.files)


class Recorders:
    """The recorders that a project has in this process, one for each experiment; stopped ones stay."""

    def __init__(self, project: Project) -> None:
        self._project = project
        self._known: Dict[str, Recorder] = {}

    def find(self, experiment: Experiment) -> Optional[Recorder]:
        """The recorder of an experiment, or None if this project has not recorded it."""
        return self._known.get(experiment.id)

    def add(self, repository: Repository, experiment: Experiment, settings: RecordingSettings, prepared: bool) -> Recorder:
        """Make a recorder that writes to a repository on disk, or to the pending area of a bucket. Raises WriteError.

        prepared: the repository answered prepare_in_time().
        """
        directory = self._project.directory
        if repository.storage.has_journals:
            recorder = Recorder(repository, experiment, directory, settings)
        else:
            import copy
            repository.pending, lock = own_pending_area(self._project.pending(), experiment.id)
            remote = Repository(repository.url, copy.copy(repository.storage))  # stopping sets its deadline
            remote.storage.deadline = None
            recorder = Recorder(repository.pending, experiment, directory, settings, remote, prepared, lock)
        self._known[experiment.id] = recorder
        return recorder

    def ready(self, experiment: Experiment) -> Recorder:
        """The recorder for an experiment's next checkpoint; resumes an experiment that this process does not record."""
        known = self.find(experiment)
        if known and (known.gone or known.pid != os.getpid() or not known.closed):
            return known
        with _resuming:
            repository = self._project.repository
            active = active_recorder((repository.url, experiment.id))  # another project's, perhaps
            if active is None:
                return self.resume(repository, experiment, known.settings if known else RecordingSettings())
            self._known[experiment.id] = active
            return active

    def resume(self, repository: Repository, experiment: Experiment, settings: RecordingSettings,
               alone: bool = False) -> Recorder:
        """Start a recorder for an experiment in the repository.

        alone: raise ReplicateError if another process records it. Raises DoesNotExist, ReadError, WriteError.
        """
        sent = {}
        try:
            document = repository.load(experiment.id)
            sent = {SENT_KEY: True}
        except Unreachable:  # it is in memory, and new checkpoints go to the pending area
            document = experiment._document
        except DoesNotExist:
            if repository.pending is None:
                raise
            document = repository.pending.load(experiment.id)
        recorder = self.add(repository, experiment, settings, prepared=True)
        if alone:
            try:
                self._claim(recorder)
            except ReplicateError:
                recorder.worker.release()
                del self._known[experiment.id]
                raise
        if recorder.repository is not repository:
            header = DocumentText(dict(document, checkpoints=[], **sent)).data()
            recorder.storage.update(document_key(experiment.id), lambda old: header if old is None else None)
        if alone:  # a checkpoint that this run prunes may still be in the journal of a killed one
            fold_abandoned(recorder.repository)
        recorder.start()
        if settings.heartbeat:
            experiment._document["outcome"] = following(opening(), document)
            recorder.fold({"outcome": experiment._document["outcome"]})
        return recorder

    def _claim(self, recorder: Recorder) -> None:
        """Keep other processes from resuming the experiment; raises ReplicateError if one records it already."""
        def reopen(document: Dict[str, Any]) -> None:
            outcome = outcome_of(document)
            if outcome.get("status") == OPEN:
                age = time.time() - parse_time(outcome["time"]).timestamp()
                if age < HEARTBEAT_TIMEOUT - 2:  # S3 cuts the time of a heartbeat to whole seconds
                    raise being_recorded(recorder.experiment)
            document["outcome"] = opening()

        if not recorder.worker.remote:
            if not recorder.claim():
                raise being_recorded(recorder.experiment)
            return
        if recorder.repository.url != self._project.pending().url:  # another process of this machine has the pending area
            raise being_recorded(recorder.experiment)
        try:
            recorder.target.edit(recorder.experiment.id, reopen)
        except DoesNotExist:  # it has not been uploaded yet
            pass


def being_recorded(experiment: Experiment) -> ReplicateError:
    """The error for a process that tries to resume an experiment while another one records it."""
    return ReplicateError("Experiment %s is being recorded by another process, so it cannot be resumed here. If that process "
                          "was killed, try again in %d seconds." % (experiment.short_id(), HEARTBEAT_TIMEOUT))


def merged_document(documents: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
    """The first of an experiment's documents, with the checkpoints of all, oldest first. Earlier documents win."""
    items = {item["id"]: item for document in reversed(documents) for item in document.get("checkpoints") or ()}
    return dict(documents[0], checkpoints=sorted(items.values(), key=lambda item: canonical_time(item["created"])))


def normal_path(path: str) -> str:
    """A path that a user typed, as archives store it: with forward slashes, without './'."""
    return os.path.normpath(str(path)).replace(os.sep, "/")


def unrecorded_checkpoint(experiment: Experiment, path: Any, step: Any, metrics: Any, primary_metric: Any) -> Checkpoint:
    """A checkpoint in memory only."""
    return next_checkpoint(experiment, str(path) if path else None, step, _valid_metrics(metrics, []),
                           _valid_primary(primary_metric, []), [])


# -- creating and resuming experiments

def create_experiment(project: Project, path: Optional[str], params: Any, settings: RecordingSettings, quiet: bool,
                      **labels: Any) -> Experiment:
    """Create an experiment and start to record it. labels: see checked_labels().

    Raises ArgumentError, and ReplicateError if the repository cannot be used.
    """
    unknown: List[str] = []
    try:
        labels = checked_labels(**labels)
        values = checked_params(params, unknown)
        saved = None if path is None else relative_path(path, project.directory)
        sources = project.files_to_save(saved) if saved else []
    except (TypeError, ValueError) as error:
        raise ArgumentError("init(): %s." % str(error).rstrip(".")) from None
    warn_of_params(values, unknown)
    if saved and not sources:
        console.warning("init() saves no files: path %r is empty, or everything in it is ignored." % saved)
        saved = None
    is_new = project.location.url is None
    prepared = project.prepare()
    experiment = Experiment(new_document(project.location, saved, values, settings.heartbeat, settings.program), project)
    recorder = project.recorders.add(project.repository, experiment, settings, prepared)
    try:
        if sources:
            _save_code(recorder, sources)
        experiment._document.update(labels, **machine_keys(project.directory))
        recorder.repository.create(experiment._document)
        recorder.start()
    except BaseException:
        recorder.abandon()
        recorder.storage.remove(document_key(experiment.id))
        raise
    if is_new or not quiet:
        _announce_recording(experiment, project.repository.url, is_new, sources)
    return experiment


def _save_code(recorder: Recorder, sources: Sequence[Source]) -> None:
    """Save the code of an experiment, and note its digest in the document. Raises WriteError."""
    experiment = recorder.experiment
    warn_if_code_is_large(sources)
    warn_if_disk_is_low(recorder.storage.root, sum(source.size for source in sources), recorder.messages.reported)
    table, large = save_archive(recorder.storage, "experiments", experiment.id, sources)
    recorder.code = {name: (size, crc or 0) for name, _, size, crc in table.files}
    experiment._document["code"] = code_digest(recorder.code)
    if large:
        recorder.worker.pack_later("experiments", experiment.id)


def _announce_recording(experiment: Experiment, url: str, is_new: bool, sources: Sequence[Source]) -> None:
    """Say where the experiment is recorded."""
    notes = ["a new repository: there is no replicate.yaml here"] if is_new else []
    if sources:
        notes.append("saved %s" % (sources[0].name if len(sources) == 1 else plural(len(sources), "file")))
    console.info("Recording experiment %s in %s%s" % (experiment.short_id(), url, " (%s)" % "; ".join(notes) if notes else ""))


def resume_experiment(project: Project, which: str, path: Optional[str], params: Any, settings: RecordingSettings,
                      quiet: bool) -> Optional[Experiment]:
    """Go on recording the experiment that resumable_experiment() finds; None if there is none.

    Raises ArgumentError, and ReplicateError if another process records it.
    """
    if not isinstance(which, str) or not which:
        raise ArgumentError("init(): resume must be an ID, a name or 'auto', not %r." % (which,))
    experiment = resumable_experiment(project, which)
    if experiment is None:
        return None
    try:
        check_same_params(experiment, checked_params(params, []))
        sources = [] if path is None else project.files_to_save(relative_path(path, project.directory))
    except (TypeError, ValueError) as error:
        raise ArgumentError("init(): %s." % str(error).rstrip(".")) from None
    if not falls_silent(project.repository, [experiment.id]):
        raise being_recorded(experiment)
    project.refresh(experiment)
    if path is not None:
        _warn_of_changed_code(experiment, sources)
    with _resuming:
        project.recorders.resume(project.repository, experiment, settings, alone=True)
    if not quiet:
        last = experiment.latest()
        console.info("Resuming experiment %s in %s%s" % (experiment.short_id(), project.repository.url, " after checkpoint "
                                                         "%s (step %d)" % (last.short_id(), last.step) if last else ""))
    return experiment


def resumable_experiment(project: Project, which: str, also_running: bool = False) -> Optional[Experiment]:
    """The experiment of that ID or name; for "auto" the last one of this job, or without a job the last one of this
    command, or None if there is none or it completed.

    also_running: consider experiments that are running, too. Raises DoesNotExist, ReadError.
    """
    if which != "auto":
        fold_abandoned(project.repository)
        return project.experiments.get(which)
    if project.location.url is None:
        return None
    job = current_job()
    key, value = ("job", job) if job else ("command", masked_command(program_arguments(project.directory)))
    try:
        fold_abandoned(project.repository)
        rows = [row for row in list_rows(project.repository) if row.summary.get(key) == value]
        if not also_running and falls_silent(project.repository, [row.id for row in rows if row.running]):
            return resumable_experiment(project, which)  # its process was killed
    except NoBucket:
        return None
    except Unreachable as error:
        console.warning("%s. Earlier runs cannot be looked up, so a new experiment starts." % _problem(error))
        return None
    rows = [row for row in rows if also_running or not row.running]
    if not rows or rows[-1].status in ("completed", "stopped"):  # "stopped": it may have completed
        return None
    return project.experiments.get(rows[-1].id)


def falls_silent(repository: Repository, ids: Iterable[str]) -> bool:
    """Whether nobody records one of these experiments any more.

    Waits until each has a new heartbeat, or one has a heartbeat that is too old or removed.
    """
    versions: Dict[str, str] = {}
    waiting = list(ids)
    while waiting:
        for experiment_id in list(waiting):
            try:
                entry = repository.storage.stat(heartbeat_key(experiment_id))
            except DoesNotExist:
                return True
            if not repository.is_recent(entry):
                return True
            if experiment_id not in versions:
                console.info("Experiment %s seems to be running: waiting up to %d seconds to see whether it still is" % (
                    experiment_id[:SHORT_ID], HEARTBEAT_TIMEOUT))
            if versions.setdefault(experiment_id, entry.version) != entry.version:
                waiting.remove(experiment_id)
        time.sleep(0.2)
    return False


def _warn_of_changed_code(experiment: Experiment, sources: Sequence[Source]) -> None:
    """Warn if the code to save differs from the code that an experiment saved, apart from what its checkpoints saved."""
    outputs = {checkpoint.path or checkpoint.pruned for checkpoint in experiment.checkpoints}
    try:
        names = [name for name in changed_names(saved_files(experiment.project, experiment), PresentFiles(sources))
                 if not any(path and (name + "/").startswith(path + "/") for path in outputs)]
    except ReplicateError as error:
        console.debug(str(error))
        return
    if names:
        more = " and %d more" % (len(names) - 5) if len(names) > 5 else ""
        console.warning("The code has changed since experiment %s started: %s%s. The experiment keeps the code that it saved; "
                        "see the changes with '%s diff %s'." % (experiment.short_id(), ", ".join(names[:5]), more,
                                                                program_name(), experiment.short_id()))


def saved_files(project: Project, item: Union[Experiment, Checkpoint]) -> Any:
    """The files that an experiment or checkpoint saved, to be compared. Raises DoesNotExist, ReadError."""
    if isinstance(item, Checkpoint) and item.pruned:
        raise DoesNotExist(pruned_files(item))
    if not item.path:
        return PresentFiles(())
    return SavedFiles(project.repository, "experiments" if isinstance(item, Experiment) else "checkpoints", item.id)


def present_files(project: Project, item: Union[Experiment, Checkpoint]) -> PresentFiles:
    """The present files at the path that an experiment or checkpoint saved, to be compared. Raises DoesNotExist."""
    if not item.path:
        raise DoesNotExist("There is nothing to compare the project directory with: %s saved no files." % item.short_id())
    try:
        patterns = LOGS if isinstance(item, Experiment) else ()
        return PresentFiles(project.files_to_save(normal_path(item.path), console.debug, patterns))
    except ValueError as error:
        raise DoesNotExist("The project directory cannot be compared: %s." % error) from error


def add_checkpoint(project: Project, experiment_id: str, path: Optional[str], step: Optional[int], metrics: Dict[str, Any],
                   primary_metric: Optional[Tuple[str, str]], quiet: bool) -> Checkpoint:
    """Add a checkpoint to an experiment that another process records.

    Raises DoesNotExist, Unreachable, ReadError, and WriteError if the checkpoint was not recorded.
    """
    repository = on_disk = project.open_repository()
    if not repository.storage.has_journals:
        on_disk = project.pending()
        make_private_folder(on_disk.storage.root)  # type: ignore[attr-defined]
        repository.storage.deadline = time.monotonic() + REACH_SECONDS + JOIN_SECONDS  # training waits for this
    with FileLock(on_disk.storage.path("tmp/%s.guest.lock" % experiment_id)):  # type: ignore[attr-defined]
        documents, is_reached = project.waiting(experiment_id), True
        try:
            documents.insert(0, repository.load(experiment_id))
        except (DoesNotExist, Unreachable) as error:
            if not documents:
                raise
            is_reached = not isinstance(error, Unreachable)
        experiment = Experiment(merged_document(documents), project)
        recorder = project.recorders.resume(repository, experiment, RecordingSettings(heartbeat=False, role="guest"))
        checkpoint = recorder.checkpoint(experiment, path, step, metrics, primary_metric, quiet)
    stop_all(None if is_reached else 0.0, [recorder])
    if checkpoint is None or recorder.gone or recorder.document.unwritten:
        raise WriteError("The checkpoint was not recorded.")
    return checkpoint


class InertProject:
    """The project of an experiment that records nothing: in every process of a distributed job but the first, and in
    children of multiprocessing.

    project: where to read the files of an experiment that another process records.
    """

    def __init__(self, project: Optional[Project] = None, in_child: bool = False) -> None:
        self._project, self._in_child = project, in_child

    def record(self, experiment: Experiment, path: Any, step: Any, metrics: Any, primary_metric: Any,
               quiet: bool) -> Checkpoint:
        if self._in_child:
            report_child()
        return unrecorded_checkpoint(experiment, path, step, metrics, primary_metric)

    def stop(self, experiment: Experiment, error: Optional[BaseException] = None) -> None:
        """Do nothing."""

    refresh = delete = stop

    def is_running(self, experiment: Experiment) -> bool:
        return False

    def running(self) -> Set[str]:
        return set()

    def open(self, experiment: Experiment, checkpoint: Optional[Checkpoint], path: str) -> BinaryIO:
        if self._project:
            return self._project.open(experiment, checkpoint, path)
        raise DoesNotExist("This process of a distributed job records nothing; process 0 does.")

    def checkout(self, experiment: Experiment, checkpoint: Optional[Checkpoint], output_directory: str,
                 path: Optional[str] = None, quiet: bool = False) -> List[str]:
        return self._project.checkout(experiment, checkpoint, output_directory, path, quiet) if self._project else []


def _unpickled_project(url: str, directory: str) -> InertProject:
    return InertProject(Project(url, directory if os.path.isdir(directory) else None), in_child=True)


class ExperimentCollection:
    """The experiments of a project: `replicate.experiments`, `Project(...).experiments`."""

    def __init__(self, find_project: Callable[[], Project]) -> None:
        self._find_project = find_project

    def create(self, path: Optional[str] = None, params: Any = None, disable_heartbeat: bool = False, quiet: bool = False, *,
               name: Optional[str] = None, tags: Optional[Iterable[str]] = None, note: Optional[str] = None,
               keep_best: Optional[int] = None, keep_latest: Optional[int] = None) -> Experiment:
        """Create and start an experiment, as init() does, without stopping the other experiments of this process."""
        if is_secondary_process():
            return inert_experiment(path, params)
        settings = RecordingSettings(not disable_heartbeat, checked_keep(keep_best, keep_latest))
        return create_experiment(self._find_project(), path, params, settings, quiet, name=name, tags=tags, note=note)

    def get(self, experiment_id: str) -> Experiment:
        """The experiment of that name, or whose ID starts with it. Raises DoesNotExist if none or several match."""
        if not isinstance(experiment_id, str):
            raise ArgumentError("experiments.get(): the ID must be a string, not %s." % type(experiment_id).__name__)
        project = self._find_project()
        if not is_id(experiment_id):
            experiment, _ = find_item(project.repository, experiment_id)
            experiment.project = project
            return experiment
        ids = [entry.name[:-5] for entry in project.repository.document_entries(ignore_skipped)]
        found = [item for item in ids if item == experiment_id] or [item for item in ids if item.startswith(experiment_id)]
        if not found:
            raise DoesNotExist("Experiment not found: %s." % experiment_id)
        if len(found) > 1:
            raise DoesNotExist("The ID %s is ambiguous: %d experiment IDs start with it." % (experiment_id, len(found)))
        return Experiment(project.repository.load(found[0]), project)

    def list(self, filter: Optional[Callable[[Experiment], bool]] = None) -> ExperimentList:
        """All experiments, or those for which filter(experiment) is true; oldest first."""
        if filter is not None and not callable(filter):
            raise ArgumentError("experiments.list(): filter must be a function that takes an experiment.")
        project = self._find_project()
        found, failed = ExperimentList(), []
        for experiment in project.repository.experiments():
            experiment.project = project
            try:
                if filter is None or filter(experiment):
                    found.append(experiment)
            except Exception as error:  # a param that only some have, for instance
                failed.append("%s (%s: %s)" % (experiment.short_id(), type(error).__name__, short_reason(error)))
        if failed:
            more = " and %d more" % (len(failed) - 3) if len(failed) > 3 else ""
            console.warning("experiments.list(): left out %s for which the filter failed: %s%s" % (
                plural(len(failed), "experiment"), ", ".join(failed[:3]), more))
        return found


experiments = ExperimentCollection(Project)


def init(path: Optional[str] = None, params: Any = None, disable_heartbeat: bool = False, debug: bool = False, *,
         quiet: bool = False, name: Optional[str] = None, tags: Optional[Iterable[str]] = None, note: Optional[str] = None,
         resume: Optional[str] = None, keep_best: Optional[int] = None, keep_latest: Optional[int] = None) -> Experiment:
    """Create and start an experiment, and stop those that this process started before.

    path is the file or directory of code to save, relative to the project directory ("." for all of it); params are
    the hyperparameters: a dict or other mapping, an argparse.Namespace or a dataclass object. disable_heartbeat: do not
    mark it as running. debug: print more; quiet: print less. name, tags (a list of words) and note help you find it again;
    `replicate tag` changes them later, and commands take a name in place of an ID.

    resume: the ID or name of an experiment to continue, or "auto" for the last one of this job (SLURM_JOB_ID,
    REPLICATE_JOB), or without a job the last one of this command, unless it completed or is still running. If it seems to
    be running, init() waits up to 30 seconds to see whether it was killed. It keeps its code, labels and step count, and
    params must be the same as before.

    keep_best, keep_latest: keep the files of this many of the best checkpoints, by the primary metric, and of the latest
    ones; if only one is given, the other is 1. All other checkpoints keep only their metrics.
    Raises ArgumentError for wrong arguments; RepositoryConfigurationError, WriteError and other ReplicateErrors for a
    repository that cannot be used.
    """
    if debug:
        console.verbose = True
    if is_secondary_process():
        return inert_experiment(path, params, resume)
    settings = RecordingSettings(not disable_heartbeat, checked_keep(keep_best, keep_latest))
    stop_all()
    project = Project()
    resumed = None if resume is None else resume_experiment(project, resume, path, params, settings, quiet)
    return resumed or create_experiment(project, path, params, settings, quiet, name=name, tags=tags, note=note)


def checked_keep(keep_best: Any, keep_latest: Any) -> Optional[Tuple[int, int]]:
    """How many of the best and of the latest checkpoints keep their files, or None if all do. Raises ArgumentError."""
    if keep_best is None and keep_latest is None:
        return None
    keep = 1 if keep_best is None else keep_best, 1 if keep_latest is None else keep_latest
    if not all(type(count) is int and count >= 0 for count in keep):
        raise ArgumentError("init(): keep_best and keep_latest must be numbers of checkpoints, such as keep_best=3.")
    return keep


RANK_SIZES = {"RANK": ("WORLD_SIZE",), "LOCAL_RANK": ("LOCAL_WORLD_SIZE", "WORLD_SIZE"),
              "SLURM_PROCID": ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"),
              "OMPI_COMM_WORLD_RANK": ("OMPI_COMM_WORLD_SIZE",)}  # the variables in which launchers say how many processes run
_announced: Set[str] = set()  # the rank variables that is_secondary_process() has mentioned, and what report_child() did


def is_secondary_process() -> bool:
    """Whether this process records nothing: it is not the first of a distributed job, and says so once, or is a child of
    multiprocessing that imports the script of its parent.
    """
    def number(variable: str) -> int:
        text = os.environ.get(variable, "")
        return int(text) if text.isdecimal() else 0

    if os.environ.get("REPLICATE_ALL_RANKS", "0") not in ("", "0"):
        return False
    if is_importing_script():
        return True
    for rank, sizes in RANK_SIZES.items():
        if number(rank) > 0 and any(number(size) > 1 for size in sizes):
            if rank not in _announced:
                _announced.add(rank)
                console.warning("%s=%d: this process records nothing; process 0 of the job does. "
                                "To record every process, set REPLICATE_ALL_RANKS=1." % (rank, number(rank)))
            return True
    return False


def is_importing_script() -> bool:
    """Whether this child of multiprocessing imports its parent's script, as it does before its own work unless forked."""
    module = sys.modules.get("multiprocessing.process")
    return module is not None and hasattr(module.current_process(), "_inheriting")


def report_child() -> None:
    """Print once that this process is a child that records nothing."""
    text = ("Checkpoints that a child process makes are not recorded: call checkpoint() in the process that called init(), or "
            "init() in each child.")
    if text not in _announced:
        _announced.add(text)
        console.error(text)


def inert_experiment(path: Optional[str], params: Any, resume: Optional[str] = None) -> Experiment:
    """An experiment that records nothing; it has the checkpoints of the one that process 0 resumes, if it does."""
    project = Project()
    try:
        resumed = resumable_experiment(project, resume, also_running=True) if resume else None
        if resumed is not None:
            return Experiment(resumed._document, InertProject(project))
    except ReplicateError as error:
        console.warning("%s." % _problem(error))
    try:
        values = checked_params(params, [])
    except TypeError:  # process 0 says so
        values = {}
    return Experiment({"id": new_id(), "created": timestamp(), "params": values, "path": path},
                      InertProject(in_child=is_importing_script()))


# -- callbacks for training frameworks; each function imports its own when it is called

def keras_callback(filepath: Optional[str] = "model.keras", params: Any = None,
                   primary_metric: Optional[Tuple[str, str]] = None, save_freq: Union[str, int] = "epoch",
                   save_weights_only: bool = False, path: Optional[str] = ".", **settings: Any) -> Any:
    """A callback for Keras 3 that records fit() as an experiment, with a checkpoint after each epoch.

    filepath: where to save the model for each checkpoint, as Keras names it (*.keras, or *.weights.h5 with
    save_weights_only); None: record only metrics. params are added to those of the optimizer and of fit(). primary_metric:
    (name, "minimize" or "maximize"), by default val_loss, or loss without validation. save_freq: "epoch", or a number of
    batches. path and settings (name=, keep_best= and so on) are for init(). Raises ReplicateError if Keras is not installed.
    """
    keras = framework("keras")

    class ReplicateCallback(keras.callbacks.Callback):  # type: ignore[name-defined]
        def on_train_begin(self, logs: Any = None) -> None:
            optimizer = getattr(self.model, "optimizer", None)
            config = {name: typed_float(value) for name, value in optimizer.get_config().items()} if optimizer else None
            known = {"epochs": self.params.get("epochs"), "optimizer": config}
            self.batches = 0
            self.experiment = init(path, merged_params(known, params), **settings)

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.batches += 1
            if save_freq != "epoch" and self.batches % int(save_freq) == 0:
                self.record(self.batches, logs)

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if save_freq == "epoch":
                self.record(epoch, logs)

        def on_train_end(self, logs: Any = None) -> None:
            self.experiment.stop()

        def record(self, step: int, logs: Any) -> None:
            save = self.model.save_weights if save_weights_only else self.model.save
            metrics, saved = number_metrics(logs), None
            if not isinstance(self.experiment.project, InertProject):
                saved = saved_model(lambda place: save(place, overwrite=True), filepath)
            self.experiment.checkpoint(saved, step, metrics, primary_metric or default_primary(metrics), quiet=True)

    return ReplicateCallback()


def lightning_callback(filepath: Optional[str] = "model.ckpt", params: Any = None,
                       primary_metric: Optional[Tuple[str, str]] = None, period: int = 1, save_weights_only: bool = False,
                       path: Optional[str] = ".", **settings: Any) -> Any:
    """A callback for the Trainer of Lightning 2 that records fit() as an experiment, with a checkpoint every `period` epochs.

    params are added to the module's hparams; period=0 makes no checkpoints; the other arguments are those of
    keras_callback(). Raises ReplicateError if Lightning is not installed.
    """
    lightning = framework("lightning.pytorch", "pytorch_lightning")

    class ReplicateCallback(lightning.Callback):  # type: ignore[name-defined]
        experiment: Optional[Experiment] = None

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            known = dict({"max_epochs": trainer.max_epochs}, **getattr(pl_module, "hparams", {}))
            if trainer.is_global_zero:
                self.experiment = init(path, merged_params(known, params), **settings)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if period < 1 or (trainer.current_epoch + 1) % period:
                return
            saved = saved_model(lambda place: trainer.save_checkpoint(place, save_weights_only), filepath)
            if self.experiment:  # Lightning needs every process to save; one records
                metrics = number_metrics(trainer.callback_metrics)
                self.experiment.checkpoint(saved, trainer.current_epoch, metrics, primary_metric or default_primary(metrics),
                                           quiet=True)

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            if self.experiment:
                self.experiment.stop()

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            if self.experiment:
                self.experiment.project.stop(self.experiment, exception)

    return ReplicateCallback()


def transformers_callback(params: Any = None, primary_metric: Optional[Tuple[str, str]] = None, path: Optional[str] = ".",
                          **settings: Any) -> Any:
    """A callback for the Trainer of Transformers that records train() as an experiment: a checkpoint with the metrics each
    time it logs, and one with the files each time it saves.

    params are added to the TrainingArguments. The output directory must be inside the project. primary_metric defaults to
    metric_for_best_model, else eval_loss, or loss without evaluation. Raises ReplicateError if Transformers is not installed.
    """
    transformers = framework("transformers")

    class ReplicateCallback(transformers.TrainerCallback):  # type: ignore[name-defined]
        experiment: Optional[Experiment] = None
        latest: Dict[str, Any] = {}

        def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            known = {name: value for name, value in args.to_dict().items()
                     if not name.endswith(("_dir", "_token")) and name != "run_name"}
            if state.is_world_process_zero:
                self.experiment = init(path, merged_params(known, params), **settings)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            self.latest = dict(self.latest, **number_metrics(logs))
            self.record(None, args, state, number_metrics(logs))

        def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            folder = os.path.join(args.output_dir, "checkpoint-%d" % state.global_step)
            self.record(os.path.abspath(folder), args, state, self.latest)

        def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if self.experiment:
                self.experiment.stop()

        def record(self, saved: Optional[str], args: Any, state: Any, metrics: Dict[str, Any]) -> None:
            if self.experiment:
                self.experiment.checkpoint(saved, state.global_step, metrics, primary_metric or self.default(args), quiet=True)

        def default(self, args: Any) -> Tuple[str, str]:
            name = args.metric_for_best_model
            if not name:
                return "loss" if getattr(args, "eval_strategy", "no") == "no" else "eval_loss", "minimize"
            if not name.startswith("eval_") and name not in self.latest:
                name = "eval_" + name
            return name, "maximize" if args.greater_is_better else "minimize"

    return ReplicateCallback()


def framework(*names: str) -> Any:
    """The first of these modules that can be imported. Raises ReplicateError if none can."""
    import importlib
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            failure = error
    package = names[0].partition(".")[0]
    raise ReplicateError("This callback needs %s: install it with 'pip install %s'." % (package, package)) from failure


def merged_params(known: Dict[str, Any], given: Any) -> Dict[str, Any]:
    """The params that a framework knows, without those that are None, updated with the caller's. Raises ArgumentError."""
    fields = {} if given is None else fields_of(given)
    if fields is None:
        raise ArgumentError("params must be a dict, a namespace or a dataclass object, not %s." % type(given).__name__)

    def without_none(values: Dict[str, Any]) -> Dict[str, Any]:
        return {name: without_none(value) if isinstance(value, dict) else value
                for name, value in values.items() if value is not None}

    return dict(without_none(known), **{key_text(key): value for key, value in fields.items()})


def typed_float(value: Any) -> Any:
    """A value of Keras's, as a person typed it: 0.001 for 0.0010000000474974513, which is what 32 bits make of it."""
    try:
        short = float("%.6g" % value) if type(value) is float else value
        return short if struct.unpack("f", struct.pack("f", short)) == (value,) else value
    except (OverflowError, struct.error):
        return value


def number_metrics(logs: Any) -> Dict[str, Any]:
    """The metrics of a framework that are numbers."""
    found = {}
    for name, value in (logs or {}).items():
        try:
            value = plain_value(value)
        except Exception:  # somebody else's object
            continue
        if _is_number(value):
            found[str(name)] = value
    return found


def default_primary(metrics: Dict[str, Any]) -> Optional[Tuple[str, str]]:
    """The loss to minimize: that of the validation if there is one; None without a loss."""
    return next(((name, "minimize") for name in ("val_loss", "loss", "train_loss") if name in metrics), None)


def saved_model(save: Callable[[str], Any], filepath: Optional[str]) -> Optional[str]:
    """The absolute filepath, after saving a model there; None without a filepath, or with a message if saving fails."""
    if not filepath:
        return None
    place = os.path.abspath(filepath)
    try:
        save(place)
        return place
    except Exception as error:  # recording must never break training
        console.error("The model could not be saved as %s: %s" % (filepath, short_reason(error)))
        return None


# ------------------------------------------------------------------------------------------------------------------
# 10  Rendering: tables, show, diff, curves, report (data in, text out)
# ------------------------------------------------------------------------------------------------------------------

SHOW_WIDTH = 17  # of a column in `show`, at least
DIFF_WIDTH = 26  # of a column in `diff`, at least
DIFF_CUT = 50    # characters of a value in `diff`, at most


def display_width(text: str) -> int:
    """The number of terminal columns that text takes."""
    if text.isascii():
        return len(text)
    import unicodedata
    return sum(0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
               for character in text)


def pad(text: str, width: int) -> str:
    """text with spaces added up to a display width."""
    return text.ljust(width) if text.isascii() else text + " " * (width - display_width(text))


def shortened(text: str, width: int) -> str:
    """text, cut with '...' if its display width is larger. A number keeps its exponent."""
    if display_width(text) <= width:
        return text
    end = "..." + re.search(r"(e[+-]\d\d\d?)?$", text).group()  # type: ignore[union-attr]
    text = text[:max(0, width)]  # first: it can be very long
    while text and display_width(text) > width - len(end):
        text = text[:-1]
    return text + end


def wrapped(text: str, width: int) -> List[str]:
    """text as lines of at most that display width, broken between words or after a mark as in `learning_rate=0.1`.

    `(step 4)` stays on one line if it can.
    """
    lines, line = [], ""
    for word in re.split(r" (?!\d+\))", text):
        if line and display_width(line) + 1 + display_width(word) <= width:
            line += " " + word
            continue
        if line:
            lines.append(line)
        start = 0
        while len(word) - start > width or display_width(word[start:]) > width:  # len() first: a word can be very long
            end = start + width
            while end > start + 1 and display_width(word[start:end]) > width:
                end -= 1
            marks = [word.rfind(mark, start, end) for mark in "=._/- "]
            mark = marks[0] if marks[0] >= 0 else max(marks)  # `=` first, so that no number is broken at its point
            if mark >= 0:
                end = mark + 1
            lines.append(word[start:end])
            start = end
        line = word[start:]
    return lines + [line]


def narrowed(widths: Sequence[int], words: Sequence[Sequence[int]], total: int) -> List[int]:
    """The widths of columns two spaces apart, with the widest shrunk until all fit into a total width.

    words: the longest word of each column, then only of its title; each breaks only where that is not enough, and the IDs in
    the first column never.
    """
    narrow = list(widths)
    for least in (*words, [2] * len(narrow)):
        floors = [max(SHORT_ID, least[0]), *least[1:]]
        while sum(narrow) + 2 * (len(narrow) - 1) > total and any(map(int.__gt__, narrow, floors)):
            widest = max((width, -number) for number, width in enumerate(narrow) if width > floors[number])
            narrow[-widest[1]] -= 1
    return narrow


def table_rows(columns: Sequence[Column], width: Optional[int] = None) -> Iterator[str]:
    """Yield the header of a table and then each row (one or more lines), with two spaces between columns.

    width: of the terminal, to which cells are wrapped; None for no limit.
    """
    from itertools import chain, zip_longest

    def longest(cells: Sequence[str], parts: Callable[[str], List[str]]) -> int:
        measure = len if all(map(str.isascii, cells)) else display_width
        return max(map(measure, chain.from_iterable(map(parts, cells))), default=0)

    table = [(title, *cells) for title, cells in columns]
    widths = natural = [longest(cells, str.splitlines) for cells in table]
    if width and sum(natural) + 2 * (len(natural) - 1) > width:
        widths = narrowed(natural, [[longest(cells[:end], str.split) for cells in table] for end in (None, 1)], width)

    def lines_of(cell: str, column: int) -> List[str]:
        lines = cell.split("\n")
        if widths[column] == natural[column]:
            return lines
        return [part for line in lines for part in wrapped(line, widths[column])]

    template = "  ".join(["%%-%ds" % column_width for column_width in widths])
    for row in zip(*table):
        lines = zip_longest(*map(lines_of, row, range(len(row))), fillvalue="")
        padded = map(template.__mod__, lines) if all(map(str.isascii, row)) else [
            "  ".join(map(pad, line, widths)) for line in lines]
        yield "\n".join(map(str.rstrip, padded))


def render_list(rows: Sequence[Row], now: datetime.datetime, show_all: bool = False,
                width: Optional[int] = None) -> Iterator[str]:
    """Yield the table of `ls` for at least one row: the header, then each experiment with a blank line below."""
    lines = table_rows(list_columns(rows, now, show_all), width)
    yield next(lines) + "\n"
    yield from (text + "\n\n" for text in lines)


def list_columns(rows: Sequence[Row], now: datetime.datetime, show_all: bool) -> List[Column]:
    """The columns of `ls`, leaving out those that say nothing, such as a HOST that all experiments share."""
    columns: List[Column] = [("EXPERIMENT", [row.id[:SHORT_ID] for row in rows])]
    names = [escape_control(text_in(row.summary, "name") or "") for row in rows]
    if any(names):
        columns.append(("NAME", names))
    columns += [("STARTED", [relative_time(row.created, now) for row in rows]), ("STATUS", [row.status for row in rows])]
    for title in ("HOST", "USER", "CODE"):
        texts = [escape_control(text_in(row.summary, title.lower()) or "") for row in rows]
        if len(set(texts)) > 1:
            columns.append((title, texts))
    tags = ["\n".join(map(format_cell, texts_in(row.summary, "tags"))) for row in rows]
    if any(tags):
        columns.append(("TAGS", tags))
    params, metrics = labelled(listed_params(rows, show_all)), labelled(listed_metrics(rows, show_all))
    columns.append(("PARAMS", ["\n".join(value_lines(row.params, params)) for row in rows]))
    if any(row.best for row in rows):
        columns.append(("BEST CHECKPOINT", [checkpoint_cell(row.best, metrics) for row in rows]))
    columns.append(("LATEST CHECKPOINT", [checkpoint_cell(row.latest, metrics) for row in rows]))
    return columns


def listed_params(rows: Sequence[Row], show_all: bool, lists: bool = False) -> List[str]:
    """The params that `ls` shows: all, or those that differ.

    lists: whether those that differ may be lists or empty objects.
    """
    found = [row.params for row in rows]
    if show_all:
        return sorted({name for params in found for name in params})
    nested = set() if lists else {name for params in found for name in params if type(params[name]) in (dict, list)}
    return [name for name in differing_names(found) if name not in nested]


def listed_metrics(rows: Sequence[Row], show_all: bool) -> List[str]:
    """The metrics that `ls` shows: all, or the primary ones, or if there are none, those that differ."""
    primary = {row.summary["primary_metric"] for row in rows} - {None}
    if primary and not show_all:
        return sorted(primary)
    measured = [item["metrics"] for row in rows for item in (row.latest, row.best if show_all else None)
                if item and item.get("metrics")]
    return sorted({name for metrics in measured for name in metrics}) if show_all else differing_names(measured)


def differing_names(rows: Sequence[Dict[str, Any]]) -> List[str]:
    """The sorted names whose values differ between these dicts; an absent value equals null."""
    names = sorted({name for values in rows for name in values})
    return [name for name in names if any(not same_value(values.get(name), rows[0].get(name)) for values in rows)]


def labelled(names: Iterable[str]) -> List[Tuple[str, str]]:
    """Each name with its label, `name=`."""
    return [(name, escape_control(name) + "=") for name in names]


def value_lines(values: Dict[str, Any], names: Iterable[Tuple[str, str]]) -> List[str]:
    """`name=value` for each of the labelled() names that has a value."""
    return [label + format_cell(values[name]) for name, label in names if name in values]


def checkpoint_cell(item: Optional[Dict[str, Any]], names: Iterable[Tuple[str, str]]) -> str:
    """The short ID and step of a stored checkpoint, then a line for each of these metrics."""
    if not item:
        return ""
    title = "%s (step %d)" % (item["id"][:SHORT_ID], item.get("step") or 0)
    return "\n".join([title] + value_lines(unpack_floats(item.get("metrics") or {}), names))


class WideColumn:
    """A column of `ls --wide`, with a text for each row.

    now: to which times are relative, or None; cut: whether to shorten texts to 20 characters, titles to their last 20; rank:
    columns of the lowest rank are the first to be left out.
    """

    def __init__(self, name: str, rows: Sequence[Row], now: Optional[datetime.datetime], cut: bool,
                 rank: int = 0) -> None:
        self.rank = rank
        is_field = name in FIELDS or all(row.is_label(name) for row in rows)
        self.title = name.upper() if is_field else escape_control("..." + name[-17:] if cut and len(name) > 20 else name)
        values = [row.plain(name) for row in rows]
        self.is_number = set(map(type, values)) <= {int, float, type(None)}
        self.texts = [wide_cell(row, name, value, now, cut) for row, value in zip(rows, values)]
        best = best_rows(rows, name[len("metrics."):] if name.startswith("metrics.") else name)
        self.is_best = [row.id in best for row in rows]
        if best:
            self.texts = [text + ("*" if is_best else " ") for text, is_best in zip(self.texts, self.is_best)]
            self.title += " "
        self.width = max(map(display_width, [self.title, *self.texts]))

    def cell(self, row: int, paint: Paint) -> str:
        """The text of a row (-1: the title), aligned in the column's width."""
        text = self.title if row < 0 else self.texts[row]
        space = " " * (self.width - display_width(text))
        shown = paint(text, "bold") if row >= 0 and self.is_best[row] else text
        return space + shown if self.is_number else shown + space


def wide_names(rows: Sequence[Row], show_all: bool) -> List[Tuple[str, int]]:
    """The names and ranks of the columns of `ls --wide`, with one column for each param and metric of `ls`."""
    names = [("id", 5)]
    if any(row.plain("name") for row in rows):
        names.append(("name", 3))
    names += [("started", 2), ("status", 5)]
    names += [(label, 0) for label in ("host", "user", "code", "tag")
              if any(row.plain(label) != rows[0].plain(label) for row in rows)]
    _, params, metrics = column_groups(rows)
    names += [(params[name], 1) for name in listed_params(rows, show_all, lists=True)]
    return names + [(metrics[name], 4) for name in listed_metrics(rows, show_all) if name in metrics]


def wide_cell(row: Row, name: str, value: Any, now: Optional[datetime.datetime], cut: bool) -> str:
    """The cell of `ls --wide` for value, which is row.plain(name); cut: at most 20 characters, unless it is a name to type."""
    if name in TIME_FIELDS:
        return relative_time(row.created, now) if now else full_time(row.created)
    if name[:1] == "~":
        return sparkline(value, SPARK_MARKS if can_encode(sys.stdout, SPARK_MARKS) else ASCII_SPARK_MARKS)
    if name == "duration" and value is not None:
        return str(datetime.timedelta(seconds=round(value)))
    if name == "id" or name == "commit" and row.is_label(name):
        return escape_control(value or "")[:SHORT_ID]
    if type(value) in (int, float):
        return format_cell(value)
    text = full_text(row, name, value)
    return format_cell(text) if cut and name != "name" else escape_control(text)


def full_text(row: Row, name: str, value: Any) -> str:
    """value, which is row.plain(name), as text of any length."""
    if value is None:
        return ""
    return ", ".join(value) if name in LIST_LABELS and row.is_label(name) else value_text(value)


SPARK_WIDTH = 16  # characters
SPARK_MARKS = "▁▂▃▄▅▆▇█"
ASCII_SPARK_MARKS = "_.:-=+*#"


def sparkline(values: Sequence[Any], marks: str = SPARK_MARKS) -> str:
    """A curve on one line, with a space for each gap. A long curve is sampled at 16 values, the last among them."""
    if len(values) > SPARK_WIDTH:
        values = [values[(number + 1) * len(values) // SPARK_WIDTH - 1] for number in range(SPARK_WIDTH)]
    scale = Scale([value for value in values if can_draw(value)] or [0], len(marks))
    return "".join(marks[scale.position(value)] if can_draw(value) else " " for value in values)


def best_rows(rows: Sequence[Row], metric: str) -> Set[str]:
    """The IDs of the experiments with the best value of a primary metric; none if there is nothing to compare."""
    goal = goal_of(rows, metric)
    values = {row.id: usable_value(row.best or row.latest or {}, metric) for row in rows}
    usable = [value for value in values.values() if value is not None]
    if goal is None or len(usable) < 2:
        return set()
    best = (max if goal == "maximize" else min)(usable)
    return {item_id for item_id, value in values.items() if value == best}


def goal_of(rows: Sequence[Row], metric: str) -> Optional[str]:
    """'minimize' or 'maximize' for a primary metric, or None if the experiments do not agree."""
    items = [item for row in rows for item in (row.best, row.latest) if item and item.get("primary_metric")]
    goals = {item["primary_metric"]["goal"] for item in items if item["primary_metric"]["name"] == metric}
    return goals.pop() if len(goals) == 1 else None


def fitting(widths: Sequence[int], ranks: Sequence[int], width: Optional[int]) -> List[Optional[int]]:
    """The numbers of the columns that fit into a terminal's width (None: all of them), with None for each gap where some are
    left out: those of the lowest rank first, from the right, unless there is room for one of them; the first column never.
    """
    def shown(gone: Container[int]) -> List[Optional[int]]:
        return [None if number in gone else number for number in range(len(widths))
                if number not in gone or number - 1 not in gone]

    def fits(gone: Container[int]) -> bool:
        total = sum(2 + (len("...") if number is None else widths[number]) for number in shown(gone)) - 2
        return width is None or total <= width

    by_rank = sorted(range(1, len(widths)), key=lambda number: (ranks[number], -number))
    gone: Set[int] = set()
    for number in by_rank:
        if fits(gone):
            break
        gone.add(number)
    for number in reversed(by_rank):
        if number in gone and fits(gone - {number}):
            gone.remove(number)
    return shown(gone)


def render_wide(columns: Sequence[WideColumn], width: Optional[int], paint: Paint) -> Iterator[str]:
    """Yield the lines of `ls --wide`: the titles, then one for each row."""
    shown = fitting([column.width for column in columns], [column.rank for column in columns], width)
    for row in range(-1, len(columns[0].texts)):
        gap = "..." if row < 0 else "   "
        yield "  ".join([gap if number is None else columns[number].cell(row, paint) for number in shown]).rstrip() + "\n"


def render_usage(rows: Sequence[Row], usage: Usage, now: datetime.datetime) -> Iterator[str]:
    """Yield the lines of `du`: the experiments, then their total."""
    def numbers(title: str, counts: Sequence[int], text: Callable[[int], str] = format_size) -> Column:
        texts = [text(count) for count in (*counts, sum(counts))]
        width = max(map(len, [title, *texts]))
        return title.rjust(width), [text.rjust(width) for text in texts]

    columns: List[Column] = [("EXPERIMENT", [*(row.id[:SHORT_ID] for row in rows), "total"])]
    names = [escape_control(text_in(row.summary, "name") or "") for row in rows]
    if any(names):
        columns.append(("NAME", [*names, ""]))
    columns += [("STARTED", [*(relative_time(row.created, now) for row in rows), ""]),
                numbers("CHECKPOINTS", [row.summary["num_checkpoints"] for row in rows], str),
                numbers("CODE", [usage.code[row.id] for row in rows]),
                numbers("WEIGHTS", [usage.weights[row.id] for row in rows]),
                numbers("TOTAL", [usage.total(row.id) for row in rows])]
    return (line + "\n" for line in table_rows(columns))


def render_csv(rows: Sequence[Row], names: Sequence[str]) -> Iterator[str]:
    """Yield the lines of `ls --csv`. An apostrophe keeps a spreadsheet from reading text as a formula."""
    import csv

    def line(cells: Iterable[Tuple[str, bool]]) -> str:
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerow([
            ("'" if is_text and text[:1] in tuple("=+-@") else "") + escape_control(text) for text, is_text in cells])
        return file.getvalue()

    yield line((name, True) for name in names)
    for row in rows:
        values = [(name, row.plain(name)) for name in names]
        yield line((full_text(row, name, value), not _is_number(value)) for name, value in values)


def render_blocks(title: str, blocks: Sequence[Block], paint: Paint, least: int = SHOW_WIDTH, empty: str = "(none)",
                  width: Optional[int] = None) -> str:
    """A title (if any), then blocks of `label: text ...` rows, each block below its heading.

    All blocks share the widths of their columns, which are at least `least`; in a terminal with less than the width that
    this takes, they are as narrow as necessary, and texts are cut.
    """
    tables = [[[escape_control(row[0] or "") + ":", *[escape_control(text or "") for text in row[1:]]] for row in rows]
              for _, rows in blocks]
    columns = zip(*[cells for table in tables for cells in table])
    longest = [max(map(display_width, column)) for column in columns]
    widths = [max(least, length + 2) for length in longest[:-1]]
    if width and sum(widths + longest[-1:]) > width:
        longest = narrowed(longest, [[*longest[:1], *[SHORT_ID] * len(widths)]], width)
        widths = [length + 2 for length in longest[:-1]]
        tables = [[list(map(shortened, cells, longest)) for cells in table] for table in tables]
    parts = [paint(title, "heading") + "\n"] if title else []
    for (heading, _), table in zip(blocks, tables):
        lines = [paint(heading, "bold")] if heading else []
        lines += [("".join(map(pad, cells, widths)) + cells[-1]).rstrip() for cells in table] or [paint(empty, "faint")]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def render_checkpoint(experiment: Experiment, checkpoint: Checkpoint, running: bool, show_all: bool, paint: Paint) -> str:
    """`show` of a checkpoint."""
    path = "%s (pruned: the files are gone)" % checkpoint.pruned if checkpoint.pruned else checkpoint.path
    primary = checkpoint.primary_metric or {}
    metrics = [(name, text + (" (primary, %s)" % primary["goal"] if primary.get("name") == name else ""))
               for name, text in value_rows(checkpoint.metrics)]
    return render_blocks("Checkpoint: " + checkpoint.id, [
        ("", [("Created", full_time(checkpoint.created)), ("Path", path), ("Step", str(checkpoint.step))]),
        ("Experiment", [("ID", experiment.id), *experiment_facts(experiment, running)]),
        *experiment_blocks(experiment),
        ("Metrics", metrics),
        ("Python Packages", value_rows(shown_packages(experiment, show_all)))], paint)


def render_experiment(experiment: Experiment, running: bool, now: datetime.datetime, show_all: bool, paint: Paint,
                      width: Optional[int]) -> str:
    """`show` of an experiment."""
    blocks = [("", experiment_facts(experiment, running)), *experiment_blocks(experiment)]
    packages = [("Python Packages", value_rows(shown_packages(experiment, show_all)))]
    return "\n".join([render_blocks("Experiment: " + experiment.id, blocks, paint),
                      render_checkpoints(experiment, now, paint, width), render_blocks("", packages, paint)])


def experiment_facts(experiment: Experiment, running: bool) -> List[Tuple[str, Optional[str]]]:
    """The rows Created to Command of `show`."""
    outcome = {} if running else experiment.outcome or {}
    given = [("Name", experiment.name), ("Tags", ", ".join(experiment.tags)),
             ("Note", " ".join((experiment.note or "").splitlines()))]
    rows = [("Created", full_time(experiment.created)), *[(label, text) for label, text in given if text],
            ("Status", status_of(experiment._document, running))]
    if "error" in outcome:
        rows.append(("Error", outcome["error"]))
    if outcome:
        rows.append(("Ended", full_time(parse_time(outcome["time"]))))
    return rows + [("Host", experiment.host), ("User", experiment.user), ("Command", experiment.full_command)]


def experiment_blocks(experiment: Experiment) -> List[Block]:
    """The blocks Params and System."""
    version = [("Python version", experiment.python_version)] if experiment.python_version else []
    return [("Params", value_rows(experiment.flat_params)), ("System", version + machine_facts(experiment))]


def value_rows(values: Dict[str, Any]) -> List[Tuple[str, str]]:
    """The names and full values of params, metrics or packages, sorted."""
    return [(name, value_text(value)) for name, value in sorted(values.items())]


def machine_facts(experiment: Experiment) -> List[Tuple[str, str]]:
    """The Git commit and GPUs that an experiment ran on, if they are known."""
    git, gpus = git_in(experiment._document), texts_in(experiment._document, "gpus")
    state = [git["branch"]] if "branch" in git else []
    state += ["with uncommitted changes"] if git.get("dirty") else []
    rows = [("Git commit", git.get("commit", "") + (" (%s)" % ", ".join(state) if state else "")),
            ("GPUs", ", ".join("%d x %s" % (gpus.count(name), name) for name in dict.fromkeys(gpus)))]
    return [(label, text) for label, text in rows if text]


def shown_packages(experiment: Experiment, show_all: bool) -> Dict[str, str]:
    """The packages that the program imported, or all of them if that is not recorded."""
    imported = experiment._document.get("imported_packages")
    if show_all or not isinstance(imported, list):
        return experiment.python_packages
    return {name: version for name, version in experiment.python_packages.items() if name in imported}


def render_checkpoints(experiment: Experiment, now: datetime.datetime, paint: Paint, width: Optional[int]) -> str:
    """The table of an experiment's checkpoints, with the best value marked, as many of the metrics as fit into a width, and if
    some were pruned, which still have files.
    """
    heading = paint("Checkpoints", "bold") + "\n"
    if not experiment.checkpoints:
        return heading + paint("(none)", "faint") + "\n"
    names = sorted({name for checkpoint in experiment.checkpoints for name in checkpoint.metrics})
    best = experiment.best()
    primary = experiment.primary_metric()
    files = ["FILES"] if any(checkpoint.pruned for checkpoint in experiment.checkpoints) else []
    rows = []
    for checkpoint in experiment.checkpoints:
        metrics = checkpoint.metrics
        cells = [checkpoint.short_id(), str(checkpoint.step), relative_time(checkpoint.created, now)]
        cells += [format_cell(checkpoint.path or ("(pruned)" if checkpoint.pruned else "")) for _ in files]
        cells += [(format_cell(metrics[name]) if name in metrics else "") +
                  (" (best)" if checkpoint is best and name == primary else "") for name in names]
        rows.append(cells)
    titles = ["ID", "STEP", "CREATED", *files] + [escape_control(name.upper()) for name in names]
    columns: List[Column] = list(zip(titles, zip(*rows)))
    widths = [max(map(display_width, [title, *cells])) for title, cells in columns]
    ranks = [2, 2, 1] + [1 for _ in files] + [2 if name == primary else 0 for name in names]
    gap = "...", [""] * len(rows)
    return heading + "\n".join(table_rows([gap if number is None else columns[number]
                                           for number in fitting(widths, ranks, width)])) + "\n"


def facts_to_compare(experiment: Experiment, checkpoint: Optional[Checkpoint]) -> Dict[str, Dict[str, Any]]:
    """The values that `diff` compares by label, in each block. A text that is not set is ''."""
    outcome = experiment.outcome or {}
    about = {"Created": experiment._document["created"], "Name": experiment.name, "Tags": ", ".join(experiment.tags),
             "Note": experiment.note, "Outcome": ": ".join(outcome[key] for key in ("status", "error") if key in outcome),
             "Host": experiment.host, "User": experiment.user, "Command": experiment.command,
             "Python version": experiment.python_version, **dict(machine_facts(experiment))}
    saved = {"Created": checkpoint._document["created"], "Path": checkpoint.path or "",
             "Step": checkpoint.step} if checkpoint else {}
    return {"Experiment": {label: text or "" for label, text in about.items()}, "Params": experiment.flat_params,
            "Python Packages": experiment.python_packages, "Checkpoint": saved,
            "Metrics": checkpoint.metrics if checkpoint else {}}


class Differences:
    """What differs between the columns of `diff`, each an experiment and which of its checkpoints to compare. Code and files
    are compared with those of the first column.
    """

    def __init__(self, sides: Sequence[Tuple[Experiment, Optional[Checkpoint]]], code: Dict[str, List[Any]],
                 files: Dict[str, List[Any]]) -> None:
        self.ids = {"Experiment": [experiment.id for experiment, _ in sides],
                    "Checkpoint": [checkpoint.id if checkpoint else None for _, checkpoint in sides]}
        self.blocks: Dict[str, Dict[str, List[Any]]] = {}  # by heading and label: the value in each column
        facts = [facts_to_compare(experiment, checkpoint) for experiment, checkpoint in sides]
        for heading in facts[0]:
            columns = [blocks[heading] for blocks in facts]
            rows = {label: [column.get(label, ABSENT) for column in columns] for label in sorted(set().union(*columns))}
            self.blocks[heading] = {label: values for label, values in rows.items()
                                    if not all(same_value(value, values[0]) for value in values)}
            if heading == "Params" and any(experiment.path for experiment, _ in sides):
                self.blocks["Code"] = code
        if files:
            self.blocks["Files"] = files

    def to_json(self) -> Dict[str, Any]:
        """`diff --json`: the IDs, and in each block the values by label, null where a column has none."""
        def plain(value: Any) -> Any:
            return None if value is ABSENT else value.to_json() if isinstance(value, FileChange) else value

        return {"experiments": self.ids["Experiment"], "checkpoints": self.ids["Checkpoint"], "differences": {
            heading: {label: list(map(plain, values)) for label, values in rows.items()}
            for heading, rows in self.blocks.items()}}


def file_rows(sets: Sequence[Any]) -> Dict[str, List[Any]]:
    """Return, for each file that differs, its size in the first of these sets and its FileChange in each of the others."""
    rows: Dict[str, List[Any]] = {}
    for number, files in enumerate(sets[1:], 1):
        for change in compare_files(sets[0], files):
            size = ABSENT if change.sizes[0] is None else change.sizes[0]
            rows.setdefault(change.name, [size] + [None] * (len(sets) - 1))[number] = change
    return dict(sorted(rows.items()))


def render_diff(found: Differences, paint: Paint, width: Optional[int] = None) -> str:
    """`diff`: the IDs, then in each block the rows that differ. width: of the terminal; None for no limit."""
    blocks = []
    for heading, values in found.blocks.items():
        rows = [(label, *[difference_cell(heading, label, value) for value in row]) for label, row in values.items()]
        if heading in found.ids:
            rows.insert(0, ("ID", *[item_id[:SHORT_ID] if item_id else "(none)" for item_id in found.ids[heading]]))
        blocks.append((heading, rows))
    return render_blocks("", blocks, paint, DIFF_WIDTH, "(no difference)", width)


def difference_cell(heading: str, label: str, value: Any) -> str:
    """A value of Differences as text."""
    if heading in ("Code", "Files"):
        return change_text(value)
    if value is ABSENT:
        return "(not set)"
    if heading in ("Experiment", "Checkpoint") and label == "Created":
        return full_time(parse_time(value))
    text = format_value(value)
    return text if len(text) <= DIFF_CUT else text[:DIFF_CUT - 3] + "..."


def change_text(value: Any) -> str:
    """A value of file_rows() as text."""
    if value is ABSENT:
        return "(not saved)"
    if value is None:
        return "(same)"
    if not isinstance(value, FileChange):
        return format_size(value)
    if value.kind == "removed":
        return "removed"
    if value.kind == "changed" and value.lines is not None:
        return "+%d -%d" % value.counts()
    return ("added, " if value.kind == "added" else "") + format_size(value.sizes[1] or 0)


NO_FILE, EMPTY_FILE = "0000000", "e69de29"  # Git's object names, by which `patch` recognizes an empty file


def render_code(changes: Iterable[FileChange], paint: Paint = lambda text, style: text,
                clean: Callable[[str], str] = lambda line: line) -> Iterator[str]:
    """Yield the lines of a unified diff in Git's format, which `patch -p1` accepts; it only names binary and huge files.

    clean() makes a line safe to print. Bytes that are not UTF-8 are lone surrogates.
    """
    for change in changes:
        is_empty = change.lines == []  # added or removed without a line
        old, new = (quoted_name(prefix + change.name, spaces=is_empty) for prefix in ("a/", "b/"))
        head = ["diff --git %s %s" % (old, new)]
        if " " in change.name and change.lines is not None:  # a tab shows `patch` where the name ends
            old, new = old + "\t", new + "\t"
        if change.kind == "added":
            head.append("new file mode 100644")
            old = "/dev/null"
        elif change.kind == "removed":
            head.append("deleted file mode 100644")
            new = "/dev/null"
        if is_empty:
            head.append("index %s..%s" % ((EMPTY_FILE, NO_FILE) if change.kind == "removed" else (NO_FILE, EMPTY_FILE)))
        elif change.lines is None:
            head.append("Binary files %s and %s differ" % (old, new))
        else:
            head += ["--- " + old, "+++ " + new]
        yield from [paint(clean(line), "bold") + "\n" for line in head]
        for line in change.lines or ():
            style = {b"+": "added", b"-": "removed", b"@": "hunk"}.get(line[:1])
            for text in line.decode("utf-8", "surrogateescape").split("\n")[:-1]:
                yield (paint(clean(text), style) if style else clean(text)) + "\n"


def quoted_name(name: str, spaces: bool = False) -> str:
    """A file name as Git prints it: in quotes if it holds control characters, quotes or backslashes (or spaces)."""
    def escaped(match: Any) -> str:
        character = match.group()
        return "\\" + character if character in '"\\' else "\\%03o" % ord(character)

    quoted = re.sub(r'["\\\x00-\x1f\x7f]', escaped, name)
    return '"%s"' % quoted if quoted != name or spaces and " " in name else name


# -- curves in the terminal

SMOOTHING = 0.6  # weight of earlier values in an exponential moving average, as in TensorBoard
TINY = 1e-290    # differences below this count as none
CURVES = "abcdefghijklmnopqrstuvwxyz"


def can_draw(value: Any) -> bool:
    """Whether value is a number that a Scale can hold: not NaN, infinite, or so large that differences overflow."""
    return _is_number(value) and abs(value) < 1e300


class Curve:
    """A metric of an experiment over steps, seconds since its start, or another metric."""

    def __init__(self, experiment: Experiment, metric: str, axis: str, log: bool = False, smooth: bool = False) -> None:
        self.experiment = experiment
        self.points: List[Optional[Tuple[float, float]]] = []  # None: a gap, where a value cannot be drawn
        self.end: Any = None                                   # the last value, even if it cannot be drawn
        average = weight = 0.0
        for checkpoint in with_metric(experiment.checkpoints, metric):
            metrics = checkpoint.metrics
            x = (checkpoint.step if axis == "step" else (checkpoint.created - experiment.created).total_seconds()
                 if axis == "time" else metrics.get(axis))
            self.end = y = metrics.get(metric)
            if not can_draw(x) or not can_draw(y) or log and y <= TINY:
                self.points.append(None)
                continue
            if smooth:
                average = SMOOTHING * average + (1 - SMOOTHING) * y
                weight = SMOOTHING * weight + (1 - SMOOTHING)  # of the values so far, so that the first counts in full
                self.end = y = average / weight
            self.points.append((x, y))

    def values(self) -> List[Tuple[float, float]]:
        """The points without the gaps."""
        return [point for point in self.points if point]


class Scale:
    """Maps values to positions from 0 to size - 1."""

    def __init__(self, values: Sequence[float], size: int, log: bool = False) -> None:
        import math
        self._map = math.log10 if log else float
        low, high = min(values), max(values)
        if high - low < TINY:
            half = abs(low) / 2 if abs(low) > TINY else 0.5
            low, high = (low / 2, high * 2) if log else (low - half, high + half)
        self._low, self._size = self._map(low), size
        self._span = self._map(high) - self._low or 1.0
        self.is_log, self.low, self.high = log, low, high

    def position(self, value: float) -> int:
        """The position of a value; of one in the middle between two, the upper."""
        place = (self._map(value) - self._low) / self._span * (self._size - 1)
        return min(self._size - 1, max(0, round(place + 1e-9)))

    def ticks(self, count: int) -> Dict[int, str]:
        """About count round numbers by position."""
        import math
        digits = 6
        if self.is_log and self._span > 1.5:
            exponents = range(math.ceil(self._low), math.floor(self._low + self._span) + 1)
            every = max(1, -(-len(exponents) // count))
            found = [10.0 ** exponent for exponent in exponents if exponent % every == 0]
        else:
            rough = (self.high - self.low) / count
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
            found = [step * number for number in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
            digits = max(6, min(17, 2 + int(math.log10(max(abs(self.low), abs(self.high)) / step))))  # that tell them apart
        return {self.position(value): "%.*g" % (digits, value) for value in found}


class Canvas:
    """Characters to draw curves with: a Braille character has 2 x 4 dots, an ASCII character stands for one."""

    BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # bits of the Unicode block from U+2800

    def __init__(self, columns: int, rows: int, braille: bool) -> None:
        self.columns, self._braille = columns, braille
        self._across, self._down = (2, 4) if braille else (1, 1)  # dots of a character
        self.width, self.height = columns * self._across, rows * self._down  # in dots
        self._cells = [[(-1, 0)] * columns for _ in range(rows)]  # the number of a curve and its dots

    def line(self, start: Tuple[int, int], end: Tuple[int, int], owner: int) -> None:
        """Draw from dot to dot for the curve of that number; (0, 0) is the lower left."""
        count = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
        for number in range(count + 1):
            x = round(start[0] + (end[0] - start[0]) * number / count)
            y = self.height - 1 - round(start[1] + (end[1] - start[1]) * number / count)
            row, column = y // self._down, x // self._across
            dots = self._cells[row][column][1] | self.BRAILLE[y % self._down][x % self._across]
            self._cells[row][column] = owner, dots

    def row(self, number: int, paint: Paint) -> str:
        """A line of characters, counted from the top."""
        return "".join(" " if owner < 0 else painted(owner, paint, chr(0x2800 + dots) if self._braille else "")
                       for owner, dots in self._cells[number])


def painted(number: int, paint: Paint, mark: str = "") -> str:
    """A mark of the curve of that number, by default its letter, in its color."""
    return paint(mark or CURVES[number % len(CURVES)], "curve %d" % (number % 6))


def render_plot(curves: Sequence[Curve], titles: Tuple[str, str], size: Tuple[int, int], log: bool, braille: bool,
                paint: Paint = lambda text, style: text) -> Iterator[str]:
    """Yield the lines of curves that have values, with axes and a legend. titles: of both axes; size: columns and lines."""
    width, height = size
    xs, ys = zip(*[point for curve in curves for point in curve.values()])
    unit, x_title = time_unit(max(xs)) if titles[0] == "time" else (1, titles[0])
    legend = legend_lines(curves, width - 3)[:max(1, height // 3)]
    hidden = len(curves) - len(legend)
    rows = max(4, height - len(legend) - 3 - bool(hidden))
    labels = Scale(ys, rows, log).ticks(max(2, rows // 3))
    margin = max(map(len, labels.values()), default=0)
    canvas = Canvas(max(8, width - margin - 2 - min(len(curves), 4)), rows, braille)
    x_scale, y_scale = Scale([x / unit for x in xs], canvas.width), Scale(ys, canvas.height, log)
    ends: Dict[int, List[str]] = {}  # the letters of the curves that end in each row
    for number, curve in enumerate(curves):
        before = None
        for point in curve.points:
            here = (x_scale.position(point[0] / unit), y_scale.position(point[1])) if point else None
            if here:
                canvas.line(before or here, here, number)
            before = here
        row = y_scale.position(curve.values()[-1][1]) * rows // canvas.height
        ends.setdefault(row, []).append(painted(number, paint))
    tick, axis = "┤│" if braille else "+|"
    yield paint(escape_control("%s over %s" % (titles[1], x_title)), "bold") + "\n"
    for row in range(rows - 1, -1, -1):
        yield "%s%s%s%s\n" % (labels.get(row, "").rjust(margin), tick if row in labels else axis,
                              canvas.row(rows - 1 - row, paint), "".join(ends.get(row, [])[:4]))
    places = {position * canvas.columns // canvas.width: label
              for position, label in x_scale.ticks(max(2, width // 12)).items()}
    yield from x_axis_lines(places, canvas.columns, margin, width, "└─┬" if braille else "+-+")
    for number, text in enumerate(legend):
        yield "%s  %s\n" % (painted(number, paint), text)
    if hidden:
        yield "...and %d more\n" % hidden


def time_unit(seconds: float) -> Tuple[int, str]:
    """The seconds of a unit that suits an axis of that length, and the axis's title."""
    if seconds > 7200:
        return 3600, "time (hours)"
    return (60, "time (minutes)") if seconds > 300 else (1, "time (seconds)")


def x_axis_lines(labels: Dict[int, str], columns: int, margin: int, width: int, marks: Sequence[str]) -> Iterator[str]:
    """Yield the x axis with a mark at each label's column, then the labels that have room."""
    corner, line, tick = marks
    yield " " * margin + corner + "".join(tick if column in labels else line for column in range(columns)) + "\n"
    text = ""
    for column, label in sorted(labels.items()):
        start = margin + 1 + column - len(label) // 2
        if start > len(text) and start + len(label) <= width:
            text = text.ljust(start) + label
    yield text + "\n"


def legend_lines(curves: Sequence[Curve], width: int) -> List[str]:
    """Return, for each curve, the experiment's ID, name and params that differ, and the last value."""
    params = [curve.experiment.flat_params for curve in curves]
    names = labelled(differing_names(params))
    ends = [format_cell(curve.end) for curve in curves]
    words = [[curve.experiment.short_id(), escape_control(curve.experiment.name or ""), *value_lines(values, names)]
             for curve, values in zip(curves, params)]
    texts = [shortened("  ".join(filter(None, found)), width - max(map(len, ends)) - 2) for found in words]
    widest = max(map(display_width, texts))
    return ["%s  %s" % (pad(text, widest), end) for text, end in zip(texts, ends)]


# -- report: one page for a browser

REPORT_VALUES = 400000       # in all curves of a report
REPORT_CURVE_VALUES = 1000   # in one of them
REPORT_CODE_BYTES = 1 << 20  # in all files of code
REPORT_FILE_BYTES = 64 << 10
GAP = "gap"                  # for a value that cannot be drawn


class ReportCode:
    """The code of experiments for a report, with each text and each set of files stored once."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._set_numbers: Dict[str, int] = {}  # by the digest of the code
        self._text_numbers: Dict[Tuple[int, int], int] = {}  # by size and CRC-32
        self._left = REPORT_CODE_BYTES
        self.texts: List[Optional[str]] = []  # None for a binary or large file
        self.sets: List[List[Tuple[str, int]]] = []  # the names of files and the numbers of their texts

    def number(self, experiment: Experiment) -> Optional[int]:
        """The number of the set that an experiment saved, or None if there is none or it cannot be read."""
        if not experiment.path:
            return None
        digest = experiment.code or experiment.id
        if digest not in self._set_numbers:
            try:
                files = SavedFiles(self._repository, "experiments", experiment.id)
                found = [(name, self._text_number(files, name)) for name in sorted(files.sums)]
            except ReplicateError as error:
                console.warning("The report lacks the code of experiment %s: %s" % (experiment.short_id(), error))
                return None
            self._set_numbers[digest] = len(self.sets)
            self.sets.append(found)
        return self._set_numbers[digest]

    def _text_number(self, files: SavedFiles, name: str) -> int:
        """The number of a file's text."""
        sums, text = files.sums[name], None
        if sums not in self._text_numbers:
            data = files.contents([name])[name] if sums[0] <= min(REPORT_FILE_BYTES, self._left) else b"\0"
            if b"\0" not in data:
                self._left -= len(data)
                lines = data.decode("utf-8", "replace").replace("\r\n", "\n").split("\n")
                text = "\n".join("\t".join(map(escape_control, line.split("\t"))) for line in lines)
            self._text_numbers[sums] = len(self.texts)
            self.texts.append(text)
        return self._text_numbers[sums]


def thinned(values: Sequence[Any], count: int) -> Set[int]:
    """The positions of about count of the values, each a number, GAP or None: the first, the last, and extremes (or a gap) in
    between.
    """
    if len(values) <= count:
        return set(range(len(values)))
    kept = {0, len(values) - 1}
    parts = max(1, count // 2)
    for part in range(parts):
        places = range(part * len(values) // parts, (part + 1) * len(values) // parts)
        known = [place for place in places if _is_number(values[place])]
        gaps = [place for place in places if values[place] == GAP]
        kept.update((min(known, key=values.__getitem__), max(known, key=values.__getitem__)) if known else gaps[:1])
    return kept


def report_curves(experiment: Experiment, names: Sequence[str],
                  count: int) -> Tuple[List[int], List[float], Dict[str, List[Any]]]:
    """(steps, seconds, {metric: values, None where it was not recorded}) of these metrics, thinned to about count values of
    each.
    """
    found = [checkpoint.metrics for checkpoint in experiment.checkpoints]
    columns: Dict[str, List[Any]] = {name: [
        None if name not in metrics else metrics[name] if can_draw(metrics[name]) else GAP for metrics in found]
        for name in names}
    columns = {name: values for name, values in columns.items() if any(map(_is_number, values))}
    places = sorted(set().union(*(thinned(values, count) for values in columns.values())))
    chosen = [experiment.checkpoints[place] for place in places]
    return ([checkpoint.step for checkpoint in chosen],
            [float("%.6g" % (checkpoint.created - experiment.created).total_seconds()) for checkpoint in chosen],
            {name: [float("%.5g" % values[place]) if _is_number(values[place]) else values[place] for place in places]
             for name, values in columns.items()})


def report_value(row: Row, name: str) -> Any:
    """row.plain(name) for the table of a report: a number, safe text or None."""
    value = row.plain(name)
    if value is None or type(value) is int or type(value) is float and value - value == 0:
        return value
    return escape_control(full_text(row, name, value))


def report_data(repository: Repository, experiments: Sequence[Experiment], running: Container[str]) -> Dict[str, Any]:
    """What the page shows, for JSON."""
    rows = rows_of(experiments, running)
    fields, params, metrics = column_groups(rows)
    names = [*fields, *params.values(), *metrics.values()]
    recorded = {name for experiment in experiments for checkpoint in experiment.checkpoints for name in checkpoint.metrics}
    measured = sorted(recorded, key=lambda name: (goal_of(rows, name) is None, name))  # primary metrics first
    count = REPORT_VALUES // max(1, len(rows) * len(measured) ** 2)  # squared: each metric also keeps the steps of the others
    code = ReportCode(repository)
    steps: Dict[Tuple[int, ...], int] = {}  # most runs share them
    runs: List[Dict[str, Any]] = []
    for row, experiment in zip(rows, experiments):
        axis, seconds, curves = report_curves(experiment, measured, max(10, min(REPORT_CURVE_VALUES, count)))
        facts = [("ID", row.id), *experiment_facts(experiment, row.running), *machine_facts(experiment),
                 *value_rows(experiment.flat_params)]
        runs.append({"id": row.id, "name": escape_control(experiment.name or ""),
                     "facts": [(escape_control(label), escape_control(text)) for label, text in facts if text],
                     "values": [report_value(row, name) for name in names], "files": code.number(experiment),
                     "steps": steps.setdefault(tuple(axis), len(steps)), "seconds": seconds,
                     "curves": {escape_control(name): values for name, values in curves.items()}})
    shown = {name for name, _ in wide_names(rows, False)}
    goals = {column: goal_of(rows, name) for name, column in metrics.items()}
    return {"title": plural(len(runs), "experiment") + ", " + full_time(datetime.datetime.now(datetime.timezone.utc)),
            "columns": [{"name": escape_control(name), "goal": goals.get(name),
                         "number": {type(run["values"][number]) for run in runs} <= {int, float, type(None)}}
                        for number, name in enumerate(names)],
            "shown": [number for number, name in enumerate(names) if name in shown],
            "params": list(map(escape_control, params.values())), "metrics": list(map(escape_control, measured)),
            "measured": [escape_control(metrics[name]) for name in measured if name in metrics],
            "differing": [escape_control(params[name]) for name in listed_params(rows, False)],
            "runs": runs, "steps": list(steps), "texts": code.texts, "codes": code.sets}


def render_report(content: Dict[str, Any]) -> bytes:
    """The page. No content becomes markup, and the page's policy lets the browser run this script and load nothing."""
    import base64
    import hashlib
    page = REPORT_PAGE
    for tag in ("style", "script"):
        text = page.rpartition("<%s>" % tag)[2].partition("</%s>" % tag)[0]
        page = page.replace(tag.upper() + "_HASH", base64.b64encode(hashlib.sha256(text.encode()).digest()).decode())
    return page.encode().replace(b"REPORT_DATA", encode_json(content, indent=None).replace(b"<", b"\\u003c"), 1)


REPORT_PAGE = r'''<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'sha256-STYLE_HASH'; script-src 'sha256-SCRIPT_HASH'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="Replicate">
<title>Experiments</title>
<style>
:root { color-scheme: light dark; --line: #8884; --faint: #777; --back: #fff; --text: #1b1b1b; --mark: #0a7d3b; --bad: #c62828; }
@media (prefers-color-scheme: dark) { :root { --faint: #999; --back: #16181c; --text: #e4e4e4; --mark: #53d08a; --bad: #ff7b72; } }
body { font: 14px/1.45 system-ui, sans-serif; margin: 1.5rem; background: var(--back); color: var(--text); }
h1 { font-size: 1.4rem; margin: 0 0 1rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.controls { display: flex; flex-wrap: wrap; gap: .4rem 1rem; align-items: center; margin: .5rem 0; }
.scroll { overflow: auto; max-height: 60vh; border: 1px solid var(--line); }
table { border-collapse: collapse; white-space: nowrap; }
th, td { padding: .15rem .6rem; text-align: left; border-bottom: 1px solid var(--line); }
td { max-width: 25rem; overflow: hidden; text-overflow: ellipsis; }
th { position: sticky; top: 0; background: var(--back); }
th button, td button { all: unset; cursor: pointer; }
td button { text-decoration: underline; }
button:focus-visible, svg:focus-visible { outline: 2px solid currentColor; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.best { color: var(--mark); font-weight: bold; }
td.best::after { content: " ★"; }
figure { margin: 0; position: relative; width: min(100%, 40rem); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); gap: 1rem; }
svg { width: 100%; height: auto; display: block; overflow: visible; }
svg text { fill: var(--faint); font-size: 12px; }
svg path { fill: none; }
svg .axis { stroke: var(--line); }
svg .curve { stroke-width: 1.6; stroke-linecap: round; }
.tip { position: absolute; top: 1.6rem; right: .5rem; padding: .2rem .5rem; background: var(--back); border: 1px solid var(--line);
       font-size: 12px; white-space: pre; pointer-events: none; }
.tip:empty { display: none; }
.key { display: inline-block; width: .8em; height: .8em; margin-right: .3em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
pre { overflow: auto; border: 1px solid var(--line); padding: .5rem; }
.added { color: var(--mark); } .removed { color: var(--bad); }
.faint { color: var(--faint); }
@media print { .controls, details { display: none; } .scroll { max-height: none; overflow: visible; border: 0; } h2 { break-after: avoid; } }
</style>
</head>
<body>
<h1 id="title"></h1>
<main>
<section id="runs"><h2>Runs</h2></section>
<section id="curves"><h2>Curves</h2></section>
<section id="scatter"><h2>Metric by param</h2></section>
<section id="parallel"><h2>Parallel coordinates</h2></section>
<section id="facts"><h2>Run details</h2></section>
<section id="code"><h2>Code</h2></section>
</main>
<script type="application/json" id="data">REPORT_DATA</script>
<script>
"use strict";
// Everything in `data` comes from a repository that others may write: it becomes text and numbers, never markup.
const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
const state = {
  column: null, descending: false, text: "", shown: new Set(data.shown), selected: new Set(),  // columns and runs by number
  axis: "step", log: false, smooth: 0, param: data.params[0], metric: data.measured[0],
};
const SHOWN_RUNS = 10;  // curves to show while no run is selected

function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter(child => child !== null));
  return element;
}

function section(name, ...children) {
  const element = document.getElementById(name);
  element.replaceChildren(element.firstElementChild);  // the heading
  fill(element, {}, children);
}

function choice(label, options, value, change) {
  const items = options.map(([key, text]) => make("option", { value: key, selected: String(key) === String(value) }, text));
  return make("label", {}, label + " ", make("select", { change: event => change(event.target.value) }, ...items));
}

function checkbox(label, checked, change) {
  const box = make("input", { type: "checkbox", checked, change: event => change(event.target.checked) });
  return make("label", {}, box, " " + label);
}

const note = text => make("p", { class: "faint" }, text);
const isNumber = value => typeof value === "number";
const color = number => `hsl(${(number * 137.5) % 360} 65% 50%)`;
const toggle = (set, item, isIn) => isIn ? set.add(item) : set.delete(item);
const column = name => data.columns.findIndex(item => item.name === name);
const nearest = (items, distance) => items.reduce((best, item) => distance(item) < distance(best) ? item : best);
const short = run => run.id.slice(0, 7) + (run.name ? " " + run.name : "");

function show(value) {  // a number, text or null
  if (isNumber(value)) return String(Number.isInteger(value) ? value : Number(value.toPrecision(5)));
  return value ?? "";
}

function tickText(value) {
  const text = show(value);
  if (isNumber(value)) return text.length > 7 ? Number(value.toPrecision(5)).toExponential().replace("e+", "e") : text;
  return text.length > 10 ? text.slice(0, 9) + "…" : text;
}

// ---- the table

function cellText(run, column) {
  const value = run.values[column];
  const name = data.columns[column].name;
  return name === "id" ? value.slice(0, 7) : name === "started" ? value.slice(0, 19).replace("T", " ") : show(value);
}

function visibleRuns() {
  const text = state.text.toLowerCase();
  const holds = run => data.columns.some((_, column) => cellText(run, column).toLowerCase().includes(text));
  const found = runs.filter(run => !text || run.id.startsWith(text) || holds(run));
  if (state.column === null) return found;
  const sign = state.descending ? -1 : 1;
  const isMissing = value => value === null || value === "";
  return found.sort((one, other) => {
    const [a, b] = [one.values[state.column], other.values[state.column]];
    if (isMissing(a) || isMissing(b)) return isMissing(a) - isMissing(b);  // missing values come last in both orders
    if (isNumber(a) !== isNumber(b)) return isNumber(a) ? -sign : sign;
    return a < b ? -sign : a > b ? sign : 0;
  });
}

function bestValue(column, found) {
  const { goal } = data.columns[column];
  const values = found.map(run => run.values[column]).filter(isNumber);
  const better = goal === "maximize" ? Math.max : Math.min;
  return goal && values.length > 1 ? better(...values) : undefined;
}

function headCell(column, sort) {
  const isSorted = state.column === column, { name, number } = data.columns[column];
  const arrow = isSorted ? (state.descending ? " ▼" : " ▲") : "";
  const order = isSorted ? (state.descending ? "descending" : "ascending") : false;
  const button = make("button", { click: sort }, name + arrow);
  return make("th", { class: number ? "number" : false, scope: "col", "aria-sort": order }, button);
}

function bodyCell(run, column, best) {
  const { name, number } = data.columns[column];
  const classes = (number ? "number" : "") + (run.values[column] === best ? " best" : ""), text = cellText(run, column);
  return make("td", { class: classes },
    name === "id" ? make("button", { click: () => showFacts(run.number), title: run.id }, text) : text);
}

function runRow(run, columns, best) {
  const box = make("input", {
    type: "checkbox", checked: state.selected.has(run.number), "aria-label": "Select " + short(run),
    change: event => { toggle(state.selected, run.number, event.target.checked); showCharts(); },
  });
  return make("tr", {}, make("td", {}, box), ...columns.map((column, place) => bodyCell(run, column, best[place])));
}

function showRuns() {
  const table = make("table"), count = make("span", { class: "faint" });
  const sort = column => {
    [state.column, state.descending] = [column, state.column === column && !state.descending];
    fillTable();
  };
  const fillTable = () => {
    const found = visibleRuns(), columns = [...state.shown].sort((a, b) => a - b);
    const best = columns.map(column => bestValue(column, found));
    const head = columns.map(column => headCell(column, () => sort(column)));
    table.replaceChildren(make("thead", {}, make("tr", {}, make("th"), ...head)),
      make("tbody", {}, ...found.map(run => runRow(run, columns, best))));
    count.textContent = found.length === runs.length ? `${runs.length} runs` : `${found.length} of ${runs.length} runs`;
  };
  const change = action => event => { action(event); fillTable(); showCharts(); };
  const filter = make("input", {
    type: "search", placeholder: "Filter", "aria-label": "Filter runs", input: change(event => { state.text = event.target.value; }),
  });
  const boxes = data.columns.map((column, number) => checkbox(column.name, state.shown.has(number), checked => {
    toggle(state.shown, number, checked);
    fillTable();
  }));
  section("runs",
    make("div", { class: "controls" }, filter, count, make("button", { click: change(() => state.selected.clear()) }, "Clear selection")),
    make("details", {}, make("summary", {}, "Columns"), make("div", { class: "controls" }, ...boxes)),
    make("div", { class: "scroll", tabindex: 0 }, table));
  fillTable();
}

// ---- charts

const [WIDTH, HEIGHT, LEFT, BOTTOM] = [640, 300, 64, 24];  // of a chart and its margins

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(factor => factor * power).find(candidate => candidate >= rough * 0.999);
  const found = [];
  for (let number = Math.ceil(low / step); number * step <= high && found.length < 50; number++) found.push(number * step);
  return found;
}

function scale(values, start, end, log = false) {
  const map = log ? Math.log10 : value => value;
  let low = Infinity, high = -Infinity;
  for (const value of values) [low, high] = [Math.min(low, value), Math.max(high, value)];
  if (!(high > low)) {
    const half = Math.abs(low) / 2 || 0.5;
    [low, high] = [low - half, high + half];
  }
  const place = value => start + (map(value) - map(low)) / (map(high) - map(low)) * (end - start);
  const powers = log ? ticks(map(low), map(high), 5).filter(Number.isInteger).map(power => 10 ** power) : [];
  place.ticks = count => powers.length > 1 ? powers : ticks(low, high, count);
  return place;
}

function smoothed(values) {
  let average = 0, weight = 0;
  return values.map(value => {
    if (!isNumber(value) || !state.smooth) return value;
    average = state.smooth * average + (1 - state.smooth) * value;
    weight = state.smooth * weight + (1 - state.smooth);
    return average / weight;
  });
}

function axes(x, y) {
  const label = (text, x, y, anchor) => draw("text", { x, y, "text-anchor": anchor }, tickText(text));
  return [draw("path", { class: "axis", d: `M${LEFT} 8V${HEIGHT - BOTTOM}H${WIDTH - 8}` }),
    ...y.ticks(5).map(value => label(value, LEFT - 6, y(value) + 4, "end")),
    ...x.ticks(6).map(value => label(value, x(value), HEIGHT - BOTTOM + 16, "middle"))];
}

function curveOf(run, metric) {  // through the steps with this metric; its points are null where a value cannot be drawn
  const xs = state.axis === "step" ? data.steps[run.steps] : run.seconds;
  const values = smoothed(run.curves[metric]).map((y, place) => [xs[place], y]).filter(([, y]) => y !== null);
  const points = values.map(([x, y]) => !isNumber(y) || state.log && y <= 0 ? null : [x, y]);
  return { run, points, known: points.filter(point => point) };
}

function linePath(points) {  // through [x, y] pairs, with gaps for null, and a ring around a point without neighbors
  return points.map((point, place) => {
    if (!point) return "";
    const at = point.map(value => value.toFixed(1)).join(" ");
    return points[place - 1] ? `L${at}` : points[place + 1] ? `M${at}` : `M${at}m-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0`;
  }).join("");
}

function curveChart(metric, found) {
  const measured = found.filter(run => Object.hasOwn(run.curves, metric));
  const curves = measured.map(run => curveOf(run, metric)).filter(({ known }) => known.length);
  const caption = make("figcaption", {}, make("b", {}, metric));
  if (!curves.length) return make("figure", {}, caption, note("No values"));
  const known = curves.flatMap(curve => curve.known);
  const x = scale(known.map(([value]) => value), LEFT, WIDTH - 12);
  const y = scale(known.map(([, value]) => value), HEIGHT - BOTTOM, 12, state.log);
  const lines = curves.map(({ run, points }) => draw("path", {
    class: "curve", stroke: color(run.number), d: linePath(points.map(point => point && [x(point[0]), y(point[1])])),
  }));
  const places = [...new Set(known.map(([value]) => value))].sort((a, b) => a - b);
  const cursor = draw("path", { class: "axis" }), tip = make("div", { class: "tip", role: "status" });
  let at = -1;  // which of the places the cursor is at
  const point = number => {
    at = Math.max(0, Math.min(places.length - 1, number));
    cursor.setAttribute("d", `M${x(places[at])} 8V${HEIGHT - BOTTOM}`);
    const rows = curves.map(curve => [curve.run, nearest(curve.known, ([value]) => Math.abs(value - places[at]))[1]]);
    rows.sort((one, other) => other[1] - one[1]);
    tip.replaceChildren(`${state.axis} ${show(places[at])}`,
      ...rows.slice(0, 12).map(([run, value]) => make("div", {}, swatch(run), `${short(run)}  ${show(value)}`)));
  };
  const leave = () => { cursor.removeAttribute("d"); tip.replaceChildren(); };
  const image = draw("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`, tabindex: 0, role: "img", "aria-label": `${metric} over ${state.axis}; arrow keys show values`,
    mouseleave: leave, blur: leave,
    mousemove: event => {
      const box = image.getBoundingClientRect(), wanted = (event.clientX - box.left) / box.width * WIDTH;
      point(places.indexOf(nearest(places, place => Math.abs(x(place) - wanted))));
    },
    keydown: event => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) point(at + step);
    },
  }, ...axes(x, y), ...lines, cursor);
  return make("figure", {}, caption, image, tip);
}

function swatch(run) {
  const key = make("span", { class: "key" });
  key.style.background = color(run.number);
  return key;
}

function selectedRuns() {
  const found = visibleRuns();
  const selected = found.filter(run => state.selected.has(run.number));
  return selected.length ? selected : found.slice(0, SHOWN_RUNS);
}

function showCharts() {
  const found = selectedRuns();
  const set = name => value => { state[name] = value; showCharts(); };
  const smooth = make("input", {
    type: "range", min: 0, max: 0.99, step: 0.01, value: state.smooth, "aria-label": "Smoothing",
    change: event => set("smooth")(Number(event.target.value)),
  });
  section("curves",
    make("div", { class: "controls" },
      choice("X axis", [["step", "step"], ["seconds", "time (seconds)"]], state.axis, set("axis")),
      checkbox("Log scale", state.log, set("log")), make("label", {}, "Smoothing ", smooth)),
    make("p", {}, ...found.map(run => make("span", {}, swatch(run), short(run) + "  "))),
    make("div", { class: "charts" }, ...data.metrics.map(metric => curveChart(metric, found))));
  showScatter();
  showParallel();
}

function position(values, start, end) {  // numbers on a scale; anything else sorted as text
  if (values.every(isNumber)) return scale(values, start, end);
  const texts = [...new Set(values.map(show))].sort();
  const place = value => start + (texts.indexOf(show(value)) + 0.5) / texts.length * (end - start);
  place.ticks = () => texts.slice(0, 12);
  return place;
}

function showScatter() {
  const { param, metric } = state, a = column(param), b = column(metric);
  if (a < 0 || b < 0) return section("scatter", note("No run has a param and a metric."));
  const found = visibleRuns().filter(run => run.values[a] !== null && isNumber(run.values[b]));
  const x = position(found.map(run => run.values[a]), LEFT + 8, WIDTH - 12);
  const y = position(found.map(run => run.values[b]), HEIGHT - BOTTOM - 6, 12);
  const dots = found.map(run => draw("circle", {
    cx: x(run.values[a]), cy: y(run.values[b]), r: state.selected.has(run.number) ? 7 : 4.5, fill: color(run.number),
    click: () => showFacts(run.number),
  }, draw("title", {}, `${short(run)}: ${param} ${show(run.values[a])}, ${metric} ${show(run.values[b])}`)));
  const select = (label, name, names) => choice(label, names.map(item => [item, item]), state[name],
    value => { state[name] = value; showScatter(); });
  const image = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${metric} by ${param}` },
    ...axes(x, y), ...dots);
  section("scatter",
    make("div", { class: "controls" }, select("Param", "param", data.params), select("Metric", "metric", data.measured)),
    found.length ? make("figure", {}, image) : note("No run has both."));
}

function showParallel() {
  const names = [...data.differing.slice(0, 8), ...data.measured.slice(0, 2)], found = visibleRuns();
  if (names.length < 2 || !found.length) return section("parallel", note("There is nothing to compare."));
  const [width, height] = [1000, 320], place = number => 90 + number * (width - 130) / (names.length - 1);
  const columns = names.map(column);
  const scales = columns.map(number => position(
    found.map(run => run.values[number]).filter(value => value !== null), height - 30, 36));
  const lines = found.map(run => {
    const values = columns.map(number => run.values[number]);
    const isFaint = state.selected.size && !state.selected.has(run.number);
    return draw("path", {
      class: "curve", stroke: color(run.number), "stroke-opacity": isFaint ? 0.12 : 0.75,
      d: linePath(values.map((value, number) => value === null ? null : [place(number), scales[number](value)])),
    }, draw("title", {}, short(run)));
  });
  const marks = names.flatMap((name, number) => [
    draw("path", { class: "axis", d: `M${place(number)} 36V${height - 30}` }),
    draw("text", { x: place(number), y: 20, "text-anchor": "middle" }, name.length > 16 ? "…" + name.slice(-15) : name),
    ...scales[number].ticks(4).map(item => draw("text",
      { x: place(number) - 4, y: scales[number](item) + 4, "text-anchor": "end" }, tickText(item)))]);
  section("parallel", draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Params and metrics of each run" },
    ...lines, ...marks));
}

// ---- one run, and what differs in the code of two

function showFacts(number) {
  const list = runs[number].facts.flatMap(([label, text]) => [make("dt", {}, label), make("dd", {}, text)]);
  const options = runs.map(run => [run.number, short(run)]);
  section("facts", make("div", { class: "controls" }, choice("Run", options, number, value => showFacts(Number(value)))),
    make("dl", {}, ...list));
}

function differingLines(old, now) {  // [mark, line] pairs by a longest common subsequence, or null if that would take long
  if (old.length * now.length > 2e7) return null;
  const lengths = Array.from({ length: old.length + 1 }, () => new Uint16Array(now.length + 1));
  for (let i = old.length - 1; i >= 0; i--) {
    for (let j = now.length - 1; j >= 0; j--) {
      lengths[i][j] = old[i] === now[j] ? lengths[i + 1][j + 1] + 1 : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
    }
  }
  const found = [];
  for (let i = 0, j = 0; i < old.length || j < now.length;) {
    if (i < old.length && j < now.length && old[i] === now[j]) { found.push([" ", old[i++]]); j++; }
    else if (i < old.length && (j === now.length || lengths[i + 1][j] >= lengths[i][j + 1])) found.push(["-", old[i++]]);
    else found.push(["+", now[j++]]);
  }
  return found;
}

function linesOf(text) {
  const lines = text.split("\n"), last = lines.pop();
  return last ? [...lines, last + "\n\\ No newline at end of file"] : lines;  // as in a patch
}

function fileDifference(name, old, now) {
  const texts = [old, now].map(number => number === undefined ? "" : data.texts[number]);
  const title = make("h3", {}, name + (old === undefined ? " (added)" : now === undefined ? " (removed)" : ""));
  const lines = texts.includes(null) ? null : differingLines(...texts.map(linesOf));
  if (!lines) return [title, note("This file is not text, or too large to compare here.")];
  const isNear = lines.map((_, place) => lines.slice(Math.max(0, place - 3), place + 4).some(([mark]) => mark !== " "));
  const classes = { "+": "added", "-": "removed", " ": false };
  const shown = lines.map(([mark, line], place) => isNear[place] ? make("span", { class: classes[mark] }, `${mark}${line}\n`)
    : isNear[place - 1] ? make("span", { class: "faint" }, "...\n") : null);
  return [title, make("pre", {}, ...shown)];
}

const saved = runs.filter(run => run.files !== null);

function showCode(one, other) {  // by their numbers in saved
  const options = saved.map((run, number) => [number, short(run)]);
  const [old, now] = [one, other].map(number => new Map(data.codes[saved[number].files]));  // the numbers of texts by name
  const names = [...new Set([...old.keys(), ...now.keys()])].sort().filter(name => old.get(name) !== now.get(name));
  section("code",
    make("div", { class: "controls" },
      choice("From", options, one, value => showCode(Number(value), other)),
      choice("to", options, other, value => showCode(one, Number(value)))),
    ...names.flatMap(name => fileDifference(name, old.get(name), now.get(name))),
    names.length ? null : note("No file differs."));
}

runs.forEach((run, number) => { run.number = number; });
document.getElementById("title").textContent = data.title;
showRuns();
showCharts();
showFacts(0);
if (saved.length > 1) showCode(0, saved.length - 1);
else section("code", note("Fewer than two of these runs saved their code."));
</script>
</body>
</html>
'''


# ------------------------------------------------------------------------------------------------------------------
# 11  Commands, parser, main
# ------------------------------------------------------------------------------------------------------------------

COMMANDS: Dict[str, Command] = {}


class Command:
    """A subcommand: its options, and its function, which returns the exit code (None: 0) and whose docstring is the help."""

    def __init__(self, name: str, *options: Any, aliases: Sequence[str] = (), usage: str = "[flags]",
                 epilog: Optional[str] = None) -> None:
        self.name, self.options, self.aliases, self.usage, self.epilog = name, options, aliases, usage, epilog

    def __call__(self, run: Callable[..., Optional[int]]) -> Callable[..., Optional[int]]:
        self.run, self.description = run, (run.__doc__ or "").replace("\n    ", "\n").strip()
        COMMANDS[self.name] = self
        return run


def option(*names: str, **settings: Any) -> Tuple[Tuple[str, ...], Dict[str, Any]]:
    """The arguments for one call of argparse's add_argument."""
    return names, settings


def number_from(least: int) -> Callable[[str], int]:
    """A function that parses an option's whole number, which is not below least."""
    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]{1,18}", text) or int(text) < least:
            raise argparse.ArgumentTypeError("expected %d, %d, %d, ..., not %r" % (least, least + 1, least + 2, text))
        return int(text)
    return parse


def read_columns(text: str) -> List[str]:
    """Parse the value of --columns."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError("%r is not a list of names such as id,started,loss" % text)
    return names


COLOR_WORDS = {"true": True, "1": True, "yes": True, "always": True, "false": False, "0": False, "no": False, "never": False}
GLOBAL_OPTIONS: Options = (
    option("-h", "--help", action="store_true", help="Show this help"),
    option("--color", type=str.lower, choices=tuple(COLOR_WORDS),
           metavar="true|false", help="Display color in output (default: on a terminal, unless NO_COLOR is set)"),
    option("--no-color", dest="color", action="store_const", const="false", help="Same as --color=false"),
    option("-D", "--project-directory", metavar="DIRECTORY",
           help="Project directory (default: nearest parent directory with replicate.yaml or .replicate/storage)"),
    option("-R", "--repository", metavar="URL",
           help="Repository URL, e.g. s3://my-bucket (default: the one in REPLICATE_REPOSITORY or replicate.yaml, "
                "else .replicate/storage)"),
    option("-v", "--verbose", action="store_true", help="Verbose output"))
ID = option("id", metavar="ID", help="Experiment or checkpoint ID, the start of one, or the name of an experiment")
IDS = option("ids", nargs="+", metavar="ID", help="Experiment or checkpoint IDs, or names of experiments")
JSON = option("--json", action="store_true", help="Print output in JSON format")
FILTER = option("-f", "--filter", action="append", default=[], metavar="FILTER", type=Filter,
                help='Filter, repeatable (format: "<name> <operator> <value>")')
LIST_OPTIONS = (
    option("--all", action="store_true", help="Output all params and metrics (default: only those that differ)"),
    FILTER,
    option("-w", "--wide", action="store_true", help="One line per experiment, one column per param and metric"),
    option("-c", "--columns", metavar="NAMES", type=read_columns,
           help="Columns, separated by commas: fields, params, metrics, and ~METRIC for a curve; also for --csv and --json"),
    option("--csv", action="store_true", help="Print all params and metrics, in full, in CSV format"),
    JSON,
    option("-q", "--quiet", action="store_true", help="Only print experiment IDs"),
    option("-s", "--sort", metavar="KEY",
           help="Sort key. Suffix with '-desc' for descending sort, e.g. --sort=started-desc (default: started)"),
    option("-n", "--number", type=number_from(1), metavar="N", help="Only the last N experiments (with --sort: the first N)"))
LIST_NAMES = FILTER_HELP + """

Filters, --sort and --columns know all params (model.depth if nested), metrics
and these fields: started, step, user, host, command, status, id, duration,
checkpoints, name, tag, note, code, commit, branch, dirty, gpu, job. The duration
lasts until the latest checkpoint; filters take the duration in seconds, and
started as 2026-01-31, 2026-01-31 23:59 or '2 hours ago'. With --wide and
--columns, * marks the best value."""
LIST_EXAMPLES = """\
List all experiments in the current project:
  replicate ls
List experiments that have run for 50 steps or less:
  replicate ls --filter "step <= 50"
List experiments where the parameter "optimizer" is "adam" and
the best "accuracy" metric is greater than 0.8:
  replicate ls --filter "optimizer = adam" --filter "accuracy > 0.8"
List experiments that failed, or one by its name:
  replicate ls --filter "status = failed"
  replicate ls --filter "name = baseline"
Sort all stopped experiments by the metric "val_loss":
  replicate ls --sort "val_loss" --filter "status = stopped"
Compare the last 20 line by line, or five columns of the 20 most accurate:
  replicate ls --wide -n 20
  replicate ls -c id,started,learning_rate,accuracy,code -s accuracy-desc -n 20
Export everything to a spreadsheet:
  replicate ls --csv > experiments.csv

""" + LIST_NAMES


def say(data: Union[str, bytes]) -> None:
    """Print data to stdout. Raises WriteError, or BrokenPipeError if nobody reads it any more.

    Bytes, which are UTF-8, stay as they are whatever the encoding of stdout.
    """
    try:
        if isinstance(data, bytes) and hasattr(sys.stdout, "buffer"):  # a notebook's stdout has none
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        else:
            write_text(sys.stdout, data if isinstance(data, str) else data.decode("utf-8", "replace"))
    except BrokenPipeError:
        raise
    except OSError as error:
        raise WriteError("The output cannot be written: %s." % short_reason(error)) from error


def say_json(value: Any) -> None:
    """Print a value as JSON to stdout; characters that its encoding lacks become JSON escapes."""
    for text in json_pieces(value):
        if not can_encode(sys.stdout, text):
            text = re.sub("[^\\x00-\\x7f]", lambda match: json.dumps(match.group())[1:-1], text)
        say(text)


def json_pieces(value: Any) -> Iterator[str]:
    """Yield a value as JSON text; a list comes in pieces, since that of `ls --json` can take a lot of memory."""
    if not isinstance(value, list) or not value:
        yield shown_json(value) + "\n"
        return
    for start in range(0, len(value), 500):
        yield ("," if start else "[") + shown_json(value[start:start + 500])[1:-len("\n]")]
    yield "\n]\n"


def paint(text: str, style: str) -> str:
    """text in that style, if stdout shows colors."""
    return console.colored(text, style, sys.stdout)


def open_project(args: argparse.Namespace, fold: bool = True) -> Project:
    """The project that the flags name, with the journals of killed runs folded.

    Raises ReadError if -R or REPLICATE_REPOSITORY names a folder that does not exist.
    """
    project = Project(args.repository, args.project_directory)
    explicit = args.repository or os.environ.get("REPLICATE_REPOSITORY")
    storage = project.repository.storage
    if explicit and isinstance(storage, DiskStorage) and not os.path.isdir(storage.root):
        raise ReadError("There is no repository at %s: no such directory." % project.repository.url)
    if fold:
        fold_abandoned(project.repository)
    return project


@Command("ls", *LIST_OPTIONS, aliases=("list",), epilog=LIST_EXAMPLES)
def ls_command(args: argparse.Namespace, only_running: bool = False) -> None:
    """List experiments in this project"""
    forms = ["--" + name for name in ("quiet", "json", "csv", "wide") if getattr(args, name)]
    forms += ["--" + name for name in ("all", "columns") if args.quiet and getattr(args, name)]
    if len(forms) > 1:
        raise UsageError("%s cannot be used with %s." % (forms[0], forms[1]))
    name, descending = parse_sort("started" if args.sort is None else args.sort)
    repository = open_project(args).repository
    columns = args.columns or ()
    listed = list_rows(repository)
    rows = matching_rows(listed, args.filter, [name, *(column.lstrip("~") for column in columns)])
    rows = sort_rows([row for row in rows if row.running or not only_running], name, descending)
    if args.number:
        rows = rows[-args.number:] if args.sort is None else rows[:args.number]
    if any(column[:1] == "~" for column in columns):
        by_id = {row.id: row for row in rows}
        for experiment in repository.experiments(ignore_skipped, by_id):
            by_id[experiment.id].checkpoints = experiment.checkpoints
    now, width = datetime.datetime.now(datetime.timezone.utc), terminal_width(sys.stdout)
    if args.json:
        say_json([{name: row.plain(name) for name in columns} if columns else row.to_json() for row in rows])
    elif args.csv:
        say("".join(render_csv(rows, columns or column_names(rows))))
    elif args.quiet:
        say("".join(row.id + "\n" for row in rows))
    elif not rows:
        console.info("No experiments found")
    elif columns or args.wide:
        ranks = [(name, 0) for name in columns] or wide_names(rows, args.all)
        wide = [WideColumn(name, rows, now, bool(width), rank) for name, rank in ranks]
        say("".join(render_wide(wide, width, paint)))
    else:
        say("".join(render_list(rows, now, args.all, width)))
    if args.quiet or args.json or args.csv:
        return
    waiting = set(repository.waiting()).difference(row.id for row in listed if row.running)
    if waiting:
        console.info("Still to be uploaded from this project: %s. To upload now, run '%s push'" % (
            plural(len(waiting), "experiment"), program_name()))


def matching_rows(rows: Sequence[Row], filters: Sequence[Any], names: Sequence[str] = ()) -> List[Row]:
    """The rows that satisfy all filters.

    Warns of each name in the filters, or among names, that no experiment has.
    """
    named = dict.fromkeys([name for tree in filters for name in tree.names] + list(names))
    if rows and not all(name in FIELDS or name in LABELS for name in named):
        known = known_names(rows)
        for name in named:
            if name not in known:
                console.warning("No experiment has a param or metric called %r.%s" % (name, nearest(name, known)))
    return [row for row in rows if all(tree.matches(row) for tree in filters)]


@Command("ps", *LIST_OPTIONS, aliases=("processes",), epilog=LIST_NAMES)
def ps_command(args: argparse.Namespace) -> None:
    """List running experiments in this project"""
    ls_command(args, only_running=True)


@Command("show", ID, JSON, option("--all", action="store_true", help="List all installed packages (default: only those that "
                                  "the program imported)"), usage="<experiment or checkpoint ID> [flags]")
def show_command(args: argparse.Namespace) -> None:
    """View information about an experiment or checkpoint"""
    repository = open_project(args).repository
    experiment, checkpoint = find_item(repository, args.id)
    if args.json:
        say_json((checkpoint or experiment).to_json())
        return
    running = repository.is_running(experiment.id)
    hidden = len(experiment.python_packages) - len(shown_packages(experiment, args.all))
    if checkpoint:
        say(render_checkpoint(experiment, checkpoint, running, args.all, paint))
    else:
        now, width = datetime.datetime.now(datetime.timezone.utc), terminal_width(sys.stdout)
        say(render_experiment(experiment, running, now, args.all, paint, width))
        if experiment.checkpoints:
            console.info("To see more of a checkpoint, run:\n  %s show <checkpoint ID>" % program_name())
    if hidden:
        console.info("Not shown: %s that the program did not import (--all shows all)" % plural(hidden, "installed package"))


@Command("plot", option("ids", nargs="*", metavar="ID", help="Experiment IDs (default: the last experiments)"),
         option("-m", "--metric", metavar="METRIC", help="Metric to plot (default: the primary metric)"),
         option("-x", "--axis", default="step", metavar="step|time|METRIC", help="Horizontal axis (default: step)"),
         option("--log", action="store_true", help="Use a logarithmic scale"),
         option("--smooth", action="store_true", help="Plot a moving average"),
         FILTER, option("-n", "--number", type=number_from(1), default=6, metavar="N",
                        help="Without IDs: plot the last N experiments (default: 6)"),
         option("--watch", action="store_true", help="Keep redrawing while experiments are running"),
         usage="[ID...] [flags]", epilog="""\
Watch the last runs:
  replicate plot --watch
Compare the loss of two experiments:
  replicate plot a1b2c3d e4f5a6b --metric loss --log""")
def plot_command(args: argparse.Namespace) -> None:
    """Draw curves of a metric in the terminal"""
    if args.watch and not is_terminal(sys.stdout):
        raise UsageError("--watch needs a terminal.")
    repository = open_project(args).repository
    while True:
        running = repository.running() if args.watch else set()
        if args.ids:
            experiments = [experiment for experiment, _ in find_items(repository, args.ids)]
        else:
            rows = [row for row in matching_rows(list_rows(repository), args.filter) if row.latest][-args.number:]
            experiments = repository.experiments(ignore_skipped, {row.id for row in rows})
        say(("\x1b[H\x1b[J" if args.watch else "") + "".join(plotted(experiments, args)))
        if running.isdisjoint(experiment.id for experiment in experiments):
            return
        time.sleep(2.0)


def plotted(experiments: Sequence[Experiment], args: argparse.Namespace) -> Iterator[str]:
    """The lines of `plot`. Raises ReplicateError if there is nothing to plot."""
    checkpoints = [checkpoint for experiment in experiments for checkpoint in experiment.checkpoints]
    names = sorted({name for checkpoint in checkpoints for name in checkpoint.metrics})
    primary = [experiment.primary_metric() for experiment in experiments]
    metric = args.metric or next(filter(None, primary), names[0] if len(names) == 1 else None)
    if not names:
        raise ReplicateError("There is nothing to plot: no metric was recorded." if experiments else
                             "There is nothing to plot: no experiment with a checkpoint was found.")
    if metric is None:
        raise ReplicateError("There is no primary metric. Choose a metric with -m: %s." % ", ".join(map(repr, names[:9])))
    for name in [metric] + ([args.axis] if args.axis not in ("step", "time") else []):
        if name not in names:
            raise ReplicateError("These experiments have no metric %r.%s" % (name, nearest(name, names)))
    curves = [Curve(experiment, metric, args.axis, args.log, args.smooth) for experiment in experiments]
    missing = [curve.experiment.short_id() for curve in curves if not curve.values()]
    curves = [curve for curve in curves if curve.values()]
    if not curves:
        raise ReplicateError("There is nothing to plot: %r has no values%s." % (metric, " above 0" if args.log else ""))
    if missing and not args.watch:
        console.info("Not drawn, as %r has no values%s: %s" % (metric, " above 0" if args.log else "", ", ".join(missing)))
    size = shutil.get_terminal_size() if is_terminal(sys.stdout) else (80, 21)
    scale = ", ".join(word for word, is_set in (("logarithmic", args.log), ("smoothed", args.smooth)) if is_set)
    title = metric + (" (%s)" % scale if scale else "")
    braille = can_encode(sys.stdout, "\u28ff┤")
    return render_plot(curves, (args.axis, title), (size[0] - 1, size[1] - 1), args.log, braille, paint)


@Command("report", option("ids", nargs="*", metavar="ID", help="Experiment IDs (default: all experiments)"), FILTER,
         option("-o", "--output", metavar="FILE", help="Output file (default: %s); - for standard output" % REPORT_NAME),
         usage="[ID...] [flags]", epilog="""\
Make a page of all completed experiments, to look at or to send:
  replicate report --filter "status = completed" -o report.html""")
def report_command(args: argparse.Namespace) -> None:
    """Write a web page with tables, curves and code

    The page works offline. It holds the metrics, params, commands and code of the
    experiments, but not their weights.
    """
    path = args.output or REPORT_NAME
    if not args.output and os.path.lexists(path) and not is_report(path):
        raise ReplicateError("%s already exists and is not a report. Choose another file with -o." % path)
    repository = open_project(args).repository
    chosen = {row.id for row in matching_rows(list_rows(repository), args.filter)}
    if args.ids:
        chosen &= {experiment.id for experiment, _ in find_items(repository, args.ids)}
    experiments = repository.experiments(ignore_skipped, chosen)
    if not experiments:
        raise ReplicateError("There are no experiments to report.")
    page = render_report(report_data(repository, experiments, repository.running()))
    if path == "-":
        say(page)
        return
    replace_file(path, page)
    console.info("Wrote %s: %s (%s)" % (path, plural(len(experiments), "experiment"), format_size(len(page))))


def replace_file(path: str, data: bytes, mode: int = 0o666) -> None:
    """Write a file whole or not at all; a link, pipe or device stays what it is. Raises WriteError."""
    temporary = "%s.%s" % (path, os.urandom(6).hex())
    try:
        if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
            with open(path, "wb") as file:
                file.write(data)
            return
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError as error:
        remove_file(temporary)
        raise WriteError("%s cannot be written: %s." % (path, short_reason(error))) from error


@Command("diff", IDS, JSON,
         option("--code", action="store_true", help="Print what differs in the code as a patch"),
         option("--path", action="append", help="With --code: only this file or directory, repeatable"),
         usage="<ID> [ID...] [flags]", epilog="""\
Compare two experiments, then their code line by line:
  replicate diff a1b2c3d e4f5a6b
  replicate diff a1b2c3d e4f5a6b --code
See what you have changed since an experiment:
  replicate diff a1b2c3d --code --path train.py""")
def diff_command(args: argparse.Namespace) -> None:
    """Compare experiments or checkpoints.

    If an experiment ID is passed, it will pick the best checkpoint from that
    experiment. If a primary metric is not defined, it will use the latest
    checkpoint. With one ID, it compares the files with those in the project
    directory now.
    """
    if args.code and (args.json or len(args.ids) > 2):
        raise UsageError("--code compares one or two IDs, and cannot be used with --json.")
    if args.path and not args.code:
        raise UsageError("--path needs --code.")
    project = open_project(args)
    found = find_items(project.repository, args.ids)
    experiments, checkpoints = [one for one, _ in found], [one for _, one in found]
    if args.code:
        patch = [change for items in (experiments, checkpoints) if any(items)
                 for old, new in [file_sets(project, items)] for change in compare_files(old, new, is_below(args.path))]
        if not patch:
            console.info("No differences%s" % (" in " + ", ".join(args.path) if args.path else ""))
        say_patch(patch)
    elif len(found) == 1:
        compared = [compared_files(project, items) for items in (experiments, checkpoints) if any(items)]
        changes = [(name, change) for rows in compared for name, (_, change) in (rows or {}).items()]
        if args.json:
            say_json({name: change.to_json() for name, change in changes})
        elif any(rows is not None for rows in compared):
            since = (checkpoints[0] or experiments[0]).short_id()
            rows = [(escape_control(name), change_text(change)) for name, change in changes]
            say(render_blocks("", [("Changes since " + since, rows)], paint))
    else:
        sides = [(one, checkpoint or chosen_checkpoint(one, "Comparing")) for one, checkpoint in found]
        differences = Differences(sides, compared_files(project, experiments) or {},
                                  compared_files(project, [checkpoint for _, checkpoint in sides]) or {})
        if args.json:
            say_json(differences.to_json())
        else:
            say(render_diff(differences, paint, terminal_width(sys.stdout)))


def is_below(paths: Optional[Sequence[str]]) -> Callable[[str], bool]:
    """A function that tells whether a name is one of these paths or below one; without paths, all names are."""
    tops = [normal_path(path) for path in paths or ["."]]
    return lambda name: any(top in (".", name) or name.startswith(top + "/") for top in tops)


def file_sets(project: Project, items: Sequence[Any]) -> List[Any]:
    """The files of each experiment or checkpoint (None has no files); of a single one, then those present now."""
    opened = {item.id: saved_files(project, item) for item in items if item}
    sets = [opened[item.id] if item else PresentFiles(()) for item in items]
    return sets if len(items) > 1 else sets + [present_files(project, items[0])]


def compared_files(project: Project, items: Sequence[Any]) -> Optional[Dict[str, List[Any]]]:
    """file_rows() of these; None, with a warning, if files cannot be read."""
    try:
        return file_rows(file_sets(project, items))
    except ReplicateError as error:
        console.warning("%s\nThese files are not compared." % error)
        return None


def say_patch(changes: Sequence[FileChange]) -> None:
    """Print a unified diff to stdout: byte for byte as the files are, but escaped on a terminal."""
    if is_terminal(sys.stdout):
        say("".join(render_code(changes, paint, lambda line: "\t".join(map(escape_control, line.split("\t"))))))
    else:
        say("".join(render_code(changes)).encode("utf-8", "surrogateescape"))


def chosen_checkpoint(experiment: Experiment, doing: str) -> Optional[Checkpoint]:
    """The experiment's best checkpoint, or else its latest; tells the user which one it is."""
    best = experiment.best()
    checkpoint = best or experiment.latest()
    if checkpoint:
        console.info("%s the %s checkpoint of %s: %s (step %d)" % (
            doing, "best" if best else "latest", experiment.short_id(), checkpoint.short_id(), checkpoint.step))
    return checkpoint


@Command("checkout", ID, option("-f", "--force", action="store_true", help="Force checkout without prompt, even if "
                                "files would be overwritten"),
         option("-o", "--output-directory", metavar="DIRECTORY",
                help="Output directory (default: the project directory)"),
         option("--path", help="A specific file or directory to check out (default: all of the checkpoint/experiment)"),
         usage="<experiment or checkpoint ID> [flags]")
def checkout_command(args: argparse.Namespace) -> None:
    """Copy files from an experiment or checkpoint into the project directory"""
    project = open_project(args)
    experiment, checkpoint = find_item(project.repository, args.id)
    if checkpoint is None:
        checkpoint = chosen_checkpoint(experiment, "Checking out")
    directory = args.output_directory or project.directory

    def approve(conflicts: List[str]) -> None:
        if conflicts and not args.force:
            shown = ["  " + escape_control(name) for name in conflicts[:10]]
            shown += ["  and %d more" % (len(conflicts) - 10)] if len(conflicts) > 10 else []
            confirm("Checking out would overwrite these files in %s, whose contents differ:\n%s" % (
                directory, "\n".join(shown)), "Do you want to overwrite them?",
                "Pass -f to overwrite them, or -o to check out elsewhere.")

    names = project.checkout(experiment, checkpoint, directory, path=args.path, approve=approve)
    console.info("Checked out %s from %s into %s" % (
        plural(len(names), "file"), archive_names(archives_of(experiment, [checkpoint]), "and"), directory))
    if experiment.full_command:
        console.info("The experiment ran with this command:\n  %s" % escape_control(experiment.full_command))


@Command("rm", IDS, option("-f", "--force", action="store_true", help="Force delete without interactive prompt"),
         aliases=("delete",), usage="<experiment or checkpoint ID> [experiment or checkpoint ID...] [flags]", epilog="""\
Delete an experiment and its checkpoints (where a1b2c3d4 is an experiment ID):
  replicate rm a1b2c3d4
Delete all experiments where the metric "val_accuracy" is less than 0.2 at the
best checkpoints:
  replicate rm $(replicate ls -q --filter "val_accuracy < 0.2")""")
def rm_command(args: argparse.Namespace) -> None:
    """Remove experiments or checkpoints.

    To remove experiments or checkpoints, pass any number of IDs (or prefixes).
    """
    repository = open_project(args).repository
    found = find_items(repository, args.ids)
    experiments = {experiment.id: experiment for experiment, checkpoint in found if checkpoint is None}
    checkpoints = {checkpoint.id: (experiment, checkpoint) for experiment, checkpoint in found
                   if checkpoint is not None and experiment.id not in experiments}
    if not args.force:
        running = repository.running()
        items = [(item.id, "Experiment %s (%s)" % (" ".join(filter(None, (item.short_id(), escape_control(item.name or "")))),
                                                   plural(len(item.checkpoints), "checkpoint"))) for item in experiments.values()]
        items += [(experiment.id, "Checkpoint %s of experiment %s" % (item.short_id(), experiment.short_id()))
                  for experiment, item in checkpoints.values()]
        lines = ["* %s%s" % (text, ", which is running" if experiment_id in running else "") for experiment_id, text in items]
        confirm("You are about to delete the following:\n%s" % "\n".join(lines), "Do you want to continue?",
                "Pass -f to delete without being asked.")
    for experiment, checkpoint in checkpoints.values():
        repository.remove_checkpoint(experiment, checkpoint)
        console.info("Removed checkpoint %s of experiment %s" % (checkpoint.short_id(), experiment.short_id()))
    for experiment in experiments.values():
        repository.remove_experiment(experiment)
        console.info("Removed experiment %s" % experiment.short_id())


@Command("du", FILTER, JSON, epilog="""\
Show how much space the failed experiments take:
  replicate du --filter "status = failed\"""")
def du_command(args: argparse.Namespace) -> None:
    """Show how much space each experiment takes"""
    repository = open_project(args).repository
    rows = list_rows(repository)
    usage = Usage(repository.storage, rows)
    rows = sorted(matching_rows(rows, args.filter), key=lambda row: usage.total(row.id), reverse=True)
    if args.json:
        found = [{"id": row.id, "code": usage.code[row.id], "weights": usage.weights[row.id], "total": usage.total(row.id)}
                 for row in rows]
        say_json({"experiments": found, "total": sum(item["total"] for item in found), "unowned": sum(usage.unowned)})
        return
    if rows:
        say("".join(render_usage(rows, usage, datetime.datetime.now(datetime.timezone.utc))))
    else:
        console.info("No experiments found")
    if usage.unowned:
        console.info("No experiment uses %s (%s): run '%s verify' for a list" % (
            plural(len(usage.unowned), "other archive"), format_size(sum(usage.unowned)), program_name()))


@Command("verify", option("ids", nargs="*", metavar="ID", help="Experiment or checkpoint IDs (default: everything)"),
         option("--fix", action="store_true", help="Fold the journals of killed runs into their experiments, and remove files "
                "that no experiment uses"),
         JSON, usage="[ID...] [flags]")
def verify_command(args: argparse.Namespace) -> int:
    """Check that everything is there and undamaged

    Reads every document and every archive, compares them with their checksums, and
    looks for files that no experiment uses. Prints one line per fault, and exits
    with 1 if there are any.
    """
    if args.fix and args.ids:
        raise UsageError("--fix works on the whole repository, and cannot be used with IDs.")
    repository = open_project(args, fold=False).repository
    verification = Verification(repository, args.fix)
    if args.ids:
        found = find_items(repository, args.ids)
        places = [(*place, experiment) for experiment, checkpoint in found
                  for place in archives_of(experiment, experiment.checkpoints)
                  if checkpoint is None or place[1] == checkpoint.id]
        count = len({experiment.id for experiment, _ in found})
    else:
        count, places = verification.run()
    verification.check_archives(places)
    if args.json:
        say_json([{"key": key, "fault": reason} for key, reason in verification.faults])
    else:
        say("".join("%s: %s\n" % (escape_control(key), escape_control(reason)) for key, reason in verification.faults))
    if verification.removed:
        console.info("Removed %s" % plural(len(verification.removed), "leftover"))
    console.info("Verified %s and %s: %s" % (
        plural(count, "experiment"), plural(len(places), "archive"),
        plural(len(verification.faults), "fault") if verification.faults else "no faults"))
    return 1 if verification.faults else 0


@Command("prune", option("--keep-best", type=number_from(0), default=1, metavar="N",
                         help="Keep the files of the best N checkpoints of each experiment (default: 1)"),
         option("--keep-latest", type=number_from(0), default=1, metavar="N",
                help="Also keep the files of the latest N checkpoints (default: 1)"), FILTER,
         option("--dry-run", action="store_true", help="Only print what would be pruned"), JSON,
         option("--force", action="store_true", help="Prune without interactive prompt"), epilog="""\
Keep the weights of each experiment's three best checkpoints and its latest:
  replicate prune --keep-best 3
See how much removing all weights of failed experiments would free:
  replicate prune --keep-best 0 --keep-latest 0 -f "status = failed" --dry-run""")
def prune_command(args: argparse.Namespace) -> int:
    """Remove the files of all but the best and latest checkpoints

    Metrics, params and code stay, and running experiments are left alone. The
    primary metric tells which checkpoints are best; without one, the latest are.
    """
    repository = open_project(args).repository
    chosen = {row.id for row in matching_rows(list_rows(repository), args.filter) if not row.running}
    archives = stored_archives(repository.storage, "checkpoints")
    found = [Pruning(experiment, archives, args.keep_best, args.keep_latest)
             for experiment in repository.experiments(ignore_skipped, chosen)]
    prunings = [pruning for pruning in found if pruning.ids]
    lines = ["* Experiment %s: %d of %s (%s)" % (
        pruning.experiment.short_id(), len(pruning.ids), plural(len(pruning.experiment.checkpoints), "checkpoint"),
        format_size(pruning.bytes)) for pruning in prunings]
    freed = format_size(sum(pruning.bytes for pruning in prunings))
    if args.json:
        say_json([{"id": pruning.experiment.id, "checkpoints": pruning.ids, "bytes": pruning.bytes} for pruning in prunings])
    elif args.dry_run:
        say("".join(line + "\n" for line in lines))
    if not prunings:
        console.info("There is nothing to prune")
        return 0
    if args.dry_run:
        console.info("This would free %s" % freed)
        return 0
    if not args.force:
        confirm("You are about to remove the files of these checkpoints, which frees %s. Their metrics stay.\n%s" % (
            freed, "\n".join(lines)), "Do you want to continue?", "Pass --force to prune without being asked.")
    done, status = [], 0
    for pruning in prunings:
        try:
            if not repository.is_running(pruning.experiment.id):  # it may have resumed while the user was asked
                done.append(pruning.run(repository))
        except ReplicateError as error:
            console.error(str(error))
            status = 1
    console.info("Pruned %s of %s: %s freed" % (plural(sum(count for count, _ in done), "checkpoint"), plural(
        len(done), "experiment"), format_size(sum(size for _, size in done))))
    return status


@Command("tag", option("id", metavar="ID", help="Experiment ID, the start of one, or a name"),
         option("changes", nargs="*", metavar="CHANGE", help="name=NAME or note=TEXT (empty text removes it), +TAG to add a "
                                                             "tag, -TAG to remove one"),
         usage="<ID> [name=NAME] [note=TEXT] [+TAG...] [-TAG...] [flags]", epilog="""\
Name an experiment, add the tag "good" and remove the tag "new":
  replicate tag a1b2c3d name=baseline +good -new
Add a note to the experiment of that name:
  replicate tag baseline note="the one in the paper"
List the good ones:
  replicate ls --filter "tag = good\"""")
def tag_command(args: argparse.Namespace) -> None:
    """Name an experiment, tag it, or add a note to it"""
    given: Dict[str, str] = {}
    added: Set[str] = set()
    removed: Set[str] = set()
    for change in args.changes:
        key, equals, text = change.partition("=")
        if change[:1] in ("+", "-"):
            (added if change[0] == "+" else removed).add(change[1:].strip())
        elif equals and key in ("name", "note"):
            given[key] = text.strip()
        else:
            raise UsageError("%r is not a change. Write name=NAME, note=TEXT, +TAG or -TAG." % change)
    try:
        labels = checked_labels(given.get("name") or None, added, given.get("note"))
    except ValueError as error:
        raise UsageError("The %s." % error) from error
    repository = open_project(args).repository
    experiment, checkpoint = find_item(repository, args.id)
    if checkpoint:
        raise ReplicateError("%s is a checkpoint, and only experiments have tags. Tag its experiment instead: %s." % (
            checkpoint.short_id(), experiment.short_id()))

    def change_labels(document: Dict[str, Any]) -> None:
        tags = sorted((set(texts_in(document, "tags")) | added) - removed)
        for key, value in dict({key: labels.get(key) for key in given}, tags=tags).items():
            document.pop(key, None)
            if value:
                document[key] = value

    if args.changes:
        repository.edit(experiment.id, change_labels)
        experiment = Experiment(repository.load(experiment.id))
    console.info("Experiment %s: name %s; tags %s; note %s" % (
        experiment.short_id(), experiment.name or "(none)", ", ".join(experiment.tags) or "(none)",
        experiment.note or "(none)"))


# -- programs in any language

def run_program(words: Sequence[str], directory: str, environment: Dict[str, str]) -> int:
    """Run another program on this terminal; return its exit code, or minus the number of the signal that ended it.

    Passes on the signals with which schedulers warn and end a job; the terminal sends Ctrl-C to the program itself.
    Raises ReplicateError if it cannot start.
    """
    import subprocess
    process: Any = None
    early: List[int] = []  # signals that arrive before the program has started

    def pass_on(number: int, frame: Any) -> None:
        if process is None:
            early.append(number)
            return
        try:
            process.send_signal(number)
        except ProcessLookupError:  # it has just ended
            pass

    names = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    handlers: Dict[int, Any] = {getattr(signal, name): pass_on for name in names if hasattr(signal, name)}
    handlers[signal.SIGINT] = lambda number, frame: None
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()
                if signal.getsignal(number) != signal.SIG_IGN}
    try:
        process = subprocess.Popen(words, cwd=directory, env=environment)
        for number in early:
            pass_on(number, None)
        return process.wait()
    except (OSError, ValueError) as error:
        hint = " A script needs a first line such as #!/bin/sh." if getattr(error, "errno", 0) == errno.ENOEXEC else ""
        raise ReplicateError("%s cannot be run: %s.%s" % (words[0], short_reason(error), hint)) from error
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def read_pair(text: str) -> Tuple[str, Any]:
    """Parse an option's name=value."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError("%r is not of the form name=value" % text)
    return name, read_value(value) if value else value


def read_primary(text: str) -> Tuple[str, str]:
    """Parse an option's metric:goal."""
    name, _, goal = text.rpartition(":")
    if not name or goal not in ("minimize", "maximize"):
        raise argparse.ArgumentTypeError("%r is not of the form loss:minimize or accuracy:maximize" % text)
    return name, goal


@Command("run", option("--param", action="append", default=[], type=read_pair, metavar="NAME=VALUE",
                       help="A hyperparameter, repeatable"),
         option("--path", help="The file or directory of code to save (default: none)"),
         option("--name", help="A name for the experiment"),
         option("--tag", action="append", default=[], help="A tag, repeatable"),
         option("words", nargs="*", metavar="command", help="The program and its arguments, after --"),
         usage="[--param NAME=VALUE...] [--path PATH] [flags] -- <command>", epilog="""\
Record a program in any language, and the code in this directory:
  replicate run --param lr=0.1 --path . -- ./train.sh 0.1""")
def run_command(args: argparse.Namespace) -> int:
    """Run a program and record it as an experiment

    The experiment ends with the program, and so does this command, with the same
    exit code: 0 means that the experiment completed. The program adds checkpoints
    with 'replicate checkpoint'.
    """
    if not args.program or args.words:
        raise UsageError("There is no program to run. Write it after --, as in: %s run --param lr=0.1 -- ./train.sh" %
                         program_name())
    if shutil.which(args.program[0]) is None:
        raise ReplicateError("There is no program %s, or it is not executable (see chmod +x)." % args.program[0])
    if is_secondary_process():
        return exit_status(run_program(args.program, os.getcwd(), dict(os.environ)))
    project = Project(args.repository, args.project_directory)
    settings = RecordingSettings(role="runner", program=args.program)
    experiment = create_experiment(project, args.path and os.path.abspath(args.path), dict(args.param), settings, False,
                                   name=args.name, tags=args.tag)
    environment = dict(os.environ, REPLICATE_EXPERIMENT=experiment.id, REPLICATE_REPOSITORY=project.repository.url,
                       REPLICATE_PROJECT_DIRECTORY=project.directory)
    outcome = dict(ending(), status="failed", error="it could not be started")
    try:
        status = run_program(args.program, os.getcwd(), environment)
        outcome = ending_of_program(status)
    finally:
        project.stop(experiment, outcome=outcome)
    return exit_status(status)


@Command("checkpoint", option("--path", help="The file or directory to save (default: none)"),
         option("--step", type=number_from(0), metavar="N", help="The training step (default: one more than the last)"),
         option("--metric", action="append", default=[], type=read_pair, metavar="NAME=VALUE", help="A metric, repeatable"),
         option("--primary", type=read_primary, metavar="NAME:GOAL",
                help="The metric that tells which checkpoint is best, and its goal: minimize or maximize"),
         option("-q", "--quiet", action="store_true", help="Only print errors"),
         usage="[--path PATH] [--metric NAME=VALUE...] [flags]", epilog="""\
In a program that 'replicate run' has started, record the results of an epoch:
  replicate checkpoint --path model.bin --step 1 --metric loss=0.25 \\
    --primary loss:minimize""")
def checkpoint_command(args: argparse.Namespace) -> int:
    """Add a checkpoint to the experiment that 'replicate run' records"""
    if is_secondary_process():
        return 0
    experiment_id = os.environ.get("REPLICATE_EXPERIMENT", "")
    if not is_id(experiment_id):
        raise ReplicateError("There is no experiment to add a checkpoint to: REPLICATE_EXPERIMENT is not set. Start the "
                             "program with '%s run -- COMMAND'." % program_name())
    project = Project(args.repository, args.project_directory)
    path = os.path.abspath(args.path) if args.path else args.path
    checkpoint = add_checkpoint(project, experiment_id, path, args.step, dict(args.metric), args.primary, args.quiet)
    is_whole = (checkpoint.path or path is None) and checkpoint.metrics.keys() == dict(args.metric).keys()
    return 0 if is_whole else 1


@Command("rerun", ID, option("-o", "--output-directory", metavar="DIRECTORY",
                             help="Directory to create (default: rerun-<ID>)"),
         usage="<experiment or checkpoint ID> [flags]")
def rerun_experiment(args: argparse.Namespace) -> int:
    """Run an experiment again in a new directory

    Checks out the code of the experiment and runs its command there: look at both
    first if somebody else wrote them. With a checkpoint ID, checks out the files of
    the checkpoint too. Records the new run in the same repository.
    """
    project = open_project(args)
    experiment, checkpoint = find_item(project.repository, args.id)
    directory = args.output_directory or new_directory("rerun-" + experiment.short_id())
    place, words = words_to_rerun(experiment)
    if os.path.lexists(directory):
        raise ReplicateError("%s already exists. Choose a new directory with -o." % directory)
    project.checkout(experiment, checkpoint, directory)
    folder = os.path.join(directory, place)
    os.makedirs(folder, exist_ok=True)
    os.makedirs(os.path.join(directory, os.path.dirname(RERUN_MARK)))
    with open(os.path.join(directory, RERUN_MARK), "x") as file:
        file.write(experiment.id + "\n")
    original = os.path.join(os.path.abspath(project.directory), place, words[0])
    if "/" in words[0] and not os.path.exists(os.path.join(folder, words[0])) and os.path.exists(original):
        words[0] = original  # such as .venv/bin/python, which is never saved
    copy = os.path.join(directory, "replicate.py")
    if program_name() != "replicate" and not os.path.lexists(copy):
        shutil.copyfile(os.path.abspath(__file__), copy)
    environment = {name: value for name, value in os.environ.items() if name != "REPLICATE_EXPERIMENT"}
    environment.update(REPLICATE_REPOSITORY=project.repository.url, REPLICATE_PROJECT_DIRECTORY=os.path.abspath(directory),
                       REPLICATE_JOB="rerun-%s-%s" % (experiment.short_id(), os.urandom(4).hex()))  # else init() might resume
    console.info("Running in %s:\n  %s" % (directory, " ".join(map(shlex.quote, words))))
    return exit_status(run_program(words, folder, environment))


def words_to_rerun(experiment: Experiment) -> Tuple[str, List[str]]:
    """(the folder in the project, the words) of an experiment's command.

    Raises ReplicateError if it cannot be run again.
    """
    def refuse(reason: str) -> NoReturn:
        raise ReplicateError("Experiment %s cannot be run again: %s." % (experiment.short_id(), reason))

    if not experiment.path:
        refuse("it saved no code. Pass path to init(), or --path to 'run', to save it")
    try:
        words = shlex.split(experiment.full_command or "")
    except ValueError:
        words = []
    place = "."
    if words[:1] == ["cd"] and words[2:3] == ["&&"]:
        place, words = words[1], words[3:]
    if not words:
        refuse("its command is not known")
    if any("***" in word for word in words):
        refuse("its command contains a secret that was not recorded. Check it out and run it yourself: %s" %
               experiment.full_command)
    if os.path.isabs(place) or os.pardir in place.split("/"):
        refuse("it ran in %s, outside the project directory" % place)
    if words[0].endswith(".py"):  # keepsake records the script without the interpreter
        words.insert(0, sys.executable)
    return place, words


@Command("push", option("ids", nargs="*", metavar="ID", help="With --from: experiment IDs (default: all experiments)"),
         option("--from", dest="source", metavar="URL", help="Copy experiments from this repository"),
         usage="[--from URL [ID...]] [flags]", epilog="""\
Copy all experiments, or only one, from another repository into this one:
  replicate push --from file://../old/.replicate/storage
  replicate push --from s3://my-bucket a1b2c3d""")
def push_command(args: argparse.Namespace) -> None:
    """Upload waiting experiments, or copy some from another repository

    While a bucket cannot be reached, experiments and checkpoints wait in
    .replicate/pending/ in the project directory. This command uploads them, and so
    does the next run in the project. If it is interrupted, run it again.
    """
    if args.ids and not args.source:
        raise UsageError("Experiment IDs need --from URL: without it, push uploads everything that is waiting.")
    project = Project(args.repository, args.project_directory)
    sent = Sent()
    if args.source:
        source = Repository(absolute_url(args.source, os.getcwd()))
        if not source.check_version():
            raise DoesNotExist("There is no repository at %s." % source.url)
        target = project.open_repository()
        if source.url == target.url:
            raise UsageError("--from and the repository to copy to are the same: %s." % target.url)
        copy_experiments(source, target, args.ids, sent)
        console.info("Copied %s from %s to %s" % (sent, source.url, target.url) if sent.experiments or sent.bytes else
                     "Nothing was copied: %s has everything already" % target.url)
        return
    pending = project.pending()
    areas = pending_areas(pending)
    mention_other_pending(project.directory, pending)
    if not [entry for area in areas for entry in area.storage.list(EXPERIMENTS)]:
        for area in areas:
            remove_unnamed(area)
        console.info("Nothing is waiting to be uploaded")
        return
    remote = project.repository
    remote.prepare()
    total = sum(entry.size for area in areas for kind in ("experiments/", "checkpoints/")
                for entry in area.storage.list(kind))
    try:
        with Progress("Uploading", total) as progress:
            busy = send_abandoned(pending, remote, sent, progress.add)
    except ReplicateError as error:
        raise WriteError("%s\nUploaded so far: %s. Run the command again for the rest." % (error, sent)) from error
    if sent.experiments:
        console.info("Uploaded %s to %s" % (sent, remote.url))
    for experiment_id in busy:
        console.info("Another process is still recording experiment %s, and will upload it" % experiment_id[:SHORT_ID])


def mention_other_pending(directory: str, pending: Repository) -> None:
    """Tell the user which experiments are waiting for other repositories."""
    base = os.path.join(directory, PENDING)
    for name in sorted(os.listdir(base)) if os.path.isdir(base) else ():
        url = "file://" + os.path.join(base, name)
        if not url.startswith(pending.url) and next(Repository(url).storage.list(EXPERIMENTS), None):
            console.info("Experiments in %s are waiting for another repository: upload them with '%s push -R URL'" % (
                url, program_name()))


def copy_experiments(source: Repository, target: Repository, prefixes: Sequence[str], sent: Sent) -> None:
    """Copy experiments (all, or those named) between repositories. Raises DoesNotExist, ReadError, WriteError."""
    target.prepare()
    experiments = [experiment for experiment, _ in find_items(source, prefixes)] if prefixes else source.experiments()
    with Progress("Copying", 0) as progress:
        for experiment in experiments:
            document = experiment.to_json()
            sent.experiments += send_experiment(source, target, document, document["checkpoints"], sent, progress.add)


# -- demo

DEMO_SCRIPT = '''\
"""A language model of letters, in plain Python: how likely is each letter after the few before it?"""
import collections
import json
import math
import sys

import replicate

order, smoothing = int(sys.argv[1]), float(sys.argv[2])
text = open("replicate.py", encoding="utf-8").read()
split = len(text) * 9 // 10
letters = sorted(set(text))

experiment = replicate.init(path="train.py", params={"order": order, "smoothing": smoothing})
counts = collections.defaultdict(collections.Counter)
for step in range(3):
    for i in range(split * step // 3, split * (step + 1) // 3):  # train on another third
        counts[text[max(0, i - order):i]][text[i]] += 1
    loss = 0.0
    for i in range(split, len(text)):  # test on the last tenth: the loss is in bits per letter
        seen = counts.get(text[i - order:i], {})
        loss -= math.log2((seen.get(text[i], 0) + smoothing) / (sum(seen.values()) + smoothing * len(letters)))
    with open("model.json", "w") as file:
        json.dump(counts, file)
    experiment.checkpoint(path="model.json", step=step, metrics={"loss": loss / (len(text) - split)},
                          primary_metric=("loss", "minimize"))
experiment.stop()
'''
DEMO_RUNS = (("1", "0.1"), ("2", "0.1"), ("3", "0.1"), ("3", "0.01"))


@Command("demo", option("directory", nargs="?", metavar="DIRECTORY",
                        help="Directory to create (default: replicate-demo)"), usage="[DIRECTORY] [flags]")
def demo_command(args: argparse.Namespace) -> None:
    """Train a small model four times, and list the experiments"""
    import subprocess
    directory = args.directory or new_directory("replicate-demo")
    try:
        os.makedirs(directory)
        shutil.copyfile(os.path.abspath(__file__), os.path.join(directory, "replicate.py"))
        with open(os.path.join(directory, "train.py"), "x", encoding="utf-8") as file:
            file.write(DEMO_SCRIPT)
    except OSError as error:
        raise WriteError("The demo cannot be created in %s: %s." % (directory, short_reason(error))) from error
    os.makedirs(os.path.join(directory, DEFAULT_STORAGE))
    environment = {name: value for name, value in os.environ.items()
                   if name not in (*RANK_SIZES, "REPLICATE_REPOSITORY", "REPLICATE_PROJECT_DIRECTORY", "PYTHONPATH")}
    for arguments in DEMO_RUNS:
        console.info("python train.py %s" % " ".join(arguments))
        run = subprocess.run([sys.executable, "train.py", *arguments], cwd=directory, env=environment)
        if run.returncode:
            raise ReplicateError("The demo's training script failed: its output is above.")
    say("\n")
    rows = list_rows(Repository("file://" + os.path.join(os.path.abspath(directory), DEFAULT_STORAGE)))
    say("".join(render_list(rows, datetime.datetime.now(datetime.timezone.utc), width=terminal_width(sys.stdout))))
    best = min(rows, key=lambda row: row.value("loss"))
    program = "%s -D %s" % (program_name(), shlex.quote(directory))
    say("%s holds the experiments and train.py, the script that recorded them. Try next:\n\n"
        "  %s show %s\n  %s diff %s %s\n  %s checkout %s -o %s\n" % (
            directory, program, best.id[:SHORT_ID], program, rows[0].id[:SHORT_ID], best.id[:SHORT_ID],
            program, best.id[:SHORT_ID], shlex.quote(os.path.join(directory, "best"))))


def new_directory(name: str) -> str:
    """name, or name-2, name-3, ... if it is taken."""
    number, candidate = 1, name
    while os.path.lexists(candidate):
        number += 1
        candidate = "%s-%d" % (name, number)
    return candidate


# -- analytics and feedback

class Analytics:
    """Anonymous usage events, sent in the background, and only if REPLICATE_ANALYTICS_URL is set."""

    SEND_AFTER_EVENTS = 15
    SEND_AFTER_SECONDS = 300
    NOTICE = ("Replicate sends anonymous usage data to %s: a random token for this machine, the name of the command, "
              "the version, the operating system and the processor type. It has not sent anything yet.\n"
              "To switch it off, run: replicate analytics off")

    def __init__(self) -> None:
        base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
        self.directory = os.path.join(base, "replicate")
        self.url = os.environ.get("REPLICATE_ANALYTICS_URL", ANALYTICS_URL)
        self.refused = any(os.environ.get(name, "") not in ("", "0", "false")
                           for name in ("REPLICATE_NO_ANALYTICS", "DO_NOT_TRACK"))

    def settings(self) -> Dict[str, Any]:
        """{"analytics_enabled": bool, "anonymous_id": str}, or {} before the first run."""
        settings = self._read("settings.json")
        return settings if isinstance(settings, dict) else {}

    def switch(self, enabled: bool) -> None:
        """Switch analytics on or off. Raises WriteError."""
        import uuid
        settings = self.settings()
        settings.setdefault("anonymous_id", str(uuid.uuid4()))
        settings["analytics_enabled"] = enabled
        self._write("settings.json", settings)

    def event(self, command_name: str) -> Dict[str, Any]:
        """One event, which is all that is ever sent."""
        example = "9f3027bb-0eb8-917d-e5bf-c6c1bdb1fd0a"  # for `replicate analytics` before the first run
        return {"anonymous_id": self.settings().get("anonymous_id", example), "event": "Run command", "properties": {
            "command": "replicate " + command_name, "replicate_version": __version__,
            "operating_system": sys.platform, "cpu_architecture": platform.machine(), "timestamp": timestamp()}}

    def track(self, command_name: str) -> None:
        """Record that a command was run; the first time, only explain. Never raises, never waits."""
        if not self.url or self.refused or command_name in ("analytics", "help"):
            return
        try:
            enabled = self.settings().get("analytics_enabled")
            if enabled is None:
                self.switch(True)
                console.info(self.NOTICE % self.url)
            elif enabled:
                self._add(self.event(command_name))
        except Exception as error:
            console.debug("Analytics: %s" % error)

    def _add(self, event: Dict[str, Any]) -> None:
        """Put an event into the file of waiting events, and send them when they are many or old enough."""
        events = self._read("events.json")
        try:
            age = time.time() - parse_time(events[0]["properties"]["timestamp"]).timestamp()
        except (TypeError, LookupError, ValueError):  # there is no such file, or it is damaged
            events, age = [], 0.0
        events = [*events, event][-self.SEND_AFTER_EVENTS:]
        if len(events) >= self.SEND_AFTER_EVENTS or age >= self.SEND_AFTER_SECONDS:
            os.unlink(os.path.join(self.directory, "events.json"))
            self._send_in_background(events)
        else:
            self._write("events.json", events)

    def _send_in_background(self, events: Sequence[Dict[str, Any]]) -> None:
        import subprocess
        process: Any = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--send-analytics"], stdin=subprocess.PIPE,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        with process.stdin:
            process.stdin.write(encode_json(events))

    def _read(self, name: str) -> Any:
        try:
            with open(os.path.join(self.directory, name), "rb") as file:
                return json.loads(file.read())
        except (OSError, ValueError):
            return None

    def _write(self, name: str, content: Any) -> None:
        try:
            os.makedirs(self.directory, 0o700, exist_ok=True)
        except OSError as error:
            raise WriteError("%s cannot be created: %s." % (self.directory, short_reason(error))) from error
        replace_file(os.path.join(self.directory, name), encode_json(content), 0o600)


def post_json(url: str, data: bytes, timeout: float) -> None:
    """POST JSON to an http(s) URL. Raises ReplicateError."""
    import urllib.request
    if not url.startswith(("http://", "https://")):
        raise ReplicateError("%s is not an http or https URL." % url)
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        urllib.request.urlopen(request, timeout=timeout).close()
    except (OSError, ValueError) as error:
        cause = getattr(error, "reason", None)  # urllib wraps it
        raise ReplicateError("%s cannot be reached: %s." % (
            url, short_reason(cause if isinstance(cause, OSError) else error))) from error


@Command("analytics", option("switch", nargs="?", choices=("on", "off"), metavar="on|off",
                             help="Switch analytics on or off (default: show the state)"), usage="<on|off> [flags]")
def analytics_command(args: argparse.Namespace) -> None:
    """Enable or disable analytics

    Nothing is sent unless you set REPLICATE_ANALYTICS_URL. If you do, the following
    data is sent for each command:
      * A random token for the machine (e.g. "9f3027bb-0eb8-917d-e5bf-c6c1bdb1fd0a")
      * The subcommand, without any options or arguments (e.g. "replicate ls")
      * The Replicate version (e.g. "1.0.0")
      * Your CPU architecture (e.g. "x86_64")
      * Your operating system (e.g. "linux")
    """
    analytics = Analytics()
    if args.switch:
        analytics.switch(args.switch == "on")
        console.info("Analytics are now %s" % args.switch)
        return
    if analytics.refused:
        state = "off: REPLICATE_NO_ANALYTICS or DO_NOT_TRACK is set"
    elif not analytics.settings().get("analytics_enabled", True):
        state = "off"
    elif not analytics.url:
        state = "on, but nothing is recorded or sent: REPLICATE_ANALYTICS_URL is not set"
    else:
        state = "on, and sent to " + analytics.url
    say("Analytics are %s.\nAn example of an event:\n" % escape_control(state))
    say_json(analytics.event("ls"))


@Command("feedback", option("message", nargs="*", metavar="MESSAGE",
                            help="Your feedback (default: ask for it, or read standard input)"), usage="[MESSAGE] [flags]")
def feedback_command(args: argparse.Namespace) -> None:
    """Submit feedback to the team!"""
    message = " ".join(args.message)
    if not message and is_terminal(sys.stdin):
        write_text(sys.stderr, "What would you like to tell us? ")
        message = sys.stdin.readline()
    elif not message and sys.stdin is not None:
        message = sys.stdin.read()
    if not message.strip():
        raise ReplicateError("There is no feedback to send: the message is empty.")
    content = {"feedback": message.strip(), "replicate_version": __version__, "operating_system": sys.platform,
               "python_version": platform.python_version(), "cpu_architecture": platform.machine()}
    url = os.environ.get("REPLICATE_FEEDBACK_URL", FEEDBACK_URL)
    if url:
        post_json(url, encode_json(content), 10.0)
        console.info("Thank you!")
    else:
        console.info("Nothing was sent: REPLICATE_FEEDBACK_URL is not set. Set it and run this again, or pass this on:")
        say_json(content)


# -- completion

COMPLETION = {"bash": """\
_replicate() {
    local IFS=$'\\n'
    COMPREPLY=($(%(program)s --complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _replicate replicate replicate.py
""", "zsh": """\
#compdef replicate replicate.py
_replicate() {
    local -a found
    found=(${(f)"$(%(program)s --complete "${(@)words[2,CURRENT]}" 2>/dev/null)"})
    if (( $#found )); then compadd -a found; else _files; fi
}
compdef _replicate replicate replicate.py
""", "fish": """\
function __replicate_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    %(program)s --complete $words[2..-1] "$current" 2>/dev/null
end
complete -c replicate -a '(__replicate_complete)'
complete -c replicate.py -a '(__replicate_complete)'
"""}


@Command("completion", option("shell", choices=sorted(COMPLETION), metavar="bash|zsh|fish", help="Your shell"),
         usage="<bash|zsh|fish> [flags]", epilog="""\
Turn on completion in this shell, or add the line to ~/.bashrc or ~/.zshrc:
  source <(replicate completion bash)
  source <(replicate completion zsh)
In fish:
  replicate completion fish > ~/.config/fish/completions/replicate.fish""")
def completion_command(args: argparse.Namespace) -> None:
    """Print a script that completes commands, flags, IDs and names"""
    program = "replicate"
    if program_name() != program:  # Python compiles this file each time it runs as a script: too slow for completion
        start = "import sys; sys.path[0] = %r; import replicate; sys.exit(replicate.main())"
        program = "%s -c %s" % (shlex.quote(sys.executable), shlex.quote(start % os.path.dirname(os.path.abspath(__file__))))
    say(COMPLETION[args.shell] % {"program": program})


def completions(words: Sequence[str]) -> List[str]:
    """What the last of the words typed so far can become.

    Offers plain words only: the shell expands the answer, and names and params may come from somebody else's repository.
    Raises UsageError if the word is the value of a global flag, which the shell completes as a file.
    """
    *before, current = words or [""]
    parsed = [word for word in explicit_color(before) if not re.match("-[hv]+[^hvDR]", word)]  # -vf has a flag of a command
    args, rest = argument_parser(GLOBAL_OPTIONS).parse_known_args(parsed)
    name = next((word for word in rest if word[:1] != "-"), None)
    chosen = find_command(name) if name else None
    options = [*(chosen.options if chosen else ()), *GLOBAL_OPTIONS]
    flags = {flag: settings for flags, settings in options for flag in flags if flag[0] == "-"}
    arguments = {names[0]: settings for names, settings in options if names[0][0] != "-"}
    value = flags.get(before[-1]) if before else None
    if chosen is COMMANDS["run"] and "--" in before:
        found = []
    elif value and value.get("action", "append") == "append":
        found = sorted(known_names(rows_to_complete(args))) if value.get("metavar") == "KEY" else []
    elif current[:1] == "-":
        found = list(flags)
    elif chosen is None or chosen.name == "help":
        found = list(COMMANDS)
    elif "id" in arguments or "ids" in arguments:
        found = item_names(rows_to_complete(args), current, chosen.name != "tag")
    else:
        found = [choice for settings in arguments.values() for choice in settings.get("choices", ())]
    return [text for text in dict.fromkeys(found) if text.startswith(current) and re.fullmatch(r"[A-Za-z0-9_.-]+", text)]


def rows_to_complete(args: argparse.Namespace) -> List[Row]:
    """The rows of the repository that the flags name; of a bucket, only those in the cache."""
    project = Project(args.repository, args.project_directory)
    url = project.location.url or ""
    return list_rows(project.repository) if url.startswith("file://") else RowCache(url).rows()


def item_names(rows: Sequence[Row], start: str, checkpoints: bool) -> List[str]:
    """The names and short IDs of experiments, newest first, and perhaps the checkpoint IDs that begin with start."""
    names = [text_in(row.summary, "name") or "" for row in reversed(rows)]
    length = max(SHORT_ID, len(start))
    found = [name for name in names if name and name[0] != "-"] + [row.id[:length] for row in reversed(rows)]
    if start and checkpoints:
        found += [digits[:length] for row in rows if row.may_have_checkpoint(start) for digits in row.checkpoint_ids.split()]
    return found


@Command("help", option("command", nargs="?", metavar="COMMAND", help="A command (default: list all commands)"),
         usage="[COMMAND] [flags]")
def help_command(args: argparse.Namespace) -> None:
    """Help about any command"""
    say(command_parser(find_command(args.command)).format_help() if args.command else general_help())


# -- parsing

def argument_parser(options: Options, prog: str = "replicate", **settings: Any) -> argparse.ArgumentParser:
    """A parser of these options that raises UsageError."""
    def fail(message: str) -> NoReturn:
        typed = re.match("unrecognized arguments: (--[a-z-]+)", message)
        meant = nearest(typed.group(1), [name for names, _ in options for name in names]) if typed else ""
        raise UsageError("%s%s.%s See '%s%s --help'." % (
            message[:1].upper(), message[1:].rstrip("."), meant, program_name(), prog[len("replicate"):]))

    parser = argparse.ArgumentParser(  # argparse imports a lot to ask for the terminal's width
        prog, add_help=False, allow_abbrev=False, **settings,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=80))
    parser.error = fail  # type: ignore[method-assign]
    for names, keywords in options:
        parser.add_argument(*names, **keywords)
    return parser


def command_parser(chosen: Command) -> argparse.ArgumentParser:
    """The parser of one subcommand; global flags that it does not meet keep their values."""
    flags = [(names, dict(settings, default=argparse.SUPPRESS)) for names, settings in GLOBAL_OPTIONS]
    aliases = "\n\naliases: %s" % ", ".join(chosen.aliases) if chosen.aliases else ""
    return argument_parser((*chosen.options, *flags), prog="replicate " + chosen.name, epilog=chosen.epilog,
                           usage="replicate %s %s" % (chosen.name, chosen.usage), description=chosen.description + aliases)


def general_help() -> str:
    """`replicate --help`."""
    lines = ["  %-10s  %s" % (name, ("\n" + 14 * " ").join(wrapped(chosen.description.split("\n")[0].rstrip("."), 66)))
             for name, chosen in COMMANDS.items()]
    version = option("--version", action="store_true", help="Print the version")
    flags = argument_parser((*GLOBAL_OPTIONS, version), usage=argparse.SUPPRESS).format_help()
    return ("Replicate: version control for machine learning\n\nusage: replicate [flags] <command> [flags]\n\n"
            "commands:\n%s\n\n%s\n"
            "Run 'replicate help <command>' to learn more about a command, or\n'replicate demo' for a demonstration.\n"
            % ("\n".join(lines), flags.lstrip("\n")))


def find_command(name: str) -> Command:
    """The command with that name or alias. Raises UsageError with a suggestion."""
    found = {alias: chosen for chosen in COMMANDS.values() for alias in (chosen.name, *chosen.aliases)}
    if name not in found:
        raise UsageError("There is no command %r.%s Run '%s --help' for a list." % (
            name, nearest(name, found), program_name()))
    return found[name]


def parse_arguments(argv: Sequence[str]) -> Tuple[Command, argparse.Namespace]:
    """The command and its arguments. Raises UsageError."""
    end = list(argv).index("--") if "--" in argv else len(argv)
    words = (option("command", nargs="?"), option("rest", nargs=argparse.REMAINDER))
    args = argument_parser((*GLOBAL_OPTIONS, *words)).parse_args(explicit_color(argv[:end]))
    if args.command is None and argv[end + 1:]:  # the command comes after `--`
        return parse_arguments([*argv[:end], *argv[end + 1:]])
    chosen, rest = find_command(args.command or "help"), args.rest
    del args.command, args.rest
    if chosen is COMMANDS["run"]:
        args.program = argv[end + 1:]
    else:
        rest += argv[end:] if argv[end + 1:] else []
        rest = removals_last(rest) if chosen is COMMANDS["tag"] else rest
    try:
        args = command_parser(chosen).parse_intermixed_args(rest, args)
    except UsageError:
        # --help is parsed before a missing argument is noticed; run_command() says where its program's flags belong
        if not args.help and (chosen is not COMMANDS["run"] or args.program):
            raise
    if args.help and chosen.name != "help":
        args.command, chosen = chosen.name, COMMANDS["help"]
    return chosen, args


def removals_last(words: Sequence[str]) -> List[str]:
    """The words of `tag` with each -TAG after `--`, so that none is taken for a flag."""
    flags = [name for names, _ in GLOBAL_OPTIONS for name in names]
    removals = [word for word in words if re.match("-[^-]", word) and word not in flags]
    return [word for word in words if word not in removals] + (["--", *removals] if removals else [])


def explicit_color(words: Sequence[str]) -> List[str]:
    """words with --color as --color=true, so that it does not take the next word for its value."""
    return ["--color=true" if word == "--color" else word for word in words]


def run(argv: Sequence[str]) -> int:
    """Parse and run a command line; return the exit code. Raises ReplicateError, KeyboardInterrupt, OSError."""
    if list(argv) == ["--send-analytics"]:
        post_json(Analytics().url, sys.stdin.buffer.read(), 5.0)
        return 0
    if list(argv[:1]) == ["--complete"]:
        say("".join(text + "\n" for text in completions(argv[1:])))
        return 0
    if next((word for word in argv if word == "--version" or word[:1] != "-"), None) == "--version":
        say("replicate %s\n" % __version__)
        return 0
    if any(word == "--no-color" or word[:8] == "--color=" and COLOR_WORDS.get(word[8:].lower()) is False for word in argv):
        console.color = False  # first: what is wrong with the arguments has no color, either
    chosen, args = parse_arguments(argv)
    console.verbose = args.verbose
    console.color = COLOR_WORDS[args.color] if args.color else None
    status = chosen.run(args) or 0
    Analytics().track(chosen.name)
    return status


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command line, by default this process's; return 0, 1 (error), 2 (wrong usage) or 130 (Ctrl-C)."""
    if argv is not None:
        return exit_code(argv)
    import gc
    gc.disable()  # a command is short and leaves few cycles: looking for them takes a tenth of `ls`
    code = exit_code(sys.argv[1:])
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:  # a closed pipe, a full disk: drop the rest, or the interpreter complains of it at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def exit_code(argv: Sequence[str]) -> int:
    """Run a command line, report its errors and return the exit code; see main."""
    try:
        return run(argv)
    except UsageError as error:
        console.error(str(error))
        return 2
    except KeyboardInterrupt:
        write_text(sys.stderr, "\n")
        return 130
    except BrokenPipeError:
        return 0
    except Exception as error:
        if console.verbose:
            import traceback
            traceback.print_exc()
        console.error(str(error) if isinstance(error, ReplicateError) else
                      "Something unexpected went wrong: %s: %s. Run the command with -v for details." % (
                          type(error).__name__, short_reason(error)))
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
