"""One thread for every test: small tensors gain nothing from more, and workers share the cores."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)
