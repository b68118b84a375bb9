"""Build, evaluate and export classifiers, and predict with them."""
