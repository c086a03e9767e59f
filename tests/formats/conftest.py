"""What may lie where a file of records should be."""

import os

import pytest


@pytest.fixture(params=[os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def no_file(request):
    """Makes at a path what can be opened, and is no file: two of the three have no end."""
    return request.param
