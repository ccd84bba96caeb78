"""These need a CUDA device; without one they are skipped, in one line."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "/gpu/" in str(item.path).replace("\\", "/"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
