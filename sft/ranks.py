"""Which rank this process is and how many there are, as every launcher says it, before torch is loaded."""

import os


def ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"
