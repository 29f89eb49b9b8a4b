"""The codes of every method are those of the first edition of the quantizers, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PLAIN = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def found():
    done = subprocess.run([sys.executable, "-m", "tests.code_hashes"], cwd=ROOT, env=os.environ | PLAIN, capture_output=True,
                          text=True, check=True)
    [line] = [x for x in done.stdout.splitlines() if x.startswith("HASHES")]
    return json.loads(line.removeprefix("HASHES"))


@pytest.fixture(scope="module")
def references():
    """By processor: AWQ's scales, and auto-gptq's arithmetic, differ from vendor to vendor even so."""
    return json.loads((ROOT / "tests" / "codes.json").read_text())


def processor():
    about = Path("/proc/cpuinfo")
    vendors = [x.split(": ")[1] for x in about.read_text().splitlines() if x.startswith("vendor_id")] if about.exists() else []
    return f"{(vendors or ['unknown'])[0]} {torch.backends.cpu.get_cpu_capability()}"


def test_what_looks_at_no_input_is_the_same_everywhere(found, references):
    for name in ("rtn", "rtn_asym_3", "nf4"):
        assert all(found["plans"][name] == reference["plans"][name] for reference in references.values()), name


def test_what_is_calibrated_is_the_same_where_sums_are(found, references):
    expected = references.get(processor())
    if not expected or found["arithmetic"] != expected["arithmetic"]:
        pytest.skip(f"tests/codes.json has no reference for the sums of this processor ({processor()})")
    assert found == expected
