#!/usr/bin/env python3
"""Runs every test: the C++ binary, then test/test_*.py (unittest). Closes with "N passed, N failed, N skipped".

Usage: python3 test/run.py build/tests [pattern]    pattern: only Python files whose name contains it (and no C++ tests)
"""
import os
import re
import subprocess
import sys
import time
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run_cpp(binary):
    """(passed, failed, skipped) of the Catch2 binary; a crash counts as one failure."""
    process = subprocess.Popen([binary], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    result = None
    for line in process.stdout:
        match = re.match(r"RESULT (\d+) (\d+) (\d+)", line)
        if match:
            result = tuple(int(n) for n in match.groups())
        else:
            print(line, end="", flush=True)
    status = process.wait()
    if result is None:
        print(f"{binary} ended with status {status} before its tests did")
        return 0, 1, 0
    return result


class Result(unittest.TextTestResult):
    """Counts passes, and prints each skip with its reason."""

    def __init__(self, *args):
        super().__init__(*args)
        self.passed = 0

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += 1

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        print(f"\nskipped {test.id()}: {reason}")


def run_python(pattern):
    folder = os.path.join(ROOT, "test")
    sys.path.insert(0, folder)
    suite = unittest.TestSuite()
    for name in sorted(os.listdir(folder)):
        if name.startswith("test_") and name.endswith(".py") and pattern in name:
            suite.addTests(unittest.defaultTestLoader.loadTestsFromName(name[:-3]))
    result = unittest.TextTestRunner(stream=sys.stdout, resultclass=Result, verbosity=1).run(suite)
    return result.passed, len(result.failures) + len(result.errors), len(result.skipped)


def main():
    venv = os.path.join(ROOT, ".venv", "bin", "python3")
    if os.path.exists(venv) and os.path.realpath(sys.prefix) != os.path.realpath(os.path.join(ROOT, ".venv")):
        os.execv(venv, [venv] + sys.argv)
    os.chdir(ROOT)
    begin = time.time()
    pattern = sys.argv[2] if len(sys.argv) > 2 else ""
    # C++ first: it leaves files that the interoperability tests read.
    totals = [] if pattern else [run_cpp(os.path.abspath(sys.argv[1]))]
    totals.append(run_python(pattern))
    passed, failed, skipped = (sum(column) for column in zip(*totals))
    print(f"tests took {time.time() - begin:.0f} s")
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
