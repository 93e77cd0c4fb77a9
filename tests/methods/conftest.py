from __future__ import annotations

import pytest
from test_ast import SETTING, make_job

from sparsekit.methods.ast import ast


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """A job with a log of every step and what training it as SETTING says gave; to be read only."""
    job = make_job(tmp_path_factory.mktemp("plain"))
    return job, ast(job, **SETTING)
