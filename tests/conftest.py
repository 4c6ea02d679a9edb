"""What every test takes for granted."""

from __future__ import annotations

import os

os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost,::1"
"""Servers that tests start are on this machine, whatever proxy its user goes through."""
