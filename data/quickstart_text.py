#!/usr/bin/env python3
"""Writes a few megabytes of real English to a file, from what this machine already has: python3 data/quickstart_text.py OUT.txt

First choice: the King James Bible, as printed by Debian's `bible` program (package bible-kjv); a document is a chapter.
Else: the prose in the documentation strings of the Python on this machine; a document is what one module says.
Documents are separated by blank lines, as data/tokenize.py expects. Exit code 2, with one line, if there is too little text.
"""
import sys

# The neighbour tokenize.py has the name of a standard module that inspect and ast's users import: keep this folder off the path.
sys.path = [p for p in sys.path if p != __file__.rpartition("/")[0]]

import ast
import os
import re
import shutil
import subprocess
import sysconfig
import warnings

MINIMUM, ENOUGH = 1_000_000, 4_000_000  # characters


def bible_chapters():
    """One string per chapter, without verse numbers; [] where there is no `bible` program."""
    program = shutil.which("bible")
    if not program:
        return []
    # -f toggles pretty-printing; without it a line is one verse: "1Sa3:10 And the LORD came, ..."
    result = subprocess.run([program, "-f", "gen1:1-rev22:21"], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    chapters = {}
    for line in result.stdout.splitlines():
        verse = re.match(r"(\d?[A-Za-z]+\d+):\d+ +(.*\S)", line)
        if verse:
            chapters.setdefault(verse.group(1), []).append(verse.group(2))
    return [" ".join(verses) for verses in chapters.values()]


def prose(text):
    """The paragraphs of a documentation string that are sentences, each on one line: no code, tables, lists of options or markup."""
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.split())
        words = sum(c.isalpha() or c in " ,.'" for c in line)
        if len(line) >= 60 and line[0].isupper() and line[-1] in ".!?" and words > 0.93 * len(line) and ">>>" not in line:
            yield line.replace("``", "").replace("`", "").replace("*", "")


def module_text(path):
    """All documentation strings of a Python file."""
    try:
        with open(path, encoding="utf-8") as f, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(f.read())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return ""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, owners)]
    if os.path.basename(path) == "topics.py":  # pydoc's copy of the language reference: one dictionary of long strings
        texts += [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return "\n\n".join(texts)


def python_documents():
    """One string per module, first of the standard library, then of the packages beside it, until there is enough."""
    folders = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "/usr/lib/python3/dist-packages"]
    seen, documents, total, visited = set(), [], 0, set()
    for folder in folders:
        for root, subfolders, files in os.walk(folder):
            subfolders[:] = sorted(d for d in subfolders if d not in ("test", "tests", "site-packages", "dist-packages", "__pycache__"))
            for name in sorted(f for f in files if f.endswith(".py")):
                path = os.path.realpath(os.path.join(root, name))
                if total >= ENOUGH or path in visited:
                    continue
                visited.add(path)
                new = [p for p in prose(module_text(path)) if p not in seen]
                seen.update(new)
                if new:
                    documents.append("\n".join(dict.fromkeys(new)))
                    total += len(documents[-1])
    return documents


def main(argv):
    if len(argv) != 1:
        print("quickstart_text.py: error: give one argument, the text file to write", file=sys.stderr)
        return 2
    name, documents = "the King James Bible (printed by the program bible)", bible_chapters()
    if sum(map(len, documents)) < MINIMUM:
        name, documents = "documentation strings of the Python on this machine", python_documents()
    text = "\n\n".join(documents) + "\n"
    if len(text) < MINIMUM:
        print("quickstart_text.py: error: only %d characters of English found here: install Debian's package bible-kjv, or give any text file "
              "of a megabyte or more to data/tokenize.py" % len(text), file=sys.stderr)
        return 2
    try:
        os.makedirs(os.path.dirname(argv[0]) or ".", exist_ok=True)
        with open(argv[0] + ".part", "w", encoding="utf-8") as f:
            f.write(text)
        os.replace(argv[0] + ".part", argv[0])
    except OSError as e:
        print("quickstart_text.py: error: %s" % e, file=sys.stderr)
        return 2
    print("%s: %s, %s documents, %s characters" % (argv[0], name, format(len(documents), ","), format(len(text), ",")))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
