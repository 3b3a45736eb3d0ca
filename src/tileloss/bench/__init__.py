"""Benchmarks: time, peak memory and throughput of the losses, side by side with what else computes them.

`workloads` says what is measured and `contestants` who computes it; a new loss or rival is one entry there. `measure`
takes a time or a peak, `sweep` runs many of them, `targets` holds the promises, `report` writes what came out, and
`command` is `tileloss bench`. What the figures mean, and what they do not, is in benchmarks/README.md.
"""

from tileloss.bench.command import main

__all__ = ["main"]
