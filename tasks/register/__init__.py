"""A trained and evaluated model -> a verified package in the store, and a version of it in MLflow."""
