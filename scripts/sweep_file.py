"""Sweep files: the JSON that scripts/sweep.py reads, and the runs that it stands for. docs/formats.md describes the format."""
import difflib
import itertools
import json
import os
import re
import subprocess

FIELDS = ("name", "comment", "config", "options", "grid", "runs", "seeds", "reference", "keep")
KEEP = ("checkpoints", "metrics")
SWEEP_DECIDES = ("run.dir", "run.device")
# A run NAME has files beside its folder.
SUFFIXES = (".log", ".json", ".md", ".csv", ".png")


class Mistake(Exception):
    """Of the user: one line."""


class PlannedRun:
    """name: of its folder. group: the name without the seed. options: {full key: value as text}. turn: which of its group's seeds it has, from 0."""

    def __init__(self, name, group, options, turn):
        self.name, self.group, self.options, self.turn = name, group, options, turn


def known_keys(program):
    """{name: full key} of every configuration key, by its full name and by its short one, from the program's --help."""
    try:
        result = subprocess.run([program, "--help"], capture_output=True, text=True)
    except OSError as error:
        raise Mistake(f"{program}: {error.strerror}; build it with make")
    names = {}
    for full, short in re.findall(r"--([a-z]+\.\w+)(?:,--(\w+))? VALUE", result.stdout):
        names[full] = full
        if short:
            names[short] = full
    if not names:
        raise Mistake(f"{program} --help lists no configuration keys")
    return names


def default_values(program):
    """{full key: value} of every configuration key that has one, from the program's --help."""
    text = subprocess.run([program, "--help"], capture_output=True, text=True).stdout
    return {key: json.loads(value) for key, value in re.findall(r"--([a-z]+\.\w+)(?:,--\w+)? VALUE\s.*?\[([^\[\]]+)\]\s*$", text, re.M | re.S)}


def full_key(name, keys, where):
    key = keys.get(name.replace("-", "_"))
    if key in SWEEP_DECIDES:
        raise Mistake(f"{where}: {key} is for sweep.py to choose; it has --out and --devices")
    if key:
        return key
    same = sorted({full for full in keys.values() if full.endswith("." + name)})
    if same:
        raise Mistake(f"{where}: \"{name}\" is ambiguous: {', '.join(same)}")
    near = difflib.get_close_matches(name, keys, 1)
    raise Mistake(f"{where}: \"{name}\" is not a configuration key" + (f"; did you mean \"{near[0]}\"?" if near else "; train_loqt --help lists them"))


def value_text(value, where):
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float, str)):
        return str(value)
    raise Mistake(f"{where}: got {json.dumps(value)}, expected a number, text, true or false")


def read_options(fields, keys, where, read=value_text):
    """{full key: read(value, where)}."""
    if not isinstance(fields, dict):
        raise Mistake(f"{where}: expected {{KEY: value, ...}}")
    options = {}
    for name, value in fields.items():
        key = full_key(name, keys, where)
        if key in options:
            raise Mistake(f"{where}: {key} is given twice")
        options[key] = read(value, f"{where}, {name}")
    return options


def value_list(values, where):
    if not isinstance(values, list) or not values:
        raise Mistake(f"{where}: expected a list of values")
    return [value_text(value, where) for value in values]


def parse_overrides(arguments, keys):
    """KEY=VALUE, --KEY=VALUE and --KEY VALUE."""
    fields, rest = {}, list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if not equals:
            if not argument.startswith("--") or not rest:
                raise Mistake(f"after --: got \"{argument}\", expected KEY=VALUE")
            value = rest.pop(0)
        name = name[2:] if name.startswith("--") else name
        if name in fields:
            raise Mistake(f"after --: {name} is given twice")
        fields[name] = value
    return read_options(fields, keys, "after --")


def without_repeats(pairs):
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise Mistake(f"\"{next(n for n in names if names.count(n) > 1)}\" is there twice in one object")
    return fields


def no_number(text):
    raise Mistake(f"{text} is not a value")


def part(key, value, keys):
    """Of a run's name: the key's short name, and the value."""
    short = min((name for name, full in keys.items() if full == key), key=len)
    return f"{short}-{value}"


def safe_name(parts):
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", "_".join(parts))


class Sweep:
    """name, config, reference (None if not given), keep, runs: [PlannedRun] in the order of the file. Raises Mistake."""

    def __init__(self, path, keys, arguments=()):
        try:
            with open(path, encoding="utf-8") as file:
                fields = json.load(file, object_pairs_hook=without_repeats, parse_constant=no_number)
            self._read(fields, keys, arguments, os.path.splitext(os.path.basename(path))[0])
        except OSError as error:
            raise Mistake(f"{path}: {error.strerror}")
        except ValueError as error:
            raise Mistake(f"{path}: not valid JSON: {error}")
        except Mistake as error:
            raise Mistake(f"{path}: {error}")

    def _read(self, fields, keys, arguments, file_name):
        if not isinstance(fields, dict):
            raise Mistake("expected one JSON object")
        for name in fields:
            if name not in FIELDS:
                near = difflib.get_close_matches(name, FIELDS, 1)
                raise Mistake(f"unknown field \"{name}\"" + (f"; did you mean \"{near[0]}\"?" if near else f"; known are {', '.join(FIELDS)}"))
        for name in ("name", "config", "reference"):
            if name in fields and not (isinstance(fields[name], str) and fields[name]):
                raise Mistake(f"{name}: expected text")
        if "config" not in fields:
            raise Mistake("no \"config\": the preset or configuration file that all runs start from")
        self.name, self.config, self.reference = fields.get("name", file_name), fields["config"], fields.get("reference")
        if self.name != safe_name([self.name]) or self.name[0] in ".-":
            raise Mistake(f"the sweep cannot be called \"{self.name}\"; give it a \"name\" of letters, digits, _ and -")
        self.keep = fields.get("keep", KEEP[0])
        if self.keep not in KEEP:
            raise Mistake(f"keep: got {json.dumps(self.keep)}, expected one of {', '.join(KEEP)}")
        shared_seeds = self._seeds(fields.get("seeds"), "seeds")
        entries = self._entries(fields, keys)
        overrides = parse_overrides(arguments, keys)
        common = {**read_options(fields.get("options", {}), keys, "options"), **overrides}
        if not shared_seeds and "grid" not in fields and "runs" not in fields:
            raise Mistake("no runs: give \"grid\", \"runs\" or \"seeds\"")
        self.runs = []
        for name, options, grid, own_seeds in entries:
            seeds = own_seeds or shared_seeds
            varied = {*options, *grid}
            for key in [*overrides, *(["train.seed"] if seeds else [])]:
                if key in varied:
                    raise Mistake(f"{key} differs from run to run, it cannot be given for all of them" if key in overrides else "train.seed is given beside \"seeds\"")
            if seeds and "train.seed" in common:
                raise Mistake("train.seed is given beside \"seeds\"")
            parts = [name] if name else [part(*item, keys) for item in options.items()]
            for values in itertools.product(*grid.values()):
                point = dict(zip(grid, values))
                group = [*parts, *(part(*item, keys) for item in point.items())]
                for turn, seed in enumerate(seeds or [None]):
                    at_seed, own = ([f"seed-{seed}"], {"train.seed": seed}) if seed else ([], {})
                    self._add(safe_name(group + at_seed), safe_name(group) or self.name, {**common, **options, **point, **own}, turn)
        groups = [run.group for run in self.runs]
        methods = [run.options.get("method.name") for run in self.runs]
        if self.reference and self.reference not in groups + methods:
            raise Mistake(f"reference: no group of runs is called \"{self.reference}\"; there are {', '.join(dict.fromkeys(groups))}")

    @staticmethod
    def _seeds(seeds, where):
        if seeds is None:
            return []
        if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
            raise Mistake(f"{where}: expected a list of whole numbers")
        return [str(seed) for seed in seeds]

    @classmethod
    def _entries(cls, fields, keys):
        """[(name or None, {key: value}, {key: [values]}, [seeds])], one for every entry of "runs"."""
        shared = read_options(fields.get("grid", {}), keys, "grid", value_list)
        runs = fields.get("runs", [{}])
        if not isinstance(runs, list) or not runs or not all(isinstance(run, dict) for run in runs):
            raise Mistake("runs: expected a list of objects")
        entries = []
        for number, run in enumerate(runs, 1):
            where = f"run {number}"
            name = run.get("name")
            if name is not None and not (isinstance(name, str) and name):
                raise Mistake(f"{where}: its name has to be text")
            where += f" ({name})" if name else ""
            options = read_options({k: v for k, v in run.items() if k not in ("name", "comment", "grid", "seeds")}, keys, where)
            grid = {**shared}
            for key, values in read_options(run.get("grid", {}), keys, where + ", grid", value_list).items():
                if key in shared:
                    raise Mistake(f"{where}: {key} is in both grids")
                grid[key] = values
            for key in options:
                if key in grid:
                    raise Mistake(f"{where}: {key} is given beside a grid that varies it")
            entries.append((name, options, grid, cls._seeds(run.get("seeds"), where + ", seeds")))
        return entries

    def _add(self, name, group, options, turn):
        if any(run.name == name for run in self.runs):
            raise Mistake(f"two runs are called {name}; give them a \"name\", and no value twice")
        if not name or name[0] in ".-" or name.endswith(SUFFIXES) or len(name) > 200:
            raise Mistake(f"a run cannot be called \"{name}\"; give it a \"name\" of letters, digits, _ and -, without one of {' '.join(SUFFIXES)} at its end")
        self.runs.append(PlannedRun(name, group, options, turn))
