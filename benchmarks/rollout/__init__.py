"""What a rollout costs those who are served meanwhile."""
