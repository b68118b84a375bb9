"""The tests run against the package beside them, installed or not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
