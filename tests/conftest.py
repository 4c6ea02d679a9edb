"""What every test takes for granted."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost,::1"
"""Servers that tests start are on this machine, whatever proxy its user goes through."""

settings.register_profile("tandem", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tandem")  # no example fails for the time that it takes
