"""What any process needs: durable files, failpoints, stop signals, threads, logs. It knows nothing of models or data."""
