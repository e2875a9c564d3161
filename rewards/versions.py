"""Which version of each reward function a score is of.

A reward's version is a hash of its source, and of every module of Cohort that this one imports: a correction anywhere in it gives
another version, by which `data.retract` finds the rows that rest on the old one. Its options are part of it. A journal that holds
scores says of which versions they are, so that none is taken for what a changed function would say.
"""

import ast
import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from data.journal import Journal
from rewards.config import RewardsConfig
from rewards.plugins import ModuleMissing, find_source

OURS = ("data", "rewards")
"""Packages whose modules count as part of a reward function that imports them."""
SHORT = 12
"""Hexadecimal digits of a version."""
META = "reward_versions"
"""The journal's key for the versions: reward function -> version."""


def reward_versions(rewards: RewardsConfig) -> dict[str, str]:
    """Reward function by its key -> its version."""
    versions = {}
    for key, plugin in rewards.functions().items():
        digest = hashlib.sha256(json.dumps(rewards.part(key).options, sort_keys=True).encode())
        for path in _sources(find_source(plugin.source)):
            digest.update(path.read_bytes())
        versions[key] = digest.hexdigest()[:SHORT]
    return versions


def changed_reward(journal: Journal, versions: Mapping[str, str]) -> str | None:
    """The first reward function that is not what a journal's scores are of; None if all are, or if the journal does not say."""
    held = journal.meta(META)
    return None if held is None else next((name for name, version in versions.items() if held.get(name) != version), None)


def _sources(path: Path) -> list[Path]:
    """A module's file and those of the modules of Cohort that it imports, by way of others too; by name."""
    found: dict[Path, None] = {}
    waiting = [path]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found[file] = None
            for module in _imported(file):
                if module.split(".")[0] in OURS:
                    with suppress(ModuleMissing):  # an optional import: what is not there is no part of what runs
                        waiting.append(find_source(module))
    return sorted(found, key=lambda file: (file != path, str(file)))


def _imported(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules.add(node.module)
        elif isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
    return {module for module in modules if "." in module}
