"""Fixtures of the tests of recordings."""

import pytest

from hf_ibdistill import load_teachers


@pytest.fixture(scope="session")
def loaded(teachers):
    """The teachers as name → (model, image processor), because loading them takes longer than recording with them."""
    return {teacher.name: (teacher.model, teacher.image_processor) for teacher in load_teachers(teachers)}
