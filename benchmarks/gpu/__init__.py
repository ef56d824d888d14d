"""What settles a GPU in ten minutes: `python -m internvl.benchmarks gpu --minutes 10`.

Made for a rented machine: models get random weights on the device, nothing is read but this package. Correctness
comes first, then speed at the released sizes. Every row has a time box and says what it lacks where it cannot run;
results are written after each. `--stand-in` runs the same rows with tiny models, on a CPU too.
"""
