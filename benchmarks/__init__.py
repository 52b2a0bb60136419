"""What the package promises about speed and memory, measured: `python -m benchmarks.NAME [--json FILE]`."""
