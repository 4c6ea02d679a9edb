"""The learner's Prometheus endpoint: every metric of `registry.py` on one page, for as long as the learner lives.

    Telemetry (samples, steps)  ->  RunMetrics         ->  HTTP, GET /metrics
    actors' engines             ->  EngineMetricsPage  ->        GET /engines

The page is made when it is asked for, out of the newest sample; asking costs the run a few milliseconds and changes
nothing. `telemetry.py` opens it on rank 0. Prometheus finds the address in the run's file of scrape targets.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import socket
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import Collector

from learner.telemetry.engines import EngineMetricsPage
from learner.telemetry.registry import METRICS, STEP_BUCKETS, Metric
from learner.telemetry.sample import ActorSample, Sample, has_counts
from learner.telemetry.values import Values, of_figures, of_sample
from protocol.addresses import bind_address
from protocol.config import Recipe
from protocol.errors import RecipeError
from protocol.rundir import RunDir, replace_file

log = logging.getLogger(__name__)

REQUEST_S = 10.0
"""A client that neither asks nor reads for so long is cut off."""
PAGES = ("/metrics", "/engines", "/")
TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"
MAX_CLIENTS = 16
"""At once; the next ones are turned away."""
STEP_PHASES = {"total": "step_s", "wait": "wait_s", "train": "train_s", "publish": "publish_s"}
"""Part of a step -> the figure that has its length."""

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


class Histogram:
    """Lengths, counted into buckets."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = (*bounds, math.inf)
        self.counts = [0] * len(self.bounds)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bound -> how many were at most so long."""
        texts = [("+Inf" if math.isinf(bound) else str(bound)) for bound in self.bounds]
        return [(text, float(sum(self.counts[: index + 1]))) for index, text in enumerate(texts)]


class Growing:
    """Keeps counters from ever going back while what they count is the same process."""

    def __init__(self) -> None:
        self._incarnations: dict[str, str] = {}
        self._reached: dict[tuple[str, tuple[str, ...]], float] = {}

    def forget_restarted(self, actors: Mapping[str, ActorSample]) -> None:
        """An actor that is another process than before begins anew, and so may its counters."""
        for name, now in ((name, actor) for name, actor in actors.items() if has_counts(actor)):
            if self._incarnations.get(name, now.incarnation) != now.incarnation:
                self._reached = {key: value for key, value in self._reached.items() if key[1][:1] != (name,)}
            self._incarnations[name] = now.incarnation

    def __call__(self, metric: str, values: Values) -> Values:
        for labels, value in values.items():
            self._reached[metric, labels] = max(value, self._reached.get((metric, labels), value))
        return {labels: self._reached[metric, labels] for labels in values}


class RunMetrics(Collector):
    """The run's metrics, for a registry of their own. `see` and `step` are told; scrapes come from other threads."""

    def __init__(self, recipe: Recipe, run: RunDir) -> None:
        self.planned = recipe.steps
        """Steps that the run is to make."""
        self._constants: dict[str, Values] = {
            "tandem_run_info": {(name_of(run), recipe.method, recipe.model.path): 1.0},
            "tandem_run_start_time_seconds": {(): time.time()},
        }
        self._lock = threading.Lock()
        self._sample: Sample | None = None
        self._before: Sample | None = None
        self._figures: dict[str, float] = {}
        self._lasting = {metric.figure for metric in METRICS if metric.lasts}
        self._steps = {phase: Histogram(STEP_BUCKETS) for phase in STEP_PHASES}
        self._growing = Growing()

    def see(self, sample: Sample) -> None:
        """The run as it is now."""
        with self._lock:
            self._before, self._sample = self._sample, sample

    def step(self, figures: Mapping[str, float]) -> None:
        """A step is done; its figures, as they go into metrics.jsonl."""
        with self._lock:
            kept = {name: self._figures[name] for name in self._lasting & self._figures.keys()}
            self._figures = kept | dict(figures)
            for phase, figure in STEP_PHASES.items():
                if (length := figures.get(figure)) is not None:
                    self._steps[phase].add(length)

    def amend(self, figures: Mapping[str, float]) -> None:
        """More figures of the last step."""
        with self._lock:
            self._figures = self._figures | dict(figures)

    def describe(self) -> Iterable[Family]:
        """Every family there may be, without values."""
        return [_family(metric) for metric in METRICS]

    def collect(self) -> Iterator[Family]:
        """The families that have values now, in the registry's order."""
        with self._lock:
            values = self._constants | of_figures(self._figures)
            if self.planned:
                values["tandem_learner_steps_planned"] = {(): float(self.planned)}
            if self._sample is not None:
                values |= of_sample(self._sample, self._before)
                self._growing.forget_restarted(self._sample.actors)
            families = [self._filled(metric, values.get(metric.name, {})) for metric in METRICS]
        yield from (family for family in families if family.samples)

    def _filled(self, metric: Metric, values: Values) -> Family:
        family = _family(metric)
        if isinstance(family, HistogramMetricFamily):
            for phase, histogram in self._steps.items():
                if any(histogram.counts):
                    family.add_metric([phase], histogram.buckets(), histogram.sum)
            return family
        if metric.kind == "counter":
            values = self._growing(metric.name, values)
        for labels, value in values.items():
            family.add_metric(labels, value)
        return family


def name_of(run: RunDir) -> str:
    """The label `run`: what the run's directory is called. Several runs may have been started with one recipe."""
    return run.path.resolve().name


def _family(metric: Metric) -> Family:
    kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
    return kinds[metric.kind](metric.name, metric.help, labels=metric.labels)


# --- HTTP -------------------------------------------------------------------------------------------------------------


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_S

    def log_message(self, *_: Any) -> None:
        """A scrape is no news."""


class _Server(ThreadingWSGIServer):
    """A thread for each request, of which there are never many."""

    def __init__(self, address: tuple[str, int], handler: type[_Handler]) -> None:
        self.address_family = _family_of(address[0])
        self._free = threading.BoundedSemaphore(MAX_CLIENTS)
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """As HTTPServer's, without asking a name server what this machine is called."""
        socket_address = self.server_address
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(socket_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, *_: Any) -> None:
        """A client that went away is none of ours."""
        log.debug("a scrape was cut off", exc_info=True)


def _pages(metrics: Collector, engines: EngineMetricsPage) -> Callable[..., Iterable[bytes]]:
    """A WSGI application with the pages /metrics, also called /, and /engines. Always in Prometheus' plain text."""
    registry = CollectorRegistry()
    registry.register(metrics)
    own = make_wsgi_app(registry)

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        if path not in PAGES:
            start_response("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
            return [f"found {path!r}, allowed: {', '.join(PAGES)}\n".encode()]
        if path == "/engines" and method == "GET":
            start_response("200 OK", [("Content-Type", TEXT_FORMAT)])
            return [engines.text()]
        return own(environ | {"HTTP_ACCEPT": "text/plain"}, start_response)  # says what other methods than GET get

    return app


@contextmanager
def serving(metrics: RunMetrics, engines: EngineMetricsPage, recipe: Recipe, run: RunDir) -> Iterator[str]:
    """Within: metrics are served by HTTP, and the run's file of scrape targets says where. Yields HOST:PORT.

    Raises RecipeError if the port cannot be bound."""
    app = _pages(metrics, engines)
    host, port = bind_address(recipe.metrics.host), recipe.metrics.port
    try:
        server = make_server(host, port, app, _Server, _Handler)
    except OSError as error:
        raise RecipeError(_cannot_bind(host, port, error)) from None
    place = f"[{host}]:{server.server_port}" if ":" in host else f"{host}:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="metrics", daemon=True)
    thread.start()
    replace_file(run.scrape_targets, json.dumps([{"targets": [place], "labels": {"run": name_of(run)}}]) + "\n")
    log.info("metrics for Prometheus: http://%s/metrics", place)
    try:
        yield place
    finally:
        run.scrape_targets.unlink(missing_ok=True)
        server.shutdown()
        server.server_close()
        thread.join(REQUEST_S)


def check_address(recipe: Recipe) -> None:
    """Raise RecipeError if `serving` would."""
    host, port = bind_address(recipe.metrics.host), recipe.metrics.port
    with socket.socket(_family_of(host), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise RecipeError(_cannot_bind(host, port, error)) from None


def _family_of(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _cannot_bind(host: str, port: int, error: OSError) -> str:
    """For people: which key to change."""
    if port and error.errno not in (errno.EADDRNOTAVAIL, errno.ENODEV):
        return (
            f"metrics.port: found {port}, which cannot be bound on {host} ({error.strerror}); allowed: a free port, 0"
            " for any, or metrics.serve = false"
        )
    return f"metrics.host: found {host!r}, which cannot be bound ({error.strerror}); allowed: one of this machine's own"
