"""What the server counts, in Prometheus' text format (version 0.0.4)."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Histogram:
    """Counts of values in buckets of seconds."""

    def __init__(self) -> None:
        self._counts, self._sum = [0] * (len(_SECONDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        """One more value."""
        self._counts[bisect_left(_SECONDS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str) -> Iterator[str]:
        """Cumulative buckets, sum and count."""
        total = 0
        for bound, count in zip((*_SECONDS, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum}"
        yield f"{name}_count {total}"


class Metrics:
    """The server's own numbers; those of the engine are read when asked for."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # (path, status)
        self.disconnects = 0
        self.first_token, self.between_tokens, self.whole = Histogram(), Histogram(), Histogram()

    def text(self, gauges: Mapping[str, float], counters: Mapping[str, float]) -> str:
        """The page: `gauges` and `counters` are the engine's, by name."""
        return "\n".join(self._lines(gauges, {**counters, "client_disconnects": self.disconnects})) + "\n"

    def _lines(self, gauges: Mapping[str, float], counters: Mapping[str, float]) -> Iterator[str]:
        yield "# TYPE bloomery_requests_total counter"
        for (path, status), count in sorted(self.requests.items()):
            yield f'bloomery_requests_total{{path="{path}",status="{status}"}} {count}'
        for name, value in counters.items():
            yield f"# TYPE bloomery_{name}_total counter"
            yield f"bloomery_{name}_total {value}"
        for name, value in gauges.items():
            yield f"# TYPE bloomery_{name} gauge"
            yield f"bloomery_{name} {value}"
        histograms = {
            "time_to_first_token": self.first_token, "inter_token_latency": self.between_tokens, "request": self.whole
        }  # fmt: skip
        for name, histogram in histograms.items():
            yield f"# TYPE bloomery_{name}_seconds histogram"
            yield from histogram.lines(f"bloomery_{name}_seconds")
