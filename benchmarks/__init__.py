"""Benchmarks of fxsparse: `python -m benchmarks zoo|face|lth|layers`.

`zoo` asks whether whole model zoos convert and still compute the same; `face`, `lth` and `layers` measure.
All timing goes through `fxsparse.timing.interleaved`, and nothing is timed before its output was checked.
"""
