"""Data sets from a hub. The one home of `datasets` in this package."""

from collections.abc import Iterator
from typing import Any

import datasets

from data.recipe import InputError


def hub_rows(name: str, split: str) -> Iterator[dict[str, Any]]:
    """Rows of one split of `org/name` or `org/name:configuration`; InputError with the library's reason if it cannot be had."""
    dataset_id, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(dataset_id, configuration or None, split=split)
    except ValueError as error:
        # No such split, or no such configuration: the library lists those there are.
        reason = " ".join(str(error).split("Example of usage")[0].split())
        raise InputError(f"{name}: {reason}; a configuration is named as {dataset_id}:NAME, a split by `split`") from None
    except OSError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{name}: no such file, nor a hub data set to be had ({reason}); check name and network") from None
    return iter(rows)
