"""The model registry: MLflow, packages, signatures and promotions."""
