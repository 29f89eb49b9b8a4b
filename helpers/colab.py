"""Install what the book needs beside the torch that is already there: `python helpers/colab.py` (Google Colab).

torch and numpy stay as they are: the running notebook has them loaded, and Colab's torch fits its GPU. GPTQModel pins one
numpy exactly, so it comes without its dependencies, which are named here.
"""

import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

KEEP = ("torch", "numpy")
NEEDED = ("accelerate bitsandbytes beartype datasets defuser device-smi greenlet jaxtyping logbar matplotlib optimum pandas "
          "pypcre requests safetensors scipy threadpoolctl tokenicer torchao tqdm transformers").split()
EXACT = ("bitsandbytes", "gptqmodel", "optimum", "transformers")  # the book's results hang on these
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Install into the Python that runs this."""
    pinned = dict(line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().split())
    exact = {name: f"{name}=={pinned[name]}" for name in EXACT}
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as keep:
        keep.write("".join(f"{name}=={version(name)}\n" for name in KEEP))
        keep.flush()
        subprocess.run([*pip, "-c", keep.name, *(exact.get(name, name) for name in NEEDED)], check=True)
    # built against the installed torch; its only build needs are setuptools and wheel
    subprocess.run([*pip, "setuptools", "wheel"], check=True)
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", exact["gptqmodel"]], check=True)


if __name__ == "__main__":
    main()
