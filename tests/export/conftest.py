"""A hub to push to."""

import pytest
from hub_server import TOKEN, open_hub


@pytest.fixture
def hub(monkeypatch):
    """A hub of this machine in the place of the one that huggingface_hub asks, and a login there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # whose server would be another one
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with open_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.address)
        place = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", place)
        yield hub
