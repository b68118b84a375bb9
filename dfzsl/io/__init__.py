"""Read and write files: class names, tensors, results, run directories."""
