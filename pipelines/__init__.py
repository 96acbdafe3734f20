"""What a user runs: `python -m pipelines.NAME RECIPE --section.field value`."""
