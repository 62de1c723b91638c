"""DeepSpeed without ZeRO, and ZeRO-1 and -2 with gains that were measured before, on the CPU."""

import deepspeed_cases
import pytest
from processes import outcomes

PACKAGES = ("deepspeed",)


def names(cases):
    return [case.__name__ for case in cases]


@pytest.fixture(scope="module")
def errors():
    return outcomes("deepspeed_cases", 2)


@pytest.mark.parametrize("case", names(deepspeed_cases.TRAINS))
def test_trains_as_one_process(errors, case):
    assert not errors[case], errors[case]


@pytest.mark.parametrize("case", names(deepspeed_cases.RESUMES))
def test_resumes_with_the_same_bits(errors, case):
    assert not errors[case], errors[case]


@pytest.mark.parametrize("case", names(deepspeed_cases.SHARDED))
def test_sharded(errors, case):
    assert not errors[case], errors[case]
