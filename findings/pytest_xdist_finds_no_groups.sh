#!/usr/bin/env bash
# pytest-xdist 3.8.0 under pytest 9.2.0: `--dist loadgroup` spreads one group over all workers, without a warning.
#
# What one expects, from its documentation: tests marked `xdist_group` with one name run on one worker. Fixtures that
# must not run twice, and programs that are compiled once per process, rely on it.
# What happens: the 20 tests below, all of one group, run on both of two workers. Under pytest 8.4.2 the same file runs
# on one. pytest-xdist appends the group to the private `_nodeid` of a test, which pytest 9.2 no longer reads.
# Workaround: a scheduler of one's own through the hook `pytest_xdist_make_scheduler`, or `--dist loadfile`.
#
# It prints how many workers ran the group, and fails if that changes: 2 under pytest 9.2.0, 1 under pytest 8.4.2.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat >test_group.py <<'EOF'
import os
import pathlib
import time

import pytest


@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("i", range(20))
def test_one(i):
    pathlib.Path(os.environ["PYTEST_XDIST_WORKER"]).touch()
    time.sleep(0.02)
EOF
workers() {
    python3 -m venv "$1"
    "$1/bin/pip" install --quiet "pytest==$1" "pytest-xdist==3.8.0"
    "$1/bin/python" -m pytest --quiet -p no:cacheprovider -n 2 --dist loadgroup test_group.py >"$1.log" || { cat "$1.log"; exit 1; }
    found=$(find . -maxdepth 1 -name 'gw*' | wc -l)
    rm -f gw*
    echo "pytest $1: one group ran on $found worker(s)"
    [ "$found" -eq "$2" ]
}
workers 9.2.0 2
workers 8.4.2 1
