"""Several processes share the tests (pyproject.toml). So each one computes with one thread."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")            # before torch starts
