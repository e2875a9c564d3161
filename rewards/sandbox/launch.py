"""How an interpreter is started that has the sandbox's modules and nothing else of Cohort."""

import os
import sys

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# `rewards` stands for its folder alone: importing the package itself would bring pydantic along, into every program.
_BOOT = (
    "import json, sys, types; package = types.ModuleType('rewards'); package.__path__ = [sys.argv[1]]; "
    "sys.modules['rewards'] = package; from rewards.sandbox.bootstrap import main; main(json.loads(sys.argv[2]))"
)


def python_command(config: str) -> list[str]:
    """As `python -I`, but with PYTHONHASHSEED and the like, which the environment given to it has."""
    return [sys.executable, "-s", "-P", "-c", _BOOT, _PACKAGE, config]
