"""What a client does with a classifier: build, extend, predict, evaluate, export."""
