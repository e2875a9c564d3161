"""The folder of a run: whose it is, whether it is finished, and why it ended.

A folder belongs to the recipe that stands in it. It is claimed when recipe and inputs have been found right, so a mistake leaves
nothing behind; every file in it appears by rename. `exit.json` says why the last process ended, because launchers replace the exit
code of theirs and add lines of their own.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from data.recipe import InputError, Section, resolved_yaml

FREE = ("run.resume",)
"""Places of every recipe that may differ when a run goes on."""


UNCLAIMED = ("exit.json", ".exit.json.partial", ".recipe.yaml.partial")
"""What may be in a folder that is nobody's."""


class RunFolder:
    """`<output_dir>/<name>` and the recipe it is for; `free` names the places that may differ when the run goes on."""

    def __init__(self, output_dir: str, name: str, recipe: Section, free: Sequence[str] = ()):
        self.path = Path(output_dir) / name
        self.recipe = recipe
        self.free = (*FREE, *free)
        self.made = False
        """Whether this process claimed a folder that nobody had."""

    def check(self, resume: str) -> bool:
        """Whether the folder holds this recipe already; InputError if it holds anything else, or anything and resume is never."""
        way_out = "choose another run.name or remove the folder"
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path}: not a folder; {way_out}")
        _check_writable(self.path)
        # A process that stopped before it claimed the folder has left word why, one that was killed a file not yet renamed.
        if not self.path.exists() or not any(entry.name not in UNCLAIMED for entry in self.path.iterdir()):
            return False
        if not (self.path / "recipe.yaml").is_file():
            raise InputError(f"{self.path}: in use by something that is no run; {way_out}")
        if resume == "never":
            raise InputError(f"{self.path}: in use, and run.resume is never; {way_out}")
        try:
            there = yaml.safe_load((self.path / "recipe.yaml").read_text(encoding="utf-8"))
        except yaml.YAMLError:
            raise InputError(f"{self.path / 'recipe.yaml'}: not valid YAML, so nobody knows whose it is; {way_out}") from None
        different = _difference(self._fixed(there), self._fixed(yaml.safe_load(resolved_yaml(self.recipe))))
        if different is not None:
            raise InputError(
                f"{self.path}: in use by another recipe ({self.path / 'recipe.yaml'}), which differs in {different}; {way_out}"
            )
        return True

    def claim(self) -> None:
        """Makes a folder that nobody has this recipe's; call it after `check`. One that was claimed before stays as it is."""
        self.made = not (self.path / "recipe.yaml").is_file()
        if not self.made:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write("recipe.yaml", resolved_yaml(self.recipe))
        except OSError as error:
            raise InputError(f"{self.path}: cannot write the run's folder: {error.strerror}") from None

    def go_on(self) -> None:
        """Notes what differs from the recipe that claimed the folder; for its one writer."""
        self.write("recipe.yaml", resolved_yaml(self.recipe))

    def withdraw(self) -> None:
        """Empties a folder that this process has made, for a mistake that was found only then; another one stays as it is."""
        for entry in self.path.iterdir() if self.made else ():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def result(self) -> dict[str, Any] | None:
        """What the finished run gave; None if it is not finished."""
        if not (self.path / "final").is_dir() or not (self.path / "exit.json").is_file():
            return None
        ended = json.loads((self.path / "exit.json").read_text(encoding="utf-8"))
        return ended["result"] if ended["code"] == 0 else None

    def write_exit(self, code: int, reason: str, result: dict[str, Any] | None = None) -> None:
        """Says why the run ended; 0 is finished and has a result."""
        self.write("exit.json", json.dumps({"code": code, "reason": reason, "result": result}, indent=2) + "\n")

    def write(self, name: str, text: str) -> None:
        """A whole file or none."""
        aside = self.path / f".{name}.partial"
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, self.path / name)

    def _fixed(self, values: dict[str, Any]) -> dict[str, Any]:
        flat = _flatten(values)
        return {k: v for k, v in flat.items() if not any(k == free or k.startswith(f"{free}.") for free in self.free)}


def _check_writable(path: Path) -> None:
    """InputError if the folder, or the first of its parents that is there, cannot be written."""
    place = next(p for p in (path, *path.parents) if p.exists())
    if not place.is_dir():
        raise InputError(f"run.output_dir: '{place}' is a file; name a folder, which need not be there yet")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"run.output_dir: the folder '{place}' cannot be written; set run.output_dir to one that can")


def _flatten(values: Any, place: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {place: values}
    return {k: v for name, value in values.items() for k, v in _flatten(value, f"{place}.{name}".lstrip(".")).items()}


def _difference(there: dict[str, Any], here: dict[str, Any]) -> str | None:
    """The first place in which two flat recipes differ, with both values."""
    for place in sorted({*there, *here}):
        if there.get(place) != here.get(place):
            return f"{place} ({there.get(place)!r} there, {here.get(place)!r} here)"
    return None
