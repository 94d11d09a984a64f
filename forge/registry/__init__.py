"""MLflow, promotions and packages."""
