"""What a run says while it trains: metrics.jsonl, TensorBoard, the console."""
