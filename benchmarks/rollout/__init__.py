"""What a rollout costs the clients that are served meanwhile."""
