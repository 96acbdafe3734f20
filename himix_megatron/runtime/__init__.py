"""What any process needs: durable files, failpoints, stop signals, background threads, logging. Knows nothing of models or data."""
