"""Grafana beside a run: the dashboard "Tandem", made out of panels that name metrics of the registry alone."""
