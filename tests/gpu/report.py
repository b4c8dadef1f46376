"""The text table of `make gpu`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Results = Mapping[str, Any]
_HEADER = f"{'benchmark':26}{'ratio':>7}{'floor':>7}{'aim':>6}{'plain ms':>10}{'ours ms':>10}{'GPU ms':>9}{'plain':>8}  launches (plain), waits"


def table(results: Results) -> str:
    """All results, at most 40 lines: the machine, what the tests say, and a line for each benchmark."""
    lines = [machine_line(results["machine"])]
    if "tests" in results:
        lines += test_lines(results["tests"])
    if "benchmark_note" in results:
        lines.append(f"benchmark: {results['benchmark_note']}")
    if results.get("benchmarks"):
        lines += ["", _HEADER]
        lines += [line(name, numbers) for name, numbers in results["benchmarks"].items()]
    for name, value in results.get("sweep", {}).items():
        lines.append(f"{name}: {value if isinstance(value, str) else f'{value:.3f} ms'}")
    return "\n".join(lines)


def machine_line(facts: Results) -> str:
    """One line on the card and its software."""
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "transformers"))
    return (
        f"{facts['card']} ({facts['memory_gib']} GiB), driver {facts['driver']}, {versions}, Python {facts['python']}"
    )


def test_lines(tests: Results) -> list[str]:
    """How many passed, and the first of those that did not."""
    counts = ", ".join(f"{count} {outcome}" for outcome, count in tests["counts"].items()) or "none ran"
    lines = [f"tests: {counts}, {tests['seconds']:.0f} s{tests.get('note', '')}"]
    others = [test for test in tests["tests"] if test["outcome"] in ("failed", "error")]
    lines += [f"  {test['outcome']}: {test['name']}: {test['message'][:110]}" for test in others[:12]]
    return lines + ([f"  and {len(others) - 12} more"] if len(others) > 12 else [])


def line(name: str, numbers: Results) -> str:
    """One benchmark: its ratio, times, and what its profile shows."""
    for what in ("error", "skipped"):
        if what in numbers:
            return f"{name:26}{what}: {numbers[what]}"
    bounds = f"{_number(numbers.get('floor')):>7}{_number(numbers.get('aim')):>6}"
    if "above_mib" in numbers:
        return (
            f"{name:26}{'':7}{bounds}{numbers['plain_mib']:10,.0f}{numbers['ours_mib']:10,.0f}"
            f"  MiB: {numbers['above_mib']:+,.0f} MiB"
        )
    text = f"{name:26}{numbers['ratio']:7.3f}{bounds}{numbers['plain_ms']:10.3f}{numbers['ours_ms']:10.3f}"
    if "profile" in numbers:
        ours, plain = numbers["profile"], numbers["plain_profile"]
        waits = sum(ours["waits"].values()) - sum(plain["waits"].values())
        text += f"{ours['gpu_busy_ms']:9.3f}{plain['gpu_busy_ms']:8.3f}  {ours['launches']} ({plain['launches']}), {waits:+}"
    if "seconds" in numbers:
        text += "  " + ", ".join(f"{step} {seconds:.1f} s" for step, seconds in numbers["seconds"].items())
    return text


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
