"""Refusals that must leave a model as it was, and fp8 models where there is no GPU."""

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


@pytest.fixture(scope="module")
def device_without_kernels():
    """Let transformers load fp8 as it would beside a GPU; its own experts cannot run here."""
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    patch = pytest.MonkeyPatch()
    patch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
    yield
    patch.undo()
