"""The parts of pipelines.compare: what an arm is, how one is trained and measured, and the report over all."""
