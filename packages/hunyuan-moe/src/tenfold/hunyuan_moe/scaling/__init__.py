"""What a model costs, and how loss scales with it: FLOPs, cache bytes, the isoFLOP fit and its figure."""
