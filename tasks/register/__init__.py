"""A trained and evaluated model -> a verified package in the store, and its version in MLflow."""
