"""vLLM's metrics: names, types, labels and buckets of `vllm/v1/metrics/loggers.py` and `buckets.py` (0.32)."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from serving.engine.simulator.kv import KvCache

_LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TTFT = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
_ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_STEP = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_REASONS = ("stop", "length", "abort", "error", "repetition")


class Metrics:
    """One engine's series, in the registry it is given."""

    def __init__(self, registry: CollectorRegistry, model_name: str, max_model_len: int, kv: KvCache) -> None:
        self._registry = registry
        self._labels = (model_name, "0")
        ProcessCollector(registry=registry)
        sizes = [m * 10**e for e in range(8) for m in (1, 2, 5) if m * 10**e <= max_model_len]

        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Number of prefill tokens processed.")
        self._generation_tokens = self._counter("vllm:generation_tokens", "Number of generation tokens processed.")
        self._preemptions = self._counter("vllm:num_preemptions", "Cumulative number of preemption from the engine.")
        self._queries = self._counter("vllm:prefix_cache_queries", "Prefix cache queries, in tokens.")
        self._hits = self._counter("vllm:prefix_cache_hits", "Prefix cache hits, in tokens.")
        self._cached = self._counter("vllm:prompt_tokens_cached", "Number of cached prompt tokens.")
        success = Counter(
            "vllm:request_success",
            "Count of successfully processed requests.",
            ["model_name", "engine", "finished_reason"],
            registry=registry,
        )
        self._success = {reason: success.labels(*self._labels, reason) for reason in _REASONS}

        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "Time to first token.", _TTFT)
        self.inter_token = self._histogram("vllm:inter_token_latency_seconds", "Inter-token latency.", _ITL)
        self._step = self._histogram("vllm:iteration_tokens_total", "Number of tokens per engine step.", _STEP)
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "End-to-end latency.", _LATENCY)
        self._queue = self._histogram("vllm:request_queue_time_seconds", "Time in WAITING phase.", _LATENCY)
        self._inference = self._histogram("vllm:request_inference_time_seconds", "Time in RUNNING phase.", _LATENCY)
        self._prompt_size = self._histogram("vllm:request_prompt_tokens", "Prompt tokens a request.", sizes)
        self._answer_size = self._histogram("vllm:request_generation_tokens", "Answer tokens a request.", sizes)

        size = kv.block_tokens
        info = {"block_size": str(size), "num_gpu_blocks": str(kv.tokens // size), "engine": "0"}
        info["kv_cache_size_tokens"] = str(kv.tokens)
        Gauge(
            "vllm:cache_config_info", "Information of the LLMEngine CacheConfig", list(info), registry=registry
        ).labels(**info).set(1)

    def watch(
        self, *, running: Callable[[], float], waiting: Callable[[], float], kv_usage: Callable[[], float]
    ) -> None:
        """Gauges read the core when they are scraped, so that they cannot drift."""
        for name, text, read in (
            ("vllm:num_requests_running", "Number of requests in model execution batches.", running),
            ("vllm:num_requests_waiting", "Number of requests waiting to be processed.", waiting),
            ("vllm:kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", kv_usage),
        ):
            gauge = Gauge(name, text, ["model_name", "engine"], registry=self._registry)
            gauge.labels(*self._labels).set_function(read)
        by_reason = Gauge(
            "vllm:num_requests_waiting_by_reason",
            "Number of waiting requests by reason.",
            ["model_name", "engine", "reason"],
            registry=self._registry,
        )
        by_reason.labels(*self._labels, "capacity").set_function(waiting)
        by_reason.labels(*self._labels, "deferred").set(0)

    def first_token(self, prompt_tokens: int, cached: int, ttft_s: float) -> None:
        self._prompt_tokens.inc(prompt_tokens)
        self._queries.inc(prompt_tokens)
        self._hits.inc(cached)
        self._cached.inc(cached)
        self._ttft.observe(ttft_s)

    def tokens(self, step: int, generated: int) -> None:
        """One engine step that computed `step` tokens, of them `generated` new ones."""
        self._step.observe(step)
        self._generation_tokens.inc(generated)

    def preempted(self) -> None:
        self._preemptions.inc()

    def finished(self, reason: str, *, prompt_tokens: int, tokens: int, waited_s: float, ran_s: float) -> None:
        self._success[reason].inc()
        self._e2e.observe(waited_s + ran_s)
        self._queue.observe(waited_s)
        self._inference.observe(ran_s)
        self._prompt_size.observe(prompt_tokens)
        self._answer_size.observe(tokens)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ["model_name", "engine"], registry=self._registry).labels(*self._labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] | list[int]) -> Histogram:
        family = Histogram(name, text, ["model_name", "engine"], buckets=buckets, registry=self._registry)
        return family.labels(*self._labels)
