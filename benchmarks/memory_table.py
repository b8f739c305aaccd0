"""The table that `benchmarks/memory.py` makes of its results."""

from __future__ import annotations

import statistics
from typing import Any


def table(result: dict[str, Any]) -> str:
    """The results in Markdown."""
    facts = result["about"]
    packages = ", ".join(f"{name} {number}" for name, number in facts["packages"].items())
    lines = [
        "# Estimated and measured memory",
        "",
        f"`{facts['command']}`, on {facts['cpu_count']} cores of {facts['cpu']}; Python {facts['python']}, "
        f"{facts['libc']}, {packages}. Medians over the repeats; MB is 10^6 bytes.",
        "",
        "Growth is the peak of the resident set in training, less the resident set before there was a model. "
        "`returning` is glibc as `--return_freed_memory true` sets it on a CPU (blocks of 1 MiB and more go back to "
        "the system when freed; `convexlm.allocator`), `jemalloc` is jemalloc preloaded, `glibc` is glibc as it "
        "comes, the default, which keeps some of what was freed. Errors are (estimate - measured) / measured. `whole "
        "process` is `returning`'s, framework "
        "included. On a CPU the head decides by timing, once a process, whether half-precision products pay; the "
        "estimate is "
        "made in that process, "
        "so that it has the same answer. A dry run on a busy machine may have the other, which with bf16 weights made "
        "about 200 MB here. The framework is taken for 580 MB, between two machines' (523 to 530 and 600 to 630), "
        "and 50 more with bitsandbytes. Two processes train over gloo; the figures are those of the one that took "
        "most. "
        "ZeRO in 16 bits, which transformers has on a GPU only: not measured.",
        "",
        *gpu_lines(result.get("gpu")),
        "| case | parameters | trained | estimate MB | returning MB | error | whole process | jemalloc MB | error "
        "| glibc MB | error |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        estimate, tight = row["estimate"], row.get("returning")
        kept = " | ".join(
            f"{row[name]['growth'] / 1e6:.0f} | {row[name]['growth_error']:+.1%}" if name in row else "not measured |"
            for name in ("jemalloc", "glibc")
        )
        returned = "not measured | |"
        if tight:
            returned = f"{tight['growth'] / 1e6:.0f}{'*' * ('by' in tight)} | {tight['growth_error']:+.1%} "
            returned += f"| {tight['peak_error']:+.1%}"
        lines.append(
            f"| {row['case']} | {estimate['parameters'] / 1e6:.1f} M | {estimate['trainable'] / 1e6:.2f} M "
            f"| {estimate['peak'] / 1e6:.0f} | {returned} | {kept} |"
        )
    if "earlier" in facts:
        lines += ["", f"\\* {facts['earlier']}"]
    lines.append("")
    for name, key in (
        ("returning", "growth_error"),
        ("returning", "peak_error"),
        ("jemalloc", "growth_error"),
        ("jemalloc", "peak_error"),
        ("glibc", "growth_error"),
    ):
        if not (errors := [abs(row[name][key]) for row in result["rows"] if name in row]):
            continue
        what = "the growth" if key == "growth_error" else "the whole process"
        inside = sum(error <= 0.15 for error in errors)
        lines.append(
            f"- {name}, {what}: {inside} of {len(errors)} cases within 15 %; largest error {max(errors):.1%}, "
            f"median {statistics.median(errors):.1%}."
        )
    for name in ("returning", "jemalloc"):
        timed = [row for row in result["rows"] if all("seconds" in row.get(which, ()) for which in (name, "glibc"))]
        if timed:
            ratios = [row[name]["seconds"] / row["glibc"]["seconds"] for row in timed]
            middle, spread = statistics.median(ratios), f"{min(ratios):.2f} to {max(ratios):.2f}"
            lines.append(
                f"- {name}, processor time of the steps, x glibc's in the same run: median {middle:.2f} ({spread}), "
                f"{len(timed)} cases."
            )
    return "\n".join(lines) + "\n"


def gpu_lines(gpu: dict[str, Any] | None) -> list[str]:
    """What benchmarks/large_models.py measured on a GPU, copied into the JSON by hand (`gpu`): how, and rows."""
    if gpu is None:
        return ["GPU: not measured.", ""]
    lines = [gpu["how"], "", "| training | estimate GB | allocated GB | error | reserved by the allocator GB |"]
    lines.append("|---|--:|--:|--:|--:|")
    for row in gpu["rows"]:
        error = row["estimate"] / row["allocated"] - 1
        gigabytes = " | ".join(f"{row[name]:.2f}" for name in ("estimate", "allocated"))
        lines.append(f"| {row['training']} | {gigabytes} | {error:+.1%} | {row['reserved']:.2f} |")
    return [*lines, "", "On the CPU:", ""]
