import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # of what is in force: the profile of CI stays that in all else
settings.load_profile("untimed")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background; what is sent here is to arrive
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test downloads anything


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def full_mnist() -> Path:
    """The folder of the full set's IDX files, named by SPARKJOY_MNIST."""
    folder = os.environ.get("SPARKJOY_MNIST")
    if not folder:
        pytest.skip("SPARKJOY_MNIST does not name a folder with the full MNIST set")
    return Path(folder)
