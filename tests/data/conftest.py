"""Fixtures of the tests of m3i_scale.data."""

from __future__ import annotations

import pytest

from helpers.shards import category_source, text_source
from m3i_scale.config import Source


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> list[Source]:
    """60 text samples in unequal shards, and 21 labelled images."""
    folder = tmp_path_factory.mktemp("shards")
    return [text_source(folder, [17, 1, 30, 12]), category_source(folder, [10, 11])]
