"""What holds for all tests."""

from __future__ import annotations

import hypothesis

# an example's time depends on what else the machine does
hypothesis.settings.register_profile("llamamoe", deadline=None)
hypothesis.settings.load_profile("llamamoe")
