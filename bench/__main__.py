"""Every benchmark, one table after the other: `make bench`. They measure ratios side by side and assert nothing."""

from bench import latency, merge, operator, upload

for benchmark in (upload, merge, latency, operator):
    benchmark.main()
