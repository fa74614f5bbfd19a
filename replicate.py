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

On the command line: ``python replicate.py ls`` (then ``show``, ``diff``, ``checkout``, ``rm``, ``help``).

Sections, each of which depends only on those above it:

     0  imports and constants             6  archives: ignore rules, pack, unpack
     1  errors and the console            7  repository: layout, documents, journals, find, remove
     2  values: JSON, times, short forms  8  recorder: snapshots, journal, sending, signals
     3  model: Experiment, lists, plots   9  library: Project, init, experiments
     4  filters and sorting              10  rendering: tables, show, diff (data in, text out)
     5  configuration, threads, storage  11  commands, parser, main
"""
from __future__ import annotations

import io
import os
import sys
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    import datetime
    import difflib
    import errno
    import json
    import platform
    import re
    import shlex
    import shutil
    import signal
    import stat
    import struct
    import tarfile
    import zlib
    from typing import (Any, BinaryIO, Callable, Container, Dict, Iterable, Iterator, List, NoReturn, Optional, Sequence,
                        Set, TextIO, Tuple, Union)
    Deflate = Callable[[Union[bytes, memoryview]], bytes]  # compresses to deflate data
    Options = Sequence[Tuple[Tuple[str, ...], Dict[str, Any]]]
    Paint = Callable[[str, str], str]  # (text, style of Console.COLORS) -> text in that style
    Tabulate = Callable[[Sequence["Summary"]], "CellTable"]


# ------------------------------------------------------------------------------------------------------------------
# 0  Imports and constants
# ------------------------------------------------------------------------------------------------------------------

class _LazyModule:
    """A standard library module that is imported when it is first used: most commands need few of them."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        module = __import__(self._name)
        globals()[self._name] = module
        return getattr(module, attribute)


if not TYPE_CHECKING:
    for _name in ("argparse", "datetime", "difflib", "errno", "json", "platform", "re", "shlex", "shutil", "signal",
                  "stat", "struct", "tarfile", "zlib"):
        globals()[_name] = _LazyModule(_name)

__version__ = "1.0.0"
__all__ = ["init", "experiments", "Project", "Experiment", "Checkpoint", "ExperimentList", "CheckpointList",
           "ReplicateError", "DoesNotExist", "ConfigNotFound", "ReadError", "WriteError",
           "RepositoryConfigurationError", "IncompatibleRepositoryVersion", "CorruptedRepositorySpec"]

HEARTBEAT_INTERVAL = 10.0        # seconds between two heartbeats of a running experiment
HEARTBEAT_TIMEOUT = 30.0         # seconds after which a silent experiment counts as stopped
CONFIG_NAMES = ("replicate.yaml", "replicate.yml", "keepsake.yaml")
IGNORE_NAMES = (".replicateignore", ".keepsakeignore")
CONFIG_SEARCH_DEPTH = 100        # directories
DEFAULT_STORAGE = os.path.join(".replicate", "storage")
REPOSITORY_VERSION = 1
MAX_INT_BITS = 1000
MAX_NESTING = 50                 # levels of lists and objects in a param or metric
SHORT_ID = 7                     # hex digits
LARGE_CODE_BYTES = 1 << 30       # what init() may save before it warns
LOW_DISK_BYTES = 1 << 30
COPY_BYTES = 4 << 20             # read and written at a time
ANALYTICS_URL = ""               # no collection server: nothing is sent unless REPLICATE_ANALYTICS_URL names one
FEEDBACK_URL = ""                # likewise, REPLICATE_FEEDBACK_URL


# ------------------------------------------------------------------------------------------------------------------
# 1  Errors and the console
# ------------------------------------------------------------------------------------------------------------------

class ReplicateError(Exception):
    """The root of every error that Replicate raises; its text is one clear sentence for the user."""


class DoesNotExist(ReplicateError):
    """No experiment, checkpoint, file or bucket of that name; or a prefix that fits several."""


class ConfigNotFound(ReplicateError):
    """No replicate.yaml and no repository here."""


class ReadError(ReplicateError):
    """Something in the repository or on disk could not be read."""


class WriteError(ReplicateError):
    """Something could not be written; what was there before is unchanged."""


class RepositoryConfigurationError(ReplicateError):
    """The configuration does not name a usable repository."""


class IncompatibleRepositoryVersion(ReplicateError):
    """The repository was written in a newer format."""


class CorruptedRepositorySpec(ReplicateError):
    """repository.json is not of the form {"version": N}."""


class UsageError(ReplicateError):
    """The command line is wrong: exit code 2."""


class Console:
    """Messages for people, on stderr; data goes to stdout and is none of its business."""

    COLORS = {"info": "\x1b[2m", "warning": "\x1b[33m", "error": "\x1b[31m", "bold": "\x1b[1m", "faint": "\x1b[2m",
              "heading": "\x1b[1;4m"}

    def __init__(self) -> None:
        self.color: Optional[bool] = None  # None: decided by the terminal and NO_COLOR
        self.verbose = False

    def colored(self, text: str, style: str, stream: TextIO) -> str:
        """text in that style if stream takes colours."""
        return "%s%s\x1b[0m" % (self.COLORS[style], text) if self.uses_color(stream) else text

    def uses_color(self, stream: TextIO) -> bool:
        """Whether stream takes colours."""
        wanted = self.color if self.color is not None else not os.environ.get("NO_COLOR")
        return wanted and is_terminal(stream) and os.environ.get("TERM") != "dumb"

    def info(self, message: str) -> None:
        """Print a message, whose further lines are continuations."""
        self._say(message, "info")

    def warning(self, message: str) -> None:
        """Print a warning."""
        self._say(message, "warning")

    def error(self, message: str) -> None:
        """Print an error."""
        self._say(message, "error")

    def debug(self, message: str) -> None:
        """Print a message that only -v shows."""
        if self.verbose:
            self._say(message, "info")

    def _say(self, message: str, style: str) -> None:
        lines = []
        for number, line in enumerate(message.split("\n")):
            lines.append(self.colored("   │ " if number else "═══╡ ", style, sys.stderr) + escape_control(line) + "\n")
        write_text(sys.stderr, "".join(lines))


def write_text(stream: Optional[TextIO], text: str) -> None:
    """Write text whatever the stream's encoding is; a stream that is gone (no stderr, a closed pipe) is no error."""
    if stream is None:
        return
    try:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        try:
            text.encode(encoding)  # not by trying to write it: stderr escapes by itself
        except UnicodeEncodeError:
            plain = text.replace("═══╡", "===|").replace("   │", "   |")
            text = plain.encode(encoding, "backslashreplace").decode(encoding)
        stream.write(text)
        stream.flush()
    except (OSError, ValueError):
        if stream is not sys.stderr:
            raise


def is_terminal(stream: Optional[TextIO]) -> bool:
    """Whether stream leads to a terminal."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


console = Console()

# C0 and C1 controls, bidirectional and zero-width marks, line separators, tags and lone surrogates.
_CONTROL = ("\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
            "\ud800-\udfff\U000e0000-\U000e0fff")
_control_pattern: Optional[re.Pattern] = None


def escape_control(text: str) -> str:
    """text with everything that could steer a terminal or reorder a line written as an escape (\\n, \\x1b, \\u202e)."""
    global _control_pattern
    if text.isascii() and text.isprintable():
        return text
    if _control_pattern is None:
        _control_pattern = re.compile("[%s]" % _CONTROL)
    return _control_pattern.sub(lambda match: match.group().encode("unicode_escape").decode("ascii"), text)


class Progress:
    """One line on a terminal's stderr that counts bytes or things done; silent in a pipe and for quick work."""

    DELAY = 0.5     # seconds before the first line
    INTERVAL = 0.1  # seconds between two lines

    def __init__(self, label: str, total: int, quiet: bool = False) -> None:
        self.label, self.total, self.done = label, total, 0
        self._next = time.monotonic() + self.DELAY
        self._active = is_terminal(sys.stderr) and not quiet
        self._shown = False

    def add(self, amount: int) -> None:
        """Count so many more bytes."""
        self.done += amount
        if self._active:
            share = " of %s (%d %%)" % (format_size(self.total), min(100, 100 * self.done // self.total)
                                        ) if self.total else ""
            self.show("%s: %s%s" % (self.label, format_size(self.done), share))

    def show(self, text: str) -> None:
        """Show a line, unless the last one is very recent."""
        if self._active and time.monotonic() >= self._next:
            self._next = time.monotonic() + self.INTERVAL
            self._shown = True
            write_text(sys.stderr, "\r\x1b[K" + escape_control(text))

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        if self._shown:
            write_text(sys.stderr, "\r\x1b[K")


def confirm(question: str) -> bool:
    """Ask on the terminal; anything but yes, and the end of input, is no."""
    write_text(sys.stderr, question + " (y/N) ")
    answer = sys.stdin.readline() if sys.stdin is not None else ""
    if not answer.endswith("\n"):
        write_text(sys.stderr, "\n")
    return answer.strip().lower() in ("y", "yes")


def has_terminal_input() -> bool:
    """Whether somebody can be asked."""
    return is_terminal(sys.stdin)


def program_name() -> str:
    """How the user called this program, as it can be pasted."""
    program = sys.argv[0] if sys.argv else ""
    if not program.endswith(".py"):
        return "replicate"
    python = os.path.basename(sys.executable) or "python3"
    if shutil.which(python) != sys.executable:
        python = sys.executable
    if sys.modules["__main__"].__spec__ is not None:
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

    Scalars and arrays of numpy, torch, tensorflow and jax are known by their methods, so that no library is imported.
    Raises TypeError, naming `where`, for anything else.
    """
    if value is None or type(value) in (str, float, bool):
        return value
    if type(value) is int:
        if value.bit_length() > MAX_INT_BITS:
            raise TypeError("%s is a number of %d bits: at most %d can be stored" % (where, value.bit_length(),
                                                                                    MAX_INT_BITS))
        return value
    if hasattr(value, "tolist") and callable(value.tolist):          # numpy, torch, jax
        plain = value.tolist()
        return float(plain) if type(plain) is type(value) else plain_value(plain, where)  # a numpy.longdouble stays one
    if hasattr(value, "numpy") and callable(value.numpy):            # tensorflow
        return plain_value(value.numpy(), where)
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return plain_value(kind(value), where)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, (str, int, float, bool)):
                raise TypeError("%s has a key that is no string: %r" % (where, key))
        return {str(key): plain_value(item, "%s[%r]" % (where, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(item, where) for item in value]
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    if hasattr(value, "as_integer_ratio"):                           # Decimal, Fraction
        return float(value)
    raise TypeError("%s is a %s, which cannot be stored (str, int, float, bool, None, lists and dicts can)" %
                    (where, type(value).__name__))


def plain_param(value: Any, where: str, unknown: List[str]) -> Any:
    """value as a plain value, whatever it is: the fields of an object that is like a dict, a sorted set, the name of a
    function. What has no such form becomes text, and its place is added to `unknown`.

    Raises RecursionError for an object that holds itself.
    """
    from collections.abc import Sequence as AnySequence, Set as AnySet
    try:
        fields = fields_of(value)
        if fields is not None:
            return {key_text(key): plain_param(item, "%s.%s" % (where, key_text(key)), unknown)
                    for key, item in fields.items()}
        if isinstance(value, AnySet):
            return sorted([plain_param(item, where, unknown) for item in value], key=sort_key)
        if isinstance(value, AnySequence) and not isinstance(value, (str, bytes, bytearray, memoryview)):
            return [plain_param(item, where, unknown) for item in value]
        name = name_of(value)
        return plain_value(value, where) if name is None else name
    except RecursionError:
        raise
    except Exception:  # plain_value() does not know it, or it fails when somebody looks at it
        unknown.append("%s (%s)" % (where, type(value).__name__))
        return text_of(value)


def fields_of(value: Any) -> Optional[Dict[Any, Any]]:
    """The items of a mapping, or the fields of a dataclass object or namespace (shallow); None for any other object."""
    import types
    from collections.abc import Mapping
    kind = type(value)
    if kind is dict:
        return value
    if isinstance(value, Mapping) or (hasattr(kind, "keys") and hasattr(kind, "__getitem__")):
        return {key: value[key] for key in value.keys()}
    if hasattr(kind, "__dataclass_fields__"):
        from dataclasses import fields
        return {field.name: getattr(value, field.name) for field in fields(value) if hasattr(value, field.name)}
    return vars(value) if isinstance(value, (argparse.Namespace, types.SimpleNamespace)) else None


def name_of(value: Any) -> Optional[str]:
    """The name of an Enum member, function, class, module or dtype; None for any other object."""
    import enum
    import types
    if isinstance(value, enum.Enum) and not isinstance(value, (int, float, str)):
        return value.name
    if isinstance(value, (type, types.ModuleType)) or (callable(value) and hasattr(value, "__name__")):
        return str(value.__name__)
    known = {kind.__name__.lower() for kind in type(value).__mro__}
    return str(value) if known & {"dtype", "device", "date", "time", "timedelta"} else None


def key_text(key: Any) -> str:
    """The key of a mapping as the name of a param."""
    return str.__str__(key) if isinstance(key, str) else name_of(key) or text_of(key)


def text_of(value: Any) -> str:
    """str(value) without memory addresses, at most 1,000 characters; for an object that fails at that, its type."""
    try:
        text = str(value)
    except Exception:
        text = object.__repr__(value)
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", text)
    return text if len(text) <= 1000 else text[:997] + "..."


def pack_floats(value: Any) -> Any:
    """A plain value with NaN and the infinities as the strings that the repository format has for them."""
    if isinstance(value, float):
        if value != value:
            return "[NaN]"
        return value if value - value == 0 else "[+Infinity]" if value > 0 else "[-Infinity]"
    if isinstance(value, dict):
        return {key: pack_floats(item) for key, item in value.items()}
    return [pack_floats(item) for item in value] if isinstance(value, list) else value


def unpack_floats(value: Any) -> Any:
    """The inverse of pack_floats."""
    kind = type(value)
    if kind is str:
        return NON_FINITE.get(value, value) if value[:1] == "[" else value
    if kind is dict:
        return {key: unpack_floats(item) for key, item in value.items()}
    return [unpack_floats(item) for item in value] if kind is list else value


def encode_json(value: Any, indent: Optional[int] = 1) -> bytes:
    """value as UTF-8 JSON; a lone surrogate becomes the JSON escape of the same spelling."""
    if indent is not None:
        text = indented_json(value, "\n", " " * indent)
    else:
        try:
            text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        except ValueError:  # 1e999 in somebody's document is read as infinity
            text = json.dumps(pack_floats(value), separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace")


def decode_json(data: bytes, where: str) -> Any:
    """Parse untrusted JSON; raises ReadError naming `where`."""
    if not _json_decoders:
        _json_decoders.append(json.JSONDecoder(parse_constant=_refuse_constant))
    try:
        return _json_decoders[0].decode(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ReadError("%s is not valid JSON: %s" % (where, short_reason(error))) from error


_json_decoders: List[Any] = []  # one that is made when it is first needed


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError("%s is not JSON" % name)


def shown_json(value: Any, margin: str = "\n") -> str:
    """JSON for people and programs, with an indent of two: nothing in it can steer a terminal.

    margin: a line break and the indentation of the line on which it stands.
    """
    text = indented_json(value, margin, "  ")
    if text.isascii() and "\x7f" not in text:
        return text

    def escape(match: re.Match) -> str:
        return json.dumps(match.group())[1:-1] if match.group() != "\n" else "\n"

    return re.sub("[%s]" % _CONTROL, escape, text)


def indented_json(value: Any, margin: str, indent: str) -> str:
    """What json.dumps gives with that indent, several times as fast, with NaN and the infinities packed; margin as in
    shown_json()."""
    texts, kind = _scalar_texts, type(value)
    if not texts:
        texts.update({str: json.encoder.encode_basestring, int: repr, type(None): lambda _: "null",
                      bool: lambda truth: "true" if truth else "false",
                      float: lambda number: repr(number) if number - number == 0 else '"%s"' % pack_floats(number)})
    if kind in texts:
        return texts[kind](value)
    if not value or kind not in (dict, list):
        return json.dumps(value)
    inner = margin + indent
    content = [texts[type(item)](item) if type(item) in texts else indented_json(item, inner, indent)
               for item in (value if kind is list else value.values())]
    if kind is dict:
        quote = texts[str]
        content = ["%s: %s" % (quote(key), text) for key, text in zip(value, content)]
    return ("[%s%s%s]" if kind is list else "{%s%s%s}") % (inner, ("," + inner).join(content), margin)


_scalar_texts: Dict[type, Callable[[Any], str]] = {}  # by the kind of value; filled when first needed


def short_reason(error: BaseException) -> str:
    """The reason of an exception as part of a sentence."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    return (text[:200] + "..." if len(text) > 200 else text) or type(error).__name__


def new_id() -> str:
    """64 hex digits from the system's random source."""
    return os.urandom(32).hex()


def is_id(text: Any) -> bool:
    """Whether text may be part of a path or key: hex digits and nothing else."""
    return isinstance(text, str) and 0 < len(text) <= 128 and is_hex(text)


def is_hex(text: str) -> bool:
    """Whether text has no other characters than lower-case hex digits."""
    return text.isascii() and not text.encode().translate(None, b"0123456789abcdef")


def timestamp(seconds: Optional[float] = None) -> str:
    """An RFC 3339 UTC time with microseconds; now by default."""
    seconds = time.time() if seconds is None else seconds
    whole = int(seconds)
    return "%04d-%02d-%02dT%02d:%02d:%02d" % time.gmtime(whole)[:6] + ".%06dZ" % ((seconds - whole) * 1e6)


def parse_time(text: str) -> datetime.datetime:
    """An RFC 3339 time as an aware UTC datetime, cut to microseconds. Raises ValueError."""
    if len(text) == 27 and text.isascii() and text[4] == text[7] == "-" and text[10] == "T" and text[19] == "." and text[26] == "Z":
        return datetime.datetime.fromisoformat(text[:26] + "+00:00")  # ten times as fast
    match = re.fullmatch(TIMESTAMP, text, re.ASCII)
    if match is None:
        raise ValueError("not an RFC 3339 time: %r" % text)
    day, clock, fraction, zone = match.groups()
    value = datetime.datetime(int(day[:4]), int(day[5:7]), int(day[8:]), int(clock[:2]), int(clock[3:5]),
                              int(clock[6:]), int((fraction or "0").ljust(6, "0")[:6]), datetime.timezone.utc)
    if zone in "Zz":
        return value
    minutes = int(zone[1:3]) * 60 + int(zone[4:])
    try:
        return value - datetime.timedelta(minutes=minutes if zone[0] == "+" else -minutes)
    except OverflowError as error:
        raise ValueError("a time outside the years 1 to 9999: %r" % text) from error


def local_time(moment: datetime.datetime) -> datetime.datetime:
    """moment in the local time zone, or in UTC at the far ends of the calendar."""
    try:
        return moment.astimezone()
    except (OverflowError, ValueError, OSError):
        return moment


def canonical_time(text: str) -> str:
    """A valid time as text that sorts by time: UTC, always 9 fractional digits."""
    if text[-1] != "Z" or text[10] != "T":
        match = re.fullmatch(TIMESTAMP, text, re.ASCII)
        fraction = match.group(3) if match and match.group(3) else ""
        moment = parse_time(text)
        text = "%04d-%02d-%02dT%02d:%02d:%02d.%sZ" % (moment.timetuple()[:6] + (fraction,))
    return text[:19] + "." + text[20:-1].ljust(9, "0")


def sortable_times(times: List[str]) -> List[str]:
    """Valid times as texts that sort by time, among themselves: as they are, if they are written alike."""
    joined = "".join(times)
    if len(set(map(len, times))) == 1 and joined.count("T") == joined.count("Z") == len(times):
        return times
    return [canonical_time(text) for text in times]


RELATIVE_UNITS = ((1, "about a second", "%d seconds"), (60, "about a minute", "%d minutes"),
                  (3600, "about an hour", "%d hours"), (86400, "one day", "%d days"))
RELATIVE_HOURS = 73  # from which on the date is told


def relative_time(moment: datetime.datetime, now: datetime.datetime) -> str:
    """'2 minutes ago'; the local date past 73 hours."""
    seconds = (now - moment).total_seconds()
    distance = abs(seconds)
    if distance >= RELATIVE_HOURS * 3600:
        return "%04d-%02d-%02d" % local_time(moment).timetuple()[:3]
    text = RELATIVE_UNITS[0][1]
    for index, (unit, one, many) in enumerate(RELATIVE_UNITS):
        count = int(distance / unit + 0.5)
        following = RELATIVE_UNITS[index + 1][0] if index + 1 < len(RELATIVE_UNITS) else None
        if following is None or (distance < following and count < following // unit):
            text = text if not count else one if count == 1 else many % count
            break
    return text + " ago" if seconds > -0.5 else "in " + text


DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def full_time(moment: datetime.datetime) -> str:
    """'Mon, 02 Jan 2006 22:54:05 +08' in the local time zone, in English whatever the locale."""
    local = local_time(moment)
    return "%s, %02d %s %04d %s %s" % (DAYS[local.weekday()], local.day, MONTHS[local.month - 1], local.year,
                                       local.strftime("%H:%M:%S"), local.tzname())


def format_cell(value: Any) -> str:
    """A param or metric as a table cell: at most 20 characters of a string, 5 significant digits of a float."""
    kind = type(value)
    if kind is float:
        if value != value:
            return "NaN"
        if value - value != 0:
            return "+Inf" if value > 0 else "-Inf"
        return "%.20g" % value if 1e5 < value < 1e20 else "%.5g" % value
    if kind is int:
        return str(value)
    if kind is str:
        return escape_control(value if len(value) <= 20 else value[:17] + "...")
    return format_value(value)


def format_value(value: Any) -> str:
    """A param or metric in full: strings as they are, everything else as JSON (floats: NaN, +Inf, -Inf, 2 for 2.0)."""
    if isinstance(value, str):
        return escape_control(value)
    if isinstance(value, float) and (value - value != 0 or (value.is_integer() and abs(value) < 1e15)):
        return format_cell(value) if value - value != 0 else "%d" % value
    return escape_control(json.dumps(pack_floats(value), ensure_ascii=False, separators=(",", ":")))


def format_size(count: float) -> str:
    """A number of bytes for people: '1.5 GB' (powers of 1000)."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return ("%d %s" if unit == "bytes" else "%.1f %s") % (count, unit)
        count /= 1000
    return "%.1f TB" % count


def plural(count: int, noun: str) -> str:
    """'1 file', '2 files'."""
    return "%d %s%s" % (count, noun, "" if count == 1 else "s")


def nearest(name: str, names: Iterable[str]) -> str:
    """' Did you mean X?' for the closest of names, or nothing."""
    close = difflib.get_close_matches(name, list(names), 1)
    return " Did you mean %r?" % close[0] if close else ""


KIND_RANK = {bool: 1, int: 0, float: 0, str: 2, list: 3, dict: 4}


def same_value(left: Any, right: Any) -> bool:
    """Equality by kind: 1 = 1.0, true is no 1, NaN is NaN."""
    kind = type(left)
    if KIND_RANK.get(kind) != KIND_RANK.get(type(right)):
        return False
    if kind is list:
        return len(left) == len(right) and all(map(same_value, left, right))
    if kind is dict:
        return left.keys() == right.keys() and all(same_value(item, right[key]) for key, item in left.items())
    return left == right or (left != left and right != right)


def sort_key(value: Any) -> Tuple[int, Any]:
    """A key under which values of any kinds sort: numbers, booleans, strings, then the rest as JSON."""
    rank = KIND_RANK.get(type(value), 5)
    return (rank, value if rank < 3 else json.dumps(pack_floats(value), sort_keys=True))


# ------------------------------------------------------------------------------------------------------------------
# 3  Model: Experiment, Checkpoint, their lists
# ------------------------------------------------------------------------------------------------------------------

def _stored(key: str, doc: str) -> property:
    """A property that reads one key of the stored document; the peer's "" is None."""
    return property(lambda self: self._document.get(key) or None, doc=doc)


class Checkpoint:
    """A version of an experiment's outputs at one step: files and metrics."""

    __slots__ = ("_document", "_experiment")

    id = _stored("id", "64 hex digits.")
    path = _stored("path", "What was saved, relative to the project directory; None: no files.")

    def __init__(self, document: Dict[str, Any], experiment: Optional[Experiment] = None) -> None:
        self._document = document
        self._experiment = experiment

    def __repr__(self) -> str:
        return "<Checkpoint %s step=%d>" % (self.short_id(), self.step)

    @property
    def step(self) -> int:
        """How far training had come; in the script's own unit."""
        return self._document.get("step") or 0

    @property
    def created(self) -> datetime.datetime:
        """When it was made (UTC)."""
        return parse_time(self._document["created"])

    @property
    def metrics(self) -> Dict[str, Any]:
        """Metric values by name."""
        return unpack_floats(self._document.get("metrics") or {})

    @property
    def primary_metric(self) -> Optional[Dict[str, str]]:
        """{"name": ..., "goal": "maximize" or "minimize"}, or None."""
        return self._document.get("primary_metric")

    def short_id(self) -> str:
        """The first 7 digits of the ID, as the command line shows it."""
        return self.id[:SHORT_ID]

    def checkout(self, output_directory: str, quiet: bool = False) -> None:
        """Copy the files of the experiment, then those of this checkpoint over them, into output_directory.

        Existing files are replaced. Raises DoesNotExist where the files are gone, WriteError, ReadError.
        """
        self._attached().project.checkout(self._experiment, self, output_directory, quiet=quiet)

    def open(self, path: str) -> BinaryIO:
        """The saved file at path (relative to the project directory), opened for reading in binary.

        Looks in the checkpoint, then in its experiment. Raises DoesNotExist, ReadError.
        """
        return self._attached().project.open(self._experiment, self, path)

    def _attached(self) -> Experiment:
        if self._experiment is None:
            raise DoesNotExist("Checkpoint %s belongs to no repository." % self.short_id())
        return self._experiment

    def to_json(self) -> Dict[str, Any]:
        """The checkpoint as stored."""
        return self._document

    def _repr_html_(self) -> str:
        rows = [("ID", self.short_id()), ("Created", full_time(self.created)), ("Path", self.path or ""),
                ("Step", self.step)]
        return html_table(("Checkpoint", ""), rows + sorted(self.metrics.items()))


class CheckpointList(List[Checkpoint] if TYPE_CHECKING else list):
    """Checkpoints, oldest first; slices stay such lists. `.metrics["loss"]` and `.step` are columns of it."""

    @property
    def step(self) -> List[int]:
        """The step of each checkpoint."""
        return [checkpoint.step for checkpoint in self]

    @property
    def metrics(self) -> CheckpointMetrics:
        """`.metrics["loss"]`: the value of that metric in each checkpoint, None where it has none."""
        return CheckpointMetrics(self)

    def primary_metric(self) -> Optional[Dict[str, str]]:
        """The primary metric of the first checkpoint that has one."""
        return primary_of([checkpoint._document for checkpoint in self])

    def latest(self) -> Optional[Checkpoint]:
        """The newest checkpoint by creation time."""
        index = latest_index([checkpoint._document for checkpoint in self])
        return None if index is None else self[index]

    def best(self) -> Optional[Checkpoint]:
        """The checkpoint with the best value of the primary metric; of equals the latest."""
        index = best_index([checkpoint._document for checkpoint in self])
        return None if index is None else self[index]

    def plot(self, metric: Optional[str] = None, logy: bool = False) -> Any:
        """Draw a metric (by default the primary one) over steps with matplotlib; returns the axes."""
        experiment = self[0]._experiment if self else None
        return plot_metric([(experiment.short_id() if experiment else "", self)], metric, logy)

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
    """The primary metric of the first of these stored checkpoints that has one."""
    return next((item["primary_metric"] for item in items if item.get("primary_metric")), None)


def latest_index(items: Sequence[Dict[str, Any]]) -> Optional[int]:
    """The position of the newest of these stored checkpoints; of equals the last."""
    times = sortable_times([item["created"] for item in items])
    return len(times) - 1 - times[::-1].index(max(times)) if times else None


def best_index(items: Sequence[Dict[str, Any]]) -> Optional[int]:
    """The position of the best of these stored checkpoints, among those with a usable value; of equals the latest."""
    primary = primary_of(items)
    if primary is None:
        return None
    name = primary["name"]
    try:
        values = usable = [item["metrics"][name] for item in items]
    except (KeyError, TypeError):  # some have no such metric
        values = usable = [(item.get("metrics") or {}).get(name) for item in items]
    if not set(map(type, values)) <= {int, float}:
        values = [value if type(value) in (int, float) and value == value else None for value in map(unpack_floats, values)]
        usable = [value for value in values if value is not None]
    if not usable:
        return None
    best = max(usable) if primary["goal"] == "maximize" else min(usable)
    if values.count(best) == 1:
        return values.index(best)
    chosen = [index for index, value in enumerate(values) if value == best]
    return chosen[latest_index([items[index] for index in chosen]) or 0]


class CheckpointMetrics:
    """The columns of a CheckpointList by metric name."""

    def __init__(self, checkpoints: CheckpointList) -> None:
        self._checkpoints = checkpoints

    def __getitem__(self, name: str) -> List[Any]:
        return [checkpoint.metrics.get(name) for checkpoint in self._checkpoints]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({name for checkpoint in self._checkpoints for name in checkpoint.metrics}))


class Experiment:
    """One run of a training script: its inputs (code, params, command, ...) and its checkpoints.

    Made by init(), experiments.create(), experiments.get() and experiments.list(). `project` is where it is kept.
    """

    __slots__ = ("_document", "project", "checkpoints", "__weakref__")

    id = _stored("id", "64 hex digits.")
    host = _stored("host", "The machine's name or address, or None.")
    user = _stored("user", "Who ran it, or None.")
    config = _stored("config", "{'repository': URL, 'storage': ''}, or None.")
    command = _stored("command", "The program's arguments, shell-quoted, without secrets.")
    path = _stored("path", "What init() saved, relative to the project directory; None: no files.")
    python_version = _stored("python_version", "For instance '3.11.7'.")

    def __init__(self, document: Dict[str, Any], project: Any = None) -> None:
        self.project = project
        self._document = document
        self.checkpoints = CheckpointList(Checkpoint(item, self) for item in document.get("checkpoints") or ())

    def __repr__(self) -> str:
        return "<Experiment %s %s>" % (self.short_id(), plural(len(self.checkpoints), "checkpoint"))

    def __enter__(self) -> Experiment:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.stop()

    @property
    def created(self) -> datetime.datetime:
        """When it started (UTC)."""
        return parse_time(self._document["created"])

    @property
    def full_command(self) -> Optional[str]:
        """The command to run it again in the project directory: `python train.py`; the plain command if not known."""
        command = self._document.get("full_command")
        return command if command and isinstance(command, str) else self.command

    @property
    def params(self) -> Dict[str, Any]:
        """Hyperparameters by name."""
        return unpack_floats(self._document.get("params") or {})

    @property
    def python_packages(self) -> Dict[str, str]:
        """Installed version by package name."""
        return self._document.get("python_packages") or {}

    @property
    def replicate_version(self) -> Optional[str]:
        """The version that recorded it (keepsake's, if that did)."""
        return self._document.get("replicate_version") or self._document.get("keepsake_version")

    @property
    def duration(self) -> Optional[datetime.timedelta]:
        """From the start to the latest checkpoint; None without checkpoints."""
        latest = self.latest()
        return latest.created - self.created if latest else None

    def short_id(self) -> str:
        """The first 7 digits of the ID, as the command line shows it."""
        return self.id[:SHORT_ID]

    def latest(self) -> Optional[Checkpoint]:
        """The newest checkpoint, or None."""
        return self.checkpoints.latest()

    def best(self) -> Optional[Checkpoint]:
        """The best checkpoint by the primary metric, or None."""
        return self.checkpoints.best()

    def primary_metric(self) -> Optional[Dict[str, str]]:
        """{"name": ..., "goal": ...} of the first checkpoint that has one, or None."""
        return self.checkpoints.primary_metric()

    def is_running(self) -> bool:
        """Whether its last heartbeat is less than 30 seconds old."""
        return self.project.is_running(self)

    def checkpoint(self, path: Optional[str] = None, step: Optional[int] = None,
                   metrics: Optional[Dict[str, Any]] = None,
                   primary_metric: Optional[Tuple[str, str]] = None, quiet: bool = False,
                   **unknown: Any) -> Checkpoint:
        """Record a checkpoint: a snapshot of the file or directory at path, and metrics.

        path is relative to the project directory; step counts on from the last one (first 0) if left out;
        primary_metric is (name, "maximize" or "minimize"). Never raises: what is wrong is printed, what is right is
        recorded. When it has returned, the checkpoint survives the death of the process.
        """
        for name in unknown:
            known = ("path", "step", "metrics", "primary_metric", "quiet")
            console.error("checkpoint() has no argument %r.%s" % (
                name, nearest(name, known) or " A metric goes into metrics={%r: ...}." % name))
        return self.project.record(self, path, step, metrics, primary_metric, quiet)

    def stop(self) -> None:
        """Finish what is pending and mark the experiment as stopped."""
        self.project.stop(self)

    def refresh(self) -> None:
        """Read the experiment again from the repository. Raises DoesNotExist if it was removed."""
        self.project.refresh(self)

    def delete(self) -> None:
        """Remove the experiment, its checkpoints and all their files from the repository."""
        self.project.delete(self)

    def checkout(self, output_directory: str, quiet: bool = False) -> None:
        """Copy the experiment's files into output_directory, and over them those of its best or latest checkpoint."""
        self.project.checkout(self, self.best() or self.latest(), output_directory, quiet=quiet)

    def plot(self, metric: Optional[str] = None, logy: bool = False) -> Any:
        """Draw a metric (by default the primary one) over steps with matplotlib; returns the axes."""
        return plot_metric([(self.short_id(), self.checkpoints)], metric, logy)

    def to_json(self) -> Dict[str, Any]:
        """The document as stored."""
        return dict(self._document, checkpoints=[checkpoint._document for checkpoint in self.checkpoints])

    def _replace(self, document: Dict[str, Any]) -> None:
        """Take over a newer document in place."""
        self.__init__(document, self.project)  # type: ignore[misc]

    def _repr_html_(self) -> str:
        rows = [("ID", self.id), ("Created", full_time(self.created)), ("Host", self.host or ""),
                ("User", self.user or ""), ("Command", self.full_command or "")]
        return (html_table(("Experiment", ""), rows) + html_table(("Param", "Value"), sorted(self.params.items())) +
                self.checkpoints._repr_html_())


class ExperimentList(List[Experiment] if TYPE_CHECKING else list):
    """Experiments, oldest first; slices stay such lists."""

    def plot(self, metric: Optional[str] = None, logy: bool = False) -> Any:
        """Draw a metric of every experiment over steps with matplotlib; returns the axes."""
        return plot_metric([(experiment.short_id(), experiment.checkpoints) for experiment in self], metric, logy)

    def scatter(self, param: str, metric: Optional[str] = None, logx: bool = False, logy: bool = False) -> Any:
        """Draw the best (or latest) value of a metric over a param with matplotlib; returns the axes."""
        return plot_scatter(self, param, metric, logx, logy)

    def delete(self) -> None:
        """Remove all of them from the repository."""
        for experiment in self:
            experiment.delete()

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return ExperimentList(found) if isinstance(index, slice) else found

    def _repr_html_(self) -> str:
        params = sorted({name for experiment in self for name in experiment.params})
        rows = []
        for experiment in self:
            best, latest, values = experiment.best(), experiment.latest(), experiment.params
            rows.append([experiment.short_id(), full_time(experiment.created),
                         repr(best) if best else "", repr(latest) if latest else ""] +
                        [values.get(name, "") for name in params])
        return html_table(["Experiment", "Started", "Best", "Latest"] + params, rows)


def html_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """An HTML table; every cell is escaped."""
    from html import escape

    def row(cells: Sequence[Any], tag: str) -> str:
        texts = (cell if isinstance(cell, str) else format_value(cell) for cell in cells)
        return "<tr>%s</tr>" % "".join("<%s>%s</%s>" % (tag, escape(escape_control(text)), tag) for text in texts)

    return "<table>%s%s</table>" % (row(header, "th"), "".join(row(cells, "td") for cells in rows))


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ReplicateError("Plots need matplotlib: install it with 'pip install matplotlib'. "
                             "Everything else works without it.") from error
    return pyplot


def _primary_name(lists: Iterable[CheckpointList], metric: Optional[str]) -> str:
    """metric, or the primary metric of the first list that has one."""
    for checkpoints in () if metric else lists:
        primary = checkpoints.primary_metric()
        if primary:
            return primary["name"]
    if not metric:
        raise ReplicateError("There is no primary metric to plot: pass the name of a metric.")
    return metric


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def plot_metric(curves: Sequence[Tuple[str, CheckpointList]], metric: Optional[str], logy: bool) -> Any:
    """One line a curve: the metric over steps, with gaps where a checkpoint does not have it."""
    name = _primary_name([checkpoints for _, checkpoints in curves], metric)
    axes = _pyplot().subplots()[1]
    for label, checkpoints in curves:
        values = [value if _is_number(value) else float("nan") for value in checkpoints.metrics[name]]
        axes.plot(checkpoints.step, values, label=label, marker="." if len(values) < 50 else None)
    axes.set_xlabel("step")
    axes.set_ylabel(name)
    if logy:
        axes.set_yscale("log")
    if len(curves) > 1:
        axes.legend()
    return axes


def plot_scatter(experiments: ExperimentList, param: str, metric: Optional[str], logx: bool, logy: bool) -> Any:
    """One point an experiment that has both the param and the metric."""
    name = _primary_name([experiment.checkpoints for experiment in experiments], metric)
    points = []
    for experiment in experiments:
        checkpoint = experiment.best() or experiment.latest()
        value = checkpoint.metrics.get(name) if checkpoint else None
        if param in experiment.params and _is_number(value):
            points.append((experiment.params[param], value, experiment.short_id()))
    axes = _pyplot().subplots()[1]
    if not all(_is_number(x) for x, _, _ in points):
        points = [(format_value(x), y, label) for x, y, label in points]
    axes.scatter([x for x, _, _ in points], [y for _, y, _ in points])
    for x, y, label in points:
        axes.annotate(label, (x, y))
    axes.set_xlabel(param)
    axes.set_ylabel(name)
    if logx:
        axes.set_xscale("log")
    if logy:
        axes.set_yscale("log")
    return axes


class Summary:
    """What a listing shows of an experiment: its document with the best and the latest checkpoint alone."""

    __slots__ = ("batch", "position", "line", "id", "version", "running")

    def __init__(self, batch: SummaryBatch, position: int, line: str) -> None:
        self.batch = batch        # where its parts are, each at this position
        self.position = position
        self.line = line          # "<time of creation> <ID> <version>", which sorts by time
        _, self.id, self.version = line.split(" ", 2)  # the version of the document; empty: not to be remembered
        self.running = False

    def part(self, name: str) -> str:
        """One of SummaryBatch.PARTS."""
        return self.batch.part(name)[self.position]

    def may_have_checkpoint(self, prefix: str) -> bool:
        """Whether a checkpoint's ID may start with prefix, as far as the first digits tell."""
        return (" " + prefix[:SUMMARY_DIGITS]) in " " + self.part("checkpoints")

    @property
    def created(self) -> datetime.datetime:
        return parse_time(self.line[:26] + "Z")

    def fact(self, name: str) -> Any:
        """One of SummaryBatch.FACTS."""
        return self.batch.fact(name)[self.position]


class SummaryBatch:
    """Summaries that are kept together, each of their parts as a list of texts: a listing touches only what it shows.

    lines: see Summary; checkpoints: the first digits of their IDs; values: see encode_columns(); shown: JSON for
    `ls --json`, without its end, empty where nobody has asked for it. The columns are what filters, sorting and tables use:
    {group: {name: column}}, a column being a list of the rows' values, or {position: value} where not all of them have one.
    """

    PARTS = ("lines", "checkpoints", "values", "shown")
    GROUPS = ("facts", "params", "latest", "best")  # the last two: the metrics of those checkpoints
    FACTS = ("host", "user", "command", "num_checkpoints", "primary_metric",  # the name of that
             "latest_id", "latest_step", "latest_created", "best_id", "best_step")  # short IDs; None without checkpoint

    def __init__(self, parts: Dict[str, List[str]], columns: Dict[str, Dict[str, Any]]) -> None:
        self._parts = parts
        self._columns = columns
        self._facts: Dict[str, List[Any]] = {}
        self._named: Dict[str, List[Any]] = {}

    @classmethod
    def of(cls, found: Iterable[Tuple[Dict[str, Any], str]], shown: bool) -> SummaryBatch:
        """From summary_data() and the version of each document; shown: with the part of that name."""
        parts: Dict[str, List[str]] = {name: [] for name in ("lines", "checkpoints", "shown")}
        facts, params, of_latest, of_best = [], [], [], []
        for data, version in found:
            latest, best = data["latest_checkpoint"], data["best_checkpoint"]
            parts["lines"].append("%s %s %s" % (canonical_time(data["created"]), data["id"], version))
            parts["checkpoints"].append(data["checkpoint_ids"])
            parts["shown"].append(shown_json({key: data[key] for key in SHOWN_KEYS}, "\n  ")[:-len("\n  }")] if shown
                                  else "")
            facts.append((data["host"], data["user"], data["command"], data["num_checkpoints"], data["primary_metric"],
                          *_checkpoint_facts(latest), *_checkpoint_facts(best)[:2]))
            params.append(data["params"] or {})
            of_latest.append(latest and latest.get("metrics") or {})
            of_best.append(best and best.get("metrics") or {})
        return cls(parts, {"facts": dict(zip(cls.FACTS, map(list, zip(*facts)))), "params": columns_of(params),
                           "latest": columns_of(of_latest), "best": columns_of(of_best)})

    @classmethod
    def of_rows(cls, rows: Sequence[Summary]) -> SummaryBatch:
        """Of rows from other batches."""
        members = by_batch(rows)
        rows = [row for some in members.values() for row in some]
        parts = {name: [row.part(name) for row in rows] for name in ("lines", "checkpoints", "shown")}
        return cls(parts, {group: {name: _sparse(values) for name, values in value_columns(members, group).items()}
                           for group in cls.GROUPS})

    def encode_values(self) -> None:
        """Make the part `values`, which takes most of the time that encoded() needs."""
        if "values" not in self._parts:
            self._parts["values"] = encode_columns(self._columns)

    def encoded(self) -> bytes:
        """As in a file, see encode_parts()."""
        self.encode_values()
        return encode_parts([self.part(name) for name in self.PARTS])

    def part(self, name: str) -> List[str]:
        """The texts of one part; all but `values` have one for each row."""
        return self._parts[name]

    def names(self, group: str) -> Iterable[str]:
        """The names of the columns of a group."""
        return self._columns[group]

    def column(self, group: str, name: str, positions: Optional[Sequence[int]] = None) -> List[Any]:
        """The values of that name in a group at these positions, or all, ABSENT where a row has none."""
        found = self._columns[group].get(name, {})
        if type(found) is list:
            return found if positions is None else list(map(found.__getitem__, positions))
        return [found.get(position, ABSENT) for position in (self.all_positions() if positions is None else positions)]

    def all_positions(self) -> Sequence[int]:
        """The positions of all rows."""
        return range(len(self.part("lines")))

    def fact(self, name: str) -> List[Any]:
        """The column of one of the FACTS."""
        if name not in self._facts:
            self._facts[name] = self.column("facts", name)
        return self._facts[name]

    def named(self, name: str) -> List[Any]:
        """The values that a name means which is no field: those of a metric of the best checkpoint (of the latest where
        there is no best), else those of a param; `metrics.` and `params.` before it say which."""
        if name not in self._named:
            if name.startswith("params."):
                found = self.column("params", name[len("params."):])
            elif name.startswith("metrics."):
                metric = name[len("metrics."):]
                found = [of_best if best else of_latest for best, of_best, of_latest in zip(
                    self.fact("best_id"), self.column("best", metric), self.column("latest", metric))]
            else:
                found = [param if metric is ABSENT else metric
                         for metric, param in zip(self.named("metrics." + name), self.column("params", name))]
            self._named[name] = found
        return self._named[name]

    def rows(self) -> List[Summary]:
        """A new summary for each row."""
        return [Summary(self, position, line) for position, line in enumerate(self.part("lines"))]


def encode_columns(columns: Dict[str, Dict[str, Any]]) -> List[str]:
    """The part `values` of columns, see SummaryBatch: as JSON for each group and name null, or the positions of a column
    that not all rows have; then the values of each column, as JSON with a line feed between them. Floats are faster than in
    JSON as "d" and the hex digits of doubles, the lowest byte first."""
    texts = [json.dumps({group: {name: list(column) if type(column) is dict else None for name, column in found.items()}
                         for group, found in columns.items()}, ensure_ascii=False)]
    for found in columns.values():
        for column in found.values():
            values = list(column.values()) if type(column) is dict else column
            if set(map(type, values)) == {float}:
                texts.append("d" + struct.pack("<%dd" % len(values), *values).hex())
                continue
            text = json.dumps(values, ensure_ascii=False, separators=("\n", ":"))[1:-1]
            if text.count("\n") != len(values) - 1:  # some are containers of several values
                text = "\n".join([json.dumps(value, ensure_ascii=False) for value in values])
            texts.append(text)
    return texts


def encode_parts(parts: Sequence[Sequence[str]]) -> bytes:
    """Lists of texts as bytes: `[[<bytes of each list>], <CRC-32 of all>]`, a line feed, the lists, joined by NUL."""
    encoded = ["\0".join(part).encode("utf-8", "surrogatepass") for part in parts]
    return _with_lengths(list(map(len, encoded)), b"".join(encoded))


def _with_lengths(lengths: Sequence[int], content: bytes) -> bytes:
    return b"%s\n%s" % (encode_json([lengths, zlib.crc32(content)], indent=None), content)


def columns_of(rows: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
    """The columns of a group, see SummaryBatch, from the dict of each row."""
    if len(set(map(tuple, rows))) == 1:  # the same keys in the same order
        return {name: _unpacked(column) for name, column in zip(rows[0], zip(*[row.values() for row in rows]))}
    return {name: _sparse(_unpacked([row.get(name, ABSENT) for row in rows]))
            for name in {name: 1 for row in rows for name in row}}


def _unpacked(values: Sequence[Any]) -> List[Any]:
    """unpack_floats() of each value."""
    if set(map(type, values)) <= {int, float, str} and NON_FINITE.keys().isdisjoint(values):
        return list(values)
    return list(map(unpack_floats, values))


def _sparse(values: List[Any]) -> Any:
    """A column as it is stored, from one with ABSENT."""
    if values.count(ABSENT):
        return {position: value for position, value in enumerate(values) if value is not ABSENT}
    return values


def by_batch(rows: Iterable[Summary]) -> Dict[SummaryBatch, List[Summary]]:
    """rows by the batch to which they belong."""
    members: Dict[SummaryBatch, List[Summary]] = {}
    for row in rows:
        members.setdefault(row.batch, []).append(row)
    return members


def value_columns(members: Dict[SummaryBatch, List[Summary]], group: str,
                  only: Optional[Container[str]] = None) -> Dict[str, List[Any]]:
    """The values of a group by name, each a list for all these rows in that order, with ABSENT where a row has none.

    only: the names that are wanted; all by default.
    """
    found: Dict[str, List[Any]] = {name: [] for batch in members for name in batch.names(group)
                                   if only is None or name in only}
    for batch, rows in members.items():
        positions: Optional[List[int]] = [row.position for row in rows]
        if positions == list(batch.all_positions()):
            positions = None
        for name, values in found.items():
            values += batch.column(group, name, positions)
    return {name: values for name, values in found.items() if values.count(ABSENT) < len(values)}


class CellTable:
    """What `ls` prints from the column HOST on, which does not depend on the present time."""

    def __init__(self, header: str, basis: str, cells: List[str]) -> None:
        self.header = header
        self.basis = basis  # all else that decides how the rows look, and that they have in common
        self.cells = cells  # lines for each row

    def joined(self, other: CellTable) -> Optional[CellTable]:
        """The table of the rows of both, if it looks like its halves."""
        if (self.header, self.basis) != (other.header, other.basis):
            return None
        return CellTable(self.header, self.basis, self.cells + other.cells)


SUMMARY_DIGITS = 12  # of each checkpoint's ID that a summary keeps
SHOWN_KEYS = ("id", "created", "params", "command", "num_checkpoints", "latest_checkpoint", "best_checkpoint", "user",
              "host")  # of an element of `ls --json`, which ends with `running`


def _checkpoint_facts(item: Optional[Dict[str, Any]]) -> Tuple[Optional[str], Optional[int], Optional[str]]:
    """(short ID, step, time of creation) of a stored checkpoint."""
    return (item["id"][:SHORT_ID], item.get("step") or 0, item["created"]) if item else (None, None, None)


def summary_data(document: Dict[str, Any]) -> Dict[str, Any]:
    """A valid document with no other checkpoints than the best and the latest."""
    items = document.get("checkpoints") or ()
    latest, best, primary = latest_index(items), best_index(items), primary_of(items)
    data = {key: document.get(key) for key in SHOWN_KEYS}
    data["num_checkpoints"] = len(items)
    data["latest_checkpoint"] = None if latest is None else items[latest]
    data["best_checkpoint"] = None if best is None else items[best]
    data["primary_metric"] = primary["name"] if primary else None
    data["checkpoint_ids"] = " ".join([item["id"][:SUMMARY_DIGITS] for item in items])
    return data


def checked_summary(data: Any, experiment_id: str) -> Dict[str, Any]:
    """data if it is what summary_data() gives for an experiment of that ID; raises ReadError otherwise."""
    _check_fields(data, _SUMMARY_FIELDS)
    if not data.keys() >= _SUMMARY_FIELDS.keys():
        raise ReadError("a field is missing")
    if data["id"] != experiment_id:
        raise ReadError("its id is another one")
    for checkpoint in (data["latest_checkpoint"], data["best_checkpoint"]):
        if checkpoint is not None:
            checked_checkpoint(checkpoint)
    return data


# Untrusted documents become a model only after these checks.

_TEXT_OR_NULL = (str, type(None))
_EXPERIMENT_FIELDS = {"params": (dict, type(None)), "host": _TEXT_OR_NULL, "user": _TEXT_OR_NULL,
                      "config": (dict, type(None)), "command": _TEXT_OR_NULL, "path": _TEXT_OR_NULL,
                      "python_version": _TEXT_OR_NULL, "python_packages": (dict, type(None)),
                      "replicate_version": _TEXT_OR_NULL, "keepsake_version": _TEXT_OR_NULL,
                      "checkpoints": (list, type(None))}
_CHECKPOINT_FIELDS = {"metrics": (dict, type(None)), "step": (int, type(None)), "path": _TEXT_OR_NULL,
                      "primary_metric": (dict, type(None))}
_SUMMARY_FIELDS = {"params": (dict, type(None)), "host": _TEXT_OR_NULL, "user": _TEXT_OR_NULL, "command": _TEXT_OR_NULL,
                   "num_checkpoints": (int,), "latest_checkpoint": (dict, type(None)),
                   "best_checkpoint": (dict, type(None)), "primary_metric": _TEXT_OR_NULL, "checkpoint_ids": (str,)}


def checked_experiment(document: Any, experiment_id: str) -> Dict[str, Any]:
    """document if it is a valid experiment document of that ID; raises ReadError otherwise."""
    _check_experiment_fields(document, experiment_id)
    _check_checkpoints(document.get("checkpoints") or ())
    return document


def decoded_experiments(texts: Dict[str, bytes]) -> Dict[str, Union[Dict[str, Any], ReadError]]:
    """The valid experiment document, or what is wrong with it, for each of these texts by ID."""
    found: Dict[str, Union[Dict[str, Any], ReadError]] = {}
    checkpoints: List[Any] = []
    for experiment_id, text in texts.items():
        try:
            document = found[experiment_id] = decode_json(text, "it")
            _check_experiment_fields(document, experiment_id)
            checkpoints += document.get("checkpoints") or ()
        except ReadError as error:
            found[experiment_id] = error
    if not _plainly_valid(checkpoints):  # one of them, if they are looked at together
        for experiment_id, document in found.items():
            try:
                if type(document) is dict:
                    _check_checkpoints(document.get("checkpoints") or ())
            except ReadError as error:
                found[experiment_id] = error
    return found


def _check_experiment_fields(document: Any, experiment_id: str) -> None:
    _check_fields(document, _EXPERIMENT_FIELDS)
    if document["id"] != experiment_id:
        raise ReadError("its id is not the name of its file")
    if not set(map(type, (document.get("python_packages") or {}).values())) <= {str}:
        raise ReadError("python_packages holds something that is not text")


def _check_checkpoints(checkpoints: Sequence[Any]) -> None:
    if not _plainly_valid(checkpoints):
        for item in checkpoints:
            checked_checkpoint(item)
        if len({item["id"] for item in checkpoints}) != len(checkpoints):
            raise ReadError("two of its checkpoints have the same ID")


_PLAIN_KEYS = ("id", "created", "metrics", "step", "path", "primary_metric")
_PLAIN_TIMES = (r"(?:(?!0000)\d{4}-(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1\d|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)|"
                r"(?:0[13578]|1[02])-31)T(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,9})?Z\n)*")


def _plainly_valid(items: Sequence[Any]) -> bool:
    """Whether these checkpoints are valid, with different IDs, and so ordinary that it can be seen column by column, which
    is quick."""
    from itertools import chain
    from operator import itemgetter
    try:
        if not items:
            return True
        if set(map(len, items)) != {len(_PLAIN_KEYS)}:
            return False
        ids, times, metrics, steps, paths, primaries = zip(*map(itemgetter(*_PLAIN_KEYS), items))
        goals = [primaries[0]] + [primary for primary in primaries if primary != primaries[0]]
        return (set(map(len, ids)) == {64} and is_hex("".join(ids)) and len(set(ids)) == len(ids)
                and re.fullmatch(_PLAIN_TIMES, "\n".join(times) + "\n", re.ASCII) is not None
                and set(map(type, chain.from_iterable(map(dict.values, metrics)))) <= {float, int}
                and set(map(type, steps)) == {int} and set(map(type, paths)) <= {str, type(None)}
                and all([goal is None or type(goal["name"]) is str and goal["goal"] in ("maximize", "minimize")
                         for goal in goals]))
    except (TypeError, KeyError, ValueError):
        return False


def checked_checkpoint(item: Any) -> Dict[str, Any]:
    """item if it is a valid checkpoint; raises ReadError otherwise."""
    _check_fields(item, _CHECKPOINT_FIELDS)
    primary = item.get("primary_metric")
    if primary is not None and not (type(primary.get("name")) is str
                                    and primary.get("goal") in ("maximize", "minimize")):
        raise ReadError("primary_metric is not {name, goal}")
    return item


def _check_fields(document: Any, fields: Dict[str, Tuple[type, ...]]) -> None:
    if type(document) is not dict:
        raise ReadError("it is not a JSON object")
    if not is_id(document.get("id")):
        raise ReadError("id is not made of hex digits")
    try:
        if type(document.get("created")) is not str:
            raise ValueError("not text")
        parse_time(document["created"])
    except ValueError as error:
        raise ReadError("created is not an RFC 3339 time") from error
    for key, value in document.items():
        kind = type(value)
        if key in fields and kind not in fields[key]:
            raise ReadError("%s is a %s" % (key, kind.__name__))
        if kind in _CONTAINERS and not (key == "checkpoints" and key in fields):
            if not _CONTAINERS.isdisjoint(map(type, value.values() if kind is dict else value)):
                _check_depth(value)


_CONTAINERS = {dict, list}


def _check_depth(value: Any) -> None:
    """Raises ReadError where containers are nested deeper than recursive code can follow."""
    level = [value]
    for _ in range(MAX_NESTING):
        level = [item for container in level
                 for item in (container.values() if type(container) is dict else container)
                 if type(item) in (dict, list)]
        if not level:
            return
    raise ReadError("it is nested too deeply")


# ------------------------------------------------------------------------------------------------------------------
# 4  Filters and sorting
# ------------------------------------------------------------------------------------------------------------------

FIELDS: Dict[str, Callable[[Summary], Any]] = {
    "started": lambda row: row.created,
    "created": lambda row: row.created,
    "step": lambda row: row.fact("latest_step") or 0,
    "user": lambda row: row.fact("user"),
    "host": lambda row: row.fact("host"),
    "command": lambda row: row.fact("command"),
    "status": lambda row: "running" if row.running else "stopped",
    "id": lambda row: row.id,
    "duration": lambda row: row.fact("latest_id") and (parse_time(row.fact("latest_created")) - row.created).total_seconds(),
    "checkpoints": lambda row: row.fact("num_checkpoints"),
}
TEXT_FIELDS = ("user", "host", "command", "status", "id")
TIME_FIELDS = ("started", "created")
ORDER = {"<": lambda a, b: a < b, "<=": lambda a, b: a <= b, ">": lambda a, b: a > b, ">=": lambda a, b: a >= b}


def look_up(rows: Sequence[Summary], name: str) -> List[Any]:
    """The value of a field, metric or param for each of these experiments; ABSENT where it has none of that name."""
    if name in FIELDS:
        return list(map(FIELDS[name], rows))
    columns = {batch: batch.named(name) for batch in {row.batch for row in rows}}
    return [columns[row.batch][row.position] for row in rows]


def known_names(rows: Iterable[Summary]) -> Set[str]:
    """Every name that a filter or sort key could mean in the batches of these experiments."""
    names = set(FIELDS)
    for batch in {row.batch for row in rows}:
        for prefix, group in (("params.", "params"), ("metrics.", "latest"), ("metrics.", "best")):
            found = batch.names(group)
            names.update(found)
            names.update(prefix + name for name in found)
    return names


class Comparison:
    """<name> <operator> <value>."""

    def __init__(self, name: str, operator: str, value: Any) -> None:
        self.name, self.operator, self.value = name, operator, value

    def names(self) -> List[str]:
        """The names that the expression asks for."""
        return [self.name]

    def matches(self, rows: Sequence[Summary]) -> List[bool]:
        """Whether each of these experiments satisfies the expression."""
        found = look_up(rows, self.name)
        if self.operator not in ORDER or self.name in TIME_FIELDS:
            return list(map(self._accepts, found))
        kind, order, value = KIND_RANK.get(type(self.value), 5), ORDER[self.operator], self.value
        if kind > 2:  # only numbers, truth values and texts have an order
            return [False] * len(rows)
        return [KIND_RANK.get(type(actual)) == kind and order(actual, value) for actual in found]

    def _accepts(self, actual: Any) -> bool:
        """Whether a value satisfies the expression, if it is not about the order of values."""
        if actual is ABSENT or actual is None:
            return self.operator in ("=", "==") and self.value is None
        if self.name in TIME_FIELDS:
            return self._matches_time(actual)
        if self.operator == "~":
            return isinstance(actual, str) and self.value.search(actual) is not None
        if self.operator == "in":
            return any(same_value(actual, item) for item in self.value)
        if self.operator in ("=", "=="):
            return same_value(actual, self.value)
        return not same_value(actual, self.value)

    def _matches_time(self, actual: datetime.datetime) -> bool:
        if self.value is None:
            return self.operator == "!="
        start, end = self.value
        inside = start <= actual < end
        return {"=": inside, "==": inside, "!=": not inside, "<": actual < start, "<=": actual < end,
                ">": actual >= end, ">=": actual >= start}[self.operator]


class Not:
    """not <expression>."""

    def __init__(self, operand: Any) -> None:
        self.operand = operand

    def names(self) -> List[str]:
        return self.operand.names()

    def matches(self, rows: Sequence[Summary]) -> List[bool]:
        return [not found for found in self.operand.matches(rows)]


class Junction:
    """Expressions joined by `and` (decide=all) or `or` (decide=any)."""

    def __init__(self, decide: Callable[[Iterable[bool]], bool], operands: List[Any]) -> None:
        self.decide, self.operands = decide, operands

    def names(self) -> List[str]:
        return [name for operand in self.operands for name in operand.names()]

    def matches(self, rows: Sequence[Summary]) -> List[bool]:
        return list(map(self.decide, zip(*[operand.matches(rows) for operand in self.operands])))


FILTER_HELP = """Filters have the format "<name> <operator> <value>", where <operator> is one of
  =  !=  <  <=  >  >=    equal, not equal, less, greater
  ~                      a regular expression is found in it
  in [a, b]              it is one of these
Several can be joined with and, or, not and parentheses."""


def parse_filter(text: str) -> Any:
    """The expression tree of a filter. Raises ReplicateError that names the position and shows the format."""
    return FilterParser(text).parse()


class FilterParser:
    """A recursive-descent parser; each method is one production of the grammar in its docstring."""

    MAX_DEPTH = 50
    HEAD = (r"""\s*(?:"([^"]*)"|'([^']*)'|([\w\-./:]+(?:[ \t]+(?!(?:and|or)\s)[\w\-./:]+)*?))"""
            r"""\s*(?:([=!<>~]+)|(?<=\s)(in)\s*(?=\[))""")
    OPERATORS = ("=", "==", "!=", "<", "<=", ">", ">=", "~", "in")

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.depth = 0

    def parse(self) -> Any:
        """filter := either END"""
        if not self.text.strip():
            self.fail("it is empty")
        tree = self.either()
        self.space()
        if self.position < len(self.text):
            self.fail("there is an unexpected %r" % self.text[self.position])
        return tree

    def either(self) -> Any:
        """either := both ("or" both)*"""
        return self.joined("or", any, self.both)

    def both(self) -> Any:
        """both := term ("and" term)*"""
        return self.joined("and", all, self.term)

    def joined(self, word: str, decide: Callable[[Iterable[bool]], bool], operand: Callable[[], Any]) -> Any:
        """operand (word operand)*"""
        operands = [operand()]
        while self.take_word(word):
            operands.append(operand())
        return operands[0] if len(operands) == 1 else Junction(decide, operands)

    def term(self) -> Any:
        """term := "not" term | "(" either ")" | comparison"""
        self.depth += 1
        if self.depth > self.MAX_DEPTH:
            self.fail("it is nested too deeply")
        self.space()
        if self.text.startswith("(", self.position):
            self.position += 1
            tree = self.either()
            self.space()
            if not self.text.startswith(")", self.position):
                self.fail("a closing parenthesis is missing")
            self.position += 1
        elif (self.text.startswith("not", self.position)
              and re.compile(r"not(?![\w\-./:])(?!\s*[=!<>~])").match(self.text, self.position) and self.take_word("not")):
            tree = Not(self.term())
        else:
            tree = self.comparison()
        self.depth -= 1
        return tree

    def comparison(self) -> Comparison:
        """comparison := name operator value"""
        head = re.compile(self.HEAD).match(self.text, self.position)
        if head is None:
            self.fail("a name and an operator are expected")
        name = next(part for part in head.groups()[:3] if part is not None)
        operator = head.group(4) or head.group(5)
        if not name:
            self.fail("the name is missing")
        if operator not in self.OPERATORS:
            self.position = head.start(4)
            self.fail("%r is no operator" % operator)
        self.position = head.end()
        text, quoted = self.value_text()
        try:
            return Comparison(name, operator, self.convert(name, operator, text, quoted))
        except ValueError as error:
            self.fail(str(error))

    def value_text(self) -> Tuple[str, bool]:
        """value := quoted | everything up to the end, a joining word before a whole term, or a closing parenthesis"""
        self.space()
        start = self.position
        if start < len(self.text) and self.text[start] in "\"'":
            end = self.text.find(self.text[start], start + 1)
            if end < 0:
                self.fail("the closing quote is missing")
            self.position = end + 1
            self.space()
            if not (self.position == len(self.text) or self.text[self.position] == ")" or self.at_joint()):
                self.fail("there is something after the closing quote")
            return self.text[start + 1:end], True
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
        return text, False

    def at_joint(self) -> bool:
        """Whether `and` or `or` stands here, followed by the start of a whole term with a value."""
        if not self.text[self.position:].lstrip().startswith(("and", "or")):
            return False
        match = re.compile(r"\s*(?:and|or)(?![\w\-./:])").match(self.text, self.position)
        if match is None:
            return False
        start = re.compile(r"(?:\s*(?:\(|not(?![\w\-./:])(?!\s*[=!<>~])))*").match(self.text, match.end()).end()
        head = re.compile(self.HEAD).match(self.text, start)
        return head is not None and bool(self.text[head.end():].strip())

    def convert(self, name: str, operator: str, text: str, quoted: bool) -> Any:
        """The value of a comparison: null, number, boolean, JSON, time or text. Raises ValueError."""
        if operator in ("~", "in") and name in TIME_FIELDS:
            raise ValueError("%s cannot be used with '%s'" % (name, operator))
        if operator == "~":
            try:
                return re.compile(text)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError("the regular expression is wrong: %s" % error) from error
        if operator == "in":
            items = read_list(text)
            return [str(item) for item in items] if name in TEXT_FIELDS else items
        if not quoted and text in ("null", "None"):
            return None
        if name in TIME_FIELDS:
            return read_date(text)
        return text if quoted or name in TEXT_FIELDS else read_value(text)

    def space(self) -> None:
        """Skip white space."""
        while self.position < len(self.text) and self.text[self.position].isspace():
            self.position += 1

    def take_word(self, word: str) -> bool:
        """Skip that word if it stands here."""
        if not self.text[self.position:].lstrip().startswith(word):  # most filters need no such expression made
            return False
        match = re.compile(r"\s*%s\b" % word).match(self.text, self.position)
        if match:
            self.position = match.end()
        return match is not None

    def fail(self, reason: str) -> NoReturn:
        """Raise the error for the current position."""
        raise ReplicateError("Filter %s cannot be read at character %d: %s.\n\n%s" % (
            json.dumps(self.text, ensure_ascii=False), self.position + 1, reason, FILTER_HELP))


def read_value(text: str) -> Any:
    """A value as typed by a person: null, number, true or false, JSON array or object; otherwise the text itself."""
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
        raise ValueError("a list is written [a, b]")
    items = [item.strip() for item in text[1:-1].split(",")]
    if not all(items):
        raise ValueError("an item of the list is missing")
    return [item[1:-1] if item[0] in "\"'" and item[-1] == item[0] and len(item) > 1 else read_value(item)
            for item in items]


TIME_UNITS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 7 * 86400}


def read_date(text: str) -> Tuple[datetime.datetime, datetime.datetime]:
    """A date, a date and time (local, unless it ends in Z or an offset) or '2 hours ago', as [start, end) in UTC.

    A date means its whole day, a time without seconds its whole minute. Raises ValueError.
    """
    ago = re.fullmatch(r"(?i)(\d{1,9}|an?|one)\s+(second|minute|hour|day|week)s?\s+ago", text)
    if ago:
        count = int(ago.group(1)) if ago.group(1).isdigit() else 1
        try:
            moment = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(
                seconds=count * TIME_UNITS[ago.group(2).lower()])
        except OverflowError as error:
            raise ValueError("%r is before all time" % text) from error
        return moment, moment + datetime.timedelta(seconds=1)
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d)(?:[ T](\d\d:\d\d)(:\d\d)?(?:\.(\d+))?(Z|[+-]\d\d:\d\d)?)?", text)
    if match is None:
        raise ValueError("%r is no date; write 2026-01-31, 2026-01-31 23:59 or '2 hours ago'" % text)
    day, clock, seconds, fraction, zone = match.groups()
    try:
        if zone:
            start = parse_time("%sT%s%s%s" % (day, clock, seconds or ":00", zone))
        else:
            naive = datetime.datetime.strptime(day + (clock or "00:00") + (seconds or ":00"), "%Y-%m-%d%H:%M:%S")
            start = naive.astimezone(datetime.timezone.utc)
        if fraction:
            start += datetime.timedelta(microseconds=int(fraction.ljust(6, "0")[:6]))
        length = datetime.timedelta(microseconds=1) if fraction else datetime.timedelta(
            seconds=1 if seconds else 60 if clock else 86400)
        return start, start + length
    except (ValueError, OverflowError, OSError) as error:
        raise ValueError("%r is no date: %s" % (text, error)) from error


def parse_sort(key: str) -> Tuple[str, bool]:
    """(name, descending) of a sort key such as `loss` or `started-desc`."""
    for suffix, descending in (("-desc", True), ("-asc", False)):
        if key.endswith(suffix):
            key = key[:-len(suffix)]
            break
    else:
        descending = False
    if not key.strip():
        raise ReplicateError("The sort key is empty. Name a field, param or metric, for instance --sort=started-desc.")
    return key.strip(), descending


def sort_rows(rows: List[Summary], name: str, descending: bool) -> List[Summary]:
    """rows, which come oldest first, by that value; those without it (or with NaN) last either way."""
    if name in TIME_FIELDS:
        return rows[::-1] if descending else rows
    present, missing = [], []
    for row, value in zip(rows, look_up(rows, name)):
        usable = value is not ABSENT and value is not None and value == value
        (present if usable else missing).append((row, value))
    present.sort(key=lambda pair: sort_key(pair[1]), reverse=descending)
    return [row for row, _ in present + missing]


# ------------------------------------------------------------------------------------------------------------------
# 5  Configuration, threads, storage
# ------------------------------------------------------------------------------------------------------------------

class Location:
    """Where the project and its repository are."""

    def __init__(self, directory: str, url: Optional[str], is_default: bool = False) -> None:
        self.directory = directory    # absolute path of the project directory
        self.url = url                # repository URL, file:// ones absolute; None: there is none yet
        self.is_default = is_default  # the embedded default repository, .replicate/storage


def find_location(repository: Optional[str] = None, directory: Optional[str] = None) -> Location:
    """The project directory and the repository, from arguments, the environment, the configuration or the default.

    Raises RepositoryConfigurationError, ConfigNotFound (a directory that is not there).
    """
    if directory is not None and not os.path.isdir(directory):
        raise ConfigNotFound("There is no directory %s." % directory)
    start = os.path.abspath(directory or os.getcwd())
    depth = 1 if directory is not None else CONFIG_SEARCH_DEPTH
    found = _search_upward(start, CONFIG_NAMES, depth)
    storage = None if found else _search_upward(start, (DEFAULT_STORAGE,), depth)
    project = (os.path.dirname(found) if found
               else storage[:-len(DEFAULT_STORAGE)].rstrip(os.sep) or os.sep if storage else start)
    url = repository or os.environ.get("REPLICATE_REPOSITORY")
    if url:
        return Location(project, absolute_url(url, project))
    if found:
        return Location(project, absolute_url(read_config(found)["repository"], project))
    return Location(project, "file://" + storage if storage else None, is_default=True)


def _search_upward(directory: str, names: Sequence[str], depth: int) -> Optional[str]:
    """The nearest existing one of names in directory or above it."""
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


def read_config(path: str) -> Dict[str, str]:
    """{"repository": url} from a replicate.yaml. Raises RepositoryConfigurationError."""
    try:
        with open(path, "rb") as file:
            text = file.read().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RepositoryConfigurationError("%s cannot be read: %s." % (path, short_reason(error))) from error
    values = read_flat_yaml(text)
    if values is None:
        values = _read_yaml(text, path)
    if not values:
        raise RepositoryConfigurationError("%s is empty. It needs a line such as 'repository: s3://my-bucket'." % path)
    if not isinstance(values, dict):
        raise RepositoryConfigurationError("%s holds no 'key: value' lines. It needs one such as "
                                           "'repository: s3://my-bucket'." % path)
    unknown = [str(key) for key in values if key not in ("repository", "storage")]
    if unknown:
        raise RepositoryConfigurationError("%s has the unknown key %r. The valid keys are 'repository' and its old "
                                           "name 'storage'." % (path, unknown[0]))
    if len(values) == 2:
        raise RepositoryConfigurationError("%s has both 'repository' and its old name 'storage'. Remove 'storage'." %
                                           path)
    key, url = next(iter(values.items()))
    if not isinstance(url, str) or not url:
        raise RepositoryConfigurationError("%s: '%s' must be a URL such as 's3://my-bucket'." % (path, key))
    if key == "storage":
        console.warning("%s: 'storage' is deprecated, call it 'repository'." % path)
    return {"repository": url}


def read_flat_yaml(text: str) -> Optional[Dict[str, str]]:
    """The part of YAML that needs no library: `key: text` lines, quotes, comments. None for anything richer."""
    if not text.translate({9: " ", 10: " ", 13: " "}).isprintable():
        return None
    values = {}
    for line in text.splitlines():
        if re.fullmatch(r"[ ]*(#.*)?", line):
            continue
        match = re.fullmatch(r"""([a-z_]+):[ ]+(?:"([^"\\]*)"|'([^']*)'|([a-z0-9]+://[^\s"'#,\[\]{}&*!|>%@`]*[^\s"'#,"""
                             r"""\[\]{}&*!|>%@`:]))[ ]*(?:[ ]#.*)?""", line)
        if match is None or match.group(1) in values or not line.isprintable():
            return None
        values[match.group(1)] = next(part for part in match.groups()[1:] if part is not None)
    return values


def _read_yaml(text: str, path: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise RepositoryConfigurationError(
            "%s is more than flat 'key: value' lines, so reading it needs PyYAML: install it with "
            "'pip install PyYAML'. A plain line such as 'repository: s3://my-bucket' works without it." % path) from error
    try:
        return yaml.safe_load(text)
    except Exception as error:  # PyYAML lets all sorts through, KeyError for instance
        raise RepositoryConfigurationError("%s is not valid YAML: %s." % (path, short_reason(error))) from error


def absolute_url(url: str, directory: str) -> str:
    """url with a relative file:// path made absolute; raises RepositoryConfigurationError for a bad one."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in BACKENDS:
        raise RepositoryConfigurationError("%r is no repository URL: it must start with %s." % (
            url, ", ".join("%s://" % name for name in BACKENDS)))
    if not rest or (scheme != "file" and rest.startswith("/")):
        raise RepositoryConfigurationError("%r names no %s." % (url, "directory" if scheme == "file" else "bucket"))
    if "\0" in rest:
        raise RepositoryConfigurationError("%r has a null character in it." % url)
    if scheme == "file":
        return "file://" + os.path.abspath(os.path.join(directory, os.path.expanduser(rest)))
    return scheme + "://" + rest.strip("/")


def open_storage(url: str) -> Storage:
    """The storage behind an absolute URL."""
    scheme, _, rest = url.partition("://")
    return BACKENDS[scheme](rest)


def in_threads(function: Callable[[Any], Any], items: Iterable[Any], count: int = 0) -> Iterator[Any]:
    """function(item) for each item, in order, computed by `count` threads (default: one a core, at most 8).

    At most two items a thread are in flight. When the iteration ends, however it does, no thread is at work any more;
    only Ctrl-C does not wait. Where no thread can start (the interpreter is shutting down), the caller does the work.
    """
    from collections import deque
    from queue import SimpleQueue
    tasks: Any = SimpleQueue()
    ending = False

    def work() -> None:
        for item, answer in iter(tasks.get, None):
            try:
                answer.put((None if ending else function(item), None))
            except BaseException as error:  # raised again where the result is used
                answer.put((None, error))

    started = 0
    for _ in range(count or min(os.cpu_count() or 1, 8)):
        try:
            threading.Thread(target=work, name="replicate-worker", daemon=True).start()
        except RuntimeError:
            break
        started += 1
    if not started:
        yield from map(function, items)
        return
    waiting: Any = deque()

    def next_result() -> Any:
        result, error = waiting[0].get()
        waiting.popleft()
        if error is not None:
            raise error
        return result

    try:
        for item in items:
            waiting.append(SimpleQueue())
            tasks.put((item, waiting[-1]))
            if len(waiting) >= 2 * started:
                yield next_result()
        while waiting:
            yield next_result()
    except KeyboardInterrupt:
        waiting.clear()
        raise
    finally:
        ending = True
        for _ in range(started):
            tasks.put(None)
        for answer in waiting:
            answer.get()


class Workers:
    """A few threads for work that releases the interpreter's lock. They are started before the interpreter ends, when
    the pools of the standard library refuse work; where none can be started, the work is done in the calling thread."""

    def __init__(self, count: int) -> None:
        from queue import SimpleQueue
        self._new_queue = SimpleQueue
        self._tasks: Any = SimpleQueue()
        self._count = 0
        for _ in range(count):
            try:
                threading.Thread(target=self._run, name="replicate-worker", daemon=True).start()
            except RuntimeError:  # the interpreter is shutting down, or no more threads may be started
                break
            self._count += 1

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """function of each item in order, a few of them ahead in parallel."""
        if not self._count:
            yield from map(function, items)
            return
        waiting: List[Any] = []
        for item in items:
            waiting.append(self._submit(function, item))
            if len(waiting) > 2 * self._count:
                yield self._result(waiting.pop(0).get())
        while waiting:
            yield self._result(waiting.pop(0).get())

    def each(self, function: Callable[[Any], Any], items: Iterable[Any]) -> None:
        """Call function with each item, in several threads at a time, of which the calling one is one: none of them has to
        wait for another. In the end, also by an exception, none of them is at work any more."""
        taking, left, end = threading.Lock(), iter(items), object()

        def work(_: Any = None) -> None:
            nonlocal left
            try:
                while True:
                    with taking:
                        item = next(left, end)
                    if item is end:
                        return
                    function(item)
            except BaseException:
                with taking:
                    left = iter(())
                raise

        answers = [self._submit(work, None) for _ in range(self._count - 1)]
        try:
            work()
        finally:
            outcomes = [answer.get() for answer in answers]
        for outcome in outcomes:
            self._result(outcome)

    def ahead(self, items: Iterator[Any], most: int = 8) -> Iterator[Any]:
        """The items, of which a thread makes a few while one is used."""
        if not self._count:
            yield from items
            return
        made, room = self._new_queue(), self._new_queue()
        end = object()
        wanted = True

        def make() -> None:
            try:
                for item in items:
                    made.put(item)
                    room.get()
                    if not wanted:
                        return
            finally:
                made.put(end)

        for _ in range(most - 1):
            room.put(None)
        answer = self._submit(lambda _: make(), None)
        try:
            for item in iter(made.get, end):
                yield item
                room.put(None)
        finally:
            wanted = False
            room.put(None)
            outcome = answer.get()
        self._result(outcome)

    def _submit(self, function: Callable[[Any], Any], item: Any) -> Any:
        answer = self._new_queue()
        self._tasks.put((function, item, answer))
        return answer

    @staticmethod
    def _result(outcome: Tuple[bool, Any]) -> Any:
        """What the function returned; raises what it raised."""
        succeeded, value = outcome
        if not succeeded:
            raise value
        return value

    def _run(self) -> None:
        while True:
            function, item, answer = self._tasks.get()
            try:
                answer.put((True, function(item)))
            except BaseException as error:  # handed to whoever waits for the result
                answer.put((False, error))
            del function, item, answer


_workers: Dict[int, Workers] = {}  # by process, since threads do not survive a fork


def workers() -> Workers:
    """The worker threads of this process."""
    process = os.getpid()
    if process not in _workers:
        _workers.clear()
        _workers[process] = Workers(min(os.cpu_count() or 1, 8))
    return _workers[process]


def may_share_work() -> bool:
    """Whether this process may be copied to use a second core: it is the command, and has no threads."""
    return (command_runs and hasattr(os, "fork") and (os.cpu_count() or 1) > 1
            and ("threading" not in sys.modules or threading.active_count() == 1))


command_runs = False  # set by main(): we are not a guest in somebody's process


def start_copy(function: Callable[[BinaryIO], None]) -> Callable[[], Optional[BinaryIO]]:
    """Call function in a copy of this process, with a file to write its result to, for which nobody waits meanwhile.

    What is returned waits for the end and gives a file with that result, or None if the copy failed.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.close(reader)
            with os.fdopen(writer, "wb") as file:
                function(file)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)

    def result() -> Optional[BinaryIO]:
        with os.fdopen(reader, "rb") as file:
            data = file.read()
        _, status = os.waitpid(pid, 0)
        return None if status else io.BytesIO(data)

    return result


def shared_turns(count: int) -> Iterator[int]:
    """The numbers below count, at most 2,000, for this process and its copies: each of them goes to the one that is first to
    ask for it."""
    reader, writer = os.pipe()
    os.write(writer, b"".join([number.to_bytes(2, "little") for number in range(count)]))  # a pipe holds 4,096 bytes
    os.close(writer)

    def turns() -> Iterator[int]:
        for data in iter(lambda: os.read(reader, 2), b""):
            yield int.from_bytes(data, "little")
        os.close(reader)

    return turns()


class Entry:
    """One stored object in a listing."""

    __slots__ = ("key", "name", "size", "modified", "version")

    def __init__(self, key: str, size: int, modified: float, version: str) -> None:
        self.key = key            # relative to the repository's root, with forward slashes
        self.name = key[key.rfind("/") + 1:]
        self.size = size          # bytes
        self.modified = modified  # seconds since the epoch, by the store's clock
        self.version = version    # differs whenever the content does


class Storage:
    """What every backend can do; all else is plain functions over these.

    Keys are relative to the repository's root. Everything appears whole or not at all. Methods raise DoesNotExist
    for a missing key, ReadError and WriteError for other failures, each with one sentence for the user.
    """

    scheme = ""
    has_journals = False  # journals and locks may stand beside the documents
    has_index = False     # reading many documents is slow enough to keep an index of them
    clock_skew = 0.0      # seconds by which the store's clock is ahead of ours

    def prepare(self) -> None:
        """Make sure that it can be written, creating the directory or bucket; called once when recording starts."""
        raise NotImplementedError

    def list(self, folder: str) -> Iterator[Entry]:
        """The objects directly in folder ('metadata/experiments/'), in any order."""
        raise NotImplementedError

    def stat(self, key: str) -> Entry:
        """Size and version of one object."""
        raise NotImplementedError

    def open(self, key: str, start: int = 0, end: Optional[int] = None, entry: Optional[Entry] = None) -> BinaryIO:
        """A binary stream of the bytes [start, end) of an object; of the version of that entry, if given."""
        raise NotImplementedError

    def write(self, key: str, data: bytes) -> None:
        """Store data under key."""
        raise NotImplementedError

    def upload(self, key: str, path: str, progress: Callable[[int], None] = lambda count: None) -> None:
        """Store a copy of a local file under key; progress gets the numbers of bytes as they are sent."""
        raise NotImplementedError

    def update(self, key: str, change: Callable[[Optional[bytes]], Optional[bytes]]) -> None:
        """Replace an object by change(its bytes, or None if it is missing); no change of others is ever lost.

        change may be called several times, and returns None to leave things as they are.
        """
        raise NotImplementedError

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects by exact key; missing ones are no error."""
        raise NotImplementedError

    def remove(self, key: str) -> None:
        """Remove one object that others may update at this moment: they will find it missing."""
        self.delete([key])

    def read(self, key: str, entry: Optional[Entry] = None) -> bytes:
        """The bytes of an object; of the version of that entry, if given and still there."""
        with self.open(key, entry=entry) as stream:
            return stream.read()

    def pin(self, key: str) -> Tuple[Entry, Callable[[int, int], BinaryIO]]:
        """An object as it is now, and a function that opens ranges of just this version, whatever replaces it."""
        entry = self.stat(key)
        return entry, lambda start, end: self.open(key, start, end, entry)

    def in_parallel(self, function: Callable[[Any], Any], items: Iterable[Any], large: bool = False) -> Iterator[Any]:
        """function of each item, in order; several at a time where waiting for the store takes the time."""
        return map(function, items)


class DiskStorage(Storage):
    """A directory. Writes go to a temporary file in its tmp/ and are then renamed into place."""

    scheme = "file"
    has_journals = True

    def __init__(self, root: str) -> None:
        self.root = root

    def path(self, key: str) -> str:
        """The file of a key."""
        return "%s%s%s" % (self.root, os.sep, key if os.sep == "/" else key.replace("/", os.sep))

    def prepare(self) -> None:
        path = self.temporary("probe")
        try:
            self._create(path, b"")
            os.unlink(path)
        except OSError as error:
            raise WriteError("The repository %s cannot be written: %s." % (self.root, short_reason(error))) from error
        self._remove_stale()

    def list(self, folder: str) -> Iterator[Entry]:
        try:
            with os.scandir(self.path(folder)) as entries:
                for entry in entries:
                    try:
                        if not entry.is_dir() and (not entry.is_symlink() or entry.stat()):  # or it leads nowhere
                            yield DiskEntry(folder + entry.name, entry.name, entry)
                    except OSError:  # deleted meanwhile
                        continue
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise ReadError("%s cannot be listed: %s." % (self.path(folder), short_reason(error))) from error

    def stat(self, key: str) -> Entry:
        try:
            return DiskEntry(key, os.path.basename(key), status=os.stat(self.path(key)))
        except OSError as error:
            raise self._read_failure(key, error) from error

    def open(self, key: str, start: int = 0, end: Optional[int] = None, entry: Optional[Entry] = None) -> BinaryIO:
        path = self.path(key)
        try:  # without O_NONBLOCK a FIFO in somebody's repository would hang every command
            descriptor = os.open(path, os.O_RDONLY | NONBLOCK | BINARY | CLOEXEC)
        except OSError as error:
            raise self._read_failure(key, error) from error
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise ReadError("%s is not a regular file." % path)
        file = os.fdopen(descriptor, "rb", 0)
        return file if end is None and not start else FileRange(file, start, status.st_size if end is None else end)

    def pin(self, key: str) -> Tuple[Entry, Callable[[int, int], BinaryIO]]:
        file = self.open(key)
        return (DiskEntry(key, os.path.basename(key), status=os.fstat(file.fileno())),
                lambda start, end: FileRange(file, start, end))  # type: ignore[return-value]

    def read(self, key: str, entry: Optional[Entry] = None) -> bytes:
        try:
            if entry is None:
                return super().read(key)
            size = entry.size
            descriptor = os.open(self.path(key), os.O_RDONLY | NONBLOCK | BINARY | CLOEXEC)
            try:
                data = os.read(descriptor, size + 1)
                while len(data) > size:  # it has grown since it was listed
                    more = os.read(descriptor, COPY_BYTES)
                    if not more:
                        break
                    data += more
                return data
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self._read_failure(key, error) from error

    def write(self, key: str, data: bytes) -> None:
        path = self.temporary(key.rpartition("/")[2])
        try:
            self._create(path, data)
            self.move_in(path, key)
        except OSError as error:
            remove_file(path)
            raise self.write_failure(key, error) from error

    def upload(self, key: str, path: str, progress: Callable[[int], None] = lambda count: None) -> None:
        temporary = self.temporary(key.rpartition("/")[2])
        try:
            os.makedirs(os.path.dirname(temporary), exist_ok=True)
            with open(path, "rb", 0) as source, open(temporary, "xb", 0) as target:
                for data in iter(lambda: source.read(COPY_BYTES), b""):
                    write_all(target, data)
                    progress(len(data))
            self.move_in(temporary, key)
        except OSError as error:
            raise self.write_failure(key, error) from error
        finally:
            remove_file(temporary)

    def update(self, key: str, change: Callable[[Optional[bytes]], Optional[bytes]]) -> None:
        try:
            with self._lock(key):
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
            with self._lock(key):
                self.delete([key])
        except OSError as error:
            raise WriteError("%s cannot be removed: %s." % (self.path(key), short_reason(error))) from error

    def _lock(self, key: str) -> FileLock:
        """What everybody holds who replaces or removes that object."""
        return FileLock(self.path("tmp/%s.lock" % key.rpartition("/")[2]))

    def temporary(self, name: str) -> str:
        """A new path in tmp/ for something that will be called name."""
        return self.path("tmp/%s.%s" % (name, os.urandom(6).hex()))

    def move_in(self, path: str, key: str) -> None:
        """Rename a finished temporary file to its place. Raises OSError."""
        target = self.path(key)
        try:
            os.replace(path, target)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.replace(path, target)

    def sync(self, keys: Iterable[str]) -> None:
        """Wait until these objects are on the disk itself; what is gone meanwhile is passed over."""
        for key in keys:
            for path in (self.path(key), os.path.dirname(self.path(key))):
                try:
                    descriptor = os.open(path, os.O_RDONLY)
                except OSError:
                    continue
                try:
                    os.fsync(descriptor)
                except OSError:
                    pass
                finally:
                    os.close(descriptor)

    def write_failure(self, key: str, error: OSError) -> WriteError:
        """The error for a failed write of key."""
        return WriteError("%s could not be written: %s." % (self.path(key), short_reason(error)))

    def _create(self, path: str, data: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY | CLOEXEC
        try:
            descriptor = os.open(path, flags, 0o666)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            descriptor = os.open(path, flags, 0o666)
        with os.fdopen(descriptor, "wb", 0) as file:
            write_all(file, data)

    def _remove_stale(self) -> None:
        """Remove what killed processes left in tmp/ more than a day ago."""
        for entry in self.list("tmp/"):
            if entry.modified < time.time() - 86400:
                remove_file(self.path(entry.key))

    def _read_failure(self, key: str, error: OSError) -> ReplicateError:
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            return DoesNotExist("%s does not exist." % self.path(key))
        return ReadError("%s cannot be read: %s." % (self.path(key), short_reason(error)))


class DiskEntry(Entry):
    """An entry whose facts are taken from the file's status when they are first asked for."""

    __slots__ = ("_source", "_facts")

    def __init__(self, key: str, name: str, source: Optional[os.DirEntry] = None,
                 status: Optional[os.stat_result] = None) -> None:
        self.key = key
        self.name = name
        self._source = source
        if status:
            self._facts = status.st_size, status.st_mtime_ns, status.st_ino

    def facts(self) -> Tuple[int, int, int]:
        """(bytes, time of the last change in nanoseconds, inode); zeros for a file that was deleted meanwhile."""
        if self._source is not None:
            try:
                status = self._source.stat()
                self._facts = status.st_size, status.st_mtime_ns, status.st_ino
            except OSError:
                self._facts = 0, 0, 0
            self._source = None
        return self._facts

    @property
    def size(self) -> int:  # type: ignore[override]
        return self.facts()[0]

    @property
    def modified(self) -> float:  # type: ignore[override]
        return self.facts()[1] / 1e9

    @property
    def version(self) -> str:  # type: ignore[override]
        return "%d-%d-%d" % self.facts()


NONBLOCK = getattr(os, "O_NONBLOCK", 0)
BINARY = getattr(os, "O_BINARY", 0)
CLOEXEC = getattr(os, "O_CLOEXEC", 0)


class FileRange:
    """The bytes [start, end) of an open file, which is left open."""

    def __init__(self, file: BinaryIO, start: int, end: int) -> None:
        self._file, self._position, self._end = file, start, end

    def read(self, size: int = -1) -> bytes:
        """Up to size bytes, none at the end."""
        left = self._end - self._position
        wanted = left if size < 0 else min(size, left)
        if hasattr(os, "pread"):
            data = os.pread(self._file.fileno(), wanted, self._position)
        else:
            self._file.seek(self._position)
            data = self._file.read(wanted)
        self._position += len(data)
        return data

    def scatter(self, views: Sequence[memoryview]) -> bool:
        """Fill memory views, at most 1,000, one behind the other; whether there was enough."""
        size = sum(map(len, views))
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), views, self._position) == size
        data = read_fully(self, size)  # type: ignore[arg-type]
        for view in views:
            view[:], data = data[:len(view)], data[len(view):]
        return True

    def __enter__(self) -> FileRange:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        """The file belongs to others."""


class FileLock:
    """An exclusive lock between processes that dies with its holder; its file is gone when nobody holds it.

    On systems without fcntl it is no lock: there, two processes should not record into one experiment.
    """

    def __init__(self, path: str, flags: int = 0) -> None:
        self.path = path
        self.descriptor: int = -1
        self._flags = os.O_RDWR | os.O_CREAT | CLOEXEC | flags

    def acquire(self, wait: bool = True) -> bool:
        """Take the lock; False if it is held by another and wait is False. Raises OSError."""
        while True:
            try:
                descriptor = os.open(self.path, self._flags, 0o666)
            except FileNotFoundError:
                os.makedirs(os.path.dirname(self.path), exist_ok=True)
                continue
            if not lock_descriptor(descriptor, wait):
                os.close(descriptor)
                return False
            try:
                current = os.stat(self.path)
            except FileNotFoundError:
                current = None
            if current is not None and os.path.samestat(current, os.fstat(descriptor)):
                self.descriptor = descriptor
                return True
            os.close(descriptor)  # its holder removed the file while we waited

    def release(self, remove: bool = True) -> None:
        """Give the lock back, and remove its file while it is still held."""
        if self.descriptor >= 0:
            if remove:
                remove_file(self.path)
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.release()


def lock_descriptor(descriptor: int, wait: bool) -> bool:
    """Lock an open file until it is closed; False if another process holds it. True where locks do not exist."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
    return True


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
    """The store did not answer, or not sensibly: worth another try."""


class NoBucket(DoesNotExist):
    """There is no such bucket."""


class Changed(ReplicateError):
    """An object is not the version that was expected."""


NO_BUCKET = "There is no bucket for %s. Is its name right? Reading never creates one; recording does."


class CloudStorage(Storage):
    """What S3 and Google Cloud Storage have in common: retries, ranged reading that resumes, parallel listing.

    A backend gives the requests themselves and translates the SDK's errors, once, in translate().
    """

    ATTEMPTS = 10          # for each request, with growing pauses: 10 seconds in all
    FIRST_PAUSE = 0.05     # seconds
    LONGEST_PAUSE = 3.0
    TIMEOUT = 20.0         # seconds without a byte after which a request has failed
    PARALLEL = 16          # requests at a time
    PART_BYTES = 8 << 20   # of an upload in parts, and of a ranged reading
    LARGE_UPLOADS = 2      # whole files at a time: each is in memory
    has_index = True

    def __init__(self, rest: str) -> None:
        self.bucket, _, root = rest.partition("/")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}", self.bucket):
            raise RepositoryConfigurationError("%r is no bucket name." % self.bucket)
        self.root = root.strip("/") + "/" if root.strip("/") else ""
        self.url = "%s://%s" % (self.scheme, rest)
        self.attempts = self.ATTEMPTS
        self._threads: Dict[int, Workers] = {}

    # -- what a backend provides

    def translate(self, error: Exception, key: str) -> ReplicateError:
        """The error of this module for one of the SDK's."""
        raise NotImplementedError

    def list_page(self, prefix: str, after: str, token: Any) -> Tuple[List[Entry], Any]:
        """Up to 1,000 entries below prefix, those named after `after` or from a page token on, and the next token."""
        raise NotImplementedError

    def read_part(self, key: str, start: int, end: int, version: Optional[str]) -> Tuple[BinaryIO, str, int]:
        """(stream of the bytes [start, end), version, size of the object); raises Changed for another version."""
        raise NotImplementedError

    def put(self, key: str, data: bytes, version: Optional[str]) -> None:
        """Store an object; version: only if it is still this one ('' for none at all), else raises Changed."""
        raise NotImplementedError

    def put_parts(self, key: str, path: str, size: int, progress: Callable[[int], None]) -> None:
        """Store a large file."""
        raise NotImplementedError

    def find_bucket(self) -> bool:
        """Whether the bucket exists. Raises for one that is somebody else's."""
        raise NotImplementedError

    def create_bucket(self) -> None:
        """Make the bucket."""
        raise NotImplementedError

    # -- what they share

    def call(self, request: Callable[[], Any], key: str) -> Any:
        """The result of a request, tried again with growing pauses while the failure may be a passing one."""
        pause = self.FIRST_PAUSE
        attempt = 0
        while True:
            attempt += 1
            try:
                return request()
            except ReplicateError as error:
                failure = error
            except Exception as error:
                failure = self.translate(error, key)
                failure.__cause__ = error
            if not isinstance(failure, Unreachable) or attempt >= self.attempts:
                raise failure
            console.debug("Trying again: %s" % failure)
            time.sleep(pause * (0.5 + os.urandom(1)[0] / 256))
            pause = min(2 * pause, self.LONGEST_PAUSE)

    def in_parallel(self, function: Callable[[Any], Any], items: Iterable[Any], large: bool = False) -> Iterator[Any]:
        """function of each item, in order, several requests at a time; fewer where each takes much memory."""
        count = self.LARGE_UPLOADS if large else self.PARALLEL
        if count not in self._threads:
            self._threads[count] = Workers(count)
        return self._threads[count].map(function, items)

    def prepare(self) -> None:
        if not self.call(self.find_bucket, ""):
            try:
                self.call(self.create_bucket, "")
            except ReplicateError:  # made meanwhile, by another machine or by a request whose answer was lost
                if not self.call(self.find_bucket, ""):
                    raise
            console.warning("The bucket %s did not exist: it was created. If that is a misspelling, delete it." %
                            self.bucket)
        probe = "tmp/probe.%s" % os.urandom(6).hex()
        self.write(probe, b"")
        self.delete([probe])

    def list(self, folder: str) -> Iterator[Entry]:
        """Pages; from the second on, the hex prefixes of the names are listed in parallel."""
        def page(request: Tuple[str, str, Any]) -> Tuple[List[Entry], Any]:
            return self.call(lambda: self.list_page(self.root + request[0], request[1], request[2]), "")

        def rest(request: Tuple[str, str]) -> List[Entry]:
            prefix, after = request
            entries, token = page((prefix, after, None))
            while token:
                more, token = page((prefix, "", token))
                entries += more
            return entries

        entries, token = page((folder, "", None))
        yield from (entry for entry in entries if "/" not in entry.key[len(folder):])
        if not token:
            return
        last = entries[-1].key if entries else folder
        digits = [digit for digit in "0123456789abcdef" if folder + digit >= last[:len(folder) + 1]]
        requests = [(folder + digit, self.root + last if last.startswith(folder + digit) else "") for digit in digits]
        for found in self.in_parallel(rest, requests):
            yield from (entry for entry in found if "/" not in entry.key[len(folder):])

    def open(self, key: str, start: int = 0, end: Optional[int] = None, entry: Optional[Entry] = None) -> BinaryIO:
        if entry is not None:
            end = entry.size if end is None else min(end, entry.size)
        version = entry.version if entry is not None else None
        return ResumingStream(self, key, start, end, version)  # type: ignore[return-value]

    def read(self, key: str, entry: Optional[Entry] = None) -> bytes:
        try:
            return super().read(key, entry)
        except Changed:  # since it was listed
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
            except Changed:  # while it was read
                continue
            new = change(old)
            if new is None:
                return
            try:
                self.call(lambda: self.put(key, new, version), key)  # noqa: B023
                return
            except Changed:  # by another machine, or by our own request whose answer was lost
                continue
        raise WriteError("%s in %s changes all the time: it could not be updated." % (key, self.url))

    def upload(self, key: str, path: str, progress: Callable[[int], None] = lambda count: None) -> None:
        size = os.path.getsize(path)
        if size > self.PART_BYTES:
            self.put_parts(key, path, size, progress)
        else:
            with open(path, "rb") as file:
                self.write(key, file.read())
            progress(size)


class ResumingStream:
    """The bytes [start, end) of an object; when the connection breaks, it goes on where it was, in the same version."""

    def __init__(self, storage: CloudStorage, key: str, start: int = 0, end: Optional[int] = None,
                 version: Optional[str] = None) -> None:
        self._storage, self._key = storage, key
        self._position, self._end = start, end
        self._stream: Any = None
        self.version = version
        if end is None or end > start:
            self._storage.call(self._connect, key)

    def _connect(self) -> None:
        end = self._end if self._end is not None else self._position + (1 << 62)
        self._stream, self.version, size = self._storage.read_part(self._key, self._position, end, self.version)
        self._end = min(end, size)

    def _read_once(self, size: int) -> bytes:
        if self._stream is None:
            self._connect()
        try:
            data = self._stream.read(size)
            if not data:
                raise Unreachable("%s: the connection was closed too early." % self._storage.url)
            return data
        except Exception:
            self.close()
            raise

    def read(self, size: int = -1) -> bytes:
        """Up to size bytes, none at the end. Raises ReadError, Changed."""
        if size < 0:
            return b"".join(iter(lambda: self.read(1 << 20), b""))
        size = min(size, self._end - self._position) if self._end is not None else 0
        if size <= 0:
            return b""
        data = self._storage.call(lambda: self._read_once(size), self._key)
        self._position += len(data)
        return data

    def close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            try:
                stream.close()
            except Exception:  # a broken connection: there is nothing left to close
                pass

    def __enter__(self) -> ResumingStream:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()


class S3Storage(CloudStorage):
    """A bucket of Amazon S3 or of any store that speaks its protocol, with the standard settings of boto3."""

    scheme = "s3"
    MAX_PARTS = 9000
    MISSING = ("404", "NoSuchKey", "NotFound", "NoSuchUpload")
    STALE = ("412", "PreconditionFailed", "ConditionalRequestConflict", "409")
    PASSING = ("SlowDown", "RequestTimeout", "RequestTimeTooSkewed.Retry", "InternalError", "ServiceUnavailable",
               "Throttling", "ThrottlingException", "TooManyRequests", "OperationAborted")

    def __init__(self, rest: str) -> None:
        super().__init__(rest)
        try:
            import boto3
            import botocore.config
            import botocore.exceptions
        except ImportError as error:
            raise RepositoryConfigurationError("s3:// repositories need boto3: install it with 'pip install boto3'. "
                                               "Repositories on disk (file://) work without it.") from error
        self._errors = botocore.exceptions
        settings = {"connect_timeout": 5, "read_timeout": self.TIMEOUT, "max_pool_connections": 2 * self.PARALLEL,
                    "retries": {"total_max_attempts": 1, "mode": "standard"}}
        new_settings = {"request_checksum_calculation": "when_required",  # the default is refused by some stores
                        "response_checksum_validation": "when_required"}
        try:
            config = botocore.config.Config(**settings, **new_settings)
        except TypeError:  # an older botocore, which adds no checksums
            config = botocore.config.Config(**settings)
        try:
            self._client = boto3.session.Session().client("s3", config=config)
            self._client.meta.events.register("after-call.s3", self._note_clock)
        except (botocore.exceptions.BotoCoreError, ValueError) as error:
            raise RepositoryConfigurationError("%s cannot be used: %s." % (
                self.url, short_reason(error).rstrip("."))) from error

    def _note_clock(self, parsed: Dict[str, Any], **kwargs: Any) -> None:
        self.clock_skew = http_date_skew(parsed.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date"))

    def translate(self, error: Exception, key: str) -> ReplicateError:
        name = "%s in %s" % (key, self.url) if key else self.url
        reason = short_reason(error).rstrip(".")
        if isinstance(error, self._errors.ClientError):
            answer = error.response.get("Error", {})
            code, status = str(answer.get("Code", "")), error.response.get("ResponseMetadata", {}).get(
                "HTTPStatusCode", 0)
            reason = "%s (%s)" % (str(answer.get("Message") or "no reason given").rstrip("."), code)
            if code == "NoSuchBucket" or (status == 404 and not key):
                return NoBucket(NO_BUCKET % self.url)
            if code in self.STALE or status == 412:
                return Changed("%s was changed by another process." % name)
            if status >= 500 and code != "NotImplemented" or status == 429 or code in self.PASSING:
                return Unreachable("%s cannot be reached: %s." % (self.url, reason))
            if code in self.MISSING:
                return DoesNotExist("%s does not exist." % name)
            return ReadError("%s refuses: %s." % (name, reason))
        if isinstance(error, (self._errors.NoCredentialsError, self._errors.PartialCredentialsError,
                              self._errors.CredentialRetrievalError, self._errors.ParamValidationError,
                              self._errors.NoRegionError, self._errors.SSLError)):
            return ReadError("%s cannot be used: %s." % (self.url, reason))
        if isinstance(error, (self._errors.BotoCoreError, OSError)) or type(error).__module__.startswith("urllib3"):
            return Unreachable("%s cannot be reached: %s." % (self.url, reason))
        return ReadError("%s: %s." % (name, reason))

    def list_page(self, prefix: str, after: str, token: Any) -> Tuple[List[Entry], Any]:
        extra = {"ContinuationToken": token} if token else {"StartAfter": after} if after else {}
        page = self._client.list_objects_v2(Bucket=self.bucket, Prefix=prefix, MaxKeys=1000, **extra)
        entries = [Entry(item["Key"][len(self.root):], item["Size"], item["LastModified"].timestamp(),
                         item["ETag"].strip('"')) for item in page.get("Contents", ())]
        return entries, page.get("NextContinuationToken") if page.get("IsTruncated") else None

    def stat(self, key: str) -> Entry:
        head = self.call(lambda: self._client.head_object(Bucket=self.bucket, Key=self.root + key), key)
        return Entry(key, head["ContentLength"], head["LastModified"].timestamp(), head["ETag"].strip('"'))

    def read_part(self, key: str, start: int, end: int, version: Optional[str]) -> Tuple[BinaryIO, str, int]:
        extra = {"IfMatch": '"%s"' % version} if version else {}
        if start or end < 1 << 62:
            extra["Range"] = "bytes=%d-%s" % (start, end - 1 if end < 1 << 62 else "")
        answer = self._client.get_object(Bucket=self.bucket, Key=self.root + key, **extra)
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.get("ContentRange") or "")
        if extra.get("Range") and (found is None or int(found.group(1)) != start):
            raise ReadError("%s answers a request for a part of %s with something else." % (self.url, key))
        size = int(found.group(2)) if found else answer["ContentLength"]
        return answer["Body"], answer["ETag"].strip('"'), size

    def put(self, key: str, data: bytes, version: Optional[str]) -> None:
        condition = {} if version is None else {"IfMatch": '"%s"' % version} if version else {"IfNoneMatch": "*"}
        try:
            self._client.put_object(Bucket=self.bucket, Key=self.root + key, Body=data, **condition)
        except self._errors.ParamValidationError:  # an older boto3
            self._client.put_object(Bucket=self.bucket, Key=self.root + key, Body=data)
        except self._errors.ClientError as error:
            if error.response.get("Error", {}).get("Code") != "NotImplemented" or not condition:
                raise
            self._client.put_object(Bucket=self.bucket, Key=self.root + key, Body=data)

    def put_parts(self, key: str, path: str, size: int, progress: Callable[[int], None]) -> None:
        target = {"Bucket": self.bucket, "Key": self.root + key}
        length = max(self.PART_BYTES, size // self.MAX_PARTS + 1)
        upload = self.call(lambda: self._client.create_multipart_upload(**target), key)["UploadId"]

        def send(number: int) -> Dict[str, Any]:
            with open(path, "rb") as file:
                file.seek((number - 1) * length)
                data = file.read(length)
            answer = self.call(lambda: self._client.upload_part(UploadId=upload, PartNumber=number, Body=data, **target),
                               key)
            progress(len(data))
            return {"PartNumber": number, "ETag": answer["ETag"]}

        try:
            parts = list(workers().map(send, range(1, (size + length - 1) // length + 1)))
            self.call(lambda: self._complete(target, upload, parts), key)
        except BaseException:
            try:
                self._client.abort_multipart_upload(UploadId=upload, **target)
            except Exception as error:  # the store's own rules clean it up
                console.debug("An unfinished upload of %s is left: %s" % (key, error))
            raise

    def _complete(self, target: Dict[str, str], upload: str, parts: List[Dict[str, Any]]) -> None:
        try:
            self._client.complete_multipart_upload(UploadId=upload, MultipartUpload={"Parts": parts}, **target)
        except self._errors.ClientError as error:
            if error.response.get("Error", {}).get("Code") != "NoSuchUpload":
                raise
            self._client.head_object(**target)  # an earlier try succeeded, and its answer was lost

    def delete(self, keys: Iterable[str]) -> None:
        names = [{"Key": self.root + key} for key in keys]
        for start in range(0, len(names), 1000):
            batch = {"Objects": names[start:start + 1000], "Quiet": True}
            answer = self.call(lambda: self._client.delete_objects(Bucket=self.bucket, Delete=batch), "")  # noqa: B023
            for error in answer.get("Errors", ()):
                if error.get("Code") not in self.MISSING:
                    raise WriteError("%s in %s cannot be removed: %s." % (
                        str(error.get("Key", ""))[len(self.root):], self.url, error.get("Message")))

    def find_bucket(self) -> bool:
        try:
            self._client.head_bucket(Bucket=self.bucket)
            return True
        except self._errors.ClientError as error:
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 404:
                return False
            raise

    def create_bucket(self) -> None:
        region = self._client.meta.region_name
        extra = {} if region in (None, "us-east-1", "aws-global") else {
            "CreateBucketConfiguration": {"LocationConstraint": region}}
        self._client.create_bucket(Bucket=self.bucket, **extra)


class GCSStorage(CloudStorage):
    """A bucket of Google Cloud Storage, with application default credentials, or STORAGE_EMULATOR_HOST."""

    scheme = "gs"
    PARALLEL = 10  # the SDK's pool of connections

    def __init__(self, rest: str) -> None:
        super().__init__(rest)
        try:
            import google.api_core.exceptions
            import google.auth.exceptions
            from google.cloud import storage
            from google.cloud.storage.retry import DEFAULT_RETRY
        except ImportError as error:
            raise RepositoryConfigurationError(
                "gs:// repositories need google-cloud-storage: install it with 'pip install google-cloud-storage'. "
                "Repositories on disk (file://) work without it.") from error
        os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")  # a request of the SDK's own
        self._errors, self._auth_errors = google.api_core.exceptions, google.auth.exceptions
        self._chunk_retry = DEFAULT_RETRY
        project = os.environ.get("GOOGLE_CLOUD_PROJECT")
        try:
            if os.environ.get("STORAGE_EMULATOR_HOST"):
                from google.auth.credentials import AnonymousCredentials
                self._client = storage.Client(project or "replicate", AnonymousCredentials())
            else:
                self._client = storage.Client(project)
        except (google.auth.exceptions.GoogleAuthError, OSError, ValueError) as error:
            raise RepositoryConfigurationError("%s cannot be used: %s." % (
                self.url, short_reason(error).rstrip("."))) from error
        self._client._http.hooks["response"].append(self._note_clock)
        self._bucket = self._client.bucket(self.bucket)

    def _note_clock(self, response: Any, *args: Any, **kwargs: Any) -> None:
        self.clock_skew = http_date_skew(response.headers.get("date"))

    def translate(self, error: Exception, key: str) -> ReplicateError:
        name = "%s in %s" % (key, self.url) if key else self.url
        text = str(getattr(error, "message", None) or short_reason(error))
        inner = re.search(r'"message":\s*"([^"]+)"', text)  # media requests give the whole answer
        reason = inner.group(1) if inner else re.sub(r"^[A-Z]+ https?://\S+: ", "", text)
        reason = reason.strip().rstrip(".:")
        code = getattr(error, "code", None)
        if isinstance(error, self._errors.NotFound):
            if not key or "specified bucket" in reason.lower():
                return NoBucket(NO_BUCKET % self.url)
            return DoesNotExist("%s does not exist." % name)
        if isinstance(error, self._errors.PreconditionFailed):
            return Changed("%s was changed by another process." % name)
        if isinstance(error, self._auth_errors.GoogleAuthError) and not isinstance(
                error, self._auth_errors.TransportError):
            return ReadError("%s cannot be used: %s." % (self.url, reason))
        if isinstance(error, self._errors.GoogleAPICallError) and not (
                isinstance(code, int) and (code >= 500 or code in (408, 429))):
            return ReadError("%s refuses: %s." % (name, reason))
        module = type(error).__module__.split(".")[0]
        if isinstance(error, OSError) or module in ("google", "requests", "urllib3", "http"):
            return Unreachable("%s cannot be reached: %s." % (self.url, reason))
        return ReadError("%s: %s." % (name, reason))

    def _blob(self, key: str) -> Any:
        return self._bucket.blob(self.root + key)

    def list_page(self, prefix: str, after: str, token: Any) -> Tuple[List[Entry], Any]:
        extra = {"start_offset": after} if after else {}
        pages = self._client.list_blobs(self._bucket, prefix=prefix, page_token=token, max_results=None, page_size=1000,
                                        fields="items(name,size,updated,generation),nextPageToken", retry=None,
                                        timeout=self.TIMEOUT, **extra)
        page = next(pages.pages, ())
        entries = [Entry(blob.name[len(self.root):], blob.size or 0, blob.updated.timestamp(), str(blob.generation))
                   for blob in page if blob.name != after]
        return entries, pages.next_page_token

    def stat(self, key: str) -> Entry:
        blob = self._blob(key)
        self.call(lambda: blob.reload(retry=None, timeout=self.TIMEOUT), key)
        return Entry(key, blob.size or 0, blob.updated.timestamp(), str(blob.generation))

    def read_part(self, key: str, start: int, end: int, version: Optional[str]) -> Tuple[BinaryIO, str, int]:
        blob = self._blob(key)
        if version is None:
            blob.reload(retry=None, timeout=self.TIMEOUT)
            version = str(blob.generation)
            size = blob.size or 0
        else:
            size = end
        return GCSStream(self, blob, start, min(end, size), version), version, size  # type: ignore[return-value]

    def read(self, key: str, entry: Optional[Entry] = None) -> bytes:
        """In one request, where the inherited method would first ask for the version."""
        return self.call(lambda: self._blob(key).download_as_bytes(raw_download=True, checksum=None, retry=None,
                                                                   timeout=self.TIMEOUT), key)

    def download(self, blob: Any, start: int, end: int, version: str) -> bytes:
        """The bytes [start, end) of one version of an object, in one request."""
        data = blob.download_as_bytes(start=start, end=end - 1, raw_download=True, checksum=None, retry=None,
                                      if_generation_match=int(version), timeout=self.TIMEOUT)
        if len(data) != end - start:
            raise Unreachable("%s: the connection was closed too early." % self.url)
        return data

    def put(self, key: str, data: bytes, version: Optional[str]) -> None:
        self._blob(key).upload_from_string(data, "application/octet-stream", retry=None, timeout=self.TIMEOUT,
                                           if_generation_match=None if version is None else int(version or 0))

    def put_parts(self, key: str, path: str, size: int, progress: Callable[[int], None]) -> None:
        blob = self._bucket.blob(self.root + key, chunk_size=self.PART_BYTES)

        def send() -> None:
            with CountingFile(path, progress) as file:
                blob.upload_from_file(file, size=size, content_type="application/octet-stream", timeout=self.TIMEOUT,
                                      retry=self._chunk_retry, checksum=None)
        self.call(send, key)

    def delete(self, keys: Iterable[str]) -> None:
        def remove(key: str) -> None:
            try:
                self.call(lambda: self._blob(key).delete(retry=None, timeout=self.TIMEOUT), key)
            except DoesNotExist:
                pass

        for _ in self.in_parallel(remove, keys):
            pass

    def find_bucket(self) -> bool:
        return self._client.lookup_bucket(self.bucket, retry=None, timeout=self.TIMEOUT) is not None

    def create_bucket(self) -> None:
        self._client.create_bucket(self.bucket, retry=None, timeout=self.TIMEOUT)


class GCSStream:
    """A range of one version of an object, fetched in parts, each in one request."""

    def __init__(self, storage: GCSStorage, blob: Any, start: int, end: int, version: str) -> None:
        self._storage, self._blob, self._version = storage, blob, version
        self._position, self._end = start, end
        self._data = memoryview(b"")

    def read(self, size: int) -> bytes:
        """Up to size bytes."""
        if not self._data and self._position < self._end:
            end = min(self._end, self._position + self._storage.PART_BYTES)
            self._data = memoryview(self._storage.download(self._blob, self._position, end, self._version))
            self._position = end
        taken, self._data = self._data[:size], self._data[size:]
        return bytes(taken)

    def close(self) -> None:
        self._data = memoryview(b"")


class CountingFile:
    """A file opened for reading that reports how many bytes are read for the first time."""

    def __init__(self, path: str, progress: Callable[[int], None]) -> None:
        self._file, self._progress, self._furthest = open(path, "rb"), progress, 0

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        ahead = self._file.tell() - self._furthest
        if ahead > 0:
            self._furthest += ahead
            self._progress(ahead)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> CountingFile:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._file.close()


def http_date_skew(date: Optional[str]) -> float:
    """How many seconds an HTTP Date header is ahead of our clock; 0 without one."""
    if not date:
        return 0.0
    from email.utils import parsedate_to_datetime
    try:
        return parsedate_to_datetime(date).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
        return 0.0


BACKENDS: Dict[str, Callable[[str], Storage]] = {"file": DiskStorage, "s3": S3Storage, "gs": GCSStorage}


# ------------------------------------------------------------------------------------------------------------------
# 6  Archives: ignore rules, pack, unpack
# ------------------------------------------------------------------------------------------------------------------

NEVER_SAVED = (".replicate", ".keepsake", ".git", ".mypy_cache", "__pycache__", ".ipynb_checkpoints", ".env")
STAGING_PREFIX = ".replicate-checkout-"


class IgnoreRules:
    """The patterns of .gitignore syntax that hold in a project; see gitignore(5) for the rules."""

    def __init__(self) -> None:
        self._rules: List[Tuple[str, Any, bool, bool]] = []  # folder, compiled pattern, negated, directories only

    def read(self, directory: str, folder: str) -> None:
        """Add the ignore files of a directory; folder is its path relative to the project ('' or 'a/b/')."""
        for name in IGNORE_NAMES:
            try:
                with open(os.path.join(directory, name), "rb") as file:
                    self.add(file.read(), folder)
            except (FileNotFoundError, IsADirectoryError, PermissionError):
                continue

    def add(self, content: bytes, folder: str = "") -> None:
        """Add the lines of one ignore file."""
        if content.startswith(b"\xef\xbb\xbf"):
            content = content[3:]
        for line in content.split(b"\n"):
            rule = _ignore_rule(line[:-1] if line.endswith(b"\r") else line)
            if rule:
                self._rules.append((folder,) + rule)

    def excludes(self, path: str, is_directory: bool) -> bool:
        """Whether a path, whose parents are not excluded, is: the last pattern that matches it decides."""
        for folder, pattern, negated, directories_only in reversed(self._rules):
            if path.startswith(folder) and (is_directory or not directories_only):
                if pattern.match(os.fsencode(path[len(folder):])):
                    return not negated
        return False


def _ignore_rule(line: bytes) -> Optional[Tuple[Any, bool, bool]]:
    """(compiled pattern, negated, directories only) of one line; None for comments and the like."""
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
            # Git compares what stands before the first wildcard by itself, so that "**" may start the rest.
            first = pattern[start - 1:start] in (b"", b"/") or not re.search(rb"[*?\[\\]", pattern[:start])
            alone = first and pattern[position:position + 1] in (b"", b"/")
            if position - start > 1 and alone and anchored:
                if position == len(pattern):
                    parts.append(b".*")
                else:
                    parts.append(b"(?:.*/)?")
                    position += 1
            else:
                parts.append(b"[^/]*")
        elif character == b"?":
            parts.append(b"[^/]")
        elif character == b"[":
            found = _bracket_expression(pattern, position)
            if found is None:
                return None
            parts.append(found[0])
            position = found[1]
        elif character == b"\\":
            if position == len(pattern):
                return None
            parts.append(re.escape(pattern[position:position + 1]))
            position += 1
        else:
            parts.append(re.escape(character))
    return b"".join(parts)


_POSIX_CLASSES = {b"alnum": "isalnum", b"alpha": "isalpha", b"digit": "isdigit", b"lower": "islower",
                  b"upper": "isupper"}


def _posix_class(name: bytes) -> Optional[Set[int]]:
    """The byte values of [:name:] in the C locale."""
    if name in _POSIX_CLASSES:
        return {code for code in range(128) if getattr(chr(code), _POSIX_CLASSES[name])()}
    sets = {b"blank": b" \t", b"space": b" \t\n\v\f\r", b"xdigit": b"0123456789abcdefABCDEF",
            b"cntrl": bytes(range(32)) + b"\x7f", b"print": bytes(range(32, 127)), b"graph": bytes(range(33, 127)),
            b"punct": bytes(code for code in range(33, 127) if not chr(code).isalnum())}
    return set(sets[name]) if name in sets else None


def _bracket_expression(pattern: bytes, position: int) -> Optional[Tuple[bytes, int]]:
    """(expression, next position) of the bracket whose '[' stands before position; None if it is malformed."""
    negated = pattern[position:position + 1] in (b"!", b"^")
    position += negated
    members: Set[int] = set()
    previous: Optional[int] = None
    first = True
    while True:
        if position >= len(pattern):
            return None
        code = pattern[position]
        if code == 0x5d and not first:  # ]
            break
        first = False
        if code == 0x5c:  # backslash
            position += 1
            if position >= len(pattern):
                return None
            previous = pattern[position]
            members.add(previous)
        elif (code == 0x2d and previous is not None and position + 1 < len(pattern)
              and pattern[position + 1] != 0x5d):  # a range
            position += 1
            if pattern[position] == 0x5c:
                position += 1
                if position >= len(pattern):
                    return None
            members.update(range(previous, pattern[position] + 1))
            previous = None
        elif code == 0x5b and pattern[position + 1:position + 2] == b":":  # [:name:]
            end = pattern.find(b"]", position + 2)
            if end < 0:
                return None
            if pattern[end - 1] == 0x3a and end - 1 >= position + 2:
                members_of_class = _posix_class(pattern[position + 2:end - 1])
                if members_of_class is None:
                    return None
                members |= members_of_class
                previous = None
                position = end
            else:
                previous = code
                members.add(code)
        else:
            previous = code
            members.add(code)
        position += 1
    if negated:
        members = set(range(256)) - members
    members.discard(0x2f)
    if not members:
        return b"(?!)", position + 1
    return b"[" + b"".join(b"\\x%02x" % code for code in sorted(members)) + b"]", position + 1


class Source:
    """A file to be packed."""

    __slots__ = ("name", "path", "size", "mode", "modified")

    def __init__(self, name: str, path: str, status: os.stat_result) -> None:
        self.name = name          # relative to the project directory, with forward slashes
        self.path = path          # where it is now
        self.size = status.st_size
        self.mode = status.st_mode & 0o777
        self.modified = int(status.st_mtime)


def relative_path(path: Any, directory: str) -> str:
    """A path given by the user, relative to the project directory, with forward slashes ('.' for all of it).

    Raises TypeError for no path at all, ValueError for one that is empty, missing or outside.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError("path must be a string, not %s" % type(path).__name__)
    text = os.fspath(path)
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError("path is empty" if not text else "path %r is no file name" % (text,))
    full = os.path.abspath(os.path.join(directory, text))
    relative = os.path.relpath(full, directory)
    if relative.split(os.sep)[0] == os.pardir:
        relative = os.path.relpath(os.path.join(os.path.realpath(os.path.dirname(full)), os.path.basename(full)),
                                   os.path.realpath(directory))
    if relative.split(os.sep)[0] == os.pardir or os.path.isabs(relative):
        raise ValueError("path %r is outside the project directory %s" % (text, directory))
    if not os.path.exists(full):
        raise ValueError("path %r does not exist (it is relative to the project directory %s)" % (text, directory))
    return relative.replace(os.sep, "/")


def find_sources(directory: str, path: str, excluded: Sequence[str] = (),
                 warn: Callable[[str], None] = console.warning) -> List[Source]:
    """The files to save at path (as relative_path gives it), sorted by name, without what is never saved or ignored.

    excluded are absolute directories to leave out (a repository inside the project). The named path itself is saved
    even if an ignore file lists it: whoever names it wants it. Raises ValueError where it may never be saved.
    """
    for part in path.split("/"):
        if is_never_saved(part):
            raise ValueError("path %r is never saved: it is inside %s" % (path, part))
        if part != "." and (is_unsafe(part) or is_protected(part)):
            raise ValueError("path %r is not saved: a file of such a name could not be checked out" % path)
    top = os.path.join(directory, path)
    rules = IgnoreRules()
    rules.read(directory, "")
    if os.path.isdir(top) and path != ".":
        rules.read(top, path + "/")
    found: List[Source] = []
    if os.path.isdir(top):
        _walk(top, "" if path == "." else path + "/", rules, {os.path.realpath(item) for item in excluded}, warn, found)
    else:
        _add_file(found, path, top, warn)
    found.sort(key=lambda source: source.name)
    return found


def is_never_saved(name: str) -> bool:
    """Whether files and directories of that name stay out of every archive."""
    return name in NEVER_SAVED or name.startswith((".env.", STAGING_PREFIX))


def _walk(directory: str, prefix: str, rules: IgnoreRules, excluded: Set[str], warn: Callable[[str], None],
          found: List[Source]) -> None:
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
            warn("%s is not saved: a file of such a name could not be checked out." % name)
            continue
        is_directory = entry.is_dir(follow_symlinks=False)
        if rules.excludes(name, is_directory):
            continue
        if is_directory:
            if not _is_environment(entry.path) and not (excluded and os.path.realpath(entry.path) in excluded):
                _walk(entry.path, name + "/", rules, excluded, warn, found)
        elif entry.is_symlink() and os.path.isdir(entry.path):
            warn("%s is not saved: it is a link to a directory." % name)
        else:
            _add_file(found, name, entry.path, warn)


def _is_environment(directory: str) -> bool:
    return any(os.path.exists(os.path.join(directory, name)) for name in ("pyvenv.cfg", "conda-meta"))


def _add_file(found: List[Source], name: str, path: str, warn: Callable[[str], None]) -> None:
    try:
        status = os.stat(path)
    except OSError as error:
        warn("%s is not saved: %s." % (name, short_reason(error)))
        return
    if stat.S_ISREG(status.st_mode):
        found.append(Source(name, path, status))


# An archive is a .tar.gz in many gzip members, which every reader takes for one file. Members start at files or every
# MEMBER_BYTES, so that they can be packed and unpacked in parallel and read singly. What does not shrink is stored.
# Behind the data stand empty gzip members whose extra fields (RFC 1952, subfield "RV") hold a table of contents, as
# zlib-compressed JSON {"members": [[compressed size, size]...], "files": [[name, offset in the tar, size]...]}; the
# last of them has a fixed length and says where the first one starts.

MEMBER_BYTES = 1 << 20            # of a large file that stand in one gzip member
GROUP_BYTES = 256 << 10           # small files share a member up to this size
MAX_STORED_BYTES = 8 << 20        # of a stored member that is read in one system call
MAX_MEMBER_BYTES = 16 << 20       # a table of contents that claims more is not believed
STORED_BYTES = 65535              # of a stored deflate block, the most that it can hold
PIECE_BYTES = 256 << 10           # of an archive without a table that are decompressed at a time
SHRINKS = 0.9                     # what compresses to less than this is worth compressing
SAMPLED_MEMBERS = 8               # that are judged together
NEARLY = 1.04                     # how much larger a quicker method may make it
SAMPLE_BYTES = 16 << 10           # looked at to choose the method
GZIP_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
GZIP_EXTRA_HEADER = b"\x1f\x8b\x08\x04\x00\x00\x00\x00\x00\xff"
GZIP_EMPTY_BODY = b"\x03\x00" + bytes(8)
FOOTER_BYTES = 10 + 2 + 4 + 16 + len(GZIP_EMPTY_BODY)
MAX_FIELD_BYTES = 65535 - 4


class Table:
    """The table of contents of an archive."""

    def __init__(self, members: List[Tuple[int, int]], files: List[Tuple[str, int, int]]) -> None:
        self.members = members  # (compressed size, size) of each gzip member with data, from the start of the file
        self.files = files      # (name in the project, offset of its header in the tar, size)

    def encode(self) -> bytes:
        """The gzip members that hold it."""
        content = encode_json({"members": self.members, "files": self.files}, indent=None)
        packed = zlib.compress(content)
        fields = b"".join(_extra_member(packed[start:start + MAX_FIELD_BYTES])
                         for start in range(0, len(packed), MAX_FIELD_BYTES))
        start = sum(compressed for compressed, _ in self.members)
        return fields + _extra_member(start.to_bytes(8, "little") + len(fields).to_bytes(8, "little"))

    @classmethod
    def read(cls, read_range: Callable[[int, int], bytes], size: int) -> Optional[Table]:
        """The table of an archive of that size, or None where there is none that can be believed."""
        tail_start = max(0, size - 65536)
        tail = read_range(tail_start, size)
        field = _extra_field(tail[-FOOTER_BYTES:])
        if field is None or field[1] != FOOTER_BYTES or len(field[0]) != 16:
            return None
        start, length = int.from_bytes(field[0][:8], "little"), int.from_bytes(field[0][8:], "little")
        if start + length + FOOTER_BYTES != size:
            return None
        fields = tail[start - tail_start:-FOOTER_BYTES] if start >= tail_start else read_range(start, start + length)
        pieces, position = [], 0
        while position < len(fields):
            field = _extra_field(fields[position:position + 2 * 65536])
            if field is None:
                return None
            pieces.append(field[0])
            position += field[1]
        return cls._decode(b"".join(pieces), start)

    @classmethod
    def _decode(cls, packed: bytes, start: int) -> Optional[Table]:
        unpacker = zlib.decompressobj()
        try:
            content = json.loads(unpacker.decompress(packed, MAX_MEMBER_BYTES))
            members = [(int(compressed), int(size)) for compressed, size in content["members"]]
            files = [(str(name), int(offset), int(size)) for name, offset, size in content["files"]]
        except (zlib.error, ValueError, TypeError, KeyError, RecursionError, OverflowError):
            return None
        if sum(compressed for compressed, _ in members) != start:
            return None
        if not all(18 < compressed <= 2 * MAX_MEMBER_BYTES and 0 < size <= MAX_MEMBER_BYTES
                   for compressed, size in members):
            return None
        return cls(members, files)


def _extra_member(data: bytes) -> bytes:
    """An empty gzip member with data in its extra field."""
    return (GZIP_EXTRA_HEADER + (len(data) + 4).to_bytes(2, "little") + b"RV" + len(data).to_bytes(2, "little") + data +
            GZIP_EMPTY_BODY)


def _extra_field(data: bytes) -> Optional[Tuple[bytes, int]]:
    """(content, length of the member) of the member made by _extra_member at the start of data."""
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

    def add(self, size: int, parts: Sequence[bytes]) -> None:
        """Append one gzip member (given in parts) that holds size bytes of tar."""
        self.note(sum(map(len, parts)), size)
        write_all(self.file, b"".join(parts))

    def note(self, compressed: int, size: int) -> None:
        """Remember a member that is written by others."""
        self.table.members.append((compressed, size))
        self.position += compressed

    def finish(self) -> None:
        """Append the table, with which the file ends."""
        write_all(self.file, self.table.encode())
        self.file.truncate()


def pack(file: BinaryIO, archive_id: str, sources: Sequence[Source],
         warn: Callable[[str], None] = console.warning) -> ArchiveWriter:
    """Write the archive of sources to an unbuffered file: small files compressed, large ones as they are, which takes
    no longer than a copy and can be made good by recompress(). Raises OSError."""
    writer = ArchiveWriter(file)
    large = StoredFiles(writer, archive_id, [source for source in sources if source.size > GROUP_BYTES])
    large.store()
    for problem in large.problems:
        warn(problem)
    file.seek(writer.position)
    small = (source for source in sources if source.size <= GROUP_BYTES)
    for size, parts in workers().map(gzip_chunk, tar_chunks(archive_id, small, large.size, writer.table.files, warn)):
        writer.add(size, parts)
    writer.finish()
    return writer


class StoredFiles:
    """Large files that are stored in gzip members of their own, which several threads write."""

    def __init__(self, writer: ArchiveWriter, archive_id: str, sources: Sequence[Source]) -> None:
        self.size = 0                         # of their tar
        self.problems: List[str] = []
        self._cut_short: List[str] = []       # the names of files that have become shorter
        self._writer, self._archive_id, self._sources = writer, archive_id, sources
        self._target = writer.file.fileno()
        self._lock = threading.Lock()
        self._open: Dict[BinaryIO, int] = {}  # how many members of a file are not written yet

    def store(self) -> None:
        """Write them. Raises OSError."""
        if self._sources:
            reserve(self._target, sum(source.size for source in self._sources))
        try:
            workers().each(self._write, self._members())
        finally:
            for stream in self._open:
                stream.close()
        self.problems += ["%s became shorter while it was saved: zeros stand for the rest." % name for name in self._cut_short]

    def _members(self) -> Iterator[StoredMember]:
        for source in self._sources:
            try:
                stream = open(source.path, "rb", 0)
            except OSError as error:
                self.problems.append("%s is not saved: %s." % (source.name, short_reason(error)))
                continue
            header = tar_header(self._archive_id, source)
            padding = bytes(-source.size % 512)
            self._writer.table.files.append((source.name, self.size, source.size))
            self.size += len(header) + source.size + len(padding)
            starts = range(0, source.size, MEMBER_BYTES)
            self._open[stream] = len(starts)
            for start in starts:
                end = min(start + MEMBER_BYTES, source.size)
                member = StoredMember(source.name, stream, start, end, b"" if start else header,
                                      padding if end == source.size else b"", self._writer.position)
                self._writer.note(member.packed_size, member.size)
                yield member

    def _write(self, member: StoredMember) -> None:
        complete = member.write(self._target)
        with self._lock:
            if not complete and member.name not in self._cut_short:
                self._cut_short.append(member.name)
            self._open[member.stream] -= 1
            if not self._open[member.stream]:
                del self._open[member.stream]
                member.stream.close()


class StoredMember:
    """A part of a file that becomes a gzip member in which it stands as it is, in deflate blocks of STORED_BYTES."""

    def __init__(self, name: str, stream: BinaryIO, start: int, end: int, head: bytes, tail: bytes, position: int) -> None:
        self.name, self.stream = name, stream
        self.position = position             # of the member in the archive
        self._start = start                  # of the part in the file
        self._head, self._tail = head, tail  # bytes of the tar before and behind those of the file
        self.size = len(head) + end - start + len(tail)
        self.packed_size = stored_size(self.size)

    def write(self, target: int) -> bool:
        """Write the member to that descriptor; False if the file has become shorter, and zeros stand for the rest."""
        content = own_buffer(self.size)
        start, end = len(self._head), self.size - len(self._tail)
        content[:start], content[end:] = self._head, self._tail
        found = read_at(self.stream.fileno(), content[start:end], self._start)
        content[start + found:end] = bytes(end - start - found)
        write_at(target, stored_member(content), self.position)
        return found == end - start


def reserve(descriptor: int, size: int) -> None:
    """Make room on the disk for a file, which is quicker to write then, where the file system does so at once: other than
    fallocate(2), posix_fallocate(3) would fill the file with zeros on those that do not."""
    try:
        import ctypes
        function = ctypes.CDLL(None).fallocate
    except (ImportError, OSError, AttributeError, TypeError):  # no such system
        return
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    if ctypes.sizeof(ctypes.c_long) == 8:
        function(descriptor, 0, 0, size)


def stored_member(content: Any) -> List[Any]:
    """The parts of a gzip member that holds content as it is, in full stored blocks."""
    checksum, content = crc32(content), memoryview(content)
    parts: List[Any] = []
    for start, frame in zip(range(0, len(content), STORED_BYTES), stored_frames(len(content))):
        parts += [frame, content[start:start + STORED_BYTES]]
    parts.append(gzip_trailer(checksum, len(content)))
    return parts


def gzip_trailer(checksum: int, size: int) -> bytes:
    """What ends a gzip member whose content has that checksum and size."""
    return checksum.to_bytes(4, "little") + (size & 0xffffffff).to_bytes(4, "little")


def crc32(data: Any, start: int = 0) -> int:
    """zlib.crc32, by the quickest means."""
    addressable = len(data) >= STORED_BYTES and (type(data) is bytes or not memoryview(data).readonly)
    library = libdeflate() if addressable else None
    return library.crc32(data, start) if library else zlib.crc32(data, start)


def stored_frames(size: int) -> List[bytes]:
    """What stands before each stored block of size bytes: its header (RFC 1951, 3.2.4), and before the first that of
    the gzip member."""
    if size not in _frames:
        if len(_frames) > 16:
            _frames.clear()
        lengths = [min(STORED_BYTES, size - start) for start in range(0, size, STORED_BYTES)]
        frames = [b"\0" + length.to_bytes(2, "little") + (length ^ 0xffff).to_bytes(2, "little") for length in lengths]
        frames[-1] = b"\1" + frames[-1][1:]
        frames[0] = GZIP_HEADER + frames[0]
        _frames[size] = frames
    return _frames[size]


_frames: Dict[int, List[bytes]] = {}  # of sizes that were asked for: nearly all members are as large as can be


def stored_size(size: int) -> int:
    """The bytes of a gzip member that stores size bytes in full blocks."""
    return len(GZIP_HEADER) + size + 5 * -(-size // STORED_BYTES) + 8


_own = threading.local()  # what each thread has for itself


def own_buffer(size: int, purpose: str = "content") -> memoryview:
    """The buffer of this thread for that purpose: memory that is new for each use would cost as much time as copying."""
    if len(getattr(_own, purpose, b"")) < size:
        setattr(_own, purpose, page_buffer(max(size, MEMBER_BYTES + STORED_BYTES)))
    return getattr(_own, purpose)[:size]


def page_buffer(size: int) -> memoryview:
    """Memory that starts at a page, as what is read from a file does in the system's memory. Some processors copy four times
    as slowly to memory that starts 1 to 31 bytes behind that, as a bytearray's does (see glibc's bug 30994)."""
    import mmap
    return memoryview(mmap.mmap(-1, size, access=mmap.ACCESS_COPY))


_position_lock = threading.Lock()  # where the system cannot read and write at a position


def read_at(descriptor: int, view: memoryview, position: int) -> int:
    """Fill view from a place of a file; the number of bytes that were there."""
    found = 0
    while found < len(view):
        if hasattr(os, "preadv"):
            count = os.preadv(descriptor, [view[found:]], position + found)
        else:
            with _position_lock:
                os.lseek(descriptor, position + found, os.SEEK_SET)
                data = os.read(descriptor, len(view) - found)
            count = len(data)
            view[found:found + count] = data
        if not count:
            break
        found += count
    return found


def write_at(descriptor: int, parts: Sequence[Any], position: int) -> int:
    """Write buffers, at most 1,000, one behind the other to a place of a file; their length."""
    total = sum(map(len, parts))
    if hasattr(os, "pwritev"):
        written = os.pwritev(descriptor, parts, position)
        if written == total:
            return total
    else:
        written = 0
    rest = memoryview(b"".join(parts))[written:]
    with _position_lock:
        while rest:
            os.lseek(descriptor, position + total - len(rest), os.SEEK_SET)
            rest = rest[os.write(descriptor, rest):]
    return total


def shrinkable_members(archive: Archive) -> Dict[int, Deflate]:
    """How to compress the stored members that would become smaller, by number, going by samples of each few of them."""
    stored = [(number, start) for number, (start, compressed, size) in enumerate(archive.places())
              if compressed == stored_size(size)]
    found: Dict[int, Deflate] = {}
    for first in range(0, len(stored), SAMPLED_MEMBERS):
        group = stored[first:first + SAMPLED_MEMBERS]
        sample = b""
        for number, start in group[::SAMPLED_MEMBERS // 2]:
            start += len(GZIP_HEADER) + 5
            sample += archive.read_range(start, start + min(SAMPLE_BYTES // 2, archive.table.members[number][1], STORED_BYTES))
        deflate = chosen_method(sample)
        if deflate:
            found.update((number, deflate) for number, _ in group)
    return found


def recompress(reader: Archive, file: BinaryIO, methods: Dict[int, Deflate], check: Callable[[], Any]) -> None:
    """Write the archive that reader reads to another file, its members of those numbers compressed.

    check: called before each member; it raises what ends the work early. Raises OSError.
    """
    writer = ArchiveWriter(file)
    writer.table.files = reader.table.files

    def convert(item: Tuple[int, Tuple[int, int, int]]) -> Tuple[int, Sequence[bytes]]:
        number, (start, compressed, size) = item
        check()
        if number in methods:
            content = own_buffer(size)
            trailer = reader.read_stored(start, content)
            packed = methods[number](content) if trailer else b""
            if trailer and len(packed) < SHRINKS * size:
                return size, [GZIP_HEADER, packed, trailer]
        return size, [reader.read_range(start, start + compressed)]

    for size, parts in workers().map(convert, enumerate(reader.places())):
        writer.add(size, parts)
    writer.finish()


def tar_chunks(archive_id: str, sources: Iterable[Source], offset: int, files: List[Tuple[str, int, int]],
               warn: Callable[[str], None]) -> Iterator[bytes]:
    """The tar of small files from that offset on, in pieces that each become a gzip member; notes each file in `files`."""
    pending: List[bytes] = []
    waiting = 0
    for source in sources:
        try:
            with open(source.path, "rb", 0) as stream:
                data = stream.read(source.size)
                while len(data) < source.size:
                    more = stream.read(source.size - len(data))
                    if not more:
                        warn("%s became shorter while it was saved: zeros stand for the rest." % source.name)
                        more = bytes(source.size - len(data))
                    data += more
        except OSError as error:
            warn("%s is not saved: %s." % (source.name, short_reason(error)))
            continue
        if waiting and waiting + source.size > GROUP_BYTES:
            yield b"".join(pending)
            pending, waiting = [], 0
        files.append((source.name, offset, source.size))
        pending += [tar_header(archive_id, source), data, bytes(-source.size % 512)]
        added = sum(map(len, pending[-3:]))
        waiting += added
        offset += added
    yield b"".join(pending) + bytes(1024)


def tar_header(archive_id: str, source: Source) -> bytes:
    """The header blocks of a file, in GNU format, without its owner."""
    member = tarfile.TarInfo("%s/%s" % (archive_id, source.name))
    member.size, member.mode, member.mtime = source.size, source.mode, max(0, source.modified)
    return member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def gzip_chunk(data: bytes) -> Tuple[int, Sequence[bytes]]:
    """(size, parts of a gzip member): compressed if that pays, stored otherwise."""
    deflate = chosen_method(data if len(data) <= 2 * SAMPLE_BYTES else (
        data[len(data) // 4:][:SAMPLE_BYTES] + data[len(data) // 4 * 3:][:SAMPLE_BYTES]))
    if deflate is None:
        return len(data), stored_member(data)
    return len(data), [GZIP_HEADER, deflate(data), gzip_trailer(crc32(data), len(data))]


def chosen_method(sample: bytes) -> Optional[Deflate]:
    """The quickest method that makes a sample nearly as small as any; None if none pays."""
    methods = deflate_methods()
    sizes = [len(deflate(sample)) for deflate in methods]
    if min(sizes) >= SHRINKS * len(sample):
        return None
    return next(deflate for deflate, size in zip(methods, sizes) if size <= NEARLY * min(sizes))


def deflate_methods() -> List[Deflate]:
    """Functions that compress to deflate data (RFC 1951), the quickest first: libdeflate's, else some of zlib's."""
    library = libdeflate()
    if library:
        return [library.deflate]
    return [zlib_method(level, strategy) for level, strategy in (
        (1, zlib.Z_RLE), (1, zlib.Z_HUFFMAN_ONLY), (1, zlib.Z_DEFAULT_STRATEGY), (4, zlib.Z_DEFAULT_STRATEGY))]


def zlib_method(level: int, strategy: int) -> Deflate:
    """A way in which zlib compresses."""
    def deflate(data: Union[bytes, memoryview]) -> bytes:
        packer = zlib.compressobj(level, zlib.DEFLATED, -15, 8, strategy)
        return packer.compress(data) + packer.flush()

    return deflate


class LibDeflate:
    """The library of that name (see its libdeflate.h), which many systems have for their image libraries: it compresses
    twice as fast as zlib to the same size, and sums four times as fast. What others have written never gets to it."""

    NAMES = ("libdeflate.so.0", "libdeflate.0.dylib")
    LEVEL = 2  # about as small as zlib's level 4

    def __init__(self) -> None:
        """Raises ImportError, OSError or AttributeError where neither the system nor this Python's environment has it."""
        import ctypes
        self._ctypes = ctypes
        library: Any = None
        for name in self.NAMES + tuple(os.path.join(sys.prefix, "lib", name) for name in self.NAMES):
            try:
                library = ctypes.CDLL(name)
                break
            except OSError:
                continue
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._allocate = library.libdeflate_alloc_compressor
        self._allocate.restype, self._allocate.argtypes = pointer, [ctypes.c_int]
        self._bound = library.libdeflate_deflate_compress_bound
        self._bound.restype, self._bound.argtypes = size, [pointer, size]
        self._compress = library.libdeflate_deflate_compress
        self._compress.restype, self._compress.argtypes = size, [pointer, pointer, size, pointer, size]
        self._crc32 = library.libdeflate_crc32
        self._crc32.restype, self._crc32.argtypes = ctypes.c_uint32, [ctypes.c_uint32, pointer, size]

    def deflate(self, data: Union[bytes, memoryview]) -> bytes:
        """data as deflate data."""
        compressor = getattr(_own, "compressor", None)
        if compressor is None:  # one for each thread, which no other may use at the same time
            compressor = _own.compressor = self._allocate(self.LEVEL)
            if not compressor:
                raise MemoryError("libdeflate")
        target = own_buffer(self._bound(compressor, len(data)), "deflated")
        return bytes(target[:self._compress(compressor, self._address(data), len(data), self._address(target), len(target))])

    def crc32(self, data: Any, start: int = 0) -> int:
        """The checksum of zlib.crc32."""
        return self._crc32(start, self._address(data), len(data))

    def _address(self, data: Any) -> Any:
        """Where data is in memory, which must be writable or bytes."""
        return data if type(data) is bytes else self._ctypes.byref(self._ctypes.c_char.from_buffer(data))


def libdeflate() -> Optional[LibDeflate]:
    """The library, if it is there."""
    if not _libraries:
        try:
            _libraries.append(LibDeflate())
        except (ImportError, OSError, AttributeError):
            _libraries.append(None)
    return _libraries[0]


_libraries: List[Optional[LibDeflate]] = []  # looked for when first needed


def inflate_member(data: bytes, size: int) -> bytes:
    """The content of one gzip member that must hold exactly size bytes. Raises ReadError."""
    unpacker = zlib.decompressobj(31)
    try:
        content = unpacker.decompress(data, size + 1)
    except zlib.error as error:
        raise ReadError("it is damaged (%s)" % error) from error
    if not unpacker.eof or unpacker.unused_data or len(content) != size:
        raise ReadError("its table of contents is wrong")
    return content


class Archive:
    """A stored .tar.gz, ours or the peer's, opened for reading."""

    def __init__(self, storage: Storage, key: str) -> None:
        """Raises DoesNotExist, ReadError."""
        entry, self._open = storage.pin(key)
        self.size = entry.size
        self.is_local = storage.has_journals
        self.table = Table.read(self.read_range, self.size) if self.size > FOOTER_BYTES else None

    def read_range(self, start: int, end: int) -> bytes:
        """The bytes [start, end) of the archive. Raises ReadError."""
        with self._open(start, end) as stream:
            return read_fully(stream, end - start)

    def files(self, wanted: Callable[[str], bool], archive_id: str) -> Iterator[Tuple[TarMember, Iterator[Any]]]:
        """(member, pieces of its content) of each regular file whose name is wanted.

        The pieces of a file must be taken before the next file is asked for. Raises ReadError for every member that
        is no plain file or directory below `<archive_id>/`, and the errors of zlib and tarfile for a damaged archive:
        see reading_archive.
        """
        reader = TarReader(self.content())
        for member in reader.members():
            name = safe_name(member, archive_id)
            if not member.is_directory and wanted(name):
                yield TarMember(name, member.size, member.mode, False), reader.data()

    def copy_file(self, name: str, archive_id: str, target: BinaryIO) -> bool:
        """Write the one file of that name to target, read alone where the table allows it; False if there is none."""
        single = self.located(name, archive_id)
        found = False
        for _, pieces in [single] if single else self.files(lambda candidate: candidate == name, archive_id):
            target.seek(0)  # of several the last one counts, as in a checkout
            target.truncate()
            target.writelines(pieces)
            found = True
        return found

    def located(self, name: str, archive_id: str) -> Optional[Tuple[TarMember, Iterator[Any]]]:
        """(member, pieces) of the file of that name, if the table of contents leads to it."""
        entries = [entry for entry in self.table.files if entry[0] == name] if self.table else []
        if not entries:
            return None
        _, offset, size = entries[-1]
        try:
            reader = TarReader(self._content_at(offset, offset + size + 8192))
            member = next(iter(reader.members()), None)
            if member and not member.is_directory and safe_name(member, archive_id) == name:
                return TarMember(name, member.size, member.mode, False), reader.data()
        except (ReadError, zlib.error, tarfile.TarError, EOFError, ValueError):
            pass  # the table is wrong: the headers decide
        return None

    def _content_at(self, start: int, end: int) -> Iterator[bytes]:
        """Tar bytes from offset start to the end of the gzip member that holds offset end."""
        position = raw = 0
        first, skip, chosen, length = None, 0, [], 0
        for compressed, size in self.table.members:
            if position + size > start and position < end:
                if first is None:
                    first, skip = raw, start - position
                chosen.append((compressed, size))
                length += compressed
            position += size
            raw += compressed
        if first is None:
            raise ReadError("its table of contents is wrong")
        with self._open(first, first + length) as stream:
            for compressed, size in chosen:
                data = inflate_member(read_fully(stream, compressed), size)
                yield data[skip:]
                skip = 0

    def raw_members(self) -> Iterator[Tuple[int, bytes, int]]:
        """(number, compressed bytes, size) of each gzip member that the table names."""
        length = sum(compressed for compressed, _ in self.table.members)
        with self._open(0, length) as stream:
            for number, (compressed, size) in enumerate(self.table.members):
                yield number, read_fully(stream, compressed), size

    def content(self) -> Iterator[Any]:
        """The tar, decompressed, in order, in pieces that must be used before the next one is asked for: as far as the
        table proves right, several members at a time."""
        done = 0
        if self.table is not None:
            buffers: List[bytearray] = []  # those that are free
            inflated = (workers().map(lambda place: self._member(place, buffers), self.places()) if self.is_local else
                        workers().map(lambda item: (inflate_member(item[1], item[2]), None), self.raw_members()))
            for compressed, _ in self.table.members:
                try:
                    data, buffer = next(inflated)
                except ReadError:
                    break
                yield data
                if buffer is not None:
                    buffers.append(buffer)
                done += compressed
            else:
                return
        with self._open(done, self.size) as stream:
            pieces = gunzip(stream)
            yield from workers().ahead(pieces) if self.is_local else pieces  # nobody waits for a network that hangs

    def places(self) -> Iterator[Tuple[int, int, int]]:
        """(first byte, compressed size, size) of each gzip member that the table names."""
        start = 0
        for compressed, size in self.table.members if self.table else ():
            yield start, compressed, size
            start += compressed

    def _member(self, place: Tuple[int, int, int], buffers: List[bytearray]) -> Tuple[Any, Optional[bytearray]]:
        """(content, the buffer that it is in, if it is one of those) of the member there."""
        start, compressed, size = place
        if compressed == stored_size(size) and size <= MAX_STORED_BYTES:
            buffer = buffers.pop() if buffers else bytearray(MEMBER_BYTES + STORED_BYTES)
            if len(buffer) < size:
                buffer = bytearray(size)
            content = memoryview(buffer)[:size]
            if self.read_stored(start, content) == gzip_trailer(crc32(content), size):
                return content, buffer
        return inflate_member(self.read_range(start, start + compressed), size), None

    def read_stored(self, start: int, content: memoryview) -> Optional[bytes]:
        """Read a gzip member of an archive on disk as StoredMember writes it, its content into that memory; returns the
        checksum and size at its end, which are not checked, or None if it was not one."""
        frames = stored_frames(len(content))
        expected = b"".join(frames)
        found = memoryview(bytearray(len(expected) + 8))
        parts, position = [], 0
        for first, frame in zip(range(0, len(content), STORED_BYTES), frames):
            parts += [found[position:position + len(frame)], content[first:first + STORED_BYTES]]
            position += len(frame)
        with self._open(start, start + stored_size(len(content))) as stream:
            whole = stream.scatter(parts + [found[position:]])  # type: ignore[attr-defined]
        return bytes(found[position:]) if whole and found[:position] == expected else None


def read_fully(stream: BinaryIO, length: int) -> bytes:
    """Exactly length bytes; raises ReadError if the stream ends before."""
    data = stream.read(length)
    if len(data) < length:
        parts = [data]
        left = length - len(data)
        while left and data:
            data = stream.read(left)
            parts.append(data)
            left -= len(data)
        if left:
            raise ReadError("it is cut off")
        data = b"".join(parts)
    return data


def gunzip(stream: BinaryIO) -> Iterator[bytes]:
    """The content of a gzip file of one or more members, in pieces. Raises EOFError, zlib.error."""
    def more() -> bytes:
        piece = stream.read(PIECE_BYTES)
        if not piece:
            raise EOFError("it is cut off")
        return piece

    data = stream.read(PIECE_BYTES)
    while data:
        header = gzip_header_length(data)
        while header is None:
            data += more()
            header = gzip_header_length(data)
        data = data[header:]
        unpacker, checksum, size = zlib.decompressobj(-zlib.MAX_WBITS), 0, 0  # whose own checksum would be slow
        while not unpacker.eof:
            content = unpacker.decompress(data or more(), 4 * PIECE_BYTES)
            data = unpacker.unconsumed_tail
            if content:
                checksum, size = crc32(content, checksum), size + len(content)
                yield content
        data = unpacker.unused_data
        while len(data) < 8:
            data += more()
        if data[:8] != gzip_trailer(checksum, size):
            raise zlib.error("incorrect checksum")
        data = data[8:].lstrip(b"\0")
        while not data:  # zeros may stand behind a member
            data = stream.read(PIECE_BYTES)
            if not data:
                return
            data = data.lstrip(b"\0")


def gzip_header_length(data: bytes) -> Optional[int]:
    """The length of the gzip header (RFC 1952, 2.3) at the start of data; None if data is too short. Raises zlib.error."""
    if not data.startswith(GZIP_HEADER[:min(3, len(data))]) or len(data) > MAX_MEMBER_BYTES:
        raise zlib.error("incorrect header")
    if len(data) < 10:
        return None
    flags, position = data[3], 10
    if flags & 0xe0:
        raise zlib.error("incorrect header")
    if flags & 4:  # extra fields
        position += 2 + int.from_bytes(data[10:12], "little")
    for flag in (8, 16):  # a name and a comment
        if flags & flag:
            end = data.find(b"\0", position)
            if end < 0:
                return None
            position = end + 1
    position += flags & 2  # its checksum
    return position if position <= len(data) else None


class TarMember:
    """A header of a tar."""

    __slots__ = ("name", "size", "mode", "is_directory")

    def __init__(self, name: str, size: int, mode: int, is_directory: bool) -> None:
        self.name, self.size, self.mode, self.is_directory = name, size, mode, is_directory


class TarReader:
    """Members of an untrusted tar stream; anything but regular files and directories is a ReadError."""

    MAX_HEADER_BYTES = 1 << 20

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._buffer = memoryview(b"")
        self._left = 0     # bytes of the current member's content
        self._padding = 0  # and of the padding behind it

    def members(self) -> Iterator[TarMember]:
        """Each member; its content can be taken from data() before the next one is asked for."""
        overrides: Dict[str, str] = {}
        while True:
            self._skip()
            block = self._read(512)
            if not block:
                raise EOFError("it is cut off")
            if not block.strip(b"\0"):
                for _ in self._pieces:  # so that the checksum at the end is looked at
                    pass
                return
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            size = int(overrides.get("size", info.size))
            if size < 0:
                raise ReadError("it has a member of negative size")
            self._left, self._padding = size, -size % 512
            if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE):
                overrides.update(self._extended_header(info.type, size))
                continue
            name = overrides.get("path", info.name)
            if any(key.startswith("GNU.sparse") for key in overrides) or info.type not in (
                    tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
                raise ReadError("%s in it is no regular file or directory" % (escape_control(name) or "something"))
            is_directory = info.type == tarfile.DIRTYPE
            if is_directory:
                self._left = self._padding = 0
            overrides = {}
            yield TarMember(name, size, info.mode, is_directory)

    def data(self) -> Iterator[memoryview]:
        """The content of the current member in pieces."""
        while self._left:
            piece = self._take(self._left)
            if not piece:
                raise EOFError("it is cut off")
            self._left -= len(piece)
            yield piece

    def _extended_header(self, kind: bytes, size: int) -> Dict[str, str]:
        """What a GNU long name or a PAX header says of the next member."""
        if size > self.MAX_HEADER_BYTES:
            raise ReadError("it has a header of %d bytes" % size)
        content = b"".join([bytes(piece) for piece in self.data()])
        if kind == tarfile.GNUTYPE_LONGNAME:
            return {"path": content.rstrip(b"\0").decode("utf-8", "surrogateescape")}
        if kind == tarfile.XHDTYPE:
            return read_pax(content)
        return {}

    def _skip(self) -> None:
        """Pass over what was not read of the current member."""
        self._left += self._padding
        self._padding = 0
        for _ in self.data():
            pass

    def _take(self, limit: int) -> memoryview:
        """Some of the next bytes, at most limit; empty at the end."""
        while not self._buffer:
            piece = next(self._pieces, None)
            if piece is None:
                return self._buffer
            self._buffer = memoryview(piece)
        taken, self._buffer = self._buffer[:limit], self._buffer[limit:]
        return taken

    def _read(self, length: int) -> bytes:
        """Exactly length bytes, or none at the end. Raises EOFError."""
        parts = []
        while length:
            piece = self._take(length)
            if not piece:
                if parts:
                    raise EOFError("it is cut off")
                return b""
            parts.append(bytes(piece))  # the memory may be used again for the next piece
            length -= len(piece)
        return b"".join(parts)


def read_pax(content: bytes) -> Dict[str, str]:
    """The records of a PAX header ("<length> <key>=<value>\\n"; POSIX.1-2001). Raises ReadError."""
    records = {}
    while content:
        match = re.match(rb"(\d{1,7}) ([^=\n]+)=", content)
        length = int(match.group(1)) if match else 0
        if match is None or not match.end() < length <= len(content) or content[length - 1:length] != b"\n":
            raise ReadError("it has a malformed PAX header")
        key = match.group(2).decode("utf-8", "replace")
        value = content[match.end():length - 1].decode("utf-8", "surrogateescape")
        if key == "size" and not (value.isascii() and value.isdigit() and len(value) < 20):
            raise ReadError("it has a malformed PAX header")
        records[key] = value
        content = content[length:]
    return records


def safe_name(member: TarMember, archive_id: str) -> str:
    """The member's path in the project, or '' for its top directory. Raises ReadError for a dangerous one."""
    name = member.name
    parts = name.rstrip("/").split("/")
    if parts[0] != archive_id:
        raise ReadError("%s in it is not below the folder %s" % (escape_control(name), archive_id[:SHORT_ID]))
    for part in parts[1:]:
        if is_unsafe(part):
            raise ReadError("%s in it is no safe file name" % escape_control(name))
        if is_protected(part):
            raise ReadError("%s in it would be written into %s" % (escape_control(name), escape_control(part)))
    return "/".join(parts[1:])


def is_unsafe(part: str) -> bool:
    """Whether a path component means something else than a plain name on some system."""
    return (part in ("", ".", "..") or "\\" in part or "\0" in part or len(part) > 255
            or re.match(r"[A-Za-z]:", part) is not None)


def is_protected(part: str) -> bool:
    """Whether a path component names .git or .replicate on any file system (case, dots, ignorable characters)."""
    plain = re.sub("[\u200c-\u200f\u202a-\u202e\u206a-\u206f\ufeff]", "", part).lower().rstrip(". ").partition(":")[0]
    return plain in (".git", ".replicate", "git~1", "replic~1") or plain.startswith(STAGING_PREFIX)


def unpack_to(directory: str, files: Iterable[Tuple[TarMember, Iterator[Any]]],
              progress: Optional[Progress] = None) -> Dict[str, str]:
    """Write files below a private directory; returns {name: path written}. Raises ReadError, OSError."""
    written: Dict[str, str] = {}
    for member, pieces in files:
        path = os.path.join(directory, *member.name.split("/"))
        try:
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | BINARY | CLOEXEC, 0o600)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise ReadError("%s in it is both a file and a directory" % escape_control(member.name)) from error
        with os.fdopen(descriptor, "wb", 0) as file:
            for piece in pieces:
                write_all(file, piece)
                if progress:
                    progress.add(len(piece))
        os.chmod(path, member.mode & 0o755 | 0o600)
        written[member.name] = path
    return written


# ------------------------------------------------------------------------------------------------------------------
# 7  Repository: layout, documents, journals, find, remove, check out
# ------------------------------------------------------------------------------------------------------------------

EXPERIMENTS = "metadata/experiments/"
HEARTBEATS = "metadata/heartbeats/"
JOURNALS = "journals/"


def document_key(experiment_id: str) -> str:
    """Where an experiment's document is."""
    return "%s%s.json" % (EXPERIMENTS, experiment_id)


def heartbeat_key(experiment_id: str) -> str:
    """Where an experiment's heartbeat is."""
    return "%s%s.json" % (HEARTBEATS, experiment_id)


def archive_key(kind: str, item_id: str) -> str:
    """kind is 'experiments' or 'checkpoints'."""
    return "%s/%s.tar.gz" % (kind, item_id)


class ExperimentGone(ReplicateError):
    """The document of an experiment that is being recorded was removed."""


class Journal:
    """Checkpoints that are not in their experiment's document yet, a JSON line each; locked while its writer lives.

    `{"checkpoint": {...}}` adds one, `{"removed": "<id>"}` takes one out again. Its name is made of the experiment's
    ID and the time. A torn last line, left by a full disk or a killed process, is passed over.
    """

    def __init__(self, storage: DiskStorage, experiment_id: str) -> None:
        """Raises OSError."""
        self.key = "%s%s.%016x-%s.jsonl" % (JOURNALS, experiment_id, time.time_ns(), os.urandom(4).hex())
        self._lock = FileLock(storage.path(self.key), os.O_APPEND)
        self._lock.acquire()

    def append(self, line: bytes) -> None:
        """Add a line; it survives the death of the process from here on. Raises OSError."""
        data = b"\n" + line + b"\n"
        written = os.write(self._lock.descriptor, data)
        if written < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self, remove: bool) -> None:
        """Give it up: removed if its lines are in the document, else left for whoever comes next."""
        self._lock.release(remove)


def read_journal(data: bytes) -> Tuple[List[Dict[str, Any]], Set[str]]:
    """(checkpoints, IDs of those removed) of a journal."""
    added, removed, torn = [], set(), 0
    for line in data.split(b"\n"):
        if not line:
            continue
        try:
            record = decode_json(line, "journal")
            if "removed" in record:
                removed.add(str(record["removed"]))
            else:
                added.append(record["checkpoint"])
        except (ReadError, TypeError, KeyError):
            torn += 1
    if not _plainly_valid(added):
        found, added = added, []
        for item in found:
            try:
                added.append(checked_checkpoint(item))
            except (ReadError, AttributeError):
                torn += 1
    if torn:
        console.debug("Torn lines in a journal were passed over: %d." % torn)
    return added, removed


def merge_checkpoints(document: Dict[str, Any], journals: Iterable[bytes]) -> bool:
    """Apply journals to a document in place; whether that changed it."""
    added: Dict[str, Dict[str, Any]] = {}
    removed: Set[str] = set()
    for data in journals:
        some, gone = read_journal(data)
        added.update((item["id"], item) for item in some)
        removed |= gone
    present = document.get("checkpoints") or []
    known = {item["id"] for item in present}
    new = sorted((item for item in added.values() if item["id"] not in known and item["id"] not in removed),
                 key=lambda item: canonical_time(item["created"]))
    if new:
        document["checkpoints"] = present + new
    return bool(new)


class Repository:
    """Experiments and checkpoints in a storage; the layout is described in the README.

    pending: a repository on disk that holds what has not been sent to this one yet.
    """

    DECODED_BYTES = 64 << 10  # of documents that are decoded together: what is read of them still fits a processor's cache

    def __init__(self, url: str, storage: Optional[Storage] = None, pending: Optional[Repository] = None) -> None:
        self.url = url
        self.storage = storage or open_storage(url)
        self.pending = pending

    # -- the format version

    def check_version(self) -> bool:
        """Whether it has been written to. Raises IncompatibleRepositoryVersion, CorruptedRepositorySpec."""
        try:
            data = self.storage.read("repository.json")
        except DoesNotExist:
            return False
        try:
            version = decode_json(data, "repository.json")["version"]
            if type(version) is not int or version < 1:
                raise ReadError("its version is no number")
        except (ReadError, TypeError, KeyError) as error:
            raise CorruptedRepositorySpec("The file repository.json of %s is damaged: it should be {\"version\": 1}." %
                                          self.url) from error
        if version > REPOSITORY_VERSION:
            raise IncompatibleRepositoryVersion(
                "The repository %s has format version %d, and this Replicate (%s) knows %d: install a newer one." %
                (self.url, version, __version__, REPOSITORY_VERSION))
        return True

    def prepare(self) -> None:
        """Make it ready for recording. Raises what check_version raises, and WriteError."""
        exists = self.check_version()
        self.storage.prepare()
        if not exists:
            self.storage.write("repository.json", encode_json({"version": REPOSITORY_VERSION}, indent=None))

    # -- documents

    def create(self, document: Dict[str, Any]) -> DocumentText:
        """Store the document of a new experiment."""
        text = DocumentText(document)
        self.storage.write(document_key(document["id"]), text.text)
        return text

    def load(self, experiment_id: str) -> Dict[str, Any]:
        """The document of an experiment, with what is in its journals. Raises DoesNotExist, ReadError."""
        waiting = self._contents(self.journals().get(experiment_id, ()))  # first: they may be folded meanwhile
        try:
            data = self.storage.read(document_key(experiment_id))
        except DoesNotExist as error:
            raise DoesNotExist("Experiment %s does not exist in %s." %
                               (experiment_id[:SHORT_ID], self.url)) from error
        document = self._decode(data, experiment_id)
        merge_checkpoints(document, waiting)
        return document

    def experiments(self) -> List[Experiment]:
        """Every readable experiment with all of its checkpoints, oldest first."""
        waiting = self._waiting()
        found = list(map(Experiment, self.documents(self._entries(), waiting, console.warning)))
        return sorted(found, key=lambda experiment: (canonical_time(experiment._document["created"]), experiment.id))

    def summaries(self, shown: bool = False, tabulate: Optional[Tabulate] = None) -> SummaryList:
        """What a listing shows of every readable experiment, oldest first; only what changed is read again.

        shown: with what `ls --json` shows of each; tabulate: makes the table that will be asked for, if there are so many new
        documents that each of two processes reads a half of them and can finish its half of the table.
        """
        running, waiting = self.running(), self._waiting()
        entries = self._entries()
        cache = SummaryCache(self.url)
        shown = shown or self.storage.has_index  # which is made of it
        found = cache.take(entries, waiting, shown)
        extended = len(found) < cache.valid
        stale = [entry for entry in entries if entry.name[:-5] not in found] if len(found) < len(entries) else []
        index = None
        cache.unpublished += len(stale)
        if self.storage.has_index and cache.unpublished >= SummaryIndex.MIN_STALE:
            cache.unpublished = 0
            index = SummaryIndex(self.storage)
            found.update(index.take(stale, shown))
            stale = [entry for entry in entries if entry.name[:-5] not in found]
        rows, table = SummaryReader(self, waiting, cache, shown, None if found else tabulate).read(stale)
        found.update({row.id: row for row in rows})
        if index is not None and index.lacks(entries) >= max(SummaryIndex.MIN_STALE, len(entries) // 10):
            index.publish(self.storage, found.values())
        for experiment_id in running & found.keys():
            found[experiment_id].running = True
        ordered = sorted(found.values(), key=lambda row: row.line)
        if table is not None:
            cells = dict(zip(rows, table.cells))
            table.cells = [cells[row] for row in ordered]
        return SummaryList(ordered, cache, extended, table)

    def _waiting(self) -> Dict[str, List[bytes]]:
        """The contents of the journals by experiment; read before the documents, into which they may be folded."""
        return {experiment_id: self._contents(keys) for experiment_id, keys in self.journals().items()}

    def _entries(self) -> List[Entry]:
        """The documents in the storage; a warning for each file of another name."""
        found = list(self.storage.list(EXPERIMENTS))
        if {entry.name[64:] for entry in found} <= {".json"} and is_hex("".join([entry.name[:64] for entry in found])):
            return found  # as nearly always, and seen at once
        entries = []
        for entry in found:
            if entry.name[-5:] == ".json" and is_id(entry.name[:-5]):
                entries.append(entry)
            else:
                console.warning("Skipped the unreadable document %s: its name is not that of an experiment." %
                                escape_control(entry.key))
        return entries

    def documents(self, entries: Sequence[Entry], waiting: Dict[str, List[bytes]],
                  warn: Callable[[str], None]) -> Iterator[Dict[str, Any]]:
        """The readable documents of these entries, with their journals; a warning for each of the others."""
        def read(entry: Entry) -> Any:
            try:
                return self.storage.read(entry.key, entry)
            except ReplicateError as error:
                return error

        def skip(experiment_id: str, error: ReplicateError) -> None:
            warn("Skipped the unreadable document %s: %s." % (document_key(experiment_id), str(error).rstrip(".")))

        def decoded(group: Dict[str, bytes]) -> Iterator[Dict[str, Any]]:
            for experiment_id, document in decoded_experiments(group).items():
                if isinstance(document, ReadError):
                    skip(experiment_id, document)
                    continue
                if experiment_id in waiting:
                    merge_checkpoints(document, waiting[experiment_id])
                yield document

        group: Dict[str, bytes] = {}
        size = 0
        for entry, data in zip(entries, self.storage.in_parallel(read, entries)):
            if type(data) is bytes:
                group[entry.name[:-5]] = data
                size += len(data)
                if size >= self.DECODED_BYTES:
                    yield from decoded(group)
                    group, size = {}, 0
            elif not isinstance(data, DoesNotExist):  # removed since it was listed
                skip(entry.name[:-5], data)
        yield from decoded(group)

    def _decode(self, data: bytes, experiment_id: str) -> Dict[str, Any]:
        return checked_experiment(decode_json(data, "it"), experiment_id)

    # -- heartbeats

    def beat(self, experiment_id: str) -> None:
        """Mark an experiment as running now."""
        self.storage.write(heartbeat_key(experiment_id), encode_json(
            {"experiment_id": experiment_id, "last_heartbeat": timestamp()}, indent=None))

    def running(self) -> Set[str]:
        """The IDs of the experiments whose last heartbeat is recent."""
        return {entry.name[:-5] for entry in self.storage.list(HEARTBEATS)
                if entry.name.endswith(".json") and self._is_recent(entry)}

    def is_running(self, experiment_id: str) -> bool:
        """Whether the last heartbeat of an experiment is recent."""
        try:
            return self._is_recent(self.storage.stat(heartbeat_key(experiment_id)))
        except DoesNotExist:
            return False

    def _is_recent(self, entry: Entry) -> bool:
        """By the heartbeat's content on disk, by its own modification time and the server's clock on a bucket."""
        if not self.storage.has_journals:
            return entry.modified > time.time() + self.storage.clock_skew - HEARTBEAT_TIMEOUT
        try:
            beat = parse_time(decode_json(self.storage.read(entry.key), entry.key)["last_heartbeat"])
        except (ReplicateError, TypeError, KeyError, ValueError):
            return False
        return beat.timestamp() > time.time() - HEARTBEAT_TIMEOUT

    # -- journals

    def journals(self) -> Dict[str, List[str]]:
        """The keys of the journals of each experiment that has some."""
        found: Dict[str, List[str]] = {}
        for entry in self.storage.list(JOURNALS) if self.storage.has_journals else ():
            experiment_id, _, rest = entry.name.partition(".")
            if is_id(experiment_id) and rest.endswith(".jsonl"):
                found.setdefault(experiment_id, []).append(entry.key)
        return {experiment_id: sorted(keys) for experiment_id, keys in found.items()}  # oldest first

    def _contents(self, keys: Iterable[str]) -> List[bytes]:
        contents = []
        for key in keys:
            try:
                contents.append(self.storage.read(key))
            except ReplicateError:  # folded since it was listed
                continue
        return contents

    def fold(self, experiment_id: str, keys: Sequence[str], last: Optional[DocumentText] = None,
             more: bytes = b"") -> None:
        """Put the checkpoints in these journals, and in `more` lines of one, into the experiment's document.

        last: what the same caller wrote before, so that a document that nobody else changed need not be read again.
        Raises ExperimentGone if there is no document any more, WriteError, ReadError.
        """
        def change(old: Optional[bytes]) -> Optional[bytes]:
            if old is None:
                raise ExperimentGone("Experiment %s was removed from %s." % (experiment_id[:SHORT_ID], self.url))
            contents = self._contents(keys) + [more]
            if last is not None and last.text == old:
                return last.extended(contents)
            document = self._decode(old, experiment_id)
            changed = merge_checkpoints(document, contents)
            text = DocumentText(document)
            if last is not None:
                last.take_over(text)
            return text.text if changed else None

        self.storage.update(document_key(experiment_id), change)

    def fold_abandoned(self) -> None:
        """Fold the journals that killed processes left, where this repository may be written."""
        if not isinstance(self.storage, DiskStorage):
            return
        for experiment_id, keys in self.journals().items():
            for key in keys:
                lock = FileLock(self.storage.path(key), os.O_APPEND)
                try:
                    if not lock.acquire(wait=False):
                        continue
                except OSError:  # no permission to write: it is merged on every reading
                    return
                done = False
                try:
                    self.fold(experiment_id, [key])
                    done = True
                except (ExperimentGone, DoesNotExist):
                    done = True
                except ReplicateError as error:
                    console.debug("A journal could not be folded: %s" % error)
                finally:
                    lock.release(remove=done)

    # -- finding

    def find(self, prefix: str) -> Tuple[Experiment, Optional[Checkpoint]]:
        """The experiment or checkpoint whose ID starts with prefix (then with its experiment). Raises DoesNotExist."""
        return self.find_all([prefix])[0]

    def find_all(self, prefixes: Sequence[str]) -> List[Tuple[Experiment, Optional[Checkpoint]]]:
        """One experiment or checkpoint for each prefix; raises DoesNotExist for the first that fits none or several."""
        summaries: Optional[SummaryList] = None
        loaded: Dict[str, Experiment] = {}

        def load(experiment_id: str) -> Experiment:
            if experiment_id not in loaded:
                loaded[experiment_id] = Experiment(self.load(experiment_id))
            return loaded[experiment_id]

        found: List[Tuple[Experiment, Optional[Checkpoint]]] = []
        for prefix in prefixes:
            if len(prefix) == 64 and is_id(prefix):  # a whole ID, as `ls -q` prints it, need not be searched for
                try:
                    found.append((load(prefix), None))
                    continue
                except DoesNotExist:
                    pass
            if summaries is None:
                summaries = self.summaries()
                summaries.keep()
            candidates: List[Tuple[str, Experiment, Optional[Checkpoint]]] = []
            for summary in summaries if is_id(prefix) else ():
                if summary.id.startswith(prefix):
                    candidates.append((summary.id, load(summary.id), None))
                if summary.may_have_checkpoint(prefix):
                    experiment = load(summary.id)
                    candidates.extend((checkpoint.id, experiment, checkpoint) for checkpoint in experiment.checkpoints
                                      if checkpoint.id.startswith(prefix))
            candidates = [candidate for candidate in candidates if candidate[0] == prefix] or candidates
            if not candidates:
                raise DoesNotExist("Experiment or checkpoint not found: %s" % (prefix or "the ID is empty"))
            if len(candidates) > 1:
                kinds = ["%s %s" % ("checkpoint" if checkpoint else "experiment", item_id[:max(SHORT_ID, len(prefix) + 3)])
                         for item_id, _, checkpoint in candidates]
                raise DoesNotExist("The ID %s is ambiguous: it could be %s%s. Type more of it." % (
                    prefix, ", ".join(kinds[:5]), " and %d more" % (len(kinds) - 5) if len(kinds) > 5 else ""))
            found.append(candidates[0][1:])
        return found

    # -- removing

    def remove_experiment(self, experiment: Experiment) -> None:
        """Remove an experiment and all that belongs to it, its document last. Raises WriteError."""
        ids = [experiment.id] + [checkpoint.id for checkpoint in experiment.checkpoints]
        keys = [archive_key("checkpoints", item_id) for item_id in ids[1:]]
        keys += [archive_key("experiments", experiment.id), heartbeat_key(experiment.id)]
        if self.storage.has_journals:
            keys += self.journals().get(experiment.id, [])
            keys += self._temporary_keys(ids)
        self.storage.delete(keys)
        self.storage.remove(document_key(experiment.id))

    def remove_checkpoint(self, experiment: Experiment, checkpoint: Checkpoint) -> None:
        """Remove a checkpoint's files, then its entry in the document. Raises WriteError."""
        self.storage.delete([archive_key("checkpoints", checkpoint.id)] +
                            (self._temporary_keys([checkpoint.id]) if self.storage.has_journals else []))

        def change(old: Optional[bytes]) -> Optional[bytes]:
            if old is None:
                return None
            for key in self.journals().get(experiment.id, ()):
                self._append_removal(key, checkpoint.id)
            document = self._decode(old, experiment.id)
            document["checkpoints"] = [item for item in document.get("checkpoints") or ()
                                       if item["id"] != checkpoint.id]
            return encode_json(document)

        self.storage.update(document_key(experiment.id), change)

    def _append_removal(self, key: str, checkpoint_id: str) -> None:
        """Note in a journal that its checkpoint of that ID is not to be folded."""
        try:
            descriptor = os.open(self.storage.path(key), os.O_WRONLY | os.O_APPEND | CLOEXEC)  # type: ignore
        except FileNotFoundError:
            return
        try:
            os.write(descriptor, b"\n" + encode_json({"removed": checkpoint_id}, indent=None) + b"\n")
        finally:
            os.close(descriptor)

    def _temporary_keys(self, ids: Sequence[str]) -> List[str]:
        """What killed processes left in tmp/ of these experiments and checkpoints."""
        known = set(ids)
        return [entry.key for entry in self.storage.list("tmp/") if entry.name.partition(".")[0] in known
                and not entry.name.endswith(".lock")]

    # -- files

    def archive(self, kind: str, item_id: str) -> Archive:
        """The archive of an experiment or checkpoint. Raises DoesNotExist, ReadError."""
        if self.pending is not None:
            try:
                return self.pending.archive(kind, item_id)
            except DoesNotExist:
                pass
        return Archive(self.storage, archive_key(kind, item_id))

    def layers(self, experiment: Experiment, checkpoint: Optional[Checkpoint]) -> List[Tuple[str, str]]:
        """(kind, ID) of the archives that make up a checkout, the uppermost last."""
        found = [("experiments", experiment.id)] if experiment.path else []
        return found + ([("checkpoints", checkpoint.id)] if checkpoint and checkpoint.path else [])

    def open_file(self, experiment: Experiment, checkpoint: Optional[Checkpoint], path: str) -> BinaryIO:
        """A saved file as a binary file object: the checkpoint's, else the experiment's. Raises DoesNotExist."""
        import tempfile
        for kind, item_id in reversed(self.layers(experiment, checkpoint)):
            with reading_archive(self, kind, item_id):
                file = tempfile.TemporaryFile()
                if self.archive(kind, item_id).copy_file(path, item_id, file):
                    file.seek(0)
                    return file
                file.close()
        owner = checkpoint or experiment
        raise DoesNotExist("%s has no file %s." % (owner.short_id(), path))


class SummaryList(List[Summary] if TYPE_CHECKING else list):
    """Summaries, oldest first, and the cache that should remember them.

    header: the titles above the cells, if they are known for just these rows.
    """

    def __init__(self, rows: Iterable[Summary], cache: SummaryCache, extended: bool,
                 table: Optional[CellTable]) -> None:
        super().__init__(rows)
        self._cache = cache
        self._changed = not cache.valid == cache.count == len([row for row in self if row.version])
        self._extended = extended  # there is more to remember even of the same rows
        self._cells: Optional[List[str]] = None
        self.header: Optional[str] = None
        if table is not None:
            self.header, self._cells = table.header, table.cells
        elif not self._changed and cache.count == len(self):
            self.header = cache.header

    def cells(self) -> Iterable[str]:
        """What is known for each row, below the header."""
        return self._cache.cells() if self._cells is None else self._cells

    def keep(self, table: Optional[CellTable] = None) -> None:
        """Remember what is new, with the table of all rows, if it is given or was known."""
        if table is not None:
            self.header, self._cells = table.header, table.cells
        if not (self._changed or self._extended or table is not None):
            return
        rows = [row for row in self if row.version]
        if self.header is None or len(rows) < len(self):
            self._cache.write(rows, None, ())
        else:
            self._cache.write(rows, self.header, list(self.cells()))


class SummaryReader:
    """Reads the summaries of documents that no cache knows. If there are many, two processes take turns at groups of them, and
    each finishes the table of what it has read."""

    SHARED = 500               # documents from which on two processes read them,
    GROUP = 25                 # at least that many at a time

    def __init__(self, repository: Repository, waiting: Dict[str, List[bytes]], cache: SummaryCache, shown: bool,
                 tabulate: Optional[Tabulate]) -> None:
        self._repository, self._waiting, self._cache = repository, waiting, cache
        self._shown, self._tabulate = shown, tabulate
        self._groups: Dict[int, Sequence[Entry]] = {}  # that are to be read

    def read(self, entries: Sequence[Entry]) -> Tuple[List[Summary], Optional[CellTable]]:
        """The summaries, in no order, and the table of just those rows if two processes made it."""
        shared = len(entries) >= self.SHARED and self._repository.storage.has_journals and may_share_work()
        size = max(self.GROUP, len(entries) // 1000) if shared else SummaryCache.BATCH
        self._groups = dict(enumerate(entries[start:start + size] for start in range(0, len(entries), size)))
        if not shared:
            return self._rows(self._batches(list(self._groups), console.warning)), None
        turns = shared_turns(len(self._groups))
        wait = start_copy(lambda file: self._write(file, turns))
        batches = self._encoded_batches(turns, console.warning)
        rows = self._rows(batches)
        table = self._table(rows)
        file = wait()
        if file is None:
            return rows + self._rows(self._batches(list(self._groups), console.warning)), None
        warnings, of_table = json.loads(file.readline())
        for message in warnings:
            console.warning(message)
        cells, *places = encoded_places(file)
        rows += self._rows(StoredBatch(*place) for place in places)
        return rows, table and of_table and table.joined(CellTable(*of_table, read_part(*cells, 0)))

    def _write(self, file: BinaryIO, turns: Iterable[int]) -> None:
        """What the other process does: a line of JSON with its warnings and the head of its table, the cells, the batches."""
        warnings: List[str] = []
        batches = self._encoded_batches(turns, warnings.append)
        table = self._table(self._rows(batches))
        file.write(encode_json([warnings, table and [table.header, table.basis]], indent=None) + b"\n")
        file.write(encode_parts([table.cells if table else []]))
        file.writelines(batch.encoded() for batch in batches)

    def _encoded_batches(self, turns: Iterable[int], warn: Callable[[str], None]) -> List[SummaryBatch]:
        """All of _batches(), so far encoded that little is left to do when they are written."""
        batches = []
        for batch in self._batches(turns, warn):
            batch.encode_values()  # while the other process may still take turns from a slower one
            batches.append(batch)
        return batches

    def _batches(self, turns: Iterable[int], warn: Callable[[str], None]) -> Iterator[SummaryBatch]:
        """The summaries of the groups of these numbers, which are read now."""
        found: List[Tuple[Dict[str, Any], str]] = []
        for turn in turns:
            group = self._groups.pop(turn)
            versions = {entry.name[:-5]: self._cache.settled_version(entry, self._repository.storage) for entry in group}
            for document in self._repository.documents(group, self._waiting, warn):
                item_id = document["id"]
                found.append((summary_data(document), "" if item_id in self._waiting else versions[item_id]))
            if len(found) >= SummaryCache.BATCH:
                yield SummaryBatch.of(found, self._shown)
                found = []
        if found:
            yield SummaryBatch.of(found, self._shown)

    @staticmethod
    def _rows(batches: Iterable[SummaryBatch]) -> List[Summary]:
        return [row for batch in batches for row in batch.rows()]

    def _table(self, rows: Sequence[Summary]) -> Optional[CellTable]:
        return self._tabulate(rows) if self._tabulate and rows else None


class SummaryCache:
    """The summaries of a repository in a file of this user, each with the version of its document.

    A summary counts only if the document has just that version now, so that a stale cache costs time and never shows
    anything wrong. The file: a line of JSON, `{"unpublished": ..., "header": ..., "batches": ...}`; that many batches,
    see SummaryBatch; if there is a header, the right part of each row in the table of `ls`, oldest experiment first, as
    lists of texts. Batches and lists are encoded by encode_parts().
    """

    FORMAT = 4
    BATCH = 500                # rows that are kept together
    MAX_FILES = 64             # repositories in the cache directory
    SETTLED_SECONDS = 2.0      # a file changed more recently could change again without looking different

    def __init__(self, url: str) -> None:
        name = re.sub(r"[^A-Za-z0-9.-]+", "-", url)[-100:]
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        self._path = os.path.join(base, "replicate", "%s-%08x.%d" % (name, zlib.crc32(os.fsencode(url)), self.FORMAT))
        self._listed = time.time()
        self._batches: List[StoredBatch] = []
        self._cells: List[Tuple[BinaryIO, int, List[int]]] = []
        self.unpublished = 0               # documents read since the index of the bucket was looked at
        self.header: Optional[str] = None  # what stands above the cells
        self.count = 0                     # of the rows in the file
        self.valid = 0                     # and of those whose documents are as they were
        try:
            file = open(self._path, "rb")
            first = json.loads(file.readline())
            places = list(encoded_places(file))
            self._batches = [StoredBatch(*place) for place in places[:first["batches"]]]
            self._cells = places[first["batches"]:]
            self.unpublished, self.header = int(first["unpublished"]), first["header"]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            console.debug("The cache cannot be used: %s" % error)

    def take(self, entries: Sequence[Entry], waiting: Dict[str, List[bytes]], shown: bool) -> Dict[str, Summary]:
        """The summaries of those entries whose version is known, and that have no journal; shown: and have that part."""
        found: Dict[str, Summary] = {}
        if not self._batches:
            return found
        versions = {entry.name[:-5]: entry.version for entry in entries}
        for experiment_id in waiting:
            versions.pop(experiment_id, None)
        for batch in self._batches:
            rows = batch.rows()
            self.count += len(rows)
            for row in rows:
                if versions.get(row.id) == row.version:
                    self.valid += 1
                    if not shown or row.part("shown"):
                        found[row.id] = row
        return found

    def cells(self) -> Iterator[str]:
        """The right part of each row in the table of `ls`, oldest experiment first."""
        for file, start, lengths in self._cells:
            yield from read_part(file, start, lengths, 0)

    def settled_version(self, entry: Entry, storage: Storage) -> str:
        """The version under which a summary of that document may be remembered; none if the file is too young."""
        if storage.has_journals and entry.modified >= self._listed - self.SETTLED_SECONDS:
            return ""
        return entry.version

    def write(self, rows: Sequence[Summary], header: Optional[str], cells: Sequence[str]) -> None:
        """Put these rows into the file; one that cannot be written is left alone."""
        members = by_batch(rows)
        whole = [batch for batch, found in members.items() if len(found) == len(batch.part("lines")) > self.BATCH // 2]
        others = [row for row in rows if row.batch not in set(whole)]
        groups = [others[start:start + self.BATCH] for start in range(0, len(others), self.BATCH)]
        first = {"unpublished": self.unpublished, "header": header, "batches": len(whole) + len(groups)}
        directory = os.path.dirname(self._path)
        temporary = "%s.%s" % (self._path, os.urandom(6).hex())
        try:
            os.makedirs(directory, 0o700, exist_ok=True)
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(encode_json(first, indent=None) + b"\n")
                file.writelines(batch.encoded() for batch in whole)
                file.writelines(SummaryBatch.of_rows(group).encoded() for group in groups)
                file.writelines(encode_parts([cells[start:start + self.BATCH]])
                                for start in range(0, len(cells), self.BATCH))
            os.replace(temporary, self._path)
            files = sorted(os.scandir(directory), key=lambda entry: entry.stat().st_mtime)
            for entry in files[:-self.MAX_FILES]:
                remove_file(entry.path)
        except OSError as error:
            remove_file(temporary)
            console.debug("The cache cannot be written: %s" % error)


class StoredBatch(SummaryBatch):
    """A batch in a file, of which each part is read when it is asked for, and each value parsed."""

    def __init__(self, file: BinaryIO, start: int, lengths: List[int]) -> None:
        super().__init__({}, {})
        self._place = file, start, lengths

    def part(self, name: str) -> List[str]:
        if name not in self._parts:
            self._parts[name] = read_part(*self._place, self.PARTS.index(name))
        return self._parts[name]

    def encoded(self) -> bytes:
        file, start, lengths = self._place
        file.seek(start)
        return _with_lengths(lengths, file.read(sum(lengths)))

    def _index(self) -> Dict[str, Dict[str, Tuple[int, Optional[List[int]]]]]:
        """For each group and name the number of its column's text, and the positions of the values if not all have one."""
        if not self._columns:
            number = 0
            for group, found in json.loads(self.part("values")[0]).items():
                self._columns[group] = {name: (number, positions) for number, (name, positions)
                                        in enumerate(found.items(), number + 1)}
                number += len(found)
        return self._columns

    def names(self, group: str) -> Iterable[str]:
        return self._index()[group]

    def column(self, group: str, name: str, positions: Optional[Sequence[int]] = None) -> List[Any]:
        number, owners = self._index()[group].get(name, (0, []))
        text = self.part("values")[number] if number else ""
        are_floats = text[:1] == "d"
        values: List[Any] = list(struct.unpack("<%dd" % (len(text) // 16), bytes.fromhex(text[1:]))) if are_floats \
            else text.split("\n")
        if owners is not None:
            known = dict(zip(owners, values))
            values = [known.get(position, ABSENT) for position in (self.all_positions() if positions is None else positions)]
        elif positions is not None:
            values = list(map(values.__getitem__, positions))
        if are_floats:
            return values
        if owners is None:
            return json.loads("[%s]" % ",".join(values))
        present = iter(json.loads("[%s]" % ",".join([value for value in values if value is not ABSENT])))
        return [value if value is ABSENT else next(present) for value in values]


def encoded_places(file: BinaryIO) -> Iterator[Tuple[BinaryIO, int, List[int]]]:
    """Where encode_parts() put what stands in file from here on: (file, start, bytes of each list). Raises ValueError
    where it is damaged."""
    buffer = bytearray()
    for line in iter(file.readline, b""):
        lengths, checksum = json.loads(line)
        start, size = file.tell(), sum(lengths)
        if len(buffer) < size:
            buffer = bytearray(size)
        with memoryview(buffer)[:size] as content:
            if file.readinto(content) != size or zlib.crc32(content) != checksum:
                raise ValueError("it is damaged")
        yield file, start, lengths


def read_part(file: BinaryIO, start: int, lengths: Sequence[int], index: int) -> List[str]:
    """One of the lists of texts at such a place."""
    file.seek(start + sum(lengths[:index]))
    return file.read(lengths[index]).decode("utf-8", "surrogatepass").split("\0")


class SummaryIndex:
    """The summaries that stand in a bucket, from which a machine that has never listed it starts.

    It has one line for each experiment: `<ID> <version> <JSON>`. What is in it was written by others, and is checked
    like their documents.
    """

    KEY = "index/summaries-1.gz"
    MIN_STALE = 100            # changed documents from which on the object is read or written
    MAX_BYTES = 512 << 20      # when unpacked

    def __init__(self, storage: Storage) -> None:
        try:
            data = b"".join(_limited(gunzip(storage.open(self.KEY)), self.MAX_BYTES))
        except (ReplicateError, EOFError, zlib.error):  # there is none, or it cannot be used
            data = b""
        self._lines = {line[:line.find(b" {")]: line for line in data.split(b"\n") if b" {" in line}

    def take(self, entries: Iterable[Entry], shown: bool) -> Dict[str, Summary]:
        """The summaries of those entries whose version is known."""
        valid = []
        for entry in entries:
            line = self._lines.get(self._key(entry.name[:-5], entry.version))
            if line is not None:
                try:
                    data = decode_json(line[line.find(b"{"):], "a summary")
                    valid.append((checked_summary(data, entry.name[:-5]), entry.version))
                except (ReadError, KeyError, TypeError, AttributeError):
                    continue
        return {row.id: row for row in SummaryBatch.of(valid, shown).rows()}

    def lacks(self, entries: Iterable[Entry]) -> int:
        """Of how many of these entries it does not have the present version."""
        return sum(self._key(entry.name[:-5], entry.version) not in self._lines for entry in entries)

    def publish(self, storage: Storage, rows: Iterable[Summary]) -> None:
        """Write the object for others; without permission to write there is none."""
        lines = []
        for row in rows:
            data = json.loads(row.part("shown") + "}")
            data.update(primary_metric=row.fact("primary_metric"), checkpoint_ids=row.part("checkpoints"))
            lines.append(b"%s %s" % (self._key(row.id, row.version), encode_json(data, indent=None)))
        packer = zlib.compressobj(6, zlib.DEFLATED, 31)
        try:
            storage.write(self.KEY, packer.compress(b"\n".join(lines)) + packer.flush())
        except ReplicateError as error:
            console.debug("The index was not written: %s" % error)

    @staticmethod
    def _key(experiment_id: str, version: str) -> bytes:
        """What a line starts with."""
        return ("%s %s" % (experiment_id, version)).encode("utf-8", "replace")


def _limited(pieces: Iterable[bytes], limit: int) -> Iterator[bytes]:
    """pieces, up to a total length; raises ReadError beyond it."""
    for piece in pieces:
        limit -= len(piece)
        if limit < 0:
            raise ReadError("it is too large")
        yield piece


class DocumentText:
    """An experiment document as written, to which checkpoints can be added without encoding the others again."""

    TAIL = b"\n ]\n}"

    def __init__(self, document: Dict[str, Any]) -> None:
        ordered = {key: value for key, value in document.items() if key != "checkpoints"}
        ordered["checkpoints"] = document.get("checkpoints")
        self.ids = {item["id"] for item in document.get("checkpoints") or ()}
        self.text = encode_json(ordered)

    def extended(self, journals: Iterable[bytes]) -> Optional[bytes]:
        """The text with the checkpoints of these journals added; None if there is nothing to add."""
        document: Dict[str, Any] = {"checkpoints": [{"id": item_id} for item_id in self.ids]}
        if not merge_checkpoints(document, journals):
            return None
        new = document["checkpoints"][len(self.ids):]
        lines = ",".join(["\n  " + indented_json(item, "\n  ", " ") for item in new]).encode("utf-8", "backslashreplace")
        if self.ids:
            self.text = self.text[:-len(self.TAIL)] + b"," + lines + self.TAIL
        else:
            self.text = self.text[:self.text.rindex(b": ")] + b": [" + lines + self.TAIL
        self.ids.update(item["id"] for item in new)
        return self.text

    def take_over(self, other: DocumentText) -> None:
        """Become the same as other."""
        self.text, self.ids = other.text, other.ids


class reading_archive:
    """A context in which what is wrong with an archive becomes a ReadError that names it."""

    def __init__(self, repository: Repository, kind: str, item_id: str) -> None:
        self.repository, self.name = repository, "%s %s" % (kind[:-1], item_id[:SHORT_ID])

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, DoesNotExist):
            raise DoesNotExist("The files of %s are gone from %s: its archive is not there." %
                               (self.name, self.repository.url)) from error
        if isinstance(error, (ReadError, EOFError, UnicodeError, ValueError, OverflowError, tarfile.TarError, zlib.error)):
            raise ReadError("The archive of %s in %s cannot be used: %s." %
                            (self.name, self.repository.url, short_reason(error).rstrip("."))) from error


class Checkout:
    """Files on their way from archives into a directory: staged in a private folder inside it, then moved."""

    def __init__(self, directory: str) -> None:
        self.directory = os.path.abspath(directory)
        self._new: List[str] = []  # directories that are made for it
        folder = self.directory
        while not os.path.lexists(folder):
            self._new.append(folder)
            folder = os.path.dirname(folder)
        self._staging = ""
        self.files: Dict[str, str] = {}  # name -> staged file

    def __enter__(self) -> Checkout:
        import tempfile
        try:
            os.makedirs(self.directory, exist_ok=True)
            self._remove_leftovers()
            self._staging = tempfile.mkdtemp(prefix="%s%d-" % (STAGING_PREFIX, os.getpid()), dir=self.directory)
        except OSError as error:
            raise WriteError("%s cannot be written: %s." % (self.directory, short_reason(error))) from error
        return self

    def __exit__(self, *exc_info: Any) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)
        for folder in self._new:
            try:
                os.rmdir(folder)  # only if it is still empty
            except OSError:
                break

    def _remove_leftovers(self) -> None:
        """Remove the staging folders of processes that were killed."""
        with os.scandir(self.directory) as entries:
            for entry in entries:
                pid = entry.name[len(STAGING_PREFIX):].partition("-")[0]
                if entry.name.startswith(STAGING_PREFIX) and pid.isdigit() and not entry.is_symlink():
                    if not process_is_alive(int(pid)):
                        shutil.rmtree(entry.path, ignore_errors=True)

    def stage(self, repository: Repository, layers: Sequence[Tuple[str, str]], path: Optional[str],
              quiet: bool) -> None:
        """Unpack the wanted files (all, or those at or below path) of archives, later ones over earlier ones.

        Raises DoesNotExist where an archive or path is not there, ReadError, WriteError.
        """
        names: List[str] = []

        def wanted(name: str) -> bool:
            names.append(name)
            return path is None or name == path or name.startswith(path + "/")

        archives = []
        for kind, item_id in layers:
            with reading_archive(repository, kind, item_id):
                archives.append(repository.archive(kind, item_id))
        with Progress("Checking out", sum(archive.size for archive in archives), quiet) as progress:
            for number, (archive, (kind, item_id)) in enumerate(zip(archives, layers)):
                folder = os.path.join(self._staging, str(number))
                try:
                    with reading_archive(repository, kind, item_id):
                        single = archive.located(path, item_id) if path else None
                        files = [single] if single else archive.files(wanted, item_id)
                        self.files.update(unpack_to(folder, files, progress))
                except OSError as error:
                    raise WriteError("The files could not be written below %s: %s." %
                                     (self.directory, short_reason(error))) from error
        if not self.files:
            raise DoesNotExist("There is no file or directory %s in it.%s" % (path, nearest(path, names)) if path
                               else "No file is saved in it.")

    def check_target(self) -> None:
        """Raises WriteError where a staged file cannot be moved into place safely."""
        for name in self.files:
            parts = name.split("/")
            for depth in range(1, len(parts)):
                parent = os.path.join(self.directory, *parts[:depth])
                if os.path.islink(parent) or (os.path.lexists(parent) and not os.path.isdir(parent)):
                    raise WriteError("%s is in the way of %s: it is %s. Nothing was changed." % (
                        escape_control(parent), escape_control(name), "a link" if os.path.islink(parent) else "no directory"))
            target = os.path.join(self.directory, *parts)
            if os.path.isdir(target) and not os.path.islink(target):
                raise WriteError("%s is in the way: it is a directory. Nothing was changed." % escape_control(target))

    def drop_foreign_configs(self) -> None:
        """Leave out each configuration that would make its directory use another repository; says so."""
        for name in [name for name in self.files if name.rpartition("/")[2] in CONFIG_NAMES]:
            folder = os.path.join(self.directory, *name.split("/")[:-1])
            current = _configured_url(folder)
            if current is not None and _configured_url(folder, self.files[name]) != current:
                console.warning("%s is left as it is: the saved one names another repository." %
                                escape_control(os.path.join(folder, name.rpartition("/")[2])))
                del self.files[name]

    def conflicts(self) -> List[str]:
        """The names of existing files that would get other content."""
        found = []
        for name, staged in sorted(self.files.items()):
            target = os.path.join(self.directory, *name.split("/"))
            if os.path.lexists(target) and (os.path.islink(target) or not same_content(staged, target)):
                found.append(name)
        return found

    def move(self) -> None:
        """Move every staged file into place. Raises WriteError; files moved before stay whole."""
        for name, staged in sorted(self.files.items()):
            target = os.path.join(self.directory, *name.split("/"))
            try:
                os.makedirs(os.path.dirname(target), exist_ok=True)
                os.replace(staged, target)
            except OSError as error:
                raise WriteError("%s could not be replaced: %s. Run the checkout again to finish it." %
                                 (target, short_reason(error))) from error


def _configured_url(directory: str, config: Optional[str] = None) -> Optional[str]:
    """The repository that a directory's configuration (or this one in its place) or default names; '' if unreadable."""
    if config is None:
        config = _search_upward(directory, CONFIG_NAMES, 1)
        if config is None:
            storage = os.path.join(directory, DEFAULT_STORAGE)
            return "file://" + storage if os.path.exists(storage) else None
    try:
        return absolute_url(read_config(config)["repository"], directory)
    except RepositoryConfigurationError:
        return ""


def same_content(left: str, right: str) -> bool:
    """Whether two files hold the same bytes."""
    try:
        if os.path.getsize(left) != os.path.getsize(right):
            return False
        with open(left, "rb") as one, open(right, "rb") as other:
            while True:
                piece = one.read(1 << 20)
                if piece != other.read(1 << 20):
                    return False
                if not piece:
                    return True
    except OSError:
        return False


def process_is_alive(pid: int) -> bool:
    """Whether a process of this machine exists."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


# ------------------------------------------------------------------------------------------------------------------
# 8  Recorder: snapshots, journal, sending, signals
# ------------------------------------------------------------------------------------------------------------------

FOLD_INTERVAL = 1.0     # seconds between two writings of a document, at least
FOLD_SHARE = 50         # and at least so many times as long as the last one took,
MAX_FOLD_INTERVAL = 10  # but at most this
MAX_PACKING = 2         # archives that wait for compression before checkpoint() waits too
TERMINATION_SECONDS = 10.0
JOIN_SECONDS = 2.0      # that a heartbeat under way may take at the end

MAX_STEP = (1 << 63) - 1
SECRET_NAMES = ("token", "api-key", "password", "passwd", "secret", "secret-key", "access-key", "access-token",
                "auth-token", "api-token", "hf-token", "client-secret")
SECRET_SHAPES = (r"\b(?:(?:AKIA|ASIA)[0-9A-Z]{16}|hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|"
                 r"github_pat_[A-Za-z0-9_]{20,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}|sk-[\w-]{16,})")


def masked_command(arguments: Sequence[str]) -> str:
    """Arguments as one shell-quoted line, with `***` in place of secrets."""
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
    """sys.argv; the program's path is relative to the project directory if it lies in it."""
    arguments = list(getattr(sys, "argv", [])) or [""]
    return [inner_path(arguments[0], directory)] + arguments[1:]


def inner_path(path: str, directory: str) -> str:
    """An absolute path inside the directory made relative to it; any other path as it is."""
    relative = os.path.relpath(path, directory) if os.path.isabs(path) else os.pardir
    return path if relative.split(os.sep)[0] == os.pardir else relative


# How to run a program again: with the interpreter or launcher that ran it, as a line to paste in the project directory.

try:
    START_DIRECTORY = os.getcwd()  # a script may change it later, as Hydra does
except OSError:  # it was removed
    START_DIRECTORY = os.sep
LAUNCHERS = r"python[\d.]*|uv|mpirun|mpiexec|orterun|prterun"  # torchrun, accelerate and the like are Python programs


def rerun_command(directory: str) -> Optional[str]:
    """The shell command that runs this program again from the project directory, with `***` in place of secrets.

    None where there is no such command: in an interactive session, a notebook, or after `python -c`.
    """
    words = process_words("self") or [sys.executable] + list(getattr(sys, "argv", []))
    start = program_index(words)
    if start is None and os.path.isfile(sys.argv[0] if getattr(sys, "argv", None) else ""):  # multiprocessing: python -c
        words = [words[0]] + sys.argv
        start = 1
    if start is None or "ipykernel" in sys.modules:
        return None
    parent, program = process_words(os.getppid()), words[start:]
    if parent[-len(program):] == program and re.fullmatch(LAUNCHERS, os.path.basename(parent[0])):
        words = parent
    command = masked_command(typed_words(words))
    place = inner_path(START_DIRECTORY, directory)
    return command if place == os.curdir else "cd %s && %s" % (shlex.quote(place), command)


def process_words(process: Union[int, str]) -> List[str]:
    """The command line of a process, or of this one ("self"); empty where the system does not tell."""
    words = getattr(sys, "orig_argv", None) if process == "self" else None
    if words:
        return list(words)
    try:
        with open("/proc/%s/cmdline" % process, "rb") as file:
            return os.fsdecode(file.read()).split("\0")[:-1]
    except OSError:
        return []


def program_index(words: Sequence[str]) -> Optional[int]:
    """The position of the script or `-m` on Python's command line; None for `-c`, standard input or no program."""
    index = 1
    while index < len(words) and re.match(r"-[^-cm]|--.", words[index]):
        index += 2 if words[index] in ("-X", "-W", "--check-hash-based-pycs") else 1
    return index if index < len(words) and not re.match(r"-(c|$)", words[index]) else None


def typed_words(words: Sequence[str]) -> List[str]:
    """A command line as somebody types it: `torchrun train.py` for `/usr/bin/python3 /usr/bin/torchrun train.py`."""
    typed = [typed_path(words[0]), *words[1:]]
    start = program_index(words) if re.match("python", os.path.basename(words[0])) else None
    if start is not None:
        typed[start] = typed_path(words[start])
        if shutil.which(typed[start]) == words[start]:
            return typed[start:]
    return typed


def typed_path(path: str) -> str:
    """The name of a program on the search path; else its path, relative to the working directory if it lies in it."""
    name = os.path.basename(path)
    return name if os.path.isabs(path) and shutil.which(name) == path else inner_path(path, START_DIRECTORY)


def installed_packages() -> Dict[str, str]:
    """Version by normalized name (PEP 503) of every distribution on the module path, read off the folders' names."""
    found: Dict[str, str] = {}
    for directory in sys.path:
        try:
            names = os.listdir(directory or ".")
        except OSError:
            continue
        for name in names:
            match = re.fullmatch(r"([\w.]+(?:-[\w.]+)*?)-(\d[\w.!+]*)(?:-py[\d.]+)?\.(?:dist-info|egg-info)", name)
            if match:
                found.setdefault(re.sub(r"[-_.]+", "-", match.group(1)).lower(), match.group(2))
    return dict(sorted(found.items()))


def user_name() -> Optional[str]:
    """The login name, from the environment or the password database."""
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        if os.environ.get(variable):
            return os.environ[variable]
    try:
        import pwd
        return pwd.getpwuid(os.getuid()).pw_name
    except (ImportError, KeyError):
        return None


def checked_params(params: Any, unknown: List[str]) -> Dict[str, Any]:
    """params as they are stored; the names of those that have no plain form, but become text, are added to `unknown`.

    Raises TypeError if they are no mapping.
    """
    try:
        fields = {} if params is None else fields_of(params)
    except Exception:  # whatever the object does when somebody looks at it
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
    except Exception as error:  # whatever the object does when somebody looks at it
        raise TypeError("%s is a %s, which cannot be read: %s" % (where, type(value).__name__,
                                                                  short_reason(error))) from error
    return plain


def new_document(location: Location, path: Optional[str], params: Dict[str, Any]) -> Dict[str, Any]:
    """The document of an experiment that starts now."""
    return {"id": new_id(), "created": timestamp(), "params": params, "host": platform.node(), "user": user_name(),
            "config": {"repository": location.url, "storage": ""},
            "command": masked_command(program_arguments(location.directory)),
            "full_command": rerun_command(location.directory), "path": path,
            "python_version": platform.python_version(), "python_packages": installed_packages(),
            "replicate_version": __version__, "checkpoints": []}


def new_checkpoint(path: Optional[str], step: int, metrics: Dict[str, Any],
                   primary_metric: Optional[Dict[str, str]], after: str) -> Dict[str, Any]:
    """The document of a checkpoint made now, or just after the time `after` if the clock stands still or goes back."""
    created = timestamp()
    if created <= after:
        created = timestamp(parse_time(after).timestamp() + 2e-6)
    return {"id": new_id(), "created": created, "metrics": metrics, "step": step, "path": path,
            "primary_metric": primary_metric}


def save_archive(storage: DiskStorage, kind: str, item_id: str, sources: Sequence[Source]) -> bool:
    """Store the archive of sources; whether some of them are large, so that shrink_archive() should look at it later.

    It takes no longer than a plain copy. Raises WriteError.
    """
    _write_archive(storage, archive_key(kind, item_id), lambda file: pack(file, item_id, sources))
    return any(source.size > GROUP_BYTES for source in sources)


def shrink_archive(storage: DiskStorage, kind: str, item_id: str) -> None:
    """Replace a stored archive by a compressed one if that is smaller. Raises WriteError, ReadError, DoesNotExist."""
    key = archive_key(kind, item_id)
    archive = Archive(storage, key)
    shrinkable = shrinkable_members(archive)
    if shrinkable:
        _write_archive(storage, key, lambda file: recompress(archive, file, shrinkable, lambda: storage.stat(key)),
                       replace=True)


def _write_archive(storage: DiskStorage, key: str, write: Callable[[BinaryIO], Any], replace: bool = False) -> Any:
    path = storage.temporary(key.rpartition("/")[2])
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "xb", 0) as file:
            result = write(file)
        if replace:
            storage.stat(key)  # whoever removed it meanwhile wants it gone
        storage.move_in(path, key)
        return result
    except OSError as error:
        raise storage.write_failure(key, error) from error
    finally:
        remove_file(path)


# What is recorded for a bucket is first a repository of its own on disk, the pending area, from which it is sent.

PENDING = os.path.join(".replicate", "pending")
SENT_KEY = "replicate_sent"     # in a pending document: the bucket has it, so that it is not created again
REACH_SECONDS = 5.0             # that init() gives an unreachable bucket
SMALL_UPLOAD_BYTES = 512 << 10  # many files up to this size are sent at a time
FIRST_SEND_PAUSE = 1.0          # between two tries to send
LONGEST_SEND_PAUSE = 60.0


def pending_repository(directory: str, url: str) -> Repository:
    """The pending area of a project for a bucket."""
    name = "%s-%08x" % (re.sub(r"[^A-Za-z0-9.]+", "-", url), zlib.crc32(os.fsencode(url)))
    return Repository("file://" + os.path.join(directory, PENDING, name))


def pending_areas(pending: Repository) -> List[Repository]:
    """The pending area and its extra ones, which the second of two processes with one experiment makes for itself."""
    base, name = os.path.split(pending.storage.root)  # type: ignore[attr-defined]
    names = sorted(os.listdir(base)) if os.path.isdir(base) else []
    return [Repository("file://" + os.path.join(base, item)) for item in names
            if item == name or item.startswith(name + ".")]


def own_pending_area(pending: Repository, experiment_id: str) -> Tuple[Repository, FileLock]:
    """A pending area in which no other process records this experiment, and the lock of its owner. Raises WriteError."""
    while True:
        pending.prepare()
        lock = owner_lock(pending, experiment_id)
        if lock.acquire(wait=False):
            return pending, lock
        pending = Repository("%s.%s" % (pending.url, os.urandom(4).hex()))


def owner_lock(pending: Repository, experiment_id: str) -> FileLock:
    """The lock that the process which records an experiment holds: nobody else sends it meanwhile."""
    return FileLock(pending.storage.path("%s%s.owner" % (JOURNALS, experiment_id)))  # type: ignore[attr-defined]


class Sent:
    """How much was sent."""

    def __init__(self) -> None:
        self.experiments = self.checkpoints = self.bytes = 0

    def __str__(self) -> str:
        return "%s and %s (%s of files)" % (plural(self.experiments, "experiment"),
                                            plural(self.checkpoints, "checkpoint"), format_size(self.bytes))


def copy_object(source: Storage, target: Storage, key: str, progress: Callable[[int], None]) -> int:
    """Copy an object between storages, unless it is there; returns its size. Raises DoesNotExist for a missing one."""
    entry = source.stat(key)
    try:
        if target.stat(key).size == entry.size:
            return entry.size
    except DoesNotExist:
        pass
    if isinstance(source, DiskStorage):
        target.upload(key, source.path(key), progress)
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
                    sent: Sent, progress: Callable[[int], None]) -> None:
    """Copy an experiment and these of its checkpoints, the document last; what the target has already stays.

    Raises ExperimentGone if the document says that it was sent before, and the target does not have it any more.
    """
    keys = [archive_key("experiments", document["id"])] if document.get("path") else []
    keys += [archive_key("checkpoints", item["id"]) for item in checkpoints if item.get("path")]

    sizes = {}
    for key in keys:
        try:
            sizes[key] = source.storage.stat(key).size
        except DoesNotExist:  # sent before, or removed
            continue
    for large in (False, True):
        chosen = [key for key, size in sizes.items() if (size > SMALL_UPLOAD_BYTES) == large]
        sent.bytes += sum(target.storage.in_parallel(
            lambda key: copy_object(source.storage, target.storage, key, progress), chosen, large))
    header = {key: value for key, value in document.items() if key not in ("checkpoints", SENT_KEY)}

    def change(old: Optional[bytes]) -> Optional[bytes]:
        if old is None:
            if document.get(SENT_KEY):
                raise ExperimentGone("Experiment %s was removed from %s." % (document["id"][:SHORT_ID], target.url))
            return DocumentText(dict(header, checkpoints=checkpoints)).text
        there = target._decode(old, document["id"])
        known = {item["id"] for item in there.get("checkpoints") or ()}
        new = [item for item in checkpoints if item["id"] not in known]
        there["checkpoints"] = (there.get("checkpoints") or []) + new
        return DocumentText(there).text if new else None

    target.storage.update(document_key(document["id"]), change)
    sent.checkpoints += len(checkpoints)


def send_pending(pending: Repository, remote: Repository, experiment_id: str, unready: Set[str], finished: bool,
                 sent: Sent, progress: Callable[[int], None] = lambda count: None) -> None:
    """Send what is pending of an experiment but the unready checkpoints, and remove it here once it is there.

    finished: its recording has ended, so that nothing of it stays here. Raises Unreachable and the like.
    """
    document = pending.load(experiment_id)
    ready = [item for item in document.get("checkpoints") or () if item["id"] not in unready]
    if ready or not document.get(SENT_KEY):
        if experiment_id in unready:
            return
        try:
            send_experiment(pending, remote, document, ready, sent, progress)
        except ExperimentGone:
            pending.remove_experiment(Experiment(document))
            raise
        sent.experiments += 1
    done = {item["id"] for item in ready}
    if finished and not unready:
        pending.remove_experiment(Experiment(document))
        return

    def change(old: Optional[bytes]) -> Optional[bytes]:
        if old is None:
            return None
        kept = pending._decode(old, experiment_id)
        kept["checkpoints"] = [item for item in kept.get("checkpoints") or () if item["id"] not in done]
        kept[SENT_KEY] = True
        return DocumentText(kept).text

    pending.storage.update(document_key(experiment_id), change)
    pending.storage.delete([archive_key("checkpoints", item_id) for item_id in done] +
                           [archive_key("experiments", experiment_id)])


def send_abandoned(pending: Repository, remote: Repository, sent: Sent,
                   progress: Callable[[int], None] = lambda count: None) -> List[str]:
    """Send what processes that have ended left behind; returns the IDs of those that a live process still records."""
    busy = []
    for area in pending_areas(pending):
        area.fold_abandoned()
        for entry in list(area.storage.list(EXPERIMENTS)):
            experiment_id = entry.name[:-5]
            lock = owner_lock(area, experiment_id)
            if not is_id(experiment_id):
                continue
            if not lock.acquire(wait=False):
                busy.append(experiment_id)
                continue
            try:
                send_pending(area, remote, experiment_id, set(), True, sent, progress)
            except ExperimentGone as error:  # removed from the bucket
                console.debug(str(error))
            except DoesNotExist as error:
                if isinstance(error, NoBucket):
                    raise
                console.debug(str(error))  # sent by another process meanwhile
            finally:
                lock.release()
        if area.url != pending.url and not busy and next(area.storage.list(EXPERIMENTS), None) is None:
            shutil.rmtree(area.storage.root, ignore_errors=True)  # type: ignore[attr-defined]
    return busy


class Sender:
    """Sends what a recorder has written from the pending area to the bucket, in the background."""

    def __init__(self, recorder: Recorder, remote: Repository, prepared: bool, lock: FileLock) -> None:
        self.recorder, self.remote = recorder, remote
        remote.storage.attempts = CloudStorage.ATTEMPTS  # type: ignore[attr-defined]
        self.lock = lock  # that of the owner of the pending experiment
        self.sent = Sent()
        self._prepared = prepared
        self._offline = not prepared
        self._stopping = False
        self._due = True
        self._bytes = 0                       # sent by this run
        self._failure: Optional[Exception] = None
        self._wake = threading.Condition()
        self.interrupted = False
        self._ended = threading.Event()       # join() and is_alive() go wrong after a KeyboardInterrupt in join()
        self._thread = threading.Thread(target=self._run, name="replicate-sender", daemon=True)

    def start(self) -> None:
        """Start sending."""
        self._thread.start()

    def notify(self) -> None:
        """Something new is in the document."""
        with self._wake:
            self._due = True
            self._wake.notify_all()

    def _run(self) -> None:
        """The sender thread: everything that is sent is sent by it, also when the interpreter is shutting down."""
        try:
            self._send_all()
        finally:
            self._ended.set()

    def _send_all(self) -> None:
        pause, abandoned = FIRST_SEND_PAUSE, True
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._due or self._stopping)
                finished, self._due = self._stopping, False
            if self.recorder.gone:
                return
            try:
                self._send(finished)
                if finished:
                    return
                if abandoned:
                    send_abandoned(pending_repository(self.recorder.directory, self.remote.url), self.remote, Sent())
                abandoned, pause = False, FIRST_SEND_PAUSE
                if self._offline:
                    self._offline = False
                    console.info("%s can be reached again." % self.remote.url)
            except ExperimentGone:
                self.recorder.lose()
                return
            except Exception as error:  # tried again after a pause
                if finished:
                    self._failure = error
                    return
                self._fail(error)
                with self._wake:
                    self._due = True
                    self._wake.wait_for(lambda: self._stopping, pause)
                pause = min(2 * pause, LONGEST_SEND_PAUSE)

    def _fail(self, error: Exception) -> None:
        """Say once that sending does not work, until it works again."""
        if not self._offline:
            self._offline = True
            console.warning("%s\nRecording goes on in %s, and sending is tried again." % (
                _problem(error) + ".", self.recorder.repository.url))
        console.debug("Sending failed: %s" % error)

    def _send(self, finished: bool) -> None:
        """Send what is in the document, but for archives that are still being compressed."""
        if not self._prepared:
            self.remote.prepare()
            self._prepared = True
        send_pending(self.recorder.repository, self.remote, self.recorder.experiment.id, self.recorder.packing(),
                     finished, self.sent, self._count)

    def _count(self, sent: int) -> None:
        self._bytes += sent

    def stop(self, timeout: Optional[float]) -> None:
        """Send the rest, for at most `timeout` seconds if given; what is left stays pending."""
        url = self.remote.url
        if self._offline or timeout is not None:
            self.remote.storage.attempts = 2  # type: ignore[attr-defined]
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        deadline = time.monotonic() + timeout if timeout is not None else float("inf")
        try:
            with Progress("", 0) as progress:
                while not self._ended.wait(0.1) and time.monotonic() < deadline:
                    progress.show("Sending the last checkpoints to %s: %s (Ctrl-C leaves the rest for '%s push')" % (
                        url, format_size(self._bytes), program_name()))
        except KeyboardInterrupt:
            self.interrupted = True
            console.warning("Interrupted.")
        if self._failure is not None:
            console.warning(_problem(self._failure) + ".")
        if self._ended.is_set():
            self.lock.release()
            if self._failure is None:
                return
        console.warning("Not everything was sent to %s. The rest is safe in %s, and is sent by the next run in this "
                        "project or by '%s push'." % (url, self.recorder.repository.url, program_name()))


class Recorder:
    """Records one experiment of this process into a repository on disk: the user's own, or the pending area.

    checkpoint() writes the files and a line of a journal, which is all that must not be lost. Threads do the rest: the
    clock folds the journal into the document, the pulse writes heartbeats, the packer compresses archives, and a
    Sender takes it all to the bucket, if that is where it belongs.
    """

    def __init__(self, repository: Repository, experiment: Experiment, directory: str, heartbeat: bool = True,
                 remote: Optional[Repository] = None, prepared: bool = True, lock: Optional[FileLock] = None) -> None:
        self.repository = repository
        self.target = remote or repository
        self.storage: DiskStorage = repository.storage  # type: ignore[assignment]
        self.experiment = experiment
        self.directory = directory
        self.heartbeat = heartbeat
        self.pid = os.getpid()
        self.gone = False
        self._text = DocumentText(experiment._document)
        self._lock = threading.RLock()                # guards the journal and what follows
        self._changed = threading.Condition(self._lock)
        self._journal: Optional[Journal] = None
        self._unfolded: List[Journal] = []            # full journals whose folding failed
        self._unwritten: List[bytes] = []             # lines that a full disk refused
        self._keys = [archive_key("experiments", experiment.id)]  # and the archives that this run writes
        self._packing: List[Tuple[str, str]] = []
        self._is_folding = threading.RLock()
        self._stopping = False
        self._reported: Set[str] = set()
        self._next_fold: Optional[float] = None
        self._last_fold = float("-inf")
        self._fold_pause = FOLD_INTERVAL
        self._next_message = 0.0
        self._skipped_messages = 0
        self._sender = Sender(self, remote, prepared, lock) if remote and lock else None
        self._packer = threading.Thread(target=self._pack, name="replicate-packer", daemon=True)
        self._others = [threading.Thread(target=work, name="replicate-" + work.__name__.strip("_"), daemon=True)
                        for work in (self._clock, self._pulse)]

    def start(self, beat: bool = True) -> None:
        """Start the threads and mark the experiment as running. Raises WriteError."""
        if self.heartbeat and beat:
            try:
                self.target.beat(self.experiment.id)
            except Unreachable as error:  # the pulse tries again
                console.debug(str(error))
        for thread in [self._packer] + self._others:
            thread.start()
        if self._sender:
            self._sender.start()
        _recorders.append(self)
        install_exit_hooks()

    # -- called by the training script

    def checkpoint(self, path: Any, step: Any, metrics: Any, primary_metric: Any, quiet: bool) -> Checkpoint:
        """See Experiment.checkpoint; never raises."""
        problems: List[str] = []
        checkpoints = self.experiment.checkpoints
        with termination:
            sources: List[Source] = []
            last = checkpoints[-1]._document if checkpoints else None
            item = new_checkpoint(None, _valid_step(step, last, problems), _valid_metrics(metrics, problems),
                                  _valid_primary(primary_metric, problems),
                                  last["created"] if last else self.experiment._document["created"])
            checkpoint = Checkpoint(item, self.experiment)
            if os.getpid() != self.pid:
                return checkpoint
            if self.gone:
                self._report_gone()
                checkpoints.append(checkpoint)
                return checkpoint
            try:
                if path is not None:
                    item["path"] = relative_path(path, self.directory)
                    sources = find_sources(self.directory, item["path"], [self.storage.root])
                    if not sources:
                        raise ValueError("path %r holds no file that may be saved" % (path,))
                    self._save_files(item["id"], sources, quiet)
            except Exception as error:  # recording must never break training
                item["path"] = None
                problems.append(_problem(error))
            checkpoints.append(checkpoint)
            if problems:
                console.error("Checkpoint %s: %s. The rest of it was recorded." % (checkpoint.short_id(),
                                                                                  "; ".join(problems)))
            try:
                self._append(encode_json({"checkpoint": item}, indent=None))
            except Exception as error:
                if "journal" not in self._reported:
                    self._reported.add("journal")
                    console.error("%s. Checkpoint %s and later ones are kept in memory, and writing them is tried again."
                                  % (_problem(error), checkpoint.short_id()))
                return checkpoint
            if not (problems or quiet):
                self._announce(checkpoint)
        return checkpoint

    def stop(self, timeout: Optional[float] = None) -> None:
        """Finish what is pending (compression at most for `timeout` seconds) and mark the experiment as stopped."""
        if os.getpid() != self.pid or self not in _recorders:
            return
        with termination:
            deadline = time.monotonic() + timeout if timeout is not None else None
            _recorders.remove(self)
            with self._changed:
                self._stopping = True
                self._changed.notify_all()
            steps = [lambda: self._wait_for_packer(deadline), self._fold]
            if self._sender:
                steps.append(lambda: self._sender.stop(deadline - time.monotonic() if deadline is not None else None))
            if self.heartbeat:
                steps.append(self._stop_heartbeat)
            # last, since a slow disk may take longer than a scheduler waits before it kills
            steps.append(lambda: self.storage.sync(self._keys + [document_key(self.experiment.id)]))
            for step in steps:  # each of them, also if one before fails
                try:
                    step()
                except ReplicateError as error:
                    self._report(error)

    def _stop_heartbeat(self) -> None:
        if not (self.gone or (self._sender and self._sender.interrupted)):
            self._others[1].join(JOIN_SECONDS)  # or its last heartbeat could come after this
            try:
                self.target.storage.delete([heartbeat_key(self.experiment.id)])
            except Unreachable as error:
                console.debug(str(error))  # it stops counting by itself

    def abandon(self) -> None:
        """Stop recording because the experiment is removed, and remove what this run has written."""
        with self._is_folding, self._changed:
            self.gone = True
            del self._packing[1:]  # the first may be in work: stop() waits until the packer has noticed
            self._unwritten.clear()
            self._changed.notify_all()
            for journal in self._unfolded + ([self._journal] if self._journal else []):
                journal.close(remove=True)
            self._journal, self._unfolded = None, []
        keys = self._keys + [heartbeat_key(self.experiment.id)]
        try:
            self.storage.delete(keys)
            if self._sender:
                self._sender.lock.release()
                self._sender.notify()  # which ends it
                self.repository.remove_experiment(self.experiment)
                self.target.storage.delete(keys)
        except ReplicateError as error:
            console.debug(str(error))

    def forget(self) -> None:
        """In a forked child: let go of the parent's journals, whose locks would outlive it here."""
        for journal in self._unfolded + ([self._journal] if self._journal else []):
            journal.close(remove=False)
        if self._sender:
            self._sender.lock.release(remove=False)

    # -- files

    def _save_files(self, checkpoint_id: str, sources: Sequence[Source], quiet: bool) -> None:
        size = sum(source.size for source in sources)
        warn_if_disk_is_low(self.storage.root, size, self._reported)
        with self._changed:
            if len(self._packing) >= MAX_PACKING:
                if not quiet:
                    console.info("Waiting until earlier checkpoints are compressed...")
                while (len(self._packing) >= MAX_PACKING and not self.gone and self._packer.is_alive()
                       and not termination.requested):
                    self._changed.wait(1.0)
        large = save_archive(self.storage, "checkpoints", checkpoint_id, sources)
        with self._changed:
            self._keys.append(archive_key("checkpoints", checkpoint_id))
            if self.gone:  # while it was written
                self.storage.delete(self._keys[-1:])
        if large:
            self.pack_later("checkpoints", checkpoint_id)

    def pack_later(self, kind: str, item_id: str) -> None:
        """Have an archive compressed in the background."""
        with self._changed:
            self._packing.append((kind, item_id))
            self._changed.notify_all()

    def packing(self) -> Set[str]:
        """The IDs whose archives are being compressed or wait for it."""
        with self._lock:
            return {item_id for _, item_id in self._packing}

    def _pack(self) -> None:
        """The packer thread."""
        while True:
            with self._changed:
                while not self._packing and not self._stopping and not self.gone:
                    self._changed.wait()
                if not self._packing:
                    return
                kind, item_id = self._packing[0]
            try:
                shrink_archive(self.storage, kind, item_id)
            except DoesNotExist:
                pass
            except Exception as error:  # the stored archive stays: it is merely larger
                self._report(error)
            with self._changed:
                if self._packing:
                    self._packing.pop(0)
                self._changed.notify_all()
                if self.gone:  # and the archive, which was just replaced, should be
                    self.storage.delete([archive_key(kind, item_id)])
            if self._sender:
                self._sender.notify()

    def _wait_for_packer(self, deadline: Optional[float]) -> None:
        total = len(self._packing)
        with Progress("Compressing the last checkpoints", 0) as progress, self._changed:
            while self._packing and self._packer.is_alive():
                if termination.requested and deadline is None:
                    deadline = time.monotonic() + TERMINATION_SECONDS
                if deadline is not None and time.monotonic() >= deadline:
                    return
                self._changed.wait(0.2)
                progress.show("Compressing the last checkpoints: %d of %d" % (total - len(self._packing), total))

    # -- journal and document

    def _append(self, line: bytes) -> None:
        """Make a checkpoint survive the death of the process, and see that it comes into the document."""
        with self._changed:
            if self.gone:
                return
            self._unwritten.append(line)
            if self._next_fold is None:
                self._next_fold = max(time.monotonic(), self._last_fold + self._fold_pause)
                self._changed.notify_all()
            try:
                if self._journal is None:
                    self._journal = Journal(self.storage, self.experiment.id)
                while self._unwritten:
                    self._journal.append(self._unwritten[0])
                    self._unwritten.pop(0)
            except OSError as error:
                del self._unwritten[:-100000]
                raise self.storage.write_failure(JOURNALS + self.experiment.id, error) from error
            self._reported.discard("journal")

    def _clock(self) -> None:
        """The clock thread folds the journal when that is due."""
        while True:
            with self._changed:
                while not self._stopping and not self.gone:
                    left = self._next_fold - time.monotonic() if self._next_fold is not None else None
                    if left is not None and left <= 0:
                        break
                    self._changed.wait(left)
                if self._stopping or self.gone:
                    return
            try:
                self._fold()
            except Exception as error:  # tried again at the next turn
                self._report(error)

    def _pulse(self) -> None:
        """The pulse thread writes heartbeats, as long as the experiment is there."""
        next_beat = time.monotonic() + HEARTBEAT_INTERVAL
        while True:
            with self._changed:
                while not self._stopping and not self.gone and time.monotonic() < next_beat:
                    self._changed.wait(next_beat - time.monotonic())
                if self._stopping or self.gone:
                    return
            next_beat = time.monotonic() + HEARTBEAT_INTERVAL
            try:
                self.storage.stat(document_key(self.experiment.id))
            except DoesNotExist:
                self.lose()
                return
            except ReplicateError as error:
                self._report(error)
            try:
                if self.heartbeat:
                    self.target.beat(self.experiment.id)
                    if self.gone:  # while it was written
                        self.target.storage.delete([heartbeat_key(self.experiment.id)])
            except (Unreachable, NoBucket) as error:  # the sender says so
                console.debug(str(error))
            except Exception as error:  # tried again at the next turn
                self._report(error)

    def _fold(self) -> None:
        """Put what is in the journals, and what they could not take, into the document. Raises WriteError, ReadError."""
        with self._is_folding:
            with self._lock:
                if self._journal is not None:
                    self._unfolded.append(self._journal)
                self._journal = None
                journals, lines = list(self._unfolded), list(self._unwritten)
                self._next_fold = None
            if self.gone or not (journals or lines):
                return
            started = time.monotonic()
            try:
                self.repository.fold(self.experiment.id, [journal.key for journal in journals], self._text,
                                     b"\n".join(lines))
            except ExperimentGone:
                self.lose()
                return
            except ReplicateError:
                with self._lock:
                    self._next_fold = time.monotonic() + MAX_FOLD_INTERVAL
                raise
            with self._lock:
                for journal in journals:
                    journal.close(remove=True)
                self._unfolded = [journal for journal in self._unfolded if journal not in journals]
                self._unwritten = [line for line in self._unwritten if line not in lines]
                self._last_fold = time.monotonic()
                self._fold_pause = min(MAX_FOLD_INTERVAL, max(FOLD_INTERVAL,
                                                              FOLD_SHARE * (self._last_fold - started)))
            if self._sender:
                self._sender.notify()

    def lose(self) -> None:
        """The experiment was removed by somebody: say so once, and leave nothing behind."""
        if not self.gone:
            self.abandon()
            self._report_gone()

    def _report_gone(self) -> None:
        if "gone" not in self._reported:
            self._reported.add("gone")
            console.error("Experiment %s was removed from %s: it is not recorded any more." %
                          (self.experiment.short_id(), self.target.url))

    # -- messages

    def _report(self, error: BaseException) -> None:
        """Print an error of the background threads once."""
        text = str(error) if isinstance(error, ReplicateError) else "%s: %s" % (type(error).__name__, error)
        if text not in self._reported:
            self._reported.add(text)
            console.error(text)

    def _announce(self, checkpoint: Checkpoint) -> None:
        """Say that a checkpoint was made; of quick ones without files, one a second."""
        now = time.monotonic()
        if not checkpoint.path and now < self._next_message:
            self._skipped_messages += 1
            return
        more = " (and %s before it)" % plural(self._skipped_messages, "other") if self._skipped_messages else ""
        self._next_message, self._skipped_messages = now + 1.0, 0
        console.info("Checkpoint %s at step %d%s%s" % (
            checkpoint.short_id(), checkpoint.step,
            ": saved %s to %s" % (checkpoint.path, self.target.url) if checkpoint.path else "", more))


def _problem(error: BaseException) -> str:
    """An error as part of a sentence."""
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
    except Exception:  # whatever the object does when somebody looks at it
        shown = "a " + type(step).__name__
    problems.append("step must be an integer, not %s: recorded as step %d" % (shown, following))
    return following


def _valid_metrics(metrics: Any, problems: List[str]) -> Dict[str, Any]:
    try:
        fields = {} if metrics is None else fields_of(metrics)
    except Exception:  # likewise
        fields = None
    if fields is None:
        problems.append("metrics must be a dict, not %s" % type(metrics).__name__)
    valid = {}
    for name, value in (fields or {}).items():
        try:
            if not isinstance(name, str):
                raise TypeError("the names in metrics must be strings, not %r" % (name,))
            valid[str.__str__(name)] = checked_metric(value, "metrics[%r]" % name)
        except Exception as error:  # likewise
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
    except Exception:  # likewise
        shown = "a " + type(primary).__name__
    problems.append("primary_metric must be (name, 'maximize' or 'minimize'), not %s" % shown)
    return None


def warn_of_params(params: Dict[str, Any], unknown: Sequence[str]) -> None:
    """Warn of params that look like keys, and once of those without a plain form."""
    for name, value in params.items():
        if re.search(SECRET_SHAPES, value if isinstance(value, str) else json.dumps(value)):
            console.warning("Param %r looks like a secret: everyone who can read the repository sees it." % name)
    if unknown:
        more = " and %d more" % (len(unknown) - 10) if len(unknown) > 10 else ""
        console.warning("Recording params that have no plain form as text: %s%s." % (", ".join(unknown[:10]), more))


def prepare_in_time(repository: Repository) -> bool:
    """Prepare a repository for recording; False if it does not answer in time. Raises what makes it useless."""
    outcome: List[Optional[BaseException]] = []

    def prepare() -> None:
        try:
            repository.prepare()
            outcome.append(None)
        except BaseException as error:  # raised below, in the thread of the caller
            outcome.append(error)

    if repository.storage.has_journals:
        repository.prepare()
        return True
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
    """Warn once when what is about to be written leaves little room."""
    while not os.path.isdir(directory):
        directory = os.path.dirname(directory)
    try:
        free = shutil.disk_usage(directory).free
    except OSError:
        return
    if free < size + LOW_DISK_BYTES and "disk" not in reported:
        reported.add("disk")
        console.warning("The disk of %s is nearly full: saving %s, only %s are free." %
                        (directory, format_size(size), format_size(free)))


def warn_if_code_is_large(sources: Sequence[Source]) -> None:
    """Warn when init() saves surprisingly much, and name the largest files."""
    size = sum(source.size for source in sources)
    if size > LARGE_CODE_BYTES:
        largest = sorted(sources, key=lambda source: -source.size)[:3]
        console.warning("init() saves %s in %s. The largest are %s. List what you do not need in .replicateignore." % (
            format_size(size), plural(len(sources), "file"),
            ", ".join("%s (%s)" % (source.name, format_size(source.size)) for source in largest)))


# What happens when the process ends.

_recorders: List[Recorder] = []


class Termination:
    """Handles SIGTERM, as schedulers send it: stops every experiment, then does what would have happened anyway.

    As a context it puts the signal off while the main thread is inside recording code, whose locks it would need.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._waiting: Optional[Tuple[int, Any]] = None
        self._previous: List[Any] = []  # the handlers that ours took the place of, the latest last
        self._active = 0                # how many of ours are running: a script's handler may call the one before it
        self._mask: Any = None

    def install(self) -> None:
        """Take over SIGTERM, unless the program ignores it or this is not the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return
        current = signal.getsignal(signal.SIGTERM)
        if current in (None, signal.SIG_IGN) or self._is_ours(current):
            return
        if not self._previous and hasattr(os, "register_at_fork"):
            os.register_at_fork(before=self._before_fork, after_in_parent=self._after_fork,
                                after_in_child=self._in_child)
        self._previous.append(current)
        signal.signal(signal.SIGTERM, self._handle)

    @property
    def requested(self) -> bool:
        """Whether a signal is being put off."""
        return self._waiting is not None

    def _is_ours(self, handler: Any) -> bool:
        return getattr(handler, "__self__", None) is self

    def _handle(self, number: int, frame: Any) -> None:
        if self._depth:
            self._waiting = (number, frame)
        else:
            self._finish(number, frame)

    def _finish(self, number: int, frame: Any) -> None:
        stop_all(TERMINATION_SECONDS)
        previous = self._previous[-1 - min(self._active, len(self._previous) - 1)]
        self._active += 1
        try:
            if callable(previous):
                previous(number, frame)
            else:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
        finally:
            self._active -= 1

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._depth += 1

    def __exit__(self, *exc_info: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            self._depth -= 1
            if not self._depth and self._waiting:
                waiting, self._waiting = self._waiting, None
                self._finish(*waiting)

    # A child records nothing, so that it gets back the handler that was there before. A signal that comes while it
    # starts would be lost, since Python forgets what its own handlers have noted before a fork.

    def _before_fork(self) -> None:
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def _after_fork(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _in_child(self) -> None:
        self._depth, self._waiting = 0, None
        if self._is_ours(signal.getsignal(signal.SIGTERM)):
            signal.signal(signal.SIGTERM, self._previous[0])
        self._previous.clear()
        for recorder in _recorders:
            recorder.forget()
        _recorders.clear()
        self._after_fork()


termination = Termination()


def stop_all(timeout: Optional[float] = None) -> None:
    """Stop every experiment that this process records."""
    try:
        for recorder in list(_recorders):
            recorder.stop(timeout)
    except KeyboardInterrupt:
        console.warning("Interrupted: what was left to do is done by the next replicate command here.")


def install_exit_hooks() -> None:
    """Stop experiments at the end of the process."""
    import atexit
    atexit.unregister(stop_all)
    atexit.register(stop_all)
    termination.install()


# ------------------------------------------------------------------------------------------------------------------
# 9  Library: Project, init, experiments
# ------------------------------------------------------------------------------------------------------------------

HOW_TO_START = ("There is no replicate.yaml and no %s in %%s or above it. Record a first run with replicate.init() in "
                "a script, see how it looks with 'replicate demo', or name a repository with -R." % DEFAULT_STORAGE)
RANK_SIZES = {"RANK": ("WORLD_SIZE",), "LOCAL_RANK": ("LOCAL_WORLD_SIZE", "WORLD_SIZE"),
              "SLURM_PROCID": ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"),
              "OMPI_COMM_WORLD_RANK": ("OMPI_COMM_WORLD_SIZE",)}  # where each launcher says how many processes there are
RANK_VARIABLES = tuple(RANK_SIZES)


class ArgumentError(ReplicateError, TypeError, ValueError):
    """An argument of init() or create() is of the wrong type or value."""


class Project:
    """A project directory and its repository.

    repository is a URL, directory a path; either defaults to what the command line would use, which the project looks
    for when it is first used. Raises RepositoryConfigurationError, ConfigNotFound.
    """

    def __init__(self, repository: Optional[str] = None, directory: Optional[str] = None) -> None:
        if directory is not None and not os.path.isdir(directory):
            raise ConfigNotFound("There is no directory %s." % directory)
        self._arguments = (absolute_url(repository, os.getcwd()) if repository else None,
                           None if directory is None else os.path.abspath(directory))
        self._found: Optional[Location] = None
        self._repository: Optional[Repository] = None
        self._recorders: Dict[str, Recorder] = {}
        self.experiments = ExperimentCollection(lambda: self)

    @property
    def _location(self) -> Location:
        if self._found is None or self._found.url is None:  # a configuration may come later
            self._found = find_location(*self._arguments)
        return self._found

    @property
    def directory(self) -> str:
        """The project directory (absolute)."""
        return self._location.directory

    @property
    def repository(self) -> Repository:
        """The repository, checked to be readable. Raises ConfigNotFound where there is none, and ReadError."""
        if self._repository is None:
            repository = self._open()
            repository.check_version()
            self._repository = repository
        return self._repository

    def _open(self) -> Repository:
        location = self._location
        if location.url is None:
            raise ConfigNotFound(HOW_TO_START % location.directory)
        repository = Repository(location.url)
        if not repository.storage.has_journals:
            pending = self.pending()
            repository.pending = pending if os.path.isdir(pending.storage.root) else None  # type: ignore[attr-defined]
        return repository

    def pending(self) -> Repository:
        """The pending area for this repository."""
        return pending_repository(self.directory, self._location.url or "")

    def create(self, path: Optional[str], params: Any, heartbeat: bool, quiet: bool) -> Experiment:
        """Create and start an experiment. Raises ArgumentError, and what makes a repository useless."""
        location = self._location
        unknown: List[str] = []
        try:
            values = checked_params(params, unknown)
            saved = None if path is None else relative_path(path, location.directory)
            sources = find_sources(location.directory, saved, self._excluded()) if saved else []
        except (TypeError, ValueError) as error:
            raise ArgumentError("init(): %s." % str(error).rstrip(".")) from error
        warn_of_params(values, unknown)
        if saved and not sources:
            console.warning("init() saves no files: path %r is empty, or everything in it is ignored." % saved)
            saved = None
        is_new = location.url is None
        if is_new:
            location.url = "file://" + os.path.join(location.directory, DEFAULT_STORAGE)
            self._found = location
        repository = self._repository = self._open()
        prepared = prepare_in_time(repository)
        experiment = Experiment(new_document(location, saved, values), self)
        recorder = self._recorder(repository, experiment, heartbeat, prepared)
        try:
            large = False
            if saved:
                warn_if_code_is_large(sources)
                warn_if_disk_is_low(self.directory, sum(source.size for source in sources), set())
                large = save_archive(recorder.storage, "experiments", experiment.id, sources)
            recorder.repository.create(experiment._document)
            if large:
                recorder.pack_later("experiments", experiment.id)
            recorder.start(beat=prepared)
        except BaseException:
            recorder.abandon()
            recorder.storage.remove(document_key(experiment.id))
            raise
        if is_new or not quiet:
            _announce_recording(experiment, repository.url, is_new, sources)
        return experiment

    def _recorder(self, repository: Repository, experiment: Experiment, heartbeat: bool, prepared: bool) -> Recorder:
        """A recorder into the repository, through the pending area where it is a bucket. Raises WriteError."""
        if repository.storage.has_journals:
            recorder = Recorder(repository, experiment, self.directory, heartbeat)
        else:
            repository.pending, lock = own_pending_area(self.pending(), experiment.id)
            recorder = Recorder(repository.pending, experiment, self.directory, heartbeat, repository, prepared, lock)
        self._recorders[experiment.id] = recorder
        return recorder

    def _excluded(self) -> List[str]:
        """The directory that must not be packed: the repository itself, which may lie in the project."""
        url = self._location.url or ""
        return [url[len("file://"):]] if url.startswith("file://") else []

    # -- what Experiment and Checkpoint ask of their project: see their methods of the same names

    def record(self, experiment: Experiment, path: Any, step: Any, metrics: Any, primary_metric: Any,
               quiet: bool) -> Checkpoint:
        """See Experiment.checkpoint."""
        recorder = self._recorders.get(experiment.id)
        if recorder is None or (recorder not in _recorders and recorder.pid == os.getpid() and not recorder.gone):
            try:
                recorder = self._resume(experiment, recorder.heartbeat if recorder else True)
            except Exception as error:  # recording must never break training
                console.error("Nothing can be recorded for experiment %s: %s." % (experiment.short_id(),
                                                                                 _problem(error)))
                return unrecorded_checkpoint(experiment, path, step, metrics, primary_metric)
        return recorder.checkpoint(path, step, metrics, primary_metric, quiet)

    def _resume(self, experiment: Experiment, heartbeat: bool) -> Recorder:
        """Record into an experiment that is in the repository already."""
        repository = self.repository
        sent = {}
        try:
            document = repository.load(experiment.id)
            sent = {SENT_KEY: True}
        except Unreachable:  # it is in memory, and the pending area takes what is new
            document = experiment._document
        except DoesNotExist:
            if repository.pending is None:
                raise
            document = repository.pending.load(experiment.id)
        recorder = self._recorder(repository, experiment, heartbeat, prepared=True)
        if recorder.repository is not repository:
            header = DocumentText(dict(document, checkpoints=[], **sent)).text
            recorder.storage.update(document_key(experiment.id), lambda old: header if old is None else None)
        recorder.start()
        return recorder

    def stop(self, experiment: Experiment) -> None:
        """See Experiment.stop. If another process runs the experiment, only its heartbeat is removed."""
        recorder = self._recorders.get(experiment.id)
        if recorder is not None:
            recorder.stop()
        else:
            self.repository.storage.delete([heartbeat_key(experiment.id)])

    def refresh(self, experiment: Experiment) -> None:
        """See Experiment.refresh."""
        document = self.repository.load(experiment.id)
        if self.repository.pending is not None:
            try:
                waiting = self.repository.pending.load(experiment.id).get("checkpoints") or []
            except DoesNotExist:
                waiting = []
            known = {item["id"] for item in document.get("checkpoints") or ()}
            document["checkpoints"] = (document.get("checkpoints") or []) + [
                item for item in waiting if item["id"] not in known]
        experiment._replace(document)

    def delete(self, experiment: Experiment) -> None:
        """See Experiment.delete."""
        recorder = self._recorders.get(experiment.id)
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

    def open(self, experiment: Experiment, checkpoint: Optional[Checkpoint], path: str) -> BinaryIO:
        """See Checkpoint.open."""
        return self.repository.open_file(experiment, checkpoint, normal_path(path))

    def checkout(self, experiment: Experiment, checkpoint: Optional[Checkpoint], output_directory: str,
                 path: Optional[str] = None, quiet: bool = False,
                 approve: Callable[[List[str]], None] = lambda names: None) -> List[str]:
        """Copy files into a directory and return their names. approve() gets the names of files that would be replaced
        by other content, and raises an exception to stop.

        Raises DoesNotExist, ReadError, WriteError.
        """
        layers = self.repository.layers(experiment, checkpoint)
        if not layers:
            raise DoesNotExist("Experiment %s has no files, and neither has %s." % (
                experiment.short_id(), "checkpoint " + checkpoint.short_id() if checkpoint else "a checkpoint of it"))
        with Checkout(output_directory) as checkout:
            wanted = normal_path(path) if path else "."
            checkout.stage(self.repository, layers, None if wanted == "." else wanted, quiet)
            checkout.check_target()
            checkout.drop_foreign_configs()
            approve(checkout.conflicts())
            checkout.move()
            return sorted(checkout.files)


def _announce_recording(experiment: Experiment, url: str, is_new: bool, sources: Sequence[Source]) -> None:
    """Say once where the experiment is recorded."""
    notes = ["a new repository: there is no replicate.yaml here"] if is_new else []
    if sources:
        notes.append("saved %s" % (sources[0].name if len(sources) == 1 else plural(len(sources), "file")))
    console.info("Recording experiment %s in %s%s" % (experiment.short_id(), url,
                                                      " (%s)" % "; ".join(notes) if notes else ""))


def normal_path(path: str) -> str:
    """A path as typed, in the form that archives have: relative, with forward slashes, without './'."""
    return os.path.normpath(str(path)).replace(os.sep, "/")


def unrecorded_checkpoint(experiment: Experiment, path: Any, step: Any, metrics: Any, primary_metric: Any) -> Checkpoint:
    """A checkpoint in memory only."""
    last = experiment.checkpoints[-1]._document if experiment.checkpoints else None
    item = new_checkpoint(str(path) if path else None, _valid_step(step, last, []), _valid_metrics(metrics, []),
                          _valid_primary(primary_metric, []), last["created"] if last else "")
    checkpoint = Checkpoint(item, experiment)
    experiment.checkpoints.append(checkpoint)
    return checkpoint


class InertProject:
    """The project of an experiment that records nothing, in every process of a distributed job but the first."""

    def record(self, experiment: Experiment, path: Any, step: Any, metrics: Any, primary_metric: Any,
               quiet: bool) -> Checkpoint:
        return unrecorded_checkpoint(experiment, path, step, metrics, primary_metric)

    def stop(self, experiment: Experiment) -> None:
        """Nothing to stop."""

    refresh = delete = stop

    def is_running(self, experiment: Experiment) -> bool:
        return False

    def open(self, experiment: Experiment, checkpoint: Optional[Checkpoint], path: str) -> BinaryIO:
        raise DoesNotExist("This process of a distributed job records nothing; process 0 does.")

    def checkout(self, experiment: Experiment, checkpoint: Optional[Checkpoint], output_directory: str,
                 path: Optional[str] = None, quiet: bool = False) -> List[str]:
        return []


class ExperimentCollection:
    """The experiments of a project: `replicate.experiments`, `Project(...).experiments`."""

    def __init__(self, find_project: Callable[[], Project]) -> None:
        self._find_project = find_project

    def create(self, path: Optional[str] = None, params: Any = None, disable_heartbeat: bool = False,
               quiet: bool = False) -> Experiment:
        """Create and start an experiment, as init() does, and let other experiments of this process go on."""
        if is_secondary_process():
            return inert_experiment(path, params)
        return self._find_project().create(path, params, not disable_heartbeat, quiet)

    def get(self, experiment_id: str) -> Experiment:
        """The experiment whose ID starts with experiment_id. Raises DoesNotExist if there is none or several."""
        if not isinstance(experiment_id, str):
            raise ArgumentError("experiments.get(): the ID must be a string, not %s." % type(experiment_id).__name__)
        project = self._find_project()
        names = [entry.name[:-5] for entry in project.repository.storage.list(EXPERIMENTS)
                 if experiment_id and entry.name.startswith(experiment_id) and entry.name.endswith(".json")]
        names = [experiment_id] if experiment_id in names else [name for name in names if is_id(name)]
        if not names:
            raise DoesNotExist("Experiment not found: %s" % (experiment_id or "the ID is empty"))
        if len(names) > 1:
            raise DoesNotExist("The ID %s is ambiguous: %d experiments start with it." % (experiment_id, len(names)))
        try:
            return Experiment(project.repository.load(names[0]), project)
        except ReadError as error:
            raise ReadError("The document of experiment %s cannot be read: %s." % (
                names[0][:SHORT_ID], str(error).rstrip("."))) from error

    def list(self, filter: Optional[Callable[[Experiment], bool]] = None) -> ExperimentList:
        """All experiments, or those for which filter(experiment) is true; oldest first."""
        if filter is not None and not callable(filter):
            raise ArgumentError("experiments.list(): filter must be a function of an experiment.")
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
            console.warning("experiments.list(): the filter failed for %s, left out: %s%s" % (
                plural(len(failed), "experiment"), ", ".join(failed[:3]), more))
        return found


experiments = ExperimentCollection(lambda: Project())


def init(path: Optional[str] = None, params: Any = None, disable_heartbeat: bool = False, debug: bool = False, *,
         quiet: bool = False) -> Experiment:
    """Create and start an experiment, and stop one that this process started before.

    path is the file or directory of code to save, relative to the project directory ("." for all of it); params are
    the hyperparameters: a dict or other mapping, an argparse.Namespace or a dataclass object. disable_heartbeat: do not
    mark it as running. debug: print more; quiet: print less.
    Raises ArgumentError for wrong arguments, RepositoryConfigurationError, WriteError and the like for a repository
    that can never work.
    """
    if debug:
        console.verbose = True
    if is_secondary_process():
        return inert_experiment(path, params)
    stop_all()
    return Project().experiments.create(path, params, disable_heartbeat, quiet)


def is_secondary_process() -> bool:
    """Whether this is a process of a distributed job other than the first, and is not to record; says so once."""
    def number(variable: str) -> int:
        text = os.environ.get(variable, "")
        return int(text) if text.isdecimal() else 0

    if os.environ.get("REPLICATE_ALL_RANKS", "0") not in ("", "0"):
        return False
    for rank, sizes in RANK_SIZES.items():
        if number(rank) > 0 and any(number(size) > 1 for size in sizes):
            if rank not in _announced:
                _announced.add(rank)
                console.warning("%s=%d: this process records nothing, process 0 of the job does. "
                                "To record every process, set REPLICATE_ALL_RANKS=1." % (rank, number(rank)))
            return True
    return False


_announced: Set[str] = set()  # the variables of which is_secondary_process() has spoken


def inert_experiment(path: Optional[str], params: Any) -> Experiment:
    """An experiment that records nothing."""
    try:
        values = checked_params(params, [])
    except TypeError:  # process 0 says so
        values = {}
    return Experiment({"id": new_id(), "created": timestamp(), "params": values, "path": path}, InertProject())


# ------------------------------------------------------------------------------------------------------------------
# 10  Rendering: tables, show, diff (data in, text out)
# ------------------------------------------------------------------------------------------------------------------

DIFF_WIDTH = 26
DIFF_CUT = 50
SHOW_WIDTH = 17


def no_paint(text: str, style: str) -> str:
    """text as it is."""
    return text


def display_width(text: str) -> int:
    """The number of terminal columns that text takes."""
    if text.isascii():
        return len(text)
    import unicodedata
    return sum(0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
               for character in text)


def pad(text: str, width: int) -> str:
    """text filled up with spaces to a display width."""
    return text + " " * (width - display_width(text))


def lay_out(columns: Sequence[Tuple[str, Sequence[Sequence[str]]]]) -> Tuple[str, List[str]]:
    """(header, rows) of a table whose columns stand two spaces apart.

    Each column is a title and a cell for each row, a cell a list of lines. Lines end where their last text does.
    """
    from itertools import chain
    titles = [title for title, _ in columns]
    texts = [list(chain([title], *cells)) for title, cells in columns]
    plain = "".join(chain(*texts)).isascii()
    widths = [max(map(len if plain else display_width, column)) for column in texts]
    shapes: Dict[Tuple[int, ...], Tuple[str, Callable[[List[str]], Any]]] = {}

    def row(cells: Sequence[Sequence[str]]) -> str:
        depths = tuple(map(len, cells))
        if depths not in shapes:
            shapes[depths] = row_shape(depths, widths, plain)
        template, in_lines = shapes[depths]
        found = list(chain(*cells)) if plain else [pad(text, width) for cell, width in zip(cells, widths) for text in cell]
        text = template % in_lines(found)
        if not plain or " \n" in text or text[-1:] == " ":
            text = "\n".join([line.rstrip() for line in text.split("\n")])
        return text

    return row([[title] for title in titles]), list(map(row, zip(*[cells for _, cells in columns])))


def row_shape(depths: Sequence[int], widths: Sequence[int], fill: bool) -> Tuple[str, Callable[[List[str]], Any]]:
    """How a row looks whose cells have that many lines: a template, which fills the texts up to the widths or leaves them as they
    are, and what takes the texts for it, line by line, from those of all cells, column by column."""
    from operator import itemgetter
    lines, order = [], []
    for number in range(max(depths, default=0)):
        pieces = []
        for index, (depth, width) in enumerate(zip(depths, widths)):
            if number < depth:
                order.append(sum(depths[:index]) + number)
                pieces.append("%%-%ds" % width if fill and number < max(depths[index + 1:], default=0) else "%s")
            else:
                pieces.append(" " * width)
        lines.append("  ".join(pieces).rstrip())
    return "\n".join(lines), itemgetter(*order) if order else lambda texts: ()


LISTED_FACTS = ("host", "user", "primary_metric", "latest_id", "latest_step", "best_id", "best_step")


def list_cells(rows: Sequence[Summary], show_all: bool = False) -> CellTable:
    """The table of these rows."""
    members = by_batch(rows)
    facts, params = value_columns(members, "facts", LISTED_FACTS), value_columns(members, "params")
    named = None if show_all else {name for name in facts["primary_metric"] if name} or None
    latest, best = value_columns(members, "latest", named), value_columns(members, "best", named)
    differing, common = differing_names(params)
    chosen = set(params) if show_all else {name for name in differing
                                           if {dict, list}.isdisjoint(map(type, params[name]))}
    metrics, common_metrics = (named, {}) if named else _listed_metrics(latest, best, show_all)
    columns: List[Tuple[str, Sequence[Sequence[str]]]] = []
    same = []
    for title in ("HOST", "USER"):
        texts = [text or "" for text in facts[title.lower()]]
        if len(set(texts)) > 1:
            columns.append((title, [[escape_control(text)] for text in texts]))
        else:
            same.append(texts[0])
    columns.append(("PARAMS", _value_cells(params, chosen, len(rows))))
    if any(facts["best_id"]):
        columns.append(("BEST CHECKPOINT", _checkpoint_cells(facts["best_id"], facts["best_step"], best, metrics)))
    columns.append(("LATEST CHECKPOINT", _checkpoint_cells(facts["latest_id"], facts["latest_step"], latest, metrics)))
    header, cells = lay_out(columns)
    found = dict(zip((row for some in members.values() for row in some), cells))
    basis = json.dumps([same, sorted(chosen), sorted(metrics), common, common_metrics])
    return CellTable(header, basis, [found[row] for row in rows])


def differing_names(columns: Dict[str, List[Any]]) -> Tuple[List[str], Dict[str, Any]]:
    """The names whose values differ between the rows, and the common value of each other name; absent and null count as
    one value."""
    def differs(values: List[Any]) -> bool:
        first = None if values[0] is ABSENT else values[0]
        return any(not same_value(None if value is ABSENT else value, first) for value in values)

    differing = [name for name, values in sorted(columns.items()) if differs(values)]
    return differing, {name: columns[name][0] for name in sorted(columns.keys() - set(differing))
                       if columns[name][0] is not ABSENT}


def list_pieces(rows: Sequence[Summary], header: str, cells: Iterable[str], now: datetime.datetime) -> Iterator[str]:
    """The table of `ls` in pieces, its cells from HOST on being finished."""
    started = _started_texts(rows, now)
    width = max(map(len, started + ["STARTED"]))
    layout = "%%-10s  %%-%ds  %%-7s  " % width
    margin = "\n" + " " * len(layout % ("", "", ""))

    def lines() -> Iterator[str]:
        yield layout % ("EXPERIMENT", "STARTED", "STATUS") + header + "\n"
        for row, text, cell in zip(rows, started, cells):
            left = layout % (row.id[:SHORT_ID], text, "running" if row.running else "stopped")
            if cell[:1] in ("", "\n"):
                left = left.rstrip()
            yield "%s%s\n\n" % (left, cell.replace("\n", margin))

    return in_pieces(lines())


def in_pieces(texts: Iterator[str]) -> Iterator[str]:
    """texts joined by hundreds, since each piece that is written takes its time."""
    from itertools import islice
    return iter(lambda: "".join(islice(texts, SummaryCache.BATCH)), "")


SORTABLE = "%Y-%m-%dT%H:%M:%S"


def _started_texts(rows: Sequence[Summary], now: datetime.datetime) -> List[str]:
    """When each experiment started; of days that are long past the text is made once."""
    texts, text, start, end = {}, "", "", ""
    recent = (now - datetime.timedelta(hours=RELATIVE_HOURS)).strftime(SORTABLE)
    for row in sorted(rows, key=lambda row: row.line):
        if not start <= row.line < end:  # lines begin with the time
            moment = row.created
            text, start, end = relative_time(moment, now), row.line, ""
            if row.line < recent:
                end = min(_next_midnight(moment), recent)
        texts[row.id] = text
    return [texts[row.id] for row in rows]


def _next_midnight(moment: datetime.datetime) -> str:
    """When the local day of that time ends, as text that sorts by time; empty at the ends of the calendar."""
    try:
        day = local_time(moment).replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=None) + datetime.timedelta(1)
        return day.astimezone(datetime.timezone.utc).strftime(SORTABLE)
    except (OverflowError, ValueError, OSError):
        return ""


def _listed_metrics(latest: Dict[str, List[Any]], best: Dict[str, List[Any]],
                    show_all: bool) -> Tuple[Iterable[str], Dict[str, Any]]:
    """The metrics that a listing shows where no primary ones decide: all, or those that differ, in which case the common
    values of the others come with them."""
    if show_all or not latest:
        return set(latest) | set(best), {}
    measured = [any(value is not ABSENT for value in row) for row in zip(*latest.values())]
    return differing_names({name: [value for value, counts in zip(values, measured) if counts]
                            for name, values in latest.items()})


def _value_cells(columns: Dict[str, List[Any]], names: Iterable[str], count: int) -> Sequence[Sequence[str]]:
    """`name=value` lines of the chosen names, for each of that many rows."""
    texts = [_value_texts(name, columns[name]) for name in sorted(names) if name in columns]
    if not texts:
        return [()] * count
    if any(None in column for column in texts):
        return [[text for text in row if text is not None] for row in zip(*texts)]
    return list(zip(*texts))  # type: ignore[arg-type]


def _value_texts(name: str, values: Sequence[Any]) -> List[Optional[str]]:
    """`name=value` for each value, as format_cell() has it; None where it is absent."""
    label, kinds = escape_control(name) + "=", set(map(type, values))
    if kinds == {int}:
        return list(map((label.replace("%", "%%") + "%d").__mod__, values))
    if kinds == {float} and sum(values) - sum(values) == 0 and max(values) <= 1e5:  # all are finite and short
        return list(map((label.replace("%", "%%") + "%.5g").__mod__, values))
    if kinds == {str}:
        texts = {value: label + format_cell(value) for value in set(values)}
        return list(map(texts.__getitem__, values))
    return [None if value is ABSENT else label + format_cell(value) for value in values]


def _checkpoint_cells(ids: Sequence[Optional[str]], steps: Sequence[int], metrics: Dict[str, List[Any]],
                      names: Iterable[str]) -> List[Sequence[str]]:
    """The short ID and step of each checkpoint, and its metrics of those names below."""
    return [["%s (step %d)" % (short_id, step), *lines] if short_id else ()
            for short_id, step, lines in zip(ids, steps, _value_cells(metrics, names, len(ids)))]


def _facts(rows: Sequence[Tuple[str, Optional[str]]]) -> List[Tuple[str, str]]:
    return [(label, escape_control(text or "")) for label, text in rows]


def experiment_facts(experiment: Experiment, running: bool) -> List[Tuple[str, str]]:
    """Created to Command, as `show` prints them."""
    return _facts([("Created", full_time(experiment.created)), ("Status", "running" if running else "stopped"),
                   ("Host", experiment.host), ("User", experiment.user), ("Command", experiment.full_command)])


def experiment_blocks(experiment: Experiment) -> List[Tuple[str, List[Tuple[str, str]]]]:
    """The blocks Params, System and Python Packages."""
    return [("Params", [(escape_control(name), format_value(value))
                        for name, value in sorted(experiment.params.items())]),
            ("System", _facts([("Python version", experiment.python_version)])),
            ("Python Packages", [(escape_control(name), escape_control(version))
                                 for name, version in sorted(experiment.python_packages.items())])]


def metric_rows(checkpoint: Checkpoint) -> List[Tuple[str, str]]:
    """The metrics of a checkpoint, the primary one marked."""
    primary = checkpoint.primary_metric or {}
    return [(escape_control(name), format_value(value) + (
        " (primary, %s)" % primary["goal"] if primary.get("name") == name else ""))
        for name, value in sorted(checkpoint.metrics.items())]


def render_blocks(title: str, blocks: Sequence[Tuple[str, List[Tuple[str, str]]]], paint: Paint) -> str:
    """A title, then blocks of `label: text` rows in one column width, each below its heading ('' for none)."""
    width = max([SHOW_WIDTH] + [display_width(label) + 3 for _, rows in blocks for label, _ in rows])
    parts = [paint(title, "heading") + "\n"]
    for heading, rows in blocks:
        lines = [paint(heading, "bold")] if heading else []
        lines += [(pad(label + ":", width) + text).rstrip() for label, text in rows] or [paint("(none)", "faint")]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def render_checkpoint(experiment: Experiment, checkpoint: Checkpoint, running: bool, paint: Paint = no_paint) -> str:
    """`show` of a checkpoint."""
    blocks = [("", _facts([("Created", full_time(checkpoint.created)), ("Path", checkpoint.path),
                           ("Step", str(checkpoint.step))])),
              ("Experiment", _facts([("ID", experiment.id)]) + experiment_facts(experiment, running))]
    blocks += experiment_blocks(experiment) + [("Metrics", metric_rows(checkpoint))]
    return render_blocks("Checkpoint: " + checkpoint.id, blocks, paint)


def render_experiment(experiment: Experiment, running: bool, now: datetime.datetime, paint: Paint = no_paint) -> str:
    """`show` of an experiment."""
    text = render_blocks("Experiment: " + experiment.id, [("", experiment_facts(experiment, running))] +
                         experiment_blocks(experiment), paint)
    text += "\n" + paint("Checkpoints", "bold") + "\n"
    if not experiment.checkpoints:
        return text + paint("(none)", "faint") + "\n"
    names = sorted({name for checkpoint in experiment.checkpoints for name in checkpoint.metrics})
    best = experiment.best()
    primary = (experiment.primary_metric() or {}).get("name")
    rows = []
    for checkpoint in experiment.checkpoints:
        metrics = checkpoint.metrics
        cells = [checkpoint.short_id(), str(checkpoint.step), relative_time(checkpoint.created, now)]
        cells += [(format_cell(metrics[name]) if name in metrics else "") +
                  (" (best)" if checkpoint is best and name == primary else "") for name in names]
        rows.append([[cell] for cell in cells])
    titles = ["ID", "STEP", "CREATED"] + [escape_control(name.upper()) for name in names]
    header, lines = lay_out(list(zip(titles, zip(*rows))))
    return text + "\n".join([header, *lines]) + "\n"


class Side:
    """One side of a diff: an experiment and the checkpoint of it that is compared."""

    def __init__(self, experiment: Experiment, checkpoint: Optional[Checkpoint]) -> None:
        self.experiment, self.checkpoint = experiment, checkpoint

    def blocks(self) -> List[Tuple[str, str, Dict[str, str]]]:
        """(heading, ID, {label: text}) of each block."""
        experiment, checkpoint = self.experiment, self.checkpoint
        facts = dict(_facts([("Created", full_time(experiment.created)), ("Host", experiment.host),
                             ("User", experiment.user), ("Command", experiment.command),
                             ("Python version", experiment.python_version)]))
        version = {escape_control(name): escape_control(text) for name, text in experiment.python_packages.items()}
        about, metrics = {}, {}
        if checkpoint:
            about = dict(_facts([("Created", full_time(checkpoint.created)), ("Path", checkpoint.path),
                                 ("Step", str(checkpoint.step))]))
            metrics = {escape_control(name): format_value(value) for name, value in checkpoint.metrics.items()}
        params = {escape_control(name): format_value(value) for name, value in experiment.params.items()}
        return [("Experiment", experiment.short_id(), facts), ("Params", "", params), ("Python Packages", "", version),
                ("Checkpoint", checkpoint.short_id() if checkpoint else "(none)", about), ("Metrics", "", metrics)]


def render_diff(left: Side, right: Side, paint: Paint = no_paint) -> str:
    """`diff` of two sides: the IDs, then in each block the rows that differ."""
    blocks: List[Tuple[str, List[Tuple[str, str, str]]]] = []
    for (heading, left_id, left_rows), (_, right_id, right_rows) in zip(left.blocks(), right.blocks()):
        rows = [("ID", left_id, right_id)] if left_id else []
        rows += [(label, _cut(left_rows.get(label)), _cut(right_rows.get(label)))
                 for label in sorted(set(left_rows) | set(right_rows)) if left_rows.get(label) != right_rows.get(label)]
        blocks.append((heading, rows))
    all_rows = [row for _, rows in blocks for row in rows]
    first = max([DIFF_WIDTH] + [display_width(label) + 3 for label, _, _ in all_rows])
    second = max([DIFF_WIDTH] + [display_width(text) + 2 for _, text, _ in all_rows])
    parts = []
    for heading, rows in blocks:
        lines = [paint(heading, "bold")]
        lines += [pad(label + ":", first) + pad(one, second) + other for label, one, other in rows]
        parts.append("\n".join(line.rstrip() for line in lines) + "\n" + (
            "" if rows else paint("(no difference)", "faint") + "\n"))
    return "\n".join(parts)


def _cut(text: Optional[str]) -> str:
    if text is None:
        return "(not set)"
    return text if len(text) <= DIFF_CUT else text[:DIFF_CUT - 3] + "..."


def json_pieces(rows: Sequence[Summary]) -> Iterator[str]:
    """The JSON of `ls --json`, in pieces."""
    def elements() -> Iterator[str]:
        opening = "[\n  "
        for row in rows:
            yield '%s%s,\n    "running": %s\n  }' % (opening, row.part("shown"), "true" if row.running else "false")
            opening = ",\n  "
        yield "\n]\n" if rows else "[]\n"

    return in_pieces(elements())


# ------------------------------------------------------------------------------------------------------------------
# 11  Commands, parser, main
# ------------------------------------------------------------------------------------------------------------------


class Command:
    """A subcommand: its function and the options that stand beside it."""

    def __init__(self, name: str, run: Callable[[argparse.Namespace], int], aliases: Sequence[str], options: Options,
                 usage: str, epilog: str) -> None:
        self.name, self.run, self.aliases, self.options = name, run, aliases, options
        self.usage, self.epilog = usage, epilog

    @property
    def description(self) -> str:
        return (self.run.__doc__ or "").replace("\n    ", "\n").strip()

    @property
    def summary(self) -> str:
        return self.description.split("\n")[0].rstrip(".")


COMMANDS: Dict[str, Command] = {}


def command(name: str, *options: Any, aliases: Sequence[str] = (), usage: str = "", epilog: str = "") -> Callable:
    """Register a function as a subcommand; its docstring is the help text."""
    def register(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
        COMMANDS[name] = Command(name, run, aliases, options, usage, epilog)
        return run
    return register


def option(*names: str, **settings: Any) -> Tuple[Tuple[str, ...], Dict[str, Any]]:
    """One argument for argparse's add_argument."""
    return names, settings


REPOSITORY = option("-R", "--repository", metavar="URL",
                    help="Repository URL, e.g. s3://my-bucket (default: the one in replicate.yaml)")
GLOBAL_OPTIONS: Options = (
    option("-h", "--help", action="store_true", help="Show this help"),
    option("--color", metavar="true|false", help="Display color in output (default: on a terminal, without NO_COLOR)"),
    option("--no-color", dest="color", action="store_const", const="false", help="The same as --color=false"),
    option("-D", "--project-directory", metavar="DIRECTORY",
           help="Project directory (default: nearest parent directory with replicate.yaml)"),
    REPOSITORY,
    option("-v", "--verbose", action="store_true", help="Verbose output"))
LIST_OPTIONS = (
    option("--all", action="store_true", help="Output all params and metrics (default: only those that differ)"),
    option("-f", "--filter", action="append", default=[], metavar="FILTER",
           help='Filter, repeatable (format: "<name> <operator> <value>")'),
    option("--json", action="store_true", help="Print output in JSON format"),
    option("-q", "--quiet", action="store_true", help="Only print experiment IDs"),
    option("-s", "--sort", default="started", metavar="KEY",
           help="Sort key. Suffix with '-desc' for descending sort, e.g. --sort=started-desc (default: started)"))
ID = option("id", metavar="ID", help="An experiment or checkpoint ID, or the start of one")
JSON = option("--json", action="store_true", help="Print output in JSON format")
LIST_EXAMPLES = """\
List all experiments in the current project:
  replicate ls
List experiments that have run for 50 steps or less:
  replicate ls --filter "step <= 50"
List experiments where the parameter "optimizer" is "adam" and the best "accuracy" metric is greater than 0.8:
  replicate ls --filter "optimizer = adam" --filter "accuracy > 0.8"
Sort all stopped experiments by the metric "val_loss":
  replicate ls --sort "val_loss" --filter "status = stopped"

""" + FILTER_HELP


VERSION_TEXT = "replicate %s\n" % __version__


def say(text: str) -> None:
    """Data, to stdout."""
    write_text(sys.stdout, text)


def say_json(pieces: Iterable[str]) -> None:
    """JSON, to stdout; ASCII alone where stdout's encoding lacks something of it."""
    for text in pieces:
        try:
            text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
        except UnicodeEncodeError:
            text = re.sub("[^\\x00-\\x7f]", lambda match: json.dumps(match.group())[1:-1], text)
        say(text)


def paint(text: str, style: str) -> str:
    """text in a style if stdout takes colours."""
    return console.colored(text, style, sys.stdout)


def opened_project(args: argparse.Namespace) -> Project:
    """The project that the arguments name, with its abandoned journals folded."""
    project = Project(args.repository, args.project_directory)
    explicit = args.repository or os.environ.get("REPLICATE_REPOSITORY")
    storage = project.repository.storage
    if explicit and isinstance(storage, DiskStorage) and not os.path.isdir(storage.root):
        raise ReadError("There is no repository at %s: no such directory." % project.repository.url)
    project.repository.fold_abandoned()
    return project


def print_list(args: argparse.Namespace, only_running: bool) -> int:
    """`ls` and `ps`."""
    if args.quiet and (args.json or args.all):
        raise UsageError("--quiet cannot be used with --json or --all.")
    filters = [parse_filter(text) for text in args.filter]
    name, descending = parse_sort(args.sort)
    whole = not (only_running or filters or args.json or args.quiet or args.all)
    rows = opened_project(args).repository.summaries(args.json, list_cells if whole else None)
    wanted = [name for tree in filters for name in tree.names()] + [name]
    if any(item not in FIELDS for item in wanted) and rows:
        known = known_names(rows)
        for item in wanted:
            if item not in known:
                console.warning("No experiment has a param or metric called %r.%s" % (item, nearest(item, known)))
    chosen = [row for row in rows if row.running or not only_running]
    for tree in filters:
        chosen = [row for row, matches in zip(chosen, tree.matches(chosen)) if matches]
    chosen = sort_rows(chosen, name, descending)
    if args.json or args.quiet or not chosen:
        rows.keep()
    if args.json:
        say_json(json_pieces(chosen))
    elif args.quiet:
        say("".join(row.id + "\n" for row in chosen))
    elif chosen:
        header, cells = finished_cells(rows, chosen, args.all)
        for text in list_pieces(chosen, header, cells, datetime.datetime.now(datetime.timezone.utc)):
            say(text)
    else:
        console.info("No experiments found")
    return 0


def finished_cells(rows: SummaryList, chosen: Sequence[Summary], show_all: bool) -> Tuple[str, Iterable[str]]:
    """(header, cells) for the table of the chosen rows: those that were remembered, if they are for the same rows."""
    if show_all or len(chosen) < len(rows):
        rows.keep()
        table = list_cells(chosen, show_all)
        return table.header, table.cells
    rows.keep(list_cells(rows) if rows.header is None else None)
    cells = rows.cells()
    if chosen != rows:
        found = {row.id: text for row, text in zip(rows, cells)}
        cells = [found[row.id] for row in chosen]
    return rows.header, cells  # type: ignore[return-value]


@command("ls", *LIST_OPTIONS, aliases=("list",), epilog=LIST_EXAMPLES)
def ls_command(args: argparse.Namespace) -> int:
    """List experiments in this project"""
    return print_list(args, only_running=False)


@command("ps", *LIST_OPTIONS, aliases=("processes",), epilog=LIST_EXAMPLES.replace("replicate ls", "replicate ps"))
def ps_command(args: argparse.Namespace) -> int:
    """List running experiments in this project"""
    return print_list(args, only_running=True)


@command("show", ID, JSON, usage="<experiment or checkpoint ID>")
def show_command(args: argparse.Namespace) -> int:
    """View information about an experiment or checkpoint"""
    repository = opened_project(args).repository
    experiment, checkpoint = repository.find(args.id)
    if args.json:
        say_json([shown_json((checkpoint or experiment).to_json()) + "\n"])
        return 0
    running = repository.is_running(experiment.id)
    if checkpoint:
        say(render_checkpoint(experiment, checkpoint, running, paint))
    else:
        say(render_experiment(experiment, running, datetime.datetime.now(datetime.timezone.utc), paint))
        if experiment.checkpoints:
            console.info("To see more details about a checkpoint, run:\n  %s show <checkpoint ID>" % program_name())
    return 0


@command("diff", option("ids", nargs=2, metavar="ID", help="Two experiment or checkpoint IDs"), usage="<ID> <ID>")
def diff_command(args: argparse.Namespace) -> int:
    """Compare two experiments or checkpoints.

    If an experiment ID is passed, it will pick the best checkpoint from that experiment. If a primary metric is not
    defined, it will use the latest checkpoint.
    """
    repository = opened_project(args).repository
    sides = [Side(experiment, checkpoint or chosen_checkpoint(experiment))
             for experiment, checkpoint in repository.find_all(args.ids)]
    say(render_diff(sides[0], sides[1], paint))
    return 0


def chosen_checkpoint(experiment: Experiment) -> Optional[Checkpoint]:
    """The best checkpoint of an experiment, else the latest; says which."""
    best = experiment.best()
    checkpoint = best or experiment.latest()
    if checkpoint:
        console.info("Of experiment %s, the %s checkpoint %s (step %d) is taken" % (
            experiment.short_id(), "best" if best else "latest", checkpoint.short_id(), checkpoint.step))
    return checkpoint


@command("checkout", ID, option("-f", "--force", action="store_true", help="Force checkout without prompt, even if "
                                "files would be overwritten"),
         option("-o", "--output-directory", metavar="DIRECTORY",
                help="Output directory (default: the project directory)"),
         option("--path", help="A specific file or directory to check out (default: all of the checkpoint/experiment)"),
         usage="<experiment or checkpoint ID>")
def checkout_command(args: argparse.Namespace) -> int:
    """Copy files from an experiment or checkpoint into the project directory"""
    project = opened_project(args)
    experiment, checkpoint = project.repository.find(args.id)
    if checkpoint is None:
        checkpoint = chosen_checkpoint(experiment)
    directory = args.output_directory or project.directory

    def approve(conflicts: List[str]) -> None:
        if not conflicts or args.force:
            return
        shown = "\n".join("  " + escape_control(name) for name in conflicts[:10])
        more = "\n  and %d more" % (len(conflicts) - 10) if len(conflicts) > 10 else ""
        message = "These files in %s would be overwritten with other content:\n%s%s" % (directory, shown, more)
        if not has_terminal_input():
            raise ReplicateError(message + "\nNothing was changed. Pass -f to overwrite them, or -o to write elsewhere.")
        console.warning(message)
        if not confirm("Do you want to overwrite them?"):
            raise ReplicateError("Nothing was changed.")

    names = project.checkout(experiment, checkpoint, directory, path=args.path, approve=approve)
    console.info("Checked out %s of experiment %s%s into %s" % (
        plural(len(names), "file"), experiment.short_id(),
        " and its checkpoint %s" % checkpoint.short_id() if checkpoint else "", directory))
    if experiment.full_command:
        console.info("The experiment was run with this command:\n  %s" % escape_control(experiment.full_command))
    return 0


@command("rm", option("ids", nargs="+", metavar="ID", help="Experiment or checkpoint IDs"),
         option("-f", "--force", action="store_true", help="Force delete without interactive prompt"),
         aliases=("delete",), usage="<experiment or checkpoint ID> [experiment or checkpoint ID...]", epilog="""\
Delete an experiment and its checkpoints (where a1b2c3d4 is an experiment ID):
  replicate rm a1b2c3d4
Delete all experiments where the metric "val_accuracy" is less than 0.2 at the best checkpoints:
  replicate rm $(replicate ls -q --filter "val_accuracy < 0.2")""")
def rm_command(args: argparse.Namespace) -> int:
    """Remove experiments or checkpoints.

    To remove experiments or checkpoints, pass any number of IDs (or prefixes).
    """
    repository = opened_project(args).repository
    found = repository.find_all(args.ids)
    whole = {experiment.id: experiment for experiment, checkpoint in found if checkpoint is None}
    single = {checkpoint.id: (experiment, checkpoint) for experiment, checkpoint in found
              if checkpoint is not None and experiment.id not in whole}
    if not args.force:
        running = repository.running()
        lines = ["* Experiment %s (%s)%s" % (item.short_id(), plural(len(item.checkpoints), "checkpoint"),
                                             ", which is running" if item.id in running else "")
                 for item in whole.values()]
        lines += ["* Checkpoint %s of experiment %s%s" % (checkpoint.short_id(), experiment.short_id(),
                                                          ", which is running" if experiment.id in running else "")
                  for experiment, checkpoint in single.values()]
        if not has_terminal_input():
            raise ReplicateError("Removing needs a confirmation, and there is no terminal to ask on: pass -f. "
                                 "Nothing was removed.")
        console.warning("You are about to delete the following:\n%s" % "\n".join(lines))
        if not confirm("Do you want to continue?"):
            raise ReplicateError("Nothing was removed.")
    for experiment, checkpoint in single.values():
        repository.remove_checkpoint(experiment, checkpoint)
        console.info("Removed checkpoint %s of experiment %s" % (checkpoint.short_id(), experiment.short_id()))
    for experiment in whole.values():
        repository.remove_experiment(experiment)
        console.info("Removed experiment %s" % experiment.short_id())
    return 0


@command("push", option("ids", nargs="*", metavar="ID", help="Experiments to copy (default: all); only with --from"),
         option("--from", dest="source", metavar="URL", help="Copy experiments from this repository into the project's"),
         usage="[ID...]")
def push_command(args: argparse.Namespace) -> int:
    """Send what is waiting to be sent, or copy experiments from another repository

    Checkpoints that could not be sent to the bucket yet wait below .replicate/pending/ in the project. They are sent
    by the next run in the project, or by this command. It can be interrupted and run again.
    """
    if args.ids and not args.source:
        raise UsageError("IDs can be given only with --from.")
    project = Project(args.repository, args.project_directory)
    sent = Sent()
    if args.source:
        source = Repository(absolute_url(args.source, project.directory))
        if not source.check_version():
            raise DoesNotExist("There is no repository at %s." % source.url)
        copy_experiments(source, project._open(), args.ids, sent)
        console.info("Copied %s from %s to %s" % (sent, source.url, project.repository.url))
        return 0
    pending = project.pending()
    areas = pending_areas(pending)
    waiting = [entry for area in areas for entry in area.storage.list(EXPERIMENTS)]
    tell_of_other_pending(project.directory, pending)
    if not waiting:
        console.info("Nothing is waiting to be sent")
        return 0
    remote = project.repository
    remote.prepare()
    total = sum(entry.size for area in areas for kind in ("experiments/", "checkpoints/")
                for entry in area.storage.list(kind))
    try:
        with Progress("Sending", total) as progress:
            busy = send_abandoned(pending, remote, sent, progress.add)
    except ReplicateError as error:
        raise WriteError("%s\nSent so far: %s. Run the command again for the rest." % (error, sent)) from error
    console.info("Sent %s to %s" % (sent, remote.url))
    for experiment_id in busy:
        console.info("Experiment %s is being recorded, and sent, by another process" % experiment_id[:SHORT_ID])
    return 0


def tell_of_other_pending(directory: str, pending: Repository) -> None:
    """Say where something waits for another repository than this one."""
    base = os.path.join(directory, PENDING)
    for name in sorted(os.listdir(base)) if os.path.isdir(base) else ():
        url = "file://" + os.path.join(base, name)
        if not url.startswith(pending.url) and next(Repository(url).storage.list(EXPERIMENTS), None):
            console.info("Something for another repository waits in %s: send it with 'push -R URL'" % url)


def copy_experiments(source: Repository, target: Repository, prefixes: Sequence[str], sent: Sent) -> None:
    """Copy experiments (all, or those named) between repositories. Raises DoesNotExist, ReadError, WriteError."""
    target.prepare()
    experiments = [experiment for experiment, _ in source.find_all(prefixes)] if prefixes else source.experiments()
    with Progress("Copying", 0) as progress:
        for experiment in experiments:
            document = experiment.to_json()
            send_experiment(source, target, document, document["checkpoints"], sent, progress.add)
            sent.experiments += 1


# -- demo

DEMO_SCRIPT = '''\
"""A character model of Python source, in plain Python: how likely is each letter, given the few before it?"""
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
    for i in range(split * step // 3, split * (step + 1) // 3):  # train on one more third
        counts[text[max(0, i - order):i]][text[i]] += 1
    loss = 0.0
    for i in range(split, len(text)):  # bits for each letter of the last tenth, which it has not seen
        seen = counts.get(text[i - order:i], {})
        loss -= math.log2((seen.get(text[i], 0) + smoothing) / (sum(seen.values()) + smoothing * len(letters)))
    with open("model.json", "w") as file:
        json.dump(counts, file)
    experiment.checkpoint(path="model.json", step=step, metrics={"loss": loss / (len(text) - split)},
                          primary_metric=("loss", "minimize"))
experiment.stop()
'''
DEMO_RUNS = (("1", "0.1"), ("2", "0.1"), ("3", "0.1"), ("3", "0.01"))


@command("demo", option("directory", nargs="?", metavar="DIRECTORY",
                        help="The new folder to make (default: replicate-demo)"), usage="[directory]")
def demo_command(args: argparse.Namespace) -> int:
    """Train a small model four times in a new folder, record the runs, and show them"""
    import subprocess
    directory = args.directory or new_directory("replicate-demo")
    try:
        os.makedirs(directory)
        shutil.copyfile(os.path.abspath(__file__), os.path.join(directory, "replicate.py"))
        with open(os.path.join(directory, "train.py"), "x", encoding="utf-8") as file:
            file.write(DEMO_SCRIPT)
    except OSError as error:
        raise WriteError("The folder %s could not be made: %s." % (directory, short_reason(error))) from error
    os.makedirs(os.path.join(directory, DEFAULT_STORAGE))
    environment = {name: value for name, value in os.environ.items()
                   if name not in RANK_VARIABLES + ("REPLICATE_REPOSITORY", "PYTHONPATH")}
    for arguments in DEMO_RUNS:
        console.info("python train.py %s" % " ".join(arguments))
        run = subprocess.run([sys.executable, "train.py", *arguments], cwd=directory, env=environment)
        if run.returncode:
            raise ReplicateError("The demo's training script failed: see above.")
    say("\n")
    repository = Project(None, directory).repository if not _search_upward(os.path.abspath(directory), CONFIG_NAMES, 1) \
        else Project("file://" + os.path.join(os.path.abspath(directory), DEFAULT_STORAGE)).repository
    rows = repository.summaries()
    table = list_cells(rows)
    say("".join(list_pieces(rows, table.header, table.cells, datetime.datetime.now(datetime.timezone.utc))))
    losses = look_up(rows, "loss")
    best = rows[losses.index(min(losses))]
    program = "%s -D %s" % (program_name(), shlex.quote(directory))
    say("The runs are in %s, with the script train.py that made them. Try next:\n\n"
        "  %s show %s\n  %s diff %s %s\n  %s checkout %s -o %s\n" % (
            directory, program, best.id[:SHORT_ID], program, rows[0].id[:SHORT_ID], best.id[:SHORT_ID],
            program, best.id[:SHORT_ID], shlex.quote(os.path.join(directory, "best"))))
    return 0


def new_directory(name: str) -> str:
    """name, or name-2, name-3, ... if it is taken."""
    number, candidate = 1, name
    while os.path.lexists(candidate):
        number += 1
        candidate = "%s-%d" % (name, number)
    return candidate


# -- analytics and feedback

class Analytics:
    """Anonymous usage events, kept in a bounded file and sent in the background; only where a URL is configured."""

    MAX_EVENTS = 100
    SEND_AFTER_EVENTS = 15
    SEND_AFTER_SECONDS = 300
    TIMEOUT = 5.0
    NOTICE = ("Replicate sends anonymous usage data to %s: a random token for this machine, the name of the command, "
              "the version, the operating system and the processor type. Nothing has been sent yet.\n"
              "To switch it off, run: replicate analytics off")

    def __init__(self) -> None:
        base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
        self.directory = os.path.join(base, "replicate")
        self.url = os.environ.get("REPLICATE_ANALYTICS_URL", ANALYTICS_URL)

    @property
    def refused(self) -> bool:
        """Whether the environment forbids it."""
        return any(os.environ.get(name, "") not in ("", "0", "false")
                   for name in ("REPLICATE_NO_ANALYTICS", "DO_NOT_TRACK"))

    def settings(self) -> Dict[str, Any]:
        """{"analytics_enabled": bool, "anonymous_id": str}, or what there is of it."""
        try:
            with open(os.path.join(self.directory, "settings.json"), "rb") as file:
                settings = decode_json(file.read(), "settings.json")
            return settings if isinstance(settings, dict) else {}
        except (OSError, ReadError):
            return {}

    def save(self, **changes: Any) -> Dict[str, Any]:
        """Change settings. Raises WriteError."""
        settings = dict(self.settings(), **changes)
        settings.setdefault("anonymous_id", new_uuid())
        self._write("settings.json", encode_json(settings))
        return settings

    def event(self, command_name: str, anonymous_id: str) -> Dict[str, Any]:
        """One event: all that is ever sent."""
        return {"anonymous_id": anonymous_id, "event": "Run command", "properties": {
            "command": "replicate " + command_name, "replicate_version": __version__,
            "operating_system": sys.platform, "cpu_architecture": platform.machine(), "timestamp": timestamp()}}

    def track(self, command_name: str) -> None:
        """Note that a command was run; explains itself first. Never raises, never waits."""
        if not self.url or self.refused or command_name in ("analytics", "help"):
            return
        try:
            settings = self.settings()
            if "analytics_enabled" not in settings:
                self.save(analytics_enabled=True)
                console.info(self.NOTICE % self.url)
            elif settings["analytics_enabled"]:
                events = (self._events() + [self.event(command_name, settings.get("anonymous_id", ""))])
                self._write("events.json", encode_json(events[-self.MAX_EVENTS:], indent=None))
                age = time.time() - parse_time(events[0]["properties"]["timestamp"]).timestamp()
                if len(events) >= self.SEND_AFTER_EVENTS or age >= self.SEND_AFTER_SECONDS:
                    self._send_in_background()
        except Exception as error:
            console.debug("Analytics: %s" % error)

    def send(self) -> None:
        """Send what is waiting; runs in a process of its own."""
        path = os.path.join(self.directory, "events.json")
        taken = "%s.%d" % (path, os.getpid())
        os.replace(path, taken)  # so that no two processes send the same
        try:
            with open(taken, "rb") as file:
                post_json(self.url, file.read(), self.TIMEOUT)
        finally:
            remove_file(taken)

    def _events(self) -> List[Dict[str, Any]]:
        try:
            with open(os.path.join(self.directory, "events.json"), "rb") as file:
                events = decode_json(file.read(), "events.json")
            return [event for event in events if isinstance(event, dict)
                    and isinstance(parse_time(event["properties"]["timestamp"]), datetime.datetime)]
        except (OSError, ReadError, TypeError, KeyError, ValueError):
            return []

    def _write(self, name: str, data: bytes) -> None:
        try:
            os.makedirs(self.directory, 0o700, exist_ok=True)
            path = os.path.join(self.directory, ".%s.%s" % (name, os.urandom(6).hex()))
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
            os.replace(path, os.path.join(self.directory, name))
        except OSError as error:
            raise WriteError("%s could not be written: %s." % (os.path.join(self.directory, name),
                                                               short_reason(error))) from error

    def _send_in_background(self) -> None:
        import subprocess
        subprocess.Popen([sys.executable, os.path.abspath(__file__), "--send-analytics"], start_new_session=True,
                         stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def new_uuid() -> str:
    """A random UUID (RFC 4122, version 4)."""
    import uuid
    return str(uuid.uuid4())


def post_json(url: str, data: bytes, timeout: float) -> None:
    """POST JSON to an http(s) URL. Raises ReplicateError."""
    import urllib.request
    if not url.startswith(("http://", "https://")):
        raise ReplicateError("%s is no http or https URL." % url)
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout):
            pass
    except (OSError, ValueError) as error:
        raise ReplicateError("%s cannot be reached: %s." % (url, short_reason(error))) from error


@command("analytics", option("switch", nargs="?", choices=("on", "off"), metavar="on|off",
                             help="Switch it on or off (default: print the state)"), usage="<on|off>")
def analytics_command(args: argparse.Namespace) -> int:
    """Enable or disable analytics

    The following data is sent for each command, and only where a URL to send it to is configured
    (REPLICATE_ANALYTICS_URL; there is none by default):
      * A random token for the machine (e.g. "9f3027bb-0eb8-917d-e5bf-c6c1bdb1fd0a")
      * The subcommand, without any options or arguments (e.g. "replicate ls")
      * The Replicate version (e.g. "1.0.0")
      * The CPU architecture (e.g. "x86_64")
      * The operating system (e.g. "linux")
    """
    analytics = Analytics()
    if args.switch:
        analytics.save(analytics_enabled=args.switch == "on")
        console.info("Analytics are switched %s" % args.switch)
        return 0
    settings = analytics.settings()
    if analytics.refused:
        state = "off (the environment says so)"
    elif not settings.get("analytics_enabled", True):
        state = "off"
    elif not analytics.url:
        state = "on, but no URL is configured (REPLICATE_ANALYTICS_URL), so that nothing is recorded or sent"
    else:
        state = "on, sent to " + analytics.url
    say("Analytics are %s.\nAn example of an event:\n%s" % (escape_control(state), shown_json(
        analytics.event("ls", settings.get("anonymous_id") or "9f3027bb-0eb8-917d-e5bf-c6c1bdb1fd0a")) + "\n"))
    return 0


@command("feedback", option("message", nargs="*", metavar="MESSAGE",
                            help="What to say (default: asked for, or read from standard input)"), usage="[message]")
def feedback_command(args: argparse.Namespace) -> int:
    """Submit feedback to the team!"""
    message = " ".join(args.message)
    if not message:
        if has_terminal_input():
            write_text(sys.stderr, "What would you like to tell us? ")
            message = sys.stdin.readline()
        elif sys.stdin is not None:
            message = sys.stdin.read()
    message = message.strip()
    if not message:
        raise ReplicateError("The feedback is empty: nothing was sent.")
    content = {"feedback": message, "replicate_version": __version__, "python_version": platform.python_version(),
               "operating_system": sys.platform, "cpu_architecture": platform.machine()}
    url = os.environ.get("REPLICATE_FEEDBACK_URL", FEEDBACK_URL)
    if url:
        post_json(url, encode_json(content, indent=None), 10.0)
        console.info("Thank you!")
    else:
        console.info("No address is set up to send it to. Set REPLICATE_FEEDBACK_URL to one, or paste this where the "
                     "project's team reads it:")
        say_json([shown_json(content) + "\n"])
    return 0


@command("help", option("command", nargs="?", metavar="COMMAND"), usage="[command]")
def help_command(args: argparse.Namespace) -> int:
    """Help about any command"""
    if not args.command:
        say(general_help())
    else:
        say(command_parser(find_command(args.command)).format_help())
    return 0


# -- parsing

def argument_parser(**settings: Any) -> argparse.ArgumentParser:
    """A parser that raises UsageError, and takes no abbreviations."""
    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UsageError("%s%s." % (message[:1].upper(), message[1:].rstrip(".")))

        def format_help(self) -> str:
            self.formatter_class = argparse.RawDescriptionHelpFormatter
            return super().format_help()

    def narrow(prog: str) -> argparse.HelpFormatter:  # that asks for no terminal's width, for which it would import a lot
        return argparse.HelpFormatter(prog, width=80)

    return Parser(add_help=False, allow_abbrev=False, formatter_class=narrow, **settings)


def command_parser(chosen: Command, flags_before: bool = False) -> argparse.ArgumentParser:
    """The parser of one subcommand; flags_before: global flags that were parsed before it stay as they are."""
    aliases = "\n\naliases: %s" % ", ".join(chosen.aliases) if chosen.aliases else ""
    parser = argument_parser(prog="replicate " + chosen.name, description=chosen.description + aliases,
                             usage=" ".join(("replicate", chosen.name, chosen.usage, "[flags]")).replace("  ", " "),
                             epilog=chosen.epilog or None)
    for names, settings in chosen.options:
        parser.add_argument(*names, **settings)
    for names, settings in GLOBAL_OPTIONS:
        parser.add_argument(*names, **(dict(settings, default=argparse.SUPPRESS) if flags_before else settings))
    return parser


def general_parser() -> argparse.ArgumentParser:
    """The parser of what stands before the subcommand, which takes all that follows it as it is."""
    parser = argument_parser(prog="replicate")
    for names, settings in GLOBAL_OPTIONS:
        parser.add_argument(*names, **settings)
    parser.add_argument("--version", action="store_true")
    parser.add_argument("command", nargs="?")
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    return parser


def general_help() -> str:
    """`replicate --help`."""
    lines = ["Replicate: version control for machine learning", "", "usage: replicate [flags] <command> [flags]", "",
             "commands:"]
    lines += ["  %-10s %s" % (chosen.name, chosen.summary) for chosen in COMMANDS.values()]
    parser = argument_parser(prog="replicate", usage=argparse.SUPPRESS)
    for names, settings in GLOBAL_OPTIONS + (option("--version", action="store_true", help="Print the version"),):
        parser.add_argument(*names, **settings)
    return "\n".join(lines) + "\n\n" + parser.format_help().lstrip("\n") + (
        "\nRun 'replicate help <command>' for more about a command, 'replicate demo' to see it at work.\n")


def find_command(name: str) -> Command:
    """The command of that name or alias. Raises UsageError with a suggestion."""
    for chosen in COMMANDS.values():
        if name == chosen.name or name in chosen.aliases:
            return chosen
    names = [alias for chosen in COMMANDS.values() for alias in (chosen.name, *chosen.aliases)]
    raise UsageError("There is no command %r.%s Run 'replicate --help' for all of them." % (name, nearest(name, names)))


def parse_arguments(argv: Sequence[str]) -> Tuple[Command, argparse.Namespace]:
    """The command and its arguments. Raises UsageError."""
    argv = explicit_color(argv)
    args = argparse.Namespace()
    flags_before = not argv or argv[0].startswith("-")
    if flags_before:
        args = general_parser().parse_args(argv)
        if args.version:
            return Command("version", lambda args: say(VERSION_TEXT) or 0, (), (), "", ""), args
        if not args.command:
            return COMMANDS["help"], args
        argv = [args.command, *args.rest]
        del args.command, args.rest
    chosen = find_command(argv[0])
    try:
        args = command_parser(chosen, flags_before).parse_intermixed_args(argv[1:], args)
    except UsageError:
        if not args.help:  # which is set before what is missing is complained of
            raise
    if args.help and chosen.name != "help":
        args.command = chosen.name
        return COMMANDS["help"], args
    return chosen, args


def explicit_color(argv: Sequence[str]) -> List[str]:
    """A bare --color is a switch: it must not take the next word for its value."""
    end = list(argv).index("--") if "--" in argv else len(argv)
    return ["--color=true" if word == "--color" and number < end else word for number, word in enumerate(argv)]


def apply_color(text: Optional[str]) -> None:
    """Set the console's colours from --color. Raises UsageError."""
    if text is None:
        console.color = None
    elif text.lower() in ("true", "1", "yes", "always"):
        console.color = True
    elif text.lower() in ("false", "0", "no", "never"):
        console.color = False
    else:
        raise UsageError("--color takes true or false, not %r." % text)


def run(argv: Sequence[str]) -> int:
    """Parse and run a command line; returns the exit code. Raises ReplicateError, KeyboardInterrupt, OSError."""
    chosen, args = parse_arguments(argv)
    console.verbose = bool(args.verbose)
    apply_color(args.color)
    status = chosen.run(args)
    Analytics().track(chosen.name)
    return status


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command line and return its exit code; without argv it is that of this process, which ends with it."""
    global command_runs
    if argv is None:
        command_runs = True
        code = exit_code(sys.argv[1:])
        os._exit(code)  # all is written: to free the memory piece by piece would take a tenth of the time
    return exit_code(argv)


def exit_code(argv: Sequence[str]) -> int:
    """Run a command line: 0, 1 (error), 2 (wrong usage) or 130 (Ctrl-C)."""
    if list(argv) == ["--send-analytics"]:
        Analytics().send()
        return 0
    import gc
    gc.disable()  # a command is short, makes no cycles worth collecting, and is a third faster without the search
    try:
        if list(argv) == ["--version"]:  # without argparse
            say(VERSION_TEXT)
            return 0
        return run(argv)
    except UsageError as error:
        console.error(str(error))
        return 2
    except KeyboardInterrupt:
        write_text(sys.stderr, "\n")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
        return 0
    except ReplicateError as error:
        _print_traceback()
        console.error(str(error))
        return 1
    except Exception as error:
        _print_traceback()
        console.error("Something unexpected went wrong: %s: %s. Run it with -v for the details." % (
            type(error).__name__, short_reason(error)))
        return 1


def _print_traceback() -> None:
    if console.verbose:
        import traceback
        traceback.print_exc()


if __name__ == "__main__":
    main()
