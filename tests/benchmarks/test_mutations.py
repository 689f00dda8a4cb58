"""The faults of `mutations.py` can still be put into the package. Whether tests find them, the script says."""

import ast

import pytest

from benchmarks.mutations import FAULTS, ROOT, Fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_text_of_a_fault_is_found_once(fault):
    text = fault.put_into(ROOT)
    ast.parse(text)
    with pytest.raises(ValueError, match="must hold this text once, not 0 times"):
        Fault(fault.name, fault.file, "no such text", "").put_into(ROOT)
