"""The planner's model of a training step; `tools/plan.py` is its command line, `docs/planner.md` its description."""
