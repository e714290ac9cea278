"""Several processes share the tests (pyproject.toml). So each one computes with one thread."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")            # before torch starts

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"                 # before triton is first imported


def pytest_collection_modifyitems(items):
    """The longest test comes first. As the last it would keep one process busy while the others wait."""
    items.sort(key=lambda item: item.path.name != "test_world.py")
