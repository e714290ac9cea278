"""Several processes share the tests, see pyproject.toml. So each computes with one thread, set before torch."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
