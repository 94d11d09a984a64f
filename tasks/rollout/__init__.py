"""The rollout stage: serve a registered version, prove it over its API, and make it the champion."""
