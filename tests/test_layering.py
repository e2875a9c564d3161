"""The one layering rule, data <- rewards <- rl <- sft, and which heavy library may be loaded where."""

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
LAYERS = ["data", "rewards", "rl", "sft"]
ONE_HOME = ["datasets", "math_verify", "pyarrow", "ray", "trl", "vllm"]
"""Libraries that stand in one module of a package, or one subpackage."""
BARE_IMAGE = [
    "rl.advantage", "rl.attention", "rl.batch", "rl.fp8", "rl.learner", "rl.logp", "rl.loss", "rl.optim", "rl.policy",
]  # fmt: skip
"""What has to run where only torch, transformers, accelerate and pydantic are."""


def modules(package: str) -> list[Path]:
    return sorted((CHECKOUT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, at the top or inside functions; type-checking imports too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield str(node.module)


@pytest.mark.parametrize("package", LAYERS)
def test_a_folder_imports_itself_and_those_to_its_left(package):
    right = LAYERS[LAYERS.index(package) + 1 :]
    wrong = [(str(path), name) for path in modules(package) for name in imports(path) if name.split(".")[0] in right]
    assert not wrong


@pytest.mark.parametrize("package", LAYERS)
def test_a_heavy_library_has_one_home_in_a_package(package):
    homes = defaultdict(set)
    for path in modules(package):
        inside = path.relative_to(CHECKOUT / package)
        # A subpackage is one home: what stands in rl/engines/ is the engines' business.
        home = inside.parts[0]
        for name in imports(path):
            if name.split(".")[0] in ONE_HOME:
                homes[name.split(".")[0]].add(home)
    assert {library: sorted(found) for library, found in homes.items() if len(found) > 1} == {}


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `code`."""
    show = "import sys; print('loaded', *{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{show}"], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rsplit("loaded", 1)[1].split())


@pytest.mark.parametrize("package", ["data", "rewards"])
def test_importing_data_or_rewards_loads_nothing_heavy(package):
    heavy = {"torch", "vllm", "transformers", "trl", "datasets", "pyarrow", "ray"}
    assert not loaded_after(f"import {package}") & heavy


def test_reward_functions_load_without_torch():
    names = [".".join(path.relative_to(CHECKOUT).with_suffix("").parts) for path in modules("rewards")]
    code = "\n".join(f"import {name.removesuffix('.__init__')}" for name in names if not name.endswith("__main__"))
    assert not loaded_after(code) & {"torch", "vllm", "transformers", "trl"}


COMMANDS = [
    ".".join(path.relative_to(CHECKOUT).with_suffix("").parts)
    for package in LAYERS
    for path in modules(package)
    if "read_recipe" in path.read_text() and "__main__" in path.read_text()
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_loads_nothing_heavy_before_its_recipe_is_read(command):
    assert not loaded_after(f"import {command}") & {"torch", "vllm", "transformers", "trl", "datasets"}


def test_the_learner_runs_on_a_bare_gpu_image():
    there = [name for name in BARE_IMAGE if any((CHECKOUT / name.replace(".", "/")).parent.glob(f"{name[3:]}*"))]
    blocker = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'vllm', 'trl', 'datasets', 'pyarrow', 'math_verify', 'ray', 'peft'}:\n"
        "            raise ModuleNotFoundError(f'{name} is not on a bare image', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    loaded_after(blocker + "\n".join(f"import {name}" for name in there))
    assert "rl.learner" in there
