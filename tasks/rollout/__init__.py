"""A registered version -> a model that serves, tested over its API, before it becomes the champion."""
