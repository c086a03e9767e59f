"""How threads wait is said before torch is loaded, unless the user has said it."""

import subprocess
import sys

import pytest
import tiny

TORCH = """
import os
os.write(1, os.environ.get("GOMP_SPINCOUNT", "nothing").encode())
os._exit(0)
"""


@pytest.mark.parametrize(
    "own, seen",
    [
        ({}, "20000"),
        ({"OMP_NUM_THREADS": "2"}, "nothing"),
        ({"KMP_BLOCKTIME": "1"}, "nothing"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
    ],
)
@pytest.mark.parametrize("program", ["train.py", "sample.py", "evaluate.py"])
def test_threads_wait_briefly_where_the_user_has_set_nothing(program, own, seen, tmp_path):
    (tmp_path / "torch.py").write_text(TORCH)
    started = [sys.executable, tiny.ROOT / program]
    environment = {"PYTHONPATH": str(tmp_path), **own}
    said = subprocess.run(started, capture_output=True, text=True, env=environment)
    assert said.stdout == seen, said.stderr
