"""The zoo of tests/models is compared on the GPU too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "models"))
