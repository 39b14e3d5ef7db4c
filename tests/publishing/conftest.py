"""An author who publishes from this process."""

import pytest
from huggingface_hub import constants


@pytest.fixture
def author(own_hub, monkeypatch, tmp_path):
    """The Hub of this process, which has no token but the one that a test gives."""
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return own_hub
