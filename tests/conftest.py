"""One thread for every test, and interruptions that arrive.

Small tensors gain nothing from more threads, and workers share the cores.
"""

import signal

import pytest
import torch

# A shell has SIGINT ignored in what it starts in the background: tests of interruption would hang.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)
