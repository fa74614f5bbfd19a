#!/usr/bin/env python3
"""Replicate and its peers side by side: whole processes, alternately, on one machine, in one run.

    python3 .ci/bench.py [--only NAME...] [--runs 5] [--scale 1.0] [--json FILE]

Each peer is installed from PyPI into an environment of its own under .ci/venvs/; the report names those that cannot be
installed. Times are medians of `--runs` runs after one that does not count, so that all files are in the page cache; each row
says what else was cached. Only the ratios mean something. The commands of a row take turns, in an order that rotates, since
each pays for what the one before left behind. Before each run with large files, two copies are made and removed: the host of
a virtual machine takes back memory that has been free for two seconds, and whoever writes next waits for it.
"""
import argparse
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENVS = ROOT / ".ci" / "venvs"
PEERS = {
    "keepsake": (["keepsake==0.4.2", "protobuf<3.21", "grpcio<1.60"], "3.9"),
    "trackio": (["trackio"], None),
    "mlflow": (["mlflow"], None),
}


# -- environments

def find_python(version):
    """The interpreter of that version (any if None) among pyenv's and those on the path."""
    if version is None:
        return sys.executable
    for directory in sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/%s*" % version)):
        return str(directory / "bin" / "python3")
    return shutil.which("python" + version)


def environment(name, packages, version=None):
    """The bin/ directory of a virtual environment with these packages, or the reason why there is none."""
    directory = VENVS / ("bench-" + name)
    if not (directory / "installed").exists():
        shutil.rmtree(directory, ignore_errors=True)
        python = find_python(version)
        if python is None:
            return None, "no Python " + version
        subprocess.run([python, "-m", "venv", str(directory)], check=True)
        done = subprocess.run([str(directory / "bin/pip"), "install", "-q", *packages], capture_output=True, text=True)
        if done.returncode:
            return None, (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        (directory / "installed").touch()
    return directory / "bin", None


# -- what is measured

def run_once(command, cwd=None, env=None, killed=False):
    """(seconds, peak memory in MB) of one process, which may kill itself."""
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE)
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    if process.returncode not in (0, -signal.SIGKILL if killed else 0):
        raise RuntimeError("%s failed: %s" % (command, errors.decode(errors="replace")[-500:]))
    return seconds, usage.ru_maxrss / 1024


WARM = """
import os, sys
def warm_memory(path):
    names = [path + "-1", path + "-2"]
    for name in names:
        with open(path, "rb", 0) as source, open(name, "wb", 0) as target:
            while target.write(source.read(1 << 20)):
                pass
    for name in names:
        os.unlink(name)
"""


def alternate(commands, runs, before=lambda name: None, large=None, cwd=None, env=None):
    """{name: (median seconds, largest MB)} of commands that take turns; before(name) prepares each run. With a large file,
    two copies of it are made and removed before each run."""
    results = {name: [] for name in commands}
    names = list(commands)
    for number in range(runs + 1):
        for name in names[number % len(names):] + names[:number % len(names)]:
            before(name)
            os.sync()  # so that this run does not pay for what the last one left to be written
            if large:
                subprocess.run([sys.executable, "-c", WARM + "warm_memory(sys.argv[1])", str(large)], check=True)
            result = run_once(commands[name], cwd=cwd, env=env, killed="killed" in name)
            if number:
                results[name].append(result)
    return {name: (statistics.median(second for second, _ in values), max(memory for _, memory in values))
            for name, values in results.items()}


class Report:
    """Rows of the table."""

    def __init__(self):
        self.rows = []

    def add(self, work, cached, results, ours="replicate", note=""):
        for name, (seconds, memory) in results.items():
            ratio = seconds / results[ours][0]
            self.rows.append({"work": work, "cached": cached, "tool": name, "seconds": round(seconds, 4),
                              "megabytes": round(memory, 1), "ratio": round(ratio, 2), "against": ours, "note": note})
            print("%-48s %-22s %-16s %9.3f s %8.1f MB %8.2f x  %s" % (
                work, cached, name, seconds, memory, ratio, note), flush=True)

    def remark(self, text):
        self.rows.append({"remark": text})
        print("-- " + text, flush=True)

    def markdown(self):
        """The ratios as a table of Markdown, and the remarks below it."""
        lines = ["| work | cached | Replicate against | is faster by |", "|---|---|---|---|"]
        work = None
        for row in self.rows:
            if row.get("against") == "replicate" and not row["tool"].startswith("replicate"):
                first = (row["work"], row["cached"]) if row["work"] != work else ("", "")
                lines.append("| %s | %s | %s | %.2g |" % (*first, row["tool"], row["ratio"]))
                work = row["work"]
        return "\n".join(lines + [""] + ["* " + row["remark"] for row in self.rows if "remark" in row]) + "\n"


# -- the data

def hex_id(source):
    return "%064x" % source.getrandbits(256)


def make_repository(root, count, files=False):
    """A repository of `count` experiments with 10 params and 20 checkpoints each, as keepsake writes it.

    A child writes it, since a measured process's peak memory includes what this process had when it forked.
    """
    child = multiprocessing.Process(target=write_repository, args=(root, count, files))
    child.start()
    child.join()
    if child.exitcode:
        raise RuntimeError("the repository could not be written")
    time.sleep(2.1)  # so that no file is too young for a cache


def write_repository(root, count, files):
    """See make_repository."""
    source = random.Random(count)
    for folder in ("metadata/experiments", "metadata/heartbeats", "checkpoints", "experiments"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "repository.json").write_text('{"version":1}')
    small = subprocess.run(["tar", "cz", "--files-from", "/dev/null"], capture_output=True).stdout
    for number in range(count):
        checkpoints = []
        for step in range(20):
            item_id = hex_id(source)
            checkpoints.append({
                "id": item_id, "created": "2026-%02d-%02dT%02d:%02d:%02d.%06dZ" % (
                    1 + number % 12, 1 + number % 28, number % 24, step, step, number % 1000000),
                "metrics": {"loss": source.random(), "accuracy": source.random()}, "step": step,
                "path": "model" if files else None, "primary_metric": {"name": "loss", "goal": "minimize"}})
            if files:
                (root / "checkpoints" / (item_id + ".tar.gz")).write_bytes(small)
        experiment_id = hex_id(source)
        document = {
            "id": experiment_id, "created": "2026-%02d-%02dT%02d:00:00.%06dZ" % (
                1 + number % 12, 1 + number % 28, number % 24, number % 1000000),
            "params": {"param-%d" % index: [source.random(), source.randrange(10), source.choice(["adam", "sgd"])][index % 3]
                       for index in range(10)}, "host": "host", "user": "user",
            "config": {"repository": "file://" + str(root), "storage": ""}, "command": "train.py", "path": None,
            "python_version": "3.9.1", "python_packages": {"numpy": "1.0"}, "checkpoints": checkpoints,
            "keepsake_version": "0.4.2"}
        (root / "metadata/experiments" / (experiment_id + ".json")).write_text(json.dumps(document, indent=1))


def make_weights(path, kind, size):
    """A file of random float32 numbers, of small integers, or of text (the source of Python's own library)."""
    code = ("import glob, numpy, os, sys; kind, size, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]\n"
            "r = numpy.random.default_rng(1)\n"
            "if kind == 'float32': r.standard_normal(size // 4, dtype='float32').tofile(path)\n"
            "elif kind == 'integers': r.integers(0, 16, size // 4, dtype='int32').tofile(path)\n"
            "else:\n"
            "    names = sorted(glob.glob(os.path.dirname(os.__file__) + '/**/*.py', recursive=True))\n"
            "    text = b''.join(open(name, 'rb').read() for name in names)\n"
            "    open(path, 'wb').write((text * (size // len(text) + 1))[:size])")
    python = environment("numpy", ["numpy"])[0] / "python"
    subprocess.run([str(python), "-c", code, kind, str(size), str(path)], check=True)


# -- the benchmarks

def bench_lists(report, tools, work, runs, scale):
    """`ls` of 100, 1,000 and 10,000 experiments."""
    for count in (100, 1000, 10000):
        count = max(10, int(count * scale))
        root = work / ("list-%d" % count)
        make_repository(root, count)
        url = "file://" + str(root)
        cache = work / "cache"
        env = dict(os.environ, XDG_CACHE_HOME=str(cache), HOME=str(work), TZ="UTC")
        ours, copied = [str(tools["replicate"] / "replicate")], [str(tools["replicate"] / "python"),
                                                                  str(ROOT / "replicate.py")]
        variants = [("ls", ["ls", "-R", url])]
        if count >= 1000:
            variants += [("ls --filter --sort", ["ls", "-R", url, "-f", "loss < 0.01", "-s", "loss"]),
                         ("ls --json", ["ls", "-R", url, "--json"])]
        for name, arguments in variants:
            commands = {"replicate": ours + arguments}
            if "keepsake" in tools:
                commands["keepsake"] = [str(tools["keepsake"] / "keepsake")] + arguments
            if name == "ls" and count < 1000:
                commands["replicate (copied file)"] = copied + arguments
            report.add("%s, %d experiments" % (name, count), "page cache, summaries", alternate(commands, runs, env=env))
        commands = {"replicate": ours + ["ls", "-R", url]}
        if "keepsake" in tools:
            commands["keepsake"] = [str(tools["keepsake"] / "keepsake"), "ls", "-R", url]
        report.add("ls, %d experiments, first time" % count, "page cache", alternate(
            commands, runs, before=lambda name: shutil.rmtree(cache, ignore_errors=True), env=env))


def bench_huge(report, tools, work, runs, scale):
    """`ls` of 100,000 experiments: what it needs of time and memory."""
    count = max(10, int(100000 * scale))
    root = work / "huge"
    make_repository(root, count)
    env = dict(os.environ, XDG_CACHE_HOME=str(work / "cache"), HOME=str(work), TZ="UTC")
    command = {"replicate": [str(tools["replicate"] / "replicate"), "ls", "-R", "file://" + str(root)]}
    report.add("ls, %d experiments" % count, "page cache, summaries", alternate(command, 1, env=env))
    shutil.rmtree(root)


def bench_start(report, tools, work, runs, scale):
    """Start-up above the bare interpreter."""
    python = str(tools["replicate"] / "python")
    env = dict(os.environ, HOME=str(work))
    results = alternate({
        "bare interpreter": [python, "-c", "pass"],
        "replicate --version": [str(tools["replicate"] / "replicate"), "--version"],
        "import replicate": [python, "-c", "import replicate"],
        "copied file --version": [python, str(ROOT / "replicate.py"), "--version"]}, runs * 3, cwd=work, env=env)
    bare = results["bare interpreter"][0]
    report.add("start", "page cache", results, ours="bare interpreter")
    for name, (seconds, _) in results.items():
        report.remark("%s: %.1f ms above the bare interpreter" % (name, 1000 * (seconds - bare)))


RECORD = """
import sys, time, replicate
count = int(sys.argv[1])
experiment = replicate.init(params={"lr": 0.1})
started = time.perf_counter()
for step in range(count):
    experiment.checkpoint(step=step, metrics={"loss": 1 / (step + 1)}, quiet=True)
print(time.perf_counter() - started)
experiment.stop()
"""
SAVE = """
import {module} as tool
experiment = tool.init(params={{"lr": 0.1}})
experiment.checkpoint(path="weights", step=0, metrics={{"loss": 0.1}}, quiet=True)
experiment.stop()
"""
# The same until every reader sees the checkpoint; the process can be killed from then on, and is.
COMPLETE = """
import os, time, replicate
experiment = replicate.init(params={"lr": 0.1})
item = experiment.checkpoint(path="weights", step=0, metrics={"loss": 0.1}, quiet=True).id
while item not in open("repo/metadata/experiments/%s.json" % experiment.id).read():
    time.sleep(0.0005)
os.kill(os.getpid(), 9)
"""
COPY = """
import os, shutil, sys
shutil.copyfile("weights", "copy")
if sys.argv[1:] == ["fsync"]:
    os.fsync(os.open("copy", os.O_RDONLY))
"""
WAIT = WARM + """
import shutil, time, replicate
for number in range(int(sys.argv[1]) + 1):
    os.sync()
    warm_memory("weights")
    experiment = replicate.init(quiet=True)
    document = "repo/metadata/experiments/%s.json" % experiment.id
    started = time.perf_counter()
    item = experiment.checkpoint(path="weights", quiet=True).id
    returned = time.perf_counter() - started
    while item not in open(document).read():
        time.sleep(0.0005)
    complete = time.perf_counter() - started
    experiment.stop()
    experiment.delete()
    os.sync()
    warm_memory("weights")
    started = time.perf_counter()
    shutil.copyfile("weights", "copy")
    copied = time.perf_counter() - started
    os.unlink("copy")
    if number:
        print(returned, complete, copied)
"""
# How others log so many metrics; the processes end only when all of it is stored.
LOGS = {
    "keepsake": ("import sys, keepsake\ne = keepsake.init(params={'lr': 0.1})\n"
                 "for i in range(int(sys.argv[1])): e.checkpoint(step=i, metrics={'loss': 1 / (i + 1)}, quiet=True)\n"
                 "e.stop()", 100),
    "trackio": ("import sys, trackio\ntrackio.init(project='bench', config={'lr': 0.1})\n"
                "for i in range(int(sys.argv[1])): trackio.log({'loss': 1 / (i + 1)})\n"
                "trackio.finish()", 10000),
    "mlflow": ("import sys, mlflow\nwith mlflow.start_run():\n"
               "    for i in range(int(sys.argv[1])): mlflow.log_metric('loss', 1 / (i + 1), step=i)", 1000),
}


def project(work, name):
    """A new project directory with both tools' configuration."""
    directory = work / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for config in ("replicate.yaml", "keepsake.yaml"):
        (directory / config).write_text("repository: file://repo\n")
    return directory


def bench_checkpoints(report, tools, work, runs, scale):
    """checkpoint(metrics=...) without files: the growth of its cost."""
    env = dict(os.environ, HOME=str(work))
    python = str(tools["replicate"] / "python")
    directory = project(work, "metrics")
    sizes = [int(1000 * scale), int(10000 * scale)]
    commands = {"replicate, %d calls" % size: [python, "-c", RECORD, str(size)] for size in sizes}
    commands["replicate, none"] = [python, "-c", RECORD, "0"]
    results = alternate(commands, runs, cwd=directory, env=env)
    none = results.pop("replicate, none")[0]
    small, large = [seconds - none for seconds, _ in results.values()]
    report.add("checkpoint(metrics=...)", "", results, ours="replicate, %d calls" % sizes[0])
    calls = statistics.median(float(subprocess.run(
        [python, "-c", RECORD, str(sizes[1])], cwd=directory, env=env, check=True, capture_output=True, text=True).stdout)
        for _ in range(runs))
    ours = large / sizes[1]
    report.remark("checkpoint(metrics=...) returns after %.1f microseconds, %.1f with what stop() has left to do; "
                  "ten times the calls take %.1f times as long" % (1e6 * calls / sizes[1], 1e6 * ours, large / small))
    for name in set(tools) & set(LOGS):
        script, count = LOGS[name]
        count = max(10, int(count * scale))
        env = dict(env, TRACKIO_DIR=str(directory / "t"), MLFLOW_TRACKING_URI="sqlite:///%s/mlflow.db" % directory)
        results = alternate({str(size): [str(tools[name] / "python"), "-c", script, str(size)] for size in (0, count)},
                            min(runs, 3), cwd=directory, env=env)
        each = (results[str(count)][0] - results["0"][0]) / count
        report.remark("%s: %.1f microseconds for each of %d calls, %.1f times as long as ours" % (
            name, 1e6 * each, count, each / ours))


def bench_files(report, tools, work, runs, scale):
    """Recording and checking out large files."""
    env = dict(os.environ, HOME=str(work))
    modules = {name: str(tools[name] / "python") for name in ("replicate", "keepsake") if name in tools}
    for kind, megabytes in (("float32", 256), ("float32", 1024), ("integers", 256), ("text", 256)):
        megabytes = max(1, int(megabytes * scale))
        directory = project(work, "files")
        make_weights(directory / "weights", kind, megabytes << 20)
        what = "%d MB of %s" % (megabytes, kind)

        def clean(name):
            shutil.rmtree(directory / "repo", ignore_errors=True)
            (directory / "copy").unlink() if (directory / "copy").exists() else None

        commands = {name: [python, "-c", SAVE.format(module=name)] for name, python in modules.items()}
        if kind == "float32":  # which is in its final form then
            commands["replicate, killed once it is complete"] = [modules["replicate"], "-c", COMPLETE]
        commands["plain copy"] = [sys.executable, "-c", COPY]
        commands["plain copy, on the disk itself"] = [sys.executable, "-c", COPY, "fsync"]
        results = alternate(commands, runs, clean, directory / "weights", directory, env)
        report.add("checkpoint of " + what, "page cache", results)
        if "keepsake" in results:
            report.remark("%s: whole processes against keepsake's: %s" % (what, "; ".join(
                "%s %.2f times as fast" % (name, results["keepsake"][0] / seconds)
                for name, (seconds, _) in results.items() if name != "keepsake")))
        clean("")
        lines = subprocess.run([modules["replicate"], "-c", WAIT, str(runs)], cwd=directory, env=env, check=True,
                               capture_output=True, text=True).stdout.splitlines()
        returned, complete, copied = [statistics.median(column) for column in zip(*[map(float, line.split())
                                                                                    for line in lines])]
        report.remark("%s: checkpoint() returns after %.2f and is complete in the repository after %.2f times a plain copy" %
                      (what, returned / copied, complete / copied))
        for recorder in modules:
            clean("")
            subprocess.run([modules[recorder], "-c", SAVE.format(module=recorder)], cwd=directory, env=env, check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            archive = next((directory / "repo/checkpoints").iterdir())
            report.remark("%s: the archive of %s has %.4f of the size" % (recorder, what,
                                                                         archive.stat().st_size / (megabytes << 20)))
            item = json.loads(next((directory / "repo/metadata/experiments").iterdir()).read_text())
            item = item["checkpoints"][0]["id"]
            url = "file://" + str(directory / "repo")
            target = work / "target"
            commands = {name: [str(tools[name] / name), "checkout", "-f", "-R", url, "-o", str(target), item]
                        for name in modules}
            commands["plain copy"] = [sys.executable, "-c", "import os, shutil; os.makedirs(%r); "
                                      "shutil.copyfile('weights', %r)" % (str(target), str(target / "weights"))]

            def empty(name):
                shutil.rmtree(target, ignore_errors=True)
                if name == "keepsake":
                    target.mkdir()

            report.add("checkout of %s by %s" % (what, recorder), "page cache",
                       alternate(commands, runs, empty, directory / "weights", directory, env))


def bench_one_file(report, tools, work, runs, scale):
    """One small file out of the archive of a large directory."""
    env = dict(os.environ, HOME=str(work))
    directory = project(work, "one")
    (directory / "model").mkdir()
    make_weights(directory / "model/weights", "float32", int((1 << 30) * scale))
    (directory / "model/tokenizer.json").write_text(json.dumps({"token-%d" % number: number for number in range(1000)}))
    subprocess.run([str(tools["replicate"] / "python"), "-c", SAVE.format(module="replicate").replace("weights", "model")],
                   cwd=directory, env=env, check=True, stderr=subprocess.DEVNULL)
    item = json.loads(next((directory / "repo/metadata/experiments").iterdir()).read_text())["checkpoints"][0]["id"]
    target = work / "target"

    def empty(name):
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()

    report.add("one small file of %d MB" % int(1024 * scale), "page cache", alternate({
        name: [str(tools[name] / name), "checkout", "-f", "-R", "file://%s/repo" % directory, "-o", str(target),
               "--path", "model/tokenizer.json", item] for name in ("replicate", "keepsake") if name in tools},
        runs, before=empty, cwd=directory, env=env))


def bench_remove(report, tools, work, runs, scale):
    """`rm` of 100 of 1,000 experiments with 20 checkpoint files each; once each, since keepsake takes long."""
    env = dict(os.environ, HOME=str(work), XDG_CACHE_HOME=str(work / "cache"))
    results = {}
    for name in ("replicate", "keepsake"):
        if name not in tools:
            continue
        root = work / ("remove-" + name)
        make_repository(root, int(1000 * scale), files=True)
        ids = sorted(path.stem for path in (root / "metadata/experiments").iterdir())[:int(100 * scale)]
        results[name] = run_once([str(tools[name] / name), "rm", "-f", "-R", "file://" + str(root), *ids], env=env)
    report.add("rm of %d of %d experiments" % (int(100 * scale), int(1000 * scale)), "page cache", results)


# How the other peers are filled with runs, and how they list them. Each script gets the number of runs.
OTHERS = {
    "trackio": ("import sys\n"
                "from trackio.sqlite_storage import SQLiteStorage\n"
                "for i in range(int(sys.argv[1])):\n"
                "    SQLiteStorage.bulk_log('bench', 'run-%d' % i, [{'loss': 1 / (k + 1)} for k in range(20)],\n"
                "                           config={'p%d' % k: i * k for k in range(10)})\n",
                ["trackio", "list", "runs", "--project", "bench"]),
    "mlflow": ("import sys, mlflow\n"
               "from mlflow.entities import Metric, Param\n"
               "client = mlflow.MlflowClient()\n"
               "for i in range(int(sys.argv[1])):\n"
               "    run = client.create_run('0').info.run_id\n"
               "    client.log_batch(run, [Metric('loss', 1 / (k + 1), k, k) for k in range(20)],\n"
               "                     [Param('p%d' % k, str(i * k)) for k in range(10)])\n"
               "    client.set_terminated(run)\n", ["mlflow", "runs", "list", "--experiment-id", "0"]),
}
# (peer, numbers of runs, its settings); trackio lists only names.
OTHER_RUNS = [("trackio", (1000, 10000), {"TRACKIO_DIR": "t"}),
              ("mlflow", (1000,), {"MLFLOW_TRACKING_URI": "sqlite:///{directory}/mlflow.db"}),
              ("mlflow", (1000,), {"MLFLOW_TRACKING_URI": "file://{directory}/runs", "MLFLOW_ALLOW_FILE_STORE": "true"})]


def bench_others(report, tools, work, runs, scale):
    """The listings of the other peers, filled through their own libraries, against ours of as many experiments."""
    for name, counts, settings in OTHER_RUNS:
        for count in counts if name in tools else ():
            count = max(10, int(count * scale))
            store = settings.get("MLFLOW_TRACKING_URI", "").partition(":")[0]
            label = "%s (%s)" % (name, store) if store else name
            directory = work / ("%s-%s-%d" % (name, store, count))
            directory.mkdir(parents=True)
            env = dict(os.environ, HOME=str(directory), XDG_CACHE_HOME=str(work / "cache"),
                       PATH="%s:%s" % (tools[name], os.environ["PATH"]))
            env.update({key: value.format(directory=directory) for key, value in settings.items()})
            fill, listing = OTHERS[name]
            done = subprocess.run([str(tools[name] / "python"), "-c", fill, str(count)], cwd=directory, env=env,
                                  capture_output=True, text=True)
            if done.returncode:
                report.remark("%s could not be filled: %s" % (label, (done.stderr.strip().splitlines() or ["?"])[-1]))
                continue
            root = work / ("others-%d" % count)
            if not root.exists():
                make_repository(root, count)
            try:
                report.add("list of %d runs" % count, "page cache, summaries", alternate({
                    "replicate": [str(tools["replicate"] / "replicate"), "ls", "-R", "file://" + str(root)],
                    label: [str(tools[name] / listing[0])] + listing[1:]}, runs, cwd=directory, env=env))
            except RuntimeError as error:
                report.remark("%s: %s" % (label, str(error).splitlines()[-1][:300]))


BENCHMARKS = {"start": bench_start, "lists": bench_lists, "huge": bench_huge, "checkpoints": bench_checkpoints,
              "files": bench_files, "one file": bench_one_file, "remove": bench_remove, "others": bench_others}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS))
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="of all sizes")
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--directory", help="where the data is made (default: a temporary directory)")
    arguments = parser.parse_args()
    report = Report()
    report.remark("%s, %d cores, Python %s" % (platform.platform(), os.cpu_count(), platform.python_version()))
    shutil.rmtree(VENVS / "bench-replicate", ignore_errors=True)
    tools = {"replicate": environment("replicate", [str(ROOT)])[0]}
    for name in arguments.peers:
        if name == "keepsake" or {"others", "checkpoints"} & set(arguments.only):
            tools[name], reason = environment(name, *PEERS[name])
            if reason:
                del tools[name]
                report.remark("%s could not be installed: %s" % (name, reason))
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.directory) as work:
        if "keepsake" in tools:
            subprocess.run([str(tools["keepsake"] / "keepsake"), "analytics", "off"], env=dict(os.environ, HOME=work),
                           stderr=subprocess.DEVNULL)
        for name in arguments.only:
            BENCHMARKS[name](report, tools, Path(work), arguments.runs, arguments.scale)
    print("\n" + report.markdown())
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report.rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
