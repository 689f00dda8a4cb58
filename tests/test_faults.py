"""The table of faults (`faults.py`): each ends in words, none in silence or in other numbers."""

import faults
import pytest


@pytest.mark.slow
def test_no_fault_is_silent(tmp_path):
    found = faults.run(3, 0, tmp_path)
    assert not [row for row in found if faults.is_silent(row[1])]
    assert len(found) >= 3 + 9 + 4 + 2
    if untried := [fault for fault, outcome in found if faults.is_untried(outcome)]:
        pytest.skip(f"all others are told, but not tried here: {untried}")


def test_what_is_silent_is_seen():
    assert faults.is_silent("WRONG NUMBERS")
    assert faults.is_silent("SILENT")
    assert faults.is_silent("LATE: the run had ended, with 0")
    assert not faults.is_silent("told 3, unharmed 9")
    assert not faults.is_silent("refused: A checkpoint of ...")
