"""Read and write the project's files."""
