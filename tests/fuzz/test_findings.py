"""What breaks a rule is found, made smaller, kept in a file, and found there again."""
import json
import os
import subprocess
import sys

import pytest

from devtools import ROOT

PLANT = '''
import os, socket, sys, time
from devtools.fuzz import __main__ as command, guard, targets, worker

guard.SECONDS = 0.5

def planted(fault, message="planted.txt does not begin as it should."):
    def read(path):
        data = path.read_bytes()
        if b"9" in data:
            exec(fault, globals())
        if not data.startswith(b"begin"):
            raise OSError(message)
    return targets.Maker("a planted fault", lambda folder: targets.Target(
        folder, [b"begin: 1, end: 2"], read, (OSError,), "planted.txt"))

targets.TARGETS.clear()
targets.TARGETS |= {
    "error": planted("raise KeyError"),
    "name": planted("", "It does not begin as it should."),
    "sentence": planted("", "no"),
    "memory": planted("list(range(10**5))"),
    "time": planted("""
begun = time.process_time()
while time.process_time() < begun + 0.6:
    pass"""),
    "wrote": planted("open(os.path.expanduser('~/x'), 'w')"),
    "opened": planted("open('/etc/passwd')"),
    "network": planted("socket.create_connection(('127.0.0.1', 9))"),
    "process": planted("os.system('true')"),
    "exit": planted("os._exit(3)"),
    "nothing": planted(""),
}
if __name__ == "__main__":
    if sys.argv[1] == "command":
        command.WORKER = [sys.executable, __file__]
        sys.exit(command.main(sys.argv[2:]))
    worker.main(sys.argv[1:])
'''
SEEN = {
    "error": "foreign, KeyError", "name": "does not name the file",
    "sentence": "is no sentence", "memory": "bytes of Python's objects", "time": "slow, ",
    "wrote": "wrote, ", "opened": "opened, ", "network": "network, ", "process": "process, "}


def run(folder, *arguments, **options):
    program = folder / "plant.py"
    program.write_text(PLANT, encoding="utf-8")
    return subprocess.run([sys.executable, program, *arguments], cwd=ROOT, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(folder)},
                          text=True, **options)


def command(folder, *arguments):
    done = run(folder, "command", "--minutes", "0.2", "--findings", folder / "found", "--out",
               folder / "out", *arguments)
    assert "Done: " in done.stdout or "Failed: " in done.stdout, f"{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def replayed(tmp_path_factory):
    done = run(tmp_path_factory.mktemp("replayed"), "--replay", "200",
               input=json.dumps({name: [] for name in (*SEEN, "nothing")}))
    assert done.returncode == 0, done.stderr
    found = map(json.loads, done.stdout.splitlines())
    return {line["target"]: line["finding"] for line in found if "finding" in line}


@pytest.mark.parametrize("fault", SEEN)
def test_each_broken_rule_is_seen(replayed, fault):
    assert SEEN[fault] in replayed[fault]


def test_an_input_that_breaks_nothing_is_no_finding(replayed):
    assert "nothing" not in replayed


@pytest.mark.heavy
def test_what_broke_something_is_kept_small_and_breaks_it_again(tmp_path):
    done = command(tmp_path, "--executions", "1200", "--target", "error", "--target", "exit",
                   "--target", "nothing")
    assert done.returncode == 1 and "2 findings" in done.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())["targets"]
    assert ["KeyError" in results[0]["finding"], "ended with 3" in results[1]["finding"],
            results[2]["finding"]] == [True, True, ""]
    assert results[2]["executions"] >= 400
    small, ended = ([*(tmp_path / "found" / name).iterdir()] for name in ("error", "exit"))
    assert b"9" in small[0].read_bytes() and len(small[0].read_bytes()) < 50  # of one change
    assert b"9" in ended[0].read_bytes()
    assert small[0].name in done.stdout.partition("dev.py fuzz --replay ")[2]
    again = run(tmp_path, "command", "--replay", small[0])
    assert again.returncode == 1 and "KeyError" in again.stdout
