"""Commands and public functions give the values that tests/golden holds; see tests/golden/run.py.

The variants of stages 1 and 2 that stage 3 has as well are left to `python tests/golden/run.py`: a minute less.
"""

import importlib.util
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
PATH = Path(__file__).parent / "golden" / "run.py"
spec = importlib.util.spec_from_file_location("golden", PATH)
golden = importlib.util.module_from_spec(spec)
spec.loader.exec_module(golden)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One world and one set of trainings for all cases."""
    folder = tmp_path_factory.mktemp("golden")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield golden.Runs(folder)


BY_HAND = ("stage1-accum", "stage1-2ranks", "stage1-4ranks", "stage2-4ranks")


@pytest.mark.parametrize("case", [case for case in golden.CASES if case not in BY_HAND])
def test_nothing_has_changed(case, runs):
    wrong = golden.check(case, runs)
    assert wrong is None, wrong
