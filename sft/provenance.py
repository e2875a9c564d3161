"""What a Record's provenance is made of beside the versions of its rewards (`rewards.versions`): which weights, which recipe."""

import hashlib
from pathlib import Path

from data.recipe import Section, resolved_yaml

BLOCK_BYTES = 1 << 22


def weight_hash(folder: Path) -> str:
    """sha256 over config and every byte of every safetensors file of a policy."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def recipe_hash(recipe: Section) -> str:
    """sha256 of the recipe with all its defaults."""
    return hashlib.sha256(resolved_yaml(recipe).encode()).hexdigest()
