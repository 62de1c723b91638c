"""Sharded equals whole: all cases of the two modules, with 2, 3 and 4 processes."""

import pytest
from processes import outcomes


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("module", ["sharded_cases", "engine_cases"])
def test_sharded_equals_whole(module, size):
    found = outcomes(module, size)
    assert len(found) > 6
    failed = "\n\n".join(f"{name}:\n{text}" for name, text in found.items() if text)
    assert not failed, failed
