"""A policy in another precision: `python -m rl.export FOLDER OUT --precision bf16 | fp32 | fp8`.

bf16 and fp32 write the values of an FP8 policy, for whatever does not read codes; fp8 writes codes, as `policy.precision: fp8` would
train and send them. FOLDER is a folder that holds a policy, such as a checkpoint of a run, or a hub id; OUT is a new folder. Tensors
are converted one at a time, so a model larger than memory is no hindrance. Exit codes are those of `rl/command.py`.
"""

import argparse
import sys
from pathlib import Path

from data.recipe import InputError
from rl.command import mistake
from rl.config import Fp8Config, PolicyConfig
from rl.inputs import check_policy


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rl.export", description="Writes a policy in another precision, to a new folder.")
    parser.add_argument("folder", help="of a policy, in any precision; or a hub id")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--precision", choices=("bf16", "fp32", "fp8"), required=True)
    parser.add_argument(
        "--keep", nargs="+", metavar="NAME", default=Fp8Config().keep,
        help="fp8: modules that stay in BF16, by the ends of their names; in place of the default, %(default)s (policy.fp8.keep)",
    )  # fmt: skip
    given = parser.parse_args()
    try:
        if given.out.exists():
            raise InputError(f"OUT: '{given.out}' exists; name a new folder, or remove it")
        check_policy(PolicyConfig(path=given.folder))
        print(export(given.folder, given.out, given.precision, given.keep))
    except InputError as error:
        return mistake(error)
    return 0


def export(folder: str, out: Path, precision: str, keep: list[str]) -> str:
    """Writes `out`; says what was written."""
    from rl.checkpoint import full_disk_named  # loads torch
    from rl.fp8.folder import rewrite
    from rl.policy import policy_folder

    source = policy_folder(folder, None)
    with full_disk_named(out.absolute().parent, f"'{out}'"):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        if precision == "fp8":
            rewrite(source, out, Fp8Config(keep=keep), "bf16", merged=False)
        else:
            rewrite(source, out, None, precision, merged=True)
    before, after = (sum(file.stat().st_size for file in place.glob("*.safetensors")) for place in (source, out))
    return f"{out}: {precision}, {after:,} bytes of weights (from {before:,})"


if __name__ == "__main__":
    sys.exit(main())
