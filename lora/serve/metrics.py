"""Counters in Prometheus' text form, https://prometheus.io/docs/instrumenting/exposition_formats/"""

from collections import Counter

from lora.serve.engine import Engine

SECONDS = (0.1, 0.5, 1, 5, 15, 60)  # upper bounds of the buckets of durations

PATHS = ("/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions")


class Metrics:
    def __init__(self, engine: Engine):
        self.engine, self.requests = engine, Counter()
        self.buckets, self.seconds, self.count = Counter(), 0.0, 0

    def saw(self, path: str, status: int, seconds: float) -> None:
        """A request was answered; of a stream, its beginning."""
        path = path if path in PATHS else "other"
        self.requests[path, status] += 1
        if path.endswith("completions"):
            self.count, self.seconds = self.count + 1, self.seconds + seconds
            self.buckets.update(bound for bound in SECONDS if seconds <= bound)

    def text(self) -> str:
        engine = self.engine
        lines = ["# HELP lora_requests_total Requests by path and status.", "# TYPE lora_requests_total counter"]
        lines += [
            f'lora_requests_total{{path="{path}",status="{status}"}} {count}'
            for (path, status), count in sorted(self.requests.items())
        ]
        for name, kind, what, value in (
            ("lora_tokens_total", "counter", "Tokens of answers.", engine.tokens),
            ("lora_prompt_tokens_total", "counter", "Tokens of prompts.", engine.prompt_tokens),
            ("lora_steps_total", "counter", "Passes that gave a token to each answer under way.", engine.steps),
            ("lora_answers_active", "gauge", "Answers under way.", len(engine.active)),
            ("lora_requests_open", "gauge", "Answers under way and waiting.", engine.known),
        ):
            lines += [f"# HELP {name} {what}", f"# TYPE {name} {kind}", f"{name} {value}"]
        name = "lora_response_seconds"
        lines += [
            f"# HELP {name} Seconds to a whole response, or to the start of a stream.",
            f"# TYPE {name} histogram",
        ]
        lines += [f'{name}_bucket{{le="{bound}"}} {self.buckets[bound]}' for bound in SECONDS]
        lines += [
            f'{name}_bucket{{le="+Inf"}} {self.count}',
            f"{name}_sum {self.seconds:.6f}",
            f"{name}_count {self.count}",
        ]
        return "\n".join(lines) + "\n"
