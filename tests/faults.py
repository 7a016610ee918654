"""Experiments that are broken on purpose, and what must hold afterwards.

A small real experiment (digits, two methods, two seeds, a checkpoint an epoch) is broken often:

- SIGKILL at random moments; before any change that it makes to a file, and again while it resumes; with half of a file, of a
  record or of the cache's rows written; while it trains a teacher; of one of two processes that do the same, or fill one cache;
- SIGTERM and Ctrl-C; a disk that is full, for one file or for all; a folder that may only be read.

Then the same command is given once more, and must end as the experiment that nobody broke: exactly one record for each run, its
curve and its weights the same to the bit, no half line, and nothing left lying around. Where a process can still speak it must
have said what happened and how to go on. A kill takes the process, not the machine: power cuts are not imitated.

    python tests/faults.py --kills 500 --results results/measurements/faults.jsonl

prints what was broken and what was lost, and appends it to a file. tests/test_faults.py does the same, smaller.
"""
import argparse
import ctypes
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

CELLS = {"methods": "kd,ctkd+sort", "seeds": "0,1"}  # ctkd learns its temperature, which has to be resumed too
OTHER_CELLS = {"methods": "ce,dkd+sort,sld", "seeds": "2"}  # without a teacher, and with strong views
SMALL = {"pair": "resnet20:resnet8", "preset": "quick", "dataset": "digits", "epochs": 3, "train_size": 50, "test_size": 30, "device": "cpu"}

# Killed processes leave semaphores to the tracker of multiprocessing, which warns of each campaign's at its end.
os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")

# A process that starts from here has everything imported already; it costs a fork instead of seconds.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["sortkd.experiment.run", "sortkd.fronts.commands", "lightning_fabric.strategies", "sklearn.datasets", "sklearn.model_selection",
     "safetensors.torch", "faults"])


def no_fault(folder): ...


def _before_changes_of_files(folder, react):
    "`react(path)` before a file under `folder` is opened for writing, renamed, removed, made or mapped."
    def hook(event, arguments):
        if event == "open":
            changes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "mmap.__new__")
        paths = [str(each) for each in arguments[:2] if str(each).startswith(str(folder))]
        if changes and paths:
            react(paths[0])
    sys.addaudithook(hook)


def killed_at_file_event(number, folder):
    events = itertools.count(1)
    _before_changes_of_files(folder, lambda path: next(events) == number and os.kill(os.getpid(), signal.SIGKILL))


def counting_file_events(counter, folder):
    "A byte in the file `counter` for each change of a file."
    file = open(counter, "ab", buffering=0)
    _before_changes_of_files(folder, lambda path: file.write(b"."))


def killed_in_half_a_file(pattern, folder):
    "SIGKILL when half of a file whose name has `pattern` is written: a checkpoint, weights, a teacher, `started`."
    def halved(write):
        def wrapper(self, data, *arguments, **settings):
            if re.search(pattern, self.name):
                write(self, data[: len(data) // 2], *arguments, **settings)
                os.kill(os.getpid(), signal.SIGKILL)
            return write(self, data, *arguments, **settings)
        return wrapper
    Path.write_bytes, Path.write_text = halved(Path.write_bytes), halved(Path.write_text)


def killed_in_half_a_record(number, folder):
    "SIGKILL when half of the line of the `number`-th record is written."
    import io
    import sortkd.experiment.storage as records
    count = 0

    class Torn(io.FileIO):
        def write(self, content):
            nonlocal count
            count += 1
            if count == number:
                super().write(content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return super().write(content)
    records.open = lambda path, mode, **settings: Torn(path, mode.replace("b", "")) if str(path).endswith("quick.jsonl") else open(path, mode, **settings)


def killed_in_the_cache(when, folder):
    "SIGKILL with some teacher logits stored; or with half of them, though all have their checksums; or the other way round."
    from sortkd.train.teacher_logits import LogitFiles, row_checksums
    write = LogitFiles.write

    def stops(self, rows, logits):
        logits = logits.half()
        sums, some = row_checksums(logits), slice(None, None, 2)
        if when == "stored":
            write(self, rows, logits)
        elif when == "half summed":
            self.logits[rows], self.sums[rows[some]] = logits, sums[some]
        else:
            self.logits[rows[some]], self.sums[rows] = logits[some], sums
        os.kill(os.getpid(), signal.SIGKILL)
    LogitFiles.write = stops


def full_disk(size, folder):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def full_disk_at(pattern, folder):
    "No space from the moment on when a file is written whose path has `pattern`: it gets 100 bytes of what it wants."
    def react(path):
        if re.search(pattern, path):
            full_disk((os.path.getsize(path) if os.path.exists(path) else 0) + 100, folder)
    _before_changes_of_files(folder, react)


def bound_by_permissions(folder):
    "Without the capabilities of root, who may write what nobody may."
    version_3, all_sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(version_3, all_sets):
        raise OSError(ctypes.get_errno(), "capset")


def _process(settings, break_it, log, folder, as_command):
    with open(log, "w", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        import torch
        from sortkd.experiment.run import run_experiment
        from sortkd.fronts.commands import run
        from sortkd.experiment.setup import prepare_experiment
        from sortkd.experiment.pairs import PRESETS
        from sortkd.train.checkpoints import Checkpoint
        torch.set_num_threads(1)
        quick = PRESETS["quick", "digits"]  # a teacher that has to be trained is trained for a few steps
        PRESETS["quick", "digits"] = replace(quick, teacher_train_size=50, teacher_recipe=quick.teacher_recipe.shortened(3))
        Checkpoint.seconds = 0  # after every epoch, of teachers and of students
        break_it(folder)
        if as_command:
            sys.exit(run([f"--{name.replace('_', '-')}" + f"={value}" * (value is not True) for name, value in settings.items()] + ["--quiet"]))
        try:
            run_experiment(prepare_experiment(**settings), progress=False)
        except Exception as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)  # there is room for words
            print("".join(traceback.format_tb(error.__traceback__)))
            print(f"{type(error).__name__}: {error}")
            sys.exit(1)


@dataclass
class Victim:
    "An experiment in a folder of its own, to be broken; `said` is what its last process printed."
    folder: Path
    settings: dict
    said: str = ""

    @property
    def ended(self) -> bool:
        "Whether all was done, even if the process was killed thereafter."
        records = self.folder / "results" / "quick.jsonl"
        recorded = records.read_text() if records.exists() else ""
        methods, seeds = (self.settings[name].split(",") for name in ("methods", "seeds"))
        return all(f"-{method}-seed{seed}-" in recorded for method in methods for seed in seeds)

    def _log(self, log):
        return self.folder.parent / f"{self.folder.name}.{log}"

    def start(self, break_it=no_fault, as_command=False, log="log"):
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log(log).write_text("")  # it may be killed before it says anything
        process = context.Process(target=_process, args=(self.settings, break_it, self._log(log), self.folder, as_command))
        process.start()
        return process

    def end(self, process, log="log") -> int | str:
        for _ in range(300):  # a harness that is suspended for a while gives the process the rest of its time
            if process.exitcode is None:
                process.join(1)
        self.said = self._log(log).read_text()
        if process.exitcode is None:
            process.kill()
            return "no end within five minutes"
        return process.exitcode

    def run(self, break_it=no_fault, **more) -> int:
        return self.end(self.start(break_it, **more))

    def run_and_kill(self, seconds) -> int:
        process = self.start()
        process.join(seconds)
        process.kill()
        return self.end(process)

    def wait_for(self, pattern, process, seconds=60) -> bool:
        "Until a file with this name is there, or the process has ended."
        end = time.monotonic() + seconds
        while time.monotonic() < end and process.is_alive():
            if any(self.folder.rglob(pattern)):
                return True
            time.sleep(0.005)
        return False


HALF_A_RECORD = "killed with half a record written"


def kept_weights(folder: Path, record: dict) -> list[str]:
    "Checksums of the last and the best weights that the run of a record has left."
    from sortkd.train.teachers import read_checkpoint, weights_checksum
    kept = folder / "results" / "runs" / record["run_id"].removesuffix(f"-{record['started']}") / record["started"]
    return [weights_checksum(read_checkpoint(kept / f"{name}.safetensors")[0]) for name in ("last", "best")]


@dataclass
class Tally:
    "How many faults of each kind were injected, in how many runs, and what they did."
    faults: Counter = field(default_factory=Counter)
    runs: Counter = field(default_factory=Counter)
    harm: Counter = field(default_factory=Counter)
    damage: list[str] = field(default_factory=list)

    def finish(self, victim: Victim, reference: list[dict], kind: str, faults: int = 1):
        "Give the command again, unbroken, and look at what is there: one record of each run, and the weights."
        from sortkd.experiment.record import compare_runs
        from sortkd.experiment.storage import read_records
        self.faults[kind] += faults
        self.runs[kind] += len(reference)
        if status := victim.run():
            self._note("lost", kind, f"the command given again ended with {status}: {victim.said[-2000:]}", len(reference))
            return
        with warnings.catch_warnings(record=True) as left_out:
            warnings.simplefilter("always")
            records = read_records(victim.folder / "results" / "quick.jsonl")
        if left_out and kind != HALF_A_RECORD:  # where the half line stays, and no reader counts it
            self._note("damaged", kind, str(left_out[0].message))
        for wanted in reference:
            found = [each for each in records if (each["method"]["name"], each["seed"]) == (wanted["method"]["name"], wanted["seed"])]
            name = f"{wanted['method']['name']}, seed {wanted['seed']}"
            if not found:
                self._note("lost", kind, f"{name} has no record")
            elif len(found) > 1:
                self._note("doubled", kind, f"{name} has {len(found)} records: {[each['run_id'] for each in found]}")
            for record in found:
                differences = compare_runs(wanted, record)
                if differences:
                    self._note("damaged", kind, f"{name}: {differences}")
                elif kept_weights(victim.folder, record) != wanted["kept"]:
                    self._note("damaged", kind, f"{name}: the weights that are kept are others")
        left = [path.name for path in victim.folder.rglob("*") if re.search(r"checkpoint.pt|\.tmp$|^started$|sessions|\.making|^teacher-", path.name)]
        if left:
            self._note("left over", kind, f"files: {left}")
        shutil.rmtree(victim.folder)

    def _note(self, harm, kind, text, count=1):
        self.harm[harm] += count
        self.damage.append(f"{kind}: {harm}: {text}")

    def expect(self, kind, condition, text):
        if not condition:
            self._note("unclear", kind, text)


class Harness:
    "A folder with the teacher, the experiment that nobody breaks, and how long it takes."
    def __init__(self, folder: Path, seed: int = 0):
        import torch
        from safetensors.torch import save_file
        from sortkd.train.networks import create_model
        self.folder, self.random, self.tally, self.number = Path(folder), random.Random(seed), Tally(), 0
        torch.manual_seed(0)
        save_file({name: value.contiguous() for name, value in create_model("resnet20", 10).state_dict().items()}, self.folder / "teacher.safetensors")
        self.victim().run()  # starts the server of processes, too
        self.unbroken, self.seconds = {}, {}
        self.reference = self.unbroken_run()
        assert len(self.reference) == 4 and len({each["result"]["student_sha256"] for each in self.reference}) == 4
        counter, victim = self.folder / "events", self.victim()
        assert victim.run(partial(counting_file_events, counter)) == 0, victim.said
        self.file_events = counter.stat().st_size

    def unbroken_run(self, **changes) -> list[dict]:
        "Records of the experiment that nobody breaks, with checksums of weights; it is timed, too."
        from sortkd.experiment.storage import read_records
        name = str(changes)
        if name not in self.unbroken:
            started, victim = time.monotonic(), self.victim(**changes)
            assert victim.run() == 0, victim.said
            self.seconds[name] = time.monotonic() - started
            records = read_records(victim.folder / "results" / "quick.jsonl")
            self.unbroken[name] = [each | {"kept": kept_weights(victim.folder, each)} for each in records]
            assert all(each["kept"][0] == each["result"]["student_sha256"] for each in self.unbroken[name])
            shutil.rmtree(victim.folder)
        return self.unbroken[name]

    def victim(self, **changes) -> Victim:
        self.number += 1
        folder = self.folder / f"experiment{self.number}"
        folders = {"teachers_dir": str(folder / "teachers"), "results_dir": str(folder / "results")}
        return Victim(folder, SMALL | CELLS | {"teacher": str(self.folder / "teacher.safetensors")} | folders | changes)

    def kill_at_random(self, kills: int, at_once: int = 6, **changes):
        "Each experiment is killed up to `at_once` times, wherever it is, before it may end."
        kind, reference = "killed at a random moment", self.unbroken_run(**changes)
        while kills > 0:
            victim, statuses = self.victim(**changes), []
            while len(statuses) < min(at_once, kills) and set(statuses) <= {-signal.SIGKILL} and not victim.ended:
                statuses.append(victim.run_and_kill(self.random.uniform(0, self.seconds[str(changes)])))
            count, last = statuses.count(-signal.SIGKILL), statuses[-1]
            self.tally.expect(kind, last in (0, -signal.SIGKILL), f"ended with {last}: {victim.said[-1500:]}")
            if count:  # else it was too quick
                self.tally.finish(victim, reference, kind, count)
            kills -= count

    def kill_at_file_events(self, places: int, at_once: int = 2):
        "At `places` spread over all changes of files, and again soon, `at_once` times in all."
        kind = "killed before a change of a file"
        for number in sorted({round(1 + index * (self.file_events - 1) / max(1, places - 1)) for index in range(places)}):
            victim, count = self.victim(), 1
            status = victim.run(partial(killed_at_file_event, number))
            self.tally.expect(kind, status == -signal.SIGKILL, f"event {number} never came: {status}, {victim.said[-1500:]}")
            while count < at_once and status:
                status = victim.run(partial(killed_at_file_event, self.random.randint(1, 40)))
                count += status != 0
            self.tally.finish(victim, self.reference, kind, count)

    def kill_in_half_a_file(self):
        for pattern in (r"^\.checkpoint\.pt", r"^\.last\.safetensors", r"^\.best\.safetensors", r"^\.started", r"^\.about\.json"):
            self._broken("killed with half a file written", partial(killed_in_half_a_file, pattern), -9)
        for number in (1, 2, 4):
            self._broken(HALF_A_RECORD, partial(killed_in_half_a_record, number), -9)
        for when in ("stored", "half stored", "half summed"):
            self._broken("killed while the cache fills", partial(killed_in_the_cache, when), -9)

    def _broken(self, kind, break_it, status, words="", victim=None, **more):
        victim = victim or self.victim()
        found = victim.run(break_it, **more)
        self.tally.expect(kind, found == status and re.search(words, victim.said), f"ended with {found}, having said: {victim.said[-1500:]}")
        self.tally.finish(victim, self.reference, kind)

    def fill_the_disk(self, times: int):
        "Room for so many bytes, at random, up to almost a checkpoint; or none any more for one kind of file."
        kept = {"cache_dir": str(self.folder / "cache")}  # a cache that cannot be made is not used, which is another run
        self.unbroken_run(**kept)
        full, words = "disk full", r"OSError.*(free|Free) space|nothing can be written"
        for size in [0, *(self.random.randrange(10, 900_000) for _ in range(times))]:
            self._broken(full, partial(full_disk, size), 1, words, self.victim(**kept))
        for pattern in (r"/\.started", r"sessions\.jsonl", r"/\.checkpoint\.pt", r"/\.last\.", r"/\.best\.", r"quick\.jsonl"):
            self._broken(full, partial(full_disk_at, pattern), 1, words)
        self._broken(full, partial(full_disk_at, "logits.bin"), 1, words, self.victim(cache="full"))

    def take_permissions(self):
        kind, victim = "read-only folder", self.victim()
        process = victim.start()
        self.tally.expect(kind, victim.wait_for("quick.jsonl", process), "there was no first record")
        process.kill()
        victim.end(process)
        results = victim.folder / "results"
        modes = {path: path.stat().st_mode for path in (results, *results.rglob("*"))}
        for path in modes:
            path.chmod(0o555 if path.is_dir() else 0o444)
        started, status = time.monotonic(), victim.run(bound_by_permissions)
        self.tally.expect(kind, status == 1 and "written" in victim.said, f"ended with {status}: {victim.said[-1500:]}")
        self.tally.expect(kind, time.monotonic() - started < self.seconds["{}"], "it was not refused before long work")
        for path, mode in modes.items():
            path.chmod(mode)
        self.tally.finish(victim, self.reference, kind)

    def send_signals(self, times: int):
        for number in range(times):
            name, status = (("SIGTERM", 143), ("SIGINT", 130))[number % 2]
            kind = f"{name} to sortkd-run"
            victim = self.victim()
            process = victim.start(as_command=True)
            victim.wait_for("results", process)
            process.join(self.random.uniform(0, 0.9) * self.seconds["{}"])
            with suppress(ProcessLookupError):  # it was too quick
                os.kill(process.pid, getattr(signal, name))
            found = victim.end(process)
            self.tally.expect(kind, found == 0 or found == status and re.search("give the same command again|All runs are recorded", victim.said),
                              f"ended with {found}: {victim.said[-1500:]}")
            self.tally.finish(victim, self.reference, kind, int(found != 0))

    def run_two_at_once(self, times: int):
        "The same command twice at the same time, or two that fill one cache, in the same folders; one of the two is killed."
        for number in range(2 * times):
            first = second = self.victim()
            kind = f"one of two killed that {'fill one cache' if number % 2 else 'do the same'}"
            if shares_cache := number % 2 == 1:
                first, second = (replace(first, settings=first.settings | {"seeds": seed}) for seed in "01")
            processes = first.start(log="first"), second.start(log="second")
            processes[0].join(self.random.uniform(0, 0.9) * self.seconds["{}"] / (1 + shares_cache))
            processes[0].kill()
            first.end(processes[0], "first")
            self.tally.expect(kind, second.end(processes[1], "second") == 0, second.said[-1500:])
            self.tally.finish(first, self.reference, kind)

    def kill_teachers(self, kills: int):
        "Killed while the teacher is trained: with half of it written, at random, or one of two that wait for the same."
        kind, one = "killed while the teacher is trained", {"teacher": "auto", "methods": "kd", "seeds": "0"}
        reference = self.unbroken_run(**one)
        for number in range(kills):
            victim, seconds = self.victim(**one), self.random.uniform(0, 0.8) * self.seconds[str(one)]
            other = victim.start(log="other") if number % 3 == 1 else None
            if number == 0:
                status = victim.run(partial(killed_in_half_a_file, r"^\.resnet20"))
            elif number % 3 == 2:
                status = victim.run(partial(killed_at_file_event, self.random.randint(1, 40)))
            else:
                status = victim.run_and_kill(seconds)
            if other:
                self.tally.expect(kind, victim.end(other, "other") == 0, victim.said[-1500:])
            if status == -signal.SIGKILL:  # else it was too quick
                self.tally.finish(victim, reference, kind)


def break_everything(folder: Path, kills: int, seed: int) -> tuple[Tally, dict]:
    "All kinds of faults; about `kills` of them are SIGKILL at a random moment or before a change of a file."
    started = time.monotonic()
    harness = Harness(folder, seed)
    tally = harness.tally
    stages = [
        partial(harness.kill_at_random, kills // 3),
        partial(harness.kill_at_random, kills // 6, **OTHER_CELLS),
        partial(harness.kill_at_file_events, min(kills // 3, harness.file_events)),
        harness.kill_in_half_a_file, partial(harness.fill_the_disk, max(3, kills // 25)),
        harness.take_permissions, partial(harness.send_signals, max(2, kills // 25)),
        partial(harness.run_two_at_once, max(2, kills // 50)),
        partial(harness.kill_teachers, max(3, kills // 40))]
    for stage in stages:
        known = len(tally.damage)
        try:
            stage()
        except Exception:  # what was found before is kept
            tally._note("unclear", getattr(stage, "func", stage).__name__, traceback.format_exc()[-2000:])
        print(f"{sum(tally.faults.values())} faults after {time.monotonic() - started:.0f} s", *tally.damage[known:], sep="\n", flush=True)
    return tally, {
        "faults": dict(tally.faults), "runs": dict(tally.runs), "harm": dict(tally.harm),
        "file_events": harness.file_events, "seconds": round(time.monotonic() - started, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", help="append what was found to this file")
    arguments = parser.parse_args()
    from sortkd.experiment.storage import append_record
    from sortkd.experiment.provenance import describe_machine
    with tempfile.TemporaryDirectory() as folder:
        tally, found = break_everything(Path(folder), arguments.kills, arguments.seed)
    for kind, count in tally.faults.items():
        print(f"{count:5} {kind} ({tally.runs[kind]} runs)")
    print(f"{sum(tally.faults.values())} faults in {sum(tally.runs.values())} runs; harm: {json.dumps(found['harm']) if found['harm'] else 'none'}")
    if arguments.results:
        about = {"benchmark": "faults", "when": datetime.now(UTC).isoformat(timespec="seconds"), "command": " ".join(["python", *sys.argv]), "seed": arguments.seed}
        append_record(arguments.results, about | found | {"damage": tally.damage} | describe_machine("cpu"))
    return 1 if tally.harm else 0


if __name__ == "__main__":
    # Under its own name, so that processes that start from here find the functions that break them.
    sys.path.insert(0, str(Path(__file__).parent))
    import faults
    sys.exit(faults.main())
