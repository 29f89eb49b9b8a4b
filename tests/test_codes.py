"""The codes of every method are those of the first edition of the quantizers, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLAIN = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def found():
    done = subprocess.run([sys.executable, "-m", "tests.code_hashes"], cwd=ROOT, env=os.environ | PLAIN, capture_output=True,
                          text=True, check=True)
    [line] = [x for x in done.stdout.splitlines() if x.startswith("HASHES")]
    return json.loads(line.removeprefix("HASHES"))


@pytest.fixture(scope="module")
def expected():
    return json.loads((ROOT / "tests" / "codes.json").read_text())


def test_what_looks_at_no_input_is_the_same_everywhere(found, expected):
    for name in ("rtn", "rtn_asym_3", "nf4"):
        assert found["plans"][name] == expected["plans"][name], name


def test_what_is_calibrated_is_the_same_where_sums_are(found, expected):
    if found["arithmetic"] != expected["arithmetic"]:
        pytest.skip("this processor's Gram matrices differ in their last bits from those of tests/codes.json")
    assert found == expected
