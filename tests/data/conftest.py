import pytest
from words import WordProcessor


@pytest.fixture
def processor():
    return WordProcessor()
