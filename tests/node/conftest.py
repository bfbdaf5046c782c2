"""What tests of several nodes ask for."""
import pytest

from featherweight.nodes import node_text


@pytest.fixture
def texts(monkeypatch) -> list[str]:
    """What is shown on the nodes."""
    texts = []
    monkeypatch.setattr(node_text, "text_sender", lambda is_kept=True: texts.append)
    return texts
