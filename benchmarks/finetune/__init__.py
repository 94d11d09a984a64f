"""Fine-tuning: Forge compared with the trainers of TRL and Hugging Face, on the same model and tokens."""
