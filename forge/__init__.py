"""What the stages share, and what runs next to vLLM: plain Python that never imports flytekit or a stage."""
