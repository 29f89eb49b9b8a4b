"""Comparisons as tables to read."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from helpers.harness.measured import Measured
from helpers.harness.variants import bits
from helpers.measure.stats import quantile_interval, ratio_interval
from helpers.toolkits.artefacts import build_seconds

MB = 1e6


def sizes(measured: Mapping[str, Measured]) -> pd.DataFrame:
    """Bits a weight; MB on disk, predicted and measured; MB held after loading and at most while answering; seconds of
    quantizing and loading."""
    rows = {}
    for name, m in measured.items():
        predicted, on_disk, peaks = m.variant.predicted(), m.variant.measured(), m.peaks or {}
        folder = getattr(m.variant, "folder", None)
        rows[name] = {
            "bits a weight": bits(m.variant), "predicted (MB)": predicted and predicted / MB,
            "on disk (MB)": on_disk and on_disk / MB, "measured / predicted": on_disk and predicted and on_disk / predicted,
            "loaded (MB)": peaks.get("loaded", np.nan) / MB, "peak in load (MB)": peaks.get("peak_load", np.nan) / MB,
            "peak in prefill (MB)": peaks.get("peak_prefill", np.nan) / MB,
            "peak in decode (MB)": peaks.get("peak_decode", np.nan) / MB, "load (s)": peaks.get("load_s", np.nan),
            "quantize (s)": folder and build_seconds(folder)}
    return pd.DataFrame(rows).T.astype(float)


def texts(measured: Mapping[str, Measured], full: str) -> pd.DataFrame:
    """Perplexity, KL from full precision (nats/token) and agreement, by text. Protocol: each passage alone, from its start
    token, in windows of at most 512 tokens, every token once."""
    rows = {}
    scored = {name: m for name, m in measured.items() if m.texts is not None}
    for text in dict.fromkeys(t for m in scored.values() for t in m.texts.tasks.tolist()):
        for name, m in scored.items():
            s, base = m.sums(text), measured[full].sums(text)
            rows[text, name] = {"perplexity": f"{s.perplexity():.3f}", "ΔNLL (nats/token)": str(s.delta_nll(base)),
                                "KL (nats/token)": str(s.kl_interval()), "agreement": f"{s.agreement():.1%}",
                                "tokens": f"{int(s.tokens.sum()):,}"}
    return pd.DataFrame(rows).T


def percentile(values: np.ndarray, q: float) -> str:
    """A percentile if the sample is large enough for an upper bound to it (p95: 59, p99: 299), else what is missing."""
    i = quantile_interval(values, q)
    return f"{i.estimate:.1f}" if np.isfinite(i.high) else f"needs more than {len(values)}"


def latencies(measured: Mapping[str, Measured], full: str) -> pd.DataFrame:
    """ms in process, one request at a time, and the ratio of the whole to that of full precision, paired by round."""
    rows = {}
    for name, m in measured.items():
        if m.timed is None:
            continue
        row = {f"{what} p{int(100 * q)}": percentile(m.latency_of(f"{what.lower()}_ms"), q)
               for what in ("TTFT", "ITL", "E2EL") for q in (0.5, 0.95)}
        logs = np.log(m.latency_of("e2el_ms") / measured[full].latency_of("e2el_ms"))
        ratio = ratio_interval(logs, np.ones(len(logs)))
        rows[name] = row | {"E2EL / full precision": "1" if name == full else
                            f"{np.exp(ratio.estimate):.2f} [{np.exp(ratio.low):.2f}, {np.exp(ratio.high):.2f}]",
                            "requests": str(len(logs)), "kernels": "; ".join(m.timed["kernels"])}
    return pd.DataFrame(rows).T
