"""Prometheus beside a run: what it scrapes, which rules it evaluates, and what their expressions may name."""
