"""What all tests share: where the data sets are, and one thread for tiny models."""

import os
import signal
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent

# Tiny models are slower on more threads, and tests then disturb each other less. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell's script starts what it puts into the background with Ctrl-C ignored, and commands that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of GSM8K, MATH-500 and the others; it is not part of the checkout, and a test that needs it may be skipped."""
    named = os.environ.get("COHORT_TEST_DATA")
    folder = Path(named) if named else CHECKOUT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no test data: {folder} is no folder; COHORT_TEST_DATA names the one with gsm8k/ and the others")
    return folder
