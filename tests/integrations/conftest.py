"""Refusals that must leave a model as it was."""

from __future__ import annotations

import pytest


@pytest.fixture
def refuses():
    """Return a function that demands a refusal which changed nothing."""
    from tiny_models import snapshot

    from hal.integrations.transformers import quantize

    def check(model, error, match, scheme="int8_channel", **options):
        before = snapshot(model)
        with pytest.raises(error, match=match) as caught:
            quantize(model, scheme, **options)
        assert snapshot(model) == before
        return caught.value

    return check
