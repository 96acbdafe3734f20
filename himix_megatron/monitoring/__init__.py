"""What a run measures and shows: metrics, TensorBoard, status, sample predictions, profiles, the ledger."""
