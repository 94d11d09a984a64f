"""Fine-tuning: Forge's against TRL's and Hugging Face's trainers, on the same model and the same tokens."""
